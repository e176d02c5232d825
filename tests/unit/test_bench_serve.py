"""benchmarks/serve.py: that its rates are there before its long part on memory, which says what it does."""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
serve: Any = importlib.import_module("serve")


def test_rates_are_kept_if_the_memory_part_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the service is left out: the masks, the table and the file are real."""
    asked: list[int] = []

    async def load(url: str, mask: bytes, clients: int, num: int, steps: int | None) -> list[float]:
        asked.append(num)
        if len(asked) == stop_at:
            raise KeyboardInterrupt
        return [0.5] * num

    monkeypatch.setattr(serve, "served", lambda *_: nullcontext("http://nowhere"))
    monkeypatch.setattr(serve, "bare_loop", lambda model, mask_HW, num: (num, 4.0))
    monkeypatch.setattr(serve, "load", load)
    monkeypatch.setattr(serve, "memory_mib", lambda: {"model": 7 + len(asked)})
    file = tmp_path / "rates.json"
    monkeypatch.setattr(sys, "argv", ["serve.py", "--quick", "--json", str(file)])
    stop_at = 5  # one to load the model, one a contender, and the second tenth of the memory part
    with pytest.raises(KeyboardInterrupt):
        serve.main()
    printed = capsys.readouterr().out
    assert "8 clients / bare loop: " in printed
    assert printed.index("8 clients / bare loop: ") < printed.index("memory of the service, over 20 requests")
    assert "2 of 20 requests" in printed
    assert [row["name"] for row in json.loads(file.read_text())["rows"]] == ["bare loop", "1 clients", "8 clients"]
    asked, stop_at = [], 0
    serve.main()
    [memory] = [value for name, value in json.loads(file.read_text())["notes"].items() if name.startswith("MiB")]
    assert len(memory) == 11
