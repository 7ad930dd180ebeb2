"""Four real ranks tell each other JSON."""

from __future__ import annotations

import json
import os

import pytest

from megatron_tied.exchange import on_rank_0
from tests.distributed.launch import launch


@pytest.fixture(scope="module")
def told() -> list[dict[str, object]]:
    """What each rank was told, by name of the exchange."""
    output = launch("tests.distributed.exchange_worker", 4, timeout=120)
    (line,) = (line for line in output.splitlines() if line.startswith("TOLD "))
    return json.loads(line.removeprefix("TOLD "))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lengths", ["x" * (1 + 100_000 * rank) for rank in range(4)]),
        ("empty", [None, "", [], {}]),
        ("unicode", [{"größe": "日本語" * rank, "n": rank, "x": [1.5, True, None]} for rank in range(4)]),
        ("of rank 0", [0, None]),
        ("failure of rank 0", "[Errno 2] No such file or directory: '/no file of rank 0'"),
        ("afterwards", [0, 1, 2, 3]),
        ("no_json", "TypeError: ranks of the group whose value is no JSON: [1]"),
        ("none_is_json", "TypeError: ranks of the group whose value is no JSON: [0, 1, 2, 3]"),
    ],
)
def test_every_rank_gets_all_values_in_order(told: list[dict[str, object]], name: str, values: object) -> None:
    assert [of_rank[name] for of_rank in told] == [values] * 4


def test_a_process_alone_is_rank_0() -> None:
    assert on_rank_0(lambda: {"found": 1}, (OSError,), ValueError) == {"found": 1}
    with pytest.raises(ValueError, match="No such file"):
        on_rank_0(lambda: os.listdir("/no file"), (OSError,), ValueError)


def test_a_group_of_its_own(told: list[dict[str, object]]) -> None:
    assert [of_rank["group"] for of_rank in told] == [[0, 2], [1, 3], [0, 2], [1, 3]]
