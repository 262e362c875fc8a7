# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Experts of a mixture, calibrated from disk, block by block."""

import functools

import killed_runs
import pytest
import tiny_models
import torch
from checkpoints import assert_same_recipe
from results import FIXED, assert_same_checkpoint, assert_same_files
from teams import SIZE, together
from torchao.quantization import quantize_
from transformers import Qwen3VLMoeForConditionalGeneration

from torchao_masquant import Recipe, Router, calibrate, masquant_config
from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.conductor.team import Team
from torchao_masquant.models.experts import experts_of
from torchao_masquant.options import SolverOptions
from torchao_masquant.sequential import calibrate_sequential
from torchao_masquant.sequential.disk_model import DiskModel
from torchao_masquant.sequential.preflight import estimate
from torchao_masquant.statistics.expert_statistics import ExpertStatistics

LAYERS = 3


def samples():
    """Text and an image, of different lengths."""
    found = []
    for seed in range(4):
        before = tiny_models.words(9 + seed, seed)
        after = tiny_models.words(5, seed + 50)
        sample = tiny_models.batch([1, *before, "image", *after], seed=seed)
        images = sample["input_ids"] == tiny_models.IMAGE
        found.append({**sample, "mm_token_type_ids": images.long()})
    return found


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "model"
    tiny_models.qwen3_vl_moe(LAYERS).save_pretrained(folder, max_shard_size="60KB")
    return folder


def run(original, folder, **options):
    return calibrate_sequential(
        original,
        samples(),
        output=folder / "quantized",
        recipe=folder / "recipe.safetensors",
        **{**FIXED, **options},
    )


@pytest.fixture(scope="module")
def whole(original, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    run(original, folder)
    return folder


def in_memory(original, output, **options):
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(original)
    recipe = calibrate(model, samples(), **{**FIXED, **options})
    quantize_(model, masquant_config(recipe))
    model.save_pretrained(output)
    return recipe


def test_it_is_what_is_made_in_memory(original, whole, tmp_path):
    recipe = in_memory(original, tmp_path / "expected")
    found = Recipe.load(whole / "recipe.safetensors")
    assert sum(len(layer.shape) == 3 for layer in found.layers.values()) == 2 * LAYERS
    assert_same_recipe(recipe, found)
    assert_same_checkpoint(tmp_path / "expected", whole / "quantized")
    assert Qwen3VLMoeForConditionalGeneration.from_pretrained(whole / "quantized")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "rtn", "scheme": "w8a8", "rank": 0},
        {"include": "*.experts.*", "rank": "auto"},
        {"exclude": "*.layers.1.mlp.experts.*"},
    ],
    ids=lambda options: " ".join(options),
)
def test_other_options(original, tmp_path, options):
    options = {"separation": None, **options} if "method" in options else options
    run(original, tmp_path, **options)
    recipe = in_memory(original, tmp_path / "expected", **options)
    assert_same_recipe(recipe, Recipe.load(tmp_path / "recipe.safetensors"))
    assert_same_checkpoint(tmp_path / "expected", tmp_path / "quantized")


def test_several_passes_give_the_same(original, whole, tmp_path):
    run(original, tmp_path, max_statistics_bytes=100_000, activations="disk")
    assert_same_recipe(
        Recipe.load(whole / "recipe.safetensors"),
        Recipe.load(tmp_path / "recipe.safetensors"),
    )


def test_it_goes_on(original, tmp_path, monkeypatch):
    """Through a finished block, experts run as they ran when they were observed.

    transformers' "eager" ones add up what the experts of a token give in another order.
    """
    made = DiskModel._skeleton

    def eager(self, kind, config):
        model = made(self, kind, config)
        model.set_experts_implementation("eager")
        return model

    monkeypatch.setattr(DiskModel, "_skeleton", eager)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir(), halves.mkdir()
    run(original, whole)
    with monkeypatch.context() as interrupted:
        killed_runs.stop_at(interrupted, 2)
        with pytest.raises(killed_runs.Stop):
            run(original, halves)
    assert run(original, halves).resumed == 2
    assert_same_files(whole, halves)


def test_learning_is_refused_as_in_memory(original, tmp_path):
    model = tiny_models.qwen3_vl_moe()
    with pytest.raises(ValueError) as in_memory:
        calibrate(model, samples(), epochs=1)
    with pytest.raises(ValueError, match="learning is for linears alone") as raised:
        run(original, tmp_path, epochs=1)
    assert str(raised.value) == str(in_memory.value)
    assert not list(tmp_path.iterdir())


def test_loading_stacks_the_matrices_of_each_expert(original, tmp_path):
    """Where a file holds them so, as that of Qwen3-Omni-MoE does."""
    disk = DiskModel(original)
    experts = [name for name in disk.names_in_files if ".experts." in name]
    assert disk.bytes_of_conversion(experts) == 0
    first = experts[0]
    disk.names = {f"{first}.{e}": [first] for e in range(6)} | disk.names
    assert disk.bytes_of_conversion(experts) == disk.bytes_of([first])
    assert disk.bytes_of_conversion([n for n in experts if n != first]) == 0


# Preflight

WIDTH, INNER, EXPERTS = 2048, 768, 128


def needs(**change):
    """One block of Qwen3-VL-30B-A3B's experts."""
    blocks = [
        {
            "layers.0.mlp.experts.gate_up_proj": (EXPERTS, 2 * INNER, WIDTH),
            "layers.0.mlp.experts.down_proj": (EXPERTS, WIDTH, INNER),
        }
    ]
    weights = EXPERTS * 3 * INNER * WIDTH
    return estimate(
        **{
            **dict(
                blocks=blocks,
                block_bytes=[2 * weights],
                front_bytes=0,
                other_bytes=0,
                hidden=WIDTH,
                itemsize=2,
                tokens=[512],
                modalities=2,
                options=SolverOptions(alpha=0.5, separation=1.0),
                max_statistics_bytes=4 << 30,
                on_disk=False,
                writes=(True, True),
            ),
            **change,
        }
    )


def test_sizes_of_experts(tmp_path):
    weights = EXPERTS * 3 * INNER * WIDTH
    found = needs()
    assert found.block == 3 * weights
    # Values of all experts of the larger projection in float64, and its integers.
    assert found.solver > 9 * EXPERTS * 2 * INNER * WIDTH
    # First moments of each expert, beside covariances of all.
    assert found.least >= (EXPERTS + 1) * 24 * INNER * 2 + 2 * 8 * INNER**2
    assert found.disk > 2 * weights
    with pytest.raises(ValueError, match=r"exclude='\*\.experts\.\*'"):
        found.check(4 << 30, None, tmp_path)
    converted = needs(conversion_bytes=found.device)
    assert converted.device == found.block + found.device


# Several processes


def session_of(rank, size):
    """A session that has seen one process's part of the calls of some experts."""
    model = tiny_models.qwen3_vl_moe(1)
    block = model.get_decoder().layers[0]
    router = Router(("text", "vision"))
    generator = torch.Generator().manual_seed(0)
    calls = [
        (
            torch.randn(n, tiny_models.HIDDEN, generator=generator),
            torch.randint(0, 2, (n,), generator=generator),
        )
        for n in (300, 7, 201, 90)
    ]
    share = range(len(calls) * rank // size, len(calls) * (rank + 1) // size)
    before = [
        sum(int((ids == m).sum()) for _, ids in calls[: share.start]) for m in (0, 1)
    ]
    session = CalibrationSession({}, router, True, experts_of(block), before)
    with session.watching():
        for index in share:
            x, ids = calls[index]
            with router.explicit(ids[None]), torch.no_grad():
                block.mlp(x[None])
    return session


def numbers(session):
    """Of both projections: exact ones, and sums."""
    exact, sums = [], []
    for statistics in session.statistics.values():
        for moments in statistics.moments:
            exact += [moments.count, moments.before, moments.sample.tolist()]
            exact += [moments.amin.tolist(), moments.amax.tolist()]
            sums += [moments.sum.tolist(), moments.outer.tolist()]
        if isinstance(statistics, ExpertStatistics):
            for moments in statistics.of_experts:
                exact += [moments.count.tolist(), moments.sampled.rows.tolist()]
                exact += [moments.amin.tolist(), moments.amax.tolist(), moments.before]
                sums.append(moments.sum.tolist())
    return exact, sums


def reduced(rank):
    session = session_of(rank, SIZE)
    Team(60).reduce(session)
    return numbers(session)


def test_statistics_of_two_are_those_of_one(tmp_path):
    alone = session_of(0, 1)
    exact, sums = numbers(alone)
    (of_each,) = (
        s for s in alone.statistics.values() if isinstance(s, ExpertStatistics)
    )
    # More than is sampled, so that what is kept depends on all.
    assert all(moments.count > 512 for moments in of_each.moments)
    eps, rows = torch.finfo(torch.float64).eps, sum(m.count for m in of_each.moments)
    largest = max(
        float(m.absmax().max()) for s in alone.statistics.values() for m in s.moments
    )
    largest = max(largest, largest**2)
    for found in together(tmp_path, reduced):
        assert not isinstance(found, Exception), found
        assert found[0] == exact
        for value, expected in zip(found[1], sums):
            value, expected = (
                torch.tensor(t, dtype=torch.float64) for t in (value, expected)
            )
            # A float64 sum of n terms is off by at most n eps times the sum of sizes.
            assert (value - expected).abs().max() <= 2 * rows * eps * rows * largest


def calibrated(rank, original, folder):
    run(original, folder, timeout=60)


def test_two_processes_write_what_one_writes(original, whole, tmp_path):
    (tmp_path / "two").mkdir()
    work = functools.partial(calibrated, original=original, folder=tmp_path / "two")
    assert together(tmp_path, work) == [None, None]
    one = Recipe.load(whole / "recipe.safetensors")
    two = Recipe.load(tmp_path / "two" / "recipe.safetensors")
    assert list(one.layers) == list(two.layers)
    for name, layer in one.layers.items():
        other = two.layers[name]
        assert (layer.fingerprint, layer.ranks) == (other.fingerprint, other.ranks)
        # A tie that is as close as rounding may fall to the other side.
        assert (layer.qdata != other.qdata).double().mean() <= 1e-3, name
        value, expected = other.smoothing_factor, layer.smoothing_factor
        assert (value - expected).abs().max() <= 2.0**-22 * expected.abs().max(), name
