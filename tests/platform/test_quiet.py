"""Only the lines that are known to be noise are dropped."""

import logging
import warnings

import pytest
from deepspeed.utils import logger as deepspeed_logger

from megatron_tied.platform.quiet import quiet_deepspeed, silence_third_parties

LAYER = "megatron.core.transformer.transformer_layer"


def test_one_log_line_is_dropped_and_its_neighbours_stay(caplog):
    silence_third_parties()
    logger = logging.getLogger(LAYER)
    with caplog.at_level(logging.WARNING, logger=LAYER):
        logger.warning("Unknown MLP type: %s. Using default kwargs.", "TiedMoELayer")
        logger.warning("Known trouble")
    assert caplog.messages == ["Known trouble"]


def test_filters_are_installed_once():
    silence_third_parties()
    before = list(logging.getLogger(LAYER).filters)
    silence_third_parties()
    assert logging.getLogger(LAYER).filters == before


def test_one_warning_is_dropped_and_others_stay():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silence_third_parties()
        warnings.warn("Transformer Engine and Apex are not installed. Falling back", stacklevel=1)
        warnings.warn("Apex is installed in a strange place", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["Apex is installed in a strange place"]


@pytest.mark.parametrize(
    ("rank", "verbose", "level"),
    [(0, None, logging.WARNING), (1, None, logging.ERROR), (0, "1", logging.INFO), (1, "1", logging.INFO)],
)
def test_deepspeed_speaks_up_on_rank_0_or_when_asked(monkeypatch, rank, verbose, level):
    monkeypatch.setattr(deepspeed_logger, "level", deepspeed_logger.level)
    monkeypatch.delenv("MEGATRON_TIED_VERBOSE", raising=False)
    if verbose:
        monkeypatch.setenv("MEGATRON_TIED_VERBOSE", verbose)
    quiet_deepspeed(rank)
    assert deepspeed_logger.level == level
