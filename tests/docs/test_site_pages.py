"""The generator of the site has a page for everything that there is, and draws it."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from deltacontrol.deltas import registry
from deltacontrol.experiments import studies
from deltacontrol.experiments.claims import scoreboard
from deltacontrol.experiments.cli import main as cli
from deltacontrol.paper_figures import base
from docs import check, generate
from docs.generators import api, code_pages, commands, deltas, figures, markdown, notebooks, solvers

ROOT = Path(__file__).resolve().parents[2]
PAGES = generate.pages()


def names(folder: str) -> set[str]:
    return {Path(p).stem for p in PAGES if Path(p).parent.as_posix() == folder} - {"index"}


def test_everything_has_a_page() -> None:
    assert names("deltas") - {"support"} == set(registry.available())
    assert names("solvers") - {solvers.TORCH} == set(solvers.own()) and solvers.own()
    files = {scoreboard.source(claim).stem for claim in scoreboard.available().values()}
    assert names("claims") - {"statements", "changes"} == files
    assert names("figures") - {"source"} == set(base.names())
    assert names("figures/studies") == set(studies.available())
    assert names("commands") == set(cli.available())
    assert names("notebooks") == {p.stem for p in (ROOT / "proofs_notebooks").glob("*.py")}


def test_every_page_is_in_a_table_of_contents() -> None:
    """The reference is left out: to draw its index imports every module."""
    listed = {"index.md", *(page for page in PAGES if page.startswith("api/"))}
    for page, draw in PAGES.items():
        if Path(page).stem == "index" and page != "api/index.md":
            for block in re.findall(r"```\{toctree\}\n(.*?)```", draw(), re.DOTALL):
                for line in block.splitlines():
                    if line.strip() and not line.startswith(":"):
                        target = line.split("<")[-1].rstrip(">")
                        listed.add((Path(page).parent / f"{target}.md").as_posix())
    assert set(PAGES) <= listed
    assert listed <= set(PAGES)


def test_pages_that_are_drawn_from_records_link_to_what_is_there() -> None:
    shown = {path.relative_to(ROOT).as_posix() for path in code_pages.files()}
    drawn = [page for page in PAGES if re.match("claims/[a-z]|figures/source", page)]
    assert len(drawn) > 5
    for page in drawn:
        text = PAGES[page]()
        code = re.findall(r"\(?\.\./code/([^)#\s\"]+)\.html", text)
        assert set(code) <= shown, page
        for target in re.findall(r"\]\(([^):]+\.md)", text):
            place = os.path.normpath(Path(page).parent / target)
            assert place in PAGES, f"{page} links to {target}"


@pytest.mark.parametrize("name", sorted(registry.available()))
@pytest.mark.one_in(4)
def test_a_page_of_a_delta_says_what_the_registry_knows(name: str) -> None:
    kind, text = registry.available()[name], PAGES[f"deltas/{name}.md"]()
    assert markdown.code(kind.law) in text
    assert f"**{kind.rate():g}**" in text
    for field in registry.fields(name):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{field}` |"))
        assert row.count("|") == 5 + row.count(r"\|")
        assert row.rsplit(" | ", 1)[1].strip(" |"), f"{field} of {name} has no meaning"
    for line in re.findall(r"^deltacontrol .*", text, re.MULTILINE):
        parse(line)


def test_a_page_of_a_delta_has_rates_results_and_peft() -> None:
    text = PAGES["deltas/lora.md"]()
    assert "| `minilm-l6` | `movie` | 0.003 |" in text
    assert "[`performance`](../figures/performance.md)" in text
    assert "`LORA`: goes in and out" in text
    assert "no type of adapter holds this method" in PAGES["deltas/diff-pruning.md"]()
    works, of, refused = deltas._support_of("prefix")
    assert 0 < works < of == 42 and any("Mixtral" in line or "Mamba2" in line for line in refused)


def test_pages_of_solvers_have_options_and_exact_problems() -> None:
    for name, kind in solvers.own().items():
        text = PAGES[f"solvers/{name}.md"]()
        assert "double-integrator" in text
        assert (f"deltacontrol solve --solver {name}" in text) is not kind.linear_quadratic
    assert "| `radius` |" in PAGES["solvers/newton-cg.md"]()
    assert "torch.optim.AdamW" in PAGES[f"solvers/{solvers.TORCH}.md"]()


@pytest.mark.parametrize("number", (1, 15, 19))
def test_a_page_of_a_claim_has_the_live_verdict(number: int) -> None:
    claim = scoreboard.find(number)
    text = PAGES[f"claims/{scoreboard.source(claim).stem}.md"]()
    outcome = scoreboard.stored(claim)
    assert outcome is not None
    for part in outcome.parts:
        assert f'<span class="verdict {part.verdict.text.replace(" ", "-")}">' in text
        assert markdown.escape(str(part.threshold)) in text
    assert f"deltacontrol claims show {number}" in text


def test_a_page_of_a_figure_has_picture_table_caption_and_command() -> None:
    text = PAGES["figures/scoreboard.md"]()
    assert "(scoreboard.png)" in text and "figures/scoreboard.png" in figures.pictures()
    assert "deltacontrol figures --only scoreboard --preset paper" in text
    assert set(figures.pictures()) == {f"figures/{name}.png" for name in base.names()}
    study = PAGES["figures/studies/solvers.md"]()
    assert "| **Committed runs** | 10 |" in study and "[`solvers`](../solvers.md)" in study


@pytest.mark.parametrize("name", sorted(cli.available()))
@pytest.mark.one_in(4)
def test_a_page_of_a_command_has_every_option_of_its_help(name: str) -> None:
    kind, text = cli.available()[name], PAGES[f"commands/{name}.md"]()
    shown = set(re.findall(r"^  (--[\w-]+)", commands.help_of(name, kind), re.MULTILINE))
    rows = set(re.findall(r"^\| `(--[\w-]+)", text, re.MULTILINE))
    assert rows == shown and shown
    for line in re.findall(r"^deltacontrol .*", text, re.MULTILINE):
        parse(line)


def parse(line: str) -> None:
    """Hold a written command against the parser; nothing runs."""
    import tyro

    line = line.split("  #")[0].split(" > ")[0]
    words, _ = cli._loads(shlex.split(line)[1:])
    if words and words[0] != "--version":
        tyro.extras.subcommand_cli_from_dict(
            cli.available(),
            prog="deltacontrol",
            args=words,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )


def by_hand() -> list[str]:
    return [p.relative_to(generate.HAND).as_posix() for p in sorted(generate.HAND.rglob("*.md"))]


@pytest.mark.parametrize("page", by_hand())
def test_written_commands_are_those_of_the_command_line(page: str) -> None:
    text = (generate.HAND / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```shell\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("accelerate launch"):
                line = line[line.index("deltacontrol") :]
            if line.startswith("deltacontrol"):
                parse(line)
            elif line.startswith("make "):
                target = line.split()[1]
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            else:
                assert line.startswith("pip install"), line


@pytest.mark.parametrize("page", by_hand())
def test_links_between_pages_by_hand_lead_somewhere(page: str) -> None:
    text = (generate.HAND / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+\.md)\)", text):
        target = (Path("/") / Path(page).parent / link).as_posix()
        parts: list[str] = []
        for part in target.split("/")[1:]:
            if part == "..":
                parts.pop()
            elif part != ".":
                parts.append(part)
        assert "/".join(parts) in PAGES, f"{page} links to {link}"


def test_names_in_docstrings_become_links() -> None:
    resolve = api.resolver("deltacontrol.theory.solvers")
    link = resolve("deltacontrol.theory.lq")
    assert link == "{py:mod}`deltacontrol.theory.lq <deltacontrol.theory.lq>`"
    full = "deltacontrol.theory.linear.reachability.Reachability"
    assert resolve("Reachability") == f"{{py:obj}}`Reachability <{full}>`"
    assert resolve("no such name") is None and resolve("no_such_name") is None


def test_docstrings_become_markdown() -> None:
    text = markdown.docstring(
        """A *sum* of ``a_t`` and `b`.

        Formula::

            x = a * b

        ===  =====
        one  two
        ===  =====
        a    b c
             d
        ===  =====

        Args:
            x: the first, of
                two lines.
            y: the other.

        Raises:
            InputError: if not.

        Example:
            >>> 1 + 1
            2
        """
    )
    assert "A *sum* of `a_t` and `b`." in text
    assert "```text\nx = a * b\n```" in text
    assert "| one | two |" in text and "| a | b c d |" in text
    assert "**Arguments**\n\n- `x`: the first, of two lines.\n- `y`: the other." in text
    assert "**Raises**\n\n- `InputError`: if not." in text
    assert "```pycon\n>>> 1 + 1\n2\n```" in text


def test_cells_of_notebooks_are_complete() -> None:
    for path in notebooks.files():
        cells = notebooks.cells(path)
        assert cells[0][0] == "markdown" and cells[0][1].startswith("# ")
        source = path.read_text(encoding="utf-8")
        assert len(cells) == len(re.findall(r"^# %%", source, re.MULTILINE))


def test_a_notebook_is_executed(tmp_path: Path) -> None:
    path = tmp_path / "one.py"
    path.write_text(
        "# %% [markdown]\n# # One\n\n# %%\nx = 2\nprint(x)\n\n# %%\n"
        "import matplotlib.pyplot as plt\nplt.plot([x])\nprint('drawn')\n"
    )
    found = notebooks.executed(path, tmp_path / "out")
    assert found == {0: ("2\n", []), 1: ("drawn\n", ["one-1-0.png"])}
    path.write_text("# %% [markdown]\n# # One\n\n# %%\nraise ValueError('no')\n")
    with pytest.raises(RuntimeError, match="one.py fails: ValueError: no"):
        notebooks.executed(path, tmp_path / "out")


def test_a_site_is_looked_through(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.html").write_text('<h1 id="here">b</h1>')
    (tmp_path / "style.css").write_text("p { color: red }")
    good = '<link rel="stylesheet" href="style.css"><a href="a/b.html#here">b</a>'
    (tmp_path / "index.html").write_text(f'{good}<a href="https://doi.org/10.1/x">paper</a>')
    assert list(check.problems(tmp_path)) == []
    bad = {
        '<script src="https://cdn.example/x.js"></script>': "index.html loads https://cdn",
        '<link rel="stylesheet" href="//fonts.example/x.css">': "index.html loads //fonts",
        "<style>@import 'https://fonts.example/y.css';</style>": "index.html loads https://fonts",
        '<a href="a/c.html">c</a>': "index.html links to a/c.html, which is not there",
        '<a href="a/b.html#there">b</a>': "that page has no such place",
        '<img src="x.png">': "index.html links to x.png, which is not there",
        "<p>/root/somebody/file.py</p>": "index.html has a path of a machine",
    }
    for text, message in bad.items():
        check.read.cache_clear()
        (tmp_path / "index.html").write_text(good + text)
        (found,) = check.problems(tmp_path)
        assert message in found
    check.read.cache_clear()
    (tmp_path / "index.html").write_text(good)
    (tmp_path / "style.css").write_text("p { background: url(https://cdn.example/x.png) }")
    assert list(check.problems(tmp_path)) == ["style.css loads https://cdn.example/x.png"]


needs_sphinx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("sphinx", "myst_parser", "pydata_sphinx_theme"))),
    reason="the extra docs is not installed",
)


@needs_sphinx
@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "html"
    generate.write(source)
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(source), str(site)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check.read.cache_clear()
    assert list(check.problems(site)) == []
