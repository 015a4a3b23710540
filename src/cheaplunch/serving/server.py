"""From a socket to its end: what `cheaplunch serve` runs."""

from __future__ import annotations

import contextlib
import socket

import python_multipart  # noqa: F401  takes uploads apart; otherwise it is missed only at the first one
import uvicorn
from fastapi import FastAPI

from cheaplunch.errors import UserError
from cheaplunch.serving.access import Access
from cheaplunch.serving.app import STATIC


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on; port 0 is any that is free. UserError where it cannot be had."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port} is none; give one from 1 to 65535, or 0 for any that is free")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError, OverflowError) as error:
        raise UserError(f"--host {host}: no such address here ({error}); 127.0.0.1 is this machine alone") from None
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(place)
        taken.listen(256)
    except (OSError, OverflowError) as error:
        taken.close()
        raise UserError(f"--port {port} on {host} cannot be had ({error}); give another") from None
    return taken


def address(listening: socket.socket, access: Access) -> str:
    """Where a browser finds the server, with the token that it needs."""
    host, port = listening.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}/" + (f"?token={access.token}" if access.token else "")


def flaw() -> str | None:
    """What the page lacks, and the way out."""
    if (STATIC / "niivue.js").is_file():
        return None
    return "the page's viewer is missing: run `python tools/viewer.py` in the repository, or install the wheel again"


def run(app: FastAPI, listening: socket.socket) -> None:
    """Serves until Ctrl-C or SIGTERM. What is being answered then is answered, for some seconds at most."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # it would name ids
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=5,
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
