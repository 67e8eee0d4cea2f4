# SPDX-License-Identifier: Apache-2.0
"""The command line: ``fastshard.cli:main`` is the program ``fastshard``."""

from .command import main as main
