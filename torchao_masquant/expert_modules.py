# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The experts that a quantized model has in place of transformers' own."""

from typing import Any, Callable, Mapping, Optional

import torch
from torch import nn

from torchao_masquant.linear import weight_mismatch
from torchao_masquant.models.experts import projections
from torchao_masquant.reclassing import Reclassed, become
from torchao_masquant.routing import Router
from torchao_masquant.tensor_subclasses import MASQuantTensor
from torchao_masquant.tensor_subclasses.copying import adopt_rotation

__all__ = ["MASQuantExperts", "Projection", "RoutedExperts", "through_experts"]


#: A projection by all experts: of (T, K), where each expert's rows end, of which token each
#: row is (None: of itself) and modality ids; see ``masquant::expert_linear``.
Projection = Callable[
    [torch.Tensor, torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]],
    torch.Tensor,
]


def through_experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    modality_ids: Optional[torch.Tensor],
    count: int,
    up: Projection,
    gate: Callable[[torch.Tensor], torch.Tensor],
    down: Projection,
    norm: Optional[Callable[[torch.Tensor], torch.Tensor]] = None,
) -> torch.Tensor:
    """Weighted sum over the experts of each token; tokens are sorted by expert.

    Args:
        hidden_states: (T, H).
        top_k_index: (T, k) integers, the experts of each token; ``count`` or more for one
            that is held elsewhere.
        top_k_weights: (T, k) floating point.
        modality_ids: (T,) integers, or None: all base.
        count: of experts.
        up: the first projection.
        gate: what lies between the two.
        down: the second.
        norm: of each expert's output; None: there is none.

    Returns:
        (T, H).
    """
    tokens, top_k = top_k_index.shape
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    rows = order // top_k
    numbers = torch.arange(count, device=experts.device, dtype=experts.dtype)
    ends = torch.searchsorted(experts, numbers, right=True)
    y = gate(up(hidden_states, ends, rows, modality_ids))
    row_ids = None if modality_ids is None else modality_ids.index_select(0, rows)
    y = down(y, ends, None, row_ids)
    if norm is not None:
        y = norm(y)
    y = y * top_k_weights.reshape(-1).index_select(0, order)[:, None]
    y = torch.zeros_like(y).index_copy(0, order, y)
    return y.unflatten(0, (tokens, top_k)).sum(1).to(hidden_states.dtype)


class RoutedExperts(Reclassed):
    """Experts of transformers, with the two matrix products left to a subclass.

    Made in place, of a class that is the module's own, too: its activation, gate and
    norms stay. Tokens are sorted by expert, as for transformers'
    ``grouped_mm``; a model's ``experts_implementation`` has no say in it.
    """

    #: name in the model, for messages
    fqn: str
    #: its model's
    router: Optional[Router]
    # What the original class has.
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    post_expert_norm: Callable[[torch.Tensor], torch.Tensor]

    def modality_ids(self, hidden_states: torch.Tensor) -> Optional[torch.Tensor]:
        """(T,) of tokens (T, H), or None: all base."""
        assert self.router is not None
        return self.router.ids_for(self.fqn, hidden_states)

    def project(
        self,
        name: str,
        x: torch.Tensor,
        ends: torch.Tensor,
        rows: Optional[torch.Tensor],
        modality_ids: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
    ) -> torch.Tensor:
        """One of the projections; see ``masquant::expert_linear`` for the arguments."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Weighted sum over the experts of each token.

        Args:
            hidden_states: (T, H).
            top_k_index: (T, k) integers, the experts of each token; E or more for one
                that is held elsewhere.
            top_k_weights: (T, k) floating point.

        Returns:
            (T, H).
        """
        names = projections(self)
        assert names is not None
        up, down = names

        def project(name: str) -> Projection:
            bias = getattr(self, f"{name}_bias") if self.has_bias else None
            return lambda x, ends, rows, ids: self.project(
                name, x, ends, rows, ids, bias
            )

        has_norm = getattr(self, "has_post_expert_norm", False)
        return through_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.modality_ids(hidden_states),
            getattr(self, down).shape[0],
            project(up),
            self._apply_gate if self.has_gate else self.act_fn,
            project(down),
            self.post_expert_norm if has_norm else None,
        )


class MASQuantExperts(RoutedExperts):
    """Experts whose two parameters are each a :class:`MASQuantTensor` (E, N, K).

    A token is smoothed and quantized once for all of its experts, for the modality that
    its model's router has for it; names and state_dict keys are those of the original.
    """

    #: whether the weights treat modalities differently, so that the router is asked
    routed: bool

    @classmethod
    def from_float(
        cls,
        experts: nn.Module,
        weights: Mapping[str, MASQuantTensor],
        fqn: str,
        router: Optional[Router],
    ) -> "MASQuantExperts":
        """Turn experts into quantized ones, in place.

        Args:
            experts: of a layout that :func:`~torchao_masquant.models.experts.projections`
                knows; their biases stay as they are.
            weights: name of each of its projections to the quantized weight (E, N, K),
                whichever way round the original is.
            fqn: name of ``experts`` in their model.
            router: their model's; needed where a weight is routed.

        Returns:
            ``experts`` itself, of a class that is this one, too.

        Raises:
            ValueError: a projection is left out, weights are for other modalities than
                each other, or a routed weight has no router.
        """
        names = projections(experts)
        if names is None or set(weights) != set(names):
            raise ValueError(
                f"{fqn}: experts are quantized as a whole, their {names}; got weights "
                f"for {tuple(weights)}."
            )
        modalities = {weight.modalities for weight in weights.values()}
        if len(modalities) > 1:
            raise ValueError(
                f"{fqn}: the weights of experts are for the same modalities, got "
                f"{sorted(modalities)}."
            )
        routed = any(weight.is_routed for weight in weights.values())
        if routed and router is None:
            raise ValueError(f"{fqn}: weights with several modalities need a router.")
        become(experts, cls)
        assert isinstance(experts, cls)
        for name, weight in weights.items():
            setattr(experts, name, nn.Parameter(weight, requires_grad=False))
        experts.fqn = fqn
        experts.router = router
        experts.routed = routed
        return experts

    def modality_ids(self, hidden_states: torch.Tensor) -> Optional[torch.Tensor]:
        return super().modality_ids(hidden_states) if self.routed else None

    def project(
        self,
        name: str,
        x: torch.Tensor,
        ends: torch.Tensor,
        rows: Optional[torch.Tensor],
        modality_ids: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
    ) -> torch.Tensor:
        return torch.ops.masquant.expert_linear(
            x, getattr(self, name), ends, rows, modality_ids, bias
        )

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuse weights whose modality ids would mean something else here."""
        names = projections(self)
        assert names is not None
        for name in names:
            weight = state_dict.get(f"{prefix}{name}")
            problem = weight_mismatch(f"{self.fqn}.{name}", weight, self.router)
            if problem is not None:
                error_msgs.append(problem)
                return
        for name in names:
            adopt_rotation(getattr(self, name), state_dict.get(f"{prefix}{name}"))
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        self.routed = any(getattr(self, name).is_routed for name in names)

    def extra_repr(self) -> str:
        names = projections(self)
        assert names is not None
        return ", ".join(f"{name}={getattr(self, name).data!r}" for name in names)
