# SPDX-License-Identifier: Apache-2.0
"""fastshard in SGLang, by the address that users have: the plugin."""

from .integrations.sglang import register as register
from .integrations.sglang import save_model as save_model
