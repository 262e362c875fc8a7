# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How many linears are observed at a time, so that their statistics fit in memory."""

from typing import Sequence

from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.experts import ExpertWeight
from torchao_masquant.statistics.input_statistics import statistics_bytes

__all__ = ["in_passes", "plan_passes"]


def plan_passes(
    session: CalibrationSession, second_moments: bool, max_bytes: int
) -> list[list[str]]:
    """Split a session's linears into passes over the data.

    Args:
        session: one that has seen a sample, so that it knows which linears share
            their input.
        second_moments: whether the passes will keep covariances.
        max_bytes: of the statistics of one pass, in bytes. An input that alone needs
            more has a pass of its own.

    Returns:
        Names of the linears of each pass; linears that share an input stay together.
        Those that the sample did not reach come with the last pass: another sample
        may reach them.
    """
    groups = session.groups()
    needs = []
    for leader in groups:
        layer = session.layers[leader]
        experts = layer.weight.shape[0] if isinstance(layer, ExpertWeight) else 0
        needs.append(
            statistics_bytes(
                layer.in_features,
                len(session.router.modalities),
                second_moments,
                experts,
            )
        )
    together = list(groups.values())
    passes = [
        [name for index in indices for name in together[index]]
        for indices in in_passes(needs, max_bytes)
    ]
    passes[-1] += [name for name in session.layers if name not in session.leaders]
    return passes


def in_passes(needs: Sequence[int], max_bytes: int) -> list[list[int]]:
    """Split inputs, in their order, so that each part keeps to a bound.

    Args:
        needs: bytes of the statistics of each.
        max_bytes: of a part; one that alone needs more is a part of its own.

    Returns:
        Indices of each part; one part without any where there are no inputs.
    """
    parts: list[list[int]] = [[]]
    used = 0
    for index, needed in enumerate(needs):
        if parts[-1] and used + needed > max_bytes:
            parts.append([])
            used = 0
        parts[-1].append(index)
        used += needed
    return parts
