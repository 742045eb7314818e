"""Docstrings in plain technical English: an imperative verb or a noun phrase first, and every public argument described."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import dali_pipeline as dp

ROOT = Path(__file__).parent.parent
CODE = ("dali_pipeline", "training", "models", "benchmarks", "examples", "tests", "train.py", "predict.py")
DIALECT = re.compile(r"(Of|As|That|By|So many)\b|N\.")
SECTIONS = ("Args:", "Attributes:")
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def files() -> list[str]:
    """Return the Python files that git tracks; all of them outside a checkout, as in an unpacked archive."""
    listed = subprocess.run(["git", "ls-files", "--", *CODE], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    names = listed.split() or [str(path.relative_to(ROOT)) for name in CODE for path in tree(ROOT / name)]
    return sorted(name for name in names if name.endswith(".py") and (ROOT / name).exists())


def tree(path: Path) -> Iterator[Path]:
    """Yield a file itself, or the Python files of a folder."""
    return path.rglob("*.py") if path.is_dir() else iter([path])


def offenders(path: Path) -> Iterator[str]:
    """Yield file, line and first words of every docstring in dialect."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, Documented) and DIALECT.match(text := ast.get_docstring(node) or ""):
            yield f"{path.relative_to(ROOT)}:{node.body[0].lineno}: {text[:40]!r}"


@pytest.mark.parametrize("name", files())
def test_docstrings_begin_with_a_verb_or_a_noun(name: str) -> None:
    assert not list(offenders(ROOT / name))


@pytest.mark.parametrize("words", ["Of what is read.", "As there.", "That it takes.", "By itself one.", "So many bytes.", "N."])
def test_the_dialect_is_found(words: str) -> None:
    assert DIALECT.match(words)


@pytest.mark.parametrize("words", ["Offsets of rows.", "Assert it.", "Bytes of a row.", "Number of records.", "Nodes."])
def test_plain_words_are_not_mistaken_for_it(words: str) -> None:
    assert not DIALECT.match(words)


def arguments(function: object) -> list[str]:
    """Return the names of the arguments, without `self` and `cls`."""
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]  # type: ignore[arg-type]


def public() -> Iterator[tuple[str, object, list[str]]]:
    """Yield name, object and arguments of exported classes and functions, and of public methods that describe arguments.

    Errors are left out, because they take a message as every exception does.
    """
    for name in dp.__all__:
        value = getattr(dp, name)
        if inspect.isclass(value) and issubclass(value, Exception):
            continue
        yield name, value, arguments(value)
        if inspect.isclass(value):
            for method, member in inspect.getmembers_static(value):
                function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
                if inspect.isfunction(function) and not method.startswith("_") and "Args:" in (function.__doc__ or ""):
                    yield f"{name}.{method}", function, arguments(function)


@pytest.mark.parametrize("name", dp.__all__)
def test_every_public_name_has_a_docstring(name: str) -> None:
    assert (getattr(dp, name).__doc__ or "").strip()


@pytest.mark.parametrize(("name", "value", "names"), [pytest.param(*case, id=case[0]) for case in public() if case[2]])
def test_public_arguments_are_described(name: str, value: object, names: list[str]) -> None:
    """Every argument has a line in `Args:` or `Attributes:`."""
    text = inspect.getdoc(value) or ""
    assert any(section in text for section in SECTIONS), f"{name}({', '.join(names)}) has no Args: or Attributes:"
    described = set(re.findall(r"^ +([\w, *]+): ", text, re.MULTILINE))
    words = {word.strip(" *") for line in described for word in line.split(",")}
    assert set(names) <= words, f"{name} does not describe {', '.join(sorted(set(names) - words))}"
