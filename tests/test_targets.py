# SPDX-License-Identifier: Apache-2.0
"""What forget rows are to come to, from log-probabilities alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alter_peft.losses import FORGET_LOSSES, TokenScores
from alter_peft.trainer.targets import (
    Guide,
    geometric_mean,
    level_targets,
    measure,
    token_targets,
    unseen_profiles,
)


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


def test_token_targets_with_a_reference_are_mapped_by_unseen_rows():
    """As likely to the reference as a share of the unseen tokens: the model's own value at that share."""
    unseen = scores([torch.tensor([-1.0, -8.0]), torch.tensor([-4.0])], lead=3.0)
    theirs = scores([torch.tensor([-2.0, -6.0]), torch.tensor([-4.0])])
    guide = Guide(scores([torch.tensor([-2.0, -6.0, -4.0])], lead=-1.5), theirs, True)
    (found,), (lead,) = token_targets([torch.zeros(3)], unseen, guide, level=0.5)
    assert found.tolist() == [-1.0, -8.0, -4.0] and lead.tolist() == [-1.5] * 3  # the reference's own
    guide = guide._replace(forget=scores([torch.tensor([-2.5, -5.0, -9.0])]))
    (found,), _ = token_targets([torch.zeros(3)], unseen, guide, level=0.5)
    assert found.tolist() == pytest.approx([-1.75, -6.0, -8.0])  # between, and no further than what was seen


def test_token_targets_without_a_reference_have_the_values_of_unseen_tokens():
    """And their leads, token by token."""
    unseen = [
        TokenScores(torch.tensor([-1.0, -9.0]), torch.tensor([-2.0, -1.0])),
        TokenScores(torch.tensor([-2.0, -4.0]), torch.tensor([-1.5, -8.0])),
    ]
    guide = Guide(scores([torch.tensor([-0.3, -0.1]), torch.tensor([-0.7, -0.2])]), [], False)
    found, leads = token_targets([torch.zeros(2), torch.zeros(2)], unseen, guide, level=0.5)
    assert [row.tolist() for row in found] == [[-4.0, -1.0], [-9.0, -2.0]]
    assert [row.tolist() for row in leads] == [[4.0, 1.0], [-8.0, -0.5]]


def test_token_targets_without_unseen_rows():
    """A reference's own values; else those of the damped model, stretched so that each row's mean is the level."""
    forget = scores([torch.tensor([-1.0, -3.0]), torch.tensor([-0.5])], lead=-0.5)
    found, leads = token_targets([torch.zeros(2), torch.zeros(1)], [], Guide(forget, [], True), level=0.5)
    assert [row.tolist() for row in found] == [[-1.0, -3.0], [-0.5]]
    assert [row.tolist() for row in leads] == [[-0.5, -0.5], [-0.5]]
    found, leads = token_targets([torch.zeros(2), torch.zeros(1)], [], Guide(forget, [], False), level=math.exp(-4))
    assert [row.tolist() for row in found] == [pytest.approx([-2.0, -6.0]), pytest.approx([-4.0])]
    assert [row.tolist() for row in leads] == [[-0.5, -0.5], [-0.5]]
    certain, _ = token_targets([torch.zeros(1)], [], Guide(scores([torch.zeros(1)]), [], False), level=0.5)
    assert certain[0].isfinite().all()


def test_a_token_that_stands_out_does_not_take_the_whole_row_down():
    """Stretched alone it would be at -44 nats, which nothing comes to, and the others where they began."""
    row = torch.tensor([-0.001] * 19 + [-0.5])
    (found,), _ = token_targets([torch.zeros(20)], [], Guide(scores([row]), [], False), level=0.1)
    assert float(found.mean()) == pytest.approx(math.log(0.1), abs=1e-4)
    assert float(found.min()) == pytest.approx(math.log(1e-5), abs=1e-4) and float(found[:19].max()) < -1.0


@pytest.mark.parametrize("is_reference", [True, False])
@pytest.mark.parametrize("has_unseen", [True, False])
def test_token_targets_keep_the_guides_order_and_raise_no_token(is_reference: bool, has_unseen: bool):
    generator = torch.Generator().manual_seed(0)
    rows = [-5 * torch.rand(n, generator=generator) for n in (5, 9, 3, 7, 6)]
    guide = Guide(scores(rows[:3]), scores(rows[3:]) if is_reference and has_unseen else [], is_reference)
    unseen = scores([2 * row for row in rows[3:]]) if has_unseen else []
    free, _ = token_targets([torch.zeros(len(row)) for row in rows[:3]], unseen, guide, level=0.1)
    for order, target in zip(guide.forget, free, strict=True):
        assert (target[order.log_prob.argsort()].diff() >= 0).all()
    known = [row / 2 for row in rows[:3]]
    found, _ = token_targets(known, unseen, guide, level=0.1)
    for target, start, least in zip(found, known, free, strict=True):
        assert torch.equal(target, torch.minimum(start, least))


def test_measured_token_targets_say_where_they_are_from():
    known, guide = [torch.tensor([-1.0, -2.0])], Guide(scores([torch.tensor([-6.0, -4.0])], -2.0), [], True)
    found = measure(FORGET_LOSSES["tokens"], known, [], 0.5, seed=0, guide=guide)
    assert found.targets.tolist() == [-5.0] and found.token_targets[0].tolist() == [-6.0, -4.0]
    assert found.token_leads[0].tolist() == [-2.0, -2.0]
    assert found.guide == "order by the reference model, values by the reference model"
    found = measure(FORGET_LOSSES["tokens"], known, scores(known), 0.5, 0, Guide(scores(known), [], False))
    assert found.guide == "order by the model itself with damped feed-forward layers, values by `calibration_dataset`"
