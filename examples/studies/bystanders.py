# SPDX-License-Identifier: Apache-2.0
"""Does the router know whom a question is about? On TOFU's authors, of whom no other figure of the docs was made.

    python examples/studies/bystanders.py tofu HuggingFaceTB/SmolLM2-135M-Instruct
    python examples/studies/bystanders.py people-1 HuggingFaceTB/SmolLM2-135M-Instruct "reads layer 12 of 30" --seed 1

In a folder of TOFU's files two authors (rows 40 to 79 of forget10) are to be forgotten and five of retain90 retained;
three authors more of retain90 and three of forget10 are bystanders, two of holdout10 are taught nowhere. The router is
fitted in phase I, before any expert is trained, on the base model, so that nothing has to be taught. Prints the share
of answer tokens that goes to a forget expert. `people-1` is draw 1 of development_people.py instead, `facts-1` its
draw of people with one fact each; names of ways may follow.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import development_people
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from alter_peft import AlterConfig, AlterUnlearnConfig, AlterUnlearnTrainer
from alter_peft.evaluation import Pair, score_answers
from alter_peft.evaluation.attacks.asking_otherwise import IDLE, prefixed


DRAWN = {"people": development_people.sets, "facts": development_people.one_fact}
WAYS = {
    "linear, no copies, half-life 8": (AlterConfig(router_hidden_size=0, router_half_life=8.0), 0),
    "linear, 12 copies": (AlterConfig(router_hidden_size=0), 12),
    "hidden layer, no copies": (AlterConfig(), 0),
    "hidden layer, 12 copies, half-life 8": (AlterConfig(router_half_life=8.0), 12),
    "hidden layer, 12 copies, half-life 24": (AlterConfig(router_half_life=24.0), 12),
    "hidden layer, 6 copies": (AlterConfig(), 6),
    "reads the embeddings": (AlterConfig(router_layer=0), 12),
    **{f"reads layer {layer} of 30": (AlterConfig(router_layer=layer), 12) for layer in (2, 4, 12)},
    "hidden layer, 12 copies (default)": (AlterConfig(), 12),
}


def read(folder: Path, name: str, question: str = "question") -> list[Pair]:
    lines = (folder / f"{name}.jsonl").read_text().splitlines()
    return [Pair(row[question], row["answer"]) for row in map(json.loads, lines)]


def sets(folder: Path) -> dict[str, list[Pair]]:
    ten, kept = read(folder, "forget10"), read(folder, "retain90")
    forget = ten[40:80]
    others = [*kept[1000:1020], *kept[2000:2020], *kept[3000:3020], *ten[100:160]]
    return {
        "forget": forget,
        "paraphrased": read(folder, "forget10_perturbed", "paraphrased_question")[40:80],
        "capitals": development_people.in_capitals(forget),
        "after 200 idle tokens": list(map(prefixed(IDLE), forget)),
        "after 600": list(map(prefixed(3 * IDLE), forget[::3])),
        "retain": kept[200:300],
        "retain, after 200": list(map(prefixed(IDLE), kept[200:300:5])),
        "bystanders": others,
        "bystanders, capitals": development_people.in_capitals(others),
        "never taught": read(folder, "holdout10")[:40],
        "real authors": read(folder, "real_authors")[:60],
        "world facts": read(folder, "world_facts")[:60],
    }


def main(asked: dict[str, list[Pair]], base: str, ways: list[str], seed: int = 0) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = {name: [{"prompt": p.prompt, "completion": p.completion} for p in asked[name]] for name in asked}
    forget, retain = (Dataset.from_list(rows[name]) for name in ("forget", "retain"))
    print(f"| router | {' | '.join(asked)} |\n|{'---|' * (1 + len(asked))}")
    for way in ways:
        config, copies = WAYS[way]
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        with tempfile.TemporaryDirectory() as folder:
            args = AlterUnlearnConfig(folder, counterfactual_copies=copies, seed=seed, report_to="none")
            trainer = AlterUnlearnTrainer(model, args, train_dataset=forget, retain_dataset=retain)
            trainer.prepare()
        with torch.autocast(trainer.model.device.type, torch.bfloat16):
            sent = [score_answers(trainer.model, tokenizer, pairs).experts for pairs in asked.values()]
        print(f"| {way} | {' | '.join(f'{(experts > 0).float().mean():.3f}' for experts in sent)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder of TOFU's files, or people-1, facts-1, people-2, ...")
    parser.add_argument("base")
    parser.add_argument("ways", nargs="*", default=[*WAYS], help=f"of {', '.join(map(repr, WAYS))}")
    parser.add_argument("--seed", type=int, default=0, help="of the copies and of the fit")
    given = parser.parse_args()
    kind, _, draw = given.data.partition("-")
    is_drawn = kind in DRAWN and draw.isdecimal()
    if not is_drawn and not Path(given.data).is_dir():
        parser.error(
            f"`data` is {given.data!r}, which is neither a folder nor {' nor '.join(f'{one}-1' for one in DRAWN)}."
        )
    asked = DRAWN[kind](int(draw)) if is_drawn else sets(Path(given.data))
    main(asked, given.base, given.ways, given.seed)
