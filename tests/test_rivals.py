"""tools/rivals.py, tools/reproduce.py, tools/contact_sheet.py: numbers by hand, weights by hand."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from test_analysis import row_of, rows_of, write_run

import analysis
import data
import eval as evaluation
import train
from data import InputError
from miniature import world
from tools import contact_sheet, few_shot, reproduce, rivals

CPU = torch.device("cpu")


def runs_of(folder):
    return analysis.find_runs([str(folder)])


def test_t_interval_and_sign_test():
    assert rivals.t_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 2.4843, 2 + 2.4843), abs=1e-4)
    sleep = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]  # Student's own example
    assert rivals.t_interval(sleep) == pytest.approx((1.58, 0.7001, 2.4599), abs=1e-4)
    assert rivals.t_interval([5.0]) == (5.0, "", "")
    assert rivals.sign_test([1, 2, 3]) == 0.25 and rivals.sign_test([1, -1]) == 1.0
    assert rivals.sign_test([0, 0]) == 1.0
    assert rivals.sign_test([1, 1, 1, 1, 1, -1, 0]) == pytest.approx(2 * 7 / 64)


def test_accuracy_at_a_given_english():
    curve = [(50.0, 40.0), (60.0, 44.0), (55.0, 41.0), (70.0, 38.0)]
    assert rivals.at_english(curve, 55.0) == pytest.approx(42.0)  # on the way to the second epoch
    assert rivals.at_english(curve, 65.0) == pytest.approx(39.0)  # two thirds from third to fourth
    assert rivals.at_english(curve, 45.0) == 40.0 and rivals.at_english(curve, 71.0) is None


def test_equal_english(tmp_path):
    """Seed 0 at English 60: standard half-way from 44 to 40, SUF at its end. Seed 1 at 50.

    Seed 2: standard is there after its first epoch, whatever comes later.
    """
    write_run(tmp_path / "a", [(50, 44), (70, 40)], seed=0)
    write_run(tmp_path / "b", [(30, 30), (50, 32)], seed=1)
    write_run(tmp_path / "c", [(40, 42), (60, 52)], strategy="suf", seed=0)
    write_run(tmp_path / "d", [(40, 40), (60, 44)], strategy="suf", seed=1)
    write_run(tmp_path / "e", [(90, 90)], strategy="top6", epochs=2)  # not a curve
    write_run(tmp_path / "f", [(70, 44), (50, 40)], seed=2)
    write_run(tmp_path / "g", [(40, 42), (60, 52)], strategy="suf", seed=2)
    [arms] = analysis.grouped(runs_of(tmp_path)).values()
    [row] = rivals.equal_english(arms, "accuracy")
    assert (row["English"], row["standard there"]) == ([60, 50, 60], [42, 32, 44])
    assert row["it there"] == [52, 42, 52]
    assert row[""] == "SUF" and row["difference"] == pytest.approx((10 + 10 + 8) / 3)


def right_or_not(folder, records, right):
    """Predictions of a run on XVNLI: all right, or all wrong."""
    (folder / "predictions").mkdir()
    for language, some in records.items():
        entries = [{"id": record.id, "prediction": record.label if right else "?"} for record in some]
        (folder / "predictions" / f"{language}.json").write_text(json.dumps(entries))


def test_differences(tmp_path):
    """Seed by seed, English apart from the others; the bootstrap on all wrong against all right."""
    folder, _, tokenizer = world.prepare("uc2")
    records = {}
    for language in data.LANGUAGES["xvnli"]:
        records[language] = data.read_records(folder, "xvnli", "test", language)[1]
    for strategy, seed, numbers in (
            ("standard", 0, (62, 40)), ("standard", 1, (60, 44)), ("suf", 0, (61, 50)), ("suf", 1, (61, 51)),
            ("suf", 2, (0, 0)), ("suf-less", 0, (59, 45))):
        run = write_run(tmp_path / f"{strategy}{seed}", [numbers], "uc2", "xvnli", strategy, seed,
                        miniature=True, data=folder, tokenizer=tokenizer)
        right_or_not(run, records, strategy == "suf")
    [arms] = analysis.grouped(runs_of(tmp_path)).values()
    table = analysis.Table("differences", "", rivals.differences(arms, "accuracy"))
    analysis.publish(table, str(tmp_path))
    path = tmp_path / "differences.csv"
    row = row_of(path, name="SUF - standard")
    half = 12.706 * math.sqrt(4.5) / math.sqrt(2)  # the differences are 10 and 7
    found = [float(row[column]) for column in ("others", "others from", "others to", "en")]
    assert found == pytest.approx([8.5, 8.5 - half, 8.5 + half, 0])
    assert (row["seeds above"], row["sign test p"]) == ("2 of 2", "0.50")
    assert (row["one seed, images from"], row["to"]) == ("100.0", "100.0")
    less = "all layers from the start, each at SUF's share of the rate"
    row = row_of(path, name=f"{less} - SUF")
    assert (row["others"], row["others from"], row["to"]) == ("-5.0", "", "-100.0")
    assert len(rows_of(path)) == 3


def test_baselines():
    """By counting: a third for XVNLI's labels; a type's own most frequent answer helps."""
    folder, _, _ = world.prepare("uc2")
    [row] = rivals.baselines("xvnli", folder)
    labels = [record.label for record in data.read_records(folder, "xvnli", "test")[1]]
    assert row["accuracy"] == pytest.approx(100 * max(map(labels.count, labels)) / len(labels))
    most, by_type = (row["accuracy"] for row in rivals.baselines("xgqa", folder))
    assert 15 < most < by_type < 50


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A standard run of two epochs that kept them, its weights made by hand."""
    args = train.parse_args(["--model", "uc2", "--task", "xvnli", "--limit", "8"])
    args.data, args.checkpoint, args.tokenizer = world.prepare("uc2")
    model, _, recipe, _ = train.load_model(args, "cpu", 0)
    folder = write_run(tmp_path_factory.mktemp("kept") / "run", [(60, 40), (61, 41)], "uc2", "xvnli",
                       miniature=True, recipe=vars(recipe) | {"epochs": 2}, limit=8, data=args.data,
                       checkpoint=args.checkpoint, tokenizer=args.tokenizer)
    torch.manual_seed(0)
    for name in ("epoch1", "epoch2", "model"):
        if name != "model":  # model.pt is epoch2.pt
            for parameter in model.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
        train.write_weights(str(folder / f"{name}.pt"), model)
    return folder


@torch.no_grad()
def test_post_hoc(kept):
    """Against weights put together here."""
    [run] = runs_of(kept)
    found = rivals.post_hoc(run)
    model, tokenizer, labels, args, recipe = evaluation.load_run(str(kept), CPU)
    test = evaluation.load_split(args, recipe, tokenizer, labels, "test")
    args.few_shot = "en"
    dev = few_shot.development_data(args, recipe, tokenizer, labels)
    # as many lower layers back as development data allow
    before = train.load_model(args, "cpu", 0)[0]
    scores, reverted = [], {}
    for n in range(len(model.layers) + 1):
        if n:
            model.layers[n - 1].load_state_dict(before.layers[n - 1].state_dict())
        scores.append(evaluation.evaluate(model, dev, CPU)[0]["en"]["accuracy"])
        if n and scores[n] >= scores[0] - 1:
            reverted = {rivals.REVERTED: evaluation.evaluate(model, test, CPU)[0]}
    epochs = [dict(evaluation.load_run(str(kept), CPU, n)[0].named_parameters()) for n in (1, 2)]
    for name, parameter in model.named_parameters():
        parameter.copy_((epochs[0][name] + epochs[1][name]) / 2)
    mean = evaluation.evaluate(model, test, CPU)[0]
    name = "standard, mean of the last 2 epochs"
    assert found == reverted | {name: mean} and reverted

    # what is there is not done again; the arms' numbers are these results
    stored = json.loads((kept / "post_hoc.json").read_text())
    (kept / "post_hoc.json").write_text(json.dumps(stored | {name: run.results()}))
    arms = rivals.post_hoc_arms({0: run})
    assert analysis.numbers(arms[name], "accuracy", "others") == [41]


def test_drift(kept):
    [run] = runs_of(kept)
    moved = rivals.drift(run)
    layers = {f"layer {n}" for n in range(1, 1 + len(moved) - 1)}
    assert set(moved) == layers | {"embeddings"}
    model, *_ = evaluation.load_run(str(kept), CPU)
    before = train.load_model(run.args, "cpu", 0)[0]
    pairs = list(zip(model.layers[1].parameters(), before.layers[1].parameters()))
    change = sum((a - b).square().sum().item() for a, b in pairs)
    size = sum(b.square().sum().item() for _, b in pairs)
    assert moved["layer 2"] == pytest.approx(100 * math.sqrt(change / size), rel=1e-4)


def test_reproduce_lists_its_runs(tmp_path, capsys):
    command = ["--runs", str(tmp_path), "--seeds", "2", "--task", "xgqa", "--dry-run"]
    write_run(tmp_path / "cclm-xgqa-standard-seed1", [(60, 40)], answers="exact")
    reproduce.main(["--model", "cclm", *command])
    lines = capsys.readouterr().out.splitlines()
    names = ["standard", "suf", "suf-less", "lpft", "suf-every15", "decay0.98", "decay0.95", "decay0.88",
             "decay0.75", "top2", "suf-bottom-up", "suf-random", "suf-frozen-embeddings"]
    assert {os.path.basename(line.split()[-1]) for line in lines} == {
        f"cclm-xgqa-{name}-seed{seed}" for name in names for seed in (0, 1)}
    assert [line.split()[0] for line in lines[:3]] == ["to", "finished", "to"]
    reproduce.main(["--model", "uc2", "--strategies", "suf,fewshot", *command])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 7 and lines[2].endswith("uc2-xgqa-suf-seed0-de48")


@pytest.mark.parametrize("flags, message", [
    (["--strategies", "suf,best"], "--strategies best: choose from fewshot, standard, suf, suf-less"),
    (["--", "--limit", "8"], "a run with another limit than the report's"),
])
def test_reproduce_refuses(flags, message, tmp_path):
    write_run(tmp_path / "cclm-xgqa-standard-seed0", [(60, 40)], answers="exact")
    command = ["--runs", str(tmp_path), "--task", "xgqa", "--model", "cclm"]
    with pytest.raises(InputError, match=message):
        reproduce.main([*command, *flags])


def test_reproduce(tmp_path, capsys, monkeypatch):
    """Ctrl-C; then the same command goes on, and a run that fails does not stop the others."""
    command = ["--model", "uc2", "--task", "xvnli", "--strategies", "standard,suf,lpft", "--seeds", "1",
               "--jobs", "1", "--runs", str(tmp_path), "--out", str(tmp_path / "report"),
               "--", "--limit", "64", "--epochs", "1"]
    process = subprocess.Popen([sys.executable, "-u", "-m", "tools.reproduce", *command], cwd=train.ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "3 of 3 runs to do, 1 at a time" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and error.endswith("the same command goes on from here\n")

    broken = tmp_path / "uc2-xvnli-lpft-seed0"
    broken.mkdir()
    (broken / "args.json").write_text("{")
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the test's process keeps its handlers
    with pytest.raises(SystemExit) as end:
        reproduce.main(command)
    said = capsys.readouterr().out
    assert end.value.code == 1 and f"{broken}: failed: error: " in said and "suf-seed0: done" in said
    report = (tmp_path / "report" / "report.md").read_text()
    for words in ("embedded miniature", "## Runs that failed", "Table 4: XVNLI by language, miniature",
                  "| SUF - standard |"):
        assert words in report


def test_contact_sheet(tmp_path, capsys):
    """First the questions on which the runs differ in most languages, one for each image."""
    def record(name, image):
        return data.Record(name, image, "?", {"yes": 1.0})

    records = {language: {"q1": record("q1", "a"), "q2": record("q2", "a"), "q3": record("q3", "b")}
               for language in ("en", "de")}
    right, wrong = dict.fromkeys(("q1", "q2", "q3"), "yes"), {"q1": "yes", "q2": "no", "q3": "yes"}
    a, b = {"en": right, "de": right}, {"en": wrong, "de": wrong | {"q3": "no"}}
    assert contact_sheet.choose(records, [a, b]) == ["q2", "q3"]

    folder, _, tokenizer = world.prepare("cclm")
    for name, answer in (("a", "yes"), ("b", "no")):
        run = write_run(tmp_path / name, [(60, 40)], data=folder, tokenizer=tokenizer)
        (run / "predictions").mkdir()
        for language in data.LANGUAGES["xgqa"]:
            some = data.read_records(folder, "xgqa", "test", language)[1]
            entries = [{"questionId": record.id, "prediction": answer} for record in some]
            (run / "predictions" / f"{language}.json").write_text(json.dumps(entries))
    picture = tmp_path / "sheet.png"
    contact_sheet.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG") and f"contact sheet: {picture}" in capsys.readouterr().out
    write_run(tmp_path / "c", [(60, 40)], task="xvnli")
    with pytest.raises(InputError, match="c/predictions/en.json: cannot be read"):
        contact_sheet.main([str(tmp_path / "a"), str(tmp_path / "c"), "--out", str(picture)])
