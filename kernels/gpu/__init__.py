# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The ``masquant::`` operators as Triton kernels, for CUDA and ROCm.

- ``smooth_quantize``, ``low_rank_down``, ``int_linear``, ``weight_only_linear``: a kernel or
  two each, and the function that launches them, with the arguments of the operator;
- ``float_smooth_quantize``, ``float_linear``: likewise, of tokens in number formats of
  floats, which ``low_rank_down`` reads, too; ``float_codes``: their codes, made and read;
- ``linear_tiles``, ``int4_unpacking``, ``linear_epilogue``: what the products of both kinds
  of linear are made of; ``smooth``: the pass before the weight-only one; ``rotation``: of
  what is smoothed;
- ``int_linear_tilings``, ``float_linear_tilings``, ``weight_only_tilings``: the tilings of each;
- ``launching``: tilings, and launches that tracers can record;
- ``tuning``, ``measuring``: the tables that tilings are chosen by, and what writes them;
- ``library_products``: what is called in place of a kernel that a table says loses;
- ``checks``: what the kernels refuse;
- ``operators``: each operator with its check and its launch.

:mod:`torchao_masquant.kernels.gpu_lowering` gives them to the dispatcher.
"""
