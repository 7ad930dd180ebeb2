"""When a run is started again, on which hosts, and that nothing of it is left behind."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_tied.cli import main as cli
from tests.supervision.conftest import Supervised


def test_restarts_in_a_row_without_a_checkpoint_are_counted(supervised: Supervised) -> None:
    (supervised.directory / "run").mkdir()
    (supervised.directory / "run" / "metrics.jsonl").write_text('{"step": 12, "loss": 1}\n{"step": 13, "lo')
    plan = [{"exit": 7, "checkpoint": 10}, {"exit": 8}, {"exit": 9, "checkpoint": 20}, {"exit": 10}, {"exit": 11}]
    supervised.start(*plan, {"exit": 0}, options=("--restarts", "2"))
    code, said = supervised.finish()
    assert (code, len(supervised.starts)) == (11, 5)
    run = ["--module", "megatron_tied.pretrain", "--config", str(supervised.config), "train.steps=100", "--supervised"]
    (words,) = {tuple(start["words"]) for start in supervised.starts}
    assert list(words[:-1]) == run
    assert said == [
        "supervise: exit code 7; restart 1 of 2 in 1 s, after step 10, 2 steps lost",
        "supervise: exit code 8; restart 2 of 2 in 2 s, after step 10, 2 steps lost",
        "supervise: exit code 9; restart 1 of 2 in 1 s, after step 20, 0 steps lost",
        "supervise: exit code 10; restart 2 of 2 in 2 s, after step 20, 0 steps lost",
        "supervise: exit code 11; failed 3 times in a row without a newer checkpoint: not started again",
    ]


def test_bad_input_is_final(supervised: Supervised) -> None:
    supervised.start({"exit": 2}, {"exit": 0}, options=("--restarts", "3"))
    assert supervised.finish() == (2, [])
    assert len(supervised.starts) == 1


def test_what_looks_like_bad_input_later_is_not(supervised: Supervised) -> None:
    # A disk that is full, a port that is held: the same input has been good.
    supervised.start({"exit": 75}, {"exit": 2}, {"exit": 0}, options=("--restarts", "2"))
    code, said = supervised.finish()
    assert (code, len(supervised.starts)) == (0, 3)
    assert said[1].startswith("supervise: exit code 2; restart 2 of 2")


def test_an_end_before_the_last_step_is_none(supervised: Supervised) -> None:
    supervised.start({"exit": 0, "ends": False}, {"exit": 0}, options=("--restarts", "1"))
    code, said = supervised.finish()
    assert (code, len(supervised.starts)) == (0, 2)
    assert said[0].startswith("supervise: the launcher has ended before the last step; restart 1 of 1")


def test_one_supervisor_for_a_run(supervised: Supervised) -> None:
    supervised.start({"ranks": ["polite"], "waits": True}, options=("--restarts", "1"))
    supervised.await_ranks(1)
    first = supervised.job
    supervised.start({"exit": 0}, options=("--restarts", "1"))
    code, said = supervised.finish()
    assert code == 2
    assert said[1].endswith(f": must not be supervised twice, and is by process {first.pid} on {socket.gethostname()}")
    first.terminate()
    assert first.wait(30) == 0


def test_what_a_killed_supervisor_leaves_is_ended_by_the_next(supervised: Supervised) -> None:
    supervised.start({"ranks": ["deaf", "deaf"], "waits": True}, {"exit": 0}, options=("--restarts", "1"))
    ranks = supervised.await_ranks(2)
    supervised.job.kill()
    supervised.job.wait()
    assert all(map(psutil.pid_exists, ranks))
    supervised.start({"exit": 0}, {"exit": 0}, options=("--restarts", "1"))
    code, said = supervised.finish()
    assert code == 0
    assert said == [f"supervise: 2 ranks of an earlier start on {socket.gethostname()} were ended"]
    assert not supervised.left()


def test_what_a_launcher_leaves_is_ended_before_the_next_start(supervised: Supervised) -> None:
    plan = {"exit": 0, "after": 5, "ranks": ["deaf", "stopped"]}
    supervised.start(plan, {"exit": 3}, options=("--restarts", "1"))
    supervised.await_ranks(2)
    bystander = subprocess.Popen(["sleep", "1000"])
    code, said = supervised.finish()
    assert code == 3
    assert said[0].startswith("supervise: the launcher has ended and left 2 ranks behind, which were ended; restart 1")
    assert not supervised.left()
    assert bystander.poll() is None
    bystander.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])  # the second: the terminal is closed
def test_a_signal_lets_the_ranks_end(supervised: Supervised, number: signal.Signals) -> None:
    supervised.start({"ranks": ["polite", "polite"], "waits": True}, options=("--restarts", "3"))
    supervised.await_ranks(2)
    supervised.job.send_signal(number)
    assert supervised.finish() == (0, [])
    assert len(supervised.starts) == 1
    assert not supervised.left()


@pytest.mark.parametrize("signals", [[signal.SIGTERM, signal.SIGTERM], [signal.SIGUSR1]])
def test_a_signal_leaves_no_process(supervised: Supervised, signals: list[signal.Signals]) -> None:
    ranks = ["deaf", "deaf"] if len(signals) == 2 else ["polite", "polite"]
    supervised.start({"ranks": ranks, "waits": True}, options=("--restarts", "3"))
    supervised.await_ranks(2)
    for number in signals:
        supervised.job.send_signal(number)
        time.sleep(1)
    code, said = supervised.finish()
    assert said == []
    # The stand-ins die of SIGUSR1.
    assert code == (128 + signal.SIGTERM if len(signals) == 2 else 256 - signal.SIGUSR1)
    assert len(supervised.starts) == 1
    assert not supervised.left()


def test_a_signal_between_two_starts(supervised: Supervised) -> None:
    supervised.start({"exit": 3}, {"exit": 3}, {"exit": 0}, options=("--restarts", "5"))
    supervised.await_line("restart 2 of 5 in 2 s")
    supervised.job.send_signal(signal.SIGINT)
    code, _ = supervised.finish()
    assert (code, len(supervised.starts)) == (128 + signal.SIGINT, 2)


@pytest.mark.slow
def test_a_launcher_that_waits_for_a_host_is_not_waited_for(supervised: Supervised) -> None:
    supervised.start({"exit": 0, "after": 1000, "ranks": ["polite"]}, {"exit": 0}, options=("--restarts", "1"))
    (rank,) = supervised.await_ranks(1)
    time.sleep(3)
    psutil.Process(rank).kill()
    began = time.monotonic()
    code, said = supervised.finish()
    assert (code, len(supervised.starts)) == (0, 2)
    assert said[0].startswith("supervise: the launcher waits for ranks that are gone, and was ended; restart 1 of 1")
    assert 15 < time.monotonic() - began < 35


# ---- hosts


def hostfile(supervised: Supervised, count: int, slots: int) -> tuple[str, str]:
    path = supervised.directory / "hosts"
    path.write_text("".join(f"gone{number} slots={slots}\n" for number in range(count)))
    return ("--hostfile", str(path))


def test_without_a_host_that_is_gone_and_with_it_when_it_is_back(supervised: Supervised) -> None:
    launcher = hostfile(supervised, 2, 2)
    supervised.down("gone0")
    plan = [{"exit": 75, "checkpoint": 10}, {"exit": 75, "checkpoint": 20, "after": 2}, {"exit": 0}]
    supervised.start(*plan, options=("--restarts", "1"), launcher=(*launcher, "--master_addr", "10.0.0.1"))
    supervised.await_starts(2)
    supervised.down()
    code, said = supervised.finish()
    assert code == 0
    first, second, third = supervised.starts
    assert first["hosts"] == third["hosts"] == ["gone0 slots=2", "gone1 slots=2", ""]
    assert second["hosts"] == ["gone1 slots=2", ""]
    assert "--force_multi" in second["words"]
    assert "--master_addr" in first["words"]
    assert "--master_addr" not in second["words"]
    assert said[0] == (
        "supervise: exit code 75; no answer from gone0: what runs there ends after train.liveness_timeout; "
        "restart 1 of 1 in 1 s on gone1 (2 ranks), after step 10, 0 steps lost"
    )
    assert "on gone0, gone1 (4 ranks), after step 20" in said[1]


def test_as_many_hosts_as_the_config_allows(supervised: Supervised) -> None:
    supervised.down("gone1")
    launcher = hostfile(supervised, 4, 1)  # three ranks are no multiple of two expert-parallel ones
    supervised.start({"exit": 75}, {"exit": 0}, options=("--restarts", "1"), launcher=launcher)
    assert supervised.finish()[0] == 0
    assert supervised.starts[1]["hosts"] == ["gone0 slots=1", "gone2 slots=1", ""]


def test_fewer_hosts_than_are_asked_for(supervised: Supervised) -> None:
    supervised.down("gone1")
    launcher = hostfile(supervised, 4, 1)
    supervised.start({"exit": 75}, options=("--restarts", "1", "--min-hosts", "4"), launcher=launcher)
    code, said = supervised.finish()
    assert (code, len(supervised.starts)) == (75, 1)
    assert said[0] == "supervise: 3 of 4 hosts answer, and the run cannot go on there: --min-hosts is 4"


@pytest.mark.parametrize(("option", "value"), [("--restarts", "-1"), ("--min-hosts", "0"), ("--min-hosts", "2")])
def test_counts_that_cannot_be(
    supervised: Supervised,
    option: str,
    value: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(supervised.directory / "bin"))
    run = ["deepspeed", "--module", "megatron_tied.pretrain", "--config", str(supervised.config)]
    options = {"--restarts": "1", option: value}
    words = [word for pair in options.items() for word in pair]
    assert cli.main(["supervise", *words, "--", *run]) == 2
    assert f"{option} = {value}: must be " in capsys.readouterr().err


def test_too_few_hosts(supervised: Supervised) -> None:
    supervised.down("gone1")
    launcher = hostfile(supervised, 2, 1)
    supervised.start({"exit": 75}, options=("--restarts", "1"), launcher=launcher)
    code, said = supervised.finish()
    assert (code, len(supervised.starts)) == (75, 1)
    assert said[0].startswith(
        "supervise: 1 of 2 hosts answer, and the run cannot go on there: on 1: parallel.expert_mo"
    )


# ---- bad input


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["deepspeed", "train.py"], "COMMAND = 'deepspeed train.py': must be a launcher's command with --module"),
        (["deepspeeed", "M"], "COMMAND = 'deepspeeed': must be a program: it is not found"),
        (["deepspeed", "--include", "a", "--hostfile", "H", "M"], "--include = 'a': must be left out"),
        (["deepspeed", "--hostfile", "/nowhere", "M"], "--hostfile = '/nowhere': cannot be read"),
        (["deepspeed", "M", "--nothing"], "command line"),
        (["deepspeed", "M", "train.resume=never"], "train.resume = 'never': must be auto"),
        (["deepspeed", "M", "checkpoint.save_every=0"], "checkpoint.save_every = 0: must be at least 1"),
    ],
)
def test_bad_input_is_told(
    supervised: Supervised,
    words: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(supervised.directory / "bin"))
    _, hosts = hostfile(supervised, 1, 1)
    run = ["--module", "megatron_tied.pretrain", "--config", str(supervised.config)]
    words = [part for word in words for part in (run if word == "M" else [hosts] if word == "H" else [word])]
    assert cli.main(["supervise", "--restarts", "1", "--", *words]) == 2
    assert told in capsys.readouterr().err


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from megatron_tied.cli.main import main\ntry: main(['supervise', '--help'])\nexcept SystemExit: "
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "a second signal ends them at once" in done.stdout
