"""The three files of an evaluation change together, wherever the command that replaces them is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from evaluation_support import evaluate_here

from data_shards.problems import InputProblems
from data_shards.store.set_index import file_sha256
from segdiff_dist.evaluation.measure.publishing import PREDICTIONS, SAMPLES, SUMMARY, finish, publish
from segdiff_dist.evaluation.measure.result_files import open_predictions, read_rows, read_summary
from segdiff_dist.evaluation.report.comparison import open_runs


@pytest.fixture(scope="module")
def evaluated(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluate_here(tmp_path_factory.mktemp("published") / "run", shapes)


def with_digest(folder: Path, psnr: float) -> str:
    """summary.json's text; its PSNR says which evaluation it is."""
    summary = json.loads((folder / SUMMARY).read_text()) | {"rows_sha256": file_sha256(folder / SAMPLES)}
    summary["metrics"]["psnr_db"]["value"] = psnr
    return json.dumps(summary)


def killed_at(number: int, run: Path, summary: str) -> bool:
    """Publish another evaluation in a process that is killed before its `number`-th rename; whether that came."""
    folder = run / "evaluation"
    rows, predictions = folder / ".new.parquet", folder / ".new.zarr"
    child = os.fork()
    if not child:
        count, rename = 0, Path.rename

        def counting(path: Path, target: Path) -> Path:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(path, target)

        Path.rename = counting  # type: ignore[method-assign]
        publish(folder, summary, rows, predictions)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def seen(run: Path) -> tuple[float, float, int]:
    """What a reader sees: which evaluation summary, rows and predictions are of; the first two must agree."""
    summary = read_summary(run)
    rows = read_rows(run, ["psnr_db"], summary)
    assert open_runs([run])[0].summary["metrics"] == summary["metrics"]
    first = int(open_predictions(run, rows.num_rows)["gen"][0, 0, 0])
    return summary["metrics"]["psnr_db"]["value"], float(rows["psnr_db"][0].as_py()), first


def test_a_kill_at_any_rename_leaves_one_evaluation_whole(evaluated: Path, tmp_path: Path) -> None:
    number, states = 1, []
    while True:
        run = tmp_path / str(number)
        shutil.copytree(evaluated, run)
        folder = run / "evaluation"
        (folder / SUMMARY).write_text(with_digest(folder, 1.0))
        table = pq.read_table(folder / SAMPLES)
        at = table.column_names.index("psnr_db")
        pq.write_table(table.set_column(at, "psnr_db", [np.full(table.num_rows, 2.0)]), folder / ".new.parquet")
        shutil.copytree(folder / PREDICTIONS, folder / ".new.zarr")
        zarr.open_group(folder / ".new.zarr")["gen"][0, 0, 0] = 200
        new = json.loads(with_digest(folder, 2.0)) | {"rows_sha256": file_sha256(folder / ".new.parquet")}
        before = seen(run)
        was_killed = killed_at(number, run, json.dumps(new))
        after = seen(run)
        assert after in (before, (2.0, 2.0, 200))
        finish(folder)  # the next command
        assert seen(run) == after
        assert not (folder / ".ready").exists()
        states.append(after == before)
        if not was_killed:
            break
        number += 1
    # Before the predictions are ready, the earlier one; then the new one.
    assert states == [True, True, False, False, False, False]


def test_files_of_two_evaluations_are_refused_in_one_line_that_names_the_command(
    evaluated: Path, tmp_path: Path
) -> None:
    run = tmp_path / "a run"
    shutil.copytree(evaluated, run)
    folder = run / "evaluation"
    (folder / SUMMARY).write_text(with_digest(folder, 1.0))
    table = pq.read_table(folder / SAMPLES)
    pq.write_table(table.slice(1), folder / SAMPLES)
    with pytest.raises(InputProblems) as refused:
        open_runs([run])
    [line] = str(refused.value).splitlines()[-1:]
    assert f"segdiff evaluate --run '{run}'" in line
