# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""An evaluation as tables."""

from rich.console import Group, RenderableType
from rich.text import Text

from torchao_masquant.evaluation.evaluation import Evaluation
from torchao_masquant.evaluation.tables import new_table, number
from torchao_masquant.wording import byte_size

__all__ = ["render"]


def render(evaluation: Evaluation) -> RenderableType:
    """Lay an evaluation out: a heading, then scores by task, content and modality."""
    parts: list[RenderableType] = [Text(_heading(evaluation)), _tasks(evaluation)]
    if len(evaluation.by_content) > 1:
        parts.append(_contents(evaluation))
    if evaluation.has_reference:
        parts.append(_modalities(evaluation))
    return Group(*parts)


def _heading(evaluation: Evaluation) -> str:
    kind = " ".join(
        part for part in (evaluation.scheme, evaluation.method) if part is not None
    )
    size = f"{byte_size(evaluation.weight_bytes)} of weights in the decoder"
    if evaluation.reference_weight_bytes is not None:
        size += f" (reference: {byte_size(evaluation.reference_weight_bytes)})"
    return f"{evaluation.model}, {kind or 'dense'}: {size}"


def _with_reference(value: str, reference: str) -> str:
    return f"{value} ({reference})" if reference else value


def _tasks(evaluation: Evaluation) -> RenderableType:
    compared = evaluation.has_reference
    title = "By task (in brackets: the reference)" if compared else "By task"
    table = new_table(
        title,
        ["task"],
        ["examples", "accuracy\n%", "cross-entropy\nnats", "perplexity"]
        + (
            ["KL to reference\nmean, nats", "its 0.99\nquantile", "same\nanswer, %"]
            if compared
            else []
        ),
    )
    for task, score in evaluation.tasks.items():
        row = [
            task,
            str(score.examples),
            _with_reference(
                number(score.accuracy, ".1f", 100),
                number(score.reference_accuracy, ".1f", 100),
            ),
            _with_reference(
                number(score.cross_entropy), number(score.reference_cross_entropy)
            ),
            number(score.perplexity, ".4g"),
        ]
        if compared:
            row += [
                number(score.kl, ".2e"),
                number(score.kl_p99, ".2e"),
                number(score.agreement, ".1f", 100),
            ]
        table.add_row(*row)
    return table


def _contents(evaluation: Evaluation) -> RenderableType:
    table = new_table(
        "By modalities in the example",
        ["example holds"],
        ["examples", "labelled\ntokens", "cross-entropy\nnats", "perplexity"],
    )
    for content, score in evaluation.by_content.items():
        table.add_row(
            content,
            str(score.examples),
            str(score.tokens),
            _with_reference(
                number(score.cross_entropy), number(score.reference_cross_entropy)
            ),
            number(score.perplexity, ".4g"),
        )
    return table


def _modalities(evaluation: Evaluation) -> RenderableType:
    ratios = bool(evaluation.sqnr)
    table = new_table(
        "By modality of the token",
        ["modality"],
        ["tokens", "KL to reference\nnats"]
        + (
            ["centred SQNR, mean\nover linears, dB", "plain SQNR\ndB"] if ratios else []
        ),
    )
    for modality, score in evaluation.by_modality.items():
        table.add_row(
            modality,
            str(score.tokens),
            number(score.kl, ".2e"),
            *(
                number(evaluation.mean_sqnr(modality, centered=centered), ".1f")
                for centered in ((True, False) if ratios else ())
            ),
        )
    return table
