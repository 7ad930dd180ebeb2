"""What an engine needs of its process, and leaves behind in it."""

from collections.abc import Iterator

import pytest

from megatron_tied.platform.quiet import quiet_deepspeed


@pytest.fixture
def launched(one_process: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as a launcher's only rank; Megatron-Core's global loss state is as new afterwards."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, clear_aux_losses_tracker

    monkeypatch.setenv("LOCAL_RANK", "0")
    quiet_deepspeed(rank=1)
    yield
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    clear_aux_losses_tracker()
