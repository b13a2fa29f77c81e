"""The report of all strategies, with every run that it needs.

    python -m tools.reproduce                  models, tasks, strategies, three seeds: miniature
    python -m tools.reproduce --dry-run        the runs, and which of them are finished
    python -m tools.reproduce --model cclm --task xgqa --strategies standard,suf,suf-less
    python -m tools.reproduce --model cclm --data IGLUE --checkpoint cclm_x2vlm_base.th \\
                              --tokenizer sentencepiece.bpe.model -- --precision bf16

Every run is an ordinary command of train.py or tools/few_shot.py in a folder of its own, with its
output in output.txt there. Finished runs are not repeated, interrupted ones go on. Flags after --
go to every run on English. The report is REPORT/report.md.
"""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

import analysis
import data
import eval as evaluation
import train
from data import InputError
from miniature import world
from tools import rivals

DECAYS = ("0.98", "0.95", "0.88", "0.75")  # section 5.2
SHOTS = "48"  # section 5.4
# what a finished run must have in common with the one asked for
SETTINGS = ("limit", "epochs", "batch_size", "lr", "vision_lr", "embedding_lr", "answers")
MINIATURE = """\
All numbers are from the embedded miniature: drawn scenes, templated sentences, tiny models. They
show what the strategies do there and are no evidence about the real benchmark."""
LIMITS = """\
Intervals cover seeds of fine-tuning, not other pre-trained checkpoints or other data. Strategies
are compared one by one, without correction for their number, at standard fine-tuning's rates."""


@dataclass
class Job:
    folder: str
    command: list
    english: object = None  # few-shot: the job of the run it goes on from

    @property
    def state(self):
        for file, state in ("results.json", "finished"), ("args.json", "interrupted"):
            if os.path.isfile(os.path.join(self.folder, file)):
                return state
        return "missing"


# --------------------------------------------------------------------------------------------------
# Which runs


def strategies(base):
    """train.py's flags of every strategy for the model and task in the flags `base`."""
    args = train.parse_args(base)
    if args.data is None:
        args.data, args.checkpoint, args.tokenizer = world.prepare(args.model)
    model, _, recipe, _ = train.load_model(args, "cpu", 1)
    # Figures 2 and 3 need every epoch's results, averaging its weights
    flags = [["--eval-every-epoch", "--save-epochs"], ["--suf", "--eval-every-epoch"]]
    flags += [["--suf", "--only", "less"], ["--lp-ft"]]
    # all layers thaw within the first epoch
    records = data.read_records(args.data, args.task, "train")[1][: args.limit]
    phases = math.ceil(len(model.layers) / recipe.suf_k)
    interval = len(records) // recipe.batch_size // phases
    flags.append(["--suf", "--suf-interval", str(max(1, interval))])
    if recipe.suf_k != 1:
        flags.append(["--suf", "1"])
    flags += [["--lr-decay", decay] for decay in DECAYS]
    if args.model == "cclm":
        flags.append(["--train-top", str(model.sizes.cross_layers)])
    flags += [["--suf", "--order", order] for order in ("bottom-up", "random")]
    return [*flags, ["--suf", "--freeze", "embeddings"]]


def plan(args, more):
    """-> the report's jobs, few-shot ones last. more: further flags of train.py."""
    jobs, last, known = [], [], []
    wanted = args.strategies and args.strategies.split(",")
    for model in [args.model] if args.model else ["cclm", "uc2"]:
        for task in [args.task] if args.task else data.LANGUAGES:
            base = ["--model", model, "--task", task]
            for name in ("data", "checkpoint", "tokenizer"):
                if getattr(args, name):
                    base += [f"--{name}", getattr(args, name)]
            for flags in strategies(base + more):
                flags = base + flags + more
                name = train.strategy_name(train.parse_args(flags))
                known.append(name)
                for seed in range(args.seeds) if not wanted or name in wanted else []:
                    folder = os.path.join(args.runs, f"{model}-{task}-{name}-seed{seed}")
                    rest = ["--seed", str(seed), "--run-dir", folder]
                    english = Job(folder, [os.path.join(train.ROOT, "train.py"), *flags, *rest])
                    check_finished(english, flags)
                    jobs.append(english)
                    # Table 3
                    table_3 = (model, task) == ("uc2", "xgqa") and name in ("standard", "suf")
                    if not table_3 or wanted and "fewshot" not in wanted:
                        continue
                    for language in data.LANGUAGES[task][1:]:
                        goes_on = f"{folder}-{language}{SHOTS}"
                        command = ["-m", "tools.few_shot", language, "--shots", SHOTS]
                        command += ["--init", folder, "--seed", str(seed), "--run-dir", goes_on]
                        last.append(Job(goes_on, command, english))
    if not jobs or set(wanted or []) - {*known, "fewshot"}:
        raise InputError(f"--strategies: choose from fewshot, {', '.join(dict.fromkeys(known))}")
    return jobs + last


def check_finished(job, flags):
    """InputError where a finished run stands in the folder of another one."""
    if job.state == "finished":
        then, now = evaluation.read_run(job.folder)[0], train.parse_args(flags)
        for name in SETTINGS:
            there, wanted = getattr(then, name, None), getattr(now, name)
            if there != wanted:
                raise InputError(f"{job.folder}: a run with {name} {there}, the report's has "
                                 f"{wanted}; move it away, or choose another folder with --runs")


# --------------------------------------------------------------------------------------------------
# Running


def run_all(jobs, at_once):
    """Run what is not finished, `at_once` at a time. -> lines about runs that failed."""
    waiting = [job for job in jobs if job.state != "finished"]
    total, running, failures = len(waiting), {}, []
    print(f"{total} of {len(jobs)} runs to do, {at_once} at a time", flush=True)
    try:
        while waiting or running:
            for job in list(waiting):
                blocked = job.english in waiting or job.english in running.values()
                if len(running) < at_once and not blocked:
                    waiting.remove(job)
                    running[start(job, at_once)] = job
            time.sleep(0.1)
            for process in list(running):
                if process.poll() is None:
                    continue
                job, said = running.pop(process), "done"
                if process.returncode:
                    with open(os.path.join(job.folder, "output.txt"), errors="replace") as file:
                        said = f"failed: {file.read().strip()[-300:].splitlines()[-1]}"
                    failures.append(f"{job.folder}: {said}")
                done = total - len(waiting) - len(running)
                print(f"[{done}/{total}] {job.folder}: {said}", flush=True)
    except KeyboardInterrupt:
        print(f"\nstopping: {len(running)} run(s) save what they have", flush=True)
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            process.wait()
        raise
    return failures


def start(job, at_once):
    """A process out of reach of the terminal's Ctrl-C; several at once get one thread each."""
    environment = os.environ | {"PYTHONPATH": train.ROOT}
    command = [sys.executable, *job.command, "--resume"]
    if at_once > 1:
        environment["OMP_NUM_THREADS"] = "1"
        command += ["--workers", "0"]
    data.make_folder(job.folder)
    with open(os.path.join(job.folder, "output.txt"), "w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment,
                                start_new_session=True)


# --------------------------------------------------------------------------------------------------
# The report


def write_report(folders, out, failures):
    """Everything that the finished runs allow, in out/report.md beside its CSV and PNG files."""
    runs = analysis.find_runs(folders)
    aligned = [run for run in runs if run.strategy in ("standard", "suf")]
    sections = {
        "Results": analysis.tables(runs),
        "Strategies": analysis.strategies(runs),
        "Rivals": rivals.report(runs),
        "Per epoch": analysis.curves(runs),
        "Types of questions": analysis.types(runs),
        "Alignment": analysis.alignment(aligned),
        "Few-shot": analysis.fewshot(runs),
    }
    lines = ["# Scheduled unfreezing", "", "Every table is a CSV and a LaTeX file, too.", ""]
    lines += [MINIATURE, ""] if analysis.world(runs) else []
    lines += [LIMITS, ""]
    if failures:
        lines += ["## Runs that failed", "", *(f"- {line}" for line in failures), ""]
    for heading, tables in sections.items():
        lines += [f"## {heading}", ""]
        for table in tables:
            analysis.publish(table, out)
            lines += as_markdown(table, os.path.isfile(os.path.join(out, f"{table.name}.png")))
    lines += ["## Recipes: what is not as in the paper", ""]
    for run in runs:
        changed = data.read_json(os.path.join(run.folder, "args.json"))["not_as_in_the_paper"]
        lines.append(f"- {run.folder}: {'; '.join(changed)}")
    path = os.path.join(out, "report.md")
    data.write(path, lambda file: file.write("\n".join([*lines, ""]).encode()))
    print(f"\nreport: {path}")


def as_markdown(table, drawn):
    header, *rows = [f"| {' | '.join(row)} |" for row in table.cells()]
    lines = [f"**{table.title}**", "", header, "|---" * (header.count(" | ") + 1) + "|", *rows, ""]
    if table.notes:
        lines += [*(f"- {note}" for note in table.notes), ""]
    return [*lines, f"![{table.title}]({table.name}.png)", ""] if drawn else lines


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    parser = evaluation.Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", choices=["cclm", "uc2"], help="only this one")
    add("--task", choices=list(data.LANGUAGES), help="only this one")
    add("--strategies", metavar="A,B", help="only these, as train.py names them, or fewshot")
    add("--seeds", type=int, default=3, help="number of seeds, from 0 (default: 3)")
    add("--runs", default="runs", metavar="DIR", help="where runs are and go (default: runs)")
    add("--report", default="report", metavar="DIR", help="where the report goes (default: report)")
    add("--data", metavar="DIR", help="as for train.py (default: the miniature)")
    add("--checkpoint", metavar="FILE", help="as for train.py")
    add("--tokenizer", metavar="FILE", help="as for train.py")
    default = 1 if torch.cuda.is_available() else os.cpu_count()
    add("--jobs", type=int, default=default, help="at once (default: GPU 1, else one per core)")
    add("--dry-run", action="store_true", help="list the runs, train nothing")
    args = parser.parse_args(argv[:end])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    jobs = plan(args, argv[end + 1 :])
    if args.dry_run:
        for job in jobs:
            print(f"{job.state:12} {job.folder}")
        return
    data.make_folder(args.report)
    try:
        failures = run_all(jobs, args.jobs)
        finished = [job.folder for job in jobs if job.state == "finished"]
        if not finished:
            raise InputError(f"no run was finished: {'; '.join(failures)}")
        write_report(finished, args.report, failures)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    evaluation.command(main)
