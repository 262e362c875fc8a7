# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Images and sounds, however they come: as transformers' own loaders read them."""

import base64
import functools
import http.server
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.audio_utils import load_audio
from transformers.image_utils import load_image

from torchao_masquant.data import read_conversations
from torchao_masquant.data.images import read_image
from torchao_masquant.data.sounds import read_audio
from torchao_masquant.testing import model_folders

ORIENTATION = 0x0112

# White on the left, in landscape.
PIXELS = np.zeros((16, 32, 3), np.uint8)
PIXELS[:, :16] = 255


def photograph(path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(PIXELS).save(path, exif=exif)
    return path


def encoded(path, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def part_of(row):
    """The first medium of a row that was read."""
    (conversation,) = read_conversations([row])
    return conversation.messages[0].parts[0].value


# How an image comes in, of its path.
WAYS = {
    "a path": lambda path: path,
    "a text": str,
    "bytes": lambda path: path.read_bytes(),
    "a data address": encoded,
    "a file address": lambda path: path.as_uri(),
    "an open image": Image.open,
    "a row's path": lambda path: part_of({"image": str(path)}),
    "a row's bytes": lambda path: part_of(
        {"image": {"bytes": path.read_bytes(), "path": "x"}}
    ),
    "a row's image": lambda path: part_of({"image": Image.open(path)}),
    "a message's address": lambda path: part_of(
        [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": encoded(path)}}],
            }
        ]
    ),
    "a frame of a video": lambda path: part_of({"video": [str(path)]})[0],
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_photographs_are_upright(tmp_path, way):
    for orientation in range(1, 9):
        path = photograph(tmp_path / "a photo.png", orientation)
        expected = load_image(str(path))
        found = read_image(way(path), "line 1")
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
        # A camera that is turned by a quarter stores portraits in landscape.
        assert found.size == ((16, 32) if orientation > 4 else (32, 16))


def test_a_phones_picture_is_turned_clockwise(tmp_path):
    # Orientation 6: the left of the sensor is the top of the picture.
    upright = np.asarray(read_image(photograph(tmp_path / "a.png", 6), "line 1"))
    np.testing.assert_array_equal(upright, np.rot90(PIXELS, -1))
    assert upright[0, 0, 0] == 255 and upright[-1, 0, 0] == 0


def test_a_folder_of_photographs_is_upright(tmp_path):
    photograph(tmp_path / "a.png", 6)
    (conversation,) = read_conversations(tmp_path)
    assert read_image(conversation.messages[0].parts[0].value, "a").size == (16, 32)


ARRAYS = {
    "rows, columns, channels": PIXELS,
    "gray": PIXELS[..., 0],
    "one channel": PIXELS[..., :1],
    "channels first": PIXELS.transpose(2, 0, 1),
    "a tensor in 0..1": torch.from_numpy(PIXELS).permute(2, 0, 1) / 255,
    "floating point in 0..255": PIXELS.astype(np.float32),
    "truths": PIXELS > 0,
    "transparent": np.concatenate([PIXELS, PIXELS[..., :1]], -1),
}


def test_arrays_are_images():
    for name, array in ARRAYS.items():
        found = read_image(array, "line 1")
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), PIXELS, name)


def test_other_arrays_are_no_images():
    for array in (
        PIXELS - 300.0,
        PIXELS.astype(int) * 2,
        np.zeros((2, 2, 2, 2)),
        np.full((2, 2), np.nan),
    ):
        with pytest.raises(ValueError, match="row 0: an image in an array is .*, got"):
            read_conversations([{"image": array}])


def test_an_image_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "a.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:800])
    with pytest.raises(
        ValueError, match="line 1: '.*a.jpg' is no image that can be read"
    ):
        read_image(path, "line 1")


@pytest.mark.parametrize("rate", [16_000, 24_000, 44_100])
def test_sounds_are_as_transformers_loads_them(tmp_path, rate):
    pytest.importorskip("soundfile")
    pytest.importorskip("soxr")
    path = model_folders.write_sound(tmp_path / "a.wav", 0.3333, 44_100)
    expected = load_audio(str(path), rate)
    for value in (path, path.read_bytes(), encoded(path, "audio/wav"), path.as_uri()):
        found = read_audio(value, rate, "line 1")
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_integers_of_a_decoded_sound_are_scaled():
    levels = np.array([-(2**15), 0, 2**14], np.int16)
    found = read_audio({"array": levels, "sampling_rate": 16_000}, 16_000, "line 1")
    np.testing.assert_array_equal(found, np.float32([-1, 0, 0.5]))


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def address(tmp_path, monkeypatch):
    """Of a server of the folder."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_addresses_on_the_web_are_read_at_once(tmp_path, address):
    photograph(tmp_path / "a.png", 6)
    model_folders.write_sound(tmp_path / "a.wav")
    image = part_of({"image_url": f"{address}/a.png"})
    sound = part_of({"audio_url": f"{address}/a.wav"})
    assert read_image(image, "line 1").size == (16, 32)
    assert read_audio(sound, 16_000, "line 1").shape == (16_000,)
    assert read_image(f"{address}/a.png", "line 1").size == (16, 32)


def test_an_address_that_does_not_answer_is_named(tmp_path, address):
    with pytest.raises(OSError, match="row 0: cannot download the image '.*gone.png'"):
        read_conversations([{"image": f"{address}/gone.png"}])
    with pytest.raises(
        OSError, match="cannot download the audio 'http://127.0.0.1:1/'"
    ):
        read_conversations([{"audio": "http://127.0.0.1:1/"}])


def test_a_file_address_with_a_space(tmp_path):
    path = photograph(tmp_path / "a photo.png", 1)
    assert "%20" in path.as_uri()
    assert part_of({"image": path.as_uri()}) == path
