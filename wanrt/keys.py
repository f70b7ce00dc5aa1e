"""Keys that sign: a folder with a private key and its certificates, or a signer of one's own."""

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from wanrt.errors import MarkingError, OutputError

KEY, CHAIN, ROOT = "key.pem", "chain.pem", "root.pem"  # what lies in a folder of keys
PRIVATE = "a private wanrt key"  # the organisation in its certificates
LIFETIME = timedelta(days=3653)  # without a time stamp a signature ends with its certificate
MAX_CLOCK_SKEW = timedelta(days=1)  # of machines that read what was just signed

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey

_CURVES: dict[str, tuple[str, hashes.HashAlgorithm]] = {
    "secp256r1": ("es256", hashes.SHA256()),
    "secp384r1": ("es384", hashes.SHA384()),
    "secp521r1": ("es512", hashes.SHA512()),
}


@dataclass(frozen=True)
class SigningKey:
    """What signs a manifest; the private key itself stays behind `sign`.

    algorithm: es256, es384, es512, ps256, ps384, ps512 or ed25519. chain: PEM certificates, the
    signer's first. sign: from the bytes to the signature as COSE (RFC 9053) has it, which for
    ECDSA is r and s side by side, not DER; an HSM or a remote service goes here. root: PEM of the
    certificate that a reader has to trust, where it is known.
    """

    algorithm: str
    chain: str
    sign: Callable[[bytes], bytes]
    root: str | None = None

    def check(self, now: datetime | None = None) -> None:
        """Raises MarkingError where the signer's certificate is not valid at this time."""
        leaf = _certificates(self.chain, "the certificate chain")[0]
        now = now or datetime.now(UTC)
        begin, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
        if begin <= now <= end:
            return
        if now > end:
            problem = "has expired (get a new one; `wanrt keys init --key DIR` makes a private one)"
        else:
            problem = "is not valid yet (is the clock of this machine right?)"
        raise MarkingError(
            f"the signer's certificate {problem}: it holds from {begin:%Y-%m-%d %H:%M} to "
            f"{end:%Y-%m-%d %H:%M} UTC, and now it is {now:%Y-%m-%d %H:%M}"
        )


def load(folder: Path) -> SigningKey:
    """The key in a folder: key.pem (readable by its owner alone), chain.pem and, if any, root.pem.

    Raises MarkingError for what is missing, readable by others, encrypted or does not fit.
    """
    if not folder.is_dir():
        raise MarkingError(
            f"there is no folder of keys at {folder} (`wanrt keys init --key {folder}` makes one)"
        )
    private = private_key(folder / KEY)
    chain = _read(folder / CHAIN).decode("ascii", "replace")
    leaf = _certificates(chain, str(folder / CHAIN))[0]
    if leaf.public_key() != private.public_key():
        raise MarkingError(
            f"{folder / KEY} does not belong to the first certificate in {folder / CHAIN} "
            "(the signer's certificate comes first)"
        )
    root = folder / ROOT
    trusted = _read(root).decode("ascii", "replace") if root.exists() else None
    algorithm, sign = _signer(private, folder / KEY)
    return SigningKey(algorithm, chain, sign, trusted)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MarkingError(f"cannot read {path}: {error.strerror or error}") from error


def private_key(path: Path) -> PrivateKey:
    """From a PEM file that its owner alone can read. Raises MarkingError."""
    pem = _read(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if os.name == "posix" and mode & 0o077:
        raise MarkingError(
            f"{path} can be read by others (mode {mode:04o}); a signing key is its owner's alone "
            f"(chmod 600 {path})"
        )
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError as error:  # how `cryptography` says that a password is needed
        raise MarkingError(
            f"{path} is encrypted (decrypt it, or sign through a SigningKey from Python)"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise MarkingError(f"{path} is not a private key in PEM: {error}") from error
    if not isinstance(key, PrivateKey):
        raise MarkingError(f"{path} is a {type(key).__name__}; take P-256, RSA or Ed25519")
    return key


def _certificates(pem: str, where: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem.encode())
    except ValueError as error:
        raise MarkingError(f"{where} holds no certificates in PEM: {error}") from error


def _signer(key: PrivateKey, path: Path) -> tuple[str, Callable[[bytes], bytes]]:
    """The algorithm's name and the signature as COSE wants it."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519", key.sign
    if isinstance(key, rsa.RSAPrivateKey):
        digest = hashes.SHA256()
        pss = padding.PSS(padding.MGF1(digest), digest.digest_size)
        return "ps256", lambda data: key.sign(data, pss, digest)
    if key.curve.name not in _CURVES:
        raise MarkingError(f"{path} is on the curve {key.curve.name}; take P-256, P-384 or P-521")
    name, digest = _CURVES[key.curve.name]
    width = (key.key_size + 7) // 8

    def sign(data: bytes) -> bytes:
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(digest)))
        return r.to_bytes(width, "big") + s.to_bytes(width, "big")

    return name, sign


def init(folder: Path, organisation: str = PRIVATE) -> None:
    """Make a private root, a P-256 key and its certificate in a new folder, valid for ten years.

    The root's own key signs that one certificate and is not kept, so nobody can issue another in
    its name. The names inside hold nothing about user or machine unless `organisation` does.
    Raises OutputError where the folder holds something or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} holds something already (name a new folder with --key DIR)")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".wanrt-keys-", dir=folder.parent))  # mode 0700
        try:
            for name, content in _make(organisation).items():
                descriptor = os.open(draft / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with open(descriptor, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            if folder.exists():
                folder.rmdir()
            os.rename(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"cannot write keys to {folder}: {error.strerror or error}") from error


def _make(organisation: str) -> dict[str, bytes]:
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = _name(organisation, "wanrt private root")
    subject = _name(organisation, "wanrt signer")
    root = _certificate(issuer, issuer, root_key.public_key(), root_key, is_root=True)
    leaf = _certificate(subject, issuer, key.public_key(), root_key, is_root=False)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    pem = [certificate.public_bytes(Encoding.PEM) for certificate in (leaf, root)]
    return {KEY: secret, CHAIN: b"".join(pem), ROOT: pem[1]}


def _name(organisation: str, common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    root_key: ec.EllipticCurvePrivateKey,
    is_root: bool,
) -> x509.Certificate:
    """By the certificate profile of C2PA 2.2, section 14.5."""
    now = datetime.now(UTC)
    usage = x509.KeyUsage(
        digital_signature=not is_root,
        key_cert_sign=is_root,
        crl_sign=is_root,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())
    builder = (
        x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number())
        .not_valid_before(now - MAX_CLOCK_SKEW)
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.BasicConstraints(is_root, 0 if is_root else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(authority, critical=False)
    )
    if not is_root:
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purpose, critical=False)
    return builder.sign(root_key, hashes.SHA256())
