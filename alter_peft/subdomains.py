# SPDX-License-Identifier: Apache-2.0
"""Forget texts -> sub-domain labels: TF-IDF and k-means, for data that has no `domain` column."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import normalize

from alter_peft.words import terms


MAX_DOMAINS = 20  # largest number of sub-domains that is tried at first
MOST_DOMAINS = 60  # and where the best number is near that, in further steps; also what a column may have unasked
STEP, NEAR = 10, 5  # so many more are tried if the best number is so near to the largest
MIN_GAIN = 1.1  # what more sub-domains than at first must have over the best silhouette of those
MIN_SUPPORT = 5  # fewest texts that a term or a sub-domain found by silhouette rests on (fewer when texts are few)
MIN_SILHOUETTE_RATIO = 2.5  # best silhouette against that of the same terms dealt to the texts at random
NUM_SHUFFLES = 5  # random deals that the latter is averaged over
SILHOUETTE_SAMPLE = 2000  # texts that a silhouette is measured on, at most


def discover_subdomains(
    texts: Sequence[str], num_domains: int | None = None, seed: int = 0
) -> tuple[list[int], list[str]]:
    """Split the forget texts into N sub-domains, one for each forget expert B_f^1..B_f^N.

    Without `num_domains`, N is the number in 2..min(20, n - 1) with the best silhouette among the splits whose
    smallest part has at least min(5, n // 4) texts; where that is near 20, up to 60 are tried, and taken if their
    silhouette is a tenth better. Sub-domains of fewer texts are not told apart. A silhouette over TF-IDF is small even
    for clean clusters, so it is judged against chance: where the best one is below 2.5 times that of the same terms
    dealt to the texts at random (each term keeps its number of texts), there are no clusters to speak of and N = 1. On
    TOFU, where the 2.5 was chosen, this finds one sub-domain in 20 of 20 single authors and two in 19 of 20 pairs of
    authors. Fewer than four texts are one sub-domain. No list of stop words is used: a term counts by how many texts
    it is in, in any language; of scripts without spaces it is two letters.

    Args:
        texts: The n forget texts, for question and answer pairs both joined.
        num_domains: N, in 1..n; found by silhouette when `None`.
        seed: Seed of k-means and of the random deals: the result is a function of the arguments alone.

    Returns:
        The label of each text, in 0..N-1, numbered by first appearance, and N unique names, each made of the two terms
        that set the sub-domain apart most, such as `"jaime-vasquez"`.
    """
    _check_arguments(texts, num_domains)
    matrix, terms = _vectorize(texts)
    if num_domains is None:
        labels = _search(matrix, seed)
    else:
        labels = _cluster(matrix, num_domains, seed)
        num_distinct = len(set(labels.tolist()))
        if num_distinct < num_domains:
            raise ValueError(
                f"num_domains={num_domains}, but the texts fall into only {num_distinct} distinct ones: "
                f"pass num_domains <= {num_distinct}, or None to have it found."
            )
    labels = _number_by_first_appearance(labels)
    return labels.tolist(), _name_domains(matrix, terms, labels)


def _check_arguments(texts: Sequence[str], num_domains: int | None) -> None:
    if len(texts) == 0:
        raise ValueError("texts is empty: pass at least one forget text.")
    if num_domains is not None and not 1 <= num_domains <= len(texts):
        raise ValueError(
            f"num_domains={num_domains} for {len(texts)} texts: "
            f"pass a number from 1 to {len(texts)}, or None to have it found."
        )


def _min_support(num_texts: int) -> int:
    return min(MIN_SUPPORT, max(1, num_texts // 4))


def _vectorize(texts: Sequence[str]) -> tuple[Any, Any]:
    """TF-IDF of the terms in `_min_support` or more and at most 0.8 of the texts; of all terms if that leaves none."""
    supports = [(_min_support(len(texts)), 0.8), (1, 1.0)] if len(texts) >= 4 else [(1, 1.0)]
    for min_df, max_df in supports:
        vectorizer = TfidfVectorizer(
            sublinear_tf=True, min_df=min_df, max_df=max_df, tokenizer=terms, token_pattern=None
        )
        try:
            matrix = vectorizer.fit_transform(texts)
        except ValueError:  # scikit-learn's way to say that no term is left
            continue
        return matrix, vectorizer.get_feature_names_out()
    raise ValueError(f"texts holds no word of two or more letters in its {len(texts)} texts: pass texts with words.")


def _cluster(matrix: Any, num_domains: int, seed: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct texts than clusters: callers see to it
        return KMeans(num_domains, n_init=10, random_state=seed).fit_predict(matrix)


def _silhouette(matrix: Any, labels: Any, seed: int) -> float:
    sample_size = min(SILHOUETTE_SAMPLE, matrix.shape[0])
    return float(silhouette_score(matrix, labels, sample_size=sample_size, random_state=seed))


def _search(matrix: Any, seed: int) -> Any:
    """Labels of the split with the best silhouette, or all zeros where chance does nearly as well."""
    num_texts = matrix.shape[0]
    best, best_silhouette, best_number = np.zeros(num_texts, dtype=int), 0.0, 1
    if num_texts < 4:
        return best
    limit, most = min(MAX_DOMAINS, num_texts - 1), min(MOST_DOMAINS, num_texts // _min_support(num_texts))
    number, wanted = 2, 0.0
    while number <= limit:
        labels = _cluster(matrix, number, seed)
        if np.bincount(labels, minlength=number).min() >= _min_support(num_texts):
            silhouette = _silhouette(matrix, labels, seed)
            if silhouette > max(best_silhouette, wanted):
                best, best_silhouette, best_number = labels, silhouette, number
        if number == limit and limit - NEAR < best_number and limit >= MAX_DOMAINS:
            limit, wanted = min(limit + STEP, most), wanted or MIN_GAIN * best_silhouette
        number += 1
    if best_number > 1 and best_silhouette < MIN_SILHOUETTE_RATIO * _chance_silhouette(matrix, best_number, seed):
        return np.zeros(num_texts, dtype=int)
    return best


def _chance_silhouette(matrix: Any, num_domains: int, seed: int) -> float:
    """Mean silhouette of `num_domains` clusters when each term's weights are dealt to texts drawn at random."""
    generator = np.random.default_rng(seed)
    silhouettes = []
    for _ in range(NUM_SHUFFLES):
        dealt = matrix.tocsc(copy=True)
        for start, end in zip(dealt.indptr[:-1], dealt.indptr[1:], strict=True):
            dealt.indices[start:end] = generator.choice(dealt.shape[0], end - start, replace=False)
        dealt = normalize(dealt.tocsr())
        labels = _cluster(dealt, num_domains, seed)
        if len(set(labels.tolist())) > 1:
            silhouettes.append(_silhouette(dealt, labels, seed))
    return float(np.mean(silhouettes)) if silhouettes else 0.0


def _number_by_first_appearance(labels: Any) -> Any:
    order: dict[int, int] = {}
    return np.array([order.setdefault(label, len(order)) for label in labels.tolist()])


def _name_domains(matrix: Any, terms: Any, labels: Any) -> list[str]:
    """Two terms a sub-domain: those with the highest mean TF-IDF inside - mean TF-IDF outside.

    Where there is no outside, of mean TF-IDF x length: long words say more than short ones.
    """
    names: list[str] = []
    for domain in range(labels.max() + 1):
        score = np.asarray(matrix[labels == domain].mean(axis=0)).ravel()
        if (labels != domain).any():
            score = score - np.asarray(matrix[labels != domain].mean(axis=0)).ravel()
        else:
            score = score * np.array([len(term) for term in terms])
        top = np.argsort(-score, kind="stable")[:2]
        name = "-".join(terms[i] for i in top if score[i] > 0) or "other"
        unique, number = name, 2
        while unique in names:
            unique, number = f"{name}-{number}", number + 1
        names.append(unique)
    return names
