# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.

import math
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from digits_training import speech
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from torchao_masquant.testing import digits
from torchao_masquant.testing.digits import features, log_mel
from torchao_masquant.testing.digits.checkpoints import DATA
from torchao_masquant.testing.digits.evaluation import load_examples

# A few points below what the packaged checkpoints reach.
ACCURACY_FLOORS = {"image": 0.94, "audio": 0.80, "both": 0.73, "text": 0.98}

IMAGE, AUDIO = digits.TOKEN_ID["<image>"], digits.TOKEN_ID["<audio>"]


@cache
def load(variant: str) -> Qwen2_5OmniThinkerForConditionalGeneration:
    return digits.load_model(variant)


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        *((variant, torch.float32) for variant in digits.VARIANTS),
        ("outliers", torch.bfloat16),
    ],
)
def test_accuracy(variant: str, dtype: torch.dtype) -> None:
    model = load(variant)
    if dtype != torch.float32:
        model = digits.load_model(variant, dtype)
    assert not model.training
    assert model.dtype == dtype
    scores = digits.evaluate(model)
    assert set(scores) == set(digits.TASKS)
    for task, floor in ACCURACY_FLOORS.items():
        assert scores[task].accuracy >= floor, (task, scores[task])
        assert 0.0 <= scores[task].cross_entropy < 1.5


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown variant 'loud'"):
        digits.load_model("loud")
    with pytest.raises(ValueError, match="unknown task 'video'"):
        digits.prompt("video")
    with pytest.raises(ValueError, match="count must be"):
        digits.calibration_samples(129)


def test_loading_needs_no_training_packages(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('sklearn', 'scipy', 'soundfile'): sys.modules[name] = None\n"
        "from torchao_masquant.testing import digits\n"
        "digits.calibration_samples(1), digits.heldout()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_data_is_small() -> None:
    size = sum(file.stat().st_size for file in DATA.rglob("*") if file.is_file())
    assert size < 19.5e6


def test_calibration_samples_cover_all_modalities() -> None:
    samples = digits.calibration_samples()
    assert len(samples) == 128
    for first in digits.calibration_samples(4), samples:
        ids = torch.cat([sample["input_ids"].flatten() for sample in first])
        kinds = [
            (ids == IMAGE).any(),
            (ids == AUDIO).any(),
            ((ids != IMAGE) & (ids != AUDIO)).any(),
        ]
        assert all(kinds)
    for sample in samples:
        assert sample["input_ids"].shape[0] == 1
        # Teacher forcing: the answer, a number, comes last.
        assert digits.VOCABULARY[sample["input_ids"][0, -1]].isdigit()


def test_heldout_is_disjoint_from_calibration() -> None:
    def contents(tasks: dict[str, digits.TaskExamples], name: str) -> set[bytes]:
        stored = [getattr(examples, name) for examples in tasks.values()]
        rows = [row for tensor in stored if tensor is not None for row in tensor]
        return {row.numpy().tobytes() for row in rows}

    calibration = load_examples("calibration")
    for name in ("images", "log_mels"):
        held_out = contents(digits.heldout(), name)
        assert len(held_out) >= 390
        assert not held_out & contents(calibration, name)
    prompts = contents({"text": digits.heldout()["text"]}, "prompt_ids")
    assert len(prompts) == 200
    assert not prompts & contents({"text": calibration["text"]}, "prompt_ids")


def test_batches() -> None:
    for task, examples in digits.heldout().items():
        assert len(examples) >= 150
        batches = list(digits.heldout_batches(task, batch_size=64))
        assert [len(batch.answer_ids) for batch in batches] == [64, 64, 64, 8]
        answers = torch.cat([batch.answer_ids for batch in batches])
        assert torch.equal(answers, examples.answer_ids)
        forced = next(digits.heldout_batches(task, 64, append_answer=True))
        input_ids = forced.inputs["input_ids"]
        assert torch.equal(input_ids[:, :-1], batches[0].inputs["input_ids"])
        assert torch.equal(input_ids[:, -1], batches[0].answer_ids)


@pytest.mark.parametrize("task", digits.TASKS)
def test_generate_answers_and_ends(task: str) -> None:
    model = load("plain")
    right = 0
    for index in range(5):
        inputs = digits.prompt(task, index)
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answer, *rest = output[0, inputs["input_ids"].shape[1] :].tolist()
        right += answer == int(digits.heldout()[task].answer_ids[index])
        assert rest == [digits.TOKEN_ID["<eos>"]]
    assert right >= 2


def test_pixel_values_order() -> None:
    """Rows (t, gh, gw, mh, mw) and columns (c, tp, ph, pw), counted out by hand."""
    images = digits.heldout()["image"].select(slice(0, 2)).images
    assert images is not None
    enlarged = torch.nn.functional.interpolate(
        images[:, None].float() / 8 - 1, size=(16, 16), mode="bilinear"
    )[:, 0]
    expected = [
        [
            float(enlarged[n, 4 * gh + 2 * mh + ph, 4 * gw + 2 * mw + pw])
            for _channel in range(3)
            for _frame in range(2)
            for ph in range(2)
            for pw in range(2)
        ]
        for n in range(2)
        for gh in range(4)
        for gw in range(4)
        for mh in range(2)
        for mw in range(2)
    ]
    actual = features.pixel_values(images)
    torch.testing.assert_close(actual, torch.tensor(expected))
    assert actual.shape[0] == int(features.image_grid_thw(2).prod(dim=1).sum())


def test_log_mel_of_a_tone() -> None:
    time = torch.arange(log_mel.SAMPLE_RATE // 2) / log_mel.SAMPLE_RATE
    tone = 0.3 * torch.sin(2 * math.pi * 1000.0 * time)
    spectrogram = log_mel.log_mel(tone)
    assert spectrogram.dtype == torch.uint8
    assert spectrogram.shape == (features.MEL_BINS, features.FRAMES)
    assert spectrogram.max() == 255
    # The loudest bin is the one whose filter passes most of 1000 Hz (bin 32 of 129).
    loudest = log_mel.mel_filters()[:, 32].argmax()
    assert (spectrogram[:, 5:25].argmax(dim=0) == loudest).all()
    # Half a second of sound, then silence.
    assert (spectrogram[:, 35:] == 0).all()
    # Loudness does not matter, up to rounding.
    quieter = log_mel.log_mel(0.1 * tone)
    assert (quieter.int() - spectrogram.int()).abs().max() <= 1
    values = features.input_features(spectrogram[None])
    assert values.min() == -1.0 and values.max() == 1.0


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(speech, "RECORDINGS", tmp_path)
    monkeypatch.setattr(speech.shutil, "which", lambda name: name)
    with pytest.raises(RuntimeError, match="apt-get install asterisk-core-sounds-en"):
        speech.check_installed()
    monkeypatch.setattr(speech.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="apt-get install espeak-ng"):
        speech.check_installed()


def test_outliers_are_on_image_and_sound_tokens_only() -> None:
    """Ratio of the largest channel to the median one at the first decoder layer."""

    def ratios(variant: str) -> dict[str, float]:
        model = load(variant)
        hidden: list[torch.Tensor] = []
        hook = (
            model.get_decoder()
            .layers[0]
            .register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        )
        batch = next(digits.heldout_batches("both", 100))
        with torch.no_grad():
            model(**batch.inputs)
        hook.remove()
        ids = batch.inputs["input_ids"]
        masks = {"image": ids == IMAGE, "audio": ids == AUDIO}
        masks["text"] = ~(masks["image"] | masks["audio"])
        ranges = {
            name: hidden[0][mask].abs().amax(dim=0) for name, mask in masks.items()
        }
        return {name: float(x.max() / x.median()) for name, x in ranges.items()}

    plain, outliers = ratios("plain"), ratios("outliers")
    assert max(plain.values()) < 6.0
    assert outliers["text"] < 6.0
    assert outliers["image"] > 10.0
    assert outliers["audio"] > 30.0
