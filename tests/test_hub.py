# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import hub_client
import pytest
import torch
from conftest import make_llama
from hub_server import HubServer
from peft import PeftModel, get_peft_model
from test_registration import run_fresh

from alter_peft import AlterConfig, __version__


ALICE, BOB = "hf_token_of_alice", "hf_token_of_bob"
BASE = "alice/base"
Client = Callable[..., Any]


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer({ALICE: "alice", BOB: "bob"}) as server:
        yield server
        assert not [request for request in server.requests if request.status == 501]


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory) -> Iterator[Client]:
    """Runs a function of `hub_client` in a process whose stock client has this server for its Hub, and no login."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        patch.setenv("HF_HUB_OFFLINE", "0")
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        patch.delenv("HF_TOKEN", raising=False)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:

            def run(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                return pool.submit(call, *args, **kwargs).result()

            run(hub_client.push_base, BASE, ALICE)
            yield run


@pytest.fixture(scope="module")
def trained(client, tokenizer, tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("trained")
    return client(hub_client.train_and_push, BASE, folder, "alice/trained", tokenizer, ALICE)


def since(hub: HubServer, start: int) -> list[tuple[str, str, str | None]]:
    return [(request.method, request.path, request.token) for request in hub.requests[start:]]


# ---- the trainer ----------------------------------------------------------------------------------------------------


def test_a_pushed_training_loads_as_it_was(client, trained, hub):
    start = len(hub.requests)
    assert client(hub_client.load_logged_in, "alice/trained", ALICE) == trained.outputs
    assert {token for _, path, token in since(hub, start) if not path.startswith("/storage/")} == {ALICE}
    assert client(hub_client.load_on_base, BASE, "alice/trained", ALICE) == trained.outputs


def test_the_trainers_card_says_how_to_load(hub, trained):
    card = hub.text("alice/trained", "README.md")
    assert "import alter_peft" in card and "KeyError: 'ALTER'" in card and "pip install alter-peft" in card
    assert 'AutoPeftModelForCausalLM.from_pretrained("alice/trained")' in card
    assert f"base_model: {BASE}" in card and "library_name: peft" in card
    assert f"- alter-peft: {__version__}" in card


def test_each_pushed_commit_has_a_card_and_safetensors_alone(hub, trained):
    repo = hub.repos["alice/trained"]
    assert repo.private
    commits = [files for files in repo.commits.values() if files]
    for files in commits:
        assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(files)
        assert "adapter_model.bin" not in files
    assert commits


def test_no_pushed_file_holds_the_token(hub, trained):
    files = [file for files in hub.repos["alice/trained"].commits.values() for file in files.items()]
    assert "adapter_config.json" in dict(files) and "training_args.bin" not in dict(files)
    assert [path for path, file in files if ALICE.encode() in file.content] == []


@pytest.fixture(scope="module")
def pushed_by_name(client, tokenizer, tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("named") / "out"
    return client(hub_client.train_named_and_push, BASE, folder, "alice/named", tokenizer, ALICE)


def test_every_push_of_a_named_adapter_has_its_weights(client, pushed_by_name, hub):
    """With each save, and the checkpoint that is asked for; nothing of that, or of the trainer, at the root."""
    commits = [(commit, files) for commit, files in hub.repos["alice/named"].commits.items() if files]
    assert len(commits) > len(pushed_by_name.outputs) > 1
    for commit, files in commits:
        if not any(name.startswith("last-checkpoint/") for name in files):
            assert {name for name in files if "/" in name} == {
                f"later/{name}" for name in ("README.md", "adapter_config.json", "adapter_model.safetensors")
            }
        assert "training_args.bin" not in files and "optimizer.pt" not in files
        assert {"later/adapter_config.json", "later/adapter_model.safetensors"} <= files.keys()
        found = client(hub_client.load_named, BASE, "alice/named", "later", ALICE, revision=commit)
        assert found in pushed_by_name.outputs
    last = hub.repos["alice/named"].branches["main"]
    assert (
        client(hub_client.load_named, BASE, "alice/named", "later", ALICE, revision=last) == pushed_by_name.outputs[-1]
    )
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/training_args.bin"} <= commits[-1][1].keys()


def test_the_trainer_shows_the_clients_error(trained):
    (kind, said), (cause, _), *_ = trained.error
    assert (kind, cause) == ("NotPushedError", "HfHubHTTPError") and "Invalid credentials" in said


# ---- PEFT's own push ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pushed(client) -> Any:
    """Two adapters pushed to the same branch, one after the other: (commit, outputs) of both."""
    first = client(hub_client.push_adapter, BASE, "alice/adapter", 1, ALICE, private=True)
    second = client(hub_client.push_adapter, BASE, "alice/adapter", 2, ALICE)
    return first, second


def test_a_revision_pins_the_older_adapter(client, pushed):
    (commit, first), (_, second) = pushed
    assert first != second
    for revision, expected in {commit: first, "main": second, None: second}.items():
        options = {} if revision is None else {"revision": revision}
        assert client(hub_client.load_auto, "alice/adapter", token=ALICE, **options) == expected
        assert client(hub_client.load_on_base, BASE, "alice/adapter", ALICE, **options) == expected


def test_a_push_to_a_branch_leaves_main_alone(client, pushed, hub):
    _, third = client(hub_client.push_adapter, BASE, "alice/adapter", 3, ALICE, "static", revision="stronger")
    assert sorted(hub.repos["alice/adapter"].branches) == ["main", "stronger"]
    assert client(hub_client.load_auto, "alice/adapter", token=ALICE, revision="stronger") == third
    assert client(hub_client.load_auto, "alice/adapter", token=ALICE) == pushed[1][1]
    error = client(hub_client.try_to_load_on_base, BASE, "alice/adapter", ALICE, token=ALICE, revision="nowhere")
    assert "RevisionNotFoundError" in [name for name, _ in error]


def test_peft_s_own_push_keeps_the_card_that_is_there(client, trained, hub):
    """On a repository without a card it writes the one of transformers, whatever the method."""
    before = hub.text("alice/trained", "README.md")
    client(hub_client.push_adapter, BASE, "alice/trained", 1, ALICE, revision="by-hand")
    assert hub.text("alice/trained", "README.md", "by-hand") == before
    client(hub_client.push_adapter, BASE, "alice/bare", 1, ALICE, private=True)
    assert "library_name: transformers" in hub.text("alice/bare", "README.md")


def test_a_saved_and_uploaded_adapter_says_how_to_load(client, hub, tmp_path):
    client(hub_client.upload_saved_adapter, BASE, tmp_path, "alice/saved", ALICE)
    card = hub.text("alice/saved", "README.md")
    assert "import alter_peft" in card and "library_name: peft" in card


# ---- tokens ---------------------------------------------------------------------------------------------------------


def test_the_token_goes_with_every_request_to_the_hub_and_to_no_other_host(client, hub):
    start = len(hub.requests)
    client(hub_client.push_adapter, BASE, "alice/private", 7, ALICE, private=True)
    client(hub_client.load_auto, "alice/private", token=ALICE)
    requests = since(hub, start)
    storage = [token for _, path, token in requests if path.startswith("/storage/")]
    assert len(storage) >= 2 and set(storage) == {None}
    without = {(method, path) for method, path, token in requests if token != ALICE and "/storage/" not in path}
    # PEFT's save asks by itself whether the base model's vocabulary was changed, with no token but that of a login
    assert without == {("HEAD", f"/{BASE}/resolve/main/config.json")}


@pytest.mark.parametrize(
    "token, cause",
    [("hf_wrong", "HfHubHTTPError"), (BOB, "RepositoryNotFoundError"), (False, "RepositoryNotFoundError")],
    ids=["wrong", "of-another", "none"],
)
def test_without_the_right_token_nothing_is_read(client, pushed, tmp_path, token, cause):
    download = client(
        hub_client.try_to_download, "alice/adapter", "adapter_model.safetensors", token=token, cache_dir=tmp_path
    )
    assert download[0][0] == cause
    error = client(
        hub_client.try_to_load_on_base, BASE, "alice/adapter", ALICE, token=token, cache_dir=tmp_path
    )  # PEFT's words for whatever the client says
    assert error[0] == ("ValueError", "Can't find 'adapter_config.json' at 'alice/adapter'")
    assert error[1][0] == cause


def test_without_the_right_token_nothing_is_written(client, pushed, hub):
    before = dict(hub.repos["alice/adapter"].branches)
    wrong = client(hub_client.try_to_push, BASE, "alice/adapter", ALICE, "hf_wrong")
    assert wrong[0][0] == "HfHubHTTPError" and "Invalid credentials" in wrong[0][1]
    other = client(hub_client.try_to_push, BASE, "alice/adapter", ALICE, BOB)
    assert other[0][0] == "HfHubHTTPError" and "403 Forbidden" in other[0][1]
    assert hub.repos["alice/adapter"].branches == before


# ---- pickles --------------------------------------------------------------------------------------------------------


def test_a_pickle_on_the_hub_is_refused_before_it_is_fetched(client, hub, tmp_path):
    client(hub_client.upload_pickle, BASE, tmp_path, "alice/pickle", ALICE)
    start = len(hub.requests)
    error = client(hub_client.try_to_load_on_base, BASE, "alice/pickle", ALICE, token=ALICE)
    assert error[0][0] == "ValueError" and "are a pickle (adapter_model.bin), which ALTER refuses" in error[0][1]
    assert not [path for method, path, _ in since(hub, start) if method == "GET" and path.startswith("/storage/")]


def test_a_config_from_the_cache_needs_no_request(client, pushed, hub):
    client(hub_client.load_config, "alice/adapter", token=ALICE)
    start = len(hub.requests)
    assert client(hub_client.load_config, "alice/adapter", local_files_only=True) == __version__
    assert since(hub, start) == []


def adapted(**options: Any) -> PeftModel:
    return get_peft_model(make_llama(hub_client.VOCABULARY), AlterConfig(domains=["a", "b"], r=4, **options))


@pytest.mark.parametrize("subfolder", [None, "inner"])
def test_a_pickle_in_a_folder_is_refused(tmp_path, subfolder):
    folder = tmp_path if subfolder is None else tmp_path / subfolder
    adapted().save_pretrained(folder)
    torch.save({}, folder / "adapter_model.bin")
    options = {} if subfolder is None else {"subfolder": subfolder}
    PeftModel.from_pretrained(make_llama(hub_client.VOCABULARY), tmp_path, **options)  # PEFT takes the safetensors
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"are a pickle \(.*adapter_model\.bin\), which ALTER refuses"):
        PeftModel.from_pretrained(make_llama(hub_client.VOCABULARY), tmp_path, **options)
    with pytest.raises(ValueError, match="which ALTER refuses"):
        adapted().load_adapter(tmp_path, "other", **options)
    (folder / "adapter_model.bin").unlink()
    AlterConfig.from_pretrained(tmp_path, **options)  # a config alone is none


def test_saving_as_a_pickle_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"adapter_model\.bin is a pickle, which ALTER refuses.*safe_serialization=True"
    ):
        adapted().save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_config.json").exists()  # so that PEFT cannot load what it wrote


# ---- cards of saved adapters ----------------------------------------------------------------------------------------


def test_the_saved_card_says_once_how_to_load(tmp_path):
    model = adapted(task_type="CAUSAL_LM")
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import alter_peft") == 1 and card.count("\n- alter\n") == 1
    before, after = card.split("import alter_peft")
    assert before.rstrip("\n").endswith("```python") and "How to Get Started" in before
    assert "Framework versions" in after


def test_the_card_of_a_named_adapter_lies_beside_its_folder(tmp_path):
    model = adapted(task_type="CAUSAL_LM")
    model.add_adapter("second", AlterConfig(domains=["a"], r=4))
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert "import alter_peft" in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "second" / "README.md").exists()


@pytest.mark.parametrize("text", ["# My project\n", "---\nlibrary_name: transformers\n---\n# A model\n"])
def test_a_readme_that_is_no_card_of_peft_stays_as_it_is(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    AlterConfig(domains=["a"]).save_pretrained(tmp_path)
    AlterConfig(domains=["a"]).save_pretrained(tmp_path / "inner")
    assert (tmp_path / "README.md").read_text() == text


# ---- without the import ---------------------------------------------------------------------------------------------


WITHOUT_IMPORT = """
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftMixedModel, PeftModel
from peft import get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM
adapter, folder = {folder!r} + "/adapter", {folder!r} + "/base"
base, other = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
lora = get_peft_model(other, LoraConfig(target_modules=["q_proj"]))
for load in (
    lambda: PeftConfig.from_pretrained(adapter),
    lambda: PeftModel.from_pretrained(base, adapter),
    lambda: PeftMixedModel.from_pretrained(base, adapter),
    lambda: AutoPeftModelForCausalLM.from_pretrained(adapter),
    lambda: AutoPeftModel.from_pretrained({folder!r} + "/no_task"),
    lambda: lora.load_adapter(adapter, "other"),
    lambda: hotswap_adapter(lora, adapter, "default"),
    lambda: base.load_adapter(adapter),
    lambda: AutoModelForCausalLM.from_pretrained(adapter),
):
    try:
        load()
    except Exception as error:
        print(repr(error))
"""


def test_without_the_import_every_way_to_load_ends_in_the_error_of_the_card(tmp_path):
    make_llama(hub_client.VOCABULARY).save_pretrained(tmp_path / "base")
    for name, task in {"adapter": "CAUSAL_LM", "no_task": None}.items():
        model = adapted(task_type=task)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / name)
    found = run_fresh(WITHOUT_IMPORT.format(folder=str(tmp_path)))
    assert found.split("\n")[:-1] == ["KeyError('ALTER')"] * 9
