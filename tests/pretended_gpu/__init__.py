"""A pretended GPU: the code's GPU branches run on a machine without one, and every wait, copy and kernel is counted.

Tensors say `cuda:0`, compute on the CPU and refuse to meet tensors of the CPU. It cannot show races between kernels, DALI's
C++ graph, rounding on a GPU, cuDNN's speed. What it does show: what would wait for the GPU, what would be copied from pageable
memory, how many kernels a step launches, copies that are read before they are there, and pinned memory that is written to
while a copy from it is under way.
"""

from tests.pretended_gpu.cuda import pretended_gpu
from tests.pretended_gpu.log import Log

__all__ = ["Log", "pretended_gpu"]
