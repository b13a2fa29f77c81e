"""train.py on IGLUE's real annotation files (IGLUE_DIR), as a user runs it.

What is not text stands in for what a user brings: images and region features drawn here (the latter
brought in by tools/convert.py), tiny random checkpoints, and the tokenizer iglue_sp8k.model beside
the annotations. The training files of XVNLI and Flickr30k are not among the real files: others of
the same format are linked in their place.
"""

import numpy as np
import pytest
from conftest import read_json, run, save_tiny_checkpoints, train_command
from PIL import Image, ImageDraw

import data
from tools import check, convert

LIMIT = 32
FEATURE_WIDTH = 12


@pytest.fixture(scope="module")
def real(iglue, tmp_path_factory):
    """Folder with data/ (the real annotations), tokenizer.model, cclm.pt and uc2.pt."""
    if not (iglue / "iglue_sp8k.model").is_file():
        pytest.skip("IGLUE_DIR has no iglue_sp8k.model, a tokenizer that stands for XLM-R's")
    folder = tmp_path_factory.mktemp("real")
    (folder / "tokenizer.model").symlink_to(iglue / "iglue_sp8k.model")
    save_tiny_checkpoints(folder, FEATURE_WIDTH, folder / "tokenizer.model")
    names = ["gqa/annotations", "xGQA/annotations", "xFlickrCO/annotations"]
    names += [f"XVNLI/annotations/{language}/test.jsonl" for language in data.LANGUAGES["xvnli"]]
    links = {name: name for name in names}
    links["XVNLI/annotations/en/train.jsonl"] = "XVNLI/annotations/en/train_48.jsonl"
    links["flickr30k/annotations/train_ann.jsonl"] = "flickr30k/annotations/valid_ann.jsonl"
    for name, original in links.items():
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(iglue / original)
    return folder


def shown_images(folder, task, split):
    """Keys of all images that the first records of a split show, in any language."""
    keys = {}
    for language in data.LANGUAGES[task] if split == "test" else ["en"]:
        for record in data.read_records(folder / "data", task, split, language)[1][:LIMIT]:
            keys[record.image] = None
    return list(keys)


def draw_images(folder, task):
    for split in ("train", "test"):
        for seed, key in enumerate(shown_images(folder, task, split)):
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
    for seed, key in enumerate(shown_images(folder, task, split)):
        rng = np.random.default_rng(seed)
        count = 3 + seed % 3
        boxes = np.sort(rng.random((count, 2, 2)), axis=1).reshape(count, 4) * [640, 480, 640, 480]
        np.save(source / f"{key}.npy", rng.random((count, FEATURE_WIDTH)).astype(np.float32))
        info = {"bbox": boxes.astype(np.float32), "image_width": 640, "image_height": 480}
        np.save(source / f"{key}_info.npy", info)
    convert.main([str(source), data.feature_folder(str(folder / "data"), task, split)])


def trained(folder, model, task, place, epochs=2):
    """Train through the command line. -> (losses of all steps, results by language)."""
    run(train_command(folder, model, task, place, "--suf", "--limit", LIMIT, "--batch-size", 8,
                      "--epochs", epochs, "--lr", 0.01, "--workers", 1))
    losses = [entry["loss"] for _, entry in data.read_jsonl(place / "log.jsonl") if "loss" in entry]
    records = data.read_records(folder / "data", task, "train")[1][:LIMIT]
    steps = sum(record.label != "-" for record in records) // 8  # CCLM leaves those without out
    assert len(losses) == epochs * steps and np.isfinite(losses).all()
    results = read_json(place / "results.json")["languages"]
    assert list(results) == list(data.LANGUAGES[task])
    return losses, results


def predictions_of(folder, task, run, language):
    """-> (the records that were tested, their predictions)."""
    records = data.read_records(folder / "data", task, "test", language)[1][:LIMIT]
    return records, read_json(run / "predictions" / f"{language}.json")


@pytest.mark.parametrize("task", ["xgqa", "xvnli"])
def test_cclm(task, real, tmp_path, capsys):
    draw_images(real, task)
    losses, results = trained(real, "cclm", task, tmp_path / "run", epochs=8 if task == "xgqa" else 2)
    assert "ids may differ" not in capsys.readouterr().out  # the checkpoint knows the tokenizer
    names, field = {"entailment", "neutral", "contradiction"}, "id"
    if task == "xgqa":
        assert losses[-1] < losses[0] / 2 and results["en"]["accuracy"] > 0  # the commonest answer
        names, field = set(data.read_labels(real / "data")), "questionId"
    for language, scores in results.items():
        records, predicted = predictions_of(real, task, tmp_path / "run", language)
        assert [entry[field] for entry in predicted] == [record.id for record in records]
        assert {entry["prediction"] for entry in predicted} <= names
        right = []
        for entry, record in zip(predicted, records):
            right.append(entry["prediction"] in (record.answers or [record.label]))
        assert scores["n"] == LIMIT and scores["accuracy"] == pytest.approx(100 * np.mean(right))
        if task == "xgqa":
            types = [record.type for record in records]
            counts = {kind: part["n"] for kind, part in scores["by_type"].items()}
            assert counts == {kind: types.count(kind) for kind in types}


def test_xflickrco_uc2(real, tmp_path):
    for split in ("train", "test"):
        draw_regions(real, "xflickrco", split)
    _, results = trained(real, "uc2", "xflickrco", tmp_path / "run")
    for language, scores in results.items():
        records, predicted = predictions_of(real, "xflickrco", tmp_path / "run", language)
        texts = [entry for entry in predicted if "text" in entry]
        assert {entry["text"] for entry in texts} == {record.id for record in records}
        assert scores["n_texts"] == len(texts) == LIMIT
        assert scores["n_images"] == len(predicted) - LIMIT
        first = [entry["rank"] == 0 for entry in texts]  # of the text's own image
        assert scores["image_recall_at_1"] == pytest.approx(100 * np.mean(first))
    report = check.check(str(real / "data"))
    found = f"xFlickrCO/features: {LIMIT} of 2,000 regions of test"
    assert any(text.startswith(found) for text in report.texts("missing"))
