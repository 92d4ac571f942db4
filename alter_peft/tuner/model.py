# Copyright 2026 The alter-peft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import init_empty_weights
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alter_peft.registration import PREFIX

from .config import AlterConfig
from .decoder import Decoder, LanguageModelHead, find_decoder
from .gating import DecoderHook, GatingContext, RouterHook
from .layer import AlterLayer, AlterLinear
from .router import AlterRouter, AlterTunerLayer


class AlterModel(BaseTuner):
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
    # "all-linear" wherever LoRA has a default: query and value alone are too little to forget by (docs/paper.md)
    target_module_mapping: Any = dict.fromkeys(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "all-linear")

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: AlterConfig = self.peft_config[adapter_name]
        if config.num_forget_experts is None:
            config.num_forget_experts = 1
        self.context = _context_of(model)
        self.context.flattened = not _has_nested_lists(model)
        self._decoder: Decoder | None = None
        if config.is_gated:
            self._decoder = find_decoder(model)
            _resolve_layers(config, self._decoder)
            config.check_threshold(model.get_output_embeddings().weight.shape[0])
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self._decoder is not None:
            self._add_router(model, adapter_name, config, kwargs.get("low_cpu_mem_usage", False))

    def _add_router(self, model: Any, adapter_name: str, config: AlterConfig, low_cpu_mem_usage: bool) -> None:
        assert self._decoder is not None and config.router_layer is not None
        layer: Any = self._decoder.layers[config.router_layer]
        if not any(isinstance(hook, DecoderHook) for hook in self._decoder.module._forward_pre_hooks.values()):
            hook = DecoderHook(self.context, LanguageModelHead(model))
            self._decoder.module.register_forward_pre_hook(hook, with_kwargs=True)
            self.context.num_layers = len(self._decoder.layers)
        if not any(isinstance(hook, RouterHook) for hook in layer._forward_pre_hooks.values()):
            layer.token_router = AlterRouter(layer)
            layer.register_forward_pre_hook(RouterHook(self.context), with_kwargs=True)
            self.context.routers.append(layer.token_router)
        width = model.config.get_text_config().hidden_size
        if low_cpu_mem_usage:
            with init_empty_weights():
                layer.token_router.update_layer(adapter_name, width, config)
        else:
            layer.token_router.update_layer(adapter_name, width, config)
        layer.token_router.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _check_target_module_exists(self, peft_config: AlterConfig, key: str) -> Any:  # type: ignore[override]
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
        sizes = {
            "r": config.rank_pattern.get(rank_key, config.r),
            "lora_alpha": config.alpha_pattern.get(alpha_key, config.lora_alpha),
        }
        if isinstance(target, AlterLayer):
            target.update_layer(adapter_name, config=config, **sizes)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        quantization = get_quantization_kwargs(self.model)
        if not isinstance(base, (nn.Linear, Conv1D)) and not _is_quantized_linear(base, quantization):
            raise ValueError(
                f"Target module {current_key!r} is a {type(base).__name__}, which ALTER does not support. Restrict "
                "`target_modules` to `torch.nn.Linear` (optionally quantised) and "
                "`transformers.pytorch_utils.Conv1D`; for a quantised layer, install the package that made it."
            )
        new_module = AlterLinear(target, adapter_name, self.context, config, **sizes, **quantization)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)  # adding an adapter must not make it trainable
        self._replace_module(parent, target_name, new_module, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("`adapter_names` (a different adapter for each row) is not supported by ALTER.")
        yield

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As the parent's, after all names are checked: none is merged if one of them cannot be."""
        self._refuse_gated(adapter_names or self.active_adapters)
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

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        self._refuse_gated(self.active_adapters)

    def _refuse_gated(self, names: Iterable[str]) -> None:
        for name in names:
            config: AlterConfig = self.peft_config[name]
            if config.is_gated:
                raise ValueError(
                    f"Adapter {name!r} gates every token by itself (`router`={config.router!r}), so no merged "
                    "weight equals it. Keep it as an adapter, or train with `AlterConfig(router='static')`."
                )

    def _unload_and_optionally_merge(
        self, *args: Any, **kwargs: Any
    ) -> Any:  # the parent declares None, but returns the model
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        for module in model.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, (DecoderHook, RouterHook)):
                    del module._forward_pre_hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
        for router in self.context.routers:
            del router.get_base_layer().token_router
        self.context.routers.clear()
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
                    f"(`base_model_name_or_path`={config.base_model_name_or_path!r})."
                )
        return remapped


def _context_of(model: nn.Module) -> GatingContext:
    """The context that this model's ALTER layers share, new if it has none."""
    for module in model.modules():
        if isinstance(module, AlterLayer):
            return module.context
    return GatingContext()


def _is_quantized_linear(layer: nn.Module, kwargs: dict[str, Any]) -> bool:
    backend = resolve_quantization_backend(layer, **kwargs)
    return backend is not None and backend.layer_type == "linear"


def _has_nested_lists(model: nn.Module) -> bool:
    """Whether a list of layers holds lists of modules, as a mixture of experts does, each with some of the tokens."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return any(isinstance(child, nn.ModuleList) for outer in lists for child in outer.modules() if child is not outer)


def _resolve_layers(config: AlterConfig, decoder: Decoder) -> None:
    """Fill in `router_layer` and `layers_to_transform`, or raise a `ValueError` if they don't fit the model."""
    depth = len(decoder.layers)
    if config.router_layer is None:
        config.router_layer = round(0.4 * depth)
    first = config.router_layer
    if first >= depth:
        raise ValueError(f"`router_layer` is {first}, but the model has {depth} layers. Set it below {depth}.")
    layers = config.layers_to_transform
    if layers is None:
        config.layers_to_transform = list(range(first, depth))
        return
    layers = [layers] if isinstance(layers, int) else list(layers)
    wrong = [layer for layer in layers if not first <= layer < depth]
    if wrong:
        raise ValueError(
            f"`layers_to_transform` contains {wrong}, but a gated router adapts layers from `router_layer`={first} to "
            f"{depth - 1}. Remove them or lower `router_layer`."
        )
    config.layers_to_transform = layers
