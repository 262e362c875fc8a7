# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Linears whose smoothing factor something before them can take into its weight."""

import logging
from typing import Any, Iterable, Mapping

import torch
from torch import nn

from torchao_masquant.calibration.left_out import by_pattern
from torchao_masquant.models.folding import find_folds
from torchao_masquant.routing import Router
from torchao_masquant.samples import MODALITY_IDS, run_samples

__all__ = ["foldable_channels", "showing_all"]

_LOGGER = logging.getLogger(__name__)


def foldable_channels(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    samples: Iterable[Mapping[str, Any]],
    router: Router,
) -> dict[str, torch.Tensor]:
    """Name of a linear whose factor can be folded to the channels that have it.

    A warning names the others.

    Args:
        model: that holds the linears.
        linears: name in the model to module.
        samples: that have tokens of every modality between them, see :func:`showing_all`.
        router: of the model, not attached to it.

    Returns:
        Name to (K,) integers, see
        :func:`~torchao_masquant.solver.smoothing.smoothing_factors`.
    """

    def run() -> None:
        with router.attached(model):
            run_samples(model, samples, router, progress=False, description="")

    folds = find_folds(model, linears, run)
    found = {name: fold.channels for fold in folds for name in fold.readers}
    left = [name for name in linears if name not in found]
    if left:
        _LOGGER.warning(
            "%d of %d linears are rounded without a smoothing factor, since nothing "
            "before them can take it: %s.",
            len(left),
            len(linears),
            by_pattern(left),
        )
    return found


def showing_all(
    samples: Iterable[Mapping[str, Any]], router: Router
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """A few samples that have tokens of every modality between them.

    Args:
        samples: read until they are found.
        router: whose modalities they are.

    Returns:
        Them, and all that were read.
    """
    missing = set(range(len(router.modalities)))
    shown: list[Mapping[str, Any]] = []
    read: list[Mapping[str, Any]] = []
    for sample in samples:
        read.append(sample)
        found = missing & _modalities_in(sample, router)
        if found or not shown:
            shown.append(sample)
        missing -= found
        if not missing:
            break
    return shown, read


def _modalities_in(sample: Mapping[str, Any], router: Router) -> set[int]:
    ids = sample.get(MODALITY_IDS)
    tokens = sample.get("input_ids")
    if ids is None and router.token_ids is not None and tokens is not None:
        ids = router.ids_of(tokens)
    return {0} if ids is None else set(ids.unique().tolist())
