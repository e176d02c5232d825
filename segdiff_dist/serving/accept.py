"""The form of an answer that a client's header Accept asks for (RFC 9110, 12.5.1)."""

from __future__ import annotations

import re
from typing import Literal

from segdiff_dist.serving.messages import MEDIA_TYPES, Form, ServiceError

EVENTS = "text/event-stream"
Kind = Form | Literal["events"]
# By media type; the first one that a range such as */* takes is meant by it.
_KINDS: dict[str, Kind] = {
    MEDIA_TYPES["nifti"]: "nifti",
    "application/gzip": "nifti",
    "application/octet-stream": "nifti",
    **{media: form for form, media in MEDIA_TYPES.items()},
    EVENTS: "events",
}
_QUALITY = re.compile(r";\s*q\s*=\s*(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)\s*(?:;|\Z)", re.I)


def kind_of(accepted: str) -> Kind:
    """The form of the largest q; of equal ones a named form before a range, then as listed. q=0 excludes a form.
    Raises ServiceError."""
    ranges = [_parsed(one) for one in accepted.split(",") if one.strip()] or [("*/*", 1.0)]
    excluded = {media for media, quality in ranges if quality == 0}
    for media, quality in sorted(ranges, key=lambda one: (-one[1], one[0].count("*"))):
        for own, kind in _KINDS.items():
            if quality > 0 and own not in excluded and _takes(media, own):
                return kind
    known = ", ".join((*MEDIA_TYPES.values(), EVENTS))
    raise ServiceError(406, f"Accept: {accepted[:120]}: ask for one of {known}")


def _parsed(one: str) -> tuple[str, float]:
    quality = _QUALITY.search(one)
    return one.partition(";")[0].strip().lower(), float(quality[1]) if quality else 1.0


def _takes(media: str, own: str) -> bool:
    if media == "text/*":
        return False  # who asks so wants a page, not events
    return media in ("*/*", own) or (media.endswith("/*") and own.startswith(media[:-1]))
