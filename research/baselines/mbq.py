# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""MBQ's sensitivity of each modality, for each input of linears by itself."""

from typing import Any, Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from torchao_masquant import modality_sensitivity
from torchao_masquant.routing import Router
from torchao_masquant.selection import select_linears

__all__ = ["input_sensitivity"]


def input_sensitivity(
    model: nn.Module,
    samples: Iterable[Mapping[str, Any]],
    groups: Mapping[str, Sequence[str]],
) -> dict[str, list[float]]:
    """Mean absolute gradient at the outputs of linears that share an input.

    MBQ (arXiv 2412.19509) weighs the error of each layer by that layer's own gradients;
    ``modality_sensitivity`` gives one number for the whole model. The last block's tokens
    of image and sound reach the loss by other ways than the first's, so they differ.
    The loss, and what is left out, are those of ``modality_sensitivity``.

    Args:
        model: a transformers model; left as it was.
        samples: as for ``calibrate``.
        groups: leader to the names of all linears that share its input.

    Returns:
        Leader to sensitivity of each modality, base first, their mean one.

    Raises:
        ValueError: the loss depends on no token of an input.
    """
    linears = select_linears(model)
    leaders = {name: leader for leader, names in groups.items() for name in names}
    router = Router.for_model(model)
    router.skip_padding = True
    shape = len(router.modalities)
    sums = {leader: torch.zeros(2, shape, dtype=torch.float64) for leader in groups}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            ids = router.ids_for(name, args[0])
            if ids is None:
                ids = torch.zeros(output.shape[:-1], dtype=torch.int64)

            def add(grad: torch.Tensor) -> None:
                size = grad.detach().abs().double()
                for index in range(shape):
                    own = size[ids == index]
                    sums[leaders[name]][0, index] += own.sum()
                    sums[leaders[name]][1, index] += own.numel()

            if output.requires_grad:
                output.register_hook(add)

        return hook

    handles = [linears[name].register_forward_hook(watch(name)) for name in leaders]
    router.attach(model)
    try:
        # Its call of the model, its loss and its backward are what the hooks see.
        modality_sensitivity(model, samples, progress=False)
    finally:
        router.detach(model)
        for handle in handles:
            handle.remove()
    found = {}
    for leader, (total, count) in sums.items():
        means = total / count.clamp_min(1)
        if not means.sum() > 0:
            raise ValueError(f"{leader}: the loss depends on none of its tokens.")
        found[leader] = (means / means.mean()).tolist()
    return found
