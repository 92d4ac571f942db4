# SPDX-License-Identifier: Apache-2.0
"""What open-unlearning's composites say of each model."""

from __future__ import annotations

from alter_peft.evaluation.open_unlearning import (
    COMPOSITES,
    MEM,
    OPEN_UNLEARNING,
    PRIV,
    composites,
    memorization_parts,
)
from alter_peft.evaluation.oracle import others
from alter_peft.evaluation.results import ORACLE
from alter_peft.evaluation.scores import Key, Scores
from alter_peft.evaluation.tables import Table

from .estimates import estimate, estimate_text
from .score_tables import note_failed
from .summary import Benchmark, Model


def composite_table(benchmark: Benchmark) -> Table | None:
    """A row a model: the parts of Mem, and the composites; `None` if no model has Mem or Priv."""
    found = {
        model.name: [_of_seed(benchmark, model, place) for place in range(len(model.scores))]
        for model in benchmark.measured
    }
    names = [name for name in _NAMES if any(name in one for seeds in found.values() for one in seeds)]
    if not {MEM.metric, PRIV.metric} & {*names}:
        return None
    table = Table("open-unlearning's composites", _CAPTION, ["model"])
    for name in names:
        meaning = COMPOSITES[name].caption if name in COMPOSITES else None
        table.columns.append(name if meaning is None else f"{name} {table.mark(f'{name}: {meaning}.')}")
    for model in benchmark.measured:
        cells = []
        for name in names:
            over = estimate([one[name] for one in found[model.name] if name in one], len(model.results))
            cells.append("" if over is None else estimate_text(over))
        table.rows.append([model.label, *cells])
    return note_failed(table, benchmark)


_NAMES = ("1 - ES", "1 - EM", "1 - Para. Prob", "1 - TR", *COMPOSITES)
_CAPTION = (
    "More is better. Mem is that of arXiv 2506.12618; the others are named for what they lack of theirs. Mem is "
    "one-sided: it is highest for a model that says nonsense, so read it beside the oracle's."
)


def _of_seed(benchmark: Benchmark, model: Model, place: int) -> dict[str, float]:
    """Parts and composites of one seed: an oracle beside the others."""
    scores, oracles = model.scores[place], benchmark.oracle.scores
    levels = others(oracles, place) if model.name == ORACLE else oracles
    target = benchmark.target.scores[0] if benchmark.target else None
    own = Scores(score for score in scores.values() if score.set != OPEN_UNLEARNING)
    found = Scores(composites(own, levels, target))
    of_composites = {
        metric: found[key].value for metric in COMPOSITES if (key := Key(OPEN_UNLEARNING, metric)) in found
    }
    return {**(memorization_parts(own) or {}), **of_composites}
