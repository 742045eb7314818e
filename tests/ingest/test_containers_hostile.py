"""Containers refuse files that are cut, lie about sizes, lead elsewhere or want to run code: one sentence, at once."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import pickletools
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.numpy import save as save_safetensors
from torch_geometric.data import Data, InMemoryDataset

from dali_pipeline.errors import FormatError
from dali_pipeline.ingest.containers.base import open_container
from dali_pipeline.ingest.containers.unpickled import _largest_memo

VALUES = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
PREFIXES = 60  # cut files per format


class Evil:
    """Runs a command where a pickle is loaded freely."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def use(path: Path) -> None:
    """Open a file, and read all that it says it has; raise what the first of these raises."""
    container = open_container(path)
    try:
        for record in [None] if container.records is None else range(len(container.records)):
            for leaf in container.leaves(record or 0):
                container.read(leaf.key, record=record)
    finally:
        container.close()


def refused(path: Path, words: str) -> None:
    """Assert that using a file raises one sentence with these words, and the file's name."""
    with pytest.raises(FormatError, match=words) as caught:
        use(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700 + 3 * len(str(path))


def saved(write: Callable[[Any], Any]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def arrow(new: Callable[..., Any]) -> bytes:
    table = pa.table({"x": [VALUES.tolist()] * 5, "y": list(range(5))})

    def write(buffer: Any) -> None:
        with new(buffer, table.schema) as writer:
            writer.write_table(table)

    return saved(write)


def torch_bytes(content: Any, old: bool = False) -> bytes:
    return saved(lambda buffer: torch.save(content, buffer, _use_new_zipfile_serialization=not old))


def good() -> dict[str, bytes]:
    tensors = {"x": torch.from_numpy(VALUES), "n": [1, 2]}
    graphs = [Data(x=torch.ones(2, 3), edge_index=torch.tensor([[0], [1]])) for _ in range(3)]
    return {
        "a.safetensors": save_safetensors({"x": VALUES, "y": np.arange(6)}),
        "a.npy": saved(lambda buffer: np.save(buffer, VALUES)),
        "a.npz": saved(lambda buffer: np.savez(buffer, x=VALUES)),
        "b.npz": saved(lambda buffer: np.savez_compressed(buffer, x=VALUES)),
        "a.pt": torch_bytes(tensors),
        "b.pt": torch_bytes(tensors, old=True),
        "c.pt": torch_bytes(graphs),
        "a.pkl": pickle.dumps([{"x": torch.from_numpy(VALUES), "y": VALUES}]),
        "a.pkl.gz": gzip.compress(pickle.dumps({"x": VALUES})),
        "a.parquet": saved(lambda buffer: parquet.write_table(pa.table({"x": [[1, 2]] * 5}), buffer)),
        "a.arrow": arrow(pa.ipc.new_file),
        "a.json": json.dumps({"x": VALUES.tolist()}).encode(),
    }


@pytest.mark.parametrize("name", sorted(good()))
def test_cut_files(tmp_path: Path, name: str) -> None:
    data, path = good()[name], tmp_path / name
    for length in sorted(set(np.linspace(0, len(data) - 1, PREFIXES).astype(int).tolist())):
        path.write_bytes(data[:length])
        refused(path, name)
    path.write_bytes(data)
    use(path)


@pytest.mark.parametrize("name", sorted(good()))
def test_changed_bytes_raise_nothing_else(tmp_path: Path, name: str) -> None:
    data, path, rng = good()[name], tmp_path / name, np.random.default_rng(7)
    for _ in range(150):
        changed = bytearray(data)
        for position in rng.integers(0, len(data), rng.integers(1, 4)):
            changed[position] = rng.integers(0, 256)
        path.write_bytes(changed)
        with suppress(FormatError):
            use(path)


def safetensors_file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: Any = (4,), dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SAFETENSORS = {
    "length": ((2**63).to_bytes(8, "little") + b"{}", "does not fit"),
    "length of memory": ((50 << 20).to_bytes(8, "little") + b"{}", "does not fit"),
    "short": (b"\x01", "does not fit"),
    "no json": (safetensors_file(b"{]"), "none of a safetensors file"),
    "list": (safetensors_file([]), "none of a safetensors file"),
    "deep": (safetensors_file(b'{"a":' + b"[" * 100_000), "none of a safetensors file"),
    "overlap": (safetensors_file({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"), "one after the other"),
    "twice": (safetensors_file({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"), "one after the other"),
    "gap": (safetensors_file({"a": entry(0, 4), "b": entry(5, 9)}, b"123456789"), "one after the other"),
    "beyond": (safetensors_file({"a": entry(0, 4)}, b"123"), "truncated or damaged"),
    "backwards": (safetensors_file({"a": entry(4, 0)}, b"1234"), "one after the other"),
    "negative": (safetensors_file({"a": entry(-4, 0)}, b"1234"), "one after the other"),
    "negative shape": (safetensors_file({"a": entry(0, 4, (-2, -2))}, b"1234"), "sizes from 0"),
    "size": (safetensors_file({"a": entry(0, 4, (5,))}, b"1234"), "expected 5"),
    "huge shape": (safetensors_file({"a": entry(0, 4, (2**62, 2**62))}, b"1234"), "expected 21267"),
    "axes": (safetensors_file({"a": entry(0, 4, (1,) * 99 + (4,))}, b"1234"), "sizes from 0"),
    "shape of texts": (safetensors_file({"a": entry(0, 4, ("4",))}, b"1234"), "none of a safetensors file"),
    "offsets": (safetensors_file({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0]}}, b"1234"), "none of a safetensors"),
    "rest": (safetensors_file({"a": entry(0, 4)}, b"12345"), "after its last tensor"),
    "dtype": (safetensors_file({"a": entry(0, 4, (4,), "F8_E4M3")}, b"1234"), "F8_E4M3, which NumPy does not have"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors(tmp_path: Path, case: str) -> None:
    data, words = SAFETENSORS[case]
    (tmp_path / "a.safetensors").write_bytes(data)
    refused(tmp_path / "a.safetensors", words)


def npy_file(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little") + text + data


NPY = {
    "objects": (saved(lambda buffer: np.save(buffer, np.array([Evil(Path("x"))]), allow_pickle=True)), "pickled"),
    "code": (npy_file("__import__('os').system('false')"), "no header"),
    "large": (npy_file(" " * 60_000 + "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", b"1234"), "does not begin"),
    "huge": (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b" " * 99, "does not begin"),
    "shape": (npy_file("{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904,)}", b"1234"), "truncated"),
    "negative": (npy_file("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1)}", b"1234"), "truncated|no header"),
    "record": (npy_file("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}", b"1234"), "cannot be taken"),
    "complex": (npy_file("{'descr': '<c8', 'fortran_order': False, 'shape': (1,)}", b"12345678"), "complex64"),
    "version": (npy_file("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", b"1234", b"\x09\x00"), "version"),
    "more": (npy_file("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", b"12345"), "truncated or damaged"),
}


@pytest.mark.parametrize("case", NPY)
def test_npy(tmp_path: Path, case: str) -> None:
    data, words = NPY[case]
    (tmp_path / "a.npy").write_bytes(data)
    refused(tmp_path / "a.npy", words)
    if case not in ("version", "negative"):
        for packing in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            with zipfile.ZipFile(tmp_path / "a.npz", "w", packing) as archive:
                archive.writestr("x.npy", data)
            refused(tmp_path / "a.npz", words)


def test_a_member_of_a_zip_that_lies_about_its_size(tmp_path: Path) -> None:
    data = bytearray(good()["a.npz"])
    for position in (data.rfind(b"PK\x01\x02") + 20, data.rfind(b"PK\x01\x02") + 24):
        data[position : position + 4] = struct.pack("<I", 2**31)
    (tmp_path / "a.npz").write_bytes(data)
    refused(tmp_path / "a.npz", "truncated|damaged")


@pytest.mark.parametrize("about", [
    "[", "[]", "{}", '{"shape": [6, 5]}', '{"shape": [6, 4], "dtype": "float32"}', '{"shape": [-6, -5], "dtype": "float32"}',
    '{"shape": [6.0, 5], "dtype": "float32"}', '{"shape": [6, 5], "dtype": "object"}', '{"shape": [6, 5], "dtype": "O"}',
    '{"shape": [6, 5], "dtype": "f4,f4"}', '{"shape": 30, "dtype": "float32"}', "[" * 100_000, '{"shape": [true, 30]}',
    '{"shape": [9223372036854775807, 9223372036854775807], "dtype": "float32"}', '{"shape": [3], "dtype": "V40"}',
])  # fmt: skip
def test_raw_files(tmp_path: Path, about: str) -> None:
    (tmp_path / "a.memmap").write_bytes(VALUES.tobytes())
    (tmp_path / "a.meta").write_text(about)
    with pytest.raises(FormatError, match=r"a\.(meta|memmap)") as caught:
        use(tmp_path / "a.memmap")
    assert "\n" not in str(caught.value)


def test_a_raw_file_without_its_json(tmp_path: Path) -> None:
    (tmp_path / "a.memmap").write_bytes(VALUES.tobytes())
    refused(tmp_path / "a.memmap", "no a.meta or .json beside it")


@pytest.mark.parametrize("name", ["zip.pt", "old.pt", "a.pkl", "a.pkl.gz", "storage.pkl", "key.pkl"])
@pytest.mark.parametrize("where", ["alone", "beside", "record"])
def test_nothing_of_a_pickle_is_run(tmp_path: Path, name: str, where: str) -> None:
    ran = tmp_path / "ran"
    evil: Any = Evil(ran)
    if name == "storage.pkl":
        evil = Storage(torch_bytes(Evil(ran), old=True))
    content = {"alone": evil, "beside": {"x": torch.ones(2), "evil": evil}, "record": [{"x": evil}, {"x": 1}]}[where]
    if name == "key.pkl":
        content = {(1, "a"): content, "evil": {"deep": [content]}}
    data = torch_bytes(content, old=name == "old.pt") if name.endswith(".pt") else pickle.dumps(content)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    refused(path, "posix.system|nt.system|cannot be taken")
    assert not ran.exists()


class Storage:
    """A storage of torch in a plain pickle, whose bytes are a pickle again."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> Any:
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (_Inner(self.data), 0, (1,), (1,), False, None)


class _Inner:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (self.data,)


@pytest.mark.parametrize("called", [
    b"c__builtin__\neval\n(S'1'\ntR.", b"cbuiltins\ngetattr\n(S'a'\nS'b'\ntR.", b"\x80\x04\x8c\x02os\x8c\x06getcwd\x93)R.",
    b"\x80\x04\x8c\x08builtins\x8c\x0b__import__\x93\x8c\x02os\x85R.", b"cfunctools\npartial\n(S'a'\ntR.",
    b"\x80\x02\x82\x01.", b"\x80\x04\x8c\x02id\x51.",
])  # fmt: skip
def test_names_of_the_standard_library_are_refused(tmp_path: Path, called: bytes) -> None:
    (tmp_path / "a.pkl").write_bytes(called)
    refused(tmp_path / "a.pkl", "was refused|cannot be read")


def limited(path: Path, mebibytes: int) -> subprocess.CompletedProcess[str]:
    """Use a file in a process of its own, which may take so much more memory than it has at the start."""
    code = f"""
import resource
from pathlib import Path
from dali_pipeline.errors import FormatError
from dali_pipeline.ingest.containers import base, pickled
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + ({mebibytes} << 20),) * 2)
try:
    container = base.open_container(Path({str(path)!r}))
    leaves = container.leaves()
    container.read(leaves[0].key, record=0 if container.records else None)
    container.read(leaves[-1].key, record=0 if container.records else None)
except FormatError as error:
    print("refused", error)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def doubled(levels: int, step: Callable[[Any], Any]) -> Any:
    value: Any = [1]
    for _ in range(levels):
        value = step(value)
    return value


def circle() -> Any:
    value: dict[str, Any] = {}
    value["x"] = value["y"] = value
    return value


BOMBS = {
    "memo": b"\x80\x04K\x01r\xff\xff\xff\x3f.",
    "memo as text": b"K\x01p1073741823\n.",
    "bytes": b"\x80\x05\x8e" + (2**40).to_bytes(8, "little") + b"abc.",
    "frame": b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"abc.",
    "bytearray": b"\x80\x04\x8c\x08builtins\x8c\x09bytearray\x93J\xff\xff\xff\x7f\x85R.",
    "lists": pickle.dumps(doubled(30, lambda value: [value, value])),
    "dicts": pickle.dumps(doubled(30, lambda value: {"a": value, "b": value})),
    "circle": pickle.dumps(circle()),
    "depth": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "classes": b"".join(b"cx\nc%d\n0" % number for number in range(2000)) + b"N.",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BOMBS)
def test_a_small_pickle_takes_little_memory(tmp_path: Path, case: str) -> None:
    (tmp_path / "a.pkl").write_bytes(BOMBS[case])
    done = limited(tmp_path / "a.pkl", 400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused") or case == "lists"


@pytest.mark.parametrize("protocol", range(6))
def test_numbers_of_objects_are_found_like_by_pickletools(protocol: int) -> None:
    content = [{"x": torch.ones(3), "y": [1, 2.5, "a" * 300, b"q" * 300, 10**30, None, True]}, {f"k{i}": i for i in range(600)}]
    data = pickle.dumps(content, protocol)
    numbers = [str(arg) for operation, arg, _ in pickletools.genops(data) if operation.name in ("LONG_BINPUT", "PUT")]
    assert _largest_memo(data, 1) == max(map(int, numbers), default=0)
    assert _largest_memo(data + data, 2) == max(map(int, numbers), default=0)


def test_a_zip_and_a_gz_that_unpack_to_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dali_pipeline.ingest.containers.source.IN_MEMORY_BYTES", 1 << 20)
    (tmp_path / "a.npy.gz").write_bytes(gzip.compress(bytes(100 << 20), 9))
    refused(tmp_path / "a.npy.gz", "unpacks to more than")
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (8, 8388608)}"
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as member,
    ):
        member.write(npy_file(header))
        for _ in range(256):
            member.write(bytes(1 << 20))
    container = open_container(tmp_path / "a.npz")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert container.leaves()[0].shape == (8, 8388608)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


def changed_tensor(**changes: Any) -> bytes:
    """Return a pickle of a tensor of 4 float32, rebuilt with other numbers."""
    arguments = {"offset": 0, "size": (4,), "stride": (1,)} | changes

    class Tensor:
        def __reduce__(self) -> Any:
            storage = _Inner(torch_bytes(torch.zeros(4)._typed_storage(), old=True))  # type: ignore[no-untyped-call]
            return torch._utils._rebuild_tensor_v2, (storage, *arguments.values(), False, None)

    return pickle.dumps({"x": Tensor()})


@pytest.mark.parametrize("changes", [
    {"size": (5,)}, {"offset": 1}, {"offset": -1}, {"size": (-1,)}, {"stride": (-1,)}, {"stride": (2,)}, {"size": (2**40,)},
    {"size": (2**40,), "stride": (0,)}, {"size": "a"}, {"size": (4.0,)}, {"stride": (1, 1)}, {"size": None}, {"offset": None},
])  # fmt: skip
def test_tensors_that_exceed_their_storage(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "good.pkl").write_bytes(changed_tensor())
    use(tmp_path / "good.pkl")
    (tmp_path / "a.pkl").write_bytes(changed_tensor(**changes))
    refused(tmp_path / "a.pkl", "larger than its storage|cannot be taken")


@pytest.mark.parametrize("slices", [[0, 2, 1, 6], [0, 2, 4, 99], [-1, 2, 4, 6], [0, 2]])
def test_slices_of_pyg_that_do_not_fit(tmp_path: Path, slices: list[int]) -> None:
    graphs = [Data(x=torch.ones(2, 3), y=torch.tensor([1])) for _ in range(3)]
    data, bounds = InMemoryDataset.collate(graphs)
    bounds["x"] = torch.tensor(slices)
    torch.save((data, bounds), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "slices")


def test_an_arrow_file_with_wrong_offsets(tmp_path: Path) -> None:
    batch = pa.record_batch([pa.array([[1, 2], [3]])], ["x"])
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    offsets, wrong = (np.array(values, np.int32).tobytes() for values in ([0, 2, 3], [0, 2, 1_000_000]))
    data = (tmp_path / "a.arrow").read_bytes()
    assert data.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(data.replace(offsets, wrong))
    refused(tmp_path / "a.arrow", "truncated, or something else|cannot be read")


def test_a_folder_that_names_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "other.arrow").write_bytes(good()["a.arrow"])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "data.arrow").write_bytes(good()["a.arrow"])
    for listed in (["../other.arrow"], [str(tmp_path / "other.arrow")], ["data.arrow", "gone.arrow"], [3]):
        (tmp_path / "set" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in listed]}))
        refused(tmp_path / "set", "lacks")


@pytest.mark.parametrize(("name", "text", "words"), [
    ("a.csv", "a,b\n1\n", "record 0 has 1 cells"), ("a.csv", "a,a\n1,2\n", "two columns 'a'"), ("a.csv", 'a\n"1', "as CSV"),
    ("a.csv", "a\n\xff", "as CSV"), ("a.json", "[" * 100_000, "as JSON"), ("a.json", '{"a": 1', "as JSON"),
    ("a.jsonl", '{"a": 1}\n{"a"\n', "record 1"), ("a.json", '{"a": [1, 99999999999999999999999]}', "cannot be taken"),
])  # fmt: skip
def test_texts(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_bytes(text.encode("latin1"))
    refused(tmp_path / name, words)


def hdf5(path: Path, case: str) -> None:
    h5py = pytest.importorskip("h5py")
    VALUES.tofile(path.with_name("outside.raw"))
    with h5py.File(path.with_name("other.h5"), "w") as other:
        other["x"] = VALUES
    with h5py.File(path, "w") as file:
        file["good"] = VALUES
        if case == "external link":
            file["x"] = h5py.ExternalLink("other.h5", "/x")
        elif case == "external storage":
            file.create_dataset(
                "x", VALUES.shape, VALUES.dtype, external=[(str(path.with_name("outside.raw")), 0, VALUES.nbytes)]
            )
        elif case == "virtual":
            layout = h5py.VirtualLayout(VALUES.shape, VALUES.dtype)
            layout[:] = h5py.VirtualSource(str(path.with_name("other.h5")), "x", VALUES.shape)
            file.create_virtual_dataset("x", layout)
        elif case == "filter":
            file.create_dataset("x", data=VALUES.astype(np.int32), scaleoffset=4)
        elif case == "shape":
            file.create_dataset("x", (2**40, 2**10), "f4", chunks=(1024, 1024))
        elif case == "chunk":
            file.create_dataset("x", (2**20, 2**10), "f4", chunks=(2**19, 2**10), compression="gzip")
        elif case == "link through a link":
            file["out"] = h5py.ExternalLink("other.h5", "/")
            file["x"] = h5py.SoftLink("/out/x")
        elif case == "circle":
            file.create_group("a")["a"] = file["/"]


@pytest.mark.parametrize(("case", "words"), [
    ("external link", "link to another file"), ("external storage", "in another file"), ("virtual", "in another file"),
    ("filter", "uses the filter 6"), ("shape", "truncated, or damaged"), ("chunk", "truncated, or damaged"),
    ("link through a link", "link to another file"), ("circle", "expected fewer"),
])  # fmt: skip
def test_hdf5(tmp_path: Path, case: str, words: str) -> None:
    hdf5(tmp_path / "a.h5", case)
    refused(tmp_path / "a.h5", words)


def test_cut_and_changed_hdf5(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    hdf5(path, "good")
    use(path)
    data, rng = path.read_bytes(), np.random.default_rng(7)
    for length in np.linspace(0, len(data) - 1, PREFIXES).astype(int).tolist():
        path.write_bytes(data[:length])
        refused(path, "a.h5")
    for _ in range(100):
        changed = bytearray(data)
        changed[int(rng.integers(0, len(data)))] = int(rng.integers(0, 256))
        path.write_bytes(changed)
        with suppress(FormatError):
            use(path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.npy", "a.pt", "a.pkl", "a.json", "a.csv", "a.parquet", "a.memmap"])
def test_folders_with_names_of_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(FormatError, match=name):
        use(tmp_path / name)
