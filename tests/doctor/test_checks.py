"""Two ranks that take themselves for two hosts, with a fault planted on the second one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tied.doctor.findings import Finding, Level
from tests.distributed.launch import launch
from tests.training.runs import Corpus, config_values

Values = dict[str, Any]


def sound(node: Path, values: Values) -> None:
    pass


def one_byte_of_the_data(node: Path, values: Values) -> None:
    tokens = bytearray((node / "a.bin").read_bytes())
    tokens[len(tokens) // 2] ^= 1
    (node / "a.bin").write_bytes(tokens)


def no_index(node: Path, values: Values) -> None:
    (node / "a.idx").unlink()


def another_deepspeed(node: Path, values: Values) -> None:
    metadata = node / "packages/deepspeed-0.19.9.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.19.9\n")


def a_deepspeed_that_is_too_new(node: Path, values: Values) -> None:
    metadata = node / "packages/deepspeed-0.99.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.99\n")


def run_directory_of_its_own(node: Path, values: Values) -> None:
    for name in ("node0", "node1"):  # relative to where a rank stands
        change(node.parent / name, "train", run_dir="run")


def cache_of_its_own(node: Path, values: Values) -> None:
    for name in ("node0", "node1"):
        change(node.parent / name, "data", cache_dir="cache")


def another_config(node: Path, values: Values) -> None:
    change(node, "train", seed=5)


def groups_of_more_ranks(node: Path, values: Values) -> None:
    for name in ("node0", "node1"):
        change(node.parent / name, "parallel", expert_model_parallel_size=4)


FAULTS: dict[str, Callable[[Path, Values], None]] = {
    fault.__name__: fault
    for fault in (
        sound,
        one_byte_of_the_data,
        no_index,
        another_deepspeed,
        a_deepspeed_that_is_too_new,
        run_directory_of_its_own,
        cache_of_its_own,
        another_config,
        groups_of_more_ranks,
    )
}


def change(node: Path, section: str, **values: object) -> None:
    config = json.loads((node / "config.yaml").read_text())
    config[section] |= values
    (node / "config.yaml").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def found(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Finding]]:
    """What the checks found, by fault; the same on both ranks."""
    directory = tmp_path_factory.mktemp("hosts")
    for name, plant in FAULTS.items():
        shared = directory / name / "shared"
        shared.mkdir(parents=True)
        values = config_values(corpus, shared / "runs" / "run")
        values["data"] |= {"train": "a", "cache_dir": str(shared / "cache"), "tokenizer": "a.model"}
        values["checkpoint"] = {"save_every": 5}
        for node in (directory / name / "node0", directory / name / "node1"):
            node.mkdir()
            for file in corpus.a.parent.glob("a.*"):
                shutil.copy(file, node)
            (node / "config.yaml").write_text(json.dumps(values))
        plant(node, values)
    launch("tests.doctor.worker", 2, str(directory), *FAULTS, timeout=200)
    return {name: read(directory / name) for name in FAULTS}


def read(case: Path) -> list[Finding]:
    told = [json.loads((case / node / "findings.json").read_text()) for node in ("node0", "node1")]
    first, second = ([Finding.from_json(finding) for finding in of_rank] for of_rank in told)
    # But for the paths in their texts, which are each rank's own.
    assert [(finding.check, finding.level, finding.hosts) for finding in first] == [
        (finding.check, finding.level, finding.hosts) for finding in second
    ]
    assert not list(case.rglob(".doctor*"))
    return first


def against(findings: list[Finding]) -> list[Finding]:
    # Ranks that share two cores may be slow, and a machine may have little shared memory.
    return [finding for finding in findings if finding.level is Level.ERROR]


def test_nothing_is_found_where_nothing_is_wrong(found: dict[str, list[Finding]]) -> None:
    findings = found["sound"]
    assert against(findings) == []
    assert [finding.check for finding in findings if finding.check != "limits"] == [
        "ports",
        "versions",
        "clock",
        *["disk"] * 2,
        *["shared"] * 2,
        "data",
        "expert groups",
        *["bandwidth"] * 3,
    ]


def test_groups_that_need_more_ranks_are_not_measured(found: dict[str, list[Finding]]) -> None:
    findings = found["groups_of_more_ranks"]
    assert against(findings) == []
    assert [finding.check for finding in findings].count("bandwidth") == 2


def test_all_to_all_across_hosts_is_told(found: dict[str, list[Finding]]) -> None:
    (placement,) = (finding for finding in found["sound"] if finding.check == "expert groups")
    assert placement.level is Level.WARNING
    assert placement.what.startswith("1 of 1 groups of 2 ranks span hosts (hosts x slots: 2 x 1)")
    assert placement.hosts == ("node0", "node1")
    assert "parallel.expert_model_parallel_size=1 would stay inside" in placement.remedy


def test_a_byte_of_the_data(found: dict[str, list[Finding]]) -> None:
    (finding,) = against(found["one_byte_of_the_data"])
    assert (finding.check, finding.hosts) == ("data", ("node0", "node1"))  # which of two is right nobody knows
    assert "node0/a.bin: " in finding.what
    assert " on node0; " in finding.what
    assert finding.what.endswith(" on node1")


def test_a_file_that_is_missing(found: dict[str, list[Finding]]) -> None:
    (finding,) = against(found["no_index"])
    assert finding.check == "data"
    assert "a.idx: " in finding.what
    assert "missing on node1" in finding.what


def test_another_version(found: dict[str, list[Finding]]) -> None:
    (finding,) = against(found["another_deepspeed"])
    assert finding.check == "versions"
    assert finding.what.startswith("deepspeed differs: ")
    assert "0.19.9 on node1" in finding.what


def test_a_version_that_is_not_supported(found: dict[str, list[Finding]]) -> None:
    differs, unsupported = against(found["a_deepspeed_that_is_too_new"])
    assert "0.99 on node1" in differs.what
    assert unsupported.hosts == ("node1",)
    assert "package deepspeed = '0.99': supported versions are" in unsupported.what


@pytest.mark.parametrize(
    ("fault", "field"), [("run_directory_of_its_own", "train.run_dir"), ("cache_of_its_own", "data.cache_dir")]
)
def test_directories_that_are_not_shared(found: dict[str, list[Finding]], fault: str, field: str) -> None:
    (finding,) = against(found[fault])
    assert (finding.check, finding.hosts) == ("shared", ("node1",))
    assert finding.what.startswith(f"{field} = ")
    assert "is not the directory that node0 has under that name" in finding.what


def test_other_configs_end_the_checks(found: dict[str, list[Finding]]) -> None:
    assert [(finding.check, finding.level) for finding in found["another_config"]] == [
        ("ports", Level.OK),
        ("config", Level.ERROR),
    ]
