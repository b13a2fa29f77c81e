"""The folder of a run, as train.py writes it: how it begins, what a resumed run must share, its log and its weights.

args.json      what the run was asked for, its recipe, versions, fingerprints of the data
log.jsonl      a line per optimizer step, a line per evaluation
last.pt        weights, optimizer and step, to resume from
model.pt       the result under official tensor names; epochN.pt with --save-epochs
"""

import functools
import hashlib
import json
import operator
import os
import subprocess
import sys
import zipfile
from dataclasses import asdict

import numpy as np
import PIL
import sentencepiece
import torch
import torchvision

import files
from files import InputError
from model import file_tensors
from processes import ranks, say

# ---------------------------------------------------------------------------------------------------------------------
# Log and weights


class Log:
    """log.jsonl: one line per step and per evaluation.

    It holds no times: a resumed run's equals an uninterrupted one's.
    """

    def __init__(self, run, step=0):
        """Keep an interrupted run's lines up to optimizer step `step`, but not what was evaluated after it: `fit` does
        that again. InputError where a step is missing.
        """
        path, kept, steps = os.path.join(run, "log.jsonl"), [], 0
        if step and os.path.isfile(path):
            lines = [line for line in files.read_bytes(path).splitlines(True) if line.endswith(b"\n")]
            for number, line in enumerate(lines, start=1):
                where = f"{path}, line {number}"
                entry = files.parse_json(line, where)
                at = files.expect(entry, "step", int, where)
                if at < step or at == step and "loss" in entry:
                    kept.append(line)
                    steps += "loss" in entry
        if steps != step:
            raise InputError(f"{path}: it has {steps} steps, last.pt is from step {step}: it was changed since")
        files.write(path, lambda file: file.writelines(kept))
        self.file = open(path, "a", encoding="utf-8")

    def add(self, **entry):
        with files.writing(self.file.name):
            self.file.write(json.dumps(entry) + "\n")

    def sync(self):
        with files.writing(self.file.name):
            self.file.flush()
            os.fsync(self.file.fileno())


def write_tensors(path, content):
    files.write(path, lambda file: torch.save(content, file))


def write_weights(path, model):
    """The model under its official names, with what no shape tells."""
    write_tensors(path, {"model": file_tensors(model), "config": model.config()})


def fingerprint(path):
    """SHA-256 of a file's content, which is read once per process as long as nobody writes to it."""
    found = os.stat(path)
    return digest_of(path, found.st_ino, found.st_size, found.st_mtime_ns)


@functools.cache
def digest_of(path, *_):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def versions():
    def git(*command):
        folder = os.path.dirname(os.path.abspath(__file__))
        try:
            return subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):  # no git, or no repository
            return None

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return {"python": sys.version.split()[0], "torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": np.__version__, "sentencepiece": sentencepiece.__version__, "pillow": PIL.__version__,
            "commit": commit and commit.strip(), "uncommitted_changes": None if changes is None else changes != ""}


# ---------------------------------------------------------------------------------------------------------------------
# Starting and resuming


def start_folder(args, recipe, changed, model, examples, inputs, more=0):
    """Make the run's folder with its args.json. -> the settings that a resumed run must share.

    more: how many times the size of the weights will be needed beside the usual.
    InputError, before any work is done, for what could not be finished or would overwrite another run.
    """
    settings = settings_of(args, recipe, examples.source)
    if args.resume:
        resume(args.run, settings)
    if ranks()[0] == 0:
        existing = os.path.isfile(os.path.join(args.run, "args.json"))
        if existing and not args.resume:
            raise InputError(f"{args.run}: a run is already here; --resume goes on with it, --run DIR starts another")
        if args.resume and not existing:
            say(f"{args.run}: nothing to resume yet, starting")
        weights = 4 * sum(parameter.numel() for parameter in model.parameters())  # bytes
        kept = more + (recipe.epochs if args.save_epochs else 0)
        # last.pt beside its predecessor, with Adam's state; model.pt
        make_folder(os.path.join(args.run, "predictions"))
        files.require_space(args.run, weights * (3 + 3 + 1 + kept))
        paths = {name: os.path.abspath(getattr(args, name)) for name in ("data", "checkpoint", "tokenizer")}
        files.write_json(os.path.join(args.run, "args.json"),
                        {"args": vars(args) | paths, "recipe": asdict(recipe), "not_as_in_the_paper": changed,
                         "versions": versions(), "fingerprints": {path: fingerprint(path) for path in inputs}})
    return settings


def make_folder(path):
    """A folder, with those above it, where there is none. InputError where it cannot be made."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror})") from None


def input_files(args, examples, tests, *pictures):
    """Paths of what a run reads, for args.json: all but images and features themselves."""
    paths = [examples.source, *(part.source for part in tests.examples.values()), args.tokenizer]
    if args.task == "xgqa":
        paths.append(label_map(args))
    if args.model == "uc2":
        paths += [os.path.join(regions.folder, name) for regions in pictures for name in ("meta.json", "ids.txt")]
        hard_negatives = os.path.join(args.data, "flickr30k", "hard_negative.pkl")
        reads_it = args.task == "xflickrco" and not args.few_shot and os.path.isfile(hard_negatives)
        paths += [hard_negatives] if reads_it else []
    return paths


def first_weights(args):
    """The file with the weights that training starts from."""
    return os.path.join(args.init, "model.pt") if args.few_shot else args.checkpoint


def label_map(args):
    return os.path.join(args.data, "gqa", "annotations", "trainval_ans2label.json")


FLAGS = ("model", "task", "suf", "lr_decay", "train_top", "freeze", "order", "seed", "limit", "questions_per_image",
         "first_image_negatives", "precision", "deterministic")  # that no resumed run may change, beside its recipe


RECIPE_FLAGS = ("epochs", "batch_size", "lr", "vision_lr", "embedding_lr")  # of the command line


def settings_of(args, recipe, source):
    """What a resumed run must have in common with the run it continues."""
    processes = ranks()[1]
    settings = {name: getattr(args, name) for name in FLAGS} | json.loads(json.dumps(asdict(recipe)))
    settings |= {"image cache": args.image_cache is not None,  # crops come from resized images
                 "processes x accumulation": processes * args.grad_accum, "training file": fingerprint(source),
                 "tokenizer": fingerprint(args.tokenizer), "first weights": fingerprint(first_weights(args))}
    if args.task == "xgqa":
        settings["label map"] = fingerprint(label_map(args))
    if args.model == "cclm" and args.task == "xflickrco":  # the other processes' images and captions are negatives
        settings["processes"] = processes
    return settings


def check_same(run, then, now):
    """InputError for the first of the settings `now` that was another one `then`.

    Compared as they are told: --suf alone, which is True, is not --suf 1.
    """
    for name, value in now.items():
        if str(then.get(name)) != str(value):
            raise InputError(f"{run}: cannot resume with other settings: {name} was {then.get(name)}, now {value}")


def resume(run, settings, model=None, optimizer=None):
    """Load last.pt into model and optimizer, or, without them, only check that it is one to go on from.

    -> optimizer steps done (0 where the run stopped before its first last.pt).
    """
    path = os.path.join(run, "last.pt")
    if not os.path.isfile(path):
        return 0
    try:
        if model is None and ranks()[0] == 0:  # torch does not compare checksums; one process reads all for all
            if damaged := zipfile.ZipFile(path).testzip():
                raise ValueError(f"checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=model is None)
        then, step = dict(state["settings"]), operator.index(state["step"])
        if step < 1:
            raise ValueError(f"step {step}")
        check_same(run, then, settings)
        if model is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            for parameter, moments in optimizer.state.items():
                if any(moments[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                    raise ValueError("shapes of the optimizer's state")
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes torch raise
        raise InputError(f"{path}: not a readable state, or a truncated one ({type(error).__name__}); "
                         "without it, --resume starts over") from None
    return step
