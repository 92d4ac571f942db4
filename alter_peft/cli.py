# SPDX-License-Identifier: Apache-2.0
"""The command line: what there is, without importing it; what is chosen is imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
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
    FAILED: "failed while running: the traceback is printed, or one line if the disk is full or a push failed",
    BAD_INPUT: "unusable input: one line says what and how to mend it; nothing was computed",
    MEASURED_AND_FAILED: "measured, and the result is not what it should be",
}


def _parser() -> argparse.ArgumentParser:
    lines = [f"  {name:<10} {command.caption}" for name, command in COMMANDS.items()]
    statuses = [f"  {status}  {text}" for status, text in STATUSES.items()]
    parser = argparse.ArgumentParser(
        prog="alter-peft",
        usage="alter-peft COMMAND [options]",
        description="Machine unlearning for language models, as PEFT adapters.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(
            ["commands (alter-peft COMMAND --help shows the options of one):", *lines, "", "exit statuses:", *statuses]
        ),
    )
    parser.add_argument("--version", action="version", version=f"alter-peft {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of those below")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The console script `alter-peft`; `STATUSES` says how it ends."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    name = parser.parse_args(argv[:1]).command
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        parser.error(
            f"{name!r} is none of the commands {', '.join(COMMANDS)}.{f' Did you mean {near[0]}?' if near else ''}"
        )
    try:
        run = COMMANDS[name].function()(argv[1:])
    except (ValueError, OSError) as error:
        print(f"alter-peft {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    try:
        status = run()  # what fails now is no matter of input: its traceback is wanted
    except OSError as error:
        if not _is_explained(error):
            raise
        print(f"alter-peft {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(FAILED) from None
    if status:
        raise SystemExit(status)


def _is_explained(error: OSError) -> bool:
    """Whether it says all by itself: a command that saves or pushes has imported these."""
    homes = {"alter_peft.tuner.saving": "NotSavedError", "alter_peft.trainer.pushing": "NotPushedError"}
    return any(isinstance(error, vars(sys.modules[home])[name]) for home, name in homes.items() if home in sys.modules)


if __name__ == "__main__":
    main()
