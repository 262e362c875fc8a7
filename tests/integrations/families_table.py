# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""docs/families.md, made of what ``test_families.py`` holds the models to.

``python tests/integrations/families_table.py`` writes it.
"""

import os
import sys
from pathlib import Path
from typing import Any, Iterator

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from families import FAMILIES, REFUSED, Family  # noqa: E402

_HEAD = """\
# Families of models

What is tested with tiny random models of the real `transformers` classes, by
`tests/integrations/test_families.py`; `python tests/integrations/families_table.py`
makes this page of what is held there. Each model is calibrated, quantized to w4a8 and
w8a8, and called with a mixed, a text and a padded prompt.

Other families work without an entry here where the config names the placeholder tokens
and the decoder can be found: `get_decoder()` gives it, or it is the list of blocks beside
the token embeddings, as in remote code (`torchao_masquant/models/parts.py`); where it cannot
be told, `include=` names its linears. A whole Qwen2.5-Omni or Qwen3-Omni-MoE is calibrated
through its thinker; talker and vocoder stay as they are. What differs otherwise is in
`torchao_masquant/models/families.py`.

- **routed from**: the fields of the config whose tokens tell the modality. Everything
  else is text; a model without such a field has one modality and no pairs.
- **linears**: of a decoder layer, quantized unless `include=` and `exclude=` say
  otherwise. `lm_head` is left alone, and so are the towers unless `towers=` or `include=` asks
  for them ([method.md](method.md#towers)), and, with a warning, linears
  that would be no smaller quantized (gates of a few rows). "Experts" are the 3-D parameters of
  a mixture's experts, of any layout that transformers' `use_experts_implementation`
  marks; those of other layouts stay in high precision, with a warning.
- **compiled**: the largest part that compiles with `fullgraph=True`: Dynamo makes one
  graph for calls of text alone and one for mixed ones. Where decoders are of one class,
  as Llama's and Voxtral's are, one family of it is compiled; a layer of Qwen3-VL-MoE and
  of Phi-4-multimodal is run by Inductor, too.

Gemma 3n's image tower needs `timm`; in the tests a convolution takes its place. GLM-4V is
called with images alone: it marks a video's tokens with the image token.

| family | class | modalities | routed from | linears | eager | compiled | generate |
|---|---|---|---|---|---|---|---|
"""

_REFUSED = """
Refused, with a sentence that says why, since no token of a call is an image's:
"""


def _fields(family: Family, config: Any) -> Iterator[str]:
    """The fields of a config that hold the family's placeholder tokens."""
    tokens = {t for of_modality in family.modalities.values() for t in of_modality}
    for name, value in config.to_dict().items():
        if isinstance(value, dict) and name in ("vision_config", "audio_config"):
            part = getattr(config, name).to_dict()
            yield from (f"{name}.{n}" for n, v in part.items() if _names(n, v, tokens))
        elif _names(name, value, tokens):
            yield name


def _names(name: str, value: Any, tokens: set[int]) -> bool:
    return name.endswith(("token_id", "token_index")) and value in tokens


def _linears(family: Family) -> str:
    names = [n for layer in family.layers for n in layer]
    names += [n.removeprefix(f"{family.decoder}.") for n in family.more_linears]
    # The numbers of a list are alike, and a part's name says enough.
    short = [
        n.rsplit(".", 1)[0] if n[-1].isdigit() else n.split(".")[-1] for n in names
    ]
    shown = ", ".join(dict.fromkeys(n.removesuffix("_proj") for n in short))
    return f"{shown}, experts" if family.has_experts else shown


def _row(family: Family) -> str:
    model = family.build()
    cells = (
        family.name,
        f"`{type(model).__name__}`",
        ", ".join(family.modalities),
        ", ".join(f"`{f}`" for f in sorted(_fields(family, model.config))),
        _linears(family),
        "yes",
        family.compiles,
        "yes",
    )
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """The whole page. The tests fail for a model that is not what its row says."""
    rows = "\n".join(_row(family) for family in FAMILIES)
    refused = "".join(f"- `{config.__name__}`\n" for config in REFUSED)
    return f"{_HEAD}{rows}\n{_REFUSED}\n{refused}"


if __name__ == "__main__":
    fresh = PAGE.with_suffix(".md.new")
    fresh.write_text(page())
    os.replace(fresh, PAGE)
