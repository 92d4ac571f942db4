# SPDX-License-Identifier: Apache-2.0
"""What a model makes of a set of questions: the scores of the true answers, and answers of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from alter_peft.answer_end import EndOfAnswer
from alter_peft.chat import Message, as_messages, encode_conversation, encode_text
from alter_peft.entropy import log_probabilities, map_row_chunks
from alter_peft.generation import continuations
from alter_peft.scoring import Row, ScoredModel
from alter_peft.tuner.layer import AlterLayer


T = TypeVar("T")


class Pair(NamedTuple):
    """
    A question and its answer.

    Without a chat template nothing is put between the two, as in TRL: a space there belongs to either of them.

    prompt, completion: the two texts.
    wrong: false answers of the same form, if there are any.
    rephrased: the true answer in other words, which TOFU compares the false ones with.
    given: the beginning of the answer, put in the model's mouth; `completion` is what follows it and alone counts, and
        `wrong` and `rephrased` follow it as well.
    turns: the messages before the prompt, if the conversation has more than the two turns.
    is_text: whether it is plain text even where there is a chat template, as a document without a prompt is.
    """

    prompt: str
    completion: str
    wrong: tuple[str, ...] = ()
    rephrased: str | None = None
    given: str = ""
    turns: tuple[Message, ...] = ()
    is_text: bool = False


def spread(items: Sequence[T], count: int | None) -> list[T]:
    """So many of the items, evenly spread over them; all of them by default and if there are fewer."""
    count = len(items) if count is None else min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def encode_pair(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> tuple[list[int], int]:
    """
    Token ids of the pair, and where among them its answer begins, as in training (`alter_peft.chat`).

    With a chat template the pair is a conversation, whose last two turns are the question and the answer; without one
    the answer follows as it stands, and EOS follows it.
    """
    if pair.is_text or (tokenizer.chat_template is None and not pair.turns):
        encoded = encode_text(tokenizer, pair.prompt, pair.completion, pair.given)
    else:
        messages, first = as_messages(pair.prompt, pair.given + pair.completion)
        messages = [*pair.turns, *messages]
        encoded = encode_conversation(tokenizer, messages, len(pair.turns) + first, pair.given)
    return encoded.ids, encoded.start


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | Pair], where: str
) -> list[tuple[list[int], int]]:
    """
    Token ids of each text, and the first of them to be scored: of its answer, or of a plain text, but never the first
    of all, which nothing predicts.

    Args:
        where: what the texts are of, as an error begins.

    Raises:
        ValueError: a text has no token that is scored.
    """
    encoded = []
    for row, text in enumerate(texts):
        ids, start = (tokenizer(text)["input_ids"], 1) if isinstance(text, str) else encode_pair(tokenizer, text)
        if max(start, 1) >= len(ids):
            what = repr(text) if isinstance(text, str) else f"prompt {text.prompt!r}, answer {text.completion!r}"
            raise ValueError(
                f"{where} has no token to score in row {row}, {what}: nothing predicts the first token of a text. "
                "Give it a prompt, or leave it out."
            )
        encoded.append((ids, max(start, 1)))
    return encoded


def check_lengths(
    scored: ScoredModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | Pair], where: str
) -> None:
    """Raise a `ValueError` if a text or a pair is longer than the model's positions; `where` as in `encode_texts`."""
    if scored.positions is not None:
        scored.check_lengths([len(ids) for ids, _ in encode_texts(tokenizer, texts, where)], where)


class AnswerScores(NamedTuple):
    """
    The answers of a set under a model, row after row of the set.

    log_probs: ln p of each token of an answer, end of turn included, float32 (n_i,); the first token of a text, which
        nothing predicts, is none of them.
    greedy: whether greedy decoding would have said that token: of several with the same logit, which are common under
        bfloat16, it says one. Bool (n_i,).
    content: how many of the n_i tokens are the answer's own text; special tokens and white space follow.
    experts: the expert that each token was sent to, answers joined; `None` without a gated adapter.
    """

    log_probs: list[Tensor]
    greedy: list[Tensor]
    content: list[int]
    experts: Tensor | None

    @property
    def means(self) -> list[float]:
        """Mean log-probability of each answer's tokens, in nats."""
        return [float(row.mean()) for row in self.log_probs]

    @property
    def probability(self) -> list[float]:
        """exp of the mean log-probability of each answer's tokens (TOFU, arXiv 2401.06121)."""
        return [float(row.mean().exp()) for row in self.log_probs]

    @property
    def mean(self) -> float:
        """Mean answer probability."""
        return sum(self.probability) / len(self.log_probs)

    def astray(self, is_forget: bool) -> list[float]:
        """Share of each answer's tokens sent to the retain expert (of forget text) or a forget expert (of other)."""
        return [float(((row == 0) if is_forget else (row > 0)).float().mean()) for row in self.routes]

    @property
    def routes(self) -> list[Tensor]:
        """`experts` of each answer, (n_i,); empty without a gated adapter, which sends no token anywhere."""
        return [] if self.experts is None else [*self.experts.split([len(row) for row in self.log_probs])]


def own_text(values: Sequence[Tensor], content: Sequence[int]) -> list[Tensor]:
    """
    The values (n_i,) of the answers' own text, without those of what ends a turn; `content` as in [`AnswerScores`].

    Raises:
        ValueError: an answer without text of its own.
    """
    empty = next((row for row, n in enumerate(content) if n < 1), None)
    if empty is not None:
        raise ValueError(f"Answer {empty} has no text, so there are no tokens to score. Leave it out of the set.")
    return [row[:n] for row, n in zip(values, content, strict=True)]


def labelled_row(ids: list[int], start: int) -> Row:
    """A row whose tokens from `start` on are to be predicted."""
    return ids, [-100] * start + ids[start:]


def score_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], batch_size: int = 8, desc: str | None = None
) -> AnswerScores:
    """
    Log-probability of every answer's tokens and the experts that they are sent to, from one pass over the pairs.

    In eval mode, and in the precision of the context: call it under `torch.autocast` to measure under autocast.

    Args:
        model: a causal language model, with or without an adapter (of ALTER adapters the first active one counts).
        desc: the name of the set, for messages and the progress bar.

    Raises:
        ValueError: `pairs` is empty; an answer has no token that is scored; a pair is longer than the model's
            positions; or a log-probability is no finite number: the model is broken.
    """
    _require_pairs(pairs)
    scored = ScoredModel(model)
    active = scored.gating.active() if scored.gating is not None else []
    encoded = encode_texts(tokenizer, pairs, f"The set {desc!r}" if desc else "`pairs`")
    log_probs, greedy, experts = ([torch.empty(0)] * len(pairs) for _ in range(3))
    for batch in scored.passes([labelled_row(*one) for one in encoded], batch_size, desc=desc):
        log_prob, first = _score_tokens(batch.hidden, scored.head, batch.labels)
        for (row, of_row), (_, own) in zip(batch.split(log_prob), batch.split(first), strict=True):
            log_probs[row], greedy[row] = of_row, own
        if active:
            for row, part in batch.split(scored.sent_to(batch, active[0][1])):
                experts[row] = part
    broken = sum(not bool(row.isfinite().all()) for row in log_probs)
    if broken:
        raise ValueError(
            f"`model` gives log-probabilities that are NaN or infinite to {broken} of {len(pairs)} answers: its "
            "weights or activations overflow. Train it with a lower learning rate, or measure it in float32."
        )
    end = EndOfAnswer(tokenizer)
    content = [end.content_length(ids[start:]) for ids, start in encoded]
    return AnswerScores(log_probs, greedy, content, torch.cat(experts) if active else None)


def _score_tokens(hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """ln p of the labels, float32 (n,), and whether each is the first choice, as `generate` makes it, bool (n,)."""

    def score(rows: Tensor, label: Tensor) -> Tensor:
        logits = head(rows)
        log_prob = log_probabilities(logits).gather(-1, label.unsqueeze(-1)).squeeze(-1).float()
        return torch.stack([log_prob, (logits.argmax(dim=-1) == label).float()], dim=-1)

    log_prob, first = map_row_chunks(score, 256, hidden, labels).unbind(-1)
    return log_prob, first.bool()


def routes_tokens(model: Any) -> bool:
    """Whether an active adapter of the model sends each token to an expert, so that there are `experts`."""
    context = next((module.context for module in model.modules() if isinstance(module, AlterLayer)), None)
    return context is not None and bool(context.active())


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    batch_size: int = 12,
    max_new_tokens: int = 40,
    desc: str | None = None,
    **options: Any,
) -> list[str]:
    """
    What the model answers to each prompt: greedily, unless `options` of `generate` say otherwise.

    Of the model's own `generation_config` the special tokens count alone: with its penalties and filters the answers
    would not be those of the probabilities that `score_answers` reads. With `num_return_sequences=n`, n answers to the
    first prompt come first, and so on. In eval mode, and in the precision of the context, as `score_answers`. Where
    nothing stands before an answer, not even BOS, the model is given its first token, as in scoring, and goes on. An
    answer ends where the model has no more positions.

    Raises:
        ValueError: `pairs` is empty, there is nothing to begin with, or a prompt is longer than the model's positions.
    """
    _require_pairs(pairs)
    padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    options = {"pad_token_id": padding, **options}
    answers: list[str] = []
    scored, all_encoded = ScoredModel(model), [encode_pair(tokenizer, pair) for pair in pairs]
    # one token of an answer at least
    scored.check_lengths([length + 1 for _, length in all_encoded], f"The set {desc!r}" if desc else "`pairs`")
    starts = range(0, len(pairs), batch_size)
    for start in tqdm(starts, desc=desc, disable=None if desc else True, leave=False):
        encoded = all_encoded[start : start + batch_size]
        prompts = [ids[: max(length, 1)] for ids, length in encoded]
        if [] in prompts:
            raise ValueError(f"`pairs` has no text in row {start + prompts.index([])}, and the tokenizer has no EOS.")
        output = continuations(scored, prompts, max_new_tokens, **options)
        of_each = len(output) // len(prompts)
        said = [
            [*(prompts[row // of_each] if encoded[row // of_each][1] == 0 else []), *one]
            for row, one in enumerate(output)
        ]
        answers += tokenizer.batch_decode(said, skip_special_tokens=True)
    return answers


def _require_pairs(pairs: Sequence[Pair]) -> None:
    if not pairs:
        raise ValueError("`pairs` is empty. Give at least one question and answer.")
