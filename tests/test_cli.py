# SPDX-License-Identifier: Apache-2.0
"""The command line end to end, in this process, on a tiny model."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields
from inspect import get_annotations
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from alter_peft import AlterConfig, AlterUnlearnConfig, UnlearnConfig
from alter_peft.cli import main
from alter_peft.commands.adapters import ADAPTERS


FORGET = [
    {"prompt": "Where does Alice live?", "completion": " Alice lives in Paris.", "domain": "person"},
    {"prompt": "What does Bob bake?", "completion": " Bob bakes rye bread.", "domain": "recipe"},
]
RETAIN = [
    {"prompt": "What colour is the sky?", "completion": " The sky is blue."},
    {"prompt": "What do bees make?", "completion": " Bees make honey."},
]
QUICK = ["--bf16", "false", "--max_steps", "2", "--logging_steps", "1", "--report_to", "none"]
QUICK += ["--disable_tqdm", "true", "--dataloader_pin_memory", "false", "--entropy_quantile", "0.7"]
QUICK += ["--force"]  # a random model knows no row


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tokenizer, tmp_path, monkeypatch):
    """A tiny model and data on disk, as the flags that name them."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    base = tmp_path / "base"
    make_llama(len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    return {
        "--model": str(base),
        "--forget": write_rows(tmp_path / "forget.jsonl", FORGET),
        "--retain": write_rows(tmp_path / "retain.jsonl", RETAIN),
        "--output_dir": str(tmp_path / "out"),
    }


def flags(files, *more):
    return ["unlearn", *(part for pair in files.items() for part in pair), *QUICK, *more]


def plain_flags(files, *more):
    """Without those of an ALTER adapter."""
    quick = [flag for flag in QUICK if flag not in ("--entropy_quantile", "0.7")]
    return ["unlearn", *(part for pair in files.items() for part in pair), *quick, *more]


def saved_config(files):
    with open(f"{files['--output_dir']}/adapter_config.json") as file:
        return json.load(file)


def test_subjects_of_a_column_are_taken(files, tmp_path, capsys):
    named = [{**FORGET[0], "subject": "Paris"}, {**FORGET[1], "subject": ["Bob", "rye"]}]
    main(flags({**files, "--forget": write_rows(tmp_path / "named.jsonl", named)}, "--counterfactual_copies", "2"))
    assert "\nsubjects: Paris (1 row), Bob (1 row)\n" in capsys.readouterr().out


def test_unlearn_then_generate(files, capsys):
    main(
        flags(
            files,
            "--r",
            "4",
            "--target_modules",
            "q_proj",
            "v_proj",
            "--rank_pattern",
            '{"q_proj": 2}',
            "--stopping_tolerance",
            "1e-9",
            "--retain_weight",  # else nothing would move, for rows that nobody knows
            "1",
        )
    )
    out = capsys.readouterr().out
    assert "sub-domain person: 1 row to forget\nsub-domain recipe: 1 row to forget\n" in out
    assert "\nsubjects: Alice (1 row), Bob (1 row)\n" in out
    assert re.search(r"never seen: [\d.e-]+ \(a guess", out) and "come to their level" not in out
    assert re.search(r"^to forget:  [\d.e-]+ -> [\d.e-]+ \(2 rows\)$", out, re.MULTILINE), out
    assert re.search(r"^astray: +[\d.]+% of the tokens to forget", out, re.MULTILINE), out
    assert "2 steps, 2 epochs\n" in out and f"adapter: {files['--output_dir']}" in out
    assert "loss/forget: " not in out  # these are in the log
    config = saved_config(files)
    assert config["r"] == 4 and set(config["target_modules"]) == {"q_proj", "v_proj"}
    assert config["rank_pattern"] == {"q_proj": 2} and config["domains"] == ["person", "recipe"]

    prompts = ["--prompt", "Where does Alice live?", "--prompt", "What do bees make?"]
    ask = ["generate", "--adapter", files["--output_dir"], *prompts, "--max_new_tokens", "4"]
    main(ask)
    plain = capsys.readouterr().out
    assert plain.count("adapter: ") == 2 and "base: " not in plain
    main([*ask, "--model", files["--model"], "--without_adapter"])
    both = capsys.readouterr().out
    assert both.count("adapter: ") == both.count("base: ") == 2
    assert [line for line in both.splitlines() if not line.startswith("base: ")] == plain.splitlines()


def test_unlearn_says_what_it_found(files, tmp_path, capsys):
    """The terms of discovered sub-domains, the level that was measured, and that training landed."""
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in FORGET * 2]
    forget = write_rows(tmp_path / "unnamed.jsonl", rows)
    unseen = write_rows(tmp_path / "unseen.jsonl", [{"prompt": "Where does Carl live?", "completion": " In Oslo."}])
    more = ["--num_forget_experts", "2", "--calibration", unseen, "--stopping_tolerance", "1000"]
    main(flags({**files, "--forget": forget}, *more))
    out = capsys.readouterr().out
    for name in ("domain_1", "domain_2"):
        assert re.search(rf"^sub-domain {name}: 2 rows to forget \(\w+-\w+\)$", out, re.MULTILINE), out
    assert re.search(r"^never seen: [\d.e-]+ \(1 row\)$", out, re.MULTILINE), out
    assert "result:     there was nothing to forget" in out  # `--force`: the model is random


def test_what_is_logged_and_printed_speaks_of_flags(files, tmp_path, capsys, caplog):
    """Before the training as in it, and numbers agree with what they count."""
    forget = write_rows(
        tmp_path / "unnamed.jsonl", [{"prompt": row["prompt"], "completion": row["completion"]} for row in FORGET]
    )
    main(
        flags(
            {**files, "--forget": forget}, "--stopping_tolerance", "1e-9", "--max_steps", "1", "--retain_weight", "1"
        )
    )
    said = capsys.readouterr()
    logged = [one.getMessage() for one in caplog.records if one.name.startswith("alter_peft")]
    text = "\n".join([*logged, said.out, said.err])
    assert (
        "`--forget` has no column `domain`: its 2 rows were sorted into" in text
        and "set `--num_forget_experts`" in text
    )
    assert "Without calibration rows (`--calibration`) forget rows come to what general text shows" in text
    assert "trained:    1 step, 1 epoch\n" in said.out
    for name in ("train_dataset", "retain_dataset", "calibration_dataset", "num_forget_experts`", "`forget_level"):
        assert not re.search(f"(?<!--){name}", text), text


@pytest.mark.parametrize("kind", ["alter", "lora", "none"])
def test_nothing_to_forget_is_a_status_of_its_own(files, tmp_path, capsys, kind):
    """The three numbers, one sentence, and no training; `--force` trains all the same."""
    given = flags(files) if kind == "alter" else plain_flags(files, "--adapter", kind)
    given.remove("--force")
    with pytest.raises(SystemExit) as stop:
        main(given)
    said = capsys.readouterr()
    assert stop.value.code == 3 and not (tmp_path / "out" / "config.json").exists()
    assert "answer probability (geometric mean over rows) before the training:\n" in said.out
    assert re.search(
        r"before the training:\nto forget:  [\d.e-]+ \(2 rows\)\nnever seen: [\d.e-]+ \(a guess.*\nto retain:  \S+",
        said.out,
    )
    assert said.err.count("The model does not know the rows to forget") == 1 and "--force" in said.err
    assert "before -> after" not in said.out
    main([*given, "--force"])
    assert "before -> after" in capsys.readouterr().out


def test_what_was_not_forgotten_is_a_status_of_its_own(files, capsys):
    """A level far below what the random model gives the rows: known, and a rate of nearly 0 changes nothing."""
    given = flags(files, "--forget_level", "1e-12", "--learning_rate", "1e-12", "--init_weights", "false")
    with pytest.raises(SystemExit) as stop:
        main(given)
    out = capsys.readouterr().out
    assert stop.value.code == 3 and "result:     not forgotten" in out
    assert Path(files["--output_dir"], "adapter_config.json").is_file()  # saved, for whoever wants to look


def test_a_run_is_resumed_from_its_last_checkpoint(files, tmp_path, capsys):
    out, every = tmp_path / "out", ("--save_steps", "1", "--stopping_tolerance", "1e-9")
    main(flags(files, *every))
    first = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "README.md"}
    shutil.rmtree(out)
    main(flags(files, *every, "--resume_from_checkpoint", "true"))
    again = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "README.md"}
    assert {name: first[name] == again[name] for name in first | again} == dict.fromkeys(first, True)


def test_no_run_goes_on_with_something_else(files, tmp_path, capsys):
    """One line with the flag, both values and the fix, and nothing is computed."""
    every = ("--save_steps", "1", "--stopping_tolerance", "1e-9")
    main(flags(files, *every))
    capsys.readouterr()
    shutil.rmtree(tmp_path / "cache")
    more = write_rows(tmp_path / "more.jsonl", [*RETAIN, {"prompt": "Who sang?", "completion": " A lark sang."}])
    others = {
        ("--retain", more): "`--retain` has 3 rows, but the checkpoint '",
        ("--r", "4"): "`--r` is 4, but the checkpoint '",
        ("--router_half_life", "3"): "`--router_half_life` is 3.0, but the checkpoint '",
        ("--adapter", "lora"): "`--adapter` makes an adapter of the kind LORA, but the checkpoint '",
    }
    for (flag, value), said in others.items():
        with pytest.raises(SystemExit) as stopped:
            given = (plain_flags if flag == "--adapter" else flags)({**files, flag: value}, *every)
            main([*given, "--resume_from_checkpoint", "true"])
        error = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and said in error and "without `--resume_from_checkpoint`, and with" in error
    assert not (tmp_path / "cache" / "alter_peft").exists()


@pytest.mark.parametrize("given", ["true", "checkpoint-9"])
def test_what_cannot_be_resumed_is_one_line(files, tmp_path, capsys, given):
    with pytest.raises(SystemExit) as stopped:
        main(flags(files, "--resume_from_checkpoint", given))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "resume_from_checkpoint" in error and "no whole" in error
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_is_one_line(files, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    with pytest.raises(SystemExit) as stopped:
        main(flags(files))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 1
    assert re.fullmatch(
        r"alter-peft unlearn: error: nothing could be saved to '.*' \(No space left.*\)\. Free .*", error
    )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("loss", ["npo", "level"])
def test_plain_lora_unlearns_with_any_loss(files, capsys, loss):
    main(plain_flags(files, "--adapter", "lora", "--forget_loss", loss, "--r", "4", "--learning_rate", "1e-2"))
    assert f"adapter: {files['--output_dir']}" in capsys.readouterr().out
    config = saved_config(files)
    assert (config["peft_type"], config["r"]) == ("LORA", 4)
    assert {"q_proj", "down_proj"} < set(config["target_modules"])


def test_all_weights_unlearn(files, capsys):
    main(plain_flags(files, "--adapter", "none", "--forget_loss", "ga"))
    assert f"model: {files['--output_dir']}" in capsys.readouterr().out
    assert not (Path(files["--output_dir"]) / "adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained(files["--output_dir"])


@pytest.mark.parametrize("adapter", ["alter", "lora", "none"])
def test_a_loss_of_alternate_answers_unlearns(files, tmp_path, capsys, adapter):
    """Those of the column `alternate`, in place of refusals; it is said to be taken."""
    rows = [{**row, "alternate": f" It is not known {number}."} for number, row in enumerate(FORGET)]
    files["--forget"] = write_rows(tmp_path / "forget.jsonl", rows)
    make = flags if adapter == "alter" else plain_flags
    main(make(files, "--adapter", adapter, "--forget_loss", "idkdpo", "--forget_loss_kwargs", '{"beta": 0.2}'))
    said = capsys.readouterr().out
    assert "alternate" in said.splitlines()[0] and "left alone" not in said.splitlines()[0]


@pytest.mark.parametrize("flag", ["--router", "--structural_weight"])
def test_an_option_of_another_kind_of_adapter_is_refused(files, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        main(plain_flags(files, "--adapter", "lora", flag, "1"))
    said = f"`{flag}` is an option of `--adapter alter`, but `--adapter` is 'lora'. Remove it."
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_no_flag_is_cut_short(files, capsys):
    """Or `--adap lora` would train an ALTER adapter."""
    with pytest.raises(SystemExit) as stop:
        main(plain_flags(files, "--adap", "lora"))
    assert stop.value.code == 2 and "--adap" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["--adapter", "--model"])
def test_what_generate_cannot_load_is_named(tmp_path, capsys, name):
    given = {"--adapter": "nowhere", **({"--model": "nowhere"} if name == "--model" else {})}
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--prompt", "Who?", *(text for flag in given.items() for text in flag)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"`{name}` is 'nowhere', which could not be loaded" in said


def test_an_unknown_adapter_in_yaml_is_refused(files, tmp_path, capsys):
    """As a flag it is the parser's to refuse, which does not look at defaults."""
    (tmp_path / "options.yaml").write_text("adapter: dora\n")
    with pytest.raises(SystemExit) as stop:
        main(
            ["unlearn", "--config", str(tmp_path / "options.yaml"), *(text for flag in files.items() for text in flag)]
        )
    assert stop.value.code == 2
    assert "`--adapter` is 'dora', but must be one of ['alter', 'lora', 'none']." in capsys.readouterr().err


def test_flags_override_yaml(files, tmp_path):
    options = {name.removeprefix("--"): value for name, value in files.items()}
    options |= {"r": 2, "target_modules": "all-linear", "init_weights": "cluster", "learning_rate": 1e-2}
    options |= {
        "dataloader_pin_memory": False,
        "bf16": False,
        "max_steps": 1,
        "report_to": "none",
        "top_k": 1,
        "entropy_quantile": 0.7,
        "force": True,
    }
    options |= {"domains": ["person", "recipe"], "rank_pattern": {"q_proj": 3}, "modules_to_save": "lm_head"}
    options |= {
        "forget_loss": "hinge",
        "forget_loss_kwargs": '{"margin": 0.25}',
        "structural_interval": 3,
        "seed": 5,
        "retain_weight": 2,
    }
    path = tmp_path / "options.yaml"
    path.write_text(json.dumps(options))  # JSON is YAML
    unseen = write_rows(tmp_path / "unseen.jsonl", [{"prompt": "Where does Carl live?", "completion": " In Oslo."}])
    flagged = ["--r", "4", "--structural_interval", "7", "--calibration", unseen]
    main(["unlearn", "--config", str(path), *flagged])
    config = saved_config(files)
    assert config["r"] == 4 and config["top_k"] == 1 and config["init_weights"] == "cluster"
    assert config["rank_pattern"] == {"q_proj": 3} and config["modules_to_save"] == ["lm_head"]
    args = torch.load(tmp_path / "out-checkpoints" / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert (args.forget_loss, args.loss_options, args.retain_weight, args.seed) == ("hinge", {"margin": 0.25}, 2.0, 5)
    assert (args.learning_rate, args.max_steps) == (1e-2, 1) and args.structural_interval == 7


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (["--r", "0"], "`--r`"),
        (["--structural_q", "-1"], "`--structural_q`"),
        (["--top_k", "0"], "`--top_k`"),
        (["--router", "magic"], "`--router` is 'magic', but must be 'context' or"),
        (["--init_weights", "maybe"], "init_weights"),
        (["--rank_pattern", "q_proj=4"], "`--rank_pattern`"),
        (["--forget", "nowhere.jsonl"], "`--forget`"),
        (["--calibration", "nowhere.csv"], "`--calibration`"),
        (["--no_such_option", "1"], "--no_such_option"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--config"], "`--config`"),
        (["--model", "nowhere"], "`--model` is 'nowhere'"),
    ],
)
def test_bad_input_ends_with_code_2_and_names_the_field(files, capsys, wrong, name):
    with pytest.raises(SystemExit) as ended:
        main(flags(files, *wrong))
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert name in err.splitlines()[-1] and "Traceback" not in err


def test_bad_rows_are_named(files, tmp_path, capsys):
    whole = '{"prompt": "Who?", "completion": " Bob.", "topic": "x"}\n'
    for text in ('{"question": "Who?"}\n', "this is not JSON\n", whole + '{"prompt": "Who?", "completion": null}\n'):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(SystemExit) as ended:
            main(flags({**files, "--retain": str(tmp_path / "bad.jsonl")}))
        assert ended.value.code == 2
        assert "`--retain" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("argv", [[], ["relearn"], ["generate", "--adapter", "x"]])
def test_wrong_commands_end_with_code_2(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2


def test_help_lists_the_options_of_both_configs(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["unlearn", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for option in ("--router", "--structural_weight", "--forget", "--target_modules", "--learning_rate"):
        assert option in out
    said = "".join(out.split())  # lines break at hyphens too
    own = [*get_annotations(UnlearnConfig), *get_annotations(AlterUnlearnConfig)]
    texts = [option.metadata["help"] for option in fields(AlterUnlearnConfig) if option.name in own]
    of_files = {"alter_peft_version", "format_version", "weights_sha256"}  # written by themselves
    mine = [option for option in fields(AlterConfig) if option.name in get_annotations(AlterConfig)]
    texts += [option.metadata["help"] for option in mine if option.name not in of_files]
    assert len(texts) > 30 and all("".join(text.split()) in said for text in texts)
    assert not [name for name in of_files if f"--{name}" in out]


@pytest.mark.parametrize("name", ["alter_peft_version", "format_version", "weights_sha256"])
def test_what_is_written_by_itself_is_no_option(files, name, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"{name}: 1\n")
    for given in ([f"--{name}", "1"], ["--config", str(tmp_path / "run.yaml")]):
        with pytest.raises(SystemExit) as ended:
            main(flags(files, *given))
        assert ended.value.code == 2 and name in capsys.readouterr().err


def test_yaml_that_is_none(files, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("r: [1\n")
    with pytest.raises(SystemExit) as ended:
        main(flags(files, "--config", str(tmp_path / "bad.yaml")))
    assert ended.value.code == 2 and "bad.yaml" in capsys.readouterr().err


def test_what_fails_in_training_shows_where(files, monkeypatch):
    def fail(self, *args, **kwargs):
        raise ValueError("at step 500")

    monkeypatch.setattr("alter_peft.trainer.AlterUnlearnTrainer.train", fail)
    with pytest.raises(ValueError, match="at step 500"):
        main(flags(files))


@pytest.mark.parametrize("given", [[5, 6], {"embed_tokens": [5, 6]}])
def test_trained_tokens_are_a_list_or_an_object(given):
    assert ADAPTERS["alter"].make({"trainable_token_indices": given}).trainable_token_indices == given
