"""The embedded miniature as a user meets it: shipped files, the world on disk, every pair, --build, --show."""

import dataclasses
import errno
import hashlib
import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
import files
import mini
import mini_pretrain
import mini_world
import train
from model import read_checkpoint

SHIPPED = ROOT / "miniature"


@pytest.mark.parametrize("model", ["cclm", "uc2"])
def test_shipped_files_are_small_and_belong_together(model):
    tensors, config = read_checkpoint(SHIPPED / f"{model}.pt")
    assert (SHIPPED / f"{model}.pt").stat().st_size <= 1_000_000
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert config["tokenizer_sha256"] == hashlib.sha256((SHIPPED / "tokenizer.model").read_bytes()).hexdigest()
    assert config["pretraining"] == {"size": "small", "seed": 0, "steps": mini_pretrain.PRETRAINING["small"].steps}
    assert config["recipe"] == {task: mini.recipe(model, "small") for task in data.LANGUAGES}


def test_the_tokenizer_reads_every_script_and_is_rebuilt_bit_for_bit(tmp_path):
    tokenizer = data.Tokenizer(str(SHIPPED / "tokenizer.model"))
    world, _, _ = mini.prepare("cclm", True)
    for task, languages in data.LANGUAGES.items():
        for language in languages:
            rows = tokenizer([record.text for record in data.read_records(world, task, "test", language)[1]])
            assert data.UNK not in set(rows.values.tolist()), language
    mini.train_tokenizer(tmp_path / "tokenizer.model", "small")
    assert (tmp_path / "tokenizer.model").read_bytes() == (SHIPPED / "tokenizer.model").read_bytes()


def test_check_finds_all_six_pairs_possible(capsys):
    world, _, _ = mini.prepare("uc2", True)
    with pytest.raises(SystemExit) as end:
        data.main(["--check", world])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "error" not in printed and "missing" not in printed
    assert "possible: cclm xgqa, uc2 xgqa, cclm xvnli, uc2 xvnli, cclm xflickrco, uc2 xflickrco" in printed


def test_the_first_command_on_a_few_examples(tmp_path):
    """In a new process and another folder, as a user runs it."""
    command = [sys.executable, ROOT / "train.py", "--model", "cclm", "--task", "xgqa", "--suf", "--limit", "128"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    results = json.loads((tmp_path / "runs/cclm-xgqa-suf-seed0/results.json").read_text())
    assert set(results["languages"]) == {"en", "de", "pt", "ru", "id", "zh", "ko", "bn"}
    assert set(results["languages"]["de"]["by_type"]) == {"verify", "query", "choose", "logical"}
    assert "mean of 7 others" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("to compare: python train.py --model cclm --task xgqa --limit 128")


@pytest.mark.parametrize("strategy", [[], ["--suf"]], ids=["standard", "suf"])
@pytest.mark.parametrize("task", ["xgqa", "xvnli", "xflickrco"])
@pytest.mark.parametrize("model", ["cclm", "uc2"])
def test_every_pair_trains_and_evaluates(model, task, strategy, tmp_path):
    run = tmp_path / "run"
    train.main(["--model", model, "--task", task, *strategy, "--limit", "16", "--batch-size", "16", "--epochs", "2",
                "--workers", "0", "--run", str(run)])
    results = json.loads((run / "results.json").read_text())
    assert list(results["languages"]) == list(data.LANGUAGES[task])
    assert {path.stem for path in (run / "predictions").iterdir()} == set(data.LANGUAGES[task])
    means = results["mean_zero_shot"]
    assert all(0 <= mean <= 100 for mean in (means.values() if isinstance(means, dict) else [means]))


@pytest.fixture
def little(monkeypatch):
    """Pre-training of a few steps on a few sentences, of the same models."""
    small = dataclasses.replace(mini_pretrain.PRETRAINING["small"], scenes=200, sentences=400, steps=6, phrase_steps=3,
                                vision_steps=2)
    monkeypatch.setitem(mini_pretrain.PRETRAINING, "small", small)


@pytest.mark.parametrize("model", ["cclm", "uc2"])
def test_build_gives_the_same_checkpoint_twice_and_it_trains(model, little, tmp_path, capsys):
    for folder in ("one", "two"):
        mini.main(["--build", "--model", model, "--out", str(tmp_path / folder)])
    assert "--checkpoint" in capsys.readouterr().out  # the command that uses it
    built, again, shipped = (read_checkpoint(folder / f"{model}.pt")[0]
                             for folder in (tmp_path / "one", tmp_path / "two", SHIPPED))
    assert ({name: tensor.shape for name, tensor in built.items()}
            == {name: tensor.shape for name, tensor in shipped.items()})
    assert all(torch.equal(tensor, again[name]) for name, tensor in built.items())
    tokenizer = data.Tokenizer(str(SHIPPED / "tokenizer.model"))
    ours, other = (mini_pretrain.pretrain(model, "small", tokenizer, seed, 6)[0].state_dict() for seed in (0, 1))
    assert not all(torch.equal(tensor, other[name]) for name, tensor in ours.items())
    train.main(["--model", model, "--task", "xvnli", "--data", mini.WORLD,
                "--checkpoint", str(tmp_path / "one" / f"{model}.pt"),
                "--tokenizer", str(tmp_path / "one" / "tokenizer.model"), "--run", str(tmp_path / "run"), "--dry-run"])


@pytest.mark.parametrize("model, size, phase", [("cclm", "medium", "top 2 of 9"), ("uc2", "medium", "top 2 of 8")])
def test_larger_worlds_are_built_and_trained_on(model, size, phase, tmp_path, capsys, monkeypatch):
    """With few scenes and sentences; images, vocabulary and models as large as they are. SUF's phases as in the paper.
    """
    few = {"scenes": 200, "sentences": 400, "steps": 4, "phrase_steps": 2, "vision_steps": 1, "batch_size": 8}
    monkeypatch.setitem(mini_pretrain.PRETRAINING, size, dataclasses.replace(mini_pretrain.PRETRAINING[size], **few))
    images = {name: 50 for name in ("gqa_train", "gqa_valid", "gqa_dev", "gqa_test", "xvnli_train", "xvnli_dev",
                                    "xvnli_test", "flickr_train", "flickr_valid", "xflickrco_test")}
    monkeypatch.setitem(mini_world.WORLD_SIZES, size, dataclasses.replace(mini_world.WORLD_SIZES[size], **images))
    mini.main(["--build", "--model", model, "--size", size, "--out", str(tmp_path / "a folder")])
    command = shlex.split(capsys.readouterr().out.split("next: python train.py ")[1])
    train.main([*command, "--limit", "32", "--batch-size", "32", "--workers", "0", "--run", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert f"epoch 1: the {phase} layers train" in printed and "mean of 7 others" in printed


@pytest.fixture
def few(monkeypatch):
    """The small world with few images."""
    few = dataclasses.replace(mini_world.WORLD_SIZES["small"], gqa_train=20, gqa_test=10, xvnli_train=10, xvnli_test=10,
                              flickr_train=30, flickr_valid=10, xflickrco_test=10)
    monkeypatch.setitem(mini_world.WORLD_SIZES, "small", few)


def test_a_world_is_written_once_and_nothing_else_is_overwritten(few, tmp_path, capsys):
    world = tmp_path / "world"
    mini.write_world(str(world), "small")
    label_map = world / "gqa/annotations/trainval_ans2label.json"
    written = label_map.stat().st_mtime_ns
    mini.write_world(str(world), "small")
    assert label_map.stat().st_mtime_ns == written
    (world / "made_by.txt").write_text("another version\n")
    mini.write_world(str(world), "small")
    assert label_map.stat().st_mtime_ns > written and "writing it anew" in capsys.readouterr().out
    (world / "made_by.txt").unlink()
    with pytest.raises(files.InputError, match="not a world of the miniature"):
        mini.write_world(str(world), "small")
    assert label_map.exists() and [path.name for path in tmp_path.iterdir()] == ["world"]


def test_a_damaged_mark_is_another_version(few, tmp_path, capsys):
    (tmp_path / "world").mkdir()
    (tmp_path / "world/made_by.txt").write_bytes(b"\xff\xfe")
    mini.write_world(str(tmp_path / "world"), "small")
    assert "writing it anew" in capsys.readouterr().out and (tmp_path / "world/gqa").exists()


@pytest.mark.parametrize("before", ["nothing", "another version"])
def test_two_first_runs_at_once(before, few, tmp_path, monkeypatch):
    """The slower one accepts what the faster one has written meanwhile."""
    world, write = tmp_path / "world", mini_world.write_world
    if before == "another version":
        world.mkdir()
        (world / "made_by.txt").write_text("another version\n")

    def write_slowly(folder, *options, **more):
        monkeypatch.setattr(mini_world, "write_world", write)
        mini.write_world(str(world), "small")  # the other process, from its beginning to its end
        write(folder, *options, **more)

    monkeypatch.setattr(mini_world, "write_world", write_slowly)
    mini.write_world(str(world), "small")
    assert (world / "made_by.txt").exists() and [path.name for path in tmp_path.iterdir()] == ["world"]

    def write_over(folder, *options, **more):
        (tmp_path / "other").mkdir()  # which is no world
        (tmp_path / "other/mine").touch()
        write(folder, *options, **more)

    monkeypatch.setattr(mini_world, "write_world", write_over)
    with pytest.raises(files.InputError, match="cannot write the miniature's world there"):
        mini.write_world(str(tmp_path / "other"), "small")
    assert (tmp_path / "other/mine").exists()


def test_what_a_killed_run_left_is_in_nobodys_way(few, tmp_path):
    """Not even of a process with the same number, as the first one of a container always is."""
    for left in (f"world.{os.getpid()}", f"world.{os.getpid()}.partial-{os.getpid()}"):
        (tmp_path / left / "gqa").mkdir(parents=True)
    mini.write_world(str(tmp_path / "world"), "small")
    assert (tmp_path / "world/made_by.txt").exists()


def test_an_old_world_that_cannot_be_replaced(few, tmp_path, monkeypatch):
    """Of a folder that may only be read."""
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "world").mkdir()
    (tmp_path / "world/made_by.txt").write_text("another version\n")
    monkeypatch.setattr(mini.os, "rename", refuse)
    with pytest.raises(files.InputError, match="world: cannot write the miniature's world there .Permission denied"):
        mini.write_world(str(tmp_path / "world"), "small")


@pytest.mark.parametrize("flags, expected", [
    (["--build", "--steps", "-1"], "--steps and --seed must not be negative"),
    (["--build", "--seed", "-1"], "--steps and --seed must not be negative"),
    (["--build", "--seed", str(2**63)], "--seed must be less than"),
    (["--build", "--size", "medium"], "say --out DIR"),
    (["--show", "runs/one"], "--show takes two runs"),
    ([], "one of the arguments --build --show is required")])
def test_bad_flags_get_one_line_before_anything_is_written(flags, expected, monkeypatch, capsys):
    monkeypatch.setattr(mini, "build", None)
    with pytest.raises(SystemExit) as end:
        mini.main(flags)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and expected in error


def test_contact_sheet(tmp_path, capsys):
    runs = [tmp_path / "standard", tmp_path / "suf"]
    for run, strategy in zip(runs, ([], ["--suf"])):
        train.main(["--model", "uc2", "--task", "xgqa", *strategy, "--limit", "200", "--epochs", "1", "--workers", "0",
                    "--run", str(run)])
    mini.main(["--show", *map(str, runs), "--out", str(tmp_path / "sheet.png")])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 1000 and len(sheet.getcolors(1 << 24)) > 100
    with pytest.raises(SystemExit) as end:
        mini.main(["--show", str(runs[0]), str(tmp_path / "nowhere"), "--out", str(tmp_path / "other.png")])
    error = capsys.readouterr().err
    assert "nowhere: no such run; --show needs two of them: python train.py" in error
    assert end.value.code == 2 and not (tmp_path / "other.png").exists()

    stored = json.loads((runs[1] / "args.json").read_text())
    [korean] = [path for path in stored["fingerprints"] if path.endswith("/ko/test.json")]
    for other in ({"fingerprints": stored["fingerprints"] | {korean: "0"}},
                  {"args": stored["args"] | {"task": "xvnli"}}):
        (runs[1] / "args.json").write_text(json.dumps(stored | other))
        with pytest.raises(SystemExit) as end:
            mini.main(["--show", *map(str, runs), "--out", str(tmp_path / "other.png")])
        assert end.value.code == 2 and "suf: not a run on the miniature's xGQA as it is now" in capsys.readouterr().err
