# SPDX-License-Identifier: Apache-2.0
"""
Controls of ALTER: what each part of it does, by leaving it out or by putting chance in its place, two seeds of each.

    python examples/studies/controls.py --config examples/people.yaml --output_dir runs/people

They join a grid whose target and oracles are there, with its options, and `alter-peft report` shows them beside the
rest; `--config runs/tuning/grid.yaml` is that of examples/studies/tuning.py, which is smaller. Some are options that
anybody can set; the trainers below are the others, for this study alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from alter_peft import AlterConfig, AlterUnlearnTrainer
from alter_peft.benchmark.arguments import BenchmarkArguments
from alter_peft.benchmark.grid import Grid
from alter_peft.benchmark.methods import METHODS, Method
from alter_peft.trainer import UnlearnTrainer
from alter_peft.trainer.batch import TokenMasks
from alter_peft.tuner.hooks import replay_in_checkpoints


class ShuffledMaskTrainer(AlterUnlearnTrainer):
    """As many tokens of high entropy as there are, but drawn by chance among the forget rows' answer tokens."""

    def _masks(self, batch: dict[str, Tensor]) -> TokenMasks:
        masks = super()._masks(batch)
        own = masks.labelled & masks.forget
        high = masks.high.clone()
        drawn = masks.high[own]
        high[own] = drawn[torch.randperm(len(drawn), device=drawn.device)]
        return masks._replace(high=high, low=torch.where(own, ~high, masks.low))


class JointTrainer(AlterUnlearnTrainer):
    """No isolation: every expert and A learn from every row."""

    def hidden_states(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        owner = torch.ones(len(inputs["expert"]), self.num_experts, dtype=torch.long, device=inputs["expert"].device)
        assert self.scored.contexts is not None
        replay_in_checkpoints(self.scored.decoder, self.scored.contexts)
        with self.gating.supply(self.adapter_name, inputs["entropy"], owner):
            return UnlearnTrainer.hidden_states(self, model, inputs)

    def skipped_groups(self) -> set[str]:
        return set()


def _own(caption: str, trainer: type[AlterUnlearnTrainer], **options: Any) -> Method:
    return Method(caption, trainer, AlterConfig, options, stacks=True, calibrates=True)


MASKED = {"forget_loss": "hinge"}  # a loss of low-entropy tokens alone, as the paper's
# control -> what it is run by, if no method of the package can be, and its options
CONTROLS: dict[str, tuple[Method | None, dict[str, Any]]] = {
    "alter": (None, {}),
    "alter_joint": (_own("no isolation", JointTrainer, retain_weight=1.0), {}),  # beside alter+cross-entropy
    "alter+hinge": (None, MASKED),
    "alter+hinge-quantile": (None, {**MASKED, "adapter": {"entropy_quantile": 0.7}}),
    "alter_shuffled+quantile": (
        _own("an entropy mask by chance", ShuffledMaskTrainer, **MASKED), {"adapter": {"entropy_quantile": 0.7}},
    ),
    "alter+router-entropy": (None, {"adapter": {"router": "entropy"}}),
    "asymlora": (None, {}),
    "alter+A-frozen": (None, {"structural_weight": 0.0}),  # L_struct off as well, which alone moves A
    "alter+cross-entropy": (None, {"retain_weight": 1.0}),  # by default the retain expert rests
    "alter+kl": (None, {"retain_weight": 1.0, "retain_loss": "kl"}),
    "alter+cluster": (None, {"adapter": {"init_weights": "cluster"}}),
    **{f"alter+r{r}": (None, {"adapter": {"r": r, "lora_alpha": 2 * r}}) for r in (4, 16, 32)},
    **{f"alter+N{n}": (None, {"adapter": {"num_forget_experts": n}}) for n in (1, 2, 4, 16)},
    "lora_soft_targets": (None, {}),  # the default's loss, targets and stopping without a router
    "lora_level": (None, {}),
    "lora_npo": (None, {}),
    "alter_npo": (None, {}),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="Of the grid that they join.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--controls", nargs="+", default=list(CONTROLS), choices=CONTROLS)
    given = parser.parse_args()
    METHODS.update({name.partition("+")[0]: own for name, (own, _) in CONTROLS.items() if own is not None})
    config = {**yaml.safe_load(given.config.read_text()), "attacks": [], "output_dir": given.output_dir}
    options = {name: CONTROLS[name][1] for name in given.controls if CONTROLS[name][1]}
    config["options"] = {**config.get("options", {}), **options}
    Grid(BenchmarkArguments(**{**config, "methods": given.controls, "seeds": given.seeds})).run()


if __name__ == "__main__":
    main()
