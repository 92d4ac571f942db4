# SPDX-License-Identifier: Apache-2.0
"""How exact is L_struct's gradient, and what does it cost, by method, precision and rows looked at?

    python examples/studies/structural_term.py [--draws 400]

On a random ten-layer Llama with a random adapter from its fifth layer on. The reference is the gradient by double
backward in float64. Cost is counted (multiplications and additions of matrix products, and what the graph holds), so
that it does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from alter_peft import AlterConfig
from alter_peft.losses import StructuralInvariance, exact_structural_invariance, structural_invariance
from alter_peft.scoring import ScoredModel
from alter_peft.trainer.signed_entropy import SignedEntropy


LENGTH, Q = 96, 0.5
COUNTS = (1, 1, 2, 3, 4, 6, 8, 12)  # high-entropy answer tokens of the eight rows of a step
Signs = Sequence[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=400, help="of each estimate")
    args = parser.parse_args()
    model, rows = adapted(), make_rows()
    precisions(model, rows[-1])
    estimates(model, rows, args.draws)


def adapted() -> Any:
    """Large embeddings and a large head, so that entropies differ; experts a tenth of their random start."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 10, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=2048, **sizes, num_key_value_heads=2, pad_token_id=0, attn_implementation="eager")
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
        model.lm_head.weight.mul_(10)
    settings = {"num_forget_experts": 2, "init_weights": False, "entropy_threshold": 1.2, "task_type": "CAUSAL_LM"}
    wrapped = get_peft_model(model, AlterConfig(**settings)).eval()
    for layer in ScoredModel(wrapped).layers_of("default"):
        for expert in layer.alter_B["default"].experts():
            expert.data.mul_(0.1)
    return wrapped


def make_rows() -> list[tuple[dict[str, Tensor], Tensor]]:
    """Inputs of each row of a step, and its high-entropy positions in the second half."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for count in COUNTS:
        ids = torch.randint(4, 2048, (1, LENGTH), generator=generator)
        positions = torch.randperm(LENGTH // 2 - 1, generator=generator)[:count] + LENGTH // 2
        entropy = torch.zeros(1, LENGTH)
        entropy[0, positions] = 1.5
        rows.append(({"input_ids": ids, "attention_mask": torch.ones_like(ids), "entropy": entropy}, positions))
    return rows


def term(
    model: Any, row: tuple[dict[str, Tensor], Tensor], signs: Signs, step: float | None, autocast: Any = nullcontext
) -> StructuralInvariance:
    """||grad f||^2 and its gradient: exact, or by a central difference of a length relative to A."""
    scored = ScoredModel(model)
    shared = [layer.alter_A["default"].weight for layer in scored.layers_of("default")]
    wide = torch.promote_types(shared[0].dtype, torch.float32)
    offsets = [torch.zeros(A.shape, dtype=wide, requires_grad=True) for A in shared]
    eps = torch.tensor(signs, dtype=wide)
    signed = SignedEntropy(scored, "default", Q, row[0], row[1], eps, offsets, autocast)
    if step is None:
        return exact_structural_invariance(signed, offsets)
    norm = math.sqrt(sum(float(A.detach().double().square().sum()) for A in shared))
    return structural_invariance(signed, offsets, step * max(1.0, norm))


def bfloat16_autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    wrong = sum(float((f.double() - e).square().sum()) for f, e in zip(found, exact, strict=True))
    return math.sqrt(wrong / sum(float(e.square().sum()) for e in exact))


def counted(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it returns, its operations, and the MiB of tensors that its graphs saved, each storage once."""
    held: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is given twice

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return result, flops.get_total_flops(), sum(held.values()) / 2**20


def precisions(model: Any, row: tuple[dict[str, Tensor], Tensor]) -> None:
    """One row by both methods in every precision."""
    signs = [1.0 if i % 3 else -1.0 for i in range(len(row[1]))]
    exact = term(copy.deepcopy(model).double(), row, signs, None).gradients
    scored, inputs = ScoredModel(model), row[0]
    with torch.no_grad(), scored.gating.supply("default", inputs["entropy"]):  # type: ignore[union-attr]
        names = "input_ids", "attention_mask"
        _, unit, _ = counted(lambda: scored.hidden_states(*(inputs[name] for name in names)))
    half = copy.deepcopy(model)
    for name, parameter in half.named_parameters():
        if ".alter_" not in name or ".base_layer." in name:
            parameter.data = parameter.data.bfloat16()
    kinds = {
        "float32": (model, nullcontext),
        "bfloat16 autocast": (model, bfloat16_autocast),
        "bfloat16 weights": (half, nullcontext),
        "all in bfloat16": (copy.deepcopy(model).bfloat16(), nullcontext),
    }
    print("| gradient of one row | precision | relative error | forward passes | MiB held |\n|---|---|---|---|---|")
    for method, step in (("double backward", None), ("central difference, 1e-3", 1e-3), ("the same, 3e-2", 3e-2)):
        for precision, (its, autocast) in kinds.items():
            found, cost, held = counted(lambda m=its, s=step, a=autocast: term(m, row, signs, s, a))  # type: ignore[misc]
            held /= 1 if step is None else 3  # its three passes come one after another
            error = relative_error(found.gradients, exact)
            print(f"| {method} | {precision} | {error:.1e} | {cost / unit:.2f} | {held:.0f} |", flush=True)


def estimates(model: Any, rows: list[tuple[dict[str, Tensor], Tensor]], draws: int) -> None:
    """Of all rows' term by some of them: the spread over draws, and the cost in operations of a plain step."""
    generator = torch.Generator().manual_seed(2)
    counts = torch.tensor(COUNTS, dtype=torch.float32)
    total = counts.sum()

    def of(row: int) -> list[Tensor]:
        signs = (torch.randint(0, 2, (COUNTS[row],), generator=generator) * 2.0 - 1.0).tolist()
        return term(model, rows[row], signs, None).gradients

    exact: list[Tensor] = []  # the mean over tokens, one by one
    for inputs, positions in rows:
        for position in positions:
            own = term(model, (inputs, position.view(1)), [1.0], None).gradients
            exact = [a + b / total for a, b in zip(exact, own, strict=True)] if exact else [b / total for b in own]
    step_cost = counted(lambda: plain_step(model, rows[:4]))[1]
    print("\n| rows looked at | drawn | error of one estimate | operations of a plain step |\n|---|---|---|---|")
    # a sample of the term of each row, so that the draws below cost no pass
    samples = max(8, draws // 25)
    pool = [[of(row) for _ in range(samples)] for row in range(len(COUNTS))]
    cost = sum(counted(lambda r=row: of(r))[1] for row in range(len(COUNTS))) / len(COUNTS)  # type: ignore[misc]
    for number, kind in ((8, "all"), (4, "by tokens"), (2, "by tokens"), (1, "by tokens"), (1, "alike")):
        squares = 0.0
        for _ in range(draws):
            if kind == "all":
                parts = [(row, 1 / float(total)) for row in range(8)]
            elif kind == "alike":
                parts = [(int(torch.randint(0, 8, (1,), generator=generator)), 8 / float(total))]
            else:  # with replacement
                chosen = torch.multinomial(counts, number, replacement=True, generator=generator).tolist()
                parts = [(row, 1 / (COUNTS[row] * number)) for row in chosen]
            made = [torch.zeros_like(e) for e in exact]
            for row, share in parts:
                one = pool[row][int(torch.randint(0, samples, (1,), generator=generator))]
                made = [m + share * o for m, o in zip(made, one, strict=True)]
            squares += relative_error(made, [e.double() for e in exact]) ** 2
        print(
            f"| {number} | {kind} | {math.sqrt(squares / draws):.2f} | {number * cost / step_cost:.2f} |", flush=True
        )


def plain_step(model: Any, rows: list[tuple[dict[str, Tensor], Tensor]]) -> None:
    """Forward and backward of four forget rows, answer tokens scored."""
    scored = ScoredModel(model)
    experts = [B for layer in scored.layers_of("default") for B in layer.alter_B["default"].parameters()]
    ids = torch.cat([inputs["input_ids"] for inputs, _ in rows])
    entropy = torch.cat([inputs["entropy"] for inputs, _ in rows])
    with scored.gating.supply("default", entropy, learns_shared=False):  # type: ignore[union-attr]
        hidden = scored.hidden_states(ids, torch.ones_like(ids))[:, LENGTH // 2 :]
    torch.autograd.grad(scored.head(hidden).logsumexp(dim=-1).sum(), experts)


if __name__ == "__main__":
    main()
