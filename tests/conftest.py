"""Shared by all tests: the project is importable, one thread per test process, and where golden and real files are.

The tests of train.py take as long as all others together. Where both are to run, a second pytest runs them beside.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# of started processes too: tiny models gain nothing from a second thread, and runs are to be equal bit for bit
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
GOLDEN = Path(os.environ.get("GOLDEN_DIR") or ROOT / "tests" / "golden")


def pytest_addoption(parser):
    parser.addoption("--reports", help="file that gets every test's report: for the second pytest alone")


def pytest_configure(config):
    if config.getoption("reports"):
        config.pluginmanager.register(Reports(config))


class Reports:
    """Writes the report of every test to a file, one JSON line each."""

    def __init__(self, config):
        self.config, self.file = config, open(config.getoption("reports"), "w", encoding="utf-8")

    def pytest_runtest_logreport(self, report):
        line = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        print(json.dumps(line), file=self.file, flush=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    config, items = session.config, session.items
    beside = [item.nodeid for item in items if item.path.name == "test_train.py"]
    if len(beside) in (0, len(items)) or config.getoption("collectonly") or config.getoption("usepdb"):
        return (yield)
    items[:] = [item for item in items if item.path.name != "test_train.py"]
    with tempfile.TemporaryDirectory() as folder:
        reports, output = os.path.join(folder, "reports"), os.path.join(folder, "output")
        with open(output, "w") as file:
            second = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--reports", reports, *beside],
                cwd=config.rootpath, stdout=file, stderr=subprocess.STDOUT)
        try:
            result = yield
            second.wait()
        finally:
            second.kill()
        assert second.returncode in (0, 1), Path(output).read_text()  # 1: some tests failed
        for line in Path(reports).read_text().splitlines():
            report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
            config.hook.pytest_runtest_logreport(report=report)
    return result


@pytest.fixture(scope="session")
def iglue():
    """Folder with IGLUE's real annotation files, from the environment variable IGLUE_DIR."""
    folder = os.environ.get("IGLUE_DIR")
    if not folder:
        pytest.skip("set IGLUE_DIR to a folder with IGLUE's annotation files to run this test")
    return Path(folder).resolve()


@pytest.fixture
def deterministic():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder that stands for everything a user brings: data/, tokenizer.model, cclm.pt and uc2.pt.

    The data are the miniature's world, which trained tests share.
    """
    import sentencepiece

    import mini_languages
    import mini_world

    folder = tmp_path_factory.mktemp("tiny")
    mini_world.write_world(folder / "data", seed=1)
    (folder / "rules.tsv").write_text(mini_languages.normalization_rules())
    corpus = mini_world.tokenizer_corpus(3000, mini_world.WORLD_SIZES["small"], 0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=220, character_coverage=1.0,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_tsv=str(folder / "rules.tsv"), num_threads=1,
        minloglevel=2)
    save_tiny_checkpoints(folder, folder / "tokenizer.model", mini_world.FEATURE_WIDTH)
    return folder


def save_tiny_checkpoints(folder, tokenizer, feature_width, positions=66):
    """cclm.pt and uc2.pt: random weights in the official pre-training names, with a recipe of few small steps."""
    import cclm
    import data
    import uc2
    from model import file_tensors

    tokenizer = data.Tokenizer(tokenizer)
    words = tokenizer.vocabulary
    recipe = {"epochs": 2, "batch_size": 32, "lr": 1e-3, "suf_k": 1, "image_size": 32, "few_shot_epochs": 2,
              "few_shot_lrs": [1e-3, 1e-4]}
    torch.manual_seed(0)
    cclm_sizes = cclm.Sizes(32, words, 3, 2, 2, 2, 48, 48, positions, 1, 32, 2, 2, 64, 16, 32, 16, decoder_positions=40)
    uc2_sizes = uc2.Sizes(32, words, 4, 2, 48, positions, 2, feature_width, 7)
    models = {"cclm": cclm.CCLM(cclm_sizes, "pretraining"), "uc2": uc2.UC2(uc2_sizes, "pretraining")}
    for name, model in models.items():
        for parameter in model.parameters():  # larger than at initialisation: predictions that depend on the input
            parameter.data += 0.1 * torch.randn_like(parameter)
        config = model.config() | {"tokenizer_sha256": tokenizer.sha256,
                                   "recipe": dict.fromkeys(("xgqa", "xvnli", "xflickrco"), recipe)}
        torch.save({"model": file_tensors(model), "config": config}, folder / f"{name}.pt")


def train_command(tiny, model, task, run, *flags):
    """Command line of a short training run on the tiny files."""
    return [sys.executable, str(ROOT / "train.py"), "--model", model, "--task", task, "--data", str(tiny / "data"),
            "--checkpoint", str(tiny / f"{model}.pt"), "--tokenizer", str(tiny / "tokenizer.model"),
            "--run-dir", str(run), "--limit", "128", "--workers", "0", *map(str, flags)]
