# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Here so that pytest puts this folder on sys.path, for the helper modules in it.

Without a GPU the Triton kernels run on the CPU, in Triton's interpreter. It is chosen
by a variable that Triton reads when it is imported, which PyTorch's other packages do,
so it is set before any test is. So is that no network is asked for a model: where there is
none, the answer comes after many seconds of retries.
"""

import gc
import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, so that no worker is left with one at the end.

    Those of two ranks stay together: a worker that has one starts two processes.
    """

    def is_short(item: pytest.Item) -> bool:
        ranks = "ranks" in getattr(item, "fixturenames", ())
        return not ranks and item.get_closest_marker("slow") is None

    items.sort(key=is_short)


def pytest_collection_finish() -> None:
    """A tenth of the time of tracing graphs went into the search for garbage.

    What is imported stays, and need not be looked through again and again; what tests
    make is looked through less often than after each 700 objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_unconfigure() -> None:
    """Libraries complain at the end of what they take to have leaked."""
    gc.unfreeze()


@pytest.fixture
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained model has its first layer alone, for what is true of any number."""
    from torchao_masquant.testing import digits

    load = digits.load_model

    def load_model(*args: Any) -> Any:
        model = load(*args)
        decoder = model.get_decoder()
        del decoder.layers[1:]
        decoder.config.num_hidden_layers = 1
        decoder.config.layer_types = decoder.config.layer_types[:1]
        return model

    monkeypatch.setattr(digits, "load_model", load_model)
