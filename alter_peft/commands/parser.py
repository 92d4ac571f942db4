# SPDX-License-Identifier: Apache-2.0
"""What the commands' options have in common: YAML files, errors that speak of flags, help in sections."""

from __future__ import annotations

import argparse
import copy
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from trl.scripts.utils import TrlParser


CONFIG = "--config"
PACKAGE = __name__.partition(".")[0]  # whose log lines are the users' of a command line to read
METAVARS = {"int": "N", "float": "X"}


def read_config(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """
    The words of a command line without `--config FILE`, and what is in that file, its keys with underscores.

    Raises:
        ValueError: no file, or one that is no YAML of options.
    """
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith(f"{CONFIG}=") else [word])]
    if CONFIG not in words:
        return words, {}
    at = words.index(CONFIG)
    if at + 1 == len(words):
        raise ValueError(f"`{CONFIG}` has no value, but must be the path of a YAML file.")
    path = words[at + 1]
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"`{CONFIG}` is {path!r}, which could not be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"`{CONFIG}` is {path!r}, but must hold lines of option: value, as `learning_rate: 1e-3`.")
    return words[:at] + words[at + 2 :], {key.replace("-", "_"): value for key, value in found.items()}


def neighbour(name: str, known: Collection[str]) -> str:
    """
    The question whether a known name was meant: one with these initials, one that ends or begins so, or a near one;
    nothing if there is none.
    """
    bare, others = name.lstrip("-").replace("-", "_"), [one.lstrip("-").replace("-", "_") for one in known]
    found = [bare] if bare in others else []
    found += [one for one in others if "_" in one and "".join(word[:1] for word in one.split("_")) == bare]
    found += [one for one in others if one.endswith(f"_{bare}")] + [
        one for one in others if one.startswith(f"{bare}_")
    ]
    found = found or get_close_matches(bare, others, n=1)
    return f" Did you mean `{'--' * name.startswith('-')}{found[0]}`?" if found else ""


class CommandParser(argparse.ArgumentParser):
    """A parser that raises what is wrong as one line, as all other bad input is, and knows a mistyped flag."""

    once: Collection[str] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Raise a `ValueError`: what is wrong, with each flag written once."""
        raise ValueError(re.sub(r"(--\w+)(/--?[\w-]+)+", r"\1", message))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """
        As the parent's; an unknown flag is an error before one that is missing because of it.

        Of flags that are given twice the last one counts, as ever, but not where rows would be lost by it.
        """
        seen: set[str] = set()
        for word in args or ():
            if word == "--":
                break
            name = word.partition("=")[0]
            action = self._option_string_actions.get(name)
            if action is not None and (action.nargs in ("*", "+") or action.dest in self.once):
                if action.dest in seen:
                    several = ", with all its values after it" if action.nargs else ""
                    self.error(f"`{name}` is given twice. Give it once{several}.")
                seen.add(action.dest)
            if re.match(r"--?[^\W\d][\w-]*$", name) and name not in self._option_string_actions:
                self.error(f"`{name}` is no option.{neighbour(name, self._option_string_actions) or self._all()}")
        return super().parse_known_args(args, namespace)

    def _all(self) -> str:
        return f" `{self.prog} --help` lists them."


class Section(NamedTuple):
    """A part of a command's help: title, a sentence or nothing, and the options in it."""

    title: str
    text: str
    options: Collection[str]


class _HelpAll(argparse.Action):
    """Prints all options."""

    def __call__(self, parser: Any, *args: Any, **kwargs: Any) -> None:
        print(parser.format_help(hidden=False), end="")
        parser.exit()


class OptionParser(CommandParser, TrlParser):
    """
    TRL's parser of dataclasses and YAML files, with our own options first in its help.

    Args:
        dataclasses: the options are their fields.
        sections: how the help shows them. Options that are in none are shown after them.
        hidden: options that `--help` leaves to `--help-all`.
        required: options that must be given though their dataclass has a default.
        once: options of which a second one is an error. Those that take several values are among them.
    """

    def __init__(
        self,
        dataclasses: Sequence[type],
        *,
        sections: Sequence[Section] = (),
        hidden: Collection[str] = (),
        required: Collection[str] = (),
        once: Collection[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(list(dataclasses), **kwargs)
        self.once = once
        own: dict[str, Any] = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        if hidden:
            self.add_argument("--help-all", action=_HelpAll, nargs=0, help="show all options and exit", **own)
        self.add_argument(CONFIG, metavar="FILE", help="a YAML file of options; a flag overrides it", **own)
        shown = {option for section in sections for option in section.options}
        self.sections, self.hidden = sections, set(hidden) - shown
        self.names = {action.dest for action in self._actions} - {argparse.SUPPRESS}
        for action in self._actions:
            action.required = action.required or action.dest in required

    def parse(self, argv: Sequence[str], config: Mapping[str, Any]) -> Any:
        """
        Instances of the dataclasses.

        Args:
            argv, config: what `read_config` gives.

        Raises:
            ValueError: an option that is unknown, missing or of another type, or what a dataclass refuses.
        """
        for flag, value in pairwise(argv):
            if flag.startswith("--") and not value:
                raise ValueError(f"`{flag}` is empty. Give it a value, or leave it out.")
        environment = config.get("env") or {}
        if not isinstance(environment, dict):
            raise ValueError(f"`env` is {environment!r}, but must be lines of variable: value.")
        os.environ.update({str(name): str(value) for name, value in environment.items()})
        required = {action.dest for action in self._actions if action.required}
        given = {name: value for name, value in config.items() if name != "env"}
        for name in given:
            if name not in self.names:
                raise ValueError(
                    f"`{name}` in the YAML file is no option.{neighbour(name, self.names) or self._all()}"
                )
        self.set_defaults_with_config(
            **{name: value for name, value in given.items() if not (value is None and name in required)}
        )
        with self.in_flags():
            return self.parse_args_into_dataclasses(args=list(argv), look_for_args_file=False)

    @contextmanager
    def in_flags(self, names: Mapping[str, str] | None = None) -> Iterator[Callable[[str], str]]:
        """
        Inside, errors, and what this package logs, name the flag, `--top_k`, where they name an option of a dataclass,
        `top_k`. What is given does the same to any text.

        Args:
            names: what else they may name -> the option that it comes from.
        """
        flags, made = {**{name: name for name in self.names}, **(names or {})}, logging.getLogRecordFactory()

        def flag(found: re.Match[str]) -> str:
            return f"`--{flags[found[1]]}" if found[1] in flags else found[0]

        def said(text: str) -> str:
            return re.sub(r"`(\w+)(?=[`=[])", flag, text)

        def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
            one = made(*args, **kwargs)
            if one.name.partition(".")[0] == PACKAGE:
                one.msg, one.args = said(one.getMessage()), ()
            return one

        logging.setLogRecordFactory(record)
        try:
            yield said
        except ValueError as error:
            raise ValueError(said(str(error))) from error
        finally:
            logging.setLogRecordFactory(made)

    def format_help(self, hidden: bool = True) -> str:
        """The sections, and what is in none; without what is hidden, unless it is to be shown."""
        formatter = argparse.ArgumentDefaultsHelpFormatter(self.prog, max_help_position=30)
        formatter.add_usage(self.usage, (), ())
        formatter.add_text(self.description)
        general = [_shown(action) for action in self._actions if action.dest in (argparse.SUPPRESS, "help")]
        options = {action.dest: _shown(action) for action in reversed(self._actions)}  # the first one of a name
        parts = [(one.title, one.text, [options.pop(name) for name in one.options]) for one in self.sections]
        rest = [one for name, one in options.items() if name in self.names - self.hidden - {"help"}]
        parts += [("further options", "", rest[::-1]), ("help and files", "", general)]
        if not hidden:
            inherited = [options[name] for name in sorted(self.hidden)]
            parts.append(("options inherited from TRL and transformers", "", inherited))
        for title, text, actions in (part for part in parts if part[2]):
            formatter.start_section(title)
            formatter.add_text(text or None)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()


def _shown(action: argparse.Action) -> argparse.Action:
    """The action as the help shows it: one name, what it is to be given, no default where that is nothing."""
    shown = copy.copy(action)
    shown.option_strings = [name for name in action.option_strings if "-" not in name[2:]] or action.option_strings
    if action.default is None or action.default == [] or action.default == {}:
        shown.default = argparse.SUPPRESS
    kind = "" if action.type is None else action.type.__name__  # type: ignore[union-attr]
    if kind == "string_to_bool":
        shown.nargs, shown.metavar = None, "{true,false}"
    elif action.choices is None and kind in METAVARS:
        shown.metavar = METAVARS[kind]
    return shown
