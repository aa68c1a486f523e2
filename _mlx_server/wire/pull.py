"""Ollama's native API, the download of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from _mlx_server.inference.catalog.download import HubError, HubFailure
from _mlx_server.inference.catalog.hub import PullProgress, PullStage
from _mlx_server.wire.fields import Object, WireError

_STATUS = {
    HubFailure.NOT_FOUND: 404,
    HubFailure.FORBIDDEN: 404,  # a private repo is one that is not there
    HubFailure.NO_MODEL: 400,
    HubFailure.NO_SPACE: 507,
    HubFailure.BUSY: 409,
    HubFailure.UNREACHABLE: 502,
    HubFailure.UNWRITABLE: 500,
}
_SAID = {
    PullStage.LISTED: "pulling manifest",
    PullStage.CHECKED: "verifying sha256 digest",
    PullStage.LINKED: "writing manifest",
    PullStage.DONE: "success",
}


def ollama_pull(steps: Generator[PullProgress]) -> Generator[Object, None, None]:
    """POST /api/pull: Ollama's progress objects for the steps of a pull, which ends when this
    iterator is closed. Raises WireError.

    https://github.com/ollama/ollama/blob/main/docs/api.md#pull-a-model"""
    with contextlib.closing(steps):
        try:
            for step in steps:
                yield _progress(step)
        except HubError as error:
            raise WireError(_STATUS[error.reason], str(error)) from error


def _progress(step: PullProgress) -> Object:
    if step.file is None:
        return {"status": step.said or _SAID[step.stage]}
    return {
        "status": f"pulling {step.file.digest[:12]}",
        "digest": f"sha256:{step.file.digest}",
        "total": step.file.size,
        "completed": step.completed,
    }
