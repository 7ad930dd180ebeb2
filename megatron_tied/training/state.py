"""The whole state of a run, gathered from its parts for a checkpoint and given back to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from megatron_tied import __version__
from megatron_tied.checkpoint.layout import Layout
from megatron_tied.checkpoint.loader import Checkpoint, load, saved_buffers
from megatron_tied.checkpoint.manifest import Manifest
from megatron_tied.checkpoint.rectangles import StateDict, state_dict
from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.engine.holdings import holdings
from megatron_tied.engine.partitions import WEIGHT, create_optimizer_states, fragments, optimizer_scalars
from megatron_tied.monitor.dead_experts import LastUse
from megatron_tied.training.config import RunConfig
from megatron_tied.training.schedule import go_to

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class RunState:
    """What a run is at the end of a step: tensors, and a manifest with everything else."""

    def __init__(self, config: RunConfig, engine: TiedMoEEngine, layout: Layout, last_use: LastUse):
        self._config = config
        self._engine = engine
        self._layout = layout
        self._last_use = last_use

    def tensors(self) -> StateDict:
        """What this rank has to save: views of the optimizer's tensors, the routers' buffers, RNG states."""
        buffers = saved_buffers(self._engine.module) if torch.distributed.get_rank() == 0 else {}
        return {
            **state_dict(fragments(self._engine), self._layout, saving=True),
            **buffers,
            **self._random_states(),
        }

    def expected(self) -> set[str]:
        """The names of all weights, which a checkpoint must have."""
        return {f"{WEIGHT}/{block.tensor}" for parameter in self._layout.values() for block in parameter.blocks}

    def manifest(self, step: int) -> Manifest:
        """The manifest of `step`, its tensors not yet listed."""
        engine = self._engine
        return Manifest(
            step=step,
            consumed_samples=step * self._config.train.global_batch_size,
            world_size=torch.distributed.get_world_size(),
            software=f"megatron-tied {__version__}",
            run=self._config.model_dump(mode="json"),
            trainer={
                "banks": [list(bank.layers) for bank in self._config.topology().banks],
                "skipped_steps": engine.skipped_steps,
                "last_use": self._last_use.to_dict(),
                "schedule": engine.lr_scheduler.last_epoch,
                "loss_scaler": {name: getattr(scaler, name) for name in _SCALER} if (scaler := self._scaler()) else {},
                "optimizer": {"name": self._config.optimizer.name, "scalars": optimizer_scalars(engine)},
            },
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from `checkpoint`; a collective."""
        manifest, engine = checkpoint.manifest, self._engine
        names = manifest.tensors.keys()
        states = {name.partition("/")[0] for name in names} - {WEIGHT, "buffer", "rng"}
        create_optimizer_states(engine, sorted(states), manifest.trainer["optimizer"]["scalars"])
        wanted = state_dict(fragments(engine), self._layout, saving=False)
        random = self._random_states()
        # With other ranks, experts on them, or devices, there is no state to go on with; dropout alone draws from it.
        same = self._is_placed_as(manifest) and all(
            name in names and manifest.tensors[name].shape == list(state.shape) for name, state in random.items()
        )
        load({**wanted, **saved_buffers(engine.module), **(random if same else {})}, checkpoint)
        holdings(engine).publish()
        if same:
            self._set_random_states(random)
        else:
            model_parallel_cuda_manual_seed(self._config.train.seed + manifest.step)
        self._restore_trainer(manifest.step, manifest.trainer)

    def _is_placed_as(self, manifest: Manifest) -> bool:
        parallel = self._config.parallel.model_dump(mode="json")
        return (manifest.world_size, manifest.run["parallel"]) == (torch.distributed.get_world_size(), parallel)

    def begin_with_weights_of(self, checkpoint: Checkpoint) -> None:
        """Take the weights, and the routers' buffers, of `checkpoint`, nothing else; a collective."""
        wanted = state_dict(fragments(self._engine), self._layout, saving=False)
        wanted = {name: value for name, value in wanted.items() if name.startswith(f"{WEIGHT}/")}
        load({**wanted, **saved_buffers(self._engine.module)}, checkpoint)
        holdings(self._engine).publish()

    def _restore_trainer(self, step: int, trainer: Mapping[str, Any]) -> None:
        engine = self._engine
        engine.global_steps, engine.skipped_steps = step, trainer["skipped_steps"]
        engine.global_samples = step * engine.train_batch_size()
        # By these the engine knows the last micro-batch of a step, and there may be another number of them now.
        engine.micro_steps = step * engine.gradient_accumulation_steps()
        # The schedule is a function of the step: the rates of this config, not of the one that was saved.
        go_to(engine.lr_scheduler, trainer["schedule"])
        if saved := trainer.get("last_use"):
            self._last_use.restore(saved)
        if (scaler := self._scaler()) is not None:
            for name, value in trainer["loss_scaler"].items():
                setattr(scaler, name, value)

    def _scaler(self) -> Any:
        """fp16's dynamic loss scaler; None without, or with a loss scale that the config fixes."""
        engine = self._engine
        return engine.optimizer.loss_scaler if engine.fp16_enabled() and engine.dynamic_loss_scale() else None

    def _random_states(self) -> dict[str, torch.Tensor]:
        rank = torch.distributed.get_rank()
        states = {"host": torch.get_rng_state(), **get_cuda_rng_tracker().get_states()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        return {f"rng/rank_{rank:05d}/{name}": state for name, state in states.items()}

    def _set_random_states(self, states: Mapping[str, torch.Tensor]) -> None:
        by_name = {name.split("/", 2)[2]: state for name, state in states.items()}
        torch.set_rng_state(by_name.pop("host"))
        if "cuda" in by_name:
            torch.cuda.set_rng_state(by_name.pop("cuda"))
        get_cuda_rng_tracker().set_states(by_name)
