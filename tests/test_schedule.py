"""schedule.py: its functions by hand, its effect on real optimizers and adapters, what goes wrong when
it is held wrong, DDP, the preview against torch's FLOP counter, docs/schedule.md."""

import re
import shutil
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from conftest import ROOT, run_processes
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from schedule import (apply, backward_share, check_partition, layer_decay, parameters, rate_shares,
                      suf, train_top)

N = 6  # layers of the classifier
PAGE = (ROOT / "docs" / "schedule.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```(python|bash)\n([^`]*)```\s*```text\n([^`]*)```", PAGE)
OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)}


class Classifier(nn.Module):
    """Embedding, Transformer layers, head: what a schedule meets, as small as possible."""

    def __init__(self, width=16, num_layers=N):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.embedding, self.head = nn.Embedding(30, width), nn.Linear(width, 3)
        self.layers = nn.ModuleList(deepcopy(layer) for _ in range(num_layers))
        self.outside = [self.embedding, self.head]

    def forward(self, input_ids):
        hidden = self.embedding(input_ids)  # [B, T, D]
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden[:, 0])  # [B, 3]


def new_classifier(**sizes):
    torch.manual_seed(0)
    return Classifier(**sizes)


def backward(model, step, rank=0, ranks=1):
    """Gradients of a rank's share of the step's batch, as {name: gradient}."""
    generator = torch.Generator().manual_seed(1000 + step)
    input_ids, labels = torch.randint(30, (4, 5), generator=generator), torch.arange(4) % 3
    model.zero_grad()
    cross_entropy(model(input_ids.chunk(ranks)[rank]), labels.chunk(ranks)[rank]).backward()
    named = model.named_parameters()
    return {name.removeprefix("module."): p.grad.clone() for name, p in named if p.grad is not None}


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(before, model):
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}


def names_of(model, trainable):
    """Names of the parameters outside the layers and in those in `trainable`."""
    frozen = tuple(f"layers.{i}." for i in range(len(model.layers)) if i not in trainable)
    return {name for name, _ in model.named_parameters() if not name.startswith(frozen)}


# ---- Which layers train, and how fast

def test_which_layers_and_how_fast():
    for num_layers, counts in ((12, [3, 6, 9, 12, 12]), (18, [3, 6, 9, 12, 15])):  # the paper's table
        for epoch, count in enumerate(counts):
            assert suf(epoch, num_layers) == set(range(num_layers - count, num_layers))
    assert [suf(e, 4, 2, range(4)) for e in range(2)] == [{0, 1}, {0, 1, 2, 3}]  # bottom-up
    assert [suf(e, 5, 2, [2, 0, 4, 1, 3]) for e in range(2)] == [{0, 2}, {0, 1, 2, 4}]
    assert [train_top(18, 6), train_top(2, 2), train_top(2, 0)] == [{*range(12, 18)}, {0, 1}, set()]
    assert layer_decay(8.0, 0.5, 4) == [1.0, 2.0, 4.0, 8.0]
    # Section 5.2 speaks of 70% and 0.5% for the lowest of 18 layers; its formula gives these:
    assert layer_decay(1.0, 0.98, 18)[0] == pytest.approx(0.709, abs=0.001)
    assert layer_decay(1.0, 0.75, 18)[0] == pytest.approx(0.0075, abs=0.0001)


def test_rate_shares_by_hand():
    assert rate_shares([{1}, {1}, {0, 1}, {0, 1}], [0.5, 1.0, 0.5, 0.0], 3) == [0.25, 1.0, 0.0]
    assert rate_shares([{1}], [0.0], 2) == [0.0, 0.0]  # one step, in the warm-up
    assert rate_shares([set(), {0}], [0.75, 0.25], 1) == [0.25]  # nothing at first


@pytest.mark.parametrize("call, message", [
    (lambda: suf(-1, 12), "epoch must be at least 0"),
    (lambda: suf(0, 3, order=[0, 1, 1]), "order must name each of the 3 layers once, got [0, 1, 1]"),
    (lambda: layer_decay(1e-4, 0.0, 12), "decay must be in (0, 1], got 0.0"),
    (lambda: rate_shares([{0}], [1.0, 0.5], 1), "longer"),
    (lambda: apply([nn.Linear(2, 2)], {0, 10}), "within the layers 0..0, got [0, 10]"),
    (lambda: apply([nn.Linear(2, 2).parameters()], {0}), "not a generator"),
    (lambda: check_partition(nn.Linear(2, 2), ["layers.0"], []), "not a str"),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# ---- Training effect

@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_frozen_layers_stay_bit_identical_and_thawed_layers_move(optimizer_name):
    model = new_classifier()
    optimizer = OPTIMIZERS[optimizer_name](model)
    check_partition(model, model.layers, model.outside, optimizer)
    for trainable in [suf(0, N, 2), suf(1, N, 2), suf(2, N, 2), {1}, set()]:
        apply(model.layers, trainable)
        before = snapshot(model)
        for step in range(3):
            backward(model, step)
            optimizer.step()
        assert moved(before, model) == names_of(model, trainable)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_freezing_clears_stale_gradients(optimizer_name):
    """Between backward and step: requires_grad alone would stop nothing."""
    model = new_classifier()
    optimizer = OPTIMIZERS[optimizer_name](model)
    backward(model, 0)
    optimizer.step()  # so that it has state
    apply(model.layers, {5})
    before = snapshot(model)
    optimizer.step()
    assert moved(before, model) == names_of(model, {5})


def test_apply_tells_whether_anything_changed():
    model = new_classifier()
    changes = [apply(model.layers, suf(epoch, N, k=2)) for epoch in (0, 0, 1, 2, 3)]
    assert changes == [True, False, True, True, False] and apply(model.layers, {5}) is True
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names_of(model, {5})
    assert apply([nn.Parameter(torch.ones(2, dtype=torch.cfloat))], set())  # complex can have gradients, too


def test_late_layers_start_with_fresh_adam_state():
    """No state while frozen; then its own step count and a first update as large as the layer's rate."""
    model = new_classifier()
    rates = layer_decay(1e-3, 0.5, N)
    groups = [{"params": parameters(layer), "lr": lr} for layer, lr in zip(model.layers, rates)]
    optimizer = torch.optim.AdamW([*groups, {"params": parameters(model.outside)}], weight_decay=0.0)
    late = model.layers[2].linear1.weight
    for step in range(10):
        apply(model.layers, suf(step // 5, N, k=3))  # layers 0 to 2 thaw at step 5
        before = late.detach().clone()
        backward(model, step)
        optimizer.step()
        assert (late in optimizer.state) == (step >= 5)
        if step == 5:
            assert (late - before).abs().max().item() == pytest.approx(1.25e-4, rel=1e-3)
    assert optimizer.state[late]["step"] == 5 and optimizer.state[model.head.weight]["step"] == 10


def test_resume_equals_not_stopping(tmp_path):
    """Stopped amid the second phase, loaded into new objects: the weights are equal."""
    def run(model, optimizer, steps):
        for step in steps:
            apply(model.layers, suf(step // 4, N, k=2))
            backward(model, step)
            optimizer.step()

    models = [new_classifier() for _ in range(3)]
    straight, stopped, resumed = ([model, OPTIMIZERS["adamw"](model)] for model in models)
    run(*straight, range(16))
    run(*stopped, range(6))
    torch.save([part.state_dict() for part in stopped], tmp_path / "last.pt")
    for part, state in zip(resumed, torch.load(tmp_path / "last.pt")):
        part.load_state_dict(state)
    run(*resumed, range(6, 16))
    assert moved(snapshot(straight[0]), resumed[0]) == set()


def test_frozen_is_not_eval_mode():
    """Freezing stops the optimizer, not dropout or the running statistics of BatchNorm."""
    layer = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    apply([layer], set())
    x = torch.randn(8, 4) + 3
    assert not torch.equal(layer(x), layer(x)) and (layer[0].running_mean != 0).all()


# ---- Adapters and quantised weights: what is frozen for good

def lora_model(dtype):
    """A frozen base, as floats or quantised, and beside it in each layer two matrices that train."""
    model = nn.ModuleDict({"embedding": nn.Linear(8, 8), "head": nn.Linear(8, 1),
                           "layers": nn.ModuleList()})
    model["embedding"].requires_grad_(False)
    for _ in range(3):
        layer = nn.ModuleDict({"down": nn.Linear(8, 2, False), "up": nn.Linear(2, 8, False)})
        layer.base = nn.Parameter(torch.randint(-9, 9, (8, 8)).to(dtype), requires_grad=False)
        model["layers"].append(layer)
    return model, list(model["layers"])


def adapters_of(layers):
    return [[p for p in layer.parameters() if p.requires_grad] for layer in layers]


@pytest.mark.parametrize("dtype, listed, everything", [
    (torch.float, True, True), (torch.int8, True, False), (torch.int8, False, True)])
def test_adapters_thaw_and_their_base_stays(dtype, listed, everything):
    """Base and embedding are in no list; int8, which cannot have gradients, may be in a layer.
    everything: the optimizer holds what is frozen, too."""
    model, layers = lora_model(dtype)
    layers = adapters_of(layers) if listed else layers
    optimizer = torch.optim.AdamW([p for p in model.parameters() if everything or p.requires_grad])
    check_partition(model, layers, model["head"], optimizer)
    for epoch in range(3):
        apply(layers, suf(epoch, 3, k=1))
        before, hidden = snapshot(model), model["embedding"](torch.ones(2, 8))
        for layer in model["layers"]:
            hidden = hidden + hidden @ layer.base.float() + layer["up"](layer["down"](hidden))
        model["head"](hidden).sum().backward()
        optimizer.step()
        thawed = {f"layers.{i}.{part}.weight" for i in suf(epoch, 3, 1) for part in ("down", "up")}
        assert moved(before, model) == thawed | {"head.weight", "head.bias"}


def test_frozen_base_within_a_layer_is_named():
    """`apply` would thaw it; the advice is not to train it."""
    model, layers = lora_model(torch.float)
    with pytest.raises(ValueError, match=r"layers\.0\.base is frozen .* list only \[p for p in layer"):
        check_partition(model, layers, model["head"], OPTIMIZERS["adamw"](model))
    apply(adapters_of(layers), {2})  # listed too late, the lower layers seem to have no adapters
    with pytest.raises(ValueError, match=r"layers\[0\] has no parameters"):
        check_partition(model, adapters_of(layers), model["head"])


# ---- Held wrong

def test_parameter_in_no_list_or_in_two_is_named():
    model, other = new_classifier(), new_classifier()
    for layers, outside, message in [
            (model.layers, [model.embedding], "head.weight is in no list"),
            (other.layers, other.outside, "embedding.weight is in no list"),
            ([*model.layers, model.head], model.outside, "head.weight is in outside and layers[6]"),
            ([*model.layers, model.layers[2].norm1], model.outside,
             "layers.2.norm1.weight is in layers[2] and")]:
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            check_partition(model, layers, outside)
    check_partition(model, model.layers, [model.outside, model.embedding])  # tied weights: twice outside


def test_parameter_missing_from_the_optimizer_is_named():
    """Filtered by requires_grad after `apply`, what is frozen at that moment could never train."""
    model = new_classifier()
    apply(model.layers, suf(0, N, k=2))
    filtered = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"layers\.0\..* not in the optimizer .* before the first apply"):
        check_partition(model, model.layers, model.outside, filtered)
    kept = torch.optim.AdamW([*model.layers.parameters(), *model.head.parameters()])
    with pytest.raises(ValueError, match=r"embedding\.weight is not in the optimizer"):
        check_partition(model, model.layers, model.outside, kept)
    model.embedding.requires_grad_(False)  # frozen for good
    check_partition(model, model.layers, model.outside, kept)


# ---- DDP

WRAPS = ("anew", "find_unused_parameters")


def train_phases(rank, ranks, wrap):
    """Two steps a phase on this rank's share of each batch -> gradients of each step."""
    model = new_classifier()
    optimizer, replica, history = OPTIMIZERS["adamw"](model), model, []
    if wrap == "find_unused_parameters":  # once, with everything trainable
        replica = DistributedDataParallel(model, find_unused_parameters=True)
    phases = [suf(0, N, 2), suf(1, N, 2), suf(2, N, 2), {0, 5}]  # the last one freezes again
    for step in range(8):
        if apply(model.layers, phases[step // 2]) and wrap == "anew":
            replica = DistributedDataParallel(model)
        history.append(backward(replica, step, rank, ranks))
        optimizer.step()
    return history


def distributed_worker(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save({wrap: train_phases(rank, 2, wrap) for wrap in WRAPS}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    assert run_processes(*((distributed_worker, rank, folder) for rank in range(2))) == [0, 0]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("wrap", WRAPS)
def test_ddp_equals_one_process(two_ranks, wrap):
    """Wrapped anew whenever `apply` returns True, or once with everything trainable."""
    histories = zip(*(results[wrap] for results in two_ranks), train_phases(0, 1, None), strict=True)
    for mine, other, expected in histories:
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


# ---- What a schedule costs

def measured_flops(trainable, embedding_trains=True, tokens=20):
    """(all, backward) FLOPs of one batch, counted by torch, attention included."""
    model = new_classifier(width=64, num_layers=12)
    model.embedding.requires_grad_(embedding_trains)
    apply(model.layers, trainable)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(torch.zeros(2, tokens, dtype=torch.long)).sum()
        forward = counter.get_total_flops()
        loss.backward()
    return counter.get_total_flops(), counter.get_total_flops() - forward


@pytest.mark.parametrize("embedding", [True, False], ids=["embeddings", "frozen embeddings"])
def test_backward_share_is_within_3_points_of_torchs_flop_counter(embedding):
    _, everything = measured_flops(train_top(12, 12))
    for trainable in [train_top(12, 0), train_top(12, 3), train_top(12, 12), {0, 1, 2}, {1, 4, 10}]:
        _, counted = measured_flops(trainable, embedding)
        assert abs(backward_share(trainable, [1] * 12, embedding) - counted / everything) < 0.03


def test_backward_share_is_too_low_for_long_sequences():
    """The stated limit: attention's scores have no weights, so that freezing saves nothing there."""
    _, everything = measured_flops(train_top(12, 12), tokens=64)
    _, counted = measured_flops(train_top(12, 3), tokens=64)
    estimate = backward_share(train_top(12, 3), [1] * 12)
    assert counted / everything - estimate == pytest.approx(0.05, abs=0.01)


def rows_of(text):
    """Table rows: [bar, trained, parameters, backward, memory] of every epoch."""
    rows = [line.split() for line in text.splitlines()]
    return [row[1:] for row in rows if len(row) == 6 and row[0].isdigit()]


def cli(words):
    command = [sys.executable, ROOT / "schedule.py", "--layers", "18", "--epochs", *words.split()]
    return subprocess.run(command, capture_output=True, text=True)


def test_cli_previews_any_strategy():
    printed = cli("5 --suf 3").stdout
    assert rows_of(printed)[4] == ["...###############", "15", "83.3%", "91.7%", "83.3%"]
    assert printed.endswith("warning: layers that never train in these 5 epochs: 1, 2, 3\n")
    frozen = cli("5 --suf 3 --frozen-embeddings").stdout
    assert [row[3] for row in rows_of(frozen)] == ["16.7%", "33.3%", "50.0%", "66.7%", "83.3%"]
    assert rows_of(cli("2 --train-top 6").stdout)[1] == ["." * 12 + "######", "6", "33.3%", "66.7%", "33.3%"]
    assert rows_of(cli("1 --lr-decay 0.75").stdout)[0][0] == "00000000011123457#"
    for words, message in {
            "5 --suf 0": "k at least 1", "5 --train-top 19": "between 0 and the 18 layers, got 19",
            "5 --suf 3 --train-top 6": "not allowed with", "0": "must be at least 1"}.items():
        result = cli(words)
        assert result.returncode == 2 and result.stdout == ""
        assert re.fullmatch(r"error: .*\n", result.stderr) and message in result.stderr


def test_file_is_small_and_needs_no_package():
    lines = (ROOT / "schedule.py").read_text().splitlines()
    assert [line for line in lines if re.match(r"\s*(import|from) ", line)] == ["import argparse"]
    assert len(lines) <= 260


@pytest.mark.parametrize("number", range(4))
def test_examples_print_what_the_page_shows(number, tmp_path, capsys):
    language, code, expected = EXAMPLES[number]
    if language == "python":
        exec(code, {})
        assert capsys.readouterr().out == expected
    else:  # beside a copy of the file alone
        shutil.copy(ROOT / "schedule.py", tmp_path)
        command = [sys.executable, *code.split()[1:]]
        assert subprocess.check_output(command, cwd=tmp_path, text=True) == expected
