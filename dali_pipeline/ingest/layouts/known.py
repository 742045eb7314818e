"""Recognise the layouts of public projects from their first file, and complete a recipe by what is recognised."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dali_pipeline.errors import FormatError, PipelineError, UsageError
from dali_pipeline.ingest.containers.base import TEXT, Leaf, suffix_of
from dali_pipeline.ingest.layouts.graphs import graph_files, graph_plan, is_graph
from dali_pipeline.ingest.layouts.opening import opened
from dali_pipeline.ingest.layouts.parts import stem_of
from dali_pipeline.ingest.layouts.plan import Plan
from dali_pipeline.ingest.layouts.recipe import Recipe
from dali_pipeline.ingest.layouts.resolve import BY_FLAGS, TABLES, by_suffix, candidates, first_leaves, make_plan

LABEL = re.compile(r"label|target|^y$|class|correct|score|accuracy", re.IGNORECASE)
HOOK = re.compile(r"(blocks|model\.layers|layers)\.\d+\.[\w.]+")


class NotUnderstood(UsageError):
    """A folder with files that no reader takes without flags."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """A layout that was recognised.

    Attributes:
        what: Its name.
        recipe: How it is taken.
        others: KEYs that could be the sequence instead.
    """

    what: str
    recipe: Recipe
    others: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Look:
    """What detectors look at: the files of one suffix, and the leaves of the first that can be opened."""

    root: Path
    suffix: str
    files: Sequence[Path]
    leaves: dict[str, Leaf]
    records: bool


def is_of_today(what: str, path: Path) -> bool:
    """Return whether a file has the layout that the reader of its format asks for, judged by its keys.

    True for a file that cannot be opened: the reader says why.
    """
    suffix = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if suffix not in ("npz", "parquet", "arrow", "pkl") or "lstm_solo" in what:
        return True
    try:
        container = opened(path)
    except (PipelineError, ImportError):
        return True
    try:
        leaves = {leaf.key: leaf for leaf in container.leaves()}
        keys = {key.split(".")[0].split("[")[0] for key in leaves}
        if suffix == "npz":
            return "labels" in keys and ("sequences" in keys or {"values", "offsets"} <= keys)
        if suffix == "pkl":
            empty = container.records is not None and not len(container.records)
            return empty or bool({"question_id", "hidden_states", "attentions"} & keys)
        graphs = "x" in keys or "node_feat" in keys
        sequences = {"sequence", "sequences", "values", "hidden_states"} & keys
        return bool({"label", "labels", "y"} & keys) and (bool(sequences) or graphs)
    except PipelineError:
        return True
    finally:
        container.close()


def plan_for(root: Path, files: Sequence[Path], recipe: Recipe, *, skip_bad: bool = False) -> Plan | None:
    """Return the plan that flags, or a layout that is recognised, give; None if there are no files that could be taken.

    Raises:
        NotUnderstood: There are such files, no layout is recognised, and no flag says what to take.
        UsageError, FormatError, DataError: See `make_plan`.
    """
    usable = candidates(root, files)
    if not usable:
        return None
    graphs = None if recipe.sequence is not None else _graphs(root, usable)
    if graphs is not None:
        graphs_taken = graph_plan(root, graphs, recipe, "graphs of PyG")
        return replace(graphs_taken, notices=("taken as graphs of PyG, one per record", *graphs_taken.notices))
    known: Known | None = recognise(root, usable)
    if known is not None and recipe.sequence is not None and recipe.sequence not in (known.recipe.sequence, *known.others):
        known = None
    if known is None:
        if not recipe:
            raise not_understood(root, usable)
        return make_plan(root, files, recipe, BY_FLAGS, skip_bad=skip_bad)
    completed = recipe.over(known.recipe)
    plan = make_plan(root, files, completed, known.what, skip_bad=skip_bad)
    others = [key for key in (known.recipe.sequence, *known.others) if key is not None and key != completed.sequence]
    told = [f"taken as {known.what}"]
    if others:
        told.append(f"the sequence is {completed.sequence}; --sequence '{others[0]}' takes the other one, {', '.join(others)}")
    return replace(plan, notices=(*told, *plan.notices))


def _graphs(root: Path, usable: Sequence[Path]) -> list[Path] | None:
    """Return the files of graphs, or None if the first file holds none."""
    for suffix, files in by_suffix(graph_files(usable)).items():
        if suffix == ".csv":  # rows of numbers and texts
            continue
        with suppress(FormatError):
            _, leaves, _ = first_leaves(files)
            if is_graph({leaf.key: leaf for leaf in leaves}):
                return files
    return None


def not_understood(root: Path, usable: Sequence[Path]) -> NotUnderstood:
    """Return the error for files of which no layout is recognised, with the nearest command to try."""
    return NotUnderstood(
        f"{root} holds {len(usable):,} {'file' if len(usable) == 1 else 'files'} of arrays in a layout that is not recognised; "
        f"try: convert {root} DST {suggested(root, usable)}, or see what lies there: convert {root} --dry-run"
    )


def suggested(root: Path, usable: Sequence[Path]) -> str:
    """Return flags to try, of keys and files that exist."""
    files = next(iter(by_suffix(usable).values()))
    try:
        path, leaves, records = first_leaves(files)
    except FormatError:
        return "--sequence KEY --label KEY"
    numbers = [leaf for leaf in leaves if leaf.dtype not in ("object", TEXT)]
    arrays = sorted((leaf for leaf in numbers if leaf.shape), key=lambda leaf: (-len(leaf.shape), "float" not in leaf.dtype))
    flags = []
    if arrays:
        flags += ["--sequence", arrays[0].key or _numbered_name(path, files)]
    label = next((leaf.key for leaf in leaves if leaf not in arrays[:1] and LABEL.search(leaf.key)), None)
    stem = next(
        (stem_of(other.name) for other in files if arrays[:1] and not arrays[0].key and _is_label_file(path, other)), None
    )
    label = label or stem
    flags += ["--label", label] if label is not None else _label_beside(usable)
    scalar = any(leaf.key == label and leaf.shape == () for leaf in leaves)
    if len(files) > 1 and not records and scalar:
        flags += ["--layout", "record-per-file"]
    return shlex.join(flags)


def _numbered_name(path: Path, files: Sequence[Path]) -> str:
    """Return the stem of a file, with {layer} and {row} for numbers in which other files of its folder differ."""
    stem = stem_of(path.name)
    others = [stem_of(other.name) for other in files if other != path]
    parts = re.split(r"(\d+)", stem)
    for number in range(1, len(parts), 2):
        before, after = "".join(parts[:number]), "".join(parts[number + 1 :])
        varying = re.compile(
            re.sub(r"\\\{\w+\\\}|\d+", r"\\d+", re.escape(before)) + r"(\d+)" + re.sub(r"\d+", r"\\d+", re.escape(after))
        )
        found = {match[1] for other in others if (match := varying.fullmatch(other))} - {parts[number]}
        is_layer = re.search(r"(layer|block)s?[._-]?$", before) is not None
        name = "{layer}" if is_layer else "{row}"
        if found and name not in before:
            parts[number] = name
    return "".join(parts)


def _is_label_file(path: Path, other: Path) -> bool:
    """Return whether another file of the same format is called like labels, and the first one is not."""
    return other != path and LABEL.search(stem_of(other.name)) is not None and LABEL.search(stem_of(path.name)) is None


def _label_beside(usable: Sequence[Path]) -> list[str]:
    """Return flags for the labels of a table of text, if there is one with such a column; otherwise for none."""
    for path in (path for path in usable if suffix_of(path.name) in TABLES):
        with suppress(FormatError):
            _, leaves, _ = first_leaves([path])
            column = next((leaf.key for leaf in leaves if LABEL.search(leaf.key)), None)
            if column is not None:
                return ["--labels-from", f"{path}::{column}"]
    return ["--label-kind", "none"]


def recognise(root: Path, usable: Sequence[Path]) -> Known | None:
    """Return the first layout that the files have, or None."""
    for suffix, files in by_suffix(usable).items():
        if suffix in TABLES:  # no layout here keeps its values in text
            continue
        with suppress(FormatError):
            _, leaves, records = first_leaves(files)
            look = Look(root=root, suffix=suffix, files=files, leaves={leaf.key: leaf for leaf in leaves}, records=records)
            for detector in DETECTORS:
                if (known := detector(look)) is not None:
                    return known
    return None


def _vllm(look: Look) -> Known | None:
    """Recognise one prompt per file, as the hidden-state connector of vLLM writes them."""
    states, ids = look.leaves.get("hidden_states"), look.leaves.get("token_ids")
    if (
        look.suffix != ".safetensors"
        or states is None
        or ids is None
        or len(states.shape) != 3
        or ids.shape != states.shape[:1]
    ):
        return None
    recipe = Recipe(
        sequence="hidden_states",
        axes=("token", "layer", "feature"),
        fields=_fields(look, {"step.token_ids": "token_ids", "step.loss_mask": "loss_mask"}),
        layout="record-per-file",
        label_kind=None if "label" in look.leaves else "none",
    )
    return Known(what="hidden states of vLLM, one prompt per .safetensors", recipe=recipe)


def _specforge(look: Look) -> Known | None:
    """Recognise one sample per file, as SpecForge writes them."""
    if look.suffix not in (".ckpt", ".pt") or look.records or not {"hidden_state", "input_ids"} <= look.leaves.keys():
        return None
    states = look.leaves["hidden_state"]
    if len(states.shape) not in (2, 3):
        return None
    recipe = Recipe(
        sequence="hidden_state",
        axes=("token", "feature"),
        fields=_fields(look, {"step.input_ids": "input_ids", "step.loss_mask": "loss_mask"}),
        layout="record-per-file",
        label_kind="none",
    )
    others = ("aux_hidden_state",) if "aux_hidden_state" in look.leaves else ()
    return Known(what="samples of SpecForge, one per file", recipe=recipe, others=others)


def _saelens(look: Look) -> Known | None:
    """Recognise activations in a Hugging Face folder, in columns named by their hooks, as SAELens writes them."""
    hooks = [key for key in look.leaves if HOOK.fullmatch(key)]
    if look.suffix not in (".arrow", ".parquet") or not hooks:
        return None
    recipe = Recipe(
        sequence=hooks[0],
        axes=("token", "feature"),
        fields=_fields(look, {"step.token_ids": "token_ids"}),
        label_kind="none",
    )
    return Known(what="activations of SAELens", recipe=recipe, others=tuple(hooks[1:]))


def _honest_llama(look: Look) -> Known | None:
    """Recognise layer-wise states and labels by their names, as honest_llama (ITI) writes them."""
    if look.suffix != ".npy":
        return None
    names = {path.name.removesuffix(".npy") for path in look.files}
    sets = [name.removesuffix("_layer_wise") for name in names if name.endswith("_layer_wise")]
    if not sets or not all(f"{name}_labels" in names for name in sets):
        return None
    recipe = Recipe(sequence="{set}_layer_wise", label="{set}_labels", axes=("layer", "feature"), layout="stacked")
    others = ("{set}_head_wise",) if any(f"{name}_head_wise" in names for name in sets) else ()
    return Known(what="states of honest_llama", recipe=recipe, others=others)


def _states_and_scores(look: Look) -> Known | None:
    """Recognise `.npy` files of which one has a row, and another a number, per record, as HaloScope writes them."""
    if look.suffix != ".npy" or not 2 <= len(look.files) <= 8 or len({path.parent for path in look.files}) > 1:
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for path in look.files:
        _, leaves, _ = first_leaves([path])
        if len(leaves) == 1 and (len(leaves[0].shape) > 2 or "float" in leaves[0].dtype):
            shapes[path.name.removesuffix(".npy")] = leaves[0].shape
    states = [name for name, shape in shapes.items() if len(shape) in (2, 3) and shape[-1] > 1]
    flat = [name for name, shape in shapes.items() if len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)]
    if not states or len(flat) != 1 or any(shapes[name][0] != shapes[flat[0]][0] for name in states):
        return None
    axes = ("layer", "feature") if len(shapes[states[0]]) == 3 else ("feature",)
    recipe = Recipe(sequence=states[0], label=flat[0], axes=axes, layout="stacked")
    return Known(what="states and scores in .npy, as of HaloScope", recipe=recipe, others=tuple(states[1:]))


def _memmaps(look: Look) -> Known | None:
    """Recognise raw shards with a `.meta` beside each, as dictionary_learning writes them."""
    if look.suffix != ".memmap" or "" not in look.leaves or not 2 <= len(look.leaves[""].shape) <= 3:
        return None
    axes = ("feature",) if len(look.leaves[""].shape) == 2 else ("token", "feature")
    recipe = Recipe(axes=axes, layout="stacked", label_kind="none")
    return Known(what="activations of dictionary_learning", recipe=recipe)


def _fields(look: Look, fields: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((name, key) for name, key in fields.items() if key in look.leaves)


DETECTORS: tuple[Callable[[Look], Known | None], ...] = (
    _vllm,
    _specforge,
    _saelens,
    _honest_llama,
    _states_and_scores,
    _memmaps,
)
