"""What is installed: NumPy 1, DALI that is missing or does not fit, and GPUs that torch does not see, each in one sentence."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali
import pytest
import torch
from nvidia.dali import backend as typed_backend
from nvidia.dali import pipeline

import dali_pipeline as dp
from benchmarks import harness
from dali_pipeline import PipelineError, UsageError
from dali_pipeline.cli import versions
from dali_pipeline.loaders import dali
from dali_pipeline.loaders.decoding import sequence_graph
from dali_pipeline.runtime import machine
from dali_pipeline.runtime.numpyversion import check_numpy
from training.randomness import seed_of

backend: Any = typed_backend  # DALI's own stubs leave out what it checks
ROOT = Path(__file__).parents[1]
REFUSAL = "NumPy 1.26.4 is installed in {folder}; expected NumPy 2 or newer: pip install 'numpy>=2'"


@pytest.fixture
def old_numpy(tmp_path: Path) -> dict[str, str]:
    """The environment of a process whose NumPy says that it is 1.26.4, and whose pyarrow refuses it, as version 26 does."""
    (tmp_path / "sitecustomize.py").write_text("import numpy\nnumpy.__version__ = '1.26.4'\n")
    (tmp_path / "pyarrow.py").write_text("raise ImportError('numpy.core.multiarray failed to import')\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["-m", "dali_pipeline", "versions"], "dali_pipeline"),
        pytest.param(["-m", "dali_pipeline", "inspect", "data/none"], "dali_pipeline", marks=pytest.mark.slow),
        pytest.param(["-m", "dali_pipeline.runtime.numpyversion"], "dali_pipeline", marks=pytest.mark.slow),
        pytest.param(["predict.py", "--data", "data/none"], "predict.py", marks=pytest.mark.slow),
        (["train.py", "--data", "data/none"], "train.py"),
    ],
)
def test_numpy_1_is_refused_in_one_sentence(old_numpy: dict[str, str], arguments: list[str], name: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=old_numpy, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{name}: {REFUSAL.format(folder=Path(np.__file__).parent)}\n"


def test_numpy_1_is_refused_before_any_test(old_numpy: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_structure.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=old_numpy, cwd=ROOT)
    assert done.returncode == 2
    assert REFUSAL.format(folder=Path(np.__file__).parent) in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "passed" not in done.stdout


@pytest.mark.parametrize(("version", "refused"), [("1.26.4", True), ("2.0.0rc1", False), ("2.4.6", False), ("10.0.0", False)])
def test_numpy_2_or_newer_is_expected(monkeypatch: pytest.MonkeyPatch, version: str, refused: bool) -> None:
    monkeypatch.setattr(np, "__version__", version)
    if refused:
        with pytest.raises(UsageError, match=r"^NumPy 1\.26\.4 is installed in .*; expected NumPy 2 or newer: pip install"):
            check_numpy()
    else:
        check_numpy()


@pytest.mark.parametrize("target", ["train", "test", "check", "results", "bench", "plots"])
def test_make_looks_at_numpy_in_a_ready_environment_first(target: str) -> None:
    command = ["make", "--dry-run", "QUICK=1", target]
    steps = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    own = [step for step in steps if step.startswith(".venv/bin/") and "pip install" not in step]
    assert own[0] == ".venv/bin/python -m dali_pipeline.runtime.numpyversion"
    assert len(own) > 1


def test_an_image_with_numpy_1_gets_a_newer_one() -> None:
    names = [line.split()[0] for line in (ROOT / "requirements-base.txt").read_text().splitlines() if line[0] != "#"]
    assert "numpy>=2" in names


class Uint64OfNumpy1(int):
    """What an array of uint64 holds in NumPy 1: not to be shifted by a Python integer."""

    def __rshift__(self, other: object) -> int:
        raise TypeError("ufunc 'right_shift' not supported for the input types")


def test_seeds_are_the_same_with_any_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Literal, as a seed that changes makes another run of the same command."""
    expected = [seed_of(0), seed_of(0, 1), seed_of(7, 1000, 3)]
    assert expected == [7896617691693857887, 2918264622725855778, 8349868311749256094]
    plain = np.random.SeedSequence

    class Sequence:
        def __init__(self, words: tuple[int, ...]) -> None:
            self.words = words

        def generate_state(self, count: int, dtype: type) -> list[Uint64OfNumpy1]:
            return [Uint64OfNumpy1(word) for word in plain(self.words).generate_state(count, dtype)]

    monkeypatch.setattr(np.random, "SeedSequence", Sequence)
    assert [seed_of(0), seed_of(0, 1), seed_of(7, 1000, 3)] == expected


def third_party_imports(path: Path) -> set[str]:
    """The modules that a file imports, at its top or in a function, and that are neither ours nor Python's."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    known = {"dali_pipeline", "training", "models", *sys.stdlib_module_names}
    return {name for name in found if name.split(".")[0] not in known}


def test_versions_imports_what_training_imports() -> None:
    files = [ROOT / "train.py", *(path for folder in ("training", "models") for path in (ROOT / folder).rglob("*.py"))]
    assert sorted(versions.IMPORTED) == sorted(set().union(*map(third_party_imports, files)))


def test_what_training_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with versions.written_records() as (data, _):
        said = "pyarrow.parquet cannot be imported .*; expected it in"
        with monkeypatch.context() as patch, pytest.raises(PipelineError, match=said):
            patch.setitem(sys.modules, "pyarrow.parquet", None)
            versions.check_training(data)

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("Numpy is not available\nand more")

        monkeypatch.setattr(torch.nn, "LSTM", broken)
        said = (
            r"a step of an LSTM on cpu fails \(RuntimeError: Numpy is not available\); expected packages that fit each other$"
        )
        with pytest.raises(PipelineError, match=said):
            versions.check_training(data)
        monkeypatch.setattr(torch, "from_numpy", broken)
        with pytest.raises(PipelineError, match=r"engine='torch' on cpu fails \(RuntimeError: Numpy is not available\)"):
            versions.check_loaders(data, np.zeros((8, 3, 4), np.float16))


@pytest.mark.parametrize(
    ("built", "cuda", "said"),
    [
        (None, 12986, None),
        ("12.6", 12986, None),
        ("13.0", 13492, None),
        (
            "13.0",
            12986,
            "is built for CUDA 13, DALI 2.4.0 for CUDA 12; expected one version: "
            "pip uninstall nvidia-dali-cuda120, then pip install 'dali-pipeline[cuda13]'",
        ),
        (
            "12.6",
            13492,
            "is built for CUDA 12, DALI 2.4.0 for CUDA 13; expected one version: "
            "pip uninstall nvidia-dali-cuda130, then pip install 'dali-pipeline[cuda12]'",
        ),
        ("12.6", 11080, "for CUDA 11; expected one version: pip install 'dali-pipeline[cuda12]'"),
        ("11.8", 12986, "is built for CUDA 11, DALI 2.4.0 for CUDA 12; expected torch and DALI for CUDA 12 or 13"),
    ],
)
def test_dali_is_for_the_cuda_that_torch_is_for(
    monkeypatch: pytest.MonkeyPatch, make: Any, built: str | None, cuda: int, said: str | None
) -> None:
    data = make(20)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(nvidia.dali, "__cuda_version__", cuda)
    monkeypatch.setattr(nvidia.dali, "__version__", "2.4.0")
    assert len(list(dp.SequenceLoader(data, device="cpu"))) == 1  # there a mismatch does no harm
    monkeypatch.setattr("dali_pipeline.loaders.loader.resolve_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, 1 << 30))
    on_torch = {"batch_size": 4, "engine": "torch"}
    assert len(dp.SequenceLoader(data, device="cuda", **on_torch)) > 1  # type: ignore[arg-type]
    if said is None:
        versions.check_fit()
        assert len(dp.SequenceLoader(data, device="cuda")) == 1
        return
    for check in (versions.check_fit, lambda: dp.SequenceLoader(data, device="cuda")):
        with pytest.raises(PipelineError) as refused:
            check()
        assert str(refused.value).startswith(f"torch {torch.__version__} is built for CUDA ")
        assert str(refused.value).endswith(said)


def test_the_extras_are_the_wheels_that_make_installs() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for cuda, wheel in dali.EXTRAS.items():
        (ranged,) = extras[f"cuda{cuda}"]
        lines = (ROOT / f"requirements-cuda{cuda}.txt").read_text().splitlines()
        (pinned,) = [line.split()[0] for line in lines if line[0] != "#"]
        assert ranged.split(">=")[0] == pinned.split("==")[0] == wheel
    names = [path.name for path in ROOT.glob("requirements*.txt") if "nvidia-dali" in path.read_text()]
    assert sorted(names) == ["requirements-cuda12.txt", "requirements-cuda13.txt"]


def test_dali_is_known_by_what_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever its wheel is called: NVIDIA's images and other versions of CUDA have names of their own."""
    monkeypatch.setattr(nvidia.dali, "__cuda_version__", 13048)
    monkeypatch.setattr(nvidia.dali, "__version__", "1.53.0")
    assert ("nvidia-dali", "1.53.0 for CUDA 13") in [row[:2] for row in versions.versions(versions.QUICK)]
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    results = harness.Results("some", ["numpy", "nvidia-dali"])
    results.add("one", "way", "records/s", [1.0])
    (row,) = harness.rows_of("some")
    assert row["versions"].endswith(f"numpy {np.__version__}, nvidia-dali 1.53.0 for CUDA 13")


@pytest.mark.parametrize(("cufft", "npp"), [(-1, 1), (1, -1), (-1, -1)])
def test_libraries_that_no_graph_here_uses_are_not_missed(monkeypatch: pytest.MonkeyPatch, cufft: int, npp: int) -> None:
    """Ask for them as the first pipeline of a process does on a GPU; warnings are errors here."""
    monkeypatch.setattr(backend, "cuda_checked", False)
    monkeypatch.setattr(backend, "GetCudaVersion", lambda: 12090)
    monkeypatch.setattr(backend, "GetCufftVersion", lambda: cufft)
    monkeypatch.setattr(backend, "GetNppVersion", lambda: npp)
    build = pipeline.Pipeline.build

    def as_on_a_gpu(self: Any) -> None:
        backend.check_cuda_runtime()
        build(self)

    monkeypatch.setattr(pipeline.Pipeline, "build", as_on_a_gpu)
    left = iter([np.ones((2, 3), np.float16)])
    options: dict[str, Any] = {"batch_size": 2, "num_threads": 1, "device_id": None, "prefetch_queue_depth": 1}
    graph = sequence_graph(lambda: next(left), decoding=None, pads=False, **options)
    assert [out["sequences"].tolist() for (out,) in dali.iterate(graph)] == [[[1.0] * 3] * 2]
    assert backend.cuda_checked
    monkeypatch.setattr(backend, "cuda_checked", False)
    monkeypatch.setattr(backend, "GetCudaVersion", lambda: -1)
    with pytest.raises(Warning, match="GPU is not available"):  # which is worth a warning
        dali.iterate(sequence_graph(lambda: next(left), decoding=None, pads=False, **options))


NOT_INSTALLED = (
    "engine='dali' needs NVIDIA DALI, which is not installed: pip install 'dali-pipeline[cuda12]' or "
    "'dali-pipeline[cuda13]', whichever CUDA torch is built for; or give engine='torch'"
)


def test_without_dali_its_engine_is_refused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(20)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UsageError) as refused:
        dp.SequenceLoader(data)
    assert str(refused.value) == NOT_INSTALLED


@pytest.mark.slow
def test_without_dali_all_else_works(make: Any, tmp_path: Path) -> None:
    data = make(20)
    root, count = data.root, data.num_records("train", "sequences")
    assert count > 10
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['nvidia'] = None\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = (
        "import sys, dali_pipeline as dp\ndata = dp.open_dataset(sys.argv[1])\n"
        "loaders = dp.GraphLoader(data), dp.SequenceLoader(data, engine='torch')\n"
        "print(*(sum(int(batch.valid.sum()) for batch in loader) for loader in loaders))\n"
        "dp.SequenceLoader(data)\n"
    )
    options: dict[str, Any] = {"capture_output": True, "text": True, "env": environment, "cwd": ROOT}
    done = subprocess.run([sys.executable, "-c", code, str(root)], **options)
    assert done.stdout == f"{count} {count}\n"
    assert done.stderr.splitlines()[-1].endswith(NOT_INSTALLED)
    for more in ([], ["--quick"]):
        done = subprocess.run([sys.executable, "-m", "dali_pipeline", "versions", *more], **options)
        assert (done.returncode, done.stderr) == (2, f"dali_pipeline: {NOT_INSTALLED}\n")


def test_a_dali_that_cannot_be_imported_is_no_missing_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidia" / "dali").mkdir(parents=True)
    (tmp_path / "nvidia" / "__init__.py").touch()
    (tmp_path / "nvidia" / "dali" / "__init__.py").write_text("import astunparse_that_is_gone")
    for name in [name for name in sys.modules if name.split(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PipelineError, match=r"^nvidia-dali cannot be imported \(No module named 'astunparse_that_is_gone'\)"):
        dali.import_dali()


OLD_DRIVER = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver. "
    "Alternatively, go to: https://pytorch.org (Triggered internally at CUDAFunctions.cpp:109.)"
)


def test_a_driver_that_torch_cannot_use_is_named(monkeypatch: pytest.MonkeyPatch, make: Any, tmp_path: Path) -> None:
    def sees_none() -> bool:
        warnings.warn(OLD_DRIVER, stacklevel=1)
        return False

    data = make(20)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(nvidia.dali, "__cuda_version__", 12986)
    monkeypatch.setattr(torch.cuda, "is_available", sees_none)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # NVML's count, which needs no CUDA
    monkeypatch.setattr(machine, "driver_version", lambda: "470.82.01")
    monkeypatch.setattr(machine, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    versions.check_fit()  # no GPU is lent, as while an image is built
    (tmp_path / "nvidiactl").touch()
    versions.check_fit()
    (tmp_path / "nvidia0").touch()
    sentence = (
        f"there is a GPU that torch does not see: torch {torch.__version__} is a build for CUDA 12.6, the driver is 470.82.01, "
        "of which torch says: The NVIDIA driver on your system is too old (found version 11040); "
        "install a torch or a driver that fits"
    )
    with pytest.raises(PipelineError) as refused:
        versions.check_fit()
    assert str(refused.value) == sentence
    for loader in (dp.SequenceLoader, dp.GraphLoader):
        with pytest.raises(UsageError) as named:
            loader(data, device="cuda")
        assert str(named.value) == f"device is 'cuda', but {sentence}"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # who hides it has a reason
    versions.check_fit()
