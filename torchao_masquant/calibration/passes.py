# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How many linears are observed at a time, so that their statistics fit in memory."""

from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.calibration.statistics import SAMPLE_TOKENS
from torchao_masquant.experts import ExpertWeight

__all__ = ["plan_passes"]


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
    passes: list[list[str]] = []
    chosen: list[str] = []
    used = 0
    modalities = len(session.router.modalities)
    for leader, names in session.groups().items():
        layer = session.layers[leader]
        width = layer.in_features
        needed = 24 * width * modalities
        if isinstance(layer, ExpertWeight):
            needed *= 1 + layer.weight.shape[0]
        if second_moments:
            needed += (8 * width + 4 * SAMPLE_TOKENS) * width * modalities
        if chosen and used + needed > max_bytes:
            passes.append(chosen)
            chosen, used = [], 0
        chosen += names
        used += needed
    chosen += [name for name in session.layers if name not in session.leaders]
    return [*passes, chosen]
