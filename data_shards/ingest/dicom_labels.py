"""Labels of a DICOM series: Segmentation objects (SEG) and the contours of an RT Structure Set.

A voxel has one class, so segments that overlap are refused, unless a table maps one of them to background or both to
one class. `body` is the exception: other classes are painted over it.
Dimensions: I, J, K of the series (data_shards.ingest.dicom_series).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.ingest.dicom_files import RTSTRUCT, Header, library, quiet
from data_shards.ingest.dicom_series import LPS_TO_RAS, DicomSeries, files_sha256, to_ras
from data_shards.problems import Problem
from data_shards.wording import in_words

# A label's voxels are at most this far from the image's.
_TOLERANCE_VOXELS = 0.1
# A contour may be this far from a slice; beyond, it was drawn on another series.
_CONTOUR_VOXELS = 0.25
# Half the width, in voxels, in which a centre is on a line.
_ON_LINE = 0.01
# Corners of a contour that are one, in voxels: numbers are written with a few decimals of a mm.
_SAME_CORNER = 1e-3
# A hole may reach beyond its outline by less than this part of it: outlines are drawn by hand.
_CROSSING_SHARE = 0.1
# Contours that enclose an area (PS3.3 C.8.8.6).
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_OPEN = ("OPEN_PLANAR", "OPEN_NONPLANAR")
_GRID = "use labels that were drawn on this series, on its grid"

_Mask = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class LabelObject:
    """A SEG or RTSTRUCT file: `numbers` of its segments or regions with their names, and the UIDs of the series and
    frames of reference that it names. `uid`: of its own series. `fault`: why it cannot be used. `open_names`: regions
    of which it has lines alone. `images`: pairs of a series and one of its images that it was drawn on, by UIDs."""

    file: Path
    is_contours: bool
    names: tuple[tuple[int, str], ...]
    series_uids: tuple[str, ...]
    frame_uids: tuple[str, ...]
    uid: str
    fault: str | None = None
    open_names: tuple[str, ...] = ()
    images: tuple[tuple[str, str], ...] = ()

    def missing_images(self, series_uid: str, present: set[str]) -> int:
        """How many images of a series it names that are not `present`, by SOPInstanceUID. 0 if it names none of these:
        then their UIDs were changed, and not those in it."""
        named = {image for series, image in self.images if series == series_uid}
        return len(named - present) if named & present else 0


@dataclass(frozen=True)
class DicomLabels:
    """The labels of a series. `ids`: the stored id of each name."""

    name: str
    series: DicomSeries
    objects: tuple[LabelObject, ...]
    ids: Mapping[str, int]

    def __str__(self) -> str:
        return self.name

    @property
    def files(self) -> tuple[Path, ...]:
        """SEG and RTSTRUCT files."""
        return tuple(one.file for one in self.objects)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)

    def sha256(self) -> str:
        """Over all files."""
        return files_sha256(self.name, self.files)


def undeclared(segments: Any) -> list[int]:
    """Values of a label map (SegmentationType LABELMAP) that none of its segments has; 0 and its padding are none."""
    if str(segments.SegmentationType) != "LABELMAP":
        return []
    known = {0, *(int(one.SegmentNumber) for one in segments.SegmentSequence)}
    if (padding := segments.get("PixelPaddingValue")) is not None:
        known.add(int(padding))
    present = np.flatnonzero(np.bincount(np.ravel(segments.pixel_array)))
    return [int(value) for value in present if int(value) not in known]


def read_object(header: Header) -> LabelObject:
    """What a file of labels is about, without its pixels."""
    is_contours = header.kind == RTSTRUCT
    pydicom = library("pydicom", header.series_uid)
    try:
        with quiet():
            data = pydicom.dcmread(header.file, stop_before_pixels=True)
            return (_contours if is_contours else _segments)(header, data)
    except Exception as error:  # pydicom raises whatever the bytes lead it to
        fault = f"cannot be read ({type(error).__name__})"
        return LabelObject(header.file, is_contours, (), (), (header.frame_uid,), header.series_uid, fault)


def grid_problems(labels: DicomLabels) -> list[Problem]:
    """What headers show: objects that cannot be used, a class drawn twice, SEG on another grid than the image's."""
    problems = [Problem(labels.name, "labels", one.fault, _GRID) for one in labels.objects if one.fault]
    names = [name for one in labels.objects for _, name in one.names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        remedy = "keep the segment that is meant"
        problems.append(Problem(labels.name, "labels", f"{', '.join(twice[:4])}: drawn more than once", remedy))
    if problems or labels.series.affine is None:
        return problems
    wrong = (_grid_problem(labels, one) for one in labels.objects if not one.is_contours)
    return [Problem(labels.name, "labels", value, _GRID) for value in wrong if value]


def read_ids(labels: DicomLabels, ids: Mapping[int, int], body_id: int | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """uint8 [I, J, K]: the id, by `ids`, of each stored id; and texts about what is doubtful. Raises ValueError for
    segments that overlap, and for what cannot be read."""
    assert labels.series.shape is not None
    drawn = np.zeros(labels.series.shape, np.uint8, order="F")
    name_of: dict[int, str] = {}
    notes: list[str] = []
    opened = cache(partial(_opened, labels.name))  # a file is decoded once, not once for each of its segments
    wanted = [(one, number, name, ids[labels.ids[name]]) for one in labels.objects for number, name in one.names]
    for one, number, name, new in sorted(wanted, key=lambda entry: entry[3] != body_id):
        if new == 0:
            continue
        if one.is_contours:
            crossing: set[int] = set()
            masks = list(_contour_masks(labels, one, number, crossing))
            notes += _contour_notes(name, masks, len(crossing))
        else:
            masks = list(_segment_masks(labels, opened(one), number))
        for mask in masks:
            before = drawn[mask]
            strange = (before != 0) & (before != new) & (before != (body_id or 0))
            if strange.any():
                other = name_of[int(before[strange][0])]
                remedy = "map one to background, or both to one class, in a table (--prepare.labels TABLE.yaml)"
                raise ValueError(f"{other} and {name} overlap: a voxel has one class here; {remedy}")
            drawn[mask] = new
        name_of[new] = name
    return drawn, tuple(notes)


def _contour_notes(name: str, masks: list[_Mask], num_crossing: int) -> Iterator[str]:
    """What is doubtful about the contours of a region. `num_crossing`: slices in which some cross one another."""
    if (step := _usual_step([int(k[0]) for _, _, k in masks if len(k)])) > 1:
        between = "the slices between have none of it; interpolate the contours if that is wrong"
        yield f"{name} has contours in one of {step} slices alone: {between}"
    if num_crossing:
        shared = "what they share is left out, as a hole is; draw one outline if that is wrong"
        yield f"{name} has contours that cross one another in {in_words(num_crossing, 'slice')}: {shared}"


def _usual_step(slices: list[int]) -> int:
    """The usual distance between slices with contours; 0 if there are fewer than two. An organ of two parts has one
    large distance."""
    steps = sorted(np.diff(slices).tolist())
    return int(steps[(len(steps) - 1) // 2]) if steps else 0


def _segments(header: Header, data: Any) -> LabelObject:
    names = tuple((int(one.SegmentNumber), str(one.SegmentLabel).strip()) for one in data.SegmentSequence)
    # A label map may state what its 0 means.
    names = tuple((number, name) for number, name in names if number != 0)
    referenced = data.get("ReferencedSeriesSequence") or ()
    series = tuple(str(one.SeriesInstanceUID) for one in referenced)
    fractional = data.get("SegmentationType") == "FRACTIONAL"
    fault = "a FRACTIONAL segmentation: save it as BINARY" if fractional else None
    images = _images(referenced, "ReferencedInstanceSequence")
    return LabelObject(header.file, False, names, series, (header.frame_uid,), header.series_uid, fault, (), images)


def _images(referenced: Iterable[Any], sequence: str) -> tuple[tuple[str, str], ...]:
    """The images that items of a sequence of series name, each in a sequence of its own."""
    return tuple(
        (str(series.SeriesInstanceUID), str(one.ReferencedSOPInstanceUID))
        for series in referenced
        for one in series.get(sequence) or ()
    )


def _contours(header: Header, data: Any) -> LabelObject:
    drawn, lines = (
        {
            int(one.ReferencedROINumber)
            for one in data.get("ROIContourSequence") or ()
            if any(contour.get("ContourGeometricType") in kinds for contour in one.get("ContourSequence") or ())
        }
        for kinds in (_CLOSED, _OPEN)
    )
    regions = data.get("StructureSetROISequence") or ()
    names = tuple((int(one.ROINumber), str(one.ROIName).strip()) for one in regions if int(one.ROINumber) in drawn)
    frames = data.get("ReferencedFrameOfReferenceSequence") or ()
    referenced = [
        one
        for frame in frames
        for study in frame.get("RTReferencedStudySequence") or ()
        for one in study.get("RTReferencedSeriesSequence") or ()
    ]
    series = tuple(str(one.SeriesInstanceUID) for one in referenced)
    frame_uids = [str(one.get("ReferencedFrameOfReferenceUID") or "") for one in regions]
    frame_uids += [str(one.get("FrameOfReferenceUID") or "") for one in frames]
    frame_uids = list(dict.fromkeys((header.frame_uid, *frame_uids)))
    open_names = tuple(str(one.ROIName).strip() for one in regions if int(one.ROINumber) in lines - drawn)
    images = _images(referenced, "ContourImageSequence")
    uids = tuple(frame_uids)
    return LabelObject(header.file, True, names, series, uids, header.series_uid, None, open_names, images)


def _segmentation(one: LabelObject, name: str) -> Any:
    return library("highdicom", name).seg.segread(one.file, lazy_frame_retrieval=True)


def _grid_problem(labels: DicomLabels, one: LabelObject) -> str | None:
    try:
        with quiet():
            geometry = _segmentation(one, labels.name).get_volume_geometry()
    except Exception as error:
        return f"a SEG cannot be read ({type(error).__name__})"
    if geometry is None:
        return "the frames of a SEG are not on one even grid"
    return None if _to_series(labels.series, geometry) else "a SEG is on another grid than its series"


def _to_series(series: DicomSeries, geometry: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Whole-numbered map from a label's index I, J, K to the series'; None if grids differ."""
    assert series.affine is not None
    shape = np.array(geometry.spatial_shape[::-1])
    exact = np.linalg.inv(series.affine) @ to_ras(geometry)
    turn, start = np.rint(exact[:3, :3]), np.rint(exact[:3, 3])
    turn[:, shape == 1] = 0  # what a step is does not matter where there is none
    reach = (np.abs(exact[:3, :3] - turn) * (shape - 1)).sum(axis=1) + np.abs(exact[:3, 3] - start)
    steps = np.count_nonzero(turn, axis=0)
    if (reach > _TOLERANCE_VOXELS).any() or (steps[shape > 1] != 1).any():
        return None
    return turn.astype(int), start.astype(int)


def _opened(name: str, one: LabelObject) -> Any:
    """A SEG. Raises ValueError if it cannot be read, or is a label map with values of no segment."""
    with quiet():
        try:
            segments = _segmentation(one, name)
            unknown = undeclared(segments)
        except Exception as error:
            raise _undecodable(error) from None
    if unknown:
        raise ValueError(f"a label map has values of no segment: {unknown[:4]}; write it again with all its segments")
    return segments


def _undecodable(error: Exception) -> ValueError:
    return ValueError(f"a SEG cannot be decoded ({type(error).__name__})")


def _segment_masks(labels: DicomLabels, segments: Any, number: int) -> Iterator[_Mask]:
    """The voxels of a segment."""
    with quiet():
        try:
            volume = segments.get_volume(segment_numbers=[number], combine_segments=True)
        except Exception as error:
            raise _undecodable(error) from None
    moved = _to_series(labels.series, volume)
    if moved is None:
        raise ValueError(f"a SEG is on another grid than its series; {_GRID}")
    turn, start = moved
    inside: np.ndarray = np.equal(volume.array, number).T
    voxels = turn @ np.array(np.nonzero(inside)) + start[:, None]
    assert labels.series.shape is not None
    if ((voxels < 0) | (voxels >= np.array(labels.series.shape)[:, None])).any():
        raise ValueError(f"a SEG has voxels outside of its series; {_GRID}")
    yield voxels[0], voxels[1], voxels[2]


def _contour_masks(labels: DicomLabels, one: LabelObject, number: int, crossing: set[int]) -> Iterator[_Mask]:
    """The voxels of a region, slice by slice: those whose centres are inside an odd number of its contours, or on one.
    `crossing` receives the slices in which a contour is neither within another one nor beside it.

    Treatment planning draws outlines between voxels; OpenCV, and so rt-utils, through the centres of the outer ones."""
    assert labels.series.affine is not None
    assert labels.series.shape is not None
    to_index = np.linalg.inv(labels.series.affine) @ LPS_TO_RAS
    planes: dict[int, np.ndarray] = {}
    loops: dict[int, list[np.ndarray]] = {}
    known: set[frozenset[tuple[int, ...]]] = set()
    for points in _polygons(one, number):
        index = points @ to_index[:3, :3].T + to_index[:3, 3]
        k = round(float(index[:, 2].mean()))
        if np.abs(index[:, 2] - k).max() > _CONTOUR_VOXELS:
            raise ValueError(f"a contour is between slices or crosses them; {_GRID}")
        if not 0 <= k < labels.series.shape[2]:
            raise ValueError(f"a contour is outside of its series; {_GRID}")
        corners = frozenset(map(tuple, np.rint(index / _SAME_CORNER).astype(np.int64).tolist()))
        if corners in known:  # written twice it is no hole in itself
            continue
        known.add(corners)
        planes.setdefault(k, np.zeros((2, *labels.series.shape[:2]), bool))
        for loop in _loops(index[:, :2]):
            inside = _draw(planes[k], loop)
            before = loops.setdefault(k, [])
            if any(_cross(inside, other) for other in before):
                crossing.add(k)
            before.append(inside)
    for k, (area, on_line) in sorted(planes.items()):
        i, j = np.nonzero(area | on_line)
        yield i, j, np.full_like(i, k)


def _cross(inside: np.ndarray, other: np.ndarray) -> bool:
    """Whether two areas share a part, and neither is a part of the other but for its edge."""
    shared = int(np.count_nonzero(inside & other))
    smaller = min(int(np.count_nonzero(inside)), int(np.count_nonzero(other)))
    least = max(2.0, _CROSSING_SHARE * smaller)
    return shared >= least and smaller - shared >= least


def _polygons(one: LabelObject, number: int) -> Iterator[np.ndarray]:
    """Corners [n, 3] in LPS mm of a region's contours."""
    try:
        with quiet():
            data = library("pydicom", "labels").dcmread(one.file)
            found = [
                np.array([float(value) for value in contour.ContourData]).reshape(-1, 3)
                for region in data.ROIContourSequence
                if int(region.ReferencedROINumber) == number
                for contour in region.get("ContourSequence") or ()
                if contour.get("ContourGeometricType") in _CLOSED
            ]
    except Exception as error:
        raise ValueError(f"a contour cannot be read ({type(error).__name__})") from None
    yield from (points for points in found if len(points) >= 3)


def _loops(corners: np.ndarray) -> Iterator[np.ndarray]:
    """The closed lines of a contour that meets itself. A keyhole, which goes to a hole and back on one line (PS3.3
    C.8.8.6.3), is an outline and a hole: on the line between them voxels are inside."""
    names = [tuple(one) for one in np.rint(corners / _SAME_CORNER).astype(np.int64).tolist()]
    path: list[int] = []
    place_of: dict[tuple[int, ...], int] = {}
    for number, name in enumerate(names):
        if name not in place_of:
            place_of[name] = len(path)
            path.append(number)
            continue
        first = place_of[name]
        if len(path) - first >= 3:
            yield corners[path[first:]]
        for passed in path[first + 1 :]:
            del place_of[names[passed]]
        del path[first + 1 :]
    if len(path) >= 3:
        yield corners[path]


def _draw(planes: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Bool [I, J]: what is inside of a polygon, whose corners [n, 2] are I, J. Invert these pixels of plane 0: a
    contour in a contour is a hole. Pixels of plane 1 are set where the line goes through the centre."""
    from matplotlib.path import Path as Polygon

    low = np.clip(np.floor(corners.min(axis=0)).astype(int), 0, planes.shape[1:])
    high = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 1, 0, planes.shape[1:])
    i, j = np.mgrid[low[0] : high[0], low[1] : high[1]]
    centres = np.stack([i.ravel(), j.ravel()], axis=1)
    area = np.zeros(planes.shape[1:], bool)
    if len(centres):
        # Which of the two is the larger polygon depends on the direction of the corners.
        polygon = Polygon(np.concatenate([corners, corners[:1]]), closed=True)
        one, other = (polygon.contains_points(centres, radius=end).reshape(i.shape) for end in (_ON_LINE, -_ON_LINE))
        field = (slice(low[0], high[0]), slice(low[1], high[1]))
        area[field] = one & other
        planes[0] ^= area
        planes[1][field] |= one ^ other
    return area
