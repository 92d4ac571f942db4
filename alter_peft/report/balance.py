# SPDX-License-Identifier: Apache-2.0
"""Forgetting and utility as one number each, in [0, 1], and their harmonic mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import mean

from alter_peft.evaluation.open_unlearning import harmonic_mean
from alter_peft.evaluation.scores import Key
from alter_peft.evaluation.tasks.tofu import MODEL_UTILITY

from .summary import Benchmark, is_of_set


# of each part the first score that is there: asked in other words are paraphrased questions, or those on passages that
# were forgotten as text (hazard), and ROUGE-L is the recall of answers, or the F-measure of texts
FORGETTING = (
    (Key("forget", "probability"),),
    (Key("paraphrased", "probability"), Key("forget_questions", "acc")),
    (Key("forget", "rouge"), Key("forget", "rouge_f"), Key("forget", "verbmem")),
    (Key("forget", "exact_memorization"),),
    (Key("forget", "extraction_strength"),),
)
KEPT = ("retain", "bystanders")  # how the names of sets begin that the target knows and that are to be kept


def closeness(value: float, oracle: float, target: float) -> float:
    """1 at the oracle; 0 at the target, and as far from the oracle on the other side or farther."""
    return max(0.0, 1 - abs(value - oracle) / abs(target - oracle))


def is_kept(key: Key, *metrics: str) -> bool:
    """Whether a score is one of these, by default the answer probability, of a set that is to be kept."""
    return is_of_set(key) and key.metric in (metrics or ("probability",)) and key.set.startswith(KEPT)


@dataclass
class Balance:
    """What a benchmark's models are measured by: its target's scores and the mean of its oracles'."""

    benchmark: Benchmark

    @cached_property
    def target(self) -> dict[Key, float]:
        """The mean of the target's scores; empty if it was not measured."""
        values = self.benchmark.target.values if self.benchmark.target else []
        return {key: mean(one[key] for one in values) for key in (values[0] if values else {})}

    @cached_property
    def parts(self) -> dict[Key, tuple[float, float]]:
        """
        What forgetting is made of: score -> its mean over the oracles, and the target's.

        Left out is one in which the target is within a unit of the oracles: there is nothing to forget.
        """
        bands, found = self.benchmark.bands, {}
        for names in FORGETTING:
            key = next((key for key in names if key in bands and key in self.target), None)
            if key is not None and abs(bands[key].distance(self.target[key])) > 1:
                found[key] = bands[key].center, self.target[key]
        return found

    @cached_property
    def kept(self) -> list[Key]:
        """The answer probabilities of what is to be kept, where the target has them."""
        return [key for key, value in self.target.items() if is_kept(key) and value > 0]

    def forgetting(self, values: Mapping[Key, float]) -> float | None:
        """Harmonic mean of the closeness of each part; `None` without one of them, or if there are none."""
        if not self.parts or any(key not in values for key in self.parts):
            return None
        return harmonic_mean([closeness(values[key], *levels) for key, levels in self.parts.items()])

    def utility(self, values: Mapping[Key, float]) -> float | None:
        """
        Model utility over the target's, 1 at most; where there is none, the harmonic mean of the same of the answer
        probability of each set that is kept, and of the accuracy on questions on it.
        """
        kept = [key for key, value in self.target.items() if is_kept(key, "probability", "acc") and value > 0]
        keys = [MODEL_UTILITY] if self.target.get(MODEL_UTILITY) else kept
        if not keys or any(key not in values for key in keys):
            return None
        return harmonic_mean([min(1.0, values[key] / self.target[key]) for key in keys])

    def both(self, values: Mapping[Key, float]) -> float | None:
        """Harmonic mean of forgetting and utility."""
        forgetting, utility = self.forgetting(values), self.utility(values)
        return None if forgetting is None or utility is None else harmonic_mean([forgetting, utility])

    def kept_better(self, values: Mapping[Key, float]) -> float | None:
        """How much likelier than to the target the answers of a set are that is kept, where that is most."""
        rises = [values[key] - self.target[key] for key in self.kept if key in values]
        return max(rises, default=None)

    def bystanders(self, values: Mapping[Key, float]) -> float | None:
        """The bystanders' answer probability over the target's, least of the sets of that name."""
        keys = [key for key in self.kept if key.set.startswith("bystanders") and key in values]
        return min((values[key] / self.target[key] for key in keys), default=None)
