# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The ``masquant::`` operators on a CPU: C++ kernels where there are some for it.

They are compiled at the first call, or ahead of it by :func:`prepare`, and found again
in the user's cache by every later process. Where there is no compiler, one warning says
so and the reference runs. :func:`report` and :func:`kernel_of` tell what runs.

What the kernels do, for T tokens, K channels and N output channels, on a processor with
AVX512-VNNI:

- the prologue smooths, finds the absmax and rounds in one pass over each token;
- weights stay as they are stored, row by row, packed or not: there is no second copy.
  Up to 4 tokens (2 by groups) read them as they are, so a call costs the bytes of the
  weight; more tokens share panels of 64 output channels by 128 input channels, unpacked
  into a scratch block that a core's first-level cache holds, so that one vector has the
  sums of 16 output channels, and one their scales of a group. What the next panels are
  made of is asked for meanwhile. More than 48 tokens unpack the panels of all input
  channels first, which the second-level cache holds;
- more than a few tokens (4 of int8 weights, 7 of packed ones) meet them by AMX, where there
  is AMX. Its left operand are weights, whose rows need no transposition: up to 32 tokens
  read int8 as it is stored, others, and packed weights, unpacked into a scratch block.
  Integers are signed there, and exact as everywhere;
- signed integers meet vpdpbusd, which wants unsigned ones, with 128 (packed: 8) added to
  the weights, and the sum of the token's integers times that taken off after. It adds
  up in 32 bits without saturating (the older vpmaddubsw saturates in 16);
- tokens of 16 bits that are not quantized become integers for packed weights, 16 bits of
  each 128 channels, in planes of 8 bits that are multiplied one by one, so that nothing
  is lost that the tokens' type can tell; so do up to 16 of float32, of 24 bits;
- others meet weights unpacked to float32. Where the processor multiplies bfloat16 faster,
  by AVX512-BF16 or AMX, more than 16 tokens of it meet them in it, and the smoothed
  activations rounded to it, as a bfloat16 linear's are;
- scales, up-projection and biases are applied to a tile before it is stored;
- tokens are sorted by modality, so base tokens do no low-rank work.

Lesser processors (AVX2, AVX-VNNI, NEON with dot products) have portable kernels of the same
methods, in the compiler's vectors:

- AVX2 adds two products of weights of 4 bits up in 16 bits, eight times before they are
  widened, which holds them; weights of 8 bits and their tokens are widened before they
  are multiplied. No product is more than the sum of such products;
- pairs of int8 are multiplied as float32;
- nothing is multiplied as bfloat16.
"""

import threading
import warnings
from types import SimpleNamespace
from typing import Any, Optional

import torch

from torchao_masquant.kernels import expert_operators, reference
from torchao_masquant.kernels.cpu_build import (
    BuildError,
    build_library,
    is_built,
    library_path,
)
from torchao_masquant.kernels.cpu_engine import (
    CpuEngine,
    EngineChoice,
    choose_engine,
    multiplies_bfloat16,
)
from torchao_masquant.kernels.library import _LIB, LOWERED_ON_CPU

__all__ = ["engine", "kernel_of", "prepare", "register", "report"]


#: the operators in plain PyTorch
_REFERENCE = SimpleNamespace(**{**vars(reference), **vars(expert_operators)})


class _State:
    """What this process runs; the choice is made once, at import."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.choice: EngineChoice = choose_engine()
        #: None until the first call, or :func:`prepare`, has to know
        self.operators: Optional[Any] = None
        if self.choice.engine is CpuEngine.REFERENCE:
            self.operators = _REFERENCE


_state = _State()


def _load(path: Any) -> Any:
    # An exported package may have brought it along, and no process takes it twice.
    if not hasattr(torch.ops.masquant_cpu, "int_linear"):
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            remedy = f"Delete {path}, so that it is built again"
            raise BuildError(str(error), remedy) from error
    _check_schemas()
    torch.ops.masquant_cpu.use_tiles(_state.choice.engine is CpuEngine.AMX)
    torch.ops.masquant_cpu.use_bfloat16(multiplies_bfloat16())
    return torch.ops.masquant_cpu


def _schema(library: Any, name: str) -> str:
    """What an operator takes and gives; nothing of one that the library lacks."""
    if not hasattr(library, name):
        return ""
    return str(getattr(library, name).default._schema).partition("::")[2]


def _check_schemas() -> None:
    """Raise OSError where a package has brought kernels of other operators than ours."""
    for name in LOWERED_ON_CPU:
        if _schema(torch.ops.masquant_cpu, name) != _schema(torch.ops.masquant, name):
            raise OSError(
                "a package that was exported by another version of torchao_masquant has "
                f"brought its own kernels into this process, and their {name} is not "
                "this version's: export it again, or load it in a process of its own"
            )


def _operators() -> Any:
    """The kernels, compiled if need be; the reference where that cannot be."""
    if _state.operators is None:
        with _state.lock:
            if _state.operators is None:
                try:
                    _state.operators = _load(build_library(_state.choice.engine))
                except (BuildError, OSError) as error:
                    _fall_back(error)
    return _state.operators


def _fall_back(error: Exception) -> None:
    summary, remedy = str(error), "Set"
    if isinstance(error, BuildError):
        summary, remedy = error.reason, f"{error.remedy}, or set"
    _state.choice = EngineChoice(CpuEngine.REFERENCE, summary)
    _state.operators = _REFERENCE
    warnings.warn(
        "masquant's kernels for this CPU cannot be built, so the plain and slower "
        f"PyTorch path runs: {summary}. {remedy} "
        "MASQUANT_CPU_ENGINE=reference to choose that path.",
        stacklevel=3,
    )


def prepare() -> EngineChoice:
    """Compile and load the kernels now, in place of at the first call.

    Returns:
        What runs in this process, and why.
    """
    _operators()
    return _state.choice


def engine() -> EngineChoice:
    """What runs in this process, or will if it can be compiled, and why."""
    return _state.choice


def kernel_of(
    *,
    weight_bits: int,
    act_bits: int,
    tokens: int,
    in_features: int,
    groups: int = 1,
) -> str:
    """The product's kernel of a call, in words.

    Args:
        weight_bits: 8, 4 or 3.
        act_bits: 2 to 8, or 16: activations are not quantized.
        tokens: T.
        in_features: K.
        groups: scales of an output channel.
    """
    if prepare().engine is CpuEngine.REFERENCE:
        return (
            "reference: dequantize, matmul" if act_bits == 16 else "reference: _int_mm"
        )
    return torch.ops.masquant_cpu.kernel_of(
        weight_bits, act_bits, tokens, in_features, groups
    )


def report() -> dict[str, str]:
    """What runs on this CPU, for people to read."""
    choice = prepare()
    lines = {
        "engine": choice.engine.value,
        "reason": choice.reason,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }
    if choice.engine is not CpuEngine.REFERENCE:
        lines["library"] = str(library_path(choice.engine))
    return lines


def _trampoline(name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(_operators(), name)(*args, **kwargs)

    return call


def register() -> None:
    """Give the operators their kernels for the CPU.

    A library that is there is loaded, and its C++ functions are the dispatcher's from
    then on. Else Python functions stand in for this process, which compile at their
    first call.
    """
    if _state.choice.engine is CpuEngine.REFERENCE:
        return
    path = library_path(_state.choice.engine)
    if is_built(path):
        try:
            _state.operators = _load(path)
        except (BuildError, OSError) as error:
            _fall_back(error)
            return
        torch.ops.masquant_cpu.install()
        return
    for name in LOWERED_ON_CPU:
        _LIB.impl(name, _trampoline(name), "CPU")


register()
