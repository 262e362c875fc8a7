# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The quantization method "masquant" for vLLM."""

import re
import warnings
from functools import cached_property
from typing import TYPE_CHECKING, Any, Mapping, Optional, Union

import torch
from torch import nn
from transformers.utils import cached_file
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import supports_multimodal
from vllm.model_executor.models.registry import ModelRegistry
from vllm.version import __version__ as vllm_version

from torchao_masquant.integrations.checkpoint_format import CheckpointFormat
from torchao_masquant.integrations.layer_format import LayerFormat
from torchao_masquant.kv_cache import CacheRecipe
from torchao_masquant.modality import modality_token_ids
from torchao_masquant.outputs import CACHE_FILE, QUANT_METHOD
from torchao_masquant.vllm_plugin.cache_method import (
    MASQuantCacheMethod,
    cached_in_fp8,
    check_fits,
)
from torchao_masquant.vllm_plugin.expert_method import MASQuantExpertMethod
from torchao_masquant.vllm_plugin.linear_method import MASQuantLinearMethod
from torchao_masquant.vllm_plugin.token_ids import TokenIds, watch_embedding

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

__all__ = ["MASQuantVllmConfig", "register_config"]

#: Releases whose internals this has been tried with.
_TRIED = ("0.32",)

#: Parts that hold the parts of a model, in an order that is each library's own. A model that
#: drafts tokens for another is below a name of vLLM's.
_HOLDERS = ("draft_model", "thinker", "model", "language_model")

#: What a folder of the thinker alone is of, which vLLM has in whole models only.
_THINKER = "Qwen2_5OmniThinkerForConditionalGeneration"

_LAYER_NUMBER = re.compile(r"\.(?:layers|blocks|h)\.(\d+)\.")

#: What Mixtral calls the mixture of a layer in vLLM and in files, and in transformers.
_VLLM_MIXTURE = (".block_sparse_moe.", ".mlp.")

#: Of whose classes the own loaders have no place for the experts of a layer in one tensor.
_LOADS_EACH_EXPERT = "DeepseekV2ForCausalLM"

#: Modality to vLLM's names of the inputs that become tokens of it.
_KINDS = {"vision": ("image", "video"), "audio": ("audio",)}


def register_config() -> None:
    """Register the method; a warning where vLLM is of a release that was not tried."""
    if not vllm_version.startswith(_TRIED):
        warnings.warn(
            f"torchao_masquant was tried with vLLM {', '.join(_TRIED)}, this is "
            f"{vllm_version}: compare a few answers with those of transformers.",
            stacklevel=2,
        )
    register_quantization_config(QUANT_METHOD)(MASQuantVllmConfig)
    if _THINKER not in ModelRegistry.get_supported_archs():
        own = "torchao_masquant.vllm_plugin.omni_thinker:OmniThinker"
        ModelRegistry.register_model(_THINKER, own)


def without_holders(name: str) -> str:
    """A module's name from the first part on that is more than a holder of others.

    A checkpoint says what its layers are by the names that transformers' model had in
    memory. Those are neither the published names of its files nor vLLM's, and change with
    transformers: a thinker's decoder was ``model``, and is ``model.language_model``. vLLM's
    own mapping, which is for files, leaves them halfway.
    """
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _HOLDERS:
        del parts[0]
    return ".".join(parts)


def _model_class(architectures: list[str]) -> type[nn.Module]:
    """vLLM's class of a model, or of the part of one that is being made."""
    found, _ = ModelRegistry.resolve_model_cls(
        architectures, model_config=get_current_vllm_config().model_config
    )
    return found


class _PlainLinearMethod(UnquantizedLinearMethod):
    """vLLM's own, for a linear that the checkpoint has in high precision.

    Each model has one. So it is noticed, too, where no layer at all has been found to be
    quantized, and vLLM has left out of a file what it found no place for.
    """

    def __init__(self, config: "MASQuantVllmConfig"):
        super().__init__()
        self._config = config

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self._config.check_claimed()
        super().process_weights_after_loading(layer)


class MASQuantVllmConfig(QuantizationConfig):
    """What ``config.json`` says of a quantized checkpoint, as vLLM asks for it.

    Args:
        checkpoint: what it says.
    """

    def __init__(self, checkpoint: CheckpointFormat):
        super().__init__()
        #: of names as vLLM's model has them
        self.layers: dict[str, LayerFormat] = dict(checkpoint.layers)
        self._unclaimed = set(self.layers)
        self._hf_config: Any = None
        self._token_ids: Optional[TokenIds] = None
        self._source: tuple[str, Optional[str]] = ("", None)

    @classmethod
    def get_name(cls) -> str:
        """ "masquant"."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Types of activations that the kernels take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of CUDA devices: that of the int8 instructions that Triton compiles to."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MASQuantVllmConfig":
        """Read a ``quantization_config``.

        Raises:
            ValueError: it is of a format that this version does not read, or damaged, or
                has weights that vLLM can't run.
        """
        checkpoint = CheckpointFormat.from_json(config)
        if checkpoint.torchao:
            raise ValueError(
                f"{len(checkpoint.torchao)} weights of the checkpoint are quantized by "
                f"torchao itself ({next(iter(checkpoint.torchao))}, ...), which is not "
                "served by vLLM: save it without."
            )
        towers = [name for name, of in checkpoint.layers.items() if of.is_of_tower]
        if towers:
            raise ValueError(
                f"{len(towers)} linears of the checkpoint's towers are quantized "
                f"({towers[0]}, ...), and vLLM runs towers in high precision: calibrate "
                "without them."
            )
        return cls(checkpoint)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Take the names that vLLM's model has for the checkpoint's."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)
        self._unclaimed = set(hf_to_vllm_mapper.apply_list(list(self._unclaimed)))

    def get_checkpoint_weight_mapper(self) -> "WeightsMapper":
        """vLLM's own, which it asks for when the model is made and files are to be read.

        Raises:
            ValueError: vLLM's model has no layer for a quantized weight.
        """
        self.check_claimed()
        return QuantizationConfig.get_checkpoint_weight_mapper()

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: Optional[str] = None
    ) -> None:
        """Keep the whole model's config: inside of it, vLLM knows that of a part; and where
        the folder is, or what the hub calls it."""
        self._hf_config = hf_config
        self._source = (model_name, revision)

    def _is_of_this_process(self, name: str) -> bool:
        """Whether a layer of this name belongs to the stage that this process has."""
        config = get_current_vllm_config()
        if config.parallel_config.pipeline_parallel_size == 1:
            return True
        start, end = config.model_config.get_layers_start_end_indices(
            config.parallel_config
        )
        number = _LAYER_NUMBER.search(name)
        return number is not None and start <= int(number[1]) < end

    def get_quant_method(
        self, layer: nn.Module, prefix: str
    ) -> Optional[QuantizeMethodBase]:
        """How a layer of the model is loaded and run; None: vLLM's own way.

        Raises:
            ValueError: vLLM has merged what is quantized with what is not, or can't run
                what the checkpoint has there.
        """
        if isinstance(layer, (Attention, MLAAttention)):
            return self._cache_method(layer, prefix)
        if isinstance(layer, RoutedExperts):
            return self._expert_method(layer, prefix)
        found = self._layers_of(prefix)
        self._unclaimed -= found.keys()
        if not found:
            return _PlainLinearMethod(self) if isinstance(layer, LinearBase) else None
        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            raise ValueError(
                f"{prefix} is quantized in the checkpoint, and vLLM's "
                f"{type(layer).__name__} there is none that this plugin runs: exclude it "
                "when you calibrate."
            )
        if (
            prefix.endswith(".kv_b_proj")
            and get_current_vllm_config().model_config.use_mla
        ):
            raise ValueError(
                f"{prefix} is quantized in the checkpoint, and vLLM multiplies its weight "
                "into other products of latent attention (MLA), where no input is rounded: "
                "set VLLM_MLA_DISABLE=1, or calibrate with exclude='*.kv_b_proj'."
            )
        return MASQuantLinearMethod(self, found, self._ids_for(found))

    def _cache_method(
        self, layer: Union[Attention, MLAAttention], prefix: str
    ) -> Optional[MASQuantCacheMethod]:
        """How a layer's cache is rounded; None: as vLLM does it."""
        if not cached_in_fp8(layer) or self._cache_recipe is None:
            return None
        return MASQuantCacheMethod(self, self._cache_recipe, layer, prefix)

    @cached_property
    def _cache_recipe(self) -> Optional[CacheRecipe]:
        """What the folder knows of the model's keys and values."""
        name, revision = self._source
        found = cached_file(
            name,
            CACHE_FILE,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
        )
        if found is None:
            return None
        recipe = CacheRecipe.load(found)
        check_fits(recipe)
        return recipe

    def _expert_method(
        self, layer: RoutedExperts, prefix: str
    ) -> Optional[MASQuantExpertMethod]:
        """How a layer's experts are loaded and run; None: they are not quantized."""
        prefix = self._saved_prefix(prefix)
        known = {n: f for n, f in self.layers.items() if n.rpartition(".")[0] == prefix}
        if not known:
            return None
        names = [f"{prefix}.gate_up_proj", f"{prefix}.down_proj"]
        if sorted(known) != sorted(names):
            raise ValueError(
                f"vLLM runs experts with {names}, and the checkpoint has "
                f"{sorted(known)} quantized: they are of another architecture, or not "
                "quantized as a whole."
            )
        part = get_current_vllm_config().model_config.hf_config
        model_class = _model_class(part.architectures or self._hf_config.architectures)
        if any(base.__name__ == _LOADS_EACH_EXPERT for base in model_class.__mro__):
            raise ValueError(
                f"{prefix}: vLLM's {model_class.__name__} loads experts one by one, by "
                "code of its own, and quantized ones are one tensor: calibrate with "
                "exclude='*.experts.*'."
            )
        self._unclaimed -= known.keys()
        found = {name: known[name] for name in names}
        return MASQuantExpertMethod(self, layer, found, self._ids_for(found))

    def _saved_prefix(self, prefix: str) -> str:
        """The name in the checkpoint of a module of vLLM's model."""
        own = without_holders(prefix.replace(*_VLLM_MIXTURE))
        first = own.split(".")[0]
        for name in self.layers:
            saved = without_holders(name)
            if saved.split(".")[0] == first:
                return name.removesuffix(saved) + own
        return prefix

    def _layers_of(self, prefix: str) -> dict[str, LayerFormat]:
        """Name of each shard of a layer to what it is; empty: it is not quantized."""
        prefix = self._saved_prefix(prefix)
        if prefix in self.layers:
            return {prefix: self.layers[prefix]}
        parent, _, own = prefix.rpartition(".")
        names = [
            f"{parent}.{shard}" if parent else shard
            for shard in self.packed_modules_mapping.get(own, ())
        ]
        found = {name: self.layers[name] for name in names if name in self.layers}
        if found and len(found) < len(names):
            left = [name for name in names if name not in found]
            raise ValueError(
                f"vLLM runs {names} as one layer, of which {left} are not quantized in "
                "the checkpoint: calibrate with all of them, or exclude all."
            )
        return found

    def _ids_for(self, found: Mapping[str, LayerFormat]) -> Optional[TokenIds]:
        """The ids that a layer's routed weights read; None: it has none."""
        routed = [f.modalities for f in found.values() if f.routed]
        if not routed:
            return None
        if self._token_ids is None:
            self._token_ids = self._watched(routed[0])
        return self._token_ids

    def _watched(self, modalities: tuple[str, ...]) -> TokenIds:
        """Ids that the model fills whenever it embeds the tokens of a step."""
        config = get_current_vllm_config()
        if config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError(
                "with pipeline parallelism only the first stage of vLLM knows what a "
                "token is, and this checkpoint treats modalities differently: use "
                "pipeline_parallel_size=1."
            )
        if config.parallel_config.use_ubatching:
            raise ValueError(
                "where vLLM runs a step in several parts at a time, its layers can't tell "
                "which tokens they have, and this checkpoint treats modalities "
                "differently: leave out --enable-dbo and --ubatch-size."
            )
        if config.parallel_config.prefill_context_parallel_size > 1:
            raise ValueError(
                "with prefill context parallelism a process has other tokens of a step "
                "than its first ones, and this checkpoint treats modalities differently: "
                "use prefill_context_parallel_size=1."
            )
        known = modality_token_ids(self._hf_config)
        foreign = [m for m in modalities if m not in known]
        if foreign:
            raise ValueError(
                f"the checkpoint was quantized for {list(modalities)}, and the model's "
                f"config names no placeholder token of {foreign}: its config.json is "
                "that of another model."
            )
        limits = config.model_config.multimodal_config
        unmet = [m for m in known if m not in modalities]
        served = [
            kind
            for m in unmet
            for kind in _KINDS.get(m, ())
            if limits is not None and limits.get_limit_per_prompt(kind) > 0
        ]
        if served:
            none = ", ".join(f'"{kind}": 0' for kind in served)
            raise ValueError(
                f"the checkpoint was quantized for {list(modalities)}, and not for "
                f"{unmet}: serve it with --limit-mm-per-prompt '{{{none}}}', or calibrate "
                "for all modalities."
            )
        model_class = _model_class(self._hf_config.architectures)
        if not supports_multimodal(model_class):
            raise ValueError(
                f"the checkpoint was quantized for {list(modalities)}, and vLLM's "
                f"{model_class.__name__} takes text alone: serve it as the architecture "
                "that it was saved as."
            )
        watch_embedding(model_class)
        return TokenIds(
            config.scheduler_config.max_num_batched_tokens,
            modalities,
            known,
            torch.get_default_device(),
        )

    def check_claimed(self) -> None:
        """Raise where vLLM's model has no layer for a quantized weight.

        Raises:
            ValueError: names some of them.
        """
        unclaimed = [n for n in self._unclaimed if self._is_of_this_process(n)]
        if unclaimed:
            some = ", ".join(sorted(unclaimed)[:3])
            raise ValueError(
                f"vLLM's model has no place for {len(unclaimed)} quantized weights of the "
                f"checkpoint ({some}): they are of another architecture, or of one whose "
                "layers vLLM names in a way that is not known here."
            )
