# SPDX-License-Identifier: Apache-2.0
"""Losses of other labels: what a forget token is to become, in place of what it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from alter_peft.entropy import log_probabilities, map_row_chunks


Head = Callable[[Tensor], Tensor]


def other_label_loss(
    hidden: Tensor, head: Head, labels: Tensor, probabilities: Tensor, chunk_size: int = 256
) -> Tensor:
    """
    Cross-entropy of other labels: -sum_k q_k ln p(v_k).

    With one label a token, drawn at random, it is random labelling; with a generic one, WHP (`generic_labels`).

    Args:
        hidden: final hidden states at the positions that predict the tokens, (n, k).
        head: maps hidden states (c, k) to logits (c, V).
        labels: v, K tokens of the vocabulary for each position, (n, K).
        probabilities: q, that of each, (n, K).
        chunk_size: the most rows given to `head` at once.

    Returns:
        The loss of each token in nats, (n,).

    References:
        Random tokens: Yao et al., "Machine Unlearning of Pre-trained Large Language Models", arXiv:2402.15159.
    """

    def loss(rows: Tensor, label: Tensor, probability: Tensor) -> Tensor:
        return -(probability * log_probabilities(head(rows)).gather(-1, label)).sum(-1)

    return map_row_chunks(loss, chunk_size, hidden, labels, probabilities)


def undial_loss(
    hidden: Tensor,
    base_hidden: Tensor,
    head: Head,
    base_head: Head,
    labels: Tensor,
    beta: float = 10.0,
    chunk_size: int = 256,
) -> Tensor:
    """
    Self-distillation from adjusted logits (UNDIAL): cross-entropy from softmax(z_base - beta e(x_t)) to p.

    z_base are the base model's logits and e(x_t) is 1 at the label: the base's own distribution with the label's logit
    lowered. Its point of rest is that distribution; no gradient flows into the base's side.

    Args:
        hidden, base_hidden: final hidden states of the model and of its base, (n, k).
        head, base_head: hidden states (c, k) to logits (c, V), of each.
        labels: x_t, (n,).
        beta: gamma of the paper, named as in open-unlearning, whose default is 10.
        chunk_size: the most rows given to a head at once.

    Returns:
        The loss of each token in nats, (n,).

    References:
        Dong et al., "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models",
        arXiv:2402.10052.
    """

    def loss(rows: Tensor, base_rows: Tensor, label: Tensor) -> Tensor:
        with torch.no_grad():
            logits = base_head(base_rows).float()
            adjusted = logits.scatter_add(-1, label.unsqueeze(-1), logits.new_full((len(label), 1), -beta)).softmax(-1)
        return -(adjusted * log_probabilities(head(rows))).sum(-1)

    return map_row_chunks(loss, chunk_size, hidden, base_hidden, labels)


def generic_labels(logits: Tensor, reinforced: Tensor, alpha: float = 5.0) -> Tensor:
    """
    The tokens of generic predictions (WHP): argmax of v_base - alpha relu(v_reinforced - v_base).

    A model reinforced on the forget rows raises the logits of what is special to them; what is left is generic. Of the
    paper's two ways to generic labels this is the one without a dictionary of names, which its authors had a large
    model write.

    Args:
        logits: v_base of each token, (n, V).
        reinforced: the same by the model trained further on the forget rows, (n, V).
        alpha: 5 in the paper.

    Returns:
        A token for each position, (n,).

    References:
        Eldan and Russinovich, "Who's Harry Potter? Approximate Unlearning in LLMs", arXiv:2310.02238.
    """
    return (logits - alpha * (reinforced - logits).relu()).argmax(-1)


def novice_labels(
    log_prob: Tensor, expert: Tensor, novice: Tensor, eta: float = 1000.0, temperature: float = 1.2, top_k: int = 50
) -> tuple[Tensor, Tensor]:
    """
    What ELM teaches: softmax over the top k of ln p - eta_t (ln p(.|expert) - ln p(.|novice)), for one row.

    All three are log-softmax of logits / temperature. eta_t rises from 1 at the row's first token to eta at its last,
    as in the authors' code.

    Args:
        log_prob: logits of one row's tokens by the base model, (n, V).
        expert: the same after a text that says that an expert wrote the row.
        novice: after one that says a novice did.
        eta, temperature, top_k: defaults of the authors' code (rohitgandikota/erasing-llm, trainscripts/erase.py).

    Returns:
        Labels (n, K) and their probabilities (n, K), K = top_k or V if that is less.

    References:
        Gandikota et al., "Erasing Conceptual Knowledge from Language Models" (ELM), arXiv:2410.02760.
    """
    own, knows, knows_not = (F.log_softmax(part.float() / temperature, dim=-1) for part in (log_prob, expert, novice))
    rising = torch.linspace(1.0, eta, len(own), device=own.device).unsqueeze(-1)
    found = (own - rising * (knows - knows_not)).topk(min(top_k, own.shape[-1]), dim=-1)
    return found.indices, found.values.softmax(-1)
