# SPDX-License-Identifier: Apache-2.0
"""How a router saw the tokens of some texts: their entropy, and the expert that each was sent to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from alter_peft.entropy import max_tsallis_entropy
from alter_peft.scoring import ScoredModel
from alter_peft.tuner.config import AlterConfig

from .answers import Pair, encode_texts, labelled_row, spread
from .metrics.high_entropy import base_entropies


EXAMPLES, MOST_EXAMPLES = 2, 10  # of a set
BATCH_SIZE = 8


@dataclass(frozen=True)
class SeenText:
    """
    One text as the router saw it.

    Attributes:
        pieces: what each of its n tokens adds to the text; empty for a token that ends within a character.
        entropy: S_q of the base model's prediction of tokens 2..n, n - 1 numbers: the one at the position before.
        experts: the expert that this position was sent to, 0 being the retain expert; n - 1 numbers.
    """

    pieces: list[str]
    entropy: list[float]
    experts: list[int]

    def routed(self) -> Iterator[tuple[str, float, int]]:
        """Piece, entropy and expert of every token but the first, which has neither."""
        return zip(self.pieces[1:], self.entropy, self.experts, strict=True)


@dataclass(frozen=True)
class SeenTokens:
    """
    Texts of several sets as the router saw them, for a page that shows them.

    Attributes:
        q, threshold: of the entropy, which is `highest` at most.
        experts: their names, the retain expert's first.
        sizes: how many texts each set has.
        examples: the name of a set, and one of its texts.
        above, below: how often each word among the scored tokens of all texts is, whose entropy is above the
            threshold, and of all others.
    """

    q: float
    threshold: float
    highest: float
    experts: list[str]
    sizes: dict[str, int]
    examples: list[tuple[str, SeenText]]
    above: dict[str, int]
    below: dict[str, int]

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> SeenTokens:
        """Read what `save` has written."""
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**data, "examples": [(name, SeenText(**text)) for name, text in data["examples"]]})


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
    scored = ScoredModel(model)
    name, config, _ = _gated_adapter(scored)
    encoded = [(ids, 1) for ids, _ in encode_texts(tokenizer, texts, "`texts`")]
    entropies = base_entropies(model, encoded, config.entropy_q, BATCH_SIZE)
    rows = [labelled_row(*one) for one in encoded]
    experts = scored.of_rows(rows, BATCH_SIZE, lambda batch: scored.sent_to(batch, name))
    return [
        SeenText(_pieces(tokenizer, ids), entropy.tolist(), sent.tolist())
        for (ids, _), entropy, sent in zip(encoded, entropies, experts, strict=True)
    ]


def _gated_adapter(scored: ScoredModel) -> tuple[str, AlterConfig, float]:
    """Its name, its config, and the entropy threshold there."""
    fix = "Give a model with an enabled ALTER adapter whose router is 'context' or 'entropy'."
    if scored.gating is None:
        kind = type(scored.model).__name__
        raise ValueError(f"`model` is a {kind} without an ALTER adapter, so no token is routed. {fix}")
    active = scored.gating.active()
    if not active:
        raise ValueError(f"`model` has no active adapter that routes tokens: it is static or disabled. {fix}")
    router, name = active[0]
    config = router.config[name]
    if config.entropy_threshold is None:
        raise ValueError(
            f"`entropy_threshold` of adapter {name!r} is not known yet: with `entropy_quantile` it is measured by the "
            "trainer. Train the adapter first or set it."
        )
    return name, config, config.entropy_threshold


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """What each token adds to the decoded text: single tokens would lose their spaces, and parts of characters."""
    pieces, done = [], ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end]))
        whole = text if end == len(ids) else text.rstrip("\N{REPLACEMENT CHARACTER}")
        pieces.append(whole[len(done) :])
        done = max(done, whole, key=len)
    return pieces


def observe_tokens(
    model: Any, tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, Sequence[str | Pair]]
) -> SeenTokens:
    """
    Examples of each set, and the words of all texts above and at or below the entropy threshold, of pairs those of
    the answers alone: what the paper's Fig. 2 shows.

    Examples are spread over the rows of their set, two of each; of the set `forget` as many as there are forget
    experts, two at least and ten at most. A token is seen at the position before it, whose distribution it was drawn
    from: there S_q was taken, and there the expert was chosen. The first token of a text has neither.

    Raises:
        ValueError: a set has no texts, or as for `observe_texts`, whose `model` it takes.
    """
    if empty := [name for name, texts in sets.items() if not texts] or not sets:
        raise ValueError(f"`sets` has no texts{f' in {empty}' if sets else ''}. Give each set at least one.")
    encoded = [text for name, texts in sets.items() for text in encode_texts(tokenizer, texts, f"The set {name!r}")]
    _, config, threshold = _gated_adapter(ScoredModel(model))
    experts = config.num_forget_experts or 1
    counts = {name: max(EXAMPLES, min(experts, MOST_EXAMPLES) if name == "forget" else 0) for name in sets}
    examples = [(name, text) for name, texts in sets.items() for text in spread(texts, counts[name])]
    seen = observe_texts(model, tokenizer, [text for _, text in examples])
    words: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    entropies = base_entropies(model, encoded, config.entropy_q, BATCH_SIZE, desc="tokens")
    for (ids, start), entropy in zip(encoded, entropies, strict=True):
        for piece, above in zip(_pieces(tokenizer, ids)[start:], (entropy > threshold).tolist(), strict=True):
            word = piece.strip()
            if any(character.isalnum() for character in word) and word not in tokenizer.all_special_tokens:
                words[above][word] += 1
    return SeenTokens(
        q=config.entropy_q,
        threshold=threshold,
        highest=max_tsallis_entropy(len(tokenizer), config.entropy_q),
        experts=["retain", *(config.domains or [f"forget {i + 1}" for i in range(experts)])],
        sizes={name: len(texts) for name, texts in sets.items()},
        examples=[(name, text) for (name, _), text in zip(examples, seen, strict=True)],
        above=dict(words[True]),
        below=dict(words[False]),
    )
