# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""One layer of a quantized cache, as transformers' caches call it."""

import copy
from typing import Any, Callable, Sequence

import torch
from transformers.cache_utils import DynamicLayer

from torchao_masquant.kv_cache.rounded_tokens import RoundedTokens, round_tokens
from torchao_masquant.routing import Router

__all__ = ["QuantizedLayer"]

_ROUNDED = ("keys", "key_scale", "key_low", "values", "value_scale", "value_low", "ids")
_RECENT = ("recent_keys", "recent_values", "recent_ids")

#: So many tokens at least, the last ones, are held as they are; those before them are rounded
#: so many at a time, and once.
WINDOW, AT_ONCE = 32, 32


class QuantizedLayer(DynamicLayer):
    """Keys and values of one decoder layer, rounded once others have come after them.

    What a call adds is attended to as it is, and the last tokens are held so. A key that has
    left their window is held as ``H((k - center) / factor)`` with those of its token's modality, in float32.

    Args:
        center: (M, H, D), of each modality.
        factor: (M, H, D), positive.
        modalities: their names.
        router: of the model whose keys these are, which may know others.
        bits: of a code, 8 or 4.
    """

    is_croppable = True

    def __init__(
        self,
        center: torch.Tensor,
        factor: torch.Tensor,
        modalities: Sequence[str],
        router: Router,
        bits: int,
    ):
        super().__init__()
        self._modalities = tuple(modalities)
        self._center, self._factor = center, factor
        self._router, self._bits = router, bits
        self._widths = (0, 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedLayer":
        # A copy goes on with calls of the same model, if that is not copied with it.
        memo.setdefault(id(self._router), self._router)
        new = copy.copy(self)
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> None:
        """Make room for keys and values such as these."""
        batch, heads, _, width = key_states.shape
        if (heads, width) != self._center.shape[1:]:
            raise ValueError(
                f"the cache was calibrated for {self._center.shape[1]} heads of "
                f"{self._center.shape[2]} channels, and the keys have {heads} of {width}: "
                "it is another model's."
            )
        self.device, self.dtype = key_states.device, key_states.dtype
        self._widths = (width, value_states.shape[-1])
        self._center = self._center.to(self.device)
        self._factor = self._factor.to(self.device)
        # Of the router's ids.
        self._own_ids = torch.tensor(
            [
                self._modalities.index(m) if m in self._modalities else -1
                for m in self._router.modalities
            ],
            device=self.device,
        )
        none = torch.zeros(batch, 1, 0, 1, dtype=torch.uint8, device=self.device)
        empty = (key_states[:, :, :0], value_states[:, :, :0], none)
        self._take({**self._rounded(*empty), **dict(zip(_RECENT, empty))})
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add what a call has, and give all that it attends to.

        Args:
            key_states: (B, H, S, D), with their positions.
            value_states: (B, H, S, D_v).

        Returns:
            Both with those of earlier calls before them, of the same type.

        Raises:
            RuntimeError: the modality of the call's tokens is not known.
            ValueError: these are not the calibrated model's keys, or of a modality that the
                cache was not calibrated for.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        ids = self._ids_of(key_states)
        recent = [
            torch.cat((getattr(self, name), part), -2)
            for name, part in zip(_RECENT, (key_states, value_states, ids))
        ]
        keys, values = recent[:2]
        if self.ids.shape[-2]:
            old_keys, old_values = self._dequantized()
            keys = torch.cat((old_keys, keys), -2)
            values = torch.cat((old_values, values), -2)
        count = recent[0].shape[-2]
        leaving = max(count - WINDOW, 0) // AT_ONCE * AT_ONCE
        if leaving:
            left = self._rounded(*(part[..., :leaving, :] for part in recent))
            self._take(
                {n: torch.cat((getattr(self, n), part), -2) for n, part in left.items()}
            )
            # In memory of their own, which does not hold that of a long call.
            recent = [part[..., leaving:, :].clone() for part in recent]
        self._take(dict(zip(_RECENT, recent)))
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens that are held."""
        if not self.is_initialized:
            return 0
        return int(self.ids.shape[-2] + self.recent_ids.shape[-2])

    def _ids_of(self, keys: torch.Tensor) -> torch.Tensor:
        """(B, 1, S, 1) uint8, which of the cache's modalities each token is of."""
        # (B, S, D) is what a linear of the layer is called with.
        ids = self._router.ids_for("the quantized cache", keys[:, 0])
        if ids is None:
            ids = torch.zeros(keys.shape[0], keys.shape[2], dtype=torch.int64)
        found = self._own_ids[ids.to(keys.device)]
        missing = [m for m in self._router.modalities if m not in self._modalities]
        if missing and (found < 0).any():
            raise ValueError(
                f"the call has tokens of {' or '.join(missing)}, and its cache was "
                f"calibrated for {self._modalities}: calibrate it for every modality that "
                "the model will meet."
            )
        return found.to(torch.uint8)[:, None, :, None]

    def _rounded(
        self, keys: torch.Tensor, values: torch.Tensor, held: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        center, factor = self._of_tokens(held)
        key = round_tokens((keys.float() - center) / factor, self._bits)
        value = round_tokens(values, self._bits)
        return dict(zip(_ROUNDED, (*key, *value, held)))

    def _of_tokens(self, held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H, S, D) centres and factors, of (B, 1, S, 1) ids."""
        ids = held[:, 0, :, 0].long()
        center, factor = self._center[ids], self._factor[ids]
        return center.transpose(1, 2), factor.transpose(1, 2)

    def _dequantized(self) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [getattr(self, name) for name in _ROUNDED]
        center, factor = self._of_tokens(parts[-1])
        keys = RoundedTokens(*parts[:3]).values(self._widths[0]) * factor + center
        values = RoundedTokens(*parts[3:6]).values(self._widths[1])
        return keys.to(self.dtype), values.to(self.dtype)

    def _take(self, parts: dict[str, torch.Tensor]) -> None:
        for name, part in parts.items():
            setattr(self, name, part)

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """All parts have the batch first, and tokens last but one."""
        if self.is_initialized:
            names = (*_ROUNDED, *_RECENT)
            self._take({name: change(getattr(self, name)) for name in names})

    @property
    def nbytes(self) -> int:
        """Bytes that are held of all tokens."""
        if not self.is_initialized:
            return 0
        return sum(getattr(self, name).nbytes for name in (*_ROUNDED, *_RECENT))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget so many of the last tokens, a negative number of them."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes minus the number of tokens to remove, got {tokens_to_remove}."
            )
        if not tokens_to_remove or not self.is_initialized:
            return
        kept = max(self.get_seq_length() + tokens_to_remove, 0)
        held = self.ids.shape[-2]
        for names, left in ((_ROUNDED, kept), (_RECENT, max(kept - held, 0))):
            self._take({n: getattr(self, n)[:, :, :left] for n in names})

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._change(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        self._change(lambda part: part[indices])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take these rows of the batch, of beams."""
        self._change(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def offload(self) -> None:
        """Move all to the CPU."""
        self._change(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move all back to the layer's device."""
        self._change(lambda part: part.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_initialized = False
        self.keys = self.values = None
