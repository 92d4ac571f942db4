# SPDX-License-Identifier: Apache-2.0
"""What speed.py measures: a model, of a folder or with random weights of a known shape, on rows."""

from __future__ import annotations

import copy
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast


SEED = 0

# Sizes of public checkpoints, whose weights are drawn at random here
_SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
_LLAMA_3 = {"vocab_size": 128_256, "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {**_LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "llama-8b": {**_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
                 "num_attention_heads": 32, "num_key_value_heads": 8},
    # five of SmolLM2's 30 layers, and a small vocabulary
    "shallow": {**_SMOLLM2, "vocab_size": 8192, "num_hidden_layers": 5, "max_position_embeddings": 16_384,
                "tie_word_embeddings": True},
    "tiny": {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096},
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Rows(NamedTuple):
    """Questions with their answers."""

    forget: list[tuple[str, str]]
    retain: list[tuple[str, str]]
    calibration: list[tuple[str, str]]


@dataclass(frozen=True)
class Setting:
    """
    What is measured: a model on rows.

    Args:
        model: a folder, or a name of `SHAPES`, with random weights.
        output: where the results go.
        tofu: a folder of TOFU's JSON lines; without it the rows are the package's invented people.
        steps: how many are counted.
        length: tokens of a row, about; without it rows are as long as they are.
        vocabulary: to which the model's is enlarged.
        pairs: rows to forget, and as many to retain, a step.
        questions: the rows themselves, instead of those.
    """

    model: str
    output: Path
    tofu: Path | None = None
    steps: int = 32
    length: int | None = None
    vocabulary: int | None = None
    pairs: int = 4
    questions: Rows | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 over float32 weights; in their own precision bfloat16 weights need none."""
        return torch.autocast("cpu", torch.bfloat16) if self.dtype == torch.float32 else nullcontext()

    @cached_property
    def base(self) -> Any:
        if self.model in SHAPES:
            torch.manual_seed(SEED)
            config = LlamaConfig(**SHAPES[self.model], pad_token_id=0, bos_token_id=None, eos_token_id=1)
            with self.device:
                model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype).to(self.device)
        if self.vocabulary is not None:
            model.resize_token_embeddings(self.vocabulary, mean_resizing=False)
        return model.eval()

    def fresh_model(self) -> Any:
        """A model for an adapter of its own, whose frozen weights are those of all others of this setting."""
        shared = {id(tensor): tensor for tensor in chain(self.base.parameters(), self.base.buffers())}
        return copy.deepcopy(self.base, shared)

    @cached_property
    def tokenizer(self) -> Any:
        return trained_tokenizer() if self.model in SHAPES else AutoTokenizer.from_pretrained(self.model)

    @cached_property
    def rows(self) -> Rows:
        rows = self.questions or (people() if self.tofu is None else tofu_rows(self.tofu))
        if self.length is None:
            return rows
        text = self.tokenizer(" ".join(answer for _, answer in chain(*rows)), add_special_tokens=False)["input_ids"]
        long = text * (2 + self.length // len(text))
        starts = range(0, len(text), 17)

        def stretched(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
            cuts = (starts[place % len(starts)] for place in range(len(pairs)))
            most = max(8, self.length - 40)  # of a question and what a template puts around the two
            return [(q, self.tokenizer.decode(long[at : at + most])) for (q, _), at in zip(pairs, cuts, strict=True)]

        return Rows(*map(stretched, rows))

    @property
    def described_rows(self) -> str:
        """Where the rows are from."""
        return "TOFU" if self.tofu is not None else "invented people of the package"

    def tokens(self, batch: int, length: int) -> torch.Tensor:
        """Token ids of the rows, one after another, (batch, length)."""
        text = self.tokenizer(" ".join(chain(*chain(*self.rows))), add_special_tokens=False)["input_ids"]
        ids = torch.tensor(text * (1 + batch * length // len(text)))
        return ids[: batch * length].view(batch, length).to(self.device)


def trained_tokenizer() -> PreTrainedTokenizerFast:
    """A small one, for random weights: nothing is downloaded."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(chain(*chain(*people())), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|end|>", chat_template=TEMPLATE
    )


def people() -> Rows:
    """The package's invented people."""
    folder = Path(str(files("alter_peft.evaluation.tasks"))) / "data" / "people"
    return Rows(*(_read(folder / f"{name}.jsonl", "prompt", "completion") for name in Rows._fields))


def tofu_rows(folder: Path) -> Rows:
    """Rows of holdout authors, none of holdout01, to forget, and of retain90 to retain. Nothing is chosen by them."""
    authors, others = (_read(folder / f"{name}.jsonl", "question", "answer") for name in ("holdout10", "retain90"))
    return Rows(authors[60:200], others[1000:1140], authors[200:220])


def _read(path: Path, question: str, answer: str) -> list[tuple[str, str]]:
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [(row[question], row[answer]) for row in rows]
