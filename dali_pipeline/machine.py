"""Machine: what a training run has to live with, and what about it is likely to be a mistake."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import psutil

NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "lustre", "glusterfs", "ceph", "fuse.sshfs", "fuse.s3fs", "9p", "beegfs")
LEAST_FILES, LEAST_SHARED, LEAST_FREE = 1024, 1 << 30, 10 << 30


def describe_machine(root: Path) -> dict[str, Any]:
    """Facts, in JSON types; bytes where no other unit is named. Costs microseconds, but for torch's import."""
    import torch

    memory = psutil.virtual_memory()
    return {
        "cores": allowed_cores(),
        "memory": memory.total,
        "memory_available": memory.available,
        "shared_memory": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "free_disk": shutil.disk_usage(root).free,
        "file_system": file_system(root),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "gpu_in_machine": Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists(),
    }


def warnings_about(machine: dict[str, Any]) -> list[str]:
    """A sentence for each thing that is likely to be a mistake; that there is no GPU is none."""
    found = []
    if machine["gpu_in_machine"] and not machine["gpus"]:
        build = f"a build for CUDA {machine['cuda']}" if machine["cuda"] else "a build without CUDA"
        found.append(
            f"this machine has a GPU that torch does not see; torch {machine['torch']} is {build}, so install one that fits"
        )
    if machine["shared_memory"] is not None and machine["shared_memory"] < LEAST_SHARED:
        size = machine["shared_memory"] / 1e6
        found.append(
            f"/dev/shm has {size:,.0f} MB, little for worker processes; start the container with --shm-size=1g or more"
        )
    if machine["open_files"] < LEAST_FILES:
        found.append(
            f"{machine['open_files']} files may be open at a time; with more shards than an eighth of that, raise `ulimit -n`"
        )
    if machine["file_system"] in NETWORK_FILE_SYSTEMS:
        found.append(f"the data lie on a network file system ({machine['file_system']}); a copy on a local disk reads faster")
    if machine["free_disk"] < LEAST_FREE:
        found.append(f"{machine['free_disk'] / 1e9:.1f} GB of disk are free; checkpoints and a second encoding need some")
    return found


def allowed_cores() -> float:
    """Those that this process may run on, as its container limits them."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    return cores


def file_system(root: Path) -> str | None:
    """The type of the one that `root` is on, where the system tells."""
    here = root.resolve()
    with contextlib.suppress(OSError):
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
        on = [(point.replace("\\040", " "), kind) for point, kind in mounts]
        return max(((len(point), kind) for point, kind in on if here.is_relative_to(point)), default=(0, None))[1]
    return None


def driver_version() -> str | None:
    """Of the NVIDIA driver."""
    with contextlib.suppress(OSError):
        return next(iter(re.findall(r"\b\d+\.\d+(?:\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())), None)
    return None
