"""Choices that settings of several layers share."""

from __future__ import annotations

from typing import Literal

AttentionBackend = Literal["auto", "sdpa", "xformers"]
Device = Literal["auto", "cpu", "cuda"]
