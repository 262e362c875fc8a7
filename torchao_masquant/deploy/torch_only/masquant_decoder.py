# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Runs an exported decoder in a process that has torch alone.

This file lies in the folder that ``export_decoder`` wrote, beside what it runs::

    sys.path.insert(0, folder)
    from masquant_decoder import Decoder

    decoder = Decoder(folder)
    tokens = decoder.generate(input_ids, max_new_tokens=20)
"""

import json
import os
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch._inductor.package import load_package

FORMAT = 1
PACKAGE = "decoder.pt2"
WEIGHTS = "weights.pt"
LIBRARY = "masquant_cpu.so"
FACTS = "decoder.json"


class Decoder:
    """An exported decoder, and the keys and values of the sequences that it works on.

    Args:
        folder: that ``export_decoder`` wrote.
        slots: tokens that a sequence may have, prompt and answer together.

    Attributes:
        facts: what the decoder was made for and with.
        length: tokens so far.
        position: of the next token.

    Raises:
        ValueError: the folder is of another format, or of another torch.
        RuntimeError: the processor cannot run its kernels.
    """

    def __init__(self, folder: Union[str, os.PathLike], slots: int = 1024):
        place = Path(folder)
        self.facts: dict[str, Any] = json.loads((place / FACTS).read_text())
        self._check(place)
        if self.facts["kernels"] == "cpu":
            # No process takes it twice.
            if not hasattr(torch.ops.masquant_cpu, "int_linear"):
                torch.ops.load_library(str(place / LIBRARY))
        # Mapped from the file: processes on one machine share it.
        self._weights = torch.load(
            place / WEIGHTS, mmap=True, weights_only=True, map_location="cpu"
        )
        if self.facts["device"] != "cpu":
            self._weights = {
                name: weight.to(self.facts["device"])
                for name, weight in self._weights.items()
            }
        self._programs = {
            name: self._load(str(place / PACKAGE), name)
            for name in self.facts["programs"]
        }
        dtype = getattr(torch, self.facts["dtype"])
        batch = self.facts["batch"]
        self._keys, self._values = (
            [
                torch.zeros(
                    batch, heads, slots, width, dtype=dtype, device=self.facts["device"]
                )
                for heads, width in self.facts[kind]
            ]
            for kind in ("keys", "values")
        )
        self.slots = slots
        self.reset()

    def _check(self, place: Path) -> None:
        if self.facts["format"] != FORMAT:
            raise ValueError(
                f"{place} has the format {self.facts['format']}, this file reads "
                f"{FORMAT}: use the masquant_decoder.py that lies in that folder."
            )
        if self.facts["torch"] != torch.__version__:
            raise ValueError(
                f"{place} was compiled with torch {self.facts['torch']}, this is "
                f"{torch.__version__}: export it again."
            )
        # Before the library is loaded: that alone runs instructions which others lack.
        engine = self.facts.get("engine", "")
        vnni = torch.cpu._is_avx512_supported() and torch.cpu._is_vnni_supported()
        needs, has = {
            "amx": ("AVX512-VNNI", vnni),
            "vnni": ("AVX512-VNNI", vnni),
            "avx_vnni": ("AVX-VNNI", torch.cpu._is_avx2_supported()),
            "avx2": ("AVX2", torch.cpu._is_avx2_supported()),
        }.get(engine, ("", True))
        if not has:
            raise RuntimeError(
                f"{place} needs a processor with {needs}: export it on one like this, or "
                "with kernels='aten'."
            )

    def _load(self, package: str, name: str) -> Any:
        program = load_package(package, name)
        constants = {fqn: self._weights[fqn] for fqn in program.get_constant_fqns()}
        # Read where they are: there is one copy, for all programs.
        program.load_constants(constants, check_full_update=True, user_managed=True)
        return program

    def reset(self) -> None:
        """Forget the sequences: what comes next is a prompt."""
        self.length = 0
        self.position = 0

    def embed(
        self, input_ids: torch.Tensor, features: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """Embeddings of a prompt.

        Args:
            input_ids: (B, T).
            features: (F, H), what the towers made of images and sounds, in the order
                of the prompt's placeholders; None where there are none.

        Returns:
            (B, T, H).

        Raises:
            ValueError: there is not one feature for each placeholder.
        """
        embeds = self._programs["embed"](input_ids)
        placeholders = self.modality_ids(input_ids) != 0
        count = 0 if features is None else len(features)
        if int(placeholders.sum()) != count:
            raise ValueError(
                f"the prompt has {int(placeholders.sum())} placeholders of images and "
                f"sounds, and there are {count} features."
            )
        if features is not None:
            embeds[placeholders] = features.to(embeds)
        return embeds

    def modality_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) indices into ``facts["modalities"]`` of the tokens of a prompt."""
        ids = torch.zeros_like(input_ids)
        for index, name in enumerate(self.facts["modalities"]):
            for token in self.facts["placeholders"].get(name, ()):
                ids[input_ids == token] = index
        return ids

    def prefill(
        self,
        inputs_embeds: torch.Tensor,
        modality_ids: torch.Tensor,
        position_ids: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Logits (B, 1, V) after a prompt, or a part of one, of two tokens or more.

        Args:
            inputs_embeds: (B, T, H).
            modality_ids: (B, T) int64.
            position_ids: (3, B, T) or (B, T), as the model has it; None for a prompt
                of text: one after the other.
        """
        count = inputs_embeds.shape[1]
        cache_position = self._slots_of(count)
        if position_ids is None:
            position_ids = self._positions(count)
        logits = self._programs["prefill"](
            inputs_embeds,
            modality_ids,
            position_ids,
            cache_position,
            self._keys,
            self._values,
        )
        self.length += count
        self.position = int(position_ids.max()) + 1
        return logits

    def decode(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1, V) after one more token of the base modality, (B, 1).

        Raises:
            ValueError: it is a placeholder of an image or a sound.
        """
        if bool(self.modality_ids(input_ids).any()):
            raise ValueError(
                f"token {input_ids.flatten().tolist()} stands for an image or a sound: "
                "give it to prefill, with its features."
            )
        cache_position = self._slots_of(1)
        logits = self._programs["decode"](
            input_ids, self._positions(1), cache_position, self._keys, self._values
        )
        self.length += 1
        self.position += 1
        return logits

    def generate(
        self,
        input_ids: torch.Tensor,
        features: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        max_new_tokens: int = 32,
    ) -> torch.Tensor:
        """The likeliest next tokens, (B, max_new_tokens), of a new prompt.

        Args:
            input_ids: (B, T), two tokens or more.
            features: see :meth:`embed`.
            position_ids: see :meth:`prefill`.
            max_new_tokens: at least 1.
        """
        self.reset()
        logits = self.prefill(
            self.embed(input_ids, features), self.modality_ids(input_ids), position_ids
        )
        tokens = [logits.argmax(-1)]
        while len(tokens) < max_new_tokens:
            tokens.append(self.decode(tokens[-1]).argmax(-1))
        return torch.cat(tokens, dim=1)

    def _slots_of(self, count: int) -> torch.Tensor:
        if self.length + count > self.slots:
            raise ValueError(
                f"the sequence has {self.length} tokens and is to get {count} more, but "
                f"there are {self.slots} slots: make the Decoder with more."
            )
        return torch.arange(
            self.length, self.length + count, device=self.facts["device"]
        )

    def _positions(self, count: int) -> torch.Tensor:
        shape: tuple[int, ...] = (self.facts["batch"], count)
        if self.facts["position_rows"]:
            shape = (self.facts["position_rows"], *shape)
        positions = torch.arange(
            self.position, self.position + count, device=self.facts["device"]
        )
        return positions.expand(shape).contiguous()
