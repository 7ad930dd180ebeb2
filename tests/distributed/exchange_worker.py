"""One of the ranks that tell each other JSON; prints what it was told, rank by rank."""

from __future__ import annotations

import json
import os

import torch.distributed as dist

from megatron_tied.exchange import gather_json, on_rank_0

dist.init_process_group("gloo")
rank = dist.get_rank()
told = {
    "lengths": gather_json("x" * (1 + 100_000 * rank)),
    "empty": gather_json([None, "", [], {}][rank]),
    "unicode": gather_json({"größe": "日本語" * rank, "n": rank, "x": [1.5, True, None]}),
}
evens, odds = dist.new_group([0, 2]), dist.new_group([1, 3])
told["group"] = gather_json(rank, odds if rank % 2 else evens)
for name, value in (("no_json", {1, 2} if rank == 1 else 0), ("none_is_json", object())):
    try:
        told[name] = gather_json(value)
    except TypeError as error:
        told[name] = f"TypeError: {error}"
told["of rank 0"] = on_rank_0(lambda: [rank, None], (OSError,), ValueError)
try:
    on_rank_0(lambda: os.listdir(f"/no file of rank {rank}"), (OSError,), ValueError)
except ValueError as error:
    told["failure of rank 0"] = str(error)
told["afterwards"] = gather_json(rank)
everything = [None] * 4
dist.all_gather_object(everything, told)  # by other means, for the test
if rank == 0:
    print("TOLD", json.dumps(everything))
dist.destroy_process_group()
