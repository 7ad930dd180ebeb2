"""An evaluation for people, as a table, and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_tied.evaluate.domains import Domain
from megatron_tied.evaluate.held_out import HeldOutLoss
from megatron_tied.inference.loading import TrainedModel


class OnDomain(TypedDict):
    """How well the tokens of one data set are predicted; `loss` is a mean in nats."""

    data: str
    tokens: int
    loss: float
    perplexity: float


class Evaluation(TypedDict):
    """What `--json` writes."""

    checkpoint: str
    step: int
    precision: str
    seq_length: int
    domains: dict[str, OnDomain]


def as_json(
    found: TrainedModel, domains: Sequence[Domain], losses: Sequence[HeldOutLoss], *, seq_length: int
) -> Evaluation:
    """Everything that was found, and on what."""
    return {
        "checkpoint": str(found.path),
        "step": found.manifest.step,
        "precision": found.precision,
        "seq_length": seq_length,
        "domains": {
            domain.name: {
                "data": str(domain.prefix),
                "tokens": result.tokens,
                "loss": result.loss,
                "perplexity": result.perplexity,
            }
            for domain, result in zip(domains, losses, strict=True)
        },
    }


def report(content: Evaluation, *, tokenizer_is_known: bool) -> RenderableType:
    """What `as_json` gives, as a table."""
    table = Table("domain", box=None, pad_edge=False, header_style="bold")
    for name in ("tokens", "loss", "perplexity"):
        table.add_column(name, justify="right")
    for name, row in content["domains"].items():
        table.add_row(name, f"{row['tokens']:,}", f"{row['loss']:.4f}", f"{row['perplexity']:,.2f}")
    where = f"{content['checkpoint']}, step {content['step']:,}"
    how = f"{content['precision']}, sequences of {content['seq_length']:,} tokens; loss in nats per token"
    lines = [where, how]
    if not tokenizer_is_known:
        lines.append("the model's tokenizer is not here: whether the data was made with it was not compared")
    return Group(table, Text(), Text("\n".join(lines)))
