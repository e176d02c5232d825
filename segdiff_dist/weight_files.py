"""Reading and writing folders of weights: with the digest of every file, and a check of the shapes before the network
is built.

    FOLDER/digests.json     CRC-32C and bytes of the files that make the net; older folders have none

Weights are safetensors, or a .pt of tensors alone: torch reads it without running what is in it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from data_shards.documents import read_json, reading
from data_shards.files import first_line, write_atomic
from data_shards.problems import InputProblems, Problem, problem, refuse

if TYPE_CHECKING:
    from torch import Tensor, nn

Net = TypeVar("Net", bound="nn.Module")

# In every folder of weights: what they are, and how they were trained.
DESCRIPTION = "segdiff.json"
DIGESTS = "digests.json"
# All weights of a net in one file, as a MONAI bundle has them.
MODEL_FILE = "model.pt"
# A folder is replaced file by file, quickly; a reader tries again before it reports damage.
_LOOKS, PAUSE_S = 5, 0.2


def write_digests(folder: Path, names: Iterable[str]) -> None:
    """Leave digests.json for files of a folder."""
    from data_shards.store.set_index import file_crc32c

    files = [folder / name for name in names]
    digests = {file.name: {"bytes": file.stat().st_size, "crc32c": file_crc32c(file)} for file in files}
    write_atomic(folder / DIGESTS, json.dumps(digests, indent=1, sort_keys=True) + "\n")


def folder_digest(folder: Path) -> str:
    """sha256 over the files of a folder of weights. Folders inside do not belong to it."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def refuse_damaged(folder: Path, what: str, remedy: str) -> None:
    """Compare a folder's files with its digests.json, if it has one. Raises InputProblems, a problem a file."""
    for look in range(_LOOKS):
        problems = _damage(folder, what, remedy)
        if not problems:
            return
        if look < _LOOKS - 1:
            time.sleep(PAUSE_S)
    refuse(problems)


def is_damaged(folder: Path) -> bool:
    """Whether a file of a folder is not as its digests.json says, at one look."""
    return bool(_damage(folder, "weights", ""))


def _damage(folder: Path, what: str, remedy: str) -> list[Problem]:
    from data_shards.store.set_index import file_crc32c

    file = folder / DIGESTS
    if not file.is_file():
        return []
    problems = []
    try:
        digests = read_json(file, remedy, "the digests of a folder of weights")
        with reading(file, "the digests of a folder of weights", remedy):
            for name, expected in digests.items():
                path = folder / Path(name).name
                if not path.is_file():
                    problems.append(Problem(str(path), what, "missing", remedy))
                elif path.stat().st_size != expected["bytes"] or file_crc32c(path) != expected["crc32c"]:
                    problems.append(Problem(str(path), what, "its bytes are not those that were written", remedy))
    except InputProblems as error:
        problems += error.problems
    return problems


def read_weights(files: Iterable[tuple[str, Path]], make: Callable[[], Net], what: str, remedy: str) -> Net:
    """The net that `make` builds, with the weights of `files`: (prefix of the names in a file, file).

    The net is built without memory first: a few bytes of a description can ask for more than a machine has. Raises
    InputProblems: files that cannot be read, another net's, values that are not finite.
    """
    from pickle import UnpicklingError

    import torch
    from safetensors import SafetensorError

    files = list(files)
    where = files[0][1].parent
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for prefix, file in files:
            shapes |= {f"{prefix}{key}": shape for key, shape in _shapes(file).items()}
        with reading(where, "the description of a net", remedy, what), torch.device("meta"):
            expected = {name: tuple(value.shape) for name, value in make().state_dict().items()}
        refuse(_differences(where, what, shapes, expected, remedy))
        net = make()
        weights: dict[str, Tensor] = {}
        for prefix, file in files:
            weights |= {f"{prefix}{key}": value for key, value in _tensors(file).items()}
        net.load_state_dict(weights)
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, ValueError) as error:
        if isinstance(error, InputProblems):
            raise
        raise problem(where, what, f"cannot be read: {first_line(error)}", remedy) from error
    not_finite = [name for name, value in net.state_dict().items() if not value.isfinite().all()]
    if not_finite:
        raise problem(where, what, f"not finite, as {not_finite[0]}", "use another average or checkpoint")
    return net


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Of a file's tensors; of safetensors without reading them."""
    from safetensors import safe_open

    if file.suffix == ".pt":
        return {key: tuple(value.shape) for key, value in _tensors(file).items()}
    with safe_open(file, "pt") as opened:
        return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118


def _tensors(file: Path) -> dict[str, Tensor]:
    import torch
    from safetensors.torch import load_file

    if file.suffix != ".pt":
        return load_file(file)
    found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{file.name} is not a dictionary of tensors")
    return found


def _differences(
    where: Path, what: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], remedy: str
) -> list[Problem]:
    """The first parameter of which file and description differ, and how many do."""
    differing = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    if not differing:
        return []
    name = differing[0]
    shown = [("x".join(map(str, one[name])) or "a number") if name in one else "nothing" for one in (found, expected)]
    value = f"another net's: {name[:100]} is {shown[0]} in the file and {shown[1]} in the description"
    more = f" ({len(differing) - 1} more differ)" if len(differing) > 1 else ""
    return [Problem(str(where), what, value + more, remedy)]
