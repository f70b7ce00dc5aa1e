"""Bundles of engines that hold nothing, for tests of what their manifests say."""

from pathlib import Path

import bundle_files
from bundle_files import RELEASE

from wanrt.config import WanSpec
from wanrt.engine import bundle as bundles
from wanrt.engine.bundle import Bundle
from wanrt.engine.manifest import Engine, Graph, Licence, Manifest, Model, Precision, Provenance

_EIGHT = ("dit.pre", "dit.post", "dit.kv")


def write_engines(
    spec: WanSpec,
    path: Path,
    sizes: dict[str, int],
    eight: Precision | None = None,
    plain: Precision = "bf16",
) -> Bundle:
    """A signed bundle of engines for 8.9, of these workspaces by graph; what is in them is made up.

    eight: the precision of a block's products, if another than `plain`.
    """
    contents: dict[str, bytes | Path] = {"licences/apache-2.0.txt": b"Apache"}
    graphs, engines = [], []
    for name, size in sorted(sizes.items()):
        precision = eight if eight and name in _EIGHT else plain
        contents[f"onnx/{name}.onnx"] = bundle_files.onnx()
        contents[f"engines/{name}.engine"] = name.encode()
        graphs.append(Graph(name, f"onnx/{name}.onnx", precision, False, 23, ()))
        member = f"engines/{name}.engine"
        engines.append(Engine(name, member, "tensorrt-rtx", RELEASE, (89,), size))
    manifest = Manifest(
        format=1,
        model=Model.of(spec),
        graphs=tuple(graphs),
        engines=tuple(engines),
        weights=(),
        tokenizer="",
        licences=(Licence("Apache-2.0", "licences/apache-2.0.txt", (graphs[0].member,)),),
        provenance=Provenance("", False, ()),
        members=bundles.members_of(contents),
    )
    bundles.write(path, manifest, contents, bundle_files.SIGNER)
    return Bundle.look(path)
