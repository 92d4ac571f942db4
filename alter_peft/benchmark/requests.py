# SPDX-License-Identifier: Apache-2.0
"""Deletion requests that come one after another: what is left of the earlier ones, and of the rest, after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from datasets import Dataset
from peft import PeftModel
from scipy.stats import hmean
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from alter_peft.evaluation.answers import Pair
from alter_peft.evaluation.loading import load
from alter_peft.evaluation.metrics import measure
from alter_peft.evaluation.model_on_set import ModelOnSet
from alter_peft.evaluation.scores import Score, Scores
from alter_peft.evaluation.tasks import TaskData

from .methods import Method, UnlearningData


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


def scores_after(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    requests: Sequence[Sequence[Pair]],
    made: int,
    batch_size: int | None = None,
) -> list[Score]:
    """
    What is left after so many requests: the mean answer probability of each set that is kept, normalised by the false
    answers but for `retain`, as in TOFU's nine, and as `utility` their harmonic mean; of each request, and the means
    over those made, `forgotten so far`, and those to come, `still to come`; and of the bystanders, if there are any.

    Args:
        made: how many requests were made, the `step` of each score.
        batch_size: as for `ModelOnSet`.
    """

    def probability(name: str, pairs: Sequence[Pair], is_forget: bool, metric: str = "probability") -> Score:
        asked = ModelOnSet(
            model, tokenizer, name, pairs, is_forget, batch_size=batch_size, step=made, settings=data.settings
        )
        (score,) = measure(asked, [metric])
        return score

    def computed(name: str, value: float) -> Score:
        return Score(name, "probability", value, average="other", step=made, settings=data.settings)

    kept = [
        probability(name, pairs, False, "probability" if name == "retain" else "normalized_probability")
        for name, pairs in data.kept_sets.items()
    ]
    beside = [probability(name, pairs, False) for name, pairs in data.bystander_sets.items()]
    asked = [probability(f"request {number}", pairs, True) for number, pairs in enumerate(requests, start=1)]
    parts = {"forgotten so far": asked[:made], "still to come": asked[made:]}
    return [
        *kept,
        computed("utility", float(hmean([score.value for score in kept]))),
        *beside,
        *asked,
        *(computed(name, mean(score.value for score in part)) for name, part in parts.items() if part),
    ]


def load_requests(model: PreTrainedModel, folder: Path, count: int) -> PreTrainedModel | PeftModel | None:
    """
    A base model with the adapters that are saved after so many requests, or the whole model that is saved then; `None`
    if they are not all there.
    """
    last = folder / f"request-{count}"
    if (last / "config.json").is_file():
        return load(last)
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

    scores: after 0, 1, ... requests, which are their `step` (see `scores_after`).
    seconds: of training.
    """

    scores: Scores
    seconds: float = 0.0

    @property
    def made(self) -> int:
        """How many requests were made and measured; -1 if not even the model before them was."""
        return max((int(key.step) for key in self.scores if key.step is not None), default=-1)


def run_requests(
    method: Method,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Dataset],
    data: UnlearningData,
    measured: Callable[[Any, int], list[Score]],
    folder: Path,
    seed: int,
    options: dict[str, Any],
    before: Requests,
    save: Callable[[Requests], None],
) -> tuple[PreTrainedModel | PeftModel, Requests]:
    """
    One request after another, each given to what the one before left.

    Where a request has an adapter of its own, its start depends on the seed and the number of the request, not on
    those made before it in this run. The order of the rows is that of the run's seed, as the trainer sets it.

    Args:
        method: one of `METHODS`.
        requests: the forget rows of each request.
        data: the retain and calibration rows, given with each of them.
        measured: model, number of requests made -> scores with that `step`.
        folder: for the adapters, one folder a request.
        before: what `save` was last given, if a run has stopped, else `Requests(Scores())`: those requests are not
            made again if their adapters are in `folder`.
        save: called after each request is measured.
    """
    loaded = load_requests(model, folder, before.made) if before.made > 0 else None
    current: Any = model if loaded is None else loaded
    done = Requests(Scores()) if loaded is None else before
    for number in range(done.made + 1, len(requests) + 1):
        seconds = done.seconds
        if number:
            set_seed((seed + number - 1) % 2**32)  # for the start of its adapter, else drawn after the earlier ones
            request, start = data._replace(forget=requests[number - 1]), time.monotonic()
            current = method.run(current, tokenizer, request, folder / f"request-{number}", seed, options)
            seconds += time.monotonic() - start
        done = Requests(Scores([*done.scores.values(), *measured(current, number)]), seconds)
        save(done)
    return current, done
