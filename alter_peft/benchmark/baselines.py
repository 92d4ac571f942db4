# SPDX-License-Identifier: Apache-2.0
"""Training for what ALTER is compared with: models that are taught, and plain LoRA with the field's losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from alter_peft.data import PairDataset, PairSampler
from alter_peft.losses import TokenScores, cross_entropy_loss, inverted_hinge_loss, score_tokens
from alter_peft.scoring import ScoredModel
from alter_peft.trainer.inputs import as_chat, keep_input_columns
from alter_peft.tuner.decoder import LanguageModelHead, last_hidden_states


class ForgetScores(NamedTuple):
    """
    What a forget loss is computed from: the labelled tokens of a batch's forget rows.

    tokens: their scores, each of shape (n,).
    rows: the row of each token, integers below P, shape (n,).
    log_prob: ln p of each row, the sum over its tokens, shape (P,).
    reference: the same by the model before the training, shape (P,); where the loss needs none, NaN.
    """

    tokens: TokenScores
    rows: Tensor
    log_prob: Tensor
    reference: Tensor


def _npo(scores: ForgetScores, beta: float = 0.1) -> Tensor:
    """-2/beta ln sigmoid(-beta ln(p / p_ref)), a mean over rows (NPO, arXiv 2404.05868, and its beta on TOFU)."""
    return -2 / beta * F.logsigmoid(-beta * (scores.log_prob - scores.reference)).mean()


def _simnpo(scores: ForgetScores, beta: float = 4.5, weight: float = 0.125) -> Tensor:
    """-2/beta ln sigmoid(-beta/|y| ln p), a mean over rows (SimNPO, arXiv 2410.07163, with its gamma 0)."""
    sizes = torch.bincount(scores.rows, minlength=len(scores.log_prob)).clamp(min=1)
    return weight * -2 / beta * F.logsigmoid(-beta * scores.log_prob / sizes).mean()


# A scalar to minimise beside the retain rows' cross-entropy, which has weight 1
FORGET_LOSSES: dict[str, Callable[[ForgetScores], Tensor]] = {
    "ihl": lambda scores: inverted_hinge_loss(scores.tokens).mean(),  # LoKU, arXiv 2408.06621
    "ga": lambda scores: -cross_entropy_loss(scores.tokens).mean(),  # gradient ascent, arXiv 2210.01504
    "npo": _npo,
    "simnpo": _simnpo,  # beta and weight: those of open-unlearning's configuration
}


class LabelledTrainer(SFTTrainer):
    """
    [`~trl.SFTTrainer`] that takes plain cross-entropy of the labelled tokens alone, and logs the loss alone.

    Where there is no Triton, as on a CPU, TRL (1.16) scores every position against the whole vocabulary, prompts and
    padding too, and takes entropies of all: a quarter of a small model's step (docs/log.md). Other losses and
    packed rows are left to TRL.
    """

    model: Any

    def __init__(self, model: PreTrainedModel | PeftModel, args: SFTConfig, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        self._decoder, self._head = ScoredModel(base).decoder, LanguageModelHead(base)
        ScoredModel(self.model).check()
        other = args.packing or args.padding_free or args.label_smoothing_factor or self.aux_loss_enabled
        self.is_plain = not other and args.loss_type in ("nll", "chunked_nll")  # the latter of older TRL

    def score(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[TokenScores, Tensor]:
        """Scores of the labelled tokens, and which of the batch these are, bool (B, T-1)."""
        labels = inputs["labels"][:, 1:]
        labelled = labels != -100
        hidden = last_hidden_states(model, self._decoder, inputs["input_ids"], inputs["attention_mask"])[:, :-1]
        with self.accelerator.autocast():
            return score_tokens(hidden[labelled], self._head, labels[labelled]), labelled

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy, a mean over the labelled tokens of the step, as TRL's."""
        if not self.is_plain:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scores, labelled = self.score(model, inputs)
        count = labelled.sum() if num_items_in_batch is None else num_items_in_batch
        loss = cross_entropy_loss(scores).sum() / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients, the count is of all processes
        return (loss, None) if return_outputs else loss


class LoraUnlearnTrainer(LabelledTrainer):
    """
    Unlearning by one plain adapter: `FORGET_LOSSES[forget_loss]` on forget rows plus cross-entropy on retain rows.

    Its only changes from [`~trl.SFTTrainer`]: every step pairs rows to forget with rows to retain, as ALTER's does,
    and the loss. With `"ga"` this is GradDiff (TOFU, arXiv 2401.06121). The reference of `"npo"` is the model as it is
    given, its adapter included.

    Args:
        model: a base model that gets an adapter by `peft_config`, or one with an adapter, which is trained on.
        args: its optimisation.
        forget_loss: a name of `FORGET_LOSSES`.
        train_dataset, retain_dataset: rows as the ALTER trainer takes them.
        peft_config: the adapter, if `model` has none yet.
        kwargs: as for [`~trl.SFTTrainer`].
    """

    args: SFTConfig
    train_dataset: Any
    processing_class: Any
    _signature_columns: Any

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: SFTConfig,
        *,
        forget_loss: str,
        train_dataset: Dataset,
        retain_dataset: Dataset,
        peft_config: LoraConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if forget_loss not in FORGET_LOSSES:
            raise ValueError(f"`forget_loss` is {forget_loss!r}, but must be one of {list(FORGET_LOSSES)}.")
        self.forget_loss = FORGET_LOSSES[forget_loss]
        field = args.dataset_text_field
        forget, retain = (keep_input_columns(rows, field) for rows in (train_dataset, retain_dataset))
        super().__init__(model, args, train_dataset=forget, peft_config=peft_config, **kwargs)
        kept = self._prepare_dataset(retain, self.processing_class, args, False, None, "retain_dataset")
        self.train_dataset = PairDataset(self.train_dataset, kept)
        self.data_collator = _BothCollator(pad_token_id=self._tokenizer.pad_token_id)
        self.model_accepts_loss_kwargs = False  # a mean over the batch, which accumulation divides
        self.reference = self._row_log_probs() if forget_loss == "npo" else torch.full((len(forget),), torch.nan)
        self.add_callback(_Epochs(self))

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._prepare_dataset(as_chat(dataset, None, self._tokenizer), *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[tuple[int, int]]:
        data: PairDataset = self.train_dataset
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.sampler = PairSampler(len(data.forget), len(data.retain), rows, self.args.seed)
        return self.sampler

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, "forget", "retain"})

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The forget loss plus cross-entropy, a mean over the retain rows' tokens; forget rows come first."""
        scores, labelled = self.score(model, inputs)
        rows, row_id = labelled.nonzero()[:, 0], inputs["row_id"]
        kept = cross_entropy_loss(scores)[rows >= len(row_id)].mean()
        loss = self.forget_loss(self._of_forget(scores, rows, row_id)) + kept
        return (loss, None) if return_outputs else loss

    def _of_forget(self, scores: TokenScores, rows: Tensor, row_id: Tensor) -> ForgetScores:
        """Of the first rows of a batch, as many as `row_id`, (P,), names; `rows` is that of each token, (n,)."""
        count = len(row_id)
        tokens = TokenScores(*(part[rows < count] for part in scores))
        rows = rows[rows < count]
        sums = tokens.log_prob.new_zeros(count).index_add(0, rows, tokens.log_prob)
        return ForgetScores(tokens, rows, sums, self.reference.to(sums.device)[row_id])

    @torch.no_grad()
    def _row_log_probs(self) -> Tensor:
        """ln p of each forget row under the model as it is now, (rows,); in batches of the training's size."""
        rows, size = self.train_dataset.forget, self.args.per_device_train_batch_size
        found, training = [], self.model.training
        collate: Any = self.data_collator
        self.model.eval()
        for start in range(0, len(rows), size):
            ids = torch.arange(start, min(start + size, len(rows)))
            batch = self._prepare_inputs(collate.rows([rows[i] for i in ids.tolist()]))
            with self.accelerator.autocast():
                scores, labelled = self.score(self.model, batch)
            sums = torch.zeros(len(ids), device=scores.log_prob.device)
            found.append(sums.index_add(0, labelled.nonzero()[:, 0], scores.log_prob))
        self.model.train(training)
        return torch.cat(found)


class _BothCollator(DataCollatorForLanguageModeling):
    """Pairs -> one batch, forget rows first, with `row_id` of these alone, (P,)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.rows([example[kind] for kind in ("forget", "retain") for example in examples])
        batch["row_id"] = torch.tensor([example["forget"]["row_id"] for example in examples])
        return batch

    def rows(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return super().torch_call(rows)


class _Epochs(TrainerCallback):
    """Each epoch has its own pairs."""

    def __init__(self, trainer: LoraUnlearnTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.sampler.set_epoch(int(state.epoch or 0))
