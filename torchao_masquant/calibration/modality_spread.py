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
  quotient of the two in dB, the square of that of the steps. Factors are made of ``r_m``
  where channels are rotated, else of ``max_t |x_t - c_m|``, as the solver makes them. What
  pairs leave of the difference between the weights that two factors ask for is not in it,
  so that a small gain is a loss in the end.
- **Sinks**: the share of tokens that are not ordinary, and the loudest token's norm over
  the median one's. A row's one sink is sampled by luck; its largest value, which is known
  of all tokens, bounds its norm from below.
"""

import math
from dataclasses import dataclass
from typing import Mapping, Optional

import torch

from torchao_masquant.calibration.statistics import (
    InputStatistics,
    Moments,
)
from torchao_masquant.calibration.token_sample import SAMPLE_TOKENS
from torchao_masquant.options import SolverOptions
from torchao_masquant.solver.modality_input import ordinary
from torchao_masquant.solver.rotation import rotated
from torchao_masquant.solver.sampled_outputs import sampled_outputs
from torchao_masquant.solver.smoothing import WeightSizes, smoothing_factor
from torchao_masquant.threads import threads_for

__all__ = [
    "MUCH",
    "InputSpread",
    "ModalitySpread",
    "input_spread",
    "own_factors_may_pay",
    "sinks_of",
    "verdict",
]

#: Of a rotated gain, in dB. Linears were solved for with a factor for all and with own ones,
#: with pairs of 5 %, and judged by other tokens than they were solved for. At w4a4, of the
#: modalities that gain 3.6 dB or more by this measure (all at the inputs of down_proj in the
#: digits model with outliers) each was better with its own factor, by 0.1 to 3.4 dB. All
#: others gain 2 dB at most by it, in both digits models and in a language model of 135 M
#: parameters that sees and hears; own factors changed them by -4.2 to 1.4 dB, most of them
#: for the worse.
MUCH = 3.0

# With 6 or 8 bits own factors cost those of large gain 2.6 to 20 dB, with 4-bit and with
# 8-bit weights: what a pair leaves of the difference between the weights that two factors
# ask for is more than all that rounding adds.
_COARSE = 4

# Of an input's channels.
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
        # Of a channel, hundreds of a weight's rows say as much as all of them.
        sizes = WeightSizes.of(sampled_outputs(dict(weights)))
        seen = [_Tokens(moments) for moments in statistics.moments]
        deviations = torch.stack([tokens.deviation for tokens in seen])
        ranges = torch.stack([tokens.centered.abs().amax(0) for tokens in seen])
        size = SolverOptions().hadamard_size_of(deviations.shape[1])
        plain = _Factors(ranges, ranges.amax(0), sizes.absmax, alpha)
        turned = _Factors(
            deviations, deviations.square().mean(0).sqrt(), sizes.rms, alpha
        )
        return InputSpread(
            _range_ratio(deviations),
            {
                name: ModalitySpread(
                    constant_share=tokens.constant_share(),
                    gain=plain.gain(tokens, index, sizes.rms, None),
                    gain_rotated=turned.gain(tokens, index, sizes.rms, size),
                    sink_share=tokens.sink_share,
                    sinks=tokens.sinks,
                    loudest=tokens.loudest,
                )
                for index, (name, tokens) in enumerate(zip(statistics.modalities, seen))
            },
        )


def sinks_of(inputs: Mapping[str, InputSpread]) -> list[str]:
    """A sentence for each modality that has sinks, with the inputs of the loudest.

    Args:
        inputs: by name.
    """
    sentences = []
    for modality in next(iter(inputs.values())).modalities if inputs else ():
        found = {
            name: spread.modalities[modality]
            for name, spread in inputs.items()
            if spread.modalities[modality].sinks
        }
        if not found:
            continue
        loudest = sorted(found, key=lambda name: -found[name].loudest)[:_NAMED]
        share = max(spread.sink_share for spread in found.values())
        # None may be among those that were sampled.
        amount = (
            f"{100 * share:.1f} %" if share else f"Under {100 / SAMPLE_TOKENS:.1f} %"
        )
        sentences.append(
            f"{amount} of {modality} tokens are sinks at {len(found)} of {len(inputs)} "
            "inputs, and the loudest have so many times the norm of the median token: "
            + ", ".join(f"{name} {found[name].loudest:.0f}" for name in loudest)
            + "."
        )
    return sentences


def own_factors_may_pay(inputs: Mapping[str, InputSpread], act_bits: int) -> bool:
    """Whether modalities differ by much, and activations have few bits."""
    return act_bits <= _COARSE and any(i.largest_gain >= MUCH for i in inputs.values())


def verdict(inputs: Mapping[str, InputSpread], act_bits: int) -> str:
    """One sentence: which kind of model it is, and what to do about it.

    Args:
        inputs: by name, at least one.
        act_bits: of activations; 16 where they are not rounded.
    """
    largest = max((i.largest_gain for i in inputs.values()), default=-math.inf)
    many = sum(i.largest_gain >= MUCH for i in inputs.values())
    up_to = f"up to {largest:.1f} dB less rounding error with a factor of its own"
    if len(next(iter(inputs.values())).modalities) < 2:
        return "One modality: one factor serves it."
    if act_bits > 8 or not math.isfinite(largest):
        return "One factor serves all modalities: no activations are rounded that vary."
    if not many:
        return f"Modalities differ little ({up_to}): one factor serves all."
    found = f"Modalities differ by much at {many} of {len(inputs)} inputs ({up_to})"
    if not own_factors_may_pay(inputs, act_bits):
        return (
            f"{found}: with {act_bits}-bit activations one factor still serves all, "
            f"with {_COARSE} bits own factors (separation=1, or 'auto') may pay."
        )
    return f"{found}: own factors (separation=1, or 'auto') may pay."


class _Tokens:
    """Sampled tokens of one modality at an input of K channels.

    Attributes:
        kept: (S, K) float64, ordinary ones.
        center: (K,) their mean.
        centered: (S, K) ``kept - center``.
        deviation: (K,) root mean square of ``centered``.
        sink_share, sinks, loudest: as of :class:`ModalitySpread`.
    """

    def __init__(self, moments: Moments):
        tokens = moments.sample.double()
        # A token of the largest value of all alone: a sink that was not sampled, if it
        # is too far away for an ordinary one.
        middle = tokens.median(0).values
        channel = moments.absmax(middle).argmax()
        alone = middle.clone()
        ends = torch.stack((moments.amin[channel], moments.amax[channel]))
        alone[channel] = ends[(ends - middle[channel]).abs().argmax()]
        usual = ordinary(tokens)
        norms = tokens.norm(dim=1)
        largest = torch.maximum(norms.max(), moments.absmax().max()).item()
        typical = norms.median().item()
        self.sink_share = 1 - usual.double().mean().item()
        self.sinks = not (
            usual.all() and ordinary(torch.cat((tokens, alone[None])))[-1]
        )
        self.loudest = largest / typical if typical else math.nan
        self.kept = tokens[usual]
        self.center = self.kept.mean(0)
        self.centered = self.kept - self.center
        self.deviation = self.centered.square().mean(0).sqrt()

    def constant_share(self) -> float:
        energies = self.kept.square().mean(0)
        loud = energies.topk(math.ceil(len(energies) / _LOUDEST)).indices
        total = energies[loud].sum().item()
        return self.center[loud].square().sum().item() / total if total else math.nan

    def noise(
        self, factor: torch.Tensor, weight_rms: torch.Tensor, size: Optional[int]
    ) -> float:
        """What rounding adds to outputs, up to a constant."""
        steps = rotated(self.centered / factor, size).abs().amax(1)
        weighted = (factor * weight_rms).square().sum()
        return (steps.square().mean() * weighted).item()


class _Factors:
    """Of each modality (own) and of all (shared)."""

    def __init__(
        self,
        own: torch.Tensor,
        shared: torch.Tensor,
        weight_sizes: torch.Tensor,
        alpha: float,
    ):
        self.own = [smoothing_factor(sizes, weight_sizes, alpha) for sizes in own]
        self.shared = smoothing_factor(shared, weight_sizes, alpha)

    def gain(
        self,
        tokens: _Tokens,
        index: int,
        weight_rms: torch.Tensor,
        size: Optional[int],
    ) -> float:
        shared = tokens.noise(self.shared, weight_rms, size)
        own = tokens.noise(self.own[index], weight_rms, size)
        return 10 * math.log10(shared / own) if shared > 0 and own > 0 else math.nan


def _range_ratio(deviations: torch.Tensor) -> float:
    """Of (M, K)."""
    logs = deviations[:, (deviations > 0).all(0)].log()
    if not logs.numel():
        return math.nan
    logs -= logs.mean(1, keepdim=True)
    return (logs.amax(0) - logs.amin(0)).mean().exp().item()
