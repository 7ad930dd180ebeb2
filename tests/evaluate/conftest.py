"""A run of two ranks that share the experts, and the Hugging Face model that is exported of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from megatron_tied.cli.main import main
from megatron_tied.data.prepare import prepare_data
from megatron_tied.data.tokenizer import SentencePieceTokenizer
from tests.convert.hf_models import load
from tests.data.corpus import make_text, write_jsonl
from tests.training.runs import Corpus, config_values, deepspeed_command, finish

SEQ_LENGTH = 32


@dataclass(frozen=True)
class Trained:
    """`document` is a data set of one document, on all of whose whole windows the run has computed its last loss."""

    run: Path
    hugging_face: Path
    document: Path
    windows: int
    tokenizer: SentencePieceTokenizer

    def reference(self) -> PreTrainedModel:
        """By transformers."""
        return load(self.hugging_face)


@pytest.fixture(scope="session")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    directory = tmp_path_factory.mktemp("evaluated")
    tokenizer = SentencePieceTokenizer.load(corpus.tokenizer)
    words = next(words for words in range(300, 400) if _windows(tokenizer, make_text(words, 7)) % 2 == 0)
    source = write_jsonl(directory / "document.jsonl", [make_text(words, 7)])
    prepare_data([source], directory / "document", tokenizer=corpus.tokenizer, workers=1)
    windows = _windows(tokenizer, make_text(words, 7))
    values = config_values(corpus, directory / "run")
    values["model"] |= {"qk_layernorm": True, "moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0}
    del values["data"]["split"]
    values["data"]["validation"] = str(directory / "document")
    values["train"] |= {"steps": 6, "micro_batch_size": 1, "global_batch_size": 2, "eval_steps": windows // 2}
    values["optimizer"]["lr"] = 0.02
    values["checkpoint"] = {"save_every": 100}
    config = directory / "config.json"
    config.write_text(json.dumps(values))
    done = finish(deepspeed_command(config))
    assert done.code == 0, done.output[-6000:]
    exported = directory / "exported"
    arguments = ["--from", "megatron-tied", "--to", "hf", "--input", str(directory / "run"), "--output", str(exported)]
    assert main(["convert", *arguments, "--no-verify"]) == 0
    return Trained(directory / "run", exported, directory / "document", windows, tokenizer)


def _windows(tokenizer: SentencePieceTokenizer, text: str) -> int:
    """Each has a token more than it predicts, and the document its separator."""
    return len(tokenizer.encode(text)) // SEQ_LENGTH
