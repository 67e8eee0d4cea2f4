# SPDX-License-Identifier: Apache-2.0
"""The public address of the SGLang plugin, :mod:`fastshard.integrations.sglang`."""

from .integrations.sglang import register as register
from .integrations.sglang import save_model as save_model
