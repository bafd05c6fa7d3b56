"""Checks of this code on one GPU, in eight minutes: `make gpu-check`, docs/gpu.md."""
