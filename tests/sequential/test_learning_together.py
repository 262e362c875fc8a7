# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Several processes learn what one learns, each from its own samples."""

import dataclasses
import functools
import logging
import os
import signal

import pytest
import tiny_models
import torch
from checkpoints import assert_same_recipe
from one_block import Model
from results import FIXED, assert_same_files
from teams import stopped, together

from torchao_masquant import Recipe, calibrate
from torchao_masquant.conductor.team import Team
from torchao_masquant.learning.batch_gradient import BatchGradient
from torchao_masquant.learning.learn import BlockTask
from torchao_masquant.learning.together import Alone
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.sequential import TeamError, calibrate_sequential

NAMES = ("text", "vision")
WIDTH = 16


@dataclasses.dataclass
class Call:
    ids: torch.Tensor

    def run(self, index, block, hidden):
        return block(hidden)


#: Samples, of a batch, and processes: one without a sample that is held back; uneven
#: shares; batches in which a process has no sample; one batch of all, with none held
#: back; a last batch of one process alone.
CASES = [(9, 2, 2), (11, 3, 2), (9, 1, 2), (5, 8, 2), (13, 4, 2), (10, 3, 3)]


def samples_of(count):
    generator = torch.Generator().manual_seed(count)
    samples = [
        {
            "x": torch.randn(1, 30 + i % 4, WIDTH, generator=generator),
            "modality_ids": torch.randint(0, 2, (1, 30 + i % 4), generator=generator),
        }
        for i in range(count)
    ]
    # The other modality's tokens begin with the second sample.
    samples[0]["modality_ids"].zero_()
    return samples


def task_of(count, batch_size, team):
    """The block of a model, to be learned by a process that has some samples."""
    torch.manual_seed(0)
    model, samples = Model(WIDTH, 24, bias=False), samples_of(count)
    recipe = calibrate(
        model,
        samples,
        modalities=NAMES,
        scheme="w4a8",
        rank=2,
        alpha=0.5,
        separation=1.0,
        progress=False,
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    options = dataclasses.replace(
        recipe.options, epochs=3, lr=2e-3, batch_size=batch_size
    )
    share = team.share_of(count) if isinstance(team, Team) else range(count)
    own = [samples[i] for i in share]
    block = model.layers[0]
    calls = [Call(sample["modality_ids"]) for sample in own]
    task = BlockTask("layers.0", block, 0, recipe.layers, NAMES, options, calls, team)
    inputs = [sample["x"] for sample in own]
    return task, inputs, [block(x) for x in inputs]


def learned(rank, cases):
    """Of each case: energies, losses that were judged, and floats, as plain numbers."""
    found = []
    for count, batch_size, _ in cases:
        team = Alone() if rank is None else Team(60)
        task, inputs, targets = task_of(count, batch_size, team)
        judged, gather = [], team.gather
        team.gather = lambda value: judged.append(gather(value)) or judged[-1]
        layers = task.learn(inputs, targets)
        losses = [sum(values, []) for values in judged if isinstance(values[0], list)]
        floats = {
            f"{name}.{key}": tensor.double().tolist()
            for name, layer in layers.items()
            for key, tensor in layer.tensors().items()
        }
        found.append((task._energies(targets), losses, floats))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_a_block_is_learned_as_by_one(tmp_path, size):
    """Bit for bit. A gradient's float64 sum in another order could be another float32
    next to a tie, at odds of 1e-8 a value; on this data none is."""
    cases = [case for case in CASES if case[2] == size]
    alone = learned(None, cases)
    for case, (_, losses, _) in zip(cases, alone):
        # The start and three epochs, of all samples that judge; the best is no start.
        assert [len(n) for n in losses] == [len(range(7, case[0], 8)) or case[0]] * 4
        assert min(map(sum, losses)) < sum(losses[0]), case
    for found in together(tmp_path, functools.partial(learned, cases=cases), size):
        assert not isinstance(found, Exception), found
        for case, one, other in zip(cases, alone, found):
            assert one == other, case


def differing(rank):
    team = Team(60)
    shift = torch.arange(6.0)[::2].expand(2, 3)
    layer = LayerRecipe(
        shape=(4, 3),
        fingerprint=f"of {rank}",
        smoothing_factor=torch.full((2, 3), rank + 0.5),
        ranks=(1,),
        l1=torch.ones(3, 1).bfloat16() * rank,
        l2=torch.ones(4, 1).t() * 3,
        act_shift=shift * (rank + 1),
        qdata=torch.full((4, 3), -7 + rank, dtype=torch.int8),
    )
    layers = {"b": layer, "a": dataclasses.replace(layer, qdata=None)}
    found = team.spread(layers if rank == 0 else {})
    same = [
        (name, of.fingerprint, {k: (str(t.dtype), t.tolist()) for k, t in tensors})
        for name, of in found.items()
        for tensors in [of.tensors().items()]
    ]
    team.agree("layers.0", found)
    try:
        team.agree("layers.0", layers)
    except TeamError as error:
        return same, str(error)


def test_what_is_spread_and_that_all_have_it(tmp_path):
    first, second = together(tmp_path, differing)
    assert first == second
    layers, message = first
    assert [name for name, _, _ in layers] == ["b", "a"]
    _, fingerprint, tensors = layers[0]
    assert fingerprint == "of 0"
    assert tensors == {
        "smoothing_factor": ("torch.float32", [[0.5] * 3] * 2),
        "l1": ("torch.bfloat16", [[0.0]] * 3),
        "l2": ("torch.float32", [[3.0] * 4]),
        "act_shift": ("torch.float32", [[0.0, 2.0, 4.0]] * 2),
        "qdata": ("torch.int8", [[-7] * 3] * 4),
    }
    assert "have learned different weights of layers.0" in message


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "model"
    tiny_models.qwen25_vl(2).save_pretrained(folder)
    return folder


# Nothing that makes the 1e-16 by which statistics of two processes differ a larger number:
# no pairs, no compensated rounding.
START = {**FIXED, "rank": 0, "rounding": "nearest"}
LEARNING = {**START, "epochs": 2, "lr": 3e-4, "batch_size": 2}


def calibrated(rank, original, folder, **options):
    """Nine samples: that which is held back is the second process's."""
    warnings = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("torchao_masquant").addHandler(handler)
    calibrate_sequential(
        original,
        tiny_models.samples(audio=False, count=9),
        output=folder / "quantized",
        recipe=folder / "recipe.safetensors",
        **{**LEARNING, "timeout": 60, **options},
    )
    return [text for text in warnings if "batch_size" in text]


@pytest.fixture(scope="module")
def by_two(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run = functools.partial(calibrated, original=original, folder=folder)
    assert together(tmp_path_factory.mktemp("store"), run) == [[], []]
    return folder


def test_two_processes_write_what_one_writes(original, by_two, tmp_path):
    """Bit for bit: at odds of 1e-8 a value the statistics would give another float32; on
    this data they do not."""
    calibrated(0, original, tmp_path)
    two = Recipe.load(by_two / "recipe.safetensors")
    assert_same_recipe(Recipe.load(tmp_path / "recipe.safetensors"), two)
    samples = tiny_models.samples(audio=False, count=9)
    start = calibrate(tiny_models.qwen25_vl(2), samples, **START)
    for index in range(2):
        name = f"model.language_model.layers.{index}.mlp.up_proj"
        factors = (r.layers[name].smoothing_factor for r in (start, two))
        assert not torch.equal(*factors)


def dying(rank, original, folder):
    if rank == 1:
        finish, calls = BatchGradient.finish, []

        def killed(*args):
            calls.append(args)
            # Two epochs of four steps a block: in the second one's.
            if len(calls) == 11:
                os.kill(os.getpid(), signal.SIGKILL)
            finish(*args)

        BatchGradient.finish = killed
    calibrated(rank, original, folder)


def test_one_that_dies_while_learning_stops_the_other(original, by_two, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    stopped(tmp_path, functools.partial(dying, original=original, folder=work))
    parts = {p.name for p in (work / "quantized.partial").glob("block-*.json")}
    assert parts == {"block-00000.json"}
    again = functools.partial(calibrated, original=original, folder=work)
    assert together(tmp_path, again) == [[], []]
    assert_same_files(by_two, work)


def test_processes_that_wait_are_told_of(original, tmp_path):
    run = functools.partial(
        calibrated, original=original, folder=tmp_path, epochs=1, batch_size=1
    )
    (told,), nothing = together(tmp_path, run)
    assert "batch_size=1 samples for 2 processes, and those without one wait" in told
    assert nothing == []
