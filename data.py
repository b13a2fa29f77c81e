"""IGLUE's files on disk -> batches of tensors: readers, tokenizer, images, region features, sampling.

Knows files, not models.

    python data.py --check DIR
        what is there, what is missing and where to get it, what is wrong, per task and language
    python data.py --convert SOURCE... DST
        region features of other formats -> the numpy folder that `Regions` reads

One set of readers serves the real benchmark and the embedded miniature, which is written in the same layout:

    gqa/annotations/        train.json or train_balanced_questions.json or train_target.pkl,
                            valid.json, trainval_ans2label.json, trainval_label2ans.json
    gqa/images/<id>.jpg                 gqa/features/
    xGQA/annotations/few_shot/<language>/{test,dev,train_1 ... train_48}.json (or .pkl)
    XVNLI/annotations/<language>/{train,dev,test,train_1 ... train_48}.jsonl
    flickr30k/annotations/{train_ann,valid_ann}.jsonl, flickr30k/hard_negative.pkl
    flickr30k/flickr30k-images/<id>.jpg flickr30k/features/
    xFlickrCO/annotations/<language>/{test,train_1 ... train_100}.jsonl
    mscoco/val2014/<img_path>           xFlickrCO/features/

Everything random is a pure function of (seed, epoch, item): batches do not depend on the number of
workers or processes, and resuming needs no state.

Letters: B texts, T tokens, I images, R image side, V regions of an image, F feature width.
"""

import argparse
import hashlib
import io
import itertools
import os
import re
import sys
import warnings
from dataclasses import dataclass, field

import numpy as np
import sentencepiece
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop

from files import (
    InputError,
    check_text,
    expect,
    identifier,
    image_key,
    open_array,
    read_bytes,
    read_json,
    read_jsonl,
    read_pickle,
    require_space,
    shorten,
)

LANGUAGES = {"xgqa": ("en", "de", "pt", "ru", "id", "zh", "ko", "bn"),
             "xvnli": ("en", "ar", "es", "fr", "ru"),
             "xflickrco": ("en", "de", "es", "id", "ja", "ru", "tr", "zh")}
# of XLM-R's own sentencepiece.bpe.model
XLMR_SHA256 = "cfc8146abe2a0488e9e2a0c56de7952f7c11ab059eca145a0a727afce0db2865"
BOS, PAD, EOS, UNK = 0, 1, 2, 3  # fairseq's ids, which XLM-R's tables use


# ---------------------------------------------------------------------------------------------------------------------
# Annotation files -> records. One function per format.


@dataclass
class Record:
    """One question, statement or caption."""

    id: str
    image: str  # bare key: no folder, no '.jpg'
    text: str
    answers: dict = field(default_factory=dict)  # xGQA: answer string -> weight
    label: str = ""  # XVNLI: "entailment", "neutral", "contradiction", or "-" where the annotators disagreed
    type: str = ""  # xGQA: verify, query, choose, logical, compare; "" where the file does not tell


def read_gqa(path):
    """GQA and xGQA questions in any of their forms: LXMERT's list (train.json), GQA's and xGQA's
    dict by question id, IGLUE's pickled list.

    In the pickled form answers are label ids (int), in the others strings; `read_file` makes them all strings.
    """
    loaded = read_pickle(path) if str(path).endswith(".pkl") else read_json(path)
    if isinstance(loaded, dict):
        return [gqa_dict_record(key, record, f"{path}, question {key}") for key, record in loaded.items()]
    if isinstance(loaded, list):
        return [gqa_list_record(record, f"{path}, record {number}") for number, record in enumerate(loaded)]
    raise InputError(f"{path}: expected a list of questions or a dict by question id, found {type(loaded).__name__}")


QUESTION_TYPES = ("verify", "query", "choose", "logical", "compare")  # GQA's structural types


def gqa_dict_record(key, record, where):
    text, image, answer = (expect(record, name, str, where) for name in ("question", "imageId", "answer"))
    structural = expect(record["types"], "structural", str, f"{where}, types") if "types" in record else ""
    if structural not in ("", *QUESTION_TYPES):
        raise InputError(f"{where}: the type {shorten(structural)} is none of {', '.join(QUESTION_TYPES)}")
    return Record(identifier(key, where), image_key(image, where), text, {answer: 1.0}, type=structural)


def gqa_list_record(record, where):
    key = identifier(expect(record, "question_id", (str, int), where), where)
    where = f"{where} (question {key})"
    if "sent" in record:
        labels, image, text = expect(record, "label", dict, where), "img_id", "sent"
        if not all(isinstance(answer, str) and check_text(answer, where) for answer in labels):
            raise InputError(f"{where}: 'label' must be a dict by answer")
    else:
        labels, scores = (expect(record, name, list, where) for name in ("labels", "scores"))
        image, text = "image_id", "question"
        if len(labels) != len(scores) or not all(type(label) is int for label in labels):
            raise InputError(f"{where}: 'labels' must be label ids, one per entry of 'scores'")
    # the reference ignores the scores (few-shot items carry 0): each of the different answers weighs the same
    return Record(key, image_key(expect(record, image, (str, int), where), where), expect(record, text, str, where),
                  {answer: 1 / len(set(labels)) for answer in labels})


def read_xvnli(path):
    """XVNLI and SNLI-VE statements, JSON lines. The premise is the image; the text premise is not used."""
    records = []
    for number, record in read_jsonl(path):
        where = f"{path}, line {number}"
        label = expect(record, "gold_label", str, where)
        if label not in ("entailment", "neutral", "contradiction", "-"):
            raise InputError(f"{where}: gold_label {shorten(label)} is none of entailment, neutral, contradiction, -")
        image, text = expect(record, "Flikr30kID", (str, int), where), expect(record, "sentence2", str, where)
        records.append(
            Record(identifier(record.get("pairID", number), where), image_key(image, where), text, label=label))
    return records


def read_captions(path):
    """Flickr30k and xFlickrCO captions, JSON lines, one record per caption."""
    records = []
    for number, record in read_jsonl(path):
        where = f"{path}, line {number}"
        image = image_key(expect(record, "img_path", str, where), where)
        sentences = expect(record, "sentences", list, where)
        if not sentences or not all(isinstance(sentence, str) for sentence in sentences):
            raise InputError(f"{where}: 'sentences' must hold one or more strings, found {shorten(sentences)}")
        records += [Record(f"{image}#{i}", image, check_text(sentence, where)) for i, sentence in enumerate(sentences)]
    return records


READERS = {"xgqa": read_gqa, "xvnli": read_xvnli, "xflickrco": read_captions}
ANNOTATIONS = {  # (task, split) -> possible files, relative to the data folder; {language} and {shots} are filled in
    ("xgqa", "train"): ["gqa/annotations/train.json", "gqa/annotations/train_balanced_questions.json",
                        "gqa/annotations/train_target.pkl"],
    ("xgqa", "valid"): ["gqa/annotations/valid.json", "gqa/annotations/val_target.pkl"],
    ("xgqa", "dev"): ["xGQA/annotations/few_shot/{language}/dev.json", "xGQA/annotations/few_shot/{language}/dev.pkl"],
    ("xgqa", "test"): ["xGQA/annotations/few_shot/{language}/test.json"],
    ("xgqa", "few-shot"): ["xGQA/annotations/few_shot/{language}/train_{shots}.json",
                           "xGQA/annotations/few_shot/{language}/train_{shots}.pkl"],
    ("xvnli", "train"): ["XVNLI/annotations/en/train.jsonl"],
    ("xvnli", "dev"): ["XVNLI/annotations/{language}/dev.jsonl"],
    ("xvnli", "test"): ["XVNLI/annotations/{language}/test.jsonl"],
    ("xvnli", "few-shot"): ["XVNLI/annotations/{language}/train_{shots}.jsonl"],
    ("xflickrco", "train"): ["flickr30k/annotations/train_ann.jsonl"],
    ("xflickrco", "valid"): ["flickr30k/annotations/valid_ann.jsonl"],
    ("xflickrco", "dev"): ["xFlickrCO/annotations/{language}/dev.jsonl"],
    ("xflickrco", "test"): ["xFlickrCO/annotations/{language}/test.jsonl"],
    ("xflickrco", "few-shot"): ["xFlickrCO/annotations/{language}/train_{shots}.jsonl"],
}


def annotation_file(data, task, split, language="en", shots=None):
    """Path of a split's file; InputError naming what was looked for."""
    names = [name.format(language=language, shots=shots) for name in ANNOTATIONS[task, split]]
    for name in names:
        if os.path.isfile(os.path.join(data, name)):
            return os.path.join(data, name)
    raise InputError(f"{data}: no {' or '.join(names)}; `python data.py --check {data}` lists what is missing and "
                     "where to get it")


def read_records(data, task, split, language="en", shots=None):
    """-> (path of the file, its records). Answers are strings, whatever the file holds."""
    path = annotation_file(data, task, split, language, shots)
    return path, read_file(path, task, read_labels(data) if path.endswith(".pkl") else None)


def read_file(path, task, labels):
    """Records of one annotation file. labels: GQA's answers, whose ids IGLUE's pickled questions hold; None: they stay.
    """
    records = READERS[task](path)
    if not records:
        raise InputError(f"{path}: no records")
    if labels and path.endswith(".pkl"):
        for record in records:
            unknown = [label for label in record.answers if not 0 <= label < len(labels)]
            if unknown:
                raise InputError(f"{path}, question {record.id}: there is no label {unknown[0]}; the label map has 0 "
                                 f"to {len(labels) - 1}")
            record.answers = {labels[label]: weight for label, weight in record.answers.items()}
    return records


def read_labels(data):
    """GQA's 1,842 answers in the order of their label ids.

    The file's key order means nothing; both files must agree.
    """
    folder = os.path.join(data, "gqa", "annotations")
    path = os.path.join(folder, "trainval_ans2label.json")
    ids = read_json(path)
    if (not isinstance(ids, dict) or not ids
            or sorted(v for v in ids.values() if type(v) is int) != list(range(len(ids)))):
        raise InputError(f"{path}: expected a dict from every answer to its label id: 0, 1, 2, …, each once")
    labels = [check_text(answer, path) for answer in sorted(ids, key=ids.get)]
    if not all(answer.strip() for answer in labels):
        raise InputError(f"{path}: has an empty answer")
    other = os.path.join(folder, "trainval_label2ans.json")
    if os.path.isfile(other) and read_json(other) != labels:
        raise InputError(f"{other}: is not the inverse of {path}")
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# Text


def clean_question(text, max_words):
    """CCLM's clean-up of questions: lower case, ASCII punctuation to spaces (not collapsed), the first words."""
    return " ".join(strip_punctuation(text).rstrip(" ").split(" ")[:max_words])


def clean_caption(text, max_words):
    """CCLM's clean-up of captions and statements: as for questions, and spaces collapsed. May be empty."""
    text = re.sub(r"\s{2,}", " ", strip_punctuation(text).replace("<person>", "person"))
    return " ".join(text.rstrip("\n").strip(" ").split(" ")[:max_words])


def strip_punctuation(text):
    return text.lower().translate(str.maketrans(dict.fromkeys(",.'!?\"()*#:;~-/", " ")))


class Ragged:
    """Rows of different lengths in one flat array (a list of a million small arrays would be
    slow to build and to share with workers).
    """

    def __init__(self, rows):
        self.lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        self.ends = self.lengths.cumsum()
        self.values = np.fromiter((value for row in rows for value in row), dtype=np.int32,
                                  count=int(self.lengths.sum()))

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        return self.values[self.ends[i] - self.lengths[i] : self.ends[i]]


class Tokenizer:
    """XLM-R's tokenizer: a sentencepiece model with fairseq's ids.

    <s> 0, <pad> 1, </s> 2, <unk> 3, piece s of the model s + 1, <mask> last.
    """

    longest = 512  # tokens of a text that the model has positions for

    def __init__(self, path):
        content = read_bytes(path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self.model = sentencepiece.SentencePieceProcessor()
            self.model.LoadFromSerializedProto(content)
        except (RuntimeError, OSError):
            raise InputError(f"{path}: not a sentencepiece model, or a truncated one") from None
        if (self.model.unk_id(), self.model.bos_id(), self.model.eos_id()) != (0, 1, 2):
            raise InputError(f"{path}: not a tokenizer of XLM-R's kind (its <unk>, <s>, </s> must be pieces 0, 1, 2)")
        self.path, self.mask, self.vocabulary = path, self.model.vocab_size() + 1, self.model.vocab_size() + 2

    def __call__(self, texts, max_tokens=None):
        """Texts -> Ragged rows <s> … </s>; a row longer than max_tokens keeps its first
        max_tokens - 2 pieces and both ends.
        """
        limit = None if max_tokens is None else max_tokens - 2
        return Ragged([[BOS, *(piece + 1 if piece else UNK for piece in pieces[:limit]), EOS]
                       for pieces in self.model.encode(list(texts))])

    def check(self, expected_sha256, vocabulary):
        """InputError if the checkpoint has another vocabulary; a line of warning, or None, if
        only the file differs from the known one.
        """
        if self.vocabulary != vocabulary:
            raise InputError(f"{self.path}: a tokenizer of {self.vocabulary:,} ids, but the checkpoint embeds "
                             f"{vocabulary:,}: it belongs to another model")
        if self.sha256 != expected_sha256:
            return (f"{self.path}: sha256 {self.sha256[:12]}… is not the known {str(expected_sha256)[:12]}…: "
                    "ids may differ from those of pre-training")
        return None


def pad(rows):
    """Token rows -> input_ids and attention_mask [B,T] (int64), padded to the longest."""
    input_ids = np.full((len(rows), max(map(len, rows))), PAD, dtype=np.int64)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = row
    return torch.from_numpy(input_ids), torch.from_numpy((input_ids != PAD).astype(np.int64))


# ---------------------------------------------------------------------------------------------------------------------
# Images: JPEG -> uint8 [3,R,R]; normalisation happens on the device


def image_path(data, task, key):
    if task == "xgqa":
        return os.path.join(data, "gqa", "images", f"{key}.jpg")
    folder = os.path.join("mscoco", "val2014") if "COCO" in key else os.path.join("flickr30k", "flickr30k-images")
    return os.path.join(data, folder, f"{key}.jpg")


def read_image(path):
    """-> RGB image. InputError naming the file where it is missing, corrupt, truncated or of more than 8 bits."""
    content = read_bytes(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # more than 89 million pixels
            with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "GIF", "BMP", "WEBP")) as image:
                mode, converted = image.mode, image.convert("RGB")
    except Exception as error:  # a damaged image can raise anything
        raise InputError(f"{path}: not a readable image, or a truncated one ({type(error).__name__})") from None
    if mode.startswith(("I", "F")):  # convert cuts what is above 255, and the image turns white
        raise InputError(f"{path}: more than 8 bits per pixel and channel (mode {mode}); save it as an 8-bit image")
    return converted


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [R,R,3] -> [3,R,R]


def resize(image, size):
    """Evaluation: to size x size, bicubic, aspect ratio not kept."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


def augment(image, size, flip):
    """Training: flip half of the time where allowed, a random crop of 50-100 % of the area, two random operations.

    Draws from torch's generator.
    """
    if flip and torch.rand(()) < 0.5:
        image = TF.horizontal_flip(image)
    image = RandomResizedCrop((size, size), scale=(0.5, 1.0), interpolation=InterpolationMode.BICUBIC)(image)
    for choice in torch.randint(len(OPERATIONS), (2,)).tolist():
        if torch.rand(()) < 0.5:
            sign = 1 if torch.rand(()) < 0.5 else -1
            image = OPERATIONS[choice](image, sign)
    return image


def warp(image, angle=0.0, translate=(0, 0), shear=(0.0, 0.0), center=None):
    return TF.affine(image, angle, list(translate), 1.0, list(shear), InterpolationMode.BILINEAR,
                     [128, 128, 128], center)


SHEAR = float(np.degrees(np.arctan(0.21)))
OPERATIONS = [  # the reference's RandomAugment(2, 7): strength 7 of 10, the sign at random
    lambda image, sign: image,
    lambda image, sign: TF.autocontrast(image),
    lambda image, sign: TF.equalize(image),
    lambda image, sign: TF.adjust_brightness(image, 1.36),
    lambda image, sign: TF.adjust_sharpness(image, 1.36),
    lambda image, sign: warp(image, shear=(sign * SHEAR, 0.0), center=[0, 0]),
    lambda image, sign: warp(image, shear=(0.0, sign * SHEAR), center=[0, 0]),
    lambda image, sign: warp(image, translate=(sign * 7, 0)),
    lambda image, sign: warp(image, translate=(0, sign * 7)),
    lambda image, sign: warp(image, angle=sign * 21.0),
]


class Images:
    """The images of a split by row.

    With a cache folder, each is decoded and resized once, to a memory-mapped uint8 file [I,R,R,3].

    Training crops are then taken from the resized image and not from the original: a
    little blurrier, several times faster.
    """

    def __init__(self, data, task, keys, size, cache=None, progress=lambda rows: rows):
        self.keys, self.size = keys, size
        self.paths = [image_path(data, task, key) for key in keys]
        missing = [path for path in self.paths if not os.path.isfile(path)]
        if missing:
            raise InputError(f"{missing[0]}: no such image ({len(missing):,} of {len(keys):,} are missing)")
        self.cached = None
        if cache:
            # a replaced image has another size or time, and so another cache
            found = [(path, os.stat(path)) for path in self.paths]
            lines = [str(size), *(f"{path} {file.st_size} {file.st_mtime_ns}" for path, file in found)]
            name = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
            file = os.path.join(cache, f"images-{size}-{name}.npy")
            shape = (len(keys), size, size, 3)
            if not os.path.isfile(file):
                self.write_cache(file, shape, progress)
            self.cached = open_array(file, shape, (np.uint8,))

    def write_cache(self, file, shape, progress):
        part = f"{file}.part-{os.getpid()}"  # several processes may do this at once
        try:
            os.makedirs(os.path.dirname(file), exist_ok=True)
            require_space(os.path.dirname(file), int(np.prod(shape)))
            array = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
            for row in progress(range(len(self.keys))):
                array[row] = np.asarray(resize(read_image(self.paths[row]), self.size))
            array.flush()
            os.replace(part, file)
        except OSError as error:
            raise InputError(f"{file}: cannot be written ({error.strerror or error})") from None
        finally:
            if os.path.exists(part):
                os.remove(part)

    def __len__(self):
        return len(self.keys)

    def batch(self, rows, flips=None, seeds=None):
        """{"images": uint8 [I,3,R,R]}; augmented where `seeds` (one per image) are given,
        flipped only where `flips` allows it.
        """
        images = []
        for i, row in enumerate(rows):
            image = read_image(self.paths[row]) if self.cached is None else Image.fromarray(self.cached[row])
            if seeds is None:
                images.append(to_tensor(resize(image, self.size)))
            else:
                with torch.random.fork_rng(devices=[]):  # the image's own draws, whoever loads it
                    torch.manual_seed(seeds[i])
                    images.append(to_tensor(augment(image, self.size, flips[i])))
        return {"images": torch.stack(images)}


# ---------------------------------------------------------------------------------------------------------------------
# Region features: what UC2 sees of an image


def feature_folder(data, task, split):
    """xFlickrCO's test images (and, in the miniature, dev images) have a folder of their own."""
    if task == "xflickrco" and split in ("test", "dev"):
        return os.path.join(data, "xFlickrCO", "features")
    return os.path.join(data, "gqa" if task == "xgqa" else "flickr30k", "features")


def locations(boxes, sizes):
    """Boxes x1,y1,x2,y2 in pixels [I,V,4] and image sizes w,h [I,2] -> x1/w, y1/h, x2/w, y2/h,
    width, height, area: [I,V,7] float32.
    """
    width, height = (sizes[:, None, i].astype(np.float32) for i in (0, 1))
    x1, y1, x2, y2 = (boxes[..., i].astype(np.float32) for i in range(4))
    columns = [x1 / width, y1 / height, x2 / width, y2 / height]
    columns += [columns[2] - columns[0], columns[3] - columns[1], (x2 - x1) * (y2 - y1) / (width * height)]
    return np.stack(columns, axis=-1)


class Regions:
    """Region features of the images of a split, from a folder that `data.py --convert` wrote (memory-mapped float16).

    meta.json {"format": 1, "count", "boxes", "dim", "complete": true}, ids.txt, features.npy [N,V,F], boxes.npy
    [N,V,4] pixels, sizes.npy [N,2] w,h; with different numbers of regions: features [sum,F], boxes [sum,4],
    offsets.npy [N+1]; the first `boxes` of each image are used.
    """

    def __init__(self, folder, keys):
        self.folder, self.keys = folder, keys
        if not os.path.isdir(folder):
            raise InputError(
                f"{folder}: no such folder of region features; `python data.py --convert SOURCE {folder}` writes one")
        where = os.path.join(folder, "meta.json")
        meta = read_json(where)
        if not isinstance(meta, dict) or meta.get("complete") is not True:
            raise InputError(
                f"{folder}: incomplete (meta.json does not say \"complete\": true); convert the features again")
        count, self.boxes, self.dim = (expect(meta, name, int, where) for name in ("count", "boxes", "dim"))
        if meta.get("format") != 1 or min(count, self.boxes, self.dim) < 1:
            raise InputError(f"{where}: expected \"format\": 1 and positive \"count\", \"boxes\", \"dim\"")
        self.row_of = self.read_ids(count)
        self.offsets, total = None, (count, self.boxes)
        if os.path.isfile(os.path.join(folder, "offsets.npy")):
            self.offsets = self.array("offsets.npy", (count + 1,), np.int64)
            # compared, not subtracted: differences of the largest numbers would wrap around
            if self.offsets[0] != 0 or (self.offsets[1:] <= self.offsets[:-1]).any():
                raise InputError(f"{folder}/offsets.npy: must start at 0 and grow with every image")
            if self.boxes > np.diff(self.offsets).max():
                raise InputError(f"{where}: \"boxes\" is {shorten(self.boxes)}, but by offsets.npy no image has more "
                                 f"than {np.diff(self.offsets).max():,} regions")
            total = (int(self.offsets[-1]),)
        self.features = self.array("features.npy", (*total, self.dim), np.float16, np.float32)
        self.box_array = self.array("boxes.npy", (*total, 4), np.float32)
        self.sizes = self.array("sizes.npy", (count, 2), np.int32)
        empty = (self.sizes < 1).any(1)
        if empty.any():
            raise InputError(
                f"{folder}/sizes.npy: image {list(self.row_of)[empty.argmax()]} has no positive width and height")
        missing = [key for key in keys if key not in self.row_of]
        if missing:
            raise InputError(f"{folder}: no features of image {missing[0]} ({len(missing):,} of {len(keys):,} images "
                             "are missing)")
        self.rows = np.array([self.row_of[key] for key in keys], dtype=np.int64)

    def read_ids(self, count):
        """ids.txt -> {image key: row}."""
        path = os.path.join(self.folder, "ids.txt")
        try:
            ids = read_bytes(path).decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
        row_of = {image: row for row, image in enumerate(ids)}
        if len(row_of) != count or len(ids) != count:
            raise InputError(
                f"{path}: {len(ids):,} ids, {len(row_of):,} of them different, but meta.json says {count:,}")
        return row_of

    def array(self, name, shape, *types):
        return open_array(os.path.join(self.folder, name), shape, types)

    def __len__(self):
        return len(self.keys)

    def batch(self, rows, flips=None, seeds=None):
        """{"features": float16 [I,V,F], "locations": [I,V,7], "region_mask": [I,V]}.

        InputError naming an image whose numbers are not finite.
        """
        images, rows = rows, self.rows[rows]
        if self.offsets is None:
            features, boxes = self.features[rows], self.box_array[rows]
            mask = np.ones(boxes.shape[:2], dtype=np.int64)
        else:
            counts = np.minimum(self.offsets[rows + 1] - self.offsets[rows], self.boxes)
            features = np.zeros((len(rows), int(counts.max()), self.dim), dtype=self.features.dtype)
            boxes, mask = np.zeros((*features.shape[:2], 4), np.float32), np.zeros(features.shape[:2], np.int64)
            for i, (row, count) in enumerate(zip(rows, counts)):
                start = self.offsets[row]
                features[i, :count] = self.features[start : start + count]
                boxes[i, :count] = self.box_array[start : start + count]
                mask[i, :count] = 1
        with np.errstate(over="ignore", invalid="ignore"):
            # zero where an image is padded
            place = locations(boxes, self.sizes[rows]) * mask[..., None].astype(np.float32)
        if not (all_finite(features) and all_finite(place)):
            bad = next(image for image, *numbers in zip(images, features, place) if not all(map(all_finite, numbers)))
            raise InputError(f"{self.folder}: the features or boxes of image {self.keys[bad]} are not finite")
        return {"features": torch.from_numpy(np.ascontiguousarray(features)), "locations": torch.from_numpy(place),
                "region_mask": torch.from_numpy(mask)}


def all_finite(array):
    if array.dtype == np.float16:  # all bits of the exponent set, several times faster than isfinite
        return (array.view(np.uint16) & 0x7C00).max() < 0x7C00
    return np.isfinite(array).all()


# ---------------------------------------------------------------------------------------------------------------------
# A split in one language, tokenised once


@dataclass
class TextRules:
    """How one model reads texts for one task: clean-up ("question", "caption" or "" for
    none) and limits; None is no limit.
    """

    clean: str
    train_words: int | None
    test_words: int | None
    train_tokens: int | None
    test_tokens: int | None

    def prepare(self, texts, training):
        words = self.train_words if training else self.test_words
        clean = {"question": clean_question, "caption": clean_caption}.get(self.clean)
        return [clean(text, words) for text in texts] if clean else texts


def text_rules(recipe):
    return TextRules(recipe.clean, recipe.train_words, recipe.test_words, recipe.train_tokens, recipe.test_tokens)


class Examples:
    """Records of one file as columns: ids, image rows, token rows; and the answers or labels they came with.

    Without those that `keep(cleaned text, record)` refuses.
    """

    def __init__(self, source, records, rules, tokenizer, training, keep=lambda text, record: True):
        texts = rules.prepare([record.text for record in records], training)
        kept = [keep(text, record) for text, record in zip(texts, records)]
        records, texts = (list(itertools.compress(column, kept)) for column in (records, texts))
        if not records:
            raise InputError(f"{source}: no records with text (or, to train on XVNLI, a label)")
        self.source, self.records = source, records
        self.image_keys = list(dict.fromkeys(record.image for record in records))
        row_of = {key: row for row, key in enumerate(self.image_keys)}
        self.image_rows = np.array([row_of[record.image] for record in records])
        self.tokens = tokenizer(texts, rules.train_tokens if training else rules.test_tokens)
        for i in np.flatnonzero(self.tokens.lengths > tokenizer.longest)[:1]:
            raise InputError(f"{source}, {records[i].id}: {self.tokens.lengths[i]:,} tokens, the model has positions "
                             f"for {tokenizer.longest}")
        # a mirrored image would make an answer about sides wrong (English words, as in the reference)
        self.may_flip = np.array(
            [not any(side in text for side in ("left", "right") for text in (record.text, *map(str, record.answers)))
             for record in records])

    def __len__(self):
        return len(self.records)


def load_examples(data, task, split, rules, tokenizer, language="en", shots=None, training=False,
                  keep=lambda text, record: True, limit=None):
    """Examples of one split in one language: of its first `limit` records."""
    source, records = read_records(data, task, split, language, shots)
    return Examples(source, records[:limit], rules, tokenizer, training, keep)


def check_answers(examples, labels):
    """InputError for training questions whose answer is no label, and where none has an answer.

    Some may have none, as GQA's format allows: both models then learn from the others of the batch.
    """
    if not any(record.answers for record in examples.records):
        raise InputError(f"{examples.source}: none of {len(examples):,} questions has an answer to train on")
    known = set(labels)
    unknown = [(record.id, answer) for record in examples.records for answer in record.answers if answer not in known]
    if unknown:
        raise InputError(f"{examples.source}, question {unknown[0][0]}: the answer {unknown[0][1]!r} is not among the "
                         f"{len(labels):,} labels ({len(unknown):,} such questions)")


# ---------------------------------------------------------------------------------------------------------------------
# Which examples, in which order: pure functions of (seed, epoch)


def epoch_batches(lengths, batch_size, seed, epoch, pool=16, groups=None, group_size=None):
    """Batches of one epoch, example indices [steps, batch_size]; what does not fill a batch is
    left out, a different rest in every epoch.

    Texts of similar length share a batch: `pool` batches at a time are drawn at random, sorted by length, cut, and
    shuffled. With `groups` (the image row of every example) up to `group_size` examples of one image stay together
    instead. The batches do not depend on processes or workers.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    steps = len(order) // batch_size
    used = steps * batch_size
    if groups is not None:
        order = order[np.argsort(groups[order], kind="stable")]  # by image, shuffled within
        starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
        position = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
        parts = np.split(order, np.flatnonzero(position % group_size == 0)[1:])
        order = np.concatenate([parts[i] for i in rng.permutation(len(parts))])
        return order[:used].reshape(steps, batch_size)
    batches = []
    for drawn in np.split(order[:used], range(pool * batch_size, used, pool * batch_size)):
        drawn = drawn[np.argsort(lengths[drawn], kind="stable")].reshape(-1, batch_size)
        batches += list(drawn[rng.permutation(len(drawn))])
    return np.stack([batches[i] for i in rng.permutation(steps)])


def item_generator(seed, epoch, index):
    """The random numbers of one example in one epoch, whoever asks."""
    return np.random.default_rng((seed, epoch, int(index)))


class TrainingBatches(torch.utils.data.Dataset):
    """(epoch, example indices) -> the batch of tensors that the model's loss takes, and the records' ids under "ids".

    pictures: `Images` or `Regions` of `examples.image_keys`; targets: function (indices, generators) -> dict
    of tensors that adds what the task needs; share_images: load an image once for all examples of the batch
    that show it (always so for region features).
    """

    def __init__(self, examples, pictures, targets, seed, augment, share_images):
        self.examples, self.pictures, self.targets, self.seed = examples, pictures, targets, seed
        self.augment, self.share_images = augment, share_images

    def __getitem__(self, item):
        try:
            return self.batch(*item)
        except InputError as error:  # an exception would reach the main process as a traceback in a string
            return error

    def batch(self, epoch, indices):
        examples, generators = self.examples, [item_generator(self.seed, epoch, index) for index in indices]
        batch = {"ids": [examples.records[i].id for i in indices]}
        batch["input_ids"], batch["attention_mask"] = pad([examples.tokens[i] for i in indices])
        rows, flips, first = examples.image_rows[indices], examples.may_flip[indices], range(len(indices))
        if self.share_images:
            rows, first, index = np.unique(rows, return_index=True, return_inverse=True)
            flips = [flips[index == i].all() for i in range(len(rows))]
            batch["image_index"] = torch.from_numpy(index)
        seeds = [int(generators[i].integers(2**62)) for i in first] if self.augment else None
        batch.update(self.pictures.batch(rows, flips, seeds))
        batch.update(self.targets(indices, generators))
        return batch


class RankingBatches(TrainingBatches):
    """UC2 on xFlickrCO: for each caption c of image i the four pairs (i, c), (i, caption of another
    image), (another image, c), (i, hard caption).

    The hard caption belongs to an image of i's pool of similar images (IGLUE's hard_negative.pkl) or, where there is no
    pool, to any other image. Every image and caption of the batch is embedded once; image_index and text_index [4B] say
    which of them form the pairs. `first_image_bug` draws all negative captions from the first image of the file, as
    IGLUE's code does by mistake and its published numbers rest on.
    """

    def __init__(self, examples, pictures, seed, pools, first_image_bug=False):
        super().__init__(examples, pictures, None, seed, augment=False, share_images=True)
        rows = examples.image_rows
        # image row -> its captions
        self.captions_of = np.split(np.argsort(rows, kind="stable"), np.cumsum(np.bincount(rows))[:-1])
        self.pools, self.first_image_bug = pools, first_image_bug
        if len(self.captions_of) < 2:
            raise InputError(f"{examples.source}: captions of one image only; there is nothing to tell it from")

    def caption(self, image, generator):
        return int(generator.choice(self.captions_of[0 if self.first_image_bug else image]))

    def other_image(self, image, generator):
        other = int(generator.integers(len(self.captions_of) - 1))
        return other + (other >= image)

    def batch(self, epoch, indices):
        images, texts = [], []
        for index in indices:
            generator, image = item_generator(self.seed, epoch, index), int(self.examples.image_rows[index])
            random_caption = self.caption(self.other_image(image, generator), generator)
            random_image = self.other_image(image, generator)
            pool = self.pools.get(image)
            hard = int(generator.choice(pool)) if pool is not None else self.other_image(image, generator)
            images += [image, image, random_image, image]
            texts += [int(index), random_caption, int(index), self.caption(hard, generator)]
        images, image_index = np.unique(images, return_inverse=True)
        texts, text_index = np.unique(texts, return_inverse=True)
        batch = {"ids": [self.examples.records[i].id for i in indices], "image_index": torch.from_numpy(image_index),
                 "text_index": torch.from_numpy(text_index)}
        batch["input_ids"], batch["attention_mask"] = pad([self.examples.tokens[i] for i in texts])
        return batch | self.pictures.batch(images)


def read_hard_negatives(data, image_keys):
    """flickr30k/hard_negative.pkl -> {image row: rows of similar images}; empty where there is no such file.

    train_image_list names the images, train_hard_pool holds for each the positions of
    the most similar ones, itself first.
    """
    path = os.path.join(data, "flickr30k", "hard_negative.pkl")
    if not os.path.isfile(path):
        return {}
    loaded = read_pickle(path)
    names, pools = expect(loaded, "train_image_list", list, path), expect(loaded, "train_hard_pool", list, path)
    if len(names) != len(pools):
        raise InputError(f"{path}: {len(names):,} images in train_image_list, but {len(pools):,} pools in "
                         "train_hard_pool")
    row_of = {key: row for row, key in enumerate(image_keys)}
    rows = [row_of.get(image_key(name, path)) for name in names]
    similar = {}
    for name, row, pool in zip(names, rows, pools):
        if not isinstance(pool, list) or not all(is_position(i, len(names)) for i in pool):
            raise InputError(f"{path}: the pool of image {shorten(name)} must be a list of positions in "
                             "train_image_list")
        similar[row] = np.array([rows[int(i)] for i in pool[1:] if rows[int(i)] is not None], dtype=np.int64)
    return {row: pool for row, pool in similar.items() if row is not None and len(pool)}


def is_position(value, length):
    """The reference's file has the positions as floats."""
    return isinstance(value, (int, float)) and 0 <= value < length and value == int(value)


def training_items(examples, batch_size, seed, epochs, first_step, parts, mine, **order):
    """The (epoch, indices) items of one process from optimizer step `first_step` on: of each batch's `parts` equal
    parts (for processes and accumulation) those in `mine`. They are consecutive, so sorted texts and grouped images
    stay together.
    """
    steps = len(examples) // batch_size
    for epoch in range(first_step // steps, epochs):
        batches = epoch_batches(examples.tokens.lengths, batch_size, seed, epoch, **order)
        for batch in batches[max(0, first_step - epoch * steps) :]:
            for part in mine:
                yield epoch, batch.reshape(parts, -1)[part]


def load_batches(dataset, items, workers, device):
    """Batches of `dataset` for `items`, made ahead by worker processes (0: in this one).

    InputError of a worker is raised here.
    """
    # forked workers share the data, memory-mapped files and functions in it included; others would have to pickle it
    options = {"prefetch_factor": 4, "multiprocessing_context": "fork"} if workers else {}
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=items, num_workers=workers,
                                         pin_memory=device.type == "cuda", **options)
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Targets of a task: what a batch holds beside texts and images


def answer_targets(examples, answer_tokens):
    """CCLM on xGQA: answer_ids [A,L], answer_question [A], answer_weight [A]. answer_tokens: string -> token row."""

    def targets(indices, generators):
        answers = [(i, *pair) for i, index in enumerate(indices) for pair in examples.records[index].answers.items()]
        # a batch in which no question has an answer: the model cannot score none, so one that weighs nothing
        answers = answers or [(0, next(iter(answer_tokens)), 0.0)]
        return {"answer_ids": pad([answer_tokens[answer] for _, answer, _ in answers])[0],
                "answer_question": torch.tensor([i for i, _, _ in answers]),
                "answer_weight": torch.tensor([weight for _, _, weight in answers])}

    return targets


def class_targets(examples, class_of):
    """Dense targets [B,classes] for a binary cross-entropy per class (UC2): 1 at the answer, all zero
    where there is none. class_of: string -> id.
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
    return lambda indices, generators: {"labels": torch.tensor([class_of[examples.records[i].label] for i in indices])}


def contrast_targets(examples):
    """CCLM on xFlickrCO: image_ids [B], and uniform [B,2], the draws of the hard negatives.

    In double precision: as float32 some numbers below 1 would become 1.
    """
    return lambda indices, generators: {"image_ids": torch.from_numpy(examples.image_rows[indices]),
                                        "uniform": torch.from_numpy(np.stack([g.random(2) for g in generators]))}


# ---------------------------------------------------------------------------------------------------------------------
# Command line: the work is in prepare.py


def main(argv=None):
    parser = argparse.ArgumentParser(description="Check a folder of IGLUE's files, or convert region features.")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", metavar="DIR",
                      help="list what is there, what is missing and where to get it, what is wrong")
    what.add_argument("--convert", nargs="+", metavar="PATH",
                      help="SOURCE... DST: write the region features of H5 files, TSV files and folders of npy files "
                           "to a new folder")
    parser.add_argument("--json", action="store_true", help="with --check: print JSON")
    parser.add_argument("--tokenizer", metavar="FILE", help="with --check: is this XLM-R's own "
                                                            "sentencepiece.bpe.model?")
    parser.add_argument("--boxes", type=int, metavar="N",
                        help="with --convert: most regions used per image (default: all where every "
                                                               "image has as many, else 36)")
    args = parser.parse_args(argv)
    if args.boxes is not None and (args.boxes < 1 or not args.convert):
        parser.error("--boxes N goes with --convert, and N must be positive")
    if args.convert and (args.json or args.tokenizer or len(args.convert) < 2):
        parser.error("--convert takes one or more sources and a new folder, and no --json or --tokenizer")
    import prepare

    try:
        if args.convert:
            prepare.convert(args.convert[:-1], args.convert[-1], args.boxes)
        else:
            sys.exit(prepare.check(args.check, args.tokenizer, args.json))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    import data  # and not __main__: prepare.py imports this file under its name, and its InputError is the one to catch

    data.main()
