# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Products of the vendor's libraries, for the shapes where ours don't win.

A fixed kernel of ours loses to cuBLAS somewhere. Tuning measures these beside the
tilings, and where one is faster the table says so and the operators take it:

- ``int_mm``, of ``int_linear``: ``torch._int_mm`` multiplies, and the scales, the pair
  and the biases follow, which Inductor makes one kernel of;
- ``dense``, of ``weight_only_linear``: the weight is dequantized, at each call, to x's
  16 bits and multiplied there. Long prompts are bound by the products, which a
  weight-only linear makes no fewer of than a dense one.

Both are made of PyTorch's operators and run on any device. Neither keeps anything: a
dequantized weight that stayed would take the memory that quantizing it has saved.
"""

from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch

from torchao_masquant.kernels import reference
from torchao_masquant.kernels.gpu.low_rank_down import low_rank_down
from torchao_masquant.kernels.gpu.tuning import (
    LibraryProduct,
    linear_name,
    measured,
    tuning_key,
)
from torchao_masquant.kernels.hadamard import hadamard_rotate
from torchao_masquant.kernels.int4_packing import unpack_int4

__all__ = ["LIBRARY_PRODUCTS", "Product", "dense", "int_mm", "library_product"]


def int_mm(
    qx: torch.Tensor,
    x_scale: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    low_rank_hidden: Optional[torch.Tensor],
    l2: Optional[torch.Tensor],
    modality_bias: Optional[torch.Tensor],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    weight_bits: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``int_linear`` of weights with one scale a channel; the integers are exact.

    All else is as in :func:`torchao_masquant.kernels.gpu.int_linear.int_linear`.
    """
    if weight_bits <= 4:
        qdata = unpack_int4(qdata, qx.shape[1])
    y = torch._int_mm(qx.contiguous(), qdata.t()).float() * scale.t() * x_scale
    if low_rank_hidden is not None:
        assert l2 is not None
        # What the result shows of it: 16 bits of each where it has no more.
        pair = torch.float32 if out_dtype == torch.float32 else out_dtype
        y = y + (low_rank_hidden.to(pair) @ l2.to(pair)).float()
    return reference.add_biases(y, modality_bias, modality_ids, bias).to(out_dtype)


def _takes_int_mm(*args: Any) -> bool:
    """cuBLAS takes more than 16 rows, and multiples of 8 of the others."""
    qx, scale = args[0], args[3]
    sizes = (qx.shape[1] % 8, scale.shape[0] % 8)
    return scale.shape[1] == 1 and qx.shape[0] > 16 and not any(sizes)


def dense(
    x: torch.Tensor,
    act_pre_scale: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    zero_point: Optional[torch.Tensor],
    l1: Optional[torch.Tensor],
    l2: Optional[torch.Tensor],
    modality_bias: Optional[torch.Tensor],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    ranks: Sequence[int],
    weight_bits: int,
    out_dtype: torch.dtype,
    low_rank_scale: Optional[torch.Tensor] = None,
    hadamard_size: int = 1,
) -> torch.Tensor:
    """``weight_only_linear`` with weights rounded to the type of x.

    All else is as in
    :func:`torchao_masquant.kernels.gpu.weight_only_linear.weight_only_linear`.
    """
    in_features, groups = x.shape[1], scale.shape[1]
    if weight_bits <= 4:
        qdata = unpack_int4(qdata, in_features)
    levels = qdata.float().unflatten(1, (groups, in_features // groups))
    if zero_point is not None:
        levels = levels - zero_point.float()[..., None]
    weight = (levels * scale[..., None]).flatten(1).to(x.dtype)
    factors = act_pre_scale[:1]
    if modality_ids is not None:
        factors = act_pre_scale.index_select(0, modality_ids.long())
    smoothed = hadamard_rotate(x.float() * factors, hadamard_size).to(x.dtype)
    y = (smoothed @ weight.t()).float()
    if l1 is not None and modality_ids is not None:
        assert l2 is not None
        one = torch.ones((1, 1), device=x.device).expand(x.shape[0], 1)
        down = l1.to(x.dtype) if l1.dtype == torch.int8 else l1
        hidden = low_rank_down(smoothed, one, down, modality_ids, ranks, low_rank_scale)
        y = y + (hidden.to(x.dtype) @ l2.to(x.dtype)).float()
    return reference.add_biases(y, modality_bias, modality_ids, bias).to(out_dtype)


def _takes_dense(*args: Any) -> bool:
    """A float32 weight would be rounded to 24 bits of products that have no fewer."""
    x = args[0]
    return x.dtype in (torch.float16, torch.bfloat16)


class Product(NamedTuple):
    """
    Attributes:
        operator: that it computes.
        run: in place of our kernel, with the same arguments.
        takes: whether it can, for these arguments.
        weight_bits_at: which of the arguments these are.
    """

    operator: str
    run: Callable[..., torch.Tensor]
    takes: Callable[..., bool]
    weight_bits_at: int

    def entry(self, args: Sequence[Any]) -> tuple[str, str]:
        """The name in the tables, and the key, of a call."""
        x, scale = args[0], args[3]
        name = linear_name(
            self.operator, args[self.weight_bits_at], grouped=scale.shape[1] > 1
        )
        return name, tuning_key(x.shape[0], scale.shape[0], x.shape[1])


LIBRARY_PRODUCTS: dict[str, Product] = {
    "int_mm": Product("int_linear", int_mm, _takes_int_mm, 9),
    "dense": Product("weight_only_linear", dense, _takes_dense, 11),
}


def library_product(operator: str, args: Sequence[Any]) -> Optional[Product]:
    """What the tables say is faster than our kernels for a call; None for nothing."""
    for label, product in LIBRARY_PRODUCTS.items():
        if product.operator == operator:
            found = measured(*product.entry(args), args[0].device)
            if found == LibraryProduct(label) and product.takes(*args):
                return product
    return None
