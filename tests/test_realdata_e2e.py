"""train.py and eval.py on IGLUE's real annotation files (IGLUE_DIR), as a user runs them.

What is not text stands in for what a user brings: images drawn here under the right file names, region features drawn
here and brought in by `data.py --convert`, tiny random checkpoints, and the tokenizer iglue_sp8k.model beside the
annotations. The training files of XVNLI and Flickr30k are not among the small real files: train_48.jsonl and
valid_ann.jsonl, which have the same format, are linked in their place.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, save_tiny_checkpoints, train_command
from PIL import Image, ImageDraw

import data

LIMIT = 32
FEATURE_WIDTH = 12


@pytest.fixture(scope="module")
def real(iglue, tmp_path_factory):
    """A folder like `tiny`: data/ with the real annotations and drawn pictures, tokenizer.model, cclm.pt and uc2.pt."""
    if not (iglue / "iglue_sp8k.model").is_file():
        pytest.skip("IGLUE_DIR has no iglue_sp8k.model, a tokenizer that stands for XLM-R's")
    folder = tmp_path_factory.mktemp("real")
    (folder / "tokenizer.model").symlink_to(iglue / "iglue_sp8k.model")
    save_tiny_checkpoints(folder, folder / "tokenizer.model", FEATURE_WIDTH, positions=130)
    links = ["gqa/annotations", "xGQA/annotations", "xFlickrCO/annotations"]
    links += [f"XVNLI/annotations/{language}/test.jsonl" for language in data.LANGUAGES["xvnli"]]
    links = {name: name for name in links} | {"XVNLI/annotations/en/train.jsonl": "XVNLI/annotations/en/train_48.jsonl"}
    links["flickr30k/annotations/train_ann.jsonl"] = "flickr30k/annotations/valid_ann.jsonl"
    for name, original in links.items():
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(iglue / original)
    return folder


def shown_images(folder, task, *splits):
    """{image key: its number} of all images that the first records of some splits show, in any language."""
    languages = {split: data.LANGUAGES[task] if split == "test" else ["en"] for split in splits}
    records = [record for split in splits for language in languages[split]
               for record in data.read_records(folder / "data", task, split, language)[1][:LIMIT]]
    return {key: number for number, key in enumerate(dict.fromkeys(record.image for record in records))}


def draw_images(folder, task):
    for key, seed in shown_images(folder, task, "train", "test").items():
        rng = np.random.default_rng(seed)
        image = Image.new("RGB", (48, 40), tuple(rng.integers(256, size=3).tolist()))
        corners = np.sort(rng.integers(40, size=(2, 2)), axis=0).flatten().tolist()
        ImageDraw.Draw(image).rectangle(corners, tuple(rng.integers(256, size=3).tolist()))
        path = folder / "data" / data.image_path("", task, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def draw_regions(folder, task, split):
    """Region features as a detector's .npy files, converted to the folder that training reads."""
    source = folder / f"detections-{split}"
    source.mkdir()
    for key, seed in shown_images(folder, task, split).items():
        rng = np.random.default_rng(seed)
        boxes = np.sort(rng.random((5, 2, 2)), axis=1).reshape(5, 4) * [640, 480, 640, 480]
        np.save(source / f"{key}.npy", rng.random((5, FEATURE_WIDTH)).astype(np.float32))
        np.save(source / f"{key}_info.npy", {"bbox": boxes.astype(np.float32), "num_boxes": 5, "image_width": 640,
                                             "image_height": 480})
    data.main(["--convert", str(source), data.feature_folder(str(folder / "data"), task, split)])


def python(*command):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def trained(folder, model, task, run, epochs=2):
    """Train through the command line. -> (losses of all steps, results by language)."""
    flags = ["--suf", "--limit", LIMIT, "--batch-size", 8, "--epochs", epochs, "--lr", 0.01]
    output = python(*train_command(folder, model, task, run, *flags)[1:])
    assert "ids may differ" not in output  # the checkpoint knows the tokenizer
    losses = [entry["loss"] for entry in map(json.loads, (run / "log.jsonl").open()) if "loss" in entry]
    examples = data.read_records(folder / "data", task, "train")[1][:LIMIT]
    steps = sum(record.label != "-" for record in examples) // 8  # CCLM leaves statements without a gold label out
    assert len(losses) == epochs * steps and np.isfinite(losses).all()
    results = json.loads((run / "results.json").read_text())["languages"]
    assert list(results) == list(data.LANGUAGES[task])
    return losses, results


def predictions(run, language):
    return json.loads((run / "predictions" / f"{language}.json").read_text())


def real_test_records(folder, task, language):
    return data.read_records(folder / "data", task, "test", language)[1][:LIMIT]


def test_xgqa_cclm(real, tmp_path):
    draw_images(real, "xgqa")
    losses, results = trained(real, "cclm", "xgqa", tmp_path / "run", epochs=8)
    assert losses[-1] < losses[0] / 2 and results["en"]["accuracy"] > 0  # it has learned the commonest answer
    assert list(results) == ["en", "de", "pt", "ru", "id", "zh", "ko", "bn"]
    labels = set(data.read_labels(real / "data"))
    for language, scores in results.items():
        records, predicted = real_test_records(real, "xgqa", language), predictions(tmp_path / "run", language)
        assert [entry["questionId"] for entry in predicted] == [record.id for record in records]
        assert {entry["prediction"] for entry in predicted} <= labels
        right = [entry["prediction"] in record.answers for entry, record in zip(predicted, records)]
        assert scores["n"] == LIMIT and scores["accuracy"] == pytest.approx(100 * sum(right) / LIMIT)
        counts = {kind: sum(record.type == kind for record in records) for kind in data.QUESTION_TYPES}
        assert {kind: part["n"] for kind, part in scores["by_type"].items()} == {k: n for k, n in counts.items() if n}

    truth = real / "data/xGQA/annotations/few_shot/de/test.json"
    output = python(ROOT / "eval.py", "--score", tmp_path / "run/predictions/de.json", "--truth", truth)
    everything = len(json.loads(truth.read_text()))
    assert f"{everything - LIMIT:,} questions have no prediction and count as wrong" in output
    right = round(results["de"]["accuracy"] * LIMIT / 100)
    assert f"all       {100 * right / everything:6.2f} %  ({right} of {everything})" in output


def test_xvnli_cclm(real, tmp_path):
    draw_images(real, "xvnli")
    _, results = trained(real, "cclm", "xvnli", tmp_path / "run")
    assert list(results) == ["en", "ar", "es", "fr", "ru"]
    for language, scores in results.items():
        records, predicted = real_test_records(real, "xvnli", language), predictions(tmp_path / "run", language)
        assert [entry["id"] for entry in predicted] == [record.id for record in records]
        assert {entry["prediction"] for entry in predicted} <= {"entailment", "neutral", "contradiction"}
        right = [entry["prediction"] == record.label for entry, record in zip(predicted, records)]
        assert scores["n"] == LIMIT and scores["accuracy"] == pytest.approx(100 * sum(right) / LIMIT)


def test_xflickrco_uc2(real, tmp_path):
    for split in ("train", "test"):
        draw_regions(real, "xflickrco", split)
    _, results = trained(real, "uc2", "xflickrco", tmp_path / "run")
    assert list(results) == ["en", "de", "es", "id", "ja", "ru", "tr", "zh"]
    for language, scores in results.items():
        records, predicted = real_test_records(real, "xflickrco", language), predictions(tmp_path / "run", language)
        texts = [entry for entry in predicted if "text" in entry]
        assert {entry["text"] for entry in texts} == {record.id for record in records}
        assert scores["n_texts"] == len(texts) == LIMIT and scores["n_images"] == len(predicted) - LIMIT
        first = [entry["rank"] == 0 for entry in texts]  # of the text's own image
        assert scores["image_recall_at_1"] == pytest.approx(100 * sum(first) / LIMIT)
