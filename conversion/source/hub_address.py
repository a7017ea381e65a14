"""What a user may write for a repository of the Hub: its id, an id with a revision, or an address out of a browser."""

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

from conversion.errors import ConversionError


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
OTHER_KINDS = {"datasets": "a data set", "spaces": "a Space", "collections": "a collection", "papers": "a paper"}
OF_A_FILE = ("blob", "resolve", "raw")


@dataclass(frozen=True)
class HubAddress:
    """A repository of models, and the branch, tag or commit named with it; None where none is."""

    hub_id: str
    revision: str | None = None


def parse_address(text: str) -> HubAddress | None:
    """Returns what `text` names on the Hub, None where it can only be a path.

    Understood are `OWNER/NAME`, `OWNER/NAME@REVISION`, `hf://OWNER/NAME@REVISION`, and addresses of a repository, of
    a revision of it (`.../tree/REVISION`, `.../commit/REVISION`) and of a file at its top (`.../blob/REVISION/FILE`).

    Raises:
        ConversionError: An address of something else than a model's repository.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        if text.split("/", 1)[0].lower() in HUB_HOSTS:
            return _parse_url(text, f"https://{text}")
        return None if text.startswith(".") else _parse_id(text)
    if scheme.lower() == "hf":
        found = _parse_id(rest.removeprefix("models/"))
        if found is None:
            raise ConversionError(f"{text}: expected hf://OWNER/NAME, a whole repository of a model")
        return found
    return _parse_url(text, text)


def _parse_id(text: str) -> HubAddress | None:
    hub_id, at, revision = text.partition("@")
    if not HUB_ID.fullmatch(hub_id):
        return None
    if at and not revision:
        raise ConversionError(f"{text}: no revision after the @; write a branch, tag or commit there, or leave it out")
    return HubAddress(hub_id, revision or None)


def _parse_url(text: str, url: str) -> HubAddress:
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").lower()
        port = parts.port
    except ValueError as error:
        raise ConversionError(f"{text}: no address of the Hub ({error}); give OWNER/NAME") from error
    endpoint = urlsplit(constants.ENDPOINT)  # of a mirror, where HF_ENDPOINT names one
    known = host in HUB_HOSTS or (host, port) == ((endpoint.hostname or "").lower(), endpoint.port)
    if parts.scheme not in ("http", "https") or not known:
        raise ConversionError(
            f"{text}: an address outside of the Hub, expected a folder, OWNER/NAME or "
            "https://huggingface.co/OWNER/NAME; download it and give the folder"
        )
    path = [unquote(part) for part in parts.path.split("/") if part]
    if path and path[0] in OTHER_KINDS:
        raise ConversionError(f"{text}: {OTHER_KINDS[path[0]]}, expected a model: https://huggingface.co/OWNER/NAME")
    hub_id = "/".join(path[:2]).removesuffix(".git")
    if not HUB_ID.fullmatch(hub_id):
        raise ConversionError(f"{text}: names no repository, expected https://huggingface.co/OWNER/NAME")
    page, rest = (path[2], path[3:]) if len(path) > 2 else ("", [])
    if not page:
        return HubAddress(hub_id)
    if page not in ("tree", "commit", "commits", *OF_A_FILE) or not rest:
        raise ConversionError(
            f"{text}: a page of {hub_id}, expected https://huggingface.co/{hub_id}, or .../tree/REVISION of it"
        )
    length = 3 if rest[:2] == ["refs", "pr"] else 1  # the one kind of revision that may stand unquoted
    revision = "/".join(rest[:length])
    inside = rest[length:]
    if len(inside) > (page in OF_A_FILE):
        raise ConversionError(
            f"{text}: a folder inside {hub_id}, and only whole repositories are read; download that folder and give "
            "its path"
        )
    return HubAddress(hub_id, revision)
