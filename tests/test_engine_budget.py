"""A request whose blocks graphs compute, under a budget: its plan, its latents, its memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_files import write_engines
from onnx_graphs import TracedGraphs

from wanrt.config import NANO
from wanrt.engine.bundle import Host
from wanrt.engine.opened import Engine
from wanrt.errors import BudgetError
from wanrt.export import dit as parts
from wanrt.memory.meter import metered
from wanrt.memory.plan import Plan

CPU = torch.device("cpu")
WORKSPACE = 3 << 20
SMALL = 2 << 20  # as in test_budget.py
NAMES = ("dit.pre", "dit.post", "dit.head")
SIZE = {"width": 64, "height": 64, "num_frames": 9, "num_steps": 2, "seed": 3}


class PlannedOnCpu(TracedGraphs):
    """Graphs that ONNX Runtime computes; they note what plan they were told to keep."""

    host = Host("tensorrt-rtx", "1.7.1.116", 89)

    def __init__(self) -> None:
        empty = parts.empty(NANO.dit, torch.float32)
        super().__init__(p for p in parts.parts(empty, torch.float32) if p.name in NAMES)
        self.limits: list[int] = []
        self.released = 0
        for name in NAMES:
            self.get(name)  # nobody traces while memory is measured

    def limit(self, num_bytes: int) -> None:
        self.limits.append(num_bytes)

    def release(self) -> None:
        self.released += 1


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path: Path = tmp_path_factory.mktemp("engines") / "bundle"
    bundle = write_engines(NANO, path, dict.fromkeys(NAMES, WORKSPACE), plain="fp32")
    return Engine("tensorrt-rtx", bundle, PlannedOnCpu())


def latents_of(pipe: Any) -> tuple[torch.Tensor, Plan, int]:
    with metered(CPU) as meter:
        run = pipe.start("a red circle", **SIZE)
        latents = pipe.denoise(run)
    return latents, run.plan, meter.peak


@pytest.mark.parametrize("vram,streams", [("64G", False), ("33M", True)])
def test_a_request_with_engines_keeps_its_plan(
    vram: str, streams: bool, zoo: Any, engine: Engine
) -> None:
    """Blocks that stream bring the weights of each call; ONNX Runtime's own memory is not seen."""
    expected = zoo.open("nano").generate("a red circle", output="latents", **SIZE)
    pipe, graphs = zoo.open("nano", vram=vram), engine._graphs
    pipe.components.engine, released = engine, graphs.released
    latents, plan, measured = latents_of(pipe)
    assert ((latents - expected).norm() / expected.norm()).item() < 1e-4
    assert bool(plan.placement("step").slots) == streams
    assert plan.workspace == graphs.limits[-1] == WORKSPACE
    assert measured <= plan.peak - WORKSPACE + SMALL
    assert plan.keep or graphs.released > released


def test_loras_are_refused_where_blocks_stream(zoo: Any, engine: Engine) -> None:
    """A side branch is nothing that an engine would see."""
    pipe = zoo.open("nano", vram="33M")
    pipe.components.engine = engine
    question = pipe.start("a", **SIZE).plan.question
    pipe.components.clear()
    pipe.components.plan = None
    pipe.components.loras = ("a LoRA",)
    pipe.components.lora_bytes = lambda loras=(): 0
    with pytest.raises(BudgetError, match="some stream; what would do: --vram") as error:
        pipe.start("a", **SIZE)
    assert question.least_resident() > 33 << 20, str(error.value)
