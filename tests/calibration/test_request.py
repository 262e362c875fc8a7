# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What is wrong with options is said before the first sample is looked at."""

import pytest
import tiny_models
import torch
from torchao.quantization import quantize_

from torchao_masquant import MASQuantConfig, calibrate
from torchao_masquant.__main__ import main
from torchao_masquant.calibration.request import check_shapes
from torchao_masquant.options import SolverOptions
from torchao_masquant.sequential import calibrate_sequential
from torchao_masquant.testing import digits

WRONG = [
    ({"group_size": 48}, r"width \(256\) of 24 of 28 linears .*group_size=32 or 64"),
    ({"scheme": "w4a16", "group_size": 96}, r"24 of 28 linears .*=64 or 128"),
    (
        {"hadamard_size": 512},
        r"=512 .*width \(256 and 768\) of 28 of 28 .*=64 or 128 or 256, which",
    ),
    ({"hadamard_size": 3}, "a power of two, or 1 for no rotation, got 3"),
    ({"modality_weights": {"image": 1.0}}, "'image', which is not one of the mod"),
    ({"modality_weights": dict.fromkeys(("text", "vision", "audio"), 0)}, "zero for"),
    ({"modality_weights": {"text": "much"}}, "names and numbers"),
    ({"modalities": ("text", "image")}, "not image"),
    ({"modalities": ("text", "text")}, "distinct names"),
    ({"modalities": ("text", None)}, "sequence of names"),
    ({"base_modality": ["text"]}, "base_modality"),
    ({"include": 5}, "include must be patterns"),
    ({"exclude": ["*", None]}, "exclude must be patterns"),
    ({"method": ["masquant"]}, "unknown method"),
    ({"low_rank_bits": 8.0}, "low_rank_bits must be 8 or 16"),
    ({"shift": "no"}, "shift must be True, False or None"),
    ({"lr": None, "batch_size": 1, "alpha": 1.5}, "alpha must lie in 0..1"),
    ({"lr": 1e-3}, "lr would do nothing where nothing is learned: give epochs=1 or"),
    ({"lr": 1e-3, "batch_size": 2}, "or leave lr and batch_size out"),
    ({"asymmetric_calibration": 1}, "asymmetric_calibration must be True or False"),
    (
        {"asymmetric_calibration": True, "budget": "6 bits"},
        "asymmetric_calibration has no place beside budget='6 bits'",
    ),
    (
        {"asymmetric_calibration": True, "rounding": "nearest"},
        "no place beside rounding 'nearest': leave one of them out",
    ),
    (
        {"asymmetric_calibration": True, "method": "masquant-paper"},
        "no place beside method 'masquant-paper'",
    ),
]


def no_sample():
    raise AssertionError("a sample was asked for")
    yield {}


class Samples:
    """Can be run through again, as calibration from disk wants it."""

    def __iter__(self):
        return no_sample()


@pytest.fixture(scope="module")
def model():
    return digits.load_model("plain")


@pytest.mark.parametrize("options, message", WRONG)
def test_calibrate(model, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        calibrate(model, Samples(), progress=False, **options)


@pytest.mark.parametrize(
    "model", [None, "Qwen/Qwen2.5-VL-7B-Instruct", torch.nn.Linear]
)
def test_what_is_no_model_is_refused(model):
    with pytest.raises(TypeError, match="calibrate takes a model, a torch.nn.Module"):
        calibrate(model, Samples())


@pytest.mark.parametrize("options, message", WRONG[::4])
def test_step_prepare_leaves_the_model_as_it_was(model, options, message):
    before = [type(module) for module in model.modules()]
    with pytest.raises((TypeError, ValueError), match=message):
        quantize_(model, MASQuantConfig(step="prepare", **options))
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("options, message", WRONG[::6])
def test_calibrate_sequential(tmp_path, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        calibrate_sequential(
            digits.checkpoint_path("plain"),
            Samples(),
            output=tmp_path / "quantized",
            **options,
        )
    assert list(tmp_path.iterdir()) == []


def test_published_factors_are_not_learned_from_disk(tmp_path):
    with pytest.raises(ValueError, match="in memory alone: use calibrate, or epochs=0"):
        calibrate_sequential(
            digits.checkpoint_path("plain"),
            Samples(),
            output=tmp_path / "quantized",
            method="masquant-paper",
            epochs=2,
        )


def test_command_line_before_weights_are_loaded(monkeypatch, capsys, tmp_path):
    loaded = []
    monkeypatch.setattr(
        "torchao_masquant.cli.calibrate.load_model", lambda *a: loaded.append(a)
    )
    output = str(tmp_path / "r.safetensors")
    code = main(["calibrate", "digits", "digits", "-o", output, "--group-size", "48"])
    assert code == 1 and not loaded
    assert "24 of 28 linears" in capsys.readouterr().err


def test_learning_needs_blocks_and_says_so_first():
    with pytest.raises(ValueError, match="nn.ModuleList"):
        calibrate(tiny_models.PlainModel(), Samples(), epochs=1, progress=False)


@pytest.mark.parametrize("bound", ["4g", None, True, -1])
def test_a_bound_of_memory_is_a_number(model, bound):
    with pytest.raises((TypeError, ValueError), match="max_statistics_bytes must"):
        calibrate(model, Samples(), max_statistics_bytes=bound)


def test_weights_of_nan_are_named_first(model):
    weight = model.get_decoder().layers[1].mlp.up_proj.weight
    with torch.no_grad():
        before = weight[0, 0].item()
        weight[0, 0] = torch.nan
    try:
        with pytest.raises(
            ValueError, match="layers.1.mlp.up_proj: its weight holds nan"
        ):
            calibrate(model, Samples(), progress=False)
    finally:
        with torch.no_grad():
            weight[0, 0] = before


@pytest.mark.parametrize(
    "widths, size, way",
    [
        ([576, 1536], 128, "group_size=96 or 192"),
        ([576], 128, "group_size=96 or 192"),
        ([17, 34], 16, "give group_size=17, which divides"),
        ([17, 20], 4, "no group size divides all of 17 and 20"),
    ],
)
def test_a_group_size_that_divides_is_proposed(widths, size, way):
    shapes = {f"layers.{i}.fc": (8, width) for i, width in enumerate(widths)}
    options = SolverOptions(group_size=size)
    with pytest.raises(ValueError, match=way):
        check_shapes(shapes, ("text",), options)


@pytest.mark.parametrize(
    "widths, way",
    [
        ([2048, 11008, 96], "give hadamard_size=8 or 16 or 32, which divides all"),
        ([2048, 6], "give hadamard_size=2, which divides all"),
        ([2048, 17], "no power of two divides all of them, leave it out"),
    ],
)
def test_sizes_of_a_rotation_that_divide_are_proposed(widths, way):
    shapes = {f"layers.{i}.fc": (8, width) for i, width in enumerate(widths)}
    options = SolverOptions(hadamard_size=512)
    with pytest.raises(ValueError, match=way):
        check_shapes(shapes, ("text",), options)
    # What suits each, and none at all, suit any.
    for size in (None, 1):
        check_shapes(shapes, ("text",), SolverOptions(hadamard_size=size))


def test_one_linear_of_one_channel():
    with pytest.raises(ValueError, match=r"1 of 2 linears \(gate\) has too few input"):
        check_shapes({"up": (8, 8), "gate": (8, 1)}, ("text",), SolverOptions())
