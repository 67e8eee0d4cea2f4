# SPDX-License-Identifier: Apache-2.0
"""Docstrings name functions as Sphinx does (``:func:`save_file```); on the pages these names are code, as all others."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|data|attr|mod|exc):`[~]?([^`]+)`")
EXAMPLE = re.compile(r"::$", re.MULTILINE)


class Roles(griffe.Extension):
    """Makes Markdown of what docstrings have from reStructuredText."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(":", ROLE.sub(r"``\1``", obj.docstring.value))
