# SPDX-License-Identifier: Apache-2.0
"""``python -m fastshard``."""

import sys

from .cli.command import main

if __name__ == "__main__":  # vLLM's workers import the program they are spawned from
    sys.exit(main())
