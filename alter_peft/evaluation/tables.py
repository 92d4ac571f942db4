# SPDX-License-Identifier: Apache-2.0
"""A table with footnotes, as Markdown; and one model's scores as tables, alone and beside oracles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .attacks import control
from .metrics import is_guard
from .open_unlearning import COMPOSITES, OPEN_UNLEARNING
from .oracle import COMPARED, Distance, against_oracles, compare_with_oracles
from .results import Result
from .scores import Key, Score, Scores, difference


MOST_PLACES = 6  # after the point


@dataclass
class Table:
    """
    What a report says in rows.

    title, caption: what it is, and how it is to be read.
    columns: their names, that of the row names first.
    rows: a name and a cell for each other column; one that is shorter ends in a sentence that takes the rest.
    notes: footnotes, to which cells point by `mark`.
    """

    title: str
    caption: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def mark(self, note: str) -> str:
        """The mark of a footnote, `"[1]"`, which is added if it is new."""
        if note not in self.notes:
            self.notes.append(note)
        return f"[{self.notes.index(note) + 1}]"


def to_markdown(table: Table) -> str:
    """The rows of a table and its notes; title and caption are for the page around it."""
    padded = [[*row, *[""] * (len(table.columns) - len(row))] for row in table.rows]
    header, *lines = (
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (table.columns, *padded)
    )
    notes = [line for number, note in enumerate(table.notes, 1) for line in ("", f"[{number}] {note}")]
    return "\n".join([header, "|---" * len(table.columns) + "|", *lines, *notes])


def places(value: float, digits: int) -> int:
    """Places after the point for two significant digits of a value, `digits` at least and `MOST_PLACES` at most."""
    if not value or not math.isfinite(value):
        return digits
    return min(max(digits, 1 - math.floor(math.log10(abs(float(f"{value:.1e}"))))), MOST_PLACES)


def value_text(value: float, digits: int = 3) -> str:
    """A score as tables show it: `0.051`, `0.000023`."""
    return f"{value:.{places(value, digits)}f}"


def result_table(result: Result, oracles: Sequence[Result] = ()) -> Table:
    """
    A row for each score, and with oracles their mean, the unit and the distance, or a note why there is none: a score
    that an oracle lacks or has of other rows, or that was measured by other settings. Guards have none of the three.
    Of relearning there are the last step, and the one that is farthest from the oracles. open-unlearning's composites
    have a table of their own.
    """
    scores = Scores(score for score in result.scores.values() if score.set != OPEN_UNLEARNING)
    every = [Scores(score for score in one.scores.values() if score.set != OPEN_UNLEARNING) for one in oracles]
    of_oracles = {key: [score for one in every if (score := control(one, key)) is not None] for key in scores}
    reasons = {
        key: why_not_compared(score, of_oracles[key], len(oracles))
        for key, score in scores.items()
        if oracles and not is_guard(key.metric)
    }
    found = {key: against_oracles(scores[key], of_oracles[key]) for key, reason in reasons.items() if reason is None}
    table = Table("Scores", "", ["score", "value", *(["mean of the oracles", "unit", "distance"] if oracles else [])])
    hidden = steps_left_out(scores, [{key: distance.distance for key, distance in found.items()}])
    for key in (key for key in scores if key not in hidden):
        cells = [str(key), value_text(scores[key].value)]
        if key in found:
            cells += _band(found[key])
        elif oracles:
            reason = reasons.get(key)
            cells += ["" if reason is None else table.mark(f"Not compared: {reason}."), "", ""]
        table.rows.append(cells)
    others = dict.fromkeys(key for one in every for key in one)
    unmeasured = [str(key) for key in others if key not in scores and key not in steps_left_out(others, [])]
    if unmeasured:
        table.mark(f"Of the oracles alone, and so not compared: {', '.join(unmeasured)}.")
    return table


def steps_left_out(keys: Iterable[Key], found: Sequence[Mapping[Key, float]]) -> set[Key]:
    """
    The scores of relearning that tables leave out: those of all steps but the last, and the farthest from the oracles.

    Args:
        found: by score the distances of each model of which the farthest step is shown.
    """
    curves: dict[Key, list[Key]] = {}
    for key in keys:
        if key.attack is not None and key.step is not None:
            curves.setdefault(key._replace(step=None), []).append(key)
    left_out: set[Key] = set()
    for points in curves.values():
        left_out.update(sorted(points, key=lambda key: key.step or 0)[:-1])
        for of_model in found:
            measured = [key for key in points if key in of_model]
            if measured:
                left_out.discard(max(measured, key=lambda key: abs(of_model[key])))
    return left_out


def oracle_table(result: Result, oracles: Sequence[Result]) -> Table:
    """
    Forget quality beside that of two oracles, and membership and PrivLeak beside theirs.

    Without one of the scores `COMPARED`, of the model or of an oracle, with one that was measured by other settings,
    or with an oracle that has no level to compare with, it has no rows, and a note that says so.
    """
    table = Table("Beside the oracles", "", ["measure", "value", "oracles", "unit", "distance"])
    every = [one.scores for one in oracles]
    for key in COMPARED:
        own, others = result.scores.get(key), [one[key] for one in every if key in one]
        reason = "the model lacks this score" if own is None else why_not_compared(own, others, len(oracles))
        if reason is not None:
            table.mark(
                f"Forget quality, membership and PrivLeak were not compared: they need "
                f"{', '.join(map(str, COMPARED))} of the model and of all oracles, measured alike. {key}: {reason}."
            )
            return table
    needed = [Scores(one[key] for key in COMPARED) for one in (result.scores, *every)]
    try:
        found = compare_with_oracles(needed[0], needed[1:])
    except ValueError as error:  # of PrivLeak
        table.mark(f"Forget quality, membership and PrivLeak were not compared: {error}")
        return table
    quality, member = found.forget_quality, found.membership
    table.rows += [
        ["forget quality (p of KS)", quality.pvalue.text(".2g"), quality.null_pvalue.text(".2g"), "", ""],
        ["KS statistic", quality.statistic.text(".2g"), quality.null_statistic.text(".2g"), "", ""],
        ["membership AUC", value_text(member.auc.value), *_band(member.auc)],
        ["PrivLeak (%)", f"{member.privleak:+.1f}", "0", "", ""],
    ]
    table.mark(
        "Forget quality and KS: median (lowest to highest) over the oracles, and of two oracles against each other. A "
        "high p proves nothing: all of them answer the same questions."
    )
    return table


def composite_table(result: Result) -> Table | None:
    """The composites of open-unlearning that the scores give, and what they are; `None` if there are none."""
    found = [score for score in result.scores.values() if score.set == OPEN_UNLEARNING]
    rows = [[score.metric, value_text(score.value), COMPOSITES[score.metric].caption] for score in found]
    return (
        Table("open-unlearning's composites", "", ["open-unlearning's composite", "value", "what it is"], rows)
        if rows
        else None
    )


def why_not_compared(score: Score, of_oracles: Sequence[Score], count: int) -> str | None:
    """
    Why a score has no distance; `None` if all oracles have it, of as many rows and measured alike.

    Args:
        of_oracles: the same of those that have it.
        count: how many oracles there are.
    """
    if len(of_oracles) < count:
        return f"{count - len(of_oracles)} of the {count} oracles lack this score"
    for one in of_oracles:
        if (found := difference(score, one)) is not None:
            own, other = ("not set" if setting is None else repr(setting) for setting in found[1:])
            return f"`{found[0]}` is {own} for the model, and {other} for an oracle"
    return None


def _band(found: Distance) -> list[str]:
    """
    The oracles' mean, the unit, which is not their standard deviation where rows say more, and the distance: more
    places than one would say nothing of it.
    """
    center, unit = found.band
    return [value_text(center), f"{unit:.2g}" if unit else "0", f"{found.distance:+.1f}"]
