# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest

from alter_peft.report.estimates import Estimate, distance_text, estimate_text, seconds_text


@pytest.mark.parametrize(
    ("mean", "spread", "expected"),
    [
        (0.0512, 0.0104, "0.051 ± 0.010"),
        (0.0307651, 0.0000788, "0.030765 ± 0.000079"),
        (0.5, 0.0999, "0.50 ± 0.10"),  # rounded up, it has a digit more before the point
        (0.5, 3e-9, "0.500000 ± 3e-09"),
        (0.5, 0.0, "0.500 ± 0"),
        (0.5, None, "0.500"),
        (0.00042, None, "0.00042"),
        (0.0, None, "0.000"),
        (123.456, 10.0, "123.456 ± 10.000"),
    ],
)
def test_significant_digits(mean, spread, expected):
    digits = 2 if spread == 0.0999 else 3
    assert estimate_text(Estimate(mean, spread, 2, 2), digits) == expected


def test_seeds_that_lack_a_score_are_counted():
    assert estimate_text(Estimate(0.5, None, 1, 3), 1, "+") == "+0.50 (1 of 3 seeds)"
    assert distance_text(Estimate(0.5, None, 1, 3)) == "+0.5 (1 of 3 seeds)"


def test_distances():
    assert distance_text(Estimate(2.0, 1.41, 2, 2)) == "+2.0 ± 1.4"
    assert [distance_text(Estimate(mean, None, 1, 1)) for mean in (math.inf, -math.inf)] == ["+inf", "-inf"]
    assert distance_text(Estimate(math.nan, None, 2, 2)) == "±inf"


def test_seconds():
    assert [seconds_text(seconds) for seconds in (0.04, 9.94, 9.96, 1234.5)] == ["0.0", "9.9", "10", "1234"]
