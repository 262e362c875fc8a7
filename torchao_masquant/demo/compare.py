# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Quantizing one model in every scheme by every method, and scoring the results."""

import copy
import itertools
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Iterable, Iterator, Mapping, Union

import torch
from torch import nn
from torchao.quantization import quantize_

from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.conductor.conductor import solve
from torchao_masquant.config import masquant_config
from torchao_masquant.evaluation import linear_sqnr
from torchao_masquant.linear import MASQuantLinear
from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import Recipe, library_versions
from torchao_masquant.routing import Router
from torchao_masquant.samples import run_samples
from torchao_masquant.selection import select_linears
from torchao_masquant.testing import digits

__all__ = ["METHODS", "SCHEMES", "Row", "compare_methods", "dense_row"]

SCHEMES = ("w8a8", "w4a8", "w4a4")
METHODS = ("rtn", "smoothquant", "masquant-paper", "masquant")

# Held-out examples of each task that the linears are compared on.
_SQNR_EXAMPLES = 50


@dataclass
class Row:
    """One model of the table.

    Attributes:
        scheme: as in ``calibrate``, or "dense".
        method: as in ``calibrate``, or "".
        accuracy: task to fraction of right answers, 0..1.
        cross_entropy: task to mean of -log p(right answer), in nats.
        sqnr: modality to mean centred SQNR over the linears, in dB.
        weight_bytes: of the quantized linears' weights, with all that belongs to them.
        seconds: to solve and to convert, the statistics not counted.
    """

    scheme: str
    method: str
    accuracy: dict[str, float]
    cross_entropy: dict[str, float]
    weight_bytes: int
    seconds: float = 0.0
    sqnr: dict[str, float] = field(default_factory=dict)


def _scores(model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
    scores = digits.evaluate(model)
    return (
        {task: scores[task].accuracy for task in digits.TASKS},
        {task: scores[task].cross_entropy for task in digits.TASKS},
    )


def dense_row(model: nn.Module) -> Row:
    """Score the model itself.

    Its weight bytes are those of its checkpoint's type, bfloat16.
    """
    accuracy, cross_entropy = _scores(model)
    linears = select_linears(model).values()
    weight_bytes = sum(2 * linear.weight.numel() for linear in linears)
    return Row("dense", "", accuracy, cross_entropy, weight_bytes)


def collect_statistics(
    model: nn.Module, samples: Iterable[Mapping[str, Any]], progress: bool
) -> CalibrationSession:
    """Run calibration samples once; every method is solved from what this keeps."""
    router = Router.for_model(model)
    router.skip_padding = True
    session = CalibrationSession(select_linears(model), router, second_moments=True)
    with session.observing(model):
        run_samples(
            model,
            samples,
            router,
            progress=progress,
            description="Calibrating",
        )
    session.check_complete()
    return session


def compare_methods(
    model: nn.Module, rank: Union[int, float], progress: bool
) -> Iterator[tuple[Row, nn.Module, Recipe]]:
    """Quantize copies of a model and score them.

    Args:
        model: the dense model; stays as it is.
        rank: of each modality's low-rank pair, see ``calibrate``.
        progress: show a bar while the calibration data runs.

    Yields:
        One row for each scheme and method, with its model and its recipe.
    """
    session = collect_statistics(model, digits.calibration_samples(), progress)
    comparison = _comparison_samples()
    for scheme, method in itertools.product(SCHEMES, METHODS):
        start = time.perf_counter()
        options = SolverOptions(scheme, method, rank=rank)
        recipe = Recipe(
            options,
            session.router.modalities,
            solve(session, options),
            library_versions(),
        )
        quantized = copy.deepcopy(model)
        quantize_(quantized, masquant_config(recipe))
        seconds = time.perf_counter() - start
        accuracy, cross_entropy = _scores(quantized)
        ratios = linear_sqnr(model, quantized, comparison)
        sqnr = {
            modality: statistics.mean(r[modality].centered for r in ratios.values())
            for modality in recipe.modalities
        }
        row = Row(
            scheme,
            method,
            accuracy,
            cross_entropy,
            weight_bytes=sum(
                module.weight.nbytes_stored
                for module in quantized.modules()
                if isinstance(module, MASQuantLinear)
            ),
            seconds=seconds,
            sqnr=sqnr,
        )
        yield row, quantized, recipe


def _comparison_samples() -> list[dict[str, torch.Tensor]]:
    return [
        next(iter(digits.heldout_batches(task, _SQNR_EXAMPLES))).inputs
        for task in digits.TASKS
    ]
