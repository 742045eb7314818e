"""WorkFolder: a folder in which a data set is being written, locked, with a journal of what is final so far."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

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
    """The final part of an unfinished data set, from which the next process continues.

    Attributes:
        fingerprint: Text that names input and settings.
        cursor: The caller's own position in its input.
        committed: Whether anything is final.
        contents: Shard tables and moments.
        left_out: The reason per file that was left out.
    """

    fingerprint: str
    cursor: int = 0
    committed: bool = False
    contents: Contents = field(default_factory=Contents)
    left_out: dict[str, str] = field(default_factory=dict)


class WorkFolder:
    """Claim a folder for one writer: a new or empty folder, or one that the same work left unfinished.

    Files that the journal does not name are removed.

    Args:
        root: The folder.
        fingerprint: Text that names input and settings.

    Raises:
        UsageError: The folder holds anything else, another work's journal, or is being written; nothing in it is changed.
    """

    def __init__(self, root: Path, fingerprint: str) -> None:
        self.root, self._lock = root, -1
        self._created = not root.exists()
        if (root / MANIFEST_NAME).exists():
            raise UsageError(f"{root} is a finished data set already; expected a new folder")
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(root, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"{root} cannot hold a data set ({error.strerror}); expected a writable folder") from error
        try:
            lock(self._lock)
            self.journal = self._resumable_journal(fingerprint) or Journal(fingerprint=fingerprint)
            self._remove_unnamed()
            self.save()
        except BlockingIOError:
            self._unlock()
            raise UsageError(f"{root} is being written by another process; wait for it, or name another folder") from None
        except BaseException:
            self._unlock()
            if self._created:
                with contextlib.suppress(OSError):
                    root.rmdir()
            raise

    def _resumable_journal(self, fingerprint: str) -> Journal | None:
        """Return the journal of the same work if it has anything final."""
        path = self.root / JOURNAL_NAME
        names = sorted(entry.name for entry in self.root.iterdir() if entry.name != JOURNAL_TEMPORARY)
        if JOURNAL_NAME not in names:
            if names:
                raise UsageError(f"{self.root} is not empty (it holds {names[0]}); expected a new or empty folder")
            return None
        try:
            journal = msgspec.json.decode(path.read_bytes(), type=Journal)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"{path} is not a journal ({error}); remove the folder to begin anew") from None
        if journal.committed and journal.fingerprint != fingerprint:
            raise UsageError(f"{self.root} holds an unfinished data set of other input or settings; finish or remove it")
        return journal if journal.committed else None

    def _remove_unnamed(self) -> None:
        named = {shard_path(self.root, *shard) for shard in self.journal.contents.shards}
        for split in SPLITS:
            for path in (self.root / split).glob("*.safetensors*"):
                if path not in named:
                    path.unlink()
        shutil.rmtree(self.parts, ignore_errors=True)

    @property
    def parts(self) -> Path:
        """Folder in which workers write the shards to be adopted; always removed at the end."""
        return self.root / PARTS_NAME

    def adopt(self, part: Path, contents: Contents) -> None:
        """Move the shards that a filler wrote under `part` after the existing ones. They are final once `save` has run."""
        own_contents = self.journal.contents
        for split, kind, shard in contents.shards:
            path = shard_path(self.root, split, kind, len(own_contents.splits[split][kind]) + shard)
            path.parent.mkdir(exist_ok=True)
            shard_path(part, split, kind, shard).rename(path)
        for split in contents.splits:
            if (self.root / split).exists():
                sync_folder(self.root / split)
        shutil.rmtree(part, ignore_errors=True)
        own_contents.extend(contents)

    def save(self) -> None:
        """Write the journal atomically."""
        write_whole(self.root / JOURNAL_NAME, msgspec.json.encode(self.journal, enc_hook=np.ndarray.tolist))

    def finish(self) -> None:
        """Remove the journal of a complete data set, and unlock the folder."""
        shutil.rmtree(self.parts, ignore_errors=True)
        (self.root / JOURNAL_NAME).unlink(missing_ok=True)
        self._unlock()

    def abandon(self) -> None:
        """Unlock the folder; unless something is final, remove what was written, and the folder if it was created here."""
        shutil.rmtree(self.parts, ignore_errors=True)
        if not self.journal.committed and not (self.root / MANIFEST_NAME).exists():
            for split in SPLITS:
                shutil.rmtree(self.root / split, ignore_errors=True)
            for name in (JOURNAL_NAME, JOURNAL_TEMPORARY):
                (self.root / name).unlink(missing_ok=True)
            if self._created:
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
    """Remove what a process left that was killed right after it wrote the manifest."""
    if (root / JOURNAL_NAME).exists() or (root / PARTS_NAME).exists():
        with contextlib.suppress(OSError):
            shutil.rmtree(root / PARTS_NAME, ignore_errors=True)
            (root / JOURNAL_NAME).unlink(missing_ok=True)
