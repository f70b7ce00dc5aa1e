"""LoRAs as users name them, and the settings that some are made for; no file is opened."""

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from wanrt.config import Lora
from wanrt.errors import UsageError

log = logging.getLogger("wanrt")

MAX_LORAS = 64
MAX_STRENGTH = 100.0
_DISTILLED_NAME = re.compile(r"lightx2v|lightning|\d[-_ ]?steps?|distill|causvid|fusionx", re.I)


class Preset(NamedTuple):
    """What a step-distilled LoRA was made for (wan-spec 6.8); all run without guidance."""

    num_steps: int
    flow_shift: float | None = None  # None: the model's own
    fixed_steps: bool = False  # the list of timesteps that lightx2v trains on


PRESETS = {
    "lightx2v-4step": Preset(4, 5.0, fixed_steps=True),
    "causvid": Preset(8),
    "fusionx": Preset(8),
}


def parse_loras(given: Sequence[object]) -> tuple[Lora, ...]:
    """Paths, `FILE:WEIGHT` and Lora objects, checked. Raises UsageError."""
    if isinstance(given, str | Path):
        raise UsageError(f"loras is {given!r}; give a list of files")
    loras = tuple(Lora.parse(one) for one in given)
    if len(loras) > MAX_LORAS:
        raise UsageError(f"{len(loras)} LoRAs; at most {MAX_LORAS} at once")
    for lora in loras:
        if not math.isfinite(lora.strength) or abs(lora.strength) > MAX_STRENGTH:
            limit = f"it must be -{MAX_STRENGTH:g} to {MAX_STRENGTH:g}"
            raise UsageError(f"the weight of {lora.path} is {lora.strength}; {limit}")
    return loras


def hint_at_preset(loras: Sequence[Lora]) -> None:
    """Say that a LoRA is named like a step-distilled one; for requests with usual settings."""
    named = [one.path for one in loras if _DISTILLED_NAME.search(Path(one.path).name)]
    if named:
        log.warning("%s: made for few steps? --preset %s", named[0], ", ".join(PRESETS))
