"""tools/check.py: what it tells about a data folder. tools/convert.py: that `data.Regions` reads it."""

import base64
import fcntl
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT, TOKENIZER, refused

import data
from data import InputError
from miniature import world
from tools import check, convert

GQA, XGQA, XVNLI = "gqa/annotations", "xGQA/annotations/few_shot", "XVNLI/annotations"
ALL = "cclm xgqa, uc2 xgqa, cclm xvnli, uc2 xvnli, cclm xflickrco, uc2 xflickrco"

# ---- tools/check.py


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A world of few images: its files, 48 and 100 few-shot images among them, are all there."""
    folder = tmp_path_factory.mktemp("check") / "world"
    images = dict.fromkeys(world.IMAGES, 6) | {"xvnli_shots": 48, "flickr_train": 120}
    world.write_world(str(folder), 1, images)
    return folder


@pytest.fixture
def folder(small, tmp_path):
    """A copy to spoil: hard links, so files are replaced and never written into (`write` does)."""
    return shutil.copytree(small, tmp_path / "data", copy_function=os.link)


def write(path, content):
    path.unlink()
    path.write_bytes(content)


def edit(name, change):
    """-> function of the folder that changes a JSON file, JSON lines or an array."""

    def apply(folder):
        path = folder / name
        if path.suffix == ".npy":
            array = change(np.load(path))
            path.unlink()
            np.save(path, array)
        elif path.suffix == ".jsonl":
            lines = change([json.loads(line) for line in path.read_bytes().splitlines()])
            write(path, "\n".join(map(json.dumps, lines)).encode())
        else:
            write(path, json.dumps(change(json.loads(path.read_bytes()))).encode())

    return apply


def first(change):
    """-> function that changes the first record."""

    def apply(records):
        if isinstance(records, dict):
            key = next(iter(records))
            return records | {key: records[key] | change}
        return [records[0] | change, *records[1:]]

    return apply


def repeat(task, name, field, part="image"):
    """The first record of a file has the image, or the id, of the test's first."""

    def apply(folder):
        record = data.read_records(str(folder), task, "test")[1][0]
        edit(name, first({field: getattr(record, part)}))(folder)

    return apply


CHANGES = {  # name -> (what is done to the folder, level, which runs it concerns, part of the text)
    "tuned on test": (repeat("xflickrco", "xFlickrCO/annotations/de/train_100.jsonl", "img_path"),
                      "error", "xflickrco", "few-shot and test share 1 images"),
    "trained on statement": (repeat("xvnli", f"{XVNLI}/en/train.jsonl", "pairID", part="id"),
                             "error", "xvnli", "train and test share 1 statements"),
    "other answer": (edit(f"{XGQA}/zh/dev.json", first({"answer": "nowhere"})), "error", "xgqa",
                     "dev: 1 questions are not as in en (such as"),
    "empty": (edit(f"{XVNLI}/ru/test.jsonl", lambda lines: []), "error", "xvnli", "test: no records"),
    "no label": (edit(f"{GQA}/valid.json", first({"label": {"bottle cap": 1}})), "note", "xgqa",
                 "1 of 24 questions have an answer that is no label (such as "),
    "no label in training": (edit(f"{GQA}/train.json", first({"label": {"bottle cap": 1}})), "error",
                             "xgqa", ": ['bottle cap'])"),
    "no label map": (lambda f: (f / GQA / "trainval_ans2label.json").unlink(), "missing", "xgqa",
                     "gqa/annotations/trainval_ans2label.json"),
    "caption of punctuation": (edit("xFlickrCO/annotations/id/test.jsonl", first({"sentences": ["...!"]})),
                               "note", "xflickrco", "1 of 6 captions have no text"),
    "no gold label": (edit(f"{XVNLI}/en/train.jsonl", first({"gold_label": "-"})), "note", "xvnli",
                      "1 of 24 statements have no gold label"),
    "published": (lambda folder: None, "there", "xgqa",
                  "train: 24 questions on 6 images (published: 943,000 questions)"),
    "test file lost": (lambda f: (f / XGQA / "ko/test.json").unlink(), "missing", "xgqa",
                       XGQA + "/{language}/test.json"),
    "image lost": (lambda f: next((f / "gqa/images").glob("n4*")).unlink(), "missing", "cclm xgqa",
                   "gqa/images: 5 of 6 images of test (not n4"),
    "web pages": (lambda f: [write(path, b"<html>") for path in (f / "gqa/images").iterdir()], "error",
                  "cclm xgqa", "cannot identify image"),
    "boxes are shares": (edit("gqa/features/boxes.npy", lambda boxes: boxes / 32), "error", "uc2 xgqa",
                         "its boxes are shares of width and height, not pixels"),
    "hard negatives": (lambda f: write(f / "flickr30k/hard_negative.pkl", b"PK"), "error",
                       "uc2 xflickrco", "hard_negative.pkl: "),
}


def run(capsys, *arguments):
    """-> (exit status, what is printed)."""
    with pytest.raises(SystemExit) as end:
        check.main([*map(str, arguments)])
    return end.value.code, capsys.readouterr().out


@pytest.mark.parametrize("name", CHANGES)
def test_check_finds(name, folder, capsys):
    change, level, concerned, text = CHANGES[name]
    change(folder)
    status, out = run(capsys, folder, "--json")
    report = json.loads(out)
    found = {(of_level, of_run) for of_level, of_run, of_text, _ in report["findings"]
             if text in of_text}
    assert found == {(level, concerned)}, report["findings"]
    assert status == (level == "error")
    # an error stops the runs that it concerns and no other
    stopped = {name for name, reasons in report["lacking"].items() if "errors" in reasons}
    assert stopped == {name for name in ALL.split(", ") if level == "error" and concerned in name}
    assert not stopped.intersection(report["possible"])


def test_check_passes(small, capsys):
    status, out = run(capsys, small)
    lines = out.splitlines()
    assert status == 0 and lines[-1] == f"possible: {ALL}"
    assert {line.split()[0] for line in lines[1:-2]} == {"there"}
    assert "there    xgqa            5 shots: 50 questions on 5 images: en de pt ru id zh ko bn" in lines
    assert "there    uc2 xflickrco   xFlickrCO/features: 6 of 6 regions of test" in lines


def test_check_tells_runs_apart(folder, capsys):
    shutil.rmtree(folder / "mscoco")
    shutil.rmtree(folder / "gqa/features")
    (folder / XVNLI / "en/train.jsonl").unlink()
    status, out = run(capsys, folder)
    assert status == 0 and out.splitlines()[-1] == (
        "possible: cclm xgqa, uc2 xflickrco; not uc2 xgqa (regions of train missing, regions of test "
        "missing); not cclm xvnli (train files missing); not uc2 xvnli (train files missing); not cclm "
        "xflickrco (images of test missing)")
    assert "  mscoco/val2014\n      MS COCO's site: the 2014 validation images" in out


def test_nothing_can_run(small, tmp_path, capsys):
    """No folder, an empty one, one that is a level too high or too deep: what to fetch from where."""
    (tmp_path / "empty").mkdir()
    places = tmp_path / "nothing", tmp_path / "empty", small.parent, small / "xGQA/annotations"
    for place in places:
        status, out = run(capsys, place)
        assert status == 1 and out.splitlines()[1].startswith("none of IGLUE's annotation files: name")
        for path in ("gqa/annotations/train.json", "xGQA/annotations", "flickr30k/features"):
            assert f"\n  {path}\n" in out
        assert "\n  flickr30k/flickr30k-images\n      Kaggle, linked in IGLUE's datasets/README" in out
        assert out.splitlines()[-1].startswith("possible: none; not cclm xgqa (label map missing, train ")
    status, out = run(capsys, tmp_path / "empty", "--json")
    assert status == 1 and json.loads(out)["possible"] == []


def test_check_of_a_tokenizer(folder, capsys):
    status, out = run(capsys, folder, "--tokenizer", TOKENIZER)
    assert status == 1 and "not XLM-R's sentencepiece.bpe.model (242 ids" in out
    status, out = run(capsys, folder, "--tokenizer", folder / "made_by.txt")
    assert status == 1 and "not a sentencepiece model" in out and "possible: none" in out


def test_check_of_the_real_files(iglue, capsys):
    status, out = run(capsys, iglue)
    assert status == 1  # no images and no features: nothing can run
    assert "error  " not in out and "published: 1,164" not in out and "published: 2,000" not in out
    assert "test: 744 questions on 23 images (published: 9,666 questions on 300 images): en de pt ru" in out
    labels = data.read_labels(str(iglue))
    assert (len(labels), labels.index("yes"), labels.index("no")) == (1842, 1773, 441)
    for finding in ("train: 1,970 questions on 62 images .*: en",
                    "5 shots: 155 questions on 5 images: en de pt ru id zh ko bn",
                    "48 shots: 168 statements on 48 images: en ar es fr ru",
                    "100 shots: 100 captions on 100 images: de es id ja ru tr zh",
                    "test: 14 of 1,164 statements have no gold label.*: en ar es fr ru",
                    "test: 1 of 2,000 captions have no text.*: de", "train.jsonl: en"):
        assert re.search(f"{finding}$", out, re.MULTILINE), finding


# ---- tools/convert.py


def detections(count, regions=(5, 5, 5, 5), names="n{}"):
    """[(key, features [V,8], boxes [V,4], (w, h))]"""
    rng, found = np.random.default_rng(0), []
    for i, n in enumerate(regions[:count]):
        size = rng.integers(100, 600, 2)
        boxes = (np.sort(rng.random((n, 2, 2)), 1) * size).reshape(n, 4)  # [V, corner, x and y]
        found.append((names.format(i), rng.random((n, 8)).astype(np.float32),
                      boxes.astype(np.float32), tuple(size.tolist())))
    return found


def tsv_line(key, features, boxes, size, columns):
    count = len(boxes)
    boxes, features = (base64.b64encode(array.tobytes()).decode() for array in (boxes, features))
    if columns == 6:
        fields = [key, *size, count, boxes, features]
    else:
        fields = [key, size[1], size[0], *"____", count, boxes, features, *"___"[: columns - 10]]
    return "\t".join(map(str, fields)) + "\n"


def write_tsv(path, found, columns=10):
    path.write_text("\n".join(tsv_line(*one, columns) for one in found) + "\n\n")  # empty lines
    return path


def write_npy(path, found):
    path.mkdir()
    for key, features, boxes, (width, height) in found:
        np.save(path / f"{key}.npy", features)
        np.save(path / f"{key}_info.npy", {"bbox": boxes, "num_boxes": len(boxes),
                                           "image_width": width, "image_height": np.float64(height)})
    return path


def write_h5(path, found):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for key, features, boxes, (width, height) in found:
            content = {"features": features, "boxes": boxes, "img_w": width, "img_h": height}
            file.create_group(key).update(content)
    return path


WRITERS = {"6": lambda path, found: write_tsv(path, found, 6), "10": write_tsv, "npy": write_npy,
           "h5": write_h5}


def assert_reads_back(folder, found, most):
    keys = [key.removesuffix(".jpg") for key, *_ in found]
    batch = data.Regions(str(folder), keys).batch(np.arange(len(keys)))
    for i, (_, features, boxes, size) in enumerate(found):
        n = min(len(features), most)
        assert batch["region_mask"][i].sum() == n
        assert np.array_equal(batch["features"][i, :n], features[:n].astype(np.float16))
        places = data.locations(boxes[None, :n], np.array([size], np.int32))[0]
        assert np.allclose(batch["locations"][i, :n], places, atol=1e-6)
        assert not batch["features"][i, n:].any() and not batch["locations"][i, n:].any()


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("regions, most", [((5, 5, 5, 5), 5), ((3, 1, 7, 5), 5), ((3, 1, 7, 5), 36)])
def test_convert_reads_back(writer, regions, most, tmp_path):
    found = detections(4, regions, names="{}.jpg")  # xFlickrCO's keys end in .jpg
    source = WRITERS[writer](tmp_path / f"source.{writer}", found)
    convert.main([str(source), str(tmp_path / "new/features"), "--boxes", str(most)])
    assert_reads_back(tmp_path / "new/features", found, most)
    assert os.listdir(tmp_path / "new") == ["features"]
    assert np.load(tmp_path / "new/features/features.npy").shape == (4, most, 8)


def test_convert_several_sources_into_one_folder(tmp_path):
    parts = [detections(4, names="{}"), detections(3, names="n{}"), detections(2, names="COCO_{}.jpg")]
    sources = [write_tsv(tmp_path / "a", parts[0]), write_npy(tmp_path / "b", parts[1]),
               write_tsv(tmp_path / "c", parts[2], 13)]
    convert.convert([str(source) for source in sources], str(tmp_path / "f"))
    assert_reads_back(tmp_path / "f", sum(parts, []), 36)
    with pytest.raises(InputError, match="f: already exists"):
        convert.convert([str(sources[0])], str(tmp_path / "f"))


def test_boxes_that_are_shares_are_turned_into_pixels(tmp_path, capsys):
    found = detections(3)
    shares = [(key, features, boxes / np.array([*size, *size], np.float32), size)
              for key, features, boxes, size in found]
    source = write_tsv(tmp_path / "source", shares[:2] + found[2:])
    convert.convert([str(source)], str(tmp_path / "f"))
    assert "boxes of 2 images were shares" in capsys.readouterr().out
    assert_reads_back(tmp_path / "f", found, 36)


def test_a_locked_h5_file_is_read(tmp_path):
    source = write_h5(tmp_path / "source.h5", detections(2))
    with open(source, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another program that has it open to write
        convert.convert([str(source)], str(tmp_path / "f"))
    assert_reads_back(tmp_path / "f", detections(2), 36)


def spoilt(part, change):
    """-> function that writes three images, one part of the second one changed."""
    def make(path):
        found = [list(one) for one in detections(3)]
        found[1][part] = change(found[1][part])
        write_tsv(path, found)

    return make


def npy_of(info):
    """-> function that writes two images, with other boxes and sizes to the second one."""
    return lambda path: np.save(write_npy(path, detections(2)) / "n1_info.npy", info)


LINE = tsv_line(*detections(1)[0], 10).encode()
BAD_SOURCES = {  # name -> (what writes it, part of the message)
    "missing": (lambda path: None, "source: cannot be read (No such file"),
    "empty": (lambda path: path.write_bytes(b"\n"), "source: no images"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08\x00abc"), "line 1: 1 columns, expected 6, 10"),
    "truncated": (lambda path: path.write_bytes(LINE + LINE[:-100]), "source, line 2: "),
    "folder": (lambda path: path.mkdir(), "no <image>_info.npy in it (an LMDB is not read"),
    "H5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(90)), "source.h5: cannot be read"),
    "no features": (lambda path: (write_npy(path, detections(2)) / "n1.npy").unlink(), "n1.npy: cannot"),
    "no boxes": (npy_of({"image_width": 3}), "n1_info.npy: no field 'bbox'"),
    "code": (npy_of({"bbox": ROOT}), "n1_info.npy: refers to pathlib"),  # is not executed
    "twice": (spoilt(0, lambda key: "n0"), "source, line 3: image n0 was there before"),
    "path": (spoilt(0, lambda key: "../../1"), "'../../1' is not an image id"),
    "width": (spoilt(1, lambda features: features[:, :7]), "features of width 7, those before have 8"),
    "not a number": (spoilt(1, lambda features: features * np.nan), "a feature is not finite"),
    "too large": (spoilt(1, lambda features: features * 1e6), "beyond 65,504, the largest float16"),
    "upside down": (spoilt(2, lambda boxes: boxes[:, [2, 3, 0, 1]]), "is not a box x1, y1, x2, y2 in an"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_convert_refuses(name, tmp_path):
    if name == "H5":
        pytest.importorskip("h5py")
    make, message = BAD_SOURCES[name]
    source = tmp_path / ("source.h5" if name == "H5" else "source")
    make(source)
    assert message in refused(convert.main, [str(source), str(tmp_path / "f")])
    assert not [path for path in tmp_path.iterdir() if path != source]  # nothing half-written


def test_convert_without_h5py(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)  # what Python does where the package is absent
    (tmp_path / "source.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(InputError, match="need the package h5py"):
        convert.convert([str(tmp_path / "source.h5")], str(tmp_path / "features"))
