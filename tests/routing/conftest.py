# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
import copy

import pytest
import tiny_models
import torch


@pytest.fixture(scope="session")
def vl_recipe():
    """A recipe of the tiny Qwen2.5-VL, as every call of ``qwen25_vl()`` makes it."""
    return tiny_models.recipe_of(tiny_models.qwen25_vl())


@pytest.fixture(scope="session")
def omni_recipe():
    return tiny_models.recipe_of(tiny_models.omni_thinker())


@pytest.fixture(scope="session")
def quantized_models(vl_recipe, omni_recipe):
    return {
        "vl": tiny_models.quantized(tiny_models.qwen25_vl(), vl_recipe),
        "omni": tiny_models.quantized(tiny_models.omni_thinker(), omni_recipe),
        "plain": tiny_models.quantized(tiny_models.PlainModel()),
    }


@pytest.fixture
def vl(quantized_models):
    """A quantized Qwen2.5-VL of the test's own."""
    return copy.deepcopy(quantized_models["vl"])


@pytest.fixture
def omni(quantized_models):
    """A quantized Omni thinker of the test's own."""
    return copy.deepcopy(quantized_models["omni"])


@pytest.fixture
def plain(quantized_models):
    """A quantized model without a config."""
    return copy.deepcopy(quantized_models["plain"])


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def fresh_dynamo():
    """No compiled code from before, and none left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
