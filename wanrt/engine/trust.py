"""Who made a bundle: Ed25519 signatures of manifests, and the list of keys that the user trusts.

The list is a text file, `env.trusted_keys_file()`: one key to a line, `ed25519 HEX note`. A key
is the 32 bytes of RFC 8032 in lower-case hexadecimal, whole: there is no shorter fingerprint.
"""

import logging
import os
import re
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from wanrt import env, keys
from wanrt.engine.records import canonical, is_plain, parse
from wanrt.errors import FormatError, MarkingError, OutputError, UsageError

log = logging.getLogger("wanrt")

PURPOSE = b"wanrt bundle manifest\n"  # stands before what is signed, for this use alone
MAX_SIGNATURE = 1024  # bytes of the file
_KEY, _SIGNATURE = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{128}")


@dataclass(frozen=True)
class Signature:
    """`manifest.sig`: a public key and its signature of PURPOSE and the manifest's bytes."""

    algorithm: Literal["ed25519"]
    key: str
    signature: str

    def __post_init__(self) -> None:
        if not _KEY.fullmatch(self.key) or not _SIGNATURE.fullmatch(self.signature):
            raise ValueError("key and signature are 64 and 128 hexadecimal digits")


@dataclass(frozen=True)
class Signer:
    """Signs manifests; the private key stays behind `sign`, where a hardware key may go too."""

    key: str
    sign: Callable[[bytes], bytes]

    def signature(self, manifest: bytes) -> bytes:
        """The bytes of `manifest.sig`: the same each time."""
        return canonical(Signature("ed25519", self.key, self.sign(PURPOSE + manifest).hex()))


def load_signer(path: Path) -> Signer:
    """From a PEM file. Raises MarkingError where it is readable by others or of another kind."""
    private = keys.private_key(path)
    if not isinstance(private, Ed25519PrivateKey):
        raise MarkingError(
            f"{path} is no Ed25519 key, which bundles take (`wanrt keys init --bundle FILE` makes "
            "one)"
        )
    return Signer(private.public_key().public_bytes_raw().hex(), private.sign)


def make_key(path: Path) -> str:
    """Write a new private key, readable by its owner alone, and return its public one.

    Raises OutputError where something is there already, or it cannot be written.
    """
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
    except FileExistsError as error:
        raise OutputError(f"{path} is there already (name a new file)") from error
    except OSError as error:
        raise OutputError(f"cannot write a key to {path}: {error.strerror or error}") from error
    return private.public_key().public_bytes_raw().hex()


def own_signer() -> Signer:
    """The key of `env.bundle_key_file`, made and trusted here when it is first wanted.

    Raises OutputError, MarkingError.
    """
    path = env.bundle_key_file()
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        key = make_key(path)
        trust(key, "made by wanrt export")
        log.warning("a key that signs your bundles was made in %s; you trust it", path)
    return load_signer(path)


def signer_of(path: Path, manifest: bytes, raw: bytes) -> str:
    """The key whose signature of a manifest holds. Raises FormatError where none does."""
    found = parse(Signature, raw, path, "signature")
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(found.key))
    try:
        public.verify(bytes.fromhex(found.signature), PURPOSE + manifest)
    except InvalidSignature as error:
        raise FormatError(
            path, f"the signature by {found.key} does not hold", "the manifest was changed"
        ) from error
    return found.key


def check_key(key: str) -> str:
    """Raises UsageError for what is not a public key in hexadecimal."""
    if not _KEY.fullmatch(key):
        raise UsageError(f"{ascii(key)[:80]} is no public key (64 hexadecimal digits, lower case)")
    return key


def trusted_keys(path: Path | None = None) -> frozenset[str]:
    """The keys in the list; none where there is no list.

    Raises FormatError for a list that others can write, or that has a line of another kind.
    """
    path = path or env.trusted_keys_file()
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read()
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        raise FormatError(path, f"cannot be read: {error.strerror or error}") from error
    if os.name == "posix" and mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise FormatError(path, "others may write it", f"look through it, then chmod 600 {path}")
    found = set()
    for number, line in enumerate(raw.decode("ascii", "replace").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if words[0] != "ed25519" or len(words) < 2 or not _KEY.fullmatch(words[1]):
            raise FormatError(path, f"line {number} is not `ed25519 KEY note`", "mend or remove it")
        found.add(words[1])
    return frozenset(found)


def trust(key: str, note: str, path: Path | None = None) -> Path:
    """Add a key to the list, once. Returns where it is. Raises OutputError."""
    path = path or env.trusted_keys_file()
    if key in trusted_keys(path):
        return path
    part = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    plain = note if is_plain(note) else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else b""
        gap = b"" if not before or before.endswith(b"\n") else b"\n"
        line = f"ed25519 {check_key(key)} {plain}".rstrip() + "\n"
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(before + gap + line.encode("ascii"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return path
