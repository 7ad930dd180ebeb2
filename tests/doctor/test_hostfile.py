"""Hostfiles: what the deepspeed launcher takes, but for what ssh and shells would take for something else."""

from __future__ import annotations

from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from megatron_tied.doctor.hostfile import read_hostfile
from megatron_tied.errors import ConfigError


def write(directory: Path, text: str) -> Path:
    path = directory / "hostfile"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "node0 slots=8\nnode1 slots=4\n",
        "# two\n\n  10.77.0.1\tslots=2  \nuser@gpu-1.example.org   slots=16",
    ],
)
def test_as_the_launcher_reads_it(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    assert list(read_hostfile(path).items()) == list(fetch_hostfile(str(path)).items())


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", ["--hostfile = '{}': must name at least one host, such as: node0 slots=8"]),
        ("# node0 slots=2\n", ["--hostfile = '{}': must name at least one host, such as: node0 slots=8"]),
        (
            "node0\nnode1 slots=2 \nnode2 slots=two\n",
            [
                "--hostfile {}:1 = 'node0': must be HOST slots=NUMBER, such as: node0 slots=8",
                "--hostfile {}:3 = 'node2 slots=two': must be HOST slots=NUMBER, such as: node0 slots=8",
            ],
        ),
        ("node0 slots=1\nnode0 slots=2\n", ["--hostfile {}:2 = 'node0': must be named once only"]),
        ("node0 slots=0\n", ["--hostfile {}:1 = 'node0 slots=0': must have at least one slot"]),
        ("node0;reboot slots=2\n", ["--hostfile {}:1 = 'node0;reboot': must be the name or the address of a host"]),
        ("$(reboot) slots=2\n", ["--hostfile {}:1 = '$(reboot)': must be the name or the address of a host"]),
        (
            "-oProxyCommand=x slots=2\n",
            ["--hostfile {}:1 = '-oProxyCommand=x': must be the name or the address of a host"],
        ),
    ],
)
def test_every_line_that_is_wrong_is_told(tmp_path: Path, text: str, lines: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as told:
        read_hostfile(path)
    assert [str(problem) for problem in told.value.problems] == [line.format(path) for line in lines]


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path / "hostfile")
