# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What :func:`~torchao_masquant.evaluation.evaluate` found."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional

from rich.console import RenderableType

from torchao_masquant.evaluation.json_record import JSONRecord

__all__ = ["ContentScore", "Evaluation", "LinearSQNR", "ModalityScore", "TaskScore"]


def _perplexity(cross_entropy: float) -> float:
    # exp() overflows beyond 709 nats.
    return math.exp(cross_entropy) if cross_entropy < 700 else math.inf


@dataclass(frozen=True)
class TaskScore:
    """Score on one task. Fields that need a reference are None without one.

    Attributes:
        examples: rows with at least one labelled token.
        tokens: labelled tokens.
        accuracy: fraction of the examples whose labelled tokens are all the argmax of
            the model's logits, 0..1.
        cross_entropy: mean of -log p(label) over the labelled tokens, in nats.
        reference_accuracy: of the reference, 0..1.
        reference_cross_entropy: of the reference, in nats.
        kl: mean of KL(reference || model) of the next-token distributions, over the
            labelled tokens, in nats.
        kl_p99: its 0.99 quantile over the labelled tokens, in nats.
        agreement: fraction of the labelled tokens at which both models' argmax is the
            same, right or wrong, 0..1.
    """

    examples: int
    tokens: int
    accuracy: float
    cross_entropy: float
    reference_accuracy: Optional[float] = None
    reference_cross_entropy: Optional[float] = None
    kl: Optional[float] = None
    kl_p99: Optional[float] = None
    agreement: Optional[float] = None

    @property
    def perplexity(self) -> float:
        """``exp(cross_entropy)``."""
        return _perplexity(self.cross_entropy)


@dataclass(frozen=True)
class ModalityScore:
    """What the model says at the positions of one modality's tokens.

    Attributes:
        tokens: of that modality, padding not counted.
        kl: mean of KL(reference || model) over them, in nats; None without a reference,
            nan without tokens.
    """

    tokens: int
    kl: Optional[float] = None


@dataclass(frozen=True)
class ContentScore:
    """Score on the examples that hold the same modalities, whatever their task.

    Attributes:
        examples: rows with at least one labelled token.
        tokens: labelled tokens.
        cross_entropy: mean of -log p(label), in nats.
        reference_cross_entropy: of the reference; None without one.
    """

    examples: int
    tokens: int
    cross_entropy: float
    reference_cross_entropy: Optional[float] = None

    @property
    def perplexity(self) -> float:
        """``exp(cross_entropy)``."""
        return _perplexity(self.cross_entropy)


@dataclass(frozen=True)
class LinearSQNR:
    """Signal-to-quantization-noise ratio of a linear's output for one modality.

    Attributes:
        plain: ``10 log10(E|y|^2 / E|y_hat - y|^2)``, in dB; inf where there is no
            noise.
        centered: ``10 log10(E|y - E[y]|^2 / E|y_hat - y|^2)``, in dB.
    """

    plain: float
    centered: float


@dataclass(frozen=True)
class Evaluation(JSONRecord):
    """Scores of a model, possibly quantized, possibly against a reference.

    Attributes:
        model: name of the model's class.
        modalities: names, base first.
        tasks: name of a task to its score, in the data set's order.
        by_modality: modality to what the model says at its tokens.
        by_content: modalities of an example joined by "+" ("text", "text+vision") to
            the score on such examples.
        weight_bytes: of the weights of the decoder's linears, as they are held:
            integers, scales, smoothing factors and pairs of quantized ones, and dense
            ones in their own type. ``lm_head`` and towers are not counted.
        quantized_linears: how many of them are quantized.
        scheme: such as "w4a8", where the weights tell; None for a dense model, and
            "mixed" where they differ.
        method: "masquant" and so on, where the weights tell; None where they do not.
        reference_weight_bytes: as ``weight_bytes``, of the reference; None without.
        name: of the model's folder, or on the hub; None where it came from neither.
        date: of the evaluation, such as "2026-11-28"; None in files of before it was
            kept.
        sqnr: quantized linear to modality to ratio; empty without a reference, or
            without quantized linears. A modality without tokens is left out.
    """

    KIND: ClassVar[str] = "evaluation"
    FORMAT: ClassVar[str] = "torchao_masquant.evaluation.1"
    ADDED: ClassVar[tuple[str, ...]] = ("name", "date")

    model: str
    modalities: tuple[str, ...]
    tasks: dict[str, TaskScore]
    by_modality: dict[str, ModalityScore]
    by_content: dict[str, ContentScore]
    weight_bytes: int
    quantized_linears: int = 0
    scheme: Optional[str] = None
    method: Optional[str] = None
    reference_weight_bytes: Optional[int] = None
    name: Optional[str] = None
    date: Optional[str] = None
    sqnr: dict[str, dict[str, LinearSQNR]] = field(default_factory=dict)

    @property
    def has_reference(self) -> bool:
        """Whether the model was compared with another one."""
        return self.reference_weight_bytes is not None

    def mean_sqnr(self, modality: str, *, centered: bool = True) -> float:
        """Mean over the quantized linears, in dB; nan where there are none."""
        found = [
            ratios[modality] for ratios in self.sqnr.values() if modality in ratios
        ]
        values = [r.centered if centered else r.plain for r in found]
        return sum(values) / len(values) if values else math.nan

    def __rich__(self) -> RenderableType:
        from torchao_masquant.evaluation.evaluation_table import render

        return render(self)

    def __str__(self) -> str:
        from torchao_masquant.evaluation.tables import to_text

        return to_text(self.__rich__())

    def figures(self) -> dict[str, Any]:
        """Matplotlib figures, by name; none where there are no ratios to show.

        "sqnr_by_layer" (mean of each layer's linears), "sqnr_by_kind" (each linear).

        Raises:
            ImportError: matplotlib is missing.
        """
        from torchao_masquant.evaluation.evaluation_figures import (
            kind_drawing,
            layer_drawing,
        )

        found = (
            layer_drawing([(self.method or "quantized", self)]),
            kind_drawing(self, self.modalities),
        )
        return {d.name: d.titled(self.model) for d in found if d is not None}
