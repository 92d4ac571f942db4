# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import logging
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, set_seed
from transformers.trainer_utils import TrainOutput

from alter_peft.data import PairCollator, PairDataset, PairSampler, check_disjoint
from alter_peft.losses import RETAIN_LOSSES
from alter_peft.privacy import telemetry_is_wanted
from alter_peft.scoring import ScoredModel
from alter_peft.tuner.config import AlterConfig

from .active_adapters import others_frozen
from .batch import TokenMasks, count_terms, token_masks, token_shares, token_sums
from .checkpoints import check_folders
from .config import UnlearnConfig
from .distributed import HeadGathering, gathering_layers, set_up_distributed
from .encoding import encoded, set_template_defaults
from .inputs import (
    check_all_labelled,
    check_arguments,
    check_model,
    check_retain_loss,
)
from .phase_one import labelled_rows
from .rows import checked_dataset, keep_input_columns
from .saving import SavingTrainer
from .stopping import Stopping, mean_gap
from .targets import Measured, measure
from .terms import forget_term, retain_term


logger = logging.get_logger(__name__)


class UnlearnTrainer(SavingTrainer):
    """
    Trainer for machine unlearning by any PEFT adapter of layers, or by all weights, with any forget loss.

    Its only changes from [`~trl.SFTTrainer`]: every step pairs rows to forget with rows to retain, the loss is a
    forget term (`FORGET_LOSSES`) plus a retain term (`RETAIN_LOSSES`), each a mean over its own tokens or rows of the
    whole step whatever the accumulation and the number of processes, what the forget loss needs of the rows is
    measured before the first step, and where it has targets training ends once they are reached. `output_dir` gets
    what is to be delivered alone, in one step; checkpoints go to `args.checkpoint_dir`.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            What shall forget: with an adapter or with `peft_config` that adapter is trained, else all weights are.
        args ([`UnlearnConfig`], *optional*):
            Configuration of the training.
        train_dataset ([`~datasets.Dataset`]):
            The rows to forget: prompt-completion, conversational or text.
        retain_dataset ([`~datasets.Dataset`]):
            Rows to keep, in any of these formats.
        calibration_dataset ([`~datasets.Dataset`], *optional*):
            Text like that of `train_dataset` that the model was never trained on. Its answer probability under the
            model becomes the level that `forget_loss="level"` aims at, in place of `args.forget_level`; `"profile"`
            needs it.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Structure of the adapter if `model` has none yet.
        kwargs:
            As for [`~trl.SFTTrainer`].

    **Attributes**:
        - **forget_level** (`float`) -- The level that `forget_loss="level"` aims at: `args.forget_level`, until
          `calibration_dataset` has been measured.
        - **reached** (`bool`) -- Whether training ended because the forget rows had come to their targets.

    Example:

    ```python
    >>> from peft import LoraConfig
    >>> from alter_peft import UnlearnConfig, UnlearnTrainer

    >>> trainer = UnlearnTrainer(
    ...     "HuggingFaceTB/SmolLM2-135M-Instruct",
    ...     UnlearnConfig(output_dir="adapter", forget_loss="npo"),
    ...     train_dataset=forget,
    ...     retain_dataset=retain,
    ...     peft_config=LoraConfig(target_modules="all-linear"),
    ... )
    >>> trainer.train()
    ```

    Raises:
        `ValueError`: unusable data or options, before any training; the message names the field, the value, the fix.
    """

    args: Any
    model: Any
    optimizer: Any
    processing_class: Any
    train_dataset: Any
    _signature_columns: Any

    _tag_names = ["trl", "unlearning"]  # noqa: RUF012 (TRL declares it so)
    _name = "Unlearning"
    config_class: type[UnlearnConfig] = UnlearnConfig
    loss_is_scaled_for_ga: Any = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: UnlearnConfig | None = None,
        *,
        train_dataset: Dataset,
        retain_dataset: Dataset,
        calibration_dataset: Dataset | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = self.config_class(output_dir=f"{Path(name).name}-{self._name}")
        if not isinstance(args, self.config_class):
            raise ValueError(f"`args` is a {type(args).__name__}, but must be an {self.config_class.__name__}.")
        check_arguments(kwargs)
        check_folders(args)
        if not isinstance(model, str):
            check_model(model)
        form = args.dataset_text_field, kwargs.pop("formatting_func", None), args.completion_only_loss is not False
        forget = checked_dataset("train_dataset", train_dataset, *form)
        retain = checked_dataset("retain_dataset", retain_dataset, *form)
        calibration = calibration_dataset
        if calibration is not None:
            calibration = checked_dataset("calibration_dataset", calibration, *form)
        held_out = kwargs.pop("eval_dataset", None)
        if isinstance(held_out, dict):
            held_out = {
                name: checked_dataset(f"eval_dataset[{name!r}]", rows, *form) for name, rows in held_out.items()
            }
        elif held_out is not None:
            held_out = checked_dataset("eval_dataset", held_out, *form)
        if calibration is None and "profiles" in args.loss.needs:
            raise ValueError(
                f"`forget_loss` is {args.forget_loss!r}, but there is no `calibration_dataset` to take profiles from. "
                "Give rows like the forget set that the model was never trained on, or use `forget_loss='level'`."
            )
        has_adapter = isinstance(model, PeftModel)
        if has_adapter and peft_config is not None:
            raise ValueError("`peft_config` is given, but `model` has an adapter already. Pass either of them alone.")
        peft_config, experts = self._assign_experts(model, peft_config, forget, args)
        forget = keep_input_columns(forget, args.dataset_text_field).add_column("expert", experts)
        set_seed(args.seed)  # as newer TRL does before it adds the adapter
        if peft_config is not None:
            peft_config.task_type = peft_config.task_type or "CAUSAL_LM"
            kwargs["peft_config"] = peft_config
        with others_frozen(model):  # before TRL casts what learns, as it does for a quantised base
            super().__init__(model, args, train_dataset=forget, eval_dataset=held_out, **kwargs)
            try:
                set_up_distributed(self.accelerator, self.model, args.max_grad_norm)
                self._set_up_model()
                self._set_up_data(forget, retain, calibration)
            except ValueError:
                if peft_config is not None:  # the user's model as it was given, for another attempt
                    self.model.unload()
                raise

    def _send_telemetry(self) -> None:
        """TRL's report of every trainer that is made, only where the user wants it (`alter_peft.privacy`)."""
        if telemetry_is_wanted():
            super()._send_telemetry()

    # ---- set-up -----------------------------------------------------------------------------------------------------

    def _assign_experts(
        self, model: Any, peft_config: Any, forget: Dataset, args: UnlearnConfig
    ) -> tuple[Any, list[int]]:
        """The config of the adapter that is to be made, and the expert of each forget row: one adapter is one."""
        config = model.peft_config[model.active_adapters[0]] if isinstance(model, PeftModel) else peft_config
        if isinstance(config, AlterConfig):
            raise ValueError(
                "`model` or `peft_config` has an ALTER adapter, whose experts learn apart from one another. Use "
                "`AlterUnlearnTrainer`."
            )
        return peft_config, [1] * len(forget)

    def _set_up_model(self) -> None:
        self.scored = ScoredModel(self.model)
        if self.scored.gating is None:  # else phase I does
            self.scored.check()
        if not any(weight.requires_grad for weight in self.model.parameters()):
            raise ValueError("`model` has a frozen adapter. Load it with `is_trainable=True`.")
        check_retain_loss(self.args.retain_loss, self.scored)
        self.measured = Measured(self.args.forget_level)
        self._prepared = False
        self._token_sums: dict[str, float] = {}
        self._stopping: Stopping | None = None
        self.add_callback(HeadGathering(self.scored, self.accelerator))
        self.add_callback(_Epochs(lambda epoch: self._sampler.set_epoch(epoch)))

    def _set_up_data(self, forget: Dataset, retain: Dataset, calibration: Dataset | None) -> None:
        check_all_labelled("train_dataset", forget, self.train_dataset, self.args.max_length)
        prepared = self._prepare_rows("retain_dataset", retain)
        check_disjoint(self.train_dataset, prepared)
        self._forget: Dataset = self.train_dataset
        self._retain: Dataset = prepared.add_column("expert", [0] * len(prepared))
        self._calibration = calibration and self._prepare_rows("calibration_dataset", calibration)
        if self._calibration is None and self.args.forget_loss == "level":
            logger.warning(
                "Without calibration rows (`calibration_dataset`; on the command line `--calibration`) forget rows "
                f"come to `forget_level`={self.args.forget_level}, a guess, and may be forgotten too little or too "
                "much. Rows like them that the model was never trained on measure the level."
            )
        if self._calibration is not None:  # what the model was taught is no measure of what it never saw
            for name, known in (("train_dataset", self._forget), ("retain_dataset", self._retain)):
                check_disjoint(self._calibration, known, ("calibration_dataset", name))
        multiple: Any = self.args.pad_to_multiple_of
        self.data_collator = PairCollator(pad_token_id=self._tokenizer.pad_token_id, pad_to_multiple_of=multiple)
        tolerance = self.args.stopping_tolerance
        if self.args.loss.has_targets and tolerance is not None:
            self._stopping = Stopping(self._mean_gap, len(self._forget), tolerance, self._record_gap)
            self.add_callback(self._stopping)

    @property
    def forget_level(self) -> float:
        """The level that `forget_loss="level"` aims at."""
        return self.measured.level

    @property
    def reached(self) -> bool:
        """Whether training ended because the forget rows had come to their targets."""
        return self._stopping is not None and self._stopping.reached

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """As the parent's, after the rows became token ids and labels, questions and answers as turns of a chat."""
        if isinstance(dataset, Dataset):
            set_template_defaults(self._tokenizer, args.chat_template_kwargs)
            answers_only, processes = args.completion_only_loss is not False, args.dataset_num_proc
            dataset = encoded(dataset, self._tokenizer, args.as_chat, args.dataset_text_field, answers_only, processes)
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

    # ---- what is measured before the first step ---------------------------------------------------------------------

    def prepare(self) -> None:
        """Measure what the forget loss needs of the rows, by the model as it was given; `train` calls it once."""
        if self._prepared:
            return
        size = max(1, self.args.per_device_train_batch_size)
        known = self._log_probabilities(self._forget if self.args.loss.needs else None, size)
        unseen = self._log_probabilities(self._calibration, size)
        self.measured = measure(self.args.loss, known, unseen, self.args.forget_level, self.args.seed)
        self.train_dataset = PairDataset(self._forget, self._retain)
        self._prepared = True

    def _log_probabilities(self, dataset: Dataset | None, batch_size: int, base: bool = False) -> list[Tensor]:
        """ln p of each row's labels by the model as it is, or by its base; none without a data set."""
        rows = [] if dataset is None else labelled_rows(dataset)
        with self.accelerator.autocast(), gathering_layers(self.model):
            return self.scored.label_log_probabilities(rows, batch_size, base=base, by_length=False)

    def _record_gap(self, gap: float) -> None:
        self._metrics["train"]["forget_gap"].append(gap)

    def _mean_gap(self, max_rows: int) -> float:
        rows, args = labelled_rows(self._forget), self.args
        wrapped, size = self.model_wrapped, args.per_device_eval_batch_size
        return mean_gap(self.scored, rows, self.measured.targets, max_rows, args.seed, self.accelerator, size, wrapped)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As [`~transformers.Trainer.train`], after `prepare`; `True` goes on from the last whole checkpoint."""
        checkpoint = self._to_resume(resume_from_checkpoint)
        self.prepare()
        return super().train(checkpoint, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[tuple[int, int]]:
        data: PairDataset = self.train_dataset
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self._sampler = PairSampler(len(data.forget), len(data.retain), rows, self.args.seed)
        return self._sampler

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, "forget", "retain"})

    # ---- one step ---------------------------------------------------------------------------------------------------

    @property
    def num_experts(self) -> int:
        """What rows are told apart by: retained or to be forgotten."""
        return 2

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term."""
        return {"forget": self.args.forget_weight, "retain": self.args.retain_weight}

    def _masks(self, batch: dict[str, Tensor]) -> TokenMasks:
        return token_masks(batch, None)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Counts what each term is a mean of over the whole step: all accumulated batches, all processes."""
        if self.reached or 0 < self.state.max_steps <= self.state.global_step:  # resumed at its end: no step is left
            return [], None
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        weights = self.args.forget_weight, self.args.retain_weight
        counted = [
            count_terms(batch, self._masks(batch), self.args.loss, weights, self.num_experts) for batch in batches
        ]
        counts = torch.stack(counted).sum(dim=0)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts.to(device).unsqueeze(0)).sum(dim=0)
        forget, retain, structural = counts[:3].clamp(min=1).tolist()
        self.experts_with_rows = (counts[3:] > 0).tolist()
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
        """The weighted terms of a batch of forget and retain rows; the parent's loss on any other (evaluation)."""
        if "expert" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        terms = self._terms(model, inputs, self._masks(inputs), num_items_in_batch)
        self._record(self._sums, terms)
        loss: Any = sum(self.weights[name] * value for name, value in terms.items())
        loss = loss * self.accelerator.num_processes  # DDP averages gradients, the counts are of all processes
        return (loss, None) if return_outputs else loss

    def _terms(
        self, model: nn.Module, inputs: dict[str, Any], masks: TokenMasks, count: dict[str, float]
    ) -> dict[str, Tensor]:
        """The forget and the retain term, each divided by what the whole step has of its tokens or rows."""
        hidden = self.hidden_states(model, inputs)[:, :-1]  # (B, T-1, k)
        with self.accelerator.autocast():
            scores = self.scored.score(hidden[masks.labelled], inputs["labels"][:, 1:][masks.labelled])
            forget = forget_term(scores, inputs, masks, self.args.loss, self.args.loss_options, self.measured)
            retain = retain_term(scores, hidden, inputs, masks, RETAIN_LOSSES[self.args.retain_loss], self.scored)
        self._sums = token_sums(scores, masks, inputs["expert"], self._gates())
        return {"forget": forget / count["forget"], "retain": retain / count["retain"]}

    def hidden_states(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The decoder's last hidden states (B, T, k)."""
        return self.scored.hidden_states(inputs["input_ids"], inputs["attention_mask"], model)

    def _gates(self) -> Tensor | None:
        """The gates of the last pass, (B, T, 1+N), where there is a router."""
        return None

    # ---- logs -------------------------------------------------------------------------------------------------------

    def _record(self, sums: dict[str, Tensor], losses: dict[str, Tensor]) -> None:
        """Totals over all processes, until the next log, so that shares are of tokens; losses add up over a step."""
        stacked = torch.stack([value.detach().float() for value in (*sums.values(), *losses.values())])
        totals = self.accelerator.reduce(stacked, "sum").tolist()
        for name, total in zip(sums, totals, strict=False):
            self._token_sums[name] = self._token_sums.get(name, 0.0) + total
        for name, value in zip(losses, totals[len(sums) :], strict=True):
            self._metrics["train"][f"loss/{name}"].append(value * self.current_gradient_accumulation_steps)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._token_sums:
            logs |= token_shares(self._token_sums)
            self._token_sums = {}
        super().log(logs, start_time)


class _Epochs(TrainerCallback):
    """Tells the sampler of each epoch, also on a resume within it, where the data loader is another object."""

    def __init__(self, set_epoch: Callable[[int], None]) -> None:
        self.set_epoch = set_epoch

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.set_epoch(int(state.epoch or 0))
