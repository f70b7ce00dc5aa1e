"""The verbs about marks: verify, mark, keys init, ledger verify; and the options of marking."""

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from wanrt import env
from wanrt.errors import MarkingError, UsageError
from wanrt.media import ledger
from wanrt.media.mark_file import mark_file
from wanrt.media.marking import Marking, Saved
from wanrt.media.verification import Verification, verify

PRIVATE_TRUST = (
    "What this key is: a private root of your own. It proves that a file has not changed since it "
    "was signed, and that the same key signed others. It does not tell strangers who you are: "
    "their programs say 'signer unknown' until they trust root.pem, and no public list has it. "
    "Keep key.pem secret; a copy of it can sign in your name. wanrt never sends it anywhere."
)


class Mode(StrEnum):
    required = "required"
    best_effort = "best-effort"
    off = "off"


_PANEL = "Marking"
MODE_OPTION = typer.Option(
    "--marking", help="required, best-effort or off (required).", rich_help_panel=_PANEL,
    show_default=False,
)  # fmt: skip
KEY_OPTION = typer.Option(
    "--key", help="Folder with key.pem and chain.pem.", rich_help_panel=_PANEL, show_default=False
)
TSA_OPTION = typer.Option(
    "--tsa", help="RFC 3161 time stamping authority.", rich_help_panel=_PANEL, show_default=False
)
LEDGER_OPTION = typer.Option(
    "--ledger", help="File that lists the results.", rich_help_panel=_PANEL, show_default=False
)
PROMPT_OPTION = typer.Option(
    "--record-prompt", help="Put the prompt into the manifest.", rich_help_panel=_PANEL
)


def verify_file(
    file: Annotated[Path, typer.Argument(help="MP4, MOV, PNG, WebM ...")],
    trust: Annotated[Path | None, typer.Option(help="PEM of roots to trust.")] = None,
    ledger_file: Annotated[Path | None, typer.Option("--ledger", help="Look it up there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Is this file marked as AI-generated? 0 yes, 1 no, 3 tampered with or unreadable."""
    found = verify(file, trust=trust, ledger_file=ledger_file)
    print(json.dumps(asdict(found), default=str) if as_json else _report(found))
    raise typer.Exit(found.exit_code)


def _report(found: Verification) -> str:
    layers = found.layers
    manifest, mark = layers.c2pa, layers.watermark
    c2pa = [manifest.state, manifest.generator, manifest.signer and f"signer {manifest.signer}"]
    if manifest.time is not None:
        c2pa.append(
            f"time stamp {manifest.time}" + " by somebody unknown" * (not manifest.time_trusted)
        )
    c2pa += [_short(manifest.source_type), *manifest.reasons]
    rows = [
        ("c2pa", c2pa + ["beside the file"] * manifest.sidecar),
        ("xmp", [layers.xmp.state, _short(layers.xmp.source_type), layers.xmp.reason]),
        (
            "watermark",
            [
                f"id {mark.id}" if mark.detected else "none",
                f"score {mark.score:.2f} of {mark.num_frames} frames",
                f"by chance {mark.false_positive_probability:.1e}",
            ],
        ),
    ]
    if layers.ledger is not None:
        line = layers.ledger.line and f"line {layers.ledger.line}, {layers.ledger.time}"
        rows.append(("ledger", [layers.ledger.state, layers.ledger.by, line]))
    lines = [f"{found.path}: {found.state}: {'; '.join(found.reasons)}"]
    lines += [f"  {name:<10} {', '.join(str(v) for v in values if v)}" for name, values in rows]
    return "\n".join(map(_printable, lines))


def _printable(line: str) -> str:
    """What comes from a stranger's file must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def _short(source_type: str | None) -> str | None:
    return source_type and source_type.rpartition("/")[2]


def mark(
    source: Annotated[Path, typer.Argument(help="A video or an image of any generator.")],
    out: Annotated[Path, typer.Option("-o", "--out", help=".mp4, .webm, .mkv or .png.")],
    model: Annotated[str, typer.Option(help="What made it, for the manifest.")] = "unknown",
    codec: Annotated[str | None, typer.Option(help="h264, hevc or av1 (by the ending).")] = None,
    crf: Annotated[int | None, typer.Option(help="Quality, lower is better.")] = None,
    marking: Annotated[Mode, MODE_OPTION] = Mode.required,
    key: Annotated[Path | None, KEY_OPTION] = None,
    tsa: Annotated[str | None, TSA_OPTION] = None,
    ledger_file: Annotated[Path | None, LEDGER_OPTION] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    overwrite: Annotated[bool, typer.Option("-y", "--yes", help="Overwrite the output.")] = False,
) -> None:
    """Mark what another generator made: watermark it (which encodes it anew) and sign it."""
    options = Marking(str(marking), key, tsa, ledger_file)
    saved = mark_file(
        source, out, model=model, codec=codec, crf=crf, overwrite=overwrite, marking=options
    )
    print(json.dumps(record(saved)) if as_json else f"{saved.path}: {marks_of(saved)}")


def record(saved: Saved) -> dict[str, Any]:
    """As JSON."""
    shown = asdict(saved) | {"path": str(saved.path)}
    return shown | {"sidecar": saved.sidecar and str(saved.sidecar)}


def marks_of(saved: Saved) -> str:
    """In a few words."""
    if saved.marking == "off":
        return "not marked"
    parts = [f"watermark {saved.watermark}" if saved.watermark else "no watermark"]
    parts += ["XMP"] * saved.xmp
    parts += [f"signed{f' in {saved.sidecar}' if saved.sidecar else ''}"] * bool(saved.manifest)
    return "marked: " + ", ".join(parts) + "".join(f"; missing: {m}" for m in saved.missing)


def keys_init(
    key: Annotated[Path | None, typer.Option("--key", help="Folder to make.")] = None,
    name: Annotated[str | None, typer.Option(help="Organisation in the certificates.")] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Make a key for engine bundles instead, in this file.")
    ] = None,
) -> None:
    """Make a private root, a signing key and its certificate."""
    from wanrt import keys

    if bundle is not None:
        _bundle_key(bundle, alone=key is None and name is None)
        return
    folder = key or env.keys_folder() or env.own_keys_folder()
    keys.init(folder, name or keys.PRIVATE)
    print(f"{folder}: {keys.KEY} (mode 0600), {keys.CHAIN}, {keys.ROOT}")
    print(PRIVATE_TRUST)


def _bundle_key(file: Path, alone: bool) -> None:
    from wanrt.engine import trust

    if not alone:
        raise UsageError("--bundle makes one file with one key; leave out --key and --name")
    print(f"{file}: signs bundles as {trust.make_key(file)}")


def ledger_verify(
    file: Annotated[Path | None, typer.Argument(help="The ledger; this machine's.")] = None,
    head: Annotated[str | None, typer.Option(help="A hash kept from earlier.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check that no line was changed, moved or taken out; 3 if one was."""
    path = file or env.ledger_file()
    if path is None:
        raise MarkingError("the ledger is off (WANRT_LEDGER=off; name a file)")
    chain = ledger.verify(path, head)
    if as_json:
        print(json.dumps({"path": str(path), **chain._asdict()}))
        return
    print(f"{path}: {chain.length} lines, every link holds; head {chain.head}")


def add_to(app: typer.Typer) -> None:
    """Register these verbs."""
    app.command("verify")(verify_file)
    app.command()(mark)
    keys = typer.Typer(no_args_is_help=True, help="Keys that sign results.")
    keys.command("init")(keys_init)
    app.add_typer(keys, name="keys")
    ledgers = typer.Typer(no_args_is_help=True, help="The list of marked results.")
    ledgers.command("verify")(ledger_verify)
    app.add_typer(ledgers, name="ledger")
