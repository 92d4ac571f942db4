# SPDX-License-Identifier: Apache-2.0
"""What can be told of a token from the texts alone: whether it ends an answer, and how well it can be foreseen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from transformers import PreTrainedTokenizerBase

from alter_peft.answer_end import EndOfAnswer
from alter_peft.scoring import Row


MIN_TOKENS = 100  # fewer tokens never seen say too little of what makes a token likely
PENALTY = 10.0  # of the ridge regression, on standardised features


class Traits(NamedTuple):
    """
    Of the labels of all rows of a set, row after row.

    Attributes:
        is_end: whether the token ends an answer, or the part of one that a window has: it and all behind it in its run
            of labels are special tokens or white space; bool (n,).
        features: what makes it easy or hard to foresee, whatever a model has learned, float32 (n, 5): whether it
            stands before among the row's unlabelled tokens, the prompt (in a window also what came before it); among
            its labelled ones, the answer; behind the same token; and the logarithms of how often it is a label of the
            retain rows, those that end answers left out, and of how often it is one there behind the same token.
    """

    is_end: np.ndarray
    features: np.ndarray

    def inside(self) -> Traits:
        """Of the labels that end no answer."""
        return Traits(self.is_end[~self.is_end], self.features[~self.is_end])


class TextTraits(NamedTuple):
    """Those of the rows to forget, and of rows that the model never saw."""

    forget: Traits
    unseen: Traits


class Foreseen(NamedTuple):
    """
    How well the tokens to forget could be foreseen by who knows only text like the unseen rows.

    Attributes:
        forget: a predicted log-probability of each, in nats, (n,).
        weights: of the unseen tokens, larger for those that are like the tokens to forget; their mean is 1, (m,).
    """

    forget: np.ndarray
    weights: np.ndarray


def read_traits(
    forget: Sequence[Row], unseen: Sequence[Row], retain: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> TextTraits:
    """
    The traits of the labels of two sets of rows.

    Args:
        forget, unseen: token ids and labels of each row; the latter may be none.
        retain: rows whose labels are counted; may be none.
        tokenizer: of the rows.
    """
    end = EndOfAnswer(tokenizer)
    kept = _Flat(retain)
    counts = _Counts(kept, ~_ends(kept, end))
    of_forget, of_unseen = (_traits(_Flat(rows), counts, end) for rows in (forget, unseen))
    return TextTraits(of_forget, of_unseen)


def foresee(traits: TextTraits, log_probs: np.ndarray) -> Foreseen | None:
    """
    What the unseen tokens say of those to forget by their features; `None` if there are fewer than 100, or none to
    forget.

    A ridge regression of the unseen tokens' log-probabilities on their features, and importance weights: the odds, by
    logistic regression, that a token with these features is one to forget (Bickel, Brueckner and Scheffer,
    "Discriminative Learning for Differing Training and Test Distributions", ICML 2007). Where few tokens would have
    most of the weight, so that they count as fewer than 100 (Kish's effective sample size), the odds are raised to a
    power below 1.

    Args:
        traits: of (n,) labels to forget and (m,) unseen ones, without those that end answers.
        log_probs: by the model, of the unseen labels, in nats, all finite, (m,).
    """
    if len(log_probs) < MIN_TOKENS or len(traits.forget.features) == 0:
        return None
    scaler = StandardScaler().fit(traits.unseen.features)
    forget, unseen = (scaler.transform(one.features) for one in traits)
    both, is_forget = np.concatenate([forget, unseen]), np.arange(len(forget) + len(unseen)) < len(forget)
    # float32's matrix products may flag an invalid value where all are finite, as these are: sklearn has checked them
    with np.errstate(invalid="ignore"):
        log_odds = LogisticRegression(max_iter=1000).fit(both, is_forget).decision_function(unseen)
    for power in (1.0, 0.5, 0.25, 0.0):
        weights = np.exp(power * (log_odds - log_odds.max()))
        if weights.sum() ** 2 / (weights**2).sum() >= MIN_TOKENS:
            break
    return Foreseen(Ridge(PENALTY).fit(unseen, log_probs).predict(forget), weights / weights.mean())


class _Flat:
    """
    The tokens of rows, one after another, (t,) each.

    ids, before: a token and the one before it in its row, -1 for none.
    row: of which row it is.
    is_labelled: whether it has a label.
    is_predicted: whether it has one and something stands before it.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        sizes = np.array([len(ids) for ids, _ in rows], dtype=int)
        ids, labels = (
            np.concatenate([np.asarray(row[part], dtype=np.int64) for row in rows] or [np.empty(0, dtype=np.int64)])
            for part in (0, 1)
        )
        starts = sizes.cumsum() - sizes
        self.ids, self.row = ids, np.repeat(np.arange(len(sizes)), sizes)
        self.before = np.roll(ids, 1)
        self.is_labelled = labels != -100
        self.is_predicted = self.is_labelled.copy()
        first = starts[sizes > 0]
        self.before[first], self.is_predicted[first] = -1, False


class _Counts:
    """How often tokens are labels, and how often behind which token."""

    def __init__(self, rows: _Flat, places: np.ndarray) -> None:
        places = places & rows.is_predicted
        ids, before = rows.ids[places], rows.before[places]
        self.total = len(ids)
        self.ids, self.contexts = np.unique(ids, return_counts=True), np.unique(before, return_counts=True)
        self.pairs = np.unique(_pairs(before, ids), return_counts=True)

    def often(self, ids: np.ndarray) -> np.ndarray:
        """The logarithm of the share of the labels, half a one more counted of each."""
        found: np.ndarray = np.log((_count(self.ids, ids) + 0.5) / (self.total + 1))
        return found

    def behind(self, before: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The same of the labels behind this token."""
        counts, of_context = _count(self.pairs, _pairs(before, ids)), _count(self.contexts, before)
        found: np.ndarray = np.log((counts + 0.5) / (of_context + 1))
        return found


def _pairs(before: np.ndarray, ids: np.ndarray) -> np.ndarray:
    found: np.ndarray = (before + 1) * 2**31 + ids
    return found


def _count(counted: tuple[np.ndarray, np.ndarray], values: np.ndarray) -> np.ndarray:
    """How often each value is among those counted."""
    known, counts = counted
    if len(known) == 0:
        return np.zeros(len(values))
    places = np.searchsorted(known, values).clip(max=len(known) - 1)
    return np.where(known[places] == values, counts[places], 0)


def _stands_before(row: np.ndarray, value: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Whether each value stands at an earlier place of its row that is among these, (t,)."""
    _, kinds = np.unique(value, return_inverse=True)
    keys = row * (int(kinds.max(initial=0)) + 1) + kinds
    known, first = np.unique(keys[among], return_index=True)
    if len(known) == 0:
        return np.zeros(len(row), dtype=bool)
    places = np.searchsorted(known, keys).clip(max=len(known) - 1)
    earliest = np.flatnonzero(among)[first][places]
    found: np.ndarray = (known[places] == keys) & (earliest < np.arange(len(row)))
    return found


def _ends(rows: _Flat, end: EndOfAnswer) -> np.ndarray:
    """Whether a token and all behind it in its run of labels are special tokens or white space."""
    found = np.zeros(len(rows.ids), dtype=bool)
    steps = np.diff(np.concatenate([[0], rows.is_labelled.astype(int), [0]]))
    breaks = np.flatnonzero(rows.before == -1)
    starts = np.union1d(np.flatnonzero(steps == 1), breaks[rows.is_labelled[breaks]])
    stops = np.union1d(np.flatnonzero(steps == -1), breaks[(breaks > 0) & rows.is_labelled[breaks - 1]])
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        found[start + end.content_length(rows.ids[start:stop].tolist()) : stop] = True
    return found


def _traits(rows: _Flat, counts: _Counts, end: EndOfAnswer) -> Traits:
    wanted = rows.is_predicted
    seen = (
        _stands_before(rows.row, rows.ids, ~rows.is_labelled),
        _stands_before(rows.row, rows.ids, rows.is_labelled),
        _stands_before(rows.row, _pairs(rows.before, rows.ids), np.ones(len(rows.ids), dtype=bool)),
    )
    ids, before = rows.ids[wanted], rows.before[wanted]
    columns = [*(one[wanted] for one in seen), counts.often(ids), counts.behind(before, ids)]
    return Traits(_ends(rows, end)[wanted], np.stack(columns, axis=1).astype(np.float32))
