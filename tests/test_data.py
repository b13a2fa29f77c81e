"""data.py: files sound and broken, text, images, region features, sampling, batches, workers."""

import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from conftest import TOKENIZER, Bomb
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode

import data
from data import InputError

CPU = torch.device("cpu")


def save(path, content):
    """Bytes as they are, arrays as .npy, lists as JSON lines where the name says so, else JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in content))
    else:
        path.write_text(json.dumps(content))
    return path


# ---- Sound annotation files

QUESTION = {"question": "Is it red?", "imageId": "n12", "answer": "yes",
            "types": {"structural": "verify", "semantic": "attr"}}
LXMERT = {"img_id": "2354786", "label": {"yes": 1.0, "yeah": 0.3}, "question_id": "02930152",
          "sent": "Is the sky dark?"}
STATEMENT = {"gold_label": "neutral", "sentence1": "A man.", "sentence2": "He sleeps.",
             "pairID": "75.jpg#2r1c", "Flikr30kID": "75"}
CAPTIONS = {"sentences": ["A man.", ""], "id": 75, "img_path": "COCO_val2014_000000000075.jpg"}


def test_sound_files(tmp_path):
    def read(reader, name, content):
        return reader(save(tmp_path / name, content))

    del (untyped := dict(QUESTION))["types"]
    assert read(data.read_gqa, "test.json", {"07": QUESTION, "8": untyped}) == [
        data.Record("07", "n12", "Is it red?", {"yes": 1.0}, type="verify"),
        data.Record("8", "n12", "Is it red?", {"yes": 1.0}, type="")]
    lxmert = [LXMERT, LXMERT | {"question_id": 3, "label": {}}]
    assert read(data.read_gqa, "train.json", lxmert) == [
        data.Record("02930152", "2354786", "Is the sky dark?", {"yes": 0.5, "yeah": 0.5}),
        data.Record("3", "2354786", "Is the sky dark?", {})]
    line = {name: value for name, value in STATEMENT.items() if name != "Flikr30kID"}
    spellings = [line | {"Flikr30kID": "75"}, line | {"Flickr30kID": "75.jpg"},
                 line | {"Flickr30K_ID": "75"}]
    expected = data.Record("75.jpg#2r1c", "75", "He sleeps.", label="neutral")
    assert read(data.read_xvnli, "a.jsonl", spellings) == [expected] * 3
    image = "COCO_val2014_000000000075"
    content = b"\r\n" + json.dumps(CAPTIONS).encode() + b"\r\n\n"  # empty lines are no records
    assert read(data.read_captions, "a.jsonl", content) == [
        data.Record(f"{image}#0", image, "A man."), data.Record(f"{image}#1", image, "")]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert read(data.read_json, "a.json", '["é"]'.encode(encoding)) == ["é"]
    save(tmp_path / LABELS, {"yes": 1, "no": 0, "blue": 2})
    assert data.read_labels(tmp_path) == ["no", "yes", "blue"]


def test_either_of_two_training_files(tmp_path):
    for name in ("train_balanced_questions.json", "train.json"):  # the latter is preferred
        path = save(tmp_path / "gqa/annotations" / name, {})
        assert data.annotation_file(str(tmp_path), "xgqa", "train") == str(path)


# ---- What a user can have wrong: one line that names file and record

READ = {  # file -> what reads it
    "a.json": lambda f: data.read_gqa(f / "a.json"),
    "a.jsonl": lambda f: data.read_xvnli(f / "a.jsonl"),
    "b.jsonl": lambda f: data.read_captions(f / "b.jsonl"),
    "gqa/annotations/train.json": lambda f: data.read_records(str(f), "xgqa", "train"),
    "gqa/annotations/trainval_ans2label.json": data.read_labels,
    "flickr30k/hard_negative.pkl": lambda f: data.read_hard_negatives(f, ["1"]),
    "t.model": lambda f: data.Tokenizer(f / "t.model"),
    "1.jpg": lambda f: data.read_image(f / "1.jpg"),
    "gqa/images/1.jpg": lambda f: data.Images(f, "xgqa", ["1", "2", "3"], 8),
    "a.npy": lambda f: data.map_array(f / "a.npy"),
    "f": lambda f: data.Regions(str(f / "f"), ["n0", "n1"]).batch(range(2)),
}
JSON, JSONL, LINES, TRAIN, LABELS, HARD, MODEL, IMAGE, FOLDER, ARRAY, REGIONS = READ
BAD = {  # name -> (file, its content or None, part of the message)
    "no file": (JSON, None, "a.json: cannot be read (No such file or directory)"),
    "empty": (JSON, b"", "a.json: JSONDecodeError"),
    "truncated": (JSON, b'{"1": {', "a.json: JSONDecodeError: Expecting property name"),
    "web page": (JSON, b"<html>", "a.json: JSONDecodeError"),
    "Latin-1": (JSON, b'["\xe9"]', "a.json: UnicodeDecodeError"),
    "nested": (JSON, b"[" * 99_999, "a.json: RecursionError"),
    "no question": (JSON, {"1": {"imageId": "n1", "answer": "no"}}, "1: no field 'question'"),
    "no dict": (JSON, ["x"], "a.json, question 0: TypeError"),
    "null text": (JSON, [LXMERT | {"sent": None}], "question 0: None stands where a text should"),
    "path": (JSON, {"1": QUESTION | {"imageId": "../../x"}}, "1: '../../x' is not an image id"),
    "line": (JSONL, b'{"gold_label": "neutral"\n', "a.jsonl, line 1: JSONDecodeError"),
    "label": (JSONL, [STATEMENT, STATEMENT | {"gold_label": "x"}], "line 2: unknown gold_label 'x'"),
    "no image": (JSONL, [{"gold_label": "-", "sentence2": ""}], "line 1: no field 'Flikr30kID'"),
    "no sentences": (LINES, [{"img_path": "1.jpg"}], "b.jsonl, line 1: no field 'sentences'"),
    "number": (TRAIN, 7, "train.json: TypeError"),
    "no data": (TRAIN, None, "train_balanced_questions.json; `python -m tools.check "),
    "no labels": (LABELS, None, "2label.json; `python -m tools.check "),
    "labels": (LABELS, {"yes": 0, "no": 2}, "ans2label.json: expected label ids 0, 1, 2"),
    "no pickle": (HARD, b"404", "negative.pkl: "),
    "no pools": (HARD, pickle.dumps({"train_image_list": []}), "no field 'train_hard_pool'"),
    "positions": (HARD, pickle.dumps({"train_image_list": [1], "train_hard_pool": [[0, 5]]}),
                  "negative.pkl: IndexError"),
    "no tokenizer": (MODEL, None, "t.model: cannot be read"),
    "tokenizer": (MODEL, b"404: Not Found", "t.model: not a sentencepiece model"),
    "image": (IMAGE, b"<html>404</html>", "1.jpg: cannot be read (cannot identify image file"),
    "images": (FOLDER, b"", "gqa/images/2.jpg: no such image (2 of 3 are missing)"),
    "array": (ARRAY, b"\x93NUMPY", "a.npy: "),
    "pickled array": (ARRAY, np.array({"a": 1}, dtype=object), "a.npy: "),
    "no folder": (REGIONS, None, "no such folder of region features; `python -m tools.convert SOURCE "),
    "features truncated": ("f/features.npy", b"\x93NUMPY", "features.npy: "),
    "no boxes": ("f/boxes.npy", None, "boxes.npy: cannot be read (No such file"),
    "no batch": ("f/features.npy", np.zeros((3, 6)), "not enough values"),
    "other images": ("f/ids.txt", b"m0\nm1\n", "no features of image n0 (2 of 2 images are missing)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, tmp_path):
    file, content, part = BAD[name]
    if file.startswith("f/"):  # of a folder that is sound but for this file
        (write_features(tmp_path / "f", [3, 3]) / file[2:]).unlink()
    if content is not None:
        save(tmp_path / file, content)
    with pytest.raises(InputError) as caught:
        READ[REGIONS if file.startswith("f/") else file](tmp_path)
    message = str(caught.value)
    assert part in message and str(tmp_path) in message and "\n" not in message, message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message  # workers send theirs


# ---- Pickles and arrays

def unpickle(content):
    with data.reading("here"):
        return data.ArrayUnpickler(io.BytesIO(content), encoding="latin-1").load()


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_in_pickles(protocol):
    for array in (np.arange(6, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.ones((2, 3))),
                  np.array([1, -2], ">i4"), np.array([["a"], 1], dtype=object), np.float64(2.5)):
        content = pickle.dumps({"a": [array, "text", None]}, protocol)
        for name in (content, content.replace(b"numpy._core", b"numpy.core")):  # of numpy 2 and 1
            if protocol < 4 or name == content:  # from protocol 4 on, lengths stand before names
                assert np.array_equal(unpickle(name)["a"][0], array)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_run_no_code(protocol, tmp_path):
    bomb = pickle.dumps([Bomb(tmp_path / "executed")], protocol)
    for content in (bomb, b"cos\nsystem\n(S'true'\ntR.", b"cnumpy\nload\n(S'a'\ntR."):
        with pytest.raises(InputError, match="here: refers to .*(open|system|load); only plain data"):
            unpickle(content)
    assert not (tmp_path / "executed").exists()


# ---- Writing

def test_write_json_reads_back(tmp_path):
    content = {"ö": [1, None], "path": "\udcff"}  # a file name need not be UTF-8
    data.write_json(tmp_path / "a.json", content)
    assert data.read_json(tmp_path / "a.json") == content and os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_destroys_nothing(tmp_path):
    """A limit on the size of files stands for the disk."""
    data.write(tmp_path / "last.pt", lambda file: file.write(b"complete"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"last.pt: cannot be written \(File too large\)"):
            data.write(tmp_path / "last.pt", lambda file: torch.save(torch.zeros(100_000), file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "last.pt").read_bytes() == b"complete"
    assert os.listdir(tmp_path) == ["last.pt"]


# ---- Text

def test_tokenizer():
    tokenizer = data.Tokenizer(TOKENIZER)
    assert (tokenizer.vocabulary, tokenizer.mask, tokenizer.longest) == (242, 241, 512)
    with pytest.raises(InputError, match="242 ids, but the checkpoint embeds 250,002: it belongs"):
        tokenizer.check(data.XLMR_SHA256, 250_002)
    assert tokenizer.check(tokenizer.sha256, 242) is None
    assert "is not the known cfc8146abe2a" in tokenizer.check(data.XLMR_SHA256, 242)


# ---- Images

def picture(seed=0, size=(50, 40)):
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8))


def encoded(mode="RGB", kind="JPEG", **options):
    file = io.BytesIO()
    picture().convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode, kind", [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"),
                                        ("P", "PNG"), ("RGBA", "PNG"), ("1", "PNG"), ("P", "GIF")])
def test_images_of_all_kinds(mode, kind, tmp_path, recwarn):
    image = data.read_image(save(tmp_path / "1.jpg", encoded(mode, kind)))
    assert (image.mode, image.size) == ("RGB", (50, 40)) and not recwarn.list
    assert data.to_tensor(data.resize(image, 8)).shape == (3, 8, 8)


def test_images_without_their_last_bytes(tmp_path):
    """Read, as X2-VLM's code does; one that is not there at all is an error."""
    whole = np.asarray(data.read_image(save(tmp_path / "1.jpg", encoded(quality=95))))
    cut = np.asarray(data.read_image(save(tmp_path / "1.jpg", encoded(quality=95)[:-700])))
    assert np.array_equal(cut[:8], whole[:8]) and (cut[-4:] == cut[-4, 0]).all()
    with pytest.raises(InputError, match="1.jpg: cannot be read"):
        data.read_image(save(tmp_path / "1.jpg", encoded()[:100]))


def test_the_ten_operations():
    """The reference's RandomAugment(2, 7): strength 7 of 10, what moves out of sight is grey."""
    image = picture()

    def moved(angle=0.0, translate=(0, 0), shear=(0.0, 0.0), center=None):
        return TF.affine(image, angle, list(translate), 1.0, list(shear),
                         InterpolationMode.BILINEAR, [128, 128, 128], center)

    shear = float(np.degrees(np.arctan(0.21)))
    for sign in (1, -1):
        expected = [image, TF.autocontrast(image), TF.equalize(image),
                    TF.adjust_brightness(image, 1.36), TF.adjust_sharpness(image, 1.36),
                    moved(shear=(sign * shear, 0.0), center=[0, 0]),
                    moved(shear=(0.0, sign * shear), center=[0, 0]),
                    moved(translate=(sign * 7, 0)), moved(translate=(0, sign * 7)),
                    moved(angle=sign * 21.0)]
        for choice, result in enumerate(expected):
            assert np.array_equal(data.distort(image, choice, sign), result), choice


def test_augmentation(monkeypatch):
    """A picture whose red is the column and whose green is the row tells where a crop is from."""
    columns, rows = np.meshgrid(np.arange(0, 250), np.arange(0, 250))
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], 2).astype(np.uint8))
    drawn, mirrored, areas = [], 0, []
    monkeypatch.setattr(data, "distort",
                        lambda image, choice, sign: drawn.append((choice, sign)) or image)
    for seed in range(600):
        torch.manual_seed(seed)
        crop = np.asarray(data.augment(image, 10, seed < 500)).astype(int)
        left, right = crop[5, 0, 0], crop[5, 9, 0]
        assert seed < 500 or left < right  # not mirrored where it is not allowed
        mirrored += left > right
        width = abs(right - left) / 9 * 10  # from the centres of the outer pixels to their edges
        height = (crop[9, 5, 1] - crop[0, 5, 1]) / 9 * 10
        areas.append(width * height / 250**2)
    assert 220 <= mirrored <= 280  # half of 500
    assert 0.45 < min(areas) < 0.56 and 0.9 < max(areas) < 1.05 and 0.68 < np.mean(areas) < 0.78
    # two operations of ten, each applied half of the time, to the one side as often as to the other
    assert 540 <= len(drawn) <= 660 and {choice for choice, _ in drawn} == set(range(10))
    assert 0.45 < np.mean([sign == 1 for _, sign in drawn]) < 0.55


# ---- Region features

def write_features(folder, counts=(3, 3, 3, 3), width=6):
    """A sound folder of regions; counts.npy only where numbers differ, as tools/convert.py does."""
    rng, n, most = np.random.default_rng(0), len(counts), max(counts)
    real = np.arange(most) < np.array(counts)[:, None]
    boxes = np.sort(rng.random((n, most, 2, 2)), 2).reshape(n, most, 4) * 90
    arrays = {"features": (rng.random((n, most, width)) * real[..., None]).astype(np.float16),
              "boxes": (boxes * real[..., None]).astype(np.float32),
              "sizes": rng.integers(90, 200, (n, 2)).astype(np.int32)}
    if min(counts) < most:
        arrays["counts"] = np.array(counts)
    for name, array in arrays.items():
        save(folder / f"{name}.npy", array)
    save(folder / "ids.txt", "".join(f"n{i}\n" for i in range(n)).encode())
    return folder


def test_regions(tmp_path):
    """Images in any order, padded to the batch's most regions."""
    folder = write_features(tmp_path / "different", [2, 5, 1, 4])
    regions = data.Regions(str(folder), ["n3", "n0", "n2"])
    assert regions.dim == 6
    batch = regions.batch([0, 1, 2])
    assert batch["region_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert np.array_equal(batch["features"], np.load(folder / "features.npy")[[3, 0, 2], :4])
    assert not batch["locations"][2, 1:].any() and batch["locations"][2, 0].all()
    assert regions.batch([2])["features"].shape == (1, 1, 6)


# ---- Examples

class Words:
    """Stands for a tokenizer: a text of n words has n + 2 tokens."""

    longest = 512

    def __call__(self, texts, max_tokens=None):
        rows = [[0, *(3 + len(word) for word in text.split())] for text in texts]
        return [row[: (max_tokens or 10**6) - 1] + [2] for row in rows]


def recipe(clean="", **limits):
    names = ("train_words", "test_words", "train_tokens", "test_tokens")
    return SimpleNamespace(clean=clean, **dict.fromkeys(names) | limits)


def make_examples(count, texts=None, images=5):
    texts = texts or ["is it big"] * count
    records = [data.Record(str(i), f"n{i % images}", texts[i], {"yes": 1.0}) for i in range(count)]
    return data.Examples("here", records, recipe(), Words(), True)


def test_limits_of_texts():
    records = [data.Record("1", "n1", "One, two three four five")]
    lengths = []
    for training in (True, False):
        for clean, limits in (("", {}), ("question", {"train_words": 3, "test_words": 4}),
                              ("caption", {"train_words": 2, "test_words": 3}),
                              ("", {"train_tokens": 4, "test_tokens": 5})):
            examples = data.Examples("here", records, recipe(clean, **limits), Words(), training)
            lengths.append(int(examples.lengths[0]))
    assert lengths == [7, 4, 4, 4, 7, 5, 5, 5]  # a question's "," leaves an empty word


def test_examples(tmp_path):
    lines = [STATEMENT | {"pairID": str(i), "gold_label": label, "Flikr30kID": str(7 - i % 3)}
             for i, label in enumerate(["neutral", "-", "neutral", "entailment", "neutral"])]
    save(tmp_path / "XVNLI/annotations/en/train.jsonl", lines)

    def load(**options):
        return data.load_examples(tmp_path, "xvnli", "train", recipe(), Words(), **options)

    everything = load()
    assert everything.image_keys == ["7", "6", "5"]
    assert everything.image_rows.tolist() == [0, 1, 2, 0, 1]
    some = load(keep=lambda text, record: record.label == "neutral", limit=4)
    assert [record.id for record in some.records] == ["0", "2"]  # of the first four
    with pytest.raises(InputError, match="train.jsonl: no records with text"):
        load(keep=lambda text, record: False)
    # texts that fill the model's positions, and one that is too long
    assert make_examples(2, ["a", "big " * 510]).lengths.tolist() == [3, 512]
    with pytest.raises(InputError, match="here, 2: 513 tokens, the model has positions for 512"):
        make_examples(3, ["a", "b", "it " * 511])


def test_training_answers():
    examples = make_examples(6)
    examples.records[1].answers = {}  # some may have none
    data.check_answers(examples, ["yes", "no"])
    with pytest.raises(InputError, match="here, question 0: the answer 'yes' is not among the 1 l"):
        data.check_answers(examples, ["no"])


# ---- Order

LENGTHS = np.random.default_rng(0).integers(3, 40, 1000)
IMAGES = np.random.default_rng(1).integers(0, 90, 1000)


@pytest.mark.parametrize("options", [{}, {"pool": 1}, {"groups": IMAGES, "group_size": 4}])
def test_epoch_batches(options):
    batches = data.epoch_batches(LENGTHS, 32, 5, 2, **options)
    assert batches.shape == (31, 32) and len(np.unique(batches)) == 31 * 32


def test_batches_that_a_published_run_had():
    """Literal numbers: another order of draws would make other runs."""
    lengths = np.array([5, 3, 8, 1, 9, 2, 7, 4, 6])
    assert data.epoch_batches(lengths, 2, 0, 0, 2).tolist() == [[5, 6], [3, 7], [0, 8], [2, 4]]
    groups = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    grouped = data.epoch_batches(lengths, 3, 0, 1, groups=groups, group_size=2)
    assert grouped.tolist() == [[1, 0, 8], [5, 2, 3], [4, 6, 7]]
    assert data.item_generator(1, 2, 3).integers(1000, size=3).tolist() == [964, 670, 872]


def test_similar_lengths_and_groups_share_a_batch():
    def spread(**options):
        return np.ptp(LENGTHS[data.epoch_batches(LENGTHS, 32, 0, 0, **options)], 1).mean()

    assert spread(pool=1) > 30 and spread(pool=16) < 4  # of 37; retrieval takes pools of 1
    order = data.epoch_batches(LENGTHS, 40, 0, 0, groups=IMAGES, group_size=4).flatten()
    parts = np.split(IMAGES[order], np.flatnonzero(np.diff(IMAGES[order])) + 1)
    most = sum(-(-count // 4) for count in np.bincount(IMAGES))  # so many groups of up to 4
    assert len(parts) <= most and len(order) / len(parts) > 3


# ---- Batches

@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "gqa/images").mkdir(parents=True)
    for i in range(5):
        picture(i).save(folder / f"gqa/images/n{i}.jpg")
    return str(folder)


def make_batches(folder, share_images=False, augment=True, texts=None, seed=3):
    examples = make_examples(12, texts)
    pictures = data.Images(folder, "xgqa", examples.image_keys, 16)
    targets = data.class_targets(examples, {"no": 0, "yes": 1})
    return data.TrainingBatches(examples, pictures, targets, seed, augment, share_images)


def equal(a, b):
    same = [torch.equal(a[name], b[name]) for name in a if name != "ids"]
    return a.keys() == b.keys() and a["ids"] == b["ids"] and all(same)


def test_every_item_is_augmented_by_itself(picture_folder):
    def images(seed):  # the same image, two items
        return make_batches(picture_folder, seed=seed).batch((0, np.array([1, 6])))["images"]

    before, (first, second) = torch.get_rng_state(), images(3)
    assert torch.equal(before, torch.get_rng_state())  # the model's own draws are left alone
    assert not torch.equal(first, second) and not torch.equal(first, images(4)[0])


def test_shared_images(picture_folder):
    item = 0, np.array([7, 1, 2, 6])
    shared = make_batches(picture_folder, share_images=True, augment=False).batch(item)
    single = make_batches(picture_folder, augment=False).batch(item)
    assert len(shared["images"]) == 2 and len(single["images"]) == 4
    assert torch.equal(shared["images"][shared["image_index"]], single["images"])
    assert shared["ids"] == ["7", "1", "2", "6"] and shared["targets"].tolist() == [[0, 1]] * 4
    # not mirrored where one of its questions is about sides: that of item 1, of the first image
    texts = ["is it big", "is it left"] + ["is it big"] * 10
    dataset = make_batches(picture_folder, share_images=True, texts=texts)
    dataset.pictures.batch = lambda rows, may_flip, seeds: {"may_flip": may_flip}
    assert dataset.batch(item)["may_flip"] == [False, True]


def ranking(folder, pools=None, first_image_bug=False, counts=(3, 1, 2, 2, 4)):
    """RankingBatches over images with so many captions each; caption i has i + 1 words."""
    rows = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    records = [data.Record(str(i), f"n{row}", "word " * (i + 1)) for i, row in enumerate(rows)]
    examples = data.Examples("here", records, recipe(), Words(), True)
    regions = data.Regions(str(folder), examples.image_keys)
    return data.RankingBatches(examples, regions, 0, pools or {}, first_image_bug)


def pairs_of(dataset, epoch, indices):
    """The four (image row, caption) of each item, found again from what the model sees."""
    batch = dataset.batch((epoch, indices))
    captions = (batch["attention_mask"].sum(1) - 3)[batch["text_index"]].tolist()
    shown = [dataset.pictures.batch([row])["features"][0] for row in range(len(dataset.pictures.keys))]
    rows = []
    for features in batch["features"][batch["image_index"]]:
        rows.append(next(row for row, of in enumerate(shown) if torch.equal(of, features)))
    pairs = list(zip(rows, captions))
    return [pairs[i : i + 4] for i in range(0, len(pairs), 4)]


def test_ranking_pairs(tmp_path):
    pools = {0: np.array([1, 3]), 2: np.array([4])}
    dataset = ranking(write_features(tmp_path / "f", [3] * 5), pools)
    rows, hard, others = dataset.examples.image_rows, {}, set()
    for epoch in range(30):
        indices = np.random.default_rng(epoch).permutation(12)[:4]
        for index, item in zip(indices, pairs_of(dataset, epoch, indices)):
            match, other_caption, other_image, similar = item
            others.add(other_caption[1])
            assert match == (rows[index], index)
            assert other_caption[0] == rows[index] and rows[other_caption[1]] != rows[index]
            assert other_image[0] != rows[index] and other_image[1] == index
            assert similar[0] == rows[index] and rows[similar[1]] != rows[index]
            hard.setdefault(rows[index], set()).add(int(rows[similar[1]]))
    assert others == set(range(12))  # any caption of an image, not its first alone
    assert hard[0] == {1, 3} and hard[2] == {4}  # of the pools
    assert all(len(hard[image]) > 2 for image in (1, 3, 4))  # without a pool: any other image


def test_ranking_with_the_first_image_bug(tmp_path):
    dataset = ranking(write_features(tmp_path / "f", [3] * 5), {1: np.array([2])}, True)
    rows, captions = dataset.examples.image_rows, set()
    for epoch in range(20):
        for item in pairs_of(dataset, epoch, np.arange(12)):
            captions |= {item[1][1], item[3][1]}
    assert captions == set(np.flatnonzero(rows == rows[0]).tolist())
    with pytest.raises(InputError, match="here: captions of one image only"):
        ranking(tmp_path / "f", counts=(3,))


def test_hard_negatives(tmp_path):
    content = {"train_image_list": ["7.jpg", 8, "9"], "train_hard_pool": [[0, 2, 1], [1, 0], [2]]}
    arrays = {"train_image_list": np.array([7, 8, 9]),  # as in the reference: positions are floats
              "train_hard_pool": np.array([[0.0, 2.0, 1.0], [1.0, 0.0, 2.0], [2.0, 0.0, 1.0]])}
    for loaded, expected in ((content, {2: [0, 3], 3: [2]}),
                             (arrays, {2: [0, 3], 3: [2, 0], 0: [2, 3]})):
        save(tmp_path / "flickr30k/hard_negative.pkl", pickle.dumps(loaded))
        pools = data.read_hard_negatives(tmp_path, ["9", "x", "7", "8"])
        assert {row: pool.tolist() for row, pool in pools.items()} == expected
    assert data.read_hard_negatives(tmp_path, ["7"]) == {}  # similar images, but none is known
    assert data.read_hard_negatives(tmp_path / "elsewhere", ["7"]) == {}


# ---- Targets

def test_targets():
    examples = make_examples(4)
    examples.records[1].answers = {"a": 0.5, "b": 0.5}
    examples.records[2].answers = {}
    tokens = {"a": [0, 7, 2], "b": [0, 8, 9, 2], "yes": [0, 5, 2]}

    def lists(function, rows, generators=None):
        return {name: tensor.tolist() for name, tensor in function(rows, generators).items()}

    assert lists(data.answer_targets(examples, tokens), [2, 1, 0]) == {
        "answer_ids": [[0, 7, 2, 1], [0, 8, 9, 2], [0, 5, 2, 1]], "answer_question": [1, 1, 2],
        "answer_weight": [0.5, 0.5, 1.0]}
    # no answer at all: one that weighs nothing
    assert lists(data.answer_targets(examples, tokens), [2]) == {
        "answer_ids": [[0, 7, 2]], "answer_question": [0], "answer_weight": [0.0]}
    assert lists(data.class_targets(examples, {"a": 0, "b": 1, "yes": 2}), [2, 1, 0]) == {
        "targets": [[0, 0, 0], [1, 1, 0], [0, 0, 1]]}

    statements = [data.Record("1", "n1", "", label=label) for label in ("neutral", "entailment")]
    examples = data.Examples("here", statements, recipe(), Words())
    class_of = {"contradiction": 0, "neutral": 1, "entailment": 2}
    assert lists(data.label_targets(examples, class_of), [1, 0]) == {"labels": [2, 1]}

    generators = [data.item_generator(0, 0, i) for i in (3, 5, 1)]
    found = lists(data.contrast_targets(make_examples(6)), [3, 5, 1], generators)
    assert found["image_ids"] == [3, 0, 1]
    assert found["uniform"][1] == data.item_generator(0, 0, 5).random(2).tolist()


# ---- Loading ahead

def test_batches_do_not_depend_on_workers(picture_folder):
    dataset = make_batches(picture_folder, share_images=True)
    batches = ([0, 5, 3], [10, 2, 1], [4, 6, 7])
    items = [(epoch, np.array(rows)) for epoch in (0, 1) for rows in batches]
    alone = list(data.load_batches(dataset.batch, iter(items), 0, CPU))
    for workers in (1, 3):
        torch.manual_seed(workers)
        ahead = list(data.load_batches(dataset.batch, iter(items), workers, CPU))
        assert len(ahead) == 6 and all(map(equal, alone, ahead))
    assert list(data.load_batches(dataset.batch, [], 2, CPU)) == []


class Failing:
    """Item i is a batch that has i in it; at 5 something happens to the process that makes it."""

    def __init__(self, what):
        self.what, self.main = what, os.getpid()

    def batch(self, i):
        if i == 5 and os.getpid() != self.main:
            if self.what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.what == "error":
                raise InputError("features of image 7 are not finite")
        return {"ids": [str(i)], "x": torch.full((1000, 100), i)}


def children():
    """How many loader processes live: those that have this process's command line."""
    def listed(which):
        command = ["ps", "-ww", "-o", "args=", which, str(os.getpid())]
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()

    return listed("--ppid").count(listed("--pid")[0])


@pytest.mark.parametrize("what, message", [
    ("killed", "a loader process died.* --shm-size.* --workers 0; --resume"),
    ("error", "features of image 7 are not finite"),
])
def test_what_happens_to_workers(what, message):
    seen = []
    with pytest.raises(InputError, match=message):
        for batch in data.load_batches(Failing(what).batch, iter(range(12)), 3, CPU):
            assert torch.equal(batch["x"], torch.full((1000, 100), len(seen)))
            seen.append(batch["ids"])
    assert seen == [[str(i)] for i in range(5)] and children() == 0


def test_stopping_early_leaves_no_process():
    batches = data.load_batches(Failing("").batch, iter(range(10**6)), 3, CPU)
    assert next(batches)["ids"] == ["0"] and children() == 3
    batches.close()
    assert children() == 0


def test_workers_end_with_the_main_process():
    process = os.fork()
    if process == 0:
        os.setsid()
        for batch in data.load_batches(Failing("").batch, iter(range(99)), 3, CPU):
            if batch["ids"] == ["7"]:
                os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    os.waitpid(process, 0)
    for _ in range(100):  # the group is gone when its last process is
        try:
            os.killpg(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("workers are left")


def test_without_fork_there_are_no_workers(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    batches = data.load_batches(Failing("killed").batch, iter(range(8)), 2, CPU)
    assert [batch["ids"] for batch in batches] == [[str(i)] for i in range(8)]
