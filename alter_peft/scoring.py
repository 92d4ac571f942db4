# SPDX-License-Identifier: Apache-2.0
"""These rows through this model: the one pass that gives what the labelled tokens are scored from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from .losses.scores import TokenScores, score_tokens, score_tokens_and_others
from .tuner.base_pass import base_model, evaluating, without_adapters
from .tuner.decoder import Decoder, LanguageModelHead, check_head, find_decoder, last_hidden_states
from .tuner.gating import GatingContext, GatingContexts
from .tuner.layer import AlterLayer, contexts_of, layers_of


# token ids of a row, and the label of each, -100 where it has none
Row = tuple[Sequence[int], Sequence[int]]


def pad_rows(rows: Sequence[Row], device: torch.device) -> dict[str, Tensor]:
    """The rows as one batch, padded on the right: `input_ids`, `attention_mask` and `labels`, (B, T)."""
    columns: dict[str, tuple[list[Sequence[int]], int]] = {
        "input_ids": ([ids for ids, _ in rows], 0),
        "attention_mask": ([[1] * len(ids) for ids, _ in rows], 0),
        "labels": ([labels for _, labels in rows], -100),
    }
    return {
        name: pad_sequence([torch.as_tensor(row) for row in values], batch_first=True, padding_value=padding).to(
            device
        )
        for name, (values, padding) in columns.items()
    }


class Pass(NamedTuple):
    """
    One batch of a pass.

    Attributes:
        rows: their places among the rows given, B of them.
        labelled: which positions predict a label, bool (B, T-1).
        hidden: the decoder's last hidden states there, (n, k).
        labels: what they are to predict, (n,).
    """

    rows: Sequence[int]
    labelled: Tensor
    hidden: Tensor
    labels: Tensor

    def split(self, values: Tensor) -> list[tuple[int, Tensor]]:
        """(n, ...) values of the labelled tokens by row: its place, and its own values on the CPU."""
        parts = values.cpu().split(self.labelled.sum(dim=1).tolist())
        # a view would keep all of the batch, and be pickled with it
        return [(row, part.clone()) for row, part in zip(self.rows, parts, strict=True)]


class ScoredModel:
    """
    A causal language model, with or without an adapter, and its parts that scoring its tokens needs.

    Args:
        model: of transformers, or a [`~peft.PeftModel`] on one.

    Attributes:
        base: the model under the adapter.
        stack, decoder: its decoder, with the layers and as a module.
        head: hidden states -> logits, as the model's own forward makes them. Where weights are sharded, a whole copy
            of the head takes its place.
        contexts: the states of the gates of ALTER adapters, one for each thread; `None` without such an adapter.

    Raises:
        ValueError: the model is no decoder-only language model of transformers.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.base: Any = base
        self.stack: Decoder = find_decoder(base, "Scoring answers", "Give a decoder with an LM head.")
        self.head = LanguageModelHead(base)
        self.contexts: GatingContexts | None = contexts_of(model)

    @property
    def gating(self) -> GatingContext | None:
        """The state of the gates of ALTER adapters, in this thread; `None` without such an adapter."""
        return None if self.contexts is None else self.contexts.here

    @property
    def decoder(self) -> nn.Module:
        """The decoder stack."""
        return self.stack.module

    @property
    def device(self) -> torch.device:
        """Of the decoder's weights."""
        return next(self.decoder.parameters()).device

    def layers_of(self, adapter_name: str) -> list[AlterLayer]:
        """The layers that an ALTER adapter adapts."""
        return list(layers_of(self.model, adapter_name).values())

    @property
    def positions(self) -> int | None:
        """The longest row that the model declares to be made for, in tokens; `None` if it names no bound."""
        config = self.base.config.get_text_config()
        values, name = config.to_dict(), "max_position_embeddings"
        # the latter is MPT's, whose configuration has no common name for it
        found: int | None = values.get(config.attribute_map.get(name, name)) or values.get("max_seq_len")
        return found

    def check_lengths(self, lengths: Iterable[int], where: str) -> None:
        """
        Raise a `ValueError` if one of some rows is longer than the model's positions.

        Args:
            lengths: of each row, in tokens.
            where: what the rows are of, as the error begins.
        """
        limit = self.positions
        if limit is None:
            return
        found = [(row, length) for row, length in enumerate(lengths) if length > limit]
        if found:
            row, length = found[0]
            raise ValueError(
                f"{where} has {length} tokens in row {row}, but the model has {limit} positions "
                f"({len(found)} row{'s' * (len(found) != 1)} of this set {'are' if len(found) != 1 else 'is'} too "
                "long). Shorten or split it."
            )

    @torch.no_grad()
    def check(self) -> None:
        """
        Before anything is scored: whether the scores are those of the model's own forward.

        Raises:
            ValueError: its forward does to the logits what is not known here, or these are NaN.
        """
        with evaluating(self.model):
            check_head(self.base, self.decoder, self.head)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor, model: Any = None) -> Tensor:
        """
        The decoder's last hidden states (B, T, k), adapters and gates included, from a pass of the whole model.

        Args:
            model: a wrapper (DDP, FSDP) that wants to see the pass.
        """
        hidden = last_hidden_states(model or self.model, self.decoder, input_ids, attention_mask)
        return hidden[:, -input_ids.shape[1] :]  # a virtual prompt makes it longer

    def sent_to(self, batch: Pass, adapter_name: str) -> Tensor:
        """Of the pass just made: the expert of this gated adapter that each labelled token was sent to, (n,)."""
        assert self.gating is not None
        return self.gating.competing(adapter_name)[:, :-1].argmax(dim=-1)[batch.labelled]

    def score(self, hidden: Tensor, labels: Tensor) -> TokenScores:
        """Log-probabilities of labels (n,) and of their strongest rivals, from hidden states (n, k)."""
        return score_tokens(hidden, self.head, labels)

    def score_with(self, hidden: Tensor, labels: Tensor, others: Tensor) -> tuple[TokenScores, Tensor]:
        """`score`, and log-probabilities of other tokens (n, K) in the labels' places, (n, K)."""
        return score_tokens_and_others(hidden, self.head, labels, others)

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """
        Inside, decoder and head are the base model's own: no adapters, in eval mode, without gradients.

        What learns is left as it is, as PEFT's `disable_adapter` does not.

        Raises:
            ValueError: the adapter is no change of layers (a virtual prompt), or there is none.
        """
        if self.gating is not None:
            with base_model(self.decoder, self.head, self.gating):
                yield
            return
        if not any(isinstance(module, BaseTunerLayer) for module in self.base.modules()):
            raise ValueError(
                f"`model` is a {type(self.model).__name__} without adapted layers, so that there is no base model "
                "beside it. Give it an adapter of layers, such as LoRA or ALTER."
            )
        with torch.no_grad(), evaluating(self.base), without_adapters(self.base, kinds=(BaseTunerLayer,)):
            yield

    def base_hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The base model's last hidden states (B, T, k), inside of `as_base`."""
        hidden: Tensor = self.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        return hidden

    def passes(
        self,
        rows: Sequence[Row],
        batch_size: int,
        base: bool = False,
        by_length: bool = True,
        model: Any = None,
        desc: str | None = None,
    ) -> Iterator[Pass]:
        """
        All rows in batches, in eval mode and without gradients, in the precision of the context.

        Args:
            rows: each with a label at least behind its first token.
            base: the base model's own pass, instead of the model's as it is.
            by_length: rows of about the same length together, instead of in their order.
            model: a wrapper that wants to see the pass.
            desc: of a progress bar.

        Raises:
            ValueError: a row is longer than the model's positions.
        """
        self.check_lengths((len(ids) for ids, _ in rows), f"The set {desc!r}" if desc else "What is scored")
        order = sorted(range(len(rows)), key=lambda row: len(rows[row][0])) if by_length else range(len(rows))
        batches = [order[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        for places in tqdm(batches, desc=desc, disable=None if desc else True, leave=False):
            batch = pad_rows([rows[place] for place in places], self.device)
            labels = batch["labels"][:, 1:]
            labelled = labels != -100
            with torch.no_grad(), self.as_base() if base else evaluating(self.model):
                if base:  # causal attention: padding on the right reaches no labelled position
                    hidden = self.base_hidden_states(batch["input_ids"])
                else:
                    hidden = self.hidden_states(batch["input_ids"], batch["attention_mask"], model)
                yield Pass(places, labelled, hidden[:, :-1][labelled], labels[labelled])

    def of_rows(
        self, rows: Sequence[Row], batch_size: int, compute: Callable[[Pass], Tensor], **options: Any
    ) -> list[Tensor]:
        """
        What is computed of each row's labelled tokens, (labels, ...), on the CPU.

        Args:
            compute: a batch -> (n, ...) of its labelled tokens.
            options: of `passes`.
        """
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for batch in self.passes(rows, batch_size, **options):
            for place, part in batch.split(compute(batch)):
                found[place] = part
        return found

    def label_scores(self, rows: Sequence[Row], batch_size: int, **options: Any) -> list[TokenScores]:
        """The scores of each row's labels: float32 (labels,) each, on the CPU, with `options` of `passes`."""

        def scores(batch: Pass) -> Tensor:
            return torch.stack(self.score(batch.hidden, batch.labels), dim=-1).float()

        return [TokenScores(*row.unbind(-1)) for row in self.of_rows(rows, batch_size, scores, **options)]

    def label_log_probabilities(self, rows: Sequence[Row], batch_size: int, **options: Any) -> list[Tensor]:
        """ln p of each row's labels, in nats: float32 (labels,), on the CPU, with `options` of `passes`."""
        return [row.log_prob for row in self.label_scores(rows, batch_size, **options)]
