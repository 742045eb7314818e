"""upload: copy a data set from a folder to a store, the manifest last, so that an unfinished copy is no data set."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dali_pipeline.dataset.dataset import Dataset, open_dataset
from dali_pipeline.errors import UsageError
from dali_pipeline.format.manifest import MANIFEST_NAME
from dali_pipeline.runtime.progress import progress_bar
from dali_pipeline.storage.files import Files
from dali_pipeline.storage.stores import GoneError, NoBucketError, Store
from dali_pipeline.types import Kind

UPLOADS_IN_FLIGHT = 8


def upload(root: Path, url: str) -> Store:
    """Copy the data set in folder `root` to a URL, several shards at a time.

    After an interruption, it skips shards whose size and header are in the store; readers check their blocks.

    Args:
        root: Folder of the data set.
        url: URL of the copy.

    Returns:
        The store that holds the copy.

    Raises:
        UsageError: The URL holds another data set.
        FormatError: A shard does not fit the manifest.
        DataError: The store refuses access.
    """
    data, store = open_dataset(root), Store(url)
    manifest, remote_manifest = (root / MANIFEST_NAME).read_bytes(), finished(store)
    if remote_manifest is not None:
        if remote_manifest != manifest:
            raise UsageError(f"{store} is a finished data set already; expected a new place")
        return store
    shards = [
        (split, kind, number)
        for split in data.splits
        for kind in data.schema.kinds
        for number in range(len(data.table(split, kind)))
    ]
    with progress_bar() as bar, ThreadPoolExecutor(UPLOADS_IN_FLIGHT) as pool:
        task = bar.add_task("upload", total=len(shards))
        try:
            for _ in pool.map(lambda shard: _put(data, store, *shard), shards):
                bar.advance(task)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    store.put(root / MANIFEST_NAME, MANIFEST_NAME)
    return store


def finished(store: Store) -> bytes | None:
    """Return the manifest of the data set in a store, or None if there is none; raise DataError if the store refuses access."""
    try:
        return store.read(MANIFEST_NAME)
    except NoBucketError:
        raise
    except GoneError:
        return None


def _put(data: Dataset, store: Store, split: str, kind: Kind, number: int) -> None:
    path: Path = data.shard_path(split, kind, number)
    shard = data.table(split, kind).open(path, number, Files(1))  # checks the shard before it is copied
    key, nbytes = path.relative_to(data.folder).as_posix(), path.stat().st_size
    header = shard.opened().header()
    if store.size(key) != nbytes or store.read(key, 0, len(header)) != header:
        store.put(path, key)
