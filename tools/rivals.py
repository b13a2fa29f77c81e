"""What the paper leaves open: strategies against each other, on paired seeds.

    python -m tools.rivals RUN... [--out DIR]

RUN: folders of runs or of several, as for analysis.py. For each model and task:

differences     of every strategy to standard fine-tuning and to SUF, seed by seed
equal English   the same where two strategies have reached the same accuracy in English
post hoc        standard runs that kept their epochs (train.py --save-epochs): weights averaged over
                the last epochs, lower layers put back to their pre-trained weights
drift           how far each layer moved
baselines       what answering without looking gives

Intervals over seeds are Student's, 95 %: they cover the chance in training. The bootstrap draws the
test set's images anew for one pair of runs: it covers the chance in the choice of test images.
"""

import math
import os
import statistics
from collections import Counter, defaultdict
from dataclasses import replace

import torch

import analysis
import data
import eval as evaluation
import train
from analysis import Table, label, numbers
from tools import few_shot
from tools.compare import DRAWS, paired_bootstrap, paired_outcomes

# --------------------------------------------------------------------------------------------------
# Statistics

# 97.5 % quantiles of Student's t with 1, 2, 3 … 30 degrees of freedom
T_QUANTILES = """
12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131
2.120 2.110 2.101 2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 2.045 2.042
"""


def t_interval(differences):
    """-> (mean, low, high): 95 % interval of Student's t for paired differences.

    One difference has no interval: low and high are "". With more than 31 it is a little too wide.
    """
    mean = statistics.fmean(differences)
    n = len(differences)
    if n == 1:
        return mean, "", ""
    quantile = float(T_QUANTILES.split()[min(n, 31) - 2])
    half = quantile * statistics.stdev(differences) / math.sqrt(n)
    return mean, mean - half, mean + half


def sign_test(differences):
    """Two-sided p of that many differences of one sign, were both equally likely; no zeros."""
    above = sum(difference > 0 for difference in differences)
    below = sum(difference < 0 for difference in differences)
    n = above + below
    as_extreme = sum(math.comb(n, k) for k in range(max(above, below), n + 1))
    return min(1.0, 2 * as_extreme / 2**n)


# --------------------------------------------------------------------------------------------------
# Differences between strategies

DIFFERENCES = (
    "mean over the seeds that both have, and its 95 % interval; one seed, images: 95 % interval of "
    "the difference on the others between the first seed's two runs, bootstrap over images"
)


def paired(arm, baseline):
    """-> ({seed: run of arm}, {seed: run of baseline}) of the seeds that both have."""
    seeds = [seed for seed in arm if seed in baseline]
    return {seed: arm[seed] for seed in seeds}, {seed: baseline[seed] for seed in seeds}


def interval_cells(name, differences):
    """Three cells of a table's row: the mean difference and its interval."""
    return dict(zip([name, f"{name} from", f"{name} to"], t_interval(differences)))


def differences(arms, metric):
    """Rows: every strategy minus standard fine-tuning, and minus SUF."""
    rows = []
    for baseline in ("standard", "suf"):
        for strategy, arm in arms.items():
            arm, other = paired(arm, arms.get(baseline, {}))
            if strategy in ("standard", baseline) or not arm:
                continue
            row = {"": f"{label(strategy)} - {label(baseline)}"}
            for language in ("en", "others"):
                pairs = zip(numbers(arm, metric, language), numbers(other, metric, language))
                found = [a - b for a, b in pairs]
                row |= interval_cells(language, found)
            row["seeds above"] = f"{sum(difference > 0 for difference in found)} of {len(found)}"
            row["sign test p"] = f"{sign_test(found):.2f}"

            # over test images, for the first seed, if both runs have predictions
            a, b = next(zip(other.values(), arm.values()))
            if b.folder:
                outcomes = []
                for language in data.LANGUAGES[a.args.task][1:]:
                    outcomes.append(paired_outcomes(a.folder, b.folder, a.args, language, metric))
                low, high = paired_bootstrap(outcomes, DRAWS, range(len(outcomes)))
                row |= {"one seed, images from": float(low), "to": float(high)}
            rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------
# At equal English

EQUAL_ENGLISH = (
    "for each seed the lower of both strategies' best English numbers over the epochs; each mean "
    "of the others is taken where its English first reaches this, linear between two epochs"
)


def at_english(curve, english):
    """Mean of the others where English first reaches `english`, linear between two epochs.

    curve: (English, mean of the others) per epoch. If English is there after the first epoch: that
    epoch's. None if it never is.
    """
    before = None
    for en, others in curve:
        if en >= english:
            if before is None:
                return others
            share = (english - before[0]) / (en - before[0])
            return before[1] + share * (others - before[1])
        before = en, others


def curve_of(run, metric):
    """(English, mean of the others) per epoch; [] for a run that was not tested after each."""
    curve = []
    if len(run.epochs) == max(run.epochs) > 1:
        for _, results in sorted(run.epochs.items()):
            others = evaluation.mean_zero_shot(results, metric)
            curve.append((results["en"][metric], others))
    return curve


def equal_english(arms, metric):
    """Rows: standard fine-tuning and another strategy, both at the same English."""
    rows = []
    for strategy, arm in arms.items():
        row = {"": label(strategy), "English": [], "standard there": [], "it there": []}
        arm, standard = paired(arm, arms.get("standard", {}))
        for seed, run in arm.items():
            a = curve_of(standard[seed], metric)
            b = curve_of(run, metric)
            if a and b and strategy != "standard":
                # the lower of the two best English numbers, which come first in max
                english = min(max(a)[0], max(b)[0])
                row["English"].append(english)
                row["standard there"].append(at_english(a, english))
                row["it there"].append(at_english(b, english))
        if row["English"]:
            pairs = zip(row["it there"], row["standard there"])
            rows.append(row | interval_cells("difference", [a - b for a, b in pairs]))
    return rows


# --------------------------------------------------------------------------------------------------
# What can be made of a finished run without training

REVERTED = "standard, lower layers reverted for 1 point in English"


@torch.no_grad()
def post_hoc(run):
    """Test other weights that a run's saved epochs give. -> {name: results by language}.

    Means of the weights after the last 2 and after all epochs; and the final weights, as many lower
    layers back at their pre-trained ones as cost at most 1 point on English development data.
    Kept in post_hoc.json of the run.
    """
    path = os.path.join(run.folder, "post_hoc.json")
    if os.path.isfile(path):
        return data.read_json(path)
    device, moved = evaluation.accelerator(), (run.args.data, run.args.tokenizer)
    model, tokenizer, labels, args, recipe = evaluation.load_run(run.folder, device, None, *moved)
    test = evaluation.load_split(args, recipe, tokenizer, labels, "test")
    args.few_shot = "en"
    dev = few_shot.development_data(args, recipe, tokenizer, labels)
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
    for n in range(1, recipe.epochs + 1):
        epoch = recipe.epochs + 1 - n
        saved, *_ = evaluation.load_run(run.folder, device, epoch, *moved)
        for mean, parameter in zip(model.parameters(), saved.parameters()):
            mean.lerp_(parameter, 1 / n)
        if n in (2, recipe.epochs):
            found[f"standard, mean of the last {n} epochs"] = score(test)
    data.write_json(path, found)
    return found


def post_hoc_arms(standard):
    """Standard runs that kept their epochs -> {strategy: {seed: run with other results}}."""
    arms = defaultdict(dict)
    for seed, run in standard.items():
        last = max(run.epochs)
        if last > 1 and os.path.isfile(os.path.join(run.folder, f"epoch{last}.pt")):
            for name, results in post_hoc(run).items():
                # no folder: there are no predictions
                arms[name][seed] = replace(run, folder="", epochs={last: results})
    return arms


# --------------------------------------------------------------------------------------------------
# Drift and baselines


@torch.no_grad()
def drift(run):
    """How far each part of a run's model is from the pre-trained one: 100 |change| / |weights|.

    -> {"layer 1" (bottom), …, "embeddings", "vision"}. Heads, partly new, are left out.
    """
    model = evaluation.load_weights(os.path.join(run.folder, "model.pt"), run.args, "cpu")
    before = train.load_model(run.args, "cpu", 1)[0]
    changed = defaultdict(float)
    size = defaultdict(float)
    for name, part in train.part_of(model).items():
        if part != "head":
            start = before.get_parameter(name)
            change = torch.dist(model.get_parameter(name), start).item()
            changed[part] = math.hypot(changed[part], change)
            size[part] = math.hypot(size[part], start.norm().item())
    return {part: 100 * changed[part] / size[part] for part in size}


def drift_rows(arms):
    rows = []
    for strategy, arm in arms.items():
        row = defaultdict(list)
        for run in arm.values():
            for part, moved in drift(run).items():
                row[part].append(moved)
        rows.append({"": label(strategy)} | row)
    return rows


def baselines(task, folder):
    """Rows: what the test set's most frequent answer gives; in xGQA also that of each type."""
    _, records = data.read_records(folder, task, "test")
    kinds = {"the most frequent answer": False}
    if task == "xgqa":
        kinds["the most frequent answer of each type of question"] = True
    rows = []
    for name, by_type in kinds.items():
        counts = defaultdict(Counter)
        for record in records:
            answer = record.label or next(iter(record.answers))
            counts[by_type and record.type][answer] += 1
        right = sum(max(answers.values()) for answers in counts.values())
        rows.append({"": name, "accuracy": 100 * right / len(records)})
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
                name = f"{about}: differences in {heading}"
                yield Table(f"differences-{files}-{metric}", name, rows, [DIFFERENCES])
            if rows := equal_english(arms, metric):
                name = f"{about}: {heading}, mean of the others at equal English"
                yield Table(f"equal-english-{files}-{metric}", name, rows, [EQUAL_ENGLISH])
        name = f"{about}: distance from the pre-trained weights in percent of their norm"
        yield Table(f"drift-{files}", name, drift_rows(arms), ["layer 1 is the bottom one"])
        if task != "xflickrco":
            [first, *_] = next(iter(arms.values())).values()
            name = f"{about}: baselines, the same in all languages"
            yield Table(f"baselines-{files}", name, baselines(task, first.args.data))


def main(argv=None):
    analysis.start(evaluation.Parser(description=__doc__.split("\n\n")[0]), argv, report)


if __name__ == "__main__":
    evaluation.command(main)
