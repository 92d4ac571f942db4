# Copyright 2026 The alter-peft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Two-sided scores: how far a model is from oracles that never saw the forget set, in units of their own spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple


class Band(NamedTuple):
    """What retraining from scratch gives, over seeds: mean and sample standard deviation of the oracles' scores."""

    center: float
    spread: float

    def distance(self, value: float) -> float:
        """
        (value - center) / spread: 0 is the oracle, and below it counts as much as above it.

        Where the oracles agree exactly, any other value is infinitely far.
        """
        if value == self.center:
            return 0.0
        return (value - self.center) / self.spread if self.spread else math.copysign(math.inf, value - self.center)


def band(values: Sequence[float]) -> Band:
    """
    The band of the oracles' scores, one for each seed.

    Raises:
        ValueError: fewer than two oracles, which have no spread.
    """
    if len(values) < 2:
        raise ValueError(
            f"There are {len(values)} oracles, but a band needs at least 2 of different seeds. Train more "
            "(`oracle_seeds`)."
        )
    return Band(mean(values), stdev(values))
