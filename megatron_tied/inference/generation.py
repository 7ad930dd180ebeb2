"""What a model says after a text: the likeliest token, or a drawn one, again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_tied.inference.reader import Reader
from megatron_tied.inference.scoring import Tokens, logits

Choice = Callable[[torch.Tensor], int]


def continuation(model: torch.nn.Module, prompt: Tokens, choose: Choice, *, max_length: int) -> Iterator[int]:
    """The tokens after `prompt`, which is not empty; `choose` is given the logits [vocabulary] of each.

    It ends when the model has seen `max_length` tokens.
    """
    reader = Reader(model, [prompt], longest=max_length)
    token = prompt[-1]
    for position in range(len(prompt) - 1, max_length):
        token = choose(reader.read([token], position)[0])
        yield token


def continue_greedily(
    model: torch.nn.Module,
    contexts: Sequence[Tokens],
    is_complete: Callable[[int, list[int]], bool],
    *,
    max_length: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """What follows each of `contexts`, none of them empty, all in one batch: at most `max_new_tokens` tokens.

    `is_complete(index, generated)` is asked after each new token. The model sees the last `max_length` tokens: once a
    text is longer, all of them anew for each token, since without its beginning every key and value is another.
    """
    generated: list[list[int]] = [[] for _ in contexts]
    seen = [list(context[-max_length:]) for context in contexts]

    def go_on(index: int, output: torch.Tensor) -> bool:
        token = int(output.argmax())
        generated[index].append(token)
        seen[index].append(token)
        return len(generated[index]) < max_new_tokens and not is_complete(index, generated[index])

    growing = list(range(len(contexts)))
    reader = Reader(model, seen, longest=min(max_length, max(map(len, seen)) + max_new_tokens))
    # In step: whose text is longer than the shortest reads a token of it once more.
    while growing and (position := min(len(seen[index]) for index in growing) - 1) < max_length:
        outputs = reader.read([seen[index][position] for index in growing], position)
        places = [
            place
            for place, (index, output) in enumerate(zip(growing, outputs, strict=True))
            if len(seen[index]) - 1 > position or go_on(index, output)
        ]
        growing = [growing[place] for place in places]
        reader.keep(places)
    while growing:
        outputs = logits(model, [seen[index][-max_length:] for index in growing])
        growing = [index for index, output in zip(growing, outputs[:, -1], strict=True) if go_on(index, output)]
    return generated
