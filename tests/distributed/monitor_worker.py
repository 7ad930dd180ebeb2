"""One rank of the monitoring test: trains two steps of each case, and keeps what was logged beside what was decided."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_tied.engine.groups import start_distributed
from megatron_tied.layers.moe_layer import tied_layers
from megatron_tied.monitor.dead_experts import LastUse
from megatron_tied.training.config_file import parse_config
from megatron_tied.training.evaluation import LossFunction
from megatron_tied.training.loop import train_step
from megatron_tied.training.monitoring import Monitoring
from megatron_tied.training.run import build_engine
from tests.distributed.training_run import full_gradients, full_weights, gather_whole, model_parallel
from tests.fp16 import allow_fp16


class Decisions:
    """What every router of the model has decided in forward passes: by layer, one entry a micro-batch."""

    def __init__(self, model: torch.nn.Module):
        self.is_forward = False
        self.noted: dict[int, list[dict[str, Tensor]]] = {}
        for layer in tied_layers(model):
            layer.router.gating = self._keeping_logits(layer, layer.router.gating)
            layer.router.register_forward_hook(self._keeper(layer))

    def _keeping_logits(self, layer: Any, gating: Any) -> Any:
        def keep(hidden: Tensor) -> Tensor:
            logits = gating(hidden)
            if self.is_forward:
                self.noted.setdefault(layer.layer_index, []).append({"logits": logits.detach().flatten(0, 1).clone()})
            return logits

        return keep

    def _keeper(self, layer: Any) -> Any:
        def keep(router: torch.nn.Module, arguments: tuple, output: tuple) -> None:
            if self.is_forward:
                probs, routing_map = output[:2]
                self.noted[layer.layer_index][-1] |= {"probs": probs.detach().clone(), "map": routing_map.clone()}

        return keep

    def of_all_ranks(self) -> list[dict[int, list[dict[str, Tensor]]]]:
        """The decisions of each rank since the last call; a collective."""
        everywhere: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, self.noted)
        self.noted = {}
        return everywhere


class RecordingLoss(LossFunction):
    """Lets `decisions` note forward passes alone."""

    def __init__(self, decisions: Decisions):
        super().__init__(torch.device("cpu"))
        self.decisions = decisions

    def __call__(self, engine: Any, batch: dict[str, Tensor]) -> Tensor:
        self.decisions.is_forward = True
        loss = super().__call__(engine, batch)
        self.decisions.is_forward = False
        return loss


class Watched(Monitoring):
    """Also keeps the gradients that the engine has when the monitoring looks."""

    gradients: dict[str, Tensor]

    def before_update(self) -> None:
        self.gradients = full_gradients(self.engine.module)
        super().before_update()


def my_batches(batch: Tensor, size: int) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches of a global batch [sequences, seq + 1]."""
    group = parallel_state.get_data_parallel_group()
    for rows in batch.split(size)[group.rank() :: group.size()]:
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        yield {"tokens": tokens, "labels": labels, "position_ids": positions, "loss_mask": torch.ones_like(tokens)}


def run(values: dict[str, Any], batches: Tensor) -> list[dict[str, Any]]:
    """Per step: the logged metrics and tables, and all that they can be computed from."""
    config = parse_config(values)
    with model_parallel(config.parallel.expert_model_parallel_size, config.parallel.tensor_model_parallel_size):
        engine, *_ = build_engine(config)
        monitoring = Watched(config, engine, LastUse(every=1))
        monitoring.engine = engine
        decisions = Decisions(engine.module)
        loss_function = RecordingLoss(decisions)
        steps = []
        for number, batch in enumerate(batches, start=1):
            before = whole(engine.module, full_weights(engine.module))
            with monitoring.watching(number):
                train_step(engine, loss_function, my_batches(batch, config.train.micro_batch_size), monitoring)
            metrics, tables = monitoring.finish(number)
            steps.append(
                {
                    "metrics": metrics,
                    "tables": tables,
                    "decisions": decisions.of_all_ranks(),
                    "before": before,
                    "after": whole(engine.module, full_weights(engine.module)),
                    "gradients": whole(engine.module, monitoring.gradients),
                    "grad_norm": float(engine.get_global_grad_norm()),
                    "scale": engine.loss_scale_now(),
                    "time": monitoring.step_time.take(1, 1e9),
                }
            )
        engine.destroy()
    return steps


def whole(model: torch.nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values with the experts of all ranks, and all parts of matrices."""
    return gather_whole(model, values, projection_norm=False)


@contextmanager
def started() -> Iterator[None]:
    """This rank among the others."""
    start_distributed()
    allow_fp16()
    yield
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(job_file: str, result_file: str) -> None:
    """Run every case of the job; rank 0 saves the results."""
    with started():
        job = torch.load(job_file, weights_only=False)
        results = {name: run(values, job["batches"]) for name, values in job["cases"].items()}
        if torch.distributed.get_rank() == 0:
            torch.save(results, result_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
