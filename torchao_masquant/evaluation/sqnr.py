# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Signal-to-quantization-noise ratio of each linear, per modality."""

import contextlib
from dataclasses import dataclass
from typing import Any, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from torchao_masquant.evaluation.decibel import decibel
from torchao_masquant.linear import MASQuantLinear
from torchao_masquant.routing import Router, router_of, token_modalities
from torchao_masquant.samples import run_samples

__all__ = ["SQNR", "LinearComparison", "linear_sqnr"]


@dataclass
class SQNR:
    """Sums over the tokens of one modality that passed one linear.

    Attributes:
        count: T, number of tokens.
        total: (N,) float64, ``sum_t y`` of the original output y.
        energy: ``sum_t |y|^2``.
        noise: ``sum_t |y_hat - y|^2``.
    """

    count: int
    total: torch.Tensor
    energy: float = 0.0
    noise: float = 0.0

    @property
    def plain(self) -> float:
        """``10 log10(E|y|^2 / E|y_hat - y|^2)``, in dB."""
        return decibel(self.energy, self.noise)

    @property
    def centered(self) -> float:
        """``10 log10(E|y - E[y]|^2 / E|y_hat - y|^2)``, in dB.

        Noise against the variation from token to token, which is what carries
        information: of a modality with outlier channels, most of the output's energy
        is a constant.
        """
        constant = (self.total.square().sum() / max(self.count, 1)).item()
        return decibel(self.energy - constant, self.noise)


class LinearComparison:
    """Compares quantized linears with their originals while the original model runs.

    Args:
        model: in high precision.
        quantized: ``model`` quantized; its linears are called one by one.

    Raises:
        ValueError: ``quantized`` has no quantized linear, or one that ``model`` lacks.
    """

    def __init__(self, model: nn.Module, quantized: nn.Module):
        self.model = model
        self.linears = {
            name: module
            for name, module in quantized.named_modules()
            if isinstance(module, MASQuantLinear)
        }
        if not self.linears:
            raise ValueError(f"{type(quantized).__name__} has no quantized linear.")
        self.originals = dict(model.named_modules())
        missing = [name for name in self.linears if name not in self.originals]
        if missing:
            raise ValueError(f"the original model has no {missing[0]} to compare with.")
        router = router_of(quantized)
        self.modalities = (router or Router.for_model(model)).modalities
        #: of the original model; padding is left out
        self.router = Router.for_model(model, self.modalities)
        self.router.skip_padding = True
        #: linear to modality to ratio; a modality without tokens is left out
        self.results: dict[str, dict[str, SQNR]] = {name: {} for name in self.linears}

    @contextlib.contextmanager
    def observing(self) -> Iterator[None]:
        """Compare on every call of the original model inside."""
        hooks = [
            self.originals[name].register_forward_pre_hook(
                lambda module, args, name=name: self._compare(name, module, args[0])
            )
            for name in self.linears
        ]
        self.router.attach(self.model)
        try:
            yield
        finally:
            self.router.detach(self.model)
            for hook in hooks:
                hook.remove()

    def _compare(self, name: str, original: nn.Module, x: torch.Tensor) -> None:
        assert isinstance(original, nn.Linear)
        linear, modalities = self.linears[name], self.modalities
        ids = None
        if linear.router is None and linear.weight.modalities != modalities:
            # Of a tower, whose tokens are not the call's.
            modalities = linear.weight.modalities
        else:
            ids = self.router.ids_for(name, x)
        if ids is None:
            ids = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
        # In float32, so that the type of the activations is no part of the noise.
        x = x.float()
        bias = None if original.bias is None else original.bias.float()
        y = F.linear(x, original.weight.float(), bias)
        with _routed(linear, ids.clamp_min(0)):
            noise = linear(x).double() - y.double()
        for index, modality in enumerate(modalities):
            tokens = y[ids == index].double()
            if tokens.shape[0] == 0:
                continue
            sums = self.results[name].setdefault(
                modality, SQNR(0, torch.zeros_like(tokens[0]))
            )
            sums.count += tokens.shape[0]
            sums.total += tokens.sum(0)
            sums.energy += tokens.square().sum().item()
            sums.noise += noise[ids == index].square().sum().item()


@torch.no_grad()
def linear_sqnr(
    model: nn.Module,
    quantized: nn.Module,
    samples: Iterable[Mapping[str, Any]],
    *,
    progress: bool = False,
) -> dict[str, dict[str, SQNR]]:
    """Compare each quantized linear with its original, on the original's inputs.

    Args:
        model: in high precision; it runs the data.
        quantized: ``model`` quantized; its linears are called one by one.
        samples: keyword inputs of ``model``.
        progress: show a bar on a terminal.

    Returns:
        Name of each quantized linear to modality to ratio. A modality without tokens
        is left out.

    Raises:
        ValueError: ``quantized`` has no quantized linear, or one that ``model`` lacks.
    """
    comparison = LinearComparison(model, quantized)
    with comparison.observing():
        run_samples(
            model,
            samples,
            comparison.router,
            progress=progress,
            description="Comparing",
        )
    return comparison.results


@contextlib.contextmanager
def _routed(linear: MASQuantLinear, ids: torch.Tensor) -> Iterator[None]:
    if router_of(linear) is None:
        yield
    else:
        with token_modalities(linear, ids):
            yield
