# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Peak memory of a sequential calibration against the number of layers.

    python benchmarks/sequential_memory.py [--layers 4 8 16] [--limit-gib 3]
        [--method smoothquant] [--json PATH]

A checkpoint of random bfloat16 weights of Qwen2.5-VL-7B's width (hidden size 3584, 18944
inside; a small tower and vocabulary in front) is written to disk, calibrated in a process
of its own, and removed. The process has a limit (``RLIMIT_DATA``) on all memory that is
private to it and written to: heap, anonymous mappings and private mappings of files.
What is reported is the peak of resident anonymous memory, sampled; pages of the
checkpoint's mapped files are not in it, since the system may drop them at any time.

SmoothQuant needs no covariance; those of ``down_proj`` for ``--method masquant`` are 18944
wide, 2.7 GiB each in float64, and make up most of what is measured. Exponent and separation
are fixed then: searching for them takes time, and no more memory.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from torchao_masquant.atomic_files import write_whole
from torchao_masquant.recipe import library_versions
from torchao_masquant.sequential import calibrate_sequential

_GIB = 1 << 30
_IMAGE = 5
_PATCHES = 16


def _config(layers: int, hidden: int, inner: int) -> Qwen2_5_VLConfig:
    heads = hidden // 128
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype="bfloat16",
        text_config={
            "vocab_size": 1024,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 7),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": 2,
            "window_size": 8,
            "fullatt_block_indexes": [0],
            "out_hidden_size": hidden,
        },
        image_token_id=_IMAGE,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=False,
    )


def _write(folder: Path, config: Qwen2_5_VLConfig) -> int:
    """A checkpoint of random weights, the same in each layer; its bytes."""
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=torch.bfloat16
        )
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        layer = parts[parts.index("layers") + 1] if "layers" in parts else "other"
        shards.setdefault(layer, {})[name] = tensor.shape
    weight_map: dict[str, str] = {}
    size = 0
    known: dict[str, torch.Tensor] = {}
    for layer, shapes in shards.items():
        file = f"model-{layer}.safetensors"
        tensors = {name: _weight(known, name, shape) for name, shape in shapes.items()}
        size += sum(t.nbytes for t in tensors.values())
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return size


def _weight(
    known: dict[str, torch.Tensor], name: str, shape: torch.Size
) -> torch.Tensor:
    """Random values of usable size, made once for each kind of weight."""
    kind = re.sub(r"\.layers\.\d+\.", ".layers.", name)
    if kind not in known:
        tensor = torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) > 1:
            tensor.normal_().mul_(shape[1:].numel() ** -0.5)
        known[kind] = tensor
    return known[kind]


def _samples(count: int, tokens: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(
            10, 1000, (tokens - _PATCHES // 4 - 2,), generator=generator
        )
        row = [*words.tolist(), 3, *[_IMAGE] * (_PATCHES // 4), 4]
        found.append(
            {
                "input_ids": torch.tensor([row]),
                "attention_mask": torch.ones(1, tokens, dtype=torch.int64),
                "pixel_values": torch.randn(
                    _PATCHES, 3 * 2 * 4, generator=generator
                ).to(torch.bfloat16),
                "image_grid_thw": torch.tensor([[1, 4, 4]]),
            }
        )
    return found


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


@contextlib.contextmanager
def _peak_of_anonymous_memory() -> Iterator[dict[str, int]]:
    found = {"bytes": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            found["bytes"] = max(found["bytes"], _status("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def measure(
    folder: Path, method: str, limit: float, samples: Any, results: Any
) -> None:
    """Calibrate a checkpoint under a limit, and report."""
    before = _status("RssAnon")
    data = _status("VmData")
    if limit:
        bound = int(limit * _GIB)
        resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    start = time.perf_counter()
    with _peak_of_anonymous_memory() as peak:
        result = calibrate_sequential(
            folder / "model",
            samples,
            output=folder / "quantized",
            method=method,
            scheme="w4a8",
            alpha=0.5,
            separation=1.0,
            progress=False,
        )
    results.put(
        {
            "program_gib": before / _GIB,
            "data_before_gib": data / _GIB,
            "peak_anonymous_gib": peak["bytes"] / _GIB,
            "estimated_gib": result.estimated_bytes / _GIB,
            "peak_resident_gib": _status("VmHWM") / _GIB,
            "seconds": time.perf_counter() - start,
            "block_s": sorted(result.seconds)[len(result.seconds) // 2],
            "quantized_gib": sum(
                f.stat().st_size for f in (folder / "quantized").iterdir()
            )
            / _GIB,
        }
    )


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--hidden", type=int, default=3584)
    parser.add_argument("--inner", type=int, default=18944)
    parser.add_argument(
        "--method", choices=("smoothquant", "masquant"), default="smoothquant"
    )
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--limit-gib", type=float, default=0.0, help="0: none")
    parser.add_argument("--folder", type=Path, help="for the checkpoints")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    samples = _samples(arguments.samples, arguments.tokens)
    rows: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            folder = Path(temporary)
            (folder / "model").mkdir()
            config = _config(layers, arguments.hidden, arguments.inner)
            size = _write(folder / "model", config)
            results = context.Queue()
            process = context.Process(
                target=measure,
                args=(
                    folder,
                    arguments.method,
                    arguments.limit_gib,
                    samples,
                    results,
                ),
            )
            process.start()
            process.join()
            if process.exitcode:
                raise RuntimeError(f"{layers} layers: exit code {process.exitcode}")
            rows.append({"layers": layers, "model_gib": size / _GIB, **results.get()})
            print(rows[-1], file=sys.stderr, flush=True)
    shown = Table(
        "layers",
        "model GiB",
        "peak anonymous GiB",
        "program GiB",
        "estimated GiB",
        "s/block",
        "s in all",
    )
    for row in rows:
        shown.add_row(
            str(row["layers"]),
            *(
                f"{row[name]:.2f}"
                for name in (
                    "model_gib",
                    "peak_anonymous_gib",
                    "program_gib",
                    "estimated_gib",
                )
            ),
            *(f"{row[name]:.1f}" for name in ("block_s", "seconds")),
        )
    Console().print(shown)
    if arguments.json:
        result = {
            "arguments": {
                k: v for k, v in vars(arguments).items() if k not in ("json", "folder")
            },
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            "versions": library_versions(),
            "rows": rows,
        }
        write_whole(arguments.json, json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
