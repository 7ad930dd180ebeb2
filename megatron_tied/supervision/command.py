"""The command that starts a run: what the launcher is told, and what the run is."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tied.doctor.hostfile import read_hostfile
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.pretrain import read_arguments
from megatron_tied.training.config import RunConfig
from megatron_tied.training.config_file import load_config
from megatron_tied.training.launcher import TOKEN_OPTION

_MODULE = "megatron_tied.pretrain"
_LAUNCHER = "deepspeed"
_USUAL_HOSTFILE = Path("/job/hostfile")  # the deepspeed launcher's own default
_HOSTFILE = ("-H", "--hostfile")
_MASTER = ("--master_addr",)
_RANKS = ("--num_gpus", "--num_accelerators")  # on each host, whatever the hostfile says
_PORT = ("--ssh_port",)
# They choose among hosts too, and would name some that are gone.
_CHOOSING = ("-i", "--include", "-e", "--exclude", "--num_nodes", "--no_ssh", "--node_rank")


@dataclass(frozen=True)
class LaunchCommand:
    """`launcher` starts the run of `config` with `arguments`, on `hosts` with their slots; none: on this host alone."""

    launcher: tuple[str, ...]
    arguments: tuple[str, ...]
    config: RunConfig
    hosts: dict[str, int]

    @classmethod
    def parse(cls, words: Sequence[str]) -> LaunchCommand:
        """Take a command line apart. Raises `ConfigError`, also for what is wrong with the config or the hostfile."""
        if _MODULE not in words:
            valid = f"must be a launcher's command with --module {_MODULE}"
            raise ConfigError(Problem("COMMAND", " ".join(words), valid))
        if shutil.which(words[0]) is None:
            raise ConfigError(Problem("COMMAND", words[0], "must be a program: it is not found"))
        at = list(words).index(_MODULE)
        launcher, arguments = tuple(words[: at + 1]), tuple(words[at + 1 :])
        parsed = read_arguments(arguments)
        config = load_config(parsed.config, parsed.overrides)
        return cls(launcher, arguments, config, _hosts(launcher))

    def words(self, token: str, hosts: dict[str, int], hostfile: Path | None) -> list[str]:
        """The command line for `hosts`, those in `hostfile`; every process that it starts has `token` in its own."""
        launcher = list(self.launcher)
        if hostfile is not None:
            launcher = _without(launcher, _HOSTFILE)
            if next(iter(hosts)) != next(iter(self.hosts)):
                launcher = _without(launcher, _MASTER)  # it is an address of a host that is gone
            # With one host left the launcher would start the run here, whichever host that is.
            launcher[1:1] = ["--hostfile", str(hostfile), "--force_multi"]
        return [*launcher, *self.arguments, TOKEN_OPTION, token]

    @property
    def ssh_port(self) -> str | None:
        """The port of the hosts' ssh servers, if the launcher is told one."""
        return _value(self.launcher, _PORT)


def _hosts(launcher: Sequence[str]) -> dict[str, int]:
    if Path(launcher[0]).name != _LAUNCHER:
        return {}
    named = _value(launcher, _HOSTFILE)
    if named is None and not _USUAL_HOSTFILE.is_file():
        return {}
    for option in _CHOOSING:
        if _value(launcher, (option,)) is not None or option in launcher:
            valid = "must be left out under supervision: let the hostfile name the hosts to be used"
            raise ConfigError(Problem(option, _value(launcher, (option,)), valid))
    hosts = read_hostfile(Path(named) if named is not None else _USUAL_HOSTFILE)
    ranks = _value(launcher, _RANKS)
    return dict.fromkeys(hosts, int(ranks)) if ranks and ranks.isdigit() else hosts


def _value(words: Sequence[str], names: Sequence[str]) -> str | None:
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else next(iter(words[at + 1 :]), None)
    return None


def _without(words: Sequence[str], names: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
            continue
        name, equals, _ = word.partition("=")
        if name in names:
            skip = not equals
            continue
        kept.append(word)
    return kept
