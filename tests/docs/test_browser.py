"""The look at a site in a real browser finds what a file cannot tell."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from docs import browser

SOUND = "<html><head><link rel='icon' href='data:,'></head><body><p>all right</p></body></html>"
FAULTY = """<html><head><link rel='icon' href='data:,'></head><body>
<script>console.error("of the console"); throw new Error("of a script")</script>
<span class="math">\\(x\\)</span><img src="nowhere.png"><div style="width: 3000px">wide</div>
</body></html>"""


def run(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["browser", str(site)])
    browser.main()


def test_without_a_browser_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
    with pytest.raises(SystemExit, match="pip install playwright"):
        run(tmp_path, monkeypatch)


@pytest.mark.slow
def test_faults_are_named_with_page_and_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("playwright.sync_api")
    (tmp_path / "sound.html").write_text(SOUND, encoding="utf-8")
    run(tmp_path, monkeypatch)
    assert "1 pages at desk and phone width" in capsys.readouterr().out
    (tmp_path / "faulty.html").write_text(FAULTY, encoding="utf-8")
    with pytest.raises(SystemExit, match="problems in 2 pages"):
        run(tmp_path, monkeypatch)
    told = capsys.readouterr().out
    for words in ("of the console", "of a script", "404: ", "1 formulas stayed text", "px wider"):
        assert f"faulty.html (phone): {words}" in told or words in told
    assert "sound.html" not in told
