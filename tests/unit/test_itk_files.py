"""MetaImage and NRRD are checked as NIfTI is, and damaged ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from layouts_support import save, volumes

from data_shards.ingest.volume_files import read_geometry
from data_shards.ingest.volumes import UnreadableVolume, read_volume
from data_shards.problems import InputProblems

sitk = pytest.importorskip("SimpleITK")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-400])


def _elsewhere(file: Path) -> None:
    file.write_text(file.read_text().replace("p1_1.raw", "../../p1_1.raw"))


def _listed_data(file: Path) -> None:
    file.write_text(file.read_text().replace("p1_1.raw", "LIST"))


def _metres(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"ElementSpacing = 4 4 6", b"ElementSpacing = 4000 4000 6000"))


@pytest.mark.parametrize(
    ("ending", "spoil", "field"),
    [
        (".mha", _cut, "shape"),
        (".nrrd", _cut, "shape"),
        (".mha", _metres, "spacing"),
        (".mhd", _elsewhere, "data file"),
        (".mhd", _listed_data, "data file"),
    ],
)
def test_files_of_other_formats_are_checked_like_nifti(
    ending: str, spoil: Callable[[Path], None], field: str, tmp_path: Path
) -> None:
    _, _, image, _ = next(volumes())
    file = tmp_path / f"p1_1{ending}"
    save(file, image)
    spoil(file)
    with pytest.raises(InputProblems) as found:
        read_geometry(file)
    assert [one.field for one in found.value.problems] == [field]


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_a_damaged_packed_file_is_refused(ending: str, tmp_path: Path) -> None:
    """Its header is whole, so that only the voxels' checksum shows it."""
    _, _, image, _ = next(volumes())
    file = tmp_path / f"p1_1{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(image.T), str(file), True)
    assert read_volume(file).voxels_IJK.shape == image.shape
    content = bytearray(file.read_bytes())
    content[-3000] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(UnreadableVolume, match="damaged"):
        read_volume(file)


@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="needs Linux's count of bytes")
@pytest.mark.parametrize(("ending", "word"), [(".mha", b"DimSize = "), (".nrrd", b"sizes: ")])
def test_of_a_large_file_the_header_alone_is_read(ending: str, word: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"p1_1{ending}"
    save(file, next(volumes())[2])
    content = file.read_bytes().replace(word + b"32 32 8", word + b"32 32 800")
    with file.open("wb") as stream:
        stream.write(content)
        stream.truncate(len(content) + 2**24)
    before = _bytes_read()
    assert read_geometry(file).shape == (32, 32, 800)
    assert _bytes_read() - before < 2**17


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])
