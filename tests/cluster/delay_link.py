"""A slow cable: `delay_link.py TAP TAP MILLISECONDS` makes two interfaces and carries frames between them, late.

What netem does, which not every kernel has.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

_SET_INTERFACE, _TAP_WITHOUT_HEADER = 0x400454CA, 0x1002
_FRAME = 65536


def main() -> None:
    ends = _open(sys.argv[1]), _open(sys.argv[2])
    delay = float(sys.argv[3]) / 1000
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    waiting: deque[tuple[float, int, bytes]] = deque()
    print("ready", flush=True)
    while True:
        patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for end in select.select(ends, (), (), patience)[0]:
            waiting.append((time.monotonic() + delay, other[end], os.read(end, _FRAME)))
        while waiting and waiting[0][0] <= time.monotonic():
            _, end, frame = waiting.popleft()
            os.write(end, frame)


def _open(name: str) -> int:
    end = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(end, _SET_INTERFACE, struct.pack("16sH", name.encode(), _TAP_WITHOUT_HEADER))
    return end


if __name__ == "__main__":
    main()
