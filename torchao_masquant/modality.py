# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which token ids stand for which modality, read from a model's config."""

from typing import Any, Iterator, Mapping

from torchao_masquant.models.families import TOWER_CONFIGS, family_of

#: The modality of every token that no placeholder id marks.
TEXT = "text"

# What a config calls the placeholder token of each kind of input. transformers
# aliases the older ``*_token_index`` names on most, not on all, config classes.
_PLACEHOLDER_FIELDS: Mapping[str, str] = {
    "image_token_id": "vision",
    "image_token_index": "vision",
    "video_token_id": "vision",
    "video_token_index": "vision",
    "audio_token_id": "audio",
    "audio_token_index": "audio",
}


def _declared(config: Any) -> Iterator[tuple[str, int]]:
    """Modality and placeholder token id, for each field of one config."""
    for field, modality in _PLACEHOLDER_FIELDS.items():
        token = getattr(config, field, None)
        if isinstance(token, int) and token >= 0:
            yield modality, token


def _configs(config: Any) -> Iterator[Any]:
    """``config`` and the sub-configs that hold a whole model's placeholders."""
    yield config
    for name in ("thinker_config", "text_config"):
        nested = getattr(config, name, None)
        if nested is not None and nested is not config:
            yield from _configs(nested)


def modality_token_ids(config: Any) -> dict[str, tuple[int, ...]]:
    """Placeholder token ids of each modality that a config declares.

    Args:
        config: a transformers config (any object with the same attributes); nested
            ``thinker_config`` and ``text_config`` are searched too, and the config of a
            tower whose tokens are not named elsewhere.

    Returns:
        Modality name to its placeholder token ids, in the order text, vision, audio;
        text comes first and has none. A modality that the config does not declare is
        left out.

    Raises:
        ValueError: one token id stands for two modalities; a tower has no token; or
            the model brings images in by other means than tokens (see
            :mod:`torchao_masquant.models.families`).
    """
    refusal = family_of(config).refusal
    if refusal is not None:
        raise ValueError(f"{config.model_type!r} models are not supported: {refusal}")
    found: dict[str, set[int]] = {}
    parts = list(_configs(config))
    for part in parts:
        for modality, token in _declared(part):
            found.setdefault(modality, set()).add(token)
    # A model that has a tower has placeholders for it; some models name them in the tower's
    # config (Phi-4-multimodal does).
    for modality, name in TOWER_CONFIGS.items():
        towers = [t for p in parts if (t := getattr(p, name, None)) is not None]
        if not towers or modality in found:
            continue
        tokens = {t for tower in towers for m, t in _declared(tower) if m == modality}
        if not tokens:
            kind = "image" if modality == "vision" else modality
            raise ValueError(
                f"the config has {name}, but names no placeholder token for it: set "
                f"model.config.{kind}_token_id to the one that the processor puts in."
            )
        found[modality] = tokens
    owners: dict[int, str] = {}
    for modality, tokens in found.items():
        for token in tokens:
            if owners.setdefault(token, modality) != modality:
                raise ValueError(
                    f"the config marks token id {token} as both {owners[token]} and "
                    f"{modality}; give each modality a placeholder token of its own."
                )
    return {
        TEXT: (),
        **{m: tuple(sorted(found[m])) for m in ("vision", "audio") if m in found},
    }
