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
"""What an answer is worth to a model: its probability, its ROUGE-L, and where its tokens were routed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alter_peft.losses import score_tokens
from alter_peft.tuner.decoder import LanguageModelHead, find_decoder
from alter_peft.tuner.layer import AlterLayer


class Pair(NamedTuple):
    """A question and its answer, and false answers of the same form if there are any."""

    prompt: str
    completion: str
    wrong: tuple[str, ...] = ()


def encode_pair(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> tuple[list[int], int]:
    """Token ids of the pair as a chat (or as plain text without a chat template), and the length of its prompt."""
    if tokenizer.chat_template is None:
        prompt = tokenizer(pair.prompt)["input_ids"]
        return tokenizer(pair.prompt + " " + pair.completion)["input_ids"], len(prompt)
    user = {"role": "user", "content": pair.prompt}
    render: Any = tokenizer.apply_chat_template
    prompt = render([user], add_generation_prompt=True, return_dict=True)["input_ids"]
    chat = [user, {"role": "assistant", "content": pair.completion}]
    return render(chat, return_dict=True)["input_ids"], len(prompt)


class AnswerScores(NamedTuple):
    """
    probability: exp of the mean log-probability of each answer's tokens, one number a pair (TOFU, arXiv 2401.06121).
    experts: the expert that each answer token was sent to, row after row; `None` without a gated adapter.
    """

    probability: list[float]
    experts: Tensor | None

    @property
    def mean(self) -> float:
        """Mean answer probability."""
        return sum(self.probability) / len(self.probability)

    def astray(self, is_forget: bool) -> float:
        """Share of answer tokens sent to the retain expert (of forget text), or to a forget expert (of any other)."""
        if self.experts is None:
            return 0.0
        wrong = self.experts == 0 if is_forget else self.experts > 0
        return float(wrong.float().mean())


@torch.no_grad()
def score_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], batch_size: int = 8, desc: str | None = None
) -> AnswerScores:
    """
    Probability of every answer and the experts of its tokens.

    Args:
        model: a causal language model, with or without an ALTER adapter (of which the first active one counts).
        tokenizer: its tokenizer.
        pairs: questions and answers.
    """
    if not pairs:
        raise ValueError("`pairs` is empty. Give at least one question and answer.")
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder, head = find_decoder(base).module, LanguageModelHead(base)
    context = next((m.context for m in model.modules() if isinstance(m, AlterLayer)), None)
    device = next(base.parameters()).device
    encoded = [encode_pair(tokenizer, pair) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda i: len(encoded[i][0]))
    probability, experts = [0.0] * len(pairs), []
    model.eval()
    for rows in tqdm(list(_batches(order, batch_size)), desc=desc, disable=None if desc else True, leave=False):
        ids, mask, labels = (t.to(device) for t in _pad([encoded[row] for row in rows]))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False)[0][:, :-1]
            labelled = labels[:, 1:] != -100
            log_prob = score_tokens(hidden[labelled], head, labels[:, 1:][labelled]).log_prob
        for row, part in zip(rows, log_prob.split(labelled.sum(dim=1).tolist()), strict=True):
            probability[row] = float(part.mean().exp())
        if context is not None and context.active():
            gates = context.state.gates[context.active()[0][1]]
            experts.append(gates[:, :-1].argmax(dim=-1)[labelled].cpu())
    return AnswerScores(probability, torch.cat(experts) if experts else None)


@torch.no_grad()
def answer_rouge(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    batch_size: int = 12,
    max_new_tokens: int = 40,
    desc: str | None = None,
) -> list[float]:
    """ROUGE-L recall (rouge-score, stemmed) of the greedy answers, one number a pair, as TOFU has it."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    device = next(model.parameters()).device
    scores: list[float] = []
    model.eval()
    for batch in tqdm(list(_batches(pairs, batch_size)), desc=desc, disable=None if desc else True, leave=False):
        prompts = [ids[:length] for ids, length in (encode_pair(tokenizer, pair) for pair in batch)]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for pair, answer in zip(batch, answers, strict=True):
            scores.append(scorer.score(pair.completion, answer)["rougeL"].recall)
    return scores


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _pad(encoded: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor, Tensor]:
    width = max(len(ids) for ids, _ in encoded)
    ids = torch.zeros(len(encoded), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (tokens, prompt) in enumerate(encoded):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        labels[i, prompt : len(tokens)] = ids[i, prompt : len(tokens)]
    return ids, mask, labels
