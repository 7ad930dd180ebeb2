"""Does every host read the same data sets?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from megatron_tied.data.adapters import vocabulary_file
from megatron_tied.data.checks import parse_blend
from megatron_tied.data.metadata import with_suffix
from megatron_tied.doctor.findings import Finding, Level, differences, hosts_by_value, minority
from megatron_tied.doctor.world import World
from megatron_tied.errors import listed
from megatron_tied.exchange import gather_json
from megatron_tied.training.config import RunConfig

NAME = "data"
# Of tokens beyond this size only samples are read: at a GB/s the whole of a large data set takes an hour.
_WHOLE_BYTES = 1 << 30
_BLOCK_BYTES, _BLOCKS = 1 << 20, 64
_SUM, _MISSING = "sha256", "missing"


def check_data_files(world: World, config: RunConfig) -> list[Finding]:
    """Compare the checksums of all files of the run's data; each host's ranks share the reading. A collective."""
    paths = data_files(config)
    here = world.ranks_of[world.host]
    gathered = gather_json([checksum(path) for path in paths[here.index(world.rank) :: len(here)]])
    found = {
        str(path): {host: gathered[ranks[n % len(ranks)]][n // len(ranks)] for host, ranks in world.ranks_of.items()}
        for n, path in enumerate(paths)
    }
    return judge(found)


def data_files(config: RunConfig) -> list[Path]:
    """The files of every data set, and the tokenizer's."""
    data = config.data
    blends = {"data.train": data.train, "data.validation": data.validation}
    prefixes = [
        prefix for field, blend in blends.items() if blend is not None for prefix in parse_blend(blend, field).prefixes
    ]
    files = [with_suffix(prefix, suffix) for prefix in prefixes for suffix in (".bin", ".idx", ".json")]
    vocabulary = None if data.tokenizer is None else vocabulary_file(data.tokenizer)
    return list(dict.fromkeys([*files, *([] if vocabulary is None else [vocabulary.absolute()])]))


def checksum(path: Path) -> str:
    """The size and the SHA-256 of a file, of 64 blocks of 1 MiB if its tokens are more than 1 GiB; or what is wrong."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if path.suffix != ".bin" or size <= _WHOLE_BYTES:
                return f"{size:,} bytes, {_SUM} {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
            sampled = hashlib.sha256()
            for number in range(_BLOCKS):
                file.seek((size - _BLOCK_BYTES) * number // (_BLOCKS - 1))
                sampled.update(file.read(_BLOCK_BYTES))
            return f"{size:,} bytes, {_SUM} of {_BLOCKS} blocks {sampled.hexdigest()[:16]}"
    except FileNotFoundError:
        return _MISSING
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def judge(found: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Findings from what each host says of each path."""
    findings = []
    for path, of_hosts in found.items():
        said = hosts_by_value(of_hosts)
        first = next(iter(said))
        # PREFIX.json is what prepare-data knows of a data set: Megatron's own tools do not write it.
        if len(said) == 1 and (_SUM in first or (first == _MISSING and path.endswith(".json"))):
            continue
        what = f"{path}: {differences(said)}"
        remedy = "copy the file anew from where it is right" if len(said) > 1 else "copy it there, or mend its name"
        findings.append(Finding(NAME, Level.ERROR, what, minority(said) or tuple(of_hosts), remedy))
    if findings:
        return findings
    sampled = [Path(path).name for path, of_hosts in found.items() if "blocks" in next(iter(of_hosts.values()))]
    hosts = len(next(iter(found.values())))
    how = f"; of {listed(sampled)} only the size and {_BLOCKS} blocks of 1 MiB" if sampled else ""
    same = "equal on all hosts" if hosts > 1 else "can be read"
    return [Finding(NAME, Level.OK, f"{len(found)} files {same}{how}")]
