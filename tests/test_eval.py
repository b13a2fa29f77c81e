"""eval.py: scores, ranks, batches, tables by hand; runs scored again, also after they have moved."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TOKENIZER, read_json, refused, run, train_command

import data
import eval as evaluation
from data import InputError, Record

CPU = torch.device("cpu")


def change(path, **fields):
    """Replace fields of args.json's args."""
    content = read_json(path)
    content["args"] |= fields
    path.write_text(json.dumps(content))


def run_eval(*arguments):
    evaluation.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Finished runs as train.py makes them."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in {"cclm-xgqa": [32, "--save-epochs"], "uc2-xvnli": [32],
                        "cclm-xflickrco": [16, "--precision", "bf16"]}.items():
        flags = ["--batch-size", 16, "--limit", *flags]
        run(train_command(tiny, *name.split("-"), folder / name, *flags))
    return folder


@pytest.fixture
def copy(runs, tmp_path):
    """Function: a copy of a run, to be changed."""
    return lambda name: shutil.copytree(runs / name, tmp_path / "run")


def shaken(run, languages):
    """-> (a run's model, with weights so random that predictions differ; some of its test data)."""
    model, tokenizer, labels, args, recipe = evaluation.load_run(run, CPU)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval(), evaluation.load_split(args, recipe, tokenizer, labels, "test", languages)


# ---- Scores by hand

def test_answers_are_scored_by_exact_match_and_type():
    records = [Record("1", "1", "a", {"yes": 1.0}, type="verify"),
               Record("2", "1", "a", {"no": 1.0}, type="verify"),
               Record("3", "1", "a", {"red": .5, "dark red": .5}, type="query"),
               Record("4", "1", "a", {"no label": 1.0})]
    scores = evaluation.score(records, ["yes", "yes", "dark red", "red"])
    assert scores == {"accuracy": 50.0, "n": 4, "by_type": {
        "query": {"accuracy": 100.0, "n": 1}, "verify": {"accuracy": 50.0, "n": 2}}}


def test_pairs_without_a_gold_label_count_as_wrong():
    labels = ["neutral", "-", "entailment", "-", "neutral"]
    records = [Record(str(i), "1", "a", label=label) for i, label in enumerate(labels)]
    scores = evaluation.score(records, ["neutral", "neutral", "entailment", "neutral", "entailment"])
    assert scores == {"accuracy": 40.0, "n": 5, "accuracy_labelled": pytest.approx(200 / 3),
                      "n_labelled": 3, "by_type": {"entailment": {"accuracy": 100.0, "n": 1},
                                                   "neutral": {"accuracy": 50.0, "n": 2}}}


# similarities or scores of three captions (rows) with images A and B; the first two show A
SCORES = torch.tensor([[.9, .1], [.2, .8], [.7, .3]])
RIGHT = torch.tensor([[True, False], [True, False], [False, True]])
ALL = torch.ones(3, 2, dtype=torch.bool)


def test_ranks_both_ways():
    """Image ranks 0, 1, 1; of A's captions the better one is first, B's is second of three."""
    result, predictions = evaluation.rank_both_ways(SCORES, ALL, ALL, RIGHT, ["a0", "a1", "b"],
                                                    ["A", "B"])
    assert result == {
        "text_recall_at_1": 50.0, "text_recall_at_5": 100.0, "text_recall_at_10": 100.0,
        "image_recall_at_1": pytest.approx(100 / 3), "image_recall_at_5": 100.0,
        "image_recall_at_10": 100.0, "n_images": 2, "n_texts": 3}
    assert predictions == [{"text": "a0", "images": ["A", "B"], "rank": 0},
                           {"text": "a1", "images": ["B", "A"], "rank": 1},
                           {"text": "b", "images": ["A", "B"], "rank": 1},
                           {"image": "A", "texts": ["a0", "b", "a1"], "rank": 0},
                           {"image": "B", "texts": ["a1", "b", "a0"], "rank": 1}]


def test_what_is_no_candidate_ranks_below():
    assert evaluation.evaluate.__wrapped__.__defaults__[-1] == 128  # most candidates
    best_image, best_text = evaluation.top(SCORES, 1, 1), evaluation.top(SCORES, 1, 0)
    assert best_image.tolist() == [[True, False], [False, True], [True, False]]
    assert best_text.tolist() == [[True, False], [False, True], [False, False]]
    by_text = torch.tensor([[True, False], [True, False], [True, False]])
    _, predictions = evaluation.rank_both_ways(SCORES, by_text, best_text, RIGHT, "012", "AB")
    assert [entry["rank"] for entry in predictions[:3]] == [0, 0, 1]
    assert predictions[4]["texts"][0] == "1" and predictions[4]["rank"] == 2


def test_table_has_a_dash_where_a_language_has_no_item():
    records = [Record("1", "1", "a", label="neutral"), Record("2", "1", "a", label="-")]
    results = {"en": evaluation.score(records, ["neutral"] * 2),
               "fr": evaluation.score(records[:1], ["neutral"]),
               "ru": evaluation.score(records[1:], ["neutral"])}
    assert evaluation.table("xvnli", results) == (
        "                  accuracy  without -  neutral\n"
        "en                    50.0      100.0    100.0\n"
        "fr                   100.0      100.0    100.0\n"
        "ru                     0.0          -        -\n"
        "mean of 2 others      50.0      100.0    100.0")


# ---- What is evaluated

def test_which_captions_and_images(tiny, tmp_path):
    """xFlickrCO with German images in another order and an English caption of punctuation: rows are
    those of a common list of images. CCLM leaves out such a caption, UC2 ranks it."""
    folder = shutil.copytree(tiny / "data", tmp_path / "data", symlinks=True)
    for language in ("en", "de"):
        path = folder / "xFlickrCO/annotations" / language / "test.jsonl"
        records = [record for _, record in data.read_jsonl(path)][:3]
        if language == "en":
            images = [Path(record["img_path"]).stem for record in records]
            records[1]["sentences"] = ["..."]
        else:
            records = [records[2], records[0]]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = {}
    for model in ("cclm", "uc2"):
        args = SimpleNamespace(model=model, task="xflickrco", data=str(folder), limit=None)
        recipe = SimpleNamespace(clean="caption" if model == "cclm" else "", test_words=80,
                                 test_tokens=80, image_size=8)
        split = evaluation.load_split(args, recipe, data.Tokenizer(TOKENIZER), [], "test", ["en", "de"])
        rows = {language: list(map(int, rows)) for language, rows in split.image_rows.items()}
        found[model] = split.pictures.keys, rows
        assert split.examples["de"].image_keys == [images[2], images[0]]
    assert found == {"cclm": ([images[0], images[2]], {"en": [0, 1], "de": [1, 0]}),
                     "uc2": (images, {"en": [0, 1, 2], "de": [2, 0]})}


# ---- The evaluation against one text at a time

@pytest.mark.parametrize("name", ["cclm-xgqa", "uc2-xvnli", "cclm-xflickrco"])
def test_batches_do_not_matter(name, runs, monkeypatch):
    """Little by little or everything at once: the same predictions, or ranks."""
    model, chosen = shaken(runs / name, ["en", "ru"])
    if name == "uc2-xvnli":
        assert chosen.names == ("contradiction", "neutral", "entailment")  # its class ids
    if name == "cclm-xflickrco":  # with --limit, a language may show fewer images
        fewer = chosen.examples["ru"]
        fewer.records, fewer.tokens = fewer.records[:10], fewer.tokens[:10]
        chosen.image_rows["ru"] = chosen.image_rows["ru"][:10]
    results, predictions = evaluation.evaluate(model, chosen, CPU)
    assert results["ru"].get("n_images", 10) == 10
    for images, tokens in ((1, 40), (100, 100_000)):
        monkeypatch.setitem(evaluation.IMAGES_AT_ONCE, "cpu", images)
        monkeypatch.setitem(evaluation.TOKENS_AT_ONCE, "cpu", tokens)
        again, predicted = evaluation.evaluate(model, chosen, CPU)
        assert again == results
        field = "rank" if name == "cclm-xflickrco" else "prediction"
        found = [entry[field] for entry in predicted["ru"]]
        assert found == [entry[field] for entry in predictions["ru"]] and len(set(found)) > 1


def test_similarities_do_not_tie_under_bf16(runs, monkeypatch):
    """They choose the candidates of CCLM's retrieval, among 5,000 captions."""
    model, chosen = shaken(runs / "cclm-xflickrco", ["en"])
    seen, top = [], evaluation.top
    monkeypatch.setattr(evaluation, "top", lambda found, *of: seen.append(found) or top(found, *of))
    evaluation.evaluate(model, chosen, CPU, "bf16")
    assert len(seen) == 2
    assert all(len(found.unique()) > 0.9 * found.numel() for found in seen)


@torch.inference_mode()
def test_answers_are_the_likeliest_labels(runs):
    """Every question alone with its image, every label scored in full by teacher forcing: the
    answers of the whole evaluation."""
    model, chosen = shaken(runs / "cclm-xgqa", ["en", "bn"])
    _, predictions = evaluation.evaluate(model, chosen, CPU)
    rows = torch.zeros(len(model.answer_ids), dtype=torch.long)
    for language, examples in chosen.examples.items():
        for i, entry in enumerate(predictions[language]):
            memory = model.memory(chosen.pictures.batch(chosen.image_rows[language][i : i + 1]))
            states, mask = evaluation.encode(model, [examples.tokens[i]], CPU)
            fused = model.fuse(states, mask, memory)
            losses = model.decoder.answer_losses(fused, mask, model.answer_ids, rows)
            assert entry == {"questionId": examples.records[i].id,
                             "prediction": chosen.names[losses.argmin()]}
        assert len({entry["prediction"] for entry in predictions[language]}) > 1


# ---- A run again

@pytest.mark.parametrize("name", ["cclm-xgqa", "uc2-xvnli", "cclm-xflickrco"])
def test_scoring_again_gives_the_results_of_training(name, copy, capsys):
    folder = copy(name)
    run_eval(folder)
    out, err = capsys.readouterr()
    results = [read_json(folder / name)["languages"] for name in ("results.json", "test/results.json")]
    assert results[0] == results[1]
    assert out.endswith(f"results and predictions: {folder / 'test'}\n") and err == ""
    files = sorted((folder / "predictions").iterdir())
    assert len(files) == len(data.LANGUAGES[name.split("-")[1]])
    for path in files:
        assert (folder / "test/predictions" / path.name).read_bytes() == path.read_bytes()


def test_languages_split_epoch_answers_and_out(copy, tiny, tmp_path):
    folder = copy("cclm-xgqa")
    run_eval(folder, "--split", "dev", "--languages", "ko,de")
    results = read_json(folder / "dev/results.json")["languages"]
    assert list(results) == ["ko", "de"]
    truth = read_json(tiny / "data/xGQA/annotations/few_shot/ko/dev.json")
    predicted = read_json(folder / "dev/predictions/ko.json")
    right = [truth[entry["questionId"]]["answer"] == entry["prediction"] for entry in predicted]
    assert results["ko"]["accuracy"] == 100 * sum(right) / 32 and len(predicted) == 32
    # the last epoch's weights are model.pt
    run_eval(folder, "--epoch", 2, "--languages", "de")
    expected = {"de": read_json(folder / "results.json")["languages"]["de"]}
    assert read_json(folder / "test-epoch2/results.json")["languages"] == expected
    run_eval(folder, "--answers", "reference", "--out", tmp_path / "elsewhere", "--languages", "de")
    assert (tmp_path / "elsewhere/predictions/de.json").is_file()
    assert not (folder / "test-reference").exists()


def test_how_answers_are_chosen_is_a_runs_own(copy):
    folder = copy("cclm-xgqa")
    for answers in ("exact", "reference"):
        change(folder / "args.json", answers=answers)
        assert evaluation.load_run(folder, CPU)[0].answers == answers


def test_data_that_moved(copy, tiny, tmp_path, capsys):
    folder = copy("uc2-xvnli")
    change(folder / "args.json", data=str(tmp_path / "gone"))
    with pytest.raises(InputError, match="gone: it is gone since .*--data DIR"):
        run_eval(folder)
    moved = shutil.copytree(tiny / "data", tmp_path / "moved", symlinks=True)
    run_eval(folder, "--data", moved, "--languages", "fr")
    assert capsys.readouterr().err == ""
    change(folder / "args.json", tokenizer=str(tmp_path / "gone.model"))
    with pytest.raises(InputError, match="gone.model: .*--tokenizer FILE"):
        run_eval(folder, "--data", moved)
    # the same place, other content
    file = moved / "XVNLI/annotations/fr/test.jsonl"
    file.write_text(file.read_text() + "\n")
    flags = ["--data", moved, "--tokenizer", tiny / "tokenizer.model", "--languages", "fr"]
    run_eval(folder, *flags)
    assert capsys.readouterr().err == f"warning: {file} is not the file that {folder} read\n"


def test_checkout_that_moved(copy, tiny, monkeypatch):
    """What lies in the checkout is stored relative to it: no flag is needed."""
    folder = copy("uc2-xvnli")
    change(folder / "args.json", data="data", tokenizer="tokenizer.model")
    monkeypatch.setattr(evaluation, "ROOT", str(tiny))
    run_eval(folder, "--languages", "fr")
    expected = {"fr": read_json(folder / "results.json")["languages"]["fr"]}
    assert read_json(folder / "test/results.json")["languages"] == expected


@pytest.mark.parametrize("flags, message", [
    (["--languages", "en,de"], "no XVNLI/annotations/de/test.jsonl"),
    (["--epoch", "1"], "epoch1.pt"),
    (["--split", "train"], "argument --split: invalid choice: 'train'"),
    (["--speed", "2"], "unrecognized arguments: --speed 2"),
])
def test_what_cannot_be_evaluated(flags, message, runs):
    assert message in refused(run_eval, runs / "uc2-xvnli", *flags)


@pytest.mark.parametrize("name, content, message", [
    ("args.json", None, "args.json: cannot be read"), ("args.json", b"{}", "no field 'args'"),
    ("args.json", b"{", "args.json: "), ("model.pt", None, "model.pt"),
    ("model.pt", b"PK", "model.pt"), ("test", b"", "test/predictions: "),
])
def test_damaged_runs(name, content, message, copy):
    folder = copy("uc2-xvnli")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    assert message in refused(run_eval, folder)
    (folder / "results.json").unlink()
    with pytest.raises(InputError, match="this run is not finished"):
        evaluation.read_results(folder)


# ---- Programs

PROGRAM = """
import os, sys, eval
for case, output in zip(("full", "closed", "ascii"), map(int, sys.argv[2:])):
    if os.fork() == 0:
        os.dup2(output, 1)
        os.dup2(os.open(f"{sys.argv[1]}/{case}", os.O_WRONLY | os.O_CREAT), 2)
        def main():
            print("ключ\\n" * 5000)
            if case == "ascii":
                raise eval.InputError("a\\nfile")
        eval.command(main)
        sys.exit()
    print(case, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_programs_end_without_a_traceback(tmp_path):
    """A full output, a closed one; a console that is not UTF-8, and a user's mistake."""
    reader, closed = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full, open(tmp_path / "out", "w") as out:
        outputs = [full.fileno(), closed, out.fileno()]
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path), *map(str, outputs)], cwd=ROOT, text=True,
            env=os.environ | {"PYTHONIOENCODING": "ascii"}, pass_fds=outputs, capture_output=True)
    os.close(closed)
    assert ended.stdout == "full 2\nclosed 2\nascii 2\n"
    assert (tmp_path / "out").read_text().startswith("\\u043a\\u043b\\u044e\\u0447\n")
    errors = {name: (tmp_path / name).read_text() for name in ("full", "closed", "ascii")}
    assert errors == {"full": "error: [Errno 28] No space left on device\n", "closed": "",
                      "ascii": "error: a file\n"}
