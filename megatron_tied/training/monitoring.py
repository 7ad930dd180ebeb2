"""What a run watches besides its losses, and at which steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from megatron_tied.engine.bank_norms import BankNorms
from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.monitor.alerts import Alerts, WatchedRun
from megatron_tied.monitor.all_to_all import AllToAllMeter
from megatron_tied.monitor.dead_experts import LastUse
from megatron_tied.monitor.figures import routing_metrics, routing_tables
from megatron_tied.monitor.observer import RoutingObserver
from megatron_tied.monitor.sinks import Tables, numbered
from megatron_tied.monitor.step_time import StepTime
from megatron_tied.monitor.use_sites import UseSiteGradients, gradient_agreement
from megatron_tied.training.config import RunConfig


class Monitoring:
    """Watches the steps that `config.monitor` names. Every rank calls the same methods at the same steps.

    Around each step `watching`, and in it `forward`, `phase` and `before_update`; after it `finish`. `alerts` reads
    what is logged.
    """

    def __init__(self, config: RunConfig, engine: TiedMoEEngine, last_use: LastUse):
        self._settings = config.monitor
        self._engine = engine
        self._topology = config.topology()
        self._top_k = config.model.moe_router_topk
        self._last_use = last_use
        self._routing = RoutingObserver(engine.module)
        self._all_to_all = AllToAllMeter()
        self._use_sites = UseSiteGradients(engine.module)
        self._norms = None if config.offloads_to_nvme() else BankNorms(engine)
        self.alerts = Alerts(config.monitor.alerts, _watched_run(config))
        self.step_time = StepTime()
        engine.time_reduction = lambda: self.step_time.phase("reduce")
        self._observes = self._examines = False

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Around a whole step: is it observed, and examined closely?"""
        every, closely = self._settings.every, self._settings.expensive_every
        self._observes = bool(every) and step % every == 0
        self._examines = self._observes and bool(closely) and step % closely == 0
        if self._examines:
            self._use_sites.begin()
        with self._all_to_all.measuring() if self._observes else nullcontext():
            yield

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a micro-batch's forward pass."""
        with self.phase("forward"), self._routing.observing() if self._observes else nullcontext():
            yield

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around any other part of a step; see `StepTime`."""
        return self.step_time.phase(name)

    def before_update(self) -> None:
        """After the last backward pass of a step."""
        if self._examines and self._norms is not None:
            self._norms.before_update()

    def finish(self, step: int) -> tuple[dict[str, float], Tables]:
        """The metrics and tables of `step`, empty if it was not observed. A collective."""
        if not self._observes:
            return {}, {}
        observation = self._routing.take()
        self._last_use.note(step, {layer: sums.counts for layer, sums in observation.layers.items()})
        metrics = routing_metrics(
            observation,
            self._topology,
            top_k=self._top_k,
            last_use=self._last_use,
            step=step,
            window=self._settings.dead_window,
        )
        metrics |= self._all_to_all.take()
        if not self._examines:
            return metrics, {}
        return metrics | self._bank_metrics(), routing_tables(observation, self._topology, self._top_k)

    def _bank_metrics(self) -> dict[str, float]:
        metrics = {}
        for bank, norms in (self._norms.take() if self._norms is not None else {}).items():
            metrics[numbered("bank_weight_norm", bank)] = norms.weight
            metrics[numbered("bank_gradient_norm", bank)] = norms.gradient
            # A step that was discarded is no update of size 0.
            if self._engine.was_step_applied():
                metrics[numbered("bank_update_norm", bank)] = norms.update
                metrics[numbered("bank_update_ratio", bank)] = norms.update_ratio
        for bank, products in self._use_sites.take().items():
            for name, value in gradient_agreement(products).items():
                metrics[numbered(f"bank_{name}", bank)] = value
        return metrics


def _watched_run(config: RunConfig) -> WatchedRun:
    return WatchedRun(
        topology=config.topology(),
        num_experts=config.model.num_moe_experts,
        top_k=config.model.moe_router_topk,
        dead_window=config.monitor.dead_window,
        peak_lr=config.optimizer.lr,
    )
