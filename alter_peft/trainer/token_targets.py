# SPDX-License-Identifier: Apache-2.0
"""The log-probability that each token of the rows to forget is to come to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import rankdata
from torch import Tensor

from alter_peft.losses import TokenScores

from .rivals import Rivals
from .token_traits import Foreseen, TextTraits, foresee


LEAST = 1e-5  # probability of a token's target where nothing has shown how low text never seen goes


class Guide(NamedTuple):
    """
    How likely the rows' tokens are to a model that knows less of them: what says which have to give way.

    Attributes:
        forget: the scores of each forget row's labels, (n_i,).
        unseen: the same of each calibration row, or of `general`; empty unless it is of a reference model.
        is_reference: whether it is of a reference model, and not of the model itself.
        is_damped: whether the model itself had a part switched down, which is not known of every family.
        traits: what the texts alone say of the labels, those of general text among the unseen where there are no
            calibration rows; `None` where nobody has looked.
        general: the scores of general text by the model as it is, where it stands for calibration rows.
        rivals: the tokens that it has in the labels' places, of each forget row.
    """

    forget: Sequence[TokenScores]
    unseen: Sequence[TokenScores]
    is_reference: bool
    is_damped: bool = True
    traits: TextTraits | None = None
    general: Sequence[TokenScores] = ()
    rivals: Sequence[Rivals] = ()


class TokenTargets(NamedTuple):
    """
    Where the rows to forget are to come to.

    Attributes:
        log_prob: of each row's labels, in nats, (n_i,).
        lead: how far each is to lead its strongest rival, in nats, (n_i,).
        level: the answer probability of unseen rows; where general text stands for them, what the targets would have
            if none were held at its beginning; else the one that was given.
        source: what they were taken from, in words.
    """

    log_prob: list[Tensor]
    lead: list[Tensor]
    level: float
    source: str


class Values(NamedTuple):
    """
    Of the tokens of several rows, one after another.

    log_prob: in nats, (n,).
    lead: how far each leads its strongest rival, in nats, (n,).
    """

    log_prob: np.ndarray
    lead: np.ndarray

    def at(self, places: np.ndarray) -> Values:
        """Those at these places, or where this is true."""
        return Values(self.log_prob[places], self.lead[places])


def token_targets(known: Sequence[Tensor], unseen: Sequence[TokenScores], guide: Guide, level: float) -> TokenTargets:
    """
    The log-probability that each token of the forget rows is to come to, and its lead over its strongest rival.

    As unlikely as the guide finds it, in the model's own scale, as text that the model never saw shows it:

    - a reference and unseen rows: the value at its rank. A token that is as likely to the reference as a share of the
      unseen tokens comes to the value that the model has at that share, and its lead likewise;
    - unseen rows alone: the forget tokens in the guide's order get the values, and the leads, that the model has on
      unseen tokens. Where texts have been looked at, the order is that of the sum of two ranks, by the guide and by
      what the texts alone let foresee, and unseen tokens count as far as they are like those to forget ([`foresee`]);
    - without unseen rows, general text in their place, if there is any;
    - a reference alone: the reference's own values;
    - nothing: the guide's value, each row stretched so that its mean is the level, but if the level allows it none
      below 1e-5: one token that stands out would be sent out of sight, and the others left where they are.

    What ends an answer was learned with all others, and is no part of what is forgotten: those tokens get the values
    of the tokens that end unseen rows, and without any they stay. No token is raised above its own beginning.

    Args:
        known: log-probabilities of each forget row's labels before the training, (n_i,).
        unseen: the scores of the labels of rows that the model was never trained on; may be none.
        level: of the unseen rows; without any, the probability that rows come to where nothing else shows one.
    """
    sizes, traits = [len(row) for row in known], guide.traits
    own = np.concatenate([row.double().numpy() for row in known])
    scores, models, theirs = _flat(guide.forget), _flat(unseen or guide.general), _flat(guide.unseen)
    ends, unseen_ends = np.zeros(len(own), dtype=bool), np.zeros(len(models.lead), dtype=bool)
    if traits is not None:
        ends, unseen_ends = traits.forget.is_end, traits.unseen.is_end
    found = Values(own.copy(), np.zeros(len(own)))  # where ends stay
    if unseen and unseen_ends.any():  # those of general text are of answers of another length and form
        _put(found, ends, _in_order(scores.log_prob[ends], models.at(unseen_ends)))
    asked, never_seen, by_texts = scores.at(~ends), models.at(~unseen_ends), False
    if len(never_seen.lead) and guide.is_reference:
        _put(found, ~ends, _mapped(asked, theirs.at(~unseen_ends), never_seen))
    elif len(never_seen.lead):
        foreseen = traits and foresee(TextTraits(*(one.inside() for one in traits)), never_seen.log_prob)
        by_texts = foreseen is not None
        _put(found, ~ends, _ordered(asked.log_prob, never_seen, foreseen))
    elif guide.is_reference:
        _put(found, ~ends, asked)
    else:
        _stretch(found, scores, ends, sizes, math.log(level))
    of_rows, leads = ([*torch.from_numpy(values).float().split(sizes)] for values in found)
    if guide.general and not unseen:
        level = math.exp(float(torch.stack([row.mean() for row in of_rows]).mean()))
    targets = [torch.minimum(row, one) for row, one in zip(of_rows, known, strict=True)]
    return TokenTargets(targets, leads, level, _described(guide, bool(unseen), by_texts))


def _described(guide: Guide, has_unseen: bool, by_texts: bool) -> str:
    """What token targets were taken from, in words."""
    itself = "the model itself" + " with damped feed-forward layers" * guide.is_damped + " and by the texts" * by_texts
    order = "the reference model" if guide.is_reference else itself
    if has_unseen or guide.general:
        scale = "`calibration_dataset`" if has_unseen else "general text"
    else:
        scale = "the reference model" if guide.is_reference else "`forget_level`"
    return f"order by {order}, values by {scale}"


def _flat(rows: Sequence[TokenScores]) -> Values:
    if not rows:
        return Values(np.empty(0), np.empty(0))
    log_prob, rival = (torch.cat([*values]).double().numpy() for values in zip(*rows, strict=True))
    return Values(log_prob, log_prob - rival)


def _put(into: Values, places: np.ndarray, values: Values) -> None:
    into.log_prob[places], into.lead[places] = values


def _ordered(scores: np.ndarray, unseen: Values, foreseen: Foreseen | None) -> Values:
    """The unseen tokens' values in the order of the scores, and of what was foreseen; of equals the scores decide."""
    if foreseen is None:
        return _in_order(scores, unseen)
    order = rankdata(scores) * (1 + 1e-9) + rankdata(foreseen.forget)
    return _in_order(order, unseen, foreseen.weights)


def _in_order(order: np.ndarray, unseen: Values, weights: np.ndarray | None = None) -> Values:
    """The unseen tokens' values in this order, (n,), each at the share of the weights that its rank is of all."""
    ranks = (order.argsort(kind="stable").argsort() + 0.5) / max(1, len(order))
    ascending = unseen.log_prob.argsort(kind="stable")
    sizes = np.ones(len(ascending)) if weights is None else weights[ascending]
    upto = sizes.cumsum() / sizes.sum()
    values, leads = unseen.at(ascending)
    nearest = np.searchsorted(upto, ranks, side="right").clip(max=len(leads) - 1)
    return Values(np.interp(ranks, upto - sizes / sizes.sum() / 2, values), leads[nearest])


def _mapped(scores: Values, there: Values, unseen: Values) -> Values:
    """Scores by a reference in the model's scale, by what the two find of the same unseen tokens."""
    sets = zip(scores, there, unseen, strict=True)
    return Values(*(np.interp(own, np.sort(theirs), np.sort(models)) for own, theirs, models in sets))


def _stretch(found: Values, scores: Values, ends: np.ndarray, sizes: Sequence[int], level: float) -> None:
    """Put the scores of each row, stretched to where its mean is the level, into `found`, but for what ends it."""
    for row in np.split(np.arange(len(ends)), np.cumsum(sizes)[:-1]):
        inside, rest = row[~ends[row]], row[ends[row]]
        if len(inside):  # those that stay count in the row's mean
            mean = min((len(row) * level - found.log_prob[rest].sum()) / len(inside), level)
            _put(found, inside, Values(_stretched(scores.log_prob[inside], mean), scores.lead[inside]))


def _stretched(row: np.ndarray, mean: float) -> np.ndarray:
    """A row's log-probabilities times the factor by which their mean, none below the least target, is this."""
    row, least = row.clip(max=-1e-6), math.log(LEAST)
    if mean <= least:
        return np.full(len(row), mean)
    factor = brentq(lambda f: float((f * row).clip(min=least).mean()) - mean, 0.0, least / float(row.max()))
    stretched: np.ndarray = (factor * row).clip(min=least)
    return stretched
