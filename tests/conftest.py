"""Shared by all tests: the project is importable, one thread per test process, where golden and real
files are, tiny data and checkpoints, and train.py in this process.

The tests that train take as long as all others together. Where both are to run, a second pytest
runs them beside.
"""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# of started processes too: tiny models gain nothing from a second thread, and runs are to be equal
# bit for bit
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
BESIDE = ("test_train.py", "test_digests.py")
GOLDEN = Path(os.environ.get("GOLDEN_DIR") or ROOT / "tests" / "golden")
TOKENIZER = ROOT / "miniature" / "tokenizer.model"


def pytest_addoption(parser):
    parser.addoption("--reports", help="file for every test's report: for the second pytest alone")


def pytest_configure(config):
    if config.getoption("reports"):
        config.pluginmanager.register(Reports(config))


class Reports:
    """Writes the report of every test to a file, one JSON line each."""

    def __init__(self, config):
        self.config, self.file = config, open(config.getoption("reports"), "w", encoding="utf-8")

    def pytest_runtest_logreport(self, report):
        hook = self.config.hook
        line = hook.pytest_report_to_serializable(config=self.config, report=report)
        print(json.dumps(line), file=self.file, flush=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    config, items = session.config, session.items
    beside = [item.nodeid for item in items if item.path.name in BESIDE]
    only_listed = config.getoption("collectonly") or config.getoption("usepdb")
    if len(beside) in (0, len(items)) or only_listed:
        return (yield)
    items[:] = [item for item in items if item.path.name not in BESIDE]
    with tempfile.TemporaryDirectory() as folder:
        reports, output = os.path.join(folder, "reports"), os.path.join(folder, "output")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--reports", reports]
        with open(output, "w") as file:
            second = subprocess.Popen([*command, *beside], cwd=config.rootpath, stdout=file,
                                      stderr=subprocess.STDOUT)
        try:
            result = yield
            second.wait()
        finally:
            second.kill()
        assert second.returncode in (0, 1), Path(output).read_text()  # 1: some tests failed
        for line in Path(reports).read_text().splitlines():
            content = json.loads(line)
            report = config.hook.pytest_report_from_serializable(config=config, data=content)
            config.hook.pytest_runtest_logreport(report=report)
    return result


@pytest.fixture(scope="session")
def iglue():
    """Folder with IGLUE's real annotation files, from the environment variable IGLUE_DIR."""
    folder = os.environ.get("IGLUE_DIR")
    if not folder:
        pytest.skip("set IGLUE_DIR to a folder with IGLUE's annotation files to run this test")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder that stands for everything a user brings: data/, tokenizer.model, cclm.pt and uc2.pt.

    The data are the miniature's world without the mark that says so.
    """
    from miniature import world

    folder = tmp_path_factory.mktemp("tiny")
    shutil.copytree(world.prepare("cclm")[0], folder / "data")
    (folder / "data" / "made_by.txt").unlink()
    shutil.copy(TOKENIZER, folder)
    save_tiny_checkpoints(folder, world.FEATURE_WIDTH)
    return folder


def save_tiny_checkpoints(folder, feature_width, tokenizer=TOKENIZER):
    """cclm.pt and uc2.pt: random weights under the official names, a recipe of few small steps."""
    import cclm
    import data
    import uc2
    from model import file_tensors

    tokenizer = data.Tokenizer(str(tokenizer))
    recipe = {"epochs": 2, "batch_size": 32, "lr": 1e-3, "suf_k": 1, "image_size": 32,
              "few_shot_epochs": 2, "few_shot_lrs": (1e-3, 1e-4)}
    torch.manual_seed(0)
    cclm_sizes = cclm.Sizes(
        width=32, vocabulary=tokenizer.vocabulary, text_layers=3, cross_layers=2, text_heads=2,
        cross_heads=2, text_feed_forward=48, cross_feed_forward=48, text_positions=130, text_types=1,
        vision_width=32, vision_layers=2, vision_heads=2, vision_feed_forward=64, patch_size=16,
        image_size=32, embed_dim=16, decoder_positions=40)
    uc2_sizes = uc2.Sizes(
        width=32, vocabulary=tokenizer.vocabulary, layers=4, heads=2, feed_forward=48, positions=130,
        types=2, features=feature_width, locations=7)
    models = {"cclm": cclm.CCLM(cclm_sizes, "pretraining"), "uc2": uc2.UC2(uc2_sizes, "pretraining")}
    for name, model in models.items():
        for parameter in model.parameters():  # larger than at the start: predictions that differ
            parameter.data += 0.1 * torch.randn_like(parameter)
        recipes = dict.fromkeys(("xgqa", "xvnli", "xflickrco"), recipe)
        config = model.config() | {"tokenizer_sha256": tokenizer.sha256, "recipe": recipes}
        torch.save({"model": file_tensors(model), "config": config}, folder / f"{name}.pt")


def train_command(tiny, model, task, run, *flags):
    """train.py's flags for a short training run on the tiny files; later flags count."""
    flags = ["--model", model, "--task", task, "--data", tiny / "data", "--checkpoint",
             tiny / f"{model}.pt", "--tokenizer", tiny / "tokenizer.model", "--run-dir", run,
             "--limit", 128, "--workers", 0, *flags]
    return [str(flag) for flag in flags]


def run(flags, main=None):
    """Run train.py, or another program, in this process: an interpreter takes longer to start than
    these runs. Afterwards signals are handled as before. -> what it prints.
    """
    import train

    numbers, output = (signal.SIGINT, signal.SIGTERM), io.StringIO()
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        with contextlib.redirect_stdout(output):
            (main or train.main)([str(flag) for flag in flags])
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)
        print(output.getvalue(), end="")
    return output.getvalue()


def refused(function, *arguments, **options):
    """-> the one line of the error, or the exit status, with which a call ends."""
    with pytest.raises((ValueError, SystemExit)) as end:  # InputError is a ValueError
        function(*arguments, **options)
    error = str(end.value)
    assert "\n" not in error, error
    return error


def run_processes(*jobs):
    """Run functions at once, each (function, *arguments) in a process of its own. -> exit codes.

    A server that has imported what they need forks them: an interpreter takes seconds to start.
    """
    context = multiprocessing.get_context("forkserver")
    # torch imports torch._dynamo when something first trains: as slow as torch itself
    context.set_forkserver_preload(["torch._dynamo", *{job[0].__module__ for job in jobs}])
    processes = [context.Process(target=job[0], args=job[1:]) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        process.kill()
    return [process.exitcode for process in processes]


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


class Bomb:
    """What a pickle would open for writing."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
