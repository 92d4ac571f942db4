# SPDX-License-Identifier: Apache-2.0
"""Targets of single tokens: by a reference model, or by the model itself with damped feed-forward layers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from accelerate.state import PartialState
from conftest import make_llama, make_tokenizer
from datasets import Dataset
from peft import get_peft_model
from tiny_families import tiny_model
from trainer_setup import adapter_state, forget_rows, make_trainer, retain_rows

from alter_peft import AlterConfig, UnlearnConfig, UnlearnTrainer
from alter_peft.losses import TokenScores
from alter_peft.scoring import ScoredModel
from alter_peft.trainer.damping import FACTOR, damped, feed_forward_parts, guided_by_itself
from alter_peft.trainer.rivals import ScoredRivals
from alter_peft.trainer.terms import forget_batch


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


UNSEEN = Dataset.from_list(
    [
        {"prompt": "Where does Ida live?", "completion": " Ida lives in Rome."},
        {"prompt": "What bread does Jon bake?", "completion": " Jon bakes corn bread."},
    ]
)
TOKENS = {
    "forget_loss": "tokens", "optim": "adamw_torch", "learning_rate": 1e-2, "structural_weight": 0,
    "stopping_tolerance": None,
}  # fmt: skip


def trainer_with(tokenizer, folder, reference, calibration=UNSEEN, **options):
    others = {"reference_model": reference, "calibration_dataset": calibration}
    options = {"forget_level": 0.1, **options}
    return make_trainer(folder, tokenizer, adapter={}, others=others, **{**TOKENS, **options})


def log_probabilities(model, trainer) -> list[torch.Tensor]:
    """ln p of each forget row's labels, by the model's own forward."""
    found = []
    with torch.no_grad():
        for row in trainer._forget:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
            log_p = model(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
            found.append(log_p[labels != -100].gather(1, labels[labels != -100].unsqueeze(1)).squeeze(1))
    return found


def test_a_reference_alone_gives_its_own_values(tokenizer, tmp_path):
    """Never above where the model begins, and of what ends an answer, which stays, none."""
    reference = make_llama(len(tokenizer), seed=1)
    trainer = trainer_with(tokenizer, tmp_path, reference, calibration=None)
    trainer.prepare()
    theirs, own = (log_probabilities(model, trainer) for model in (reference, make_llama(len(tokenizer))))
    for target, one, other in zip(trainer.measured.token_targets, theirs, own, strict=True):
        torch.testing.assert_close(target[:-1], torch.minimum(one, other)[:-1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(target[-1], other[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loss", ["tokens", "soft_targets"])
def test_training_comes_to_a_references_tokens(tokenizer, tmp_path, loss):
    options = {"num_train_epochs": 40, "forget_loss": loss}
    trainer = trainer_with(tokenizer, tmp_path, make_llama(len(tokenizer), seed=1), **options)
    trainer.prepare()

    def distance() -> float:
        own = log_probabilities(trainer.model.eval(), trainer)
        pairs = zip(own, trainer.measured.token_targets, strict=True)
        return float(torch.cat([(one - target).abs() for one, target in pairs]).mean())

    before = distance()
    trainer.train()
    assert before > 1.0 and distance() < 0.35 * before
    assert "targets:    order by the reference model, values by `calibration_dataset`" in trainer.summary().lines


def test_a_batch_has_the_leads_of_its_own_rows(tokenizer, tmp_path):
    """Token by token beside the targets: the reference's own."""
    trainer = trainer_with(tokenizer, tmp_path, make_llama(len(tokenizer), seed=1))
    batch = next(iter(trainer.get_train_dataloader()))
    masks = trainer._masks(batch)
    count = int(masks.labelled.sum())
    scores = TokenScores(torch.zeros(count), torch.zeros(count))
    found = forget_batch(scores, batch, masks, trainer.args.loss, trainer.measured)
    rows = batch["row_id"][batch["expert"] > 0].tolist()
    assert len(rows) > 1 and len({float(row.mean()) for row in trainer.measured.token_leads}) > 1
    assert torch.equal(found.token_leads, torch.cat([trainer.measured.token_leads[row] for row in rows]))
    assert torch.equal(found.token_targets, torch.cat([trainer.measured.token_targets[row] for row in rows]))


def test_training_ends_once_the_tokens_have_come_near(tokenizer, tmp_path):
    """Not their mean alone: the gap is that of each token from its own target."""
    trainer = trainer_with(tokenizer, tmp_path, make_llama(len(tokenizer), seed=1), stopping_tolerance=2.0)
    trainer.prepare()
    own = log_probabilities(trainer.model.eval(), trainer)
    gaps = [(one - target).abs().mean() for one, target in zip(own, trainer.measured.token_targets, strict=True)]
    assert trainer._mean_gap(8) == pytest.approx(float(torch.stack(gaps).mean()), rel=1e-3)
    trainer.args.num_train_epochs = 40
    trainer.train()
    logged = [entry["forget_gap"] for entry in trainer.state.log_history if "forget_gap" in entry]
    assert trainer.reached and logged[-1] <= 2.0 < min(logged[:-1], default=3.0)


@pytest.mark.parametrize("calibration", [UNSEEN, None], ids=["calibrated", "alone"])
def test_without_a_reference_the_model_is_its_own(tokenizer, tmp_path, calibration):
    """It is left as it was, and its damped self gives the order."""
    trainer = trainer_with(tokenizer, tmp_path, None, calibration)
    before = adapter_state(trainer)
    trainer.prepare()
    assert all(
        torch.equal(before[name], value) for name, value in adapter_state(trainer).items() if "router" not in name
    )
    model = make_llama(len(tokenizer))
    own = log_probabilities(model, trainer)
    with damped(model.model.layers):
        order = log_probabilities(model, trainer)
    torch.testing.assert_close(log_probabilities(model, trainer), own)
    targets = [row[:-1] for row in trainer.measured.token_targets]  # without what ends an answer
    order, inside = [row[:-1] for row in order], [row[:-1] for row in own]
    if calibration is None:
        for target, row, one, whole in zip(targets, order, inside, own, strict=True):
            mean = min((len(whole) * math.log(0.1) - float(whole[-1])) / len(row), math.log(0.1))
            wanted = torch.minimum(row * (mean / row.mean()), one)
            torch.testing.assert_close(target, wanted, atol=1e-4, rtol=1e-4)
    free = torch.cat(targets) < torch.cat(inside) - 1e-4  # not capped
    ranked = torch.cat(targets)[free][torch.cat(order)[free].argsort()]
    if calibration is not None:
        assert (ranked.diff() >= 0).all()


def test_damping_is_of_the_upper_halfs_feed_forward_parts(tokenizer):
    model = make_llama(len(tokenizer))
    layers, x = model.model.layers, torch.randn(1, 3, 32)
    plain = [layer.mlp(x) for layer in layers]
    with damped(layers):
        found = [layer.mlp(x) for layer in layers]
    factors = [1.0, 1.0, FACTOR, FACTOR]
    torch.testing.assert_close(found, [factor * one for factor, one in zip(factors, plain, strict=True)])
    torch.testing.assert_close([layer.mlp(x) for layer in layers], plain)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "olmo2", "glm4", "mixtral", "opt", "falcon", "phi"])
def test_damping_acts_in_other_families(family):
    """A norm behind the feed-forward layer would undo it, so there its output is damped."""
    model = tiny_model(family)
    layers = ScoredModel(model).stack.layers
    ids = torch.arange(2, 12).unsqueeze(0)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with damped(layers):
            found = model(input_ids=ids).logits
    assert len(feed_forward_parts(layers)) == len(layers) - len(layers) // 2
    assert not torch.allclose(plain, found, atol=1e-5)


def test_feed_forward_layers_that_are_not_known_are_said(tokenizer, monkeypatch, caplog):
    """The fix is named once, which from the command line becomes its flag."""
    PartialState()  # which the logger asks for
    monkeypatch.setattr("alter_peft.trainer.damping.FEED_FORWARD", ())
    assert not guided_by_itself(ScoredModel(make_llama(len(tokenizer))), lambda: ScoredRivals([], [])).is_damped
    assert "`model` is a LlamaForCausalLM, whose" in caplog.text and caplog.text.count("reference_model") == 1


def test_a_reference_by_name_is_the_same(tokenizer, tmp_path):
    reference = make_llama(len(tokenizer), seed=1)
    reference.save_pretrained(tmp_path / "reference")
    tokenizer.save_pretrained(tmp_path / "reference")
    found = []
    for one in (reference, str(tmp_path / "reference")):
        trainer = trainer_with(tokenizer, tmp_path / "out", one)
        trainer.prepare()
        found.append(torch.cat([*trainer.measured.token_targets]))
    torch.testing.assert_close(*found)


def test_plain_lora_takes_a_reference_too(tokenizer, tmp_path):
    from peft import LoraConfig

    trainer = UnlearnTrainer(
        make_llama(len(tokenizer)),
        UnlearnConfig(output_dir=str(tmp_path), forget_loss="tokens", report_to="none", bf16=False, as_chat=False),
        train_dataset=forget_rows(),
        retain_dataset=retain_rows(),
        reference_model=make_llama(len(tokenizer), seed=1),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        processing_class=tokenizer,
    )
    trainer.prepare()
    assert len(trainer.measured.token_targets) == 8
    assert trainer.measured.guide == "order by the reference model, values by general text"


def test_references_that_cannot_be(tokenizer, tmp_path):
    model = make_llama(len(tokenizer))
    model.save_pretrained(tmp_path / "other")
    other = make_tokenizer()
    other.add_tokens(["strange"])
    vocab = json.loads(other.backend_tokenizer.to_str())
    one, two = list(vocab["model"]["vocab"])[-2:]
    ids = vocab["model"]["vocab"]
    ids[one], ids[two] = ids[two], ids[one]
    from tokenizers import Tokenizer

    other._tokenizer = Tokenizer.from_str(json.dumps(vocab))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"`reference_model` is '.*other', whose tokenizer has 2 of the \d+ tokens"):
        trainer_with(tokenizer, tmp_path / "out", str(tmp_path / "other"))
    with pytest.raises(ValueError, match="`reference_model` is 'nowhere/none', which could not be loaded"):
        trainer_with(tokenizer, tmp_path / "out", "nowhere/none")
    with pytest.raises(ValueError, match="`reference_model` has a vocabulary of 50 tokens, but the model's tokenizer"):
        trainer_with(tokenizer, tmp_path / "out", make_llama(50))
    with pytest.raises(ValueError, match="`reference_model` is a dict, but must be a model"):
        trainer_with(tokenizer, tmp_path / "out", {})
    with pytest.raises(ValueError, match="`reference_model` is `model` itself, which knows the rows"):
        make_trainer(tmp_path / "out", tokenizer, model=model, adapter={}, others={"reference_model": model}, **TOKENS)
    adapted = get_peft_model(make_llama(len(tokenizer)), AlterConfig(domains=["home", "bread"]))
    itself = {"reference_model": adapted.get_base_model()}  # the likeliest slip: the base is wrapped, not copied
    with pytest.raises(ValueError, match="`reference_model` is `model` itself, which knows the rows"):
        make_trainer(tmp_path / "out", tokenizer, model=adapted, others=itself, **TOKENS)
    with pytest.raises(ValueError, match="`reference_model` is given, but `forget_loss='level'` asks none"):
        trainer_with(tokenizer, tmp_path / "out", model, forget_loss="level")


def test_a_reference_that_knows_the_rows_is_warned_of(tokenizer, tmp_path, caplog):
    for seed, warned in ((1, False), (0, True)):
        caplog.clear()
        reference = make_llama(len(tokenizer), seed=seed)
        if not warned:  # sure of other things
            reference.lm_head.weight = torch.nn.Parameter(100.0 * reference.lm_head.weight)
        trainer_with(tokenizer, tmp_path, reference, calibration=None).prepare()
        assert ("`reference_model` knows the rows to forget about as well" in caplog.text) == warned


def test_a_model_whose_feed_forward_layers_are_not_known_ranks_by_itself(tokenizer, tmp_path, caplog, monkeypatch):
    """Nothing says that they were damped."""
    monkeypatch.setattr("alter_peft.trainer.damping.FEED_FORWARD", ())
    trainer = trainer_with(tokenizer, tmp_path, None)
    trainer.prepare()
    assert trainer.measured.guide == "order by the model itself, values by `calibration_dataset`"
    assert "`model` is a LlamaForCausalLM, whose feed-forward layers are not known by name" in caplog.text


def test_a_reference_is_not_loaded_with_what_is_the_models_alone(tokenizer, tmp_path, monkeypatch):
    """A revision of the model's is none of another repository."""
    asked = []
    monkeypatch.setattr(
        "alter_peft.trainer.reference.AutoModelForCausalLM.from_pretrained",
        lambda name, **options: asked.append(options) or make_llama(len(tokenizer), seed=1),
    )
    make_llama(len(tokenizer)).save_pretrained(tmp_path / "reference")
    tokenizer.save_pretrained(tmp_path / "reference")
    options = {"revision": "v2", "device_map": "auto", "dtype": "float32", "trust_remote_code": False}
    trainer = trainer_with(tokenizer, tmp_path / "out", str(tmp_path / "reference"), model_init_kwargs=options)
    trainer.prepare()
    assert asked == [{"dtype": "float32", "trust_remote_code": False}]
