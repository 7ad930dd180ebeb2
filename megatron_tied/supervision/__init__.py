"""Starting a run again when it has failed: `megatron-tied supervise`. Knows nothing of training but its config."""
