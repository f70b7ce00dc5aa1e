"""The verbs about engine bundles: verify, list, sign."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wanrt.errors import UsageError

if TYPE_CHECKING:
    from wanrt.engine.bundle import Bundle

_BUNDLE = typer.Argument(help="A folder or a zip.")
_JSON = typer.Option("--json", help="One JSON object.")


def verify(
    bundle: Annotated[Path, _BUNDLE],
    trust: Annotated[str | None, typer.Option(help="Trust this key from now on.")] = None,
    release: Annotated[str | None, typer.Option(help="Of TensorRT-RTX, as 1.7.1.116.")] = None,
    capability: Annotated[str | None, typer.Option(help="Of the card, as 8.9.")] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Signature, key, manifest, every hash and, if asked, the fit; 3 where one does not hold."""
    from wanrt.engine import trust as keys
    from wanrt.engine.bundle import Bundle

    if (release is None) != (capability is None):
        raise UsageError("--release and --capability belong together")
    card = None if capability is None else card_of(capability, "--capability")
    trusted = keys.trusted_keys()
    given = trusted if trust is None else trusted | {keys.check_key(trust)}
    found = Bundle.open(bundle, given)
    found.verify()
    if trust is not None and found.key != trust:
        raise UsageError(f"{bundle} is signed by {found.key}, not by {trust}; nothing was trusted")
    fit = [] if release is None or card is None else _fitting(found, release, card)
    if trust is not None:
        keys.trust(trust, found.manifest.model.id)
    if as_json:
        print(json.dumps(_record(found) | {"state": "holds", "fits": fit}))
        return
    count = len(found.manifest.members)
    print(f"{bundle}: holds: {count} members, {_total(found)} bytes, signed by {found.key}")
    for member in fit:
        print(f"  fits: {member}")


def _fitting(found: "Bundle", release: str, card: int) -> list[str]:
    """The member of each graph's engine. Raises FormatError where one has none that fits."""
    from wanrt.engine.bundle import Host

    host = Host("tensorrt-rtx", release, card)
    return [found.engine_for(graph.name, host).member for graph in found.manifest.graphs]


def card_of(text: str, flag: str) -> int:
    """89 for 8.9. Raises UsageError, naming the flag."""
    match = re.fullmatch(r"([0-9]{1,2})\.([0-9])", text, re.ASCII)
    if match is None:
        raise UsageError(f"{flag} {text!r} is no compute capability such as 8.9")
    return 10 * int(match[1]) + int(match[2])


def list_members(bundle: Annotated[Path, _BUNDLE], as_json: Annotated[bool, _JSON] = False) -> None:
    """What a bundle says of itself, by whomever; opens no member."""
    from wanrt.engine.bundle import Bundle, describe_engine

    found = Bundle.look(bundle)
    if as_json:
        print(json.dumps(_record(found) | {"manifest": asdict(found.manifest)}))
        return
    held = found.manifest
    notes = {graph.member: f"{graph.name}, {graph.precision}" for graph in held.graphs}
    notes |= {
        engine.member: f"{engine.graph}, {describe_engine(engine)}" for engine in held.engines
    }
    notes |= {licence.member: licence.spdx for licence in held.licences}
    signed = f"signed by {found.key}" if found.key else "not signed"
    commit = (held.provenance.commit[:12] or "unknown") + "+" * held.provenance.dirty
    print(f"{bundle}: {held.model.id}, commit {commit}, {_total(found)} bytes, {signed}")
    for member in held.members:
        note = notes.get(member.name, "weights")
        print(f"  {member.name}  {member.size} bytes  {member.sha256[:12]}  {note}")


def sign(
    bundle: Annotated[Path, _BUNDLE],
    key: Annotated[Path, typer.Option(help="File of `wanrt keys init --bundle`.")],
    overwrite: Annotated[bool, typer.Option("-y", "--yes", help="Replace a signature.")] = False,
) -> None:
    """Check every member, then sign the manifest with an Ed25519 key."""
    from wanrt.engine.bundle import sign as sign_bundle
    from wanrt.engine.trust import load_signer

    signer = load_signer(key)
    sign_bundle(bundle, signer, overwrite)
    print(f"{bundle}: signed by {signer.key}")


def _record(found: "Bundle") -> dict[str, Any]:
    return {"path": str(found.path), "key": found.key, "bytes": _total(found)}


def _total(found: "Bundle") -> int:
    return sum(member.size for member in found.manifest.members)


def add_to(app: typer.Typer) -> None:
    """Register these verbs."""
    bundles = typer.Typer(no_args_is_help=True, help="Prebuilt engines, signed.")
    bundles.command()(verify)
    bundles.command("list")(list_members)
    bundles.command()(sign)
    app.add_typer(bundles, name="bundle")
