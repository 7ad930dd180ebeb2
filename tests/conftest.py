"""Prepares the host before any test imports Megatron-Core or DeepSpeed; fixtures of several rooms."""

import signal
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from megatron_tied.platform import prepare
from megatron_tied.platform.quiet import quiet_deepspeed
from tests.data.corpus import make_text, write_jsonl
from tests.training.runs import Corpus, finish

prepare()

# How long an example takes says nothing on a machine that others use, too.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# A shell starts its background jobs with SIGINT ignored, nohup with SIGHUP, and what they start inherits it: tests send
# both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def forget_moe_losses() -> Iterator[None]:
    """Megatron-Core's table of losses has as many rows as the first model's layers: the next may be of another size."""
    yield
    if (moe := sys.modules.get("megatron.core.transformer.moe.moe_utils")) is not None:
        moe.get_moe_layer_wise_logging_tracker().clear()


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Process groups of one, made as a user's own script makes them: without this package and without DeepSpeed."""
    from megatron.core import parallel_state, tensor_parallel

    rendezvous = tmp_path_factory.mktemp("rendezvous") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)  # the streams of dropout, whichever test comes first
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def launched(one_process: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as a launcher's only rank, for an engine; the scale of router losses is as new afterwards."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from tests.fp16 import allow_fp16

    monkeypatch.setenv("LOCAL_RANK", "0")
    quiet_deepspeed(rank=1)
    allow_fp16()
    yield
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two data sets made by the `prepare-data` command."""
    directory = tmp_path_factory.mktemp("corpus")
    made = Corpus(directory / "a", directory / "b", directory / "a.model")
    for prefix, seed, options in (
        (made.a, 0, ("--train-tokenizer", "--vocab-size", "320")),
        (made.b, 100, ("--tokenizer", str(made.tokenizer))),
    ):
        texts = [make_text(300, seed + number) for number in range(40)]
        source = write_jsonl(prefix.with_suffix(".jsonl"), texts)
        command = [sys.executable, "-m", "megatron_tied.cli.main", "prepare-data", "--workers", "1"]
        done = finish([*command, "--input", str(source), "--output", str(prefix), *options])
        assert done.code == 0, done.output
    return made
