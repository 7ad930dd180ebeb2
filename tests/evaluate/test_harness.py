"""lm-evaluation-harness on a run of ours, against transformers on the model that is exported of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from megatron_tied.errors import ConfigError
from megatron_tied.evaluate.harness import MegatronTiedLM
from tests.evaluate.conftest import SEQ_LENGTH, Trained
from tests.training.runs import finish

CHOICES = ["bank", "the expert", " layer of the router", "café"]
CONTEXTS = ["", "the tie group", "an owner, ", "which layer of the bank \n", "gradient", "weight " * 40, "  "]
TEXTS = ["the bank", "naïve router " * 30, "x", "token group\n" * 9]


class Reference(NamedTuple):
    """Transformers, one text at a time, on token ids."""

    model: PreTrainedModel
    trained: Trained

    @torch.no_grad()
    def log_likelihood(self, context: list[int], predicted: list[int]) -> tuple[float, bool]:
        """Of `predicted`, by what is seen of both in a window."""
        ids = [*context, *predicted][-SEQ_LENGTH - 1 :]
        likely = self.model(torch.tensor([ids[:-1]])).logits[0, -len(predicted) :].log_softmax(-1)
        chosen = [float(row[token]) for row, token in zip(likely, predicted, strict=True)]
        return sum(chosen), likely.argmax(-1).tolist() == predicted

    def pair(self, context: str, continuation: str) -> tuple[float, bool]:
        """Of a continuation, to which the spaces before it belong."""
        encode = self.trained.tokenizer.encode
        given = encode(context.rstrip())
        predicted = encode(context + continuation)[len(given) :]
        return self.log_likelihood(given or [self.trained.tokenizer.eod], predicted)

    def rolling(self, text: str) -> float:
        """Each token once, the last window as full as the others."""
        ids = [self.trained.tokenizer.eod, *self.trained.tokenizer.encode(text)]
        total, done = 0.0, 1
        while done < len(ids):
            end = min(done + SEQ_LENGTH, len(ids))
            total += self.log_likelihood(ids[max(0, end - 1 - SEQ_LENGTH) : done], ids[done:end])[0]
            done = end
        return total

    @torch.no_grad()
    def continuation(self, context: str, stops: list[str], limit: int) -> str:
        """Greedy, cut before the first stop."""
        tokenizer = self.trained.tokenizer
        ids, new = tokenizer.encode(context) or [tokenizer.eod], []
        while len(new) < limit and (not new or new[-1] != tokenizer.eod):
            new.append(int(self.model(torch.tensor([[*ids, *new][-SEQ_LENGTH:]])).logits[0, -1].argmax()))
        text = tokenizer.decode([token for token in new if token != tokenizer.eod])
        return min((text.split(stop)[0] for stop in stops), key=len, default=text)


@pytest.fixture(scope="module")
def reference(trained: Trained) -> Reference:
    return Reference(trained.reference(), trained)


@pytest.fixture
def model(one_process: None, trained: Trained) -> MegatronTiedLM:
    return MegatronTiedLM(checkpoint=str(trained.run), batch_size=7)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def test_log_likelihoods(model: MegatronTiedLM, reference: Reference) -> None:
    pairs = [(context, choice) for context in CONTEXTS for choice in CHOICES]
    # What the model would say itself.
    pairs.append(("an owner", reference.continuation("an owner", [], 3)))
    found = model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    for (context, choice), (value, is_greedy) in zip(pairs, found, strict=True):
        expected, expected_greedy = reference.pair(context, choice)
        assert value == pytest.approx(expected, abs=1e-4), (context, choice)
        assert is_greedy == expected_greedy, (context, choice)
    assert found[-1][1]
    assert not all(is_greedy for _, is_greedy in found)


def test_rolling_log_likelihoods(model: MegatronTiedLM, reference: Reference) -> None:
    found = model.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in TEXTS]))
    assert found == pytest.approx([reference.rolling(text) for text in TEXTS], abs=1e-4)


def test_continuations(model: MegatronTiedLM, reference: Reference) -> None:
    whole = reference.continuation("the tie group", [], 12)
    stop = whole[4:6]
    wanted = [
        ("the tie group", {"until": [], "max_gen_toks": 12}),
        ("the tie group", {"until": [stop], "max_gen_toks": 12}),
        ("the tie group", {"until": "never here", "max_gen_toks": 2}),
        ("", {"until": ["\n"], "max_gen_toks": 9, "do_sample": False}),
        ("weight " * 40, {"until": ["\n", " "], "max_gen_toks": 40}),
    ]
    found = model.generate_until(instances("generate_until", wanted), disable_tqdm=True)
    for (context, settings), text in zip(wanted, found, strict=True):
        stops = [settings["until"]] if isinstance(settings["until"], str) else settings["until"]
        assert text == reference.continuation(context, stops, settings["max_gen_toks"]), (context, settings)
    assert found[1] == whole[: whole.index(stop)]


def test_it_ends_with_the_separator(
    model: MegatronTiedLM, trained: Trained, monkeypatch: pytest.MonkeyPatch, reference: Reference
) -> None:
    whole = reference.continuation("gradient", [], 6)
    third = trained.tokenizer.encode("gradient" + whole)
    monkeypatch.setattr(model._tokenizer, "eod", third[len(trained.tokenizer.encode("gradient")) + 2])
    (found,) = model.generate_until(instances("generate_until", [("gradient", {"until": []})]), disable_tqdm=True)
    assert whole.startswith(found)
    assert len(found) < len(whole)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"batch_size": "auto"}, "--batch_size = 'auto': must be an integer >= 1"),
        ({"precision": "fp8"}, "precision = 'fp8': must be fp32, bf16 or fp16"),
        ({"tokenizer": "nowhere"}, "tokenizer = 'nowhere': must be"),
    ],
)
def test_bad_arguments(trained: Trained, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        MegatronTiedLM(checkpoint=str(trained.run), **given)
    assert told in str(refused.value)


def test_sampling_is_refused(model: MegatronTiedLM) -> None:
    request = instances("generate_until", [("the", {"until": [], "do_sample": True, "temperature": 1.0})])
    with pytest.raises(ConfigError, match="continuations are greedy here"):
        model.generate_until(request)


def test_the_harness_command(trained: Trained, reference: Reference, tmp_path: Path) -> None:
    """Tasks of local files, as a user has them, one of each kind."""
    questions = [{"question": context, "answer": number % 4} for number, context in enumerate(CONTEXTS[1:6])]
    lines = {"choose": questions, "read": [{"text": text} for text in TEXTS]}
    lines["write"] = [{"question": c, "text": reference.continuation(c, [" "], 8)} for c in CONTEXTS[1:5]]
    tasks = {
        "choose": {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": CHOICES}
        | {"doc_to_target": "answer", "target_delimiter": "", "metric_list": [{"metric": "acc"}]},
        "read": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
        | {"metric_list": [{"metric": "bits_per_byte"}]},
        "write": {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{text}}"}
        | {"generation_kwargs": {"until": [" "], "max_gen_toks": 8}, "metric_list": [{"metric": "exact_match"}]},
    }
    for name, task in tasks.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[name]))
        files = {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}}
        data = {"task": f"local_{name}", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(data | task))  # JSON is YAML
    command = [sys.executable, "-m", "megatron_tied.cli.main", "lm-eval", "--model", "megatron-tied"]
    command += ["--model_args", f"checkpoint={trained.run}", "--include_path", str(tmp_path), "--batch_size", "3"]
    command += ["--tasks", ",".join(f"local_{name}" for name in tasks), "--output_path", str(tmp_path / "found.json")]
    done = finish(command, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    assert done.code == 0, done.output[-6000:]
    (file,) = tmp_path.glob("found*.json")
    found = json.loads(file.read_text())["results"]

    likely = [[reference.pair(line["question"], choice)[0] for choice in CHOICES] for line in questions]
    right = [line["answer"] == row.index(max(row)) for line, row in zip(questions, likely, strict=True)]
    assert found["local_choose"]["acc,none"] == pytest.approx(sum(right) / len(right))
    total = sum(reference.rolling(text) for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    assert found["local_read"]["bits_per_byte,none"] == pytest.approx(-total / size / 0.6931471805599453, abs=1e-5)
    assert found["local_write"]["exact_match,none"] == 1


def test_the_command_tells_bad_input_like_any_other(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_tied.cli.main", "lm-eval", "run", "--model", "megatron-tied"]
    done = finish([*command, "--model_args", f"checkpoint={tmp_path}", "--tasks", "arc_easy"], HF_HUB_OFFLINE="1")
    assert done.code == 2, done.output
    assert f"checkpoint = '{tmp_path}': must be a checkpoint, or a run that has one" in done.output
    assert "Traceback" not in done.output
