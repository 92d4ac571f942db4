# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from trl import SFTConfig

from alter_peft.tuner.values import is_finite_number, is_integer, is_positive


@dataclass
class AlterUnlearnConfig(SFTConfig):
    r"""
    Configuration of the [`AlterUnlearnTrainer`]: the optimisation. The adapter's structure is in [`AlterConfig`].

    The only changes from [`~trl.SFTConfig`] are the fields below. Symbols are those of Eq. 8,
    `beta * L_IHL + gamma * L_retain + lambda * L_struct`, of https://huggingface.co/papers/2603.01792.

    Args:
        learning_rate (`float`, *optional*, defaults to `1e-3`):
            eta_B, the initial learning rate of the experts.
        shared_learning_rate (`float`, *optional*, defaults to `1e-5`):
            eta_A, the initial learning rate of the shared matrices A.
        num_train_epochs (`float`, *optional*, defaults to `30.0`):
            Passes over the forget set, at most: see `landing_tolerance`.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            The loss itself ends the descent; a decay only makes the level be reached later.
        per_device_train_batch_size (`int`, *optional*, defaults to `4`):
            Forget rows a step and device; as many retain rows join them.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Recompute the adapted layers in backward to save memory.
        loss_type (`str`, *optional*, defaults to `"nll"`):
            The loss of `evaluate`; no other. The oldest TRL has another default.
        forget_weight (`float`, *optional*, defaults to `1.0`):
            beta.
        retain_weight (`float`, *optional*, defaults to `1.0`):
            gamma.
        structural_weight (`float`, *optional*, defaults to `0.01`):
            lambda; 0 freezes A.
        structural_q (`float`, *optional*, defaults to `0.5`):
            Order of the Tsallis entropy in L_struct.
        structural_interval (`int`, *optional*, defaults to `16`):
            L_struct is evaluated every so many steps, times this number (lazy regularisation).
        forget_loss (`str`, *optional*, defaults to `"level"`):
            `"level"`: Huber loss between a row's mean log-probability and the log of `forget_level`: it stops at the
            level of text that was never seen, from both sides, and raises no row above where it began. `"profile"`:
            the same for every token of a row, least likely first, with the log-probabilities of a row of the
            `calibration_dataset` as targets, so that no few tokens carry the whole descent (`docs/paper.md`).
            `"hinge"`: max(0, p - p_v + margin), at rest once the strongest other token leads by `margin`. `"paper"`:
            the inverted hinge as printed, 1 + p - p_v, which drives a model far below one that never saw the text.
        forget_level (`float`, *optional*, defaults to `0.1`):
            The answer probability, exp of the mean log-probability of its tokens, that `forget_loss="level"` aims at.
            A `calibration_dataset` given to the trainer measures it instead.
        landing_tolerance (`float`, *optional*, defaults to `0.25`):
            With `forget_loss="level"` or `"profile"`, training ends with the first epoch after which the mean
            log-probability of a forget row lies within so many nats of its target, on average over the rows (64 of
            them at most, and of these 8 alone while the average over those is more than twice as large). `None`: it
            never ends early.
        margin (`float`, *optional*, defaults to `0.0`):
            Margin of `forget_loss="hinge"`, a difference of probabilities.
        as_chat (`bool`, *optional*):
            Whether `prompt` and `completion` strings become the turns of a chat. By default they do if the tokenizer
            has a chat template, since that is how the model will be asked: made to forget the bare strings, it still
            answers in its template (`docs/log.md`). `False` takes them as they are, as TRL does.
        retain_loss (`str`, *optional*, defaults to `"cross_entropy"`):
            `"cross_entropy"` on the retain rows, or `"kl"`, the divergence from the base model on them.

    Copied by pickle or `copy`, as for `training_args.bin`, the configuration comes without its `hub_token`.

    Raises:
        `ValueError`: a value out of its range, or an option that ALTER cannot honour; the message names the field,
        the value and the fix.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "eta_B, initial learning rate of the experts."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The scheduler type to use."})
    num_train_epochs: float = field(default=30.0, metadata={"help": "Passes over the forget set, at most."})
    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "Forget rows a step and device; as many retain rows join them."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute the adapted layers in backward to save memory."}
    )
    loss_type: str = field(default="nll", metadata={"help": "The loss of `evaluate`; no other."})
    shared_learning_rate: float = field(default=1e-5, metadata={"help": "eta_A, initial learning rate of A."})
    forget_weight: float = field(default=1.0, metadata={"help": "beta of Eq. 8."})
    retain_weight: float = field(default=1.0, metadata={"help": "gamma of Eq. 8."})
    structural_weight: float = field(default=0.01, metadata={"help": "lambda of Eq. 8; 0 freezes A."})
    structural_q: float = field(default=0.5, metadata={"help": "Order of the Tsallis entropy in L_struct."})
    structural_interval: int = field(default=16, metadata={"help": "Evaluate L_struct every so many steps."})
    forget_loss: Literal["level", "profile", "hinge", "paper"] = field(
        default="level",
        metadata={"help": "Form of L_IHL: to a level, to a profile, a hinge with a margin, or as printed."},
    )
    forget_level: float = field(default=0.1, metadata={"help": "Answer probability that 'level' aims at."})
    landing_tolerance: float | None = field(
        default=0.25,
        metadata={"help": "Mean distance of the forget rows from the level, in nats, that ends training."},
    )
    margin: float = field(default=0.0, metadata={"help": "Margin of the hinge, a difference of probabilities."})
    as_chat: bool | None = field(
        default=None,
        metadata={"help": "Make prompt and completion strings the turns of a chat (default: if there is a template)."},
    )
    retain_loss: Literal["cross_entropy", "kl"] = field(
        default="cross_entropy", metadata={"help": "Cross-entropy on the retain rows, or KL from the base model."}
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            # TRL's default, bf16, is autocast on a CPU too, but transformers wants to be told that it is one
            self.use_cpu, self.dataloader_pin_memory = True, False
        super().__post_init__()
        weights = ("forget_weight", "retain_weight", "structural_weight")
        for name in (*weights, "shared_learning_rate"):
            value = getattr(self, name)
            _require(is_finite_number(value) and value >= 0, name, value, "a finite number, 0 or positive")
        if not any(getattr(self, name) > 0 for name in weights):
            raise ValueError(
                "`forget_weight`, `retain_weight` and `structural_weight` are all 0, but one of them must be "
                "positive, or nothing is learned."
            )
        q, interval = self.structural_q, self.structural_interval
        _require(is_positive(q), "structural_q", q, "above 0 and finite (1 is Shannon's entropy)")
        _require(
            is_integer(interval) and interval >= 1, "structural_interval", interval, "1 or more steps, an integer"
        )
        _require(is_finite_number(self.margin), "margin", self.margin, "a finite number")
        forms = ("level", "profile", "hinge", "paper")
        _require(self.forget_loss in forms, "forget_loss", self.forget_loss, "'level', 'profile', 'hinge' or 'paper'")
        level, tolerance = self.forget_level, self.landing_tolerance
        _require(
            is_positive(level) and level < 1, "forget_level", level, "a probability between 0 and 1, both excluded"
        )
        _require(
            tolerance is None or is_positive(tolerance), "landing_tolerance", tolerance, "above 0, in nats, or None"
        )
        _require(
            self.retain_loss in ("cross_entropy", "kl"), "retain_loss", self.retain_loss, "'cross_entropy' or 'kl'"
        )
        _require(self.loss_type == "nll", "loss_type", self.loss_type, "'nll': Eq. 8 is the loss")
        smoothing = self.label_smoothing_factor
        _require(smoothing == 0, "label_smoothing_factor", smoothing, "0: Eq. 8 is the loss")
        _require(not self.eval_packing, "eval_packing", self.eval_packing, "unset: gates need one row for each text")
        _require(not self.packing, "packing", self.packing, "False: gates need one row for each text")
        _require(not self.padding_free, "padding_free", self.padding_free, "False: gates need one row for each text")
        _require(self.ddp_find_unused_parameters is not True, "ddp_find_unused_parameters", True, "unset or False")
        # A learns through its own term alone, which DDP would take for "unused, then ready twice"
        self.ddp_find_unused_parameters = False

    @property
    def lands(self) -> bool:
        """Whether `forget_loss` has targets to come to, over whole answers, and is at rest there."""
        return self.forget_loss in ("level", "profile")

    def __getstate__(self) -> dict[str, Any]:
        # transformers pickles its arguments into training_args.bin and pushes it with the adapter, for all to read
        return {**self.__dict__, "hub_token": None}


def _require(condition: bool, name: str, value: object, fix: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` is {value!r}, but must be {fix}.")
