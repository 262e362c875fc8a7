# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``python -m torchao_masquant.demo.reload FOLDER``: check a saved model, in JSON."""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from torchao_masquant.demo.checkpoint import LOGITS, answers, load


@torch.no_grad()
def main(folder: Path) -> dict[str, object]:
    """Load a model, run it eagerly and compiled, compare with the saved logits.

    Args:
        folder: that :func:`torchao_masquant.demo.checkpoint.save` wrote.

    Returns:
        ``bit_identical``: whether the eager logits are the saved ones;
        ``compiled_same_answers``: share of the compiled model's answers that are the
        eager one's, 0..1; ``graphs`` and ``graph_breaks`` of the compiled decoder;
        ``compile_seconds``.
    """
    model = load(folder)
    saved = load_file(folder / LOGITS)
    eager = answers(model)
    start = time.perf_counter()
    for layer in model.get_decoder().layers:
        layer.compile(fullgraph=True, dynamic=True)
    same = [
        logits[:, -1].argmax(-1) == eager[task][:, -1].argmax(-1)
        for task, logits in answers(model).items()
    ]
    return {
        "bit_identical": all(torch.equal(eager[task], saved[task]) for task in saved),
        "compiled_same_answers": torch.cat(same).float().mean().item(),
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
