# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Observing the inputs of a model's linears and experts while data runs through it."""

import contextlib
from typing import Iterator, Mapping, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from torchao_masquant.calibration.exact_inputs import ExactInputs
from torchao_masquant.calibration.groups import SharedInputs
from torchao_masquant.calibration.observed_experts import MASQuantObservedExperts
from torchao_masquant.calibration.tower_items import items_of
from torchao_masquant.models.experts import ExpertWeight, Layer, module_of
from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.reclassing import change_class
from torchao_masquant.routing import Router, UnmatchedTokens
from torchao_masquant.statistics.expert_statistics import ExpertStatistics
from torchao_masquant.statistics.input_statistics import InputStatistics

__all__ = ["CalibrationSession", "MASQuantObservedLinear"]


class MASQuantObservedLinear(nn.Linear):
    """``nn.Linear`` that shows its inputs to a :class:`CalibrationSession`.

    Made in place from an ``nn.Linear``, and made one again, by the session.
    """

    fqn: str
    router: Router
    session: "CalibrationSession"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.session.observe(self, input)
        return F.linear(input, self.weight, self.bias)


class CalibrationSession:
    """Statistics of the inputs of a set of linears, one set per shared input.

    Args:
        linears: name in the model to module.
        router: tells the modality of each token of a call.
        second_moments: keep covariances too (8 K^2 bytes for each input and each
            modality).
        experts: name in the model to the weights of a mixture's experts. All experts of
            a layer share the statistics of one input.
        before: tokens of each modality that another process counts, see
            :class:`~torchao_masquant.statistics.input_statistics.Moments`.
        towers: name of each linear that is a tower's to the one modality that it meets.
            Each image and each sound weighs the same there, however many tokens it has.
        exact: of the full-precision stream, where linears are called in both, a sample at
            a time, and statistics are of the quantized one. None: there is one stream.
    """

    def __init__(
        self,
        linears: dict[str, nn.Linear],
        router: Router,
        second_moments: bool,
        experts: Optional[Mapping[str, ExpertWeight]] = None,
        before: Optional[Sequence[int]] = None,
        towers: Optional[Mapping[str, str]] = None,
        exact: Optional[ExactInputs] = None,
    ):
        self.linears = linears
        self.exact = exact
        self.towers = dict(towers or {})
        self.experts = dict(experts or {})
        self.router = router
        self.second_moments = second_moments
        self.before = before
        #: linear to the first linear that reads the same input
        self.leaders: dict[str, str] = {}
        #: leader to the statistics of its input
        self.statistics: dict[str, InputStatistics] = {}
        #: options to what was solved for with them, from all that was observed so far
        self.solutions: list[tuple[SolverOptions, dict[str, LayerRecipe]]] = []
        #: those called with other tokens than their model's, of unknown modality
        self.left_out: set[str] = set()
        #: whether the model's first linears are among these, which see all tokens of a
        #: call unless its ids are wrong; others may all be given a part of them
        self.has_first = True
        #: rows of the calls so far; tokens, where a call's rows are not told apart
        self.sequences = 0
        # Of the call that runs: its ids, whether a linear was called with its tokens,
        # and what was wrong with the first one that was not.
        self._call_ids: Optional[torch.Tensor] = None
        self._matched = False
        self._unmatched: Optional[UnmatchedTokens] = None
        self._inputs = SharedInputs()
        # leader to the first reader of what it read last
        self._reading: dict[str, str] = {}

    @contextlib.contextmanager
    def observing(self, model: nn.Module) -> Iterator[None]:
        """Observe calls of ``model`` inside; it is as it was afterwards, always."""
        with self.router.attached(model), self.watching():
            yield

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Observe the linears inside, whose calls others route."""
        try:
            for name, linear in self.linears.items():
                self.attach_linear(name, linear)
            for name, weight in self.experts.items():
                self.attach_experts(name, weight)
            yield
            self._end_call()
        finally:
            for linear in self.linears.values():
                self.detach_linear(linear)
            for weight in self.experts.values():
                self.detach_experts(weight.module)

    def attach_linear(self, name: str, linear: nn.Linear) -> None:
        """Observe a linear."""
        self.linears[name] = linear
        change_class(linear, MASQuantObservedLinear)
        assert isinstance(linear, MASQuantObservedLinear)
        linear.fqn = name
        linear.router = self.router
        linear.session = self

    @staticmethod
    def detach_linear(linear: nn.Linear) -> None:
        """Make an observed linear an ``nn.Linear`` again."""
        if isinstance(linear, MASQuantObservedLinear):
            change_class(linear, nn.Linear)
            for name in ("fqn", "router", "session"):
                delattr(linear, name)

    def attach_experts(self, name: str, weight: ExpertWeight) -> None:
        """Observe one projection of experts."""
        self.experts[name] = weight
        MASQuantObservedExperts.attach(weight.module, name, weight.parameter, self)

    @staticmethod
    def detach_experts(experts: nn.Module) -> None:
        """Make observed experts the original ones again."""
        MASQuantObservedExperts.detach(experts)

    def modalities_of(self, name: str) -> tuple[str, ...]:
        """Those that a linear, or experts, meet, base first."""
        if name in self.towers:
            return (self.towers[name],)
        return self.router.modalities

    @property
    def layers(self) -> dict[str, Layer]:
        """Linears and experts, by name, but for those that are left out."""
        layers: dict[str, Layer] = {**self.linears, **self.experts}
        return {n: layer for n, layer in layers.items() if n not in self.not_matched}

    @property
    def not_matched(self) -> list[str]:
        """Names of those that are left out, and of what reads the same input."""
        return [
            name
            for name in (*self.linears, *self.experts)
            if self.leaders.get(name, name) in self.left_out
        ]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The weight of each, (N, K) or (E, N, K)."""
        return {name: layer.weight for name, layer in self.layers.items()}

    # Opaque to Dynamo, where a part of the model is compiled.
    @torch.compiler.disable
    # Statistics made in inference mode could not be added to outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def observe(self, linear: MASQuantObservedLinear, x: torch.Tensor) -> None:
        """Add one call's input to the statistics.

        Raises:
            ValueError: the input holds nan or inf, or is of the wrong width; no linear
                matched the modality ids of the call before; or the linear shared its
                input with another one before, and does not any more.
            RuntimeError: the tokens are of unknown modality.
        """
        name = linear.fqn
        if x.shape[-1] != linear.in_features:
            raise ValueError(
                f"{name}: input of shape {tuple(x.shape)} does not match its "
                f"in_features={linear.in_features}."
            )
        if self.exact is not None and self.exact.is_read:
            self.exact.note(name, x)
            return
        reader = self._inputs.leader(name, x)
        leader = self.leaders.setdefault(name, reader)
        if leader != name:
            if reader != self._reading[leader]:
                raise ValueError(
                    f"{name} read the same tensor as {leader} when it was first "
                    "called, and another one later, so that neither one smoothing "
                    f"factor nor two suit them: exclude {name} or {leader}."
                )
            return
        self._reading[name] = reader
        if name in self.towers:
            self._observe_items(name, x)
            return
        self._count_sequences(name, x)
        try:
            ids = self.ids_of(name, x)
        except UnmatchedTokens:
            self.left_out.add(name)
        else:
            self._update(name, x, ids)

    def _observe_items(self, name: str, x: torch.Tensor) -> None:
        """Of a linear of a tower: tokens of images, or of sounds."""
        items = items_of(x, self.towers[name], self.router.call.arguments)
        if name == next(iter(self.leaders)):
            self.sequences += items.count
        self._update(name, x, items.ids, items.weights)

    def ids_of(self, name: str, x: torch.Tensor) -> Optional[torch.Tensor]:
        """Modality ids of what a linear, or experts, are called with.

        A module may be given a part of the tokens: experts of one modality, what is
        left of pruned ones, what they were pooled to. Nobody says which those are. But
        where not even the first linears are called with the call's tokens, it is the
        ids that are wrong.

        Args:
            name: for the messages.
            x: see :meth:`Router.ids_for`.

        Raises:
            UnmatchedTokens: they are other tokens than the call's; or, of an earlier
                call, where no linear was called with its tokens.
        """
        ids = self.router.call.ids
        if ids is not self._call_ids:
            self._end_call()
            self._call_ids = ids
        try:
            found = self.router.ids_for(name, x)
        except UnmatchedTokens as error:
            self._unmatched = self._unmatched or error
            raise
        self._matched = self._matched or ids is not None
        return found

    def _end_call(self) -> None:
        """Raise where no linear was called with the tokens of the last call."""
        unmatched, matched = self._unmatched, self._matched
        self._call_ids, self._unmatched, self._matched = None, None, False
        if self.has_first and unmatched is not None and not matched:
            raise ValueError(str(unmatched))

    @torch.compiler.disable
    @torch.inference_mode(False)
    @torch.no_grad()
    def observe_experts(
        self,
        name: str,
        x: torch.Tensor,
        ids: Optional[torch.Tensor],
        experts: Optional[torch.Tensor] = None,
        times: int = 1,
    ) -> None:
        """Add what one projection of experts reads in one call.

        Args:
            name: of the parameter in the model.
            x: (S, K), each token once, or once for each of its experts.
            ids: (S,) modality ids, negative for padding; None: all base.
            experts: (S,) which expert reads each row, None where all read the same.
            times: rows of each token.

        Raises:
            ValueError: the input holds nan or inf.
        """
        self.leaders[name] = name
        if name in self.left_out:
            return
        self._count_sequences(name, x)
        if experts is None:
            self._update(name, x, ids)
            return
        statistics = self.statistics.get(name)
        if not isinstance(statistics, ExpertStatistics):
            statistics = self.statistics[name] = ExpertStatistics(
                self.experts[name].weight.shape[0],
                x.shape[-1],
                self.router.modalities,
                x.device,
                self.second_moments,
                None if self.before is None else [times * n for n in self.before],
            )
        statistics.update_experts(name, x, ids, experts)

    def _count_sequences(self, name: str, x: torch.Tensor) -> None:
        """Of what the first layer that is observed at all reads."""
        if name == next(iter(self.leaders)):
            ids = self.router.call.ids
            told = x if x.dim() > 2 or ids is None or ids.dim() < 2 else ids
            self.sequences += len(told)

    def _update(
        self,
        name: str,
        x: torch.Tensor,
        ids: Optional[torch.Tensor],
        weights: Optional[torch.Tensor] = None,
    ) -> None:
        self.solutions.clear()
        statistics = self.statistics.get(name)
        if statistics is None:
            statistics = self.statistics[name] = InputStatistics(
                x.shape[-1],
                self.modalities_of(name),
                x.device,
                self.second_moments,
                None if name in self.towers else self.before,
                drifts=self.exact is not None,
            )
        rows = x.reshape(-1, x.shape[-1])
        statistics.update(
            name,
            rows,
            None if ids is None else ids.reshape(-1),
            weights,
            None if self.exact is None else self.exact.of(name, rows),
        )

    def groups(self) -> dict[str, list[str]]:
        """Leader to all that read its input, in the model's order; experts last."""
        groups: dict[str, list[str]] = {}
        for name in self.layers:
            if name in self.leaders:
                groups.setdefault(self.leaders[name], []).append(name)
        return groups

    def check_complete(self) -> None:
        """Raise unless every linear saw tokens of every modality.

        Raises:
            ValueError: names the linear or the modality that the data left out.
        """
        self._end_call()
        if self.layers and not self.leaders:
            raise ValueError("no calibration data ran through the model.")
        unseen = [name for name in self.layers if name not in self.leaders]
        own = [n for n in unseen if "forward" in module_of(self.layers[n]).__dict__]
        if own:
            raise ValueError(
                f"{own[0]} is called through a forward of its instance that does not "
                "call the one of its class: take it off, or exclude the linear."
            )
        if unseen:
            raise ValueError(
                f"{unseen[0]} was never called by the calibration data "
                f"({len(unseen)} of {len(self.layers)} linears were not): exclude it, "
                "or add samples that use it."
            )
        for name, statistics in self.statistics.items():
            if name in self.left_out:
                continue
            for modality, moments in zip(statistics.modalities, statistics.moments):
                if moments.count == 0:
                    raise ValueError(
                        f"the calibration data brings no {modality} token to {name}, so "
                        f"{modality} tokens would be uncalibrated: add samples with "
                        f"{modality}, or name the modalities that the model will meet "
                        f"with modalities=(...)."
                    )
