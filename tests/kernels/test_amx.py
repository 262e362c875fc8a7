# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""AMX, on processors that have it: its tiles' edges, their state, and who may use it.

The cases of all operators run with it too (``backends.py``).
"""

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from torchao_masquant.kernels import cpu_lowering, reference
from torchao_masquant.kernels.cpu_engine import CpuEngine

if cpu_lowering.prepare().engine is not CpuEngine.AMX:
    pytest.skip(cpu_lowering.engine().reason, allow_module_level=True)

ops = torch.ops.masquant


def operands(
    tokens: int, k: int, n: int, bits: int, groups: int = 1
) -> tuple[torch.Tensor, ...]:
    """Quantized tokens and weights, of the whole range of their bytes, and scales."""
    torch.manual_seed(tokens + k + n)
    q = torch.randint(-127, 128, (tokens, k), dtype=torch.int8)
    if bits == 8:
        weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    else:
        weight = torch.randint(0, 256, (n, (k + 1) // 2), dtype=torch.uint8)
    return q, torch.rand(tokens, 1), weight, torch.rand(n, groups)


def product(of: Any, given: tuple[torch.Tensor, ...], bits: int) -> torch.Tensor:
    return of.int_linear(*given, *[None] * 5, bits, torch.float32)


# Steps of 64 channels and their parts, odd ones, several turns of them; groups.
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "k, groups",
    [(1, 1), (3, 1), (63, 1), (64, 1), (66, 1), (129, 1), (1100, 1)]
    + [(128, 2), (512, 4), (1280, 2), (1536, 1)],
)
def test_integers_are_the_references(bits: int, k: int, groups: int) -> None:
    for tokens in (5, 8, 16, 17, 31, 32, 33, 40, 49, 100):
        for n in (1, 16, 63, 64, 65, 130):
            given = operands(tokens, k, n, bits, groups)
            found, expected = (product(of, given, bits) for of in (ops, reference))
            assert torch.equal(found, expected), (tokens, n)


@pytest.mark.parametrize("bits", [8, 4])
def test_more_tokens_than_a_task_has(bits: int) -> None:
    """And more than the second-level cache has room for, so that panels share them."""
    given = operands(1030, 2112, 130, bits)
    assert torch.equal(product(ops, given, bits), product(reference, given, bits))


def test_the_largest_integers_do_not_saturate() -> None:
    for low in (-128, 127):
        q = torch.full((20, 4096), -127, dtype=torch.int8)
        weight = torch.full((70, 4096), low, dtype=torch.int8)
        given = (q, torch.ones(20, 1), weight, torch.ones(70, 1))
        assert (product(ops, given, 8) == -127.0 * low * 4096).all()


def test_tiles_of_others_in_between() -> None:
    """oneDNN's products shape the tiles for themselves, on the same threads."""
    given = operands(40, 256, 130, 4)
    dense, x = torch.randn(256, 256).bfloat16(), torch.randn(40, 256).bfloat16()
    expected = product(reference, given, 4)
    theirs = torch.nn.functional.linear(x, dense)
    for _ in range(5):
        assert torch.equal(product(ops, given, 4), expected)
        assert torch.equal(torch.nn.functional.linear(x, dense), theirs)


def test_threads_that_never_asked() -> None:
    given = operands(33, 256, 640, 8)
    expected, found = product(reference, given, 8), []

    def multiply() -> None:
        found.extend(product(ops, given, 8) for _ in range(20))

    threads = [threading.Thread(target=multiply) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(torch.equal(y, expected) for y in found)


_FORK = """
import os, torch
from torchao_masquant.kernels import cpu_lowering, reference
assert cpu_lowering.prepare().engine.value == "amx"
torch.set_num_threads(1)
q = torch.randint(-127, 128, (40, 256), dtype=torch.int8)
w = torch.randint(-127, 128, (70, 256), dtype=torch.int8)
rest = (q, torch.ones(40, 1), w, torch.ones(70, 1), *[None] * 5, 8, torch.float32)
expected = reference.int_linear(*rest)
assert torch.equal(torch.ops.masquant.int_linear(*rest), expected)
child = os.fork()
same = torch.equal(torch.ops.masquant.int_linear(*rest), expected)
if child == 0:
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), same)
"""

_SMALL_STACK = """
import ctypes

class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

memory = ctypes.create_string_buffer(4096)
stack = Stack(ctypes.addressof(memory), 0, 4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
import torch
from torchao_masquant.kernels import cpu_lowering
torch.ops.masquant_cpu.use_tiles(True)
q = torch.ones(40, 256, dtype=torch.int8)
y = torch.ops.masquant.int_linear(
    q, torch.ones(40, 1), q, torch.ones(40, 1), *[None] * 5, 8, torch.float32
)
print(*cpu_lowering.prepare(), bool((y == 256).all()))
"""


def run(script: str) -> str:
    """What it prints; a signal, as of a tile without permission, raises."""
    environment = {k: v for k, v in os.environ.items() if k != "MASQUANT_CPU_ENGINE"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    result = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return result.stdout.splitlines()[-1]


def test_a_fork_has_what_its_parent_had() -> None:
    assert run(_FORK) == "0 True"


def test_a_process_that_is_refused_does_without() -> None:
    """Linux gives no tiles to one with a stack for signals that cannot hold them."""
    found = run(_SMALL_STACK)
    assert found.startswith("CpuEngine.VNNI AVX512-VNNI; Linux does not grant"), found
    assert found.endswith(" True")
