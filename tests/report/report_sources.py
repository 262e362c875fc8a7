# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A model's recipe, analysis, evaluations and results, made by hand at any size."""

import random

import torch

from torchao_masquant import LayerRecipe, Recipe
from torchao_masquant.evaluation import (
    Analysis,
    ContentScore,
    EffectiveRank,
    Evaluation,
    InputAnalysis,
    LinearSQNR,
    ModalityRange,
    ModalityScore,
    SmoothingLoss,
    TaskScore,
)
from torchao_masquant.options import SolverOptions
from torchao_masquant.solver.modality_spread import InputSpread, ModalitySpread

MODALITIES = ("text", "vision", "audio")
TASKS = ("read", "see", "hear")

#: input, by the linears that read it
INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def layer_names(layers, prefix="model.layers."):
    return [
        tuple(f"{prefix}{layer}.{leaf}" for leaf in leaves)
        for layer in range(layers)
        for leaves in INPUTS
    ]


def recipe(
    layers=2, modalities=MODALITIES, scheme="w4a8", method="masquant", names=None
):
    """Random factors of (M, 16), weights of (8, 16), pairs of rank 2."""
    generator = torch.Generator().manual_seed(0)
    one_factor = method in ("rtn", "smoothquant")
    rows, others = (1, 0) if one_factor else (len(modalities), len(modalities) - 1)
    parts = {}
    for group in names or layer_names(layers):
        factor = torch.rand(rows, 16, generator=generator) + 0.5
        for name in group:
            parts[name] = LayerRecipe(
                shape=(8, 16),
                fingerprint="0" * 16,
                smoothing_factor=factor.clone(),
                ranks=(2,) * others,
                l1=torch.zeros(16, 2 * others) if others else None,
                l2=torch.zeros(2 * others, 8) if others else None,
                modality_bias=torch.zeros(rows, 8) if others else None,
            )
    options = SolverOptions(scheme, method, rank=0.05)
    return Recipe(options, modalities, parts, {"torch": "2.13"})


def analysis(layers=2, modalities=MODALITIES, losses=True, names=None, model="Model"):
    draw = random.Random(0)
    groups = names or layer_names(layers)
    inputs = {}
    for group in groups:
        shares = [draw.random() for _ in modalities]
        inputs[group[0]] = InputAnalysis(
            linears=tuple(group),
            in_features=16,
            ranges={
                m: ModalityRange(
                    tokens=9,
                    absmax=draw.uniform(5, 500),
                    median=1.0,
                    low=0.5,
                    high=2.0,
                    dominance=share / sum(shares),
                )
                for m, share in zip(modalities, shares)
            },
            losses={
                m: SmoothingLoss(
                    predicted=draw.uniform(0, 20),
                    predicted_per_token=draw.uniform(0, 20),
                    measured=draw.uniform(0, 20),
                    own=40.0,
                    unified=30.0,
                    tokens=9,
                )
                for m in modalities
            }
            if losses
            else {},
            spread=InputSpread(
                range_ratio=draw.uniform(1, 4),
                modalities={
                    m: ModalitySpread(
                        draw.random(),
                        draw.uniform(0, 9),
                        draw.uniform(0, 6),
                        0.02,
                        True,
                        40.0,
                    )
                    for m in modalities
                },
            ),
        )
    others = modalities[1:]
    return Analysis(
        model=model,
        scheme="w4a8" if losses else "w4a16",
        alpha=0.5,
        modalities=modalities,
        inputs=inputs,
        effective_ranks={
            name: {
                m: EffectiveRank(draw.uniform(4, 8), draw.uniform(1, 3), 8)
                for m in others
            }
            for group in groups
            for name in group
        },
        ranks=(0.0, 0.05, 0.2),
        sqnr_by_rank={
            method: {m: (1.0, 10.0, 30.0) for m in others}
            for method in ("masquant-paper", "masquant")
        },
    )


def evaluation(
    scheme="w4a8",
    method="masquant",
    layers=2,
    modalities=MODALITIES,
    accuracy=0.9,
    reference=True,
    names=None,
    tasks=TASKS,
    model="Model",
):
    draw = random.Random(f"{scheme} {method}")
    compared = (0.95, 0.5, 0.01, 0.1, 0.97) if reference else ()
    sqnr = {
        name: {
            m: LinearSQNR(draw.uniform(0, 40), draw.uniform(0, 40)) for m in modalities
        }
        for group in names or layer_names(layers)
        for name in group
    }
    return Evaluation(
        model=model,
        modalities=modalities,
        tasks={task: TaskScore(20, 20, accuracy, 0.6, *compared) for task in tasks},
        by_modality={m: ModalityScore(9, 0.01) for m in modalities},
        by_content={"text": ContentScore(20, 20, 0.6)},
        weight_bytes=3 << 20,
        quantized_linears=7 * layers if scheme else 0,
        scheme=scheme,
        method=method,
        reference_weight_bytes=12 << 20 if reference else None,
        sqnr=sqnr if reference and scheme else {},
    )


def quality_rows(variants=("plain", "outliers"), seeds=(0, 1, 2), ranks=(0.02, 0.05)):
    """Rows of several models, seeds and ranks, with scores drawn at random."""

    def row(variant, seed, scheme, method, rank):
        draw = random.Random(f"{variant} {seed} {scheme} {method} {rank}")
        dense = scheme == "dense"
        return {
            "variant": variant,
            "seed": seed,
            "scheme": scheme,
            "method": method,
            "rank": rank,
            "tasks": {task: draw.random() for task in TASKS},
            "sqnr": {} if dense else {m: draw.uniform(0, 40) for m in MODALITIES},
            "kl": {} if dense else {m: draw.uniform(0, 2) for m in MODALITIES},
            "bytes": 4 << 20 if dense else 1 << 20,
        }

    return [
        row(variant, seed, scheme, method, rank)
        for variant in variants
        for scheme in ("dense", "w4a8", "w4a4")
        for method in ([""] if scheme == "dense" else ["rtn", "masquant"])
        for rank in (ranks if method == "masquant" else [None])
        for seed in seeds
    ]


def results(schemes=("w8a8", "w4a4"), methods=("rtn", "masquant")):
    def row(scheme, method, accuracy):
        return {
            "scheme": scheme,
            "method": method,
            "accuracy": {"read": accuracy, "see": 0.5},
            "cross_entropy": {"read": 0.1, "see": 1.25},
            "weight_bytes": 1 << 20,
            "seconds": 0.1,
            "sqnr": {m: 20.0 for m in MODALITIES} if method else {},
        }

    rows = [row("dense", "", 0.99)]
    rows += [row(s, m, 0.5 if m == "rtn" else 0.98) for s in schemes for m in methods]
    return {"rank": 0.05, "outliers_trained_in": True, "rows": rows}
