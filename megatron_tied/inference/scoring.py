"""The log-likelihood of tokens after others, many texts at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm

from megatron_tied.platform import device

Tokens = Sequence[int]


class Text(NamedTuple):
    """Token ids, of which the last `scored` are to be scored; there is at least one before them."""

    tokens: Tokens
    scored: int


class Score(NamedTuple):
    """The sum of the scored tokens' log-probabilities, and whether each of them was the likeliest."""

    log_likelihood: float
    is_greedy: bool


def score(model: torch.nn.Module, texts: Sequence[Text], *, batch_size: int) -> list[Score]:
    """The scores of `texts`, in their order; those of like length go through the model together."""
    found: dict[int, Score] = {}
    with tqdm(total=len(texts), desc="scoring", unit="text", disable=None) as bar:
        for batch in by_length([text.tokens for text in texts], batch_size):
            outputs = logits(model, [texts[index].tokens[:-1] for index in batch])
            for index, output in zip(batch, outputs, strict=True):
                found[index] = _score(texts[index], output)
            bar.update(len(batch))
    return [found[index] for index in range(len(texts))]


def by_length(sequences: Sequence[Tokens], batch_size: int) -> Iterator[list[int]]:
    """Indices of `sequences` in batches, the longest first: what does not fit into memory fails at once."""
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@torch.no_grad()
def logits(model: torch.nn.Module, sequences: Sequence[Tokens]) -> torch.Tensor:
    """[sequences, longest, vocabulary]; after the end of a shorter sequence they mean nothing.

    Its padding comes last: attention looks back only, and an expert looks at one token, so that no other is changed.
    """
    tokens = padded(sequences)
    found: torch.Tensor = model(tokens, torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens), None)
    return found


def padded(sequences: Sequence[Tokens]) -> torch.Tensor:
    """[sequences, longest] on this process's device; what fills up the shorter ones means nothing."""
    rows = [torch.tensor(sequence) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device())


def _score(text: Text, output: torch.Tensor) -> Score:
    """Of its logits [sequence, vocabulary], which may be longer than the text."""
    end = len(text.tokens) - 1
    expected = torch.tensor(text.tokens[end + 1 - text.scored :], device=output.device)
    likely = output[end - text.scored : end].float().log_softmax(-1)
    chosen = likely.gather(-1, expected[:, None])
    return Score(chosen.double().sum().item(), bool((likely.argmax(-1) == expected).all()))
