# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""docs/kernels.md, made of the roofline and of what the kernels compile to.

``python tests/kernels/kernels_page.py`` writes it.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any, Iterable

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "kernels.md"
COMPILED = ROOT / "benchmarks" / "results" / "kernels.json"
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu_bench.plan import SHAPES, Place, paper  # noqa: E402

from torchao_masquant.kernels.aot import TARGETS  # noqa: E402
from torchao_masquant.kernels.gpu.roofline import (  # noqa: E402
    DEVICES,
    Device,
    LinearCall,
    down_projection_places,
    microseconds,
    microseconds_together,
)
from torchao_masquant.replacing import replacing  # noqa: E402

_HEAD = """\
# Kernels

What a quantized linear runs on a GPU, what it costs on paper, and what the kernels compile
to. `python tests/kernels/kernels_page.py` makes this page, of code and of
`benchmarks/results/kernels.json`. **No number here was measured on a GPU**: times are
lower bounds from published peaks. `python benchmarks/gpu_linear.py` measures, where there
is a GPU, and prints these bounds beside.

## What runs where

T tokens by K, a weight of N by K, a pair of rank R; all in Triton, `kernels/gpu`:

| operator | formula | file |
|---|---|---|
| `smooth_quantize` | `q = round(v / s)`, `v = x p_m - o_m`, `s = max abs v / 127` | `kernels/gpu/smooth_quantize.py` |
| `low_rank_down` | `h = (s q) L1 s_r`, columns of other modalities zero; not called where all tokens are of the base | `kernels/gpu/low_rank_down.py` |
| `int_linear` | `y = s s_w (q q_w^T) + h L2 + b_m + b`, with everything after the integer product in its epilogue | `kernels/gpu/int_linear.py` |
| `weight_only_linear` | `y = (x p_m) (s_w (q_w - z))^T + ((x p_m) L1) L2 + b_m + b`, integers unpacked in registers | `kernels/gpu/weight_only_linear.py` |

The reference of each is in `kernels/reference.py`; linears that share an input and their
smoothing factors quantize it once in a compiled graph (`kernels/shared_prologue.py`).

## The roofline

A kernel takes as long as its bytes at the bandwidth of memory or its products at the peak
of the tensor cores, whichever is longer, and a linear as long as its kernels one after
another (`kernels/gpu/roofline.py`, which names the sources of the peaks). Launches,
caches, and clocks that fall under load are left out. In microseconds; "half" and "all" are
the share of vision tokens, with a rank of 5 %.
"""


def _cells(place: Place, card: Device) -> list[str]:
    def time(candidate: str) -> float:
        return microseconds(paper(place, candidate), card)

    bf16 = time("bf16")
    shown = [f"{bf16:.1f}"]
    for candidate in ("w8a8 base", "w8a8 half vision", "w8a8 all vision"):
        # One token is not half of anything.
        if place.tokens == 1 and "half" in candidate:
            shown.append("")
        else:
            shown.append(f"{time(candidate):.1f} ({bf16 / time(candidate):.2f})")
    for candidate in ("w4a8 base", "w4a16 base"):
        shown.append(f"{time(candidate):.1f} ({bf16 / time(candidate):.2f})")
    return shown


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


_COLUMNS = ("bf16", "w8a8 text", "w8a8 half", "w8a8 all", "w4a8 text", "w4a16 text")


def _roofline() -> str:
    h100 = next(card for card in DEVICES if card.name == "H100")
    rows = [
        (
            linear,
            f"{shape[0]} to {shape[1]}",
            tokens,
            *_cells(Place(*shape, tokens), h100),
        )
        for shape, linear in SHAPES.items()
        for tokens in (1, 16, 256, 2048, 8192)
    ]
    gate = next(iter(SHAPES))
    cards = [
        (card.name, tokens, *_cells(Place(*gate, tokens), card))
        for card in DEVICES
        for tokens in (1, 2048)
    ]
    return (
        "H100; in brackets how many times faster than bf16:\n\n"
        + _table(("linear", "K to N", "tokens", *_COLUMNS), rows)
        + f"\nEvery card, {SHAPES[gate]} ({gate[0]} to {gate[1]}):\n\n"
        + _table(("card", "tokens", *_COLUMNS), cards)
        + "\n`python benchmarks/gpu_linear.py --dry-run --card L40S` prints all of it.\n"
    )


_TOGETHER = {
    "7B q/k/v": (3584, (3584, 512, 512)),
    "7B gate/up": (3584, (18944, 18944)),
    "3B q/k/v": (2048, (2048, 256, 256)),
    "3B gate/up": (2048, (11008, 11008)),
}


def _together() -> str:
    h100 = next(card for card in DEVICES if card.name == "H100")
    rows = []
    for linears, (in_features, sizes) in _TOGETHER.items():
        for tokens in (256, 2048, 8192):
            places = [Place(in_features, size, tokens) for size in sizes]

            def time(candidate: str) -> float:
                calls = [paper(place, candidate) for place in places]
                return microseconds_together(calls, h100)

            bf16 = time("bf16")
            cells = [
                f"{time(f'w8a8 {mix}'):.1f} ({bf16 / time(f'w8a8 {mix}'):.2f})"
                for mix in ("base", "half vision", "all vision")
            ]
            rows.append((linears, tokens, f"{bf16:.1f}", *cells))
    return (
        "\nLinears that share an input quantize it once, in a compiled graph. "
        "Together, on an H100:\n\n"
        + _table(
            ("linears", "tokens", "bf16", "w8a8 text", "w8a8 half", "w8a8 all"), rows
        )
    )


_LESSONS = """
What it says before anything is measured:

- At one token bytes are all there is: 8-bit weights can be 2 times as fast, 4-bit ones
  close to 4 times.
- At 2048 tokens int8 products are the bound, and 4-bit weights can't be faster than 8-bit
  ones: no int4 tensor core is used. A weight-only linear can only lose to bf16 there, by
  what unpacking costs.
- Quantizing the input is a pass over memory of its own, and where N is not much larger
  than K it weighs. A linear alone on an H100 can be 1.60 times as fast as bf16 for q, o
  and down of a 7B model, 1.40 times for those of a 3B one, and k or v alone only
  slower; q/k/v together pay for the pass once. Writing the integers in the norm or the
  activation function before it would take most of the pass away; that is not built.
"""


def _down() -> str:
    h100 = next(card for card in DEVICES if card.name == "H100")
    call = LinearCall(2048, 3584, 18944, 8, 8, share=1.0, rank=179)
    half = LinearCall(2048, 3584, 18944, 8, 8, share=0.5, rank=179)
    found = down_projection_places(call, h100)
    base = found["base-only us"]
    return f"""\

## Where the low-rank pair lives

2048 tokens, K = 3584, N = 18944, R = 179 (5 %), an H100, every token vision; base-only is
{base:.1f} us. The down-projection could be in three places:

- **a kernel of its own** (what is done): {found["own kernel: multiplying us"]:.1f} us of products and {found["own kernel: memory us"]:.1f} us of memory, {found["own kernel: MB"]:.1f} MB, of
  which {found["own kernel: integers MB"]:.1f} MB are integers that were just written and most likely still are in L2.
  Tiles of base tokens do nothing;
- **more rows of the integer product**: {found["extra rows: multiplying us"]:.1f} us, and no second read. But every tile's
  epilogue needs `h`, so that the tiles would wait for each other inside one launch, or it
  takes two launches after all, with an int8 L1 and no tiles to skip;
- **the pass that quantizes**: saves {found["quantize pass: integers saved us"]:.1f} us of reading, but that pass moves {found["quantize pass: MB"]:.0f} MB in
  {found["quantize pass: memory us"]:.1f} us with programs of few rows, of which each would read all of L1: {found["quantize pass: L1 from L2 MB"]:.0f} MB from L2
  for 16 rows a program.

The up-projection is in the epilogue of the integer product, {found["up-projection, one part us"]:.1f} us for each bfloat16 part
that `h` is split into: one where the result is bfloat16, two for float16, three for
float32. All of the low-rank work is {100 * (microseconds(call, h100) / base - 1):.1f} % of base-only for all vision, {100 * (microseconds(half, h100) / base - 1):.1f} % for half, and
nothing for text. **A tenth for all vision is out of reach** of a bfloat16 pair of rank
5 %: the products alone are more. A smaller rank or a share of text brings it there; so
would int8 products with a pair that is held in int8, which is not built.
"""


def _compiled() -> str:
    record = json.loads(COMPILED.read_text())
    rows = []
    for target in TARGETS:
        forms: dict[str, list[dict[str, Any]]] = {}
        for row in record["kernels"]:
            if row["target"] == target:
                form = re.split(r" \d+x\d+| split ", row["kernel"])[0]
                form = re.sub(r" (bare|ids|shift|bf16|fp16|fp32|i8|a\d).*", "", form)
                forms.setdefault(form, []).append(row)
        for form, found in forms.items():
            registers = [row["registers"] for row in found]
            int8 = re.compile(TARGETS[target].int8_dot)
            names = {n for row in found for n in row["matrix"] if int8.search(n)}
            rows.append(
                (
                    target,
                    form,
                    len(found),
                    f"{min(registers)} to {max(registers)}",
                    sum(row["spills"] > 0 for row in found),
                    f"{max(row['shared_memory'] for row in found) / 1024:.0f} of "
                    f"{TARGETS[target].shared_memory // 1024}",
                    ", ".join(f"`{n}`" for n in sorted(_shortest(names))),
                )
            )
    head = ("target", "kernel", "cases", "registers", "spill", "KiB shared")
    return f"""
## What the kernels compile to

Triton {record["triton"]}, with no GPU: `python -m torchao_masquant kernels` compiles every tiling of
every kernel and prints a line each; this is a summary. `--quick` takes only the largest
and the smallest tile of each form, which is what the tests do.

{_table((*head, "int8 product"), rows)}"""


def _shortest(names: Iterable[str]) -> set[str]:
    # Of one instruction in several shapes, that it is there.
    return {re.sub(r"\.m\d+n\d+k\d+|_\d+x\d+x\d+", "", name) for name in names}


def page() -> str:
    """The whole page."""
    return _HEAD + "\n" + _roofline() + _together() + _LESSONS + _down() + _compiled()


if __name__ == "__main__":
    with replacing(PAGE) as temporary:
        temporary.write_text(page())
