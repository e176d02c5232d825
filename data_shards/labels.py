"""Label tables: which id means what, in which order. The table in use travels in index.json."""

from __future__ import annotations

from dataclasses import dataclass

BACKGROUND = "background"
BODY = "body"

# Ids and names of AMOS 2022 (Ji et al. 2022, dataset.json), misspelt names put right.
_AMOS_ORGANS = (
    "spleen",
    "kidney_right",
    "kidney_left",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior_vena_cava",
    "pancreas",
    "adrenal_gland_right",
    "adrenal_gland_left",
    "duodenum",
    "urinary_bladder",
    "prostate_uterus",
)


@dataclass(frozen=True)
class LabelTable:
    """Names by id. Id 0 is background; `body`, where present, is the rest of the patient."""

    name: str
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names or self.names[0] != BACKGROUND or len(set(self.names)) != len(self.names):
            raise ValueError(f"label table {self.name!r}: names must be unique and start with {BACKGROUND!r}")
        if len(self.names) > 256:
            raise ValueError(f"label table {self.name!r}: {len(self.names)} ids do not fit into uint8")

    @property
    def num_classes(self) -> int:
        """Number of ids, background and body included."""
        return len(self.names)

    @property
    def body_id(self) -> int | None:
        """The id of `body`, or None where whole-body classes stand in its place."""
        return self.names.index(BODY) if BODY in self.names else None

    @property
    def organ_ids(self) -> tuple[int, ...]:
        """Ids that are anatomy proper: neither background nor body."""
        return tuple(i for i, n in enumerate(self.names) if n not in (BACKGROUND, BODY))


AMOS = LabelTable("amos", (BACKGROUND, *_AMOS_ORGANS, BODY))
LABEL_TABLES = {AMOS.name: AMOS}
