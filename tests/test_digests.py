"""The miniature's results, bit for bit: what a change of the code's form must not change.

Every model, task and both arms, trained on a few hundred records by the real command line on one thread, and the world
and the tokenizer's rules that the shipped checkpoints were made with. digests.json names the torch and the processor
that its training digests belong to; on others those tests are skipped. `python tests/test_digests.py` writes it anew.
"""

import hashlib
import json
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch
from conftest import ROOT  # noqa: F401  (puts the project on the path and sets one thread)

import data
import train
from miniature import languages, world

FILE = Path(__file__).with_name("digests.json")
ARMS = [(model, task, *flags) for model in ("cclm", "uc2") for task in ("xgqa", "xvnli", "xflickrco")
        for flags in ((), ("--suf",))]


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def machine():
    """What bits depend on beside the code: torch, and the processor."""
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] \
        if Path("/proc/cpuinfo").exists() else []
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {names[0] if names else 'unknown'}"


def training_digest(model, task, *flags, folder):
    """Losses and norms of every step, results and predictions of a short run."""
    size = ["--limit", "32", "--batch-size", "16"] if task == "xflickrco" else ["--limit", "192"]  # every pair is scored
    train.main(["--model", model, "--task", task, *flags, *size, "--workers", "0", "--run-dir", str(folder)])
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    results = json.loads((folder / "results.json").read_text())["languages"]
    predictions = {path.name: json.loads(path.read_text()) for path in sorted((folder / "predictions").iterdir())}
    return sha256(json.dumps([steps, results, predictions], sort_keys=True))


def world_digest():
    """Every file of the world and its path, but the mark of the code that wrote it."""
    world.prepare("cclm")
    digest = hashlib.sha256()
    for path in sorted(Path(world.WORLD).rglob("*")):
        if path.is_file() and path.name != "made_by.txt":
            digest.update(str(path.relative_to(world.WORLD)).encode() + path.read_bytes())
    return digest.hexdigest()


def stored():
    return json.loads(FILE.read_text())


@pytest.mark.parametrize("arm", ARMS, ids="-".join)
def test_results_of_the_miniature_are_the_same_bits(arm, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "is_miniature", lambda folder: False)  # tested at the end only
    if machine() != stored()["machine"]:
        pytest.skip(f"digests are of {stored()['machine']}, this is {machine()}")
    assert training_digest(*arm, folder=tmp_path / "run") == stored()["-".join(arm)]


def test_world_is_the_same():
    assert world_digest() == stored()["world"]


def test_rules_of_the_tokenizer_are_the_same():
    assert sha256(languages.normalization_rules()) == stored()["rules"]


if __name__ == "__main__":
    import tempfile

    found = {"machine": machine(), "world": world_digest(), "rules": sha256(languages.normalization_rules())}
    for arm in ARMS:
        with tempfile.TemporaryDirectory() as folder:
            found["-".join(arm)] = training_digest(*arm, folder=Path(folder) / "run")
    FILE.write_text(json.dumps(found, indent=1) + "\n")
