"""The miniature's world: coloured shapes, and IGLUE's own files about them.

`train.py` calls `prepare` where no data is given, and nobody needs to start anything by hand. It
writes the world to mini_data/ once: 5,921 images, in seconds.

Scenes of two or three coloured shapes are drawn as JPEG images of 32 x 32 pixels, described as an
object detector would (region features), and asked, stated and captioned in up to thirteen languages
(languages.py). The files are laid out exactly as IGLUE (Bugliarello et al., 2022) lays out
GQA/xGQA, XVNLI, Flickr30k and xFlickrCO, so the readers of the real benchmark read the miniature.

One rule stands behind all texts. A yes/no question is only asked of a scene that could be asked the
opposite with a minimal change of words, and a coin decides which of them is written; the same holds
for the three labels of XVNLI. So whoever sees the text alone finds all answers equally likely:
linear models of words and pairs of words reach 54 % on yes/no questions, 51 % on either-or
questions, and 35 % on XVNLI.

Everything is a function of the seed: the same seed gives the same bytes. Two random generators go
through all functions: `rng` (numpy) draws scenes and pixels, `rand` (Python) chooses words.

Letters in shapes: N images, R regions per image, K objects per scene at most, F width of a feature.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import random
import tempfile
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from data import LANGUAGES, InputError
from miniature.languages import ATTRIBUTES, COLOURS, SHAPES, SIDES, SIZES, Form, NounPhrase, say

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHIPPED = os.path.join(ROOT, "miniature")  # tokenizer.model, cclm.pt, uc2.pt
WORLD = os.path.join(ROOT, "mini_data")  # written on first use

# Every choice about the world was made on the one of seed 0. This one was drawn after the last
# choice, and all published numbers are from it.
WORLD_SEED = 1

# Images of every split. XVNLI's training images are the first of Flickr30k's, as in reality. Half
# of xFlickrCO's test images are named as COCO's
IMAGES = {
    "gqa_train": 1500, "gqa_valid": 125, "gqa_shots": 48, "gqa_dev": 125, "gqa_test": 250,
    "xvnli_train": 1500, "xvnli_dev": 125, "xvnli_test": 250, "xvnli_shots": 48,
    "flickr_train": 3000, "flickr_valid": 150, "xflickrco_shots": 100, "xflickrco_test": 200,
}
# Few-shot sets, in images. The images of a smaller set are among those of a larger one
XGQA_SHOTS, XVNLI_SHOTS, XFLICKRCO_SHOTS = (1, 5, 48), (1, 10, 48), (1, 25, 100)
QUESTIONS_PER_IMAGE = 4
SHOT_QUESTIONS = 10  # per image of xGQA's few-shot sets (the real ones: 31)
STATEMENTS_PER_IMAGE = 4
CAPTIONS_PER_IMAGE = 2

# ----------------------------------------------------------------------------------------------
# Scenes

IMAGE_SIZE = 32  # pixels, square
GRID = 2  # cells per side: every cell lies left or right
CELL = IMAGE_SIZE // GRID  # pixels
JITTER = 1  # how far an object may be off the centre of its cell, in pixels
FEWEST, MOST = 2, 3  # objects


class Thing(NamedTuple):
    """One object: its attributes, its cell, and its distance from the cell's centre in pixels."""

    size: str
    colour: str
    shape: str
    side: str
    row: int
    column: int
    dx: int
    dy: int


def draw_scenes(count, rng):
    """-> list of scenes. A scene is a list of Things, of different kinds and in different cells."""
    kinds = list(itertools.product(SIZES, COLOURS, SHAPES))
    numbers = rng.integers(FEWEST, MOST + 1, count).tolist()
    chosen = rng.random((count, len(kinds))).argsort(1)[:, :MOST].tolist()
    cells = rng.random((count, GRID**2)).argsort(1)[:, :MOST].tolist()
    offsets = rng.integers(-JITTER, JITTER + 1, (count, MOST, 2)).tolist()
    scenes = []
    for i in range(count):
        scene = []
        for k in range(numbers[i]):
            kind = kinds[chosen[i][k]]
            row, column = divmod(cells[i][k], GRID)
            scene.append(Thing(*kind, SIDES[column], row, column, *offsets[i][k]))
        scenes.append(scene)
    return scenes


# ----------------------------------------------------------------------------------------------
# Images

BACKGROUND, BACKGROUND_NOISE, COLOUR_NOISE = 90, 6, 10  # of 255; standard deviations per pixel
RGB = {
    "red": (215, 40, 40), "green": (40, 170, 60), "blue": (45, 80, 215), "yellow": (235, 215, 50),
    "white": (240, 240, 240),
}
EXTENT = {"small": 3.6 / 16, "large": 6.2 / 16}  # half the width of an object, in cells
AT_ONCE = 500  # images; the noise of a world depends on it


def inside(shape, u, v):
    """Is the point inside the shape? u to the right, v down, both from -1 to 1."""
    if shape == "circle":
        return u**2 + v**2 <= 1
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= 0.88
    if shape == "triangle":
        return abs(u) <= (v + 1) / 2
    return np.minimum(abs(u), abs(v)) <= 0.3  # cross


@cache
def sprite(shape, size, dx, dy):
    """The opacity of an object's pixels, from 0 to 1. -> [CELL,CELL,1] float32."""
    fine = 4  # 4 x 4 samples per pixel
    samples = (np.arange(CELL * fine) + 0.5) / fine - CELL / 2
    u = (samples - dx)[None, :] / (EXTENT[size] * CELL)
    v = (samples - dy)[:, None] / (EXTENT[size] * CELL)
    hit = inside(shape, u, v) & (abs(u) <= 1) & (abs(v) <= 1)  # [CELL*fine,CELL*fine]
    opacity = hit.reshape(CELL, fine, CELL, fine).mean((1, 3))  # [CELL,CELL]
    return opacity[..., None].astype(np.float32)


def draw_images(scenes, rng):
    """The scenes as RGB images on noisy grey. -> [N,H,W,3] uint8."""
    images = np.empty((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for start in range(0, len(scenes), AT_ONCE):
        chunk = scenes[start : start + AT_ONCE]
        noise = rng.standard_normal((len(chunk), *images.shape[1:]), np.float32)
        canvas = noise * BACKGROUND_NOISE + BACKGROUND
        things = [(n, thing) for n, scene in enumerate(chunk) for thing in scene]
        paint = rng.standard_normal((len(things), CELL, CELL, 3), np.float32) * COLOUR_NOISE
        for colour, (n, thing) in zip(paint, things):
            colour += np.array(RGB[thing.colour], np.float32)
            opacity = sprite(thing.shape, thing.size, thing.dx, thing.dy)
            top, left = thing.row * CELL, thing.column * CELL
            cell = canvas[n, top : top + CELL, left : left + CELL]
            cell += opacity * (colour - cell)
        images[start : start + AT_ONCE] = canvas.clip(0, 255)
    return images


# ----------------------------------------------------------------------------------------------
# Regions, as UC2's object detector would find them

FEATURE_WIDTH, FEATURE_NOISE = 64, 0.3
BOXES = GRID**2  # regions per image: one per cell, of an object or of background
# A random vector for every word and for the background. The table once had rows for 11 colours and
# 9 shapes; those in use keep their place, because the shipped checkpoints have learnt them
TABLE = np.random.default_rng(4242).normal(0, 0.6, (2 + 11 + 9 + 1, FEATURE_WIDTH))
VECTORS = dict(zip((*SIZES, *COLOURS), TABLE)) | dict(zip(SHAPES, TABLE[2 + 11 :]))
VECTORS["background"] = TABLE[-1]


class Regions(NamedTuple):
    features: np.ndarray  # [N,R,F] float16
    boxes: np.ndarray  # [N,R,4] float32: x1, y1, x2, y2 in pixels
    slots: np.ndarray  # [N,K] int64: which region is the scene's k-th object; -1 beyond its last


def detect_regions(scenes, rng):
    """One region per object, in random order, and one per empty cell. -> Regions.

    A feature is the sum of the vectors of size, colour and shape, or that of the background, and
    noise.
    """
    count = len(scenes)
    order = rng.random((count, BOXES)).argsort(1)
    features = rng.normal(0, FEATURE_NOISE, (count, BOXES, FEATURE_WIDTH))
    cell_order = rng.random((count, GRID**2)).argsort(1).tolist()
    half = rng.uniform(EXTENT["small"], EXTENT["large"], (count, BOXES, 2))  # of background boxes
    centre = rng.uniform(half, 1 - half)  # x, y in cells, at first within the cell
    slots = np.full((count, MOST), -1)
    for i, scene in enumerate(scenes):
        slots[i, : len(scene)] = order[i, : len(scene)]
        empty_cells = cell_order[i]
        for region, thing in zip(order[i], scene):
            vectors = VECTORS[thing.size] + VECTORS[thing.colour] + VECTORS[thing.shape]
            features[i, region] += vectors
            half[i, region] = EXTENT[thing.size]
            x = thing.column + 0.5 + thing.dx / CELL
            y = thing.row + 0.5 + thing.dy / CELL
            centre[i, region] = x, y
            empty_cells.remove(thing.row * GRID + thing.column)
        # in the order of the regions, each region without an object shows the next empty cell
        for region, cell in zip(sorted(order[i, len(scene) :]), empty_cells):
            features[i, region] += VECTORS["background"]
            row, column = divmod(cell, GRID)
            centre[i, region] += column, row
    boxes = np.concatenate((centre - half, centre + half), 2) * CELL  # [N,R,4]
    return Regions(features.astype(np.float16), boxes.astype(np.float32), slots)


# ----------------------------------------------------------------------------------------------
# What can be said about a scene

DESCRIPTIVE = ("size", "colour", "shape")  # what a noun phrase can mention
ONE = [("size",), ("colour",), ("shape",)]
TWO = [("size", "colour"), ("size", "shape"), ("colour", "shape")]


def describe(thing, attributes=DESCRIPTIVE):
    return NounPhrase(**{attribute: getattr(thing, attribute) for attribute in attributes})


def fits(phrase, thing):
    return (
        phrase.size in (None, thing.size)
        and phrase.colour in (None, thing.colour)
        and phrase.shape in (None, thing.shape)
    )


def matches(phrase, scene):
    """The objects of which the phrase is true."""
    return [thing for thing in scene if fits(phrase, thing)]


def another(value, attribute, rand):
    others = [other for other in ATTRIBUTES[attribute] if other != value]
    return rand.choice(others)


def with_other_words(phrase, attributes, rand):
    """The phrase with another word for each of the attributes."""
    for attribute in attributes:
        word = another(getattr(phrase, attribute), attribute, rand)
        phrase = phrase._replace(**{attribute: word})
    return phrase


def true_and_false(thing, attributes, scene, rand):
    """A phrase true of the object and one true of none, one word apart, or None if the word
    that was drawn makes the second one true of another object.
    """
    true = describe(thing, attributes)
    false = with_other_words(true, [rand.choice(attributes)], rand)
    if matches(false, scene):
        return None
    return true, false


def naming(thing, without, scene, rand):
    """A phrase of one or two words that only this object fits and that leaves out the attribute
    `without`, or None if the words that were drawn fit others too.
    """
    allowed = [attributes for attributes in ONE + TWO if without not in attributes]
    phrase = describe(thing, rand.choice(allowed))
    if len(matches(phrase, scene)) > 1:
        return None
    return phrase


def minimal_pair(kind, scene, rand):
    """(a true, a false) statement that differ as little as possible, or None if this attempt
    does not suit the scene. Kinds: "exist", "attribute", "and", "or", as in languages.Form.
    """
    if kind == "exist":
        thing, attributes = rand.choice(scene), rand.choice(ONE + TWO + [DESCRIPTIVE])
        phrases = true_and_false(thing, attributes, scene, rand)
        if phrases is None:
            return None
        true, false = phrases
        return Form("exist", (true,)), Form("exist", (false,))

    if kind == "attribute":
        thing, attribute = rand.choice(scene), rand.choice(list(ATTRIBUTES))
        phrase = naming(thing, attribute, scene, rand)
        if phrase is None:
            return None
        value = getattr(thing, attribute)
        true = Form("attribute", (phrase,), attribute, (value,))
        return true, true._replace(values=(another(value, attribute, rand),))

    # "and" and "or": each of two objects has a phrase that is true and one that is false
    first, second = rand.sample(scene, 2)
    a = true_and_false(first, rand.choice(TWO), scene, rand)
    b = true_and_false(second, rand.choice(TWO), scene, rand)
    if a is None or b is None or set(a) & set(b):
        return None
    (true_a, false_a), (true_b, false_b) = a, b
    both, neither = (true_a, true_b), (false_a, false_b)
    only_a, only_b = (true_a, false_b), (false_a, true_b)
    if kind == "and":
        return Form("and", both), Form("and", rand.choice((only_a, only_b, neither)))
    return Form("or", rand.choice((both, only_a, only_b))), Form("or", neither)


def statement(scene, truth, rand):
    """A statement about the scene, true or false as asked."""
    kinds = ("exist", "exist", "attribute", "attribute", "attribute", "and", "or")
    pair = None
    while pair is None:
        pair = minimal_pair(rand.choice(kinds), scene, rand)
    true, false = pair
    return true if truth else false


def captions(scene, count, rand):
    """Different captions like "There is a small red circle and a large blue cross"."""
    described = [describe(thing) for thing in scene]
    pairs = list(itertools.permutations(described, 2))
    return [Form("and", pair) for pair in rand.sample(pairs, count)]


# ----------------------------------------------------------------------------------------------
# Questions (GQA)

QUESTION_MIX = {"verify": 2, "query": 3, "choose": 2, "logical": 1}  # GQA's structural types
# Form.kind -> GQA's detailed type of the question; the second table is for left and right
DETAILED = {"exist": "existAttr", "and": "existAnd", "or": "existOr", "attribute": "verifyAttr",
            "what": "directOf", "choose": "chooseAttr"}
POSITION = {"attribute": "positionVerify", "what": "positionQuery", "choose": "positionChoose"}


class Question(NamedTuple):
    form: Form
    answer: str  # English, as in GQA: yes, no, red, circle, small, left, ...
    structural: str  # GQA's structural type


def types_of(question):
    """GQA's types of a question, as they stand in its files."""
    form = question.form
    detailed, semantic = DETAILED[form.kind], "attr"
    if form.attribute is None:
        semantic = "obj"
    if form.attribute == "side":
        detailed = POSITION[form.kind]
    if question.answer == "no":
        detailed += "C"
    return {"detailed": detailed, "structural": question.structural, "semantic": semantic}


def yes_no_question(structural, scene, rand):
    """verify: "is there a circle?", "is the circle red?"; logical: "is there a … or a …?"."""
    kinds = {"verify": ("exist", "attribute"), "logical": ("and", "or")}
    kind = rand.choice(kinds[structural])
    yes = rand.random() < 0.5
    pair = minimal_pair(kind, scene, rand)
    if pair is None:
        return None
    true, false = pair
    if yes:
        return Question(true._replace(question=True), "yes", structural)
    return Question(false._replace(question=True), "no", structural)


def open_question(structural, scene, rand):
    """query: "what colour is the circle?", choose: "is the circle red or blue?"."""
    thing, attribute = rand.choice(scene), rand.choice(list(ATTRIBUTES))
    phrase, answer = naming(thing, attribute, scene, rand), getattr(thing, attribute)
    if phrase is None:
        return None
    if structural == "query":
        return Question(Form("what", (phrase,), attribute, (), True), answer, structural)
    options = [answer, another(answer, attribute, rand)]
    in_random_order = tuple(rand.sample(options, 2))
    return Question(Form("choose", (phrase,), attribute, in_random_order, True), answer, structural)


def ask_questions(scene, count, rand):
    """`count` different questions. A type that does not suit the scene gives way to another."""
    asked = {}
    while len(asked) < count:
        structural, = rand.choices(list(QUESTION_MIX), QUESTION_MIX.values())
        for _ in range(20):
            if structural in ("query", "choose"):
                question = open_question(structural, scene, rand)
            else:
                question = yes_no_question(structural, scene, rand)
            if question and question.form not in asked:
                asked[question.form] = question
                break
    return list(asked.values())


# ----------------------------------------------------------------------------------------------
# Entailment (XVNLI) and captions (xFlickrCO)

LABELS = ("entailment", "contradiction", "neutral")


def hypothesis(scene, label, rand):
    """ "The a is x". What the image does not show may exist outside it.

    entailment     the phrase fits exactly one visible object, which is x
    contradiction  the phrase fits exactly one visible object, which is not x
    neutral        the phrase fits no visible object: one of its words, or all, were changed
    A hypothesis is only written where all three exist.
    """
    while True:
        thing, attribute = rand.choice(scene), rand.choice(list(ATTRIBUTES))
        phrase, value = naming(thing, attribute, scene, rand), getattr(thing, attribute)
        if phrase is None:
            continue
        mentioned = [name for name in DESCRIPTIVE if getattr(phrase, name)]
        if rand.random() < 0.5:
            elsewhere = with_other_words(phrase, mentioned, rand)
        else:
            elsewhere = with_other_words(phrase, [rand.choice(mentioned)], rand)
        if matches(elsewhere, scene):
            continue
        if label == "contradiction":
            value = another(value, attribute, rand)
        if label == "neutral":
            phrase = elsewhere
            value = rand.choice(ATTRIBUTES[attribute])
        return Form("attribute", (phrase,), attribute, (value,))


def scenes_with_unique_captions(count, rng, rand):
    """Scenes and one caption each. No caption is true of another of the scenes, so that a perfect
    model can reach a recall@1 of 100 %. -> (scenes, a list of one caption for each)
    """
    scenes, unique, shown, told = [], [], set(), set()
    while True:
        for scene in draw_scenes(count, rng):
            described = [describe(thing) for thing in scene]
            pairs = {frozenset(pair) for pair in itertools.combinations(described, 2)}
            [caption] = captions(scene, 1, rand)
            mentioned = frozenset(caption.phrases)
            if mentioned not in shown and not pairs & told:
                scenes.append(scene)
                unique.append([caption])
                shown |= pairs
                told.add(mentioned)
            if len(scenes) == count:
                return scenes, unique


# ----------------------------------------------------------------------------------------------
# Files


def write_text(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def write_json(path, content, indent=None):
    write_text(path, json.dumps(content, ensure_ascii=False, indent=indent))


def write_jsonl(path, records):
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_text(path, "".join(lines))


def write_images(paths, scenes, rng):
    """The scenes as JPEG files."""
    for start in range(0, len(scenes), AT_ONCE):
        chunk = slice(start, start + AT_ONCE)
        for path, pixels in zip(paths[chunk], draw_images(scenes[chunk], rng)):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Image.fromarray(pixels).save(path, quality=95, subsampling=0)


def write_features(folder, keys, regions, rows):
    """Region features of the images `keys`, rows of `regions`, in the format of data.Regions."""
    os.makedirs(folder)
    np.save(f"{folder}/features.npy", regions.features[rows])
    np.save(f"{folder}/boxes.npy", regions.boxes[rows])
    np.save(f"{folder}/sizes.npy", np.full((len(keys), 2), IMAGE_SIZE, np.int32))
    write_text(f"{folder}/ids.txt", "".join(key + "\n" for key in keys))
    meta = {"format": 1, "count": len(keys), "boxes": BOXES, "dim": FEATURE_WIDTH,
            "dtype": "float16", "source": "drawn by mini_world.py", "complete": True}
    write_json(f"{folder}/meta.json", meta)


def write_gqa(folder, seed, images):
    """gqa/ (English questions for training, images, features), xGQA/ (all other questions)."""
    rng, rand = np.random.default_rng([seed, 1]), random.Random(f"gqa {seed}")
    keys, scenes, asked = [], [], {}
    for number, split in enumerate(("train", "valid", "shots", "dev", "test")):
        first = number * 1_000_000
        # training images are numbered as Visual Genome's, test images as GQA's own
        if split in ("train", "valid"):
            image_name, question_name = "{}", "{:08d}"
            first_image = 2_350_000 + first
        else:
            image_name, question_name = "n{}", "20{:07d}"
            first_image = first
        per_image = SHOT_QUESTIONS if split == "shots" else QUESTIONS_PER_IMAGE
        asked[split] = []
        for i, scene in enumerate(draw_scenes(images[f"gqa_{split}"], rng)):
            key = image_name.format(first_image + i)
            keys.append(key)
            scenes.append(scene)
            for question in ask_questions(scene, per_image, rand):
                identifier = question_name.format(first + len(asked[split]))
                asked[split].append((identifier, key, question))

    for shots in XGQA_SHOTS:
        asked[f"train_{shots}"] = asked["shots"][: shots * SHOT_QUESTIONS]
    for questions in asked.values():
        rand.shuffle(questions)

    annotations = f"{folder}/gqa/annotations"
    for split in ("train", "valid"):
        records = []
        for identifier, key, question in asked.pop(split):
            records.append({"img_id": key, "label": {question.answer: 1.0},
                            "question_id": identifier, "sent": say(question.form, "en")})
        write_json(f"{annotations}/{split}.json", records)
    answers = ["yes", "no", *COLOURS, *SHAPES, *SIZES, *SIDES]
    write_json(f"{annotations}/trainval_label2ans.json", answers)
    labels = {answer: answers.index(answer) for answer in sorted(answers)}
    write_json(f"{annotations}/trainval_ans2label.json", labels, indent=4)

    del asked["shots"]
    for language, split in itertools.product(LANGUAGES["xgqa"], asked):
        records = {}
        for identifier, key, question in asked[split]:
            records[identifier] = {
                "question": say(question.form, language), "imageId": key, "isBalanced": True,
                "answer": question.answer, "types": types_of(question)}
        write_json(f"{folder}/xGQA/annotations/few_shot/{language}/{split}.json", records)

    write_images([f"{folder}/gqa/images/{key}.jpg" for key in keys], scenes, rng)
    write_features(f"{folder}/gqa/features", keys, detect_regions(scenes, rng), slice(None))


def draw_statements(keys, scenes, rand):
    """XVNLI's records of the images: (image, number, scene, label, hypothesis)."""
    drawn = []
    for key, scene in zip(keys, scenes):
        for number in range(1, STATEMENTS_PER_IMAGE + 1):
            drawn.append((key, number, scene, rand.choice(LABELS)))
    return [(*item, hypothesis(item[2], item[3], rand)) for item in drawn]


def write_statements(path, statements, language):
    """sentence1 names every visible object. The models only see the image and sentence2."""
    records = []
    for key, number, scene, label, form in statements:
        premises = [say(Form("exist", (describe(thing),)), language) for thing in scene]
        records.append({
            "gold_label": label, "sentence1": " ".join(premises), "sentence2": say(form, language),
            "captionID": f"{key}.jpg#0", "pairID": f"{key}.jpg#0r{number}{label[0]}",
            "Flikr30kID": key})
    write_jsonl(path, records)


def write_captions(path, keys, captions_of, language):
    """Flickr30k's images are known by a string, COCO's by a number."""
    records = []
    for key, forms in zip(keys, captions_of):
        sentences = [say(form, language) for form in forms]
        name = int(key.rsplit("_", 1)[1]) if key.startswith("COCO") else key
        records.append({"sentences": sentences, "id": name, "img_path": f"{key}.jpg"})
    write_jsonl(path, records)


def write_hard_negatives(path, keys, scenes):
    """For every training image the 20 most like it, itself first. Likeness: words in common."""
    words = [*COLOURS, *SHAPES, *SIZES, *SIDES]
    counts = np.zeros((len(scenes), len(words)), np.float32)
    for row, scene in zip(counts, scenes):
        for thing in scene:
            for word in thing[:4]:
                row[words.index(word)] += 1
    pools = []
    for i, row in enumerate(counts):
        distances = ((counts - row) ** 2).sum(1)
        nearest = np.argsort(distances, kind="stable")[:21].tolist()
        others = [j for j in nearest if j != i]
        pools.append([i, *others][:21])
    content = {"train_image_list": keys, "train_hard_pool": pools}
    with open(path, "wb") as file:
        pickle.dump(content, file, protocol=4)


def write_flickr(folder, seed, images):
    """XVNLI/, xFlickrCO/ and the images of both: flickr30k/ and mscoco/.

    In the real benchmark people wrote captions for every language. Here the captions of an image
    in all languages are translations of each other.
    """
    rng, rand = np.random.default_rng([seed, 2]), random.Random(f"flickr {seed}")
    flickr, xvnli = f"{folder}/flickr30k", f"{folder}/XVNLI/annotations"
    keys, scenes = [], []

    def add(new_scenes):
        first = 1_000_000_000 + len(keys)
        new_keys = [str(first + i) for i in range(len(new_scenes))]
        keys.extend(new_keys)
        scenes.extend(new_scenes)
        return new_keys

    # English training data of both tasks, on the same images
    train_scenes = draw_scenes(images["flickr_train"], rng)
    train_keys = add(train_scenes)
    train_captions = [captions(scene, CAPTIONS_PER_IMAGE, rand) for scene in train_scenes]
    write_captions(f"{flickr}/annotations/train_ann.jsonl", train_keys, train_captions, "en")
    statements = draw_statements(train_keys[: images["xvnli_train"]], train_scenes, rand)
    write_statements(f"{xvnli}/en/train.jsonl", statements, "en")
    write_hard_negatives(f"{flickr}/hard_negative.pkl", train_keys, train_scenes)

    # XVNLI in all languages
    splits = {}
    for split in ("dev", "test", "shots"):
        new_scenes = draw_scenes(images[f"xvnli_{split}"], rng)
        splits[split] = draw_statements(add(new_scenes), new_scenes, rand)
    shot_statements = splits.pop("shots")
    for shots in XVNLI_SHOTS:
        splits[f"train_{shots}"] = shot_statements[: shots * STATEMENTS_PER_IMAGE]
    for language, split in itertools.product(LANGUAGES["xvnli"], splits):
        write_statements(f"{xvnli}/{language}/{split}.jsonl", splits[split], language)

    # xFlickrCO's few-shot, development and test images; development is Flickr30k's validation
    shot_scenes = draw_scenes(images["xflickrco_shots"], rng)
    shot_keys = add(shot_scenes)
    shot_captions = [captions(scene, 1, rand) for scene in shot_scenes]
    dev_scenes, dev_captions = scenes_with_unique_captions(images["flickr_valid"], rng, rand)
    dev_keys = add(dev_scenes)
    valid_captions = []
    for scene, [unique] in zip(dev_scenes, dev_captions):
        several = dict.fromkeys([unique, *captions(scene, CAPTIONS_PER_IMAGE, rand)])
        valid_captions.append(list(several)[:CAPTIONS_PER_IMAGE])
    write_captions(f"{flickr}/annotations/valid_ann.jsonl", dev_keys, valid_captions, "en")
    test_scenes, test_captions = scenes_with_unique_captions(images["xflickrco_test"], rng, rand)
    half = len(test_scenes) // 2
    coco_keys = [f"COCO_val2014_{100001 + i:012d}" for i in range(len(test_scenes) - half)]
    test_keys = add(test_scenes[:half]) + coco_keys

    # its captions in all languages
    for language in LANGUAGES["xflickrco"]:
        annotations = f"{folder}/xFlickrCO/annotations/{language}"
        write_captions(f"{annotations}/test.jsonl", test_keys, test_captions, language)
        write_captions(f"{annotations}/dev.jsonl", dev_keys, dev_captions, language)
        if language != "en":
            for shots in XFLICKRCO_SHOTS:
                path = f"{annotations}/train_{shots}.jsonl"
                write_captions(path, shot_keys[:shots], shot_captions, language)

    # pictures and features; xFlickrCO has a feature folder of its own for development and test
    scenes += test_scenes[half:]
    paths = [f"{flickr}/flickr30k-images/{key}.jpg" for key in keys]
    paths += [f"{folder}/mscoco/val2014/{key}.jpg" for key in coco_keys]
    write_images(paths, scenes, rng)
    regions = detect_regions(scenes, rng)
    write_features(f"{flickr}/features", keys, regions, slice(len(keys)))
    own = dev_keys + test_keys
    write_features(f"{folder}/xFlickrCO/features", own, regions, slice(-len(own), None))


# ----------------------------------------------------------------------------------------------
# A world on disk

# mini_world.py is what this file was called when the shipped world was written
README = """The embedded miniature of IGLUE: synthetic images of coloured shapes with templated \
text, written by
mini_world.py (world size small, seed {seed}). Folders, file formats and keys are those of \
IGLUE's GQA/xGQA, XVNLI,
Flickr30k and xFlickrCO; the contents are not. Results on it illustrate a mechanism; they say \
nothing about the real
benchmark.
"""


def mark_of(seed):
    """What made_by.txt says of a world: its seed, and a digest of the code that writes it."""
    digest = hashlib.sha256()
    for name in ("world.py", "languages.py"):
        with open(os.path.join(SHIPPED, name), "rb") as file:
            digest.update(file.read())
    return f"miniature/world.py, seed {seed}, version {digest.hexdigest()}\n".encode()


def is_current(folder, seed):
    path = os.path.join(folder, "made_by.txt")
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read() == mark_of(seed)


def write_world(folder, seed=WORLD_SEED, images=IMAGES):
    """The world as IGLUE's files in `folder`, with the mark made_by.txt.

    A world that this code wrote there already is kept, one of another version is replaced, and
    any other folder is left alone (InputError). `images`: a smaller world, for tests.
    """
    folder = os.path.abspath(folder)
    if is_current(folder, seed):
        return
    mark = os.path.join(folder, "made_by.txt")
    if os.path.exists(folder) and not os.path.isfile(mark):
        raise InputError(f"{folder}: not a world of the miniature; move it away or name another")
    # Several processes may be here at once. Each writes a world beside the others and renames it
    # when complete. Who comes second finds the first one's and is content with it.
    parent, name = os.path.split(folder)
    options = {"prefix": f"{name}.", "dir": parent, "ignore_cleanup_errors": True}
    try:
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(**options) as beside:
            print(f"{folder}: writing the miniature's world", flush=True)
            if os.path.isfile(mark):  # of another version
                with contextlib.suppress(FileNotFoundError):  # another process has just done this
                    os.rename(folder, f"{beside}/old")
            new = f"{beside}/new"
            write_gqa(new, seed, images)
            write_flickr(new, seed, images)
            write_text(f"{new}/README.txt", README.format(seed=seed))
            write_text(f"{new}/made_by.txt", mark_of(seed).decode())
            os.rename(new, folder)
    except OSError as error:
        if not is_current(folder, seed):
            raise InputError(f"{folder}: cannot write the miniature's world there "
                             f"({error.strerror})") from None


def prepare(model):
    """-> (data folder, checkpoint, tokenizer) of the miniature, written where it is missing.

    The world is mini_data/ in the checkout or, where nothing can be written there, in a cache.
    """
    checkpoint = os.path.join(SHIPPED, f"{model}.pt")
    tokenizer = os.path.join(SHIPPED, "tokenizer.model")
    for path in (checkpoint, tokenizer):
        if not os.path.isfile(path):
            raise InputError(f"{path}: this part of the miniature is missing; get it again from "
                             "git, or make it: python -m miniature.pretrain --out miniature")
    world = WORLD
    if not os.access(ROOT, os.W_OK) and not is_current(WORLD, WORLD_SEED):
        world = os.path.expanduser("~/.cache/suf-miniature")
        print(f"{WORLD}: cannot be written; the miniature's world is in {world}", flush=True)
    write_world(world)
    return world, checkpoint, tokenizer


# ----------------------------------------------------------------------------------------------
# Texts for pre-training

LANGUAGE_SHARES = {  # uneven, as in any crawl
    "en": 0.24, "de": 0.12, "pt": 0.09, "zh": 0.09, "ru": 0.08, "es": 0.08, "fr": 0.07,
    "id": 0.06, "ja": 0.05, "ko": 0.04, "ar": 0.03, "tr": 0.03, "bn": 0.02,
}


class Statement(NamedTuple):
    scene: int  # index into the scenes
    thing: int  # of a bare phrase: index of the object in its scene; of a sentence: -1
    text: str
    truth: bool


def draw_languages(count, rand, shares=LANGUAGE_SHARES):
    return rand.choices(list(shares), shares.values(), k=count)


def pretraining_statements(scenes, count, seed):
    """True and false statements about random scenes, half of each. -> list of Statements."""
    rand = random.Random(f"statements {seed}")
    statements = []
    for language in draw_languages(count, rand):
        scene, truth = rand.randrange(len(scenes)), rand.random() < 0.5
        text = say(statement(scenes[scene], truth, rand), language)
        statements.append(Statement(scene, -1, text, truth))
    return statements


def pretraining_phrases(scenes, count, seed):
    """Bare phrases about single objects ("large red circle"), half of them with a wrong word."""
    rand = random.Random(f"phrases {seed}")
    phrases = []
    for language in draw_languages(count, rand):
        scene, truth = rand.randrange(len(scenes)), rand.random() < 0.5
        thing = rand.randrange(len(scenes[scene]))
        phrase = describe(scenes[scene][thing])
        if not truth:
            phrase = with_other_words(phrase, [rand.choice(DESCRIPTIVE)], rand)
        text = say(Form("phrase", (phrase,)), language)
        phrases.append(Statement(scene, thing, text, truth))
    return phrases


def any_form(scene, rand, question_share, caption_share):
    """A question, a caption or a statement about the scene."""
    kind = rand.random()
    if kind < question_share:
        [question] = ask_questions(scene, 1, rand)
        return question.form
    if kind < question_share + caption_share:
        [caption] = captions(scene, 1, rand)
        return caption
    return statement(scene, rand.random() < 0.5, rand)


def parallel_pairs(scenes, count, seed, per_scene):
    """-> list of (scene, English sentence, its translation); `per_scene` in a row are about the
    same scene and have different meanings.
    """
    rand = random.Random(f"pairs {seed}")
    shares = dict(LANGUAGE_SHARES)
    del shares["en"]
    pairs = []
    while len(pairs) < count:
        scene = rand.randrange(len(scenes))
        forms = {}
        while len(forms) < per_scene:
            forms[any_form(scenes[scene], rand, 0.6, 0.1)] = None
        for form, language in zip(forms, draw_languages(per_scene, rand, shares)):
            pairs.append((scene, say(form, "en"), say(form, language)))
    return pairs[:count]


def tokenizer_corpus(count, seed):
    """Sentences of all kinds in all languages."""
    rand = random.Random(f"corpus {seed}")
    scenes = draw_scenes(count, np.random.default_rng([seed, 3]))
    texts = []
    for scene, language in zip(scenes, draw_languages(count, rand)):
        form = any_form(scene, rand, 0.5, 0.2)
        texts.append(say(form, language))
    return texts
