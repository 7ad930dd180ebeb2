"""`megatron-tied bench`: tied against untied, and against peers, side by side in one run on this machine."""
