# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The tutorial's commands, with a server: it sees, hears and adds."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from serving_bench.vllm_server import Server

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "tutorials" / "ask_a_vllm_server.md"
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_it_answers_as_the_page_says(tmp_path, monkeypatch):
    text = PAGE.read_text()
    blocks = BLOCK.findall(text)
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "tutorial"}
    for language, source in blocks:
        if language == "python":
            exec(compile(source, str(PAGE), "exec"), scope)
    commands = [source for language, source in blocks if language == "console"]
    serve = next(c for c in commands if c.startswith("vllm serve")).split()
    options = serve[3 : serve.index("--port")]
    with Server(serve[2], tmp_path / "log", *options) as server:
        said = []
        for command in commands:
            if command.startswith("curl"):
                command = command.replace("http://localhost:8000", server.address)
                reply = subprocess.check_output(["bash", "-c", command])
                said.append(json.loads(reply)["choices"][0]["message"]["content"])
    assert said == re.findall(r"is `( \d)`", text)
