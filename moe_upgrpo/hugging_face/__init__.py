# SPDX-License-Identifier: Apache-2.0
"""Hugging Face model folders: the one place that reads them, and what is written beside weights.

Always files of this machine, never the network. transformers is imported only where it is used.
"""
