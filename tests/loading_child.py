"""Child process of test_memory.py: load parts, print the peak of anonymous memory, run a request.

python loading_child.py MODEL KIND,KIND [--request] [--packed]
"""

import json
import sys
import threading
from pathlib import Path

import torch

import wanrt
from wanrt.weights.detect import Detected
from wanrt.weights.load import skeleton
from wanrt.weights.parts import find_component


def anonymous_bytes() -> int:
    """RssAnon of this process: what mapped files hold does not count."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """Samples anonymous memory every few milliseconds while it is open."""

    def __enter__(self) -> "Peak":
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._sample()

    def _sample(self) -> None:
        self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self._sample()
        self._done.set()
        self._thread.join()


def bytes_of(module: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


def main(model: str, kinds: list[str], request: bool, packed: bool) -> None:
    sys.setswitchinterval(0.0005)  # the watching thread gets its turn while tensors are read
    result = {}
    for kind in kinds:
        found: Detected = find_component(Path(model), kind)
        dtype = torch.float32 if kind == "vae" else torch.bfloat16
        skeleton(kind, found.spec)  # the code is imported before the count begins
        before = anonymous_bytes()
        with Peak() as peak:
            module = wanrt.load_component(found.path, kind, dtype, keep_packed=packed)
        result[kind] = {"size": bytes_of(module), "peak": peak.bytes - before}
        del module
    if request:
        pipe = wanrt.Pipeline.load(model, precision="bf16")
        text = torch.randn(20, pipe.spec.dit.text_dim)
        video = pipe.generate(
            "",
            prompt_embeds=text,
            negative_embeds=text[:5],
            width=64,
            height=64,
            num_frames=5,
            num_steps=2,
            seed=1,
        )
        result["frames"] = list(video.np.shape)
        result["spread"] = float(video.np.std())
    print(json.dumps(result))


if __name__ == "__main__":
    flags = sys.argv[3:]
    main(sys.argv[1], sys.argv[2].split(","), "--request" in flags, "--packed" in flags)
