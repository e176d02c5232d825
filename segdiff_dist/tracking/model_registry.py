"""A model in MLflow's registry: a version of a name, whose source is the model's folder, kept with the run.

Everything goes through a given client; only mlflow_run.py imports MLflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

DIGEST_TAG = "weights_digest"
# MLflow's codes for a server without a registry, or without one for this user.
NO_REGISTRY = ("ENDPOINT_NOT_FOUND", "FEATURE_DISABLED", "NOT_IMPLEMENTED", "PERMISSION_DENIED")


def register(client: Any, run_id: str, folder: Path, name: str, digest: str, tags: Mapping[str, str]) -> None:
    """Make the model in `folder` a version of `name` with these tags. If a version has its digest, that version gets
    the tags.

    So the call may be repeated, for example after a lost answer, and `folder` is needed only the first time:
    FileNotFoundError if it is missing then. Also raises the client's errors.
    """
    # By its digest, so that a version from another run folder of the same store is found too.
    found = client.search_model_versions(f"name = '{name}' and tags.{DIGEST_TAG} = '{digest}'", max_results=1)
    if found:
        for key, value in tags.items():
            client.set_model_version_tag(name, found[0].version, key, value)
        return
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is gone")
    _make_sure_of(client, name)
    kept_in = f"model/{digest[:12]}"
    client.log_artifacts(run_id, str(folder), kept_in)
    source = f"{client.get_run(run_id).info.artifact_uri.rstrip('/')}/{kept_in}"
    # The digest is set together with the version: a version without it would be made a second time.
    client.create_model_version(name, source, run_id, tags={**tags, DIGEST_TAG: digest}, await_creation_for=0)


def _make_sure_of(client: Any, name: str) -> None:
    try:
        client.create_registered_model(name)
    except Exception as error:  # distinguished by MLflow's error code, whatever the transport
        if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
            raise
