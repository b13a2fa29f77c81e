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
import json
import os
import sys

import data
import eval as evaluation
from data import InputError, reading
from tools.convert import check_image

# --------------------------------------------------------------------------------------------------
# What the published files hold, and where they are to be had

PUBLISHED = {  # of the files that IGLUE has for every language of a split: how many records, images
    "xgqa": {"train": "943,000 questions", "valid": "132,062 questions",
             "dev": "1,422 questions on 50 images", "test": "9,666 questions on 300 images"},
    "xvnli": {"train": "", "test": "1,164 statements on 357 images"},
    "xflickrco": {"train": "145,000 captions on 29,000 images",
                  "valid": "5,070 captions on 1,014 images",
                  "test": "2,000 captions on 2,000 images"},
}
UNITS = {"xgqa": "questions", "xvnli": "statements", "xflickrco": "captions"}
SHOTS = (1, 5, 10, 20, 25, 48, 50, 100)  # images of the few-shot sets
NEEDED = ("train", "test")  # the splits that train.py reads; the others are for few-shot training

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


# --------------------------------------------------------------------------------------------------
# The check


class Report:
    """What is found in a data folder, and what stands in the way of each of train.py's runs.

    Wherever a run is named, a part of its name stands for several: "xgqa", or "" for all of them.
    """

    def __init__(self, folder):
        self.folder, self.labels = folder, set()
        # (level, run, text) -> the languages of which it is true
        # level: "error", "missing" (the text begins with the path), "there" or "note"
        self.findings = {}
        self.lacking = {}  # "cclm xgqa", … -> reasons
        for task in data.LANGUAGES:
            for model in evaluation.MODELS:
                self.lacking[f"{model} {task}"] = []

    def add(self, level, run, text, language=None):
        languages = self.findings.setdefault((level, run, text), [])
        if language:
            languages.append(language)
        if level == "error":
            self.stop(run, "errors")

    def stop(self, run, reason):
        for name, reasons in self.lacking.items():
            if run in name and reason not in reasons:
                reasons.append(reason)

    def attempt(self, run, function, *arguments):
        """-> function(*arguments), or None where that is an InputError, which becomes a finding."""
        try:
            return function(*arguments)
        except InputError as error:
            self.add("error", run, str(error))

    def has(self, path):
        return os.path.exists(os.path.join(self.folder, path))

    def texts(self, level):
        found = []
        for of_level, _, text in self.findings:
            if of_level == level:
                found.append(text)
        return found


def check(folder):
    """-> Report on a data folder."""
    report = Report(folder)
    # GQA's answers
    path = "gqa/annotations/trainval_ans2label.json"
    if report.has(path):
        report.labels = set(report.attempt("xgqa", data.read_labels, folder) or ())
        report.add("there", "xgqa", f"{path}: {len(report.labels):,} (published: 1,842)")
    else:
        report.add("missing", "xgqa", path)
        report.stop("xgqa", "label map missing")

    # annotation files one by one, against each other, and what they are about
    for task in data.LANGUAGES:
        splits = read_splits(report, task)
        for (split, shots, language), records in splits.items():
            check_records(report, task, split, shots, language, records)
        compare_languages(report, task, splits)
        compare_splits(report, task, splits)
        check_pictures(report, task, splits)

    # similar images, from which UC2 learns retrieval
    path = "flickr30k/hard_negative.pkl"
    if report.has(path):
        report.attempt("uc2 xflickrco", data.read_hard_negatives, folder, [])
    else:
        report.add("missing", "uc2 xflickrco", f"{path} (optional)")
    return report


def read_splits(report, task):
    """{(split, shots, language): records} of every annotation file that can be read."""
    splits = {}
    for split, name in data.ANNOTATIONS[task].items():
        languages = data.LANGUAGES[task] if "{language}" in name else ["en"]
        for language in languages:
            for shots in SHOTS if split == "few-shot" else [None]:
                which = report.folder, task, split, language, shots
                try:
                    data.annotation_file(*which)
                except InputError:
                    # some of the other files are nowhere to be had
                    if split in PUBLISHED[task]:
                        report.add("missing", task, name, language)
                    if split in NEEDED:
                        report.stop(task, f"{split} files missing")
                    continue
                # None where it is broken
                found = report.attempt(task, data.read_records, *which)
                if found:
                    splits[split, shots, language] = found[1]
    return splits


def check_records(report, task, split, shots, language, records):
    """What one file tells by itself."""
    name = f"{shots} shots" if shots else split

    # how many there are: the same in several languages is one line of the report
    images = {record.image for record in records}
    counts = f"{len(records):,} {UNITS[task]} on {len(images):,} images"
    published = PUBLISHED[task].get(name, "")
    if not counts.startswith(published):
        counts += f" (published: {published})"
    report.add("there", task, f"{name}: {counts}", language)
    if not records:
        report.add("error", task, f"{name}: no records", language)

    # which of them are unusual
    empty, unlabelled, unknown = [], [], []
    for record in records:
        if not data.clean_caption(record.text, None):
            empty.append(record.id)
        if record.label == "-":
            unlabelled.append(record.id)
        if report.labels and not report.labels.issuperset(record.answers):
            unknown.append(f"{record.id}: {[*record.answers]}")
    # training stops at an answer that is no label, testing counts it as wrong
    severe = "error" if split in ("train", "few-shot") else "note"
    for level, examples, what in (
        ("note", empty, "have no text; in retrieval UC2 keeps them, CCLM leaves their image out"),
        ("note", unlabelled, "have no gold label; UC2 counts them as wrong, CCLM leaves them out"),
        (severe, unknown, "have an answer that is no label"),
    ):
        if examples:
            text = f"{name}: {len(examples):,} of {len(records):,} {UNITS[task]} {what}"
            report.add(level, task, f"{text} (such as {examples[0]})", language)


def compare_languages(report, task, splits):
    """The test, or dev, has the same ids, images and answers in all languages."""
    first = {}  # split -> the first of its languages, {id: (image, label, answers)}
    for (split, _, language), records in splits.items():
        if split not in ("dev", "test"):
            continue
        found = {record.id: (record.image, record.label, record.answers) for record in records}
        # each language against the first
        original, expected = first.setdefault(split, (language, found))
        wrong = [key for key in expected | found if found.get(key) != expected.get(key)]
        if wrong:
            text = f"{len(wrong):,} {UNITS[task]} are not as in {original} (such as {wrong[0]})"
            report.add("error", task, f"{split}: {text}", language)


def compare_splits(report, task, splits):
    """What is tested must not have been trained on."""
    images, ids = collections.defaultdict(set), collections.defaultdict(set)
    for (split, _, _), records in splits.items():
        images[split].update(record.image for record in records)
        ids[split].update(record.id for record in records)
    for split in data.ANNOTATIONS[task]:
        keys, what = images, "images"
        # XVNLI's training file has other statements about the same images
        if (task, split) == ("xvnli", "train"):
            keys, what = ids, "statements"
        shared = sorted(keys[split] & keys["test"])
        if shared and split != "test":
            text = f"{split} and test share {len(shared):,} {what} (such as {shared[0]})"
            report.add("error", task, text)


def check_pictures(report, task, splits):
    """Look up the images of every split and their region features by name, open 20 of each."""
    # who sees what of which images
    wanted = collections.defaultdict(dict)  # (model, kind, folder, split) -> {image: path}
    for (split, _, _), records in splits.items():
        features = data.feature_folder(report.folder, task, split)
        for record in records:
            path = data.image_path(report.folder, task, record.image)
            wanted["cclm", "images", os.path.dirname(path), split][record.image] = path
            wanted["uc2", "regions", features, split][record.image] = path

    # what a folder has is listed once: much faster than to look for every file
    opened = {}
    for (model, kind, folder, split), paths in wanted.items():
        run = f"{model} {task}"
        if folder not in opened:
            opened[folder] = report.attempt(run, list_keys, kind, folder) or {}
        # how many of this split's are there
        there = [key for key in paths if key in opened[folder]]
        short = os.path.relpath(folder, report.folder)
        text = f"{short}: {len(there):,} of {len(paths):,} {kind} of {split}"
        if len(there) == len(paths):
            report.add("there", run, text)
        else:
            absent = next(key for key in paths if key not in opened[folder])
            report.add("missing", run, f"{text} (not {absent})")
            if split in NEEDED:
                report.stop(run, f"{kind} of {split} missing")
        # at most 20, from the first to the last
        sample = there[:: len(there) // 20 + 1]
        if kind == "regions" and sample:
            report.attempt(run, check_regions, folder, sample)
        elif kind == "images":
            for key in sample:
                report.attempt(run, data.read_image, paths[key])


def list_keys(kind, folder):
    """The images that a folder has, or those whose region features it has."""
    if not os.path.isdir(folder):
        return {}
    if kind == "regions":
        return data.Regions(folder, []).row_of
    return {name.removesuffix(".jpg") for name in os.listdir(folder)}


def check_regions(folder, keys):
    """InputError for what no model should see."""
    regions = data.Regions(folder, keys)
    for key, row in zip(keys, regions.rows):
        features, boxes = regions.features[row], regions.boxes[row]
        count = regions.counts[row]
        with reading(f"{folder}, image {key}"):
            check_image(features[:count], boxes[:count], *regions.sizes[row].tolist())


def check_tokenizer(report, path):
    tokenizer = report.attempt("", data.Tokenizer, path)
    if tokenizer and tokenizer.sha256 != data.XLMR_SHA256:
        ids = f"{tokenizer.vocabulary:,} ids, expected 250,002"
        report.add("error", "", f"{path}: not XLM-R's sentencepiece.bpe.model ({ids})")


# --------------------------------------------------------------------------------------------------
# The report as text and as JSON


def lines_of(report, possible):
    lines = [f"IGLUE data in {report.folder}"]
    nothing = not report.texts("there")
    if nothing:
        lines.append("none of IGLUE's annotation files: name the folder that gqa, xGQA, … lie in")
    for (level, run, text), languages in report.findings.items():
        if languages:
            text += f": {' '.join(languages)}"
        lines.append(f"{level:<8} {run:<15} {text}")

    missing = report.texts("missing")
    if missing:
        lines += ["", "where to get what is missing"]
    for path, source in SOURCES.items():
        if nothing or any(text.startswith(path) for text in missing):
            lines += [f"  {path}", f"      {source}"]

    # which runs can start
    verdict = f"possible: {', '.join(possible) or 'none'}"
    for run, reasons in report.lacking.items():
        if reasons:
            verdict += f"; not {run} ({', '.join(reasons)})"
    return [*lines, "", verdict]


def main(argv=None):
    parser = evaluation.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="with gqa, xGQA, XVNLI, flickr30k, xFlickrCO, mscoco in it")
    parser.add_argument("--tokenizer", metavar="FILE", help="is this XLM-R's own model?")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)

    # every finding, then what follows for the runs
    report = check(args.folder)
    if args.tokenizer:
        check_tokenizer(report, args.tokenizer)
    possible = [run for run, reasons in report.lacking.items() if not reasons]
    if args.json:
        findings = [[*key, languages] for key, languages in report.findings.items()]
        print(json.dumps({"folder": args.folder, "possible": possible, "lacking": report.lacking,
                          "findings": findings}, indent=1))
    else:
        print("\n".join(lines_of(report, possible)))
    sys.exit(int(not possible or bool(report.texts("error"))))


if __name__ == "__main__":
    evaluation.command(main)
