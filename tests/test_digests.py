"""The miniature's results, bit for bit: what a change of the code's form must not change.

Every model, task and both arms, trained on a few hundred records by the real command line on one
thread, and the world and the tokenizer's rules that the shipped checkpoints were made with.
digests.json names the torch and the processor that its training digests belong to; on others those
tests are skipped. `python tests/test_digests.py` writes it anew.
"""

import hashlib
import json
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch
from conftest import read_json, run

import data
from miniature import languages, world

FILE = Path(__file__).with_name("digests.json")
ARMS = [(model, task, *flags) for model in ("cclm", "uc2")
        for task in ("xgqa", "xvnli", "xflickrco") for flags in ((), ("--suf",))]


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def machine():
    """What bits depend on beside the code: torch, and the processor."""
    found = ["unknown"]
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or found
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {found[0]}"


def training_digest(model, task, *flags, folder):
    """Losses and norms of every step, results and predictions of a short run."""
    size = ["--limit", 192]
    if task == "xflickrco":  # every pair is scored
        size = ["--limit", 32, "--batch-size", 16]
    run(["--model", model, "--task", task, *flags, *size, "--workers", 0, "--run-dir", folder])
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    results = read_json(folder / "results.json")["languages"]
    files = sorted((folder / "predictions").iterdir())
    predictions = {path.name: read_json(path) for path in files}
    return sha256(json.dumps([steps, results, predictions], sort_keys=True))


def world_digest():
    """Every file of the world and its path, but the mark of the code that wrote it."""
    world.prepare("cclm")
    digest = hashlib.sha256()
    for path in sorted(Path(world.WORLD).rglob("*")):
        if path.is_file() and path.name != "made_by.txt":
            digest.update(str(path.relative_to(world.WORLD)).encode() + path.read_bytes())
    return digest.hexdigest()


@pytest.mark.parametrize("arm", ARMS, ids="-".join)
def test_results_of_the_miniature_are_the_same_bits(arm, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "is_miniature", lambda folder: False)  # tested at the end only
    if machine() != read_json(FILE)["machine"]:
        pytest.skip(f"digests are of {read_json(FILE)['machine']}, this is {machine()}")
    assert training_digest(*arm, folder=tmp_path / "run") == read_json(FILE)["-".join(arm)]


def test_world_is_the_same():
    assert world_digest() == read_json(FILE)["world"]


def test_rules_of_the_tokenizer_are_the_same():
    assert sha256(languages.normalization_rules()) == read_json(FILE)["rules"]


if __name__ == "__main__":
    import tempfile

    found = {"machine": machine(), "world": world_digest(),
             "rules": sha256(languages.normalization_rules())}
    for arm in ARMS:
        with tempfile.TemporaryDirectory() as folder:
            found["-".join(arm)] = training_digest(*arm, folder=Path(folder) / "run")
    FILE.write_text(json.dumps(found, indent=1) + "\n")
