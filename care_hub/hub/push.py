"""An export folder to a repository on the Hub. That it loads is checked by `factory.push_export`."""

from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

from ..errors import CareHubError
from ..files import own_file
from .card import README_BYTES, card_text
from .client import FILES, ask, check_name, make_client
from .export import export_folder, module_files


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> str:
    """Upload an export folder with a card for `repo_id`; returns the address of commit or pull request.

    The folder stays as it is; what SentenceTransformer reads is made from it, not taken. What users
    wrote into the repository's README or into the folder's, outside of the card's markers, is in
    the new one. Unchanged files are not sent again, so a push that broke off is finished by pushing
    once more. `private` is for a new repository; `revision`
    is a branch, created if need be. Raises CareHubError.
    """
    folder = export_folder(folder)
    check_name(repo_id)
    client = make_client(token)
    ask(lambda: client.create_repo(repo_id, private=private, exist_ok=True), repo_id, token)
    if revision and not create_pr:
        ask(lambda: client.create_branch(repo_id, branch=revision, exist_ok=True), repo_id, token, revision)
    branch = None if create_pr else revision
    before = ask(lambda: _readme(client, repo_id, branch), repo_id, token, branch)
    card, modules = card_text(folder, repo_id, before), module_files(folder)

    def commit() -> CommitInfo:
        # Made anew for each attempt, since the client marks what it has sent.
        files = [CommitOperationAdd("README.md", card.encode())]
        for path in sorted(folder.iterdir()):
            if any(fnmatch(path.name, pattern) for pattern in [*FILES, "*.png"]) and own_file(path):
                files.append(CommitOperationAdd(path.name, path))
        files += [CommitOperationAdd(name, content) for name, content in modules.items()]
        message = commit_message or "Upload a CARE encoder with care_hub"
        return client.create_commit(
            repo_id, files, commit_message=message, revision=revision, create_pr=create_pr
        )

    sent = ask(commit, repo_id, token, revision)
    return sent.pr_url or sent.commit_url


def _readme(client: HfApi, repo_id: str, revision: str | None) -> str | None:
    """The text of the repository's README.md; None where there is none."""
    info = client.model_info(repo_id, revision=revision, files_metadata=True)
    size = next((file.size or 0 for file in info.siblings or [] if file.rfilename == "README.md"), None)
    if size is None:
        return None
    if size > README_BYTES:
        raise CareHubError(f"the README of '{repo_id}' has {size >> 20} MB, too much for a card; shorten it.")
    path = client.hf_hub_download(repo_id, "README.md", revision=info.sha)
    return Path(path).read_text(encoding="utf-8", errors="replace")
