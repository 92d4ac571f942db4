# SPDX-License-Identifier: Apache-2.0
"""The rows of speed.py's table without a training: decoding, prefill, many requests, loading, importing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from speed_arms import lora
from speed_setting import SEED, Setting
from speed_turns import Found, Measurement, Ratio, in_turn, now, repeated, timed
from transformers import StoppingCriteria, StoppingCriteriaList

from alter_peft import AlterConfig


PROMPT, TOKENS = 64, 8  # of a call: its prompt, and the tokens after the first one, each of which is counted
PREFILL = 1024
EXPERTS = (1, 8, 32, 128)
FAR = 1e3  # of a router's bias: no token goes elsewhere


def random_alter(experts: int = 1) -> AlterConfig:
    return AlterConfig(num_forget_experts=experts, init_weights=False, task_type="CAUSAL_LM")


def ready(model: PeftModel) -> PeftModel:
    """For answers. Experts and routers are random; the retain expert rests at zero, as it does after a training."""
    for name, weight in model.named_parameters():
        if ".alter_B." in name and name.endswith(".retain"):
            weight.data.zero_()
    return model.eval()


def adapted(setting: Setting, config: Any) -> PeftModel:
    torch.manual_seed(SEED)
    return ready(get_peft_model(setting.fresh_model(), config))


class Times(StoppingCriteria):
    """When each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def answered(setting: Setting, model: Any, ids: torch.Tensor, tokens: int) -> list[float]:
    """Seconds to the first token of `generate`, and to each further one."""
    times, began = Times(), now()
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad(), setting.autocast():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            stopping_criteria=StoppingCriteriaList([times]),
            **options,
        )
    return [after - before for before, after in zip([began, *times.times[:-1]], times.times, strict=True)]


def tokens_of(setting: Setting, model: Any, batch: int) -> Iterator[list[float]]:
    ids = setting.tokens(batch, PROMPT)
    return repeated(lambda: answered(setting, model, ids, 1 + TOKENS)[1:])


def against_lora(setting: Setting) -> dict[str, Any]:
    return {
        "no adapter": setting.fresh_model(),
        "LoRA, unmerged": adapted(setting, lora(init_lora_weights=False)),
        "ALTER": adapted(setting, random_alter()),
    }


def decoding(setting: Setting, batch: int) -> Found:
    arms = {name: tokens_of(setting, model, batch) for name, model in against_lora(setting).items()}
    return Found(in_turn(arms, -(-2 * setting.steps // TOKENS), 1), {})


def prefill(setting: Setting) -> Found:
    ids = setting.tokens(1, PREFILL)
    arms = {name: repeated(partial(answered, setting, model, ids, 1)) for name, model in against_lora(setting).items()}
    return Found(in_turn(arms, setting.steps, 1), {})


def decoding_of_experts(setting: Setting, batch: int) -> Found:
    arms = {f"ALTER, N = {n}": tokens_of(setting, adapted(setting, random_alter(n)), batch) for n in EXPERTS}
    return Found(in_turn(arms, -(-2 * setting.steps // TOKENS), 1), {})


def requests(setting: Setting) -> Found:
    """
    Adapters of one forget expert each, all active, and a text that the first one alone is about; and with routers left
    at random, by which about half of the adapters act on a token.
    """
    arms = {}
    for count, random_routers in ((1, False), (5, False), (50, False), (50, True)):
        model = adapted(setting, random_alter())
        names = ["default", *(f"request_{i}" for i in range(1, count))]
        for name in names[1:]:
            model.add_adapter(name, random_alter())
        model.base_model.set_adapter(names)
        label = f"requests: {count}{', random routers' if random_routers else ''}"
        if not random_routers:
            send_to_first(model)
        arms[label] = tokens_of(setting, ready(model), 1)
    return Found(in_turn(arms, -(-setting.steps // TOKENS), 1), {})


def send_to_first(model: PeftModel) -> None:
    """Every token goes to the forget expert of the adapter `default`, and to the retain expert of all others."""
    for name, weight in model.named_parameters():
        if ".alter_router." in name and name.endswith(".bias"):
            weight.data[1 if ".default." in name else 0] = FAR


# ---- fresh processes ------------------------------------------------------------------------------------------------

LOADING = """
import json, sys, time
import torch
{imports}
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype={dtype})
began = time.perf_counter()
PeftModel.from_pretrained(model, sys.argv[2])
print(json.dumps(time.perf_counter() - began))
"""
IMPORTS = {
    "import peft": "import peft",
    "import alter_peft, peft": "import alter_peft, peft",
    "import alter_peft": "import alter_peft",
}


def run(code: str, *arguments: str) -> str:
    """What a fresh process of this Python prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"A fresh process has failed:\n{done.stderr}")
    return done.stdout


def loading(setting: Setting) -> Found:
    """Of an adapter into a model that is there; the process's imports and the model are not counted."""
    with TemporaryDirectory(dir=setting.output) as folder:
        base = Path(folder, "base") if not Path(setting.model).is_dir() else Path(setting.model)
        if base.parent == Path(folder):
            setting.base.save_pretrained(base)
        arms = {}
        for name, config in (("LoRA", lora(init_lora_weights=False)), ("ALTER", random_alter())):
            adapted(setting, config).save_pretrained(str(Path(folder, name)))
            imports = "import alter_peft" if name == "ALTER" else ""
            code = LOADING.format(imports=imports, dtype=setting.dtype)
            arms[name] = repeated(
                lambda code=code, name=name: [
                    json.loads(run(code, str(base), str(Path(folder, name))).splitlines()[-1])
                ]
            )
        return Found(in_turn(arms, -(-setting.steps // 4), 1), {})


def importing(setting: Setting) -> Found:
    """Whole processes that do nothing else."""
    arms = {name: repeated(partial(timed, partial(run, code))) for name, code in IMPORTS.items()}
    return Found(in_turn(arms, -(-setting.steps // 4), 1), {})


UNMERGED = "unmerged LoRA, all layers"
DECODING: dict[str, Measurement] = {
    "decoding": Measurement(
        "a token of `generate`, batch 1",
        partial(decoding, batch=1),
        (Ratio("decoding, batch 1", UNMERGED, "ALTER", "LoRA, unmerged", 0.95),),
    ),
    "decoding_16": Measurement(
        "a token of `generate`, batch 16",
        partial(decoding, batch=16),
        (Ratio("decoding, batch 16", UNMERGED, "ALTER", "LoRA, unmerged", 0.95),),
    ),
    "prefill": Measurement(
        f"the first token after {PREFILL:,}",
        prefill,
        (Ratio(f"prefill, {PREFILL:,} tokens", UNMERGED, "ALTER", "LoRA, unmerged", 1.0),),
    ),
    **{
        name: Measurement(
            f"a token of `generate` with N forget experts, batch {batch}",
            partial(decoding_of_experts, batch=batch),
            tuple(
                Ratio(f"decoding, batch {batch}, N = {n}", "N = 1", f"ALTER, N = {n}", "ALTER, N = 1", target)
                for n, target in ((8, None), (32, 1.05), (128, 1.05))
            ),
        )
        for name, batch in (("experts", 1), ("experts_16", 16))
    },
    "requests": Measurement(
        "a token of `generate` with adapters that are all active",
        requests,
        (
            Ratio("decoding, 5 requests, a text of one", "one", "requests: 5", "requests: 1"),
            Ratio("decoding, 50 requests, a text of one", "one", "requests: 50", "requests: 1", 1.15),
            Ratio("decoding, 50 requests, random routers", "one", "requests: 50, random routers", "requests: 1", 1.15),
        ),
    ),
    "loading": Measurement(
        "an adapter loaded in a fresh process",
        loading,
        (Ratio("loading an adapter, fresh process", "LoRA", "ALTER", "LoRA", 1.1),),
        of_shapes=False,
    ),
    "importing": Measurement(
        "imports in fresh processes",
        importing,
        (
            Ratio("`import alter_peft, peft`", "`import peft`", "import alter_peft, peft", "import peft", 1.0),
            Ratio("`import alter_peft`", "`import peft`", "import alter_peft", "import peft"),
        ),
        of_shapes=False,
    ),
}
