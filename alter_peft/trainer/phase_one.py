# SPDX-License-Identifier: Apache-2.0
"""Phase I: what is learned of the data before any expert is trained, in one pass of the base model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from accelerate import logging
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alter_peft.entropy import entropy_quantile
from alter_peft.losses import TokenScores
from alter_peft.tuner.config import AlterConfig
from alter_peft.tuner.decoder import check_head
from alter_peft.tuner.layer import AlterLayer
from alter_peft.tuner.router import logits_of
from alter_peft.tuner.router_fit import fit_router, sample_positions, shares_astray
from alter_peft.tuner.token_router import AlterRouter

from .counterfactuals import RouterTexts
from .distributed import by_main_process, from_main_process, gathering_layers, is_zero3_split, looks
from .knowledge import RETAIN_ROWS, Astray
from .measuring import Measuring, drawn
from .observations import Observations, observe, observe_beside
from .token_targets import Guide
from .weight_bytes import weight_bytes


logger = logging.get_logger(__name__)


def measure_threshold(entropy: Tensor, labels: Sequence[Sequence[int]], quantile: float) -> float:
    """The entropy that a share `quantile` of the answer tokens does not exceed; S at t is of the label at t + 1."""
    return entropy_quantile(entropy, torch.from_numpy(answer_positions(labels)), quantile)


def answer_positions(labels: Iterable[Sequence[int]]) -> np.ndarray:
    """Which positions predict a label, bool (total tokens,), row after row."""
    return np.concatenate([np.array([*row[1:], -100]) != -100 for row in labels])


class Looked(NamedTuple):
    """
    What was found out before the training.

    found: by phase I.
    unseen: the base model's scores of the labels of each calibration row.
    guide: by the base model, or a reference; `None` for a loss without token targets.
    as_given: ln p of the labels of the rows to forget and of some to retain by the model as it was given; empty where
        that is its base.
    """

    found: dict[str, Tensor]
    unseen: list[TokenScores]
    guide: Guide | None
    as_given: list[list[Tensor]]


class PhaseOne:
    """
    Runs phase I once for a base model and its data, and keeps the result on disk.

    Args:
        measuring: of the adapted model.
        config: of the adapter.
        adapter_name: the adapter that is trained.

    Attributes:
        looks: whether this process looks at the data.
    """

    def __init__(self, measuring: Measuring, config: AlterConfig, adapter_name: str) -> None:
        self.measuring, self.scored = measuring, measuring.scored
        self.config, self.adapter_name = config, adapter_name
        self.looks = looks(measuring.accelerator, self.scored.model)
        # to fit; none of a static one
        gating: Any = self.scored.gating
        routers: list[AlterRouter] = gating.routers if self.looks else []
        self.router = next((router for router in routers if adapter_name in router.alter_router), None)

    def look(self, retain: Dataset, texts: RouterTexts, begins_as_base: bool) -> Looked:
        """
        What there is to find out, on every process: the main one alone looks at the data, or where ZeRO-3 has split
        the weights, all together.

        Args:
            retain: all rows to retain.
            texts: what the router is fitted on beside them and those to forget.
            begins_as_base: whether the model as it was given is its base.
        """
        measuring, args = self.measuring, self.measuring.args
        size = max(1, args.per_device_eval_batch_size)

        def find() -> Looked:
            with measuring.accelerator.autocast(), gathering_layers(self.scored.model):
                found = self.find(measuring.rows.forget, retain, texts, size, args.seed)
            unseen = measuring.scores(measuring.rows.calibration, size, base=True)
            guide = measuring.guide(size, base=True)
            given = () if begins_as_base else (measuring.rows.forget, measuring.rows.retain)
            return Looked(found, unseen, guide, [measuring.log_probabilities(rows, size) for rows in given])

        return by_main_process(measuring.accelerator, self.scored.model, find)

    def find(
        self, forget: Dataset, retain: Dataset, texts: RouterTexts, batch_size: int, seed: int
    ) -> dict[str, Tensor]:
        """
        What phase I measures, on the CPU; from the disk if it is there.

        Args:
            texts: what the router is fitted on beside the two sets.
        """
        path = self._cache_path(forget, retain, texts, seed)
        cached = _read(path)
        agree = from_main_process if is_zero3_split(self.scored.model) else bool  # where several look together
        if agree(cached is not None):
            return cached or {}
        found = {name: tensor.cpu() for name, tensor in self._compute(forget, retain, texts, batch_size, seed).items()}
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(found, partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:  # a full disk costs the next run a pass, not this one its result
            partial.unlink(missing_ok=True)
            logger.warning(f"Phase I could not be kept for another run in '{path.parent}': {error}")
        return found

    def use(self, found: dict[str, Tensor], forget: Dataset, retain: Dataset) -> tuple[Dataset, Dataset]:
        """Sets the threshold and the router to what was found; the two sets with the column `entropy`.

        `high_tokens` is then how many answer tokens of the two have an entropy above the threshold.
        """
        self.config.entropy_threshold = float(found["threshold"])
        self.high_tokens = int(found["high"])
        self.forget_log_probabilities = list(found["log_probability"].split(found["labelled"].tolist()))
        self.retain_log_probabilities = list(found["retain_log_probability"].split(found["retain_labelled"].tolist()))
        self.astray = Astray(*found["astray"].tolist()) if "astray" in found else None
        if self.router is not None:
            self._set_router(self.router.alter_router[self.adapter_name], found)
        rows = [part.tolist() for part in found["entropy"].split(found["lengths"].tolist())]
        of_forget, of_retain = rows[: len(forget)], rows[len(forget) :]
        return forget.add_column("entropy", of_forget), retain.add_column("entropy", of_retain)

    def _set_router(self, made: Any, found: dict[str, Tensor]) -> None:
        """Write the router, or check that the one that an adapter brings sends these very data to the same experts."""
        if not made.weight.any():
            for name, weight in made.weights.items():
                weight.data.copy_(found[name])
            return
        own = {name: weight.cpu() for name, weight in made.weights.items()}
        brought, fitted = (logits_of(found["probe"], weights).argmax(dim=-1) for weights in (own, found))
        agreement = float((brought == fitted).float().mean())
        if self.config.init_weights and agreement < 0.95:
            raise ValueError(
                f"`model` has a router that sends {1 - agreement:.0%} of the tokens of `train_dataset` and "
                "`retain_dataset` to other experts than one fitted on them: it was fitted on other data. Start from a "
                "fresh adapter for these, with `get_peft_model(model, AlterConfig(...))`."
            )

    def _compute(
        self, forget: Dataset, retain: Dataset, texts: RouterTexts, batch_size: int, seed: int
    ) -> dict[str, Tensor]:
        scored = self.scored
        with scored.as_base():
            check_head(scored.base, scored.decoder, scored.head)
        columns = ["input_ids", "labels", "expert"]
        both = datasets.concatenate_datasets([forget.select_columns(columns), retain.select_columns(columns)])
        experts = np.repeat(np.asarray(both["expert"]), [len(ids) for ids in both["input_ids"]])
        sample = sample_positions(experts, seed)
        of_forget = range(len(forget))
        of_retain = [len(forget) + row for row in drawn(len(retain), RETAIN_ROWS, seed)]
        asked = {*of_forget, *of_retain}
        seen = observe(both, scored, self.adapter_name, self.config.entropy_q, batch_size, sample, asked)
        threshold = self.config.entropy_threshold
        if self.config.entropy_quantile is not None:
            forgotten = seen.entropy[: int(seen.lengths[: len(forget)].sum())]
            threshold = measure_threshold(forgotten, forget["labels"], self.config.entropy_quantile)
        assert threshold is not None
        # float64, so that a threshold that was given comes back as it is
        found = {"entropy": seen.entropy, "lengths": seen.lengths}
        for prefix, rows in (("", of_forget), ("retain_", of_retain)):
            known = [seen.log_probabilities[row] for row in rows]
            found[f"{prefix}log_probability"] = torch.cat(known)
            found[f"{prefix}labelled"] = torch.tensor([len(row) for row in known])
        found["threshold"] = torch.tensor(threshold, dtype=torch.float64)
        is_answer = answer_positions(both["labels"])
        found["high"] = (seen.entropy[torch.from_numpy(is_answer)] > threshold).sum()
        if self.config.is_gated:
            found |= self._fit(seen, experts, sample, texts, threshold, batch_size, seed)
            router = self.config.routing
            if router.retain_competes:  # else every token goes to forget experts, by design
                # as the adapter will be asked
                entropy = None if self.config.inference_entropy == "none" else seen.entropy[sample]
                features = router.features(seen.averages, entropy, threshold)
                found["astray"] = torch.tensor(shares_astray(found, features, experts[sample], is_answer[sample]))
        return found

    def _fit(
        self,
        seen: Observations,
        experts: np.ndarray,
        sample: np.ndarray,
        texts: RouterTexts,
        threshold: float,
        batch_size: int,
        seed: int,
    ) -> dict[str, Tensor]:
        """As [`fit_router`], on the sampled positions of the two sets, whose experts are given, and of the texts."""
        ranges = zip_longest(seen.lengths.tolist(), texts.starts, fillvalue=0)
        counts = np.concatenate([np.arange(length) >= start for length, start in ranges])[sample]
        averages, entropy, kinds = (
            seen.averages[torch.as_tensor(counts)],
            seen.entropy[sample[counts]],
            experts[sample[counts]],
        )
        if texts.beside:
            labels = np.concatenate([np.full(len(text.ids), text.expert) for text in texts.beside])
            places = np.concatenate([np.arange(len(text.ids)) >= text.start for text in texts.beside]).nonzero()[0]
            places = places[sample_positions(labels[places], seed)]
            beside = observe_beside(texts.beside, self.scored, self.adapter_name, batch_size, places)
            averages = torch.cat([averages, beside])
            entropy = torch.cat([entropy, torch.zeros(len(places))])
            kinds = np.concatenate([kinds, labels[places]])
        router, count = self.config.routing, self.config.num_forget_experts or 1
        hidden, outputs = self.config.router_hidden_size or 0, router.num_outputs(count)
        return fit_router(router, averages, entropy, kinds, outputs, threshold, hidden, seed)

    def _cache_path(self, forget: Dataset, retain: Dataset, texts: RouterTexts, seed: int) -> Path:
        digest = hashlib.sha256()
        for chunk in _base_bytes(self.scored.model):
            digest.update(chunk)
        c = self.config
        settings: list[Any] = [c.entropy_q, c.entropy_quantile, c.router, c.router_layer, c.router_half_life]
        settings += [c.num_forget_experts, None if c.entropy_quantile is not None else c.entropy_threshold, seed, 10]
        settings += [c.routing.retain_competes, c.inference_entropy, c.router_hidden_size, texts.beside, texts.starts]
        device = self.scored.device.type
        if torch.is_autocast_enabled(device):
            settings.append(str(torch.get_autocast_dtype(device)))
        for dataset in (forget, retain):
            settings += [dataset["input_ids"][:], dataset["labels"][:], dataset["expert"][:]]
        digest.update(json.dumps(settings).encode())
        base: Any = self.scored.decoder
        digest.update(base.config.to_json_string().encode())
        return Path(datasets.config.HF_DATASETS_CACHE) / "alter_peft" / f"{digest.hexdigest()}.safetensors"


def _read(path: Path) -> dict[str, Tensor] | None:
    """What phase I left on the disk; `None` if it left nothing, or nothing that can be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def _base_bytes(model: nn.Module) -> Iterator[Any]:
    """The base model's weights, without any adapter's."""
    inside = [f"{name}." for name, module in model.named_modules() if isinstance(module, (AlterLayer, AlterRouter))]
    names = []
    for name in sorted(model.state_dict()):
        owner = next((prefix for prefix in inside if name.startswith(prefix)), None)
        if owner is None or name.startswith(f"{owner}base_layer."):
            names.append(name)
    for found in weight_bytes(model, names):
        yield found.name.encode()
        yield from found.parts
