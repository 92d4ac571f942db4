# SPDX-License-Identifier: Apache-2.0
"""What every command's options have in common: help, mistyped names, YAML files, exit statuses."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from pathlib import Path

import pytest
from test_registration import run_fresh
from trl import SFTConfig

from alter_peft.benchmark.arguments import BenchmarkArguments
from alter_peft.cli import COMMANDS, STATUSES, Command, main
from alter_peft.commands.parser import CommandParser, OptionParser, Section, neighbour, read_config
from alter_peft.evaluation.arguments import EvaluateArguments
from alter_peft.options import option
from alter_peft.version import __version__


ROOT = Path(__file__).parents[1]


def ended(capsys, *argv: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a command that ends by itself."""
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    return (stop.value.code, *capsys.readouterr())


# ---- the entry ------------------------------------------------------------------------------------------------------


def test_help_is_there_within_a_second_with_a_line_a_command():
    code = "import time\nfrom alter_peft.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n"
    *said, seconds = run_fresh(code + "    print(time.process_time())").splitlines()
    assert float(seconds) < 1
    for name, command in COMMANDS.items():
        assert f"  {name:<10} {command.caption}" in said
    for status, text in STATUSES.items():
        assert f"  {status}  {text}" in said


def test_version(capsys):
    assert ended(capsys, "--version")[:2] == (0, f"alter-peft {__version__}\n")


def test_a_mistyped_command_names_its_neighbour(capsys):
    status, _, err = ended(capsys, "unlern")
    assert status == 2 and "Did you mean unlearn?" in err
    assert "Did you mean" not in ended(capsys, "zzz")[2]


@pytest.mark.parametrize("returned", [None, 0, 3])
def test_the_status_is_what_the_run_returns(monkeypatch, capsys, returned):
    monkeypatch.setitem(COMMANDS, "made_up", Command("", "made_up:home"))
    monkeypatch.setattr(Command, "function", lambda self: lambda argv: lambda: returned)
    if returned:
        assert ended(capsys, "made_up")[0] == returned
    else:
        main(["made_up"])


def test_the_statuses_are_documented():
    page = (ROOT / "docs/cli.md").read_text()
    assert all(f"| {status} | {text}" in page for status, text in STATUSES.items())
    assert all(f"`{name}`" in page for name in COMMANDS)


# ---- help -----------------------------------------------------------------------------------------------------------


def test_our_own_options_come_first_and_inherited_ones_on_demand(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "119")
    status, said, _ = ended(capsys, "unlearn", "--help")
    assert status == 0 and said.index("--forget FORGET") < said.index("--forget_loss ") < said.index("--learning_rate")
    assert len(said.splitlines()) < 250 and "--help-all" in said and "--torch_compile" not in said
    assert "--output-dir" not in said and "--no_" not in said and "default: None" not in said
    status, everything, _ = ended(capsys, "unlearn", "--help-all")
    assert status == 0
    for name in (field.name for field in dataclasses.fields(SFTConfig) if field.init):
        assert f"  --{name} " in everything or f"  --{name}\n" in everything, name


@pytest.mark.parametrize(("name", "cls"), [("evaluate", EvaluateArguments), ("benchmark", BenchmarkArguments)])
def test_every_option_is_in_the_help_once(capsys, name, cls):
    _, said, _ = ended(capsys, name, "--help")
    flags = re.findall(r"^  (--\w+)", said, flags=re.MULTILINE)
    assert sorted(flags) == sorted([*(f"--{field.name}" for field in dataclasses.fields(cls)), "--config"])
    assert "further options" not in said  # each is in a section


@pytest.mark.parametrize("name", ["generate", "report"])
def test_small_commands_have_help_too(capsys, name):
    status, said, _ = ended(capsys, name, "--help")
    assert status == 0 and f"usage: alter-peft {name}" in said


# ---- mistyped, missing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("unlearn --foget f.jsonl", "`--foget` is no option. Did you mean `--forget`?"),
        ("unlearn --output-dri out", "`--output-dri` is no option. Did you mean `--output_dir`?"),
        ("unlearn --epochs=3", "`--epochs` is no option. Did you mean `--num_train_epochs`?"),
        ("unlearn --zzz 1", "`--zzz` is no option. `alter-peft unlearn --help` lists them."),
        ("unlearn -model m", "`-model` is no option. Did you mean `--model`?"),
        ("generate --promt x", "`--promt` is no option. Did you mean `--prompt`?"),
        ("evaluate --metric x", "`--metric` is no option. Did you mean `--metrics`?"),
        ("report --output x", "`--output` is no option. Did you mean `--output_dir`?"),
        ("unlearn --model m --forget f --retain r", "the following arguments are required: --output_dir"),
        ("unlearn --output_dir o", "the following arguments are required: --model, --forget"),
        ("unlearn --max_steps many", "argument --max_steps: invalid int value: 'many'"),
        ("unlearn --config", "`--config` has no value"),
    ],
)
def test_one_line_says_what_is_wrong_with_the_flags(capsys, argv, said):
    status, out, err = ended(capsys, *argv.split())
    name = argv.split()[0]
    assert (status, out) == (2, "") and err.startswith(f"alter-peft {name}: error: {said}") and err.count("\n") == 1


def test_values_that_look_like_flags_are_values():
    parser = CommandParser(prog="x")
    parser.add_argument("--number", type=float)
    parser.add_argument("--text")
    parser.add_argument("rest", nargs="*")
    given = parser.parse_args(["--number", "-1.5", "--text=--foo", "--", "--bar"])
    assert (given.number, given.text, given.rest) == (-1.5, "--foo", ["--bar"])
    assert parser.parse_args(["--text", "--why me"]).text == "--why me"


def test_no_neighbour_where_none_is_near():
    assert neighbour("--qqq", ["--forget", "--retain"]) == ""


# ---- YAML -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Made:
    """Options made up for these tests."""

    model_name: str = dataclasses.field(metadata={"help": "Whose."})
    top_k: int = option(3, "How many.")
    names: list[str] = option([], "Which.")
    is_quiet: bool = option(True, "Whether.")
    place: str | None = option(None, "Where.")

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"`top_k` is {self.top_k}, but must be 1 or more: see `rows`.")


def parser(**kwargs):
    return OptionParser((Made,), prog="alter-peft made", **kwargs)


def parse(tmp_path, text, *argv, **kwargs):
    (tmp_path / "options.yaml").write_text(text)
    return parser(**kwargs).parse(*read_config([*argv, "--config", str(tmp_path / "options.yaml")]))[0]


@pytest.mark.parametrize(
    "text", ["model-name: m\ntop-k: 2\nis_quiet: false\n", "model_name: m\ntop_k: 2\nis-quiet: no"]
)
def test_dashes_and_underscores_are_the_same_in_yaml_and_flags(tmp_path, text):
    given = parse(tmp_path, text)
    assert (given.model_name, given.top_k, given.is_quiet) == ("m", 2, False)
    given = parse(tmp_path, text, "--top-k", "5", "--model-name=n")
    assert (given.model_name, given.top_k) == ("n", 5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model_nam: m", "`model_nam` in the YAML file is no option. Did you mean `model_name`?"),
        ("zzz: m", "`zzz` in the YAML file is no option. `alter-peft made --help` lists them."),
        ("- m", "must hold lines of option: value"),
        ("", "must hold lines of option: value"),
        ("on: m", "must hold lines of option: value"),  # YAML reads true
        ("a: [", "could not be read"),
        ("model_name: null", "required: --model_name"),
        ("model_name: m\ntop_k: 0", "`--top_k` is 0, but must be 1 or more: see `rows`."),
        ("model_name: m\ntop_k: few", "argument --top_k: invalid int value: 'few'"),
        ("model_name: m\nenv: 3", "`env` is 3"),
    ],
)
def test_one_line_says_what_is_wrong_with_the_file(tmp_path, text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse(tmp_path, text)


def test_a_file_may_set_the_environment_as_trls_do(tmp_path, monkeypatch):
    monkeypatch.setenv("ALTER_PEFT_TEST", "before")
    parse(tmp_path, "model_name: m\nenv: {ALTER_PEFT_TEST: 7}")
    assert os.environ["ALTER_PEFT_TEST"] == "7"


def test_errors_speak_of_flags(tmp_path):
    made = parser()
    with pytest.raises(ValueError, match=re.escape("`--top_k`, `--top_k=3`, `--names[0]`, `--place` not `column`")):
        with made.in_flags({"train_dataset": "place"}):
            raise ValueError("`top_k`, `top_k=3`, `names[0]`, `train_dataset` not `column`")


def test_so_do_log_lines_of_the_package_alone(tmp_path, caplog):
    made = parser()
    with made.in_flags({"train_dataset": "place"}) as said:
        logging.getLogger("alter_peft.trainer.rows").warning("`%s` and `top_k=3`", "train_dataset")
        logging.getLogger("transformers").warning("`top_k`")
        assert said("`top_k`: 3") == "`--top_k`: 3"
    logging.getLogger("alter_peft").warning("`top_k` again")
    assert [one.getMessage() for one in caplog.records] == ["`--place` and `--top_k=3`", "`top_k`", "`top_k` again"]


def test_a_required_option_may_have_a_default_of_its_class(tmp_path):
    with pytest.raises(ValueError, match="required: --place"):
        parse(tmp_path, "model_name: m", required=["place"])
    assert parse(tmp_path, "model_name: m\nplace: here", required=["place"]).place == "here"


def test_sections_and_what_is_hidden():
    made = parser(
        sections=[Section("first", "Said.", ["top_k"]), Section("none", "Empty.", [])], hidden=["names", "top_k"]
    )
    brief, full = made.format_help(), made.format_help(hidden=False)
    assert brief.index("first:") < brief.index("--top_k N") < brief.index("further options:") < brief.index("--place")
    assert "--names" not in brief and "--names" in full and "Empty." not in brief
    assert "--is_quiet {true,false}" in brief and "--no_is_quiet" not in full


def test_yaml_of_unlearn_with_dashes_and_true(tmp_path, monkeypatch):
    """As far as the trainer, which is not made here."""
    from alter_peft.commands import unlearn

    seen = {}
    monkeypatch.setattr(unlearn, "checkpoint_to_resume", lambda given, _: seen.update(given=str(given)))
    monkeypatch.setattr(unlearn, "_trainer", lambda script, args, *_: seen.update(vars(script), args=args))
    options = {"model": "m", "forget": "f", "retain": "r", "output-dir": str(tmp_path), "resume-from-checkpoint": True}
    (tmp_path / "o.yaml").write_text(json.dumps(options))
    unlearn.unlearn([f"--config={tmp_path / 'o.yaml'}"])
    assert seen["model"] == "m" and seen["args"].output_dir == str(tmp_path)
    assert seen["given"] == str(True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--forget", "a.jsonl", "--forget", "b.jsonl"], "`--forget` is given twice"),
        (["--columns", "prompt=a", "--columns", "completion=b"], "`--columns` is given twice"),
        (["--forget", "", "--model", "m"], "`--forget` is empty"),
        (["--lr", "1e-3"], "Did you mean `--learning_rate`?"),
        (["--batch_size", "4"], "Did you mean `--per_device_train_batch_size`?"),
        (["--resume", "true"], "Did you mean `--resume_from_checkpoint`?"),
        (["--learning_rate", "-1"], "`--learning_rate` is -1.0, but must be a finite number"),
        (["--per_device_train_batch_size", "0"], "`--per_device_train_batch_size` is 0, but must be 1 or more"),
    ],
)
def test_what_is_given_twice_or_empty_or_too_small(argv, message, capsys):
    rest = [word for name in ("model", "forget", "retain", "output_dir") for word in (f"--{name}", "x")]
    given = {word.replace("-", "_") for word in argv}
    rest = [word for flag, value in zip(rest[::2], rest[1::2], strict=True) for word in (flag, value)
            if flag.replace("-", "_") not in given]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(["unlearn", *argv, *rest])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and message in err.splitlines()[-1]


def test_what_is_read_is_not_written_over(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    argv = [
        "--model",
        str(tmp_path / "model"),
        "--forget",
        "f",
        "--retain",
        "r",
        "--output_dir",
        str(tmp_path / "model"),
    ]
    with pytest.raises(SystemExit):
        main(["unlearn", *argv])
    assert "which `--model` is read from" in capsys.readouterr().err.splitlines()[-1]


def test_a_file_that_is_no_result_is_not_written_over(tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "Who?"}')
    argv = ["--model", "m", "--sets", "a=b.jsonl", "--output_file"]
    for output, message in (
        ("mine.jsonl", "is no result of an evaluation"),
        ("mine.jsonl/x.json", "`--output_file` is"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", *argv, str(tmp_path / output)])
        assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
