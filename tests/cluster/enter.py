"""Runs a command among a node's processes: `enter.py PID DIRECTORY COMMAND ...`, PID being one of them.

nsenter does so too, but neither hands on signals nor ends what it has started when it is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_NAMESPACES = ("ipc", "uts", "net", "pid", "mnt")  # the last takes the view of the others away
_PARENT_DEATH_SIGNAL = 1
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    target, directory, *command = sys.argv[1:]
    opened = [os.open(f"/proc/{target}/ns/{name}", os.O_RDONLY) for name in _NAMESPACES]
    for namespace in opened:
        if _libc.setns(namespace, 0):
            raise OSError(ctypes.get_errno(), "setns")
    # Only children live in the process namespace that was entered.
    child = os.fork()
    if child == 0:
        _libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        os.chdir(directory)
        os.execvp(command[0], command)  # found on the PATH of the node
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: os.kill(child, number))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    code = main()
    sys.exit(code if code >= 0 else 128 - code)
