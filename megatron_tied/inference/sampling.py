"""Which token comes next: the likeliest, or one that is drawn."""

from __future__ import annotations

import torch

from megatron_tied.platform import device


class Sampler:
    """Draws tokens; the same seed and logits give the same ones. `temperature` 0 takes the likeliest.

    Only the first `vocabulary` entries of the logits have a token.
    """

    def __init__(self, *, temperature: float, top_p: float, seed: int, vocabulary: int):
        self._temperature = temperature
        self._top_p = top_p
        self._vocabulary = vocabulary
        self._generator = torch.Generator(device()).manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """A token, by its logits [vocabulary]."""
        known = logits[: self._vocabulary]
        if self._temperature == 0:
            return int(known.argmax())
        likely = probabilities(known, temperature=self._temperature, top_p=self._top_p)
        return int(torch.multinomial(likely, 1, generator=self._generator))


def probabilities(logits: torch.Tensor, *, temperature: float, top_p: float) -> torch.Tensor:
    """Of the fewest tokens that have `top_p` of the softmax of logits / temperature, the likeliest ones; others have 0.

    [vocabulary] in float32. Source: nucleus sampling (arXiv:1904.09751).
    """
    logits = logits.double()
    # Below 0, and in float64, so that no temperature is too small to divide by.
    ordered, order = ((logits - logits.max()) / temperature).softmax(-1).sort(descending=True)
    # With 1 all stay, though sums may round to 1 before the last.
    needed = (ordered.cumsum(-1) - ordered < top_p) | (top_p == 1)
    kept = torch.zeros_like(ordered).scatter(-1, order, ordered * needed)
    return (kept / kept.sum()).float()
