# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How much modalities differ at an input, and whether factors of their own could pay.

All of this is of sampled tokens. Of ordinary ones, which are no sinks, ``c_m`` is the mean
of modality m, ``e_m[k]`` the mean square and ``r_m[k]`` the deviation about ``c_m`` in
channel k.

- **Constant share**: ``sum_k c_m[k]^2 / sum_k e_m[k]`` over the hundredth of the channels
  (one at least) that is loudest by ``e_m``: what a shift takes off outliers.
- **Range ratio**: the geometric mean over channels of ``max_m r_m[k] / min_m r_m[k]``, each
  ``r_m`` divided by its own geometric mean, as a token's scale takes up how loud all of it
  is. Channels in which some modality does not vary are left out.
- **Gain**: how much less a modality's rounding adds to outputs with its own factor than with
  one for all modalities. Tokens have steps ``d_t(s) = max_k |(x_t - c_m)[k] / s[k]|`` (of
  rotated channels, where they are), which add ``mean_t d_t(s)^2 sum_k (s[k] w[k])^2``, w the
  root mean square of the weights' channels; a constant in s drops out. The gain is the
  quotient of the two in dB, the square of that of the steps. Factors are those that the
  solver would take (:func:`~torchao_masquant.solver.smoothing.smoothing_factors`). What
  pairs leave of the difference between the weights that two factors ask for is not in it,
  so that a small gain is a loss in the end.
- **Sinks**: the share of tokens that are not ordinary, and the loudest token's norm over
  the median one's. A row's one sink is sampled by luck; its largest value, which is known
  of all tokens, bounds its norm from below.
"""

import math
from dataclasses import dataclass
from typing import Any, Mapping, Sequence

import torch

from torchao_masquant.options import SolverOptions
from torchao_masquant.solver.modality_input import (
    ModalityInput,
    modality_inputs,
    ordinary,
)
from torchao_masquant.solver.sampled_outputs import sampled_outputs
from torchao_masquant.solver.smoothing import WeightSizes, smoothing_factors
from torchao_masquant.statistics.input_statistics import (
    InputStatistics,
    Moments,
)
from torchao_masquant.statistics.token_sample import SAMPLE_TOKENS
from torchao_masquant.threads import threads_for

__all__ = [
    "MUCH",
    "InputSpread",
    "ModalitySpread",
    "differ_by_much",
    "input_spread",
    "sinks_of",
    "verdict",
]

#: A rotated gain from which on modalities differ by much, in dB. The factor that modalities share is made of their ranges
#: relative to each other, so that own factors gain 2.1 dB at most by this measure in the
#: models that were measured: the digits models, with outliers and without, and a language
#: model of 135 M parameters that sees and hears. In none of them did own factors lower the
#: divergence from the dense model beyond the spread of seeds, with 4 bits or with 8: what
#: the weight loses that has to serve several of them takes up what they gain.
MUCH = 2.5

# One channel of an input in so many is a loud one.
_LOUDEST = 100

# Inputs in a sentence on sinks.
_NAMED = 3


@dataclass(frozen=True)
class ModalitySpread:
    """Of one modality's tokens at one input; nan where they do not vary.

    Attributes:
        constant_share: of the energy of the loudest channels that is their mean, 0..1.
        gain: by a factor of its own, channels not rotated, in dB.
        gain_rotated: the same of rotated channels.
        sink_share: of sampled tokens, 0..1.
        sinks: whether any token is a sink, sampled or not.
        loudest: the loudest token's norm over the median one's, at least.
    """

    constant_share: float
    gain: float
    gain_rotated: float
    sink_share: float
    sinks: bool
    loudest: float


@dataclass(frozen=True)
class InputSpread:
    """Of one input.

    Attributes:
        range_ratio: 1 or more; nan without a channel in which all modalities vary.
        modalities: name to its tokens' spread.
    """

    range_ratio: float
    modalities: dict[str, ModalitySpread]

    @property
    def largest_gain(self) -> float:
        """Of rotated channels, over modalities, in dB; -inf where none varies."""
        gains = [m.gain_rotated for m in self.modalities.values()]
        return max((g for g in gains if not math.isnan(g)), default=-math.inf)


@torch.inference_mode(False)
@torch.no_grad()
def input_spread(
    statistics: InputStatistics,
    weights: Mapping[str, torch.Tensor],
    alpha: float = 0.5,
) -> InputSpread:
    """See the module's text.

    Args:
        statistics: of the input, with sampled tokens of each modality.
        weights: name to (N_i, K), of the linears that read it.
        alpha: exponent of the activations in the factors.
    """
    with threads_for(statistics.moments[0].sum.numel()):
        # Hundreds of a weight's rows say as much of a channel as all of them.
        sizes = WeightSizes.of(sampled_outputs(dict(weights)))
        rotation, none = SolverOptions(), SolverOptions(hadamard_size=1)
        inputs = modality_inputs(statistics, rotation)
        plain = _gains(inputs, sizes, alpha, none)
        turned = _gains(inputs, sizes, alpha, rotation)
        deviations = [(i.tokens - i.center).square().mean(0).sqrt() for i in inputs]
        return InputSpread(
            _range_ratio(torch.stack(deviations)),
            {
                name: ModalitySpread(
                    constant_share=_constant_share(seen),
                    gain=plain[index],
                    gain_rotated=turned[index],
                    **_sinks(statistics.moments[index]),
                )
                for index, (name, seen) in enumerate(zip(statistics.modalities, inputs))
            },
        )


def sinks_of(inputs: Mapping[str, InputSpread]) -> list[str]:
    """A sentence for each modality that has sinks, with the inputs of the loudest.

    Args:
        inputs: by name.
    """
    sentences = []
    # Those of towers meet one.
    for modality in dict.fromkeys(m for i in inputs.values() for m in i.modalities):
        met = {
            name: spread.modalities[modality]
            for name, spread in inputs.items()
            if modality in spread.modalities
        }
        found = {name: spread for name, spread in met.items() if spread.sinks}
        if not found:
            continue
        loudest = sorted(found, key=lambda name: -found[name].loudest)[:_NAMED]
        share = max(spread.sink_share for spread in found.values())
        # None may be among those that were sampled.
        amount = (
            f"{100 * share:.1f} %" if share else f"Under {100 / SAMPLE_TOKENS:.1f} %"
        )
        sentences.append(
            f"{amount} of {modality} tokens are sinks at {len(found)} of {len(met)} "
            "inputs, and the loudest have so many times the norm of the median token: "
            + ", ".join(f"{name} {found[name].loudest:.0f}" for name in loudest)
            + "."
        )
    return sentences


def differ_by_much(inputs: Mapping[str, InputSpread], act_bits: int) -> bool:
    """Whether modalities differ by more than in any model that was measured.

    Args:
        inputs: by name.
        act_bits: of activations; 16 where they are not rounded, which nothing is to gain of.
    """
    return act_bits <= 8 and any(i.largest_gain >= MUCH for i in inputs.values())


def verdict(inputs: Mapping[str, InputSpread], act_bits: int) -> str:
    """One sentence: which kind of model it is, and what to do about it.

    Args:
        inputs: by name, at least one.
        act_bits: of activations; 16 where they are not rounded.
    """
    largest = max((i.largest_gain for i in inputs.values()), default=-math.inf)
    up_to = f"up to {largest:.1f} dB less rounding error with a factor of its own"
    if all(len(i.modalities) < 2 for i in inputs.values()):
        return "One modality: one factor serves it."
    if act_bits > 8 or not math.isfinite(largest):
        return "One factor serves all modalities: no activations are rounded that vary."
    if not differ_by_much(inputs, act_bits):
        return f"One factor serves all modalities ({up_to})."
    many = sum(i.largest_gain >= MUCH for i in inputs.values())
    return (
        f"Modalities differ by much at {many} of {len(inputs)} inputs ({up_to}): compare "
        "separation=1 with separation=0 on held-out data."
    )


def _sinks(moments: Moments) -> dict[str, Any]:
    """``sink_share``, ``sinks`` and ``loudest`` of :class:`ModalitySpread`."""
    tokens = moments.sample.double()
    # A token of the largest value of all alone: a sink that was not sampled, if it is too
    # far away for an ordinary one.
    middle = tokens.median(0).values
    channel = moments.absmax(middle).argmax()
    alone = middle.clone()
    ends = torch.stack((moments.amin[channel], moments.amax[channel]))
    alone[channel] = ends[(ends - middle[channel]).abs().argmax()]
    usual = ordinary(tokens)
    norms = tokens.norm(dim=1)
    largest = torch.maximum(norms.max(), moments.absmax().max()).item()
    typical = norms.median().item()
    with_it = ordinary(torch.cat((tokens, alone[None])))
    return {
        "sink_share": 1 - usual.double().mean().item(),
        "sinks": not (usual.all() and with_it[-1]),
        "loudest": largest / typical if typical else math.nan,
    }


def _constant_share(seen: ModalityInput) -> float:
    energies = seen.tokens.square().mean(0)
    loud = energies.topk(math.ceil(len(energies) / _LOUDEST)).indices
    total = energies[loud].sum().item()
    return seen.center[loud].square().sum().item() / total if total else math.nan


def _gains(
    inputs: Sequence[ModalityInput],
    sizes: WeightSizes,
    alpha: float,
    options: SolverOptions,
) -> list[float]:
    """Of each modality, in dB."""
    own, shared = (
        smoothing_factors(inputs, sizes, alpha, separation, options)
        for separation in (1.0, 0.0)
    )
    size = options.hadamard_size_of(len(sizes.rms))

    def noise(seen: ModalityInput, factor: torch.Tensor) -> float:
        weighted = (factor * sizes.rms).square().sum()
        return (seen.squared_step(factor, size) * weighted).item()

    gains = []
    for seen, factor, of_all in zip(inputs, own, shared):
        with_own, with_shared = noise(seen, factor), noise(seen, of_all)
        varies = with_own > 0 and with_shared > 0
        gains.append(10 * math.log10(with_shared / with_own) if varies else math.nan)
    return gains


def _range_ratio(deviations: torch.Tensor) -> float:
    """Of (M, K)."""
    logs = deviations[:, (deviations > 0).all(0)].log()
    if not logs.numel():
        return math.nan
    logs -= logs.mean(1, keepdim=True)
    return (logs.amax(0) - logs.amin(0)).mean().exp().item()
