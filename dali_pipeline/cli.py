"""The command line: `python -m dali_pipeline convert|extract`. Heavy imports wait until a command runs."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dali_pipeline.schema import PipelineError, UsageError
from dali_pipeline.split import Split

# piped help is not folded to a terminal's width
CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"]} | ({} if sys.stdout.isatty() else {"terminal_width": 10_000})
app = typer.Typer(
    name="dali_pipeline",
    help="Streams sequences and graphs from data sets far larger than memory.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)

SplitOption = Annotated[str, typer.Option("--split", metavar="TRAIN/VAL/TEST", help="Shares in per cent, dealt by group.")]
SplitSeed = Annotated[int, typer.Option("--split-seed", help="Another seed, another split.")]
ShardSize = Annotated[str, typer.Option("--shard-size", metavar="SIZE", help="Bytes a shard at most, such as 64MiB or 4KiB.")]


@app.command("convert")
def convert_command(
    src: Annotated[Path, typer.Argument(help="Folder with lstm_solo/*.pt, gnn/*.pt, or both.", show_default=False)],
    dst: Annotated[Path, typer.Argument(help="Folder of the data set, new or unfinished.", show_default=False)],
    split: SplitOption = "70/15/15",
    split_seed: SplitSeed = 0,
    shard_size: ShardSize = "256MiB",
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Stored type of values: float16 or float32. [default: as they come]")
    ] = None,
) -> None:
    """Turn somebody's files into a data set, once. Stopped, the same command goes on where it was.

    \b
    Examples:
      python -m dali_pipeline convert preprocessed_data data/traces
      python -m dali_pipeline convert preprocessed_data data/traces --split 80/10/10 --shard-size 64MiB
    """
    from dali_pipeline.ingest.convert import convert, gigabytes

    if dtype not in (None, "float16", "float32"):
        raise UsageError(f"dtype is {dtype!r}; expected float16 or float32")
    data = convert(src, dst, split=Split.parse(split, split_seed), shard_bytes=parse_size(shard_size), dtype=dtype)
    alone = data.manifest.source.get("in_one_half", 0)
    print(f"{dst}: {_summary(data)}, {gigabytes(data.nbytes)}" + (f"; {alone} records are in one half alone" if alone else ""))


@app.command("extract")
def extract_command(
    out: Annotated[Path, typer.Argument(help="Folder of the data set, new or unfinished.", show_default=False)],
    model: Annotated[str, typer.Option(metavar="PATH_OR_NAME", help="A causal Hugging Face model.", show_default=False)],
    prompts: Annotated[
        Path, typer.Option(metavar="FILE.csv", help="Columns prompt and label; perhaps id and group.", show_default=False)
    ],
    layers: Annotated[
        str, typer.Option(metavar="LIST", help="Hidden states of the sequences: all, a list 8,16,24, or a range 8:25.")
    ] = "all",
    graph_layers: Annotated[
        str, typer.Option(metavar="LIST", help="Layers that become graphs: all, none, or as --layers.")
    ] = "all",
    attention_threshold: Annotated[float, typer.Option(help="Mean attention over heads above which an edge runs.")] = 0.01,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="Stored type: float16 or float32.")] = "float16",
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a forward pass, padding counted.")] = 1024,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    split: SplitOption = "70/15/15",
    split_seed: SplitSeed = 0,
    shard_size: ShardSize = "256MiB",
) -> None:
    """Run prompts through a language model and keep its traces. Stopped, the same command goes on where it was.

    \b
    Layers are counted as transformers does: 0 is the embeddings, l the output of block l.
    Examples:
      python -m dali_pipeline extract --model ./SmolLM2-135M --prompts questions.csv data/traces
      python -m dali_pipeline extract --model ./SmolLM2-135M --prompts questions.csv data/traces --graph-layers 8,16,24
    """
    from dali_pipeline.ingest.convert import gigabytes
    from dali_pipeline.ingest.extract import ExtractConfig, extract

    config = ExtractConfig(
        layers=parse_layers(layers),
        graph_layers=parse_layers(graph_layers),
        attention_threshold=attention_threshold,
        dtype=dtype,
        batch_tokens=batch_tokens,
        shard_bytes=parse_size(shard_size),
        split=Split.parse(split, split_seed),
    )
    data = extract(model, prompts, out, config, device)
    print(f"{out}: {_summary(data)}, {gigabytes(data.nbytes)}")


def parse_size(text: str) -> int:
    """`4KiB`, `256MiB`, `1GB`, `4096`: bytes. KiB is 1024, KB is 1000."""
    units = {"": 1} | {
        f"{prefix}{unit}": base**power for unit, base in (("iB", 1024), ("B", 1000)) for power, prefix in enumerate("KMGT", 1)
    }
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found.group(2) not in units or float(found.group(1)) * units[found.group(2)] < 1:
        raise UsageError(f"size is {text!r}; expected a number of bytes such as 4KiB, 256MiB or 1GB")
    return int(float(found.group(1)) * units[found.group(2)])


def parse_layers(text: str) -> tuple[int, ...] | None:
    """`all` is None, `none` is (), `8,16,24` and `8:25` are what they say."""
    if text in ("all", "none"):
        return None if text == "all" else ()
    try:
        if ":" in text:
            begin, end = (int(part) for part in text.split(":"))
            return tuple(range(begin, end))
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"layers are {text!r}; expected all, a list such as 8,16,24, or a range such as 8:25") from None


def _summary(data: Any) -> str:
    parts = []
    for kind in data.schema.kinds:
        counts = [f"{data.num_records(split, kind):,} {split}" for split in data.splits]
        parts.append(f"{kind} {', '.join(counts)}")
    return "; ".join(parts)


def run(application: typer.Typer, name: str) -> int:
    """Runs a command line and returns its exit code.

    2 for what the user can mend, with one sentence on standard error; 130 for Ctrl-C; 141 where the reader of a pipe went.
    """
    try:
        code = application(prog_name=name, standalone_mode=False)
    except typer.TyperException as error:
        message = error.format_message()
        print(message if "\n" in message else f"{name}: {message}", file=sys.stderr)  # several lines: no command, so the help
        return 2
    except PipelineError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as `head` leaves one; what is still to be flushed goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print(f"{name}: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return code if isinstance(code, int) else 0


def main() -> None:
    """The entry point."""
    sys.exit(run(app, "dali_pipeline"))
