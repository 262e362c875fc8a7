# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a model's processor makes of data, sounds without libraries, and saved samples."""

import struct
import wave

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from torchao_masquant.data import (
    ProcessedConversations,
    SavedSamples,
    read_conversations,
)
from torchao_masquant.data.sounds import read_audio
from torchao_masquant.testing import model_folders


def processed(folder, source, **options):
    config = AutoConfig.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    return ProcessedConversations(
        read_conversations(source), processor, config, **options
    )


def test_a_conversation_becomes_the_models_inputs(models, tmp_path):
    samples = processed(models["vision"], model_folders.vision_samples(tmp_path, 1))
    inputs, plain = samples[0], samples[1]
    ids = inputs["input_ids"]
    # One token for each patch of the image.
    assert (ids == model_folders.IMAGE).sum() == 16
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)
    text = AutoTokenizer.from_pretrained(models["vision"]).decode(ids[0])
    assert text.startswith("<start>user: <image>") and "a square, 0<end>" in text
    assert "pixel_values" not in plain and len(samples[:2]) == 2


def test_a_sound_is_heard_at_the_models_rate(models, tmp_path):
    (sample, *_) = processed(models["audio"], model_folders.audio_samples(tmp_path))
    assert sample["input_features"].shape == (1, 16, 100)
    # Half a second.
    assert sample["feature_attention_mask"].sum() == 50
    assert (sample["input_ids"] == model_folders.AUDIO).sum() == 12


def test_files_of_one_name_are_one_sample(models, tmp_path, caplog):
    model_folders.write_image(tmp_path / "cat.png")
    (tmp_path / "cat.txt").write_text("Is it a cat?")
    model_folders.write_image(tmp_path / "dog.jpg")
    model_folders.write_sound(tmp_path / "dog.wav")
    model_folders.write_sound(tmp_path / "owl.wav")
    (tmp_path / "poem.txt").write_text("Plain text.")
    (tmp_path / "notes.pdf").touch()
    (tmp_path / ".hidden").touch()
    found = {c.where.split("/")[1]: c for c in read_conversations(tmp_path)}
    assert list(found) == ["cat", "dog", "owl", "poem"]
    kinds = {
        name: [p.kind for m in c.messages for p in m.parts] for name, c in found.items()
    }
    assert kinds == {
        "cat": ["image", "text"],
        "dog": ["image", "audio", "text"],
        "owl": ["audio", "text"],
        "poem": [],
    }
    assert found["cat"].messages[0].parts[1].value == "Is it a cat?"
    assert found["poem"].text == "Plain text."
    assert "notes.pdf" in caplog.text and "hidden" not in caplog.text


def test_rows_of_a_dataset_hold_the_media_themselves(models):
    image = np.zeros((8, 8, 3), np.uint8)
    rows = [
        {
            "images": [image],
            "messages": [
                {"role": "user", "content": [{"type": "image"}]},
            ],
        },
        {"image": image, "question": "What?", "answer": "Nothing.", "task": "vqa"},
    ]
    samples = processed(models["vision"], rows)
    assert all("pixel_values" in sample for sample in samples)
    assert samples.conversations[1].task == "vqa"
    sound = {"array": np.zeros(8000), "sampling_rate": 16000}
    (sample,) = processed(models["audio"], [{"audio": sound}])
    assert sample["feature_attention_mask"].sum() == 50


@pytest.mark.parametrize("kinds", [(), ("image",), ("audio",), ("image", "audio")])
def test_made_up_samples_have_what_a_model_takes(kinds):
    first, again = (read_conversations("synthetic", kinds) for _ in range(2))
    assert len(first) == 16 and all(c.where.startswith("synthetic") for c in first)
    assert all(c.kinds == {"text", *kinds} and c.is_answered for c in first)
    assert all(repr(a) == repr(b) for a, b in zip(first, again))


def test_two_files_of_one_kind_and_name_are_refused(tmp_path):
    model_folders.write_image(tmp_path / "cat.png")
    model_folders.write_image(tmp_path / "cat.jpg")
    with pytest.raises(ValueError, match="two files of kind 'image' named 'cat'"):
        read_conversations(tmp_path)


def test_a_medium_that_the_model_lacks_is_refused(models, tmp_path):
    model_folders.write_sound(tmp_path / "a.wav")
    data = model_folders.write_lines(tmp_path / "a.jsonl", {"audio": "a.wav"})
    with pytest.raises(
        ValueError, match="line 1 has an audio.*LlavaConfig.*image only"
    ):
        processed(models["vision"], data)


def test_a_processor_without_a_template_is_told(models, tmp_path):
    data = model_folders.write_lines(
        tmp_path / "a.jsonl", {"text": "Plain."}, {"prompt": "Hello?"}
    )
    config = AutoConfig.from_pretrained(models["text"])
    tokenizer = AutoTokenizer.from_pretrained(models["text"])
    tokenizer.chat_template = None
    plain, asked = read_conversations(data)
    assert len(ProcessedConversations([plain], tokenizer, config)[0]["input_ids"]) == 1
    with pytest.raises(ValueError, match="line 2.*has no chat template"):
        ProcessedConversations([asked], tokenizer, config)


def test_a_template_that_fails_names_the_line(models, tmp_path):
    data = model_folders.write_lines(tmp_path / "a.jsonl", {"prompt": "Hello?"})
    samples = processed(models["vision"], data)
    samples.processor.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ValueError, match="line 1: the model's processor.*no such role"):
        samples[0]


# Sounds, without soundfile


@pytest.fixture
def no_libraries(monkeypatch):
    monkeypatch.setattr("torchao_masquant.data.sounds._has", lambda module: False)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_pcm_of_every_width_is_read(tmp_path, no_libraries, width, channels):
    expected = np.random.default_rng(0).uniform(-0.9, 0.9, (50, channels))
    levels = np.round(expected * 2 ** (8 * width - 1)).astype(np.int64)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(16000)
        for level in levels.reshape(-1).tolist():
            if width == 1:
                file.writeframes(struct.pack("B", level + 128))
            else:
                file.writeframes(level.to_bytes(width, "little", signed=True))
    found = read_audio(tmp_path / "a.wav", 16000, "a")
    assert found.dtype == np.float32 and found.shape == (50,)
    # Half a step of each width, and float32's own.
    np.testing.assert_allclose(
        found, expected.mean(1), atol=0.51 * 2.0 ** -(8 * width - 1) + 1e-6
    )


def test_another_rate_needs_a_library(tmp_path, no_libraries):
    path = model_folders.write_sound(tmp_path / "a.wav", rate=44100)
    with pytest.raises(ValueError, match="44100 Hz, the model hears 16000 Hz.*data"):
        read_audio(path, 16000, "line 1")


def test_a_sound_without_samples_is_told(tmp_path, no_libraries):
    path = model_folders.write_sound(tmp_path / "a.wav", seconds=0)
    with pytest.raises(ValueError, match="is empty"):
        read_audio(path, 16000, "line 1")
    with pytest.raises(ValueError, match="'array' and 'sampling_rate', got a int"):
        read_audio(3, 16000, "line 1")


def test_a_cut_off_sound_is_read_as_far_as_it_goes_or_refused(tmp_path, no_libraries):
    path = model_folders.write_sound(tmp_path / "a.wav")
    path.write_bytes(path.read_bytes()[:1045])
    assert read_audio(path, 16000, "a").shape == (500,)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="is no sound that can be read"):
        read_audio(path, 16000, "a")


def test_saved_samples(tmp_path):
    for name in ("none.pt", "."):
        with pytest.raises(FileNotFoundError, match="no samples|no \\*.pt file"):
            SavedSamples(tmp_path / name)
    (tmp_path / "damaged.pt").write_text("no such thing")
    with pytest.raises(ValueError, match="'damaged.pt' is not what torch.save writes"):
        SavedSamples(tmp_path / "damaged.pt")
    torch.save({"input_ids": torch.zeros(1, 2)}, tmp_path / "one.pt")
    with pytest.raises(ValueError, match="'one.pt' holds a dict, not a list of dicts"):
        SavedSamples(tmp_path / "one.pt")
    # More than once, and the same each time.
    (tmp_path / "samples").mkdir()
    for index in range(3):
        torch.save(
            {"input_ids": torch.tensor([[index]])}, tmp_path / f"samples/{index}.pt"
        )
    samples = SavedSamples(tmp_path / "samples")
    for _ in range(2):
        assert [int(s["input_ids"]) for s in samples] == [0, 1, 2]
    assert len(samples[:2]) == 2
