# SPDX-License-Identifier: Apache-2.0
"""``import fastshard.auto`` is ``fastshard.install()``, unless the environment says ``FASTSHARD_DISABLE=1``."""

import os

from .patching import DISABLE_VARIABLE, install

if os.environ.get(DISABLE_VARIABLE, "0") in ("", "0"):
    install()
