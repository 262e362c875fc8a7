# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How many linears are observed at a time, so that their statistics fit in memory."""

from typing import Callable, Optional, Sequence

from torchao_masquant.calibration.exact_inputs import ExactInputs
from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.models.experts import ExpertWeight
from torchao_masquant.routing import Router
from torchao_masquant.selection import Selected
from torchao_masquant.statistics.input_statistics import statistics_bytes

__all__ = ["Passes", "in_passes"]


class Passes:
    """Observes a part of a model after the other, as much at a time as memory bears.

    Args:
        router: that tells the modalities of the tokens that parts are called with.
        second_moments: keep covariances, too.
        max_bytes: of the statistics of one pass, in bytes. An input that alone needs
            more has a pass of its own.
        before: see :class:`~torchao_masquant.calibration.session.CalibrationSession`.
        exact: likewise.
    """

    def __init__(
        self,
        router: Router,
        second_moments: bool,
        max_bytes: int,
        before: Optional[Sequence[int]] = None,
        exact: Optional[ExactInputs] = None,
    ):
        self.router, self.second_moments = router, second_moments
        self.max_bytes, self.before, self.exact = max_bytes, before, exact
        #: names of what is called with other tokens than the model's
        self.left_out: set[str] = set()
        self._at_first = True

    def plan(self, part: Selected, run: Callable[[], object]) -> list[list[str]]:
        """Split a part.

        Args:
            part: what is to be observed.
            run: runs it on a sample, which shows what shares its input.

        Returns:
            Names of each pass; linears that share an input stay together, in the model's
            order, or in that of their calls where there are two streams. Those that were
            not reached come with the last pass: another sample may reach them.
        """
        probe = CalibrationSession(
            dict(part.linears), self.router, False, part.experts, towers=part.towers
        )
        probe.has_first = self._at_first
        with probe.watching():
            run()
        self.left_out.update(probe.not_matched)
        groups = probe.groups()
        if self.exact is not None:
            # Each input is met behind what the block calls before it.
            groups = {name: groups[name] for name in probe.leaders if name in groups}
        needs = []
        for leader in groups:
            layer = probe.layers[leader]
            experts = layer.weight.shape[0] if isinstance(layer, ExpertWeight) else 0
            needs.append(
                statistics_bytes(
                    layer.in_features,
                    len(probe.modalities_of(leader)),
                    self.second_moments,
                    experts,
                )
            )
        together = list(groups.values())
        passes = [
            [name for index in indices for name in together[index]]
            for indices in in_passes(needs, self.max_bytes)
        ]
        passes[-1] += [name for name in probe.layers if name not in probe.leaders]
        return passes

    def observe(self, part: Selected, run: Callable[[], object]) -> CalibrationSession:
        """What one pass has seen of the samples.

        Args:
            part: what is observed in this pass.
            run: runs it on all samples.
        """
        session = self.new_session(part)
        session.has_first, self._at_first = self._at_first, False
        with session.watching():
            run()
        return session

    def new_session(self, part: Selected) -> CalibrationSession:
        """The session of a pass."""
        return CalibrationSession(
            dict(part.linears),
            self.router,
            self.second_moments,
            part.experts,
            self.before,
            part.towers,
            self.exact,
        )


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
