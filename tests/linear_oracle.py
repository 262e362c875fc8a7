# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What each quantized linear of a model must compute, in float64, and what it did.

The modality ids that a linear saw can't be read off: they are checked by computing
its output again with the ids that a test says it should have used.
"""

import contextlib
import re
from typing import Any, Iterator, NamedTuple, Optional, Sequence

import numpy as np
import torch
from operator_oracle import linear_f64
from torch import nn

from torchao_masquant import MASQuantLinear


class LinearCall(NamedTuple):
    """One call of one quantized linear."""

    name: str
    linear: MASQuantLinear
    x: torch.Tensor
    y: torch.Tensor


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[list[LinearCall]]:
    """The calls of a model's quantized linears, as they happen."""
    calls: list[LinearCall] = []
    handles = [
        module.register_forward_hook(
            lambda module, args, y, name=name: calls.append(
                LinearCall(name, module, args[0].detach(), y.detach())
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, MASQuantLinear)
    ]
    assert handles
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def linears_of(model: nn.Module) -> dict[str, MASQuantLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, MASQuantLinear)}


def expected(
    linear: MASQuantLinear, x: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear's output in float64 and how far a float32 result may be from it.

    Args:
        x: (T, K).
        ids: (T,).

    Returns:
        (T, N) output and (T, N) bound of its error. Values that float32 can't tell from
        a rounding boundary may be rounded either way.
    """
    found = linear_f64(linear.weight.data, x, ids, linear.bias)
    y = torch.from_numpy(found.value)
    sums = torch.from_numpy(np.minimum(found.relative, 1e-5) * found.size)
    return y, torch.from_numpy(found.moved) + sums + 1e-5 * y.abs() + 1e-6


def misrouted(call: LinearCall, ids: torch.Tensor) -> torch.Tensor:
    """(T,) whether a token's output is not what its modality asks for."""
    x = call.x.reshape(-1, call.x.shape[-1])
    y = call.y.reshape(-1, call.linear.out_features).double()
    reference, bound = expected(call.linear, x, ids.reshape(-1))
    return ((y - reference).abs() > bound).any(-1)


def assert_routed(
    calls: Sequence[LinearCall], ids: torch.Tensor, linears: Optional[int] = None
) -> None:
    """Every recorded call used these ids, and no linear was left out."""
    assert calls
    if linears is not None:
        assert len(calls) == linears, f"{len(calls)} calls, not {linears}"
    for call in calls:
        assert call.x.shape[:-1].numel() == ids.numel(), (call.name, call.x.shape)
        wrong = misrouted(call, ids)
        assert not wrong.any(), (
            f"{call.name}: tokens {wrong.nonzero().flatten().tolist()} of ids "
            f"{ids.reshape(-1).tolist()}"
        )


def ids_by_hand(
    modalities: Sequence[str],
    tokens: dict[int, str],
    input_ids: torch.Tensor,
    attention_mask: Optional[torch.Tensor] = None,
    padding: int = 0,
) -> torch.Tensor:
    """Modality ids by a plain loop. ``tokens``: placeholder token to modality."""
    rows = []
    for b, row in enumerate(input_ids.tolist()):
        rows.append([])
        for t, token in enumerate(row):
            if attention_mask is not None and int(attention_mask[b][t]) == 0:
                rows[-1].append(padding)
            else:
                rows[-1].append(list(modalities).index(tokens.get(token, "text")))
    return torch.tensor(rows, dtype=torch.int64).reshape(input_ids.shape)


def literal(text: Any) -> str:
    """A pattern for ``pytest.raises(match=...)`` that matches a text as it stands."""
    return re.escape(str(text))
