"""`megatron-tied prepare-data`: text to a Megatron indexed data set."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from megatron_tied.cli.options import Subparsers, positive

if TYPE_CHECKING:
    from megatron_tied.data.prepare import Prepared

_DESCRIPTION = """\
Tokenise text into PREFIX.bin and PREFIX.idx, which Megatron-Core's GPT data sets read, with their description
in PREFIX.json. Inputs are text files (one document each), JSON Lines (.jsonl, .ndjson, .json: one document a
line), each also as .gz or .zst, and directories, which are searched for prose, source code and JSON Lines;
hidden files are passed over. Or a data set of Hugging Face's `datasets` is streamed: an interrupted run is gone
on with by the same command. Nothing appears under PREFIX before all of it is complete.
"""
_STREAM_ONLY = ("dataset_config", "dataset_revision", "split", "max_tokens", "max_rows", "skip_rows", "shuffle_files")


def add_parser(subparsers: Subparsers) -> None:
    """Add the `prepare-data` command."""
    parser = subparsers.add_parser("prepare-data", help="tokenise text for training", description=_DESCRIPTION)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="FILE", help="text files or directories")
    source.add_argument(
        "--dataset", metavar="NAME", help="a data set on the Hugging Face hub, or a directory of Parquet or JSON Lines"
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path and name of the data set")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="a SentencePiece model file, a Hugging Face directory or tokenizer.json, or tiktoken:NAME",
    )
    tokenizer.add_argument(
        "--train-tokenizer",
        action="store_true",
        help="train one on the inputs, as PREFIX.model (needs --vocab-size)",
    )
    parser.add_argument("--vocab-size", type=int, metavar="N", help="pieces of the tokenizer to train")
    parser.add_argument(
        "--sample-mib",
        type=positive,
        default=8,
        metavar="M",
        help="MiB of text to train the tokenizer on, sampled from all inputs; it takes some 25 times as much "
        "memory, 100 times for languages without spaces (default: 8)",
    )
    parser.add_argument(
        "--jsonl-key",
        "--text-key",
        default="text",
        metavar="KEY",
        help="where a record or row has its text (default: text); of a data set also nested, such as turns.text",
    )
    parser.add_argument(
        "--separator",
        choices=("after", "before"),
        default="after",
        help="where each document has its one separator (default: after it)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per usable CPU)")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that exists, or begin it anew")
    stream = parser.add_argument_group("with --dataset")
    stream.add_argument("--dataset-config", metavar="NAME", help="which of its configs")
    stream.add_argument("--dataset-revision", metavar="COMMIT", help="which version on the hub (default: the newest)")
    stream.add_argument("--split", metavar="NAME", help="which split (default: train)")
    stream.add_argument("--max-tokens", type=int, metavar="N", help="stop when so many, or a few more, are written")
    stream.add_argument("--max-rows", type=int, metavar="N", help="stop after so many rows")
    stream.add_argument("--skip-rows", type=int, metavar="N", help="pass over the first rows (default: 0)")
    stream.add_argument(
        "--shuffle-files", type=int, metavar="SEED", help="draw the order of its files (default: as they are)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prepare the data and print a summary; 1 when the machine failed, 130 when interrupted."""
    from concurrent.futures.process import BrokenProcessPool

    state = "no data set was written" if args.dataset is None else "the same command goes on where it was saved"
    try:
        prepared = _prepared(args)
    except KeyboardInterrupt:
        return _failed(f"interrupted; {state}", 130)
    except BrokenProcessPool:
        reason = "a worker process was killed, perhaps for want of memory; try fewer --workers"
        return _failed(f"{reason}; {state}", 1)
    except OSError as error:
        return _failed(f"{error}; {state}", 1)
    print(_summary(args, prepared))
    return 0


def _prepared(args: argparse.Namespace) -> Prepared:
    from megatron_tied.data.prepare import prepare_data, prepare_dataset
    from megatron_tied.data.stream import Request
    from megatron_tied.errors import ConfigError, Problem

    given = {name: getattr(args, name) for name in _STREAM_ONLY if getattr(args, name) is not None}
    if args.dataset is None:
        if given:
            raise ConfigError([Problem(f"--{k.replace('_', '-')}", v, "needs --dataset") for k, v in given.items()])
        return prepare_data(
            args.input,
            args.output,
            tokenizer=args.tokenizer,
            vocab_size=args.vocab_size,
            jsonl_key=args.jsonl_key,
            workers=args.workers,
            overwrite=args.overwrite,
            sample_bytes=int(args.sample_mib * 2**20),
            separator=args.separator,
        )
    if args.train_tokenizer:
        raise ConfigError(
            Problem("--train-tokenizer", True, "needs --input: train one on a sample of the text in files")
        )
    request = Request(
        args.dataset,
        config=args.dataset_config,
        split=args.split or "train",
        revision=args.dataset_revision,
        text_key=args.jsonl_key,
        shuffle_files=args.shuffle_files,
        skip_rows=args.skip_rows or 0,
        max_rows=args.max_rows,
    )
    return prepare_dataset(
        request,
        args.output,
        tokenizer=args.tokenizer,
        max_tokens=args.max_tokens,
        workers=args.workers,
        overwrite=args.overwrite,
        separator=args.separator,
    )


def _summary(args: argparse.Namespace, prepared: Prepared) -> str:
    data = prepared.metadata
    bytes_per_token = data.source_bytes / data.tokens
    lines = [
        f"Prepared {args.output}.bin, .idx and .json",
        f"  documents   {data.documents:,}",
        f"  text        {data.source_bytes:,} bytes",
        f"  tokens      {data.tokens:,} of {data.dtype}, each {bytes_per_token:.2f} bytes of text",
        f"  vocabulary  {data.vocab_size:,}; separator {data.eod}, largest id {data.max_token_id}",
        f"  tokenizer   {prepared.tokenizer}",
        f"  time        {prepared.seconds:.1f} s, {prepared.text_bytes / prepared.seconds / 1e6:.1f} MB/s "
        f"with {prepared.workers} worker{'s' * (prepared.workers > 1)}",
    ]
    if prepared.text_bytes < data.source_bytes:
        lines.append(f"  before      {data.source_bytes - prepared.text_bytes:,} bytes, of runs that were interrupted")
    if args.max_tokens is not None and data.tokens < args.max_tokens:
        lines.append(f"  short       the rows ended before {args.max_tokens:,} tokens")
    if data.skipped_records:
        lines.append(f"  skipped     {data.skipped_records:,} records, first {prepared.first_skipped}")
    if data.empty_records:
        lines.append(f"  empty       {data.empty_records:,} records")
    if data.replaced_characters:
        lines.append(f"  replaced    {data.replaced_characters:,} sequences that are not UTF-8, by U+FFFD")
    return "\n".join(lines)


def _failed(reason: str, code: int) -> int:
    print(f"megatron-tied prepare-data: {reason}", file=sys.stderr)
    return code
