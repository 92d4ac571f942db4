# SPDX-License-Identifier: Apache-2.0
"""What is asked of every decoder family, and the list of what was found: `python tests/family_checks.py` rewrites it.

The list is a part of `docs/peft_features.md`; `test_families.py` compares each of its lines with what it finds.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import make_tokenizer
from peft import PeftModel, get_peft_model
from tiny_families import NOT_BUILT, VOCAB, families, tiny_model
from torch import Tensor, nn
from trainer_setup import adapter_state, make_trainer

from alter_peft import AlterConfig
from alter_peft.tuner.layer import AlterLinear


IDS = torch.randint(4, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
CLOSE = 0.01  # of the logits' standard deviation
ROUNDING = 1e-4  # likewise: some kernels round by where their inputs lie in memory
WRONG = "WRONG"
DOCS = Path(__file__).parents[1] / "docs" / "peft_features.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
RIGHT = "In all of this right: "


def adapted(base: nn.Module, **arguments: Any) -> PeftModel:
    """A random adapter of two forget experts with the default targets."""
    torch.manual_seed(1)
    config = {"num_forget_experts": 2, "init_weights": False, "task_type": "CAUSAL_LM", **arguments}
    return get_peft_model(base, AlterConfig(**config)).eval()


def logits(model: nn.Module, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        mask = torch.ones_like(ids) if mask is None else mask
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()


def gap(found: Tensor, expected: Tensor) -> float:
    """The greatest difference in standard deviations of the logits."""
    return float((found - expected).abs().max() / expected.std())


def is_safe_from_padding(model: nn.Module) -> bool:
    """Two tokens of padding on the left of a row, and a neighbour, leave its logits alone."""
    ids = IDS[:2].clone()
    ids[0, :2] = 0
    mask = (torch.arange(ids.shape[1]) >= torch.tensor([[2], [0]])).long()
    return gap(logits(model, ids, mask)[0, 2:], logits(model, ids[:1, 2:])[0]) < CLOSE


def is_safe_from_neighbours(model: nn.Module) -> bool:
    return gap(logits(model)[:1], logits(model, IDS[:1])) < CLOSE


def is_right_with_a_cache(model: nn.Module) -> bool:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **options}
    return torch.equal(model.generate(**given), model.generate(**given, use_cache=False))


PROMISES: dict[str, Callable[[nn.Module], bool]] = {
    "padding": is_safe_from_padding,
    "batch neighbours": is_safe_from_neighbours,
    "a cache": is_right_with_a_cache,
}


def keeps(promise: Callable[[nn.Module], bool], model: nn.Module) -> bool:
    try:
        return promise(model)
    except (ValueError, RuntimeError, IndexError, AttributeError, TypeError):  # some bases fail so by themselves
        return False


def unfelt_layers(model: PeftModel) -> list[str]:
    """The adapted layers whose experts alone do not change the logits, although their base weights do."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, AlterLinear)}
    experts = {name: copy.deepcopy(layer.alter_B.state_dict()) for name, layer in layers.items()}
    unfelt = []
    with torch.no_grad():
        for parameter in (parameter for layer in layers.values() for parameter in layer.alter_B.parameters()):
            parameter.zero_()
        base = logits(model)
        for name, layer in layers.items():
            layer.alter_B.load_state_dict({key: 50 * value for key, value in experts[name].items()})
            if gap(logits(model), base) < 1e-6:
                weight = layer.get_base_layer().weight
                before = weight.clone()
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
                unfelt += [name] * (gap(logits(model), base) > 1e-6)
                weight.copy_(before)
            layer.alter_B.load_state_dict({key: 0 * value for key, value in experts[name].items()})
        for name, layer in layers.items():
            layer.alter_B.load_state_dict(experts[name])
    return unfelt


def is_saved_and_loaded(model: PeftModel, family: str, folder: Path) -> bool:
    model.save_pretrained(folder)
    return gap(logits(PeftModel.from_pretrained(tiny_model(family), folder).eval()), logits(model)) < ROUNDING


def is_trained(family: str, tokenizer: Any, folder: Path) -> bool:
    """Three steps move the experts of the forget rows, and leave all weights finite."""
    trainer = make_trainer(folder, tokenizer, model=tiny_model(family), adapter={}, max_steps=3)
    before = adapter_state(trainer)
    trainer.train()
    after = adapter_state(trainer)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    return all(value.isfinite().all() for value in after.values()) and any(".forget_" in name for name in moved)


def said(error: ValueError) -> str:
    """The first sentence of an error, without the name of the model's class."""
    first = re.split(r"\. (?=[A-Z])|, so that ", str(error))[0].removesuffix(".")
    first = re.sub(r"^`model` is a \w+, whose", "its", first)
    return re.sub(r"^A gated `router` cannot follow \w+: |\w+ForCausalLM ", "", first)


def findings(family: str, tokenizer: Any, folder: Path) -> list[str]:
    """What is to be said of a family beyond that all is right; `WRONG` what is neither right nor an error at once."""
    base, found = tiny_model(family), []
    expected = logits(base)
    try:
        if gap(logits(adapted(tiny_model(family), init_weights=True)), expected) > ROUNDING:
            found.append(f"{WRONG}: a fresh adapter is not the base")
        model = adapted(base)
    except ValueError as error:
        return [f"gated: error ({said(error)})", *of_merging(family)]
    if left_out := model.peft_config["default"].exclude_modules:
        found.append(f"left out by default: {', '.join(f'`{name}`' for name in sorted(left_out))}")
    if gap(logits(model), expected) < CLOSE:
        found.append(f"{WRONG}: no effect")
    found += [f"{WRONG}: `{name}` has no effect" for name in unfelt_layers(model)]
    for name, promise in PROMISES.items():
        if not keeps(promise, model):
            with model.disable_adapter():
                found.append(f"{WRONG}: {name}" if keeps(promise, model) else f"{name}: the base itself differs")
    if not is_saved_and_loaded(model, family, folder / "saved"):
        found.append(f"{WRONG}: saved and loaded")
    try:
        found += [] if is_trained(family, tokenizer, folder / "trained") else [f"{WRONG}: training"]
    except ValueError as error:
        found.append(f"trainer: error ({said(error)})")
    return found + of_merging(family)


def of_merging(family: str) -> list[str]:
    model = adapted(tiny_model(family), router="static")
    expected = logits(model)
    try:
        merged = logits(model.merge_and_unload())
    except ValueError as error:
        return [f"static, merged: error ({said(error)})"]
    return [] if gap(merged, expected) < CLOSE else [f"{WRONG}: static, merged"]


def documented() -> dict[str, list[str]]:
    """What the docs say of each family."""
    text = DOCS.read_text().partition(BEGIN)[2].partition(END)[0]
    right = text.partition(RIGHT)[2].partition(".\n")[0]
    listed: dict[str, list[str]] = {name: [] for name in re.findall(r"`([^`]+)`", right)}
    for names, what in re.findall(r"^\| (`.+?`) \| (.+?) \|(?: `test_.*)?$", text, flags=re.MULTILINE):
        listed.update({name: what.split("; ") for name in re.findall(r"`([^`]+)`", names)})
    return listed


def rendered(found: dict[str, list[str]]) -> str:
    """The list: first the families of which there is nothing to say, then a table of the others, alike ones in one."""
    right = ", ".join(f"`{name}`" for name, what in found.items() if not what)
    rows: dict[str, list[str]] = {}
    for name, what in [*found.items(), *((name, [f"not tested: {why}"]) for name, why in NOT_BUILT.items())]:
        if what:
            rows.setdefault("; ".join(what).replace("|", "/"), []).append(f"`{name}`")
    table = "".join(f"| {', '.join(names)} | {what} |\n" for what, names in rows.items())
    listed = textwrap.fill(f"{RIGHT}{right}.", width=119, break_long_words=False, break_on_hyphens=False)
    return f"{listed}\n\n| family | what else |\n|---|---|\n{table}"


def main() -> None:
    """Rewrite the list; of the families named as arguments, or of all of them."""
    logging.disable(logging.WARNING)
    found, tokenizer = documented(), make_tokenizer()
    found = {name: found.get(name, []) for name in families()}
    for family in sys.argv[1:] or families():
        with tempfile.TemporaryDirectory() as folder:
            found[family] = findings(family, tokenizer, Path(folder))
        print(family, found[family], flush=True)
        before, _, rest = DOCS.read_text().partition(BEGIN)
        DOCS.write_text(before + BEGIN + rendered(found) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
