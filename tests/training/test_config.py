"""The run config: what loads, what is refused, and in which words."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tied.errors import ConfigError
from megatron_tied.topology import TieConfig
from megatron_tied.training.compatibility import resume_problems
from megatron_tied.training.config import RunConfig, transformer_fields
from megatron_tied.training.config_file import load_config, parse_config, save_config

MINIMAL = """
model: {preset: quickstart}
data: {train: corpus}
train: {run_dir: run}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


def lines(error: ConfigError) -> list[str]:
    return [str(problem) for problem in error.problems]


def refused(path: Path, *overrides: str) -> list[str]:
    """The problems of form that loading finds."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return lines(caught.value)


def found(path: Path, *overrides: str, world_size: int = 2) -> list[str]:
    """The problems of content that a config has which loads."""
    return [str(problem) for problem in load_config(path, overrides).problems(world_size)]


# Loading


def test_defaults_suit_every_small_world(config_file: Path):
    config = load_config(config_file)
    for world_size in (1, 2, 4, 8):
        assert config.problems(world_size) == []
    assert config.gradient_accumulation_steps(4) == 8
    assert config.deepspeed_config(4)["gradient_accumulation_steps"] == 8


def test_yaml_values_get_their_types(config_file: Path):
    config_file.write_text(MINIMAL + "optimizer: {lr: 1e-4, weight_decay: 0, betas: [0.9, 0.99]}\n")
    optimizer = load_config(config_file).optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.betas) == (1e-4, 0.0, (0.9, 0.99))
    assert isinstance(optimizer.weight_decay, float)


def test_overrides_apply_in_order_and_know_lists_and_null(config_file: Path):
    config_file.write_text(MINIMAL + "tie: {group_size: 2, banks: [0, 0]}\n")
    overrides = ["train.steps=5", "optimizer.lr=1e-5", "train.steps=7", "tie.banks=[0,1,1,2,2,3,3,4]"]
    config = load_config(config_file, [*overrides, "data.train=[0.75,a,0.25,b]", "data.cache_dir=x=y"])
    assert (config.train.steps, config.optimizer.lr) == (7, 1e-5)
    assert config.tie == TieConfig(group_size=2, banks=(0, 1, 1, 2, 2, 3, 3, 4))
    assert config.data.train == (0.75, "a", 0.25, "b")
    assert config.data.cache_dir == "x=y"
    assert load_config(config_file, ["tie.banks=null"]).tie == TieConfig(group_size=2)


def test_an_override_goes_into_an_empty_section(config_file: Path):
    config_file.write_text(MINIMAL + "optimizer:\n")
    assert load_config(config_file).optimizer.lr == 3e-4
    assert load_config(config_file, ["optimizer.lr=1"]).optimizer.lr == 1.0


def test_topology_follows_the_tie_section(config_file: Path):
    config = load_config(config_file, ["tie.group_size=4"])
    assert config.topology().bank_of_layer == (0, 1, 2, 2, 2, 2, 3, 4)


def test_saved_config_loads_to_the_same(config_file: Path, tmp_path: Path):
    config = load_config(
        config_file,
        [
            "tie.banks=[0,1,1,2,2,3,3,4]",
            "tie.lr_divisor=2",
            "data.train=[0.75,a,0.25,b]",
            "train.run_dir='1e5'",  # a text that looks like a number
            "optimizer.eps=1e-20",
            "model.moe_layer_freq=[1,1,1,1,1,1,1,1]",
            "model.recompute_granularity=full",
            "deepspeed.zero_optimization.stage=2",
        ],
    )
    saved = tmp_path / "saved.yaml"
    save_config(config, saved)
    again = load_config(saved)
    assert again == config
    assert (again.train.run_dir, again.optimizer.eps) == ("1e5", 1e-20)
    assert again.model.model_extra == {"recompute_granularity": "full"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "saved.yaml"]


def test_a_failed_save_leaves_the_old_file(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_space(*_args: object, **_kwargs: object) -> None:
        raise OSError("no space left on device")

    saved = tmp_path / "saved.yaml"
    saved.write_text("old")
    config = load_config(config_file)
    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError, match="no space"):
        save_config(config, saved)
    assert saved.read_text() == "old"


def test_deepspeed_section_may_be_a_json_file(config_file: Path, tmp_path: Path):
    ds_config = tmp_path / "ds_config.json"
    ds_config.write_text('{"zero_optimization": {"stage": 3, "overlap_comm": true}}')
    config = load_config(config_file, [f"deepspeed={ds_config}", "deepspeed.zero_optimization.stage=2"])
    assert config.deepspeed == {"zero_optimization": {"stage": 2, "overlap_comm": True}}


def test_what_only_the_ds_config_says_holds(config_file: Path):
    said = ["deepspeed.train_batch_size=8", "deepspeed.gradient_clipping=0.5", "deepspeed.fp16.enabled=true"]
    config = load_config(config_file, [*said, "deepspeed.train_micro_batch_size_per_gpu=auto"])
    assert (config.train.global_batch_size, config.optimizer.clip_grad) == (8, 0.5)
    assert (config.train.precision, config.train.micro_batch_size) == ("fp16", 1)
    assert config.problems(2) == []


def test_what_both_say_must_agree(config_file: Path):
    assert found(config_file, "deepspeed.train_batch_size=8", "train.global_batch_size=16") == [
        'deepspeed.train_batch_size = 8: contradicts train.global_batch_size = 16: leave it out, or write "auto" or 16'
    ]


# Bad form


def test_missing_file(tmp_path: Path):
    assert "No such file" in refused(tmp_path / "none.yaml")[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  steps: [1, 2\n", "is not valid YAML: line 3, column 1"),
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "line 2, column 1: found duplicate key"),
        ("- model\n", "must be a YAML mapping of sections"),
        ("5\n", "cannot be read"),
    ],
)
def test_unreadable_yaml(config_file: Path, text: str, message: str):
    config_file.write_text(text)
    (line,) = refused(config_file)
    assert line.startswith(f"--config = '{config_file}'")
    assert message in line


def test_bytes_that_are_no_text(config_file: Path):
    config_file.write_bytes(b"train: \xff\xfe")
    assert "--config" in refused(config_file)[0]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.stps=3", "train.stps = 3: is not a key of the config; did you mean 'train.steps'?"),
        ("trian.steps=3", "trian = {'steps': 3}: is not a key of the config; did you mean 'train'?"),
        ("train.lr=3", "train.lr = 3: is not a key of the config; did you mean 'optimizer.lr'?"),
        (
            "monitor.alerts.agrement=1",
            "monitor.alerts.agrement = 1: is not a key of the config; did you mean 'monitor.alerts.agreement'?",
        ),
        ("monitor.alerts.max_vio=high", "monitor.alerts.max_vio = 'high': must be a number or 'auto'"),
        ("monitor.alerts.update_ratio=[1,0.5]", "monitor.alerts.update_ratio = [1, 0.5]: must be [LOW, HIGH]"),
        ("monitor.alerts.agreement=2", "monitor.alerts.agreement = 2: must be <= 1"),
        ("monitor.wandb.name=x", "monitor.wandb.project = None: must be given"),
        ("steps=3", "steps = 3: is not a key of the config; did you mean 'train.steps'?"),
        ("tie.bank=2", "tie.bank = 2: is not a key of the config; did you mean 'tie.banks'?"),
        ("tie.zzz=2", "tie.zzz = 2: is not a key of the config"),
        ("train.steps=abc", "train.steps = 'abc': must be an integer"),
        ("train.steps=1.5", "train.steps = 1.5: must be an integer"),
        ("train.steps=true", "train.steps = True: must be an integer"),
        ("train.steps=0", "train.steps = 0: must be >= 1"),
        ("train.precision=fp8", "train.precision = 'fp8': must be 'fp32', 'bf16' or 'fp16'"),
        ("train=5", "train = 5: must be a mapping of keys"),
        ("model=5", "model = 5: must be a mapping of keys"),
        ("train.run_dir=''", "train.run_dir = '': must be a text that is not empty"),
        ("data.train=null", "data.train = None: must be a path prefix or a blend"),
        ("data.train=[a,b]", "data.train = ['a', 'b']: must be a path prefix or a blend"),
        ("data.train=[1,a,0,b]", "data.train = [1, 'a', 0, 'b']: must be a path prefix or a blend"),
        ("data.train=[1,a,b]", "data.train = [1, 'a', 'b']: must be a path prefix or a blend"),
        ("data.split=[1]", "data.split = [1]: must be a list of at least 2"),
        ("optimizer.name=sgd", "optimizer.name = 'sgd': must be 'adamw' or 'muon'"),
        ("optimizer.preset=tying", "optimizer.preset = 'tying': must be 'tying_the_loop'"),
        (
            "tie.banks=[a,b]",
            "tie.banks = ['a', 'b']: must be a list whose entry 0 is an integer and entry 1 is an integer",
        ),
        ("optimizer.freeze=[norm]", "optimizer.freeze = ['norm']: must be a list whose entry 0 is 'norms'"),
        ("optimizer.lr=-1", "optimizer.lr = -1: must be > 0"),
        ("optimizer.lr=.nan", "optimizer.lr = nan: must be a finite number"),
        ("optimizer.betas=[0.9,1]", "optimizer.betas = [0.9, 1]: must be a list whose entry 1 is < 1.0"),
        ("tie.lr_divisor=[1]", "tie.lr_divisor = [1]: must be 'sqrt', 'linear' or 'none' or a number"),
        ("tie.group_size='4'", "tie.group_size = '4': must be an integer"),
        ("model.preset=olmo", "model.preset = 'olmo': must be one of olmoe, "),
        ("model.moe_router_topk=99", "model.moe_router_topk = 99: must be at most model.num_moe_experts"),
        ("tie.banks=[0,1", "tie.banks = '[0,1': is not a valid YAML value: line"),
        ("train.run_dir=${oc.env:HOME}", "train.run_dir = '${oc.env:HOME}': must be a plain value"),
        ("data.train=[1,'${x}']", "data.train = '${x}': must be a plain value"),
        ("train.run_dir=${", "train.run_dir = '${': cannot be set"),
        ("train.steps", "override = 'train.steps': must be section.field=value"),
        ("=3", "override = '=3': must be section.field=value"),
        ("deepspeed=none.json", "deepspeed = 'none.json': must be a mapping of DeepSpeed keys or the path"),
        ("deepspeed=[1]", "deepspeed = [1]: must be a mapping of keys"),
    ],
)
def test_one_line_says_what_is_wrong(config_file: Path, override: str, line: str):
    (only,) = refused(config_file, override)
    assert only.startswith(line)


def test_all_problems_of_form_are_told_at_once(config_file: Path):
    told = refused(config_file, "train.stps=3", "model.num_layers=x", "optimizer.lr=x", "tie.group_size=x")
    fields = {line.partition(" = ")[0] for line in told}
    assert fields == {"train.stps", "model.num_layers", "optimizer.lr", "tie.group_size"}


def test_empty_file_lacks_what_has_no_default(config_file: Path):
    config_file.write_text("")
    told = refused(config_file)
    assert "data.train = None: must be given" in told
    assert "train.run_dir = None: must be given" in told
    assert any(line.startswith("model.num_layers = None: must be given") for line in told)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"fp16":\n}', "is not valid JSON: line 2, column 1"), ("[]", "must hold a JSON object")],
)
def test_bad_ds_config_file(config_file: Path, tmp_path: Path, content: str, message: str):
    ds_config = tmp_path / "ds_config.json"
    ds_config.write_text(content)
    assert message in refused(config_file, f"deepspeed={ds_config}")[0]


# Bad content


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["parallel.expert_model_parallel_size=4"],
            "parallel.expert_model_parallel_size = 4: must divide the number of processes = 2; valid: 1, 2",
        ),
        (
            ["parallel.expert_model_parallel_size=2", "model.num_moe_experts=15"],
            "parallel.expert_model_parallel_size = 2: must divide model.num_moe_experts = 15; valid: 1",
        ),
        (
            ["parallel.expert_model_parallel_size=2", "tie.num_tied_experts=17"],
            "parallel.expert_model_parallel_size = 2: must divide tie.num_tied_experts = 17; valid: 1",
        ),
        (
            ["parallel.pipeline_model_parallel_size=2"],
            "parallel.pipeline_model_parallel_size = 2: must be 1: only expert, tensor and data parallelism",
        ),
        (
            ["parallel.context_parallel_size=2"],
            "parallel.context_parallel_size = 2: must be 1: only expert, tensor and data parallelism",
        ),
        *(
            (
                ["parallel.tensor_model_parallel_size=2", override],
                f"parallel.tensor_model_parallel_size = 2: must divide {override.replace('=', ' = ')}; valid: 1",
            )
            for override in (
                "model.num_query_groups=1",
                "model.vocab_size=4097",
                "model.moe_shared_expert_intermediate_size=31",
                "train.seq_length=65",
            )
        ),
        (
            ["parallel.tensor_model_parallel_size=2", "model.moe_layer_freq=2", "model.ffn_hidden_size=31"],
            "parallel.tensor_model_parallel_size = 2: must divide model.ffn_hidden_size = 31; valid: 1",
        ),
        (
            ["train.global_batch_size=9", "train.micro_batch_size=2"],
            "train.global_batch_size = 9: must be a multiple of 4 = train.micro_batch_size 2 x 2 data parallel ranks; "
            "nearest: 8 or 12",
        ),
        (["train.global_batch_size=1"], "train.global_batch_size = 1: must be a multiple of 2"),
        (["tie.group_size=9"], "tie.group_size = 9: must be at most 4"),
        *(
            (
                ["model.attention_output_gate=true", f"{name}={value}"],
                f"model.attention_output_gate = True: must be false with {name}: {value}",
            )
            for name, value in (("optimizer.name", "muon"), ("model.init_method", "depth_scaled_xavier"))
        ),
        (["optimizer.schedule=wsd"], "optimizer.decay_steps = 0: must be 1 to "),
        (
            ["optimizer.schedule=wsd", "train.steps=2", "optimizer.warmup_steps=2"],
            "optimizer.warmup_steps = 2: must be below train.steps = 2 with optimizer.schedule: wsd",
        ),
        (
            ["optimizer.schedule=wsd", "train.steps=2", "optimizer.warmup_steps=3"],
            "optimizer.warmup_steps = 3: must be at most train.steps = 2",
        ),
        (["optimizer.decay_steps=3"], "optimizer.decay_steps = 3: must be 0: it is for optimizer.schedule: wsd"),
        (
            ["optimizer.preset=tying_the_loop", "optimizer.name=adamw"],
            "optimizer.name = 'adamw': must be muon with optimizer.preset: tying_the_loop",
        ),
        (["optimizer.adamw_lr=1e-3"], "optimizer.adamw_lr = 0.001: must be left out: it is for optimizer.name: muon"),
        (
            ["optimizer.name=muon", "parallel.tensor_model_parallel_size=2"],
            "parallel.tensor_model_parallel_size = 2: must be 1 with optimizer.name: muon",
        ),
        (["monitor.expensive_every=15"], "monitor.expensive_every = 15: must be 0 or a multiple of monitor.every = 10"),
        (["monitor.dead_window=9"], "monitor.dead_window = 9: must be at least monitor.every = 10"),
        (["tie.group_size=0"], "tie.group_size = 0: must be an integer >= 1"),
        (["tie.num_tied_experts=8", "tie.group_size=1", "tie.skip_first=6"], "tie.num_tied_experts = 8: has no effect"),
        (["tie.banks=[0,1]"], "tie.banks = [0, 1]: must have one entry per MoE layer"),
        (["tie.num_tied_experts=3"], "tie.num_tied_experts = 3: must be at least model.moe_router_topk = 4"),
        (
            ["optimizer.warmup_steps=9", "train.steps=8"],
            "optimizer.warmup_steps = 9: must be at most train.steps = 8",
        ),
        (
            ["optimizer.min_lr=1", "optimizer.lr=0.1"],
            "optimizer.min_lr = 1.0: must be at most optimizer.lr = 0.1",
        ),
        (
            ["optimizer.min_lr=1e-5", "optimizer.schedule=constant"],
            "optimizer.min_lr = 1e-05: must be 0 with optimizer.schedule: constant",
        ),
        (["tie.share=all"], "tie.share = 'all': must be experts where no layers are tied: see tie.group_size"),
        (
            ["train.seq_length=65", "model.max_position_embeddings=64"],
            "train.seq_length = 65: must be at most model.max_position_embeddings = 64",
        ),
        (["model.vocab_size=null"], "model.vocab_size = None: must be given, or else data.tokenizer"),
        (["data.split=[1,0]"], "train.eval_every = 100: must be 0 without validation data"),
        (["data.split=[0,1]"], "data.split = [0.0, 1.0]: must leave a first share > 0, for training"),
        (["model.hiden_size=3"], "model.hiden_size = 3: is not a model option; did you mean model.hidden_"),
        (["model.moe_router_dtype=bf16"], "model.moe_router_dtype = 'bf16': must be 'fp32' or 'fp64'"),
        (["model.recompute_num_layers=a"], "model.recompute_num_layers = 'a': must be an integer"),
        (["model.delay_wgrad_compute=true"], "model.delay_wgrad_compute = True: must be false"),
        (
            ["model.multi_latent_attention=true", "model.v_head_dim=wide"],
            "model.v_head_dim = 'wide': must be an integer",
        ),
        (
            ["model.multi_latent_attention=true", "model.cache_mla_latents=true"],
            "model.cache_mla_latents = True: must be false: it is for inference",
        ),
        (["model.sequence_parallel=true"], "model.sequence_parallel = True: must be left out"),
        (["model.perform_initialization=true"], "model.perform_initialization = True: must be left out"),
        (["deepspeed.zero_optimization.stage=4"], "deepspeed.zero_optimization.stage = 4: must be 0, 1"),
        (
            ["deepspeed.zero_optimization={stage: 3, offload_optimizer: {device: nvme, nvme_path: /tmp}}"],
            "checkpoint.save_every = 500: must be 0 with offload to nvme",
        ),
    ],
)
def test_content_that_does_not_fit_together(config_file: Path, overrides: list[str], line: str):
    (only,) = found(config_file, *overrides)
    assert only.startswith(line)


def test_valid_expert_parallel_sizes_divide_everything_at_once(config_file: Path):
    size = "parallel.expert_model_parallel_size"
    told = found(config_file, f"{size}=5", "train.global_batch_size=12", world_size=12)
    assert told == [
        f"{size} = 5: must divide model.num_moe_experts = 16; valid: 1, 2, 4",
        f"{size} = 5: must divide the number of processes = 12; valid: 1, 2, 4",
    ]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.bf16=true", "model.bf16 = True: is set by train.precision"),
        ("model.expert_model_parallel_size=2", "is set by parallel.expert_model_parallel_size"),
        ("model.kv_lora_rank=8", "model.kv_lora_rank = 8: needs model.multi_latent_attention = true"),
    ],
)
def test_what_the_model_section_must_not_say(config_file: Path, override: str, line: str):
    (only,) = refused(config_file, override)
    assert line in only


def test_all_problems_of_content_are_told_at_once(config_file: Path):
    told = found(config_file, "tie.group_size=9", "train.global_batch_size=3", "deepspeed.optimizer={x: 1}")
    assert [line.partition(" = ")[0] for line in told] == [
        "tie.group_size",
        "train.global_batch_size",
        "deepspeed.optimizer",
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.validation=held_out", "data.split=[1,0]"],
        ["train.eval_every=0", "data.split=[1,0]"],
        ["optimizer.warmup_steps=8", "train.steps=8", "optimizer.min_lr=0.1", "optimizer.lr=0.1"],
        ["train.seq_length=64", "model.max_position_embeddings=64"],
        ["model.vocab_size=null", "data.tokenizer=corpus.model"],
        ["parallel.expert_model_parallel_size=2", "tie.num_tied_experts=18", "tie.group_size=4"],
        ["optimizer.preset=tying_the_loop", "optimizer.schedule=constant"],
        ["tie.share=all", "tie.group_size=4"],
        ["model.delay_wgrad_compute=false", "model.moe_router_dtype=fp32", "model.moe_input_jitter_eps=1e-3"],
    ],
)
def test_the_border_cases_are_valid(config_file: Path, overrides: list[str]):
    assert found(config_file, *overrides) == []


# What is not imported


def test_field_names_are_those_of_the_installed_megatron_core():
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    public = {field.name for field in dataclasses.fields(MLATransformerConfig) if not field.name.startswith("_")}
    assert transformer_fields().keys() == public


def test_checking_a_config_imports_no_torch(config_file: Path):
    code = (
        "import sys\n"
        "from megatron_tied.training.config_file import load_config\n"
        f"assert load_config({str(config_file)!r}).problems(2) == []\n"
        "assert not sys.modules.keys() & {'torch', 'deepspeed', 'megatron.core'}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_parse_config_takes_plain_values():
    values = {"model": {"preset": "quickstart"}, "data": {"train": "corpus"}, "train": {"run_dir": "run"}}
    config = parse_config(values)
    assert isinstance(config, RunConfig)
    assert (config.model.num_layers, config.data.train) == (8, "corpus")


def test_a_recipe_gives_what_is_not_said(config_file: Path):
    """Its figures are those of the paper, section 3 of the recipe of its main experiments."""
    values = {"model": {"preset": "quickstart"}, "data": {"train": "corpus"}, "train": {"run_dir": "run"}}
    optimizer = parse_config({**values, "optimizer": {"preset": "tying_the_loop", "warmup_steps": 7}}).optimizer
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("muon", 0.02, 0.95, 0.1)
    assert (optimizer.rate_of_adamw(), optimizer.betas, optimizer.adamw_weight_decay) == (0.002, (0.9, 0.95), 0.01)
    assert (optimizer.schedule, optimizer.min_lr, optimizer.clip_grad) == ("cosine", 0.002, 1.0)
    assert optimizer.warmup_steps == 7
    slower = parse_config({**values, "optimizer": {"preset": "tying_the_loop", "lr": 0.01}}).optimizer
    assert (slower.rate_of_adamw(), slower.min_lr) == pytest.approx((0.001, 0.001))
    saved = load_config(config_file, ["optimizer.preset=tying_the_loop"])
    assert parse_config(saved.model_dump(mode="json")).optimizer == saved.optimizer


def test_another_optimizer_does_not_go_on_with_the_states_of_this(config_file: Path):
    saved = load_config(config_file)
    muon = load_config(config_file, ["optimizer.name=muon"])
    (problem,) = resume_problems(muon, saved, "step_1")
    assert str(problem).startswith("optimizer.name = 'muon': must be adamw, as in step_1")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["tie.share=all"], "must be 8 layers: 0 1 [2 3 4 5] 6 7, as in step_1"),
        (["tie.num_tied_experts=8"], "must give [16, 16, 16, 16, 16, 16, 16, 16] experts by layer, not [16, 16, 8, 8,"),
    ],
)
def test_what_layers_share_and_how_wide_they_are_stays_when_a_run_goes_on(config_file: Path, overrides, line):
    tied = "tie.group_size=4"
    saved = load_config(config_file, [tied])
    (problem,) = resume_problems(load_config(config_file, [tied, *overrides]), saved, "step_1")
    assert line in str(problem)
    assert resume_problems(load_config(config_file, [tied]), saved, "step_1") == []


def test_a_run_from_before_there_was_a_choice_goes_on(config_file: Path):
    config = load_config(config_file, ["tie.group_size=4"])
    saved = config.model_dump(mode="json")
    del saved["tie"]["share"]
    assert resume_problems(config, parse_config(saved), "step_1") == []


def test_what_is_frozen_stays_frozen_when_a_run_goes_on(config_file: Path):
    config = load_config(config_file, ["optimizer.freeze=[norms]"])
    saved = load_config(config_file)
    (problem,) = resume_problems(config, saved, "step_1")
    assert str(problem).startswith("optimizer.freeze = ['norms']: must be [], as in step_1")
    assert resume_problems(config, config, "step_1") == []


def test_one_process_may_be_one_that_nobody_asked_for(config_file: Path) -> None:
    config = load_config(config_file, ["parallel.expert_model_parallel_size=2", "model.num_moe_experts=15"])
    about_experts, about_processes = (str(p) for p in config.problems(1) if "expert_model" in p.field)
    assert "model.num_moe_experts = 15" in about_experts
    assert "--num_accelerators" not in about_experts
    assert about_processes.endswith(
        "valid: 1; deepspeed --num_accelerators N and torchrun --nproc_per_node N start N processes"
    )
    assert not any("--num_accelerators" in str(problem) for problem in config.problems(3))
