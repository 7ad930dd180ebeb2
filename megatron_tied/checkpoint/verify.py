"""A whole checkpoint compared with its checksums, by one process. Without torch."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from megatron_tied.checkpoint.manifest import Manifest


def verify(directory: Path, manifest: Manifest) -> None:
    """Read every file of the checkpoint in `directory`. Raises `BrokenCheckpointError` for a damaged one."""
    size = sum(file.bytes for file in manifest.files.values())
    with tqdm(total=size, desc="verifying", unit="B", unit_scale=True, leave=False, disable=None) as progress:
        for name, file in manifest.files.items():
            manifest.check_file(directory, name)
            progress.update(file.bytes)
