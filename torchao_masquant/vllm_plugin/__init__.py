# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""vLLM serves quantized folders as they are: ``vllm serve FOLDER``.

vLLM runs :func:`register` in each of its processes (entry point
``vllm.general_plugins``). It needs no change of vLLM and none of its arguments: the folder's
``config.json`` names the method.
"""

__all__ = ["register"]


def register() -> None:
    """Let vLLM know the quantization method "masquant"; may be called again."""
    from torchao_masquant.vllm_plugin.quantization import register_config

    register_config()
