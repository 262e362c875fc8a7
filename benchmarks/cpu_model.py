# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A decoder on the CPU: first token, decoding, memory, loading and compiling.

    python benchmarks/cpu_model.py [--quick] [--threads 2] [--json PATH]

The model is a Qwen2.5-VL of 3B's width with four decoder layers, random weights, a tiny
vision tower and a vocabulary in the proportion to the layers that the real one has. Half
of a prompt is one image. The language model is compiled whole (``fullgraph=True``), the
cache is static, and ``generate`` runs it: the first token's time holds all that happens
before it, vision tower included.

Each candidate has a process of its own, so memory is its own; processes take turns,
call by call, and the median counts. A first process compiles with empty caches (cold)
and ends; the second, which is measured, finds them (warm). Graphs, breaks and
recompiled graphs are counted last, without a backend, over ten lengths of text, ten of
text and image, and a generation of 64 tokens.
"""

import argparse
import ctypes
import gc
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Optional

import torch
from cpu_linear import RANK, processor, write_report
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._dynamo.utils import counters
from torchao.quantization import quantize_
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from torchao_masquant import MASQuantConfig, Recipe, masquant_config
from torchao_masquant.head_recipe import head_layers
from torchao_masquant.kernels import cpu_lowering
from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import LayerRecipe, weight_fingerprint

DENSE = "bf16"
#: With the output head in 8 bits, too.
HEAD = "+head"
CANDIDATES = [DENSE, "w8a8", "w4a8", f"w4a8{HEAD}", "w4a16"]
LENGTHS = [256, 1024]
NEW_TOKENS = 17
_IMAGE, _START, _END, _WORD = 3, 1, 2, 4


def build(layers: int) -> Qwen2_5_VLForConditionalGeneration:
    """The model, with the same random weights each time."""
    torch.manual_seed(0)
    text = {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        # 151936 for 36 layers.
        "vocab_size": 151936 * layers // 36,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000000.0,
            "mrope_section": [16, 24, 24],
        },
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 8,
        "fullatt_block_indexes": [0],
        "out_hidden_size": 2048,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=_IMAGE,
        vision_start_token_id=_START,
        vision_end_token_id=_END,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Qwen2_5_VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def random_recipe(model: nn.Module, candidate: str) -> Recipe:
    """Two modalities with random smoothing factors and pairs for every decoder linear."""
    modalities = ("text", "vision")
    options = SolverOptions(
        scheme=candidate.removesuffix(HEAD),
        rank=RANK,
        head_bits=8 if candidate.endswith(HEAD) else 16,
    )
    layers = head_layers(model, options, modalities)
    for name, linear in model.named_modules():
        if type(linear) is not nn.Linear or "language_model" not in name:
            continue
        n, k = linear.weight.shape
        rank = max(1, round(RANK * min(n, k)))
        layers[name] = LayerRecipe(
            shape=(n, k),
            fingerprint=weight_fingerprint(linear.weight),
            smoothing_factor=torch.rand(2, k) + 0.5,
            ranks=(rank,),
            l1=torch.randn(k, rank) * 1e-2,
            l2=torch.randn(rank, n) * 1e-2,
            modality_bias=torch.randn(2, n) * 1e-2,
        )
    return Recipe(options=options, modalities=modalities, layers=layers)


def prompt(length: int, image: bool) -> dict[str, torch.Tensor]:
    """A prompt; with an image, that is the nearest even half of it.

    Args:
        length: tokens, at least 8.
        image: whether half of it is an image.
    """
    ids = torch.full((length,), _WORD)
    inputs: dict[str, torch.Tensor] = {}
    if image:
        # One row of patches two high: a token for each two patches across.
        tokens = length // 2
        ids[1], ids[2 : 2 + tokens], ids[2 + tokens] = _START, _IMAGE, _END
        inputs["image_grid_thw"] = torch.tensor([[1, 2, 2 * tokens]])
        inputs["pixel_values"] = torch.randn(4 * tokens, 3 * 2 * 2 * 2)
        inputs["mm_token_type_ids"] = (ids == _IMAGE).int()[None]
    return {
        "input_ids": ids[None],
        "attention_mask": torch.ones_like(ids)[None],
        **inputs,
    }


class _Clock(BaseStreamer):
    """Notes when each token comes; the first call hands in the prompt."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(
    model: nn.Module, inputs: dict[str, torch.Tensor], new_tokens: int
) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second after it."""
    clock = _Clock()
    model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,  # of generate's own: the language model is compiled
        streamer=clock,
    )
    start, _, first, *rest = clock.times
    if not rest:
        return first - start, 0.0
    return first - start, len(rest) / (rest[-1] - first)


def memory(what: str) -> float:
    """VmRSS or VmHWM of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {what}.")


def _weight_bytes(model: nn.Module, part: str) -> int:
    """Bytes of the linears of a part, all that belongs to them counted."""
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and part in name:
            stored = getattr(module.weight.data, "nbytes_stored", None)
            total += module.weight.nbytes if stored is None else stored
    return total


def count_graphs(model: nn.Module) -> dict[str, dict[str, int]]:
    """What Dynamo makes of the language model."""
    short = range(8, 48, 4)
    calls = {
        "ten lengths of text": [prompt(n, False) for n in short],
        "ten lengths with an image": [prompt(n, True) for n in short],
    }
    calls["both"] = [p for pair in zip(*calls.values()) for p in pair]
    calls["generate 64 tokens"] = [prompt(24, True)]
    found = {}
    for name, inputs in calls.items():
        torch._dynamo.reset()
        counters.clear()
        model.get_decoder().compile(backend="eager", fullgraph=True, dynamic=True)
        for one in inputs:
            if name.startswith("generate"):
                generate(model, one, 64)
            else:
                model(**one, use_cache=False)
        found[name] = {
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
            "recompiles": sum(counters["recompiles"].values())
            if counters.get("recompiles")
            else max(0, counters["stats"]["unique_graphs"] - 1),
        }
    return found


def work(connection: Connection, candidate: str, layers: int, options: Any) -> None:
    """A candidate's process: answers the parent's calls until None comes."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(options["folder"]) / candidate)
    torch.set_grad_enabled(False)
    torch.set_num_threads(options["threads"])
    path = Path(options["folder"]) / f"{candidate}.pt"
    model = build(layers)
    if not path.exists():
        if candidate != DENSE:
            quantize_(model, masquant_config(random_recipe(model, candidate)))
        torch.save(model.state_dict(), path)
    elif candidate != DENSE:
        config = MASQuantConfig(
            step="prepare_for_loading",
            scheme=candidate.removesuffix(HEAD),
            head_bits=8 if candidate.endswith(HEAD) else 16,
            modalities=["text", "vision"],
        )
        quantize_(model, config)
    facts: dict[str, Any] = {"file MiB": path.stat().st_size / 2**20}
    started = time.perf_counter()
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    facts["load s"] = time.perf_counter() - started
    facts["linears MiB"] = _weight_bytes(model, "language_model") / 2**20
    facts["head MiB"] = _weight_bytes(model, "lm_head") / 2**20
    del state
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    facts["resident MiB"] = memory("VmRSS")
    if candidate != DENSE:
        facts["engine"] = cpu_lowering.prepare().engine.value
    model.get_decoder().compile(fullgraph=True, dynamic=True)
    started = time.perf_counter()
    generate(model, prompt(64, True), 3)
    first = time.perf_counter() - started
    started = time.perf_counter()
    generate(model, prompt(64, True), 3)
    facts["compile s"] = first - (time.perf_counter() - started)
    connection.send(facts)
    while True:
        call = connection.recv()
        if call is None:
            return
        if call == "graphs":
            connection.send(count_graphs(model))
            continue
        length, new_tokens = call
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        taken = generate(model, prompt(length, True), new_tokens)
        connection.send((*taken, memory("VmHWM")))


class Worker:
    """A candidate's process, as the parent sees it."""

    def __init__(self, candidate: str, layers: int, options: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=work, args=(theirs, candidate, layers, options)
        )
        self.process.start()
        theirs.close()
        self.facts = self.connection.recv()

    def ask(self, call: Any) -> Any:
        self.connection.send(call)
        return self.connection.recv()

    def end(self) -> None:
        self.connection.send(None)
        self.process.join()


def run(
    candidates: list[str],
    lengths: list[int],
    layers: int,
    threads: int,
    repeats: int,
    new_tokens: int,
) -> dict[str, dict[str, Any]]:
    """Measure every candidate; facts by candidate."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        options = {"folder": folder, "threads": threads}
        workers = {}
        for candidate in candidates:
            print(f"{candidate}: compiling ...", file=sys.stderr)
            cold = Worker(candidate, layers, options)
            cold.end()
            workers[candidate] = Worker(candidate, layers, options)
            facts = workers[candidate].facts
            facts["compile cold s"] = cold.facts["compile s"]
            facts["compile warm s"] = facts.pop("compile s")
            found[candidate] = facts
        for length in lengths:
            print(f"{length} tokens ...", file=sys.stderr)
            taken: dict[str, list[tuple[float, float, float]]] = {
                candidate: [] for candidate in candidates
            }
            # The first round warms up.
            for _ in range(repeats + 1):
                for candidate, worker in workers.items():
                    taken[candidate].append(worker.ask((length, new_tokens)))
            for candidate, results in taken.items():
                first, rate, peak = zip(*results[1:])
                found[candidate][f"first token s, {length}"] = statistics.median(first)
                found[candidate][f"tokens/s after {length}"] = statistics.median(rate)
                found[candidate][f"peak MiB, {length}"] = max(peak)
        for candidate, worker in workers.items():
            print(f"{candidate}: counting graphs ...", file=sys.stderr)
            found[candidate]["graphs"] = worker.ask("graphs")
            worker.end()
    return found


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By candidate: how many times faster than dense, and shares of its memory."""
    dense = found[DENSE]
    compared: dict[str, dict[str, float]] = {}
    for candidate, facts in found.items():
        if candidate == DENSE:
            continue
        compared[candidate] = {
            name: facts[name] / dense[name]
            if name.startswith("tokens/s") or "MiB" in name
            else dense[name] / facts[name]
            for name in facts
            if isinstance(facts[name], float) and name in dense
        }
    return compared


def _print(found: dict[str, dict[str, Any]], title: str) -> None:
    compared = ratios(found)
    table = Table(box=box.SIMPLE_HEAD, title=title)
    table.add_column("")
    for candidate in found:
        table.add_column(candidate, justify="right")
    for name, value in found[DENSE].items():
        if not isinstance(value, float):
            continue
        cells = [f"{value:.3g}"]
        for candidate in list(found)[1:]:
            share = compared[candidate][name]
            cells.append(f"{found[candidate][name]:.3g} (x{share:.2f})")
        table.add_row(name, *cells)
    for calls in found[DENSE]["graphs"]:
        counts = [facts["graphs"][calls] for facts in found.values()]
        table.add_row(
            f"graphs (breaks), {calls}",
            *(f"{count['graphs']} ({count['breaks']})" for count in counts),
        )
    Console(width=140).print(table)


def main(arguments: Optional[list[str]] = None) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one layer, one length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    found = run(
        [DENSE, "w4a8"] if options.quick else CANDIDATES,
        LENGTHS[:1] if options.quick else LENGTHS,
        layers=1 if options.quick else 4,
        threads=options.threads,
        repeats=2 if options.quick else options.repeats,
        new_tokens=NEW_TOKENS,
    )
    title = f"{processor()}, {options.threads} threads; (x: faster, or share of memory)"
    _print(found, title)
    if options.json is not None:
        write_report(
            options.json,
            options.threads,
            os.getloadavg()[0],
            ratios=ratios(found),
            candidates=found,
        )
    return found


if __name__ == "__main__":
    main()
