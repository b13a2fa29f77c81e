"""The paper's tables and figures, from the run folders that train.py writes.

    python analysis.py tables RUN...        Tables 1, 4, 5, 6: every task, every language
    python analysis.py strategies RUN...    Table 2, Figure 5: every strategy
    python analysis.py fewshot RUN...       Table 3: before and after a few examples of a language
    python analysis.py curves RUN...        Figure 2: per epoch and language
    python analysis.py types RUN...         Figure 3: per epoch and type of question
    python analysis.py alignment RUN...     Figure 4: how similar translations are to the model
    python analysis.py schedule             Figure 1: which layers SUF trains in which epoch

RUN is the folder of a run, or one with runs in it. Runs that differ only in their seed share a row:
mean ± standard deviation (number of seeds). Tables go to the terminal and, as CSV and LaTeX, to
the folder --out; figures go there as PNG if matplotlib is installed. The paper's numbers stand
beside ours on the real benchmark. The miniature's measure something else, and titles say so.

Letters: L languages, N items of the test set, D width, B texts of a batch.
"""

import argparse
import csv
import glob
import io
import os
import re
import statistics
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import data
import eval as evaluation
import schedule
from data import InputError

TASKS = {"xvnli": "XVNLI", "xgqa": "xGQA", "xflickrco": "xFlickrCO"}  # as Tables 4, 5 and 6

# --------------------------------------------------------------------------------------------------
# The paper's numbers

# Tables 4, 5, 6: a number per language of PAPER_LANGUAGES, then the printed mean of the others.
# Table 2, "CM only": English and the mean. Figure 4: similarity with English, then of unpaired
# texts.
PAPER = """
uc2   standard  xvnli      accuracy           77.1 56.6 58.1 68.1 64.9                 61.9
uc2   suf       xvnli      accuracy           77.2 55.6 58.5 69.2 63.7                 61.7
cclm  standard  xvnli      accuracy           81.2 60.9 69.6 75.6 68.5                 68.6
cclm  suf       xvnli      accuracy           80.6 63.6 70.9 77.6 70.4                 70.6
uc2   standard  xgqa       accuracy           57.1 44.4 20.8 30.7 25.3 34.1 35.4 32.8  31.9
uc2   suf       xgqa       accuracy           57.1 51.6 26.5 40.5 38.6 41.2 43.8 47.0  41.3
cclm  standard  xgqa       accuracy           62.0 57.2 33.7 49.8 29.1 46.4 39.9 43.3  42.8
cclm  suf       xgqa       accuracy           62.8 59.0 49.5 52.5 42.2 51.7 48.2 57.5  51.5
cclm  top6      xgqa       accuracy           61.9                                     49.7
uc2   standard  xflickrco  text_recall_at_1   36.8 25.8 16.0 12.8 21.6 16.9  7.3 25.8  18.0
uc2   suf       xflickrco  text_recall_at_1   36.4 26.0 17.8 16.3 23.5 19.7  8.2 29.0  20.0
cclm  standard  xflickrco  text_recall_at_1   77.7 68.8 66.4 55.3 69.6 64.5 45.6 73.6  63.4
cclm  suf       xflickrco  text_recall_at_1   78.5 71.0 69.5 58.1 71.1 68.9 50.7 73.2  66.1
uc2   standard  xflickrco  image_recall_at_1  43.0 39.3 15.9 12.7 26.3 19.7  6.4 33.4  20.0
uc2   suf       xflickrco  image_recall_at_1  41.8 30.2 18.7 15.1 28.1 22.8  8.0 33.5  22.3
cclm  standard  xflickrco  image_recall_at_1  78.0 69.2 68.6 54.8 72.7 64.8 45.7 73.7  64.2
cclm  suf       xflickrco  image_recall_at_1  78.6 70.5 70.9 60.0 74.3 68.7 50.4 74.6  67.1
uc2   standard  xgqa       similarity          100   61   33   53   39   49   52   56    20
uc2   suf       xgqa       similarity          100   78   43   69   59   68   70   70    22
uc2   standard  xvnli      similarity          100   41   48   70   56                   17
uc2   suf       xvnli      similarity          100   76   79   89   84                   62
"""
PAPER_LANGUAGES = {
    "xvnli": "en ar es fr ru",
    "xgqa": "en de bn id ko pt ru zh",
    "xflickrco": "en de es id ja ru tr zh",
}
PAPER_TABLE_1 = {  # means of the others that are not those of Tables 4 to 6
    ("uc2", "standard", "xvnli", "accuracy"): 61.7,
    ("uc2", "suf", "xvnli", "accuracy"): 61.2,
    ("cclm", "suf", "xflickrco", "text_recall_at_1"): 66.7,
}
PAPER_FEW_SHOT = "the paper's Table 3: 31.9 to 44.3; with SUF in the English training 41.3 to 46.7"
FOOTNOTES = [  # where the paper contradicts itself
    "the paper's means of UC2 on XVNLI are 61.7 and 61.2 (SUF) in its Table 1, but 61.9 and 61.7 "
    "in its Table 4, whose rows average to the latter",
    "the paper's mean of CCLM + SUF (TR) is 66.7 in its Table 1 and 66.1 in its Table 6, whose row "
    "averages to the latter; its row of UC2 (IR) averages to 22.0 and not to the printed 20.0: the "
    "German 39.3 may be a misprint",
]


def paper(model, strategy, task, metric):
    """-> {language: number, "others": mean}, or None where the paper has no such row."""
    for line in PAPER.strip().splitlines():
        # the columns of the text above: what it is, then its numbers
        *row, numbers = line.split(maxsplit=4)
        if row == [model, strategy, task, metric]:
            numbers = list(map(float, numbers.split()))
            languages = PAPER_LANGUAGES[task].split()[: len(numbers) - 1]
            return dict(zip([*languages, "others"], numbers))
    return None


# --------------------------------------------------------------------------------------------------
# Runs

# train.py's name of a strategy (a pattern) and its name in tables, in the order of the tables
STRATEGIES = r"""
standard               standard
suf                    SUF
suf-less               all layers from the start, each at SUF's share of the rate
suf-later              SUF, late layers' rates raised to the full integral
suf(\d+)               SUF, \1 layer(s) per epoch
suf-every(\d+)         SUF, thawing every \1 steps
lpft                   layers frozen in epoch 1, then all
decay(.*)              layer-wise decay \1
top(\d+)               top \1 layers only
suf-bottom-up          SUF, bottom up
suf-random             SUF, random order
suf-frozen-embeddings  SUF, embeddings frozen
(.*)                   \1
"""


@dataclass
class Run:
    """A finished run of train.py or of tools/few_shot.py."""

    folder: str
    args: object
    strategy: str
    results: dict  # language -> scores, after the last epoch
    epochs: dict  # epoch (from 1) -> such results, as far as they were evaluated
    conditions: dict  # what runs in one table must share


def read_run(folder, *moved):
    """-> Run. moved: where data and tokenizer are now, as `evaluation.read_run` takes them."""
    args, recipe = evaluation.read_run(folder, *moved)
    # beside strategy and seed nothing may differ in a table
    conditions = vars(recipe)
    for name in "limit precision questions_per_image first_image_negatives answers".split():
        conditions[name] = vars(args).get(name)
    files = evaluation.fingerprints(folder)
    conditions["data, checkpoint or tokenizer"] = set(files.values())
    # results after every epoch from the log; the last evaluation has no epoch there
    stored, epochs = evaluation.read_results(folder), {}
    for _, line in data.read_jsonl(os.path.join(folder, "log.jsonl")):
        if "languages" in line:
            epochs[line.get("epoch", recipe.epochs)] = line["languages"]
    return Run(folder, args, stored["strategy"], stored["languages"], epochs, conditions)


def find_runs(paths, *moved):
    """The finished runs in the folders given: each a run's own, or one with runs in it."""
    runs = []
    for path in paths:
        escaped = glob.escape(path)
        # results.json is what a run writes last
        found = glob.glob(f"{escaped}/results.json") or glob.glob(f"{escaped}/*/results.json")
        if not found:
            raise InputError(f"{path}: no finished run of train.py there")
        for file in sorted(found):
            runs.append(read_run(os.path.dirname(file), *moved))
    return runs


def rank(strategy):
    """-> (place in the order of the tables, name in tables)."""
    for place, line in enumerate(STRATEGIES.strip().splitlines()):
        pattern, name = line.split(maxsplit=1)
        if match := re.fullmatch(pattern, strategy):
            return place, match.expand(name)


def label(strategy):
    return rank(strategy)[1]


def grouped(runs):
    """Runs on English -> {(model, task): {strategy: {seed: run}}}, in the order of the tables.

    InputError for two runs of one strategy and seed, and for runs that differ in more than these.
    """
    groups, firsts = {}, {}
    english = [run for run in runs if not run.args.few_shot]
    for run in sorted(english, key=lambda run: (rank(run.strategy), run.args.seed)):
        pair = run.args.model, run.args.task
        arm = groups.setdefault(pair, {}).setdefault(run.strategy, {})
        # every run is compared with the first one of its model and task
        other = arm.setdefault(run.args.seed, run)
        first = firsts.setdefault(pair, run)
        if other is not run:
            raise InputError(f"{run.folder} and {other.folder}: the same strategy and seed twice")
        for name, value in run.conditions.items():
            if value != first.conditions[name]:
                both = f"{run.folder} and {first.folder}"
                raise InputError(f"{both} differ in {name}: they cannot share a table")
    return dict(sorted(groups.items(), reverse=True))  # UC2 comes first, as in the paper


def world(runs):
    """What titles add where runs are on the miniature, whose numbers are not the paper's."""
    return ", miniature" if any(run.args.miniature for run in runs) else ""


def title(model, task):
    return f"{model.upper()} on {TASKS[task]}"


def numbers(arm, metric, language, epoch=None):
    """A metric of every seed of {seed: run}, after the last epoch or after `epoch`.

    metric: keys, joined by "/". language "others": the mean of all but English.
    """
    found = []
    for run in arm.values():
        scores = []
        for name, some in run.epochs[epoch or max(run.epochs)].items():
            if name == language or language == "others" and name != "en":
                for key in metric.split("/"):
                    some = some[key]
                scores.append(some)
        found.append(statistics.fmean(scores))
    return found


# --------------------------------------------------------------------------------------------------
# Tables 1, 4, 5, 6


def tables(runs):
    """Results over all tasks, then by language for each of them."""
    miniature = world(runs)
    overview = {}  # rows of Table 1 by their name
    details = {task: [] for task in TASKS}  # rows of Tables 4, 5, 6
    for (model, task), arms in grouped(runs).items():
        for strategy, arm in arms.items():
            for metric, heading in evaluation.headline(task):
                # our row and, below it, the paper's
                name = f"{model.upper()}, {label(strategy)}"
                ours = {}
                for language in [*data.LANGUAGES[task], "others"]:
                    ours[language] = numbers(arm, metric, language)
                rows = {name: ours}
                printed = paper(model, strategy, task, metric)
                if printed and not miniature:
                    rows[f"{name}: paper"] = printed

                for row_name, row in rows.items():
                    details[task].append({"": row_name, "metric": heading} | row)
                    mean = row["others"]
                    if row is printed:
                        mean = PAPER_TABLE_1.get((model, strategy, task, metric), mean)
                    # a row of Table 1 has all tasks
                    line = overview.setdefault(row_name, {"": row_name})
                    column = heading.replace("accuracy", TASKS[task])
                    line |= {f"{column} en": row["en"], f"{column} others": mean}

    if overview:
        heading = f"Table 1: English, and the mean of the other languages{miniature}"
        notes = [] if miniature else FOOTNOTES
        yield Table("table1", heading, list(overview.values()), notes)
    for number, (task, rows) in enumerate(details.items(), start=4):
        if rows:
            heading = f"Table {number}: {TASKS[task]} by language{miniature}"
            yield Table(f"table{number}", heading, rows)


# --------------------------------------------------------------------------------------------------
# Table 2 and Figure 5


def strategies(runs):
    """English and the mean of the others for every strategy; of layer-wise decay also Figure 5."""
    miniature = world(runs)
    for (model, task), arms in grouped(runs).items():
        for metric, heading in evaluation.headline(task):
            rows, decays = [], {}
            for strategy, arm in arms.items():
                row = {"": label(strategy)}
                printed = paper(model, strategy, task, metric)
                for language in ("en", "others"):
                    row[language] = numbers(arm, metric, language)
                    if printed and not miniature:
                        row[f"paper: {language}"] = printed[language]
                rows.append(row)
                # a point of Figure 5, unless something else is frozen beside the decay
                if match := re.fullmatch(r"decay([\d.e-]+)", strategy):
                    decays[float(match[1])] = row["others"]

            # Figure 5: decay as a curve, standard fine-tuning and SUF as level lines
            panels, x = [], sorted(decays)
            if x:
                lines = {"layer-wise decay": (x, [decays[decay] for decay in x])}
                for row in rows:
                    if row[""] in ("standard", "SUF"):
                        lines[row[""]] = x, [row["others"]] * len(x)
                panels.append(Panel("mean of the others", "decay per layer", heading, lines))
            name = f"Table 2 and Figure 5: {title(model, task)}, {heading}{miniature}"
            yield Table(f"strategies-{model}-{task}-{metric}", name, rows, [], panels)


# --------------------------------------------------------------------------------------------------
# Table 3 (section 5.4)


def fewshot(runs):
    """Mean over languages before and after few-shot training, by the English run's strategy."""
    miniature = world(runs)
    # (model, task, shots) -> English run's strategy and seed -> language -> scores before, after
    cases = {}
    for run in runs:
        if run.args.few_shot:
            english, language = read_run(english_folder(run)), run.args.few_shot
            case = cases.setdefault((run.args.model, run.args.task, run.args.shots), {})
            arm = case.setdefault((rank(english.strategy), english.args.seed), {})
            arm[language] = english.results[language], run.results[language]
    for (model, task, shots), case in cases.items():
        # means over the languages that every strategy and seed has
        languages = sorted(set.intersection(*map(set, case.values())))
        rows = {}
        for (place, name), seed in sorted(case):
            scores = case[(place, name), seed]
            # a row collects its seeds, one after the other
            for metric, heading in evaluation.headline(task):
                row = rows.setdefault((name, metric), {"": name, "metric": heading})
                for which, column in enumerate(["zero-shot", "few-shot"]):
                    found = [scores[language][which][metric] for language in languages]
                    row.setdefault(column, []).append(statistics.fmean(found))
        notes = [f"means over {', '.join(languages)}, each with a model trained on its own images"]
        if (model, task, shots) == ("uc2", "xgqa", 48) and not miniature:
            notes.append(PAPER_FEW_SHOT)
        name = f"Table 3: {title(model, task)}, {shots} shots{miniature}"
        yield Table(f"fewshot-{model}-{task}-{shots}", name, list(rows.values()), notes)


def english_folder(run):
    """Folder of the English run that a few-shot run started from: where it was, or beside it."""
    there = os.path.join(evaluation.ROOT, run.args.init)
    beside = os.path.join(os.path.dirname(run.folder), os.path.basename(there))
    for folder in (there, beside):
        # an old path may lead to another run by now; the fingerprint of its weights tells
        if evaluation.has_read(run.folder, os.path.join(folder, "model.pt")):
            return folder
    raise InputError(f"{run.folder}: its English run is neither {there} nor {beside}")


# --------------------------------------------------------------------------------------------------
# Figures 2 and 3: per epoch


def by_epoch(arm, metric, language):
    """-> (epochs after which all seeds were evaluated, the seeds' numbers after each of them)."""
    epochs = sorted(set.intersection(*(set(run.epochs) for run in arm.values())))
    return epochs, [numbers(arm, metric, language, epoch) for epoch in epochs]


def rows_of(panels):
    """The numbers that panels with epochs show, as rows of a table."""
    rows = {}
    for panel in panels:
        for name, (epochs, values) in panel.lines.items():
            for epoch, value in zip(epochs, values):
                row = rows.setdefault((panel.title, epoch), {"": panel.title, "epoch": epoch})
                row[name] = value
    return list(rows.values())


def with_seeds(strategy, arm):
    return f"{label(strategy)} ({len(arm)} seed{'s' * (len(arm) > 1)})"


def curves(runs):
    """Results after every epoch, in every language and as the mean of the others."""
    miniature = world(runs)
    for (model, task), arms in grouped(runs).items():
        # a curve needs all of its epochs, for every seed
        notes, curved = [], {}
        for strategy, arm in arms.items():
            if all(len(run.epochs) == max(run.epochs) for run in arm.values()):
                curved[strategy] = arm
            else:
                notes.append(f"left out, not evaluated after every epoch: {label(strategy)}")
        if not curved:
            print(f"left out, not evaluated after every epoch: {title(model, task)}")
            continue
        for metric, heading in evaluation.headline(task):
            panels = []
            for strategy, arm in curved.items():
                lines = {}
                for language in [*data.LANGUAGES[task], "others"]:
                    lines[language] = by_epoch(arm, metric, language)
                panels.append(Panel(with_seeds(strategy, arm), "epoch", heading, lines))
            name = f"Figure 2: {title(model, task)}, {heading} after each epoch{miniature}"
            files = f"curves-{model}-{task}-{metric}"
            yield Table(files, name, rows_of(panels), notes, panels)


def types(runs):
    """Accuracy by type of question (XVNLI: by label) after each epoch, mean of the others."""
    miniature = world(runs)
    for (model, task), arms in grouped(runs).items():
        if task == "xflickrco":
            continue
        panels = {}
        for strategy, arm in arms.items():
            for name in next(iter(arm.values())).results["en"]["by_type"]:
                panel = panels.setdefault(name, Panel(name, "epoch", "accuracy", {}))
                line = by_epoch(arm, f"by_type/{name}/accuracy", "others")
                panel.lines[with_seeds(strategy, arm)] = line
        panels = list(panels.values())
        name = f"Figure 3: {title(model, task)}, accuracy by type, mean of the others{miniature}"
        yield Table(f"types-{model}-{task}", name, rows_of(panels), [], panels)


# --------------------------------------------------------------------------------------------------
# Figure 4 (section 5.1): alignment of translations

ALIGNMENT = [
    "cosine similarity, times 100, of the last layer's states of <s> for a text and its English "
    "translation, mean over the test set; the figure has all pairs of languages; unpaired: mean "
    "over all pairs of different items in any languages",
    "Pearson: correlation, over the other languages, of similarity and accuracy (the paper: over 90)",
]


def alignment(runs):
    """Similarity of English and its translations, of unpaired texts; correlation with accuracy."""
    miniature = world(runs)
    for (model, task), arms in grouped(runs).items():
        if task == "xflickrco":
            continue
        languages = data.LANGUAGES[task]
        rows, panels = [], []
        for strategy, arm in arms.items():
            row, matrices = {"": label(strategy)}, []
            for run in arm.values():
                vectors = sentence_vectors(run)  # [L,N,D]
                matrix = 100 * similarity(vectors)  # [L,L]
                matrices.append(matrix)
                accuracies = [run.results[language]["accuracy"] for language in languages]
                found = dict(zip(languages, matrix[0].tolist()))
                found["unpaired"] = 100 * unpaired(vectors)
                found["Pearson, %"] = 100 * np.corrcoef(matrix[0, 1:], accuracies[1:])[0, 1]
                for column, number in found.items():
                    row.setdefault(column, []).append(number)
            rows.append(row)
            # the paper's row below ours, the matrix as a mean over seeds
            printed = paper(model, strategy, task, "similarity")
            if printed and not miniature:
                row = {"": f"{label(strategy)}: paper", "unpaired": printed.pop("others")}
                rows.append(row | printed)
            mean = np.mean(matrices, axis=0)
            panels.append(Matrix(label(strategy), "", languages, languages, mean))
        name = f"Figure 4: {title(model, task)}, alignment of translations{miniature}"
        yield Table(f"alignment-{model}-{task}", name, rows, ALIGNMENT, panels)


@torch.inference_mode()
def sentence_vectors(run):
    """Last layer's states of <s>, at length 1, of every test item that all languages have: [L,N,D].
    """
    device = evaluation.accelerator()
    loaded = evaluation.load_run(run.folder, device, None, run.args.data, run.args.tokenizer)
    model, tokenizer, labels, args, recipe = loaded
    split = evaluation.load_split(args, recipe, tokenizer, labels, "test")
    model.eval()
    found = {}  # (language, id of an item) -> [D]
    with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        texts = evaluation.texts_with_images(model, split, device, args.workers)
        for keys, inputs in texts:
            states = model.fuse(*inputs, first_token=True)[:, 0].float()  # [B,D]
            for (language, i), state in zip(keys, F.normalize(states, dim=-1).cpu()):
                found[language, split.examples[language].records[i].id] = state
    # items that every language has, in English order
    vectors = []
    for record in split.examples["en"].records:
        places = [(language, record.id) for language in split.examples]
        if found.keys() >= set(places):
            vectors.append(torch.stack([found[place] for place in places]))  # [L,D]
    return torch.stack(vectors, dim=1)


def similarity(vectors):
    """[L,N,D] of length 1 -> mean cosine similarity of translations, for all pairs: array [L,L]."""
    return torch.einsum("ind,jnd->ij", vectors, vectors).div(vectors.shape[1]).numpy()


def unpaired(vectors):
    """[L,N,D] of length 1 -> mean cosine similarity of all pairs of different items."""
    languages, items, _ = vectors.shape
    of_item = vectors.sum(0, dtype=torch.float64)  # [N,D]
    of_all = of_item.sum(0)  # [D]
    # products of all pairs, without those of an item with itself
    total = of_all @ of_all - (of_item * of_item).sum()
    return total.item() / (languages**2 * items * (items - 1))


# --------------------------------------------------------------------------------------------------
# Figure 1: what SUF trains when


TRAINS, ALWAYS, FROZEN = 0, 30, 200  # green, orange and grey of matplotlib's colours Set2


def draw_schedule(layers, k, epochs, out):
    """A picture with a panel for each number of layers: which of them train in which epoch."""
    panels = []
    for count in layers:
        # a row for the embeddings, one for each layer from the bottom, one for the head
        fields = np.full((count + 2, epochs), ALWAYS)
        fields[1:-1] = FROZEN
        for epoch in range(epochs):
            for layer in schedule.suf(epoch, count, k):
                fields[layer + 1, epoch] = TRAINS
        rows, columns = ["embeddings", *range(1, count + 1), "head"], range(1, epochs + 1)
        panels.append(Matrix(f"{count} layers", "epoch", rows, columns, fields, "Set2"))
    about = (f"SUF with k = {k}. Green: trains. Grey: frozen. Orange: always trains.\n"
             "CCLM has 12 text and 6 cross-modal layers, UC2 has 12 layers.")
    draw(about, panels, os.path.join(out, "schedule.png"))


# --------------------------------------------------------------------------------------------------
# Output


@dataclass
class Table:
    """A table and its figure.

    rows: dicts {column: cell}; the first column, "", names the row. A cell is a text, a number, or
    the list of a number's values over the seeds: mean ± standard deviation (number of seeds).
    """

    name: str  # of its files
    title: str
    rows: list
    notes: list = ()
    panels: list = ()

    def cells(self):
        """-> header and rows, as text."""
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        rows = [[as_text(row.get(column, "")) for column in columns] for row in self.rows]
        return [columns, *rows]


@dataclass
class Panel:
    """Curves in one picture."""

    title: str
    x: str  # names of the axes
    y: str
    lines: dict  # name -> (x, for each x the values over seeds)


@dataclass
class Matrix:
    """A panel of coloured fields, rows from the bottom."""

    title: str
    x: str  # name of the axis
    rows: list  # their names
    columns: list
    fields: object  # array of numbers from 0 to 200
    colors: str = "Greens"  # of matplotlib; black figures can be read on those up to 100


def as_text(cell):
    if isinstance(cell, list):
        mean, deviation, n = summary(cell)
        return f"{mean:.1f} ± {deviation:.1f} ({n})" if n > 1 else f"{mean:.1f}"
    return f"{cell:.1f}" if isinstance(cell, float) else str(cell)


def summary(values):
    """-> (mean, standard deviation of a sample, number). The deviation of a single value is 0."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), deviation, len(values)


def publish(table, out):
    """Print a table; write it to the folder `out` as CSV and LaTeX, and its figure as PNG."""
    # text: names to the left, numbers to the right
    cells = table.cells()
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{table.title}")
    for first, *others in cells:
        others = [text.rjust(width) for text, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *others]))
    for note in table.notes:
        print(f"* {note}")

    # CSV: all digits, and standard deviation and number of seeds in columns of their own
    rows = []
    for row in table.rows:
        flat = {}
        for column, cell in row.items():
            parts = summary(cell) if isinstance(cell, list) else [cell]
            flat |= zip([column, f"{column} sd", f"{column} n"], parts)
        rows.append(flat)
    text = io.StringIO()
    columns = dict.fromkeys(column for row in rows for column in row)
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)

    # LaTeX: a tabular that needs no package, its title in a comment
    latex = f"% {table.title}\n\\begin{{tabular}}{{l{'r' * (len(widths) - 1)}}}\n"
    for row in cells:
        latex += " & ".join(row).replace("±", r"$\pm$") + " \\\\\n"
    latex += "\\end{tabular}\n"

    path = os.path.join(out, table.name)
    data.write(f"{path}.csv", lambda file: file.write(text.getvalue().encode()))
    data.write(f"{path}.tex", lambda file: file.write(latex.encode()))
    if table.panels:
        draw(table.title, table.panels, f"{path}.png")


def draw(about, panels, path):
    """Draw panels of one kind side by side, as PNG; without matplotlib only say so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path}: matplotlib is not installed (pip install matplotlib)")
        return
    # at most four panels side by side; those with curves share the vertical axis
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.5 * across, 4 * down), layout="constrained")
    figure.suptitle(about, wrap=True)
    axis = None
    for place, panel in enumerate(panels, start=1):
        if isinstance(panel, Panel):
            axis = figure.add_subplot(down, across, place, sharey=axis)
            for name, (x, values) in panel.lines.items():
                mean, deviation, _ = np.transpose([summary(some) for some in values])
                style = {"color": "black", "linewidth": 3} if name == "others" else {}
                [line] = axis.plot(x, mean, marker=".", label=name, **style)
                color = line.get_color()
                axis.fill_between(x, mean - deviation, mean + deviation, color=color, alpha=0.15)
            axis.set(xticks=x, ylabel=f"{panel.y} (%), ± deviation over seeds")
        else:
            axis = figure.add_subplot(down, across, place)
            colors = panel.colors
            axis.pcolormesh(panel.fields, cmap=colors, vmin=0, vmax=200, edgecolors="white")
            axis.set_xticks(np.arange(len(panel.columns)) + 0.5, panel.columns)
            axis.set_yticks(np.arange(len(panel.rows)) + 0.5, panel.rows)
            for (i, j), number in np.ndenumerate(panel.fields):
                if colors == "Greens":
                    axis.text(j + 0.2, i + 0.4, f"{number:.0f}")
        axis.set_title(panel.title, fontsize=8)
        axis.set_xlabel(panel.x)
    if isinstance(panel, Panel):
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    data.write(path, lambda file: figure.savefig(file, dpi=150, format="png"))


# --------------------------------------------------------------------------------------------------
# Command line

COMMANDS = {
    "tables": tables,
    "strategies": strategies,
    "fewshot": fewshot,
    "curves": curves,
    "types": types,
    "alignment": alignment,
}


def main(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = evaluation.Parser(description=__doc__, formatter_class=style)
    parser.add_argument("command", choices=[*COMMANDS, "schedule"])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a run, or of several")
    parser.add_argument("--out", default="report", metavar="DIR", help="default: report")
    parser.add_argument("--data", metavar="DIR", help="the runs' data, if it has moved")
    parser.add_argument("--tokenizer", metavar="FILE", help="their tokenizer, if it has moved")
    parser.add_argument("--layers", type=int, nargs="+", default=[18, 12], help="of schedule")
    parser.add_argument("--k", type=int, default=3, help="of schedule")
    parser.add_argument("--epochs", type=int, default=10, help="of schedule")
    args = parser.parse_intermixed_args(argv)
    data.make_folder(args.out)
    if args.command == "schedule":
        draw_schedule(args.layers, args.k, args.epochs, args.out)
    else:
        runs = find_runs(args.runs, args.data, args.tokenizer)
        made = list(COMMANDS[args.command](runs))
        for table in made:
            publish(table, args.out)
        if not made:
            raise InputError(f"{args.command}: none of these runs has what this needs; see --help")
    print(f"\ntables (CSV, LaTeX) and figures (PNG): {args.out}")


if __name__ == "__main__":
    evaluation.command(main)
