# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import logging
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import TrainOutput

from alter_peft.data import Epochs, PairCollator, PairDataset, check_disjoint
from alter_peft.losses import TokenScores
from alter_peft.privacy import telemetry_is_wanted
from alter_peft.scoring import Row, ScoredModel
from alter_peft.tuner.config import AlterConfig

from .active_adapters import Trained, others_frozen
from .alternates import Asking, check_alternates
from .checkpoints import check_folders
from .config import UnlearnConfig
from .distributed import HeadGathering, by_main_process, gathering_layers, is_zero3_split, set_up_distributed
from .inputs import check_all_labelled, check_arguments, check_looked_at, check_model
from .knowledge import FORGET_ROWS, RETAIN_ROWS, Astray, Knowledge, Summary
from .measuring import Measuring, Rows, drawn, labelled_rows
from .needs import MADE, Made, alternates_of, base_beside, check_whole_rows, make
from .preparing import PreparingTrainer
from .pushing import check_push
from .reference import check_reference
from .rows import checked_dataset, given_subjects, keep_input_columns, of_each
from .same_run import SETS
from .stopping import Stopping
from .targets import GUESSED, Measured, measure
from .token_targets import Guide
from .windows import row_limit


logger = logging.get_logger(__name__)


class UnlearnTrainer(PreparingTrainer):
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
            The rows to forget: prompt-completion, conversational or text, with an optional column `alternate`, another
            answer to each, for the forget losses that teach one; without it, the trainer makes them.
        retain_dataset ([`~datasets.Dataset`]):
            Rows to keep, in any of these formats.
        calibration_dataset ([`~datasets.Dataset`], *optional*):
            Text like that of `train_dataset` that the model was never trained on. What the model makes of it is where
            `forget_loss="soft_targets"`, `"tokens"` and `"level"` bring the forget rows, in place of a
            guess: by general text, or `args.forget_level`; `"profile"` needs it.
        reference_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            A model of the same tokenizer that does not know the rows to forget: as it was before its fine-tuning, or a
            smaller one. It says which of their tokens give way under `"soft_targets"` and `"tokens"`; without one the
            model with damped feed-forward layers does.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Structure of the adapter if `model` has none yet.
        kwargs:
            As for [`~trl.SFTTrainer`].

    **Attributes**:
        - **forget_level** (`float`) -- The level that forget rows come to: a guess, until `calibration_dataset` has
          been measured; without one still a guess, after `prepare` by general text where that is read.
        - **knowledge** ([`Knowledge`]) -- After `prepare`, how well the model knew the rows to forget, to retain and
          never seen, and whether there is anything to forget (`is_known`).
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

    _tag_names = ["trl", "unlearning"]  # noqa: RUF012 (TRL declares it so)
    _name = "Unlearning"
    config_class: type[UnlearnConfig] = UnlearnConfig
    knowledge: Knowledge

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: UnlearnConfig | None = None,
        *,
        train_dataset: Dataset,
        retain_dataset: Dataset,
        calibration_dataset: Dataset | None = None,
        reference_model: str | PreTrainedModel | None = None,
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
        check_push(args)
        if not isinstance(model, str):
            check_model(model)
        form = args.dataset_text_field, kwargs.pop("formatting_func", None), args.completion_only_loss is not False
        forget = checked_dataset("train_dataset", train_dataset, *form)
        retain = checked_dataset("retain_dataset", retain_dataset, *form)
        calibration = calibration_dataset
        if calibration is not None:
            calibration = checked_dataset("calibration_dataset", calibration, *form)
        looked_at = kwargs.pop("eval_dataset", None)
        held_out = of_each("eval_dataset", looked_at, lambda name, rows: checked_dataset(name, rows, *form))
        check_looked_at(args, calibration is not None, reference_model is not None)
        self._reference = reference_model
        has_adapter = isinstance(model, PeftModel)
        if has_adapter and peft_config is not None:
            raise ValueError("`peft_config` is given, but `model` has an adapter already. Pass either of them alone.")
        self._given = forget, retain
        if (need := alternates_of(args.loss)) is not None:
            check_alternates(need, forget, retain)
        peft_config, experts = self._assign_experts(model, peft_config, forget, args)
        self._subjects = given_subjects(forget)
        forget = keep_input_columns(forget, args.dataset_text_field).add_column("expert", experts)
        set_seed(args.seed)  # as newer TRL does before it adds the adapter
        if peft_config is not None:
            peft_config.task_type = peft_config.task_type or "CAUSAL_LM"
            kwargs["peft_config"] = peft_config
        with others_frozen(model):  # before TRL casts what learns, as it does for a quantised base
            super().__init__(model, args, train_dataset=forget, eval_dataset=held_out, **kwargs)
            try:
                set_up_distributed(self.accelerator, self.model, args.max_grad_norm)
                if reference_model is not None:
                    check_reference(reference_model, model, self._tokenizer, args.model_init_kwargs)
                self._set_up_model()
                self._trained = Trained(self.model)
                self._set_up_data(forget, retain, calibration)
                given = dict(zip(SETS, (*self._given, calibration), strict=True))
                self._note_start(given, dict(zip(SETS, (self._forget, self._retain), strict=False)), reference_model)
                self._is_made = True
                if args.push_to_hub:
                    self.init_hf_repo()
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
        self._base = base_beside(self.args, self.scored, is_zero3_split(self.model))
        self.measured = Measured(self.args.guessed_level)
        self._prepared = False
        self.astray: Astray | None = None
        self._outcome: Summary | None = None
        self._token_sums = {}
        self._stopping: Stopping | None = None
        self.add_callback(HeadGathering(self.scored, self.accelerator))
        self.add_callback(Epochs(lambda epoch: self._sampler.set_epoch(epoch)))

    def _set_up_data(self, forget: Dataset, retain: Dataset, calibration: Dataset | None) -> None:
        self._limit = row_limit(self.args.max_length, self.scored.positions, self.args.pad_to_multiple_of)
        self.train_dataset = self._in_windows("train_dataset", self.train_dataset)
        check_all_labelled("train_dataset", self.train_dataset)
        self.eval_dataset = of_each("eval_dataset", self.eval_dataset, self._in_windows)
        prepared = self._prepare_rows("retain_dataset", retain)
        check_disjoint(self.train_dataset, prepared)
        self._forget: Dataset = self.train_dataset
        if alternates_of(self.args.loss) is not None:
            check_whole_rows(self._given[0], self._forget)
        most = len(self._forget) if self.args.loss.needs - MADE else FORGET_ROWS
        known = drawn(len(self._forget), most, self.args.seed)
        some_retain = prepared.select(drawn(len(prepared), RETAIN_ROWS, self.args.seed))
        self._retain: Dataset = prepared.add_column("expert", [0] * len(prepared))
        self._calibration = calibration and self._prepare_rows("calibration_dataset", calibration)
        general: list[Row] = []
        if self._calibration is None and self.args.forget_level is None and "token_targets" in self.args.loss.needs:
            general = self._general_rows(self._given[0])
        is_guess = self._calibration is None and (bool(general) or self._reference is None)
        if is_guess and self.args.loss.guesses_level:
            level = "what general text shows" if general else f"`forget_level`={self.args.guessed_level:g}"
            logger.warning(GUESSED.format(level=level))
        if self._calibration is not None:  # what the model was taught is no measure of what it never saw
            for name, own in (("train_dataset", self._forget), ("retain_dataset", self._retain)):
                check_disjoint(self._calibration, own, ("calibration_dataset", name))
        rows = Rows(self._forget, known, some_retain, self._retain, self._calibration, general)
        self._measuring = Measuring(self.args, self.scored, self.accelerator, rows, self._reference, self._tokenizer)
        multiple: Any = self.args.pad_to_multiple_of
        self.data_collator = PairCollator(pad_token_id=self._tokenizer.pad_token_id, pad_to_multiple_of=multiple)
        tolerance = self.args.stopping_tolerance
        if self.args.loss.has_targets and tolerance is not None:
            self._stopping = Stopping(self._mean_gap, len(self._forget), tolerance, self._record_gap)
            self.add_callback(self._stopping)

    @property
    def forget_level(self) -> float:
        """The answer probability of text that the model never saw, or a guess at it."""
        return self.measured.level

    @property
    def reached(self) -> bool:
        """Whether training ended because the forget rows had come to their targets."""
        return self._stopping is not None and self._stopping.reached

    @property
    def ended(self) -> bool:
        """Whether no step is left: the forget rows have come to their targets, or come no nearer."""
        return self._stopping is not None and self._stopping.ended

    # ---- what is measured before the first step ---------------------------------------------------------------------

    def prepare(self) -> None:
        """
        Measure how well the model as it was given knows the rows (`knowledge`), and what the forget loss needs of them
        (`measured`); `train` calls it once.

        Of several processes the main one alone measures, and all have the same; where ZeRO-3 has split the weights,
        all measure together.
        """
        if self._prepared:
            return
        self._trained.keep(self.model)
        measuring, size = self._measuring, max(1, self.args.per_device_train_batch_size)

        def look() -> tuple[list[list[TokenScores]], Guide | None]:
            rows = measuring.rows
            sets = rows.forget.select(rows.known), rows.retain, rows.calibration
            return [measuring.scores(one, size) for one in sets], measuring.guide(size)

        found, guide = by_main_process(self.accelerator, self.model, look)
        known, kept = ([row.log_prob for row in rows] for rows in found[:2])
        unseen = found[2]
        needed = known if self.args.loss.needs - MADE else []
        self.measured = measure(self.args.loss, needed, unseen, self.args.guessed_level, self.args.seed, guide)
        self._set_knowledge(known, kept, unseen)
        self.train_dataset = PairDataset(self._forget, self._retain, self._make())
        self._prepared = True

    def _make(self, as_given: bool = True) -> list[dict[str, Any]] | None:
        """Makes what the forget loss needs beyond log-probabilities; the forget rows with other answers, if any."""
        if not self.args.loss.needs & MADE - {"base"}:
            return None

        def find() -> Made:
            rows, size = labelled_rows(self._forget), max(1, self.args.per_device_train_batch_size)
            options, seed = self.args.loss_options, self.args.seed
            given = Asking(*self._given, rows, self.scored, self._tokenizer, self.args.as_chat, options, size, seed)
            with self.accelerator.autocast(), gathering_layers(self.model):
                return make(self.args.loss, self.measured, given, self._limit, as_given)

        made = by_main_process(self.accelerator, self.model, find)
        self.measured = made.measured
        experts = self._forget["expert"]
        return made.alternates and [{**row, "expert": d} for row, d in zip(made.alternates, experts, strict=True)]

    def _set_knowledge(self, known: list[Tensor], kept: list[Tensor], unseen: list[TokenScores]) -> None:
        sets = known, kept, [row.log_prob for row in unseen]
        forget, retain, never = (torch.tensor([row.mean() for row in rows]) for rows in sets)
        self.knowledge = Knowledge(forget, retain, never, self.measured.level)
        if self.astray is not None and self.astray.warning is not None:
            logger.warning(self.astray.warning)

    def _record_gap(self, gap: float) -> None:
        self._metrics["train"]["forget_gap"].append(gap)

    def _mean_gap(self, max_rows: int) -> float:
        return self._measuring.gap(self.measured, max_rows, self.model_wrapped, self.state.global_step)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        As [`~transformers.Trainer.train`], between `prepare` and what `summary` needs.

        `True` goes on from the last whole checkpoint in `args.checkpoint_dir`.
        Rows that the model does not know are trained all the same; a warning says that there is nothing to forget.
        """
        return self._train_from(self._to_resume(resume_from_checkpoint), *args, **kwargs)

    def _train_from(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> TrainOutput:
        self._trained.keep(self.model)
        self.prepare()
        if self.knowledge.warning is not None:
            logger.warning(self.knowledge.warning)
        self._outcome = None
        self._measuring.forget_looks()
        output = super().train(checkpoint, *args, **kwargs)
        self._outcome = self._summarize()
        return output

    def _summarize(self) -> Summary:
        measuring, wrapped = self._measuring, self.model_wrapped
        step = None if self.args.load_best_model_at_end else self.state.global_step
        forget, retain = measuring.forget_means(wrapped, step), measuring.means(measuring.rows.retain, wrapped)
        after = self.knowledge._replace(forget=forget, retain=retain)
        stopping = self._stopping
        reached = None if stopping is None else stopping.reached
        stalled = stopping is not None and stopping.stalled
        epochs = float(self.state.epoch or 0)
        return Summary(
            self.knowledge, after, self.astray, self.state.global_step, epochs, reached, self.measured.guide, stalled
        )

    def summary(self) -> Summary:
        """
        What the training has done, on the same rows before and after.

        Raises:
            ValueError: there was no training yet.
        """
        if self._outcome is None:
            raise ValueError("There is no summary before the training. Call `train` first.")
        return self._outcome

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As [`~transformers.Trainer.get_train_dataloader`], of pairs of rows, after `prepare`."""
        self.prepare()
        return super().get_train_dataloader()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the parent's, of what the trainer was made to train."""
        self._trained.keep(self.model)
        loss: Tensor = super().training_step(*args, **kwargs)
        return loss
