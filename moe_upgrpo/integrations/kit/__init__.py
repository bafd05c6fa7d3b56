"""Parts that the integrations of all stacks are made of; a stack's own modules only hook them in.

environment  what the variables of a job ask for: run folder, share of the token rows, alarms
hooking      attributes of a stack replaced for a while
presets      a preset with the settings and flags that a stack gives for it
routers      which routers count, what they chose and would have chosen, by layer over all shards
second_look  the loss once more on detached log-probs: which tokens its own rule cut
run_log      the run folder: token rows, metrics and alarms of the sequences of a step
health       whether a replay was applied and what it changed, counted in every update
revisions    at start: which revision of a stack is installed, and whether its hooks are there
"""
