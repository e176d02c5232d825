"""A model in MLflow's registry: a version of a name, whose source is the model's folder, kept with the run.

Everything goes through a given client; only mlflow_run.py imports MLflow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

DIGEST_TAG, SHARDS_TAG, HEADLINE_TAG = "weights_digest", "shards_digest", "dice_either_mask_gen"
NEWEST, BEST = "newest", "best"
# MLflow's codes of a server that has no registry, or none for this user.
NO_REGISTRY = ("ENDPOINT_NOT_FOUND", "FEATURE_DISABLED", "NOT_IMPLEMENTED", "PERMISSION_DENIED")


def register(client: Any, run_id: str, folder: Path, name: str, digest: str, tags: Mapping[str, str]) -> None:
    """Make the model in `folder` a version of `name` with these tags, unless one has its digest: that gets the tags.
    Then the aliases are set anew.

    So the call may be repeated, for example after a lost answer, and `folder` is needed only the first time:
    FileNotFoundError if it is missing then. Also raises the client's errors.
    """
    # By its digest, so that a version from another run folder of the same store is found too.
    found = client.search_model_versions(f"name = '{name}' and tags.{DIGEST_TAG} = '{digest}'", max_results=1)
    if found:
        for key, value in tags.items():
            client.set_model_version_tag(name, found[0].version, key, value)
        _set_aliases(client, name, found[0].version)
        return
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is gone")
    _make_sure_of(client, name)
    kept_in = f"model/{digest[:12]}"
    client.log_artifacts(run_id, str(folder), kept_in)
    source = f"{client.get_run(run_id).info.artifact_uri.rstrip('/')}/{kept_in}"
    # The digest comes with the version, not after it: a version without it would be made a second time.
    tags = {**tags, DIGEST_TAG: digest}
    description = f"A segdiff pipeline folder, for SegGuidedPipeline.from_pretrained. From the run {run_id}."
    made = client.create_model_version(name, source, run_id, tags=tags, description=description, await_creation_for=0)
    _set_aliases(client, name, made.version)


def _set_aliases(client: Any, name: str, newest: str) -> None:
    """`newest`: the version that was evaluated last. `best`: that with the highest headline Dice among those evaluated
    on the same shard set as the newest."""
    client.set_registered_model_alias(name, NEWEST, newest)
    versions = client.search_model_versions(f"name = '{name}'")
    shards = next((one.tags.get(SHARDS_TAG) for one in versions if str(one.version) == str(newest)), None)
    dice = {one.version: _dice(one) for one in versions if one.tags.get(SHARDS_TAG) == shards}
    if any(value is not None for value in dice.values()):
        best = max(dice, key=lambda version: (-1.0 if dice[version] is None else dice[version], int(version)))
        client.set_registered_model_alias(name, BEST, best)


def _dice(version: Any) -> float | None:
    """The headline Dice of a version; None if it has none."""
    with suppress(KeyError, ValueError):
        value = float(version.tags[HEADLINE_TAG])
        return value if math.isfinite(value) else None
    return None


def _make_sure_of(client: Any, name: str) -> None:
    try:
        client.create_registered_model(name)
    except Exception as error:  # distinguished by MLflow's error code, whatever the transport
        if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
            raise
