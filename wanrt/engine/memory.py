"""What a bundle's engines work in on a card: read off its manifest, for plans; imports no torch."""

from collections.abc import Iterable

from wanrt.config import VaeSpec, WanSpec
from wanrt.engine.bundle import Bundle, shown_capability
from wanrt.engine.manifest import EngineKind, Manifest, Model
from wanrt.errors import FormatError
from wanrt.memory.engine_bytes import EngineBytes
from wanrt.memory.vae_engine_bytes import Side, VaeEngines
from wanrt.vae_sections import RANGES, Section, decoder_sections, encoder_sections

EIGHT_BIT = frozenset({"int8", "fp8"})
HALVES = frozenset({"dit.pre", "dit.post"})


def engine_bytes(
    bundle: Bundle,
    vae: VaeSpec,
    card: int,
    release: str | None = None,
    kind: EngineKind = "tensorrt-rtx",
) -> EngineBytes:
    """Of the engines for a card, 89 for 8.9; what has none is native. `vae` is the model's.

    release: of the library; None: any, and where there are several engines of one graph, the
    neediest. A workspace is that of an engine's largest sizes. Raises FormatError where there is
    none at all.
    """
    found: dict[str, int] = {}
    for engine in bundle.manifest.engines:
        fits = engine.kind == kind and card in engine.compute_capabilities
        if fits and release in (None, engine.release):
            found[engine.graph] = max(engine.workspace_bytes, found.get(engine.graph, 0))
    if not found:
        told = f"{kind}{' ' + release if release else ''} on compute capability"
        reason = f"has no engine for {told} {shown_capability(card)}"
        raise FormatError(bundle.path, reason, "`wanrt bundle list` says what it has")
    blocks = "halves" if HALVES <= found.keys() else "whole" if "dit.block" in found else "native"
    idle = {"dit.block"} if blocks == "halves" else set(HALVES)
    if blocks != "halves" or _precisions(bundle.manifest) & EIGHT_BIT:
        idle.add("dit.attention")  # it is in the block, or native
    return EngineBytes(
        blocks=blocks,
        step=_most(found, (name for name in found if _kind(name) == "dit" and name not in idle)),
        decode=_coder(found, "decode", decoder_sections(vae)),
        encode=_coder(found, "encode", encoder_sections(vae)),
        text=_most(found, (name for name in found if _kind(name) == "umt5")),
        image=_most(found, (name for name in found if _kind(name) == "clip")),
    )


def check_shapes(bundle: Bundle, spec: WanSpec) -> None:
    """Raises FormatError for a model of other shapes than the bundle's."""
    held, model = bundle.manifest.model, Model.of(spec)
    if (held.dit, held.vae) != (model.dit, model.vae):
        reason = f"is of {held.id}, and the model is {spec.title}, which has other shapes"
        raise FormatError(bundle.path, reason, "export this model")


def format_in(manifest: Manifest) -> str | None:
    """The format of a bundle's transformer, of `memory.dit_bytes.FORMATS`; None where it has none.

    The products of its blocks may be in eight bits, those beside them are not.
    """
    held = _precisions(manifest)
    plain, eight = sorted(held - EIGHT_BIT), sorted(held & EIGHT_BIT)
    if not held:
        return None
    if not eight:
        return plain[0]
    return f"{eight[0]}/fp32" if plain == ["fp32"] else eight[0]


def _precisions(manifest: Manifest) -> set[str]:
    """Of the transformer's graphs."""
    return {graph.precision for graph in manifest.graphs if _kind(graph.name) == "dit"}


def _kind(graph: str) -> str:
    return graph.partition(".")[0]


def _most(found: dict[str, int], names: Iterable[str]) -> int:
    return max((found[name] for name in names), default=0)


def _coder(found: dict[str, int], side: Side, sections: tuple[Section, ...]) -> VaeEngines | None:
    """All ways of `engine.vae.GraphVae`; one is there where all of its engines are."""
    ways = {}
    for sizes in RANGES:
        names = [
            f"vae.{side}.{i}.{when}.{sizes.name}"
            for i, section in enumerate(sections)
            for when in section.graphs
        ]
        if (needed := _way(found, names)) is not None:
            ways[sizes.name] = needed
    whole = _way(found, [f"vae.{side}.{when}" for when in ("first", "step")])
    return VaeEngines(ways, whole) or None


def _way(found: dict[str, int], names: list[str]) -> int | None:
    return _most(found, names) if all(name in found for name in names) else None
