"""Bundles of engines: opened only when signed by a trusted key, read by the names they declare.

The order of `Bundle.open`, each step before the next one sees a byte: the container's layout, the
signature over the raw manifest, whether its key is trusted, the manifest itself, the list of files
and their sizes. `read` hands out a member when its SHA-256 holds, from memory, never as a path.
Specification: docs/bundle.md.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from wanrt.engine import store_write
from wanrt.engine.manifest import (
    MANIFEST,
    SIGNATURE,
    Engine,
    EngineKind,
    Manifest,
    Member,
    check_name,
    parse_manifest,
)
from wanrt.engine.onnx_check import check_self_contained
from wanrt.engine.records import canonical
from wanrt.engine.store import Folder, Store, Zip, open_store
from wanrt.engine.trust import MAX_SIGNATURE, Signer, signer_of, trusted_keys
from wanrt.errors import FormatError, UsageError
from wanrt.weights.stretch import Stretch

MAX_MANIFEST = 1 << 20  # bytes
MAX_READ = 1 << 30  # bytes of a member that `read` takes into memory
_AGAIN = "download or copy the bundle again"


class Host(NamedTuple):
    """What an engine has to fit: as in the manifest, "1.7.1.116" and 89 for 8.9."""

    kind: EngineKind
    release: str
    compute_capability: int


class Bundle:
    """`read`, `locate` and `verify` its members.

    `manifest`; `key`, who signed it (None: nobody, as only `look` allows).
    """

    def __init__(
        self, path: Path, store: Folder | Zip, manifest: Manifest, key: str | None
    ) -> None:
        """For `open` and `look`. Raises FormatError where files and manifest differ."""
        self.path, self._store, self.manifest, self.key = path, store, manifest, key
        self._members = {member.name: member for member in manifest.members}
        self._graphs = {graph.member for graph in manifest.graphs}
        present = set(store.sizes) - {MANIFEST, SIGNATURE}
        for what, names in (
            ("holds a file that its manifest does not name:", present - set(self._members)),
            ("lacks a file that its manifest names:", set(self._members) - present),
        ):
            if names:
                raise FormatError(path, f"{what} {ascii(min(names))[:80]}", _AGAIN)
        for name, member in self._members.items():
            if store.sizes[name] != member.size:
                sizes = f"{store.sizes[name]} bytes, its manifest says {member.size}"
                raise FormatError(path, f"{name} has {sizes}", _AGAIN)

    @classmethod
    def open(cls, path: Path, trusted: Collection[str] | None = None) -> "Bundle":
        """A bundle signed by one of these keys; by default, of those the user trusted.

        Hashes no member yet. Raises FormatError.
        """
        store = open_store(path)
        raw, signature = _raw(path, store)
        if signature is None:
            fix = "`wanrt bundle sign` it if it is yours, else get one that its maker signed"
            raise FormatError(path, "is not signed", fix)
        key = signer_of(path, raw, signature)
        if key not in (trusted_keys() if trusted is None else trusted):
            fix = f"if its maker states this key: wanrt bundle verify {path} --trust {key}"
            raise FormatError(path, f"is signed by {key}, which is not trusted here", fix)
        return cls(path, store, parse_manifest(raw, path), key)

    @classmethod
    def look(cls, path: Path) -> "Bundle":
        """Whoever signed it, if anybody: to list it or to sign it, not to use it.

        A signature that is there must hold. Raises FormatError.
        """
        store = open_store(path)
        raw, signature = _raw(path, store)
        key = None if signature is None else signer_of(path, raw, signature)
        return cls(path, store, parse_manifest(raw, path), key)

    def read(self, name: str, limit: int = MAX_READ) -> bytes:
        """A member whose size and SHA-256 are those of the manifest; peak: it, twice.

        Raises FormatError where they are not, or a graph names files outside itself; UsageError
        for what is no member, or is larger than `limit` bytes.
        """
        if name not in self._members:
            raise UsageError(f"{self.path} has no member {ascii(name)[:80]}")
        member = self._members[name]
        if member.size > limit:
            raise UsageError(f"{name} has {member.size} bytes; {limit} are read at most")
        data = b"".join(self._checked(member))
        if name in self._graphs:
            check_self_contained(data, self.path, name)
        return data

    def verify(self) -> None:
        """Every member, as `read` does it; peak: the largest graph. Raises FormatError."""
        for name in self._members:
            if name in self._graphs:
                self.read(name)
            else:
                self.check(name)

    def check(self, name: str) -> None:
        """The size and SHA-256 of a member, without keeping it. Raises FormatError."""
        for _ in self._checked(self._members[name]):
            pass

    def locate(self, name: str) -> Stretch:
        """Where the bytes of a member lie, once they are those of the manifest: for weights, which
        are read from the disk one by one. Raises FormatError."""
        self.check(name)
        return self._store.stretch(name)

    def engine_for(self, graph: str, host: Host) -> Engine:
        """The engine of a graph that was built for this very release and card.

        Raises FormatError that names what there is; the graph can be built again from its ONNX.
        """
        built = [engine for engine in self.manifest.engines if engine.graph == graph]
        for engine in built:
            fits = engine.kind == host.kind and engine.release == host.release
            if fits and host.compute_capability in engine.compute_capabilities:
                return engine
        there = "; ".join(map(describe_engine, built)) or "none"
        raise FormatError(
            self.path,
            f"no engine of {graph} for {host.kind} {host.release} on compute capability "
            f"{shown_capability(host.compute_capability)}; there is: {there}",
            "build it from the ONNX in the bundle",
        )

    def _checked(self, member: Member) -> Iterator[bytes]:
        """The bytes of a member; raises at the end, so nobody may use them before it."""
        digest = hashlib.sha256()
        for chunk in self._store.chunks(member.name):
            digest.update(chunk)
            yield chunk
        if digest.hexdigest() != member.sha256:
            raise FormatError(self.path, f"{member.name} was changed: its SHA-256 differs", _AGAIN)


def _raw(path: Path, store: Store) -> tuple[bytes, bytes | None]:
    """The manifest and its signature, if there is one, as they are. Raises FormatError."""
    if MANIFEST not in store.sizes:
        raise FormatError(path, f"holds no {MANIFEST}", "it is no bundle")
    for name, limit in ((MANIFEST, MAX_MANIFEST), (SIGNATURE, MAX_SIGNATURE)):
        if store.sizes.get(name, 0) > limit:
            raise FormatError(path, f"{name} has more than {limit} bytes", "it is no bundle")
    raw = b"".join(store.chunks(MANIFEST))
    return raw, b"".join(store.chunks(SIGNATURE)) if SIGNATURE in store.sizes else None


def members_of(contents: Mapping[str, bytes | Path]) -> tuple[Member, ...]:
    """The members' part of a manifest, for what `write` is to put into a bundle."""
    given, found = store_write.Given(contents), []
    for name in sorted(contents):
        check_name(name)
        digest = hashlib.sha256()
        for chunk in given.chunks(name):
            digest.update(chunk)
        found.append(Member(name, given.sizes[name], digest.hexdigest()))
    return tuple(found)


def write(
    path: Path,
    manifest: Manifest,
    contents: Mapping[str, bytes | Path],
    signer: Signer | None = None,
) -> None:
    """A new bundle, a zip where the name ends in `.zip`: the same bytes for the same arguments.

    It is read back before it gets its name. Raises FormatError where contents and manifest
    differ, OutputError where something is there already or it cannot be written.
    """
    raw = canonical(manifest)
    head = {MANIFEST: raw} | ({SIGNATURE: signer.signature(raw)} if signer else {})
    _write(path, store_write.Given({**contents, **head}), path.suffix.lower() == ".zip")


def sign(path: Path, signer: Signer, overwrite: bool = False) -> None:
    """Sign a bundle whose members all hold; a zip is written anew.

    Raises FormatError, UsageError where another key has signed it and not `overwrite`, OutputError.
    """
    bundle = Bundle.look(path)
    if bundle.key not in (None, signer.key) and not overwrite:
        raise UsageError(f"{path} is signed by {bundle.key} (-y signs it anew)")
    bundle.verify()
    signature = signer.signature(canonical(bundle.manifest))
    if isinstance(bundle._store, Folder):
        store_write.replace_file(path / SIGNATURE, signature)
    else:
        _write(path, _Signed(bundle._store, signature), as_zip=True, overwrite=True)


class _Signed:
    """A store with another signature."""

    def __init__(self, store: Store, signature: bytes) -> None:
        self._store, self._signature = store, signature
        self.sizes = {**store.sizes, SIGNATURE: len(signature)}

    def chunks(self, name: str) -> Iterator[bytes]:
        return iter([self._signature]) if name == SIGNATURE else self._store.chunks(name)


def _write(path: Path, source: Store, as_zip: bool, overwrite: bool = False) -> None:
    """Manifest first, then the signature if there is one, then the members by name."""
    first = [name for name in (MANIFEST, SIGNATURE) if name in source.sizes]
    names = first + sorted(set(source.sizes) - set(first))
    store_write.write_store(
        path, source, names, as_zip, lambda part: Bundle.look(part).verify(), overwrite
    )


def describe_engine(engine: Engine) -> str:
    """In a few words."""
    cards = ", ".join(map(shown_capability, engine.compute_capabilities))
    return f"{engine.kind} {engine.release} on {cards}"


def shown_capability(number: int) -> str:
    """8.9 for 89."""
    return f"{number // 10}.{number % 10}"
