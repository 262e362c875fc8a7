# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Quantized decoders for processes that have torch alone: torch.export, AOTInductor."""

from torchao_masquant.deploy.compressed_tensors import export_compressed_tensors
from torchao_masquant.deploy.decoder import export_decoder
from torchao_masquant.deploy.lowering import lower
from torchao_masquant.deploy.package import write_package

__all__ = ["export_compressed_tensors", "export_decoder", "lower", "write_package"]
