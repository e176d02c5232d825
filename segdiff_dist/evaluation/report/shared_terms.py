"""What all trainings of `segdiff evaluate --downstream` have in common, in words for the page and the terminal."""

from __future__ import annotations

from typing import Any

from data_shards.wording import in_words


def shared_terms(downstream: dict[str, Any]) -> str:
    """A sentence. `downstream`: RUN/downstream/summary.json; one of an earlier version does not say how much it is."""
    terms = downstream.get("granted")
    slices, masks = "", ""
    if terms is not None:
        patients = in_words(terms["num_validation_patients"], "patient")
        slices = f" ({in_words(terms['num_validation_slices'], 'slice')} of {patients})"
        masks = f"{terms['num_mask_patients']:,} "
    chosen = f"weights are chosen on the whole validation split, which is real and labelled{slices}"
    if terms is not None and not terms["num_validation_slices"]:
        chosen = "the last weights are tested, so no validation slice is used"
    return (
        f"Every training has the following, also one with a small share of the real patients: {chosen}; generated "
        f"images follow masks of {masks}training patients, drawn from all of them; the model that made them was "
        "trained on all training patients."
    )
