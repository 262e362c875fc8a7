# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A quantized linear whose weight is a DTensor.

Every rank runs the operator on what it has, and the result is given the placement that
this makes of it:

- rows (output channels) sharded: the input is whole, the output is sharded. Each output
  is computed as it would be in one process;
- columns (input channels) sharded: the input is sharded, the output is a sum to be.
  Each rank rounds its part of a token with a scale of its own, which is finer than the
  scale of the whole. Down-projections are sharded with their columns. The modality bias
  lies with the rank that holds column 0 (see ``MASQuantTensor``'s slices), and the
  linear's bias is added there, so each comes once.

DTensor's own way, a sharding strategy of the operator, would ask the operator for its
output with the weight's whole shape on a plain tensor, which no quantized weight is.
"""

from typing import Optional, Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

__all__ = ["sharded_linear"]


def sharded_linear(
    x: torch.Tensor,
    weight: DTensor,
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    smoothed_by: Optional[torch.Tensor] = None,
) -> DTensor:
    """``torch.ops.masquant.linear`` of a distributed weight.

    Args:
        x: (..., K) DTensor, brought to the placement that the weight's asks for; a
            plain tensor is whole on every rank.
        weight: (N, K), of :class:`MASQuantTensor` on each rank.
        modality_ids: ``x.shape[:-1]``, whole on every rank; None: all base.
        bias: (N,) DTensor, or whole on every rank.
        smoothed_by: see :mod:`torchao_masquant.kernels.library`; made use of where it
            is placed as the weight is.

    Returns:
        (..., N) DTensor on the weight's mesh: sharded in its last dimension where the
        weight's rows are, partial where its columns are.

    Raises:
        ValueError: the weight is sharded unevenly, or placed in another way.
    """
    mesh = weight.device_mesh
    inputs: list[Placement] = []
    biases: list[Placement] = []
    outputs: list[Placement] = []
    adds_bias = bias is not None
    for i, placement in enumerate(weight.placements):
        if not (
            isinstance(placement, Replicate)
            or (isinstance(placement, Shard) and placement.dim in (0, 1))
        ):
            raise ValueError(
                "a quantized weight is sharded by rows, Shard(0), by columns, Shard(1), "
                f"or replicated, got {placement}."
            )
        last = Shard(x.dim() - 1)
        if isinstance(placement, Replicate):
            inputs.append(Replicate())
            biases.append(Replicate())
            outputs.append(Replicate())
            continue
        if weight.shape[placement.dim] % mesh.size(i):
            raise ValueError(
                f"a quantized weight of shape {tuple(weight.shape)} can't be sharded "
                f"over {mesh.size(i)} ranks along dimension {placement.dim}: take a "
                f"number of ranks that divides {weight.shape[placement.dim]}, or keep "
                "the weight whole on each."
            )
        if placement.dim == 0:
            inputs.append(Replicate())
            biases.append(Shard(0))
            outputs.append(last)
        else:
            inputs.append(last)
            biases.append(Replicate())
            outputs.append(Partial())
            adds_bias = adds_bias and mesh.get_local_rank(i) == 0
    shared = None
    if isinstance(smoothed_by, DTensor) and smoothed_by.placements == weight.placements:
        shared = smoothed_by.to_local()
    y = torch.ops.masquant.linear(
        _local(x, mesh, inputs),
        weight.to_local(),
        modality_ids,
        _local(bias, mesh, biases) if bias is not None and adds_bias else None,
        shared,
    )
    return DTensor.from_local(y, mesh, outputs, run_check=False)


def _local(
    t: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]
) -> torch.Tensor:
    if not isinstance(t, DTensor):
        t = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return t.redistribute(mesh, placements).to_local()
