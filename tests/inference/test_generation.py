"""Reading on with kept keys and values, against reading everything anew, and against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from megatron_tied import TieConfig
from megatron_tied.inference.generation import continuation, continue_greedily
from megatron_tied.inference.loading import find_model, load_model
from megatron_tied.inference.reader import Reader
from megatron_tied.inference.scoring import logits
from tests.convert.hf_models import MODELS, convert, load, save, some_tokens
from tests.tiny_model import FIELDS, TIE, build

LENGTH = 24
_LATENT: dict[str, Any] = {
    **{"multi_latent_attention": True, "num_query_groups": 4},
    **{"kv_lora_rank": 16, "qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 12},
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "olmoe": {"qk_norm_scope": "projection", "qkv_clip": 0.5, "moe_router_pre_softmax": True},
    "qwen3_moe": {},
    "sequential": {"expert_backend": "sequential", "rotary_percent": 0.5},
    "latent, yarn": {**_LATENT, "q_lora_rank": 24, "moe_shared_expert_intermediate_size": 32},
    "latent, rope": {**_LATENT, "q_lora_rank": None, "rope_type": "rope", "moe_layer_freq": [0, 1, 1, 1, 1, 1]},
    # Made for training, and here all the same.
    "recomputed": {**_LATENT, "recompute_granularity": "selective", "recompute_modules": ["mla_up_proj", "moe"]},
}
TIES: dict[str, TieConfig] = {share: TieConfig(banks=TIE.banks, share=share) for share in ("experts_attention", "all")}


@pytest.fixture(params=[*ARCHITECTURES, *TIES])
def model(one_process: None, request: pytest.FixtureRequest) -> GPTModel:
    fields = ARCHITECTURES.get(request.param, {})
    tie = TieConfig(group_size=2, skip_first=1) if "moe_layer_freq" in fields else TIES.get(request.param, TIE)
    return build(tie, **fields).eval().requires_grad_(False)


def random_texts(count: int, length: int = LENGTH) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(FIELDS["vocab_size"], (count, length), generator=generator).tolist()


def test_reading_on_is_reading_all_anew(model: GPTModel) -> None:
    texts = random_texts(3)
    expected = logits(model, texts)
    # Beginnings of unlike lengths; the last tokens of the longer ones are read twice.
    reader = Reader(model, [texts[0][:5], texts[1][:9], texts[2][:1]], longest=LENGTH)
    for position in range(LENGTH):
        found = reader.read([text[position] for text in texts], position)
        torch.testing.assert_close(found, expected[:, position], rtol=0, atol=1e-5)
        if position == 12:
            texts, expected = [texts[2], texts[0]], expected[[2, 0]]
            reader.keep([2, 0])


def without_repeats(before: list[int]) -> Callable[[torch.Tensor], int]:
    """Chooses the likeliest token that is not in the text: random models soon repeat themselves."""
    said = list(before)

    def choose(likely: torch.Tensor) -> int:
        said.append(int(likely.index_fill(0, torch.tensor(said), -torch.inf).argmax()))
        return said[-1]

    return choose


def test_a_continuation_is_that_without_a_cache(model: GPTModel) -> None:
    (prompt,) = random_texts(1, 5)
    anew, choose = list(prompt), without_repeats(prompt)
    for _ in range(LENGTH - 4):
        anew.append(choose(logits(model, [anew])[0, -1]))
    assert list(continuation(model, prompt, without_repeats(prompt), max_length=LENGTH)) == anew[5:]


def test_each_token_goes_through_the_model_once(one_process: None) -> None:
    model, seen = build().eval(), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    (prompt,) = random_texts(1, 8)
    assert len(list(continuation(model, prompt, lambda likely: int(likely.argmax()), max_length=20))) == 13
    # That before the first new token twice.
    assert seen == [8, *[1] * 13]
    seen.clear()
    texts = random_texts(2, 8)
    continue_greedily(model, [texts[0], texts[1][:3]], lambda *_: False, max_length=20, max_new_tokens=2)
    # The shorter text is complete before the longer one goes on.
    assert seen == [16, 2, 2, 1, 1]


@pytest.mark.parametrize("name", [*MODELS, "tied"])
def test_the_likeliest_continuation_is_that_of_transformers(one_process: None, name: str, tmp_path: Path) -> None:
    original = save("qwen3_moe_unnormalised" if name == "tied" else name, tmp_path / "original")
    tie = ("--tie-group-size", "2", "--tie-skip-first", "1") if name == "tied" else ()
    ours = convert("hf", "megatron-tied", original, tmp_path / "ours", "--no-verify", *tie)
    exported = convert("megatron-tied", "hf", ours, tmp_path / "exported", "--no-verify")
    theirs = load(exported)
    theirs.generation_config.eos_token_id = None
    model = load_model(find_model(ours))
    for prompt in some_tokens()[:, :10]:
        made = theirs.generate(prompt[None], do_sample=False, max_new_tokens=30, no_repeat_ngram_size=1)
        found = continuation(model, prompt.tolist(), without_repeats(prompt.tolist()), max_length=39)
        assert list(found) == made[0, 10:].tolist()
