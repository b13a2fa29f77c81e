"""eval.py: runs scored again, compared and of foreign origin; and the evaluation against one text at a time."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import train_command

import cclm
import data
import eval as evaluation
import train

CPU = torch.device("cpu")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Finished runs as train.py makes them."""
    folder, handlers = tmp_path_factory.mktemp("runs"), {number: signal.getsignal(number)
                                                         for number in (signal.SIGINT, signal.SIGTERM)}
    for name, flags in {"cclm-xgqa": ["--save-epochs"], "cclm-xgqa-suf": ["--suf"], "uc2-xvnli": [],
                        "cclm-xflickrco": ["--limit", 40]}.items():
        train.main(train_command(tiny, *name.split("-")[:2], folder / name, "--limit", 64, *flags)[2:])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return folder


@pytest.fixture
def run(runs, tmp_path):
    """Function: a copy of a run, to be changed."""
    return lambda name, copy="run": shutil.copytree(runs / name, tmp_path / copy)


def run_eval(*arguments):
    evaluation.main([str(argument) for argument in arguments])


def refused(*arguments):
    with pytest.raises(SystemExit) as end:
        run_eval(*arguments)
    error = str(end.value.code)
    assert error.startswith("error: ") and "\n" not in error
    return error


def change(path, edit):
    """Replace the content of a JSON file by edit(content), or what edit makes of it in place."""
    content = read(path)
    edited = edit(content)
    path.write_text(json.dumps(content if edited is None else edited))


def shaken(run, languages):
    """-> (a run's model with random numbers added to its weights, so that its predictions differ
    from text to text; some of its test data).
    """
    model, tokenizer, labels, args, recipe = evaluation.load_run(run, CPU)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval(), evaluation.load_split(args, recipe, tokenizer, labels, "test", languages)


# ---------------------------------------------------------------------------------------------------------------------
# A run again


@pytest.mark.parametrize("name", ["cclm-xgqa", "uc2-xvnli", "cclm-xflickrco"])
def test_scoring_again_gives_the_results_of_training(name, run):
    folder = run(name)
    run_eval(folder)
    assert read(folder / "results_test.json")["languages"] == read(folder / "results.json")["languages"]
    files = sorted((folder / "predictions").iterdir())
    assert len(files) == len(data.LANGUAGES[name.split("-")[1]])
    assert all((folder / "predictions_test" / path.name).read_bytes() == path.read_bytes() for path in files)


def test_languages_split_and_epoch(run, tiny):
    folder = run("cclm-xgqa")
    run_eval(folder, "--split", "dev", "--languages", "ko,de")
    results = read(folder / "results_dev.json")["languages"]
    assert list(results) == ["ko", "de"]
    assert sorted(path.name for path in (folder / "predictions_dev").iterdir()) == ["de.json", "ko.json"]
    for language, scores in results.items():
        truth = read(tiny / "data" / "xGQA" / "annotations" / "few_shot" / language / "dev.json")
        predicted = {entry["questionId"]: entry["prediction"]
                     for entry in read(folder / "predictions_dev" / f"{language}.json")}
        assert list(predicted) == list(truth)[:64]
        right = {key: predicted[key] == truth[key]["answer"] for key in predicted}
        assert scores["accuracy"] == pytest.approx(100 * sum(right.values()) / 64) and scores["n"] == 64
        verify = [right[key] for key in predicted if truth[key]["types"]["structural"] == "verify"]
        assert scores["by_type"]["verify"] == {"accuracy": pytest.approx(100 * sum(verify) / len(verify)),
                                               "n": len(verify)}
    run_eval(folder, "--epoch", 2)  # the last: the weights of model.pt
    assert read(folder / "results_test_epoch2.json")["languages"] == read(folder / "results.json")["languages"]


def test_what_cannot_be_evaluated(run, tmp_path):
    folder = run("uc2-xvnli")
    assert "has no language 'de' (it has en, ar, es, fr, ru)" in refused(folder, "--languages", "en,de")
    assert "epoch1.pt: no such weights" in refused(folder, "--epoch", 1)
    (folder / "results.json").unlink()
    assert "this run is not finished" in refused("--compare", folder, folder)
    (folder / "predictions_dev").touch()
    assert "predictions_dev: cannot write there (File exists)" in refused(folder, "--split", "dev")
    (folder / "model.pt").unlink()
    assert "the run is not finished" in refused(folder)
    assert "no such file" in refused("--score", "", "--truth", folder / "args.json")
    assert "not the folder of a run of train.py" in refused(tmp_path / "nothing")


def test_features_of_another_width(run, tiny, tmp_path):
    folder, world = run("uc2-xvnli"), shutil.copytree(tiny / "data", tmp_path / "data", symlinks=True)
    width = read(world / "flickr30k" / "features" / "meta.json")["dim"]
    features = np.load(world / "flickr30k" / "features" / "features.npy")
    np.save(world / "flickr30k" / "features" / "features.npy", features[..., :-1])
    change(world / "flickr30k" / "features" / "meta.json", lambda meta: meta.update(dim=width - 1))
    change(folder / "args.json", lambda stored: stored["args"].update(data=str(world)))
    assert f"flickr30k/features: features of width {width - 1}, the checkpoint reads {width}" in refused(folder)


@pytest.mark.parametrize("file, edit, message", [
    ("args.json", lambda stored: {"args": {}, "recipe": {}}, "args.json, args: no field 'model'"),
    ("args.json", lambda stored: stored | {"args": []}, "args.json, args: expected an object"),
    ("args.json", lambda stored: stored | {"recipe": []}, "args.json, recipe: expected an object"),
    ("args.json", lambda stored: stored | {"recipe": {"epochs": 2}}, "args.json, recipe: no field 'batch_size'"),
    ("args.json", lambda stored: stored["recipe"].update(speed=1), "args.json, recipe: unknown field 'speed'"),
    ("args.json", lambda stored: stored["args"].__delitem__("miniature"), "args.json, args: no field 'miniature'"),
    *(("args.json", lambda stored, part=part, name=name, value=value: stored[part].update({name: value}),
       f"args.json, {part}: {name} is {value!r}, expected ")
      for part, name, value in [
          ("args", "model", "bert"), ("args", "task", ["xgqa"]), ("args", "workers", -1), ("args", "workers", True),
          ("args", "limit", -1), ("args", "limit", 0), ("args", "precision", "fp8"), ("args", "miniature", None),
          ("args", "data", 5), ("args", "data", "\0"), ("args", "tokenizer", "\ud800"), ("args", "image_cache", []),
          ("args", "few_shot", 5), ("args", "seed", "0"), ("recipe", "epochs", True), ("recipe", "image_size", -5),
          ("recipe", "test_tokens", 1), ("recipe", "test_words", -1), ("recipe", "few_shot_lrs", []),
          ("recipe", "micro_batch", None), ("recipe", "dropout", [1]), ("recipe", "clean", 5)]),
    ("args.json", lambda stored: stored.__delitem__("fingerprints"), "args.json: no field 'fingerprints'"),
    *(("results.json", lambda results, value=value: results["languages"]["fr"].update(accuracy=value),
       "results.json, fr: accuracy is ") for value in (10**400, -1, 1000, True, "x", None, float("1e300"))),
    ("results.json", lambda results: results["languages"]["fr"].update(accuracy_labelled=101),
     "results.json, fr: accuracy_labelled is 101"),
    ("results.json", lambda results: results["languages"]["fr"].__delitem__("by_type"), "fr: no field 'by_type'"),
    ("results.json", lambda results: results["languages"]["fr"].update(by_type=[1]), "'by_type' must be dict"),
    ("results.json", lambda results: results["languages"]["fr"].update(by_type={"neutral": 5}),
     "results.json, fr, type neutral: expected an object"),
    ("results.json", lambda results: results["languages"]["fr"]["by_type"]["neutral"].update(accuracy=-1),
     "results.json, fr, type neutral: accuracy is -1, expected a number from 0 to 100"),
    ("results.json", lambda results: results["languages"]["fr"]["by_type"]["neutral"].update(n=True), "n is True"),
    ("results.json", lambda results: results.update(task="mnli"), "results.json: task is 'mnli', expected one of"),
    ("predictions/fr.json", lambda entries: [*entries, entries[0]], "stands there a second time"),
    ("results.json", lambda results: {}, "results.json: no field 'task'"),
    ("results.json", lambda results: results.update(languages={"en": {}}), "en: no field 'accuracy'"),
    ("results.json", lambda results: results.update(languages={}), "have no language in common"),
    ("predictions/fr.json", lambda entries: [], "fr.json: expected a list of predictions"),
    ("predictions/fr.json", lambda entries: {}, "fr.json: expected a list of predictions"),
    ("predictions/fr.json", lambda entries: [[1]], "fr.json: expected a list of predictions"),
    ("predictions/fr.json", lambda entries: [entry | {"id": f"another {i}"} for i, entry in enumerate(entries)],
     "fr.json: no prediction is about an item of the test data")])
def test_damaged_runs(file, edit, message, run):
    folder = run("uc2-xvnli")
    change(folder / file, edit)
    assert message in refused("--compare", folder, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Two runs


def compared(capsys, a, b):
    """The lines of --compare: {(metric, language or mean): (A, B, B - A, low, high)}."""
    run_eval("--compare", a, b)
    rows, metric = {}, None
    for line in capsys.readouterr().out.splitlines():
        numbers = re.findall(r"[-+]?\d+\.\d+", line)
        if "interval" in line:
            metric = line.split()[0]
        elif len(numbers) == 5:
            rows[metric, line.split("  ")[0].strip()] = tuple(map(float, numbers))
    return rows


def test_compare(runs, capsys):
    """A and B are the runs' results; the interval of the difference holds it."""
    a, b = runs / "cclm-xgqa", runs / "cclm-xgqa-suf"
    rows = compared(capsys, a, b)
    results = [read(run / "results.json")["languages"] for run in (a, b)]
    assert [language for _, language in rows] == [*data.LANGUAGES["xgqa"], "mean of 7 others"]
    for (_, language), (in_a, in_b, difference, low, high) in rows.items():
        expected = [evaluation.mean_zero_shot(some, "accuracy") if language.startswith("mean")
                    else some[language]["accuracy"] for some in results]
        assert (in_a, in_b, difference) == pytest.approx((*expected, expected[1] - expected[0]), abs=0.0051)
        assert low <= difference <= high
    assert all(row[2:] == (0, 0, 0) for row in compared(capsys, a, a).values())
    rows = compared(capsys, runs / "cclm-xflickrco", runs / "cclm-xflickrco")
    assert {metric for metric, _ in rows} == {"TR@1", "IR@1"} and all(row[2:] == (0, 0, 0) for row in rows.values())
    assert "nothing to compare" in refused("--compare", a, runs / "uc2-xvnli")
    for flags in (["--languages", "de"], ["--epoch", 1], ["--split", "dev"]):
        with pytest.raises(SystemExit, match="2"):
            run_eval("--compare", a, b, *flags)
        assert capsys.readouterr().err == "error: --languages, --split and --epoch go with the folder of a run\n"


def test_compare_by_hand(run, tiny, capsys):
    """B answers all, A none of the German questions; of the Korean ones B answers
    those about every other image, A none.
    """
    a, b = run("cclm-xgqa", "a"), run("cclm-xgqa", "b")
    gold = read(tiny / "data" / "xGQA" / "annotations" / "few_shot" / "de" / "test.json")
    questions = list(gold)[:64]
    images = list(dict.fromkeys(gold[key]["imageId"] for key in questions))
    half = set(images[::2])
    for folder in (a, b):
        for language in ("de", "ko"):
            right = {key: folder == b and (language == "de" or gold[key]["imageId"] in half) for key in questions}
            entries = [{"questionId": key, "prediction": gold[key]["answer"] if right[key] else "?"}
                       for key in questions]
            (folder / "predictions" / f"{language}.json").write_text(json.dumps(entries))
            results = read(folder / "results.json")
            results["languages"][language]["accuracy"] = 100 * sum(right.values()) / len(right)
            (folder / "results.json").write_text(json.dumps(results))
    rows = compared(capsys, a, b)
    assert rows["accuracy", "de"] == (0, 100, 100, 100, 100)
    share = sum(gold[key]["imageId"] in half for key in questions) / len(questions)
    assert rows["accuracy", "ko"][2] == pytest.approx(100 * share, abs=0.0051)
    # of a share of images drawn with replacement, 4 questions each
    deviation = 100 * np.sqrt(share * (1 - share) / len(images))
    assert rows["accuracy", "ko"][3:] == pytest.approx((100 * share - 1.96 * deviation, 100 * share + 1.96 * deviation),
                                                       abs=deviation / 2)
    assert rows["accuracy", "mean of 7 others"][2] == pytest.approx((100 + 100 * share) / 7, abs=0.0051)
    (b / "predictions" / "de.json").write_text(json.dumps(read(b / "predictions" / "de.json")[:-1]))
    assert "predicts other items" in refused("--compare", a, b)
    for limit, said in ((256, "one was run with --limit 64, the other with --limit 256"),
                        (None, "one was run with --limit 64, the other without --limit")):
        change(b / "args.json", lambda stored: stored["args"].update(limit=limit))
        assert said in refused("--compare", a, b)


def test_an_image_counts_as_one_in_all_languages(run, capsys):
    """B answers the questions about every other image, in German and in Korean, where the first image has no questions:
    the mean varies as the languages do, which vary together.
    """
    a, b = run("cclm-xgqa", "a"), run("cclm-xgqa", "b")
    _, records = data.read_records(evaluation.read_run(a)[0].data, "xgqa", "test", "de")
    images = sorted({record.image for record in records[:64]})
    for folder in (a, b):
        for language in data.LANGUAGES["xgqa"]:
            right = set(images[::2]) if folder == b and language in ("de", "ko") else ()
            entries = [{"questionId": record.id,
                        "prediction": next(iter(record.answers)) if record.image in right else "?"}
                       for record in records[:64] if language != "ko" or record.image != images[0]]
            (folder / "predictions" / f"{language}.json").write_text(json.dumps(entries))
    rows = compared(capsys, a, b)
    german, korean, mean = (rows["accuracy", name] for name in ("de", "ko", "mean of 7 others"))
    together = (german[4] - german[3] + korean[4] - korean[3]) / 7
    assert mean[4] - mean[3] == pytest.approx(together, rel=0.1) and together > 5


def test_runs_tested_on_different_data_are_not_compared(run, capsys):
    a, b = run("cclm-xgqa", "a"), run("cclm-xgqa", "b")
    change(b / "args.json", lambda stored: stored | {"fingerprints": {  # the same files elsewhere, other training data
        path.replace("/data/", "/elsewhere/"): digest if "test.json" in path else "0"
        for path, digest in stored["fingerprints"].items()}})
    run_eval("--compare", a, b)
    change(b / "args.json", lambda stored: stored["fingerprints"].update(
        {path: "0" for path in stored["fingerprints"] if path.endswith("/ko/test.json")}))
    assert refused("--compare", a, b).endswith("were tested on different data (their ko/test.json are not the same): "
                                               "train one of them again")


# ---------------------------------------------------------------------------------------------------------------------
# Foreign predictions


@pytest.mark.parametrize("language", ["en", "de"])
def test_published_predictions_get_their_published_score(language, iglue, capsys):
    """IGLUE's own UC2 predictions: as many right ones, to the last, overall and by type."""
    run_eval("--score", iglue / "results" / "xgqa" / "zero_shot" / "uc2" / f"test_{language}_0_result.json",
             "--truth", iglue / "xGQA" / "annotations" / "few_shot" / language / "test.json")
    found = {}
    for line in capsys.readouterr().out.splitlines():
        if match := re.fullmatch(r"(\w+) +([\d.]+) %  \((\d+) of (\d+)\)", line):
            right, n = int(match[3]), int(match[4])
            assert match[2] == f"{100 * right / n:.2f}"
            found[match[1]] = {"n": n, "correct": right, "acc": pytest.approx(100 * right / n, abs=1e-9)}
    assert found == read(iglue / "results" / "xgqa" / "expected_en_de.json")[language]


def test_missing_and_unknown_predictions_are_told(tiny, tmp_path, capsys):
    truth = tiny / "data" / "xGQA" / "annotations" / "few_shot" / "en" / "test.json"
    gold = read(truth)
    entries = [{"questionId": key, "prediction": record["answer"]} for key, record in gold.items()]
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(entries[: len(gold) // 4] + [{"questionId": "nowhere", "prediction": "yes"}]))
    run_eval("--score", path, "--truth", truth)
    out = capsys.readouterr().out
    assert f"{len(gold) - len(gold) // 4:,} questions have no prediction and count as wrong" in out
    assert "1 predictions are about other questions and are left out" in out and " 25.00 %" in out
    path.write_text("{}")
    assert "expected a list" in refused("--score", path, "--truth", truth)
    path.write_text(json.dumps([{"questionId": "1"}]))
    assert "entry 0: no field 'prediction'" in refused("--score", path, "--truth", truth)
    path.write_text(json.dumps([*entries, entries[0] | {"prediction": "another"}]))
    error = refused("--score", path, "--truth", truth)
    assert f"entry {len(entries)}: questionId '{next(iter(gold))}' stands there a second time" in error
    question = {"question_id": 1, "img_id": "1", "sent": "Is it?", "label": {"yes": 1.0}}
    (tmp_path / "list.json").write_text(json.dumps([question, question | {"question_id": "1", "label": {"no": 1.0}}]))
    path.write_text("[]")
    assert "list.json: question 1 stands there a second time" in refused("--score", path, "--truth",
                                                                         tmp_path / "list.json")
    (tmp_path / "truth.json").write_text("{}")
    path.write_text("[]")
    assert "truth.json: no records" in refused("--score", path, "--truth", tmp_path / "truth.json")


# ---------------------------------------------------------------------------------------------------------------------
# The evaluation itself


def test_languages_without_labels_or_types():
    """A test file of "-" alone; a language whose questions have no types: a score all the same, "-" in the table."""
    pairs = [data.Record("1", "1", "a", label="-")]
    results = {"en": evaluation.score_labels([data.Record("1", "1", "a", label="neutral"), *pairs], ["neutral"] * 2),
               "fr": evaluation.score_labels(pairs, ["neutral"]), "ru": evaluation.score_labels(pairs, ["neutral"])}
    assert (results["fr"]["accuracy"], results["fr"]["accuracy_labelled"]) == (0, None)
    rows = [line.split() for line in evaluation.table("xvnli", results).splitlines()]
    assert rows[1:] == [["en", "50.0", "100.0", "100.0"], ["fr", "0.0", "-", "-"], ["ru", "0.0", "-", "-"],
                        ["mean", "of", "these", "2", "0.0", "-", "-"]]
    typed, untyped = (data.Record("1", "1", "a", {"yes": 1.0}, type=name) for name in ("verify", ""))
    results = {language: evaluation.score_answers([record], ["yes"])
               for language, record in {"en": untyped, "de": typed, "ko": untyped}.items()}
    rows = [line.split() for line in evaluation.table("xgqa", results).splitlines()]
    assert rows == [["accuracy", "verify"], ["en", "100.0", "-"], ["de", "100.0", "100.0"], ["ko", "100.0", "-"],
                    ["mean", "of", "these", "2", "100.0", "100.0"]]


@pytest.mark.parametrize("languages, last", [
    (["en"], "en"), (["en", "de"], "de"), (["de", "ko"], "mean of these 2"), (["en", "de", "ko"], "mean of these 2"),
    (data.LANGUAGES["xgqa"], "mean of 7 others"), (data.LANGUAGES["xgqa"][1:], "mean of 7 others")])
def test_the_mean_is_named_after_its_languages(languages, last):
    assert evaluation.table("xgqa", {name: {"accuracy": 5.0} for name in languages}).splitlines()[-1].startswith(last)


@pytest.mark.parametrize("name", ["cclm-xgqa", "uc2-xvnli", "cclm-xflickrco"])
def test_batches_do_not_matter(name, runs):
    """One image and one text at a time, everything at once, and anything between: the same predictions, or ranks."""
    model, chosen = shaken(runs / name, ["en", "ru"])
    results, predictions = evaluation.evaluate(model, chosen, CPU)
    sizes = [(1, 7), (100, 1000)] + ([] if name == "cclm-xflickrco" else [(1, 1), (3, 20)])
    for image_batch, text_batch in sizes:
        again, predicted = evaluation.evaluate(model, chosen, CPU, image_batch=image_batch, text_batch=text_batch)
        if name == "cclm-xflickrco":
            assert [entry["rank"] for entry in predicted["ru"]] == [entry["rank"] for entry in predictions["ru"]]
        else:
            assert predicted == predictions and len({entry["prediction"] for entry in predicted["ru"]}) > 1
        assert again == results


def test_similarities_do_not_tie_under_bf16(runs, monkeypatch):
    """They choose the candidates of CCLM's retrieval, among 5,000 captions."""
    model, chosen = shaken(runs / "cclm-xflickrco", ["en"])
    seen, top = [], evaluation.top
    monkeypatch.setattr(evaluation, "top", lambda similarity, *of: seen.append(similarity) or top(similarity, *of))
    evaluation.evaluate(model, chosen, CPU, "bf16")
    assert len(seen) == 2 and all(len(similarity.unique()) > 0.9 * similarity.numel() for similarity in seen)


@torch.inference_mode()
def test_answers_are_the_likeliest_labels(runs):
    """Every question alone with its image, every label scored in full by teacher forcing:
    the answers of the whole evaluation.
    """
    model, chosen = shaken(runs / "cclm-xgqa", ["en", "bn"])
    _, predictions = evaluation.evaluate(model, chosen, CPU)
    args, _ = evaluation.read_run(runs / "cclm-xgqa")
    answer_ids, _ = data.pad(list(data.Tokenizer(args.tokenizer)(chosen.names)))
    assert answer_ids.tolist()[0][0] == cclm.BOS and len(set(map(tuple, answer_ids.tolist()))) == len(chosen.names)
    for language, examples in chosen.examples.items():
        for i, entry in enumerate(predictions[language]):
            memory = model.memory(chosen.pictures.batch(chosen.image_rows[language][i : i + 1]))
            input_ids, mask = data.pad([examples.tokens[i]])
            states = model.fuse(model.encode_texts(input_ids, mask), mask, memory)
            losses = model.decoder.answer_losses(states, mask, answer_ids,
                                                 torch.zeros(len(answer_ids), dtype=torch.long))
            assert entry == {"questionId": examples.records[i].id, "prediction": chosen.names[losses.argmin()]}
        assert len({entry["prediction"] for entry in predictions[language]}) > 1
