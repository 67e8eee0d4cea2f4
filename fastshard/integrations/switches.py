# SPDX-License-Identifier: Apache-2.0
"""What :func:`fastshard.install` and the blocks of :func:`fastshard.installed` were asked for."""

from __future__ import annotations

from typing import Final, Literal

Manifest = bool | Literal["sha256"]


class State:
    """Whether the replacements are wanted; changed under a lock of the caller's."""

    lasting = False
    """Whether ``install()`` was called, and not yet ``uninstall()``."""
    blocks = 0
    """The number of ``with installed()`` blocks under way, of all threads."""
    lasting_asynchronous = False
    asynchronous_blocks = 0
    """The same of those that were called with ``asynchronous=True``."""
    lasting_manifest: Manifest = False
    manifest_blocks: Final[list[Manifest]] = []
    """The same of what checkpoints are to say of their files."""

    lasting_incremental = False
    incremental_blocks = 0
    """The same of checkpoints that link what has not changed since the one before."""

    @property
    def active(self) -> bool:
        return self.lasting or self.blocks > 0

    @property
    def asynchronous(self) -> bool:
        return self.lasting_asynchronous or self.asynchronous_blocks > 0

    @property
    def manifest(self) -> Manifest:
        wanted = self.lasting_manifest, *self.manifest_blocks
        return "sha256" if "sha256" in wanted else any(wanted)

    @property
    def incremental(self) -> bool:
        return self.lasting_incremental or self.incremental_blocks > 0

    @property
    def follows_checkpoints(self) -> bool:
        """Whether the loops of other libraries are followed from the beginning of a checkpoint to its end."""
        return self.asynchronous or bool(self.manifest) or self.incremental


def check_manifest(wanted: Manifest) -> None:
    """Raises ``ValueError`` for anything but ``True``, ``False`` and ``"sha256"``."""
    if not isinstance(wanted, bool) and wanted != "sha256":
        raise ValueError(f"manifest must be True, False or 'sha256', not {wanted!r}")
