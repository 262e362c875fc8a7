# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What will not fit is refused before it is begun, with the option that helps."""

import shutil
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from results import FIXED

from torchao_masquant.options import SolverOptions
from torchao_masquant.sequential import calibrate_sequential, preflight
from torchao_masquant.sequential.decoder_walk import DecoderWalk
from torchao_masquant.sequential.preflight import Estimate, check_time, estimate

GIB = 1 << 30

# Qwen2.5-VL-7B: 28 blocks, bfloat16.
WIDTH, INNER, KV = 3584, 18944, 512
BLOCK = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KV, WIDTH),
    "self_attn.v_proj": (KV, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}


@pytest.fixture(autouse=True)
def roomy_disk(monkeypatch):
    """What a test refuses must not depend on how full this machine's disk is."""
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: SimpleNamespace(free=100 * GIB)
    )


def needed_beyond(device, memory):
    """What a process that needs ``device`` and the program lacks."""
    return preflight._PROGRAM_BYTES + device - memory


def seven_billion(method="masquant", on_disk=False, samples=128, **options):
    linears = {f"layers.0.{n}": s for n, s in BLOCK.items()}
    size = 2 * sum(n * k for n, k in BLOCK.values())
    return estimate(
        blocks=[linears] * 28,
        block_bytes=[size] * 28,
        front_bytes=int(2.4 * GIB),
        other_bytes=int(3.5 * GIB),
        hidden=WIDTH,
        itemsize=2,
        tokens=[2048] * samples,
        modalities=2,
        options=SolverOptions(method=method, **options),
        max_statistics_bytes=4 * GIB,
        on_disk=on_disk,
        writes=(True, False),
    )


def test_sizes_of_a_large_model():
    """Against what they are by hand."""
    needs = seven_billion()
    # Two hidden states of 2 bytes for each of 128 * 2048 tokens.
    assert needs.activations == 128 * 2048 * WIDTH * 2 * 2
    # One covariance of 18944 channels in float64 for each of two modalities, more than
    # the bound, since it is alone.
    assert needs.statistics == pytest.approx(2 * 8 * INNER**2, rel=0.02)
    assert needs.widest == "layers.0.mlp.down_proj"
    # Covariances are made in the memory of the statistics; beside them there is one more
    # matrix of that size, and copies of the weight.
    copies = 8 * WIDTH * INNER
    assert 8 * INNER**2 + 7 * copies < needs.solver < 8 * INNER**2 + 14 * copies
    assert needs.peak < 20 * GIB + needs.activations
    assert needs.block == 3 * sum(n * k for n, k in BLOCK.values())
    assert seven_billion(on_disk=True).activations == 0
    assert seven_billion(on_disk=True).disk == needs.disk + needs.activations
    # Learning keeps the quantized stream, too; integers in float32, and a scaled copy.
    learned = seven_billion(epochs=2)
    assert learned.activations == 2 * needs.activations
    assert needs.learning == 0
    weights = sum(n * k for n, k in BLOCK.values())
    assert learned.learning > (4 + 4) * weights + learned.forward
    small = seven_billion("smoothquant")
    # Copies of the weight, and no covariance.
    assert small.solver == 16 * WIDTH * INNER
    assert small.device < 4 * GIB


@pytest.mark.parametrize(
    "needs, memory, advice",
    [
        (seven_billion("smoothquant", samples=1024), 20, "activations='disk'"),
        (seven_billion(samples=8), 12, "exclude='*.down_proj'"),
        (
            Estimate(9, 0, GIB, 6 * GIB, GIB, 2 * GIB, "a", 0, 0, 0),
            6,
            f"max_statistics_bytes={int(6 * GIB - needed_beyond(9 * GIB, 6 * GIB))}",
        ),
        (
            Estimate(10, 8 * GIB, GIB, GIB, GIB, GIB, "a", 0, 0, 0),
            4,
            "embeddings and towers alone",
        ),
        (
            Estimate(90_000, 0, GIB, 0, 0, 0, "a", 9 * GIB, 0, 0),
            4,
            "shorten the longest sample, of 90000 tokens",
        ),
        (
            Estimate(900, 0, GIB, GIB, GIB, GIB, "a", 0, 0, 0, learning=5 * GIB),
            4,
            "learning takes 5.00 GiB of it, for a block and the longest sample, of 900",
        ),
    ],
    ids=["activations", "down_proj", "statistics", "front", "sample", "learning"],
)
def test_advice(needs, memory, advice, tmp_path):
    with pytest.raises(ValueError, match="GiB of memory, and there are") as raised:
        needs.check(int(memory * GIB), None, tmp_path)
    assert advice in str(raised.value)
    needs.check(needs.peak, None, tmp_path)
    needs.check(None, None, tmp_path)


def test_a_device_of_its_own(tmp_path):
    needs = seven_billion("smoothquant")
    needs.check(8 * GIB, 4 * GIB, tmp_path)
    with pytest.raises(ValueError, match="GiB of device memory"):
        needs.check(8 * GIB, GIB, tmp_path)


def test_a_full_disk(tmp_path):
    needs = Estimate(1, 0, 0, 0, 0, 0, "", 0, 0, disk=103 * GIB)
    refused = (
        r"writes about 103\.00 GiB, and .* has 100\.00 GiB left: give an output on"
    )
    with pytest.raises(ValueError, match=refused):
        needs.check(None, None, tmp_path)
    # What is there already needs no more room.
    needs.check(None, None, tmp_path, written=3 * GIB)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_memory_bytes": 100 << 20}, "of memory, and there are 0.10 GiB"),
        ({"max_seconds": 1e-3}, "more than the 0 of max_seconds: leave the dearest"),
        (
            {"max_seconds": 1e-3, "alpha": "auto"},
            "max_seconds: give alpha and separation, not 'auto', leave the dearest",
        ),
    ],
)
def test_refused_before_a_block_is_run(tmp_path, monkeypatch, options, message):
    tiny_models.qwen25_vl(2).save_pretrained(tmp_path / "model")
    calls = []
    run = DecoderWalk.run_block
    monkeypatch.setattr(DecoderWalk, "run_block", lambda *a: calls.append(a) or run(*a))
    data = tiny_models.samples(audio=False)
    arguments = {"output": tmp_path / "q", **FIXED}
    with pytest.raises(ValueError, match=message):
        calibrate_sequential(tmp_path / "model", data, **{**arguments, **options})
    # At most the one that is measured.
    assert len(calls) <= 1
    assert not (tmp_path / "q").exists()
    # The same without the limit.
    assert calibrate_sequential(tmp_path / "model", data, **arguments).blocks == 2


def test_time_grows_with_the_work(monkeypatch):
    monkeypatch.setattr(preflight, "solving_rate", lambda *a: 1e9)
    options = SolverOptions()

    def seconds(blocks, **more):
        arguments = {"forward": 1.0, "processes": 1, "limit": 1e12, **more}
        device = torch.device("cpu")
        return check_time(blocks, 2, options, device=device, **arguments)

    one = seconds([BLOCK])
    assert seconds([BLOCK] * 3) == pytest.approx(3 * one)
    assert seconds([BLOCK], processes=2) == pytest.approx(1 + one / 2, rel=0.01)
    # Eight passes an epoch; of two processes one waits, where a step is of one sample.
    solving = seconds([BLOCK]) - 2
    options = SolverOptions(epochs=3)
    assert seconds([BLOCK]) - solving == pytest.approx(2 + 8 * 3)
    assert seconds([BLOCK], processes=2) - solving / 2 == pytest.approx(2 + 8 * 3 * 2)
    options = SolverOptions(epochs=3, batch_size=4)
    assert seconds([BLOCK], processes=2) - solving / 2 == pytest.approx(2 + 8 * 3)
    with pytest.raises(ValueError, match="learn for fewer epochs, or from fewer"):
        seconds([BLOCK], forward=1e6, limit=60.0)
    # It is for one process.
    options = SolverOptions(asymmetric_calibration=True)
    with pytest.raises(ValueError, match="or calibrate with asymmetric_calibration=F"):
        seconds([BLOCK], forward=1e6, limit=60.0)
    options = SolverOptions()
    # What takes less than the measurement is not measured.
    assert seconds([{"a": (8, 8)}], limit=None) is None


@pytest.mark.parametrize("method", ["masquant", "smoothquant"])
def test_the_rate_is_measured(method):
    rate = preflight.solving_rate(2, SolverOptions(method=method), torch.device("cpu"))
    assert 1e5 < rate < 1e14
