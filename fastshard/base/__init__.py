# SPDX-License-Identifier: Apache-2.0
"""What every layer stands on: settings, loading of modules, counts of saves. Nothing in here needs torch."""
