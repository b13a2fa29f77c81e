"""Zero-shot evaluation in all languages (paper, section 4.1): xGQA and XVNLI accuracy, xFlickrCO
recall at 1, 5 and 10, of images for a caption and of captions for an image.

    python eval.py RUN [--languages de,ko] [--split dev] [--epoch 3] [--answers reference]

scores a finished run again, without training. train.py evaluates with the same functions.

What several texts share is computed once: an image goes through the image encoder once for all
of its texts in all languages. xGQA's answers are the exact argmax over all labels (see cclm.py),
or with `--answers reference` what the released code's ranking of 128 candidates gives.

Letters: B texts of a batch, T tokens, D width, E width of contrastive features, N texts
and I images of one language.
"""

import argparse
import os
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import cclm
import data
import uc2
from data import InputError
from model import read_checkpoint, select

ROOT = os.path.dirname(os.path.abspath(__file__))  # the checkout
MODELS = {"cclm": cclm, "uc2": uc2}
RECALLS = (1, 5, 10)
ID_FIELD = {"xgqa": "questionId", "xvnli": "id"}  # of a prediction
# What goes through the model at once, by kind of device. Of tokens, padding counts as well.
IMAGES_AT_ONCE = {"cpu": 16, "cuda": 64}
TOKENS_AT_ONCE = {"cpu": 1536, "cuda": 16384}


# --------------------------------------------------------------------------------------------------
# Processes, devices and the command line, for all programs of this project


def ranks():
    """(rank, number of processes)."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def from_all_ranks(part):
    """[every process's object], in rank order."""
    processes = ranks()[1]
    if processes == 1:
        return [part]
    parts = [None] * processes
    dist.all_gather_object(parts, part)
    return parts


def accelerator():
    """-> torch.device: this process's GPU if there is one, else the CPU.

    InputError for a GPU that is there and does not work.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    try:
        # more processes than GPUs, a GPU that this torch was not built for, one that is taken
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except RuntimeError as error:
        raise InputError(f"{device} cannot be used (CUDA_VISIBLE_DEVICES= in the environment runs "
                         f"everything on the CPU): {error}") from None
    torch.set_float32_matmul_precision("high")  # TF32 for what bf16 does not cover
    return device


def describe(device):
    """The device in words; where it is the CPU of a machine with an NVIDIA driver, also why."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    if shutil.which("nvidia-smi"):
        try:
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:
            return f"cpu (CUDA is there but cannot be used: {error})"
    return "cpu"


def progress(items, description):
    """A progress bar of the first process, if it has a terminal."""
    # None: tqdm looks whether there is one
    return tqdm(items, description, leave=False, disable=ranks()[0] > 0 or None)


class Parser(argparse.ArgumentParser):
    """Its errors are InputErrors."""

    def error(self, message):
        raise InputError(message)


def command(main):
    """Run a program. What a user or the machine has caused ends it with one line and status 2."""
    # a console that cannot show a character shows its number, as stderr does anyway
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except (InputError, OSError) as error:
        if not isinstance(error, BrokenPipeError):  # `| head` has read enough: no need to tell
            print(f"error: {error}", file=sys.stderr)
        sys.stdout = None  # Python would try once more to write what a full or closed one refused
        sys.exit(2)


# --------------------------------------------------------------------------------------------------
# What is evaluated


@dataclass
class EvaluationSet:
    """One task's split in several languages."""

    task: str
    examples: dict  # language -> data.Examples
    pictures: object  # data.Images or data.Regions: every image that any of the languages shows
    image_rows: dict  # language -> [row in `pictures` of each example's image]
    names: list  # the labels that predictions index; unused in retrieval


def load_split(args, recipe, tokenizer, labels, split, languages=None):
    """A split of the task of `args` in some languages; default: all that the benchmark has."""
    # CCLM's code leaves out a caption that is empty after cleaning, IGLUE's ranks it
    keep = has_text if (args.model, args.task) == ("cclm", "xflickrco") else None
    examples = {}
    image_rows = {}
    row_of = {}  # image -> its row
    for language in languages or data.LANGUAGES[args.task]:
        part = data.load_examples(args.data, args.task, split, recipe, tokenizer, language,
                                  keep=keep, limit=args.limit)
        examples[language] = part
        # Languages may list their images in different orders: these are rows of one common list.
        rows = image_rows[language] = []
        for record in part.records:
            rows.append(row_of.setdefault(record.image, len(row_of)))
    pictures = make_pictures(args, recipe, split, list(row_of))
    return EvaluationSet(args.task, examples, pictures, image_rows,
                         names=labels or MODELS[args.model].LABELS)


def has_text(text, record):
    return text != ""


def make_pictures(args, recipe, split, keys):
    """What the model sees of the images `keys` of a split: pixels, or UC2's region features."""
    if args.model == "uc2":
        return data.Regions(data.feature_folder(args.data, args.task, split), keys)
    return data.Images(args.data, args.task, keys, recipe.image_size)


def check_features(model, *pictures):
    """InputError for region features of another width than the model reads."""
    for regions in pictures:
        if isinstance(regions, data.Regions) and regions.dim != model.sizes.features:
            raise InputError(f"{regions.folder}: features of width {regions.dim}, the checkpoint "
                             f"reads {model.sizes.features}")


def introduce(model, tokenizer, labels, answers="exact"):
    """Tell the tokenizer how long a text may be, and a model that generates its answers the labels
    and how to choose among them: "exact" or "reference".
    """
    tokenizer.longest = model.longest_text
    if hasattr(model, "set_answers") and labels:
        model.answers = answers
        # the token ids of every label, without <s> and </s>
        model.set_answers([row[1:-1].tolist() for row in tokenizer(labels)])


@torch.inference_mode()
def evaluate(model, evaluation, device, precision="float32", workers=0, candidates=128):
    """-> (results, predictions), both by language.

    results[language]: {"accuracy", "n", "by_type", …} in percent, or in retrieval
    {"text_recall_at_1", …, "image_recall_at_1", …}. predictions[language]: a dict per record, in
    file order. Every process of a distributed run takes its share of the images, and all get the
    whole result. candidates: how many images per caption, and captions per image, CCLM re-ranks.
    """
    was_training = model.training
    model.eval()  # no dropout
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        if evaluation.task == "xflickrco":
            found = retrieve(model, evaluation, device, workers, candidates)
        else:
            found = classify(model, evaluation, device, workers)
    model.train(was_training)
    return found


def picture_batches(pictures, rows, workers, device):
    """This process's share of the images, in batches: (rows, their tensors on the device)."""
    rank, processes = ranks()
    mine = rows[rank::processes]
    size = IMAGES_AT_ONCE[device.type]
    # worker processes load the next batches while the model is at work on this one
    chunks = [mine[i : i + size] for i in range(0, len(mine), size)]
    loaded = data.load_batches(pictures.batch, chunks, workers, device)
    for chunk in progress(chunks, "images"):
        batch = next(loaded)
        for name, tensor in batch.items():
            batch[name] = tensor.to(device, non_blocking=True)
        yield chunk, batch


def token_batches(lengths, device):
    """Texts of these lengths, sorted by them and cut into batches of at most TOKENS_AT_ONCE tokens,
    padding included. Yields lists of positions in `lengths`; a longer text is alone.
    """
    batch = []
    for i in np.argsort(lengths, kind="stable"):
        # text i is the longest so far, and the others would be padded to it
        if batch and (len(batch) + 1) * lengths[i] > TOKENS_AT_ONCE[device.type]:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def encode(model, tokens, device):
    """Token rows -> (text states [B,T,D], attention mask [B,T])."""
    input_ids, attention_mask = data.pad(tokens)
    attention_mask = attention_mask.to(device)
    return model.encode_texts(input_ids.to(device), attention_mask), attention_mask


# --------------------------------------------------------------------------------------------------
# xGQA and XVNLI: one label per text


def classify(model, evaluation, device, workers):
    """Predict the label of every text. -> (results, predictions) as `evaluate` returns them."""
    predicted = {}  # (language, example) -> index of the label
    for keys, inputs in texts_with_images(model, evaluation, device, workers):
        predicted.update(zip(keys, model.predict(*inputs).tolist()))
    # every process gets the predictions of all others, too
    for part in from_all_ranks(predicted):
        predicted |= part

    results, predictions = {}, {}
    for language, examples in evaluation.examples.items():
        names = [evaluation.names[predicted[language, i]] for i in range(len(examples))]
        results[language] = score(examples.records, names)
        entries = predictions[language] = []
        for record, name in zip(examples.records, names):
            entries.append({ID_FIELD[evaluation.task]: record.id, "prediction": name})
    return results, predictions


def texts_with_images(model, evaluation, device, workers=0):
    """All texts of this process's share of the images, in batches about one image each:
    ([(language, example)], (text states [B,T,D], attention mask [B,T], memory of the image)).
    """
    # image row -> [((language, example), its tokens)]
    texts_of = defaultdict(list)
    for language, rows in evaluation.image_rows.items():
        tokens = evaluation.examples[language].tokens
        for i, row in enumerate(rows):
            texts_of[row].append(((language, i), tokens[i]))
    for rows, pictures in picture_batches(evaluation.pictures, sorted(texts_of), workers, device):
        memories = model.memory(pictures)
        for i, row in enumerate(rows):
            # once for all texts in all languages, and not copied for each
            memory = select(memories, slice(i, i + 1))
            texts = texts_of[row]
            lengths = [len(tokens) for _, tokens in texts]
            for batch in token_batches(lengths, device):
                keys, tokens = zip(*[texts[j] for j in batch])
                yield keys, (*encode(model, tokens, device), memory)


def percent(values):
    """Percentage of true values."""
    return 100 * sum(values) / len(values)


def score(records, predictions):
    """Accuracy in percent, overall and by type of question (xGQA) or by label (XVNLI).

    As IGLUE counts, everything is in the denominator: questions whose answer is no label, pairs
    without a gold label ("-"). "accuracy_labelled" leaves the latter out.
    """
    correct = []
    labelled = []
    parts = defaultdict(list)
    for record, name in zip(records, predictions):
        right = name in (record.answers or [record.label])
        correct.append(right)
        if record.label != "-":
            labelled.append(right)
            parts[record.type or record.label].append(right)
    parts.pop("", None)  # questions whose file tells no type
    scores = {"accuracy": percent(correct), "n": len(correct), "by_type": {}}
    for name, part in sorted(parts.items()):
        scores["by_type"][name] = {"accuracy": percent(part), "n": len(part)}
    if records[0].label and labelled:
        scores |= {"accuracy_labelled": percent(labelled), "n_labelled": len(labelled)}
    return scores


# --------------------------------------------------------------------------------------------------
# xFlickrCO: rank all images for a caption and all captions for an image


def retrieve(model, evaluation, device, workers, candidates):
    """Score pairs of captions and images, rank both ways. -> (results, predictions).

    UC2 scores every pair. For CCLM contrastive features first choose the `candidates` most similar
    images of every caption and captions of every image; only these pairs are scored. In either
    ranking, what is no candidate comes last.
    """
    keys = evaluation.pictures.keys
    contrastive = hasattr(model, "image_features")

    # 1. This process's images through the image encoder, once for all languages.
    encoded_images = []  # of every batch: (image rows, what the model keeps of them)
    features = {}  # image row -> contrastive features [E]
    every = list(range(len(keys)))
    for rows, pictures in picture_batches(evaluation.pictures, every, workers, device):
        encoded = model.encode_images(pictures)
        encoded_images.append((rows, encoded))
        if contrastive:
            features.update(zip(rows, model.image_features(encoded).cpu()))
    for part in from_all_ranks(features):
        features |= part

    results, predictions = {}, {}
    for language, examples in evaluation.examples.items():
        rows = evaluation.image_rows[language]
        # this language's images are the columns of its matrices: image row -> column
        columns = sorted(set(rows))
        column_of = {row: column for column, row in enumerate(columns)}
        tokens = examples.tokens
        lengths = np.array([len(row) for row in tokens])

        # 2. All captions through the text side: in batches of similar length, which are put back
        # in order afterwards.
        order, states, text_features = [], [], []
        for batch in token_batches(lengths, device):
            encoded, _ = encode(model, [tokens[i] for i in batch], device)
            order += batch
            states.extend(encoded)
            if contrastive:
                text_features.extend(model.text_features(encoded).cpu())
        back = np.argsort(order)  # caption -> its place in `order`
        states = pad_sequence(states, batch_first=True)[back]  # [N,T,D]
        masks = data.pad(tokens)[1].to(device)  # [N,T]

        # 3. The candidates of every caption and of every image, two masks [N,I]: all, or those
        # whose contrastive features are most similar.
        by_text = by_image = torch.ones(len(rows), len(columns), dtype=torch.bool)
        if contrastive:
            with torch.autocast("cpu", enabled=False):  # rounded to bf16, similarities would tie
                image_features = torch.stack([features[row] for row in columns])  # [I,E]
                similarity = torch.stack(text_features)[back] @ image_features.T  # [N,I]
            by_text = top(similarity, candidates, 1)
            by_image = top(similarity, candidates, 0)

        # 4. The scores of the candidates: an image at a time, whose keys and values all captions
        # share; captions of similar length together.
        scores = torch.zeros(by_text.shape)
        wanted = by_text | by_image
        for batch_rows, encoded in progress(encoded_images, f"scoring pairs, {language}"):
            memories = model.image_memory(encoded)
            for i, row in enumerate(batch_rows):
                # with --limit, one language may show images that another does not
                if row not in column_of:
                    continue
                column = column_of[row]
                memory = select(memories, slice(i, i + 1))
                some = np.flatnonzero(wanted[:, column])  # captions to score with this image
                for batch in token_batches(lengths[some], device):
                    chosen = some[batch]
                    longest = lengths[chosen[-1]]  # they are sorted by length
                    texts = states[chosen, :longest]
                    mask = masks[chosen, :longest]
                    scores[chosen, column] = model.match_scores(texts, mask, memory).cpu()

        # 5. Both rankings. A pair is scored where its image is, and 0 in all other processes.
        scores = sum(from_all_ranks(scores))
        right = torch.tensor(rows)[:, None] == torch.tensor(columns)  # [N,I]
        ids = [record.id for record in examples.records]
        names = [keys[row] for row in columns]
        ranked = rank_both_ways(scores, by_text, by_image, right, ids, names)
        results[language], predictions[language] = ranked
    return results, predictions


def top(similarity, k, dim):
    """Mask of the k most similar along a dimension."""
    chosen = similarity.topk(min(k, similarity.shape[dim]), dim).indices
    return torch.zeros_like(similarity).scatter_(dim, chosen, 1).bool()


def rank_both_ways(scores, by_text, by_image, right, text_ids, image_keys):
    """-> (recalls, predictions) from the scores of all pairs [N,I].

    by_text, by_image [N,I]: the candidates of each text and of each image; the others rank below.
    right [N,I]: which image is the text's.
    """
    texts = ranking("text", text_ids, "images", image_keys, scores, by_text, right)
    images = ranking("image", image_keys, "texts", text_ids, scores.T, by_image.T, right.T)
    result = {"n_images": len(images), "n_texts": len(texts)}
    for k in RECALLS:
        result[f"text_recall_at_{k}"] = percent([entry["rank"] < k for entry in images])
        result[f"image_recall_at_{k}"] = percent([entry["rank"] < k for entry in texts])
    return result, texts + images


def ranking(kind, names, found, found_names, scores, candidates, right):
    """For each row of scores the ten best columns, and the rank of the best right one, from 0:
    [{kind: name, found: [ten names], "rank": rank}].
    """
    order = scores.masked_fill(~candidates, -torch.inf).argsort(descending=True, stable=True)
    # place of the first right column: of an image's captions the best one counts
    places = right.gather(1, order).int().argmax(1)
    entries = []
    for name, best, rank in zip(names, order[:, :10].tolist(), places.tolist()):
        entries.append({kind: name, found: [found_names[i] for i in best], "rank": rank})
    return entries


# --------------------------------------------------------------------------------------------------
# Tables


def headline(task):
    """The metrics of a task that tables show: [(name, heading)]."""
    if task == "xflickrco":
        return [("text_recall_at_1", "TR@1"), ("image_recall_at_1", "IR@1")]
    return [("accuracy", "accuracy")]


def table(task, results):
    """Results as text: a line per language, one for the mean of those other than English; columns
    are the metrics, then the accuracy of each type of question or label."""
    # rows: {language: {heading: number}}; headings: the keys of all rows, in order
    rows, headings = {}, {}
    for language, scores in results.items():
        row = rows[language] = {}
        for name, heading in headline(task):
            row[heading] = scores[name]
        if "accuracy_labelled" in scores:
            row["without -"] = scores["accuracy_labelled"]
        for name, part in scores.get("by_type", {}).items():
            row[name] = part["accuracy"]
        headings |= row  # for its keys
    others = [row for language, row in rows.items() if language != "en"]
    if len(others) > 1:
        # of those languages that have items of a type
        mean = rows[f"mean of {len(others)} others"] = {}
        for heading in headings:
            known = [row[heading] for row in others if heading in row]
            if known:
                mean[heading] = sum(known) / len(known)

    # headings, then a line per row
    text = " " * 16
    for heading in headings:
        text += f"  {heading:>5}"
    for name, row in rows.items():
        text += f"\n{name:16}"
        for heading in headings:
            cell = f"{row[heading]:.1f}" if heading in row else "-"
            text += "  " + cell.rjust(max(5, len(heading)))
    return text


def mean_zero_shot(results, metric):
    """Mean of a metric over the languages other than English."""
    values = [scores[metric] for language, scores in results.items() if language != "en"]
    return sum(values) / len(values)


# --------------------------------------------------------------------------------------------------
# Runs on disk


def stored(run, part):
    """A part of the args.json of a run's folder: "args", "recipe", "fingerprints", …"""
    with data.reading(run):
        return data.read_json(f"{run}/args.json")[part]


def read_run(run, data_folder=None, tokenizer=None):
    """-> (args, recipe) of a run's folder, as namespaces. data_folder, tokenizer: where they are
    now, if not where they were.

    Paths inside of the checkout are stored relative to it: they hold wherever it is now.
    """
    args = SimpleNamespace(**stored(run, "args"))
    args.data = data_folder or os.path.join(ROOT, args.data)
    args.tokenizer = tokenizer or os.path.join(ROOT, args.tokenizer)
    args.checkpoint = os.path.join(ROOT, args.checkpoint)
    return args, SimpleNamespace(**stored(run, "recipe"))


def read_results(run):
    """-> the results of a finished run."""
    path = f"{run}/results.json"
    if not os.path.isfile(path):
        raise InputError(f"{run}: this run is not finished (no results.json); train.py's "
                         "--resume goes on with it")
    return data.read_json(path)


def fingerprints(run):
    """What a run read: {the last two parts of a file's path: sha256}."""
    return stored(run, "fingerprints")


def has_read(run, path):
    """Whether the file at `path` is, byte for byte, one that a run read, wherever it lay then."""
    return os.path.isfile(path) and data.fingerprint(path) in fingerprints(run).values()


def warn_of_others(run, paths):
    """A line for every file that is not what a run read."""
    for path in paths:
        if not has_read(run, path):
            print(f"warning: {path} is not the file that {run} read", file=sys.stderr)


def load_weights(path, args, device, **options):
    """-> the fine-tuned model in a file; `options` go to its constructor."""
    try:
        tensors, config = read_checkpoint(path)
        load = MODELS[args.model].from_finetuned
        return load(tensors, config, args.task, path, **options).to(device)
    except ValueError as error:
        raise InputError(str(error)) from None


def load_run(run, device, epoch=None, data_folder=None, tokenizer=None):
    """-> (model, tokenizer, labels, args, recipe) of a finished run, or of one of its epochs."""
    args, recipe = read_run(run, data_folder, tokenizer)
    if args.miniature and str(device) == "cpu":
        torch.set_num_threads(1)  # tiny models lose by a second thread
    for path in (args.data, args.tokenizer):
        if not os.path.exists(path):
            raise InputError(f"{path}: it is gone since {run}; --data DIR, --tokenizer FILE tell "
                             "where it is now (train.py --dry-run writes the miniature's)")
    weights = "model.pt" if epoch is None else f"epoch{epoch}.pt"
    model = load_weights(f"{run}/{weights}", args, device)
    tokenizer = data.Tokenizer(args.tokenizer)
    # a warning for files that are not, by their fingerprints, those of the run
    paths = [args.tokenizer]
    for language in data.LANGUAGES[args.task]:
        paths.append(data.annotation_file(args.data, args.task, "test", language))
    warn_of_others(run, paths)
    labels = data.read_labels(args.data) if args.task == "xgqa" else []
    introduce(model, tokenizer, labels, getattr(args, "answers", "exact"))
    return model, tokenizer, labels, args, recipe


def main(argv=None):
    parser = Parser(description="Score a finished run again, without training.")
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--languages", help="some of the task's, as de,ko; default: all")
    parser.add_argument("--split", choices=["test", "dev"], default="test")
    parser.add_argument("--epoch", type=int, help="its weights, of a run with --save-epochs")
    parser.add_argument("--answers", choices=["exact", "reference"], help="default: as in training")
    parser.add_argument("--data", help="folder where the data are now")
    parser.add_argument("--tokenizer", help="file where the tokenizer is now")
    parser.add_argument("--out", help="folder; default: RUN/SPLIT")
    given = parser.parse_args(argv)

    # the run's model and recipe, on the split asked for
    device = accelerator()
    model, tokenizer, labels, args, recipe = load_run(given.run, device, given.epoch, given.data,
                                                      given.tokenizer)
    # a folder of its own for every kind of result
    name = given.split
    if given.epoch:
        name += f"-epoch{given.epoch}"
    if given.answers:
        model.answers = given.answers
        name += f"-{given.answers}"
    languages = given.languages and given.languages.split(",")
    chosen = load_split(args, recipe, tokenizer, labels, given.split, languages)
    check_features(model, chosen.pictures)
    # results and predictions in the form in which train.py leaves them
    out = given.out or f"{given.run}/{name}"
    data.make_folder(f"{out}/predictions")
    results, predictions = evaluate(model, chosen, device, args.precision, args.workers)
    for language, entries in predictions.items():
        data.write_json(f"{out}/predictions/{language}.json", entries)
    data.write_json(f"{out}/results.json", {"languages": results})
    print(table(args.task, results))
    print(f"results and predictions: {out}")


if __name__ == "__main__":
    command(main)
