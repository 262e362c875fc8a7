# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What is compared: name of each method in the results, and how a copy is made by it."""

from typing import Any, Mapping

from baselines.quantizing import BASELINES, Quantizing
from torch import nn

__all__ = ["INTEGERS", "MAIN", "METHODS", "SCHEMES", "TITLES", "quantize"]

#: What runs by default; "w3a3" is simulated, and no model of this size answers.
INTEGERS = ("w8a8", "w4a8", "w4a6", "w4a16", "w4a4")

SCHEMES = (*INTEGERS, "fp8", "mxfp8", "w4a8-fp8", "nvfp4", "mxfp4")

#: Of each method: its title, the baseline that it is (or None), and its options.
_METHODS: dict[str, tuple[str, str | None, Mapping[str, Any]]] = {
    "rtn": ("round-to-nearest", None, {"method": "rtn"}),
    "smoothquant": ("SmoothQuant", None, {"method": "smoothquant"}),
    "gptq": ("SmoothQuant + GPTQ", "gptq", {}),
    "mr-gptq": ("MR-GPTQ's recipe", "mr-gptq", {}),
    "svdquant": ("SVDQuant's form", "svdquant", {}),
    "masquant-paper": ("MASQuant, paper", None, {"method": "masquant-paper"}),
    "masquant-paper, learned": (
        "MASQuant, paper, learned",
        None,
        {"method": "masquant-paper", "epochs": 2},
    ),
    "authors": ("MASQuant, as its authors run it", "authors", {}),
    "pooled": ("ours without modalities", "pooled", {}),
    "pooled, no pair": ("ours without modalities, no pair", "pooled", {"rank": 0}),
    "masquant": ("**ours**", None, {}),
    "masquant, no pair": ("**ours, no pair**", None, {"rank": 0}),
    "masquant, fast": ("**ours, fast**", None, {"effort": "fast"}),
    "masquant, own factors, no rotation": (
        "ours, separation 1, no rotation",
        None,
        {"separation": 1.0, "hadamard_size": 1},
    ),
    "masquant, no pair, asymmetric": (
        "**ours, no pair, asymmetric**",
        None,
        {"rank": 0, "asymmetric_calibration": True},
    ),
    "masquant, asymmetric": (
        "**ours, asymmetric**",
        None,
        {"asymmetric_calibration": True},
    ),
    "masquant, no pair, groups of 64, asymmetric": (
        "ours, no pair, groups of 64, asymmetric",
        None,
        {"rank": 0, "group_size": 64, "asymmetric_calibration": True},
    ),
    "masquant, no pair, own factors": (
        "ours, no pair, separation 1",
        None,
        {"rank": 0, "separation": 1.0},
    ),
    "masquant, no pair, no rotation": (
        "ours, no pair, no rotation",
        None,
        {"rank": 0, "hadamard_size": 1},
    ),
    "masquant, no pair, no shift": (
        "ours, no pair, no shift",
        None,
        {"rank": 0, "shift": False},
    ),
    "masquant, no pair, nearest": (
        "ours, no pair, rounded to nearest",
        None,
        {"rank": 0, "rounding": "nearest"},
    ),
    "masquant, no pair, no clip": (
        "ours, no pair, no clip",
        None,
        {"rank": 0, "clip": False},
    ),
    "masquant, no pair, groups of 64": (
        "ours, no pair, groups of 64",
        None,
        {"rank": 0, "group_size": 64},
    ),
    "masquant, no pair, head of 8 bits": (
        "**ours, no pair, head of 8 bits**",
        None,
        {"rank": 0, "head_bits": 8},
    ),
    "masquant, pairs of 8 bits": (
        "**ours, pairs of 8 bits**",
        None,
        {"low_rank_bits": 8},
    ),
    "masquant, exported": (
        "**ours, exported**",
        None,
        {"rank": 0, "target": "compressed-tensors"},
    ),
}

METHODS = tuple(_METHODS)
TITLES = {name: title for name, (title, _, _) in _METHODS.items()}

#: In the order in which they run: the first tell most.
MAIN = (
    "masquant, no pair",
    "gptq",
    "pooled, no pair",
    "smoothquant",
    "rtn",
    "masquant-paper",
    "authors",
    "masquant",
    "pooled",
    "masquant, fast",
)

assert all(baseline in (None, *BASELINES) for _, baseline, _ in _METHODS.values())


def quantize(subject: Quantizing, scheme: str, method: str) -> nn.Module:
    """A copy of the model, quantized by a method of ``METHODS``."""
    _, baseline, given = _METHODS[method]
    # The scheme's own groups of 128 do not divide SmolLM2's width of 576.
    options = {"group_size": 64, **given} if scheme == "w4a16" else given
    if baseline is None:
        return subject.by_options(scheme, options)
    return subject.by_baseline(scheme, baseline, options)
