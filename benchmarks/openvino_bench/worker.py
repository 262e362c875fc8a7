# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""OpenVINO's process: MLPs one behind the other, timed when asked for.

Runs in an environment that has openvino and numpy, not torch. Reads lines of JSON
``[format, K, N, copies, tokens, threads, clock]`` and writes the seconds of one MLP, by
the clock of that name in ``time``.
"""

import json
import sys
import time
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op

# A constant of int4 shares its memory with the array that it was made from.
_KEPT: list[np.ndarray] = []


def linear(x: Any, n: int, k: int, form: str, rng: np.random.Generator) -> Any:
    """A weight of int8 with a scale a channel, of int4 in groups of 128, or dense."""
    if form == "bfloat16":
        dense = rng.standard_normal((n, k), dtype=np.float32)
        return op.matmul(x, op.constant(dense), False, True)
    if form == "int8":
        weight = op.constant(rng.integers(-127, 127, (n, k), dtype=np.int8))
        scale = op.constant(rng.uniform(1e-3, 2e-3, (n, 1)).astype(np.float32))
        return op.matmul(x, op.multiply(op.convert(weight, "f32"), scale), False, True)
    _KEPT.append(rng.integers(0, 255, (n, k // 2), dtype=np.uint8))
    shape = ov.Shape([n, k // 128, 128])
    weight = op.constant(ov.Tensor(_KEPT[-1], shape, ov.Type.i4))
    scale = op.constant(rng.uniform(1e-3, 2e-3, (n, k // 128, 1)).astype(np.float32))
    whole = op.constant(np.array([n, k], dtype=np.int64))
    spread = op.multiply(op.convert(weight, "f32"), scale)
    return op.matmul(x, op.reshape(spread, whole, False), False, True)


def compiled(form: str, k: int, n: int, copies: int, threads: int) -> Any:
    """With activations quantized as they come, in groups of the weight's width."""
    rng = np.random.default_rng(0)
    x = y = op.parameter([-1, k], np.float32)
    for _ in range(copies):
        gate, up = (linear(y, n, k, form, rng) for _ in range(2))
        hidden = op.multiply(op.multiply(gate, op.sigmoid(gate)), up)
        y = linear(hidden, k, n, form, rng)
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    if form == "bfloat16":
        settings["INFERENCE_PRECISION_HINT"] = "bf16"
    else:
        width = k if form == "int8" else 128
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = width
    model = ov.Model([op.result(y)], [x])
    return ov.Core().compile_model(model, "CPU", settings).create_infer_request()


def main() -> None:
    made: dict[tuple[Any, ...], Any] = {}
    for line in sys.stdin:
        form, k, n, copies, tokens, threads, clock_name = json.loads(line)
        clock = getattr(time, clock_name)
        key = (form, k, n, copies, threads)
        if key not in made:
            made[key] = compiled(*key)
        x = np.random.default_rng(1).standard_normal((tokens, k)).astype(np.float32)
        made[key].infer([x])
        started = clock()
        made[key].infer([x])
        print((clock() - started) / copies, flush=True)


if __name__ == "__main__":
    main()
