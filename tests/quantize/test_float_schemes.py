# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Schemes of floats, from a weight to a checkpoint: float64 for values, sentences for refusals."""

import copy
import io
import re
from pathlib import Path
from typing import Any

import number_oracle as oracle
import pytest
import torch
from tiny_models import qwen25_vl_of_width, recipe_of, samples
from torch._inductor.utils import run_and_get_code
from torchao.quantization import quantize_
from transformers import Qwen2_5_VLForConditionalGeneration

from torchao_masquant import (
    MASQuantLinear,
    MASQuantTensor,
    Recipe,
    masquant_config,
)
from torchao_masquant.conversion.placeholders import placeholder_weight
from torchao_masquant.deploy.compressed_tensors import export_compressed_tensors
from torchao_masquant.deploy.decoder import check_layers
from torchao_masquant.evaluation.weights import scheme_of
from torchao_masquant.integrations.checkpoint_format import CheckpointFormat
from torchao_masquant.kernels import float_instructions
from torchao_masquant.kernels.hadamard import hadamard_rotate
from torchao_masquant.linear import share_smoothing
from torchao_masquant.options import SCHEMES, Scheme, SolverOptions
from torchao_masquant.recipe import read_header
from torchao_masquant.weight_bytes import Compensation, weight_bytes

FLOATS = {name: scheme for name, scheme in SCHEMES.items() if scheme.floats}
every_scheme = pytest.mark.parametrize("name", FLOATS)
N, K, NAMES, RANKS = 40, 256, ("text", "vision", "audio"), (3, 2)


def weight_of(scheme: Scheme, hp: torch.Tensor, **given: Any) -> MASQuantTensor:
    return MASQuantTensor.from_hp(
        hp,
        weight_bits=scheme.weight_bits,
        act_bits=scheme.act_bits,
        group_size=scheme.group_size,
        weight_format=scheme.weight_format,
        act_format=scheme.act_format,
        **given,
    )


def full(scheme: Scheme, n: int = N, seed: int = 0, **given: Any) -> MASQuantTensor:
    """With every part that a weight may have."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    given = {
        "modalities": NAMES,
        # Powers of two, which nothing is rounded by.
        "smoothing_factor": 2.0
        ** torch.randint(-2, 3, (len(NAMES), K), generator=generator),
        "ranks": RANKS,
        "l1": random(K, sum(RANKS)) / 16,
        "l2": random(sum(RANKS), n) / 16,
        "modality_bias": random(len(NAMES), n),
        "act_shift": random(len(NAMES), K),
        "hadamard_size": 16,
        **given,
    }
    return weight_of(scheme, random(n, K), **given)


def values_of(weight: MASQuantTensor) -> torch.Tensor:
    """(N, K) float64 in its own basis, from its bits."""
    held = weight.qdata.view(torch.uint8)
    if held.shape[1] < K:
        held = torch.stack([held & 0xF, held >> 4], -1).flatten(1)
    if weight.weight_format is None:
        values = ((held.long() ^ 8) - 8).double()
    else:
        by_code = oracle.FORMATS[weight.weight_format].values
        values = torch.tensor(by_code, dtype=torch.float64)[held.long()]
    scale = weight.scale.float().double()
    if weight.row_scale is not None:
        scale = scale * weight.row_scale.double()[:, None]
    return values * scale.repeat_interleave(K // scale.shape[1], 1)


@every_scheme
def test_a_linear_against_float64(name: str) -> None:
    weight = full(SCHEMES[name])
    x = torch.randn(2, 9, K)
    ids = torch.arange(18).reshape(2, 9) % 3
    y = torch.ops.masquant.linear(x, weight, ids, None).reshape(18, N)
    flat, m = x.reshape(18, K), ids.reshape(18)
    seen = flat * weight.act_pre_scale[m] - weight.act_shift[m]
    form = oracle.FORMATS[weight.act_format]
    token = form.rounded(hadamard_rotate(seen, 16))[1]
    hidden = token @ weight.l1.double()
    owner = torch.tensor([1, 1, 1, 2, 2])
    hidden = torch.where(m[:, None] == owner, hidden, 0.0)
    matrix = values_of(weight)
    expected = token @ matrix.t() + hidden @ weight.l2.double()
    expected += weight.modality_bias[m]
    size = (
        token.abs()
        @ (matrix.abs() + (weight.l1.double().abs() @ weight.l2.double().abs()).t()).t()
    )
    bound = 2.0**-24 * ((K + 16) * size + 8 * expected.abs() + 8)
    assert ((y - expected).abs() <= bound).all()
    base = torch.ops.masquant.linear(x, weight, None, None)
    alone = torch.ops.masquant.linear(x, weight, torch.zeros_like(ids), None)
    assert torch.equal(base, alone)


@every_scheme
def test_a_modality_may_be_louder_than_a_format_reaches(name: str) -> None:
    """Its tokens come out of a factor a million times as large, as a gauge may have it."""
    weight, x = torch.randn(N, K), torch.randn(50, K)
    ids = torch.ones(50, dtype=torch.int64)
    off = []
    for loud in (1.0, 1e-6, 1e6):
        factor = torch.stack([torch.ones(K), torch.full((K,), loud)])
        made = weight_of(
            SCHEMES[name], weight, modalities=NAMES[:2], smoothing_factor=factor
        )
        y = torch.ops.masquant.linear(x, made, ids, None) * loud
        off.append(((y - x @ weight.t()).norm() / y.norm()).item())
    assert max(off) < 1.1 * min(off) < 0.25


@every_scheme
def test_a_weight_is_rounded_to_the_nearest_of_its_format(name: str) -> None:
    scheme = SCHEMES[name]
    if scheme.weight_format is None:
        pytest.skip("its weights are integers, which are tested as those")
    hp = torch.randn(N, K) * torch.exp(torch.randn(N, K))
    weight = weight_of(scheme, hp)
    form = oracle.FORMATS[scheme.weight_format]
    if scheme.weight_format == "e4m3-128":
        # All rows are in one block of 128.
        largest = hp.abs().amax(0).reshape(2, 128).amax(1) / 448
        assert torch.equal(weight.scale, largest.expand(N, 2))
        error = (values_of(weight) - hp).abs()
        step = torch.maximum(hp.abs() / 16, largest.repeat_interleave(128) * 2.0**-10)
        assert (error <= step * (1 + 1e-6)).all()
    else:
        assert torch.equal(values_of(weight), form.rounded(hp)[1])
    assert torch.allclose(weight.dequantize().double(), values_of(weight), rtol=1e-6)


def test_blocks_of_rows_share_scales_and_the_last_may_be_smaller() -> None:
    hp = torch.randn(200, K)
    scale = weight_of(SCHEMES["fp8-block"], hp).scale
    assert torch.equal(scale[:128], scale[:1].expand(128, 2))
    assert torch.equal(scale[128:], scale[128:129].expand(72, 2))
    assert not torch.equal(scale[0], scale[128])


@every_scheme
def test_bytes_and_placeholders(name: str) -> None:
    scheme = SCHEMES[name]
    weight = full(scheme, ranks=(3, 3), l1=torch.randn(K, 6), l2=torch.randn(6, N))
    room = Compensation(3, 3)
    assert weight_bytes(N, K, scheme, room) == weight.nbytes_stored
    options = SolverOptions(scheme=name, rank=3, hadamard_size=16)
    held = placeholder_weight(
        "q", torch.empty(N, K, dtype=weight.dtype), options, NAMES
    )
    assert held.__tensor_flatten__() == weight.__tensor_flatten__()
    held.copy_(weight)
    assert torch.equal(held.dequantize(), weight.dequantize())


@every_scheme
def test_pieces_add_up_and_join(name: str) -> None:
    weight = full(SCHEMES[name], n=256)
    rows = [weight[:128], weight[128:]]
    columns = [weight[:, :128], weight[:, 128:]]
    for dim, pieces in enumerate((rows, columns)):
        joined = torch.cat(pieces, dim)
        for part, tensor in weight.parts().items():
            found = joined.parts()[part]
            assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)), part
    matrix = weight.dequantize()
    assert torch.equal(rows[1].dequantize(), matrix[128:])
    assert torch.equal(columns[1].dequantize(), matrix[:, 128:])


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8", "fp8-block"])
def test_a_piece_of_one_group_keeps_its_scale(name: str) -> None:
    """Its only scale is not that of a row, which any columns share."""
    scheme = SCHEMES[name]
    width = scheme.group_size
    weight = weight_of(scheme, torch.randn(8, 2 * width) * torch.rand(1, 2 * width))
    pieces = [weight[:, :width], weight[:, width:]]
    assert torch.equal(torch.cat(pieces, 1).dequantize(), weight.dequantize())
    x = torch.randn(3, width)
    alone = weight_of(scheme, torch.randn(8, width))
    y = torch.ops.masquant.linear(x, alone, None, None)
    assert (y - x @ alone.dequantize().t()).norm() < 0.2 * y.norm()


@every_scheme
def test_pickles(name: str) -> None:
    weight = full(SCHEMES[name])
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    back = torch.load(file, weights_only=True)
    assert back.__tensor_flatten__() == weight.__tensor_flatten__()
    assert torch.equal(back.dequantize(), weight.dequantize())


@every_scheme
def test_one_graph(name: str) -> None:
    weight = full(SCHEMES[name])

    def call(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.ops.masquant.linear(x, weight, ids, None)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 8):
        x, ids = torch.randn(tokens, K), torch.arange(tokens) % 3
        assert torch.equal(compiled(x, ids), call(x, ids))


class Siblings(torch.nn.Module):
    """Two linears that read one input."""

    def __init__(self) -> None:
        super().__init__()
        for name, rows in (("q", 32), ("k", 48)):
            linear = torch.nn.Linear(64, rows).requires_grad_(False)
            weight = weight_of(SCHEMES["nvfp4"], linear.weight)
            setattr(self, name, MASQuantLinear.from_float(linear, weight, name, None))
        share_smoothing(self)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.q(x), self.k(x)


def test_linears_that_share_an_input_round_it_once_in_a_graph() -> None:
    torch._dynamo.reset()
    module, x = Siblings(), torch.randn(5, 64)
    compiled = torch.compile(module, fullgraph=True)
    outputs, code = run_and_get_code(compiled, x)
    called = "\n".join(code).count
    assert called("torch.ops.masquant.float_smooth_quantize.default(") == 1
    assert called("torch.ops.masquant.float_linear.default(") == 2
    assert all(torch.equal(a, b) for a, b in zip(outputs, module(x)))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return qwen25_vl_of_width(128, 256, 1).eval()


@every_scheme
@pytest.mark.parametrize("method", ["masquant", "rtn"])
def test_a_model_is_calibrated_saved_and_loaded(
    name: str, method: str, model: Any, tmp_path: Path
) -> None:
    inputs = samples(audio=False, count=1)[0]
    quantized = copy.deepcopy(model)
    recipe = recipe_of(quantized, scheme=name, method=method)
    recipe.save(tmp_path / "r.safetensors")
    assert read_header(tmp_path / "r.safetensors")[0] == 5
    loaded = Recipe.load(tmp_path / "r.safetensors")
    assert loaded.layers == recipe.layers
    quantize_(quantized, masquant_config(loaded))
    scheme = loaded.options.number_format
    for layer_name, layer in loaded.layers.items():
        weight = quantized.get_submodule(layer_name).weight.data
        assert layer.made(weight, scheme, loaded.modalities)
        assert not layer.made(weight, SCHEMES["w8a8"], loaded.modalities)
    assert scheme_of(quantized) == name
    with torch.no_grad():
        exact, y = model(**inputs).logits, quantized(**inputs).logits
    bound = {4: 0.3, 8: 0.06}[SCHEMES[name].weight_bits]
    assert (y - exact).norm() < bound * exact.norm()
    quantized.save_pretrained(tmp_path / "m")
    config = CheckpointFormat.of(quantized).to_json()
    assert config["format_version"] == 5
    back = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        assert torch.equal(back(**inputs).logits, y)


def linear_of(model: Any) -> MASQuantLinear:
    return next(m for m in model.modules() if isinstance(m, MASQuantLinear))


REFUSALS: list[tuple[dict[str, Any], str]] = [
    (
        dict(scheme="nvfp4", group_size=64),
        "scheme 'nvfp4' has groups of 16, so group_size=64 has no place in it: leave it "
        "out.",
    ),
    (
        dict(scheme="fp8", epochs=2),
        "learning is for schemes of integers, and 'fp8' has floats: leave epochs out.",
    ),
    (
        dict(scheme="fp8", target="compressed-tensors"),
        "target 'compressed-tensors' has no fp8: take scheme 'w8a8' or 'w4a16'.",
    ),
]


@pytest.mark.parametrize("given, message", REFUSALS)
def test_options_that_have_no_place(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SolverOptions(**given)


def test_groups_that_do_not_divide_a_width() -> None:
    narrow = qwen25_vl_of_width(64, 80, 1)
    message = (
        "scheme 'mxfp4' has groups of 32, which do not divide the input width (80) of 1 of "
        "7 linears (model.language_model.layers.0.mlp.down_proj): exclude them, or take a "
        "scheme with one scale for each output channel."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        recipe_of(narrow, scheme="mxfp4")
    with pytest.raises(ValueError, match="'nvfp4' has groups of 16 channels, which do"):
        weight_of(SCHEMES["nvfp4"], torch.randn(4, 40))


def test_exports_say_that_they_have_no_floats(model: Any, tmp_path: Path) -> None:
    quantized = copy.deepcopy(model)
    recipe = recipe_of(quantized, scheme="mxfp8", method="rtn")
    quantize_(quantized, masquant_config(recipe))
    with pytest.raises(
        ValueError, match="is for activations in 'mxfp8', which has no op"
    ):
        check_layers(quantized)
    with pytest.raises(
        ValueError, match="'mxfp8', which are not exported to other eng"
    ):
        quantized.save_pretrained(tmp_path / "m")
        export_compressed_tensors(tmp_path / "m", tmp_path / "out")


@pytest.mark.parametrize(
    "given, message",
    [
        (
            dict(weight_format="e4m3"),
            "'e4m3' is for activations in a number format, too",
        ),
        (dict(act_format="e4m3", act_bits=4), "'e4m3' has 8 bits, got 4."),
        (dict(weight_format="fp6", act_format="e4m3"), "unknown number format 'fp6'"),
    ],
)
def test_formats_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MASQuantTensor.from_hp(torch.randn(4, 32), **given)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(row_scale=None), "row_scale must have shape (4,) for a weight in nvfp4, got"),
        (dict(scale=torch.rand(4, 2) + 0.011), "scale holds values that scales of 'nvf"),
        (dict(scale=torch.ones(4, 1)), "'nvfp4' has groups of 16, got scales for 32"),
        (dict(row_scale=-torch.ones(4)), "row_scale must be positive and finite."),
        (dict(qdata=torch.full((4, 32), 9, dtype=torch.int8)), "of 4 bits must lie in"),
    ],
)  # fmt: skip
def test_codes_that_a_format_does_not_have(
    change: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = dict(
        qdata=torch.randint(-8, 8, (4, 32), dtype=torch.int8),
        scale=torch.ones(4, 2),
        row_scale=torch.ones(4),
    )
    rest: dict[str, Any] = dict(
        weight_bits=4,
        act_bits=4,
        modalities=("text",),
        smoothing_factor=torch.ones(1, 32),
        dtype=torch.float32,
        weight_format="nvfp4",
        act_format="nvfp4",
    )
    MASQuantTensor.from_integers(**given, **rest)
    with pytest.raises(ValueError, match=re.escape(message)):
        MASQuantTensor.from_integers(**{**given, **change}, **rest)


def test_emulation_is_told_once() -> None:
    weight = weight_of(SCHEMES["fp8"], torch.randn(4, 32))
    float_instructions._warn.cache_clear()
    with pytest.warns(
        UserWarning, match="are emulated on this device \\(cpu\\)"
    ) as told:
        for _ in range(3):
            torch.ops.masquant.linear(torch.randn(2, 32), weight, None, None)
    assert len(told) == 1
