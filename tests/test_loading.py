# SPDX-License-Identifier: Apache-2.0
"""What `--model` and `--adapter` may name: a model, an adapter that is merged, a base that was moved."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import make_llama
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from alter_peft import AlterConfig
from alter_peft.cli import main
from alter_peft.commands.unlearn import ScriptArguments, _model
from alter_peft.evaluation.loading import load, load_model, load_tokenizer, loaded, merge_of


IDS = torch.arange(4, 20)[None]
ROWS = [
    {"prompt": "Where does Alice live?", "completion": " Alice lives in Paris.", "domain": "person"},
    {"prompt": "What does Bob bake?", "completion": " Bob bakes rye bread.", "domain": "recipe"},
]
QUICK = "--force --max_steps 1 --entropy_quantile 0.7 --bf16 false --report_to none --disable_tqdm true".split()


@pytest.fixture
def place(tmp_path, tokenizer, monkeypatch):
    """A base, a LoRA adapter and an ALTER adapter of it, and rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    make_llama(len(tokenizer)).save_pretrained("base")
    tokenizer.save_pretrained("base")
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained("base"), lora).save_pretrained("lora")
    alter = AlterConfig(domains=["a"], init_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained("base"), alter).save_pretrained("alter")
    for name, rows in (("forget", ROWS), ("retain", [{**row, "prompt": f"Now: {row['prompt']}"} for row in ROWS])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def of_lora():
    return AutoPeftModelForCausalLM.from_pretrained("lora")


def fails(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    err = capsys.readouterr().err
    line = err.splitlines()[-1]
    assert stop.value.code == 2 and line.startswith(f"alter-peft {argv[0]}: error: ") and "Traceback" not in err
    return line


def unlearn(*more: str) -> list[str]:
    return ["unlearn", "--forget", "forget.jsonl", "--retain", "retain.jsonl", "--output_dir", "out", *QUICK, *more]


def test_an_adapter_is_merged_into_its_base(place):
    assert merge_of("model", "base") is None and merge_of("model", "nowhere") is None
    assert merge_of("model", "lora") == ("LORA", "base")
    expected = of_lora()(IDS).logits
    torch.testing.assert_close(load("lora")(IDS).logits, expected, atol=1e-3, rtol=1e-4)
    model = load_model("lora", dtype=torch.float64)
    assert model.dtype == torch.float64 and model.name_or_path == str(place / "lora")
    assert not any("lora" in name for name, _ in model.named_modules())
    assert load_tokenizer("lora").get_vocab() == load_tokenizer("base").get_vocab()


# PEFT looks for the base's config.json, to see whether the vocabulary grew; where there is none it says so
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_unlearning_on_a_lora_folder_and_asking_the_result(place, capsys):
    """What is saved names the folder, and is loaded on the merged model by every command and by PEFT."""
    main(unlearn("--model", "lora"))
    assert "`--model` is an adapter (LORA): merged into its base model 'base'\n" in capsys.readouterr().out
    assert json.loads((place / "out/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        place / "lora"
    )
    main("generate --adapter out --prompt Who? --max_new_tokens 6 --without_adapter".split())
    named, *answers = capsys.readouterr().out.splitlines()
    assert named.startswith(f"the base model of `--adapter`, '{place / 'lora'}', is an adapter (LORA): merged into")
    main("generate --adapter out --prompt Who? --max_new_tokens 6 --without_adapter --model lora".split())
    given, *again = capsys.readouterr().out.splitlines()
    assert given == "`--model` is an adapter (LORA): merged into its base model 'base'" and again == answers
    main("evaluate --model lora --adapter out --sets a=forget.jsonl --max_new_tokens 2 --output_file x.json".split())
    assert capsys.readouterr().out.startswith(f"{given}\n")
    with pytest.warns(UserWarning, match="multiple adapters"):  # the LoRA adapter is worn, too, unmerged
        by_peft = AutoPeftModelForCausalLM.from_pretrained("out")
    merged = PeftModel.from_pretrained(load("lora"), "out")
    torch.testing.assert_close(by_peft(IDS).logits, merged(IDS).logits, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("process", "said"), [(0, "`--model` is an adapter (LORA)"), (1, "")])
def test_of_several_processes_the_first_says_what_is_merged(place, capsys, process, said):
    script = ScriptArguments("lora", "forget.jsonl")
    _model(script, SimpleNamespace(process_index=process, model_init_kwargs=None))
    assert capsys.readouterr().out.partition(":")[0] == said


def test_all_weights_of_a_merged_model_are_a_model_of_its_own(place, capsys):
    argv = unlearn("--model", "lora", "--adapter", "none", "--learning_rate", "0")
    argv = [word for word in argv if word not in ("--entropy_quantile", "0.7")]
    main([*argv, "--forget_loss", "ga"])
    expected = of_lora()(IDS).logits
    torch.testing.assert_close(load("out")(IDS).logits, expected, atol=1e-3, rtol=1e-4)


def test_plain_lora_on_lora_is_refused(place, capsys):
    """PEFT would load the second on the base without the first, silently."""
    argv = [
        word for word in unlearn("--adapter", "lora", "--model", "lora") if word not in ("--entropy_quantile", "0.7")
    ]
    assert "`--model` is 'lora', an adapter, on which PEFT cannot load a second one" in fails(capsys, *argv)


@pytest.mark.parametrize(
    "argv",
    [
        unlearn("--model", "alter"),
        "evaluate --model alter --sets a=forget.jsonl --output_file x.json".split(),
        "generate --model alter --adapter alter --prompt x".split(),
    ],
    ids=lambda argv: argv[0],
)
def test_an_alter_adapter_is_no_model(place, capsys, argv):
    said = fails(capsys, *argv)
    assert "`--model` is 'alter', an ALTER adapter. Give its base model as `--model` ('base')" in said
    assert "take the adapter as `--adapter`" in said


def test_a_base_that_was_moved(place, capsys):
    ask = "generate --adapter alter --prompt Who? --max_new_tokens 3".split()
    main(ask)
    before = capsys.readouterr().out
    shutil.move("base", "moved")
    said = fails(capsys, *ask)
    assert "`--adapter` is 'alter', whose base model 'base' could not be loaded" in said
    assert said.endswith("If it was moved, say where it is by `--model`.")
    main([*ask, "--model", "moved"])
    assert capsys.readouterr().out == before
    assert "`--model` is 'lora', which could not be loaded" in fails(capsys, *ask, "--model", "lora")
    config = json.loads((place / "alter/adapter_config.json").read_text())
    (place / "alter/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert "say where it is by `--model`" in fails(capsys, *ask)


def test_what_does_not_merge_is_refused(place, tokenizer):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained("base"), prompt).save_pretrained("prompt")
    with pytest.raises(
        ValueError, match=r"`model` is 'prompt', which could not be loaded .*PROMPT_TUNING is not merged"
    ):
        loaded("model", "prompt", load_model)
    config = json.loads((place / "lora/adapter_config.json").read_text())
    shutil.copytree("lora", "second")
    for changed, said in (
        ({**config, "base_model_name_or_path": "lora"}, "is an adapter, too"),
        ({**config, "base_model_name_or_path": None}, "is not named"),
        ([], "that of no adapter"),
    ):
        (place / "second/adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=said):
            merge_of("model", "second")
