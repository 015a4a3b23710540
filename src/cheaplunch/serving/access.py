"""Who is let in: token, host and origin, the size of what is sent, and what the answers tell browsers."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cheaplunch.errors import UserError

UPLOADS = ("/api/open", "/session", "/datastore", "/infer", "/nninteractive")
"""Paths under which files may be sent."""
_JSON_BYTES = 4 * 2**20  # of a request elsewhere; thousands of prompts
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_READS = ("GET", "HEAD", "OPTIONS")
_LOGGING_IN = (("GET", "/auth/"), ("POST", "/auth/token"))  # where 3D Slicer asks for a token, and how it gets it

_CSP = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; worker-src 'self' blob:; "
    "connect-src 'self' blob: data:; script-src 'self' 'wasm-unsafe-eval'; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _CSP,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """Where the server listens and who may ask it."""

    host: str = "127.0.0.1"
    token: str | None = None
    origins: tuple[str, ...] = ()
    """Of pages elsewhere that may use it, such as https://viewer.example.org."""

    @property
    def hosts(self) -> frozenset[str] | None:
        """Names by which it may be called; None where any will do: there is a token, which no other page knows.

        A page that has its own name point at this machine (DNS rebinding) comes with that name.
        """
        if not is_loopback(self.host):
            return None
        return frozenset((*_LOOPBACK_NAMES, self.host, *(urlsplit(origin).hostname or "" for origin in self.origins)))

    @property
    def cookie(self) -> str:
        """Its name, another for each token: browsers share cookies among the ports of a host."""
        return f"cheaplunch-{hashlib.sha256((self.token or '').encode()).hexdigest()[:8]}"


def decide_access(host: str, token: str | None, origins: Sequence[str]) -> Access:
    """With a token made up where others can reach the server and none is given. UserError for what cannot be meant."""
    if token is not None and not re.fullmatch(r"[A-Za-z0-9._~-]{8,}", token):
        raise UserError("--token takes eight or more letters, digits and . _ ~ -; leave it out to have one made")
    for origin in origins:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}" or not parts.hostname:
            raise UserError(f"--allow-origin {origin} is no origin; give one such as https://viewer.example.org")
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(24)
    return Access(host, token, tuple(origins))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Around all routes: lets in who may come in, bounds what is sent, and keeps what goes wrong to itself.

    Nothing that is logged names a file, an id or a patient.
    """

    def __init__(self, app: ASGIApp, access: Access, upload_bytes: int):
        self._app = app
        self._access = access
        self._hosts = access.hosts
        self._upload_bytes = upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-cache" if scope["path"].startswith("/static/") else "no-store")
            await send(message)

        refused = self._refuse(scope)
        if refused is not None:
            await refused(scope, receive, answer)
            return
        try:
            await self._app(scope, self._bounded(scope, receive), answer)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            log.error("%s %s failed: %s in %s", scope["method"], _route(scope), type(error).__name__, where.name)
            log.debug("", exc_info=error)
            if not started:
                await refuse("something went wrong here; the server's own window says where", 500)(
                    scope, receive, answer
                )

    def _refuse(self, scope: Scope) -> Response | None:
        """What is answered to a request that is not let in."""
        headers, access = Headers(scope=scope), self._access
        if self._hosts is not None and _hostname(headers.get("host", "")) not in self._hosts:
            return refuse("this server is for this machine alone; call it by the address that it printed", 421)
        origin = headers.get("origin")
        if (
            scope["method"] not in _READS
            and origin is not None
            and origin not in access.origins
            and urlsplit(origin).netloc != headers.get("host")
        ):
            return refuse("pages of other servers may not do this; start the server with --allow-origin", 403)
        if access.token is not None and (scope["method"], scope["path"]) not in _LOGGING_IN:
            given = QueryParams(scope["query_string"]).get("token")
            if scope["path"] == "/" and given is not None and _same(given, access.token):
                welcome = RedirectResponse("/", 303)  # so that the address line does not keep it
                welcome.set_cookie(access.cookie, access.token, httponly=True, samesite="strict")
                return welcome
            if not _has_token(headers, access):
                refused = refuse("a token is needed; open the address that the server printed", 401)
                refused.headers["WWW-Authenticate"] = "Bearer"
                return refused
        if int(headers.get("content-length") or 0) > self._limit(scope):
            return _too_large(self._limit(scope))
        return None

    def _limit(self, scope: Scope) -> int:
        return self._upload_bytes if scope["path"].startswith(UPLOADS) else _JSON_BYTES

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` that stops where more comes than is taken, whatever was announced."""
        limit, taken = self._limit(scope), 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > limit:
                raise HTTPException(413, _too_much(limit))
            return message

        return bounded


def refuse(message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": " ".join(message.split())}, status)


def _too_large(limit: int) -> JSONResponse:
    return refuse(_too_much(limit), 413)


def _too_much(limit: int) -> str:
    return f"at most {limit / 2**20:.0f} MiB are taken at a time; send less, or start the server with --max-upload-mb"


def _has_token(headers: Headers, access: Access) -> bool:
    kind, _, bearer = headers.get("authorization", "").partition(" ")
    token = access.token or ""
    if kind.lower() == "bearer" and _same(bearer.strip(), token):
        return True
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(access.cookie)
    except CookieError:
        return False
    return cookie is not None and _same(cookie.value, token)


def _same(given: str, token: str) -> bool:
    """Takes as long wherever they differ."""
    return hmac.compare_digest(given.encode(), token.encode())


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _route(scope: Scope) -> str:
    """The pattern of a route, without the ids in its path."""
    return getattr(scope.get("route"), "path", "a page")
