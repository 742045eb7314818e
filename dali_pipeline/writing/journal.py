"""WorkFolder: a folder in which a data set is being made, locked, and marked by a journal of what is final so far."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from dali_pipeline.errors import FormatError, UsageError
from dali_pipeline.format.manifest import MANIFEST_NAME, shard_path
from dali_pipeline.format.schema import SPLITS
from dali_pipeline.storage.whole import lock, sync_folder, write_whole
from dali_pipeline.writing.filler import Contents

JOURNAL_NAME = "journal.json"
JOURNAL_TEMPORARY = JOURNAL_NAME + ".tmp"
PARTS_NAME = ".parts"


@dataclass(kw_only=True)
class Journal:
    """What an unfinished data set has so far; the next process goes on from here.

    cursor: the caller's own place. left_out: why, by the name of the file that was.
    """

    fingerprint: str
    cursor: int = 0
    committed: bool = False
    contents: Contents = field(default_factory=Contents)
    left_out: dict[str, str] = field(default_factory=dict)


class WorkFolder:
    """Claims `root` for one writer: an empty or new folder, or one that the same work left unfinished.

    Whatever the journal does not name is taken away then. Raises UsageError for a folder that holds anything else, another
    work's journal, or another writer at work; nothing in it is touched.
    """

    def __init__(self, root: Path, fingerprint: str) -> None:
        self.root, self._lock = root, -1
        self._made = not root.exists()
        if (root / MANIFEST_NAME).exists():
            raise UsageError(f"{root} is a finished data set already; expected a new folder")
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(root, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"{root} cannot hold a data set ({error.strerror}); expected a writable folder") from error
        try:
            lock(self._lock)
            self.journal = self._found(fingerprint) or Journal(fingerprint=fingerprint)
            self._tidy()
            self.save()
        except BlockingIOError:
            self._unlock()
            raise UsageError(f"{root} is being written by another process; wait for it, or name another folder") from None
        except BaseException:
            self._unlock()
            if self._made:
                with contextlib.suppress(OSError):
                    root.rmdir()
            raise

    def _found(self, fingerprint: str) -> Journal | None:
        """The journal of the same work, if that had anything final."""
        path = self.root / JOURNAL_NAME
        found = sorted(entry.name for entry in self.root.iterdir() if entry.name != JOURNAL_TEMPORARY)
        if JOURNAL_NAME not in found:
            if found:
                raise UsageError(f"{self.root} is not empty (it holds {found[0]}); expected a new or empty folder")
            return None
        try:
            earlier = msgspec.json.decode(path.read_bytes(), type=Journal)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"{path} is not a journal ({error}); remove the folder to begin anew") from None
        if earlier.committed and earlier.fingerprint != fingerprint:
            raise UsageError(f"{self.root} holds an unfinished data set of other input or settings; finish or remove it")
        return earlier if earlier.committed else None

    def _tidy(self) -> None:
        named = {shard_path(self.root, *shard) for shard in self.journal.contents.shards}
        for split in SPLITS:
            for path in (self.root / split).glob("*.safetensors*"):
                if path not in named:
                    path.unlink()
        shutil.rmtree(self.parts, ignore_errors=True)

    @property
    def parts(self) -> Path:
        """Where workers write what is to be adopted; never left behind."""
        return self.root / PARTS_NAME

    def adopt(self, part: Path, contents: Contents) -> None:
        """Moves the shards that a filler wrote under `part` behind those that are here. Final only once `save` has run."""
        ours = self.journal.contents
        for split, kind, shard in contents.shards:
            path = shard_path(self.root, split, kind, len(ours.splits[split][kind]) + shard)
            path.parent.mkdir(exist_ok=True)
            shard_path(part, split, kind, shard).rename(path)
        for split in contents.splits:
            if (self.root / split).exists():
                sync_folder(self.root / split)
        shutil.rmtree(part, ignore_errors=True)
        ours.extend(contents)

    def save(self) -> None:
        """Writes the journal, whole or not at all."""
        write_whole(self.root / JOURNAL_NAME, msgspec.json.encode(self.journal))

    def finish(self) -> None:
        """The data set is whole: takes the journal away and unlocks."""
        shutil.rmtree(self.parts, ignore_errors=True)
        (self.root / JOURNAL_NAME).unlink(missing_ok=True)
        self._unlock()

    def abandon(self) -> None:
        """Unlocks; takes away what was written, and the folder if it was made here, unless something is final."""
        shutil.rmtree(self.parts, ignore_errors=True)
        if not self.journal.committed and not (self.root / MANIFEST_NAME).exists():
            for split in SPLITS:
                shutil.rmtree(self.root / split, ignore_errors=True)
            for name in (JOURNAL_NAME, JOURNAL_TEMPORARY):
                (self.root / name).unlink(missing_ok=True)
            if self._made:
                with contextlib.suppress(OSError):
                    self.root.rmdir()
        self._unlock()

    def __del__(self) -> None:
        self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_leftovers(root: Path) -> None:
    """What a process that was killed right behind the manifest's writing left of its work."""
    if (root / JOURNAL_NAME).exists() or (root / PARTS_NAME).exists():
        with contextlib.suppress(OSError):
            shutil.rmtree(root / PARTS_NAME, ignore_errors=True)
            (root / JOURNAL_NAME).unlink(missing_ok=True)
