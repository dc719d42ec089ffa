"""The Hugging Face Hub. Every failure is a CareHubError: one sentence, without a token in it."""

import fnmatch
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, errors, get_token
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # not in __all__
    get_session,
    validate_repo_id,
)

from .. import __version__
from ..errors import CareHubError

FILES = [
    "config.json",
    "model.safetensors",
    "projection.safetensors",
    "contrastive_head.safetensors",
    "linear_head.*.safetensors",
    "rotations.safetensors",
    "evaluation.json",
]
NESTED = ["*/*", "*\\*"]  # what only SentenceTransformer reads, or a stranger has put there, is not fetched
RETRY_SECONDS = (1, 3)  # between attempts at what changes a repository
CONNECT_SECONDS = 5  # a Hub that can't be connected to by then can't be reached
ANSWER_SECONDS = 20  # one that has not answered by then hangs
SLOWEST = 1000  # bytes a second of an answer that takes longer
LOG_IN = "the Hub does not know you: log in with `hf auth login`, or set HF_TOKEN to a valid token."
HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "requests", "urllib3")


class Unreachable(errors.OfflineModeIsEnabled):
    """No connection. As where it is told to stay offline, the client makes do with its cache."""


SENTENCES = {
    Unreachable: "the Hub can't be reached for '{repo_id}' ({reason}); check the network or try again later.",
    errors.RevisionNotFoundError: "'{repo_id}' has no revision '{revision}'.",
    errors.LocalTokenNotFoundError: LOG_IN,
    errors.GatedRepoError: "'{repo_id}' is gated; ask for access on its page and `hf auth login`.",
    errors.RepositoryNotFoundError: "there is no repository '{repo_id}' on the Hub that you may see; "
    "a private one needs a token (`hf auth login` or HF_TOKEN).",
    errors.LocalEntryNotFoundError: "'{repo_id}' is not whole in the cache and the Hub can't be reached "
    "(or offline mode is on).",
    errors.OfflineModeIsEnabled: "the Hub is needed for '{repo_id}' and HF_HUB_OFFLINE is set.",
    errors.HFValidationError: "'{repo_id}' is not a name for a Hub repository: {reason}",
}
Result = TypeVar("Result")


def make_client(token: str | None = None) -> HfApi:
    """A Hub client that reads HF_ENDPOINT now, not when huggingface_hub was imported."""
    return HfApi(os.environ.get("HF_ENDPOINT"), token, library_name="care_hub", library_version=__version__)


def fetch(
    repo_id: str,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The cached folder with the export in repository `repo_id`; only its own files are fetched.

    Raises CareHubError if there is no such repository or revision, if it contains no safetensors
    export, and if the Hub can't be reached and the cache does not have it all.
    """
    download = partial(
        make_client(token).snapshot_download,
        repo_id,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        allow_patterns=[*FILES, "README.md"],
        ignore_patterns=NESTED,
    )
    folder = Path(ask(download, repo_id, token, revision, once=True))
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise CareHubError(
            f"'{repo_id}' contains no care_hub encoder: config.json and model.safetensors are needed. "
            "(Pickled weights are never read.)"
        )
    return folder


def check_push(repo_id: str, token: str | None = None) -> None:
    """Raise CareHubError, before hours of training, if this token could not push to `repo_id`."""
    check_name(repo_id)
    client = make_client(token)
    if ask(lambda: _may_write(client, repo_id), repo_id, token, once=True):
        return
    me = ask(client.whoami, repo_id, token, once=True)
    names = [me.get("name"), *(organization.get("name") for organization in me.get("orgs", []))]
    if repo_id.split("/")[0] not in names:
        known = ", ".join(filter(None, names))
        raise CareHubError(f"your Hub token can't write to '{repo_id}'; its names are {known}.")
    if ((me.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise CareHubError("your Hub token may only read; make one that may write, at hf.co/settings/tokens.")


def _may_write(client: HfApi, repo_id: str) -> bool:
    """Whether the Hub says so; it says nothing of a repository that isn't there yet, nor to old clients.

    Raises the client's error where it refuses.
    """
    if "write" not in signature(client.auth_check).parameters:
        return False
    try:
        client.auth_check(repo_id, write=True)
    except errors.HfHubHTTPError as error:
        if error.response.status_code not in (401, 404):
            raise
        return False
    return True


def check_name(repo_id: str) -> None:
    """Raise CareHubError if `repo_id` can't be the name of a repository."""
    try:
        if str(repo_id).count("/") != 1:
            raise errors.HFValidationError("it must look like org/name")
        validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        raise CareHubError(_sentence(error, repo_id)) from error


def find_repositories(author: str | None = None, wildcard: str = "") -> list[str]:
    """Ids, like `wildcard`, of the repositories on the Hub (of `author`) that carry this library's tag."""
    find = partial(make_client().list_models, filter="care_hub", author=author)
    found = ask(lambda: [model.id for model in find()], "the list of models", None, once=True)
    return fnmatch.filter(found, wildcard or "*")


def ask(
    call: Callable[[], Result],
    repo_id: str,
    token: str | None,
    revision: str | None = None,
    once: bool = False,
) -> Result:
    """`call()`, again after a pause where the Hub or the connection failed.

    `once`: for what only reads. It has the client's own retries, and none where the Hub can't be
    reached. Raises CareHubError for whatever the client raises, and where no answer comes in
    ANSWER_SECONDS. Its message names `repo_id` and `revision`, and never contains `token`.
    """
    pauses, began = iter(() if once else RETRY_SECONDS), time.monotonic()
    while True:
        try:
            with _bounded_waits(once):
                return call()
        except CareHubError:
            raise
        except Exception as error:  # the client's own kinds differ between its versions
            # The client itself has tried for long, as it does where nothing listens.
            enough = time.monotonic() - began > ANSWER_SECONDS or not _is_transient(error)
            pause = None if enough else next(pauses, None)
            if pause is None:
                raise CareHubError(_sentence(error, repo_id, revision, token)) from None
            time.sleep(pause)


@contextmanager
def _bounded_waits(once: bool) -> Iterator[None]:
    """For `with`: no wait for an answer is longer than ANSWER_SECONDS.

    Left alone, the client waits for some answers forever, asks again for minutes (which uploads
    may), and sleeps as long as an answer says. `once`: the first connection that fails ends it; the
    client would try again, with two lines on the screen each time.
    """
    hooks = getattr(get_session(), "event_hooks", None) or {"request": [], "response": []}
    unanswered: dict[int, float] = {}  # thread -> since when

    def before(request: Any) -> None:
        limits = dict.fromkeys(("connect", "read", "write", "pool")) | request.extensions.get("timeout", {})
        bounded = {kind: min(limit or ANSWER_SECONDS, ANSWER_SECONDS) for kind, limit in limits.items()}
        request.extensions["timeout"] = bounded | {"connect": min(bounded["connect"], CONNECT_SECONDS)}
        if once:
            request.extensions["trace"] = _no_second_connection
        waited = time.monotonic() - unanswered.setdefault(threading.get_ident(), time.monotonic())
        if waited > ANSWER_SECONDS and request.method != "PUT":
            raise TimeoutError(f"no answer in {waited:.0f} seconds")

    def after(response: Any) -> None:
        unanswered.pop(threading.get_ident(), None)
        for name in ("retry-after", "ratelimit"):
            response.headers.pop(name, None)
        response.stream = _in_time(response.stream)

    hooks["request"].append(before)
    hooks["response"].append(after)
    try:
        yield
    finally:
        hooks["request"].remove(before)
        hooks["response"].remove(after)


def _no_second_connection(event: str, info: dict[str, Any]) -> None:
    """Raise Unreachable for an `event` that is the end of an attempt to connect."""
    if event.endswith((".connect_tcp.failed", ".start_tls.failed")):
        error = info["exception"]
        raise Unreachable(str(error) or type(error).__name__) from error


def _in_time(stream: Any) -> Any:
    """The `stream` of an answer that raises TimeoutError where it stalls, or comes by drops.

    So the client, which takes up its own kinds of timeouts again and again, does not; but where so far
    it came fast enough, a stall is the client's to resume.
    """

    (kind,) = (kind for kind in type(stream).__mro__ if kind.__name__ == "SyncByteStream")

    class InTime(kind):  # type: ignore[misc,valid-type]  # of httpx or httpx2
        def __iter__(self) -> Iterator[bytes]:
            began, size, parts, stalled = time.monotonic(), 0, iter(stream), None
            while True:
                try:
                    part = next(parts, None)
                except Exception as error:
                    if "Timeout" not in type(error).__name__:
                        raise
                    part, stalled = b"", error
                if part is None:
                    return
                seconds, size = time.monotonic() - began, size + len(part)
                if size < SLOWEST * seconds and (stalled or seconds > ANSWER_SECONDS):
                    raise TimeoutError(f"{size:,} bytes in {seconds:.0f} seconds") from stalled
                if stalled:
                    raise stalled
                yield part

        def close(self) -> None:
            stream.close()

    return InTime()


def _is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, errors.OfflineModeIsEnabled) or "Timeout" in type(error).__name__:
        return False
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code == 429 or response.status_code >= 500
    library = type(error).__module__.split(".")[0]
    if isinstance(error, ConnectionError) or library in HTTP_LIBRARIES:
        return True
    return error.__cause__ is not None and _is_transient(error.__cause__)


def _sentence(
    error: BaseException, repo_id: str, revision: str | None = None, token: str | None = None
) -> str:
    """What went wrong, and what to do."""
    reason = " ".join(_without_tokens(str(error), token).split())[:200] or type(error).__name__
    for kind, sentence in SENTENCES.items():
        if isinstance(error, kind):
            return sentence.format(repo_id=repo_id, revision=revision, reason=reason)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return LOG_IN
    if status == 403:
        return f"your Hub token may not write to '{repo_id}'."
    failure = f" with status {status}" if status else ""
    return f"the Hub failed for '{repo_id}'{failure} ({reason}); try again later."


def _without_tokens(text: str, token: str | None) -> str:
    for secret in filter(None, {token, get_token()}):
        text = text.replace(secret, "***")
    return text
