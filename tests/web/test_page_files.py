"""The page's files: how large they are, what they may not contain, and what their modules write."""

import io
import re
import zipfile

import pytest

pytest.importorskip("playwright.sync_api", reason="needs Playwright to drive a browser")

from page_browser import OpenPage
from page_stand_in import STATIC


def test_the_event_parser_minds_no_cut(open_page: OpenPage) -> None:
    """Fails if events are lost or changed when the network cuts a stream inside a line, a line's
    end or a letter.
    """
    page = open_page()
    stream = "\ufeff: hello\n\nevent: a\r\ndata: gr\u00fc\u00df \U0001f98a\r\ndata:two\r\n\r\n"
    stream += "data: x\r\rid: 3\nevent: lost\n\ndata\n\nevent: cut\ndata: off"
    found = page.evaluate(
        """async (bytes) => {
            const { readEvents } = await import("/static/event_stream.js");
            const all = new Set();
            for (const size of [1, 2, 3, 5, 7, 1000]) {
                const pieces = [];
                for (let at = 0; at < bytes.length; at += size) {
                    pieces.push(new Uint8Array(bytes.slice(at, at + size)));
                }
                const pull = (c) => { pieces.length ? c.enqueue(pieces.shift()) : c.close(); };
                const body = new ReadableStream({ pull });
                const events = [];
                for await (const event of readEvents({ body })) events.push(event);
                all.add(JSON.stringify(events));
            }
            return [...all].map(JSON.parse);
        }""",
        list(stream.encode()),
    )
    expected = [("a", "gr\u00fc\u00df \U0001f98a\ntwo"), ("message", "x"), ("message", "")]
    assert found == [[{"name": name, "data": data} for name, data in expected]]


def test_the_pages_files_have_no_inline_code_and_no_other_host() -> None:
    """Fails if a file relies on what the policy forbids; a browser would say so only where that
    part is reached.
    """
    text = {path.name: path.read_text() for path in STATIC.iterdir() if path.suffix != ".webp"}
    assert {"index.html", "style.css", "app.js", "favicon.svg"} <= set(text)
    for name, content in text.items():
        addresses = set(re.findall(r"https?://[^\s\"'<>)]+", content))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", content
        ), name
    assert not re.search(r"\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)|<style", text["index.html"])


def test_the_page_stays_small() -> None:
    """Fails if the page grows beyond what a phone loads at once, or its styles beyond what a reader
    holds in mind.
    """
    files = [path for path in STATIC.iterdir() if path.suffix in (".html", ".css", ".js")]
    assert sum(path.stat().st_size for path in files) < 150_000
    assert len((STATIC / "style.css").read_text().splitlines()) < 1387


def test_an_archive_can_be_read_elsewhere(open_page: OpenPage) -> None:
    """Fails if a checksum, an offset or the encoding of a name is wrong."""
    page = open_page()
    content = page.evaluate(
        """async () => {
            const { zip } = await import("/static/zip.js");
            const noise = Uint8Array.from({ length: 70000 }, (_, at) => (at * at) & 255);
            const nothing = noise.slice(0, 0);
            const files = [{ name: "fúchs.png", bytes: noise }, { name: "b", bytes: nothing }];
            return [...zip(files, new Date(2026, 10, 29, 12, 34, 56))];
        }"""
    )
    with zipfile.ZipFile(io.BytesIO(bytes(content))) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["fúchs.png", "b"]
        assert archive.read("fúchs.png") == bytes(at * at & 255 for at in range(70000))
        assert archive.infolist()[0].date_time == (2026, 11, 29, 12, 34, 56)
