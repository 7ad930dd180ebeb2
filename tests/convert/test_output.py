"""Where a conversion writes: what can be its place, who may write there, and what an end in the middle leaves."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from megatron_tied.cli.main import main
from megatron_tied.convert import output
from megatron_tied.convert.shards import save as save_tensors
from megatron_tied.errors import ConfigError
from tests.convert.hf_models import convert, save


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("olmoe", tmp_path_factory.mktemp("model") / "olmoe")


def command(model: Path, out: str) -> list[str]:
    return ["convert", "--from", "hf", "--to", "megatron-tied", "--input", str(model), "--output", out, "--no-verify"]


def test_the_working_directory_can_be_the_output(
    olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(command(olmoe, ".")) == 0
    assert (tmp_path / "here" / "manifest.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert f"{tmp_path / 'here'}: 6 layers" in capsys.readouterr().out


def test_an_error_after_the_end_does_not_say_that_nothing_was_written(
    olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(path: Path) -> None:
        if path == tmp_path:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(output, "sync", failing)
    assert main(command(olmoe, str(tmp_path / "out"))) == 1
    told = capsys.readouterr().err
    assert f"Input/output error; {tmp_path / 'out'} is complete all the same" in told
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_links_and_mount_points_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    for name, target in (("link", "real"), ("dangling", "nowhere")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(ConfigError, match=f"is a symbolic link.* such as {tmp_path / target}"):
            output.check_output(tmp_path / name)
    monkeypatch.setattr(output.os.path, "ismount", lambda path: path == tmp_path / "real")
    with pytest.raises(ConfigError, match=f"is a mount point.* such as {tmp_path / 'real' / 'model'}"):
        output.check_output(tmp_path / "real")
    with pytest.raises(ConfigError, match="is a mount point"):
        output.check_output(output.absolute(tmp_path / "real" / "x" / ".."))


def test_a_second_conversion_to_the_same_place_is_refused(tmp_path: Path) -> None:
    with output.claimed(tmp_path / "out"):
        with (
            pytest.raises(ConfigError, match="is being written by another conversion"),
            output.claimed(tmp_path / "out"),
        ):
            pass
        with output.claimed(tmp_path / "other"):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    assert not list(tmp_path.iterdir())
    with output.claimed(tmp_path / "out"):
        pass


def test_a_lock_that_was_removed_while_it_was_waited_for_counts_as_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def slow(descriptor: int, operation: int) -> None:
        (tmp_path / ".out.lock").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(output.fcntl, "flock", slow)
    with pytest.raises(ConfigError, match="by another conversion"), output.claimed(tmp_path / "out"):
        pass


def test_what_was_written_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def slow(descriptor: int, operation: int) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").touch()
        flock(descriptor, operation)

    monkeypatch.setattr(output.fcntl, "flock", slow)
    with pytest.raises(ConfigError, match="not empty"), output.claimed(tmp_path / "out"):
        pass


def test_a_name_may_be_as_long_as_names_can_be(olmoe: Path, tmp_path: Path) -> None:
    for name in ("n" * 255, "ü" * 126):
        convert("hf", "megatron-tied", olmoe, tmp_path / name, "--no-verify")
        assert (tmp_path / name / "manifest.json").is_file()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_an_error_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("megatron_tied.convert.shards.save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_tensors({"a": torch.zeros(1)}, tmp_path / "file")


SLOW = (
    "import sys, time\n"
    "from megatron_tied.convert import convert as conversion\n"
    "from megatron_tied.cli.main import main\n"
    "def stuck(*args, **options):\n"
    "    print('writing', flush=True)\n"
    "    time.sleep(300)\n"
    "conversion.write_checkpoint = stuck\n"
    "sys.exit(main(sys.argv[1:]))\n"
)


def test_a_conversion_that_is_told_to_end_leaves_nothing(olmoe: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", SLOW, *command(olmoe, str(tmp_path / "out"))]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", ".out.partial"]
        process.send_signal(signal.SIGTERM)
        code, told = process.wait(60), process.stderr.read()
    assert code == 128 + signal.SIGTERM
    assert "terminated; nothing was written" in told
    assert not list(tmp_path.iterdir())


def test_a_signal_is_as_before_when_it_is_done(olmoe: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    convert("hf", "megatron-tied", olmoe, tmp_path / "out", "--no-verify")
    assert signal.getsignal(signal.SIGTERM) is before


def test_banks_that_are_no_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command(Path("x"), "y"), "--tie-banks", "0,x"])
    assert "must be whole numbers with commas between them, such as 0,1,1,2: '0,x'" in capsys.readouterr().err
