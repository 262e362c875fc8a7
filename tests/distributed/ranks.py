# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Two processes that stand for two devices, connected by gloo."""

import queue
import traceback
from pathlib import Path
from typing import Any, Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
_TIMEOUT = 240.0


def _serve(rank: int, store: str, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD
    )
    while (task := tasks.get()) is not None:
        function, args = task
        try:
            torch._dynamo.reset()
            results.put((rank, True, function(rank, *args)))
        except BaseException:
            results.put((rank, False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Processes that outlive a test, since starting one takes longer than most tests."""

    def __init__(self, folder: Path):
        context = mp.get_context("spawn")
        self.results = context.Queue()
        self.tasks = [context.Queue() for _ in range(WORLD)]
        self.processes = [
            context.Process(
                target=_serve,
                args=(rank, str(folder / "store"), self.tasks[rank], self.results),
                daemon=True,
            )
            for rank in range(WORLD)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(rank, *args)`` on every rank; what they return, by rank."""
        for tasks in self.tasks:
            tasks.put((function, args))
        returned: dict[int, Any] = {}
        failed: list[str] = []
        while len(returned) + len(failed) < WORLD:
            try:
                rank, good, value = self.results.get(timeout=_TIMEOUT)
            except queue.Empty:
                raise AssertionError("\n".join(failed) or "no rank answers") from None
            if good:
                returned[rank] = value
            else:
                failed.append(f"rank {rank}: {value}")
        assert not failed, "\n".join(failed)
        return [returned[rank] for rank in range(WORLD)]

    def close(self) -> None:
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.terminate()
