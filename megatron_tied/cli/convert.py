"""`megatron-tied convert`: Hugging Face models in and out, tying and untying trained models."""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import fields
from pathlib import Path

from megatron_tied.cli.options import Subparsers
from megatron_tied.cli.terminable import Terminated
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.topology import TieConfig

_DESCRIPTION = """\
Convert a model between a Hugging Face directory and a megatron-tied checkpoint (or a run, whose latest checkpoint is
meant), and tie or untie its layers' experts on the way. Weights are streamed: memory holds a few tensors, with matched
a tie group, but not the model. A checkpoint is compared with its checksums before. At the end the logits of what was
written are compared on random tokens with those of what was to be written, tied and rounded as asked for; --output
appears when all is well, or not at all. hf is for stock classes and servers, with every layer's experts written out;
hf-compact stores each expert bank once and shares it in memory, and is loaded with trust_remote_code=True.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Adds `convert`."""
    told = "Hugging Face models in and out; tie or untie a trained model"
    parser = subparsers.add_parser("convert", help=told, description=_DESCRIPTION)
    parser.add_argument("--from", dest="source", choices=("hf", "megatron-tied"), required=True)
    parser.add_argument("--to", dest="target", choices=("hf", "hf-compact", "megatron-tied"), required=True)
    parser.add_argument("--input", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new, or empty")
    tie = parser.add_argument_group("tying", "without these options the banks stay as they are")
    tie.add_argument(
        "--tie-group-size", type=int, metavar="G", help="MoE layers per tie group; 1 gives each layer its own experts"
    )
    tie.add_argument("--tie-skip-first", type=int, metavar="N", help="untied layers at the beginning (default: 2)")
    tie.add_argument("--tie-skip-last", type=int, metavar="N", help="untied layers at the end (default: 2)")
    tie.add_argument("--tie-pattern", choices=("consecutive", "cyclic"), help="default: consecutive")
    tie.add_argument("--tie-block-size", type=int, metavar="N", help="with cyclic: tie layers that are N apart")
    tie.add_argument("--tie-banks", type=_banks, metavar="0,1,1,2", help="the bank of each MoE layer, in their place")
    tie.add_argument(
        "--tie-method",
        choices=("owner", "average", "matched"),
        default="average",
        help="a bank gets its first layer's experts; the mean of its layers' (default); or what comes nearest to all "
        "of them on calibration text, once those that do alike have met, for which memory must hold the experts of a "
        "tie group and the states of the text",
    )
    tie.add_argument(
        "--calibration", type=Path, metavar="PREFIX", help="text for matched: a data set, as prepare-data makes them"
    )
    tie.add_argument("--calibration-tokens", type=int, metavar="N", help="how much of it is read (default: 8192)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the weights written; auto: as they are stored, or for an export the precision of the training",
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="in place of the model's own: a directory, a SentencePiece model, or none"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare logits at the end")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    tie = _tie(args)
    from megatron_tied.convert.convert import Conversion, convert

    asked = Conversion(
        source_format=args.source,
        target_format=args.target,
        input=args.input,
        output=args.output,
        tie=tie,
        method=args.tie_method,
        calibration=args.calibration,
        calibration_tokens=args.calibration_tokens,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        verify=not args.no_verify,
    )
    try:
        convert(asked)
    except KeyboardInterrupt:
        return _failed("interrupted", asked.output, 130)
    except Terminated:
        return _failed("terminated", asked.output, 128 + signal.SIGTERM)
    except OSError as error:
        return _failed(str(error), asked.output, 1)
    return 0


def _tie(args: argparse.Namespace) -> TieConfig | None:
    given = {
        field.name: value
        for field in fields(TieConfig)
        if (value := getattr(args, f"tie_{field.name}", None)) is not None
    }
    if not given:
        return None
    if "group_size" not in given and "banks" not in given:
        name = next(iter(given))
        valid = "must come with --tie-group-size or --tie-banks"
        raise ConfigError(Problem(f"--tie-{name.replace('_', '-')}", given[name], valid))
    return TieConfig(**given)


def _banks(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        valid = f"must be whole numbers with commas between them, such as 0,1,1,2: {text!r}"
        raise argparse.ArgumentTypeError(valid) from None


def _failed(reason: str, output: Path, code: int) -> int:
    from megatron_tied.convert.output import is_complete

    left = f"{output} is complete all the same" if is_complete(output) else "nothing was written"
    print(f"megatron-tied convert: {reason}; {left}", file=sys.stderr)
    return code
