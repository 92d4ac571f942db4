# SPDX-License-Identifier: Apache-2.0
"""A reference model: one that does not know the rows to forget, and says which of their tokens that shows in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import logging
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from alter_peft.scoring import Row, ScoredModel

from .knowledge import MARGIN
from .rivals import score_with_rivals
from .token_targets import Guide


FIX = "Give the model as it was before it was taught the rows, or a smaller one of the same family."


# of `model_init_kwargs`, which are the model's: a revision or a quantisation of it is none of another repository
SHARED = ("dtype", "torch_dtype", "trust_remote_code", "attn_implementation")
logger = logging.get_logger(__name__)


def _shared(options: Any) -> dict[str, Any]:
    return {name: value for name, value in (options or {}).items() if name in SHARED}


def check_reference(reference: Any, model: Any, tokenizer: PreTrainedTokenizerBase, options: Any = None) -> None:
    """
    Raise a `ValueError` unless this is a causal language model, or the name of one, of the same tokenizer.

    Nothing of its weights is loaded.

    Args:
        reference: `reference_model`.
        model: what is trained.
        options: `model_init_kwargs`.
    """
    remote = {name: value for name, value in _shared(options).items() if name == "trust_remote_code"}
    if isinstance(reference, PreTrainedModel):
        if reference is (model.get_base_model() if isinstance(model, PeftModel) else model):
            raise ValueError(f"`reference_model` is `model` itself, which knows the rows. {FIX}")
        config = reference.config
    elif isinstance(reference, str):
        try:
            config = AutoConfig.from_pretrained(reference, **remote)
            own = AutoTokenizer.from_pretrained(reference, **remote).get_vocab()
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"`reference_model` is {reference!r}, which could not be loaded ({error}). Give a folder or a Hub id."
            ) from error
        known = tokenizer.get_vocab()
        other = sum(own.get(token) != number for token, number in known.items())
        if other:
            raise ValueError(
                f"`reference_model` is {reference!r}, whose tokenizer has {other} of the {len(known)} tokens of the "
                f"model's not or by another number, so that the two can't be compared token by token. {FIX}"
            )
    else:
        raise ValueError(
            f"`reference_model` is a {type(reference).__name__}, but must be a model of transformers, a folder or a "
            f"Hub id. {FIX}"
        )
    size = config.get_text_config().vocab_size
    if size < len(tokenizer):
        raise ValueError(
            f"`reference_model` has a vocabulary of {size} tokens, but the model's tokenizer has {len(tokenizer)}. "
            f"{FIX}"
        )


@contextmanager
def _whole_weights() -> Iterator[None]:
    """Inside, a model that is loaded has all its weights here, also under ZeRO-3, which would split them."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    from transformers.integrations import deepspeed

    kept: Any = deepspeed._hf_deepspeed_config_weak_ref
    config: HfDeepSpeedConfig = kept()
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def guided_by(
    reference: PreTrainedModel | str,
    forget: list[Row],
    unseen: list[Row],
    batch_size: int,
    device: torch.device,
    options: Any,
    vocab_size: int | None,
) -> Guide:
    """
    How likely the rows' labels and their rivals are to the reference.

    A model that is loaded for it is gone afterwards; one that is given is left where it was, and in its own mode.

    Args:
        unseen: rows, which may be none.
        options: `model_init_kwargs`, of which it is loaded with those that are not of one repository; in float32 by
            default.
        vocab_size: of the model that is trained, if rivals are looked for.
    """
    if isinstance(reference, str):
        with _whole_weights():
            reference = AutoModelForCausalLM.from_pretrained(reference, **{"dtype": torch.float32, **_shared(options)})
    before: Any = reference.device
    moved: Any = reference
    scored = ScoredModel(moved.to(device))
    try:
        scored.check()
        found = score_with_rivals(scored, forget, batch_size, vocab_size)
        of_unseen = scored.label_scores(unseen, batch_size, by_length=False)
    finally:
        moved.to(before)
    return Guide(found.scores, of_unseen, is_reference=True, rivals=found.rivals)


def warn_if_known(guide: Guide, known: Sequence[Tensor]) -> None:
    """
    Warn if the reference knows the rows to forget about as well as the model does: then no token would give way.

    Args:
        guide: by the reference.
        known: ln p of each forget row's labels by the model, (n_i,).
    """
    theirs, own = (float(torch.cat([*rows]).mean()) for rows in ([row.log_prob for row in guide.forget], known))
    if theirs > own - MARGIN:
        logger.warning(
            "`reference_model` knows the rows to forget about as well as the model: their tokens' mean "
            f"log-probability is {theirs:.2f} under it and {own:.2f} under the model, so that next to nothing would "
            f"be forgotten. {FIX}"
        )
