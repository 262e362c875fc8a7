# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Who is told of a model before it is quantized: integrations, by code that knows none."""

from typing import Any, Callable, Collection, Mapping, Optional

from torch import nn

from torchao_masquant.options import SolverOptions

__all__ = ["Listener", "listen", "tell"]

#: Called with a model, the modules that will be quantized, the options that they were
#: solved with (None where those are not known), and what is known of the calibration.
Listener = Callable[
    [
        nn.Module,
        Collection[nn.Module],
        Optional[SolverOptions],
        Optional[Mapping[str, Any]],
    ],
    None,
]

_LISTENERS: list[Listener] = []


def listen(listener: Listener) -> None:
    """Tell a listener from now on; once, however often it is given."""
    if listener not in _LISTENERS:
        _LISTENERS.append(listener)


def tell(
    model: nn.Module,
    modules: Collection[nn.Module] = (),
    options: Optional[SolverOptions] = None,
    description: Optional[Mapping[str, Any]] = None,
) -> None:
    """Tell all listeners of a model; see :data:`Listener`."""
    for listener in _LISTENERS:
        listener(model, modules, options, description)
