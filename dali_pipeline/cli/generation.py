"""Options of `extract --generate`: how a model answers, when an answer is right, and what is kept of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dali_pipeline.errors import UsageError

MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Maximum number of tokens of an answer.")]
Temperature = Annotated[
    float, typer.Option(metavar="X", help="Temperature at which tokens are drawn; 0 takes the likeliest one.")
]
TopP = Annotated[float, typer.Option("--top-p", metavar="X", help="Share of probability that tokens are drawn from.")]
Samples = Annotated[
    int, typer.Option(metavar="K", help="Answers per question, which share its group; needs --temperature if above 1.")
]
GenerateSeed = Annotated[int, typer.Option("--seed", help="Seed of the draws.")]
Chat = Annotated[bool, typer.Option("--chat", help="Apply the tokenizer's chat template to each prompt.")]
Shots = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Examples to put in front of every prompt, in the form of --prompts; answers then end at the end of a line.",
        show_default=False,
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="Text at which an answer ends, repeatable; \\n is the end of a line. [default: that with --shots, else none]",
        show_default=False,
    ),
]
MatchRule = Annotated[
    str,
    typer.Option(
        metavar="contains|exact|rouge-l:X|none",
        help="When an answer is right, after SQuAD's normalisation; none gives no label.",
    ),
]
JudgeLabels = Annotated[
    str | None,
    typer.Option(
        metavar="FILE[:ID:LABEL]",
        help="Labels of a judge instead of --match: a CSV, JSONL or Parquet file with the answers' ids.",
        show_default=False,
    ),
]
LabelThreshold = Annotated[
    float | None, typer.Option(metavar="X", help="Give label 1 to scores of --labels-from below X.", show_default=False)
]
LabelAbove = Annotated[
    float | None, typer.Option(metavar="X", help="Give label 1 to scores of --labels-from above X.", show_default=False)
]
PositionsOption = Annotated[
    str,
    typer.Option(metavar="answer|last|last-prompt", help="Tokens whose hidden states are kept."),
]
AttentionFeatures = Annotated[
    bool,
    typer.Option(
        "--attention-features", help="Keep the lookback ratio and the largest Laplacian eigenvalues of every attention head."
    ),
]


def parse_stops(texts: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the texts, in which `\\n` and `\\t` stand for the end of a line and a tabulator; None if none are given."""
    return tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in texts) if texts else None


def refuse_generation(given: Mapping[str, Any], defaults: Any) -> None:
    """Raise UsageError if an option of generation is given without --generate."""
    name = next((name for name, value in given.items() if value != getattr(defaults, name)), None)
    if name is not None:
        raise UsageError(f"--{name.replace('_', '-')} is about answers of the model's own; give --generate too")
