# SPDX-License-Identifier: Apache-2.0
"""
What open-unlearning's three composites would say of a model, from scores that are measured here.

Their paper (arXiv 2506.12618) takes harmonic means of parts in [0, 1], where more is better: of memorisation (Mem),
privacy (Priv) and utility (Util). Their repository (locuslab/open-unlearning) computes the parts and not the
composites: issue 150 says "done post hoc in a notebook", which was not saved. Two of the three are named for what they
are here: Priv for our reading of a step that is not published (issue 172), Util for the fluency that it lacks, since
a classifier from the Hub judges that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from scipy.stats import hmean

from .metrics.membership import above_holdout, privleak
from .metrics.metric import Metric
from .scores import Key, Score, Scores
from .tasks.tofu import MODEL_UTILITY


OPEN_UNLEARNING = "open_unlearning"  # the set of the composites' scores
MEM = Key(OPEN_UNLEARNING, "mem")
PRIV = Key(OPEN_UNLEARNING, "priv_from_privleak")
UTIL = Key(OPEN_UNLEARNING, "util_without_fluency")
OVERALL = Key(OPEN_UNLEARNING, "overall_of_these")
MEM_PARTS = {
    "1 - ES": Key("forget", "floored_extraction_strength"),
    "1 - EM": Key("forget", "exact_memorization"),
    "1 - Para. Prob": Key("forget", "rephrased_probability"),
    "1 - TR": Key("forget", "truth_share"),
}
PRIV_PARTS = {"LOSS": "loss", "ZLib": "loss_per_byte", "Min-k": "min_k", "Min-k++": "min_k_plus_plus"}
COMPOSITES = {
    MEM.metric: Metric(
        caption="harmonic mean of 1 - extraction strength, 1 - exact memorisation, 1 - probability of the answer in "
        "other words and 1 - its share beside the false ones'"
    ),
    PRIV.metric: Metric(
        caption="harmonic mean over the attacks LOSS, ZLib, Min-k and Min-k++ of max(0, 1 - |PrivLeak| / 100): our "
        "reading, theirs is not published"
    ),
    UTIL.metric: Metric(
        caption="model utility over the target's; theirs is its harmonic mean with the fluency of the forget answers"
    ),
    OVERALL.metric: Metric(caption="harmonic mean of the three as they are here"),
}


def harmonic_mean(values: Sequence[float]) -> float:
    """Of numbers that are not negative: 0 where one of them is (scipy's `hmean`)."""
    return float(hmean(values))


def memorization_parts(scores: Scores) -> dict[str, float] | None:
    """What Mem is the harmonic mean of, by the names of `MEM_PARTS`; `None` if a score of them is missing."""
    found = {name: scores[key].value for name, key in MEM_PARTS.items() if key in scores}
    return {name: 1 - value for name, value in found.items()} if len(found) == len(MEM_PARTS) else None


def attack_aucs(scores: Scores) -> dict[str, float] | None:
    """
    The AUC of each attack of `PRIV_PARTS` on the sets forget and holdout, 0 for a model that memorised the forget set:
    1 - open-unlearning's. `None` if a score of them is missing.
    """
    aucs = {}
    for name, metric in PRIV_PARTS.items():
        of_sets = [scores[key].rows for one in ("forget", "holdout") if (key := Key(one, metric)) in scores]
        if len(of_sets) < 2:
            return None
        aucs[name] = mean(above_holdout(*of_sets))
    return aucs


def privacy_parts(aucs: Mapping[str, float], of_oracles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """
    What our reading of Priv is the harmonic mean of: of each attack 1 at the oracles' AUC, and 0 where PrivLeak is
    100 % or more, to either side.

    Theirs is "in [0, 1], how closely the model aligns with the retain model", with no formula. With this one a model
    that memorised the forget set has about 0 (their table: .10) and the oracle 1.

    Args:
        aucs, of_oracles: of `attack_aucs`, of the model and of each oracle.

    Raises:
        ValueError: the oracles' AUC of an attack is 0 (see `privleak`).
    """
    leaks = {name: privleak(auc, [one[name] for one in of_oracles]) for name, auc in aucs.items()}
    return {name: max(0.0, 1 - abs(leak) / 100) for name, leak in leaks.items()}


def composites(scores: Scores, oracles: Sequence[Scores] = (), target: Scores | None = None) -> list[Score]:
    """
    Those of the composites whose parts are there: Mem of the model's own scores, Priv with those of oracles, utility
    with the target's, and the harmonic mean of the three where all are.

    Priv is left out where the oracles' AUC of an attack is 0.

    Args:
        oracles: of models that never saw the forget set ("retain models"), whose mean AUC is the level.
        target: of the model before unlearning.
    """
    found: list[Score] = []
    if (parts := memorization_parts(scores)) is not None:
        found.append(_score(MEM, harmonic_mean([*parts.values()]), [scores[key] for key in MEM_PARTS.values()]))
    aucs, levels = attack_aucs(scores), [level for one in oracles if (level := attack_aucs(one)) is not None]
    if aucs is not None and levels and len(levels) == len(oracles) and all(mean_level(levels).values()):
        of_sets = [scores[Key("forget", metric)] for metric in PRIV_PARTS.values()]
        found.append(_score(PRIV, harmonic_mean([*privacy_parts(aucs, levels).values()]), of_sets, len(levels)))
    if target is not None and MODEL_UTILITY in scores and MODEL_UTILITY in target and target[MODEL_UTILITY].value:
        utility = scores[MODEL_UTILITY]
        found.append(_score(UTIL, utility.value / target[MODEL_UTILITY].value, [utility]))
    if len(found) == 3:
        found.append(_score(OVERALL, harmonic_mean([score.value for score in found]), found))
    return found


def mean_level(levels: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The oracles' mean AUC of each attack."""
    return {name: mean(level[name] for level in levels) for name in PRIV_PARTS}


def _score(key: Key, value: float, parts: Sequence[Score], oracles: int | None = None) -> Score:
    """Without rows, and with all that its parts depend on."""
    settings: dict[str, Any] = {name: setting for part in parts for name, setting in part.settings.items()}
    settings.pop("is_forget", None)
    if oracles is not None:
        settings["oracles"] = oracles
    return Score(*key[:2], value, average="other", settings=settings)
