# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Data: what is read, what a model gets of it, and what is said of data it cannot take."""

import json
import struct
import wave

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from torchao_masquant.data import ProcessedConversations, read_conversations
from torchao_masquant.data.sounds import read_audio
from torchao_masquant.testing import model_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "vision": model_folders.vision_model(folder / "vision"),
        "audio": model_folders.audio_model(folder / "audio"),
        "text": model_folders.text_model(folder / "text"),
    }


def processed(folder, source, **options):
    config = AutoConfig.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    return ProcessedConversations(
        read_conversations(source), processor, config, **options
    )


def test_a_conversation_becomes_the_models_inputs(folders, tmp_path):
    samples = processed(folders["vision"], model_folders.vision_samples(tmp_path, 1))
    inputs, plain = samples[0], samples[1]
    ids = inputs["input_ids"]
    # One token for each patch of the image.
    assert (ids == model_folders.IMAGE).sum() == 16
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)
    text = AutoTokenizer.from_pretrained(folders["vision"]).decode(ids[0])
    assert text.startswith("<start>user: <image>") and "a square, 0<end>" in text
    assert "pixel_values" not in plain and len(samples[:2]) == 2


def test_the_answer_is_labelled_and_no_image(folders, tmp_path):
    samples = processed(
        folders["vision"], model_folders.vision_samples(tmp_path, 2), labelled=True
    )
    tokenizer = AutoTokenizer.from_pretrained(folders["vision"])
    for index in (0, 1):
        labels = samples[index]["labels"]
        answer = tokenizer.decode(labels[labels != -100])
        assert answer.strip() == f"a square, {index}<end>".strip()
    plain = samples[2]
    assert torch.equal(plain["labels"], plain["input_ids"])


def test_an_unanswered_question_is_scored_as_text(folders, tmp_path):
    model_folders.write_image(tmp_path / "a.png")
    data = model_folders.write_lines(tmp_path / "a.jsonl", {"image": "a.png"})
    (sample,) = processed(folders["vision"], data, labelled=True)
    scored = sample["labels"] != -100
    assert torch.equal(scored, sample["input_ids"] != model_folders.IMAGE)


def test_a_sound_is_heard_at_the_models_rate(folders, tmp_path):
    (sample, *_) = processed(folders["audio"], model_folders.audio_samples(tmp_path))
    assert sample["input_features"].shape == (1, 16, 100)
    # Half a second.
    assert sample["feature_attention_mask"].sum() == 50
    assert (sample["input_ids"] == model_folders.AUDIO).sum() == 12


def test_a_tokenizer_gets_texts(folders, tmp_path):
    data = model_folders.write_lines(
        tmp_path / "a.jsonl",
        [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
    )
    config = AutoConfig.from_pretrained(folders["text"])
    tokenizer = AutoTokenizer.from_pretrained(folders["text"])
    (sample,) = ProcessedConversations(read_conversations(data), tokenizer, config)
    text = tokenizer.decode(sample["input_ids"][0])
    assert text == "<start>user: Hello<end>\n<start>assistant: "


def test_files_of_one_name_are_one_sample(folders, tmp_path, caplog):
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


def test_rows_of_a_dataset_hold_the_media_themselves(folders):
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
    samples = processed(folders["vision"], rows)
    assert all("pixel_values" in sample for sample in samples)
    assert samples.conversations[1].task == "vqa"
    sound = {"array": np.zeros(8000), "sampling_rate": 16000}
    (sample,) = processed(folders["audio"], [{"audio": sound}])
    assert sample["feature_attention_mask"].sum() == 50


def test_a_saved_dataset_is_read(folders, tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {"prompt": ["Hi?", "Ho?"], "answer": ["Ho.", "Hi."]}
    table = pytest.importorskip("pyarrow").table(columns)
    saved = datasets.Dataset(table, fingerprint="0")
    saved.save_to_disk(str(tmp_path / "set"))
    found = read_conversations(tmp_path / "set")
    assert [c.messages[1].parts[0].value for c in found] == ["Ho.", "Hi."]


def test_a_saved_dataset_names_the_library_that_reads_it(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install datasets"):
        read_conversations(tmp_path)


@pytest.mark.parametrize("kinds", [(), ("image",), ("audio",), ("image", "audio")])
def test_made_up_samples_have_what_a_model_takes(kinds):
    first, again = (read_conversations("synthetic", kinds) for _ in range(2))
    assert len(first) == 16 and all(c.where.startswith("synthetic") for c in first)
    assert all(c.kinds == {"text", *kinds} and c.is_answered for c in first)
    assert all(repr(a) == repr(b) for a, b in zip(first, again))


# What is said


def _message(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}]}


IMAGE = {"type": "image", "path": "there.png"}

WRONG_LINES = {
    "no JSON": ("{", "is no JSON"),
    "a number": ("3", "is a int, not a dict"),
    "nothing in it": ("{}", "has none of 'messages', 'image'"),
    "unknown keys": ('{"imgae": "there.png"}', "its keys are 'imgae'"),
    "no messages": ('{"messages": []}', "at least one message"),
    "no role": ('{"messages": [{"content": "a"}]}', "'role' and 'content'"),
    "no content": ('{"messages": [{"role": "user"}]}', "a text or a list of parts"),
    "a part that is a text": (
        json.dumps(_message("a")),
        "a part of a message is a dict",
    ),
    "an unknown type": (
        json.dumps(_message({"type": "imge", "path": "there.png"})),
        "unknown content type 'imge'",
    ),
    "a video that is not there": (
        json.dumps(_message({"type": "video", "path": "a.mp4"})),
        "there is no video",
    ),
    "no source": (json.dumps(_message({"type": "image"})), "has no source"),
    "too many images": (
        json.dumps({**_message(IMAGE), "images": ["there.png"]}),
        "that no message points at",
    ),
    "an image that is not there": (
        json.dumps(_message({"type": "image", "path": "gone.png"})),
        "there is no image",
    ),
    "an image that is none": (
        '{"image": "broken.png"}',
        "is no image that can be read",
    ),
    "a sound that is none": ('{"audio": "broken.wav"}', "is no sound that can be read"),
    "an empty text": ('{"text": " "}', "its text is empty"),
    "a prompt that is a number": ('{"prompt": 3}', "prompt is a text, got 3"),
    "a task that is a number": ('{"text": "a", "task": 3}', "task is a name"),
}


@pytest.mark.parametrize("line, said", WRONG_LINES.values(), ids=WRONG_LINES)
def test_a_wrong_line_is_named_by_its_number(tmp_path, line, said):
    model_folders.write_image(tmp_path / "there.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    data = tmp_path / "data.jsonl"
    data.write_text(f'{{"image": "there.png"}}\n\n{line}\n')
    with pytest.raises((ValueError, OSError)) as caught:
        read_conversations(data)
    assert said in str(caught.value)
    assert str(caught.value).startswith("data.jsonl, line 3")


@pytest.mark.parametrize("name", ["empty.jsonl", "empty"])
def test_empty_data_is_refused(tmp_path, name):
    path = tmp_path / name
    path.touch() if path.suffix else path.mkdir()
    with pytest.raises(ValueError, match="is empty: give at least one sample"):
        read_conversations(path)


def test_data_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl.*or 'synthetic'"):
        read_conversations(tmp_path / "nowhere.jsonl")
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no text"):
        read_conversations(tmp_path / "data.jsonl")


def test_two_files_of_one_kind_and_name_are_refused(tmp_path):
    model_folders.write_image(tmp_path / "cat.png")
    model_folders.write_image(tmp_path / "cat.jpg")
    with pytest.raises(ValueError, match="two files of kind 'image' named 'cat'"):
        read_conversations(tmp_path)


def test_a_medium_that_the_model_lacks_is_refused(folders, tmp_path):
    model_folders.write_sound(tmp_path / "a.wav")
    data = model_folders.write_lines(tmp_path / "a.jsonl", {"audio": "a.wav"})
    with pytest.raises(
        ValueError, match="line 1 has an audio.*LlavaConfig.*image only"
    ):
        processed(folders["vision"], data)


def test_a_processor_without_a_template_is_told(folders, tmp_path):
    data = model_folders.write_lines(
        tmp_path / "a.jsonl", {"text": "Plain."}, {"prompt": "Hello?"}
    )
    config = AutoConfig.from_pretrained(folders["text"])
    tokenizer = AutoTokenizer.from_pretrained(folders["text"])
    tokenizer.chat_template = None
    plain, asked = read_conversations(data)
    assert len(ProcessedConversations([plain], tokenizer, config)[0]["input_ids"]) == 1
    with pytest.raises(ValueError, match="line 2.*has no chat template"):
        ProcessedConversations([asked], tokenizer, config)


def test_a_template_that_fails_names_the_line(folders, tmp_path):
    data = model_folders.write_lines(tmp_path / "a.jsonl", {"prompt": "Hello?"})
    samples = processed(folders["vision"], data)
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


def test_what_the_processor_refuses_names_the_line(folders, tmp_path, monkeypatch):
    model_folders.write_image(tmp_path / "a.png")
    data = model_folders.write_lines(tmp_path / "a.jsonl", {"image": "a.png"})
    samples = processed(folders["vision"], data)

    def refuse(*args, **kwargs):
        raise ValueError("1 image and no placeholder.")

    monkeypatch.setattr(samples.processor, "apply_chat_template", refuse)
    with pytest.raises(ValueError, match="line 1: the model's processor does not take"):
        samples[0]
