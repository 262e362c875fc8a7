# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``head_bits=8``: an output head of its own, or one whose weight was the embeddings'."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import whole_omni
from checkpoints import assert_same_logits, assert_same_state, logits
from linear_oracle import assert_routed, literal, recorded
from torch import nn
from torchao.quantization import quantize_
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    BertConfig,
    BertLMHeadModel,
    TorchAoConfig,
)

from torchao_masquant import (
    MASQuantConfig,
    MASQuantLinear,
    Recipe,
    calibrate,
    masquant_config,
)
from torchao_masquant.models.names import named_here
from torchao_masquant.sequential import calibrate_sequential

HEAD = "lm_head"


def made(is_tied: bool) -> Any:
    model = tiny_models.qwen25_vl(layers=1)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = is_tied
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(
        all_submodels=True
    )
    model.tie_weights()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == is_tied
    return model


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "of its own"])
def original(request: Any, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("original")
    made(request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(original: Path) -> Recipe:
    return tiny_models.recipe_of(load(original), head_bits=8)


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, **options)


def test_logits_of_the_last_token_of_a_call_with_an_image(
    original: Path, recipe: Recipe
) -> None:
    """The head sees fewer tokens than there are, of which it is not told."""
    model = tiny_models.quantized(load(original), recipe)
    inputs = tiny_models.batch([tiny_models.BOS, "image", *tiny_models.words(4)])
    with recorded(model) as calls, torch.no_grad():
        model(**inputs, logits_to_keep=1)
    (call,) = [call for call in calls if call.name == HEAD]
    assert call.x.shape[1] == 1 < inputs["input_ids"].shape[1]
    assert (call.linear.weight.weight_bits, call.linear.weight.act_bits) == (8, 8)
    assert_routed([call], torch.zeros(1, 1, dtype=torch.int64))


def test_an_outlier_costs_little() -> None:
    """Unrotated, the channel that is 50 times as loud takes 34 dB off the others."""
    model = tiny_models.qwen25_vl(layers=1)
    dense = model.lm_head.weight.detach().double()
    tiny_models.quantized(model, head_bits=8)
    x = torch.randn(64, dense.shape[1], generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 50
    with torch.no_grad():
        found, plain = model.lm_head(x).double(), x.double() @ dense.T
    error = (found - plain).square().sum() / plain.square().sum()
    # Rounding a normal token of K = 64 and a row of the weight to 127 steps of its largest
    # value, 4 sigma, is an error of (4 / 127)^2 / 12 each. The outlier makes all 64 values
    # about as large as each other, which is less.
    assert error < 2 * (4 / 127) ** 2 / 12


def test_files_and_whatever_applies_them_give_the_same(
    original: Path, recipe: Recipe, tmp_path: Path
) -> None:
    model = tiny_models.quantized(load(original), recipe)
    assert not model.config.get_text_config().tie_word_embeddings
    embeddings = model.get_input_embeddings().weight
    assert torch.equal(embeddings, load(original).get_input_embeddings().weight)
    inputs = tiny_models.samples(audio=False, count=1)[0]

    recipe.save(file := tmp_path / "recipe.safetensors")
    assert Recipe.load(file).layers == recipe.layers
    model.save_pretrained(tmp_path / "saved")
    assert_same_logits(model, load(tmp_path / "saved"), inputs)
    while_loading = load(
        original, quantization_config=TorchAoConfig(masquant_config(file))
    )
    assert_same_state(model, while_loading)
    while_loading.save_pretrained(tmp_path / "again")
    assert_same_logits(model, load(tmp_path / "again"), inputs)

    calibrate_sequential(
        original,
        tiny_models.samples(audio=False),
        output=tmp_path / "from disk",
        recipe=tmp_path / "from disk.safetensors",
        scheme="w4a8",
        head_bits=8,
        progress=False,
    )
    assert_same_logits(model, load(tmp_path / "from disk"), inputs)
    found = Recipe.load(tmp_path / "from disk.safetensors")
    assert found.layers == recipe.layers and found.options == recipe.options


def test_steps(original: Path, recipe: Recipe) -> None:
    options: dict[str, Any] = {"scheme": "w4a8", "head_bits": 8}
    model = load(original)
    quantize_(model, MASQuantConfig(step="prepare", **options))
    for sample in tiny_models.samples(audio=False):
        model(**sample)
    quantize_(model, MASQuantConfig(step="convert", **options))
    assert_same_state(model, tiny_models.quantized(load(original), recipe))
    empty = load(original)
    quantize_(empty, MASQuantConfig(step="prepare_for_loading", **options))
    empty.load_state_dict(model.state_dict())
    assert_same_state(model, empty)


def test_without_data(original: Path) -> None:
    model = load(original)
    quantize_(model, MASQuantConfig(step="convert", method="rtn", head_bits=8))
    assert type(model.lm_head) is MASQuantLinear
    assert model.lm_head.weight.hadamard_size == tiny_models.HIDDEN


def test_a_recipe_narrowed_to_the_rest(original: Path, recipe: Recipe) -> None:
    model = load(original)
    quantize_(model, masquant_config(recipe, exclude=HEAD))
    assert type(model.lm_head) is nn.Linear
    # Of a tied one the embeddings go on to be the weight.
    assert_same_state(
        {HEAD: model.lm_head.weight}, {HEAD: load(original).lm_head.weight}
    )


def test_excluded_it_stays(original: Path, tmp_path: Path) -> None:
    """In whatever way the rest is quantized."""
    options: dict[str, Any] = {"scheme": "w4a8", "head_bits": 8, "exclude": f"*{HEAD}"}
    samples = tiny_models.samples(audio=False)
    assert HEAD not in calibrate(load(original), samples, **options).layers
    calibrate_sequential(
        original, samples, output=tmp_path / "on disk", progress=False, **options
    )
    in_steps, rounded, empty = load(original), load(original), load(original)
    quantize_(in_steps, MASQuantConfig(step="prepare", **options))
    for sample in samples:
        in_steps(**sample)
    quantize_(in_steps, MASQuantConfig(step="convert", **options))
    quantize_(rounded, MASQuantConfig(step="convert", method="rtn", **options))
    quantize_(empty, MASQuantConfig(step="prepare_for_loading", **options))
    empty.load_state_dict(in_steps.state_dict())
    for model in (load(tmp_path / "on disk"), in_steps, rounded, empty):
        assert type(model.lm_head) is nn.Linear
        assert_same_state(
            {HEAD: model.lm_head.weight}, {HEAD: load(original).lm_head.weight}
        )


def test_a_class_without_a_head_loads_the_rest(
    original: Path, recipe: Recipe, tmp_path: Path
) -> None:
    model = tiny_models.quantized(load(original), recipe)
    model.save_pretrained(tmp_path)
    inputs = tiny_models.samples(audio=False, count=1)[0]
    with torch.no_grad():
        found = AutoModel.from_pretrained(tmp_path)(**inputs).last_hidden_state
        expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(found, expected)


def test_dense_again(original: Path, recipe: Recipe, tmp_path: Path) -> None:
    """A plain head beside the embeddings, which the config does not tie to it."""
    model = tiny_models.quantized(load(original), recipe)
    model.dequantize()
    assert type(model.lm_head) is nn.Linear
    model.save_pretrained(tmp_path)
    inputs = tiny_models.samples(audio=False, count=1)[0]
    assert torch.equal(logits(load(tmp_path), inputs), logits(model, inputs))


def test_a_bias_that_was_shared_with_another_part(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        is_decoder=True,
    )
    torch.manual_seed(0)
    model = BertLMHeadModel(config).eval()
    model.cls.predictions.bias.data.normal_()
    quantize_(model, MASQuantConfig(step="convert", method="rtn", head_bits=8))
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": torch.arange(6)[None]}
    assert_same_logits(model, BertLMHeadModel.from_pretrained(tmp_path), inputs)


def test_a_quantized_head_is_not_resized(original: Path, recipe: Recipe) -> None:
    """Embeddings would have another size already when the head can't follow."""
    model = tiny_models.quantized(load(original), recipe)
    rows = model.get_input_embeddings().num_embeddings
    with pytest.raises(ValueError, match="resize before you quantize, or call deq"):
        model.resize_token_embeddings(rows + 8)
    assert model.get_input_embeddings().num_embeddings == rows
    model.dequantize()
    model.resize_token_embeddings(rows + 8)
    assert model.lm_head.out_features == rows + 8


def test_the_head_of_a_whole_omni_is_that_of_its_thinker() -> None:
    model = whole_omni.whole_omni()
    assert list(named_here(model, {HEAD: 0})) == [f"thinker.{HEAD}"]
    assert list(named_here(model.thinker, {f"thinker.{HEAD}": 0})) == [HEAD]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            lambda: tiny_models.qwen25_vl(layers=1).model,
            {},
            "Qwen2_5_VLModel has no output head that head_bits=8 could round: leave "
            "head_bits out, or take the class with a head.",
        ),
        (
            lambda: tiny_models.quantized(
                tiny_models.qwen25_vl(layers=1), method="rtn"
            ),
            {},
            "is a MASQuantLinear, not a plain nn.Linear",
        ),
        (
            lambda: tiny_models.qwen25_vl(layers=1),
            {"head_bits": 4},
            "head_bits must be 8 or 16, got 4.",
        ),
        (
            lambda: tiny_models.qwen25_vl(layers=1),
            {"target": "compressed-tensors", "scheme": "w8a8"},
            "head_bits=8 has no place in it: leave it out.",
        ),
    ],
    ids=["no head", "quantized", "4 bits", "another engine"],
)
def test_refused(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=literal(message)):
        tiny_models.recipe_of(model(), **{"head_bits": 8, **options})
