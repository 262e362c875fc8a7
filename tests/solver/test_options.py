# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Options of a solution: what is refused, and what None stands for."""

import math

import pytest

from torchao_masquant import MASQuantConfig
from torchao_masquant.options import ALPHAS, METHODS, SEPARATIONS, SolverOptions


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"separation": 1.2}, ValueError, "separation must lie in 0..1, got 1.2."),
        ({"separation": True}, TypeError, "separation must be a number or 'auto'"),
        ({"separation": math.nan}, ValueError, "separation must lie in 0..1, got nan"),
        ({"separation": [1]}, TypeError, "separation must be a number or 'auto'"),
        ({"alpha": "best"}, TypeError, "alpha must be a number or 'auto', got 'best'"),
        ({"group_size": 1}, ValueError, "group_size must be at least 2, got 1."),
        ({"rounding": "up"}, ValueError, "unknown rounding 'up': choose one of"),
        ({"low_rank_bits": 4}, ValueError, "low_rank_bits must be 8 or 16, got 4."),
        (
            {"modality_weights": {"vision": -1}},
            ValueError,
            "modality_weights of 'vision' must be finite and not negative, got -1.",
        ),
        (
            {"modality_weights": {"text": 1, "audio": math.inf}},
            ValueError,
            "modality_weights of 'audio' must be finite and not negative, got inf.",
        ),
        (
            {"modality_weights": {"text": 0, "audio": 1e-300}},
            ValueError,
            "modality_weights of 'audio' must be 0, or lie in 1e-20..1e\\+20, got 1e-300.",
        ),
        ({"rank": "all"}, TypeError, "rank must be an int or a float, got 'all'."),
        ({"epochs": True}, TypeError, "epochs must be an int, got True."),
        ({"lr": math.nan}, ValueError, "lr must be positive and finite, got nan."),
        ({"epochs": 1.5}, TypeError, "epochs must be an int, got 1.5."),
        ({"epochs": -1}, ValueError, "epochs must not be negative, got -1."),
        ({"lr": 0.0}, ValueError, "lr must be positive and finite, got 0.0."),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1 sample, got 0."),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an int, got 2.0."),
        ({"batch_size": True}, TypeError, "batch_size must be an int, got True."),
        ({"hadamard_size": 48}, ValueError, "a power of two, or 1 for no rotation"),
        ({"hadamard_size": 0}, ValueError, "a power of two, or 1 .*, got 0."),
        ({"hadamard_size": -64}, ValueError, "a power of two, or 1 .*, got -64."),
        ({"hadamard_size": 64.0}, TypeError, "hadamard_size must be an int or None"),
        ({"hadamard_size": True}, TypeError, "hadamard_size must be an int or None"),
        ({"hadamard_size": "auto"}, TypeError, "must be an int or None, got 'auto'"),
        ({"effort": "least"}, ValueError, "unknown effort 'least': choose one of"),
        *(
            (
                {"scheme": "w8a8", "target": "compressed-tensors", **extra},
                ValueError,
                f"one factor for all tokens and no more, so {next(iter(extra))}=",
            )
            for extra in (
                {"method": "smoothquant"},
                {"rank": 2},
                {"rank": "auto"},
                {"separation": 1.0},
                {"shift": True},
                {"hadamard_size": 64},
                {"epochs": 1},
                {"group_size": 64},
            )
        ),
        (
            {"target": "compressed-tensors"},
            ValueError,
            "has no w4a8: take scheme 'w8a8' or 'w4a16'.",
        ),
        ({"target": "vllm"}, ValueError, "unknown target 'vllm': choose one of"),
        *(
            ({"method": method, **extra}, ValueError, "is kept as it was published")
            for method in ("masquant-paper", "smoothquant", "rtn")
            for extra in (
                {"shift": True},
                {"rounding": "gptq"},
                {"clip": True},
                {"effort": "fast"},
                {"epochs": 1},
                {"alpha": "auto"},
                {"rank": "auto"},
                {"separation": "auto"},
                {"hadamard_size": 64},
            )
            if (method, *extra) != ("masquant-paper", "epochs")
        ),
    ],
)
def test_refused(options, error, message):
    for make in (SolverOptions, lambda **o: MASQuantConfig(step="prepare", **o)):
        with pytest.raises(error, match=message):
            make(**options)


def test_what_none_stands_for():
    ours, published = SolverOptions(), SolverOptions(method="masquant-paper")
    assert ours.alphas == published.alphas == (0.5,)
    assert ours.separations == (0.0,) and published.separations == (1.0,)
    chosen = SolverOptions(alpha="auto", separation="auto")
    assert chosen.alphas == ALPHAS and chosen.separations == SEPARATIONS
    assert (
        ours.procedure.shift
        and ours.procedure.clip
        and ours.procedure.rounding == "gptq"
    )
    assert not published.procedure.shift and published.procedure.rounding == "nearest"
    assert not SolverOptions(shift=False).procedure.shift
    assert not SolverOptions("w4a16").procedure.shift
    assert SolverOptions(group_size=64).number_format.group_size == 64
    assert ours.weights_of(("text", "vision", "audio")) == [1.0, 1.0, 1.0]
    given = SolverOptions(modality_weights={"text": 0.5, "audio": 2})
    assert given.weights_of(("text", "vision", "audio")) == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    "width, own", [(2048, 512), (11008, 256), (96, 32), (6, 2), (17, None)]
)
def test_which_channels_are_rotated_together(width, own):
    """The largest power of two that divides the width, 512 at most, or what is asked."""
    assert SolverOptions().hadamard_size_of(width) == own
    assert SolverOptions(hadamard_size=1).hadamard_size_of(width) is None
    assert SolverOptions(hadamard_size=1024).hadamard_size_of(width) == 1024
    for method in ("masquant-paper", "smoothquant", "rtn"):
        assert SolverOptions(method=method).hadamard_size_of(width) is None


@pytest.mark.parametrize("method", ["masquant-paper", "smoothquant", "rtn"])
def test_published_methods_may_be_told_what_they_do(method):
    said = SolverOptions(
        method=method, shift=False, clip=False, rounding="nearest", hadamard_size=1
    )
    assert said.hadamard_size_of(64) is None
    assert said.procedure == SolverOptions(method=method).procedure == METHODS[method]


def test_files_from_before_there_were_batches_and_rotations():
    """They have neither, and none is written where it would say nothing new."""
    for options in (
        SolverOptions(),
        SolverOptions(batch_size=4, rank=2),
        SolverOptions(hadamard_size=1),
        SolverOptions(hadamard_size=64),
        SolverOptions("w8a8", target="compressed-tensors"),
    ):
        assert SolverOptions(**options.stored()) == options
    assert "batch_size" not in SolverOptions(epochs=2).stored()
    assert SolverOptions(epochs=2, batch_size=4).stored()["batch_size"] == 4
    assert "hadamard_size" not in SolverOptions().stored()
    assert SolverOptions(hadamard_size=1).stored()["hadamard_size"] == 1
    assert "target" not in SolverOptions().stored()
    assert "asymmetric_calibration" not in SolverOptions().stored()


def test_learning_needs_samples():
    with pytest.raises(ValueError, match="learning needs the samples: call calibrate"):
        MASQuantConfig(step="prepare", epochs=2)


def test_a_fast_solution_has_no_pairs_unless_they_are_asked_for():
    assert SolverOptions().rank == SolverOptions(effort="full").rank == 0.05
    assert SolverOptions(effort="fast").rank == 0
    assert SolverOptions(effort="fast", rank=0.1).rank == 0.1
    # Readers of earlier files know no such option.
    assert "effort" not in SolverOptions().stored()
    assert SolverOptions(effort="fast").stored()["effort"] == "fast"
