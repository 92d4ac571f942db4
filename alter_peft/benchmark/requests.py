# SPDX-License-Identifier: Apache-2.0
"""Deletion requests that come one after another: what is left of the earlier ones, and of the rest, after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from peft import PeftModel
from scipy.stats import hmean
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from alter_peft.evaluation.answers import Pair
from alter_peft.evaluation.metrics import measure
from alter_peft.evaluation.model_on_set import ModelOnSet

from .methods import Method, Task


def split_requests(forget: Sequence[Any], count: int) -> list[list[Any]]:
    """
    The forget rows as so many requests of equal size, in their order: TOFU's are sorted by author, 20 rows each.

    Raises:
        ValueError: the rows cannot be shared out evenly.
    """
    if count < 1 or len(forget) % count:
        raise ValueError(
            f"`requests` is {count}, which does not divide the {len(forget)} forget rows evenly. Choose a divisor, "
            "such as one request an author (20 rows of TOFU)."
        )
    size = len(forget) // count
    return [list(forget[start : start + size]) for start in range(0, len(forget), size)]


def kept_probabilities(
    model: Any, tokenizer: PreTrainedTokenizerBase, sets: dict[str, list[Pair]], batch_size: int | None = None
) -> dict[str, float]:
    """
    The probability part of model utility: mean answer probability of each set, normalised by the false answers', but
    for `"retain"`, as in TOFU's nine; and as `"utility"` their harmonic mean.

    Args:
        sets: `"retain"`, `"real_authors"` and `"world_facts"`.
        batch_size: as for `ModelOnSet`.
    """
    means = {}
    for name, pairs in sets.items():
        metric = "probability" if name == "retain" else "normalized_probability"
        (score,) = measure(ModelOnSet(model, tokenizer, name, pairs, batch_size=batch_size), [metric])
        means[name] = score.value
    return {**means, "utility": float(hmean(list(means.values())))}


def load_requests(model: PreTrainedModel, folder: Path, count: int) -> PeftModel | None:
    """A base model with the adapters that are saved after so many requests; `None` if they are not all there."""
    last = folder / f"request-{count}"
    if not (last / "adapter_config.json").is_file():
        return None
    names = [f"request_{number}" for number in range(1, count)]  # those that ALTER adds
    there = [name for name in names if (last / name / "adapter_config.json").is_file()]
    if there and there != names:
        return None
    found: Any = PeftModel.from_pretrained(model, last)
    for name in there:
        found.load_adapter(last / name, name)
    found.base_model.set_adapter(list(found.peft_config), inference_mode=True)
    return found.eval()  # type: ignore[no-any-return]


class Requests(NamedTuple):
    """
    How far requests have come.

    curves: of mean answer probability after 0, 1, ... requests: `"requests/{name}"` for what is kept,
        `"requests/request 1"`, ... for what each request asks to forget, and the means of these,
        `"requests/forgotten"` over those made so far and `"requests/open"` over those to come.
    seconds: of training.
    """

    curves: dict[str, list[tuple[float, float]]]
    seconds: float = 0.0

    @property
    def made(self) -> int:
        """How many requests were made and measured; -1 if not even the model before them was."""
        return len(self.curves.get("requests/request 1", [])) - 1


def run_requests(
    method: Method,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Sequence[Pair]],
    task: Task,
    kept: Callable[[Any], dict[str, float]],
    probability: Callable[[Any, Sequence[Pair]], float],
    folder: Path,
    seed: int,
    options: dict[str, Any],
    before: Requests,
    save: Callable[[Requests], None],
) -> tuple[PeftModel, Requests]:
    """
    One request after another, each given to what the one before left.

    Where a request has an adapter of its own, its start depends on the seed and the number of the request, not on
    those made before it in this run. The order of the rows is that of the run's seed, as the trainer sets it.

    Args:
        method: one of `METHODS`.
        requests: the questions of each request.
        task: the retain and calibration rows, given with each of them.
        kept: model -> what must stay, by name, as `kept_probabilities` has it.
        probability: model, questions -> mean answer probability.
        folder: for the adapters, one folder a request.
        before: what `save` was last given, if a run has stopped, else `Requests({})`: those requests are not made
            again if their adapters are in `folder`.
        save: called after each request is measured.
    """
    loaded = load_requests(model, folder, before.made) if before.made > 0 else None
    current: Any = model if loaded is None else loaded
    done = Requests({}) if loaded is None else before
    for number in range(done.made + 1, len(requests) + 1):
        seconds = done.seconds
        if number:
            set_seed((seed + number - 1) % 2**32)  # for the start of its adapter, else drawn after the earlier ones
            rows = Dataset.from_list([{"prompt": p.prompt, "completion": p.completion} for p in requests[number - 1]])
            request, start = task._replace(forget=rows), time.monotonic()
            current = method.run(current, tokenizer, request, folder / f"request-{number}", seed, options)
            seconds += time.monotonic() - start
        means = kept(current)
        means |= {f"request {i}": probability(current, pairs) for i, pairs in enumerate(requests, start=1)}
        asked = [means[f"request {i}"] for i in range(1, len(requests) + 1)]
        for name, part in (("forgotten", asked[:number]), ("open", asked[number:])):
            if part:
                means[name] = sum(part) / len(part)
        points = {f"requests/{name}": (number, mean) for name, mean in means.items()}
        curves = {key: [*done.curves.get(key, []), point] for key, point in points.items()}
        done = Requests({**done.curves, **curves}, seconds)
        save(done)
    return current, done
