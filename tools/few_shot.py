"""Few-shot (paper section 5.4, IGLUE's protocol): a finished English run goes on in another language.

    python -m tools.few_shot de --shots 48 --init runs/uc2-xgqa-suf-seed0

Trains on the examples of so many images, once for each learning rate of the grid. Rate and epoch
are chosen on development data: xGQA the language's own, XVNLI the English, xFlickrCO the first 1,000
captions of Flickr30k's validation set. Then it tests the language and English. The folder is that of
an ordinary run, with a folder lr-RATE for every rate.
"""

import os
import shlex
import sys
from argparse import Namespace
from dataclasses import replace

import torch.distributed as dist

import data
import eval as evaluation
import train
from data import InputError
from eval import ranks
from train import Recipe, say

BATCH_SIZES = {  # IGLUE's: (up to so many shots, batch size)
    "xgqa": [(1, 8), (5, 16), (10, 32), (48, 64)],
    "xvnli": [(1, 2), (5, 16), (10, 32), (48, 64)],
    "xflickrco": [(1, 1), (5, 2), (10, 4), (25, 8), (50, 16), (100, 32)],
}


def parse_args(argv):
    argv = sys.argv[1:] if argv is None else argv
    parser = evaluation.Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("few_shot", metavar="LANG", help="the language")
    add("--shots", type=int, required=True, help="number of images whose examples are trained on")
    add("--init", required=True, metavar="RUN", help="folder of the finished English run")
    add("--epochs", type=int, help="default: IGLUE's 20")
    add("--batch-size", type=int, help="default: IGLUE's, by the number of shots")
    add("--lr", type=float, help="one learning rate instead of the grid")
    add("--limit", type=int, help="only the first N records of every file")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    add("--workers", type=int, default=0, help="processes that load images (default: 0)")
    add("--data", help="where the English run's data has moved to")
    add("--tokenizer", help="where its tokenizer has moved to")
    add("--run-dir", help="folder of the run (default: RUN-LANGSHOTS)")
    add("--resume", action="store_true", help="go on where the run in this folder stopped")
    args = parser.parse_args(argv)
    for name in ("shots", "epochs", "batch_size", "lr", "limit"):
        if (getattr(args, name) or 1) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    args.command = shlex.join(["python", "-m", "tools.few_shot", *argv])
    return args


def few_shot_recipe(args, english):
    """The English run's recipe with IGLUE's few-shot numbers, or the flags'."""
    batch_size = max(size for _, size in BATCH_SIZES[args.task])
    for shots, size in reversed(BATCH_SIZES[args.task]):
        if args.shots <= shots:
            batch_size = size
    rates = (args.lr,) if args.lr else tuple(english.few_shot_lrs)
    return replace(english, epochs=args.epochs or english.few_shot_epochs, few_shot_lrs=rates,
                   batch_size=args.batch_size or batch_size, vision_lr=None, embedding_lr=None)


def development_data(args, recipe, tokenizer, labels):
    """What rate and epoch are chosen on."""
    if args.task == "xflickrco":
        # ranking all 5,070 captions after every epoch would outlast the training
        fewer = Namespace(**vars(args) | {"limit": min(args.limit or 1000, 1000)})
        return evaluation.load_split(fewer, recipe, tokenizer, labels, "valid", ["en"])
    language = args.few_shot if args.task == "xgqa" else "en"
    return evaluation.load_split(args, recipe, tokenizer, labels, "dev", [language])


def run(args, stop):
    # model, task and data come with the English run; its strategy has done its part
    english, recipe = evaluation.read_run(args.init, args.data, args.tokenizer)
    evaluation.read_results(args.init)  # or a line that says it is not finished
    places = {"data": english.data, "tokenizer": english.tokenizer}
    nothing = dict.fromkeys(("suf", "lr_decay", "train_top", "only", "order", "suf_interval",
                             "embedding_lr", "grad_accum", "lp_ft"))
    ours = {"freeze": [], "save_epochs": False, "questions_per_image": 1}
    args = Namespace(**vars(english) | vars(args) | places | nothing | ours)
    if args.few_shot == "en" or args.few_shot not in data.LANGUAGES[args.task]:
        raise InputError(f"{args.few_shot} is none of {args.task}'s languages beside English")
    args.run = args.run_dir or f"{args.init.rstrip(os.sep)}-{args.few_shot}{args.shots}"
    train.check_new(args)
    device = train.start(args)
    recipe = few_shot_recipe(args, Recipe(**vars(recipe)))
    tokenizer = data.Tokenizer(args.tokenizer)
    labels = data.read_labels(args.data) if args.task == "xgqa" else []
    weights = os.path.join(args.init, "model.pt")

    def load(path):
        model = evaluation.load_weights(path, args, device, dropout=recipe.dropout,
                                        drop_path=recipe.drop_path)
        evaluation.introduce(model, tokenizer, labels, args.answers)
        return model

    examples, dataset = train.training_data(args, recipe, tokenizer, labels, "few-shot")
    recipe = replace(recipe, batch_size=min(recipe.batch_size, len(examples)))
    development = development_data(args, recipe, tokenizer, labels)
    tests = evaluation.load_split(args, recipe, tokenizer, labels, "test", ["en", args.few_shot])
    train.accumulation(args, recipe, examples)
    fingerprints = train.fingerprints_of(args, weights, examples, tests)
    train.start_folder(args, recipe, [], load(weights), fingerprints)
    if os.path.isfile(os.path.join(args.run, "results.json")):
        say(f"{args.run} is complete")
        return
    chosen_on = ", ".join(part.source for part in development.examples.values())
    say(f"{args.model} on {args.task}, {args.few_shot}: {len(examples):,} examples on "
        f"{len(examples.image_keys):,} images; {recipe.epochs} epochs of batches of "
        f"{recipe.batch_size}; rate and epoch chosen on {chosen_on}")

    # train with every rate; ties go to the rate that comes first, and to the earlier epoch
    best = {"development": -1.0}
    for lr in recipe.few_shot_lrs:
        found = train_with(args, replace(recipe, lr=lr), load(weights), examples, dataset,
                           development, device, stop)
        say(f"rate {lr:g}: best after epoch {found['epoch']}, {found['development']:.2f} on the "
            "development data")
        if found["development"] > best["development"]:
            best = found
    model = load(os.path.join(best["weights"], "best.pt"))
    results, predictions = evaluation.evaluate(model, tests, device, args.precision, args.workers)
    chosen = {"few_shot": args.few_shot, "shots": args.shots, "init": train.portable(args.init)}
    log = train.open_log(args.run, 0) if ranks()[0] == 0 else None
    train.finish(args, model, train.summary(args, results) | chosen | best, predictions, log, 0)


def train_with(args, recipe, model, examples, dataset, development, device, stop):
    """Train with one learning rate. -> best development score, its epoch, folder of best.pt."""
    folder = os.path.join(args.run, f"lr-{recipe.lr:g}")
    data.make_folder(folder)
    args = Namespace(**vars(args) | {"run": folder})

    def after_epoch(epoch, step, log):
        results, _ = evaluation.evaluate(model, development, device, args.precision, args.workers)
        [scores] = results.values()
        values = [scores[name] for name, _ in evaluation.headline(args.task)]
        score = sum(values) / len(values)
        if log:
            if score > max(scores_of(folder), default=-1.0):
                train.write_weights(os.path.join(folder, "best.pt"), model)
            train.add_line(log, step=step, epoch=epoch + 1, development=score)

    train.fit(model, examples, dataset, args, recipe, device, stop, after_epoch)
    if dist.is_initialized():
        dist.barrier()  # the log is complete for all who read it
    scores = scores_of(folder)
    return {"development": max(scores), "epoch": scores.index(max(scores)) + 1, "weights": folder}


def scores_of(folder):
    """Development score after every epoch, from the log."""
    entries = data.read_jsonl(os.path.join(folder, "log.jsonl"))
    return [entry["development"] for _, entry in entries if "development" in entry]


def main(argv=None):
    train.run_until_stopped(run, parse_args(argv))


if __name__ == "__main__":
    evaluation.command(main)
