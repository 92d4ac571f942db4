# SPDX-License-Identifier: Apache-2.0
"""What a gated router needs to know of a base model: its decoder, the decoder's layers and its LM head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


# Model types whose config has an `is_decoder` of False that nothing reads
CAUSAL_ANYWAY = {"gpt_neox", "gpt_neox_japanese"}


class Decoder(NamedTuple):
    """The decoder stack of a causal language model, `path` being the name of `layers` in it."""

    module: nn.Module
    layers: nn.ModuleList
    path: str


class LanguageModelHead:
    """Hidden states (..., k) -> logits (..., V), as the model's own forward does it, scale and soft cap included."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = (model,)  # in a tuple: a reference, not a child of what holds this
        config = model.config.get_text_config()
        values = config.to_dict()
        self.softcap: float | None = values.get("final_logit_softcapping")
        # Cohere; Falcon-H1; Granite divides by `logits_scaling`, while HyperCLOVAX multiplies by it
        scale = values.get("logit_scale") or values.get("lm_head_multiplier")
        if scale is None and values.get("logits_mup_width_multiplier"):  # Inkling
            scale = 1.0 / values["logits_mup_width_multiplier"]
        if scale is None and values.get("dim_model_base"):  # MiniCPM3
            scale = values["dim_model_base"] / values["hidden_size"]
        if scale is None and values.get("logits_scaling"):
            scaling = values["logits_scaling"]
            scale = scaling if config.model_type == "hyperclovax" else 1.0 / scaling
        self.scale: float = 1.0 if scale is None else scale

        # part of a vision-language model, which makes the masks of its text decoder itself
        self.is_composite = config is not model.config

    @property
    def module(self) -> nn.Module:
        """The LM head itself, as it is now: PEFT may have wrapped it."""
        head: nn.Module = self._model[0].get_output_embeddings()
        return head

    @property
    def vocab_size(self) -> int:
        """V; asked of the config, since ZeRO-3 empties the weight."""
        size: int = self._model[0].config.get_text_config().vocab_size
        return size

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.module(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def check_head(model: PreTrainedModel, decoder: nn.Module, head: LanguageModelHead) -> None:
    """Raise a `ValueError` if `head` does not give the logits of the model's own on four tokens, or these are NaN."""
    ids = torch.arange(1, 5, device=next(model.parameters()).device).unsqueeze(0)
    own: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    if own.isnan().any():
        raise ValueError(
            f"`model` is a {type(model).__name__} that gives log-probabilities that are NaN: its weights or "
            "activations overflow. Train it with a lower learning rate, or load it in float32."
        )
    found = head(decoder(input_ids=ids, use_cache=False)[0]).float()
    if not torch.allclose(found, own, rtol=0.02, atol=0.02 * float(own[own.isfinite()].abs().max())):
        raise ValueError(
            f"`model` is a {type(model).__name__}, whose forward does to the logits what alter-peft does not know (a "
            "scale or a cap), so that losses, entropies and probabilities would be wrong. Please report this model "
            "type."
        )


def find_decoder(
    model: nn.Module,
    user: str = "A gated `router`",
    fix: str = "Use `AlterConfig(router='static')`, which works on any model with linear layers.",
) -> Decoder:
    """
    The decoder of a causal language model.

    Args:
        user, fix: what needs it, and what can be done without, for messages.

    Raises:
        ValueError: the model isn't a transformers decoder with an LM head; the static router works on any model.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{user} needs a transformers causal LM, but got a {type(model).__name__}. {fix}")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{user} needs a decoder-only model, but {type(model).__name__} has an encoder. {fix}")
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{user} needs a model with an LM head, but {type(model).__name__} has no output embeddings. " + fix
        )
    if not model.can_generate():
        raise ValueError(
            f"{user} needs a causal language model, but {type(model).__name__} does not generate: its "
            f"tokens see later ones, and gates may not. {fix}"
        )
    _refuse_both_directions(model, user, fix)
    depth = model.config.get_text_config().num_hidden_layers
    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    for root in (model.get_decoder(), model):  # some models have no such method of their own, or take it for the head
        for module in root.modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                path = names[id(module)]
                has_head = any(part is head for part in root.modules())
                return Decoder(model.get_submodule(path.rpartition(".")[0]) if has_head else root, module, path)
    raise ValueError(f"{user} needs decoder layers, but {type(model).__name__} has no list of {depth} modules. {fix}")


def _refuse_both_directions(model: PreTrainedModel, user: str, fix: str) -> None:
    """Raise a `ValueError` for a model of BERT's kind that is not set up as a decoder."""
    config = model.config.get_text_config()
    values = config.to_dict()
    if (values.get("is_decoder") is False and config.model_type not in CAUSAL_ANYWAY) or values.get("causal") is False:
        switch = "is_decoder" if "is_decoder" in values else "causal"
        raise ValueError(
            f"{user} needs a causal language model, but this {type(model).__name__} reads in both directions, and "
            f"gates may not depend on later tokens. Load it with `{switch}=True`, if it was trained so. {fix}"
        )


def last_hidden_states(model: nn.Module, decoder: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The decoder's last hidden states (B, T, k), before the head, from a pass of the whole model.

    A wrapper (DDP, FSDP) wants to see that pass; of the head's logits only the last position's are made.
    """
    tapped: list[Tensor] = []
    with (
        decoder.register_forward_pre_hook(
            lambda module, args, kwargs: (args, with_all_tokens(kwargs)), with_kwargs=True
        ),
        decoder.register_forward_hook(lambda module, args, output: tapped.append(output[0])),
    ):
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
    return tapped[0]


def with_all_tokens(kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    What a decoder is called with, so that every layer of it sees every token.

    Gemma 4, of whose layers the last ones share the keys of earlier ones, drops there what no logits are made of.
    """
    return {**kwargs, "logits_to_keep": 0} if kwargs.get("logits_to_keep") else kwargs
