"""Starts a run, and again when it has failed: on the hosts that are left, after its newest checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Self

from megatron_tied.bad_input import BAD_INPUT
from megatron_tied.checkpoint.directory import CheckpointDirectory
from megatron_tied.run_directory import CHECKPOINTS, SUMMARY, last_logged
from megatron_tied.supervision.command import LaunchCommand
from megatron_tied.supervision.lock import Lock
from megatron_tied.supervision.rank_watch import RankWatch
from megatron_tied.supervision.reach import Reach
from megatron_tied.supervision.sweep import Found, Request
from megatron_tied.training.launcher import TOKEN_VARIABLE

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_MOST_DOUBLINGS = 6  # of the second before a restart
_INTERRUPT_SECONDS = 10.0  # for the ranks to end after Ctrl-C


class Supervisor:
    """Runs `command` until it ends well, is stopped, or has failed `restarts` + 1 times without a new checkpoint.

    Fewer hosts than `min_hosts` are not gone on with. A context manager: on leaving, no process of the run is left on
    any host that answers.
    """

    def __init__(self, command: LaunchCommand, restarts: int, min_hosts: int):
        self._command, self._restarts, self._min_hosts = command, restarts, min_hosts
        self._reach = Reach(command.ssh_port)
        self._run_dir = Path(command.config.train.run_dir)
        # The same at every start: what a supervisor that was killed has left is known by it.
        self._token = uuid.uuid5(uuid.NAMESPACE_URL, self._run_dir.absolute().as_uri()).hex
        self._checkpoints = CheckpointDirectory(self._run_dir / CHECKPOINTS)
        self._received: list[int] = []
        self._child: subprocess.Popen[bytes] | None = None
        self._undo = ExitStack()

    def run(self) -> int:
        """Returns the launcher's exit code, or 128 + its number for a signal."""
        hosts, failures = self._command.hosts, 0
        for host, answer in self._end_everything().items():
            if answer is not None and answer.ranks:
                _say(f"{answer.ranks} ranks of an earlier start on {host} were ended")
        while True:
            before = self._newest_step()
            code = self._attempt(hosts)
            found = self._end_everything()
            survivors = sum(answer.ranks for answer in found.values() if answer)
            if self._received:
                return 128 + self._received[0] if code is None else code
            if (code == BAD_INPUT and not failures) or (code == 0 and not survivors and self._has_ended()):
                return code
            what = _told(code, survivors, found)
            newest = self._newest_step()
            failures = 1 if newest > before else failures + 1
            if failures > self._restarts:
                _say(f"{what}; failed {failures} times in a row without a newer checkpoint: not started again")
                return code or 1
            chosen = self._usable(found)
            if chosen is None:
                return code or 1
            hosts = chosen
            pause = 2 ** min(failures - 1, _MOST_DOUBLINGS)
            _say(f"{what}; restart {failures} of {self._restarts} in {pause} s{_on(hosts)}, {self._going_on(newest)}")
            if self._pause(pause):
                return 128 + self._received[0]

    def __enter__(self) -> Self:
        self._undo.enter_context(Lock(self._run_dir))
        self._hostfile = Path(self._undo.enter_context(tempfile.TemporaryDirectory()), "hostfile")
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                self._undo.callback(signal.signal, number, signal.signal(number, self._note))
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._end_everything()
        self._undo.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)

    def _attempt(self, hosts: dict[str, int]) -> int | None:
        """Start the command and wait for it: its exit code, or None where it has to be ended."""
        hostfile = None
        if hosts != self._command.hosts:
            self._hostfile.write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))
            hostfile = self._hostfile
        words = self._command.words(self._token, hosts, hostfile)
        # A session of its own: what a terminal sends to all goes by way of this process.
        self._child = subprocess.Popen(
            words, env=os.environ | {TOKEN_VARIABLE: self._token}, start_new_session=True, stdin=subprocess.DEVNULL
        )
        watch = RankWatch(self._reach, list(hosts), self._token)
        passed_on, deadline = 0, float("inf")
        while time.monotonic() < deadline and not watch.says_ended():
            try:
                code = self._child.wait(timeout=0.2)
                return 128 - code if code < 0 else code
            except subprocess.TimeoutExpired:
                pass
            if len(self._received) > 1:
                return None
            if self._received and not passed_on:
                passed_on = self._received[0]
                if not self._pass_on(passed_on, hosts):
                    return None
                if passed_on == signal.SIGINT:
                    deadline = time.monotonic() + _INTERRUPT_SECONDS
        return None

    def _pass_on(self, number: int, hosts: dict[str, int]) -> bool:
        """Signal the ranks, not the launcher, which would give them little time; False where there are none."""
        number = signal.SIGTERM if number == signal.SIGHUP else number
        found = self._reach.ask(list(hosts), Request(self._token, "signal", number))
        return any(answer.ranks for answer in found.values() if answer)

    def _end_everything(self) -> dict[str, Found | None]:
        """End what is left of the run on every host that it ever had; says what cannot be ended."""
        found = self._reach.ask(list(self._command.hosts), Request(self._token, "end"))
        if self._child is not None:
            if self._child.poll() is None:
                self._child.kill()  # of a launcher elsewhere than on the run's hosts
            self._child.wait()
            self._child = None
        for host, answer in found.items():
            if answer is not None and answer.left:
                _say(f"{answer.left} processes of the run on {host} cannot be ended")
        return found

    def _usable(self, found: dict[str, Found | None]) -> dict[str, int] | None:
        """As many of the hosts that answer as the config can be run on; None where that is too few, which is said."""
        if not self._command.hosts:
            return None if any(answer.left for answer in found.values() if answer) else {}
        answering = [host for host, answer in found.items() if answer is not None and not answer.left]
        problems: list[str] = []
        for count in range(len(answering), self._min_hosts - 1, -1):
            hosts = {host: self._command.hosts[host] for host in answering[:count]}
            if not (wrong := self._command.config.problems(sum(hosts.values()))):
                return hosts
            problems += [f"on {count}: {problem}" for problem in wrong]
        told = "; ".join(problems) or f"--min-hosts is {self._min_hosts}"
        _say(f"{len(answering)} of {len(found)} hosts answer, and the run cannot go on there: {told}")
        return None

    def _has_ended(self) -> bool:
        """Whether the last step is done: some launchers end with 0, too, when they are killed."""
        return (self._run_dir / SUMMARY).exists()

    def _newest_step(self) -> int:
        try:
            return next(iter(self._checkpoints.steps()), 0)
        except OSError:  # the file system may be what has failed
            return 0

    def _going_on(self, newest: int) -> str:
        lost = max(0, int(last_logged(self._run_dir, "step").get("step", 0)) - newest)
        return f"after step {newest}, {lost} steps lost"

    def _pause(self, seconds: float) -> bool:
        """Whether a signal has come meanwhile."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._received:
            time.sleep(0.1)
        return bool(self._received)


def _told(code: int | None, survivors: int, found: dict[str, Found | None]) -> str:
    if code == 0 and survivors:
        parts = [f"the launcher has ended and left {survivors} ranks behind, which were ended"]
    elif code == 0:
        parts = ["the launcher has ended before the last step"]
    elif code is None:
        parts = ["the launcher waits for ranks that are gone, and was ended"]
    else:
        parts = [f"exit code {code}"]
    if silent := [host for host, answer in found.items() if answer is None]:
        parts.append(f"no answer from {', '.join(silent)}: what runs there ends after train.liveness_timeout")
    return "; ".join(parts)


def _on(hosts: dict[str, int]) -> str:
    return f" on {', '.join(hosts)} ({sum(hosts.values())} ranks)" if hosts else ""


def _say(line: str) -> None:
    with suppress(OSError):  # a full disk under the log is no reason not to go on
        print(f"supervise: {line}", file=sys.stderr, flush=True)
