# SPDX-License-Identifier: Apache-2.0
"""What files look like: safetensors, archives of ``torch.save``, indexes, manifests. Nothing in here needs torch."""
