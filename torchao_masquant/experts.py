# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Expert weights of mixture-of-experts models, which are not quantized."""

import logging
import weakref

from torch import nn

__all__ = ["expert_weights", "warn_of_expert_weights"]

_LOGGER = logging.getLogger(__name__)

# What modules that hold the weights of all of a layer's experts call their number.
_NUMBERS = ("num_experts", "num_local_experts")

_WARNED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def expert_weights(decoder: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of experts that are held in one tensor for all of a layer's experts.

    Returns:
        Name in ``decoder`` to the parameter [experts, N, K] or [experts, K, N].
    """
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, module in decoder.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
        and parameter.shape[0] in [getattr(module, n, None) for n in _NUMBERS]
    }


def warn_of_expert_weights(decoder: nn.Module) -> None:
    """Say, once for a model, how many bytes its expert weights keep."""
    experts = expert_weights(decoder)
    if not experts or decoder in _WARNED:
        return
    _WARNED.add(decoder)
    held = sum(p.nbytes for p in experts.values())
    everything = sum(p.nbytes for p in decoder.parameters())
    _LOGGER.warning(
        "the weights of the experts stay in high precision, %.1f %% of the decoder's "
        "bytes: only nn.Linear modules are quantized, and %s and %d others hold all "
        "experts of a layer in one tensor.",
        100 * held / everything,
        next(iter(experts)),
        len(experts) - 1,
    )
