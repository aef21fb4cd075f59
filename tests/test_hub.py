"""Pushing folders: one commit or none, taken up where it was broken off, and errors that help."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.utils import _http

from mctd_diffusers.errors import ConfigError
from mctd_diffusers.hub import loading, push_folder
from tests.pipelines.hub import HubServer, Repository

REPO = "somebody/folder"
TOKEN = "write-token"

# The client uploads LFS objects by an argument that its own HTTP library calls outdated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A card, a config and weights of 3,000 bytes in a folder of their own."""
    folder = tmp_path / "folder"
    (folder / "part").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlibrary_name: diffusers\n---\n\n# Folder\n")
    (folder / "config.json").write_text('{"_class_name": "Folder"}')
    write_weights(folder, 0)
    return folder


def write_weights(folder: Path, shift: int) -> None:
    body = bytes((index + shift) % 251 for index in range(3000))
    (folder / "part" / "weights.safetensors").write_bytes(body)


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that tries again at once where it would wait for seconds."""
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))


# Pushing


@pytest.mark.parametrize("part_size", [None, 1000, 1024])
def test_a_pushed_folder_comes_back_byte_for_byte(
    hub: HubServer, folder: Path, part_size: int | None
) -> None:
    hub.part_size = part_size
    commit = push_folder(folder, REPO, token=TOKEN, commit_message="First")
    assert hub.repositories[REPO].references["main"] == commit.oid
    assert hub.repositories[REPO].files == files_in(folder)
    uploads = [request for request in hub.requests if request.startswith("PUT")]
    assert len(uploads) == (1 if part_size is None else 3)
    loaded = Path(snapshot_download(REPO, ignore_patterns=".gitattributes"))
    assert files_in(loaded) == files_in(folder)


def test_a_folder_is_pushed_in_the_commit_alone_where_nothing_is_kept_apart(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With xet, as by default, the client goes another way; for such files it needs no xet server.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.keeps_lfs = False
    commit = push_folder(folder, REPO, token=TOKEN)
    assert hub.repositories[REPO].references["main"] == commit.oid
    assert hub.repositories[REPO].files == files_in(folder)


def test_what_has_not_changed_is_not_sent_again(hub: HubServer, folder: Path) -> None:
    first = push_folder(folder, REPO, token=TOKEN)
    assert push_folder(folder, REPO, token=TOKEN).oid == first.oid
    (folder / "config.json").write_text('{"_class_name": "Other"}')
    hub.requests.clear()
    second = push_folder(folder, REPO, token=TOKEN)
    assert second.oid != first.oid
    assert not any(request.startswith("PUT") for request in hub.requests)
    assert hub.repositories[REPO].files == files_in(folder)
    old = Path(snapshot_download(REPO, revision=first.oid))
    assert json.loads((old / "config.json").read_text()) == {"_class_name": "Folder"}


def test_hidden_files_stay_at_home(hub: HubServer, folder: Path) -> None:
    expected = files_in(folder)
    (folder / ".notes").write_text("mine")
    (folder / "part" / ".half-written.safetensors").write_bytes(b"half")
    push_folder(folder, REPO, token=TOKEN)
    assert hub.repositories[REPO].files == expected


def test_a_name_alone_is_in_the_account_of_the_token(hub: HubServer, folder: Path) -> None:
    push_folder(folder, "folder", token=TOKEN, private=True, path_in_repo="sub")
    assert hub.repositories[REPO].private
    assert "sub/config.json" in hub.repositories[REPO].files


def test_a_card_is_written_where_there_is_none(hub: HubServer, folder: Path) -> None:
    def card(repo_id: str) -> str:
        return f"# Of {repo_id}\n"

    push_folder(folder, REPO, token=TOKEN, card=card)
    assert b"# Folder" in hub.repositories[REPO].files["README.md"]
    (folder / "README.md").unlink()
    push_folder(folder, REPO, token=TOKEN, card=card)
    assert b"# Folder" in hub.repositories[REPO].files["README.md"]
    push_folder(folder, "new", token=TOKEN, card=card)
    assert hub.repositories["somebody/new"].files["README.md"] == b"# Of somebody/new\n"


# Broken connections


def requests_of_a_push(hub: HubServer, folder: Path) -> int:
    """How many requests the second push of a folder makes; it is left undone."""
    held = hub.repositories[REPO]
    before, objects = dict(held.references), dict(hub.objects)
    hub.requests.clear()
    push_folder(folder, REPO, token=TOKEN)
    held.references, hub.objects = before, objects
    return len(hub.requests)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("cut", ["during", "after"])
def test_a_push_broken_off_at_any_request_leaves_the_old_commit_or_the_new_and_is_taken_up(
    hub: HubServer, folder: Path, cut: str
) -> None:
    hub.part_size = 1000
    first = push_folder(folder, REPO, token=TOKEN)
    old = files_in(folder)
    write_weights(folder, 1)
    (folder / "config.json").write_text('{"_class_name": "Other"}')
    number_of_requests = requests_of_a_push(hub, folder)
    assert number_of_requests >= 10
    held = hub.repositories[REPO]
    for broken_from in range(number_of_requests):
        held.references["main"] = first.oid
        hub.objects.clear()
        hub.requests.clear()
        hub.cut = lambda number, start=broken_from: cut if number >= start else None
        with pytest.raises(ConfigError, match=r"push to 'somebody/folder'.*try again"):
            push_folder(folder, REPO, token=TOKEN)
        is_last = cut == "after" and broken_from == number_of_requests - 1
        assert held.files == (files_in(folder) if is_last else old)
        hub.cut = lambda number: None
        push_folder(folder, REPO, token=TOKEN)
        assert held.files == files_in(folder)


@pytest.mark.usefixtures("impatient")
def test_an_upload_that_breaks_once_is_tried_again_by_the_client(
    hub: HubServer, folder: Path
) -> None:
    push_folder(folder, REPO, token=TOKEN)
    write_weights(folder, 1)
    requests_of_a_push(hub, folder)
    upload = next(n for n, request in enumerate(hub.requests) if request.startswith("PUT"))
    hub.requests.clear()
    hub.cut = lambda number: "during" if number == upload else None
    push_folder(folder, REPO, token=TOKEN)
    assert hub.repositories[REPO].files == files_in(folder)
    assert sum(request.startswith("PUT") for request in hub.requests) == 2


# Refusals


def test_who_may_not_write_is_told_what_helps(hub: HubServer, folder: Path) -> None:
    hub.repositories["another/folder"] = Repository(private=False)
    for token in (None, "misspelt-token"):
        with pytest.raises(ConfigError, match=r"'somebody/folder'.*token=.*hf auth login"):
            push_folder(folder, REPO, token=token)
    for token, repo in [("read-token", REPO), (TOKEN, "another/folder")]:
        with pytest.raises(ConfigError, match=rf"'{repo}'.*no right.*write access"):
            push_folder(folder, repo, token=token)
    with pytest.raises(ConfigError, match=r"token=True.*hf auth login"):
        push_folder(folder, REPO, token=True)
    assert set(hub.repositories) == {"another/folder"}


def test_what_cannot_be_pushed_is_refused_before_any_request(hub: HubServer, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no folder .*missing.*'somebody/folder'"):
        push_folder(folder / "missing", REPO, token=TOKEN)
    with pytest.raises(ConfigError, match=r"'a name'.*owner/name"):
        push_folder(folder, "a name", token=TOKEN)
    assert not hub.requests


def test_no_network_is_said(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"'somebody/folder'.*HF_HUB_OFFLINE"):
        push_folder(folder, REPO, token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.stop()
    with pytest.raises(ConfigError, match=r"'somebody/folder'.*try again"):
        push_folder(folder, REPO, token=TOKEN)


# Loading


def load(source: str | Path, class_name: str = "Folder", **arguments: object) -> None:
    with loading(class_name, source, arguments):
        pass


def test_what_holds_no_such_model_is_refused(hub: HubServer, folder: Path) -> None:
    push_folder(folder, REPO, token=TOKEN)
    load(folder)
    load(REPO)
    with pytest.raises(ConfigError, match=r"the Other of 'somebody/folder'.*holds a Folder"):
        load(REPO, "Other")
    with pytest.raises(ConfigError, match=r"'somebody/folder'.*holds no config\.json"):
        load(REPO, subfolder="part")
    with pytest.raises(ConfigError, match=r"part'.*holds no config\.json"):
        load(folder / "part")
    with pytest.raises(ConfigError, match=r"missing'.*no such folder"):
        load(folder / "missing")


@pytest.mark.usefixtures("impatient")
def test_what_cannot_be_read_is_refused_with_what_helps(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    push_folder(folder, REPO, token=TOKEN)
    load(REPO)
    with pytest.raises(ConfigError, match=r"'somebody/folder'.*no revision 'v2'"):
        load(REPO, revision="v2")
    HfApi(token=TOKEN).create_tag(REPO, tag="v2")
    load(REPO, revision="v2")
    with pytest.raises(ConfigError, match=r"'somebody/none'.*no such repository.*hf auth login"):
        load("somebody/none")
    hub.repositories[REPO].gated = True
    with pytest.raises(ConfigError, match=r"'somebody/folder'.*ask for access"):
        load(REPO, cache_dir=tmp_path / "other")
    hub.repositories[REPO].gated, hub.repositories[REPO].private = False, True
    with pytest.raises(ConfigError, match=r"'somebody/folder'.*private.*token="):
        load(REPO, cache_dir=tmp_path / "other")
    with pytest.raises(ConfigError, match=r"'somebody/folder'.*token="):
        load(REPO, cache_dir=tmp_path / "other", token="misspelt-token")
    load(REPO, cache_dir=tmp_path / "other", token="read-token")
    hub.stop()
    load(REPO)
    with pytest.raises(ConfigError, match=r"'somebody/folder'.*not in the cache.*connect"):
        load(REPO, cache_dir=tmp_path / "third")
    with pytest.raises(ConfigError, match=r"'somebody/folder'.*not in the cache.*connect"):
        load(REPO, cache_dir=tmp_path / "third", local_files_only=True)
