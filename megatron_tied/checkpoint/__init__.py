"""Checkpoints: whole tensors by name, whatever the parallelism; found complete and sound, or not at all."""
