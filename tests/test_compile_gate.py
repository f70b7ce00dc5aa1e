"""The compile gate: every kernel of the op table compiles for every card, and faults are found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this system")

from wanrt.bench import compile as gate
from wanrt.bench import sass
from wanrt.kernels import registry
from wanrt.kernels.cases import all_cases
from wanrt.kernels.launch import Mma

CONSUMER = (86, 89, 120)
# Instructions to a product of a convolution that keeps a tensor core busy for 16 cycles there.
MOST = 7
ROOT = Path(__file__).resolve().parent.parent
TRITON_OPS = [name for name, row in registry.OPS.items() if row.triton]


def test_every_kernel_compiles_as_it_is_meant(tmp_path: Path) -> None:
    """In a process of its own: the interpreter, which the other tests use, cannot compile."""
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "wanrt", "bench", "compile", "--json"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["arch"] for row in rows} == set(gate.ARCHS)
    assert all(row["registers"] > 0 for row in rows)
    quick = [row for row in rows if row["arch"] in CONSUMER and "conv" in row["kernel"]]
    quick = [row for row in quick if row["mma"] in (["s8->s32"], ["f16->f16"])]
    assert {row["arch"] for row in quick} == set(CONSUMER)
    for row in quick:
        assert row["loop"]["instructions"] < MOST * row["loop"]["products"], row
    named = (ROOT / "docs" / "compiled.md").read_text("utf-8")
    for kernel in {row["kernel"] for row in rows}:
        assert f"`{kernel}`" in named, (
            "docs/compiled.md is old: make it with wanrt bench compile -o"
        )


def test_fp8_attention_compiles_as_it_is_meant(tmp_path: Path) -> None:
    """Every fp8 product starts from a constant: what came before is added in fp32, not in it.

    And no byte of its operands is moved in registers (prmt): they lie as the product wants them.
    """
    program = """
import torch
from triton.runtime import driver
from wanrt.bench import compile as gate
from wanrt.kernels.cases import all_cases
driver.set_active(gate.CompilingDriver(89))
*_, last = gate.launches(all_cases()["attention_int8_fp8-1.3B-480p"], 89, torch.bfloat16)
code = last.kernel.warmup(*last.args, grid=last.grid, **last.options).asm
print(code["ttgir"], code["ptx"])
"""
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    products = [line for line in done.stdout.splitlines() if "tt.dot " in line and "f8E4" in line]
    assert len(products) == 2  # the whole blocks, the last
    for product in products:
        first_sum = product.split("tt.dot ")[1].split(",")[2].split()[0]
        assert first_sum.startswith("%cst"), product
    assert "mma.sync" in done.stdout and "prmt" not in done.stdout


SAME_CODE = """
import sys
from pathlib import Path
from triton.runtime import driver
from wanrt.bench import compile as gate
from wanrt.kernels import registry
from wanrt.kernels.cases import all_cases
from wanrt.kernels.launch import Launch, record

ARCH = 89
driver.set_active(gate.CompilingDriver(ARCH))

def key(launch: Launch) -> str:
    binder = launch.kernel.device_caches[ARCH][-1]
    _, kinds, options = binder(*launch.args, debug=False, **launch.options)
    return f"{launch.kernel.fn.__qualname__} {kinds} {options}"

def files() -> int:
    return len(list(Path(sys.argv[1]).rglob("*.cubin")))

jobs = gate.jobs([ARCH], "", size="small")
compiled = {key(gate._launch(job)) for job in jobs}
asked, some = set(), []
for case in all_cases().values():
    for dtype in case.dtypes if case.size == "small" else ():
        if gate.launches(case, ARCH, dtype):
            with record(ARCH) as found:  # tensors that have memory
                registry.function(case.op, "triton")(*case.draw(dtype), **case.kwargs)
            asked |= set(map(key, found))
            some += found if case.op == "rms_norm" else []
print(len(asked) > 200, asked == compiled)
print(all(gate.warm_job(job) for job in jobs if job.case.startswith("rms_norm-")), files())
for launch in some:
    launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
print(len(some), files())
"""


def test_what_tests_start_was_compiled_before(tmp_path: Path) -> None:
    """Triton asks for the same code with tensors in memory as with those of the meta device."""
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", SAME_CODE, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    keys, first, second = done.stdout.splitlines()
    assert keys == "True True"
    compiled, files = first.split()
    assert compiled == "True" and second.split()[1] == files and int(files) > 2


@pytest.mark.parametrize("name", TRITON_OPS)
def test_every_op_is_compiled_and_interpreted(name: str) -> None:
    sizes = {case.size for case in all_cases().values() if case.op == name}
    assert sizes == {"small", "wan"}


MEANT = (Mma("f16", "f16"),)


def test_loops() -> None:
    """The inner one of two, with a predicate before its jump; a jump ahead is no loop."""
    code = """
.L_x_0:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/                   IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4 ;
        /*0050*/              @!UP1 BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/               @P2 BRA.U `(.L_x_0) ;
        /*0070*/                   EXIT ;
"""
    assert list(sass.loops(code)) == [sass.Loop(4, 2), sass.Loop(6, 2)]


@pytest.mark.parametrize(
    ("found", "spilled", "shared", "fault"),
    [
        (set(MEANT), 0, 99 << 10, None),
        (set(MEANT), 8, 0, "spills 8 bytes"),
        (set(MEANT), 0, (99 << 10) + 1, "101377 bytes of shared memory; sm_89 has 101376"),
        ({Mma("f16", "f32")}, 0, 0, "meant: f16->f16; compiled: f16->f32"),
        (set(), 0, 0, "meant: f16->f16; compiled: none"),
    ],
)
def test_faults(found: set[Mma], spilled: int, shared: int, fault: str | None) -> None:
    faults = list(gate._faults(MEANT, found, spilled, shared, 89))
    assert faults == [] if fault is None else fault in faults[0]


@pytest.mark.parametrize(
    ("line", "mma"),
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {", Mma("bf16", "f32")),
        ("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {", Mma("f16", "f16")),
        ("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {", Mma("s8", "s32")),
        ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {", Mma("e4m3", "f32")),
        ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {", Mma("bf16", "f32")),
        ("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {", Mma("s8", "s32")),
    ],
)
def test_products_are_read_from_ptx(line: str, mma: Mma) -> None:
    ((accumulator, operand),) = gate._MMA.findall(line)
    assert Mma(operand, accumulator) == mma
