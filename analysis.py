"""The paper's tables and figures from the run folders of train.py; and what the paper leaves open, on the same footing.

    python analysis.py reproduce            train what is missing, then all of the below: report/report.md
    python analysis.py tables RUN...        Tables 1, 4, 5, 6: every task, every language
    python analysis.py strategies RUN...    Table 2, Figure 5, and rivals that the paper does not have
    python analysis.py fewshot RUN...       Table 3: before and after a few examples of the language
    python analysis.py curves RUN...        Figure 2: per epoch and language; and at equal English accuracy
    python analysis.py types RUN...         Figure 3: per epoch and question type
    python analysis.py alignment RUN...     Figure 4: similarity of the states of <s> between translations

RUN is the folder of a run, or a folder that contains runs. Runs of one model, task and strategy differ in their seed:
mean ± standard deviation (number of seeds). Every table goes to the terminal and, as CSV, to the folder --out; with
matplotlib installed the figures go there too, as PNG. Where the data is the real benchmark the paper's numbers stand
beside ours; the miniature's have nothing to do with them.

Differences between strategies are paired: same seed, both arms. Their 95 % intervals are Student's, over seeds: they
cover the chance in training. The bootstrap over the images of the test set stands beside them for one pair of runs: it
covers the chance in the choice of test images.

The other rooms: tables.py has the statistics and the files, probe.py what is measured on weights (alignment, drift,
post-hoc changes, cost), reproduce.py what `reproduce` does.
"""

import argparse
import glob
import os
import re
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

import data
import eval as evaluation
import files
import probe
from files import InputError, check_fields, whole
from tables import Difference, Table, pearson, publish, sign_test, summarize, t_interval

# ---------------------------------------------------------------------------------------------------------------------
# The paper's numbers

PAPER_LANGUAGES = {"xvnli": "en ar es fr ru", "xgqa": "en de bn id ko pt ru zh", "xflickrco": "en de es id ja ru tr zh"}
PAPER = {  # Tables 4, 5, 6: a number per language, then the mean of the others as printed there
    ("uc2", "standard", "xvnli", "accuracy"): "77.1 56.6 58.1 68.1 64.9 61.9",
    ("uc2", "suf", "xvnli", "accuracy"): "77.2 55.6 58.5 69.2 63.7 61.7",
    ("cclm", "standard", "xvnli", "accuracy"): "81.2 60.9 69.6 75.6 68.5 68.6",
    ("cclm", "suf", "xvnli", "accuracy"): "80.6 63.6 70.9 77.6 70.4 70.6",
    ("uc2", "standard", "xgqa", "accuracy"): "57.1 44.4 20.8 30.7 25.3 34.1 35.4 32.8 31.9",
    ("uc2", "suf", "xgqa", "accuracy"): "57.1 51.6 26.5 40.5 38.6 41.2 43.8 47.0 41.3",
    ("cclm", "standard", "xgqa", "accuracy"): "62.0 57.2 33.7 49.8 29.1 46.4 39.9 43.3 42.8",
    ("cclm", "suf", "xgqa", "accuracy"): "62.8 59.0 49.5 52.5 42.2 51.7 48.2 57.5 51.5",
    ("uc2", "standard", "xflickrco", "text_recall_at_1"): "36.8 25.8 16.0 12.8 21.6 16.9 7.3 25.8 18.0",
    ("uc2", "suf", "xflickrco", "text_recall_at_1"): "36.4 26.0 17.8 16.3 23.5 19.7 8.2 29.0 20.0",
    ("cclm", "standard", "xflickrco", "text_recall_at_1"): "77.7 68.8 66.4 55.3 69.6 64.5 45.6 73.6 63.4",
    ("cclm", "suf", "xflickrco", "text_recall_at_1"): "78.5 71.0 69.5 58.1 71.1 68.9 50.7 73.2 66.1",
    ("uc2", "standard", "xflickrco", "image_recall_at_1"): "43.0 39.3 15.9 12.7 26.3 19.7 6.4 33.4 20.0",
    ("uc2", "suf", "xflickrco", "image_recall_at_1"): "41.8 30.2 18.7 15.1 28.1 22.8 8.0 33.5 22.3",
    ("cclm", "standard", "xflickrco", "image_recall_at_1"): "78.0 69.2 68.6 54.8 72.7 64.8 45.7 73.7 64.2",
    ("cclm", "suf", "xflickrco", "image_recall_at_1"): "78.6 70.5 70.9 60.0 74.3 68.7 50.4 74.6 67.1",
}
PAPER_TABLE_1 = {  # where its mean of the others is not the one of Tables 4 to 6
    ("uc2", "standard", "xvnli", "accuracy"): 61.7,
    ("uc2", "suf", "xvnli", "accuracy"): 61.2,
    ("cclm", "suf", "xflickrco", "text_recall_at_1"): 66.7,
}
PAPER_TOP_LAYERS = {"en": 61.9, "others": 49.7}  # Table 2, "CM only": CCLM on xGQA
PAPER_FEW_SHOT = {"standard": (31.9, 44.3), "suf": (41.3, 46.7)}  # Table 3, UC2 on xGQA: the others before, after
PAPER_ALIGNMENT = {  # Figure 4, UC2: similarity with English per language, and of unpaired examples, times 100
    ("xgqa", "standard"): ({"bn": 33, "de": 61, "id": 53, "ko": 39, "pt": 49, "ru": 52, "zh": 56}, 20),
    ("xgqa", "suf"): ({"bn": 43, "de": 78, "id": 69, "ko": 59, "pt": 68, "ru": 70, "zh": 70}, 22),
    ("xvnli", "standard"): ({"ar": 41, "es": 48, "fr": 70, "ru": 56}, 17),
    ("xvnli", "suf"): ({"ar": 76, "es": 79, "fr": 89, "ru": 84}, 62),
}
FOOTNOTES = {  # where the paper contradicts itself
    "xvnli": "the paper's means of UC2 on XVNLI are 61.7 and 61.2 (SUF) in its Table 1, but 61.9 and 61.7 in its "
             "Table 4, whose rows average to the latter",
    "xflickrco": "the paper's mean of CCLM + SUF (TR) is 66.7 in its Table 1 and 66.1 in its Table 6, whose row "
                 "averages to the latter; its row of UC2 (IR) averages to 22.0 and not to the printed 20.0: the German "
                 "39.3 may be a misprint",
}


def paper(model, strategy, task, metric):
    """-> {language: number, "others": mean}, or None where the paper has no such row."""
    if (model, strategy, task, metric) in PAPER:
        names = [*PAPER_LANGUAGES[task].split(), "others"]
        return dict(zip(names, map(float, PAPER[model, strategy, task, metric].split()), strict=True))
    return PAPER_TOP_LAYERS if (model, strategy, task) == ("cclm", "top6", "xgqa") else None


# ---------------------------------------------------------------------------------------------------------------------
# Runs


SHARED = ("miniature", "limit", "precision", "questions_per_image", "first_image_negatives")  # beside the recipe


@dataclass
class Run:
    """One finished run of train.py, or (see `post_hoc_arms`) what was made of one afterwards."""

    folder: str
    args: object
    recipe: object
    strategy: str
    results: dict  # language -> scores, after the last epoch
    epochs: dict  # epoch (from 1) -> results by language, as far as they were evaluated
    conditions: dict  # what runs in one table must share
    trained: bool = True  # False: changed after training, without predictions on disk

    @property
    def pair(self):
        return self.args.model, self.args.task

    @property
    def evaluated_by_epoch(self):
        return len(self.epochs) == self.recipe.epochs > 1


def read_run(folder):
    """-> Run. InputError, one line, for a folder that is none, is not finished or lacks a language."""
    args, recipe = evaluation.read_run(folder)
    path, log = (os.path.join(folder, name) for name in ("results.json", "log.jsonl"))
    stored, epochs = evaluation.read_results(folder), {}
    results = languages_of(stored, args, path)
    if not args.few_shot:
        for number, line in files.read_jsonl(log):
            if isinstance(line, dict) and "languages" in line:
                where, epoch = f"{log}, line {number}", line.get("epoch", recipe.epochs)  # the last has none
                check_fields({"epoch": epoch}, {"epoch": whole(1, recipe.epochs)}, where)
                epochs[epoch] = languages_of(line, args, where)
        epochs[recipe.epochs] = results
    conditions = vars(recipe) | {name: getattr(args, name, None) for name in SHARED}
    conditions["their files"] = list(evaluation.fingerprints(folder).values())
    strategy = files.expect(stored, "strategy", str, path)
    return Run(folder, args, recipe, strategy, results, epochs, conditions)


def languages_of(stored, args, where):
    """-> the results by language in a file or line. InputError unless all languages of a run are there."""
    results = evaluation.check_languages(stored, args.task, where)
    for language in ["en", args.few_shot] if args.few_shot else data.LANGUAGES[args.task]:
        if language not in results:
            found = ", ".join(results)
            raise InputError(f"{where}: no results for language {language!r} of {args.task} (found: {found})")
    return results


def find_runs(paths):
    """The runs of the folders given: each a run's own, or one with finished runs in it."""
    runs = []
    for path in paths:
        if os.path.isfile(os.path.join(path, "args.json")):
            runs.append(read_run(path))
            continue
        inside = sorted(map(os.path.dirname, glob.glob(os.path.join(glob.escape(path), "*", "args.json"))))
        finished = [folder for folder in inside if os.path.isfile(os.path.join(folder, "results.json"))]
        if not finished:
            raise InputError(f"{path}: not the folder of a run of train.py, and no finished runs in it")
        for folder in sorted(set(inside) - set(finished)):
            print(f"left out, not finished: {folder}")
        runs += map(read_run, finished)
    return runs


def grouped(runs):
    """English runs -> {(model, task): {strategy: {seed: run}}}, strategies in the order of the tables.

    InputError for two runs of one seed, and for runs that differ in more than strategy and seed.
    """
    groups, first = defaultdict(lambda: defaultdict(dict)), {}
    english = [run for run in runs if not run.args.few_shot]
    for run in sorted(english, key=lambda run: (run.pair, rank(run.strategy), run.args.seed)):
        arm, other = groups[run.pair][run.strategy], first.setdefault(run.pair, run)
        if run.args.seed in arm:
            raise InputError(f"{run.folder} and {arm[run.args.seed].folder} are runs of the same strategy and seed")
        different = [name for name, condition in run.conditions.items() if other.conditions.get(name) != condition]
        if different:
            raise InputError(f"{run.folder} and {other.folder} cannot share a table: "
                             f"they differ in {', '.join(different)}")
        arm[run.args.seed] = run
    if not groups:
        raise InputError("none of these runs is one on English training data")
    return groups


# strategy as train.py or `post_hoc_arms` names it -> its name in tables, what it speaks for if it has SUF's gain too
STRATEGIES = [
    (r"standard", "standard", ""),
    (r"suf", "SUF", ""),
    (r"suf(\d+)", r"SUF, \1 layer(s) per epoch", "the pace not mattering much"),
    (r"decay(.*)", r"layer-wise decay \1", "lower layers that learn more slowly being enough"),
    (r"top(\d+)", r"top \1 layers only", "lower layers that do not learn at all being enough"),
    (r"suf-bottom-up", "SUF, bottom up", "the direction of thawing not mattering, only that few layers train at first"),
    (r"suf-random", "SUF, random order", "the order of thawing not mattering, only that few layers train at first"),
    (r"suf-fisher", "SUF, by Fisher information", "an order by importance being as good"),
    (r"suf-frozen-embeddings", "SUF, embeddings frozen", "embeddings not having to learn"),
    (r"average(\d+)", r"standard, mean of the last \1 epochs", "averaging weights being enough, without a schedule"),
    (r"average-all", "standard, mean of all epochs", "averaging weights being enough, without a schedule"),
    (r"reverted", "standard, lower layers reverted", "it mattering where lower layers end, not how training went"),
    (r"(.*)", r"\1", "another way being as good"),
]


def entry(strategy):
    """-> (place in the order, name, what it speaks for)."""
    for place, (pattern, name, meaning) in enumerate(STRATEGIES):
        if re.fullmatch(pattern, strategy):
            return place, re.sub(f"^{pattern}$", name, strategy), meaning


def rank(strategy):
    """Sorting key; stronger decays further down."""
    numbers = re.findall(r"[\d.]+", strategy)
    return entry(strategy)[0], -float(numbers[0]) if numbers else 0.0, strategy


def label(strategy):
    return entry(strategy)[1]


TASKS = {"xvnli": "XVNLI", "xgqa": "xGQA", "xflickrco": "xFlickrCO"}  # in the order of the paper's Tables 4, 5, 6


def title(model, task):
    return f"{model.upper()} on {TASKS[task]}"


def value(results, metric, language):
    """A number of some results; language "others": the mean of all but English."""
    return evaluation.mean_zero_shot(results, metric) if language == "others" else results[language][metric]


def summaries(results, metric, languages):
    """Results of several runs -> {language: Summary}."""
    results = list(results)
    return {language: summarize(value(some, metric, language) for some in results) for language in languages}


def final(arm):
    return [run.results for run in arm.values()]


def differences(arm, baseline, metric, language):
    """arm - baseline for every seed that both ({seed: run}) have."""
    shared = [seed for seed in arm if seed in baseline]
    numbers = [[value(some[seed].results, metric, language) for seed in shared] for some in (arm, baseline)]
    return [a - b for a, b in zip(*numbers)]


# ---------------------------------------------------------------------------------------------------------------------
# Tables 1, 4, 5, 6


def tables(runs):
    """Results over all tasks, then by language for each. The paper's rows stand below ours where the data is real."""
    groups = grouped(runs)
    overview, details, notes = [], defaultdict(list), {}
    for model in ("uc2", "cclm"):
        arms = {task: groups[model, task] for task in TASKS if (model, task) in groups}
        for strategy in sorted({strategy for arm in arms.values() for strategy in arm}, key=rank):
            name = f"{model.upper()}, {label(strategy)}"
            ours, theirs = {"": name}, {"": f"{name}: paper"}
            for task in arms:
                for metric, heading in evaluation.headline(task) if strategy in arms[task] else ():
                    arm, languages = arms[task][strategy], [*data.LANGUAGES[task], "others"]
                    recall, column = ({"recall": heading}, heading) if task == "xflickrco" else ({}, TASKS[task])
                    row = summaries(final(arm), metric, languages)
                    details[task].append({"": name} | recall | row)
                    ours |= {f"{column} en": row["en"], f"{column} others": row["others"]}
                    printed = paper(model, strategy, task, metric) if is_real(arm.values()) else None
                    if printed:
                        paper_row = {language: printed.get(language) for language in languages}
                        details[task].append({"": f"{name}: paper"} | recall | paper_row)
                        mean = PAPER_TABLE_1.get((model, strategy, task, metric), printed["others"])
                        theirs |= {f"{column} en": printed["en"], f"{column} others": mean}
                        notes |= {task: FOOTNOTES[task]} if task in FOOTNOTES else {}
            overview += [ours, theirs] if len(theirs) > 1 else [ours]
    english = [run for arms in groups.values() for run in all_runs(arms)]
    title_1 = f"Table 1: English, and the mean of the other languages{world(english)}"
    result = [Table("table1", title_1, overview, list(notes.values()))]
    for number, task in enumerate(TASKS, start=4):
        some = [run for run in english if run.args.task == task]
        if some:
            name = f"Table {number}: {TASKS[task]} by language{world(some)}"
            note = [notes[task]] if task in notes else []
            result.append(Table(f"table{number}", name, details[task] + baseline_rows(task, some), note))
    return result


def baseline_rows(task, runs):
    """What is reached without fine-tuning. Nothing where the runs' data is not the same, or no longer there.

    Accuracy of answers given without looking: the test set's most frequent one, also of each question type, and those
    of a linear model of English texts; the same for every language, whose items are translations of each other.
    Retrieval: CCLM's pre-trained heads rank.
    """
    columns, folder = [*data.LANGUAGES[task], "others"], runs[0].args.data
    if any(run.args.data != folder for run in runs) or not os.path.isdir(folder):
        return []
    if task == "xflickrco":
        # the real test set takes hours
        cclm = [run for run in runs if run.args.model == "cclm" and run.args.miniature][:1]
        return [{"": "baseline: CCLM, not fine-tuned", "recall": heading}
                | {language: float(value(found, metric, language)) for language in columns}
                for found in (probe.not_fine_tuned(run.folder) for run in cclm)
                for metric, heading in evaluation.headline(task)]
    records = data.read_records(folder, task, "test")[1]
    by_type = defaultdict(Counter)
    for record in records:
        by_type[record.type][next(iter(record.answers), record.label)] += 1
    found = {"baseline: the most frequent answer": max(sum(by_type.values(), Counter()).values())}
    if task == "xgqa":
        most_frequent = sum(max(counts.values()) for counts in by_type.values())
        found["baseline: the most frequent answer of each question type"] = most_frequent
    if not is_real(runs):
        found["baseline: linear model of the words, image unseen"] = blind_model(folder, task)
    return [{"": name} | dict.fromkeys(columns, 100 * count / len(records)) for name, count in found.items()]


def blind_model(folder, task):
    """How many test texts a linear model of their words gets right: logistic regression on the training texts."""
    train, test = ([(re.findall(r"\w+", record.text.lower()), next(iter(record.answers), record.label))
                    for record in data.read_records(folder, task, split)[1]] for split in ("train", "test"))
    word_of = {word: i for i, word in enumerate(sorted({word for words, _ in train for word in words}))}
    answers = sorted({answer for _, answer in train})

    def counts(texts):
        matrix = torch.zeros(len(texts), len(word_of))
        for row, (words, _) in zip(matrix, texts):
            for word in words:
                if word in word_of:
                    row[word_of[word]] += 1
        return matrix

    inputs, targets = counts(train), torch.tensor([answers.index(answer) for _, answer in train])
    weights = torch.zeros(len(word_of), len(answers), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weights, targets) + 1e-4 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(loss)
    chosen = (counts(test) @ weights).argmax(1).tolist()
    return sum(answers[i] == answer for i, (_, answer) in zip(chosen, test))


def all_runs(arms):
    return [run for arm in arms.values() for run in arm.values()]


def is_real(runs):
    """Whether any is on the real benchmark, or at least on data that was given."""
    return not all(run.args.miniature for run in runs)


def world(runs):
    """What a table's title adds where none of its runs is on data that was given."""
    return "" if is_real(runs) else ", miniature"


def setting(arms):
    """What a picture's title adds: also the number of seeds, where all arms have the same one above 1."""
    counts = {len(arm) for arm in arms.values()}
    return world(all_runs(arms)) + (f", {max(counts)} seeds" if len(counts) == 1 and max(counts) > 1 else "")


def seeds(arms, *of):
    """What the name of an arm (or of some that share a line) adds in a picture where not all have as many seeds."""
    if len({len(arm) for arm in arms.values()}) == 1:
        return ""
    counts = [len(arms[strategy]) for strategy in of]
    low, high = min(counts), max(counts)
    return f" ({low} to {high} seeds)" if low < high else f" ({low} seed{'s' * (low > 1)})"


def y_label(task):
    return "recall@1 (%)" if task == "xflickrco" else "accuracy (%)"


# ---------------------------------------------------------------------------------------------------------------------
# Figures 2 and 3: per epoch


def curves(runs):
    """Accuracy per epoch and language; and every arm beside standard fine-tuning at equal English accuracy."""
    result = []
    for (model, task), arms in grouped(runs).items():
        curved = {strategy: arm for strategy, arm in arms.items()
                  if all(run.evaluated_by_epoch for run in arm.values())}
        without = ", ".join(label(strategy) for strategy in arms if strategy not in curved)
        notes = [f"left out, not evaluated after every epoch: {without}"] if without else []
        languages = [*data.LANGUAGES[task], "others"]
        for metric, heading in evaluation.headline(task) if curved else ():
            rows, panels = [], []
            for strategy, arm in curved.items():
                epochs = list(next(iter(arm.values())).epochs)
                here = [summaries((run.epochs[epoch] for run in arm.values()), metric, languages) for epoch in epochs]
                rows += [{"": label(strategy), "epoch": epoch} | row for epoch, row in zip(epochs, here)]
                lines = {language: (epochs, [row[language].mean for row in here]) for language in languages}
                panels.append({"title": label(strategy) + seeds(curved, strategy), "x": "epoch", "y": y_label(task),
                               "lines": lines})
            name = f"Figure 2: {title(model, task)}, {heading} after each epoch{setting(curved)}"
            result.append(Table(f"curves-{model}-{task}-{metric}", name, rows, notes, panels))
            rows = [equal_english_row(label(strategy), arm, curved["standard"], metric)
                    for strategy, arm in curved.items()
                    if strategy != "standard" and arm.keys() & curved.get("standard", {}).keys()]
            if rows:
                name = f"{title(model, task)}, {heading}: mean of the others at equal English{world(all_runs(curved))}"
                result.append(Table(f"equal-english-{model}-{task}-{metric}", name, rows, [EQUAL_ENGLISH]))
    if not result:
        raise InputError("none of these runs was evaluated after every epoch; train.py does so with --eval-every-epoch")
    return result


EQUAL_ENGLISH = ("equal English: for each seed the lower of the two arms' best English accuracies over the epochs. "
                 "Each arm's mean of the others is taken where its English first reaches this, linear between two "
                 "epochs (after the first epoch if it is there already)")


def equal_english_row(name, arm, standard, metric):
    equal = equal_english(arm, standard, metric)
    english, there, here = (summarize(numbers) for numbers in zip(*equal))
    return {"": name, "English": english, "standard there": there, "it there": here,
            "difference": t_interval([b - a for _, a, b in equal]),
            "difference after the last epoch": t_interval(differences(arm, standard, metric, "others"))}


def equal_english(arm, standard, metric):
    """-> for every seed that both have: (English, mean of the others of `standard` there, of `arm` there)."""
    result = []
    for seed in [seed for seed in arm if seed in standard]:
        pair = [[(value(results, metric, "en"), value(results, metric, "others"))
                 for results in some[seed].epochs.values()] for some in (standard, arm)]
        english = min(max(en for en, _ in curve) for curve in pair)
        result.append((english, *(at_english(curve, english) for curve in pair)))
    return result


def at_english(curve, english):
    """Mean of the others where English first reaches `english`, linear between two epochs; None if it never does.

    curve: (English, mean of the others) per epoch. If English is there after the first epoch: that epoch's.
    """
    for i, (en, others) in enumerate(curve):
        if en >= english:
            if i == 0:
                return others
            en_before, others_before = curve[i - 1]
            return others_before + (english - en_before) / (en - en_before) * (others - others_before)
    return None


def types(runs):
    """Accuracy per question type (XVNLI: label) and epoch: the mean of the other languages, and English."""
    result = []
    for (model, task), arms in grouped(runs).items():
        if task == "xflickrco":
            continue
        names = list(final(next(iter(arms.values())))[0]["en"]["by_type"])
        rows, lines = [], {name: {} for name in names}
        for strategy, arm in arms.items():
            epochs = sorted(set.intersection(*(set(run.epochs) for run in arm.values())))
            for where in ("others", "en"):
                here = [{name: summarize(of_type(run.epochs[epoch], name, where) for run in arm.values())
                         for name in names} for epoch in epochs]
                rows += [{"": label(strategy), "languages": where, "epoch": epoch} | row
                         for epoch, row in zip(epochs, here)]
                if where == "others":
                    for name in names:
                        arm_name = label(strategy) + seeds(arms, strategy)
                        lines[name][arm_name] = (epochs, [row[name].mean for row in here])
        panels = [{"title": name, "x": "epoch", "y": y_label(task), "lines": lines[name]} for name in names]
        name = f"Figure 3: {title(model, task)}, accuracy by type (drawn: mean of the others){setting(arms)}"
        result.append(Table(f"types-{model}-{task}", name, rows, [], panels))
    if not result:
        raise InputError("none of these runs is on questions that have types: give runs on xgqa or xvnli")
    return result


def of_type(results, name, where):
    """Mean over the languages whose questions have types at all."""
    types = [scores["by_type"] for language, scores in results.items() if (language == "en") == (where == "en")]
    found = [some[name]["accuracy"] for some in types if name in some]
    if not found:
        raise InputError(f"no question of type {name} in any language but English: there is nothing to average")
    return statistics.fmean(found)


# ---------------------------------------------------------------------------------------------------------------------
# Figure 4: alignment of translations


def alignment(runs, epoch=None):
    """Similarity of <s> between translations, per pair of languages; of unpaired texts; correlation with accuracy."""
    matrices, rows, panels = [], [], []
    every = {(task, model, strategy): arm for (model, task), arms in grouped(runs).items() if task != "xflickrco"
             for strategy, arm in arms.items()}
    for (task, model, strategy), arm in every.items():
        languages = data.LANGUAGES[task]
        pairs = ~np.eye(len(languages), dtype=bool)  # of different languages
        similar, baseline, correlation = zip(*(align(run, epoch) for run in arm.values()))
        name, mean = f"{title(model, task)}, {label(strategy)}", np.mean(similar, axis=0)
        matrix = [{"": language} | dict(zip(languages, map(float, row))) for language, row in zip(languages, mean)]
        matrices.append(Table(f"alignment-{model}-{task}-{strategy}",
                              f"Figure 4: {name}: similarity of translations, times 100{setting({strategy: arm})}",
                              matrix, digits=0))
        panels.append({"title": name + seeds(every, (task, model, strategy)), "labels": languages,
                       "matrix": mean.tolist()})
        known = [number for number in correlation if number is not None]
        rows.append({"": name, "with English": summarize(matrix[0, 1:].mean() for matrix in similar),
                     "all pairs": summarize(matrix[pairs].mean() for matrix in similar),
                     "unpaired": summarize(baseline),
                     "Pearson": f"{statistics.fmean(known):.2f}" if known else "undefined"})
        if model == "uc2" and is_real(arm.values()) and (task, strategy) in PAPER_ALIGNMENT:
            printed, unpaired = PAPER_ALIGNMENT[task, strategy]
            accuracy = paper(model, strategy, task, "accuracy")
            correlation = pearson(list(printed.values()), [accuracy[language] for language in printed])
            rows.append({"": f"{name}: paper", "with English": statistics.fmean(printed.values()),
                         "unpaired": float(unpaired), "Pearson": f"{correlation:.2f}"})
    if not rows:
        raise InputError("translations exist for xgqa and xvnli; none of these runs is on one of them")
    return [*matrices, Table("alignment", f"Figure 4: alignment{setting(every)}", rows, [ALIGNMENT], panels)]


ALIGNMENT = ("cosine similarity, times 100, of the last layer's state of <s> between the translations of a test item, "
             "mean over items; unpaired: 100,000 random pairs of different items in random languages; Pearson: over "
             "languages, between similarity with English and zero-shot accuracy, mean over seeds")


def align(run, epoch):
    """One run -> (similarity of all pairs of languages, of unpaired texts, correlation with accuracy).

    Correlated over the other languages: similarity with English, and accuracy; None without results of the epoch.
    """
    vectors = probe.sentence_vectors(run.folder, epoch)
    similar, results = 100 * probe.similarity(vectors), run.results if epoch is None else run.epochs.get(epoch)
    accuracies = [results[language]["accuracy"] for language in data.LANGUAGES[run.args.task][1:]] if results else []
    return similar, 100 * probe.unpaired(vectors), pearson(similar[0, 1:], accuracies) if results else None


# ---------------------------------------------------------------------------------------------------------------------
# Table 2, Figure 5 and beyond


def strategies(runs):
    """Every strategy against standard fine-tuning and against SUF; standard runs changed afterwards; drift; cost."""
    result = []
    for (model, task), arms in grouped(runs).items():
        made, details = post_hoc_arms(model, task, arms.get("standard", {}))
        result += compare_arms(model, task, arms | made) + details
        rows = []
        for strategy, arm in arms.items():
            moved = [probe.drift(run.folder) for run in arm.values()]
            rows.append({"": label(strategy)} | {part: summarize(one[part] for one in moved) for part in moved[0]})
        name = (f"{title(model, task)}: distance from the pre-trained weights, "
                f"in percent of their norm (layer 1: bottom){world(all_runs(arms))}")
        result += [Table(f"drift-{model}-{task}", name, rows), cost_table(model, task, arms)]
    return result


def compare_arms(model, task, arms):
    """Tables of every arm's numbers, with Figure 5, and of its differences to standard fine-tuning and to SUF."""
    result = []
    top = model == "cclm" and any(strategy.startswith("top") for strategy in arms)
    notes = ["top N layers only, with N as many as CCLM has cross-modal layers: the paper's 'CM only'"] if top else []
    for metric, heading in evaluation.headline(task):
        rows = {}
        for strategy, arm in arms.items():
            printed = paper(model, strategy, task, metric) if is_real(arm.values()) else None
            printed = {f"paper: {language}": printed[language] for language in ("en", "others")} if printed else {}
            rows[strategy] = {"": label(strategy)} | summaries(final(arm), metric, ("en", "others")) | printed
        name = f"Table 2 and Figure 5: {title(model, task)}, {heading}{setting(arms)}"
        panels = decay_panels({strategy: row["others"].mean for strategy, row in rows.items()}, arms, y_label(task))
        result.append(Table(f"strategies-{model}-{task}-{metric}", name, list(rows.values()), notes, panels))
        compared = [{"": f"{label(a)} - {label(b)}"} | difference_row(arms[a], arms[b], metric)
                    for b in ("standard", "suf") if b in arms for a in arms
                    if a not in ("standard", b) and arms[a].keys() & arms[b].keys()]
        if compared:
            name = f"{title(model, task)}, {heading}: differences between strategies{world(all_runs(arms))}"
            result.append(Table(f"differences-{model}-{task}-{metric}", name, compared, [DIFFERENCES]))
    return result


def decay_panels(mean, arms, y):
    """Figure 5 from the strategies' means of the others."""
    # decay with frozen embeddings, say, is not on the line
    decays = sorted(float(strategy[5:]) for strategy in mean if re.fullmatch(r"decay[\d.e-]+", strategy))
    if not decays:
        return []
    names = [f"decay{decay:g}" for decay in decays]
    lines = {f"layer-wise decay{seeds(arms, *names)}": (decays, [mean[name] for name in names])}
    lines |= {label(strategy) + seeds(arms, strategy): (decays, [mean[strategy]] * len(decays))
              for strategy in ("standard", "suf") if strategy in mean}
    return [{"title": "mean of the other languages", "x": "decay per layer", "y": y, "lines": lines}]


DIFFERENCES = ("mean over the seeds that both have, with a 95 % interval of Student's t; bootstrap: 95 % interval over "
               "test images for the first of these seeds")


def difference_row(arm, baseline, metric):
    others = differences(arm, baseline, metric, "others")
    row = {"en": t_interval(differences(arm, baseline, metric, "en")), "others": t_interval(others),
           "seeds above": f"{sum(difference > 0 for difference in others)} of {len(others)}",
           "sign test p": f"{sign_test(others):.2f}"}
    seed = next(seed for seed in arm if seed in baseline)
    a, b = baseline[seed], arm[seed]
    if a.trained and b.trained:
        row["others, one seed, bootstrap"] = Difference(others[0], *bootstrap(a, b, metric), 1, int(others[0] > 0))
    return row


def bootstrap(a, b, metric):
    """95 % interval of run b - run a on the mean of the others, over test images."""
    languages = [language for language in data.LANGUAGES[a.args.task] if language != "en"]
    outcomes = [evaluation.paired_outcomes(a.folder, b.folder, a.args, language, metric) for language in languages]
    return map(float, evaluation.paired_bootstrap(outcomes, 10000, range(len(languages))))


TOLERATED = 1.0  # points of English development accuracy that reverting layers may cost


def most_reverted(found, task):
    """How many lower layers can be reverted for at most TOLERATED points on English development data."""
    score = lambda n: statistics.fmean(found[f"dev {n}"]["en"][metric] for metric, _ in evaluation.headline(task))
    depths = [int(name.split()[1]) for name in found if name.startswith("dev ")]
    return max(n for n in depths if score(n) >= score(0) - TOLERATED)


def post_hoc_arms(model, task, standard):
    """Standard runs that kept their epochs -> ({strategy: {seed: run}}, tables with every depth and average)."""
    kept = {seed: run for seed, run in standard.items()
            if all(os.path.isfile(os.path.join(run.folder, f"epoch{n}.pt")) for n in range(1, run.recipe.epochs + 1))}
    epochs = next(iter(kept.values())).recipe.epochs if kept else 1
    if epochs == 1:
        return {}, []
    found = {seed: {"reverted 0": run.results} | probe.post_hoc(run.folder) for seed, run in kept.items()}
    chosen = {seed: most_reverted(some, task) for seed, some in found.items()}
    names = {"average2": lambda seed: "average 2"} if epochs > 2 else {}
    names |= {"average-all": lambda seed: f"average {epochs}", "reverted": lambda seed: f"reverted {chosen[seed]}"}

    arms = {strategy: {seed: replace(run, strategy=strategy, trained=False, results=found[seed][name(seed)])
                       for seed, run in kept.items()} for strategy, name in names.items()}
    layers = ", ".join(f"{n} (seed {seed})" for seed, n in chosen.items())
    note = ("in the table of strategies: as many layers as cost at most "
            f"{TOLERATED:g} point on English development data: {layers}")
    result = []
    for metric, heading in evaluation.headline(task):
        rows, depths = [], []
        for name in [name for name in next(iter(found.values())) if name.startswith(("reverted ", "average "))]:
            kind, n = name.split()
            row = summaries((some[name] for some in found.values()), metric, ("en", "others"))
            if kind == "reverted":
                depths.append((int(n), row))
                row["en, development"] = summarize(some[f"dev {n}"]["en"][metric] for some in found.values())
            what = "mean of the weights, last epochs" if kind == "average" else "lower layers reverted"
            rows.append({"": f"{what}: {n}"} | row)
        lines = {language: ([n for n, _ in depths], [row[language].mean for _, row in depths])
                 for language in ("en", "others")}
        panel = {"title": "lower layers reverted", "x": "layers", "y": y_label(task), "lines": lines}
        name = f"{title(model, task)}, {heading}: standard runs changed after training{setting({'standard': kept})}"
        result.append(Table(f"post-hoc-{model}-{task}-{metric}", name, rows, [note], [panel]))
    return arms, result


def cost_table(model, task, arms):
    """Time and memory of one run of each strategy, measured again on this machine."""
    runs = {strategy: next(iter(arm.values())) for strategy, arm in arms.items()}
    rows = {}
    for strategy, cost in zip(runs, probe.measure([(run.args, run.recipe) for run in runs.values()], rounds=5)):
        seconds, size = statistics.fmean(cost["seconds"]), cost["bytes"]
        rows[strategy] = {"": label(strategy), "ms per step": 1000 * seconds, "optimizer MB": size / 1e6}
        if "standard" in rows:  # it comes first
            rows[strategy] |= {f"{name}, % of standard": 100 * rows[strategy][name] / rows["standard"][name]
                               for name in ("ms per step", "optimizer MB")}
    note = ("fastest of several steps on one batch, without loading it; mean over epochs. Optimizer: AdamW's state "
            "after the last epoch")
    name = f"{title(model, task)}: cost of training{world(all_runs(arms))}"
    return Table(f"cost-{model}-{task}", name, list(rows.values()), [note])


# ---------------------------------------------------------------------------------------------------------------------
# Table 3: few-shot


def fewshot(runs):
    """Mean over languages before and after few-shot training, by the strategy of the English run."""
    # (model, task, shots) -> English strategy and seed -> language -> (English run, few-shot run)
    cases = defaultdict(lambda: defaultdict(dict))
    for run in (run for run in runs if run.args.few_shot):
        english, language = read_run(english_folder(run)), run.args.few_shot
        pairs = cases[(*run.pair, run.args.shots)][english.strategy, english.args.seed]
        if language in pairs:
            other = pairs[language][1].folder
            raise InputError(f"{run.folder} and {other} continue the same run in the same language")
        pairs[language] = english, run
    if not cases:
        raise InputError("none of these runs is a few-shot run; train.py: --few-shot LANG --shots N --init RUN")
    result = []
    for (model, task, shots), case in cases.items():
        languages = [language for language in data.LANGUAGES[task] if all(language in pairs for pairs in case.values())]
        if not languages:
            raise InputError(f"the few-shot runs of {model} on {task} with {shots} shots have no language in common")
        rows, trained = [], [run for pairs in case.values() for _, run in pairs.values()]
        for strategy in sorted({strategy for strategy, _ in case}, key=rank):
            by_seed = [[pairs[language] for language in languages]
                       for (name, _), pairs in case.items() if name == strategy]
            for metric, heading in evaluation.headline(task):
                recall = {"recall": heading} if task == "xflickrco" else {}
                rows.append({"": label(strategy)} | recall | few_shot_row(by_seed, metric, languages))
            if (model, task, shots) == ("uc2", "xgqa", 48) and is_real(trained) and strategy in PAPER_FEW_SHOT:
                before, after = PAPER_FEW_SHOT[strategy]
                rows.append({"": f"{label(strategy)}: paper", "zero-shot": before, "few-shot": after})
        note = f"means over {', '.join(languages)}; every language with the model trained on its own {shots} images"
        name = f"Table 3: {title(model, task)}, {shots} shots{world(trained)}"
        result.append(Table(f"fewshot-{model}-{task}-{shots}", name, rows, [note]))
    return result


def few_shot_row(by_seed, metric, languages):
    """by_seed: for each seed a pair (English run, few-shot run) per language."""
    before, after = ([[value(pair[i].results, metric, language) for pair, language in zip(pairs, languages)]
                      for pairs in by_seed] for i in (0, 1))
    return ({"zero-shot": summarize(map(statistics.fmean, before)), "few-shot": summarize(map(statistics.fmean, after))}
            | {language: summarize(numbers) for language, numbers in zip(languages, zip(*after))})


def english_folder(run):
    """Folder of the English run that a few-shot run started from: where it was, or beside the few-shot run."""
    name = os.path.basename(run.args.init.rstrip(os.sep))
    beside = os.path.join(os.path.dirname(os.path.abspath(run.folder)), name)
    for folder in (run.args.init, beside):  # a relative path may lead to another run from here
        if evaluation.has_read(run.folder, os.path.join(folder, "model.pt")):
            return folder
    raise InputError(f"{run.folder}: the English run that it started from is neither {run.args.init} nor {beside}")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


COMMANDS = {"tables": tables, "strategies": strategies, "fewshot": fewshot, "curves": curves, "types": types,
            "alignment": alignment}


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__.split("\n")[0], description=function.__doc__)
        command.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a folder that contains runs")
        command.add_argument("--out", default="report", metavar="DIR", help="for CSV and PNG files (default: report)")
        if name == "alignment":
            command.add_argument("--epoch", type=int, help="of runs with --save-epochs (default: the final weights)")
    about = "Train what is missing and write the report."
    command = commands.add_parser("reproduce", help=about,
                                  description=f"{about} Flags after -- go to every English run of train.py.")
    command.add_argument("--model", choices=["cclm", "uc2"], help="only this one (default: both)")
    command.add_argument("--task", choices=list(data.LANGUAGES), help="only this one (default: all)")
    command.add_argument("--strategies", metavar="standard,suf,...",
                         help="only these, as train.py names them; fewshot: the few-shot runs (default: all)")
    command.add_argument("--seeds", type=int, default=3, metavar="N",
                         help="seeds 0 to N - 1 of each strategy (default: 3)")
    command.add_argument("--runs", default="runs", metavar="DIR", help="where the runs are and go (default: runs)")
    command.add_argument("--report", default="report", metavar="DIR", help="where the report goes (default: report)")
    for name, what in (("data", "DIR"), ("checkpoint", "FILE"), ("tokenizer", "FILE")):
        command.add_argument(f"--{name}", metavar=what, help="as for train.py (default: the embedded miniature)")
    command.add_argument("--jobs", type=int, metavar="N",
                         help="runs at once (default: on a CPU one per core with one thread each, on a GPU one)")
    command.add_argument("--dry-run", action="store_true", help="list the runs and estimate their time; train nothing")
    for one in (parser, *commands.choices.values()):
        one.error = lambda message: parser.exit(2, f"error: {message}\n")
    return parser.parse_args(argv)


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if argv[:1] == ["reproduce"] and "--" in argv else len(argv)
    args = parse_args(argv[:end])
    try:
        if args.command == "reproduce":
            import reproduce

            sys.exit(reproduce.reproduce(args, argv[end + 1 :]))
        options = {"epoch": args.epoch} if args.command == "alignment" else {}
        for table in COMMANDS[args.command](find_runs(args.runs), **options):
            publish(table, args.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    import analysis  # and not __main__: reproduce.py imports this file under its name

    analysis.main()
