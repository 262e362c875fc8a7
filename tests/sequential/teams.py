# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Functions that several processes run, which talk to each other."""

import signal
import tempfile

import killed_runs
import torch
import torch.distributed as dist

from torchao_masquant.sequential import TeamError

SIZE = 2


def process(rank, size, store, results, function):
    """One of some processes that talk to each other; sends what a function gives."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size
    )
    try:
        results.put((rank, function(rank)))
    except Exception as error:
        results.put((rank, error))


def together(folder, function, size=SIZE):
    """What a function gives in each of some processes, in their order."""
    processes, results = _start(folder, function, size)
    found = dict(results.get(timeout=120) for _ in processes)
    for started in processes:
        started.join()
    return [found.get(rank) for rank in range(size)]


def stopped(folder, function, size=SIZE):
    """Run a function that kills the last process, and see that the others end."""
    processes, results = _start(folder, function, size)
    found = dict(results.get(timeout=120) for _ in processes[1:])
    for started in processes:
        started.join()
    assert processes[-1].exitcode == -signal.SIGKILL
    assert sorted(found) == list(range(size - 1))
    for rank, error in found.items():
        assert isinstance(error, TeamError), error
        message = f"process {rank} of {size} lost the others: one of them has died"
        assert message in str(error)


def _start(folder, function, size):
    context = killed_runs.context()
    results = context.Queue()
    # A store that a group has met in is of no use to another.
    store = f"{tempfile.mkdtemp(dir=folder)}/store"
    processes = [
        context.Process(target=process, args=(rank, size, store, results, function))
        for rank in range(size)
    ]
    for started in processes:
        started.start()
    return processes, results
