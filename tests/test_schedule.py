"""Tests of schedule.py: the pure functions against hand-written tables, the effect on real optimizers,
what goes wrong when it is held wrong, DDP, torch.compile, the preview, and the README's section "Copy
this file" (its code runs, its output holds).
"""

import os
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from schedule import (  # noqa: E402
    apply,
    backward_share,
    check_partition,
    layer_decay,
    preview,
    suf,
    thaw_warmup,
    train_top,
)

README = ROOT / "README.md"
NUM_LAYERS = 6


class Classifier(nn.Module):
    """Embedding, Transformer layers, head: what a schedule meets, as small as possible."""

    def __init__(self, width=16, num_layers=NUM_LAYERS, norm_first=False, checkpointing=False):
        super().__init__()
        self.embedding = nn.Embedding(30, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=norm_first)
            for _ in range(num_layers))
        self.head = nn.Linear(width, 3)
        self.checkpointing = checkpointing

    def forward(self, input_ids):
        hidden = self.embedding(input_ids)  # [B, T, D]
        for layer in self.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=False) if self.checkpointing else layer(hidden)
        return self.head(hidden[:, 0])  # [B, 3]


def new_classifier(**sizes):
    torch.manual_seed(0)
    return Classifier(**sizes)


def batch_of(step, size=4):
    generator = torch.Generator().manual_seed(1000 + step)
    return (torch.randint(30, (size, 5), generator=generator), torch.randint(3, (size,), generator=generator))


def train_step(model, optimizer, step, zero_grad=True):
    input_ids, labels = batch_of(step)
    if zero_grad:
        optimizer.zero_grad()
    cross_entropy(model(input_ids), labels).backward()
    optimizer.step()


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def layer_of(name):
    """Index of the layer that holds the parameter, None outside the layers."""
    match = re.search(r"layers\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def assert_only_moved(before, model, trainable):
    """Tensors outside the layers and in `trainable` layers moved, all others are the same bit for bit."""
    for name, p in model.named_parameters():
        layer = layer_of(name)
        assert torch.equal(before[name], p) == (layer is not None and layer not in trainable), name


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1),
    "adamw_fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
}


# ---------------------------------------------------------------------------------------------------------------------
# Pure functions


@pytest.mark.parametrize("num_layers, counts", [(12, [3, 6, 9, 12, 12]), (18, [3, 6, 9, 12, 15])], ids=["uc2", "cclm"])
def test_suf_is_the_papers_table(num_layers, counts):
    for epoch, count in enumerate(counts):
        assert suf(epoch, num_layers, k=3) == set(range(num_layers - count, num_layers))


def test_suf_follows_any_order():
    assert [suf(e, 4, 1) for e in range(5)] == [{3}, {3, 2}, {3, 2, 1}, {0, 1, 2, 3}, {0, 1, 2, 3}]  # ULMFiT
    assert [suf(e, 4, 2, range(4)) for e in range(2)] == [{0, 1}, {0, 1, 2, 3}]  # bottom-up
    # ranked elsewhere
    assert [suf(e, 5, 2, [2, 0, 4, 1, 3]) for e in range(3)] == [{0, 2}, {0, 1, 2, 4}, {0, 1, 2, 3, 4}]
    assert [len(suf(step // 100, 4, 1)) for step in (0, 99, 100, 250, 1000)] == [1, 1, 2, 3, 4]  # by steps


def test_train_top_and_layer_decay():
    assert train_top(18, 6) == {12, 13, 14, 15, 16, 17}
    assert train_top(3, 3) == {0, 1, 2} and train_top(3, 0) == set()
    assert layer_decay(8.0, 0.5, 4) == [1.0, 2.0, 4.0, 8.0]
    assert layer_decay(3e-5, 1.0, 2) == [3e-5, 3e-5]
    # Section 5.2 speaks of 70% (d=0.98) to 0.5% (d=0.75) for the bottom layer of 18; its formula gives 70.9% and 0.75%.
    assert layer_decay(1.0, 0.98, 18)[0] == pytest.approx(0.709, abs=0.001)
    assert layer_decay(1.0, 0.75, 18)[0] == pytest.approx(0.0075, abs=0.0001)


def test_thaw_warmup_rises_linearly():
    assert [thaw_warmup(step, 10, 4) for step in (9, 10, 11, 12, 13, 14)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert thaw_warmup(10, 10, 0) == 1.0
    assert thaw_warmup(0, 0, 4) == 1.0


@pytest.mark.parametrize("call, message", [
    (lambda: suf(0, 12, k=0), "k at least 1, got epoch=0 and k=0"),
    (lambda: suf(-1, 12), "epoch must be at least 0"),
    (lambda: suf(0, 3, order=[0, 1, 1]), "order must name each of the layers 0..2 once, got [0, 1, 1]"),
    (lambda: train_top(12, 13), "between 0 and the 12 layers, got 13"),
    (lambda: layer_decay(1e-4, 0.0, 12), "decay must be in (0, 1], got 0.0"),
    (lambda: layer_decay(1e-4, 1.1, 12), "decay must be in (0, 1], got 1.1"),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# ---------------------------------------------------------------------------------------------------------------------
# Training effect


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_frozen_layers_stay_bit_identical_and_thawed_layers_move(optimizer_name):
    model = new_classifier()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    check_partition(model, model.layers, [model.embedding, model.head], optimizer)
    step = 0
    for trainable in [*(suf(epoch, NUM_LAYERS, k=2) for epoch in range(3)), {1}, set()]:  # thaw all, then freeze again
        apply(model.layers, trainable)
        before = snapshot(model)
        for _ in range(3):
            train_step(model, optimizer, step)
            step += 1
        assert_only_moved(before, model, trainable)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_freezing_clears_stale_gradients(optimizer_name):
    """Freeze between backward and step, in a loop that never zeroes gradients:
    requires_grad alone would not stop the layer.
    """
    model = new_classifier()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    train_step(model, optimizer, 0)  # every parameter has a gradient, the optimizer has state
    apply(model.layers, {5})
    before = snapshot(model)
    optimizer.step()
    train_step(model, optimizer, 1, zero_grad=False)
    assert_only_moved(before, model, {5})


def test_apply_tells_whether_anything_changed():
    model = new_classifier()
    changes = [apply(model.layers, suf(epoch, NUM_LAYERS, k=2)) for epoch in (0, 0, 1, 2, 3, 4)]
    assert changes == [True, False, True, True, False, False]
    assert apply(model.layers, train_top(NUM_LAYERS, 1))
    assert model.embedding.weight.requires_grad and model.head.weight.requires_grad


def test_layers_may_be_lists_of_parameters():
    """Adapters, say: only what is listed freezes and thaws, the rest of the layer is outside."""
    model = new_classifier()
    layers = [[layer.linear1.weight, [layer.linear2]] for layer in model.layers]
    listed = {id(p) for layer in model.layers for p in (layer.linear1.weight, *layer.linear2.parameters())}
    check_partition(model, layers, [p for p in model.parameters() if id(p) not in listed])
    apply(layers, set())
    assert {id(p) for p in model.parameters() if not p.requires_grad} == listed


def test_suf_and_layer_decay_combine():
    """One group per layer with its own learning rate: frozen layers stay, thawed ones move at their own rate."""
    model = new_classifier()
    rates = layer_decay(1e-3, 0.5, NUM_LAYERS)
    groups = [{"params": list(layer.parameters()), "lr": lr} for layer, lr in zip(model.layers, rates)]
    groups.append({"params": [*model.embedding.parameters(), *model.head.parameters()], "lr": 1e-3})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    check_partition(model, model.layers, [model.embedding, model.head], optimizer)
    apply(model.layers, suf(0, NUM_LAYERS, k=2))
    before = snapshot(model)
    train_step(model, optimizer, 0)
    assert_only_moved(before, model, {4, 5})
    for i in (4, 5):  # Adam's first update has the size of the learning rate
        moved = (model.layers[i].linear1.weight - before[f"layers.{i}.linear1.weight"]).abs().max().item()
        assert moved == pytest.approx(rates[i], rel=1e-3)


def test_resume_equals_not_stopping(tmp_path):
    """Stop in the middle of the second phase, load into new objects: parameters and optimizer state agree bit for bit.
    """
    steps_per_epoch, steps = 4, 16

    def run(model, optimizer, first_step, last_step):
        for step in range(first_step, last_step):
            apply(model.layers, suf(step // steps_per_epoch, NUM_LAYERS, k=2))
            train_step(model, optimizer, step)

    straight = new_classifier()
    straight_optimizer = OPTIMIZERS["adamw"](straight.parameters())
    run(straight, straight_optimizer, 0, steps)

    stopped = new_classifier()
    stopped_optimizer = OPTIMIZERS["adamw"](stopped.parameters())
    run(stopped, stopped_optimizer, 0, 6)
    torch.save({"model": stopped.state_dict(), "optimizer": stopped_optimizer.state_dict()}, tmp_path / "last.pt")

    saved = torch.load(tmp_path / "last.pt")
    resumed = Classifier()
    resumed_optimizer = OPTIMIZERS["adamw"](resumed.parameters())
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    run(resumed, resumed_optimizer, 6, steps)

    for (name, expected), p in zip(straight.named_parameters(), resumed.parameters()):
        assert torch.equal(expected, p), name
    expected_state, state = straight_optimizer.state_dict()["state"], resumed_optimizer.state_dict()["state"]
    assert expected_state.keys() == state.keys()
    for index in state:
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(expected_state[index][key], state[index][key]), (index, key)


def test_late_layers_start_with_fresh_adam_state():
    """No state while frozen; after the thaw a step count of its own and a first update as large as the learning rate,
    which thaw_warmup scales down."""
    moved = {}
    for warmup_steps in (0, 10):
        model = new_classifier()
        groups = [{"params": list(layer.parameters())} for layer in model.layers]
        groups.append({"params": [*model.embedding.parameters(), *model.head.parameters()]})
        optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0)
        late = model.layers[0].linear1.weight
        for step in range(10):
            apply(model.layers, suf(step // 5, NUM_LAYERS, k=3))  # layers 0-2 thaw at step 5
            for i, group in enumerate(optimizer.param_groups[:NUM_LAYERS]):
                group["lr"] = 1e-3 * thaw_warmup(step, 5 if i < 3 else 0, warmup_steps)
            before = late.detach().clone()
            train_step(model, optimizer, step)
            if step == 4:
                assert late not in optimizer.state
            if step == 5:
                moved[warmup_steps] = (late - before).abs().max().item()
        assert optimizer.state[late]["step"] == 5 and optimizer.state[model.head.weight]["step"] == 10
    assert moved[0] == pytest.approx(1e-3, rel=1e-3)
    assert moved[10] == pytest.approx(1e-4, rel=1e-3)


def test_frozen_is_not_eval_mode():
    """Freezing stops the optimizer, not dropout or the running statistics of BatchNorm."""
    layers = [nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))]
    apply(layers, set())
    torch.manual_seed(0)
    x = torch.randn(8, 4) + 3
    assert not torch.equal(layers[0](x), layers[0](x))
    assert (layers[0][0].running_mean != 0).all()


def test_gradient_checkpointing():
    """use_reentrant=False gives the gradients of the plain model, also when nothing below the thawed layers needs any.
    """
    plain, checkpointed = new_classifier(), new_classifier(checkpointing=True)
    for model in (plain, checkpointed):
        model.embedding.requires_grad_(False)
    input_ids, labels = batch_of(0)
    for epoch in range(3):
        for model in (plain, checkpointed):
            model.zero_grad()
            apply(model.layers, suf(epoch, NUM_LAYERS, k=2))
            cross_entropy(model(input_ids), labels).backward()
        expected = gradients(plain)
        for name, grad in gradients(checkpointed).items():
            frozen = layer_of(name) not in {None, *suf(epoch, NUM_LAYERS, k=2)} or name.startswith("embedding")
            assert (grad is None) == frozen, name
            assert frozen or torch.equal(grad, expected[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# Held wrong


def test_parameter_in_no_list_is_named():
    model = new_classifier()
    with pytest.raises(ValueError, match=r"head\.weight is in no list"):
        check_partition(model, model.layers, [model.embedding])
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.in_proj_weight is in no list"):
        check_partition(model, model.layers[1:], [model.embedding, model.head])
    other = deepcopy(model)
    with pytest.raises(ValueError, match=r"embedding\.weight is in no list"):  # lists of another copy
        check_partition(model, other.layers, [other.embedding, other.head])


def test_parameter_in_two_lists_is_named():
    model = new_classifier()
    with pytest.raises(ValueError, match=r"head\.weight is in layer 6 and outside"):
        check_partition(model, [*model.layers, model.head], [model.embedding, model.head])
    model.layers[3] = model.layers[2]  # shared weights
    with pytest.raises(ValueError, match=r"layers\.2\..* is in layer 2 and layer 3"):
        check_partition(model, model.layers, [model.embedding, model.head])


def test_tied_weights_outside_the_layers_are_fine():
    model = new_classifier()
    model.output = nn.Linear(16, 30, bias=False)
    model.output.weight = model.embedding.weight
    check_partition(model, model.layers, [model.embedding, model.head, model.output])


def test_parameter_missing_from_the_optimizer_is_named():
    """The usual mistake: filter by requires_grad, so that what is frozen at that moment can never train."""
    model = new_classifier()
    outside = [model.embedding, model.head]
    apply(model.layers, suf(0, NUM_LAYERS, k=2))
    filtered = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"layers\.0\..* is not in the optimizer"):
        check_partition(model, model.layers, outside, filtered)
    model.embedding.requires_grad_(False)  # frozen for good: may be left out
    kept = torch.optim.AdamW([*model.layers.parameters(), *model.head.parameters()])
    check_partition(model, model.layers, outside, kept)
    model.embedding.requires_grad_(True)
    with pytest.raises(ValueError, match=r"embedding\.weight is not in the optimizer"):
        check_partition(model, model.layers, outside, kept)


def test_generators_and_names_are_refused():
    """A generator would be empty when read again, and apply would silently freeze nothing."""
    model = new_classifier()
    layers = [layer.parameters() for layer in model.layers]
    with pytest.raises(ValueError, match="not a generator"):
        check_partition(model, layers, [model.embedding, model.head])
    with pytest.raises(ValueError, match="not a generator"):
        apply(layers, {0})
    with pytest.raises(ValueError, match="not a str"):
        apply(["layers.0", "layers.1"], {0})


def test_unknown_layer_is_refused():
    """Sets for another depth, or counted from 1: nothing is changed before the error."""
    model = new_classifier()
    with pytest.raises(ValueError, match=r"within the layers 0\.\.5, got \[10, 11\]"):
        apply(model.layers, train_top(12, 2))
    assert all(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# DDP and torch.compile


# the last one freezes again
PHASES = [suf(0, NUM_LAYERS, k=2), suf(1, NUM_LAYERS, k=2), suf(2, NUM_LAYERS, k=2), {0, 5}]


def train_phases(rank, ranks, rewrap):
    """Two steps per phase on this rank's share of each batch; returns the gradients of each step and the final weights.
    """
    model = new_classifier()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    replica, history = model if ranks == 1 else None, []
    for step in range(2 * len(PHASES)):
        if apply(model.layers, PHASES[step // 2]) and ranks > 1 and (rewrap or replica is None):
            replica = nn.parallel.DistributedDataParallel(model)
        input_ids, labels = (share.chunk(ranks)[rank] for share in batch_of(step))
        optimizer.zero_grad()
        cross_entropy(replica(input_ids), labels).backward()
        history.append(gradients(model))
        optimizer.step()
        if not rewrap and step == 2:  # the first step after the first thaw
            break
    return history, snapshot(model)


def distributed_worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {"rewrapped": train_phases(rank, 2, rewrap=True), "wrapped once": train_phases(rank, 2, rewrap=False)}
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(distributed_worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_ddp_wrapped_again_at_each_phase_equals_one_process(two_ranks):
    expected_history, expected_weights = train_phases(0, 1, rewrap=True)
    (history, weights), (other_history, other_weights) = (results["rewrapped"] for results in two_ranks)
    assert len(history) == len(expected_history) == 8
    for step, expected in enumerate(expected_history):
        for name, grad in expected.items():
            if grad is None:
                assert layer_of(name) not in PHASES[step // 2]
                assert history[step][name] is None and other_history[step][name] is None, (step, name)
            else:
                assert torch.equal(history[step][name], other_history[step][name]), (step, name)
                torch.testing.assert_close(history[step][name], grad, rtol=1e-4, atol=1e-6, msg=f"{step} {name}")
    for name, expected in expected_weights.items():
        assert torch.equal(weights[name], other_weights[name]), name


def test_ddp_wrapped_once_silently_diverges(two_ranks):
    """Why apply's return value matters: DDP reduces only what needed a gradient when it was made, without any error."""
    (history, _), (other_history, _) = (results["wrapped once"] for results in two_ranks)
    first, other = history[2], other_history[2]
    assert torch.equal(first["layers.5.linear1.weight"], other["layers.5.linear1.weight"])  # trained from the start
    assert not torch.equal(first["layers.3.linear1.weight"], other["layers.3.linear1.weight"])  # thawed later


@pytest.mark.skipif(not any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name),
                    reason="torch.compile on CPU needs a C++ compiler")
def test_compile_across_phases_equals_eager():
    """Reset at each phase: gradients equal eager's, frozen layers stay, thawed ones move."""
    torch.compiler.reset()
    models = [nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 8), nn.Linear(8, 2))
              for _ in range(2)]
    eager, model = models
    eager.load_state_dict(model.state_dict())
    x, labels = torch.randn(4, 8), torch.tensor([0, 1, 1, 0])
    optimizers = [OPTIMIZERS["adamw"](m.parameters()) for m in models]
    for trainable in ({1}, {0}):  # the second phase thaws one layer and freezes the other
        for m in models:
            changed = apply(m[:2], trainable)
        assert changed
        torch.compiler.reset()
        compiled, before = torch.compile(model), snapshot(model)
        for forward, m, optimizer in zip((eager, compiled), models, optimizers):
            optimizer.zero_grad()
            cross_entropy(forward(x), labels).backward()
        for (name, p), expected in zip(model.named_parameters(), eager.parameters()):
            if int(name[0]) in {2, *trainable}:
                torch.testing.assert_close(p.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
            else:
                assert p.grad is None and expected.grad is None, name
        for optimizer in optimizers:
            optimizer.step()
        for name, p in model.named_parameters():
            assert torch.equal(before[name], p) == (int(name[0]) not in {2, *trainable}), name
    torch.compiler.reset()


# ---------------------------------------------------------------------------------------------------------------------
# Preview and its cost estimate


def measured_flops(trainable, embedding_trains, tokens, num_layers=12, norm_first=False):
    """(forward, backward) FLOPs of one batch, counted by torch, attention included."""
    model = new_classifier(width=64, num_layers=num_layers, norm_first=norm_first)
    model.embedding.requires_grad_(embedding_trains)
    apply(model.layers, trainable)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(torch.zeros(2, tokens, dtype=torch.long)).sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-LN", "pre-LN"])
@pytest.mark.parametrize("embedding_trains", [True, False], ids=["embeddings", "frozen embeddings"])
def test_backward_share_is_within_3_points_of_torchs_flop_counter(norm_first, embedding_trains):
    _, everything = measured_flops(train_top(12, 12), True, 20, norm_first=norm_first)
    for trainable in [train_top(12, n) for n in (0, 3, 6, 9, 12)] + [{0, 1, 2}, {1, 4, 10}]:  # top, bottom, scattered
        _, backward = measured_flops(trainable, embedding_trains, 20, norm_first=norm_first)
        estimate = backward_share(trainable, [1] * 12, embedding_trains)
        assert abs(estimate - backward / everything) < 0.03, (trainable, estimate, backward / everything)


def test_backward_share_is_too_low_for_long_sequences():
    """The stated limit: attention's scores have no weights, so freezing saves nothing there."""
    _, everything = measured_flops(train_top(12, 12), True, 64)
    _, backward = measured_flops(train_top(12, 3), True, 64)
    assert backward / everything - backward_share(train_top(12, 3), [1] * 12) == pytest.approx(0.05, abs=0.01)


def test_mean_share_of_all_compute():
    """UC2's xGQA run (3, 6, 9, 12, 12 layers): the printed mean against the counter, forward included."""
    epochs = [suf(epoch, 12, k=3) for epoch in range(5)]
    costs = [sum(measured_flops(trainable, True, 20)) for trainable in epochs]
    measured = sum(costs) / (5 * sum(measured_flops(train_top(12, 12), True, 20)))
    printed = re.search(r"mean: .* backward, ([\d.]+)% of all their compute", preview(epochs, [1] * 12))
    assert float(printed.group(1)) / 100 == pytest.approx(measured, abs=0.02)


def run_cli(*arguments):
    return subprocess.run([sys.executable, ROOT / "schedule.py", *arguments], capture_output=True,
                          text=True, timeout=60)


def rows_of(text):
    """Table rows as {epoch: [bar, trained, parameters, backward, memory]}."""
    rows = (line.split() for line in text.splitlines())
    return {int(row[0]): row[1:] for row in rows if len(row) == 6 and row[0].isdigit()}


def test_cli_previews_cclms_xgqa_run():
    result = run_cli("--layers", "18", "--epochs", "5", "--suf", "3")
    assert result.returncode == 0 and result.stderr == ""
    rows = rows_of(result.stdout)
    assert [row[0] for row in rows.values()] == ["." * (18 - n) + "#" * n for n in (3, 6, 9, 12, 15)]
    assert rows[1] == ["...............###", "3", "16.7%", "58.3%", "16.7%"]
    assert rows[5] == ["...###############", "15", "83.3%", "91.7%", "83.3%"]
    assert result.stdout.endswith("warning: layers that never train in these 5 epochs: 0, 1, 2\n")
    assert "warning" not in run_cli("--layers", "18", "--epochs", "6", "--suf", "3").stdout


def test_cli_of_the_other_strategies():
    top = run_cli("--layers", "18", "--epochs", "1", "--train-top", "6", "--frozen-embeddings").stdout
    assert rows_of(top) == {1: ["............######", "6", "33.3%", "33.3%", "33.3%"]}
    assert "embeddings train" not in top
    assert rows_of(run_cli("--layers", "18", "--epochs", "1", "--train-top", "6").stdout)[1][3] == "66.7%"
    frozen = run_cli("--layers", "18", "--epochs", "5", "--suf", "3", "--frozen-embeddings").stdout
    assert [row[3] for row in rows_of(frozen).values()] == ["16.7%", "33.3%", "50.0%", "66.7%", "83.3%"]
    decay = rows_of(run_cli("--layers", "8", "--epochs", "2", "--lr-decay", "0.75").stdout)
    assert decay[1] == decay[2] == ["1123457#", "8", "100.0%", "100.0%", "100.0%"]
    bottom_up = run_cli("--layers", "4", "--epochs", "2", "--suf", "1", "--order", "bottom-up").stdout
    assert [row[0] for row in rows_of(bottom_up).values()] == ["#...", "##.."]
    shuffled = [run_cli("--layers", "9", "--epochs", "3", "--suf", "3", "--order", "random").stdout for _ in range(2)]
    assert shuffled[0] == shuffled[1]
    bars = [row[0] for row in rows_of(shuffled[0]).values()]
    assert [bar.count("#") for bar in bars] == [3, 6, 9] and bars[0] not in ("......###", "###......")


def test_preview_counts_what_is_outside_the_layers():
    text = preview([{1}, {0}], sizes=[10, 30], outside=50, outside_frozen=10)
    # Trains: 30 or 10 of the layers + 50 of 100. AdamW keeps what it ever stored: after epoch 2 both layers.
    assert rows_of(text) == {1: [".#", "1", "80.0%", "87.5%", "80.0%"], 2: ["#.", "1", "60.0%", "62.5%", "90.0%"]}


@pytest.mark.parametrize("arguments, message", [
    (["--suf", "0"], "k at least 1"),
    (["--train-top", "13"], "between 0 and the 12 layers, got 13"),
    (["--lr-decay", "0"], "decay must be in (0, 1]"),
    (["--lr-decay", "1.5"], "decay must be in (0, 1]"),
    (["--suf", "3", "--train-top", "6"], "not allowed with"),
    (["--train-top", "6", "--order", "random"], "--order is the order of --suf"),
    (["--epochs", "0"], "must be at least 1"),
    (["--suf", "many"], "invalid int value: 'many'"),
])
def test_cli_errors_are_one_line(arguments, message):
    result = run_cli("--layers", "12", "--epochs", "5", *arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The file itself and the README's section about it


def test_file_is_small_and_needs_no_package():
    lines = (ROOT / "schedule.py").read_text().splitlines()
    assert len(lines) <= 150
    imported = {line.split()[1].split(".")[0] for line in lines if re.match(r"\s*(import|from) ", line)}
    assert imported and imported <= set(sys.stdlib_module_names)  # torch's objects come from the caller


def copy_section():
    """Text of the README's section "Copy this file"; skips the test where there is none."""
    if not README.exists():
        pytest.skip("there is no README.md")
    section, level, fenced = [], None, False
    for line in README.read_text(encoding="utf-8").splitlines():
        fenced ^= line.startswith("```")
        heading = re.match(r"(#+) (.*)", line) if not fenced else None
        if level and heading and len(heading.group(1)) <= level:
            break
        if heading and heading.group(2).strip().lower().startswith("copy this file"):
            level = len(heading.group(1))
        if level:
            section.append(line)
    if not section:
        pytest.skip("README.md has no section \"Copy this file\"")
    return "\n".join(section)


def test_readme_examples_run_and_print_what_the_readme_shows(tmp_path):
    """Each python or bash block that is followed by a text block prints exactly that, next to a copy of the file alone.
    """
    shutil.copy(ROOT / "schedule.py", tmp_path)
    examples = re.findall(r"```(python|bash)\n(.*?)```\s*```text\n(.*?)```", copy_section(), re.DOTALL)
    assert [language for language, _, _ in examples].count("python") >= 2, "one example for each of the two models"
    for language, code, expected in examples:
        command = [sys.executable, "-c", code] if language == "python" else [sys.executable, *code.split()[1:]]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout == expected


def test_readme_statements_name_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", copy_section()))
    assert named and named <= set(globals())
