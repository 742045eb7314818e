"""The command line: `python -m dali_pipeline convert|verify|inspect|extract|doctor|versions`; imports heavy modules late."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from dali_pipeline.cli.arguments import FilesRoot, SetArgument, parse_blocks, parse_num_workers, parse_size
from dali_pipeline.cli.checkup import doctor_command
from dali_pipeline.cli.generation import (
    AttentionFeatures,
    Chat,
    GenerateSeed,
    JudgeLabels,
    LabelAbove,
    LabelThreshold,
    MatchRule,
    MaxNewTokens,
    PositionsOption,
    Samples,
    Shots,
    Stop,
    Temperature,
    TopP,
    parse_stops,
    refuse_generation,
)
from dali_pipeline.cli.inspection import inspect_command
from dali_pipeline.cli.versions import versions_command
from dali_pipeline.errors import PipelineError, UsageError, needs_extra
from dali_pipeline.runtime.checks import refuse_old_flags
from dali_pipeline.runtime.numpyversion import check_numpy
from dali_pipeline.runtime.outside import Terminated, broken_pipes, check_outside, drained, reason_of, say, terminable
from dali_pipeline.runtime.threads import wait_passively
from dali_pipeline.writing.split import SplitRule


def new_app(**options: Any) -> typer.Typer:
    """Return a command line with -h and --help in plain text, which is not wrapped if it is piped."""
    context = {"help_option_names": ["-h", "--help"]} | (
        {} if sys.stdout and sys.stdout.isatty() else {"terminal_width": 10_000}
    )
    return typer.Typer(
        add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=context, **options
    )


app = new_app(help="Streams sequences and graphs from data sets far larger than memory.", no_args_is_help=True)

SplitOption = Annotated[
    str, typer.Option("--split", metavar="TRAIN/VAL/TEST", help="Shares of the splits in per cent; groups stay whole.")
]
SplitSeed = Annotated[int, typer.Option("--split-seed", help="Seed of the random assignment to splits.")]
EngineOption = Annotated[
    str,
    typer.Option(
        metavar="local|ray",
        help="Where to run: local, or a Ray cluster (at RAY_ADDRESS, or on this machine) whose nodes all see the folders.",
    ),
]
ShardSize = Annotated[
    str, typer.Option("--shard-size", metavar="SIZE", help="Maximum size of a shard, for example 64MiB or 4KiB.")
]


@app.command("convert")
def convert_command(
    src: Annotated[
        str,
        typer.Argument(
            help="Folder or URL of .safetensors, .npy, .npz, .pt, .ckpt, .pkl, .h5, .parquet, .arrow or .memmap; or one file.",
            show_default=False,
        ),
    ],
    dst: Annotated[
        str | None,
        typer.Argument(help="Folder or URL of the data set, new or unfinished; none with --dry-run.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Write nothing; print what lies in SRC, how it is taken, what is left out. Exits 0 if it would be, else 2.",
        ),
    ] = False,
    sequence: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="KEY of the sequences: a key (hidden_states), a dotted path (answer.embedding), [0] of a tuple, the stem of a "
            ".npy file; {layer} stacks layers (blocks.{layer}.hook_resid_post), {row} orders files (layer_{layer}_{row}.pt).",
            show_default=False,
        ),
    ] = None,
    label: Annotated[
        str | None, typer.Option(metavar="KEY", help="KEY of the labels, for example y or NAME_labels.", show_default=False)
    ] = None,
    id_: Annotated[
        str | None,
        typer.Option(
            "--id", metavar="KEY", help="KEY of the ids. [default: the file's stem, with the row]", show_default=False
        ),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="KEY of groups, which stay in one split, for example question_id.", show_default=False
        ),
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LEVEL.NAME=KEY",
            help="A further field, repeatable: step.token_ids=token_ids has a row per step, record.score=bleurt one in all.",
            show_default=False,
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="KEY of the number of real steps of each padded sequence.", show_default=False),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="KEY of a mask of real steps, for example attention_mask.", show_default=False),
    ] = None,
    axes: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            help="Axes of one record in the file's order, such as token,layer,feature or channel,time. The one named token, "
            "step or time becomes the steps, otherwise the first one.",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="record-per-file|stacked",
            help="Whether a file holds one record, or records along the first axis. [default: as the shapes say]",
            show_default=False,
        ),
    ] = None,
    labels_from: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[:ID:LABEL]",
            help="Labels in a CSV, JSONL, .npy or Parquet file: labels.csv:id:label by id, labels.csv::label by order.",
            show_default=False,
        ),
    ] = None,
    label_kind: Annotated[
        str | None,
        typer.Option(
            metavar="class|multilabel|value|none",
            help="Kind of label. [default: class for whole numbers and texts, otherwise value]",
            show_default=False,
        ),
    ] = None,
    label_threshold: Annotated[
        float | None, typer.Option(metavar="X", help="Give label 1 below X, and 0 otherwise.", show_default=False)
    ] = None,
    label_above: Annotated[
        float | None, typer.Option(metavar="X", help="Give label 1 above X, and 0 otherwise.", show_default=False)
    ] = None,
    append: Annotated[
        bool,
        typer.Option(
            "--append",
            help="Add the records of SRC to the finished data set DST, by its own splits; new shards, old ones untouched.",
        ),
    ] = False,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place",
            help="Leave the values where they lie, in .safetensors, .npy or raw files; the data set refers to them.",
        ),
    ] = False,
    files_root: FilesRoot = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="File with these flags by name, such as `sequence: hidden_states`; flags here win over it.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="TRAIN/VAL/TEST",
            help="Shares of the splits in per cent. [default: the splits of SRC if it has any, otherwise 70/15/15]",
            show_default=False,
        ),
    ] = None,
    split_seed: Annotated[
        int | None, typer.Option(help="Seed of the random assignment to splits. [default: 0]", show_default=False)
    ] = None,
    split_by: Annotated[
        str,
        typer.Option(metavar="group|file", help="Unit that is assigned to a split as a whole: a group of records, or a file."),
    ] = "group",
    shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Maximum size of a shard, for example 64MiB. [default: 256MiB, or with --in-place 1GiB of values]",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Stored type: float16, bfloat16, float32 or int8; or one per field, FIELD=TYPE,… [default: the type in SRC]",
        ),
    ] = None,
    by_layer: Annotated[
        bool | None,
        typer.Option(
            "--by-layer/--by-record",
            help="Store sequences layer by layer (faster if few layers are read) or record by record. [default: as in SRC]",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Layers (0: embeddings, l: block l) or time steps to keep, for example 12:20 or 8,16. [default: all]",
        ),
    ] = None,
    num_workers: Annotated[
        str, typer.Option(metavar="auto|N", help="Number of processes with --engine local; auto is one per core.")
    ] = "auto",
    engine: EngineOption = "local",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out every file that cannot be converted, and print why.")
    ] = False,
    scores: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Scores by question_id, from which .pkl traces get their labels.")
    ] = None,
    score_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of --scores to use. [default: the only one]", show_default=False)
    ] = None,
    score_threshold: Annotated[float, typer.Option(help="Scores below this value get label 1.")] = 0.5,
    attn_threshold: Annotated[
        float, typer.Option(help="Mean attention above which two tokens of a .pkl trace get an edge.")
    ] = 0.01,
) -> None:
    """Convert files to a data set. If it is stopped, the same command continues where it stopped.

    \b
    Recognised without flags: hidden states of vLLM, SpecForge, SAELens, honest_llama, HaloScope, dictionary_learning; PyG
    graphs; lstm_solo/*.pt and gnn/*.pt; traces in *.pkl; *.npz and tables with the names in docs/your-data.md.
    Everything else by KEYs; start with --dry-run, which names them.
    Examples:
      python -m dali_pipeline convert hidden_states --dry-run
      python -m dali_pipeline convert eeg data/eeg --sequence X --label y --axes channel,time
      python -m dali_pipeline convert acts data/acts --sequence 'layer_{layer}_{row}.pt' --labels-from cities.csv::label
      python -m dali_pipeline convert states.npz data/s --sequence acts --labels-from scores.csv:id:bleurt --label-threshold 0.5
      python -m dali_pipeline convert vllm_hidden_states data/vllm --in-place
      python -m dali_pipeline convert --append more_npz data/traces
      python -m dali_pipeline convert preprocessed_data data/traces --split 80/10/10
      python -m dali_pipeline convert raw_traces data/traces --scores scores.csv --score-column bleurt
      python -m dali_pipeline convert preprocessed_data s3://bucket/traces
      RAY_ADDRESS=head:6379 python -m dali_pipeline convert /shared/raw /shared/traces --engine ray
      python -m dali_pipeline convert data/traces data/traces8 --dtype sequence=int8,x=bfloat16
      python -m dali_pipeline convert data/answers data/judged --labels-from judged.csv:id:score --label-threshold 0.5
    """
    from dali_pipeline.format.layers import parse_layers
    from dali_pipeline.ingest.config import ConvertConfig
    from dali_pipeline.ingest.convert import convert_to, gigabytes
    from dali_pipeline.ingest.layouts.known import NotUnderstood
    from dali_pipeline.ingest.layouts.recipe import Recipe, parse_axes, parse_fields, read_recipe
    from dali_pipeline.ingest.readers.traces import TraceOptions, read_scores
    from dali_pipeline.storage.stores import is_url
    from dali_pipeline.tools.describe import describe_rounding, summary

    if scores is None and score_column is not None:
        raise UsageError("--score-column names a column of --scores; give both")
    if append and dry_run:
        raise UsageError("--dry-run looks at SRC alone, whatever it is added to; leave --append out")
    if dst is None and not dry_run:
        raise UsageError("Missing argument 'DST', the folder of the data set; --dry-run needs none")
    keys = Recipe(
        sequence=sequence,
        label=label,
        id=id_,
        group=group,
        fields=parse_fields(field or ()),
        lengths=lengths,
        mask=mask,
        axes=parse_axes(axes),
        layout=layout,  # type: ignore[arg-type]
        labels_from=labels_from,
        label_kind=label_kind,  # type: ignore[arg-type]
        label_threshold=label_threshold,
        label_above=label_above,
    )
    config = ConvertConfig(
        split=None if split is None and split_seed is None else SplitRule.parse(split or str(SplitRule()), split_seed or 0),
        split_by=split_by,  # type: ignore[arg-type]
        shard_bytes=parse_size(shard_size or ("1GiB" if in_place else "256MiB")),
        dtype=dtype,
        by_layer=by_layer,
        layers=parse_layers(layers),
        num_workers=parse_num_workers(num_workers),
        skip_bad=skip_bad,
        engine=engine,  # type: ignore[arg-type]
        traces=TraceOptions(
            scores=None if scores is None else read_scores(scores, score_column),
            score_threshold=score_threshold,
            attention_threshold=attn_threshold,
        ),
        recipe=keys if recipe is None else keys.over(read_recipe(recipe)),
        in_place=in_place,
        files_root=files_root,
    )
    if dry_run:
        from dali_pipeline.ingest.layouts.dryrun import dry_run as look

        lines, is_taken = look(src, dst, config)
        print("\n".join(lines))
        raise typer.Exit(0 if is_taken else 2)
    assert dst is not None
    try:
        with _going_on():
            data = convert_to(src, dst, config, adds=append)
    except NotUnderstood as error:
        if is_url(src):
            raise
        from dali_pipeline.ingest.layouts.dryrun import dry_run as look

        say("\n".join([f"dali_pipeline: {error}", *look(src, dst, config)[0]]))
        raise typer.Exit(2) from None
    print(f"{data.root}: {summary(data)}, {gigabytes(data.nbytes)}")
    if rounding := describe_rounding(data):
        print(rounding)
    _print_facts(data.manifest.source)


def _print_facts(source: Mapping[str, Any]) -> None:
    """Print what a manifest's `source` says about labels, splits and files that were left out."""
    if source.get("in_one_half"):
        print(f"{source['in_one_half']:,} records are in one half alone")
    if "labels" in source:
        print(source["labels"])
    if "moved" in source:
        print(f"{source['moved']:,} groups are in files of several splits, and went with their first file")
    for reason in source.get("left_out", {}).values():
        print(f"left out: {reason}")


@app.command("verify")
def verify_command(
    dst: SetArgument,
    quick: Annotated[bool, typer.Option("--quick", help="Check only the structure: headers, offsets, names, labels.")] = False,
    files_root: FilesRoot = None,
) -> None:
    """Check every byte of a data set. Exits 0 if it is sound, 1 if it is damaged, 2 if there is no data set.

    \b
    Prints one line per damage: the file, the field, what is wrong.
    Examples:
      python -m dali_pipeline verify data/traces
      python -m dali_pipeline verify s3://bucket/traces --quick
    """
    from dali_pipeline.tools.verify import verify

    report = verify(dst, quick=quick, files_root=files_root)
    for damage in report.damages:
        print(damage)
    print(report.summary)
    raise typer.Exit(1 if report.damages else 0)


@app.command("extract")
def extract_command(
    out: Annotated[Path, typer.Argument(help="Folder of the data set, new or unfinished.", show_default=False)],
    model: Annotated[
        str,
        typer.Option(
            metavar="PATH_OR_NAME", help="Causal Hugging Face model: a folder, or a name on the Hub.", show_default=False
        ),
    ],
    prompts: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="CSV file with the columns prompt and label, and optionally id and group; with --generate CSV file or JSON "
            "lines with prompt and answers (a text, or a list of texts), and optionally id and group.",
            show_default=False,
        ),
    ],
    layers: Annotated[
        str,
        typer.Option(metavar="LIST", help="Layers whose hidden states become sequences: all, a list 8,16,24, or a range 8:25."),
    ] = "all",
    graph_layers: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Layers whose attention becomes graphs: all (that have attention), none, a list 8,16,24, or a range 8:25.",
        ),
    ] = "all",
    attention_threshold: Annotated[
        float, typer.Option(help="Mean attention over heads above which two tokens get an edge.")
    ] = 0.01,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="Stored type: float16 or float32.")] = "float16",
    batch_tokens: Annotated[int, typer.Option(help="Maximum number of tokens per forward pass, with padding.")] = 1024,
    device: Annotated[str, typer.Option(help="Device of the model: auto, cpu, cuda or cuda:N.")] = "auto",
    truncate: Annotated[
        bool,
        typer.Option("--truncate", help="Cut prompts longer than the model's context at their start, instead of stopping."),
    ] = False,
    generate: Annotated[
        bool,
        typer.Option(
            "--generate",
            help="Let the model answer the prompts, keep the answers' traces, and label 1 what matches no reference.",
        ),
    ] = False,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    samples: Samples = 1,
    seed: GenerateSeed = 0,
    chat: Chat = False,
    shots: Shots = None,
    stop: Stop = None,
    match: MatchRule = "contains",
    labels_from: JudgeLabels = None,
    label_threshold: LabelThreshold = None,
    label_above: LabelAbove = None,
    positions: PositionsOption = "answer",
    attention_features: AttentionFeatures = False,
    engine: EngineOption = "local",
    split: SplitOption = "70/15/15",
    split_seed: SplitSeed = 0,
    shard_size: ShardSize = "256MiB",
) -> None:
    """Run prompts through a language model and store its traces. If it is stopped, the same command continues where it stopped.

    \b
    Layers are numbered as in transformers: 0 is the embeddings, l is the output of block l.
    Examples:
      python -m dali_pipeline extract --model ./SmolLM2-135M --prompts questions.csv data/traces
      python -m dali_pipeline extract --model ./SmolLM2-135M --prompts questions.csv data/traces --graph-layers 8,16,24
      python -m dali_pipeline extract --generate --model ./SmolLM2-135M --prompts sciq.csv --shots shots.csv data/answers
      python -m dali_pipeline extract --generate --chat --attention-features --model ./Llama-8B --prompts nq.jsonl data/nq
      python -m dali_pipeline extract --generate --temperature 0.7 --samples 10 --model ./Llama-8B --prompts nq.jsonl data/ten
      python -m dali_pipeline extract --generate --match rouge-l:0.3 --positions last --model ./Llama-8B --prompts q.csv data/q
      python -m dali_pipeline extract --generate --match none --model ./Llama-8B --prompts open.csv data/unjudged
      python -m dali_pipeline extract --generate --labels-from judged.csv:id:score --label-threshold 0.5 --model ./Llama-8B \\
        --prompts open.csv data/judged
    """
    from dali_pipeline.ingest.convert import gigabytes

    with needs_extra("extract", "extract"):
        from dali_pipeline.ingest.extract.extract import extract
        from dali_pipeline.ingest.extract.generate import GenerateConfig
        from dali_pipeline.ingest.extract.matching import Match
        from dali_pipeline.ingest.extract.tracer import ExtractConfig
    from dali_pipeline.tools.describe import summary

    generation: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "samples": samples,
        "seed": seed,
        "chat": chat,
        "shots": shots,
        "stop": parse_stops(stop),
        "match": Match.parse(match),
        "labels_from": labels_from,
        "label_threshold": label_threshold,
        "label_above": label_above,
        "positions": positions,
        "attention_features": attention_features,
    }
    if not generate:
        refuse_generation(generation, GenerateConfig())
    config = ExtractConfig(
        generate=GenerateConfig(**generation) if generate else None,
        layers=parse_blocks(layers),
        graph_layers=parse_blocks(graph_layers),
        truncate=truncate,
        attention_threshold=attention_threshold,
        dtype=dtype,
        batch_tokens=batch_tokens,
        shard_bytes=parse_size(shard_size),
        split=SplitRule.parse(split, split_seed),
    )
    with _going_on():
        data = extract(model, prompts, out, config, device, engine)  # type: ignore[arg-type]
    print(f"{out}: {summary(data)}, {gigabytes(data.nbytes)}")
    _print_facts(data.manifest.source)


app.command("inspect")(inspect_command)
app.command("doctor")(doctor_command)


@app.command("predict", hidden=True, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def predict_command() -> None:
    """Refuse, and name the script that replaced this command."""
    raise UsageError("predict is a script of its own, beside train.py: python predict.py --checkpoint FILE.pt --data SET")


app.command("versions")(versions_command)


@contextmanager
def _going_on() -> Iterator[None]:
    """Print, if Ctrl-C or SIGTERM ends the block, that the same command continues the job."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        say("dali_pipeline: stopped; the same command goes on from what is final")
        raise typer.Exit(stop.exit_code if isinstance(stop, Terminated) else 130) from None


def run(application: typer.Typer, name: str) -> int:
    """Run a command line and return its exit code.

    The code is 2, with one sentence on standard error, for errors that the user can correct and for a standard output that
    cannot be written; 130 for Ctrl-C; 143 for SIGTERM; 141 if the reader of a pipe is gone.
    """
    try:
        check_outside()
        check_numpy()
        refuse_old_flags(sys.argv[1:])
        with terminable(), broken_pipes():
            code = application(prog_name=name, standalone_mode=False)
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
    except typer.TyperException as error:
        message = error.format_message()
        say(message if "\n" in message else f"{name}: {message}")  # the help, which has several lines, if no command is given
    except PipelineError as error:
        say(f"{name}: {error}")
    except UnicodeEncodeError as error:  # a path, because all other texts were checked
        say(f"{name}: {error.object!r} cannot be written in {error.encoding} ({error.reason}); expected a path in UTF-8")
    except BrokenPipeError:  # for example `head`; the rest of the output is dropped
        drained(sys.stdout)
        return 128 + signal.SIGPIPE
    except OSError as error:
        say(f"{name}: {reason_of(error)}")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Terminated as stop:
        return stop.exit_code
    finally:
        drained(sys.stdout)
    return 2


def main() -> None:
    """Run the command line."""
    wait_passively()
    sys.exit(run(app, "dali_pipeline"))
