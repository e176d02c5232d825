"""The kinds of input that are damaged: how a good one is made, which files of it are damaged, and what reads it."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_shards.ingest.volumes import UnreadableVolume
from data_shards.problems import InputProblems, WorkFailed

SMALL_NET = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}


class Refused(Exception):
    """A reader's answer: the input is not taken, and this line says why."""


@dataclass(frozen=True)
class Kind:
    """A kind of input. `read` returns a digest of all that it says, or raises; `files`: patterns of those damaged.

    `has_checksums`: damage can be seen, so that a result that differs is wrong. Elsewhere it is another valid file.
    `refusals`: what a reader may raise. Anything else is a fault of ours."""

    name: str
    make: Callable[[Path], object]
    files: tuple[str, ...]
    read: Callable[[Path], str]
    has_checksums: bool = False
    writes: bool = False
    """Whether reading changes files."""
    refusals: tuple[type[Exception], ...] = (InputProblems, WorkFailed, Refused, UnreadableVolume)

    def targets(self, folder: Path) -> list[Path]:
        """The files that are damaged, in a fixed order."""
        return sorted(file for pattern in self.files for file in folder.glob(pattern) if file.is_file())


def digest(parts: Iterable[Any]) -> str:
    """One text for arrays, tensors, bytes and plain values."""
    found = hashlib.sha256()
    for part in parts:
        array = part.numpy() if hasattr(part, "numpy") and not isinstance(part, np.ndarray) else part
        if isinstance(array, np.ndarray):
            found.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        else:
            found.update(repr(array).encode("utf-8", "backslashreplace"))
    return found.hexdigest()


def make_nifti(folder: Path, *, packed: bool) -> None:
    """An AMOS folder of a CT and an MR; `packed`: as .nii.gz."""
    from archive_support import write_archive

    root = write_archive(folder / "data")
    for file in sorted(root.glob("*/*.nii.gz")):
        if not file.parent.name.endswith("Tr"):
            file.unlink()
        elif not packed:
            file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
            file.unlink()
    content = json.loads((root / "dataset.json").read_text()) | {"validation": [], "test": []}
    text = json.dumps(content)
    (root / "dataset.json").write_text(text if packed else text.replace(".nii.gz", ".nii"))


def make_itk(folder: Path, ending: str) -> None:
    """A plain folder of CT volumes in another format, with a label table beside it."""
    from layouts_support import write_folder

    write_folder(ending)(folder / "data")
    for file in [*folder.glob("data/val/*/*"), *folder.glob("data/test/*/*"), *folder.glob("data/*/*/p1_2*")]:
        file.unlink()


def make_dicom(folder: Path) -> None:
    """A series with labels."""
    from dicom_support import write_dicom

    write_dicom(folder / "data")
    for case in ("p1_2", "p2_1", "p3_1"):
        shutil.rmtree(folder / "data" / "Mustermann" / case)


def make_pictures(folder: Path, *, is_export: bool) -> None:
    """Slices as pictures with their masks: PNG, TIFF and JPEG of other programs; or as `export --format png` writes."""
    from PIL import Image

    ids_HW = np.zeros((24, 24), np.uint8)
    ids_HW[4:12, 4:20], ids_HW[14:20, 6:12] = 1, 2
    for number, ending in enumerate((".png", ".png", ".png") if is_export else (".png", ".tif", ".jpg")):
        grey_HW = np.roll(np.linspace(0, 255, 576).astype(np.uint8).reshape(24, 24), number, axis=0)
        for part, pixels, suffix in (("images", grey_HW, ending), ("masks", ids_HW, ".png")):
            (folder / "data" / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / "data" / part / f"s{number}{suffix}")
    if not is_export:
        (folder / "data" / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "cyst": 1, "wall": 2}}))
        return
    record: dict[str, Any] = {"made_by": "segdiff sample", "label_table": ["background", "cyst", "wall", "body"]}
    record["label_colours"] = [None, "ff0000", None, None]
    (folder / "data" / "provenance.json").write_text(json.dumps(record))
    lines = [f"s{number},CT,p{number},p{number},train,2 2,2.0,-256.0" for number in range(3)]
    head = "name,target_modality,case_id,patient,split,spacing_mm,scale,offset"
    (folder / "data" / "items.csv").write_text("\n".join([head, *lines]) + "\n")


def read_volumes(folder: Path, **settings: Any) -> str:
    """As `segdiff prepare` reads them: names and headers of all, then the voxels of each."""
    from data_shards.ingest.case_slices import slices_of
    from data_shards.ingest.prepare_config import PrepareConfig
    from data_shards.ingest.survey import survey
    from data_shards.problems import refuse

    config = PrepareConfig(size=16, slice_stride=9, **settings)
    if (table := folder / "data.yaml").is_file():
        config = replace(config, modality="CT", labels=str(table))
    found = survey(folder / "data", config, None)
    refuse(found.problems)
    parts: list[Any] = []
    for case in found.cases:
        notes: list[str] = []
        for one in slices_of(case, config, None, notes, found.labelling):
            meta = replace(one.meta, source_sha256="")
            parts += [one.image_HW, one.mask_HW, meta]
        for note in notes:
            warnings.warn(note, stacklevel=1)
    return digest(parts)


def make_set(folder: Path, store: str) -> None:
    """A shard set of 14 slices."""
    from shards_support import write_set

    write_set(folder, store, "zstd")


def make_shapes(folder: Path) -> None:
    """A shard set in which each patient is in one split."""
    from tests_support import write_shapes

    write_shapes(folder, num_patients=2, slices=2, size=16)


def read_set(folder: Path) -> str:
    """Every sample of a set."""
    from data_shards.store.shards import ShardSet

    shards = ShardSet.open(folder)
    parts: list[Any] = [shards.label_table.names, shards.size, shards.bits]
    for row in range(len(shards)):
        try:
            sample = shards.read(row)
        except ValueError as error:
            if "verify the set with `segdiff inspect" not in str(error):
                raise
            raise Refused(str(error)) from error
        parts += [sample.image_HW, sample.mask_HW, sample.meta]
    return digest(parts)


def inspect_set(folder: Path) -> str:
    """What `segdiff inspect` says of it."""
    return digest([run_command("inspect", str(folder)).replace(str(folder), "")])


TABLE = {
    "name": "abdomen",
    "names": {1: "spleen", 6: "liver", 9: "vena cava"},
    "label_map": {"7": "background", 12: "liver"},
    "colours": {"liver": "#e5383b"},
}


def make_table(folder: Path) -> None:
    """A label table of one's own."""
    (folder / "table.yaml").write_text(yaml.safe_dump(TABLE))


def read_table(folder: Path) -> str:
    """The table and the ids of the data's classes."""
    from data_shards.ingest.label_tables import find_labelling
    from data_shards.problems import refuse

    labelling, problems = find_labelling("amos", str(folder / "table.yaml"), {0: "background", 1: "spleen", 6: "liver"})
    refuse(problems)
    return digest([labelling.table, sorted((labelling.ids or {}).items())])


def make_checkpoint(folder: Path) -> None:
    """checkpoints/ with two complete ones."""
    import torch

    from segdiff_dist.training import checkpoint, sharded_state
    from segdiff_dist.training.sharded_state import Extent, StateShard

    for images in (8, 16):
        one = folder / checkpoint.checkpoint_name(images)
        one.mkdir(parents=True)
        extents = (Extent("a", 0, 600, 0, 0), Extent("b", 0, 20, 0, 600))
        kinds = {"online": [torch.arange(620.0) + images], "ema_0.05": [torch.ones(620) * images]}
        sharded_state.write(one, 0, StateShard({"a": (20, 30), "b": (20,)}, extents, kinds, {"step": 1.0}))
        state = {"images_seen": images, "ranks": 1, "best_score": None, "best_images_seen": images, "guard": [0.0] * 5}
        state |= {"shards_digest": "x", "window": {"loss": [0.5, 1.0]}, "sound": True}
        (one / checkpoint.STATE).write_text(json.dumps(state))
        checksum = checkpoint.crc32c((one / checkpoint.STATE).read_bytes())
        (one / checkpoint.MARKER).write_text(f"{checksum}\n")


def read_checkpoint(folder: Path) -> str:
    """As a training that is resumed: the newest usable one. One that is skipped must be warned of."""
    from segdiff_dist.training import checkpoint
    from segdiff_dist.training.sharded_state import SavedState

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = checkpoint.newest_usable(folder)
    if said:
        raise Refused(str(said[0].message))
    assert found is not None
    saved = SavedState(found, 1)
    return digest([checkpoint.read_state(found), *saved.full("online").values(), *saved.full("ema_0.05").values()])


def make_denoiser(folder: Path) -> None:
    """Exported weights of a small denoiser."""
    from data_shards.labels import AMOS
    from segdiff_dist.denoising.config import DenoiserConfig
    from segdiff_dist.denoising.denoiser import Denoiser

    net = {name: tuple(value) if isinstance(value, list) else value for name, value in SMALL_NET.items()}
    model = Denoiser(DenoiserConfig(**net), AMOS, 16)
    model.save(folder / "weights", model.state_dict())


def make_segmenter(folder: Path) -> None:
    """Exported weights of a small segmenter."""
    from data_shards.labels import AMOS
    from segdiff_dist.segmentation.config import SegmenterConfig
    from segdiff_dist.segmentation.network import SegmenterNet
    from segdiff_dist.segmentation.segmenter import save_segmenter

    config = SegmenterConfig(channels=(8, 16))
    net = SegmenterNet(config, AMOS.num_classes)
    save_segmenter(folder / "weights", net.state_dict(), config, AMOS)


def read_weights(folder: Path, kind: str) -> str:
    """As sampling or evaluation loads them."""
    from segdiff_dist import weight_files
    from segdiff_dist.denoising.denoiser import Denoiser
    from segdiff_dist.segmentation.segmenter import Segmenter

    weight_files.PAUSE_S = 0.0  # the wait for a folder that is being replaced
    loaded: Any = (Denoiser if kind == "denoiser" else Segmenter).load(folder / "weights")
    net = loaded if kind == "denoiser" else loaded.net
    return digest([*sorted(net.state_dict()), *net.state_dict().values()])


def make_config(folder: Path) -> None:
    """The smoke configuration as a file, and a shard set beside it."""
    from tests_support import write_shapes

    from segdiff_dist.shipped import find_config

    values = yaml.safe_load(Path(find_config("smoke")).read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    write_shapes(folder / "set", num_patients=2, slices=2)


def read_config(folder: Path, *command: str) -> str:
    """`segdiff COMMAND --dry-run` with this file."""
    flags = ("--config", str(folder / "config.yaml"), "--data", str(folder / "set"), "--run", str(folder / "run"))
    lines = run_command(*command, *flags, "--dry-run").splitlines()
    return digest(line for line in lines if not line.startswith("# "))  # estimates of this moment


def run_command(*args: str) -> str:
    """What a command prints. Refused: it ends with 1 or 2 and says why. An exception goes through."""
    from segdiff_dist.cli import main

    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            code = main(list(args))
        except SystemExit as end:  # of the parser of flags
            code = end.code if isinstance(end.code, int) else 2
    said = err.getvalue()
    if code == 0:
        return out.getvalue()
    words = f"{said}{out.getvalue()}"
    if code not in (1, 2) or "Traceback" in words or not words.strip():
        raise RuntimeError(f"exit code {code}: {words[-300:]}")
    raise Refused(words[:400])


def make_png(folder: Path) -> None:
    """A mask of grey ids."""
    from masks_support import drawn, save

    save(folder / "mask.png", drawn())


def read_png(folder: Path) -> str:
    """Its label ids."""
    from data_shards.ingest.png_files import read_png_ids

    return digest([read_png_ids(folder / "mask.png", (32,), 17)])


def make_run(folder: Path) -> None:
    """A run folder with samples and their evaluation."""
    from evaluation_support import evaluate_here
    from tests_support import write_shapes

    from data_shards.store.shards import ShardSet

    shapes = write_shapes(folder / "set", num_patients=2, slices=2, size=16)
    evaluate_here(folder / "run", shapes, rows=ShardSet.open(shapes).select().tolist()[:2])


def read_samples(folder: Path) -> str:
    """Every image of a job, as each user of the store reads it."""
    from segdiff_dist.export.samples import FinishedSamples
    from segdiff_dist.sampling.store import SampleStore

    store = SampleStore.open(folder / "run" / "samples")
    FinishedSamples.of(store, None)
    if store.missing():
        raise Refused(f"{len(store.missing())} images are missing")
    for damage in store.damaged():
        raise Refused(str(damage))
    job = {name: value for name, value in store.job.items() if name != "device"}
    return digest([store.image[:], store.mask[:], store.items.to_pylist(), sorted(job.items(), key=str)])


def read_evaluation(folder: Path) -> str:
    """The figures that a report is drawn from."""
    from segdiff_dist.evaluation.measure.result_files import read_rows, read_summary

    run = folder / "run"
    return digest([read_summary(run), read_rows(run, ["row", "case_id", "dice_mask_gen"]).to_pylist()])


def kinds() -> dict[str, Kind]:
    """All kinds, by name."""
    found = [
        Kind("nifti", partial(make_nifti, packed=False), ("data/*Tr/*.nii",), read_volumes),
        Kind("nifti-gz", partial(make_nifti, packed=True), ("data/*Tr/*.nii.gz",), read_volumes, has_checksums=True),
        Kind("dataset.json", partial(make_nifti, packed=True), ("data/dataset.json",), read_volumes),
        Kind("mha", partial(make_itk, ending=".mha"), ("data/**/*.mha",), read_volumes),
        Kind("nrrd", partial(make_itk, ending=".nrrd"), ("data/**/*.nrrd",), read_volumes),
        Kind("dicom", make_dicom, ("data/**/*",), read_volumes),
        Kind("pictures", partial(make_pictures, is_export=False), ("data/*s/*",), partial(read_volumes, **OF_PICTURES)),
        Kind("export", partial(make_pictures, is_export=True), ("data/*s/*", "data/*.*"), read_volumes),
        Kind("tar", partial(make_set, store="webdataset"), ("shards/*.tar", "samples.arrow"), read_set, True),
        Kind("zarr", partial(make_set, store="zarr"), ("shards/**/*", "samples.arrow"), read_set, True),
        Kind("inspect", make_shapes, ("shards/*.tar", "*.*"), inspect_set, writes=True),
        Kind("index.json", partial(make_set, store="webdataset"), ("index.json",), read_set),
        Kind("table.yaml", make_table, ("table.yaml",), read_table),
        Kind("checkpoint", make_checkpoint, ("*16/*.safetensors", "*16/*.json"), read_checkpoint, True, True),
        Kind("denoiser", make_denoiser, ("weights/*",), partial(read_weights, kind="denoiser"), True),
        Kind("segmenter", make_segmenter, ("weights/*",), partial(read_weights, kind="segmenter"), True),
        Kind("config.yaml", make_config, ("config.yaml",), lambda folder: read_config(folder, "train")),
        Kind("png", make_png, ("mask.png",), read_png, True),
        Kind("job.json", make_run, ("run/samples/job.json",), read_samples),
        Kind("samples", make_run, SAMPLE_FILES, read_samples, True),
        Kind("evaluation", make_run, ("run/evaluation/summary.json", "run/evaluation/*.parquet"), read_evaluation),
    ]
    return {kind.name: kind for kind in found}


OF_PICTURES: dict[str, Any] = {"modality": "US", "pixel_mm": 2.0, "intensities": {"US": "values 0 255"}}
SAMPLE_FILES = (
    *(f"run/samples/{name}" for name in ("items.parquet", "layout.json", "done/*", "images.zarr/**/zarr.json")),
    *(f"run/samples/images.zarr/{name}/c/*/*/*" for name in ("image", "mask")),
)


def copy_of(source: Path, target: Path) -> Path:
    """A fresh copy of a good input."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))
