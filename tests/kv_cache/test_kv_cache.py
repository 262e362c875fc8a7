# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A cache of 8 and 4 bits: what it holds, what it gives, and for which models."""

import copy
import json

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_models import IMAGE, VIDEO, batch, quantized, qwen25_vl, samples
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicCache

from torchao_masquant import CacheRecipe, calibrate_cache, token_modalities
from torchao_masquant.kv_cache import quantized_layer, rounded_tokens
from torchao_masquant.kv_cache.rounded_tokens import round_tokens
from torchao_masquant.outputs import CACHE_FILE, CACHE_FORMAT, QUANT_METHOD
from torchao_masquant.routing import router_of

BITS = pytest.mark.parametrize("bits", [8, 4])


@pytest.fixture(autouse=True)
def short_window(monkeypatch):
    """Prompts of a few tokens are to be rounded."""
    monkeypatch.setattr(quantized_layer, "WINDOW", 2)
    monkeypatch.setattr(quantized_layer, "AT_ONCE", 3)


def tokens(kind: str, width: int = 64) -> torch.Tensor:
    """(B, H, S, D) of a kind that rounding could go wrong with."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, 5, width, generator=generator)
    if kind == "one loud channel":
        values[..., 5] *= 1000
    elif kind == "an offset":
        values += 300
    elif kind == "alike":
        values[:] = -2.75
    elif kind == "zeros":
        values.zero_()
    elif kind == "tiny":
        values *= 1e-30
    elif kind == "not contiguous":
        values = values.transpose(1, 2).contiguous().transpose(1, 2)
    return values


@BITS
@pytest.mark.parametrize("width", [64, 80, 7])
@pytest.mark.parametrize(
    "kind",
    [
        "usual",
        "one loud channel",
        "an offset",
        "alike",
        "zeros",
        "tiny",
        "not contiguous",
    ],
)
def test_no_channel_is_off_by_more_than_half_a_step(kind, width, bits):
    values = tokens(kind, width)
    held = round_tokens(values, bits)
    assert held.codes.dtype == (torch.uint8 if bits == 4 else torch.int8)
    assert held.codes.shape[-1] == ((width + 1) // 2 if bits == 4 else width)
    block = width & -width
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]]) * 0.5**0.5, matrix)
    rotation = torch.block_diag(*[matrix] * (width // block))
    wrong = (held.values(width).double() - values.double()) @ rotation
    # Half a step, and additions of float32 in either direction.
    size = values.double().abs().amax(-1, keepdim=True) * block**0.5
    bound = held.scale.double() / 2 + 32 * 2**-24 * size
    assert (wrong.abs() <= bound).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_broken_stays_broken_and_alone(value):
    values = tokens("usual")
    values[1, 2, 3, 4] = value
    found = round_tokens(values, 4).values(64)
    assert not found[1, 2, 3].isfinite().any()
    found[1, 2, 3] = 0
    assert found.isfinite().all()


@pytest.fixture(scope="module")
def seeing():
    model = qwen25_vl()
    return model, calibrate_cache(model, samples(audio=False), progress=False)


def keys_of(model, inputs, kind="keys"):
    """(B, H, S, D) of each layer, as they are cached."""
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    return [getattr(layer, kind) for layer in cache.layers]


def test_centers_are_means_of_each_modality_s_keys(seeing):
    model, recipe = seeing
    assert recipe.modalities == ("text", "vision")
    data = samples(audio=False)
    assert (
        any((inputs["attention_mask"] == 0).any() for inputs in data) or len(data) > 1
    )
    for index, center in enumerate(recipe.centers):
        for number, modality in enumerate(recipe.modalities):
            mine = []
            for inputs in data:
                keys = keys_of(model, inputs)[index].transpose(1, 2).double()
                seen = torch.isin(inputs["input_ids"], torch.tensor([IMAGE, VIDEO]))
                chosen = seen if modality == "vision" else ~seen
                mine.append(keys[chosen & (inputs["attention_mask"] != 0)])
            mine = torch.cat(mine)
            torch.testing.assert_close(center[number].double(), mine.mean(0))
            factor = mine.std(0, correction=0).sqrt()
            factor = factor / factor.log().mean(-1, keepdim=True).exp()
            torch.testing.assert_close(
                recipe.factors[index][number].double(), factor, rtol=1e-4, atol=1e-6
            )
    assert router_of(model) is None


def test_what_all_tokens_share(seeing):
    """Of keys and values without padding; no rotated key is further off than is said."""
    model, recipe = seeing
    seen = [[], []]
    for inputs in samples(audio=False):
        known = inputs["attention_mask"] != 0
        for parts, kind in zip(seen, ("keys", "values")):
            states = keys_of(model, inputs, kind)[1].transpose(1, 2)
            parts.append(states[known].double())
    keys, values = map(torch.cat, seen)
    shared = recipe.shared[1]
    torch.testing.assert_close(shared.key_center.double(), keys.mean(0))
    factor = keys.std(0, correction=0).sqrt()
    factor = factor / factor.log().mean(-1, keepdim=True).exp()
    torch.testing.assert_close(shared.key_factor.double(), factor, rtol=1e-4, atol=0)
    width = keys.shape[-1]
    turn = rounded_tokens.rotation(width, torch.device("cpu")).double()
    rotated = ((keys - keys.mean(0)) / factor) @ turn
    key_far, value_most = shared.largest.tolist()
    assert rotated.abs().max() < key_far < 8 * rotated.abs().max()
    assert value_most == pytest.approx(values.abs().max().item())


def held(layer):
    """(B, H, S, D) keys of all tokens, as a call would attend to them."""
    return torch.cat((layer._dequantized()[0], layer.recent_keys), -2)


@torch.no_grad()
def said(model, inputs, cache, steps: int = 6):
    """Logits of a prompt, and of tokens that follow it one by one."""
    found = [model(**inputs, past_key_values=cache, use_cache=True).logits]
    for token in range(21, 21 + steps):
        rows = torch.full((len(inputs["input_ids"]), 1), token)
        found.append(
            model(input_ids=rows, past_key_values=cache, use_cache=True).logits
        )
    return torch.cat(found, 1)


PROMPT = [21, "image", 22, 23, 24, 25]


@pytest.mark.parametrize("bits, bound", [(8, 0.05), (4, 0.3)])
@pytest.mark.parametrize("scheme", [None, "w8a8"])
def test_decoding_from_it_is_close_to_decoding_from_an_exact_one(bits, bound, scheme):
    model = qwen25_vl()
    if scheme is not None:
        quantized(model, scheme=scheme)
    recipe = calibrate_cache(model, samples(audio=False), progress=False)
    inputs = batch(PROMPT)
    exact = said(model, inputs, DynamicCache(config=model.config.get_text_config()))
    cache = recipe.new_cache(model, bits=bits)
    found = said(model, inputs, cache)
    length = inputs["input_ids"].shape[1]
    # Of the prompt nothing is rounded yet.
    assert torch.equal(found[:, :length], exact[:, :length])
    wrong = (found - exact)[:, length:].norm() / exact[:, length:].norm()
    assert 0 < wrong < bound
    assert cache.get_seq_length() == length + 6


def test_a_center_of_each_modality_is_worth_something(seeing):
    """Keys of images have another mean here; with that of text in its place they lose."""
    model, recipe = seeing
    confused = copy.deepcopy(recipe)
    for number, center in enumerate(confused.centers):
        confused.centers[number] = center[:1].expand_as(center) + 20
    inputs = batch(PROMPT)
    exact = keys_of(model, inputs)
    wrong = []
    for known in (recipe, confused):
        cache = known.new_cache(model, bits=4)
        said(model, inputs, cache, steps=0)
        found = [held(layer) for layer in cache.layers]
        wrong.append(sum((a - b).square().sum() for a, b in zip(found, exact)))
    assert wrong[0] < wrong[1] / 2


@BITS
def test_bytes(seeing, bits):
    model, recipe = seeing
    cache = recipe.new_cache(model, bits=bits)
    inputs = batch(PROMPT)
    said(model, inputs, cache, steps=0)
    batch_size, length = inputs["input_ids"].shape
    (heads, width) = recipe.centers[0].shape[1:]
    # Codes, a step and an offset of keys and of values; and a byte that tells the modality.
    token = 2 * heads * (width * bits // 8 + 4) + 1
    recent = 2 * heads * width * 4 + 1
    last = 2 + (length - 2) % 3
    expected = batch_size * ((length - last) * token + last * recent)
    assert [layer.nbytes for layer in cache.layers] == [expected] * 2


def test_the_last_tokens_are_held_as_they_are(seeing):
    """Of any call, and while one token follows the other; the others are rounded once."""
    model, recipe = seeing
    window, at_once, heads = 2, 3, recipe.centers[0].shape[1]
    layer = recipe.new_cache(model, bits=4).layers[0]
    layer._ids_of = lambda keys: torch.zeros(1, 1, keys.shape[2], 1, dtype=torch.uint8)
    given = torch.randn(1, heads, 20, recipe.centers[0].shape[2])
    rounded, at = {}, 0
    for step in (2, 8, 1, 1, 7, 1):
        part = given[:, :, at : at + step]
        keys, values = layer.update(part, -part)
        at += step
        assert layer.get_seq_length() == keys.shape[2] == values.shape[2] == at
        recent = layer.recent_keys.shape[2]
        assert torch.equal(
            held(layer)[:, :, at - recent :], given[:, :, at - recent : at]
        )
        assert min(at, window) <= recent < window + at_once
        old = layer._dequantized()[0]
        for count, earlier in rounded.items():
            assert torch.equal(old[:, :, :count], earlier)
        rounded[old.shape[2]] = old
        assert not (old == given[:, :, : old.shape[2]]).all(-1).any()
    assert len(rounded) > 3


def test_generate(seeing):
    model, recipe = seeing
    inputs = batch(PROMPT)
    given = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    exact = model.generate(**inputs, **given)
    found = model.generate(**inputs, **given, past_key_values=recipe.new_cache(model))
    # A random model's answers part where a logit is off by little: these are the first.
    assert torch.equal(found[:, :-1], exact[:, :-1])
    for beams in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        cache = recipe.new_cache(model)
        several = model.generate(**inputs, **given, **beams, past_key_values=cache)
        assert several.shape == (beams.get("num_return_sequences", 1), exact.shape[1])


def test_rows_are_taken_repeated_and_cropped(seeing):
    model, recipe = seeing
    inputs = batch(PROMPT, PROMPT[::-1])
    cache = recipe.new_cache(model, bits=4)
    said(model, inputs, cache, steps=2)
    layer = cache.layers[0]
    before, length = held(layer), layer.get_seq_length()
    assert 0 < layer.recent_keys.shape[2] < length
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(held(layer), before[[1, 0]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(held(layer), before[[1, 1, 0, 0]])
    cache.batch_select_indices(torch.tensor([2]))
    assert torch.equal(held(layer), before[[0]])
    # Within what is held as it is, and beyond it.
    for removed in (1, 5):
        cache.crop(-removed)
        length -= removed
        assert cache.get_seq_length() == length
        assert torch.equal(held(layer), before[[0], :, :length])
    with pytest.raises(ValueError, match="minus the number of tokens"):
        layer.crop(2)
    cache.reset()
    assert cache.get_seq_length() == 0 and layer.nbytes == 0


def test_a_copy_goes_on_from_what_is_held(seeing):
    """A prefix is cached once and copied for each prompt that begins with it."""
    model, recipe = seeing
    prefix = recipe.new_cache(model)
    said(model, batch(PROMPT), prefix, steps=0)
    length = prefix.get_seq_length()
    exact = said(model, batch([23, 24]), copy.deepcopy(prefix))
    assert prefix.get_seq_length() == length
    other, cache = copy.deepcopy((model, prefix))
    assert torch.equal(said(other, batch([23, 24]), cache), exact)
    assert torch.equal(said(model, batch([23, 24]), prefix), exact)


def test_caches_of_one_model_share_what_its_calls_tell():
    model = qwen25_vl(1)
    recipe = calibrate_cache(model, samples(audio=False), progress=False)
    caches = [recipe.new_cache(model) for _ in range(3)]
    assert len(model.modality_routers) == 1
    exact = said(model, batch(PROMPT[2:]), caches[0])
    embeds = model.get_input_embeddings()(batch(PROMPT[2:])["input_ids"])
    with pytest.raises(RuntimeError, match="the modality of its tokens is not known"):
        model(inputs_embeds=embeds, past_key_values=caches[1], use_cache=True)
    with token_modalities(model, None), torch.no_grad():
        found = model(inputs_embeds=embeds, past_key_values=caches[2], use_cache=True)
    assert torch.equal(found.logits, exact[:, : embeds.shape[1]])


def test_a_cache_of_fewer_modalities_refuses_calls_with_others_and_no_more():
    model, data = qwen25_vl(1), samples(audio=False)
    words = [{"input_ids": torch.tensor([[21, 22, 23]])}]
    recipe = calibrate_cache(model, words, modalities=["text"], progress=False)
    with pytest.raises(ValueError, match="of vision, and its cache was calibrated for"):
        said(model, batch(PROMPT), recipe.new_cache(model))
    said(model, words[0], recipe.new_cache(model))
    # The model is as it was: it takes images, and may be calibrated for all.
    keys_of(model, batch(PROMPT))
    other = calibrate_cache(model, data, modalities=["vision", "text"], progress=False)
    # By name: the first of this recipe's is not the model's.
    cache = other.new_cache(model)
    said(model, batch(PROMPT), cache, steps=0)
    seen = torch.isin(batch(PROMPT)["input_ids"], torch.tensor([IMAGE, VIDEO]))
    layer = cache.layers[0]
    ids = torch.cat((layer.ids, layer.recent_ids), 2)
    assert torch.equal(ids[:, 0, :, 0] == 0, seen)
    assert len(model.modality_routers) == 1


def test_a_file(seeing, tmp_path):
    model, recipe = seeing
    recipe.save(tmp_path / "cache.safetensors")
    loaded = CacheRecipe.load(tmp_path / "cache.safetensors")
    assert loaded.modalities == recipe.modalities
    for kind in ("centers", "factors"):
        for ours, theirs in zip(getattr(loaded, kind), getattr(recipe, kind)):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(loaded.shared, recipe.shared, strict=True):
        assert all(map(torch.equal, ours, theirs))
    with pytest.raises(FileNotFoundError, match="there is no cache recipe"):
        CacheRecipe.load(tmp_path / "none.safetensors")
    tiny_models.recipe_of(qwen25_vl(1)).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not what calibrate_cache found"):
        CacheRecipe.load(tmp_path / "other.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        CacheRecipe.load(tmp_path / "damaged.safetensors")
    found = load_file(tmp_path / "cache.safetensors")
    # As it was written before engines were given any.
    found = {n: t for n, t in found.items() if not n.startswith("shared.")}
    header = {"format": CACHE_FORMAT, "modalities": '["text", "vision"]'}
    save_file(found, tmp_path / "old.safetensors", metadata=header)
    assert CacheRecipe.load(tmp_path / "old.safetensors").shared == []
    for file, changed in (
        ("more", {"modalities": '["text"]'}),
        ("text", {"modalities": '"text"'}),
    ):
        save_file(found, tmp_path / file, metadata=header | changed)
        with pytest.raises(
            ValueError, match="not one centre for each of its modalities"
        ):
            CacheRecipe.load(tmp_path / file)
    del found["factors.0"]
    save_file(found, tmp_path / "less.safetensors", metadata=header)
    with pytest.raises(ValueError, match="is damaged: .*factors.0"):
        CacheRecipe.load(tmp_path / "less.safetensors")
    recipe.save(tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match="is no recipe of a quantized cache, so it is"):
        recipe.save(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        recipe.save(tmp_path / "none" / "cache.safetensors")


def test_in_a_quantized_folder_it_has_a_name_that_is_known(seeing, tmp_path):
    _, recipe = seeing
    with pytest.raises(IsADirectoryError, match="give the name of a file"):
        recipe.save(tmp_path)
    entry = {"quantization_config": {"quant_method": QUANT_METHOD}}
    (tmp_path / "config.json").write_text(json.dumps(entry))
    with pytest.raises(FileNotFoundError, match="there is no cache recipe"):
        CacheRecipe.load(tmp_path)
    recipe.save(tmp_path)
    assert (tmp_path / CACHE_FILE).is_file()
    assert CacheRecipe.load(tmp_path).modalities == recipe.modalities


def test_what_does_not_fit_is_refused_in_a_sentence(seeing):
    model, recipe = seeing
    data = samples(audio=False)
    with pytest.raises(ValueError, match=r"a cache has 8 or 4 bits, got 3"):
        recipe.new_cache(model, bits=3)
    with pytest.raises(ValueError, match="of 2 layers, and the model has 1"):
        recipe.new_cache(qwen25_vl(1))
    with pytest.raises(TypeError, match="a model of transformers, got a Linear"):
        calibrate_cache(torch.nn.Linear(2, 2), data)
    with pytest.raises(TypeError, match="one dict"):
        calibrate_cache(model, data[0])
    with pytest.raises(ValueError, match="samples"):
        calibrate_cache(model, [])
    text_alone = [{"input_ids": torch.tensor([[21, 22, 23]])}]
    with pytest.raises(ValueError, match="no tokens of vision: add samples"):
        calibrate_cache(model, text_alone)
    only = calibrate_cache(model, text_alone, modalities=["text"], progress=False)
    assert only.centers[0].shape[0] == 1
    for name, what in (("v_proj", "a value"), ("k_proj", "a key")):
        broken = copy.deepcopy(model)
        with torch.no_grad():
            getattr(broken.get_decoder().layers[1].self_attn, name).bias[0] = torch.nan
        with pytest.raises(ValueError, match=f"{what} of layer 1 is nan or inf"):
            calibrate_cache(broken, data, progress=False)


def test_encoders_are_refused():
    config = T5Config(num_layers=1, d_model=32, d_ff=32, num_heads=2, d_kv=16)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="for models of a decoder alone"):
        calibrate_cache(model, [{}])


def test_windows_are_refused():
    config = Gemma3Config(text_config={"num_hidden_layers": 2, "hidden_size": 32})
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(config)
    with pytest.raises(
        ValueError, match="layers of sliding_attention: a quantized cache"
    ):
        calibrate_cache(model, [{}])
