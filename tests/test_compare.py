"""tools/compare.py and tools/ask.py: differences by hand, what is not compared, foreign predictions."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import train_command

import data
import train
from data import InputError
from tools import ask, compare

ANSWERS = {"1": "yes", "2": "no", "3": "red", "4": "left"}  # of the test's four questions


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def world(tmp_path):
    """xGQA's test in three languages: four questions, each about an image of its own."""
    for language in ("en", "de", "ko"):
        questions = {key: {"question": "?", "imageId": f"i{key}", "answer": answer,
                           "types": {"structural": "verify" if key < "3" else "query"}}
                     for key, answer in ANSWERS.items()}
        write(tmp_path / f"data/xGQA/annotations/few_shot/{language}/test.json", questions)
    return tmp_path


def make_run(world, name, right, task="xgqa", model="cclm", weights="w", tests={}, languages="en de ko",
             asked="1234"):
    """A finished run that answers the questions of `right` {language: "12…"} correctly."""
    folder = world / name
    digests = {"c.pt": weights}
    for path in world.glob("data/xGQA/annotations/few_shot/*/test.json"):
        digests[str(path)] = tests.get(path.parent.name, data.fingerprint(path))
    write(folder / "args.json", {"fingerprints": digests, "recipe": {}, "args": {
        "task": task, "model": model, "data": str(world / "data"), "checkpoint": "c.pt",
        "tokenizer": "t"}})
    results = {}
    for language in languages.split():
        correct = right.get(language, "")
        results[language] = {"accuracy": 100 * len(correct) / len(asked)}
        entries = [{"questionId": key, "prediction": ANSWERS[key] if key in correct else "?"}
                   for key in asked]
        write(folder / "predictions" / f"{language}.json", entries)
    write(folder / "results.json", {"languages": results})
    return str(folder)


def rows(capsys, *flags):
    """{(metric, language or mean): [A, B, B - A, low, high]} of what is printed."""
    compare.main(list(flags))
    found, metric = {}, None
    for line in capsys.readouterr().out.splitlines():
        numbers = re.findall(r"[-+]?\d+\.\d+", line)
        if "interval" in line:
            metric = line.split()[0]
        elif len(numbers) == 5:
            found[metric, line.split("  ")[0].strip()] = list(map(float, numbers))
    return found


def test_all_wrong_against_all_right():
    outcomes = [(np.array(["a", "a", "b", "c"]), np.ones(4)), (np.array(["b", "c"]), -np.ones(2))]
    low, high = compare.paired_bootstrap(outcomes, 200)
    assert low.tolist() == high.tolist() == [100, -100]
    assert compare.paired_bootstrap(outcomes, 200, [0]) == (100, 100)
    assert compare.paired_bootstrap(outcomes, 200, [0, 1]) == (0, 0)


def test_interval_of_a_share_and_of_whole_images():
    """Of 400 images with a question each B is better on half: 50 +- 1.96 x 2.5. With 200 questions
    about each of two images there are but two things to draw."""
    better = np.arange(400) % 2.0
    low, high = compare.paired_bootstrap([(np.arange(400), better)], 4000)
    assert (low[0], high[0]) == (pytest.approx(45.1, abs=0.6), pytest.approx(54.9, abs=0.6))
    low, high = compare.paired_bootstrap([(np.arange(400) % 2, better)], 4000)
    assert (low[0], high[0]) == (0, 100)


def test_translations_are_drawn_together():
    """The mean of two languages that agree varies as much as each of them; two that cancel, not."""
    images, better = np.arange(100), np.arange(100) % 2.0
    one = compare.paired_bootstrap([(images, better)], 1000, [0])
    same, opposite = [(images, better)] * 2, [(images, better), (images, -better)]
    assert compare.paired_bootstrap(same, 1000, [0, 1]) == one
    assert compare.paired_bootstrap(opposite, 1000, [0, 1]) == (0, 0)


def test_table_by_hand(world, capsys):
    a = make_run(world, "a", {"en": "1234", "de": "", "ko": "12"})
    b = make_run(world, "b", {"en": "1234", "de": "1234", "ko": "34"})
    found = rows(capsys, a, b)
    assert list(found) == [("accuracy", name) for name in ("en", "de", "ko", "mean of 2 others")]
    assert found["accuracy", "en"] == [100, 100, 0, 0, 0]
    assert found["accuracy", "de"] == [0, 100, 100, 100, 100]
    assert found["accuracy", "ko"] == [50, 50, 0, -100, 100]
    assert found["accuracy", "mean of 2 others"] == [25, 75, 50, 0, 100]


def test_text_recall_is_of_images_and_image_recall_of_texts(tmp_path, capsys):
    """B finds the captions of every image, A the image of every caption."""
    for name, text_rank, image_rank in (("a", 1, 0), ("b", 0, 1)):
        make_run(tmp_path, name, {}, "xflickrco", languages="")
        entries = [{"text": "i#0", "images": [], "rank": image_rank},
                   {"text": "i#1", "images": [], "rank": image_rank},
                   {"image": "i", "texts": [], "rank": text_rank}]
        write(tmp_path / name / "predictions/de.json", entries)
        scores = {"text_recall_at_1": 100.0 * image_rank, "image_recall_at_1": 100.0 * text_rank}
        write(tmp_path / name / "results.json", {"languages": {"de": scores}})
    found = rows(capsys, str(tmp_path / "a"), str(tmp_path / "b"))
    assert found == {("TR@1", "de"): [0, 100, 100, 100, 100],
                     ("IR@1", "de"): [100, 0, -100, -100, -100]}


@pytest.mark.parametrize("other, message", [
    ({"task": "xvnli"}, "is a run on xgqa, .* one on xvnli"),
    ({"tests": {"ko": "0"}}, r"tested on different data \(their ko/test.json are not the same\)"),
    ({"asked": "123"}, "predicts other items in en than .*the same --limit"),
    ({"languages": ""}, "have no language in common"),
])
def test_what_is_not_compared(other, message, world):
    a, b = make_run(world, "a", {}), make_run(world, "b", {}, **other)
    with pytest.raises(InputError, match=message):
        compare.main([a, b])


def test_other_pre_trained_weights_are_told(world, capsys):
    a, b = make_run(world, "a", {}), make_run(world, "b", {}, weights="others")
    c = make_run(world, "c", {}, model="uc2", weights="its own")
    for other, told in ((a, False), (b, True), (c, False)):
        compare.main([a, other])
        assert ("different pre-trained weights" in capsys.readouterr().err) is told


def test_data_that_moved(world, capsys):
    a, b = make_run(world, "a", {"de": "1"}), make_run(world, "b", {"de": "12"})
    shutil.move(world / "data", world / "moved")
    with pytest.raises(InputError, match="data: .*--data"):
        compare.main([a, b])
    assert rows(capsys, a, b, "--data", str(world / "moved"))["accuracy", "de"][:3] == [25, 50, 25]
    path = world / "moved/xGQA/annotations/few_shot/de/test.json"
    write(path, json.loads(path.read_text()) | {"5": {"question": "?", "imageId": "5", "answer": "a"}})
    compare.main([a, b, "--data", str(world / "moved")])
    assert f"warning: {path} is not the file that {a} read" in capsys.readouterr().err


@pytest.mark.parametrize("id_field, answer_field, kind", [
    ("questionId", "prediction", str), ("questionId", "prediction", int),
    ("question_id", "answer", int), ("question_id", "answer", str)])
def test_forms_of_predictions(id_field, answer_field, kind, world, capsys):
    """Three of four questions are answered, one of them twice alike, one wrongly; one is unknown."""
    answers = [("1", "yes"), ("2", "no"), ("3", "blue"), ("1", "yes"), ("77", "yes")]
    write(world / "p.json", [{id_field: kind(key), answer_field: text} for key, text in answers])
    compare.main(["--score", str(world / "p.json"), "--truth",
                  str(world / "data/xGQA/annotations/few_shot/de/test.json")])
    assert capsys.readouterr().out == (
        "1 questions have no prediction and count as wrong\n"
        "1 predictions are about other questions and are left out\n"
        "all        50.00 %  (2 of 4)\nquery       0.00 %  (0 of 2)\nverify    100.00 %  (2 of 2)\n")


@pytest.mark.parametrize("predictions, truth, message", [
    ({}, None, "p.json: expected a list"), ([5], None, "p.json, entry 0: "),
    ([{"questionId": "1"}], None, "entry 0: no field 'prediction'"),
    ([{"id": "1", "prediction": "yes"}], None, "entry 0: no field 'questionId'"),
    ([{"questionId": 1, "prediction": a} for a in "ab"], None, "entry 1: a second prediction for"),
    ([], {}, "t.json: no questions"), ([], 5, "t.json: "), ([], [{}], "t.json, question 0: "),
])
def test_what_cannot_be_scored(predictions, truth, message, world):
    write(world / "p.json", predictions)
    write(world / "t.json", truth)
    with pytest.raises(InputError) as error:
        compare.main(["--score", str(world / "p.json"), "--truth", str(world / "t.json")])
    assert message in str(error.value)


@pytest.mark.parametrize("flags", [[], ["a"], ["a", "b", "c"], ["--score", "p"], ["--truth", "t"],
                                   ["a", "b", "--score", "p"]])
def test_flags(flags):
    with pytest.raises(InputError, match="give two runs, or --score PREDICTIONS --truth TEST.json"):
        compare.main(flags)


@pytest.mark.parametrize("language", ["en", "de"])
def test_published_predictions_get_their_published_score(language, iglue, capsys):
    """IGLUE's own UC2 predictions: as many right ones, to the last, overall and by type."""
    results = iglue / "results/xgqa"
    compare.main(["--score", str(results / f"zero_shot/uc2/test_{language}_0_result.json"), "--truth",
                  str(iglue / f"xGQA/annotations/few_shot/{language}/test.json")])
    found = {}
    for name, right, n in re.findall(r"(\w+) +[\d.]+ %  \((\d+) of (\d+)\)", capsys.readouterr().out):
        found[name] = {"n": int(n), "correct": int(right),
                       "acc": pytest.approx(100 * int(right) / int(n), abs=1e-9)}
    assert found == json.loads((results / "expected_en_de.json").read_text())[language]


@pytest.mark.parametrize("model", ["cclm", "uc2"])
def test_ask(model, tiny, tmp_path, capsys):
    """The likeliest answer is the one that the test gave; a file of the image gives the same."""
    run = tmp_path / model
    train.main(train_command(tiny, model, "xgqa", run, "--limit", 32))
    _, records = data.read_records(str(tiny / "data"), "xgqa", "test", "de")
    predicted = json.loads((run / "predictions/de.json").read_text())[0]["prediction"]
    question = ["--question", records[0].text]
    capsys.readouterr()
    ask.main([str(run), "--image", records[0].image, *question])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(run) and len(lines) == 6
    values = [float(line.split("%")[0]) for line in lines[1:]]
    assert lines[1].split("%  ")[1] == predicted and values == sorted(values, reverse=True)
    file = tiny / "data/gqa/images" / f"{records[0].image}.jpg"
    if model == "cclm":
        ask.main([str(run), "--image", str(file), *question])
        assert capsys.readouterr().out.splitlines() == lines
    else:
        with pytest.raises(InputError, match="no features of image"):
            ask.main([str(run), "--image", str(file), *question])
