"""analysis.py and reproduce.py on small real runs of train.py, and their statistics against numbers worked out by hand.
"""

import csv
import json
import math
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import ROOT, train_command

import analysis
import data
import eval as evaluation
import mini_world
import probe
import recipes
import reproduce
import tables
import train
from analysis import at_english
from files import InputError
from model import read_checkpoint
from tables import pearson, sign_test, t_interval


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def row_of(path, **wanted):
    """The one row of a CSV file whose columns are as wanted; `name` is the first column."""
    wanted = {"" if column == "name" else column: str(content) for column, content in wanted.items()}
    [row] = [row for row in rows_of(path) if all(row[column] == content for column, content in wanted.items())]
    return row


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


RUNS = [("cclm", "xgqa", ["--eval-every-epoch", "--save-epochs"], 2),
        ("cclm", "xgqa", ["--suf", "--eval-every-epoch"], 2),
        ("cclm", "xgqa", ["--lr-decay", "0.88"], 1), ("uc2", "xvnli", ["--eval-every-epoch", "--save-epochs"], 1),
        ("uc2", "xflickrco", [], 1), ("cclm", "xflickrco", [], 1),
        ("uc2", "xgqa", [], 1), ("uc2", "xgqa", ["--suf"], 1)]


@pytest.fixture(autouse=True, scope="module")
def signals():
    """What runs in this process handles signals; afterwards all is as it was."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory):
    """The files of `tiny` with a smaller world: 40 questions, statements or captions per language to test."""
    folder = tmp_path_factory.mktemp("small")
    mini_world.WORLD_SIZES["tiny"] = mini_world.WorldSize(gqa_train=12, gqa_valid=4, gqa_dev=6, gqa_test=10,
                                                          shot_questions=1, xvnli_train=12,
                                                          xvnli_dev=4, xvnli_test=10, flickr_train=24, flickr_valid=4,
                                                          xflickrco_test=8)
    mini_world.write_world(folder / "data", seed=1, size="tiny")
    for name in ("cclm.pt", "uc2.pt", "tokenizer.model"):
        (folder / name).symlink_to(tiny / name)
    return folder


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """A folder of runs as train.py makes them, and few-shot runs in German that go on from two of them."""
    folder = tmp_path_factory.mktemp("runs")
    for model, task, flags, seeds in RUNS:
        for seed in range(seeds):
            name = recipes.strategy_name(recipes.parse_args(["--model", model, "--task", task, *flags], None))
            train.main(train_command(small, model, task, folder / f"{model}-{task}-{name}-seed{seed}", *flags,
                                     "--seed", seed)[2:])
    for strategy in ("standard", "suf"):
        train.main(["--few-shot", "de", "--shots", "48", "--init", str(folder / f"uc2-xgqa-{strategy}-seed0"),
                    "--workers", "0"])
    return folder


@pytest.fixture
def edited(runs, tmp_path):
    """Function: a copy of some runs in which the accuracies are the given ones.

    numbers: {run: [(English, every other language) per epoch]}.
    """

    def edit(numbers):
        for name, epochs in numbers.items():
            shutil.copytree(runs / name, tmp_path / "edited" / name)
            log = [json.loads(line) for line in (runs / name / "log.jsonl").read_text().splitlines()]
            evaluations = [entry for entry in log if "languages" in entry]
            for entry, (english, others) in zip(evaluations, epochs[-len(evaluations):], strict=True):
                for language, scores in entry["languages"].items():
                    scores["accuracy"] = english if language == "en" else others
            (tmp_path / "edited" / name / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
            (tmp_path / "edited" / name / "results.json").write_text(json.dumps(evaluations[-1]))
        return tmp_path / "edited"

    return edit


def analyse(*arguments):
    analysis.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """-> the one line with which a command ends."""
    with pytest.raises(SystemExit) as end:
        analyse(*arguments)
    error = capsys.readouterr().err.strip().split("\r")[-1]
    assert end.value.code == 2 and error.startswith("error: ") and "\n" not in error
    return error


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def test_t_interval():
    difference = t_interval([1.0, 2.0, 3.0])
    assert (difference.mean, difference.n, difference.positive) == (2.0, 3, 3)
    assert difference.low == pytest.approx(2 - 4.303 / math.sqrt(3)) and not difference.shown
    sleep = t_interval([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])  # Student's own example
    assert (sleep.mean, sleep.low, sleep.high) == pytest.approx((1.58, 0.7001, 2.4599), abs=1e-4) and sleep.shown
    assert t_interval([5.0])[:4] == (5.0, None, None, 1) and not t_interval([5.0]).shown


def test_sign_test():
    assert sign_test([1, 2, 3]) == 0.25 and sign_test([1, -1]) == 1.0 and sign_test([0, 0]) == 1.0
    assert sign_test([1, 1, 1, 1, 1, -1, 0]) == pytest.approx(2 * 7 / 64)


def test_pearson():
    assert pearson([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)
    assert pearson([1, 2, 3], [5, 5, 5]) is None and pearson([1, 2], [1, 2]) is None


def test_accuracy_at_a_given_english():
    curve = [(50.0, 40.0), (60.0, 44.0), (55.0, 41.0), (70.0, 38.0)]
    assert at_english(curve, 55.0) == pytest.approx(42.0)  # half-way up to the second epoch, not the third
    assert at_english(curve, 65.0) == pytest.approx(39.0)  # two thirds of the way from the third to the fourth
    assert at_english(curve, 45.0) == 40.0 and at_english(curve, 71.0) is None


def test_bootstrap():
    """Two images, one with two items that both got better, one with one that did not: drawn twice, once or
    never, the better one gives 100, 200/3 or 0.
    """
    outcomes = [(np.array([0, 0, 1]), np.array([1.0, 1.0, 0.0]))]
    low, high = evaluation.paired_bootstrap(outcomes, 4000)
    assert (low[0], high[0]) == (0.0, 100.0)
    many = [(np.arange(1000), np.array([1.0] * 300 + [0.0] * 700))]  # 30 points, standard error sqrt(0.3 * 0.7 / 1000)
    low, high = evaluation.paired_bootstrap(many, 4000)
    assert (low[0], high[0]) == pytest.approx((30 - 1.96 * 1.449, 30 + 1.96 * 1.449), abs=0.25)
    # and a language that always loses: the mean
    low, high = evaluation.paired_bootstrap([*many, (np.arange(1000), np.full(1000, -1.0))], 4000, [0, 1])
    assert (low, high) == pytest.approx((-35 - 1.96 * 1.449 / 2, -35 + 1.96 * 1.449 / 2), abs=0.15)


def test_similarities():
    vectors = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])  # two languages, two items
    assert probe.similarity(vectors).tolist() == [[1.0, 0.5], [0.5, 1.0]]
    # en-en 0, en-de 1/2, de-en 1/2, de-de 1
    assert probe.unpaired(vectors) == pytest.approx(0.75 * 0 + 0.25 + 0.25, abs=0.01)
    assert probe.unpaired(vectors) == probe.unpaired(vectors)


def test_paper_numbers():
    """Every row's mean is the printed one, but for the two that a footnote or rounding explains; alignment
    and accuracy correlate as section 5.1 says.
    """
    for model, strategy, task, metric in analysis.PAPER:
        row = analysis.paper(model, strategy, task, metric)
        others = [number for language, number in row.items() if language not in ("en", "others")]
        assert row.keys() - {"others"} == set(data.LANGUAGES[task])
        mean = 21.957 if (model, strategy, metric) == ("uc2", "standard", "image_recall_at_1") else row["others"]
        assert np.mean(others) == pytest.approx(mean, abs=0.08)
    for (task, strategy), (similarity, _) in analysis.PAPER_ALIGNMENT.items():
        accuracy = analysis.paper("uc2", strategy, task, "accuracy")
        assert pearson(list(similarity.values()), [accuracy[language] for language in similarity]) > 0.9


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def test_tables(runs, edited, tmp_path, capsys):
    analyse("tables", runs, "--out", tmp_path)
    out = capsys.readouterr().out
    numbers = [read(runs / f"cclm-xgqa-standard-seed{seed}" / "results.json")["languages"] for seed in (0, 1)]
    row = row_of(tmp_path / "table5.csv", name="CCLM, standard")
    for language in data.LANGUAGES["xgqa"]:
        a, b = (scores[language]["accuracy"] for scores in numbers)
        assert float(row[language]) == pytest.approx((a + b) / 2) and row[f"{language} n"] == "2"
        assert float(row[f"{language} sd"]) == pytest.approx(abs(a - b) / math.sqrt(2))
    assert float(
        row_of(tmp_path / "table1.csv", name="CCLM, standard")["xGQA others"]) == pytest.approx(float(row["others"]))
    # these runs are not on the miniature: the paper's numbers are beside them
    assert row_of(tmp_path / "table1.csv", name="UC2, standard: paper")["XVNLI others"] == "61.7"
    assert row_of(tmp_path / "table4.csv", name="UC2, standard: paper")["others"] == "61.9"
    assert "in its Table 1, but 61.9" in out and "German 39.3 may be a misprint" in out
    assert {row["recall"] for row in rows_of(tmp_path / "table6.csv")} == {"TR@1", "IR@1"}

    folder = edited({"cclm-xgqa-standard-seed0": [(0, 0), (60, 40)]})
    stored = read(folder / "cclm-xgqa-standard-seed0" / "args.json")
    stored["args"]["miniature"] = True
    (folder / "cclm-xgqa-standard-seed0" / "args.json").write_text(json.dumps(stored))
    analyse("tables", folder, "--out", tmp_path / "mini")
    assert [row[""] for row in rows_of(tmp_path / "mini" / "table1.csv")] == ["CCLM, standard"]

    folder = tmp_path / "retrieval" / "run"
    shutil.copytree(runs / "cclm-xflickrco-standard-seed0", folder)
    stored = read(folder / "args.json")
    stored["args"]["miniature"] = True
    (folder / "args.json").write_text(json.dumps(stored))
    analyse("tables", folder, "--out", tmp_path / "mini")
    row = row_of(tmp_path / "mini" / "table6.csv", name="baseline: CCLM, not fine-tuned", recall="TR@1")
    scores = read(folder / "not_fine_tuned.json")
    assert float(row["de"]) == scores["de"]["text_recall_at_1"] and scores["de"]["n_texts"] == 8


def test_curves_and_equal_english(edited, tmp_path):
    """At seed 0 both arms are compared where English is 60: standard is half-way between 44 and 40, SUF at its end.

    At seed 1 at 50.
    """
    folder = edited({"cclm-xgqa-standard-seed0": [(50, 44), (70, 40)], "cclm-xgqa-suf-seed0": [(40, 42), (60, 52)],
                     "cclm-xgqa-standard-seed1": [(30, 30), (50, 32)], "cclm-xgqa-suf-seed1": [(40, 40), (60, 44)],
                     "cclm-xgqa-decay0.88-seed0": [(60, 30)]})
    analyse("curves", folder, "--out", tmp_path)
    path = tmp_path / "curves-cclm-xgqa-accuracy.csv"
    assert [row["epoch"] for row in rows_of(path)] == ["1", "2"] * 2  # without the arm that was tested at the end only
    assert float(row_of(path, name="SUF", epoch=1)["de"]) == 41
    assert float(row_of(path, name="standard", epoch=2)["en"]) == 60
    row = row_of(tmp_path / "equal-english-cclm-xgqa-accuracy.csv", name="SUF")
    assert (float(row["English"]), float(row["standard there"]),
            float(row["it there"])) == pytest.approx(((60 + 50) / 2, (42 + 32) / 2, (52 + 42) / 2))
    assert float(row["difference"]) == pytest.approx(10)
    assert float(row["difference after the last epoch"]) == pytest.approx(12)


@pytest.mark.parametrize("epoch", ["[1]", '"x"', "null", "1e999", "true", "99", "0", "1.5"])
def test_log_of_an_epoch_that_is_none(epoch, edited, capsys):
    log = edited({"cclm-xgqa-standard-seed0": [(50, 44), (70, 40)]}) / "cclm-xgqa-standard-seed0" / "log.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines, json.dumps(json.loads(lines[-1]) | {"epoch": "@"}).replace('"@"', epoch)]))
    error = refused(capsys, "curves", log.parent)
    assert f"log.jsonl, line {len(lines) + 1}" in error


@pytest.mark.parametrize("accuracy", ["1" + 400 * "0", "1e999", "-1", "1000"])
def test_log_with_numbers_that_are_no_percentages(accuracy, edited, capsys):
    log = edited({"cclm-xgqa-standard-seed0": [(50, 44), (70, 40)]}) / "cclm-xgqa-standard-seed0" / "log.jsonl"
    log.write_text(log.read_text().replace('"accuracy": 44', f'"accuracy": {accuracy}'))
    assert "log.jsonl, line " in refused(capsys, "curves", log.parent)


def test_pictures_say_what_is_drawn(edited, capsys):
    """The miniature, the number of seeds, and arms that differ in it."""
    numbers = {f"cclm-xgqa-{name}-seed{seed}": [(50, 44), (70, 40)] for name in ("standard", "suf") for seed in (0, 1)}
    folder = edited(numbers | {"cclm-xgqa-decay0.88-seed0": [(60, 30)]})
    for path in folder.glob("*/args.json"):
        stored = read(path)
        path.write_text(json.dumps(stored | {"args": stored["args"] | {"miniature": True}}))
    runs = analysis.find_runs([folder])
    both = [run for run in runs if run.strategy != "decay0.88"]
    curves, equal = analysis.curves(both)
    assert curves.title == "Figure 2: CCLM on xGQA, accuracy after each epoch, miniature, 2 seeds"
    assert equal.title.endswith("at equal English, miniature")
    assert [(panel["title"], panel["y"]) for panel in curves.panels] == [("standard", "accuracy (%)"),
                                                                         ("SUF", "accuracy (%)")]
    curves = analysis.curves(both[:-1])[0]
    assert curves.title.endswith(", miniature")
    assert [panel["title"] for panel in curves.panels] == ["standard (2 seeds)", "SUF (1 seed)"]
    assert analysis.curves(both[::2])[0].title.endswith(", miniature")  # a seed of each
    types = analysis.types(runs)[0]
    assert types.title.endswith("(drawn: mean of the others), miniature")
    assert list(types.panels[0]["lines"]) == ["standard (2 seeds)", "SUF (2 seeds)", "layer-wise decay 0.88 (1 seed)"]
    arms = {"standard": {0: 1, 1: 1}, "decay0.9": {0: 1}, "decay0.8": {0: 1, 1: 1}}
    [panel] = analysis.decay_panels(dict.fromkeys(arms, 50.0), arms, "accuracy (%)")
    assert list(panel["lines"]) == ["layer-wise decay (1 to 2 seeds)", "standard (2 seeds)"]
    frozen = {"decay0.9": {0: 1}, "decay0.9-frozen-embeddings": {0: 1}, "decay1e-05": {0: 1}}
    [line] = analysis.decay_panels(dict.fromkeys(frozen, 50.0), frozen, "accuracy (%)")[0]["lines"].values()
    assert line[0] == [1e-05, 0.9]  # the one with frozen embeddings is another strategy
    table = analysis.tables(runs)
    assert [one.title for one in table] == ["Table 1: English, and the mean of the other languages, miniature",
                                            "Table 5: xGQA by language, miniature"]
    tables.draw_lines(axis := MagicMock(), panel)
    axis.set_ylabel.assert_called_once_with("accuracy (%)")


def test_types(runs, tmp_path):
    analyse("types", runs, "--out", tmp_path)
    log = map(json.loads, (runs / "uc2-xvnli-standard-seed0" / "log.jsonl").read_text().splitlines())
    [first] = [entry for entry in log if entry.get("epoch") == 1 and "languages" in entry]
    row = row_of(tmp_path / "types-uc2-xvnli.csv", name="standard", epoch=1, languages="others")
    others = [first["languages"][language]["by_type"] for language in ("ar", "es", "fr", "ru")]
    for name in ("contradiction", "entailment", "neutral"):
        assert float(row[name]) == pytest.approx(np.mean([scores[name]["accuracy"] for scores in others]))
    assert {row["epoch"] for row in rows_of(tmp_path / "types-cclm-xgqa.csv")
            if row[""] == "layer-wise decay 0.88"} == {"2"}


@torch.inference_mode()
def test_alignment(runs, tmp_path):
    """The matrix against one text at a time, through the whole model."""
    run = runs / "uc2-xvnli-standard-seed0"
    analyse("alignment", run, "--out", tmp_path)
    model, tokenizer, labels, args, recipe = evaluation.load_run(run, torch.device("cpu"))
    model.eval()
    split = evaluation.load_split(args, recipe, tokenizer, labels, "test", ["en", "fr"])
    cosines = []
    for i in range(len(split.examples["en"])):
        states = []
        for language, examples in split.examples.items():
            memory = model.memory(split.pictures.batch(split.image_rows[language][i : i + 1]))
            input_ids, mask = data.pad([examples.tokens[i]])
            states.append(model.fuse(model.encode_texts(input_ids, mask), mask, memory)[0, 0])
        cosines.append(torch.cosine_similarity(*states, dim=0).item())
    row = row_of(tmp_path / "alignment-uc2-xvnli-standard.csv", name="fr")
    assert float(row["en"]) == pytest.approx(100 * np.mean(cosines), abs=1e-3)
    assert float(row["fr"]) == pytest.approx(100, abs=1e-3)
    analyse("alignment", run, "--out", tmp_path / "first", "--epoch", 1)
    assert float(row_of(tmp_path / "first" / "alignment-uc2-xvnli-standard.csv", name="fr")["en"]) != pytest.approx(
        float(row["en"]), abs=1e-5)


def test_fewshot(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    analyse("fewshot", runs)
    for strategy, printed in (("standard", "44.3"), ("SUF", "46.7")):
        folder = f"uc2-xgqa-{strategy.lower()}-seed0"
        before, after = (read(runs / name / "results.json")["languages"]["de"]["accuracy"]
                         for name in (folder, f"{folder}-de48"))
        row = row_of("report/fewshot-uc2-xgqa-48.csv", name=strategy)
        assert (float(row["zero-shot"]), float(row["few-shot"])) == (before, after)
        assert row_of("report/fewshot-uc2-xgqa-48.csv", name=f"{strategy}: paper")["few-shot"] == printed


def test_fewshot_finds_its_english_run(edited, runs, tmp_path, monkeypatch, capsys):
    """By its weights: where the path of --init leads to another run of that name, it is the one beside."""
    for name in ("uc2-xgqa-standard-seed0", "uc2-xgqa-standard-seed0-de48"):
        shutil.copytree(runs / name, tmp_path / "moved" / name)
    english = tmp_path / "moved" / "uc2-xgqa-standard-seed0"
    few_shot = tmp_path / "moved" / f"{english.name}-de48"
    stored = read(few_shot / "args.json")
    stored["args"]["init"] = "runs/uc2-xgqa-standard-seed0"
    (few_shot / "args.json").write_text(json.dumps(stored))
    shutil.copytree(runs / "uc2-xgqa-suf-seed0", tmp_path / "runs" / "uc2-xgqa-standard-seed0")
    monkeypatch.chdir(tmp_path)
    before = read(english / "results.json")["languages"]["de"]["accuracy"]
    analyse("fewshot", few_shot)
    assert float(row_of("report/fewshot-uc2-xgqa-48.csv", name="standard")["zero-shot"]) == before
    shutil.copy(tmp_path / "runs" / english.name / "model.pt", english)  # trained again since
    assert "the English run that it started from is neither" in refused(capsys, "fewshot", few_shot)


def test_strategies(runs, small, edited, tmp_path, capsys):
    """Numbers and differences by hand; the post-hoc rivals against weights put together
    here; drift against the files' tensors.
    """
    numbers = {"cclm-xgqa-standard-seed0": [(0, 0), (62, 40)], "cclm-xgqa-standard-seed1": [(0, 0), (60, 44)],
               "cclm-xgqa-suf-seed0": [(0, 0), (61, 50)],
               "cclm-xgqa-suf-seed1": [(0, 0), (61, 51)], "cclm-xgqa-decay0.88-seed0": [(59, 45)]}
    folder = edited(numbers)
    analyse("strategies", folder, "--out", tmp_path)
    difference = row_of(tmp_path / "differences-cclm-xgqa-accuracy.csv", name="SUF - standard")
    half = 12.706 * math.sqrt(4.5) / math.sqrt(2)  # differences 10 and 7
    assert (float(difference["others"]), float(difference["others low"]),
            float(difference["others high"])) == pytest.approx((8.5, 8.5 - half, 8.5 + half))
    assert (float(difference["en"]), difference["seeds above"], difference["sign test p"]) == (0.0, "2 of 2", "0.50")
    decay = row_of(tmp_path / "differences-cclm-xgqa-accuracy.csv", name="layer-wise decay 0.88 - SUF")
    assert (decay["others"], decay["others n"], decay["others low"]) == ("-5.0", "1", "")

    run = folder / "cclm-xgqa-standard-seed0"
    found, (args, recipe) = read(run / "post_hoc.json"), evaluation.read_run(run)
    device, layers = torch.device("cpu"), 5
    assert set(found) == {"complete", "average 2"} | {f"{kind} {n}" for kind in ("dev", "reverted")
                                                      for n in range(layers + 1)} - {"reverted 0"}
    model, tokenizer, labels, _, _ = evaluation.load_run(run, device)
    test = evaluation.load_split(args, recipe, tokenizer, labels, "test")
    pretrained = read_checkpoint(small / "cclm.pt")[0]
    names = model.checkpoint_names()
    for name, parameter in model.named_parameters():
        if name.startswith(("text_layers.0.", "text_layers.1.")):
            parameter.data.copy_(pretrained[names[name]])
    assert evaluation.evaluate(model, test, device)[0] == found["reverted 2"]
    assert evaluation.evaluate(model, evaluation.load_split(args, recipe, tokenizer, labels, "dev", ["en"]),
                               device)[0] == found["dev 2"]
    epochs = [dict(evaluation.load_run(run, device, epoch)[0].named_parameters()) for epoch in (1, 2)]
    for name, parameter in model.named_parameters():
        parameter.data.copy_((epochs[0][name] + epochs[1][name]) / 2)
    assert evaluation.evaluate(model, test, device)[0] == found["average 2"]

    table = tmp_path / "post-hoc-cclm-xgqa-accuracy.csv"
    others = [read(folder / f"cclm-xgqa-standard-seed{seed}" / "post_hoc.json")["reverted 2"] for seed in (0, 1)]
    expected = np.mean([evaluation.mean_zero_shot(results, "accuracy") for results in others])
    assert float(row_of(table, name="lower layers reverted: 2")["others"]) == pytest.approx(expected)
    assert float(row_of(table, name="lower layers reverted: 0")["others"]) == 42

    tuned = read_checkpoint(run / "model.pt")[0]
    layer = [name for name in tuned if name.startswith("text_encoder.encoder.layer.1.")]
    change = math.sqrt(sum((tuned[name] - pretrained[name]).square().sum().item()
                           for name in layer) / sum(pretrained[name].square().sum().item() for name in layer))
    assert probe.drift(run)["2"] == pytest.approx(100 * change, rel=1e-5)
    drift = row_of(tmp_path / "drift-cclm-xgqa.csv", name="SUF")  # two epochs of one layer each: the other three stayed
    assert [float(drift[str(n)]) for n in (1, 2, 3)] == [0, 0, 0]
    assert min(float(drift[name]) for name in ("4", "5", "embeddings", "vision")) > 0
    cost = {row[""]: row for row in rows_of(tmp_path / "cost-cclm-xgqa.csv")}
    state = torch.load(run / "last.pt", weights_only=True)["optimizer"]["state"]
    assert float(cost["standard"]["optimizer MB"]) == pytest.approx(
        sum(tensor.nbytes for part in state.values() for tensor in part.values()) / 1e6)
    assert float(cost["SUF"]["optimizer MB, % of standard"]) < 100
    again = (run / "post_hoc.json").stat().st_mtime_ns
    assert probe.post_hoc(run) == found and (run / "post_hoc.json").stat().st_mtime_ns == again


def test_most_layers_that_can_be_reverted():
    found = {f"dev {n}": {"en": {"accuracy": accuracy}}
             for n, accuracy in enumerate([60.0, 58.0, 59.5, 59.0, 40.0])} | {"complete": True}
    assert analysis.most_reverted(found, "xgqa") == 3


def test_pictures(runs, tmp_path, capsys):
    """With matplotlib a PNG, without it a line that says so; the numbers in either case."""
    analyse("types", runs / "cclm-xgqa-suf-seed0", "--out", tmp_path)
    assert (tmp_path / "types-cclm-xgqa.csv").is_file()
    picture, said = tmp_path / "types-cclm-xgqa.png", capsys.readouterr().out
    if picture.is_file():
        assert picture.read_bytes().startswith(b"\x89PNG")
    else:
        assert f"no {picture}: matplotlib is not installed" in said


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_runs_that_cannot_be_used(runs, edited, tmp_path, capsys):
    folder = edited({"cclm-xgqa-standard-seed0": [(0, 0), (60, 40)], "cclm-xgqa-suf-seed0": [(0, 0), (60, 50)]})
    run = folder / "cclm-xgqa-standard-seed0"
    assert "not the folder of a run of train.py" in refused(capsys, "tables", tmp_path / "nothing")
    assert "same strategy and seed" in refused(capsys, "tables", run, runs / run.name)
    assert "--eval-every-epoch" in refused(capsys, "curves", runs / "cclm-xgqa-decay0.88-seed0")
    assert "epoch7.pt: no such weights" in refused(capsys, "alignment", run, "--epoch", 7)
    assert "translations exist for xgqa and xvnli" in refused(capsys, "alignment",
                                                              runs / "uc2-xflickrco-standard-seed0")
    assert "give runs on xgqa or xvnli" in refused(capsys, "types", runs / "uc2-xflickrco-standard-seed0")
    assert "none of these runs is a few-shot run" in refused(capsys, "fewshot", run)
    assert "nothing: not the folder of a run" in refused(capsys, "tables", run, "--", tmp_path / "nothing")
    (tmp_path / "file").touch()
    assert "file: cannot be written" in refused(capsys, "tables", run, "--out", tmp_path / "file")
    assert "none of these runs is one on English" in refused(capsys, "tables", runs / "uc2-xgqa-suf-seed0-de48")

    stored = read(run / "args.json")
    (run / "args.json").write_text(json.dumps(stored | {"recipe": stored["recipe"] | {"lr": 0.5}}))
    assert "cannot share a table: they differ in lr" in refused(capsys, "tables", folder)
    (run / "args.json").write_text(json.dumps(stored | {"args": stored["args"] | {"precision": "bf16"}}))
    assert "cannot share a table: they differ in precision" in refused(capsys, "tables", folder)
    (run / "args.json").write_text(json.dumps(stored))
    results = read(run / "results.json")
    del results["languages"]["bn"]
    (run / "results.json").write_text(json.dumps(results))
    assert "no results for language 'bn' of xgqa" in refused(capsys, "tables", run)
    (run / "results.json").unlink()
    assert "this run is not finished" in refused(capsys, "tables", run)
    (run / "args.json").write_text("{}")
    assert "no args.json that train.py wrote" in refused(capsys, "tables", run)

    (run / "args.json").write_text(json.dumps(stored))
    analyse("tables", folder, "--out", tmp_path)  # in a folder of runs the unfinished one is told and left out
    assert f"left out, not finished: {run}" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# reproduce


def arm(strategy, *values):
    """Runs of seeds 0, 1, … with these (English, others)."""
    args, recipe = SimpleNamespace(task="xgqa", model="cclm"), SimpleNamespace(epochs=5)
    results = [{"en": {"accuracy": english}, "de": {"accuracy": others}} for english, others in values]
    return {seed: analysis.Run("", args, recipe, strategy, result, {5: result}, {})
            for seed, result in enumerate(results)}


def said(**arms):
    return "\n".join(reproduce.findings(
        "cclm", "xgqa", {strategy.replace("_", "-"): arm(strategy, *values) for strategy, values in arms.items()}))


def test_the_report_says_what_the_numbers_say():
    # differences 10, 9.5, 10.5 and 0, -1, 1
    standard, better = [(60, 40), (61, 41), (59, 39)], [(60, 50), (60, 50.5), (60, 49.5)]
    text = said(standard=standard, suf=better)
    assert "SUF is 10.0 points above on the mean of the other languages (95 % interval +8.8 to +11.2, 3 seeds)" in text
    assert "no difference was shown on English: +0.0" in text and "against SUF" not in text
    assert "SUF is 10.0 points below on the mean of the other languages" in said(standard=better, suf=standard)
    assert "SUF +10.0 on the mean of the other languages (one seed: this shows nothing about others)" in said(
        standard=standard[:1], suf=better[:1])
    assert "no finished seed in common" in said(standard=standard)

    rivals = {"suf_bottom_up": [(60, 45), (60, 45.5), (60, 44.5)], "average_all": [(57, 50), (57, 50), (57, 50)],
              "decay0.75": [(60, 50)]}
    text = said(standard=standard, suf=better, **rivals)
    assert "SUF, bottom up, against SUF: it is 5.0 points below on the mean of the other languages" in text
    assert "it has 50 % of SUF's gain" in text
    assert "Below SUF: SUF, bottom up." in text and "Undecided: layer-wise decay 0.75." in text
    assert ("its gain away): standard, mean of all epochs, but at -3.0 in English "
            "(this would speak for averaging weights") in text
    text = said(standard=standard, suf=[(60, 52), (60, 50), (60, 49)], average_all=[(60, 46)])
    assert "it has 50 % of SUF's gain" in text  # 6 of the 12 points at the seed that it has, not of 10.3 on average
    text = said(standard=standard, suf=standard, **rivals)  # nothing to explain
    assert "No gain of SUF was shown here" in text and "speak for" not in text


def reproduce_command(small, folder, *flags):
    return ["reproduce", "--model", "cclm", "--task", "xgqa", "--data", str(small / "data"), "--checkpoint",
            str(small / "cclm.pt"),
            "--tokenizer", str(small / "tokenizer.model"), "--runs", str(folder), "--report", str(folder / "report"),
            *flags, "--", "--limit", "128"]


def test_reproduce(runs, small, tmp_path, capsys):
    """A finished run is left alone, an interrupted one goes on, one that fails is told and does
    not stop the others; then the report.
    """
    for name in ("standard", "suf", "decay0.88"):
        shutil.copytree(runs / f"cclm-xgqa-{name}-seed0", tmp_path / f"cclm-xgqa-{name}-seed0")
    finished = (tmp_path / "cclm-xgqa-standard-seed0" / "results.json").stat().st_mtime_ns
    (tmp_path / "cclm-xgqa-suf-seed0" / "results.json").unlink()
    (tmp_path / "cclm-xgqa-decay0.88-seed0" / "results.json").unlink()
    (tmp_path / "cclm-xgqa-decay0.88-seed0" / "last.pt").write_bytes(b"broken")
    with pytest.raises(SystemExit) as end:
        analyse(*reproduce_command(small, tmp_path, "--seeds", "1", "--strategies", "decay0.88,standard,suf",
                                   "--jobs", "1"))
    done = capsys.readouterr()
    assert end.value.code == 1, done.err
    assert "2 of 3 runs to do, 1 at a time" in done.out and "cclm-xgqa-suf-seed0: done" in done.out
    assert "failed: " in done.err.splitlines()[-1] and "last.pt: not a readable state" in done.err.splitlines()[-1]
    assert (tmp_path / "cclm-xgqa-standard-seed0" / "results.json").stat().st_mtime_ns == finished
    assert read(
        tmp_path / "cclm-xgqa-suf-seed0" / "results.json") == read(runs / "cclm-xgqa-suf-seed0" / "results.json")
    report = (tmp_path / "report" / "report.md").read_text()
    for words in ("(one seed: this shows nothing about others)", "last.pt: not a readable state", "## Strategies",
                  "standard, lower layers reverted", "## Per epoch",
                  "## Question types", "## Alignment", "CCLM, standard: paper", "What this does not show"):
        assert words in report
    assert "layer-wise decay" not in report


def test_a_model_that_never_sees_the_image(tiny):
    """On XVNLI words alone tell nothing (a third is right); on xGQA they tell the kind of answer, half of yes or no."""
    records = {task: analysis.data.read_records(tiny / "data", task, "test")[1] for task in ("xvnli", "xgqa")}
    right = {task: analysis.blind_model(tiny / "data", task) / len(records[task]) for task in records}
    assert abs(right["xvnli"] - 1 / 3) < 0.07 and 0.38 < right["xgqa"] < 0.55


def test_runs_of_another_kind_are_told(runs, small, tmp_path, capsys):
    """Before anything is trained: a finished run with other flags than the report's, or without results by epoch."""
    run = tmp_path / "cclm-xgqa-standard-seed0"
    shutil.copytree(runs / run.name, run)
    stored = read(run / "args.json")
    (run / "args.json").write_text(json.dumps(stored | {"args": stored["args"] | {"eval_every_epoch": False}}))
    with pytest.raises(SystemExit):
        analyse(*reproduce_command(small, tmp_path, "--strategies", "standard", "--seeds", "1", "--dry-run"))
    assert f"note: {run} was run without --eval-every-epoch: it is not in Figures 2 and 3" in capsys.readouterr().out
    (run / "args.json").write_text(json.dumps(stored | {"args": stored["args"] | {"limit": 64}}))
    error = refused(capsys, *reproduce_command(small, tmp_path, "--strategies", "standard,suf"))
    assert "a finished run with limit 64, the report's has 128" in error
    assert not (tmp_path / "cclm-xgqa-suf-seed0").exists()
    (run / "args.json").write_text(json.dumps(stored | {"fingerprints": dict.fromkeys(stored["fingerprints"], "0")}))
    error = refused(capsys, *reproduce_command(small, tmp_path, "--strategies", "standard", "--dry-run"))
    assert f"{run}: a finished run that did not read {small / 'cclm.pt'} as it is now" in error


def test_few_shot_runs_of_another_english_run_are_told(runs, small, tmp_path, capsys):
    folder = tmp_path / "uc2-xgqa-standard-seed0-de48"
    shutil.copytree(runs / folder.name, folder)
    command = reproduce_command(small, tmp_path, "--model", "uc2", "--checkpoint", str(small / "uc2.pt"),
                                "--strategies", "standard,fewshot", "--seeds", "1")[:-3]
    error = refused(capsys, *command)
    assert f"{folder}: a finished run that did not read {tmp_path / 'uc2-xgqa-standard-seed0' / 'model.pt'}" in error


def test_strategies_that_flags_of_train_make_the_same(small, tmp_path):
    args = analysis.parse_args(reproduce_command(small, tmp_path, "--seeds", "1")[:-3])
    folders = [job.folder for job in reproduce.plan(args, ["--freeze", "embeddings"])]
    assert f"{tmp_path}/cclm-xgqa-suf-frozen-embeddings-seed0" in folders and len(folders) == len(set(folders))


def test_recipe_of_the_report(edited, tmp_path, monkeypatch):
    """What any run has beside the paper's numbers, whichever strategy comes last."""
    folder = edited({f"cclm-xgqa-{name}-seed0": [(50, 44), (70, 40)] for name in ("standard", "suf")}
                    | {"cclm-xgqa-decay0.88-seed0": [(60, 30)]})
    for name, changed in (("standard", ["lr 1"]), ("suf", ["lr 1", "suf_k 1"]), ("decay0.88", ["lr 1"])):
        path = folder / f"cclm-xgqa-{name}-seed0" / "args.json"
        path.write_text(json.dumps(read(path) | {"not_as_in_the_paper": changed}))
    for name in ("tables", "strategies", "curves", "types", "alignment"):
        monkeypatch.setattr(analysis, name, lambda runs: [])
    monkeypatch.setattr(analysis, "post_hoc_arms", lambda *_: ({}, []))
    (tmp_path / "report").mkdir()
    reproduce.write_report(analysis.find_runs([folder])[::-1], tmp_path / "report", [])
    assert "- CCLM on xGQA, not as in the paper: lr 1; suf_k 1\n" in (tmp_path / "report" / "report.md").read_text()
    path.write_text(json.dumps({name: part for name, part in read(path).items() if name != "not_as_in_the_paper"}))
    with pytest.raises(InputError, match="args.json: no field 'not_as_in_the_paper'"):
        reproduce.write_report(analysis.find_runs([folder]), tmp_path / "report", [])


def test_dry_run(runs, small, capsys, monkeypatch):
    checkpoints, records = MagicMock(wraps=read_checkpoint), MagicMock(wraps=data.read_records)
    monkeypatch.setattr(reproduce, "read_checkpoint", checkpoints)
    monkeypatch.setattr(data, "read_records", records)
    reproduce.record_count.cache_clear()
    with pytest.raises(SystemExit) as end:
        analyse(*reproduce_command(small, runs, "--seeds", "2", "--dry-run"))
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"finished      {runs}/cclm-xgqa-standard-seed0"
    missing = [line for line in lines if line.startswith("missing ") and " about " in line]
    names = ["standard", "suf", "decay0.98", "decay0.95", "decay0.88", "decay0.75", "top2", "suf-bottom-up",
             "suf-random", "suf-fisher", "suf-frozen-embeddings"]
    assert [line.split()[1].split("cclm-xgqa-")[1] for line in lines[:-1]] == [f"{name}-seed{seed}" for name in names
                                                                               for seed in (0, 1)]
    assert len(missing) == 17 and lines[-1].startswith("17 of 22 runs to do, ")
    assert checkpoints.call_count == 2  # and not again for every run: at base size they take long to read
    assert sum(call.args[2] == "train" for call in records.call_args_list) == 2  # to measure, and to count


def test_reproduce_stops_and_goes_on(small, tmp_path):
    command = [sys.executable, "-u", str(ROOT / "analysis.py"),
               *reproduce_command(small, tmp_path, "--seeds", "1", "--strategies", "suf", "--jobs", "1")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "1 of 1 runs to do" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and error.splitlines()[-1] == "stopped; the same command goes on from here"
    assert not (tmp_path / "cclm-xgqa-suf-seed0" / "results.json").exists()


@pytest.mark.parametrize("flags, message", [
    (["--strategies", "suf,best"], "--strategies suf,best: choose from standard, suf, decay0.98"),
    (["--seeds", "0"], "must be at least 1"), (["--checkpoint", ""], "go together"),
])
def test_reproduce_refuses(flags, message, small, tmp_path, capsys):
    assert message in refused(capsys, *reproduce_command(small, tmp_path, *flags))


def test_reproduce_refuses_what_would_be_for_nothing(small, tmp_path, capsys, monkeypatch):
    """Before anything is trained."""
    monkeypatch.setattr(reproduce, "run_all", lambda *_: pytest.fail("trained"))
    command = reproduce_command(small, tmp_path / "file")
    assert "--dry-run belongs before the --" in refused(capsys, *command, "--dry-run")
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'}: cannot be written (File exists)" in refused(capsys, *command)
    command[command.index("--runs") + 1] = str(tmp_path / "runs")
    command[command.index("--report") + 1] = str(tmp_path / "file")
    assert f"{tmp_path / 'file'}: cannot be written (File exists)" in refused(capsys, *command)
