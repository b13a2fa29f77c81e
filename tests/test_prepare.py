"""prepare.py: what `--check` tells about a data folder, and that `--convert` writes what `data.Regions` reads."""

import base64
import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import ROOT
from test_data import Bomb, run_script, tiny_world

import data
import prepare
from files import InputError

# ---------------------------------------------------------------------------------------------------------------------
# --check


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("check") / "world")


@pytest.fixture
def folder(world, tmp_path):
    """A copy of the world to spoil: hard links, so files are replaced, never written into (`write` does)."""
    return shutil.copytree(world, tmp_path / "data", copy_function=os.link)


def write(path, content):
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def edit_json(path, change):
    content = json.loads(path.read_bytes())
    write(path, change(content) or content)


def edit_lines(path, change):
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    lines = change(lines) or lines
    write(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def edit_array(path, change):
    array = np.load(path)
    change(array)
    path.unlink()
    np.save(path, array)


def test_check_passes_on_the_miniature(world):
    done = subprocess.run([sys.executable, ROOT / "data.py", "--check", world], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    possible = "possible: cclm xgqa, uc2 xgqa, cclm xvnli, uc2 xvnli, cclm xflickrco, uc2 xflickrco"
    assert done.stdout.splitlines()[-1] == possible
    assert "error" not in done.stdout


def test_check_as_json(world, capsys):
    assert prepare.check(str(world), as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and all(run["possible"] for run in report["runs"].values())
    for task, languages in data.LANGUAGES.items():
        for language in languages:
            count = report["counts"][task][language]["test"]
            _, records = data.read_records(str(world), task, "test", language)
            assert (count["records"], count["images"]) == (len(records), len({record.image for record in records}))
    assert report["pictures"]["xflickrco"]["images"]["mscoco/val2014"]["missing"] == 0


def test_check_of_an_empty_folder_lists_everything(tmp_path, capsys):
    assert prepare.check(str(tmp_path)) == 0
    text = capsys.readouterr().out
    for path in ("gqa/annotations/train.json", "test.json", "XVNLI/annotations/en/train.jsonl", "train_ann.jsonl",
                 "trainval_ans2label.json", "gqa/images",
                 "flickr30k/flickr30k-images", "mscoco/val2014", "gqa/features", "flickr30k/features",
                 "xFlickrCO/features", "hard_negative.pkl"):
        assert any(path in line for line in text.splitlines() if line.startswith("  missing")), path
    assert text.splitlines()[-1].startswith("possible: none.")


def test_check_of_no_folder(tmp_path):
    error = f"error: {tmp_path / 'nothing'}: no such folder\n"
    assert run_script("data.py", "--check", tmp_path / "nothing") == (2, "", error)


@pytest.mark.parametrize("arguments", [[], ["--convert", "a"], ["--check", "a", "--convert", "a", "b"],
                                       ["--convert", "a", "b", "--json"], ["--check", "a", "--boxes", "3"],
                                       ["--convert", "a", "b", "--boxes", "0"], ["--convert", "nothing", "b"],
                                       ["--check", "a", "--tokenizer"]])
def test_unusable_arguments(arguments):
    code, out, err = run_script("data.py", *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1


XGQA, XVNLI, XFLICKRCO = "xGQA/annotations/few_shot", "XVNLI/annotations", "xFlickrCO/annotations"


def first_image(folder, task, split, language="en", shots=None):
    return data.read_records(str(folder), task, split, language, shots)[1][0].image


def put_trap_file(folder):
    record = {"question": "Is it?", "imageId": "n1", "answer": "yes"}
    write(folder / "gqa/annotations/testdev_balanced_questions.json", {str(i): record for i in range(1944)})


def take_trap_for_test(folder):
    edit_json(folder / XGQA / "en/test.json",
              lambda questions: {f"20{i:07d}": dict(next(iter(questions.values()))) for i in range(1944)})


def whole_test_dev(folder):
    for language in data.LANGUAGES["xgqa"][1:]:
        (folder / XGQA / language / "test.json").unlink()
    edit_json(folder / XGQA / "en/test.json",
              lambda questions: {f"20{i:07d}": next(iter(questions.values())) for i in range(12578)})


def train_image_in_test(folder):
    image = first_image(folder, "xgqa", "train")
    edit_json(folder / XGQA / "ko/test.json", lambda questions: next(iter(questions.values())).update(imageId=image))


def put_test_image_in_train(folder):
    edit_json(folder / "gqa/annotations/train.json", lambda questions: questions[3].update(img_id="n999"))


def train_on_test(folder):
    image = first_image(folder, "xgqa", "test")
    edit_json(folder / "gqa/annotations/train.json",
              lambda questions: [question | {"img_id": image} for question in questions])


def few_shot_is_test(folder):
    for language in data.LANGUAGES["xgqa"]:
        write(folder / XGQA / language / "train_1.json", (folder / XGQA / language / "test.json").read_bytes())


def images_not_jpeg(folder):
    for path in (folder / "gqa/images").glob("n*.jpg"):
        write(path, b"<html>404 not found</html>")


def spoil_features(array):
    array[:, 0, 0] = np.nan


def incomplete_features(folder):
    edit_json(folder / "gqa/features/meta.json", lambda meta: meta.update(complete=False))


def lose_question(folder):
    edit_json(folder / XGQA / "de/test.json", lambda questions: questions.pop(next(iter(questions))) and None)


def swap_statements(folder):
    edit_lines(folder / XVNLI / "fr/test.jsonl",
               lambda lines: lines[0].update(
                   gold_label="neutral" if lines[0]["gold_label"] != "neutral" else "entailment"))


def hard_negatives(pools):
    def change(folder):
        keys = list(dict.fromkeys(record.image for record in data.read_records(str(folder), "xflickrco", "train")[1]))
        path = folder / "flickr30k/hard_negative.pkl"
        write(path, pickle.dumps({"train_image_list": [int(key) for key in keys], "train_hard_pool": pools(len(keys))}))

    return change


def label_ids(folder):
    """gqa/annotations/train.json as IGLUE's pickle."""
    path = folder / "gqa/annotations/train.json"
    ids = json.loads((folder / "gqa/annotations/trainval_ans2label.json").read_bytes())
    questions = [{"image_id": q["img_id"], "question_id": q["question_id"], "question": q["sent"],
                  "labels": [ids[a] for a in q["label"]], "scores": [1.0]}
                 for q in json.loads(path.read_bytes())]
    path.unlink()
    write(path.with_name("train_target.pkl"), pickle.dumps(questions, protocol=2))


CHANGES = {  # name -> (what is done to the folder, level, task, part of the finding's line)
    "trap file": (put_trap_file, "note", "xgqa", "1,944 questions, IGLUE's cut-down copy"),
    "trap file as test": (take_trap_for_test, "error", "xgqa", "1,944 questions, as in IGLUE's cut-down"),
    "train image in test": (train_image_in_test, "error", "xgqa", "one of GQA's training images (1 of"),
    "test-dev image in train": (put_test_image_in_train, "error", "xgqa",
                                "shows image n999, none of GQA's train images (1 of"),
    "train on test": (train_on_test, "error", "xgqa", "train and test share 1 of"),
    "few-shot is test": (few_shot_is_test, "error", "xgqa", "few-shot and test share"),
    "dev shares images with test": (lambda f: edit_lines(f / XVNLI / "en/dev.jsonl",
                                                         lambda lines: lines[0].update(
                                                             Flikr30kID=first_image(f, "xvnli", "test"))),
                                    "error", "xvnli", "dev and test share 1 of"),
    "train has test pairs": (lambda f: edit_lines(f / XVNLI / "en/train.jsonl",
                                                  lambda lines: lines + [json.loads(
                                                      (f / XVNLI / "en/test.jsonl").open().readline())]),
                             "error", "xvnli", "statements (such as"),
    "captions trained on": (lambda f: edit_lines(f / "flickr30k/annotations/train_ann.jsonl",
                                                 lambda lines: lines[0].update(img_path=first_image(f, "xflickrco",
                                                                                                    "test") + ".jpg")),
                            "error", "xflickrco", "train and test share 1 of"),
    "image missing": (lambda f: (f / f"gqa/images/{first_image(f, 'xgqa', 'test')}.jpg").unlink(), "missing", "xgqa",
                      "gqa/images: 1 of"),
    "images are text": (images_not_jpeg, "error", "xgqa", "not a readable image"),
    "no features": (lambda f: shutil.rmtree(f / "gqa/features"), "missing", "xgqa", "gqa/features: region features of"),
    "features of other images": (lambda f: write(f / "flickr30k/features/ids.txt",
                                                 (f / "flickr30k/features/ids.txt").read_bytes().replace(b"10", b"20",
                                                                                                         3)),
                                 "missing", "xvnli", "flickr30k/features: region features of"),
    "features not finite": (lambda f: edit_array(f / "gqa/features/features.npy", spoil_features), "error", "xgqa",
                            "are not finite"),
    "boxes outside": (lambda f: edit_array(f / "xFlickrCO/features/boxes.npy",
                                           lambda boxes: np.add(boxes, 40, out=boxes)), "error", "xflickrco",
                      "is not a box"),
    "features incomplete": (incomplete_features, "error", "", "incomplete"),
    "question lost": (lose_question, "error", "xgqa", "is missing, en has it (1 of"),
    "other answer": (lambda f: edit_json(f / XGQA / "zh/dev.json",
                                         lambda questions: next(iter(questions.values())).update(answer="nowhere")),
                     "error", "xgqa",
                     "has answer 'nowhere', in en"),
    "other image": (lambda f: edit_lines(f / XFLICKRCO / "ja/test.jsonl", lambda lines: lines[:-1]), "error",
                    "xflickrco", "is missing, en has it (1 of"),
    "other label": (swap_statements, "error", "xvnli", "has answer"),
    "unknown test answers": (lambda f: [edit_json(f / XGQA / language / "test.json",
                                                  lambda questions: next(
                                                      iter(questions.values())).update(answer="bottle cap"))
                                        for language in data.LANGUAGES["xgqa"]], "note", "xgqa",
                             "1 of 20 answers are not among the labels and can never be right"),
    "unknown training answer": (lambda f: edit_json(f / "gqa/annotations/train.json",
                                                    lambda questions: questions[0].update(label={"bottle cap": 1.0})),
                                "error", "xgqa",
                                "not among the labels (question"),
    "label maps disagree": (lambda f: edit_json(f / "gqa/annotations/trainval_label2ans.json",
                                                lambda answers: answers[::-1]), "error", "xgqa", "is not the inverse"),
    "training without an answer": (lambda f: edit_json(f / "gqa/annotations/train.json",
                                                       lambda questions: questions[0].update(label={})),
                                   "note", "xgqa", "questions have no answer (such as "),
    "training without answers": (lambda f: edit_json(f / "gqa/annotations/train.json",
                                                     lambda questions: [q | {"label": {}} for q in questions]),
                                 "error", "xgqa", "48 of 48 questions have no answer"),
    "label map a pipe": (lambda f: [(f / "gqa/annotations/trainval_ans2label.json").unlink(),
                                    os.mkfifo(f / "gqa/annotations/trainval_ans2label.json")],
                         "error", "xgqa", "trainval_ans2label.json: a pipe or a device"),
    "empty caption": (lambda f: edit_lines(f / XFLICKRCO / "id/test.jsonl",
                                           lambda lines: lines[0].update(sentences=[""])), "note", "xflickrco",
                      "1 without text"),
    "caption of punctuation": (lambda f: edit_lines(f / XFLICKRCO / "id/test.jsonl",
                                                    lambda lines: lines[0].update(sentences=["...!"])), "note",
                               "xflickrco", "1 without text"),
    "no gold label": (lambda f: edit_lines(f / XVNLI / "en/train.jsonl", lambda lines: lines[0].update(gold_label="-")),
                      "note", "xvnli",
                      "statements have no gold label ('-'): UC2 trains on them without a label"),
    "repeated id": (lambda f: [edit_lines(f / XVNLI / language / "test.jsonl",
                                          lambda lines: [*lines, lines[0]]) for language in data.LANGUAGES["xvnli"]],
                    "error", "xvnli", "stands more than once (1 such ids)"),
    "hard negatives of other images": (lambda f: write(f / "flickr30k/hard_negative.pkl",
                                                       pickle.dumps({"train_image_list": [7],
                                                                     "train_hard_pool": [[0, 0]]})),
                                       "error", "xflickrco", "names none of the images"),
    "hard negatives out of range": (hard_negatives(lambda n: np.full((n, 5), n)), "error", "xflickrco",
                                    "must be a list of positions"),
    "zipped": (lambda f: (f / XVNLI / "en/train.jsonl").rename(f / XVNLI / "en/train.jsonl.zip"), "missing", "xvnli",
               "its .zip is there"),
    "malformed": (lambda f: write(f / XVNLI / "ru/test.jsonl", (f / XVNLI / "ru/test.jsonl").read_bytes()[:-40]),
                  "error", "xvnli", "malformed JSON"),
    "whole test-dev": (whole_test_dev, "note", "xgqa", "are all of test-dev"),
    "shots are images": (lambda f: edit_lines(f / XFLICKRCO / "de/train_1.jsonl",
                                              lambda lines: lines * 1 + [lines[0] | {"img_path": "99.jpg"}]), "note",
                         "xflickrco",
                         "a shot is an image, but there are 2"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_check_finds(name, folder, capsys):
    change, level, task, text = CHANGES[name]
    change(folder)
    code = prepare.check(str(folder), as_json=True)
    report = json.loads(capsys.readouterr().out)
    found = [finding for finding in report["findings"] if text in finding["text"]]
    assert found, [finding["text"] for finding in report["findings"]]
    assert {finding["level"] for finding in found} == {level} and task in {finding["task"] for finding in found}
    assert code == int(level == "error"), [finding["text"] for finding in report["findings"]
                                           if finding["level"] == "error"]
    assert all(finding["text"].isprintable() for finding in report["findings"])
    for run, entry in report["runs"].items():
        if level == "error" and task and task in run:
            assert not entry["possible"]


def test_check_reads_label_ids_and_arrays(folder, capsys):
    label_ids(folder)
    hard_negatives(lambda n: np.stack([np.roll(np.arange(n),
                                               # as the reference writes it
                                               -i)[:5] for i in range(n)]).astype(np.float64))(folder)
    assert prepare.check(str(folder), as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["counts"]["xgqa"]["en"]["train"]["file"] == "gqa/annotations/train_target.pkl"
    assert all(run["possible"] for run in report["runs"].values())
    _, records = data.read_records(str(folder), "xgqa", "train")
    assert set(answer for record in records for answer in record.answers) <= set(data.read_labels(str(folder)))


def test_check_of_label_ids_without_the_label_map(folder, capsys):
    """What is missing is told; it makes no file of numbers contradict one of words."""
    label_ids(folder)
    path = folder / XGQA / "ko/dev.json"
    write(path.with_suffix(".pkl"), pickle.dumps([
        {"image_id": question["imageId"], "question_id": key, "question": question["question"], "labels": [7],
         "scores": [1.0]} for key, question in json.loads(path.read_bytes()).items()]))
    for lost in (path, *(folder / "gqa/annotations").glob("trainval_*.json")):
        lost.unlink()
    assert prepare.check(str(folder), as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["counts"]["xgqa"]["ko"]["dev"]["records"] == report["counts"]["xgqa"]["en"]["dev"]["records"]
    assert report["runs"]["uc2 xgqa"]["lacking"] == ["no label map"]


def test_check_of_hard_negatives_without_the_captions_they_are_about(folder, capsys):
    hard_negatives(lambda n: [[i, (i + 1) % n] for i in range(n)])(folder)
    assert prepare.check(str(folder)) == 0
    (folder / "flickr30k/annotations/train_ann.jsonl").unlink()
    assert prepare.check(str(folder)) == 0
    assert "hard_negative.pkl" not in capsys.readouterr().out


def test_check_of_shots_that_are_no_number(folder, capsys):
    (folder / XFLICKRCO / "de/train_1.jsonl").rename(folder / XFLICKRCO / "de/train_²5x².jsonl")
    (folder / XFLICKRCO / "tr/train_1.jsonl").rename(folder / XFLICKRCO / "tr/train_².jsonl")
    (folder / XVNLI / "fr/train_1.jsonl").rename(folder / XVNLI / "fr/train_test.jsonl")
    assert prepare.check(str(folder), as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert not [finding for finding in report["findings"] if finding["split"] == "shots test"]
    counts = report["counts"]["xflickrco"]
    assert counts["de"]["shots ²5x²"]["records"] == counts["tr"]["shots ²"]["records"] == 1


def test_check_tells_runs_apart(folder, capsys):
    shutil.rmtree(folder / "mscoco")
    shutil.rmtree(folder / "gqa/features")
    (folder / "XVNLI/annotations/en/train.jsonl").unlink()
    assert prepare.check(str(folder)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("possible: cclm xgqa, uc2 xflickrco. Not possible: uc2 xgqa (")


@pytest.mark.parametrize("content, text",
                         [(None, "not XLM-R's sentencepiece.bpe.model"), (b"nothing", "not a sentencepiece model")])
def test_check_of_a_tokenizer(content, text, world, tmp_path, capsys):
    from test_data import tiny_tokenizer

    path = tiny_tokenizer(tmp_path) if content is None else tmp_path / "file.model"
    if content:
        path.write_bytes(content)
    assert prepare.check(str(world), tokenizer=str(path)) == 1
    assert sum(text in line and line.startswith("  error") for line in capsys.readouterr().out.splitlines()) == 1


def test_check_of_the_real_files(iglue, capsys):
    assert prepare.check(str(iglue), as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["labels"] == 1842
    for language in data.LANGUAGES["xvnli"]:
        assert report["counts"]["xvnli"][language]["test"]["records"] == 1164
    for language in data.LANGUAGES["xflickrco"]:
        assert report["counts"]["xflickrco"][language]["test"]["images"] == 2000
    notes = {(finding["task"], finding["split"],
              *finding["languages"]): finding["text"] for finding in report["findings"] if finding["level"] == "note"}
    assert notes["xvnli", "test", *data.LANGUAGES["xvnli"]].startswith("14 of 1,164 statements have no gold label")
    assert "COCO_val2014_000000122239" in notes["xflickrco", "test", "de"] and "6312211170" in notes["xflickrco",
                                                                                                     "test", "id"]


# ---------------------------------------------------------------------------------------------------------------------
# --convert


def detections(count, regions=5, width=8, seed=0, names="n{}"):
    """[(key, features [V,F], boxes [V,4], (w, h))]; regions: a number, or a list of them."""
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        n = regions if isinstance(regions, int) else regions[i]
        size = rng.integers(100, 600, 2)
        corners = np.sort(rng.random((n, 2, 2)), 1) * size  # [V, corner, x and y]
        found.append((names.format(i), rng.random((n, width)).astype(np.float32),
                      corners.reshape(n, 4).astype(np.float32), tuple(size.tolist())))
    return found


def encode(array):
    return base64.b64encode(array.tobytes())


def tsv_line(key, features, boxes, size, columns=10):
    n, rest = len(features), [encode(np.zeros(3, np.float32))] * 3
    ids, scores = encode(np.zeros(n, np.int64)), encode(np.zeros(n, np.float32))
    fields = [key, size[1], size[0], ids, scores, ids, scores, n, encode(boxes), encode(features)]
    return b"\t".join(field if isinstance(field,
                                          bytes) else str(field).encode()
                      for field in (fields + rest)[:columns]) + b"\n"


def write_tsv(path, found, columns=10):
    path.write_bytes(b"".join(tsv_line(*one, columns) for one in found))
    return path


def write_npy(path, found):
    path.mkdir()
    for key, features, boxes, (width, height) in found:
        np.save(path / f"{key}.npy", features)
        np.save(path / f"{key}_info.npy",
                {"bbox": boxes, "num_boxes": len(boxes), "objects": np.arange(len(boxes)),
                 "cls_prob": np.zeros((len(boxes), 3), np.float32),
                                           "image_width": width, "image_height": np.float64(height)})
    return path


def write_h5(path, found):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for key, features, boxes, (width, height) in found:
            group = file.create_group(key)
            group["features"], group["boxes"], group["img_w"], group["img_h"] = features, boxes, width, height
            group["obj_id"] = np.arange(len(boxes))
    return path


def assert_reads_back(folder, found, keys, most=None):
    regions = data.Regions(str(folder), keys)
    batch = regions.batch(np.arange(len(keys)))
    for i, (_, features, boxes, size) in enumerate(found):
        n = min(len(features), most or len(features))
        assert batch["region_mask"][i].sum() == n
        assert np.array_equal(batch["features"][i, :n].numpy(), features[:n].astype(np.float16))
        assert np.allclose(batch["locations"][i, :n].numpy(),
                           data.locations(boxes[None, :n], np.array([size], np.int32))[0])
        assert not batch["features"][i, n:].any() and not batch["locations"][i, n:].any()


@pytest.mark.parametrize("write_source", [write_tsv, lambda path, found: write_tsv(path, found, 13), write_npy,
                                          write_h5], ids=["tsv", "tsv13", "npy", "h5"])
@pytest.mark.parametrize("regions", [5, [3, 1, 5, 5, 2]], ids=["fixed", "variable"])
def test_convert_reads_back(write_source, regions, tmp_path):
    found = detections(5, regions, names="{}.jpg")  # xFlickrCO's keys end in .jpg
    source = write_source(tmp_path / "source", found)
    prepare.convert([str(source)], str(tmp_path / "features"))
    keys = [str(i) for i in range(5)]
    assert_reads_back(tmp_path / "features", found, keys)
    assert (tmp_path / "features/offsets.npy").exists() == isinstance(regions, list)
    meta = json.loads((tmp_path / "features/meta.json").read_bytes())
    assert meta == {"format": 1, "count": 5, "boxes": 5, "dim": 8, "dtype": "float16", "source": "source",
                    "complete": True}


def test_convert_several_sources_into_one_folder(tmp_path):
    train, test = detections(4, names="{}"), detections(3, names="n{}", seed=1)
    more = detections(2, names="COCO_val2014_00{}.jpg", seed=2)
    sources = [write_tsv(tmp_path / "train.tsv", train), write_npy(tmp_path / "npy", test),
               write_tsv(tmp_path / "more.tsv", more, 13)]
    code, out, err = run_script("data.py", "--convert", *sources, tmp_path / "new/features")
    assert code == 0 and "9 images, 5 regions each" in out, err
    assert_reads_back(tmp_path / "new/features", train + test + more,
                      ["0", "1", "2", "3", "n0", "n1", "n2", "COCO_val2014_000", "COCO_val2014_001"])
    assert os.listdir(tmp_path / "new") == ["features"]


@pytest.mark.parametrize("regions, boxes, expected",
                         [([40, 50, 10], None, 36), ([4, 5, 6], None, 6), ([40, 50, 10], 45, 45), (50, None, 50),
                          (50, 7, 7)])
def test_convert_number_of_regions(regions, boxes, expected, tmp_path):
    found = detections(3, regions, names="{}")
    prepare.convert([str(write_tsv(tmp_path / "source", found))], str(tmp_path / "features"), boxes)
    assert data.Regions(str(tmp_path / "features"), []).boxes == expected
    assert_reads_back(tmp_path / "features", found, ["0", "1", "2"], expected)


def changed(**changes):
    """Three images, the second with other features, boxes or size."""
    found = detections(3, names="{}")
    key, features, boxes, size = found[1]
    parts = {"key": key, "features": features, "boxes": boxes,
             "size": size} | {name: change(dict(features=features, boxes=boxes)[name]) if callable(change) else change
                                                                                for name, change in changes.items()}
    found[1] = tuple(parts.values())
    return found


def with_value(index, value):
    def change(array):
        array = array.copy()
        array[index] = value
        return array

    return change


BAD_IMAGES = {  # name -> (found, part of the message)
    "twice": (changed(key="0.jpg"), "image 0 was already in"),
    "another width": (changed(features=lambda f: np.zeros((5, 9), np.float32)),
                      "features of width 9, but those before have 8"),
    "not a number": (changed(features=with_value((2, 3), np.nan)), "a feature is not finite"),
    "too large for float16": (changed(features=with_value((2, 3), 1e5)), "a feature is not finite, or beyond 65,504"),
    "box outside": (changed(boxes=with_value((0, 2), 700.0)), "is not a box x1, y1, x2, y2 inside the image"),
    "box left of the image": (changed(boxes=with_value((0, 0), -2.0)), "is not a box x1, y1, x2, y2 inside the image"),
    "box upside down": (changed(boxes=with_value(0, [50.0, 60.0, 40.0, 70.0])),
                        "is not a box x1, y1, x2, y2 inside the image"),
    "box not finite": (changed(boxes=with_value((0, 2), np.inf)), "a box is not finite"),
    "box beyond float32": (changed(boxes=lambda b: with_value((0, 2), 1e300)(b.astype(np.float64))),
                           "a box is not finite"),
    "no pixels": (changed(size=(0, 300)), "an image of 0 x 300"),
    "no regions": (changed(features=lambda f: f[:0], boxes=lambda b: b[:0]), ""),
    "other number of boxes": (changed(boxes=lambda b: b[:4]), ""),
    "path as key": (changed(key="../../1"), "is not an image id"),
}


@pytest.mark.parametrize("write_source", [write_tsv, write_npy, write_h5], ids=["tsv", "npy", "h5"])
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_convert_refuses(name, write_source, tmp_path, recwarn):
    found, message = BAD_IMAGES[name]
    if (name in ("path as key", "twice") and write_source is not write_tsv
            or name == "box beyond float32" and write_source is write_tsv):
        pytest.skip("such names, and such numbers, cannot be written to this kind of source")
    source = write_source(tmp_path / "source", found)
    with pytest.raises(InputError) as error:
        prepare.convert([str(source)], str(tmp_path / "features"))
    assert message in str(error.value)
    key = found[1][0]
    assert f"image '{key}'" in str(
        error.value) or f"line 2, image {key}" in str(error.value) or f"source/{key}" in str(error.value)
    assert os.listdir(tmp_path) == ["source"]  # nothing half-written stays
    assert not recwarn.list  # a warning would be printed beside the one line


LINE = tsv_line(*detections(1)[0])
BAD_SOURCES = {
    "missing": (lambda path: None, "no such file or folder"),
    "empty file": (lambda path: path.write_bytes(b""), "neither an H5 file, nor a TSV file"),
    "text": (lambda path: path.write_bytes(b"features of images\n"), "neither an H5 file"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08\x00abc"), "unpack it"),
    "truncated line": (lambda path: path.write_bytes(LINE + LINE.replace(b"n0", b"n1")[:-100]), "line 2, image 'n1'"),
    "columns": (lambda path: path.write_bytes(LINE + b"n1\t3\t3\n"), "line 2: 3 columns, expected 10 or 13"),
    "number": (lambda path: path.write_bytes(LINE.replace(b"\t5\t", b"\tfive\t", 1)), "line 1, image 'n0'"),
    "count": (lambda path: path.write_bytes(LINE.replace(b"\t5\t", b"\t-5\t", 1)), "line 1, image 'n0'"),
    "features of no width": (lambda path: path.write_bytes(tsv_line("n0", np.zeros((5, 0), np.float32),
                                                                    *detections(1)[0][2:])), "line 1, image 'n0'"),
    "base64": (lambda path: path.write_bytes(LINE[:-9] + b"!!!!" + LINE[-5:]), "line 1, image 'n0'"),
    "key not UTF-8": (lambda path: path.write_bytes(LINE.replace(b"n0", b"n\xff")), "line 1"),
    "empty folder": (lambda path: path.mkdir(), "a folder without .npy files"),
    "LMDB": (lambda path: (path.mkdir(), (path / "data.mdb").write_bytes(b"")), "an LMDB is not read"),
    "no info": (lambda path: (write_npy(path, detections(2)), (path / "n1_info.npy").unlink()),
                "n1_info.npy: no such file"),
    "info truncated": (lambda path: (write_npy(path, detections(2)),
                                     (path / "n1_info.npy").write_bytes((path / "n1_info.npy").read_bytes()[:300])),
                       "n1_info.npy: not a readable pickle"),
    "info is an array": (lambda path: (write_npy(path, detections(2)), np.save(path / "n1_info.npy", np.zeros(3))),
                         "n1_info.npy: expected one dict"),
    "info without boxes": (lambda path: (write_npy(path, detections(2)),
                                         np.save(path / "n1_info.npy", {"image_width": 3})),
                           "n1_info.npy: no field 'bbox'"),
    "info with ragged boxes": (lambda path: (write_npy(path, detections(2)),
                                             np.save(path / "n1_info.npy",
                                                     {"bbox": [[1], [2, 3]], "image_width": 3, "image_height": 3})),
                               "n1_info.npy: 'bbox' must be an array of numbers"),
    "info with boxes within boxes": (lambda path: (write_npy(path, detections(2)),
                                                   np.save(path / "n1_info.npy",
                                                           {"bbox": 2 * [4 * [[1, 2]]], "image_width": 3,
                                                            "image_height": 3})),
                                     "n1_info.npy: 'bbox' must be an array of numbers"),
    "info with endless boxes": (lambda path: (write_npy(path, detections(2)),
                                              np.save(path / "n1_info.npy",
                                                      {"bbox": [[0, 0, 1, 10**400]], "image_width": 3,
                                                       "image_height": 3})),
                                "n1_info.npy: 'bbox' must be an array of numbers"),
    "features are objects": (lambda path: (write_npy(path, detections(2)), np.save(path / "n1.npy", {"a": 1})),
                             "n1.npy: not a readable array"),
    "features truncated": (lambda path: (write_npy(path, detections(2)),
                                         (path / "n1.npy").write_bytes((path / "n1.npy").read_bytes()[:-7])),
                           "n1.npy: not a readable array"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_convert_refuses_source(name, tmp_path):
    make, message = BAD_SOURCES[name]
    make(tmp_path / "source")
    with pytest.raises(InputError) as error:
        prepare.convert([str(tmp_path / "source")], str(tmp_path / "features"))
    assert message in str(error.value) and str(error.value).isprintable()
    assert str(tmp_path / "source") in str(error.value)
    assert not (tmp_path / "features").exists() and not list(tmp_path.glob("*partial*"))


def test_convert_executes_no_pickle(tmp_path):
    source = write_npy(tmp_path / "source", detections(1))
    np.save(source / "n0_info.npy", np.array({"bbox": Bomb(tmp_path / "executed")}, dtype=object))
    with pytest.raises(InputError, match="n0_info.npy: refers to"):
        prepare.convert([str(source)], str(tmp_path / "features"))
    assert not (tmp_path / "executed").exists()


def test_convert_keeps_what_is_there(tmp_path):
    source = write_tsv(tmp_path / "source", detections(2))
    (tmp_path / "features").mkdir()
    with pytest.raises(InputError, match="features: already exists"):
        prepare.convert([str(source)], str(tmp_path / "features"))


def test_convert_without_h5py(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)  # what Python does where the package is absent
    (tmp_path / "source.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(InputError, match="needs the package h5py"):
        prepare.convert([str(tmp_path / "source.h5")], str(tmp_path / "features"))


def test_convert_of_a_damaged_h5_file(tmp_path):
    source = write_h5(tmp_path / "source.h5", detections(3))
    for size in (9, 100, os.path.getsize(source) // 2):
        (tmp_path / "cut.h5").write_bytes(source.read_bytes()[:size])
        with pytest.raises(InputError, match="cut.h5"):
            prepare.convert([str(tmp_path / "cut.h5")], str(tmp_path / "features"))


@pytest.mark.parametrize("change", ["link", "linked group", "soft link", "raw data", "virtual"])
def test_convert_reads_no_other_h5_file(change, tmp_path):
    h5py = pytest.importorskip("h5py")
    source, other = (write_h5(tmp_path / name, detections(3)) for name in ("source.h5", "other.h5"))
    with h5py.File(source, "r+") as file:
        group, (shape, kind) = file["n1"], (file["n1/features"].shape, file["n1/features"].dtype)
        if change == "linked group":
            del file["n1"]
            file["n1"] = h5py.ExternalLink(str(other), "/n1")
        else:
            del group["features"]
        if change == "link":
            group["features"] = h5py.ExternalLink(str(other), "/n1/features")
        if change == "soft link":
            file["other"] = h5py.ExternalLink(str(other), "/")
            group["features"] = h5py.SoftLink("/other/n1/features")
        if change == "raw data":
            group.create_dataset("features", shape, kind, external=[(str(other), 0, h5py.h5f.UNLIMITED)])
        if change == "virtual":
            layout = h5py.VirtualLayout(shape, kind)
            layout[:] = h5py.VirtualSource(str(other), "n1/features", shape)
            group.create_virtual_dataset("features", layout)
    with pytest.raises(InputError, match="source.h5, image 'n1': .* only data that the file itself holds are read"):
        prepare.convert([str(source)], str(tmp_path / "features"))


def test_convert_asks_for_space_before_it_writes(tmp_path):
    write_tsv(tmp_path / "source", detections(1, 100, 8))
    # 8 TB of nothing, which take no space: the estimate goes by the size of the file
    os.truncate(tmp_path / "source", 1 << 43)
    with pytest.raises(InputError, match=r"GB free, but [\d.]+ GB are needed"):
        prepare.convert([str(tmp_path / "source")], str(tmp_path / "features"))


def test_convert_holds_one_image_at_a_time(tmp_path):
    source = write_tsv(tmp_path / "source", detections(200, 36, 128))
    tracemalloc.start()
    prepare.convert([str(source)], str(tmp_path / "features"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    written = os.path.getsize(tmp_path / "features/features.npy")
    assert peak < written / 2, (peak, written)
