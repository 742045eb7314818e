"""What is known before a conversion begins: names, splits, schema."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dali_pipeline.errors import DataError, FormatError
from dali_pipeline.format.schema import Field, Schema
from dali_pipeline.ingest.dealing import OwnSplits, splits_in_names
from dali_pipeline.ingest.inference import LayerChoice, infer_schema, written_bytes
from dali_pipeline.ingest.names import Disagreement, FileNames, Names
from dali_pipeline.ingest.own import OWN
from dali_pipeline.ingest.readers.pt import FOLDERS
from dali_pipeline.ingest.scales import greatest_values
from dali_pipeline.runtime.progress import progress_bar, shown
from dali_pipeline.writing.filler import Dealer
from dali_pipeline.writing.split import FileSplit, SplitRule

if TYPE_CHECKING:
    from dali_pipeline.ingest.config import ConvertConfig
    from dali_pipeline.ingest.sources import Source

NAMED = 5  # files that are named, of many


@dataclass(frozen=True, kw_only=True)
class Job:
    """What workers need to know.

    counts: records of each file, 0 for one in `unreadable`, which says why, by its name · written_bytes: about what is going to
    be written · torn: groups that are left in several splits · told: sentences for the user, about what is kept and left.
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
    told: list[str]

    def dealer_of(self, number: int) -> Dealer:
        """Return what deals the records of a file."""
        return self.dealer.of_file(number) if isinstance(self.dealer, OwnSplits) else self.dealer


def prepare(source: Source, config: ConvertConfig, numbers: Iterable[int]) -> Job:
    """Reads names and labels of every file, and numbers, deals and types the records."""
    unreadable: dict[str, str] = {}
    found: list[FileNames] = []
    not_taken: dict[str, list[str]] = {}  # by what it is, the files in which it is
    for number in numbers:
        try:
            file = source.open(number)
            found.append(FileNames.of(file))
            for name in file.not_taken:
                not_taken.setdefault(name, []).append(source.names[number])
            del file  # a file of a store is on the disk as long as this is held
        except (FormatError, DataError) as error:
            if not config.skip_bad:
                raise
            unreadable[source.names[number]] = source.told(error)
            found.append(FileNames.empty())
    halves = {_dealt_as(name): name for name in unreadable}
    for number, name in enumerate(source.names):
        if _dealt_as(name) in halves and name not in unreadable:  # else recurring questions would be paired wrongly
            unreadable[name] = f"{name}: its other half, {halves[_dealt_as(name)]}, cannot be read"
            found[number] = FileNames.empty()
    try:
        names = Names(found)
    except Disagreement as error:
        file = source.open(error.file)
        name = (file.ids or file.groups)[error.row]
        raise DataError(f"{file.path}: {name!r} {error.words}") from None
    told = _left(source, not_taken)
    dealer, torn = _dealer(source, found, config, told)
    counts = [len(each.labels) for each in found]
    schema, choice = infer_schema(source, found, config, told)
    if schema.sequence is not None and config.dtypes.get("sequence") == "int8":
        scaled = _scaled(source, found, config, choice)
        schema = replace(schema, sequence=replace(scaled, by_layer=schema.sequence.by_layer))
    return Job(
        source=source,
        config=config,
        names=names,
        counts=counts,
        dealer=dealer,
        schema=schema,
        choice=choice,
        unreadable=unreadable,
        written_bytes=written_bytes(source, found, schema, choice),
        torn=torn,
        told=told,
    )


def _left(source: Source, not_taken: dict[str, list[str]]) -> list[str]:
    """Say what of the source is not taken: files, and what else is in those that are."""
    told = []
    if source.not_taken:
        told.append(f"not taken: {_some(source.not_taken)}; expected {source.reader.what}")
    for name, files in not_taken.items():
        told.append(f"not taken: {name}, in {_some(files)}")
    return told


def _some(names: Sequence[str]) -> str:
    """The first names of many."""
    shown = ", ".join(name.encode("utf-8", "backslashreplace").decode() for name in names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED:,} more files"


def _dealer(
    source: Source, found: Sequence[FileNames], config: ConvertConfig, told: list[str]
) -> tuple[Dealer | OwnSplits, int]:
    """What deals the records, and how many groups it leaves in several splits."""
    split = config.split or SplitRule()
    groups = [each.groups for each in found]
    if config.split_by == "file":
        return FileSplit(split, [_dealt_as(name) for name in source.names], groups), 0
    if not config.keeps_splits:
        return split, 0
    if source.reader is OWN:
        own = OwnSplits(homes=[path.parent.name for path in source.files], split=None)
    elif (named := splits_in_names(source.names, split)) is not None:
        own = named[0]
        told.append(own.describe(named[1]))
    else:
        return split, 0
    torn = own.torn(groups)
    if torn:
        told.append(f"{torn:,} groups are in several of the splits that are kept: what is tested was trained on")
    return own, torn


def _dealt_as(name: str) -> str:
    """A file's name; of a `.pt` without its half's folder, as both halves of a file are one."""
    half, _, rest = name.partition("/")
    return rest if half in FOLDERS else name


def _scaled(source: Source, found: Sequence[FileNames], config: ConvertConfig, choice: LayerChoice) -> Field:
    numbers = [number for number, names in enumerate(found) if len(names.labels) and "sequences" in names.kinds]
    with progress_bar() as bar:
        show = shown(bar, "measure", len(numbers))
        greatest = greatest_values(source, numbers, choice, config.num_workers, config.engine, config.skip_bad, show)
        return Field.scaled(greatest)
