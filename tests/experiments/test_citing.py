"""BibTeX of the software, the article and the methods; the citation file."""

import json
import re
import tomllib
from pathlib import Path

import pandas as pd
import pytest

from deltacontrol.deltas import LoRA
from deltacontrol.deltas.registry import available
from deltacontrol.experiments.claims import board
from deltacontrol.experiments.cli import main as cli
from deltacontrol.experiments.runs import citing
from deltacontrol.experiments.runs.citing import cite
from deltacontrol.experiments.runs.record import Record
from deltacontrol.experiments.runs.store import (
    COMMITTED,
    Digests,
    Experiment,
    Outcome,
    RunStore,
    Workspace,
)
from deltacontrol.theory.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
BASE = ["deltacontrol", "ding2023parameter"]


def parsed(text: str) -> dict[str, dict[str, str]]:
    """Fields of each entry by key, read brace by brace: fails on anything that is no BibTeX."""
    entries: dict[str, dict[str, str]] = {}
    rest = re.sub(r"(?m)^%.*$", "", text).strip()
    while rest:
        head = re.match(r"@(misc|article|inproceedings)\{([a-z0-9]+),\s*", rest)
        assert head, rest[:80]
        assert head[2] not in entries, f"{head[2]} is there twice"
        rest, fields = rest[head.end() :], {}
        while not rest.startswith("}"):
            name = re.match(r"([a-z]+) = \{", rest)
            assert name and name[1] not in fields, rest[:80]
            end, depth = name.end(), 1
            while depth:
                depth += {"{": 1, "}": -1}.get(rest[end], 0)
                end += 1
            fields[name[1]] = " ".join(rest[name.end() : end - 1].split())
            rest = rest[end:].removeprefix(",").lstrip()
        entries[head[2]] = fields
        rest = rest[1:].lstrip()
    return entries


def record(config: dict, result: dict | None = None) -> Record:
    return Record("a", "fine-tuning", config, result or {}, {}, "completed")


def test_every_method_carries_valid_entries() -> None:
    texts: dict[str, str] = {}
    for name, method in available().items():
        entries = parsed(cite(name))
        own = [key for key in entries if key not in BASE]
        assert own, f"{name} names {method.reference} but has no BibTeX"
        for key in own:
            fields = entries[key]
            assert fields.keys() >= {"author", "title", "year"}, key
            assert {"booktitle", "journal", "eprint"} & fields.keys(), key
            assert f"{fields['year']}" in key and 1990 < int(fields["year"]) < 2027, key
            # What the short reference says is what the entry says.
            family = fields["author"].split(",")[0].split()[-1]
            plain = re.sub(r"\{\\.(\w)\}", ".", family)
            assert re.search(plain, method.reference), (key, method.reference)
            if "eprint" in fields:
                assert fields["archiveprefix"] == "arXiv"
                assert fields["eprint"] in method.reference, key
            assert "\t" not in cite(name) and cite(name).isascii()
            # One paper has one entry, whichever methods it is cited for.
            assert texts.setdefault(key, str(fields)) == str(fields), key


def test_what_is_cited() -> None:
    assert list(parsed(cite())) == BASE
    lora = list(parsed(cite("lora:rank=2")))
    assert lora[:3] == [*BASE, "hu2022lora"]
    assert list(parsed(cite(LoRA()))) == list(parsed(cite({"name": "lora"}))) == lora
    both = list(parsed(cite(["lora", "bitfit", "lora"])))
    assert both == [*lora, "benzaken2022bitfit"]
    config = {"deltas": [{"name": "lora", "rank": 3}, {"name": "bitfit"}]}
    assert list(parsed(cite(record(config)))) == both
    assert list(parsed(cite(record({"delta": {"name": "peft LORA"}}, config)))) == both
    assert list(parsed(cite(record({"seed": 1})))) == BASE
    assert "lester2021power" in parsed(cite("subspace:dimension=5,of=prompt:length=3"))
    with pytest.raises(InputError, match="nearest: .*lora"):
        cite("lroa")


def test_a_delta_without_entries_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoRA, "bibtex", "")
    assert f"% lora: {LoRA.reference}" in cite("lora").splitlines()
    assert list(parsed(cite("lora"))) == BASE


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._main(["cite", "--delta", "prompt"]) == 0
    assert list(parsed(capsys.readouterr().out)) == [*BASE, "lester2021power"]
    assert cli._main(["--version"]) == 0
    assert capsys.readouterr().out == f"deltacontrol {citing.version()}\n"


def test_citation_file_cites_the_software() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    top = dict(re.findall(r"(?m)^([a-z-]+): *(.*)$", text))
    assert top["type"] == "software" and "preferred-citation" not in top
    assert top["title"].strip('"') == citing.TITLE and top["version"] == project["version"]
    assert [author["name"] for author in project["authors"]] == ["deltacontrol authors"]
    assert '- name: "deltacontrol authors"' in text and "references" in top
    entry = parsed(cite())["ding2023parameter"]
    reference = text.split("references:")[1]
    assert f"doi: {entry['doi']}" in reference and entry["title"] in reference
    people = re.findall(r"given-names: ([^,]+), family-names: ([^}]+)\}", reference)
    assert entry["author"].split(" and ") == [f"{family}, {given}" for given, family in people]


@pytest.mark.parametrize("wrong", [[None], ["lora", None], [[None]]])
def test_nothing_within_a_list_is_not_cited(wrong) -> None:
    with pytest.raises(InputError, match="cannot cite None"):
        cite(wrong)


def metadata() -> tuple[dict, dict, dict, str]:
    """pyproject, .zenodo.json, codemeta.json, CITATION.cff."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    zenodo, codemeta = (
        json.loads((ROOT / name).read_text(encoding="utf-8"))
        for name in (".zenodo.json", "codemeta.json")
    )
    return project, zenodo, codemeta, (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_files_for_archives_say_what_the_project_says() -> None:
    project, zenodo, codemeta, citation = metadata()
    top = dict(re.findall(r"(?m)^([a-z-]+): *(.*)$", citation))
    keywords = re.findall(r"(?m)^  - (.+)$", citation.split("keywords:")[1].split("references:")[0])
    authors = [author["name"] for author in project["authors"]]
    doi = parsed(cite())["ding2023parameter"]["doi"]
    assert zenodo["title"] == codemeta["name"] == top["title"].strip('"') == citing.TITLE
    assert zenodo["version"] == codemeta["version"] == top["version"] == project["version"]
    assert zenodo["license"] == top["license"] == project["license"]
    assert codemeta["license"] == f"https://spdx.org/licenses/{project['license']}"
    assert zenodo["description"] == codemeta["description"] == project["description"]
    assert zenodo["keywords"] == codemeta["keywords"] == keywords
    assert set(keywords) <= set(project["keywords"])
    assert [creator["name"] for creator in zenodo["creators"]] == authors
    assert [author["name"] for author in codemeta["author"]] == authors
    assert codemeta["softwareRequirements"] == project["dependencies"]
    assert codemeta["runtimePlatform"] == f"Python {project['requires-python']}"
    assert [r["identifier"] for r in zenodo["related_identifiers"]] == [doi]
    reference = codemeta["referencePublication"]
    assert reference["identifier"].endswith(doi)
    assert reference["name"] == parsed(cite())["ding2023parameter"]["title"]
    assert zenodo["upload_type"] == top["type"] == "software"


def test_the_readme_has_the_entries_that_the_command_prints(capsys) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert cli._main(["cite"]) == 0
    written = readme.split("<!-- cite:begin -->\n")[1].split("<!-- cite:end -->")[0]
    assert written == f"```bibtex\n{capsys.readouterr().out.strip()}\n```\n"


def test_a_run_a_committed_search_and_an_imported_adapter_are_cited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command, of records of three kinds."""
    store = RunStore(tmp_path)

    def cited(run_id: str) -> list[str]:
        assert cli._main(["cite", run_id, "--runs", str(tmp_path)]) == 0
        return list(parsed(capsys.readouterr().out))

    committed = {r.kind: r for r in RunStore(tmp_path, committed=COMMITTED).listed()}
    bound = committed["generalisation-bound"]
    assert bound.config["delta"]["of"].startswith("selected-modules")
    assert cited(bound.id) == [*BASE, *own("subspace"), *own("selected-modules")]
    assert cited(committed["solver-trace"].id) == [*BASE, *own("lora")]
    # The search of a dimension trains a subspace, by a method that its configuration names.
    search = next(
        r for r in RunStore(tmp_path, committed=COMMITTED).listed()
        if r.kind == "dimension" and r.config["method"] == "said" and not r.config["delta"]
    )  # fmt: skip
    assert cited(search.id) == [*BASE, *own("said")]
    # Several deltas, one inside of another, as a fine-tuning records them.
    deltas = [{"name": "bitfit"}, {"name": "subspace", "dimension": 3, "of": "lora:rank=2"}]
    trained = store.write(Recorded("fine-tuning", {"deltas": deltas}), {}, frame())
    assert cited(trained.id) == [*BASE, *own("bitfit"), *own("subspace"), *own("lora")]
    # An adapter of peft: its result names the deltas that it is.
    result = {"deltas": [{"name": "lora", "rank": 2}]}
    adapter = store.write(Recorded("peft-import", {"adapter": "x"}), result, frame())
    assert cited(adapter.id) == [*BASE, *own("lora")]


def own(name: str) -> list[str]:
    return [key for key in parsed(cite(name)) if key not in BASE]


def frame() -> pd.DataFrame:
    return pd.DataFrame({"step": [1]})


class Recorded(Experiment):
    """An experiment of any kind and configuration, to be written as a record."""

    def __init__(self, kind: str, config: dict) -> None:
        self.kind, self.config = kind, config  # type: ignore[misc]

    def to_config(self) -> dict:
        return self.config

    def digests(self) -> Digests:
        return Digests()

    def code(self) -> None:
        return None

    def execute(self, workspace: Workspace) -> Outcome:
        raise NotImplementedError


PAPER = ROOT / "paper"


def test_the_paper_cites_what_is_in_its_list_and_nothing_else_is_there() -> None:
    text = (PAPER / "paper.md").read_text(encoding="utf-8")
    entries = re.findall(r"(?m)^@(\w+)\{(\w+),$", (PAPER / "paper.bib").read_text("utf-8"))
    keys = [key for _, key in entries]
    assert len(set(keys)) == len(keys)
    assert set(re.findall(r"@([a-z]+\d{4}[a-z]+)", text)) == set(keys)
    head = text.split("---\n")[1]
    assert f'title: "{citing.TITLE}"' in head and "- name: deltacontrol authors" in head
    pictures = re.findall(r"\]\(([^)]+\.png)\)", text)
    assert len(pictures) >= 2 and all((PAPER / picture).is_file() for picture in pictures)


def test_the_papers_list_says_of_the_article_what_is_cited() -> None:
    bib = re.sub(r"\s+", " ", (PAPER / "paper.bib").read_text(encoding="utf-8"))
    assert re.sub(r"\s+", " ", citing.ARTICLE).strip() in bib


def test_the_papers_table_is_that_of_the_scoreboard() -> None:
    text = (PAPER / "paper.md").read_text(encoding="utf-8")
    table = text.split("<!-- claims:begin -->\n")[1].split("<!-- claims:end -->")[0]
    rows = {row["#"]: row for row in board.rows()}
    head, _, *lines = table.splitlines()
    names = [cell.strip() for cell in head.strip("|").split("|")]
    verdicts = set()
    for line in lines:
        row = rows[line.split("|")[1].strip()]
        told = row | {"verdict": row["verdict"].partition(", ")[0]}
        cells = (str(told[name]).replace("|", r"\|") for name in names)
        wanted = "| " + " | ".join(cells) + " |"
        assert line == wanted, f"paper/paper.md has {line}, and the scoreboard {wanted}"
        verdicts.add(told["verdict"])
    assert verdicts >= {"holds", "fails", "inconclusive"}


@pytest.mark.parametrize(
    "name",
    ["CODE_OF_CONDUCT.md", "paper/paper.md", "docs/guide.md", ".zenodo.json", "codemeta.json",
     *(f".github/ISSUE_TEMPLATE/{kind}.md" for kind in ("bug", "claim", "method"))],
)  # fmt: skip
def test_no_text_names_a_machine_or_a_host_of_packages(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"/work/|/root/|/home/\w|/tmp/|pypi|index-url", text, re.IGNORECASE)
    if name.startswith(".github"):
        head = text.split("---\n")[1]
        assert all(f"{field}: " in head for field in ("name", "about", "labels"))
