"""Batches of unlike texts: each is scored and continued as if it were alone."""

from __future__ import annotations

import random

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from megatron_tied.inference.generation import continue_greedily
from megatron_tied.inference.scoring import Text, score
from tests.tiny_model import FIELDS, build

VOCABULARY = FIELDS["vocab_size"]


@pytest.fixture
def model(one_process: None) -> GPTModel:
    return build().eval()


def some_texts(count: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(VOCABULARY) for _ in range(draw.randint(2, 24))] for _ in range(count)]


@torch.no_grad()
def alone(model: GPTModel, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [sequence, vocabulary] of one text, with the mask written out."""
    length = len(tokens)
    mask = torch.ones(length, length).triu(1).bool()[None, None]
    return model(torch.tensor([tokens]), torch.arange(length)[None], mask)[0].log_softmax(-1)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_scores_are_those_of_each_text_alone(model: GPTModel, batch_size: int) -> None:
    draw = random.Random(1)
    texts = [Text(tokens, draw.randint(0, len(tokens) - 1)) for tokens in some_texts(23)]
    # One that is greedy: what the model itself would say.
    best = [3]
    for _ in range(6):
        best.append(int(alone(model, best)[-1].argmax()))
    texts.append(Text(best, 6))
    for text, found in zip(texts, score(model, texts, batch_size=batch_size), strict=True):
        likely = alone(model, list(text.tokens))
        places = range(len(text.tokens) - text.scored, len(text.tokens))
        expected = sum(float(likely[place - 1, text.tokens[place]]) for place in places)
        assert found.log_likelihood == pytest.approx(expected, abs=1e-5)
        assert found.is_greedy == all(int(likely[place - 1].argmax()) == text.tokens[place] for place in places)
    assert found.is_greedy
    assert found.log_likelihood < -0.1


def test_continuations_are_those_of_each_text_alone(model: GPTModel) -> None:
    contexts = some_texts(7)
    lengths = [3, 9, 1, 12, 5, 7, 2]
    window = 16

    def is_complete(index: int, generated: list[int]) -> bool:
        return len(generated) == lengths[index]

    found = continue_greedily(model, contexts, is_complete, max_length=window, max_new_tokens=11)
    for context, length, continuation in zip(contexts, lengths, found, strict=True):
        seen = list(context)
        for _ in range(min(length, 11)):
            seen.append(int(alone(model, seen[-window:])[-1].argmax()))
        assert continuation == seen[len(context) :]
