"""The embedded miniature: the world of mini_world.py on disk, a tokenizer, and a tiny CCLM and UC2 pre-trained on it.

    python train.py --model cclm --task xgqa --suf      uses it; nothing here needs to be run by hand
    python mini.py --build                              makes tokenizer and checkpoints anew, from nothing
    python mini.py --build --seed 1 --out other         another pre-training, to see how much depends on it
    python mini.py --build --size medium --out medium   a larger world and larger models
    python mini.py --show                               a contact sheet: scenes, questions, and what two runs answer

`prepare` is what train.py calls where no data is given: it writes the world to mini_data/ once and names the shipped
files in miniature/ (at most 1 MB each). From there on nothing knows that it is a miniature: IGLUE's files, official
names of tensors, the ordinary tokenizer. Where the paper's recipe cannot fit, the checkpoint brings its own, and
train.py prints it.
"""

import argparse
import contextlib
import functools
import hashlib
import os
import shlex
import sys
import tempfile

import sentencepiece
import torch
from tqdm import tqdm

import data
import files
import mini_languages
import mini_pretrain
import mini_show
import mini_world
from files import InputError
from mini_world import WORLD_SEED
from model import file_tensors
from processes import accelerator

HERE = os.path.dirname(os.path.abspath(__file__))
WORLD = os.path.join(HERE, "mini_data")  # written on first use
SHIPPED = os.path.join(HERE, "miniature")  # tokenizer.model, cclm.pt, uc2.pt
DEFAULT_RUNS = ["runs/cclm-xgqa-standard-seed0", "runs/cclm-xgqa-suf-seed0"]  # of --show
TOKENIZER_SEED = 0  # whatever the seeds of world and pre-training

# ---------------------------------------------------------------------------------------------------------------------
# What train.py asks for


def prepare(model, writer):
    """-> (data folder, checkpoint, tokenizer) of the miniature. Where its world is missing, `writer` writes it."""
    checkpoint, tokenizer = os.path.join(SHIPPED, f"{model}.pt"), os.path.join(SHIPPED, "tokenizer.model")
    for path in (checkpoint, tokenizer):
        if not os.path.isfile(path):
            raise InputError(f"{path}: this part of the miniature is missing; `python mini.py --build` makes it anew")
    if writer:
        write_world(WORLD, "small")
    return WORLD, checkpoint, tokenizer


def write_world(folder, size):
    """The world as IGLUE's files. One that is there already is kept, unless another version of the code wrote it."""
    mark = os.path.join(folder, "made_by.txt")
    code = b"".join(files.read_bytes(module.__file__) for module in (mini_world, mini_languages))
    version = f"{size} {WORLD_SEED} {hashlib.sha256(code).hexdigest()}\n".encode()

    def is_current():
        return os.path.isfile(mark) and files.read_bytes(mark) == version

    if is_current():
        return
    if os.path.exists(folder) and not os.path.isfile(mark):
        raise InputError(f"{folder}: not a world of the miniature; move it away, the miniature's is written there")
    parent, name = os.path.split(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=parent, ignore_cleanup_errors=True) as beside:
            if os.path.isfile(mark):
                print(f"{folder}: of another size or by another version of mini_world.py; writing it anew", flush=True)
                with contextlib.suppress(FileNotFoundError):  # another process has just done the same
                    os.rename(folder, os.path.join(beside, "old"))
            new = os.path.join(beside, "new")
            mini_world.write_world(new, WORLD_SEED, size, progress=functools.partial(tqdm, dynamic_ncols=True))
            files.write(os.path.join(new, "made_by.txt"), lambda file: file.write(version))
            os.rename(new, folder)
    except OSError as error:
        if not is_current():  # another process was not faster
            raise InputError(f"{folder}: cannot write the miniature's world there ({error.strerror})") from None


# ---------------------------------------------------------------------------------------------------------------------
# --build


def train_tokenizer(path, size):
    """A unigram model of romanised text, its vocabulary so small that languages share pieces. Same bytes every time."""
    corpus = mini_world.tokenizer_corpus(20_000, mini_world.WORLD_SIZES[size], TOKENIZER_SEED)
    path = os.path.abspath(path)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # the file records the paths it is given
        files.write("rules.tsv", lambda file: file.write(mini_languages.normalization_rules().encode()))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_prefix="tokenizer", vocab_size=mini_pretrain.PRETRAINING[size].pieces,
            character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_tsv="rules.tsv",
            num_threads=1, minloglevel=2)
        content = files.read_bytes("tokenizer.model")
    files.write(path, lambda file: file.write(content))


def recipe(name, size):
    """What of the fine-tuning of a model is not the paper's; the reasons are in the README ("The miniature")."""
    p, small = mini_pretrain.PRETRAINING[size], mini_pretrain.PRETRAINING["small"]
    slower = p.lr / small.lr  # the best rate of fine-tuning was measured in the small world; elsewhere it is a guess
    if name == "cclm":
        lr, layers, share = 1e-3 * slower, p.text_layers + p.cross_layers, 3 / 18  # of the layers, per epoch
        own = {"vision_lr": lr * 2 / 3, "drop_path": 0.0, "augment": False}
    else:
        lr, layers, share, own = 5e-4 * slower, p.uc2_layers, 3 / 12, {}
    return own | {"lr": lr, "few_shot_lrs": [lr, lr / 2, lr / 10], "suf_k": round(layers * share), "dropout": 0.0,
                  "image_size": mini_world.WORLD_SIZES[size].image_size, "micro_batch": 256,
                  "batch_size": p.fine_tuning_batch}


def write_checkpoint(path, name, model, tokenizer, size, how):
    """The pre-trained model under the official names, in float16, with the recipe that fits it."""
    config = model.config() | {"tokenizer_sha256": tokenizer.sha256, "pretraining": how,
                               "recipe": {task: recipe(name, size) for task in data.LANGUAGES}}
    halves = {}  # a tensor with two names is stored once

    def half(tensor):
        return halves.setdefault(tensor.data_ptr(), tensor.detach().cpu().half())

    computed = model.constants()
    tensors = {name: half(tensor) for name, tensor in file_tensors(model).items() if name not in computed}
    files.write(path, lambda file: torch.save({"model": tensors, "config": config}, file))


def build(names, size, seed, steps, folder):
    """Tokenizer and checkpoints in `folder`; for any world but the embedded one also its data, in `folder`/data."""
    os.makedirs(folder, exist_ok=True)
    world = WORLD if size == "small" else os.path.join(folder, "data")
    tokenizer_path = os.path.join(folder, "tokenizer.model")
    write_world(world, size)
    train_tokenizer(tokenizer_path, size)
    tokenizer = data.Tokenizer(tokenizer_path)
    steps = mini_pretrain.PRETRAINING[size].steps if steps is None else steps
    device = accelerator()
    for name in names:
        model, accuracy = mini_pretrain.pretrain(name, size, tokenizer, seed, steps, device)
        path = os.path.join(folder, f"{name}.pt")
        write_checkpoint(path, name, model, tokenizer, size, {"size": size, "seed": seed, "steps": steps})
        print(f"{path}: {os.path.getsize(path) / 1e3:,.0f} kB, "
              f"{sum(p.numel() for p in model.parameters()):,} parameters; "
              "true statements told from false ones: " + ", ".join(f"{l} {a:.0%}" for l, a in sorted(accuracy.items())))
    if folder != SHIPPED:
        given = {"--data": world, "--checkpoint": os.path.join(folder, f"{names[0]}.pt"), "--tokenizer": tokenizer_path}
        print(f"next: python train.py --model {names[0]} --task xgqa --suf",
              *(f"{flag} {shlex.quote(path)}" for flag, path in given.items()))


def show(runs, path):
    write_world(WORLD, "small")
    mini_show.contact_sheet(WORLD, os.path.join(SHIPPED, "tokenizer.model"), runs, path)
    print(f"{path}: right answers green, wrong ones red")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--build", action="store_true", help="make tokenizer and checkpoints anew")
    what.add_argument("--show", nargs="*", metavar="RUN",
                      help="contact sheet of the answers of two xGQA runs on the miniature "
                           "(default: CCLM, standard and SUF, seed 0)")
    parser.add_argument("--model", choices=["cclm", "uc2"], help="with --build: only this one (default: both)")
    parser.add_argument("--size", choices=mini_world.WORLD_SIZES, default="small",
                        help="with --build: of the world and the models (default: small)")
    parser.add_argument("--seed", type=int, default=0, help="with --build: of pre-training (default: 0)")
    parser.add_argument("--steps", type=int,
                        help="with --build: of pre-training, which begins with phrases alone; 0: random weights "
                             "(default: as the size needs)")
    parser.add_argument("--out", metavar="DIR",
                        help="folder of --build (default: miniature/), PNG of --show (default: contact_sheet.png)")
    args = parser.parse_args(argv)
    if args.size != "small" and not args.out:
        parser.error("--size: only the small world is the embedded one; say --out DIR, where to write another")
    if min(args.steps or 0, args.seed) < 0:
        parser.error("--steps and --seed must not be negative")
    if args.seed >= 2**63:
        parser.error("--seed must be less than 2**63")
    if args.show is not None and len(args.show) not in (0, 2):
        parser.error("--show takes two runs")
    try:
        if args.show is not None:
            show(args.show or DEFAULT_RUNS, args.out or "contact_sheet.png")
            return
        build([args.model] if args.model else ["cclm", "uc2"], args.size, args.seed, args.steps, args.out or SHIPPED)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
