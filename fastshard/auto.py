# SPDX-License-Identifier: Apache-2.0
"""``import fastshard.auto`` is ``fastshard.install()``, unless the environment says ``FASTSHARD_DISABLE=1``."""

from .patching import DISABLE_VARIABLE, install
from .settings import flag

if not flag(DISABLE_VARIABLE):
    install()
