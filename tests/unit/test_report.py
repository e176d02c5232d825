"""summary.json from measured columns, and the page made from it."""

from __future__ import annotations

import base64
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from evaluation_support import Page, is_self_contained

from data_shards.labels import AMOS
from segdiff_dist.evaluation.measure.summary import Evaluated, scalars, summarise
from segdiff_dist.evaluation.measure.trust import Spread, not_searched
from segdiff_dist.evaluation.measure.worker import ChunkResult
from segdiff_dist.evaluation.metrics.columns import column_names
from segdiff_dist.evaluation.metrics.distances import fewest_samples
from segdiff_dist.evaluation.metrics.sums import Interval
from segdiff_dist.evaluation.report.page import PUBLISHED, write_report
from segdiff_dist.evaluation.report.tracked import locate

LIVER, SPLEEN = "liver", "spleen"
ONCE = Interval(10, 0)
# One pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def item(case: str, source: str, target: str, row: int, seed_index: int = 0) -> dict[str, Any]:
    return {
        "row": row,
        "key": f"{case}-axial-{row:04d}",
        "case_id": case,
        "source_modality": source,
        "target_modality": target,
        "axis": "axial",
        "slice_index": row,
        "seed_index": seed_index,
    }


def measured(
    items: list[dict[str, Any]],
    dice_mask_gen: list[float],
    spread: dict[int, Spread] | None = None,
    cuts: tuple[int, ...] = (),
) -> Evaluated:
    """Items with the Dice given; every other metric of a headline item is 0.5, and liver is the one organ.

    `spread`: pixel_std by item; `cuts`: where the items are cut into chunks.
    """
    evaluated = Evaluated.empty(AMOS, pa.Table.from_pylist(items), spread or {})
    headline = np.array([i["seed_index"] == 0 and i["source_modality"] == i["target_modality"] for i in items])
    result = ChunkResult({name: np.full(len(items), np.nan) for name in column_names(AMOS)})
    for name in ("psnr_db", "ssim", "dice_mask_real", "dice_real_gen", "legacy_dice_mask_real"):
        result.columns[name][headline] = 0.5
    result.columns["dice_mask_gen"][:] = dice_mask_gen
    result.columns[f"dice_mask_gen/{LIVER}"][:] = dice_mask_gen
    features = np.random.default_rng(0).normal(size=(2, len(items), 4)).astype(np.float32)
    features[0, ~headline] = np.nan
    result.features = {("segmenter", "real"): features[0], ("segmenter", "gen"): features[1]}
    result.grey_counts = np.zeros((len(items), 2, 256), np.int64)
    result.grey_counts[headline, :, 100] = 64
    for start, stop in itertools.pairwise((0, *cuts, len(items))):
        part = ChunkResult({name: values[start:stop] for name, values in result.columns.items()})
        part.features = {key: values[start:stop] for key, values in result.features.items()}
        part.grey_counts = result.grey_counts[start:stop]
        evaluated.add(start, stop, part)
    return evaluated


ITEMS = [
    item("amos_0001", "CT", "CT", 0),
    item("amos_0001", "CT", "CT", 1),
    item("amos_0002", "CT", "CT", 2),
    item("amos_0507", "MR", "MR", 3),
    item("amos_0508", "MR", "MR", 4),
    item("amos_0001", "CT", "CT", 0, seed_index=1),
    item("amos_0001", "CT", "MR", 0),
    item("amos_0002", "CT", "MR", 2),
]
LEAKED = {"num_leaked": 1, "patients": ["amos_0002"], "files": []}
MEMORISED = {
    "memorised_share": 0.4,
    "most_allowed": 0.05,
    "passed": False,
    "num_images": 5,
    "num_suspects": 2,
    "limits": {"pixels": 1.0, "segmenter": 1.0},
    "nearer": {"pixels": 0.5, "segmenter": None},
    "nearest": [],
}
DICE = [0.9, 0.7, 0.5, 0.6, np.nan, 0.1, 0.2, 0.4]


@pytest.fixture
def summary() -> dict[str, Any]:
    found = summarise(measured(ITEMS, DICE, {0: Spread(12.5)}), Interval(resamples=200, seed=0))
    found["not_available"] = {"fid": "no Inception weights were given; <get> them"}
    found["provenance"] = {"label_table": "amos", "versions": {"torch": "2.13.0"}, "fid_weights": None}
    return found


class TestSummary:
    def test_only_first_samples_in_their_own_modality_make_the_headline(self, summary):
        assert (summary["num_samples"], summary["num_patients"]) == (5, 4)
        dice = summary["metrics"]["dice_mask_gen"]
        assert dice["value"] == pytest.approx((0.9 + 0.7 + 0.5 + 0.6) / 4)
        assert (dice["n"], dice["num_left_out"], dice["num_patients"]) == (4, 1, 3)
        low, high = dice["ci95"]
        assert low <= dice["value"] <= high

    def test_groups(self, summary):
        assert summary["by_modality"]["CT"]["dice_mask_gen"]["value"] == pytest.approx(0.7)
        assert set(summary["by_axis"]) == {"axial"}
        assert set(summary["by_modality_axis"]) == {"CT/axial", "MR/axial"}
        assert summary["by_organ"][LIVER]["dice_mask_gen"]["n"] == 4
        assert summary["by_organ"][SPLEEN] == {}
        assert summary["by_modality_organ"]["MR"][LIVER]["dice_mask_gen"]["value"] == pytest.approx(0.6)

    def test_cross_modality_is_shown_separately(self, summary):
        across = summary["cross_modality"]["CT_to_MR"]
        assert across["dice_mask_gen"]["value"] == pytest.approx(0.3)
        # Two generated against the two real MR images are too few.
        assert "segmenter_frechet" not in across
        assert "psnr_db" not in across

    def test_diversity_is_shown_separately(self, summary):
        diversity = summary["diversity"]
        assert (diversity["num_masks"], diversity["num_images"]) == (1, 2)
        assert diversity["metrics"]["pixel_std"]["value"] == 12.5
        assert diversity["metrics"]["dice_mask_gen"]["value"] == pytest.approx((0.9 + 0.1) / 2)

    @pytest.mark.parametrize("num", [1, 2, 4, 5])
    def test_distribution_metrics_need_five_samples(self, num):
        found = summarise(measured([item("amos_0001", "CT", "CT", row) for row in range(num)], [0.5] * num), ONCE)
        for name in ("segmenter_frechet", "segmenter_kernel_distance"):
            assert (name in found["metrics"]) == (num >= 5)
            assert fewest_samples(name) == 5
        assert found["metrics"]["dice_mask_gen"]["ci95"] is None

    def test_is_valid_json(self, summary):
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary

    def test_stable_names(self, summary):
        flat = scalars(summary)
        assert {
            "psnr_db",
            "segmenter_frechet",
            "CT/dice_mask_gen",
            "axial/ssim",
            "organ/liver/dice_mask_gen",
            "CT/axial/dice_mask_gen",
            "CT/organ/liver/dice_mask_gen",
            "axial/organ/liver/dice_mask_gen",
            "cross_modality/CT_to_MR/dice_mask_gen",
            "diversity/pixel_std",
            "diversity/CT/pixel_std",
            "num_samples",
            "num_patients",
        } <= set(flat)
        assert flat["MR/organ/liver/dice_mask_gen"] == pytest.approx(0.6)
        assert not any("fid" in name for name in flat)
        assert all(np.isfinite(value) for value in flat.values())

    def test_every_number_of_the_summary_has_a_name(self, summary):
        summary["body"] = {"dice_mask_gen": summary["metrics"]["dice_mask_gen"]}
        summary["trust"] = {"leakage": LEAKED, "memorisation": MEMORISED}

        def entries(value: Any) -> int:
            if not isinstance(value, dict):
                return 0
            return 1 if "ci95" in value else sum(map(entries, value.values()))

        flat = scalars(summary)
        trust = {name: value for name, value in flat.items() if name.startswith("trust/")}
        assert trust == {
            "trust/num_leaked": 1,
            "trust/num_suspects": 2,
            "trust/memorised_share": 0.4,
            "trust/nearer_pixels": 0.5,
        }
        assert "body/dice_mask_gen" in flat
        assert len(flat) == entries(summary) + len(trust) + len(("num_samples", "num_patients"))

    def test_neighbourhoods_need_six_samples(self, summary):
        assert "segmenter_kernel_distance" in summary["metrics"]
        assert "segmenter_precision" not in summary["metrics"]
        items = [item(f"amos_{i:04d}", "CT", "CT", i) for i in range(6)]
        found = summarise(measured(items, [0.5] * 6), Interval(10, 0))["metrics"]
        for name in ("precision", "recall", "coverage"):
            assert 0 <= found[f"segmenter_{name}"]["value"] <= 1
        assert found["segmenter_density"]["better"] == "higher"

    @pytest.mark.parametrize("cuts", [(3,), (1, 2, 7)])
    def test_sums_do_not_depend_on_chunks(self, summary, cuts):
        again = summarise(measured(ITEMS, DICE, {0: Spread(12.5)}, cuts), Interval(resamples=200, seed=0))
        for name, entry in summary["metrics"].items():
            assert again["metrics"][name]["value"] == pytest.approx(entry["value"])
            assert again["metrics"][name]["n"] == entry["n"]
        assert again["grey_values"] == summary["grey_values"]
        assert again["diversity"] == summary["diversity"]


@pytest.fixture
def run(tmp_path: Path, summary: dict[str, Any]) -> Path:
    figures = tmp_path / "evaluation" / "figures"
    figures.mkdir(parents=True)
    (tmp_path / "evaluation" / "summary.json").write_text(json.dumps(summary))
    (figures / "gallery.png").write_bytes(PNG)
    (figures / "index.json").write_text(json.dumps([{"file": "gallery.png", "title": "Gallery", "caption": "A & B"}]))
    (tmp_path / "config.yaml").write_text("train:\n  note: <script>\n")
    return tmp_path


class TestReport:
    def test_is_one_self_contained_page(self, run):
        page = write_report(run)
        html = page.read_text()
        assert page == run / "evaluation" / "report.html"
        assert is_self_contained(Page(html))
        assert not re.search(r"url\(|@import|https?://", html)
        assert base64.b64encode(PNG).decode() in html

    def test_says_what_there_is_and_what_there_is_not(self, run):
        text = Page(write_report(run).read_text()).text
        assert "FID not available: no Inception weights were given; <get> them" in " ".join(text.split())
        assert "0.675" in text  # the headline Dice
        assert "A & B" in text
        assert "note: <script>" in text
        assert "Published results" in text
        for values in PUBLISHED.values():
            assert all(value in text for value in values)

    def test_without_figures_and_config(self, run):
        (run / "evaluation" / "figures" / "index.json").unlink()
        (run / "config.yaml").unlink()
        text = Page(write_report(run).read_text()).text
        assert "Figures" not in text
        assert "Configuration of the run" not in text

    def test_trust_says_what_was_not_measured(self, run):
        text = Page(write_report(run).read_text()).text
        assert f"segdiff evaluate --run {run.resolve()} --evaluate.memorisation" in text
        assert "2 images of one mask" in text

    def test_trust_says_what_was_found(self, run):
        file = run / "evaluation" / "summary.json"
        summary = json.loads(file.read_text())
        file.write_text(json.dumps(summary | {"trust": {"leakage": LEAKED, "memorisation": MEMORISED}}))
        page = Page(write_report(run).read_text())
        assert "are in the train split as well: amos_0002" in page.text
        assert "2 of 5" in page.text
        assert "40.0%; 5.0% are allowed. Failed." in page.text
        assert "0.50 in pixels, \u2013 in features" in page.text
        assert "Before release" in page.text

    def test_trust_that_could_not_be_measured_is_not_called_passed(self, run):
        file = run / "evaluation" / "summary.json"
        summary = json.loads(file.read_text())
        summary["trust"] = {
            "leakage": LEAKED,
            "memorisation": not_searched("the shard set has no <train> split"),
        }
        file.write_text(json.dumps(summary))
        text = Page(write_report(run).read_text()).text
        assert "The check could not be made: the shard set has no <train> split. Not passed." in text
        assert "Before release: whether training images are among the samples is not known" in text
        assert not [name for name in scalars(summary) if name.startswith("trust/") and name != "trust/num_leaked"]

    def test_diversity_has_a_row_a_metric(self, run):
        page = Page(write_report(run).read_text())
        assert page.row("Pixel std")[1:] == ["12.50"]

    def test_hu_is_shown_by_organ(self, run):
        file = run / "evaluation" / "summary.json"
        summary = json.loads(file.read_text())
        assert "hu" not in Page(write_report(run).read_text()).ids
        entry = summary["metrics"]["psnr_db"]
        names = ("hu_mean_real", "hu_mean_gen", "hu_mean_error", "hu_std_real", "hu_std_gen")
        for value, name in zip((60.0, -5.5, 65.5, 10.0, 12.0), names, strict=True):
            summary["by_modality_organ"]["CT"][LIVER][name] = entry | {"value": value, "ci95": None}
        file.write_text(json.dumps(summary))
        page = Page(write_report(run).read_text())
        assert "hu" in page.ids
        assert [LIVER, "60.0", "\u22125.5", "65.5", "10.0", "12.0"] in [row[:6] for row in page.rows]

    def test_leads_to_mlflow(self, run):
        assert "Not tracked in MLflow" in Page(write_report(run).read_text()).text
        link = {"tracking_uri": None, "experiment": "abdomen", "run_id": "ab12"}
        (run / "mlflow.json").write_text(json.dumps(link))
        text = Page(write_report(run).read_text()).text
        assert f"Experiment abdomen, run {run.name}, ab12" in text
        assert f"mlflow ui --backend-store-uri sqlite:///{run}/mlflow.db" in text
        (run / "mlflow.json").write_text(json.dumps(link | {"tracking_uri": "http://server:5000/"}))
        page = Page(write_report(run).read_text())
        assert "http://server:5000/#/runs/ab12" in page.addresses


class TestWhereMlflowShowsARun:
    def test_a_server_before_it_has_taken_the_run(self):
        found = locate({"tracking_uri": "https://server/mlflow", "experiment": "e", "run_id": None}, Path("/r/a"))
        assert (found.url, found.command, found.name) == ("https://server/mlflow", None, "a")

    @pytest.mark.parametrize(
        ("store", "shown"),
        [
            ("postgresql://me:secret@host:5432/db", "mlflow ui --backend-store-uri 'postgresql://me:***@host:5432/db'"),
            ("http://me:secret@host:5000", "http://host:5000/#/runs/ab12"),
            ("sqlite:////a folder/x.db", "mlflow ui --backend-store-uri 'sqlite:////a folder/x.db'"),
        ],
    )
    def test_passwords_stay_at_home(self, store: str, shown: str):
        found = locate({"tracking_uri": store, "experiment": "e", "run_id": "ab12"}, Path("/r/a"))
        assert (found.url or found.command) == shown
        assert "secret" not in str(found)
