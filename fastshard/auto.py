# SPDX-License-Identifier: Apache-2.0
"""``import fastshard.auto`` is ``fastshard.install()``, unless the environment says ``FASTSHARD_DISABLE=1``.

With ``FASTSHARD_AUTO=1`` in the environment every Python that fastshard is installed for does it when it starts, without
a line in any script: ``fastshard_auto.pth`` beside the package (setup.py) sees to it.
"""

from .base.settings import flag
from .integrations.patching import DISABLE_VARIABLE, install

if not flag(DISABLE_VARIABLE):
    install()
