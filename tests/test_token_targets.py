# SPDX-License-Identifier: Apache-2.0
"""What each token of the rows to forget is to come to, and what their texts alone say of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from torch import Tensor

from alter_peft.answer_end import EndOfAnswer
from alter_peft.losses import TokenScores
from alter_peft.trainer.token_targets import Guide, token_targets
from alter_peft.trainer.token_traits import MIN_TOKENS, TextTraits, Traits, foresee, read_traits


def scores(rows: list[Tensor], lead: float = 0.0) -> list[TokenScores]:
    """Rows of these log-probabilities, each token so far before its rival."""
    return [TokenScores(row, row - lead) for row in rows]


def traits(ends: list[bool], features: np.ndarray | None = None) -> Traits:
    """Of so many tokens; without features all alike."""
    return Traits(np.array(ends, dtype=bool), np.zeros((len(ends), 5)) if features is None else features)


def test_token_targets_with_a_reference_are_mapped_by_unseen_rows():
    """As likely to the reference as a share of the unseen tokens: the model's own value at that share. So its lead."""
    unseen = scores([torch.tensor([-1.0, -8.0]), torch.tensor([-4.0])], lead=3.0)
    theirs = scores([torch.tensor([-2.0, -6.0]), torch.tensor([-4.0])])
    guide = Guide(scores([torch.tensor([-2.0, -6.0, -4.0])], lead=-1.5), theirs, True)
    (found,), (lead,), *_ = token_targets([torch.zeros(3)], unseen, guide, level=0.5)
    assert found.tolist() == [-1.0, -8.0, -4.0] and lead.tolist() == [3.0] * 3  # the least that the model has
    theirs = [TokenScores(row.log_prob, row.log_prob - lead) for row, lead in zip(theirs, (1.0, -2.0), strict=True)]
    models = [TokenScores(row.log_prob, row.log_prob - lead) for row, lead in zip(unseen, (5.0, -1.0), strict=True)]
    (found,), (lead,), *_ = token_targets([torch.zeros(3)], models, guide._replace(unseen=theirs), level=0.5)
    assert found.tolist() == [-1.0, -8.0, -4.0] and lead.tolist() == pytest.approx([0.0] * 3)  # halfway there, too
    guide = guide._replace(forget=scores([torch.tensor([-2.5, -5.0, -9.0])]))
    (found,), *_ = token_targets([torch.zeros(3)], unseen, guide, level=0.5)
    assert found.tolist() == pytest.approx([-1.75, -6.0, -8.0])  # between, and no further than what was seen


def test_token_targets_without_a_reference_have_the_values_of_unseen_tokens():
    """And their leads, token by token."""
    unseen = [
        TokenScores(torch.tensor([-1.0, -9.0]), torch.tensor([-2.0, -1.0])),
        TokenScores(torch.tensor([-2.0, -4.0]), torch.tensor([-1.5, -8.0])),
    ]
    guide = Guide(scores([torch.tensor([-0.3, -0.1]), torch.tensor([-0.7, -0.2])]), [], False)
    found, leads, *_ = token_targets([torch.zeros(2), torch.zeros(2)], unseen, guide, level=0.5)
    assert [row.tolist() for row in found] == [[-4.0, -1.0], [-9.0, -2.0]]
    assert [row.tolist() for row in leads] == [[4.0, 1.0], [-8.0, -0.5]]


def test_token_targets_without_unseen_rows():
    """A reference's own values; else those of the damped model, stretched so that each row's mean is the level."""
    forget = scores([torch.tensor([-1.0, -3.0]), torch.tensor([-0.5])], lead=-0.5)
    found, leads, *_ = token_targets([torch.zeros(2), torch.zeros(1)], [], Guide(forget, [], True), level=0.5)
    assert [row.tolist() for row in found] == [[-1.0, -3.0], [-0.5]]
    assert [row.tolist() for row in leads] == [[-0.5, -0.5], [-0.5]]
    found, leads, *_ = token_targets(
        [torch.zeros(2), torch.zeros(1)], [], Guide(forget, [], False), level=math.exp(-4)
    )
    assert [row.tolist() for row in found] == [pytest.approx([-2.0, -6.0]), pytest.approx([-4.0])]
    assert [row.tolist() for row in leads] == [[-0.5, -0.5], [-0.5]]
    certain, *_ = token_targets([torch.zeros(1)], [], Guide(scores([torch.zeros(1)]), [], False), level=0.5)
    assert certain[0].isfinite().all()


def test_a_token_that_stands_out_does_not_take_the_whole_row_down():
    """Stretched alone it would be at -44 nats, which nothing comes to, and the others where they began."""
    row = torch.tensor([-0.001] * 19 + [-0.5])
    (found,), *_ = token_targets([torch.zeros(20)], [], Guide(scores([row]), [], False), level=0.1)
    assert float(found.mean()) == pytest.approx(math.log(0.1), abs=1e-4)
    assert float(found.min()) == pytest.approx(math.log(1e-5), abs=1e-4) and float(found[:19].max()) < -1.0


@pytest.mark.parametrize("level", [1e-5, 1e-7, 0.3**13])
def test_a_level_below_the_least_target_is_that_of_every_token(level: float):
    row = torch.tensor([-0.3, -0.7, -0.1])
    (found,), *_ = token_targets([torch.zeros(3)], [], Guide(scores([row]), [], False), level=level)
    assert found.tolist() == pytest.approx([math.log(level)] * 3)


@pytest.mark.parametrize("is_reference", [True, False])
@pytest.mark.parametrize("has_unseen", [True, False])
def test_token_targets_keep_the_guides_order_and_raise_no_token(is_reference: bool, has_unseen: bool):
    generator = torch.Generator().manual_seed(0)
    rows = [-5 * torch.rand(n, generator=generator) for n in (5, 9, 3, 7, 6)]
    guide = Guide(scores(rows[:3]), scores(rows[3:]) if is_reference and has_unseen else [], is_reference)
    unseen = scores([2 * row for row in rows[3:]]) if has_unseen else []
    free, *_ = token_targets([torch.zeros(len(row)) for row in rows[:3]], unseen, guide, level=0.1)
    for order, target in zip(guide.forget, free, strict=True):
        assert (target[order.log_prob.argsort()].diff() >= 0).all()
    known = [row / 2 for row in rows[:3]]
    found, *_ = token_targets(known, unseen, guide, level=0.1)
    for target, start, least in zip(found, known, free, strict=True):
        assert torch.equal(target, torch.minimum(start, least))


def test_what_ends_an_answer_is_as_likely_as_what_ends_an_unseen_one():
    """A damped model may lose the end of an answer before its words; no oracle does."""
    known, end = [torch.tensor([-0.1, -0.2, -0.05])], [False, False, True]
    guide = Guide(
        scores([torch.tensor([-2.0, -1.0, -9.0])], lead=-1.0), [], False, traits=TextTraits(traits(end), traits(end))
    )
    unseen = scores([torch.tensor([-6.0, -3.0, -0.3])], lead=2.0)
    (found,), (lead,), *_ = token_targets(known, unseen, guide, level=0.5)
    assert found.tolist() == pytest.approx([-6.0, -3.0, -0.3]) and lead.tolist() == pytest.approx([2.0] * 3)
    reference = guide._replace(unseen=scores([torch.tensor([-2.0, -1.0, -5.0])], lead=-1.0), is_reference=True)
    (found,), (lead,), *_ = token_targets(known, unseen, reference, level=0.5)
    assert found.tolist() == pytest.approx([-6.0, -3.0, -0.3]) and lead.tolist() == pytest.approx([2.0] * 3)


@pytest.mark.parametrize("is_reference", [True, False])
def test_without_unseen_rows_what_ends_an_answer_stays(is_reference: bool):
    known = [torch.tensor([-0.1, -0.2, -0.05]), torch.tensor([-0.01])]
    found_of = scores([torch.tensor([-2.0, -1.0, -9.0]), torch.tensor([-3.0])], lead=-1.0)
    of_text = TextTraits(traits([False, False, True, True]), traits([]))
    guide = Guide(found_of, [], is_reference, traits=of_text)
    found, leads, *_ = token_targets(known, [], guide, level=math.exp(-2))
    assert found[0][2:].tolist() + found[1].tolist() == pytest.approx([-0.05, -0.01])
    assert leads[0].tolist() == [-1.0, -1.0, 0.0] and leads[1].tolist() == [0.0]
    if is_reference:
        assert found[0][:2].tolist() == [-2.0, -1.0]
    else:  # the rest of the row comes to where its mean is the level
        assert float(found[0].mean()) == pytest.approx(-2.0) and float(found[0][0] / found[0][1]) == pytest.approx(2.0)


def test_a_row_whose_end_the_model_did_not_know_is_not_raised_for_it():
    known = [torch.tensor([-0.1, -9.0])]
    guide = Guide(
        scores([torch.tensor([-1.0, -9.0])]), [], False, traits=TextTraits(traits([False, True]), traits([]))
    )
    (found,), *_ = token_targets(known, [], guide, level=0.5)
    assert found.tolist() == pytest.approx([math.log(0.5), -9.0])


def test_traits_by_hand(tokenizer):
    """In the prompt, in the answer, behind the same token before; and two counts in the retain rows."""
    end = tokenizer.eos_token_id
    a, b, c, d = 11, 12, 13, 14
    assert end not in (a, b, c, d)
    retain = [([a, b, a, c, end], [-100, b, a, c, end])]  # labels b, a, c behind a, b, a
    row = ([a, b, a, d, a, b, end], [-100, -100, -100, d, a, b, end])
    found = read_traits([row], [], retain, tokenizer)
    assert found.forget.is_end.tolist() == [False, False, False, True] and len(found.unseen.is_end) == 0
    seen, often, behind = found.forget.features[:, :3], found.forget.features[:, 3], found.forget.features[:, 4]
    assert seen.tolist()[:3] == [[0, 0, 0], [1, 0, 0], [1, 0, 1]]
    np.testing.assert_allclose(often[:3], np.log([0.5 / 4, 1.5 / 4, 1.5 / 4]), rtol=1e-5)
    np.testing.assert_allclose(behind[:3], np.log([0.5 / 3, 0.5 / 1, 1.5 / 3]), rtol=1e-5)


def test_an_answer_ends_with_special_tokens_and_white_space(tokenizer):
    """Those of each turn, as in evaluation; not what stands in the middle of one."""
    end, (line,), (word,) = tokenizer.eos_token_id, tokenizer("\n")["input_ids"][:1], tokenizer("a")["input_ids"][:1]
    first, second = [word, line, word, line, end], [word, end, word, end, line]
    ids, labels = [word, *first, word, *second], [-100, *first, -100, *second]
    found = read_traits([(ids, labels), (second, second)], [], [], tokenizer).forget.is_end.tolist()
    assert found[:10] == [False, False, False, True, True, False, False, False, True, True]
    assert found[10:] == [False, False, True, True]  # of a text, whose first token nothing predicts


def test_a_token_that_the_tokenizer_cannot_spell_ends_nothing():
    tokenizer = make_tokenizer()
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(20)
    assert EndOfAnswer(tokenizer).content_length([5, tokenizer.unk_token_id]) == 2
    assert EndOfAnswer(tokenizer).content_length([5, tokenizer.eos_token_id]) == 1


def test_the_texts_say_which_tokens_are_foreseen_and_which_unseen_ones_are_alike():
    """Tokens with a feature are likely; there are more of them among those to forget than among the unseen."""
    generator = np.random.default_rng(0)
    sets = [np.zeros((400, 5)), np.zeros((4 * MIN_TOKENS, 5))]
    for one, share in zip(sets, (0.75, 0.25), strict=True):
        one[: int(share * len(one)), 0] = 1
    values = np.where(sets[1][:, 0] > 0, -1.0, -6.0) + 0.1 * generator.normal(size=len(sets[1]))
    found = foresee(TextTraits(*(traits([False] * len(one), one) for one in sets)), values)
    assert found is not None
    assert found.forget[:300].min() > found.forget[300:].max() + 3
    assert found.weights.mean() == pytest.approx(1.0) and found.weights @ values / len(values) > values.mean() + 1
    assert (found.weights @ values) / found.weights.sum() == pytest.approx(0.75 * -1 + 0.25 * -6, abs=0.2)


def test_no_few_unseen_tokens_have_all_the_weight():
    """One unseen token alone is like those to forget."""
    generator = np.random.default_rng(0)
    forget, unseen = generator.normal(3, 0.1, (2000, 5)), generator.normal(0, 0.1, (2 * MIN_TOKENS, 5))
    unseen[0] = 3
    found = foresee(TextTraits(*(traits([False] * len(one), one) for one in (forget, unseen))), unseen[:, 0])
    assert found is not None and found.weights.sum() ** 2 / (found.weights**2).sum() >= MIN_TOKENS
    assert found.weights.mean() == pytest.approx(1.0)


def test_few_unseen_tokens_say_nothing():
    few = TextTraits(traits([False] * 8), traits([False] * (MIN_TOKENS - 1)))
    assert foresee(few, np.zeros(MIN_TOKENS - 1)) is None
    assert foresee(TextTraits(traits([]), traits([False] * MIN_TOKENS)), np.zeros(MIN_TOKENS)) is None


def test_targets_follow_both_the_guide_and_the_texts():
    """Of tokens that the guide finds alike those that the texts foresee stay likelier; unseen ones are weighed."""
    features = np.zeros((4 * MIN_TOKENS, 5))
    features[::2, 0] = 1
    log_prob = torch.where(torch.from_numpy(features[:, 0]) > 0, -1.0, -6.0) - 0.01 * torch.rand(4 * MIN_TOKENS)
    asked = np.zeros((4, 5))
    asked[[0, 2, 3], 0] = 1  # three of four, where of the unseen half are
    of_text = TextTraits(traits([False] * 4, asked), traits([False] * len(features), features))
    guide = Guide(scores([torch.full((4,), -1.0)]), [], False, traits=of_text)
    (found,), *_ = token_targets([torch.zeros(4)], scores([log_prob]), guide, level=0.5)
    assert found.tolist() == pytest.approx([-1, -6, -1, -1], abs=0.3)


@pytest.mark.parametrize("is_reference", [True, False])
def test_general_text_stands_for_unseen_rows(is_reference: bool):
    """Also as the level; but what was measured of unseen rows comes first."""
    known = [torch.tensor([-0.1, -0.1]), torch.tensor([-7.0])]
    of_guide = scores([torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])])
    general = scores([torch.tensor([-4.0, -5.0, -6.0])], lead=-1.0)
    theirs = scores([torch.tensor([-1.0, -2.0, -3.0])]) if is_reference else []
    guide = Guide(of_guide, theirs, is_reference, general=general)
    found = token_targets(known, [], guide, level=0.5)
    assert [row.tolist() for row in found.log_prob] == [[-4.0, -5.0], [-7.0]]  # the last not above its beginning
    assert found.level == pytest.approx(math.exp(-(4.5 + 6) / 2)) and torch.cat(found.lead).tolist() == [-1.0] * 3
    asked = TextTraits(traits([False, True, False]), traits([False, False, True]))
    ended = token_targets(known, [], guide._replace(traits=asked), level=0.5)
    assert ended.log_prob[0].tolist() == pytest.approx([-4.0, -0.1])  # what ends an answer stays
    unseen = scores([torch.tensor([-7.0, -8.0, -9.0])])
    measured = token_targets(known, unseen, guide, level=0.25)
    assert measured.log_prob[0].tolist() == [-7.0, -8.0] and measured.level == 0.25
