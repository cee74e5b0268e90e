"""Puts a model directory into a repository of your own on the hub: what an operator does once.

`python -m builder.bake --publish YOU/NAME` does so after it has made the directory. RunPod's model
cache and a worker's own download take it from there.
"""

import logging
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from builder.download import AccessDeniedError, BuildError, ConnectionLostError
from worker.loading import manifest

logger = logging.getLogger("builder.publish")


def publish(model_dir: Path, repository: str, token: str | None) -> None:
    """Uploads the directory, whose repository is made where there is none, and then private.

    What the hub has already is not sent again, so the same command goes on after a failure. The
    manifest is sent last: a repository that has one is whole.

    Raises:
        BuildError: why not all of it is there.
    """
    api = HfApi(token=token)
    try:
        # private: the licence of the weights excludes some countries
        api.create_repo(repository, private=True, exist_ok=True)
        logger.info("uploading %s to %s", model_dir, repository)
        api.upload_folder(
            repo_id=repository,
            folder_path=model_dir,
            ignore_patterns=manifest.NAME,
            commit_message="HunyuanVideo-Avatar, converted",
        )
        api.upload_file(
            repo_id=repository,
            path_or_fileobj=model_dir / manifest.NAME,
            path_in_repo=manifest.NAME,
            commit_message="What the model consists of",
        )
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise AccessDeniedError(
                f"{repository} cannot be written: give a token of its owner with the right to write"
            ) from error
        raise BuildError(f"{repository} was not written: {error}") from error
    except (HTTPError, OSError) as error:
        raise ConnectionLostError(
            f"{repository} was not written: {error}; run the same command again"
        ) from error
    logger.info("%s is published: MODEL_REPOSITORY=%s", repository, repository)
