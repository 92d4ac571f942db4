# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import upload_folder
from peft import PeftModel
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress
from trl import SFTTrainer

from alter_peft.tuner.saving import explained, keep_card, one_save

from .checkpoints import branch_off, checkpoint_to_resume, is_checkpoint, link_files, name_run, start_afresh
from .distributed import from_main_process, looks
from .pushing import CHECKPOINTS, NoRepositoryError, no_repository, not_pushed
from .same_run import BEGUN_WITH, begun_with, difference, write_begun_with


_PUSHED = ".push-"  # what is being pushed, while later checkpoints are written


class SavingTrainer(SFTTrainer):
    """
    How the trainers save: `output_dir` gets what is to be delivered, in one step, and nothing else; checkpoints are in
    `args.checkpoint_dir`, with the optimizer's state and `training_args.bin`; the Hub gets what is to be delivered,
    every adapter with its weights.
    """

    args: Any
    hub_model_id: Any
    push_in_progress: Any

    _begun: dict[str, Any]  # what `begun_with` gives; empty where a process has no weights to look at
    _delivered: list[Path]
    _is_made = False  # whether all that a trainer is given has been looked at
    _goes_on_from: str | None = None  # a checkpoint that has been looked at, until it is gone on from

    def _get_output_dir(self, trial: Any) -> str:
        folder = Path(super()._get_output_dir(trial))  # of one trial of a search for hyperparameters, one inside
        return str(Path(self.args.checkpoint_dir) / folder.relative_to(self.args.output_dir))

    def _to_resume(self, given: Any) -> str | None:
        """The checkpoint to go on from; what is wrong with it is an error before anything is computed."""
        folder = Path(self.args.checkpoint_dir)
        if given is not None and given == self._goes_on_from:  # as the command line does, before phase I
            checkpoint = self._goes_on_from
        else:
            checkpoint = checkpoint_to_resume(given, folder)
            self.check_goes_on(checkpoint)
        self._goes_on_from = None
        if self.args.should_save and self.args.save_strategy != SaveStrategy.NO:
            if checkpoint is None:
                start_afresh(folder)
            else:
                branch_off(folder, Path(checkpoint))
        return checkpoint

    def _note_start(
        self, given: Mapping[str, Dataset | None], prepared: Mapping[str, Dataset], reference: Any
    ) -> None:
        """As `begun_with`, where this process has the weights."""
        model: Any = self.model
        has_weights = looks(self.accelerator, model)
        self._begun = begun_with(self.args, model, given, prepared, reference) if has_weights else {}

    def check_goes_on(self, checkpoint: str | None) -> None:
        """
        Raise a `ValueError` if the run that a checkpoint is of was begun with other rows, options or another model.

        How long it is trained, the scheduler, where and when it writes, the precision of its passes and the devices
        may differ. Of several processes all call this together.
        """
        found = difference(Path(checkpoint), self._begun) if checkpoint is not None and self._begun else None
        if checkpoint is not None and self.accelerator.num_processes > 1:
            found = from_main_process(found)
        if found is not None:
            raise ValueError(found)
        self._goes_on_from = checkpoint

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As the parent's, in one step."""
        if not self.args.should_save:  # under FSDP every process comes here
            super()._save(output_dir, state_dict)
            return
        target = Path(output_dir or str(self.args.output_dir))
        with one_save(target) as beside:
            keep_card(target, beside)
            super()._save(str(beside), state_dict)
            self._describe(beside, target)
            files = [file for file in beside.rglob("*") if file.is_file() and file.name != TRAINING_ARGS_NAME]
            self._delivered = [file.relative_to(beside) for file in files]
            if not is_checkpoint(target):
                (beside / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _describe(self, folder: Path, place: Path) -> None:
        """Write a card, if there is one, to a folder whose files will come to `place`."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers', without TRL's card in `output_dir`, which is of what is saved there."""
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with explained(folder, kept="Earlier checkpoints are whole."):
            if self.args.should_save:  # an earlier run's is no whole one any more
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
                name_run(Path(self.args.checkpoint_dir), folder)
                if self._begun:
                    write_begun_with(folder, self._begun)
            super(SFTTrainer, self)._save_checkpoint(model, trial)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """
        As the parent's, once all else that the trainer is given has been looked at: `NoRepositoryError`, a
        `ValueError`, if the repository cannot be made.
        """
        if not self._is_made:
            return
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # the client's, and those of whichever HTTP library it has
            raise no_repository(self.args, error) from error

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        As the parent's, but saved first, and without checkpoints.

        Raises:
            NotPushedError: an `OSError` that says where it is saved, and how to push it. With `blocking=False` the
                future has the client's own error.
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        token = token or args.hub_token
        try:
            if self.hub_model_id is None:
                self.init_hf_repo(token=token, private=private)
        except NoRepositoryError as error:
            raise not_pushed(args, None, error) from error
        tags: list[str] | str = kwargs.pop("tags", None) or []
        base: Any = self.accelerator.unwrap_model(self.model)
        base = base.get_base_model() if isinstance(base, PeftModel) else base
        kwargs["tags"] = [*([tags] if isinstance(tags, str) else tags), *(base.model_tags or [])]
        name = kwargs.pop("model_name", None) or Path(args.hub_model_id or args.output_dir).name
        self.create_model_card(model_name=name, **kwargs)
        self._finish_current_push()
        try:
            return upload_folder(
                repo_id=self.hub_model_id,
                folder_path=args.output_dir,
                commit_message=commit_message,
                token=token,
                revision=revision or args.hub_revision,
                ignore_patterns=["_*", *CHECKPOINTS],
                run_as_future=not blocking,  # type: ignore[call-overload]
            )
        except Exception as error:  # an upload in parts raises a RuntimeError, hf_xet errors of its own
            raise not_pushed(args, self.hub_model_id, error) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the parent's, but straight from the checkpoint, adapters in folders of their own included."""
        strategy, running = HubStrategy(self.args.hub_strategy), self.push_in_progress
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if running is not None and not running.is_done() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        progress = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch or 0)}"
        message = f"Training in progress, {progress}"
        checkpoint = Path(checkpoint_folder)
        pushed = Path(tempfile.mkdtemp(dir=checkpoint.parent, prefix=_PUSHED))
        link_files(self._delivered, checkpoint, pushed)
        push: Any = partial(
            upload_folder,
            repo_id=self.hub_model_id,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            run_as_future=True,
        )
        jobs: Any = [push(folder_path=pushed, commit_message=message)]
        jobs[0].add_done_callback(lambda _: shutil.rmtree(pushed, ignore_errors=True))
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            told = f"{message}, checkpoint"
            jobs.append(
                push(folder_path=checkpoint, path_in_repo=place, commit_message=told, ignore_patterns=[BEGUN_WITH])
            )
        if running is None or running.is_done():
            self.push_in_progress = PushInProgress(jobs)
        else:
            running.jobs.extend(jobs)
