# SPDX-License-Identifier: Apache-2.0
"""Are our parts of open-unlearning's composites what its code would say of the same model and rows?

    python examples/studies/open_unlearning.py --model MODEL --tofu TOFU [--split forget01] [--limit 40]

Its logic is restated here, one answer at a time, from logits. Sources: of locuslab/open-unlearning
src/evals/metrics/memorization.py (2db47ec), utils.py (5420d43), mia/min_k_plus_plus.py (f4d8463) and
configs/eval/tofu_metrics/mia_*.yaml (09aaf40, k = 0.4); mia/min_k.py, zlib.py and utils.py as its first author's fork
has them (Dornavineeth/open-unlearning, 2952d4a, 360726e, 202719b); the aggregator `prob_mean` of the truth ratio as
pull request 163 has it; in float32.

A template whose turns end in more than one token (ChatML: `<|im_end|>`, a newline) is where the two differ: theirs
appends EOS and counts all but the last token as the answer's own, ours the answer's text alone. `--one_end` gives
theirs a template of one token there, and then all are equal.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from alter_peft.evaluation import TOFU_METRICS, ModelOnSet, Pair, Scores, measure, read_tofu
from alter_peft.evaluation.answers import spread
from alter_peft.evaluation.open_unlearning import MEM_PARTS, PRIV_PARTS, attack_aucs, memorization_parts


K = 0.4
ATTACKS = {"LOSS": "loss", "ZLib": "zlib", "Min-k": "min_k", "Min-k++": "min_k_plus_plus"}


class Reference:
    """One answer: its labels and their log-probabilities over the vocabulary, and what is made of these."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> None:
        asked = [{"role": "user", "content": prompt}]
        whole = [*asked, {"role": "assistant", "content": answer}]
        before: Any = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        ids: Any = tokenizer.apply_chat_template(whole, return_dict=False)
        ids = ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
        assert ids[: len(before)] == before
        self.labels: Tensor = torch.tensor(ids[len(before) :])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, len(before) - 1 : -1]
        self.log_probs: Tensor = logits.float().log_softmax(dim=-1)
        self.text = str(tokenizer.decode(self.labels.tolist(), skip_special_tokens=True))

    @cached_property
    def loss(self) -> float:
        """evaluate_probability: of all labels, EOS among them."""
        return float(torch.nn.functional.nll_loss(self.log_probs, self.labels))

    @cached_property
    def zlib(self) -> float:
        return self.loss / len(zlib.compress(self.text.encode("utf-8")))

    # tokenwise_logprobs and tokenwise_vocab_logprobs leave the last label out

    @cached_property
    def hits(self) -> Tensor:
        return self.log_probs[:-1].argmax(dim=-1) == self.labels[:-1]

    @cached_property
    def exact_memorization(self) -> float:
        return float(self.hits.sum() / len(self.hits))

    @cached_property
    def extraction_strength(self) -> float:
        length = len(self.hits)
        k = next((k for k in range(length) if bool(self.hits[k:].all())), length - 1)  # the loop's last k
        return 1 - k / length

    @cached_property
    def own(self) -> Tensor:
        return self.log_probs[:-1].gather(1, self.labels[:-1, None])[:, 0]

    @cached_property
    def min_k(self) -> float:
        return _lowest(self.own)

    @cached_property
    def min_k_plus_plus(self) -> float:
        log_p = self.log_probs[:-1]
        mu = (log_p.exp() * log_p).sum(dim=-1)
        sigma = torch.clamp((log_p.exp() * log_p.square()).sum(dim=-1) - mu.square(), min=1e-6)
        return _lowest((self.own - mu) / sigma.sqrt())


def _lowest(values: Tensor) -> float:
    return -float(np.mean(np.sort(values.numpy())[: max(1, int(len(values) * K))]))


def their_memorization(model: Any, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> dict[str, float]:
    """The parts of Mem."""

    def losses(prompt: str, answers: Sequence[str]) -> list[float]:
        return [Reference(model, tokenizer, prompt, answer).loss for answer in answers]

    answers = [Reference(model, tokenizer, pair.prompt, pair.completion) for pair in pairs]
    correct = np.exp([-losses(pair.prompt, [pair.rephrased or ""])[0] for pair in pairs])
    wrong = np.exp([-np.mean(losses(pair.prompt, pair.wrong)) for pair in pairs])  # aggregate_to_1D, of losses
    found = (
        np.mean([answer.extraction_strength for answer in answers]),
        np.mean([answer.exact_memorization for answer in answers]),
        np.mean(correct),
        np.mean(correct / (correct + wrong + 1e-10)),  # prob_mean
    )
    return {name: 1 - float(value) for name, value in zip(MEM_PARTS, found, strict=True)}


def their_aucs(
    model: Any, tokenizer: PreTrainedTokenizerBase, forget: Sequence[Pair], holdout: Sequence[Pair]
) -> dict[str, float]:
    """mia_auc: 1 when the forget data is much likelier than the holdout data."""
    sets = [
        [Reference(model, tokenizer, pair.prompt, pair.completion) for pair in pairs] for pairs in (forget, holdout)
    ]
    labels = [0] * len(forget) + [1] * len(holdout)
    values = {name: [getattr(one, of) for pairs in sets for one in pairs] for name, of in ATTACKS.items()}
    return {name: float(roc_auc_score(labels, of_attack)) for name, of_attack in values.items()}


def ours(model: Any, tokenizer: PreTrainedTokenizerBase, forget: Sequence[Pair], holdout: Sequence[Pair]) -> Scores:
    """The scores that our composites are made of."""
    needed = {key.metric for key in MEM_PARTS.values()} | {*PRIV_PARTS.values()}
    found = Scores()
    for name, pairs in (("forget", forget), ("holdout", holdout)):
        metrics = [metric for metric in TOFU_METRICS[name] if metric in needed]
        found.add(measure(ModelOnSet(model, tokenizer, name, pairs, name == "forget"), metrics))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tofu", required=True)
    parser.add_argument("--split", default="forget01")
    parser.add_argument("--limit", type=int, help="how many rows of each set, spread evenly")
    parser.add_argument("--one_end", action="store_true", help="a template whose turns end in one token, for both")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.one_end:
        last = "'<|im_end|>' + ('' if loop.last and message['role'] == 'assistant' else '\n')"
        tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_end|>' + '\n'", last)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    sets = read_tofu(args.tofu, args.split).sets
    forget, holdout = (spread(sets[name], args.limit) for name in ("forget", "holdout"))
    scores = ours(model, tokenizer, forget, holdout)
    own = {
        **(memorization_parts(scores) or {}),
        **{name: 1 - auc for name, auc in (attack_aucs(scores) or {}).items()},
    }
    theirs = {**their_memorization(model, tokenizer, forget), **their_aucs(model, tokenizer, forget, holdout)}
    print("| part | ours | theirs |\n|---|---|---|")
    for name, value in theirs.items():
        print(f"| {name} | {own[name]:.4f} | {value:.4f} |")


if __name__ == "__main__":
    main()
