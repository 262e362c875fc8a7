# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What vLLM says where it does not load: OUTPUT, then FOLDER and OPTIONS of each attempt."""

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM

    output, *attempts = sys.argv[1:]
    said = []
    for folder, options in zip(attempts[::2], attempts[1::2]):
        settings = {"enforce_eager": True, "max_model_len": 64, **json.loads(options)}
        loads_again = settings.pop("loads_again", False)
        try:
            model = LLM(folder, **settings)
            if loads_again:
                model.collective_rpc("reload_weights")
        except Exception as error:
            said.append(str(error))
        else:
            said.append("")
    Path(output).write_text(json.dumps(said))


if __name__ == "__main__":
    main()
