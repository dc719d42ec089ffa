"""What leaves for the Hugging Face Hub and what comes back. Every failure is one sentence without a token in it."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from .errors import CareHubError

FILES = ["config.json", "model.safetensors", "projection.safetensors", "linear_head.*.safetensors", "evaluation.json"]
NESTED = ["*/*", "*\\*"]  # an export has no sub-folders; whatever a repository hides in some is not fetched
README_BYTES = 1 << 20
RETRY_SECONDS = (1, 3)
Result = TypeVar("Result")


def client(token: str | None = None):
    """A Hub client that reads HF_ENDPOINT now, not when huggingface_hub was imported."""
    from huggingface_hub import HfApi

    from . import __version__

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token, library_name="care_hub", library_version=__version__)


def fetch(
    repo_id: str, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None, local_files_only: bool = False
) -> Path:
    """The cached folder with the export in repository `repo_id`; only an export's own files are fetched.

    Raises CareHubError if there is no such repository or revision, if it holds no safetensors export, and if the Hub can't
    be reached and the cache does not have it all.
    """
    hub = client(token)
    options = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    folder = Path(
        _ask(lambda: hub.snapshot_download(repo_id, allow_patterns=FILES, ignore_patterns=NESTED, **options), repo_id, token, revision)
    )
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise CareHubError(
            f"'{repo_id}' holds no care_hub encoder: config.json and model.safetensors are needed. (Pickled weights are never read.)"
        )
    return folder


def push(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> str:
    """Upload an export folder (checked first) with its card; returns the address of the commit or pull request.

    What a person wrote into the repository's README outside of the card's markers stays. Unchanged files are not sent
    again, so a push that broke off is finished by pushing once more. Raises CareHubError.
    """
    from . import card
    from .encoder import Encoder
    from .export import export_folder

    folder = export_folder(folder)
    Encoder.from_folder(folder)  # what can't be loaded is not published
    check_name(repo_id)
    hub = client(token)
    ask = lambda call: _ask(call, repo_id, token, revision)  # noqa: E731
    ask(lambda: hub.create_repo(repo_id, private=private, exist_ok=True))
    if revision and not create_pr:
        ask(lambda: hub.create_branch(repo_id, branch=revision, exist_ok=True))
    card.write(folder, repo_id, before=ask(lambda: _readme(hub, repo_id, None if create_pr else revision)))
    message = commit_message or "Upload a CARE encoder with care_hub"
    sent = ask(
        lambda: hub.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, revision=revision, create_pr=create_pr,
            allow_patterns=[*FILES, "README.md", "*.png"], ignore_patterns=NESTED,
        )
    )  # fmt: skip
    return sent.pr_url or sent.commit_url


def check_push(repo_id: str, token: str | None = None) -> None:
    """Raise CareHubError, before hours of training, if this token could not push to `repo_id`."""
    check_name(repo_id)
    hub = client(token)
    me = _ask(lambda: hub.whoami(), repo_id, token)
    spaces = [me.get("name"), *(organisation.get("name") for organisation in me.get("orgs", []))]
    if repo_id.split("/")[0] not in spaces:
        raise CareHubError(f"your Hub token can't write to '{repo_id}'; its names are {', '.join(filter(None, spaces))}.")
    if (((me.get("auth") or {}).get("accessToken") or {}).get("role")) == "read":
        raise CareHubError("your Hub token may only read; make one that may write, at huggingface.co/settings/tokens.")


def check_name(repo_id: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        if repo_id.count("/") != 1:
            raise HFValidationError("it must look like org/name")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise CareHubError(f"'{repo_id}' is not a name for a Hub repository: {' '.join(str(error).split())}") from error


def search(author: str | None = None) -> list[str]:
    """Ids of the repositories on the Hub that carry this library's tag."""
    hub = client()
    return _ask(lambda: [m.id for m in hub.list_models(filter="care_hub", author=author)], "the list of models", None)


def _readme(hub, repo_id: str, revision: str | None) -> str | None:
    info = hub.model_info(repo_id, revision=revision, files_metadata=True)
    size = next((s.size or 0 for s in info.siblings or [] if s.rfilename == "README.md"), None)
    if size is None:
        return None
    if size > README_BYTES:
        raise CareHubError(f"the README of '{repo_id}' has {size / 2**20:.0f} MB, too large for a model card; shorten it first.")
    return Path(hub.hf_hub_download(repo_id, "README.md", revision=info.sha)).read_text(encoding="utf-8", errors="replace")


def _ask(call: Callable[[], Result], repo_id: str, token: str | None, revision: str | None = None) -> Result:
    """`call()`, again after a pause where the Hub or the line failed; other failures become one sentence."""
    for pause in (*RETRY_SECONDS, None):
        try:
            return call()
        except CareHubError:
            raise
        except Exception as error:  # the client's own kinds differ between its versions
            if pause is None or not _transient(error):
                raise CareHubError(_hide(_sentence(error, repo_id, revision), token)) from None
            time.sleep(pause)
    raise AssertionError


def _transient(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code == 429 or response.status_code >= 500
    line = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
    if line or isinstance(error, ConnectionError | TimeoutError):
        return True
    return error.__cause__ is not None and _transient(error.__cause__)


def _sentence(error: BaseException, repo_id: str, revision: str | None) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, errors.RevisionNotFoundError):
        return f"'{repo_id}' has no revision '{revision}'."
    if isinstance(error, errors.LocalTokenNotFoundError) or (status == 401 and not isinstance(error, errors.RepositoryNotFoundError)):
        return "the Hub does not know you: log in with `hf auth login`, or set HF_TOKEN to a valid token."
    if isinstance(error, errors.GatedRepoError):
        return f"'{repo_id}' is gated; ask for access on its page, and log in with `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no repository '{repo_id}' on the Hub that you may see; a private one needs a token (`hf auth login` or HF_TOKEN)."
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"'{repo_id}' is not whole in the cache and the Hub can't be reached (or offline mode is on)."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"the Hub is needed for '{repo_id}' and offline mode is on (HF_HUB_OFFLINE)."
    if isinstance(error, errors.HFValidationError):
        return f"'{repo_id}' is not a name for a Hub repository: {reason}"
    if status == 403:
        return f"your Hub token may not write to '{repo_id}'."
    return f"the Hub failed for '{repo_id}'{f' with status {status}' if status else ''} ({reason}); try again later."


def _hide(text: str, token: str | None) -> str:
    from huggingface_hub import get_token

    for secret in filter(None, {token, get_token()}):
        text = text.replace(secret, "***")
    return text
