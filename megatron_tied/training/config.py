"""The run config: the sections of `config.yaml` together, and the checks that need more than one of them.

Types and ranges are checked when a RunConfig is made (`config_file.load_config`), everything else by
`RunConfig.problems`. Paths are relative to the working directory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron_tied.engine.ds_config import (
    Refusals,
    RunValues,
    build_deepspeed_config,
    deepspeed_problems,
    refused_keys,
)
from megatron_tied.errors import ConfigError, Problem
from megatron_tied.installed import annotated_type, class_fields
from megatron_tied.models.config import ModelConfig, indivisible
from megatron_tied.topology import TieConfig, TieTopology
from megatron_tied.training.deepspeed_section import deepspeed_type_problems
from megatron_tied.training.fields import Section
from megatron_tied.training.optimizer_config import Frozen, OptimizerConfig
from megatron_tied.training.sections import (
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    MonitorConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron_tied.training.validation import type_problem


def _resolve_model(section: object) -> ModelConfig:
    if isinstance(section, ModelConfig):
        return section
    if not isinstance(section, Mapping):
        raise ValueError("must be a mapping of keys")
    return ModelConfig.resolve(section)


class RunConfig(Section):
    """Everything that one training run is told."""

    model: Annotated[ModelConfig, BeforeValidator(_resolve_model)]
    tie: TieConfig = TieConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    distill: DistillConfig = DistillConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """What ds_config.json would hold; ZeRO stage 1 unless it says another."""

    def topology(self) -> TieTopology:
        """Which layer uses which expert bank. Raises ConfigError."""
        return self.model.topology(self.tie)

    def frozen(self) -> Frozen:
        """What training leaves as it is, in the words of `optimizer.freeze`."""
        if self.optimizer.freeze is not None:
            return self.optimizer.freeze
        return ("norms",) if self.distill.teacher is not None else ()

    def data_parallel_size(self, world_size: int) -> int:
        """Over how many groups of tensor parallel ranks a global batch is spread."""
        return max(1, world_size // self.parallel.tensor_model_parallel_size)

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per rank and optimizer step."""
        at_once = self.train.micro_batch_size * self.data_parallel_size(world_size)
        return max(1, self.train.global_batch_size // at_once)

    def deepspeed_config(self, world_size: int) -> dict[str, Any]:
        """The complete ds_config for `world_size` ranks. Raises ConfigError."""
        config = build_deepspeed_config(self.deepspeed, **self._run_values(world_size))
        if config.get("tensorboard", {}).get("enabled"):
            # A directory of its own: TensorBoard reads only the newest file of one.
            config["tensorboard"] |= {"output_path": str(self.tensorboard_directory()), "job_name": "deepspeed"}
        return config

    def tensorboard_directory(self) -> Path:
        """Where TensorBoard's files go: where DeepSpeed's `tensorboard` section says, else into the run directory."""
        section = self.deepspeed.get("tensorboard", {})
        if section.get("enabled") and section.get("output_path"):
            return Path(section["output_path"], section.get("job_name", "DeepSpeedJobName"))
        return Path(self.train.run_dir, "tensorboard")

    def problems(self, world_size: int) -> list[Problem]:
        """Everything that is wrong with this run on `world_size` ranks. Reads no data and builds no model."""
        return [
            *self._model_problems(),
            *self._parallel_problems(world_size),
            *self._batch_problems(world_size),
            *self._schedule_problems(),
            *self._distill_problems(),
            *deepspeed_problems(self.deepspeed, **self._run_values(world_size)),
            *deepspeed_type_problems(self.deepspeed),
            *self._checkpoint_problems(),
            *self._monitor_problems(),
        ]

    def _run_values(self, world_size: int) -> RunValues:
        return RunValues(
            micro_batch_size=self.train.micro_batch_size,
            global_batch_size=self.train.global_batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps(world_size),
            clip_grad=self.optimizer.clip_grad,
            precision=self.train.precision,
            expert_parallel_size=self.parallel.expert_model_parallel_size,
            tensor_parallel_size=self.parallel.tensor_model_parallel_size,
        )

    def _model_problems(self) -> Iterator[Problem]:
        model, fields = self.model, transformer_fields()
        passed_on = model.model_extra or {}
        yield from model.problems()
        yield from model.unknown_fields(fields)
        yield from refused_keys(passed_on, _REFUSED_MODEL_KEYS, "model")
        for name in sorted(passed_on.keys() & fields.keys()):
            wanted = annotated_type(fields[name])
            if wanted and (problem := type_problem(f"model.{name}", passed_on[name], wanted)):
                yield problem
        if passed_on.get("attention_output_gate"):
            for name, value in (("optimizer.name", self.optimizer.name), ("model.init_method", model.init_method)):
                if value in ("muon", "depth_scaled_xavier"):
                    valid = f"must be false with {name}: {value}, which knows query, key and value and no gate"
                    yield Problem("model.attention_output_gate", True, valid)
        if model.vocab_size is None and self.data.tokenizer is None:
            yield Problem("model.vocab_size", None, "must be given, or else data.tokenizer")
        longest = model.max_position_embeddings
        if longest is not None and self.train.seq_length > longest:
            valid = f"must be at most model.max_position_embeddings = {longest}"
            yield Problem("train.seq_length", self.train.seq_length, valid)
        try:
            topology = self.topology()
        except ConfigError as error:
            yield from error.problems
        else:
            if self.tie.share != "experts" and not topology.shares_more:
                yield Problem(
                    "tie.share", self.tie.share, "must be experts where no layers are tied: see tie.group_size"
                )

    def _parallel_problems(self, world_size: int) -> Iterator[Problem]:
        parallel, processes = self.parallel, {_PROCESSES: world_size}
        for name in ("pipeline_model_parallel_size", "context_parallel_size"):
            size = getattr(parallel, name)
            if size != 1:
                yield Problem(f"parallel.{name}", size, f"must be 1: only {_SUPPORTED} parallelism are supported")
        experts = {"model.num_moe_experts": self.model.num_moe_experts, **processes}
        if self.tie.num_tied_experts:
            experts["tie.num_tied_experts"] = self.tie.num_tied_experts
        # A launcher that nobody tells how many starts one, where there is no GPU.
        start_more = "; deepspeed --num_accelerators N and torchrun --nproc_per_node N start N processes"
        hints = {_PROCESSES: start_more} if world_size == 1 else None
        size = parallel.expert_model_parallel_size
        yield from indivisible("parallel.expert_model_parallel_size", size, experts, hints)
        if self.optimizer.name == "muon" and parallel.tensor_model_parallel_size > 1:
            valid = "must be 1 with optimizer.name: muon, which needs whole matrices"
            yield Problem("parallel.tensor_model_parallel_size", parallel.tensor_model_parallel_size, valid)
        # The sequence, because norms and routers work on a part of it.
        cut = {**self.model.cut_by_tensor_parallelism(), "train.seq_length": self.train.seq_length, **processes}
        yield from indivisible("parallel.tensor_model_parallel_size", parallel.tensor_model_parallel_size, cut)

    def _batch_problems(self, world_size: int) -> Iterator[Problem]:
        micro, batch = self.train.micro_batch_size, self.train.global_batch_size
        data_parallel = self.data_parallel_size(world_size)
        unit = micro * data_parallel
        if batch % unit:
            below = batch - batch % unit
            near = f"{below} or {below + unit}" if below else str(unit)
            product = f"train.micro_batch_size {micro} x {data_parallel} data parallel ranks"
            valid = f"must be a multiple of {unit} = {product}; nearest: {near}"
            yield Problem("train.global_batch_size", batch, valid)

    def _schedule_problems(self) -> Iterator[Problem]:
        train, optimizer, data = self.train, self.optimizer, self.data
        yield from optimizer.problems(train.steps)
        if data.validation is None:
            for_training, for_validation = data.split
            if for_training == 0:
                yield Problem("data.split", list(data.split), "must leave a first share > 0, for training")
            if train.eval_every and for_validation == 0:
                valid = "must be 0 without validation data: see data.validation and data.split"
                yield Problem("train.eval_every", train.eval_every, valid)

    def _distill_problems(self) -> Iterator[Problem]:
        distill = self.distill
        if distill.teacher is None:
            if distill != DistillConfig():
                yield Problem("distill.teacher", None, "must be given with the other keys of distill")
            return
        if distill.kl == distill.moe_output == 0:
            yield Problem("distill.kl", distill.kl, "must be > 0, or distill.moe_output: else it teaches nothing")
        if self.parallel.tensor_model_parallel_size > 1:
            valid = "must be null with tensor parallelism: a rank must have all logits of a token"
            yield Problem("distill.teacher", distill.teacher, valid)

    def _checkpoint_problems(self) -> Iterator[Problem]:
        if self.checkpoint.save_every and self.offloads_to_nvme():
            valid = "must be 0 with offload to nvme: what is on it is not saved; offload to cpu is"
            yield Problem("checkpoint.save_every", self.checkpoint.save_every, valid)

    def _monitor_problems(self) -> Iterator[Problem]:
        every, expensive, window = self.monitor.every, self.monitor.expensive_every, self.monitor.dead_window
        if every and expensive % every:
            valid = f"must be 0 or a multiple of monitor.every = {every}"
            yield Problem("monitor.expensive_every", expensive, valid)
        if window < every:
            yield Problem("monitor.dead_window", window, f"must be at least monitor.every = {every}")

    def offloads_to_nvme(self) -> bool:
        """Whether ZeRO keeps optimizer states or parameters on disks."""
        return "nvme" in (self.offload_device("offload_optimizer"), self.offload_device("offload_param"))

    def offload_device(self, key: Literal["offload_optimizer", "offload_param"]) -> str | None:
        """Where ZeRO keeps what `key` is about, if not on the ranks' devices."""
        zero = self.deepspeed.get("zero_optimization")
        section = zero.get(key) if isinstance(zero, Mapping) else None
        device = section.get("device") if isinstance(section, Mapping) else None
        return None if device == "none" else device


def transformer_fields() -> Mapping[str, str]:
    """The fields of Megatron-Core's TransformerConfig and of that of latent attention, with their annotations."""
    modules = ("megatron.core.transformer.transformer_config", "megatron.core.model_parallel_config")
    # Upstream's annotation leaves out None: queries that are not compressed.
    return {**class_fields("MLATransformerConfig", *modules), "q_lora_rank": "Optional[int]"}


_PROCESSES = "the number of processes"
_SUPPORTED = "expert, tensor and data"
_ONE_RANK = f"must be left out: only {_SUPPORTED} parallelism are supported"
_UNDER_DEEPSPEED = "must be false: gradients would not reach DeepSpeed"
_SET_BY_US = "must be left out: it has the one value that tied experts work with"
_NEVER = object()  # equal to nothing: no value of the key is harmless

_REFUSED_MODEL_KEYS: Refusals = {
    "autocast_dtype": (None, "is set by train.precision"),
    "cache_mla_latents": (False, "must be false: it is for inference"),
    "calculate_per_token_loss": (False, "must be false: the loss is a mean over each micro-batch"),
    "context_parallel_size": (1, _ONE_RANK),
    "delay_wgrad_compute": (False, _UNDER_DEEPSPEED),
    "enable_autocast": (False, "is set by train.precision"),
    "expert_tensor_parallel_size": (None, "must be left out: experts are whole on every tensor parallel rank"),
    "gradient_accumulation_fusion": (False, _UNDER_DEEPSPEED),
    "hetereogenous_dist_checkpoint": (_NEVER, _SET_BY_US),
    "mtp_num_layers": (None, "must be left out: multi-token prediction is not supported"),
    "overlap_moe_expert_parallel_comm": (False, "must be false: it needs Megatron's own schedules"),
    "perform_initialization": (_NEVER, _SET_BY_US),
    "sequence_parallel": (False, "must be left out: it comes with parallel.tensor_model_parallel_size > 1"),
    "virtual_pipeline_model_parallel_size": (None, _ONE_RANK),
}
