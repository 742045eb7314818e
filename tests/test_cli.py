from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_convert import make_folder

from dali_pipeline.arguments import parse_blocks, parse_size
from dali_pipeline.cli import app, run
from dali_pipeline.schema import UsageError


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
        "from dali_pipeline.cli import app, run\n"
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
