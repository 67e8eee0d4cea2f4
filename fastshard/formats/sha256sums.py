# SPDX-License-Identifier: Apache-2.0
"""``SHA256SUMS``, which ``sha256sum -c`` reads: a line with digest and name for each file, as GNU's tools write it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final

from .hf_index import open_file
from .safetensors import MAX_HEADER_NBYTES

_LINE: Final = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)", re.DOTALL)
_ESCAPES: Final = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_ESCAPED: Final = re.compile(r"\\(.?)", re.DOTALL)


def format_sums(sums: Mapping[str, str]) -> str:
    """Returns the text for these digests by the files' names, sorted by names."""
    lines = []
    for name, digest in sorted(sums.items()):
        shown = "".join(_ESCAPES.get(character, character) for character in name)
        lines.append(f"{'' if shown == name else chr(92)}{digest}  {shown}\n")
    return "".join(lines)


def read_sums(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the digests in such a file, in lower case, by the names as they stand there.

    Raises ``OSError``, and ``ValueError`` naming the file for anything that GNU's tools do not write.
    """
    with open_file(os.fspath(path)) as file:
        data = file.read(MAX_HEADER_NBYTES + 1)
    try:
        if len(data) > MAX_HEADER_NBYTES:
            raise ValueError(f"it is longer than {MAX_HEADER_NBYTES} bytes")
        return _parsed(os.fsdecode(data))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is not a list of SHA-256 digests: {error}") from None


def _parsed(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"line {number} is {line[:100]!r}")
        name = _ESCAPED.sub(_unescaped, match[3]) if match[1] else match[3]
        if found.setdefault(name, match[2].lower()) != match[2].lower():
            raise ValueError(f"{name!r} has two digests")
    return found


def _unescaped(match: re.Match[str]) -> str:
    for character, escaped in _ESCAPES.items():
        if match[0] == escaped:
            return character
    raise ValueError(f"{match[0]!r} is not a known escape")
