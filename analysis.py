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
import os
import re
import statistics
from collections import defaultdict
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

# Tables 4, 5, 6: a number per language of data.LANGUAGES, then the printed mean of the others.
# Table 2, "CM only": English and the mean. Figure 4: similarity with English, then of unpaired
# texts.
PAPER = """\
uc2   standard  xvnli      accuracy          77.1 56.6 58.1 68.1 64.9                 61.9
uc2   suf       xvnli      accuracy          77.2 55.6 58.5 69.2 63.7                 61.7
cclm  standard  xvnli      accuracy          81.2 60.9 69.6 75.6 68.5                 68.6
cclm  suf       xvnli      accuracy          80.6 63.6 70.9 77.6 70.4                 70.6
uc2   standard  xgqa       accuracy          57.1 44.4 34.1 35.4 30.7 32.8 25.3 20.8  31.9
uc2   suf       xgqa       accuracy          57.1 51.6 41.2 43.8 40.5 47.0 38.6 26.5  41.3
cclm  standard  xgqa       accuracy          62.0 57.2 46.4 39.9 49.8 43.3 29.1 33.7  42.8
cclm  suf       xgqa       accuracy          62.8 59.0 51.7 48.2 52.5 57.5 42.2 49.5  51.5
cclm  top6      xgqa       accuracy          61.9                                     49.7
uc2   standard  xflickrco  text_recall_at_1  36.8 25.8 16.0 12.8 21.6 16.9  7.3 25.8  18.0
uc2   suf       xflickrco  text_recall_at_1  36.4 26.0 17.8 16.3 23.5 19.7  8.2 29.0  20.0
cclm  standard  xflickrco  text_recall_at_1  77.7 68.8 66.4 55.3 69.6 64.5 45.6 73.6  63.4
cclm  suf       xflickrco  text_recall_at_1  78.5 71.0 69.5 58.1 71.1 68.9 50.7 73.2  66.1
uc2   standard  xflickrco  image_recall_at_1 43.0 39.3 15.9 12.7 26.3 19.7  6.4 33.4  20.0
uc2   suf       xflickrco  image_recall_at_1 41.8 30.2 18.7 15.1 28.1 22.8  8.0 33.5  22.3
cclm  standard  xflickrco  image_recall_at_1 78.0 69.2 68.6 54.8 72.7 64.8 45.7 73.7  64.2
cclm  suf       xflickrco  image_recall_at_1 78.6 70.5 70.9 60.0 74.3 68.7 50.4 74.6  67.1
uc2   standard  xgqa       similarity         100   61   49   52   53   56   39   33    20
uc2   suf       xgqa       similarity         100   78   68   70   69   70   59   43    22
uc2   standard  xvnli      similarity         100   41   48   70   56                   17
uc2   suf       xvnli      similarity         100   76   79   89   84                   62
"""
PAPER_FEW_SHOT = """\
the paper's Table 3 (UC2 on xGQA, 48 shots): 31.9 to 44.3; with SUF in the English training 41.3 \
to 46.7"""
FOOTNOTES = [  # where the paper contradicts itself
    "the paper's means of UC2 on XVNLI are 61.7 and 61.2 (SUF) in its Table 1, but 61.9 and 61.7 "
    "in its Table 4, whose rows average to the latter",
    "the paper's mean of CCLM + SUF (TR) is 66.7 in its Table 1 and 66.1 in its Table 6, whose row "
    "averages to the latter; its row of UC2 (IR) averages to 22.0 and not to the printed 20.0: the "
    "German 39.3 may be a misprint",
]


def paper(model, strategy, task, metric):
    """-> {language: number, "others": mean}, or None where the paper has no such row."""
    for line in PAPER.splitlines():
        # the columns of the text above: what it is, then its numbers
        *row, numbers = line.split(maxsplit=4)
        if row == [model, strategy, task, metric]:
            numbers = list(map(float, numbers.split()))
            languages = data.LANGUAGES[task][: len(numbers) - 1]
            return dict(zip([*languages, "others"], numbers))


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
    epochs: dict  # epoch (from 1) -> language -> scores, as far as they were evaluated
    conditions: dict  # what runs in one table must share

    def results(self, epoch=None):
        """After an epoch; default: the last."""
        return self.epochs[epoch or max(self.epochs)]


def find_runs(paths, *moved):
    """The finished runs in the folders given: each a run's own, or one with runs in it.

    moved: where data and tokenizer are now, as `evaluation.read_run` takes them.
    """
    runs = []
    for path in paths:
        escaped = glob.escape(path)
        # results.json is what a run writes last
        found = glob.glob(f"{escaped}/results.json") or glob.glob(f"{escaped}/*/results.json")
        if not found:
            raise InputError(f"{path}: no finished run of train.py there")
        runs += [read_run(os.path.dirname(file), *moved) for file in sorted(found)]
    return runs


def read_run(folder, *moved):
    """-> Run."""
    args, recipe = evaluation.read_run(folder, *moved)
    # beside strategy and seed nothing may differ in a table
    conditions = vars(recipe)
    for name in "limit precision questions_per_image first_image_negatives answers".split():
        conditions[name] = vars(args).get(name)
    conditions["data, checkpoint or tokenizer"] = set(evaluation.fingerprints(folder).values())
    # results after every epoch from the log; the last evaluation has no epoch there
    epochs = {}
    for _, line in data.read_jsonl(f"{folder}/log.jsonl"):
        languages = line.get("languages", {})
        # the accuracy of a type of question becomes a score like others
        for scores in languages.values():
            for name, part in scores.get("by_type", {}).items():
                scores[name] = part["accuracy"]
        if languages:
            epochs[line.get("epoch", recipe.epochs)] = languages
    strategy = evaluation.read_results(folder)["strategy"]
    return Run(folder, args, strategy, epochs, conditions)


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
    groups = {}
    firsts = {}
    for run in sorted(runs, key=lambda run: (rank(run.strategy), run.args.seed)):
        if run.args.few_shot:
            continue
        pair = run.args.model, run.args.task
        arm = groups.setdefault(pair, {}).setdefault(run.strategy, {})
        # every run is compared with the first one of its model and task
        other = arm.setdefault(run.args.seed, run)
        first = firsts.setdefault(pair, run)
        if other is not run:
            raise InputError(f"{run.folder} and {other.folder}: the same strategy and seed twice")
        for name, value in run.conditions.items():
            if value != first.conditions[name]:
                raise InputError(f"{run.folder} and {first.folder} differ in {name}: they cannot "
                                 "share a table")
    return dict(sorted(groups.items(), reverse=True))  # UC2 comes first, as in the paper


def world(runs):
    """", miniature" for titles, or "": the miniature's numbers are not the paper's."""
    return ", miniature" if any(run.args.miniature for run in runs) else ""


def title(model, task):
    return f"{model.upper()} on {TASKS[task]}"


def numbers(arm, metric, language, epoch=None):
    """A metric of every seed of {seed: run}, after the last epoch or after `epoch`.

    language "others": the mean of all but English.
    """
    found = []
    for run in arm.values():
        results = run.results(epoch)
        if language == "others":
            found.append(evaluation.mean_zero_shot(results, metric))
        else:
            found.append(results[language][metric])
    return found


# --------------------------------------------------------------------------------------------------
# Tables 1, 4, 5, 6


def by_language(model, task, arms, metric, heading):
    """A row per strategy, below it the paper's: every language and the mean of the others."""
    rows = []
    for strategy, arm in arms.items():
        name = f"{model.upper()}, {label(strategy)}"
        row = {"": name, "metric": heading}
        for language in [*data.LANGUAGES[task], "others"]:
            row[language] = numbers(arm, metric, language)
        rows.append(row)
        printed = paper(model, strategy, task, metric)
        if printed and not world(arm.values()):
            rows.append({"": f"{name}: paper", "metric": heading} | printed)
    return rows


def tables(runs):
    """Results over all tasks, then by language for each of them."""
    overview = {}  # name of a row -> row of Table 1, filled task by task
    details = {task: [] for task in TASKS}  # rows of Tables 4, 5, 6
    for (model, task), arms in grouped(runs).items():
        for metric, heading in evaluation.headline(task):
            rows = by_language(model, task, arms, metric, heading)
            details[task] += rows
            column = heading.replace("accuracy", TASKS[task])
            for row in rows:
                line = overview.setdefault(row[""], {"": row[""]})
                line[f"{column} en"] = row["en"]
                line[f"{column} others"] = row["others"]

    if overview:
        heading = f"Table 1: English, and the mean of the other languages{world(runs)}"
        notes = [] if world(runs) else FOOTNOTES
        yield Table("table1", heading, list(overview.values()), notes)
    for number, (task, rows) in enumerate(details.items(), start=4):
        if rows:
            heading = f"Table {number}: {TASKS[task]} by language{world(runs)}"
            yield Table(f"table{number}", heading, rows)


# --------------------------------------------------------------------------------------------------
# Table 2 and Figure 5


def strategies(runs):
    """Every strategy of a model and task; of layer-wise decay also Figure 5."""
    for (model, task), arms in grouped(runs).items():
        for metric, heading in evaluation.headline(task):
            decays = {}
            panels = []
            for strategy, arm in arms.items():
                # no point of the figure where the name has more than a number: something is frozen
                if match := re.fullmatch(r"decay([\d.e-]+)", strategy):
                    decays[float(match[1])] = numbers(arm, metric, "others")
            if decays:
                # standard fine-tuning and SUF as level lines
                x = list(decays)
                lines = {"layer-wise decay": (x, list(decays.values()))}
                for strategy in ("standard", "suf"):
                    if strategy in arms:
                        level = numbers(arms[strategy], metric, "others")
                        lines[label(strategy)] = x, [level] * len(x)
                panels.append(Curves("mean of the others", "decay per layer", heading, lines))
            rows = by_language(model, task, arms, metric, heading)
            name = f"Table 2 and Figure 5: {title(model, task)}, {heading}{world(runs)}"
            yield Table(f"strategies-{model}-{task}-{metric}", name, rows, [], panels)


# --------------------------------------------------------------------------------------------------
# Table 3 (section 5.4)


def fewshot(runs):
    """Mean over languages before and after few-shot training, by the English run's strategy."""
    # (model, task, shots) -> {(strategy, seed) of the English run: ({language: its scores},
    # {language: the few-shot run's scores})}
    cases = {}
    for run in runs:
        if run.args.few_shot:
            english, language = english_run(run, runs), run.args.few_shot
            case = cases.setdefault((run.args.model, run.args.task, run.args.shots), {})
            before, after = case.setdefault((rank(english.strategy), english.args.seed), ({}, {}))
            before[language] = english.results()[language]
            after[language] = run.results()[language]
    for (model, task, shots), case in cases.items():
        rows = {}
        for ((_, name), _), (before, after) in sorted(case.items()):
            # a row collects seeds with the same languages, one after the other
            languages = " ".join(sorted(after))
            row = rows.setdefault((name, languages), {"": name, "mean of": languages})
            for metric, heading in evaluation.headline(task):
                for column, scores in (("zero-shot", before), ("few-shot", after)):
                    mean = evaluation.mean_zero_shot(scores, metric)
                    row.setdefault(f"{heading} {column}", []).append(mean)
        notes = ["every language has a model of its own, trained on its own images"]
        if not world(runs):
            notes.append(PAPER_FEW_SHOT)
        name = f"Table 3: {title(model, task)}, {shots} shots{world(runs)}"
        yield Table(f"fewshot-{model}-{task}-{shots}", name, list(rows.values()), notes)


def english_run(run, runs):
    """The one of `runs` whose weights a few-shot run started from, by their fingerprint."""
    for other in runs:
        if evaluation.has_read(run.folder, f"{other.folder}/model.pt"):
            return other
    raise InputError(f"{run.folder}: its English run {run.args.init} is not among these runs, or "
                     "was trained again since")


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


def curves(runs):
    """Results after every epoch, in every language and as the mean of the others."""
    for (model, task), arms in grouped(runs).items():
        for metric, heading in evaluation.headline(task):
            notes = []
            panels = []
            for strategy, arm in arms.items():
                # a curve needs all of its epochs, for every seed
                if any(len(run.epochs) < max(run.epochs) for run in arm.values()):
                    notes.append(f"left out, not evaluated after every epoch: {label(strategy)}")
                    continue
                lines = {}
                for language in [*data.LANGUAGES[task], "others"]:
                    lines[language] = by_epoch(arm, metric, language)
                name = f"{label(strategy)} (seeds: {len(arm)})"
                panels.append(Curves(name, "epoch", heading, lines))
            name = f"Figure 2: {title(model, task)}, {heading} after each epoch{world(runs)}"
            yield Table(f"curves-{model}-{task}-{metric}", name, rows_of(panels), notes, panels)


def types(runs):
    """Accuracy by type of question (XVNLI: by label) after each epoch, mean of the others."""
    for (model, task), arms in grouped(runs).items():
        panels = {}
        for strategy, arm in arms.items():
            [first, *_] = arm.values()
            for name in first.results()["en"].get("by_type", ()):
                panel = panels.setdefault(name, Curves(name, "epoch", "accuracy", {}))
                panel.lines[label(strategy)] = by_epoch(arm, name, "others")
        if not panels:  # xFlickrCO
            continue
        panels = list(panels.values())
        name = f"Figure 3: {title(model, task)}, accuracy by type, mean of the others{world(runs)}"
        yield Table(f"types-{model}-{task}", name, rows_of(panels), [], panels)


# --------------------------------------------------------------------------------------------------
# Figure 4 (section 5.1): alignment of translations

ALIGNMENT = """\
cosine similarity, times 100, of the last layer's states of <s> for a text and its English \
translation, mean over the test set; the figure has all pairs of languages; unpaired: mean over \
all pairs of different items in any languages"""


def alignment(runs):
    """Similarity of English and its translations, and of unpaired texts."""
    for (model, task), arms in grouped(runs).items():
        if task == "xflickrco":
            continue
        languages = data.LANGUAGES[task]
        rows = []
        panels = []
        for strategy, arm in arms.items():
            if strategy not in ("standard", "suf"):  # as in the paper: it takes long
                continue
            row, matrices = defaultdict(list), []
            row[""] = label(strategy)
            for run in arm.values():
                vectors = sentence_vectors(run)  # [L,N,D]
                matrix = similarity(vectors)  # [L,L]
                matrices.append(matrix)
                for language, number in zip(languages, matrix[0].tolist()):
                    row[language].append(number)
                row["unpaired"].append(unpaired(vectors))
            rows.append(row)
            # the paper's row below ours, the matrix as a mean over seeds
            printed = paper(model, strategy, task, "similarity")
            if printed and not world(runs):
                row = {"": f"{label(strategy)}: paper", "unpaired": printed.pop("others")}
                rows.append(row | printed)
            mean = np.mean(matrices, axis=0)
            panels.append(Fields(label(strategy), languages, languages, mean))
        name = f"Figure 4: {title(model, task)}, alignment of translations{world(runs)}"
        yield Table(f"alignment-{model}-{task}", name, rows, [ALIGNMENT], panels)


@torch.inference_mode()
def sentence_vectors(run):
    """Last layer's states of <s>, at length 1, of every test item that all languages have: [L,N,D].
    """
    device, moved = evaluation.accelerator(), (run.args.data, run.args.tokenizer)
    model, tokenizer, labels, args, recipe = evaluation.load_run(run.folder, device, None, *moved)
    split = evaluation.load_split(args, recipe, tokenizer, labels, "test")
    model.eval()
    found = {language: {} for language in split.examples}  # -> {id of an item: [D]}
    with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        texts = evaluation.texts_with_images(model, split, device, args.workers)
        for keys, inputs in texts:
            states = model.fuse(*inputs, first_token=True)[:, 0].float()  # [B,D]
            for (language, i), state in zip(keys, F.normalize(states, dim=-1).cpu()):
                record = split.examples[language].records[i]
                found[language][record.id] = state
    shared = sorted(set.intersection(*map(set, found.values())))
    vectors = []
    for states in found.values():
        vectors.append(torch.stack([states[item] for item in shared]))  # [N,D]
    return torch.stack(vectors)


def similarity(vectors):
    """[L,N,D] of length 1 -> mean cosine similarity of translations, times 100: array [L,L]."""
    pairs = torch.einsum("ind,jnd->ij", vectors, vectors)  # sums over items
    return pairs.mul(100 / vectors.shape[1]).numpy()


def unpaired(vectors):
    """[L,N,D] of length 1 -> mean cosine similarity of all pairs of different items, times 100."""
    languages, items, _ = vectors.shape
    of_item = vectors.sum(0, dtype=torch.float64)  # [N,D]
    of_all = of_item.sum(0)  # [D]
    # products of all pairs, without those of an item with itself
    total = of_all @ of_all - (of_item * of_item).sum()
    return 100 * total.item() / (languages**2 * items * (items - 1))


# --------------------------------------------------------------------------------------------------
# Figure 1: what SUF trains when


def suf_epochs(runs):
    """Which layers SUF trains in which epoch, for the full-size models. Needs no runs."""
    for model, layers in (("cclm", 18), ("uc2", 12)):
        epochs = range(1, 8)
        rows, fields = [], np.zeros((layers, len(epochs)), dtype=bool)
        for epoch in epochs:
            trained = sorted(schedule.suf(epoch - 1, layers))
            fields[trained, epoch - 1] = True
            rows.append({"": f"epoch {epoch}", "top layers that train": len(trained)})
        name = f"Figure 1: SUF in {model.upper()}; green layers train, as do embeddings and head"
        panel = Fields("layers by epoch", range(1, layers + 1), epochs, fields)
        yield Table(f"schedule-{model}", name, rows, [], [panel])


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
        columns = {"": None}
        for row in self.rows:
            columns |= row
        rows = [[as_text(row.get(column, "")) for column in columns] for row in self.rows]
        return [[*columns], *rows]


@dataclass
class Curves:
    """A panel of curves, with their deviation over seeds."""

    title: str
    x: str  # names of the axes
    y: str
    lines: dict  # name -> (x, for each x the values over seeds)

    def draw(self, axis):
        for name, (x, values) in self.lines.items():
            mean, deviation, _ = np.transpose([summary(some) for some in values])
            style = {"color": "black", "linewidth": 3} if name == "others" else {}
            axis.errorbar(x, mean, deviation, marker=".", capsize=2, label=name, **style)
        axis.set(xticks=x, xlabel=self.x, ylabel=f"{self.y} (%), ± deviation over seeds")


@dataclass
class Fields:
    """A panel of coloured fields, rows from the bottom; numbers are written into them."""

    title: str
    rows: list  # their names
    columns: list
    fields: object  # array of numbers or of true and false

    def draw(self, axis):
        # half of the colours: black figures can be read on them
        darkest = 2 * self.fields.max()
        axis.imshow(self.fields, "Greens", vmin=0, vmax=darkest, origin="lower", aspect="auto")
        axis.set_xticks(range(len(self.columns)), self.columns)
        axis.set_yticks(range(len(self.rows)), self.rows)
        if self.fields.dtype != bool:
            for (i, j), number in np.ndenumerate(self.fields):
                axis.text(j, i, f"{number:.0f}", ha="center")


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
    for row in cells:
        line = row[0].ljust(widths[0])
        for text, width in zip(row[1:], widths[1:]):
            line += "  " + text.rjust(width)
        print(line)
    for note in table.notes:
        print(f"* {note}")

    # CSV: all digits, and standard deviation and number of seeds in columns of their own
    rows = []
    columns = {}
    for row in table.rows:
        flat = {}
        for column, cell in row.items():
            parts = summary(cell) if isinstance(cell, list) else [cell]
            flat |= zip([column, f"{column} sd", f"{column} n"], parts)
        rows.append(flat)
        columns |= flat
    path = f"{out}/{table.name}"
    with open(f"{path}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)

    # LaTeX: a tabular that needs no package, its title in a comment
    latex = f"% {table.title}\n\\begin{{tabular}}{{l{'r' * (len(widths) - 1)}}}\n"
    for row in cells:
        latex += " & ".join(row).replace("±", r"$\pm$") + " \\\\\n"
    with open(f"{path}.tex", "w", encoding="utf-8") as file:
        file.write(latex + "\\end{tabular}\n")
    if table.panels:
        draw(table.title, table.panels, f"{path}.png")


def draw(about, panels, path):
    """Draw panels side by side, with one vertical axis, as PNG; without matplotlib only say so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path}: matplotlib is not installed (pip install matplotlib)")
        return
    across = min(4, len(panels))
    down = (len(panels) + 3) // 4
    figure = Figure(figsize=(4.5 * across, 4 * down), layout="constrained")
    figure.suptitle(about, wrap=True)
    axis = None
    for place, panel in enumerate(panels, start=1):
        axis = figure.add_subplot(down, across, place, sharey=axis)
        axis.set_title(panel.title, fontsize=8)
        panel.draw(axis)
    names = axis.get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=150)


# --------------------------------------------------------------------------------------------------
# Command line

COMMANDS = {
    "tables": tables,
    "strategies": strategies,
    "fewshot": fewshot,
    "curves": curves,
    "types": types,
    "alignment": alignment,
    "schedule": suf_epochs,
}


def start(parser, argv, make=None):
    """Read the flags, and publish the tables that make(runs), or the command given, yields."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a run, or of several")
    parser.add_argument("--out", default="report", metavar="DIR", help="default: report")
    parser.add_argument("--data", metavar="DIR", help="the runs' data, if it has moved")
    parser.add_argument("--tokenizer", metavar="FILE", help="their tokenizer, if it has moved")
    args = parser.parse_intermixed_args(argv)
    make = make or COMMANDS[args.command]
    data.make_folder(args.out)
    made = list(make(find_runs(args.runs, args.data, args.tokenizer)))
    for table in made:
        publish(table, args.out)
    if not any(table.rows for table in made):
        raise InputError("none of these runs has what this needs; see --help")
    print(f"\ntables (CSV, LaTeX) and figures (PNG): {args.out}")


def main(argv=None):
    parser = evaluation.Parser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=COMMANDS)
    start(parser, argv)


if __name__ == "__main__":
    evaluation.command(main)
