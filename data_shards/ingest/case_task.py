"""The task of a worker of `prepare`: a case to its partial files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from data_shards import __version__
from data_shards.ingest import partials
from data_shards.ingest.cases import Case, nifti_files
from data_shards.ingest.label_tables import Labelling
from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.problems import out_of_space
from data_shards.records import SliceRecord
from data_shards.store.codecs import crc32c
from data_shards.store.set_index import file_sha256


class ImageDigest:
    """A digest of the images of a case, whatever its files are called and wherever their headers differ. Images of one
    value do not count: they are alike in many cases."""

    def __init__(self) -> None:
        self._found = sha256()
        self._is_empty = True

    def reading(self, records: Iterable[SliceRecord]) -> Iterator[SliceRecord]:
        """The records, each added as it passes."""
        for record in records:
            if (record.image_HW != record.image_HW[0, 0]).any():
                self._found.update(crc32c(record.image_HW.tobytes()).to_bytes(4, "little"))
                self._is_empty = False
            yield record

    def __str__(self) -> str:
        return "" if self._is_empty else self._found.hexdigest()


def same_image_notes(images_of: Mapping[str, tuple[str, str]]) -> list[str]:
    """What to say of cases with the same images. `images_of`: split and digest by case id."""
    of_digest: dict[str, list[str]] = {}
    for case_id, (_, digest) in images_of.items():
        if digest:
            of_digest.setdefault(digest, []).append(case_id)
    notes = []
    for ids in of_digest.values():
        splits = [images_of[case_id][0] for case_id in ids]
        if len(ids) > 1:
            more = f" and {len(ids) - 2} more" if len(ids) > 2 else ""
            what = f"{ids[0]} ({splits[0]}) and {ids[1]} ({splits[1]}){more} have the same images"
            parted = "they are in several splits, so that what is trained on is also evaluated: keep one of them"
            notes.append(f"{what}: {parted if len(set(splits)) > 1 else 'keep one of them if that is not meant'}")
    return notes


@dataclass(frozen=True)
class Failed:
    """Why a case is not in the set. `file` is the faulty file; None if the disk is full."""

    file: str | None
    reason: str


@dataclass(frozen=True)
class CaseTask:
    """A case to its partial files."""

    case: Case
    partial: Path
    config: PrepareConfig
    wholebody: Path | None
    labelling: Labelling

    @property
    def checksums(self) -> list[str]:
        """Checksums of everything that a case's slices depend on."""
        masks = [] if self.wholebody is None else nifti_files(self.wholebody, self.case.case_id)
        sources = (*self.case.sources, *masks)
        return [file_sha256(one) if isinstance(one, Path) else one.sha256() for one in sources]

    def run(self) -> Failed | None:
        """Write the case's partial files, unless existing ones came from the same bytes and config."""
        from data_shards.ingest.case_slices import slices_of
        from data_shards.ingest.volumes import UnreadableVolume

        settings = self.config.result_settings() | self.labelling.recorded
        made_from: list[Any] = [__version__, settings, self.case.split, self.checksums]
        if self.labelling.ids is not None:
            made_from += [self.labelling.table.names, self.case.modality]
        if self.case.channel is not None:
            made_from.append(self.case.channel)
        if self.case.pixel is not None:
            made_from.append(repr(self.case.pixel))
        stamp = sha256(json.dumps(made_from).encode()).hexdigest()
        if partials.stamp_of(self.partial) == stamp:
            return None
        format = self.config.format
        try:
            notes: list[str] = []
            records = slices_of(self.case, self.config, self.wholebody, notes, self.labelling)
            images = ImageDigest()
            samples = ((r.meta, format.payloads(r)) for r in images.reading(records))
            partials.write_partial(self.partial, samples, stamp, notes, images)
        except UnreadableVolume as error:
            return Failed(error.file, error.reason)
        except OSError as error:
            if out_of_space(error):
                return Failed(None, str(error))
            raise
        return None
