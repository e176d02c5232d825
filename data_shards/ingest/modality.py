"""The modality of a case: from the setting or dataset.json, and from AMOS' numbers for cases with AMOS' own names.

A wrong modality cuts MR by a window of HU, or stretches CT, and nothing shows it later. So nothing is guessed from
other names, contradictions are refused, and dataset.json's words must be known ones. A setting or a manifest may name
any modality.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from reprlib import repr as short
from typing import Any

from data_shards.modalities import MODALITY_RULE, in_order, is_modality
from data_shards.problems import Problem, problem

# AMOS 2022: its cases up to 500 are CT, those above are MR (its readme's "< 500" is off by one).
AMOS_NAME = re.compile(r"amos_([0-9]{4})")
_LAST_CT_NUMBER = 500
# dataset.json holds it as `modality` (AMOS, Medical Segmentation Decathlon, nnU-Net 1) or `channel_names` (nnU-Net 2).
_KEYS = ("modality", "channel_names")
# Words for a modality there, in lower case and with only letters and digits.
_WORDS = {
    "CT": {"ct", "cta", "cect", "ncct", "ldct", "computedtomography", "computertomography"},
    "MR": {"mr", "mri", "mra", "nmr", "magneticresonance", "magneticresonanceimaging"},
    "CBCT": {"cbct", "conebeamct"},
    "PET": {"pet", "pt", "fdgpet"},
    "SPECT": {"spect"},
    "T1": {"t1", "t1w", "t1n", "t1dual", "mprage", "vibe"},
    "T1ce": {"t1c", "t1ce", "t1gd"},
    "T2": {"t2", "t2w", "t2spir", "haste"},
    "FLAIR": {"flair", "t2f", "t2flair"},
    "PD": {"pd", "pdw"},
    **{name: {name.lower()} for name in ("DWI", "ADC", "DCE", "SWI", "STIR", "Dixon")},
}
# Words beside T1 by which it is T1ce, and those that take this back; T2* is no T2.
_CONTRAST = {"post", "postcontrast", "contrast", "enhanced", "ce", "c", "gd", "gad", "gado", "gadolinium"}
_WITHOUT = {"pre", "non", "no", "without", "native", "unenhanced"}
_STAR = "star"


def find_modalities(
    where: str, content: dict[str, Any], case_ids: Sequence[str], stated: str | None
) -> tuple[dict[str, str], dict[str, tuple[str, ...]], list[Problem]]:
    """Modality by case id, notes by case id if a statement was ignored, and every contradiction and doubt.

    `content` is that of dataset.json, `where` its name, `stated` the setting: a name or None. The setting counts for
    every case. Without it, dataset.json's statement counts, except for AMOS' own names. AMOS' dataset.json says CT
    although its cases above 500 are MR, so for them the number counts, and only MR stated for a number of CT is a
    contradiction.
    """
    known, problems = _stated_in(where, content)
    by_number = {case_id: _by_number(case_id) for case_id in case_ids}
    if stated is not None and is_modality(stated):  # other values are refused with the settings
        return _by_setting(where, stated, known, by_number)
    if problems:
        return {}, {}, problems
    result: dict[str, str] = {}
    doubtful: list[str] = []
    contradicting: list[str] = []
    for case_id, number_says in by_number.items():
        if number_says is not None and (known != {"MR"} or number_says == "MR"):
            result[case_id] = number_says
        elif number_says is not None:
            contradicting.append(case_id)
        elif len(known) == 1:
            result[case_id] = next(iter(known))
        else:
            doubtful.append(case_id)
    if contradicting:
        value = (
            f"{short(content.get(_KEYS[0]) or content.get(_KEYS[1]))}, but by AMOS' numbers {_named(contradicting)} CT"
        )
        remedy = "state which it is with `modality` (--prepare.modality MR), or give cases of your own other names"
        problems.append(Problem(where, "modality", value, remedy))
    if doubtful:
        said = f"states {' and '.join(in_order(known))}" if known else "is not stated"
        problems.append(Problem(where, "modality", f"{said} for {_named(doubtful, verb=False)}", _remedy(where)))
    return result, {}, problems


def _remedy(where: str) -> str:
    """Where to state a modality: a plain folder need not have a dataset.json."""
    setting = "with --prepare.modality CT, MR or another name"
    if where.endswith(".json"):
        return f'state it there ("modality": {{"0": "CT"}} or {{"0": "MR"}}) or {setting}'
    return f"state it {setting}, or in the column `modality` of a manifest.csv"


def _by_setting(
    where: str, stated: str, known: set[str], by_number: dict[str, str | None]
) -> tuple[dict[str, str], dict[str, tuple[str, ...]], list[Problem]]:
    numbered = {number_says for number_says in by_number.values() if number_says is not None}
    if len(numbered) == 2:
        value = f"{stated} for every case, but AMOS' numbers name both CT and MR"
        remedy = f"leave `modality` out; to use {stated} alone, give `modalities` (--prepare.modalities {stated})"
        return {}, {}, [Problem(where, "modality", value, remedy)]
    against = []
    if known and known != {stated}:
        against.append(f"{' and '.join(sorted(known))} in dataset.json")
    if numbered and numbered != {stated}:
        against.append(f"{numbered.pop()} by AMOS' numbers")
    notes = (
        (f"taken as {stated} as stated, against {', '.join(against)}; else leave --prepare.modality out",)
        if against
        else ()
    )
    return dict.fromkeys(by_number, stated), dict.fromkeys(by_number, notes), []


def _by_number(case_id: str) -> str | None:
    """The modality of a case that carries one of AMOS' own names."""
    number = AMOS_NAME.fullmatch(case_id)
    if number is None:
        return None
    return "CT" if int(number[1]) <= _LAST_CT_NUMBER else "MR"


def _stated_in(where: str, content: dict[str, Any]) -> tuple[set[str], list[Problem]]:
    """The modalities that dataset.json states; a statement that cannot be understood is a problem."""
    known: set[str] = set()
    for key in _KEYS:
        statement = content.get(key)
        if statement is None:
            continue
        words = list(statement.values()) if isinstance(statement, dict) else statement
        words = words if isinstance(words, list) else [words]
        for word in words:
            named = parse_modalities(word)
            if not named:
                remedy = (
                    f'write {{"0": "CT"}} or another of {", ".join(_WORDS)}, or state it with --prepare.modality NAME'
                )
                return set(), [Problem(where, key, short(statement), remedy)]
            known |= named
    return known, []


def parse_modalities(word: Any) -> set[str]:
    """The modalities that a text names: `MRI`, `T2w`, `CT and MR`; none for unknown words. Words that are one name
    together, as `T2 FLAIR`, are not taken apart. T1 after contrast agent is T1ce."""
    if not isinstance(word, str):
        return set()
    whole = re.sub(r"[\W_]", "", word.lower())
    pieces = re.split(r"[\W_]+", word.lower().replace("*", f" {_STAR}"))
    if _STAR in pieces:
        return set()
    parts = [whole] if any(whole in words for words in _WORDS.values()) else pieces
    found = {modality for modality, words in _WORDS.items() for part in parts if part in words}
    is_contrast = not _CONTRAST.isdisjoint(pieces) and _WITHOUT.isdisjoint(pieces)
    return {"T1ce"} if found == {"T1"} and is_contrast else found


def parse_modality(where: object, text: str) -> str:
    """The modality that a table's cell names: a known word, or a name of its own. Raises InputProblems."""
    known = parse_modalities(text)
    if len(known) == 1:
        return next(iter(known))
    if known or not is_modality(text):
        raise problem(where, "modality", repr(text[:40]), f"write CT, MR, or {MODALITY_RULE}")
    return text


def _named(case_ids: Sequence[str], verb: bool = True) -> str:
    """`a, b and 7 more`, with `is` or `are` behind it."""
    names = ", ".join(case_ids[:3]) + (f" and {len(case_ids) - 3} more" if len(case_ids) > 3 else "")
    return names + (f" {'is' if len(case_ids) == 1 else 'are'}" if verb else "")
