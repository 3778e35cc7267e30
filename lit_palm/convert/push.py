"""Upload an exported folder to the Hugging Face hub, through its own client and the login that it keeps."""

from __future__ import annotations

from typing import Any

__all__ = ["check_login", "push"]


def check_login(repository: str) -> str:
    """The account that an upload would be made from, asked of the hub before any work starts.

    Args:
        repository: `NAME` or `OWNER/NAME`.

    Raises:
        ValueError: nobody is logged in, the hub refuses or cannot be reached, or the name is no repository's.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"--push {repository}: {str(error).splitlines()[0]}") from error
    try:
        # asked for by name: a client without a login would be told so by the server
        return str(HfApi().whoami(token=True)["name"])
    except LocalTokenNotFoundError as error:
        raise ValueError(
            f"--push {repository}: nobody is logged in to the hub: run `hf auth login`, or set HF_TOKEN"
        ) from error
    except Exception as error:
        raise _refused(repository, error) from error


def push(folder: str, repository: str, private: bool = True) -> str:
    """Upload a folder, in one commit.

    Args:
        folder: what was exported.
        repository: made if it does not exist.
        private: whether it is then private; one that exists stays what it is.

    Returns:
        Where it is.

    Raises:
        ValueError: the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made: Any = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Upload with lit-palm export")
    except Exception as error:
        raise _refused(repository, error) from error
    return str(made)


def _refused(repository: str, error: Exception) -> ValueError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ValueError(f"--push {repository}: the hub did not take it ({type(error).__name__}: {' '.join(lines[:2])})")
