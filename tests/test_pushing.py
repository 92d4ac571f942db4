# SPDX-License-Identifier: Apache-2.0
"""Logs and pushes to elsewhere: what cannot be is said before the training, and after one nothing is lost by it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError
from test_cli import files, flags  # noqa: F401
from trainer_setup import make_args, make_trainer
from transformers.trainer import hf_api

from alter_peft.cli import main
from alter_peft.trainer.pushing import NotPushedError


class NoWay(HfHubHTTPError.__bases__[0]):  # type: ignore[misc]
    """As the client's library says that there is no network: no `OSError`."""


def no_way(*args, **kwargs):
    raise NoWay("[Errno -2] Name or service not known")


@pytest.fixture
def logged_in(monkeypatch):
    """On a Hub that has any repository."""
    monkeypatch.setattr("alter_peft.trainer.pushing.is_offline_mode", lambda: False)
    monkeypatch.setattr("alter_peft.trainer.pushing.get_token", lambda: "hf_token")
    api = type(hf_api())
    monkeypatch.setattr(api, "create_repo", lambda *args, **kwargs: SimpleNamespace(repo_id="alice/adapter"))
    return api


@pytest.mark.parametrize(
    "given, said",
    [
        ("no_such_thing", "`--report_to` has 'no_such_thing', but must be 'none', 'all' or some of ['"),
        (
            "comet_ml",
            "`--report_to` has 'comet_ml', which cannot be used here (its package is not installed or not set up)",
        ),
    ],
)
def test_where_no_logs_can_go_is_one_line(files, capsys, monkeypatch, given, said):  # noqa: F811
    monkeypatch.setattr("alter_peft.trainer.config.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(SystemExit) as stopped:
        main(flags(files, "--report_to", given))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and said in error


def test_python_names_the_argument(tmp_path, monkeypatch):
    monkeypatch.setattr("alter_peft.trainer.config.get_available_reporting_integrations", list)
    with pytest.raises(ValueError, match=r"^`report_to` has 'wandb', which cannot be used .*: nothing of the"):
        make_args(tmp_path, report_to=["wandb"])


def test_offline_is_said_before_the_model_is_loaded(files, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("alter_peft.trainer.pushing.is_offline_mode", lambda: True)
    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", no_way)
    with pytest.raises(SystemExit) as stopped:
        main(flags(files, "--push_to_hub", "true"))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert "`--push_to_hub` is True, but HF_HUB_OFFLINE forbids the Hub. Unset that variable, or leave" in error
    assert f"push later: `hf upload USER/NAME {files['--output_dir']}`." in error


def test_no_login_is_said_before_the_model_is_loaded(files, capsys, logged_in, monkeypatch):  # noqa: F811
    monkeypatch.setattr("alter_peft.trainer.pushing.get_token", lambda: None)
    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", no_way)
    with pytest.raises(SystemExit) as stopped:
        main(flags(files, "--push_to_hub", "true"))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "there is no login for the Hub. Log in by `hf auth login`, give a" in error
    assert "as `--hub_token`" in error


def test_a_repository_that_cannot_be_made_is_said_before_the_training(files, capsys, logged_in, monkeypatch):  # noqa: F811
    monkeypatch.setattr(logged_in, "create_repo", no_way)
    with pytest.raises(SystemExit) as stopped:
        main(flags(files, "--push_to_hub", "true", "--hub_model_id", "bob/adapter"))
    said = capsys.readouterr()
    error = said.err.splitlines()[-1]
    assert stopped.value.code == 2 and "before the training" not in said.out
    assert "the repository 'bob/adapter' (`--hub_model_id`) could not be made" in error
    assert "(NoWay: [Errno -2] Name or service not known)" in error


def test_a_push_that_fails_after_the_training_loses_nothing(files, capsys, logged_in, monkeypatch):  # noqa: F811
    """The result is printed, then one line where the adapter is and how to push it."""
    monkeypatch.setattr(logged_in, "upload_folder", no_way)
    with pytest.raises(SystemExit) as stopped:
        main(flags(files, "--push_to_hub", "true", "--save_strategy", "no"))
    said, out = capsys.readouterr(), files["--output_dir"]
    assert stopped.value.code == 1 and "result:     " in said.out and f"adapter: {out}" in said.out
    assert said.err.splitlines()[-1] == (
        f"alter-peft unlearn: error: what was trained is saved in '{out}', but could not be pushed to the Hub (NoWay: "
        f"[Errno -2] Name or service not known). Push it later: `hf auth login`, if need be, and `hf upload "
        f"alice/adapter {out}`."
    )
    with open(f"{out}/adapter_config.json") as file:
        assert json.load(file)["peft_type"] == "ALTER"


def test_a_first_push_without_a_repository_has_saved(tmp_path, tokenizer, logged_in, monkeypatch):
    """Where `push_to_hub` is called without the option, the repository is made by then."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(logged_in, "create_repo", no_way)
    trainer = make_trainer(tmp_path / "out", tokenizer, adapter={}, max_steps=1)
    trainer.train()
    with pytest.raises(NotPushedError, match=r"is saved in '.*out', but could not be pushed to the Hub \(NoWay"):
        trainer.push_to_hub()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
