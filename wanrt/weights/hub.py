"""From what a user calls a model (id, path or hub repository) to a folder or file on this disk."""

import difflib
import os
import re
from pathlib import Path

from wanrt.config import MODELS, NANO
from wanrt.errors import UsageError

NANO_WEIGHTS = Path(__file__).parent.parent / "nano" / "weights"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# What the original and the Diffusers layout need; clips, pictures, unused tokenizers stay away.
_PATTERNS = [
    *("config.json", "model_index.json", "diffusion_pytorch_model*", "Wan2.?_VAE.*", "models_*"),
    *("high_noise_model/*", "low_noise_model/*", "google/umt5-xxl/*"),
    *(
        "transformer/*",
        "transformer_2/*",
        "vae/*",
        "text_encoder/*",
        "image_encoder/*",
        "tokenizer/*",
    ),
]


def resolve_model(name: str, offline: bool = False) -> Path:
    """name: an id of config.MODELS, a path, or a repository such as Wan-AI/Wan2.1-T2V-1.3B.

    Ids win over paths of the same name (write ./nano for the folder). Downloads what is missing
    unless `offline`. Raises UsageError.
    """
    if name == NANO.id:
        return NANO_WEIGHTS
    if name in MODELS:
        return _download(f"Wan-AI/{MODELS[name].title}", offline)
    path = Path(name).expanduser()
    if path.exists():
        return path
    if _REPOSITORY.fullmatch(name) and not name.startswith("."):
        return _download(name, offline)
    near = difflib.get_close_matches(name.lower(), MODELS, n=3, cutoff=0.5) or list(MODELS)
    raise UsageError(f"no model {name!r}: neither a file or folder nor an id ({', '.join(near)})")


def _download(repository: str, offline: bool) -> Path:
    """The local snapshot of a repository; from the cache alone when offline."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    offline = offline or bool(constants.HF_HUB_OFFLINE)
    try:
        folder = huggingface_hub.snapshot_download(
            repository, allow_patterns=_PATTERNS, local_files_only=offline
        )
    except errors.GatedRepoError:
        reason = "needs a login: accept its licence on the hub, then run `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "is not on the hub (misspelt, or private and no login)"
    except errors.LocalEntryNotFoundError as error:
        reason = "is not in the local cache" + _offline_hint(offline, error)
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = f"could not be fetched: {_first_line(error)}"
    else:
        return Path(folder)
    raise UsageError(f"{repository} {reason}") from None


def _offline_hint(offline: bool, error: Exception) -> str:
    if not offline:
        return f" and the hub did not answer: {_first_line(error)}"
    way = "without --offline" if not os.environ.get("HF_HUB_OFFLINE") else "without HF_HUB_OFFLINE"
    return f"; download it once {way}, or give a path"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
