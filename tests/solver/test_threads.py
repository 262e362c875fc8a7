# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How many threads work on matrices of a size, and that nothing else is changed by it."""

import contextlib
import re
import threading
from pathlib import Path
from typing import Optional

import pytest
import torch

from torchao_masquant import calibrate, threads
from torchao_masquant.testing import digits
from torchao_masquant.threads import SMALL, available_cores, threads_for


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def of_another_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def of_mkl() -> Optional[int]:
    found = re.search(
        r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info()
    )
    return None if found is None else int(found[1])


def test_small_matrices_have_one_thread_and_others_keep_theirs():
    with threads_for(SMALL):
        assert torch.get_num_threads() == 1
        assert of_mkl() in (None, 1)
        assert of_another_thread() == 3
    assert torch.get_num_threads() == 3
    assert of_mkl() in (None, 3)


def test_large_ones_have_what_the_container_may_use(monkeypatch):
    monkeypatch.setattr(threads, "available_cores", lambda cgroup: 2)
    with threads_for(SMALL + 1):
        assert torch.get_num_threads() == 2
    monkeypatch.setattr(threads, "available_cores", lambda cgroup: 64)
    with threads_for(SMALL + 1):
        assert torch.get_num_threads() == 3


def test_where_openmp_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(threads, "_setters", lambda: (None, None))
    with pytest.raises(ZeroDivisionError), threads_for(SMALL):
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == of_another_thread() == 3


def files(folder: Path, **content: str) -> Path:
    for name, text in content.items():
        path = folder / name.replace("__", "/").replace("_of_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    "content, cores",
    [
        ({"cpu_of_max": "150000 100000\n"}, 2),
        ({"cpu_of_max": "20000 100000\n"}, 1),
        (
            {
                "cpu__cpu_of_cfs_quota_us": "400000",
                "cpu__cpu_of_cfs_period_us": "100000",
            },
            4,
        ),
    ],
)
def test_a_quota_of_either_version(tmp_path, content, cores):
    assert available_cores(files(tmp_path, **content)) == cores


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"cpu_of_max": "max 100000\n"},
        {"cpu_of_max": "damaged"},
        {"cpu__cpu_of_cfs_quota_us": "-1", "cpu__cpu_of_cfs_period_us": "100000"},
    ],
)
def test_without_a_quota_all_of_the_machine(tmp_path, monkeypatch, content):
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    assert available_cores(files(tmp_path, **content)) == 12


@pytest.mark.parametrize("fails", [False, True])
def test_calibration_of_a_small_model_gives_its_threads_back(fails):
    model = digits.load_model("plain")
    seen: list[int] = []

    def watch(*_: object) -> None:
        seen.append(torch.get_num_threads())
        if fails and len(seen) > 1:
            raise InterruptedError

    model.lm_head.register_forward_hook(watch)
    samples = digits.calibration_samples(4)
    with pytest.raises(InterruptedError) if fails else contextlib.nullcontext():
        calibrate(model, samples, method="rtn", progress=False)
    assert set(seen) == {1}
    assert torch.get_num_threads() == of_another_thread() == 3
