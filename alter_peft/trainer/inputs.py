# SPDX-License-Identifier: Apache-2.0
"""What the trainer is given, checked before any compute is spent, and the sub-domains in it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, NamedTuple

from datasets import Dataset
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

from alter_peft.row_texts import row_text
from alter_peft.scoring import ScoredModel
from alter_peft.subdomains import MOST_DOMAINS, NEAR, discover_subdomains
from alter_peft.tuner.config import AlterConfig
from alter_peft.words import counted

from .config import AlterUnlearnConfig


logger = logging.getLogger(__name__)  # not accelerate's, which needs a process state that is made later
MOST_WITHOUT_TARGETS = 1e-3  # the paper's rate: nothing stops a loss that has no targets
# Arguments of SFTTrainer that would put something in the place of what ALTER is made of
OWN_PARTS = ("data_collator", "compute_loss_func", "optimizer_cls_and_kwargs")


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raise a `ValueError` for an argument of SFTTrainer that would be ignored here, or break isolation."""
    given = [name for name in OWN_PARTS if arguments.get(name) is not None]
    if (arguments.get("optimizers") or (None, None))[0] is not None:
        given.append("optimizers")
    if given:
        raise ValueError(
            f"`{given[0]}` is given, but ALTER needs its own: rows come in pairs, and every expert has its own loss, "
            "clipping and optimizer group. Remove it; `AlterUnlearnConfig` chooses among losses and optimizers."
        )


def check_looked_at(args: Any, has_calibration: bool, has_reference: bool) -> None:
    """Raise a `ValueError` if the forget loss lacks the calibration rows that it needs, or asks no reference model."""
    if not has_calibration and "profiles" in args.loss.needs:
        raise ValueError(
            f"`forget_loss` is {args.forget_loss!r}, but there is no `calibration_dataset` to take profiles from. "
            "Give rows like the forget set that the model was never trained on, or use `forget_loss='level'`."
        )
    if has_reference and "token_targets" not in args.loss.needs:
        raise ValueError(
            f"`reference_model` is given, but `forget_loss={args.forget_loss!r}` asks none. Use "
            "`forget_loss='soft_targets'`, or leave it out."
        )


def check_model(model: Any) -> None:
    """Raise a `ValueError` unless this is a decoder-only causal language model, without or with an active adapter."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel) or base.config.is_encoder_decoder or not base.can_generate():
        raise ValueError(
            f"`model` is a {type(base).__name__}, but the trainer needs a decoder-only causal language model, such as "
            "`AutoModelForCausalLM` loads."
        )
    if isinstance(model, PeftModel) and not model.active_adapters:
        raise ValueError("`model` has no active adapter. Choose the one to train by `model.set_adapter`.")


def check_base(option: str, name: str, scored: ScoredModel, is_split: bool) -> None:
    """
    Raise a `ValueError` if there is no base model for a loss that needs one, or one under another head.

    Args:
        option, name: of the loss.
        is_split: whether no process has all weights.
    """
    if not isinstance(scored.model, PeftModel):  # a frozen copy
        if is_split:
            raise ValueError(
                f"`{option}` is {name!r}, but all weights are trained and ZeRO-3 has split them, so that there is no "
                "base model beside them. Use ZeRO-2 or DDP, another loss, or train an adapter (`peft_config`)."
            )
        return
    if isinstance(scored.head.module, AuxiliaryTrainingWrapper):
        raise ValueError(
            f"`modules_to_save` trains the LM head, but `{option}={name!r}` compares hidden states under one head. "
            f"Use another `{option}`, or leave the head alone."
        )
    with scored.as_base():
        pass  # raises for an adapter of no layers


class Subdomain(NamedTuple):
    """
    The rows of `train_dataset` that one forget expert learns from.

    rows: their indices, ascending.
    terms: the words that set them apart, such as `"jaime-vasquez"`, or `None` unless the sub-domain was discovered.
    """

    rows: list[int]
    terms: str | None


def assign_experts(
    config: AlterConfig, forget: Dataset, text_field: str, seed: int
) -> tuple[AlterConfig, list[int], dict[str, Subdomain]]:
    """
    The expert 1..N of every forget row, and the config with `domains` and `num_forget_experts` filled in.

    The sub-domains are the values of the column `domain` where there is one, and discovered in the texts otherwise.
    Discovered ones are called `domain_1`, `domain_2`, ...: names are saved and pushed with the adapter, and the words
    that set the texts apart would tell everyone what was to be forgotten. Those words are in what is returned third,
    the rows of each sub-domain by its name, and are logged; they are saved nowhere.

    Where `domains` names several sub-domains already, nothing is discovered: which rows are meant by which name, the
    user's own or an earlier `domain_1`, could only be guessed.

    Raises:
        ValueError: a `domain` that isn't among `domains`, more sub-domains than `num_forget_experts`, or several
            `domains` and no column `domain`.
    """
    terms: list[str] = []
    if "domain" in forget.column_names:
        names, labels = _named_subdomains(config, forget)
    elif config.domains is None:
        labels, terms = _discovered_subdomains(config.num_forget_experts, forget, text_field, seed)
        names = [f"domain_{d}" for d in range(1, 1 + len(terms))]
        logger.info(f"Sub-domains of `train_dataset`: {dict(zip(names, terms, strict=True))}.")
        if config.num_forget_experts is None:
            bound = f", the most that are looked for ({MOST_DOMAINS})" if len(names) > MOST_DOMAINS - NEAR else ""
            sorted_ = f"{counted(len(forget), 'row')} {'was' if len(forget) == 1 else 'were'} sorted"
            logger.warning(
                f"`train_dataset` has no column `domain`: its {sorted_} into "
                f"{counted(len(names), 'sub-domain')}{bound}, each with a forget expert of its own. If they are more, "
                "several share an expert: add the column, or set `num_forget_experts`."
            )
    elif len(config.domains) == 1:
        names, labels = config.domains, [0] * len(forget)
    else:
        raise ValueError(
            f"`domains` is {config.domains}, but `train_dataset` has no column `domain` that says which rows are "
            "which. Add it, with one of these names for each row; if an earlier training discovered them, its "
            "`trainer.subdomains` lists the rows of each. For other rows, start from a fresh adapter, with `domains` "
            "unset to have sub-domains discovered."
        )
    if config.num_forget_experts is not None and len(names) > config.num_forget_experts:
        raise ValueError(
            f"`train_dataset` has {counted(len(names), 'sub-domain')} ({', '.join(names)}), but the adapter has "
            f"`num_forget_experts`={config.num_forget_experts}. Make it with `domains={names!r}`, and without "
            "`num_forget_experts`."
        )
    subdomains = {
        name: Subdomain([row for row, label in enumerate(labels) if label == d], terms[d] if terms else None)
        for d, name in enumerate(names)
    }
    # experts beyond the sub-domains of this data stay as they are, and unnamed
    spare = [f"unused-{d}" for d in range(len(names), config.num_forget_experts or 0)]
    domains = [*names, *spare]
    assigned = replace(config, domains=domains, num_forget_experts=len(domains))
    return assigned, [1 + label for label in labels], subdomains


def _named_subdomains(config: AlterConfig, forget: Dataset) -> tuple[list[str], list[int]]:
    """The sub-domains that the column `domain` names, and that of each row, from 0."""
    column = list(forget["domain"])
    if None in column:
        raise ValueError(
            f"`train_dataset` has no `domain` in row {column.index(None)} (None). Name every row's "
            "sub-domain, or remove the column to have them discovered."
        )
    values = [str(value) for value in column]
    names = config.domains or list(dict.fromkeys(values))
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ValueError(
            f"`train_dataset` has rows of `domain` {unknown}, which are not among `domains`={config.domains}. Add "
            "them to `domains` or correct the column."
        )
    return names, [names.index(value) for value in values]


def _discovered_subdomains(
    wanted: int | None, forget: Dataset, text_field: str, seed: int
) -> tuple[list[int], list[str]]:
    """As `discover_subdomains`, of the rows' texts."""
    try:
        return discover_subdomains([row_text(row, text_field) for row in forget], wanted, seed)
    except ValueError as error:
        raise ValueError(
            f"`train_dataset` has no column `domain`, and its sub-domains (`num_forget_experts`={wanted}) cannot "
            f"be found: {error} Add the column, or leave `num_forget_experts` unset."
        ) from error


def check_unscaled(config: AlterConfig) -> None:
    """Raise a `ValueError` if an expert is scaled: it would be trained for another factor than it is used with."""
    if set(config.scales) != {1.0}:
        raise ValueError(
            f"`expert_scales` is {config.expert_scales}, but experts are trained at scale 1. Set those domains to 1 "
            "by `set_expert_scale`, train, and scale them again."
        )


def check_all_labelled(name: str, rows: Dataset) -> None:
    """Raise a `ValueError` if a row has no label."""
    # nothing predicts the first token
    empty = [i for i, labels in enumerate(rows["labels"]) if all(label == -100 for label in labels[1:])]
    if empty:
        first = rows[empty[0]].get("row", empty[0])  # of which this is a window
        raise ValueError(
            f"{counted(len(empty), 'row')} of `{name}` {'has' if len(empty) == 1 else 'have'} no labelled token, the "
            f"first is row {first}. Give every row a "
            "completion (or `labels` other than -100 after the first token)."
        )


def warn_of_weights(args: AlterUnlearnConfig, config: AlterConfig) -> None:
    """Warn of a rate that nothing ends, and of retained text that nothing holds."""
    if not args.loss.has_targets and args.learning_rate > MOST_WITHOUT_TARGETS:
        logger.warning(
            f"`forget_loss={args.forget_loss!r}` has no targets at which the training would end: it goes on for "
            f"`num_train_epochs={args.num_train_epochs:g}` at `learning_rate={args.learning_rate:g}`, and what is "
            "retained may suffer. Give `learning_rate=1e-3` and 3 to 5 epochs, as the paper has it."
        )
    if args.retain_weight == 0 and not (config.is_gated and config.routing.retain_competes):
        logger.warning(
            f"`retain_weight` is 0, but `router={config.router!r}` lets retained text into the forget experts, "
            "and nothing holds it. Set `retain_weight=1`."
        )
