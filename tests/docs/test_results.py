# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The numbers of the README and of the pages are those of the committed results."""

import importlib
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any, Iterator

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"

METHODS = {
    "": "",
    "round-to-nearest": "rtn",
    "SmoothQuant": "smoothquant",
    "MBQ": "mbq",
    "SmoothQuant + GPTQ": "gptq",
    "SmoothQuant + one pair": "control",
    "ours without modalities": "pooled",
    "a weight per modality": "mas-unshared",
    "MASQuant, paper": "masquant-paper",
    "MR-GPTQ's recipe": "mr-gptq",
    "ours, groups of 64": "masquant, groups of 64",
    "ours, no shift": "masquant, no shift",
    "ours, no pair": "masquant, no pair",
    "ours, exported": "masquant, exported",
    "ours": "masquant",
}


def _shown(page: str, name: str) -> list[str]:
    """Lines of a page between the comment of this name and the one that ends it."""
    text = (ROOT / page).read_text()
    return text.split(f"<!-- {name} -->")[1].split("<!-- end -->")[0].split("\n")[1:-1]


def _rows(lines: list[str]) -> list[str]:
    """Lines of a table without its head."""
    return lines[2:]


def _cell(rows, values, form, scale=1):
    columns = [[scale * v for v in column] for column in zip(*map(values, rows))]
    if not columns:
        return ""
    means = " / ".join(form.format(statistics.mean(c)) for c in columns)
    spread = max(statistics.stdev(c) for c in columns)
    return f"{means} ± {form.format(spread)}"


@pytest.mark.parametrize(
    "page, name, kl, seeds",
    [
        ("docs/results.md", "quality_outliers.json", ("{:.3f}", 1), [0, 1, 2]),
        ("docs/results.md", "quality_plain.json", ("{:.3f}", 1), [0, 1, 2]),
        ("docs/serving.md", "quality_exported.json", ("{:.0f}", 1e6), [0, 1, 2]),
        ("docs/formats.md", "quality_formats.json", ("{:.1f}", 1e3), [0, 1]),
    ],
)
def test_table_of_the_small_model_is_the_committed_result(page, name, kl, seeds):
    rows = json.loads((RESULTS / name).read_text())["rows"]
    lines = _shown(page, name)
    lines = [line for line in lines if re.match(r"\| (?:dense|w\da\d+|\w*fp\d)", line)]
    assert len(lines) > 10
    for line in lines:
        scheme, method, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        method = METHODS[method.strip("*")]
        same = [r for r in rows if (r["scheme"], r["method"]) == (scheme, method)]
        assert sorted(row["seed"] for row in same) == seeds, (scheme, method)

        def task(key):
            return lambda row: [t[key] for t in row["tasks"].values()]

        expected = [
            _cell(same, task("accuracy"), "{:.1f}", 100),
            _cell(same, task("kl"), *kl) if method else "",
            _cell(same, lambda row: row["sqnr"].values(), "{:.1f}"),
            f"{same[0]['bytes'] / 1024:.0f}",
        ]
        assert cells == expected


def _spread(row, name, form):
    growth = f"{name}_growth{'' if name == 'blocks' else '_mib'}"
    error = f"{name}_error{'' if name == 'blocks' else '_mib'}"
    return f"{form.format(row[growth])} ± {form.format(row[error])}"


def _serving_lines(part):
    rows = json.loads((RESULTS / "serving_load.json").read_text())
    for row in rows["loads"]:
        cells = [row["model"], row["load"]]
        if part == "memory":
            cells += [
                f"{row['requests']} ({row['raised']})",
                f"{row['graphs']}",
                f"{row['eager']}",
                f"{row['wrong']}",
                _spread(row, "resident", "{:.2f}"),
                _spread(row, "allocated", "{:.2f}"),
                _spread(row, "blocks", "{:.0f}"),
            ]
        else:
            cells += [f"{row[f'p{p}_ms']:.0f}" for p in (50, 90, 99)]
            cells += [f"{row['per_second']:.1f}"]
        yield f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("part", ["memory", "latency"])
def test_serving_table_is_the_committed_result(part):
    lines = _shown("docs/serving.md", f"serving_load.json: {part}")
    assert _rows(lines) == list(_serving_lines(part))


def test_table_of_the_vllm_soak_is_the_committed_result():
    lines = []
    for run in json.loads((RESULTS / "vllm_soak.json").read_text())["runs"]:
        answered = sum(run["answered"].values())
        refused = sum(sum(known.values()) for known in run["refused"].values())
        counts = (run["requests"], answered, len(run["wrong"]), refused, run["gone"])
        held = [f"{mark[1]:.1f}" for mark in (run["resident"][0], run["resident"][-1])]
        growth, error = run["growth"]
        cells = [run["model"], *map(str, counts), *held, f"{growth:.1f} ± {error:.1f}"]
        cells += [f"{ms:.0f}" for ms in run["latencies"]]
        lines.append(f"| {' | '.join(cells)} |")
    assert _rows(_shown("docs/serving.md", "vllm_soak.json")) == lines


def test_table_of_latencies_in_vllm_is_the_committed_result():
    lines = []
    for run in json.loads((RESULTS / "vllm_latency.json").read_text())["runs"]:
        for name, row in run["rows"].items():
            half = row.get("first token, half an image, ms")
            cells = [name, f"{run['threads']}", f"{row['first token, ms']:.0f}"]
            cells += [
                "" if half is None else f"{half:.0f}",
                f"{row['a token, ms']:.1f}",
                f"{row['GB/s']:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    assert _rows(_shown("docs/serving.md", "vllm_latency.json")) == lines


def test_table_of_a_whole_decoder_is_the_committed_result():
    lines = []
    found = json.loads((RESULTS / "cpu_model.json").read_text())["candidates"]
    for name, row in found.items():
        cells = [name.replace("+head", ", head of 8 bits")]
        cells += [f"{1e3 * row[f'first token s, {n}']:.0f}" for n in (256, 1024)]
        cells += [f"{row[f'tokens/s after {n}']:.1f}" for n in (256, 1024)]
        read = (row["linears MiB"] + row["head MiB"]) * 2**20
        gigabytes = read * row["tokens/s after 256"] / 1e9
        cells += [f"{read / 2**20:.0f}", f"{gigabytes:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    assert _rows(_shown("docs/results.md", "cpu_model.json")) == lines


@pytest.mark.parametrize(
    "name, row, columns",
    [
        ("real_kv_window.json", "cache", [["text"], ["text, long"]]),
        (
            "real_fp8_cache.json",
            "form",
            [["image", "audio", "both, shown", "both, spoken"], ["text"]],
        ),
    ],
)
def test_tables_of_caches_are_the_committed_results(name, row, columns):
    lines = []
    for found in json.loads((RESULTS / name).read_text())["rows"]:
        cells = [
            " / ".join(f"{found['tasks'][task]['kl']:.4f}" for task in tasks)
            for tasks in columns
        ]
        lines.append(f"| {found[row]} | {' | '.join(cells)} |")
    assert _rows(_shown("docs/kv_cache.md", name)) == lines


def test_plan_table_is_the_committed_result():
    checks = json.loads((RESULTS / "plan_check.json").read_text())
    lines = []
    for c in checks["checks"]:
        form = "{:.0f}" if c["unit"] == "bytes" else "{:.2f}"
        numbers = " | ".join(form.format(c[key]) for key in ("predicted", "measured"))
        lines.append(f"| {c['what']} | {numbers} | {c['unit']} | {c['error']:+.1%} |")
    assert _rows(_shown("docs/plan.md", "plan_check.json")) == lines


def _speed(candidate: str, tokens: int, peer: str) -> str:
    """How many times as fast as a peer, the median over shapes."""
    ratios = json.loads((RESULTS / "cpu_linear_epyc.json").read_text())["ratios"]
    found = [
        row[f"over {peer}"]
        for row in ratios
        if (row["candidate"], row["tokens"]) == (candidate, tokens)
    ]
    assert len(found) == 5, (candidate, tokens)
    return f"{statistics.median(found):.1f}"


PEERS = (
    "bf16",
    "torchao int8 dynamic",
    "torchao SmoothQuant",
    "torchao int8 weight-only",
    "torchao int4 weight-only",
)


def _cpu_lines() -> Iterator[str]:
    for scheme in ("w8a8", "w4a8", "w4a16"):
        for tokens, of, shown in (
            (1, "base", "text"),
            (1, "all vision", "vision"),
            (1024, "base", "text"),
            (1024, "half vision", "half vision"),
            (1024, "all vision", "vision"),
        ):
            cells = [_speed(f"{scheme} {of}", tokens, peer) for peer in PEERS]
            yield f"| {scheme} | {tokens}, {shown} | {' | '.join(cells)} |"


def test_table_of_linears_on_a_cpu_is_the_committed_result():
    shown = _rows(_shown("docs/results.md", "cpu_linear_epyc.json"))
    assert shown == list(_cpu_lines())


@pytest.mark.parametrize(
    "name",
    [f"cpu_few_tokens{kind}.json" for kind in ("", "_amx", "_avx2")]
    + ["cpu_experts.json"],
)
def test_tables_of_milliseconds_are_the_committed_results(name: str):
    found = json.loads((RESULTS / name).read_text())["seconds"]
    lines = []
    for candidate, times in found.items():
        cells = (
            f"{1e3 * s:.2f}" if s < 0.01 else f"{1e3 * s:.1f}" for s in times.values()
        )
        lines.append(f"| {candidate} | {' | '.join(cells)} |")
    assert _rows(_shown("docs/results.md", name)) == lines


# Of SmolLM2-135M: q and o, k and v, gate, up and down of thirty layers, in bfloat16.
DENSE_BYTES = 2 * 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
REAL_METHODS = {
    "gptq": "SmoothQuant + GPTQ",
    "masquant, no pair": "**ours**, no pair",
    "masquant, no pair, asymmetric": "**ours**, asymmetric, no pair",
    "masquant": "**ours**",
}


def _readme_lines() -> Iterator[str]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / "real_llm.json").read_text())[
        "rows"
    ]
    perplexity = math.exp(rows[0]["tasks"]["text"]["dense_loss"])
    dense = f"| bfloat16 | {perplexity:.1f} |  |  | {DENSE_BYTES / 2**20:.0f}"
    yield f"{dense} | 1.0 / 1.0 |  |"
    for scheme in ("w8a8", "w4a8", "w4a4"):
        for method, title in REAL_METHODS.items():
            seeds = [r for r in rows if (r["scheme"], r["method"]) == (scheme, method)]
            if not seeds:
                continue
            tasks = seeds[0]["tasks"]
            kl = {t: statistics.mean(r["tasks"][t]["kl"] for r in seeds) for t in tasks}
            text = kl.pop("text")
            perplexity = statistics.mean(
                math.exp(r["tasks"]["text"]["loss"]) for r in seeds
            )
            cells = [
                f"{scheme}, {title}",
                f"{perplexity:.1f}",
                f"{text:.3f}",
                " / ".join(f"{value:.3f}" for value in kl.values()),
                f"{seeds[0]['bytes'] / 2**20:.0f}",
            ]
            for peer in ("bf16", "torchao SmoothQuant"):
                # Text has no pair; w4a4 was not timed.
                measured = method == "masquant, no pair" and scheme != "w4a4"
                times = [
                    _speed(f"{scheme} base", tokens, peer)
                    for tokens in (1, 1024)
                    if measured
                ]
                cells.append(" / ".join(times))
            yield f"| {' | '.join(cells)} |"


def test_table_of_the_readme_is_the_committed_result():
    shown = _shown("README.md", "real_llm.json, cpu_linear_epyc.json")
    assert _rows(shown) == list(_readme_lines())


def _tower_costs():
    rows = json.loads((RESULTS / "tower_quality.json").read_text())["rows"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        made = importlib.import_module("tower_quality").table(rows)
    return _rows(made.splitlines())


def _tower_times():
    found = json.loads((RESULTS / "tower_latency.json").read_text())["candidates"]
    for name, row in found.items():
        seconds = f"{row['first token s']:.2f} | {row['tower s']:.2f}"
        whole = f"{row['whole model s']:.1f} | {100 * row['tower share']:.0f} %"
        yield f"| {name} | {seconds} | {whole} |"


@pytest.mark.parametrize(
    "name, lines",
    [("tower_quality.json", _tower_costs), ("tower_latency.json", _tower_times)],
)
def test_tables_of_towers_are_the_committed_results(name, lines):
    assert _rows(_shown("docs/method.md", name)) == list(lines())
