"""Scheduled unfreezing (SUF), top layers only, layer-wise learning rates: for any PyTorch loop.

SUF (Reinhardt et al., ALVR 2024, section 3) trains the top k layers in the first epoch and k more,
top to bottom, after each epoch. Everything outside the layers (embeddings, head, image encoder)
always trains. Copy this file, which imports only the standard library, and use it like this:

    layers = list(model.encoder.layers)                         # bottom to top
    outside = [model.embedding, model.head]                     # everything else
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)  # all, also what starts frozen
    check_partition(model, layers, outside, optimizer)
    for epoch in range(first_epoch, epochs):                    # resuming needs no other state
        changed = apply(layers, suf(epoch, len(layers), k=3))   # True: renew DDP, reset compile

A layer is a module, a parameter or a list of these. Where base weights stay frozen for good (LoRA,
quantised models), list what trains in each layer, before the first `apply`:

    layers = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]

Optimizers skip frozen layers: no update, no decay, no state. A layer that thaws late starts with
fresh Adam state, so its first update is as large as the learning rate.
Preview of a schedule, without a model: python schedule.py --layers 18 --epochs 5 --suf 3
"""
import argparse


# ---- Which layers train, and how fast ------------------------------------------------------------

def suf(epoch, num_layers, k=3, order=None):
    """Set of the layers (0 = bottom) that train in `epoch` (0 = the first); section 3.

    These are the first k * (epoch + 1) layers of `order`, a permutation of them, by default from
    top to bottom. k=1 is ULMFiT's gradual unfreezing; epoch = step // interval thaws k layers every
    `interval` steps. ValueError if an argument is out of range."""
    from_bottom = list(range(num_layers))
    if order is None:
        order = from_bottom[::-1]
    if epoch < 0 or k < 1:
        raise ValueError(f"suf: epoch must be at least 0 and k at least 1, got {epoch} and {k}")
    if sorted(order) != from_bottom:
        raise ValueError(f"suf: order must name each of the {num_layers} layers once, got {order}")
    return set(order[:k * (epoch + 1)])


def train_top(num_layers, n):
    """Set of the top n layers (section 5.3: CCLM's top 6). ValueError unless n is in 0..num_layers.
    """
    if not 0 <= n <= num_layers:
        raise ValueError(f"train_top: n must be between 0 and the {num_layers} layers, got {n}")
    return set(range(num_layers - n, num_layers))


def layer_decay(lr, decay, num_layers):
    """Learning rate of each layer, bottom first: lr * decay ** (number of layers above it).

    Section 5.2. The paper does not say what embeddings get. ValueError unless 0 < decay <= 1."""
    if not 0 < decay <= 1:
        raise ValueError(f"layer_decay: decay must be in (0, 1], got {decay}")
    return [lr * decay ** layers_above for layers_above in reversed(range(num_layers))]


def rate_shares(trained, factors, num_layers):
    """Share of a run's learning rate, summed over its steps, that each layer gets, bottom first.

    trained: for every step the set of layers that train; factors: the learning rate of every step
    as a factor of its peak. Under SUF a layer trains less, and later. The control for "less" trains
    all layers in all steps, each at its share of the rate."""
    integral = 0.0
    shares = [0.0] * num_layers
    for layers, factor in zip(trained, factors, strict=True):
        integral += factor
        for i in layers:
            shares[i] += factor
    # A run of one step may have the warm-up's factor 0 alone.
    if integral == 0:
        return shares
    return [share / integral for share in shares]


# ---- Making it so --------------------------------------------------------------------------------

def parameters(group):
    """List of the parameters of a module, a parameter, or a (nested) list of these.

    Leaves out what cannot have a gradient (quantised integer weights). ValueError on anything else,
    such as a name, or a generator, which would be empty when it is read a second time."""
    if hasattr(group, "parameters"):
        members = group.parameters()
    elif hasattr(group, "requires_grad_"):
        members = [group]
    elif isinstance(group, (list, tuple)):
        members = []
        for part in group:
            members += parameters(part)
    else:
        raise ValueError("a layer must be a module, a parameter or a list of these, "
                         f"not a {type(group).__name__}")
    return [p for p in members if p.is_floating_point() or p.is_complex()]


def check_partition(model, layers, outside, optimizer=None):
    """ValueError that names a parameter which would not train, or not stay frozen, as it should.

    Each must be in one layer or in outside, not in both, and in the optimizer. Only what does not
    require gradients, and never will, may be in none of them. Call it once, before training."""
    names = {}
    for name, p in model.named_parameters():
        names[id(p)] = name

    # Where each parameter is listed: its id -> "outside" or "layers[0]", "layers[1]", …
    homes = dict.fromkeys(map(id, parameters(outside)), "outside")
    for i, layer in enumerate(layers):
        here = f"layers[{i}]"
        members = parameters(layer)
        if not members:
            raise ValueError(f"{here} has no parameters that can train: leave it out")
        # Adapters beside frozen base weights: `apply` would thaw both.
        frozen = [p for p in members if not p.requires_grad]
        if 0 < len(frozen) < len(members):
            raise ValueError(
                f"{names.get(id(frozen[0]))} is frozen while other parameters of {here} train: "
                "as a layer, list only [p for p in layer.parameters() if p.requires_grad]")
        for p in members:
            home = homes.setdefault(id(p), here)
            if home != here:
                raise ValueError(f"{names.get(id(p))} is in {home} and {here}: leave it in one")

    optimized = set()
    if optimizer:
        for group in optimizer.param_groups:
            optimized.update(map(id, group["params"]))
    for name, p in model.named_parameters():
        home = homes.get(id(p))
        if p.requires_grad and home is None:
            raise ValueError(f"{name} is in no list: put it in one layer or in outside")
        # What is in a layer may be frozen now and thaw later.
        may_train = p.requires_grad or home not in (None, "outside")
        if optimizer and may_train and id(p) not in optimized:
            raise ValueError(f"{name} is not in the optimizer and would never train: build the "
                             "optimizer before the first apply (frozen for good: list it nowhere)")


def apply(layers, trainable):
    """Let exactly the layers in the set `trainable` train; return whether that changed anything.

    ValueError, before any change, if there is no such layer."""
    if not set(trainable) <= set(range(len(layers))):
        raise ValueError(f"apply: trainable must be within the layers 0..{len(layers) - 1}, "
                         f"got {sorted(trainable)}")
    changed = False
    for i, layer in enumerate(layers):
        trains = i in trainable
        for p in parameters(layer):
            changed |= p.requires_grad != trains
            p.requires_grad_(trains)
            # An optimizer would go on applying a gradient that is still there.
            if not trains:
                p.grad = None
    return changed


# ---- What a schedule costs -----------------------------------------------------------------------

def backward_share(trainable, sizes, input_gradient=True):
    """Estimated backward compute of the layers, as a share of training them all and their input.

    sizes: parameters of each layer; input_gradient: whether anything below the layers trains.
    Attention's scores are left out: with texts of width / 3 tokens the share is 3 points higher."""
    cost = 0
    for i, size in enumerate(sizes):
        # Gradients of weights, where the layer trains; of activations, where it or one below does
        if i in trainable:
            cost += size
            input_gradient = True
        if input_gradient:
            cost += size
    return cost / (2 * sum(sizes))


def preview(epochs, sizes, outside=0, outside_frozen=0, input_gradient=True, lr_factors=None):
    """Table as text: what trains in each epoch, and what it costs.

    epochs: the set of layers that train in each; sizes: parameters of each layer; outside,
    outside_frozen: parameters elsewhere that train, and that do not; lr_factors: learning rate of
    each layer divided by the full one."""
    num_layers = len(sizes)
    total = sum(sizes) + outside + outside_frozen
    # The mark of a layer that trains: its learning rate in tenths (0.3 may be 0.29999999)
    marks = ""
    for factor in lr_factors or [1] * num_layers:
        tenths = int(10 * factor + 1e-6)
        marks += "0123456789#"[min(tenths, 10)]

    width = max(6, num_layers)
    lines = [f"{num_layers} layers, left = bottom: # trains, "
             "0-9 with that many tenths of the learning rate, . frozen",
             f"epoch  {'layers':{width}}  trained  parameters  backward compute  optimizer memory"]
    ever = set()
    costs = []
    for number, trainable in enumerate(epochs, 1):
        # AdamW keeps its state of whatever has trained so far.
        ever |= trainable
        bar = ""
        training = stored = outside
        for i, size in enumerate(sizes):
            training += size * (i in trainable)
            stored += size * (i in ever)
            bar += marks[i] if i in trainable else "."
        cost = backward_share(trainable, sizes, input_gradient)
        costs.append(cost)
        lines.append(f"{number:5}  {bar:{width}}  {len(trainable):7}  {training / total:10.1%}  "
                     f"{cost:16.1%}  {stored / total:16.1%}")

    # Forward is a third of all compute, backward two thirds.
    mean = sum(costs) / len(costs)
    everything = (1 + 2 * mean) / 3
    lines.append(f"mean: {mean:.1%} of the layers' backward, {everything:.1%} of all their compute")
    if input_gradient and mean < 1:
        lines.append("embeddings train: gradients pass through frozen layers, "
                     "which save their weight gradients only")
    # In print the bottom layer is layer 1.
    never = [str(i + 1) for i in range(num_layers) if i not in ever]
    if never:
        lines.append(f"warning: layers that never train in these {len(epochs)} epochs: "
                     f"{', '.join(never)}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Preview a schedule: what trains, at what cost.")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("--layers", type=int, required=True, help="number of layers")
    parser.add_argument("--epochs", type=int, required=True, help="number of epochs")
    strategy = parser.add_mutually_exclusive_group()
    strategy.add_argument("--suf", type=int, metavar="K", help="the top K, K more in every epoch")
    strategy.add_argument("--train-top", type=int, metavar="N", help="the top N in every epoch")
    parser.add_argument("--lr-decay", type=float, default=1.0, metavar="D",
                        help="learning rate times D per layer down")
    parser.add_argument("--frozen-embeddings", action="store_true", help="nothing below trains")
    args = parser.parse_args()
    n = args.layers
    if n < 1 or args.epochs < 1:
        parser.error(f"--layers and --epochs must be at least 1, got {n} and {args.epochs}")
    try:
        factors = layer_decay(1.0, args.lr_decay, n)
        top = n if args.train_top is None else args.train_top
        epochs = [train_top(n, top)] * args.epochs
        if args.suf is not None:
            epochs = [suf(epoch, n, args.suf) for epoch in range(args.epochs)]
    except ValueError as error:
        parser.error(str(error))
    print(preview(epochs, [1] * n, 0, 0, not args.frozen_embeddings, factors))


if __name__ == "__main__":
    main()
