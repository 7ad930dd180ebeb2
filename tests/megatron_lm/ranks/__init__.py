"""What runs in the ranks that tests start, never in the tests' own process: Megatron's optimizers need more shims."""

from megatron_tied.platform.training import prepare_training

prepare_training()
