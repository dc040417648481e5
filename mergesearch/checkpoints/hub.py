"""The Hugging Face hub: which references are its ids, what licence a model states, and a folder uploaded to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from mergesearch.errors import UserError

_CARD = "README.md"


def hub_ids(reference: str) -> list[str]:
    """The hub ids in a reference, without revisions: none of a folder or of one of the zoo, two of `MODEL+ADAPTER`.

    >>> hub_ids("owner/base@main+owner/adapter"), hub_ids("./owner/base")
    (['owner/base', 'owner/adapter'], [])
    """
    names = [part.partition("@")[0] for part in reference.split("+")]
    return [name for name in names if _is_id(name) and not Path(name).exists()]


def check_id(name: str) -> None:
    """`UserError` where a name is none that the hub takes for a repository."""
    if not _is_id(name):
        raise UserError(
            f"{name!r} is no name of a repository on the hub: write OWNER/NAME, with letters, digits, '-', '_' and "
            "'.', at most 96 characters, no '--' and no '..'"
        )


def _is_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name  # the hub still has some models without an owner, and takes no new ones


def licence_of(folder: Path) -> str | None:
    """The licence that a model's card states, as the hub names it (`apache-2.0`); its `license_name` where that is
    `other`. None where there is no card, or it states none."""
    try:
        text = (folder / _CARD).read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return None
    if not isinstance(front, dict):
        return None
    stated = front.get("license")
    if stated == "other" and isinstance(front.get("license_name"), str):
        stated = front["license_name"]
    if isinstance(stated, list) and len(stated) == 1:
        (stated,) = stated
    return stated.strip().lower() or None if isinstance(stated, str) else None


def create_repository(name: str, private: bool = False) -> None:
    """Makes a repository for a model on the hub, if it is not there; so it is known that it may be written.

    Raises:
        UserError: the hub is not to be reached, knows no such owner, or does not let this user write there.
    """
    from huggingface_hub import HfApi

    check_id(name)
    try:
        HfApi().create_repo(name, private=private, exist_ok=True)
    except Exception as error:
        raise UserError(_refused(name, error)) from None


def upload(folder: Path, name: str, message: str, leave: Sequence[str] = (), revision: str | None = None) -> str:
    """Uploads a model's folder as one commit, and returns its address.

    Args:
        folder: every file in it, but for those in `leave`.
        name: the repository, which is there.
        message: of the commit.
        leave: names of files, or patterns with `*`.
        revision: the branch; None for the main one. It is made if it is not there.

    Raises:
        UserError: the hub is not to be reached, or refuses.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        if revision is not None:
            hub.create_branch(name, branch=revision, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=list(leave), revision=revision
        )
    except Exception as error:
        raise UserError(_refused(name, error)) from None
    return str(commit.commit_url)


def _refused(name: str, error: Exception) -> str:
    """What the hub's refusal means, and what to do."""
    kind, status = type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)
    if kind == "OfflineModeIsEnabled":
        return f"{name}: nothing is uploaded while HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it"
    if status == 401 or kind == "LocalTokenNotFoundError":
        return f"{name}: the hub does not know you: `hf auth login` with a token that may write, or set HF_TOKEN"
    if status in (403, 404):
        return f"{name}: the hub does not let you write there ({status}): use an owner and a token that may"
    reason = " ".join(str(error).split())[:300]
    return f"{name}: the hub did not take it ({kind}: {reason}): type the same command again"
