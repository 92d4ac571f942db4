# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from alter_peft.entropy import max_tsallis_entropy
from alter_peft.options import arguments_doc, option
from alter_peft.registration import ALTER
from alter_peft.version import __version__

from .files import (
    FORMAT_VERSION,
    check_complete,
    check_format_version,
    check_weights,
    explain_loading,
    refuse_pickle_on_load,
)
from .ranges import check_ranges
from .router import ROUTERS, Router, router_of
from .saving import BEING_WRITTEN, finish_saves_of, refuse_pickle_on_save, sha256
from .values import described, fits, is_finite_number, require


# Chosen on invented people, TOFU authors and WikiText that no result has (docs/log.md)
HALF_LIFE, HIDDEN_SIZE, ROUTER_LAYER = 16.0, 64, 1
ADAPTED_FROM = 0.4  # of the depth (design)
OLD_HALF_LIFE = 8.0  # up to format version 2


@cache
def _types() -> dict[str, Any]:
    """The type of each field that comes from a file."""
    hints = get_type_hints(AlterConfig)
    return {one.name: hints[one.name] for one in fields(AlterConfig) if one.name != "peft_type"}


@arguments_doc
@dataclass
class AlterConfig(PeftConfig):
    """
    Configuration of an [`AlterModel`]: the structure of an ALTER adapter, saved with it.

    What concerns optimisation is in [`AlterUnlearnConfig`]; no field is in both. The method is described in
    https://huggingface.co/papers/2603.01792; `docs/paper.md` says where and why this implementation departs from it.

    Raises:
        `ValueError`: a value out of its range; the message names the field, the value and the fix.
    """

    r: int = option(8, "Rank of the shared matrix A (r x k) and of every expert B (d x r).")
    lora_alpha: float = option(
        16, "Scale of the update: `s = lora_alpha / r` (Eq. 2), or `lora_alpha / sqrt(r)` with `use_rslora`."
    )
    lora_dropout: float = option(0.0, "Dropout probability on the input of A, in training.")
    use_rslora: bool = option(
        False, "Scale by `lora_alpha / sqrt(r)` instead: rank-stabilised, https://huggingface.co/papers/2312.03732."
    )
    target_modules: list[str] | str | None = option(
        None,
        'Names of the linear layers to adapt, a regular expression, or `"all-linear"`. By default all those of '
        "a language model but those that cannot be adapted, which the log names, and LoRA's defaults of other models. "
        "A gated router adapts those in `layers_to_transform` and leaves the others alone.",
    )
    exclude_modules: list[str] | str | None = option(
        None, "Names (or a regular expression) of modules that are not adapted."
    )
    layers_to_transform: list[int] | int | None = option(
        None,
        "Indices of the layers to adapt. With a gated router all from "
        f"`round({ADAPTED_FROM:g} * number of layers)` up by default, and never one below `router_layer`.",
    )
    layers_pattern: list[str] | str | None = option(
        None, "Name of the list of layers, if it isn't found by itself; used with `layers_to_transform`."
    )
    rank_pattern: dict[str, int] = option({}, "Other ranks for some layers: name or regular expression -> rank.")
    alpha_pattern: dict[str, float] = option(
        {}, "Other `lora_alpha` for some layers: name or regular expression -> alpha."
    )
    modules_to_save: list[str] | None = option(None, "Modules that are trained and saved whole beside the adapter.")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = option(
        None,
        "Tokens whose embeddings are trained and saved beside the adapter: indices into the input embedding, or name "
        "of an embedding layer -> indices.",
    )
    ensure_weight_tying: bool = option(
        False,
        "Whether `modules_to_save` and `trainable_token_indices` keep tied embeddings tied. Embeddings themselves "
        "are no `target_modules` of ALTER.",
    )
    bias: Literal["none", "all", "alter_only"] = option(
        "none", 'Biases that are trained: `"none"`, `"all"` or `"alter_only"`.'
    )
    fan_in_fan_out: bool = option(
        False, "Whether the target stores its weight as (in, out); set by itself for transformers' `Conv1D`."
    )
    num_forget_experts: int | None = option(
        None,
        "N, the number of forget experts B_f^1..B_f^N, one for each sub-domain. Defaults to the number of `domains`; "
        "without them the trainer takes the number of sub-domains that it finds, and a plain `get_peft_model` 1.",
    )
    entropy_q: float = option(1.5, "Order q > 0 of the Tsallis entropy S_q (Eq. 5); 1 is Shannon (Eq. 3), in nats.")
    entropy_threshold: float | None = option(
        None,
        "Tokens with S_q above it are high-entropy tokens; 1.2 by default. Must be below the maximum of S_q for the "
        "vocabulary, `(1 - V^(1-q)) / (q - 1)`.",
    )
    entropy_quantile: float | None = option(
        None,
        "Instead of a fixed threshold: the share of answer tokens that count as low-entropy. The trainer measures "
        "the threshold on its data, in phase I, and stores it in `entropy_threshold`.",
    )
    temperature_high: float = option(0.8, "Router temperature for high-entropy tokens (Eq. 7).")
    temperature_low: float = option(0.01, "Router temperature for the other tokens: nearly the single best expert.")
    top_k: int = option(
        3, "Forget experts that a high-entropy token keeps, beside the retain expert; the gates are renormalised."
    )
    router: str = option("context", "; ".join(f'"{name}" {router.caption}' for name, router in ROUTERS.items()) + ".")
    router_layer: int | None = option(
        None,
        f"The decoder layer whose input the router reads: {ROUTER_LAYER} by default, or the first adapted one if that "
        "is lower. Low layers say which words were said, and so whom a text is about, deep ones what kind of text it "
        "is (measured on SmolLM2-135M). No layer below it can be adapted.",
    )
    router_half_life: float | None = option(
        None,
        f"Half-life of the router's moving average, in tokens; {HALF_LIFE:g} by default, {OLD_HALF_LIFE:g} in an "
        "adapter of an older format.",
    )
    router_hidden_size: int | None = option(
        None,
        f"Units of the router's hidden layer, 0 for a linear router; {HIDDEN_SIZE} by default with the context "
        "router, 0 with others and in an adapter of an older format. A linear one hardly tells whom a question is "
        "about.",
    )
    inference_entropy: Literal["none", "base"] | None = option(
        None,
        'Where S_q comes from outside training. `"none"` (default with the context router): nowhere, every token is '
        'gated at `temperature_low` by its context alone, at no cost. `"base"` (reference mode; default, and the '
        'only choice, with `router="entropy"`): from a second pass of the base model with a cache of its own.',
    )
    expert_weights: list[float] | None = option(
        None, "omega_1..omega_N of the static router (Eq. 6); all 1 by default."
    )
    domains: list[str] | None = option(None, "Names of the sub-domains, in the order of the forget experts.")
    expert_scales: dict[str, float] | None = option(
        None,
        "What the forget experts of some domains are multiplied by after the gates: 0 switches one off, the others "
        "count 1 (the default). Set it on a model by `set_expert_scale`.",
    )
    init_weights: bool | Literal["cluster"] = option(
        True,
        "`True`: every B starts at zero, so that a fresh adapter is the base model bit for bit. `False`: random, for "
        'tests. `"cluster"`: as `True`, and the trainer starts each forget expert from the centre of its sub-domain.',
    )
    format_version: int = option(
        FORMAT_VERSION,
        "Version of the saved format, written and checked by itself. Every version up to the present one can be "
        "read; a file without it counts as version 1.",
    )
    alter_peft_version: str | None = option(
        None, "The alter-peft version that made the adapter, filled in by itself, as `peft_version` is."
    )
    weights_sha256: str | None = option(
        None,
        "The SHA-256 of the weights that were saved with it, filled in by itself in the file alone, and checked when "
        "an adapter is loaded. A file without it is of weights that are not checked.",
    )

    def __post_init__(self) -> None:
        if self.peft_version is not None and self.alter_peft_version is None and self.format_version == FORMAT_VERSION:
            self.format_version = 1  # a file from before these two were written, which says no version
        super().__post_init__()
        self.peft_type = ALTER
        if isinstance(self.base_model_name_or_path, Path):
            self.base_model_name_or_path = str(self.base_model_name_or_path)
        check_format_version(self.format_version, self.alter_peft_version)
        if self.alter_peft_version is None:
            self.alter_peft_version = __version__
        for name in ("target_modules", "exclude_modules"):
            names = getattr(self, name)
            if isinstance(names, list) and fits(names, list[str]):
                setattr(self, name, set(names))
        if self.ensure_weight_tying:
            self.modules_to_tie: set[str] | None = None  # as LoraConfig: where PEFT keeps what it finds to tie
        if self.entropy_threshold is None and self.entropy_quantile is None:
            self.entropy_threshold = 1.2
        known = isinstance(self.router, str) and self.router in ROUTERS
        require(known, "router", self.router, " or ".join(map(repr, ROUTERS)))
        is_old = self.format_version < 3
        if self.router_half_life is None:
            self.router_half_life = OLD_HALF_LIFE if is_old else HALF_LIFE
        if self.router_hidden_size is None:
            self.router_hidden_size = HIDDEN_SIZE if ROUTERS[self.router].reads_context and not is_old else 0
        if self.inference_entropy is None:
            self.inference_entropy = ROUTERS[self.router].entropy_sources[0]
        listed = self.expert_weights if self.domains is None else self.domains
        if self.num_forget_experts is None and listed is not None:
            self.num_forget_experts = len(listed)
        check_ranges(vars(self))
        self._check_experts()
        self._check_layers()
        self._check_types()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """
        As the parent's, in one step and with the SHA-256 of the weights that are there. Says in PEFT's card, where
        there is one, how the adapter is loaded; refuses a pickle.
        """
        folder = Path(save_directory)
        refuse_pickle_on_save(folder)
        weights = folder / SAFETENSORS_WEIGHTS_NAME
        self.weights_sha256 = sha256(weights) if weights.is_file() else None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=BEING_WRITTEN) as beside:
                super().save_pretrained(beside, **kwargs)
                os.replace(Path(beside) / CONFIG_NAME, folder / CONFIG_NAME)
        finally:
            self.weights_sha256 = None
        explain_loading(folder)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """As the parent's. Raises a `ValueError` if the weights beside the config are a pickle, or not its own."""
        source = pretrained_model_name_or_path
        finish_saves_of(source if subfolder is None else Path(source) / subfolder)
        config: PeftConfig = super().from_pretrained(source, subfolder=subfolder, **kwargs)
        if isinstance(config, AlterConfig):
            names = ("revision", "token", "cache_dir", "repo_type", "local_files_only")
            hub = {name: kwargs[name] for name in names if name in kwargs}
            refuse_pickle_on_load(source, subfolder, **hub)
            weights = check_weights(source, subfolder, config.weights_sha256, **hub)
            check_complete(weights, config.modules_to_save, config.trainable_token_indices)
            config.weights_sha256 = None  # of that file alone
        return config

    @property
    def is_gated(self) -> bool:
        """Whether the gates depend on the token (context and entropy routers)."""
        return ROUTERS[self.router].is_gated

    @property
    def routing(self) -> Router:
        """What `router` names, in an adapter of this format."""
        return router_of(self.router, self.format_version)

    @property
    def expert_names(self) -> list[str]:
        """The domain of every forget expert; `forget_0`, `forget_1`, ... where `domains` is unset."""
        return self.domains or [f"forget_{d}" for d in range(self.num_forget_experts or 1)]

    @property
    def scales(self) -> tuple[float, ...]:
        """What each expert is multiplied by after the gates, 1 for the retain expert first."""
        scales = self.expert_scales or {}
        return (1.0, *(scales.get(name, 1.0) for name in self.expert_names))

    def check_threshold(self, vocab_size: int) -> None:
        """Raise a `ValueError` if no token of a vocabulary of this size could be a high-entropy token."""
        highest = max_tsallis_entropy(vocab_size, self.entropy_q)
        if self.entropy_threshold is not None and self.entropy_threshold >= highest:
            raise ValueError(
                f"`entropy_threshold` is {self.entropy_threshold}, but S_q with `entropy_q`={self.entropy_q} cannot "
                f"exceed {highest:.4f} for a vocabulary of {vocab_size} tokens. Lower `entropy_threshold` or "
                "`entropy_q`, or set `entropy_quantile`."
            )

    def _check_types(self) -> None:
        for name, hint in _types().items():
            value = getattr(self, name)
            require(fits(value, hint), name, value, described(hint))
        for name in ("modules_to_save", "trainable_token_indices"):
            named = getattr(self, name)
            require(not isinstance(named, (list, dict)) or "" not in named, name, named, "without empty names")
            if isinstance(named, (list, dict)) and not named:
                setattr(self, name, None)

    def _check_experts(self) -> None:
        n, units = self.num_forget_experts, self.router_hidden_size
        linear = units == 0 or self.routing.reads_context
        require(linear, "router_hidden_size", units, f"0 when `router` is {self.router!r}")
        source, sources = self.inference_entropy, ROUTERS[self.router].entropy_sources
        fix = f"{' or '.join(map(repr, sources))} when `router` is {self.router!r}"
        require(source in sources, "inference_entropy", source, fix)
        if self.domains is not None:
            domains = self.domains
            texts = isinstance(domains, list) and all(isinstance(name, str) for name in domains)
            require(texts, "domains", domains, "a list of names")
            require(len(set(domains)) == len(domains), "domains", domains, "a list without duplicates")
            require(len(domains) == n, "domains", domains, f"a list of `num_forget_experts`={n} names")
        if self.expert_weights is not None:
            weights = self.expert_weights
            numbers = isinstance(weights, (list, tuple)) and all(map(is_finite_number, weights))
            require(numbers, "expert_weights", weights, "a list of finite numbers")
            require(not self.is_gated, "expert_weights", weights, "unset unless `router` is 'static'")
            require(len(weights) == n, "expert_weights", weights, f"a list of `num_forget_experts`={n} numbers")
        if self.expert_scales is not None:
            scales, names = self.expert_scales, self.expert_names
            known = isinstance(scales, dict) and set(scales) <= set(names)
            require(known, "expert_scales", scales, f"a dict of numbers by domain, out of {names}")
            for name, scale in scales.items():
                require(is_finite_number(scale), f"expert_scales[{name!r}]", scale, "a finite number: 1 on, 0 off")

    def _check_layers(self) -> None:
        pattern, layers = self.layers_pattern, self.layers_to_transform
        require(
            not pattern or layers is not None, "layers_pattern", pattern, "unset unless `layers_to_transform` is set"
        )
        is_regex = isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear"
        # a gated router keeps to its layers with a regex too, and fills them in
        allowed = not is_regex or layers is None or self.is_gated
        require(allowed, "layers_to_transform", layers, "unset if `target_modules` is a regex and `router` 'static'")
        layer = self.router_layer
        require(layer is None or self.is_gated, "router_layer", layer, "unset when `router` is 'static'")
