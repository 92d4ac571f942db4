# SPDX-License-Identifier: Apache-2.0
"""The forget losses by name: an entry says all that the trainer, the command line and the docs need of it."""

from __future__ import annotations

from .ascent import gradient_ascent_loss
from .entry import ForgetLoss
from .hinge import inverted_hinge_loss
from .levels import level_loss, profile_loss
from .preference import npo_loss, simnpo_loss


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
