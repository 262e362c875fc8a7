# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a module is called by transformers, in files and by vLLM."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

__all__ = ["own_name", "renamed"]

#: Parts that hold the parts of a model, in an order that is each library's own. A model that
#: drafts tokens for another is below a name of vLLM's.
_HOLDERS = ("draft_model", "thinker", "model", "language_model")


#: What models after Mixtral call the mixture of a layer, in files or in one of the libraries.
_MIXTURE = (".block_sparse_moe.", ".mlp.")


def own_name(name: str) -> str:
    """A module's name from the first part on that is more than a holder of others, with one
    name for the mixture of a layer.

    A checkpoint says what its layers are by the names that transformers' model had in
    memory. Those are neither the published names of its files nor vLLM's, and change with
    transformers: a thinker's decoder was ``model``, and is ``model.language_model``. vLLM's
    own mapping, which is for files, leaves them halfway.
    """
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _HOLDERS:
        del parts[0]
    return ".".join(parts).replace(*_MIXTURE)


def renamed(mapper: "WeightsMapper", name: str, *, of_experts: bool) -> str:
    """A quantized weight's name, where vLLM has another for it.

    Args:
        mapper: of a class of vLLM's.
        name: of a linear, or of a projection of experts.
        of_experts: of these the module's name is mapped: what vLLM calls the projections
            is for tensors that it loads.
    """
    if not of_experts:
        return next(iter(mapper.apply_list([name])), name)
    module, _, own = name.rpartition(".")
    return next(iter(mapper.apply_list([f"{module}."])), f"{module}.") + own
