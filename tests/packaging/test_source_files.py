# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What holds for every file of the repository."""

import re

from checkout import ROOT, source_files

HEADER = """\
# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""

# Folders of one developer's machine; in a URL such a name follows another.
MACHINE_PATH = re.compile(rb"(?<![\w.~-])/(?:work|tmp|root|home)\b(?!\.)")


def test_every_script_opens_with_the_license_header():
    for file in source_files():
        if not file.endswith((".py", ".sh")):
            continue
        text = (ROOT / file).read_text()
        if text.startswith("#!"):
            text = text.partition("\n")[2]
        assert text.startswith(HEADER), file


def test_no_file_names_a_folder_of_one_machine():
    found = []
    for file in source_files():
        content = (ROOT / file).read_bytes()
        for match in MACHINE_PATH.finditer(content):
            line = content[: match.start()].count(b"\n") + 1
            found.append(f"{file}:{line}: {match.group().decode()}")
    assert not found


def test_every_script_of_ci_is_executable():
    for file in source_files():
        if file.startswith(".ci/") and not file.endswith(".py"):
            assert (ROOT / file).stat().st_mode & 0o100, file
