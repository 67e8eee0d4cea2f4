# SPDX-License-Identifier: Apache-2.0
"""fastshard in vLLM, by the addresses that users have: the plugin, and the worker extension."""

from .integrations.vllm import WorkerExtension as WorkerExtension
from .integrations.vllm import register as register
