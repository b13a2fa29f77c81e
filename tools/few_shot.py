"""Few-shot (paper section 5.4, IGLUE's protocol): an English run goes on in another language.

    python -m tools.few_shot de --shots 48 --init runs/uc2-xgqa-suf-seed0

Trains on the examples of so many images, once for each learning rate of the grid. Rate and epoch
are chosen on development data: xGQA the language's own, XVNLI the English, xFlickrCO the first
1,000 captions of Flickr30k's validation set. Then it tests the language and English. The folder is
that of an ordinary run, with a folder lr-RATE for every rate.
"""

import os
import shlex
import sys
from argparse import Namespace
from dataclasses import replace

import data
import eval as evaluation
import train
from train import Recipe, say

BATCH_SIZES = {  # IGLUE's: (up to so many shots, batch size)
    "xgqa": [(1, 8), (5, 16), (10, 32), (48, 64)],
    "xvnli": [(1, 2), (5, 16), (10, 32), (48, 64)],
    "xflickrco": [(1, 1), (5, 2), (10, 4), (25, 8), (50, 16), (100, 32)],
}
# what made the English run's strategy, and the passes of its batches
STRATEGY = "suf lr_decay train_top only order suf_interval lp_ft grad_accum"


def parse_args(argv):
    if argv is None:
        argv = sys.argv[1:]
    parser = evaluation.Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("few_shot", metavar="LANG", help="the language")
    add("--shots", type=int, required=True, help="number of images whose examples are trained on")
    add("--init", required=True, metavar="RUN", help="folder of the finished English run")
    add("--data", help="where the English run's data has moved to")
    add("--tokenizer", help="where its tokenizer has moved to")
    add("--run-dir", help="folder of the run (default: RUN-LANGSHOTS)")
    add("--resume", action="store_true", help="go on where the run in this folder stopped")
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "-m", "tools.few_shot", *argv])
    return args


def few_shot_recipe(args, english):
    """The English run's recipe with IGLUE's few-shot numbers."""
    for shots, batch_size in BATCH_SIZES[args.task]:
        if args.shots <= shots:
            break
    # one rate for all parts of the model
    return replace(english, epochs=english.few_shot_epochs, batch_size=batch_size,
                   vision_lr=None, embedding_lr=None)


def development_data(args, recipe, tokenizer, labels, language):
    """What rate and epoch are chosen on."""
    split = "dev"
    if args.task == "xvnli":
        language = "en"
    if args.task == "xflickrco":
        # ranking all 5,070 captions after every epoch would outlast the training
        args = Namespace(**vars(args))
        args.limit = min(args.limit or 1000, 1000)
        split, language = "valid", "en"
    return evaluation.load_split(args, recipe, tokenizer, labels, split, [language])


def run(args, stop):
    # model, task, data, seed and other settings come with the English run
    model, tokenizer, labels, english, recipe = evaluation.load_run(
        args.init, "cpu", None, args.data, args.tokenizer)
    args = Namespace(**vars(english) | vars(args))
    args.data = english.data
    args.tokenizer = english.tokenizer
    # its strategy has done its part
    for name in STRATEGY.split():
        setattr(args, name, None)
    args.freeze = []
    args.save_epochs = False
    name = f"{args.init.rstrip(os.sep)}-{args.few_shot}{args.shots}"
    args.run = args.run_dir or name
    train.check_new(args)
    device = train.start(args)
    recipe = Recipe(**vars(recipe))
    recipe = few_shot_recipe(args, recipe)

    # data; few examples may be less than a batch
    examples, dataset = train.training_data(args, recipe, tokenizer, labels, "few-shot")
    batch_size = min(recipe.batch_size, len(examples))
    recipe = replace(recipe, batch_size=batch_size)
    development = development_data(args, recipe, tokenizer, labels, args.few_shot)
    languages = ["en", args.few_shot]
    tests = evaluation.load_split(args, recipe, tokenizer, labels, "test", languages)
    train.accumulation(args, recipe, examples)

    # the folder
    weights = f"{args.init}/model.pt"
    fingerprints = train.fingerprints_of(args, weights, examples, tests)
    train.start_folder(args, recipe, [], model, fingerprints)
    if os.path.isfile(f"{args.run}/results.json"):
        say(f"{args.run} is complete")
        return
    [chosen_on] = development.examples.values()
    say(f"{args.few_shot}: {len(examples)} examples on {len(examples.image_keys)} images, in batches "
        f"of {batch_size}; rate and epoch chosen on {chosen_on.source}")

    def load(path):
        loaded = evaluation.load_weights(path, args, device, dropout=recipe.dropout,
                                         drop_path=recipe.drop_path)
        evaluation.introduce(loaded, tokenizer, labels, args.answers)
        return loaded

    # train with every rate; ties go to the rate that comes first, and to the earlier epoch
    best = {"development": -1.0}
    for lr in recipe.few_shot_lrs:
        with_rate = replace(recipe, lr=lr)
        model = load(weights)
        found = train_with(args, with_rate, model, examples, dataset, development, device, stop)
        say(f"rate {lr:g}: {found}")
        if found["development"] > best["development"]:
            best = found

    # test the best
    model = load(best["weights"])
    results, predictions = evaluation.evaluate(model, tests, device, args.precision, args.workers)
    place = {"few_shot": args.few_shot, "shots": args.shots, "init": train.portable(args.init)}
    content = train.summary(args, results) | best | place
    log = None
    if evaluation.ranks()[0] == 0:
        log = train.open_log(args.run)
    train.finish(args, model, content, predictions, log, 0)


def train_with(args, recipe, model, examples, dataset, development, device, stop):
    """Train with one learning rate. -> the best development score, its epoch and weights."""
    folder = f"{args.run}/lr-{recipe.lr:g}"
    weights = f"{folder}/best.pt"
    data.make_folder(folder)
    args = Namespace(**vars(args))
    args.run = folder

    def after_epoch(epoch, step, log):
        results, _ = evaluation.evaluate(model, development, device, args.precision, args.workers)
        [scores] = results.values()
        # accuracy, or the mean of both recalls
        values = [scores[name] for name, _ in evaluation.headline(args.task)]
        score = sum(values) / len(values)
        if log:
            if score > max(scores_of(folder), default=-1.0):
                train.write_weights(weights, model)
            train.add_line(log, step=step, epoch=epoch + 1, development=score)

    train.fit(model, examples, dataset, args, recipe, device, stop, after_epoch)
    # all processes wait here: the log is complete for who reads it
    evaluation.from_all_ranks(None)
    scores = scores_of(folder)
    best = max(scores)
    epoch = scores.index(best) + 1
    return {"development": best, "epoch": epoch, "weights": weights}


def scores_of(folder):
    """Development score after every epoch, from the log."""
    entries = data.read_jsonl(f"{folder}/log.jsonl")
    return [entry["development"] for _, entry in entries if "development" in entry]


def main(argv=None):
    train.run_until_stopped(run, parse_args(argv))


if __name__ == "__main__":
    evaluation.command(main)
