"""The reference page names every setting once, with default, range, effect and meaning."""

from __future__ import annotations

import re

from segdiff_dist.config import as_dict, flatten
from segdiff_dist.config_reference import settings_page
from segdiff_dist.experiment import Experiment


def test_every_setting_has_a_row_that_is_whole() -> None:
    page = settings_page()
    rows = {
        row[0].strip("`"): row[1:]
        for row in re.findall(r"^\| (`[\w.]+`) \| (.*) \| (.+) \| (.*) \| (.*) \|$", page, re.M)
    }
    assert set(flatten(as_dict(Experiment()))) - {"loader.mix"} <= set(rows)
    assert [key for key, row in rows.items() if not row[3]] == []
    assert [key for key, row in rows.items() if "." in key and not row[2]] == []
    assert rows["train.zero_stage"][:3] == (
        "`1`",
        "a whole number from 0 to 3",
        "may change when a training is resumed",
    )
    assert "never taken from a run folder" in rows["sample.ray_address"][3]
