# SPDX-License-Identifier: Apache-2.0
"""Bad input stops at construction, before any compute, with an error that names the field, the value and the fix."""

from __future__ import annotations

import copy
import re
import types
from typing import Any

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from conftest import make_llama
from datasets import Dataset, DatasetDict, IterableDataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from trainer_setup import forget_rows, make_args, make_trainer, retain_rows
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration
from trl import SFTConfig

from alter_peft import AlterConfig, AlterUnlearnConfig, AlterUnlearnTrainer
from alter_peft.trainer.inputs import assign_experts, check_all_labelled
from alter_peft.trainer.rows import checked_dataset


def refused(tmp_path: Any, tokenizer: Any, *parts: str, **given: Any) -> None:
    """The trainer cannot be made, and the message has all the `parts`."""
    model = make_llama(len(tokenizer))
    model.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    given = {"model": model, "adapter": {}, **given}
    with pytest.raises(ValueError) as caught:
        make_trainer(tmp_path, tokenizer, **given)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def empty(rows: Dataset) -> Dataset:
    return rows.select([])


def test_empty_sets(tmp_path, tokenizer):
    refused(tmp_path, tokenizer, "`train_dataset`", "is empty", "at least one", forget=empty(forget_rows()))
    refused(tmp_path, tokenizer, "`retain_dataset`", "is empty", "at least one", retain=empty(retain_rows()))


@pytest.mark.parametrize("name", ["train_dataset", "retain_dataset"])
def test_missing_sets(tmp_path, tokenizer, name):
    given = {"train_dataset": forget_rows(), "retain_dataset": retain_rows(), name: None}
    with pytest.raises(ValueError, match=f"`{name}` is required.*both"):
        AlterUnlearnTrainer(make_llama(len(tokenizer)), make_args(tmp_path), processing_class=tokenizer, **given)


def test_overlapping_sets(tmp_path, tokenizer):
    both = concatenate_datasets([retain_rows(3), forget_rows(2).remove_columns("domain")])
    parts = ("retain_dataset", "train_dataset", "2 of the 8", "row 0", "row 3", "Remove")
    refused(tmp_path, tokenizer, *parts, retain=both)


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_unknown_columns(tmp_path, tokenizer, name):
    rows = Dataset.from_list([{"ask": "Where?", "told": "Here."}])
    field = {"forget": "`train_dataset`", "retain": "`retain_dataset`"}[name]
    refused(tmp_path, tokenizer, field, "['ask', 'told']", "Rename", "'completion'", **{name: rows})


@pytest.mark.parametrize("labels", ["ABCD", "1234"])
def test_the_answer_of_a_multiple_choice_is_its_text(labels):
    """ARC's shape, of rows to forget as of those to retain."""
    choices = {"text": ["rye", "oats", "spelt", "barley"], "label": [*labels]}
    rows = Dataset.from_list([{"question": "What does Bob bake?", "choices": choices, "answerKey": labels[1]}])
    for name in ("train_dataset", "retain_dataset"):
        found = checked_dataset(name, rows, "text")
        wrong = ["rye", "spelt", "barley"]
        assert found.to_list() == [{"prompt": "What does Bob bake?", "completion": "oats", "wrong": wrong}]


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_streams_and_dicts(tmp_path, tokenizer, name):
    field = {"forget": "`train_dataset`", "retain": "`retain_dataset`"}[name]
    stream = IterableDataset.from_generator(lambda: iter(forget_rows().to_list()))
    refused(tmp_path, tokenizer, field, "IterableDataset", "from_generator", **{name: stream})
    splits = DatasetDict(train=forget_rows())
    refused(tmp_path, tokenizer, field, "DatasetDict", "one split", **{name: splits})
    refused(tmp_path, tokenizer, field, "list", "datasets.Dataset", **{name: forget_rows().to_list()})


def test_domain_that_is_not_among_domains(tmp_path, tokenizer):
    parts = ("`domain`", "['bread']", "`domains`=['home', 'garden']", "Add")
    refused(tmp_path, tokenizer, *parts, adapter={"domains": ["home", "garden"]})


def test_more_domains_than_experts(tmp_path, tokenizer):
    parts = ("2 sub-domains (home, bread)", "`num_forget_experts`=1", "domains=['home', 'bread']")
    refused(tmp_path, tokenizer, *parts, adapter={"num_forget_experts": 1})
    model = get_peft_model(make_llama(len(tokenizer)), AlterConfig(task_type="CAUSAL_LM"))
    refused(tmp_path, tokenizer, *parts, model=model, adapter=None)


def test_rows_without_a_domain(tmp_path, tokenizer):
    rows = forget_rows().to_list()
    rows[2]["domain"] = None
    parts = ("`train_dataset`", "`domain`", "row 2", "None")
    refused(tmp_path, tokenizer, *parts, forget=Dataset.from_list(rows))


@pytest.mark.parametrize(
    ("option", "value", "fix"),
    [
        ("packing", True, "False"),
        ("padding_free", True, "False"),
        ("train_sampling_strategy", "group_by_length", "'random'"),
        ("router_aux_loss_coef", 10.0, "unset or 0"),
        ("average_tokens_across_devices", False, "True"),
        ("shuffle_dataset", True, "False"),
        ("data_seed", 3, "`seed`"),
        ("optim_target_modules", "all-linear", "unset"),
        ("dataset_kwargs", {"skip_prepare_dataset": True}, "without `skip_prepare_dataset`"),
        ("max_length", 1, "2 or more"),
        ("max_length", 0, "2 or more"),
        ("long_rows", "cut", "'error'"),
        ("ddp_find_unused_parameters", True, "unset or False"),
        ("forget_weight", -1.0, "0 or positive"),
        ("forget_weight", float("inf"), "a finite number"),
        ("retain_weight", True, "a finite number"),
        ("structural_weight", "0.01", "a finite number"),
        ("shared_learning_rate", float("nan"), "a finite number"),
        ("structural_q", float("inf"), "above 0 and finite"),
        ("structural_q", "1", "above 0 and finite"),
        ("structural_interval", 2.5, "1 or more"),
        ("structural_interval", True, "1 or more"),
        ("forget_loss_kwargs", "0.1", "a dict, or JSON of one"),
        ("stopping_tolerance", "0.25", "above 0"),
        ("stopping_tolerance", float("inf"), "above 0"),
        ("stopping_tolerance", 0, "above 0"),
        ("forget_level", "0.1", "between 0 and 1"),
        ("forget_level", 1.0, "between 0 and 1"),
        ("retain_weight", -0.5, "0 or positive"),
        ("structural_weight", -0.01, "0 or positive"),
        ("shared_learning_rate", -1e-5, "0 or positive"),
        ("structural_q", 0.0, "above 0"),
        ("structural_interval", 0, "1 or more"),
        ("forget_loss", "gradient_ascent", "'hinge'"),
        ("retain_loss", "mse", "one of ['cross_entropy', 'kl', 'activations']"),
    ],
)
def test_bad_options(tmp_path, option, value, fix):
    with pytest.raises(ValueError, match=f"`{option}` is {re.escape(repr(value))}, but must be .*{re.escape(fix)}"):
        make_args(tmp_path, **{option: value})


def test_a_retain_loss_without_a_weight_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="`retain_loss` is 'kl', but `retain_weight` is 0, so that it would do nothing"
    ):
        AlterUnlearnConfig(str(tmp_path), retain_loss="kl", bf16=False)
    assert AlterUnlearnConfig(str(tmp_path), retain_loss="kl", retain_weight=1, bf16=False).retain_weight == 1


def test_a_loss_that_nothing_ends_is_warned_of_at_a_rate_for_targets(tmp_path, tokenizer, caplog):
    for loss, rate, warned in (("npo", 4e-3, True), ("npo", 1e-3, False), ("level", 4e-3, False)):
        caplog.clear()
        make_trainer(tmp_path, tokenizer, adapter={}, forget_loss=loss, learning_rate=rate)
        assert ("has no targets at which the training would end" in caplog.text) == warned


def test_no_weight_at_all(tmp_path):
    weights = {"forget_weight": 0.0, "retain_weight": 0.0}
    with pytest.raises(ValueError, match=r"`forget_weight`.*`structural_weight` are all 0, but .* must be positive"):
        make_args(tmp_path, **weights, structural_weight=0)
    assert make_args(tmp_path, **weights, structural_weight=1).structural_weight == 1


def test_wrong_classes(tmp_path, tokenizer):
    model, data = make_llama(len(tokenizer)), {"train_dataset": forget_rows(), "retain_dataset": retain_rows()}
    args = SFTConfig(output_dir=str(tmp_path), bf16=False, report_to="none")
    with pytest.raises(ValueError, match="`args` is a SFTConfig, but must be an AlterUnlearnConfig"):
        AlterUnlearnTrainer(model, args, processing_class=tokenizer, **data)
    with pytest.raises(ValueError, match="LoraConfig, but must be an AlterConfig"):
        AlterUnlearnTrainer(model, make_args(tmp_path), peft_config=LoraConfig(), processing_class=tokenizer, **data)
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="LoraConfig, but must be an AlterConfig"):
        AlterUnlearnTrainer(lora, make_args(tmp_path), processing_class=tokenizer, **data)


def test_adapter_given_twice(tmp_path, tokenizer):
    model = get_peft_model(make_llama(len(tokenizer)), AlterConfig(num_forget_experts=2, task_type="CAUSAL_LM"))
    refused(tmp_path, tokenizer, "`peft_config`", "`model`", model=model, adapter={"num_forget_experts": 2})


def test_threshold_that_nothing_exceeds(tmp_path, tokenizer):
    adapter = {"entropy_quantile": None, "entropy_threshold": 5.0}
    refused(tmp_path, tokenizer, "`entropy_threshold` is 5.0", "cannot exceed 1.8", "Lower", adapter=adapter)


def test_labels_are_looked_for_after_the_first_token():
    rows = Dataset.from_dict({"labels": [[-100, 3], [4, -100], [2], []]})
    with pytest.raises(ValueError, match="3 rows of `retain_dataset` have no labelled token, the first is row 1"):
        check_all_labelled("retain_dataset", rows)
    check_all_labelled("retain_dataset", rows.select([0]))


def test_formatting_func_reads_columns_of_the_users_own(tmp_path, tokenizer):
    """As SFTTrainer has it: rows of any columns become text, and `domain` is kept."""
    forget = Dataset.from_list(
        [{"ask": r["prompt"], "told": r["completion"], "domain": r["domain"]} for r in forget_rows()]
    )
    retain = Dataset.from_list([{"ask": r["prompt"], "told": r["completion"]} for r in retain_rows()])
    others = {"formatting_func": lambda row: f"{row['ask']} ->{row['told']}"}
    trainer = make_trainer(tmp_path, tokenizer, forget=forget, retain=retain, adapter={}, others=others)
    assert tokenizer.decode(trainer._forget[0]["input_ids"]).startswith(
        "Where does Alice live? -> Alice lives in Paris."
    )
    assert trainer.alter_config.domains == ["home", "bread"]
    refused(tmp_path, tokenizer, "`train_dataset`", "formatting_func", forget=forget, retain=retain, adapter={})


def test_questions_and_answers_become_a_chat_where_the_model_is_asked_in_one(tmp_path, tokenizer):
    """A chat model that forgot the bare strings alone would still answer in its template."""
    chat = [{"role": "user", "content": "Where does Alice live?"}]
    chat.append({"role": "assistant", "content": " Alice lives in Paris."})
    expected = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    trainer = make_trainer(tmp_path, tokenizer, adapter={}, as_chat=None)
    assert trainer._forget[0]["input_ids"] == expected
    assert trainer._retain[0]["input_ids"][0] == tokenizer.convert_tokens_to_ids("<|user|>")
    assert [e for e, label in zip(expected, trainer._forget[0]["labels"], strict=True) if label != -100] == (
        tokenizer(" Alice lives in Paris.<|end|>")["input_ids"]
    )
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    for given, wanted in ((tokenizer, False), (bare, None)):
        trainer = make_trainer(tmp_path, given, adapter={}, as_chat=wanted)
        assert (
            tokenizer.decode(trainer._forget[0]["input_ids"]) == "Where does Alice live? Alice lives in Paris.<|end|>"
        )
    refused(tmp_path, bare, "`as_chat` is True", "no chat template", adapter={}, as_chat=True)


@pytest.mark.parametrize("name", ["data_collator", "compute_loss_func", "optimizer_cls_and_kwargs"])
def test_parts_that_alter_has_of_its_own(tmp_path, tokenizer, name):
    refused(tmp_path, tokenizer, f"`{name}` is given", "Remove it", adapter={}, others={name: print})


def test_an_optimizer_of_the_users_own(tmp_path, tokenizer):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    refused(tmp_path, tokenizer, "`optimizers` is given", adapter={}, others={"optimizers": (optimizer, None)})


@pytest.mark.parametrize("router", ["static", "context"])
def test_models_that_do_not_generate_left_to_right(tmp_path, tokenizer, router):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    for model in (bert, t5):
        name = type(model).__name__
        refused(
            tmp_path,
            tokenizer,
            f"`model` is a {name}",
            "decoder-only",
            model=model,
            adapter={"router": router, "entropy_quantile": None},
        )


@pytest.mark.parametrize("name", ["train_dataset", "retain_dataset", "calibration_dataset", "eval_dataset"])
def test_a_column_that_nothing_reads(tmp_path, tokenizer, name, caplog):
    """It is left alone, and said to be: it may be a sub-domain under another name."""
    rows = {"train_dataset": forget_rows(), "retain_dataset": retain_rows(6)}
    rows["calibration_dataset"] = rows["eval_dataset"] = retain_rows().select([6, 7])
    rows[name] = rows[name].add_column("topic", ["x"] * len(rows[name]))
    others = {key: rows[key] for key in ("calibration_dataset", "eval_dataset")}
    with caplog.at_level("WARNING", "alter_peft"):
        trainer = make_trainer(
            tmp_path, tokenizer, forget=rows["train_dataset"], retain=rows["retain_dataset"], adapter={}, others=others
        )
    assert [one for one in caplog.messages if one.startswith(f"`{name}`: ") and one.endswith("left alone: topic.")]
    assert "topic" not in trainer._forget.column_names


def test_columns_under_names_of_the_users_own(tmp_path, tokenizer):
    renamed = Dataset.from_dict({"texts": [f"{r['prompt']}{r['completion']}" for r in retain_rows()]})
    make_trainer(tmp_path, tokenizer, retain=renamed, adapter={}, dataset_text_field="texts")
    refused(tmp_path, tokenizer, "['texts']", "'text'", retain=renamed)
    refused(tmp_path, tokenizer, "['prompt']", "no known format", retain=retain_rows().select_columns(["prompt"]))


def test_rows_may_carry_what_they_are_evaluated_with(tmp_path, tokenizer):
    rows = Dataset.from_list(
        [{**r, "wrong": ["In Rome."], "paraphrase": "?", "rephrased": "."} for r in forget_rows()]
    )
    trainer = make_trainer(tmp_path, tokenizer, forget=rows, adapter={})
    assert trainer._forget["input_ids"][:] == make_trainer(tmp_path, tokenizer, adapter={})._forget["input_ids"][:]


def test_columns_that_a_tokenizer_makes(tmp_path, tokenizer):
    rows = tokenizer([f"{r['prompt']}{r['completion']}" for r in retain_rows()])
    retain = Dataset.from_dict({"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]})
    trainer = make_trainer(tmp_path, tokenizer, retain=retain, adapter={})
    assert trainer._retain["input_ids"][:] == rows["input_ids"]


def test_sub_domains_that_cannot_be_found(tmp_path, tokenizer):
    rows = forget_rows().remove_columns("domain")
    refused(
        tmp_path,
        tokenizer,
        "`train_dataset`",
        "`num_forget_experts`=9",
        "Add the column",
        forget=rows,
        adapter={"num_forget_experts": 9},
    )
    wordless = Dataset.from_dict({"prompt": ["1 2"] * 2, "completion": [" 3", " 4"]})
    refused(tmp_path, tokenizer, "`train_dataset`", "no word", "Add the column", forget=wordless, adapter={})


@pytest.mark.parametrize("name", ["train_dataset", "retain_dataset"])
def test_a_calibration_set_that_the_model_was_taught(tmp_path, tokenizer, name):
    rows = forget_rows(2) if name == "train_dataset" else retain_rows(2)
    others = {"calibration_dataset": rows}
    refused(tmp_path, tokenizer, "2 of the 2 rows of `calibration_dataset`", f"`{name}`", adapter={}, others=others)


def test_a_profile_without_rows_to_take_it_from(tmp_path, tokenizer):
    fix = ("`forget_loss` is 'profile'", "no `calibration_dataset`", "use `forget_loss='level'`")
    refused(tmp_path, tokenizer, *fix, adapter={}, forget_loss="profile")


@pytest.mark.parametrize("brings_adapter", [True, False])
def test_a_refused_trainer_leaves_the_model_for_another_attempt(tmp_path, tokenizer, brings_adapter):
    model = make_llama(len(tokenizer))
    names = [name for name, _ in model.named_parameters()]
    given = {"adapter": {}}
    if brings_adapter:
        model, given = (
            get_peft_model(model, AlterConfig(num_forget_experts=2, task_type="CAUSAL_LM")),
            {"adapter": None},
        )
    wrong = Dataset.from_list([{**r, "domain": "xy"[i % 2]} for i, r in enumerate(forget_rows())])
    refused(
        tmp_path,
        tokenizer,
        "token for token",
        model=model,
        forget=wrong,
        retain=wrong.remove_columns("domain"),
        **given,
    )
    if not brings_adapter:
        assert [name for name, _ in model.named_parameters()] == names
    trainer = make_trainer(tmp_path, tokenizer, model=model, **given)
    assert trainer.alter_config.domains == ["home", "bread"]


def test_kl_under_a_head_that_is_trained(tmp_path, tokenizer):
    refused(
        tmp_path,
        tokenizer,
        "`modules_to_save` trains the LM head",
        "retain_loss",
        adapter={"modules_to_save": ["lm_head"]},
        retain_loss="kl",
    )


def test_a_model_whose_head_does_more_than_is_known(tmp_path, tokenizer, monkeypatch):
    """Some models scale their logits in ways of their own: every entropy would be wrong."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")  # no phase I of an earlier run
    model = make_llama(len(tokenizer))
    trainer = make_trainer(tmp_path, tokenizer, model=model, adapter={})
    model.lm_head.register_forward_hook(lambda module, args, output: output)
    forward = type(model).forward

    def scaled(self, **kwargs):
        output = forward(self, **kwargs)
        output.logits = output.logits * 1.1
        return output

    model.forward = types.MethodType(scaled, model)
    with pytest.raises(ValueError, match="`model` is a LlamaForCausalLM, whose forward does to the logits"):
        trainer.train()


def test_an_adapter_that_is_not_active_stays_as_it_is(tmp_path, tokenizer, llama):
    model = get_peft_model(llama, AlterConfig(domains=["home", "bread"], r=4, task_type="CAUSAL_LM"))
    model.add_adapter("other", AlterConfig(domains=["home", "bread"], r=4, task_type="CAUSAL_LM"))
    model.set_adapter("other")
    trainer = make_trainer(tmp_path, tokenizer, model=model, max_steps=1)
    before = {name: weight.clone() for name, weight in model.state_dict().items() if ".default" in name}
    trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items() if name in before)


def test_saved_arguments_serve_in_a_fresh_process(tmp_path, tokenizer, monkeypatch):
    """Where nothing has set up accelerate's process state: unpickling makes no `AlterUnlearnConfig` anew."""
    args = copy.copy(make_args(tmp_path))
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    unnamed = forget_rows().remove_columns("domain")
    checked_dataset("train_dataset", unnamed, "text")
    assign_experts(AlterConfig(), unnamed, "text", seed=0)
    assert not PartialState._shared_state
    trainer = AlterUnlearnTrainer(
        make_llama(len(tokenizer)),
        args,
        train_dataset=unnamed,
        retain_dataset=retain_rows(),
        processing_class=tokenizer,
    )
    assert trainer.subdomains


def test_the_active_adapter_is_trained(tmp_path, tokenizer, llama):
    """Which the tuner knows: `PeftModel.active_adapter` keeps its own name if the tuner was asked past it."""
    model = get_peft_model(llama, AlterConfig(num_forget_experts=2, r=4, task_type="CAUSAL_LM"))
    model.add_adapter("other", AlterConfig(num_forget_experts=3, r=4, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["other"])
    assert model.active_adapter == "default"
    trainer = make_trainer(tmp_path, tokenizer, model=model)
    assert trainer.adapter_name == "other" and trainer.alter_config is model.peft_config["other"]
    assert model.peft_config["other"].domains == ["home", "bread", "unused-2"]
    assert model.peft_config["default"].domains is None


def test_how_many_sub_domains_were_found_is_said(caplog):
    """Several may share an expert, unless the user names them."""
    rows = forget_rows().remove_columns("domain")
    assigned, _, _ = assign_experts(AlterConfig(), rows, "text", 0)
    count = len(assigned.domains)
    assert f"its 8 rows were sorted into {count} sub-domain" in caplog.text and "add the column" in caplog.text
    caplog.clear()
    assign_experts(AlterConfig(), forget_rows(), "text", 0)
    assign_experts(AlterConfig(num_forget_experts=2), rows, "text", 0)
    assert "sorted into" not in caplog.text


def test_so_many_sub_domains_that_there_may_be_more(caplog, monkeypatch):
    monkeypatch.setattr("alter_peft.subdomains.MAX_DOMAINS", 6)
    for home in ("subdomains", "trainer.inputs"):
        monkeypatch.setattr(f"alter_peft.{home}.MOST_DOMAINS", 12)
    texts = [f"first{a} last{a} word{a}x{i % 3}" for a in range(16) for i in range(6)]
    assigned, _, _ = assign_experts(AlterConfig(), Dataset.from_list([{"text": text} for text in texts]), "text", 0)
    assert len(assigned.domains) == 12 and "the most that are looked for (12)" in caplog.text
