"""What workers of the tests do: a module that imports little, as they import it too."""

from __future__ import annotations

import sys

from dali_pipeline.errors import DataError


def square(number: int, advance: object) -> int:
    return number * number


def imports_torch(number: int, advance: object) -> bool:
    return "torch" in sys.modules


def fails_at_three(number: int, advance: object) -> int:
    if number == 3:
        raise DataError("three is no number")
    return number
