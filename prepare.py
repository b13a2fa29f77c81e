"""Prepare what a user brings: check a folder of IGLUE's files, convert region features. Run through data.py:

    python data.py --check DIR [--json] [--tokenizer FILE]
        what is there, what is missing and where to get it, what is wrong
    python data.py --convert SOURCE... DST [--boxes N]
        region features (H5, TSV, npy) -> the folder that `data.Regions` reads

--check reads every annotation file with the readers that training uses, compares the languages and the splits with each
other, looks up every image of every file by name, and opens a sample of the images and region features of every split.
It exits with 1 if something that is there is broken or contradicts something else, with 0 otherwise: what is missing,
and counts that differ from the published ones, are told and are no error. With GQA's 943,000 and XVNLI's 541,000
training records it takes half a minute on one core and 2.4 GB.

--convert streams: it holds one image at a time, and writes 147,456 bytes for an image of 36 regions of
width 2,048 (10.6 GB for GQA's training images), 540 images per second on one core from a TSV file. The
folder appears under its name when it is complete.

Letters: V regions of an image, F feature width, N images.
"""

import base64
import glob
import io
import itertools
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

import data
import files
from files import InputError

# ---------------------------------------------------------------------------------------------------------------------
# What the published files hold, and where they are to be had

# (task, split or "shots K") -> (records, images); a range where only bounds are known, None: unknown
PUBLISHED = {
    ("xgqa", "train"): (943_000, None), ("xgqa", "valid"): (132_062, None),
    ("xgqa", "dev"): (1_422, 50), ("xgqa", "test"): (9_666, 300),
    ("xgqa", "shots 1"): (27, 1), ("xgqa", "shots 5"): (155, 5), ("xgqa", "shots 10"): (317, 10),
    ("xgqa", "shots 20"): (594, 20), ("xgqa", "shots 25"): (704, 25), ("xgqa", "shots 48"): (1_490, 48),
    ("xvnli", "train"): (range(540_865, 540_897), None), ("xvnli", "dev"): (range(17_409, 18_433), None),
    ("xvnli", "test"): (1_164, 357),
    ("xvnli", "shots 1"): (3, 1), ("xvnli", "shots 5"): (18, 5), ("xvnli", "shots 10"): (39, 10),
    ("xvnli", "shots 20"): (75, 20), ("xvnli", "shots 25"): (90, 25), ("xvnli", "shots 48"): (168, 48),
    ("xflickrco", "train"): (145_000, 29_000), ("xflickrco", "valid"): (5_070, 1_014),
    ("xflickrco", "test"): (2_000, 2_000),
}
LABELS, WITHOUT_LABEL = 1_842, 14  # GQA's answers; statements of XVNLI's test without a gold label
CUT_DOWN, TEST_DEV = 1_944, 12_578  # questions of GQA's testdev_balanced_questions.json: in IGLUE's copy, and in truth
TRAP, ENGLISH_TEST = "gqa/annotations/testdev_balanced_questions.json", "xGQA/annotations/few_shot/en/test.json"
IMAGE_BYTES = 147_456  # of 36 regions of width 2,048 in float16
UNITS = {"xgqa": "questions", "xvnli": "statements", "xflickrco": "captions"}
NAMES = {"xgqa": "xGQA", "xvnli": "XVNLI", "xflickrco": "xFlickrCO"}

IGLUE = "the IGLUE repository, github.com/e-bug/iglue"
FEATURES = ("IGLUE's README links the files (ERDA share links; H5, 36 boxes per image); "
            "then `python data.py --convert FILE.h5 FOLDER`")
SOURCES = {  # beginning of a path -> where to get what belongs there; the first that fits
    "gqa/annotations/train.json": f"{IGLUE}: unzip train.json.zip; or train_balanced_questions.json from GQA's site",
    "gqa/images": "GQA's site, cs.stanford.edu/people/dorarad/gqa: the images, 20 GB",
    "xGQA/annotations": f"{IGLUE}; or the xGQA repository, github.com/adapter-hub/xGQA",
    "XVNLI/annotations/en/train.jsonl": f"{IGLUE}: unzip train.jsonl.zip",
    "flickr30k/flickr30k-images": "Flickr30k's request form, linked in IGLUE's README",
    "mscoco/val2014": "MS COCO's site, linked in IGLUE's README: the 2014 validation images",
    "gqa/features": FEATURES, "flickr30k/features": FEATURES, "xFlickrCO/features": FEATURES,
    "": IGLUE,
}


# ---------------------------------------------------------------------------------------------------------------------
# Check


@dataclass
class Finding:
    """One line of a report."""

    level: str  # "error": broken or contradictory; "missing": not there; "note": worth knowing
    task: str  # "xgqa", …, or "" for what belongs to no task
    text: str
    split: str = ""  # and languages: of the files concerned
    languages: list = field(default_factory=list)
    source: str = ""  # of what is missing


@dataclass
class Report:
    """All that a check finds."""

    folder: str
    findings: list = field(default_factory=list)
    # task -> language -> split or "shots K" -> {"file", "records", "images"}
    counts: dict = field(default_factory=dict)
    pictures: dict = field(default_factory=dict)  # task -> "images" or "regions" -> folder -> {image: (needed, there)}
    labels: int | None = None  # number of GQA's answers
    tokenizer: dict | None = None
    runs: dict = field(default_factory=dict)  # "cclm xgqa" -> [what stands in its way]

    def add(self, level, task, text, split="", language=""):
        """What is true of a split in several languages becomes one finding. What is missing: its path comes first."""
        text = files.one_line(text)
        found = next((found for found in self.findings
                      if (found.level, found.task, found.split, found.text) == (level, task, split, text)), None)
        if found is None:
            sources = (source for beginning, source in SOURCES.items() if text.startswith(beginning))
            found = Finding(level, task, text, split, source=next(sources) if level == "missing" else "")
            self.findings.append(found)
        if language:
            found.languages.append(language)

    def attempt(self, task, read, *arguments):
        """-> read(*arguments), or None where that is an InputError, which becomes a finding."""
        try:
            return read(*arguments)
        except InputError as error:
            self.add("error", task, str(error))
            return None

    def broken(self):
        return any(finding.level == "error" for finding in self.findings)


def check(folder, tokenizer=None, as_json=False):
    """Print a report on a data folder. -> 1 if something in it is broken or contradictory, else 0.

    InputError if there is none.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    report = Report(str(folder))
    labels = check_labels(report)
    regions = {}  # folder of region features -> the images that it has
    for task in data.LANGUAGES:
        splits = read_splits(report, task, labels)
        for (split, language, shots), records in splits.items():
            check_records(report, task, split, language, shots, records, labels)
        compare_languages(report, task, splits)
        compare_splits(report, task, splits)
        check_pictures(report, task, splits, regions)
    check_other_files(report)
    if tokenizer:
        check_tokenizer(report, tokenizer)
    decide_runs(report)
    print(report_json(report) if as_json else report_text(report))
    return int(report.broken())


def check_labels(report):
    """-> GQA's answers, or None."""
    path = "gqa/annotations/trainval_ans2label.json"
    if not os.path.exists(os.path.join(report.folder, path)):
        report.add("missing", "xgqa", f"{path} (GQA's answers)")
        return None
    labels = report.attempt("xgqa", data.read_labels, report.folder)
    if labels:
        report.labels = len(labels)
        if len(labels) != LABELS:
            report.add("note", "xgqa", f"label map: {len(labels):,} answers (published: {LABELS:,})")
    return labels


def needed(split):
    """Whether train.py needs the split: it trains on "train" and tests on "test"."""
    return split in ("train", "test")


def split_name(split, shots):
    return f"shots {shots}" if split == "few-shot" else split


def files_of(folder, task):
    """Every annotation file that a task can have -> [(split, language, shots)], few-shot sets as far as they are there.
    """
    wanted = []
    for (of, split), names in data.ANNOTATIONS.items():
        if of != task:
            continue
        for language in data.LANGUAGES[task] if "{language}" in names[0] else ("en",):
            sets = [None]
            if split == "few-shot":
                paths = [path for name in names for path in glob.glob(
                    os.path.join(glob.escape(folder), name.format(language=language, shots="*")))]
                sets = sorted({re.search(r"train_([^.]*)", os.path.basename(path))[1] for path in paths},
                              key=lambda shots: (len(shots), shots))
            wanted += [(split, language, shots) for shots in sets]
    return wanted


def read_splits(report, task, labels):
    """{(split, language, shots): records} of every annotation file that can be read; the others go into the report."""
    splits, absent = {}, {}
    for split, language, shots in tqdm(files_of(report.folder, task), f"reading {NAMES[task]}", leave=False,
                                       disable=None):
        try:
            path = data.annotation_file(report.folder, task, split, language, shots)
        except InputError:
            absent.setdefault(split, []).append(language)
            continue
        records = report.attempt(task, data.read_file, path, task, labels)
        if records is None:
            continue
        splits[split, language, shots] = records
        entry = {"file": os.path.relpath(path, report.folder), "records": len(records),
                 "images": len({record.image for record in records})}
        report.counts.setdefault(task, {}).setdefault(language, {})[split_name(split, shots)] = entry
    for split, languages in absent.items():
        if not needed(split):  # only what IGLUE has: no dev set of xFlickrCO, XVNLI's in English alone
            languages = [language for language in languages if (task, split) in PUBLISHED
                         and (task == "xgqa" or language == "en")]
        if languages:
            add_missing(report, task, split, languages)
    return splits


def add_missing(report, task, split, languages):
    name = data.ANNOTATIONS[task, split][0]
    zipped = os.path.exists(os.path.join(report.folder, name.format(language=languages[0]) + ".zip"))
    path = name.format(language="{" + ",".join(languages) + "}" if len(languages) > 1 else languages[0])
    optional, unpack = "" if needed(split) else ", optional", "; its .zip is there: unzip it" if zipped else ""
    report.add("missing", task, f"{path} ({NAMES[task]} {split}{optional}){unpack}")


def check_records(report, task, split, language, shots, records, labels):
    """What one file tells by itself."""
    name = split_name(split, shots)

    def add(level, text):
        report.add(level, task, text, name, language)

    images = {record.image for record in records}
    repeated = [key for key, count in Counter(record.id for record in records).items() if count > 1]
    if repeated:
        add("note" if split == "train" else "error",
            f"the id {repeated[0]} stands more than once ({len(repeated):,} such ids)")
    if task == "xflickrco":  # CCLM leaves out what is empty after its clean-up
        empty = [record.image for record in records if not data.clean_caption(record.text, None)]
    else:
        empty = [record.id for record in records if not record.text.strip()]
    if empty:
        effect = "; UC2 keeps image and text, CCLM leaves both out" if task == "xflickrco" else ""
        add("note", f"{len(empty):,} without text ({empty[0]}){effect}")
    if task == "xgqa":
        check_questions(add, split, records, labels)
    without = sum(record.label == "-" for record in records)
    if without and split in ("train", "test"):
        effect = "UC2 counts them as wrong" if split == "test" else "UC2 trains on them without a label"
        published = f" (published: {WITHOUT_LABEL})" if split == "test" and without != WITHOUT_LABEL else ""
        add("note", f"{without:,} of {len(records):,} statements have no gold label ('-'){published}: {effect}, CCLM "
                    "leaves them out")
    shot_images = int(shots) if shots and re.fullmatch("[0-9]+", shots) else None
    if shot_images is not None and len(images) != shot_images:
        add("note", f"a shot is an image, but there are {len(images):,}")
    expected = PUBLISHED.get((task, name), (None, None))
    if task == "xflickrco" and shot_images is not None:  # one caption of each image
        expected = (shot_images, shot_images)
    if not (is_published(len(records), expected[0]) and is_published(len(images), expected[1])):
        add("note", f"{len(records):,} {UNITS[task]} on {len(images):,} images (published: "
                    f"{published_text(*expected)})")


def is_published(count, published):
    return published is None or count == published or isinstance(published, range) and count in published


def published_text(records, images):
    text = f"{records.start:,} to {records.stop - 1:,}" if isinstance(records, range) else f"{records:,}"
    return text if images is None else f"{text} on {images:,}"


def check_questions(add, split, records, labels):
    """GQA names its training images by numbers and those of test-dev, xGQA's, n and a number."""
    numbered = [record for record in records if record.image.isdigit()]
    others = [record for record in records if not record.image.isdigit()]
    if numbered and split in ("test", "dev", "few-shot"):
        add("error", f"question {numbered[0].id} shows image {numbered[0].image}, one of GQA's training images "
                     f"({len(numbered):,} of {len(records):,} questions)")
    if numbered and others and split in ("train", "valid"):
        add("error", f"question {others[0].id} shows image {others[0].image}, none of GQA's {split} images "
                     f"({len(others):,} of {len(records):,} questions)")
    if not numbered and split in ("train", "valid"):
        add("note", f"no image is one of GQA's {split} images, which are named by numbers (such as {others[0].image})")
    if split == "test" and len(records) == CUT_DOWN:
        add("error",
            f"{CUT_DOWN:,} questions, as in IGLUE's cut-down {TRAP}; the test set is the few-shot folder's test.json")
    if split == "test" and len(records) == TEST_DEV:
        add("note", f"{TEST_DEV:,} questions are all of test-dev; published scores are of a part, the few-shot "
                    "folder's test.json")
    without = [record.id for record in records if not record.answers]
    if without:
        nothing_to_learn = len(without) == len(records) and split in ("train", "few-shot")
        add("error" if nothing_to_learn else "note",
            f"{len(without):,} of {len(records):,} questions have no answer (such as {without[0]})")
    known = set(labels or ())
    unknown = [(record.id, answer) for record in records for answer in record.answers if labels and answer not in known]
    if unknown:
        level, effect = ("error", "") if split in ("train", "few-shot") else ("note", " and can never be right")
        add(level, f"{len(unknown):,} of {len(records):,} answers are not among the labels{effect} "
                   f"(question {unknown[0][0]}: {files.shorten(unknown[0][1])})")


def compare_languages(report, task, splits):
    """xGQA's and XVNLI's languages are parallel: the same ids, images and answers.

    xFlickrCO's share the test images.
    """

    def content(record):
        answer = record.label
        if task == "xgqa":  # without the label map the answers of a pickled file are numbers
            answer = " ".join(record.answers) if report.labels else ""
        return {"image": record.image, "answer": answer}

    for split, shots in dict.fromkeys((split, shots) for split, _, shots in splits):
        if task == "xflickrco" and split == "few-shot":  # every language has its own images
            continue
        by_language = {language: records for (s, language, k), records in splits.items() if (s, k) == (split, shots)}
        first, *others = by_language
        expected = {record.id: content(record) for record in by_language[first]}
        for language in others:
            found = {record.id: content(record) for record in by_language[language]}
            wrong = [key for key in expected | found if found.get(key) != expected.get(key)]
            if wrong:
                how = difference(found.get(wrong[0]), expected.get(wrong[0]), first)
                text = f"{wrong[0]} {how} ({len(wrong):,} of {len(expected):,} differ)"
                report.add("error", task, text, split_name(split, shots), language)


def difference(found, expected, language):
    """In words, how a record differs from the one of the same id in another language; None: there is none."""
    if found is None or expected is None:
        return f"is missing, {language} has it" if found is None else f"is not in {language}"
    name = next(name for name in found if found[name] != expected[name])
    return f"has {name} {files.shorten(found[name])}, in {language} {files.shorten(expected[name])}"


DISJOINT = {  # pairs of splits that share no image
    "xgqa": [*itertools.combinations(("train", "valid", "dev", "few-shot", "test"), 2)],
    "xvnli": [("few-shot", "test"), ("dev", "test")],
    "xflickrco": [("train", "valid"), ("train", "test"), ("valid", "test"), ("dev", "test"), ("few-shot", "test")],
}


def compare_splits(report, task, splits):
    """What is tested must not have been trained on."""
    images, ids = {}, {}
    for (split, _, _), records in splits.items():
        images.setdefault(split, set()).update(record.image for record in records)
        ids.setdefault(split, set()).update(record.id for record in records)
    checks = [("error", images, pair, "images") for pair in DISJOINT[task]]
    if task == "xvnli":  # its training file is SNLI's: other statements about a test image would be no mistake
        checks += [("error", ids, ("train", "test"), "statements"), ("note", images, ("train", "test"), "images")]
    for level, of, (one, other), what in checks:
        shared = sorted(of.get(one, set()) & of.get(other, set()))
        if shared:
            report.add(level, task, f"{one} and {other} share {len(shared):,} of {len(of[other]):,} {what} (such as "
                                    f"{shared[0]})")


SAMPLE = 20  # images and region features of every split that are opened


def check_pictures(report, task, splits, regions):
    """Look up the images of every split and their region features by name, open a sample of them."""
    keys = {}
    for (split, _, _), records in splits.items():
        keys.setdefault(split, {}).update(dict.fromkeys(record.image for record in records))
    names, found = {}, {"images": {}, "regions": {}}  # names: folder of images -> what is in it

    def is_image(path):
        folder, name = os.path.split(path)
        if folder not in names:
            names[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        return name in names[folder]

    for split, wanted in keys.items():
        paths = {key: data.image_path(report.folder, task, key) for key in wanted}
        folder = data.feature_folder(report.folder, task, split)
        if folder not in regions:
            opened = report.attempt("", data.Regions, folder, []) if os.path.isdir(folder) else None
            regions[folder] = {} if opened is None else opened.row_of
        for key, path in paths.items():
            for kind, of, there in (("images", os.path.dirname(path), is_image(path)),
                                    ("regions", folder, key in regions[folder])):
                entry = found[kind].setdefault(os.path.relpath(of, report.folder), {})
                entry[key] = (needed(split) or entry.get(key, (False,))[0], there)
        for path in sample([path for path in paths.values() if is_image(path)]):
            report.attempt(task, data.read_image, path)
        with_regions = sample([key for key in wanted if key in regions[folder]])
        if with_regions:
            report.attempt(task, check_regions, folder, with_regions)
    for kind, folders in found.items():
        for folder, entry in folders.items():
            missing = {key: is_needed for key, (is_needed, there) in entry.items() if not there}
            if missing:
                what = (f"{len(missing):,} of {len(entry):,} images, {sum(missing.values()):,} of them to train and "
                        f"test (such as {next(iter(missing))})")
                size = f"{len(missing) * IMAGE_BYTES / 1e9:.1f} GB when converted"
                report.add("missing", task, f"{folder}: {what}" if kind == "images"
                           else f"{folder}: region features of {what}, {size}")
    if not keys:  # no annotations that would tell which images
        examples = ["0", "COCO"] if task == "xflickrco" else ["0"]
        places = [os.path.dirname(data.image_path(report.folder, task, key)) for key in examples]
        places += [data.feature_folder(report.folder, task, split) for split in ("train", "test")]
        for place in dict.fromkeys(places):
            if not os.path.isdir(place):
                report.add("missing", task, f"{os.path.relpath(place, report.folder)}: no such folder")
    report.pictures[task] = found


def sample(items):
    chosen = np.random.default_rng(0).permutation(len(items))[:SAMPLE]
    return [items[i] for i in sorted(chosen)]


def check_regions(folder, keys):
    """Open the region features of some images; InputError for what no model should see."""
    regions = data.Regions(folder, keys)
    regions.batch(range(len(keys)))
    for key, row in zip(keys, regions.rows):
        first, last = (row, row + 1) if regions.offsets is None else regions.offsets[row : row + 2]
        check_boxes(regions.box_array[first:last].reshape(-1, 4), *regions.sizes[row].tolist(),
                    f"{folder}: image {key}")


def check_other_files(report):
    trap, path = os.path.join(report.folder, TRAP), "flickr30k/hard_negative.pkl"
    questions = report.attempt("xgqa", data.read_gqa, trap) if os.path.isfile(trap) else None
    if questions is not None:
        cut_down = (f", IGLUE's cut-down copy and not the {TEST_DEV:,} of GQA's own file"
                    if len(questions) == CUT_DOWN else "")
        report.add("note", "xgqa", f"{TRAP}: {len(questions):,} questions{cut_down}; it is not read, the English test "
                                   f"set is {ENGLISH_TEST}")
    if not os.path.isfile(os.path.join(report.folder, path)):
        report.add("missing", "xflickrco",
                   f"{path} (optional: without it UC2's hard negative captions are drawn at random)")
        return
    keys = [key for entry in report.pictures["xflickrco"]["images"].values() for key in entry]
    similar = report.attempt("xflickrco", data.read_hard_negatives, report.folder, keys)
    # it is about the training images, which are not known without their captions
    if similar == {} and "train" in report.counts.get("xflickrco", {}).get("en", {}):
        report.add("error", "xflickrco", f"{path}: names none of the images")


def check_tokenizer(report, path):
    tokenizer = report.attempt("", data.Tokenizer, path)
    if tokenizer is None:
        return
    known = tokenizer.sha256 == data.XLMR_SHA256
    report.tokenizer = {"file": str(path), "sha256": tokenizer.sha256, "vocabulary": tokenizer.vocabulary,
                        "is_xlmr": known}
    if not known:
        found = (f"sha256 {tokenizer.sha256[:12]}…, expected {data.XLMR_SHA256[:12]}…; "
                 f"{tokenizer.vocabulary:,} ids, expected 250,002")
        report.add("error", "", f"{path}: not XLM-R's sentencepiece.bpe.model (5,069,051 bytes), which UC2 and CCLM "
                                f"were pre-trained with: {found}. Right only for a checkpoint that was trained with it")


def decide_runs(report):
    """Which of train.py's six runs the folder has everything for: files, labels, pictures, and no error in the task."""
    for task, languages in data.LANGUAGES.items():
        counts = report.counts.get(task, {})
        without_test = [language for language in languages if "test" not in counts.get(language, {})]
        lacking = [] if "train" in counts.get("en", {}) else ["no training file"]
        if without_test:
            lacking.append("no test files" if len(without_test) == len(languages)
                           else f"no test file of {', '.join(without_test)}")
        if task == "xgqa" and report.labels is None:
            lacking.append("no label map")
        if any((finding.level, finding.task) == ("error", task) for finding in report.findings):
            lacking.append("errors")
        for model, kind, name in (("cclm", "images", "images"), ("uc2", "regions", "region features")):
            folders = report.pictures[task][kind].values()
            there = [there for entry in folders for is_needed, there in entry.values() if is_needed]
            missing = [] if all(there) else [f"{there.count(False):,} of {len(there):,} {name} missing"]
            report.runs[f"{model} {task}"] = lacking + missing


# ---------------------------------------------------------------------------------------------------------------------
# The report as text and as JSON


def report_text(report):
    lines = [f"IGLUE data in {report.folder}"]
    for task, languages in data.LANGUAGES.items():
        lines += ["", *count_table(report, task, languages)]
        for kind, folders in report.pictures[task].items():
            for folder, entry in folders.items():
                lines.append(f"  {kind:<8} {folder}: {sum(there for _, there in entry.values()):,} of {len(entry):,}")
        if task == "xgqa" and report.labels is not None:
            lines.append(f"  {'labels':<8} {report.labels:,} answers")
        lines += finding_lines(report, task)
    if report.tokenizer and report.tokenizer["is_xlmr"]:
        lines += ["", f"tokenizer {report.tokenizer['file']}: XLM-R's own (sha256 {report.tokenizer['sha256'][:12]}…, "
                      "250,002 ids)"]
    general = finding_lines(report, "")
    lines += ["", *general] if general else []
    sources = {}
    for finding in report.findings:
        if finding.source:
            sources.setdefault(finding.source, []).append(re.split("[: ]", finding.text)[0])
    if sources:
        lines += ["", "where to get what is missing"]
        lines += [f"  {', '.join(dict.fromkeys(paths))}\n      {source}" for source, paths in sources.items()]
    possible = [run for run, lacking in report.runs.items() if not lacking]
    impossible = [f"{run} ({'; '.join(lacking)})" for run, lacking in report.runs.items() if lacking]
    last = (f"possible: {', '.join(possible) or 'none'}"
            + (f". Not possible: {', '.join(impossible)}" if impossible else ""))
    return "\n".join([*lines, "", last])


def finding_lines(report, task):
    lines = []
    for level in ("error", "missing", "note"):
        for finding in report.findings:
            if (finding.level, finding.task) == (level, task):
                everywhere = len(finding.languages) > 1 and len(finding.languages) == len(data.LANGUAGES[task])
                languages = "all languages" if everywhere else ", ".join(finding.languages)
                lines.append(f"  {level:<8} " + (f"{finding.split} ({languages}): " if finding.split else "")
                             + finding.text)
    return lines


def count_table(report, task, languages):
    """Records/images by language and split; few-shot sets by their numbers of images."""
    counts = report.counts.get(task, {})
    splits = [split for of, split in data.ANNOTATIONS if of == task and split != "few-shot"]
    rows = [[f"{NAMES[task]}, {UNITS[task]}/images", *splits, "few-shot sets"]]
    for language in languages:
        found = counts.get(language, {})
        cells = [f"{found[split]['records']:,}/{found[split]['images']:,}" if split in found else "-"
                 for split in splits]
        sets = [name.removeprefix("shots ") for name in found if name.startswith("shots ")]
        rows.append([f"  {language}", *cells, ", ".join(sets) or "-"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    justify = [str.ljust, *[str.rjust] * len(splits), lambda cell, _: cell]
    return ["  ".join(place(cell, width) for place, cell, width in zip(justify, row, widths)) for row in rows]


def report_json(report):
    def summary(entry):
        missing = [is_needed for is_needed, there in entry.values() if not there]
        return {"images": len(entry), "missing": len(missing), "missing_to_train_and_test": sum(missing)}

    content = {"folder": report.folder, "ok": not report.broken(), "counts": report.counts, "labels": report.labels,
               "pictures": {task: {kind: {folder: summary(entry) for folder, entry in folders.items()}
                                   for kind, folders in kinds.items()} for task, kinds in report.pictures.items()},
               "tokenizer": report.tokenizer, "findings": [vars(finding) for finding in report.findings],
               "runs": {run: {"possible": not lacking, "lacking": lacking} for run, lacking in report.runs.items()}}
    return json.dumps(content, indent=1, ensure_ascii=False)


# ---------------------------------------------------------------------------------------------------------------------
# Convert: sources. Each is opened to (number of images, iterator of `Detections`)


@dataclass
class Detections:
    """What an object detector found in one image, as a source file has it."""

    key: str  # as in the source: with or without '.jpg'
    features: np.ndarray  # [V,F]
    boxes: np.ndarray  # [V,4] x1, y1, x2, y2 in pixels
    width: object  # of the image, pixels
    height: object
    where: str  # for messages


def open_source(path):
    """-> (number of images, an estimate for TSV files; iterator of Detections). InputError for any other format."""
    if os.path.isdir(path):
        if os.path.exists(os.path.join(path, "data.mdb")):
            raise InputError(f"{path}: an LMDB is not read; convert the H5 or TSV file that it was made from")
        if os.path.exists(os.path.join(path, "meta.json")):
            raise InputError(f"{path}: is already in the converted format")
        pairs = [file for file in sorted(glob.glob(os.path.join(glob.escape(path), "*.npy")))
                 if not file.endswith("_info.npy")]
        if not pairs:
            raise InputError(f"{path}: a folder without .npy files")
        return len(pairs), map(read_npy_pair, pairs)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file or folder")
    with open(path, "rb") as file:
        beginning = file.read(8)
        first_line = beginning + file.readline(MAX_LINE)
    if beginning == b"\x89HDF\r\n\x1a\n":
        return open_h5(path)
    if b"\t" not in first_line:
        raise InputError(f"{path}: neither an H5 file, nor a TSV file, nor a folder of npy files (unpack it if it is "
                         "compressed)")
    return max(1, os.path.getsize(path) // len(first_line)), read_tsv(path)


def open_h5(path):
    """IGLUE's H5 files: one group per image, named by its key, with features, boxes, img_w and img_h."""
    try:
        import h5py
    except ImportError:
        raise InputError(f"{path}: reading H5 files needs the package h5py (pip install h5py)") from None
    try:
        file = h5py.File(path, "r")
        keys = list(file)
        return len(keys), read_h5(file, keys, path)
    except Exception as error:  # h5py raises anything for a damaged file
        raise InputError(f"{path}: not a readable H5 file, or a truncated one ({type(error).__name__})") from None


def read_h5(file, keys, path):
    with file:
        for key in keys:
            where = f"{path}, image {files.shorten(key)}"
            try:
                group = member(file, key, where)
                features, boxes, width, height = (np.asarray(member(group, name, where)[()])
                                                  for name in ("features", "boxes", "img_w", "img_h"))
                found = Detections(key, features, boxes, width.item(), height.item(), where)
            except InputError:
                raise
            except KeyError as error:
                raise InputError(f"{where}: expected features, boxes, img_w and img_h ({error.args[0]})") from None
            except Exception as error:
                raise InputError(f"{where}: cannot be read ({type(error).__name__})") from None
            yield found


def member(group, name, where):
    """A group or dataset of an H5 file. InputError where it is elsewhere: a file could make others be read."""
    import h5py

    if isinstance(group.get(name, getlink=True), (h5py.ExternalLink, h5py.SoftLink)):
        raise InputError(f"{where}: {name} is a link; only data that the file itself holds are read")
    found = group[name]
    if isinstance(found, h5py.Dataset) and (found.external or found.is_virtual):
        raise InputError(f"{where}: the data of {name} are in another file; only data that the file itself holds are "
                         "read")
    return found


MAX_LINE = 1 << 26  # bytes; a line of 100 regions of width 2,048 has 1.1 million
TSV_COLUMNS = (10, 13)


def read_tsv(path):
    """The bottom-up-attention TSV files of LXMERT and VOLTA: one image per line, arrays in base64, no header.

    Columns: img_id, img_h, img_w, objects_id, objects_conf, attrs_id, attrs_conf, num_boxes, boxes, features, and in
    older files three more: cls_prob, attrs, classes.
    """
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            where = f"{path}, line {number}"
            columns = line.rstrip(b"\r\n").split(b"\t")
            if len(columns) not in TSV_COLUMNS:
                raise InputError(f"{where}: {len(columns)} columns, expected 10 or 13; is the file truncated?")
            try:
                key = columns[0].decode()
                height, width, count = (int(columns[i]) for i in (1, 2, 7))
                boxes, features = (np.frombuffer(base64.b64decode(columns[i], validate=True), "<f4") for i in (8, 9))
                boxes, features = boxes.reshape(count, 4), features.reshape(count, -1)
            except ValueError as error:
                raise InputError(
                    f"{where}, image {files.shorten(columns[0].decode(errors='replace'))}: {error}") from None
            yield Detections(key, features, boxes, width, height, f"{where}, image {files.shorten(key)}")


def read_npy_pair(path):
    """<stem>.npy with the features, <stem>_info.npy with a pickled dict of boxes and image size; no pickle is executed.
    """
    stem = path.removesuffix(".npy")
    where = f"{stem}_info.npy"
    content = io.BytesIO(files.read_bytes(where))
    try:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, kind = readers[np.lib.format.read_magic(content)](content)
    except Exception as error:  # a damaged header can raise anything
        raise InputError(f"{where}: not a readable npy file, or a truncated one ({type(error).__name__})") from None
    if shape != () or kind != object:
        raise InputError(f"{where}: expected one dict, found {kind} {list(shape)}")
    loaded = files.unpickle(content.read(), where)
    info = loaded[0] if isinstance(loaded, list) and len(loaded) == 1 else loaded
    boxes = files.expect(info, "bbox", list, where)
    width, height = (files.expect(info, name, (int, float), where) for name in ("image_width", "image_height"))
    try:
        # looked at before numpy does: lists of a pickle that hold one another would become an endless array
        if not all(isinstance(box, list) and len(box) == 4 and set(map(type, box)) <= {int, float} for box in boxes):
            raise ValueError
        boxes = np.array(boxes, dtype=np.float64)
    except (ValueError, OverflowError):
        raise InputError(f"{where}: 'bbox' must be an array of numbers") from None
    return Detections(os.path.basename(stem), files.map_array(path), boxes, width, height, path)


# ---------------------------------------------------------------------------------------------------------------------
# Convert: checks and writing


def check_boxes(boxes, width, height, where):
    """InputError unless all boxes [V,4] are finite, upright and, to a pixel, inside an image of this size."""
    if not np.isfinite(boxes).all():
        raise InputError(f"{where}: a box is not finite")
    x1, y1, x2, y2 = boxes.T
    wrong = (x1 < -1) | (y1 < -1) | (x2 > width + 1) | (y2 > height + 1) | (x2 < x1) | (y2 < y1)
    if wrong.any():
        box = [round(float(x), 1) for x in boxes[wrong.argmax()]]
        raise InputError(f"{where}: {box} is not a box x1, y1, x2, y2 inside the image of {width} x {height} pixels")


def checked(found, width_of_features):
    """Detections -> (key, features [V,F] float16, boxes [V,4] float32, (w, h)).

    InputError for what no model should see.
    """
    where = found.where
    key = files.image_key(found.key, where)
    features, boxes = found.features, found.boxes
    if features.ndim != 2 or not features.size or features.dtype.kind != "f":
        raise InputError(f"{where}: expected one row of numbers per region, found {features.dtype} "
                         f"{list(features.shape)}")
    if width_of_features and features.shape[1] != width_of_features:
        raise InputError(f"{where}: features of width {features.shape[1]:,}, but those before have "
                         f"{width_of_features:,}")
    if boxes.shape != (len(features), 4) or boxes.dtype.kind not in "fiu":
        raise InputError(f"{where}: {len(features)} regions, but boxes of shape {list(boxes.shape)}")
    if not all(type(value) in (int, float) and 1 <= value < 2**31 and value == int(value)
               for value in (found.width, found.height)):
        raise InputError(f"{where}: an image of {files.shorten(found.width)} x {files.shorten(found.height)} pixels")
    with np.errstate(over="ignore"):  # infinite then, and refused
        features, boxes = features.astype(np.float16), boxes.astype(np.float32)
    size = (int(found.width), int(found.height))
    check_boxes(boxes, *size, where)
    if not data.all_finite(features):
        raise InputError(f"{where}: a feature is not finite, or beyond 65,504, the largest float16")
    return key, features, boxes, size


def npy_header(shape, kind):
    """Header of a numpy file, 128 bytes whatever the shape, so that it can be written when all rows are."""
    text = repr({"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": tuple(shape)})
    return np.lib.format.magic(1, 0) + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


def convert(sources, folder, boxes=None):
    """Write the region features of all sources to a new folder in the format that `data.Regions` describes.

    sources: H5 files, TSV files, folders of npy files; the images of all go into the one folder. boxes: most regions
    used per image; by default as many as every image has, or 36 where the numbers differ. Raises InputError, naming the
    image, for an image that occurs twice, features of another width, numbers that are not finite, boxes outside their
    image, images without pixels or regions; and where the disk is too small.
    """
    if os.path.lexists(folder):
        raise InputError(f"{folder}: already exists; delete it or name another folder")
    opened = [open_source(source) for source in sources]
    partial = f"{os.path.abspath(folder)}.partial-{os.getpid()}"
    try:
        os.makedirs(partial)
        count, kept, dim = write_regions(opened, sources, partial, boxes)
        size = sum(os.path.getsize(os.path.join(partial, name)) for name in os.listdir(partial))
        os.rename(partial, folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{folder}: {count:,} images, {kept} regions each at most, features of width {dim:,}, {size / 1e9:.2f} GB")


def write_regions(opened, sources, folder, most):
    """-> (N, regions used per image, F)."""
    total = sum(count for count, _ in opened)
    source_of, sizes, counts, dim = {}, [], [], None
    bar = tqdm(total=total, unit=" images", disable=None)
    with (open(os.path.join(folder, "features.npy"), "wb") as features_file,
          open(os.path.join(folder, "boxes.npy"), "wb") as boxes_file, bar):
        for file in (features_file, boxes_file):
            file.write(npy_header((0,), np.float16))
        for source, (_, images) in zip(sources, opened):
            for found in images:
                key, features, boxes, size = checked(found, dim)
                if key in source_of:
                    raise InputError(f"{found.where}: image {key} was already in {source_of[key]}")
                if dim is None:
                    files.require_space(folder, total * (features.nbytes + boxes.nbytes))
                source_of[key], dim = source, features.shape[1]
                sizes.append(size)
                counts.append(len(features))
                features_file.write(features.tobytes())
                boxes_file.write(boxes.tobytes())
                bar.update()
        if not counts:
            raise InputError(f"{', '.join(sources)}: no images")
        same = len(set(counts)) == 1 and (most is None or most >= counts[0])
        rows = (len(counts), counts[0]) if same else (sum(counts),)
        for file, width, kind in ((features_file, dim, np.float16), (boxes_file, 4, np.float32)):
            file.seek(0)
            file.write(npy_header((*rows, width), kind))
    kept = counts[0] if same else min(most or 36, max(counts))
    np.save(os.path.join(folder, "sizes.npy"), np.array(sizes, dtype=np.int32))
    if not same:
        np.save(os.path.join(folder, "offsets.npy"), np.cumsum([0, *counts], dtype=np.int64))
    with open(os.path.join(folder, "ids.txt"), "w", encoding="utf-8") as file:
        file.writelines(f"{key}\n" for key in source_of)
    meta = {"format": 1, "count": len(counts), "boxes": kept, "dim": dim, "dtype": "float16",
            "source": ", ".join(os.path.basename(os.path.normpath(source)) for source in sources), "complete": True}
    with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8") as file:
        json.dump(meta, file)
    data.Regions(folder, list(source_of))  # reads back what training will read
    return len(counts), kept, dim
