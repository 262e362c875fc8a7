# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Of which families the decoder can be exported, and what keeps the others from it."""

import pytest
import torch
from families import FAMILIES, Family

from torchao_masquant.deploy import decoder as deploy

# Those that a decoder which gets embeddings and positions, and looks back only, is not
# enough for.
REFUSED = {
    "Qwen3-VL": "called with deepstack_visual_embeds",
    "Qwen3-VL-MoE": "called with deepstack_visual_embeds",
    "Qwen3-Omni-MoE thinker": "called with deepstack_visual_embeds",
    "Gemma 3": "looks ahead",
    "PaliGemma": "looks ahead",
    "Gemma 3n": "called with per_layer_inputs",
    "Phi-4-multimodal": "called with audio_embed_sizes",
    "MiniCPM-V 4.6": "has layers of linear_attention",
}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_decoder_called_as_exported(family: Family) -> None:
    """Dense models: nothing is rounded, so the results are equal to the last bits."""
    model, sample = family.model(), family.mixed(1)

    def found() -> tuple[torch.Tensor, torch.Tensor]:
        deploy.check_layers(model)
        call = deploy.observe(model, sample)
        return deploy.call_as_exported(model, call), call.logits

    if family.name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[family.name]):
            found()
        return
    ours, theirs = found()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_refused_are_families() -> None:
    assert set(REFUSED) < {family.name for family in FAMILIES}
