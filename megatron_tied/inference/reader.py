"""Reading texts on, token after token, with the keys and values of what has been read."""

# ruff: noqa: E402  (Megatron-Core must be imported after the host is prepared)
from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_tied.platform import device, prepare

prepare()

from megatron.core.inference.contexts import StaticInferenceContext

from megatron_tied.inference.scoring import Tokens, padded


class Reader:
    """A model that has read `texts`, each at least one token long, and reads them on in step, up to `longest` tokens.

    Megatron-Core keeps the keys and values. A token costs what it takes to look at those before it.
    """

    def __init__(self, model: torch.nn.Module, texts: Sequence[Tokens], *, longest: int):
        self._model = model
        self._kept = StaticInferenceContext(len(texts), longest)
        # What is kept of the padding, which comes last, is never looked at: a token that is read takes its place.
        self._read(padded(texts), 0)

    def read(self, tokens: Tokens, position: int) -> torch.Tensor:
        """Logits [texts, vocabulary] after one token of each text, at `position`, all before which have been read.

        To read a token once more changes nothing.
        """
        return self._read(torch.tensor(tokens, device=device())[:, None], position)[:, -1]

    def keep(self, places: Sequence[int]) -> None:
        """Forgets all but these of the texts."""
        kept = self._kept.key_value_memory_dict
        if len(places) < self._kept.max_batch_size:
            for layer, (keys, values) in kept.items():
                kept[layer] = (keys[:, places], values[:, places])
            self._kept.max_batch_size = len(places)

    @torch.no_grad()
    def _read(self, tokens: torch.Tensor, position: int) -> torch.Tensor:
        self._kept.sequence_len_offset = position
        places = torch.arange(position, position + tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits: torch.Tensor = self._model(
            tokens, places, None, inference_context=self._kept, runtime_gather_output=True
        )
        return logits
