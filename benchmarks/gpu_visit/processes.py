# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Runs checks in processes of their own until all are done, or one fails.

Compiling kernels takes most of their time, on one core each; and what a kernel breaks on
a GPU is broken for the process that launched it.
"""

import concurrent.futures
import multiprocessing
import os
import time
import traceback
from dataclasses import dataclass, field
from typing import Any, Callable, Optional, Sequence

__all__ = ["Outcome", "Task", "run_all"]


@dataclass(frozen=True)
class Task:
    """A call in another process.

    Attributes:
        name: of what it tells.
        function: of a module; raises where something is wrong.
        args: can be pickled.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()


@dataclass
class Outcome:
    """Of tasks.

    Attributes:
        done: name to seconds, in the order in which they ended.
        failed: the first one that did, and its traceback; None where none did.
        unfinished: names of those that there was no time for.
    """

    done: dict[str, float] = field(default_factory=dict)
    failed: Optional[tuple[str, str]] = None
    unfinished: list[str] = field(default_factory=list)


def run_all(
    tasks: Sequence[Task],
    workers: int,
    seconds: float,
    begin: Callable[[], None],
    tell: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Run tasks in a few processes, which end with the first failure or the time.

    Args:
        tasks: those that come first are begun first.
        workers: processes.
        seconds: for all of them.
        begin: is called in each process before its first task.
        tell: called with what there is after each task.
    """
    outcome = Outcome(unfinished=[task.name for task in tasks])
    ends = time.monotonic() + seconds
    pool = concurrent.futures.ProcessPoolExecutor(
        max_workers=min(workers, len(tasks)),
        # A fork would inherit the parent's CUDA.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=begin,
    )
    try:
        futures = {pool.submit(_timed, task): task for task in tasks}
        waiting = concurrent.futures.as_completed(futures, timeout=seconds)
        for future in waiting:
            task = futures[future]
            try:
                outcome.done[task.name] = future.result()
            except Exception as error:
                found = "".join(traceback.format_exception(error))
                outcome.failed = (task.name, found)
            outcome.unfinished.remove(task.name)
            tell(outcome)
            if outcome.failed or time.monotonic() > ends:
                break
    except concurrent.futures.TimeoutError:
        pass
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        # Those that are in the middle of a task.
        for process in processes:
            process.kill()
    return outcome


def _timed(task: Task) -> float:
    started = time.monotonic()
    print(f"[{os.getpid()}] {task.name}", flush=True)
    task.function(*task.args)
    return round(time.monotonic() - started, 2)
