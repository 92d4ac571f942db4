# SPDX-License-Identifier: Apache-2.0
"""How a decoder uses its linear layers, and the file that has it for other processes."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from huggingface_hub.constants import HF_HOME


BATCH, LENGTH = 5, 7  # of the pass: no other size of a model's is likely to be one of these, or their product


class LayerUse(NamedTuple):
    """
    How a linear layer was used.

    shapes: of the inputs that it was called with in a pass over B rows of T tokens, without their last dimension.
    next_shapes: likewise for one more token, from the cache.
    is_read: whether its weight was also read past its `forward`, where no adapter would take part.
    is_linear: whether all that it returned was one vector for each of the input's; Llama 4's router returns more.
    learns: whether a gradient of the logits reaches it.
    """

    shapes: tuple[tuple[int, ...], ...]
    next_shapes: tuple[tuple[int, ...], ...]
    is_read: bool
    is_linear: bool
    learns: bool

    @property
    def is_by_token(self) -> bool:
        """Whether the inputs are (B, T, k)."""
        return set(self.shapes) == {(BATCH, LENGTH)} and set(self.next_shapes) <= {(BATCH, 1)}

    @property
    def is_flattened(self) -> bool:
        """Whether the input is the (B T, k) of all tokens in their order, as OPT's and that of shared experts."""
        return self.shapes == ((BATCH * LENGTH,),) and self.next_shapes in ((), ((BATCH,),))


class Uses(NamedTuple):
    """
    What was found of a decoder.

    layers: its linear layers, by name.
    streams: the shape of the hidden states that each module of its lists is given first, by name.
    own_memory: what it goes on from beside, or in place of, a cache of transformers'; `None` without such a thing.
    """

    layers: dict[str, LayerUse]
    streams: dict[str, tuple[int, ...]]
    own_memory: str | None


def kept_at(model_class: type, config: str) -> Path | None:
    """
    Where what was found is kept for the next process, by all that it depends on: the config, as JSON, the code of the
    model and of what looks at it, and the versions of what they call. `None` for classes that are not of transformers
    itself: what else these call, nobody knows.
    """
    if not model_class.__module__.startswith("transformers.models."):
        return None
    try:
        files = inspect.getfile(model_class), __file__, Path(__file__).with_name("probe.py")
        code = [Path(file).read_bytes() for file in files]
    except (OSError, TypeError):
        return None
    digest = hashlib.sha256()
    for part in (model_class.__qualname__, config, torch.__version__, transformers.__version__):
        digest.update(f"{part}\0".encode())
    for text in code:
        digest.update(text)
    return Path(HF_HOME) / "alter_peft" / f"layers-{digest.hexdigest()}.json"


def read(path: Path) -> Uses | None:
    """What an earlier process has found; `None` if there is nothing that can be read."""
    try:
        layers, streams, own_memory = json.loads(path.read_text(encoding="utf-8"))
        found = {
            name: LayerUse(tuple(map(tuple, shapes)), tuple(map(tuple, next_shapes)), *rest)
            for name, (shapes, next_shapes, *rest) in layers.items()
        }
        if not found:
            return None
        return Uses(found, {name: tuple(shape) for name, shape in streams.items()}, own_memory)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def keep(uses: Uses, path: Path) -> None:
    """Keep it; a full or forbidden disk costs the next process a second, not this one its result."""
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(uses), encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
