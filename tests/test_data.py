"""data.py: files of every kind, sound, broken and hostile; images, region features, sampling and batches.

What a damaged file may do: make a reader raise one InputError (or, for checkpoints, ValueError) whose one line names
the file. What it may not do: raise anything else, run code, reach files outside the data folder, or be read into
something that is not well-formed (see `test_mutations`).
"""

import codecs
import copy
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import ROOT
from PIL import Image

import cclm
import data
import files
import mini_languages
import mini_world
import uc2
from files import InputError
from model import file_tensors, read_checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# A small world, its tokenizer and its checkpoints


def tiny_world(folder):
    """The miniature's world with a few images per split."""
    mini_world.WORLD_SIZES["tiny"] = mini_world.WorldSize(gqa_train=12, gqa_valid=3, gqa_dev=3, gqa_test=5,
                                                          shot_questions=2, xvnli_train=12, xvnli_dev=3, xvnli_test=5,
                                                          statements_per_image=2, flickr_train=16, flickr_valid=4,
                                                          xflickrco_test=6)
    mini_world.write_world(folder, seed=1, size="tiny")
    return folder


def tiny_tokenizer(folder, pieces=220):
    corpus = mini_world.tokenizer_corpus(3000, mini_world.WORLD_SIZES["small"], 0)
    rules, prefix = folder / "rules.tsv", folder / f"tokenizer{pieces}"
    rules.write_text(mini_languages.normalization_rules(), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus), model_prefix=str(prefix),
                                             vocab_size=pieces, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2,
                                             pad_id=-1, normalization_rule_tsv=str(rules), num_threads=1, minloglevel=2)
    return prefix.with_suffix(".model")


def tiny_checkpoint(folder, model):
    """A random model of 222 ids, with a recipe of its own."""
    torch.manual_seed(0)
    recipe = {"lr": 1e-3, "suf_k": 1, "batch_size": 8, "epochs": 1}
    if model == "cclm":
        recipe |= {"image_size": 32, "vision_lr": 1e-3, "augment": False}
        made = cclm.CCLM(cclm.Sizes(32, 222, 2, 1, 2, 2, 48, 48, 66, 1, 32, 1, 2, 64, 16, 32, 16), "pretraining")
    else:
        made = uc2.UC2(uc2.Sizes(32, 222, 2, 2, 48, 66, 2, 64, 7), "pretraining")
    path = folder / f"{model}.pt"
    torch.save({"model": file_tensors(made),
                "config": made.config() | {"recipe": {task: recipe for task in data.LANGUAGES}}}, path)
    return path


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Folder with world/, tokenizer220.model, tokenizer200.model, cclm.pt, uc2.pt."""
    folder = tmp_path_factory.mktemp("made")
    tiny_world(folder / "world")
    for pieces in (200, 220):
        tiny_tokenizer(folder, pieces)
    for model in ("cclm", "uc2"):
        tiny_checkpoint(folder, model)
    return folder


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# ---------------------------------------------------------------------------------------------------------------------
# Readers: name -> (file under a folder, function of the folder)

QUESTION = {"question": "Is it red?", "imageId": "n12", "answer": "yes",
            "types": {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"}}
TRAINING = {"img_id": "2354786", "label": {"yes": 1.0}, "question_id": "02930152", "sent": "Is the sky dark?"}
PICKLED = {"image_id": "n12", "labels": [1], "scores": [1.0], "question_id": "202225914", "question": "Is it red?"}
STATEMENT = {"gold_label": "neutral", "sentence1": "A man.", "sentence2": "He sleeps.", "captionID": "75.jpg#2",
             "pairID": "75.jpg#2r1c", "Flikr30kID": "75"}
CAPTIONS = {"sentences": ["A man.", "Ein Mann."], "id": "75", "img_path": "75.jpg"}

READERS = {
    "questions": ("test.json", lambda folder: data.read_gqa(folder / "test.json"), {"1": QUESTION, "2": QUESTION}),
    "training": ("train.json", lambda folder: data.read_gqa(folder / "train.json"),
                 [TRAINING, TRAINING | {"question_id": "3"}]),
    "pickled": ("train.pkl", lambda folder: data.read_gqa(folder / "train.pkl"),
                [PICKLED, PICKLED | {"question_id": "3"}]),
    "statements": ("test.jsonl", lambda folder: data.read_xvnli(folder / "test.jsonl"),
                   [STATEMENT, STATEMENT | {"pairID": "76"}]),
    "captions": ("captions.jsonl", lambda folder: data.read_captions(folder / "captions.jsonl"),
                 [CAPTIONS, CAPTIONS | {"img_path": "76.jpg"}]),
    "labels": ("gqa/annotations/trainval_ans2label.json", lambda folder: data.read_labels(folder),
               {"yes": 1, "no": 0, "blue": 2}),
    "hard negatives": ("flickr30k/hard_negative.pkl", lambda folder: data.read_hard_negatives(folder, ["1", "2", "3"]),
                       {"train_image_list": [1, 2, 3],
                        "train_hard_pool": np.array([[0.0, 1.0, 2.0], [1.0, 2.0, 0.0], [2.0, 0.0, 1.0]])}),
}


def encoded(name, content):
    """A reader's content as the bytes of its file."""
    file = READERS[name][0]
    if file.endswith(".pkl"):
        return pickle.dumps(content, protocol=2)
    if file.endswith(".jsonl"):
        return b"".join(json.dumps(line).encode() + b"\n" for line in content)
    return json.dumps(content).encode()


def put(folder, name, content):
    path = folder / READERS[name][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def assert_refused(read, folder, path, *parts):
    with pytest.raises(ValueError) as caught:
        read(folder)
    assert type(caught.value) in (InputError, ValueError), type(caught.value)
    message = str(caught.value)
    assert message.isprintable() and len(message) <= 1000 and Path(path).name in message, message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("name", READERS)
def test_sound_files_are_read(name, tmp_path):
    put(tmp_path, name, encoded(name, READERS[name][2]))
    assert_well_formed(name, READERS[name][1](tmp_path))


def jsonl(name):
    return READERS[name][0].endswith(".jsonl")


DEEP = b"[" * 100_000 + b"]" * 100_000
RAW = {  # name -> (what becomes of the bytes of a sound JSON file, or of line 2 of JSON lines; part of the message)
    "truncated": (lambda content: content[:-4], "malformed JSON"),
    "UTF-16": (lambda content: content.decode().encode("utf-16"), "byte order mark"),
    "UTF-16 without mark": (lambda content: content.decode().encode("utf-16-le"), "malformed JSON"),
    "UTF-8 with byte order mark": (lambda content: b"\xef\xbb\xbf" + content, "byte order mark"),
    "Latin-1": (lambda content: b'{"a": "\xe9t\xe9"}', "not UTF-8 at byte"),
    "deeply nested": (lambda content: DEEP, "RecursionError"),
    "deeply nested object": (lambda content: b'{"a":' * 100_000, "RecursionError"),
    "not a number": (lambda content: b'{"a": NaN}', "NaN is not a JSON number"),
    "infinite": (lambda content: b'{"a": -Infinity}', "-Infinity is not a JSON number"),
    "number of 10,000 digits": (lambda content: b"9" * 10_000, "cannot be read"),
    "key twice": (lambda content: b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
    "key with line breaks twice": (lambda content: b'{"a\\n\\nb": 1, "a\\n\\nb": 2}', "stands twice"),
    "two values": (lambda content: content + b"{}", "malformed JSON"),
    "zero bytes": (lambda content: bytes(100), "malformed JSON"),
    "text": (lambda content: b"404: Not Found", "malformed JSON"),
    "null": (lambda content: b"null", "expected"),
    "number": (lambda content: b"7", "expected"),
    "string": (lambda content: b'"yes"', "expected"),
    "truth": (lambda content: b"true", "expected"),
    "list of lists": (lambda content: b"[[[[1]]]]", "expected"),
}


@pytest.mark.parametrize("case", RAW)
@pytest.mark.parametrize("name", [name for name in READERS if not READERS[name][0].endswith(".pkl")])
def test_hostile_json(name, case, tmp_path):
    change, part = RAW[case]
    content = encoded(name, READERS[name][2])
    if jsonl(name):
        first, second, _ = content.split(b"\n")
        content = first + b"\n" + change(second)
    else:
        content = change(content)
    path = put(tmp_path, name, content)
    assert_refused(READERS[name][1], tmp_path, path, part,
                   *(["line 2"] if jsonl(name) and not case.startswith("UTF-16 without") else []))


@pytest.mark.parametrize("name", ["questions", "training", "labels"])
@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_empty_json(name, content, tmp_path):
    assert_refused(READERS[name][1], tmp_path, put(tmp_path, name, content), "empty")


@pytest.mark.parametrize("task, file", [("xvnli", "XVNLI/annotations/de/test.jsonl"),
                                        ("xgqa", "xGQA/annotations/few_shot/de/test.json")])
def test_no_records(task, file, tmp_path):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_bytes(b"{}" if task == "xgqa" else b"\n\n")
    assert_refused(lambda folder: data.read_records(str(folder), task, "test", "de"), tmp_path, file, "no records")


def test_missing_file_names_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match="no gqa/annotations/train.json or .*`python data.py --check"):
        data.read_records(str(tmp_path), "xgqa", "train")
    (tmp_path / "test.json").mkdir()
    with pytest.raises(InputError, match="test.json: cannot be read"):
        data.read_gqa(tmp_path / "test.json")


def test_files_beyond_the_memory(tmp_path, monkeypatch):
    def no_memory(path, mode, opener):
        raise MemoryError

    monkeypatch.setattr(files, "open", no_memory, raising=False)
    with pytest.raises(InputError, match="file: too large to read"):
        files.read_bytes(tmp_path / "file")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_only_files_are_read(kind, tmp_path):
    """A pipe that nobody writes to would keep a reader waiting, a device would never end."""
    path = tmp_path / "file"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    for read in (files.read_bytes, files.read_json, files.read_pickle, data.Tokenizer, data.read_image):
        assert_refused(read, path, path, "a pipe or a device")
    assert_refused(read_checkpoint, path, path)
    assert_refused(files.map_array, path, path)


def test_a_rename_is_forced_to_disk(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino) or sync(number))
    files.write(tmp_path / "file", lambda file: file.write(b"complete"))
    assert synced == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]
    monkeypatch.chdir(tmp_path)
    files.write("file", lambda file: file.write(b"again"))
    assert len(synced) == 4 and (tmp_path / "file").read_bytes() == b"again"


LONG = "x" * 1_000_000
OUTSIDE = ["../../secret", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b", "a\nb", "..jpg", "...jpg", "x" * 101,
           "\ud800", 1.5, None, True, ["a"], {}]
FIELDS = {  # reader -> field of its second record -> values that it must refuse
    "questions": {"imageId": [*OUTSIDE, 7], "question": [None, 1, ["a"], {}, LONG, "\udc00"],
                  "answer": [None, 1, [], "\ud800"],
                  "types": [None, [], "verify", {}, {"structural": 1}, {"structural": "Verify"},
                            {"structural": ["verify"]}]},
    "training": {"img_id": OUTSIDE, "sent": [None, 1, LONG, "\ud800"],
                 "label": [None, "yes", ["yes"], 1, {"": 1.0}, {"\ud800": 1.0}, {LONG: 1.0}],
                 "question_id": [None, 1.5, True, [], {}, "", "a\nb", LONG, 10**30]},
    "pickled": {"image_id": OUTSIDE, "question": [None, b"bytes", LONG, "\ud800"],
                "labels": [None, 1, "yes", [1, 2], ["yes"], [True], [1.0], [None]],
                "scores": [None, [], 1.0], "question_id": [None, 1.5, True, "", "a\nb", LONG, 10**30]},
    "statements": {"Flikr30kID": OUTSIDE, "sentence2": [None, 1, [], LONG, "\ud800"],
                   "gold_label": [None, 1, "", "Neutral", "neutral ", ["neutral"], LONG],
                   "pairID": [None, 1.5, [], "", "a\nb", LONG]},
    "captions": {"img_path": [*OUTSIDE, 7],
                 "sentences": [None, "A man.", [], [None], [["A man."]], [1], {}, [LONG], ["A man.", "\ud800"]]},
}
SECOND = {"questions": "question 2", "training": "question 3", "pickled": "question 3", "statements": "line 2",
          "captions": "line 2"}


@pytest.mark.parametrize("name, field", [(name, field) for name, fields in FIELDS.items() for field in fields])
def test_wrong_fields(name, field, tmp_path):
    """Every wrong value of every field that is read, and the field left out: refused, naming file and record."""
    sound = READERS[name][2]
    for value in [*FIELDS[name][field], "absent"]:
        changed = dict(sound["2"] if name == "questions" else sound[1])
        if value == "absent":
            del changed[field]
            if field in ("types", "pairID"):  # not needed
                continue
        else:
            changed[field] = value
        content = {"1": QUESTION, "2": changed} if name == "questions" else [sound[0], changed]
        path = put(tmp_path, name, encoded(name, content))
        record = "record 1" if field == "question_id" else SECOND[name]
        assert_refused(READERS[name][1], tmp_path, path, record)


LABEL_FILES = [{}, [], 5, "yes", None, {"yes": 1}, {"yes": 0, "no": 0}, {"yes": 0, "no": 2}, {"yes": 0, "no": True},
               {"yes": 0, "no": 1.0}, {"yes": 0, "no": "1"}, {"yes": 0, "no": None},
               {"yes": 0, "no": 10**30}, {"yes": 0, "": 1}, {"yes": 0, " ": 1}, {"yes": 0, "\ud800": 1},
               {"yes": 0, LONG: 1}, {"yes": -1, "no": 0}, {"yes": [0]}]


@pytest.mark.parametrize("content", LABEL_FILES, ids=lambda content: str(content)[:20])
def test_wrong_labels(content, tmp_path):
    path = put(tmp_path, "labels", encoded("labels", content))
    assert_refused(READERS["labels"][1], tmp_path, path)


@pytest.mark.parametrize("content", [["no", "yes"], {"no": 0}, [], 5, ["no", "yes", ["blue"]], [[[[]]]]])
def test_labels_that_disagree(content, tmp_path):
    put(tmp_path, "labels", encoded("labels", READERS["labels"][2]))
    other = tmp_path / "gqa/annotations/trainval_label2ans.json"
    other.write_text(json.dumps(content))
    assert_refused(READERS["labels"][1], tmp_path, other, "is not the inverse of")


POOLS = [{}, [], None, {"train_image_list": [1]}, {"train_image_list": 1, "train_hard_pool": []},
         {"train_image_list": [1, 2], "train_hard_pool": [[0, 1]]},
         {"train_image_list": ["../1"], "train_hard_pool": [[0]]},
         {"train_image_list": [None], "train_hard_pool": [[0]]}, {"train_image_list": [1], "train_hard_pool": [5]},
         {"train_image_list": [1], "train_hard_pool": [[1]]}, {"train_image_list": [1], "train_hard_pool": [[-1]]},
         {"train_image_list": [1], "train_hard_pool": [[0.5]]},
         {"train_image_list": [1], "train_hard_pool": [[float("nan")]]},
         {"train_image_list": [1], "train_hard_pool": [["0"]]}, {"train_image_list": [1], "train_hard_pool": ["0"]},
         {"train_image_list": [1], "train_hard_pool": np.array([["a"]])},
         {"train_image_list": [1], "train_hard_pool": [{0}]}]


@pytest.mark.parametrize("content", POOLS, ids=str)
def test_wrong_hard_negatives(content, tmp_path):
    path = put(tmp_path, "hard negatives", encoded("hard negatives", content))
    assert_refused(READERS["hard negatives"][1], tmp_path, path)


def nested(depth):
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


HOSTILE_PICKLES = {
    "empty": b"", "truncated": pickle.dumps([PICKLED])[:-5], "text": b"404: Not Found",
    "JSON": b'[{"image_id": "n12"}]', "zero bytes": bytes(50),
    "global": b"cos\nsystem\n(S'true'\ntR.", "instance": b"(S'true'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nS'true'\no.", "new object": b"\x80\x02cos\nsystem\n)\x81.",
    "by stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", "builtins": b"cbuiltins\neval\n(S'1'\ntR.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent id": b"Pname\n.", "call of a string": b"S'a'\n)R.", "state of a dict": b"}}b.",
    "array class called": b"cnumpy\nndarray\n(I1000000000000\ntR.",
    "4 billion places in the memo": b"\x80\x02K\x01r\xff\xff\xff\xff.", "string of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
    "array of 16 EB": b"\x80\x05\x96" + b"\xff" * 7 + b"\x0f.",
    "key nested 300,000 deep": b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.",
    "list nested 100,000 deep": nested(100_000),
    "list of itself": b"\x80\x02]q\x00h\x00a.", "number of 5,000 digits": b"I" + b"9" * 5000 + b"\n.",
    "set": pickle.dumps({1, 2}), "bytes": pickle.dumps(b"a"),
    "path": pickle.dumps(Path("a")), "array of objects": pickle.dumps([np.array([PICKLED], dtype=object)]),
    "dates": pickle.dumps(np.array(["2024-01-01"], "M8[D]")),
    "wrong length": pickle.dumps([np.arange(3)]).replace(b"K\x03\x85", b"K\x09\x85"),
}


class Claimed:
    """Is pickled as a numpy array of this shape, type and content, whether they fit or not."""

    def __init__(self, shape, kind, content):
        self.shape, self.kind, self.content = shape, kind, content

    def __reduce__(self):
        return np.empty(0).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, self.shape, self.kind, False, self.content)


class Call:
    """Is pickled as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def doubled(times):
    """An array of objects that is filled with [1], and then again and again with itself."""
    array, kind = b"cnumpy.core.multiarray\n_reconstruct\n)Rq\x01", b"cnumpy\ndtype\nX\x02\0\0\0O8\x85Rq\x02"
    fill = b"(K\x01K\x01\x85%s\x89%stb"
    return b"\x80\x02" + array + fill % (kind, b"]K\x01a") + times * (fill % (b"h\x02", b"h\x01")) + b"."


def nested_twice(depth):
    return [] if depth == 0 else 2 * [nested_twice(depth - 1)]


OBJECTS, BYTES, ITSELF = np.dtype(object), np.dtype(np.uint8), Claimed((1,), np.dtype(object), None)
ITSELF.content, SHARED, TEXT = ITSELF, b"a" * 1000, "a" * 1000
LARGE_PICKLES = {  # name -> (what would fill the memory if it were written a little larger, part of the message)
    "array of itself": ([ITSELF], "does not fill its shape [1]"),
    "objects of a string": ([Claimed((3,), OBJECTS, "abc")], "does not fill its shape [3]"),
    "fewer objects than places": ([Claimed((9,), OBJECTS, [1])], "does not fill its shape [9]"),
    "shape of a list": ([Claimed(([1], 2), OBJECTS, [1, 1])], "at most two dimensions"),
    "shape of 60 dimensions": ([Claimed(60 * (1,), BYTES, b"a")], "at most two dimensions"),
    "type of lists": ([Claimed((1,), Call(np.dtype, (nested_twice(8),)), b"a")], "not a readable pickle"),
    "bytes of 100 arrays": ([Claimed((1000,), BYTES, SHARED) for _ in range(100)], "makes more of its bytes"),
    "text encoded 100 times": ([Call(codecs.encode, (TEXT, "latin1")) for _ in range(100)],
                               "makes more of its bytes"),
}


@pytest.mark.parametrize("case", [*LARGE_PICKLES, "array doubled"])
def test_pickles_stay_as_small_as_their_files(case, tmp_path):
    content, part = LARGE_PICKLES.get(case, (None, "has its content already"))
    path = put(tmp_path, "pickled", pickle.dumps(content, 4) if content else doubled(20))
    assert_refused(READERS["pickled"][1], tmp_path, path, part)


@pytest.mark.parametrize("case", HOSTILE_PICKLES)
@pytest.mark.parametrize("name", ["pickled", "hard negatives"])
def test_hostile_pickles(name, case, tmp_path):
    assert_refused(READERS[name][1], tmp_path, put(tmp_path, name, HOSTILE_PICKLES[case]))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["pickled", "hard negatives"])
def test_pickles_execute_nothing(name, protocol, tmp_path):
    path = put(tmp_path, name, pickle.dumps(Bomb(tmp_path / "executed"), protocol))
    assert_refused(READERS[name][1], tmp_path, path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("protocol", range(5))
def test_arrays_in_pickles(protocol):
    for array in (np.arange(6, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)),
                  np.array([1, -2], ">i4"), np.array([True, False]), np.float64(2.5)):
        read = files.unpickle(pickle.dumps({"a": array}, protocol), "here")["a"]
        assert read == array.tolist()


def test_label_ids_become_answers(tmp_path):
    put(tmp_path, "labels", encoded("labels", READERS["labels"][2]))
    path = tmp_path / "gqa/annotations/train_target.pkl"
    path.write_bytes(pickle.dumps([PICKLED | {"labels": [2, 0], "scores": [1.0, 1.0]}]))
    assert data.read_records(str(tmp_path), "xgqa", "train")[1][0].answers == {"blue": 0.5, "no": 0.5}
    for label in (-1, 3):
        path.write_bytes(pickle.dumps([PICKLED | {"labels": [label]}]))
        assert_refused(lambda folder: data.read_records(str(folder), "xgqa", "train"), tmp_path, path,
                       "question 202225914", f"no label {label}")


def test_a_repeated_label_weighs_once(tmp_path):
    for labels, expected in (([1, 1], {1: 1.0}), ([1, 2, 1], {1: 0.5, 2: 0.5})):
        path = put(tmp_path, "pickled", pickle.dumps([PICKLED | {"labels": labels, "scores": [1.0] * len(labels)}]))
        assert data.read_gqa(path)[0].answers == expected


def test_messages_are_one_line():
    error = InputError("a\r\nb\x85\u2028c\x1b[2J \ud800" + "x" * 10**6)
    assert str(error).isprintable() and len(str(error)) <= 1000
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # workers send theirs to the main process


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and image files


@pytest.mark.parametrize("content", [b"", b"\0", b"text", bytes(1000), None])
def test_wrong_tokenizer(content, made, tmp_path):
    path = tmp_path / "file.model"
    path.write_bytes((made / "tokenizer220.model").read_bytes()[:5000] if content is None else content)
    assert_refused(lambda folder: data.Tokenizer(path), tmp_path, path, "not a sentencepiece model")


def test_tokenizer_of_another_kind(made, tmp_path):
    """sentencepiece's own default order is <unk>, <s>, </s>; one with other specials is not of XLM-R's kind."""
    sentences = iter(["the small red circle", "a large blue square"] * 50)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_prefix=str(tmp_path / "other"),
                                             vocab_size=30,
                                             pad_id=0, unk_id=1, bos_id=2, eos_id=3, hard_vocab_limit=False,
                                             num_threads=1, minloglevel=2)
    assert_refused(lambda folder: data.Tokenizer(folder / "other.model"), tmp_path, "other.model",
                   "must be pieces 0, 1, 2")
    tokenizer = data.Tokenizer(made / "tokenizer220.model")
    assert tokenizer.vocabulary == 222 and tokenizer.mask == 221
    with pytest.raises(InputError, match="222 ids, but the checkpoint embeds 202"):
        tokenizer.check(tokenizer.sha256, 202)
    assert tokenizer.check(tokenizer.sha256, 222) is None
    assert "is not the known" in tokenizer.check(data.XLMR_SHA256, 222)


def image_bytes(mode="RGB", kind="JPEG", size=(40, 30), **options):
    file = io.BytesIO()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    noise.convert(mode).save(file, kind, **options)
    return file.getvalue()


SOUND_IMAGES = {"RGB": image_bytes(), "grey": image_bytes("L"), "CMYK": image_bytes("CMYK"),
                "progressive": image_bytes(progressive=True), "PNG": image_bytes(kind="PNG"),
                "palette": image_bytes("P", "PNG"), "alpha": image_bytes("RGBA", "PNG"),
                "grey with alpha": image_bytes("LA", "PNG"), "1 bit": image_bytes("1", "PNG"),
                "GIF": image_bytes("P", "GIF"), "transparent palette": image_bytes("P", "PNG", transparency=b"\0\1\2"),
                "one pixel": image_bytes(size=(1, 1)),
                "a line": image_bytes(size=(3000, 1))}


@pytest.mark.parametrize("case", SOUND_IMAGES)
def test_images_of_all_kinds(case, tmp_path, recwarn):
    (tmp_path / "1.jpg").write_bytes(SOUND_IMAGES[case])
    image = data.read_image(tmp_path / "1.jpg")
    assert image.mode == "RGB" and not recwarn.list
    for size in (8, 32):
        assert data.to_tensor(data.resize(image, size)).shape == (3, size, size)
        assert data.to_tensor(data.augment(image, size, True)).shape == (3, size, size)


def test_images_of_more_than_8_bits_are_refused(tmp_path):
    Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)).save(tmp_path / "1.png")
    assert_refused(lambda folder: data.read_image(folder / "1.png"), tmp_path, "1.png", "more than 8 bits")


def png_of(width, height):
    """A PNG that claims a size."""
    content = bytearray(image_bytes(kind="PNG"))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def black_png(width, height):
    """A sound PNG of a few kilobytes, however large."""
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


HOSTILE_IMAGES = {"empty": b"", "zero bytes": bytes(1000), "text": b"<html>404</html>",
                  "truncated": SOUND_IMAGES["RGB"][:-300], "header alone": SOUND_IMAGES["RGB"][:20],
                  "truncated PNG": SOUND_IMAGES["PNG"][:-500], "bomb of 10 gigapixels": png_of(100_000, 100_000),
                  "bomb of 100 megapixels": black_png(10_000, 10_000),
                  "no width": png_of(0, 30), "PDF": b"%PDF-1.4\n",
                  "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "pickle": pickle.dumps([1]),
                  "TIFF": image_bytes(kind="TIFF"), "ICO": image_bytes(kind="ICO")}


@pytest.mark.parametrize("case", HOSTILE_IMAGES)
def test_hostile_images(case, tmp_path, recwarn):
    (tmp_path / "1.jpg").write_bytes(HOSTILE_IMAGES[case])
    assert_refused(lambda folder: data.read_image(folder / "1.jpg"), tmp_path, "1.jpg", "not a readable image")
    assert not recwarn.list


def test_image_files_stay_in_the_data_folder(tmp_path):
    for task in data.LANGUAGES:
        for value in OUTSIDE:
            with pytest.raises(InputError):
                files.image_key(value, "here")
        for value in ("n12", 12, "12.jpg", "COCO_val2014_000000391895.jpg", "a b", "-1", "%2e%2e"):
            path = Path(data.image_path(tmp_path, task, files.image_key(value, "here")))
            assert path.parent.parent.parent == tmp_path or path.parent.parent == tmp_path / "gqa"


def test_image_cache(made, tmp_path):
    world, keys = str(made / "world"), [path.stem for path in sorted((made / "world/gqa/images").iterdir())[:5]]
    direct = data.Images(world, "xgqa", keys, 16)
    cached = data.Images(world, "xgqa", keys, 16, cache=str(tmp_path))
    assert torch.equal(direct.batch([3, 0])["images"], cached.batch([3, 0])["images"])
    assert torch.equal(direct.batch([1])["images"],
                       data.Images(world, "xgqa", keys, 16, cache=str(tmp_path)).batch([1])["images"])
    file, = tmp_path.iterdir()  # no temporary file stays
    folder = shutil.copytree(made / "world/gqa/images", tmp_path / "copy/gqa/images").parent.parent
    for source in keys[1], keys[2]:  # a replaced image is seen, and not its predecessor's pixels
        os.replace(folder / f"gqa/images/{source}.jpg", folder / f"gqa/images/{keys[0]}.jpg")
        replaced = data.Images(str(folder), "xgqa", keys[:1], 16, cache=str(folder))
        assert torch.equal(replaced.batch([0])["images"], direct.batch([keys.index(source)])["images"])
    for content in (b"", file.read_bytes()[:200], b"x" * 300):
        file.write_bytes(content)
        assert_refused(lambda folder: data.Images(world, "xgqa", keys, 16, cache=str(folder)), tmp_path, file,
                       "not a readable array")
    assert_refused(lambda folder: data.Images(world, "xgqa", [*keys, "0"], 16), tmp_path, "0.jpg",
                   "no such image (1 of 6 are missing)")
    (tmp_path / "file").write_bytes(b"")
    assert_refused(lambda folder: data.Images(world, "xgqa", keys, 16, cache=str(folder / "file")), tmp_path, "file",
                   "cannot be written")


def test_image_cache_of_damaged_images(made, tmp_path):
    """Nothing half-written stays where the next run would take it for the cache."""
    folder = shutil.copytree(made / "world/gqa", tmp_path / "gqa", copy_function=os.link)
    keys = [path.stem for path in sorted((folder / "images").iterdir())[:5]]
    cut(folder / f"images/{keys[3]}.jpg", 300)
    assert_refused(lambda _: data.Images(str(tmp_path), "xgqa", keys, 16, cache=str(tmp_path / "cache")), tmp_path,
                   f"{keys[3]}.jpg", "not a readable image")
    assert not any((tmp_path / "cache").iterdir())


def test_no_space_is_told():
    with pytest.raises(InputError, match="GB free, but 4611686018.4 GB are needed"):
        files.require_space("/", 1 << 62)


@pytest.mark.parametrize("save", [lambda file: file.write(bytes(100_000)),
                                  lambda file: torch.save(torch.zeros(100_000), file)], ids=["bytes", "tensors"])
def test_a_full_disk_destroys_nothing(save, tmp_path):
    """A limit on the size of files stands for the disk."""
    path = tmp_path / "last.pt"
    files.write(path, lambda file: file.write(b"complete"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(InputError, match="last.pt: cannot be written .*what was complete before is untouched"):
            files.write(path, save)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"complete" and [file.name for file in tmp_path.iterdir()] == ["last.pt"]


# ---------------------------------------------------------------------------------------------------------------------
# Region features


def write_features(folder, counts, width=6, boxes=None, seed=0):
    """A sound folder of region features; `counts`: regions of each image."""
    folder.mkdir(parents=True)
    rng, fixed = np.random.default_rng(seed), len(set(counts)) == 1 and boxes is None
    rows = (len(counts), counts[0]) if fixed else (sum(counts),)
    np.save(folder / "features.npy", rng.random((*rows, width)).astype(np.float16))
    np.save(folder / "boxes.npy", (np.sort(rng.random((*rows, 2, 2)), -2) * 90).reshape(*rows, 4).astype(np.float32))
    np.save(folder / "sizes.npy", rng.integers(90, 200, (len(counts), 2)).astype(np.int32))
    if not fixed:
        np.save(folder / "offsets.npy", np.cumsum([0, *counts]))
    (folder / "ids.txt").write_text("".join(f"n{i}\n" for i in range(len(counts))))
    (folder / "meta.json").write_text(json.dumps({"format": 1, "count": len(counts), "boxes": boxes or max(counts),
                                                  "dim": width, "dtype": "float16", "complete": True}))
    return folder


def test_regions_with_a_fixed_number(tmp_path):
    folder = write_features(tmp_path / "features", [3] * 4)
    regions = data.Regions(str(folder), ["n2", "n0"])
    batch = regions.batch(np.array([0, 1, 0]))
    features, boxes, sizes = (np.load(folder / f"{name}.npy")[[2, 0, 2]] for name in ("features", "boxes", "sizes"))
    assert np.array_equal(batch["features"], features) and batch["features"].dtype == torch.float16
    assert np.array_equal(batch["locations"], data.locations(boxes, sizes))
    assert batch["locations"].dtype == torch.float32
    assert batch["region_mask"].tolist() == [[1, 1, 1]] * 3


def test_regions_with_different_numbers(tmp_path):
    counts = [2, 5, 1, 4]
    folder = write_features(tmp_path / "features", counts, boxes=4)
    regions = data.Regions(str(folder), ["n2", "n1", "n0"])
    batch = regions.batch(np.array([1, 0, 2]))
    assert batch["region_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]  # 5 are cut to 4
    features, boxes, sizes = (np.load(folder / f"{name}.npy") for name in ("features", "boxes", "sizes"))
    for i, image in enumerate((1, 2, 0)):
        start, count = sum(counts[:image]), min(4, counts[image])
        assert np.array_equal(batch["features"][i, :count],
                              features[start : start + count]) and not batch["features"][i, count:].any()
        assert np.array_equal(batch["locations"][i, :count],
                              data.locations(boxes[None, start : start + count],
                                             sizes[[image]])[0]) and not batch["locations"][i, count:].any()
    # padded to the longest of the batch
    assert data.Regions(str(folder), ["n2"]).batch(np.array([0]))["features"].shape[1] == 1


def edit(name, change):
    """Replace a file of a feature folder by what `change` makes of its array, JSON, text or bytes."""

    def apply(folder):
        path = folder / name
        if name.endswith(".npy"):
            array = np.load(path)
            np.save(path, change(array), allow_pickle=True)
        elif name.endswith(".json"):
            path.write_text(json.dumps(change(json.loads(path.read_bytes()))))
        else:
            path.write_text(change(path.read_text()), encoding="utf-8")

    return apply


def raw(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def with_value(value, index=(0, 0)):
    def change(array):
        array[index] = value
        return array

    return change


def npy(header):
    return lambda content: np.lib.format.magic(1, 0) + len(header).to_bytes(2, "little") + header


HOSTILE_FEATURES = {  # name -> (change of the folder, part of the message)
    "no folder": (shutil.rmtree, "no such folder of region features"),
    "meta missing": (lambda folder: (folder / "meta.json").unlink(), "meta.json: no such file"),
    "meta empty": (raw("meta.json", lambda content: b""), "meta.json: empty"),
    "meta truncated": (raw("meta.json", lambda content: content[:-3]), "meta.json: malformed JSON"),
    "meta a list": (edit("meta.json", lambda meta: [meta]), "incomplete"),
    "meta incomplete": (edit("meta.json", lambda meta: meta | {"complete": False}), "incomplete"),
    "meta complete as a number": (edit("meta.json", lambda meta: meta | {"complete": 1}), "incomplete"),
    "meta without count": (edit("meta.json", lambda meta: {name: meta[name] for name in meta if name != "count"}),
                           "no field 'count'"),
    "count a string": (edit("meta.json", lambda meta: meta | {"count": "4"}), "must be int"),
    "count negative": (edit("meta.json", lambda meta: meta | {"count": -4}), "positive"),
    "count 10^30": (edit("meta.json", lambda meta: meta | {"count": 10**30}), "ids.txt: 4 ids"),
    "boxes 0": (edit("meta.json", lambda meta: meta | {"boxes": 0}), "positive"),
    "boxes true": (edit("meta.json", lambda meta: meta | {"boxes": True}), "must be int"),
    "dim 7": (edit("meta.json", lambda meta: meta | {"dim": 7}), "features.npy: float16 [4, 3, 6], expected"),
    "format 2": (edit("meta.json", lambda meta: meta | {"format": 2}), '"format": 1'),
    "ids missing": (lambda folder: (folder / "ids.txt").unlink(), "ids.txt: no such file"),
    "id missing": (edit("ids.txt", lambda text: text[:-3]), "ids.txt: 3 ids"),
    "id twice": (edit("ids.txt", lambda text: text.replace("n3", "n0")), "ids.txt: 4 ids, 3 of them different"),
    "ids Latin-1": (raw("ids.txt", lambda content: content.replace(b"n1", b"n\xe9")), "ids.txt: not UTF-8"),
    "other ids": (edit("ids.txt", lambda text: text.replace("n", "m")),
                  "no features of image n0 (4 of 4 images are missing)"),
    "features missing": (lambda folder: (folder / "features.npy").unlink(), "features.npy: no such file"),
    "features empty": (raw("features.npy", lambda content: b""), "features.npy: not a readable array"),
    "features truncated": (raw("features.npy", lambda content: content[:-1]), "features.npy: not a readable array"),
    "features without header": (raw("features.npy", lambda content: content[100:]),
                                "features.npy: not a readable array"),
    "features a pickle": (edit("features.npy", lambda array: np.array({"a": 1}, dtype=object)),
                          "features.npy: not a readable array"),
    "features a zip": (raw("features.npy", lambda content: b"PK\x03\x04" + content),
                       "features.npy: not a readable array"),
    "features integers": (edit("features.npy", lambda array: array.astype(np.int64)), "features.npy: int64"),
    "features float64": (edit("features.npy", lambda array: array.astype(np.float64)), "features.npy: float64"),
    "features text": (edit("features.npy", lambda array: array.astype("U5")), "features.npy: <U5"),
    "features transposed": (edit("features.npy", lambda array: array.swapaxes(1, 2)),
                            "features.npy: float16 [4, 6, 3]"),
    "header nested": (raw("features.npy", npy(b"(" * 5000 + b"\n")), "features.npy: not a readable array"),
    "header with code": (
        raw("features.npy", npy(b"{'descr': __import__('os').getcwd(), 'fortran_order': False, 'shape': (4, 3, 6)}\n")),
        "features.npy: not a readable array"),
    "header huge": (
        raw("features.npy", npy(b"{'descr': '<f2', 'fortran_order': False, 'shape': (9223372036854775807, 3, 6)}\n")),
                    "features.npy: not a readable array"),
    "header negative": (raw("features.npy", npy(b"{'descr': '<f2', 'fortran_order': False, 'shape': (-4, 3, 6)}\n")),
                        "features.npy"),
    "boxes of another shape": (edit("boxes.npy", lambda array: array[:, :, :3]), "boxes.npy: float32 [4, 3, 3]"),
    "sizes zero": (edit("sizes.npy", with_value(0, (2, 1))), "image n2 has no positive width and height"),
    "sizes float": (edit("sizes.npy", lambda array: array.astype(np.float32)), "sizes.npy: float32"),
    "feature not a number": (edit("features.npy", with_value(np.nan, (1, 2, 3))), "image n1 are not finite"),
    "feature infinite": (edit("features.npy", with_value(-np.inf, (3, 0, 0))), "image n3 are not finite"),
    "box not a number": (edit("boxes.npy", with_value(np.nan, (2, 0, 0))), "image n2 are not finite"),
}
HOSTILE_OFFSETS = {
    "differences that wrap around": (edit("offsets.npy", lambda array: np.array([0, 2**62, 2**63 - 1, -(2**62), 12])),
                                     "must start at 0"),
    "first not 0": (edit("offsets.npy", with_value(1, 0)), "must start at 0"),
    "falling": (edit("offsets.npy", with_value(9, 1)), "must start at 0"),
    "image without regions": (edit("offsets.npy", with_value(0, 1)), "must start at 0"),
    "one too few": (edit("offsets.npy", lambda array: array[:-1]), "offsets.npy: int64 [4], expected int64 [5]"),
    "float": (edit("offsets.npy", lambda array: array.astype(np.float64)), "offsets.npy: float64"),
    "more boxes than any image": (edit("meta.json", lambda meta: meta | {"boxes": 6}), 'meta.json: "boxes" is 6, but'),
    "boxes 10^30": (edit("meta.json", lambda meta: meta | {"boxes": 10**30}), 'meta.json: "boxes" is 1000'),
    "beyond the features": (edit("offsets.npy", with_value(10**12, -1)), "features.npy: float16 [12, 6], expected"),
}


@pytest.mark.parametrize("name", [*HOSTILE_FEATURES, *HOSTILE_OFFSETS])
def test_hostile_features(name, tmp_path, recwarn):
    change, part = (HOSTILE_FEATURES | HOSTILE_OFFSETS)[name]
    folder = write_features(tmp_path / "features", [2, 5, 1, 4] if name in HOSTILE_OFFSETS else [3] * 4)
    change(folder)
    assert_refused(lambda _: data.Regions(str(folder), ["n0", "n1", "n2", "n3"]).batch(np.arange(4)), tmp_path,
                   "features", part)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def load_model(model, path, task="xvnli"):
    tensors, config = read_checkpoint(str(path))
    if model == "cclm":
        return cclm.from_pretrained(tensors, config, task, 32, str(path))
    return uc2.from_pretrained(tensors, config, task, str(path), 15)


@pytest.mark.parametrize("model", ["cclm", "uc2"])
def test_sound_checkpoints_are_read(model, made):
    for task in data.LANGUAGES:
        assert load_model(model, made / f"{model}.pt", task).task == task


def save(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def test_checkpoints_of_the_older_format(tmp_path):
    content = {"model": {"weight": torch.arange(3.0)}, "config": {"heads": 2}}
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    tensors, config = read_checkpoint(str(tmp_path / "file.pt"))
    assert torch.equal(tensors["weight"], torch.arange(3.0)) and config == {"heads": 2}
    torch.save(content | {"more": Bomb(str(tmp_path / "executed"))}, tmp_path / "file.pt",
               _use_new_zipfile_serialization=False)
    assert_refused(lambda folder: read_checkpoint(str(folder / "file.pt")), tmp_path, "file.pt")
    assert not (tmp_path / "executed").exists()


HOSTILE_CHECKPOINTS = {  # name -> bytes
    "empty": b"", "text": b"404: Not Found", "zero bytes": bytes(1000), "zip of nothing": b"PK\x05\x06" + bytes(18),
                       "pickle of a list": pickle.dumps([1]),
    "pickled code": pickle.dumps(Bomb("executed")), "list": save([torch.zeros(2)]), "tensor": save(torch.zeros(2)),
                       "no tensors": save({"model": {}}),
    "model a list": save({"model": [torch.zeros(2)]}), "number among the tensors": save({"model": {"a": 1}}),
                       "name a number": save({1: torch.zeros(2)}),
    "code inside": save({"model": {"a": Bomb("executed")}}),
                       "tensors nested": save({"model": {"a": {"b": torch.zeros(2)}}}),
                       "another model": save({"model": {"weight": torch.zeros(2)}}),
    "name with line breaks": save({"a\nb": 1}), "name of a megabyte": save({LONG: 1}),
}


@pytest.mark.parametrize("name", HOSTILE_CHECKPOINTS)
@pytest.mark.parametrize("model", ["cclm", "uc2"])
def test_hostile_checkpoints(model, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.pt").write_bytes(HOSTILE_CHECKPOINTS[name])
    assert_refused(lambda folder: load_model(model, folder / "file.pt"), tmp_path, "file.pt")
    assert not (tmp_path / "executed").exists()


def first_matrix(tensors):
    return next(name for name in tensors if name.endswith("dense.weight"))


CHANGED_CHECKPOINTS = {  # name -> change of (tensors, config)
    "tensor missing": lambda tensors, config: tensors.pop(first_matrix(tensors)),
    "tensor too many": lambda tensors, config: tensors.update(more=torch.zeros(2)),
    "layer missing": lambda tensors, config: [tensors.pop(name) for name in list(tensors) if ".layer.0." in name],
    "layer named by no number": lambda tensors,
                       config: tensors.update({"text_encoder.encoder.layer.x.a": torch.zeros(2),
                                               "bert.encoder.layer.x.a": torch.zeros(2)}),
    "matrix transposed": lambda tensors, config: tensors.update(
        {first_matrix(tensors): tensors[first_matrix(tensors)][:-1].T.contiguous()}),
    "vectors": lambda tensors, config: tensors.update({name: tensor.flatten() for name, tensor in tensors.items()}),
    "scalars": lambda tensors, config: tensors.update({name: tensor.flatten()[0] for name, tensor in tensors.items()}),
    "empty tensors": lambda tensors, config: tensors.update({name: tensor[:0] for name,
                                                             tensor in tensors.items() if tensor.ndim}),
    "no names": lambda tensors, config: [tensors.update({str(i): tensors.pop(name)}) for i,
                                         name in enumerate(list(tensors))],
    "heads a string": lambda tensors, config: config.update(heads="2", text_heads="2"),
    "heads 0": lambda tensors, config: config.update(heads=0, text_heads=0),
    "heads 5": lambda tensors, config: config.update(heads=5, text_heads=5),
    "heads null": lambda tensors, config: config.update(heads=None, text_heads=None),
    "integers": lambda tensors, config: tensors.update({name: tensor.long() for name, tensor in tensors.items()}),
    "complex numbers": lambda tensors, config: tensors.update(
        {first_matrix(tensors): tensors[first_matrix(tensors)].to(torch.complex64)}),
    "sparse": lambda tensors, config: tensors.update(
        {first_matrix(tensors): tensors[first_matrix(tensors)].to_sparse()}),
    "positions of one number": lambda tensors, config: tensors.update(
        {name: torch.zeros(1, 1).expand(4 * 10**9, tensor.shape[1]) for name, tensor in tensors.items()
         if name.endswith("embeddings.position_embeddings.weight")}),
    "positions of no memory": lambda tensors, config: tensors.update(
        {name: torch.empty(4 * 10**9, tensor.shape[1], device="meta") for name, tensor in tensors.items()
         if name.endswith("embeddings.position_embeddings.weight")}),
    "heads and positions 10^30": lambda tensors, config: config.update(heads=10**30, decoder_positions=10**30),
    "variant a list": lambda tensors, config: config.update(variant=["volta"], decoder_positions=["66"]),
    "variant unknown": lambda tensors, config: config.update(variant="x", decoder_positions="66"),
    "heads a list": lambda tensors, config: config.update(heads=[2], text_heads=[2]),
}


@pytest.mark.parametrize("name", CHANGED_CHECKPOINTS)
@pytest.mark.parametrize("model", ["cclm", "uc2"])
def test_changed_checkpoints(model, name, made, tmp_path):
    content = torch.load(made / f"{model}.pt", weights_only=True)
    CHANGED_CHECKPOINTS[name](content["model"], content["config"])
    torch.save(content, tmp_path / "file.pt")
    assert_refused(lambda folder: load_model(model, folder / "file.pt"), tmp_path, "file.pt")


# ---------------------------------------------------------------------------------------------------------------------
# Random damage


def is_text(value):
    return isinstance(value, str) and len(value) <= files.MAX_TEXT and value.encode()


def assert_well_formed(name, loaded):
    """What any reader may return, whatever the file was."""
    if name == "labels":
        assert len(set(loaded)) == len(loaded) > 0 and all(is_text(answer) and answer.strip() for answer in loaded)
        return
    if name == "hard negatives":
        for row, pool in loaded.items():
            assert 0 <= row < 3 and pool.dtype == np.int64 and len(pool) and 0 <= pool.min() and pool.max() < 3
        return
    for record in loaded:
        assert isinstance(record.id, str) and record.id.isprintable() and 0 < len(record.id) <= 100 + 10
        for task in data.LANGUAGES:
            path = os.path.normpath(data.image_path("/data", task, record.image))
            assert os.path.dirname(path) in ("/data/gqa/images", "/data/flickr30k/flickr30k-images",
                                             "/data/mscoco/val2014") and path.isprintable()
        assert record.text == "" or is_text(record.text)
        assert record.label in (("entailment", "neutral", "contradiction", "-") if name == "statements" else ("",))
        assert record.type in ("", *data.QUESTION_TYPES)
        assert all(is_text(answer) or answer == "" or name == "pickled" and type(answer) is int
                   for answer in record.answers)
        assert not record.answers or abs(sum(record.answers.values()) - 1) < 1e-9


def damage_bytes(content, rng):
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        kind, at = rng.randrange(6), rng.randrange(len(content) + 1)
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content = content[:at]
        elif kind == 2:
            del content[at : at + rng.choice((1, 3, 30))]
        elif kind == 3:
            content[at:at] = rng.choice((b"\0", b"\xff", b"\n", b'"', b"[" * 9, rng.randbytes(8)))
        elif kind == 4:
            content[at:at] = content[at : at + rng.choice((1, 10, 100))]
        elif content:
            content[at % len(content)] = rng.randrange(256)
    return bytes(content)


STRANGE = [None, True, 0, -1, 7, 10**17, 10**40, 1.5, -0.0, 1e308, "", "x", "-", "../../x", "/", "a\nb", "\ud800",
           "x" * 6000, "yes", "neutral", [], {}, [[]], {"": {}}, ["a"], [1], {"yes": 1}]


def damage_value(value, rng):
    """Replace, remove, repeat or rename something somewhere in parsed JSON."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key, kind = rng.choice(list(keys)), rng.randrange(8)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[rng.choice([other for other in STRANGE if isinstance(other, str)])] = value.pop(key)
        elif kind == 1:
            value.insert(key, value[key])
        elif kind == 2 and isinstance(value, dict):
            value[f"{key}2"] = copy.deepcopy(rng.choice(STRANGE))
        elif kind == 2:
            value.insert(key, copy.deepcopy(rng.choice(STRANGE)))
        else:
            value[key] = damage_value(value[key], rng)
        return value
    return copy.deepcopy(rng.choice(STRANGE))


@pytest.mark.parametrize("name", READERS)
def test_mutations(name, tmp_path):
    """300 damaged bytes and 300 damaged values per reader: one line or something well-formed, never anything else.

    Silent acceptance would be a file that loads into what later code does not expect: an id that is no short printable
    string, an image key that leads out of the image folder, a text that is not encodable or endless, an answer that is
    no string (or, pickled, label id), weights of answers that do not sum to 1, a label or type outside the known ones,
    label ids that are not 0 … n-1. Not counted, since no reader can know: another word, another id, a record more or
    less (`--check` compares languages and counts).
    """
    rng, (file, read, sound) = random.Random(f"mutations {name}"), READERS[name]
    content, accepted = encoded(name, sound), 0
    for i in range(600):
        if i % 2 and not file.endswith(".pkl"):
            value = json.loads(json.dumps(sound))
            for _ in range(rng.choice((1, 1, 2, 3))):
                value = damage_value(value, rng)
            if jsonl(name) and not isinstance(value, list):
                value = [value]
            damaged = encoded(name, value)
        else:
            damaged = damage_bytes(content, rng)
        path = put(tmp_path, name, damaged)
        try:
            loaded = read(tmp_path)
        except InputError as error:
            assert str(error).isprintable() and path.name in str(error), error
        except Exception as error:
            pytest.fail(f"{type(error).__name__}: {error} for {damaged[:2000]!r}")
        else:
            accepted += 1
            assert_well_formed(name, loaded)
    assert 10 < accepted < 500  # the damage is neither always fatal nor always harmless


def test_mutated_images(tmp_path):
    """An image that still loads is RGB and has pixels: damaged pixels are not counted as silent acceptance."""
    rng, kinds = random.Random(0), [SOUND_IMAGES[kind] for kind in ("RGB", "CMYK", "PNG", "palette", "GIF",
                                                                    "progressive")]
    for i in range(400):
        (tmp_path / "1.jpg").write_bytes(damage_bytes(kinds[i % len(kinds)], rng))
        try:
            image = data.read_image(tmp_path / "1.jpg")
        except InputError as error:
            assert str(error).isprintable() and "1.jpg" in str(error)
        else:
            assert image.mode == "RGB" and min(image.size) > 0


def test_mutated_tokenizers(made, tmp_path):
    """A tokenizer that still loads gives ids within its own vocabulary, for any text;
    its sha256 tells that it is another.
    """
    rng, content, accepted = random.Random(0), (made / "tokenizer220.model").read_bytes(), 0
    for _ in range(300):
        (tmp_path / "file.model").write_bytes(damage_bytes(content, rng))
        try:
            tokenizer = data.Tokenizer(tmp_path / "file.model")
            rows = tokenizer(["a small red circle", "маленький", "小さな", "", "\0 x" * 50], 20)
        except InputError as error:
            assert str(error).isprintable() and "file.model" in str(error)
            continue
        accepted += 1
        assert tokenizer.check(data.Tokenizer(made / "tokenizer220.model").sha256, tokenizer.vocabulary)
        for row in (rows[i] for i in range(5)):
            assert row[0] == data.BOS and row[-1] == data.EOS
            assert row.min() >= 0 and row.max() < tokenizer.vocabulary and len(row) <= 20
    assert accepted


def test_mutated_features(tmp_path):
    """Features that still load make a batch of the promised shapes with finite numbers.

    Other numbers are not counted.
    """
    rng, accepted = random.Random(0), 0
    sound = {name: write_features(tmp_path / name, counts) for name,
             counts in (("fixed", [3] * 4), ("variable", [2, 5, 1, 4]))}
    keys = [f"n{i}" for i in range(4)]
    for i in range(300):
        folder = sound["variable" if i % 2 else "fixed"]
        path = rng.choice(sorted(folder.iterdir()))
        content = path.read_bytes()
        path.write_bytes(damage_bytes(content, rng))
        try:
            batch = data.Regions(str(folder), keys).batch(np.arange(4))
        except InputError as error:
            assert str(error).isprintable() and str(folder) in str(error)
            continue
        finally:
            path.write_bytes(content)
        accepted += 1
        regions = batch["region_mask"].shape[1]
        assert batch["features"].shape == (4, regions, 6) and batch["locations"].shape == (4, regions, 7)
        assert batch["features"].isfinite().all()
        assert batch["locations"].isfinite().all() and (batch["region_mask"].sum(1) > 0).all()
    assert 10 < accepted < 290


@pytest.mark.parametrize("model", ["cclm", "uc2"])
def test_mutated_checkpoints(model, made, tmp_path):
    """A checkpoint that still loads is a model of the same shapes: other weights are not counted as silent acceptance.
    """
    rng, content = random.Random(0), (made / f"{model}.pt").read_bytes()
    shapes = {name: parameter.shape for name, parameter in load_model(model, made / f"{model}.pt").named_parameters()}
    central = content.rindex(b"PK\x01\x02", 0,
                             content.index(b"PK\x01\x02") + 4)  # the zip's directory, behind the tensors
    pickled = content.index(b"data.pkl")
    for i in range(200):
        if i % 4 == 0:
            damaged = content[: rng.randrange(len(content))]
        else:  # not in the tensors, where nothing would be found
            start, stop = ((central, len(content)) if i % 4 == 1 else (pickled, pickled + 8000) if i % 4 == 2
                           else (0, len(content)))
            at = rng.randrange(start, min(stop, len(content)))
            damaged = content[:at] + damage_bytes(content[at : at + 50], rng) + content[at + 50 :]
        (tmp_path / "file.pt").write_bytes(damaged)
        try:
            loaded = load_model(model, tmp_path / "file.pt")
        except ValueError as error:
            assert type(error) in (ValueError, InputError) and "\n" not in str(error) and "file.pt" in str(error), error
        else:
            assert {name: parameter.shape for name, parameter in loaded.named_parameters()} == shapes


# ---------------------------------------------------------------------------------------------------------------------
# Through the command line


def run_script(script, *arguments):
    """`python script arguments` -> (exit code, standard output, standard error).

    A process of its own, but forked from this one, which has imported torch already (4 s each).
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = os.fork()
        if process == 0:
            code = 1
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", errors="backslashreplace",
                                               closefd=False) for number in (1, 2))
                sys.argv = [script, *map(str, arguments)]
                runpy.run_path(str(ROOT / script), run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        out.seek(0), err.seek(0)
        return code, out.read().decode(), err.read().decode()


def error_lines(stderr):
    return [line for line in re.split("[\r\n]", stderr) if "error: " in line]


def replace_file(path, content):
    path.unlink(missing_ok=True)  # a hard link to the sound file
    path.write_bytes(content)


def cut(path, size=-100):
    replace_file(path, path.read_bytes()[:size])


def change_json(path, change):
    content = json.loads(path.read_bytes())
    change(content)
    replace_file(path, json.dumps(content).encode())


def cut_images(folder, pattern):
    for path in folder.glob(pattern):
        cut(path, 400)


def with_code(folder):
    torch.save({"model": {"a": Bomb(folder / "executed")}}, folder / "cclm.pt.part")
    os.replace(folder / "cclm.pt.part", folder / "cclm.pt")


def change_uc2(folder, change):
    content = torch.load(folder / "uc2.pt", weights_only=True)
    change(content)
    torch.save(content, folder / "uc2.pt.part")
    os.replace(folder / "uc2.pt.part", folder / "uc2.pt")


def change_recipe(folder, change):
    change_uc2(folder, lambda content: content["config"].update(recipe=change(content["config"]["recipe"])))


def drop_pooler_bias(content):
    del content["model"]["bert.t_pooler.dense.bias"]


def weights_not_finite(folder):
    change_uc2(folder, lambda content: content["model"]["bert.t_pooler.dense.weight"].fill_(torch.nan))


def spoil_features(folder):
    features = np.load(folder / "features.npy")
    features[:] = np.nan
    (folder / "features.npy").unlink()
    np.save(folder / "features.npy", features)


CLI = {  # name -> (model, task, what is done to a copy of `made`, part of the message, more arguments)
    "no data": ("cclm", "xvnli", lambda f: shutil.rmtree(f / "world"), "python data.py --check", []),
    "training file truncated": ("cclm", "xgqa", lambda f: cut(f / "world/gqa/annotations/train.json"),
                                "train.json: malformed JSON", []),
    "test file in UTF-16": ("cclm", "xvnli",
                            lambda f: replace_file(f / "world/XVNLI/annotations/fr/test.jsonl",
                                                   (f / "world/XVNLI/annotations/fr/test.jsonl").read_text().encode(
                                                       "utf-16")),
                            "fr/test.jsonl, line 1: starts with a byte order mark", []),
    "unknown answer": ("uc2", "xgqa", lambda f: change_json(f / "world/gqa/annotations/train.json",
                                                            lambda q: q[0].update(label={"bottle cap": 1.0})),
                       "the answer 'bottle cap' is not among", []),
    "path in an annotation": ("uc2", "xgqa",
                              lambda f: change_json(f / "world/gqa/annotations/train.json",
                                                    lambda q: q[0].update(img_id="../../../etc/passwd")),
                              "is not an image id", []),
    "label maps disagree": ("uc2", "xgqa",
                            lambda f: change_json(f / "world/gqa/annotations/trainval_label2ans.json",
                                                  lambda answers: answers.reverse()), "is not the inverse", []),
    "image missing": ("cclm", "xflickrco", lambda f: next((f / "world/mscoco/val2014").iterdir()).unlink(),
                      "no such image (1 of", []),
    "images truncated": ("cclm", "xvnli", lambda f: cut_images(f / "world/flickr30k/flickr30k-images", "*.jpg"),
                         "not a readable image", ["--workers", "0"]),
    "images truncated, worker": ("cclm", "xvnli", lambda f: cut_images(f / "world/flickr30k/flickr30k-images", "*.jpg"),
                                 "not a readable image", ["--workers", "1"]),
    "test images truncated": ("cclm", "xgqa", lambda f: cut_images(f / "world/gqa/images", "n*.jpg"),
                              "not a readable image", ["--workers", "0"]),
    "features incomplete": ("uc2", "xvnli",
                            lambda f: change_json(f / "world/flickr30k/features/meta.json",
                                                  lambda meta: meta.update(complete=False)), "incomplete", []),
    "features truncated": ("uc2", "xvnli", lambda f: cut(f / "world/flickr30k/features/features.npy"),
                           "features.npy: not a readable array", []),
    "features not finite": ("uc2", "xvnli", lambda f: spoil_features(f / "world/flickr30k/features"), "are not finite",
                            ["--workers", "0"]),
    "hard negatives with code": ("uc2", "xflickrco",
                                 lambda f: replace_file(f / "world/flickr30k/hard_negative.pkl",
                                                        pickle.dumps(Bomb(f / "executed"))),
                                 "hard_negative.pkl: refers to", []),
    "checkpoint truncated": ("cclm", "xvnli", lambda f: cut(f / "cclm.pt", 50_000),
                             "cclm.pt: not a readable checkpoint", []),
    "checkpoint with code": ("cclm", "xvnli", with_code, "cclm.pt: not a readable checkpoint", []),
    "checkpoint of the other model": ("cclm", "xvnli",
                                      lambda f: replace_file(f / "cclm.pt", (f / "uc2.pt").read_bytes()),
                                      "not a CCLM checkpoint", []),
    "checkpoint without a tensor": ("uc2", "xvnli", lambda f: change_uc2(f, drop_pooler_bias),
                                    "tensor 'bert.t_pooler.dense.bias' is missing", []),
    "recipe a list": ("uc2", "xvnli", lambda f: change_recipe(f, lambda recipes: ["lr"]), "uc2.pt: the recipe", []),
    "recipe with a string": ("uc2", "xvnli", lambda f: change_recipe(f, lambda recipes: {"xvnli": {"batch_size": "8"}}),
                             "uc2.pt: the recipe", []),
    "recipe without epochs": ("uc2", "xvnli", lambda f: change_recipe(f, lambda recipes: {"xvnli": {"epochs": -1}}),
                              "uc2.pt: the recipe", []),
    "weights not finite": ("uc2", "xvnli", weights_not_finite, "loss nan and gradient norm nan at step 1", []),
    "tokenizer of another model": ("uc2", "xvnli",
                                   lambda f: os.replace(f / "tokenizer200.model", f / "tokenizer220.model"),
                                   "202 ids, but the checkpoint embeds 222", []),
    "tokenizer not one": ("uc2", "xvnli", lambda f: replace_file(f / "tokenizer220.model", b"404"),
                          "not a sentencepiece model", []),
    "few records": ("uc2", "xvnli", lambda f: cut_lines(f / "world/XVNLI/annotations/en/train.jsonl", 5),
                    "5 training examples do not fill one batch of 8", []),
}


def cut_lines(path, count):
    replace_file(path, b"".join(path.read_bytes().splitlines(True)[:count]))


def train_arguments(folder, model, task):
    return ["--model", model, "--task", task, "--data", folder / "world", "--checkpoint", folder / f"{model}.pt",
            "--tokenizer", folder / "tokenizer220.model", "--run", folder / "run"]


@pytest.mark.parametrize("name", CLI)
def test_command_line(name, made, tmp_path):
    model, task, change, part, more = CLI[name]
    folder = shutil.copytree(made, tmp_path / "all", copy_function=os.link)
    change(folder)
    code, _, stderr = run_script("train.py", *train_arguments(folder, model, task), *more)
    assert code != 0 and "Traceback" not in stderr, stderr
    line, = error_lines(stderr)
    assert part in line and line.startswith("error: "), stderr
    assert not (folder / "executed").exists() and not (folder / "run/results.json").exists()


def test_command_line_in_a_fresh_interpreter(made, tmp_path):
    """As above without the fork: a user's very command."""
    folder = shutil.copytree(made, tmp_path / "all", copy_function=os.link)
    cut(folder / "world/XVNLI/annotations/ru/test.jsonl")
    done = subprocess.run([sys.executable, ROOT / "train.py", *train_arguments(folder, "uc2", "xvnli")],
                          capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    line, = error_lines(done.stderr)
    assert "ru/test.jsonl, line 10: malformed JSON" in line


# ---------------------------------------------------------------------------------------------------------------------
# The real files


def test_real_files(iglue):
    folder = str(iglue)
    labels = data.read_labels(folder)
    assert len(labels) == 1842 and (labels.index("yes"), labels.index("no")) == (1773, 441)
    count = lambda task, split, *which: [(len(r), len({record.image for record in r})) for _,
                                         r in [data.read_records(folder, task, split, *which)]][0]
    for language in data.LANGUAGES["xgqa"]:
        expected = {"test": (744, 23), "dev": (277, 10)} | {1: (27, 1), 5: (155, 5), 48: (1490, 48)}
        for split, counts in expected.items():
            assert count("xgqa", *(("few-shot", language, split) if isinstance(split, int) else (split,
                                                                                                 language))) == counts
        _, records = data.read_records(folder, "xgqa", "few-shot", language, 48)
        assert {answer for record in records for answer in record.answers} <= set(labels)
    assert count("xgqa", "train") == (1970, 62) and count("xgqa", "valid") == (238, 10)
    for language in data.LANGUAGES["xvnli"]:
        _, records = data.read_records(folder, "xvnli", "test", language)
        gold = [record.label for record in records]
        assert [gold.count(label) for label in ("entailment", "neutral", "contradiction", "-")] == [394, 381, 375, 14]
        assert count("xvnli", "test", language) == (1164, 357) and count("xvnli", "few-shot", language, 48) == (168, 48)
    for language in data.LANGUAGES["xflickrco"]:
        assert count("xflickrco", "test", language) == (2000, 2000)
        _, records = data.read_records(folder, "xflickrco", "test", language)
        assert [record.image for record in records if not record.text] == {"de": ["COCO_val2014_000000122239"],
                                                                           "id": ["6312211170"]}.get(language, [])[:1]
        if language != "en":
            assert count("xflickrco", "few-shot", language, 100) == (100, 100)
    assert count("xflickrco", "valid") == (5070, 1014)


# ---------------------------------------------------------------------------------------------------------------------
# Which examples, in which order


LENGTHS = np.random.default_rng(0).integers(3, 40, 1000)


@pytest.mark.parametrize("options", [{}, {"pool": 1},
                                     {"groups": np.random.default_rng(1).integers(0, 90, 1000), "group_size": 4}])
def test_epoch_batches(options):
    batches = data.epoch_batches(LENGTHS, 32, 5, 2, **options)
    assert batches.shape == (31, 32)
    assert len(set(batches.flatten().tolist())) == 31 * 32  # a permutation, but for the rest
    assert batches.min() >= 0 and batches.max() < 1000
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    assert np.array_equal(batches, data.epoch_batches(LENGTHS.copy(), 32, 5, 2,
                                                      **options))  # a function of seed and epoch alone
    others = [data.epoch_batches(LENGTHS, 32, *which, **options) for which in ((5, 3), (6, 2))]
    assert not any(np.array_equal(batches, other) for other in others)
    left_out = [set(range(1000)) - set(b.flatten().tolist()) for b in (batches, *others)]
    assert len(set(map(frozenset, left_out))) == 3  # another rest in every epoch


def test_similar_lengths_share_a_batch():
    spread = lambda batches: np.ptp(LENGTHS[batches], 1).mean()
    assert spread(data.epoch_batches(LENGTHS, 32, 0, 0)) < 0.25 * spread(data.epoch_batches(LENGTHS, 32, 0, 0, pool=1))
    shortest_first = [LENGTHS[batch].mean() for batch in data.epoch_batches(LENGTHS, 32, 0, 0)]
    assert abs(np.corrcoef(shortest_first, range(31))[0, 1]) < 0.5  # batches of all lengths come in any order


def test_groups_stay_together():
    images = np.random.default_rng(1).integers(0, 90, 1000)
    order = data.epoch_batches(LENGTHS, 40, 0, 0, groups=images, group_size=4).flatten()
    runs = np.split(images[order], np.flatnonzero(np.diff(images[order])) + 1)
    expected = sum(-(-count // 4) for count in np.bincount(images))  # so many groups of up to 4
    assert len(runs) <= expected and len(order) / len(runs) > 3
    for epoch in range(3):  # and are drawn anew in every epoch
        assert not np.array_equal(order, data.epoch_batches(LENGTHS, 40, 0, epoch + 1, groups=images,
                                                            group_size=4).flatten())


def test_training_items_resume_anywhere():
    examples = make_examples(20)
    whole = list(data.training_items(examples, 4, 7, 3, 0, 2, [0, 1]))
    assert len(whole) == 3 * 5 * 2
    for step in (1, 5, 7, 14, 15):
        assert all(e == f and np.array_equal(a, b) for (e, a),
                   (f, b) in zip(data.training_items(examples, 4, 7, 3, step, 2, [0, 1]), whole[2 * step :],
                                 strict=True))
    halves = [list(data.training_items(examples, 4, 7, 3, 0, 2, [rank])) for rank in (0, 1)]
    assert all(np.array_equal(item[1], whole[i][1]) for rank in (0, 1) for item,
               i in zip(halves[rank], range(rank, len(whole), 2), strict=True))


class Words:
    """Stands for a tokenizer: one id per word."""

    longest = 512

    def __call__(self, texts, max_tokens=None):
        rows = [[data.BOS, *(3 + len(word) for word in text.split())] for text in texts]
        return data.Ragged([row[: (max_tokens or 10**6) - 1] + [data.EOS] for row in rows])


def make_examples(count, images=5, texts=None):
    records = [data.Record(str(i), f"n{i % images}", (texts or ["is it big"] * count)[i],
                           {"yes": 1.0}) for i in range(count)]
    return data.Examples("here", records, data.TextRules("", None, None, None, None), Words(), True)


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "gqa/images").mkdir(parents=True)
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"gqa/images/n{i}.jpg")
    return str(folder)


def make_dataset(folder, share_images=False, augment=True, texts=None):
    examples = make_examples(12, texts=texts)
    pictures = data.Images(folder, "xgqa", examples.image_keys, 16)
    return data.TrainingBatches(examples, pictures, data.class_targets(examples, {"no": 0, "yes": 1}), 3, augment,
                                share_images)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name], name


@pytest.fixture
def spawning():
    """New processes start afresh, as on macOS and, from Python 3.14 on, nearly so everywhere."""
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(usual, force=True)


@pytest.mark.parametrize("share_images", [False, True])
def test_batches_do_not_depend_on_workers(share_images, picture_folder, spawning):
    dataset = make_dataset(picture_folder, share_images)
    items = [(epoch, np.array(rows)) for epoch in range(2) for rows in ([0, 5, 3, 8], [10, 2, 1, 11], [4, 6, 7, 9])]
    alone = list(data.load_batches(dataset, items, 0, torch.device("cpu")))
    for workers in (1, 2):
        torch.manual_seed(workers)
        for a, b in zip(alone, data.load_batches(dataset, items, workers, torch.device("cpu")), strict=True):
            assert_same(a, b)


def test_augmentation_is_a_function_of_seed_epoch_and_item(picture_folder):
    dataset = make_dataset(picture_folder)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    images = dataset[(0, np.array([1, 6, 2]))]["images"]
    assert torch.equal(before, torch.get_rng_state())  # the model's own draws are left alone
    assert torch.equal(images[2], dataset[(0, np.array([2]))]["images"][0])
    assert not torch.equal(images[0], images[1])  # the same image, two items
    assert not torch.equal(images[2], dataset[(1, np.array([2]))]["images"][0])
    dataset.seed = 4
    assert not torch.equal(images[2], dataset[(0, np.array([2]))]["images"][0])
    plain = make_dataset(picture_folder, augment=False)
    assert torch.equal(plain[(0, np.array([2]))]["images"], plain[(1, np.array([2]))]["images"])


def test_images_are_not_mirrored_where_sides_are_told(picture_folder, monkeypatch):
    mirrored = []
    monkeypatch.setattr(data, "augment", lambda image, size,
                        flip: mirrored.append(bool(flip)) or data.resize(image, size))
    texts = ["is it left of it", "is it big", "is it bright", "Right", *["is it big"] * 8]
    dataset = make_dataset(picture_folder, texts=texts)
    dataset[(0, np.arange(4))]
    assert mirrored == [False, True, False,
                        True]  # the letters of "right" in "bright" count, capitals do not, as in the reference
    dataset, mirrored[:] = make_dataset(picture_folder, share_images=True, texts=texts), []
    dataset[(0, np.array([0, 5, 1, 6]))]  # examples 0 and 5 share an image, 1 and 6 another
    assert mirrored == [False, True]


def test_shared_images(picture_folder):
    batch = make_dataset(picture_folder, share_images=True, augment=False)[(0, np.array([7, 1, 2, 6]))]
    single = make_dataset(picture_folder, augment=False)[(0, np.array([7, 1, 2, 6]))]
    assert len(batch["images"]) == 2
    assert torch.equal(batch["images"][batch["image_index"]], single["images"])
    assert torch.equal(batch["targets"], torch.tensor([[0.0, 1.0]] * 4)) and batch["ids"] == ["7", "1", "2", "6"]


def ranking(folder, pools=None, first_image_bug=False, counts=(3, 1, 2, 2, 4)):
    """RankingBatches over images with different numbers of captions."""
    rows = [image for image, count in enumerate(counts) for _ in range(count)]
    random.Random(0).shuffle(rows)
    records = [data.Record(f"{i}", f"n{image}", " ".join(["word"] * (i + 1))) for i, image in enumerate(rows)]
    examples = data.Examples("here", records, data.TextRules("", None, None, None, None), Words(), True)
    regions = data.Regions(str(folder), examples.image_keys)
    return data.RankingBatches(examples, regions, 0, pools or {}, first_image_bug), examples


def pairs_of(batch, examples):
    """The four (image, caption) pairs of each item as rows and example numbers, found again from what the model sees.
    """
    lengths = batch["attention_mask"].sum(1) - 3  # caption i has i + 1 words
    images = batch["image_index"].tolist()
    captions = [int(lengths[text]) for text in batch["text_index"]]
    return [list(zip(images[i : i + 4], captions[i : i + 4])) for i in range(0, len(images), 4)]


def test_ranking_pairs(tmp_path):
    folder = write_features(tmp_path / "features", [3] * 5)
    pools = {0: np.array([1, 3]), 2: np.array([4])}
    dataset, examples = ranking(folder, pools)
    rows, hard = examples.image_rows, {}
    for epoch in range(30):
        indices = np.random.default_rng(epoch).permutation(len(examples))[:4]
        batch = dataset[(epoch, indices)]
        assert_same(batch, dataset[(epoch, indices)])
        shown = np.unique([key for item in pairs_of(batch, examples) for key, _ in item])
        assert len(batch["features"]) == len(shown)
        # which image each row of the batch is, by its features
        everything = np.load(folder / "features.npy")
        of_row = [everything[int(key[1:])] for key in examples.image_keys]
        which = [next(row for row, sound in enumerate(of_row) if np.array_equal(sound, features))
                 for features in batch["features"].numpy()]
        for index, item in zip(indices, pairs_of(batch, examples)):
            (match, a, b, c), image = [(which[row], caption) for row, caption in item], rows[index]
            assert match == (image, index)
            assert a[0] == image and rows[a[1]] != image
            assert b[0] != image and b[1] == index
            assert c[0] == image and rows[c[1]] != image
            hard.setdefault(image, set()).add(rows[c[1]])
    assert hard[0] == {1, 3} and hard[2] == {4}
    assert all(len(hard[image]) > 2 for image in (1, 3, 4))  # without a pool: any other image


def test_ranking_with_the_first_image_bug(tmp_path):
    dataset, examples = ranking(write_features(tmp_path / "features", [3] * 5), {1: np.array([2])},
                                first_image_bug=True)
    first, rows = examples.image_rows[0], examples.image_rows
    assert first == 0
    captions = set()
    for epoch in range(20):
        for item in pairs_of(dataset[(epoch, np.arange(len(examples)))], examples):
            captions |= {item[1][1], item[3][1]}
    assert captions == set(np.flatnonzero(rows == 0).tolist())  # all are the first image's, even for that image itself


def test_ranking_needs_two_images(tmp_path):
    with pytest.raises(InputError, match="captions of one image only"):
        ranking(write_features(tmp_path / "features", [3] * 5), counts=(3,))


def test_hard_negatives_are_rows(tmp_path):
    put(tmp_path, "hard negatives", encoded("hard negatives",
                                            {"train_image_list": ["7.jpg", 8, "9"],
                                             "train_hard_pool": [[0, 2, 1], [1, 0], [2]]}))
    pools = data.read_hard_negatives(tmp_path, ["9", "x", "7", "8"])
    assert {row: pool.tolist() for row, pool in pools.items()} == {2: [0, 3], 3: [2]}  # the image itself is left out
    assert data.read_hard_negatives(tmp_path / "elsewhere", ["9"]) == {}


def test_limit_and_keep(made):
    rules, world = data.TextRules("caption", 80, 80, None, None), str(made / "world")
    everything = data.load_examples(world, "xvnli", "train", rules, Words())
    neutral = data.load_examples(world, "xvnli", "train", rules, Words(), keep=lambda text,
                                 record: record.label == "neutral", limit=10)
    assert [record.id for record in neutral.records] == [record.id for record in everything.records[:10]
                                                         if record.label == "neutral"]
    assert all(replace(a) == b for a, b in zip(neutral.records, neutral.records))
    with pytest.raises(InputError, match="train.jsonl: no records with text"):
        data.load_examples(world, "xvnli", "train", rules, Words(), keep=lambda text, record: False)


def test_unknown_training_answers_are_named():
    examples = make_examples(6)
    data.check_answers(examples, ["yes", "no"])
    with pytest.raises(InputError,
                       match=r"here, question 0: the answer 'yes' is not among the 1 labels \(6 such questions\)"):
        data.check_answers(examples, ["no"])


def test_questions_without_an_answer():
    """CCLM learns from the other questions of a batch, from a batch of none nothing, and from no file of none."""
    examples, answers = make_examples(6), {"yes": [0, 7, 2], "no": [0, 8, 2]}
    for record in examples.records[:4]:
        record.answers = {}
    data.check_answers(examples, ["yes", "no"])
    some, none = (data.answer_targets(examples, answers)(indices, None) for indices in ([0, 5, 1], [0, 1]))
    assert (some["answer_question"].tolist(), some["answer_weight"].tolist()) == ([1], [1.0])
    assert {name: (tensor.dtype, tensor.ndim) for name, tensor in some.items()} == \
        {name: (tensor.dtype, tensor.ndim) for name, tensor in none.items()}
    assert none["answer_weight"].tolist() == [0.0] and 0 <= none["answer_question"].item() < 2
    assert data.class_targets(examples, {"no": 0, "yes": 1})([0, 5], None)["targets"].tolist() == [[0, 0], [0, 1]]
    for record in examples.records:
        record.answers = {}
    with pytest.raises(InputError, match="here: none of 6 questions has an answer to train on"):
        data.check_answers(examples, ["yes", "no"])


def test_texts_beyond_the_positions_are_named():
    texts = ["is it big", "big " * 510, "it " * 511, "is it"]
    assert make_examples(2, texts=texts).tokens.lengths.tolist() == [5, 512]
    with pytest.raises(InputError, match="here, 2: 513 tokens, the model has positions for 512"):
        make_examples(4, texts=texts)
