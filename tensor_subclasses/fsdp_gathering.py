# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How FSDP2 gathers the rows of a weight from all ranks, for inference."""

from typing import Any, Optional

import torch

from torchao_masquant.tensor_subclasses.weight_layout import PARTS

__all__ = ["FSDPGathering"]


class FSDPGathering:
    """The hooks that ``fully_shard`` looks for on a MASQuantTensor.

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
        sent = {
            name: part.transpose(0, dim).contiguous()
            for name, part in self.parts().items()
            if (dim := PARTS[name].dim("N")) is not None
        }
        return tuple(sent.values()), tuple(sent)

    def fsdp_post_all_gather(
        self: Any,
        all_gather_outputs: tuple[torch.Tensor, ...],
        metadata: tuple[str, ...],
        param_dtype: torch.dtype,
        *,
        out: Optional[torch.Tensor] = None,
    ) -> Optional[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
        """The whole weight, whose gathered parts are views of what has arrived."""
        if out is not None:
            # The same memory has been filled again.
            return None
        parts = self.parts()
        for name, gathered in zip(metadata, all_gather_outputs):
            dim = PARTS[name].dim("N")
            assert dim is not None
            parts[name] = gathered.transpose(0, dim)
        return self.with_parts(parts), ()
