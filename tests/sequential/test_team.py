# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Two processes calibrate what one does."""

import functools
import os
import signal

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from results import FIXED, assert_same_files
from teams import stopped, together

from torchao_masquant import Recipe
from torchao_masquant.conductor.conductor import Conductor
from torchao_masquant.conductor.team import Team
from torchao_masquant.sequential import calibrate_sequential
from torchao_masquant.statistics.input_statistics import Moments
from torchao_masquant.statistics.token_sample import TokenSample

CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(
        st.lists(st.integers(0, 400), min_size=1, max_size=5), min_size=1, max_size=4
    )
)
def test_sampled_tokens_do_not_depend_on_the_processes(calls):
    """Of each process's calls: what is kept together is what one would have kept."""
    tokens = iter(range(10**6))
    data = [
        [torch.tensor([[float(next(tokens))] for _ in range(n)]) for n in counts]
        for counts in calls
    ]
    data = [[x.reshape(-1, 1) for x in process] for process in data]
    whole = Moments.zeros(1, CPU, True)
    for process in data:
        for x in process:
            whole.update(x)
    parts, before = [], 0
    for process in data:
        part = Moments.zeros(1, CPU, True, before)
        for x in process:
            part.update(x)
        before += part.count
        parts.append(part)
    kept = TokenSample.together([part.sampled for part in parts])
    assert torch.equal(kept.rows, whole.sample)
    assert torch.equal(kept.numbers, whole.sampled.numbers)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "model"
    tiny_models.qwen25_vl(2).save_pretrained(folder)
    return folder


def calibrated(rank, original, folder, **options):
    calibrate_sequential(
        original,
        tiny_models.samples(audio=False, count=3),
        output=folder / "quantized",
        recipe=folder / "recipe.safetensors",
        **{**FIXED, "timeout": 60, **options},
    )


@pytest.fixture(scope="module")
def by_two(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run = functools.partial(calibrated, original=original, folder=folder)
    assert together(tmp_path_factory.mktemp("store"), run) == [None, None]
    (folder / "store").unlink(missing_ok=True)
    return folder


def test_two_processes_write_what_one_writes(original, by_two, tmp_path):
    """Statistics differ by 1e-16, and so may an integer where a tie is that close; with
    the column that follows it. On this data none is."""
    calibrated(0, original, tmp_path)
    one = Recipe.load(tmp_path / "recipe.safetensors")
    two = Recipe.load(by_two / "recipe.safetensors")
    assert list(one.layers) == list(two.layers)
    for name, layer in one.layers.items():
        other = two.layers[name]
        assert (layer.fingerprint, layer.ranks) == (other.fingerprint, other.ranks)
        flipped = (layer.qdata != other.qdata).double().mean()
        assert flipped <= 1e-3, name
        for key in ("smoothing_factor", "scale", "act_shift", "modality_bias"):
            # Float32 of a float64 result: one unit in the last place.
            value, expected = getattr(other, key), getattr(layer, key)
            largest = expected.abs().max()
            if not flipped or key != "modality_bias":
                assert (value - expected).abs().max() <= 2.0**-22 * largest, (name, key)


def dying(rank, original, folder):
    if rank == 1:
        Conductor.layers = killing(Conductor.layers)
    calibrated(rank, original, folder)


def killing(solve):
    calls = []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return solve(*args)

    return killed


def test_a_process_that_dies_stops_the_others_and_all_go_on(original, by_two, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    stopped(tmp_path, functools.partial(dying, original=original, folder=work))
    assert (work / "quantized.partial" / "block-00000.json").is_file()
    again = functools.partial(calibrated, original=original, folder=work)
    assert together(tmp_path, again) == [None, None]
    assert_same_files(by_two, work)


def refused(rank, original, folder, case):
    count = {"few": 1, "different": 2 + rank}.get(case, 3)
    options = {"error": {"exclude": "*.nothing"}}.get(case, {})
    try:
        calibrate_sequential(
            original,
            tiny_models.samples(audio=False, count=count),
            output=folder / "q",
            timeout=60,
            **{**FIXED, **options},
        )
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "case, message",
    [
        ("few", "there are 1 samples for 2 processes"),
        ("different", "the processes were given different samples"),
        ("error", "matches no linear"),
    ],
)
def test_all_processes_refuse(original, tmp_path, case, message):
    run = functools.partial(refused, original=original, folder=tmp_path, case=case)
    found = together(tmp_path, run)
    assert all(message in str(text) for text in found)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_task_has_one_process(size):
    costs = [5.0, 1.0, 9.0, 1.0, 2.0]
    shares = []
    for rank in range(size):
        team = Team()
        team.rank, team.size = rank, size
        shares.append(team.mine(costs))
    assert sorted(i for share in shares for i in share) == list(range(5))
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) <= max(9.0, sum(costs) / size * 4 / 3)
