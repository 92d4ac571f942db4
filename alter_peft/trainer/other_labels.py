# SPDX-License-Identifier: Apache-2.0
"""Other labels for the tokens of the forget rows, and the models that they come from, before the training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from alter_peft.losses import cross_entropy_loss, generic_labels, novice_labels
from alter_peft.scoring import Row, ScoredModel, pad_rows

from .inside import copied


logger = logging.getLogger(__name__)
TOO_MANY = 0.9  # of WHP's labels, if they are the rows' own tokens


class Making(NamedTuple):
    """
    What other labels are made from.

    scored: the model as it was given.
    rows: the forget rows.
    tokenizer: of the model.
    options: those of the forget loss.
    batch_size: rows that are looked at together.
    seed: of all that is drawn.
    """

    scored: ScoredModel
    rows: Sequence[Row]
    tokenizer: Any
    options: Mapping[str, Any]
    batch_size: int
    seed: int

    @property
    def has_base(self) -> bool:
        """Whether there is a base model under an adapter."""
        return isinstance(self.scored.model, PeftModel)

    def states(self, rows: Sequence[Row]) -> list[Tensor]:
        """The base model's last hidden states at the labels of each row, (n, k)."""
        return self.scored.of_rows(
            rows, self.batch_size, lambda batch: batch.hidden, base=self.has_base, by_length=False
        )

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """The base model's logits from its hidden states (n, k), (n, V)."""
        with self.scored.as_base() if self.has_base else nullcontext():
            logits: Tensor = self.scored.head(states.to(self.scored.device)).float()
            return logits


class OtherLabels(NamedTuple):
    """
    labels: K tokens for each labelled token of each row, (n, K).
    probabilities: that of each, (n, K).
    """

    labels: list[Tensor]
    probabilities: list[Tensor]


def _one_hot(labels: list[Tensor]) -> OtherLabels:
    labels = [row.cpu().unsqueeze(-1) for row in labels]
    return OtherLabels(labels, [torch.ones(row.shape) for row in labels])


def random_labels(given: Making) -> OtherLabels:
    """A token of the vocabulary for each, all alike probable, drawn once by the seed."""
    generator = torch.Generator().manual_seed(given.seed)
    sizes = [sum(label != -100 for label in labels[1:]) for _, labels in given.rows]
    return _one_hot([torch.randint(given.scored.head.vocab_size, (size,), generator=generator) for size in sizes])


def labels_of_whp(given: Making) -> OtherLabels:
    """See [`generic_labels`]."""
    learner = _reinforced(given)
    learned = learner.of_rows(given.rows, given.batch_size, lambda batch: batch.hidden, by_length=False)
    found = []
    for states, reinforced in zip(given.states(given.rows), learned, strict=True):
        with torch.no_grad():
            logits = learner.head(reinforced.to(given.scored.device)).float()
        found.append(generic_labels(given.logits(states), logits, given.options["alpha"]).cpu())
    own = share_of_own(given.rows, found)
    if own > TOO_MANY:
        logger.warning(
            f"{own:.0%} of the generic tokens are the rows' own, so that there is little to forget by: the reinforced "
            "model raises little of what the model knows by heart. Raise 'epochs', 'learning_rate' or 'alpha' in "
            "`forget_loss_kwargs`."
        )
    return _one_hot(found)


def share_of_own(rows: Sequence[Row], found: Sequence[Tensor]) -> float:
    """The share of labels, (n,) of each row, that are the row's own tokens."""
    own = [torch.tensor([label for label in labels[1:] if label != -100]) for _, labels in rows]
    return float((torch.cat(own) == torch.cat(list(found))).float().mean())


def _reinforced(given: Making) -> ScoredModel:
    """A copy of the base model with a LoRA adapter that has learned the forget rows, by plain cross-entropy."""
    base = copied(given.scored.model).requires_grad_(False)
    devices = [given.scored.device] if given.scored.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(given.seed)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        learner = ScoredModel(get_peft_model(base, config).train())
        weights = [weight for weight in learner.model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=given.options["learning_rate"])
        for _ in range(int(given.options["epochs"])):
            for places in torch.randperm(len(given.rows)).split(given.batch_size):
                batch = pad_rows([given.rows[place] for place in places.tolist()], given.scored.device)
                labels = batch["labels"][:, 1:]
                hidden = learner.hidden_states(batch["input_ids"], batch["attention_mask"])[:, :-1]
                scores = learner.score(hidden[labels != -100], labels[labels != -100])
                cross_entropy_loss(scores).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    return learner


def labels_of_elm(given: Making) -> OtherLabels:
    """See [`novice_labels`]."""
    options = given.options
    states = (
        given.states([after(given.tokenizer, text, row) for row in given.rows])
        for text in ("", options["expert"], options["novice"])
    )
    eta, temperature, top_k = options["eta"], options["temperature"], int(options["top_k"])
    found = OtherLabels([], [])
    for own, expert, novice in zip(*states, strict=True):
        logits = given.logits(own), given.logits(expert), given.logits(novice)
        labels, probabilities = novice_labels(*logits, eta, temperature, top_k)
        found.labels.append(labels.cpu())
        found.probabilities.append(probabilities.cpu())
    return found


def after(tokenizer: Any, text: str, row: Row) -> Row:
    """A row behind a line of text, with the same labels; a token that begins every text stays the first."""
    ids, labels = row[0], [-100, *row[1][1:]]  # nothing predicts the first one, which now has something before it
    head = 1 if ids and ids[0] == tokenizer.bos_token_id else 0
    before = tokenizer(f"{text}\n", add_special_tokens=False)["input_ids"] if text else []
    return [*ids[:head], *before, *ids[head:]], [*labels[:head], *[-100] * len(before), *labels[head:]]


# a need of a forget loss -> what makes its labels
OTHER_LABELS: dict[str, Callable[[Making], OtherLabels]] = {
    "random_labels": random_labels,
    "generic_labels": labels_of_whp,
    "novice_labels": labels_of_elm,
}
