# SPDX-License-Identifier: Apache-2.0
"""What can be told of a token from the texts alone: whether it ends an answer, and how well it can be foreseen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from transformers import PreTrainedTokenizerBase

from alter_peft.chat import special_ids
from alter_peft.scoring import Row


# Fewer tokens never seen than these say too little of what makes a token likely
ENOUGH = 100
# An unseen token counts as many at most (truncated importance weights: Ionides, J. Comput. Graph. Stat. 17, 2008)
MOST = 10.0
PENALTY = 10.0  # of the ridge regression, on standardised features


class Traits(NamedTuple):
    """
    Of the labels of all rows of a set, row after row.

    Attributes:
        is_end: whether the token ends an answer: special tokens, and white space behind one; bool (n,).
        features: what makes it easy or hard to foresee, whatever a model has learned, (n, 5): whether it stands in the
            row's prompt before it; in its answer before it; behind the same token before; and the logarithms of how
            often it is a label of the retain rows, and of how often it is one there behind the same token.
    """

    is_end: np.ndarray
    features: np.ndarray


class TextTraits(NamedTuple):
    """Those of the rows to forget, and of rows that the model never saw."""

    forget: Traits
    unseen: Traits


class Foreseen(NamedTuple):
    """
    How well the tokens to forget could be foreseen by who knows only text like the unseen rows.

    Attributes:
        forget: a predicted log-probability of each, in nats, (n,).
        weights: of the unseen tokens, as which they are like those to forget; their mean is 1, (m,).
    """

    forget: np.ndarray
    weights: np.ndarray


def read_traits(
    forget: Sequence[Row], unseen: Sequence[Row], retain: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> TextTraits:
    """
    The traits of two sets of rows.

    Args:
        retain: rows whose labels are counted.
    """
    ends, counts = special_ids(tokenizer), Counter[tuple[int, ...]]()
    for row in retain:
        for ids, place in _labels(row):
            if ids[place] not in ends:
                counts.update([(), (ids[place],), (ids[place - 1], -1), (ids[place - 1], ids[place])])
    blank: dict[int, bool] = {}
    of_forget, of_unseen = (_traits(rows, counts, ends, tokenizer, blank) for rows in (forget, unseen))
    return TextTraits(of_forget, of_unseen)


def foresee(traits: TextTraits, log_probs: np.ndarray) -> Foreseen | None:
    """
    What the unseen tokens say of those to forget by their features; `None` if there are fewer than 100.

    A ridge regression of the unseen tokens' log-probabilities, and their weights under covariate shift: the odds,
    by logistic regression, that a token with these features is one to forget (Shimodaira, "Improving predictive
    inference under covariate shift by weighting the log-likelihood function", 2000). Weights are 10 at most.

    Args:
        traits: without tokens that end answers.
        log_probs: by the model, of the unseen tokens, in nats, (m,).
    """
    if len(log_probs) < ENOUGH or len(traits.forget.features) == 0:
        return None
    scaler = StandardScaler().fit(traits.unseen.features)
    forget, unseen = (scaler.transform(one.features) for one in traits)
    both, is_forget = np.concatenate([forget, unseen]), np.arange(len(forget) + len(unseen)) < len(forget)
    odds = np.exp(LogisticRegression(max_iter=1000).fit(both, is_forget).decision_function(unseen))
    weights = np.minimum(odds / odds.mean(), MOST)
    return Foreseen(Ridge(PENALTY).fit(unseen, log_probs).predict(forget), weights / weights.mean())


def _labels(row: Row) -> Iterator[tuple[Sequence[int], int]]:
    """Token ids of the row, and the place of each label that is predicted."""
    ids, labels = row
    for place in range(1, len(ids)):
        if labels[place] != -100:
            yield ids, place


def _traits(
    rows: Sequence[Row],
    counts: Counter[tuple[int, ...]],
    ends: Set[int],
    tokenizer: PreTrainedTokenizerBase,
    blank: dict[int, bool],
) -> Traits:
    is_end, features = list[bool](), list[tuple[float, ...]]()
    total = counts[()]
    for ids, labels in rows:
        asked, answered, pairs = set[int](), set[int](), set[tuple[int, int]]()
        ended = False
        for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
            before = ids[place - 1] if place else -1
            if label != -100 and place:
                if token in ends:
                    ended = True
                elif ended:
                    if token not in blank:
                        blank[token] = not str(tokenizer.decode([token])).strip()
                    ended = blank[token]
                is_end.append(ended)
                often = math.log((counts[token,] + 0.5) / (total + 1.0))
                behind = math.log((counts[before, token] + 0.5) / (counts[before, -1] + 1.0))
                seen = token in asked, token in answered, (before, token) in pairs
                features.append((*map(float, seen), often, behind))
            else:
                ended = False
            (asked if label == -100 else answered).add(token)
            pairs.add((before, token))
    return Traits(np.array(is_end, dtype=bool), np.array(features, dtype=np.float32).reshape(-1, 5))
