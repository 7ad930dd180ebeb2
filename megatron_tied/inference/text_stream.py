"""From token ids to text while they come: a character may take several tokens."""

from __future__ import annotations

from megatron_tied.data.adapters import Tokenizer
from megatron_tied.inference.scoring import Tokens

# What decoders write for bytes that are no character, or none yet. Of one that may still come there are at most three.
_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_PENDING = 3


class TextStream:
    """The text of tokens that come after `prompt`, whole characters only."""

    def __init__(self, tokenizer: Tokenizer, prompt: Tokens):
        self._tokenizer = tokenizer
        # Decoded together with what was before: some tokenizers leave out the first space of a text.
        self._tokens = list(prompt)
        self._told = len(tokenizer.decode(prompt))

    def add(self, token: int) -> str:
        """What this token adds to the text; what it begins comes with a later one."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        whole = text.rstrip(_NO_CHARACTER)
        end = max(len(whole), len(text) - _PENDING)
        added = text[self._told : end]
        self._told = max(self._told, end)
        if added and end == len(text):
            self._tokens = [token]
            self._told = len(self._tokenizer.decode(self._tokens))
        return added
