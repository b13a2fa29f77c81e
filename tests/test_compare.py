"""tools/compare.py and tools/ask.py: differences by hand, what is not compared, predictions of
others.
"""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import refused, train_command

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


def make_run(world, name, right, task="xgqa", weights="w", tests={}, asked="1234"):
    """A finished run that answers the questions of `right` {language: "12…"} correctly."""
    folder = world / name
    digests = {"miniature/c.pt": weights}
    for path in world.glob("data/xGQA/annotations/few_shot/*/test.json"):
        language = path.parent.name
        digests[f"{language}/test.json"] = tests.get(language, data.fingerprint(path))
    write(folder / "args.json", {"fingerprints": digests, "recipe": {}, "args": {
        "task": task, "data": str(world / "data"), "checkpoint": "c.pt", "tokenizer": "t"}})
    results = {}
    for language in ("en", "de", "ko"):
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


def interval(outcomes, columns=slice(None), draws=1000):
    """Limits of the mean over the languages in `columns`."""
    means = compare.paired_bootstrap(outcomes, draws)[:, columns].mean(1)
    return np.percentile(means, [2.5, 97.5]).tolist()


def test_all_wrong_against_all_right():
    outcomes = [(["a", "a", "b", "c"], [1, 1, 1, 1]), (["b", "c"], [-1, -1])]
    assert interval(outcomes, [0]) == [100, 100]
    drawn = compare.paired_bootstrap(outcomes, 200)
    assert (drawn[:, 0] == 100).all() and set(drawn[~np.isnan(drawn[:, 1]), 1]) == {-100}


def test_interval_of_a_share_and_of_whole_images():
    """Of 400 images with a question each B is better on half: 50 +- 1.96 x 2.5. With 200 questions
    about each of two images there are but two things to draw."""
    better = np.arange(400) % 2.0
    low, high = interval([(range(400), better)], draws=4000)
    assert (low, high) == (pytest.approx(45.1, abs=0.6), pytest.approx(54.9, abs=0.6))
    assert interval([(np.arange(400) % 2, better)]) == [0, 100]


def test_translations_are_drawn_together():
    """The mean of two languages that agree varies as much as each of them; two that cancel, not."""
    images, better = range(100), np.arange(100) % 2.0
    one = interval([(images, better)])
    assert interval([(images, better)] * 2) == one
    assert interval([(images, better), (images, -better)]) == [0, 0]


def test_table_by_hand(world, capsys):
    a = make_run(world, "a", {"en": "1234", "de": "", "ko": "12"})
    b = make_run(world, "b", {"en": "1234", "de": "1234", "ko": "34"})
    found = rows(capsys, a, b)
    assert list(found) == [("accuracy", name) for name in ("en", "de", "ko", "mean of 2 others")]
    assert found["accuracy", "en"] == [100, 100, 0, 0, 0]
    assert found["accuracy", "de"] == [0, 100, 100, 100, 100]
    assert found["accuracy", "ko"] == [50, 50, 0, -100, 100]
    assert found["accuracy", "mean of 2 others"] == [25, 75, 50, 0, 100]


def test_text_recall_is_of_images_and_image_recall_of_texts(world, capsys):
    """B finds the captions of every image, A the image of every caption."""
    for name, text_rank, image_rank in (("a", 1, 0), ("b", 0, 1)):
        make_run(world, name, {}, "xflickrco")
        entries = [{"text": "i#0", "images": [], "rank": image_rank},
                   {"text": "i#1", "images": [], "rank": image_rank},
                   {"image": "i", "texts": [], "rank": text_rank}]
        scores = {"text_recall_at_1": 100.0 * image_rank, "image_recall_at_1": 100.0 * text_rank}
        for language in ("en", "de"):
            write(world / name / f"predictions/{language}.json", entries)
        write(world / name / "results.json", {"languages": {"en": scores, "de": scores}})
    found = rows(capsys, str(world / "a"), str(world / "b"))
    assert found["TR@1", "de"] == [0, 100, 100, 100, 100]
    assert found["IR@1", "de"] == [100, 0, -100, -100, -100]


@pytest.mark.parametrize("other, message", [
    ({"tests": {"ko": "0"}}, "tested on different data"),
    ({"asked": "123"}, "predicts other items in en than .*the same --limit"),
])
def test_what_is_not_compared(other, message, world):
    a, b = make_run(world, "a", {}), make_run(world, "b", {}, **other)
    with pytest.raises(InputError, match=message):
        compare.main([a, b])


def test_other_pre_trained_weights_are_told(world, capsys):
    a, b = make_run(world, "a", {}), make_run(world, "b", {}, weights="others")
    for other, told in ((a, False), (b, True)):
        compare.main([a, other])
        assert ("different files (pre-trained weights" in capsys.readouterr().err) is told


def test_data_that_moved(world, capsys):
    a, b = make_run(world, "a", {"de": "1"}), make_run(world, "b", {"de": "12"})
    shutil.move(world / "data", world / "moved")
    with pytest.raises(InputError, match="data: no xGQA/annotations"):
        compare.main([a, b])
    moved = ["--data", str(world / "moved")]
    assert rows(capsys, a, b, *moved)["accuracy", "de"][:3] == [25, 50, 25]
    path = world / "moved/xGQA/annotations/few_shot/de/test.json"
    questions = json.loads(path.read_text())
    write(path, questions | {"5": {"question": "?", "imageId": "5", "answer": "a"}})
    compare.main([a, b, *moved])
    assert f"warning: {path} is not the file that {a} read" in capsys.readouterr().err
    write(path, {"5": questions["4"]})
    with pytest.raises(InputError, match=r"a/predictions/de.json, beside .*: no field '1'"):
        compare.main([a, b, *moved])


@pytest.mark.parametrize("id_field, answer_field, kind", [
    ("questionId", "prediction", str), ("questionId", "prediction", int),
    ("question_id", "answer", int), ("question_id", "answer", str)])
def test_forms_of_predictions(id_field, answer_field, kind, world, capsys):
    """Three of four questions are answered, one wrongly; one is unknown."""
    answers = [("1", "yes"), ("2", "no"), ("3", "blue"), ("77", "yes")]
    write(world / "p.json", [{id_field: kind(key), answer_field: text} for key, text in answers])
    compare.main(["--score", str(world / "p.json"), "--truth",
                  str(world / "data/xGQA/annotations/few_shot/de/test.json")])
    assert capsys.readouterr().out == (
        "1 questions have no prediction and count as wrong\nall        50.00 %  (2 of 4)\n"
        "query       0.00 %  (0 of 2)\nverify    100.00 %  (2 of 2)\n")


@pytest.mark.parametrize("predictions, truth, message", [
    ([5], None, "p.json: "),
    ([{"questionId": "1"}], None, "p.json: no field 'prediction'"),
    ([{"id": "1", "prediction": "yes"}], None, "p.json: no field 'answer'"),
    ([], 5, "t.json: "), ([], [{}], "t.json, question 0: "),
])
def test_what_cannot_be_scored(predictions, truth, message, world):
    write(world / "p.json", predictions)
    write(world / "t.json", truth)
    flags = ["--score", str(world / "p.json"), "--truth", str(world / "t.json")]
    assert message in refused(compare.main, flags)


@pytest.mark.parametrize("flags", [[], ["a"], ["a", "b", "c"], ["--score", "p"], ["--truth", "t"]])
def test_flags(flags):
    with pytest.raises(InputError, match="give two runs, or --score PREDICTIONS --truth TEST.json"):
        compare.main(flags)


@pytest.mark.parametrize("language", ["en", "de"])
def test_published_predictions_get_their_published_score(language, iglue, capsys):
    """IGLUE's own UC2 predictions: as many right ones, to the last, overall and by type."""
    results = iglue / "results/xgqa"
    compare.main(["--score", str(results / f"zero_shot/uc2/test_{language}_0_result.json"),
                  "--truth", str(iglue / f"xGQA/annotations/few_shot/{language}/test.json")])
    found, printed = {}, capsys.readouterr().out
    for name, right, n in re.findall(r"(\w+) +[\d.]+ %  \((\d+) of (\d+)\)", printed):
        found[name] = {"n": int(n), "correct": int(right),
                       "acc": pytest.approx(100 * int(right) / int(n), abs=1e-9)}
    assert found == json.loads((results / "expected_en_de.json").read_text())[language]


@pytest.mark.parametrize("model, refusal", [
    ("cclm", "no such image"), ("uc2", "no features of image")])
def test_ask(model, refusal, tiny, tmp_path, capsys):
    """The likeliest answer is the one that the test gave."""
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
    with pytest.raises(InputError, match=refusal):
        ask.main([str(run), "--image", "n0", *question])
