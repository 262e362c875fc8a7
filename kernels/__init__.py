# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Operators of MASQuant: their schemas, fakes and per-device implementations.

Importing this package registers the ``masquant::`` operator library. It knows
plain tensors only: nothing here knows of models, modules or tensor subclasses.

- ``library``: the operators' library, and how one is defined;
- ``autocast``: what linears and experts do under ``torch.autocast``;
- ``reference``: the operators and their plain implementation, against which every
  lowering is tested;
- ``number_formats``: floats of 8 and 4 bits, and how scales for them are made;
- ``float_reference``: the operators for tokens in such floats, likewise;
- ``float_instructions``: which devices multiply such floats, and how;
- ``hadamard``: rotations of neighbouring channels;
- ``expert_operators``: those of mixture-of-experts weights, made of the others where
  a device has no kernels for them;
- ``int4_packing``: two 4-bit integers per byte;
- ``cpu_lowering``: C++ kernels for x86 and ARM, which are in ``csrc``; ``cpu_engine`` chooses
  among them, and ``cpu_build`` compiles them at their first use;
- ``gpu_lowering``: Triton kernels for CUDA and ROCm, which are in ``gpu``;
- ``shared_prologue``: linears that share an input smooth it once in a compiled graph;
"""

# transformers looks for Hugging Face's package ``kernels`` and, from the root of a
# checkout, imports this folder by that name. Then there is nothing to be had here, and
# importing the rest would import transformers again from inside of itself.
if __name__ == "torchao_masquant.kernels":
    from torchao_masquant.kernels import (
        autocast,
        cpu_lowering,
        expert_operators,
        float_reference,
        gpu_lowering,
        library,
        reference,
    )
    from torchao_masquant.kernels.int4_packing import pack_int4, unpack_int4

    __all__ = [
        "autocast",
        "cpu_lowering",
        "expert_operators",
        "float_reference",
        "gpu_lowering",
        "library",
        "pack_int4",
        "reference",
        "unpack_int4",
    ]
