"""Checks of the spool's records. The spool may be in a folder that somebody else wrote."""

from __future__ import annotations

import hashlib
import posixpath
import re
from typing import Any

from segdiff_dist.tracking.path_checks import why_not_plain

# MLflow refuses '/' and ':' in a model's name; the name is also a folder's name, and is quoted in a search.
MODEL_NAME = re.compile(r"\w[\w .-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{1,128}")
# Characters and length of metric names that MLflow accepts on any system.
_KEY, _MOST_KEY = re.compile(r"[\w. /-]+"), 250
_STATUS = ("RUNNING", "FINISHED", "FAILED", "KILLED")
# MLflow's columns are 64 bits wide; times after the year 5000 are invalid.
_MOST_STEP, _MOST_MS = 2**63 - 1, 10**14


def metric_key(name: str) -> str:
    """A metric's name in a form that MLflow accepts; some names contain names of organs. Other characters are replaced,
    and a digest of the name is added, so that two names never become equal."""
    if len(name) <= _MOST_KEY and _KEY.fullmatch(name) and posixpath.normpath(name) == name and name[0] not in "./":
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    plain = re.sub(r"[^\w. /-]", "_", name)
    head, _, metric = plain.rpartition("/")
    # Parts that a path would skip or follow upwards are left out; the metric itself stays last.
    readable = "/".join(part for part in head.split("/") if part.strip(". ")) or "name"
    end = f"-{digest}/{metric[-100:].strip('. ') or 'metric'}"
    return readable[: _MOST_KEY - len(end)] + end


def why_not_sent(record: Any) -> str | None:
    """Why a record cannot be sent, judged by its text alone; None if it can."""
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return "not a record"
    check = _CHECKS.get(record["kind"])
    if check is None:
        return f"no kind {record['kind']!r:.40}"
    wrong = [name for name, is_right in check.items() if not is_right(record.get(name))]
    return f"{record['kind']}: {', '.join(wrong)}: not the values that are recorded there" if wrong else None


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:  # half a pair of surrogates, which JSON can hold but databases refuse
        return False


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(key) and _is_text(one) for key, one in value.items())


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and float(value) is not None
    except OverflowError:
        return False


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(key) and _is_number(one) for key, one in value.items())


def _is_ms(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST_MS


def _is_path(value: Any) -> bool:
    return _is_text(value) and why_not_plain(value) is None


_CHECKS: dict[str, dict[str, Any]] = {
    "metrics": {
        "values": _is_numbers,
        "step": lambda value: type(value) is int and abs(value) <= _MOST_STEP,
        "ms": _is_ms,
    },
    "params": {"values": _is_texts},
    "tags": {"values": _is_texts},
    "artifact": {"path": _is_text, "folder": lambda value: value is None or _is_path(value)},
    "model": {
        "path": _is_text,
        "name": lambda value: isinstance(value, str) and MODEL_NAME.fullmatch(value) is not None,
        "digest": lambda value: isinstance(value, str) and _DIGEST.fullmatch(value) is not None,
        "tags": _is_texts,
    },
    "dataset": {
        **dict.fromkeys(("name", "source", "profile", "context"), _is_text),
        # MLflow's column is 36 characters wide.
        "digest": lambda value: _is_text(value) and 0 < len(value) <= 36,
    },
    "about": {
        **dict.fromkeys(("stage", "text"), _is_text),
        "run_name": lambda value: value is None or (_is_text(value) and 0 < len(value) <= _MOST_KEY),
    },
    "status": {"status": lambda value: value in _STATUS, "ms": _is_ms},
}
