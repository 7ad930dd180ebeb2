"""What is written is what Megatron-LM's parser, with our flags, makes the same tie of."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import pytest
import yaml

from megatron_tied.errors import ConfigError
from megatron_tied.megatron_lm.arguments import add_tie_arguments, tie_config
from megatron_tied.patching.request import TieRequest

TIES = [
    {},
    {"group_size": 2, "skip_first": 0, "skip_last": 1},
    {"pattern": "cyclic", "block_size": 2, "pipeline": "allreduce"},
    {"banks": (0, 1, 1, -2)},
    {"num_tied_experts": 64, "lr_divisor": 1.5},
    {"lr_divisor": "linear"},
]


@pytest.mark.parametrize("given", TIES)
def test_flags_are_read_as_they_were_meant(given: dict[str, object]) -> None:
    request = TieRequest.of(given)
    words = [f"{name}={value}" for name, value in request.flags().items()]
    assert tie_config(add_tie_arguments(ArgumentParser()).parse_args(words)) == request.tie


@pytest.mark.parametrize("given", TIES)
def test_keys_are_read_as_they_were_meant(given: dict[str, object]) -> None:
    request = TieRequest.of(given)
    text = "\n".join(f"{name}: {value}" for name, value in request.keys().items())
    assert tie_config(Namespace(**yaml.safe_load(text))) == request.tie


@pytest.mark.parametrize(
    ("found", "is_same"),
    [
        ({"--moe-tie-group-size": "4"}, True),
        ({"--moe-tie-group-size": "4", "--moe-tie-skip-first": "2"}, True),
        ({"--moe-tie-group-size": "4", "--moe-tie-lr-divisor": "2"}, True),
        ({"--moe-tie-lr-divisor": "2.0"}, False),
        ({"--moe-tie-group-size": "2"}, False),
        ({"--moe-tie-group-size": None}, False),
    ],
)
def test_what_a_file_has_already(found: dict[str, str | None], is_same: bool) -> None:
    request = TieRequest.of({"lr_divisor": 2.0} if "--moe-tie-lr-divisor" in found else {})
    assert request.missing_from({}) == request.flags()
    if is_same:
        assert request.missing_from(found) == {}
    else:
        with pytest.raises(ConfigError, match=r"--moe-tie-group-size = .*: is what this file ties by already, but 4"):
            request.missing_from(found)


def test_a_request_that_is_wrong_in_itself() -> None:
    for given, message in (
        ({"group_size": 1}, "1 ties nothing"),
        ({"group_size": 0}, "must be an integer >= 1"),
        ({"block_size": 2}, "tie.block_size"),
    ):
        with pytest.raises(ConfigError, match=message):
            TieRequest.of(given)
