# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a call gives when it is made alone, with its compiled graphs or without.

Threads that share a compiled model make Dynamo miss graphs that it has. Past its limit of
recompilations it then runs a pass without a graph, which rounds differently. So a result
under load may be that of any choice of passes with a graph and passes without, but it is
that bit for bit: there is nothing to tolerate.
"""

from typing import Any, Callable, Optional, Sequence

import torch

Inputs = dict[str, torch.Tensor]
#: What each pass through a model gave, and tokens last where there are any.
Results = list[torch.Tensor]
Call = Callable[[Inputs], Results]


def made_alone(
    model: torch.nn.Module, call: Call, inputs: Inputs, eager: Sequence[int] = ()
) -> Results:
    """Make a call while no other runs.

    Args:
        model: whose passes are counted; a part of it is compiled.
        call: of ``model``.
        inputs: of the call.
        eager: numbers of the passes that run without a graph.
    """
    passes = 0

    def choose(*_: Any) -> None:
        nonlocal passes
        torch.compiler.set_stance("force_eager" if passes in eager else "default")
        passes += 1

    hook = model.register_forward_pre_hook(choose)
    try:
        with torch.no_grad():
            return call(inputs)
    finally:
        hook.remove()
        torch.compiler.set_stance("default")


def equal(a: Results, b: Results) -> bool:
    """Whether two results are the same, bit for bit."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


def eager_passes(
    model: torch.nn.Module, call: Call, inputs: Inputs, found: Results
) -> Optional[tuple[int, ...]]:
    """The passes without a graph that explain a result, bit for bit.

    Args:
        model: as in :func:`made_alone`, and so are ``call`` and ``inputs``.
        found: what the call gave under load.

    Returns:
        Their numbers; None where no choice of passes gives ``found``.
    """

    def explain(at: int, eager: tuple[int, ...]) -> Optional[tuple[int, ...]]:
        if at == len(found):
            return eager
        for choice in (eager, (*eager, at)):
            again = made_alone(model, call, inputs, choice)
            if len(again) == len(found) and torch.equal(again[at], found[at]):
                explained = explain(at + 1, choice)
                if explained is not None:
                    return explained
        return None

    return explain(0, ())
