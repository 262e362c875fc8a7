# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How the modules of a model become quantized ones, as :mod:`torchao_masquant.quantize` asks."""
