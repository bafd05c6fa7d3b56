# SPDX-License-Identifier: Apache-2.0
"""Losses, routing log and run folder inside other trainers: one module for each stack.

Nothing is imported here: a stack's module needs that stack.
"""
