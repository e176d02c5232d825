"""DICOM: a tree of files as a scanner or an archive exports it, whatever their names are.

Files with one SeriesInstanceUID are a case. SEG and RTSTRUCT files are its labels, if they name its series or, where
they name none of the tree, if their frame of reference is that of one series alone. Case and patient are named by
digests, and messages name no file, unless the user asks for the names (prepare.keep_dicom_ids).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data_shards.ingest.cases import Case, Listing
from data_shards.ingest.dicom_files import (
    RTSTRUCT,
    SEG,
    Header,
    alternating,
    digest,
    is_bare_dicom,
    is_dicom,
    library,
    named_series,
    read_header,
)
from data_shards.ingest.dicom_labels import DicomLabels, LabelObject, grid_problems, read_object
from data_shards.ingest.dicom_series import DicomSeries, series_of
from data_shards.ingest.layouts.base import Layout, Request, case_name_problems, no_cases, patient_of
from data_shards.ingest.pictures import picture_stem
from data_shards.ingest.volume_files import stem
from data_shards.modalities import is_modality
from data_shards.problems import Problem
from data_shards.wording import in_words

# A folder is recognised by one of its first files.
_MOST_LOOKED_AT = 1000
_MOST_COUNTED = 1_000_000
# DICOM's Modality (PS3.3 C.7.3.1.1.1) of series that are volumes, and its name in a set.
_MODALITY_OF = {"CT": "CT", "MR": "MR", "PT": "PET", "NM": "SPECT"}
# For labels in another format: those of a series are SEG or RTSTRUCT.
_AS_NIFTI = "write each series as .nii.gz (dcm2niix), its labels on the same grid, and list both in a manifest.csv"
_HIDE_NAMES = "its file is named with --prepare.keep-dicom-ids"


# Storage classes of images that become volumes (PS3.4 B.5): CT, MR, PET and NM, enhanced and legacy converted ones too.
# Other classes with these modalities, as raw data, have no pixels.
_IMAGE_CLASSES = {
    f"1.2.840.10008.5.1.4.1.1.{end}"
    for end in ("2", "2.1", "2.2", "4", "4.1", "4.3", "4.4", "20", "128", "128.1", "130")
}
# In place of a case id, for files of which no series is known.
_OF_NO_SERIES = "unreadable-files"


@dataclass(frozen=True)
class _Found:
    """The images of each series by SeriesInstanceUID, the labels, and the files that cannot be read, by the UID of
    their series; an empty one if it is not known."""

    series: dict[str, list[Header]]
    labels: list[LabelObject]
    faulty: dict[str, list[Path]]


class Dicom(Layout):
    """A folder with DICOM files in it or below."""

    name = "dicom"

    def recognise(self, root: Path) -> str | None:
        """One of the first files is DICOM."""
        found = any(is_dicom(file) for file in islice(_files(root), _MOST_LOOKED_AT))
        return "there are DICOM files" if found else None

    def not_read(self, root: Path) -> str | None:
        """Volumes and pictures in other formats. They are not named, since names may be patients'."""
        names = [file.name for file in islice(_files(root), _MOST_COUNTED)]
        volumes = [name[len(one) :].lower() for name in names if (one := stem(name)) is not None]
        drawn = [name[len(one) :].lower() for name in names if (one := picture_stem(name)) is not None]
        if not volumes and not drawn:
            return None
        endings = ", ".join(sorted({*volumes, *drawn}))
        instead = "--prepare.layout folder reads these instead; " if volumes else ""
        what = f"{len(volumes) + len(drawn)} files of {endings} beside the DICOM files; {instead}"
        return f"{what}if they are the labels of the series, {_AS_NIFTI}"

    def read(self, root: Path, request: Request) -> Listing:
        """Every series of images is a case; series that are no volume have problems. The classes are the segments of
        all cases, in the order of their names."""
        for name in ("pydicom", "highdicom", "SimpleITK"):
            library(name, root)
        found = _scan(root)
        labels_of, problems_of = _assigned(found, request)
        used = {name for objects in labels_of.values() for one in objects for _, name in one.names}
        names = dict(enumerate(["background", *sorted(used)]))
        ids = {name: number for number, name in names.items()}
        cases: list[Case] = []
        for uid, headers in sorted(found.series.items()):
            case, wrong = _case(uid, headers, labels_of.get(uid, []), ids, request)
            wrong = _faulty(str(case.image), found.faulty.get(uid, []), request) or wrong
            if wrong or request.takes(case.modality):
                cases.append(case)
                problems_of |= {case.case_id: wrong} if wrong else {}
        if unknown := _faulty(str(root), found.faulty.get("", []), request):
            problems_of[_OF_NO_SERIES] = unknown
        problems = list(case_name_problems(root, [case.case_id for case in cases]))
        if len({case.case_id for case in cases}) < len(cases):
            problems.append(Problem(str(root), "case id", "two series have one digest", "prepare them one by one"))
        problems += [] if problems or problems_of else no_cases(root, request, cases)
        ordered = tuple(sorted(cases, key=lambda case: case.case_id))
        notes = tuple(_alike_patients(found, request))
        return Listing(ordered, tuple(problems), problems_of, names, notes=notes, has_ids=False)


def _files(root: Path) -> Iterator[Path]:
    """All files below, without hidden ones."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        yield from (Path(folder, file) for file in sorted(files) if not file.startswith("."))


def _scan(root: Path) -> _Found:
    """Read every DICOM file's header. Objects without pixels, as reports and plans, are passed over."""
    series: dict[str, list[Header]] = {}
    labels: list[LabelObject] = []
    faulty: list[Path] = []
    for file in _files(root):
        seems = file.suffix.lower() == ".dcm" or is_dicom(file) or is_bare_dicom(file)
        if file.name == "DICOMDIR" or not seems:
            continue
        header = read_header(file) if is_dicom(file) else None
        if header is None or _is_cut_off(header):
            faulty.append(file)
        elif header.kind in (*SEG, RTSTRUCT):
            labels.append(read_object(header))
        elif min(header.shape) > 0 and header.modality != "RTDOSE":
            series.setdefault(header.series_uid, []).append(header)
    return _Found(series, labels, _by_series(faulty, set(series)))


def _is_cut_off(header: Header) -> bool:
    """Whether attributes are missing that every such file has: the file ends in its header. The last slice of a stack
    would be missed by nothing else."""
    has_pixels = min(header.shape) > 0
    return (
        not header.kind or (header.kind in _IMAGE_CLASSES and not has_pixels) or (has_pixels and not header.series_uid)
    )


def _by_series(files: Iterable[Path], known: set[str]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in files:
        named = named_series(file) & known
        found.setdefault(named.pop() if len(named) == 1 else "", []).append(file)
    return found


def _assigned(found: _Found, request: Request) -> tuple[dict[str, list[LabelObject]], dict[str, list[Problem]]]:
    """The labels of each series, and labels of which no series, or none alone, is there."""
    labels_of: dict[str, list[LabelObject]] = {}
    problems_of: dict[str, list[Problem]] = {}
    for one in found.labels:
        named = [uid for uid in one.series_uids if uid in found.series]
        same_frame = [
            uid for uid, headers in found.series.items() if headers[0].frame_uid in set(one.frame_uids) - {""}
        ]
        candidates = list(dict.fromkeys(named or same_frame))
        if len(candidates) == 1:
            labels_of.setdefault(candidates[0], []).append(one)
            continue
        kind = "RTSTRUCT" if one.is_contours else "SEG"
        name = _case_id(one.uid, request)
        where = str(one.file) if request.keep_ids else f"{kind} {name}"
        value = one.fault or (f"belongs to {len(candidates)} series" if candidates else "its series is not there")
        remedy = "add its series to the folder, or take it out" if not candidates else "name one series in it"
        shown = remedy if request.keep_ids else f"{remedy}; {_HIDE_NAMES}"
        problems_of.setdefault(name, []).append(Problem(where, "labels", value, shown))
    return labels_of, problems_of


def _case(
    uid: str, headers: list[Header], objects: Iterable[LabelObject], ids: dict[str, int], request: Request
) -> tuple[Case, list[Problem]]:
    case_id = _case_id(uid, request)
    name = str(headers[0].file.parent) + f" (series {uid})" if request.keep_ids else f"series {case_id}"
    stated = _MODALITY_OF.get(headers[0].modality, "")
    modality = request.modality or stated
    objects = tuple(objects)
    # Scanners write single slices as localisers; a drawn one, or one of `segdiff export`, is meant as an image.
    one_slice = bool(objects) or headers[0].is_synthetic
    series, problems = series_of(name, headers, modality, one_slice=one_slice)
    place = {file: number for number, file in enumerate(series.files)}
    in_order = sorted(headers, key=lambda one: place.get(one.file, 0))
    notes = tuple(_notes(in_order, objects, modality, stated))
    labels = _labels(name, series, objects, ids)
    if labels is not None and not problems:
        problems = grid_problems(labels)
    patient = patient_of(case_id, request.patient) or _patient(headers[0], request.keep_ids)
    known = modality if is_modality(modality) else request.any_modality
    is_flat = len(series.files) == 1 and not series.is_multiframe
    return Case(case_id, known, "", series, labels, notes, patient, is_flat=is_flat), problems


def _notes(headers: list[Header], objects: tuple[LabelObject, ...], modality: str, stated: str) -> Iterator[str]:
    """`headers` in the order of the slices."""
    header = headers[0]
    if modality != stated:
        against = stated or header.modality[:16]
        yield f"taken as {modality} as stated, against {against} in DICOM; else leave --prepare.modality out"
    if any(header.frame_uid not in one.frame_uids for one in objects):
        yield "its labels name this series, but another frame of reference; look at them if that is wrong"
    uids = {one.uid for one in headers}
    if missing := max((one.missing_images(header.series_uid, uids) for one in objects), default=0):
        remedy = "an end of the volume is not here; export the series again, complete, if that is wrong"
        yield f"its labels were drawn on {in_words(missing, 'further slice')}: {remedy}"
    if any(one.is_lossy for one in headers):
        yield "its images were compressed with loss (LossyImageCompression): values are not exactly the scanner's"
    if left_out := sorted({name for one in objects for name in one.open_names}):
        what = "have lines and no closed contours, and are left out"
        yield f"regions of its RTSTRUCT {what}: {', '.join(left_out)[:200]}"
    if name := alternating(headers):
        remedy = "if these are two scans, give each a SeriesInstanceUID of its own"
        yield f"{name} changes to and fro along its slices; {remedy}"


def _alike_patients(found: _Found, request: Request) -> Iterator[str]:
    """PatientIDs that differ in capitals and blanks alone, by one series of each."""
    of_name: dict[str, dict[str, str]] = {}
    for uid, headers in sorted(found.series.items()):
        if patient := headers[0].patient.strip("|"):
            of_name.setdefault("".join(patient.casefold().split()), {}).setdefault(headers[0].patient, uid)
    twins = [tuple(uids.values()) for uids in of_name.values() if len(uids) > 1]
    if twins:
        one, other = (_case_id(uid, request) for uid in twins[0][:2])
        more = f" ({len(twins) - 1} more such patients)" if len(twins) > 1 else ""
        where = f"the PatientIDs of {one} and {other} differ in capitals or blanks alone{more}"
        yield f"{where}, and count as two patients: if they are one, write one PatientID"


def _case_id(uid: str, request: Request) -> str:
    return uid.replace(".", "-") if request.keep_ids else f"dcm-{digest(uid)}"


def _labels(
    name: str, series: DicomSeries, objects: tuple[LabelObject, ...], ids: dict[str, int]
) -> DicomLabels | None:
    """None if there is no label. The objects are ordered by what they hold, so that file names do not matter."""
    ordered = tuple(sorted(objects, key=lambda one: (one.is_contours, one.names)))
    return DicomLabels(name, series, ordered, ids) if ordered else None


def _patient(header: Header, keep_ids: bool) -> str:
    """The patient of a file; without PatientID the study counts as the patient."""
    patient = header.patient.strip("|")
    if keep_ids:
        return patient or header.study_uid
    return f"patient-{digest(header.patient if patient else header.study_uid)}"


def _faulty(where: str, files: list[Path], request: Request) -> list[Problem]:
    """`where`: the series, or the folder if it is not known which series the files are of."""
    if not files:
        return []
    value = f"{len(files)} that cannot be read as DICOM: damaged, without pixels, or without a preamble (PS3.10)"
    if request.keep_ids:
        value += f", as {files[0].name}"
    remedy = "restore them, or take them out of the folder" + ("" if request.keep_ids else f"; {_HIDE_NAMES}")
    return [Problem(where, "files", value, remedy)]
