# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
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


@pytest.fixture
def vl(vl_recipe):
    """A quantized Qwen2.5-VL of the test's own."""
    return tiny_models.quantized(tiny_models.qwen25_vl(), vl_recipe)


@pytest.fixture
def omni(omni_recipe):
    """A quantized Omni thinker of the test's own."""
    return tiny_models.quantized(tiny_models.omni_thinker(), omni_recipe)


@pytest.fixture
def plain():
    """A quantized model without a config."""
    return tiny_models.quantized(tiny_models.PlainModel())


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
