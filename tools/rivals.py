"""What the paper leaves open: strategies against each other, on paired seeds.

    python -m tools.rivals RUN... [--out DIR]

RUN: folders of runs or of several, as for analysis.py. For each model and task:

differences     of every strategy to standard fine-tuning and to SUF, seed by seed
equal English   the same where two strategies have reached the same accuracy in English
post hoc        standard runs that kept their epochs (train.py --save-epochs): weights averaged over
                the last epochs, lower layers put back to their pre-trained weights
drift           how far each layer moved
baselines       what answering without looking gives

Intervals over seeds are Student's, 95 %: they cover the chance in training. That in the choice of
test images is covered by tools/compare.py, for two runs.
"""

import math
import os
import statistics
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector

import analysis
import data
import eval as evaluation
import train
from analysis import Table, label
from tools import few_shot

# --------------------------------------------------------------------------------------------------
# Differences between strategies

# 97.5 % quantiles of Student's t with 1, 2, 3 … 30 degrees of freedom
T_QUANTILES = """
12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131
2.120 2.110 2.101 2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 2.045 2.042
"""
NOTES = [
    "mean over the seeds that both have, and its 95 % interval",
    "at equal English: for each seed the lower of both strategies' best English numbers over the "
    "epochs; each mean of the others is taken where its English first reaches this, linear between "
    "two epochs",
]


def with_interval(name, differences):
    """Cells of a table's row: the mean of paired differences and its 95 % interval of Student's t.

    No cells without differences; one has no interval. With more than 31 it is a little too wide.
    """
    if not differences:
        return {}
    mean, n = statistics.fmean(differences), len(differences)
    cells = {name: mean}
    if n > 1:
        quantile = float(T_QUANTILES.split()[min(n, 31) - 2])
        half = quantile * statistics.stdev(differences) / math.sqrt(n)
        cells |= {f"{name} from": mean - half, f"{name} to": mean + half}
    return cells


def curve_of(run, metric):
    """(English, mean of the others) after every epoch that was tested, the last at least."""
    curve = []
    for _, results in sorted(run.epochs.items()):
        others = evaluation.mean_zero_shot(results, metric)
        curve.append((results["en"][metric], others))
    return curve


def at_english(curve, level):
    """Mean of the others where English first reaches `level`, linear between two epochs.

    If English is there after the first epoch: that epoch's.
    """
    english, others = zip(*curve)
    epoch = next(i for i, number in enumerate(english) if number >= level)
    around = slice(max(0, epoch - 1), epoch + 1)
    return float(np.interp(level, english[around], others[around]))


def compared(arm, baseline, metric):
    """Cells of a row: arm minus baseline, {seed: run} each, over the seeds that both have."""
    english, others, equal = [], [], []
    for seed in arm.keys() & baseline.keys():
        a = curve_of(arm[seed], metric)
        b = curve_of(baseline[seed], metric)
        english.append(a[-1][0] - b[-1][0])
        others.append(a[-1][1] - b[-1][1])
        # at equal English, if both were tested after every epoch
        if min(len(a), len(b)) > 1:
            # the lower of the two best English numbers, which come first in max
            level = min(max(a)[0], max(b)[0])
            equal.append(at_english(a, level) - at_english(b, level))
    cells = with_interval("en", english) | with_interval("others", others)
    return cells | with_interval("others at equal English", equal)


def differences(arms, metric):
    """Rows: every strategy minus standard fine-tuning, and minus SUF."""
    rows = []
    for baseline in ("standard", "suf"):
        for strategy, arm in arms.items():
            cells = compared(arm, arms.get(baseline, {}), metric)
            if cells and strategy not in ("standard", baseline):
                rows.append({"": f"{label(strategy)} - {label(baseline)}"} | cells)
    return rows


# --------------------------------------------------------------------------------------------------
# What can be made of a finished run without training

REVERTED = "standard, lower layers reverted for 1 point in English"


@torch.no_grad()
def post_hoc(run):
    """Test other weights that a run's saved epochs give. -> {name: results by language}.

    Means of the weights after the last 2 and after all epochs; and the final weights, as many lower
    layers back at their pre-trained ones as cost at most 1 point on English development data.
    """
    device, moved = evaluation.accelerator(), (run.args.data, run.args.tokenizer)
    model, tokenizer, labels, args, recipe = evaluation.load_run(run.folder, device, None, *moved)
    test = evaluation.load_split(args, recipe, tokenizer, labels, "test")
    dev = few_shot.development_data(args, recipe, tokenizer, labels, "en")
    metric, _ = evaluation.headline(args.task)[0]
    found = {}

    def score(split):
        return evaluation.evaluate(model, split, device, args.precision, args.workers)[0]

    # one more layer back at a time; the last that is good enough stays in `found`
    least = score(dev)["en"][metric] - 1
    before = train.load_model(args, device, len(labels))[0]
    for layer, its_start in zip(model.layers, before.layers):
        layer.load_state_dict(its_start.state_dict())
        if score(dev)["en"][metric] >= least:
            found[REVERTED] = score(test)

    # running means of the weights, from the last epoch backwards
    for n, epoch in enumerate(range(recipe.epochs, 0, -1), start=1):
        saved, *_ = evaluation.load_run(run.folder, device, epoch, *moved)
        for mean, parameter in zip(model.parameters(), saved.parameters()):
            mean.lerp_(parameter, 1 / n)
        if n in (2, recipe.epochs):
            found[f"standard, mean of the last {n} epochs"] = score(test)
    return found


def post_hoc_arms(standard):
    """Standard runs that kept their epochs -> {strategy: {seed: run with other results}}."""
    arms = defaultdict(dict)
    for seed, run in standard.items():
        if os.path.isfile(os.path.join(run.folder, "epoch2.pt")):
            for name, results in post_hoc(run).items():
                arms[name][seed] = replace(run, epochs={1: results})
    return arms


# --------------------------------------------------------------------------------------------------
# Drift and baselines


@torch.no_grad()
def drift(arms):
    """Rows: how far each part of the models is from the pre-trained one, 100 |change| / |weights|.

    Parts: "layer 1" (bottom) …, "embeddings", "vision". Heads, partly new, are left out.
    """
    rows = []
    for strategy, arm in arms.items():
        row = defaultdict(list)
        for run in arm.values():
            path = os.path.join(run.folder, "model.pt")
            model = evaluation.load_weights(path, run.args, "cpu")
            before = train.load_model(run.args, "cpu", 1)[0]
            # all parameters of a part as one vector
            names_of = defaultdict(list)
            for name, part in train.part_of(model).items():
                names_of[part].append(name)
            del names_of["head"]
            for part, names in names_of.items():
                start = parameters_to_vector(map(before.get_parameter, names))
                end = parameters_to_vector(map(model.get_parameter, names))
                distance = torch.dist(end, start) / start.norm()
                row[part].append(100 * distance.item())
        rows.append({"": label(strategy)} | row)
    return rows


def baselines(task, folder):
    """Rows: what the test set's most frequent answer gives; in xGQA also that of each type."""
    _, records = data.read_records(folder, task, "test")
    kinds = {"the most frequent answer": False}
    if task == "xgqa":
        kinds["the most frequent answer of each type of question"] = True
    rows = []
    for kind, by_type in kinds.items():
        # type of question, or False for all together -> how often each answer is right
        counts = defaultdict(Counter)
        for record in records:
            answer = record.label or next(iter(record.answers))
            counts[by_type and record.type][answer] += 1
        right = sum(max(answers.values()) for answers in counts.values())
        rows.append({"": kind, "accuracy": 100 * right / len(records)})
    return rows


# --------------------------------------------------------------------------------------------------


def report(runs):
    """All tables that these runs allow."""
    for (model, task), arms in analysis.grouped(runs).items():
        about = f"{analysis.title(model, task)}{analysis.world(runs)}"
        files = f"{model}-{task}"
        others = arms | post_hoc_arms(arms.get("standard", {}))
        for metric, heading in evaluation.headline(task):
            if rows := differences(others, metric):
                title = f"{about}: differences in {heading}"
                yield Table(f"differences-{files}-{metric}", title, rows, NOTES)
        title = f"{about}: distance from the pre-trained weights in percent of their norm"
        yield Table(f"drift-{files}", title, drift(arms), ["layer 1 is the bottom one"])
        if task != "xflickrco":
            [first, *_] = next(iter(arms.values())).values()
            title = f"{about}: baselines, the same in all languages"
            yield Table(f"baselines-{files}", title, baselines(task, first.args.data))


def main(argv=None):
    analysis.start(evaluation.Parser(description=__doc__.split("\n\n")[0]), argv, report)


if __name__ == "__main__":
    evaluation.command(main)
