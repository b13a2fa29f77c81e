"""`python analysis.py reproduce`: from one line to report/report.md, with every run that it needs.

    python analysis.py reproduce                   both models, all three tasks, every strategy, three seeds
    python analysis.py reproduce --dry-run         the runs, which are finished, how long the others will take here
    python analysis.py reproduce --model cclm --task xgqa --strategies standard,suf
    python analysis.py reproduce --model cclm --data IGLUE --checkpoint cclm_x2vlm_base.th \\
                                 --tokenizer sentencepiece.bpe.model -- --precision bf16

Every run is an ordinary `train.py` command in a folder of its own (its output: output.txt there). Finished runs are not
repeated, interrupted ones go on. Strategies: standard, SUF, layer-wise decay (section 5.2), for CCLM the cross-modal
layers only (section 5.3); beyond the paper one layer per epoch (gradual unfreezing, where that is not the recipe's
pace), other orders of thawing, frozen embeddings; UC2 on xGQA also few-shot (section 5.4).

The sentences of the report are made from the numbers (`findings`), whatever these say.
"""

import functools
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections import defaultdict
from dataclasses import dataclass

import torch

import analysis
import cclm
import data
import eval as evaluation
import files
import mini
import probe
import processes
import recipes
from analysis import differences, entry, label, title
from files import InputError
from model import read_checkpoint
from run_folder import RECIPE_FLAGS
from tables import publish, t_interval

FILES = ("data", "checkpoint", "tokenizer")
DECAYS = ("0.98", "0.95", "0.88", "0.75")
SHOTS = 48  # section 5.4


# ---------------------------------------------------------------------------------------------------------------------
# Which runs


@dataclass
class Job:
    folder: str
    flags: list  # of train.py
    english: object = None  # few-shot: the job it goes on from

    @property
    def finished(self):
        return os.path.isfile(os.path.join(self.folder, "results.json"))

    @property
    def state(self):
        begun = os.path.isfile(os.path.join(self.folder, "args.json"))
        return "finished" if self.finished else "interrupted" if begun else "missing"


def plan(args, more):
    """-> the report's runs, few-shot runs last. args: of `reproduce`; more: further flags of train.py.

    InputError for unknown strategies.
    """
    jobs, wanted, known = [], args.strategies and args.strategies.split(","), {}
    for model in [args.model] if args.model else ["cclm", "uc2"]:
        for task in [args.task] if args.task else data.LANGUAGES:
            base = ["--model", model, "--task", task]
            base += [text for name in FILES if getattr(args, name) for text in (f"--{name}", getattr(args, name))]
            named = {}
            for flags in strategies(base + more):  # of two that `more` makes the same, the first
                named.setdefault(recipes.strategy_name(parsed(base + flags + more)), flags)
            known |= named
            for name, flags in named.items():
                few_shot = (model, task) == ("uc2", "xgqa") and name in ("standard", "suf")  # Table 3
                for seed in range(args.seeds) if not wanted or name in wanted else ():
                    folder = os.path.join(args.runs, f"{model}-{task}-{name}-seed{seed}")
                    job = Job(folder, [*base, *flags, *more, "--seed", str(seed), "--run", folder])
                    jobs += [job, *(few_shot_jobs(job, seed)
                                    if few_shot and (not wanted or "fewshot" in wanted) else [])]
    if set(wanted or ()) - {*known, "fewshot"} or not jobs:
        raise InputError(f"--strategies {args.strategies}: choose from {', '.join(known)}; "
                         "beside standard or suf also fewshot")
    return sorted(jobs, key=lambda job: job.english is not None)


def few_shot_jobs(english, seed):
    jobs = []
    for language in data.LANGUAGES["xgqa"][1:]:
        folder = f"{english.folder}-{language}{SHOTS}"
        flags = ["--few-shot", language, "--shots", str(SHOTS), "--init", english.folder, "--seed", str(seed)]
        jobs.append(Job(folder, [*flags, "--run", folder], english))
    return jobs


def strategies(base):
    """train.py's flags of every strategy for the model and task that `base` names.

    Curves need the results of every epoch, and what is changed after training (`probe.post_hoc`) the weights, too.
    """
    args = with_files(parsed(base))
    try:
        tensors, config = read_checkpoint(args.checkpoint)
        cross_layers = cclm.read_sizes(tensors, config, args.checkpoint).cross_layers if args.model == "cclm" else 0
    except ValueError as error:
        raise InputError(str(error)) from None
    flags = [["--eval-every-epoch", "--save-epochs"], ["--suf", "--eval-every-epoch"]]
    flags += [["--lr-decay", decay] for decay in DECAYS]
    flags += [["--train-top", str(cross_layers)]] if cross_layers else []
    flags += [["--suf", "1"]] if recipes.recipe_of(args, config)[0].suf_k != 1 else []
    flags += [["--suf", "--order", order] for order in ("bottom-up", "random", "fisher")]
    return [*flags, ["--suf", "--freeze", "embeddings"]]


def parsed(flags):
    """train.py's flags as it understands them; wrong ones end the program with its message."""
    return recipes.parse_args(flags, None)


def with_files(args):
    """Flags of a run with the files it will use: those given, or the miniature's, which are made here if need be."""
    if not args.data:
        args.data, args.checkpoint, args.tokenizer = mini.prepare(args.model, True)
    return args


def check_finished(job):
    """InputError if a run that is there already is not one of the report's; a line if it lacks something."""
    then, wanted = evaluation.read_run(job.folder)[0], parsed(job.flags)
    for name in ("limit", "questions_per_image", "first_image_negatives", *RECIPE_FLAGS):
        there = getattr(then, name, None)
        if there != getattr(wanted, name):
            raise InputError(f"{job.folder}: a finished run with {name} {there}, the report's has "
                             f"{getattr(wanted, name)}; move it away, or name another folder with --runs")
    if job.english:
        inputs = [os.path.join(job.english.folder, "model.pt")]
    else:
        with_files(wanted)
        inputs = [wanted.checkpoint, wanted.tokenizer, data.annotation_file(wanted.data, wanted.task, "train"),
                  data.annotation_file(wanted.data, wanted.task, "test")]
    for path in inputs:
        if not evaluation.has_read(job.folder, path):
            raise InputError(f"{job.folder}: a finished run that did not read {path} as it is now; move it away, or "
                             "name another folder with --runs")
    for name, missing in (("eval_every_epoch", "Figures 2 and 3"), ("save_epochs", "the rivals without training")):
        if getattr(wanted, name) and not getattr(then, name, False):
            print(f"note: {job.folder} was run without --{name.replace('_', '-')}: it is not in {missing}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# How long


def pace(args, recipe):
    """Seconds of (one training example, one evaluated text) in standard fine-tuning here, from a few steps and texts.

    In retrieval the unit is not a text but a scored pair of a text and an image (see `test_size`).
    """
    device = processes.start(args)
    [cost] = probe.measure([(args, recipe)])
    labels, tokenizer = probe.labels_of(args), data.Tokenizer(args.tokenizer)
    model = probe.pretrained(args, recipe).to(device)
    evaluation.introduce(model, tokenizer, labels)
    piece = Namespace(**vars(args) | {"limit": min(64, args.limit or 64)})
    piece = evaluation.load_split(piece, recipe, tokenizer, labels, "test")
    started = time.perf_counter()
    evaluation.evaluate(model, piece, device, args.precision, args.workers)
    seconds = time.perf_counter() - started
    per_example = (statistics.fmean(cost["seconds"]) + cost["loading"]) / recipe.batch_size
    return per_example, seconds / sum(test_size(args, len(examples)) for examples in piece.examples.values())


def test_size(args, texts):
    """What evaluation time grows with: texts; in retrieval pairs, of which CCLM scores 128 per text and per image."""
    if args.task != "xflickrco":
        return texts
    return texts * min(texts, 2 * 128) if args.model == "cclm" else texts * texts


@functools.cache
def record_count(folder, task, split, language="en", shots=None):
    return len(data.read_records(folder, task, split, language, shots)[1])


def seconds_of(job, args, recipe, per_example, per_text):
    """Estimate for one run; args, recipe: of English training."""

    def count(*which):
        return min(record_count(args.data, args.task, *which), args.limit or math.inf)

    if job.english:
        language = job.flags[job.flags.index("--few-shot") + 1]
        epoch = count("few-shot", language, SHOTS) * per_example + count("dev", language) * per_text
        tests = count("test", "en") + count("test", language)
        return len(recipe.few_shot_lrs) * recipe.few_shot_epochs * epoch + tests * per_text
    test = sum(test_size(args, count("test", language)) for language in data.LANGUAGES[args.task]) * per_text
    return recipe.epochs * count("train") * per_example + test * (recipe.epochs if args.eval_every_epoch else 1)


def print_plan(jobs, at_once):
    """--dry-run: every run, its state and its time, as measured on standard fine-tuning, the costliest strategy."""
    if at_once > 1:
        torch.set_num_threads(1)
    known, total = {}, 0.0  # known: (model, task) -> recipe and `pace`
    for job in jobs:
        line = f"{job.state:12}  {job.folder}"
        if not job.finished:
            args = with_files(parsed((job.english or job).flags))
            if (args.model, args.task) not in known:
                recipe = recipes.recipe_of(args, read_checkpoint(args.checkpoint)[1])[0]
                standard = dict.fromkeys(("suf", "lr_decay", "train_top", "order", "layer_order")) | {"freeze": []}
                known[args.model, args.task] = recipe, *pace(Namespace(**vars(args) | standard), recipe)
            seconds = seconds_of(job, args, *known[args.model, args.task])
            line, total = f"{line}  about {minutes(seconds)}", total + seconds
        print(line, flush=True)
    left = sum(not job.finished for job in jobs)
    print(f"{left} of {len(jobs)} runs to do, {at_once} at a time: about {minutes(total / at_once)}, "
          "and the time of the report")


def minutes(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------------------------------------------------------------
# Running


def run_all(jobs, at_once):
    """Run what is not finished, `at_once` at a time. -> [(folder, last line of its output)] of the runs that failed.

    Ctrl-C lets the runs save what they have and raises KeyboardInterrupt.
    """
    waiting, running, failures, done = [job for job in jobs if not job.finished], {}, [], 0
    total = len(waiting)
    print(f"{total} of {len(jobs)} runs to do, {at_once} at a time", flush=True)
    try:
        while waiting or running:
            unfinished = [*waiting, *running.values()]
            ready = [job for job in waiting if job.english not in unfinished]
            for job in ready[: at_once - len(running)]:
                waiting.remove(job)
                running[start(job, at_once)] = job
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                job, done, said = running.pop(process), done + 1, "done"
                if process.returncode != 0:
                    failures.append((job.folder, last_line(job)))
                    said = f"failed: {failures[-1][1]}"
                print(f"[{done}/{total}] {job.folder}: {said}", flush=True)
    except KeyboardInterrupt:
        stop(running)
        raise
    return failures


def start(job, at_once):
    """train.py in a process of its own, out of reach of the terminal's Ctrl-C; several at once get one thread each."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
    command = [sys.executable, script, *job.flags, "--resume"]
    command += ["--workers", "0"] if at_once > 1 and "--workers" not in job.flags else []
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if at_once > 1 else {})
    os.makedirs(job.folder, exist_ok=True)
    with open(os.path.join(job.folder, "output.txt"), "w", encoding="utf-8") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                                env=environment)


def stop(processes):
    """Let them save what they have and end; a second Ctrl-C ends them at once."""
    print(f"\nstopping: {len(processes)} run(s) save what they have (Ctrl-C again: they do not)",
          file=sys.stderr, flush=True)
    try:
        for process in processes:
            process.send_signal(signal.SIGINT)
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()


def last_line(job):
    """The last line of a run's output that speaks of an error, or its last line."""
    with open(os.path.join(job.folder, "output.txt"), encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in re.split(r"[\r\n]+", file.read()) if line.strip()]
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no output")


def reproduce(args, more):
    """-> exit code: 0, 1 if a run failed, 130 if it was stopped."""
    given = [name for name in FILES if getattr(args, name)]
    if given and (len(given) < 3 or not args.model):
        raise InputError("--data, --checkpoint, --tokenizer and --model go together: a checkpoint belongs to one model")
    if args.seeds < 1 or args.jobs is not None and args.jobs < 1:
        raise InputError("--seeds and --jobs must be at least 1")
    if "--dry-run" in more:
        raise InputError("--dry-run belongs before the --: after it no run would train")
    at_once = args.jobs or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        jobs = plan(args, more)
        for job in jobs:
            if job.finished:
                check_finished(job)
        if args.dry_run:
            print_plan(jobs, at_once)
            return 0
        for folder in (args.runs, args.report):
            with files.writing(folder):
                os.makedirs(folder, exist_ok=True)
        failures = run_all(jobs, at_once)
        runs = [analysis.read_run(job.folder) for job in jobs if job.finished]
        if all(run.args.few_shot for run in runs):
            raise InputError("no run was finished: " + "; ".join(f"{folder}: {line}" for folder, line in failures))
        write_report(runs, args.report, failures)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    for folder, line in failures:
        print(f"failed: {folder}: {line}", file=sys.stderr)
    return 1 if failures else 0


# ---------------------------------------------------------------------------------------------------------------------
# The report

OTHERS = "the mean of the other languages"
MINIATURE = """\
All numbers are from the embedded miniature: drawn scenes, templated sentences, tiny models. They show what the
strategies do there. They are no evidence about the real benchmark; the paper's numbers are not beside them because they
measure something else."""
LIMITS = """\
What this does not show: the intervals cover seeds of fine-tuning, not other pre-trained checkpoints or other data.
Where no difference was shown there may be one: with few seeds only large ones show. The strategies are compared one by
one, without correction for their number, and with the hyper-parameters of standard fine-tuning. \
A rival that comes as far
as SUF shows what suffices; it does not show that SUF works by the same means."""


def statement(difference, subject, where):
    """A paired difference in words: what was shown, or that nothing was."""
    if difference.low is None:
        return f"{subject} {difference.mean:+.1f} on {where} (one seed: this shows nothing about others)"
    interval = f"(95 % interval {difference.low:+.1f} to {difference.high:+.1f}, {difference.n} seeds)"
    if not difference.shown:
        return f"no difference was shown on {where}: {difference.mean:+.1f} {interval}"
    side = "above" if difference.mean > 0 else "below"
    return f"{subject} is {abs(difference.mean):.1f} points {side} on {where} {interval}"


def findings(model, task, arms):
    """Sentences made of the numbers: SUF against standard fine-tuning, then every other strategy against SUF.

    arms: {strategy: {seed: run}}.
    """
    standard, suf = arms.get("standard", {}), arms.get("suf", {})
    if not standard.keys() & suf.keys():
        return [f"{title(model, task)}: SUF and standard fine-tuning have no finished seed in common; "
                "nothing is said of a gain."]
    lines = []
    for metric, heading in evaluation.headline(task):
        gain, english = (t_interval(differences(suf, standard, metric, language)) for language in ("others", "en"))
        lines.append(f"{title(model, task)}, {heading}, SUF against standard fine-tuning: "
                     f"{statement(gain, 'SUF', OTHERS)}; {statement(english, 'SUF', 'English')}.")
        if all(run.evaluated_by_epoch for arm in (standard, suf) for run in arm.values()):
            equal = t_interval([here - there for _, there, here in analysis.equal_english(suf, standard, metric)])
            lines.append(f"At equal English accuracy (as defined below): {statement(equal, 'SUF', OTHERS)}.")
        rivals = {strategy: arm for strategy, arm in arms.items()
                  if strategy not in ("standard", "suf") and arm.keys() & suf.keys()}
        lines += explain(rivals, standard, suf, metric, gain)
    return lines


def explain(rivals, standard, suf, metric, gain):
    """Which other strategies have SUF's gain over standard fine-tuning too, as far as the seeds tell."""
    if not rivals:
        return []
    if not (gain.shown and gain.mean > 0):
        return ["No gain of SUF was shown here, so there is none to explain by other strategies; "
                "the tables have their numbers."]
    lines, verdicts = ["Which of the other strategies has SUF's gain too:"], {"as far": [], "short": [], "open": []}
    for strategy, arm in rivals.items():
        margin, english = (t_interval(differences(arm, suf, metric, language)) for language in ("others", "en"))
        own, gained = (differences({seed: one[seed] for seed in one if seed in other}, standard, metric, "others")
                       for one, other in ((arm, suf), (suf, arm)))  # on the seeds that all three have
        share = f"; it has {100 * sum(own) / sum(gained):.0f} % of SUF's gain" if sum(gained) > 0 else ""
        lines.append(f"  - {label(strategy)}, against SUF: {statement(margin, 'it', OTHERS)}; "
                     f"English {english.mean:+.1f}{share}")
        if margin.shown and margin.mean < 0:
            verdicts["short"].append(label(strategy))
        elif margin.shown or margin.low is not None and abs(margin.mean) < gain.mean / 4:
            cost = f", but at {english.mean:+.1f} in English" if english.mean <= -1 else ""
            verdicts["as far"].append(f"{label(strategy)}{cost} (this would speak for {entry(strategy)[2]})")
        else:
            verdicts["open"].append(label(strategy))
    said = {"as far": "Not below SUF (above it; or no difference shown, and less than a quarter of its gain away)",
            "short": "Below SUF", "open": "Undecided"}
    return lines + [f"{said[kind]}: {'; '.join(names) or 'none'}." for kind, names in verdicts.items()]


def write_report(runs, out, failures):
    """Everything that the runs allow, in out/report.md with its CSV and PNG files."""
    english = [run for run in runs if not run.args.few_shot]
    curved = [run for run in english if run.evaluated_by_epoch]
    parallel = [run for run in english if run.args.task != "xflickrco" and run.strategy in ("standard", "suf")]
    sections = {
        "Results": (analysis.tables, english),
        "Strategies": (analysis.strategies, english),
        "Per epoch": (analysis.curves, curved),
        "Question types": (analysis.types, [run for run in curved if run.args.task != "xflickrco"]),
        "Alignment": (analysis.alignment, parallel),
        "Few-shot": (analysis.fewshot, [run for run in runs if run.args.few_shot]),
    }
    body = []
    for heading, (function, some) in sections.items():
        body += [f"## {heading}", "", *(publish(table, out) for table in function(some))] if some else []
    said = []
    for (model, task), arms in analysis.grouped(runs).items():
        said += findings(model, task, arms | analysis.post_hoc_arms(model, task, arms.get("standard", {}))[0])
    deviations = defaultdict(dict)  # model and task -> what any of its runs had, as ordered keys
    for run in english:
        path = os.path.join(run.folder, "args.json")
        changed = files.expect(files.read_json(path), "not_as_in_the_paper", list, path)
        deviations[title(*run.pair)] |= dict.fromkeys(map(str, changed))
    lines = ["# Scheduled unfreezing: report", ""]
    lines += ["Written by `python analysis.py reproduce`. Every table is also a CSV file in this folder.", ""]
    lines += [MINIATURE, ""] if english[0].args.miniature else []
    lines += ["## What was found", "", *(line if line.startswith("  - ") else f"- {line}" for line in said), "",
              LIMITS, ""]
    if failures:
        lines += ["## Runs that failed, and are missing below", "",
                  *(f"- {folder}: {line}" for folder, line in failures), ""]
    lines += [*body, "## Recipe", ""]
    lines += [f"- {name}, not as in the paper: {'; '.join(changed) or 'nothing'}"
              for name, changed in deviations.items()]
    print("\n" + "\n".join(said))
    path = os.path.join(out, "report.md")
    files.write(path, lambda file: file.write("\n".join([*lines, ""]).encode()))
    print(f"\nreport: {path}")
