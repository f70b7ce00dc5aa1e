"""The emulator of PTX: the kernels that a card gets compute the reference, and faults are found."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from wanrt.bench.emulator import rounding
from wanrt.bench.emulator.instructions import load
from wanrt.bench.emulator.machine import Work, run
from wanrt.bench.emulator.memory import GlobalMemory
from wanrt.bench.emulator.program import EmulatorError
from wanrt.bench.emulator.traffic import sectors, wavefronts

SOME = "setp.lt.u32 	%p1, %r2, 40;\n\t"  # lanes
ROOT = Path(__file__).resolve().parent.parent
HEAD = """
.version 8.8
.target sm_89
.visible .entry _kernel(
	.param .u64 .ptr .global .align 1 p0,
	.param .u32 p1
)
.reqntid 64
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<99>;
	.reg .b64 	%rd<9>;
	.loc	1 7 0                         // kernel.py:7:0
	ld.param.b64 	%rd1, [p0];
	ld.param.b32 	%r1, [p1];
	mov.u32 	%r2, %tid.x;
	mul.wide.u32 	%rd2, %r2, 4;
	add.s64 	%rd3, %rd1, %rd2;
"""


def emulate(body: str, result: Tensor, number: int = 0, blocks: int = 1) -> Tensor:
    """64 threads; %rd1 is the result's address, %rd3 each thread's 32-bit word of it."""
    program, steps = load(f"{HEAD}{body}\n\tret;\n}}\n")
    values = {"p0": struct.pack("Q", result.data_ptr()), "p1": struct.pack("i", number)}
    work = Work((blocks, 1, 1), 64, 4096, values, GlobalMemory([result]))
    run(program, steps, work)
    return result


def words(count: int = 64) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)


@pytest.mark.parametrize("arch", [89])
def test_what_a_card_gets_computes_the_reference(arch: int, tmp_path: Path) -> None:
    """Not fp32 and fp16: they are the same kernels, and compiling takes its time."""
    pytest.importorskip("triton", reason="Triton has no build for this system")
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "wanrt.bench.emulated", "--noconftest"]
    chosen = "matches_reference and (triton-bfloat16 or triton-int8 or triton-float8) or every_bit"
    files = [str(ROOT / "tests" / name) for name in ("test_ops.py", "test_ops_quantized.py")]
    command += ["--as-arch", str(arch), "-k", chosen, *files]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 100


def test_quick_convolutions_leave_shared_memory_time(tmp_path: Path) -> None:
    """It gives four turns in the time of a product of s8; three would leave little beside them."""
    pytest.importorskip("triton", reason="Triton has no build for this system")
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "wanrt", "bench", "traffic", "--only", "causal_conv3d_int8-96"]
    done = subprocess.run([*command, "--json"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    products = [row for row in rows if row["kernel"] == "conv_int8_kernel"]
    assert products
    for row in products:
        assert row["least_turns"] <= row["turns"] < 2.5 * row["products"], row


LANES = np.arange(32)


@pytest.mark.parametrize(
    ("places", "size", "turns", "least"),
    [
        (LANES * 4, 4, 1, 1),
        (LANES * 0, 4, 1, 1),  # one word for all
        (LANES * 8, 4, 2, 1),
        (LANES * 128, 4, 32, 1),
        (LANES * 16, 16, 4, 4),  # quarter warps, each of all banks
        (LANES * 32, 16, 8, 4),
        (LANES * 8, 8, 2, 2),
        (LANES, 1, 1, 1),
    ],
)
def test_turns_of_shared_memory(places: np.ndarray, size: int, turns: int, least: int) -> None:
    assert wavefronts(places, size, np.ones(32, bool)) == (turns, least)


@pytest.mark.parametrize(
    ("places", "size", "touched", "least"),
    [(LANES * 4, 4, 4, 4), (LANES * 4 + 16, 4, 5, 4), (LANES * 32, 4, 32, 4), (LANES * 0, 4, 1, 1)],
)
def test_sectors(places: np.ndarray, size: int, touched: int, least: int) -> None:
    assert sectors(places, size, np.ones(32, bool)) == (touched, least)
    assert sectors(places, size, LANES < 8)[0] <= touched


def test_lanes_part_and_meet() -> None:
    """Thread n adds up n + 1 ones: each leaves the loop in its own turn."""
    body = """
	mov.b32 	%r3, 0;
$L__BB0_1:                              // =>This Inner Loop
	add.s32 	%r3, %r3, 1;
	setp.le.s32 	%p1, %r3, %r2;
	@%p1 bra 	$L__BB0_1;
// %bb.2:
	bar.sync 	0;
	st.global.b32 	[%rd3], %r3;"""
    assert emulate(body, words()).tolist() == list(range(1, 65))


def test_neighbours_are_seen_through_shared_memory() -> None:
    body = """
	shl.b32 	%r3, %r2, 2;
	mov.b32 	%r4, global_smem;
	add.s32 	%r5, %r4, %r3;
	st.shared.b32 	[%r5], %r2;
	bar.sync 	0;
	xor.b32 	%r6, %r5, 4;
	ld.shared.b32 	%r7, [%r6];
	st.global.b32 	[%rd3], %r7;"""
    assert emulate(body, words(), blocks=3).tolist() == [n ^ 1 for n in range(64)]


def test_a_copy_is_there_when_it_was_waited_for() -> None:
    body = """
	shl.b32 	%r3, %r2, 2;
	cp.async.ca.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x4;
	cp.async.commit_group;
	WAIT
	ld.shared.b32 	%r4, [%r3];
	add.s32 	%r4, %r4, 1;
	st.global.b32 	[%rd3], %r4;"""
    waited = emulate(body.replace("WAIT", "cp.async.wait_group 	0;"), words() + 5)
    early = emulate(body.replace("WAIT", "cp.async.wait_group 	1;"), words() + 5)
    assert waited.tolist() == [6] * 64
    assert early.tolist() == [0] * 64  # what shared memory held before, all ones, and one


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (
            "add.s64 	%rd3, %rd3, 4;\n\tst.global.b32 	[%rd3], %r2;",
            "4 bytes at 256 of a memory",
        ),
        ("ld.global.b32 	%r3, [%rd3+-4];", "before every tensor"),
        ("ld.global.v2.b32 	{%r3, %r4}, [%rd3];", "not aligned"),
        ("ld.shared.b32 	%r3, [%r2];", "not aligned"),
        ("mov.b32 	%r3, 4096;\n\tst.shared.b32 	[%r3], %r2;", "4 bytes at 4096 of a memory"),
        (f"{SOME}@%p1 bar.sync 	0;", "only a part of a thread block"),
        (f"{SOME}@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r3}}, [%r4];", "part of a warp"),
        ("ld.b32 	%r3, [%rd3];", "generic addresses are not emulated"),
        ("tanh.approx.f32 	%r3, %r2;", "not emulated"),
    ],
)
def test_faults_name_the_line(body: str, fault: str) -> None:
    with pytest.raises(EmulatorError, match=fault) as error:
        emulate(f"\t{body}", words())
    assert "kernel.py:7" in str(error.value) or "not emulated" in str(error.value)


VALUES = torch.cat(
    [
        torch.linspace(-500, 500, 4001),
        torch.linspace(-0.04, 0.04, 4001),
        torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 1e-5,
        torch.tensor([0.0, -0.0, 448.0, 464.0, 65504.0, torch.inf, -torch.inf, torch.nan]),
    ]
)


def test_rounding_is_pytorchs() -> None:
    x = VALUES.numpy()
    finite = VALUES[VALUES.abs() <= 448]
    fp8 = torch.from_numpy(rounding.to_e4m3(finite.numpy())).view(torch.float8_e4m3fn)
    assert torch.equal(fp8.view(torch.uint8), finite.to(torch.float8_e4m3fn).view(torch.uint8))
    back = rounding.from_e4m3(fp8.view(torch.uint8).numpy())
    assert np.array_equal(back, fp8.float().numpy())
    bf16 = torch.from_numpy(rounding.to_bf16(x).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(bf16.nan_to_num(7), VALUES.to(torch.bfloat16).nan_to_num(7))
    assert rounding.to_e4m3(np.float32([500, -500, np.inf, np.nan])).tolist() == [
        126,
        254,
        126,
        127,
    ]


def test_rounding_towards_zero() -> None:
    x = VALUES[VALUES.abs() < 65504].numpy()
    held = rounding.to_fp16(x, "rz").astype(np.float32)
    assert (np.abs(held) <= np.abs(x)).all()
    assert (
        np.abs(rounding.to_fp16(x, "rn").astype(np.float32) - held) <= np.abs(x - held) * 2
    ).all()
    assert rounding.to_fp16(np.float32([70000.0]), "rz").tolist() == [65504]
