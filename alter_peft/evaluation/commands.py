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
"""The commands of the evaluation: each checks what it is given and returns what is then to be run."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from .report import report_tables, write_report
from .summary import read_benchmark
from .tables import to_markdown


def report(argv: Sequence[str]) -> Callable[[], None]:
    """What writes a benchmark's tables, figures and page, and prints its main table."""
    parser = argparse.ArgumentParser(
        prog="alter-peft report",
        description="Tables, figures and one self-contained HTML page from the results of a benchmark.",
    )
    parser.add_argument("folder", type=Path, help="folder of the benchmark, with */result.json")
    parser.add_argument("--output_dir", type=Path, help="where report.md, report.html and *.png go (default: folder)")
    args = parser.parse_args(argv)
    if find_spec("matplotlib") is None:
        raise ValueError("The figures need the package matplotlib. Install it with `pip install matplotlib`.")
    benchmark = read_benchmark(args.folder)
    found = report_tables(benchmark)
    output: Path = args.output_dir or args.folder
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output_dir` is '{output}', but that is a file. Give a folder.")
    command = shlex.join(["alter-peft", "report", *argv])

    def run() -> None:
        write_report(benchmark, found, output, command)
        print(to_markdown(found[0]))
        print(f"\nreport: {output / 'report.html'}")

    return run
