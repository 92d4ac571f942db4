# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from accelerate import init_empty_weights
from peft import LoraModel, PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from alter_peft.registration import PREFIX

from .config import AlterConfig
from .decoder import Decoder, LanguageModelHead, find_decoder
from .experts import ExpertControl
from .gating import GatingContexts
from .hooks import DecoderHook, RouterHook
from .layer import NO_FIXED_WEIGHT, AlterLayer, AlterLinear, contexts_of
from .mixed_batch import RowAdapters, adapters_of_wrappers, check_adapter_names, copies_of_a_row
from .saving import NO_CHECKSUM
from .targets import (
    check_name,
    check_targets,
    flattened_layers,
    refuse_shared_weights,
    refuse_split_weights,
    refuse_unfelt,
    refuse_ungateable,
    refuse_unsupported,
    resolve_layers,
    suit_targets,
)
from .token_router import AlterRouter, AlterTunerLayer


class AlterModel(ExpertControl, BaseTuner):
    """
    Creates an ALTER model (https://huggingface.co/papers/2603.01792) from a pretrained model.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`AlterConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.

    Returns:
        `torch.nn.Module`: The ALTER model.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from alter_peft import AlterConfig

        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> model = get_peft_model(model, AlterConfig(domains=["person", "recipe"]))
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`AlterConfig`]): The configuration of the adapter.
    """

    peft_config: Any  # dict[str, AlterConfig]; the parent declares dict[str, PeftConfig]

    prefix: str = PREFIX
    tuner_layer_cls = AlterTunerLayer
    _add_modules_to_save_to_tie: Any = LoraModel._add_modules_to_save_to_tie
    # language models have "all-linear": query and value alone are too little to forget by (docs/paper.md)
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self,
        model: Any,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As the parent's; a gated adapter gets its router too.

        Raises:
            ValueError: the model, the layers or the adapter's name don't suit this adapter.
        """
        check_name(adapter_name)
        config: AlterConfig = self.peft_config[adapter_name]
        if config.weights_sha256 == NO_CHECKSUM:  # transformers reads a config by itself
            raise ValueError(
                f"The adapter cannot be loaded: `weights_sha256` is {NO_CHECKSUM!r}. Load it by PEFT once."
            )
        refuse_split_weights(model)
        # what is filled in or changed later is of this adapter alone: the caller's config serves for others too
        config = copy.deepcopy(config)
        self.peft_config[adapter_name] = config
        if config.num_forget_experts is None:
            config.num_forget_experts = 1
        self.contexts = contexts_of(model) or GatingContexts()
        self._decoder: Decoder | None = None
        if config.is_gated:
            self._decoder = find_decoder(model)
            refuse_ungateable(model, self._decoder)
            resolve_layers(config, self._decoder)
            config.check_threshold(LanguageModelHead(model).vocab_size)
        if state_dict is not None:
            if self._decoder is not None:
                check_targets(state_dict, config, self._decoder)
            # PEFT adapts what has a key; the router is made beside
            state_dict = {key: value for key, value in state_dict.items() if ".alter_router." not in key}
        suit_targets(model, config, self._decoder, self._check_target_module_exists)
        self._flattened = flattened_layers(model)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        if self._decoder is not None:
            self._add_router(model, adapter_name, config, low_cpu_mem_usage)

    def _add_router(self, model: Any, adapter_name: str, config: AlterConfig, low_cpu_mem_usage: bool) -> None:
        assert self._decoder is not None and config.router_layer is not None
        layer: Any = self._decoder.layers[config.router_layer]
        if not any(isinstance(hook, DecoderHook) for hook in self._decoder.module._forward_pre_hooks.values()):
            text = model.config.get_text_config()
            hook = DecoderHook(self.contexts, LanguageModelHead(model), self._decoder, text)
            self._decoder.module.register_forward_pre_hook(hook, with_kwargs=True)
        if not any(isinstance(hook, RouterHook) for hook in layer._forward_pre_hooks.values()):
            layer.token_router = AlterRouter(layer)
            layer.register_forward_pre_hook(RouterHook(self.contexts), with_kwargs=True)
            self.contexts.routers.append(layer.token_router)
        width = model.config.get_text_config().hidden_size
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            layer.token_router.update_layer(adapter_name, width, config)
        layer.token_router.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _check_target_module_exists(self, peft_config: AlterConfig, key: str) -> Any:  # type: ignore[override]
        targets = peft_config.target_modules
        if isinstance(targets, set) and key in targets and peft_config.layers_to_transform is not None:
            # PEFT adapts what is listed by its full name, as "all-linear" lists a small model, in whatever layer it is
            peft_config = copy.copy(peft_config)
            peft_config.target_modules = {key.rpartition(".")[2]}
        matched = super()._check_target_module_exists(peft_config, key)
        if not matched or self._decoder is None:
            return matched
        layers = peft_config.layers_to_transform
        assert isinstance(layers, list)
        if key.startswith(tuple(f"{self._decoder.path}.{index}." for index in layers)):
            return matched
        if self.model.get_submodule(key) is self.model.get_output_embeddings():
            raise ValueError(
                f"`target_modules` contains the LM head ({key!r}), which a gated router cannot adapt. Remove it, or "
                "use `AlterConfig(router='static')`."
            )
        return False

    def _create_and_replace(  # type: ignore[override]
        self,
        config: AlterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        rank_key = get_pattern_key(list(config.rank_pattern), current_key)
        alpha_key = get_pattern_key(list(config.alpha_pattern), current_key)
        sizes: dict[str, Any] = {
            "r": config.rank_pattern.get(rank_key, config.r),
            "lora_alpha": config.alpha_pattern.get(alpha_key, config.lora_alpha),
        }
        if isinstance(target, AlterLayer):
            target.update_layer(adapter_name, config=config, **sizes)
            return
        refuse_unfelt(parent, target_name, current_key)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        quantization = get_quantization_kwargs(self.model)
        refuse_unsupported(base, current_key, quantization)
        new_module = AlterLinear(target, adapter_name, self.contexts, config, **sizes, **quantization)
        new_module.flattens = current_key in self._flattened
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)  # adding an adapter must not make it trainable
        self._replace_module(parent, target_name, new_module, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        check_adapter_names(self, names)
        mixed = RowAdapters(tuple(names), copies_of_a_row(self.model, kwargs))
        with adapters_of_wrappers(self.model, mixed), self.context.mixing(mixed):
            yield

    def delete_adapter(self, adapter_name: str) -> None:
        """
        Delete an adapter, its router included. If it was active, the other active ones stay so, or else the first of
        the others (by name) becomes active.

        Args:
            adapter_name: the adapter to delete.

        Raises:
            ValueError: there is no such adapter, or it is merged.
        """
        left = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        # the parent asks the first layer which adapters are left, and that layer need not have had any other
        names = left or sorted(self.peft_config)[:1]
        if names and self.active_adapters != names:
            self.set_adapter(names)

    def _add_targets_to_tie(self, peft_config: AlterConfig, tied_weight_keys: list[str]) -> None:
        raise ValueError(
            f"`ensure_weight_tying` is set and `target_modules` is {peft_config.target_modules!r}, but embeddings are "
            f"no `target_modules` of ALTER and {tied_weight_keys} are tied to them. Use `modules_to_save` or "
            "`trainable_token_indices`."
        )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not supported; raises a `NotImplementedError`."""
        raise NotImplementedError(
            "ALTER has no `add_weighted_adapter`: adapters have different matrices A and routers, so no weighted sum "
            "of their parameters is an adapter. To use several together, activate them: "
            "`model.base_model.set_adapter([...])`."
        )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As the parent's, after all names are checked: none is merged if one of them cannot be."""
        self._refuse_unmergeable(adapter_names or self.active_adapters)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' continuous batching, which packs requests into one row: static router alone."""
        self._refuse_packing()
        return self.model.generate_batch(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As `generate_batch`."""
        self._refuse_packing()
        return self.model.init_continuous_batching(*args, **kwargs)

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """As `generate_batch`."""
        self._refuse_packing()
        return self.model.continuous_batching_context_manager(*args, **kwargs)

    def _refuse_packing(self) -> None:
        for _, name in self.context.active():
            raise ValueError(
                f"Adapter {name!r} gates each token by its own row's prefix (`router`="
                f"{self.peft_config[name].router!r}), but continuous batching packs many requests into one row. Use "
                "`generate`, or `AlterConfig(router='static')`."
            )

    def _refuse_unmergeable(self, names: Collection[str]) -> None:
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name!r} does not exist, only {sorted(self.peft_config)}.")
            config: AlterConfig = self.peft_config[name]
            if config.is_gated:
                raise ValueError(
                    f"Adapter {name!r} gates every token by itself (`router`={config.router!r}), so {NO_FIXED_WEIGHT}"
                )
            if name in self.context.expert_scales:
                raise ValueError(
                    f"Adapter {name!r} cannot be merged under the temporary scales of `experts`. Leave the context, "
                    "or scale the expert by `set_expert_scale`."
                )
        refuse_shared_weights(self.model, set(names))

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:  # the parent declares None, but returns the model
        if merge:
            self._refuse_unmergeable(adapter_names or self.active_adapters)
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for module in model.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, (DecoderHook, RouterHook)):
                    del module._forward_pre_hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
        for router in self.contexts.routers:
            del router.get_base_layer().token_router
        self.contexts.routers.clear()
        return model

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = model.state_dict()
        for key, value in remapped.items():
            if key in own and own[key].shape != value.shape:
                raise ValueError(
                    f"The adapter does not fit this base model: {key} has shape {tuple(value.shape)} in the adapter "
                    f"and {tuple(own[key].shape)} in the model. Load it on the base that it was trained on "
                    f"(`base_model_name_or_path`={config.base_model_name_or_path!r}), with `r`, `rank_pattern` and "
                    "`target_modules` as they were saved."
                )
        return remapped
