"""A container engine of a test's own: podman with its storage, networks and settings in one directory.

Images start from a clean root that debootstrap makes, where a registry is out of reach.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
_PROGRAMS = ("podman", "runc", "debootstrap", "iptables")
_NETWORK_PROGRAMS = (Path("/usr/lib/podman/netavark"), Path("/usr/lib/podman/aardvark-dns"))


def _missing() -> str:
    programs = [name for name in _PROGRAMS if shutil.which(name) is None]
    programs += [path.name for path in _NETWORK_PROGRAMS if not path.exists()]
    return ", ".join(["root"] * (os.geteuid() != 0) + programs)


needs_engine = pytest.mark.skipif(bool(_missing()), reason=f"needs {_missing()}")


@dataclass(frozen=True)
class Engine:
    """Runs podman; every failure of it fails the test, with what it said."""

    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        """Where podman, and what calls podman, finds the settings."""
        return {
            **os.environ,
            "CONTAINERS_CONF": str(self.directory / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.directory / "storage.conf"),
            # Health checks are run by systemd's timers, where there is systemd.
            "DISABLE_HC_SYSTEMD": "true",
        }

    def podman(self, *arguments: str, timeout: float = 60, check: bool = True) -> str:
        """`podman ARGUMENTS`; returns what it printed."""
        done = subprocess.run(
            ["podman", *arguments],
            env=self.environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if check:
            assert done.returncode == 0, f"podman {shlex.join(arguments)}:\n{done.stdout[-8000:]}"
        return done.stdout

    def run(self, *arguments: str, check: bool = True) -> str:
        """Run a container that is gone when it has ended, and that has no network."""
        return self.podman("run", "--rm", "--network=none", *arguments, timeout=400, check=check)

    def import_debian(self, release: str, tag: str) -> None:
        """Make `tag` an image of nothing but Debian's minimal system."""
        root = self.directory / "debian"
        subprocess.run(["debootstrap", "--variant=minbase", release, root], check=True, stdout=subprocess.DEVNULL)
        with subprocess.Popen(["tar", "--directory", root, "--create", "."], stdout=subprocess.PIPE) as tar:
            subprocess.run(
                ["podman", "import", "--quiet", "-", tag], env=self.environment, stdin=tar.stdout, check=True
            )
        assert tar.returncode == 0
        shutil.rmtree(root)

    def build(self, dockerfile: Path, tag: str, *, context: Path = ROOT, **arguments: str) -> None:
        """Build an image of what is here alone, with this host's way to the package index."""
        pip = self.directory / "pip.conf"
        mounts = _write_pip_settings(pip) | {pip: Path("/etc/pip.conf")}
        self.podman(
            "build",
            # Docker's format: the other one has no HEALTHCHECK. Steps run in a chroot on the host's network.
            *("--format=docker", "--isolation=chroot", "--network=host", "--pull-never"),
            *(f"--volume={here}:{there}:ro" for here, there in mounts.items()),
            *(f"--build-arg={name}={value}" for name, value in arguments.items()),
            *(f"--file={dockerfile}", f"--tag={tag}", str(context)),
            timeout=1800,
        )

    def inspect(self, image: str) -> dict[str, Any]:
        """The image's configuration."""
        return json.loads(self.podman("image", "inspect", image))[0]


@contextmanager
def engine(directory: Path) -> Iterator[Engine]:
    """An engine whose containers, networks, mounts and files are gone in the end."""
    (directory / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{directory}/storage"\nrunroot = "{directory}/run"\n'
    )
    # runc, since crun refuses hosts with both kinds of control groups; limits that need no privilege.
    (directory / "containers.conf").write_text(
        f"""\
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
static_dir = "{directory}/libpod"
tmp_dir = "{directory}/run/libpod"
volume_path = "{directory}/volumes"
[network]
network_backend = "netavark"
network_config_dir = "{directory}/networks"
"""
    )
    made = Engine(directory)
    # A test that is ended from outside cleans up as after Ctrl-C.
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield made
    finally:
        for command in (("rm", "--all", "--force", "--time=0"), ("network", "prune", "--force")):
            made.podman(*command, check=False)
        made.podman("image", "rm", "--all", "--force", check=False, timeout=300)
        for line in reversed(Path("/proc/mounts").read_text().splitlines()):
            if (target := line.split()[1]).startswith(f"{directory}/"):
                subprocess.run(["umount", "--lazy", target], check=True)
        shutil.rmtree(directory)
        signal.signal(signal.SIGTERM, handler)


def _write_pip_settings(path: Path) -> dict[Path, Path]:
    """Write what pip uses on this host, by its files or the environment; returns what must be mounted where for it."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    settings, mounts = {}, {}
    for line in listed.splitlines():  # those of the environment come last, and win
        name, _, value = line.partition("=")
        words = value.strip("'\"").replace("\\n", " ").split()
        for number, word in enumerate(words):
            scheme, local = ("file://", word[7:]) if word.startswith("file://") else ("", word)
            if local.startswith("/") and Path(local).exists():
                # Not at the same place: Debian's packages write the certificates anew. And the directory around an
                # index, since links in it may lead there.
                mounted = Path(local).parent if scheme else Path(local)
                mounts[mounted] = Path(f"/host{mounted}")
                words[number] = f"{scheme}/host{local}"
        settings[name.rpartition(".")[2]] = " ".join(words)
    path.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    return mounts
