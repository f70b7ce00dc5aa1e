"""The kernels that a smaller card gets, tested on the card that is here: a pytest plugin.

    python3 -m pytest -p wanrt.bench.consumer --as-arch 89 --noconftest tests/test_ops.py

A data-centre GPU gets other code than a GeForce: other matrix instructions, larger tiles, more
shared memory. But every card runs the PTX of an older one, which its driver translates
(cuModuleLoadData). So what the kernels of a 4070 compute is seen without one. How long they take
here says nothing about it.
"""

from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler.compiler import CompiledKernel

ARCH = 89


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--as-arch", type=int, default=ARCH, help="Compute capability, as 89.")


def pytest_configure(config: pytest.Config) -> None:
    pretend(config.getoption("--as-arch"))


def pretend(arch: int) -> None:
    """From here on this process compiles and chooses tiles for `arch`, and loads PTX."""
    capability, target = divmod(arch, 10), GPUTarget("cuda", arch, 32)
    CudaDriver.get_current_target = lambda self: target
    torch.cuda.get_device_capability = lambda device=None: capability
    make = CompiledKernel.__init__

    def make_of_ptx(self: CompiledKernel, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.kernel = self.asm["ptx"].encode()

    CompiledKernel.__init__ = make_of_ptx
