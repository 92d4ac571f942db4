# SPDX-License-Identifier: Apache-2.0
"""The field's methods: what each is and the options of its loss, whatever adapter it trains."""

from __future__ import annotations

from typing import Any, NamedTuple


class FieldMethod(NamedTuple):
    """
    caption: what it is, with its source.
    options: of the training, as its source has them; the rest is that of the adapter.
    of_tokens: whether its loss is one of tokens or rows, so that ALTER's experts can learn it.
    """

    caption: str
    options: dict[str, Any]
    of_tokens: bool = True


FIELD: dict[str, FieldMethod] = {
    "ihl": FieldMethod(
        "inverted hinge loss on the forget rows plus cross-entropy on retain rows: LoKU's loss (2408.06621), without "
        "its FILA start",
        {"forget_loss": "ihl"},
    ),
    "ga_alone": FieldMethod(
        "gradient ascent without a retain term (GA, 2210.01504)", {"forget_loss": "ga", "retain_weight": 0.0}
    ),
    "ga": FieldMethod(
        "gradient ascent plus cross-entropy on retain rows (GradDiff, 2401.06121)", {"forget_loss": "ga"}
    ),
    "ga_kl": FieldMethod(
        "gradient ascent plus the divergence from the base model on retain rows (KL-min, 2401.06121)",
        {"forget_loss": "ga", "retain_loss": "kl"},
    ),
    "npo_alone": FieldMethod(
        "negative preference optimisation without a retain term (NPO, 2404.05868, beta 0.1)",
        {"forget_loss": "npo", "retain_weight": 0.0},
    ),
    "npo": FieldMethod(
        "negative preference optimisation (NPO) plus cross-entropy on retain rows (2404.05868, beta 0.1)",
        {"forget_loss": "npo"},
    ),
    "npo_kl": FieldMethod(
        "negative preference optimisation plus the divergence from the base model on retain rows (NPO_KL, 2404.05868, "
        "beta 0.1)",
        {"forget_loss": "npo", "retain_loss": "kl"},
    ),
    "simnpo": FieldMethod(
        "the form of NPO without a reference plus cross-entropy on retain rows (SimNPO, 2410.07163, beta 4.5, weight "
        "0.125 and no margin, as in open-unlearning)",
        {"forget_loss": "simnpo"},
    ),
    "wga": FieldMethod(
        "weighted gradient ascent plus cross-entropy on retain rows (WGA, 2502.19301, beta 1 as in open-unlearning)",
        {"forget_loss": "wga"},
    ),
    "undial": FieldMethod(
        "self-distillation with the label's logit lowered by 10, without a retain term (UNDIAL, 2402.10052, as in "
        "open-unlearning)",
        {"forget_loss": "undial", "retain_weight": 0.0},
    ),
    "idkdpo": FieldMethod(
        "direct preference optimisation for refusals plus cross-entropy on retain rows (IdkDPO, 2404.05868, beta 0.1)",
        {"forget_loss": "idkdpo"},
    ),
    "altpo": FieldMethod(
        "direct preference optimisation for answers of other facts, one a row, that the model makes up, plus "
        "cross-entropy on retain rows (AltPO, 2409.13474, beta 0.1)",
        {"forget_loss": "altpo"},
    ),
    "random_tokens": FieldMethod(
        "random label, read as random tokens (2402.15159), plus cross-entropy on retain rows, which that source "
        "does not have",
        {"forget_loss": "random_tokens"},
    ),
    "random_answers": FieldMethod(
        "random label, read as the answers of other rows: LLMU's random mismatch (2310.10683) plus its divergence "
        "from the base model on retain rows, without its gradient ascent",
        {"forget_loss": "random_answers", "retain_loss": "kl"},
    ),
    "rmu": FieldMethod(
        "activations of a layer to a random vector, those of retain rows held where they were (RMU, 2403.03218, "
        "coefficient 6.5 and weight 1200, the paper's for Zephyr-7B; it trains three layers there)",
        {"forget_loss": "rmu", "retain_loss": "activations", "retain_weight": 1200.0},
        of_tokens=False,
    ),
    "elm": FieldMethod(
        "what the base model says as a novice and not as an expert, and its fluent answers as a novice, plus the "
        "divergence from the base model on retain rows (ELM, 2410.02760, as its code has it but for the hard labels "
        "there)",
        {"forget_loss": "elm", "retain_loss": "kl"},
    ),
    "whp": FieldMethod(
        "generic tokens, those that a model reinforced on the forget rows does not favour, without a retain term "
        "(WHP, 2310.02238, alpha 5, without its dictionary of names)",
        {"forget_loss": "whp", "retain_weight": 0.0},
    ),
}
