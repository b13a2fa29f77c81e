"""The report of all strategies, with every run that it needs.

    python -m tools.reproduce                  models, tasks, strategies, three seeds: miniature
    python -m tools.reproduce --dry-run        lists the runs
    python -m tools.reproduce --model cclm --task xgqa --strategies standard,suf,suf-less
    python -m tools.reproduce --model cclm --data IGLUE --checkpoint cclm_x2vlm_base.th \\
                              --tokenizer sentencepiece.bpe.model -- --precision bf16

Every run is an ordinary command of train.py or tools/few_shot.py in a folder of its own, with its
output in output.txt there. Finished runs are not repeated, interrupted ones go on. Flags after --,
and those that only train.py has, go to every run on English. The report is OUT/report.md.
"""

import contextlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import torch

import analysis
import data
import eval as evaluation
import train
from data import InputError
from tools import rivals

# train.py's flags of every strategy. Figures 2 and 3 need every epoch's results, averaging its
# weights
STRATEGIES = """\
--eval-every-epoch --save-epochs
--suf --eval-every-epoch
--suf --only less
--lp-ft
--lr-decay 0.98
--lr-decay 0.95
--lr-decay 0.88
--lr-decay 0.75
--suf --order bottom-up
--suf --order random
--suf --freeze embeddings"""
INTRODUCTION = """\
# Scheduled unfreezing

Every table is a CSV and a LaTeX file, too. Intervals cover seeds of fine-tuning, not other
pre-trained checkpoints or other data. Strategies are compared one by one, without correction for
their number, at standard fine-tuning's rates.

Where a title says "miniature", numbers are from drawn scenes, templated sentences and tiny models.
They show what the strategies do there and are no evidence about the real benchmark."""

# --------------------------------------------------------------------------------------------------
# Which runs


def plan(args, more):
    """-> {folder: command} of the runs on English, {folder: command} of the few-shot runs.

    more: train.py's flags.
    """
    english, few_shot = {}, {}
    known = []
    for model, task in product(args.model, args.task):
        lines = STRATEGIES.split("\n")
        if model == "cclm":
            # the cross-modal layers alone: of the real model, or of the miniature's
            cross_layers = 6 if "--data" in more else 2
            lines.append(f"--train-top {cross_layers}")
        for line in lines:
            flags = ["--model", model, "--task", task, *more, *line.split()]
            name = train.strategy_name(train.parse_args(flags))
            known.append(name)
            if name not in (args.strategies or known):
                continue
            for seed in range(args.seeds):
                folder = f"{args.runs}/{model}-{task}-{name}-seed{seed}"
                place = ["--seed", str(seed), "--run-dir", folder]
                english[folder] = ["-m", "train", *flags, *place]
    for name in args.strategies:
        if name not in known:
            raise InputError(f"--strategies {name}: none of {known}")
    if args.strategies:
        return english, {}
    # Table 3
    for folder in english:
        if "uc2-xgqa-standard-seed" in folder or "uc2-xgqa-suf-seed" in folder:
            for language in data.LANGUAGES["xgqa"][1:]:
                command = ["-m", "tools.few_shot", language, "--shots", "48", "--init", folder]
                few_shot[f"{folder}-{language}48"] = command
    return english, few_shot


def finished(folder):
    return os.path.isfile(f"{folder}/results.json")


# --------------------------------------------------------------------------------------------------
# Running


def run_all(commands, at_once):
    """Run what is not finished, `at_once` at a time. -> lines about runs that failed.

    Ctrl-C reaches all processes of the terminal: the runs save what they have, nothing new starts.
    """
    waiting = [folder for folder in commands if not finished(folder)]
    print(f"{len(waiting)} of {len(commands)} runs to do, {at_once} at a time", flush=True)
    environment = os.environ | {"PYTHONPATH": train.ROOT, "OMP_NUM_THREADS": "1"}
    failures = []

    def run(folder):
        data.make_folder(folder)
        output = f"{folder}/output.txt"
        command = [sys.executable, *commands[folder], "--resume"]
        with open(output, "w") as file:
            ended = subprocess.run(command, stdout=file, stderr=file, env=environment)
        said = "done"
        if ended.returncode:
            with open(output, errors="replace") as file:
                for line in file:  # the last one tells why
                    said = f"failed: {line.strip()}"
            failures.append(f"{folder}: {said}")
        print(f"{folder}: {said}", flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, waiting))  # to the end, or to the first exception
    return failures


# --------------------------------------------------------------------------------------------------
# The report


def write_report(folders, out, failures):
    """Everything that the finished runs allow, in out/report.md beside its CSV and PNG files."""
    runs = analysis.find_runs(folders)
    report = analysis.COMMANDS | {"rivals": rivals.report}
    with open(f"{out}/report.md", "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        print(INTRODUCTION)
        if failures:
            print("\n## Runs that failed\n", *failures, sep="\n- ")
        for name, make in report.items():
            print(f"\n## {name.capitalize()}")
            for table in make(runs):
                # as it looks in the terminal
                print("\n```text")
                analysis.publish(table, out)
                print("```")
                if table.panels:
                    print(f"\n![{table.title}]({table.name}.png)")


def main(argv=None):
    # train.py's flags are those that this parser does not know
    parser = evaluation.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", nargs=1, choices=["cclm", "uc2"], default=["cclm", "uc2"], help="only this one")
    add("--task", nargs=1, choices=data.LANGUAGES, default=data.LANGUAGES, help="only this one")
    add("--strategies", type=lambda text: text.split(","), default=[], metavar="A,B",
        help="only these, as train.py names them; no few-shot runs")
    add("--seeds", type=int, default=3, help="number of seeds, from 0 (default: 3)")
    add("--runs", default="runs", help="folder where runs are and go (default: runs)")
    add("--out", default="report", help="folder where the report goes (default: report)")
    jobs = 1 if torch.cuda.is_available() else os.cpu_count()
    add("--jobs", type=int, default=jobs, help="at once (default: GPU 1, else one per core)")
    add("--dry-run", action="store_true", help="list the runs, train nothing")
    args, more = parser.parse_known_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    more = [flag for flag in more if flag != "--"]
    if args.jobs > 1:
        more += ["--workers", "0"]
    english, few_shot = plan(args, more)
    folders = [*english, *few_shot]
    if args.dry_run:
        print(*folders, sep="\n")
        return
    data.make_folder(args.out)
    try:
        # few-shot runs go on from those on English
        failures = run_all(english, args.jobs) + run_all(few_shot, args.jobs)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    write_report(filter(finished, folders), args.out, failures)
    print("report:", args.out)
    sys.exit(len(failures) > 0)


if __name__ == "__main__":
    evaluation.command(main)
