"""Pictures of a request that stand in it, or lie at an address: fetched from hosts that the server's owner names, from
no other, and without following where those send on to.
"""

import urllib.error
import urllib.request
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from nybble.data.picture_files import INLINE
from nybble.serving.requests import RequestError

TIMEOUT_S = 10
MOST_SHOWN = 100  # characters of an address


class _Stays(urllib.request.HTTPRedirectHandler):
    """An answer that sends on to another address is an error."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


@dataclass(frozen=True)
class Pictures:
    """What pictures a request may have.

    Args:
        hosts: that they are fetched from, "name" or "name:port".
        most_bytes: of a file.
    """

    hosts: Collection[str] = ()
    most_bytes: int = 0

    def stored(self, url: str) -> bytes | str:
        """The file of a picture, or the data URL that it is itself.

        Raises:
            RequestError: it lies elsewhere, cannot be fetched or is too large.
        """
        if INLINE.match(url):
            return url
        shown, parts = url[:MOST_SHOWN], urlsplit(url)
        host = parts.netloc.rpartition("@")[2].lower()
        if parts.scheme not in ("http", "https") or host not in self.hosts:
            named = f"Allowed hosts: {', '.join(sorted(self.hosts))}." if self.hosts else "No host is allowed."
            raise RequestError(
                f"image_url is {shown}: send the picture as data:image/png;base64,... {named} "
                "(`nybble serve --image-hosts` names some; files are never read.)"
            )
        try:
            with urllib.request.build_opener(_Stays).open(url, timeout=TIMEOUT_S) as answer:
                file: bytes = answer.read(self.most_bytes + 1)
        except (OSError, ValueError) as error:  # URLError, HTTPError and timeouts among them
            raise RequestError(f"image_url is {shown}, which cannot be fetched: {error}.") from None
        if len(file) > self.most_bytes:
            raise RequestError(f"image_url is {shown}, which has more than {self.most_bytes} bytes.", 413)
        return file
