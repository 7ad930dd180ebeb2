"""Third-party messages that no user of this package can act on, silenced at their source and nothing else."""

from __future__ import annotations

import logging
import os
import warnings

_WARNINGS = (
    # Megatron-Core's import-time notes on optional packages; `megatron-tied` says once what it uses.
    r"(Transformer Engine and )?Apex (is|are) not installed",
    # Collectives that Megatron-Core and DeepSpeed call by names that newer torch renames.
    r"`?torch\.distributed\.\w+`? is (deprecated|a private function)",
    # Megatron-Core 0.16 warns about its own default.
    r"full scope is deprecated",
)
_LOG_LINES = {
    # The layer compares its MLP by identity with MoELayer, so that any subclass is "unknown" to it.
    "megatron.core.transformer.transformer_layer": "Unknown MLP type",
}


class _Drop(logging.Filter):
    def __init__(self, beginning: str):
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)


def silence_third_parties() -> None:
    """Install the filters; safe to call more than once, before or after the packages are imported."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, beginning in _LOG_LINES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Drop) for known in logger.filters):
            logger.addFilter(_Drop(beginning))


def quiet_deepspeed(rank: int) -> None:
    """DeepSpeed logs its set-up at INFO on every rank: keep warnings on rank 0 and errors elsewhere."""
    from deepspeed.utils import logger

    verbose = os.environ.get("MEGATRON_TIED_VERBOSE")
    logger.setLevel(logging.INFO if verbose else logging.WARNING if rank == 0 else logging.ERROR)
