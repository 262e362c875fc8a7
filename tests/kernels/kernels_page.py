# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The tables of docs/gpu.md, made of the roofline and of what the kernels compile to.

``python tests/kernels/kernels_page.py`` writes them between their comments there.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any, Callable, Iterable

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "gpu.md"
COMPILED = ROOT / "benchmarks" / "results" / "kernels.json"
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]

from ahead_of_time import TARGETS  # noqa: E402
from gpu_bench import roofline as roofline  # noqa: E402
from gpu_bench.plan import GROUPS, SHAPES, Place, paper  # noqa: E402
from gpu_bench.roofline import (  # noqa: E402
    DEVICES,
    Device,
    LinearCall,
    down_projection_places,
    microseconds,
    microseconds_together,
)

from torchao_masquant.atomic_files import replacing  # noqa: E402


def _cells(place: Place, card: Device) -> list[str]:
    def time(candidate: str) -> float:
        return microseconds_together(paper(place, candidate), card)

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


_SHARING = (
    ("w8a8 text", "w8a8 base"),
    ("w8a8 half", "w8a8 half vision"),
    ("w8a8 all", "w8a8 all vision"),
    ("w4a16 text", "w4a16 base"),
)


def _together() -> str:
    h100 = next(card for card in DEVICES if card.name == "H100")
    rows = []
    for group, linears in GROUPS.items():
        for tokens in (256, 2048, 8192):
            place = Place.of_group(*group, tokens)

            def time(candidate: str) -> float:
                return microseconds_together(paper(place, candidate), h100)

            bf16 = time("bf16")
            cells = [
                f"{time(candidate):.1f} ({bf16 / time(candidate):.2f})"
                for _, candidate in _SHARING
            ]
            rows.append((linears, tokens, f"{bf16:.1f}", *cells))
    return (
        "Linears that share an input quantize or smooth it once, in a compiled graph. "
        "Together, on an H100:\n\n"
        + _table(
            ("linears", "tokens", "bf16", *(name for name, _ in _SHARING)),
            rows,
        )
    )


def _down() -> str:
    h100 = next(card for card in DEVICES if card.name == "H100")
    call = LinearCall(2048, 3584, 18944, 8, 8, share=1.0, rank=179)
    half = LinearCall(2048, 3584, 18944, 8, 8, share=0.5, rank=179)
    found = down_projection_places(call, h100)
    base = found["base-only us"]
    return f"""\
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
            products = TARGETS[target].products
            names = {
                name
                for row in found
                if row["multiplies"]
                for name in row["matrix"]
                if re.search(products[row["multiplies"]], name)
            }
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
    return f"Triton {record['triton']}:\n\n" + _table((*head, "product"), rows)


def _shortest(names: Iterable[str]) -> set[str]:
    # Of one instruction in several shapes, that it is there.
    return {re.sub(r"\.m\d+n\d+k\d+|_\d+x\d+x\d+", "", name) for name in names}


_BLOCKS: dict[str, Callable[[], str]] = {
    "roofline": _roofline,
    "together": _together,
    "low-rank pair": _down,
    "compiled": _compiled,
}


def page(text: str) -> str:
    """The page with each block as it is made now.

    Args:
        text: the page, with a comment of its name before each block and one after.
    """
    for name, made in _BLOCKS.items():
        before, rest = text.split(f"<!-- {name} -->\n")
        _, after = rest.split("<!-- end -->\n", 1)
        text = f"{before}<!-- {name} -->\n{made()}<!-- end -->\n{after}"
    return text


if __name__ == "__main__":
    written = page(PAGE.read_text())
    with replacing(PAGE) as temporary:
        temporary.write_text(written)
