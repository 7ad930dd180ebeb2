"""The run config, the training loop, schedule and evaluation."""
