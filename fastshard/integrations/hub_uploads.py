# SPDX-License-Identifier: Apache-2.0
"""Uploads to the Hub take the digests that the ``SHA256SUMS`` beside a file has, so that nobody computes them again."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ..formats.digests import known_digest


def from_path(original: Callable[..., Any], cls: type, path: str | os.PathLike[str]) -> Any:
    """In the place of ``UploadInfo.from_path``. What it returns reads the whole file when its digest is asked for,
    unless that has been set."""
    info = original(cls, path)
    if getattr(info, "is_hashed", None) is False:
        digest = known_digest(path)
        if digest is not None:
            info.sha256 = bytes.fromhex(digest)
    return info
