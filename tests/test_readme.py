"""The README keeps its promises: commands parse, files and tests exist, numbers were measured or are the paper's."""

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
import recipes

README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
BLOCKS = re.findall(r"<!-- measured: (\S+) -->\n(.*?)<!-- end -->", README, re.DOTALL)


def commands():
    """(script, words) of every command in bash blocks and in `…`. Shell variables have their (first) value."""
    shell = "\n".join(text for language, text in FENCED if language == "bash").replace("\\\n", " ")
    variables = dict(re.findall(r'^(\w+)="(.*)"$', shell, re.MULTILINE) + re.findall(r"\bfor (\w+) in (\S+)", shell))
    inline = re.findall(r"`((?:python|torchrun) [^`]*)`", PROSE)
    for line in re.split(r"\n|;|&&", re.sub(r"#.*", "", shell)) + inline:
        found = re.search(r"\b(?:python|torchrun\b.*?) (\S+\.py)\b(.*)", line)
        if found:
            yield found[1], tuple(shlex.split(string.Template(found[2]).safe_substitute(variables)))


class Parsed(Exception):
    """The command line was understood."""


COMMANDS = list(dict.fromkeys(commands()))


@pytest.mark.parametrize("script, words", COMMANDS, ids=[" ".join((script, *words)) for script, words in COMMANDS])
def test_command_is_understood(script, words, monkeypatch):
    if script == "train.py":
        recipes.parse_args(list(words), None)  # also refuses flags that contradict each other
        return
    understand = argparse.ArgumentParser.parse_args

    def parse_only(parser, *arguments):
        understand(parser, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(Parsed):
        importlib.import_module(Path(script).stem).main()


def test_commands_were_found():
    """The rows of Tables 1, 4, 5 and 6, and every script with a command line."""
    runs = [recipes.parse_args(list(words), None) for script, words in COMMANDS if script == "train.py"]
    real = {(run.model, run.task, recipes.strategy_name(run)) for run in runs if run.data}
    assert real >= {(model, task, strategy) for model in ("uc2", "cclm") for task in ("xgqa", "xvnli", "xflickrco")
                    for strategy in ("standard", "suf")}
    others = {"analysis.py", "data.py", "eval.py", "mini.py", "schedule.py", "tests/benchmark.py"}
    assert {script for script, _ in COMMANDS} >= others
    for words in (words for _, words in COMMANDS if "--" in words):  # what `reproduce` hands on
        recipes.parse_args(["--model", "cclm", "--task", "xgqa", *words[words.index("--") + 1 :]], None)


def test_file_tree():
    tree = re.search(r"## Files\n+```text\n(.*?)```", README, re.DOTALL)[1]
    named = [line.split()[0] for line in tree.splitlines()]
    assert [name for name in named if not list(ROOT.glob(name.rstrip("/")))] == []
    assert {path.name for path in ROOT.glob("*.py")} - set(named) == set()
    linked = re.findall(r"\]\((?!https?:|#)([^)]+)\)", PROSE)
    assert [path for path in linked if not (ROOT / path).exists()] == []


def test_named_tests_exist():
    sources = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", README))
    assert named and named - defined == set()


NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
UNITS = r"(?=\s(?:seconds|minutes|CPU minutes|points|%))"


def numbers_of(text):
    """-> (table rows: first cell, then the numbers of the others; of the prose the numbers with a point or a unit)."""
    rows = [[name.strip(), *re.findall(NUMBER, " ".join(others))]
            for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
            for name, *others in (row.strip("|").split("|") for row in table.splitlines()[2:])]
    prose = re.sub(r"^\|.*\n", "", text, flags=re.MULTILINE)
    return rows, re.findall(rf"-?\d[\d,]*\.\d+|{NUMBER}{UNITS}", prose)


@pytest.mark.parametrize("name, text", BLOCKS, ids=[name for name, _ in BLOCKS])
def test_numbers_were_measured(name, text):
    """Each in its place: measured.json has them row by row, and those of the prose in the order of the text."""
    measured = json.loads((ROOT / "measured.json").read_text(encoding="utf-8"))[name]
    assert measured["command"]

    def rounded(shown, values):
        assert len(shown) == len(values)
        return [f"{value:,.{len(number.partition('.')[2])}f}" for number, value in zip(shown, values)]

    rows, prose = numbers_of(text.replace("−", "-"))
    assert [row[0] for row in rows] == [row[0] for row in measured["rows"]]
    for (row, *shown), (_, *values) in zip(rows, measured["rows"]):
        assert shown == rounded(shown, values), row
    assert prose == rounded(prose, measured["prose"])


def test_the_papers_table_1():
    section = re.search(r"## What SUF is\n(.*?)\n## ", README, re.DOTALL)[1]
    rows = re.findall(r"^\| ((?:UC2|CCLM)(?: \+ SUF)?) \|(.*)\|$", section, re.MULTILINE)
    columns = [("xgqa", "accuracy"), ("xvnli", "accuracy")]
    columns += [("xflickrco", "text_recall_at_1"), ("xflickrco", "image_recall_at_1")]
    for name, row in rows:
        arm = (name[:4].strip().lower(), "suf" if "SUF" in name else "standard")
        expected = []
        for column in columns:
            paper = analysis.paper(*arm, *column)
            expected += [paper["en"], analysis.PAPER_TABLE_1.get((*arm, *column), paper["others"])]
        assert [float(cell) for cell in row.split("|")] == expected, name
    assert len(rows) == 4
