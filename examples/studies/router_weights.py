# SPDX-License-Identifier: Apache-2.0
"""How much weight must retained text have when the router is fitted, and how many positions? Twenty sub-domains.

    python examples/studies/router_weights.py

TOFU's forget10 (20 authors) against 1600 retained rows, on SmolLM2-135M-Instruct as it is, with a router as it was
then: linear, of layer 12 of 30, half-life 8. Prints the share of answer tokens sent to a forget expert: of the forget
rows (and to the right one), of the retained rows, of 400 further rows of the same kind that it was not fitted on, and
of real authors and world facts. Needs the TOFU files in ../shared/data/tofu, or in the folder given as the first
argument.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from alter_peft.evaluation import Pair, encode_pair, read_tofu
from alter_peft.evaluation.answers import labelled_row
from alter_peft.scoring import pad_rows
from alter_peft.subdomains import discover_subdomains
from alter_peft.tuner.moving_average import moving_average


sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples that it builds on
import smollm2
import tofu


LAYER, HALF_LIFE = 12, 8.0


class Averages:
    """c_t of every position of some rows, where it is one that predicts an answer token, and the row's expert."""

    def __init__(self, model: torch.nn.Module, tokenizer, pairs: list[Pair], experts: list[int]) -> None:
        labelled = [labelled_row(*encode_pair(tokenizer, pair)) for pair in pairs]
        order = sorted(range(len(pairs)), key=lambda row: len(labelled[row][0]))
        averages, answers, owners = [], [], []
        seen: list[torch.Tensor] = []
        layer = model.model.layers[LAYER]
        handle = layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(args[0]), with_kwargs=True)
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16):
            for rows in (order[start : start + 16] for start in range(0, len(order), 16)):
                batch = pad_rows([labelled[row] for row in rows], model.device)
                labels = batch.pop("labels")[:, 1:]
                model.model(**batch)
                valid = batch["attention_mask"].bool()
                average = moving_average(seen.pop(), valid, HALF_LIFE).average()
                answer = torch.nn.functional.pad(labels != -100, (0, 1))
                for i, row in enumerate(rows):
                    averages.append(average[i, valid[i]].cpu().numpy())
                    answers.append(answer[i, valid[i]].cpu().numpy())
                    owners.append(np.full(int(valid[i].sum()), experts[row]))
        handle.remove()
        self.x, self.is_answer, self.expert = map(np.concatenate, (averages, answers, owners))


def main(folder: Path = tofu.DATA) -> None:
    model, tokenizer = smollm2.load()
    data = read_tofu(folder, "forget10")
    labels, names = discover_subdomains([f"{pair.prompt} {pair.completion}" for pair in data.forget])
    forget = Averages(model, tokenizer, data.forget, [1 + label for label in labels])
    sets = {"retain": data.retain[:1600], "other authors": data.retain[2400:2800]}
    sets["world"] = data.sets["world_facts"] + data.sets["real_authors"]
    kept = {name: Averages(model, tokenizer, pairs, [0] * len(pairs)) for name, pairs in sets.items()}
    count, generator = len(names), np.random.default_rng(0)
    print(f"{count} sub-domains\n| positions | weight of retain | forget | the right one | {' | '.join(sets)} | s |")
    print("|---|---|---|---|---|---|---|---|")
    for limit in (40_000, 160_000):
        picked = [generator.permutation(np.flatnonzero(forget.expert == d))[: limit // 2 // count]
                  for d in range(1, 1 + count)]  # fmt: skip
        own = np.concatenate(picked)
        others = generator.permutation(len(kept["retain"].x))[: limit // 2]
        x = np.concatenate([kept["retain"].x[others], forget.x[own]])
        y = np.concatenate([np.zeros(len(others), int), forget.expert[own]])
        for share in (1 / (1 + count), 0.5, 0.7):
            weights = {0: share * len(y) / len(others)}
            weights |= {d: (1 - share) / count * len(y) / max(1, int((y == d).sum())) for d in range(1, 1 + count)}
            start = time.monotonic()
            router = LogisticRegression(C=100.0, class_weight=weights, max_iter=1000).fit(x, y)
            seconds = time.monotonic() - start
            sent = router.predict(forget.x[forget.is_answer])
            shares = [(sent > 0).mean(), (sent == forget.expert[forget.is_answer]).mean()]
            shares += [(router.predict(one.x[one.is_answer]) > 0).mean() for one in kept.values()]
            cells = " | ".join(f"{value:.3f}" for value in shares)
            print(f"| {limit} | {share:.2f} | {cells} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
