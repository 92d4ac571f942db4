# Copyright 2026 The alter-peft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""One model's scores as tables, by themselves and beside oracles."""

from __future__ import annotations

from collections.abc import Sequence

from .measure import Score
from .oracle import Distance, Scores, Spread, compare_with_oracles, distances
from .summary import control
from .tables import Table


# what forget quality, membership and PrivLeak are made of
COMPARED = ("forget/truth_ratio", "forget/min_k", "holdout/min_k")


def score_table(scores: Scores, oracles: Sequence[Scores] = ()) -> Table:
    """A row for each score, and with oracles their band and the distance, or a note why there is none."""
    oracles = [_with_controls(one, scores) for one in oracles]
    found = _distances(scores, oracles)
    table = Table("Scores", "", ["score", "value", *(["oracles", "distance"] if oracles else [])])
    for key, score in scores.items():
        cells = [key, f"{score.value:.3f}"]
        if key in found:
            cells += _band(found[key])
        elif oracles:
            cells += [table.mark(_why_not(key, score, oracles)), ""]
        table.rows.append(cells)
    unmeasured = list(dict.fromkeys(key for one in oracles for key in one if key not in scores))
    if unmeasured:
        table.mark(f"Of the oracles alone, and so not compared: {', '.join(unmeasured)}.")
    return table


def oracle_table(scores: Scores, oracles: Sequence[Scores]) -> Table:
    """
    Forget quality beside that of two oracles, and membership and PrivLeak beside theirs.

    Without one of the scores `COMPARED`, of the model or of an oracle, or with an oracle that has no level to compare
    with, it has no rows, and a note that says so.
    """
    table = Table("Beside the oracles", "", ["measure", "value", "oracles", "distance"])
    missing = [key for key in COMPARED if not _comparable(key, scores, oracles)]
    if missing:
        table.mark(
            f"Forget quality, membership and PrivLeak were not compared: they need {', '.join(COMPARED)} of the model "
            f"and of all oracles, on the same rows, and {', '.join(missing)} is not there."
        )
        return table
    needed = [{key: one[key] for key in COMPARED} for one in (scores, *oracles)]
    try:
        found = compare_with_oracles(needed[0], needed[1:])
    except ValueError as error:  # of PrivLeak
        table.mark(f"Forget quality, membership and PrivLeak were not compared: {error}")
        return table
    quality, member = found.forget_quality, found.membership
    table.rows += [
        ["forget quality (p of KS)", _spread(quality.pvalue), _spread(quality.null_pvalue), ""],
        ["KS statistic", _spread(quality.statistic), _spread(quality.null_statistic), ""],
        ["membership AUC", f"{member.auc.value:.3f}", *_band(member.auc)],
        ["PrivLeak (%)", f"{member.privleak:+.1f}", "0", ""],
    ]
    table.mark(
        "Forget quality and KS: median (lowest to highest) over the oracles, and of two oracles against each other. A "
        "high p proves nothing by itself."
    )
    return table


def _with_controls(oracle: Scores, scores: Scores) -> Scores:
    """An oracle's scores, and those that take the place of an attack that it has no adapter for."""
    controls = {key: control(oracle, key) for key in scores}
    return {**oracle, **{key: score for key, score in controls.items() if score is not None}}


def _distances(scores: Scores, oracles: Sequence[Scores]) -> dict[str, Distance]:
    if not oracles:
        return {}
    shared = [key for key in scores if _comparable(key, scores, oracles)]
    return distances({key: scores[key] for key in shared}, [{key: one[key] for key in shared} for one in oracles])


def _comparable(key: str, scores: Scores, oracles: Sequence[Scores]) -> bool:
    """Whether the model and all oracles have a score, of as many rows."""
    every = [one.get(key) for one in (scores, *oracles)]
    return None not in every and len({len(score.rows) for score in every if score is not None}) == 1


def _why_not(key: str, score: Score, oracles: Sequence[Scores]) -> str:
    having = [one[key] for one in oracles if key in one]
    if len(having) < len(oracles):
        return f"Not compared: {len(oracles) - len(having)} of the {len(oracles)} oracles lack this score."
    counts = sorted({len(one.rows) for one in having})
    return f"Not compared: the oracles have {' or '.join(map(str, counts))} rows, the model has {len(score.rows)}."


def _band(found: Distance) -> list[str]:
    return [f"{found.band.center:.3f} ± {found.band.spread:.3f}", f"{found.distance:+.1f}"]


def _spread(found: Spread) -> str:
    return f"{found.median:.2g} ({found.lowest:.2g} to {found.highest:.2g})"
