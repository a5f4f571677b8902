"""BibTeX of the software, the article and the methods; the citation file."""

import re
import tomllib
from pathlib import Path

import pytest

from deltacontrol.deltas import LoRA
from deltacontrol.deltas.registry import available
from deltacontrol.experiments.cli import main as cli
from deltacontrol.experiments.runs import citing
from deltacontrol.experiments.runs.citing import cite
from deltacontrol.experiments.runs.record import Record
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
