"""A shard set: WebDataset tars, a table of where every sample lies in them, and an index that vouches for both.

    OUT/index.json                 written last; a folder without it is unfinished
    OUT/samples.parquet            one row a sample: its meta, its shard, and where its bytes begin
    OUT/shards/train-000000.tar    {key}.image.npy {key}.mask.npy {key}.meta.json (or .png for codec png)
    OUT/shards/train-000000.idx    the same offsets in the format of DALI's wds2idx, v1.2

Tars hold fixed times, owners and modes, so the same samples give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from data_shards import __version__
from data_shards.labels import LabelTable
from data_shards.problems import Problem, problem, refuse
from data_shards.records import SliceMeta, SliceRecord

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 1
CODECS = ("raw", "png")
PARTIAL = ".partial"  # where prepare keeps finished volumes until all are done
INDEX = "index.json"
SAMPLES = "samples.parquet"
SHARDS = "shards"
_UNFINISHED = "shards.unfinished"
_WHERE = ("shard", "image_offset", "image_bytes", "mask_offset", "mask_bytes")


def encode(pixels_HW: np.ndarray, codec: str) -> bytes:
    """The bytes of one tar member for uint8 pixels: a NumPy 1.0 file (raw) or a PNG. Both lossless."""
    assert pixels_HW.dtype == np.uint8
    assert pixels_HW.ndim == 2
    stream = io.BytesIO()
    if codec == "raw":
        np.lib.format.write_array(stream, np.ascontiguousarray(pixels_HW), version=(1, 0), allow_pickle=False)
    else:
        from PIL import Image

        Image.fromarray(pixels_HW).save(stream, format="png")
    return stream.getvalue()


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_index(path: Path) -> dict[str, Any]:
    """The parsed index.json of the set at `path`. Raises InputProblems when it is missing, broken or too new."""
    index_file = path / INDEX
    if not path.is_dir():
        raise problem(path, "shard set", "not a folder", "give the folder that `segdiff prepare` wrote")
    if not index_file.is_file():
        remedy = "give the folder that `segdiff prepare` wrote"
        if (path / PARTIAL).exists() or (path / _UNFINISHED).exists() or (path / SHARDS).exists():
            remedy = "start the same `segdiff prepare` command again, it goes on where it stopped"
        raise problem(path, INDEX, "missing: the set is unfinished", remedy)
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        version = int(index["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise problem(index_file, "content", f"not a shard set's index ({error})", "prepare the set again") from error
    if version > FORMAT_VERSION:
        remedy = f"this version reads up to {FORMAT_VERSION}: install the segdiff-dist that wrote it, or a newer one"
        raise problem(index_file, "format_version", version, remedy)
    return dict(index)


@dataclass
class ShardWriter:
    """Writes samples, in the order given, into tars under `out`; nothing counts until `finish` has named them.

    A new tar begins with each split and after `samples_per_shard` samples. Samples of a split come in one run.
    """

    out: Path
    codec: str
    samples_per_shard: int
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _shards: list[dict[str, Any]] = field(default_factory=list)
    _waiting: list[dict[str, Any]] = field(default_factory=list)
    _stream: BinaryIO | None = None
    _tar: Any = None

    def __post_init__(self) -> None:
        assert self.codec in CODECS
        assert self.samples_per_shard > 0
        shutil.rmtree(self.out / _UNFINISHED, ignore_errors=True)
        (self.out / _UNFINISHED).mkdir(parents=True)

    def write(self, meta: SliceMeta, image: bytes, mask: bytes) -> None:
        """Append one sample; `image` and `mask` are what `encode` returned."""
        if self._waiting and (self._waiting[0]["split"] != meta.split or len(self._waiting) == self.samples_per_shard):
            self._close_shard()
        if self._tar is None:
            self._open_shard(meta.split)
        extension = "npy" if self.codec == "raw" else "png"
        values = meta.to_json()
        self._tar.write(
            {
                "__key__": meta.key,
                f"image.{extension}": image,
                f"mask.{extension}": mask,
                "meta.json": json.dumps(values, sort_keys=True).encode(),
            }
        )
        self._waiting.append({"key": meta.key, **values})

    def finish(self, header: dict[str, Any]) -> dict[str, Any]:
        """Close the last tar, move everything into place and write index.json (header + shards). Returns the index."""
        if self._waiting:
            self._close_shard()
        samples_file = self.out / f"{SAMPLES}.unfinished"
        _write_samples(self._rows, samples_file)
        index = {
            "format_version": FORMAT_VERSION,
            "producer": {"name": "segdiff-dist", "version": __version__},
            **header,
            "codec": self.codec,
            "num_samples": len(self._rows),
            "shards": self._shards,
            "samples": {
                "file": SAMPLES,
                "bytes": samples_file.stat().st_size,
                "sha256": file_sha256(samples_file),
            },
        }
        # From here until the new index stands there is none: a kill in between leaves a set that says it is unfinished.
        (self.out / INDEX).unlink(missing_ok=True)
        shutil.rmtree(self.out / SHARDS, ignore_errors=True)
        (self.out / _UNFINISHED).rename(self.out / SHARDS)
        samples_file.rename(self.out / SAMPLES)
        index_file = self.out / f"{INDEX}.unfinished"
        index_file.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        index_file.rename(self.out / INDEX)
        return index

    def _open_shard(self, split: str) -> None:
        import webdataset

        number = sum(shard["split"] == split for shard in self._shards)
        name = f"{split}-{number:06d}.tar"
        self._stream = (self.out / _UNFINISHED / name).open("wb")
        self._tar = webdataset.TarWriter(
            self._stream, encoder=False, mtime=0, user="segdiff", group="segdiff", mode=0o644
        )
        self._shards.append({"file": f"{SHARDS}/{name}", "split": split})

    def _close_shard(self) -> None:
        assert self._stream is not None
        self._tar.close()
        self._stream.close()
        shard = self._shards[-1]
        path = self.out / _UNFINISHED / Path(shard["file"]).name
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
        assert len(members) == 3 * len(self._waiting), "three members a sample"
        _write_dali_index(path.with_suffix(".idx"), members)
        header = 0 if self.codec == "png" else _npy_header_bytes(path, members[0])
        for row, image, mask in zip(self._waiting, members[0::3], members[1::3], strict=True):
            where = (
                len(self._shards) - 1,
                image.offset_data + header,
                image.size - header,
                mask.offset_data + header,
                mask.size - header,
            )
            self._rows.append({**row, **dict(zip(_WHERE, where, strict=True))})
        shard.update(bytes=path.stat().st_size, samples=len(self._waiting), sha256=file_sha256(path))
        self._stream, self._tar, self._waiting = None, None, []


def _npy_header_bytes(path: Path, member: tarfile.TarInfo) -> int:
    """Bytes before the pixels of a NumPy file; the same for all arrays of one shape."""
    with path.open("rb") as stream:
        stream.seek(member.offset_data)
        np.lib.format.read_magic(stream)
        np.lib.format.read_array_header_1_0(stream)
        return stream.tell() - member.offset_data


def _write_dali_index(path: Path, members: Sequence[tarfile.TarInfo]) -> None:
    lines = [f"v1.2 {len(members) // 3}"]
    for start in range(0, len(members), 3):
        of_sample = members[start : start + 3]
        lines.append(" ".join(f"{m.name.split('.', 1)[1]} {m.offset_data} {m.size} {m.name}" for m in of_sample))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _samples_schema() -> pa.Schema:
    import pyarrow as pa

    text, whole, real = pa.string(), pa.int64(), pa.float64()
    columns: list[tuple[str, pa.DataType]] = [
        ("key", text),
        ("case_id", text),
        ("modality", text),
        ("axis", text),
        ("slice_index", whole),
        ("split", text),
        ("spacing_mm", pa.list_(real, 2)),
        ("affine", pa.list_(real, 16)),
        ("intensity_scale", real),
        ("intensity_offset", real),
        ("label_set", text),
        ("labels_present", pa.list_(pa.uint8())),
        ("labelled", pa.bool_()),
        ("source_sha256", text),
        ("shard", whole),
        ("image_offset", whole),
        ("image_bytes", whole),
        ("mask_offset", whole),
        ("mask_bytes", whole),
    ]
    return pa.schema(columns)


def _write_samples(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows, schema=_samples_schema()), path, compression="zstd")


@dataclass
class ShardSet:
    """A finished shard set, opened for reading: `samples` in memory, the tars memory-mapped as they are touched.

    `size`: slices are size x size. `digest`: sha256 of index.json, so it names every byte of the set.
    `samples`: one row a sample, in the order of the tars (split, case, axis, slice).
    """

    path: Path
    label_table: LabelTable
    size: int
    codec: str
    index: dict[str, Any]
    digest: str
    samples: pa.Table
    _where: np.ndarray = field(init=False, repr=False)
    _maps: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # Columns of Arrow are slow to read one value at a time.
        self._where = np.stack([self.samples[name].to_numpy() for name in _WHERE], axis=1)

    @classmethod
    def open(cls, path: Path, *, verify: bool = False) -> ShardSet:
        """Open the set at `path`; `verify` reads every byte and compares checksums.

        Raises InputProblems: no folder, no index (unfinished), a newer format, files missing or of another length
        than the index says and, with `verify`, files whose bytes changed.
        """
        import pyarrow.parquet as pq

        path = Path(path)
        index = read_index(path)
        refuse(_broken_files(path, index, verify=verify))
        table = LabelTable(index["label_table"]["name"], tuple(index["label_table"]["names"]))
        return cls(
            path=path,
            label_table=table,
            size=int(index["preprocessing"]["size"]),
            codec=index["codec"],
            index=index,
            digest=file_sha256(path / INDEX),
            samples=pq.read_table(path / SAMPLES).combine_chunks(),
        )

    def __len__(self) -> int:
        return int(self.samples.num_rows)

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        # Another process opens the files itself; memory maps would be copied whole.
        return ShardSet.open, (self.path,)

    def select(
        self,
        *,
        split: str | None = None,
        modalities: Sequence[str] | None = None,
        axes: Sequence[str] | None = None,
        labelled_only: bool = True,
    ) -> np.ndarray:
        """Rows of `samples` that fit all of the conditions given: int64, ascending."""
        import pyarrow as pa
        import pyarrow.compute as pc

        keep = np.ones(len(self), dtype=bool)
        for column, allowed in (("split", split and [split]), ("modality", modalities), ("axis", axes)):
            if allowed is not None:
                member = pc.is_in(self.samples[column], value_set=pa.array(list(allowed), pa.string()))
                keep &= member.to_numpy(zero_copy_only=False)
        if labelled_only:
            keep &= self.samples["labelled"].to_numpy()
        return np.flatnonzero(keep).astype(np.int64)

    def raw_pair(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Encoded image and mask of a row: 1-D uint8 views of the tar, H * W pixels (raw) or a PNG file (png)."""
        shard, image_offset, image_bytes, mask_offset, mask_bytes = self._where[row].tolist()
        mapped = self._map(shard)
        return mapped[image_offset : image_offset + image_bytes], mapped[mask_offset : mask_offset + mask_bytes]

    def read(self, row: int) -> SliceRecord:
        """Decode one sample. Raises ValueError naming shard and sample when its bytes are no image of its size."""
        meta = self.meta(row)
        image, mask = (self._decode(payload, row, meta.key) for payload in self.raw_pair(row))
        return SliceRecord(image, mask, meta)

    def read_mask(self, row: int) -> np.ndarray:
        """Decode only the mask of a sample: uint8 [H, W]."""
        return self._decode(self.raw_pair(row)[1], row, self.samples["key"][int(row)].as_py())

    def meta(self, row: int) -> SliceMeta:
        """The meta of a row."""
        values = self.samples.slice(int(row), 1).to_pylist()[0]
        return SliceMeta.from_json({name: values[name] for name in SliceMeta.__dataclass_fields__})

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.path / self.index["shards"][shard]["file"], dtype=np.uint8, mode="r")
        return self._maps[shard]

    def _decode(self, payload: np.ndarray, row: int, key: str) -> np.ndarray:
        shape = (self.size, self.size)
        try:
            if self.codec == "raw":
                return np.array(payload).reshape(shape)
            from PIL import Image

            pixels = np.asarray(Image.open(io.BytesIO(payload.tobytes())))
            if pixels.shape != shape or pixels.dtype != np.uint8:
                raise ValueError(f"it holds {pixels.dtype} {pixels.shape}, not uint8 {shape}")
            return pixels
        except (OSError, ValueError, SyntaxError) as error:
            shard = self.path / self.index["shards"][int(self._where[row, 0])]["file"]
            raise ValueError(f"{shard}: sample {key}: {error}; verify the set with `segdiff inspect`") from error


def _broken_files(path: Path, index: dict[str, Any], *, verify: bool) -> list[Problem]:
    """What index.json says against what lies on disk."""
    found = []
    for entry in (*index["shards"], index["samples"]):
        file = path / entry["file"]
        remedy = "restore the file, or remove the folder and prepare it again"
        if not file.is_file():
            found.append(Problem(str(file), "file", "missing", remedy))
        elif (num_bytes := file.stat().st_size) != entry["bytes"]:
            value = f"{num_bytes} where index.json says {entry['bytes']}"
            found.append(Problem(str(file), "bytes", value, remedy))
        elif verify and (digest := file_sha256(file)) != entry["sha256"]:
            value = f"{digest[:12]}... where index.json says {entry['sha256'][:12]}..."
            found.append(Problem(str(file), "sha256", value, remedy))
    return found
