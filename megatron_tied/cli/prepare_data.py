"""`megatron-tied prepare-data`: text to a Megatron indexed data set."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_tied.data.prepare import Prepared

_DESCRIPTION = """\
Tokenise text into PREFIX.bin and PREFIX.idx, which Megatron-Core's GPT data sets read, with their description
in PREFIX.json. Inputs are text files (one document each), JSON Lines (.jsonl, .ndjson, .json: one document a
line), each also as .gz or .zst, and directories, which are searched for prose, source code and JSON Lines;
hidden files are passed over. Nothing appears under PREFIX before all of it is complete.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `prepare-data` command."""
    parser = subparsers.add_parser("prepare-data", help="tokenise text for training", description=_DESCRIPTION)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="text files or directories")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path and name of the data set")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", metavar="MODEL", help="a SentencePiece model file")
    tokenizer.add_argument(
        "--train-tokenizer",
        action="store_true",
        help="train one on the inputs, as PREFIX.model (needs --vocab-size)",
    )
    parser.add_argument("--vocab-size", type=int, metavar="N", help="pieces of the tokenizer to train")
    parser.add_argument(
        "--sample-mib",
        type=float,
        default=8,
        metavar="M",
        help="MiB of text to train the tokenizer on, sampled from all inputs; it takes some 25 times as much "
        "memory, 100 times for languages without spaces (default: 8)",
    )
    parser.add_argument(
        "--jsonl-key", default="text", metavar="KEY", help="where a record has its text (default: text)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per usable CPU)")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prepare the data and print a summary; 1 when the machine failed, 130 when interrupted."""
    from concurrent.futures.process import BrokenProcessPool

    from megatron_tied.data.prepare import prepare_data

    try:
        prepared = prepare_data(
            args.input,
            args.output,
            tokenizer=args.tokenizer,
            vocab_size=args.vocab_size,
            jsonl_key=args.jsonl_key,
            workers=args.workers,
            overwrite=args.overwrite,
            sample_bytes=int(args.sample_mib * 2**20),
        )
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    except BrokenProcessPool:
        return _failed("a worker process was killed, perhaps for want of memory; try fewer --workers", 1)
    except OSError as error:
        return _failed(str(error), 1)
    print(_summary(args.output, prepared))
    return 0


def _summary(output: str, prepared: Prepared) -> str:
    data = prepared.metadata
    bytes_per_token = data.source_bytes / data.tokens
    lines = [
        f"Prepared {output}.bin, .idx and .json",
        f"  documents   {data.documents:,}",
        f"  text        {data.source_bytes:,} bytes",
        f"  tokens      {data.tokens:,} of {data.dtype}, each {bytes_per_token:.2f} bytes of text",
        f"  vocabulary  {data.vocab_size:,}; separator {data.eod}, largest id {data.max_token_id}",
        f"  tokenizer   {prepared.tokenizer}",
        f"  time        {prepared.seconds:.1f} s, {data.source_bytes / prepared.seconds / 1e6:.1f} MB/s "
        f"with {prepared.workers} worker{'s' * (prepared.workers > 1)}",
    ]
    if data.skipped_records:
        lines.append(f"  skipped     {data.skipped_records:,} records, first {prepared.first_skipped}")
    if data.empty_records:
        lines.append(f"  empty       {data.empty_records:,} records")
    if data.replaced_characters:
        lines.append(f"  replaced    {data.replaced_characters:,} sequences that are not UTF-8, by U+FFFD")
    return "\n".join(lines)


def _failed(reason: str, code: int) -> int:
    print(f"megatron-tied prepare-data: {reason}; no data set was written", file=sys.stderr)
    return code
