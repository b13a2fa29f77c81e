"""analysis.py on run folders made by hand: every expected number can be checked by eye."""

import csv
import json
import re

import numpy as np
import pytest
import torch

import analysis
import data
import eval as evaluation
import train
from data import InputError
from miniature import world

TYPES = {"xgqa": ("verify", "query"), "xvnli": ("entailment", "neutral")}


def scores_of(task, number):
    """Scores of one language: `number` everywhere, 10 more on the second type of questions."""
    if task == "xflickrco":
        return {"text_recall_at_1": number, "image_recall_at_1": number + 1}
    first, second = TYPES[task]
    by_type = {first: {"accuracy": number, "n": 2}, second: {"accuracy": number + 10, "n": 2}}
    return {"accuracy": number, "n": 4, "by_type": by_type}


def write_run(folder, numbers, model="cclm", task="xgqa", strategy="standard", seed=0, epochs=None,
              miniature=False, recipe=None, files=None, few_shot=None, **more):
    """A finished run. numbers: after each epoch evaluated (English, others); epochs: of the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, languages = [], data.LANGUAGES[task]
    epochs = epochs or len(numbers)
    for epoch, (english, others) in enumerate(numbers, start=epochs - len(numbers) + 1):
        results = {}
        for language in languages:
            results[language] = scores_of(task, english if language == "en" else others)
        lines.append({"step": epoch, "epoch": epoch, "languages": results})
    del lines[-1]["epoch"]  # as train.py writes the last evaluation
    log = "".join(json.dumps(line) + "\n" for line in [{"step": 1, "epoch": 1, "loss": 1.0}, *lines])
    (folder / "log.jsonl").write_text(log)
    results = {"model": model, "task": task, "strategy": strategy, "seed": seed} | lines[-1]
    (folder / "results.json").write_text(json.dumps(results))
    args = {"model": model, "task": task, "seed": seed, "miniature": miniature, "few_shot": few_shot,
            "shots": None, "init": None, "limit": None, "precision": "float32", "data": "/data",
            "checkpoint": "/model.pt", "tokenizer": "/tokenizer.model", "workers": 0}
    stored = {"args": args | more, "recipe": {"epochs": epochs, "lr": 1e-3} | (recipe or {}),
              "fingerprints": files or {"/model.pt": "a"}, "not_as_in_the_paper": []}
    (folder / "args.json").write_text(json.dumps(stored))
    return folder


def analyse(out, *arguments):
    analysis.main([*map(str, arguments), "--out", str(out)])


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def row_of(path, **wanted):
    """The one row of a CSV file whose columns are as wanted; `name` is the first column."""
    wanted = {"" if column == "name" else column: str(content) for column, content in wanted.items()}
    [row] = [row for row in rows_of(path) if wanted.items() <= row.items()]
    return row


# ---- The paper's numbers

def test_paper_numbers():
    """Every printed mean is that of its row, but for what footnotes or rounding explain."""
    for line in analysis.PAPER.splitlines():
        key = line.split()[:4]
        if key[1] == "top6" or key[3] == "similarity":
            continue
        row = analysis.paper(*key)
        mean = row.pop("others")
        assert row.keys() == set(data.LANGUAGES[key[2]])
        if key == ["uc2", "standard", "xflickrco", "image_recall_at_1"]:
            mean = 21.957
        del row["en"]
        assert np.mean(list(row.values())) == pytest.approx(mean, abs=0.08)
    assert analysis.paper("cclm", "suf", "xgqa", "accuracy")["ko"] == 42.2
    assert analysis.paper("cclm", "top6", "xgqa", "accuracy") == {"en": 61.9, "others": 49.7}
    assert analysis.paper("uc2", "suf", "xvnli", "similarity")["fr"] == 89
    assert analysis.paper("uc2", "decay0.88", "xgqa", "accuracy") is None


# ---- Tables

def test_tables(tmp_path, capsys):
    runs = tmp_path / "runs"
    write_run(runs / "a", [(60, 40)], seed=0)
    write_run(runs / "b", [(62, 44)], seed=1)
    write_run(runs / "c", [(61, 50)], strategy="suf")
    write_run(runs / "d", [(80, 60)], "uc2", "xvnli")
    write_run(runs / "e", [(30, 20)], "uc2", "xflickrco")
    (runs / "unfinished").mkdir()
    (runs / "unfinished" / "args.json").write_text("{}")
    analyse(tmp_path, "tables", runs)
    row = row_of(tmp_path / "table5.csv", name="CCLM, standard")
    assert (float(row["en"]), float(row["de"]), float(row["others"])) == (61, 42, 42)
    assert float(row["de sd"]) == pytest.approx(2.8284, abs=1e-4) and row["de n"] == "2"
    overview = tmp_path / "table1.csv"
    assert [row[""] for row in rows_of(overview)] == [
        "UC2, standard", "UC2, standard: paper", "CCLM, standard", "CCLM, standard: paper", "CCLM, SUF",
        "CCLM, SUF: paper"]
    row = row_of(overview, name="UC2, standard")
    assert (row["XVNLI others"], row["TR@1 en"], row["IR@1 en"], row["xGQA en"]) == ("60.0", "30.0", "31.0", "")
    # the paper's numbers beside ours; a footnote tells where its tables contradict each other
    row = row_of(overview, name="UC2, standard: paper")
    assert (row["XVNLI others"], row["TR@1 others"]) == ("61.9", "18.0")
    assert row_of(tmp_path / "table6.csv", name="UC2, standard: paper", metric="IR@1")["de"] == "39.3"
    out = capsys.readouterr().out
    assert "Table 5: xGQA by language\n" in out and "61.0 ± 1.4 (2)" in out
    assert "61.9 and 61.7 in its Table 4" in out and out.endswith(f"figures (PNG): {tmp_path}\n")
    latex = (tmp_path / "table5.tex").read_text()
    assert r"\begin{tabular}{lrrrrrrrrrr}" in latex
    assert r"CCLM, SUF & accuracy & 61.0 & 50.0 &" in latex and r"61.0 $\pm$ 1.4 (2)" in latex


def test_the_miniature_says_so(tmp_path, capsys):
    """And stands without the paper's numbers, in every table and figure."""
    write_run(tmp_path / "a", [(50, 40), (60, 45)], "uc2", miniature=True)
    for command in ("tables", "strategies", "curves", "types"):
        analyse(tmp_path / "out", command, tmp_path / "a")
    out = capsys.readouterr().out
    titles = [line for line in out.splitlines() if re.match(r"(Table|Figure) \d", line)]
    assert len(titles) == 5 and all(title.endswith(", miniature") for title in titles)
    assert "paper" not in out


def test_strategies(tmp_path):
    """Table 2 with the paper's "CM only"; Figure 5's points are the pure decays."""
    for strategy, others in (("standard", 40), ("suf", 50), ("top6", 48), ("decay0.98", 41),
                             ("decay0.75", 39), ("decay0.9-frozen-embeddings", 30)):
        write_run(tmp_path / strategy, [(60, others)], strategy=strategy)
    [table] = analysis.strategies(analysis.find_runs([str(tmp_path)]))
    names = [row[""] for row in table.rows]
    top = names.index("CCLM, top 6 layers only")
    assert table.rows[top]["others"] == [48]
    printed = {"": "CCLM, top 6 layers only: paper", "metric": "accuracy", "en": 61.9, "others": 49.7}
    assert table.rows[top + 1] == printed
    [panel] = table.panels
    assert panel.lines == {"layer-wise decay": ([0.75, 0.98], [[39], [41]]),
                           "standard": ([0.75, 0.98], [[40], [40]]), "SUF": ([0.75, 0.98], [[50], [50]])}


def test_fewshot(tmp_path, capsys):
    """Before and after; runs with other languages have rows of their own; English runs by their weights."""
    runs = tmp_path / "runs"
    for strategy, before in (("standard", 40), ("suf", 50)):
        english = write_run(runs / f"en-{strategy}", [(60, before)], "uc2", strategy=strategy)
        (english / "model.pt").write_text(strategy)
        files = {"/old/model.pt": data.fingerprint(str(english / "model.pt"))}
        for language, after in (("de", 52), ("ko", 54)):
            write_run(runs / f"{language}-{strategy}", [(60, after)], "uc2", few_shot=language,
                      shots=48, init=f"/gone/en-{strategy}", files=files)
    write_run(runs / "zh", [(60, 10)], "uc2", few_shot="zh", shots=48, init="/gone/en-suf", files=files)
    analyse(tmp_path, "fewshot", runs)
    rows = rows_of(tmp_path / "fewshot-uc2-xgqa-48.csv")
    columns = ("", "mean of", "accuracy zero-shot", "accuracy few-shot")
    assert [tuple(row[column] for column in columns) for row in rows] == [
        ("standard", "de ko", "40.0", "53.0"), ("SUF", "de ko zh", "50.0", str((52 + 54 + 10) / 3))]
    assert "with SUF in the English training 41.3 to 46.7" in capsys.readouterr().out
    (runs / "en-suf" / "model.pt").write_text("trained again since")
    with pytest.raises(InputError, match="de-suf: its English run /gone/en-suf is not among these runs"):
        analyse(tmp_path, "fewshot", runs)


# ---- Figures

def test_curves(tmp_path, capsys):
    write_run(tmp_path / "a", [(50, 40), (60, 44)], seed=0)
    write_run(tmp_path / "b", [(52, 44), (64, 46)], seed=1)
    write_run(tmp_path / "c", [(60, 50)], strategy="suf", epochs=2)
    write_run(tmp_path / "d", [(60, 50)], "uc2", epochs=2)
    analyse(tmp_path, "curves", *(tmp_path / name for name in "abcd"))
    rows = rows_of(tmp_path / "curves-cclm-xgqa-accuracy.csv")
    assert [(row["epoch"], row["en"], row["bn"], row["others sd"][:4]) for row in rows] == [
        ("1", "51.0", "42.0", "2.82"), ("2", "62.0", "45.0", "1.41")]
    assert rows[0][""] == "standard (seeds: 2)"
    out = capsys.readouterr().out
    assert "* left out, not evaluated after every epoch: standard" in out
    assert "* left out, not evaluated after every epoch: SUF" in out


def test_types(tmp_path):
    """The mean of the others by type; what was tested at the end only has its last epoch."""
    write_run(tmp_path / "a", [(50, 40), (60, 44)], task="xvnli")
    write_run(tmp_path / "b", [(60, 50)], task="xvnli", strategy="suf", epochs=2)
    analyse(tmp_path, "types", tmp_path / "a", tmp_path / "b")
    path = tmp_path / "types-cclm-xvnli.csv"
    row = row_of(path, name="neutral", epoch=2)
    assert (row["standard"], row["SUF"]) == ("54.0", "60.0")
    row = row_of(path, name="entailment", epoch=1)
    assert (row["standard"], row["SUF"]) == ("40.0", "")


def test_pictures(tmp_path, capsys):
    """With matplotlib PNG files, without it a line that says so; curves with the spread over seeds."""
    write_run(tmp_path / "a", [(50, 40), (60, 44)])
    write_run(tmp_path / "b", [(52, 44), (64, 46)], seed=1)
    analyse(tmp_path, "curves", tmp_path / "a", tmp_path / "b")
    analyse(tmp_path, "schedule")
    cclm, _ = analysis.suf_epochs([])
    fields = cclm.panels[0].fields  # bottom layer first, an epoch per column
    assert fields[:, 0].tolist() == [False] * 15 + [True] * 3
    assert fields.sum(0).tolist() == [3, 6, 9, 12, 15, 18, 18]
    said = capsys.readouterr().out
    for name in ("schedule-cclm", "curves-cclm-xgqa-accuracy"):
        path = tmp_path / f"{name}.png"
        if path.is_file():
            assert path.read_bytes().startswith(b"\x89PNG")
        else:
            assert f"no {path}: matplotlib is not installed" in said


def test_similarities():
    """Two languages, two items; the second language says the same twice, the third the opposite."""
    vectors = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    # of different items: en-en 0, 0; en-de 1, 0; de-en 0, 1; de-de 1, 1
    assert analysis.unpaired(vectors) == pytest.approx(50)
    vectors = torch.stack([*vectors, -vectors[0]])
    assert analysis.similarity(vectors)[0].tolist() == [100, 50, -100]


@torch.inference_mode()
def test_alignment(tmp_path):
    """Against one text at a time, through the whole model; the table's row is that with English."""
    args = train.parse_args(["--model", "uc2", "--task", "xvnli", "--limit", "5"])
    args.data, args.checkpoint, args.tokenizer = world.prepare("uc2")
    model, _, recipe, _ = train.load_model(args, "cpu", 0)
    folder = write_run(tmp_path / "run", [(60, 40)], "uc2", "xvnli", recipe=vars(recipe), limit=5,
                       miniature=True, data=args.data, tokenizer=args.tokenizer)
    train.write_weights(str(folder / "model.pt"), model)
    [table] = analysis.alignment(analysis.find_runs([str(folder)]))

    loaded = evaluation.load_run(str(folder), torch.device("cpu"))
    model, tokenizer, labels, args, recipe = loaded
    model.eval()
    split = evaluation.load_split(args, recipe, tokenizer, labels, "test", ["en", "fr"])
    cosines = []
    for i in range(5):
        states = []
        for language, examples in split.examples.items():
            memory = model.memory(split.pictures.batch(split.image_rows[language][i : i + 1]))
            input_ids, mask = data.pad([examples.tokens[i]])
            states.append(model.fuse(model.encode_texts(input_ids, mask), mask, memory)[0, 0])
        cosines.append(torch.cosine_similarity(*states, dim=0).item())
    [row] = table.rows
    assert row["fr"] == [pytest.approx(100 * np.mean(cosines), abs=1e-3)]
    assert row["en"] == [pytest.approx(100, abs=1e-3)]
    languages = list(data.LANGUAGES["xvnli"])
    assert table.panels[0].rows == languages and table.panels[0].fields.shape == (5, 5)
    assert table.panels[0].fields[0, languages.index("fr")] == pytest.approx(row["fr"][0])


# ---- What is refused, in one line

@pytest.mark.parametrize("other, message", [
    ({}, "the same strategy and seed twice"),
    ({"seed": 1, "recipe": {"lr": 0.5}}, "differ in lr"),
    ({"seed": 1, "limit": 8}, "differ in limit"),
    ({"seed": 1, "answers": "reference"}, "differ in answers"),
    ({"seed": 1, "precision": "bf16"}, "differ in precision"),
    ({"seed": 1, "questions_per_image": 4}, "differ in questions_per_image"),
    ({"seed": 1, "first_image_negatives": True}, "differ in first_image_negatives"),
    ({"seed": 1, "files": {"/model.pt": "b"}}, "differ in data, checkpoint or tokenizer"),
])
def test_runs_that_cannot_share_a_table(other, message, tmp_path):
    a = write_run(tmp_path / "a", [(60, 40)])
    b = write_run(tmp_path / "b", [(60, 40)], **other)
    with pytest.raises(InputError, match=message):
        analyse(tmp_path, "tables", a, b)


@pytest.mark.parametrize("command, task", [("curves", "xgqa"), ("fewshot", "xgqa"),
                                           ("types", "xflickrco"), ("alignment", "xflickrco")])
def test_runs_without_what_a_command_needs(command, task, tmp_path):
    run = write_run(tmp_path / "a", [(60, 40)], task=task, epochs=5)
    with pytest.raises(InputError, match="none of these runs has what this needs"):
        analyse(tmp_path, command, run)


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(InputError, match="nothing: no finished run of train.py there"):
        analyse(tmp_path, "tables", tmp_path / "nothing")
    run = write_run(tmp_path / "a", [(60, 40)])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: cannot be written"):
        analyse(tmp_path / "file", "tables", run)
    with pytest.raises(InputError, match="/gone.*--data"):
        write_run(tmp_path / "b", [(60, 40)], "uc2", "xvnli", data="/gone", tokenizer="/gone")
        analyse(tmp_path, "alignment", tmp_path / "b")
