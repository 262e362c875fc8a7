# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What two models say of each token of one call."""

from dataclasses import dataclass
from typing import Optional

import torch

__all__ = ["IGNORED", "ReferenceScores", "TokenScores", "score_tokens"]

#: Label of a token that is not scored, as in transformers.
IGNORED = -100

# Of one float64 table of log-probabilities, in bytes.
_CHUNK_BYTES = 64 << 20


@dataclass
class ReferenceScores:
    """A reference's, and how the model differs from it. All (batch, sequence).

    Attributes:
        right: bool, whether the reference's argmax is the target.
        loss: float64, its -log p(target), in nats; 0 without a target.
        agrees: bool, whether both models' argmax is the same.
        kl: float64, KL(reference || model) of the next token, in nats.
    """

    right: torch.Tensor
    loss: torch.Tensor
    agrees: torch.Tensor
    kl: torch.Tensor


@dataclass
class TokenScores:
    """Scores of the tokens of one call, on the CPU. All (batch, sequence).

    Attributes:
        targets: int64, the token that should follow; ``IGNORED`` for none.
        right: bool, whether the argmax is the target.
        loss: float64, -log p(target), in nats; 0 without a target.
        reference: None without a reference.
    """

    targets: torch.Tensor
    right: torch.Tensor
    loss: torch.Tensor
    reference: Optional[ReferenceScores] = None


def score_tokens(
    logits: torch.Tensor,
    reference_logits: Optional[torch.Tensor],
    labels: torch.Tensor,
    counted: torch.Tensor,
    where: str,
) -> TokenScores:
    """Score one call, a bounded number of tokens at a time, in float64.

    Args:
        logits: (batch, sequence, V) of the model.
        reference_logits: the same of the reference, or None.
        labels: (batch, sequence) integers; the label of a token is predicted by the
            logits of the token before it.
        counted: (batch, sequence) bool, tokens that are no padding: the divergence is
            found for them, and wherever there is a target.
        where: for the messages.

    Raises:
        ValueError: the labels are of another shape or no tokens, the reference has
            another vocabulary, or a logit is nan.
        TypeError: the labels are no integers.
    """
    targets = _targets(labels, logits, where).to(logits.device)
    if reference_logits is not None:
        _check_reference(logits, reference_logits, where)
        reference_logits = reference_logits.to(logits.device)
    labelled = targets != IGNORED
    needed = labelled
    if reference_logits is not None:
        needed = labelled | counted.to(logits.device)
    rows, columns = needed.nonzero(as_tuple=True)

    shape, device = tuple(targets.shape), logits.device
    right = torch.zeros(shape, dtype=torch.bool, device=device)
    loss = torch.zeros(shape, dtype=torch.float64, device=device)
    reference = None
    if reference_logits is not None:
        reference = ReferenceScores(
            torch.zeros_like(right),
            torch.zeros_like(loss),
            torch.zeros_like(right),
            torch.zeros_like(loss),
        )
    size = max(1, _CHUNK_BYTES // (8 * logits.shape[-1]))
    for row, column in zip(rows.split(size), columns.split(size)):
        at = row, column
        target = targets[at]
        log_p = _log_probabilities(logits[at], f"the model's logits for {where}")
        choice = log_p.argmax(-1)
        right[at] = choice == target
        loss[at] = _negative_log(log_p, target)
        if reference is None or reference_logits is None:
            continue
        log_q = _log_probabilities(
            reference_logits[at], f"the reference's logits for {where}"
        )
        reference_choice = log_q.argmax(-1)
        reference.right[at] = reference_choice == target
        reference.loss[at] = _negative_log(log_q, target)
        reference.agrees[at] = choice == reference_choice
        q = log_q.exp()
        # What the reference rules out weighs nothing, also where the model does too.
        terms = torch.where(q > 0, q * (log_q - log_p), 0.0)
        # Not below zero but by rounding.
        reference.kl[at] = terms.sum(-1).clamp_min(0)
    if reference is not None:
        reference = ReferenceScores(*(t.cpu() for t in vars(reference).values()))
    return TokenScores(targets.cpu(), right.cpu(), loss.cpu(), reference)


def _targets(labels: torch.Tensor, logits: torch.Tensor, where: str) -> torch.Tensor:
    """(batch, sequence): each token's next label."""
    if not isinstance(labels, torch.Tensor) or (
        labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    ):
        kind = labels.dtype if isinstance(labels, torch.Tensor) else type(labels)
        raise TypeError(
            f"labels of {where} are token ids, a tensor of integers, got {kind}."
        )
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels of {where} have shape {tuple(labels.shape)}, the model's logits "
            f"are for (batch, sequence) = {tuple(logits.shape[:2])}: give every token "
            f"a label, {IGNORED} where it is not scored."
        )
    targets = torch.full(labels.shape, IGNORED, dtype=torch.int64, device=labels.device)
    targets[:, :-1] = labels[:, 1:]
    scored = targets[targets != IGNORED]
    if scored.numel() and (scored.min() < 0 or scored.max() >= logits.shape[-1]):
        raise ValueError(
            f"labels of {where} go from {int(scored.min())} to {int(scored.max())}, "
            f"but the model predicts the tokens 0 to {logits.shape[-1] - 1}, and only "
            f"{IGNORED} marks a token that is not scored."
        )
    return targets


def _check_reference(logits: torch.Tensor, reference: torch.Tensor, where: str) -> None:
    if logits.shape[-1] != reference.shape[-1]:
        raise ValueError(
            f"the reference has a vocabulary of {reference.shape[-1]} tokens, the "
            f"model one of {logits.shape[-1]}: give the model that was quantized."
        )
    if logits.shape != reference.shape:
        raise ValueError(
            f"the reference's logits for {where} have shape "
            f"{tuple(reference.shape)}, the model's {tuple(logits.shape)}."
        )


def _log_probabilities(logits: torch.Tensor, what: str) -> torch.Tensor:
    log_p = torch.log_softmax(logits.double(), -1)
    if torch.isnan(log_p).any():
        raise ValueError(
            f"{what} hold nan or inf, so nothing can be scored: look for the layer "
            "that overflows."
        )
    return log_p


def _negative_log(log_p: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(T,) -log p(target), 0 where there is none."""
    found = -log_p.gather(-1, target.clamp_min(0)[:, None])[:, 0]
    return torch.where(target == IGNORED, 0.0, found)
