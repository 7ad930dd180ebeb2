"""The oracle checked against brute force, finite differences and the Hugging Face classes' own losses."""

import math

import pytest
import torch
from torch import Tensor
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from .aux_losses import load_balancing_loss, router_z_loss, routing_margin
from .reference import (
    ReferenceSpec,
    Weights,
    accumulate,
    build_reference,
    captured_router_logits,
    gradients,
    load_weights,
    micro_batch_losses,
    random_batches,
    tiny,
    train_reference,
    weights,
)

ARCHS = ("olmoe", "qwen3_moe")
F64 = torch.float64
EXPERTS = ("gate_up_proj", "down_proj")


def batch_of(spec: ReferenceSpec, size: int = 4) -> Tensor:
    return random_batches(spec, 1, size, 16, seed=3)[0]


def expert_name(layer: int, matrix: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{matrix}"


def copied_to_followers(spec: ReferenceSpec, tied: Weights) -> Weights:
    copies = {
        expert_name(layer, matrix): tied[expert_name(spec.owners[bank], matrix)]
        for layer, bank in enumerate(spec.banks)
        for matrix in EXPERTS
    }
    return {**tied, **copies}


@pytest.mark.parametrize("arch", ARCHS)
def test_followers_hold_their_owners_experts_and_nothing_else(arch: str) -> None:
    spec = tiny(arch)
    model = build_reference(spec, seed=1)
    layers = model.model.layers
    for matrix in EXPERTS:
        pointers = [getattr(layer.mlp.experts, matrix).data_ptr() for layer in layers]
        assert [pointers.index(pointer) for pointer in pointers] == [0, 1, 1, 3, 3, 5]
    assert len({layer.mlp.gate.weight.data_ptr() for layer in layers}) == spec.num_layers
    listed = {name for name in weights(model) if "experts" in name}
    assert listed == {expert_name(owner, matrix) for owner in (0, 1, 3, 5) for matrix in EXPERTS}
    assert weights(model)[expert_name(1, "gate_up_proj")].shape == (8, 64, 64)
    assert weights(model)[expert_name(1, "down_proj")].shape == (8, 64, 32)


@pytest.mark.parametrize("arch", ARCHS)
def test_tied_gradient_is_the_sum_of_the_untied_ones(arch: str) -> None:
    spec = tiny(arch, banks=[0, 1, 0, 1, 1])
    tied = build_reference(spec, seed=1, dtype=F64)
    untied = build_reference(spec.untied(), seed=2, dtype=F64)
    load_weights(untied, copied_to_followers(spec, weights(tied)))
    for model, model_spec in ((tied, spec), (untied, spec.untied())):
        accumulate(model, model_spec, batch_of(spec), micro_batches=2)
    expected = gradients(untied)
    for layer, bank in reversed(list(enumerate(spec.banks))):
        for matrix in EXPERTS:
            if layer != spec.owners[bank]:
                expected[expert_name(spec.owners[bank], matrix)] += expected.pop(expert_name(layer, matrix))
    torch.testing.assert_close(gradients(tied), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("top_k", [1, 3])
def test_router_losses_equal_a_loop_over_tokens(top_k: int) -> None:
    logits = torch.randn(20, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    counts, probabilities, z, margin = [0.0] * 5, [0.0] * 5, 0.0, math.inf
    for row in logits.tolist():
        total = sum(math.exp(x) for x in row)
        ranked = sorted(range(5), key=lambda expert, row=row: -row[expert])
        for expert in range(5):
            probabilities[expert] += math.exp(row[expert]) / total / 20
            counts[expert] += (expert in ranked[:top_k]) / (20 * top_k)
        z += math.log(total) ** 2 / 20
        margin = min(margin, row[ranked[top_k - 1]] - row[ranked[top_k]])
    aux = 5 * sum(f * p for f, p in zip(counts, probabilities, strict=True))
    assert load_balancing_loss(logits, top_k).item() == pytest.approx(aux, rel=1e-12)
    assert router_z_loss(logits).item() == pytest.approx(z, rel=1e-12)
    assert routing_margin(logits, top_k) == pytest.approx(margin, rel=1e-12)


@pytest.mark.parametrize("arch", ARCHS)
def test_router_logits_and_balance_agree_with_hugging_face(arch: str) -> None:
    spec = tiny(arch)
    model = build_reference(spec, seed=1)
    with captured_router_logits(model) as captured:
        theirs = model.model(input_ids=batch_of(spec)[:, :-1], output_router_logits=True).router_logits
    model(input_ids=batch_of(spec))
    assert len(captured) == spec.num_layers, "a hook outlived its context"
    torch.testing.assert_close(tuple(captured), theirs, rtol=1e-6, atol=1e-6)
    aux = [load_balancing_loss_func((layer,), spec.num_experts, spec.top_k) / spec.top_k for layer in theirs]
    ours = micro_batch_losses(model, spec, batch_of(spec))
    assert ours.aux.item() == pytest.approx(torch.stack(aux).mean().item(), rel=1e-6)
    assert ours.margin == min(routing_margin(layer, spec.top_k) for layer in theirs)


@pytest.mark.parametrize("arch", ARCHS)
def test_lm_loss_agrees_with_hugging_face(arch: str) -> None:
    spec = tiny(arch)
    model = build_reference(spec, seed=1)
    tokens = batch_of(spec)
    theirs = model(input_ids=tokens, labels=tokens).loss.item()
    assert micro_batch_losses(model, spec, tokens).lm.item() == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("arch", ARCHS)
def test_total_sums_the_router_losses_over_layers(arch: str) -> None:
    spec = tiny(arch, aux_coeff=0.02, z_coeff=0.003)
    losses = micro_batch_losses(build_reference(spec, seed=1), spec, batch_of(spec))
    expected = losses.lm + 6 * (0.02 * losses.aux + 0.003 * losses.z)
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("arch", ARCHS)
def test_float64_gradients_match_finite_differences(arch: str) -> None:
    spec = tiny(arch)
    model = build_reference(spec, seed=1, dtype=F64)
    accumulate(model, spec, batch_of(spec), micro_batches=1)
    start, slope, step = weights(model), gradients(model), 1e-7
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(w.shape, dtype=F64, generator=generator) for name, w in start.items()}

    def loss_at(distance: float) -> float:
        load_weights(model, {name: w + distance * direction[name] for name, w in start.items()})
        return micro_batch_losses(model, spec, batch_of(spec)).total.item()

    # A single cast to float32 in the forward pass would leave an error of about 1 here.
    difference = (loss_at(step) - loss_at(-step)) / (2 * step)
    expected = sum((slope[name] * direction[name]).sum().item() for name in start)
    assert difference == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("leave_out", ["norms", "clip", "renormalised top-k"])
def test_every_architectural_trait_shows_in_the_loss(arch: str, leave_out: str) -> None:
    spec = tiny(arch)
    model = build_reference(spec, seed=1)
    full = micro_batch_losses(model, spec, batch_of(spec)).lm.item()
    if leave_out == "norms":
        values = weights(model)
        load_weights(model, {k: torch.ones_like(w) if w.ndim == 1 else w for k, w in values.items()})
    elif leave_out == "clip":
        model.config.clip_qkv = None
    else:
        for layer in model.model.layers:
            layer.mlp.gate.norm_topk_prob = False
    changed = micro_batch_losses(model, spec, batch_of(spec)).lm.item() != pytest.approx(full, rel=1e-5)
    has_trait = {"norms": True, "clip": arch == "olmoe", "renormalised top-k": arch == "qwen3_moe"}
    assert changed == has_trait[leave_out]


@pytest.mark.parametrize("arch", ARCHS)
def test_slices_give_the_full_batch_gradient_but_for_the_load_balancing_loss(arch: str) -> None:
    def gradient(spec: ReferenceSpec, micro_batches: int) -> Weights:
        model = build_reference(spec, seed=1, dtype=F64)
        accumulate(model, spec, batch_of(spec), micro_batches)
        return gradients(model)

    plain = tiny(arch, aux_coeff=0.0)
    torch.testing.assert_close(gradient(plain, 4), gradient(plain, 1), rtol=1e-9, atol=1e-14)
    balanced = tiny(arch, aux_coeff=0.1)
    router = "model.layers.2.mlp.gate.weight"
    change = gradient(balanced, 4)[router] - gradient(balanced, 1)[router]
    assert change.norm() > 1e-3 * gradient(balanced, 1)[router].norm()


@pytest.mark.parametrize("arch", ARCHS)
def test_every_parameter_and_every_seen_token_gets_a_gradient(arch: str) -> None:
    spec = tiny(arch)
    model = build_reference(spec, seed=1)
    tokens = batch_of(spec, size=8)
    accumulate(model, spec, tokens, micro_batches=1)
    found = gradients(model)
    assert all(gradient.norm() > 0 for gradient in found.values())
    touched = found["model.embed_tokens.weight"].norm(dim=1).nonzero().flatten()
    assert torch.equal(touched, tokens[:, :-1].unique())
    assert 1 in touched


@pytest.mark.parametrize("arch", ARCHS)
def test_steps_are_adamw_with_clipping_rates_and_decay(arch: str) -> None:
    spec = tiny(arch)
    batches = random_batches(spec, 3, 4, 16, seed=3)
    start = weights(build_reference(spec, seed=5))
    rates, betas, scale_of_bank = [0.01, 0.02, 0.005], (0.8, 0.9), {1: 0.5, 3: 0.0}
    trace = train_reference(
        spec,
        start,
        batches,
        lr=rates,
        betas=betas,
        eps=0.01,
        weight_decay=0.2,
        clip_grad=0.5,
        lr_scale_of_bank=scale_of_bank,
        no_decay_1d=True,
        dtype=F64,
    )

    scale = {expert_name(spec.owners[b], m): s for b, s in scale_of_bank.items() for m in EXPERTS}
    values = {name: value.double() for name, value in start.items()}
    mean = {name: torch.zeros_like(value) for name, value in values.items()}
    square = {name: torch.zeros_like(value) for name, value in values.items()}
    for step, (batch, record) in enumerate(zip(batches, trace.steps, strict=True), start=1):
        model = build_reference(spec, seed=0, dtype=F64)
        load_weights(model, values)
        losses = accumulate(model, spec, batch, micro_batches=1)
        found = gradients(model)
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in found.values()))
        assert norm > 0.5
        assert (record.loss, record.grad_norm) == pytest.approx((losses[0].total.item(), norm), rel=1e-12)
        for name, value in values.items():
            gradient = found[name] * 0.5 / (norm + 1e-6)
            mean[name] = betas[0] * mean[name] + (1 - betas[0]) * gradient
            square[name] = betas[1] * square[name] + (1 - betas[1]) * gradient**2
            rate = rates[step - 1] * scale.get(name, 1.0)
            spread = (square[name] / (1 - betas[1] ** step)).sqrt() + 0.01
            decayed = value if value.ndim == 1 else value * (1 - rate * 0.2)
            values[name] = decayed - rate * mean[name] / (1 - betas[0] ** step) / spread
    torch.testing.assert_close(trace.final_weights, values, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(trace.last_gradients, found, rtol=1e-9, atol=1e-13)


def test_one_dimensional_weights_decay_unless_told_otherwise() -> None:
    spec = tiny("olmoe", banks=[0])
    batches = random_batches(spec, 1, 2, 8, seed=3)
    decayed, kept = (
        train_reference(spec, 1, batches, lr=0.01, weight_decay=0.5, no_decay_1d=exempt).final_weights
        for exempt in (False, True)
    )
    start = weights(build_reference(spec, seed=1))
    for name, value in start.items():
        lost = 0.01 * 0.5 * value if value.ndim == 1 else torch.zeros_like(value)
        torch.testing.assert_close(kept[name] - decayed[name], lost, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("arch", ARCHS)
def test_training_is_repeatable_learns_and_agrees_with_float64(arch: str) -> None:
    spec = tiny(arch)
    batches = random_batches(spec, 6, 8, 16, seed=7)
    options = {"lr": 3e-3, "micro_batches": 2, "eps": 1e-5}
    trace, again = (train_reference(spec, 7, batches, **options) for _ in range(2))
    assert trace.steps == again.steps
    for name, value in trace.final_weights.items():
        assert torch.equal(value, again.final_weights[name])
        assert not torch.equal(trace.first_gradients[name], trace.last_gradients[name])
    assert trace.steps[-1].lm_loss < trace.steps[0].lm_loss - 0.3
    assert len(train_reference(spec, 7, batches, steps=2, **options).steps) == 2

    exact = train_reference(spec, 7, batches, dtype=F64, **options)
    assert trace.steps[-1].loss == pytest.approx(exact.steps[-1].loss, rel=1e-6)
    for name, gradient in exact.last_gradients.items():
        assert (trace.last_gradients[name] - gradient).norm() < 2e-5 * gradient.norm(), name


def test_step_losses_are_means_over_micro_batches() -> None:
    spec = tiny("olmoe")
    batches = random_batches(spec, 1, 4, 16, seed=3)
    record = train_reference(spec, 1, batches, micro_batches=4).steps[0]
    model = build_reference(spec, seed=1)
    alone = [micro_batch_losses(model, spec, row[None]) for row in batches[0]]
    assert record.loss == pytest.approx(sum(x.total.item() for x in alone) / 4, rel=1e-6)
    assert record.lm_loss == pytest.approx(sum(x.lm.item() for x in alone) / 4, rel=1e-6)
    assert record.aux_loss == pytest.approx(sum(x.aux.item() for x in alone) / 4, rel=1e-6)
    assert record.z_loss == pytest.approx(sum(x.z.item() for x in alone) / 4, rel=1e-6)
    assert record.routing_margin == min(x.margin for x in alone)


def test_spec_reaches_the_model() -> None:
    spec = tiny("qwen3_moe", norm_eps=0.125, rope_base=500.0)
    model = build_reference(spec, seed=1)
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.weight.shape == (4 * 32, 64)
    assert layer.self_attn.k_proj.weight.shape == (2 * 32, 64)
    assert layer.mlp.gate.top_k == spec.top_k
    assert {m.variance_epsilon for m in model.modules() if hasattr(m, "variance_epsilon")} == {0.125}
    expected = 500.0 ** (-torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)
    assert model.config._attn_implementation == model.config._experts_implementation == "eager"
    assert build_reference(tiny("olmoe", norm_eps=0.5), seed=1).model.norm.variance_epsilon == 0.5


def test_weights_are_the_same_in_every_dtype_and_differ_by_seed() -> None:
    spec = tiny("qwen3_moe")
    single, double, other = (
        weights(build_reference(spec, seed, dtype))
        for seed, dtype in ((1, torch.float32), (1, F64), (2, torch.float32))
    )
    for name, value in single.items():
        assert torch.equal(value.double(), double[name])
        assert not torch.equal(value, other[name])


def test_random_batches_are_repeatable_skewed_and_predictable() -> None:
    spec = tiny("olmoe")
    batches = random_batches(spec, 20, 8, 16, seed=1)
    assert batches.shape == (20, 8, 17)
    assert torch.equal(batches, random_batches(spec, 20, 8, 16, seed=1))
    assert not torch.equal(batches, random_batches(spec, 20, 8, 16, seed=2))
    assert 0 <= batches.min() < batches.max() < spec.vocab_size
    counts = batches.flatten().bincount(minlength=spec.vocab_size).sort(descending=True).values
    assert counts[:10].sum() > 0.3 * counts.sum()
    pairs = torch.stack([batches[..., :-1].flatten(), batches[..., 1:].flatten()])
    repeats = pairs.unique(dim=1, return_counts=True)[1]
    assert repeats.sort(descending=True).values[: spec.vocab_size].sum() > 0.5 * repeats.sum()


@pytest.mark.parametrize(
    ("arch", "changes", "field"),
    [
        ("mixtral", {"num_kv_heads": 4, "head_dim": 16}, "arch"),
        ("olmoe", {"num_layers": 5}, "banks"),
        ("olmoe", {"top_k": 8}, "top_k"),
        ("olmoe", {"top_k": 0}, "top_k"),
        ("olmoe", {"head_dim": 32}, "head_dim"),
        ("qwen3_moe", {"qkv_clip": 8.0}, "qkv_clip"),
    ],
)
def test_impossible_specs_are_refused(arch: str, changes: dict[str, object], field: str) -> None:
    shape = {**vars(tiny("qwen3_moe" if arch == "qwen3_moe" else "olmoe")), "arch": arch, **changes}
    with pytest.raises(ValueError, match=field):
        ReferenceSpec(**shape)


def test_unequal_slices_and_foreign_weights_are_refused() -> None:
    spec = tiny("olmoe", banks=[0, 0])
    model = build_reference(spec, seed=1)
    with pytest.raises(ValueError, match="micro_batches 3"):
        accumulate(model, spec, batch_of(spec), micro_batches=3)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts"):
        load_weights(model, weights(build_reference(spec.untied(), seed=1)))
