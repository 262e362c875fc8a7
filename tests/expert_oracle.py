# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What quantized experts must compute, in float64, step by step, and what they did."""

import contextlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Iterator, Optional

import torch
from linear_oracle import expected
from torch import nn

from torchao_masquant.expert_modules import MASQuantExperts


@dataclass
class ExpertCall:
    """One call of one module of experts.

    Attributes:
        x: (T, H) hidden states.
        experts: (T, k) of each token.
        weights: (T, k) of each of them.
        y: (T, H) result.
        read: what each projection was given: (T, K) or (S, K).
        made: what each projection gave, (S, N).
    """

    name: str
    module: MASQuantExperts
    x: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
    y: torch.Tensor = torch.empty(0)
    read: dict[str, torch.Tensor] = field(default_factory=dict)
    made: dict[str, torch.Tensor] = field(default_factory=dict)


def experts_of(model: nn.Module) -> dict[str, MASQuantExperts]:
    return {n: m for n, m in model.named_modules() if isinstance(m, MASQuantExperts)}


@contextlib.contextmanager
def recorded_experts(model: nn.Module) -> Iterator[list[ExpertCall]]:
    """The calls of a model's quantized experts, as they happen."""
    calls: list[ExpertCall] = []
    found = experts_of(model)
    handles: list[Any] = []
    for name, module in found.items():

        def before(module: Any, args: Any, name: str = name) -> None:
            calls.append(ExpertCall(name, module, *(a.detach() for a in args)))

        def after(module: Any, args: Any, y: torch.Tensor) -> None:
            calls[-1].y = y.detach()

        def project(
            name: str,
            x: torch.Tensor,
            *rest: Any,
            original: Any = module.project,
        ) -> torch.Tensor:
            y = original(name, x, *rest)
            calls[-1].read[name], calls[-1].made[name] = x.clone(), y.clone()
            return y

        module.project = project
        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        for module in found.values():
            del module.project


def row_order(experts: torch.Tensor) -> list[int]:
    """Places of (T, k) choices, read row by row, in the order of their experts."""
    flat = experts.reshape(-1).tolist()
    return sorted(range(len(flat)), key=flat.__getitem__)


def check_projection(
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    x: torch.Tensor,
    ids: torch.Tensor,
    experts: torch.Tensor,
    y: torch.Tensor,
) -> None:
    """Hold rows of a projection to float64, each by itself.

    Args:
        weight: (E, N, K) quantized.
        bias: (E, N) or None.
        x: (S, K), what each row is the product of.
        ids: (S,).
        experts: (S,).
        y: (S, N) found.
    """
    for e in experts.unique().tolist():
        if e >= weight.shape[0]:
            # Of an expert that is held elsewhere.
            assert not y[experts == e].any()
            continue
        linear = SimpleNamespace(
            weight=SimpleNamespace(data=weight[e]),
            bias=None if bias is None else bias[e],
        )
        rows = experts == e
        wanted, bound = expected(linear, x[rows], ids[rows])
        wrong = ((y[rows].double() - wanted).abs() > bound).any(-1)
        assert not wrong.any(), (e, ids[rows], wrong)


def check_experts(call: ExpertCall, ids: torch.Tensor) -> None:
    """Hold a call to what its tokens' modalities and experts ask for.

    Args:
        ids: (T,) of any shape.
    """
    module = call.module
    ids = ids.reshape(-1)
    order = torch.tensor(row_order(call.experts), dtype=torch.int64)
    tokens = order // call.experts.shape[1]
    experts = call.experts.reshape(-1)[order]
    up, down = call.read
    gated = call.read[down]
    for name, x in ((up, call.x[tokens]), (down, gated)):
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        weight = getattr(module, name).data
        met = ids[tokens] if weight.is_routed else torch.zeros_like(tokens)
        check_projection(weight, bias, x, met, experts, call.made[name])
    torch.testing.assert_close(call.read[up], call.x, rtol=0, atol=0)
    if module.has_gate:
        torch.testing.assert_close(gated, module._apply_gate(call.made[up]))
    last = call.made[down]
    if getattr(module, "has_post_expert_norm", False):
        last = module.post_expert_norm(last)
    share = call.weights.reshape(-1)[order].double()[:, None]
    total = torch.zeros(call.x.shape, dtype=torch.float64)
    total.index_add_(0, tokens, last.double() * share)
    torch.testing.assert_close(call.y.double(), total, rtol=1e-5, atol=1e-5)
