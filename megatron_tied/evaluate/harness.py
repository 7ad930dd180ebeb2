"""Our checkpoints as a model of lm-evaluation-harness; importing this registers it as `megatron-tied`."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.inference.checks import launcher_problems, tokenizer_of
from megatron_tied.inference.generation import continue_greedily
from megatron_tied.inference.loading import find_model, load_model
from megatron_tied.inference.processes import one_process
from megatron_tied.inference.scoring import Text, by_length, score


@register_model("megatron-tied")
class MegatronTiedLM(TemplateLM):
    """A checkpoint, or a run's latest one, in this process.

    `max_length` is how many tokens the model is given at once (default: the training's), `precision` fp32, bf16 or fp16
    (default: the training's), `tokenizer` stands in for the training's. What comes before an empty context is
    `prefix_token_id`: by default the separator that ends documents, as prepare-data puts it before the next one.
    `device` names one of several GPUs; `max_batch_size`, which the harness gives every model, changes nothing. Raises
    `ConfigError`, before a weight is read, for what does not fit.
    """

    def __init__(
        self,
        checkpoint: str,
        tokenizer: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        precision: str | None = None,
        prefix_token_id: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        found = find_model(Path(str(checkpoint)), field="checkpoint")
        self._tokenizer = tokenizer_of(found, tokenizer)
        _check_settings(batch_size, precision)
        _use_device(device)
        self._batch_size = int(batch_size)
        self._max_length = max_length or found.seq_length
        self._max_gen_toks = max_gen_toks
        self._prefix = self._tokenizer.eod if prefix_token_id is None else prefix_token_id
        processes = ExitStack()
        processes.enter_context(one_process())
        atexit.register(processes.close)
        self._model = load_model(found, precision=precision)

    @property
    def eot_token_id(self) -> int:
        """The separator that ends documents."""
        return self._tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens are never among them."""
        return self._tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, every token once, in windows as long as the model takes."""
        texts, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self._prefix, self._max_length, 1):
                context, predicted = make_disjoint_window(window)
                texts.append(Text([*context, *predicted], len(predicted)))
                owners.append(number)
        found = [0.0] * len(requests)
        for number, result in zip(owners, score(self._model, texts, batch_size=self._batch_size), strict=True):
            found[number] += result.log_likelihood
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The likeliest continuation of each context, up to a stop text, the separator or the length wanted."""
        contexts = [self.tok_encode(request.args[0]) or [self._prefix] for request in requests]
        settings = [normalize_gen_kwargs(request.args[1], self._max_gen_toks) for request in requests]
        if any(setting["do_sample"] for setting in settings):
            valid = "must be false, and temperature 0, in every task: continuations are greedy here"
            raise ConfigError(Problem("generation_kwargs.do_sample", True, valid))
        found: dict[int, str] = {}
        with tqdm(total=len(requests), desc="generating", unit="text", disable=disable_tqdm or None) as bar:
            for batch in by_length(contexts, self._batch_size):
                wanted = [(contexts[number], settings[number]) for number in batch]
                found |= zip(batch, self._generate(wanted), strict=True)
                bar.update(len(batch))
        return [found[number] for number in range(len(requests))]

    def _generate(self, wanted: Sequence[tuple[list[int], dict[str, Any]]]) -> list[str]:
        def is_complete(index: int, generated: list[int]) -> bool:
            context, setting = wanted[index]
            if generated[-1] == self.eot_token_id or len(generated) >= setting["max_gen_toks"]:
                return True
            text = self._continuation(context, generated)
            return _cut(text, setting) != text

        contexts = [context for context, _ in wanted]
        longest = max(setting["max_gen_toks"] for _, setting in wanted)
        generated = continue_greedily(
            self._model, contexts, is_complete, max_length=self._max_length, max_new_tokens=longest
        )
        return [
            _cut(self._continuation(context, ids), setting)
            for (context, setting), ids in zip(wanted, generated, strict=True)
        ]

    def _continuation(self, context: list[int], generated: list[int]) -> str:
        """As text. Decoded after a token that is before it: some tokenizers leave out the first space of a text."""
        before = context[-1:]
        ids = generated[:-1] if generated[-1] == self.eot_token_id else generated
        return self._tokenizer.decode([*before, *ids])[len(self._tokenizer.decode(before)) :]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        texts = []
        for (_, continuation), context, given in requests:
            # Where the tokenizer joins both into a token of the context nothing would be left to score.
            predicted = given or self.tok_encode(continuation)
            if len(predicted) > self._max_length:
                valid = f"must be at least {len(predicted)}, the tokens of {continuation[:40]!r}"
                raise ConfigError(Problem("max_length", self._max_length, valid))
            tokens = [*(context or [self._prefix]), *predicted][-self._max_length - 1 :]
            texts.append(Text(tokens, len(predicted)))
        scores = score(self._model, texts, batch_size=self._batch_size)
        return [(found.log_likelihood, found.is_greedy) for found in scores]


def _check_settings(batch_size: int | str, precision: str | None) -> None:
    problems = []
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        problems.append(Problem("--batch_size", batch_size, "must be an integer >= 1"))
    if precision not in (None, "fp32", "bf16", "fp16"):
        problems.append(Problem("precision", precision, "must be fp32, bf16 or fp16"))
    if problems := problems + launcher_problems():
        raise ConfigError(problems)


def _use_device(device: str | None) -> None:
    # On a host without GPUs, too, the harness says cuda:0 where nobody has said anything.
    if device is None or not torch.cuda.is_available():
        return
    if not device.startswith("cuda"):
        raise ConfigError(Problem("--device", device, "must be a GPU on a host that has some"))
    if torch.device(device).index is not None:  # "cuda": the one at hand
        torch.cuda.set_device(device)


def _cut(text: str, setting: dict[str, Any]) -> str:
    cut: str = postprocess_generated_text(text, setting["until"], think_end_token=None)
    return cut
