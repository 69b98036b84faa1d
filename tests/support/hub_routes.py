"""Which function answers which request to a stand-in of the Hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from email.message import Message
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from . import hub_reading as reading
from . import hub_writing as writing
from .hub_request import Answer, Refused, Request, Shelf, as_json


class Route(NamedTuple):
    name: str
    methods: str
    pattern: str
    answer: Callable[[Request], Answer]


_NAME = r"(?P<name>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_NAME}"
_PAGE = rf"/(?P<kind>datasets/)?{_NAME}"
_AT = r"/(?P<revision>[^/]+)"
_STORED = rf"/storage/(?P<kind>model|dataset)s/{_NAME}/(?P<oid>[0-9a-f]{{64}})"
ROUTES = (
    Route("create", "POST", "/api/repos/create", writing.create),
    Route("validate-yaml", "POST", "/api/validate-yaml", writing.validate_yaml),
    Route("whoami", "GET", "/api/whoami-v2", reading.whoami),
    Route("auth-check", "GET", f"{_API}/auth-check(?P<write>/write)?", reading.check_access),
    Route("preupload", "POST", f"{_API}/preupload{_AT}", writing.preupload),
    Route("batch", "POST", rf"{_PAGE}\.git/info/lfs/objects/batch", writing.batch),
    Route("lfs", "GET HEAD", _STORED, reading.stored_object),
    Route("lfs", "PUT", _STORED, writing.store_object),
    Route("commit", "POST", f"{_API}/commit{_AT}", writing.commit),
    Route("info", "GET", f"{_API}(?:/revision{_AT})?", reading.info),
    Route("tree", "GET", f"{_API}/tree{_AT}(?:/(?P<path>.+))?", reading.tree),
    Route("paths-info", "POST", f"{_API}/paths-info{_AT}", reading.paths_info),
    Route("refs", "GET", f"{_API}/refs", reading.refs),
    Route("branch", "POST", f"{_API}/branch{_AT}", writing.branch),
    Route("tag", "POST", f"{_API}/tag{_AT}", writing.tag),
    Route("resolve", "GET HEAD", rf"{_PAGE}/resolve{_AT}/(?P<path>.+)", reading.resolve),
)


class Call(NamedTuple):
    """What a request's line asks for; `route` is None for what this Hub does not have."""

    route: Route | None
    parts: Mapping[str, str]
    query: Mapping[str, str]

    def answer(self, shelf: Shelf, headers: Message, body: bytes) -> Answer:
        if self.route is None:
            return as_json({"error": "Sorry, we can't find the page you are looking for."}, 404)
        try:
            return self.route.answer(Request(shelf, self.parts, self.query, headers, body))
        except Refused as refused:
            return refused.answer
        except (KeyError, ValueError) as error:
            return as_json({"error": f"Malformed request: {error!r}"}, 400)


def called(method: str, target: str) -> Call:
    split = urlsplit(target)
    query = {name: values[-1] for name, values in parse_qs(split.query).items()}
    for route in ROUTES:
        match = re.fullmatch(route.pattern, split.path) if method in route.methods.split() else None
        if match:
            parts = {name: unquote(part) for name, part in match.groupdict().items() if part}
            return Call(route, parts, query)
    return Call(None, {}, query)
