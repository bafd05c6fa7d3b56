# SPDX-License-Identifier: Apache-2.0
"""Parts that the integrations of all stacks are made of; a stack's own modules only hook them in.

environment  what a job's variables ask for: run folder, share of the rows, a loss's fields
hooking      wrappers around methods
presets      a preset with the settings and flags that a stack gives for it
weighted     the loss with a stack's own weight for each token
routers      which routers count, what they chose and would have chosen, by layer over all shards
second_look  the loss once more on detached log-probs: which tokens its own rule cut
sequence_log the log of a trainer that generates, scores and trains on whole sequences
run_log      the run folder: token rows, metrics and alarms of the sequences of a step
health       whether a replay was applied and what it changed, counted in every update
revisions    at start: which revision of a stack is installed, and whether its hooks are there
"""
