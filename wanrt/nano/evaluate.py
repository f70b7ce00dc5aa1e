"""Ask nano for held-out prompts, read the clips back with the scorer, count what agrees.

python -m wanrt.nano.evaluate --prompts 256
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wanrt.nano.language import ATTRIBUTES, Scene, held_out_prompts
from wanrt.nano.scorer import Reading, agreement, score
from wanrt.nano.sheet import contact_sheet
from wanrt.pipeline import Pipeline


@dataclass(frozen=True)
class Trial:
    """One prompt, the clip `[F, H, W, 3]` it gave and what the scorer saw in it."""

    scene: Scene
    frames: np.ndarray
    reading: Reading

    @property
    def agrees(self) -> dict[str, bool]:
        """Per attribute given in the prompt."""
        answer = agreement(self.scene, self.reading)._asdict()
        return {name: value for name, value in answer.items() if value is not None}


@dataclass(frozen=True)
class Tally:
    """Shares of agreement: of every attribute at once, and of each."""

    num_prompts: int
    every: float
    each: dict[str, float]


def trials(pipe: Pipeline, scenes: list[Scene], seed: int, **settings: Any) -> Iterator[Trial]:
    """Generate and read one clip per scene; prompt i uses `seed + i`."""
    for i, scene in enumerate(scenes):
        frames = pipe.generate(scene.caption(), seed=seed + i, **settings).np
        yield Trial(scene, frames, score(frames))


def tally(done: list[Trial]) -> Tally:
    """Count over at least one trial."""
    answers = [trial.agrees for trial in done]
    each = {
        name: float(np.mean([a[name] for a in answers if name in a]))
        for name in ATTRIBUTES
        if any(name in a for a in answers)
    }
    return Tally(len(done), float(np.mean([all(a.values()) for a in answers])), each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--size", type=int)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first 16 clips")
    args = parser.parse_args()
    pipe = Pipeline.load(args.model, precision=args.precision)
    settings = {"num_steps": args.steps, "guidance": args.guidance}
    settings |= {"width": args.size, "height": args.size}
    done = list(trials(pipe, held_out_prompts(args.prompts), args.seed, **settings))
    result = tally(done)
    print(json.dumps({"prompts": result.num_prompts, "all": result.every, **result.each}))
    if args.sheet:
        shown = done[:16]
        captions = [trial.scene.caption() for trial in shown]
        contact_sheet([trial.frames for trial in shown], args.sheet, captions)


if __name__ == "__main__":
    main()
