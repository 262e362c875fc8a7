# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The linear layer that a quantized model has in place of ``nn.Linear``."""

from typing import Optional

import torch
from torch import nn

from torchao_masquant.routing import Router
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["MASQuantLinear"]


class MASQuantLinear(nn.Linear):
    """``nn.Linear`` whose weight is a :class:`MASQuantTensor`.

    Made in place from an ``nn.Linear``, so names, state_dict keys and ``isinstance``
    checks stay. Its result is that of ``torch.ops.masquant.linear`` with the modality
    ids that its model's router has for the call.
    """

    #: name in the model, for messages
    fqn: str
    #: None where the weight treats all modalities alike
    router: Optional[Router]

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        weight: MASQuantTensor,
        fqn: str,
        router: Optional[Router],
    ) -> "MASQuantLinear":
        """Turn a linear into a quantized one, in place.

        Args:
            linear: (N, K) linear; its bias stays as it is.
            weight: (N, K) quantized weight.
            fqn: name of ``linear`` in its model.
            router: its model's; needed where ``weight.is_routed``.

        Returns:
            ``linear`` itself, of this class.

        Raises:
            ValueError: a routed weight without a router, or of another shape.
        """
        if weight.shape != linear.weight.shape:
            raise ValueError(
                f"{fqn}: a quantized weight of shape {tuple(weight.shape)} cannot "
                f"replace one of shape {tuple(linear.weight.shape)}."
            )
        if weight.is_routed and router is None:
            raise ValueError(
                f"{fqn}: a weight with modalities {weight.modalities} needs a router."
            )
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.__class__ = cls
        assert isinstance(linear, MASQuantLinear)
        linear.fqn = fqn
        linear.router = router if weight.is_routed else None
        return linear

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        ids = None if self.router is None else self.router.ids_for(self.fqn, input)
        return torch.ops.masquant.linear(input, self.weight, ids, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weight={self.weight.data!r}"
        )
