"""IGLUE's files on disk -> batches of tensors: readers, tokenizer, images, regions, sampling.

Knows files, not models (the data: paper, section 4.1). Nothing to run here: `python -m tools.check
IGLUE` lists what a data folder has, what it lacks and where to get it, `python -m tools.convert`
writes region features.

One set of readers serves the real benchmark and the embedded miniature, which has the same layout:

    gqa/annotations/        train.json or train_balanced_questions.json, valid.json,
                            trainval_ans2label.json
    gqa/images/<id>.jpg     gqa/features/
    xGQA/annotations/few_shot/<language>/{test,dev,train_1 ... train_48}.json
    XVNLI/annotations/<language>/{train,dev,test,train_1 ... train_48}.jsonl
    flickr30k/annotations/{train_ann,valid_ann}.jsonl, flickr30k/hard_negative.pkl
    flickr30k/flickr30k-images/<id>.jpg             flickr30k/features/
    xFlickrCO/annotations/<language>/{test,train_1 ... train_100}.jsonl
    mscoco/val2014/<id>.jpg                         xFlickrCO/features/

Everything random is a function of (seed, epoch, item): batches do not depend on the number of
workers or processes, and resuming needs no state.

Letters: B texts, T tokens, A answers, L tokens of an answer, C classes, I images of a batch,
R image side in pixels, N images of a folder, V regions of an image, F feature width.
"""

import codecs
import contextlib
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import sys
import warnings
from dataclasses import dataclass, field

import numpy as np
import sentencepiece
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageFile
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop

# languages of the tests; the first, English, is also that of the training
LANGUAGES = {
    "xgqa": "en de pt ru id zh ko bn".split(),
    "xvnli": "en ar es fr ru".split(),
    "xflickrco": "en de es id ja ru tr zh".split(),
}
# of XLM-R's own sentencepiece.bpe.model
XLMR_SHA256 = "cfc8146abe2a0488e9e2a0c56de7952f7c11ab059eca145a0a727afce0db2865"
BOS, PAD, EOS, UNK = 0, 1, 2, 3  # fairseq's ids, which XLM-R's embedding tables use

# images with odd metadata, and arrays that numpy wrote under Python 2, are read all the same
warnings.filterwarnings("ignore", module="PIL")
warnings.filterwarnings("ignore", ".*created on Python 2")


# --------------------------------------------------------------------------------------------------
# Reading and writing files


class InputError(ValueError):
    """What the user gave cannot be used. One line: which file, which record, what to do."""

    def __init__(self, message):
        super().__init__(" ".join(message.split())[:1000])


@contextlib.contextmanager
def reading(where):
    """Turn whatever goes wrong while a file or record is read into an InputError about `where`.

    A reader can then take what it needs from a file without looking at it first.
    """
    try:
        yield
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{where}: no field {error}") from None
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged file can raise anything
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise InputError(f"{where}: {kind}{error}") from None


def read_json(path):
    with reading(path), open(path, "rb") as file:
        return json.load(file)


def read_jsonl(path):
    """-> [(line number, record)]; empty lines are not records."""
    records = []
    with reading(path), open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                with reading(f"{path}, line {number}"):
                    records.append((number, json.loads(line)))
    return records


class ArrayUnpickler(pickle.Unpickler):
    """Reads lists, dicts, strings, numbers and numpy arrays.

    A pickle may name any function to be called. Only those below are, so no code of the file runs.
    """

    constructors = {
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "_reconstruct": np.empty(0).__reduce__()[0],
        "_frombuffer": np.empty(0).__reduce_ex__(5)[0],
        "scalar": np.float64(0).__reduce__()[0],
        "encode": codecs.encode,  # older protocols write bytes as text
    }

    def find_class(self, module, name):
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in self.constructors:
            raise ValueError(f"refers to {module}.{name}; only plain data and arrays are read")
        return self.constructors[name]


def map_array(*parts):
    """A numpy file, memory-mapped."""
    path = os.path.join(*parts)
    with reading(path):
        return np.lib.format.open_memmap(path, mode="r")


@contextlib.contextmanager
def writing(path):
    """Turn whatever the disk refuses while `path` is written into an InputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError of its own on top of the disk's
        refused = error if isinstance(error, OSError) else error.__context__
        if not isinstance(refused, OSError):
            raise
        raise InputError(f"{path}: cannot be written ({refused.strerror})") from None


def write(path, save):
    """Let save(file) write a file under a temporary name, force it to disk, then rename it.

    What was there before stays until the new file is complete.
    """
    part = f"{path}.part"
    try:
        with writing(path):
            with open(part, "wb") as file:
                save(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or never there
            os.remove(part)


def write_json(path, content):
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    # surrogatepass: a path may have bytes that are no UTF-8; json reads them back
    write(path, lambda file: file.write(text.encode(errors="surrogatepass")))


def make_folder(path):
    """A folder, with those above it, where there is none."""
    with writing(path):
        os.makedirs(path, exist_ok=True)


def fingerprint(path):
    """SHA-256 of a file, read once per process as long as nobody writes to it."""
    with reading(path):
        found = os.stat(path)
        return digest(path, found.st_ino, found.st_size, found.st_mtime_ns)


@functools.cache
def digest(path, *_):
    """_: what changes when somebody writes to the file, which is then read again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------------------
# Annotation files -> records


@dataclass
class Record:
    """One question, statement or caption."""

    id: str
    image: str  # file name without folder and '.jpg'
    text: str
    answers: dict = field(default_factory=dict)  # xGQA: answer -> weight
    label: str = ""  # XVNLI: entailment, neutral, contradiction; "-": the annotators disagreed
    type: str = ""  # xGQA: verify, query, choose, logical, compare; "": the file does not tell

    def __post_init__(self):
        self.image = image_key(self.image)
        if not isinstance(self.text, str):
            raise ValueError(f"{self.text!r} stands where a text should be")


def image_key(name):
    """An image's id as a bare file name. ValueError for what would lead out of the image folder."""
    key = str(name).removesuffix(".jpg")
    if key in ("", ".", "..") or key != os.path.basename(key):
        raise ValueError(f"{name!r} is not an image id (a plain file name is expected)")
    return key


def read_gqa(path):
    """GQA's and xGQA's questions (a dict by question id), or LXMERT's (a list: train.json)."""
    loaded = read_json(path)
    by_id = isinstance(loaded, dict)
    numbered = loaded.items() if by_id else enumerate(loaded)
    records = []
    for key, question in numbered:
        with reading(f"{path}, question {key}"):
            if by_id:
                image, text = question["imageId"], question["question"]
                answers = {question["answer"]: 1.0}
            else:
                key = str(question["question_id"])
                image, text = question["img_id"], question["sent"]
                # the reference ignores the scores: each of several answers weighs the same
                answers = {answer: 1 / len(question["label"]) for answer in question["label"]}
            kind = question.get("types", {}).get("structural", "")
            records.append(Record(key, image, text, answers, type=kind))
    return records


def read_xvnli(path):
    """XVNLI's and SNLI-VE's statements. The premise is the image; the text premise is not used."""
    records = []
    for number, statement in read_jsonl(path):
        with reading(f"{path}, line {number}"):
            label = statement["gold_label"]
            if label not in ("entailment", "neutral", "contradiction", "-"):
                raise ValueError(f"unknown gold_label {label!r}")
            # SNLI-VE's files and tools have the first two spellings, IGLUE's files the third
            spelled = statement.get("Flickr30kID") or statement.get("Flickr30K_ID")
            image = spelled or statement["Flikr30kID"]
            key = str(statement.get("pairID", number))
            records.append(Record(key, image, statement["sentence2"], label=label))
    return records


def read_captions(path):
    """Flickr30k's and xFlickrCO's captions, one record per caption."""
    records = []
    for number, line in read_jsonl(path):
        with reading(f"{path}, line {number}"):
            image = image_key(line["img_path"])
            for i, sentence in enumerate(line["sentences"]):
                records.append(Record(f"{image}#{i}", image, sentence))
    return records


READERS = {"xgqa": read_gqa, "xvnli": read_xvnli, "xflickrco": read_captions}
ANNOTATIONS = {  # task -> split -> its file in the data folder
    "xgqa": {
        "train": "gqa/annotations/train.json or gqa/annotations/train_balanced_questions.json",
        "valid": "gqa/annotations/valid.json",
        "dev": "xGQA/annotations/few_shot/{language}/dev.json",
        "test": "xGQA/annotations/few_shot/{language}/test.json",
        "few-shot": "xGQA/annotations/few_shot/{language}/train_{shots}.json",
    },
    "xvnli": {
        "train": "XVNLI/annotations/en/train.jsonl",
        "dev": "XVNLI/annotations/{language}/dev.jsonl",
        "test": "XVNLI/annotations/{language}/test.jsonl",
        "few-shot": "XVNLI/annotations/{language}/train_{shots}.jsonl",
    },
    "xflickrco": {
        "train": "flickr30k/annotations/train_ann.jsonl",
        "valid": "flickr30k/annotations/valid_ann.jsonl",
        "dev": "xFlickrCO/annotations/{language}/dev.jsonl",
        "test": "xFlickrCO/annotations/{language}/test.jsonl",
        "few-shot": "xFlickrCO/annotations/{language}/train_{shots}.jsonl",
    },
}


def annotation_file(data, task, split, language="en", shots=None):
    """Path of a split's file; InputError naming what was looked for."""
    names = ANNOTATIONS[task][split].format(language=language, shots=shots)
    for name in names.split(" or "):
        path = os.path.join(data, name)
        if os.path.isfile(path):
            return path
    raise lacks(data, names)


def lacks(data, names):
    """-> InputError for files that a data folder lacks."""
    return InputError(f"{data}: no {names}; `python -m tools.check {data}` lists what is missing "
                      "and where to get it")


def read_records(data, task, split, language="en", shots=None):
    """-> (path of the file, its records)."""
    path = annotation_file(data, task, split, language, shots)
    with reading(path):
        return path, READERS[task](path)


def read_labels(data):
    """GQA's 1,842 answers in the order of their label ids, which is not the order of the file."""
    name = "gqa/annotations/trainval_ans2label.json"
    path = os.path.join(data, name)
    if not os.path.isfile(path):
        raise lacks(data, name)
    with reading(path):
        label_of = read_json(path)
        if sorted(label_of.values()) != list(range(len(label_of))):
            raise ValueError("expected label ids 0, 1, 2, …, each once")
        return sorted(label_of, key=label_of.get)


def is_miniature(folder):
    """Whether a data folder holds the miniature's world, wherever it lies."""
    return os.path.isfile(os.path.join(folder, "made_by.txt"))


# --------------------------------------------------------------------------------------------------
# Text

PUNCTUATION = str.maketrans(dict.fromkeys(",.'!?\"()*#:;~-/", " "))


def clean_question(text, max_words):
    """CCLM's clean-up of questions: lower case, ASCII punctuation to spaces, the first words."""
    text = text.lower().translate(PUNCTUATION).rstrip(" ")
    return " ".join(text.split(" ")[:max_words])  # several spaces stay: there are empty words


def clean_caption(text, max_words):
    """CCLM's clean-up of captions and statements: also one space for several. May be empty."""
    text = text.lower().translate(PUNCTUATION).replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


class Tokenizer:
    """XLM-R's tokenizer: a sentencepiece model with fairseq's ids.

    <s> 0, <pad> 1, </s> 2, <unk> 3; the model's id s becomes s + 1; <mask> is last.
    """

    longest = 512  # tokens of a text that the model has positions for; the caller sets it

    def __init__(self, path):
        self.path, self.sha256 = path, fingerprint(path)
        self.model = sentencepiece.SentencePieceProcessor()
        try:
            with open(path, "rb") as file:
                self.model.LoadFromSerializedProto(file.read())
        except (RuntimeError, OSError):
            raise InputError(f"{path}: not a sentencepiece model, or a truncated one") from None
        self.vocabulary = self.model.vocab_size() + 2
        self.mask = self.vocabulary - 1

    def __call__(self, texts, max_tokens=None):
        """Texts -> token rows <s> … </s> (int32), cut to max_tokens with both ends kept."""
        rows = []
        for pieces in self.model.encode(list(texts)):
            if max_tokens:
                pieces = pieces[: max_tokens - 2]
            ids = [piece + 1 if piece else UNK for piece in pieces]
            rows.append(np.array([BOS, *ids, EOS], dtype=np.int32))
        return rows

    def check(self, expected_sha256, vocabulary):
        """InputError if the checkpoint has a vocabulary of another size.

        -> a warning if the file is not the one expected, else None.
        """
        if self.vocabulary != vocabulary:
            raise InputError(f"{self.path}: a tokenizer of {self.vocabulary:,} ids, but the "
                             f"checkpoint embeds {vocabulary:,}: it belongs to another model")
        if self.sha256 != expected_sha256:
            return (f"{self.path}: sha256 {self.sha256[:12]}… is not the known "
                    f"{str(expected_sha256)[:12]}…: ids may differ from those of pre-training")


def pad(rows):
    """Token rows -> input_ids and attention_mask [B,T] (int64), padded to the longest."""
    rows = [torch.tensor(row) for row in rows]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, True, PAD).long()  # [B,T]
    return input_ids, (input_ids != PAD).long()


# --------------------------------------------------------------------------------------------------
# Images: JPEG -> uint8 [3,R,R]; normalisation happens on the device

# X2-VLM's code trains on images that lack their last bytes, and so do we: what is missing is grey
ImageFile.LOAD_TRUNCATED_IMAGES = True


def image_path(data, task, key):
    folder = "flickr30k/flickr30k-images"
    if task == "xgqa":
        folder = "gqa/images"
    elif "COCO" in key:
        folder = "mscoco/val2014"
    return os.path.join(data, folder, f"{key}.jpg")


def read_image(path):
    """-> RGB image. InputError where it is missing or unreadable."""
    # no other formats: some would start a program, such as Ghostscript
    with reading(path), Image.open(path, formats=("JPEG", "PNG", "GIF", "BMP", "WEBP")) as image:
        return image.convert("RGB")


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [R,R,3] -> [3,R,R]


def resize(image, size):
    """Evaluation: to size x size, bicubic, aspect ratio not kept."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


def augment(image, size, flip):
    """Training: mirrored half of the time where allowed, a random crop of 50-100 % of the area, and
    two random operations, each done half of the time. Draws from torch's generator.
    """
    if flip and torch.rand(()) < 0.5:
        image = TF.horizontal_flip(image)
    image = RandomResizedCrop(
        (size, size), scale=(0.5, 1.0), interpolation=InterpolationMode.BICUBIC)(image)
    for choice in torch.randint(10, (2,)).tolist():
        if torch.rand(()) < 0.5:
            sign = 1 if torch.rand(()) < 0.5 else -1
            image = distort(image, choice, sign)
    return image


SHEAR = 11.859779120947978  # degrees; its tangent is 0.21
# strengths of shearing along x and y, shifting along x and y (pixels), turning (degrees)
MOVES = (SHEAR, SHEAR, 7, 7, 21.0)


def distort(image, choice, sign):
    """One of the ten operations of the reference's RandomAugment(2, 7): strength 7 of 10, the
    direction of the last five at random (sign: 1 or -1).
    """
    if choice == 0:
        return image
    if choice == 1:
        return TF.autocontrast(image)
    if choice == 2:
        return TF.equalize(image)
    if choice == 3:
        return TF.adjust_brightness(image, 1.36)
    if choice == 4:
        return TF.adjust_sharpness(image, 1.36)
    # one of the five moves, the others by nothing
    move = [0.0] * 5
    move[choice - 5] = sign * MOVES[choice - 5]
    *shear, right, down, angle = move
    center = [0, 0] if choice < 7 else None  # None: the middle
    return TF.affine(image, angle, [right, down], 1.0, shear, InterpolationMode.BILINEAR,
                     [128, 128, 128], center)


class Images:
    """The images of a split by row."""

    def __init__(self, data, task, keys, size):
        self.keys, self.size = keys, size
        self.paths = [image_path(data, task, key) for key in keys]
        missing = [path for path in self.paths if not os.path.isfile(path)]
        if missing:
            raise InputError(f"{missing[0]}: no such image ({len(missing):,} of {len(keys):,} are "
                             "missing)")

    def batch(self, rows, may_flip=None, seeds=None):
        """{"images": uint8 [I,3,R,R]}; augmented where `seeds` are given, one per image."""
        images = []
        for i, row in enumerate(rows):
            image = read_image(self.paths[row])
            if seeds is None:
                image = resize(image, self.size)
            else:
                with torch.random.fork_rng(devices=[]):  # the same draws whoever loads the image
                    torch.manual_seed(seeds[i])
                    image = augment(image, self.size, may_flip[i])
            images.append(to_tensor(image))
        return {"images": torch.stack(images)}


# --------------------------------------------------------------------------------------------------
# Region features: what UC2 sees of an image


def feature_folder(data, task, split):
    """xFlickrCO's test (and, in the miniature, dev) images have a folder of their own."""
    folder = "gqa" if task == "xgqa" else "flickr30k"
    if task == "xflickrco" and split in ("test", "dev"):
        folder = "xFlickrCO"
    return os.path.join(data, folder, "features")


def locations(boxes, sizes):
    """Boxes x1,y1,x2,y2 in pixels [I,V,4], image sizes w,h [I,2] -> [I,V,7] float32: the corners,
    width, height and area, as shares of the image's.
    """
    width, height = sizes.astype(np.float32).T[:, :, None]  # [I,1] each
    x1, y1, x2, y2 = boxes.astype(np.float32).transpose(2, 0, 1)  # [I,V] each
    left, top, right, bottom = x1 / width, y1 / height, x2 / width, y2 / height
    area = (x2 - x1) * (y2 - y1) / (width * height)
    return np.stack([left, top, right, bottom, right - left, bottom - top, area], axis=-1)


class Regions:
    """Region features of a split's images, from a folder that tools/convert.py wrote.

    ids.txt          image keys, one per line
    features.npy     [N,V,F] float16, memory-mapped; V: the most regions of any image, others are
                     padded with zeros
    boxes.npy        [N,V,4] pixels            sizes.npy [N,2] w,h
    counts.npy       [N] regions of each image; without this file all have V
    """

    def __init__(self, folder, keys):
        self.folder, self.keys = folder, keys
        if not os.path.isdir(folder):
            raise InputError(f"{folder}: no such folder of region features; `python -m "
                             f"tools.convert SOURCE {folder}` writes one")
        with reading(folder):
            with open(os.path.join(folder, "ids.txt"), encoding="utf-8") as file:
                self.row_of = {key: row for row, key in enumerate(file.read().splitlines())}
            self.features = map_array(folder, "features.npy")
            self.boxes = map_array(folder, "boxes.npy")
            self.sizes = map_array(folder, "sizes.npy")
            images, most, self.dim = self.features.shape
            self.counts = np.full(images, most)
            if os.path.isfile(os.path.join(folder, "counts.npy")):
                self.counts = map_array(folder, "counts.npy")
        missing = [key for key in keys if key not in self.row_of]
        if missing:
            raise InputError(f"{folder}: no features of image {missing[0]} ({len(missing):,} of "
                             f"{len(keys):,} images are missing)")
        self.rows = np.array([self.row_of[key] for key in keys])

    def batch(self, rows, may_flip=None, seeds=None):
        """{"features": float16 [I,V,F], "locations": [I,V,7], "region_mask": [I,V]}.

        V: the most regions of any image of the batch. may_flip and seeds are for `Images` alone.
        """
        # rows of the split -> rows of the folder; only as many regions as the batch needs
        rows = self.rows[rows]
        counts = self.counts[rows]
        most = counts.max()
        features = self.features[rows, :most]  # [I,V,F]
        places = locations(self.boxes[rows, :most], self.sizes[rows])  # [I,V,7]
        # 1 for a region, 0 for padding
        mask = (np.arange(most) < counts[:, None]).astype(np.int64)  # [I,V]
        batch = {"features": features, "locations": places, "region_mask": mask}
        return {name: torch.from_numpy(array) for name, array in batch.items()}


# --------------------------------------------------------------------------------------------------
# A split in one language, tokenised once


class Examples:
    """Records of one file with their token rows and the rows of their images.

    recipe: has clean ("question", "caption" or "" for none) and the limits train_words, test_words,
    train_tokens, test_tokens (None: no limit). keep(cleaned text, record): whether to use a record.
    """

    def __init__(self, source, records, recipe, tokenizer, training=False, keep=None):
        words = recipe.train_words if training else recipe.test_words
        max_tokens = recipe.train_tokens if training else recipe.test_tokens
        self.source, self.records, texts = source, [], []
        for record in records:
            text = record.text
            if recipe.clean == "question":
                text = clean_question(text, words)
            elif recipe.clean == "caption":
                text = clean_caption(text, words)
            if keep is None or keep(text, record):
                self.records.append(record)
                texts.append(text)
        if not texts:
            raise InputError(f"{source}: no records with text (or, to train on XVNLI, a label)")

        self.tokens = tokenizer(texts, max_tokens)
        self.lengths = np.array([len(row) for row in self.tokens])
        longest = self.lengths.argmax()
        if self.lengths[longest] > tokenizer.longest:
            raise InputError(f"{source}, {self.records[longest].id}: {self.lengths[longest]:,} "
                             f"tokens, the model has positions for {tokenizer.longest}")

        # every image once, in the order in which they appear
        row_of = {}
        image_rows, may_flip = [], []
        for record in self.records:
            image_rows.append(row_of.setdefault(record.image, len(row_of)))
            # mirrored, the answer to a question about sides would be wrong (English words, as in
            # the reference)
            told = " ".join([record.text, *map(str, record.answers)])
            may_flip.append("left" not in told and "right" not in told)
        self.image_keys = list(row_of)
        self.image_rows = np.array(image_rows)
        self.may_flip = np.array(may_flip)

    def __len__(self):
        return len(self.records)


def load_examples(data, task, split, recipe, tokenizer, language="en", shots=None, training=False,
                  keep=None, limit=None):
    """Examples of one split in one language: of its first `limit` records."""
    source, records = read_records(data, task, split, language, shots)
    return Examples(source, records[:limit], recipe, tokenizer, training, keep)


def check_answers(examples, labels):
    """InputError for a training question whose answer is no label.

    Some may have none, as GQA's format allows: a model then learns from the others of the batch.
    """
    known = set(labels)
    for record in examples.records:
        for answer in record.answers:
            if answer not in known:
                raise InputError(f"{examples.source}, question {record.id}: the answer {answer!r} "
                                 f"is not among the {len(labels):,} labels")


# --------------------------------------------------------------------------------------------------
# Which examples, in which order: functions of (seed, epoch)


def epoch_batches(lengths, batch_size, seed, epoch, pool=16, groups=None, group_size=None):
    """Batches of one epoch: example indices [steps, batch_size].

    The rest that fills no batch is left out; it is another one in every epoch. Against padding, the
    examples of `pool` batches at a time are sorted by length, cut into batches, and the batches
    shuffled (pool=1: batches are random, sorted in themselves). With `groups` (the image row of
    every example) nothing is sorted by length: up to `group_size` examples of one image stay
    together.
    """
    # a new order in every epoch; what is behind `used` is left out
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    steps = len(order) // batch_size
    used = steps * batch_size

    if groups is not None:
        # sort by image; the examples of an image stay in random order
        order = order[np.argsort(groups[order], kind="stable")]
        ends = np.flatnonzero(np.diff(groups[order])) + 1
        # cut where an image ends and after group_size of its examples
        parts = []
        for of_image in np.split(order, ends):
            for start in range(0, len(of_image), group_size):
                parts.append(of_image[start : start + group_size])
        # the parts in random order; a batch may end in the middle of one
        order = np.concatenate([parts[i] for i in rng.permutation(len(parts))])
        return order[:used].reshape(steps, batch_size)

    batches = []
    for start in range(0, used, pool * batch_size):
        # as many examples as fill `pool` batches, sorted by length and cut into batches
        drawn = order[:used][start : start + pool * batch_size]
        drawn = drawn[np.argsort(lengths[drawn], kind="stable")]
        by_length = drawn.reshape(-1, batch_size)
        batches.append(by_length[rng.permutation(len(by_length))])
    # batches of all lengths in any order
    return np.concatenate(batches)[rng.permutation(steps)]


def item_generator(seed, epoch, index):
    """The random numbers of one example in one epoch, whoever asks."""
    return np.random.default_rng((seed, epoch, index))


def training_items(examples, batch_size, seed, epochs, first_step, parts, mine, **options):
    """The (epoch, indices) items of one process from optimizer step `first_step` on.

    Every batch is cut into `parts` equal parts, for processes and accumulation; this process has
    those in `mine`. A part is consecutive, so sorted texts and grouped images stay together.
    options: of `epoch_batches`.
    """
    steps = len(examples) // batch_size
    for epoch in range(first_step // steps, epochs):
        batches = epoch_batches(examples.lengths, batch_size, seed, epoch, **options)
        # the first of these epochs may have begun before
        for batch in batches[max(0, first_step - epoch * steps) :]:
            for part in mine:
                yield epoch, batch.reshape(parts, -1)[part]


class TrainingBatches:
    """(epoch, example indices) -> the batch that the model's loss takes, and the records' "ids".

    pictures: `Images` or `Regions` of `examples.image_keys`. targets(indices, generators): the
    tensors that the task adds. share_images: load an image once for all examples that show it.
    """

    def __init__(self, examples, pictures, targets, seed, augment, share_images):
        self.examples, self.pictures, self.targets = examples, pictures, targets
        self.seed, self.augment, self.share_images = seed, augment, share_images

    def batch(self, item):
        epoch, indices = item
        examples = self.examples
        # draws of an example depend on nothing but seed, epoch and example
        generators = [item_generator(self.seed, epoch, index) for index in indices]
        batch = {"ids": [examples.records[i].id for i in indices]}
        batch["input_ids"], batch["attention_mask"] = pad([examples.tokens[i] for i in indices])

        # image rows, and for each the place in the batch of the example whose draws augment it
        rows, may_flip = examples.image_rows[indices], examples.may_flip[indices]
        first = range(len(indices))
        if self.share_images:
            rows, first, index = np.unique(rows, return_index=True, return_inverse=True)
            # a shared image is mirrored only where all its texts allow it
            may_flip = [may_flip[index == i].all() for i in range(len(rows))]
            batch["image_index"] = torch.from_numpy(index)
        seeds = None
        if self.augment:
            seeds = [generators[i].integers(2**62) for i in first]
        batch.update(self.pictures.batch(rows, may_flip, seeds))
        batch.update(self.targets(indices, generators))
        return batch


class RankingBatches:
    """UC2 on xFlickrCO: for each training caption c of image i four pairs, (i, c), (i, caption of
    another image), (another image, c), (i, hard caption).

    The hard caption belongs to an image of i's pool of similar images (`read_hard_negatives`) or,
    where it has no pool, to any other image. Every one of the images and captions is embedded once;
    image_index and text_index, four entries per training caption, tell which form the pairs.
    `first_image_bug` draws all
    negative captions from the first image of the file, as IGLUE's code does by mistake and its
    published numbers rest on.
    """

    def __init__(self, examples, pictures, seed, pools, first_image_bug=False):
        self.examples, self.pictures, self.seed, self.pools = examples, pictures, seed, pools
        # image row -> its captions, as rows of `examples`
        rows = examples.image_rows
        ends = np.cumsum(np.bincount(rows))
        self.captions_of = np.split(np.argsort(rows, kind="stable"), ends[:-1])
        if len(self.captions_of) < 2:
            raise InputError(f"{examples.source}: captions of one image only; there is nothing to "
                             "tell it from")
        if first_image_bug:
            self.captions_of = self.captions_of[:1] * len(self.captions_of)

    def other_image(self, image, generator):
        # each of the others is as likely: numbers from `image` on stand for the one after them
        other = generator.integers(len(self.captions_of) - 1)
        return other + (other >= image)

    def batch(self, item):
        epoch, indices = item
        examples, images, texts = self.examples, [], []
        for index in indices:
            # the order of these draws matters: they come from one generator
            generator = item_generator(self.seed, epoch, index)
            image = examples.image_rows[index]
            other = self.other_image(image, generator)
            other_caption = generator.choice(self.captions_of[other])
            other_image = self.other_image(image, generator)
            if image in self.pools:
                similar = generator.choice(self.pools[image])
            else:
                similar = self.other_image(image, generator)
            hard_caption = generator.choice(self.captions_of[similar])
            images += [image, image, other_image, image]
            texts += [index, other_caption, index, hard_caption]
        # every image and caption once, and where it stands
        images, image_index = np.unique(images, return_inverse=True)
        texts, text_index = np.unique(texts, return_inverse=True)
        batch = self.pictures.batch(images)
        batch["ids"] = [examples.records[i].id for i in indices]
        batch["image_index"] = torch.from_numpy(image_index)
        batch["text_index"] = torch.from_numpy(text_index)
        batch["input_ids"], batch["attention_mask"] = pad([examples.tokens[i] for i in texts])
        return batch


def read_hard_negatives(data, image_keys):
    """flickr30k/hard_negative.pkl -> {image row: rows of similar images}; {} without such a file.

    train_image_list names the images; train_hard_pool holds for each the positions of the most
    similar ones in that list (as floats), itself first.
    """
    path = os.path.join(data, "flickr30k/hard_negative.pkl")
    if not os.path.isfile(path):
        return {}
    row_of = {key: row for row, key in enumerate(image_keys)}
    similar = {}
    with reading(path), open(path, "rb") as file:
        loaded = ArrayUnpickler(file, encoding="latin-1").load()
        rows = [row_of.get(image_key(name)) for name in loaded["train_image_list"]]
        for row, pool in zip(rows, loaded["train_hard_pool"], strict=True):
            # rows of the images that this run knows: with --limit not all
            others = [rows[int(position)] for position in pool[1:]]
            others = [other for other in others if other is not None]
            if row is not None and others:
                similar[row] = np.array(others)
    return similar


# --------------------------------------------------------------------------------------------------
# Loading ahead in other processes


def load_batches(make, items, workers, device):
    """make(item) of every item, in order, made ahead by worker processes (0: in this one).

    Worker w makes items w, w + workers, … and sends each through a pipe of its own. A pipe ends
    with its worker, so one that dies is noticed at once; and nothing goes through /dev/shm, which
    is small in Docker. InputError if a worker dies; what make(item) raises in it is raised here.
    """
    # workers share the data with this process by forking, which is safe on Linux alone
    if workers == 0 or sys.platform != "linux":
        yield from map(make, items)
        return
    # how this process makes tensors of the arrays that come through the pipes
    rebuild = pinned if device.type == "cuda" else torch.from_numpy
    pipes, processes = [], []
    try:
        for w in range(workers):
            pipe, end = multiprocessing.Pipe(duplex=False)
            pipes.append(pipe)
            process = os.fork()
            if process == 0:
                share = itertools.islice(items, w, None, workers)  # of its own copy of `items`
                pipe.close()  # so that sending fails once the main process is gone
                make_batches(make, share, end, rebuild)
            processes.append(process)
            end.close()  # the worker's is now the only one
        # in the order of the items: from one worker after the other
        for pipe in itertools.cycle(pipes):
            try:
                batch = pickle.loads(pipe.recv_bytes())
            except (EOFError, OSError):
                raise InputError("a loader process died, perhaps for lack of memory: give the "
                                 "machine or container more (Docker: --memory, --shm-size) or use "
                                 "--workers 0; --resume goes on from what was saved") from None
            if batch is None:  # the first worker without a next item: all have ended
                return
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        # also where the caller stops early: the workers would wait for ever
        for process in processes:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def make_batches(make, items, end, rebuild):
    """All that a worker process does, to its end. rebuild(array): makes a tensor of it again."""
    try:
        # signals such as Ctrl-C reach all processes: the main one decides, and ends its workers
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        # a forked process must not use the threads of its parent
        torch.set_num_threads(1)
        for item in items:
            buffer = io.BytesIO()
            pickler = pickle.Pickler(buffer, protocol=5)
            # tensors go as numpy arrays: torch's own way to send them goes through /dev/shm
            pickler.dispatch_table = {torch.Tensor: lambda tensor: (rebuild, (tensor.numpy(),))}
            pickler.dump(make(item))
            end.send_bytes(buffer.getbuffer())
        end.send(None)
    except Exception as error:  # the main process raises it
        end.send(error)
    finally:
        os._exit(0)  # what follows belongs to the main process


def pinned(array):
    """In memory that a GPU can copy from while the program goes on."""
    return torch.from_numpy(array).pin_memory()


# --------------------------------------------------------------------------------------------------
# Targets of a task: what a batch holds beside texts and images


def answer_targets(examples, answer_tokens):
    """CCLM on xGQA: answer_ids [A,L], answer_question [A], answer_weight [A].

    answer_tokens: answer -> token row.
    """

    def targets(indices, generators):
        rows, questions, weights = [], [], []
        for i, index in enumerate(indices):
            for answer, weight in examples.records[index].answers.items():
                rows.append(answer_tokens[answer])
                questions.append(i)
                weights.append(weight)
        if not rows:  # no question of these has an answer: any one, with weight 0
            rows, questions, weights = [next(iter(answer_tokens.values()))], [0], [0.0]
        return {"answer_ids": pad(rows)[0], "answer_question": torch.tensor(questions),
                "answer_weight": torch.tensor(weights)}

    return targets


def class_targets(examples, class_of):
    """UC2 on xGQA and XVNLI: dense targets [B,C] for a binary cross-entropy per class, 1 at every
    answer, all zero where there is none. class_of: answer or label -> class.
    """

    def targets(indices, generators):
        dense = torch.zeros(len(indices), len(class_of))
        for i, index in enumerate(indices):
            record = examples.records[index]
            for name in record.answers or [record.label]:
                if name in class_of:
                    dense[i, class_of[name]] = 1.0
        return {"targets": dense}

    return targets


def label_targets(examples, class_of):
    """CCLM on XVNLI: labels [B]."""

    def targets(indices, generators):
        return {"labels": torch.tensor([class_of[examples.records[i].label] for i in indices])}

    return targets


def contrast_targets(examples):
    """CCLM on xFlickrCO: image_ids [B], and uniform [B,2], the draws of the hard negatives.

    In double precision: as float32 some numbers below 1 would become 1.
    """

    def targets(indices, generators):
        uniform = np.stack([generator.random(2) for generator in generators])
        return {"image_ids": torch.from_numpy(examples.image_rows[indices]),
                "uniform": torch.from_numpy(uniform)}

    return targets
