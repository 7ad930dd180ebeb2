"""One of two ranks that save and load together: `together_worker DIRECTORY`; prints what each found, by case, as JSON.

Notes every pickle that is made or opened meanwhile, whoever does it.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_tied.checkpoint import storage
from megatron_tied.checkpoint.directory import CheckpointDirectory
from megatron_tied.checkpoint.loader import Checkpoint, load
from megatron_tied.checkpoint.manifest import Manifest
from megatron_tied.checkpoint.rectangles import Rectangles, StateDict
from megatron_tied.checkpoint.saver import Saver
from megatron_tied.checkpoint.together import RankError, of_every_rank
from megatron_tied.exchange import gather_json

WHOLE = torch.arange(24.0).view(4, 6)
ROWS = [((0, 0), (2, 6)), ((2, 0), (2, 6))]
COLUMNS = [((0, 0), (4, 5)), ((0, 5), (4, 1))]


def watch_pickles() -> list[str]:
    """What is pickled or unpickled from now on, as it happens: anything with a class in it, and all objects of c10d."""
    seen: list[str] = []
    sys.addaudithook(lambda event, _: seen.append(event) if event == "pickle.find_class" else None)
    for module, name in (
        (distributed_c10d, "_object_to_tensor"),
        (distributed_c10d, "_tensor_to_object"),
        (pickle, "dumps"),
        (pickle, "loads"),
        (pickle, "dump"),
        (pickle, "load"),
    ):
        mock.patch.object(module, name, _noting(seen, name, getattr(module, name))).start()
    return seen


def _noting(seen: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*arguments: Any, **options: Any) -> Any:
        seen.append(name)
        return function(*arguments, **options)

    return noted


class Cases:
    """Saves and loads in `root`, and what this rank has found of each."""

    def __init__(self, root: Path):
        self.rank = dist.get_rank()
        self.group = dist.new_group(backend="gloo")
        self.directory = CheckpointDirectory(root)
        self.found: dict[str, Any] = {}
        self._step = 0

    def state(self, *, dtype: torch.dtype = torch.float32) -> StateDict:
        """A tensor of which each rank has two rows, two that both have, and one of each rank's own."""
        offsets, (rows, columns) = ROWS[self.rank]
        weight = Rectangles(WHOLE.shape)
        weight.add(offsets, WHOLE[offsets[0] : offsets[0] + rows, :columns].to(dtype))
        own = torch.full((3,), self.rank, dtype=torch.uint8)
        replicated = {"buffer/b": torch.tensor([1.5, float("nan")]), "buffer/a": torch.tensor(7)}
        return {"weight/w": weight, **replicated, f"rng/rank_{self.rank}": own}

    def save(self, tensors: StateDict, *, in_background: bool = False, expected: tuple[str, ...] = ()) -> str | None:
        """Save as the next step; returns why it failed. What was interrupted ends here as it began."""
        self._step += 1
        saver = Saver(self.directory, self.group, in_background=in_background, keep_last=100, keep_every=0)
        manifest = Manifest(step=self._step, consumed_samples=0, world_size=2, software="", run={}, trainer={})
        try:
            saver.save(tensors, manifest, frozenset(expected))
            saver.wait()
        except KeyboardInterrupt:
            self.found["was interrupted"] = True
        (outcome,) = saver.outcomes()
        assert outcome.path == self.directory.path(self._step)
        return outcome.failure

    def fail(self, name: str, tensors: StateDict | None = None, *, expected: tuple[str, ...] = ()) -> None:
        """Note the failure of a save, and what there is after it."""
        failure = self.save(self.state() if tensors is None else tensors, expected=expected)
        dist.barrier()
        left = sorted(entry.name for entry in self.directory.root.iterdir())
        self.found[name] = {"failure": failure, "left": left}
        dist.barrier()

    @contextmanager
    def writing(self, rank: int, action: Callable[[], None]) -> Iterator[None]:
        """On `rank`, `action` comes before its file."""
        save_file = storage.save_file

        def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
            action()
            save_file(tensors, path)

        with mock.patch.object(storage, "save_file", write if self.rank == rank else save_file):
            yield

    def load(self, tensors: StateDict) -> str | None:
        """Load from the newest checkpoint; returns why it failed."""
        path = self.directory.path(self.directory.steps()[0])
        try:
            load(tensors, Checkpoint(path, Manifest.read(path)))
        except RankError as error:
            return str(error)
        return None


def refuse(error: BaseException) -> Callable[[], None]:
    """An action that raises `error`."""

    def action() -> None:
        raise error

    return action


def failing_saves(cases: Cases) -> None:
    """Everything that can go wrong in a save, on one rank or on both."""
    full = OSError(28, "No space left on device")
    with cases.writing(0, refuse(full)):
        cases.fail("the first cannot write")
    with cases.writing(1, refuse(full)):
        cases.fail("the second cannot write")
    with cases.writing(0, refuse(ValueError("this"))), cases.writing(1, refuse(ValueError("that"))):
        cases.fail("neither can write")
    with cases.writing(1, refuse(RuntimeError("one\n  two"))):
        cases.fail("a reason of two lines")
    with cases.writing(1, refuse(MemoryError())):
        cases.fail("no reason")
    with cases.writing(1, refuse(KeyboardInterrupt())):
        cases.fail("Ctrl-C")
    for method in ("begin", "commit"):
        error = OSError(5, "Input/output error")
        with mock.patch.object(CheckpointDirectory, method, side_effect=error):
            cases.fail(f"the first cannot {method}")
    cases.fail("missing", expected=("weight/w", "weight/v", "weight/u"))
    with mock.patch.dict(globals(), ROWS=[ROWS[0], ((3, 0), (1, 6))]):
        cases.fail("a gap")
    with mock.patch.dict(globals(), ROWS=[ROWS[0], ((1, 0), (3, 6))]):
        cases.fail("an overlap")
    cases.fail("two dtypes", cases.state(dtype=torch.float64 if cases.rank else torch.float32))


def failing_loads(cases: Cases) -> None:
    """On one rank alone, both hear of it."""
    path = cases.directory.path(cases.directory.steps()[0])
    cases.found["path"] = str(path)
    cases.found["not there"] = cases.load({"weight/v" if cases.rank else "weight/w": torch.zeros(4, 6)})
    cases.found["another shape"] = cases.load({"weight/w": torch.zeros((4, 7) if cases.rank == 0 else (4, 6))})
    with mock.patch.object(storage, "safe_open", refuse_all if cases.rank else storage.safe_open):
        cases.found["not known"] = cases.load({"weight/w": torch.zeros(4, 6)})


def refuse_all(*_: Any, **__: Any) -> None:
    """What nobody has thought of."""
    raise AttributeError("something else")


def load_in_columns(cases: Cases) -> dict[str, Any]:
    """Each rank other parts than it has written."""
    offsets, sizes = COLUMNS[cases.rank]
    part, wanted = torch.zeros(sizes), Rectangles(WHOLE.shape)
    wanted.add(offsets, part)
    buffer, scalar, own = torch.zeros(2), torch.tensor(0), torch.zeros(3, dtype=torch.uint8)
    other = 1 - cases.rank
    failure = cases.load({"weight/w": wanted, "buffer/b": buffer, "buffer/a": scalar, f"rng/rank_{other}": own})
    return {"failure": failure, "w": part.tolist(), "b": buffer[:1].tolist(), "a": int(scalar), "rng": own.tolist()}


def main(directory: str) -> None:
    """All cases, on the same group one after the other: a rank that fell out of step would hang or get another's."""
    dist.init_process_group("gloo")
    seen = watch_pickles()
    cases = Cases(Path(directory))
    cases.found["saved"] = cases.save(cases.state(), expected=("weight/w",))
    cases.found["loaded"] = load_in_columns(cases)
    with cases.writing(1, lambda: time.sleep(0.5)):
        cases.found["saved in the background"] = cases.save(cases.state(), in_background=True)
    failing_saves(cases)
    failing_loads(cases)
    cases.found["saved at last"] = cases.save(cases.state(), expected=("weight/w",))
    cases.found["loaded at last"] = load_in_columns(cases)
    cases.found["in order"] = of_every_rank(lambda: [dist.get_rank()], cases.group)
    cases.found["pickles"] = seen
    everything = gather_json(cases.found)
    if cases.rank == 0:
        print("FOUND", json.dumps(everything))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
