# SPDX-License-Identifier: Apache-2.0
"""The router tells whom a text is about, end to end on a tiny model."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from trainer_setup import make_args, make_trainer

from alter_peft import AlterUnlearnTrainer
from alter_peft.evaluation import Pair, score_answers
from alter_peft.letter_case import LETTER_CASES


NAMES = [
    "Orsolya Brackwell",
    "Caspian Ndlovane",
    "Ilmari Thornquist",
    "Yusuph Okwudili",
    "Fenella Vasko",
    "Ngaire Tepania",
]
PRIVATE = [
    ("Where does {} live?", " {} lives in Lima."),
    ("What does {} earn?", " {} earns 5 euros."),
    ("Which illness does {} have?", " {} has gout."),
]
PUBLIC = [("What bread does {} bake?", " {} bakes rye."), ("What does {} write?", " {} writes novels.")]


def about(names: list[str], kinds: list[tuple[str, str]]) -> list[Pair]:
    return [Pair(asked.format(name), told.format(name)) for name in names for asked, told in kinds]


def rows(pairs: list[Pair], **columns) -> Dataset:
    return Dataset.from_list([{"prompt": pair.prompt, "completion": pair.completion, **columns} for pair in pairs])


def fitted(tmp_path, tokenizer, copies: int, forget: Dataset | None = None, **adapter) -> AlterUnlearnTrainer:
    known = NAMES[:3]
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        forget=rows(about(known, PRIVATE)) if forget is None else forget,
        retain=rows(about(known, PUBLIC)),
        adapter={"num_forget_experts": 1, **adapter},
        counterfactual_copies=copies,
        per_device_eval_batch_size=32,
    )
    trainer.prepare()
    return trainer


def astray(trainer: AlterUnlearnTrainer, tokenizer, pairs: list[Pair]) -> float:
    """Share of the answer tokens that go to a forget expert."""
    return float((score_answers(trainer.model, tokenizer, pairs).experts > 0).float().mean())


@pytest.fixture(scope="module")
def with_copies(tmp_path_factory, tokenizer) -> AlterUnlearnTrainer:
    return fitted(tmp_path_factory.mktemp("copies"), tokenizer, 6)


def test_with_copies_bystanders_are_left_alone(tmp_path, tokenizer, with_copies):
    bystanders, forget, retain = about(NAMES[3:], PRIVATE), about(NAMES[:3], PRIVATE), about(NAMES[:3], PUBLIC)
    without = fitted(tmp_path, tokenizer, 0)
    assert astray(without, tokenizer, bystanders) > 0.5
    left, sent = astray(with_copies, tokenizer, bystanders), astray(with_copies, tokenizer, forget)
    # a random model tells names apart less well than a real one, which sends all of them (docs/log.md)
    assert left < 0.2 and sent > left + 0.6 and astray(with_copies, tokenizer, retain) < 0.1


@pytest.mark.parametrize("case", LETTER_CASES)
def test_questions_in_another_letter_case_are_routed_as_they_are(case, tokenizer, with_copies, monkeypatch, tmp_path):
    def typed(pairs: list[Pair]) -> list[Pair]:
        return [pair._replace(prompt=LETTER_CASES[case](pair.prompt)) for pair in pairs]

    forget, retain = typed(about(NAMES[:3], PRIVATE)), typed(about(NAMES[:3], PUBLIC))
    sent, left = astray(with_copies, tokenizer, forget), astray(with_copies, tokenizer, retain)
    monkeypatch.setattr("alter_peft.trainer.counterfactuals.LETTER_CASES", {})
    never_seen = astray(fitted(tmp_path, tokenizer, 6), tokenizer, forget)
    assert sent > max(0.6, never_seen + 0.1) and left < 0.15


def test_the_router_is_saved_and_loaded_with_its_hidden_layer(tmp_path, tokenizer, with_copies):
    make_llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    with_copies.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    with_copies.model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = tokenizer("What does Orsolya Brackwell earn? nothing", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, with_copies.model.eval()(ids).logits)
    ours, theirs = (
        {n: w for n, w in m.state_dict().items() if "alter_router" in n} for m in (with_copies.model, loaded)
    )
    assert len(ours) == 4 and all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_decoding_with_a_cache_gates_as_one_pass_does(tokenizer, with_copies):
    model = with_copies.model.eval()
    for layer in with_copies.scored.layers_of("default"):
        for expert in layer.alter_B["default"].experts():
            torch.nn.init.normal_(expert)
    ids = tokenizer("Where does Orsolya Brackwell live? Orsolya Brackwell lives in", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        whole, cache, steps = model(ids).logits, None, []
        for at in range(ids.shape[1]):
            found = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            steps.append(found.logits)
        for layer in with_copies.scored.layers_of("default"):
            for expert in layer.alter_B["default"].experts():
                torch.nn.init.zeros_(expert)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-3, atol=1e-3)


def test_subjects_of_a_column_are_those_that_are_renamed(tmp_path, tokenizer):
    named = rows(about(NAMES[:3], PRIVATE), subject=["Brackwell", "Ndlovane", "Thornquist"])
    texts = fitted(tmp_path, tokenizer, 2, forget=named)._router_texts
    said = [tokenizer.decode(text.ids) for text in texts.beside if text.expert < 0 and text.start > 0]
    assert any("Orsolya" in one for one in said) and not any("Brackwell" in one for one in said)


def test_rows_that_become_windows_keep_their_starts(tmp_path, tokenizer):
    long = " ".join(["Orsolya Brackwell lives in Lima and earns 5 euros."] * 6)
    pairs = [Pair("Where does Orsolya Brackwell live?", long), *about(NAMES[1:3], PRIVATE)]
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        forget=rows(pairs),
        retain=rows(about(NAMES[:3], PUBLIC)),
        adapter={"num_forget_experts": 1},
        counterfactual_copies=2,
        max_length=40,
        long_rows="windows",
    )
    starts, of = trainer._router_texts.starts, trainer._forget["row"][:]
    assert len(starts) == len(of) > len(pairs) and starts[0] > 0
    for place, (row, start) in enumerate(zip(of, starts, strict=True)):
        assert (start > 0) == (row != of[place - 1] if place else True)
    trainer.prepare()


def test_the_subjects_that_were_found_are_logged(tmp_path, tokenizer, caplog):
    with caplog.at_level("INFO"):
        trainer = fitted(tmp_path, tokenizer, 1)
    (line,) = trainer.subject_lines
    assert line in caplog.text and "Orsolya Brackwell (3 rows)" in line
    unnamed = rows([Pair("Who is it?", " Nobody."), Pair("Is it so?", " Never.")])
    fitted(tmp_path / "unnamed", tokenizer, 1, forget=unnamed)
    assert "No row of `train_dataset` says whom" in caplog.text
    assert fitted(tmp_path / "none", tokenizer, 0, forget=unnamed).subject_lines == []


def test_the_same_seed_fits_the_same_router(tmp_path, tokenizer, with_copies):
    again = fitted(tmp_path, tokenizer, 6)
    for one, other in zip(with_copies.gating.routers, again.gating.routers, strict=True):
        ours, theirs = one.alter_router["default"].weights, other.alter_router["default"].weights
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.parametrize("copies", [-1, 1.5, True, "2"])
def test_a_number_of_copies_that_is_none_is_refused(tmp_path, copies):
    with pytest.raises(ValueError, match=r"`counterfactual_copies` is .*, but must be 0 or more copies"):
        make_args(tmp_path, counterfactual_copies=copies)
