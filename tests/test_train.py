"""train.py on tiny random checkpoints: every model, task and strategy; stopping and going on; several processes.

What is stopped, and what runs in several processes, are processes of their own, as a user starts them. The rest runs
in this one: starting an interpreter takes longer than these runs.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, save_tiny_checkpoints, train_command

import data
import eval as evaluation
import recipes
import run_folder
import train

PAIRS = [(model, task) for model in ("cclm", "uc2") for task in ("xgqa", "xvnli", "xflickrco")]


@pytest.fixture(autouse=True)
def signals():
    """A run in this process handles signals; afterwards all is as it was."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start(command):
    """Run a command line in a process of its own. -> what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def run(command):
    """Run a command line of train.py in this process. -> what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        train.main(command[2:])
    return output.getvalue()


def refused(command):
    """-> the one line with which a command line ends."""
    with pytest.raises(SystemExit) as end:
        run(command)
    error = str(end.value.code)
    assert error.startswith("error: ") and "\n" not in error
    return error


def weights(folder, name="model.pt"):
    return torch.load(folder / name, weights_only=True)["model"]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_run(a, b):
    """Weights, log, results and predictions, bit for bit."""
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    names = ["log.jsonl", "results.json", *(f"predictions/{path.name}" for path in (a / "predictions").iterdir())]
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Function: (folder, output) of a finished --suf run of a model and task, made when first asked for."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def get(model, task):
        if (model, task) not in made:
            limit = 64 if task == "xflickrco" else 128  # pairs grow with the square
            flags = ["--suf", "--eval-every-epoch", "--limit", limit]
            go = start if (model, task) == PAIRS[0] else run
            made[model, task] = folder / f"{model}-{task}", go(
                train_command(tiny, model, task, folder / f"{model}-{task}", *flags))
        return made[model, task]

    return get


# ---------------------------------------------------------------------------------------------------------------------
# Every model and task


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
            assert len(predictions) == scores["n_texts"] + scores["n_images"] == 128
            assert 0 <= scores["text_recall_at_1"] <= scores["text_recall_at_5"] <= scores["text_recall_at_10"] <= 100
        else:
            assert len(predictions) == scores["n"] == 128
            assert sum(part["n"] for part in scores["by_type"].values()) == 128
            assert scores["accuracy"] == pytest.approx(
                sum(part["accuracy"] * part["n"] for part in scores["by_type"].values()) / 128)
    others = [scores for language, scores in results["languages"].items() if language != "en"]
    metrics = ({"mean_zero_shot": "accuracy"} if task != "xflickrco"
               else {name: name for name in ("text_recall_at_1", "image_recall_at_1")})
    means = results if task != "xflickrco" else results["mean_zero_shot"]
    for name, metric in metrics.items():
        assert means[name] == pytest.approx(sum(scores[metric] for scores in others) / len(others))
    ours = json.loads((folder / "args.json").read_text())["args"]
    after = vars(recipes.parse_args(shlex.split(output.splitlines()[-1].split("python train.py ")[1]), None))
    compared = ("model", "task", "data", "checkpoint", "tokenizer", "seed", *run_folder.RECIPE_FLAGS)
    assert not after["suf"] and [after[name] for name in compared] == [ours[name] for name in compared]
    assert [entry["epoch"] for entry in log(folder) if "languages" in entry and "epoch" in entry] == [1]
    assert sum("loss" in entry for entry in log(folder)) == 2 * (2 if task == "xflickrco" else 4)


@pytest.mark.parametrize("model, task", PAIRS)
def test_only_thawed_layers_move(model, task, tiny, runs):
    """After 2 epochs with k=1 the top two layers, the embeddings and the image encoder have moved; the
    layers below are the checkpoint's, bit for bit.
    """
    folder, _ = runs(model, task)
    before, after = weights(tiny, f"{model}.pt"), weights(folder)
    layers = {"cclm": ["text_encoder.encoder.layer.0.", "text_encoder.encoder.layer.1.",
                       "text_encoder.encoder.layer.2.", "cross_encoder.encoder.layer.0.",
                       "cross_encoder.encoder.layer.1."],
              "uc2": [f"bert.encoder.layer.{2 * i + 1}." for i in range(4)]}[model]
    for i, prefix in enumerate(layers):
        name = next(name for name in after if name.startswith(prefix) and name.endswith("dense.weight"))
        assert torch.equal(before[name], after[name]) == (i < len(layers) - 2), name
    embeddings = {"cclm": "text_encoder.embeddings.word_embeddings.weight",
                  "uc2": "bert.embeddings.word_embeddings.weight"}[model]
    assert not torch.equal(before[embeddings], after[embeddings])
    if model == "cclm":
        assert not torch.equal(before["vision_encoder.blocks.0.attn.qkv.weight"],
                               after["vision_encoder.blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("model, task", PAIRS)
def test_standard(model, task, tiny, tmp_path):
    run(train_command(tiny, model, task, tmp_path / "run", "--epochs", 1, "--limit", 32))
    before, after = weights(tiny, f"{model}.pt"), weights(tmp_path / "run")
    moved = [name for name in after if name in before and after[name].is_floating_point()
             and name.endswith("dense.weight") and "encoder" in name]
    # the first step of a schedule that warms up has rate 0: one step changes nothing but
    # weight decay's share, which is 0 too
    assert moved and all(torch.equal(before[name], after[name]) for name in moved)


@pytest.mark.parametrize("flags, still", [
    (["--train-top", 2],
     ["text_encoder.encoder.layer.2.output.dense.weight", "text_encoder.embeddings.word_embeddings.weight"]),
    (["--train-top", 2, "--freeze"], ["text_encoder.encoder.layer.2.output.dense.weight"]),
    (["--suf", 2, "--freeze", "embeddings", "vision"],
     ["text_encoder.encoder.layer.0.output.dense.weight", "text_encoder.embeddings.word_embeddings.weight",
      "vision_encoder.blocks.0.attn.qkv.weight"]),
    (["--suf", "--order", "bottom-up"],
     ["cross_encoder.encoder.layer.1.output.dense.weight", "cross_encoder.encoder.layer.0.output.dense.weight",
      "text_encoder.encoder.layer.2.output.dense.weight"]),
    (["--lr-decay", 0.5], []),
], ids=["top", "top with embeddings", "suf 2 frozen", "bottom-up", "decay"])
def test_strategies(flags, still, tiny, tmp_path):
    run(train_command(tiny, "cclm", "xgqa", tmp_path / "run", *flags))
    before, after = weights(tiny, "cclm.pt"), weights(tmp_path / "run")
    watched = [name for name in before if name in after
               and name.endswith(("output.dense.weight", "word_embeddings.weight", "qkv.weight"))]
    assert {name for name in watched if torch.equal(before[name], after[name])} >= set(still)
    moved = {name for name in watched if not torch.equal(before[name], after[name])}
    assert not moved & set(still) and "cross_encoder.encoder.layer.1.output.dense.weight" in moved | set(still)
    if flags[0] == "--lr-decay":  # the lower, the less
        layers = [f"text_encoder.encoder.layer.{i}.output.dense.weight" for i in range(3)]
        layers += [f"cross_encoder.encoder.layer.{i}.output.dense.weight" for i in range(2)]
        distance = [(before[name] - after[name]).abs().mean().item() for name in layers]
        assert distance == sorted(distance) and distance[0] < 0.2 * distance[-1]


def test_layers_that_unfreeze_late_get_the_references_updates():
    """AdamW as in the references, eps added before bias correction, where a parameter's own updates count."""
    recipe = train.Recipe(epochs=1, batch_size=1, lr=0.1, betas=(0.9, 0.98), eps=1e-3)
    early, late = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    groups = [{"params": [parameter], "peak_lr": 0.1, "weight_decay": 0.0} for parameter in (early, late)]
    optimizer = train.make_optimizer(groups, recipe)
    gradients = 1e-3 * torch.randn(6, 2, generator=torch.Generator().manual_seed(0))

    expected = [parameter.detach().clone() for parameter in (early, late)]
    for value, used in zip(expected, (gradients, gradients[3:])):
        mean, square = torch.zeros(2), torch.zeros(2)
        for n, gradient in enumerate(used, start=1):
            mean, square = 0.9 * mean + 0.1 * gradient, 0.98 * square + 0.02 * gradient ** 2
            value -= 0.1 * math.sqrt(1 - 0.98 ** n) / (1 - 0.9 ** n) * mean / (square.sqrt() + 1e-3)
    for step, gradient in enumerate(gradients):
        late.requires_grad_(step >= 3)
        train.set_rates(optimizer, 1.0, recipe)
        for parameter in (early, late):
            parameter.grad = gradient.clone() if parameter.requires_grad else None
        optimizer.step()
    assert torch.allclose(early, expected[0], atol=1e-6) and torch.allclose(late, expected[1], atol=1e-6)


def test_few_shot(tiny, runs, tmp_path):
    english, _ = runs("cclm", "xgqa")
    command = [sys.executable, str(ROOT / "train.py"), "--few-shot", "de", "--shots", "5", "--init", str(english),
               "--run-dir", str(tmp_path / "few"), "--workers", "0"]
    output = run([*command, "--limit", "48"])
    results = json.loads((tmp_path / "few" / "results.json").read_text())
    assert list(results["languages"]) == ["en", "de"] and results["shots"] == 5
    scores = {rate: [entry["development"] for entry in log(tmp_path / "few" / f"lr-{rate}") if "development" in entry]
              for rate in ("0.001", "0.0001")}
    assert results["development"] == max(map(max, scores.values())) and all(len(part) == 2 for part in scores.values())
    assert "on 5 images (5 shots)" in output and "chosen on" in output


def test_few_shot_negatives_of_uc2_are_random(runs, tmp_path):
    """In IGLUE's code hard_negative.pkl belongs to the split called train alone, though it knows the shots' images."""
    args, recipe = evaluation.read_run(str(runs("uc2", "xflickrco")[0]))
    args.few_shot, args.shots, args.data = "de", 25, str(shutil.copytree(args.data, tmp_path / "data"))
    shots = data.read_records(args.data, "xflickrco", "few-shot", "de", 25)[1]
    similar = {"train_image_list": [shot.image for shot in shots], "train_hard_pool": [[i, 0, 1] for i in range(25)]}
    (tmp_path / "data/flickr30k/hard_negative.pkl").write_bytes(pickle.dumps(similar))
    examples, batches = train.training_data(args, recipe, data.Tokenizer(args.tokenizer), [], "few-shot")
    drawn = [batches[epoch, np.array([0])] for epoch in range(40)]
    rows = [(batch, int(batch["text_index"][3])) for batch in drawn]
    hard = {tuple(batch["input_ids"][row, : batch["attention_mask"][row].sum()].tolist()) for batch, row in rows}
    assert len(hard) > 2 and len(examples) == 25
    read = run_folder.input_files(args, examples, argparse.Namespace(examples={}), batches.pictures)
    assert not any(path.endswith("hard_negative.pkl") for path in read)


@pytest.mark.parametrize("flags", [["--questions-per-image", 4], ["--image-cache", "cache"]], ids=["shared", "cached"])
def test_faster_ways(flags, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(train_command(tiny, "cclm", "xgqa", tmp_path / "run", *flags, "--epochs", 1))
    assert len(log(tmp_path / "run")) == 5 and all(entry.get("loss", 1.0) > 0 for entry in log(tmp_path / "run"))
    assert (flags[0] == "--image-cache") == any(tmp_path.glob("cache/*.npy"))


def test_compile_across_phases(tiny, tmp_path, monkeypatch):
    """--compile gives the weights of the run without, over two phases of the schedule.

    Traced and differentiated ahead of time as always, but not turned into machine code, which takes a minute.
    """
    file = torch.load(tiny / "cclm.pt", weights_only=True)
    file["config"]["recipe"]["xgqa"] = file["config"]["recipe"]["xgqa"] | {"dropout": 0.0, "drop_path": 0.0}
    torch.save(file, tmp_path / "no-dropout.pt")
    flags = ["--suf", "--epochs", 2, "--limit", 64, "--checkpoint", tmp_path / "no-dropout.pt"]
    run(train_command(tiny, "cclm", "xgqa", tmp_path / "eager", *flags))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled = torch._dynamo.utils.counters["stats"]
    run(train_command(tiny, "cclm", "xgqa", tmp_path / "compiled", *flags, "--compile"))
    # in each of two phases: ViT block; text, cross-modal and answer layer, frozen and trained; and once for evaluation
    assert 8 <= compiled["unique_graphs"] <= 20 and not torch._dynamo.utils.counters["graph_break"]
    assert_close_runs(tmp_path / "eager", tmp_path / "compiled")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and what is told


@pytest.mark.parametrize("model, task, flags, part", [
    ("cclm", "xgqa", ["--train-top", 99], "--train-top 99: the model has 5 layers"),
    ("cclm", "xgqa", ["--train-top", -1], "must not be negative"),
    ("cclm", "xgqa", ["--lr-decay", 1.5], "--lr-decay must be at most 1, got 1.5"),
    ("cclm", "xgqa", ["--lr-decay", "nan"], "--lr-decay must be positive, got nan"),
    ("cclm", "xgqa", ["--lr", "inf"], "--lr must be positive, got inf"),
    ("uc2", "xgqa", ["--seed", 2**63], "--seed must be less than 2**63"),
    ("cclm", "xgqa", ["--first-image-negatives"], "UC2's training on xFlickrCO alone"),
    ("cclm", "xflickrco", ["--questions-per-image", 2], "--questions-per-image: CCLM's"),
    ("cclm", "xflickrco", ["--grad-accum", 16], "2 pair(s) may all be of one image, which has up to 2 captions"),
    ("uc2", "xgqa", ["--vision-lr", 1e-3], "--vision-lr: UC2 has no image encoder"),
    ("uc2", "xgqa", ["--image-cache", "cache"], "--image-cache: UC2 has no image encoder"),
    ("uc2", "xgqa", ["--run-dir", ROOT / "train.py" / "run"], "cannot write there (Not a directory)"),
    ("uc2", "xvnli", ["--checkpoint", "wide/uc2.pt"], "the checkpoint reads 9"),
])
def test_refused(model, task, flags, part, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "wide/uc2.pt" in flags:
        (tmp_path / "wide").mkdir()
        save_tiny_checkpoints(tmp_path / "wide", tiny / "tokenizer.model", 9)
    with pytest.raises(SystemExit) as end:
        train.main(train_command(tiny, model, task, tmp_path / "run", *flags)[2:])
    lines = [line for line in f"{end.value.code}\n{capsys.readouterr().err}".splitlines() if "error: " in line]
    assert len(lines) == 1 and part in lines[0] and not (tmp_path / "run").exists()


def test_answers_that_are_no_label_are_told(tiny, tmp_path):
    folder = shutil.copytree(tiny / "data", tmp_path / "data", copy_function=os.link)
    path = next(folder.glob("xGQA/annotations/few_shot/de/test.json"))
    questions = json.loads(path.read_text())
    for question in list(questions.values())[:2]:
        question["answer"] = "no label"
    path.unlink()
    path.write_text(json.dumps(questions))
    output = run(train_command(tiny, "uc2", "xgqa", tmp_path / "run", "--data", folder, "--dry-run"))
    assert "note: test answers that are no label, and count as wrong: de 2\n" in output


def test_versions_and_fingerprints(tiny, runs, monkeypatch):
    folder, _ = runs("uc2", "xflickrco")
    stored = json.loads((folder / "args.json").read_text())
    assert stored["versions"].keys() == {"python", "torch", "torchvision", "numpy", "sentencepiece", "pillow", "commit",
                                         "uncommitted_changes"}
    names = {os.path.basename(path) for path in stored["fingerprints"]}
    assert names >= {"train_ann.jsonl", "test.jsonl", "uc2.pt", "tokenizer.model", "meta.json", "ids.txt",
                     "hard_negative.pkl"}
    tests = tiny / "data" / "xFlickrCO" / "annotations"
    assert stored["fingerprints"].keys() >= {str(tests / language / "test.jsonl") for language in ("en", "zh")}
    monkeypatch.setenv("PATH", "")  # git is not there
    assert run_folder.versions()["commit"] is run_folder.versions()["uncommitted_changes"] is None


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and going on


def stopped_run(command, folder, at_step, number):
    """Start a run, and end it with a signal as soon as its log has reached a step."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if (folder / "last.pt").exists() and torch.load(folder / "last.pt", weights_only=True)["step"] >= at_step:
            break
        time.sleep(0.05)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


IN_TWO_PHASES = ["--suf", "--eval-every-epoch", "--grad-accum", 2, "--save-every", 1, "--epochs", 3]


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(train_command(tiny, "cclm", "xgqa", folder / "run", *IN_TWO_PHASES))
    return folder / "run"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_resumed_equals_uninterrupted(number, tiny, uninterrupted, tmp_path):
    """Dropout, stochastic depth, augmentation in worker processes, accumulation, two phases: bit for bit the same."""
    broken = train_command(tiny, "cclm", "xgqa", tmp_path / "broken", *IN_TWO_PHASES)
    code, output, _ = stopped_run([*broken, "--workers", "1"], tmp_path / "broken", 5, number)
    assert not (tmp_path / "broken" / "results.json").exists(), "the run ended before the signal came"
    assert code == -signal.SIGKILL or code == 128 + signal.SIGTERM and "--resume" in output
    run([*broken, "--resume"])
    assert_same_run(uninterrupted, tmp_path / "broken")


@pytest.mark.parametrize("module, function", [(train.data, "load_examples"), (train.evaluation, "evaluate")],
                         ids=["loading", "evaluating"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_outside_a_step_end_at_once(module, function, number, tiny, tmp_path, monkeypatch, capsys):
    def signalled(*args, **options):
        os.kill(os.getpid(), number)
        pytest.fail("the run went on")

    command = train_command(tiny, "uc2", "xvnli", tmp_path / "run", "--eval-every-epoch")
    monkeypatch.setattr(module, function, signalled)
    with pytest.raises(SystemExit) as end:
        train.main(command[2:])
    assert end.value.code == 128 + number and "--resume goes on" in capsys.readouterr().out
    if function == "evaluate":  # the epoch before it is saved, and is evaluated when the run goes on
        monkeypatch.undo()
        assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 4
        run([*command, "--resume"])
        run(train_command(tiny, "uc2", "xvnli", tmp_path / "whole", "--eval-every-epoch"))
        assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_damaged_states_are_told(tiny, tmp_path):
    folder = tmp_path / "run"
    command = train_command(tiny, "uc2", "xvnli", folder)
    run(command)
    assert "a run is already here" in refused(command)
    assert "is complete" in run([*command, "--resume"])
    assert "cannot resume with other settings: suf was None, now 2" in refused([*command, "--resume", "--suf", "2"])
    (folder / "results.json").unlink()
    before = (folder / "args.json").read_bytes()
    assert "cannot resume with other settings: lr was 0.001, now 0.5" in refused([*command, "--resume", "--lr", "0.5"])
    assert (folder / "args.json").read_bytes() == before

    lines = (folder / "log.jsonl").read_text().splitlines(True)
    for line, part in ((lines[1][:9] + "\n", "malformed JSON"), ("[]\n", "with the field 'step'")):
        (folder / "log.jsonl").write_text("".join([lines[0], line, *lines[2:]]))
        error = refused([*command, "--resume"])
        assert "log.jsonl, line 2: " in error and part in error
    (folder / "log.jsonl").write_text("".join(lines[2:]))
    assert "log.jsonl: it has 6 steps, last.pt is from step 8" in refused([*command, "--resume"])
    (folder / "log.jsonl").write_text("".join(lines))
    assert "precision was float32, now bf16" in refused([*command, "--resume", "--precision", "bf16"])
    state = torch.load(folder / "last.pt", weights_only=True)
    _, *others = state["model"]
    some = {name: state["model"][name] for name in others}
    moments = {0: {name: torch.zeros(3) for name in ("step", "exp_avg", "exp_avg_sq")}}
    for damage in ({"optimizer": []}, {"optimizer": state["optimizer"] | {"state": moments}}, {"step": "x"},
                   {"step": -3}, {"settings": 1}, {"model": some}):
        torch.save(state | damage, folder / "last.pt")
        assert "last.pt: not a readable state, or a truncated one" in refused([*command, "--resume"])
    torch.save(state, folder / "last.pt")
    sound = (folder / "last.pt").read_bytes()
    for spoilt in (sound[:1000], sound[:5000] + bytes([sound[5000] ^ 1]) + sound[5001:]):
        (folder / "last.pt").write_bytes(spoilt)
        assert "last.pt: not a readable state, or a truncated one" in refused([*command, "--resume"])
    torch.save(state | {"step": 10 ** 9}, folder / "last.pt")
    assert "its last.pt is from step 1000000000 of 8" in refused([*command, "--resume"])
    assert "nothing to resume yet, starting" in run(train_command(tiny, "uc2", "xvnli", tmp_path / "none", "--resume"))

    stored = json.loads((tmp_path / "none" / "args.json").read_text())
    (tmp_path / "none" / "args.json").write_text(json.dumps(stored | {"recipe": stored["recipe"] | {"speed": 1}}))
    few_shot = ["train.py", "", "--few-shot", "ar", "--shots", "5", "--init", str(tmp_path / "none")]
    assert "args.json, recipe: unknown field 'speed'" in refused(few_shot)


def test_what_a_run_started_from_is_not_exchanged(tiny, tmp_path):
    """Another pace of SUF (--suf alone is True, which Python takes for 1), another checkpoint, for few-shot another
    English run: not resumed, whether the run is complete or not, and not taken for the run asked for.
    """
    file = torch.load(tiny / "uc2.pt", weights_only=True)
    file["config"]["recipe"]["xvnli"] = file["config"]["recipe"]["xvnli"] | {"suf_k": 3}
    torch.save(file, tmp_path / "three.pt")
    next(tensor for tensor in file["model"].values() if tensor.is_floating_point()).mul_(2)
    torch.save(file, tmp_path / "other.pt")
    suf, standard = tmp_path / "suf", tmp_path / "standard"
    command = [*train_command(tiny, "uc2", "xvnli", suf), "--suf", "--resume", "--checkpoint"]
    few_shot = ["train.py", "", "--few-shot", "ar", "--shots", "48", "--limit", "32", "--workers", "0",
                "--run-dir", str(tmp_path / "few"), "--resume", "--init"]
    run([*command, str(tmp_path / "three.pt")])
    run(train_command(tiny, "uc2", "xvnli", standard, "--checkpoint", tmp_path / "three.pt"))
    run([*few_shot, str(suf)])
    for complete in (True, False):
        assert "suf was True, now 1" in refused([*command, str(tmp_path / "three.pt"), "--suf", "1"])
        error = refused([*command, str(tmp_path / "other.pt")])
        assert f"did not start from {tmp_path / 'other.pt'}" in error if complete else "first weights was" in error
        error = refused([*few_shot, str(standard)])
        assert f"did not start from {standard / 'model.pt'}" in error if complete else "first weights was" in error
        if complete:
            assert "is complete" in run([*command, str(tmp_path / "three.pt")])
            assert "is complete" in run([*few_shot, f"{suf}/"])
            (tmp_path / "few" / "results.json").unlink()
            shutil.copy(suf / "results.json", tmp_path)
            (suf / "results.json").unlink()
    shutil.copy(tmp_path / "results.json", suf)
    run([*few_shot, str(suf)])


def test_numbers_that_go_wrong_stop_the_run(tiny, tmp_path):
    error = refused(train_command(tiny, "uc2", "xvnli", tmp_path / "run", "--lr", "1e30"))
    assert "nonfinite-0.json" in error
    report = json.loads((tmp_path / "run" / "nonfinite-0.json").read_text())
    assert len(report["records"]) == 32 and report["step"] > 1  # from 1; the rate of the first step is 0


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


PORT = 20000 + os.getpid() % 20000


def torchrun(command, *flags):
    flags = flags or ("--nproc_per_node", "2", "--master_port", str(PORT))
    return [sys.executable, "-m", "torch.distributed.run", *flags, *command[1:]]


@pytest.fixture(scope="module")
def one_and_two(tiny, tmp_path_factory):
    """Every model and task in one process with two parts per batch; in two processes with one part each; and again in
    two, stopped in the second phase and resumed. One start of two processes serves all.
    """
    folder = tmp_path_factory.mktemp("processes")
    file = torch.load(tiny / "cclm.pt", weights_only=True)
    file["config"]["recipe"]["xflickrco"] = file["config"]["recipe"]["xflickrco"] | {"dropout": 0.0, "drop_path": 0.0}
    torch.save(file, folder / "no-dropout.pt")

    def command(model, task, processes, name=None):
        flags = ["--suf", "--limit", 64, "--grad-accum", 2 // processes]
        # one batch of 32 pairs against two gathered ones of 16: no dropout, which is drawn per part
        if (model, task) == ("cclm", "xflickrco"):
            flags = ["--suf", "--limit", 64, "--grad-accum", 1, "--checkpoint", folder / "no-dropout.pt"]
        return train_command(tiny, model, task, folder / f"{model}-{task}-{name or processes}", *flags)

    # which every operation in use must have a way for; in a process of its own, because it is a setting of all torch
    alone = [[*command(*pair, 1)[2:], "--deterministic"] for pair in PAIRS]
    (folder / "alone.py").write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import train
for command in {alone!r}:
    train.main(command)
""")
    one_process = subprocess.Popen([sys.executable, str(folder / "alone.py")], stdout=subprocess.DEVNULL)
    whole, broken = ([command(*pair, 2, name)[2:] for pair in PAIRS] for name in ("2", "resumed"))
    (folder / "all.py").write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import train
train.dist.init_process_group("gloo")
for command in {whole!r}:
    train.main(command)
check = train.check_finite
def stop(run, step, *rest):
    if step == 4:
        raise SystemExit("stopped")
for command in {broken!r}:
    train.check_finite = stop
    try:
        train.main([*command, "--save-every", "1"])
    except SystemExit as end:
        assert end.code == "stopped"
    train.check_finite = check
    train.main([*command, "--resume"])
""")
    start(torchrun(["python", str(folder / "all.py")]))
    assert one_process.wait(timeout=120) == 0
    return folder


@pytest.mark.parametrize("model, task", PAIRS)
def test_two_processes_equal_one(model, task, one_and_two):
    """Gradients, weights and results, across a phase change.

    For CCLM on xFlickrCO the contrastive batch is the union of the processes' batches, gathered with gradients.
    """
    assert_close_runs(one_and_two / f"{model}-{task}-1", one_and_two / f"{model}-{task}-2")


@pytest.mark.parametrize("model, task", PAIRS)
def test_two_processes_resumed_equal_uninterrupted(model, task, one_and_two):
    assert_same_run(one_and_two / f"{model}-{task}-2", one_and_two / f"{model}-{task}-resumed")


def test_two_machines_equal_one_process(tiny, one_and_two):
    """Two torchruns that meet as those of two machines do, by the command of the README, on a disk that they share."""
    folder = one_and_two / "two-machines"
    command = train_command(tiny, "uc2", "xgqa", folder, "--suf", "--limit", 64, "--grad-accum", 1)
    meet = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint",
            f"127.0.0.1:{PORT + 1}"]
    machines = [subprocess.Popen(torchrun(command, *meet), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                for _ in range(2)]
    outputs = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert sum("mean of 7 others" in output for output in outputs) == 1  # only one of them reports
    assert_close_runs(one_and_two / "uc2-xgqa-1", folder)


def assert_close_runs(a, b, tolerance=2e-5):
    first, second = weights(a), weights(b)
    for name in first:
        if first[name].is_floating_point() and not name.endswith("key.bias"):
            assert (first[name] - second[name]).abs().max() < tolerance, name
    ours, theirs = (json.loads((folder / "results.json").read_text())["languages"] for folder in (a, b))
    assert all(ours[language].keys() == theirs[language].keys() for language in ours)
    # rounding may turn a near tie
    for metric in {"accuracy", "text_recall_at_1", "image_recall_at_1"} & ours["en"].keys():
        assert all(abs(ours[language][metric] - theirs[language][metric]) <= 100 / 32 for language in ours)
    for x, y in zip((entry for entry in log(a) if "loss" in entry), (entry for entry in log(b) if "loss" in entry),
                    strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        assert x["gradient_norm"] == pytest.approx(y["gradient_norm"], rel=1e-3)


def test_resume_with_other_processes(tiny, tmp_path):
    """Two processes stopped, one goes on with the same parts of each batch: the same run.

    Where parts or negatives would differ: refused.
    """
    flags = ["--suf", "--save-every", 1, "--epochs", 3]
    run(train_command(tiny, "uc2", "xgqa", tmp_path / "whole", *flags, "--grad-accum", 2))
    command = torchrun(train_command(tiny, "uc2", "xgqa", tmp_path / "broken", *flags, "--grad-accum", 1))
    stopped_run(command, tmp_path / "broken", 5, signal.SIGTERM)
    assert not (tmp_path / "broken" / "results.json").exists()
    alone = train_command(tiny, "uc2", "xgqa", tmp_path / "broken", *flags, "--resume")
    assert "processes x accumulation was 2, now 1" in refused([*alone, "--grad-accum", "1"])
    run([*alone, "--grad-accum", "2"])
    assert_close_runs(tmp_path / "whole", tmp_path / "broken")


def test_no_process_ends_before_what_was_done_is_saved(tiny, tmp_path):
    """The first process alone gets a signal and is slow to save: the other one waits, or torchrun would end the first
    as soon as the other one has ended.
    """
    command, ended = train_command(tiny, "uc2", "xvnli", tmp_path / "run", "--grad-accum", 1)[2:], tmp_path / "ended"
    (tmp_path / "stopped.py").write_text(f"""import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
train.dist.init_process_group("gloo")
write, check = train.write_tensors, train.check_finite
def slowly(*arguments):
    time.sleep(1)
    print("the other one has ended:", os.path.exists({str(ended)!r}))
    write(*arguments)
def signalled(run, step, *rest):
    if (step, train.ranks()[0]) == (2, 0):
        os.kill(os.getpid(), signal.SIGTERM)
train.write_tensors, train.check_finite = slowly, signalled
try:
    train.main({command!r})
finally:
    if train.ranks()[0] == 1:
        open({str(ended)!r}, "w").close()
""")
    done = subprocess.run(torchrun(["python", str(tmp_path / "stopped.py")]), capture_output=True, text=True,
                          timeout=120)
    assert "the other one has ended: False" in done.stdout, done.stdout + done.stderr
    assert done.returncode != 0 and ended.exists() and "stopped and saved after step " in done.stdout


@pytest.mark.parametrize("model", ["cclm", "uc2"])
def test_number_of_processes_is_a_setting_where_they_bring_negatives(model, runs):
    """UC2's negatives come from a file, whatever the processes: `test_two_processes_equal_one`."""
    folder, _ = runs(model, "xflickrco")
    settings = torch.load(folder / "last.pt", weights_only=True)["settings"]
    assert ("processes" in settings) == (model == "cclm")


def test_one_failing_process_ends_all(tiny, tmp_path):
    """A folder that only the first process looks at, states that differ, and in the end features that only one process
    cannot use: one line from each process that has something to tell, and no traceback.
    """
    folder = shutil.copytree(tiny / "data", tmp_path / "data", copy_function=os.link)
    path = folder / "flickr30k" / "features" / "features.npy"
    features = np.load(path)
    path.unlink()
    np.save(path, features * np.nan)
    wrong = train_command(tiny, "uc2", "xvnli", tmp_path / "run", "--save-every", 1, "--lr", "1e30")[2:]
    fine = train_command(tiny, "uc2", "xvnli", tmp_path / "fine")[2:]
    (tmp_path / "all.py").write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import train
train.dist.init_process_group("gloo")
rank = train.ranks()[0]
elsewhere, spoilt = (["--run-dir", {str(tmp_path / "other")!r}], ["--data", {str(folder)!r}]) if rank else ([], [])
for command in ({wrong!r}, {wrong!r}, [*{wrong!r}, *elsewhere, "--resume"]):
    try:
        train.main(command)
    except SystemExit as end:
        print(f"process {{rank}}: {{end.code}}", flush=True)
train.main([*{fine!r}, *spoilt])
""")
    done = subprocess.run(torchrun(["python", str(tmp_path / "all.py")]), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and not (tmp_path / "fine" / "results.json").exists()
    for part in ("nonfinite-0.json", "nonfinite-1.json", f"process 0: error: {tmp_path / 'run'}: a run is already here",
                 "process 1: 1", f"process 0: error: {tmp_path / 'run'}: the processes see different last.pt"):
        assert part in done.stdout, done.stdout
    assert "are not finite" in done.stderr and "process 0 has lost the connection" in done.stderr, done.stderr
    assert done.stderr.count("Traceback") == 1, done.stderr  # torchrun's own
