# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import logging
from datasets import Dataset
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, set_seed
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer

from alter_peft.data import PairCollator, PairDataset, PairSampler, check_disjoint
from alter_peft.losses import score_tokens
from alter_peft.tuner.config import AlterConfig
from alter_peft.tuner.decoder import LanguageModelHead, find_decoder, last_hidden_states
from alter_peft.tuner.layer import AlterLayer
from alter_peft.tuner.model import AlterModel

from .beside import check_beside, frozen_beside, load_own, own_folder
from .card import write_card
from .config import AlterUnlearnConfig
from .initialization import start_from_clusters
from .inputs import (
    as_chat,
    assign_experts,
    check_all_labelled,
    check_arguments,
    check_model,
    check_unscaled,
    checked_dataset,
    keep_input_columns,
)
from .isolation import clip_by_source, drop_untaught_gradients, parameter_groups, rest_groups
from .landing import Landing
from .objective import Objective, token_shares, token_sums
from .phase_one import PhaseOne, label_log_probabilities
from .sharding import WholeHead, from_main_process, gathering, gathers, is_split, set_up_distributed
from .structural import StructuralTerm
from .targets import geometric_mean, level_targets, unseen_profiles


logger = logging.get_logger(__name__)


class AlterUnlearnTrainer(SFTTrainer):
    """
    Trainer for machine unlearning with ALTER (https://huggingface.co/papers/2603.01792).

    Its only changes from [`~trl.SFTTrainer`]: every step pairs rows to forget with rows to retain, the loss is Eq. 8,
    gradients are isolated (B_f^d learns from forget rows of its own sub-domain alone, B_r from retain rows alone, A
    from the structural term alone), and before the first step phase I looks at the data with the base model.

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
        retain_dataset ([`~datasets.Dataset`]):
            Rows to keep, in any of these formats.
        calibration_dataset ([`~datasets.Dataset`], *optional*):
            Text like that of `train_dataset` that the model was never trained on. Its answer probability under the
            model becomes the level that `forget_loss="level"` aims at, in place of `args.forget_level`; `"profile"`
            needs it.
        peft_config ([`AlterConfig`], *optional*):
            Structure of the adapter if `model` has none yet.
        kwargs:
            As for [`~trl.SFTTrainer`].

    **Attributes**:
        - **subdomains** (`dict[str, Subdomain]`) -- For each name in `domains` that `train_dataset` has rows of, their
          indices (`rows`) and, of discovered sub-domains, the words that set them apart (`terms`), which are not
          saved.
        - **forget_level** (`float`) -- The level that `forget_loss="level"` aims at: `args.forget_level`, until
          `calibration_dataset` has been measured.
        - **structural_weight** (`float`) -- `args.structural_weight`, or 0 where L_struct is left out.
        - **landed** (`bool`) -- Whether training ended because the forget rows had come to their level.

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
    objective: Objective
    model: Any
    optimizer: Any
    processing_class: Any
    train_dataset: Any
    _signature_columns: Any

    _tag_names = ["trl", "alter", "unlearning"]  # noqa: RUF012 (TRL declares it so)
    _name = "ALTER"
    loss_is_scaled_for_ga: Any = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: AlterUnlearnConfig | None = None,
        *,
        train_dataset: Dataset,
        retain_dataset: Dataset,
        calibration_dataset: Dataset | None = None,
        peft_config: AlterConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = AlterUnlearnConfig(output_dir=f"{Path(name).name}-ALTER")
        if not isinstance(args, AlterUnlearnConfig):
            raise ValueError(f"`args` is a {type(args).__name__}, but must be an AlterUnlearnConfig.")
        check_arguments(kwargs)
        if not isinstance(model, str):
            check_model(model)
        checked = partial(
            checked_dataset, text_field=args.dataset_text_field, formatting_func=kwargs.pop("formatting_func", None)
        )
        train_dataset = checked("train_dataset", train_dataset)
        retain_dataset = checked("retain_dataset", retain_dataset)
        if calibration_dataset is not None:
            calibration_dataset = checked("calibration_dataset", calibration_dataset)
        elif args.forget_loss == "profile":
            raise ValueError(
                "`forget_loss` is 'profile', but there is no `calibration_dataset` to take profiles from. Give rows "
                "like the forget set that the model was never trained on, or use `forget_loss='level'`."
            )
        held_out = kwargs.pop("eval_dataset", None)
        if isinstance(held_out, dict):
            held_out = {name: checked(f"eval_dataset[{name!r}]", rows) for name, rows in held_out.items()}
        elif held_out is not None:
            held_out = checked("eval_dataset", held_out)
        has_adapter = isinstance(model, PeftModel)
        if has_adapter and peft_config is not None:
            raise ValueError("`peft_config` is given, but `model` has an adapter already. Pass either of them alone.")
        config: Any = peft_config or AlterConfig()
        if isinstance(model, PeftModel):
            config = model.peft_config[model.active_adapters[0]]
        if not isinstance(config, AlterConfig):
            raise ValueError(f"The adapter config is a {type(config).__name__}, but must be an AlterConfig.")
        check_unscaled(config)
        if isinstance(model, PeftModel):
            check_beside(model)
        assigned, experts, self.subdomains = assign_experts(config, train_dataset, args.dataset_text_field, args.seed)
        train_dataset = keep_input_columns(train_dataset, args.dataset_text_field).add_column("expert", experts)
        set_seed(args.seed)  # as newer TRL does before it adds the adapter
        if not has_adapter:
            assigned.task_type = assigned.task_type or "CAUSAL_LM"
            kwargs["peft_config"] = assigned
        with frozen_beside(model):  # before TRL casts what learns, as it does for a quantised base
            super().__init__(model, args, train_dataset=train_dataset, eval_dataset=held_out, **kwargs)
            try:
                set_up_distributed(self)
                self._set_up_model()
                self._set_up_data(train_dataset, retain_dataset, calibration_dataset)
            except ValueError:
                if not has_adapter:  # the user's model as it was given, for another attempt
                    self.model.unload()
                raise
        self.alter_config.domains = assigned.domains

    # ---- set-up -----------------------------------------------------------------------------------------------------

    def _set_up_model(self) -> None:
        self.adapter_name: str = self.model.active_adapters[0]
        self._active = list(self.model.active_adapters)
        if len(self._active) > 1:
            logger.info(f"Adapter {self._active[0]!r} is trained, while {self._active[1:]} act beside it.")
        self.alter_config: AlterConfig = self.model.peft_config[self.adapter_name]
        tuner: AlterModel = self.model.base_model
        base = self.model.get_base_model()
        self._stack = find_decoder(base)
        self.decoder: nn.Module = self._stack.module
        self.head = LanguageModelHead(base)
        self.gating = tuner.context
        self._layers = [
            m for m in self.model.modules() if isinstance(m, AlterLayer) and self.adapter_name in m.alter_A
        ]
        if not any(expert.requires_grad for layer in self._layers for expert in layer.alter_B.parameters()):
            raise ValueError("`model` has a frozen adapter. Load it with `is_trainable=True`.")
        weight = base.get_output_embeddings().weight
        # autocast cannot be left where the weights themselves are of the lower precision
        rounds = self.is_fsdp_enabled or self.is_deepspeed_enabled
        mixed = self.accelerator.mixed_precision if rounds else "no"
        # not written to the user's arguments, which may serve for another model
        self.structural_weight = self.args.structural_weight
        if self.structural_weight > 0 and (weight.dtype not in (torch.float32, torch.float64) or mixed != "no"):
            logger.warning(
                f"The base model is in {weight.dtype if mixed == 'no' else mixed}, in which L_struct is noise, so it "
                "is left out (`structural_weight=0`) and A stays as it is. Load the model with `dtype=torch.float32` "
                "(under FSDP and DeepSpeed also `mixed_precision: 'no'`) to have it."
            )
            self.structural_weight = 0.0
        self.alter_config.check_threshold(self.head.vocab_size)
        if self.args.retain_loss == "kl" and isinstance(self.head.module, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"`modules_to_save` is {self.alter_config.modules_to_save}, which trains the LM head, but "
                "`retain_loss='kl'` compares hidden states under one head. Use `retain_loss='cross_entropy'`, or "
                "leave the head alone."
            )
        self._freeze_shared()
        self.forget_level: float = self.args.forget_level
        self.has_measured_level = False
        self.landed = False
        self._token_sums: dict[str, float] = {}
        self.objective = Objective(self.args, self.alter_config, self.decoder, self.head, self.gating)
        self._structural = StructuralTerm(self)
        self.add_callback(_StepCallback(self))
        if self.args.lands and self.args.landing_tolerance is not None:
            self.add_callback(Landing(self))

    def _freeze_shared(self) -> None:
        """A learns from the structural term alone."""
        for weight in self.shared_matrices:
            weight.requires_grad_(self.structural_weight > 0)

    def _activate(self) -> None:
        """As at the start, after a checkpoint was loaded, which leaves the trained adapter alone active, all of it."""
        if len(self._active) > 1:
            self.model.base_model.set_adapter(self._active)
            self.model.set_requires_grad(self._active[1:], requires_grad=False)
        self._freeze_shared()

    @property
    def shared_matrices(self) -> list[nn.Parameter]:
        """A of every adapted layer, as it is now: FSDP replaces parameters."""
        return [layer.alter_A[self.adapter_name].weight for layer in self._layers]

    def _set_up_data(self, forget: Dataset, retain: Dataset, calibration: Dataset | None) -> None:
        check_all_labelled("train_dataset", forget, self.train_dataset, self.args.max_length)
        prepared = self._prepare_rows("retain_dataset", retain)
        check_disjoint(self.train_dataset, prepared)
        self._forget: Dataset = self.train_dataset
        self._retain: Dataset = prepared.add_column("expert", [0] * len(prepared))
        self._calibration = calibration and self._prepare_rows("calibration_dataset", calibration)
        if self._calibration is None and self.args.forget_loss == "level":
            logger.warning(
                f"Without a `calibration_dataset`, forget rows come to `forget_level`={self.args.forget_level}, a "
                "guess. Rows like them that the model was never trained on measure the level."
            )
        if self._calibration is not None:  # what the model was taught is no measure of what it never saw
            for name, known in (("train_dataset", self._forget), ("retain_dataset", self._retain)):
                check_disjoint(self._calibration, known, ("calibration_dataset", name))
        self._has_entropy = False
        multiple: Any = self.args.pad_to_multiple_of
        self.data_collator = PairCollator(pad_token_id=self._tokenizer.pad_token_id, pad_to_multiple_of=multiple)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """As the parent's, after questions and answers became turns of a chat (`as_chat`)."""
        if isinstance(dataset, Dataset):
            dataset = as_chat(dataset, args.as_chat, self._tokenizer)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _prepare_rows(self, name: str, dataset: Dataset) -> Dataset:
        """Tokenised rows, labelled by their own format: completions alone where there are prompts."""
        dataset = keep_input_columns(dataset, self.args.dataset_text_field)
        of_forget = self.completion_only_loss
        if self.args.completion_only_loss is None:
            self.completion_only_loss = {"prompt", "completion"} <= set(dataset.column_names)
        try:
            prepared = self._prepare_dataset(dataset, self.processing_class, self.args, False, None, name)
        finally:
            self.completion_only_loss = of_forget
        check_all_labelled(name, dataset, prepared, self.args.max_length)
        return prepared

    def prepare_phase_one(self) -> None:
        """
        Phase I: the base model's token entropies, and the router, both cached on disk; `train` calls it.

        Of several processes the main one alone looks at the data (and at its disk), while the others wait, at most
        `ddp_timeout` seconds; then all have the same. Where ZeRO-3 has split the weights, all look together.
        """
        if self._has_entropy:
            return
        several, looks = self.accelerator.num_processes > 1, self.accelerator.is_main_process or is_split(self.model)
        router = next((r for r in self.gating.routers if looks and self.adapter_name in r.alter_router), None)
        phase = PhaseOne(
            self.model, self.alter_config, self._stack, self.head, self.gating, router, self.adapter_name,
            agree=from_main_process if is_split(self.model) else bool,
        )  # fmt: skip
        rows = max(1, self.args.per_device_eval_batch_size)
        found: dict[str, Tensor] = {}
        unseen: list[Tensor] = []
        if looks:
            with self.accelerator.autocast(), gathering(self.model):
                found = phase.find(self._forget, self._retain, rows, self.args.seed)
                if self._calibration is not None:
                    unseen = label_log_probabilities(self._calibration, self.decoder, self.head, self.gating, rows)
        if several:
            found, unseen = from_main_process((found, unseen))
        if unseen:
            self.forget_level = geometric_mean(unseen)
        self.has_measured_level = self._calibration is not None
        forget, retain = phase.use(found, self._forget, self._retain)
        known = phase.forget_log_probabilities
        self.objective.targets = level_targets(known, self.forget_level)
        if self.args.forget_loss == "profile":
            self.objective.profiles = unseen_profiles(known, unseen, self.args.seed)
            self.objective.targets = torch.stack([profile.mean() for profile in self.objective.profiles])
        self.train_dataset = PairDataset(forget, retain)
        if self.alter_config.init_weights == "cluster" and looks:
            with gathering(self.model):
                start_from_clusters(self, forget)
        if several:
            own = {name: tensor for name, tensor in self.model.named_parameters() if ".alter_" in name}
            adapter = {name: tensor.detach().cpu() for name, tensor in own.items()}
            for name, tensor in from_main_process(adapter).items():
                own[name].data.copy_(tensor)
        self._has_entropy = True

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the parent's; afterwards, backward included, no expert has an owner any more."""
        try:
            loss: Tensor = super().training_step(*args, **kwargs)
            return loss
        finally:
            self.gating.begin(None)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As [`~transformers.Trainer.train`], after phase I."""
        check_unscaled(self.alter_config)
        self.prepare_phase_one()
        if self.is_deepspeed_enabled:
            for router in self.gating.routers:
                router.hold_as_buffers()
        return super().train(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[tuple[int, int]]:
        data: PairDataset = self.train_dataset
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self._sampler = PairSampler(len(data.forget), len(data.retain), rows, self.args.seed)
        return self._sampler

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, "forget", "retain"})

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or `args.optim`) on the groups `shared` (A, at eta_A), `experts` (at eta_B) and, if any, `other`."""
        if self.optimizer is None:
            optimized: Any = model or self.model
            groups = parameter_groups(optimized, each_expert=self.is_deepspeed_enabled)
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, optimized)
            rates = {"shared": self.args.shared_learning_rate}
            settings = [
                {
                    "name": name,
                    "params": parameters,
                    "lr": rates.get(name, self.args.learning_rate),
                    "weight_decay": self.args.weight_decay,
                }
                for name, parameters in groups.items()
                if parameters
            ]
            self.optimizer = cls(settings, **kwargs)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    # ---- one step ---------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Counts tokens and experts over the whole step: all accumulated batches, all processes."""
        if self.landed:  # resumed where it had landed: no step is left
            return [], None
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        counts = torch.stack([self.objective.count(batch) for batch in batches]).sum(dim=0)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts.to(device).unsqueeze(0)).sum(dim=0)
        forget, retain, structural = counts[:3].clamp(min=1).tolist()
        self._taught = (counts[3:] > 0).tolist()
        return batches, {"forget": forget, "retain": retain, "structural": structural}

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As the parent's, which under DeepSpeed would round S_q to the model's own precision."""
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        if "entropy" in inputs:
            prepared["entropy"] = inputs["entropy"].to(prepared["entropy"].device)
        return prepared

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Eq. 8 on a batch of forget and retain rows; the parent's loss on any other (evaluation)."""
        if "expert" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        args, count, masks = self.args, num_items_in_batch, self.objective.masks(inputs)
        l_struct = self._structural(inputs, count["structural"])
        hidden = self.hidden_states(model, inputs)[:, :-1]  # (B, T-1, k)
        with self.accelerator.autocast():
            scores = score_tokens(hidden[masks.labelled], self.head, inputs["labels"][:, 1:][masks.labelled])
            l_forget = self.objective.forget(scores, inputs, masks) / count["forget"]
            l_retain = self.objective.retain(scores, hidden, inputs, masks) / count["retain"]
        loss = args.forget_weight * l_forget + args.retain_weight * l_retain + self.structural_weight * l_struct
        sums = token_sums(scores, masks, inputs["expert"], self.gating.state.gates.get(self.adapter_name))
        self._record(sums, {"forget": l_forget, "retain": l_retain, "structural": l_struct})
        loss = loss * self.accelerator.num_processes  # DDP averages gradients, the counts are of all processes
        return (loss, None) if return_outputs else loss

    def hidden_states(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The decoder's last hidden states (B, T, k) under the gates, each expert learning from its own rows."""
        owner = nn.functional.one_hot(inputs["expert"], self.objective.num_experts)
        supplied = self.gating.supply(self.adapter_name, inputs["entropy"], owner, learns_shared=False)
        with supplied:
            return self.decode(model, inputs["input_ids"], inputs["attention_mask"])

    def resting(self) -> set[str]:
        """The names of the experts that no row of the present step teaches, and `shared` where A does not move."""
        names = ["retain", *(f"forget_{d}" for d in range(len(self._taught) - 1))]
        untaught = {name for name, taught in zip(names, self._taught, strict=True) if not taught}
        return untaught if self._structural.due() else untaught | {"shared"}

    def decode(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The decoder's last hidden states (B, T, k) from a pass of the whole model: its wrapper wants to see it."""
        return last_hidden_states(model, self.decoder, input_ids, attention_mask)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip every expert by itself: one norm over all would couple them."""
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        norms = clip_by_source(model, self.args.max_grad_norm)
        for group in ("shared", "experts", "other"):
            parts = [n for part, n in norms.items() if (part if part in ("shared", "other") else "experts") == group]
            if parts:
                self._metrics["train"][f"grad_norm/{group}"].append(torch.stack(parts).norm().item())
        return torch.stack(list(norms.values())).norm()

    # ---- logs and files ---------------------------------------------------------------------------------------------

    def _record(self, sums: dict[str, Tensor], losses: dict[str, Tensor]) -> None:
        """Totals over all processes, until the next log, so that shares are of tokens; losses add up over a step."""
        stacked = torch.stack([value.detach().float() for value in (*sums.values(), *losses.values())])
        totals = self.accelerator.reduce(stacked, "sum").tolist()
        for name, total in zip(sums, totals, strict=False):
            self._token_sums[name] = self._token_sums.get(name, 0.0) + total
        for name, value in zip(losses, totals[len(sums) :], strict=True):
            self._metrics["train"][f"loss/{name}"].append(value * self.current_gradient_accumulation_steps)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.lr_scheduler is not None:
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                logs[f"learning_rate/{group['name']}"] = float(rate)
        if "loss" in logs and self._token_sums:
            logs |= token_shares(self._token_sums)
            self._token_sums = {}
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

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Writes beside the target first and then moves each file into place, so that none is ever half written."""
        if not self.args.should_save:  # under FSDP every process comes here
            return
        target = Path(output_dir or str(self.args.output_dir))
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as beside:
            super()._save(beside, state_dict)
            write_card(self, own_folder(beside, self.adapter_name), place=own_folder(target, self.adapter_name))
            for file in sorted(Path(beside).rglob("*")):
                if file.is_file():
                    place = target / file.relative_to(beside)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, place)

    def create_model_card(  # type: ignore[override]  # TRL's signature, not that of transformers
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """The adapter's card; it carries the import line without which PEFT does not know the adapter."""
        if self.is_world_process_zero():
            folder = own_folder(str(self.args.output_dir), self.adapter_name)
            write_card(self, folder, model_name, dataset_name, tags)


class _StepCallback(TrainerCallback):
    """The trainer's own hooks into the loop."""

    def __init__(self, trainer: AlterUnlearnTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.is_deepspeed_enabled:
            engine: Any = trainer.model_wrapped
            rest_groups(engine.basic_optimizer, trainer.resting)
        if gathers(trainer):
            base = trainer.model.get_base_model()
            trainer.head = trainer.objective.head = WholeHead(base, trainer.accelerator.device)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # also on a resume within the epoch, where the data loader is another object
        self.trainer._sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        drop_untaught_gradients(trainer._layers, trainer.adapter_name, trainer._taught)
        if not trainer._structural.due():
            for weight in trainer.shared_matrices:
                weight.grad = None
