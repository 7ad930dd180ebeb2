"""Layers whose routed experts are tied: they know Megatron-Core and torch, and nothing of DeepSpeed."""

from megatron_tied.platform import prepare

# Megatron-Core must be imported after the host is prepared; every module of this room imports it.
prepare()
