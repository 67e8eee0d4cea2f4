# SPDX-License-Identifier: Apache-2.0
"""The names of hidden folders and of what lies in them; what a path in one of them means to a user.

A hidden folder is called ``.fastshard-<16 hex digits>.staging``. The digits follow from the user and from what the folder
is for, so that the next save through the same path meets what a killed one has left.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from typing import Final

PREFIX: Final = ".fastshard-"
"""What everything hidden begins with, the engine's temporary files too."""
STAGING: Final = re.compile(rf"{re.escape(PREFIX)}[0-9a-f]{{16}}\.staging")
"""A hidden folder."""
NEW: Final = ".new"
OLD: Final = ".old"
NOW: Final = ".now"
_STAGED: Final = re.compile(rf"/{STAGING.pattern}(/\.(new|old|now)(?=/|$|\W))?")


def final_places(text: str) -> str:
    """A path or a message, in which staged files have their final places."""
    return _STAGED.sub("", text)


def hidden_folder_of(path: str) -> str:
    """The innermost hidden folder that a path leads into. What is left in it goes when it is removed."""
    *_, found = STAGING.finditer(path)
    return path[: found.end()]


def hidden_name(purpose: str, slot: int = 0) -> str:
    """What a hidden folder is called that is for this purpose of this user. ``slot``: the next names, where others are taken."""
    return f"{PREFIX}{_digits(os.geteuid(), purpose)}{slot:02x}.staging"


@functools.lru_cache(maxsize=256)
def _digits(user: int, purpose: str) -> str:
    return hashlib.blake2b(f"{user} {purpose}".encode(errors="surrogateescape"), digest_size=7).hexdigest()
