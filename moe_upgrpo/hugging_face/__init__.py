# SPDX-License-Identifier: Apache-2.0
"""Hugging Face model folders: the one place that reads them and writes the files beside weights.

It uses files of this machine only, never the network. transformers is imported only where it is
used.
"""
