# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import logging
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput

from alter_peft.data import PairDataset
from alter_peft.tuner.config import AlterConfig
from alter_peft.tuner.decoder_call import Tokens
from alter_peft.tuner.hooks import replay_in_checkpoints
from alter_peft.tuner.saving import one_save

from .active_adapters import check_active_together, load_own, own_folder
from .batch import TokenMasks, token_masks
from .card import trained_with, write_card
from .config import AlterUnlearnConfig, UnlearnConfig
from .counterfactuals import router_texts
from .distributed import copy_from_main_process, gathering_layers, zero3_gathered
from .initialization import start_from_clusters
from .inputs import Subdomain, assign_experts, check_unscaled, warn_of_weights
from .isolation import Isolation, clip_by_source, norms_by_kind, optimizer_groups
from .phase_one import PhaseOne
from .structural import StructuralTerm
from .targets import measure
from .unlearn import UnlearnTrainer


logger = logging.get_logger(__name__)


class AlterUnlearnTrainer(UnlearnTrainer):
    """
    Trainer for machine unlearning with ALTER (https://huggingface.co/papers/2603.01792).

    Its only changes from [`UnlearnTrainer`]: the adapter is ALTER's, whose structural term is the third of Eq. 8,
    gradients are isolated (Eq. 4: B_f^d learns from forget rows of its own sub-domain alone, B_r from retain rows
    alone, A from the structural term alone), and before the first step phase I looks at the data with the base model.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A model with an ALTER adapter, or a base model (or its name) that gets one by `peft_config`. Of several
            active adapters the first is trained; the others are frozen and act as they will when the model is asked,
            so that together they come to the level (`model.base_model.set_adapter(["later", "default"])`).
        args ([`AlterUnlearnConfig`], *optional*):
            Configuration of the training.
        train_dataset ([`~datasets.Dataset`]):
            The rows to forget: prompt-completion, conversational or text, with an optional column `domain` that names
            each row's sub-domain; without it, sub-domains are discovered and called `domain_1`, `domain_2`, ... An
            adapter that has several `domains` already needs the column.
        peft_config ([`AlterConfig`], *optional*):
            Structure of the adapter if `model` has none yet.
        retain_dataset, calibration_dataset, kwargs:
            As for [`UnlearnTrainer`].

    **Attributes**, beside those of [`UnlearnTrainer`]:
        - **subdomains** (`dict[str, Subdomain]`) -- For each name in `domains` that `train_dataset` has rows of, their
          indices (`rows`) and, of discovered sub-domains, the words that set them apart (`terms`), which are not
          saved.
        - **structural_weight** (`float`) -- `args.structural_weight`, or 0 where phase I leaves L_struct out.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from alter_peft import AlterUnlearnTrainer

    >>> trainer = AlterUnlearnTrainer(
    ...     "HuggingFaceTB/SmolLM2-135M-Instruct",
    ...     train_dataset=load_dataset("json", data_files="forget.jsonl", split="train"),
    ...     retain_dataset=load_dataset("json", data_files="retain.jsonl", split="train"),
    ... )
    >>> trainer.train()
    >>> trainer.save_model("adapter")
    ```

    Raises:
        `ValueError`: unusable data or options, before any training; the message names the field, the value, the fix.
    """

    args: AlterUnlearnConfig

    _tag_names = ["trl", "alter", "unlearning"]  # noqa: RUF012 (TRL declares it so)
    _name = "ALTER"
    config_class = AlterUnlearnConfig

    # ---- set-up -----------------------------------------------------------------------------------------------------

    def _assign_experts(
        self, model: Any, peft_config: Any, forget: Dataset, args: UnlearnConfig
    ) -> tuple[AlterConfig | None, list[int]]:
        """A forget expert for each sub-domain; the config with their names."""
        has_adapter = isinstance(model, PeftModel)
        config: Any = model.peft_config[model.active_adapters[0]] if has_adapter else peft_config or AlterConfig()
        if not isinstance(config, AlterConfig):
            raise ValueError(f"The adapter config is a {type(config).__name__}, but must be an AlterConfig.")
        check_unscaled(config)
        if has_adapter:
            check_active_together(model)
        self.subdomains: dict[str, Subdomain]
        assigned, experts, self.subdomains = assign_experts(config, forget, args.dataset_text_field, args.seed)
        self._domains = assigned.domains
        return None if has_adapter else assigned, experts

    def _set_up_model(self) -> None:
        super()._set_up_model()
        first, *beside = self.model.active_adapters
        if beside:
            logger.info(f"Adapter {first!r} is trained, while {beside} act beside it.")
        self.adapter_name: str = first
        self.alter_config: AlterConfig = self.model.peft_config[first]
        layers = self.scored.layers_of(self.adapter_name)
        if not any(expert.requires_grad for layer in layers for expert in layer.alter_B.parameters()):
            raise ValueError("`model` has a frozen adapter. Load it with `is_trainable=True`.")
        config = self.alter_config
        config.check_threshold(self.scored.head.vocab_size)
        warn_of_weights(self.args, config)
        self._structural = StructuralTerm(self.scored, self.adapter_name, self.args, self.accelerator)
        self._freeze_shared()
        self.add_callback(Isolation(self.accelerator, self.skipped_groups))

    @property
    def structural_weight(self) -> float:
        """`args.structural_weight`, or 0 where L_struct is left out."""
        return self._structural.weight

    def _set_up_data(self, forget: Dataset, retain: Dataset, calibration: Dataset | None) -> None:
        super()._set_up_data(forget, retain, calibration)
        everything = range(len(self._forget))  # phase I looks at all of them anyway
        self._measuring.rows = self._measuring.rows._replace(known=everything)
        self.alter_config.domains = self._domains
        reads = self.alter_config.routing.reads_context
        copies, field = self.args.counterfactual_copies if reads else 0, self.args.dataset_text_field
        texts = router_texts(
            forget, retain, self._subjects, copies, self._tokens, field, self.args.seed, self._is_rare
        )
        self._router_texts = texts.of_windows(self._forget)
        self._router_texts.say()

    def _is_rare(self, word: str) -> bool:
        """Whether a word has no token of its own, as a coined one has none and an everyday one of any field has."""
        ways = (word, f" {word}")  # some tokenizers put the space before it themselves
        return min(len(self._tokenizer(way, add_special_tokens=False)["input_ids"]) for way in ways) > 1

    @property
    def subject_lines(self) -> list[str]:
        """Whom or what the rows to forget are about, as a router was to learn it; empty without copies."""
        return self._router_texts.lines

    @property
    def shared_matrices(self) -> list[nn.Parameter]:
        """A of every adapted layer, as it is now: FSDP replaces parameters."""
        return self._structural.shared

    def _freeze_shared(self) -> None:
        """A learns from the structural term alone."""
        for weight in self.shared_matrices:
            weight.requires_grad_(self.structural_weight > 0)

    def _activate(self) -> None:
        """As at the start, after a checkpoint was loaded."""
        self._trained.activate(self.model)
        self._freeze_shared()

    def prepare(self) -> None:
        """
        Phase I: the base model's token entropies, and the router, both cached on disk; `train` calls it.

        Of several processes the main one alone looks at the data (and at its disk), while the others wait, at most
        `ddp_timeout` seconds; then all have the same. Where ZeRO-3 has split the weights, all look together.
        """
        if self._prepared:
            return
        self._trained.keep(self.model)
        phase = PhaseOne(self._measuring, self.alter_config, self.adapter_name)
        found, unseen, guide, as_given = phase.look(self._retain, self._router_texts, self._begins_as_base)
        forget, retain = phase.use(found, self._forget, self._retain)
        self._structural.begin(phase.high_tokens, float(found["threshold"]))
        self._freeze_shared()
        of_base = phase.forget_log_probabilities
        known, kept = as_given or (of_base, phase.retain_log_probabilities)
        needed = known if "reference" in self.args.loss.needs else of_base
        self.measured = measure(self.args.loss, needed, unseen, self.args.guessed_level, self.args.seed, guide)
        self.astray = phase.astray
        self._set_knowledge(known, kept, unseen)
        alternates = self._make(not self._begins_as_base)
        if alternates is not None:  # gated as the model is asked: an unknown entropy counts as one at the threshold
            threshold = self.alter_config.entropy_threshold
            alternates = [{**row, "entropy": [threshold] * len(row["input_ids"])} for row in alternates]
        self.train_dataset = PairDataset(forget, retain, alternates)
        if self.alter_config.init_weights == "cluster" and phase.looks:
            with gathering_layers(self.model):
                size = max(1, self.args.per_device_eval_batch_size)
                start_from_clusters(self.scored, self.adapter_name, forget, size)
        if self.accelerator.num_processes > 1:
            copy_from_main_process({name: w for name, w in self.model.named_parameters() if ".alter_" in name})
        self._prepared = True

    @property
    def _begins_as_base(self) -> bool:
        """Whether the model as it was given is its base: no other adapter acts, and no expert has learned."""
        banks = [layer.alter_B[self.adapter_name] for layer in self.scored.layers_of(self.adapter_name)]
        experts = [expert for bank in banks for expert in bank.experts()]
        with zero3_gathered(experts):
            return len(self._trained.adapters) == 1 and not any(expert.any() for expert in experts)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the parent's; afterwards, backward included, no expert has an owner any more."""
        try:
            loss: Tensor = super().training_step(*args, **kwargs)
            return loss
        finally:
            self.gating.begin(Tokens())

    def _train_from(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> TrainOutput:
        check_unscaled(self.alter_config)
        self.prepare()
        if self.is_deepspeed_enabled:
            for router in self.gating.routers:
                router.hold_as_buffers()
        return super()._train_from(checkpoint, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or `args.optim`) on the groups `shared` (A, at eta_A), `experts` (at eta_B) and, if any, `other`."""
        if self.optimizer is None:
            optimized: Any = model or self.model
            groups = optimizer_groups(optimized, self.args, each_expert=self.is_deepspeed_enabled)
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, optimized)
            self.optimizer = cls(groups, **kwargs)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    # ---- one step ---------------------------------------------------------------------------------------------------

    @property
    def gating(self) -> Any:
        """The state of the gates in this thread."""
        return self.scored.gating

    @property
    def num_experts(self) -> int:
        """1 + N."""
        return 1 + (self.alter_config.num_forget_experts or 1)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term of Eq. 8."""
        return {**super().weights, "structural": self.structural_weight}

    def _masks(self, batch: dict[str, Tensor]) -> TokenMasks:
        return token_masks(batch, self.alter_config.entropy_threshold)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """As the parent's; of the rows of the step, the one that L_struct looks at is drawn."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._structural.draw(batches, self._masks, self.state.global_step)
        return batches, count

    def _terms(
        self, model: nn.Module, inputs: dict[str, Any], masks: TokenMasks, count: dict[str, float]
    ) -> dict[str, Tensor]:
        """The three terms of Eq. 8."""
        structural = self._structural(inputs, masks.high, self.state.global_step)
        return {**super()._terms(model, inputs, masks, count), "structural": structural}

    def hidden_states(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The decoder's last hidden states (B, T, k) under the gates, each expert learning from its own rows."""
        owner = nn.functional.one_hot(inputs["expert"], self.num_experts)
        assert self.scored.contexts is not None
        replay_in_checkpoints(self.scored.decoder, self.scored.contexts)  # a static router has no hook that would
        with self.gating.supply(self.adapter_name, inputs["entropy"], owner, learns_shared=False):
            return super().hidden_states(model, inputs)

    def _gates(self) -> Tensor | None:
        gating = self.gating
        return gating.competing(self.adapter_name) if self.adapter_name in gating.state.gates else None

    def skipped_groups(self) -> set[str]:
        """The names of the experts that no row of the present step teaches, and `shared` where A does not move."""
        names = ["retain", *(f"forget_{d}" for d in range(len(self.experts_with_rows) - 1))]
        skipped = {name for name, has_rows in zip(names, self.experts_with_rows, strict=True) if not has_rows}
        return skipped if self._structural.drawn is not None else skipped | {"shared"}

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip every expert by itself: one norm over all would couple them."""
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        norms = clip_by_source(model, self.args.max_grad_norm)
        for kind, norm in norms_by_kind(norms).items():
            self._metrics["train"][f"grad_norm/{kind}"].append(norm)
        return torch.stack(list(norms.values())).norm()

    # ---- logs and files ---------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.lr_scheduler is not None:
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                logs[f"learning_rate/{group['name']}"] = float(rate)
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As the parent's, but of several adapters the trained one alone, which the others stay active beside."""
        if len(self.model.peft_config) > 1 and not self.is_fsdp_enabled:
            load_own(self.model, resume_from_checkpoint, self.adapter_name)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._activate()

    def _load_best_model(self) -> None:
        """As the parent's, with the same exception."""
        if len(self.model.peft_config) > 1 and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_own(self.model, str(self.state.best_model_checkpoint), self.adapter_name)
        else:
            super()._load_best_model()
        self._activate()

    def _describe(self, folder: Path, place: Path) -> None:
        self._write_card(own_folder(folder, self.adapter_name), own_folder(place, self.adapter_name))

    def create_model_card(  # type: ignore[override]  # TRL's signature, not that of transformers
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """The adapter's card; it carries the import line without which PEFT does not know the adapter."""
        if self.is_world_process_zero():
            folder = own_folder(str(self.args.output_dir), self.adapter_name)
            with one_save(folder) as beside:
                self._write_card(beside, folder, model_name, dataset_name, tags)

    def _write_card(
        self,
        folder: Path,
        place: Path,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        name = self.adapter_name
        on_hub = {"revision": self.args.hub_revision, "subfolder": None if name == "default" else name}
        write_card(
            folder,
            model_name=model_name or Path(self.hub_model_id or str(self.args.output_dir)).name,
            base=self.scored.base.config._name_or_path,
            domains=self.alter_config.domains or [],
            options=trained_with(self.args, self.structural_weight, self.measured, self.state),
            summary=self._outcome.lines if self._outcome is not None else (),
            place=self.hub_model_id or place,
            loading_options=on_hub if self.hub_model_id else {},
            dataset_name=dataset_name,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
        )
