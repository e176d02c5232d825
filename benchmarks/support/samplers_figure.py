"""Samplers drawn: Dice and distance over evaluations of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.figure_style import STYLE

_NAMES = {"ddim": "DDIM", "dpm_solver_pp_2m": "DPM-Solver++(2M)", "unipc": "UniPC", "heun": "Heun"}
_COLOURS = {"ddim": "#b7791f", "dpm_solver_pp_2m": "#0e7c86", "unipc": "#6b46c1", "heun": "#c53030"}


def draw(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, float], title: str, file: Path) -> None:
    """Two panels, a line a solver and a sigma_shift; dashed what is still as good as the reference. `rows` and
    `limits`: the JSON's."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with mpl.rc_context(STYLE):
        canvas, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
        for axis, metric, label in (
            (axes[0], "dice", "Dice of mask and generated image (higher is better)"),
            (axes[1], "distance", "segmenter-feature distance (lower is better)"),
        ):
            for solver, shift in sorted({(row["solver"], row.get("sigma_shift", 1.0)) for row in rows}):
                mine = [row for row in rows if (row["solver"], row.get("sigma_shift", 1.0)) == (solver, shift)]
                mine.sort(key=lambda row: row["evaluations"])
                name, line = (_NAMES[solver], "-") if shift == 1 else (f"{_NAMES[solver]}, sigma_shift {shift:g}", ":")
                x, y = [row["evaluations"] for row in mine], [row[metric] for row in mine]
                axis.plot(x, y, marker="o", ms=3.5, ls=line, color=_COLOURS[solver], label=name)
            axis.axhline(limits[metric], ls="--", lw=1, color="#718096")
            axis.set_xscale("log")
            ticks = (5, 10, 20, 50)
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.set_xticks([], minor=True)
            axis.set_xlabel("evaluations of the network")
            axis.set_title(label)
        axes[1].legend(fontsize=8)
        canvas.suptitle(title, x=0.01, ha="left")
        file.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(file, dpi=130)
        plt.close(canvas)
