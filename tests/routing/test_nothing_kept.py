# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A server's memory: what a call brought along is freed when it ends, however it ends."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import BOS, IMAGE, batch, router, words

MIXED = batch([BOS, 11, "image", 12])


def calls_and_ids_of(model, call):
    """Weak references to the state of a call's thread and to its modality ids."""
    seen = []

    def look(*_):
        state = router(model).call
        seen.append((weakref.ref(state), weakref.ref(state.ids)))

    hook = model.get_decoder().layers[0].register_forward_pre_hook(look)
    try:
        call()
    finally:
        hook.remove()
    assert len(seen) == 1
    return seen[0]


def test_ids_are_freed_with_their_call(vl):
    _, ids = calls_and_ids_of(vl, lambda: vl(**MIXED))
    assert ids() is None


def test_ids_are_freed_with_a_failing_call(vl):
    def fail(*_):
        raise RuntimeError("no such norm today")

    def call():
        with pytest.raises(RuntimeError, match="no such norm today"):
            vl(**MIXED)

    vl.model.language_model.norm.register_forward_pre_hook(fail)
    _, ids = calls_and_ids_of(vl, call)
    # A traceback and its frames refer to each other.
    gc.collect()
    assert ids() is None


def test_a_threads_state_is_freed_with_it(vl):
    """A server may start a thread for each request."""

    def call():
        thread = threading.Thread(target=torch.no_grad()(lambda: vl(**MIXED)))
        thread.start()
        thread.join()

    state, ids = calls_and_ids_of(vl, call)
    gc.collect()
    assert state() is None and ids() is None


def live_objects() -> dict[type, int]:
    gc.collect()
    counts: dict[type, int] = {}
    for thing in gc.get_objects():
        counts[type(thing)] = counts.get(type(thing), 0) + 1
    return counts


def test_no_objects_pile_up_over_calls_of_all_kinds(vl):
    # A placeholder more than there are features for: found out after routing.
    tail = torch.tensor([[IMAGE]])
    broken = {**MIXED, "input_ids": torch.cat((MIXED["input_ids"], tail), dim=1)}
    del broken["attention_mask"]
    text = batch([BOS, *words(3)])

    @torch.no_grad()
    def serve(number):
        with pytest.raises(ValueError):
            vl(**broken)
        vl(**(MIXED if number % 2 else text))
        vl.generate(**text, max_new_tokens=2, do_sample=False)

    rounds = 12
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(serve, range(rounds)))
        before = live_objects()
        list(pool.map(serve, range(rounds)))
        after = live_objects()
    # What is kept of every call comes to as many objects as there were calls.
    grown = {t.__name__: n - before.get(t, 0) for t, n in after.items()}
    assert {name: n for name, n in grown.items() if n >= rounds} == {}
