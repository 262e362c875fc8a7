# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What is exported for other engines; ``make test-vllm`` has it read by them."""

import json

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny_models import batch, quantized, qwen3_vl_moe, qwen25_vl, samples
from torchao.quantization import quantize_
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2_5_VLForConditionalGeneration,
)

from torchao_masquant import (
    MASQuantConfig,
    calibrate,
    masquant_config,
    save_quantized,
)
from torchao_masquant.__main__ import main
from torchao_masquant.deploy import export_compressed_tensors
from torchao_masquant.sequential import calibrate_sequential

STOCK = {"target": "compressed-tensors"}
SCHEMES = {"w8a8": {}, "w4a16": {"group_size": 32}}


def unpacked(packed: torch.Tensor, count: int) -> torch.Tensor:
    """As the format has it: eight to an int32, the first lowest, 8 for zero."""
    numbers = packed.long() & 0xFFFFFFFF
    return torch.stack([(numbers >> 4 * i & 15) - 8 for i in range(8)], -1).flatten(1)[
        :, :count
    ]


def weight_of(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """(N, K) float64 of a linear in an exported file."""
    scale = stored[f"{name}.weight_scale"].double()
    if f"{name}.weight" in stored:
        return stored[f"{name}.weight"].double() * scale
    n, k = stored[f"{name}.weight_shape"].tolist()
    integers = unpacked(stored[f"{name}.weight_packed"], k).double()
    zeros = unpacked(stored[f"{name}.weight_zero_point"].t(), n).t().double()
    groups = integers.unflatten(1, (zeros.shape[1], -1))
    return ((groups - zeros[..., None]) * scale[..., None]).flatten(1)


@pytest.fixture(scope="module", params=list(SCHEMES))
def exported(request, tmp_path_factory):
    """A quantized model, and the folder that is exported of it."""
    folder = tmp_path_factory.mktemp(request.param)
    model = quantized(
        qwen25_vl(), scheme=request.param, **STOCK, **SCHEMES[request.param]
    )
    save_quantized(model, folder / "quantized")
    (folder / "quantized" / "tokenizer.json").write_text("{}")
    return model, export_compressed_tensors(folder / "quantized", folder / "stock")


@torch.no_grad()
def test_plain_weights_give_what_the_quantized_model_gives(exported):
    """Rounding of activations apart, which a hook does here as engines do."""
    model, folder = exported
    (weights,) = folder.glob("*.safetensors")
    stored = load_file(weights)
    names = [n.removesuffix(".weight_scale") for n in stored if "weight_scale" in n]
    assert len(names) == 14
    plain = {n: t for n, t in stored.items() if n.rpartition(".")[0] not in names}
    for name in names:
        plain[f"{name}.weight"] = weight_of(stored, name).float()
        if f"{name}.bias" in stored:
            plain[f"{name}.bias"] = stored[f"{name}.bias"]
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    dense = folder.parent / "dense"
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps(config))
    save_file(plain, dense / "model.safetensors", {"format": "pt"})
    engine = Qwen2_5_VLForConditionalGeneration.from_pretrained(dense).eval()
    if quantization["config_groups"]["group_0"]["input_activations"]:
        for name in names:
            layer = name.replace("model.layers", "model.language_model.layers")
            engine.get_submodule(layer).register_forward_pre_hook(_rounded)
    inputs = batch([21, "image", 22, 23], [24, "image", 25])
    ours, theirs = model(**inputs).logits, engine(**inputs).logits
    # Where a factor is folded tokens are rounded with other last bits.
    tolerance = 1e-4 if quantization["format"] == "pack-quantized" else 0.1
    assert (ours - theirs).abs().max() < tolerance
    assert (ours - theirs).square().mean().sqrt() < tolerance / 10


def _rounded(module, args):
    (x,) = args
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
    return ((x / scale).round() * scale,)


@torch.no_grad()
def test_a_norm_of_one_plus_its_weight(tmp_path):
    """What q_proj makes of a token that the norm has not scaled yet is the same."""
    sizes = dict(hidden_size=64, intermediate_size=96, head_dim=16)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=64, **sizes, **heads)).eval()
    block = model.model.layers[0]
    block.input_layernorm.weight.normal_(std=0.5)
    data = [{"input_ids": torch.randint(3, 64, (2, 40))} for _ in range(2)]
    recipe = calibrate(model, data, scheme="w8a8", progress=False, **STOCK)
    quantize_(model, masquant_config(recipe))
    save_quantized(model, tmp_path / "quantized")
    export_compressed_tensors(tmp_path / "quantized", tmp_path / "stock")
    stored = load_file(tmp_path / "stock" / "model.safetensors")
    before = block.self_attn.q_proj.weight.dequantize(torch.float64)
    before = before * (1 + block.input_layernorm.weight.double())
    scales = 1 + stored["model.layers.0.input_layernorm.weight"].double()
    assert scales.abs().min() > 0.49
    after = weight_of(stored, "model.layers.0.self_attn.q_proj") * scales
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_what_lies_in_the_folder(exported):
    model, folder = exported
    assert (folder / "tokenizer.json").read_text() == "{}"
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "compressed-tensors"
    assert [p.replace("(.*\\.)?", "") for p in said["ignore"]] == [
        "re:visual(\\..*)?$",
        "re:lm_head(\\..*)?$",
    ]
    weights = said["config_groups"]["group_0"]["weights"]
    expected = {
        8: (True, "channel", None),
        4: (False, "group", 32),
    }
    assert (
        weights["symmetric"],
        weights["strategy"],
        weights["group_size"],
    ) == expected[weights["num_bits"]]


def test_what_files_call_otherwise_is_left_alone_by_that_name(tmp_path):
    """transformers calls Mixtral's mixture ``mlp``, and its files do not."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=64, num_hidden_layers=1, **sizes, **heads)
    model = quantized(
        MixtralForCausalLM(config), scheme="w8a8", exclude="*.experts.*", **STOCK
    )
    save_quantized(model, tmp_path / "quantized")
    # Transformers loads no such thing.
    file = tmp_path / "quantized" / "model.safetensors"
    tensors = {**load_file(file), "mtp.fc.weight": torch.ones(32, 64)}
    save_file(tensors, file, {"format": "pt"})
    folder = export_compressed_tensors(tmp_path / "quantized", tmp_path / "stock")
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert [p.replace("(.*\\.)?", "") for p in said["ignore"]] == [
        f"re:{name}(\\..*)?$" for name in ("mlp", "lm_head", "block_sparse_moe", "mtp")
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"scheme": "w8a8"},
            "has a rotation and low-rank pairs and a shift and biases",
        ),
        (
            {"scheme": "w8a8", "rank": 0, "hadamard_size": 1, "shift": False}
            | {"separation": 1.0},
            "has factors of modalities' own and biases of modalities, which other",
        ),
        (
            {"scheme": "w4a8", "method": "rtn"},
            "has weights of 4 bits in groups of None",
        ),
    ],
    ids=["default", "separated", "w4a8"],
)
def test_what_no_other_engine_runs(options, message, tmp_path):
    save_quantized(quantized(qwen25_vl(layers=1), **options), tmp_path / "quantized")
    with refused(message) as raised:
        export_compressed_tensors(tmp_path / "quantized", tmp_path / "stock")
    assert "calibrate with target='compressed-tensors'" in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["quantized"]


def test_a_factor_that_nothing_can_take(tmp_path):
    """SmoothQuant's factor of o_proj differs between heads that share their values."""
    model = quantized(qwen25_vl(layers=1), scheme="w8a8", method="smoothquant")
    save_quantized(model, tmp_path / "quantized")
    with refused("o_proj has a smoothing factor that nothing before it can take"):
        export_compressed_tensors(tmp_path / "quantized", tmp_path / "stock")


def test_rounded_to_nearest_without_factors(tmp_path):
    save_quantized(
        quantized(qwen25_vl(layers=1), scheme="w8a8", method="rtn"), tmp_path / "rtn"
    )
    export_compressed_tensors(tmp_path / "rtn", tmp_path / "stock")
    before, after = (
        load_file(next((tmp_path / name).glob("*.safetensors")))
        for name in ("rtn", "stock")
    )
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(before[norm], after[norm])


def test_refused_before_it_is_calibrated():
    model = qwen3_vl_moe(layers=1)
    with refused("is of experts, which are not exported to other engines"):
        calibrate(model, samples(audio=False), scheme="w8a8", **STOCK)
    with refused("is solved for in memory alone"):
        calibrate_sequential("model", [], scheme="w8a8", recipe="recipe", **STOCK)
    with refused("is for calibrate"):
        quantize_(model, MASQuantConfig(step="prepare", scheme="w8a8", **STOCK))


def test_the_command(tmp_path, capsys, exported):
    quantized_folder = str(exported[1].parent / "quantized")
    target = str(tmp_path / "stock")
    command = ["export", quantized_folder, target, "--format", "compressed-tensors"]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--kernels", "aten"])
    assert "--kernels goes with --format package" in capsys.readouterr().err
    assert main(command) == 0
    assert f"Run it: vllm serve {target}." in capsys.readouterr().out
    assert main(command) == 1
    assert "is there already" in capsys.readouterr().err
