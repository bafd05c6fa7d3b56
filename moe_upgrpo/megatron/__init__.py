"""The Megatron edge: the only folder that imports megatron."""
