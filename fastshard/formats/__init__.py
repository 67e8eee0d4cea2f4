# SPDX-License-Identifier: Apache-2.0
"""File formats: safetensors, archives of ``torch.save``, indexes, manifests. Nothing in here needs torch."""
