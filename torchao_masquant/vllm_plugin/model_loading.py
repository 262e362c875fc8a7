# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What happens before, while and in case a model of vLLM's does not load a checkpoint."""

from functools import wraps
from typing import Any, Iterable, Optional

import torch
from torch import nn

from torchao_masquant.outputs import QUANT_METHOD
from torchao_masquant.vllm_plugin.expert_loading import ExpertLoading, hand_over

__all__ = ["watch_loading"]


def watch_loading(model_class: type[nn.Module]) -> None:
    """Let the models of a class load what is quantized, or say what they can't.

    All that is quantized must have been claimed by a layer before files are read; experts
    are handed over; and what a loader of the model's own looks up in vain is told of.

    Args:
        model_class: of vLLM.
    """
    load = model_class.load_weights  # type: ignore[attr-defined]
    if getattr(load, "_hands_experts_over", False):
        return

    @wraps(load)
    def load_weights(
        self: nn.Module,
        weights: Iterable[tuple[str, torch.Tensor]],
        *args: Any,
        **others: Any,
    ) -> Any:
        config = _config_of(self)
        if config is None:
            return load(self, weights, *args, **others)
        config.check_claimed()
        found = (getattr(m, "masquant_loading", None) for m in self.modules())
        experts = [one for one in found if isinstance(one, ExpertLoading)]
        try:
            return load(self, hand_over(weights, experts), *args, **others)
        except KeyError as error:
            raise ValueError(
                f"vLLM's {type(self).__name__} loads weights by code of its own, which has "
                f"no place for {error} of the checkpoint: it is of another architecture, "
                "or quantized where vLLM can't: exclude it when you calibrate."
            ) from error

    load_weights._hands_experts_over = True  # type: ignore[attr-defined]
    model_class.load_weights = load_weights  # type: ignore[attr-defined]


def _config_of(model: nn.Module) -> Optional[Any]:
    """That by which layers of a model are quantized; None: it is not quantized by us."""
    for module in model.modules():
        config = getattr(getattr(module, "quant_method", None), "config", None)
        get_name = getattr(config, "get_name", None)
        if get_name is not None and get_name() == QUANT_METHOD:
            return config
    return None
