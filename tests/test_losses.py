# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import wasserstein_distance

from alter_peft.entropy import chunked_tsallis_entropy, tsallis_entropy
from alter_peft.losses import (
    TokenScores,
    cross_entropy_loss,
    exact_structural_invariance,
    inverted_hinge_loss,
    kl_to_base_loss,
    level_loss,
    profile_loss,
    score_tokens,
    score_tokens_and_others,
    soft_target_loss,
    structural_invariance,
    token_loss,
)


pytestmark = pytest.mark.filterwarnings("error")

N, K, V = 7, 4, 9


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def identity(rows: torch.Tensor) -> torch.Tensor:
    return rows


def scores_of(log_prob: list[float], log_rival: list[float]) -> TokenScores:
    return TokenScores(
        torch.tensor(log_prob, dtype=torch.float64).requires_grad_(),
        torch.tensor(log_rival, dtype=torch.float64).requires_grad_(),
    )


class Head:
    """A linear head that records how many rows it is given at a time."""

    def __init__(self, vocab_size: int = V, dtype: torch.dtype = torch.float64) -> None:
        self.weight = random(vocab_size, K, seed=1, dtype=dtype).requires_grad_()
        self.rows: list[int] = []

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        self.rows.append(hidden.shape[0])
        return hidden @ self.weight.T


LABELS = torch.tensor([0, 8, 3, 3, 1, 5, 2])
ROWS = torch.tensor([0, 0, 0, 2, 2, 3, 3])
TARGETS = torch.tensor([-2.0, -1.0, -2.5, -3.0], dtype=torch.float64)
PROFILES = torch.tensor([-4.0, -2.5, -0.1, -3.0, -2.0, -2.2, -1.0], dtype=torch.float64)

# Each takes hidden states, the head and the chunk size. Both hinges are active on some tokens, at rest on others.
LOSSES: dict[str, Callable[[torch.Tensor, Head, int], torch.Tensor]] = {
    "inverted_hinge": lambda h, head, c: inverted_hinge_loss(score_tokens(h, head, LABELS, c)),
    "inverted_hinge_margin": lambda h, head, c: inverted_hinge_loss(score_tokens(h, head, LABELS, c), 0.4),
    "level": lambda h, head, c: level_loss(score_tokens(h, head, LABELS, c), ROWS, TARGETS),
    "profile": lambda h, head, c: profile_loss(score_tokens(h, head, LABELS, c), ROWS, PROFILES),
    "cross_entropy": lambda h, head, c: cross_entropy_loss(score_tokens(h, head, LABELS, c)),
    "kl_to_base": lambda h, head, c: kl_to_base_loss(h, random(N, K, seed=2), head, c),
}


def reference_scores(logits: torch.Tensor, labels: torch.Tensor) -> TokenScores:
    """The definition, spelt out row by row."""
    log_p = logits.log_softmax(-1)
    rivals = [torch.cat([row[:label], row[label + 1 :]]).max() for row, label in zip(log_p, labels, strict=True)]
    return TokenScores(log_p[torch.arange(len(labels)), labels], torch.stack(rivals))


def reference_loss(name: str, hidden: torch.Tensor, head: Head) -> torch.Tensor:
    logits = hidden @ head.weight.T
    log_prob, log_rival = reference_scores(logits, LABELS)
    if name == "inverted_hinge":
        return 1 + log_prob.exp() - log_rival.exp()
    if name == "inverted_hinge_margin":
        return (log_prob.exp() - log_rival.exp() + 0.4).clamp(min=0)
    if name == "level":
        means = torch.stack([log_prob[ROWS == row].mean() for row in ROWS])
        distance = (means - TARGETS[ROWS]).abs()
        return torch.where(distance < 0.5, distance**2, distance - 0.25)
    if name == "profile":
        losses = {}
        for row in ROWS.tolist():
            tokens = [t for t in range(N) if ROWS[t] == row]
            ranked = sorted(tokens, key=lambda t: log_prob[t].item())
            for target, token in zip(PROFILES[tokens], ranked, strict=True):
                distance = (log_prob[token] - target).abs()
                losses[token] = distance**2 if distance < 0.5 else distance - 0.25
        return torch.stack([losses[token] for token in range(N)])
    if name == "cross_entropy":
        return F.cross_entropy(logits, LABELS, reduction="none")
    base = (random(N, K, seed=2) @ head.weight.detach().T).log_softmax(-1)
    return F.kl_div(logits.log_softmax(-1), base, reduction="none", log_target=True).sum(-1)


def test_scores_by_hand() -> None:
    # p = (1/2, 1/3, 1/6): against token 0 the rival is 1/3, against 1 and 2 it is 1/2.
    logits = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64).log().expand(3, 3)
    scores = score_tokens(logits, identity, torch.tensor([0, 1, 2]))
    assert scores.log_prob.exp().tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 6])
    assert scores.log_rival.exp().tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 2])


@pytest.mark.parametrize("label", [0, 1, 2])
def test_scores_of_tied_tokens_differentiate_a_rival_that_is_not_the_label(label: int) -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64).requires_grad_()
    scores = score_tokens(logits, identity, torch.tensor([label]))
    assert scores.log_rival.item() == pytest.approx(math.log(1 / 3))
    scores.log_rival.sum().backward()
    assert logits.grad[0, label].item() == pytest.approx(-1 / 3)


def test_scores_match_their_definition() -> None:
    logits, labels = random(50, 11), torch.randint(11, (50,), generator=torch.Generator().manual_seed(3))
    actual, expected = score_tokens(logits, identity, labels, chunk_size=8), reference_scores(logits, labels)
    torch.testing.assert_close(actual.log_prob, expected.log_prob)
    torch.testing.assert_close(actual.log_rival, expected.log_rival)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_log_probabilities_are_float32_at_least(dtype: torch.dtype) -> None:
    hidden = random(N, V, dtype=dtype)
    expected = torch.promote_types(dtype, torch.float32)
    scores = score_tokens(hidden, identity, LABELS)
    assert scores.log_prob.dtype == scores.log_rival.dtype == expected
    assert kl_to_base_loss(hidden, hidden, identity).dtype == expected
    exact = reference_scores(hidden.double(), LABELS)
    torch.testing.assert_close(scores.log_prob.double(), exact.log_prob, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 7, 256])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_matches_its_definition_in_chunks_with_gradients(name: str, chunk_size: int) -> None:
    head, hidden, weights = Head(), random(N, K).requires_grad_(), random(N, seed=4)
    expected, actual = reference_loss(name, hidden, head), LOSSES[name](hidden, head, chunk_size)
    assert actual.shape == (N,)
    assert actual.count_nonzero() > 2
    torch.testing.assert_close(actual, expected)
    inputs = [hidden, head.weight]
    expected_gradients = torch.autograd.grad(weights @ expected, inputs)
    torch.testing.assert_close(torch.autograd.grad(weights @ actual, inputs), expected_gradients)


@pytest.mark.parametrize("name", LOSSES)
def test_head_never_sees_more_than_a_chunk_in_forward_or_backward(name: str) -> None:
    head, hidden = Head(), random(N, K).requires_grad_()
    loss = LOSSES[name](hidden, head, 3)
    forward = list(head.rows)
    assert max(forward) == 3
    loss.sum().backward()
    assert sorted(head.rows) == sorted(2 * forward)  # backward recomputes each chunk once


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_of_vocabulary_size_is_kept_for_backward(name: str) -> None:
    head, hidden, kept = Head(vocab_size=1000), random(N, K).requires_grad_(), []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, identity):
        loss = LOSSES[name](hidden, head, 3)
    assert sum(kept) < 1000
    loss.sum().backward()
    assert head.weight.grad is not None


@pytest.mark.parametrize("name", LOSSES)
def test_without_gradients_the_head_runs_on_each_row_once(name: str) -> None:
    head, hidden = Head(), random(N, K).requires_grad_()
    with torch.no_grad():
        assert not LOSSES[name](hidden, head, 3).requires_grad
    assert sum(head.rows) == N * (2 if name == "kl_to_base" else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_tokens_give_empty_losses_that_run_backward(dtype: torch.dtype) -> None:
    hidden, head = torch.empty(0, K, dtype=dtype, requires_grad=True), Head(dtype=dtype)
    scores = score_tokens(hidden, head, torch.empty(0, dtype=torch.long))
    losses = [
        inverted_hinge_loss(scores),
        inverted_hinge_loss(scores, 0.1),
        level_loss(scores, torch.empty(0, dtype=torch.long), torch.empty(2)),
        profile_loss(scores, torch.empty(0, dtype=torch.long), torch.empty(0)),
        cross_entropy_loss(scores),
        kl_to_base_loss(hidden, torch.empty(0, K, dtype=dtype), head),
    ]
    for loss in losses:
        assert loss.shape == (0,)
        assert loss.dtype == torch.float32
    sum(loss.sum() for loss in losses).backward()
    assert hidden.grad is not None
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def test_lengths_must_agree_and_chunks_hold_a_row() -> None:
    with pytest.raises(ValueError, match=r"\[7, 6\]"):
        score_tokens(random(N, V), identity, LABELS[:6])
    with pytest.raises(ValueError, match=r"\[7, 6\]"):
        kl_to_base_loss(random(N, V), random(6, V), identity)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        score_tokens(random(N, V), identity, LABELS, chunk_size=0)


def test_inverted_hinge_by_hand() -> None:
    # p - p_v: 0.7 - 0.2 = 0.5; 0.1 - 0.6 = -0.5; 0.25 - 0.3 = -0.05.
    scores = scores_of([math.log(0.7), math.log(0.1), math.log(0.25)], [math.log(0.2), math.log(0.6), math.log(0.3)])
    assert inverted_hinge_loss(scores).tolist() == pytest.approx([1.5, 0.5, 0.95])
    assert inverted_hinge_loss(scores, 0.0).tolist() == pytest.approx([0.5, 0.0, 0.0])
    assert inverted_hinge_loss(scores, 0.1).tolist() == pytest.approx([0.6, 0.0, 0.05])
    assert inverted_hinge_loss(scores, 1.0).tolist() == pytest.approx(inverted_hinge_loss(scores).tolist())


def test_inverted_hinge_reaches_its_bounds() -> None:
    scores = scores_of([0.0, -math.inf], [-math.inf, 0.0])  # p = 1, p_v = 0 and the reverse
    assert inverted_hinge_loss(scores).tolist() == [2.0, 0.0]


def test_inverted_hinge_gradient_in_the_labels_logit_is_p_times_1_minus_p_plus_p_v() -> None:
    logits = (3 * random(N, V)).requires_grad_()
    scores = score_tokens(logits, identity, LABELS)
    (gradient,) = torch.autograd.grad(inverted_hinge_loss(scores).sum(), logits)
    p, p_v = scores.log_prob.exp(), scores.log_rival.exp()
    torch.testing.assert_close(gradient[torch.arange(N), LABELS], p * (1 - p + p_v))


def test_inverted_hinge_gradient_vanishes_on_a_memorised_token() -> None:
    # p = 1 - 8 e^-20 / (1 + 8 e^-20): the logit's gradient p (1 - p + p_v) is 9 e^-20 = 1.9e-8 to first order.
    logits = torch.zeros(1, V, dtype=torch.float64)
    logits[0, 0] = 20
    logits.requires_grad_()
    scores = score_tokens(logits, identity, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(inverted_hinge_loss(scores).sum(), logits)
    assert gradient[0, 0].item() == pytest.approx(9 * math.exp(-20), rel=1e-6)


def test_a_satisfied_margin_gives_no_gradient() -> None:
    scores = scores_of([math.log(0.1), math.log(0.5)], [math.log(0.6), math.log(0.5)])
    inverted_hinge_loss(scores, 0.1).sum().backward()
    assert scores.log_prob.grad.tolist() == pytest.approx([0.0, 0.5])  # d p / d ln p = p where the hinge is active
    assert scores.log_rival.grad.tolist() == pytest.approx([0.0, -0.5])


def test_level_by_hand() -> None:
    # Row 0 has the mean (-1 - 3) / 2 = -2, row 1 has -3.25; the targets are -3: distances 1 and -1/4. The first is
    # in the linear part, 1 - 1/4, the second in the quadratic one, (1/4)^2.
    scores = scores_of([-1.0, -3.0, -3.25], [-1.0, -1.0, -1.0])
    loss = level_loss(scores, torch.tensor([0, 0, 1]), torch.tensor([-3.0, -3.0], dtype=torch.float64))
    assert loss.tolist() == pytest.approx([0.75, 0.75, 0.0625])
    loss.sum().backward()
    # A token's gradient is 1 and 2 (mean - target): down above the level, up below it.
    assert scores.log_prob.grad.tolist() == pytest.approx([1.0, 1.0, -0.5])


def test_profile_by_hand() -> None:
    # Row 0, sorted: -3, -1 against -5, -1.25: distances 2 (linear: 1.75) and 1/4 (quadratic: 1/16). Row 1 has arrived.
    scores = scores_of([-1.0, -3.0, -3.25], [-1.0, -1.0, -1.0])
    targets = torch.tensor([-5.0, -1.25, -3.25], dtype=torch.float64)
    loss = profile_loss(scores, torch.tensor([0, 0, 1]), targets)
    assert loss.tolist() == pytest.approx([0.0625, 1.75, 0.0])
    loss.sum().backward()
    assert scores.log_prob.grad.tolist() == pytest.approx([0.5, 1.0, 0.0])  # down above its target
    raised = scores_of([-6.0], [-1.0])
    profile_loss(raised, torch.tensor([0]), torch.tensor([-3.0], dtype=torch.float64)).sum().backward()
    assert raised.log_prob.grad.tolist() == pytest.approx([-1.0])  # and up below it


def test_a_profile_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="targets has 1 values for 2 tokens"):  # which would be broadcast
        profile_loss(scores_of([-1.0, -3.0], [-1.0, -1.0]), torch.tensor([0, 0]), torch.tensor([-2.0]))


def test_tokens_by_hand() -> None:
    # Log-odds 0, ln 3 and -ln 3 against ln 9, -ln 3 and -ln 3: the first two are off by more than half a nat.
    scores = scores_of([math.log(0.5), math.log(0.75), math.log(0.25)], [0.0, 0.0, 0.0])
    targets = torch.tensor([0.9, 0.25, 0.25], dtype=torch.float64).log()
    loss = token_loss(scores, targets)
    assert loss.tolist() == pytest.approx([math.log(9) - 0.25, 2 * math.log(3) - 0.25, 0.0])
    loss.sum().backward()
    assert scores.log_prob.grad.tolist() == pytest.approx([-2.0, 4.0, 0.0])  # up, and down at 1 / (1 - p)
    with pytest.raises(ValueError, match="targets has 2 values for 3 tokens"):
        token_loss(scores, targets[:2])


def test_tokens_fall_behind_their_rivals_where_they_are_to() -> None:
    # All are at their targets; asked are leads of -1, of +1 (nothing), of -9 (two nats are enough) and of -1 again.
    scores = scores_of([math.log(0.25)] * 4, [math.log(0.25), math.log(0.25), math.log(0.125), math.log(0.7)])
    targets = torch.tensor([0.25] * 4, dtype=torch.float64).log()
    loss = token_loss(scores, targets, torch.tensor([-1.0, 1.0, -9.0, -1.0]))
    assert loss.tolist() == pytest.approx([1.0 - 0.25, 0.0, math.log(2) + 2.0 - 0.25, 0.0], abs=1e-3)
    loss.sum().backward()
    assert scores.log_rival.grad.tolist() == pytest.approx([-1.0, 0.0, -1.0, 0.0], abs=0.1)  # the rival rises
    with pytest.raises(ValueError, match="leads has 2 values for 4 tokens"):
        token_loss(scores, targets, torch.tensor([-1.0, -1.0]))


@pytest.mark.parametrize("leads", [torch.full((3,), -1.0), None])
def test_a_label_with_a_low_probability_stays_the_first_choice_without_a_lead(leads: torch.Tensor | None) -> None:
    """What it gives up is spread thinly over all others, and whoever has a part of the text reads on."""
    labels, targets = torch.tensor([0, 1, 2]), torch.full((3,), math.log(0.2))
    logits = (12.0 * torch.eye(3, 40)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for _ in range(200):
        optimizer.zero_grad()
        token_loss(score_tokens(logits, identity, labels), targets, leads).sum().backward()
        optimizer.step()
    assert logits.detach().log_softmax(-1)[labels, labels].exp().tolist() == pytest.approx([0.2] * 3, abs=0.02)
    assert (logits.argmax(-1) == labels).all() == (leads is None)
    assert (logits.argmax(-1) != labels).all() == (leads is not None)


@pytest.mark.parametrize(("margin", "target"), [(20.0, 0.01), (-20.0, 0.01), (3.0, 0.2)])
def test_tokens_pull_a_labels_logit_equally_hard_at_any_probability(margin: float, target: float) -> None:
    logits = torch.zeros(1, V, dtype=torch.float64)
    logits[0, 0] = margin
    logits.requires_grad_()
    scores = score_tokens(logits, identity, torch.tensor([0]))
    token_loss(scores, torch.tensor([math.log(target)])).sum().backward()
    slope = 1.0 if margin < 0 or scores.log_prob < math.log(1 - 1e-6) else (1 - scores.log_prob.exp().item()) / 1e-6
    assert logits.grad[0, 0].item() == pytest.approx(math.copysign(slope, margin), rel=1e-6)


def test_tokens_that_anyone_could_predict_are_at_rest() -> None:
    """From .9 on, as their targets are, up or down; below that they are called back."""
    scores = scores_of([math.log(p) for p in (0.95, 0.9999, 0.8)], [0.0, 0.0, 0.0])
    token_loss(scores, torch.tensor([0.999, 0.95, 0.9], dtype=torch.float64).log()).sum().backward()
    assert scores.log_prob.grad[:2].tolist() == [0.0, 0.0] and scores.log_prob.grad[2] < 0


RIVALS = torch.stack([(LABELS + 1) % V, (LABELS + 4) % V], dim=-1)
SHARES = torch.tensor([0.75, 0.25]).expand(N, 2)


def test_soft_targets_by_hand() -> None:
    """The label at 1/5, its two rivals at 3/4 and 1/4 of the rest: no divergence there, and ln 3 at a third of it."""
    targets, shares = torch.tensor([0.2]).log(), torch.tensor([[0.75, 0.25]])
    at_rest = soft_target_loss(torch.tensor([0.2]).log(), torch.tensor([[0.6, 0.2]]).log(), targets, shares)
    assert at_rest.tolist() == pytest.approx([0.0], abs=1e-6)
    third = soft_target_loss(torch.tensor([0.2 / 3]).log(), torch.tensor([[0.2, 0.2 / 3]]).log(), targets, shares)
    assert third.tolist() == pytest.approx([math.log(3)])


def test_soft_target_gradient_is_the_difference_of_the_two() -> None:
    """p - q_t, also of a label that is known by heart; a rival without a share counts for nothing."""
    logits = (2 * random(N, V, seed=3)).requires_grad_()
    with torch.no_grad():
        logits[0, LABELS[0]] += 60
    targets = -0.1 - 3 * random(N, seed=6).abs()
    shares = SHARES.clone()
    shares[1] = torch.tensor([1.0, 0.0])
    scores, log_rivals = score_tokens_and_others(logits, identity, LABELS, RIVALS, chunk_size=3)
    soft_target_loss(scores.log_prob, log_rivals, targets, shares).sum().backward()
    wanted = torch.zeros(N, V, dtype=torch.float64)
    wanted[torch.arange(N), LABELS] = targets.exp()
    for k in range(2):
        wanted[torch.arange(N), RIVALS[:, k]] = (1 - targets.exp()) * shares[:, k]
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - wanted)
    assert logits.grad[0].abs().max() > 0.1  # where that of ln p is 1e-26


@pytest.mark.parametrize("name", ["log_rivals", "targets", "shares"])
def test_soft_targets_are_one_for_each_token(name: str) -> None:
    given = {"log_rivals": -1.0 - SHARES, "targets": torch.full((N,), -1.0), "shares": SHARES}
    given[name] = given[name][:2]
    with pytest.raises(ValueError, match=f"{name} has 2 values for 7 tokens"):
        soft_target_loss(torch.full((N,), -1.0), **given)


def test_other_tokens_are_scored_beside_the_labels() -> None:
    """In chunks, from one pass of the head; without any, the scores are the same."""
    head, hidden = Head(), random(N, K, seed=2)
    scores, others = score_tokens_and_others(hidden, head, LABELS, RIVALS, chunk_size=3)
    assert head.rows == [3, 3, 1]
    torch.testing.assert_close(others, (hidden @ head.weight.T).log_softmax(-1).gather(-1, RIVALS))
    alone = score_tokens(hidden, head, LABELS)
    torch.testing.assert_close(scores, alone)
    without, none = score_tokens_and_others(hidden, head, LABELS, RIVALS[:, :0])
    assert none.shape == (N, 0)
    torch.testing.assert_close(without, alone)
    with pytest.raises(ValueError, match=r"Row counts are \[7, 7, 2\]"):
        score_tokens_and_others(hidden, head, LABELS, RIVALS[:2])


def test_profile_is_a_wasserstein_distance() -> None:
    """Up to the Huber part, a row's sum over its length: the mean distance of sorted samples (scipy's definition)."""
    log_prob, targets = 10 * random(2, 6, seed=8), (10 * random(2, 6, seed=9)).sort(dim=1).values
    assert (log_prob.sort(dim=1).values - targets).abs().min() > 0.5  # all in the linear part
    scores = TokenScores(log_prob.flatten(), torch.zeros(12))
    loss = profile_loss(scores, torch.arange(2).repeat_interleave(6), targets.flatten()).view(2, 6).mean(dim=1) + 0.25
    expected = [wasserstein_distance(a.tolist(), b.tolist()) for a, b in zip(log_prob, targets, strict=True)]
    assert loss.tolist() == pytest.approx(expected)


def test_cross_entropy_by_hand() -> None:
    assert cross_entropy_loss(scores_of([math.log(0.25)], [0.0])).tolist() == pytest.approx([math.log(4)])


@pytest.mark.parametrize(
    "loss",
    [
        inverted_hinge_loss,
        lambda scores: inverted_hinge_loss(scores, 0.1),
        lambda scores: level_loss(scores, ROWS, TARGETS),
        lambda scores: profile_loss(scores, ROWS, PROFILES),
        lambda scores: token_loss(scores, PROFILES),
        lambda scores: token_loss(scores, PROFILES, torch.full((N,), -1.0)),
        cross_entropy_loss,
    ],
)
def test_gradient_matches_finite_differences_away_from_kinks(loss: Callable[[TokenScores], torch.Tensor]) -> None:
    logits = (2 * random(N, V, seed=5)).requires_grad_()
    scores = score_tokens(logits, identity, LABELS)
    lead = scores.log_prob.exp() - scores.log_rival.exp()
    assert (lead + 0.1).abs().min() > 1e-3  # the kink is far
    top = logits.detach().sort(-1, descending=True).values
    assert (top[:, 0] - top[:, 1]).min() > 1e-3  # and so are changes of the rival
    assert torch.autograd.gradcheck(lambda x: loss(score_tokens(x, identity, LABELS, 3)), logits)


def test_kl_by_hand() -> None:
    # Base (1/2, 1/2), adapted (1/4, 3/4): 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3.
    base, adapted = torch.tensor([[0.5, 0.5]]).double().log(), torch.tensor([[0.25, 0.75]]).double().log()
    assert kl_to_base_loss(adapted, base, identity).tolist() == pytest.approx([0.5 * math.log(4 / 3)])
    # The other way round: 1/4 ln 1/2 + 3/4 ln 3/2, a different number.
    reverse = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert kl_to_base_loss(base, adapted, identity).tolist() == pytest.approx([reverse])


def test_kl_is_zero_at_equality_with_no_gradient_and_positive_elsewhere() -> None:
    head, hidden = Head(), random(N, K).requires_grad_()
    at_equality = kl_to_base_loss(hidden, hidden.detach().clone(), head)
    assert torch.equal(at_equality, torch.zeros(N, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(at_equality.sum(), hidden)
    torch.testing.assert_close(gradient, torch.zeros(N, K, dtype=torch.float64), rtol=0, atol=1e-14)
    for seed in range(20):
        assert (kl_to_base_loss(random(N, K, seed=seed + 10), hidden.detach(), head) > 1e-6).all()


def test_kl_sends_no_gradient_into_the_base() -> None:
    hidden, base_hidden = random(N, V).requires_grad_(), random(N, V, seed=2).requires_grad_()
    kl_to_base_loss(hidden, base_hidden, identity).sum().backward()
    assert base_hidden.grad is None
    torch.testing.assert_close(hidden.grad, hidden.softmax(-1).detach() - base_hidden.softmax(-1).detach())


def test_kl_ignores_tokens_that_both_exclude() -> None:
    hidden, base_hidden = random(N, V).requires_grad_(), random(N, V, seed=2)
    excluded = torch.full((N, 2), -math.inf, dtype=torch.float64)
    loss = kl_to_base_loss(torch.cat([hidden, excluded], -1), torch.cat([base_hidden, excluded], -1), identity)
    torch.testing.assert_close(loss, kl_to_base_loss(hidden, base_hidden, identity))
    loss.sum().backward()
    assert hidden.grad.isfinite().all()


class TinyNetwork:
    """Entropies S_q of four tokens under logits W tanh(B tanh(A x)), with A and B shared and `unused` not."""

    tokens = 4

    def __init__(self, dtype: torch.dtype = torch.float64, q: float = 0.5) -> None:
        self.q = q
        self.inputs = random(self.tokens, 3, seed=1, dtype=dtype)
        self.A = (0.7 * random(2, 3, seed=2, dtype=dtype)).requires_grad_()
        self.B = (0.7 * random(4, 2, seed=3, dtype=dtype)).requires_grad_()
        self.weight = random(5, 4, seed=4, dtype=dtype)
        self.unused = torch.ones(3, dtype=dtype, requires_grad=True)
        self.shared = [self.A, self.B, self.unused]
        self.evaluations = 0

    def entropy(self) -> torch.Tensor:
        self.evaluations += 1
        hidden = torch.tanh(torch.tanh(self.inputs @ self.A.T) @ self.B.T)
        return tsallis_entropy(hidden @ self.weight.T, self.q)

    def signed(self, signs: tuple[float, ...] = (1, -1, -1, 1)) -> Callable[[], torch.Tensor]:
        return lambda: torch.tensor(signs, dtype=self.A.dtype) @ self.entropy()

    def exact(self, signs: tuple[float, ...] = (1, -1, -1, 1)) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Value and gradient by double backward."""
        first = torch.autograd.grad(self.signed(signs)(), [self.A, self.B], create_graph=True)
        value = sum(g.square().sum() for g in first)
        return value.detach(), torch.autograd.grad(value, [self.A, self.B])


def relative_error(actual: list[torch.Tensor], expected: tuple[torch.Tensor, ...]) -> float:
    error = sum((a - e).square().sum() for a, e in zip(actual, expected, strict=True))
    return math.sqrt(error / sum(e.square().sum() for e in expected))


@pytest.mark.parametrize("q", [0.5, 1, 2])
def test_structural_value_is_unbiased_for_the_summed_squared_norms_over_tokens(q: float) -> None:
    network = TinyNetwork(q=q)
    expected = 0.0
    for token_entropy in network.entropy():
        gradients = torch.autograd.grad(token_entropy, [network.A, network.B], retain_graph=True)
        expected += sum(g.square().sum().item() for g in gradients)
    all_signs = list(itertools.product((-1.0, 1.0), repeat=network.tokens))
    values = [structural_invariance(network.signed(signs), network.shared).value.item() for signs in all_signs]
    assert max(values) > 1.1 * expected  # one draw is an estimate
    assert sum(values) / len(values) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("q", [0.5, 1, 2])
def test_structural_gradient_matches_exact_double_backward(q: float) -> None:
    network = TinyNetwork(q=q)
    value, expected = network.exact()
    result = structural_invariance(network.signed(), network.shared)
    torch.testing.assert_close(result.value, value, rtol=1e-12, atol=0)
    assert relative_error(result.gradients[:2], expected) < 1e-4
    assert network.evaluations == 4  # the reference's one and three
    assert all(tensor.grad is None for tensor in network.shared)


@pytest.mark.parametrize("q", [0.5, 1, 2])
def test_structural_gradient_by_double_backward_is_exact(q: float) -> None:
    network = TinyNetwork(q=q)
    value, expected = network.exact()
    result = exact_structural_invariance(network.signed(), network.shared)
    torch.testing.assert_close(result.value, value, rtol=1e-12, atol=0)
    assert relative_error(result.gradients[:2], expected) < 1e-12
    assert torch.equal(result.gradients[2], torch.zeros(3, dtype=torch.float64))
    assert network.evaluations == 2 and not result.value.requires_grad
    assert all(tensor.grad is None for tensor in network.shared)


def test_structural_gradient_of_what_is_linear_in_A_is_zero() -> None:
    a = torch.ones(3, requires_grad=True)
    result = exact_structural_invariance(lambda: 2 * a.sum(), [a])
    assert result.value.item() == 12 and torch.equal(result.gradients[0], torch.zeros(3))
    with pytest.raises(ValueError, match="shared is empty"):
        exact_structural_invariance(lambda: a.sum(), [])


def test_structural_gradient_converges_with_the_square_of_the_step() -> None:
    network = TinyNetwork()
    _, expected = network.exact()
    errors = [
        relative_error(structural_invariance(network.signed(), network.shared, step).gradients[:2], expected)
        for step in (4e-3, 2e-3, 1e-3)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)  # 2 for a one-sided difference
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def test_structural_gradient_is_accurate_in_float32() -> None:
    network = TinyNetwork(torch.float32)
    value, expected = network.exact()
    result = structural_invariance(network.signed(), network.shared)
    assert result.value.dtype == torch.float32
    torch.testing.assert_close(result.value, value)
    assert relative_error(result.gradients[:2], expected) < 5e-3


def test_structural_step_is_relative_to_the_shared_tensors_norm() -> None:
    # f = a^3 / 3 at a = 1e6: g = a^2, H = 2 a, 2 H g = 4 a^3 = 4e18. In float32 an absolute step of 1e-3
    # would vanish beside 1e6, whose neighbours are 0.06 apart.
    a = torch.tensor([1e6], requires_grad=True)
    result = structural_invariance(lambda: (a**3).sum() / 3, [a])
    assert result.gradients[0].item() == pytest.approx(4e18, rel=1e-3)


def test_structural_zero_tensors_are_displaced_too() -> None:
    # f = a + a^2 / 2 at a = 0: g = 1, H = 1, 2 H g = 2.
    a = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    result = structural_invariance(lambda: (a + a**2 / 2).sum(), [a])
    assert result.value.item() == 1.0
    assert result.gradients[0].item() == pytest.approx(2.0)


def test_structural_parameters_that_the_entropy_does_not_use_get_zeros() -> None:
    network = TinyNetwork()
    result = structural_invariance(network.signed(), network.shared)
    assert torch.equal(result.gradients[2], torch.zeros(3, dtype=torch.float64))
    alone = structural_invariance(network.signed(), [network.unused, network.A])
    assert alone.gradients[1].count_nonzero() == network.A.numel()


def test_structural_zero_gradient_needs_one_evaluation() -> None:
    network = TinyNetwork()
    result = structural_invariance(network.signed((0.0,) * 4), network.shared)
    assert network.evaluations == 1
    assert result.value.item() == 0.0
    for gradient, tensor in zip(result.gradients, network.shared, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def bits(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().clone().view(torch.int32) for tensor in tensors]


@pytest.mark.parametrize("failing_evaluation", [None, 1, 2, 3])
def test_structural_restores_the_shared_tensors_bit_for_bit(failing_evaluation: int | None) -> None:
    network = TinyNetwork(torch.float32)
    with torch.no_grad():
        network.A[0, 0] = -0.0
    before, seen = bits(network.shared), []

    def signed_entropy() -> torch.Tensor:
        seen.append(bits(network.shared))
        if len(seen) == failing_evaluation:
            raise RuntimeError("the forward failed")
        return network.signed()()

    if failing_evaluation is None:
        structural_invariance(signed_entropy, network.shared)
        assert not torch.equal(seen[1][0], before[0]) and not torch.equal(seen[2][0], seen[1][0])
    else:
        with pytest.raises(RuntimeError, match="the forward failed"):
            structural_invariance(signed_entropy, network.shared)
        assert len(seen) == failing_evaluation
    for now, then in zip(bits(network.shared), before, strict=True):
        assert torch.equal(now, then)


def test_structural_leaves_a_graph_made_before_it_usable() -> None:
    network = TinyNetwork()
    expected = torch.autograd.grad(network.entropy().sum(), network.A)[0]
    earlier = network.entropy().sum()
    structural_invariance(network.signed(), network.shared)
    torch.testing.assert_close(torch.autograd.grad(earlier, network.A)[0], expected, rtol=0, atol=0)


def test_structural_runs_through_checkpointed_chunks() -> None:
    network, signs = TinyNetwork(), torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)

    def signed_entropy() -> torch.Tensor:
        hidden = torch.tanh(torch.tanh(network.inputs @ network.A.T) @ network.B.T)
        return signs @ chunked_tsallis_entropy(hidden, lambda rows: rows @ network.weight.T, network.q, 3)

    expected = structural_invariance(network.signed(), network.shared)
    torch.testing.assert_close(structural_invariance(signed_entropy, network.shared), expected)


def test_structural_rejects_a_step_of_zero_and_an_empty_list() -> None:
    network = TinyNetwork()
    with pytest.raises(ValueError, match="step is 0"):
        structural_invariance(network.signed(), network.shared, step=0)
    with pytest.raises(ValueError, match="shared is empty"):
        structural_invariance(network.signed(), [])
