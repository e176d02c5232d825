"""What a file is that has the name of a volume or picture, and is none: what downloads and copies leave behind."""

from __future__ import annotations

_HTML = (b"<!doctype html", b"<html", b"<?xml")
_GIT_LFS = b"version https://git-lfs"
_GIT_ANNEX = (b"/annex/objects/", b"../.git/annex", b".git/annex")
_GZIP = b"\x1f\x8b"
_ZIP, _DICOM, _DICOM_AT = b"PK\x03\x04", b"DICM", 128
_AGAIN = "download it again"


def foreign(start: bytes) -> tuple[str, str] | None:
    """What a file is by its first bytes, and what to do; None if that is not known here."""
    text = start.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if not start:
        return "an empty file", _AGAIN
    if text.startswith(_HTML):
        return "a web page, which was saved in its place", f"{_AGAIN}; a page like this often asks for a login"
    if text.startswith(_GIT_LFS):
        return "a pointer of Git LFS", "fetch the file itself: git lfs pull"
    if text.startswith(_GIT_ANNEX):
        return "a pointer of git-annex", "fetch the file itself: git annex get, or datalad get"
    if start.startswith(_GZIP):
        return "packed by gzip, perhaps twice", "unpack it once (gunzip)"
    if start.startswith(_ZIP):
        return "a zip", "unpack it"
    if start[_DICOM_AT : _DICOM_AT + len(_DICOM)] == _DICOM:
        return "DICOM", "give the folder of the series (--prepare.layout dicom), or convert it (dcm2niix)"
    return None if start.strip(b"\0") else ("zeros alone", f"{_AGAIN}: it was cut off while it was copied")
