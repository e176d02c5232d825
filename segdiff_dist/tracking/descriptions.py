"""The description of a run: its name, its text and its origin, under the tags that MLflow's pages show.

Everything goes through a given client; only mlflow_run.py imports MLflow.
"""

from __future__ import annotations

import functools
import getpass
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

NOTE = "mlflow.note.content"
# Without it MLflow's page asks what the experiment is for.
_EXPERIMENT = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": "dice_either_mask_gen",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
    NOTE: (
        "Segmentation-guided diffusion: one run for each run folder, with training, sampling and evaluation. The step "
        "of training metrics is the number of images seen. `dice_either_mask_gen` is the headline number."
    ),
}
_MOST_NOTE, _GIT_PATIENCE_S = 8000, 5.0


def describe_experiment(client: Any, experiment_id: str) -> None:
    """Give an experiment its kind and its description, unless it has others."""
    known = client.get_experiment(experiment_id).tags
    for key, value in _EXPERIMENT.items():
        if key not in known:
            client.set_experiment_tag(experiment_id, key, value)


def describe(client: Any, run_id: str, folder_name: str, described: Mapping[str, Any]) -> None:
    """Put a paragraph of a stage into the run's description, replacing the earlier one, and name the run, unless the
    user has named it. The rest of the description stays."""
    run = client.get_run(run_id)
    if described["run_name"] is not None and run.info.run_name == folder_name:
        client.update_run(run_id, name=described["run_name"])
    start = f"**{described['stage']}**: "
    paragraphs = run.data.tags.get(NOTE, "").split("\n\n")
    others = [one for one in paragraphs if one and not one.startswith(start)]
    client.set_tag(run_id, NOTE, "\n\n".join([*others, start + described["text"]])[:_MOST_NOTE])


def source_tags(stage: str) -> dict[str, str]:
    """The command and the version of the code that records."""
    tags = {"mlflow.source.name": f"segdiff {stage}", "mlflow.source.type": "LOCAL"}
    with suppress(PackageNotFoundError):
        tags["segdiff.version"] = version("segdiff-dist")
    revision = _revision()
    if revision is not None:
        tags["mlflow.source.git.commit"] = revision.removesuffix("-dirty")
        tags["mlflow.source.git.dirty"] = str(revision.endswith("-dirty")).lower()
    return tags


def user_tag() -> dict[str, str]:
    """Who began the run; empty if the user has no name, as in some containers."""
    with suppress(KeyError, OSError, ImportError):
        return {"mlflow.user": getpass.getuser()}
    return {}


@functools.cache
def _revision() -> str | None:
    """The commit of the code, with "-dirty" where files differ from it; None if it is no git checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_PATIENCE_S, check=True)
        return found.stdout.strip() or None
    return None
