# Copyright 2026 The alter-peft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import make_llama
from datasets import Dataset
from peft import LoraConfig
from trainer_setup import forget_rows, retain_rows
from trl import SFTConfig, SFTTrainer

from alter_peft.evaluation.baselines import FORGET_LOSSES, LabelledTrainer, LoraUnlearnTrainer
from alter_peft.losses import TokenScores
from alter_peft.tuner.decoder import last_hidden_states


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def make_trainer(tokenizer, folder, forget_loss="ihl", retain=None, **options) -> LoraUnlearnTrainer:
    defaults = {
        "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1,
        "gradient_checkpointing": False,
    }  # fmt: skip
    torch.manual_seed(0)
    return LoraUnlearnTrainer(
        make_llama(len(tokenizer)),
        SFTConfig(output_dir=str(folder), **{**defaults, **options}),
        forget_loss=forget_loss,
        train_dataset=forget_rows(),
        retain_dataset=retain_rows() if retain is None else retain,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        processing_class=tokenizer,
    )


def test_a_head_that_is_not_known_is_refused(tokenizer, tmp_path, monkeypatch):
    def refuse(*args):
        raise ValueError("no such head")

    monkeypatch.setattr("alter_peft.evaluation.answers.check_head", refuse)
    with pytest.raises(ValueError, match="no such head"):
        make_trainer(tokenizer, tmp_path)


def test_forget_losses_by_hand():
    scores = TokenScores(torch.tensor([0.6, 0.1]).log(), torch.tensor([0.3, 0.5]).log())
    assert FORGET_LOSSES["ihl"](scores).tolist() == pytest.approx([1.3, 0.6])
    assert FORGET_LOSSES["ga"](scores).exp().tolist() == pytest.approx([0.6, 0.1])


@pytest.mark.parametrize("forget_loss", list(FORGET_LOSSES))
def test_the_loss_is_that_of_a_loop_over_all_logits(tokenizer, tmp_path, forget_loss):
    trainer = make_trainer(tokenizer, tmp_path, forget_loss)
    batch = trainer.data_collator([trainer.train_dataset[(i, 3 - i)] for i in range(4)])
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = 0.0
    for rows, of_forget in ((range(4), True), (range(4, 8), False)):
        terms = []
        for row in rows:
            for t in range(1, batch["labels"].shape[1]):
                label = batch["labels"][row, t]
                if label != -100:
                    p = logits[row, t - 1].softmax(dim=-1)
                    rival = torch.cat([p[:label], p[label + 1 :]]).max()
                    forget = 1 + p[label] - rival if forget_loss == "ihl" else p[label].log()
                    terms.append(forget if of_forget else -p[label].log())
        expected += torch.stack(terms).mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)


def taught_weights(trainer_class, rows, tokenizer, folder, **options) -> torch.Tensor:
    torch.manual_seed(0)
    model = make_llama(len(tokenizer))
    args = SFTConfig(
        str(folder), report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, max_steps=3,
        dataloader_pin_memory=False, learning_rate=1e-2, per_device_train_batch_size=3, gradient_accumulation_steps=2,
        gradient_checkpointing=False, optim="sgd", **options,
    )  # fmt: skip
    trainer_class(model, args, train_dataset=rows, processing_class=tokenizer).train()
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


TEXTS = Dataset.from_dict({"text": [row["prompt"] + row["completion"] for row in retain_rows()]})


@pytest.mark.parametrize("rows", [retain_rows(), TEXTS], ids=["completions", "texts"])
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-6), (True, 1e-4)])
def test_labelled_tokens_alone_are_taught_as_by_trl(tokenizer, tmp_path, rows, bf16, tolerance):
    found = [taught_weights(kind, rows, tokenizer, tmp_path, bf16=bf16) for kind in (SFTTrainer, LabelledTrainer)]
    begin = torch.cat([weight.detach().flatten() for weight in make_llama(len(tokenizer)).parameters()])
    assert (found[0] - begin).abs().max() > 10 * tolerance
    torch.testing.assert_close(*found, atol=tolerance, rtol=0)


@pytest.mark.parametrize("options", [{"loss_type": "dft"}, {"packing": True}])
def test_other_losses_and_packed_rows_are_taught_by_trl(tokenizer, tmp_path, options, monkeypatch):
    if "packing" in options:  # TRL warns of attention across packed rows
        monkeypatch.setattr("trl.trainer.sft_trainer.logger.warning", lambda *args, **kwargs: None)
    options |= {"bf16": False, "max_length": 32}
    found = [taught_weights(kind, TEXTS, tokenizer, tmp_path, **options) for kind in (SFTTrainer, LabelledTrainer)]
    assert torch.equal(*found)


def test_pairs_change_with_the_epoch_and_cover_the_forget_set(tokenizer, tmp_path, monkeypatch):
    trainer, seen = make_trainer(tokenizer, tmp_path, num_train_epochs=2), []
    original = trainer.data_collator.torch_call
    chats = {tuple(row["input_ids"]): i for i, row in enumerate(trainer.train_dataset.forget)}

    def record(examples):
        seen.append([chats[tuple(example["forget"]["input_ids"])] for example in examples])
        return original(examples)

    monkeypatch.setattr(trainer.data_collator, "torch_call", record)
    trainer.train()
    assert [sorted(seen[i] + seen[i + 1]) for i in (0, 2)] == [list(range(8))] * 2
    assert seen[:2] != seen[2:]


def test_questions_become_turns_of_a_chat(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path)
    ids = trainer.train_dataset.retain[0]["input_ids"]
    assert tokenizer.decode(ids).startswith("<|user|>What is the sky?<|end|><|assistant|>")


def test_columns_beside_the_rows_are_left_out(tokenizer, tmp_path):
    retain = Dataset.from_list([{**row, "source": "a"} for row in retain_rows()])
    assert "source" not in make_trainer(tokenizer, tmp_path, retain=retain).train_dataset.retain.column_names


def test_an_unknown_loss_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"`forget_loss` is 'npo', but must be one of \['ihl', 'ga'\]"):
        make_trainer(tokenizer, tmp_path, "npo")


def test_the_hook_of_the_last_hidden_states_is_gone_after_an_error(llama):
    decoder = llama.model
    with pytest.raises(TypeError):
        last_hidden_states(SimpleNamespace(), decoder, torch.ones(1, 2), torch.ones(1, 2))
    assert not decoder._forward_hooks
