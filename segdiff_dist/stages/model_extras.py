"""What `segdiff export --format pipeline` stores beside the net, as far as the run folder holds it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from data_shards.problems import InputProblems, problem
from segdiff_dist.weight_files import DESCRIPTION

if TYPE_CHECKING:
    from segdiff_dist.export.config import ExportConfig
    from segdiff_dist.pipeline import Extras


def extras_of(run: Path, weights: Path, config: ExportConfig, data: str | None) -> Extras:
    """Preprocessing, segmenter, parts of the card, a picture. Raises InputProblems for a segmenter that is asked for
    and not there."""
    from segdiff_dist.export.model_set import ModelSet, refuse_other_set
    from segdiff_dist.pipeline import CardParts, Extras

    known = ModelSet.of(data)
    if known is None:
        where = "no set is named" if data is None else f"{data} cannot be opened from this folder"
        text = "how masks are cut and what grey values mean is not stored beside the model"
        warnings.warn(f"{where}: {text}; give --data SHARDS", stacklevel=2)
    else:
        refuse_other_set(run, known.shards, "give --data the set that the model was trained on")
    segmenter = run / "segmenter" / "weights" if config.segmenter else None
    if segmenter is not None and not (segmenter / DESCRIPTION).is_file():
        remedy = f"train it first: segdiff train-segmenter --run {run}"
        raise problem(segmenter, "export.segmenter", "not found", remedy)
    parts = CardParts(
        about=None if config.about is None else config.about.read_text(encoding="utf-8"),
        measured=_measured(run, weights),
        data_digest=None if known is None else known.shards.digest,
        data_licence=config.data_licence,
    )
    return Extras(
        preprocessing=None if known is None else known.preprocessing,
        field_mm=0.0 if known is None else known.field_mm,
        precision=config.precision,
        segmenter=segmenter,
        card=parts,
        picture=_picture(run, weights, config),
    )


def _measured(run: Path, weights: Path) -> str | None:
    """The section of RUN/evaluation, if it is of these weights."""
    from segdiff_dist.evaluation.measure.result_files import read_summary
    from segdiff_dist.evaluation.report.card_section import card_section
    from segdiff_dist.sampling.weights import weights_digest

    if not (run / "evaluation" / "summary.json").is_file():
        return None
    try:
        summary = read_summary(run)
    except InputProblems as error:
        warnings.warn(f"the card has no measured numbers: {error}", stacklevel=2)
        return None
    of_job = summary["provenance"].get("sample_job", {}).get("weights_digest")
    if of_job != weights_digest(weights):
        warnings.warn("the card has no measured numbers: RUN/evaluation is of other weights", stacklevel=2)
        return None
    return card_section(summary)


def _picture(run: Path, weights: Path, config: ExportConfig) -> bytes | None:
    """A picture of the run's samples, if they are of these weights."""
    from data_shards.documents import read_json
    from data_shards.labels import LabelTable
    from segdiff_dist.pipeline.gallery import gallery_of
    from segdiff_dist.sampling.store import SampleStore
    from segdiff_dist.sampling.weights import weights_digest

    folder = config.samples or run / "samples"
    if not config.picture or not (folder / "job.json").is_file():
        return None
    try:
        samples = SampleStore.open(folder)
        if samples.job.get("weights_digest") != weights_digest(weights):
            return None
        table = LabelTable.of(read_json(weights / DESCRIPTION, "train again")["label_table"])
        return gallery_of(samples, table)
    except InputProblems as error:
        warnings.warn(f"the card has no picture: {error}", stacklevel=2)
        return None
