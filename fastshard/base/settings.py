# SPDX-License-Identifier: Apache-2.0
"""How users write a switch or a size: one rule for the environment, the command line and arguments."""

from __future__ import annotations

import os
import re
from typing import Final, Literal

AUTO_VARIABLE: Final = "FASTSHARD_AUTO"
"""If it is set to yes, every Python runs ``import fastshard.auto`` when it starts; setup.py installs the line
for that."""

ASYNC_VARIABLE: Final = "FASTSHARD_ASYNC"
"""If it is set to yes, ``import fastshard.auto`` calls ``install(asynchronous=True)``."""

MANIFEST_VARIABLE: Final = "FASTSHARD_MANIFEST"
"""If it is set to yes, or to ``sha256``, ``import fastshard.auto`` calls ``install(manifest=...)``."""

INCREMENTAL_VARIABLE: Final = "FASTSHARD_INCREMENTAL"
"""If it is set to yes, ``import fastshard.auto`` calls ``install(incremental=True)``."""

_NO: Final = frozenset(("", "0", "false", "no", "off", "n", "f", "never"))

_UNITS: Final = {
    unit: base**power
    for power, letter in enumerate(("", "K", "M", "G", "T"))
    for unit, base in (((f"{letter}B", 1000), (f"{letter}IB", 1024)) if letter else (("B", 1),))
}


def flag(variable: str, default: bool = False) -> bool:
    """Returns whether an environment variable says yes, or ``default`` if it is not set.

    Everything says yes but an empty text, ``0``, ``false``, ``no``, ``off``, ``n``, ``f`` and ``never``, in
    any case.
    """
    value = os.environ.get(variable)
    return default if value is None else value.strip().lower() not in _NO


def manifest_wanted() -> bool | Literal["sha256"]:
    """Returns what the environment says of manifests."""
    said = os.environ.get(MANIFEST_VARIABLE, "").strip().lower()
    return "sha256" if said == "sha256" else flag(MANIFEST_VARIABLE)


def parse_size(size: int | str) -> int:
    """Returns a size in bytes, from a number or from a text with a unit: ``"5GB"`` (10^9) or ``"5GiB"``
    (2^30), in any case.

    Raises ``ValueError`` for anything else, and for less than one byte.
    """
    found = None if isinstance(size, bool) else re.fullmatch(r"\s*(\d+)(\.\d+)?\s*([a-zA-Z]*)\s*", str(size))
    unit = found and (1 if not found[3] and not found[2] else _UNITS.get(found[3].upper()))
    if not found or not unit:
        raise ValueError(
            f"{size!r} is not a size: it must be a number of bytes, or a number with a unit such as 5GB or 5GiB"
        )
    nbytes = int(found[1]) * unit + int(float(found[2] or 0) * unit)
    if nbytes < 1:
        raise ValueError(f"{size!r} is less than a byte")
    return nbytes
