# SPDX-License-Identifier: Apache-2.0
"""What ends an answer, for whoever measures its text or makes it forgotten."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class EndOfAnswer:
    """
    What ends an answer: special tokens and white space, which are no text of its own.

    Special are tokens with a role, but not the one for what the tokenizer can't spell, and others that were added as
    special (Phi-3's <|end|>).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        special = {*tokenizer.all_special_ids, *added} - {getattr(tokenizer, "unk_token_id", None)}
        if tokenizer.eos_token_id is not None:  # GPT-2's is its <unk>, too
            special.add(tokenizer.eos_token_id)
        self._is_end: dict[int, bool] = dict.fromkeys(special, True)

    def content_length(self, answer: Sequence[int]) -> int:
        """How many tokens of an answer are left without what ends it."""
        length = len(answer)
        while length and self._ends(answer[length - 1]):
            length -= 1
        return length

    def _ends(self, token: int) -> bool:
        if token not in self._is_end:
            self._is_end[token] = not str(self._tokenizer.decode([token])).strip()
        return self._is_end[token]
