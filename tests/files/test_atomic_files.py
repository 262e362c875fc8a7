# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Files and folders are there whole or not at all."""

import os
import sys
import threading
from pathlib import Path

import pytest

from torchao_masquant.atomic_files import (
    move_folder,
    replacing,
    replacing_folder,
    write_whole,
)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [False, True])
def test_an_error_leaves_the_old_file(tmp_path, durable):
    path = tmp_path / "file"
    write_whole(path, "old")
    with pytest.raises(KeyboardInterrupt):
        with replacing(path, durable=durable) as temporary:
            temporary.write_text("half of")
            raise KeyboardInterrupt
    assert path.read_text() == "old" and _names(tmp_path) == ["file"]


def test_a_durable_file_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    steps: list[str] = []
    for name in ("fsync", "replace"):
        done = getattr(os, name)

        def noted(*args, name=name, done=done):
            steps.append(name)
            return done(*args)

        monkeypatch.setattr(os, name, noted)
    write_whole(tmp_path / "file", "é", durable=True)
    # The file, its name, the folder that holds the name.
    assert steps == ["fsync", "replace", "fsync"]
    assert (tmp_path / "file").read_bytes() == "é".encode()


def test_writers_of_one_file_do_not_meet(tmp_path):
    """Two threads that write one file: either's content, and never a mixture."""
    both = threading.Barrier(2)

    def write(text: str) -> None:
        with replacing(tmp_path / "file") as temporary:
            both.wait()
            temporary.write_text(text)
            both.wait()

    threads = [threading.Thread(target=write, args=(t * 9,)) for t in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_text() in ("a" * 9, "b" * 9)
    assert _names(tmp_path) == ["file"]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("old")
    (tmp_path / "file").symlink_to(tmp_path / "there" / "file")
    (tmp_path / "folder").symlink_to(tmp_path / "there")
    write_whole(tmp_path / "file", "new")
    assert (tmp_path / "there" / "file").read_text() == "new"
    with replacing_folder(tmp_path / "folder") as new:
        (new / "other").touch()
    assert _names(tmp_path / "there") == ["other"]
    assert (tmp_path / "file").is_symlink() and (tmp_path / "folder").is_symlink()


def test_a_folder_and_those_around_it(tmp_path):
    mask = os.umask(0o022)
    try:
        with replacing_folder(tmp_path / "a" / "b") as new:
            assert new.name == "b" and not any(new.iterdir())
            (new / "file").touch()
    finally:
        os.umask(mask)
    assert _names(tmp_path / "a") == ["b"] and _names(tmp_path / "a" / "b") == ["file"]
    # As the user's umask has it, though temporary folders are their owner's alone.
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o755


def test_an_error_leaves_the_old_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with pytest.raises(KeyboardInterrupt):
        with replacing_folder(tmp_path / "folder") as new:
            (new / "half").touch()
            raise KeyboardInterrupt
    assert _names(tmp_path) == ["folder"]
    assert _names(tmp_path / "folder") == ["old"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match="^cannot write .*file/folder': .* can be written"
    ):
        with replacing_folder(tmp_path / "file" / "folder"):
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="it is a call of Linux")
def test_folders_trade_places_in_one_step(tmp_path, monkeypatch):
    for name in ("new", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    monkeypatch.delattr(os, "rename")
    move_folder(tmp_path / "new", tmp_path / "target", tmp_path / "old")
    assert _names(tmp_path / "target") == ["new"]
    assert _names(tmp_path / "new") == ["target"]
