"""Architectures: the model section of a config, its presets, and the Megatron-Core specs built from it."""
