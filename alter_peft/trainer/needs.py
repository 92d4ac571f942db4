# SPDX-License-Identifier: Apache-2.0
"""What a forget loss needs beside log-probabilities (`ForgetLoss.needs`), made before the first step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from alter_peft.losses import RETAIN_LOSSES, ForgetLoss
from alter_peft.scoring import ScoredModel

from .alternates import ALTERNATES, Asking, alternate_rows, alternates
from .inputs import check_base
from .inside import Base, layer_at
from .other_labels import OTHER_LABELS, Making
from .targets import Measured
from .windows import Limit


# what is looked at in every step; all else of `MADE` is made once
IN_STEPS = {"base", "activations"}
MADE = {*IN_STEPS, *OTHER_LABELS, *ALTERNATES}
# those that a model is copied, trained or sampled for
OF_WHOLE_MODELS = {"generic_labels", "novice_labels", "own_alternates", "novice_answers"}


class Made(NamedTuple):
    """
    measured: with what was made for the forget rows.
    alternates: these rows with other answers, as tokens; `None` if the loss needs none.
    """

    measured: Measured
    alternates: list[dict[str, Any]] | None


def alternates_of(loss: ForgetLoss) -> str | None:
    """The need for alternate answers, if there is one."""
    return next((need for need in sorted(loss.needs) if need in ALTERNATES), None)


def make(loss: ForgetLoss, measured: Measured, given: Asking, limit: Limit | None, as_given: bool = True) -> Made:
    """
    What a loss needs beyond log-probabilities of the forget rows.

    Args:
        measured: the log-probabilities.
        given: the rows and the model.
        limit: of a row's tokens.
        as_given: whether references are by the model as it is, or else by its base.
    """
    places = [need for need in loss.needs if need in OTHER_LABELS]
    if places:
        making = Making(given.scored, given.rows, given.tokenizer, given.options, given.batch_size, given.seed)
        labels, probabilities = OTHER_LABELS[places[0]](making)
        measured = measured._replace(other_labels=labels, label_probabilities=probabilities)
    if "activations" in loss.needs:
        measured = measured._replace(direction=direction(given.scored, given.seed))
    need = alternates_of(loss)
    if need is None:
        return Made(measured, None)
    rows = alternate_rows(alternates(need, given), given, limit)
    if "reference" in loss.needs:
        found = given.scored.label_log_probabilities(
            [(row["input_ids"], row["labels"]) for row in rows], given.batch_size, base=not as_given, by_length=False
        )
        measured = measured._replace(alternate_reference=torch.stack([row.sum() for row in found]))
    return Made(measured, rows)


def direction(scored: ScoredModel, seed: int) -> Tensor:
    """RMU's u: uniform in [0, 1] in every dimension, drawn by the seed, of length 1, (k,)."""
    size: int = scored.base.config.get_text_config().hidden_size
    drawn = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=0)


def base_beside(args: Any, scored: ScoredModel, is_split: bool) -> Base:
    """
    The base model beside the one that is trained, as its losses look at both.

    Args:
        args: of the training.
        is_split: whether no process has all weights.

    Raises:
        ValueError: a loss needs what is not there.
    """
    retain, needs = RETAIN_LOSSES[args.retain_loss], args.loss.needs
    wants = {"retain_loss": retain.needs_base, "forget_loss": "base" in needs}
    for option in (option for option, is_needed in wants.items() if is_needed):
        check_base(option, getattr(args, option), scored, is_split)
    check_whole(args.loss, args.forget_loss, is_split)
    looks = retain.needs_activations or "activations" in needs
    layer = layer_at(args.activation_depth, scored) if looks else None
    return Base(scored, layer, any(wants.values()) and not isinstance(scored.model, PeftModel))


def check_whole(loss: ForgetLoss, forget_loss: str, is_split: bool) -> None:
    """Raise a `ValueError` if a model has to be copied, trained or sampled that no process has whole."""
    if is_split and loss.needs & OF_WHOLE_MODELS:
        raise ValueError(
            f"`forget_loss` is {forget_loss!r}, which needs a whole model before the training, but ZeRO-3 has split "
            "it. Use ZeRO-2, FSDP2 or DDP."
        )


def check_whole_rows(given: Dataset, forget: Dataset) -> None:
    """Raise a `ValueError` if some of the rows were cut into windows, of which none is a whole answer."""
    if len(given) != len(forget):
        raise ValueError(
            f"The {len(given)} rows of `train_dataset` are {len(forget)} windows of `max_length` tokens, but the "
            "forget loss compares whole answers with others. Raise `max_length`, or shorten the rows."
        )
