"""Which tokens are drawn, and how often: by transformers' own processors of logits."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from megatron_tied.inference.sampling import Sampler, probabilities

VOCABULARY = 50


def some_logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


def by_transformers(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    return TopPLogitsWarper(top_p)(None, scores)[0].softmax(-1)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.5])
def test_probabilities_are_those_of_transformers(temperature: float, top_p: float) -> None:
    for seed in range(20):
        logits = some_logits(seed)
        found = probabilities(logits, temperature=temperature, top_p=top_p)
        torch.testing.assert_close(found, by_transformers(logits, temperature, top_p), rtol=1e-5, atol=1e-7)


def test_with_all_of_the_probability_no_token_is_left_out() -> None:
    # Added up, the first alone are 1.
    logits = torch.tensor([20.0, *[0.0] * 9])
    assert (probabilities(logits, temperature=1.0, top_p=1.0) > 0).all()


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 5e-324])
def test_no_temperature_is_too_low(temperature: float) -> None:
    logits = some_logits(2)
    found = probabilities(logits, temperature=temperature, top_p=1.0)
    assert found.argmax() == logits.argmax()
    assert found.max() == 1


def sampler(temperature: float = 1.0, top_p: float = 0.8, seed: int = 5, vocabulary: int = VOCABULARY) -> Sampler:
    return Sampler(temperature=temperature, top_p=top_p, seed=seed, vocabulary=vocabulary)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits, draws, draw = some_logits(1), 4000, sampler()
    counts = torch.bincount(torch.tensor([draw(logits) for _ in range(draws)]), minlength=VOCABULARY)
    expected = by_transformers(logits, 1.0, 0.8)
    assert not counts[expected == 0].any()
    # Four standard deviations.
    assert ((counts - draws * expected).abs() <= 4 * (draws * expected * (1 - expected)).sqrt() + 1e-3).all()


def test_a_seed_decides() -> None:
    def drawn(seed: int) -> list[int]:
        draw = sampler(seed=seed)
        return [draw(some_logits(number)) for number in range(30)]

    assert drawn(1) == drawn(1) != drawn(2)


def test_temperature_0_takes_the_likeliest_token_that_there_is() -> None:
    logits = some_logits(0)
    logits[VOCABULARY - 1] = 100.0
    assert sampler(temperature=0.0)(logits) == VOCABULARY - 1
    assert sampler(temperature=0.0, vocabulary=VOCABULARY - 1)(logits) == int(logits[:-1].argmax())
    assert sampler(vocabulary=VOCABULARY - 1)(logits) < VOCABULARY - 1
