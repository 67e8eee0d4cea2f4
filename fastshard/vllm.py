# SPDX-License-Identifier: Apache-2.0
"""The public addresses of the vLLM plugin and its worker extension, :mod:`fastshard.integrations.vllm`."""

from .integrations.vllm import WorkerExtension as WorkerExtension
from .integrations.vllm import register as register
