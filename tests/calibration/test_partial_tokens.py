# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Linears and experts that are called with a part of a call's tokens."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torchao.quantization import quantize_

from torchao_masquant import (
    MASQuantConfig,
    Recipe,
    analyze,
    calibrate,
    masquant_config,
    modality_sensitivity,
)
from torchao_masquant.sequential import calibrate_sequential

IMAGE, WIDTH = 5, 32
OPTIONS = {"scheme": "w4a8", "rounding": "nearest", "alpha": 0.5, "separation": 1.0}


class Pruning(nn.Module):
    """Drops image tokens on the way, and pools the rest; each by the length of a call.

    ``kept`` and ``kept_too`` read one tensor, the tokens that are left; ``pooled`` reads
    one vector for each row.
    """

    def __init__(self, longer_than=0):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(image_token_id=IMAGE)
        self.longer_than = longer_than
        self.embed = nn.Embedding(48, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.kept = nn.Linear(WIDTH, WIDTH)
        self.kept_too = nn.Linear(WIDTH, WIDTH)
        self.pooled = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 48)
        self.eval()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = torch.tanh(self.first(self.embed(input_ids)))
        keep = (input_ids != IMAGE) | (input_ids.shape[1] <= self.longer_than)
        left = hidden[keep] if not keep.all() else hidden
        changed = self.kept(left) + self.kept_too(left)
        hidden = hidden.masked_scatter(keep[..., None], changed)
        logits = self.last(hidden + self.pooled(hidden.mean(1))[:, None])
        loss = logits.float().logsumexp(-1).mean()
        return SimpleNamespace(logits=logits, loss=loss)


def data(lengths=(20, 24, 28, 32)):
    samples = []
    for seed, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(10, 48, (2, length), generator=generator)
        ids[:, 3:11] = IMAGE
        samples.append({"input_ids": ids})
    return samples


def ernie():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
    text = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": [32, 24],
        "moe_num_shared_experts": 1,
        "mlp_layer_types": ["dense", "sparse"],
        "rope_parameters": rope,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 2,
        "spatial_merge_size": 2,
        "temporal_merge_size": 2,
    }
    config = transformers.Ernie4_5_VLMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=6,
        image_start_token_id=3,
        image_end_token_id=4,
        video_start_token_id=7,
        video_end_token_id=8,
    )
    return transformers.Ernie4_5_VLMoeForConditionalGeneration(config).eval()


def ernie_data():
    samples = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(10, 48, (1, 20), generator=generator)
        ids[:, :7] = torch.tensor([1, 3, IMAGE, IMAGE, IMAGE, IMAGE, 4])
        samples.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": torch.randn(16, 12, generator=generator),
                "image_grid_thw": torch.tensor([[1, 4, 4]]),
                "mm_token_type_ids": (ids == IMAGE).long(),
                "moe_mm_token_type_ids": ((ids >= 3) & (ids <= 5)).int(),
            }
        )
    return samples


def same_recipes(a, b):
    assert list(a.layers) == list(b.layers)
    for name, layer in a.layers.items():
        other = b.layers[name]
        assert torch.equal(layer.smoothing_factor, other.smoothing_factor), name


def told(caplog):
    return [r.getMessage() for r in caplog.records if "other tokens" in r.getMessage()]


KINDS = {
    # What it is, its data, what is left out, as a warning names it.
    "pruned": (
        Pruning,
        data,
        ["kept", "kept_too", "pooled"],
        "kept (1), kept_too (1), pooled (1)",
    ),
    "pruned where it is long": (
        lambda: Pruning(longer_than=22),
        data,
        ["kept", "kept_too", "pooled"],
        "kept (1), kept_too (1), pooled (1)",
    ),
    "experts of one modality": (
        ernie,
        ernie_data,
        ["*_moe.*"],
        "model.language_model.layers.*.mlp.text_moe.experts.gate_up_proj (1)",
    ),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def test_they_are_left_out_and_named_once(kind, caplog):
    make, samples, names, named = kind
    wanted = calibrate(make(), samples(), exclude=names, progress=False, **OPTIONS)
    assert not told(caplog)
    model = make()
    before = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with caplog.at_level(logging.WARNING):
        found = calibrate(model, samples(), progress=False, **OPTIONS)
    same_recipes(found, wanted)
    assert len(told(caplog)) == 1 and named in told(caplog)[0]
    after = model.state_dict(), [type(m) for m in model.modules()]
    assert after[1] == before[1]
    assert all(torch.equal(after[0][name], t) for name, t in before[0].items())
    quantize_(model, masquant_config(found))
    with torch.no_grad():
        for sample in samples():
            assert model(**sample).logits.isfinite().all()


def test_in_several_passes(kind):
    make, samples, _, _ = kind
    wanted = calibrate(make(), samples(), progress=False, **OPTIONS)
    found = calibrate(
        make(), samples(), progress=False, max_statistics_bytes=1, **OPTIONS
    )
    same_recipes(found, wanted)


def test_in_a_block_that_has_no_others(tmp_path, caplog):
    """From disk, where each block is observed by itself."""
    model, samples = ernie(), ernie_data()
    model.save_pretrained(tmp_path / "model")
    of_the_last = ["*layers.1.self_attn*", "*shared_experts*"]
    wanted = calibrate(
        model, samples, exclude=[*of_the_last, "*_moe.*"], progress=False, **OPTIONS
    )
    with caplog.at_level(logging.WARNING):
        calibrate_sequential(
            tmp_path / "model",
            samples,
            recipe=tmp_path / "found.safetensors",
            exclude=of_the_last,
            progress=False,
            **OPTIONS,
        )
    assert len(told(caplog)) == 1
    same_recipes(Recipe.load(tmp_path / "found.safetensors"), wanted)


def test_in_torchaos_steps(kind, caplog):
    make, samples, names, named = kind
    model, wanted = make(), make()
    quantize_(
        wanted,
        masquant_config(
            calibrate(wanted, samples(), exclude=names, progress=False, **OPTIONS)
        ),
    )
    quantize_(model, MASQuantConfig(step="prepare", **OPTIONS))
    with torch.no_grad():
        for sample in samples():
            model(**sample)
        with caplog.at_level(logging.WARNING):
            quantize_(model, MASQuantConfig(step="convert", **OPTIONS))
        assert len(told(caplog)) == 1 and named in told(caplog)[0]
        assert [type(m).__name__ for m in model.modules()] == [
            type(m).__name__ for m in wanted.modules()
        ]
        for sample in samples():
            assert torch.equal(model(**sample).logits, wanted(**sample).logits)


def test_analysis_and_sensitivity_leave_them_out(caplog):
    with caplog.at_level(logging.WARNING):
        analysis = analyze(Pruning(), data(), progress=False)
        assert len(told(caplog)) == 1
        modality_sensitivity(Pruning(), data(), progress=False)
    assert len(told(caplog)) == 2
    assert list(analysis.inputs) == list(analysis.effective_ranks) == ["first", "last"]


def test_ids_that_no_linear_matches_are_wrong_themselves():
    """Also in a later sample, and before the next one runs."""
    wrong = {**data()[0], "modality_ids": torch.zeros(2, 19, dtype=torch.int64)}
    wrong["modality_ids"][:, 3:11] = 1

    class NoConfig(Pruning):
        def __init__(self):
            super().__init__()
            del self.config

    samples = [{**s, "modality_ids": (s["input_ids"] == IMAGE).long()} for s in data()]
    options = {"modalities": ("text", "vision"), "progress": False, **OPTIONS}
    for number in (0, 2):
        given = [*samples[:number], wrong]
        with pytest.raises(ValueError, match=r"^first: input of shape \(2, 20, 32\)"):
            calibrate(NoConfig(), given, **options)

    def until_wrong():
        yield samples[0]
        yield wrong
        yield samples[1]
        raise AssertionError("not to be read")

    with pytest.raises(ValueError, match=r"^first: input of shape \(2, 20, 32\)"):
        calibrate(NoConfig(), until_wrong(), **options)
