# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A forward of one instance (accelerate's hooks, monkeypatches), whenever it is put on."""

import copy
import functools
import pickle
import types

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import extract_model_from_parallel
from tiny_models import (
    BOS,
    IMAGE,
    batch,
    quantized,
    qwen3_vl_moe,
    qwen25_vl,
    recipe_of,
    router,
    samples,
    words,
)
from torch import nn
from torchao.quantization import quantize_

from torchao_masquant import MASQuantConfig, MASQuantLinear, calibrate, masquant_config
from torchao_masquant.expert_modules import MASQuantExperts
from torchao_masquant.models.experts import projections

OPTIONS = {"scheme": "w4a8", "rounding": "nearest", "alpha": 0.5, "separation": 1.0}
MAKERS = {"linears": qwen25_vl, "experts": qwen3_vl_moe}


def data_for(make):
    if make is qwen25_vl:
        return samples(audio=False)
    data = [batch([BOS, *words(8, s), "image", *words(5)], seed=s) for s in range(4)]
    return [{**d, "mm_token_type_ids": (d["input_ids"] == IMAGE).int()} for d in data]


DATA = samples(audio=False)


class Patches:
    """Forwards of instances that call the one from before, each found another way."""

    def __init__(self, kind):
        self.kind, self.called, self.before = kind, set(), {}

    def put_on(self, model):
        for module in model.modules():
            if self.kind == "hook":
                add_hook_to_module(module, _Noting(self.called))
            elif isinstance(module, nn.Linear) or projections(module):
                self.before[module] = module.forward
                module.forward = getattr(self, self.kind)(module, module.forward)

    def take_off(self, model):
        if self.kind == "hook":
            remove_hook_from_module(model, recurse=True)
        for module in model.modules():
            if self.kind == "table" and module in self.before:
                module.forward = self.before[module]
            elif self.kind != "hook":
                module.__dict__.pop("forward", None)

    def closure(self, module, old):
        def forward(*args, **kwargs):
            self.called.add(module)
            return old(*args, **kwargs)

        return forward

    def default(self, module, old):
        def forward(*args, _old=old, **kwargs):
            self.called.add(module)
            return _old(*args, **kwargs)

        return forward

    def partial(self, module, old):
        def forward(old, *args, **kwargs):
            self.called.add(module)
            return old(*args, **kwargs)

        return functools.partial(forward, old)

    def method(self, module, old):
        def forward(itself, *args, **kwargs):
            assert itself is module
            self.called.add(module)
            return old(*args, **kwargs)

        return types.MethodType(forward, module)

    def of_an_object(self, module, old):
        return _Around(self.called, module, old).call

    def table(self, module, old):
        before, called = self.before, self.called

        def forward(*args, **kwargs):
            called.add(module)
            return before[module](*args, **kwargs)

        return forward

    def function(self, module, old):
        """As Accelerator.prepare: the function of the class, called with the module."""
        function = old.__func__

        def forward(itself, *args, **kwargs):
            self.called.add(itself)
            return function(itself, *args, **kwargs)

        return types.MethodType(forward, module)

    def by_its_class(self, module, old):
        def forward(*args, **kwargs):
            self.called.add(module)
            return type(module).forward(module, *args, **kwargs)

        return forward


class _Noting(ModelHook):
    def __init__(self, called):
        self.called = called

    def pre_forward(self, module, *args, **kwargs):
        self.called.add(module)
        return args, kwargs


class _Around:
    def __init__(self, called, module, old):
        self.called, self.module, self.old = called, module, old
        self.itself = self.call

    def call(self, *args, **kwargs):
        self.called.add(self.module)
        return self.old(*args, **kwargs)


KINDS = [
    "hook",
    "closure",
    "default",
    "partial",
    "method",
    "of_an_object",
    "table",
    "function",
    "by_its_class",
]


@pytest.fixture(scope="module", params=MAKERS)
def made(request):
    """What makes a model, and the logits of it quantized by its recipe."""
    dense = MAKERS[request.param](layers=1)
    data = data_for(MAKERS[request.param])

    def make():
        return copy.deepcopy(dense)

    recipe = calibrate(make(), data, progress=False, **OPTIONS)
    model = make()
    with torch.no_grad():
        quantize_(model, masquant_config(recipe))
        return make, data, recipe, model(**data[0]).logits


def quantized_modules(model):
    return [
        m for m in model.modules() if isinstance(m, (MASQuantLinear, MASQuantExperts))
    ]


@pytest.mark.parametrize(
    "made, kind",
    [("linears", kind) for kind in KINDS]
    + [("experts", kind) for kind in ("hook", "closure", "function")],
    indirect=["made"],
)
def test_put_on_before_calibration_and_taken_off_after(made, kind):
    make, data, recipe, wanted = made
    model, patches = make(), Patches(kind)
    patches.put_on(model)
    patches.take_off(model)
    with torch.no_grad():
        # As if they had never been.
        plain = copy.deepcopy(model)
        quantize_(plain, masquant_config(recipe))
        assert torch.equal(plain(**data[0]).logits, wanted)
        patches.put_on(model)
        dense = model(**data[0]).logits
        recipe = calibrate(model, data, progress=False, **OPTIONS)
        assert torch.equal(model(**data[0]).logits, dense)
        quantize_(model, masquant_config(recipe))
        patches.called.clear()
        assert torch.equal(model(**data[0]).logits, wanted)
        assert patches.called >= set(quantized_modules(model))
        patches.take_off(model)
        patches.called.clear()
        assert torch.equal(model(**data[0]).logits, wanted)
    assert not patches.called


@pytest.mark.parametrize(
    "made, kind", [("linears", "closure"), ("experts", "hook")], indirect=["made"]
)
def test_between_the_steps(made, kind):
    make, data, _, wanted = made
    model, first, second = make(), Patches(kind), Patches(kind)
    first.put_on(model)
    quantize_(model, MASQuantConfig(step="prepare", **OPTIONS))
    with torch.no_grad():
        for sample in data:
            model(**sample)
        first.take_off(model)
        second.put_on(model)
        quantize_(model, MASQuantConfig(step="convert", **OPTIONS))
        assert torch.equal(model(**data[0]).logits, wanted)
        assert second.called >= set(quantized_modules(model))
        second.take_off(model)
        assert torch.equal(model(**data[0]).logits, wanted)


def test_a_model_spread_over_devices_and_copied(made):
    make, data, recipe, wanted = made
    model = accelerate.dispatch_model(make(), {"": "cpu"}, force_hooks=True)
    quantize_(model, masquant_config(recipe))
    twin = copy.deepcopy(model)
    for parameter in model.lm_head.parameters():
        parameter.data.zero_()
    with torch.no_grad():
        assert torch.equal(twin(**data[0]).logits, wanted)


def test_quantized_weights_may_be_offloaded(made):
    make, data, recipe, wanted = made
    model = make()
    quantize_(model, masquant_config(recipe))
    accelerate.cpu_offload(model)
    with torch.no_grad():
        assert torch.equal(model(**data[0]).logits, wanted)
        remove_hook_from_module(model, recurse=True)
        assert torch.equal(model(**data[0]).logits, wanted)


@pytest.mark.parametrize(
    "made, where", [("linears", "memory"), ("experts", "disk")], indirect=["made"]
)
def test_weights_that_are_offloaded_are_refused_before_the_data(made, where, tmp_path):
    make, data, recipe, _ = made
    model = make()
    if where == "memory":
        accelerate.cpu_offload(model)
    else:
        accelerate.disk_offload(model, tmp_path)
    kinds = [type(m) for m in model.modules()]

    def unread():
        raise AssertionError("not to be read")
        yield

    for act in (
        lambda: calibrate(model, unread(), progress=False, **OPTIONS),
        lambda: quantize_(model, MASQuantConfig(step="prepare", **OPTIONS)),
        lambda: quantize_(model, masquant_config(recipe)),
    ):
        with pytest.raises(ValueError, match=r"q_proj is offloaded, so .* device_map"):
            act()
        assert [type(m) for m in model.modules()] == kinds


def test_weights_offloaded_after_the_first_step_are_refused():
    model = qwen25_vl()
    quantize_(model, MASQuantConfig(step="prepare", **OPTIONS))
    accelerate.cpu_offload(model)
    with torch.no_grad():
        model(**DATA[0])
    with pytest.raises(ValueError, match="q_proj is offloaded"):
        quantize_(model, MASQuantConfig(step="convert", **OPTIONS))


def test_towers_may_be_offloaded():
    wanted = recipe_of(qwen25_vl(), **OPTIONS)
    model = qwen25_vl()
    accelerate.cpu_offload(model.model.visual)
    recipe = recipe_of(model, **OPTIONS)
    for name, layer in wanted.layers.items():
        assert torch.equal(layer.smoothing_factor, recipe.layers[name].smoothing_factor)


def test_an_instance_forward_that_computes_by_itself_is_not_overlooked():
    """It reads the weight, and never calls what would observe its input."""
    model = qwen25_vl()
    linear = model.model.language_model.layers[1].mlp.up_proj
    linear.forward = lambda x: nn.functional.linear(x, linear.weight, linear.bias)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj .* of its instance"):
        recipe_of(model, **OPTIONS)
    recipe = recipe_of(model, exclude="*layers.1.mlp.up_proj", **OPTIONS)
    quantize_(model, masquant_config(recipe))
    with torch.no_grad():
        model(**DATA[0])


@pytest.mark.parametrize("keep", [True, False])
def test_accelerate_unwraps_a_routed_model(vl, keep):
    """Of autocast and a conversion to float32, as Accelerator.prepare puts them on."""
    with torch.no_grad():
        wanted = vl(**DATA[0]).logits
        accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
        prepared = accelerator.prepare_model(vl, evaluation_mode=True)
        assert prepared(**DATA[0]).logits.dtype == torch.float32
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep)
        assert unwrapped is vl
        if not keep:
            assert torch.equal(vl(**DATA[0])[0], wanted)
            twin = pickle.loads(pickle.dumps(vl))
            assert torch.equal(twin(**DATA[0])[0], wanted)
        assert extract_model_from_parallel(vl, keep_fp32_wrapper=keep) is vl
        vl(**DATA[0])
        assert not router(vl).call.known


def test_accelerate_unwraps_what_it_prepared_before(vl_recipe):
    wanted = quantized(qwen25_vl(), vl_recipe)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare_model(qwen25_vl(), evaluation_mode=True)
    quantized(model, vl_recipe)
    with torch.no_grad():
        assert model(**DATA[0]).logits.dtype == torch.float32
        model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        assert torch.equal(model(**DATA[0])[0], wanted(**DATA[0])[0])


def test_a_function_that_many_share():
    """Only one of two linears is quantized; both call the one function they had."""
    shared = nn.Linear.forward

    def forward(self, x):
        return shared(self, x)

    model = qwen25_vl()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = types.MethodType(forward, module)
    with torch.no_grad():
        dense = model(**DATA[0]).logits
        recipe = recipe_of(model, include="*.layers.0.mlp.up_proj", **OPTIONS)
        assert torch.equal(model(**DATA[0]).logits, dense)
        quantize_(model, masquant_config(recipe))
        assert not torch.equal(model(**DATA[0]).logits, dense)


def test_a_forward_of_a_bare_function(vl_recipe):
    """A top-level script's own: what it calls is a global of it."""
    model = qwen25_vl()
    with torch.no_grad():
        wanted = quantized(qwen25_vl(), vl_recipe)(**DATA[0]).logits
    script = """
linear = model.model.language_model.layers[0].mlp.up_proj
old = linear.forward
linear.forward = lambda x: old(x)
"""
    names = {"model": model}
    exec(script, names)
    quantized(model, vl_recipe)
    with torch.no_grad():
        assert torch.equal(model(**DATA[0]).logits, wanted)
        exec("linear.forward = old", names)
        assert torch.equal(model(**DATA[0]).logits, wanted)
