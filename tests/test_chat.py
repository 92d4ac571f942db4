# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001 (DeepSeek's marks)
"""Conversations -> token ids, by the templates of real models: what is an answer, and what a model is asked with."""

from __future__ import annotations

import copy
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import trl
from conftest import make_llama
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from trainer_setup import make_trainer
from trl import SFTTrainer

from alter_peft.answer_end import EndOfAnswer
from alter_peft.chat import (
    as_messages,
    chat_or_plain,
    encode_conversation,
    encode_row,
    encode_text,
    prompt_ids,
    with_template_defaults,
)
from alter_peft.evaluation import METRICS, ModelOnSet, Pair, encode_pair, generate_answers, measure, score_answers
from alter_peft.trainer.encoding import encoded


ASKED, TOLD = "Where does Alice live?", "Alice lives in Paris."
# Templates that TRL has not, as those of the models render messages, without their tools
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
GLM4 = (
    "[gMASK]<sop>{% for m in messages %}{% if m['role'] == 'user' %}<|user|>\n{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|assistant|>\n{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
CHATML = (  # SmolLM2's
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + "
    "m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OWN = {"mistral": MISTRAL, "glm4": GLM4, "phi4": PHI4, "chatml": CHATML}
# template -> how what stands before an answer ends, and what follows it
TEMPLATES = {
    "qwen3": ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>\n"),
    "qwen3_instruct_2507": ("<|im_start|>assistant\n", "<|im_end|>\n"),
    "qwen3_5_think": ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>\n"),
    "qwen2_5": ("<|im_start|>assistant\n", "<|im_end|>\n"),
    "glm4moe": ("<|assistant|>\n<think></think>\n", ""),
    "glm4": ("<|assistant|>\n", ""),
    "gptoss": ("<|start|>assistant<|channel|>final<|message|>", "<|return|>"),
    "deepseek_r1_distill": ("<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "deepseekv3": ("<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "llama3": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "llama3_2": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "phi3": ("<|assistant|>\n", "<|end|>\n<eos>"),
    "phi4": ("<|im_start|>assistant<|im_sep|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>model\n", "<end_of_turn>\n"),
    "gemma3": ("<start_of_turn>model\n", "<end_of_turn>\n"),
    "mistral": ("[/INST] ", "<eos>"),
    "chatml": ("<|im_start|>assistant\n", "<|im_end|>\n"),
}
MARKS = re.compile(r"<\|[a-z_]+\|>|<｜[^｜]+｜>|</?(?:start_of_turn|end_of_turn|sop)>|\[/?INST\]|\[gMASK\]")
THOUGHTS = ["<think>", "</think>"]  # tokens of their own, but special to no tokenizer


def wearing(tokenizer, name: str):
    """The tiny tokenizer with a template, and with the special tokens that are in it."""
    place = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if name not in OWN and not place.is_file():
        pytest.skip(f"this TRL has no template {name}")
    own = copy.deepcopy(tokenizer)
    own.chat_template = OWN.get(name) or place.read_text()
    own.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>"})
    own.add_special_tokens(
        {"extra_special_tokens": sorted(set(MARKS.findall(own.chat_template + "<｜end▁of▁sentence｜>")))}
    )
    own.add_tokens(THOUGHTS)
    return own


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", [TOLD, f" {TOLD}"], ids=["answer", "space"])
def test_what_a_template_puts_before_an_answer_is_none_of_it(tokenizer, name, answer):
    own = wearing(tokenizer, name)
    ids, start = encode_pair(own, Pair(ASKED, answer))
    whole = own.apply_chat_template(as_messages(ASKED, answer)[0], return_dict=True)["input_ids"]
    assert ids == whole
    before, after = TEMPLATES[name]
    asked, told = own.decode(ids[:start]), own.decode(ids[start:])
    assert asked.endswith(before.rstrip(" "))  # a space that is one token with the first word is the answer's
    assert told.lstrip(" ") == TOLD + after
    assert prompt_ids(own, ASKED) == ids[:start]
    assert score_content(own, ids[start:]) == TOLD


def score_content(tokenizer, answer: list[int]) -> str:
    """The answer's own text, as scores and extraction count it."""
    return tokenizer.decode(answer[: EndOfAnswer(tokenizer).content_length(answer)]).strip()


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "gptoss", "chatml"])
def test_training_labels_what_is_scored_and_asks_as_it_is_asked(tmp_path, tokenizer, name, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    own = wearing(tokenizer, name)
    conversation = {"prompt": [{"role": "user", "content": ASKED}], "completion": as_messages("", TOLD)[0][1:]}
    for forget in ([{"prompt": ASKED, "completion": TOLD}], [conversation]):
        trainer = make_trainer(
            tmp_path,
            own,
            forget=Dataset.from_list(forget),
            retain=Dataset.from_list([conversation | {"prompt": [{"role": "user", "content": "Who bakes?"}]}]),
            adapter={},
            as_chat=None,
        )
        ids, start = encode_pair(own, Pair(ASKED, TOLD))
        row = trainer._forget[0]
        assert row["input_ids"] == ids and row["labels"] == [-100] * start + ids[start:]
        assert row["input_ids"][:start] == prompt_ids(own, ASKED)


# ---- conversations of several turns ---------------------------------------------------------------------------------

LONG = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Who bakes?"},
    {"role": "assistant", "content": "Bob does."},
    *as_messages(ASKED, TOLD)[0],
]


def answers_of(tokenizer, encoded) -> str:
    """The labelled parts, one after another."""
    parts, last = [], False
    for i, own in zip(encoded.ids, encoded.is_answer, strict=True):
        if own:
            parts = [*parts[:-1], [*parts[-1], i]] if last else [*parts, [i]]
        last = own
    return "|".join(tokenizer.decode(part) for part in parts)


@pytest.mark.parametrize("name", ["qwen3", "llama3_2", "gptoss", "phi3", "glm4moe", "chatml"])
def test_every_turn_of_the_assistants_is_an_answer_and_nothing_else(tokenizer, name):
    own = wearing(tokenizer, name)
    every, last = encode_conversation(own, LONG), encode_conversation(own, LONG, 3)
    end = TEMPLATES[name][1]
    turn = {"gptoss": "", "phi3": "<|end|>\n"}.get(name, end)  # what ends every turn, also one that others follow
    assert answers_of(own, every) == f"Bob does.{turn}|{TOLD}{end}"
    assert answers_of(own, last) == f"{TOLD}{end}" and every.ids == last.ids
    asked = [*LONG, {"role": "user", "content": "Why?"}]
    assert answers_of(own, encode_conversation(own, asked)) == f"Bob does.{turn}|{TOLD}{turn}"
    assert prompt_ids(own, LONG[:-1]) == last.ids[: last.start]


def test_rows_of_messages_and_of_several_turns(tokenizer):
    own = wearing(tokenizer, "chatml")
    row = encode_row({"messages": LONG}, own)
    assert own.decode([i for i in row["labels"] if i != -100]) == f"Bob does.<|im_end|>\n{TOLD}<|im_end|>\n"
    row = encode_row({"prompt": LONG[:-1], "completion": LONG[-1:]}, own)
    assert own.decode([i for i in row["labels"] if i != -100]) == f"{TOLD}<|im_end|>\n"
    asked = encode_pair(own, Pair(ASKED, TOLD, turns=tuple(LONG[:3])))
    assert row == {"input_ids": asked[0], "labels": [-100] * asked[1] + asked[0][asked[1] :]}
    whole = encode_row({"prompt": LONG[:-1], "completion": LONG[-1:]}, own, answers_only=False)
    assert whole == {"input_ids": asked[0], "labels": asked[0]}
    shared = [{"from": "user", "value": ASKED}, {"from": "assistant", "value": TOLD}]
    found = encoded(Dataset.from_list([{"conversations": shared}]), own)
    assert own.decode([i for i in found[0]["labels"] if i != -100]) == f"{TOLD}<|im_end|>\n"


def test_thoughts_that_a_row_brings_are_a_part_of_its_answer(tokenizer):
    own = wearing(tokenizer, "qwen3")
    ids, start = encode_pair(own, Pair(ASKED, f"<think>\nHm.\n</think>\n\n{TOLD}"))
    assert own.decode(ids[:start]).endswith("<|im_start|>assistant\n<think>\n")
    assert own.decode(ids[start:]) == f"Hm.\n</think>\n\n{TOLD}<|im_end|>\n"


def test_what_a_template_cannot_render(tokenizer):
    own = wearing(tokenizer, "gemma")
    with pytest.raises(ValueError, match=r"refuses a conversation of the roles \['system', 'user', 'assistant'\]"):
        encode_conversation(own, [LONG[0], *LONG[3:]])
    own.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="leaves out the text of message 1, of the role 'assistant'"):
        encode_conversation(own, LONG[3:])
    own.chat_template = None
    with pytest.raises(ValueError, match="rows are conversations, but the tokenizer has no chat template"):
        encode_row({"messages": LONG}, own)


# ---- variables of a template ----------------------------------------------------------------------------------------


def test_variables_are_kept_in_the_template_and_whoever_asks_by_it_has_them(tmp_path, tokenizer):
    own = wearing(tokenizer, "llama3_2")
    dated = chat_or_plain(own, chat_template_kwargs={"date_string": '01 "Jan" 2020 %}'})
    dated.save_pretrained(tmp_path)
    for one in (dated, type(dated).from_pretrained(tmp_path)):
        assert 'Today Date: 01 "Jan" 2020 %}' in one.decode(prompt_ids(one, ASKED))
    assert "2020" not in own.decode(prompt_ids(own, ASKED))
    later = chat_or_plain(dated, chat_template_kwargs={"date_string": "02 Feb 2021"})
    assert "Today Date: 02 Feb 2021" in later.decode(prompt_ids(later, ASKED))
    given = dated.apply_chat_template(as_messages(ASKED, TOLD)[0], tokenize=False, date_string="03 Mar 2022")
    assert "Today Date: 03 Mar 2022" in given
    template = with_template_defaults(own.chat_template, {"date_string": "x"})
    assert with_template_defaults(template, {"date_string": "x"}) == template
    assert with_template_defaults({"a": "{{ x }}", "b": ""}, {"x": 1})["a"].endswith("{{ x }}")


def test_variables_of_macros_and_of_single_rows(tokenizer):
    own = wearing(tokenizer, "gptoss")
    low = chat_or_plain(own, chat_template_kwargs={"reasoning_effort": "low"})
    assert "Reasoning: low" in low.decode(prompt_ids(low, ASKED))
    row = encode_row({"prompt": ASKED, "completion": TOLD, "chat_template_kwargs": {"reasoning_effort": "high"}}, low)
    assert "Reasoning: high" in own.decode(row["input_ids"])


@pytest.mark.parametrize("name, message", [("qwen3", "reads no such variable"), (None, "there is no chat template")])
def test_a_variable_that_no_template_reads(tokenizer, name, message):
    own = copy.deepcopy(tokenizer) if name is None else wearing(tokenizer, name)
    own.chat_template = own.chat_template if name else None
    with pytest.raises(ValueError, match=f"`chat_template_kwargs` names 'enable_thinkng', but .*{message}"):
        chat_or_plain(own, chat_template_kwargs={"enable_thinkng": False})


def test_variables_are_saved_with_what_was_trained(tmp_path, tokenizer):
    own = wearing(tokenizer, "llama3_2")
    trainer = make_trainer(
        tmp_path, own, adapter={}, as_chat=None, chat_template_kwargs={"date_string": "01 Jan 2020"}
    )
    assert "Today Date: 01 Jan 2020" in own.decode(trainer._retain[0]["input_ids"])
    trainer.save_model(str(tmp_path / "saved"))
    saved = type(own).from_pretrained(tmp_path / "saved")
    row = trainer._forget[0]
    start = next(i for i, label in enumerate(row["labels"]) if label != -100)
    assert prompt_ids(saved, ASKED) == row["input_ids"][:start]


# ---- texts without a prompt -----------------------------------------------------------------------------------------


@pytest.fixture(params=["nothing added", "BOS", "no EOS"])
def bare(request, tokenizer):
    """Tokenizers without a template, one of which adds nothing at all, and that of the least."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = None
    if request.param == "BOS":
        own.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|user|> $A", special_tokens=[("<|user|>", own.convert_tokens_to_ids("<|user|>"))]
        )
    if request.param == "no EOS":
        own.eos_token = None
    return own


def test_a_text_without_a_prompt_is_scored_and_answered(bare):
    model = make_llama(len(bare))
    scores = score_answers(model, bare, [Pair("", TOLD)])
    ids, start = encode_pair(bare, Pair("", TOLD))
    assert len(scores.log_probs[0]) == len(ids) - max(start, 1)
    (answer,) = generate_answers(model, bare, [Pair("", TOLD)], max_new_tokens=3)
    assert isinstance(answer, str) and (start == 1 or answer.startswith(bare.decode(ids[:1])))
    several = generate_answers(
        model, bare, [Pair("", TOLD), Pair(ASKED, TOLD)], max_new_tokens=3, num_return_sequences=2, do_sample=True
    )
    assert len(several) == 4 and (start == 1 or all(one.startswith(bare.decode(ids[:1])) for one in several[:2]))


def test_every_metric_takes_texts_without_a_prompt(bare):
    asked = ModelOnSet(make_llama(len(bare)), bare, "set", [Pair("", TOLD)] * 2, max_new_tokens=2)
    usable = [
        name
        for name, one in METRICS.items()
        if not {"threshold", "router", "wrong", "other words", "judge"} & {*one.needs}
        and all(map(find_spec, one.packages))
    ]
    assert len(measure(asked, usable)) >= len(usable) > 7


def test_texts_are_trained_and_asked_without_a_prompt(bare, tmp_path):
    rows = encode_row({"text": TOLD}, bare)
    assert rows["labels"] == rows["input_ids"]
    if bare.eos_token is None and bare("")["input_ids"] == []:
        with pytest.raises(ValueError, match="The prompt is empty, and the tokenizer has no BOS and no EOS"):
            prompt_ids(bare, "")
    else:
        assert len(prompt_ids(bare, "")) == 1


def test_a_text_is_no_chat_even_where_there_is_a_template(tokenizer):
    plain = chat_or_plain(tokenizer, as_chat=False)
    assert encode_pair(tokenizer, Pair("", TOLD, is_text=True)) == encode_pair(plain, Pair("", TOLD))
    assert encode_row({"text": TOLD}, tokenizer)["input_ids"] == encode_text(tokenizer, "", TOLD).ids


@pytest.mark.parametrize("prompt, answer", [(ASKED, f" {TOLD}"), (f"Question: {ASKED}\nAnswer: ", TOLD)])
def test_plain_text_is_asked_as_it_was_trained(bare, prompt, answer):
    ids, start = encode_pair(bare, Pair(prompt, answer))
    assert prompt_ids(bare, prompt) == ids[:start]


# ---- as TRL has it, where the template leaves nothing between ------------------------------------------------------


@pytest.mark.parametrize("name", ["chatml", "qwen2_5", "llama3", "phi4", None])
def test_rows_are_those_of_trl_where_a_template_puts_nothing_before_an_answer(tmp_path, tokenizer, name):
    own = copy.deepcopy(tokenizer) if name is None else wearing(tokenizer, name)
    own.chat_template = own.chat_template if name else None
    trainer = make_trainer(tmp_path, own, adapter={}, as_chat=None)
    asked, told = as_messages(ASKED, TOLD)[0]
    row = {"prompt": ASKED, "completion": f" {TOLD}"} if name is None else {"prompt": [asked], "completion": [told]}
    rows = Dataset.from_list([row])
    (theirs,) = SFTTrainer._prepare_dataset(trainer, rows, own, trainer.args, False, None, "theirs")
    (ours,) = encoded(rows, own)
    assert (ours["input_ids"], ours["labels"]) == (theirs["input_ids"], theirs["labels"])
