"""The folder of a model that is named by a path, a URL or a Hugging Face name. What is fetched is kept in a cache.

Only weights (safetensors) and JSON are taken: nothing that is fetched can run code.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from data_shards.documents import read_json
from data_shards.field_source import is_address
from data_shards.files import first_line, new_folder
from data_shards.problems import InputProblems, problem
from segdiff_dist.weight_files import DESCRIPTION, DIGESTS

# The model that comes with the package.
STARTER = Path(__file__).parents[1] / "starter"
# A slice of the phantom, in AMOS' ids.
EXAMPLE_MASK = Path(__file__).with_name("example_mask.png")
CACHE = "SEGDIFF_CACHE"
# The files of a net's folder; the first three are always there.
_OF_A_NET = (
    *("config.json", "diffusion_pytorch_model.safetensors", DESCRIPTION),
    *("mask_encoder.safetensors", "control.safetensors", DIGESTS),
)
_NEEDED = (DESCRIPTION, *(f"unet/{name}" for name in _OF_A_NET[:3]))
_OPTIONAL = (
    *("model_index.json", "README.md", "scheduler/scheduler_config.json"),
    *(f"unet/{name}" for name in _OF_A_NET[3:]),
    *("segmenter/model.safetensors", f"segmenter/{DESCRIPTION}", f"segmenter/{DIGESTS}"),
)
# Folders of further nets, by the key of a net's description: the autoencoder of latents, the lower stage of a cascade.
_FURTHER = {"latent": "vae", "cascade": "{net}/low_resolution"}
_MOST_NETS = 8
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# More than any of these nets has; a server may send without end.
_MOST_BYTES = 8 * 2**30
_BLOCK = 2**20


def model_folder(given: str | Path | None) -> Path:
    """The folder on this machine; None gives the model of the package. Raises InputProblems."""
    if given is None:
        if not (STARTER / DESCRIPTION).is_file():
            remedy = "name a model with --model, or make it: `make starter` in the checkout"
            raise problem(STARTER, "model", "this package has no model to begin with", remedy)
        return STARTER
    text = str(given)
    if text.startswith("file:"):
        return _existing(Path(unquote(urlsplit(text).path)), text)
    if is_address(text):
        return _of_url(text.rstrip("/"))
    if not Path(given).exists() and isinstance(given, str) and _HUB_NAME.fullmatch(text):
        return _of_hub(text)
    return _existing(Path(given), text)


def kind_of_folder(folder: Path) -> Literal["pipeline", "run", "weights"]:
    """What a model's folder is, by the files in it; nothing heavy is loaded; a MONAI bundle counts as a pipeline.
    Raises InputProblems."""
    if any((folder / name / DESCRIPTION).is_file() for name in ("unet", "configs")):
        return "pipeline"
    if (folder / "weights").is_dir():
        return "run"
    if (folder / "diffusion_pytorch_model.safetensors").is_file():
        return "weights"
    remedy = "give a run folder, or what `segdiff export OUT --run RUN --format pipeline` wrote"
    raise problem(folder, "--model", "neither a run folder nor a pipeline", remedy)


def cache_folder() -> Path:
    """Where fetched models are kept: $SEGDIFF_CACHE, or `segdiff` in the user's cache."""
    own = os.environ.get(CACHE)
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segdiff"


def _existing(folder: Path, text: str) -> Path:
    if folder.is_dir():
        return folder
    remedy = "give a run folder, an exported pipeline, a URL (https:, s3:, file:) or a Hugging Face name (OWNER/NAME)"
    raise problem(text, "--model", "a file" if folder.is_file() else "no such folder", remedy)


def _of_url(url: str) -> Path:
    """The files of a pipeline folder below a URL, from the cache if they are there."""
    import fsspec

    folder = cache_folder() / "models" / hashlib.sha256(url.encode()).hexdigest()[:24]
    if (folder / DESCRIPTION).is_file():
        return folder
    try:
        files, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise problem(url, "--model", first_line(error), "install what this kind of URL needs") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with new_folder(folder) as unfinished:
            _fetch_all(files, root, unfinished, url)
    except InputProblems:
        raise
    except Exception as error:  # each kind of store raises errors of its own
        raise problem(url, "--model", f"cannot be fetched ({first_line(error)})", _remedy(error)) from error
    return folder


def _remedy(error: Exception) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "if you trust this server, name the certificate of its authority: export SSL_CERT_FILE=FILE.pem"
    return "check the address and the connection; without one, give a folder on this machine"


def _fetch_all(files: Any, root: str, target: Path, url: str) -> None:
    """A pipeline's files, with those of further nets that its net's description names."""
    nets = ["unet"]
    _fetch_named(files, root, target, url, (*_NEEDED, *_OPTIONAL))
    for net in nets:
        said = read_json(target / net / DESCRIPTION, "give the address of a whole folder")
        further = [folder.format(net=net) for key, folder in _FURTHER.items() if key in said]
        for folder in further[: _MOST_NETS - len(nets)]:
            _fetch_named(files, root, target, url, [f"{folder}/{name}" for name in _OF_A_NET])
            nets += [folder] if (target / folder / DESCRIPTION).is_file() else []


def _fetch_named(files: Any, root: str, target: Path, url: str, names: Iterable[str]) -> None:
    for name in names:
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            _fetch(files, f"{root}/{name}", file)
        except FileNotFoundError as error:
            _raise_if_unanswered(error)
            if name in _NEEDED:
                remedy = "give the address of a folder that `segdiff export --format pipeline` wrote"
                raise problem(url, "--model", f"no {name} there", remedy) from error
            file.unlink(missing_ok=True)


def _raise_if_unanswered(error: FileNotFoundError) -> None:
    """fsspec's HTTP files say FileNotFoundError whatever failed: raise what did, if it is not that the file is missing.
    Stores that may not be listed say 403 of a missing file."""
    reason = error.__cause__
    if isinstance(reason, Exception) and getattr(reason, "status", None) not in (403, 404, 410):
        raise reason


def _fetch(files: Any, address: str, file: Path) -> None:
    total = 0
    # From the beginning: many HTTP servers cannot send parts of a file.
    options = {"block_size": 0} if "http" in files.protocol else {}
    with files.open(address, "rb", **options) as source, file.open("wb") as target:
        while block := source.read(_BLOCK):
            total += len(block)
            if total > _MOST_BYTES:
                raise problem(address, "--model", "longer than any model", "give another address")
            target.write(block)


def _of_hub(name: str) -> Path:
    """The files of a pipeline on a Hugging Face hub (HF_ENDPOINT), through its own library and cache."""
    import huggingface_hub

    repository, _, revision = name.partition("@")
    wanted = [*_NEEDED, *_OPTIONAL, *(f"{net}/*.{kind}" for net in ("unet", "vae") for kind in ("json", "safetensors"))]
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
    except Exception as error:  # of the hub, of the network, of the cache
        value = f"cannot be fetched ({first_line(error, 160)})"
        remedy = (
            f"no folder of this name is here, and as a Hugging Face name it needs a connection, or files in its cache "
            f"(`hf download {repository}`); without --model the model of the package is used"
        )
        raise problem(name, "--model", value, remedy) from error
    if missing := [one for one in _NEEDED if not (folder / one).is_file()]:
        remedy = "give the name of a repository that holds what `segdiff export --format pipeline` wrote"
        raise problem(name, "--model", f"no {missing[0]} in it", remedy)
    return folder
