# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from trl import SFTConfig

from alter_peft.losses import FORGET_LOSSES, RETAIN_LOSSES, ForgetLoss
from alter_peft.options import CHAT_TEMPLATE_KWARGS, arguments_doc, option
from alter_peft.tuner.values import is_finite_number, is_integer, is_positive, require


class Inherited(NamedTuple):
    """What an inherited option may be at most, since pairs of rows, their losses or their windows take its place."""

    allowed: tuple[Any, ...]
    fix: str


ONE_ROW = "gates need one row for each text"
OWN_LOSS = "Eq. 8 is the loss"
GUESSED_LEVEL = 0.1  # of text never seen, where nothing shows one (docs/paper.md)
PAIRS = "pairs of rows are drawn anew for each epoch, by `seed`"
INHERITED = {
    "loss_type": Inherited(("nll",), f"'nll': {OWN_LOSS}"),
    "label_smoothing_factor": Inherited((0,), f"0: {OWN_LOSS}"),
    # 0.001 is the default of older TRL, which does nothing either
    "router_aux_loss_coef": Inherited((None, 0, 0.001), f"unset or 0: {OWN_LOSS}, without a term for MoE routers"),
    "average_tokens_across_devices": Inherited((True,), "True: each term is a mean over the step on all devices"),
    "packing": Inherited((False,), f"False: {ONE_ROW}"),
    "eval_packing": Inherited((None, False), f"unset: {ONE_ROW}"),
    "padding_free": Inherited((False,), f"False: {ONE_ROW}"),
    "train_sampling_strategy": Inherited(("random",), f"'random': {PAIRS}"),
    "shuffle_dataset": Inherited((False,), f"False: {PAIRS}"),
    "data_seed": Inherited((None,), f"unset: {PAIRS}"),
    "truncation_mode": Inherited(("keep_start",), "'keep_start': no row is truncated (`long_rows`)"),
}


# integrations for logs whose packages transformers looks for elsewhere
NOT_LOOKED_FOR = ("azure_ml", "flyte", "kubeflow")
# each of ALTER's parameters learns from one term
NO_EFFECT = "With ALTER's isolation under Adam, which divides by a gradient's size, only whether it is 0 counts."


def check_reports(names: Any) -> None:
    """Raise a `ValueError` if logs are to go to an integration that transformers does not know, or cannot use here."""
    usable, known = get_available_reporting_integrations(), list(INTEGRATION_TO_CALLBACK)
    for name in names or ():
        if name not in known:
            raise ValueError(f"`report_to` has {name!r}, but must be 'none', 'all' or some of {known}.")
        if name not in usable and name not in NOT_LOOKED_FOR:
            here = f"what can be used here is {usable}" if usable else "nothing of the kind can be used here"
            raise ValueError(
                f"`report_to` has {name!r}, which cannot be used here (its package is not installed or not set up): "
                f"{here}. Install it and set it up, or give 'none'."
            )


def _listed(losses: dict[str, Any]) -> str:
    return " ".join(f"{name!r}: {loss.caption}" for name, loss in losses.items())


@arguments_doc
@dataclass
class UnlearnConfig(SFTConfig):
    """
    Configuration of the [`UnlearnTrainer`]: unlearning by any PEFT adapter or all weights.

    The only changes from [`~trl.SFTConfig`] are the arguments below. Symbols are those of Eq. 8 of
    https://huggingface.co/papers/2603.01792, `beta * L_IHL + gamma * L_retain + lambda * L_struct`.

    Copied by pickle or `copy`, as for `training_args.bin`, the configuration comes without its `hub_token`.

    Raises:
        `ValueError`: a value out of its range, or an option that pairs of rows cannot honour; the message names the
        field, the value and the fix.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "forget_loss_kwargs", "chat_template_kwargs"]  # noqa: RUF012 (TRL declares it so)

    learning_rate: float = option(1e-4, "Initial learning rate. All weights want less than an adapter.")
    num_train_epochs: float = option(5.0, "Passes over the forget set, at most (TOFU's 5).")
    per_device_train_batch_size: int = option(4, "Forget rows a step and device; as many retain rows join them.")
    gradient_checkpointing: bool = option(False, "Recompute the adapted layers in backward to save memory.")
    loss_type: str = option("nll", "The loss of `evaluate`; no other. The oldest TRL has another default.")
    forget_weight: float = option(1.0, f"beta of Eq. 8, the weight of the forget loss. {NO_EFFECT}")
    retain_weight: float = option(1.0, f"gamma of Eq. 8, the weight of the retain loss. {NO_EFFECT}")
    forget_loss: str = option(
        "soft_targets", f"What is minimised on forget rows, a name of `FORGET_LOSSES`. {_listed(FORGET_LOSSES)}"
    )
    forget_loss_kwargs: dict[str, Any] | str | None = option(
        None, "Options of the forget loss, as JSON on the command line: '{\"beta\": 0.1}'."
    )
    forget_level: float | None = option(
        None,
        "The answer probability, exp of the mean log-probability of its tokens, that rows to forget come to where no "
        "`calibration_dataset` measures it. None: what general text shows, for losses of token targets; else 0.1.",
    )
    stopping_tolerance: float | None = option(
        0.25,
        "With 'soft_targets', 'tokens', 'level' and 'profile' training ends with the first epoch after which the mean "
        "log-probability of a forget row lies within so many nats of its target, or "
        "with the former two the log-probability of a token within so many of its own, on average over the rows (64 "
        "of them at most, and of these 8 alone while the average over those is more than twice as large). Where they "
        "come nearer by less than a tenth for 20 steps, in whole epochs, all rates are halved, three times at most; "
        "then two such epochs that come no nearer end it. None: never.",
    )
    activation_depth: float = option(
        0.22,
        "Where losses of activations look: after the decoder layer at this share of all, counted from 0 (RMU's layer "
        "7 of 32).",
    )
    retain_loss: str = option(
        "cross_entropy", f"What is minimised on retain rows, a name of `RETAIN_LOSSES`. {_listed(RETAIN_LOSSES)}"
    )
    long_rows: str = option(
        "windows",
        "What becomes of rows of more than `max_length` tokens, or than the model has positions. 'windows': they are "
        "trained in overlapping windows, each a row of its own for the pairs, the level, the stopping and the logs. "
        "Each label is a label in exactly one window; before it a window has a fourth of its tokens at least as "
        "context, and at its front what the row begins with before its first label (a prompt), a fourth at most. "
        "'error': a `ValueError` that says how many tokens of which rows would be lost.",
    )
    as_chat: bool | None = option(
        None,
        "Whether `prompt` and `completion` strings become the turns of a chat. By default they do if the tokenizer "
        "has a chat template, since that is how the model will be asked: made to forget the bare strings, it still "
        "answers in its template (docs/log.md). False takes them as they are, as TRL does.",
    )
    chat_template_kwargs: dict[str, Any] | str | None = option(None, CHAT_TEMPLATE_KWARGS)

    checkpoint_dir: str | None = option(
        None, "Where checkpoints go, out of what is delivered: by default `output_dir` with `-checkpoints` behind it."
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            # TRL's default, bf16, is autocast on a CPU too, but transformers wants to be told that it is one
            self.use_cpu, self.dataloader_pin_memory = True, False
        super().__post_init__()
        if self.checkpoint_dir is None:
            output = Path(str(self.output_dir))
            output = output if output.name not in ("", "..") else output.resolve()
            self.checkpoint_dir = str(output.with_name(f"{output.name}-checkpoints"))
        self._check_weights()
        self._check_losses()
        self._check_inherited()

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each term of the loss, by the field's name."""
        return {"forget_weight": self.forget_weight, "retain_weight": self.retain_weight}

    @property
    def guessed_level(self) -> float:
        """`forget_level`, or what stands for it where nothing has shown how likely text never seen is."""
        return GUESSED_LEVEL if self.forget_level is None else self.forget_level

    @property
    def loss(self) -> ForgetLoss:
        """The entry of `FORGET_LOSSES`."""
        return FORGET_LOSSES[self.forget_loss]

    @property
    def loss_options(self) -> dict[str, Any]:
        """The options of the forget loss, defaults included."""
        given = self.forget_loss_kwargs if isinstance(self.forget_loss_kwargs, dict) else {}
        return {**self.loss.options, **given}

    def _check_weights(self) -> None:
        for name, value in self.term_weights.items():
            require(is_finite_number(value) and value >= 0, name, value, "a finite number, 0 or positive")
        if not any(value > 0 for value in self.term_weights.values()):
            *names, last = [f"`{name}`" for name in self.term_weights]
            raise ValueError(
                f"{', '.join(names)} and {last} are all 0, but one of them must be positive, or nothing is learned."
            )

    def _check_losses(self) -> None:
        for name, known in (("forget_loss", FORGET_LOSSES), ("retain_loss", RETAIN_LOSSES)):
            value = getattr(self, name)
            require(value in known, name, value, f"one of {list(known)}")
        if self.retain_loss != "cross_entropy" and self.retain_weight == 0:
            raise ValueError(
                f"`retain_loss` is {self.retain_loss!r}, but `retain_weight` is 0, so that it would do nothing. Give "
                "`retain_weight=1`, or leave `retain_loss` out."
            )
        given, known_options = self.forget_loss_kwargs, self.loss.options
        require(given is None or isinstance(given, dict), "forget_loss_kwargs", given, "a dict, or JSON of one")
        for name, value in (given if isinstance(given, dict) else {}).items():
            if name not in known_options:
                raise ValueError(
                    f"`forget_loss_kwargs` has {name!r}, but `forget_loss={self.forget_loss!r}` takes "
                    f"{list(known_options)}. Remove it."
                )
            positive, is_text = name in self.loss.positive, isinstance(known_options[name], str)
            fits = is_positive(value) if positive else is_finite_number(value)
            wanted = "a text" if is_text else f"a finite number{', above 0' * positive}"
            require(isinstance(value, str) if is_text else fits, f"forget_loss_kwargs[{name!r}]", value, wanted)
        depth = self.activation_depth
        require(is_finite_number(depth) and 0 <= depth < 1, "activation_depth", depth, "at least 0 and below 1")
        level, tolerance = self.guessed_level, self.stopping_tolerance
        require(
            is_positive(level) and level < 1, "forget_level", level, "a probability between 0 and 1, both excluded"
        )
        require(
            tolerance is None or is_positive(tolerance), "stopping_tolerance", tolerance, "above 0, in nats, or None"
        )

    def _check_inherited(self) -> None:
        given = self.chat_template_kwargs
        require(given is None or isinstance(given, dict), "chat_template_kwargs", given, "a dict, or JSON of one")
        for name, option_ in INHERITED.items():
            value = getattr(self, name)
            require(value in option_.allowed, name, value, option_.fix)
        prepared = self.dataset_kwargs if isinstance(self.dataset_kwargs, dict) else {}  # from JSON by now
        require(
            not prepared.get("skip_prepare_dataset"),
            "dataset_kwargs",
            self.dataset_kwargs,
            "without `skip_prepare_dataset`: rows are prepared",
        )
        check_reports(self.report_to)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            value = getattr(self, name)
            require(is_integer(value) and value >= 1, name, value, "1 or more, an integer")
        rate = self.learning_rate
        require(is_finite_number(rate) and rate >= 0, "learning_rate", rate, "a finite number, 0 or positive")
        length, known = self.max_length, ("windows", "error")
        require(length is None or (is_integer(length) and length >= 2), "max_length", length, "2 or more, or None")
        require(self.long_rows in known, "long_rows", self.long_rows, f"one of {list(known)}")

    def __getstate__(self) -> dict[str, Any]:
        # transformers pickles its arguments into training_args.bin and pushes it with the adapter, for all to read
        return {**self.__dict__, "hub_token": None}


@arguments_doc
@dataclass
class AlterUnlearnConfig(UnlearnConfig):
    """
    Configuration of the [`AlterUnlearnTrainer`]: the optimisation. The adapter's structure is in [`AlterConfig`].

    The only changes from [`UnlearnConfig`] are the arguments below.

    Raises:
        `ValueError`: as [`UnlearnConfig`].
    """

    learning_rate: float = option(
        4e-3, "eta_B, initial learning rate of the experts. The paper's is 1e-3; losses without targets want no more."
    )
    lr_scheduler_type: str = option(
        "constant",
        "The scheduler type to use. The loss itself ends the descent; a decay only makes the level be reached later.",
    )
    num_train_epochs: float = option(30.0, "Passes over the forget set, at most: see `stopping_tolerance`.")
    retain_weight: float = option(
        0.0,
        "gamma of Eq. 8, the weight of the retain loss. 0: the retain expert stays at zero, so that text which the "
        "router sends to it is the base model's own, and no step passes the retain rows. Give 1 for a router that "
        "lets retained text into the forget experts ('static', 'entropy').",
    )
    shared_learning_rate: float = option(1e-5, "eta_A, initial learning rate of the shared matrices A.")
    structural_weight: float = option(0.01, f"lambda of Eq. 8, the weight of L_struct; 0 freezes A. {NO_EFFECT}")
    structural_q: float = option(0.5, "Order of the Tsallis entropy in L_struct.")
    structural_interval: int = option(
        16, "Evaluate L_struct every so many steps, on one row, times this number (lazy regularisation)."
    )

    counterfactual_copies: int = option(
        12,
        "Copies of each forget row with another subject (names, numbers) in the place of its own, which the router "
        "learns to leave to the retain expert: so it tells whom a question is about, not only which kind it is of. "
        "0: none, nor general text beside the retain rows, nor rows in capitals and in small letters. A column "
        "`subject` of the forget rows names theirs; without it they are found.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        copies = self.counterfactual_copies
        require(is_integer(copies) and copies >= 0, "counterfactual_copies", copies, "0 or more copies, an integer")
        value, q, interval = self.shared_learning_rate, self.structural_q, self.structural_interval
        require(
            is_finite_number(value) and value >= 0, "shared_learning_rate", value, "a finite number, 0 or positive"
        )
        require(is_positive(q), "structural_q", q, "above 0 and finite (1 is Shannon's entropy)")
        require(is_integer(interval) and interval >= 1, "structural_interval", interval, "1 or more steps, an integer")
        require(
            self.optim_target_modules is None,
            "optim_target_modules",
            self.optim_target_modules,
            "unset: it is A and the experts that learn, each by its own rate",
        )
        require(self.ddp_find_unused_parameters is not True, "ddp_find_unused_parameters", True, "unset or False")
        # A learns through its own term alone, which DDP would take for "unused, then ready twice"
        self.ddp_find_unused_parameters = False

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each term of the loss, by the field's name."""
        return {**super().term_weights, "structural_weight": self.structural_weight}
