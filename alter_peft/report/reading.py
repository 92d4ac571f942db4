# SPDX-License-Identifier: Apache-2.0
"""A benchmark, read from its folder and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from alter_peft.evaluation.results import ORACLE, TARGET, Result
from alter_peft.evaluation.scores import Key, Score, Scores, difference

from .summary import Benchmark, Model


def read_benchmark(folder: Path) -> Benchmark:
    """
    All cells of a benchmark, which can be compared with its oracles.

    Raises:
        ValueError: as `read_cells`; a folder without two measured oracles or without a method; a cell that was
            measured but shares no score with the oracles, or has one of other questions or measured with other
            settings; oracles that do not differ in any score.
    """
    files = _read_files(folder)
    benchmark = _gathered(folder, files.values())
    _check_alike(files)
    _check(benchmark)
    return benchmark


def read_cells(folder: Path) -> Benchmark:
    """
    All cells of a benchmark, `folder/*/result.json`. One with a score that is NaN or infinite is one that failed.

    Raises:
        ValueError: a folder without results; a file that is no result; two cells of one name and seed.
    """
    return _gathered(folder, _read_files(folder).values())


def _read_files(folder: Path) -> dict[Path, Result]:
    """Every result of a folder, each of another name or seed."""
    if not folder.is_dir():
        raise ValueError(f"`folder` is '{folder}', but there is no such folder.")
    files = {path: _load(path) for path in sorted(folder.glob("*/result.json"))}
    if not files:
        raise ValueError(f"`folder` is '{folder}', but there is no */result.json in it. Run the benchmark first.")
    known: set[tuple[str, int]] = set()
    for path, result in files.items():
        if (result.name, result.seed) in known:
            raise ValueError(
                f"'{path}' is a second cell of {result.name} with seed {result.seed}. Remove one of them, or measure "
                "it with another `--name` or `--seed`."
            )
        known.add((result.name, result.seed))
    return files


def _gathered(folder: Path, cells: Iterable[Result]) -> Benchmark:
    """By model, target and oracle first, and by seed."""
    models: dict[str, Model] = {}
    first = (TARGET, ORACLE)
    for cell in sorted(cells, key=lambda cell: (*(cell.name != name for name in first), cell.name, cell.seed)):
        model = models.setdefault(cell.name, Model(cell.name, [], []))
        (model.results if cell.is_measured or cell.error is None else model.failed).append(cell)
    return Benchmark(folder, list(models.values()))


def _load(path: Path) -> Result:
    result = Result.load(path)
    if broken := result.broken:
        result.error = f"`{broken[0]}` is {result.scores[broken[0]].value}, or one of its rows is no finite number"
        result.scores = Scores()
    return result


def _check(benchmark: Benchmark) -> None:
    folder, names = benchmark.folder, [model.name for model in benchmark.models]
    if ORACLE not in names:
        raise ValueError(f"'{folder}' has no oracle, only {names}. Train models without the forget set beside them.")
    oracle = benchmark.oracle
    if len(oracle.results) < 2:
        errors = "".join(f"; seed {cell.seed} failed: {cell.error}" for cell in oracle.failed)
        raise ValueError(
            f"'{folder}' has {len(oracle.results)} measured oracles{errors}. A band needs at least 2 of different "
            "seeds."
        )
    if not set(names) - {TARGET, ORACLE}:
        raise ValueError(f"'{folder}' has no method, only {names}. Run one on the target.")
    if not any(len(set(oracle.found(key))) > 1 for key in benchmark.bands):
        raise ValueError(f"The oracles of '{folder}' do not differ in any score. Train them with different seeds.")
    known = {key for values in oracle.values for key in values}
    for model in benchmark.models:
        for result in model.results:
            if not result.scores:
                raise ValueError(
                    f"'{folder}': {model.name} of seed {result.seed} has neither scores nor an error. Run it again."
                )
            if not known & result.scores.keys():
                raise ValueError(
                    f"'{folder}': {model.name} of seed {result.seed} has no score that the oracles have; it has "
                    f"{list(map(str, result.scores))}, they have {sorted(map(str, known))}. Measure both alike."
                )


def _check_alike(files: Mapping[Path, Result]) -> None:
    """Scores of other questions, or measured with other settings, are not to be compared."""
    first: dict[Key, tuple[Score, Path]] = {}
    for path, cell in files.items():
        for key, score in cell.scores.items():
            before, where = first.setdefault(key, (score, path))
            if (found := difference(before, score)) is not None:
                name, one, other = found
                raise ValueError(
                    f"`{key}`: {name} is {one!r} in '{where}', but {other!r} in '{path}'. Measure both alike, or move "
                    "one of them out of the folder."
                )
