# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The linear layer that a quantized model has in place of ``nn.Linear``."""

from collections import defaultdict
from typing import Any, Callable, Mapping, Optional, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torchao_masquant.kernels import shared_prologue
from torchao_masquant.reclassing import change_class
from torchao_masquant.routing import Router
from torchao_masquant.tensor_subclasses import MASQuantTensor
from torchao_masquant.tensor_subclasses.copying import adopt_rotation
from torchao_masquant.tensor_subclasses.sharded_linear import sharded_linear

__all__ = [
    "MASQuantLinear",
    "SmoothingSiblings",
    "quantized_forward",
    "share_smoothing",
    "weight_mismatch",
]


class SmoothingSiblings:
    """Linears that may read one input: those side by side, of one input width.

    q/k/v, and gate and up, read one tensor and have one smoothing factor. Where a graph
    is made of their calls, each is told so by ``smoothed_by``, and the graph quantizes
    their input once; or smooths it once, where it stays in 16 bits and a kernel of its
    own does. Told by mistake it is still right: for a linear beside them that has an
    equal smoothing factor and another input, nothing is merged.

    Args:
        linears: quantized ones, in the order of their calls as far as that is known.
    """

    def __init__(self, linears: "Sequence[MASQuantLinear]"):
        self.linears = tuple(linears)
        for linear in self.linears:
            linear.siblings = self
        self.update()

    def update(self) -> None:
        """Find out again which of them smooth alike, after a weight has changed."""
        for i, linear in enumerate(self.linears):
            linear.smoothed_by = next(
                ((a,) for a in self.linears[:i] if _smooth_alike(a, linear)), None
            )


def _smooth_alike(a: "MASQuantLinear", b: "MASQuantLinear") -> bool:
    ours, theirs = a.weight, b.weight
    # Another library may have put its own kind of tensor around a weight.
    if not (isinstance(ours, MASQuantTensor) and isinstance(theirs, MASQuantTensor)):
        return False
    if ours.device.type == "meta" or ours.device != theirs.device:
        return False
    # Placeholders smooth alike until copy_ fills them, which tells nobody.
    # No scale that was solved for has a byte of zeros in each of its values.
    if not (
        ours.scale.view(torch.uint8).any() and theirs.scale.view(torch.uint8).any()
    ):
        return False
    return ours.smooths_like(theirs)


def quantized_forward(
    linear: nn.Linear, weight: MASQuantTensor, ids: Optional[torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for a linear that computes what it will with a quantized weight.

    Args:
        linear: in high precision.
        weight: of it, quantized.
        ids: modality ids of the tokens that it will be called with, negative for
            padding; None: all base.
    """

    def forward(input: torch.Tensor) -> torch.Tensor:
        rows = None if ids is None else ids.reshape(input.shape[:-1]).clamp_min(0)
        return torch.ops.masquant.linear(input, weight, rows, linear.bias)

    return forward


def weight_mismatch(name: str, weight: Any, router: Optional[Router]) -> Optional[str]:
    """Why a checkpoint's weight is not one for a quantized module; None where it is.

    Args:
        name: of the module, for the message.
        weight: from a state_dict, None where it has none.
        router: the module's.
    """
    if isinstance(weight, torch.Tensor) and not isinstance(weight, MASQuantTensor):
        return (
            f"{name} is quantized, the checkpoint's weight is not: load it into the "
            "original model."
        )
    if isinstance(weight, MASQuantTensor) and weight.is_routed:
        ours = router.modalities if router is not None else ()
        if weight.modalities != ours:
            return (
                f"{name}: the checkpoint was quantized for the modalities "
                f"{weight.modalities}, this model for {ours}: give "
                "step='prepare_for_loading' the checkpoint's base_modality and "
                "modalities."
            )
    return None


class MASQuantLinear(nn.Linear):
    """``nn.Linear`` whose weight is a :class:`MASQuantTensor`.

    Made in place from an ``nn.Linear``, so names, state_dict keys and ``isinstance``
    checks stay. Its result is that of ``torch.ops.masquant.linear`` with the modality
    ids that its model's router has for the call.
    """

    weight: MASQuantTensor
    #: name in the model, for messages
    fqn: str
    #: its model's
    router: Optional[Router]
    #: whether the weight treats modalities differently, so that the router is asked
    routed: bool
    #: the linear whose smoothing factors are read in place of equal ones of its own, by
    #: itself in a tuple so that it is no submodule
    smoothed_by: "Optional[tuple[MASQuantLinear]]"
    #: those it may share its smoothing with
    siblings: Optional[SmoothingSiblings]

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
            router: its model's; needed where ``weight.is_routed``. A linear that meets
                other modalities than the model keeps none.

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
        change_class(linear, cls)
        assert isinstance(linear, MASQuantLinear)
        linear.fqn = fqn
        # A tower's tokens are of one modality, and not those that a router knows.
        is_met = router is not None and router.modalities == weight.modalities
        linear.router = router if is_met else None
        linear.routed = weight.is_routed
        linear.smoothed_by = None
        linear.siblings = None
        return linear

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        ids = None
        if self.routed:
            assert self.router is not None
            ids = self.router.ids_for(self.fqn, input)
        smoothed_by = None
        # Eager calls have nothing to gain from it.
        if self.smoothed_by is not None and torch.compiler.is_compiling():
            smoothed_by = self.smoothed_by[0].weight
        if isinstance(self.weight, DTensor):
            return sharded_linear(input, self.weight, ids, self.bias, smoothed_by)
        if isinstance(smoothed_by, DTensor):
            smoothed_by = None
        return torch.ops.masquant.linear(
            input, self.weight, ids, self.bias, smoothed_by
        )

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuse a weight whose modality ids would mean something else here."""
        problem = weight_mismatch(
            self.fqn, state_dict.get(f"{prefix}weight"), self.router
        )
        if problem is not None:
            error_msgs.append(problem)
            return
        adopt_rotation(self.weight, state_dict.get(f"{prefix}weight"))
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        self.routed = self.weight.is_routed
        if self.siblings is not None:
            self.siblings.update()

    def extra_repr(self) -> str:
        weight = self.weight.data
        # Another library may have put its own kind of tensor around it.
        described = (
            weight.description()
            if isinstance(weight, MASQuantTensor)
            else [f"weight={weight!r}"]
        )
        return ", ".join(
            [
                f"in_features={self.in_features}",
                f"out_features={self.out_features}",
                f"bias={self.bias is not None}",
                *described,
            ]
        )


def share_smoothing(model: nn.Module) -> None:
    """Tell the quantized linears of a model with whom they share their smoothing.

    ``quantize_`` and loading do so themselves. To be called again after weights were
    written to in place other than by ``load_state_dict``.

    Args:
        model: with quantized linears; those that are children of one module, and of
            one input width, are compared.
    """
    for module in model.modules():
        widths: dict[int, list[MASQuantLinear]] = defaultdict(list)
        for child in module.children():
            if isinstance(child, MASQuantLinear):
                widths[child.in_features].append(child)
        for linears in widths.values():
            if len(linears) > 1:
                SmoothingSiblings(linears)
                shared_prologue.register()
