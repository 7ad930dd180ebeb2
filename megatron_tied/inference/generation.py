"""Continuing texts with the likeliest token, again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_tied.inference.scoring import Tokens, logits


def continue_greedily(
    model: torch.nn.Module,
    contexts: Sequence[Tokens],
    is_complete: Callable[[int, list[int]], bool],
    *,
    max_length: int,
) -> list[list[int]]:
    """What follows each of `contexts`, none of them empty, all in one batch.

    `is_complete(index, generated)` is asked after each new token. The model sees the last `max_length` tokens, all of
    them anew for each token: no keys and values are kept.
    """
    generated: list[list[int]] = [[] for _ in contexts]
    growing = list(range(len(contexts)))
    while growing:
        seen = [[*contexts[index], *generated[index]][-max_length:] for index in growing]
        outputs = logits(model, seen)
        for index, sequence, output in zip(growing, seen, outputs, strict=True):
            generated[index].append(int(output[len(sequence) - 1].argmax()))
        growing = [index for index in growing if not is_complete(index, generated[index])]
    return generated
