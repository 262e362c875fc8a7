# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How a token's modality reaches the quantized linears of a model.

One :class:`Router` belongs to one model. It is told of every call of the model (see
:mod:`torchao_masquant.routed_modules`): the modality ids are worked out from the call's
``input_ids``, the model's linears read them, and they are taken back when the call ends,
however it ends. Calls inside it, of the model's parts, are of the same tokens. A
``generate()`` that calls a part with embeddings of its prompt says what those are. Other
calls without ``input_ids`` say what their tokens are with :func:`token_modalities`.

The ids are per thread and per call: two threads may run one model at a time, and a
nested call gives the outer one its ids back.
"""

import contextlib
import threading
from typing import Any, Iterator, Mapping, NamedTuple, Optional, Sequence

import torch
from torch._subclasses.fake_tensor import is_fake

from torchao_masquant.modality import TEXT, modality_token_ids
from torchao_masquant.routed_modules import add_router, remove_router, routers_of_calls

__all__ = ["PADDING", "Router", "UnmatchedTokens", "token_modalities"]

# Ids of tokens that belong to no modality of a router.
_UNCALIBRATED = -1
#: Id of padding, where it is told from tokens of the base modality.
PADDING = -2

# Inputs of a forward that are no features of an image or a sound, of a kind that
# features may be of.
_NOT_FEATURES = (
    "attention_mask",
    "inputs_embeds",
    "labels",
    "past_key_values",
    "video_second_per_grid",
)


class UnmatchedTokens(ValueError):
    """A linear is called with other tokens than those of its model's call."""


class _Prompt(NamedTuple):
    """What a ``generate()`` knows of its prompt."""

    #: (batch, sequence)
    shape: torch.Size
    #: of that shape, or None where all tokens are of the base modality
    ids: Optional[torch.Tensor]

    def fits(self, embeds: torch.Tensor) -> bool:
        """Whether (rows, sequence, K) embeddings may be its, each row once or, as for
        beams, several times on end."""
        batch, length = self.shape
        if embeds.dim() != 3 or embeds.shape[1] != length or batch == 0:
            return False
        if embeds.shape[0] == batch:
            return True
        if embeds.shape[0] % batch:
            return False
        rows = embeds.unflatten(0, (batch, -1))
        return _is_traced(embeds) or bool((rows == rows[:, :1]).all())

    def ids_for(self, embeds: torch.Tensor) -> Optional[torch.Tensor]:
        if self.ids is None:
            return None
        return self.ids.repeat_interleave(embeds.shape[0] // self.shape[0], 0)


class _Call:
    """What the call at hand knows of its tokens."""

    # Set here, not in the class: Dynamo's guards tell a first call from a second one
    # by which attributes the instance has.
    def __init__(self) -> None:
        # False: outside of any call, or in one that could not tell.
        self.known: bool = False
        # Whether a token_modalities block told, and not a call's input_ids.
        self.declared: bool = False
        # (batch, sequence), or None where all tokens are of the base modality.
        self.ids: Optional[torch.Tensor] = None
        # How many routed modules are around the one whose call this is; None outside.
        self.depth: Optional[int] = None
        # What the block around the call says, alone in a tuple, where the call's own
        # input_ids come before it.
        self.block: Optional[tuple[Optional[torch.Tensor]]] = None
        # Of the generate() calls that run, from outside to inside.
        self.prompts: tuple[_Prompt, ...] = ()
        # What it was called with, in calibration: a tower's tokens are told by those.
        self.arguments: Mapping[str, Any] = {}

    def tokens(self) -> tuple[Any, ...]:
        """What is known of the tokens, to be given back by :meth:`take`."""
        known = self.known, self.declared, self.ids, self.depth, self.block
        return *known, self.arguments

    def take(self, tokens: tuple[Any, ...]) -> None:
        *known, self.arguments = tokens
        self.known, self.declared, self.ids, self.depth, self.block = known


class _PerThread(threading.local):
    # A plain object in thread-local storage, rather than attributes of the storage:
    # Dynamo replays writes to the former across a graph break, not to the latter.
    def __init__(self) -> None:
        self.call = _Call()


class Router:
    """Modality ids of the tokens of one model's calls.

    Args:
        modalities: names, base first; ids index them.
        token_ids: placeholder token ids of each modality that the model can meet
            (see :func:`torchao_masquant.modality.modality_token_ids`); None where
            ``input_ids`` tell nothing and only :func:`token_modalities` does.
        skip_padding: give padding a negative id, for calibration to leave it out,
            instead of counting it as base.

    Raises:
        ValueError: no modality is named, or one is named twice.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        token_ids: Optional[Mapping[str, Sequence[int]]] = None,
        skip_padding: bool = False,
    ):
        if not modalities or len(set(modalities)) != len(modalities):
            raise ValueError(
                "a Router needs distinct names of modalities, base first, got "
                f"{tuple(modalities)}."
            )
        self.modalities = tuple(modalities)
        self.token_ids = (
            None if token_ids is None else {m: tuple(t) for m, t in token_ids.items()}
        )
        self.skip_padding = skip_padding
        self._per_thread = _PerThread()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model routes its own calls: it takes no call along.
        return {k: v for k, v in self.__dict__.items() if k != "_per_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._per_thread = _PerThread()

    @property
    def call(self) -> _Call:
        """The call that runs on this thread."""
        return self._per_thread.call

    def __repr__(self) -> str:
        source = "token_modalities" if self.token_ids is None else "input_ids"
        return f"Router(modalities={self.modalities}, from {source})"

    @property
    def is_complete(self) -> bool:
        """Whether it knows every modality that its model can meet."""
        return all(m in self.modalities for m in self.token_ids or ())

    @classmethod
    def for_model(
        cls, model: torch.nn.Module, modalities: Optional[Sequence[str]] = None
    ) -> "Router":
        """A router for ``model``, from its config where it has one.

        Args:
            model: the module whose calls carry ``input_ids``.
            modalities: names, base first; None for those that the config declares.

        Raises:
            ValueError: a modality that the config does not declare.
        """
        config = getattr(model, "config", None)
        token_ids = modality_token_ids(config) if config is not None else None
        if token_ids is None:
            return cls(modalities or (TEXT,))
        unknown = [m for m in modalities or () if m not in token_ids]
        if unknown:
            raise ValueError(
                f"{type(model).__name__}'s config declares the modalities "
                f"{tuple(token_ids)}, not {', '.join(unknown)}."
            )
        return cls(modalities or tuple(token_ids), token_ids)

    def attach(self, model: torch.nn.Module) -> None:
        """Route every call of ``model`` that carries ``input_ids``, and every call of
        what lies between it and its decoder. Not twice, where it is attached already."""
        if self.token_ids is not None:
            add_router(model, self)

    def detach(self, model: torch.nn.Module) -> None:
        """Undo :meth:`attach`."""
        remove_router(model, self)

    @contextlib.contextmanager
    def attached(self, model: torch.nn.Module) -> Iterator[None]:
        """Route calls of ``model`` inside; it is as it was afterwards, always."""
        self.attach(model)
        try:
            yield
        finally:
            self.detach(model)

    def is_inside(self, depth: int) -> bool:
        """Whether a call of a module is a part of a call whose tokens are known.

        Args:
            depth: how many routed modules are around that module.
        """
        call = self.call
        return call.depth is not None and call.depth < depth and call.known

    def begin(self, depth: int, arguments: Mapping[str, Any]) -> None:
        """Take note of the tokens of a call that begins.

        Args:
            depth: how many routed modules are around the one that is called.
            arguments: of the call, by name.

        Raises:
            ValueError: a token of a modality that this router was not made for.
        """
        call = self.call
        if self.skip_padding:
            call.arguments = arguments
        input_ids = arguments.get("input_ids")
        embeds = arguments.get("inputs_embeds")
        if input_ids is not None and (depth == 0 or embeds is None):
            call.block = (call.ids,) if call.declared else None
            call.ids = self.ids_of(
                input_ids,
                arguments.get("attention_mask"),
                carries_features=_carries_features(arguments),
            )
            call.known, call.declared = True, False
        else:
            prompt = self._prompt_of(embeds) if call.depth is None else None
            if embeds is not None and prompt is not None:
                call.block = (call.ids,) if call.declared else None
                call.ids = prompt.ids_for(embeds)
                call.known, call.declared = True, False
            elif not call.declared:
                # Nothing tells; the ids of a call around this one are not its own. (A
                # token_modalities block around it is meant for it, and stays in force.)
                call.known, call.ids = False, None
        call.depth = depth

    def expect(self, arguments: Mapping[str, Any]) -> None:
        """Take note of the prompt of a ``generate()`` that begins.

        It is for calls with embeddings of the whole prompt: others tell by their
        ``input_ids``, or not at all.

        Args:
            arguments: of ``generate()``, by name.
        """
        call = self.call
        input_ids = arguments.get("input_ids")
        if input_ids is None:
            input_ids = arguments.get("inputs")
        if (
            isinstance(input_ids, torch.Tensor)
            and input_ids.dim() == 2
            and not input_ids.is_floating_point()
        ):
            ids = self.ids_of(input_ids, arguments.get("attention_mask"))
            call.prompts = (*call.prompts, _Prompt(input_ids.shape, ids))
        elif call.declared and call.ids is not None and call.ids.dim() == 2:
            call.prompts = (*call.prompts, _Prompt(call.ids.shape, call.ids))

    def _prompt_of(self, embeds: Any) -> Optional[_Prompt]:
        # The outermost generate() knows its tokens; an inner one may be given others
        # in their place, such as padding for images.
        prompts = self.call.prompts
        return next((p for p in prompts if embeds is not None and p.fits(embeds)), None)

    def ids_of(
        self,
        input_ids: torch.Tensor,
        attention_mask: Any = None,
        carries_features: bool = True,
    ) -> Optional[torch.Tensor]:
        """Modality ids of the tokens of one call.

        Args:
            input_ids: (batch, sequence) token ids.
            attention_mask: (batch, sequence), zero where a token is padding, which
                counts as base; another shape, or one mask for each kind of layer in a
                dict, as ``generate()`` makes them, is not looked at.
            carries_features: whether the call brings images or sounds along. Looked
                at under ``torch.compile`` only, where the graph can't depend on the
                values of ``input_ids``: without features it is base-only, and asserts
                at run time that no placeholder token is there.

        Returns:
            (batch, sequence) int64 that indexes ``modalities``, or None where every
            token is of the base modality.

        Raises:
            ValueError: a token of a modality that this router was not made for.
        """
        assert self.token_ids is not None
        default = self._index(TEXT)
        ids = torch.full_like(input_ids, default, dtype=torch.int64)
        for modality, tokens in self.token_ids.items():
            for token in tokens:
                ids = ids.masked_fill(input_ids == token, self._index(modality))
        if (
            isinstance(attention_mask, torch.Tensor)
            and attention_mask.shape == input_ids.shape
        ):
            ids = ids.masked_fill(
                attention_mask == 0, PADDING if self.skip_padding else 0
            )
        if _is_traced(ids):
            return self._ids_compiled(ids, default, carries_features)
        if ids.numel() == 0:
            return None
        uncalibrated, routed = torch.stack(
            ((ids == _UNCALIBRATED).any(), (ids != 0).any())
        ).tolist()
        if uncalibrated:
            raise ValueError(self._uncalibrated())
        return ids if routed else None

    def _index(self, modality: str) -> int:
        if modality in self.modalities:
            return self.modalities.index(modality)
        return _UNCALIBRATED

    def _uncalibrated(self) -> str:
        assert self.token_ids is not None
        missing = [m for m in self.token_ids if m not in self.modalities]
        return (
            f"the call has {' or '.join(missing)} tokens, but the model was quantized, "
            f"or is calibrated, for the modalities {self.modalities} only: calibrate for "
            "every modality that it will meet, with samples of each."
        )

    def _ids_compiled(
        self, ids: torch.Tensor, default: int, carries_features: bool
    ) -> Optional[torch.Tensor]:
        if default == 0 and not carries_features:
            torch._assert_async(
                (ids == 0).all(),
                "a compiled call has placeholder tokens of an image or a sound, but "
                "no features of one",
            )
            return None
        if not self.is_complete:
            torch._assert_async((ids != _UNCALIBRATED).all(), self._uncalibrated())
        return ids

    def ids_for(self, name: str, x: torch.Tensor) -> Optional[torch.Tensor]:
        """Modality ids of the tokens that a linear of the model is called with.

        Args:
            name: of the linear, for the messages.
            x: (batch, sequence, K), or (batch * sequence, K).

        Returns:
            ``x.shape[:-1]`` int64 on ``x``'s device, or None: all base.

        Raises:
            RuntimeError: the call's tokens are of unknown modality.
            UnmatchedTokens: the ids are not those of ``x``'s tokens.
        """
        call = self.call
        # One modality needs no ids, but in calibration they tell padding.
        if len(self.modalities) == 1 and not (self.skip_padding and call.known):
            return None
        if not call.known:
            raise RuntimeError(
                f"{name}: the modality of its tokens is not known, since the call did "
                "not go through the model with input_ids; wrap it in "
                "torchao_masquant.token_modalities(model, ids)."
            )
        ids = call.ids
        if ids is None:
            return None
        fitting = _fitting(ids, x)
        if fitting is None and call.block is not None:
            # The input_ids are not the tokens, so the block around the call counts.
            if call.block[0] is None:
                return None
            fitting = _fitting(call.block[0], x)
        if fitting is None:
            raise UnmatchedTokens(
                f"{name}: input of shape {tuple(x.shape)} does not match the "
                f"modality ids of the call, of shape {tuple(ids.shape)}."
            )
        return fitting.to(x.device)

    @contextlib.contextmanager
    def explicit(self, ids: Optional[torch.Tensor]) -> Iterator[None]:
        """Declare the modality ids of the calls inside; see :func:`token_modalities`."""
        if ids is not None:
            ids = self._checked(ids)
        call = self.call
        saved = call.tokens()
        call.known, call.declared, call.ids = True, True, ids
        try:
            yield
        finally:
            call.take(saved)

    @contextlib.contextmanager
    def repeated(self, known: bool, ids: Optional[torch.Tensor]) -> Iterator[None]:
        """Of a call that was made before, for the linears that run again inside.

        Args:
            known: whether the modalities of its tokens are known.
            ids: they, negative for padding; None: all base.
        """
        with self.explicit(None):
            self.call.known, self.call.ids = known, ids
            yield

    def _checked(self, ids: torch.Tensor) -> Optional[torch.Tensor]:
        if not isinstance(ids, torch.Tensor):
            raise TypeError(
                f"modality ids are integers that index {self.modalities}, in a tensor, "
                f"got a {type(ids).__name__}."
            )
        if (
            ids.dtype.is_floating_point
            or ids.dtype.is_complex
            or ids.dtype == torch.bool
        ):
            raise TypeError(
                f"modality ids are integers that index {self.modalities}, got "
                f"{ids.dtype}."
            )
        if _is_traced(ids) or ids.is_meta:
            return ids
        if ids.numel() == 0:
            return None
        least, most = torch.stack(torch.aminmax(ids)).tolist()
        if least < 0 or most >= len(self.modalities):
            raise ValueError(
                f"modality ids index {self.modalities}, so they lie in "
                f"0..{len(self.modalities) - 1}, got {least}..{most}."
            )
        return None if most == 0 else ids.to(torch.int64)


def _fitting(ids: torch.Tensor, x: torch.Tensor) -> Optional[torch.Tensor]:
    """``ids`` in the shape of ``x``'s tokens; None where they are not theirs."""
    if ids.shape == x.shape[:-1]:
        return ids
    if x.dim() == 2 and ids.numel() == x.shape[0]:
        return ids.reshape(-1)
    return None


def _is_traced(tensor: torch.Tensor) -> bool:
    """Whether a graph is being made of what happens to ``tensor``.

    Not ``torch.compiler.is_compiling()``: that is true on every thread while one of
    them compiles, in eager calls too.
    """
    return torch.compiler.is_dynamo_compiling() or is_fake(tensor)


def _carries_features(arguments: Mapping[str, Any]) -> bool:
    """Whether a call's arguments hold features of an image or a sound."""
    return any(
        name not in _NOT_FEATURES
        and (
            (isinstance(value, torch.Tensor) and value.is_floating_point())
            or (isinstance(value, (list, tuple)) and len(value) > 0)
            # What the towers made of them, by kind: generate() runs them beforehand.
            or (
                isinstance(value, Mapping)
                and any(part is not None for part in value.values())
            )
        )
        for name, value in arguments.items()
    )


def router_of(module: torch.nn.Module) -> Optional[Router]:
    """The router that the linears of ``module`` (or itself) read, if they read one."""
    for child in module.modules():
        router = getattr(child, "router", None)
        if isinstance(router, Router):
            return router
    return None


@contextlib.contextmanager
def token_modalities(
    model: torch.nn.Module, ids: Optional[torch.Tensor]
) -> Iterator[None]:
    """Say of which modality the tokens are, where ``input_ids`` do not.

    For calls with ``inputs_embeds``, for custom loops over parts of a model, and for
    one quantized linear by itself::

        with token_modalities(model, ids):
            model(inputs_embeds=embeds)

    A call inside that does carry ``input_ids``, and whose model's config says which
    of them are placeholders, is routed by those, as always: so the decode steps of a
    ``generate(inputs_embeds=...)`` are right too.

    Args:
        model: a model with quantized or observed linears, a part of one, or one such
            linear; or one that a quantized cache was made for.
        ids: (batch, sequence) integers that index ``recipe.modalities``, base first;
            for one linear, the shape of its input without the last dimension. None:
            every token is of the base modality.

    Raises:
        ValueError: ``model`` has neither a quantized linear nor such a cache, or an id
            is out of range.
        TypeError: ids are no integers.
    """
    router = router_of(model) or next(iter(routers_of_calls(model)), None)
    if router is None:
        raise ValueError(
            f"{type(model).__name__} has no quantized linear to tell its tokens' "
            "modalities: quantize it with masquant_config(recipe) first."
        )
    with router.explicit(ids):
        yield
