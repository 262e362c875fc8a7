# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Several processes that calibrate one model together, samples and solving shared."""

import contextlib
import datetime
import os
from typing import (
    Any,
    Callable,
    Iterator,
    Mapping,
    Optional,
    Sequence,
    TypeVar,
    Union,
)

import torch
import torch.distributed as dist

from torchao_masquant.calibration.expert_statistics import (
    ExpertMoments,
    ExpertStatistics,
)
from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.calibration.statistics import InputStatistics, Moments

__all__ = ["Team", "TeamError"]

_T = TypeVar("_T")


class TeamError(RuntimeError):
    """Another process of the team has died, or does not answer."""


class Team:
    """The processes that :mod:`torch.distributed` was initialized for; one where not.

    Objects, and statistics on the CPU, go through gloo, statistics on a GPU through
    the default group.

    Args:
        timeout: seconds to wait for a process that is alive; longer than solving for
            the widest linear takes.
    """

    def __init__(self, timeout: float = 7200.0):
        together = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0
        #: how many of the processes are on this machine
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self._timeout = datetime.timedelta(seconds=timeout)
        self._group: Any = None
        if self.size > 1:
            with self._talking():
                self._group = dist.new_group(backend="gloo", timeout=self._timeout)

    def share_of(self, count: int) -> range:
        """Indices of this process's samples: neighbours, so that order is kept."""
        return range(
            count * self.rank // self.size, count * (self.rank + 1) // self.size
        )

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise TeamError(
                f"process {self.rank} of {self.size} lost the others: one of them has "
                f"died, or was silent for {self._timeout.total_seconds():.0f} s; look at "
                "its messages, and start the same command again to go on from the last "
                "finished block."
            ) from error

    def barrier(self) -> None:
        """Wait for all; raise where one does not come."""
        if self.size > 1:
            with self._talking():
                dist.monitored_barrier(self._group, self._timeout, wait_all_ranks=True)

    def broadcast(self, value: Any) -> Any:
        """What process 0 has."""
        if self.size == 1:
            return value
        values = [value]
        with self._talking():
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def gather(self, value: _T) -> list[_T]:
        """What each process has, in order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def on_first(self, function: Callable[[], _T]) -> _T:
        """Run a function on process 0, and give its result, or its error, to all."""
        result: Any = None
        failure: Optional[Exception] = None
        if self.rank == 0:
            try:
                result = function()
            except Exception as error:
                if self.size == 1:
                    raise
                failure = error
        result, failure = self.broadcast((result, failure))
        if failure is not None:
            raise failure
        return result

    def collect(self, layers: Mapping[str, Any]) -> dict[str, Any]:
        """On process 0 what all have solved; elsewhere nothing."""
        if self.size == 1:
            return dict(layers)
        values: Optional[list[Any]] = [None] * self.size if self.rank == 0 else None
        with self._talking():
            dist.gather_object(dict(layers), values, dst=0, group=self._group)
        return {k: v for part in values or () for k, v in part.items()}

    def reduce(self, session: CalibrationSession) -> None:
        """Make the statistics of each process those of all samples.

        Minima and maxima and the sampled tokens are those of a single process, bit for
        bit; sums are, to the rounding of float64 sums in another order.

        Raises:
            ValueError: a linear, or experts, are not called once by every sample, so
                that the tokens of a process cannot be numbered among those of all.
        """
        if self.size == 1:
            return
        leaders: dict[str, str] = {}
        for found in self.gather(session.leaders):
            for name, leader in found.items():
                if leaders.setdefault(name, leader) != leader:
                    raise ValueError(
                        f"{name} reads the same tensor as {leader} in some samples, and "
                        f"as {leaders[name]} in others: exclude it."
                    )
        session.leaders = leaders
        for name, layer in session.layers.items():
            if leaders.get(name) != name:
                continue
            if name not in session.statistics:
                session.statistics[name] = InputStatistics(
                    layer.in_features,
                    session.router.modalities,
                    layer.weight.device,
                    session.second_moments,
                    session.before,
                )
            statistics = session.statistics[name]
            if len(set(self.gather(type(statistics)))) > 1:
                raise self._uncounted(name)
            for index, moments in enumerate(statistics.moments):
                self._check_before(name, moments)
                if isinstance(statistics, ExpertStatistics):
                    self._reduce_experts(statistics.of_experts[index])
                self._reduce(moments)

    @staticmethod
    def _uncounted(name: str) -> ValueError:
        return ValueError(
            f"{name} is not called once by every sample, which several processes "
            "need to number its tokens: exclude it, or calibrate in one process."
        )

    def _check_before(self, name: str, moments: Moments) -> None:
        counts = self.gather(moments.count)
        expected = self.gather(moments.before)
        if expected != [sum(counts[:rank]) for rank in range(self.size)]:
            raise self._uncounted(name)

    def _reduce_experts(self, moments: ExpertMoments) -> None:
        total = sum(self.gather(moments.total))
        samples = self.gather(moments.sample_of(total).cpu())
        self._all_reduce(moments)
        with self._talking():
            dist.all_reduce(moments.count, group=self._group_of(moments.count))
        moments.sample_experts = torch.cat(samples).to(moments.sum.device)
        moments.before = 0

    def _reduce(self, moments: Moments) -> None:
        total = sum(self.gather(moments.count))
        samples = self.gather(moments.sample_of(total).cpu())
        self._all_reduce(moments)
        if moments.outer is not None:
            with self._talking():
                dist.all_reduce(moments.outer, group=self._group_of(moments.outer))
        moments.sample = torch.cat(samples).to(moments.sum.device)
        moments.count, moments.before = total, 0

    def _all_reduce(self, moments: Union[Moments, ExpertMoments]) -> None:
        group = self._group_of(moments.sum)
        with self._talking():
            dist.all_reduce(moments.amin, dist.ReduceOp.MIN, group=group)
            dist.all_reduce(moments.amax, dist.ReduceOp.MAX, group=group)
            dist.all_reduce(moments.sum, dist.ReduceOp.SUM, group=group)

    def _group_of(self, tensor: torch.Tensor) -> Any:
        return self._group if tensor.device.type == "cpu" else None

    def mine(self, costs: Sequence[float]) -> list[int]:
        """Indices of the tasks of this process, the dearest given out first."""
        loads = [0.0] * self.size
        taken: list[int] = []
        for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            rank = loads.index(min(loads))
            loads[rank] += costs[index]
            if rank == self.rank:
                taken.append(index)
        return sorted(taken)
