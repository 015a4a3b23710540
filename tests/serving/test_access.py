"""Who is let in, and what is bounded around all routes."""

import logging

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.middleware import Middleware

from cheaplunch.errors import UserError
from cheaplunch.serving.access import Access, Guard, decide_access, is_loopback

TOKEN = "a-token-of-ours"


def client(access: Access, base: str = "http://127.0.0.1:8000") -> TestClient:
    app = FastAPI(middleware=[Middleware(Guard, access=access, upload_bytes=6 * 2**20)])

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def any_route(path: str, request: Request) -> int:
        if path.startswith("fail"):
            raise ValueError(f"Doe^Jane in {path}")
        return len(await request.body())

    return TestClient(app, base_url=base, follow_redirects=False)


# ---- where it listens


def test_what_is_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.0.0.2", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.2", "seg.example.org", "")))


def test_a_token_is_made_where_others_reach_the_server():
    assert decide_access("127.0.0.1", None, ()).token is None
    assert decide_access("127.0.0.1", TOKEN, ()).token == TOKEN
    made = {decide_access("0.0.0.0", None, ()).token for _ in range(3)}
    assert len(made) == 3 and all(len(token or "") >= 32 for token in made)
    for token in ("short", "with a blank", "ümläute-ümläute", "semi;colon;semi"):
        with pytest.raises(UserError, match="--token"):
            decide_access("0.0.0.0", token, ())
    for origin in ("*", "null", "viewer.example.org", "https://a.org/page", "https://"):
        with pytest.raises(UserError, match="--allow-origin"):
            decide_access("127.0.0.1", None, [origin])


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000", "LOCALHOST"])
def test_names_of_this_machine(host):
    assert client(Access()).get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example:8000", "127.0.0.1.evil.example", "192.168.0.2", "", "[::1", "a@b"])
def test_a_name_made_to_point_here_is_refused(host):
    refused = client(Access()).get("/", headers={"Host": host})
    assert refused.status_code == 421 and "this machine alone" in refused.json()["error"]


def test_pages_of_others_may_not_send():
    own, other = client(Access()), {"Origin": "https://evil.example"}
    assert own.post("/api/open", headers={"Origin": "http://127.0.0.1:8000"}).status_code == 200
    assert own.post("/api/open", headers={"Origin": "http://127.0.0.1:9000"}).status_code == 403
    assert own.post("/api/open", headers={"Origin": "null"}).status_code == 403
    assert own.post("/api/open", headers=other).status_code == 403
    assert own.get("/", headers=other).headers.get("access-control-allow-origin") is None
    allowed = client(Access(origins=("https://evil.example",)))
    assert allowed.post("/api/open", headers=other).status_code == 200
    assert allowed.get("/", headers={"Host": "evil.example"}).status_code == 200  # its own name behind a proxy


# ---- the token


def test_the_token_lets_in():
    served = client(Access("0.0.0.0", TOKEN), "http://seg.example.org:8000")
    refused = served.get("/api/model")
    assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
    assert served.get("/api/model", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    for wrong in (f"Bearer {TOKEN}x", "Bearer ", f"Basic {TOKEN}", TOKEN, "Bearer ü"):
        assert served.get("/api/model", headers={"Authorization": wrong.encode()}).status_code == 401
    assert served.get(f"/api/model?token={TOKEN}").status_code == 401  # addresses are kept by browsers and proxies
    assert served.get("/?token=wrong").status_code == 401
    assert served.get("/", headers={"Cookie": f"cheaplunch={TOKEN}; ;=;"}).status_code == 401


def test_the_page_keeps_the_token_in_a_cookie():
    served = client(Access("0.0.0.0", TOKEN), "http://seg.example.org:8000")
    welcome = served.get(f"/?token={TOKEN}")
    assert (welcome.status_code, welcome.headers["location"]) == (303, "/")
    assert "HttpOnly" in welcome.headers["set-cookie"] and "SameSite=strict" in welcome.headers["set-cookie"]
    assert served.get("/api/model").status_code == 200  # the client has the cookie now
    assert Access("0.0.0.0", TOKEN).cookie != Access("0.0.0.0", "another-token").cookie


def test_3d_slicer_may_ask_whether_to_log_in():
    served = client(Access("0.0.0.0", TOKEN))
    assert served.get("/auth/").status_code == served.post("/auth/token").status_code == 200
    assert served.get("/auth/token/valid").status_code == 401


# ---- sizes, headers, failures


def test_what_is_sent_is_bounded():
    served = client(Access())
    assert served.post("/api/open/x/segment", content=bytes(4 * 2**20)).json() == 4 * 2**20
    assert served.post("/api/open", content=bytes(6 * 2**20)).json() == 6 * 2**20
    for path, size in (("/api/model", 4 * 2**20), ("/api/open", 6 * 2**20), ("/datastore/image", 6 * 2**20)):
        for content in (bytes(size + 1), iter([bytes(2**20)] * (size // 2**20) + [b"x"])):  # with and without a length
            refused = served.post(path, content=content)
            assert refused.status_code == 413, path
    assert "--max-upload-mb" in refused.text


def test_every_answer_has_the_headers():
    served = client(Access())
    for answer in (served.get("/"), served.get("/fail"), served.get("/", headers={"Host": "evil.example"})):
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
    assert served.get("/static/a.js").headers["cache-control"] == "no-cache"


def test_a_failure_is_logged_without_what_it_was_about(caplog):
    with caplog.at_level(logging.INFO, "cheaplunch"):
        failed = client(Access()).get("/fail/Jane.nii")
    assert failed.status_code == 500 and "Jane" not in failed.text
    [record] = [record for record in caplog.records if record.name.startswith("cheaplunch")]
    assert record.getMessage() == "GET /{path:path} failed: ValueError in any_route"
