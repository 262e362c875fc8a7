# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Experts that show what they read to a calibration."""

import contextlib
from typing import TYPE_CHECKING, Iterator, Mapping, Optional

import torch
from torch import nn

from torchao_masquant.expert_modules import RoutedExperts
from torchao_masquant.kernels.expert_operators import expert_of_rows
from torchao_masquant.models.experts import ExpertWeight
from torchao_masquant.reclassing import become, become_original
from torchao_masquant.routing import Router, UnmatchedTokens

if TYPE_CHECKING:
    from torchao_masquant.calibration.session import CalibrationSession

__all__ = ["MASQuantObservedExperts", "as_observed"]


class MASQuantObservedExperts(RoutedExperts):
    """Experts in high precision that show their inputs to a ``CalibrationSession``.

    The first projection reads each token once, whatever number of experts it goes to.
    The second reads what the first made of it, once for each of them.
    """

    session: "CalibrationSession"
    #: parameter to its name in the model, of those that are observed
    observed: dict[str, str]
    #: rows of each token in the second projection, in the call that runs
    times: int

    @classmethod
    def attach(
        cls,
        experts: nn.Module,
        fqn: str,
        parameter: str,
        session: "CalibrationSession",
    ) -> None:
        """Observe one projection.

        Args:
            experts: of transformers, or observed already.
            fqn: name of the parameter in the model.
            parameter: its name in ``experts``.
            session: to show the inputs to.
        """
        if not isinstance(experts, cls):
            become(experts, cls)
            assert isinstance(experts, cls)
            experts.observed = {}
        experts.fqn = fqn.removesuffix(f".{parameter}")
        experts.router = session.router
        experts.session = session
        experts.observed[parameter] = fqn

    @classmethod
    def detach(cls, experts: nn.Module) -> None:
        """Undo :meth:`attach`."""
        if isinstance(experts, cls):
            become_original(experts)
            for name in ("fqn", "router", "session", "observed", "times"):
                experts.__dict__.pop(name, None)

    @torch.compiler.disable
    def modality_ids(self, hidden_states: torch.Tensor) -> Optional[torch.Tensor]:
        if not self.observed:
            return None
        try:
            return self.session.ids_of(self.fqn, hidden_states)
        except UnmatchedTokens:
            self.session.left_out.update(self.observed.values())
            return None

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        self.times = top_k_index.shape[1]
        return super().forward(hidden_states, top_k_index, top_k_weights)

    def project(
        self,
        name: str,
        x: torch.Tensor,
        ends: torch.Tensor,
        rows: Optional[torch.Tensor],
        modality_ids: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
    ) -> torch.Tensor:
        if name in self.observed:
            read, ids, experts = x, modality_ids, None
            if rows is None:
                # Without those of experts that are elsewhere.
                read = x[: int(ends[-1])]
                ids = None if ids is None else ids[: read.shape[0]]
                experts = expert_of_rows(ends, read.shape[0])
            times = 1 if experts is None else self.times
            self.session.observe_experts(self.observed[name], read, ids, experts, times)
        weight = getattr(self, name)
        if self.is_transposed:
            weight = weight.transpose(1, 2)
        tokens = x if rows is None else x.index_select(0, rows)
        return _grouped_linear(tokens, weight, ends, bias)


@contextlib.contextmanager
def as_observed(experts: Mapping[str, ExpertWeight], router: Router) -> Iterator[None]:
    """Run experts inside as those that are observed run, to the bit; none is observed.

    transformers' own add the same products up in another order.

    Args:
        experts: name in the model to weight, in high precision.
        router: their model's.
    """
    try:
        for name, weight in experts.items():
            module = weight.module
            become(module, MASQuantObservedExperts)
            assert isinstance(module, MASQuantObservedExperts)
            module.fqn = name.removesuffix(f".{weight.parameter}")
            module.router, module.observed = router, {}
        yield
    finally:
        for weight in experts.values():
            MASQuantObservedExperts.detach(weight.module)


@torch.compiler.disable
def _grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    bias: Optional[torch.Tensor],
) -> torch.Tensor:
    """(S, N), rows ``ends[e - 1]`` to ``ends[e]`` by expert e, in any type of weight."""
    y = x.new_zeros(x.shape[0], weight.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            y[start:end] = nn.functional.linear(
                x[start:end], weight[expert], None if bias is None else bias[expert]
            )
        start = end
    return y
