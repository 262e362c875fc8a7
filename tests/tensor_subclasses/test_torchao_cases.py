# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""torchao's own test cases for tensor subclasses, on ours.

They ask for a least SQNR of ``F.linear`` against high precision, on a (4, 128) weight
and 32 tokens of standard normal numbers. Over 300 seeds and three dtypes it was, mean
and least: 40.5 and 38.2 dB for w8a8, 21.8 and 19.3 for w4a16 with groups of 32.
``LINEAR_MIN_SQNR`` is the least, rounded down; torchao asks 40 of 8-bit weights alone,
with activations left as they are.

Left out:
- without an accelerator, ``test_device1_to_device2``: it calls ``.cuda()``;
- ``TorchAOTensorParallelTestCase``: it needs CUDA, and runs on two processes of a CPU
  in ``tests/distributed/test_torchao_case.py``.
"""

import unittest

import torch
import torchao.testing.utils as torchao_cases
from torch.testing._internal import common_utils

from torchao_masquant.tensor_subclasses import MASQuantTensor


class _MASQuantCase(common_utils.TestCase):
    TENSOR_SUBCLASS = MASQuantTensor
    FACTORY_FN = staticmethod(MASQuantTensor.from_hp)
    COMPILE_MIN_SQNR = torchao_cases.TorchAOCompileTestCase.COMPILE_MIN_SQNR


class TestW8A8(_MASQuantCase):
    kwargs = {"weight_bits": 8, "act_bits": 8}
    LINEAR_MIN_SQNR = 38


class TestW4A16Asymmetric(_MASQuantCase):
    kwargs = {"weight_bits": 4, "act_bits": 16, "group_size": 32, "symmetric": False}
    LINEAR_MIN_SQNR = 19


for _case in (TestW8A8, TestW4A16Asymmetric):
    torchao_cases.copy_tests(torchao_cases.TorchAOBasicTestCase, _case, "masquant")
    torchao_cases.copy_tests(torchao_cases.TorchAOCompileTestCase, _case, "masquant")
    if not torch.cuda.is_available():
        _name = "test_device1_to_device2_device1_cpu_device2_cpu_masquant"
        setattr(_case, _name, unittest.skip("calls .cuda()")(getattr(_case, _name)))

del _case  # pytest would collect it a second time


class TestWhatIsLeftOut(common_utils.TestCase):
    """The part of ``test_device1_to_device2`` that a CPU can do."""

    def test_device_to_same_device(self) -> None:
        tensor = MASQuantTensor.from_hp(torch.randn(4, 128, dtype=torch.bfloat16))
        for moved in (tensor.to(device="cpu"), tensor.to("cpu"), tensor.cpu()):
            self.assertIsInstance(moved, MASQuantTensor)
            self.assertEqual(moved.dequantize(), tensor.dequantize())

    def test_all_of_torchaos_cases_were_copied(self) -> None:
        names = {n for n in dir(TestW8A8) if n.startswith("test_")}
        self.assertEqual(
            {n.split("_device")[0].removesuffix("_masquant") for n in names},
            {
                "test_flatten_unflatten",
                "test_hp_tensor",
                "test",  # test_device1_to_device2
                "test_transpose",
                "test_linear",
                "test_input_output_tensor_subclass",
                "test_input_tensor_subclass",
                "test_output_tensor_subclass",
                "test_linear_compile",
            },
        )
