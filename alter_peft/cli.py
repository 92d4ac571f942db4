# SPDX-License-Identifier: Apache-2.0
"""The command line: what there is, without importing it; what is chosen is imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

from .version import __version__


DONE, FAILED, BAD_INPUT, MEASURED_AND_FAILED = 0, 1, 2, 3  # exit statuses


class Command(NamedTuple):
    """
    A command of `alter-peft`.

    caption: its line in `alter-peft --help`.
    home: where its function is, as `module:name`. The function is given the words after the command, checks them, and
        returns what is to be run then, whose exit status is what that returns (`None`: 0).
    """

    caption: str
    home: str

    def function(self) -> Callable[[Sequence[str]], Callable[[], int | None]]:
        """The function, imported."""
        module, _, name = self.home.partition(":")
        return getattr(import_module(module), name)  # type: ignore[no-any-return]


COMMANDS = {
    "demo": Command("a small model forgets three facts that it knows", "alter_peft.commands.demo:demo"),
    "unlearn": Command("train an adapter that makes a model forget rows", "alter_peft.commands.unlearn:unlearn"),
    "generate": Command("ask a model that wears an adapter", "alter_peft.commands.generate:generate"),
    "evaluate": Command("measure a model, with or without an adapter", "alter_peft.commands.evaluate:evaluate"),
    "benchmark": Command("compare methods of unlearning by a grid", "alter_peft.commands.benchmark:benchmark"),
    "report": Command("draw what a benchmark measured", "alter_peft.commands.report:report"),
}
STATUSES = {
    DONE: "done",
    FAILED: "failed while running: the traceback is printed",
    BAD_INPUT: "unusable input: one line says what and how to mend it; nothing was computed",
    MEASURED_AND_FAILED: "measured, and the result is not what it should be",
}


def _parser() -> argparse.ArgumentParser:
    lines = [f"  {name:<10} {command.caption}" for name, command in COMMANDS.items()]
    statuses = [f"  {status}  {text}" for status, text in STATUSES.items()]
    parser = argparse.ArgumentParser(
        prog="alter-peft",
        usage="alter-peft COMMAND [options]",
        description="Machine unlearning for language models as PEFT adapters.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(
            [
                "commands (`alter-peft COMMAND --help` lists the options of one):",
                *lines,
                "",
                "exit statuses:",
                *statuses,
            ]
        ),
    )
    parser.add_argument("--version", action="version", version=f"alter-peft {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The console script `alter-peft`; `STATUSES` says how it ends."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = _parser().parse_args(argv[:1]).command
    try:
        run = COMMANDS[command].function()(argv[1:])
    except Exception as error:
        if not _is_of_input(error):
            raise
        print(f"alter-peft {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    status = run()  # what fails now is no matter of input: its traceback is wanted
    if status:
        raise SystemExit(status)


def _is_of_input(error: Exception) -> bool:
    yaml = sys.modules.get("yaml")  # a command that reads YAML has imported it
    return isinstance(error, (ValueError, OSError) if yaml is None else (ValueError, OSError, yaml.YAMLError))


if __name__ == "__main__":
    main()
