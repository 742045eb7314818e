"""Machine: what a training run runs on, and what about it is likely to be a mistake."""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
import shutil
import warnings
from pathlib import Path
from typing import Any

from dali_pipeline.runtime.container import allowed_cores, allowed_memory

DEVICES = Path("/dev")
NETWORK_FILE_SYSTEMS = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "ceph", "glusterfs", "beegfs", "afs", "9p"),
    *(f"fuse.{name}" for name in ("sshfs", "s3fs", "gcsfuse", "glusterfs", "juicefs", "rclone")),
)
LEAST_FILES, LEAST_SHARED, LEAST_FREE, LEAST_MEMORY = 1024, 1 << 30, 10 << 30, 1 << 30


def describe_machine(root: Path) -> dict[str, Any]:
    """Return facts about the machine, in JSON types; bytes unless another unit is named. Costs torch's import."""
    import torch

    seen = torch.cuda.is_available()  # the count may be the driver's, which includes GPUs that torch cannot use
    memory, memory_available = allowed_memory()
    return {
        "cores": allowed_cores(),
        "threads": torch.get_num_threads(),
        "memory": memory,
        "memory_available": memory_available,
        "shared_memory": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "free_disk": shutil.disk_usage(root).free,
        "file_system": file_system(root),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if seen else [],
        "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "gpu_in_machine": Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists(),
    }


def warnings_about(machine: dict[str, Any]) -> list[str]:
    """Return a sentence per fact that is likely to be a mistake; the absence of a GPU is none."""
    sentences = []
    if machine["gpu_in_machine"] and not machine["gpus"]:
        sentences.append(f"this machine has a GPU that torch does not see: {_why_unseen(machine)}")
    if machine["threads"] > math.ceil(machine["cores"]):
        sentences.append(
            f"torch computes with {machine['threads']} threads on {machine['cores']:g} allowed cores, which take turns; "
            f"set OMP_NUM_THREADS={math.ceil(machine['cores'])}"
        )
    if machine["memory_available"] < LEAST_MEMORY:
        free, total = machine["memory_available"] / 1e6, machine["memory"] / 1e6
        sentences.append(
            f"{free:,.0f} MB of {total:,.0f} MB of memory are to be had, and a loader takes up to window_bytes and 300 MB; "
            "give the container more, or the loader a smaller window_bytes"
        )
    if machine["shared_memory"] is not None and machine["shared_memory"] < LEAST_SHARED:
        size = machine["shared_memory"] / 1e6
        sentences.append(
            f"/dev/shm has {size:,.0f} MB, little for worker processes; start the container with --shm-size=1g or more"
        )
    if machine["open_files"] < LEAST_FILES:
        sentences.append(
            f"{machine['open_files']} files may be open at a time; with more shards than an eighth of that, raise `ulimit -n`"
        )
    if machine["file_system"] in NETWORK_FILE_SYSTEMS:
        sentences.append(
            f"the data lie on a network file system ({machine['file_system']}); a copy on a local disk reads faster"
        )
    if machine["free_disk"] < LEAST_FREE:
        sentences.append(f"{machine['free_disk'] / 1e9:.1f} GB of disk are free; checkpoints and a second encoding need some")
    return sentences


def _why_unseen(machine: dict[str, Any], words: str = "") -> str:
    if machine["cuda"] and machine["visible_gpus"] is not None:
        return f"CUDA_VISIBLE_DEVICES is {machine['visible_gpus']!r}; unset it, or name one that is there"
    build = f"a build for CUDA {machine['cuda']}" if machine["cuda"] else "a build without CUDA"
    says = f", of which torch says: {words}" if words else ""
    return (
        f"torch {machine['torch']} is {build}, the driver is {machine['driver']}{says}; install a torch or a driver that fits"
    )


def unusable_gpu() -> str | None:
    """Return why torch, built for CUDA, cannot use the GPU of this machine or container; None if nothing is wrong.

    Nothing is wrong without such a GPU, for example while an image is built, or if CUDA_VISIBLE_DEVICES chooses. Opens no CUDA
    context.
    """
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None or visible is not None or not any(DEVICES.glob("nvidia[0-9]*")):
        return None
    with warnings.catch_warnings(record=True) as caught:  # torch reports a driver problem once per process
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    messages = [str(warning.message).removeprefix("CUDA initialization: ").partition(". ")[0] for warning in caught]
    facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "driver": driver_version(), "visible_gpus": visible}
    return f"there is a GPU that torch does not see: {_why_unseen(facts, messages[0] if messages else '')}"


def file_system(root: Path) -> str | None:
    """Return the type of the file system that `root` is on, or None if the system does not tell."""
    folder = root.resolve()
    with contextlib.suppress(OSError):
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
        mount_points = [(point.replace("\\040", " "), kind) for point, kind in mounts]
        return max(((len(point), kind) for point, kind in mount_points if folder.is_relative_to(point)), default=(0, None))[1]
    return None


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, or None."""
    with contextlib.suppress(OSError):
        return next(iter(re.findall(r"\b\d+\.\d+(?:\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())), None)
    return None
