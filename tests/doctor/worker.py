"""One of two ranks that take themselves for two hosts, each in a directory of its own; prints what the checks find.

Arguments: a directory that both see, and the cases. `<directory>/<case>/node<rank>` is where a rank stands in a case;
in `<directory>/<case>/node<rank>/packages` may be other distributions than are installed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_tied.doctor import bandwidth
from megatron_tied.doctor.examination import examine
from megatron_tied.doctor.world import World
from megatron_tied.training.config_file import load_config

directory, *cases = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
world = World(rank, ("node0", "node1"))
for case in cases:
    here = Path(directory, case, f"node{rank}")
    os.chdir(here)
    sys.path.insert(0, str(here / "packages"))
    findings = [finding.to_json() for finding in examine(world, load_config("config.yaml"))]
    sys.path.pop(0)
    bandwidth._MOST_REPEATS = 1  # one case that measures is enough
    (here / "findings.json").write_text(json.dumps(findings))
dist.destroy_process_group()
