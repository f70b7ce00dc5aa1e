"""The vocabulary of plans: a machine, what is asked of it, where a part's blocks are, a phase."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from wanrt.memory.budget import FIXED, WORKSPACE
from wanrt.memory.dit_bytes import Format
from wanrt.memory.vae_formats import VAE_FORMATS, VaeFormat

Guidance = Literal["none", "sequential", "interleaved"]
SLOTS = 2  # of a ring: one block computes while the next one comes
TEXT_ROWS = 512  # of the longest text that the released models take


@dataclass(frozen=True)
class Machine:
    """What estimates of time need: bytes and operations per second, roughly an RTX 4070's.

    NOTE: assumed from data sheets (PCIe 4 x16, 58 TFLOP/s of bf16), not measured.
    """

    copy: float = 22e9  # pinned host memory to device
    read: float = 3e9  # file to host memory
    flops: float = 50e12
    device: Literal["cuda", "cpu"] = "cuda"
    fused: bool = True  # norms and rotation are single kernels

    def image_bytes(self, form: Format) -> int:
        """Of a number in CLIP, which runs in fp32 on a CPU."""
        return form.other if self.device == "cuda" else 4

    def usual_vae(self, form: Format) -> VaeFormat:
        """How the VAE keeps its numbers where nobody asks for anything: in fp32 on a CPU."""
        if self.image_bytes(form) == 4:
            return VAE_FORMATS["fp32"]
        return VAE_FORMATS["fp16" if form.name == "fp16" else "bf16"]

    @property
    def backend(self) -> Literal["triton", "torch"]:
        """Whose kernels the VAE runs."""
        return "triton" if self.fused else "torch"

    @property
    def fixed(self) -> int:
        """What the process holds on the device beside tensors, bytes."""
        return FIXED + WORKSPACE if self.device == "cuda" else 0


TYPICAL = Machine()


@dataclass(frozen=True)
class Ask:
    """The size of a request, and what it brings."""

    width: int
    height: int
    num_frames: int
    guided: bool = True
    image: bool = False  # a picture or a video conditions it
    text_rows: int = TEXT_ROWS  # that the longer prompt may have
    refs: int = 0  # reference images of VACE; each is a frame of latents more
    encodes_text: bool = True  # a prompt's features are not known yet
    decodes: bool = True  # frames are wanted, not latents
    lora: int = 0  # bytes of low-rank branches, which stay on the device


@dataclass(frozen=True)
class Placement:
    """How a part's blocks are held: some stay on the device, the others come when needed.

    Of those that come, the first `num_pinned` wait in pinned host memory, the rest in their file,
    from which they reach the device through one staging buffer for each slot.
    """

    num_blocks: int
    num_resident: int
    slots: int = 0  # of the ring that the others pass through
    num_pinned: int = 0
    pinned: int = 0  # bytes
    mapped: int = 0  # bytes read from the file at every pass
    staging: int = 0  # bytes of host memory, of all slots

    @property
    def host(self) -> int:
        """Host memory that it takes, bytes."""
        return self.pinned + self.staging

    def resident(self) -> frozenset[int]:
        """Which blocks stay: spread evenly, so that every copy has computing to hide behind."""
        n, r = self.num_blocks, self.num_resident
        return frozenset(i for i in range(n) if (i + 1) * r // n > i * r // n)


@dataclass(frozen=True)
class Phase:
    """What one phase holds, in bytes: on the device, but for `host`.

    `streamed` is what one pass copies to the device; `workspace` is what engines work in.
    """

    name: str
    weights: int = 0
    ring: int = 0
    activations: int = 0
    caches: int = 0
    workspace: int = 0
    host: int = 0  # in host memory: blocks that wait, staging buffers, caches
    streamed: int = 0
    seconds: float = 0.0  # of one pass, estimated

    @property
    def peak(self) -> int:
        return self.weights + self.ring + self.activations + self.caches + self.workspace


def place(sizes: list[int], num_resident: int, room: int | None, from_file: int = 0) -> Placement:
    """Blocks of these sizes, of which so many stay.

    room: bytes of host memory, None for any number, 0 if none shall wait there. from_file: the most
    bytes that come at once from the file, whatever the room.
    """
    if num_resident == len(sizes):
        return Placement(len(sizes), num_resident)
    stay = Placement(len(sizes), num_resident).resident()
    streamed = [size for i, size in enumerate(sizes) if i not in stay]
    num_pinned = _fitting(streamed, room, SLOTS * from_file)
    if num_pinned < len(streamed):
        staged = max(from_file, *streamed)
        num_pinned = _fitting(streamed, room, SLOTS * staged)
        from_file = max(from_file, *streamed[num_pinned:])
    pinned = sum(streamed[:num_pinned])
    mapped = sum(streamed) - pinned
    return Placement(len(sizes), num_resident, SLOTS, num_pinned, pinned, mapped, SLOTS * from_file)


def _fitting(sizes: list[int], room: int | None, taken: int) -> int:
    """How many of the first find room beside what is taken."""
    if room is None:
        return len(sizes)
    held = accumulate(sizes, initial=taken)
    next(held)
    return sum(total <= room for total in held)


def copy_seconds(placement: Placement, machine: Machine) -> float:
    """Of one pass over the streamed blocks."""
    every = placement.pinned + placement.mapped
    return every / machine.copy + placement.mapped / machine.read
