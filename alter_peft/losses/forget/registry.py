# SPDX-License-Identifier: Apache-2.0
"""The forget losses by name: an entry says all that the trainer, the command line and the docs need of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .activations import steering_loss
from .ascent import gradient_ascent_loss, weighted_gradient_ascent_loss
from .entry import ForgetBatch, ForgetLoss
from .hinge import inverted_hinge_loss
from .labels import other_label_loss, undial_loss
from .levels import level_loss, profile_loss
from .preference import dpo_loss, npo_loss, simnpo_loss
from .tokens import soft_target_loss, token_loss


def _other_labels(batch: ForgetBatch, options: Mapping[str, Any]) -> Tensor:
    inside = batch.within
    return other_label_loss(inside.hidden, inside.head, batch.other_labels, batch.label_probabilities)


def _soft_targets(batch: ForgetBatch, options: Mapping[str, Any]) -> Tensor:
    targets, shares = batch.token_targets, batch.label_probabilities
    weight: float = options["rival_weight"]
    softly = soft_target_loss(batch.scores.log_prob, batch.log_rivals, targets, shares)
    return weight * softly + token_loss(batch.scores, targets, batch.token_leads)


def _undial(batch: ForgetBatch, options: Mapping[str, Any]) -> Tensor:
    inside = batch.within
    return undial_loss(*inside.beside_base, inside.labels, options["beta"])


def _rmu(batch: ForgetBatch, options: Mapping[str, Any]) -> Tensor:
    inside = batch.within
    if inside.activations is None or inside.direction is None:
        raise ValueError("`activations` or `direction` is None, but the loss is of them. Pass both.")
    return steering_loss(inside.activations, inside.direction, options["coefficient"])


def _dpo(batch: ForgetBatch, options: Mapping[str, Any]) -> Tensor:
    others = batch.others
    return dpo_loss(batch.log_prob, batch.reference, others.log_prob, others.reference, options["beta"])


def _elm(batch: ForgetBatch, options: Mapping[str, Any]) -> Tensor:
    """The erasing and the fluency term of each row, as the authors' code has them at one row a batch."""
    others = batch.others
    weight: float = options["fluency"]
    return batch.row_means(_other_labels(batch, options)) + weight * others.row_means(-others.scores.log_prob)


# what ELM's authors say in several wordings and with the subject's name
EXPERT = "This was written by an expert on its subject, with all that there is to know of it:"
NOVICE = "This was written by a novice who knows nothing of its subject and turns to other things, for fun:"


FORGET_LOSSES: dict[str, ForgetLoss] = {
    "tokens": ForgetLoss(
        compute=lambda batch, options: token_loss(batch.scores, batch.token_targets, batch.token_leads),
        over="tokens",
        caption="Brings every token to the log-probability that a model which never saw the text would give it, and "
        "behind a rival where it would not be that model's first choice.",
        source="this package (docs/paper.md)",
        needs=frozenset({"targets", "token_targets"}),
    ),
    "soft_targets": ForgetLoss(
        compute=_soft_targets,
        over="tokens",
        caption="As 'tokens', and what a token gives up goes to what a model that knows less would say there.",
        source="this package (docs/paper.md)",
        needs=frozenset({"targets", "token_targets", "rival_labels"}),
        options={"rival_weight": 0.25},
    ),
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
    "wga": ForgetLoss(
        compute=lambda batch, options: weighted_gradient_ascent_loss(batch.scores, options["beta"]),
        over="tokens",
        caption="Gradient ascent weighted by the label's probability, so that it fades.",
        source="arXiv 2502.19301; beta of open-unlearning",
        options={"beta": 1.0},
    ),
    "undial": ForgetLoss(
        compute=_undial,
        over="tokens",
        caption="Self-distillation from the base model with the label's logit lowered.",
        source="arXiv 2402.10052; beta of open-unlearning",
        needs=frozenset({"base"}),
        options={"beta": 10.0},
    ),
    "idkdpo": ForgetLoss(
        compute=_dpo,
        over="rows",
        caption="Direct preference optimisation for a refusal over the answer.",
        source="DPO on TOFU, arXiv 2404.05868; the factor 2 / beta of open-unlearning",
        needs=frozenset({"reference", "refusals"}),
        options={"beta": 0.1},
        positive=frozenset({"beta"}),
    ),
    "altpo": ForgetLoss(
        compute=_dpo,
        over="rows",
        caption="Direct preference optimisation for an answer of other facts, the model's own, over the answer.",
        source="arXiv 2409.13474; the factor 2 / beta of open-unlearning",
        needs=frozenset({"reference", "own_alternates"}),
        options={"beta": 0.1},
        positive=frozenset({"beta"}),
    ),
    "random_tokens": ForgetLoss(
        compute=_other_labels,
        over="tokens",
        caption="Random label: cross-entropy of tokens drawn at random from the vocabulary.",
        source="arXiv 2402.15159",
        needs=frozenset({"random_labels"}),
    ),
    "random_answers": ForgetLoss(
        compute=lambda batch, options: -batch.others.scores.log_prob,
        over="alternate tokens",
        caption="Random label: cross-entropy of the answer of a retain row drawn at random.",
        source="random mismatch of LLMU, arXiv 2310.10683",
        needs=frozenset({"other_answers"}),
    ),
    "rmu": ForgetLoss(
        compute=_rmu,
        over="tokens",
        caption="Sends a layer's activations to one random vector; with `retain_loss=activations`, RMU.",
        source="WMDP, arXiv 2403.03218",
        needs=frozenset({"activations"}),
        options={"coefficient": 6.5},
        positive=frozenset({"coefficient"}),
    ),
    "elm": ForgetLoss(
        compute=_elm,
        over="rows",
        caption="Distils what the base model says as a novice, not as an expert, plus a fluent novice's answer.",
        source="arXiv 2410.02760; eta, temperature and top_k of its code",
        needs=frozenset({"novice_labels", "novice_answers"}),
        options={
            "eta": 1000.0,
            "temperature": 1.2,
            "top_k": 50,
            "fluency": 1.0,
            "expert": EXPERT,
            "novice": NOVICE,
        },
        positive=frozenset({"temperature", "top_k"}),
    ),
    "whp": ForgetLoss(
        compute=_other_labels,
        over="tokens",
        caption="Cross-entropy of generic tokens: those that a model reinforced on the forget rows does not favour.",
        source="arXiv 2310.02238",
        needs=frozenset({"generic_labels"}),
        options={"alpha": 5.0, "epochs": 3, "learning_rate": 5e-4},
        positive=frozenset({"epochs", "learning_rate"}),
    ),
}
