"""Patches for the files of others: configs, and the source tree of Megatron-LM."""
