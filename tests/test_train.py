"""train.py on tiny random checkpoints: recipes, every model, task and strategy; stopping and going
on; several processes; what is refused.

What is stopped, and what runs in several processes, are processes of their own, as a user starts
them.
"""

import argparse
import functools
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
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import (ROOT, read_json, refused, run, run_processes, save_tiny_checkpoints,
                      train_command)

import data
import eval as evaluation
import train
import uc2
from tools import few_shot

PAIRS = [(m, t) for m in ("cclm", "uc2") for t in ("xgqa", "xvnli", "xflickrco")]
SMALL = ["--limit", 32, "--batch-size", 16]  # two steps per epoch
PAIRED = ["--limit", 16, "--batch-size", 8]  # of retrieval, too, whose pairs grow with the square


def parse(model, task, *flags):
    return train.parse_args(["--model", model, "--task", task, *flags])


def weights(folder, name="model.pt"):
    return torch.load(folder / name, weights_only=True)["model"]


def log(folder, field="step"):
    """The entries of a run's log that have a field."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if field in entry]


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
    ours, theirs = (read_json(run / "results.json")["languages"] for run in (a, b))
    for metric in {"accuracy", "text_recall_at_1", "image_recall_at_1"} & ours["en"].keys():
        for language in ours:  # rounding may turn a near tie
            assert abs(ours[language][metric] - theirs[language][metric]) <= 100 / 32
    for x, y in zip(log(a, "loss"), log(b, "loss"), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        assert x["gradient_norm"] == pytest.approx(y["gradient_norm"], rel=1e-3)


# ---- Recipes

def test_the_six_recipes():
    """Every number of the paper's section 4.1, and of the reference code where it is silent."""
    columns = ("epochs", "batch_size", "lr", "vision_lr", "betas", "eps", "clip", "micro_batch",
               "clean", "train_words", "test_words", "train_tokens", "test_tokens")
    cclm = (3e-5, 2e-5, (0.9, 0.98), 1e-8, None)
    iglue = (None, (0.9, 0.999), 1e-6, 1.0)
    rows = {
        ("cclm", "xgqa"): (5, 256, *cclm, 32, "question", 30, 50, 40, None),
        ("cclm", "xvnli"): (10, 144, *cclm, 36, "caption", 80, 80, 80, None),
        ("cclm", "xflickrco"): (10, 128, *cclm, 32, "caption", 80, 80, 80, 80),
        ("uc2", "xgqa"): (5, 256, 4e-5, *iglue, 64, "", None, None, 40, 40),
        ("uc2", "xvnli"): (10, 128, 2e-5, *iglue, 64, "", None, None, 80, 80),
        ("uc2", "xflickrco"): (10, 64, 2e-5, *iglue, 16, "", None, None, 80, 80)}
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
            args = argparse.Namespace(task=task, shots=shots)
            recipe = few_shot.few_shot_recipe(args, train.RECIPES["cclm", task])
            assert (recipe.batch_size, recipe.epochs) == (size, 20), (task, shots)
            assert recipe.few_shot_lrs == (1e-4, 5e-5, 1e-5) and recipe.vision_lr is None


def test_a_checkpoints_recipe_and_flags():
    """The checkpoint's own numbers before the paper's, flags before both; what differs is told."""
    args = parse("cclm", "xgqa", "--lr", "0.5")
    args.checkpoint = "own.pt"
    config = {"recipe": {"xgqa": {"lr": 1.0, "epochs": 2, "dropout": 0.1}}}
    recipe, changed = train.recipe_of(args, config)
    assert (recipe.lr, recipe.epochs, recipe.batch_size, recipe.vision_lr) == (0.5, 2, 256, 2e-5)
    assert changed == ["lr 0.5 (paper: 3e-05)", "epochs 2 (paper: 5)"]
    with pytest.raises(data.InputError, match="^own.pt: the recipe it brings.*speed"):
        train.recipe_of(args, {"recipe": {"xgqa": {"speed": 1}}})


def test_micro_batches(monkeypatch):
    """As few equal forward passes as keep each within the recipe's micro batch."""
    examples = MagicMock(image_rows=np.arange(400))
    examples.__len__.return_value = 400
    for processes, expected in ((1, [8, 4, 4, 4, 2, 4]), (4, [2, 1, 1, 1, 1, 1])):
        monkeypatch.setattr(train, "ranks", lambda: (0, processes))
        for pair, passes in zip(PAIRS, expected):
            args = parse(*pair)
            train.accumulation(args, train.RECIPES[pair], examples)
            assert args.grad_accum == passes


ALL = {0, 1, 2, 3}
STRATEGIES = {  # flags -> name, and which of four layers train in each of three epochs of ten steps
    "": ("standard", [ALL] * 3),
    "--suf": ("suf", [{3}, {2, 3}, {1, 2, 3}]),
    "--suf 2 --order random": ("suf2-random", None),
    "--suf --order bottom-up": ("suf-bottom-up", [{0}, {0, 1}, {0, 1, 2}]),
    "--suf --freeze vision embeddings": ("suf-frozen-embeddings-vision", None),
    "--suf --only less": ("suf-less", [ALL] * 3),
    "--suf --suf-interval 5": ("suf-every5", [{3}, {1, 2, 3}, ALL]),
    "--lp-ft": ("lpft", [set(), ALL, ALL]),
    "--lr-decay 0.5": ("decay0.5", [ALL] * 3),
    "--train-top 2": ("top2", [{2, 3}] * 3),
    "--train-top 6 --freeze": ("top6-frozen-nothing", [ALL] * 3),
}


@pytest.mark.parametrize("flags", STRATEGIES)
def test_names_of_strategies_and_their_layers(flags):
    args, (name, layers) = parse("uc2", "xgqa", *flags.split()), STRATEGIES[flags]
    assert train.strategy_name(args) == name
    recipe = train.Recipe(3, 1, 1.0, suf_k=1)
    found = [train.trainable_layers(args, recipe, step, 10, 4) for step in (0, 10, 20)]
    assert layers in (None, found)


def test_learning_rates():
    """Layer-wise decay and what is outside the layers; SUF's share of the rate, and its inverse."""
    recipe = train.Recipe(3, 1, 1.0, vision_lr=0.5, suf_k=1, warmup=0.5)

    def rates(*flags):
        return list(train.learning_rates(parse("cclm", "xgqa", *flags), recipe, 2, 3).values())

    assert rates() == [1, 1, 1, 1, 0.5, 1]
    assert rates("--lr-decay", "0.5") == [0.25, 0.5, 1, 0.125, 0.5, 1]
    assert rates("--lr-decay", "0.5", "--embedding-lr", "2")[3] == 1  # as the recipe's, not decayed
    # factors 0 1 | 2 3 | 2 1 of 3 over three epochs: the bottom layer has 3 of 9, the middle 8
    assert rates("--suf", "--only", "less")[:3] == pytest.approx([3 / 9, 8 / 9, 1])
    assert rates("--suf", "--only", "later")[:3] == pytest.approx([9 / 3, 9 / 8, 1])


# ---- Every model, task and strategy

@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Function: (folder, output) of a finished --suf run, made when first asked for."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def get(model, task):
        if (model, task) not in made:
            place = folder / f"{model}-{task}"
            flags = ["--suf", "--eval-every-epoch", "--limit", 64]
            if task == "xflickrco":
                flags += PAIRED
            made[model, task] = place, run(train_command(tiny, model, task, place, *flags))
        return made[model, task]

    return get


LAYERS = {  # a weight of every layer, bottom to top, and of what is outside the layers
    "cclm": [*(f"text_encoder.encoder.layer.{i}.output.dense.weight" for i in range(3)),
             *(f"cross_encoder.encoder.layer.{i}.output.dense.weight" for i in range(2))],
    "uc2": [f"bert.encoder.layer.{2 * i + 1}.output.dense.weight" for i in range(4)]}
EMBEDDINGS = "text_encoder.embeddings.word_embeddings.weight"
VISION = "vision_encoder.blocks.0.attn.qkv.weight"
OUTSIDE = {"cclm": [EMBEDDINGS, VISION], "uc2": ["bert.embeddings.word_embeddings.weight"]}


def unmoved(tiny, model, run):
    """Names of the layers and of what is outside them that a run has left bit for bit."""
    before, after = weights(tiny, f"{model}.pt"), weights(run)
    watched = LAYERS[model] + OUTSIDE[model]
    return {name for name in watched if torch.equal(before[name], after[name])}


@pytest.mark.parametrize("model, task", PAIRS)
def test_suf(model, task, tiny, runs):
    folder, output = runs(model, task)
    # in two epochs with k = 1: the top two layers and all that is outside the layers
    assert unmoved(tiny, model, folder) == set(LAYERS[model][:-2])
    results = read_json(folder / "results.json")
    languages = {"xgqa": "en de pt ru id zh ko bn", "xvnli": "en ar es fr ru",
                 "xflickrco": "en de es id ja ru tr zh"}[task].split()
    assert list(results["languages"]) == languages and results["strategy"] == "suf"
    metric, mean = "accuracy", results["mean_zero_shot"]
    if task == "xflickrco":
        metric, mean = "text_recall_at_1", mean["text_recall_at_1"]
    for language, scores in results["languages"].items():
        predictions = read_json(folder / "predictions" / f"{language}.json")
        counted = scores["n_texts"] + scores["n_images"] if task == "xflickrco" else scores["n"]
        assert len(predictions) == counted == (16 + 16 if task == "xflickrco" else 64)
    others = [results["languages"][name][metric] for name in languages[1:]]
    assert mean == pytest.approx(sum(others) / len(others))

    # one evaluation after the first of two epochs, a line per step
    assert [entry["epoch"] for entry in log(folder, "languages") if "epoch" in entry] == [1]
    assert len(log(folder, "loss")) == 4
    assert output.splitlines()[-1].startswith("next")
    assert read_json(folder / "args.json")["args"]["miniature"] is False


@pytest.mark.parametrize("flags, still", [
    ("--train-top 2", {*LAYERS["cclm"][:3], EMBEDDINGS}),
    ("--train-top 2 --freeze", set(LAYERS["cclm"][:3])),
    ("--suf 2 --freeze embeddings vision", {LAYERS["cclm"][0], EMBEDDINGS, VISION}),
    ("--suf --only less", set(LAYERS["cclm"][:3])),
    ("--lr-decay 0.5", set()),
])
def test_what_stays_and_what_moves(flags, still, tiny, tmp_path):
    run(train_command(tiny, "cclm", "xvnli", tmp_path / "run", *SMALL, *flags.split()))
    assert unmoved(tiny, "cclm", tmp_path / "run") == still
    if flags.startswith("--lr-decay"):  # the lower, the less
        before, after = weights(tiny, "cclm.pt"), weights(tmp_path / "run")
        distance = [(before[n] - after[n]).abs().mean().item() for n in LAYERS["cclm"]]
        assert distance == sorted(distance) and distance[0] < 0.2 * distance[-1]


def test_clipping_warm_up_and_mode(tiny, tmp_path, monkeypatch):
    """What reaches the optimizer is clipped to 1; warm-up is a share of all steps, not of an epoch;
    a model that has been evaluated trains in training mode."""
    norms, modes = [], []
    step, forward = torch.optim.AdamW.step, uc2.UC2.forward

    def stepping(optimizer, *rest):
        grouped = [group["params"] for group in optimizer.param_groups]
        gradients = [p.grad for group in grouped for p in group if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(optimizer, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    monkeypatch.setattr(
        uc2.UC2, "forward", lambda self, batch: modes.append(self.training) or forward(self, batch))
    run(train_command(tiny, "uc2", "xgqa", tmp_path / "run", *SMALL, "--eval-every-epoch"))
    assert all(modes) and norms == pytest.approx([1.0] * 4, abs=1e-4)
    assert all(entry["gradient_norm"] > 1.5 for entry in log(tmp_path / "run", "gradient_norm"))
    factors = [entry["lr_factor"] for entry in log(tmp_path / "run", "lr_factor")]
    assert factors == pytest.approx([0, 3 / 3.6, 2 / 3.6, 1 / 3.6])


def test_layers_that_thaw_late_get_the_references_updates():
    """AdamW with eps added before bias correction, where a parameter's own updates count."""
    recipe = train.Recipe(1, 1, 0.1, betas=(0.9, 0.98), eps=1e-3)
    late = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    group = {"params": [late], "peak_lr": 0.1, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([group], 0.0, recipe.betas, recipe.eps, fused=True)
    expected, mean, square = late.detach().clone(), torch.zeros(2), torch.zeros(2)
    for step in range(6):
        late.requires_grad_(step >= 3)
        train.set_rates(optimizer, 1.0, recipe)
        if late.requires_grad:
            late.grad = torch.tensor([1e-3, -2e-3]) * step
            mean, square = 0.9 * mean + 0.1 * late.grad, 0.98 * square + 0.02 * late.grad**2
            rate = 0.1 * math.sqrt(1 - 0.98 ** (step - 2)) / (1 - 0.9 ** (step - 2))
            expected -= rate * mean / (square.sqrt() + 1e-3)
        optimizer.step()
    assert torch.allclose(late, expected, atol=1e-6)


def test_dropout_differs_over_seed_step_and_part():
    drawn = set()
    for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        train.seed_part(*key)
        drawn.add(float(torch.rand(())))
    train.seed_part(0, 0, 0)
    assert len(drawn) == 4 and float(torch.rand(())) in drawn


def training_data(run, folder=None, augment=True, **settings):
    """train.training_data with the settings of a run, where given on other data."""
    args, recipe = evaluation.read_run(str(run))
    vars(args).update(settings)
    args.data, recipe.augment = str(folder or args.data), augment
    labels = data.read_labels(args.data) if args.task == "xgqa" else []
    return train.training_data(args, recipe, data.Tokenizer(args.tokenizer), labels, "train")


def test_a_recipe_without_augmentation_reaches_the_loader(runs):
    for augment in (True, False):
        _, batches = training_data(runs("cclm", "xgqa")[0], augment=augment)
        first, again = (batches.batch((epoch, np.arange(4)))["images"] for epoch in (0, 1))
        assert torch.equal(first, again) != augment


def test_xvnli_without_gold_label(tiny, runs, tmp_path):
    """IGLUE trains UC2 on "-", the released code of CCLM leaves these pairs out."""
    folder = shutil.copytree(tiny / "data", tmp_path / "data", copy_function=os.link)
    path = folder / "XVNLI/annotations/en/train.jsonl"
    first, *lines = path.read_text().splitlines()
    path.unlink()
    path.write_text("\n".join([json.dumps(json.loads(first) | {"gold_label": "-"}), *lines]))
    counts = [len(training_data(runs(m, "xvnli")[0], folder)[0]) for m in ("cclm", "uc2")]
    assert counts == [63, 64]


def test_the_mistake_in_iglues_code_is_only_made_if_asked_for(runs):
    for asked in (False, True):
        folder = runs("uc2", "xflickrco")[0]
        captions = training_data(folder, first_image_negatives=asked)[1].captions_of
        assert all(np.array_equal(some, captions[0]) for some in captions) == asked


def test_questions_per_image(tiny, tmp_path, monkeypatch):
    """Those of an image share batches, in the order of the run's seed."""
    seen, batch = [], data.TrainingBatches.batch
    monkeypatch.setattr(data.TrainingBatches, "batch", lambda self, item: (
        seen.append((self.examples, item[1].tolist())) or batch(self, item)))
    run(train_command(tiny, "cclm", "xgqa", tmp_path / "run", *SMALL, "--questions-per-image", 4,
                      "--epochs", 1, "--seed", 1))
    examples = seen[0][0]
    expected = data.epoch_batches(examples.lengths, 16, 1, 0, groups=examples.image_rows, group_size=4)
    assert [indices for _, indices in seen] == expected.tolist()


def without_dropout(tiny, folder, model, task):
    """-> a tiny checkpoint whose recipe drops nothing."""
    file = torch.load(tiny / f"{model}.pt", weights_only=True)
    file["config"]["recipe"][task] |= {"dropout": 0.0, "drop_path": 0.0}
    torch.save(file, folder / "no-dropout.pt")
    return ["--checkpoint", folder / "no-dropout.pt"]


@pytest.mark.parametrize("model, name", [("cclm", "decoder.embeddings.word.weight"),
                                         ("uc2", "answer_head.3.weight")])
def test_what_no_checkpoint_provides(model, name, tiny, tmp_path):
    """New weights start as BERT's and differ over seeds; dropout is the recipe's."""
    found = []
    for seed in "01":
        args = parse(model, "xgqa", "--seed", seed)
        _, args.checkpoint = without_dropout(tiny, tmp_path, model, "xgqa")
        loaded = train.load_model(args, "cpu", 500)[0]
        found.append(loaded.get_parameter(name))
    assert not torch.equal(*found) and 0.019 < found[0].std() < 0.021
    for module in loaded.modules():
        assert getattr(module, "p", 0) == getattr(module, "drop_path", 0) == 0


def test_compile_across_phases_equals_eager(tiny, tmp_path, monkeypatch):
    """--compile gives the weights of the run without, over two phases of the schedule.

    Traced as always, but not turned into machine code, which takes a minute.
    """
    flags = ["--suf", *SMALL, *without_dropout(tiny, tmp_path, "uc2", "xvnli")]
    run(train_command(tiny, "uc2", "xvnli", tmp_path / "eager", *flags))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    run(train_command(tiny, "uc2", "xvnli", tmp_path / "compiled", *flags, "--compile"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4
    assert_close_runs(tmp_path / "eager", tmp_path / "compiled")


# ---- Few-shot

def test_few_shot(runs, tmp_path):
    english, folder = runs("cclm", "xgqa")[0], tmp_path / "few"
    flags = ["de", "--shots", 5, "--init", english, "--run-dir", folder]
    output = run(flags, few_shot.main)
    results = read_json(folder / "results.json")
    assert list(results["languages"]) == ["en", "de"]
    scores = []
    for rate in ("0.001", "0.0001"):
        entries = log(folder / f"lr-{rate}", "development")
        scores += [entry["development"] for entry in entries]
    assert len(scores) == 4 and results["development"] == max(scores)
    # xGQA: chosen on the language's own development data
    assert "xGQA/annotations/few_shot/de/dev.json" in output and "on 5 images" in output
    assert "already here" in refused(run, flags, few_shot.main)
    assert "is complete" in run([*flags, "--resume"], few_shot.main)
    wrong = ["xx", *flags[1:5], "--run-dir", tmp_path / "no"]
    assert "xx" in refused(run, wrong, few_shot.main)


def test_few_shot_takes_the_first_of_equal_rates(runs, tmp_path, monkeypatch):
    """Scores 60 with the first rate, 50 with the second: the first rate's weights are tested."""
    loaded, load = [], evaluation.load_weights

    def noted(path, *rest, **options):
        loaded.append(path)
        return load(path, *rest, **options)

    def trained(args, recipe, *rest):
        weights = f"{args.init}/model.pt?{recipe.lr:g}"
        shutil.copy(f"{args.init}/model.pt", weights)
        return {"development": 60.0 if recipe.lr == 1e-3 else 50.0, "epoch": 1, "weights": weights}

    monkeypatch.setattr(evaluation, "load_weights", noted)
    monkeypatch.setattr(few_shot, "train_with", trained)
    english = shutil.copytree(runs("uc2", "xvnli")[0], tmp_path / "english")
    run(["ar", "--shots", 1, "--init", english, "--run-dir", tmp_path / "few"], few_shot.main)
    assert loaded[-1].endswith("?0.001")


def test_few_shot_negatives_of_uc2_are_random(runs, tmp_path):
    """IGLUE's hard_negative.pkl belongs to the training split alone, though it knows the images."""
    args, recipe = evaluation.read_run(str(runs("uc2", "xflickrco")[0]))
    args.few_shot, args.shots = "de", 25
    args.data = str(shutil.copytree(args.data, tmp_path / "data"))
    shots = data.read_records(args.data, "xflickrco", "few-shot", "de", 25)[1]
    similar = {"train_image_list": [shot.image for shot in shots],
               "train_hard_pool": [[i, 0, 1] for i in range(25)]}
    (tmp_path / "data/flickr30k/hard_negative.pkl").write_bytes(pickle.dumps(similar))
    _, batches = train.training_data(args, recipe, data.Tokenizer(args.tokenizer), [], "few-shot")
    hard = set()
    for epoch in range(40):
        batch = batches.batch((epoch, np.array([0])))
        hard.add(tuple(batch["input_ids"][int(batch["text_index"][3])].tolist()))
    assert len(hard) > 2


# ---- What is refused, and what is told

@pytest.mark.parametrize("model, task, flags, part", [
    ("cclm", "xgqa", ["--train-top", -1], "--train-top cannot be -1"),
    ("cclm", "xgqa", ["--lr-decay", 1.5], "--lr-decay cannot be 1.5"),
    ("cclm", "xgqa", ["--lr", "nan"], "--lr cannot be nan"),
    ("cclm", "xgqa", ["--suf", "--lr-decay", 0.5], "are alternatives"),
    ("cclm", "xgqa", ["--order", "random"], "belong to --suf, which is not given"),
    ("cclm", "xgqa", ["--data", "", "--tokenizer", ""], "go together"),
    ("cclm", "xflickrco", ["--questions-per-image", 2], "--questions-per-image: CCLM's"),
    ("cclm", "xflickrco", ["--grad-accum", 16], "2 pair(s) may all be of one image"),
    ("cclm", "xgqa", ["--grad-accum", 5], "cannot be split evenly over 1 process(es) x 5"),
    ("uc2", "xgqa", ["--batch-size", 4096], "128 training examples do not fill one batch of 4096"),
    ("uc2", "xgqa", ["--run-dir", ROOT / "train.py" / "run"], "Not a directory"),
    ("uc2", "xvnli", ["--checkpoint", "uc2.pt"], "9"),
    ("uc2", "xgqa", ["--checkpoint", "no.pt"], "no.pt"),
    ("uc2", "xgqa", ["--data", "nowhere"], "nowhere"),
])
def test_refused(model, task, flags, part, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "uc2.pt" in flags:
        save_tiny_checkpoints(tmp_path, feature_width=9)
    error = refused(run, train_command(tiny, model, task, tmp_path / "run", *flags))
    assert part in error and not (tmp_path / "run").exists()


def test_world_size_without_torchrun(tiny, tmp_path, monkeypatch):
    """A cluster may export it; one line instead of a traceback or a wait."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    error = refused(run, train_command(tiny, "uc2", "xvnli", tmp_path / "run"))
    assert error.startswith("WORLD_SIZE is set, but not all of RANK")


def test_a_full_disk_is_told_at_the_start(tiny, tmp_path, monkeypatch):
    usage = type(shutil.disk_usage("."))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 100))
    assert "0.0 GB free" in refused(run, train_command(tiny, "uc2", "xvnli", tmp_path / "run"))


def test_a_run_is_not_overwritten_and_not_mixed(tiny, tmp_path):
    folder = tmp_path / "run"
    flags = train_command(tiny, "uc2", "xvnli", folder, *SMALL)
    run(flags)
    error = refused(run, flags)
    assert f"{folder}: a run is already here" in error and f"--run-dir {folder}-2" in error
    assert "is complete" in run([*flags, "--resume"])
    read = read_json(folder / "args.json")["fingerprints"]
    assert {"en/train.jsonl", "en/test.jsonl", "ru/test.jsonl", "uc2.pt"} <= {
        name.removeprefix(f"{tiny.name}/") for name in read}
    other = torch.load(tiny / "uc2.pt", weights_only=True)
    other["model"]["bert.t_pooler.dense.bias"] += 1
    (tmp_path / "other").mkdir()
    torch.save(other, tmp_path / "other" / "uc2.pt")
    (folder / "results.json").unlink()
    for change, part in {("--suf", 2): "strategy was standard, now suf2",
                         ("--lr", 0.5): "lr was 0.001, now 0.5",
                         ("--seed", 1): "seed was 0, now 1",
                         ("--limit", 48): "limit was 32, now 48",
                         ("--precision", "bf16"): "precision was float32, now bf16",
                         ("--checkpoint", tmp_path / "other/uc2.pt"): "uc2.pt was"}.items():
        error = refused(run, [*flags, "--resume", *change])
        assert "cannot resume with other settings: " in error and part in error


def test_numbers_that_go_wrong_stop_the_run(tiny, tmp_path):
    error = refused(run, train_command(tiny, "uc2", "xvnli", tmp_path / "run", "--lr", "1e15"))
    assert "at step 3, on the records " in error


# ---- Stopping and going on

IN_TWO_PHASES = ["--limit", 64, "--batch-size", 16, "--suf", "--eval-every-epoch", "--epochs", 3,
                 "--grad-accum", 2]


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(train_command(tiny, "cclm", "xvnli", folder / "run", *IN_TWO_PHASES))
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
    assert not (folder / "results.json").exists(), "the run ended before the signal came"
    return process.returncode, output, errors


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_resumed_equals_uninterrupted(number, tiny, uninterrupted, tmp_path):
    """Dropout, stochastic depth, augmentation in loader processes, accumulation, phases: the same
    bits. SIGTERM goes to the whole process group, as `timeout` and cluster schedulers send it."""
    folder = tmp_path / "broken"
    flags = train_command(tiny, "cclm", "xvnli", folder, *IN_TWO_PHASES)
    code, output, errors = stopped([*flags, "--workers", "1"], folder, 5, number)
    if number == signal.SIGTERM:
        assert code == 128 + number and "stopped and saved after step" in output and errors == ""
    run([*flags, "--resume"])
    assert_same_run(uninterrupted, folder)


@pytest.mark.parametrize("module, function, number", [
    (data, "load_examples", signal.SIGINT), (evaluation, "evaluate", signal.SIGTERM)])
def test_signals_outside_a_step_end_at_once(module, function, number, tiny, tmp_path, monkeypatch):
    def signalled(*args, **options):
        os.kill(os.getpid(), number)
        pytest.fail("the run went on")

    flags = train_command(tiny, "uc2", "xvnli", tmp_path / "run", *SMALL, "--eval-every-epoch")
    monkeypatch.setattr(module, function, signalled)
    assert refused(run, flags) == str(128 + number)
    if function == "evaluate":  # the epoch before is saved, and evaluated when the run goes on
        monkeypatch.undo()
        assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 2
        run([*flags, "--resume"])
        run([*flags, "--run-dir", tmp_path / "whole"])
        assert_same_run(tmp_path / "whole", tmp_path / "run")


# ---- Several processes

RESUMED = [("cclm", "xflickrco"), ("uc2", "xgqa")]


def alone(commands):
    for flags in commands:
        run(flags)


def one_of_two(rank, folder, commands, broken):
    """Run all commands as one of two processes; those in `broken` stop in step 4 and are resumed."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    alone(commands)
    set_rates = train.set_rates
    for flags in broken:
        steps = iter(range(3))
        train.set_rates = lambda *arguments: (next(steps), set_rates(*arguments))
        with pytest.raises(StopIteration):
            run(flags)
        train.set_rates = set_rates
        run([*flags, "--resume"])


@pytest.fixture(scope="module")
def one_and_two(tiny, tmp_path_factory):
    """Every model and task in one process with two parts per batch; in two processes with one part
    each; and some again in two, stopped in the second phase and resumed."""
    folder = tmp_path_factory.mktemp("processes")
    no_dropout = without_dropout(tiny, folder, "cclm", "xflickrco")

    def commands(parts, name, *more):
        found = []
        for pair in RESUMED if name == "resumed" else PAIRS:
            flags = ["--suf", *SMALL, "--grad-accum", parts, *more]
            if pair[1] == "xflickrco":
                flags += PAIRED
            # one batch of 8 pairs against two gathered ones of 4; dropout is drawn per part
            if pair == ("cclm", "xflickrco"):
                flags += ["--grad-accum", 1, *no_dropout]
            found.append(train_command(tiny, *pair, folder / "-".join((*pair, name)), *flags))
        return found

    # deterministic: every operation in use must have a way for it; a setting of all torch
    jobs = [(alone, commands(2, "1", "--deterministic"))]
    for rank in range(2):
        jobs.append((one_of_two, rank, folder, commands(1, "2"), commands(1, "resumed")))
    assert run_processes(*jobs) == [0, 0, 0]
    return folder


@pytest.mark.parametrize("model, task", PAIRS)
def test_two_processes_equal_one(model, task, one_and_two):
    """Gradients, weights and results, across a phase change. For CCLM on xFlickrCO the contrastive
    batch is the union of the processes' batches, gathered with gradients."""
    assert_close_runs(one_and_two / f"{model}-{task}-1", one_and_two / f"{model}-{task}-2")


@pytest.mark.parametrize("model, task", RESUMED)
def test_two_processes_resumed_equal_uninterrupted(model, task, one_and_two):
    assert_same_run(one_and_two / f"{model}-{task}-2", one_and_two / f"{model}-{task}-resumed")


def test_two_processes_stop_by_a_signal_and_another_number_goes_on(tiny, tmp_path):
    """SIGTERM to torchrun: all save and end. One process with two parts per batch goes on with the
    same run; where parts would differ, it is refused."""
    flags = [*SMALL, "--suf", "--epochs", 8]
    run(train_command(tiny, "uc2", "xvnli", tmp_path / "whole", *flags, "--grad-accum", 2))
    folder = tmp_path / "broken"
    two = train_command(tiny, "uc2", "xvnli", folder, *flags, "--grad-accum", 1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                "--master_port", str(20000 + os.getpid() % 20000)]
    stopped(two, folder, 3, signal.SIGTERM, torchrun)
    assert "processes x accumulation was 2, now 1" in refused(run, [*two, "--resume"])
    run([*two, "--grad-accum", "2", "--resume"])
    assert_close_runs(tmp_path / "whole", folder)


def one_that_fails(rank, folder, flags):
    """One of two processes; the first one has too few records."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    os.dup2(os.open(folder / f"errors{rank}", os.O_WRONLY | os.O_CREAT), 2)
    limit = ["--limit", "8"] if rank == 0 else []
    evaluation.command(lambda: train.main([*flags, *limit]))


def test_one_failing_process_ends_all(tiny, tmp_path):
    """Its one line, and one line of the other process."""
    flags = train_command(tiny, "uc2", "xvnli", tmp_path / "run")
    codes = run_processes(*((one_that_fails, rank, tmp_path, flags) for rank in range(2)))
    first, second = ((tmp_path / f"errors{rank}").read_text() for rank in range(2))
    assert codes == [2, 2] and "Traceback" not in first + second
    assert "8 training examples do not fill" in first and "process 1 has lost the conn" in second
    assert not (tmp_path / "run" / "results.json").exists()
