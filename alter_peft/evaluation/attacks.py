# SPDX-License-Identifier: Apache-2.0
"""Attacks on an unlearned model by name. What one gives counts beyond what it gives on an oracle, attacked alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from alter_peft.tuner.model import AlterModel

from .answers import Pair, generate_answers
from .attack_prompts import AFTER_RETAIN, SHOWN, asking_otherwise
from .copies import without_adapters
from .measure import Asked, Score, measure
from .metrics import above_holdout, loss, loss_per_byte, membership_auc, min_k, rouge_l
from .quantization import merged_quantization, quantization, why_not_merged
from .relearning import LEARNING_RATE, Relearned, at_step, relearning


class Rows(NamedTuple):
    """
    What the attacks ask about and train on, and how.

    forget: the forget set.
    retain: rows that the model is to know still.
    holdout: rows of the same kind that neither the model nor the oracle has seen.
    paraphrased: the forget set with its questions in other words, if there is one.
    answered: how many questions are answered in full, for ROUGE-L; all by default.
    max_new_tokens: of such an answer; give what the other scores of the model were measured with.
    batch_size: rows of a pass and of a batch of answers; by default as for `Asked`, and 64 sampled answers.
    relearning_rate: the learning rate of an attacker who trains the model (see `relearn`).
    """

    forget: Sequence[Pair]
    retain: Sequence[Pair]
    holdout: Sequence[Pair]
    paraphrased: Sequence[Pair] = ()
    answered: int | None = None
    max_new_tokens: int = 40
    batch_size: int | None = None
    relearning_rate: float = LEARNING_RATE


class Attacked(NamedTuple):
    """
    What the attacks gave.

    scores: `"{attack}/{metric}"` -> score; of a curve those of its points, `"{attack}/{set}, step 5/{metric}"`.
    curves: `"{attack}/{set}/{metric}"` -> (steps, value) points.
    skipped: attack, or the first part of a score's name -> why it does not apply to this model or these rows.
    seconds: attack -> what it took.
    """

    scores: dict[str, Score]
    curves: dict[str, list[tuple[float, float]]]
    skipped: dict[str, str]
    seconds: dict[str, float]


# attacks on an adapter: what a plain model, such as an oracle, has in their place
PLAIN = {
    "switching_off": "a plain model has no adapter, so its own scores on the forget set take the place of these",
    "merged_quantization": "a plain model has no adapter to merge, so `quantized` takes the place of `merged`",
}


def sampling(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Pair],
    samples: int = 16,
    temperature: float = 1.0,
    max_new_tokens: int = 40,
    answered: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> dict[str, Score]:
    """
    Many answers to each question, drawn from the whole distribution: ROUGE-L recall of the best one and their mean.

    The best of n is leak@n of Reisizadeh et al. with ROUGE-L as the measure. PyTorch's generators are left as they
    were.

    Args:
        samples: answers to a question.
        answered: how many questions are asked; all by default.
        batch_size: answers drawn at once, at least those to one question; 64 by default.
        seed: of the draws.

    Returns:
        `"sampling/best_rouge"` and `"sampling/mean_rouge"`.

    References:
        Reisizadeh et al., "Leak@k: Unlearning Does Not Make LLMs Forget Under Probabilistic Decoding",
        arXiv 2511.04934.
    """
    asked = Asked(model, tokenizer, "sampling", forget, True, answered).asked
    options = {"num_return_sequences": samples, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        answers = generate_answers(
            model, tokenizer, asked, max(1, (batch_size or 64) // samples), max_new_tokens, "sampling", do_sample=True,
            **options,
        )  # fmt: skip
    found = rouge_l(answers, [pair.completion for pair in asked for _ in range(samples)])
    rows = [found[start : start + samples] for start in range(0, len(found), samples)]
    best, mean = [max(row) for row in rows], [sum(row) / samples for row in rows]
    return {
        "sampling/best_rouge": Score(sum(best) / len(best), best),
        "sampling/mean_rouge": Score(sum(mean) / len(mean), mean),
    }


def membership(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Pair],
    holdout: Sequence[Pair],
    batch_size: int | None = None,
) -> dict[str, Score]:
    """
    Can the forget set be told from text that was never seen, by how likely its answers are?

    About 0 says yes, it was trained on; the oracle's figure says no, whatever it is: the two sets may differ in other
    ways too. Above the oracle's the forget set stands out as well.

    Returns:
        `"membership/{min_k,loss,loss_per_byte}_auc"`: the AUC, with the rows of `min_k_auc`: the share of the holdout
        that each forget row is above.
    """
    sets = [("membership", forget), ("membership, holdout", holdout)]
    found = [Asked(model, tokenizer, name, pairs, batch_size=batch_size).scores for name, pairs in sets]
    texts = [[pair.completion for pair in pairs] for _, pairs in sets]
    statistics = {
        "min_k": [min_k(scores.log_probs, scores.content) for scores in found],
        "loss": [loss(scores.log_probs, scores.content) for scores in found],
        "loss_per_byte": [
            loss_per_byte(scores.log_probs, scores.content, text) for scores, text in zip(found, texts, strict=True)
        ],
    }
    return {
        f"membership/{name}_auc": Score(membership_auc(of_forget, of_holdout), above_holdout(of_forget, of_holdout))
        for name, (of_forget, of_holdout) in statistics.items()
    }


def switching_off(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Pair],
    metrics: Sequence[str] = ("probability", "rouge"),
    answered: int | None = None,
    max_new_tokens: int = 40,
    batch_size: int | None = None,
) -> dict[str, Score]:
    """
    The forget set with the adapter off, and with each forget expert of an ALTER adapter scaled to 0.

    Args:
        answered, max_new_tokens, batch_size: as for `Asked`.

    Returns:
        `"switched_off/{metric}"` and `"expert_off/{domain}/{metric}"`.

    Raises:
        ValueError: a plain model, which has nothing to switch off.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"`model` cannot be attacked so: {PLAIN['switching_off']}.")

    def measured(name: str) -> dict[str, Score]:
        return measure(Asked(model, tokenizer, name, forget, True, answered, max_new_tokens, batch_size), metrics)

    with without_adapters(model):
        scores = measured("switched_off")
    if isinstance(model.base_model, AlterModel):
        for domain in model.base_model.list_experts():
            with model.base_model.experts({domain: 0.0}):
                scores |= measured(f"expert_off/{domain}")
    return scores


def _asking(rows: Rows) -> dict[str, Any]:
    return {"answered": rows.answered, "max_new_tokens": rows.max_new_tokens, "batch_size": rows.batch_size}


def _relearning(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> Relearned:
    measured = {"answered": rows.answered, "max_new_tokens": rows.max_new_tokens, "rows_at_once": rows.batch_size}
    options = {"learning_rate": rows.relearning_rate, **measured}
    return relearning(model, tokenizer, rows.forget, rows.holdout, **options)


# name -> scores or curves of a model, its tokenizer and the rows
ATTACKS: dict[str, Callable[[Any, PreTrainedTokenizerBase, Rows], dict[str, Score] | Relearned]] = {
    "asking_otherwise": lambda model, tokenizer, rows: asking_otherwise(
        model, tokenizer, rows.forget, rows.retain, rows.paraphrased, **_asking(rows)
    ),
    "sampling": lambda model, tokenizer, rows: sampling(model, tokenizer, rows.forget, **_asking(rows)),
    "membership": lambda model, tokenizer, rows: membership(
        model, tokenizer, rows.forget, rows.holdout, rows.batch_size
    ),
    "switching_off": lambda model, tokenizer, rows: switching_off(model, tokenizer, rows.forget, **_asking(rows)),
    "quantization": lambda model, tokenizer, rows: quantization(model, tokenizer, rows.forget, **_asking(rows)),
    "merged_quantization": lambda model, tokenizer, rows: merged_quantization(
        model, tokenizer, rows.forget, **_asking(rows)
    ),
    "relearning": _relearning,
}


def check_rows(rows: Rows, names: Sequence[str]) -> None:
    """
    Before anything is computed: whether the rows are those that some attacks need.

    Raises:
        ValueError: an attack that does not exist, or whose rows are missing.
    """
    unknown = [name for name in names if name not in ATTACKS]
    if unknown:
        raise ValueError(f"`names` has {unknown}, but must be some of {list(ATTACKS)}.")
    least = 2 if "relearning" in names else 1  # a half of them
    if names and len(rows.forget) < least:
        raise ValueError(f"`forget` has {len(rows.forget)} rows, but the attacks {list(names)} need {least} at least.")
    unseen = [name for name in names if name in ("membership", "relearning")]
    if unseen and not rows.holdout:
        raise ValueError(
            f"`holdout` has no rows, but the attacks {unseen} need some: like the forget set, and never trained on."
        )


def not_applicable(model: Any, rows: Rows, name: str) -> dict[str, str]:
    """What of an attack, or all of it by its name, does not apply to a model or to its rows -> why."""
    if not isinstance(model, PeftModel) and name in PLAIN:
        return {name: PLAIN[name]}
    if name == "merged_quantization" and (reason := why_not_merged(model)) is not None:
        return {name: reason}
    skipped = {}
    if name == "asking_otherwise" and len(rows.retain) < SHOWN:
        skipped[f"asked/{AFTER_RETAIN}"] = f"{SHOWN} retained rows are to be shown, and there are {len(rows.retain)}"
    if name == "asking_otherwise" and not rows.paraphrased:
        skipped["asked/paraphrased"] = "the forget set was not given with its questions in other words"
    return skipped


def attack(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Rows, names: Sequence[str] = tuple(ATTACKS)
) -> Attacked:
    """
    Attack a model in some ways, and leave it as it was.

    The control is the same call on a model that never saw the forget set: an attack succeeds by what it gives beyond
    that. In the precision of the context.

    Args:
        model: any causal language model, with or without an adapter.
        names: of `ATTACKS`.

    Raises:
        ValueError: an attack that does not exist, or whose rows are missing; nothing was computed then.
    """
    check_rows(rows, names)
    result = Attacked({}, {}, {}, {})
    for name in names:
        skipped = not_applicable(model, rows, name)
        result.skipped.update(skipped)
        if name in skipped:
            continue
        start = time.time()
        for key, found in ATTACKS[name](model, tokenizer, rows).items():
            if isinstance(found, Score):
                result.scores[key] = found
            else:
                result.curves[key] = [(step, score.value) for step, score in found]
                result.scores.update((at_step(key, step), score) for step, score in found)
        torch.clear_autocast_cache()  # which keeps the weights of copies that are gone
        result.seconds[name] = time.time() - start
    return result
