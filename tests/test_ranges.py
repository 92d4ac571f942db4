# SPDX-License-Identifier: Apache-2.0
"""The range of each field of a config."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

from alter_peft import AlterConfig
from alter_peft.tuner.ranges import OF_LAYERS, RANGES, check_ranges


def test_defaults_are_in_range_and_ranges_are_of_fields():
    assert RANGES.keys() <= {field.name for field in fields(AlterConfig)}
    assert OF_LAYERS.keys() <= RANGES.keys()
    check_ranges(vars(AlterConfig()))


@pytest.mark.parametrize("name", sorted(RANGES))
@pytest.mark.parametrize("value", [math.nan, -1, "some", [None], {0: 1}])
def test_what_fits_no_range_is_named(name, value):
    with pytest.raises(ValueError, match=rf"^`{name}` is .*, but must be {RANGES[name].fix[:7]}"):
        check_ranges({**vars(AlterConfig()), name: value})


@pytest.mark.parametrize(("name", "value"), [("rank_pattern", 0.5), ("alpha_pattern", 0)])
def test_values_for_single_layers_have_the_range_of_the_field_for_all(name, value):
    with pytest.raises(ValueError, match=rf"^`{name}\['q_proj'\]` is {value}, but must be a positive"):
        check_ranges({**vars(AlterConfig()), name: {"v_proj": 4, "q_proj": value}})
