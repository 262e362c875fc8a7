# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Where in the model quantization noise arises."""

from typing import Optional, Sequence

from torchao_masquant.evaluation.evaluation import Evaluation
from torchao_masquant.figures.drawing import Drawing, by_kind, drawing
from torchao_masquant.figures.panel import Panel
from torchao_masquant.figures.places import Kind, kinds
from torchao_masquant.figures.style import PLAIN, method_look, modality_look
from torchao_masquant.figures.ticks import categories, layers
from torchao_masquant.wording import amount, method_name

__all__ = ["kind_drawing", "layer_drawing"]


def layer_drawing(
    evaluations: Sequence[tuple[str, Evaluation]],
) -> Optional[Drawing]:
    """Centred SQNR by layer and method, a panel for each scheme and modality.

    Args:
        evaluations: method and evaluation.

    Returns:
        None where no evaluation was made against a reference.

    Raises:
        ImportError: matplotlib is missing.
    """
    # Ours last, so that it lies on top.
    found = sorted(
        [pair for pair in evaluations if pair[1].sqnr], key=lambda p: p[0] == "masquant"
    )
    if not found:
        return None
    methods = list(dict.fromkeys(method for method, _ in found))
    schemes = list(dict.fromkeys(e.scheme for _, e in evaluations if e.sqnr))
    modalities = list(dict.fromkeys(m for _, e in found for m in e.modalities))
    with drawing(
        "sqnr_by_layer",
        "Signal-to-noise ratio by layer",
        "Higher is better: the output of each layer's linears (their mean) against "
        "the noise of quantization, centred, so that only what varies from token to "
        "token counts as signal.",
        len(schemes) * len(modalities),
        columns=len(modalities),
        share_y="row",
    ) as made:
        for index, panel in enumerate(made.panels):
            scheme = schemes[index // len(modalities)]
            modality = modalities[index % len(modalities)]
            same = [(m, e) for m, e in found if e.scheme == scheme]
            names = _categories(same)
            for method, evaluation in same:
                means = _means(evaluation, modality, names)
                panel.line(
                    method_name(method),
                    list(means),
                    list(means.values()),
                    [
                        f"{names[x] if names else f'layer {x}'}, {modality}, "
                        f"{method_name(method)}: {amount(mean, '.1f')} dB"
                        for x, mean in means.items()
                    ],
                    **method_look(method, methods),
                )
            panel.name(
                f"{scheme}, {modality}",
                "centred output SQNR, dB",
                "" if names else "decoder layer",
            )
            if names:
                categories(panel.axis, names)
            else:
                layers(panel.axis)
    return made


def _categories(evaluations: Sequence[tuple[str, Evaluation]]) -> list[str]:
    """Names for the x axis where the linears have no layer number; else none."""
    names = list(dict.fromkeys(n for _, e in evaluations for n in e.sqnr))
    return names if any(kind.categories for kind in kinds(names)) else []


def _means(
    evaluation: Evaluation, modality: str, names: Sequence[str]
) -> dict[int, float]:
    """Place on the x axis to mean ratio, in order."""
    layer_of = {n: layer for kind in kinds(evaluation.sqnr) for layer, n in kind.places}
    found: dict[int, list[float]] = {}
    for name, ratios in evaluation.sqnr.items():
        if modality in ratios:
            x = names.index(name) if names else layer_of[name]
            found.setdefault(x, []).append(ratios[modality].centered)
    return {x: sum(values) / len(values) for x, values in sorted(found.items())}


def kind_drawing(
    evaluation: Evaluation, modalities: Sequence[str]
) -> Optional[Drawing]:
    """Centred and plain SQNR of each linear, a panel for each kind.

    Args:
        evaluation: of a quantized model.
        modalities: all that are shown together, which give the colours.

    Returns:
        None where the evaluation was not made against a reference.

    Raises:
        ImportError: matplotlib is missing.
    """

    def draw(panel: Panel, kind: Kind) -> None:
        for modality in evaluation.modalities:
            ratios = {
                n: r[modality] for n, r in evaluation.sqnr.items() if modality in r
            }
            for how, values, style in (
                ("centred", {n: ratio.centered for n, ratio in ratios.items()}, {}),
                ("plain", {n: ratio.plain for n, ratio in ratios.items()}, PLAIN),
            ):
                panel.by_layer(
                    kind,
                    f"{modality}, {how}",
                    {n: (v, f"{amount(v, '.1f')} dB") for n, v in values.items()},
                    **{**modality_look(modality, modalities), **style},
                )

    return by_kind(
        "sqnr_by_kind",
        "Signal-to-noise ratio by kind of linear",
        "Higher is better: the output of each linear against the noise of quantization, "
        "with what varies from token to token as the signal (centred), and with all of "
        "it (plain).",
        kinds(evaluation.sqnr),
        "output SQNR, dB",
        draw,
        share_y="all",
    )
