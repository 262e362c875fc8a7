# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The GPU benchmark, with no GPU: its plan, its checks, its budget and its verdicts."""

import contextlib
import importlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import pytest
import torch
from rich.console import Console

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_linear")


@pytest.fixture
def plan(bench):
    return importlib.import_module("gpu_bench.plan")


@pytest.fixture
def candidates(bench):
    return importlib.import_module("gpu_bench.candidates")


@dataclass
class FakeBuilder:
    """Builds everything but what is broken, and takes its time."""

    clock: list[float]
    takes: float
    built: Callable[..., Any]
    broken: str = ""
    wrong: str = ""

    def build(self, candidate: str) -> Any:
        self.clock[0] += self.takes
        if candidate == self.broken:
            raise RuntimeError("no kernel\nand a long trace")
        error = 0.5 if candidate == self.wrong else 0.001
        return self.built([lambda: torch.zeros(1)], error, 0.01)


def microseconds(candidate: str) -> float:
    """A bf16 linear takes 160, and everything of ours 80 or a little more."""
    if candidate.startswith("bf16"):
        return {"bf16": 160.0, "bf16 fused": 150.0}[candidate]
    if candidate.startswith("torchao"):
        return 110.0
    added = {"base": 0, "quarter vision": 2, "half vision": 4, "all vision": 12}
    return 80.0 + added[candidate.partition(" ")[2]]


@pytest.fixture
def timer(bench):
    def measure(calls: dict[str, Sequence[Any]], seconds: float) -> Any:
        return {
            name: bench.Timing(microseconds(name), microseconds(name) + 40, 7)
            for name in calls
        }

    return measure


def run(
    bench: Any,
    candidates: Any,
    timer: Any,
    steps: Any,
    seconds: float = 1e9,
    **how: Any,
) -> Any:
    clock = [0.0]
    builder = FakeBuilder(clock, how.pop("takes", 1.0), candidates.Built, **how)
    card = bench.card_named("NVIDIA H100 80GB HBM3")
    return bench.run(
        steps, lambda step: builder, timer, card, seconds, lambda: clock[0]
    )


def test_plan_holds_every_place_and_begins_with_the_targets(plan):
    steps = plan.plan(groups=[])
    everywhere = {
        (*shape, m) for shape in plan.SHAPES for m in (1, 16, 256, 2048, 8192)
    }
    ours = [s for s in steps if s.candidates[-1].startswith("w4a16")]
    theirs = [s for s in steps if s not in ours]
    for found in (ours, theirs):
        places = [
            (s.place.in_features, s.place.out_features, s.place.tokens) for s in found
        ]
        assert len(places) == len(set(places)) and set(places) == everywhere
    for step in ours:
        mixes = {c.partition(" ")[2] for c in step.candidates if c != "bf16"}
        one = {"base", "all vision"}
        assert mixes == (one if step.place.tokens == 1 else set(plan.MIXES))
        schemes = {c.partition(" ")[0] for c in step.candidates}
        assert schemes == {"bf16", "w8a8", "w4a8", "w4a16"}
    for step in theirs:
        assert set(plan.TORCHAO) < set(step.candidates)
        assert {"bf16", "w8a8 base", "w4a16 base"} < set(step.candidates)
    # Whoever has half an hour less gets the lengths that the targets speak of.
    assert {s.place.tokens for s in steps[:32]} == {1, 2048}
    assert plan.plan(torchao=False, groups=[]) == ours


def test_plan_holds_every_group_beside_bf16_and_as_one_product(plan):
    steps = [step for step in plan.plan() if step.place.parts]
    assert {step.place.linear for step in steps} == set(plan.GROUPS.values())
    assert len(steps) == len(plan.GROUPS) * len(plan.TOKENS)
    for step in steps:
        assert step.candidates[:2] == ("bf16", "bf16 fused")
        place = step.place
        assert sum(place.parts) == place.out_features
        # Each part is a linear that is measured alone, too.
        assert {(place.in_features, n) for n in place.parts} <= set(plan.SHAPES)
        mixes = {c.partition(" ")[2] for c in step.candidates[2:]}
        assert mixes == ({"base"} if place.tokens == 1 else {"base", "half vision"})
    # They come with the lengths of the targets, before torchao's.
    assert {step.place.tokens for step in plan.plan()[16:24]} == {1, 2048}
    assert all(step.place.parts for step in plan.plan()[16:24])


def test_a_group_on_paper_smooths_once(plan):
    place = plan.Place.of_group(3584, (3584, 512, 512), 2048)
    assert place.linear == "7B q, k and v" and place.sizes == (3584, 512, 512)
    calls = plan.paper(place, "w8a8 half vision")
    assert [(c.out_features, c.rank) for c in calls] == [(3584, 179), (512, 26)] + [
        (512, 26)
    ]
    works = [work.name for work in plan.works(place, "w8a8 half vision")]
    assert works.count("smooth_quantize") == 1 and works.count("int_linear") == 3
    assert len(plan.works(place, "bf16")) == 3
    (fused,) = plan.paper(place, "bf16 fused")
    assert (fused.out_features, fused.weight_bits) == (4608, 16)


def test_rank_and_share_of_the_paper(plan):
    place = plan.Place(3584, 18944, 2048)
    assert plan.rank_of(3584, 18944) == 179 and place.linear == "7B gate/up"
    (call,) = plan.paper(place, "w8a8 half vision")
    assert (call.rank, call.share, call.weight_bits, call.act_bits) == (179, 0.5, 8, 8)
    (base,) = plan.paper(place, "w4a16 base")
    assert (base.rank, base.share, base.group_size, base.act_bits) == (0, None, 128, 16)
    assert plan.paper(place, "torchao SmoothQuant") == plan.paper(place, "w8a8 base")
    assert plan.paper(place, "bf16")[0].weight_bits == 16
    assert plan.card_named("NVIDIA L40S").architecture == "sm_89"
    assert plan.card_named("NVIDIA H200").bandwidth > 4e12
    assert plan.card_named("Tesla T4") is None


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16"])
def test_candidates_compute_what_they_claim(candidates, plan, scheme):
    place = plan.Place(256, 48, 20)
    device = torch.device("cpu")
    of = candidates.Bench(place, device, 30_000, lambda f, **how: f)
    for mix in plan.MIXES:
        built = of.build(f"{scheme} {mix}")
        assert built.error <= built.bound == 2.0**-7
        assert len(built.calls) >= 2
        first, *others = [y for call in built.calls for y in call()]
        assert first.shape == (20, 48) and first.dtype == torch.bfloat16
        assert all(torch.equal(first, other) for other in others)
    # Twice the cache in copies, of which no two share memory.
    weights = [weight for (weight,) in of._copies[scheme]]
    stored = sum(w.nbytes_stored for w in weights)
    assert 60_000 <= stored < 60_000 + 2 * weights[0].nbytes_stored
    assert len({w.qdata.data_ptr() for w in weights}) == len(weights)
    # 10 of 20 tokens, in the middle.
    assert of._ids(0.5).tolist() == [0] * 5 + [1] * 10 + [0] * 5


def test_a_group_computes_each_of_its_linears(candidates, plan):
    place = plan.Place.of_group(256, (48, 16, 16), 20)
    of = candidates.Bench(place, torch.device("cpu"), 1, lambda f, **how: f)
    for name in ("bf16", "bf16 fused", "w8a8 half vision", "w4a16 base"):
        built = of.build(name)
        assert built.error <= built.bound == 2.0**-7
        shapes = [(20, 80)] if name == "bf16 fused" else [(20, 48), (20, 16), (20, 16)]
        assert [tuple(y.shape) for y in built.calls[0]()] == shapes
    # All are told to be smoothed by the first, and so have its factors.
    first, *others = of._copies["w8a8"][0]
    assert all(torch.equal(w.act_pre_scale, first.act_pre_scale) for w in others)


def test_a_candidate_that_computes_something_else_is_wrong(candidates, plan):
    def broken(function: Any, **how: Any) -> Any:
        return lambda *arguments: tuple(1.02 * y for y in function(*arguments))

    of = candidates.Bench(plan.Place(256, 48, 20), torch.device("cpu"), 1, broken)
    built = of.build("w8a8 half vision")
    assert built.error > built.bound and built.error == pytest.approx(0.02, rel=0.2)


def test_products_alone_stand_beside(candidates, plan):
    place = plan.Place(256, 48, 20)
    of = candidates.Bench(place, torch.device("cpu"), 8_000, lambda f, **how: f)
    names = ["product w8a8", "product w4a8", plan.INT8_PRODUCT, plan.FP8_PRODUCT]
    for name in names:
        built = of.build(name)
        assert built.error <= built.bound == 2.0**-7, name
        # Copies of the input, too: in the cache is neither.
        first, second = (call.__defaults__ for call in built.calls[:2])
        for mine, others in zip(first, second):
            assert all(a.data_ptr() != b.data_ptr() for a, b in zip(mine, others))
    for name in names:
        (work,) = plan.works(place, name)
        assert work.int8 == 2 * 20 * 256 * 48
    quantize, product = plan.works(place, "w8a8 base")
    assert product == plan.works(place, "product w8a8")[0]


def test_torchao_stands_beside(candidates, plan):
    of = candidates.Bench(
        plan.Place(256, 48, 20), torch.device("cpu"), 1, lambda f, **how: f
    )
    for name in ("bf16", "torchao int8 dynamic", "torchao SmoothQuant"):
        built = of.build(name)
        assert built.error <= built.bound, name
    assert of.build("bf16").bound < built.bound == 0.05


def test_ratios_are_of_one_step(bench, candidates, plan, timer):
    shape = (3584, 18944)
    group = (3584, (18944, 18944))
    steps = plan.plan([shape], [2048, 1], groups=[group])
    results = run(bench, candidates, timer, steps)
    assert not results.failed and not results.skipped
    found = bench.ratios(results.rows)
    by_name = {
        (e["tokens"], e["candidate"], "over torchao SmoothQuant, graph" in e): e
        for e in found
        if e["linear"] == "7B gate/up"
    }
    half = by_name[2048, "w8a8 half vision", False]
    assert half["over bf16, graph"] == round(160 / 84, 3)
    assert half["over bf16, eager"] == round(200 / 124, 3)
    beside = by_name[2048, "w8a8 base", True]
    assert beside["over torchao SmoothQuant, graph"] == 1.375
    assert half["linear"] == "7B gate/up" and "over bf16 fused, graph" not in half
    together = [e for e in found if e["linear"] == "7B gate and up"]
    assert {e["out_features"] for e in together} == {2 * 18944}
    assert together[0]["over bf16 fused, graph"] == round(150 / 80, 3)
    assert together[0]["over bf16, graph"] == 2.0


def test_targets_are_judged_at_every_place(bench, candidates, plan, timer):
    shape = (3584, 18944)
    results = run(bench, candidates, timer, plan.plan([shape], [2048, 1], groups=[]))
    found = {t.name: t for t in bench.targets(results.rows)}
    verdicts = [(t.verdict, t.measured) for t in found.values()]
    assert verdicts == [
        ("met", 2),  # 160 / 80 = 2 >= 1.6, in both steps at 2048 tokens
        ("met", 1),  # 160 / 84 = 1.9 >= 1.45
        ("met", 1),  # as fast as w8a8
        ("met", 2),  # 2 >= 1.7
        ("missed", 2),  # 2 < 2.8
        ("met", 2),  # 110 / 80 >= 1.25
        ("missed", 2),  # 80 / 92 < 1 / 1.1
        ("not measured", 0),  # 8192 tokens
        ("missed", 1),  # 7 us on paper
        ("missed", 4),  # at one token 10 us on paper
        ("met", 4),
    ]
    low_rank = found[
        "w8a8 base-only over all vision, that is at most 10 % of low-rank work"
    ]
    assert low_rank.worst == 80 / 92 and low_rank.met == 0
    assert low_rank.where.startswith("K=3584 N=18944 M=")
    assert bench.targets([])[0].verdict == "not measured"


def test_a_short_run_skips_and_says_so(bench, candidates, plan, timer):
    shapes = [(2048, 2048), (2048, 256)]
    steps = plan.plan(shapes, [2048, 1], groups=[])
    # 26 seconds for each of two steps at 2048 tokens, 14 for two at one token; then 20
    # are left, and steps beside torchao might take more: nobody knows yet.
    results = run(bench, candidates, timer, steps, seconds=100, takes=2.0)
    assert sorted({row.step for row in results.rows}) == [0, 1, 2, 3]
    assert len(results.skipped) == len(steps) - 4
    assert results.skipped[0].startswith("K=2048 N=2048 M=2048: bf16, w8a8 base")
    # At the third step of a kind the longest before is known to be too long.
    results = run(bench, candidates, timer, steps[:2] * 2, seconds=75, takes=2.0)
    assert sorted({row.step for row in results.rows}) == [0, 1]


def test_what_raises_or_is_wrong_is_said(bench, candidates, plan, timer):
    steps = plan.plan([(2048, 2048)], [2048], groups=[])
    results = run(
        bench,
        candidates,
        timer,
        steps,
        broken="torchao SmoothQuant",
        wrong="w4a8 half vision",
    )
    assert results.failed == [
        "K=2048 N=2048 M=2048: torchao SmoothQuant: RuntimeError: no kernel"
    ]
    assert [r.candidate for r in results.rows if r.wrong] == ["w4a8 half vision"]
    console = Console(width=220, file=io.StringIO())
    bench.show(results, {"card": "fake", "torch": torch.__version__}, console)
    text = console.file.getvalue()
    assert "WRONG" in text and "failed: K=2048" in text and "not measured" in text
    report = json.loads(json.dumps(bench.report(results, {"card": "fake"})))
    assert report["card"] == "fake" and report["failed"] == results.failed
    assert len(report["rows"]) == len(results.rows)
    assert report["rows"][0]["paper"] > 0


def test_nan_is_wrong(bench, candidates, plan, timer):
    class Nan:
        def build(self, candidate: str) -> Any:
            return candidates.Built([lambda: torch.zeros(1)], float("nan"), 0.01)

    steps = plan.plan([(2048, 2048)], [1], torchao=False, groups=[])
    results = bench.run(steps, lambda step: Nan(), timer, None, 1e9)
    assert results.rows and all(row.wrong for row in results.rows)
    # No peaks of the card, no roofline.
    assert all(row.paper is None and row.of_paper is None for row in results.rows)


class FakeCuda:
    """What the timer calls of ``torch.cuda``, on a clock of its own.

    A replayed graph takes 10 microseconds a call, a call from Python 30.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.capturing: Any = None

    def kernel(self) -> torch.Tensor:
        if self.capturing is not None:
            self.capturing.count += 1
        else:
            self.now += 0.03
        return torch.zeros(1)

    def names(self) -> dict[str, Any]:
        fake = self

        class Graph:
            count = 0

            def replay(self) -> None:
                fake.now += 0.01 * self.count

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        class Stream:
            def wait_stream(self, other: Any) -> None:
                pass

        @contextlib.contextmanager
        def graph(captured: Any) -> Iterator[None]:
            fake.capturing = captured
            yield
            fake.capturing = None

        return {
            "CUDAGraph": Graph,
            "Event": Event,
            "Stream": Stream,
            "current_stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "graph": graph,
            "synchronize": lambda: None,
        }


def test_a_timing_is_of_one_call(bench, monkeypatch):
    fake = FakeCuda()
    for name, value in fake.names().items():
        monkeypatch.setattr(torch.cuda, name, value)
    found = bench.measure({"a": [fake.kernel] * 4, "b": [fake.kernel] * 2}, 0.0)
    assert set(found) == {"a", "b"}
    for timing in found.values():
        assert timing.rounds == 5
        assert (timing.graph, timing.eager) == pytest.approx((10, 30))


def test_dry_run_prints_the_plan(bench, capsys):
    options = ["--dry-run", "--linear", "3B down", "--tokens", "16"]
    assert bench.main([*options, "--card", "A100"]) == 0
    out = capsys.readouterr().out
    assert "A100" in out and "3B down" in out and "w4a16 half vision" in out
    assert "memory" in out and "7B" not in out and "fused" not in out
    assert bench.main(["--dry-run", "--linear", "3B gate and up"]) == 0
    out = capsys.readouterr().out
    assert "bf16 fused" in out and "22016" in out and "3B down" not in out
    with pytest.raises(SystemExit):
        bench.main(["--linear", "9B down"])
    assert "there is no linear '9B down'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(bench, capsys):
    assert bench.main([]) == 2
    assert "there is no GPU here" in capsys.readouterr().err
