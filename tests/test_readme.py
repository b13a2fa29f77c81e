"""README.md and docs/ keep their promises: commands parse, what is named exists, numbers were measured."""

import argparse
import importlib
import json
import re
import shlex
import string
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import analysis
import train

FILES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = {path: path.read_text(encoding="utf-8") for path in FILES}
README = PAGES[ROOT / "README.md"]
PROSE = {path: re.sub(r"```.*?```", "", text, flags=re.DOTALL) for path, text in PAGES.items()}
MEASURED = json.loads((ROOT / "docs" / "measured.json").read_text(encoding="utf-8"))
BLOCK = re.compile(r"<!-- measured: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)
BLOCKS = [(path.name, *block) for path, text in PAGES.items() for block in BLOCK.findall(text)]
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
UNIT = r"(?=\s(?:seconds|minutes|points|%))"


def commands():
    """(program, words) of every command in bash blocks and in `…`; variables have their (first) value."""
    for path, text in PAGES.items():
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        shell = re.sub(r"\\\n|#.*", " ", "\n".join(blocks))
        variables = re.findall(r'^(\w+)="(.*)"$', shell, re.MULTILINE)
        variables = dict(variables + re.findall(r"\bfor (\w+) in (\S+)", shell))
        quoted = re.findall(r"`((?:python|torchrun) [^`]*)`", PROSE[path])
        for line in re.split(r"\n|;|&&", shell) + quoted:
            found = re.search(r"\b(?:python|torchrun\b.*?) (?:-m )?"
                              r"((?:tools|miniature)\.\w+|\S+\.py)\b(.*)", line)
            if found:
                words = string.Template(found[2]).safe_substitute(variables)
                yield found[1], tuple(shlex.split(words))


COMMANDS = list(dict.fromkeys(commands()))


class Parsed(Exception):
    """The command line was understood."""


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join((command[0], *command[1])))
def test_command_is_understood(command, monkeypatch):
    program, words = command
    if program == "train.py":
        train.parse_args(list(words))  # also refuses flags that contradict each other
        return
    for name in ("parse_args", "parse_intermixed_args"):
        def understood(parser, *arguments, parse=getattr(argparse.ArgumentParser, name)):
            parse(parser, *arguments)
            raise Parsed
        monkeypatch.setattr(argparse.ArgumentParser, name, understood)
    monkeypatch.setattr(sys, "argv", [program, *words])
    with pytest.raises(Parsed):
        importlib.import_module(Path(program).stem if program.endswith(".py") else program).main()


def test_commands_were_found():
    """The rows of Tables 1, 4, 5 and 6, and every program that has a command line."""
    runs = [train.parse_args(list(words)) for program, words in COMMANDS if program == "train.py"]
    real = {(run.model, run.task, train.strategy_name(run)) for run in runs if run.data == "IGLUE"}
    assert real >= {(*pair, strategy) for pair in train.RECIPES for strategy in ("standard", "suf")}
    programs = {f"tools.{path.stem}" for path in ROOT.glob("tools/[!_]*.py")}
    programs |= {"analysis.py", "eval.py", "schedule.py", "miniature.pretrain", "tests/benchmark.py"}
    assert programs - {program for program, _ in COMMANDS} == set()
    for words in (words for _, words in COMMANDS if "--" in words):  # what tools.reproduce hands on
        train.parse_args(["--model", "cclm", "--task", "xgqa", *words[words.index("--") + 1 :]])


def test_readme_is_short_and_lengths_are_true():
    assert len(README.splitlines()) <= 250
    # "schedule.py … 150 lines", or a row of a table "| `schedule.py` | 150 |"
    named = dict(re.findall(r"^[\W\d]*\b([\w/]+\.py)\b.*?\b(\d[\d,]*) (?:lines|\|)", README, re.MULTILINE))
    assert {path.name for path in ROOT.glob("*.py")} - set(named) == set()
    for name, said in named.items():
        lines = (ROOT / name).read_text(encoding="utf-8").count("\n")
        assert lines == pytest.approx(int(said.replace(",", "")), rel=0.15), name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_is_named_exists(path):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", PROSE[path]):
        page = (path.parent / target).resolve() if target else path
        assert page.exists(), target
        headings = re.findall(r"^#+ (.*)", PAGES.get(page, "").lower(), re.MULTILINE)
        assert anchor in ["", *(re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings)]
    for name in re.findall(r"`((?:tests|docs|tools|miniature)/[\w./]+|\w+\.py)`", PROSE[path]):
        assert (ROOT / name).exists(), name
    sources = "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("tests/test_*.py"))
    for name in re.findall(r"`(test_\w+)`", PROSE[path]):
        assert f"\ndef {name}(" in sources, name


@pytest.mark.parametrize("page, name, text", BLOCKS, ids=[": ".join(block[:2]) for block in BLOCKS])
def test_numbers_were_measured(page, name, text):
    """Each in its place: of a row those behind its first cell, of the prose those with point or unit."""
    if not text.strip():
        pytest.skip("still to be measured")
    measured, rows = MEASURED[name], []
    assert measured["command"]
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows += [row.strip("|").split("|") for row in table.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == [row[0] for row in measured["rows"]]
    places = []
    for row, values in zip(rows, measured["rows"]):
        places.append((re.findall(NUMBER, " ".join(row[1:])), values[1:]))
    prose = re.sub(r"(?m)^\|.*\n", "", text)
    places.append((re.findall(rf"-?\d[\d,]*\.\d+|{NUMBER}{UNIT}", prose), measured["prose"]))
    for shown, values in places:
        decimals = [len(said.partition(".")[2]) for said in shown]
        assert shown == [f"{value:,.{n}f}" for value, n in zip(values, decimals, strict=True)]


def test_every_measurement_is_shown():
    assert set(MEASURED) == {name for _, name, text in BLOCKS if text.strip()}


PAPER_TABLE_1 = {  # means that its Tables 4 and 6 print differently
    ("uc2", "standard", "xvnli", "accuracy"): 61.7,
    ("uc2", "suf", "xvnli", "accuracy"): 61.2,
    ("cclm", "suf", "xflickrco", "text_recall_at_1"): 66.7,
}


def test_the_papers_table_1():
    columns = [("xgqa", "accuracy"), ("xvnli", "accuracy"), ("xflickrco", "text_recall_at_1"),
               ("xflickrco", "image_recall_at_1")]
    rows = re.findall(r"^\| (UC2|CCLM)( \+ SUF)? \|((?: +\d+\.\d \|){8})$", README, re.MULTILINE)
    for model, suf, row in rows:
        expected = []
        for column in columns:
            key = (model.lower(), "suf" if suf else "standard", *column)
            paper = analysis.paper(*key)
            expected += [paper["en"], PAPER_TABLE_1.get(key, paper["others"])]
        assert [float(cell) for cell in row.strip("|").split("|")] == expected, (model, suf)
    assert len(rows) == 4
