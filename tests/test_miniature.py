"""The miniature: its sentences are right, its answers true, its files IGLUE's, its builder exact.

Scenes are read back from the region features and compared with the pixels of the JPEGs; every
sentence of the files is parsed and judged on them by code of this file alone.
"""

import collections
import itertools
import multiprocessing
import os
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import cclm
import data
import uc2
from miniature import languages, pretrain, world
from miniature.languages import ATTRIBUTES, COLOURS, SHAPES, SIZES, Form, NounPhrase, say
from model import read_checkpoint

SHIPPED = ROOT / "miniature"
FEW = {name: min(count, 12) for name, count in world.IMAGES.items()}


@pytest.fixture(scope="module")
def folder():
    return Path(world.prepare("cclm")[0])


@pytest.fixture(scope="module")
def meanings():
    """Language -> {sentence: form}, of all that the world's files may hold."""
    forms = all_forms()
    return {code: {say(form, code): form for form in forms} for code in languages.LANGUAGES}


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def records_of(folder, task, split, language="en", shots=None):
    return data.read_records(str(folder), task, split, language, shots)[1]


def all_forms():
    """"and" and "or" join two phrases of two words; captions "and" two of three."""
    words = itertools.product((None, *SIZES), (None, *COLOURS), (None, *SHAPES))
    phrases = [NounPhrase(*some) for some in words if any(some)]
    two, three = ([one for one in phrases if one.count(None) == unknown] for unknown in (1, 0))
    forms = [Form("phrase", (phrase,)) for phrase in phrases]
    forms += [Form("and", pair) for pair in itertools.permutations(three, 2)]
    for asked in (False, True):
        forms += [Form("exist", (phrase,), question=asked) for phrase in phrases]
        for kind in ("and", "or"):
            forms += [Form(kind, pair, question=asked) for pair in itertools.permutations(two, 2)]
    for phrase, (attribute, values) in itertools.product(phrases, ATTRIBUTES.items()):
        if attribute == "side" or getattr(phrase, attribute) is None:
            for value, asked in itertools.product(values, (False, True)):
                forms.append(Form("attribute", (phrase,), attribute, (value,), asked))
            for pair in itertools.permutations(values, 2):
                forms.append(Form("choose", (phrase,), attribute, pair, True))
            forms.append(Form("what", (phrase,), attribute, (), True))
    return forms


def test_literal_sentences_in_all_languages(meanings):
    """One meaning per block, a line per language: agreement, case, particles, vowel harmony."""
    blocks = (ROOT / "tests/mini_sentences.txt").read_text(encoding="utf-8").strip().split("\n\n")
    assert len(blocks) == 28
    for block in blocks:
        written = dict(line.split(" ", 1) for line in block.split("\n"))
        form = meanings["en"][written["en"]]
        assert written == {language: say(form, language) for language in languages.LANGUAGES}


def test_different_meanings_are_said_differently(meanings):
    """Otherwise nobody could answer. Also: text is NFC, single spaces, a capital letter first."""
    for language, forms in meanings.items():
        assert len(forms) == len(set(all_forms())) > 9000, language
        for text, form in forms.items():
            assert text == unicodedata.normalize("NFC", text).strip() and "  " not in text
            assert form.kind == "phrase" or not text.lstrip("¿")[0].islower()


def test_the_shipped_tokenizer_knows_every_text_and_is_rebuilt_bit_for_bit(meanings, tmp_path):
    tokenizer = data.Tokenizer(str(SHIPPED / "tokenizer.model"))
    for forms in meanings.values():
        texts = random.Random(0).sample(list(forms), 999)
        for variant in (texts, [data.clean_caption(text, None) for text in texts]):  # UC2, CCLM
            assert data.UNK not in np.concatenate(tokenizer(variant))
    pretrain.train_tokenizer(tmp_path / "tokenizer.model")
    built = (tmp_path / "tokenizer.model").read_bytes()
    assert built == (SHIPPED / "tokenizer.model").read_bytes()


# ---- Truth, judged by code of this file ----------------------------------------------------------


def fits(phrase, scene):
    known = [(name, word) for name, word in phrase._asdict().items() if word]
    return [thing for thing in scene if all(getattr(thing, name) == word for name, word in known)]


def verdict(form, scene):
    """What a viewer answers: "yes", "no" or a value; None if "the" does not find one object."""
    found = [fits(phrase, scene) for phrase in form.phrases]
    if form.attribute is None:
        true = any(found) if form.kind == "or" else all(found)
        return "yes" if true else "no"
    if len(found[0]) != 1:
        return None
    value = getattr(found[0][0], form.attribute)
    if form.kind == "attribute":
        return "yes" if value == form.values[0] else "no"
    return value


Seen = collections.namedtuple("Seen", "size colour shape side x y")


def scenes_from_features(folder):
    """Image id -> objects, read from region features and boxes alone (nearest sum of vectors)."""
    ids = (folder / "ids.txt").read_text().split()
    features, boxes = np.load(folder / "features.npy"), np.load(folder / "boxes.npy")
    assert features.shape == (len(set(ids)), 4, 64) and features.dtype == np.float16
    assert (0 <= boxes).all() and (boxes <= 32).all() and (boxes[..., 2:] > boxes[..., :2]).all()
    kinds = list(itertools.product(SIZES, COLOURS, SHAPES))
    prototypes = [sum(world.VECTORS[word] for word in kind) for kind in kinds]
    prototypes = np.stack([*prototypes, world.VECTORS["background"]])
    flat = features.reshape(-1, 64).astype(np.float64)
    nearest = ((prototypes**2).sum(1) - 2 * flat @ prototypes.T).argmin(1).reshape(-1, 4)
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    scenes = {}
    for image, row, places in zip(ids, nearest, centres):
        scenes[image] = [Seen(*kinds[kind], "left" if x < 16 else "right", x, y)
                         for kind, (x, y) in zip(row, places) if kind < len(kinds)]
        assert len(scenes[image]) in (2, 3)
    return scenes


def assert_images_show(scenes, path_of):
    """In the centre of every object the JPEG has its colour."""
    palette = np.array([world.RGB[colour] for colour in COLOURS])
    for image, scene in scenes.items():
        with Image.open(path_of(image)) as file:
            assert file.format == "JPEG" and file.size == (32, 32)
            pixels = np.asarray(file, float)
        for thing in scene:
            x, y = int(thing.x), int(thing.y)
            seen = pixels[y - 1 : y + 1, x - 1 : x + 1].mean((0, 1))
            assert COLOURS[abs(palette - seen).sum(1).argmin()] == thing.colour, (image, thing)


def test_gqa_agrees_with_features_and_images(folder, meanings):
    scenes = scenes_from_features(folder / "gqa/features")
    assert len(scenes) == 1500 + 125 + 48 + 125 + 250
    assert_images_show(scenes, lambda image: folder / f"gqa/images/{image}.jpg")
    labels, asked = data.read_labels(str(folder)), 0
    for split, language in (("train", "en"), ("dev", "en"), ("test", "ko"), ("few-shot", "de")):
        for one in records_of(folder, "xgqa", split, language, 48):
            answer = verdict(meanings[language][one.text], scenes[one.image])
            assert one.answers == {answer: 1.0} and answer in labels
            asked += 1
    assert asked == 6000 + 500 + 1000 + 480 and len(labels) == 15


def test_xvnli_and_captions_agree_with_features_and_images(folder, meanings):
    scenes = scenes_from_features(folder / "flickr30k/features")
    assert_images_show(scenes, lambda image: folder / f"flickr30k/flickr30k-images/{image}.jpg")
    labels = collections.Counter()
    names = {"yes": "entailment", "no": "contradiction", None: "neutral"}
    for split, language in (("train", "en"), ("dev", "en"), ("test", "ar"), ("few-shot", "ru")):
        for one in records_of(folder, "xvnli", split, language, 48):
            form, scene = meanings[language][one.text], scenes[one.image]
            assert one.label == names[verdict(form, scene)]
            assert one.label != "neutral" or not fits(form.phrases[0], scene)
            labels[split, one.label] += 1
    assert labels.total() == 6000 + 500 + 1000 + 192 and min(labels.values()) > 60
    train = records_of(folder, "xflickrco", "train")
    assert {verdict(meanings["en"][one.text], scenes[one.image]) for one in train} == {"yes"}
    scenes = scenes_from_features(folder / "xFlickrCO/features")
    places = {False: "flickr30k/flickr30k-images", True: "mscoco/val2014"}
    assert_images_show(scenes, lambda image: folder / places["COCO" in image] / f"{image}.jpg")
    test = records_of(folder, "xflickrco", "test", "tr")
    images = [one.image for one in test]
    assert ["COCO" in image for image in images] == [False] * 100 + [True] * 100
    for one in test:  # true of its own image and of no other
        form = meanings["tr"][one.text]
        assert [image for image in images if verdict(form, scenes[image]) == "yes"] == [one.image]


SHOTS = {"xgqa": (1, 5, 48), "xvnli": (1, 10, 48), "xflickrco": (1, 25, 100)}


@pytest.mark.parametrize("task", SHOTS)
def test_the_readers_of_iglue_read_every_file_and_languages_are_parallel(task, folder, meanings):
    """The records of all languages have the same meanings. Splits share no image."""
    images = {}
    splits = [("dev", 0), ("test", 0)] + [("few-shot", number) for number in SHOTS[task]]
    for split, shots in splits:
        told = []
        for language in data.LANGUAGES[task][1 if shots else 0 :]:
            told.append([(one.id, one.image, one.label, one.answers, meanings[language][one.text])
                         for one in records_of(folder, task, split, language, shots)])
        assert all(records == told[0] for records in told)
        images[shots or split] = {record[1] for record in told[0]}
    few, more, most = (images[shots] for shots in SHOTS[task])
    assert (len(few), len(more), len(most)) == SHOTS[task] and few < more < most
    train = {one.image for one in records_of(folder, task, "train")}
    apart = [train, images["dev"], images["test"], most]
    assert sum(map(len, apart)) == len(set().union(*apart))
    if task == "xflickrco":
        similar = data.read_hard_negatives(str(folder), sorted(train))
        assert len(similar) == 3000 and {len(others) for others in similar.values()} == {20}


# ---- A world on disk -----------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(world.write_world, "__defaults__", (world.WORLD_SEED, FEW))


def test_a_world_is_written_once_and_anew_for_another_version(few, tmp_path, capsys):
    path = tmp_path / "deep/world"
    world.write_world(path)
    assert capsys.readouterr() == (f"{path}: writing the miniature's world\n", "")
    labels = path / "gqa/annotations/trainval_ans2label.json"
    written = labels.stat().st_mtime_ns
    world.write_world(path)
    assert labels.stat().st_mtime_ns == written and capsys.readouterr().out == ""
    (path / "made_by.txt").write_bytes(b"\xff\xfe")
    world.write_world(path)
    assert labels.stat().st_mtime_ns > written
    assert [one.name for one in path.parent.iterdir()] == ["world"]


def test_other_folders_are_left_alone(few, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    for path, message in (("mine", "mine: not a world of the miniature"),
                          ("mine/thesis.txt/world", "world: cannot write the miniature's world")):
        with pytest.raises(data.InputError, match=message):
            world.write_world(tmp_path / path)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


@pytest.mark.parametrize("before", ["nothing", "another version"])
def test_several_first_starts_at_once(before, few, tmp_path):
    path = tmp_path / "world"
    if before == "another version":
        path.mkdir()
        (path / "made_by.txt").touch()
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=world.write_world, args=[path]) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [one.name for one in tmp_path.iterdir()] == ["world"]
    world.write_world(tmp_path / "alone")
    assert contents(path) == contents(tmp_path / "alone")


def test_a_read_only_checkout_finds_a_place_and_says_so(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(world, "WORLD", "checkout/mini_data")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    place = world.prepare("uc2")[0]
    assert place == f"{tmp_path}/.cache/suf-miniature" and data.is_miniature(place)
    said = f"checkout/mini_data: cannot be written; the miniature's world is in {place}\n"
    assert capsys.readouterr().out.startswith(said)


# ---- Pre-training --------------------------------------------------------------------------------

@pytest.mark.parametrize("model", ["cclm", "uc2"])
def test_shipped_checkpoints_load_and_have_their_recipe(model):
    path = SHIPPED / f"{model}.pt"
    tensors, config = read_checkpoint(str(path))
    assert path.stat().st_size <= 1_000_000
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert config["tokenizer_sha256"] == data.Tokenizer(str(SHIPPED / "tokenizer.model")).sha256
    assert config["recipe"] == dict.fromkeys(data.LANGUAGES, pretrain.RECIPES[model])
    load = {"cclm": cclm, "uc2": uc2}[model].from_pretrained
    for task in data.LANGUAGES:
        assert load(tensors, config, task, str(path), image_size=32, num_labels=15).task == task


@pytest.fixture
def little(monkeypatch):
    few = {"SCENES": 200, "SENTENCES": 400, "PHRASE_STEPS": 3, "VISION_STEPS": 2, "CORPUS": 4000}
    for name, value in few.items():
        monkeypatch.setattr(pretrain, name, value)


@pytest.mark.parametrize("model, losses, size", [
    ("cclm", [9.3793, 9.5983, 19.8617, 16.2218], 509.3193),
    ("uc2", [6.4790, 6.4358, 9.8335, 9.7765], 270.4424)])
def test_losses_at_the_start_and_weights_after_six_steps(model, losses, size, little):
    """Steps about phrases alone, about phrases and pairs, about sentences and pairs."""
    tokenizer = data.Tokenizer(str(SHIPPED / "tokenizer.model"))
    torch.manual_seed(0)
    network = pretrain.new_model(model, tokenizer.vocabulary)
    corpus, rng = pretrain.make_corpus(model, tokenizer, 0), np.random.default_rng(0)
    for step, expected in zip((0, 1, 1200, 1201), losses, strict=True):
        loss, _ = pretrain.pretraining_loss(network, corpus, tokenizer, rng, step, "cpu")
        assert loss.item() == pytest.approx(expected, rel=1e-4)
    trained = pretrain.pretrain(model, tokenizer, 0, 6, "cpu")
    norms = [parameter.norm().item() for parameter in trained.parameters()]
    assert sum(norms) == pytest.approx(size, rel=1e-5)


def test_building_twice_gives_the_same_bytes(little, tmp_path, capsys):
    pretrain.main(["--steps", "6", "--out", f"{tmp_path}/one"])
    pretrain.main(["--model", "uc2", "--steps", "6", "--out", f"{tmp_path}/two"])
    assert f"--checkpoint {tmp_path}/two/uc2.pt" in capsys.readouterr().out
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert two.keys() == {"tokenizer.model", "uc2.pt"} and two.items() <= one.items()


@pytest.mark.parametrize("flags, expected", [
    ([], "--out"), (["--out", "new", "--steps", "-1"], "negative"), (["--out", "file/new"], "written")])
def test_bad_flags_get_one_line(flags, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(data.InputError, match=expected):
        pretrain.main(flags)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
