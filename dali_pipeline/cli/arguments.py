"""Parse numbers from the command line, and define the options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from dali_pipeline.errors import UsageError

CACHE_DIR = "Directory for cached remote blocks. [default: dali_pipeline in the user's cache folder]"
CACHE_BYTES = "Maximum size of the cache. [default: 32GiB]"
FILES_ROOT = "Folder or URL of the files that hold the values of a data set made in place. [default: where they lay]"
SetArgument = Annotated[str, typer.Argument(help="Folder or URL of a data set.", show_default=False)]
CacheDir = Annotated[Path | None, typer.Option("--cache-dir", metavar="FOLDER", help=CACHE_DIR, show_default=False)]
FilesRoot = Annotated[str | None, typer.Option("--files-root", metavar="FOLDER", help=FILES_ROOT, show_default=False)]
CacheBytes = Annotated[str | None, typer.Option("--cache-bytes", metavar="SIZE", help=CACHE_BYTES, show_default=False)]


def parse_size(text: str) -> int:
    """Return the bytes that a text such as `4KiB`, `256MiB`, `1GB` or `4096` says; KiB is 1024, KB is 1000."""
    units = {"": 1} | {
        f"{prefix}{unit}": base**power for unit, base in (("iB", 1024), ("B", 1000)) for power, prefix in enumerate("KMGT", 1)
    }
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match.group(2) not in units or not 1 <= float(match.group(1)) * units[match.group(2)] < 2**60:
        raise UsageError(f"size is {text!r}; expected a number of bytes such as 4KiB, 256MiB or 1GB")
    return int(float(match.group(1)) * units[match.group(2)])


def parse_cache_bytes(text: str | None) -> int | None:
    """Parse a size like `parse_size`; None stands for the default of `open_dataset`."""
    return None if text is None else parse_size(text)


def parse_sizes(text: str | None) -> list[int]:
    """Parse sizes such as `64MiB,1GiB`; None is an empty list."""
    return [] if text is None else [parse_size(size) for size in text.split(",")]


def parse_blocks(text: str) -> tuple[int, ...] | None:
    """Parse numbers of layers: `all` is None, `none` is (), `8,16,24` is a list and `8:25` a range."""
    if text in ("all", "none"):
        return None if text == "all" else ()
    try:
        if ":" in text:
            begin, end = (int(part) for part in text.split(":"))
            return tuple(range(begin, end))
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"layers are {text!r}; expected all, a list such as 8,16,24, or a range such as 8:25") from None


def parse_num_workers(text: str) -> int | Literal["auto"]:
    """Parse `auto` or a whole number."""
    return parse_count_or_auto("workers", text, 0)


def parse_count_or_auto(name: str, text: str, least: int) -> int | Literal["auto"]:
    """Parse `auto` or a whole number of at least `least`; raise UsageError, which calls the argument by `name`."""
    if text == "auto":
        return "auto"
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise UsageError(f"{name} is {text!r}; expected auto or a whole number" + (f" of at least {least}" if least else ""))
    return int(text)
