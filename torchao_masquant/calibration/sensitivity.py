# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How much a model's predictions depend on the tokens of each modality."""

from typing import Any, Iterable, Mapping

import torch
from torch import nn

from torchao_masquant.calibration.left_out import warn_of_left_out
from torchao_masquant.models.parts import token_reader
from torchao_masquant.models.wrappers import unwrapped
from torchao_masquant.options import NamePatterns
from torchao_masquant.routing import Router, UnmatchedTokens
from torchao_masquant.sample_checks import no_samples
from torchao_masquant.samples import run_samples
from torchao_masquant.selection import select_linears
from torchao_masquant.threads import threads_for, widest

__all__ = ["modality_sensitivity"]


@torch.inference_mode(False)
def modality_sensitivity(
    model: nn.Module,
    samples: Iterable[Mapping[str, Any]],
    *,
    include: NamePatterns = None,
    exclude: NamePatterns = None,
    progress: bool = True,
) -> dict[str, float]:
    """What an error in a token of each modality costs, for ``modality_weights``.

    MBQ's measure (arXiv 2412.19509): the mean absolute gradient of the loss with respect
    to the outputs of the linears, over the tokens of a modality. The loss is the
    next-token cross-entropy of the model's own most likely tokens, so that no labels
    are needed. Gradients are of outputs alone: none is kept for a weight.

    Args:
        model: a transformers model; left as it was.
        samples: as for :func:`~torchao_masquant.calibrate`.
        include: patterns of the names of linears, as for ``calibrate``.
        exclude: patterns of names to leave out.
        progress: show a bar on a terminal.

    Returns:
        Modality to sensitivity relative to the base's, which is 1; modalities without a
        token are left out.

    Raises:
        ValueError: there is no sample, or the base has no token or no gradient.
    """
    model = unwrapped(model)
    linears = select_linears(model, include, exclude)
    router = Router.for_model(model)
    router.skip_padding = True
    totals = torch.zeros(len(router.modalities), dtype=torch.float64)
    counts = torch.zeros_like(totals)

    left_out: set[str] = set()

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            try:
                ids = router.ids_for(name, args[0])
            except UnmatchedTokens:
                # A part of the tokens: calibration leaves it out, too.
                left_out.add(name)
                return
            if ids is None:
                ids = torch.zeros(output.shape[:-1], dtype=torch.int64)

            def add(grad: torch.Tensor) -> None:
                size = grad.detach().abs().double().mean(-1).reshape(-1).cpu()
                rows = ids.reshape(-1).cpu()
                for index in range(len(totals)):
                    totals[index] += size[rows == index].sum()
                    counts[index] += (rows == index).sum()

            if output.requires_grad:
                output.register_hook(add)

        return hook

    def embedded(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_()

    frozen = [p for p in model.parameters() if p.requires_grad]
    handles = [m.register_forward_hook(watch(n)) for n, m in linears.items()]
    reader = token_reader(model)
    embeddings = reader.get_input_embeddings()  # type: ignore[operator]
    handles.append(embeddings.register_forward_hook(embedded))
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        router.attach(model)
        with threads_for(widest(m.weight for m in linears.values())):
            count = run_samples(
                _WithLoss(reader),
                samples,
                router,
                progress=progress,
                description="Sensitivity",
            )
    finally:
        router.detach(model)
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
    if count == 0:
        raise no_samples(samples, "samples", "sensitivities need some of each modality")
    warn_of_left_out([name for name in linears if name in left_out])
    if not (counts[0] > 0 and totals[0] > 0):
        raise ValueError(
            f"the samples have no {router.modalities[0]} token that the loss depends on: "
            "sensitivities are relative to it."
        )
    means = totals / counts.clamp_min(1)
    return {
        name: (means[index] / means[0]).item()
        for index, name in enumerate(router.modalities)
        if counts[index] > 0
    }


class _WithLoss(nn.Module):
    """Calls the model, and runs its loss backward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> None:
        with torch.enable_grad():
            logits = self.model(**inputs).logits.float()
            labels = logits.detach().argmax(-1)
            mask = inputs.get("attention_mask")
            if isinstance(mask, torch.Tensor) and mask.shape == labels.shape:
                labels = labels.masked_fill(mask == 0, -100)
            loss = nn.functional.cross_entropy(
                logits.flatten(0, -2), labels.flatten(), reduction="sum"
            )
            loss.backward()
