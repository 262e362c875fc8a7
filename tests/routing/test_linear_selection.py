# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which linears are quantized by default and by patterns."""

import pytest
from linear_oracle import linears_of, literal
from tiny_models import OMNI_DECODER, PlainModel, omni_thinker, qwen25_vl
from torch import nn

from torchao_masquant.selection import match_names, select_linears

OF_A_LAYER = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


@pytest.mark.parametrize(
    "make, decoder", [(qwen25_vl, "model.language_model"), (omni_thinker, OMNI_DECODER)]
)
def test_default_is_the_decoder_without_towers_and_head(make, decoder):
    model = make()
    chosen = select_linears(model)
    assert all(model.get_submodule(n) is linear for n, linear in chosen.items())
    names = [f"{decoder}.layers.{i}.{n}" for i in range(2) for n in OF_A_LAYER]
    assert list(chosen) == names
    everything = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert "lm_head" in everything and any("visual" in n for n in everything)


def test_default_of_a_part_and_of_a_plain_module_is_all_of_it():
    layer = qwen25_vl().model.language_model.layers[0]
    assert list(select_linears(layer)) == OF_A_LAYER
    assert list(select_linears(PlainModel())) == ["first", "second"]


NAMES = ["a.0.q", "a.0.k", "a.10.q", "head", "tower.q"]


@pytest.mark.parametrize(
    "include, exclude, left",
    [
        (None, None, NAMES),
        ("*.q", None, ["a.0.q", "a.10.q", "tower.q"]),
        (["head", "a.0.*"], None, ["a.0.q", "a.0.k", "head"]),
        (None, ["re:a\\.1.*", "tower*"], ["a.0.q", "a.0.k", "head"]),
        ("re:a\\.\\d\\.q", None, ["a.0.q"]),
        ("a.[0-9].q", None, ["a.0.q"]),
        ("*", "*.q", ["a.0.k", "head"]),
        (["*.q", "*"], (), NAMES),
    ],
)
def test_patterns(include, exclude, left):
    assert match_names(NAMES, include, exclude) == left


@pytest.mark.parametrize("option", ["include", "exclude"])
# A regular expression matches whole names; case counts.
@pytest.mark.parametrize("pattern", ["visual", "re:model", "re:a\\.0", "HEAD"])
def test_a_pattern_that_matches_nothing_raises(option, pattern):
    message = (
        f"{option} pattern {pattern!r} matches no linear of the model; its linears are "
        "named like 'a.0.q'."
    )
    with pytest.raises(ValueError, match=literal(message)):
        match_names(
            NAMES, **{option: ["*", pattern] if option == "include" else pattern}
        )


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_is_no_regular_expression_is_named(option):
    with pytest.raises(ValueError, match=r"^'re:\(' is no regular expression: missing"):
        match_names(NAMES, **{option: "re:("})


def test_a_model_without_linears():
    with pytest.raises(ValueError, match="matches nothing: the model has no linear"):
        select_linears(nn.Conv2d(1, 1, 1), include="*")
    with pytest.raises(ValueError, match="no linear is left to quantize"):
        select_linears(nn.Conv2d(1, 1, 1))


def test_nothing_left():
    message = (
        "no linear is left to quantize: look at include ('*.q') and exclude ('*')."
    )
    with pytest.raises(ValueError, match=literal(message)):
        match_names(NAMES, "*.q", "*")


@pytest.mark.parametrize(
    "include, message",
    [
        ("lm_head", "is not part of the decoder, nor of a tower"),
        ("*visual*", "is of a tower, .* nothing to compare: leave it out"),
    ],
)
def test_linears_that_see_other_tokens_than_the_call_are_refused(include, message):
    """A tower's patches, the head's last token: the call's ids are not theirs."""
    with pytest.raises(ValueError, match=message):
        select_linears(qwen25_vl(), include=include)


def test_exclude_narrows_the_default():
    model = qwen25_vl()
    # exclude narrows the default down, it does not replace it
    chosen = select_linears(model, exclude=["*.down_proj", "re:.*layers\\.0.*"])
    assert [n.split("layers.")[1] for n in chosen] == [
        f"1.{n}" for n in OF_A_LAYER[:-1]
    ]


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_of_linear_is_refused():
    model = PlainModel()
    model.second = Doubled(24, 12)
    with pytest.raises(ValueError, match="^second is a Doubled, not a plain nn.Linear"):
        select_linears(model)
    assert list(select_linears(model, exclude="second")) == ["first"]


def test_what_is_quantized_already_is_refused(plain):
    with pytest.raises(ValueError, match="^first is a MASQuantLinear, not a plain"):
        select_linears(plain)


def test_quantized_are_those_selected(vl):
    assert list(linears_of(vl)) == list(select_linears(qwen25_vl()))
