# SPDX-License-Identifier: Apache-2.0
"""What forget rows are to come to, from log-probabilities alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alter_peft.losses import FORGET_LOSSES, TokenScores
from alter_peft.trainer.targets import geometric_mean, level_targets, measure, unseen_profiles
from alter_peft.trainer.token_targets import Guide


def scores(rows: list[Tensor], lead: float = 0.0) -> list[TokenScores]:
    """Rows of these log-probabilities, each token so far before its rival."""
    return [TokenScores(row, row - lead) for row in rows]


def test_level_by_hand():
    rows = [torch.tensor([-1.0, -3.0]), torch.tensor([-6.0])]
    assert geometric_mean(rows) == pytest.approx(math.exp(-4))  # of rows, however long they are
    assert level_targets(rows, math.exp(-3)).tolist() == pytest.approx([-3.0, -6.0])  # none is raised


def test_a_profile_is_that_of_an_unseen_row():
    """As it is where the lengths agree, read at the middle of each rank where they do not."""
    unseen = [torch.tensor([-1.0, -9.0, -2.0, -4.0])]
    known = [torch.zeros(4), torch.zeros(2), torch.zeros(8)]
    profiles = unseen_profiles(known, unseen, seed=0)
    assert profiles[0].tolist() == [-9.0, -4.0, -2.0, -1.0]
    assert profiles[1].tolist() == pytest.approx([(-9 - 4) / 2, (-2 - 1) / 2])
    assert profiles[2].tolist() == pytest.approx([-9.0, -7.75, -5.25, -3.5, -2.5, -1.75, -1.25, -1.0])


def test_no_rank_is_raised_above_its_beginning():
    profiles = unseen_profiles([torch.tensor([-0.5, -3.0, -7.0])], [torch.tensor([-2.0, -1.0, -4.0])], seed=0)
    assert [profile.tolist() for profile in profiles] == [[-7.0, -3.0, -1.0]]


def test_every_unseen_row_is_drawn_as_often_as_any_other():
    unseen = [torch.tensor([-float(i)]) for i in range(1, 4)]
    draws = [torch.cat(unseen_profiles([torch.zeros(1)] * 7, unseen, seed)).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert sorted(draws[0].count(-float(i)) for i in range(1, 4)) == [2, 2, 3]


def test_what_is_measured_is_what_the_loss_needs():
    known, unseen = [torch.tensor([-1.0, -2.0]), torch.tensor([-9.0])], scores([torch.tensor([-4.0])])
    level = measure(FORGET_LOSSES["level"], known, [], 0.5, seed=0)
    assert level.targets.tolist() == pytest.approx([-1.5, -9.0]) and level.described_level == "0.5 (a guess)"
    seen = measure(FORGET_LOSSES["level"], known, unseen, 0.5, seed=0)
    assert seen.level == pytest.approx(math.exp(-4)) and seen.targets.tolist() == pytest.approx([-4.0, -9.0])
    assert seen.described_level == "0.01832 (measured on `calibration_dataset`)"
    profile = measure(FORGET_LOSSES["profile"], known, unseen, 0.5, seed=0)
    assert [row.tolist() for row in profile.profiles] == [[-4.0, -4.0], [-9.0]]
    assert profile.targets.tolist() == [-4.0, -9.0] and len(profile.reference) == 0
    npo = measure(FORGET_LOSSES["npo"], known, [], 0.5, seed=0)
    assert npo.reference.tolist() == [-3.0, -9.0] and npo.targets.tolist() == [-1.5, -9.0]  # of all that is known
    nothing = measure(FORGET_LOSSES["ihl"], [], [], 0.5, seed=0)
    assert len(nothing.targets) == len(nothing.profiles) == len(nothing.reference) == 0


def test_measured_token_targets_say_where_they_are_from():
    known, guide = [torch.tensor([-1.0, -2.0])], Guide(scores([torch.tensor([-6.0, -4.0])], -2.0), [], True)
    found = measure(FORGET_LOSSES["tokens"], known, [], 0.5, seed=0, guide=guide)
    assert found.targets.tolist() == [-5.0] and found.token_targets[0].tolist() == [-6.0, -4.0]
    assert found.token_leads[0].tolist() == [-2.0, -2.0]
    assert found.guide == "order by the reference model, values by the reference model"
    found = measure(FORGET_LOSSES["tokens"], known, scores(known), 0.5, 0, Guide(scores(known), [], False))
    assert found.guide == "order by the model itself with damped feed-forward layers, values by `calibration_dataset`"
    guide = Guide(scores(known), [], False, general=scores([torch.tensor([-4.0])]))
    found = measure(FORGET_LOSSES["tokens"], known, [], 0.5, 0, guide)
    assert found.guide == "order by the model itself with damped feed-forward layers, values by general text"
    assert found.described_level == "0.01832 (a guess)"
