"""Ingestion: slices a second with one worker and with two, the time of each step, and the memory of a volume.

The volumes are phantoms as large as those of AMOS: 512x512 pixels, 3 mm slices, CT and MR, with labels.

--against COMMIT compares with the code of another commit instead, from headers to shards, each time in a process of its
own, in turns. The rate is of CPU time on one thread.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.harness import Contender, arguments, compare, measure, report
from support.other_code import against

from data_shards.fan_out import ray_session
from data_shards.ingest.archive import read_archive
from data_shards.ingest.cases import Case
from data_shards.ingest.prepare import PrepareConfig, prepare
from data_shards.phantom import PhantomConfig, write_phantom

_PHANTOM = PhantomConfig(num_train=3, num_val=0, num_test=0, matrix=(512, 512), slice_thickness_mm=(3.0, 3.0))
# Each volume is prepared under several case ids, so that a run takes much longer than the start of its workers (about 3
# s).
_COPIES = 10


def multiplied(archive: Path, copies: int) -> Path:
    """An archive in which each case of `archive` comes `copies` times."""
    out = archive.with_name(f"{archive.name}-{copies}")
    content = json.loads((archive / "dataset.json").read_text(encoding="utf-8"))
    entries = []
    for entry in content["training"]:
        for copy in range(copies):
            files = {}
            for kind, file in entry.items():
                number = int(Path(file).name[5:9]) + 20 * copy
                files[kind] = f"{Path(file).parent}/amos_{number:04d}.nii.gz"
                (out / files[kind]).parent.mkdir(parents=True, exist_ok=True)
                if not (out / files[kind]).exists():
                    os.link(archive / file, out / files[kind])
            entries.append(files)
    (out / "dataset.json").write_text(json.dumps({**content, "training": entries}), encoding="utf-8")
    return out


def with_workers(archive: Path, folder: Path, num_workers: int, codec: str = "raw") -> Contender:
    """Times a whole `prepare`; Ray already runs, but without workers."""

    def run() -> tuple[float, float]:
        out = folder / "set"
        start = time.perf_counter()
        made = prepare(archive, out, PrepareConfig(num_workers=num_workers, codec=codec))
        seconds = time.perf_counter() - start
        assert not made.failed, made.failed
        shutil.rmtree(out)
        return made.num_samples, seconds

    return run


def where_the_time_goes(case: Case, folder: Path) -> dict[str, Any]:
    """Milliseconds a slice of each step, one volume after the other in one process, and what they read and write."""
    from data_shards.ingest import case_slices, masks, partials, volumes
    from data_shards.store.shard_writer import ShardTask, write_shard

    config = PrepareConfig()
    format = config.format
    clock = _Clock()
    image = clock.timed("read and unzip the image", lambda: volumes.read_volume(case.image))
    mask = clock.timed("read and unzip the labels", lambda: masks.read_case_mask(case, image, "amos", None))
    from data_shards.ingest.body import find_body
    from data_shards.ingest.intensity import grey_map
    from data_shards.ingest.slices import Cutting, cut
    from data_shards.modalities import grey_rule

    grey = clock.timed(
        "percentiles",
        lambda: grey_map(
            image,
            grey_rule(case.modality, {}),
            intensity="window",
            hu_window=config.hu_window,
            mr_percentiles=config.mr_percentiles,
            bits=8,
        ),
    )
    body = clock.timed("find the body", lambda: find_body(image, case.modality))
    geometry = {name: getattr(config, name) for name in ("size", "spacing_mm", "slice_stride", "fit")}
    num_slices = 0
    for axis in config.axes:
        cuts = cut(image, mask.volume, body, grey, Cutting(axis=axis, body_id=16, **geometry))
        num_slices += clock.timed(f"cut {axis}", lambda cuts=cuts: sum(1 for _ in cuts))
    records = list(case_slices.slices_of(case, config, None))
    samples = clock.timed("encode (raw)", lambda: [(r.meta, format.payloads(r)) for r in records])
    clock.timed("write the volume's slices", lambda: partials.write_partial(folder / "case", samples, "stamp"))
    run = partials.PartialRun(folder / "case", 0, len(samples), "stamp", format)
    (folder / ".done").mkdir(exist_ok=True)
    task = ShardTask(folder, "train", 0, format, (run,))
    import webdataset

    del webdataset  # loaded before the clock runs
    clock.timed("write the shard", lambda: write_shard(task, run.samples()))
    milliseconds = {name: round(1000 * seconds / num_slices, 3) for name, seconds in clock.seconds.items()}
    return {
        "case": case.case_id,
        "slices": num_slices,
        "ms a slice": milliseconds,
        "in all": round(sum(milliseconds.values()), 3),
    }


def peak_of_a_volume(case: Case, folder: Path) -> dict[str, Any]:
    """The peak memory of a worker's process for a volume, without the memory of its modules, relative to the volume's
    voxels; in a separate process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (case, folder))


def _peak(case: Case, folder: Path) -> dict[str, Any]:
    import numpy as np
    from scipy import ndimage, sparse

    from data_shards.ingest import case_slices, partials
    from data_shards.ingest.volumes import read_volume

    ndimage.label(np.ones((3, 3))), sparse.csr_array(np.ones((3, 3)))
    voxel_bytes = read_volume(case.image).voxels_IJK.nbytes
    config = PrepareConfig()
    before = _resident()
    with open("/proc/self/clear_refs", "w", encoding="ascii") as peaks:
        peaks.write("5")  # the highest mark starts anew
    records = case_slices.slices_of(case, config, None)
    partials.write_partial(folder / "peak", ((r.meta, config.format.payloads(r)) for r in records), "stamp")
    above = _resident("VmHWM") - before
    return {
        "volume_mib": round(voxel_bytes / 2**20),
        "peak_above_start_mib": round(above / 2**20),
        "times_the_volume": round(above / voxel_bytes, 2),
        "process_mib": round(_resident("VmHWM") / 2**20),
    }


def _resident(which: str = "VmRSS") -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        values = dict(line.split(":", 1) for line in status)
    return int(values[which].split()[0]) * 1024


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - start
        return result


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    folder = given or Path(tempfile.mkdtemp(prefix="bench-prepare-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if given is None:
            shutil.rmtree(folder)


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--data", type=Path, help="folder that keeps the volumes (1 GB); a temporary one if left out")
    parser.add_argument("--against", metavar="COMMIT", help="compare with the code of this commit")
    args = parser.parse_args()
    phantom = _PHANTOM
    if args.quick:
        phantom = PhantomConfig(num_train=2, num_val=0, num_test=0)
    with _folder(args.data) as folder:
        archive = folder / ("quick" if args.quick else "amos")
        print(f"drawing {2 * phantom.num_train} volumes in {archive}", file=sys.stderr)
        write_phantom(archive, phantom)
        if args.against is not None:
            return against(args, ("prepare", archive), unit="slices a CPU second")
        cases = read_archive(archive)
        archive = multiplied(archive, 1 if args.quick else _COPIES)
        notes: dict[str, Any] = {}
        for case in (cases[0], cases[-1]):
            scratch = Path(tempfile.mkdtemp(dir=folder))
            notes[f"time, {case.modality}"] = where_the_time_goes(case, scratch)
            notes[f"memory, {case.modality}"] = peak_of_a_volume(case, scratch)
            shutil.rmtree(scratch)
        with ray_session(num_cpus=max(2, os.cpu_count() or 1)):
            contenders = {f"prepare, {n} worker{'s' * (n > 1)}": with_workers(archive, folder, n) for n in (1, 2)}
            rates = measure(contenders, 1 if args.quick else args.rounds)
        ratios = [compare(rates, "prepare, 2 workers", "prepare, 1 worker", 1.8)]
        report(args, rates, ratios, unit="slices a second", notes=notes)


if __name__ == "__main__":
    main()
