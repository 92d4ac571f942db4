# SPDX-License-Identifier: Apache-2.0
"""The command line: an adapter is asked as it was trained, whatever the template, and texts without a prompt, too."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import make_llama
from test_cli import QUICK, write_rows
from transformers import AutoTokenizer, LlamaForCausalLM

from alter_peft.chat import encode_row
from alter_peft.cli import main
from alter_peft.evaluation.loading import load_tokenizer


# As Qwen3 has it: an answer is rendered after an empty block of thoughts, which the generation prompt leaves out
THINKING = (
    "{% if mood is not defined %}{% set mood = 'calm' %}{% endif %}<|user|>{{ mood }}<|end|>"
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ASKED = {"prompt": "Where does Alice live?", "completion": "Alice lives in Paris."}
MOOD = ["--chat_template_kwargs", '{"mood": "kind"}']


@pytest.fixture
def asked_with(monkeypatch) -> list[list[int]]:
    """The prompts of all answers, which are two words each."""
    found: list[list[int]] = []

    def generate(model, input_ids, **options):
        found.extend(input_ids.tolist())
        return torch.cat([input_ids, input_ids.new_tensor([[40, 41]] * len(input_ids))], dim=1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    return found


@pytest.fixture
def base(tokenizer, tmp_path):
    """A model on disk, by its tokenizer's template."""

    def make(template):
        own = copy.deepcopy(tokenizer)
        own.chat_template = template
        make_llama(len(own)).save_pretrained(tmp_path / "base")
        own.save_pretrained(tmp_path / "base")
        return str(tmp_path / "base")

    return make


@pytest.fixture
def adapter(base, tmp_path, monkeypatch):
    """Where an adapter is, trained on one question or text."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def train(template, row, *more):
        rows = write_rows(tmp_path / "forget.jsonl", [row])
        kept = write_rows(tmp_path / "retain.jsonl", [{name: f"{text} No." for name, text in row.items()}])
        data = ["--forget", rows, "--retain", kept, "--output_dir", str(tmp_path / "out")]
        main(["unlearn", "--model", base(template), *data, *QUICK, *more])
        return str(tmp_path / "out")

    return train


def before_answer(folder, template=None) -> list[int]:
    """The tokens before the answer of the row in training."""
    own = AutoTokenizer.from_pretrained(folder)
    labels = encode_row(ASKED, own)["labels"]
    start = next(i for i, label in enumerate(labels) if label != -100)
    return encode_row(ASKED, own)["input_ids"][:start]


def test_an_adapter_is_asked_as_it_was_trained(adapter, asked_with, tmp_path, capsys):
    folder = adapter(THINKING, ASKED, *MOOD)
    ask = ["generate", "--adapter", folder, "--prompt", ASKED["prompt"]]
    main(ask)
    assert asked_with == [before_answer(folder)]
    prompt = AutoTokenizer.from_pretrained(folder).decode(asked_with.pop())
    assert prompt.startswith("<|user|>kind<|end|>") and prompt.endswith("<|assistant|><think>\n\n</think>\n\n")

    main([*ask, "--chat_template_kwargs", '{"mood": "wild"}'])
    assert AutoTokenizer.from_pretrained(folder).decode(asked_with.pop()) == prompt.replace("kind", "wild")
    main([*ask, "--as_chat", "false"])
    assert AutoTokenizer.from_pretrained(folder).decode(asked_with.pop()) == ASKED["prompt"]

    measure = ["--model", str(tmp_path / "base"), "--output_file", str(tmp_path / "x.json"), "--no_bf16"]
    measure += ["--sets", f"forget={tmp_path / 'forget.jsonl'}"]
    for more, mood in ((["--adapter", folder], "kind"), ([], "calm"), (MOOD, "kind")):
        main(["evaluate", *measure, *more])
        assert AutoTokenizer.from_pretrained(folder).decode(asked_with.pop()) == prompt.replace("kind", mood)
    capsys.readouterr()


@pytest.mark.parametrize(
    "value, message", [("x", "must be a JSON object"), ('{"mod": 1}', "names 'mod', but the chat template reads no")]
)
@pytest.mark.parametrize("command", ["unlearn", "generate", "evaluate"])
def test_variables_that_are_none(adapter, tmp_path, capsys, command, value, message):
    folder, model = adapter(THINKING, ASKED), ["--model", str(tmp_path / "base")]
    rows = str(tmp_path / "forget.jsonl")
    given = {
        "unlearn": [*model, "--forget", rows, "--retain", rows, "--output_dir", str(tmp_path / "out2"), *QUICK],
        "generate": ["--adapter", folder, "--prompt", "Who?"],
        "evaluate": [*model, "--output_file", str(tmp_path / "x.json"), "--sets", f"forget={rows}"],
    }
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([command, *given[command], "--chat_template_kwargs", value])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "chat_template_kwargs" in said.splitlines()[-1]
    assert command == "unlearn" or message in said.splitlines()[-1]


def test_a_text_without_a_prompt(adapter, asked_with, tmp_path, capsys):
    """Neither a template nor BOS: EOS stands before a text, and a measured text goes on from its first token."""
    text = {"text": "Alice lives in Paris."}
    folder = adapter(None, text)
    main(["generate", "--adapter", folder, "--prompt", ""])
    own = AutoTokenizer.from_pretrained(folder)
    assert asked_with.pop() == [own.eos_token_id]
    rows = write_rows(tmp_path / "asked.jsonl", [{"prompt": "", "completion": text["text"]}])
    measure = ["--model", str(tmp_path / "base"), "--output_file", str(tmp_path / "x.json"), "--no_bf16"]
    main(["evaluate", *measure, "--adapter", folder, "--sets", f"forget={rows}", "--metrics", "probability", "rouge"])
    assert asked_with.pop() == own(text["text"])["input_ids"][:1]
    scores = json.loads((tmp_path / "x.json").read_text())
    assert scores["error"] is None
    capsys.readouterr()


def test_what_cannot_be_asked_is_said_before_anything_is_answered(adapter, tmp_path, capsys):
    folder = adapter(None, {"text": "Alice lives in Paris."})
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "out" / "tokenizer_config.json").write_text(json.dumps(config))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--adapter", folder, "--prompt", "Who?", "--prompt", ""])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and "The prompt is empty, and the tokenizer has no BOS" in said.err


def test_an_adapter_without_a_tokenizer_is_asked_with_its_models(base, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    model = base(THINKING)
    for adapter in (None, str(folder), "nowhere/at-all"):
        assert load_tokenizer(model, adapter).chat_template == THINKING


def test_more_than_the_models_positions_is_not_asked(adapter, capsys):
    """1,024 of them; beyond, it would answer nonsense or fail."""
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--adapter", adapter(THINKING, ASKED), "--prompt", "Who?", "--max_new_tokens", "1024"])
    assert ended.value.code == 2 and "has 1024 positions for both" in " ".join(capsys.readouterr().err.split())
