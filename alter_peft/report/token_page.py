# SPDX-License-Identifier: Apache-2.0
"""A page that colours each token of a text by its entropy and by the expert that it was sent to."""

from __future__ import annotations

import math
from collections.abc import Mapping

from alter_peft.evaluation.seen_tokens import SeenTokens

from .drawing import COLOURS
from .templates import render


RETAIN_COLOUR = "#999999"
CLOUD_SIZE = 40  # words at most


def token_page(seen: SeenTokens) -> str:
    """
    An HTML fragment (after the paper's Fig. 2): examples of each set, with the entropy of their tokens as background
    and their expert as underline, then the commonest words above and at or below the entropy threshold.
    """
    clouds = {f"High-entropy tokens (S above {seen.threshold:.3g})": seen.above, "Low-entropy tokens": seen.below}
    return render("tokens.html", seen=seen, clouds=clouds, background=_background, underline=_underline, cloud=cloud)


def _background(share: float) -> str:
    return f"background:rgba(230,140,0,{0.6 * min(1.0, share):.2f})"


def _underline(expert: int) -> str:
    colour = RETAIN_COLOUR if expert == 0 else COLOURS[(expert - 1) % len(COLOURS)]
    return f"border-bottom:3px solid {colour}"


def cloud(counts: Mapping[str, int]) -> list[tuple[str, int, float]]:
    """The commonest words in alphabetical order: their count, and a size whose area is as that, in rem."""
    common = sorted(counts.items(), key=lambda item: -item[1])[:CLOUD_SIZE]
    largest = common[0][1]
    return [
        (word, count, 0.5 + 1.7 * math.sqrt(count / largest))
        for word, count in sorted(common, key=lambda item: item[0].lower())
    ]
