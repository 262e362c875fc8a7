# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How FSDP2 gathers the rows of a weight from all ranks, for inference."""

from typing import TYPE_CHECKING, Any, Optional

import torch

if TYPE_CHECKING:
    from torchao_masquant.tensor_subclasses.masquant_tensor import MASQuantTensor

__all__ = ["ROWS", "FSDPGathering"]

#: Parts with a value for each output channel, and the dimension that these lie along.
ROWS = {"qdata": 0, "scale": 0, "zero_point": 0, "l2": 1, "modality_bias": 1}


class FSDPGathering:
    """The hooks that ``fully_shard`` looks for on a tensor.

    What is for input channels (smoothing factors, shifts, down-projections) lies whole
    on every rank; integers, scales, up-projections and biases are gathered, packed.
    """

    def fsdp_pre_all_gather(
        self: Any,
        mesh: Any,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: torch.nn.Module,
        mp_policy: Any,
    ) -> tuple[tuple[torch.Tensor, ...], tuple[str, ...]]:
        """What a rank sends, rows first, and the names of these parts."""
        names = tuple(n for n in self.__tensor_flatten__()[0] if n in ROWS)
        sent = (getattr(self, n).transpose(0, ROWS[n]).contiguous() for n in names)
        return tuple(sent), names

    def fsdp_post_all_gather(
        self: Any,
        all_gather_outputs: tuple[torch.Tensor, ...],
        metadata: tuple[str, ...],
        param_dtype: torch.dtype,
        *,
        out: Optional[torch.Tensor] = None,
    ) -> Optional[tuple["MASQuantTensor", tuple[torch.Tensor, ...]]]:
        """The whole weight, whose gathered parts are views of what has arrived."""
        if out is not None:
            # The same memory has been filled again.
            return None
        names, attributes = self.__tensor_flatten__()
        parts = {name: getattr(self, name) for name in names}
        for name, gathered in zip(metadata, all_gather_outputs):
            parts[name] = gathered.transpose(0, ROWS[name])
        whole = type(self).__tensor_unflatten__(parts, attributes, None, None)
        return whole, ()
