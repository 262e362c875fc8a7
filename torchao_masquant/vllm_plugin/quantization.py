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
from torchao_masquant.vllm_plugin.model_loading import watch_loading
from torchao_masquant.vllm_plugin.names import own_name, renamed
from torchao_masquant.vllm_plugin.token_ids import TokenIds, watch_embedding

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

__all__ = ["MASQuantVllmConfig", "register_config"]

#: Releases whose internals this has been tried with.
_TRIED = ("0.32",)

#: What a folder of the thinker alone is of, which vLLM has in whole models only.
_THINKER = "Qwen2_5OmniThinkerForConditionalGeneration"

_LAYER_NUMBER = re.compile(r"\.(?:layers|blocks|h)\.(\d+)\.")

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
        self.config = config

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.config.check_claimed()
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
        #: each of those names to that in the checkpoint
        self._saved = {name: name for name in self.layers}
        #: and from what both libraries call it
        self._named = {own_name(name): name for name in self.layers}
        self._unclaimed = set(self.layers)
        self._hf_config: Any = None
        self._token_ids: Optional[TokenIds] = None
        self._source: tuple[str, Optional[str]] = ("", None)
        self._is_watched = False

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
        mapped = {
            name: renamed(hf_to_vllm_mapper, name, of_experts=len(known.shape) == 3)
            for name, known in self.layers.items()
        }
        self.layers = {mapped[name]: known for name, known in self.layers.items()}
        self._saved = {mapped[name]: saved for name, saved in self._saved.items()}
        self._named = {own_name(name): name for name in self.layers}
        self._unclaimed = {mapped[name] for name in self._unclaimed}

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
        self._watch_loading()
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

    def _watch_loading(self) -> None:
        """Let the model hand its quantized experts over once its files are read."""
        if not self._is_watched and self._hf_config is not None:
            self._is_watched = True
            watch_loading(_model_class(self._hf_config.architectures))

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
        known = {
            own.rpartition(".")[2]: name
            for own, name in self._named.items()
            if own.rpartition(".")[0] == own_name(prefix)
        }
        if not known:
            return None
        expected = ["gate_up_proj", "down_proj"]
        if sorted(known) != sorted(expected):
            raise ValueError(
                f"{prefix}: vLLM runs experts with {expected}, and the checkpoint has "
                f"{sorted(known)} quantized: they are of another architecture, or not "
                "quantized as a whole."
            )
        names = [known[projection] for projection in expected]
        self._unclaimed -= set(names)
        found = {name: self.layers[name] for name in names}
        # Files have the published name, which may be that of either library.
        modules = [
            name.rpartition(".")[0] for name in (names[0], self._saved[names[0]])
        ]
        prefixes = frozenset(map(own_name, (prefix, *modules)))
        return MASQuantExpertMethod(self, layer, found, prefixes, self._ids_for(found))

    def _layers_of(self, prefix: str) -> dict[str, LayerFormat]:
        """Name of each shard of a layer to what it is; empty: it is not quantized."""
        if (whole := self._named.get(own_name(prefix))) is not None:
            return {whole: self.layers[whole]}
        parent, _, own = prefix.rpartition(".")
        shards = [
            f"{parent}.{shard}" if parent else shard
            for shard in self.packed_modules_mapping.get(own, ())
        ]
        names = [self._named.get(own_name(shard)) for shard in shards]
        found = {name: self.layers[name] for name in names if name is not None}
        if found and len(found) < len(names):
            left = [shard for shard, name in zip(shards, names) if name is None]
            raise ValueError(
                f"vLLM runs {shards} as one layer, of which {left} are not quantized in "
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
                f"checkpoint ({some}): they are of another architecture, of one whose "
                "layers vLLM names in a way that is not known here, or such that vLLM runs "
                "in high precision alone: calibrate without them (exclude)."
            )
