"""`megatron-tied generate`: what a checkpoint's model writes after a text."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tied.cli.options import Subparsers
from megatron_tied.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megatron_tied.data.adapters import Tokenizer
    from megatron_tied.inference.loading import TrainedModel

_FAILED, _INTERRUPTED = 1, 130
_STDIN = "-"
_DESCRIPTION = """\
What a checkpoint's model writes after a text, as it comes. It ends with the token that ends documents, after
--max-new-tokens, or when the model has seen as many tokens as the sequences of its training had. One process, on a GPU
where there is one.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Adds `generate`."""
    told = "what a checkpoint's model writes after a text"
    parser = subparsers.add_parser("generate", help=told, description=_DESCRIPTION)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="or a run, whose latest checkpoint is meant"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="-: standard input, its last line end included")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest of P together")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn; default: 0")
    parser.add_argument("--tokenizer", metavar="NAME", help="default: that of the training")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    _check_numbers(args)
    from megatron_tied.checkpoint.together import RankError
    from megatron_tied.inference.checks import launcher_problems, tokenizer_of
    from megatron_tied.inference.loading import find_model
    from megatron_tied.inference.processes import one_process

    if problems := launcher_problems():
        raise ConfigError(problems)
    found = find_model(args.checkpoint)
    tokenizer = tokenizer_of(found, args.tokenizer, field="--tokenizer")
    text = _prompt(args.prompt)
    prompt = _tokens(text, tokenizer, found.seq_length)
    try:
        with one_process():
            _write(text, prompt, found, tokenizer, args)
    except RankError as error:
        print(f"error: {found.path} cannot be loaded: {error}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print()
        return _INTERRUPTED
    except BrokenPipeError:  # nobody reads on
        return 0
    return 0


def _write(text: str, prompt: list[int], found: TrainedModel, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    from megatron_tied.inference.generation import continuation
    from megatron_tied.inference.loading import load_model
    from megatron_tied.inference.sampling import Sampler
    from megatron_tied.inference.text_stream import TextStream
    from megatron_tied.platform import device

    model = load_model(found)
    size = sum(parameter.numel() for parameter in model.parameters())
    shape = f"{found.config.num_layers} layers, {size:,} parameters"
    print(f"{found.path}: {shape}, {found.precision} on {device()}", file=sys.stderr)
    choose = Sampler(temperature=args.temperature, top_p=args.top_p, seed=args.seed, vocabulary=tokenizer.vocab_size)
    # The last token is not read.
    longest = min(found.seq_length, len(prompt) + args.max_new_tokens - 1)
    stream = TextStream(tokenizer, prompt)
    print(text, end="", flush=True)
    started, count, token = time.perf_counter(), 0, None
    for token in continuation(model, prompt, choose, max_length=longest):
        count += 1
        if token == tokenizer.eod:
            break
        print(stream.add(token), end="", flush=True)
    speed = count / (time.perf_counter() - started)
    print(flush=True)
    if token == tokenizer.eod:
        why = "the token that ends documents"
    elif count == args.max_new_tokens:
        why = f"--max-new-tokens {count}"
    else:
        why = f"the model's sequence length, {found.seq_length}"
    print(f"{count} tokens after {len(prompt)}, {speed:.1f} a second; ended by {why}", file=sys.stderr)


def _check_numbers(args: argparse.Namespace) -> None:
    temperature, top_p = args.temperature, args.top_p
    checks = (
        ("--temperature", temperature, 0 <= temperature < math.inf, "must be a number >= 0"),
        ("--top-p", top_p, 0 < top_p <= 1, "must be above 0 and at most 1"),
        ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "must be at least 1"),
        ("--seed", args.seed, 0 <= args.seed < 1 << 63, "must be at least 0 and below 2^63"),
    )
    if problems := [Problem(field, value, valid) for field, value, good, valid in checks if not good]:
        raise ConfigError(problems)


def _prompt(given: str) -> str:
    try:
        text = sys.stdin.buffer.read().decode() if given == _STDIN else given
        text.encode()  # what came as an argument and is no text holds surrogates
    except UnicodeError:
        raise ConfigError(Problem("--prompt", given, "must be UTF-8")) from None
    return text


def _tokens(text: str, tokenizer: Tokenizer, longest: int) -> list[int]:
    tokens = tokenizer.encode(text)
    if not tokens:
        begin: int | None = getattr(tokenizer, "bos", None)
        if begin is None:
            raise ConfigError(Problem("--prompt", text, "must have text: the tokenizer has no token that begins one"))
        return [begin]
    if len(tokens) > longest:
        valid = f"has {len(tokens):,} tokens, and the model knows sequences of {longest:,}"
        raise ConfigError(Problem("--prompt", f"{text[:40]}...", valid))
    return tokens
