# SPDX-License-Identifier: Apache-2.0
"""The names of hidden folders and of what is in them, and what a path into one means to a user.

A hidden folder is called ``.fastshard-<16 hex digits>.staging``. The digits follow from the user and from the
purpose of the folder, so the next save through the same path finds what a killed one has left.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
from typing import Final

PREFIX: Final = ".fastshard-"
"""The names of everything hidden begin with this, also those of the engine's temporary files."""
STAGING: Final = re.compile(rf"{re.escape(PREFIX)}[0-9a-f]{{16}}\.staging")
"""Matches the name of a hidden folder."""
NEW: Final = ".new"
OLD: Final = ".old"
NOW: Final = ".now"
_OF_RANKS: Final = re.compile(r"/\.ranks-[0-9a-f]{16}(?=/|$|\W)")
_STAGED: Final = re.compile(rf"/{STAGING.pattern}(/\.(new|old|now)(?=/|$|\W))?")


def final_places(text: str) -> str:
    """Returns a path or a message in which the paths of staged files are replaced by their final ones."""
    return _OF_RANKS.sub("", _STAGED.sub("", text))


def folder_of_ranks() -> str:
    """Returns a name for the folder in a hidden one that many ranks fill. No other save ever has the same name, so a
    rank that does not know yet that its save has ended cannot write into the files of the next one."""
    return f".ranks-{secrets.token_hex(8)}"


def hidden_folder_of(path: str) -> str:
    """Returns the innermost hidden folder that a path leads into. What is left in it is removed with it."""
    *_, found = STAGING.finditer(path)
    return path[: found.end()]


def hidden_name(purpose: str, slot: int = 0) -> str:
    """Returns the name of this user's hidden folder for a purpose. ``slot`` gives further names, where others
    are taken."""
    return f"{PREFIX}{_digits(os.geteuid(), purpose)}{slot:02x}.staging"


@functools.lru_cache(maxsize=256)
def _digits(user: int, purpose: str) -> str:
    return hashlib.blake2b(f"{user} {purpose}".encode(errors="surrogateescape"), digest_size=7).hexdigest()
