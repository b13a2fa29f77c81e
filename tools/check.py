"""What a data folder has, what it lacks and where to get it, what is wrong with it.

    python -m tools.check IGLUE [--tokenizer sentencepiece.bpe.model] [--json]

Reads every annotation file with the readers that training uses, compares the languages and the
splits with each other, looks up every image and its region features by name, and opens some of
them. With GQA's 943,000 and XVNLI's 541,000 training records it takes half a minute.

The last line says which of train.py's six runs can start. Exit status 0: at least one, and nothing
is broken; 1: something that is there is broken or contradicts something else, or no run can start.
What is missing, and counts that differ from the published ones, are told and are no error.
"""

import collections
import glob
import itertools
import json
import os
import re
import sys

import numpy as np
from PIL import ImageFile
from tqdm import tqdm

import data
import eval as evaluation
from data import InputError, reading
from tools.convert import check_boxes

# --------------------------------------------------------------------------------------------------
# What the published files hold, and where they are to be had

PUBLISHED = {  # task -> split -> records, images (None: unknown)
    "xgqa": {"train": (943_000, None), "valid": (132_062, None), "dev": (1_422, 50),
             "test": (9_666, 300)},
    "xvnli": {"test": (1_164, 357)},
    "xflickrco": {"train": (145_000, 29_000), "valid": (5_070, 1_014), "test": (2_000, 2_000)},
}
SHOTS = {  # task -> images of a few-shot set -> records
    "xgqa": {"1": 27, "5": 155, "10": 317, "20": 594, "25": 704, "48": 1_490},
    "xvnli": {"1": 3, "5": 18, "10": 39, "20": 75, "25": 90, "48": 168},
}
LABELS = 1_842  # GQA's answers
NEEDED = ("train", "test")  # the splits that train.py reads; the others are for few-shot training
UNITS = {"xgqa": "questions", "xvnli": "statements", "xflickrco": "captions"}
DISJOINT = {  # pairs of splits that share no image
    "xgqa": [*itertools.combinations(("train", "valid", "dev", "few-shot", "test"), 2)],
    "xvnli": [("few-shot", "test"), ("dev", "test")],
    "xflickrco": [*itertools.combinations(("train", "valid", "test"), 2), ("dev", "test"),
                  ("few-shot", "test")],
}

IGLUE = "the IGLUE repository, github.com/e-bug/iglue, folder datasets"
FEATURES = ("IGLUE's README links the H5 files (36 boxes per image); then `python -m tools.convert "
            "FILE.h5 FOLDER`; for UC2 alone")
SOURCES = {  # what belongs in the data folder -> where to get it
    "gqa/annotations/train.json": f"{IGLUE}: unzip train.json.zip; or GQA's site: "
                                  "train_balanced_questions.json",
    "gqa/annotations": IGLUE,
    "gqa/images": "GQA's site, cs.stanford.edu/people/dorarad/gqa (20 GB); for CCLM alone",
    "gqa/features": FEATURES,
    "xGQA/annotations": f"{IGLUE}; or the xGQA repository, github.com/adapter-hub/xGQA",
    "XVNLI/annotations/en/train.jsonl": f"{IGLUE}: unzip train.jsonl.zip",
    "XVNLI/annotations": IGLUE,
    "flickr30k/annotations": IGLUE,
    "flickr30k/hard_negative.pkl": f"{IGLUE}; optional, else UC2's are drawn at random",
    "flickr30k/flickr30k-images": "Kaggle, linked in IGLUE's datasets/README.md; for CCLM alone",
    "flickr30k/features": FEATURES,
    "xFlickrCO/annotations": IGLUE,
    "xFlickrCO/features": FEATURES,
    "mscoco/val2014": "MS COCO's site: the 2014 validation images; for CCLM alone",
}


def what_to_fetch(missing=tuple(SOURCES)):
    """Lines: where to get what is missing from a data folder; by default that is everything."""
    lines = ["where to get what is missing"]
    for path, source in SOURCES.items():
        if any(text.startswith(path) for text in missing):
            lines += [f"  {path}", f"      {source}"]
    return lines


def place_of(folder):
    """The folder that has IGLUE's folders in it: one inside this one or above it; or None."""
    above = os.path.dirname(os.path.abspath(folder))
    inside = sorted(glob.glob(os.path.join(glob.escape(folder), "*")))
    for place in [*inside, above, os.path.dirname(above)]:
        if any(os.path.isdir(os.path.join(place, path)) for path in SOURCES):
            return place


# --------------------------------------------------------------------------------------------------
# The check


class Report:
    """What is found.

    findings: (level, task, split, text) -> the languages of which it is true. level: "error",
    "missing" (the text begins with the path) or "note"; task: "" for what belongs to none.
    """

    def __init__(self, folder):
        self.folder, self.labels, self.findings = folder, None, {}
        self.counts = {}  # (task, split or "shots K", language) -> (records, images)
        self.pictures = {}  # (task, "images" or "regions", folder, split) -> (there, wanted)
        self.runs = {}  # "cclm xgqa", … -> what stands in its way

    def add(self, level, task, text, split="", language=None):
        languages = self.findings.setdefault((level, task, split, text), [])
        if language:
            languages.append(language)

    def attempt(self, task, function, *arguments):
        """-> function(*arguments), or None where that is an InputError, which becomes a finding."""
        try:
            return function(*arguments)
        except InputError as error:
            self.add("error", task, str(error))

    def texts(self, level, task=None):
        found = []
        for of_level, of_task, _, text in self.findings:
            if of_level == level and task in (None, of_task):
                found.append(text)
        return found


def check(folder):
    """-> Report on a data folder."""
    report = Report(folder)
    labels = "gqa/annotations/trainval_ans2label.json"
    if os.path.isfile(os.path.join(folder, labels)):
        report.labels = report.attempt("xgqa", data.read_labels, folder)
    else:
        report.add("missing", "xgqa", f"{labels} (GQA's answers)")
    if report.labels and len(report.labels) != LABELS:
        report.add("note", "xgqa", f"{len(report.labels):,} labels (published: {LABELS:,})")
    opened = {}  # folder of images or region features -> the images that it has
    for task in data.LANGUAGES:
        splits = read_splits(report, task)
        for (split, shots, language), records in splits.items():
            check_records(report, task, split, shots, language, records)
        compare_languages(report, task, splits)
        compare_splits(report, task, splits)
        check_pictures(report, task, splits, opened)
        if task == "xflickrco":
            check_hard_negatives(report, splits.get(("train", None, "en"), []))
    decide_runs(report)
    return report


def read_splits(report, task):
    """{(split, shots, language): records} of every annotation file that can be read."""
    splits = {}
    for split, name in data.ANNOTATIONS[task].items():
        absent = []
        languages = data.LANGUAGES[task] if "{language}" in name else ["en"]
        for language in tqdm(languages, f"{task} {split}", leave=False, disable=None):
            sets = [None]
            if split == "few-shot":
                pattern = os.path.join(glob.escape(report.folder), name)
                paths = glob.glob(pattern.format(language=language, shots="*"))
                sets = [re.search(r"train_([^.]*)", os.path.basename(path))[1] for path in paths]
            for shots in sorted(sets, key=lambda shots: (len(shots or ""), shots)):
                try:
                    path = data.annotation_file(report.folder, task, split, language, shots)
                except InputError:
                    absent.append(language)
                    continue
                which = report.folder, task, split, language, shots
                found = report.attempt(task, data.read_records, *which)
                if found and found[1]:
                    splits[split, shots, language] = found[1]
                elif found:
                    report.add("error", task, f"{path}: no records")
        # all that train.py needs; of the others what IGLUE has in English
        if absent and (split in NEEDED or "en" in absent and split in PUBLISHED[task]):
            name = name.split(" or ")[0]
            several = "{" + ",".join(absent) + "}" if len(absent) > 1 else absent[0]
            text = name.format(language=several)
            zipped = name.format(language=absent[0]) + ".zip"
            if os.path.exists(os.path.join(report.folder, zipped)):
                text += "; its .zip is there: unzip it"
            report.add("missing", task, text)
    return splits


def check_records(report, task, split, shots, language, records):
    """What one file tells by itself."""
    name = f"shots {shots}" if shots else split
    images = {record.image for record in records}
    report.counts[task, name, language] = len(records), len(images)

    def add(level, what, examples):
        if examples:
            text = f"{len(examples):,} of {len(records):,} {UNITS[task]} {what}"
            report.add(level, task, f"{text} (such as {examples[0]})", name, language)

    ids = collections.Counter(record.id for record in records)
    repeated = [key for key, count in ids.items() if count > 1]
    add("note" if split == "train" else "error", "have an id that stands more than once", repeated)
    empty, unlabelled, unknown = [], [], []
    known = set(report.labels or ())
    for record in records:
        if not data.clean_caption(record.text, None):
            empty.append(record.id)
        if record.label == "-":
            unlabelled.append(record.id)
        if known and not known.issuperset(record.answers):
            unknown.append(f"{record.id}: {', '.join(record.answers)}")
    add("note", "have no text; in retrieval UC2 keeps them, CCLM leaves image and text out", empty)
    add("note", "have no gold label; UC2 counts them as wrong, CCLM leaves them out", unlabelled)
    learned = split in ("train", "few-shot")
    add("error" if learned else "note", "have an answer that is no label", unknown)

    expected = PUBLISHED[task].get(split)
    if shots in SHOTS.get(task, {}):
        expected = SHOTS[task][shots], int(shots)
    if expected:
        records_expected, images_expected = expected
        if len(records) != records_expected or images_expected not in (None, len(images)):
            text = f"{len(records):,} {UNITS[task]} on {len(images):,} images; published: "
            text += " on ".join(f"{count:,}" for count in expected if count)
            report.add("note", task, text, name, language)


def compare_languages(report, task, splits):
    """xGQA's and XVNLI's languages have the same ids, images and answers, xFlickrCO's the same test
    images. Each language that has a split is compared with the first.
    """
    first = {}  # (split, shots) -> its language, {id: (image, answer)}
    for (split, shots, language), records in splits.items():
        # every language has few-shot images of its own; training is in English alone
        own_images = task == "xflickrco" and split == "few-shot"
        if own_images or split in ("train", "valid"):
            continue
        found = {record.id: [record.image, record.label, *record.answers] for record in records}
        original, expected = first.setdefault((split, shots), (language, found))
        wrong = [key for key in expected | found if found.get(key) != expected.get(key)]
        if wrong:
            here, there = found.get(wrong[0], "nothing"), expected.get(wrong[0], "nothing")
            report.add("error", task, f"{wrong[0]}: {here}, but in {original} {there} "
                                      f"({len(wrong):,} differ)", split, language)


def compare_splits(report, task, splits):
    """What is tested must not have been trained on."""
    images, ids = collections.defaultdict(set), collections.defaultdict(set)
    for (split, _, _), records in splits.items():
        images[split].update(record.image for record in records)
        ids[split].update(record.id for record in records)
    checks = [(images, "images", *pair) for pair in DISJOINT[task]]
    if task == "xvnli":  # its training file has other statements about the same images
        checks.append((ids, "statements", "train", "test"))
    for of, what, one, other in checks:
        shared = sorted(of[one] & of[other])
        if shared:
            report.add("error", task, f"{one} and {other} share {len(shared):,} of "
                                    f"{len(of[other]):,} {what} (such as {shared[0]})")


def check_pictures(report, task, splits, opened):
    """Look up the images of every split and their region features by name, open 20 of each."""
    keys = collections.defaultdict(dict)  # (kind, folder, split) -> its images
    for (split, _, _), records in splits.items():
        features = data.feature_folder(report.folder, task, split)
        for record in records:
            path = data.image_path(report.folder, task, record.image)
            keys["images", os.path.dirname(path), split][record.image] = path
            keys["regions", features, split][record.image] = path
    for (kind, folder, split), paths in keys.items():
        # what a folder has is listed once: much faster than to look for every file
        if folder not in opened:
            opened[folder] = set()
            if kind == "images" and os.path.isdir(folder):
                opened[folder] = {name.removesuffix(".jpg") for name in os.listdir(folder)}
            elif os.path.isdir(folder):
                regions = report.attempt("", data.Regions, folder, [])
                if regions is not None:
                    opened[folder] = regions.row_of
        # those of this split
        there = [key for key in paths if key in opened[folder]]
        short = os.path.relpath(folder, report.folder)
        report.pictures[task, kind, short, split] = len(there), len(paths)
        if len(there) < len(paths):
            absent = next(key for key in paths if key not in opened[folder])
            text = f"{short}: {len(paths) - len(there):,} of {len(paths):,} {kind}"
            report.add("missing", task, f"{text} (such as {absent})", split)
        # some of them, drawn the same way every time
        chosen = np.random.default_rng(0).permutation(len(there))[:20]
        sample = [there[i] for i in chosen]
        if kind == "images":
            for key in sample:
                check_image(report, task, paths[key])
        elif sample:
            report.attempt(task, check_regions, folder, sample)


def check_image(report, task, path):
    if report.attempt(task, data.read_image, path) is None:
        return
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        data.read_image(path)
    except InputError:
        text = f"{path}: lacks its last bytes; it is read all the same, what is missing is grey"
        report.add("note", task, text)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = True


def check_regions(folder, keys):
    """InputError for what no model should see."""
    regions = data.Regions(folder, keys)
    regions.batch(range(len(keys)))
    for key, row in zip(keys, regions.rows):
        with reading(f"{folder}, image {key}"):
            check_boxes(regions.boxes[row, : regions.counts[row]], *regions.sizes[row].tolist())


def check_hard_negatives(report, records):
    path = "flickr30k/hard_negative.pkl"
    keys = {record.image for record in records}
    if not os.path.isfile(os.path.join(report.folder, path)):
        report.add("missing", "xflickrco", f"{path} (optional)")
    elif report.attempt("xflickrco", data.read_hard_negatives, report.folder, keys) == {} and keys:
        report.add("error", "xflickrco", f"{path}: names none of the images")


def check_tokenizer(report, path):
    tokenizer = report.attempt("", data.Tokenizer, path)
    if tokenizer and tokenizer.sha256 != data.XLMR_SHA256:
        report.add("error", "", f"{path}: not XLM-R's sentencepiece.bpe.model, which UC2 and CCLM "
                                f"were pre-trained with ({tokenizer.vocabulary:,} ids, expected "
                                f"250,002; sha256 {tokenizer.sha256[:12]}…)")


def decide_runs(report):
    """Which of train.py's six runs the folder has everything for."""
    for task, languages in data.LANGUAGES.items():
        # what both models need
        lacking = []
        if (task, "train", "en") not in report.counts:
            lacking.append("no training file")
        untested = [name for name in languages if (task, "test", name) not in report.counts]
        if untested:
            lacking.append(f"no test file of {', '.join(untested)}")
        if task == "xgqa" and not report.labels:
            lacking.append("no label map")
        if report.texts("error", task):
            lacking.append("errors")
        # CCLM sees images, UC2 regions
        for model, kind in (("cclm", "images"), ("uc2", "regions")):
            lost = 0
            for (of, of_kind, _, split), (there, wanted) in report.pictures.items():
                if (of, of_kind) == (task, kind) and split in NEEDED:
                    lost += wanted - there
            missing = [f"{lost:,} {kind} missing"] if lost else []
            report.runs[f"{model} {task}"] = lacking + missing


# --------------------------------------------------------------------------------------------------
# The report as text and as JSON


def lines_of(report):
    lines = [f"IGLUE data in {report.folder}"]
    for task, languages in data.LANGUAGES.items():
        # how many records and images there are, by split and language
        splits = [split for split in data.ANNOTATIONS[task] if split != "few-shot"]
        lines += ["", f"{task}, {UNITS[task]}/images: {', '.join(splits)}; few-shot sets"]
        for language in languages:
            line = f"  {language}"
            for split in splits:
                count = report.counts.get((task, split, language))
                cell = "{:,}/{:,}".format(*count) if count else "-"
                line += f"{cell:>16}"
            for of, name, of_language in report.counts:
                if (of, of_language) == (task, language) and name.startswith("shots"):
                    line += name.removeprefix("shots")
            lines.append(line)
        for (of, kind, folder, split), (there, wanted) in report.pictures.items():
            if of == task:
                lines.append(f"  {kind:<8} {folder}, {split}: {there:,} of {wanted:,}")
        lines += finding_lines(report, task)
    lines += finding_lines(report, "")
    missing = report.texts("missing")
    if missing:
        lines += ["", *what_to_fetch(missing)]
    return lines


def finding_lines(report, task):
    lines = []
    for level in ("error", "missing", "note"):
        for (of_level, of, split, text), languages in report.findings.items():
            if (of_level, of) == (level, task):
                where = " ".join([split, *languages])
                lines.append(f"  {level:<8} " + f"{where}: {text}".removeprefix(": "))
    return lines


def json_of(report, possible):
    findings = [[*key, languages] for key, languages in report.findings.items()]
    counts = {" ".join(key): count for key, count in report.counts.items()}
    pictures = {" ".join(key): count for key, count in report.pictures.items()}
    return json.dumps({"folder": report.folder, "possible": possible, "lacking": report.runs,
                       "counts": counts, "pictures": pictures, "findings": findings}, indent=1)


def main(argv=None):
    parser = evaluation.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="with gqa, xGQA, XVNLI, flickr30k, xFlickrCO, mscoco in it")
    parser.add_argument("--tokenizer", metavar="FILE", help="is this XLM-R's own model?")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)

    report = check(args.folder)
    if args.tokenizer:
        check_tokenizer(report, args.tokenizer)
    possible = [run for run, lacking in report.runs.items() if not lacking]
    lines = lines_of(report)
    if not report.counts:
        lines = [f"{args.folder}: none of IGLUE's annotation files"]
        place = place_of(args.folder)
        if place:
            lines.append(f"IGLUE's folders lie in {place}: name that one")
        lines += what_to_fetch()
    verdict = f"possible: {', '.join(possible) or 'none'}"
    for run, lacking in report.runs.items():
        if lacking:
            verdict += f"; not {run} ({', '.join(lacking)})"
    print(json_of(report, possible) if args.json else "\n".join([*lines, "", verdict]))
    sys.exit(int(not possible or bool(report.texts("error"))))


if __name__ == "__main__":
    evaluation.command(main)
