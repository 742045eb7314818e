"""Job: everything that workers must know before a conversion begins: names, splits, schema."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dali_pipeline.errors import DataError, FormatError, UsageError
from dali_pipeline.format.schema import Field, Schema
from dali_pipeline.ingest.dealing import OwnSplits, Settled, splits_in_names
from dali_pipeline.ingest.inference import LayerChoice, fitted, infer_schema, written_bytes
from dali_pipeline.ingest.layouts.placed import Placement, placed_like, placement_of
from dali_pipeline.ingest.names import Disagreement, FileNames, Names
from dali_pipeline.ingest.readers.pt import FOLDERS
from dali_pipeline.ingest.scales import greatest_values
from dali_pipeline.ingest.workers import Advance, in_order
from dali_pipeline.runtime.progress import progress_bar, shown
from dali_pipeline.writing.filler import Dealer
from dali_pipeline.writing.growth import groups_of
from dali_pipeline.writing.split import FileSplit, SplitRule

if TYPE_CHECKING:
    from dali_pipeline.dataset.dataset import Dataset
    from dali_pipeline.ingest.config import ConvertConfig
    from dali_pipeline.ingest.sources import Source

IN_PLACE_BYTES = 256  # per record, about what is written of one that stays in place
MANY_FILES = 5000  # opening fewer takes no longer than starting processes for it
FILES_AT_ONCE = 256
NAMED = 5  # maximum number of files that a message names


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that workers must know.

    Attributes:
        source: Files to convert.
        config: Settings.
        names: Ids of the records.
        counts: Number of records of each file; 0 for an unreadable one.
        dealer: Rule that assigns groups to splits.
        schema: Schema of the data set.
        choice: Layers that are kept.
        unreadable: Reason why a file cannot be read, by its name.
        written_bytes: Estimated size of the data set in bytes.
        torn: Number of groups that are in several splits.
        notices: Sentences for the user about what is kept and left out.
        placement: What stays in place; None if everything is copied.
    """

    source: Source
    config: ConvertConfig
    names: Names
    counts: list[int]
    dealer: Dealer | OwnSplits
    schema: Schema
    choice: LayerChoice
    unreadable: dict[str, str]
    written_bytes: int
    torn: int
    notices: list[str]
    placement: Placement | None = None

    def dealer_of(self, number: int) -> Dealer:
        """Return the rule that assigns the groups of a file to splits."""
        return self.dealer.of_file(number) if isinstance(self.dealer, OwnSplits) else self.dealer

    @property
    def rule(self) -> dict[str, Any]:
        """The rule that dealt the splits, as the manifest records it; empty if the owner's own splits were kept."""
        rule = self.config.split or SplitRule()
        described: dict[str, Any] = {"shares": list(rule.shares), "seed": rule.seed}
        described |= {"by": "file"} if isinstance(self.dealer, FileSplit) else {}
        return {} if isinstance(self.dealer, OwnSplits) else described


class _Found(NamedTuple):
    """What opening a file told: its names, the names of its parts that are not converted, or why it cannot be read."""

    names: FileNames
    not_taken: tuple[str, ...] = ()
    error: str | None = None


def _find(source: Source, skip_bad: bool, number: int) -> _Found:
    try:
        if source.is_named_outside:
            return _Found(FileNames.of_one(("sequences",), *source.outside(number)))
        file = source.open(number)
        file.close()
        return _Found(FileNames.of(file), file.not_taken)
    except (FormatError, DataError) as error:
        if not skip_bad:
            raise
        return _Found(FileNames.empty(), error=source.without_root(error))


def _find_some(source: Source, skip_bad: bool, count: int, turn: int, advance: Advance) -> list[_Found]:
    """Open the next `count` files, or the last ones."""
    found = []
    for number in range(len(source.files))[turn * count : (turn + 1) * count]:
        found.append(_find(source, skip_bad, number))
        advance(1)
    return found


def prepare(source: Source, config: ConvertConfig, progress: Advance, like: Dataset | None = None) -> Job:
    """Read names and labels of every file; determine ids, splits and schema: those of the data set `like`, if one is given.

    Args:
        source: Files to convert.
        config: Settings. Several processes open the files if these are many, and are here.
        progress: Called with the number of files that were opened so far.
        like: The data set.
    """
    unreadable: dict[str, str] = {}
    file_names: list[FileNames] = []
    not_taken: dict[str, list[str]] = {}  # name of a part that is not converted, and the files that have it
    opens_many = len(source.files) >= MANY_FILES and source.remote is None and not source.is_named_outside
    opens_many &= config.engine == "local"
    turns = range(-(-len(source.files) // FILES_AT_ONCE))
    work = partial(_find_some, source, config.skip_bad, FILES_AT_ONCE)
    with closing(in_order(work, turns, config.num_workers if opens_many else 1, progress)) as results:
        for found in chain.from_iterable(some for _, some in results):
            own_name = source.names[len(file_names)]
            file_names.append(found.names)
            for name in found.not_taken:
                not_taken.setdefault(name, []).append(own_name)
            if found.error is not None:
                unreadable[own_name] = found.error
    halves = {_dealt_as(name): name for name in unreadable}
    for number, name in enumerate(source.names):
        if _dealt_as(name) in halves and name not in unreadable:  # otherwise recurring questions would be paired wrongly
            unreadable[name] = f"{name}: its other half, {halves[_dealt_as(name)]}, cannot be read"
            file_names[number] = FileNames.empty()
    try:
        names = Names(file_names)
    except Disagreement as error:
        file = source.open(error.file)
        file.close()
        name = (file.ids or file.groups)[error.row]
        raise DataError(f"{file.path}: {name!r} {error.words}") from None
    notices = _describe_not_taken(source, not_taken)
    if like is None:
        dealer, torn = _dealer(source, file_names, config, notices)
    else:
        dealer, torn = _dealer_like(source, file_names, config, notices, like), 0
    counts = [len(names_of_file.labels) for names_of_file in file_names]
    schema, choice = infer_schema(source, file_names, config, notices)
    placement, schema = _stored(source, file_names, config, schema, choice, notices, like)
    return Job(
        source=source,
        config=config,
        names=names,
        counts=counts,
        dealer=dealer,
        schema=schema,
        choice=choice,
        unreadable=unreadable,
        written_bytes=IN_PLACE_BYTES * sum(counts) if placement else written_bytes(source, file_names, schema, choice),
        torn=torn,
        notices=notices,
        placement=placement,
    )


def _stored(
    source: Source,
    file_names: Sequence[FileNames],
    config: ConvertConfig,
    schema: Schema,
    choice: LayerChoice,
    notices: list[str],
    like: Dataset | None,
) -> tuple[Placement | None, Schema]:
    """Return what stays in place, and the schema as it is stored: with the scales of int8, or the order of the files."""
    placement: Placement | None = None
    if config.in_place:
        placement, schema, told = placement_of(source.plan, source.root, source.reader.what, schema)
        notices += told
    if like is not None:
        if placement is not None:
            placement = placed_like(placement, like, source.root)
        return placement, fitted(schema, like.schema, str(source.root), str(like.root), config.dtypes)
    if schema.sequence is not None and config.dtypes.get("sequence") == "int8":
        scaled = _scaled(source, file_names, config, choice)
        schema = replace(schema, sequence=replace(scaled, by_layer=schema.sequence.by_layer, axes=schema.sequence.axes))
    return placement, schema


def _describe_not_taken(source: Source, not_taken: dict[str, list[str]]) -> list[str]:
    """Return sentences that name the files, and the parts of converted files, that are not converted."""
    notices = [] if source.plan is None else list(source.plan.notices)
    if source.not_taken:
        notices.append(f"not taken: {_some(source.not_taken)}; expected {source.reader.what}")
    for name, files in not_taken.items():
        notices.append(f"not taken: {name}, in {_some(files)}")
    return notices


def _some(names: Sequence[str]) -> str:
    """Return the first few names, and the number of the others, in words."""
    first = ", ".join(name.encode("utf-8", "backslashreplace").decode() for name in names[:NAMED])
    return first if len(names) <= NAMED else f"{first} and {len(names) - NAMED:,} more files"


def _dealer(
    source: Source, file_names: Sequence[FileNames], config: ConvertConfig, notices: list[str]
) -> tuple[Dealer | OwnSplits, int]:
    """Return the rule that assigns groups to splits, and the number of groups that it leaves in several splits."""
    split = config.split or SplitRule()
    groups = [names.groups for names in file_names]
    if config.split_by == "file":
        return FileSplit(split, [_dealt_as(name) for name in source.names], groups), 0
    if not config.keeps_splits:
        return split, 0
    if source.own is not None:
        own = OwnSplits(homes=[path.parent.name for path in source.files], split=None)
    elif (named := splits_in_names(source.names, split)) is not None:
        own = named[0]
        notices.append(own.describe(named[1]))
    else:
        return split, 0
    torn = own.torn(groups)
    if torn:
        notices.append(f"{torn:,} groups are in several of the splits that are kept: what is tested was trained on")
    return own, torn


def _dealer_like(
    source: Source, file_names: Sequence[FileNames], config: ConvertConfig, notices: list[str], like: Dataset
) -> Dealer | OwnSplits:
    """Return the rule that assigns groups to the splits of a data set that they are added to.

    Raises:
        UsageError: The data set has a rule and another is given; or it has none, and neither has the source.
    """
    rule, groups = like.manifest.split, groups_of(like.folder, like.manifest)
    hashes = [names.groups for names in file_names]
    if rule:
        if config.split is not None:
            raise UsageError(f"{like.root} has a rule for its splits, {rule}; leave --split and --split-seed out")
        split = SplitRule(shares=tuple(rule["shares"]), seed=rule["seed"])
        by_file = rule.get("by") == "file"
        return Settled(groups, FileSplit(split, [_dealt_as(name) for name in source.names], hashes) if by_file else split)
    if config.split is not None:
        return Settled(groups, config.split)
    dealer, _ = _dealer(source, file_names, config, [])  # its sentences speak of dealing anew
    if not isinstance(dealer, OwnSplits):
        raise UsageError(
            f"{like.root} has its owner's splits, and the names of {source.root} say none; name their shares by --split"
        )
    dealer = replace(dealer, split=None if len(groups.get("val", ())) else dealer.split)
    notices.append(f"the splits in the files' names are kept, as those of {like.root} are its owner's")
    nothing = np.zeros(0, np.uint64)
    torn = sum(
        len(np.intersect1d(own, np.concatenate([nothing, *(groups[other] for other in groups if other != home)])))
        for own, home in zip(hashes, dealer.homes, strict=True)
    )
    if torn:
        notices.append(f"{torn:,} groups are in another split of {like.root} already: what is tested was trained on")
    return dealer


def _dealt_as(name: str) -> str:
    """Return the name by which a file is assigned to a split: without `lstm_solo/` or `gnn/`, so that both halves agree."""
    half, _, rest = name.partition("/")
    return rest if half in FOLDERS else name


def _scaled(source: Source, file_names: Sequence[FileNames], config: ConvertConfig, choice: LayerChoice) -> Field:
    """Return the field of int8 sequences, with scales from the largest value of each step and feature."""
    numbers = [number for number, names in enumerate(file_names) if len(names.labels) and "sequences" in names.kinds]
    with progress_bar() as bar:
        show = shown(bar, "measure", len(numbers))
        greatest = greatest_values(source, numbers, choice, config.num_workers, config.engine, config.skip_bad, show)
        return Field.scaled(greatest)
