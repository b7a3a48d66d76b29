"""Open WebUI is a server with a page of its own: it is operated through its API, as its page does it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Left out: local embeddings and speech, 7 GB of packages that serve models of their own.
LEFT_OUT = re.compile(
    r"(torch|triton|nvidia|cuda|sentence-transformers|accelerate|ctranslate2|faster-whisper|opencv-python-headless|"
    r"rapidocr|av==|sympy|mpmath|networkx|setuptools)",
    re.IGNORECASE,
)
TOOL = '''
class Tools:
    def make_file(self, path: str) -> str:
        """
        Makes a file.
        :param path: where
        """
        with open(path, "w") as file:
            file.write("made by a tool")
        return "made"
'''
START_S = 200
ANSWER_S = 60


def install(folder: Path, package: str, command: Callable[..., None]) -> None:
    """What `pip install` would, but for LEFT_OUT."""
    pip, report = (str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"), folder / "report.json"
    command(*pip, "--dry-run", "--report", str(report), package)
    pins = [
        f"{entry['metadata']['name']}=={entry['metadata']['version']}"
        for entry in json.loads(report.read_text(encoding="utf-8"))["install"]
    ]
    (folder / "pins.txt").write_text("\n".join(pin for pin in pins if not LEFT_OUT.match(pin)), encoding="utf-8")
    command(*pip, "--no-deps", "-r", str(folder / "pins.txt"))


def operate(launch: list[str], real: Any, environment: dict[str, str], work: Path) -> str:
    """Start it, sign in, make a tool, chat with it; gives the conversation."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = work / "open-webui.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*launch, *real.arguments, str(port)],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        return _chat(f"http://127.0.0.1:{port}", work)
    except (OSError, KeyError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}\n{log.read_text()[-2500:]}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _chat(url: str, work: Path) -> str:
    end = time.monotonic() + START_S
    while True:
        try:
            _ask(f"{url}/health")
            break
        except OSError:
            if time.monotonic() > end:
                raise TimeoutError(f"not up after {START_S} s") from None
            time.sleep(1)
    token = _ask(f"{url}/api/v1/auths/signin", {"email": "admin@localhost", "password": "admin"})["token"]
    model = _ask(f"{url}/api/models?refresh=true", token=token)["data"][0]["id"]
    tool = {"id": "files", "name": "Files", "content": TOOL, "meta": {"description": "Makes files."}}
    _ask(f"{url}/api/v1/tools/create", tool, token)
    question = {"role": "user", "content": "Make a file, then say that you are done."}
    body = {
        "model": model,
        "messages": [question],
        "stream": True,
        "tool_ids": ["files"],
        "params": {"function_calling": "native"},
    }
    made = work / "made.txt"
    chat = {"id": "", "title": "t", "models": [model], "history": {"messages": {}, "currentId": None}, "messages": []}
    created = _ask(f"{url}/api/v1/chats/new", {"chat": chat}, token)["id"]
    _ask(f"{url}/api/chat/completions", {**body, "chat_id": created, "session_id": "s1", "id": "a1"}, token)
    end = time.monotonic() + ANSWER_S
    while time.monotonic() < end:
        conversation = json.dumps(_ask(f"{url}/api/v1/chats/{created}", token=token))
        if "Done" in conversation and made.is_file():
            return conversation
        time.sleep(0.5)
    raise TimeoutError(f"no answer after {ANSWER_S} s: {conversation[-1500:]}")


def _ask(url: str, body: object = None, token: str | None = None) -> Any:
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        raise OSError(f"{url}: {error.code} {error.read()[:500]!r}") from None
