"""The report of all strategies, with every run that it needs.

    python -m tools.reproduce                  models, tasks, strategies, three seeds: miniature
    python -m tools.reproduce --dry-run        the runs, and which of them are finished
    python -m tools.reproduce --model cclm --task xgqa --strategies standard,suf,suf-less
    python -m tools.reproduce --model cclm --data IGLUE --checkpoint cclm_x2vlm_base.th \\
                              --tokenizer sentencepiece.bpe.model -- --precision bf16

Every run is an ordinary command of train.py or tools/few_shot.py in a folder of its own, with its
output in output.txt there. Finished runs are not repeated, interrupted ones go on. Flags after --,
and those that only train.py has, go to every run on English. The report is OUT/report.md.
"""

import itertools
import math
import os
import signal
import subprocess
import sys
import time

import torch

import analysis
import data
import eval as evaluation
import train
from data import InputError
from miniature import world
from tools import rivals

MINIATURE = """\
All numbers are from the embedded miniature: drawn scenes, templated sentences, tiny models. They
show what the strategies do there and are no evidence about the real benchmark."""
LIMITS = """\
Intervals cover seeds of fine-tuning, not other pre-trained checkpoints or other data. Strategies
are compared one by one, without correction for their number, at standard fine-tuning's rates."""
# what a finished run must have in common with the one asked for
SETTINGS = ("limit", "epochs", "batch_size", "lr", "vision_lr", "embedding_lr", "answers")

# --------------------------------------------------------------------------------------------------
# Which runs


def strategies(base):
    """train.py's flags of every strategy for the model and task in the flags `base`."""
    args = train.parse_args(base)
    if args.data is None:
        args.data, args.checkpoint, args.tokenizer = world.prepare(args.model)
    model, _, recipe, _ = train.load_model(args, "cpu", 1)
    # by steps: all layers thaw within the first epoch
    _, records = data.read_records(args.data, args.task, "train")
    steps = len(records[: args.limit]) // recipe.batch_size
    interval = max(1, steps // math.ceil(len(model.layers) / recipe.suf_k))
    # Figures 2 and 3 need every epoch's results, averaging its weights
    lines = f"""
--eval-every-epoch --save-epochs
--suf --eval-every-epoch
--suf --only less
--lp-ft
--suf --suf-interval {interval}
--lr-decay 0.98
--lr-decay 0.95
--lr-decay 0.88
--lr-decay 0.75
--suf --order bottom-up
--suf --order random
--suf --freeze embeddings"""
    if recipe.suf_k != 1:
        lines += "\n--suf 1"
    if args.model == "cclm":
        lines += f"\n--train-top {model.sizes.cross_layers}"
    return [line.split() for line in lines.strip().splitlines()]


def plan(args, more):
    """-> ({folder: command} of the runs on English, of the few-shot runs). more: train.py's flags.
    """
    english = {}
    few_shot = {}
    known = ["fewshot"]
    for model, task in itertools.product(args.model, args.task):
        base = ["--model", model, "--task", task, *more]
        for flags in strategies(base):
            asked = train.parse_args(base + flags)
            name = train.strategy_name(asked)
            known.append(name)
            if args.strategies and name not in args.strategies:
                continue
            for seed in map(str, range(args.seeds)):
                folder = os.path.join(args.runs, f"{model}-{task}-{name}-seed{seed}")
                place = ["--seed", seed, "--run-dir", folder]
                english[folder] = [os.path.join(train.ROOT, "train.py"), *base, *flags, *place]
                if finished(folder):
                    check_same(folder, asked)
                # Table 3
                goes_on = (model, task) == ("uc2", "xgqa") and name in ("standard", "suf")
                if goes_on and "fewshot" in (args.strategies or known):
                    for language in data.LANGUAGES[task][1:]:
                        place = ["--seed", seed, "--run-dir", f"{folder}-{language}48"]
                        command = ["-m", "tools.few_shot", language, "--shots", "48"]
                        few_shot[place[-1]] = [*command, "--init", folder, *place]
    for name in args.strategies:
        if name not in known:
            raise InputError(f"--strategies {name}: choose from {', '.join(known)}")
    return english, few_shot


def finished(folder):
    return os.path.isfile(os.path.join(folder, "results.json"))


def check_same(folder, asked):
    """InputError where a finished run is not the one asked for."""
    then, _ = evaluation.read_run(folder)
    for name in SETTINGS:
        if vars(then).get(name) != getattr(asked, name):
            raise InputError(f"{folder}: a run with another {name} than the report's; move it "
                             "away, or choose another folder with --runs")


# --------------------------------------------------------------------------------------------------
# Running


def run_all(commands, at_once):
    """Run what is not finished, `at_once` at a time. -> lines about runs that failed."""
    waiting = [folder for folder in commands if not finished(folder)]
    print(f"{len(waiting)} of {len(commands)} runs to do, {at_once} at a time", flush=True)
    environment = os.environ | {"PYTHONPATH": train.ROOT}
    more = ["--resume"]
    if at_once > 1:
        environment["OMP_NUM_THREADS"] = "1"
        more += ["--workers", "0"]
    running = {}
    failures = []
    try:
        while waiting or running:
            if waiting and len(running) < at_once:
                folder = waiting.pop(0)
                data.make_folder(folder)
                with open(os.path.join(folder, "output.txt"), "w") as file:
                    # in a session of its own: out of reach of the terminal's Ctrl-C
                    running[folder] = subprocess.Popen(
                        [sys.executable, *commands[folder], *more], stdout=file, stderr=file,
                        env=environment, start_new_session=True)
            time.sleep(0.1)
            for folder, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[folder]
                said = "done"
                if process.returncode:
                    with open(os.path.join(folder, "output.txt"), errors="replace") as file:
                        for line in file:  # the last one tells
                            said = f"failed: {line.strip()}"
                    failures.append(f"{folder}: {said}")
                print(f"{folder}: {said} ({len(waiting) + len(running)} to go)", flush=True)
    except KeyboardInterrupt:
        print(f"\nstopping: {len(running)} run(s) save what they have", flush=True)
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for process in running.values():
            process.wait()
        raise
    return failures


# --------------------------------------------------------------------------------------------------
# The report


def write_report(folders, out, failures):
    """Everything that the finished runs allow, in out/report.md beside its CSV and PNG files."""
    runs = analysis.find_runs(folders)
    # alignment takes long: only the two strategies that the paper shows
    aligned = [run for run in runs if run.strategy in ("standard", "suf")]
    report = analysis.COMMANDS | {"rivals": rivals.report}
    report["alignment"] = lambda _: analysis.alignment(aligned)
    text = f"# Scheduled unfreezing\n\nEvery table is a CSV and a LaTeX file, too.\n\n{LIMITS}\n"
    if analysis.world(runs):
        text += f"\n{MINIATURE}\n"
    if failures:
        text += "\n## Runs that failed\n\n- " + "\n- ".join(failures) + "\n"
    for name, make in report.items():
        text += f"\n## {name.capitalize()}\n"
        for table in make(runs):
            analysis.publish(table, out)
            header, *rows = table.cells()
            text += f"\n**{table.title}**\n\n"
            for row in (header, ["---"] * len(header), *rows):
                text += f"| {' | '.join(row)} |\n"
            for note in table.notes:
                text += f"\n* {note}\n"
            if os.path.isfile(os.path.join(out, f"{table.name}.png")):
                text += f"\n![{table.title}]({table.name}.png)\n"
    with open(os.path.join(out, "report.md"), "w", encoding="utf-8") as file:
        file.write(text)
    print(f"\nreport: {file.name}")


def main(argv=None):
    # train.py's flags are those that this parser does not know
    parser = evaluation.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                               epilog="All other flags go to train.py: --data, --limit …")
    add = parser.add_argument
    add("--model", nargs=1, choices=["cclm", "uc2"], default=["cclm", "uc2"], help="only this one")
    add("--task", nargs=1, choices=data.LANGUAGES, default=data.LANGUAGES, help="only this one")
    add("--strategies", type=lambda text: text.split(","), default=[], metavar="A,B",
        help="only these, as train.py names them, or fewshot")
    add("--seeds", type=int, default=3, help="number of seeds, from 0 (default: 3)")
    add("--runs", default="runs", metavar="DIR", help="where runs are and go (default: runs)")
    add("--out", default="report", metavar="DIR", help="where the report goes (default: report)")
    jobs = 1 if torch.cuda.is_available() else os.cpu_count()
    add("--jobs", type=int, default=jobs, help="at once (default: GPU 1, else one per core)")
    add("--dry-run", action="store_true", help="list the runs, train nothing")
    args, more = parser.parse_known_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    english, few_shot = plan(args, [flag for flag in more if flag != "--"])
    folders = [*english, *few_shot]
    if args.dry_run:
        for folder in folders:
            print("finished" if finished(folder) else "to do   ", folder)
        return
    data.make_folder(args.out)
    try:
        # few-shot runs go on from those on English
        failures = run_all(english, args.jobs) + run_all(few_shot, args.jobs)
        write_report(filter(finished, folders), args.out, failures)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    evaluation.command(main)
