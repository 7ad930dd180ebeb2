"""Whether a launcher still has something to wait for."""

from __future__ import annotations

import time
from collections.abc import Sequence

from megatron_tied.supervision.reach import Reach, is_this_host
from megatron_tied.supervision.sweep import Found, Request

# Some launchers wait for hosts that never answer again, though the ranks of all others have ended.
_GONE_SECONDS = 20.0
_UNREACHABLE_SECONDS = 120.0
_LOOK_SECONDS, _LOOK_ELSEWHERE_SECONDS = 2.0, 10.0


class RankWatch:
    """Whether ranks of a host have ended: all end together, and the others should be about to.

    Looks at two hosts, the first ones: what keeps a launcher waiting on one of them is to be seen on the other.
    """

    def __init__(self, reach: Reach, hosts: Sequence[str], token: str):
        self._reach, self._hosts, self._request = reach, hosts[:2], Request(token, "count")
        self._every = _LOOK_SECONDS if all(map(is_this_host, self._hosts)) else _LOOK_ELSEWHERE_SECONDS
        self._next = time.monotonic() + self._every
        self._have_been: set[str] = set()
        self._missing_since: dict[str, float] = {}

    def says_ended(self) -> bool:
        """Looks now and then; True when the launcher is not to be waited for any longer."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._every
        answers = self._reach.ask(self._hosts, self._request)
        missing = [host for host, found in answers.items() if self._is_missing(host, found, now)]  # asked of every one
        # Where ssh fails and another host has ranks, all may be well.
        some_are_seen = any(found.ranks for found in answers.values() if found)
        return any(answers[host] is not None or not some_are_seen for host in missing)

    def _is_missing(self, host: str, found: Found | None, now: float) -> bool:
        if found is not None and found.ranks:
            self._have_been.add(host)
            self._missing_since.pop(host, None)
            return False
        if host not in self._have_been:
            return False
        since = self._missing_since.setdefault(host, now)
        return now - since > (_UNREACHABLE_SECONDS if found is None else _GONE_SECONDS)
