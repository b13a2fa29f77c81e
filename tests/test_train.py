"""train.py on tiny random checkpoints: recipes, every model, task and strategy; stopping and going on;
several processes; what is refused.

What is stopped, and what runs in several processes, are processes of their own, as a user starts them.
The rest runs in this one: starting an interpreter takes longer than these runs.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT, save_tiny_checkpoints, train_command

import data
import eval as evaluation
import train
from model import read_checkpoint
from tools import few_shot

PAIRS = [(m, t) for m in ("cclm", "uc2") for t in ("xgqa", "xvnli", "xflickrco")]


@pytest.fixture(autouse=True)
def signals():
    """A run in this process handles signals; afterwards all is as it was."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(flags, main=train.main):
    """Run train.py in this process. -> what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main(flags)
    return output.getvalue()


def refused(flags, main=train.main):
    """-> the one line with which a command line ends."""
    with pytest.raises((data.InputError, SystemExit)) as end:
        run(flags, main)
    error = str(end.value)
    assert "\n" not in error
    return error


def weights(folder, name="model.pt"):
    return torch.load(folder / name, weights_only=True)["model"]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_run(a, b):
    """Weights, log, results and predictions, bit for bit."""
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    names = [f"predictions/{path.name}" for path in (a / "predictions").iterdir()]
    for name in ["log.jsonl", "results.json", *names]:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def assert_close_runs(a, b, tolerance=2e-5):
    first, second = weights(a), weights(b)
    for name in first:
        if first[name].is_floating_point() and not name.endswith("key.bias"):
            assert (first[name] - second[name]).abs().max() < tolerance, name
    ours, theirs = (json.loads((run / "results.json").read_text())["languages"] for run in (a, b))
    for metric in {"accuracy", "text_recall_at_1", "image_recall_at_1"} & ours["en"].keys():
        for language in ours:  # rounding may turn a near tie
            assert abs(ours[language][metric] - theirs[language][metric]) <= 100 / 32
    losses = [[entry for entry in log(run) if "loss" in entry] for run in (a, b)]
    for x, y in zip(*losses, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        assert x["gradient_norm"] == pytest.approx(y["gradient_norm"], rel=1e-3)


# --------------------------------------------------------------------------------------------------
# Recipes


def test_the_six_recipes():
    """Every number of the paper's section 4.1, and of the reference code where it is silent."""
    columns = ("epochs", "batch_size", "lr", "vision_lr", "betas", "eps", "clip", "micro_batch",
               "clean", "train_words", "test_words", "train_tokens", "test_tokens")
    rows = {
        ("cclm", "xgqa"): (5, 256, 3e-5, 2e-5, (0.9, 0.98), 1e-8, None, 32, "question", 30, 50, 40,
                           None),
        ("cclm", "xvnli"): (10, 144, 3e-5, 2e-5, (0.9, 0.98), 1e-8, None, 36, "caption", 80, 80, 80,
                            None),
        ("cclm", "xflickrco"): (10, 128, 3e-5, 2e-5, (0.9, 0.98), 1e-8, None, 32, "caption", 80, 80,
                                80, 80),
        ("uc2", "xgqa"): (5, 256, 4e-5, None, (0.9, 0.999), 1e-6, 1.0, 64, "", None, None, 40, 40),
        ("uc2", "xvnli"): (10, 128, 2e-5, None, (0.9, 0.999), 1e-6, 1.0, 64, "", None, None, 80, 80),
        ("uc2", "xflickrco"): (10, 64, 2e-5, None, (0.9, 0.999), 1e-6, 1.0, 16, "", None, None, 80,
                               80)}
    shared = {"embedding_lr": None, "weight_decay": 0.01, "warmup": 0.1, "suf_k": 3, "dropout": 0.1,
              "drop_path": 0.1, "image_size": 384, "augment": True, "few_shot_epochs": 20,
              "few_shot_lrs": (1e-4, 5e-5, 1e-5)}
    expected = {pair: dict(zip(columns, row, strict=True)) | shared for pair, row in rows.items()}
    assert {pair: asdict(recipe) for pair, recipe in train.RECIPES.items()} == expected


def test_few_shot_batch_sizes():
    """IGLUE's, by the number of shots."""
    expected = {"xgqa": [8, 16, 16, 32, 64], "xvnli": [2, 16, 16, 32, 64],
                "xflickrco": [1, 2, 2, 4, 16]}
    for task, sizes in expected.items():
        for shots, size in zip((1, 2, 5, 10, 48), sizes):
            args = argparse.Namespace(task=task, shots=shots, lr=None, epochs=None, batch_size=None)
            recipe = few_shot.few_shot_recipe(args, train.RECIPES["cclm", task])
            assert (recipe.batch_size, recipe.epochs) == (size, 20), (task, shots)
            assert recipe.few_shot_lrs == (1e-4, 5e-5, 1e-5) and recipe.vision_lr is None


def test_a_checkpoints_recipe_and_flags():
    """The checkpoint's own numbers before the paper's, flags before both; what differs is told."""
    args = train.parse_args(["--model", "cclm", "--task", "xgqa", "--lr", "0.5"])
    args.checkpoint = "own.pt"
    config = {"recipe": {"xgqa": {"lr": 1.0, "epochs": 2, "dropout": 0.1}}}
    recipe, changed = train.recipe_of(args, config)
    assert (recipe.lr, recipe.epochs, recipe.batch_size, recipe.vision_lr) == (0.5, 2, 256, 2e-5)
    assert changed == ["lr 0.5 (paper: 3e-05)", "epochs 2 (paper: 5)"]
    with pytest.raises(data.InputError, match="^own.pt: the recipe it brings.*speed"):
        train.recipe_of(args, {"recipe": {"xgqa": {"speed": 1}}})


def test_micro_batches():
    """As few equal forward passes as keep each within the recipe's micro batch."""
    examples = type("Examples", (), {"source": "x", "image_rows": np.arange(400),
                                     "__len__": lambda self: 400})()
    passes = {}
    for model, task in PAIRS:
        args = train.parse_args(["--model", model, "--task", task])
        train.accumulation(args, train.RECIPES[model, task], examples)
        passes[model, task] = args.grad_accum
    assert list(passes.values()) == [8, 4, 4, 4, 2, 4]


@pytest.mark.parametrize("flags, name", [
    ("", "standard"), ("--suf", "suf"), ("--suf 2 --order random", "suf2-random"),
    ("--suf --freeze vision embeddings", "suf-frozen-embeddings-vision"),
    ("--suf --only less", "suf-less"), ("--suf --suf-interval 15", "suf-every15"),
    ("--lp-ft", "lpft"), ("--lr-decay 0.5", "decay0.5"), ("--train-top 6", "top6"),
    ("--train-top 6 --freeze", "top6-frozen-nothing")])
def test_strategies_have_names_of_their_own(flags, name):
    args = train.parse_args(["--model", "cclm", "--task", "xgqa", *flags.split()])
    assert train.strategy_name(args) == name


@pytest.mark.parametrize("flags, expected", [
    ("", [{0, 1, 2, 3}] * 3), ("--suf", [{3}, {2, 3}, {1, 2, 3}]), ("--suf 3", [{1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}]),
    ("--suf --order bottom-up", [{0}, {0, 1}, {0, 1, 2}]), ("--suf --only less", [{0, 1, 2, 3}] * 3),
    ("--suf --suf-interval 5", [{3}, {1, 2, 3}, {0, 1, 2, 3}]), ("--train-top 2", [{2, 3}] * 3),
    ("--lp-ft", [set(), {0, 1, 2, 3}, {0, 1, 2, 3}])])
def test_layers_that_train_in_three_epochs(flags, expected):
    """Of four layers, at the first step of each of three epochs of ten steps; the recipe's k is 1."""
    args = train.parse_args(["--model", "uc2", "--task", "xgqa", *flags.split()])
    recipe = train.Recipe(3, 1, 1.0, suf_k=1)
    found = [train.trainable_layers(args, recipe, step, 10, 4) for step in (0, 10, 20)]
    assert found == expected


def test_learning_rates():
    """Layer-wise decay and what is outside the layers; SUF's share of the rate, and its inverse."""
    recipe = train.Recipe(3, 1, 1.0, vision_lr=0.5, suf_k=1, warmup=0.0)

    def rates(*flags):
        args = train.parse_args(["--model", "cclm", "--task", "xgqa", *flags])
        return list(train.learning_rates(args, recipe, 2, 3).values())

    assert rates() == [1, 1, 1, 1, 0.5, 1]
    assert rates("--lr-decay", "0.5") == [0.25, 0.5, 1, 0.125, 0.5, 1]
    assert rates("--lr-decay", "0.5", "--embedding-lr", "2")[3] == 1  # as the recipe's, not decayed
    # factors 6 5 | 4 3 | 2 1 of 6 over three epochs: the bottom layer has 3 of 21, the middle 10
    assert rates("--suf", "--only", "less")[:3] == pytest.approx([3 / 21, 10 / 21, 1])
    assert rates("--suf", "--only", "later")[:3] == pytest.approx([21 / 3, 21 / 10, 1])


# --------------------------------------------------------------------------------------------------
# Every model, task and strategy


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Function: (folder, output) of a finished --suf run, made when first asked for."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def get(model, task):
        if (model, task) not in made:
            place = folder / f"{model}-{task}"
            flags = ["--suf", "--eval-every-epoch"]
            if task == "xflickrco":  # pairs grow with the square
                flags += ["--limit", 32, "--batch-size", 16]
            made[model, task] = place, run(train_command(tiny, model, task, place, *flags))
        return made[model, task]

    return get


@pytest.mark.parametrize("model, task", PAIRS)
def test_suf(model, task, runs):
    folder, output = runs(model, task)
    results = json.loads((folder / "results.json").read_text())
    languages = {"xgqa": "en de pt ru id zh ko bn", "xvnli": "en ar es fr ru",
                 "xflickrco": "en de es id ja ru tr zh"}[task].split()
    assert list(results["languages"]) == languages and results["strategy"] == "suf"
    for language, scores in results["languages"].items():
        predictions = json.loads((folder / "predictions" / f"{language}.json").read_text())
        if task == "xflickrco":
            assert len(predictions) == scores["n_texts"] + scores["n_images"] == 64
        else:
            assert len(predictions) == scores["n"] == 128
    metric = "text_recall_at_1" if task == "xflickrco" else "accuracy"
    others = [scores[metric] for name, scores in results["languages"].items() if name != "en"]
    mean = results["mean_zero_shot"]
    mean = mean[metric] if task == "xflickrco" else mean
    assert mean == pytest.approx(sum(others) / len(others))

    # one evaluation after the first of two epochs, a line per step
    assert [e["epoch"] for e in log(folder) if "languages" in e and "epoch" in e] == [1]
    assert sum("loss" in entry for entry in log(folder)) == 2 * (2 if task == "xflickrco" else 4)
    assert f"{model} on {task}, suf, seed 0, on cpu" in output.splitlines()[0]
    assert output.splitlines()[-1].startswith("next")
    args = json.loads((folder / "args.json").read_text())
    assert args["args"]["miniature"] is False and args["command"].startswith("python train.py")
    assert {"de/test.json", "ru/test.jsonl", "zh/test.jsonl"} & args["fingerprints"].keys()


@pytest.mark.parametrize("model, task", PAIRS)
def test_only_thawed_layers_move(model, task, tiny, runs):
    """After 2 epochs with k = 1 the top two layers, the embeddings and the image encoder have moved;
    the layers below are the checkpoint's, bit for bit."""
    folder, _ = runs(model, task)
    before, after = weights(tiny, f"{model}.pt"), weights(folder)
    if model == "cclm":
        layers = [f"text_encoder.encoder.layer.{i}." for i in range(3)]
        layers += [f"cross_encoder.encoder.layer.{i}." for i in range(2)]
        outside = ["text_encoder.embeddings.word_embeddings.weight",
                   "vision_encoder.blocks.0.attn.qkv.weight"]
    else:
        layers = [f"bert.encoder.layer.{2 * i + 1}." for i in range(4)]
        outside = ["bert.embeddings.word_embeddings.weight"]
    for i, prefix in enumerate(layers):
        names = [name for name in after if name.startswith(prefix) and name.endswith("dense.weight")]
        for name in names:
            assert torch.equal(before[name], after[name]) == (i < len(layers) - 2), name
    assert not any(torch.equal(before[name], after[name]) for name in outside)


@pytest.mark.parametrize("flags, still", [
    (["--train-top", 2], ["text_encoder.encoder.layer.2.output.dense.weight",
                          "text_encoder.embeddings.word_embeddings.weight"]),
    (["--train-top", 2, "--freeze"], ["text_encoder.encoder.layer.2.output.dense.weight"]),
    (["--suf", 2, "--freeze", "embeddings", "vision"],
     ["text_encoder.encoder.layer.0.output.dense.weight", "vision_encoder.blocks.0.attn.qkv.weight",
      "text_encoder.embeddings.word_embeddings.weight"]),
    (["--suf", "--only", "less"], ["text_encoder.encoder.layer.0.output.dense.weight"]),
    (["--lr-decay", 0.5], []),
], ids=["top", "top with embeddings", "suf 2 frozen", "less", "decay"])
def test_strategies(flags, still, tiny, tmp_path):
    run(train_command(tiny, "cclm", "xgqa", tmp_path / "run", *flags))
    before, after = weights(tiny, "cclm.pt"), weights(tmp_path / "run")
    ends = ("output.dense.weight", "word_embeddings.weight", "qkv.weight")
    watched = [name for name in before if name in after and name.endswith(ends)]
    unmoved = {name for name in watched if torch.equal(before[name], after[name])}
    assert unmoved >= set(still) and "cross_encoder.encoder.layer.1.output.dense.weight" not in unmoved
    if flags[0] == "--lr-decay":  # the lower, the less
        layers = [f"text_encoder.encoder.layer.{i}.output.dense.weight" for i in range(3)]
        layers += [f"cross_encoder.encoder.layer.{i}.output.dense.weight" for i in range(2)]
        distance = [(before[name] - after[name]).abs().mean().item() for name in layers]
        assert distance == sorted(distance) and distance[0] < 0.2 * distance[-1]


class Square(torch.nn.Module):
    """A model of one parameter, in one layer, whose loss has gradient [3, 4]; notes its mode."""

    task = "xgqa"

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 1, bias=False)])
        self.modes = []

    def group_of(self, name):
        return None

    def decays(self, name):
        return False

    def forward(self, batch):
        self.modes.append(self.training)
        return (self.layers[0].weight * torch.tensor([[3.0, 4.0]])).sum()


def test_warm_up_clipping_and_mode_inside_fit(tmp_path, monkeypatch):
    """Two epochs of four steps, warm-up over half of all: the rates in the log, the clipped update."""
    args = train.parse_args(["--model", "uc2", "--task", "xgqa"])
    args.run, args.grad_accum, args.precision = str(tmp_path), 1, "float32"
    examples = type("Examples", (), {"tokens": type("Tokens", (), {"lengths": np.ones(8)})(),
                                     "__len__": lambda self: 8})()
    monkeypatch.setattr(data, "load_batches", lambda *_: iter([{"ids": ["a"]} for _ in range(8)]))
    model, recipe = Square().eval(), train.Recipe(2, 2, 1.0, warmup=0.5, clip=1.0)
    gradients = []
    step = torch.optim.AdamW.step

    def noted(optimizer, *rest):
        gradients.append(model.layers[0].weight.grad[0].tolist())
        return step(optimizer, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    train.fit(model, examples, None, args, recipe, torch.device("cpu"), train.Stop(), lambda *_: None)
    assert [entry["lr_factor"] for entry in log(tmp_path)] == [0, .25, .5, .75, 1, .75, .5, .25]
    assert [entry["gradient_norm"] for entry in log(tmp_path)] == [5.0] * 8
    assert gradients[0] == pytest.approx([0.6, 0.8], abs=1e-6) and all(model.modes)


def test_layers_that_thaw_late_get_the_references_updates():
    """AdamW with eps added before bias correction, where a parameter's own updates count."""
    recipe = train.Recipe(1, 1, 0.1, betas=(0.9, 0.98), eps=1e-3)
    early, late = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    groups = [{"params": [p], "peak_lr": 0.1, "weight_decay": 0.0} for p in (early, late)]
    optimizer = torch.optim.AdamW(groups, 0.0, recipe.betas, recipe.eps, fused=True)
    gradients = 1e-3 * torch.randn(6, 2, generator=torch.Generator().manual_seed(0))

    expected = [parameter.detach().clone() for parameter in (early, late)]
    for value, used in zip(expected, (gradients, gradients[3:])):
        mean, square = torch.zeros(2), torch.zeros(2)
        for n, gradient in enumerate(used, start=1):
            mean, square = 0.9 * mean + 0.1 * gradient, 0.98 * square + 0.02 * gradient**2
            rate = 0.1 * math.sqrt(1 - 0.98**n) / (1 - 0.9**n)
            value -= rate * mean / (square.sqrt() + 1e-3)
    for step, gradient in enumerate(gradients):
        late.requires_grad_(step >= 3)
        train.set_rates(optimizer, 1.0, recipe)
        for parameter in (early, late):
            parameter.grad = gradient.clone() if parameter.requires_grad else None
        optimizer.step()
    assert torch.allclose(early, expected[0], atol=1e-6)
    assert torch.allclose(late, expected[1], atol=1e-6)


def test_dropout_differs_over_seed_step_and_part():
    drawn = set()
    for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        train.seed_part(*key)
        drawn.add(float(torch.rand(())))
    train.seed_part(0, 0, 0)
    assert len(drawn) == 4 and float(torch.rand(())) in drawn


def test_a_recipe_without_augmentation_reaches_the_loader(runs):
    args, recipe = evaluation.read_run(str(runs("cclm", "xgqa")[0]))
    tokenizer, labels = data.Tokenizer(args.tokenizer), data.read_labels(args.data)
    for augment in (True, False):
        recipe.augment = augment
        _, batches = train.training_data(args, recipe, tokenizer, labels, "train")
        first, again = (batches[epoch, np.arange(4)]["images"] for epoch in (0, 1))
        assert torch.equal(first, again) != augment


def test_xvnli_without_gold_label(tiny, runs, tmp_path):
    """IGLUE trains UC2 on "-", the released code of CCLM leaves these pairs out."""
    folder = tmp_path / "data"
    shutil.copytree(tiny / "data", folder, copy_function=os.link)
    path = folder / "XVNLI/annotations/en/train.jsonl"
    lines = path.read_text().splitlines()
    path.unlink()
    changed = json.dumps(json.loads(lines[0]) | {"gold_label": "-"})
    path.write_text("\n".join([changed, *lines[1:]]))
    counts = {}
    for model in ("cclm", "uc2"):
        args, recipe = evaluation.read_run(str(runs(model, "xvnli")[0]))
        args.data = str(folder)
        examples, _ = train.training_data(args, recipe, data.Tokenizer(args.tokenizer), [], "train")
        counts[model] = len(examples)
    assert counts == {"cclm": 127, "uc2": 128}


def test_questions_per_image(tiny, tmp_path):
    run(train_command(tiny, "cclm", "xgqa", tmp_path / "run", "--questions-per-image", 4,
                      "--epochs", 1))
    assert sum("loss" in entry for entry in log(tmp_path / "run")) == 4


def test_compile_across_phases(tiny, tmp_path, monkeypatch):
    """--compile gives the weights of the run without, over two phases of the schedule.

    Traced as always, but not turned into machine code, which takes a minute.
    """
    file = torch.load(tiny / "uc2.pt", weights_only=True)
    file["config"]["recipe"]["xvnli"] |= {"dropout": 0.0}
    torch.save(file, tmp_path / "no-dropout.pt")
    flags = ["--suf", "--limit", 32, "--batch-size", 16, "--checkpoint", tmp_path / "no-dropout.pt"]
    run(train_command(tiny, "uc2", "xvnli", tmp_path / "eager", *flags))
    compiler = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compiler)
    run(train_command(tiny, "uc2", "xvnli", tmp_path / "compiled", *flags, "--compile"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4
    assert_close_runs(tmp_path / "eager", tmp_path / "compiled")


# --------------------------------------------------------------------------------------------------
# Few-shot


def test_few_shot(runs, tmp_path):
    english, _ = runs("cclm", "xgqa")
    folder = tmp_path / "few"
    flags = ["de", "--shots", "5", "--init", str(english), "--run-dir", str(folder), "--limit", "48"]
    output = run(flags, few_shot.main)
    results = json.loads((folder / "results.json").read_text())
    assert list(results["languages"]) == ["en", "de"] and results["shots"] == 5
    scores = {}
    for rate in ("0.001", "0.0001"):
        entries = log(folder / f"lr-{rate}")
        scores[rate] = [entry["development"] for entry in entries if "development" in entry]
        assert len(scores[rate]) == 2
    assert results["development"] == max(map(max, scores.values()))
    # xGQA: chosen on the language's own development data
    assert "xGQA/annotations/few_shot/de/dev.json" in output and "on 5 images" in output
    assert "already here" in refused(flags, few_shot.main)
    assert "is complete" in run([*flags, "--resume"], few_shot.main)
    wrong = ["xx", *flags[1:5], "--run-dir", str(tmp_path / "no")]
    assert "xx is none of xgqa's languages" in refused(wrong, few_shot.main)


def test_few_shot_takes_the_first_of_equal_rates(runs, tmp_path, monkeypatch):
    """Scores 60 with the first rate, 50 with the second: the first rate's weights are tested."""
    loaded = []
    load = evaluation.load_weights

    def noted(path, *rest, **options):
        loaded.append(path)
        return load(path, *rest, **options)

    def trained(args, recipe, *rest):
        folder = f"{args.run}/lr-{recipe.lr:g}"
        os.makedirs(folder, exist_ok=True)
        shutil.copy(f"{args.init}/model.pt", f"{folder}/best.pt")
        return {"development": 60.0 if recipe.lr == 1e-3 else 50.0, "epoch": 1, "weights": folder}

    monkeypatch.setattr(evaluation, "load_weights", noted)
    monkeypatch.setattr(few_shot, "train_with", trained)
    run(["ar", "--shots", "1", "--init", str(runs("uc2", "xvnli")[0]), "--limit", "8", "--batch-size",
         "2", "--run-dir", str(tmp_path / "few")], few_shot.main)
    assert loaded[-1].endswith("lr-0.001/best.pt")


def test_few_shot_negatives_of_uc2_are_random(runs, tmp_path):
    """IGLUE's hard_negative.pkl belongs to the training split alone, though it knows the images."""
    args, recipe = evaluation.read_run(str(runs("uc2", "xflickrco")[0]))
    args.few_shot, args.shots = "de", 25
    args.data = str(shutil.copytree(args.data, tmp_path / "data"))
    shots = data.read_records(args.data, "xflickrco", "few-shot", "de", 25)[1]
    similar = {"train_image_list": [shot.image for shot in shots],
               "train_hard_pool": [[i, 0, 1] for i in range(25)]}
    (tmp_path / "data/flickr30k/hard_negative.pkl").write_bytes(pickle.dumps(similar))
    tokenizer = data.Tokenizer(args.tokenizer)
    _, batches = train.training_data(args, recipe, tokenizer, [], "few-shot")
    hard = set()
    for epoch in range(40):
        batch = batches[epoch, np.array([0])]
        row = int(batch["text_index"][3])
        hard.add(tuple(batch["input_ids"][row].tolist()))
    assert len(hard) > 2


# --------------------------------------------------------------------------------------------------
# What is refused, and what is told


@pytest.mark.parametrize("model, task, flags, part", [
    ("cclm", "xgqa", ["--train-top", -1], "--train-top cannot be -1"),
    ("cclm", "xgqa", ["--lr-decay", 1.5], "--lr-decay cannot be 1.5"),
    ("cclm", "xgqa", ["--lr", "nan"], "--lr cannot be nan"),
    ("cclm", "xgqa", ["--epochs", 0], "--epochs cannot be 0"),
    ("cclm", "xgqa", ["--suf", "--lr-decay", 0.5], "are alternatives"),
    ("cclm", "xgqa", ["--order", "random"], "belong to --suf, which is not given"),
    ("cclm", "xgqa", ["--data", "", "--tokenizer", ""], "go together"),
    ("cclm", "xflickrco", ["--questions-per-image", 2], "--questions-per-image: CCLM's"),
    ("cclm", "xflickrco", ["--grad-accum", 16], "2 pair(s) may all be of one image"),
    ("cclm", "xgqa", ["--grad-accum", 5], "cannot be split evenly over 1 process(es) x 5"),
    ("uc2", "xgqa", ["--batch-size", 4096], "128 training examples do not fill one batch of 4096"),
    ("uc2", "xgqa", ["--run-dir", ROOT / "train.py" / "run"], "Not a directory"),
    ("uc2", "xvnli", ["--checkpoint", "wide/uc2.pt"], "9"),
    ("uc2", "xgqa", ["--checkpoint", "no.pt"], "no.pt"),
    ("uc2", "xgqa", ["--tokenizer", "no.model"], "no.model"),
    ("uc2", "xgqa", ["--data", "nowhere"], "nowhere"),
])
def test_refused(model, task, flags, part, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "wide/uc2.pt" in flags:
        (tmp_path / "wide").mkdir()
        save_tiny_checkpoints(tmp_path / "wide", 9)
    error = refused(train_command(tiny, model, task, tmp_path / "run", *flags))
    assert part in error + capsys.readouterr().err and not (tmp_path / "run").exists()


def test_world_size_without_torchrun(tiny, tmp_path):
    """A cluster may export it; one line instead of a traceback or a wait."""
    command = [sys.executable, "train.py", *train_command(tiny, "uc2", "xvnli", tmp_path / "run")]
    environment = os.environ | {"WORLD_SIZE": "4"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: WORLD_SIZE is set, but not all of RANK")
    assert len(done.stderr.splitlines()) == 1


def test_a_full_disk_is_told_at_the_start(tiny, tmp_path, monkeypatch):
    usage = type(shutil.disk_usage("."))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 100))
    assert "0.0 GB free" in refused(train_command(tiny, "uc2", "xvnli", tmp_path / "run"))


def test_a_run_is_not_overwritten_and_not_mixed(tiny, tmp_path):
    folder = tmp_path / "run"
    flags = train_command(tiny, "uc2", "xvnli", folder)
    run(flags)
    error = refused(flags)
    assert f"{folder}: a run is already here" in error and f"--run-dir {folder}-2" in error
    assert "is complete" in run([*flags, "--resume"])
    assert "strategy was standard, now suf2" in refused([*flags, "--resume", "--suf", "2"])
    (folder / "results.json").unlink()
    assert "lr was 0.001, now 0.5" in refused([*flags, "--resume", "--lr", "0.5"])
    assert "precision was float32, now bf16" in refused([*flags, "--resume", "--precision", "bf16"])
    other = torch.load(tiny / "uc2.pt", weights_only=True)
    other["model"]["bert.t_pooler.dense.bias"] += 1
    (tmp_path / "other").mkdir()
    torch.save(other, tmp_path / "other" / "uc2.pt")
    error = refused([*flags, "--resume", "--checkpoint", str(tmp_path / "other" / "uc2.pt")])
    assert "cannot resume with other settings: " in error and "uc2.pt was" in error


def test_numbers_that_go_wrong_stop_the_run(tiny, tmp_path):
    error = refused(train_command(tiny, "uc2", "xvnli", tmp_path / "run", "--lr", "1e15"))
    assert "at step 3, on the records " in error


# --------------------------------------------------------------------------------------------------
# Stopping and going on

IN_TWO_PHASES = ["--suf", "--eval-every-epoch", "--grad-accum", 2, "--epochs", 3]


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(train_command(tiny, "cclm", "xgqa", folder / "run", *IN_TWO_PHASES))
    return folder / "run"


def stopped(flags, folder, steps, number, launcher=(sys.executable,)):
    """Start a run; end its whole process group by a signal once its log has so many steps."""
    command = [*launcher, str(ROOT / "train.py"), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    path, deadline = folder / "log.jsonl", time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if path.exists() and path.read_text().count("loss") >= steps:
            break
        time.sleep(0.02)
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_resumed_equals_uninterrupted(number, tiny, uninterrupted, tmp_path):
    """Dropout, stochastic depth, augmentation in loader processes, accumulation, two phases: the same
    bits. SIGTERM goes to the whole process group, as `timeout` and cluster schedulers send it."""
    folder = tmp_path / "broken"
    flags = train_command(tiny, "cclm", "xgqa", folder, *IN_TWO_PHASES)
    code, output, errors = stopped([*flags, "--workers", "1"], folder, 6, number)
    assert not (folder / "results.json").exists(), "the run ended before the signal came"
    if number == signal.SIGTERM:
        assert code == 128 + number and "stopped and saved after step" in output and errors == ""
    run([*flags, "--resume"])
    assert_same_run(uninterrupted, folder)


@pytest.mark.parametrize("module, function", [(data, "load_examples"), (evaluation, "evaluate")])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_outside_a_step_end_at_once(module, function, number, tiny, tmp_path, monkeypatch,
                                            capsys):
    def signalled(*args, **options):
        os.kill(os.getpid(), number)
        pytest.fail("the run went on")

    flags = train_command(tiny, "uc2", "xvnli", tmp_path / "run", "--eval-every-epoch")
    monkeypatch.setattr(module, function, signalled)
    with pytest.raises(SystemExit) as end:
        train.main(flags)
    assert end.value.code == 128 + number and "--resume goes on" in capsys.readouterr().out
    if function == "evaluate":  # the epoch before is saved, and evaluated when the run goes on
        monkeypatch.undo()
        assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 4
        run([*flags, "--resume"])
        run(train_command(tiny, "uc2", "xvnli", tmp_path / "whole", "--eval-every-epoch"))
        assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_log_of_a_resumed_run(tmp_path):
    """Four steps, and an evaluation after the fourth, which is done again; step 5 came after last.pt."""
    lines = [{"step": n, "loss": 1.0} for n in (1, 2, 3, 4)]
    lines += [{"step": 4, "languages": {}}, {"step": 5, "loss": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train.open_log(str(tmp_path), 4).close()
    assert log(tmp_path) == lines[:4]


# --------------------------------------------------------------------------------------------------
# Several processes

PORT = 20000 + os.getpid() % 20000


def torchrun(script, *flags):
    flags = flags or ("--nproc_per_node", "2", "--master_port", str(PORT))
    return [sys.executable, "-m", "torch.distributed.run", *flags, str(script)]


@pytest.fixture(scope="module")
def one_and_two(tiny, tmp_path_factory):
    """Every model and task in one process with two parts per batch; in two processes with one part
    each; and again in two, stopped in the second phase and resumed. One start of two serves all."""
    folder = tmp_path_factory.mktemp("processes")
    file = torch.load(tiny / "cclm.pt", weights_only=True)
    file["config"]["recipe"]["xflickrco"] |= {"dropout": 0.0, "drop_path": 0.0}
    torch.save(file, folder / "no-dropout.pt")

    def command(model, task, processes, name):
        flags = ["--suf", "--limit", 64, "--grad-accum", 2 // processes]
        if task == "xflickrco":  # pairs grow with the square
            flags += ["--limit", 32, "--batch-size", 16]
        # one batch of 16 pairs against two gathered ones of 8; dropout is drawn per part
        if (model, task) == ("cclm", "xflickrco"):
            flags += ["--grad-accum", 1, "--checkpoint", folder / "no-dropout.pt"]
        return train_command(tiny, model, task, folder / f"{model}-{task}-{name}", *flags)

    # deterministic: every operation in use must have a way for it; a setting of all torch
    alone = [[*command(*pair, 1, "1"), "--deterministic"] for pair in PAIRS]
    start = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n"
    (folder / "alone.py").write_text(f"{start}for flags in {alone!r}:\n    train.main(flags)\n")
    one = subprocess.Popen([sys.executable, str(folder / "alone.py")], stdout=subprocess.DEVNULL)
    whole = [command(*pair, 2, "2") for pair in PAIRS]
    broken = [command(*pair, 2, "resumed") for pair in PAIRS]
    (folder / "all.py").write_text(f"""{start}
train.dist.init_process_group("gloo")
for flags in {whole!r}:
    train.main(flags)
set_rates, steps = train.set_rates, [0]
def stop(*arguments):
    steps[0] += 1
    if steps[0] == 4:
        raise SystemExit("stopped")
    set_rates(*arguments)
for flags in {broken!r}:
    steps[0], train.set_rates = 0, stop
    try:
        train.main(flags)
    except SystemExit as end:
        assert end.code == "stopped"
    train.set_rates = set_rates
    train.main([*flags, "--resume"])
""")
    done = subprocess.run(torchrun(folder / "all.py"), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert one.wait(timeout=120) == 0
    return folder


@pytest.mark.parametrize("model, task", PAIRS)
def test_two_processes_equal_one(model, task, one_and_two):
    """Gradients, weights and results, across a phase change. For CCLM on xFlickrCO the contrastive
    batch is the union of the processes' batches, gathered with gradients."""
    assert_close_runs(one_and_two / f"{model}-{task}-1", one_and_two / f"{model}-{task}-2")


@pytest.mark.parametrize("model, task", PAIRS)
def test_two_processes_resumed_equal_uninterrupted(model, task, one_and_two):
    assert_same_run(one_and_two / f"{model}-{task}-2", one_and_two / f"{model}-{task}-resumed")


def test_two_processes_stop_by_a_signal_and_another_number_goes_on(tiny, tmp_path):
    """SIGTERM to torchrun: all save and end. One process with two parts per batch goes on with the
    same run; where parts would differ, it is refused."""
    flags = ["--suf", "--epochs", 3]
    run(train_command(tiny, "uc2", "xgqa", tmp_path / "whole", *flags, "--grad-accum", 2))
    folder = tmp_path / "broken"
    two = train_command(tiny, "uc2", "xgqa", folder, *flags, "--grad-accum", 1)
    stopped(two, folder, 5, signal.SIGTERM, torchrun(ROOT / "train.py")[:-1])
    assert not (folder / "results.json").exists()
    assert "processes x accumulation was 2, now 1" in refused([*two, "--resume"])
    run([*two, "--grad-accum", "2", "--resume"])
    assert_close_runs(tmp_path / "whole", folder)


def test_one_failing_process_ends_all(tiny, tmp_path):
    """Features that only one process cannot use: its one line, and no traceback of ours."""
    folder = shutil.copytree(tiny / "data", tmp_path / "data", copy_function=os.link)
    path = folder / "flickr30k" / "features" / "features.npy"
    features = np.load(path)
    path.unlink()
    np.save(path, features * np.nan)
    flags = train_command(tiny, "uc2", "xvnli", tmp_path / "run")
    (tmp_path / "all.py").write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import train
train.dist.init_process_group("gloo")
spoilt = ["--data", {str(folder)!r}] if train.ranks()[0] else []
train.evaluation.command(lambda: train.main([*{flags!r}, *spoilt]))
""")
    done = subprocess.run(torchrun(tmp_path / "all.py"), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and not (tmp_path / "run" / "results.json").exists()
    assert "are not finite" in done.stderr, done.stderr
    assert done.stderr.count("Traceback") <= 1, done.stderr  # torchrun's own


def test_shipped_checkpoints_bring_a_recipe():
    for model, task in PAIRS:
        args = train.parse_args(["--model", model, "--task", task])
        args.checkpoint = str(ROOT / "miniature" / f"{model}.pt")
        recipe, _ = train.recipe_of(args, read_checkpoint(args.checkpoint)[1])
        assert (recipe.suf_k, recipe.batch_size, recipe.dropout) == (1, 64, 0.0)
