"""tools/rivals.py, tools/reproduce.py, tools/contact_sheet.py: numbers and weights by hand."""

import json
import math
import signal

import pytest
import torch
from test_analysis import write_run

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


@pytest.mark.parametrize("differences, expected", [
    ([1.0, 2.0, 3.0], [2, 2 - 2.4843, 2 + 2.4843]),
    # Student's own example: hours of sleep gained
    ([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4], [1.58, 0.7001, 2.4599]),
    ([5.0], [5]), ([], [])])
def test_students_interval(differences, expected):
    cells = rivals.with_interval("en", differences)
    assert list(cells) == ["en", "en from", "en to"][: len(expected)]
    assert list(cells.values()) == pytest.approx(expected, abs=1e-4)


def test_accuracy_at_a_given_english():
    curve = [(50.0, 40.0), (60.0, 44.0), (55.0, 41.0), (70.0, 38.0)]
    assert rivals.at_english(curve, 55.0) == pytest.approx(42.0)  # on the way to the second epoch
    assert rivals.at_english(curve, 65.0) == pytest.approx(39.0)  # two thirds from third to fourth
    assert rivals.at_english(curve, 45.0) == 40.0


def test_differences(tmp_path):
    """Seed by seed, English apart from the others, and both at the same English.

    Seed 0 at English 60: standard half-way from 44 to 40, SUF at its end. Seed 1 at 50. Seed 2:
    standard is there after its first epoch, whatever comes later.
    """
    for strategy, seed, numbers in (
            ("standard", 0, [(50, 44), (70, 40)]), ("standard", 1, [(30, 30), (50, 32)]),
            ("standard", 2, [(70, 44), (50, 40)]), ("suf", 0, [(40, 42), (60, 52)]),
            ("suf", 1, [(40, 40), (60, 44)]), ("suf", 2, [(40, 42), (60, 52)]),
            ("suf", 3, [(0, 0), (0, 0)])):
        write_run(tmp_path / f"{strategy}{seed}", numbers, strategy=strategy, seed=seed)
    write_run(tmp_path / "less", [(59, 45)], strategy="suf-less", epochs=2)  # no curve
    [arms] = analysis.grouped(runs_of(tmp_path)).values()
    first, second, third = rivals.differences(arms, "accuracy")
    assert first[""] == "SUF - standard"
    assert first["en"] == pytest.approx((-10 + 10 + 10) / 3)
    assert first["others"] == pytest.approx((12 + 12 + 12) / 3)
    assert (first["others from"], first["others to"]) == (12, 12)
    assert first["others at equal English"] == pytest.approx((10 + 10 + 8) / 3)
    assert first["others at equal English from"] == pytest.approx(28 / 3 - 4.303 * 2 / 3)
    less = "all layers from the start, each at SUF's share of the rate"
    assert second == {"": f"{less} - standard", "en": -11, "others": 5}
    assert third == {"": f"{less} - SUF", "en": -1, "others": -7}


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
    folder = tmp_path_factory.mktemp("kept") / "run"
    write_run(folder, [(60, 40), (61, 41)], "uc2", "xvnli", miniature=True, limit=8,
              recipe=vars(recipe) | {"epochs": 2}, data=args.data, checkpoint=args.checkpoint,
              tokenizer=args.tokenizer)
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
    dev = few_shot.development_data(args, recipe, tokenizer, labels, "en")
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

    arms = rivals.post_hoc_arms({0: run})
    assert analysis.numbers(arms[name], "accuracy", "en") == [mean["en"]["accuracy"]]


def test_drift(kept):
    [run] = runs_of(kept)
    [row] = rivals.drift({"standard": {0: run}})
    assert list(row) == ["", "embeddings", "layer 1", "layer 2", "layer 3", "layer 4"]
    model, *_ = evaluation.load_run(str(kept), CPU)
    before = train.load_model(run.args, "cpu", 0)[0]
    pairs = list(zip(model.layers[1].parameters(), before.layers[1].parameters()))
    change = sum((a - b).square().sum().item() for a, b in pairs)
    size = sum(b.square().sum().item() for _, b in pairs)
    assert row["layer 2"] == [pytest.approx(100 * math.sqrt(change / size), rel=1e-4)]


def test_reproduce_lists_its_runs(tmp_path, capsys):
    command = ["--runs", str(tmp_path), "--seeds", "2", "--task", "xgqa", "--dry-run"]
    reproduce.main(["--model", "cclm", *command])
    names = ["standard", "suf", "suf-less", "lpft", "decay0.98", "decay0.95", "decay0.88",
             "decay0.75", "suf-bottom-up", "suf-random", "suf-frozen-embeddings", "top2"]
    assert capsys.readouterr().out.split() == [
        f"{tmp_path}/cclm-xgqa-{name}-seed{seed}" for name in names for seed in (0, 1)]
    reproduce.main(["--model", "uc2", *command])
    few_shot_runs = [line for line in capsys.readouterr().out.split() if line.endswith("48")]
    assert len(few_shot_runs) == 2 * 2 * 7
    assert few_shot_runs[0].endswith("uc2-xgqa-standard-seed0-de48")


def test_reproduce_refuses():
    message = r"--strategies best: none of \['standard', 'suf', 'suf-less'"
    with pytest.raises(InputError, match=message):
        reproduce.main(["--task", "xgqa", "--model", "cclm", "--strategies", "suf,best"])


@pytest.fixture
def own_signals():
    """Handlers as in a fresh process; afterwards those that pytest or train.py had set."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def test_reproduce(tmp_path, capsys, own_signals):
    """Two at once; a run that fails stops nothing and is reported; what is finished stays."""
    broken = tmp_path / "uc2-xvnli-suf-seed0"
    broken.mkdir()
    (broken / "args.json").write_text("{")
    command = ["--model", "uc2", "--task", "xvnli", "--strategies", "standard,suf", "--seeds", "1",
               "--jobs", "2", "--runs", str(tmp_path), "--out", str(tmp_path / "report"),
               "--", "--limit", "64", "--epochs", "1"]
    with pytest.raises(SystemExit) as end:
        reproduce.main(command)
    said = capsys.readouterr().out
    done = f"{tmp_path}/uc2-xvnli-standard-seed0"
    assert end.value.code == 1 and "2 of 2 runs to do, 2 at a time" in said
    assert f"{done}: done\n" in said and f"{broken}: failed: error: " in said
    report = (tmp_path / "report/report.md").read_text()
    for words in (f"## Runs that failed\n\n- {broken}: failed: error: ",
                  "Table 4: XVNLI by language, miniature", "baselines, the same in all languages"):
        assert words in report
    assert reproduce.run_all({done: []}, 1) == []
    assert "0 of 1 runs to do" in capsys.readouterr().out


def test_reproduce_when_stopped(tmp_path, capsys, monkeypatch, own_signals):
    """What runs may save; nothing new starts."""
    code = """if True:
        import os, pathlib, signal, sys, time
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(0.5)
        pathlib.Path(sys.argv[1], "saved").touch()"""
    commands = {str(tmp_path / name): ["-c", code, str(tmp_path / name)] for name in "abc"}
    monkeypatch.setattr(reproduce, "plan", lambda *_: (commands, {}))
    with pytest.raises(SystemExit) as end:
        reproduce.main(["--jobs", "1", "--out", str(tmp_path / "report")])
    assert end.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    assert (tmp_path / "a/saved").exists() and not (tmp_path / "b").exists()


def test_contact_sheet(tmp_path, capsys):
    """First the questions on which the runs differ in most languages, one for each image."""
    folder, _, tokenizer = world.prepare("cclm")
    runs = [write_run(tmp_path / name, [(60, 40)], data=folder, tokenizer=tokenizer)
            for name in "ab"]
    for language in data.LANGUAGES["xgqa"]:
        records = data.read_records(folder, "xgqa", "test", language)[1]
        records.sort(key=lambda record: record.id)
        first, same_image, *others = records
        other_image = next(record for record in others if record.image != first.image)
        assert same_image.image == first.image
        # the second run is wrong on these, on the last one in English alone
        wrong = {first.id, same_image.id} | ({other_image.id} if language == "en" else set())
        for number, run in enumerate(runs):
            (run / "predictions").mkdir(exist_ok=True)
            entries = []
            for record in records:
                answer = "?" if number and record.id in wrong else [*record.answers][0]
                entries.append({"questionId": record.id, "prediction": answer})
            (run / f"predictions/{language}.json").write_text(json.dumps(entries))
    chosen = contact_sheet.choose(folder, runs)
    assert len(chosen) == 8
    assert [block[0] for block in chosen[:2]] == [first.image, other_image.image]
    assert [line[0] for line in chosen[1][1:]] == list(data.LANGUAGES["xgqa"])
    [right] = other_image.answers
    assert [line[2:] for line in chosen[1][1:3]] == [[f"✓ {right}", "✗ ?"], [f"✓ {right}"] * 2]

    picture = tmp_path / "sheet.png"
    command = [*map(str, runs), "--out", str(picture)]
    contact_sheet.main(command)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"contact sheet: {picture}" in capsys.readouterr().out
    (runs[1] / "predictions/en.json").write_text('[{"id": "1", "prediction": "neutral"}]')
    with pytest.raises(InputError, match="b/predictions/en.json: no field 'questionId'"):
        contact_sheet.main(command)
