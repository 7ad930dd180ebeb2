"""A launcher is waited for until a host is seen to have no ranks any more."""

from __future__ import annotations

import pytest

from megatron_tied.supervision import rank_watch
from megatron_tied.supervision.rank_watch import RankWatch
from megatron_tied.supervision.sweep import Found

GONE = None
RANKS, NO_RANKS = Found(ranks=2, left=0), Found(ranks=0, left=0)


class Hosts:
    """Hosts that answer as they are told to, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.answers = 0.0, {"node0": RANKS, "node1": RANKS}
        monkeypatch.setattr(rank_watch.time, "monotonic", lambda: self.now)
        self.watch = RankWatch(self, list(self.answers), "token")

    def ask(self, hosts: list[str], request: object) -> dict[str, Found | None]:
        return {host: self.answers[host] for host in hosts}

    def ended_after(self, seconds: int, **answers: Found | None) -> float | None:
        """How long after these answers it says so, looking for `seconds`."""
        self.answers |= answers
        for after in range(seconds):
            self.now += 1
            if self.watch.says_ended():
                return after
        return None


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Hosts:
    made = Hosts(monkeypatch)
    assert made.ended_after(60) is None
    return made


def test_no_host_has_ranks(hosts: Hosts) -> None:
    assert 20 <= hosts.ended_after(60, node0=NO_RANKS, node1=NO_RANKS) <= 40


def test_a_host_does_not_answer_and_the_other_has_no_ranks(hosts: Hosts) -> None:
    assert 20 <= hosts.ended_after(60, node0=NO_RANKS, node1=GONE) <= 40


def test_no_host_answers(hosts: Hosts) -> None:
    assert hosts.ended_after(100, node0=GONE, node1=GONE) is None
    assert hosts.ended_after(60) is not None


def test_one_host_has_no_ranks(hosts: Hosts) -> None:
    # The other's are stopped, or wait for what never comes.
    assert 20 <= hosts.ended_after(60, node1=NO_RANKS) <= 40


def test_a_host_that_cannot_be_asked_does_not_end_the_others(hosts: Hosts) -> None:
    assert hosts.ended_after(1000, node1=GONE) is None


def test_ranks_that_have_not_begun_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Hosts(monkeypatch).ended_after(1000, node0=NO_RANKS, node1=NO_RANKS) is None


def test_ranks_that_come_back(hosts: Hosts) -> None:
    assert hosts.ended_after(15, node0=NO_RANKS, node1=NO_RANKS) is None
    assert hosts.ended_after(15, node0=RANKS, node1=RANKS) is None
    assert hosts.ended_after(15, node0=NO_RANKS, node1=NO_RANKS) is None
