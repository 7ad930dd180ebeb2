"""Real processes: killed, interrupted, measured."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import sentencepiece

from megatron_tied.data import encode
from megatron_tied.data.tokenizer import SentencePieceTokenizer
from tests.data.corpus import make_text

COMMAND = [sys.executable, "-m", "megatron_tied.cli.main", "prepare-data"]


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def wait_until(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_leaves_nothing_finished_and_the_next_one_works(
    tmp_path: Path, model: Path, sent: signal.Signals
) -> None:
    source = tmp_path / "x.txt"
    source.write_text(make_text(200_000) * 60)
    options = ["--input", str(source), "--output", str(tmp_path / "x"), "--tokenizer", str(model)]
    partial = tmp_path / ".x.partial" / "x.bin"
    run = subprocess.Popen([*COMMAND, *options, "--workers", "2"], start_new_session=True, stderr=subprocess.PIPE)
    wait_until(lambda: partial.exists() and partial.stat().st_size)
    workers = children_of(run.pid)
    assert len(workers) >= 2
    if sent is signal.SIGINT:
        os.killpg(run.pid, sent)
    else:
        run.kill()
    error = run.communicate(timeout=60)[1].decode()
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    assert [path.name for path in tmp_path.glob("x.*")] == ["x.txt"]
    if sent is signal.SIGINT:
        assert run.returncode == 130
        assert error == "megatron-tied prepare-data: interrupted; no data set was written\n"
    source.write_text(make_text(1000))
    assert subprocess.run([*COMMAND, *options]).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json", "x.txt"]


MEASURED = """
import re, sys
from pathlib import Path
from megatron_tied.cli.main import main
from megatron_tied.platform import prepare

prepare()
import megatron.core.datasets.indexed_dataset

def peak_mib():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

before = peak_mib()
for name in sys.argv[2:]:
    assert main(["prepare-data", "--input", name, "--output", name, "--tokenizer", sys.argv[1], "--workers", "1"]) == 0
print(peak_mib() - before)
"""


def test_workers_leave_the_interrupt_to_their_parent(model: Path) -> None:
    encoder = encode.Encoder(SentencePieceTokenizer.load(model), "text")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, encode._start_worker, (encoder,)) as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() is signal.SIG_IGN


@pytest.mark.parametrize("megabytes", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_input(tmp_path: Path, megabytes: int) -> None:
    model = tmp_path / "fast.model"
    text = make_text(200_000)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text[:100_000].splitlines()),
        model_writer=model.open("wb"),
        model_type="unigram",
        vocab_size=180,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    one_document, many = tmp_path / "one.txt", tmp_path / "many.jsonl"
    one_document.write_text(text * (megabytes // 3))
    record = json.dumps({"text": text[:2000]}) + "\n"
    with many.open("w") as file:
        file.writelines(record for _ in range(megabytes * 333))
    assert one_document.stat().st_size + many.stat().st_size > megabytes * 1_000_000
    command = [sys.executable, "-c", MEASURED, str(model), str(one_document), str(many)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # MiB: what is in flight, and the numbers of the index, of which there are some 500 per MB of input.
    assert int(run.stdout.splitlines()[-1]) < 45 + megabytes // 20


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from megatron_tied.cli.main import main\ntry: main(['prepare-data', '--help'])\nfinally: "
    code += "assert not {'torch', 'sentencepiece', 'megatron'} & set(sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "--train-tokenizer" in shown.stdout
