# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Copies of a quantized model, and what else may replace a model's forward."""

import copy
import functools
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
from linear_oracle import assert_routed, recorded
from tiny_models import (
    BOS,
    batch,
    omni_thinker,
    quantized,
    qwen25_vl,
    router,
    samples,
    true_ids,
)
from torchao.quantization import quantize_
from transformers import Qwen2_5_VLForConditionalGeneration

from torchao_masquant import MASQuantLinear, Router, calibrate, masquant_config
from torchao_masquant.routing import token_modalities

INPUTS = batch([BOS, "image", 11, "video"], [BOS, "small image", 12], seed=1)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, pickled, saved])
def test_a_copy_routes_its_own_calls(vl, twin_of):
    wanted = vl(**INPUTS).logits
    twin = twin_of(vl)
    assert router(twin) is not router(vl)
    assert type(twin) is type(vl) and twin.forward.__self__ is twin
    assert [r for r, _ in twin.modality_routers] == [router(twin)]
    routers = {m.router for m in twin.modules() if isinstance(m, MASQuantLinear)}
    assert routers == {router(twin)}
    with recorded(twin) as calls, recorded(vl) as others:
        found = twin(**INPUTS).logits
    assert_routed(calls, true_ids(vl, INPUTS), linears=14)
    assert others == []
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    # The original is of no concern to it any more.
    with token_modalities(vl, None):
        assert not router(twin).call.known
    for parameter in vl.lm_head.parameters():
        parameter.zero_()
    torch.testing.assert_close(twin(**INPUTS).logits, wanted, rtol=0, atol=1e-5)


def test_a_copy_made_in_the_middle_of_a_call_takes_no_call_along(vl):
    twins = []

    def take(*_):
        twins.append(copy.deepcopy(vl))

    handle = vl.model.language_model.norm.register_forward_pre_hook(take)
    vl(**INPUTS)
    handle.remove()
    assert not router(twins[0]).call.known and router(twins[0]).call.ids is None


def test_a_copy_of_a_part(vl):
    layer = copy.deepcopy(vl.model.language_model.layers[0])
    with token_modalities(layer, torch.tensor([[1, 0]])):
        assert not router(vl).call.known
        assert router(layer).call.known


def test_a_copy_of_a_plain_model(plain):
    twin = copy.deepcopy(plain)
    x, ids = torch.randn(1, 3, 16), torch.tensor([[2, 0, 1]])
    with token_modalities(twin, ids), recorded(twin) as calls:
        twin(x)
        with pytest.raises(RuntimeError, match="first: the modality of its tokens"):
            plain(x)
    assert_routed(calls, ids, linears=2)


def test_the_signature_is_unchanged(vl_recipe):
    model = qwen25_vl()
    before = inspect.signature(model.forward)
    quantized(model, vl_recipe)
    assert inspect.signature(model.forward) == before
    assert "input_ids" in before.parameters
    assert inspect.signature(copy.deepcopy(model).forward) == before


def test_the_class_of_a_routed_model_makes_plain_ones(vl):
    assert type(vl) is not Qwen2_5_VLForConditionalGeneration
    assert type(vl).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert type(type(vl)(vl.config)) is Qwen2_5_VLForConditionalGeneration


def test_detach_gives_the_class_forward_back(vl):
    routed = vl.forward
    Router(("text",)).detach(vl)
    assert vl.forward == routed
    router(vl).detach(vl)
    assert type(vl) is Qwen2_5_VLForConditionalGeneration
    assert not [m for m in vl.modules() if hasattr(m, "modality_routers")]
    with pytest.raises(RuntimeError, match="the modality of its tokens is not known"):
        vl(**INPUTS)
    router(vl).attach(vl)
    vl(**INPUTS)


def test_calibration_leaves_no_forward_behind():
    model = qwen25_vl()
    kinds = [type(m) for m in model.modules()]
    calibrate(model, samples(audio=False, count=1), progress=False)
    assert [type(m) for m in model.modules()] == kinds
    bad = [{**INPUTS, "pixel_values": INPUTS["pixel_values"] * float("nan")}]
    with pytest.raises(ValueError, match="holds nan or inf"):
        calibrate(model, bad, progress=False)
    assert [type(m) for m in model.modules()] == kinds
    assert not [m for m in model.modules() if "forward" in m.__dict__]


def replaced(model, calls):
    """Replace the forward of one instance, as accelerate does."""
    old = model.forward

    def new_forward(module, *args, **kwargs):
        calls.append(module)
        return old(*args, **kwargs)

    model.forward = functools.update_wrapper(functools.partial(new_forward, model), old)
    return old


def test_a_forward_replaced_before_is_still_called(vl_recipe):
    model, calls = qwen25_vl(), []
    before = inspect.signature(model.forward)
    replaced(model, calls)
    hooked = model.forward
    quantized(model, vl_recipe)
    assert inspect.signature(model.forward) == before
    with recorded(model) as linears:
        model(**INPUTS)
    assert calls == [model]
    assert_routed(linears, true_ids(model, INPUTS), linears=14)
    router(model).detach(model)
    assert model.forward is hooked


def test_a_forward_replaced_afterwards_routes_inside(vl):
    calls = []
    old = replaced(vl, calls)
    with recorded(vl) as linears:
        vl(**INPUTS)
    assert calls == [vl]
    assert_routed(linears, true_ids(vl, INPUTS), linears=14)
    vl.forward = old
    vl(**INPUTS)
    assert calls == [vl]


def test_quantized_in_two_goes_with_one_router(vl_recipe):
    model = qwen25_vl()
    quantize_(model, masquant_config(vl_recipe, include="*mlp*"))
    first = router(model)
    quantize_(model, masquant_config(vl_recipe, exclude="*mlp*"))
    assert {m.router for m in model.modules() if isinstance(m, MASQuantLinear)} == {
        first
    }
    with recorded(model) as calls:
        model(**INPUTS)
    assert_routed(calls, true_ids(model, INPUTS), linears=14)


def test_a_quantized_model_calibrates_again(vl_recipe):
    """The rest of a partly quantized model: two routers around one forward."""
    model = qwen25_vl()
    quantize_(model, masquant_config(vl_recipe, include="*.layers.0.*"))
    before = type(model), list(model.modality_routers)
    recipe = calibrate(
        model,
        samples(audio=False),
        scheme="w4a8",
        include="*language_model.layers.1.*",
        progress=False,
    )
    assert (type(model), model.modality_routers) == before
    quantize_(model, masquant_config(recipe))
    with recorded(model) as calls:
        model(**INPUTS)
    assert_routed(calls, true_ids(model, INPUTS), linears=14)


@pytest.mark.parametrize("method", ["smoothquant", "rtn"])
def test_a_method_that_treats_all_alike_needs_no_routing(method):
    model = quantized(qwen25_vl(), method=method)
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    zeros = torch.zeros_like(INPUTS["input_ids"])
    with recorded(model) as calls:
        model(**INPUTS)
    assert_routed(calls, zeros, linears=14)


def test_a_modality_without_recipe_is_refused(omni_recipe):
    model = omni_thinker()
    data = [
        {k: v for k, v in s.items() if not k.startswith(("input_f", "feature_"))}
        for s in samples(audio=False)
    ]
    for sample in data:
        sample["video_second_per_grid"] = torch.tensor([0.5])
    recipe = calibrate(model, data, modalities=("text", "vision"), progress=False)
    quantize_(model, masquant_config(recipe))
    with pytest.raises(ValueError, match="the call has audio tokens, but the model"):
        model(**batch([BOS, "audio", 11], audio=True))
    assert not router(model).call.known
    inputs = batch([BOS, "image", 11], audio=True)
    with recorded(model) as calls:
        model(**inputs)
    assert_routed(calls, true_ids(model, inputs), linears=14)


def test_a_model_that_is_gone_is_freed(vl_recipe):
    model = quantized(qwen25_vl(), vl_recipe)
    gone = weakref.ref(model)
    model(**INPUTS)
    del model
    gc.collect()
    assert gone() is None


def test_a_router_describes_itself(vl, plain):
    assert repr(router(vl)) == "Router(modalities=('text', 'vision'), from input_ids)"
    assert repr(router(plain)) == (
        "Router(modalities=('text', 'vision', 'audio'), from token_modalities)"
    )
