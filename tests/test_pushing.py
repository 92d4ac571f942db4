# SPDX-License-Identifier: Apache-2.0
"""Logs and pushes to elsewhere: what cannot be is said before the training, and after one nothing is lost by it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make_llama
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects
from peft.tuners.tuners_utils import BaseTunerLayer
from test_cli import files, flags  # noqa: F401
from trainer_setup import make_args, make_trainer
from transformers.trainer import hf_api

from alter_peft.cli import main
from alter_peft.trainer.pushing import NoRepositoryError, NotPushedError, upload_command


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


class Uploads(list[dict[str, Any]]):
    """What was uploaded."""

    def __call__(self, **given: Any) -> None:
        folder = Path(given["folder_path"])
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
        kept = filter_repo_objects(names, ignore_patterns=given["ignore_patterns"])
        self.append({**given, "files": {*kept}})


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
    monkeypatch.setattr("alter_peft.trainer.saving.upload_folder", no_way)
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


def in_parts(*args, **kwargs):
    """As the client raises whatever an upload of a large file ends by."""
    raise RuntimeError("Error while uploading 'a.safetensors' to the Hub.") from ConnectionResetError("by peer")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("logged_in", "own_cache")
def test_whatever_the_client_raises_has_saved(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("alter_peft.trainer.saving.upload_folder", in_parts)
    trainer = make_trainer(tmp_path / "out", tokenizer, adapter={}, max_steps=1, push_to_hub=True)
    message = (
        r"is saved in .*\(RuntimeError: Error while uploading 'a.safetensors' to the Hub. Connection.*: by peer\)"
    )
    with pytest.raises(NotPushedError, match=message):
        trainer.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.usefixtures("own_cache")
def test_without_a_repository_the_model_is_as_it_was(tmp_path, tokenizer, logged_in, monkeypatch):
    """For another attempt; the name is the one that the Hub was asked for."""
    monkeypatch.setattr(logged_in, "create_repo", no_way)
    model = make_llama(len(tokenizer))
    with pytest.raises(NoRepositoryError, match=r"the repository 'out' \(`hub_model_id`\) could not be made"):
        make_trainer(tmp_path / "out", tokenizer, model=model, adapter={}, push_to_hub=True)
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    make_trainer(tmp_path / "out", tokenizer, model=model, adapter={})


@pytest.mark.usefixtures("own_cache")
def test_no_repository_is_made_for_what_cannot_be_trained(tmp_path, tokenizer, logged_in, monkeypatch):
    asked: list[Any] = []
    monkeypatch.setattr(logged_in, "create_repo", lambda *args, **kwargs: asked.append(args))
    with pytest.raises(ValueError, match="entropy_threshold"):
        make_trainer(
            tmp_path / "out", tokenizer, push_to_hub=True, adapter={"entropy_threshold": 99, "entropy_quantile": None}
        )
    assert asked == []


@pytest.mark.parametrize("inside", [".", "checkpoints"])
@pytest.mark.usefixtures("logged_in", "own_cache")
def test_checkpoints_inside_are_not_pushed(tmp_path, tokenizer, monkeypatch, inside):
    """Nor by the command for later: they hold hashes of the rows, and the optimizer's state."""
    uploads, out = Uploads(), tmp_path / "out"
    monkeypatch.setattr("alter_peft.trainer.saving.upload_folder", uploads)
    options = {"checkpoint_dir": str(out / inside), "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer = make_trainer(out, tokenizer, adapter={}, **options)
    trainer.train()
    trainer.push_to_hub()
    assert (out / inside / "checkpoint-1" / ".begun-with.json").is_file()
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= uploads[0]["files"]
    assert not any("checkpoint-" in name for name in uploads[0]["files"])
    words = shlex.split(upload_command(trainer.args))
    assert words[4:] == [f"--exclude={pattern}" for pattern in uploads[0]["ignore_patterns"][1:]]
