# SPDX-License-Identifier: Apache-2.0
"""``python -m fastshard``."""

import sys

from .cli import main

sys.exit(main())
