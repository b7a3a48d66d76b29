"""Who may ask, and what a request can do to the server."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import ServerThread

from onekernel.cli import main
from onekernel.errors import InvalidRequest
from onekernel.server.security import check_address, is_loopback, read_keys
from onekernel.server.settings import Settings

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
Start = Callable[..., ServerThread]


def post(server: ServerThread, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, **fields}, headers=headers or {}, timeout=30)


def raw(server: ServerThread, data: bytes, timeout: float = 5.0) -> bytes:
    """All that comes back for bytes that a well-behaved client would not send."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout) as connection:
        connection.sendall(data)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("[::1]", True), ("localhost", True), ("0.0.0.0", False),
     ("192.168.1.2", False), ("::", False), ("localhost.evil.com", False), ("127.0.0.1.evil.com", False), ("", False)],
)  # fmt: skip
def test_loopback_is_told_from_all_else(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


def test_a_public_address_needs_a_key_or_a_word() -> None:
    with pytest.raises(InvalidRequest, match="there is no key"):
        check_address(Settings(host="0.0.0.0"))
    check_address(Settings(host="0.0.0.0", keys=("secret",)))
    check_address(Settings(host="0.0.0.0", allow_public=True))
    check_address(Settings())


def test_the_command_refuses_a_public_address(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "--allow-public" in capsys.readouterr().err


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\none\n\n two \n")
    assert read_keys(path, "--api-key-file") == ("one", "two")
    path.write_text("# none\n")
    with pytest.raises(InvalidRequest, match=r"--api-key-file .* holds no key"):
        read_keys(path, "--api-key-file")
    with pytest.raises(InvalidRequest, match=r"--api-key-file .* cannot be read"):
        read_keys(tmp_path / "missing", "--api-key-file")


def test_one_of_the_keys_is_needed(scripted: Start) -> None:
    server = scripted("ok", keys=("first", "zweitér"))
    assert post(server).status_code == 401
    assert post(server, {"authorization": "Bearer wrong"}).status_code == 401
    assert post(server, {"authorization": "first"}).status_code == 401
    assert post(server, {"authorization": "Bearer first"}).status_code == 200
    assert post(server, {"x-api-key": "first"}).status_code == 200
    assert httpx.get(f"{server.url}/health").status_code == 200
    for path in ("/v1/models", "/metrics", "/props", "/openapi.json"):
        answer = httpx.get(server.url + path)
        assert answer.status_code == 401, path
        assert "first" not in answer.text
    error = httpx.post(f"{server.url}/v1/messages", json={}).json()
    assert error["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("host", ["evil.com", "evil.com:80", "127.0.0.1.evil.com", "169.254.1.1", "", "[::1", "a@b"])
def test_a_name_that_is_not_ours_is_refused(demo: ServerThread, host: str) -> None:
    answer = raw(demo, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert answer.split()[1] == b"403"


def test_a_name_that_was_allowed_is_taken(scripted: Start) -> None:
    server = scripted("ok", hosts=("my.box",))
    assert httpx.get(f"{server.url}/v1/models", headers={"host": f"my.box:{server.port}"}).status_code == 200
    assert httpx.get(f"{server.url}/v1/models", headers={"host": "localhost"}).status_code == 200


def test_other_web_pages_are_refused_and_no_cors_header_is_sent(demo: ServerThread) -> None:
    for origin in ("http://evil.com", "null", "http://127.0.0.1:1"):
        answer = post(demo, {"origin": origin})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    assert post(demo, {"sec-fetch-site": "cross-site"}).status_code == 403
    assert post(demo, {"origin": demo.url}).status_code == 200
    preflight = httpx.options(f"{demo.url}/v1/chat/completions", headers={"origin": "http://evil.com"})
    assert preflight.status_code == 403
    link = httpx.get(demo.url, headers={"sec-fetch-site": "cross-site"})  # to the page: that is allowed
    assert link.status_code != 403


def test_a_web_page_that_was_allowed_may_ask(scripted: Start) -> None:
    server = scripted("ok", origins=("http://page:3000",))
    headers = {"origin": "http://page:3000", "access-control-request-headers": "authorization"}
    preflight = httpx.options(f"{server.url}/v1/chat/completions", headers=headers)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "http://page:3000"
    answer = post(server, {"origin": "http://page:3000"})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "http://page:3000"
    assert post(server, {"origin": "http://other"}).status_code == 403


def test_large_bodies_and_heads_are_refused(scripted: Start) -> None:
    server = scripted("ok", body_bytes=10_000, header_bytes=8_000)
    answer = post(server, messages=[{"role": "user", "content": "x" * 20_000}])
    assert answer.status_code == 413
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    assert raw(server, head + chunk).split()[1] == b"413"
    assert raw(server, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 9_000).split()[1] == b"431"
    assert raw(server, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 9_000 + b"\r\n\r\n").split()[1] == b"431"
    assert raw(server, b"GET /" + b"y" * 9_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n").split()[1] == b"431"
    assert post(server).status_code == 200


def test_slow_requests_are_given_up(scripted: Start) -> None:
    server = scripted("ok", header_s=0.3, body_s=0.3)
    started_at = time.perf_counter()
    assert raw(server, b"").split()[1] == b"408"
    assert raw(server, b"GET / HTTP/1.1\r\nHo").split()[1] == b"408"
    head = b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    answer = raw(server, head)
    assert answer.split()[1] == b"408"
    assert json.loads(answer.split(b"\r\n\r\n")[1])["type"] == "error"
    assert time.perf_counter() - started_at < 4


def test_an_answer_that_nobody_reads_is_given_up(scripted: Start) -> None:
    server = scripted("word " * 20_000, stall_s=0.5)
    fields = {"max_tokens": 20_000, "stream": True, "logprobs": True, "top_logprobs": 20}  # 2 KB a token
    body = json.dumps({**CHAT, **fields}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(head + body)
        for _ in range(200):
            time.sleep(0.05)
            if not server.server.server_state.connections and server.service.scheduler.running == 0:
                return
    raise AssertionError("the connection is still open")


def test_broken_requests_are_answered(demo: ServerThread) -> None:
    assert raw(demo, b"NONSENSE\r\n\r\n").split()[1] == b"400"
    for content in (b"{", b"[1]", b'"x"', b"\xff\xfe", b"[" * 100_000, b""):
        answer = httpx.post(f"{demo.url}/v1/chat/completions", content=content)
        assert answer.status_code == 400, content[:10]
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "path",
    ["/../etc/passwd", "/page/../../settings.py", "/page/%2e%2e%2fsettings.py", "/v1/models/../../x", "/page//etc"],
)  # fmt: skip
def test_no_path_of_a_request_opens_a_file(demo: ServerThread, path: str) -> None:
    answer = raw(demo, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert answer.split()[1] == b"404"


def test_a_template_of_a_request_is_not_used(scripted: Start) -> None:
    server = scripted("ok")
    answer = post(server, chat_template="{{ 7 * 7 }}", chat_template_kwargs={"messages": [], "tools": "/etc/passwd"})
    assert answer.status_code == 200
    assert answer.headers["x-onekernel-ignored"] == "chat_template"
    plain = post(server).json()["usage"]["prompt_tokens"]
    assert answer.json()["usage"]["prompt_tokens"] == plain


def test_logs_hold_no_prompts(scripted: Start, caplog: pytest.LogCaptureFixture) -> None:
    server = scripted("the answer is private")
    caplog.set_level(logging.DEBUG)
    post(server, messages=[{"role": "user", "content": "my secret"}])
    post(server, messages=[{"role": "clown", "content": "my secret"}])
    httpx.get(f"{server.url}/v1/models?q=my+secret")
    ours = "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith("http"))
    assert "POST /v1/chat/completions 200" in ours
    assert "secret" not in ours
    assert "private" not in ours


def test_prompts_are_logged_when_asked_for(scripted: Start, caplog: pytest.LogCaptureFixture) -> None:
    server = scripted("the answer is private", log_prompts=True)
    with caplog.at_level(logging.INFO):
        post(server, messages=[{"role": "user", "content": "my secret"}], max_tokens=50)
    assert "my secret" in caplog.text
    assert "private" in caplog.text
