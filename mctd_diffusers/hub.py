"""The Hub: pushing to it, and saying in one sentence what is wrong when it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCardData, hf_hub_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of its HTTP library
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mctd_diffusers.errors import ConfigError

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""Arguments of every ``from_pretrained`` that say how the Hub is read."""
CARD = "README.md"

_TRY_AGAIN = "try again when the Hub can be reached, what has arrived is kept"


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    path_in_repo: str | None = None,
    card: Callable[[str], str] | None = None,
) -> CommitInfo:
    """Upload a folder to a repository of the Hub, which is made if there is none.

    Up to some 250 files become one commit, so that readers see the repository as it was or as it is
    meant to be; more become several. A push that was interrupted is taken up by the same call: what
    the Hub holds already is not sent again.

    Args:
        folder: what is uploaded, subfolders included; hidden files, such as half-written ones, are
            left out. Files that the repository has under other names stay there.
        repo_id: ``owner/name``, or ``name`` in the account of the token.
        repo_type: ``"model"`` or ``"dataset"``.
        private: whether a new repository is private; by default as the account's settings say.
        token: of an account that may write there; by default the saved one.
        commit_message: by default the client's own.
        create_pr: whether to open a pull request in place of writing to the main branch.
        path_in_repo: folder of the repository to write to; by default its root.
        card: makes the text of ``README.md`` from the full name of the repository; it is written
            into the folder where neither it nor the repository has one.

    Returns:
        The commit: its address, with its hash as ``oid``.

    Raises:
        ConfigError: there is no such folder, or the Hub cannot be reached or refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder {str(folder)!r} to push to {repo_id!r}: pass one that exists"
        )
    api = HfApi(token=token)
    with hub_errors("push to", repo_id):
        url = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        if card is not None and not (folder / CARD).exists():
            if not api.file_exists(url.repo_id, CARD, repo_type=repo_type):
                (folder / CARD).write_text(card(url.repo_id), encoding="utf-8")
        return api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            ignore_patterns=[".*", "*/.*"],
            repo_type=repo_type,
            path_in_repo=path_in_repo,
            commit_message=commit_message,
            create_pr=create_pr,
        )


def card_text(metadata: Mapping[str, Any], text: str) -> str:
    """Text of a model card: its metadata, entries that are ``None`` left out, and its body."""
    return f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{text}"


def repository_of(source: str | os.PathLike[str] | None) -> str | None:
    """The repository that something was loaded from; ``None`` where it was a folder."""
    name = os.fspath(source or "")
    is_name = is_repository(name) and "/" in name and not Path(name).exists()
    return name if is_name else None


def documents_beside(source: str | os.PathLike[str] | None) -> dict[str, Path]:
    """Card, licences, figures in the folder that something was loaded from, by file name."""
    if not source or not Path(source).is_dir():
        return {}
    return {path.name: path for path in Path(source).iterdir() if path.suffix in {".md", ".png"}}


@contextmanager
def loading(
    class_name: str, source: str | os.PathLike[str], arguments: Mapping[str, Any]
) -> Iterator[None]:
    """Load a model from a folder or repository, once it is known to hold one of its class.

    Args:
        class_name: name of the class, without its module.
        source: the folder, or the name of the repository.
        arguments: of ``from_pretrained``: `HUB_ARGUMENTS` and ``subfolder`` are read.

    Raises:
        ConfigError: there is no such folder or repository, it holds no such model, or its files
            cannot be read.
    """
    source = os.fspath(source)
    hub = {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}
    subfolder = arguments.get("subfolder") or ""
    doing, revision = f"load the {class_name} of", hub.get("revision")
    cure = "copy or download it again, or pass another folder or repository"
    with hub_errors(doing, source, revision, cure=cure):
        if Path(source).is_dir():
            path = Path(source) / subfolder / "config.json"
        elif is_repository(source):
            try:
                path = Path(hf_hub_download(source, f"{subfolder}/config.json".strip("/"), **hub))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                path = Path("config.json")
        else:
            raise ConfigError(
                f"could not {doing} {source!r}: there is no such folder, and it is no name of a "
                "Hub repository; pass an existing folder, or owner/name"
            )
        found = "no config.json"
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            found = f"a {config.get('_class_name')}"
        if found != f"a {class_name}":
            raise ConfigError(
                f"could not {doing} {source!r}: it holds {found}; pass what save_pretrained or "
                f"push_to_hub of a {class_name} wrote"
            )
        yield


def is_repository(source: str) -> bool:
    """Whether this can be the name of a repository, where there is no such folder."""
    return source[:1] not in ("", "/", ".", "~") and source.count("/") <= 1


@contextmanager
def hub_errors(
    doing: str, repo_id: str, revision: str | None = None, *, cure: str = _TRY_AGAIN
) -> Iterator[None]:
    """Say what the client of the Hub raises in one sentence, with its cure.

    Args:
        doing: what is done with the repository, such as ``"push to"``.
        repo_id: its name, as the user wrote it.
        revision: the same.
        cure: what helps against errors that are neither known nor the network's.

    Raises:
        ConfigError: in place of errors of the client and of the network.
    """
    try:
        yield
    except ConfigError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = _reason(error, revision)
        if reason is None:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = f"{lines[0].rstrip('.:')}; {cure}"
            if isinstance(error, EntryNotFoundError):
                reason = f"it lacks a file; {cure}"
            elif isinstance(error, HTTPError):
                reason = f"{lines[0].rstrip('.:')}; {_TRY_AGAIN}"
        raise ConfigError(f"could not {doing} {repo_id!r}: {reason}") from error


def _reason(error: BaseException | None, revision: str | None) -> str | None:
    """What went wrong and what to do about it, where that is known."""
    while error is not None and not isinstance(error, RuntimeError):
        if known := _known_reason(error, revision):
            return known
        error = error.__cause__  # diffusers wraps what the client raises
    return None


def _known_reason(error: BaseException, revision: str | None) -> str | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return (
            "its owner lets in readers one by one; ask for access on its page, and pass token=... "
            "of the account that has it (`hf auth login` saves one)"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r}; pass a branch, a tag or a commit that it has"
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such repository, or it is private and no token was passed that may read "
            "it; check the name, or pass token=... of an account that may (`hf auth login` saves "
            "one)"
        )
    if status == 401:
        return (
            "no token was passed, or the Hub does not know it; pass token=... of your account "
            "(`hf auth login` saves one)"
        )
    if status == 403:
        return (
            "the token has no right to that; pass token=... of an account that has, with write "
            "access to push (`hf auth login` saves one)"
        )
    if isinstance(error, LocalTokenNotFoundError):
        return "token=True, but no token is saved; run `hf auth login`, or pass token=..."
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return (
            "it is not in the cache, and the Hub could not be asked; connect to the network, "
            "without HF_HUB_OFFLINE and local_files_only, or pass a folder"
        )
    if isinstance(error, HFValidationError):
        return "that is no name of a repository; names are owner/name"
    return None
