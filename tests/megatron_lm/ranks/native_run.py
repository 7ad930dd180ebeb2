"""Trains with Megatron-Core alone, as Megatron-LM does: its DDP, optimizer and pipeline schedules. Used by workers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

import megatron_tied as mt
from megatron_tied.megatron_lm import bank_learning_rates, sum_bank_copies, tie_experts
from megatron_tied.models.gpt import transformer_config
from megatron_tied.models.spec import use_projection_norm, use_qkv_clip
from tests.distributed.training_run import (
    HYPERPARAMETERS,
    Case,
    gather_whole,
    load_reference,
    micro_batch,
    model_config,
)
from tests.megatron_lm.cases import NativeCase
from tests.oracle.names import to_reference
from tests.oracle.reference import ReferenceSpec, Weights

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


class NativeModel:
    """The model chunks of this rank, their optimizer, and one training step."""

    def __init__(self, spec: ReferenceSpec, case: NativeCase, job: dict[str, Any]):
        self.spec, self.case = spec, case
        tie = mt.TieConfig(banks=list(spec.banks), lr_divisor=case.lr_divisor, pipeline=case.pipeline)
        self.topology = mt.TieTopology.build(tie, spec.num_layers)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        self.config = _config(spec, case)
        built = [self._build(stage) for stage in range(case.vp or 1)]
        # As Megatron-Core draws them: otherwise on every stage.
        torch.manual_seed(torch.distributed.get_rank())
        for chunk in built:
            for weight in chunk.parameters():
                torch.nn.init.normal_(weight)
        tie_experts(built, self.topology)
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=case.distributed_optimizer,
            overlap_grad_reduce=case.overlap,
            overlap_param_gather=case.overlap and case.distributed_optimizer,
            # Small enough for several buckets; None: one, as Megatron-LM has it without overlap.
            bucket_size=20_000 if case.overlap else None,
        )
        self.chunks = [
            DistributedDataParallel(self.config, ddp, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(built)
        ]
        if case.pipeline == "allreduce":
            self.weights()  # which compares the copies of a bank
        for chunk in built:
            _load(chunk, spec, job["start"])
        self._connect()
        settings = OptimizerConfig(
            optimizer="adam",
            lr=job["lr"],
            min_lr=0.0,
            weight_decay=job["weight_decay"],
            adam_beta1=HYPERPARAMETERS["betas"][0],
            adam_beta2=HYPERPARAMETERS["betas"][1],
            adam_eps=HYPERPARAMETERS["eps"],
            clip_grad=job["clip_grad"],
            use_distributed_optimizer=case.distributed_optimizer,
            overlap_param_gather=case.overlap and case.distributed_optimizer,
        )
        overrides = {**get_standard_config_overrides(settings), **bank_learning_rates(settings, self.topology)}
        self.optimizer = get_megatron_optimizer(settings, self.chunks, overrides, use_gloo_process_groups=False)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, 0.0, job["lr"], 0.0, 0, 100, "constant", job["weight_decay"], job["weight_decay"], 100,
            "constant",
        )  # fmt: skip

    def _build(self, stage: int) -> GPTModel:
        spec, config, case = self.spec, self.config, self.case
        vp_stage = stage if case.vp else None
        if case.built == "tied spec":
            block = mt.tied_decoder_block_spec(config, self.topology, vp_stage=vp_stage)
        else:
            block = get_gpt_decoder_block_spec(config, False, normalization="RMSNorm", vp_stage=vp_stage)
        if spec.arch == "olmoe":
            use_projection_norm(block, spec.num_heads, spec.num_kv_heads)
            use_qkv_clip(block, spec.qkv_clip)
        ends = {"ignore_virtual": False, "vp_stage": vp_stage}
        model = GPTModel(
            config,
            block,
            spec.vocab_size,
            64,
            pre_process=parallel_state.is_pipeline_first_stage(**ends),
            post_process=parallel_state.is_pipeline_last_stage(**ends),
            position_embedding_type="rope",
            rotary_base=int(spec.rope_base),
            share_embeddings_and_output_weights=False,
            vp_stage=vp_stage,
        )
        for weight in model.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(weight)
        return model

    def _connect(self) -> None:
        """What Megatron-LM's `train` sets before the first step."""
        if self.case.overlap:
            self.config.no_sync_func = _one_or_all([chunk.no_sync for chunk in self.chunks])
        self.config.grad_scale_func = None
        self.config.finalize_model_grads_func = self._finalize
        self.at_boundary = lambda: None

    def _finalize(self, model: list, *args: Any, **kwargs: Any) -> None:
        finalize_model_grads(model, *args, **kwargs)
        sum_bank_copies(model)
        self.at_boundary()

    def step(self, batch: Tensor, at_boundary: Any) -> dict[str, float]:
        """One optimizer step on a global batch; `at_boundary` is called when the gradients are final."""
        self.at_boundary = at_boundary
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[self._data(batch) for _ in self.chunks] if self.case.vp else self._data(batch),
            model=self.chunks if self.case.vp else self.chunks[0],
            num_microbatches=self.case.accumulation,
            seq_length=batch.shape[1] - 1,
            micro_batch_size=len(batch) // (self.case.accumulation * parallel_state.get_data_parallel_world_size()),
            forward_only=False,
        )
        updated, grad_norm, _ = self.optimizer.step()
        assert updated
        self.scheduler.step(1)
        # The last stage knows the loss.
        lm_loss = torch.stack([each["lm_loss"] for each in losses]).mean() if losses else torch.zeros(())
        torch.distributed.all_reduce(lm_loss, group=parallel_state.get_pipeline_model_parallel_group())
        torch.distributed.all_reduce(lm_loss, group=parallel_state.get_data_parallel_group())
        lm_loss /= parallel_state.get_data_parallel_world_size()
        return {"lm_loss": lm_loss.item(), "grad_norm": float(grad_norm)}

    def _data(self, batch: Tensor) -> Iterator[tuple]:
        group = parallel_state.get_data_parallel_group()
        for index in range(self.case.accumulation):
            yield micro_batch(batch, index * group.size() + group.rank(), group.size() * self.case.accumulation)

    def gradients(self) -> Weights:
        """Every parameter's gradient by its reference name, of all ranks; a collective."""
        if self.case.distributed_optimizer:
            for chunk in self.chunks:
                _gather_gradients(chunk)
        return self._whole("main_grad")

    def weights(self) -> Weights:
        """Every parameter by its reference name, of all ranks; a collective."""
        for chunk in self.chunks:
            if self.case.distributed_optimizer and self.case.overlap:
                # The gathers that the next forward would wait for.
                chunk.start_param_sync(force_sync=True)
        return self._whole("data")

    def _whole(self, attribute: str) -> Weights:
        local: dict[str, Tensor] = {}
        for chunk in self.chunks:
            values = {name: getattr(weight, attribute) for name, weight in chunk.module.named_parameters()}
            local |= {_global_name(chunk.module, name): value for name, value in values.items()}
        whole = gather_whole(self.chunks[0].module, local, projection_norm=self.spec.arch == "olmoe")
        stages: list[Any] = [None] * self.case.pp
        group = parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.all_gather_object(stages, whole, group=group)
        values = {name: value for stage in stages for name, value in stage.items()}
        return to_reference(self.spec, dict(_without_copies(values, self.topology)))


def _config(spec: ReferenceSpec, case: NativeCase) -> TransformerConfig:
    backend = "grouped" if case.built == "tied spec" else "sequential"
    config = transformer_config(model_config(spec, Case(ep=case.ep, backend=backend, recompute=case.recompute)))
    config.pipeline_model_parallel_size = config.microbatch_group_size_per_vp_stage = case.pp
    config.virtual_pipeline_model_parallel_size = case.vp
    config.pipeline_dtype = torch.float32
    # As Megatron-LM has it: with two interleaved stages, batched sends both ways would be taken for each other.
    config.overlap_p2p_comm, config.batch_p2p_comm = case.vp is not None, case.vp is None
    return config


def _forward_step(data: Iterator[tuple], model: torch.nn.Module) -> tuple[Tensor, Any]:
    tokens, positions, mask, labels = next(data)
    return model(tokens, positions, mask, labels=labels), _loss


def _loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = output.float().mean()
    return loss, {"lm_loss": loss.detach().clone()}


def _one_or_all(functions: list) -> Any:
    return functions[0] if len(functions) == 1 else functions


def _load(chunk: GPTModel, spec: ReferenceSpec, start: Weights) -> None:
    """The reference's weights, a bank's copy from the weights of the bank's first layer."""
    owners = {layer: spec.owners[bank] for layer, bank in enumerate(spec.banks)}

    class Named:
        config = chunk.config

        @staticmethod
        def named_parameters() -> Iterator[tuple[str, Tensor]]:
            for name, weight in chunk.named_parameters():
                name = _global_name(chunk, name)
                if ".experts." in name:
                    name = _LAYER.sub(lambda found: f"decoder.layers.{owners[int(found[1])]}.", name)
                yield name, weight

    load_reference(Named, spec, start)


def _global_name(chunk: GPTModel, name: str) -> str:
    """A parameter's name in the whole model: a chunk counts its own layers."""
    return _LAYER.sub(lambda found: f"decoder.layers.{chunk.decoder.layers[int(found[1])].layer_number - 1}.", name)


def _without_copies(values: dict[str, Tensor], topology: mt.TieTopology) -> Iterator[tuple[str, Tensor]]:
    """Drop the copies of a bank, each of which must be its first layer's, bit for bit."""
    for name, value in values.items():
        found = _LAYER.match(name)
        if found and ".experts." in name and not topology.is_owner(layer := int(found[1])):
            owner = topology.bank(layer).owner
            assert torch.equal(value, values[_LAYER.sub(f"decoder.layers.{owner}.", name)]), name
        else:
            yield name, value


def _gather_gradients(chunk: DistributedDataParallel) -> None:
    """Complete the gradient buffers, of which each rank has only the part that it updates."""
    for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
        ranks = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            mine = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, mine, group=ranks)


initialize = partial(parallel_state.initialize_model_parallel, create_gloo_process_groups=False)
