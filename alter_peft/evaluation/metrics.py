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
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from alter_peft.losses import score_tokens
from alter_peft.tuner.decoder import LanguageModelHead, find_decoder
from alter_peft.tuner.gating import evaluating
from alter_peft.tuner.layer import AlterLayer


class Pair(NamedTuple):
    """
    A question and its answer, and false answers of the same form if there are any.

    Without a chat template nothing is put between the two, as in TRL: a space there belongs to either of them.
    """

    prompt: str
    completion: str
    wrong: tuple[str, ...] = ()


def encode_pair(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> tuple[list[int], int]:
    """
    Token ids of the pair, and where among them its answer begins, as TRL tokenises a prompt and its completion.

    With a chat template the pair is a conversation of two turns; without one the answer follows as it stands, and EOS
    follows it. It begins where the ids leave those of the prompt alone, which may be earlier than these end: tokens
    merge over the border, and some tokenizers end every text by EOS.
    """
    if tokenizer.chat_template is None:
        end = tokenizer.eos_token or ""
        answer = pair.completion if pair.completion.endswith(end) else pair.completion + end
        prompt, ids = tokenizer(pair.prompt)["input_ids"], tokenizer(pair.prompt + answer)["input_ids"]
    else:
        user = {"role": "user", "content": pair.prompt}
        render: Any = tokenizer.apply_chat_template
        prompt = render([user], add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = render([user, {"role": "assistant", "content": pair.completion}], return_dict=True)["input_ids"]
    shared = takewhile(lambda both: both[0] == both[1], zip(prompt, ids, strict=False))
    return ids, len(list(shared))


class AnswerScores(NamedTuple):
    """
    probability: exp of the mean log-probability of each answer's tokens, one number a pair (TOFU, arXiv 2401.06121).
    experts: the expert that each answer token was sent to, pair after pair; `None` without a gated adapter.
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

    In eval mode, and in the precision of the context: call it under `torch.autocast` to measure under autocast.

    Args:
        model: a causal language model, with or without an ALTER adapter (of which the first active one counts).
        tokenizer: its tokenizer.
        pairs: questions and answers.

    Raises:
        ValueError: `pairs` is empty.
    """
    _require_pairs(pairs)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder, head = find_decoder(base).module, LanguageModelHead(base)
    context = next((m.context for m in model.modules() if isinstance(m, AlterLayer)), None)
    active = context.active() if context is not None else []
    device = next(base.parameters()).device
    encoded = [encode_pair(tokenizer, pair) for pair in pairs]
    labelled_rows = [{"input_ids": ids, "labels": [-100] * start + ids[start:]} for ids, start in encoded]
    order = sorted(range(len(pairs)), key=lambda i: len(encoded[i][0]))
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    probability, experts = [0.0] * len(pairs), [torch.empty(0)] * len(pairs)
    for rows in tqdm(list(_batches(order, batch_size)), desc=desc, disable=None if desc else True, leave=False):
        batch = {name: value.to(device) for name, value in collate([labelled_rows[row] for row in rows]).items()}
        labels = batch.pop("labels")[:, 1:]
        labelled = labels != -100
        with evaluating(model):
            hidden = decoder(**batch, use_cache=False)[0][:, :-1]
            log_prob = score_tokens(hidden[labelled], head, labels[labelled]).log_prob
        sizes = labelled.sum(dim=1).tolist()
        for row, part in zip(rows, log_prob.split(sizes), strict=True):
            probability[row] = float(part.mean().exp())
        if context is not None and active:
            routed = context.state.gates[active[0][1]][:, :-1].argmax(dim=-1)[labelled].cpu()
            for row, part in zip(rows, routed.split(sizes), strict=True):
                experts[row] = part
    return AnswerScores(probability, torch.cat(experts) if active else None)


@torch.no_grad()
def answer_rouge(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    batch_size: int = 12,
    max_new_tokens: int = 40,
    desc: str | None = None,
) -> list[float]:
    """
    ROUGE-L recall (rouge-score, stemmed) of the greedy answers, one number a pair, as TOFU has it.

    In eval mode, and in the precision of the context, as `score_answers`.

    Raises:
        ValueError: `pairs` is empty.
    """
    from rouge_score.rouge_scorer import RougeScorer

    _require_pairs(pairs)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    device = next(model.parameters()).device
    scores: list[float] = []
    for batch in tqdm(list(_batches(pairs, batch_size)), desc=desc, disable=None if desc else True, leave=False):
        prompts = [ids[:length] for ids, length in (encode_pair(tokenizer, pair) for pair in batch)]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(device)
        with evaluating(model):
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for pair, answer in zip(batch, answers, strict=True):
            scores.append(scorer.score(pair.completion, answer)["rougeL"].recall)
    return scores


def _require_pairs(pairs: Sequence[Pair]) -> None:
    if not pairs:
        raise ValueError("`pairs` is empty. Give at least one question and answer.")


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
