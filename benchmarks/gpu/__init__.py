"""What one GPU says of this code in eight minutes: `make gpu-check`, docs/gpu.md."""
