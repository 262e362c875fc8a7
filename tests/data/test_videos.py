# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Videos: a few upright frames, where the model's processor takes them."""

import numpy as np
import pytest
from data.seen import lines, seen

from torchao_masquant.data import ProcessedConversations, read_conversations
from torchao_masquant.data.videos import read_video
from torchao_masquant.testing import model_folders

av = pytest.importorskip("av")


def write_video(path, frames, rate, codec="mpeg4", rotation=0):
    """A landscape that is white on its left, and gets brighter on its right."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for index in range(frames):
            pixels = np.full((32, 64, 3), 100 * index // frames, np.uint8)
            pixels[:, :32] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    "name, frames, rate, wanted",
    [
        # Two in a second, from the first to the last.
        ("a.mp4", 40, 10, [0, 6, 11, 17, 22, 28, 33, 39]),
        ("a.mkv", 40, 10, [0, 6, 11, 17, 22, 28, 33, 39]),
        # No more than 16.
        ("a.avi", 400, 25, np.linspace(0, 399, 16).round().tolist()),
        ("a.mp4", 1, 10, [0]),
    ],
)
def test_frames_at_equal_distances(tmp_path, name, frames, rate, wanted):
    path = write_video(tmp_path / name, frames, rate)
    found, metadata = read_video(path, "line 1")
    assert found.shape == (len(wanted), 32, 64, 3) and found.dtype == np.uint8
    assert metadata.frames_indices == wanted
    assert (metadata.total_num_frames, metadata.fps) == (frames, rate)
    brightness = found[:, :, 48:].mean((1, 2, 3))
    # What the codec loses is a few levels.
    np.testing.assert_allclose(brightness, 100 * np.array(wanted) // frames, atol=6)
    again, _ = read_video(path.read_bytes(), "line 1")
    np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize("rotation, turns", [(90, 1), (-90, 3), (180, 2)])
def test_a_phones_video_is_upright(tmp_path, rotation, turns):
    lying, _ = read_video(write_video(tmp_path / "a.mp4", 4, 10), "line 1")
    path = write_video(tmp_path / "b.mp4", 4, 10, rotation=rotation)
    found, _ = read_video(path, "line 1")
    np.testing.assert_array_equal(found, np.rot90(lying, turns, (1, 2)))


def test_other_files_are_no_videos(folder):
    for name in ("a.png", "a.wav"):
        with pytest.raises(ValueError, match=f"line 1: '.*{name}' is no video"):
            read_conversations(lines(folder, {"video": name, "prompt": "What?"}))
    with pytest.raises(
        ValueError, match="line 1: .*data.jsonl' is no video that can be"
    ):
        read_conversations(lines(folder, {"video": "data.jsonl", "prompt": "What?"}))


def test_a_model_without_videos_says_so(models, folder):
    write_video(folder / "a.mp4", 4, 10)
    data = lines(folder, {"video": "a.mp4", "prompt": "What?"})
    sentence = (
        "line 1 has a video, which this model does not take.*give some of its frames"
    )
    with pytest.raises(ValueError, match=sentence):
        seen(models["vision"], data)


class Processor:
    """Stands for a processor that takes videos: theirs need torchvision."""

    video_processor = object()
    chat_template = "a template"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.calls = []

    def apply_chat_template(self, messages, **options):
        self.calls.append((messages, options.get("processor_kwargs")))
        text = "".join(
            part.get("text", "<image>") for m in messages for part in m["content"]
        )
        return self.tokenizer(text, return_tensors="pt")


def test_a_processor_is_given_frames_and_their_times(models, folder):
    from transformers import AutoConfig, AutoTokenizer

    write_video(folder / "a.mp4", 40, 10)
    model_folders.write_image(folder / "0.png")
    rows = [
        {
            "video": "a.mp4",
            "conversations": [
                {"from": "human", "value": "<video>\nWhat?"},
                {"from": "gpt", "value": "No."},
            ],
        },
        {"video": ["a.png", "b.png"], "prompt": "What?"},
        [
            {
                "role": "user",
                "content": [{"type": "video_url", "video_url": {"url": "a.mp4"}}],
            }
        ],
    ]
    processor = Processor(AutoTokenizer.from_pretrained(models["vision"]))
    config = AutoConfig.from_pretrained(models["vision"])
    conversations = read_conversations(lines(folder, *rows))
    assert len(ProcessedConversations(conversations, processor, config)[:]) == 3
    (told, options), (frames, untimed), (asked, _) = processor.calls
    video = told[0]["content"][0]
    assert video["type"] == "video" and video["video"].shape == (8, 32, 64, 3)
    assert told[0]["content"][1] == {"type": "text", "text": "What?"}
    assert options["do_sample_frames"] is False
    assert options["video_metadata"][0][0].fps == 10
    assert [frame.size for frame in frames[0]["content"][0]["video"]] == [(24, 20)] * 2
    assert untimed == {"do_sample_frames": False}
    assert asked[0]["content"][0]["type"] == "video"
