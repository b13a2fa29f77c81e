"""Scheduled unfreezing (SUF), top-layers-only training and layer-wise learning-rate decay for any PyTorch loop.

SUF (Reinhardt et al., ALVR 2024, section 3) trains the top k layers in the first epoch and k more, top to bottom, after
each epoch; what is outside the layers (embeddings, head, image encoder) always trains. Copy this file and use it so:

    layers, outside = list(model.encoder.layers), [model.embedding, model.head]  # modules, parameters, or lists of them
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)                   # everything, also what starts frozen
    check_partition(model, layers, outside, optimizer)
    for epoch in range(first_epoch, epochs):                                     # resuming needs no further state
        changed = apply(layers, suf(epoch, len(layers), k=3))                    # True: wrap in DDP anew, reset compile

Optimizers skip frozen layers: no update, no decay, no state. A layer that thaws late has fresh Adam state, so that its
first update is a full learning rate (see thaw_warmup). Preview: python schedule.py --layers 18 --epochs 5 --suf 3
"""
import argparse
import random


def suf(epoch, num_layers, k=3, order=None):
    """Set of the layers (0 = bottom) that train in `epoch` (from 0): the first k * (epoch + 1) of `order` (section 3).
    `order`: a permutation of the layers, first thawed first; default top to bottom. k=1 is ULMFiT's gradual unfreezing;
    epoch = step // interval thaws every `interval` steps. ValueError if an argument is out of range."""
    order = list(range(num_layers))[::-1] if order is None else list(order)
    if epoch < 0 or k < 1:
        raise ValueError(f"suf: epoch must be at least 0 and k at least 1, got epoch={epoch} and k={k}")
    if sorted(order) != list(range(num_layers)):
        raise ValueError(f"suf: order must name each of the layers 0..{num_layers - 1} once, got {order}")
    return set(order[:k * (epoch + 1)])


def train_top(num_layers, n):
    """Set of the top n layers (section 5.3: CCLM's top 6, in every epoch). ValueError unless 0 <= n <= num_layers."""
    if not 0 <= n <= num_layers:
        raise ValueError(f"train_top: n must be between 0 and the {num_layers} layers, got {n}")
    return set(range(num_layers - n, num_layers))


def layer_decay(lr, decay, num_layers):
    """Learning rate of each layer, bottom first: lr * decay ** (num_layers - 1 - i) (section 5.2, with i from 1).
    The paper leaves open what the embeddings get. ValueError unless 0 < decay <= 1."""
    if not 0 < decay <= 1:
        raise ValueError(f"layer_decay: decay must be in (0, 1], got {decay}")
    return [lr * decay ** (num_layers - 1 - i) for i in range(num_layers)]


def thaw_warmup(step, thaw_step, warmup_steps):
    """Optional factor for the learning rate of a layer that thaws at `thaw_step`: linear up to 1 (not in the paper).
    Always 1 if thaw_step is 0, since a layer that trains from the start follows the ordinary warm-up."""
    return 1.0 if thaw_step == 0 else min(1.0, max(0.0, (step - thaw_step + 1) / max(1, warmup_steps)))


def parameters(group):
    """List of the parameters of a module, a parameter, or a (nested) list of these; ValueError on anything else."""
    if isinstance(group, str) or hasattr(group, "__next__"):  # a generator would be empty when it is read again
        raise ValueError(f"a layer must be a module, a parameter or a list of these, not a {type(group).__name__}")
    if hasattr(group, "parameters"):
        return list(group.parameters())
    return [group] if hasattr(group, "requires_grad_") else sum(map(parameters, group), [])


def check_partition(model, layers, outside, optimizer=None):
    """ValueError naming a parameter that is not in exactly one of the `layers` and `outside`, or not in the optimizer
    (where only what is outside and frozen may be missing). Call it once, before training."""
    members = {f"layer {i}": {id(p) for p in parameters(layer)} for i, layer in enumerate(layers)}
    members["outside"] = {id(p) for p in parameters(outside)}
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer else None
    for name, p in model.named_parameters():
        homes = [home for home, ids in members.items() if id(p) in ids]
        if len(homes) != 1:
            raise ValueError(f"{name} is in {' and '.join(homes) or 'no list'}: put it in one layer or in outside")
        if optimizer and id(p) not in optimized and (homes != ["outside"] or p.requires_grad):
            raise ValueError(f"{name} is not in the optimizer and would never move: build it from all parameters")


def apply(layers, trainable):
    """Let exactly the layers in the set `trainable` require gradients; return whether that changed anything.
    Clears the gradients of frozen layers, which an optimizer would go on applying. ValueError on an unknown layer."""
    if not set(trainable) <= set(range(len(layers))):
        raise ValueError(f"apply: trainable must be within the layers 0..{len(layers) - 1}, got {sorted(trainable)}")
    changed = False
    for i, layer in enumerate(layers):
        for p in parameters(layer):
            changed |= p.requires_grad != (i in trainable)
            p.requires_grad_(i in trainable)
            p.grad = p.grad if i in trainable else None
    return changed


def backward_share(trainable, sizes, input_gradient=True):
    """Estimated backward compute of the layers, as a share of what it is when they all and their input train: a layer
    costs its parameters (`sizes`) for weight gradients if it trains, and again for activation gradients if it, a layer
    below or the input (`input_gradient`) trains. Leaves out attention's scores: 3 points at T = width / 3."""
    cost, flows = 0, input_gradient
    for i, size in enumerate(sizes):
        flows = flows or i in trainable
        cost += size * ((i in trainable) + flows)
    return cost / (2 * sum(sizes))


def preview(epochs, sizes, outside=0, outside_frozen=0, input_gradient=True, lr_factors=None):
    """Table as text. epochs: the set that trains in each; sizes: parameters of each layer; outside, outside_frozen:
    parameters elsewhere that train and that do not; lr_factors: each layer's learning rate / the full one (<= 1)."""
    total, ever, costs, width = sum(sizes) + outside + outside_frozen, set(), [], max(6, len(sizes))
    marks = ["0123456789#"[int(10 * factor + 1e-6)] for factor in lr_factors or [1] * len(sizes)]  # or 0.99999999
    lines = [f"{len(sizes)} layers, left = bottom: # trains, 0-9 with that many tenths of the learning rate, . frozen",
             f"epoch  {'layers':{width}}  trained  parameters  backward compute  optimizer memory"]
    for number, trainable in enumerate(epochs, 1):
        ever |= trainable  # AdamW keeps its state for whatever has trained so far
        costs.append(backward_share(trainable, sizes, input_gradient))
        training, stored = ((outside + sum(sizes[i] for i in group)) / total for group in (trainable, ever))
        bar = "".join(mark if i in trainable else "." for i, mark in enumerate(marks)).ljust(width)
        lines.append(f"{number:5}  {bar}  {len(trainable):7}  {training:10.1%}  {costs[-1]:16.1%}  {stored:16.1%}")
    mean = sum(costs) / len(costs)
    lines.append(f"mean: {mean:.1%} of the layers' backward, {(1 + 2 * mean) / 3:.1%} of all their compute")
    if input_gradient and mean < 1:
        lines.append("embeddings train: gradients pass through frozen layers, which save their weight gradients only")
    never = ", ".join(str(i) for i in range(len(sizes)) if i not in ever)
    if never:
        lines.append(f"warning: layers that never train in these {len(epochs)} epochs: {never}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Preview a schedule: what trains in each epoch, and what that costs.")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("--layers", type=int, required=True, help="number of layers")
    parser.add_argument("--epochs", type=int, required=True, help="number of epochs")
    strategy = parser.add_mutually_exclusive_group()
    strategy.add_argument("--suf", type=int, metavar="K", help="train the top K layers, and K more after each epoch")
    strategy.add_argument("--train-top", type=int, metavar="N", help="train the top N layers in every epoch")
    parser.add_argument("--lr-decay", type=float, default=1.0, metavar="D", help="learning rate times D per layer down")
    parser.add_argument("--order", choices=["top-down", "bottom-up", "random"], help="of --suf (random: with seed 0)")
    parser.add_argument("--frozen-embeddings", action="store_true", help="nothing below the layers trains")
    args = parser.parse_args()
    if min(args.layers, args.epochs) < 1:
        parser.error(f"--layers and --epochs must be at least 1, got {args.layers} and {args.epochs}")
    if args.order and args.suf is None:
        parser.error("--order is the order of --suf, which is not given")
    n = args.layers
    order = {"bottom-up": range(n), "random": random.Random(0).sample(range(n), n)}.get(args.order)  # None: top-down
    try:
        top = train_top(n, n if args.train_top is None else args.train_top)
        epochs = [top if args.suf is None else suf(e, n, args.suf, order) for e in range(args.epochs)]
        print(preview(epochs, [1] * n, 0, 0, not args.frozen_embeddings, layer_decay(1.0, args.lr_decay, n)))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
