"""Notebooks with their outputs, as .ipynb and HTML: whole, offline, and none anew without need."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from docs import check, generate, notebooks
from docs.generators import notebooks as pages

TEXT = r"""# %% [markdown]
# # One & two
#
# The sum $a_1 < b_1$ of <b>words</b>, and
# $$\sum_i x_i^2 .$$
#
# | a | b |
# | --- | --- |
# | 1 | 2 |

# %%
x = 2
print(x, "<&>")

# %%
import matplotlib.pyplot as plt

plt.plot([x])
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A notebook that runs and one that fails."""
    monkeypatch.setattr(generate, "mathjax", lambda: b"// MathJax")
    found = [tmp_path / "00_good.py", tmp_path / "01_bad.py"]
    found[0].write_text(TEXT, encoding="utf-8")
    found[1].write_text("# %% [markdown]\n# # Bad\n\n# %%\nraise ValueError('no')\n")
    return found


def test_all_are_written_and_those_that_fail_are_named(
    written: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    import nbformat

    out = tmp_path / "out"
    done = notebooks.write(written[::-1], out, workers=2)
    assert done == {"01_bad": "01_bad.py fails: ValueError: no", "00_good": ""}
    assert not (out / "01_bad.ipynb").exists()

    read = nbformat.read(out / "00_good.ipynb", as_version=4)
    nbformat.validate(read)
    assert [cell.cell_type for cell in read.cells] == ["markdown", "code", "code"]
    first, second = (cell.outputs for cell in read.cells[1:])
    assert [o.text for o in first] == ["2 <&>\n"]
    assert [o.output_type for o in second] == ["display_data"]
    assert second[0].data["image/png"].startswith("iVBOR")

    check.read.cache_clear()
    assert list(check.problems(out)) == [], "every file is there, and nothing comes from elsewhere"
    text = (out / "00_good.html").read_text(encoding="utf-8")
    assert r"\(a_1 &lt; b_1\)" in text and r"\[\sum_i x_i^2 .\]" in text
    assert "<b>" not in text and "2 &lt;&amp;&gt;" in text and "<td>1</td>" in text
    assert text.count("data:image/png;base64,iVBOR") == 1
    assert "<title>One &amp; two</title>" in text
    assert '<a href="00_good.html">One &amp; two</a>' in (out / "index.html").read_text()

    monkeypatch.setattr(pages, "files", lambda: written)
    monkeypatch.setattr(sys, "argv", ["notebooks", str(out)])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1 of 2 notebooks fail: 01_bad"):
        notebooks.main()
    assert "00_good: as before" in capsys.readouterr().out


def test_only_another_text_is_executed_anew(
    written: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, out, calls = written[0], tmp_path / "out", []

    def executed(path: Path, folder: Path) -> dict[int, tuple[str, list[str]]]:
        calls.append(path.stem)
        return {}

    monkeypatch.setattr(pages, "executed", executed)
    for anew in (False, False, True):
        notebooks.write([good], out, anew=anew)
    assert calls == ["00_good"] * 2
    good.write_text(TEXT + "\n# %%\nx + 1\n", encoding="utf-8")
    notebooks.write([good], out)
    (out / "00_good.html").unlink()
    notebooks.write([good], out)
    (out / "00_good.ipynb").write_text("{}")  # by another program
    notebooks.write([good], out)
    assert calls == ["00_good"] * 5


def test_no_formula_is_cut_by_markdown() -> None:
    """As by a line of it that begins with a sign, which reads as an item of a list."""
    for path in pages.files():
        body = notebooks.page(path, {}).split("<body>")[1]
        text = re.sub(
            r'<div class="highlight">.*?</div>|<code>.*?</code>', "", body, flags=re.DOTALL
        )
        assert "$" not in text, (path.stem, text[text.index("$") :][:100])


def test_display_formulas_stand_alone() -> None:
    """Behind a line of text the site reads the dollars of the next formulas the wrong way round."""
    for path in pages.files():
        before, inside = "#", False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not inside and line.startswith("# $$"):
                assert before == "#" or before.startswith("# %%"), f"{path.name}:{number}"
            inside ^= line.startswith("#") and line.count("$$") % 2 == 1
            before = line
