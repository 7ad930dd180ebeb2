"""One engine in one process: losses, gradients, clipping, schedules, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from megatron_tied import ConfigError, TiedMoEEngine, initialize, parameter_groups
from megatron_tied.engine.ds_config import build_deepspeed_config
from megatron_tied.engine.gradient_norm import clip_gradients, global_gradient_norm
from megatron_tied.engine.partitions import fragments
from megatron_tied.errors import TrainingStopped
from megatron_tied.layers.moe_layer import tied_layers
from megatron_tied.training.guards import check_step
from megatron_tied.training.sections import TrainConfig
from tests.tiny_model import Inputs, build, gradients, inputs, loss

pytestmark = pytest.mark.usefixtures("launched")

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def selective(module: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": [module]}


def ds_config(stage: int = 0, accumulation: int = 1, clip: float = 0.0, **changes: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, **changes.pop("zero", {})},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        **changes,
    }


def start(model: torch.nn.Module, lr: float = 0.5, **config: Any) -> TiedMoEEngine:
    """An engine that does plain SGD."""
    optimizer = torch.optim.SGD(parameter_groups(model, lr=lr), lr=lr)
    return initialize(model, ds_config(**config), optimizer=optimizer)[0]


def accumulated(engine: TiedMoEEngine, batches: list[Inputs]) -> dict[str, Tensor]:
    """Every parameter's gradient after these micro-batches, one optimizer step's worth."""
    for index, batch in enumerate(batches):
        engine.backward(loss(engine, batch))
        if index < len(batches) - 1:
            engine.step()
    return {name: safe_get_full_grad(weight).clone() for name, weight in engine.module.named_parameters()}


# ---- gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_those_of_plain_autograd(stage):
    model = build()
    loss(model, inputs()).backward()
    found = accumulated(start(build(), stage=stage), [inputs()])
    torch.testing.assert_close(found, gradients(model), rtol=1e-5, atol=1e-7)


def test_a_caller_who_scales_the_loss_himself_gets_router_losses_to_match():
    engine = start(build(moe_aux_loss_coeff=10.0), accumulation=2)
    model = build(moe_aux_loss_coeff=10.0)
    loss(model, inputs()).backward()
    engine.backward(loss(engine, inputs()), scale_wrt_gas=False)
    name = "decoder.layers.2.mlp.router.weight"
    torch.testing.assert_close(dict(engine.module.named_parameters())[name].grad, gradients(model)[name])


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    ("backend", "recompute"),
    [
        ("grouped", FULL),
        ("grouped", selective("moe")),
        ("grouped", selective("moe_act")),
        ("sequential", FULL),
        ("sequential", selective("moe")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("recompute_modules", ["full"])[0],
)
def test_recompute_hands_a_banks_gradient_on_once(backend, recompute, stage):
    batches = [inputs(seed=1), inputs(seed=2)]
    expected = accumulated(start(build(expert_backend=backend), accumulation=2), batches)
    # Small buckets: a gradient that is handed on too early is reduced before the next part comes.
    zero = {"overlap_comm": True, "reduce_bucket_size": 4096, "stage3_param_persistence_threshold": 0}
    engine = start(build(expert_backend=backend, **recompute), accumulation=2, stage=stage, zero=zero)
    torch.testing.assert_close(accumulated(engine, batches), expected, rtol=1e-5, atol=1e-7)


def test_a_layer_left_out_of_backward_is_an_error_and_the_next_pass_is_sound():
    model = build()
    engine = start(model)
    experts = list(tied_layers(model))[2].experts
    cut = experts.register_forward_hook(lambda module, args, output: (output[0].detach(), None))
    with pytest.raises(RuntimeError, match=re.escape("expert bank 1 (layers 1, 2, 3): only 2 of 3 layers had")):
        engine.backward(loss(engine, inputs()))
    cut.remove()
    model.zero_grad()
    found = accumulated(engine, [inputs()])
    torch.testing.assert_close(found, accumulated(start(build()), [inputs()]), rtol=1e-6, atol=1e-8)


def test_another_backend_notices_the_missing_layer_too():
    model = build(expert_backend="sequential")
    engine = start(model)
    experts = list(tied_layers(model))[5].experts
    experts.register_forward_hook(lambda module, args, output: (output[0].detach(), None))
    with pytest.raises(RuntimeError, match=re.escape("expert bank 2 (layers 4, 5): only 1 of 2 layers had")):
        engine.backward(loss(engine, inputs()))


# ---- the norm and the step --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("clip", [0.0, 0.01, 1000.0])
def test_the_norm_is_over_everything_and_the_step_is_clipped_by_it(stage, clip):
    model = build()
    loss(model, inputs()).backward()
    expected = gradients(model)
    norm = torch.stack([gradient.square().sum() for gradient in expected.values()]).sum().sqrt().item()
    factor = clip / norm if 0 < clip < norm else 1.0

    engine = start(build(), stage=stage, clip=clip)
    before = {name: weight.clone() for name, weight in build().named_parameters()}
    accumulated(engine, [inputs()])
    engine.step()
    assert float(engine.get_global_grad_norm()) == pytest.approx(norm, rel=1e-5)
    if stage < 3:
        rates = {id(w): group["lr"] for group in parameter_groups(engine.module, lr=0.5) for w in group["params"]}
        for name, weight in engine.module.named_parameters():
            moved = before[name] - rates[id(weight)] * factor * expected[name]
            torch.testing.assert_close(weight.detach(), moved, rtol=1e-5, atol=1e-6)


def test_norm_and_clipping_equal_torchs():
    model, other = build(), build()
    for each in (model, other):
        loss(each, inputs()).backward()
    expected = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.01)
    norm = global_gradient_norm(model.parameters())
    assert norm == pytest.approx(expected.item(), rel=1e-6)
    clip_gradients(model.parameters(), norm, 0.01)
    torch.testing.assert_close(gradients(model), gradients(other))
    clip_gradients(model.parameters(), 0.01, 1.0)
    torch.testing.assert_close(gradients(model), gradients(other))


def test_norm_of_experts_alone_and_of_nothing():
    model = build()
    for name, weight in model.named_parameters():
        weight.requires_grad_(".mlp.experts." in name)
    assert global_gradient_norm(model.parameters()) == 0.0
    loss(model, inputs()).backward()
    found = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert len(found) == 6
    assert global_gradient_norm(model.parameters()) == pytest.approx(
        torch.cat([g.flatten() for g in found]).norm().item()
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_learns_and_stays_tied(stage):
    model = build()
    engine = start(model, stage=stage, clip=1.0, lr=1.0)
    losses = []
    for _ in range(12):
        value = loss(engine, inputs())
        engine.backward(value)
        engine.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.5
    for layer in tied_layers(model):
        layer.check_tied()


# ---- what initialize takes --------------------------------------------------------------------------------

TORCH_ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 0.25, "weight_decay": 0.5, "torch_adam": True}}}


def test_it_returns_what_deepspeed_initialize_returns(tmp_path):
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(ds_config(stage=1)))
    rows = torch.utils.data.TensorDataset(*(tensor.expand(2, *tensor.shape[1:]) for tensor in inputs()))
    engine, optimizer, loader, schedule = initialize(
        build(),
        file,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        training_data=rows,
    )
    assert isinstance(engine, TiedMoEEngine)
    assert (engine.optimizer, engine.lr_scheduler) == (optimizer, schedule)
    assert engine.zero_optimization_stage() == 1
    assert len(loader) == 1


def rates(engine: TiedMoEEngine) -> dict[str, float]:
    return {group["label"]: group["lr"] for group in engine.optimizer.param_groups}


@pytest.mark.parametrize("how", ["built", "factory", "named"])
def test_an_optimizer_from_anywhere_gets_the_divided_rates(how):
    model = build()
    optimizer = {
        "built": lambda: torch.optim.AdamW(parameter_groups(model, lr=0.25)),
        "factory": lambda: lambda groups: torch.optim.AdamW(groups),
        "named": lambda: None,
    }[how]()
    engine, *_ = initialize(model, ds_config(stage=1, **TORCH_ADAMW) if how == "named" else ds_config(1), optimizer)
    base = 1e-3 if how == "factory" else 0.25
    assert rates(engine) == pytest.approx(
        {
            "dense": base,
            "dense_no_decay": base,
            "experts": base,
            "experts_lr_div_1.732": base / 3**0.5,
            "experts_lr_div_1.414": base / 2**0.5,
        }
    )
    decays = {group["label"]: group["weight_decay"] for group in engine.optimizer.param_groups}
    assert decays["dense_no_decay"] == 0.0
    if how == "named":
        assert {decay for label, decay in decays.items() if label != "dense_no_decay"} == {0.5}


@pytest.mark.parametrize("stage", [0, 2])
def test_a_schedule_keeps_the_ratios(stage):
    model = build()
    optimizer = torch.optim.SGD(parameter_groups(model, lr=1.0), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    engine, *_ = initialize(model, ds_config(stage), optimizer=optimizer, lr_scheduler=schedule)
    for step in range(3):
        assert rates(engine)["dense"] == pytest.approx(0.5**step)
        assert rates(engine)["experts_lr_div_1.732"] == pytest.approx(0.5**step / 3**0.5)
        engine.backward(loss(engine, inputs()))
        engine.step()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"zero": {"leaf_module": {"classes": ["X"]}}}, "zero_optimization.leaf_module"),
        ({"fp16": {"enabled": True}}, "zero_optimization.stage"),
        ({"expert_parallel": {"enabled": True}}, "expert_parallel"),
        ({"prescale_gradients": True}, "prescale_gradients"),
    ],
)
def test_options_that_would_untie_or_lose_gradients_are_refused(changes, field):
    with pytest.raises(ConfigError, match=rf"^deepspeed\.{re.escape(field)} = "):
        start(build(), **changes)


def test_a_precision_that_the_host_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: None)  # as DeepSpeed says no of a CPU
    told = r"^deepspeed\.fp16\.enabled = True: DeepSpeed does not train in fp16 on this host's cpu; use bf16 or fp32$"
    with pytest.raises(ConfigError, match=told):
        start(build(), stage=1, fp16={"enabled": True})


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_half_precision_keeps_router_losses_and_language_loss_in_proportion(stage, precision):
    fields = {"moe_aux_loss_coeff": 1.0}
    # With most other tokens some router chooses another expert when it rounds.
    batch = inputs(seed=7)
    model = build(**fields)
    loss(model, batch).backward()
    options = {"enabled": True, **({"initial_scale_power": 6} if precision == "fp16" else {})}
    engine = start(build(precision=precision, **fields), stage=stage, **{precision: options})
    found = accumulated(engine, [batch])
    scale = 64 if precision == "fp16" else 1
    for name in ("decoder.layers.2.mlp.router.weight", "decoder.layers.1.mlp.experts.fc1_weight"):
        expected = gradients(model)[name]
        assert (found[name].float() / scale - expected).norm() < 0.03 * expected.norm()


RUN = {
    "micro_batch_size": 2,
    "global_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "clip_grad": 1.0,
    "expert_parallel_size": 1,
    "tensor_parallel_size": 1,
}


@pytest.mark.parametrize(
    ("stage", "precision"), [*((stage, "fp32") for stage in range(4)), *((stage, "bf16") for stage in (1, 2, 3))]
)
def test_a_step_without_finite_gradients_is_discarded(stage: int, precision: str) -> None:
    config = build_deepspeed_config({"zero_optimization": {"stage": stage}}, **RUN, precision=precision)
    engine = initialize(build(precision=precision), config, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))[0]

    def take_step(factor: float) -> dict[str, Tensor]:
        """The weights that the optimizer holds afterwards."""
        engine.backward(loss(engine, inputs()) * factor)
        engine.step()
        return {fragment.parameter: fragment.tensors["weight"].clone() for fragment in fragments(engine)}

    def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
        return {name for name, weight in before.items() if not torch.equal(weight, after[name])}

    first = take_step(1.0)
    assert check_step(engine, 1, TrainConfig(run_dir="run")) is None
    assert changed(first, take_step(math.inf)) == set()
    assert not engine.was_step_applied()
    told = "step 2: the gradient norm is not finite, the update was discarded"
    assert check_step(engine, 2, TrainConfig(run_dir="run", on_nonfinite="skip")) == told
    with pytest.raises(TrainingStopped, match=rf"^{told}\. Lower optimizer\.lr"):
        check_step(engine, 2, TrainConfig(run_dir="run"))
    # Nothing of it is left in the next one.
    after = take_step(1.0)
    assert changed(first, after)
    assert all(weight.isfinite().all() for weight in after.values())
    assert check_step(engine, 3, TrainConfig(run_dir="run")) is None


def test_a_model_whose_tie_came_apart_is_refused():
    model = build()
    experts = list(tied_layers(model))[2].experts
    experts.fc1_weight = torch.nn.Parameter(experts.fc1_weight.detach().clone())
    with pytest.raises(RuntimeError, match="layer 2 no longer shares"):
        initialize(model, ds_config(), optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0))


def test_experts_without_groups_of_their_own_are_refused():
    model = build()
    for layer in tied_layers(model):
        layer.config.expert_model_parallel_size = 2
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ConfigError, match=r"^optimizer = 'SGD': experts need groups of their own"):
        initialize(model, ds_config(1), optimizer=optimizer)
