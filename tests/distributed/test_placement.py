# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Models whose parts lie on several devices: modality ids follow the tokens."""

from typing import Any, Optional

import tiny_models
import torch
import torch.distributed as dist

from torchao_masquant import MASQuantLinear, token_modalities


def test_ids_follow_the_layers_devices():
    """As accelerate places a model: layers move what they are called with.

    The second device is "meta", the only other one that every machine has.
    """
    model = tiny_models.quantized(tiny_models.qwen25_vl())
    layer = model.get_decoder().layers[1]
    layer.to("meta")
    linears = [m for m in layer.modules() if isinstance(m, MASQuantLinear)]
    assert all(m.weight.device.type == "meta" for m in linears)

    def move(module: Any, args: Any, kwargs: Any) -> Any:
        return torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t.to("meta"), (args, kwargs)
        )

    layer.register_forward_pre_hook(move, with_kwargs=True)
    model.get_decoder().norm.to("meta")
    model.lm_head.to("meta")
    router = tiny_models.router(model)
    devices: list[tuple[str, str]] = []
    ids_for = router.ids_for

    def recorded(name: str, x: torch.Tensor) -> Optional[torch.Tensor]:
        ids = ids_for(name, x)
        assert ids is not None and ids.device == x.device
        devices.append((name.split(".")[3], ids.device.type))
        return ids

    router.ids_for = recorded
    with torch.no_grad():
        logits = model(**tiny_models.samples(audio=False)[0], use_cache=False).logits
    assert logits.device.type == "meta"
    assert devices == [("0", "cpu")] * 7 + [("1", "meta")] * 7


def check_pipeline(rank: int) -> list[list[float]]:
    """A stage is given its input, and with it the ids of its tokens."""
    model = tiny_models.quantized(tiny_models.PlainModel())
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 1, 2, 0, 0], [2, 2, 0, 1, 1]])
    with torch.no_grad(), token_modalities(model, ids):
        whole = model(x)
    if rank == 0:
        with torch.no_grad(), token_modalities(model.first, ids):
            hidden = torch.tanh(model.first(x))
        dist.send(hidden, 1)
        dist.send(ids, 1)
        result = torch.empty(2, 5, 12)
        dist.recv(result, 1)
    else:
        hidden, received = torch.empty(2, 5, 24), torch.empty_like(ids)
        dist.recv(hidden, 0)
        dist.recv(received, 0)
        with torch.no_grad(), token_modalities(model.second, received):
            result = model.second(hidden)
        dist.send(result, 0)
    torch.testing.assert_close(result, whole, rtol=0, atol=0)
    return result.flatten(1).tolist()


def test_pipeline_stages(ranks):
    first, second = ranks.run(check_pipeline)
    assert first == second
