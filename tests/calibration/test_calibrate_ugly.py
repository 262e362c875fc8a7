# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``calibrate`` on data as nobody wants it, up to the output of the quantized model."""

import pytest
import tiny_models
import torch
from linear_oracle import assert_routed, expected, recorded
from torch import nn
from torchao.quantization import quantize_

from torchao_masquant import calibrate, masquant_config, token_modalities
from torchao_masquant.options import METHODS

NAMES = ("text", "vision", "audio")
K, N, TOKENS = 20, 14, 60

SCHEMES = ("w8a8", "w4a8", "w4a4", "w4a16")


class Two(nn.Module):
    """A wide and a narrow linear, one after the other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(K, 2 * N)
        self.down = nn.Linear(2 * N, N, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def _data(modalities=3, change=None):
    """(T, K) tokens and (T,) ids in one sample; vision and audio are louder."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, K, generator=generator)
    ids = torch.arange(TOKENS) % modalities
    loudness = torch.tensor([1.0, 9.0, 4.0])[ids][:, None]
    x = torch.where(torch.arange(K) % 5 == 2, x * loudness, x)
    if change is not None:
        x, ids = change(x.clone(), ids.clone())
    return x, ids


def _one_token(x, ids):
    keep = (ids != 2) | (torch.arange(TOKENS) == 2)
    return x[keep], ids[keep]


def _dead_channel(x, ids):
    x[:, 4] = 0
    return x, ids


def _dead_channel_of_one(x, ids):
    x[ids == 1, 4] = 0
    return x, ids


def _loud_channel(x, ids):
    x[:, 7] = 1e4
    return x, ids


def _loud_tokens(x, ids):
    x[ids == 1, 7] *= 1e4
    return x, ids


def _constant(x, ids):
    x[ids == 2] = x[2].clone()
    return x, ids


def _zeros(x, ids):
    x[ids == 2] = 0
    return x, ids


def _equal_channels(x, ids):
    x[:, 1:6] = x[:, :1]
    return x, ids


UGLY = [
    _one_token,
    _dead_channel,
    _dead_channel_of_one,
    _loud_channel,
    _loud_tokens,
    _constant,
    _zeros,
    _equal_channels,
]


def _options(scheme, **options):
    group_size = 4 if scheme == "w4a16" else None
    return {"scheme": scheme, "group_size": group_size, "progress": False} | options


def _quantized(x, ids, modalities=NAMES, **options):
    model = Two()
    sample = {"x": x[None], "modality_ids": ids[None]}
    recipe = calibrate(model, [sample], modalities=modalities, **options)
    for layer in recipe.layers.values():
        assert all(torch.isfinite(t).all() for t in layer.tensors().values())
        assert (layer.smoothing_factor > 0).all()
    quantize_(model, masquant_config(recipe))
    return model, recipe


@pytest.mark.parametrize("change", UGLY, ids=lambda c: c.__name__[1:])
@pytest.mark.parametrize(
    "scheme, low_rank_bits", [*((scheme, 16) for scheme in SCHEMES), ("w8a8", 8)]
)
def test_the_output_is_sound(scheme, change, low_rank_bits):
    """Finite, as the formula has it, and as close as the bits allow."""
    x, ids = _data(change=change)
    dense = Two()(x).detach().double()
    model, _ = _quantized(
        x, ids, **_options(scheme, rank=50, low_rank_bits=low_rank_bits)
    )
    with torch.no_grad(), recorded(model) as calls, token_modalities(model, ids):
        y = model(x)
    assert_routed(calls, ids, linears=2)
    # What 4 bits leave of noise is 17 dB below it, 8 bits 40: half of that is asked for
    # of every modality, since one channel may be all of its energy.
    for index in range(3):
        signal, error = dense[ids == index], (y.double() - dense)[ids == index]
        least = {"w8a8": 0.05, "w4a8": 0.25, "w4a16": 0.25, "w4a4": 0.7}[scheme]
        if scheme == "w4a16" and change is _loud_tokens:
            # One factor for all: the others pay for a channel 1e4 louder in one.
            least = 0.5
        if change is _loud_tokens and (scheme, low_rank_bits) == ("w8a8", 8):
            # One factor for all: a pair with steps of 1/127 of what it makes of that
            # channel takes the sign of a tanh wrong where a token has little in it.
            least = 0.15
        assert error.norm() < least * signal.norm(), index


def test_a_rank_larger_than_the_matrix():
    x, ids = _data()
    _, most = _quantized(x, ids, **_options("w4a8", rank=N))
    _, more = _quantized(x, ids, **_options("w4a8", rank=10**6))
    for name, layer in more.layers.items():
        # The first has more outputs than inputs, the second fewer; vision and audio
        # have 20 tokens each, which span 19 directions about their mean.
        assert layer.ranks == ((19, 19) if name == "up" else (N, N))
        assert all(torch.isfinite(t).all() for t in layer.tensors().values())
    assert most.layers["down"].ranks == more.layers["down"].ranks


@pytest.mark.parametrize(
    "method, bad", [*((m, torch.nan) for m in METHODS), ("masquant", -torch.inf)]
)
def test_what_is_not_finite_is_named(method, bad):
    x, ids = _data()
    x[1, 3] = bad
    with pytest.raises(ValueError) as error:
        _quantized(x, ids, method=method, progress=False)
    assert str(error.value) == (
        "up: its input holds nan or inf in vision tokens, so nothing can be calibrated "
        "from it; look for the sample or the layer before it that overflows."
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_text_alone(scheme, mean):
    """One modality: a factor, a shift and a bias of its own, no pair, no routing."""
    x, _ = _data()
    x = x + mean
    dense = Two()
    model = Two()
    recipe = calibrate(model, [{"x": x[None]}], **_options(scheme))
    for layer in recipe.layers.values():
        n, k = layer.shape
        assert layer.smoothing_factor.shape == (1, k)
        assert layer.modality_bias.shape == (1, n)
        assert layer.ranks == () and layer.l1 is None
        if scheme == "w4a16":
            assert layer.act_shift is None
        else:
            assert layer.act_shift.shape == (1, k)
    quantize_(model, masquant_config(recipe))
    with torch.no_grad(), recorded(model) as calls:
        y = model(x)
        exact = dense(x)
    assert "forward" not in vars(model)
    for call in calls:
        ids = torch.zeros(len(call.x), dtype=torch.long)
        reference, bound = expected(call.linear, call.x, ids)
        assert ((call.y.double() - reference).abs() <= bound).all()
    first = calls[0]
    meant = dense.up(first.x).detach()
    error = (first.y - meant).norm() / (meant - meant.mean(0)).norm()
    # Relative to what varies: without a shift a mean of 50 would be most of the range.
    assert error < {"w8a8": 0.02, "w4a8": 0.15, "w4a16": 0.15, "w4a4": 0.3}[scheme]
    assert (y - exact).norm() < exact.norm()


# Options that meet a model.


@pytest.mark.parametrize("group_size", [3, 8, 16])
def test_a_group_size_that_does_not_divide_names_the_linear(group_size):
    x, ids = _data()
    with pytest.raises(ValueError) as error:
        _quantized(x, ids, group_size=group_size, progress=False)
    assert str(error.value) == (
        f"group_size={group_size} does not divide the input width (20 and 28) of 2 of 2 "
        "linears (up, down): give group_size=2 or 4, which divides all, or exclude them."
    )


def test_a_group_size_that_divides_the_first_linear_alone():
    x, ids = _data()
    with pytest.raises(ValueError, match=r"width \(28\) of 1 of 2 linears \(down\)"):
        _quantized(x, ids, group_size=10, progress=False)
    _quantized(x, ids, group_size=4, progress=False)


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
def test_rank_auto_costs_no_more_than_a_share_of_5_percent(scheme):
    model = tiny_models.qwen25_vl()
    options = _options(scheme, alpha=0.5, separation=1.0, include="*language_model*")
    uniform = tiny_models.recipe_of(model, rank=0.05, **options)
    chosen = tiny_models.recipe_of(model, rank="auto", **options)

    def nbytes(recipe):
        return sum(
            tensor.nbytes
            for layer in recipe.layers.values()
            for tensor in (layer.l1, layer.l2)
            if tensor is not None
        )

    assert 0 < nbytes(chosen) <= nbytes(uniform)
    assert chosen.options.rank == "auto"
    quantize_(model, masquant_config(chosen))
    sample = tiny_models.samples(audio=False, count=1)[0]
    with torch.no_grad(), recorded(model) as calls:
        logits = model(**sample).logits
    assert torch.isfinite(logits).all()
    assert_routed(calls, tiny_models.true_ids(model, sample))
