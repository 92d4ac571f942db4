# SPDX-License-Identifier: Apache-2.0
"""Guards against false success: a model that only babbles, an adapter that is sent what is none of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from alter_peft.entropy import chunked_tsallis_entropy
from alter_peft.tuner.base_pass import base_model
from alter_peft.tuner.config import AlterConfig
from alter_peft.tuner.decoder import LanguageModelHead
from alter_peft.tuner.layer import AlterLayer

from .answers import encode_pair, labelled_batches, score_answers, scored_decoder
from .copies import without_adapters
from .measure import Asked, Score, measure


def fluency(asked: Asked, judge: Any = None) -> dict[str, Score]:
    """
    `"{set}/fluency"`: mean log-probability of a token of the model's own answers under a judge, in nats.

    Gibberish is far below what an oracle says. An answer that repeats one phrase is not, since repetition is easy to
    predict: read it beside `unique_tokens`. The end of the turn is not judged, which a limit on the length cuts off,
    but where there is nothing else: an empty answer.

    Args:
        judge: a causal language model of the same tokenizer; by default the model itself without its adapters, which
            compares what adapters on one base say. For models of different bases it must be the same model.

    Raises:
        ValueError: no judge, and the model has no adapters that could be switched off.
    """
    answers = [pair._replace(completion=text) for pair, text in zip(asked.asked, asked.texts, strict=True)]
    with _judging(asked, judge) as model:
        scores = score_answers(model, asked.tokenizer, answers, desc=f"{asked.name}, fluency", **asked.batches)
    rows = [float(row[: n or None].mean()) for row, n in zip(scores.log_probs, scores.content, strict=True)]
    return {f"{asked.name}/fluency": _mean(rows)}


@contextmanager
def _judging(asked: Asked, judge: Any) -> Iterator[Any]:
    if judge is not None:
        yield judge
    elif isinstance(asked.model, PeftModel):
        with without_adapters(asked.model):
            yield asked.model
    else:
        raise ValueError(
            f"'fluency' was asked of the set {asked.name!r}, but the model is a {type(asked.model).__name__} without "
            "adapters, which can't be its own judge. Give another model as `judge`."
        )


def expert_usage(asked: Asked) -> dict[str, Score]:
    """
    `"{set}/expert_{d}"`: share of the answers' tokens that are sent to expert d, 0 being the retain expert.

    The values of a set add up to 1: they are of all its tokens, where rows are of each answer. The share of tokens
    that went where they should not is the metric `"astray"`.

    Raises:
        ValueError: the model has no adapter that routes tokens.
    """
    experts = asked.scores.experts
    if experts is None:
        raise ValueError(
            f"'expert_usage' was asked of the set {asked.name!r}, but the model has no adapter that routes tokens. "
            "Leave it out for this model."
        )
    count = 1 + (_config(asked, "expert_usage").num_forget_experts or 1)
    rows = experts.split([len(row) for row in asked.scores.log_probs])
    return {
        f"{asked.name}/expert_{d}": Score(_share(experts == d), [_share(row == d) for row in rows])
        for d in range(count)
    }


def high_entropy(asked: Asked) -> dict[str, Score]:
    """
    `"{set}/high_entropy"`: share of the answers' tokens whose S_q is above the adapter's threshold (D_high).

    S_q is the base model's, at the position that predicts the token. The value is of all tokens of the set, rows are
    of each answer. Where nearly no token is high, the structural term and the mask of the forget loss do nothing.

    Raises:
        ValueError: the model has no ALTER adapter, or one whose threshold was never measured.
    """
    config = _config(asked, "high_entropy")
    threshold = _threshold(config)
    encoded = [encode_pair(asked.tokenizer, pair) for pair in asked.pairs]
    entropies = base_entropies(asked.model, encoded, config.entropy_q, desc=f"{asked.name}, entropy", **asked.batches)
    high = [row > threshold for row in entropies]
    return {f"{asked.name}/high_entropy": Score(_share(torch.cat(high)), [_share(row) for row in high])}


@torch.no_grad()
def base_entropies(
    model: Any, encoded: Sequence[tuple[list[int], int]], q: float, batch_size: int = 8, desc: str | None = None
) -> list[Tensor]:
    """
    S_q of the base model at the positions that predict an answer's tokens, (n_i,) for each answer.

    Args:
        model: with an ALTER adapter.
        encoded: token ids, and where among them the answer begins, as of `encode_pair`.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder, head = scored_decoder(base).module, LanguageModelHead(base)
    context = next(module.context for module in model.modules() if isinstance(module, AlterLayer))
    entropies: list[Tensor] = [torch.empty(0)] * len(encoded)
    for rows, batch, labels in labelled_batches(encoded, batch_size, next(base.parameters()).device, desc):
        labelled = labels != -100
        with base_model(decoder, head, context):
            hidden = decoder(**batch, use_cache=False)[0][:, :-1]
            found = chunked_tsallis_entropy(hidden[labelled], head, q).float().cpu()
        for row, part in zip(rows, found.split(labelled.sum(dim=1).tolist()), strict=True):
            entropies[row] = part
    return entropies


def check_guards(model: Any) -> None:
    """Raise a `ValueError` if the model has an ALTER adapter whose threshold was never measured (`high_entropy`)."""
    config = _alter_config(model)
    if config is not None:
        _threshold(config)


def _threshold(config: AlterConfig) -> float:
    if config.entropy_threshold is None:
        raise ValueError(
            "`entropy_threshold` is not known yet: with `entropy_quantile` it is measured by the trainer. Train the "
            "adapter first or set `entropy_threshold`."
        )
    return config.entropy_threshold


def measure_guards(asked: Iterable[Asked], judge: Any = None) -> dict[str, Score]:
    """
    All guards that a model has: fluency and unique tokens, of an ALTER adapter the size of the high-entropy set, and
    of a gated one the experts' usage and the tokens sent astray.

    Args:
        asked: the sets; what was computed for the metrics is used again.
        judge: see `fluency`.
    """
    scores: dict[str, Score] = {}
    for one in asked:
        scores |= measure(one, ["unique_tokens"]) | fluency(one, judge)
        if _alter_config(one.model) is not None:
            scores |= high_entropy(one)
        if one.scores.experts is not None:
            scores |= expert_usage(one) | measure(one, ["astray"])
    return scores


def _alter_config(model: Any) -> AlterConfig | None:
    """Of the first active adapter, if it is one of ALTER."""
    if not isinstance(model, PeftModel):
        return None
    config = model.peft_config[model.active_adapters[0]]
    return config if isinstance(config, AlterConfig) else None


def _config(asked: Asked, guard: str) -> AlterConfig:
    config = _alter_config(asked.model)
    if config is None:
        raise ValueError(
            f"{guard!r} was asked of the set {asked.name!r}, but the model has no ALTER adapter. Leave it out for "
            "this model."
        )
    return config


def _share(tokens: Tensor) -> float:
    return float(tokens.float().mean())


def _mean(rows: list[float]) -> Score:
    return Score(sum(rows) / len(rows), rows)
