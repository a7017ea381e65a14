"""What the Hub's client raises, as one line that says what to do; never an address, as some carry signatures."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from conversion.errors import ConversionError
from conversion.hub.upload_files import TOKEN


BY_STATUS = {
    400: "the Hub refuses the request",
    401: "the Hub does not accept the token, or there is none; log in (`hf auth login`)",
    403: "the token may not do this; log in with one that may write there, or open a pull request (--create-pr)",
    404: "not found on the Hub, or not yours to see; check the name, or log in (`hf auth login`)",
    409: "the Hub is busy with another operation on it; run again in a moment",
    412: "it has changed since this upload began; look at what was changed, then run again",
    413: "the Hub finds a file too large; convert again with a smaller --max-shard-size",
    429: "too many requests",
}
RAISED = (HTTPError, OSError, RuntimeError, ValueError)


@contextmanager
def hub_errors(repo_id: str, state: str) -> Iterator[None]:
    """Turns what the client raises into a ConversionError; `state` says how things stand if it does."""
    try:
        yield
    except ConversionError:
        raise
    except RAISED as error:
        raise ConversionError(f"{repo_id}: {hub_reason(error)}; {state}") from error


def hub_reason(error: BaseException) -> str:
    """Returns one line for an error of the client, from the answer or the broken connection among its causes."""
    chain = list(_chain(error))
    if isinstance(error, ValueError) and not isinstance(error, HFValidationError):  # the client's own words for it
        return _one_line(str(error))
    match next((cause for cause in chain if isinstance(cause, HTTPError)), error):
        case GatedRepoError():
            return "access is restricted; ask for it on its page, then run again"
        case RevisionNotFoundError():
            return "has no such revision; check the name of the branch"
        case RepositoryNotFoundError():
            return (
                "there is no such repository, or it is not yours to see; check the name, or log in (`hf auth login`)"
            )
        case HfHubHTTPError() as answer:
            return _http_reason(answer)
        case LocalTokenNotFoundError():
            return BY_STATUS[401]
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set; unset it to reach the Hub"
        case HFValidationError():
            return "not a possible repository name, expected OWNER/NAME"
        case HTTPError() | ConnectionError() | TimeoutError():
            return f"the connection to the Hub failed ({type(chain[-1]).__name__}); check the network and run again"
        case _:
            return _one_line(str(error)) or type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _http_reason(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = _one_line(error.server_message or "")
    if status >= 500:
        reason = "the Hub failed; run again in a moment"
    else:
        reason = BY_STATUS.get(status, "the Hub refuses the request")
    if status == 429:
        seconds = error.response.headers.get("Retry-After")
        reason += f"; wait {seconds} seconds and run again" if seconds else "; wait some minutes and run again"
    return f"{reason} (HTTP {status}{': ' + said if said else ''})"


def _one_line(text: str) -> str:
    """Returns a text without line breaks, tokens and addresses."""
    words = [word for word in text.split() if "://" not in word]
    return TOKEN.sub("<token>", " ".join(words))[:300]
