"""Upload an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from w2vscale.errors import UserError
from w2vscale.version import __version__

SILENCE = 60.0
"""Seconds without a byte from the Hub, after which an upload has failed."""

WHY = {
    401: "the token is not valid; log in with: hf auth login, or set HF_TOKEN",
    403: "the token has no permission to write there; make one that has at https://huggingface.co/settings/tokens",
    404: "no such user or organisation, or the token has no access to it",
}
"""Causes of the statuses with which the Hub refuses an upload."""


def check_repository(name: str) -> None:
    """Check what can be checked before an export, without network.

    Raises UserError if huggingface_hub is not installed, no repository can have this name, or there is no token.
    """
    try:
        from huggingface_hub import get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ImportError:
        raise UserError("huggingface_hub is not installed: pip install 'w2vscale[huggingface]'") from None
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {name}: not the name of a repository (USER/NAME): {_line(error)}") from None
    if get_token() is None:
        raise UserError(
            f"--push-to-hub {name}: no token of the Hugging Face Hub; log in with: hf auth login, or set HF_TOKEN"
        )


def push_to_hub(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder to a model repository, which is made if there is none. Returns its URL.

    The token and the address of the Hub are those of huggingface_hub: `hf auth login`, HF_TOKEN, HF_ENDPOINT. Raises
    UserError if that fails, which says how to repeat it, and if it must be `private` and is public; then nothing is
    uploaded.
    """
    from huggingface_hub import HfApi, get_session
    from huggingface_hub.errors import HTTPError

    api, session = HfApi(library_name="w2vscale", library_version=__version__), get_session()
    before, session.timeout = session.timeout, SILENCE  # by default, huggingface_hub waits for ever
    try:
        url = api.create_repo(name, private=private, exist_ok=True)
        if private and not api.repo_info(name).private:  # it existed; huggingface_hub leaves it as it was
            raise UserError(
                f"{name}: is a public repository, and --private was given; nothing was uploaded. Choose another name, "
                f"make it private ({url}/settings), or leave out --private; {folder} is complete"
            )
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Export with w2vscale {__version__}")
    except UserError:
        raise
    # ValueError: metadata that the Hub refuses. RuntimeError: errors of its storage.
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = f"{status}: {WHY[status]}" if status in WHY else _line(error)
        again = shlex.join(["hf", "upload", name, str(folder), ".", *["--private"] * private])
        raise UserError(
            f"{name}: cannot be uploaded to {api.endpoint}: {why}; {folder} is complete, upload it with: {again}"
        ) from None
    finally:
        session.timeout = before
    return str(url)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
