# SPDX-License-Identifier: Apache-2.0
"""What the tests of the Hub do as a user, in a process of its own: the stock client reads HF_ENDPOINT on import."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import make_llama
from huggingface_hub import HfApi, hf_hub_download, upload_folder
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from trainer_setup import make_trainer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TrainerCallback

from alter_peft import AlterConfig


VOCABULARY = 384  # as many tokens as the tests' tokenizer may have


def attempt(call: Callable[..., Any], *args: Any, **kwargs: Any) -> list[tuple[str, str]]:
    """The error that the call ends in, and those that led to it: (type, message), outermost first."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        chain: list[tuple[str, str]] = []
        link: BaseException | None = error
        while link is not None:
            chain.append((type(link).__name__, str(link)))
            link = link.__cause__ or link.__context__
        return chain
    return []


def outputs(model: torch.nn.Module) -> list[list[float]]:
    """The last position's logits (2 x V) for two rows of tokens."""
    tokens = torch.arange(24).reshape(2, 12) % 100
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits[:, -1].tolist()


def push_base(repo_id: str, token: str) -> None:
    make_llama(VOCABULARY).push_to_hub(repo_id, token=token, private=True)


def make_adapter(base_id: str, seed: int, token: str, router: str = "context") -> PeftModel:
    """A random adapter, whose experts are not at zero, on a base from the Hub."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(base_id, token=token)
    options = {"domains": ["person", "recipe"], "r": 4, "task_type": "CAUSAL_LM", "init_weights": False}
    return get_peft_model(base, AlterConfig(router=router, **options))


def push_adapter(
    base_id: str, repo_id: str, seed: int, token: str, router: str = "context", **options: Any
) -> tuple[str, list[list[float]]]:
    """PEFT's own `push_to_hub`; the commit and what the adapter says."""
    model = make_adapter(base_id, seed, token, router)
    info = model.push_to_hub(repo_id, token=token, **options)
    return info.oid, outputs(model)


def upload_saved_adapter(base_id: str, folder: Path, repo_id: str, token: str) -> None:
    """PEFT's `save_pretrained`, then the client's `upload_folder`."""
    make_adapter(base_id, 0, token).save_pretrained(folder)
    HfApi().create_repo(repo_id, private=True, token=token)
    upload_folder(repo_id=repo_id, folder_path=folder, token=token)


def upload_pickle(base_id: str, folder: Path, repo_id: str, token: str) -> None:
    model = make_adapter(base_id, 0, token)
    model.save_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")
    HfApi().create_repo(repo_id, private=True, token=token)
    upload_folder(repo_id=repo_id, folder_path=folder, token=token)


def load_auto(repo_id: str, **options: Any) -> list[list[float]]:
    return outputs(AutoPeftModelForCausalLM.from_pretrained(repo_id, **options))


def load_logged_in(repo_id: str, token: str) -> list[list[float]]:
    """With the token of a login: the one way in which transformers sends it with all it asks for a tokenizer."""
    os.environ["HF_TOKEN"] = token
    try:
        return load_auto(repo_id)
    finally:
        del os.environ["HF_TOKEN"]


def load_on_base(base_id: str, repo_id: str, token: str, **options: Any) -> list[list[float]]:
    base = AutoModelForCausalLM.from_pretrained(base_id, token=token)
    return outputs(PeftModel.from_pretrained(base, repo_id, token=token, **options))


def try_to_load_on_base(base_id: str, repo_id: str, base_token: str, **options: Any) -> list[tuple[str, str]]:
    base = AutoModelForCausalLM.from_pretrained(base_id, token=base_token)
    return attempt(PeftModel.from_pretrained, base, repo_id, **options)


def load_config(repo_id: str, **options: Any) -> str:
    return AlterConfig.from_pretrained(repo_id, **options).alter_peft_version


def try_to_download(repo_id: str, filename: str, **options: Any) -> list[tuple[str, str]]:
    return attempt(hf_hub_download, repo_id, filename, **options)


def try_to_push(base_id: str, repo_id: str, base_token: str, token: str | bool) -> list[tuple[str, str]]:
    return attempt(make_adapter(base_id, 0, base_token).push_to_hub, repo_id, token=token)


@dataclass
class Trained:
    outputs: list[list[float]]
    error: list[tuple[str, str]]  # of a push with a wrong token


@dataclass
class Steps(TrainerCallback):
    """What the model said after each step."""

    outputs: list[list[list[float]]] = field(default_factory=list)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.outputs.append(outputs(kwargs["model"]))


def train_named_and_push(
    base_id: str, folder: Path, repo_id: str, tokenizer: PreTrainedTokenizerBase, token: str
) -> Steps:
    """As `train_and_push`, of an adapter that is not `default`, with the last checkpoint."""
    base = AutoModelForCausalLM.from_pretrained(base_id, token=token)
    config = AlterConfig(domains=["home", "bread"], r=4, entropy_quantile=0.6)
    steps = Steps()
    trainer = make_trainer(
        folder, tokenizer, model=get_peft_model(base, config, adapter_name="later"), max_steps=2, save_steps=1,
        save_strategy="steps", push_to_hub=True, hub_model_id=repo_id, hub_token=token, hub_private_repo=True,
        hub_strategy="checkpoint", hub_always_push=True, save_total_limit=1, others={"callbacks": [steps]},
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    return Steps(steps.outputs)


def load_named(base_id: str, repo_id: str, name: str, token: str, **options: Any) -> list[list[float]]:
    base = AutoModelForCausalLM.from_pretrained(base_id, token=token)
    return outputs(PeftModel.from_pretrained(base, repo_id, name, subfolder=name, token=token, **options))


def train_and_push(
    base_id: str, folder: Path, repo_id: str, tokenizer: PreTrainedTokenizerBase, token: str
) -> Trained:
    """A training that pushes each checkpoint and its end."""
    base = AutoModelForCausalLM.from_pretrained(base_id, token=token)
    trainer = make_trainer(
        folder, tokenizer, model=base, adapter={}, num_train_epochs=1, save_strategy="epoch", push_to_hub=True,
        hub_model_id=repo_id, hub_token=token, hub_private_repo=True,
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    return Trained(outputs(trainer.model), attempt(trainer.push_to_hub, token="hf_wrong"))
