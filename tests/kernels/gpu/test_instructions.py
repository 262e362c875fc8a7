# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a GPU would run where the interpreter runs something else: its instructions."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

import torch

from torchao_masquant.kernels.gpu.int4_unpacking import UNPACK_BF16, UNPACK_FP16

Counts = dict[str, tuple[int, int]]

_COMPILE = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernel_cases.smooth_quantize import aot_cases

def ptx(is_it, **changes):
    case = next(c for c in aot_cases() if c.constexprs["HAS_SHIFT"] and is_it(c))
    names = case.kernel.arg_names
    source = ASTSource(
        case.kernel,
        {name: case.signature.get(name, "constexpr") for name in names},
        {**case.constexprs, **changes, **dict(case.config.blocks)},
    )
    options = dict(num_warps=case.config.num_warps, num_stages=case.config.num_stages)
    return triton.compile(source, GPUTarget("cuda", 90, 32), options).asm["ptx"]

def rotates(case):
    return case.constexprs["STAGES"] and case.constexprs["ONE_BLOCK"]

shifted = ptx(lambda case: not case.constexprs["STAGES"])
print(json.dumps({"shifted": shifted, "rotated": ptx(rotates, HAS_SHIFT=False)}))
"""


@pytest.fixture(scope="module")
def products_and_fused() -> Counts:
    """How many of them are in what a GPU would run; the interpreter contracts nothing."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return {
        name: (
            len(re.findall(r"\bmul(?:\.rn)?\.f32", ptx)),
            len(re.findall(r"\bfma\.rn\.f32", ptx)),
        )
        for name, ptx in json.loads(run.stdout).items()
    }


def test_a_gpu_rounds_the_product_before_the_shift(products_and_fused: Counts) -> None:
    products, fused = products_and_fused["shifted"]
    # Contracted, a product and a difference would be a single fma.
    assert products == fused > 0


def test_a_gpu_rounds_the_product_before_the_rotation(
    products_and_fused: Counts,
) -> None:
    products, fused = products_and_fused["rotated"]
    # Of each value its factor's, the rotation's, and one addition of the first stage.
    assert products == 2 * fused > 0


def emulated(asm: str, word: int) -> list[int]:
    """The four registers that the unpacking instructions make of one."""
    registers = {"$4": word}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for operation, rest in re.findall(r"(\w+)\.b32 ([^;]+);", asm):
        operands = [o.strip() for o in rest.split(",")]
        if operation not in ("and", "xor", "shr", "prmt"):
            assert operation == "reg" or not operation
            continue
        a, b = value(operands[1]), value(operands[2])
        if operation == "and":
            made = a & b
        elif operation == "xor":
            made = a ^ b
        elif operation == "shr":
            made = a >> b
        else:
            source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
            selector = value(operands[3])
            picked = [source[selector >> (4 * i) & 7] for i in range(4)]
            made = int.from_bytes(bytes(picked), "little")
        registers[operands[0]] = made
    return [registers[f"${i}"] for i in range(4)]


@pytest.mark.parametrize(
    "asm, dtype, offset",
    [(UNPACK_BF16, torch.bfloat16, 136), (UNPACK_FP16, torch.float16, 1032)],
    ids=["bfloat16", "float16"],
)
def test_instructions_that_unpack(asm: Any, dtype: torch.dtype, offset: int) -> None:
    """The interpreter has none, so a model of the four of them runs what a GPU does."""
    for first in range(256):
        stored = bytes([first, (first * 7 + 3) % 256, 255 - first, (first * 31) % 256])
        made = emulated(asm.value, int.from_bytes(stored, "little"))
        halves = np.array(made, dtype="<u4").view("<i2")
        values = torch.from_numpy(halves.astype(np.int16)).view(dtype).float() - offset
        signed = [[(b & 15 ^ 8) - 8, (b >> 4 ^ 8) - 8] for b in stored]
        low, high = zip(*signed)
        assert values.tolist() == [*low, *high]
