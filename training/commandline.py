"""Helpers for the command line of train.py: grouped help, and --config, a YAML file of flags."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
import yaml
from typer.core import TyperCommand

from dali_pipeline import UsageError
from dali_pipeline.runtime.checks import refuse_old_flags

ABOUT_FILES = {"config", "print-config", "help"}


class GroupedCommand(TyperCommand):
    """A command whose plain help groups the options by their `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section per group, in the order in which the groups first occur."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                groups.setdefault(getattr(param, "rich_help_panel", None) or "Help", []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


def flag(group: str, text: str, example: str, *names: str, **settings: Any) -> Any:
    """Return an option of a group, whose help ends with an example."""
    return typer.Option(*names, rich_help_panel=group, help=f"{text} E.g. {example}", **settings)


def take_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Use the values in a YAML file as defaults of the flags, so that the command line wins; may raise UsageError."""
    if path is None:
        return None
    try:
        # read every value as text, because YAML would read 12:20 as the number 740
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(
            f"{path} cannot be read as YAML ({str(error).splitlines()[0]}); expected lines such as lr: 0.001"
        ) from None
    if not isinstance(settings, Mapping):
        raise UsageError(f"{path} holds no names and values; expected lines such as lr: 0.001")
    known = _names(ctx)
    values = {str(key).replace("_", "-"): value for key, value in settings.items()}
    refuse_old_flags(f"--{name}" for name in values)
    if unknown := sorted(values.keys() - known.keys()):
        raise UsageError(f"{path} names {unknown[0]!r}, which is no flag; expected some of {', '.join(known)}")
    ctx.default_map = {known[name]: _text(value) for name, value in values.items() if value not in ("", "null", "~")}
    return path


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _names(ctx: typer.Context) -> dict[str, str]:
    """Return the names of the parameters by flag, without dashes."""
    names = {param.opts[0].lstrip("-"): str(param.name) for param in ctx.command.params}
    return {flag: name for flag, name in names.items() if flag not in ABOUT_FILES}


def print_config(ctx: typer.Context) -> None:
    """Print the values of all flags in the form that --config reads."""
    values = {flag: ctx.params[name] for flag, name in _names(ctx).items()}
    given = {flag: str(value) if isinstance(value, Path) else value for flag, value in values.items() if value is not None}
    sys.stdout.write(yaml.safe_dump(given, sort_keys=False))
