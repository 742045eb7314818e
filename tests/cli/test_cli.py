from __future__ import annotations

import errno
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dali_pipeline as dp
from dali_pipeline.cli.app import app, run
from dali_pipeline.cli.arguments import parse_blocks, parse_size
from dali_pipeline.errors import UsageError
from tests.helpers.folders import make_folder
from tests.helpers.records import make_records, write
from tests.helpers.scripts import ROOT


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dali_pipeline", *arguments])
    return run(app, "dali_pipeline")


def test_convert_says_what_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    src = make_folder(tmp_path / "src")
    assert call(monkeypatch, "convert", str(src), str(tmp_path / "dst"), "--split", "50/25/25", "--shard-size", "4KiB") == 0
    out, err = capsys.readouterr()
    assert "sequences" in out
    assert "graphs" in out
    assert err == ""
    assert (tmp_path / "dst" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "{tmp}/missing", "{tmp}/dst"], "is not a folder"),
        (["convert", "{tmp}", "{tmp}/dst"], "holds no lstm_solo"),
        (["convert", "{tmp}/missing", "{tmp}/dst", "--split", "1/2"], "such as 70/15/15"),
        (["convert", "{tmp}/missing", "{tmp}/dst", "--shard-size", "big"], "such as 4KiB"),
        (
            ["convert", "{tmp}/missing", "{tmp}/dst", "--dtype", "int3"],
            "expected float16, bfloat16, float32, int8, or by field",
        ),
        (["convert", "{tmp}"], "Missing argument"),
        (["convert", "{tmp}", "{tmp}/dst", "--fast"], "No such option"),
        (["extract", "{tmp}/dst", "--model", "m", "--prompts", "{tmp}/none.csv"], "cannot be read as CSV"),
        (["transmogrify"], "No such command"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert call(monkeypatch, *(argument.format(tmp=tmp_path) for argument in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.startswith("dali_pipeline: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_teaches_by_example_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['dali_pipeline', 'convert', '--help']\n"
        "from dali_pipeline.cli.app import app, run\n"
        "code = run(app, 'dali_pipeline')\n"
        "assert not {'torch', 'transformers', 'nvidia'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "python -m dali_pipeline convert preprocessed_data data/traces --split 80/10/10" in done.stdout


@pytest.mark.parametrize(
    ("text", "size"),
    [("4KiB", 4096), ("256MiB", 256 << 20), ("1GB", 10**9), ("4096", 4096), ("1.5 KB", 1500), ("2TiB", 2 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-4KiB", "4XB", "KiB", "0.1"])
def test_senseless_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_layers() -> None:
    assert parse_blocks("all") is None
    assert parse_blocks("none") == ()
    assert parse_blocks("8,16,24") == (8, 16, 24)
    assert parse_blocks("8:11") == (8, 9, 10)
    for text in ("", "a", "1:", "1,,2"):
        with pytest.raises(UsageError):
            parse_blocks(text)


def started(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """A shell's line with `"$@"` for the command."""
    command = [sys.executable, "-m", "dali_pipeline", *map(os.fsdecode, map(os.fsencode, map(str, arguments)))]
    line = options.pop("line", '"$@"')
    return subprocess.run(["sh", "-c", line, "sh", *command], capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ('"$@" >/dev/full', ("verify", "SET")),
        ('"$@" >/dev/full', ("inspect", "SET")),
        ('"$@" >/dev/full', ("inspect", "SET", "--json")),
        ('"$@" >/dev/full', ("verify", "--help")),
        ('PYTHONUNBUFFERED=1 "$@" >/dev/full', ("verify", "SET")),
        ('"$@" >&-', ("verify", "SET")),
    ],
)
def test_an_output_that_takes_nothing_is_one_sentence(data: dp.Dataset, arguments: tuple[str, ...], line: str) -> None:
    """Exit 2: for `verify` 1 would say that the set is damaged."""
    done = started(*(data.root if one == "SET" else one for one in arguments), line=line)
    assert done.returncode == 2
    assert done.stderr.startswith("dali_pipeline: standard output")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["versions", "doctor"])
def test_so_for_commands_with_heavy_imports(
    monkeypatch: pytest.MonkeyPatch, data: dp.Dataset, command: str, capfd: Any
) -> None:
    arguments = ["doctor", str(data.root), "--seconds", "0.01"] if command == "doctor" else [command]
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert call(monkeypatch, *arguments) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_errors_that_nobody_can_hear_keep_their_code(data: dp.Dataset, tmp_path: Path) -> None:
    """And with standard error closed nothing is said on standard output in its place."""
    for line in ('"$@" 2>/dev/full', '"$@" 2>&-', '"$@" >/dev/full 2>/dev/full', '"$@" <&- >&- 2>&-'):
        done = started("verify", tmp_path / "missing", line=line)
        assert (done.returncode, done.stdout) == (2, "")
    assert started("verify", data.root, line='"$@" 2>&-').returncode == 0


def test_a_reader_that_goes_is_no_error(data: dp.Dataset) -> None:
    for arguments in (("inspect",), ("verify",), ("inspect", "--json")):  # the reader goes before anything is written
        done = started(arguments[0], data.root, *arguments[1:], line='(sleep 0.2; "$@"; echo $? >&2) | exec true')
        assert done.stderr == "141\n", arguments


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_terminal_without_utf8_shows_what_it_can(data: dp.Dataset, environment: dict[str, str]) -> None:
    done = started("inspect", data.root, env={**os.environ, **environment})
    assert (done.returncode, done.stderr) == (0, "")
    assert "label 0" in done.stdout
    assert done.stdout.isascii()


def test_a_working_folder_that_is_gone_is_one_sentence(data: dp.Dataset, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    done = started("verify", data.root, line='rmdir "$PWD" && "$@"', cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    assert done.stderr == "dali_pipeline: the working folder is gone; go to one that is there\n"


def test_a_url_without_a_home_folder_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert call(monkeypatch, "inspect", "memory://set") == 2
    assert "name a folder with --cache-dir" in capsys.readouterr().err


def test_a_path_that_is_not_utf8_is_read_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / os.fsdecode(b"caf\xe9 $\\frac{$b")
    write(root, make_records(40))
    for arguments in (
        ("verify",),
        ("inspect",),
        ("inspect", "--plot", tmp_path / "out.png"),
        ("inspect", "--shuffle", "--json"),
    ):
        done = started(arguments[0], root, *arguments[1:])
        assert (done.returncode, done.stderr) == (0, ""), arguments
    found = json.loads(started("inspect", root, "--json").stdout)
    assert found["root"] == f"{tmp_path}/caf\ufffd $\\frac{{$b"
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["inspect", "doctor"])
def test_a_picture_that_cannot_be_written_is_one_sentence(
    data: dp.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "full.png").symlink_to("/dev/full")
    (tmp_path / "folder.png").mkdir()
    for name, words in (
        ("full.png", "is no regular file"),
        ("folder.png", "is no regular file"),
        ("nowhere/out.png", "expected the name of a file in a folder that is there"),
        ("out.docx", "cannot be drawn"),
        ("out", "has no suffix"),
    ):
        assert call(monkeypatch, command, str(data.root), "--plot", str(tmp_path / name)) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    (tmp_path / "earlier.png").write_text("another picture")
    with monkeypatch.context() as patch:  # the disk fills up while the picture is written

        def full(fd: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "fsync", full)
        assert call(patch, "inspect", str(data.root), "--plot", str(tmp_path / "earlier.png")) == 2
    assert "No space left" in capsys.readouterr().err
    assert (tmp_path / "earlier.png").read_text() == "another picture"
    assert len(list(tmp_path.iterdir())) == 3
