# SPDX-License-Identifier: Apache-2.0
"""The base of all layers: settings, loading of modules, counts of saves. Nothing in here needs torch."""
