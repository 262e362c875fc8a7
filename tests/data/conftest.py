# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
import pytest

from torchao_masquant.testing import model_folders


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "vision": model_folders.vision_model(folder / "vision"),
        "audio": model_folders.audio_model(folder / "audio"),
        "text": model_folders.text_model(folder / "text"),
    }


@pytest.fixture
def folder(tmp_path):
    """With two images and two sounds."""
    for index, name in enumerate("ab"):
        model_folders.write_image(tmp_path / f"{name}.png", index)
        model_folders.write_sound(tmp_path / f"{name}.wav", 0.5 + index / 4)
    return tmp_path
