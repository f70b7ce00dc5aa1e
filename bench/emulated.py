"""The kernels that a card gets, tested without any card: a pytest plugin.

    python3 -m pytest -p wanrt.bench.emulated --as-arch 89 --noconftest tests/test_ops.py \
        -k matches_reference

Triton compiles as for that card; what it made, its PTX, runs in NumPy on tensors of the CPU
(`emulator/`). So what is tested is all that stands between a kernel's Python and a card's driver:
the compiler, and the tiles, casts and products of that architecture, none of which Triton's
interpreter has. It says nothing of time.
"""

import pytest
import torch
from triton.runtime import driver

from wanrt.bench.compile import CompilingDriver
from wanrt.bench.emulator.launch import execute
from wanrt.kernels import registry
from wanrt.kernels.launch import INTERPRETING, stand_in
from wanrt.kernels.target import Target

ARCH = 89


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--as-arch", type=int, default=ARCH, help="Compute capability, as 89.")


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETING:
        raise pytest.UsageError("TRITON_INTERPRET is set; unset it to compile kernels")
    arch = config.getoption("--as-arch")
    driver.set_active(CompilingDriver(arch))
    registry.here = lambda dtype, device="auto", result=None: Target("cuda", arch, dtype, result)
    emulated = stand_in(arch, execute)
    emulated.__enter__()
    config.add_cleanup(lambda: emulated.__exit__(None, None, None))
    torch.set_num_threads(1)
