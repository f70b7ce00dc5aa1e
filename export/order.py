"""An order: what of a model is to be exported, and how; checked when it is made."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from wanrt.config import WanSpec
from wanrt.engine.manifest import Precision
from wanrt.errors import UsageError
from wanrt.export.engine_set import source_digest
from wanrt.quant.policy import EightBit
from wanrt.weights.parts import Parts


@dataclass(frozen=True)
class Order:
    """What to export. `parts` None: graphs alone, of a released model that need not be here.

    `plain` is the precision of what is not quantised, `eight_bit` that of the blocks' products.
    `embed`: weights are within the graphs; else they lie beside them, unless `weights` is false.
    `engines`: those of TensorRT-RTX, with their graphs; else the graphs that ONNX Runtime runs, of
    every part, blocks and steps whole. `attention`: between the halves of a block stands an engine,
    not the native kernel.
    """

    spec: WanSpec
    parts: Parts | None
    plain: Precision
    eight_bit: EightBit | None = None
    embed: bool = False
    weights: bool = True
    engines: bool = False
    attention: bool = False

    def __post_init__(self) -> None:
        assert self.parts is not None or not (self.embed or self.weights), f"{self=}"
        if self.embed and self.spec.boundary is not None:
            raise UsageError("--embed takes the weights of one transformer; this model has two")
        if self.engines and self.embed:
            raise UsageError("engines of TensorRT-RTX take weights as inputs; leave --embed out")
        if self.engines and self.plain == "fp32":
            raise UsageError(
                "TensorRT-RTX has no attention in fp32; choose --precision bf16, fp16, int8 or fp8"
            )

        if self.attention and not self.engines:
            raise UsageError("--attention engine is for --engine tensorrt-rtx; leave it out")
        if self.attention and self.eight_bit is not None:
            raise UsageError(
                f"in {self.eight_bit} the native kernel attends, in eight bits; --attention engine "
                "goes with --precision bf16 or fp16"
            )

    @property
    def key(self) -> str:
        """What finished files depend on."""
        told = {"spec": asdict(self.spec), "plain": self.plain, "eight_bit": self.eight_bit}
        told |= {"embed": self.embed, "engines": self.engines, "source": source_digest()}
        told["attention"] = self.attention
        found = {} if self.parts is None else self.parts.found
        told["files"] = {name: _stamp(one.path) for name, one in found.items()}
        return json.dumps(told, sort_keys=True, default=str)


def _stamp(path: Path) -> list[object]:
    """What tells a file, or the shards beside an index, from what was there before."""
    files = sorted(path.parent.glob("*.safetensors")) if path.suffix == ".json" else []
    states = [file.stat() for file in (path, *files)]
    return [str(path.resolve()), [(state.st_size, state.st_mtime_ns) for state in states]]
