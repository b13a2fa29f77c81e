"""The recipes of the paper (section 4.1) in one table, and the flags of train.py.

`RECIPES` holds every number of the paper; what it leaves open is filled with the reference implementations' values, and
says so. A checkpoint may bring its own recipe where the paper's cannot fit it (the miniature's do), and a flag
overrides both; `recipe_of` tells what is not the paper's.
"""

import argparse
import math
import os
import sys
from dataclasses import asdict, dataclass, replace

from files import COUNT, YES_NO, InputError, check_fields, number, numbers, one_of, optional, whole


@dataclass(frozen=True)
class Recipe:
    """Every number of a fine-tuning run. Paper section 4.1 unless a comment says otherwise."""

    epochs: int
    batch_size: int  # effective: over all processes and accumulation steps
    lr: float
    vision_lr: float | None = None  # None: as lr
    embedding_lr: float | None = None  # None: as lr
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of all steps; linear up, then linear down to 0
    suf_k: int = 3  # section 3: layers that thaw per epoch
    betas: tuple = (0.9, 0.98)  # CCLM's code
    eps: float = 1e-8  # CCLM's code
    clip: float | None = None  # global gradient norm; CCLM's code does not clip
    dropout: float = 0.1  # both references' models
    drop_path: float = 0.1  # stochastic depth of CCLM's image encoder
    image_size: int = 384
    augment: bool = True  # CCLM's code
    few_shot_epochs: int = 20  # IGLUE's, as section 5.4 says; rate and epoch are chosen on development data
    few_shot_lrs: tuple = (1e-4, 5e-5, 1e-5)
    micro_batch: int = 32  # most examples of one process in one forward pass; more is accumulated (ours)
    # text, as each reference reads it: clean-up, most words and most tokens in training and testing (None: no limit)
    clean: str = ""
    train_words: int | None = None
    test_words: int | None = None
    train_tokens: int | None = None
    test_tokens: int | None = None


CCLM = {"lr": 3e-5, "vision_lr": 2e-5}
CAPTIONS = {"clean": "caption", "train_words": 80, "test_words": 80, "train_tokens": 80}
UC2 = {"betas": (0.9, 0.999), "eps": 1e-6, "clip": 1.0}  # IGLUE's
RECIPES = {
    ("cclm", "xgqa"): Recipe(5, 256, **CCLM, clean="question", train_words=30, test_words=50, train_tokens=40),
    ("cclm", "xvnli"): Recipe(10, 144, **CCLM, **CAPTIONS, micro_batch=36),
    ("cclm", "xflickrco"): Recipe(10, 128, **CCLM, **CAPTIONS, test_tokens=80),
    ("uc2", "xgqa"): Recipe(5, 256, lr=4e-5, **UC2, train_tokens=40, test_tokens=40, micro_batch=64),
    ("uc2", "xvnli"): Recipe(10, 128, lr=2e-5, **UC2, train_tokens=80, test_tokens=80, micro_batch=64),
    ("uc2", "xflickrco"): Recipe(10, 64, lr=2e-5, **UC2, train_tokens=80, test_tokens=80, micro_batch=16),
}
FEW_SHOT_BATCH = {  # IGLUE's batch sizes: (up to so many shots, batch size)
    "xgqa": [(1, 8), (5, 16), (10, 32), (48, 64)],
    "xvnli": [(1, 2), (5, 16), (10, 32), (48, 64)],
    "xflickrco": [(1, 1), (5, 2), (10, 4), (25, 8), (50, 16), (100, 32)],
}


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint or a run's folder may bring

FINITE = sys.float_info.max
POSITIVE = number("a positive number", lambda value: 0 < value <= FINITE)
PROBABILITY = number("a number from 0 to below 1", lambda value: 0 <= value < 1)
TOKENS = optional(whole(3, 10**6))  # <s>, a piece of the text, </s>
CHECKS = {  # of every field of a recipe
    "epochs": COUNT,
    "batch_size": COUNT,
    "lr": POSITIVE,
    "vision_lr": optional(POSITIVE),
    "embedding_lr": optional(POSITIVE),
    "weight_decay": number("a number from 0", lambda value: 0 <= value <= FINITE),
    "warmup": number("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "suf_k": COUNT,
    "betas": numbers("two numbers from 0 to below 1", (2,), PROBABILITY),
    "eps": POSITIVE,
    "clip": optional(POSITIVE),
    "dropout": PROBABILITY,
    "drop_path": PROBABILITY,
    "image_size": whole(1, 4096),
    "augment": YES_NO,
    "few_shot_epochs": COUNT,
    "few_shot_lrs": numbers("1 to 100 positive numbers", range(1, 101), POSITIVE),
    "micro_batch": COUNT,
    "clean": one_of("", "question", "caption"),
    "train_words": optional(COUNT),
    "test_words": optional(COUNT),
    "train_tokens": TOKENS,
    "test_tokens": TOKENS,
}


def check_recipe(fields, where):
    """InputError unless `fields` are those of a recipe, all and no other, each as `CHECKS` says."""
    check_fields(fields, CHECKS, where)
    if unknown := [name for name in fields if name not in CHECKS]:
        raise InputError(f"{where}: unknown field {unknown[0]!r}")


def recipe_of(args, config):
    """The paper's recipe, changed by the checkpoint's own, changed by the flags.

    -> (recipe, what of it that this run uses is not the paper's).
    """
    paper = RECIPES[args.model, args.task]
    recipes = config.get("recipe", {})
    own = recipes.get(args.task, {}) if isinstance(recipes, dict) else recipes
    where = f"{args.checkpoint}: the recipe it brings"
    if not isinstance(own, dict):
        raise InputError(f"{where} is no dict by task of dicts")
    check_recipe(asdict(paper) | own, where)
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}  # as the paper's
    flags = {name: getattr(args, name) for name in CHECKS if getattr(args, name, None) is not None}
    recipe = replace(paper, **own | flags)
    sees = args.model == "cclm"  # UC2 reads region features
    used = {"suf_k": args.suf is True, "few_shot_epochs": args.few_shot, "few_shot_lrs": args.few_shot,
            "micro_batch": False,  # the plan tells the forward passes
            "image_size": sees, "augment": sees, "drop_path": sees, "vision_lr": sees}
    source = {name: "flag" if name in flags else "checkpoint" for name in own | flags if used.get(name, True)}

    def shown(some, name):
        value = getattr(some, name)
        if value is None:
            return "as lr" if name.endswith("_lr") else "none"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    changed = [f"{name} {shown(recipe, name)} ({source[name]}; paper {shown(paper, name)})"
               for name in source if getattr(recipe, name) != getattr(paper, name)]
    return recipe, changed


def few_shot_recipe(args, english):
    """The English run's recipe with IGLUE's few-shot numbers (or the checkpoint's, where it brings its own)."""
    sizes = FEW_SHOT_BATCH[args.task]
    batch_size = next((size for shots, size in sizes if args.shots <= shots), sizes[-1][1])
    flags = {name: getattr(args, name) for name in ("epochs", "batch_size") if getattr(args, name) is not None}
    rates = {"few_shot_lrs": (args.lr,)} if args.lr else {}
    return replace(english, **{"epochs": english.few_shot_epochs, "batch_size": batch_size} | flags | rates)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv, description):
    parser = argparse.ArgumentParser(description=description)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    group = parser.add_argument_group("what")
    group.add_argument("--model", choices=["uc2", "cclm"], help="the encoder")
    group.add_argument("--task", choices=["xgqa", "xvnli", "xflickrco"], help="the task")

    group = parser.add_argument_group("strategy (at most one; none: standard fine-tuning)")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--suf", nargs="?", type=int, const=True, metavar="K",
                     help="scheduled unfreezing: K more layers per epoch, from the top (default: the recipe's)")
    one.add_argument("--lr-decay", type=float, metavar="D",
                     help="layer-wise decay: learning rate times D per layer down")
    one.add_argument("--train-top", type=int, metavar="N",
                     help="train only the top N layers; the layers below and the embeddings stay frozen")
    group.add_argument("--freeze", nargs="*", choices=["embeddings", "vision"],
                       help="what stays frozen beside layers (default: embeddings with --train-top, else nothing)")
    group.add_argument("--order", choices=["top-down", "bottom-up", "random", "fisher"],
                       help="order in which --suf thaws layers (default: top-down, as in the paper; fisher: largest "
                            "trace of the Fisher information first)")

    group = parser.add_argument_group("data (default: the embedded miniature)")
    group.add_argument("--data", metavar="DIR", help="folder with IGLUE's files (python data.py --check DIR)")
    group.add_argument("--checkpoint", metavar="FILE", help="official pre-trained checkpoint")
    group.add_argument("--tokenizer", metavar="FILE", help="XLM-R's sentencepiece.bpe.model")
    group.add_argument("--limit", type=int, metavar="N",
                       help="only the first N records for training, and N per language")

    group = parser.add_argument_group("recipe (default: the paper's for model and task)")
    group.add_argument("--epochs", type=int, help="passes over the training data")
    group.add_argument("--batch-size", type=int, help="effective: over all processes and accumulation steps")
    group.add_argument("--lr", type=float, help="peak learning rate")
    group.add_argument("--vision-lr", type=float, help="peak learning rate of CCLM's image encoder")
    group.add_argument("--embedding-lr", type=float,
                       help="peak learning rate of the embeddings (default: as --lr; with --lr-decay D and N layers lr "
                            "D^N)")
    group.add_argument("--first-image-negatives", action="store_true",
                       help="UC2 on xFlickrCO: negative captions all from the first image, the mistake in IGLUE's code")
    group.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")

    group = parser.add_argument_group("few-shot: go on from a finished English run (section 5.4)")
    group.add_argument("--few-shot", metavar="LANG", help="the language")
    group.add_argument("--shots", type=int, help="number of images whose examples are trained on")
    group.add_argument("--init", metavar="RUN", help="folder of the English run; brings model, task and data with it")

    group = parser.add_argument_group("speed and memory")
    group.add_argument("--precision", choices=["float32", "bf16"],
                       help="of activations; weights stay float32 (default: bf16 on a GPU, float32 elsewhere)")
    group.add_argument("--grad-accum", type=int, metavar="N",
                       help="forward passes per optimizer step and process (default: as few as the recipe's micro "
                            "batch allows)")
    group.add_argument("--questions-per-image", type=int, default=1, metavar="N",
                       help="keep up to N examples of an image together, to share its encoding (default: 1)")
    group.add_argument("--compile", action="store_true", help="torch.compile the layers")
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes share them
    group.add_argument("--workers", type=int, default=min(16, cores // 2),
                       help="processes that load images (default: half the cores of this process, at most 16)")
    group.add_argument("--image-cache", metavar="DIR",
                       help="keep resized images here as uint8, memory-mapped; before torchrun, build it with one "
                            "process (--dry-run does)")

    group = parser.add_argument_group("run")
    group.add_argument("--run", "--run-dir", metavar="DIR",
                       help="folder of the run (default: runs/MODEL-TASK-STRATEGY-SEED); under torchrun say --run-dir, "
                            "because it takes --run for its own")
    group.add_argument("--resume", action="store_true", help="go on where the run in this folder stopped")
    group.add_argument("--eval-every-epoch", action="store_true", help="test in all languages after every epoch")
    group.add_argument("--save-epochs", action="store_true", help="keep the weights of every epoch: epoch1.pt, ...")
    group.add_argument("--save-every", type=int, default=2000, metavar="STEPS",
                       help="write last.pt every so many optimizer steps, and after every epoch (default: 2000)")
    group.add_argument("--deterministic", action="store_true", help="same bits on a GPU too (slower)")
    group.add_argument("--dry-run", action="store_true",
                       help="print data counts, schedule and parameter groups; no training")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser, args):
    """Refuse what contradicts itself, fill in what is frozen."""
    if args.freeze is None:
        args.freeze = ["embeddings"] if args.train_top is not None else []
    brought = ("data", "checkpoint", "tokenizer")
    given = [flag for flag in brought if getattr(args, flag)]
    few_shot = [flag for flag in ("few_shot", "shots", "init") if getattr(args, flag)]
    if few_shot and len(few_shot) < 3:
        parser.error("--few-shot LANG, --shots N and --init RUN go together")
    if few_shot and (given or args.model or args.task or args.image_cache):
        parser.error("--init RUN brings model, task, data, checkpoint, tokenizer and image cache with it")
    if few_shot and (strategy_name(args) != "standard" or args.dry_run):
        parser.error(
            "few-shot training takes no strategy (section 5.4: they belong to the English run) and no --dry-run")
    if few_shot and (args.vision_lr or args.embedding_lr or args.eval_every_epoch or args.save_epochs):
        parser.error("few-shot training has one rate for all parts and keeps the best epoch: --vision-lr, "
                     "--embedding-lr, --eval-every-epoch and --save-epochs do not go with it")
    if not few_shot and not (args.model and args.task):
        parser.error("--model and --task are required")
    if given and len(given) < 3:
        missing = " and ".join(f"--{flag}" for flag in brought if flag not in given)
        parser.error(f"--{given[0]} needs {missing} (all three, or none of them for the miniature)")
    if args.order and args.suf is None:
        parser.error("--order is the order of --suf, which is not given")
    if wrong := contradiction(args):
        parser.error(wrong)
    for name in ("suf", "lr_decay", "epochs", "batch_size", "lr", "vision_lr", "embedding_lr", "shots", "grad_accum",
                 "questions_per_image", "limit", "save_every"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    if args.lr_decay is not None and args.lr_decay > 1:
        parser.error(f"--lr-decay must be at most 1, got {args.lr_decay}")
    if min(args.workers, args.seed, args.train_top or 0) < 0:
        parser.error("--workers, --seed and --train-top must not be negative")
    if large := next((name for name, value in vars(args).items() if type(value) is int and value >= 2**63), None):
        parser.error(f"--{large.replace('_', '-')} must be less than 2**63")


def contradiction(args):
    """What the flags ask of a model and task that have no such thing, or None."""
    uc2, retrieval = args.model == "uc2", args.task == "xflickrco"
    asked = {"--freeze vision": uc2 and "vision" in args.freeze, "--vision-lr": uc2 and args.vision_lr,
             "--image-cache": uc2 and args.image_cache}
    if flag := next((flag for flag in asked if asked[flag]), None):
        return f"{flag}: UC2 has no image encoder, it reads region features"
    if args.model == "cclm" and retrieval and args.questions_per_image > 1:
        return "--questions-per-image: CCLM's batches in retrieval hold every image with one caption"
    if args.model and args.first_image_negatives and not (uc2 and retrieval):
        return "--first-image-negatives is a mistake of UC2's training on xFlickrCO alone"
    return None


def strategy_name(args):
    """Short name of what was asked for beyond standard fine-tuning; part of the default folder's name."""
    name = "standard"
    if args.suf is not None:
        name = "suf" if args.suf is True else f"suf{args.suf}"
        name += f"-{args.order}" if args.order not in (None, "top-down") else ""
    if args.lr_decay is not None:
        name = f"decay{args.lr_decay:g}"
    if args.train_top is not None:
        name = f"top{args.train_top}"
    frozen, usual = set(args.freeze), {"embeddings"} if args.train_top is not None else set()
    changes = [f"frozen-{group}" for group in sorted(frozen - usual)]
    return "-".join([name, *changes, *(f"trained-{group}" for group in sorted(usual - frozen))])
