# SPDX-License-Identifier: Apache-2.0
"""One model's scores as tables, by themselves and beside oracles."""

from __future__ import annotations

from collections.abc import Sequence

from alter_peft.report.alike import difference
from alter_peft.report.formatting import distance_text, estimate_text
from alter_peft.report.summary import Estimate, control, is_attack, is_of_set, steps_left_out, with_steps

from .oracle import Distance, Scores, Spread, compare_with_oracles, distances
from .results import Result
from .tables import Table


# what forget quality, membership and PrivLeak are made of
COMPARED = ("forget/truth_ratio", "forget/min_k", "holdout/min_k")


def score_table(result: Result, oracles: Sequence[Result] = ()) -> Table:
    """
    A row for each score, and with oracles their mean, the unit and the distance, or a note why there is none: a score
    that an oracle lacks or has of other rows, or that was measured by other settings. Guards and shares have none of
    the three. Of relearning there are the last step, and the one that is farthest from the oracles.
    """
    scores = result.scores
    of_oracles = [_with_controls(with_steps(one), scores) for one in oracles]
    reasons = {key: _why_not(key, result, oracles, of_oracles) for key in scores} if oracles else {}
    shared = [key for key, reason in reasons.items() if reason is None and _has_distance(key)]
    found = _distances({key: scores[key] for key in shared}, of_oracles)
    table = Table("Scores", "", ["score", "value", *(["mean of the oracles", "unit", "distance"] if oracles else [])])
    left_out = steps_left_out([result], [{key: distance.distance for key, distance in found.items()}])
    for key, score in scores.items():
        if key in left_out:
            continue
        cells = [key, _value(score.value)]
        if key in found:
            cells += _band(found[key])
        elif oracles:
            reason = reasons[key] if _has_distance(key) else None
            cells += ["" if reason is None else table.mark(f"Not compared: {reason}."), "", ""]
        table.rows.append(cells)
    others = dict.fromkeys(key for one in oracles for key in with_steps(one))
    unmeasured = [key for key in others if key not in scores and key not in steps_left_out(oracles, [])]
    if unmeasured:
        table.mark(f"Of the oracles alone, and so not compared: {', '.join(unmeasured)}.")
    return table


def oracle_table(result: Result, oracles: Sequence[Result]) -> Table:
    """
    Forget quality beside that of two oracles, and membership and PrivLeak beside theirs.

    Without one of the scores `COMPARED`, of the model or of an oracle, with one that was measured by other settings,
    or with an oracle that has no level to compare with, it has no rows, and a note that says so.
    """
    table = Table("Beside the oracles", "", ["measure", "value", "oracles", "unit", "distance"])
    every = [one.scores for one in oracles]
    for key in COMPARED:
        reason = _why_not(key, result, oracles, every) if key in result.scores else "the model lacks this score"
        if reason is not None:
            table.mark(
                f"Forget quality, membership and PrivLeak were not compared: they need {', '.join(COMPARED)} of the "
                f"model and of all oracles, measured alike. {key}: {reason}."
            )
            return table
    needed = [{key: one[key] for key in COMPARED} for one in (result.scores, *every)]
    try:
        found = compare_with_oracles(needed[0], needed[1:])
    except ValueError as error:  # of PrivLeak
        table.mark(f"Forget quality, membership and PrivLeak were not compared: {error}")
        return table
    quality, member = found.forget_quality, found.membership
    table.rows += [
        ["forget quality (p of KS)", _spread(quality.pvalue), _spread(quality.null_pvalue), "", ""],
        ["KS statistic", _spread(quality.statistic), _spread(quality.null_statistic), "", ""],
        ["membership AUC", _value(member.auc.value), *_band(member.auc)],
        ["PrivLeak (%)", f"{member.privleak:+.1f}", "0", "", ""],
    ]
    table.mark(
        "Forget quality and KS: median (lowest to highest) over the oracles, and of two oracles against each other. A "
        "high p proves nothing: all of them answer the same questions."
    )
    return table


def _with_controls(oracle: Scores, scores: Scores) -> Scores:
    """An oracle's scores, and those that take the place of an attack that it has no adapter for."""
    controls = {key: control(oracle, key) for key in scores}
    return {**oracle, **{key: score for key, score in controls.items() if score is not None}}


def _distances(scores: Scores, oracles: Sequence[Scores]) -> dict[str, Distance]:
    return distances(scores, [{key: one[key] for key in scores} for one in oracles]) if oracles else {}


def _has_distance(key: str) -> bool:
    return is_attack(key) or is_of_set(key)


def _why_not(key: str, result: Result, oracles: Sequence[Result], of_oracles: Sequence[Scores]) -> str | None:
    """Why a score is not compared; `None` if all have it, of as many rows and measured alike."""
    having = [one[key] for one in of_oracles if key in one]
    if len(having) < len(oracles):
        return f"{len(oracles) - len(having)} of the {len(oracles)} oracles lack this score"
    counts, own = sorted({len(one.rows) for one in having}), len(result.scores[key].rows)
    if counts != [own]:
        return f"the oracles have {' or '.join(map(str, counts))} rows, the model has {own}"
    return next((reason for one in oracles if (reason := difference(key, result, one)) is not None), None)


def _band(found: Distance) -> list[str]:
    """The oracles' mean, the unit, which is not their standard deviation where rows say more, and the distance."""
    center, unit = found.band
    return [_value(center), f"{unit:.2g}" if unit else "0", distance_text(Estimate(found.distance, None, 1, 1))]


def _spread(found: Spread) -> str:
    return f"{found.median:.2g} ({found.lowest:.2g} to {found.highest:.2g})"


def _value(value: float) -> str:
    return estimate_text(Estimate(value, None, 1, 1))
