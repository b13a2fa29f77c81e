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
from argparse import Namespace
from collections import Counter, defaultdict
from dataclasses import replace

import torch

import data
import eval as evaluation
import train
from analysis import TASKS, Table, find_runs, grouped, label, numbers, publish, title, world
from tools import few_shot
from tools.compare import paired_bootstrap, paired_outcomes

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
    mean, n = statistics.fmean(differences), len(differences)
    if n == 1:
        return mean, "", ""
    quantiles = [float(quantile) for quantile in T_QUANTILES.split()]
    quantile = quantiles[min(n - 1, len(quantiles)) - 1]
    half = quantile * statistics.stdev(differences) / math.sqrt(n)
    return mean, mean - half, mean + half


def sign_test(differences):
    """Two-sided p of that many differences of one sign, were both equally likely; no zeros."""
    signs = [difference > 0 for difference in differences if difference != 0]
    extreme = max(sum(signs), len(signs) - sum(signs))
    as_many = sum(math.comb(len(signs), k) for k in range(extreme, len(signs) + 1))
    return min(1.0, 2 * as_many / 2 ** len(signs))


def interval_cells(name, differences):
    """Three cells of a table's row: the mean difference and its interval."""
    return dict(zip([name, f"{name} from", f"{name} to"], t_interval(differences)))


# --------------------------------------------------------------------------------------------------
# Differences between strategies


def paired(arm, baseline):
    """The runs of the seeds that both {seed: run} have."""
    seeds = [seed for seed in arm if seed in baseline]
    return {seed: arm[seed] for seed in seeds}, {seed: baseline[seed] for seed in seeds}


def differences(arm, baseline, metric, language):
    """arm - baseline for every seed that both have."""
    a, b = (numbers(some, metric, language) for some in paired(arm, baseline))
    return [x - y for x, y in zip(a, b)]


def differences_table(model, task, arms, metric, heading):
    """Table of every strategy's difference to standard fine-tuning and to SUF."""
    rows, notes = [], [DIFFERENCES]
    for baseline in ("standard", "suf"):
        for strategy, arm in arms.items():
            shared, other = paired(arm, arms.get(baseline, {}))
            if strategy in ("standard", baseline) or not shared:
                continue
            others = differences(shared, other, metric, "others")
            row = {"": f"{label(strategy)} - {label(baseline)}"}
            row |= interval_cells("en", differences(shared, other, metric, "en"))
            row |= interval_cells("others", others)
            row["seeds above"] = f"{sum(difference > 0 for difference in others)} of {len(others)}"
            row["sign test p"] = f"{sign_test(others):.2f}"
            a, b = next(iter(other.values())), next(iter(shared.values()))
            if a.folder and b.folder:
                row["one seed, images from"], row["to"] = bootstrap(a, b, metric)
            rows.append(row)
            if (strategy, baseline) == ("suf", "standard"):
                notes.append(sentence(others))
    name = f"{title(model, task)}, {heading}: differences{world(arms[next(iter(arms))].values())}"
    return Table(f"differences-{model}-{task}-{metric}", name, rows, notes)


DIFFERENCES = (
    "mean over the seeds that both have, and its 95 % interval; one seed, images: 95 % interval of "
    "the difference on the others between the first seed's two runs, bootstrap over images"
)


def sentence(others):
    """SUF minus standard fine-tuning in words."""
    mean, low, high = t_interval(others)
    if low == "":
        return f"SUF - standard, mean of the others: {mean:+.1f} (one seed tells nothing of others)"
    found = "no difference was shown"
    if low > 0 or high < 0:
        found = "SUF is better" if mean > 0 else "SUF is worse"
    interval = f"95 % interval {low:+.1f} to {high:+.1f}, {len(others)} seeds"
    return f"mean of the others: {found}, {mean:+.1f} ({interval})"


def bootstrap(a, b, metric):
    """95 % interval of run b - run a on the mean of the others, over test images."""
    outcomes = []
    for language in data.LANGUAGES[a.args.task][1:]:
        outcomes.append(paired_outcomes(a.folder, b.folder, a.args, language, metric))
    low, high = paired_bootstrap(outcomes, 10_000, range(len(outcomes)))
    return float(low), float(high)


# --------------------------------------------------------------------------------------------------
# At equal English


def at_english(curve, english):
    """Mean of the others where English first reaches `english`, linear between two epochs.

    curve: (English, mean of the others) per epoch. If English is there after the first epoch: that
    epoch's. None if it never is.
    """
    for i, (en, others) in enumerate(curve):
        if en >= english:
            if i == 0:
                return others
            en_before, others_before = curve[i - 1]
            share = (english - en_before) / (en - en_before)
            return others_before + share * (others - others_before)
    return None


def equal_english(arm, standard, metric):
    """-> for every seed that both have: (English, mean of the others of standard, of arm)."""
    result = []
    for run, other in zip(*(some.values() for some in paired(arm, standard))):
        curves = []
        for some in (other, run):
            curve = []
            for epoch in sorted(some.epochs):
                [english] = numbers({0: some}, metric, "en", epoch)
                [others] = numbers({0: some}, metric, "others", epoch)
                curve.append((english, others))
            curves.append(curve)
        # the lower of the two best English numbers
        reached = min(max(english for english, _ in curve) for curve in curves)
        result.append((reached, *(at_english(curve, reached) for curve in curves)))
    return result


def equal_english_table(model, task, arms, metric, heading):
    rows, standard = [], arms.get("standard", {})
    for strategy, arm in arms.items():
        both = [*arm.values(), *standard.values()]
        complete = all(len(run.epochs) == max(run.epochs) > 1 for run in both)
        if strategy == "standard" or not complete or not paired(arm, standard)[0]:
            continue
        english, there, here = map(list, zip(*equal_english(arm, standard, metric)))
        row = {"": label(strategy), "English": english, "standard there": there, "it there": here}
        rows.append(row | interval_cells("difference", [b - a for a, b in zip(there, here)]))
    name = f"{title(model, task)}, {heading}: mean of the others at equal English"
    return Table(f"equal-english-{model}-{task}-{metric}", name, rows, [EQUAL_ENGLISH])


EQUAL_ENGLISH = (
    "for each seed the lower of both strategies' best English numbers over the epochs; each mean "
    "of the others is taken where its English first reaches this, linear between two epochs"
)


# --------------------------------------------------------------------------------------------------
# What can be made of a finished run without training


@torch.no_grad()
def post_hoc(run):
    """Evaluate other weights that a run's saved epochs give. -> {name: results by language}.

    "average N": mean of the weights after the last N epochs. "reverted N": the final weights, the
    lower N layers back at their pre-trained ones; "dev N": the same on English development data
    (dev 0: nothing reverted). Kept in post_hoc.json of the run: what is there is not done again.
    """
    path = os.path.join(run.folder, "post_hoc.json")
    found = data.read_json(path) if os.path.isfile(path) else {}
    if found.get("complete"):
        return found
    device, moved = evaluation.accelerator(), (run.args.data, run.args.tokenizer)
    model, tokenizer, labels, args, recipe = evaluation.load_run(run.folder, device, None, *moved)
    test = evaluation.load_split(args, recipe, tokenizer, labels, "test")
    english = Namespace(**vars(args) | {"few_shot": "en"})
    dev = few_shot.development_data(english, recipe, tokenizer, labels)

    def score(name, split):
        if name not in found:
            found[name], _ = evaluation.evaluate(model, split, device, args.precision, args.workers)
            data.write_json(path, found)

    score("dev 0", dev)
    before = train.load_model(args, device, len(labels))[0]
    for n, (layer, its_start) in enumerate(zip(model.layers, before.layers), start=1):
        layer.load_state_dict(its_start.state_dict())
        score(f"reverted {n}", test)
        score(f"dev {n}", dev)

    total = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for n in range(1, recipe.epochs + 1):
        epoch = recipe.epochs + 1 - n
        saved = evaluation.load_run(run.folder, device, epoch, *moved)[0]
        for summed, parameter, mean in zip(total, saved.parameters(), model.parameters()):
            mean.copy_(summed.add_(parameter) / n)
        if n > 1:
            score(f"average {n}", test)
    data.write_json(path, found | {"complete": True})
    return found


def most_reverted(found, task):
    """How many lower layers can be reverted for at most 1 point on English development data."""
    scores = {}
    for name, results in found.items():
        if name.startswith("dev "):
            headline = [results["en"][metric] for metric, _ in evaluation.headline(task)]
            scores[int(name[4:])] = statistics.fmean(headline)
    return max(n for n, score in scores.items() if score >= scores[0] - 1)


def post_hoc_arms(task, standard):
    """Standard runs that kept their epochs -> {strategy: {seed: run with other results}}."""
    arms = defaultdict(dict)
    for seed, run in standard.items():
        last = max(run.epochs)
        if last == 1 or not os.path.isfile(os.path.join(run.folder, f"epoch{last}.pt")):
            continue
        found = post_hoc(run)
        chosen = {"standard, mean of the last 2 epochs": "average 2"}
        chosen["standard, mean of all epochs"] = f"average {last}"
        if n := most_reverted(found, task):
            chosen["standard, lower layers reverted for 1 point in English"] = f"reverted {n}"
        for name, what in chosen.items():
            # no folder: there are no predictions
            results = found[what]
            arms[name][seed] = replace(run, folder="", results=results, epochs={last: results})
    return dict(arms)


# --------------------------------------------------------------------------------------------------
# Drift


@torch.no_grad()
def drift(run):
    """How far each part of a run's model is from the pre-trained one: 100 |change| / |weights|.

    -> {"layer 1" (bottom), …, "embeddings", "vision"}. Heads, partly new, are left out.
    """
    model = evaluation.load_weights(os.path.join(run.folder, "model.pt"), run.args, "cpu")
    before = train.load_model(run.args, "cpu", 1)[0]
    changed, size = defaultdict(float), defaultdict(float)
    for name, part in train.part_of(model).items():
        if part != "head":
            start = before.get_parameter(name)
            changed[part] += (model.get_parameter(name) - start).square().sum().item()
            size[part] += start.square().sum().item()
    return {part: 100 * math.sqrt(changed[part] / size[part]) for part in size}


def drift_table(model, task, arms):
    rows = []
    for strategy, arm in arms.items():
        row = {"": label(strategy)}
        for run in arm.values():
            for part, moved in drift(run).items():
                row.setdefault(part, []).append(moved)
        rows.append(row)
    name = f"{title(model, task)}: distance from the pre-trained weights in percent of their norm"
    return Table(f"drift-{model}-{task}", name, rows, ["layer 1 is the bottom one"])


# --------------------------------------------------------------------------------------------------
# Baselines


def baselines_table(task, folder):
    """What the test set's most frequent answer gives; in xGQA also that of each question type."""
    _, records = data.read_records(folder, task, "test")
    everything, by_type = Counter(), defaultdict(Counter)
    for record in records:
        answer = record.label or next(iter(record.answers))
        everything[answer] += 1
        by_type[record.type][answer] += 1
    rows = [{"": "the most frequent answer", "accuracy": max(everything.values())}]
    if task == "xgqa":
        right = sum(max(counts.values()) for counts in by_type.values())
        rows.append({"": "the most frequent answer of each type of question", "accuracy": right})
    for row in rows:
        row["accuracy"] *= 100 / len(records)
    return Table(f"baselines-{task}", f"{TASKS[task]}: baselines, the same in all languages", rows)


# --------------------------------------------------------------------------------------------------


def report(runs):
    """All tables that these runs allow."""
    tasks = {}
    for (model, task), arms in grouped(runs).items():
        made = post_hoc_arms(task, arms.get("standard", {}))
        tables = []
        for metric, heading in evaluation.headline(task):
            tables.append(differences_table(model, task, arms | made, metric, heading))
            tables.append(equal_english_table(model, task, arms, metric, heading))
        tables.append(drift_table(model, task, arms))
        yield from (table for table in tables if table.rows)
        tasks[task] = next(iter(arms[next(iter(arms))].values())).args.data
    for task, folder in tasks.items():
        if task != "xflickrco":
            yield baselines_table(task, folder)


def main(argv=None):
    parser = evaluation.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or of several")
    parser.add_argument("--out", default="report", metavar="DIR", help="default: report")
    parser.add_argument("--data", metavar="DIR", help="the runs' data, if it has moved")
    parser.add_argument("--tokenizer", metavar="FILE", help="their tokenizer, if it has moved")
    args = parser.parse_args(argv)
    data.make_folder(args.out)
    for table in report(find_runs(args.runs, args.data, args.tokenizer)):
        publish(table, args.out)
    print(f"\ntables (CSV, LaTeX): {args.out}")


if __name__ == "__main__":
    evaluation.command(main)
