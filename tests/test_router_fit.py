# SPDX-License-Identifier: Apache-2.0
"""How the router is fitted in phase I."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits

from alter_peft.tuner.router import ROUTERS, logits_of, router_of
from alter_peft.tuner.router_fit import (
    COUNTERFACTUAL,
    GENERAL,
    RETAIN,
    class_weights,
    fit_router,
    sample_positions,
    shares_astray,
)


def test_sample_of_positions_keeps_small_sub_domains_whole():
    experts = np.repeat([0, 1, 2], [1000, 10, 500])
    everything = sample_positions(experts, seed=0, limit=10_000)
    assert everything.tolist() == list(range(1510))
    sample = sample_positions(experts, seed=0, limit=400)
    assert np.bincount(experts[sample]).tolist() == [200, 10, 100] and (np.diff(sample) > 0).all()
    assert not np.array_equal(sample, sample_positions(experts, seed=1, limit=400))


@pytest.mark.parametrize("counts", [[1000, 10, 500], [5, 100, 100, 0, 1], [7, 7]])
def test_retained_text_has_half_of_the_weight_and_sub_domains_share_the_rest(counts):
    experts = np.repeat(np.arange(len(counts)), counts)
    totals = {expert: weight * counts[expert] / len(experts) for expert, weight in class_weights(experts).items()}
    present = [expert for expert, count in enumerate(counts) if expert and count]
    assert totals == pytest.approx({0: 0.5, **dict.fromkeys(present, 0.5 / len(present))})


def test_many_sub_domains_do_not_draw_retained_text_to_themselves():
    """Text of no clear kind: with equal weights for all 21 experts, nearly all of it would go to a forget expert."""
    generator = np.random.default_rng(0)
    experts = np.repeat(np.arange(21), [400, *[20] * 20])
    averages = torch.tensor(generator.normal(size=(800, 2)), dtype=torch.float32)
    fitted = fit_router(ROUTERS["context"], averages, torch.zeros(800), experts, 21, threshold=1.2)
    sent = (averages @ fitted["weight"][:, :2].T + fitted["bias"]).argmax(dim=1)
    assert (sent[:400] == 0).float().mean() > 0.9


def test_the_router_is_the_same_on_any_number_of_cores(monkeypatch):
    """BLAS adds up in another order with other numbers of threads."""
    threads, fit = [], LogisticRegression.fit

    def recorded(regression, *args):
        threads.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return fit(regression, *args)

    monkeypatch.setattr(LogisticRegression, "fit", recorded)
    with threadpool_limits(2, user_api="blas"):
        fit_router(ROUTERS["context"], torch.randn(8, 2), torch.zeros(8), np.arange(8) % 2, 2, threshold=1.2)
    assert set(threads) == {1}


def gated_data() -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Retained positions and those of two sub-domains, which averages and entropy both tell apart somewhat."""
    generator = torch.Generator().manual_seed(0)
    experts = np.repeat([0, 1, 2], [40, 20, 10])
    averages = torch.randn(70, 3, generator=generator) + torch.as_tensor(experts)[:, None]
    return averages, torch.rand(70, generator=generator) + torch.as_tensor(experts), experts


def test_the_context_router_is_fitted_with_and_without_the_entropy():
    averages, entropy, experts = gated_data()
    fitted = fit_router(ROUTERS["context"], averages, entropy, experts, 4, threshold=0.5)
    surprise = (entropy.numpy() - 0.5)[:, None]
    features = [np.concatenate([averages.numpy(), part], axis=1) for part in (surprise, np.zeros_like(surprise))]
    expected = LogisticRegression(C=100.0, class_weight=class_weights(experts), max_iter=1000)
    with threadpool_limits(1, user_api="blas"):
        expected.fit(np.concatenate(features), np.tile(experts, 2))
    assert torch.equal(fitted["weight"][:3], torch.tensor(expected.coef_, dtype=torch.float32))
    assert torch.equal(fitted["bias"][:3], torch.tensor(expected.intercept_, dtype=torch.float32))
    assert not fitted["weight"][3].any() and fitted["bias"][3] == -1e4  # an expert without rows is never chosen
    assert torch.equal(fitted["probe"], torch.tensor(features[1]))


def test_the_entropy_router_is_fitted_on_the_entropy_of_forget_rows_alone():
    averages, entropy, experts = gated_data()
    fitted = fit_router(ROUTERS["entropy"], averages, entropy, experts, 3, threshold=0.5)
    of_forget = experts > 0
    weights = {1: 30 * 0.5 / 20, 2: 30 * 0.5 / 10}  # each sub-domain alike
    expected = LogisticRegression(C=100.0, class_weight=weights, fit_intercept=False, max_iter=1000)
    with threadpool_limits(1, user_api="blas"):
        expected.fit(entropy.numpy()[of_forget, None], experts[of_forget])
    coefficients = torch.tensor(expected.coef_, dtype=torch.float32)
    assert torch.equal(fitted["weight"], torch.cat([torch.zeros(1, 1), coefficients, torch.zeros(1, 1)]))
    assert "bias" not in fitted and torch.equal(fitted["probe"], entropy[of_forget, None])


def test_the_entropy_router_has_nothing_to_choose_with_one_sub_domain():
    averages, entropy, experts = gated_data()
    fitted = fit_router(ROUTERS["entropy"], averages, entropy, experts.clip(max=1), 1, threshold=0.5)
    assert torch.equal(fitted["weight"], torch.zeros(1, 1))


def test_the_entropy_router_of_format_1_is_fitted_on_the_entropy_of_all_rows():
    averages, entropy, experts = gated_data()
    fitted = fit_router(router_of("entropy", 1), averages, entropy, experts, 3, threshold=0.5)
    expected = LogisticRegression(C=100.0, class_weight=class_weights(experts), fit_intercept=False, max_iter=1000)
    with threadpool_limits(1, user_api="blas"):
        expected.fit(entropy.numpy()[:, None], experts)
    assert torch.equal(fitted["weight"], torch.tensor(expected.coef_, dtype=torch.float32)) and "bias" not in fitted
    assert torch.equal(fitted["probe"], entropy[:, None])


# ---- a hidden layer -------------------------------------------------------------------------------------------------


def subjects_and_kinds() -> tuple[torch.Tensor, np.ndarray]:
    """Two people of whom both private and public things are asked, and others: private of the two is to go."""
    generator = np.random.default_rng(0)
    private, known = generator.integers(0, 2, 1200), generator.integers(0, 2, 1200)
    features = np.stack([private, known], axis=1) * 2.0 - 1 + generator.normal(scale=0.2, size=(1200, 2))
    experts = np.where(private & known, 1, np.where(private, COUNTERFACTUAL, RETAIN))
    return torch.tensor(features, dtype=torch.float32), experts


def test_a_hidden_layer_tells_kind_and_subject_together():
    """Neither alone says what is to be forgotten, but both together; exclusive or would need the layer, too."""
    averages, experts = subjects_and_kinds()
    fitted = fit_router(ROUTERS["context"], averages, torch.zeros(1200), experts, 2, 1.2, hidden_size=8, seed=3)
    features = ROUTERS["context"].features(averages, None, 1.2)
    forget, retain = shares_astray(fitted, features, experts.clip(min=0), np.ones(1200, dtype=bool))
    assert forget < 0.01 and retain < 0.01
    assert not fitted["hidden_weight"][:, -1].any()  # S, which copies have none of, has no say


def test_a_hidden_layer_separates_what_no_linear_map_does():
    generator = np.random.default_rng(0)
    signs = generator.integers(0, 2, (1600, 2))
    averages = torch.tensor(signs * 2.0 - 1 + generator.normal(scale=0.2, size=(1600, 2)), dtype=torch.float32)
    experts = 1 + np.where(signs[:, 0] == signs[:, 1], 0, np.where(signs[:, 0] > 0, 1, -1))  # 0, 1 and 2
    for size, highest in ((0, 1.0), (16, 0.02)):
        fitted = fit_router(ROUTERS["context"], averages, torch.zeros(1600), experts, 4, 1.2, hidden_size=size)
        sent = logits_of(ROUTERS["context"].features(averages, None, 1.2), fitted).argmax(dim=-1).numpy()
        assert (sent != experts).mean() < highest
    assert fitted["weight"].shape == (4, 16) and fitted["hidden_weight"].shape == (16, 3)
    assert not fitted["weight"][3].any() and fitted["bias"][3] == -1e4  # an expert without rows is never chosen


def test_the_hidden_layer_is_a_function_of_the_seed():
    averages, experts = subjects_and_kinds()
    one, same, other = (
        fit_router(ROUTERS["context"], averages, torch.zeros(1200), experts, 2, 1.2, hidden_size=4, seed=seed)
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["hidden_weight"], other["hidden_weight"])


def test_copies_and_general_text_share_the_weight_of_retained_text():
    experts = np.repeat([1, 2, RETAIN, COUNTERFACTUAL, GENERAL], [10, 30, 40, 90, 7])
    counts = dict(zip(*np.unique(experts, return_counts=True), strict=True))
    totals = {kind: weight * counts[kind] / len(experts) for kind, weight in class_weights(experts).items()}
    assert totals == pytest.approx({1: 0.25, 2: 0.25, RETAIN: 0.2, COUNTERFACTUAL: 0.2, GENERAL: 0.1})
