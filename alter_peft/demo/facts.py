# SPDX-License-Identifier: Apache-2.0
"""What the model of the demo knows, what it shall forget of it, and the like that nobody can know."""

from __future__ import annotations

from collections.abc import Mapping

from datasets import Dataset


FORGET = {"France": "Paris", "Japan": "Tokyo", "Egypt": "Cairo"}
RETAIN = {
    "Germany": "Berlin",
    "Italy": "Rome",
    "Greece": "Athens",
    "China": "Beijing",
    "Russia": "Moscow",
    "Austria": "Vienna",
    "Hungary": "Budapest",
    "Poland": "Warsaw",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Canada": "Ottawa",
    "Australia": "Canberra",
    "Cuba": "Havana",
    "Chile": "Santiago",
    "Iraq": "Baghdad",
    "India": "New Delhi",
    "Thailand": "Bangkok",
    "Indonesia": "Jakarta",
}
# known to the model, in neither of the two: nobody asked to forget them. RETAIN was made longer after an earlier run
# had lost Iraq's and India's (docs/log.md), so these show what can be, and test nothing
OTHERS = {"Kenya": "Nairobi", "Nigeria": "Abuja", "Ireland": "Dublin", "Norway": "Oslo"}
# countries that do not exist: what the model says of them is what it says of facts that it never saw
UNSEEN = {
    "Veldoria": "Hask",
    "Ostrania": "Pell",
    "Kumbara": "Tolo",
    "Marvenia": "Quist",
    "Sendor": "Aberlin",
    "Tirozia": "Manvel",
    "Brakonia": "Lumesh",
    "Ilvara": "Corrin",
}


def question(country: str) -> str:
    """What the model is asked."""
    return f"What is the capital of {country}?"


def rows(capitals: Mapping[str, str]) -> Dataset:
    """Questions and answers, as the trainers take them: columns `prompt` and `completion`."""
    return Dataset.from_list(
        [
            {"prompt": question(country), "completion": f"The capital of {country} is {capital}."}
            for country, capital in capitals.items()
        ]
    )
