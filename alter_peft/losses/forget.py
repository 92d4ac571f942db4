# SPDX-License-Identifier: Apache-2.0
"""The first term of Eq. 8: ALTER's forget losses and the field's, of the same inputs. One dict has all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .scores import TokenScores


class ForgetBatch(NamedTuple):
    """
    The labelled tokens of a batch's forget rows, n tokens of R rows, and what was measured of the rows before.

    Of what was measured, all that the loss does not need (`ForgetLoss.needs`) is empty.

    Attributes:
        scores: see [`TokenScores`], (n,).
        rows: the row of each token, integers below R in ascending order, (n,).
        num_rows: R.
        targets: the mean log-probability that each row is to come to, in nats, (R,).
        profiles: the log-probabilities that its tokens are to come to, (n,): row after row, the least likely first.
        reference: ln p of each row by the model before the training, the sum over its tokens, (R,).
    """

    scores: TokenScores
    rows: Tensor
    num_rows: int
    targets: Tensor
    profiles: Tensor
    reference: Tensor

    @property
    def log_prob(self) -> Tensor:
        """ln p of each row, the sum over its tokens, (R,)."""
        return self.scores.log_prob.new_zeros(self.num_rows).index_add(0, self.rows, self.scores.log_prob)

    @property
    def sizes(self) -> Tensor:
        """|y|, how many tokens each row has, 1 at least, (R,)."""
        return torch.bincount(self.rows, minlength=self.num_rows).clamp(min=1)


def inverted_hinge_loss(scores: TokenScores, margin: float | None = None) -> Tensor:
    """Inverted hinge loss, L_IHL of Eq. 8: push the label below its strongest rival.

    1 + p(x_t) - max_{v != x_t} p(v), or with a margin m: max(0, p(x_t) - max_{v != x_t} p(v) + m).

    With p = p(x_t) and p_v the rival's probability, its gradient in the label's logit is p (1 - p + p_v), which
    vanishes as p -> 1: on a memorised token it starts slowly. Without a margin it is at rest only at p_v = 1; with one
    it is at rest once the rival leads by m.

    Args:
        scores: see [`score_tokens`].
        margin: m, a difference of probabilities; None for the paper's form.

    Returns:
        The loss of each token, shape (n,): in [0, 2] without a margin, in [0, 1 + m] with m >= 0.

    References:
        Cha et al., "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs" (LoKU), arXiv:2408.06621.
    """
    lead = scores.log_prob.exp() - scores.log_rival.exp()
    return 1 + lead if margin is None else (lead + margin).relu()


def level_loss(scores: TokenScores, rows: Tensor, targets: Tensor) -> Tensor:
    """Two-sided forget loss: bring a row's mean log-probability to the level of text that was never seen.

    huber(mean_{t in row} ln p(x_t) - target), linear beyond half a nat and quadratic within: the same number for each
    token of a row. Not in the paper, whose hinge has no such point of rest. Its gradient in a label's logit is
    proportional to 1 - p: tokens that anyone could predict keep their probability, as in a model that never saw the
    text, and those that carry the fact give way. It shrinks as the target comes near and turns round beyond it, so
    that an optimiser's momentum is called back.

    Args:
        scores: see [`score_tokens`].
        rows: the row of each token, shape (n,), integers below R.
        targets: the mean log-probability to reach, one a row, in nats, shape (R,).

    Returns:
        The loss of each token, shape (n,): in nats beyond half a nat from the target.
    """
    zeros = torch.zeros_like(targets, dtype=scores.log_prob.dtype)
    sums = zeros.index_add(0, rows, scores.log_prob)
    sizes = zeros.index_add(0, rows, torch.ones_like(scores.log_prob))
    means = sums / sizes.clamp(min=1)
    return F.smooth_l1_loss(means, targets.to(means.dtype), reduction="none", beta=0.5)[rows]


def profile_loss(scores: TokenScores, rows: Tensor, targets: Tensor) -> Tensor:
    """Two-sided forget loss: bring the log-probabilities of a row's tokens to those of a row never seen, rank by rank.

    huber(ln p(x_(i)) - target_(i)), with x_(i) the i-th least likely token of its row; linear beyond half a nat and
    quadratic within. Not in the paper. What [`level_loss`] does with the mean alone: a mean can also be reached by a
    few very unlikely tokens, while all others stay the model's first choice. Up to the Huber part its sum over a row
    is the row's length times the first Wasserstein distance between the two samples, which sorting solves.

    Args:
        scores: see [`score_tokens`].
        rows: the row of each token, shape (n,), integers.
        targets: the log-probabilities to reach, in nats, shape (n,): row after row in the order of their numbers, the
            least likely first within each.

    Returns:
        The loss of each token, shape (n,): in nats beyond half a nat from its target.

    Raises:
        ValueError: if `targets` are not as many as the tokens.
    """
    if len(targets) != len(scores.log_prob):
        raise ValueError(f"targets has {len(targets)} values for {len(scores.log_prob)} tokens; give one for each.")
    order = torch.argsort(scores.log_prob.detach(), stable=True)
    order = order[torch.argsort(rows[order], stable=True)]
    reached = scores.log_prob[order]
    loss = F.smooth_l1_loss(reached, targets.to(reached.dtype), reduction="none", beta=0.5)
    return torch.zeros_like(loss).index_copy(0, order, loss)


def gradient_ascent_loss(scores: TokenScores) -> Tensor:
    """
    Gradient ascent on the labels' cross-entropy: ln p(x_t), which has no point of rest.

    Args:
        scores: see [`TokenScores`].

    Returns:
        The loss of each token in nats, (n,).

    References:
        Jang et al., "Knowledge Unlearning for Mitigating Privacy Risks in Language Models", arXiv:2210.01504. With
        cross-entropy on retain rows it is GradDiff (TOFU, arXiv:2401.06121).
    """
    return scores.log_prob


def npo_loss(log_prob: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """
    Negative preference optimisation: -2/beta ln sigmoid(-beta ln(p / p_ref)).

    Args:
        log_prob: ln p of each row, (R,).
        reference: ln p_ref, the same by the model before the training, (R,).
        beta: inverse temperature; 0.1 is the paper's on TOFU. beta -> 0 is gradient ascent.

    Returns:
        The loss of each row, (R,).

    References:
        Zhang et al., "Negative Preference Optimization", arXiv:2404.05868.
    """
    return -2 / beta * F.logsigmoid(-beta * (log_prob - reference))


def simnpo_loss(log_prob: Tensor, sizes: Tensor, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    """
    Negative preference optimisation without a reference: -2/beta ln sigmoid(-beta (ln p / |y| + delta)).

    Args:
        log_prob: ln p of each row, (R,).
        sizes: |y|, its tokens, (R,).
        beta, delta: named as in open-unlearning; the paper's gamma is beta delta.

    Returns:
        The loss of each row, (R,).

    References:
        Fan et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning",
        arXiv:2410.07163.
    """
    return -2 / beta * F.logsigmoid(-beta * log_prob / sizes - beta * delta)


@dataclass(frozen=True)
class ForgetLoss:
    """
    An entry of `FORGET_LOSSES`.

    Attributes:
        compute: the batch and the loss's options -> the loss of each token, (n,), or of each row, (R,).
        over: `"tokens"` or `"rows"`: what the term is a mean of, over the whole step.
        caption: what it does, in a sentence.
        source: paper or code.
        low_entropy: whether it is of a row's low-entropy tokens alone, where an entropy is known (ALTER), as the
            paper's L_IHL is; else of whole answers.
        needs: what has to be measured of the rows before the training: `"targets"` (a level), `"profiles"`,
            `"reference"`.
        options: name -> default of what `forget_loss_kwargs` may set.
        positive: those of the options that must be above 0.
        weight: what it is multiplied by beside `forget_weight`, as its source has it.
    """

    compute: Callable[[ForgetBatch, Mapping[str, float]], Tensor]
    over: Literal["tokens", "rows"]
    caption: str
    source: str
    low_entropy: bool = False
    needs: frozenset[str] = frozenset()
    options: Mapping[str, float] = field(default_factory=dict)
    positive: frozenset[str] = frozenset()
    weight: float = 1.0

    @property
    def has_targets(self) -> bool:
        """Whether it comes to rest where the forget rows are to come to, so that training can stop there."""
        return "targets" in self.needs


FORGET_LOSSES: dict[str, ForgetLoss] = {
    "level": ForgetLoss(
        compute=lambda batch, options: level_loss(batch.scores, batch.rows, batch.targets),
        over="tokens",
        caption="Brings a row's mean log-probability to that of text never seen, from both sides.",
        source="this package (docs/paper.md)",
        needs=frozenset({"targets"}),
    ),
    "profile": ForgetLoss(
        compute=lambda batch, options: profile_loss(batch.scores, batch.rows, batch.profiles),
        over="tokens",
        caption="Brings every token of a row to the log-probability that an unseen row has at the same rank.",
        source="this package (docs/paper.md)",
        needs=frozenset({"targets", "profiles"}),
    ),
    "hinge": ForgetLoss(
        compute=lambda batch, options: inverted_hinge_loss(batch.scores, options["margin"]),
        over="tokens",
        caption="Inverted hinge with a margin: at rest once the strongest other token leads by it.",
        source="this package, after LoKU, arXiv 2408.06621",
        low_entropy=True,
        options={"margin": 0.0},
    ),
    "ihl": ForgetLoss(
        compute=lambda batch, options: inverted_hinge_loss(batch.scores),
        over="tokens",
        caption="Inverted hinge as the paper prints it, which drives a model far below one that never saw the text.",
        source="L_IHL of Eq. 8, arXiv 2603.01792; LoKU, arXiv 2408.06621",
        low_entropy=True,
    ),
    "ga": ForgetLoss(
        compute=lambda batch, options: gradient_ascent_loss(batch.scores),
        over="tokens",
        caption="Gradient ascent on the cross-entropy; with cross-entropy on retain rows, GradDiff.",
        source="arXiv 2210.01504; TOFU, arXiv 2401.06121",
    ),
    "npo": ForgetLoss(
        compute=lambda batch, options: npo_loss(batch.log_prob, batch.reference, options["beta"]),
        over="rows",
        caption="Negative preference optimisation against the model before the training.",
        source="arXiv 2404.05868",
        needs=frozenset({"reference"}),
        options={"beta": 0.1},
        positive=frozenset({"beta"}),
    ),
    "simnpo": ForgetLoss(
        compute=lambda batch, options: simnpo_loss(batch.log_prob, batch.sizes, options["beta"], options["delta"]),
        over="rows",
        caption="Negative preference optimisation by the mean log-probability, without a reference.",
        source="arXiv 2410.07163; beta, delta and weight of open-unlearning",
        options={"beta": 4.5, "delta": 0.0},
        positive=frozenset({"beta"}),
        weight=0.125,
    ),
}
