"""Checks of single arguments: what stands for a number is accepted as one, anything else is refused in one sentence.

Words that changed before the first release are refused too, with the new word.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np

from dali_pipeline.errors import UsageError

MOST = 2**63 - 1
MOST_SHOWN = 200  # characters
OLD_KEYWORDS = {
    "workers": "num_workers",
    "lanes": "num_partitions",
    "tail": "drop_last, and tail='drop' is drop_last=True",
    "balance": "class_balanced, and balance='label' is class_balanced=True",
    "weights": "group_weights",
}
OLD_FLAGS = {"workers": "num-workers", "lanes": "num-partitions"}
Function = TypeVar("Function", bound=Callable[..., Any])


def shown(value: object) -> str:
    """Return an argument as an error shows it: on one line, and short."""
    text = " ".join(repr(value).split())
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} …"


def is_truth(value: object) -> bool:
    """Return whether `value` is True or False, of Python or NumPy."""
    return isinstance(value, bool | np.bool_)


def whole(name: str, value: Any, least: int = 0, most: int = MOST, *, expected: str = "") -> int:
    """Return any integral number between `least` and `most` as an int, for example NumPy's or a tensor of one element.

    True is not a number. Raises UsageError that names the argument and what was `expected`.
    """
    try:
        number = None if is_truth(value) or "bool" in str(getattr(value, "dtype", "")) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or not least <= number <= most:
        limits = f"of at least {least}" if most == MOST else f"from {least} to {most}"
        raise UsageError(f"{name} is {shown(value)}; expected {expected or f'a whole number {limits}'}")
    return number


def real(
    name: str, value: Any, expected: str, *, least: float = -math.inf, above: float | None = None, finite: bool = True
) -> float:
    """Return any real number as a float, of at least `least`, or `above` a number; raises UsageError as `whole` does."""
    try:
        number = math.nan if isinstance(value, str | bytes) or is_truth(value) or value is np.ma.masked else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not least <= number or (above is not None and number <= above) or (finite and math.isinf(number)):
        raise UsageError(f"{name} is {shown(value)}; expected {expected}")
    return number


def truth(name: str, value: Any) -> bool:
    """Return True or False, of Python or NumPy, as a bool; raises UsageError for anything else."""
    if not is_truth(value):
        raise UsageError(f"{name} is {shown(value)}; expected True or False")
    return bool(value)


def one_of(name: str, value: Any, known: Collection[Any]) -> None:
    """Raise UsageError for a value that is none of `known`, also for one that cannot be hashed or compared."""
    if not any(value is option or (isinstance(value, str) and value == option) for option in known):
        raise UsageError(f"{name} is {shown(value)}; expected {' or '.join(map(repr, known))}")


def mapping(name: str, value: Any, example: str) -> Mapping[Any, Any]:
    """Return a mapping as it is; raises UsageError with an example for anything else."""
    if not isinstance(value, Mapping):
        raise UsageError(f"{name} is {shown(value)}; expected {example}")
    return value


def path(name: str, value: Any) -> str:
    """Return the text of a path; raise UsageError for a value that cannot name a file."""
    try:
        text = os.fspath(value)
        if isinstance(text, str) and b"\0" not in os.fsencode(text):
            return text
    except (TypeError, ValueError):  # a lone surrogate raises UnicodeEncodeError
        pass
    raise UsageError(f"{name} is {shown(value)}; expected a path")


def refuses_old_keywords(function: Function) -> Function:
    """Decorate a function so that a keyword of `OLD_KEYWORDS` raises a UsageError; its signature and help stay as they are."""

    @wraps(function)
    def checked(*arguments: Any, **keywords: Any) -> Any:
        for word in OLD_KEYWORDS.keys() & keywords.keys():
            raise UsageError(f"{word} is now called {OLD_KEYWORDS[word]}")
        return function(*arguments, **keywords)

    return cast("Function", checked)


def refuse_old_flags(arguments: Iterable[str]) -> None:
    """Raise a UsageError that names the new flag if an argument of a command line is an old one."""
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag[2:] in OLD_FLAGS:
            raise UsageError(f"{flag} is now called --{OLD_FLAGS[flag[2:]]}")
