# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``budget="6 bits"``: what is stored keeps it, what it does, and what is refused."""

import copy
import re

import pytest
import tiny_models
import torch
from torchao.quantization import quantize_

from torchao_masquant import (
    MASQuantConfig,
    MASQuantLinear,
    Recipe,
    calibrate,
    masquant_config,
    save_quantized,
)
from torchao_masquant.budget import check_budget, formats
from torchao_masquant.conductor.conductor import solve
from torchao_masquant.demo.compare import collect_statistics
from torchao_masquant.options import SolverOptions, get_scheme
from torchao_masquant.recipe import library_versions
from torchao_masquant.sequential import calibrate_sequential
from torchao_masquant.testing import digits


def _bits(model):
    """Of all that is stored of the quantized linears."""
    linears = [m.weight for m in model.modules() if isinstance(m, MASQuantLinear)]
    stored = sum(weight.nbytes_stored for weight in linears)
    return 8 * stored / sum(weight.numel() for weight in linears)


class _Digits:
    """The small model, which is seen once and solved for as often as one likes."""

    def __init__(self):
        self.model = digits.load_model("outliers")
        # A layer of it: what is compared are divergences, not answers.
        decoder = self.model.get_decoder()
        del decoder.layers[1:]
        decoder.config.num_hidden_layers = 1
        decoder.config.layer_types = decoder.config.layer_types[:1]
        samples = digits.calibration_samples(64)
        self.session = collect_statistics(self.model, samples, progress=False)
        self.tasks = [
            next(iter(digits.heldout_batches(task, 50))) for task in digits.TASKS
        ]
        self.exact = self.answers(self.model)

    @torch.no_grad()
    def answers(self, model):
        logits = [model(**task.inputs).logits[:, -1] for task in self.tasks]
        return torch.log_softmax(torch.cat(logits).double(), -1)

    def quantized(self, **options):
        asked = SolverOptions(**options)
        recipe = Recipe(
            asked,
            self.session.router.modalities,
            solve(self.session, asked),
            library_versions(),
        )
        model = copy.deepcopy(self.model)
        quantize_(model, masquant_config(recipe))
        return model

    def found(self, **options):
        """Bits of a quantized copy, and the divergence of each held-out example."""
        model = self.quantized(**options)
        answers = self.answers(model)
        return _bits(model), (self.exact.exp() * (self.exact - answers)).sum(-1)


@pytest.fixture(scope="module")
def small():
    return _Digits()


@pytest.mark.parametrize(
    "scheme, budget, rank, group_sizes",
    [
        ("w4a8", "5.2 bits", 0, (None, 128)),
        ("w4a8", "8 bits", 0.05, (None,)),
        ("nvfp4", "6.5 bits", 0, (None,)),
    ],
)
def test_no_uniform_choice_of_as_many_bytes_is_better(
    small, scheme, budget, rank, group_sizes
):
    limit = float(budget.split()[0])
    bits, mixed = small.found(scheme=scheme, budget=budget)
    assert limit - 0.05 < bits <= limit
    for group_size in group_sizes:
        bits, uniform = small.found(scheme=scheme, group_size=group_size, rank=rank)
        assert bits <= limit
        # Of the same examples: what rounding happens to do to them tells nothing.
        more = mixed - uniform
        assert more.mean() <= 2 * more.std() / len(more) ** 0.5, group_size


@pytest.fixture
def tiny():
    return tiny_models.omni_thinker()


@pytest.fixture(scope="module")
def samples():
    return tiny_models.samples(audio=True)


def test_what_is_given_is_not_chosen(tiny, samples):
    recipe = calibrate(tiny, samples, budget="15 bits", rank=1, group_size=16)
    assert {sum(layer.ranks) for layer in recipe.layers.values()} == {2}
    quantize_(tiny, masquant_config(recipe))
    assert _bits(tiny) <= 15
    weights = [m.weight for m in tiny.modules() if isinstance(m, MASQuantLinear)]
    assert {weight.group_size for weight in weights} == {16}
    assert {weight.weight_bits for weight in weights} == {4, 8}


def test_a_file_holds_every_format(tiny, samples, tmp_path):
    recipe = calibrate(tiny, samples, budget="11 bits", rank=0)
    assert {layer.scheme for layer in recipe.layers.values()} == {"w4a8", "w8a8"}
    recipe.save(tmp_path / "recipe.safetensors")
    loaded = Recipe.load(tmp_path / "recipe.safetensors")
    assert loaded.layers == recipe.layers and loaded.options == recipe.options
    quantize_(tiny, masquant_config(loaded))
    save_quantized(tiny, tmp_path / "quantized")
    again = type(tiny).from_pretrained(tmp_path / "quantized")
    for name, module in tiny.named_modules():
        if isinstance(module, MASQuantLinear):
            other = again.get_submodule(name).weight
            assert other.weight_bits == module.weight.weight_bits
            assert torch.equal(other.qdata, module.weight.qdata)


@pytest.mark.parametrize(
    "scheme, family",
    [
        ("nvfp4", {"nvfp4", "fp8"}),
        ("mxfp4", {"mxfp4", "mxfp8"}),
        ("w4a8-fp8", {"w4a8-fp8", "fp8"}),
    ],
)
def test_of_floats_it_chooses_among_what_the_hardware_multiplies(
    tiny, samples, tmp_path, scheme, family
):
    recipe = calibrate(
        tiny, samples, scheme=scheme, budget="12 bits", rank=0, hadamard_size=1
    )
    assert {layer.scheme for layer in recipe.layers.values()} == family
    recipe.save(tmp_path / "recipe.safetensors")
    loaded = Recipe.load(tmp_path / "recipe.safetensors")
    assert loaded.layers == recipe.layers
    quantize_(tiny, masquant_config(loaded))
    assert _bits(tiny) <= 12
    save_quantized(tiny, tmp_path / "quantized")
    again = type(tiny).from_pretrained(tmp_path / "quantized")
    for name, module in tiny.named_modules():
        if not isinstance(module, MASQuantLinear):
            continue
        of, other = get_scheme(recipe.layers[name].scheme), again.get_submodule(name)
        for weight in (module.weight, other.weight):
            assert weight.act_format == of.act_format
            assert weight.weight_format == of.weight_format
        assert torch.equal(other.weight.qdata, module.weight.qdata)


def test_each_block_from_disk_keeps_it(tiny, samples, tmp_path):
    tiny.save_pretrained(tmp_path / "model")
    calibrate_sequential(
        tmp_path / "model",
        samples,
        budget="14 bits",
        output=tmp_path / "quantized",
        progress=False,
    )
    again = type(tiny).from_pretrained(tmp_path / "quantized")
    blocks = again.get_submodule(
        "model.layers"
        if hasattr(again.model, "layers")
        else "model.language_model.layers"
    )
    for block in blocks:
        assert 13 < _bits(block) <= 14


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(budget=4.5), TypeError, "budget must be such as '4.5 bits', got 4.5."),
        (
            dict(budget="4.5"),
            ValueError,
            "budget must be such as '4.5 bits', got '4.5'.",
        ),
        (dict(budget="0 bits"), ValueError, "such as '4.5 bits', got '0 bits'."),
        (
            dict(budget="4 bits"),
            ValueError,
            "is too little: with all that goes with their codes the linears take "
            r"[\d.]+ bits a weight at least.",
        ),
        (
            dict(budget="90 bits"),
            ValueError,
            "more than there is to spend: .* at most.",
        ),
        (dict(budget="12 bits", epochs=1), ValueError, "give epochs=0, or no budget."),
        (dict(budget="12 bits", scheme="w3a3"), ValueError, "simulated: it saves none"),
        (
            dict(budget="12 bits", method="smoothquant"),
            ValueError,
            "budgets .* are for method 'masquant'.",
        ),
        (
            dict(budget="12 bits", rounding="nearest", clip=False),
            ValueError,
            "give rounding='gptq' or clip=True, or no budget.",
        ),
        (
            dict(budget="12 bits", scheme="w8a8", target="compressed-tensors"),
            ValueError,
            "budget='12 bits' has no place in it",
        ),
        (
            dict(budget="12 bits", group_size=48),
            ValueError,
            "group_size=48 does not divide",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_runs(
    tiny, options, error, message
):
    def untouched():
        raise AssertionError("the samples were asked for")
        yield

    with pytest.raises(error, match=message):
        calibrate(tiny, untouched(), **options)


def test_a_width_that_no_group_of_floats_divides_is_named():
    options = SolverOptions(scheme="mxfp4", budget="6 bits")
    told = r"groups of 32, and none divides the input width \(48\) of q: exclude it."
    with pytest.raises(ValueError, match=told):
        check_budget({"q": (64, 48)}, 2, options)
    # Groups of 16 do not divide this one, which has one scale a row and 8 bits then.
    (only,) = formats(SolverOptions(scheme="nvfp4", budget="9 bits"), 40)
    assert only.scheme == "fp8"


@pytest.mark.parametrize(("budget", "has_pairs"), [("1 bit", False), ("99 bits", True)])
def test_what_a_message_names_may_be_asked_for(tiny, samples, budget, has_pairs):
    with pytest.raises(ValueError, match="too little|more than there is") as caught:
        calibrate(tiny, samples, budget=budget)
    named = re.search(r"take ([\d.]+) bits", str(caught.value))[1]
    recipe = calibrate(tiny, samples, budget=f"{named} bits")
    assert any(sum(layer.ranks) for layer in recipe.layers.values()) == has_pairs


@pytest.mark.parametrize(("budget", "least"), [("14 bits", 13), ("15.2 bits", 14)])
def test_several_passes_keep_it_each(tiny, samples, budget, least):
    """As many bytes as the statistics of one input, of which some cannot spend theirs."""
    recipe = calibrate(tiny, samples, budget=budget, max_statistics_bytes=10_000)
    quantize_(tiny, masquant_config(recipe))
    assert least < _bits(tiny) <= float(budget.split()[0])


def test_no_weights_of_zeros_are_made_for_it(tiny):
    with pytest.raises(ValueError, match="load the checkpoint with from_pretrained"):
        MASQuantConfig(step="prepare_for_loading", budget="5 bits")
