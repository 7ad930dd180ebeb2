"""What a benchmark is asked to do, checked before anything is built."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.training.config import RunConfig
from megatron_tied.training.config_file import load_config, parse_config
from megatron_tied.training.vocabulary import with_vocabulary

TIED, UNTIED, HUGGINGFACE, MEGATRON_CORE, AUTOEP = "tied", "untied", "huggingface", "megatron-core", "autoep"
OPPONENTS = (UNTIED, HUGGINGFACE, MEGATRON_CORE, AUTOEP)
# Those that run a model of Hugging Face transformers.
OF_TRANSFORMERS = (HUGGINGFACE, AUTOEP)

# What this package's engine would do, and a model of transformers under its peer's would not.
_OURS_ONLY = ("moe_expert_capacity_factor", "recompute_granularity", "hidden_dropout", "moe_z_loss_coeff")

_QUICKSTART = {"preset": "quickstart"}
_QUICKSTART_TIE = {"group_size": 4}
_QUICKSTART_EXPERTS = 16
_SEQ_LENGTH, _MICRO_BATCH = 256, 4


@dataclass(frozen=True)
class Job:
    """One config on `ranks` ranks: the tied model against `opponents`, in `rounds` turns of `steps` steps each.

    steps None: as many as take about half a second. alone: only this contender, for its peak memory on a CPU host.
    """

    config: RunConfig
    ranks: int
    opponents: tuple[str, ...] = (UNTIED,)
    rounds: int = 10
    steps: int | None = None
    alone: str | None = None

    @property
    def contenders(self) -> tuple[str, ...]:
        """All of them, the tied model first."""
        return (TIED, *self.opponents)

    def config_of(self, contender: str) -> RunConfig:
        """The run config that a contender built by the engine of this package has."""
        return self.config if contender == TIED else self.config.model_copy(update={"tie": self.config.tie.untied()})

    def encode(self) -> str:
        """JSON for the ranks."""
        return json.dumps(vars(self) | {"config": self.config.model_dump(mode="json")})

    @classmethod
    def decode(cls, text: str) -> Job:
        """What `encode` made."""
        fields = json.loads(text)
        config, opponents = parse_config(fields["config"]), tuple(fields["opponents"])
        return cls(**(fields | {"config": config, "opponents": opponents}))


def load_subject(path: Path | None, overrides: Sequence[str], ranks: int, *, precision: str) -> RunConfig:
    """The config to benchmark; without a path quickstart, with expert parallelism over all ranks where that divides.

    precision: quickstart's. Raises `ConfigError` for a config that cannot be read.
    """
    sections: dict[str, dict[str, Any]] = {}
    if path is None:
        train = {
            "run_dir": "bench",
            "seq_length": _SEQ_LENGTH,
            "micro_batch_size": _MICRO_BATCH,
            "global_batch_size": _MICRO_BATCH * ranks,
            "precision": precision,
        }
        sections = {"model": _QUICKSTART, "tie": _QUICKSTART_TIE, "data": {"train": "random tokens"}, "train": train}
        if _QUICKSTART_EXPERTS % ranks == 0:
            sections["parallel"] = {"expert_model_parallel_size": ranks}
    config = load_config(path, overrides, sections)
    if config.data.tokenizer is not None:
        config = with_vocabulary(config)
    return config


def read_opponents(names: str) -> tuple[str, ...]:
    """The contenders of a list such as `untied,huggingface`. Raises `ConfigError` for a name that is none."""
    found = tuple(dict.fromkeys(filter(None, names.split(","))))
    valid = f"must be one of {', '.join(OPPONENTS)}"
    problems = [Problem("--against", name, valid) for name in found if name not in OPPONENTS]
    if not found:
        problems = [Problem("--against", names, f"must name one or more of {', '.join(OPPONENTS)}")]
    if problems:
        raise ConfigError(problems)
    return found


def check_job(job: Job) -> None:
    """Raise `ConfigError` with everything that is known to stand against `job` before a model is built."""
    problems = [*job.config.problems(job.ranks)]
    if not problems:
        problems = [*_subject_problems(job), *_opponent_problems(job)]
    if problems:
        raise ConfigError(problems)


def _subject_problems(job: Job) -> Iterator[Problem]:
    if not any(bank.is_tied for bank in job.config.topology().banks):
        yield Problem("tie.group_size", job.config.tie.group_size, "must tie some layers: else there is no contender")
    if job.config.distill.teacher is not None:
        yield Problem("distill.teacher", job.config.distill.teacher, "must be null: there is no data to learn from")
    if job.config.frozen():
        yield Problem("optimizer.freeze", list(job.config.frozen()), "must be empty: peers train all of a model")


def _opponent_problems(job: Job) -> Iterator[Problem]:
    parallel, peers = job.config.parallel, [name for name in job.opponents if name != UNTIED]
    if peers and parallel.tensor_model_parallel_size > 1:
        valid = f"must be 1 with --against {','.join(peers)}"
        yield Problem("parallel.tensor_model_parallel_size", parallel.tensor_model_parallel_size, valid)
    if peers and job.config.train.precision == "fp16":
        yield Problem("train.precision", "fp16", f"must be bf16 or fp32 with --against {','.join(peers)}")
    if peers and (where := job.config.offload_device("offload_optimizer")):
        valid = f"must be left out with --against {','.join(peers)}"
        yield Problem("deepspeed.zero_optimization.offload_optimizer", where, valid)
    if peers and job.config.optimizer.name != "adamw":
        valid = f"must be adamw with --against {','.join(peers)}"
        yield Problem("optimizer.name", job.config.optimizer.name, valid)
    if peers and (where := job.config.offload_device("offload_param")):
        valid = f"must be left out with --against {','.join(peers)}"
        yield Problem("deepspeed.zero_optimization.offload_param", where, valid)
    for name in job.opponents:
        if name in OF_TRANSFORMERS:
            yield from _transformers_problems(job, name)


def transformers_json(config: RunConfig) -> dict[str, Any]:
    """config.json of the model for Hugging Face transformers. Raises `ConfigError` for one that it cannot be."""
    from megatron_tied.convert.hf_output import plain_config

    model = config.model
    if model.max_position_embeddings is None:
        model = model.model_copy(update={"max_position_embeddings": config.train.seq_length})
    return plain_config(model, config.topology())


def _transformers_problems(job: Job, name: str) -> Iterator[Problem]:
    config = job.config_of(TIED if name == HUGGINGFACE else UNTIED)
    if config.topology().shares_more:
        yield Problem("tie.share", config.tie.share, f"must be experts with --against {name}, which shares no more")
    for key in _OURS_ONLY:
        if value := (config.model.model_extra or {}).get(key):
            yield Problem(f"model.{key}", value, f"must be left out with --against {name}, which would do without it")
    try:
        model_type = transformers_json(config)["model_type"]
    except ConfigError as error:
        for problem in error.problems:
            yield replace(problem, valid=f"{problem.valid} (--against {name})")
        return
    if name == AUTOEP and model_type == "olmoe":
        valid = "must be left out: DeepSpeed's AutoEP has no preset for OLMoE, which this model is to Hugging Face"
        yield Problem("--against", name, valid)
    if name == AUTOEP and job.config.parallel.expert_model_parallel_size == 1:
        valid = "must be more than 1 with --against autoep, which is expert parallelism"
        yield Problem("parallel.expert_model_parallel_size", 1, valid)
