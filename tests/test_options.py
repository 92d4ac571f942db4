# SPDX-License-Identifier: Apache-2.0
"""Options as text and from YAML."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Literal

import pytest
from trl import SFTConfig

from alter_peft.benchmark.methods import read_options
from alter_peft.options import arguments_doc, parse_values
from alter_peft.trainer import AlterUnlearnConfig, UnlearnConfig


@dataclass
class Arguments:
    model: str
    rate: float = 0.1
    rows: int | None = None
    seeds: list[int] = field(default_factory=list)
    form: Literal["letters", "texts"] = "letters"
    books: dict[str, Any] | str | None = None
    loud: bool = False
    steps: int = 1
    names: list[str] = field(default_factory=list)


class Colour(StrEnum):
    RED = "red"


@dataclass
class Choosing:
    colour: Colour | str = Colour.RED
    level: str | None = field(default=None, metadata={"choices": ["info", "debug"]})
    loud: bool | None = None


def test_choices_are_those_of_the_flag():
    """As transformers has them: an Enum's values, or the field's own list."""
    assert parse_values(Choosing, {"colour": "red", "level": "info"}) == {"colour": "red", "level": "info"}
    for name, known in (("colour", "['red']"), ("level", "['info', 'debug']")):
        with pytest.raises(ValueError, match=re.escape(f"`{name}` is 'blue', but must be one of {known}.")):
            parse_values(Choosing, {name: "blue"})


@pytest.mark.parametrize(("given", "expected"), [(0, False), (1, True), ("false", False), (None, None)])
def test_numbers_and_words_for_yes_and_no(given, expected):
    assert parse_values(Choosing, {"loud": given})["loud"] is expected


def test_values_are_those_of_their_fields():
    given = {"model": "m", "rate": "5e-4", "rows": "3", "seeds": ["0", 1], "books": {"forget": 3}, "loud": "true"}
    expected = {**given, "rate": 5e-4, "rows": 3, "seeds": [0, 1], "loud": True}
    assert parse_values(Arguments, given) == expected
    assert parse_values(Arguments, {"model": "m", "seeds": 3, "rows": None}) == {
        "model": "m", "seeds": [3], "rows": None
    }  # fmt: skip
    names = ["a", "-x", "--rows=3", "a b=c", ""]  # none is another flag
    assert parse_values(Arguments, {"model": "-m", "names": names}) == {"model": "-m", "names": names}
    assert parse_values(Arguments, {"model": "m", "seeds": (0, -1), "names": ("a", "b")}) == {
        "model": "m", "seeds": [0, -1], "names": ["a", "b"]
    }  # fmt: skip
    whole = parse_values(Arguments, {"model": "m", "rate": 3, "seeds": []})
    assert whole == {"model": "m", "rate": 3, "seeds": []} and isinstance(whole["rate"], int)  # as it was written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": "high"}, "`rate` is 'high', but must be float."),
        ({"rate": True}, "`rate` is True, but must be float."),
        ({"rate": None}, "`rate` is None, but must be float."),
        ({"model": None}, "`model` is None, but must be str."),
        ({"names": None}, "`names` is None, but must be list[str]."),
        ({"names": ["a", None]}, "`names` is ['a', None], but must be list[str]."),
        ({"steps": True}, "`steps` is True, but must be int."),
        ({"seeds": [True]}, "`seeds` is [True], but must be list[int]."),
        ({"rows": [3]}, "`rows` is [3], but must be int | None."),
        ({"rows": []}, "`rows` is [], but must be int | None."),
        ({"rows": {"a": 1}}, "`rows` is {'a': 1}, but must be int | None."),
        ({"rows": 2.5}, "`rows` is 2.5, but must be int | None."),
        ({"seeds": ["one"]}, "`seeds` is ['one'], but must be list[int]."),
        ({"form": "words"}, "`form` is 'words', but must be 'letters' or 'texts'."),
        ({"loud": "perhaps"}, "`loud` is 'perhaps', but must be bool."),
    ],
)
def test_what_no_flag_takes_is_refused(changes, message):
    with pytest.raises(ValueError) as raised:
        parse_values(Arguments, {"model": "m", **changes})
    assert str(raised.value) == message


def test_the_configurations_of_the_trainers_are_read():
    options = {"learning_rate": "5e-4", "lr_scheduler_kwargs": {"a": 1}, "lr_scheduler_type": "constant"}
    assert parse_values(SFTConfig, options) == {**options, "learning_rate": 5e-4}
    assert parse_values(AlterUnlearnConfig, {"stopping_tolerance": None}) == {"stopping_tolerance": None}
    with pytest.raises(ValueError, match="`structural_interval` is 'often', but must be int"):
        parse_values(AlterUnlearnConfig, {"structural_interval": "often"})
    with pytest.raises(ValueError, match=r"`forget_loss` is 'flat', but must be one of \['tokens', 'soft_targets'"):
        read_options("alter", {"forget_loss": "flat"})
    with pytest.raises(ValueError, match=r"'full_ga' have `adapter` .*, but all weights are trained. Remove it"):
        read_options("full_ga", {"adapter": {"r": 4}})


def test_the_docstring_lists_the_help_of_the_fields_that_a_class_declares():
    @dataclass
    class Parent:
        inherited: int = field(default=0, metadata={"help": "Not said again."})

    @arguments_doc
    @dataclass
    class Child(Parent):
        """
        A summary.

        Raises:
            ValueError: a value out of its range.
        """

        rate: float = field(default=0.1, metadata={"help": "How fast."})
        rows: int | None = field(default=None, metadata={"help": "How many. " + "All by default. " * 8})
        names: list[str] = field(default_factory=list, metadata={"help": "Which."})

    assert Child.__doc__ is not None
    lines = Child.__doc__.splitlines()
    assert lines[:5] == ["A summary.", "", "Raises:", "    ValueError: a value out of its range.", ""]
    assert lines[5:8] == ["Args:", "    rate (`float`, *optional*, defaults to `0.1`):", "        How fast."]
    assert lines[8] == "    rows (`int | None`, *optional*):" and lines[9].startswith("        How many. All by")
    assert lines[-2:] == ["    names (`list[str]`, *optional*, defaults to `[]`):", "        Which."]
    assert max(map(len, lines)) <= 119 and Child(rate=0.2).rate == 0.2


@pytest.mark.parametrize("config", [UnlearnConfig, AlterUnlearnConfig])
def test_the_configurations_of_the_trainers_list_the_help_of_their_own_fields(config):
    own, words = inspect.get_annotations(config), " ".join(config.__doc__.split())
    assert len(own) > 6
    for option in fields(config):
        if option.name in own:
            assert f"{option.name} (`" in words and option.metadata["help"] in words, option.name
