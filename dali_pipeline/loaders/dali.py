"""Import NVIDIA DALI, name the CUDA version that it is built for, check that it fits torch, and run a pipeline."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dali_pipeline.errors import PipelineError, UsageError
from dali_pipeline.types import Array

if TYPE_CHECKING:
    import torch

EXTRAS = {12: "nvidia-dali-cuda120", 13: "nvidia-dali-cuda130"}  # wheels of the extras cuda12 and cuda13, in pyproject.toml
# DALI's warning if cuFFT, NPP or nvJPEG is missing; only operators for audio and images need them, and we use none of those
UNUSED_LIBRARIES = r"nvidia-dali\S* is no longer shipped with CUDA runtime"


def import_dali() -> ModuleType:
    """Return the module `nvidia.dali`; takes a second the first time.

    Raises:
        UsageError: DALI is not installed.
        PipelineError: DALI is installed and cannot be imported.
    """
    try:
        import nvidia.dali
    except ModuleNotFoundError as error:
        if error.name not in ("nvidia", "nvidia.dali"):
            raise not_imported("nvidia-dali", error) from error
        raise UsageError(
            "engine='dali' needs NVIDIA DALI, which is not installed: pip install 'dali-pipeline[cuda12]' or "
            "'dali-pipeline[cuda13]', whichever CUDA torch is built for; or give engine='torch'"
        ) from None
    except Exception as error:  # a library that is built for other versions may raise anything
        raise not_imported("nvidia-dali", error) from error
    dali: ModuleType = nvidia.dali
    return dali


def not_imported(name: str, error: Exception) -> PipelineError:
    """Return the error that says why a package cannot be imported."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return PipelineError(f"{name} cannot be imported ({reason}); expected it in {sys.prefix} or in the image")


def dali_cuda() -> int:
    """Return the major version of CUDA that DALI is built for; raises like `import_dali`."""
    return int(str(import_dali().__cuda_version__)[:2])  # 12986 stands for 12.9.86


def describe_dali() -> str:
    """Return DALI's version and its CUDA version in words; raises like `import_dali`."""
    return f"{import_dali().__version__} for CUDA {dali_cuda()}"


def check_dali() -> None:
    """Check that DALI is built for the same major version of CUDA as torch; accepts any DALI if torch has no CUDA.

    Raises:
        UsageError: DALI is not installed.
        PipelineError: DALI cannot be imported, or is built for another major version of CUDA than torch.
    """
    import torch

    torch_cuda = torch.version.cuda
    dali, cuda = import_dali(), dali_cuda()
    if torch_cuda is None or int(torch_cuda.partition(".")[0]) == cuda:
        return
    wanted = int(torch_cuda.partition(".")[0])
    versions = f"torch {torch.__version__} is built for CUDA {wanted}, DALI {dali.__version__} for CUDA {cuda}"
    if wanted not in EXTRAS:
        raise PipelineError(f"{versions}; expected torch and DALI for CUDA {' or '.join(map(str, EXTRAS))}")
    remedy = f"pip install 'dali-pipeline[cuda{wanted}]'"
    if cuda in EXTRAS:  # two wheels would overwrite each other's files
        remedy = f"pip uninstall {EXTRAS[cuda]}, then {remedy}"
    raise PipelineError(f"{versions}; expected one version: {remedy}")


def device_id(device: torch.device) -> int | None:
    """Return DALI's number of a GPU, or None for the CPU."""
    return (device.index or 0) if device.type == "cuda" else None


def pinned_samples(samples: Array) -> Any:
    """Return samples in pinned memory, (N, ...), in the form that DALI copies to a GPU at once, not twice as an array."""
    from nvidia.dali.backend import TensorListCPU

    return TensorListCPU(samples, is_pinned=True)


def iterate(pipeline: Any) -> Any:
    """Build a DALI pipeline with one output, and return an iterator over dictionaries with the key `sequences`."""
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", UNUSED_LIBRARIES)
        return DALIGenericIterator([pipeline], ["sequences"], size=-1, auto_reset=False, prepare_first_batch=False)
