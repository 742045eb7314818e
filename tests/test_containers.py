"""The images, tried without an engine: sources, lint, compose, and the CPU image's own steps in a clean folder."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dali_pipeline import PipelineError
from dali_pipeline.cli import versions

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def instructions(stage: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of one stage."""
    found: list[tuple[str, str]] = []
    current = ""
    for line in DOCKERFILE.splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            current = rest.rpartition(" AS ")[2]
        elif current == stage and word.isupper():
            found.append((word, rest))
    assert found
    return found


def ignored(path: str) -> bool:
    """Return what .dockerignore leaves, whose patterns here are plain names."""
    patterns = (ROOT / ".dockerignore").read_text().split()
    return any(
        fnmatch.fnmatch(part, pattern.removeprefix("**/")) for pattern in patterns for part in (path, path.split("/")[0])
    )


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_every_source_is_there_and_sent(stage: str) -> None:
    copied = [source for word, rest in instructions(stage) if word == "COPY" for source in rest.split()[:-1]]
    assert "Makefile" in copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert source == "." or not ignored(source), source
    for needed in (
        "dali_pipeline/format/schema.py",
        "models/lstm.py",
        "training/run.py",
        "train.py",
        "README.md",
        "tests/conftest.py",
    ):
        assert not ignored(needed)
    assert ignored("data/traces")
    assert ignored(".venv/bin/python")


def test_images_are_pinned_and_run_as_someone_without_rights() -> None:
    assert re.search(r"^ARG NVIDIA_TAG=\d\d\.\d\d-py3$", DOCKERFILE, re.MULTILINE)
    assert re.search(r"^ARG PYTHON_TAG=3\.11-slim-\w+$", DOCKERFILE, re.MULTILINE)
    for stage in ("cpu", "gpu"):
        words = dict(instructions(stage))
        assert words["USER"] == "10001"
        assert words["ENTRYPOINT"] == '["python", "train.py"]'


def test_hadolint_has_nothing_to_say() -> None:
    found = subprocess.run([Path(sys.executable).with_name("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


def test_compose_gives_what_training_needs() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    train = services["train"]
    assert train["gpus"] == "all"
    assert "entrypoint" not in services["train-cpu"]  # the image's own, one process
    for service in services.values():
        assert service["shm_size"] == "8gb"
        assert service["healthcheck"]["test"] == ["CMD", "python", "-m", "dali_pipeline", "versions", "--quick"]
        assert f" AS {service['build']['target']}\n" in DOCKERFILE


def test_compose_starts_a_process_for_each_gpu_in_the_project_environment(tmp_path: Path) -> None:
    """With arguments behind the entry point, as `docker compose run train --data …` gives them; two processes for the GPUs."""
    entry = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["train"]["entrypoint"]
    assert entry[:3] == ["python", "-m", "torch.distributed.run"]  # an image's torchrun belongs to another Python
    assert entry[entry.index("--nproc-per-node") + 1] == "gpu"
    assert entry[-1] == "train.py"
    (tmp_path / "train.py").write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "Path('rank-' + os.environ['RANK']).write_text(' '.join([os.environ['WORLD_SIZE'], sys.prefix, *sys.argv[1:]]))\n"
    )
    command = [sys.executable, *("2" if word == "gpu" else word for word in entry[1:]), "--data", "data/traces"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    expected = f"2 {sys.prefix} --data data/traces"
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == [expected] * 2


def test_the_health_check_is_cheap_and_looks_at_no_data() -> None:
    """Seconds with a wide margin, as other tests run beside it; what it does not import is what would take them."""
    code = (
        "import sys, resource\nfrom dali_pipeline.cli.app import app, run\n"
        "sys.argv[1:] = ['versions', '--quick']\ncode = run(app, 'dali_pipeline')\n"
        "print(code, sorted({'torch_geometric', 'sklearn', 'pyarrow', 'training.build'} & set(sys.modules)))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    *rows, said, told, seconds = done.stdout.splitlines()
    assert [row.split()[0] for row in rows] == list(versions.QUICK)
    assert said == "fits: NumPy, torch, DALI and the driver; nothing was run"
    assert told == "0 []"
    assert float(seconds) < 10


def test_an_image_keeps_its_own_frameworks() -> None:
    steps = {
        own: subprocess.run(
            ["make", "--dry-run", "--always-make", ".venv/.installed", *own],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for own in ((), ("FRAMEWORKS=image",))
    }
    assert "-r requirements-frameworks.txt -r requirements-base.txt" in steps[()]
    assert "-r requirements-cuda" in steps[()]
    assert "-r requirements-frameworks.txt" not in steps["FRAMEWORKS=image",]
    assert "-r requirements-cuda" not in steps["FRAMEWORKS=image",]
    assert "--system-site-packages" not in steps[()]
    assert "-r requirements-base.txt" in steps["FRAMEWORKS=image",]
    assert "venv --system-site-packages" in steps["FRAMEWORKS=image",]
    left_out = {line.split("==")[0] for line in (ROOT / "requirements-base.txt").read_text().splitlines() if "==" in line}
    assert not left_out & {"torch", "numpy", "nvidia-dali-cuda120", "nvidia-dali-cuda130"}
    assert "safetensors" in left_out


@pytest.mark.slow
def test_versions_says_what_is_here_and_that_it_serves() -> None:
    done = subprocess.run([sys.executable, "-m", "dali_pipeline", "versions"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-2]] == list(versions.FRAMEWORKS)
    for line in lines[:-2]:
        _, found, *_, tried = line.split()
        assert found.split("+")[0] == tried  # here both are the pinned ones
    assert lines[-2].startswith("serves: ")
    assert lines[-1].startswith("trains: an LSTM and a graph convolution took a step on ")


def test_versions_names_what_does_not_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "nvidia"
    (broken / "dali").mkdir(parents=True)
    (broken / "__init__.py").touch()
    (broken / "dali" / "__init__.py").write_text("raise OSError('libcudart.so.99: cannot open shared object file')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "dali_pipeline", "versions"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 2
    assert "nvidia-dali cannot be imported (libcudart.so.99: cannot open shared object file)" in done.stderr
    assert "Traceback" not in done.stderr
    monkeypatch.setattr("torch.equal", lambda *_: False)
    expected = "engine='torch' on cpu does not give what was written; expected the same 8 records"
    with versions.written_records() as written, pytest.raises(PipelineError, match=expected):
        versions.check_loaders(*written)


@pytest.mark.slow
def test_the_cpu_image_builds_in_a_clean_folder(tmp_path: Path) -> None:
    """Its COPY and make lines, in order, and then its entry point; system packages and users are the image's own affair."""
    app = tmp_path / "app"
    app.mkdir()
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    keep = ("PATH", "HOME", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONFIG_FILE", "SSL_CERT_FILE")
    environment = {name: os.environ[name] for name in keep if name in os.environ}
    environment |= {"PYTHON": "python3.11", "PATH": f"{app}/.venv/bin:{environment['PATH']}"}
    ran = []
    for word, rest in instructions("cpu"):
        if word == "COPY":
            *sources, _ = rest.split()
            for file in files:
                if (file in sources or sources == ["."]) and not ignored(file):
                    (app / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / file, app / file)
        elif word == "RUN" and rest.startswith("make"):
            subprocess.run(["bash", "-c", rest], cwd=app, env=environment, check=True)
            ran.append(rest)
    assert len(ran) == 2
    entry = ["python", "train.py", "--help"]
    done = subprocess.run(entry, cwd=app, env=environment, capture_output=True, text=True, check=True)
    assert "--preprocessed-dir" in done.stdout
