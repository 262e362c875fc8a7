# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``calibrate``'s options and refusals on real models; the model stays as it was."""

import itertools

import pytest
import tiny_models
import torch
from checkpoints import assert_same_recipe
from tiny_models import OMNI_DECODER
from torch import nn
from transformers import BatchFeature

from torchao_masquant import calibrate
from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.conductor import conductor

SMALL = {"progress": False, "rank": 2}


@pytest.fixture
def model():
    return tiny_models.omni_thinker()


@pytest.fixture(scope="module")
def samples():
    return tiny_models.samples(audio=True, count=4)


def _snapshot(model):
    """Everything that calibration could leave behind.

    ``rope_deltas`` is what a Qwen2.5 model itself notes down at every call.
    """
    return {
        name: (
            type(module),
            module.training,
            {
                k: id(v)
                for k, v in vars(module).items()
                if not k.startswith("_") and k != "rope_deltas"
            },
            {k: id(v) for k, v in module._parameters.items()},
            {k: id(v) for k, v in module._buffers.items()},
            {k: id(v) for k, v in module._modules.items()},
            [len(v) for k, v in vars(module).items() if "hooks" in k and v is not None],
            [
                (p.requires_grad, p.grad is None, p._version)
                for p in module.parameters(recurse=False)
            ],
        )
        for name, module in model.named_modules()
    }


def _mixed_state(model):
    """Some in training, some not; some without gradients."""
    model.train()
    model.get_decoder().layers[1].eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    return model


def test_the_model_stays_as_it_was(model, samples):
    _mixed_state(model)
    before = _snapshot(model)
    calibrate(model, samples, max_statistics_bytes=1, **SMALL)
    assert _snapshot(model) == before


class Interrupting:
    """Samples that end in Ctrl-C."""

    def __init__(self, samples, error):
        self.samples, self.error = samples, error

    def __iter__(self):
        yield from self.samples[:2]
        raise self.error


@pytest.mark.parametrize(
    "error, passes", [(KeyboardInterrupt(), 4 << 30), (OSError("disk gone"), 1)]
)
def test_interrupted_data_leaves_the_model(model, samples, error, passes):
    _mixed_state(model)
    before = _snapshot(model)
    with pytest.raises(type(error)):
        calibrate(
            model, Interrupting(samples, error), max_statistics_bytes=passes, **SMALL
        )
    assert _snapshot(model) == before


@pytest.mark.parametrize("where", ["solve_group", "check_complete", "observe"])
def test_a_failure_of_ours_leaves_the_model(model, samples, where, monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError("no more")

    if where == "solve_group":
        monkeypatch.setattr(conductor, where, fail)
    else:
        monkeypatch.setattr(CalibrationSession, where, fail)
    _mixed_state(model)
    before = _snapshot(model)
    with pytest.raises(MemoryError):
        calibrate(model, samples, **SMALL)
    assert _snapshot(model) == before


def test_two_runs_are_the_same_bits(model, samples):
    once = calibrate(model, samples, **SMALL)
    assert_same_recipe(once, calibrate(model, samples, **SMALL))
    assert_same_recipe(once, calibrate(model.train(), (s for s in samples), **SMALL))
    assert_same_recipe(
        once, calibrate(model, [BatchFeature(s) for s in samples], **SMALL)
    )
    grouped = itertools.chain(samples[:1], samples[1:])
    assert_same_recipe(
        once, calibrate(model, grouped, max_statistics_bytes=200_000, **SMALL)
    )


@pytest.mark.parametrize("bound, expected", [(1, 8), (1_000_000, 4), (3_000_000, 1)])
def test_bytes_of_the_statistics(model, samples, bound, expected, monkeypatch):
    """Tensors that are held, counted, never exceed the bound (or one input's needs)."""
    held, alone = [], []
    original = CalibrationSession.observe

    def watch(session, linear, x):
        original(session, linear, x)
        sizes = [
            sum(
                t.nbytes
                for m in statistics.moments
                for t in (m.amin, m.amax, m.sum, m.outer, m.sample)
                if t is not None
            )
            for statistics in session.statistics.values()
        ]
        # The look at the first sample keeps no covariances and is not planned.
        if session.second_moments:
            held.append(sum(sizes))
            alone.append(max(sizes))

    monkeypatch.setattr(CalibrationSession, "observe", watch)
    passes = []
    solve = CalibrationSession.check_complete
    monkeypatch.setattr(
        CalibrationSession,
        "check_complete",
        lambda session: passes.append(list(session.linears)) or solve(session),
    )
    recipe = calibrate(model, samples, max_statistics_bytes=bound, **SMALL)
    assert sorted(itertools.chain(*passes)) == sorted(recipe.layers)
    assert max(held) <= max(bound, max(alone))
    # 2 layers of 3 inputs of 64 channels and one of 96: 8 * (6 * 64^2 + 2 * 96^2)
    # bytes a modality, and up to half as much of samples and means. So the bound
    # matters, and is not met by one input a pass.
    assert len(passes) == expected


def test_a_modality_that_the_data_lacks(model, samples):
    silent = [
        {k: v for k, v in s.items() if "feature" not in k}
        for s in (
            tiny_models.batch(
                [tiny_models.BOS, *tiny_models.words(6, i), "image"], seed=i, audio=True
            )
            for i in range(3)
        )
    ]
    before = _snapshot(model)
    with pytest.raises(ValueError) as error:
        calibrate(model, silent, **SMALL)
    assert str(error.value) == (
        "the calibration data brings no audio token to "
        f"{OMNI_DECODER}.layers.0.self_attn.q_proj, so audio tokens would be "
        "uncalibrated: add samples with audio, or name the "
        "modalities that the model will meet with modalities=(...)."
    )
    assert _snapshot(model) == before
    recipe = calibrate(model, silent, modalities=("text", "vision"), **SMALL)
    assert recipe.modalities == ("text", "vision")
    assert all(x.smoothing_factor.shape[0] == 2 for x in recipe.layers.values())
    # What is left out is refused, not taken for text.
    with pytest.raises(
        ValueError, match="the call has audio tokens, but the model was"
    ):
        calibrate(model, samples, modalities=("text", "vision"), **SMALL)
    assert _snapshot(model) == before


def test_another_base(model, samples):
    recipe = calibrate(
        model, samples, base_modality="audio", method="masquant-paper", **SMALL
    )
    assert recipe.modalities == ("audio", "text", "vision")
    plain = calibrate(model, samples, method="masquant-paper", **SMALL)
    for name, layer in recipe.layers.items():
        if name.endswith("down_proj"):
            assert layer.smoothing_factor.shape[0] == 1
            continue
        order = [plain.modalities.index(m) for m in recipe.modalities]
        assert torch.equal(
            layer.smoothing_factor, plain.layers[name].smoothing_factor[order]
        )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"modalities": "text"},
            TypeError,
            "modalities are a sequence of names, got the string 'text': write ('text',).",
        ),
        (
            {"modalities": ()},
            ValueError,
            "base_modality 'text' is not one of the modalities ().",
        ),
        (
            {"modalities": ("vision", "audio")},
            ValueError,
            "base_modality 'text' is not one of the modalities ('vision', 'audio').",
        ),
        (
            {"include": "model.layers.9.*"},
            ValueError,
            "include pattern 'model.layers.9.*' matches no linear of the model; its "
            "linears are named like ",
        ),
        (
            {"samples": iter(())},
            ValueError,
            "samples is empty: calibration needs at least one sample of every modality; "
            "an iterator ends",
        ),
        (
            {"samples": {"input_ids": torch.zeros(1, 2, dtype=torch.long)}},
            TypeError,
            "samples is one dict (of input_ids), not a list of samples: put it in a "
            "list, [sample].",
        ),
    ],
)
def test_messages(model, samples, options, error, message):
    before = _snapshot(model)
    with pytest.raises(error) as caught:
        calibrate(model, **({"samples": samples} | SMALL | options))
    assert str(caught.value).startswith(message)
    assert _snapshot(model) == before


def test_an_activation_that_overflows_names_its_linear(model, samples):
    """bfloat16 range: an infinity appears in layer 1 in image tokens, not before."""
    bad = model.get_decoder().layers[0].mlp.down_proj
    handle = bad.register_forward_hook(
        lambda module, args, y: (
            y.masked_fill(
                (samples[2]["input_ids"] == tiny_models.IMAGE)[..., None], torch.inf
            )
            if y.shape[1] == samples[2]["input_ids"].shape[1]
            else y
        )
    )
    before = _snapshot(model)
    with pytest.raises(ValueError) as caught:
        calibrate(model, samples, include="*layers.1.self_attn.*", **SMALL)
    handle.remove()
    # The norm makes nan of it.
    assert str(caught.value) == (
        f"{OMNI_DECODER}.layers.1.self_attn.q_proj: its input holds nan or inf in "
        "vision tokens, so nothing can be calibrated from it; look for the sample or the layer before it "
        "that overflows."
    )
    assert {n: s[0] for n, s in _snapshot(model).items()} == {
        n: s[0] for n, s in before.items()
    }


def test_a_model_on_the_meta_device(samples):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError) as caught:
        calibrate(model, [{"input": torch.ones(1, 4)}], progress=False)
    assert str(caught.value) == (
        "0 is on the meta device, without values to quantize: load the model's "
        "weights first."
    )


# Padding.


class Embedded(nn.Module):
    """Takes embeddings and a mask; says nothing of modalities itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)

    def forward(self, inputs_embeds, attention_mask=None):
        return self.linear(inputs_embeds)


def test_padding_among_declared_modalities():
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 0, 0, 1, 1, 1]]).expand(2, -1)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    loud = x.clone()
    loud[1, 4:] = 1e6
    options = {"modalities": ("text", "vision"), "method": "masquant-paper", **SMALL}
    sample = {"inputs_embeds": x, "modality_ids": ids, "attention_mask": mask}
    expected = calibrate(Embedded(), [sample], **options)
    found = calibrate(Embedded(), [sample | {"inputs_embeds": loud}], **options)
    assert_same_recipe(found, expected)
    without = calibrate(
        Embedded(), [{"inputs_embeds": loud, "modality_ids": ids}], **options
    )
    assert without.layers["linear"].smoothing_factor.max() > 100


def test_padding_of_a_model_that_is_calibrated_for_text_alone(model):
    rows = [tiny_models.batch([*tiny_models.words(9, s)], seed=s) for s in range(3)]
    options = {"modalities": ("text",), "method": "smoothquant", **SMALL}
    expected = calibrate(
        model, rows, include=f"{OMNI_DECODER}.layers.0.self_attn.q_proj", **options
    )
    # No word, and far from all of them behind the norm: it would show.
    embeddings = model.get_input_embeddings().weight.data
    embeddings[tiny_models.PAD] = torch.eye(tiny_models.HIDDEN)[0]
    padded = []
    for row in rows:
        pad = torch.full((1, 3), tiny_models.PAD)
        zeros = torch.zeros_like(pad)
        padded.append(
            {
                "input_ids": torch.cat((row["input_ids"], pad), 1),
                "attention_mask": torch.cat((row["attention_mask"], zeros), 1),
            }
        )
    found = calibrate(
        model, padded, include=f"{OMNI_DECODER}.layers.0.self_attn.q_proj", **options
    )
    # The first layer's input is a norm of the embeddings: each token by itself.
    assert_same_recipe(found, expected)


def test_progress_on_a_terminal_only(model, samples, monkeypatch, capfd):
    calibrate(model, samples[:1], method="rtn")
    assert capfd.readouterr() == ("", "")
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    calibrate(model, samples[:1], method="rtn")
    assert "Calibrating" in capfd.readouterr().err
    calibrate(model, samples[:1], method="rtn", progress=False)
    assert capfd.readouterr() == ("", "")
