"""The chat page, driven in a headless Chromium where there is one: send, stream, stop, regenerate, a phone's width."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from browser import Tab, chromium, find_chromium

from onekernel.server.chat_page import FOLDER

CHROMIUM = find_chromium()
THOUGHT = "They want a *sample*."
ANSWER = f"""{THOUGHT}
</think>

# A sample

Some **bold** text, `code`, [a link](https://example.org), [a bad one](javascript:alert(1)) and ![an image](https://example.org/x.png).
<script>document.title = "broken into"</script><img src=x onerror="document.title = 'broken into'">

```python
def f(x):  # a comment that is so long that it cannot be shown within the width of a telephone, whatever it says
    return "<b>" + x
```

1. one
   - nested
2. two

| a | b |
|---|---|
| 1 | 2 |
"""
LONG = "</think>\n\n" + "word " * 600


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with chromium(CHROMIUM, tmp_path / "profile") as tab:
        tab.resize(1100, 800)
        yield tab


def send(tab: Tab, text: str) -> None:
    tab.run("document.getElementById('input').focus()")
    tab.type(text)
    tab.press("Enter", 13)


def done(tab: Tab, count: int = 1) -> None:
    """Until `count` answers are complete."""
    tab.wait(f"document.querySelectorAll('article.assistant footer').length === {count} && !running()")


def open_page(tab: Tab, server: Any) -> None:
    tab.open(f"{server.url}/")
    tab.run("window.running = () => !document.getElementById('stop').hidden")
    tab.run("document.getElementById('thinking').value = 'true'")
    tab.wait("document.getElementById('device').textContent")


def all_well(tab: Tab, server: Any) -> None:
    """No error in the page, and no request to anybody else."""
    assert tab.errors == []
    assert {url.split("/")[2] for url in tab.requests if url.startswith("http")} == {server.url.split("/")[2]}


def test_an_answer_is_streamed_and_shown_safely(tab: Tab, scripted, tmp_path: Path) -> None:
    server = scripted(ANSWER, delay=0.004)
    open_page(tab, server)
    assert tab.run("document.getElementById('model').textContent") == "demo"
    assert server.service.device in tab.run("document.getElementById('device').textContent")
    send(tab, "Show me a sample.")
    tab.wait("document.querySelector('article.assistant .body').textContent.length > 5")
    assert tab.run("running()"), "the answer came all at once"
    tab.screenshot(tmp_path / "streaming.png")
    done(tab)
    body = "document.querySelector('article.assistant .body')"
    counts = {"h1": 1, "strong": 1, "pre": 1, "ol > li": 2, "ol ul > li": 1, "td": 2, "script": 0, "img": 0, "a": 2}
    for selector, count in counts.items():
        assert tab.run(f"{body}.querySelectorAll('{selector}').length") == count, selector
    assert tab.run(f"[...{body}.querySelectorAll('a')].every(a => a.protocol === 'https:')")
    assert 'return "<b>" + x' in tab.run(f"{body}.querySelector('pre').textContent")
    assert "broken into" not in tab.run("document.title")
    thinking = "document.querySelector('article.assistant details.thinking')"
    assert not tab.run(f"{thinking}.open")
    tab.run(f"{thinking}.open = true")
    tab.wait(f"{thinking}.querySelector('em')")
    assert THOUGHT.replace("*", "") in tab.run(f"{thinking}.textContent")
    figures = tab.run("document.querySelector('.figures').textContent")
    assert re.fullmatch(r"\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ m?s", figures), figures
    tab.screenshot(tmp_path / "done.png")
    all_well(tab, server)


def test_an_answer_can_be_stopped_and_made_again(tab: Tab, scripted) -> None:
    server = scripted(LONG, delay=0.004)
    open_page(tab, server)
    send(tab, "Go on for long.")
    tab.wait("document.querySelector('article.assistant .body').textContent.length > 20")
    tab.press("Escape", 27)
    done(tab)
    assert tab.run("document.querySelector('article.assistant .note').textContent") == "Stopped."
    stopped = tab.run("document.querySelector('article.assistant .body').textContent")
    assert 20 < len(stopped) < len(LONG) - 100
    tab.wait(f"fetch('{server.url}/props').then(r => r.json()).then(p => p.queue.running === 0)")
    tab.run("document.querySelector('[aria-label=\"Regenerate the answer\"]').click()")
    tab.wait("running()")
    assert tab.run("document.querySelectorAll('article.assistant').length") == 1
    done(tab)
    assert tab.run("document.querySelector('article.assistant .body').textContent").strip() == LONG[10:].strip()
    all_well(tab, server)


def test_a_conversation_goes_on_and_outlives_a_reload(tab: Tab, scripted) -> None:
    server = scripted("</think>\n\nfirst", "</think>\n\nsecond")
    open_page(tab, server)
    send(tab, "One?")
    done(tab, 1)
    send(tab, "Two?")
    done(tab, 2)
    open_page(tab, server)
    texts = "[...document.querySelectorAll('article .body')].map(body => body.textContent)"
    assert tab.run(texts) == ["One?", "first", "Two?", "second"]
    tab.run("document.getElementById('new').click()")
    assert tab.run(texts) == []
    all_well(tab, server)


def test_the_page_fits_a_phone_in_the_dark(tab: Tab, scripted, tmp_path: Path) -> None:
    server = scripted(ANSWER)
    tab.resize(360, 740, phone=True, dark=True)
    open_page(tab, server)
    send(tab, "Show me a sample.")
    done(tab)
    assert tab.run("document.documentElement.scrollWidth") == 360
    assert tab.run("document.getElementById('send').getBoundingClientRect().right <= 360")
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 27)"
    tab.screenshot(tmp_path / "phone.png")
    tab.run("document.getElementById('theme').click()")
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    tab.run("document.getElementById('open-settings').click()")
    assert tab.run("document.documentElement.scrollWidth") == 360
    tab.screenshot(tmp_path / "settings.png")
    all_well(tab, server)


def test_a_key_is_asked_for_and_used(tab: Tab, scripted) -> None:
    server = scripted("</think>\n\nwelcome", keys=("open-sesame",))
    tab.open(f"{server.url}/")
    tab.run("window.running = () => !document.getElementById('stop').hidden")
    send(tab, "Hello?")
    tab.wait("document.querySelector('.failure')")
    assert "Enter the API key in the settings." in tab.run("document.querySelector('.failure').textContent")
    assert not tab.run("document.getElementById('settings').hidden")
    tab.run("document.getElementById('key').value = 'open-sesame'")
    tab.run("document.getElementById('key').dispatchEvent(new Event('change'))")
    tab.run("document.querySelector('[aria-label=\"Regenerate the answer\"]').click()")
    tab.wait("document.querySelector('article.assistant .body').textContent.includes('welcome')")
    tab.wait("document.getElementById('model').textContent === 'demo'")


def test_the_page_may_load_nothing_from_elsewhere(scripted) -> None:
    server = scripted("x")
    answer = httpx2.get(f"{server.url}/", trust_env=False)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    names = set(re.findall(r'(?:src|href)="([^"]+)"', answer.text))
    assert all(name.startswith(("/page/", "data:")) for name in names)
    for path in FOLDER.iterdir():
        if path.suffix == ".js":
            source = path.read_text(encoding="utf-8")
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", source), path.name
            assert httpx2.get(f"{server.url}/page/{path.name}", trust_env=False).text == source
