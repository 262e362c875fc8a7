# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Several processes that calibrate one model together, samples and solving shared."""

import contextlib
import dataclasses
import datetime
import hashlib
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

from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.statistics.expert_statistics import (
    ExpertMoments,
    ExpertStatistics,
)
from torchao_masquant.statistics.input_statistics import InputStatistics, Moments
from torchao_masquant.statistics.token_sample import TokenSample

__all__ = ["Team", "TeamError"]

_T = TypeVar("_T")


class TeamError(RuntimeError):
    """Another process of the team has died, does not answer, or found something else."""


class Team:
    """The processes that :mod:`torch.distributed` was initialized for; one where not.

    Objects, and tensors on the CPU, go through gloo, tensors on a GPU through the
    default group.

    Args:
        timeout: seconds to wait for a process that is alive; longer than solving for
            the widest linear takes.
        alone: this process by itself, whatever was initialized.
    """

    def __init__(self, timeout: float = 7200.0, *, alone: bool = False):
        together = not alone and dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0
        #: how many of the processes are on this machine
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self._timeout = datetime.timedelta(seconds=timeout)
        self._group: Any = None
        if self.size > 1:
            with self._talking():
                self._group = dist.new_group(backend="gloo", timeout=self._timeout)

    @classmethod
    def alone(cls) -> "Team":
        """A team of this process by itself."""
        return cls(alone=True)

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

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """What one process has."""
        if self.size == 1:
            return value
        values = [value]
        with self._talking():
            dist.broadcast_object_list(values, src=source, group=self._group)
        return values[0]

    def gather(self, value: _T) -> list[_T]:
        """What each process has, in order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def in_turn(self, function: Callable[[_T], _T], value: _T) -> _T:
        """Hand a value on from process to process, each putting its own in its place.

        Returns:
            To all, what the last one made of it.
        """
        for rank in range(self.size):
            if rank == self.rank:
                value = function(value)
            value = self.broadcast(value, rank)
        return value

    def add(self, tensor: torch.Tensor) -> None:
        """Put the sum over the processes in a tensor's place, the same bits in each."""
        if self.size > 1:
            with self._talking():
                dist.all_reduce(tensor, group=self._group_of(tensor))

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

    def spread(self, layers: Mapping[str, LayerRecipe]) -> dict[str, LayerRecipe]:
        """What process 0 has collected, on all; one tensor at a time."""
        if self.size == 1:
            return dict(layers)
        found: dict[str, LayerRecipe] = {}
        for name in self.broadcast(list(layers)):
            shell: Optional[LayerRecipe] = None
            if self.rank == 0:
                shell = _with(layers[name], lambda t: t.to("meta"))
            shell = self.broadcast(shell)
            assert shell is not None
            layer = layers[name] if self.rank == 0 else _with(shell, _empty)
            found[name] = _with(layer, self._sent)
        return found

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        """That of process 0, on the CPU, in place of one of its size and type."""
        flat = tensor.contiguous().reshape(-1)
        with self._talking():
            # As bytes: gloo does not know all types.
            dist.broadcast(flat.view(torch.uint8), src=0, group=self._group)
        return flat.reshape(tensor.shape)

    def agree(self, what: str, layers: Mapping[str, LayerRecipe]) -> None:
        """Raise where processes have come to different layers.

        Args:
            what: they are of, for the message.
            layers: of this process.

        Raises:
            TeamError: on all of them.
        """
        if len(set(self.gather(_digest(layers)))) > 1:
            raise TeamError(
                f"the processes have learned different weights of {what}, though all "
                "took the same steps: run them on machines of one kind, with the same "
                "versions of torch and as many threads, and start the same command "
                "again to go on from the last finished block."
            )

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
        session.sequences = sum(self.gather(session.sequences))
        session.left_out = set().union(*self.gather(session.left_out))
        for name, layer in session.layers.items():
            if leaders.get(name) != name:
                continue
            if name not in session.statistics:
                session.statistics[name] = InputStatistics(
                    layer.in_features,
                    session.modalities_of(name),
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
        sampled = self._sampled(moments)
        self._all_reduce(moments)
        self.add(moments.count)
        moments.sampled = sampled
        moments.before = 0

    def _reduce(self, moments: Moments) -> None:
        total = sum(self.gather(moments.count))
        sampled = self._sampled(moments)
        self._all_reduce(moments)
        if moments.outer is not None:
            self.add(moments.outer)
        moments.sampled = sampled
        moments.count, moments.before = total, 0
        moments.weight = sum(self.gather(moments.weight))

    def _sampled(self, moments: Union[Moments, ExpertMoments]) -> TokenSample:
        parts = self.gather(moments.sampled.to("cpu"))
        return TokenSample.together(parts).to(moments.sum.device)

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


def _with(
    layer: LayerRecipe, function: Callable[[torch.Tensor], torch.Tensor]
) -> LayerRecipe:
    """The same with a function's results for its tensors."""
    found: dict[str, Any] = {k: function(t) for k, t in layer.tensors().items()}
    return dataclasses.replace(layer, **found)


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _digest(layers: Mapping[str, LayerRecipe]) -> str:
    digest = hashlib.sha256()
    for name, layer in sorted(layers.items()):
        for key, tensor in layer.tensors().items():
            digest.update(f"{name}.{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
            flat = tensor.contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
