"""The text of a data set of Hugging Face's `datasets`, on its hub or in a local directory, streamed from any row on."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_tied.data.sources import CHUNK_BYTES, Chunk
from megatron_tied.errors import ConfigError, Problem

if TYPE_CHECKING:
    from datasets import DatasetBuilder

TEXT = "text"
# Their files are data. Other kinds are no text, or may hold what runs code when it is read.
_KINDS = ("parquet", "json", "csv", "arrow")


@dataclass(frozen=True)
class Request:
    """Which rows of a data set, and what text of them, in which order.

    `text_key` is a column, or a path into nested columns such as `turns.text`, of which each text is a document.
    `shuffle_files` is the seed that the order of the files is drawn with; None leaves it as it is. Of the rows in that
    order the first `skip_rows` are passed over and at most `max_rows` are read.
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    text_key: str = TEXT
    shuffle_files: int | None = None
    skip_rows: int = 0
    max_rows: int | None = None


class Position(NamedTuple):
    """The next row to read: in which file, in the order drawn, which row of it, and how many rows come before it."""

    file: int
    row: int
    rows: int


class Stream:
    """An opened `Request`. `files_sha256` changes with the files of the data set, also where they are on the hub.

    Raises `ConfigError` for a data set, config, split or key that is not there, and OSError without a connection.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        builder = _builder(request)
        files = builder.config.data_files[request.split]
        identity = ([str(file) for file in files], files.origin_metadata)
        self.files_sha256 = hashlib.sha256(repr(identity).encode()).hexdigest()
        self._rows = builder.as_streaming_dataset(split=request.split)
        column = _check_key(self._rows, request.text_key)
        if hasattr(builder.config, "columns"):
            # Of parquet files only that column is downloaded.
            builder.config.columns = [column]
            self._rows = builder.as_streaming_dataset(split=request.split)
        self._order = list(range(self._rows.num_shards))
        if request.shuffle_files is not None:
            random.Random(request.shuffle_files).shuffle(self._order)

    def identity(self) -> dict[str, object]:
        """What decides about the text, as JSON; a revision is told by its files."""
        asked = asdict(self.request)
        del asked["revision"]
        return asked | {"files_sha256": self.files_sha256}

    def chunks(self, after: tuple[int, ...] | None) -> Iterator[Chunk]:
        """The texts from position `after` on, as JSON Lines with the key "text"; where they are cut depends on `after`.

        A row that has no text becomes a record without one. Raises OSError when the data set cannot be read.
        """
        lines: list[bytes] = []
        size = 0
        first = start = position = Position(*after) if after else Position(0, 0, 0)
        for position, value in self._from(first):
            texts = list(_texts(value, self.request.text_key.split("."))) or [None]
            lines += [json.dumps({TEXT: text}).encode() + b"\n" for text in texts]
            size += sum(map(len, lines[-len(texts) :]))
            if size >= CHUNK_BYTES:
                yield self._chunk(lines, start, position)
                lines, size, start = [], 0, position
        if lines:
            yield self._chunk(lines, start, position)

    def _from(self, position: Position) -> Iterator[tuple[Position, Mapping[str, object]]]:
        """Rows, each with the position after it."""
        skip, most = self.request.skip_rows, self.request.max_rows
        end = float("inf") if most is None else skip + most
        file, first, rows = position
        try:
            for number, shard in enumerate(self._order[file:], file):
                of_file = iter(self._rows.shard(len(self._order), shard))
                for row, value in enumerate(islice(of_file, first, None), first + 1):
                    if rows >= end:
                        return
                    rows += 1
                    if rows > skip:
                        yield Position(number, row, rows), value
                first = 0
        except OSError:
            raise
        except Exception as error:  # of whichever library reads the files or the network
            raise OSError(f"reading {self.request.dataset}: {type(error).__name__}: {error}") from error

    def _chunk(self, lines: list[bytes], start: Position, position: Position) -> Chunk:
        data = b"".join(lines)
        place = f"{self.request.dataset} after row {start.rows}"
        return Chunk(data, place, True, 1, True, True, len(data), tuple(position))


def _builder(request: Request) -> DatasetBuilder:
    try:
        from datasets import load_dataset_builder
        from datasets.exceptions import DatasetNotFoundError
        from datasets.utils.logging import disable_progress_bar
    except ImportError:
        valid = "needs datasets: pip install 'megatron-tied[paper]'"
        raise ConfigError(Problem("--dataset", request.dataset, valid)) from None
    disable_progress_bar()
    # A directory by its full path cannot be taken for a name on the hub.
    local = Path(request.dataset)
    name = str(local.absolute()) if local.is_dir() else request.dataset
    try:
        builder = load_dataset_builder(name, request.config, revision=request.revision)
    except (DatasetNotFoundError, FileNotFoundError, ValueError, TypeError) as error:
        where = f" with --dataset-config {request.config}" if request.config else ""
        valid = f"cannot be opened{where}: {error}"
        raise ConfigError(Problem("--dataset", request.dataset, valid)) from None
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in _KINDS:
        raise ConfigError(
            Problem("--dataset", request.dataset, f"must have files of {', '.join(_KINDS)}; its are {kind}")
        )
    splits = list(map(str, builder.config.data_files))
    if request.split not in splits:
        raise ConfigError(Problem("--split", request.split, f"must be one of {', '.join(splits)}"))
    return builder


def _check_key(rows: Iterable[Mapping[str, object]], key: str) -> str:
    """The column that `key` begins with; `ConfigError` when the first row has no text there."""
    column, *inner = key.split(".")
    first: Mapping[str, object] = next(iter(rows), {})
    if column not in first or not any(isinstance(text, str) for text in _texts(first[column], inner)):
        texts = ", ".join(sorted(_text_keys(first))) or "none"
        raise ConfigError(Problem("--text-key", key, f"must be a key of text; the first row has {texts}"))
    return column


def _texts(value: object, path: list[str]) -> Iterator[object]:
    """What is at `path`, of every item where there is a list."""
    if isinstance(value, list):
        for item in value:
            yield from _texts(item, path)
    elif path and isinstance(value, dict):
        yield from _texts(value.get(path[0]), path[1:])
    else:
        yield None if path else value


def _text_keys(value: object, prefix: str = "") -> set[str]:
    """Every key of text, with dots where it is nested."""
    if isinstance(value, list):
        return set().union(*(_text_keys(item, prefix) for item in value))
    if isinstance(value, dict):
        return set().union(*(_text_keys(item, f"{prefix}.{key}".lstrip(".")) for key, item in value.items()))
    return {prefix} if isinstance(value, str) else set()
