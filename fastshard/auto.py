# SPDX-License-Identifier: Apache-2.0
"""``import fastshard.auto`` calls ``fastshard.install()``, unless the environment variable
``FASTSHARD_DISABLE`` is set to 1. With ``FASTSHARD_ASYNC=1`` it calls ``install(asynchronous=True)``, with
``FASTSHARD_MANIFEST=1`` (or ``sha256``) ``install(manifest=True)`` (or ``"sha256"``), and with
``FASTSHARD_INCREMENTAL=1`` ``install(incremental=True)``.

With ``FASTSHARD_AUTO=1`` in the environment, every Python in whose environment fastshard is installed does
this when it starts, without a line in any script. The file ``fastshard_auto.pth`` beside the package, which
setup.py installs, does it.
"""

from .base.settings import ASYNC_VARIABLE, INCREMENTAL_VARIABLE, flag, manifest_wanted
from .integrations.patching import DISABLE_VARIABLE, install

if not flag(DISABLE_VARIABLE):
    install(
        asynchronous=flag(ASYNC_VARIABLE),
        manifest=manifest_wanted(),
        incremental=flag(INCREMENTAL_VARIABLE),
    )
