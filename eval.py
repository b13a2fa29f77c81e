"""Zero-shot evaluation in all languages (paper section 4.1): xGQA and XVNLI accuracy,
xFlickrCO recall at 1, 5, 10 both ways.

    python eval.py RUN [--languages de,ko] [--split test]     score a trained run again, without training
    python eval.py --compare RUN_A RUN_B                      difference per language with a paired bootstrap interval
    python eval.py --score PREDICTIONS --truth TEST.json      score a file of xGQA predictions, of whatever origin

What several texts share is computed once: an image passes the image encoder once for all
languages and all of its texts, and so do its cross-attention keys and values. Answers are the
exact argmax over all labels (`cclm.best_answers`).

Letters: B texts, T tokens, D width, I images, N all texts of a language.
"""

import argparse
import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import cclm
import data
import files
import uc2
from files import COUNT, YES_NO, InputError, check_fields, number, one_of, optional, whole
from model import read_checkpoint, select
from processes import accelerator, from_all_ranks, ranks
from recipes import check_recipe
from run_folder import fingerprint, make_folder

MODELS = {"cclm": cclm, "uc2": uc2}
RECALLS = (1, 5, 10)
ID_FIELD = {"xgqa": "questionId", "xvnli": "id"}  # of a prediction


# ---------------------------------------------------------------------------------------------------------------------
# What is evaluated


@dataclass
class EvaluationSet:
    """One task's split in several languages.

    pictures: every image that any of the languages shows, rows as in `image_rows[language]`.
    """

    task: str
    examples: dict  # language -> data.Examples
    pictures: object  # data.Images or data.Regions
    image_rows: dict  # language -> [N] row in `pictures` of each example's image
    names: list  # the labels that predictions index (empty for retrieval)


def load_split(args, recipe, tokenizer, labels, split, languages=None):
    """A split of the task of `args` in some languages (default: all that the benchmark has)."""
    names = {"xgqa": labels, "xvnli": MODELS[args.model].LABELS}.get(args.task, [])
    # CCLM's code leaves out an image whose caption is empty, IGLUE's ranks it
    keep = has_text if args.task == "xflickrco" and args.model == "cclm" else lambda text, record: True
    rules = data.text_rules(recipe)
    examples = {language: data.load_examples(args.data, args.task, split, rules, tokenizer, language, keep=keep,
                                             limit=args.limit)
                for language in languages or data.LANGUAGES[args.task]}
    keys = list(dict.fromkeys(key for language in examples.values() for key in language.image_keys))
    row_of = {key: row for row, key in enumerate(keys)}
    rows = {name: np.array([row_of[key] for key in language.image_keys])[language.image_rows]
            for name, language in examples.items()}
    return EvaluationSet(args.task, examples, make_pictures(args, recipe, split, keys), rows, names)


def has_text(text, record):
    return text != ""


def make_pictures(args, recipe, split, keys):
    if args.model == "uc2":
        return data.Regions(data.feature_folder(args.data, args.task, split), keys)
    bar = partial(tqdm, desc="resizing images", disable=ranks()[0] > 0)
    return data.Images(args.data, args.task, keys, recipe.image_size, args.image_cache, bar)


def check_features(model, *pictures):
    """InputError for region features of another width than the model reads."""
    for regions in pictures:
        if isinstance(regions, data.Regions) and regions.dim != model.sizes.features:
            raise InputError(f"{regions.folder}: features of width {regions.dim}, the checkpoint reads "
                             f"{model.sizes.features}")


def introduce(model, tokenizer, labels):
    """What model and tokenizer must know of each other: the longest text, and the
    answers of a model that generates them.
    """
    tokenizer.longest = model.longest_text
    if hasattr(model, "set_answers") and labels:
        model.set_answers([row[1:-1].tolist() for row in tokenizer(labels)])


class PictureChunks(torch.utils.data.Dataset):
    """Item: image rows -> their tensors (loaded by worker processes)."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __getitem__(self, rows):
        try:
            return rows, self.pictures.batch(rows)
        except InputError as error:
            return error


def picture_batches(pictures, rows, size, workers, device, description):
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    loaded = data.load_batches(PictureChunks(pictures), chunks, workers, device)
    for chunk, batch in tqdm(loaded, description, len(chunks), leave=False, disable=ranks()[0] > 0):
        yield chunk, {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


@torch.inference_mode()
def evaluate(model, evaluation, device, precision="float32", workers=0, image_batch=None, text_batch=None,
             candidates=128):
    """-> (results, predictions), both by language.

    results[language]: {"accuracy", "n", "by_type", …} in percent, or for retrieval {"text_recall_at_1", …,
    "image_recall_at_1", …}. predictions[language]: one dict per record, in file order. Every process of a distributed
    run takes its share of the images, and all get the whole result.
    """
    gpu = device.type == "cuda"
    image_batch, text_batch = image_batch or (64 if gpu else 16), text_batch or (512 if gpu else 128)
    was_training = model.training
    model.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        run = retrieve if evaluation.task == "xflickrco" else classify
        results, predictions = run(model, evaluation, device, image_batch, text_batch, workers, candidates)
    model.train(was_training)
    return results, predictions


def mean_zero_shot(results, metric):
    """Mean of a metric over the languages other than English, the training language; None where there is no other."""
    return mean_of_known([scores[metric] for language, scores in results.items() if language != "en"])


# ---------------------------------------------------------------------------------------------------------------------
# xGQA and XVNLI: one label per text


def classify(model, evaluation, device, image_batch, text_batch, workers, _):
    predicted = {}
    for keys, inputs in texts_with_images(model, evaluation, device, image_batch, text_batch, workers):
        predicted.update(zip(keys, model.predict(*inputs).tolist()))
    predicted = {key: label for part in from_all_ranks(predicted) for key, label in part.items()}
    results, predictions = {}, {}
    score, key = score_answers if evaluation.task == "xgqa" else score_labels, ID_FIELD[evaluation.task]
    for language, examples in evaluation.examples.items():
        names = [evaluation.names[predicted[language, i]] for i in range(len(examples))]
        results[language] = score(examples.records, names)
        predictions[language] = [{key: record.id, "prediction": name} for record, name in zip(examples.records, names)]
    return results, predictions


def texts_with_images(model, evaluation, device, image_batch=16, text_batch=128, workers=0):
    """This process's share of all texts, each with its image, in batches: ([(language, example)],
    (text states, attention mask, memory)).
    """
    texts_of = defaultdict(list)  # image row -> [(language, example)]
    for language, rows in evaluation.image_rows.items():
        for i, row in enumerate(rows):
            texts_of[int(row)].append((language, i))
    rank, processes = ranks()
    mine = sorted(texts_of)[rank::processes]
    for rows, pictures in picture_batches(evaluation.pictures, mine, image_batch, workers, device, "evaluating"):
        memory = model.memory(pictures)  # once for all languages
        for batch in text_batches([texts_of[row] for row in rows], evaluation.examples, text_batch):
            input_ids, attention_mask = (
                x.to(device) for x in data.pad([evaluation.examples[language].tokens[i] for _, language, i in batch]))
            positions = [position for position, _, _ in batch]
            # texts of one image share its keys and values uncopied
            shared = positions[:1] if len(set(positions)) == 1 else positions
            states = model.encode_texts(input_ids, attention_mask)
            yield [(language, i) for _, language, i in batch], (states, attention_mask,
                                                                select(memory, torch.tensor(shared, device=device)))


def text_batches(texts_of_images, examples, size):
    """Batches of (position of the image in its chunk, language, example): images with many texts by
    themselves, the others together; by length.
    """
    together = []
    for position, texts in enumerate(texts_of_images):
        entries = [(position, language, i) for language, i in texts]
        if len(entries) >= size // 2:
            yield from by_length(entries, examples, size)
        else:
            together += entries
    yield from by_length(together, examples, size)


def by_length(entries, examples, size):
    entries = sorted(entries, key=lambda entry: examples[entry[1]].tokens.lengths[entry[2]])
    return (entries[i : i + size] for i in range(0, len(entries), size))


def percent(values):
    return 100 * sum(values) / len(values) if values else None  # of nothing: JSON's null, "-" in a table


def score_answers(records, predictions):
    """Exact match with the gold answer, overall and by question type.

    An answer outside the label map stays in the denominator.
    """
    correct = [prediction in record.answers for record, prediction in zip(records, predictions)]
    return {"accuracy": percent(correct), "n": len(correct),
            "by_type": by_type([record.type for record in records], correct)}


def score_labels(records, predictions):
    """Accuracy as IGLUE counts: pairs without a gold label ("-") are in the denominator and always wrong.

    The other reading is beside it (None where no pair has a gold label).
    """
    correct = [prediction == record.label for record, prediction in zip(records, predictions)]
    labelled = [right for record, right in zip(records, correct) if record.label != "-"]
    types = ["" if record.label == "-" else record.label for record in records]
    return {"accuracy": percent(correct), "n": len(correct), "accuracy_labelled": percent(labelled),
            "n_labelled": len(labelled), "by_type": by_type(types, correct)}


def by_type(types, correct):
    """Accuracy of each type of items, by name; "" is none."""
    parts = defaultdict(list)
    for name, right in zip(types, correct):
        parts[name].append(right)
    return {name: {"accuracy": percent(part), "n": len(part)} for name, part in sorted(parts.items()) if name}


# ---------------------------------------------------------------------------------------------------------------------
# xFlickrCO: rank all images for a caption and all captions for an image


def retrieve(model, evaluation, device, image_batch, text_batch, workers, candidates):
    rank, processes = ranks()
    mine = list(range(len(evaluation.pictures)))[rank::processes]
    # of this process's images: what the model keeps of each, and its contrastive features if it has such
    images, features = {}, {}
    for rows, pictures in picture_batches(evaluation.pictures, mine, image_batch, workers, device, "images"):
        encoded = model.encode_images(pictures)
        images.update(zip(rows, (rows_of(encoded, slice(i, i + 1)) for i in range(len(rows)))))
        if hasattr(model, "image_features"):
            features.update(zip(rows, model.image_features(encoded).cpu()))
    features = {row: feature for part in from_all_ranks(features) for row, feature in part.items()}
    results, predictions = {}, {}
    texts = {language: encode_all_texts(model, examples, device, text_batch)
             for language, examples in evaluation.examples.items()}
    wanted = {}
    for language, rows in evaluation.image_rows.items():
        columns = np.unique(rows)  # the images of this language
        if features:
            with torch.autocast("cpu", enabled=False):  # rounded to bf16, similarities would tie
                similarity = texts[language].features @ torch.stack([features[int(row)] for row in columns]).T  # [N,I]
            wanted[language] = (columns, top(similarity, candidates, 1), top(similarity, candidates, 0))
        else:
            wanted[language] = (columns, *(torch.ones(len(rows), len(columns), dtype=torch.bool),) * 2)
    scores = {language: torch.zeros(mask.shape) for language, (_, mask, _) in wanted.items()}
    for row in tqdm(mine, "scoring pairs", leave=False, disable=rank > 0):
        memory = model.image_memory(images.pop(row))  # once for all captions in all languages
        for language, (columns, by_text, by_image) in wanted.items():
            column = np.flatnonzero(columns == row)
            if len(column):
                some = (by_text[:, column[0]] | by_image[:, column[0]]).nonzero()[:, 0]
                scores[language][some, column[0]] = score_pairs(model, texts[language], some, memory, text_batch)
    for language, examples in evaluation.examples.items():
        columns, by_text, by_image = wanted[language]
        total = sum(from_all_ranks(scores[language]))
        gold = torch.from_numpy(np.searchsorted(columns, evaluation.image_rows[language]))
        keys = [evaluation.pictures.keys[int(row)] for row in columns]
        results[language], predictions[language] = rank_both_ways(total, by_text, by_image, gold, examples, keys)
    return results, predictions


def rows_of(encoded, rows):
    """Rows of what `encode_images` returned: a tensor or a tuple of tensors with one row per image."""
    return tuple(part[rows] for part in encoded) if isinstance(encoded, tuple) else encoded[rows]


def top(similarity, k, dim):
    """Mask of the k most similar along a dimension."""
    chosen = similarity.topk(min(k, similarity.shape[dim]), dim).indices
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(dim, chosen, True)


@dataclass
class Texts:
    states: torch.Tensor  # [N,T,D]
    attention_mask: torch.Tensor  # [N,T]
    lengths: torch.Tensor  # [N]
    features: object  # [N,E] contrastive features, or None


def encode_all_texts(model, examples, device, batch):
    """All texts of a language through the text side, sorted into batches of similar length."""
    lengths = torch.from_numpy(examples.tokens.lengths)
    order = lengths.argsort(stable=True)
    states, masks, features = [None] * len(order), [None] * len(order), [None] * len(order)
    for some in order.split(batch):
        input_ids, attention_mask = (x.to(device) for x in data.pad([examples.tokens[i] for i in some]))
        encoded = model.encode_texts(input_ids, attention_mask)
        text_features = (model.text_features(encoded).cpu() if hasattr(model, "text_features")
                         else [None] * len(some))
        for i, state, mask, feature in zip(some.tolist(), encoded, attention_mask, text_features):
            states[i], masks[i], features[i] = state[: lengths[i]], mask[: lengths[i]], feature
    pad = torch.nn.utils.rnn.pad_sequence
    return Texts(pad(states, True), pad(masks, True), lengths,
                 torch.stack(features) if features[0] is not None else None)


def score_pairs(model, texts, rows, memory, batch):
    """Matching scores of some texts with the one image of `memory`: [rows]. Texts of similar length share a batch."""
    scores = torch.empty(len(rows))
    order = texts.lengths[rows].argsort(stable=True)
    for some in order.split(batch):
        chosen, longest = rows[some], int(texts.lengths[rows[some]].max())
        scores[some] = model.match_scores(texts.states[chosen, :longest], texts.attention_mask[chosen, :longest],
                                          memory).cpu()
    return scores


def rank_both_ways(scores, by_text, by_image, gold, examples, image_keys):
    """scores [N,I]; by_text, by_image: the candidates of each text, of each image (others rank
    below); gold [N]: column of each text's image.
    """
    images = scores.masked_fill(~by_text, -torch.inf)
    texts = scores.masked_fill(~by_image, -torch.inf).T.contiguous()
    image_order = images.argsort(dim=1, descending=True, stable=True)  # [N,I]
    text_order = texts.argsort(dim=1, descending=True, stable=True)  # [I,N]
    image_rank = (image_order == gold[:, None]).int().argmax(1)
    # the best of the image's captions
    text_rank = (gold[text_order] == torch.arange(len(texts))[:, None]).int().argmax(1)
    result = {f"text_recall_at_{k}": percent((text_rank < k).tolist()) for k in RECALLS}
    result |= {f"image_recall_at_{k}": percent((image_rank < k).tolist()) for k in RECALLS}
    result |= {"n_images": len(texts), "n_texts": len(images)}
    ids = [record.id for record in examples.records]
    predictions = [{"text": ids[i], "images": [image_keys[j] for j in image_order[i, :10].tolist()],
                    "rank": int(image_rank[i])} for i in range(len(ids))]
    predictions += [{"image": image_keys[j], "texts": [ids[i] for i in text_order[j, :10].tolist()],
                     "rank": int(text_rank[j])}
                    for j in range(len(image_keys))]
    return result, predictions


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def headline(task):
    """The metrics of a task that tables show: [(name, heading)]."""
    if task == "xflickrco":
        return [("text_recall_at_1", "TR@1"), ("image_recall_at_1", "IR@1")]
    return [("accuracy", "accuracy")]


def table(task, results):
    """Results by language as text: English, the others, their mean; accuracies by type in further columns."""
    metrics = headline(task)
    if task == "xvnli":  # IGLUE counts pairs without a gold label as wrong; this is the accuracy on the others
        metrics = [*metrics, ("accuracy_labelled", "without -")]
    types = list(dict.fromkeys(name for scores in results.values() for name in scores.get("by_type", {})))
    # None where a language has no item of a type
    numbers = {language: [*(scores[name] for name, _ in metrics),
                          *(scores["by_type"].get(name, {}).get("accuracy") for name in types)]
               for language, scores in results.items()}
    others = {language: row for language, row in numbers.items() if language != "en"}
    if len(others) > 1:
        numbers[name_of_mean(task, others)] = list(map(mean_of_known, zip(*others.values())))
    rows = [["", *(heading for _, heading in metrics), *types]]
    rows += [[name, *("-" if number is None else f"{number:.1f}" for number in row)] for name, row in numbers.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows = [[row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))] for row in rows]
    return "\n".join("  ".join(row) for row in rows)


def name_of_mean(task, others):
    """What the mean of some languages other than English is called."""
    complete = set(others) == set(data.LANGUAGES[task]) - {"en"}
    return f"mean of {len(others)} others" if complete else f"mean of these {len(others)}"


def mean_of_known(numbers):
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known else None


# ---------------------------------------------------------------------------------------------------------------------
# Runs on disk


# a string that can be a path: without what no file system takes
TEXT = ("a text", lambda value: isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value))
PERCENT = number("a number from 0 to 100", lambda value: 0 <= value <= 100)
ARGS = {  # what is read of args.json beside the recipe
    "model": one_of(*MODELS), "task": one_of(*data.LANGUAGES), "data": TEXT, "checkpoint": TEXT, "tokenizer": TEXT,
    "miniature": YES_NO, "precision": one_of("float32", "bf16"), "seed": whole(0), "workers": whole(0, 1000),
    "limit": optional(whole(1)), "image_cache": optional(TEXT), "few_shot": optional(TEXT), "shots": optional(whole(1)),
    "init": optional(TEXT),
}


def read_run(run):
    """-> (args, recipe) of a run's folder, as namespaces. InputError if it is none, or a damaged one."""
    path = os.path.join(run, "args.json")
    stored = files.read_json(path) if os.path.isdir(run) else None
    if not isinstance(stored, dict) or not {"args", "recipe"} <= stored.keys():
        raise InputError(f"{run}: not the folder of a run of train.py (no args.json that train.py wrote)")
    check_fields(stored["args"], ARGS, f"{path}, args")
    check_recipe(stored["recipe"], f"{path}, recipe")
    return SimpleNamespace(**stored["args"]), SimpleNamespace(**stored["recipe"])


def fingerprints(run):
    """What a run read: {path: fingerprint}."""
    path = os.path.join(run, "args.json")
    return files.expect(files.read_json(path), "fingerprints", dict, path)


def has_read(run, path):
    """Whether a run read a file, wherever it lay then, as it is now."""
    known = fingerprints(run).values()
    return os.path.isfile(path) and fingerprint(path) in known


def tested_on(run):
    """Of the files that a run was tested on, by folder and name: {"de/test.json": …}, wherever the data lay."""
    return {"/".join(file.split(os.sep)[-2:]): digest for file, digest in fingerprints(run).items()
            if os.path.basename(file).startswith("test.")}


def read_results(run):
    """-> the results of a finished run."""
    path = os.path.join(run, "results.json")
    if not os.path.isfile(path):
        read_run(run)
        raise InputError(
            f"{run}: this run is not finished (no results.json); go on with it: train.py ... --run {run} --resume")
    results = files.read_json(path)
    check_fields(results, {"task": ARGS["task"]}, path)
    check_languages(results, results["task"], path)
    return results


def check_languages(results, task, where):
    """-> the scores by language in `results`. InputError unless they are as `evaluate` gives them."""
    languages = files.expect(results, "languages", dict, where)
    checks = {metric: PERCENT for metric, _ in headline(task)}
    checks |= {"accuracy_labelled": optional(PERCENT)} if task == "xvnli" else {}
    for language, scores in languages.items():
        check_fields(scores, checks, f"{where}, {language}")
        types = {} if task == "xflickrco" else files.expect(scores, "by_type", dict, f"{where}, {language}")
        for name, part in types.items():
            check_fields(part, {"accuracy": PERCENT, "n": COUNT}, f"{where}, {language}, type {name}")
    return languages


def load_weights(path, args, device, **options):
    """-> the fine-tuned model in a file; `options` go to its constructor."""
    try:
        tensors, config = read_checkpoint(path)
        return MODELS[args.model].from_finetuned(tensors, config, args.task, path, **options).to(device)
    except ValueError as error:
        raise InputError(str(error)) from None


def load_run(run, device, epoch=None):
    """-> (model, tokenizer, labels, args, recipe) of a finished run, or of one of its saved epochs."""
    args, recipe = read_run(run)
    path = os.path.join(run, "model.pt" if epoch is None else f"epoch{epoch}.pt")
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such weights; "
                         + ("the run is not finished" if epoch is None else "train.py keeps them with --save-epochs"))
    model, tokenizer = load_weights(path, args, device), data.Tokenizer(args.tokenizer)
    labels = data.read_labels(args.data) if args.task == "xgqa" else []
    introduce(model, tokenizer, labels)
    return model, tokenizer, labels, args, recipe


def check_known(task, languages):
    """InputError for a language that the task does not have."""
    if unknown := [language for language in languages if language not in data.LANGUAGES[task]]:
        raise InputError(f"{task} has no language {unknown[0]!r} (it has {', '.join(data.LANGUAGES[task])})")


def score_again(run, languages, split, epoch):
    """Evaluate a run on a split; writes results_SPLIT.json and predictions_SPLIT/ into the run's folder."""
    device = accelerator()
    model, tokenizer, labels, args, recipe = load_run(run, device, epoch)
    languages = languages.split(",") if languages else data.LANGUAGES[args.task]
    check_known(args.task, languages)
    chosen = load_split(args, recipe, tokenizer, labels, split, languages)
    check_features(model, chosen.pictures)
    name = split if epoch is None else f"{split}_epoch{epoch}"
    make_folder(os.path.join(run, f"predictions_{name}"))
    results, predictions = evaluate(model, chosen, device, args.precision, args.workers)
    for language, entries in predictions.items():
        files.write_json(os.path.join(run, f"predictions_{name}", f"{language}.json"), entries)
    files.write_json(os.path.join(run, f"results_{name}.json"), {"languages": results})
    print(table(args.task, results))


# ---------------------------------------------------------------------------------------------------------------------
# Two runs side by side

DRAWS = 10000  # of the bootstrap


def compare(run_a, run_b):
    """Print B - A per language and for the mean of the others, each with a 95 % paired bootstrap interval."""
    args_a, args_b = read_run(run_a)[0], read_run(run_b)[0]
    if args_a.task != args_b.task:
        raise InputError(f"{run_a} is a run on {args_a.task}, {run_b} one on {args_b.task}: nothing to compare")
    results = read_results(run_a)["languages"], read_results(run_b)["languages"]
    tested = tested_on(run_a), tested_on(run_b)
    if different := [file for file in tested[0] if file in tested[1] and tested[0][file] != tested[1][file]]:
        raise InputError(f"{run_a} and {run_b} were tested on different data (their {different[0]} are not the same): "
                         "train one of them again")
    languages = [language for language in results[0] if language in results[1]]
    if not languages:
        raise InputError(f"{run_a} and {run_b} have no language in common")
    print(f"A: {run_a}\nB: {run_b}")
    for name, heading in headline(args_a.task):
        outcomes = [paired_outcomes(run_a, run_b, args_a, language, name) for language in languages]
        low, high = paired_bootstrap(outcomes, DRAWS)
        lines = [(language, *(result[language][name] for result in results), low[i], high[i])
                 for i, language in enumerate(languages)]
        others = [i for i, language in enumerate(languages) if language != "en"]
        if len(others) > 1:
            low, high = paired_bootstrap(outcomes, DRAWS, others)
            means = (sum(result[languages[i]][name] for i in others) / len(others) for result in results)
            lines.append((name_of_mean(args_a.task, [languages[i] for i in others]), *means, low, high))
        width = max(len(line[0]) for line in lines)
        print(f"{heading:{width}}       A       B   B - A   95 % interval")
        for label, a, b, low_end, high_end in lines:
            print(f"{label:{width}}  {a:6.2f}  {b:6.2f}  {b - a:+6.2f}  [{low_end:+.2f}, {high_end:+.2f}]")


def paired_outcomes(run_a, run_b, args, language, metric):
    """-> (images [n], B right minus A right [n]): the image of every scored item, and -1, 0 or 1."""
    paths = [os.path.join(run, "predictions", f"{language}.json") for run in (run_a, run_b)]
    a, b = (outcomes_of(read_predictions(path), args, language, metric, path) for path in paths)
    if a.keys() != b.keys():
        limits = [read_run(run)[0].limit for run in (run_a, run_b)]
        one, other = ("without --limit" if limit is None else f"with --limit {limit}" for limit in limits)
        why = f"one was run {one}, the other {other}" if one != other else "runs on the same test data can be compared"
        raise InputError(f"{paths[1]}: predicts other items than {paths[0]}; {why}")
    if not a:
        raise InputError(f"{paths[0]}: no prediction is about an item of the test data")
    return (np.array([image for image, _ in a.values()]),
            np.array([b[key][1] - a[key][1] for key in a], dtype=float))


def outcomes_of(predictions, args, language, metric, path):
    """Predictions file -> {item: (image, 1 if right else 0)}."""
    if args.task == "xflickrco":
        kind = "image" if metric.startswith("text") else "text"
        some = [(number, entry) for number, entry in enumerate(predictions) if kind in entry]
        ranked = by_id(some, kind, "rank", int, path)
        return {item: (item.split("#")[0], int(rank == 0)) for item, rank in ranked.items()}
    _, records = data.read_records(args.data, args.task, "test", language)
    predicted = by_id(enumerate(predictions), ID_FIELD[args.task], "prediction", str, path)
    return {record.id: (record.image, int(predicted[record.id] in (record.answers or [record.label])))
            for record in records if record.id in predicted}


def read_predictions(path):
    predictions = files.read_json(path)
    if not isinstance(predictions, list) or not predictions or not all(isinstance(one, dict) for one in predictions):
        raise InputError(f"{path}: expected a list of predictions that train.py wrote")
    return predictions


def by_id(predictions, key, field, kind, path):
    """[(place, prediction)] of a file -> {its `key`: its `field`}. InputError for an id that stands there twice."""
    found = {}
    for place, entry in predictions:
        where = f"{path}, entry {place}"
        name = files.expect(entry, key, str, where)
        if name in found:
            raise InputError(f"{where}: {key} {name!r} stands there a second time")
        found[name] = files.expect(entry, field, kind, where)
    return found


def paired_bootstrap(outcomes, draws, mean_of=None):
    """95 % percentile interval of the difference in percent, per language, or for the
    mean over the languages `mean_of`.

    outcomes: per language (images, differences). Whole images are drawn, with all of their items in all languages:
    the questions of an image are not independent, and neither are the translations of a question. A language may lack
    images that others have.
    """
    every = np.unique(np.concatenate([images for images, _ in outcomes]))
    numbered = [(np.searchsorted(every, images), differences) for images, differences in outcomes]
    count = len(every)
    # [languages, images]
    total = np.stack([np.bincount(images, differences, count) for images, differences in numbered])
    items = np.stack([np.bincount(images, minlength=count) for images, _ in numbered])
    # how often each image is drawn
    times = np.random.default_rng(0).multinomial(count, [1 / count] * count, size=draws)
    with np.errstate(invalid="ignore"):
        difference = 100 * (times @ total.T) / (times @ items.T)  # [draws, languages]
    if mean_of is not None:
        difference = difference[:, mean_of].mean(1)
    return np.nanpercentile(difference, 2.5, axis=0), np.nanpercentile(difference, 97.5, axis=0)


# ---------------------------------------------------------------------------------------------------------------------
# Predictions of whatever origin


def score_file(predictions, truth):
    """xGQA predictions [{"questionId", "prediction"}] against a test file.

    Questions without a prediction count as wrong, and are told.
    """
    loaded = files.read_json(predictions)
    if not isinstance(loaded, list):
        raise InputError(f"{predictions}: expected a list of {{\"questionId\", \"prediction\"}}, found "
                         f"{type(loaded).__name__}")
    predicted = by_id(enumerate(loaded), "questionId", "prediction", str, predictions)
    records = data.read_gqa(truth)
    if not records:
        raise InputError(f"{truth}: no records")
    known = set()
    for record in records:
        if record.id in known:
            raise InputError(f"{truth}: question {record.id} stands there a second time")
        known.add(record.id)
    for count, what in ((len(known - predicted.keys()), "questions have no prediction and count as wrong"),
                        (len(predicted.keys() - known), "predictions are about other questions and are left out")):
        if count:
            print(f"{count:,} {what}")
    scores = score_answers(records, [predicted.get(record.id) for record in records])
    for name, part in {"all": scores, **scores["by_type"]}.items():
        print(f"{name:8}  {part['accuracy']:6.2f} %  ({round(part['accuracy'] * part['n'] / 100)} of {part['n']})")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("run", nargs="?", help="folder of a run")
    parser.add_argument("--languages", metavar="de,ko", help="default: all of the task")
    parser.add_argument("--split", choices=["test", "dev"], default="test", help="default: test")
    parser.add_argument("--epoch", type=int,
                        help="the weights after this epoch (runs with --save-epochs; default: the final ones)")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two runs on the same task")
    parser.add_argument("--score", metavar="PREDICTIONS", help="JSON list of {questionId, prediction}")
    parser.add_argument("--truth", metavar="TEST.json", help="xGQA file to score against")
    args = parser.parse_args(argv)
    if sum(what is not None for what in (args.run, args.compare, args.score)) != 1:
        parser.error("give one of: the folder of a run, --compare A B, --score PREDICTIONS --truth TEST.json")
    if (args.score is None) != (args.truth is None):
        parser.error("--score and --truth go together")
    if args.run is None and (args.languages, args.split, args.epoch) != (None, "test", None):
        parser.error("--languages, --split and --epoch go with the folder of a run")
    try:
        if args.compare:
            compare(*args.compare)
        elif args.score is not None:
            score_file(args.score, args.truth)
        else:
            score_again(args.run, args.languages, args.split, args.epoch)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
