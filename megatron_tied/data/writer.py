"""Megatron-Core's indexed data set, written batch by batch, and saved on the way where that is asked for."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_tied.data.adapters import Tokenizer
from megatron_tied.data.encode import Encoded, Place
from megatron_tied.data.metadata import Metadata
from megatron_tied.data.sources import Tally
from megatron_tied.data.staging import Staging

# A Megatron index counts the tokens of a sequence in int32.
_MAX_SEQUENCE_TOKENS = 2**31 - 1


class Writer:
    """Megatron-Core's indexed data set builder, fed with batches; a document's pieces become one sequence.

    It goes on where `staging.saved` tells of an earlier one; `position` is that of the last batch saved, or None.
    """

    def __init__(self, staging: Staging, tokenizer: Tokenizer) -> None:
        from megatron_tied import platform

        platform.prepare()
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self._staging = staging
        self._tokenizer = tokenizer
        self._dtype = np.dtype(DType.optimal_dtype(tokenizer.vocab_size))
        # The builder empties the file that it is given.
        self._builder = IndexedDatasetBuilder("/dev/null", dtype=self._dtype.type)
        self._builder.data_file.close()
        self._builder.data_file = staging.path(".bin").open("ab")
        # The builder's lists would take some 40 bytes for each number; a corpus has many short documents.
        self._builder.sequence_lengths = array("i")
        self._builder.document_indices = array("q", [0])
        self._inside_document = False
        self._saved_lengths = 0
        self.documents = 0
        self.tokens = 0
        self.max_token_id = -1
        self.tally = Tally()
        self.position: tuple[int, ...] | None = None
        if staging.saved is not None:
            self._restore(**staging.saved)

    def add(self, batch: Encoded) -> None:
        """Append the documents of `batch`, or the pieces that it has of one."""
        import torch

        ids = torch.from_numpy(batch.ids)
        start = 0
        for length, ends in zip(batch.lengths, batch.ends, strict=True):
            self._builder.add_item(ids[start : start + length])
            start += length
            if self._inside_document:
                self._join_last_two()
            if ends:
                self._builder.end_document()
                self.documents += 1
            self._inside_document = not ends
        if start:
            self.max_token_id = max(self.max_token_id, int(batch.ids.max()))
        self.tokens += start
        self.tally.add(batch.tally)

    def save(self, position: tuple[int, ...]) -> None:
        """Save what was added, of sources whose documents are one sequence each, up to `position` of the source."""
        self._builder.data_file.flush()
        with self._staging.path(".lengths").open("ab") as file:
            self._builder.sequence_lengths[self._saved_lengths :].tofile(file)
        self._saved_lengths = len(self._builder.sequence_lengths)
        tally = asdict(self.tally)
        counts = {"documents": self.documents, "tokens": self.tokens, "max_token_id": self.max_token_id}
        self._staging.save({"position": position, "tally": tally, "counts": counts})

    def finish(self, tokenizer_name: str, separator: Place, source: Mapping[str, object] | None) -> Metadata:
        """Write the index, and the metadata, of which it returns the content; the builder closes its files."""
        self._builder.finalize(str(self._staging.path(".idx")))
        metadata = Metadata(
            documents=self.documents,
            tokens=self.tokens,
            max_token_id=self.max_token_id,
            vocab_size=self._tokenizer.vocab_size,
            eod=self._tokenizer.eod,
            dtype=self._dtype.name,
            tokenizer=tokenizer_name,
            tokenizer_sha256=self._tokenizer.sha256,
            source_bytes=self.tally.text_bytes,
            skipped_records=self.tally.skipped,
            empty_records=self.tally.empty,
            replaced_characters=self.tally.replaced,
            separator=separator,
            source=source,
        )
        metadata.write(self._staging.path(".json"))
        return metadata

    def _restore(self, position: list[int], tally: Mapping[str, Any], counts: Mapping[str, int]) -> None:
        self.position = tuple(position)
        self.tally = Tally(**tally)
        self.documents, self.tokens, self.max_token_id = (
            counts[key] for key in ("documents", "tokens", "max_token_id")
        )
        lengths = self._builder.sequence_lengths
        lengths.frombytes(self._staging.path(".lengths").read_bytes())
        self._saved_lengths = len(lengths)
        self._builder.document_indices.extend(range(1, len(lengths) + 1))

    def _join_last_two(self) -> None:
        # GPT data sets shuffle and split sequences, whatever document they are of.
        lengths = self._builder.sequence_lengths
        if lengths[-2] + lengths[-1] <= _MAX_SEQUENCE_TOKENS:
            last = lengths.pop()
            lengths[-1] += last
