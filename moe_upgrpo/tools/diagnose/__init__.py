# SPDX-License-Identifier: Apache-2.0
"""Why an engine and a trainer differ on the same tokens, and whether that is too much."""
