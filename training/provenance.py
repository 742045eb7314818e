"""Provenance: record the code, command and machine that made the numbers in an output folder."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dali_pipeline
from dali_pipeline.storage.whole import write_whole

PACKAGES = ("torch", "torch-geometric", "numpy", "scikit-learn")


def note_start(path: Path) -> None:
    """Append this start to the list in `path`, so that a run that other code continued lists both."""
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        before = []
    starts = [*(before if isinstance(before, list) else []), this_start()]
    write_whole(path, (json.dumps(starts, indent=2) + "\n").encode())


def this_start() -> dict[str, Any]:
    """Return version, git commit, command, versions of packages, number of processes, and machine."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "version": dali_pipeline.__version__,
        "commit": commit(),
        "packages": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def commit() -> str | None:
    """Return the git commit of the code, with a `+` if files differ from it; None outside of a repository."""
    here = ["git", "-C", str(Path(__file__).parent)]
    try:
        # if the code is only installed inside another repository, that does not know this file
        subprocess.run([*here, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        head = subprocess.run([*here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*here, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.strip() else "")
