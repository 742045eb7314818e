"""numpyversion: refuse NumPy 1 with one sentence, before an import that fails with it; `make` runs this module first."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from dali_pipeline.errors import UsageError

LEAST = 2  # pyarrow and others are built for it, and fail only when they are imported


def check_numpy() -> None:
    """Raise UsageError for a NumPy older than version 2. Costs NumPy's import, 0.1 s, and nothing once it is imported."""
    if int(np.__version__.partition(".")[0]) < LEAST:
        folder = Path(np.__file__).parent
        raise UsageError(
            f"NumPy {np.__version__} is installed in {folder}; expected NumPy {LEAST} or newer: pip install 'numpy>={LEAST}'"
        )


if __name__ == "__main__":
    try:
        check_numpy()
    except UsageError as error:
        sys.stderr.write(f"dali_pipeline: {error}\n")
        sys.exit(2)
