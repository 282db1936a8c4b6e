"""What every HTTP client here does: no login but its own, no proxy to this machine, no answer without end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from lib.addresses import is_this_machine

if TYPE_CHECKING:
    import requests

PIECE_BYTES = (
    64 << 10
)  # of what comes over the network; a piece that is inflated is at most 1,000 times larger


class Unbounded(Exception):
    """The answer is larger than any that was asked for, or takes longer than any may."""


def new_session(url: str, login: tuple[str, str] | None = None) -> requests.Session:
    """A session for this server, with no login but `login` and with no proxy if it is this machine."""
    import requests

    session = requests.Session()
    session.auth = login or _no_auth
    session.trust_env = not is_this_machine(url)
    return session


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """A callable keeps ~/.netrc out, whose password requests would send along, or in the place of a token."""
    return request


def joined(pieces: Iterable[bytes], limit: int, seconds: float) -> bytes:
    """The pieces as one. Raises Unbounded if they are more than `limit` bytes, or take more than `seconds`."""
    body, deadline = bytearray(), time.monotonic() + seconds
    for piece in pieces:
        body += piece
        if len(body) > limit:
            raise Unbounded(f"the answer is larger than {limit >> 20} MiB")
        if time.monotonic() > deadline:
            raise Unbounded(f"the answer was not whole after {seconds:.0f} s")
    return bytes(body)


def read_whole(response: requests.Response, limit: int, seconds: float) -> None:
    """Read the body of a streamed answer, so that its `content` is there. Raises Unbounded, requests' errors."""
    from requests import exceptions
    from urllib3.exceptions import DecodeError, HTTPError

    try:
        body = joined(_received(response), limit, seconds)
    except DecodeError as error:
        raise exceptions.ContentDecodingError(error) from error
    except HTTPError as error:
        broken = exceptions.ConnectionError if "timed out" in str(error) else exceptions.ChunkedEncodingError
        raise broken(error) from error
    except Unbounded:
        response.close()
        raise
    # What requests itself does when it has read a body.
    vars(response).update(_content=body, _content_consumed=True)


def _received(response: requests.Response) -> Iterator[bytes]:
    """The body, inflated, as it comes: `iter_content` waits until a piece is full, however slowly it comes."""
    while piece := response.raw.read1(PIECE_BYTES, decode_content=True):
        yield piece
