"""Images built and run for real, from a clean Debian in place of a registry's."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

from tests.docker.dockerfile import DOCKERFILES, ROOT, Dockerfile
from tests.docker.engine import Engine, engine, needs_engine

pytestmark = [pytest.mark.slow, needs_engine]

CUDA, CPU = DOCKERFILES
CPU_IMAGE = "localhost/megatron-tied:cpu"
CUDA_IMAGE = "localhost/megatron-tied:cuda"
STEPS = 40
BASES_USER = 1000
NVIDIA_TORCH = "2.11.0a0+eb65b36914.nv26.02"

# NVIDIA's base in what our Dockerfile asks of it: Python packages by their versions, a user 1000, an entry point.
STAND_IN = f"""\
FROM {CPU_IMAGE}
USER root
RUN pip uninstall --yes megatron-tied megatron-core deepspeed omegaconf pydantic rich
WORKDIR /opt/venv/lib/python3.11/site-packages
RUN mv torch-*.dist-info 'torch-{NVIDIA_TORCH}.dist-info' \\
    && sed -i 's/^Version: .*/Version: {NVIDIA_TORCH}/' torch-*.dist-info/METADATA
RUN for package in apex-0.1 transformer_engine-2.12.0; do \\
        mkdir "$package.dist-info" \\
        && printf 'Metadata-Version: 2.1\\nName: %s\\nVersion: %s\\n' "${{package%-*}}" "${{package#*-}}" \\
            > "$package.dist-info/METADATA" \\
        && touch "$package.dist-info/RECORD"; \\
    done
RUN userdel --remove trainer && rm -rf /workspace && useradd --uid {BASES_USER} ubuntu && mkdir /opt/nvidia /etc/pip \\
    && printf '#!/bin/sh\\necho NVIDIA >&2\\nexec "$@"\\n' > /opt/nvidia/nvidia_entrypoint.sh \\
    && chmod +x /opt/nvidia/nvidia_entrypoint.sh \\
    && printf '#!/bin/sh\\necho GPU 0\\n' > /usr/bin/nvidia-smi && chmod +x /usr/bin/nvidia-smi \\
    && printf 'pydantic==2.0\\n' > /etc/pip/constraint.txt
ENV PIP_CONSTRAINT=/etc/pip/constraint.txt
"""


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine with the CPU image."""
    with engine(tmp_path_factory.mktemp("engine")) as made:
        release = Dockerfile.read(CPU).arguments["DEBIAN_RELEASE"]
        made.import_debian(release, f"docker.io/library/debian:{release}-slim")
        made.build(CPU, CPU_IMAGE, TORCH_INDEX_URL="")
        yield made


@pytest.fixture(scope="module")
def cuda_image(podman: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The CUDA image, on the stand-in for its base."""
    context = tmp_path_factory.mktemp("base")
    (context / "Dockerfile").write_text(STAND_IN)
    podman.build(context / "Dockerfile", Dockerfile.read(CUDA).values("FROM")[0], context=context)
    # As with $(id -u) of the first user of most machines.
    podman.build(CUDA, CUDA_IMAGE, USER_ID=str(BASES_USER))
    return CUDA_IMAGE


def train_three_steps(podman: Engine, image: str, directory: Path) -> dict[str, float]:
    """As a user does: data, then one rank, as the image's own user in its own directory; returns the summary."""
    directory.chmod(0o777)
    mount = f"--volume={directory}:/workspace/runs"
    prepare = ["megatron-tied", "prepare-data", "--input=/usr/lib/python3.11/asyncio", "--train-tokenizer"]
    podman.run(mount, image, *prepare, "--vocab-size=1000", "--output=runs/quickstart/data/stdlib")
    launch = ["deepspeed", "--num_accelerators=1", "--module", "megatron_tied.pretrain"]
    few = ["train.steps=3", "optimizer.warmup_steps=1", "train.eval_steps=1", "parallel.expert_model_parallel_size=1"]
    few.append("data.split=[0.9,0.1]")
    podman.run("--env=OMP_NUM_THREADS=1", mount, image, *launch, "--config=examples/quickstart.yaml", *few)
    return json.loads((directory / "quickstart" / "run" / "summary.json").read_text())


@pytest.fixture(params=["cpu", "cuda"])
def image(request: pytest.FixtureRequest, podman: Engine) -> str:
    """Each image in turn."""
    return CPU_IMAGE if request.param == "cpu" else request.getfixturevalue("cuda_image")


def test_trains_as_the_images_own_user(podman: Engine, image: str, tmp_path: Path) -> None:
    summary = train_three_steps(podman, image, tmp_path)
    assert (summary["steps"], summary["world_size"]) == (3, 1)
    written = tmp_path / "quickstart" / "run" / "summary.json"
    own = int(Dockerfile.read(CPU).arguments["USER_ID"]) if image == CPU_IMAGE else BASES_USER
    assert written.stat().st_uid == own
    # NVIDIA's entry point says something of its own.
    assert "/home/trainer" in podman.run(image, "sh", "-c", 'echo "$HOME"').splitlines()


def test_the_health_check_passes_and_can_fail(podman: Engine, image: str) -> None:
    check = podman.inspect(image)["Healthcheck"]["Test"]
    assert check[0] == "CMD"
    podman.run(image, *check[1:])
    broken = podman.run("--env=PYTHONHOME=/nowhere", image, *check[1:], check=False)
    assert "Fatal Python error" in broken


def test_the_default_command_says_what_there_is(podman: Engine, image: str) -> None:
    assert "prepare-data" in podman.run(image)


def test_nothing_of_the_build_is_left(podman: Engine, image: str) -> None:
    listed = podman.run(image, "find", "/tmp", "/workspace", "-mindepth", "1")
    assert sorted(line for line in listed.splitlines() if line.startswith("/")) == [
        "/workspace/examples",
        "/workspace/examples/quickstart.yaml",
        "/workspace/runs",
    ]


def test_the_base_keeps_its_torch(podman: Engine, cuda_image: str) -> None:
    listed = json.loads(podman.run(cuda_image, "pip", "list", "--format=json").splitlines()[-1])
    versions = {item["name"].replace("_", "-"): item["version"] for item in listed}
    assert Version(versions["torch"]) == Version(NVIDIA_TORCH)  # pip leaves out zeros
    assert (versions["apex"], versions["transformer-engine"]) == ("0.1", "2.12.0")
    arguments = Dockerfile.read(CUDA).arguments
    assert versions["megatron-core"] == arguments["MEGATRON_CORE_VERSION"]
    assert versions["deepspeed"] == arguments["DEEPSPEED_VERSION"]


def test_a_base_with_too_old_a_torch_fails_the_build(podman: Engine, cuda_image: str, tmp_path: Path) -> None:
    base = Dockerfile.read(CUDA).values("FROM")[0]
    old = NVIDIA_TORCH.replace("2.11.0a0", "2.10.0a0")
    (tmp_path / "Dockerfile").write_text(
        f"FROM {base}\nRUN mv torch-*.dist-info 'torch-{old}.dist-info' "
        f"&& sed -i 's/^Version: .*/Version: {old}/' torch-*.dist-info/METADATA\n"
    )
    podman.build(tmp_path / "Dockerfile", f"{base.partition(':')[0]}:old", context=tmp_path)
    with pytest.raises(AssertionError, match=r"conflict|No matching distribution"):
        podman.build(CUDA, f"{CUDA_IMAGE}-old", PYTORCH_TAG="old")


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    """Fail the test when `true` does not become true in time."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"still not after {seconds} s"
        time.sleep(0.5)


@pytest.fixture
def compose(podman: Engine, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """`docker compose` on our file, with few steps; nothing of it is left in the end."""
    file = ROOT / "docker" / "compose.yaml"
    command = yaml.safe_load(file.read_text())["services"]["node0"]["command"]
    command += [f"train.steps={STEPS}", "train.log_every=1", "optimizer.warmup_steps=3"]
    one_thread = {"OMP_NUM_THREADS": "1"}
    fewer = {node: {"command": command, "environment": one_thread} for node in ("node0", "node1")}
    (tmp_path / "fewer.yaml").write_text(yaml.safe_dump({"services": fewer}))

    def run(*arguments: str, timeout: float = 300) -> None:
        program = Path(sys.executable).with_name("podman-compose")
        done = subprocess.run(
            [program, "--file", file, "--file", tmp_path / "fewer.yaml", *arguments],
            env=podman.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stdout[-8000:]

    yield run
    run("down", "--volumes")


def test_two_containers_train_together_stop_and_go_on(podman: Engine, compose: Callable[..., None]) -> None:
    compose("up", "--detach", "--no-build", timeout=400)
    runs = Path(json.loads(podman.podman("volume", "inspect", "megatron-tied_runs"))[0]["Mountpoint"])
    run_dir = runs / "quickstart" / "run"
    wait_until((run_dir / "metrics.jsonl").exists, 300)
    compose("stop", "node0", "node1")
    [checkpoint] = (run_dir / "checkpoints").glob("step_*")
    step = int(checkpoint.name.removeprefix("step_"))
    assert 0 < step < STEPS

    compose("start", "node0", "node1")
    containers = ["megatron-tied_node0_1", "megatron-tied_node1_1"]
    wait_until(lambda: have_ended(podman, containers), 1500)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["world_size"]) == (STEPS, 2)
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    assert f"step {step + 1}/{STEPS}" in podman.podman("logs", containers[0])

    assert podman.podman("port", "megatron-tied_tensorboard_1") == "6006/tcp -> 127.0.0.1:6006\n"
    wait_until(tensorboard_shows_a_loss, 120)


def have_ended(podman: Engine, containers: list[str]) -> bool:
    """Whether all have, well; what one has said that has not is shown."""
    found = podman.podman("inspect", "--format={{.State.Status}} {{.State.ExitCode}}", *containers).splitlines()
    if failed := [name for name, state in zip(containers, found, strict=True) if not state.endswith(" 0")]:
        raise AssertionError(f"{found}\n{podman.podman('logs', failed[0])[-6000:]}")
    return set(found) <= {"exited 0", "stopped 0"}  # the second: not cleaned up yet


def tensorboard_shows_a_loss() -> bool:
    """From this host, by the published port."""
    try:
        with urllib.request.urlopen("http://127.0.0.1:6006/data/plugin/scalars/tags", timeout=10) as answer:
            return "loss" in answer.read().decode()
    except OSError:
        return False
