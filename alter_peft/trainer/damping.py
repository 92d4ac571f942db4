# SPDX-License-Identifier: Apache-2.0
"""A model with a part of its memory switched down, for the time of a pass: which tokens would give way?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from accelerate import logging
from torch import nn

from alter_peft.scoring import ScoredModel

from .rivals import ScoredRivals
from .token_targets import Guide


logger = logging.get_logger(__name__)
# What a decoder layer adds to the residual stream by its feed-forward part, as transformers' families call it. A norm
# behind it comes first: it would undo a factor.
NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_ffn_norm")
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "shared_mlp", "mlp_block", "fc2")
FACTOR, DEPTH = 0.5, 0.5
TEMPERATURE = 1.5  # of what it has in a label's place (docs/log.md)
UNDAMPED = (
    "`model` is a {}, whose feed-forward layers are not known by name, so that they cannot be damped: its own "
    "probabilities say which tokens give way and what stands in their place, which they say badly. Give "
    "`reference_model`."
)


def feed_forward_parts(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """
    Of the upper half of the layers, the modules whose outputs are what a feed-forward part adds; none if unknown.

    Args:
        layers: the decoder's.
    """
    found = []
    for layer in layers[int(DEPTH * len(layers)) :]:
        children = dict(layer.named_children())
        own = [children[name] for name in NORMS if name in children]
        found += own or [children[name] for name in FEED_FORWARD if name in children]
    return found


@contextmanager
def damped(layers: Sequence[nn.Module]) -> Iterator[None]:
    """
    Inside, the feed-forward parts of the upper half of the layers give `FACTOR` times what they give.

    They are the memory of a transformer (Geva et al., arXiv 2012.14913): halved, what was learned by heart fades
    before grammar and what stands in the context do. The log-probabilities then rank the tokens of a memorised answer
    more nearly as a model does that never saw it (docs/log.md). Where no such part is known, all stays as it is.

    Args:
        layers: the decoder's.
    """

    def scale(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] * FACTOR, *output[1:]) if isinstance(output, tuple) else output * FACTOR

    with ExitStack() as stack:
        for part in feed_forward_parts(layers):
            stack.enter_context(part.register_forward_hook(scale))
        yield


def guided_by_itself(scored: ScoredModel, look: Callable[[], ScoredRivals]) -> Guide:
    """
    How likely the rows' labels and their rivals are to the model with damped feed-forward layers.

    Args:
        look: what it finds of the forget rows as it is.
    """
    layers = [*scored.stack.layers]
    is_damped = bool(feed_forward_parts(layers))
    if not is_damped:
        logger.warning(UNDAMPED.format(type(scored.base).__name__))
    with damped(layers):
        found = look()
    return Guide(found.scores, [], False, is_damped, rivals=found.rivals)
