"""What a mark says and how a result is marked: the options of the caller, as records."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from wanrt.errors import UsageError

if TYPE_CHECKING:
    from wanrt.keys import SigningKey

# IPTC NewsCodes, what a picture or video comes from: cv.iptc.org/newscodes/digitalsourcetype
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
GENERATED = SOURCE_TYPES + "trainedAlgorithmicMedia"
COMPOSITE = SOURCE_TYPES + "compositeWithTrainedAlgorithmicMedia"
AI_SOURCES = (GENERATED, COMPOSITE, SOURCE_TYPES + "compositeSynthetic")

Mode = Literal["required", "best-effort", "off"]


@dataclass(frozen=True)
class Input:
    """A picture or video that a result was made from.

    role: its title in the manifest, such as "image" or "reference 2"; its file's name stays out.
    path: None where it came as pixels and there is no file to bind. parent: the result is this
    very thing, marked, instead of something made from it.
    """

    role: str
    path: Path | None = None
    parent: bool = False


@dataclass(frozen=True)
class Origin:
    """Where frames come from: the model's name, the task, what went in. Nothing about persons."""

    model: str = "unknown"
    task: str = "unknown"
    inputs: tuple[Input, ...] = ()
    prompt: str | None = None  # written only where Marking.record_prompt asks for it

    @property
    def source_type(self) -> str:
        """The IPTC digital source type, an address."""
        return COMPOSITE if any(not given.parent for given in self.inputs) else GENERATED


@dataclass(frozen=True)
class Marking:
    """How a result is marked as AI-generated.

    mode: "required" fails rather than leave something unmarked, "best-effort" warns and goes on,
    "off" marks nothing. key: a folder with key.pem and chain.pem, or a SigningKey (an HSM); None
    takes WANRT_KEYS, else the key that wanrt made for itself. tsa: address of an RFC 3161 time
    stamping authority. ledger: the file that lists results; None takes WANRT_LEDGER, else the
    system's place for data.
    """

    mode: Mode = "required"
    key: "str | PathLike[str] | SigningKey | None" = None
    tsa: str | None = None
    ledger: str | PathLike[str] | None = None
    record_prompt: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            modes = ", ".join(get_args(Mode))
            raise UsageError(f"marking {self.mode!r} does not exist; choose of {modes}")
        if self.tsa is not None and not self.tsa.startswith(("http://", "https://")):
            raise UsageError(f"the time stamping authority {self.tsa!r} is no http(s) address")


UNKNOWN = Origin()
REQUIRED = Marking()


@dataclass(frozen=True)
class Saved:
    """A result as it was written, and as it stands in the ledger.

    watermark: eight hex digits, None where the frames may not carry one. manifest: the C2PA
    manifest's label, None where there is none. missing: the steps that failed, with reasons;
    only "best-effort" has any.
    """

    path: Path
    sha256: str
    num_bytes: int
    marking: Mode
    watermark: str | None = None
    xmp: bool = False
    manifest: str | None = None
    sidecar: Path | None = None
    missing: tuple[str, ...] = ()
