# SPDX-License-Identifier: Apache-2.0
"""A page that colours each token of a text by its entropy and by the expert that it was sent to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from alter_peft.entropy import max_tsallis_entropy
from alter_peft.evaluation.answers import Pair, encode_texts, scored_decoder, spread
from alter_peft.evaluation.guards import base_entropies
from alter_peft.tuner.base_pass import base_entropy, evaluating
from alter_peft.tuner.config import AlterConfig
from alter_peft.tuner.decoder import LanguageModelHead
from alter_peft.tuner.gating import GatingContext
from alter_peft.tuner.layer import AlterLayer

from .drawing import COLOURS


RETAIN_COLOUR = "#999999"
CLOUD_SIZE = 40  # words at most
EXAMPLES, MOST_EXAMPLES = 2, 10  # of a set


class SeenText(NamedTuple):
    """
    One text as the router saw it.

    pieces: what each of its n tokens adds to the text; empty for a token that ends within a character.
    entropy: S_q of the base model's prediction of tokens 2..n, n - 1 numbers: the one at the position before.
    experts: the expert that this position was sent to, 0 being the retain expert; n - 1 numbers.
    """

    pieces: list[str]
    entropy: list[float]
    experts: list[int]


@torch.no_grad()
def observe_texts(model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | Pair]) -> list[SeenText]:
    """
    Entropy and expert of every token of some texts, in eval mode.

    Args:
        model: with an active gated ALTER adapter, the first of which counts.
        texts: plain ones, or questions with their answers, which are encoded as for `score_answers`.

    Raises:
        ValueError: there are no texts, one has no token to score, there is no such adapter, or its entropy
            threshold is not known yet.
    """
    if not texts:
        raise ValueError("`texts` is empty. Give at least one text.")
    context, name, config = _gated_adapter(model)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder, head = scored_decoder(base).module, LanguageModelHead(base)
    seen = []
    for ids, _ in encode_texts(tokenizer, texts, "`texts`"):
        row = torch.tensor([ids], device=next(base.parameters()).device)
        inputs = {"input_ids": row, "attention_mask": torch.ones_like(row), "use_cache": False}
        with evaluating(model):
            entropy = base_entropy(decoder, head, context, config.entropy_q, (), inputs)
            decoder(**inputs)
        experts = context.state.gates[name].argmax(dim=-1)
        seen.append(SeenText(_pieces(tokenizer, ids), entropy[0, :-1].tolist(), experts[0, :-1].tolist()))
    return seen


def _gated_adapter(model: Any) -> tuple[GatingContext, str, AlterConfig]:
    fix = "Give a model with an enabled ALTER adapter whose router is 'context' or 'entropy'."
    context = next((module.context for module in model.modules() if isinstance(module, AlterLayer)), None)
    if context is None:
        raise ValueError(f"`model` is a {type(model).__name__} without an ALTER adapter, so no token is routed. {fix}")
    active = context.active()
    if not active:
        raise ValueError(f"`model` has no active adapter that routes tokens: it is static or disabled. {fix}")
    router, name = active[0]
    config = router.config[name]
    if config.entropy_threshold is None:
        raise ValueError(
            f"`entropy_threshold` of adapter {name!r} is not known yet: with `entropy_quantile` it is measured by the "
            "trainer. Train the adapter first or set it."
        )
    return context, name, config


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """What each token adds to the decoded text: single tokens would lose their spaces, and parts of characters."""
    pieces, done = [], ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end]))
        whole = text if end == len(ids) else text.rstrip("\N{REPLACEMENT CHARACTER}")
        pieces.append(whole[len(done) :])
        done = max(done, whole, key=len)
    return pieces


def token_page(model: Any, tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, Sequence[str | Pair]]) -> str:
    """
    An HTML fragment (after the paper's Fig. 2): examples of each set, with the entropy of their tokens as background
    and their expert as underline, then the commonest tokens of all texts above and at or below the entropy threshold,
    of pairs those of the answers alone.

    Examples are spread over the rows of their set, two of each; of the set `forget` as many as there are forget
    experts, two at least and ten at most. A token is coloured by the position before it, whose distribution it was
    drawn from: there S_q was taken, and there the expert was chosen. The first token of a text has neither.

    Args:
        model: as for `observe_texts`.
        sets: name -> texts or pairs.

    Raises:
        ValueError: a set has no texts, or as for `observe_texts`.
    """
    if empty := [name for name, texts in sets.items() if not texts] or not sets:
        raise ValueError(f"`sets` has no texts{f' in {empty}' if sets else ''}. Give each set at least one.")
    encoded = [text for name, texts in sets.items() for text in encode_texts(tokenizer, texts, f"The set {name!r}")]
    _, _, config = _gated_adapter(model)
    experts = config.num_forget_experts or 1
    names = ["retain", *(config.domains or [f"forget {i + 1}" for i in range(experts)])]
    highest = max_tsallis_entropy(len(tokenizer), config.entropy_q)
    threshold = config.entropy_threshold
    assert threshold is not None  # as `_gated_adapter` has checked
    counts = {name: max(EXAMPLES, min(experts, MOST_EXAMPLES) if name == "forget" else 0) for name in sets}
    examples = [(name, text) for name, texts in sets.items() for text in spread(texts, counts[name])]
    seen = observe_texts(model, tokenizer, [text for _, text in examples])
    clouds = _clouds(model, tokenizer, encoded, config.entropy_q, threshold)
    legend = " ".join(f'<span style="{_underline(i)}">{escape(name)}</span>' for i, name in enumerate(names))
    shares = [f"{escape(name)} ({len(texts)})" for name, texts in sets.items()]
    return "\n".join(
        [
            '<section class="tokens">',
            "<h3>Tokens by entropy and expert</h3>",
            f"<p>Background: S<sub>{config.entropy_q:g}</sub> of the base model's prediction of the token, "
            f'<span style="{_background(0.0)}">0</span> to <span style="{_background(1.0)}">{highest:.2f}</span>. '
            f"Underline: the expert, {legend}. Examples first, then the commonest tokens of all texts: "
            f"{', '.join(shares)}.</p>",
            *(_text(name, text, names, highest) for (name, _), text in zip(examples, seen, strict=True)),
            f"<h4>High-entropy tokens (S above {threshold:.3g}): {clouds[True].total()}</h4>",
            word_cloud(clouds[True]),
            f"<h4>Low-entropy tokens: {clouds[False].total()}</h4>",
            word_cloud(clouds[False]),
            "</section>",
        ]
    )


def _clouds(
    model: Any, tokenizer: PreTrainedTokenizerBase, encoded: list[tuple[list[int], int]], q: float, threshold: float
) -> dict[bool, Counter[str]]:
    """Whether S_q is above the threshold -> how often each word is."""
    clouds: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    entropies = base_entropies(model, encoded, q, desc="tokens")
    for (ids, start), entropy in zip(encoded, entropies, strict=True):
        high = (entropy > threshold).tolist()
        for piece, above in zip(_pieces(tokenizer, ids)[start:], high, strict=True):
            word = piece.strip()
            if any(character.isalnum() for character in word) and word not in tokenizer.all_special_tokens:
                clouds[above][word] += 1
    return clouds


def _background(share: float) -> str:
    return f"background:rgba(230,140,0,{0.6 * min(1.0, share):.2f})"


def _underline(expert: int) -> str:
    colour = RETAIN_COLOUR if expert == 0 else COLOURS[(expert - 1) % len(COLOURS)]
    return f"border-bottom:3px solid {colour}"


def _text(set_name: str, text: SeenText, names: Sequence[str], highest: float) -> str:
    spans = [f"<span>{escape(text.pieces[0])}</span>"]
    for piece, entropy, expert in zip(text.pieces[1:], text.entropy, text.experts, strict=True):
        style = f"{_background(entropy / highest)};{_underline(expert)}"
        spans.append(f'<span style="{style}" title="S {entropy:.2f}, {escape(names[expert])}">{escape(piece)}</span>')
    return f'<p style="white-space:pre-wrap;line-height:2"><b>{escape(set_name)}</b> {"".join(spans)}</p>'


def word_cloud(counts: Counter[str]) -> str:
    """The commonest words in alphabetical order, the area of each as its count."""
    if not counts:
        return "<p>none</p>"
    common = counts.most_common(CLOUD_SIZE)
    largest = common[0][1]
    words = []
    for word, count in sorted(common, key=lambda item: item[0].lower()):
        size = 0.5 + 1.7 * math.sqrt(count / largest)
        words.append(f'<span style="font-size:{size:.2f}rem" title="{count}">{escape(word)}</span>')
    return f'<p style="line-height:1.4">{" ".join(words)}</p>'
