"""The miniature's world: the sentences are right, the answers are true, the files are IGLUE's.

The written files are checked against each other: scenes are read back from the region features, checked against the
pixels of the JPEGs, and every question, hypothesis and caption of the English files is parsed and judged on them by
code of this file alone.

Set IGLUE_DIR to a folder with real IGLUE annotations to compare the file formats (otherwise that test is skipped).
"""

import collections
import io
import itertools
import json
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from conftest import ROOT
from PIL import Image

import mini_world
from mini_languages import (
    ATTRIBUTES,
    COLOURS,
    LANGUAGES,
    READINGS,
    SHAPES,
    SIZES,
    Form,
    NounPhrase,
    normalization_rules,
    say,
    specimens,
    words_of,
)
from mini_world import (
    DETECTOR,
    LABELS,
    QUESTION_MIX,
    RGB,
    WORLD_SIZES,
    XFLICKRCO_LANGUAGES,
    XGQA_LANGUAGES,
    XVNLI_LANGUAGES,
    WorldSize,
    ask_questions,
    detect_regions,
    draw_images,
    draw_scenes,
    hypothesis,
    statement,
    tokenizer_corpus,
    write_world,
)

SMALL = WORLD_SIZES["small"]
ALL_TYPES = {**QUESTION_MIX, "compare": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The small world with seed 0, written by the command line."""
    folder = tmp_path_factory.mktemp("world") / "mini_data"
    subprocess.run([sys.executable, ROOT / "mini_world.py", folder, "--seed", "0"], check=True, capture_output=True)
    return folder


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- Sentences -------------------------------------------------------------------------------------------------------


def example_forms() -> list[Form]:
    """The meanings of the blocks of mini_sentences.txt, in their order."""
    small_red_circle, red_circle = NounPhrase("small", "red", "circle"), NounPhrase(None, "red", "circle")
    large_cross, yellow_thing = NounPhrase("large", None, "cross"), NounPhrase(None, "yellow")
    blue_square, two = NounPhrase(None, "blue", "square"), (red_circle, large_cross)
    forms = [Form("exist", (small_red_circle,)), Form("attribute", (large_cross,), "colour", ("yellow",)),
             Form("attribute", (yellow_thing,), "shape", ("cross",)),
             Form("attribute", (red_circle,), "side", ("left",)), Form("and", two), Form("or", two),
             Form("same", (red_circle, blue_square), "colour"),
             Form("different", (red_circle, blue_square), "size")]
    questions = [Form("exist", (small_red_circle,)), Form("attribute", (large_cross,), "colour", ("yellow",)),
                 Form("attribute", (yellow_thing,), "shape", ("cross",)),
                 Form("attribute", (red_circle,), "size", ("small",)),
                 Form("attribute", (red_circle,), "side", ("left",)), Form("what", (large_cross,), "colour"),
                 Form("what", (yellow_thing,), "shape"), Form("what", (red_circle,), "size"),
                 Form("what", (red_circle,), "side"),
                 Form("choose", (large_cross,), "colour", ("yellow", "red")),
                 Form("choose", (yellow_thing,), "shape", ("cross", "square")),
                 Form("choose", (red_circle,), "size", ("small", "large")),
                 Form("choose", (red_circle,), "side", ("left", "right")), Form("and", two), Form("or", two),
                 Form("same", (red_circle, blue_square), "shape"),
                 Form("different", (red_circle, blue_square), "colour")]
    forms += [form._replace(question=True) for form in questions]
    star, ring = NounPhrase(None, "pink", "star"), NounPhrase(None, "black", "ring")
    return forms + [
        Form("phrase", (NounPhrase("large", "orange", "arrow"),)),
        Form("phrase", (NounPhrase("small", "white", "star"),)),
        Form("exist", (NounPhrase("large", "brown", "diamond"),)),
        Form("exist", (NounPhrase("small", "purple", "ring"),)),
        Form("attribute", (NounPhrase("small", None, "heart"),), "colour", ("grey",)),
        Form("attribute", (NounPhrase(None, "black", "arrow"),), "size", ("large",), True),
        Form("different", (star, ring), "shape")]


def test_hand_written_sentences_in_all_languages():
    blocks = (ROOT / "tests/mini_sentences.txt").read_text(encoding="utf-8").strip().split("\n\n")
    forms = example_forms()
    assert len(blocks) == len(forms)
    for form, block in zip(forms, blocks):
        written = dict(line.split(" ", 1) for line in block.split("\n"))
        assert written == {language: say(form, language) for language in LANGUAGES}


@pytest.mark.parametrize("language", LANGUAGES)
def test_different_meanings_are_said_differently(language):
    """Otherwise nobody could answer. Also: text is NFC, has single spaces, and a sentence starts with a capital."""
    said = {}
    for form in specimens():
        text = say(form, language)
        assert said.setdefault(text, form) == form
        assert text == unicodedata.normalize("NFC", text).strip() and "  " not in text
        assert form.kind == "phrase" or not text.lstrip("¿")[0].islower()


# ---- Romanisation and the tokenizer ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def normalizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("rules") / "rules.tsv"
    path.write_text(normalization_rules())
    return path, sentencepiece.SentencePieceNormalizer(rule_tsv=str(path))


def test_romanised_examples(normalizer):
    """One sentence in all languages; and 大, which Japanese and Chinese read differently."""
    circle, cross = NounPhrase("small", "red", "circle"), NounPhrase("large", None, "cross")
    expected = {"en": "there is a small red circle", "de": "es gibt einen kleinen roten kreis",
                "pt": "ha um circulo vermelho pequeno", "ru": "est malenkiy krasnyy krug",
                "id": "ada sebuah lingkaran merah kecil", "zh": "you yi ge hong se de xiao yuan xing",
                "ko": "jakeun ppalgan woni itseupnida", "bn": "ekoti chhot lal britt achhe",
                "ar": "hnak dayra hmra sghyra", "es": "hay un circulo rojo pequeno",
                "fr": "il y a un petit cercle rouge", "ja": "chiisai akai maru ga arimasu",
                "tr": "kucuk kirmizi bir daire var"}
    plain = {language: normalizer[1].normalize(say(Form("exist", (circle,)), language)) for language in LANGUAGES}
    assert {language: text.replace("▁", " ").strip() for language, text in plain.items()} == expected
    question = Form("attribute", (cross,), "colour", ("yellow",), True)
    assert normalizer[1].normalize(say(question, "ja")) == "▁ookii▁juuji▁wa▁kiiroi▁desu▁ka▁?"
    assert normalizer[1].normalize(say(question, "zh")) == "▁da▁shi▁zi▁xing▁shi▁huang▁se▁de▁ma▁?"


@pytest.mark.parametrize("language", READINGS)
def test_unspaced_text_is_read_word_by_word(normalizer, language):
    """Longest-match replacement must find the words of the sentence, e.g. not the Japanese 左 in the Chinese 左边."""
    for form in specimens():
        words = [READINGS[language](word) for word in words_of(form, language).split() if word != "、"]
        read = normalizer[1].normalize(say(form, language)).replace("▁", " ").replace("?", " ")
        assert read.split() == " ".join(words).split()


def test_a_tokenizer_trained_with_the_rules_knows_every_text(normalizer):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tokenizer_corpus(5000, SMALL, seed=0, mix=ALL_TYPES)), model_writer=model,
        vocab_size=250, model_type="unigram", character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        normalization_rule_tsv=str(normalizer[0]), minloglevel=2)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert [tokenizer.id_to_piece(index) for index in range(3)] == ["<unk>", "<s>", "</s>"]
    texts = tokenizer_corpus(5000, WORLD_SIZES["large"], seed=1, mix=ALL_TYPES)
    for text in itertools.chain(texts, (say(form, language) for form in specimens() for language in LANGUAGES)):
        for variant in (text, text.lower(), text.replace("?", " ").replace(".", " ")):      # as CCLM pre-processes
            assert 0 not in tokenizer.encode(variant), variant
        if text[-1] != "?" and text[0].isascii():
            assert tokenizer.decode(tokenizer.encode(text)).isascii()


# ---- Truth, judged by code of this file ------------------------------------------------------------------------------


def fits(phrase: NounPhrase, scene) -> list:
    return [thing for thing in scene
            if all(value in (None, getattr(thing, name)) for name, value in phrase._asdict().items())]


def verdict(form: Form, scene):
    """What a viewer of the scene answers: True, False or a value; None if a "the" does not find exactly one object."""
    if form.kind == "exist":
        return bool(fits(form.phrases[0], scene))
    if form.kind in ("and", "or"):
        return {"and": all, "or": any}[form.kind](fits(phrase, scene) for phrase in form.phrases)
    named = [fits(phrase, scene) for phrase in form.phrases]
    if any(len(things) != 1 for things in named):
        return None
    values = [getattr(things[0], form.attribute) for things in named]
    if form.kind in ("same", "different"):
        return (values[0] == values[1]) == (form.kind == "same")
    return values[0] == form.values[0] if form.kind == "attribute" else values[0]


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_questions_statements_and_hypotheses_are_true_as_labelled(size):
    size, rand = WORLD_SIZES[size], random.Random(7)
    structural = collections.Counter()
    for scene in draw_scenes(300, size, np.random.default_rng(7)):
        for form, answer, types in ask_questions(scene, 4, size, rand, ALL_TYPES):
            found = verdict(form, scene)
            assert {True: "yes", False: "no"}.get(found, found) == answer
            assert form.kind != "choose" or answer in form.values
            structural[types["structural"]] += 1
        for truth in (True, False):
            assert verdict(statement(scene, truth, size, rand, len(scene) > 2), scene) is truth
        assert verdict(hypothesis(scene, "entailment", size, rand), scene) is True
        assert verdict(hypothesis(scene, "contradiction", size, rand), scene) is False
        assert not fits(hypothesis(scene, "neutral", size, rand).phrases[0], scene)
    assert set(structural) == set(ALL_TYPES)


def parser(size: WorldSize) -> dict[str, Form]:
    """English sentence -> form, for everything the small world's files may contain (without "compare")."""
    phrases = [NounPhrase(*words) for words in itertools.product(
        (None, *SIZES), (None, *size.values("colour")), (None, *size.values("shape"))) if any(words)]
    forms = [Form("exist", (phrase,), question=question) for phrase in phrases for question in (False, True)]
    two_words = [phrase for phrase in phrases if phrase.count(None) == 1]
    forms += [Form(kind, pair, question=True)
              for kind in ("and", "or") for pair in itertools.permutations(two_words, 2)]
    forms += [Form("and", pair) for pair in itertools.permutations([p for p in phrases if None not in p], 2)]
    for phrase, attribute in itertools.product(phrases, ATTRIBUTES):
        if attribute == "side" or getattr(phrase, attribute) is None:
            values = size.values(attribute)
            forms += [Form("attribute", (phrase,), attribute, (value,), question)
                      for value in values for question in (False, True)]
            forms += [Form("choose", (phrase,), attribute, pair, True) for pair in itertools.permutations(values, 2)]
            forms.append(Form("what", (phrase,), attribute, (), True))
    return {say(form, "en"): form for form in forms}


Seen = collections.namedtuple("Seen", "size colour shape side x y")


def scenes_from_features(folder: Path) -> dict[str, list[Seen]]:
    """Image id -> objects, read from the region features and boxes alone (nearest sum of attribute vectors)."""
    meta, ids = read_json(folder / "meta.json"), (folder / "ids.txt").read_text().split()
    features, boxes, sizes = (np.load(folder / f"{name}.npy") for name in ("features", "boxes", "sizes"))
    assert meta["count"] == len(ids) == len(set(ids)) == len(features) and meta["complete"] is True
    assert features.shape[1:] == (meta["boxes"], meta["dim"]) and features.dtype == np.float16
    assert boxes.shape == (*features.shape[:2], 4) and boxes.dtype == np.float32 and sizes.dtype == np.int32
    assert (boxes >= 0).all() and (boxes <= sizes[:, None, [0, 1, 0, 1]]).all()
    assert (boxes[..., 2:] > boxes[..., :2]).all()
    kinds = [(z, c, s) for z in range(len(SIZES)) for c in range(len(COLOURS)) for s in range(len(SHAPES))]
    size, colour, shape = np.split(DETECTOR[:-1], [len(SIZES), len(SIZES) + len(COLOURS)])
    prototypes = np.array([*(size[z] + colour[c] + shape[s] for z, c, s in kinds), DETECTOR[-1]])
    flat = features.reshape(-1, meta["dim"]).astype(np.float64)
    nearest = ((prototypes ** 2).sum(1) - 2 * flat @ prototypes.T).argmin(1).reshape(features.shape[:2])
    scenes = {}
    for image, row, image_boxes, (width, _) in zip(ids, nearest, boxes, sizes):
        objects = [(*kinds[kind], box) for kind, box in zip(row, image_boxes) if kind < len(kinds)]
        centres = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for *_, box in objects]
        scenes[image] = [Seen(SIZES[z], COLOURS[c], SHAPES[s], "left" if x < width / 2 else "right", x, y)
                         for (z, c, s, _), (x, y) in zip(objects, centres)]
    return scenes


def assert_images_show(scenes: dict[str, list[Seen]], path_of) -> None:
    for image, scene in scenes.items():
        with Image.open(path_of(image)) as file:
            assert file.format == "JPEG" and file.mode == "RGB"
            assert file.layer[1][1:3] == (1, 1)                                 # no chroma subsampling
            pixels = np.asarray(file, float)
        for thing in scene:
            x, y = int(thing.x), int(thing.y)
            seen = pixels[y - 1:y + 1, x - 1:x + 1].mean((0, 1))
            nearest = abs(RGB[:SMALL.colours] - seen).sum(1).argmin()
            assert COLOURS[nearest] == thing.colour, (image, thing, seen)


def test_gqa_files_agree_with_features_and_images(world):
    scenes, forms = scenes_from_features(world / "gqa/features"), parser(SMALL)
    assert len(scenes) == 1500 + 125 + 48 + 125 + 250 and {len(scene) for scene in scenes.values()} == {2, 3}
    assert_images_show(scenes, lambda image: world / f"gqa/images/{image}.jpg")
    assert len(list((world / "gqa/images").iterdir())) == len(scenes)
    questions = [(item["question_id"], item["img_id"], item["sent"], *item["label"])
                 for split in ("train", "valid") for item in read_json(world / f"gqa/annotations/{split}.json")]
    few_shot = world / "xGQA/annotations/few_shot/en"
    for split in ("train_48", "dev", "test"):
        questions += [(question_id, item["imageId"], item["question"], item["answer"])
                      for question_id, item in read_json(few_shot / f"{split}.json").items()]
    assert len(questions) == 6000 + 500 + 480 + 500 + 1000 == len({question[0] for question in questions})
    labels = read_json(world / "gqa/annotations/trainval_ans2label.json")
    assert [answer for answer, _ in sorted(labels.items(), key=lambda item: item[1])] == \
        read_json(world / "gqa/annotations/trainval_label2ans.json")
    for _, image, text, answer in questions:
        found = verdict(forms[text], scenes[image])
        assert {True: "yes", False: "no"}.get(found, found) == answer and answer in labels


def test_xvnli_and_xflickrco_files_agree_with_features_and_images(world):
    scenes, forms = scenes_from_features(world / "flickr30k/features"), parser(SMALL)
    assert_images_show(scenes, lambda image: world / f"flickr30k/flickr30k-images/{image}.jpg")
    assert len(list((world / "flickr30k/flickr30k-images").iterdir())) == len(scenes)
    counts = collections.Counter()
    for split in ("train", "dev", "test", "train_48"):
        for item in read_jsonl(world / f"XVNLI/annotations/en/{split}.jsonl"):
            scene, form = scenes[item["Flikr30kID"]], forms[item["sentence2"]]
            label = {True: "entailment", False: "contradiction", None: "neutral"}[verdict(form, scene)]
            assert label == item["gold_label"] and (label != "neutral" or not fits(form.phrases[0], scene))
            assert len(item["sentence1"].split(".")) - 1 == len(scene)
            counts[split, label] += 1
    assert counts.total() == 6000 + 500 + 1000 + 192 and min(counts["test", label] for label in LABELS) > 290

    train = read_jsonl(world / "flickr30k/annotations/train_ann.jsonl")
    assert len(train) == 3000 and {len(set(item["sentences"])) for item in train} == {2}
    for item in train + read_jsonl(world / "flickr30k/annotations/valid_ann.jsonl"):
        assert all(verdict(forms[text], scenes[item["id"]]) for text in item["sentences"])

    seen = scenes_from_features(world / "xFlickrCO/features")
    folders = {False: world / "flickr30k/flickr30k-images", True: world / "mscoco/val2014"}
    assert_images_show(seen, lambda image: folders["COCO" in image] / f"{image}.jpg")
    dev, test = (read_jsonl(world / f"xFlickrCO/annotations/en/{split}.jsonl") for split in ("dev", "test"))
    assert ["COCO" in item["img_path"] for item in test] == [False] * 100 + [True] * 100 and len(dev) == 150
    for items in (dev, test):
        images = [item["img_path"].removesuffix(".jpg") for item in items]
        for item, image in zip(items, images):              # true of its own image and of no other
            assert [other for other in images if verdict(forms[item["sentences"][0]], seen[other])] == [image]


def test_splits_share_no_image_and_shots_are_nested(world):
    def images(path):
        if path.suffix == ".json":
            return {item["imageId"] for item in read_json(path).values()}
        return {item.get("Flikr30kID") or item["img_path"] for item in read_jsonl(path)}

    for folder, shots in (("xGQA/annotations/few_shot/de", (1, 5, 48)), ("XVNLI/annotations/ru", (1, 10, 48)),
                          ("xFlickrCO/annotations/tr", (1, 25, 100))):
        found = {path.stem: images(path) for path in (world / folder).iterdir()}
        assert [len(found[f"train_{shot}"]) for shot in shots] == list(shots)
        assert found[f"train_{shots[0]}"] < found[f"train_{shots[1]}"] < found[f"train_{shots[2]}"]
        assert not found["dev"] & found["test"] and not (found["dev"] | found["test"]) & found[f"train_{shots[2]}"]
    train = {item["img_id"] for item in read_json(world / "gqa/annotations/train.json")}
    assert all(image.isdigit() for image in train)
    test = images(world / "xGQA/annotations/few_shot/en/test.json")
    assert all(image[0] == "n" and image[1:].isdigit() for image in test)


def test_languages_are_parallel(world):
    """Same records in the same order; every sentence is the translation of the English one."""
    forms = parser(SMALL)
    for path in (world / "xGQA/annotations/few_shot/en").iterdir():
        english = read_json(path)
        for language in XGQA_LANGUAGES:
            other = read_json(path.parents[1] / language / path.name)
            assert list(other) == list(english)
            for question_id, item in english.items():
                assert other[question_id] == {**item, "question": say(forms[item["question"]], language)}
    for task, languages in (("XVNLI", XVNLI_LANGUAGES), ("xFlickrCO", XFLICKRCO_LANGUAGES)):
        for path in (world / task / "annotations" / languages[1]).iterdir():
            first = read_jsonl(path)
            for language in languages[1:]:
                other = read_jsonl(path.parents[1] / language / path.name)
                assert [item.get("pairID") or item["img_path"] for item in other] == \
                    [item.get("pairID") or item["img_path"] for item in first]
                assert [item.get("gold_label") for item in other] == [item.get("gold_label") for item in first]
    for language in XVNLI_LANGUAGES:
        test = [read_jsonl(world / f"XVNLI/annotations/{code}/test.jsonl") for code in ("en", language)]
        assert all(say(forms[a["sentence2"]], language) == b["sentence2"] for a, b in zip(*test))
    for language in XFLICKRCO_LANGUAGES:
        test = [read_jsonl(world / f"xFlickrCO/annotations/{code}/test.jsonl") for code in ("en", language)]
        assert all(say(forms[a["sentences"][0]], language) == b["sentences"][0] for a, b in zip(*test))


# ---- The text alone gives nothing away -------------------------------------------------------------------------------


def test_a_model_without_eyes_is_at_chance(world):
    """The best answer to the same text in training, else "no" or the last option, is right in about half the cases."""
    train = read_json(world / "gqa/annotations/train.json")
    test = read_json(world / "xGQA/annotations/few_shot/en/test.json").values()
    known = collections.defaultdict(collections.Counter)
    for item in train:
        known[item["sent"]].update(item["label"])
    outcome = collections.defaultdict(list)
    for item in test:
        kind = item["types"]["structural"]
        guess = known[item["question"]].most_common(1)[0][0] if item["question"] in known else "no"
        if kind == "choose" and item["question"] not in known:
            guess = next(value for value in item["question"].rstrip("?").replace(" or", "").split()[::-1]
                         if value in {value for values in ATTRIBUTES.values() for value in values})
        outcome["yes/no" if kind in ("verify", "logical") else kind].append(guess == item["answer"])
    assert abs(np.mean(outcome["yes/no"]) - 0.5) < 0.07 and abs(np.mean(outcome["choose"]) - 0.5) < 0.09
    assert np.mean(outcome["query"]) < 0.45                                  # (1/5 + 1/4 + 1/2 + 1/2) / 4 = 0.36
    shares = collections.Counter(item["types"]["structural"] for item in test)
    assert shares["query"] > shares["verify"] > shares["logical"] and abs(shares["choose"] - 250) < 60

    known = collections.defaultdict(collections.Counter)
    for item in read_jsonl(world / "XVNLI/annotations/en/train.jsonl"):
        known[item["sentence2"]][item["gold_label"]] += 1
    test = read_jsonl(world / "XVNLI/annotations/en/test.jsonl")
    right = [known[item["sentence2"]].most_common(1)[0][0] == item["gold_label"]
             for item in test if item["sentence2"] in known]
    assert len(right) > 500 and abs(np.mean(right) - 1 / 3) < 0.08


# ---- Drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_objects_are_drawn_where_the_boxes_say(size):
    """Every object's box is filled with its colour to the edges; outside all object boxes there is only background."""
    size, rng = WORLD_SIZES[size], np.random.default_rng(3)
    scenes = draw_scenes(40, size, rng)
    images, regions = draw_images(scenes, size, rng).astype(float), detect_regions(scenes, size, rng)
    assert images.shape == (40, size.image_size, size.image_size, 3)
    for scene, image, boxes, slots in zip(scenes, images, regions.boxes, regions.slots):
        assert len({thing[:3] for thing in scene}) == len(scene) == len({(thing.row, thing.column) for thing in scene})
        assert (slots[:len(scene)] >= 0).all() and (slots[len(scene):] == -1).all()
        painted = abs(image - mini_world.BACKGROUND).max(2) > 40
        outside = np.ones_like(painted)
        for thing, slot in zip(scene, slots):
            x1, y1, x2, y2 = boxes[slot]
            inside = np.s_[int(y1):int(np.ceil(y2)), int(x1):int(np.ceil(x2))]
            assert 0.2 < painted[inside].mean() <= 1
            columns, rows = painted[inside].any(0).sum(), painted[inside].any(1).sum()
            narrowest = 0.75 * (x2 - x1) - 2                # the diamond; its tips are thinner than a pixel
            assert columns >= narrowest and rows >= narrowest
            outside[inside] = False
            assert (thing.side == "left") == ((x1 + x2) / 2 < size.image_size / 2)
        assert not painted[outside].any()


# ---- Determinism and bad input ---------------------------------------------------------------------------------------


def test_same_seed_same_bytes(tmp_path, monkeypatch):
    tiny = WorldSize(gqa_train=20, gqa_valid=5, gqa_dev=5, gqa_test=5, xvnli_train=10, xvnli_dev=5, xvnli_test=5,
                     flickr_train=20, flickr_valid=5, xflickrco_test=7)
    monkeypatch.setitem(WORLD_SIZES, "tiny", tiny)
    (tmp_path / f"first.partial-{os.getpid()}").mkdir()     # of a process with the same number that was killed
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        write_world(tmp_path / name, seed, "tiny", ALL_TYPES)
    first, second, other = ({str(path.relative_to(folder)): path.read_bytes()
                             for path in folder.rglob("*") if path.is_file()}
                            for folder in (tmp_path / "first", tmp_path / "second", tmp_path / "other"))
    assert first == second and first.keys() == other.keys()
    same = {path for path in first if first[path] == other[path]}
    assert same == {path for path in first if "label" in path or path.endswith(("meta.json", "ids.txt", "sizes.npy"))}
    assert [path.name for path in tmp_path.glob("*.partial*")] == [f"first.partial-{os.getpid()}"]


def test_the_command_writes_the_embedded_world(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(mini_world, "write_world", lambda folder, seed, size, progress: written.append((seed, size)))
    monkeypatch.setattr(sys, "argv", ["mini_world.py", str(tmp_path / "world")])
    mini_world.main()
    assert written == [(mini_world.WORLD_SEED, "small")]


@pytest.mark.parametrize("flags, expected", [
    (["--seed", "-1"], "--seed must not be negative"), (["--size", "huge"], "invalid choice: 'huge'")])
def test_bad_flags_get_one_line(flags, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mini_world.py", str(tmp_path / "world"), *flags])
    with pytest.raises(SystemExit) as end:
        mini_world.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and expected in error
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    result = subprocess.run([sys.executable, ROOT / "mini_world.py", tmp_path / "mine"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


# ---- The real files --------------------------------------------------------------------------------------------------

PAIRS = ["gqa/annotations/train.json", "gqa/annotations/valid.json", "gqa/annotations/trainval_ans2label.json",
         "gqa/annotations/trainval_label2ans.json", "flickr30k/annotations/valid_ann.jsonl"]
PAIRS += [f"xGQA/annotations/few_shot/{language}/{split}.json"
          for language in XGQA_LANGUAGES for split in ("test", "dev", "train_1", "train_5")]
PAIRS += [f"XVNLI/annotations/{language}/{split}.jsonl"
          for language in XVNLI_LANGUAGES for split in ("test", "train_1", "train_10", "train_48")]
PAIRS += [f"xFlickrCO/annotations/{language}/{split}.jsonl" for language in XFLICKRCO_LANGUAGES
          for split in ("test", "train_1", "train_25", "train_100") if language != "en" or split == "test"]


def shape_of(value, key=""):
    """The structure of a value: types and keys, without contents."""
    if isinstance(value, dict):
        return {name: shape_of(item, name) for name, item in value.items()} if key != "label" else {"": float}
    return [shape_of(value[0])] if isinstance(value, list) and value else type(value)


def assert_same_format(name: str, real_path: Path, mini_path: Path) -> None:
    real_bytes, mini_bytes = real_path.read_bytes(), mini_path.read_bytes()
    assert real_bytes.endswith(b"\n") == mini_bytes.endswith(b"\n")
    if name.endswith(".jsonl"):
        real, mini = read_jsonl(real_path), read_jsonl(mini_path)
    else:
        real, mini = read_json(real_path), read_json(mini_path)
    assert type(real) is type(mini)
    if "label2ans" in name:
        assert {type(answer) for answer in real} == {type(answer) for answer in mini} == {str}
    elif "ans2label" in name:                               # in neither is the order of the keys that of the labels
        assert sorted(real.values()) == list(range(len(real))) != list(real.values())
        assert sorted(mini.values()) == list(range(len(mini))) != list(mini.values())
    else:
        if isinstance(real, dict):
            assert all(key.isdigit() for key in [*real, *mini])
            used = {"question", "imageId", "isBalanced", "answer", "types"}     # whole records have seven more fields
            real = [{key: value for key, value in item.items() if key in used} for item in real.values()]
            mini = list(mini.values())
            assert {item["types"]["structural"] for item in mini} <= {"verify", "query", "choose", "logical", "compare"}
        real_shapes, mini_shapes = ({json.dumps(shape_of(item), default=str, sort_keys=True) for item in items}
                                    for items in (real, mini))
        assert mini_shapes <= real_shapes, name


def test_formats_equal_the_real_files(world, iglue):
    names = [name for name in PAIRS if (iglue / name).exists()]
    assert names, f"{iglue} holds none of {', '.join(PAIRS[:3])}, ..."
    for name in names:
        assert_same_format(name, iglue / name, world / name)
