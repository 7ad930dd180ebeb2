"""What checks make of what hosts say."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tied.doctor import bandwidth, clock, data_files, disk, limits, versions
from megatron_tied.doctor.findings import Finding, Level
from megatron_tied.doctor.placement import check_placement
from megatron_tied.doctor.report import report
from megatron_tied.doctor.world import World
from megatron_tied.training.config_file import parse_config

GB = 10**9


def test_the_odd_one_out_is_named() -> None:
    said = {f"node{number}": {"torch": "2.13.0" if number != 2 else "2.12.0"} for number in range(4)}
    (finding,) = versions.compare(said)
    assert (finding.level, finding.hosts) == (Level.ERROR, ("node2",))
    assert finding.what == "torch differs: 2.13.0 on node0, node1, node3; 2.12.0 on node2"
    assert finding.remedy == "make it 2.13.0 on every host"


def test_another_driver_is_a_warning() -> None:
    (finding,) = versions.compare({"node0": {"driver": "580.1"}, "node1": {"driver": "580.2"}})
    assert finding.level is Level.WARNING


def test_a_clock_that_is_ahead() -> None:
    (finding,) = clock.judge({"node0": [0.0, 10.0], "node1": [0.1, 10.1], "node2": [1.9, 11.6]})
    assert (finding.level, finding.hosts) == (Level.WARNING, ("node2",))
    assert finding.what.startswith("node2 is 1.5 s ahead of the others: ")


@pytest.mark.parametrize("late", [["node1"], ["node0", "node1"]])
def test_hosts_that_are_late_to_read_their_clocks_are_not_ahead(late: list[str]) -> None:
    in_time, at_last = [3.0, 10.2, 20.1], [3.1, 15.0, 20.0]
    said = {f"node{number}": at_last if f"node{number}" in late else in_time for number in range(3)}
    (finding,) = clock.judge(said)
    assert finding.level is Level.OK


def test_which_of_two_clocks_is_wrong_is_told_by_the_earlier() -> None:
    (finding,) = clock.judge({"node0": [100.0], "node1": [40.0]})
    assert finding.what.startswith("node0 is 60.0 s ahead of the others")


@pytest.mark.parametrize(
    ("free", "level"), [(0, Level.ERROR), (4 * GB, Level.ERROR), (12 * GB, Level.WARNING), (15 * GB, Level.OK)]
)
def test_room_for_checkpoints(free: int, level: Level) -> None:
    need = disk.Need("train.run_dir", "/runs/a/checkpoints", "checkpoints", 5 * GB, 15 * GB)
    (finding,) = disk.judge(need, {"node0": 100 * GB, "node1": free})
    assert finding.level is level
    assert finding.hosts == (() if level is Level.OK else ("node1",))


def run_config(tmp_path: Path, **checkpoint: int) -> disk.RunConfig:
    model = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_moe_experts": 4, "vocab_size": 320}
    model |= {"moe_router_topk": 2, "moe_ffn_hidden_size": 32}
    train = {"run_dir": str(tmp_path / "run"), "steps": 100}
    data = {"train": "a", "cache_dir": str(tmp_path)}
    return parse_config({"model": model, "train": train, "data": data, "checkpoint": checkpoint})


def test_what_checkpoints_take(tmp_path: Path) -> None:
    settings = {"save_every": 10, "keep_last": 3, "keep_every": 50}
    checkpoints, _ = disk.needs(run_config(tmp_path, **settings))
    # The last three, the one that is being written, and those of steps 50 and 100.
    assert checkpoints.most == 6 * checkpoints.least
    (tmp_path / "run/checkpoints/step_00000010").mkdir(parents=True)
    checkpoints, _ = disk.needs(run_config(tmp_path, **settings))
    assert checkpoints.most == 5 * checkpoints.least
    checkpoints, _ = disk.needs(run_config(tmp_path, save_every=90, keep_last=3))
    assert checkpoints.most == checkpoints.least
    (cache,) = disk.needs(run_config(tmp_path, save_every=0))
    assert (cache.field, cache.least) == ("data.cache_dir", 0)


def test_limits() -> None:
    enough = {"files": 4096, "shared_memory": GB}
    few, small = limits.judge({"node0": enough, "node1": {"files": 256, "shared_memory": 1 << 26}}, 16)
    assert few.what == "a process may open 256 files, and 16 ranks may need 384"
    assert small.what == "/dev/shm holds 64 MiB"
    assert {few.hosts, small.hosts} == {("node1",)}
    (finding,) = limits.judge({"node0": {"files": None, "shared_memory": None}}, 16)
    assert finding.level is Level.OK


@pytest.mark.parametrize(
    ("hosts", "size", "level", "told"),
    [
        ("aabb", 2, Level.OK, "each of the 2 groups of 2 ranks lies inside a host (hosts x slots: 2 x 2)"),
        ("abab", 2, Level.WARNING, "number the ranks host by host"),
        ("aaabbb", 2, Level.WARNING, "give each host a multiple of 2 slots"),
        ("aaabbb", 6, Level.WARNING, "parallel.expert_model_parallel_size=3 would stay inside"),
        ("aabbbb", 6, Level.WARNING, "parallel.expert_model_parallel_size=2 would stay inside"),
        ("aab", 1, Level.OK, "no expert parallelism (slots: a 2, b 1)"),
    ],
)
def test_where_expert_groups_lie(hosts: str, size: int, level: Level, told: str) -> None:
    (finding,) = check_placement(World(0, tuple(hosts)), size)
    assert finding.level is level
    assert told in f"{finding.what} {finding.remedy}"


def test_the_host_without_a_fast_link_is_the_slow_one() -> None:
    hosts = ("node0", "node0", "node1", "node1", "node2", "node2", "node3", "node3")
    across = {1: 1.0, 3: 0.1, 5: 0.1, 7: 1.0}  # node2 has slow links to both of its neighbours
    links = [(low, (low + 1) % 8, GB * across.get(low, 50.0)) for low in range(8)]
    finding = bandwidth.slowest_finding(links, hosts)
    assert (finding.level, finding.hosts) == (Level.WARNING, ("node2",))
    assert "0.1 GB/s" in finding.what
    assert bandwidth.slowest_finding([(0, 1, 1.0 * GB), (1, 2, 0.9 * GB)], ("a", "b", "c")).level is Level.OK


def test_figures_of_collectives() -> None:
    seconds = {1 << 10: [0.001] * 4, 1 << 20: [0.01, 0.02, 0.5, 0.4]}
    finding = bandwidth.all_to_all_finding(seconds, [range(0, 2), range(2, 4)], ("a", "a", "b", "b"))
    assert finding.what == (
        "all-to-all in groups of 2 (slowest of 2: ranks 2 to 3 on b): 1 ms for 1024 bytes, 0.00105 GB/s at 1 MiB"
    )
    finding = bandwidth.all_reduce_finding({1 << 10: [0.002] * 4, 1 << 20: [0.01, 0.02, 0.01, 0.01]}, 4)
    assert finding.what == "all-reduce over 4 ranks: 2 ms for 1024 bytes, 0.0786 GB/s at 1 MiB"


def test_of_large_token_files_blocks_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_files, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(data_files, "_BLOCK_BYTES", 10)
    tokens = tmp_path / "a.bin"
    content = bytearray(10_000)
    tokens.write_bytes(content)
    before = data_files.checksum(tokens)
    assert before.startswith("10,000 bytes, sha256 of 64 blocks ")
    for place, seen in ((0, True), (9_999, True), (100, False)):
        changed = content.copy()
        changed[place] = 1
        tokens.write_bytes(changed)
        assert (data_files.checksum(tokens) != before) is seen
    index = tmp_path / "a.idx"
    index.write_bytes(content)
    assert "blocks" not in data_files.checksum(index)
    (finding,) = data_files.judge({str(tokens): {"node0": before, "node1": before}})
    assert finding.what == "1 files equal on all hosts; of a.bin only the size and 64 blocks of 1 MiB"


def test_files_that_are_missing_everywhere() -> None:
    said = {"node0": "missing", "node1": "missing"}
    findings = data_files.judge({"/a.bin": said, "/a.json": said})
    assert [(finding.level, finding.what) for finding in findings] == [(Level.ERROR, "/a.bin: missing on node0, node1")]


def test_the_table_and_what_is_to_be_done() -> None:
    from rich.console import Console

    findings = [
        Finding("ports", Level.OK, "4 ranks"),
        Finding("disk", Level.WARNING, "little room", ("node1",), "make room"),
        Finding("disk", Level.OK, "cache: room"),
        Finding("data", Level.ERROR, "differs", ("node0", "node1"), "copy"),
    ]
    console = Console(width=100, highlight=False)
    with console.capture() as shown:
        console.print(report(findings))
    assert [line.rstrip() for line in shown.get().splitlines()] == [
        "✓  ports  4 ranks",
        "!  disk   1 finding, see below",
        "          cache: room",
        "✗  data   1 finding, see below",
        "",
        "✗ data: differs",
        "  hosts: node0, node1",
        "  to do: copy",
        "",
        "! disk: little room",
        "  hosts: node1",
        "  to do: make room",
    ]
