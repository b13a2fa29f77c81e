"""tools/check.py: what it tells about a data folder. tools/convert.py: that `data.Regions` reads it."""

import base64
import fcntl
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import data
from data import InputError
from miniature import world
from tools import check, convert

TOKENIZER = ROOT / "miniature/tokenizer.model"
XGQA, XVNLI, XFLICKRCO = "xGQA/annotations/few_shot", "XVNLI/annotations", "xFlickrCO/annotations"
GQA = "gqa/annotations"
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
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def edit(name, change):
    """-> function of the folder that changes a JSON file, JSON lines, an array or bytes."""

    def apply(folder):
        path = folder / name
        content = path.read_bytes()
        if path.suffix == ".npy":
            array = change(np.load(path))
            path.unlink()
            np.save(path, array)
        elif path.suffix == ".jsonl":
            lines = change([json.loads(line) for line in content.splitlines()])
            write(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        else:
            write(path, change(json.loads(content) if path.suffix == ".json" else content))

    return apply


def first(change):
    """-> function that changes the first record."""

    def apply(records):
        if isinstance(records, dict):
            return records | {next(iter(records)): next(iter(records.values())) | change}
        return [records[0] | change, *records[1:]]

    return apply


def show_image_of(task, split, name, field, language="en", shots=None):
    """The first record of a file shows an image of another split."""

    def apply(folder):
        shown = data.read_records(str(folder), task, split, language, shots)[1][0].image
        edit(name, first({field: f"{shown}.jpg"}))(folder)

    return apply


def spoil_images(content):
    def apply(folder):
        for path in (folder / "gqa/images").iterdir():
            write(path, content(path.read_bytes()))

    return apply


def pools(folder):
    write(folder / "flickr30k/hard_negative.pkl",
          pickle.dumps({"train_image_list": [7], "train_hard_pool": [[0, 0]]}))


def everywhere(name, change):
    def apply(folder):
        for language in data.LANGUAGES["xgqa"]:
            edit(name.format(language), change)(folder)

    return apply


CHANGES = {  # name -> (what is done to the folder, level, task, part of the text)
    "few-shot image in test": (show_image_of("xflickrco", "few-shot", f"{XFLICKRCO}/ja/test.jsonl",
                                             "img_path", "ja", 100),
                               "error", "xflickrco", "few-shot and test share 1 of"),
    "trained on test": (show_image_of("xgqa", "test", f"{GQA}/train.json", "img_id"),
                        "error", "xgqa", "train and test share 1 of"),
    "valid in training": (show_image_of("xgqa", "train", f"{GQA}/valid.json", "img_id"),
                          "error", "xgqa", "train and valid share 1 of"),
    "dev in test": (show_image_of("xvnli", "test", f"{XVNLI}/en/dev.jsonl", "Flikr30kID"),
                    "error", "xvnli", "dev and test share 1 of"),
    "captions in test": (show_image_of("xflickrco", "test", "flickr30k/annotations/train_ann.jsonl",
                                       "img_path"), "error", "xflickrco", "train and test share 1 of"),
    "question lost": (edit(f"{XGQA}/de/test.json", lambda questions: dict(list(questions.items())[1:])),
                      "error", "xgqa", "nothing, but in en ["),
    "other answer": (edit(f"{XGQA}/zh/dev.json", first({"answer": "nowhere"})), "error", "xgqa",
                     "'nowhere'], but in en"),
    "caption lost": (edit(f"{XFLICKRCO}/ja/test.jsonl", lambda lines: lines[:-1]), "error",
                     "xflickrco", "nothing, but in en"),
    "malformed": (edit(f"{XVNLI}/ru/test.jsonl", lambda lines: [*lines, "x"]), "error", "xvnli",
                  "ru/test.jsonl, line 25: TypeError"),
    "empty": (edit(f"{XVNLI}/ru/test.jsonl", lambda lines: []), "error", "xvnli", "no records"),
    "no label": (everywhere(XGQA + "/{}/test.json", first({"answer": "bottle cap"})), "note", "xgqa",
                 "1 of 24 questions have an answer that is no label (such as "),
    "no label in training": (edit(f"{GQA}/train.json", first({"label": {"bottle cap": 1}})), "error",
                             "xgqa", "have an answer that is no label"),
    "label ids": (edit(f"{GQA}/trainval_ans2label.json", lambda ids: ids | {"yes": 99}), "error",
                  "xgqa", "expected label ids 0, 1, 2"),
    "caption of punctuation": (edit(f"{XFLICKRCO}/id/test.jsonl", first({"sentences": ["...!"]})),
                               "note", "xflickrco", "1 of 6 captions have no text"),
    "no gold label": (edit(f"{XVNLI}/en/train.jsonl", first({"gold_label": "-"})), "note", "xvnli",
                      "1 of 24 statements have no gold label"),
    "published": (lambda folder: None, "note", "xgqa", "24 questions on 6 images; published: 943,000"),
    "zipped": (lambda f: (f / XVNLI / "en/train.jsonl").rename(f / XVNLI / "en/train.jsonl.zip"),
               "missing", "xvnli", "en/train.jsonl; its .zip is there: unzip it"),
    "image lost": (lambda f: next((f / "gqa/images").glob("n4*")).unlink(), "missing", "xgqa",
                   "gqa/images: 1 of 6 images"),
    "web pages": (spoil_images(lambda content: b"<html>"), "error", "xgqa", "cannot identify image"),
    "images cut": (spoil_images(lambda content: content[:-200]), "note", "xgqa",
                   "lacks its last bytes; it is read all the same"),
    "no features": (lambda f: shutil.rmtree(f / "gqa/features"), "missing", "xgqa",
                    "gqa/features: 6 of 6 regions"),
    "features not finite": (edit("gqa/features/features.npy", lambda a: a * np.float16(np.nan)),
                            "error", "xgqa", "are not finite"),
    "boxes are shares": (edit("gqa/features/boxes.npy", lambda boxes: boxes / 32), "error", "xgqa",
                         "its boxes are shares of width and height, not pixels"),
    "boxes outside": (edit("xFlickrCO/features/boxes.npy", lambda boxes: boxes + 40), "error",
                      "xflickrco", "is not a box x1, y1, x2, y2"),
    "incomplete": (edit("gqa/features/meta.json", lambda meta: meta | {"complete": False}), "error",
                   "", "gqa/features: incomplete"),
    "hard negatives": (pools, "error", "xflickrco", "names none of the images"),
}


def run(capsys, *arguments):
    """-> (exit status, what is printed)."""
    with pytest.raises(SystemExit) as end:
        check.main([*map(str, arguments)])
    return end.value.code, capsys.readouterr().out


@pytest.mark.parametrize("name", CHANGES)
def test_check_finds(name, folder, capsys):
    change, level, task, text = CHANGES[name]
    change(folder)
    status, out = run(capsys, folder, "--json")
    report = json.loads(out)
    found = {(of_level, of_task) for of_level, of_task, _, of_text, _ in report["findings"]
             if text in of_text}
    assert found == {(level, task)}, report["findings"]
    assert status == (level == "error")
    for run_name, lacking in report["lacking"].items():
        if level == "error" and task and task in run_name:
            assert "errors" in lacking and run_name not in report["possible"]


def test_check_passes(small, capsys):
    status, out = run(capsys, small)
    assert status == 0 and out.splitlines()[-1] == f"possible: {ALL}" and "  error" not in out
    assert "  de               -               -            24/6            24/6 1 5 48\n" in out
    assert "  regions  xFlickrCO/features, test: 6 of 6\n" in out


def test_check_tells_runs_apart(folder, capsys):
    shutil.rmtree(folder / "mscoco")
    shutil.rmtree(folder / "gqa/features")
    (folder / XVNLI / "en/train.jsonl").unlink()
    status, out = run(capsys, folder)
    assert status == 0 and out.splitlines()[-1] == (
        "possible: cclm xgqa, uc2 xflickrco; not uc2 xgqa (12 regions missing); not cclm xvnli (no "
        "training file); not uc2 xvnli (no training file); not cclm xflickrco (3 images missing)")
    assert "  mscoco/val2014\n      MS COCO's site: the 2014 validation images" in out


def test_nothing_can_run(small, tmp_path, capsys):
    """No folder, an empty one, one that is a level too high or too deep: what to fetch from where."""
    (tmp_path / "empty").mkdir()
    for place, hint in ((tmp_path / "nothing", None), (tmp_path / "empty", None),
                        (small.parent, small), (small / "xGQA", small),
                        (small / "xGQA/annotations", small)):
        status, out = run(capsys, place)
        assert status == 1 and out.startswith(f"{place}: none of IGLUE's annotation files\n")
        assert (f"IGLUE's folders lie in {hint}: name that one" in out) == (hint is not None)
        for path in ("gqa/annotations/train.json", "xGQA/annotations", "flickr30k/features"):
            assert f"\n  {path}\n" in out
        assert "\n  flickr30k/flickr30k-images\n      Kaggle, linked in IGLUE's datasets/README" in out
        assert out.splitlines()[-1].startswith("possible: none; not cclm xgqa (no training file, ")
    status, out = run(capsys, tmp_path / "empty", "--json")
    assert status == 1 and json.loads(out)["possible"] == []


def test_check_of_a_tokenizer(folder, capsys):
    status, out = run(capsys, folder, "--tokenizer", TOKENIZER)
    assert status == 1 and "not XLM-R's sentencepiece.bpe.model" in out and "242 ids" in out
    status, out = run(capsys, folder, "--tokenizer", folder / "made_by.txt")
    assert status == 1 and "not a sentencepiece model" in out


def test_check_from_the_shell(folder):
    """On a console that knows ASCII alone."""
    edit(f"{XGQA}/de/dev.json", first({"answer": "grün"}))(folder)
    command = [sys.executable, "-m", "tools.check", folder]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ascii_only)
    assert (done.returncode, done.stderr) == (1, "") and "'gr\\xfcn'" in done.stdout


def test_check_of_the_real_files(iglue, capsys):
    status, out = run(capsys, iglue)
    assert status == 1  # no images and no features: nothing can run
    assert "  error" not in out and "published: 1,164" not in out and "published: 2,000" not in out
    assert "test en ar es fr ru: 14 of 1,164 statements have no gold label" in out
    assert "test de: 1 of 2,000 captions have no text" in out


# ---- tools/convert.py


def detections(count, regions=5, width=8, names="n{}"):
    """[(key, features [V,F], boxes [V,4], (w, h))]; regions: a number, or a list of them."""
    rng, found = np.random.default_rng(0), []
    for i in range(count):
        n = regions if isinstance(regions, int) else regions[i]
        size = rng.integers(100, 600, 2)
        boxes = (np.sort(rng.random((n, 2, 2)), 1) * size).reshape(n, 4)  # [V, corner, x and y]
        found.append((names.format(i), rng.random((n, width)).astype(np.float32),
                      boxes.astype(np.float32), tuple(size.tolist())))
    return found


def tsv_line(key, features, boxes, size, columns):
    boxes, features = (base64.b64encode(array.tobytes()).decode() for array in (boxes, features))
    count = len(base64.b64decode(boxes)) // 16
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
            group = file.create_group(key)
            group["features"], group["boxes"], group["img_w"], group["img_h"] = features, boxes, width, height
    return path


WRITERS = {"6": lambda path, found: write_tsv(path, found, 6), "10": write_tsv,
           "13": lambda path, found: write_tsv(path, found, 13), "npy": write_npy, "h5": write_h5}


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
@pytest.mark.parametrize("regions, most", [(5, 5), (5, 36), ([3, 1, 7, 5], 5)])
def test_convert_reads_back(writer, regions, most, tmp_path, capsys):
    found = detections(4, regions, names="{}.jpg")  # xFlickrCO's keys end in .jpg
    source = WRITERS[writer](tmp_path / "source", found)
    convert.main([str(source), str(tmp_path / "new/features"), "--boxes", str(most)])
    assert_reads_back(tmp_path / "new/features", found, most)
    assert os.listdir(tmp_path / "new") == ["features"]
    assert (tmp_path / "new/features/counts.npy").exists() == (regions != most)
    assert np.load(tmp_path / "new/features/features.npy").shape == (4, most, 8)
    assert ("--boxes 7 keeps all" in capsys.readouterr().out) == (regions != 5)


def test_convert_several_sources_into_one_folder(tmp_path):
    parts = [detections(4, names="{}"), detections(3, names="n{}"), detections(2, names="COCO_{}.jpg")]
    sources = [write_tsv(tmp_path / "a", parts[0]), write_npy(tmp_path / "b", parts[1]),
               write_tsv(tmp_path / "c", parts[2], 13)]
    convert.convert([str(source) for source in sources], str(tmp_path / "f"))
    assert_reads_back(tmp_path / "f", sum(parts, []), 36)
    with pytest.raises(InputError, match="f: already exists"):
        convert.convert([str(sources[0])], str(tmp_path / "f"))


def test_boxes_that_are_shares_are_turned_into_pixels(tmp_path):
    found = detections(3)
    shares = [(key, features, boxes / np.array([*size, *size], np.float32), size)
              for key, features, boxes, size in found]
    source = write_tsv(tmp_path / "source", shares[:2] + found[2:])
    lines = convert.convert([str(source)], str(tmp_path / "f"))
    assert "boxes of 2 images were shares of width and height: turned into pixels" in lines
    assert_reads_back(tmp_path / "f", found, 36)


def test_a_locked_h5_file_is_read(tmp_path):
    source = write_h5(tmp_path / "source.h5", detections(2))
    with open(source, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another program that has it open to write
        convert.convert([str(source)], str(tmp_path / "f"))
    assert_reads_back(tmp_path / "f", detections(2), 36)


def with_value(index, value):
    def change(array):
        array = array.copy()
        array[index] = value
        return array

    return change


def second(key=None, features=None, boxes=None, size=None):
    """Three images, the second with another key or size, or features or boxes that are changed."""
    found = detections(3)
    of, old_features, old_boxes, old_size = found[1]
    found[1] = (key or of, features(old_features) if features else old_features,
                boxes(old_boxes) if boxes else old_boxes, size or old_size)
    return found


BAD_IMAGES = {
    "twice": (second(key="n0"), "image n0 was there before"),
    "width": (second(features=lambda f: f[:, :7]), "features of width 7, those before have 8"),
    "not a number": (second(features=with_value((2, 3), np.nan)), "a feature is not finite"),
    "too large": (second(features=with_value((2, 3), 1e5)), "beyond 65,504, the largest float16"),
    "outside": (second(boxes=with_value((0, 2), 700.0)), "is not a box x1, y1, x2, y2 in an image of"),
    "upside down": (second(boxes=with_value(0, [50.0, 60, 40, 70])), "[50.0, 60.0, 40.0, 70.0] is not"),
    "box not finite": (second(boxes=with_value((0, 2), np.nan)), "is not a box"),
    "no regions": (second(features=lambda f: f[:0], boxes=lambda b: b[:0]), "line 3"),
    "path": (second(key="../../1"), "'../../1' is not an image id"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_convert_refuses_an_image(name, tmp_path):
    found, message = BAD_IMAGES[name]
    source = write_tsv(tmp_path / "source", found)
    with pytest.raises(InputError) as error:
        convert.convert([str(source)], str(tmp_path / "f"))
    assert message in str(error.value) and "source, line 3" in str(error.value)
    assert os.listdir(tmp_path) == ["source"]  # nothing half-written stays


LINE = tsv_line(*detections(1)[0], 10).encode()
BAD_SOURCES = {
    "missing": (lambda path: None, "source: cannot be read (No such file"),
    "empty": (lambda path: path.write_bytes(b"\n"), "source: no images"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08\x00abc"), "line 1: 1 columns, expected 6, 10"),
    "truncated": (lambda path: path.write_bytes(LINE + LINE[:-100]), "source, line 2: "),
    "count": (lambda path: path.write_bytes(LINE.replace(b"\t5\t", b"\tfive\t")), "line 1: invalid lit"),
    "folder": (lambda path: path.mkdir(), "no <image>_info.npy in it (an LMDB is not read"),
    "H5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(90)), "source: cannot be read"),
    "no features": (lambda path: (write_npy(path, detections(2)) / "n1.npy").unlink(), "n1.npy: cannot"),
    "no boxes": (lambda path: np.save(write_npy(path, detections(2)) / "n1_info.npy", {"image_width": 3}),
                 "n1_info.npy: no field 'bbox'"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_convert_refuses_a_source(name, tmp_path):
    if name == "H5":
        pytest.importorskip("h5py")
    make, message = BAD_SOURCES[name]
    make(tmp_path / "source")
    with pytest.raises(InputError) as error:
        convert.main([str(tmp_path / "source"), str(tmp_path / "f")])
    assert message in str(error.value)
    assert not [name for name in os.listdir(tmp_path) if name != "source"]


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_convert_executes_no_pickle(tmp_path):
    source = write_npy(tmp_path / "source", detections(1))
    np.save(source / "n0_info.npy", np.array({"bbox": Bomb(tmp_path / "executed")}, dtype=object))
    with pytest.raises(InputError, match="n0_info.npy: refers to"):
        convert.convert([str(source)], str(tmp_path / "features"))
    assert not (tmp_path / "executed").exists()


def test_convert_without_h5py(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)  # what Python does where the package is absent
    (tmp_path / "source.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(InputError, match="need the package h5py"):
        convert.convert([str(tmp_path / "source.h5")], str(tmp_path / "features"))
