# SPDX-License-Identifier: Apache-2.0
"""A row of the table of what fastshard replaces (:mod:`fastshard.integrations.patch_table`)."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """A function to be replaced. ``implementation`` is written ``"module:function"``."""

    module: str
    attribute: str
    implementation: str
    parameters: str = ""
    """Names of the parameters that the implementation takes by position."""
    group: str = ""
    since: str = ""
    """The version of the library that introduced the function. It is not missed in older ones."""
    until: str = ""
    """The version that removed it. It is not missed from then on."""

    @property
    def call(self) -> str:
        """Returns what users call the function."""
        return "torch.save" if self.module == "torch.serialization" else self.attribute

    @property
    def library(self) -> str:
        return self.module.partition(".")[0]

    @property
    def belongs_to(self) -> str:
        """Returns the name of its group."""
        return self.group or f"{self.library}: {self.attribute}"

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"
