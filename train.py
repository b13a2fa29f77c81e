"""Fine-tune CCLM or UC2 on English task data, with scheduled unfreezing or without, and test it in every language.

    python train.py --model cclm --task xgqa --suf
        on the embedded miniature: no data, no GPU, about a minute
    python train.py --model cclm --task xgqa --suf --data IGLUE --checkpoint cclm_x2vlm_base.th \\
                    --tokenizer sentencepiece.bpe.model
        the paper's experiment
    torchrun --nproc_per_node 8 train.py ...
        the same on eight GPUs
    python train.py --few-shot de --shots 48 --init RUN
        a finished run goes on with a few examples of another language

Paper: section 3 (scheduled unfreezing), 4.1 (recipes, in recipes.py), 5.2
(--lr-decay), 5.3 (--train-top), 5.4 (few-shot).

A run is a folder: args.json, log.jsonl (a line per step, a line per evaluation), results.json, predictions/, model.pt
(official names), last.pt (to resume from), timing.json. Nothing random depends on the past: batches, augmentation and
dropout are functions of (seed, step), so an interrupted and resumed run ends in the same weights, bit for bit on a CPU.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import resource
import shlex
import sys
import time
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import cclm
import data
import eval as evaluation
import files
import mini
import schedule
import uc2
import vit
from files import InputError
from model import TransformerLayer, read_checkpoint
from processes import Stop, interrupt, on_all_ranks, on_signals, ranks, say, start
from recipes import Recipe, contradiction, few_shot_recipe, parse_args, recipe_of, strategy_name
from run_folder import (
    FLAGS,
    RECIPE_FLAGS,
    Log,
    check_same,
    first_weights,
    input_files,
    resume,
    start_folder,
    write_tensors,
    write_weights,
)

# ---------------------------------------------------------------------------------------------------------------------
# What trains when, and at which rate


def trainable_layers(args, recipe, epoch, num_layers):
    """Set of the layers (0 = bottom) that train in an epoch (from 0)."""
    if args.suf is not None:
        return schedule.suf(epoch, num_layers, recipe.suf_k if args.suf is True else args.suf, args.layer_order)
    return schedule.train_top(num_layers, num_layers if args.train_top is None else args.train_top)


def layer_order(args, model, dataset, items, device):
    """The order in which layers thaw, for `schedule.suf`: None for the paper's, top-down."""
    n = len(model.layers)
    if args.order == "bottom-up":
        return list(range(n))
    if args.order == "random":
        return np.random.default_rng(args.seed).permutation(n).tolist()
    return fisher_order(model, dataset, items, device) if args.order == "fisher" else None


def fisher_order(model, dataset, items, device):
    """Layers by the trace of their empirical Fisher information, largest first (after
    Liu et al. 2024, FUN with Fisher).

    The trace is the squared gradient of a batch, summed over the layer and over `items`. Taken once, from the
    pre-trained model: theirs is renewed whenever a layer thaws, which would make the schedule depend on the past.
    """
    trace = [0.0] * len(model.layers)
    model.eval()
    for batch in data.load_batches(dataset, items, 0, device):
        model.zero_grad(set_to_none=True)
        batch.pop("ids")
        model({name: tensor.to(device) for name, tensor in batch.items()}).backward()
        for i, layer in enumerate(model.layers):
            trace[i] += sum(parameter.grad.square().sum().item() for parameter in layer.parameters())
    model.zero_grad(set_to_none=True)
    return sorted(range(len(trace)), key=lambda i: -trace[i])


def learning_rates(args, recipe, num_layers):
    """Peak learning rate of every part of the model: "layer 0" …, "embeddings", "vision", "head"."""
    decay = 1.0 if args.lr_decay is None else args.lr_decay
    rates = {f"layer {i}": rate for i, rate in enumerate(schedule.layer_decay(recipe.lr, decay, num_layers))}
    embeddings = recipe.lr if recipe.embedding_lr is None else recipe.embedding_lr
    if args.embedding_lr is None:  # the paper is silent: one step further down than the lowest layer
        embeddings *= decay**num_layers
    vision = recipe.lr if recipe.vision_lr is None else recipe.vision_lr
    return rates | {"embeddings": embeddings, "vision": vision, "head": recipe.lr}


def part_of(model):
    """Parameter name -> part of the model: "layer 0" …, "embeddings", "vision" or "head"."""
    layer_of = {id(p): f"layer {i}" for i, layer in enumerate(model.layers) for p in layer.parameters()}
    return {name: model.group_of(name) or layer_of[id(parameter)] for name, parameter in model.named_parameters()}


def parameter_groups(model, part, rates, weight_decay):
    """AdamW's groups, one per part and decay.

    All parameters from the start: what is frozen has no gradient and is skipped.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((part[name], model.decays(name)), []).append(parameter)
    return [{"params": parameters, "peak_lr": rates[part_name], "weight_decay": weight_decay if decays else 0.0}
            for (part_name, decays), parameters in groups.items()]


def make_optimizer(groups, recipe):
    return torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas, eps=recipe.eps, fused=True)


def lr_factor(step, total, warmup):
    """Linear from 0 to 1 over `warmup` steps, then linear to 0 at `total`.

    The first step has rate 0, as in both references.
    """
    return step / max(1, warmup) if step < warmup else max(0.0, (total - step) / max(1, total - warmup))


def set_rates(optimizer, factor, recipe):
    """The learning rates of the step that follows, and its eps.

    The references add eps before Adam's bias correction, torch after it: dividing it by the correction is the same.
    That goes by a parameter's own number of updates, and a group's parameters unfreeze together.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        if group["params"][0].requires_grad:
            group["updates"] = group.get("updates", 0) + 1
            group["eps"] = recipe.eps / math.sqrt(1 - recipe.betas[1] ** group["updates"])


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def fit(model, examples, dataset, args, recipe, settings, device, after_epoch):
    """Train `model` on `dataset`. after_epoch(epoch, step, log) is called after every epoch. -> the log.

    A batch is split into equal parts, one forward pass each: `grad_accum` for every process. A signal ends the program
    after the step, with everything saved (see `Stop`). InputError if a loss or gradient is not finite.
    """
    rank, processes = ranks()
    steps = len(examples) // recipe.batch_size  # per epoch
    total, parts = steps * recipe.epochs, processes * args.grad_accum
    mine = range(rank * args.grad_accum, (rank + 1) * args.grad_accum)
    optimizer = prepare_parameters(model, args, recipe)
    states = on_all_ranks(resume, args.run, settings, model, optimizer) if args.resume else [0]
    if len(set(states)) > 1:
        raise InputError(f"{args.run}: the processes see different last.pt; their run folder must be a shared one")
    first = states[0]
    if first > total:
        raise InputError(f"{args.run}: its last.pt is from step {first} of {total}, which cannot be")
    log = Log(args.run, first) if rank == 0 else None
    items = data.training_items(examples, recipe.batch_size, args.seed, recipe.epochs, first, parts, mine,
                                **batch_composition(args, examples))
    batches = data.load_batches(dataset, items, args.workers, device)
    if args.compile:
        compile_layers(model)
    with tqdm(total=total, initial=first, desc="training", unit="step", disable=rank > 0, dynamic_ncols=True) as bar:
        stop, loss_of = Stop(), None
        model.train()

        def end_epoch(step):
            stop.leave_step()
            after_epoch(step // steps - 1, step, log)
            stop.in_step = True

        if first and first % steps == 0:  # what follows the epoch may have been cut short
            end_epoch(first)
        for step in range(first, total):
            epoch = step // steps
            trainable = trainable_layers(args, recipe, epoch, len(model.layers))
            if schedule.apply(model.layers, trainable) or loss_of is None:
                announce(model, epoch, trainable)
                if args.compile:
                    torch.compiler.reset()  # torch 2.11 would reuse what it compiled while a layer was frozen
                loss_of = None  # the old wrapper's hooks go before the new one's come
                loss_of = wrap(model, device)
            factor = lr_factor(step, total, recipe.warmup * total)
            set_rates(optimizer, factor, recipe)

            losses, ids = [], []
            for part in mine:
                batch = next(batches)
                ids += batch.pop("ids")
                batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
                seed_part(args.seed, step, part)
                # gradients travel between the processes once per step, after the last part
                with loss_of.no_sync() if dist.is_initialized() and part != mine[-1] else contextlib.nullcontext():
                    with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                        loss = loss_of(batch)
                    (loss / args.grad_accum).backward()
                losses.append(loss.detach())
            norm = clip_gradients(model, recipe.clip)

            shared = torch.stack([torch.stack(losses).mean(), norm, torch.tensor(float(stop.requested), device=device)])
            if dist.is_initialized():
                dist.all_reduce(shared)
            loss, norm, stopping = (shared / processes).tolist()
            done = step + 1
            check_finite(args.run, done, loss, norm, ids)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if log:
                log.add(step=done, epoch=epoch + 1, loss=loss, gradient_norm=norm, lr_factor=factor)
            bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss:.3f}", refresh=False)
            bar.update()

            if log and (done % steps == 0 or done % args.save_every == 0 or stopping):
                log.sync()  # before last.pt: its step is never ahead of the log
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "settings": settings,
                         "step": done}
                write_tensors(os.path.join(args.run, "last.pt"), state)
            if stopping:
                if dist.is_initialized():
                    dist.barrier()  # where one process has ended, torchrun ends the others, even while they save
                say(f"stopped and saved after step {done} of {total}; the same command with --resume goes on")
                sys.exit(128 + stop.number)
            if done % steps == 0:
                end_epoch(done)
        stop.leave_step()
    return log


def prepare_parameters(model, args, recipe):
    """Freeze what is frozen throughout, check that every parameter has its place. -> optimizer."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.group_of(name) not in args.freeze)
    rates = learning_rates(args, recipe, len(model.layers))
    optimizer = make_optimizer(parameter_groups(model, part_of(model), rates, recipe.weight_decay), recipe)
    outside = [parameter for name, parameter in model.named_parameters() if model.group_of(name)]
    schedule.check_partition(model, model.layers, outside, optimizer)
    return optimizer


def batch_composition(args, examples):
    """How `data.epoch_batches` puts batches together."""
    if args.questions_per_image > 1:
        return {"groups": examples.image_rows, "group_size": args.questions_per_image}
    # captions of one length would be too easy to tell apart by it: in retrieval, batches stay random
    return {"pool": 1 if args.task == "xflickrco" else 16}


def wrap(model, device):
    """What gives the loss: the model, under DistributedDataParallel where there are several processes.

    Made anew for every phase: DDP averages the gradients of what was trainable when it was made, and only those.
    """
    if not dist.is_initialized():
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, broadcast_buffers=False)


def compile_layers(model):
    """torch.compile every layer by itself, for texts of any length.

    Layers of one kind share their compiled code, so a handful of graphs serve all, where the whole model in one graph
    takes minutes to trace.
    """
    torch._dynamo.config.recompile_limit = 64  # kinds of layer x (trained, frozen, in evaluation)
    for part in model.modules():
        if isinstance(part, (TransformerLayer, vit.Block)):
            part.compile(dynamic=True)


def seed_part(seed, step, part):
    """The generator of dropout and stochastic depth for one part of one step: the same whichever process runs it."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, part)).generate_state(1, np.uint64)[0] >> 1))


def clip_gradients(model, most):
    """Scale the gradients to a global norm of at most `most` (None: leave them). -> the norm before."""
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])
    if most is not None:
        torch.nn.utils.clip_grads_with_norm_(trained, most, norm)
    return norm


def check_finite(run, step, loss, norm, ids):
    if math.isfinite(loss) and math.isfinite(norm):
        return
    report = f"nonfinite-{ranks()[0]}.json"
    numbers = {"step": step, "loss": str(loss), "gradient_norm": str(norm), "records": ids}
    files.write_json(os.path.join(run, report), numbers)
    raise InputError(
        f"{run}: loss {loss} and gradient norm {norm} at step {step}; this batch's records are in {report}")


def announce(model, epoch, trainable):
    """One line on what trains from this epoch on."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    everything, training = sum(n for n, _ in counts), sum(n for n, trains in counts if trains)
    layers = sorted(trainable)
    if layers == list(range(len(model.layers))):
        names = f"all {len(layers)} layers"
    elif layers and layers == list(range(layers[0], len(model.layers))):
        names = f"the top {len(layers)} of {len(model.layers)} layers"
    else:
        names = f"{len(layers)} of {len(model.layers)} layers ({', '.join(map(str, layers)) or 'none'})"
    say(f"epoch {epoch + 1}: {names} train, {training:,} of {everything:,} parameters ({training / everything:.1%})")


# ---------------------------------------------------------------------------------------------------------------------
# Model and data


def load_model(args, device, num_labels):
    """-> (model, config of the checkpoint, recipe, what is not as in the paper)."""
    try:
        tensors, config = read_checkpoint(args.checkpoint)
        recipe, changed = recipe_of(args, config)
        torch.manual_seed(args.seed)  # new parameters: heads, decoder
        if args.model == "cclm":
            model = cclm.from_pretrained(tensors, config, args.task, recipe.image_size, args.checkpoint,
                                         dropout=recipe.dropout, drop_path=recipe.drop_path)
        else:
            model = uc2.from_pretrained(tensors, config, args.task, args.checkpoint, num_labels, dropout=recipe.dropout)
            say(f"{args.checkpoint}: UC2 under " + {"volta": "IGLUE's names",
                                                    "original": "its original names"}[model.variant])
            if uc2.image_norm_is_identity(tensors):
                say("its image LayerNorm is identity: the public conversion put the image's into the text's place")
    except ValueError as error:
        raise InputError(str(error)) from None
    return model.to(device), config, recipe, changed


def training_data(args, recipe, tokenizer, labels, split):
    """-> (examples, dataset of batches) of the English training split ("train") or of args.few_shot's ("few-shot")."""
    keep = evaluation.has_text if args.task == "xflickrco" else lambda text, record: True
    # IGLUE trains UC2 on pairs without a gold label, too: no target is 1
    if args.task == "xvnli" and args.model == "cclm":
        keep = lambda text, record: record.label != "-"
    examples = data.load_examples(args.data, args.task, split, data.text_rules(recipe), tokenizer,
                                  args.few_shot or "en", args.shots, True, keep, args.limit)
    pictures = evaluation.make_pictures(args, recipe, split, examples.image_keys)
    if args.model == "uc2" and args.task == "xflickrco":
        # IGLUE's few-shot code draws the hard caption like the random one
        pools = data.read_hard_negatives(args.data, examples.image_keys) if split == "train" else {}
        return examples, data.RankingBatches(examples, pictures, args.seed, pools, args.first_image_negatives)
    if args.task == "xgqa":
        data.check_answers(examples, labels)
    names = labels if args.task == "xgqa" else evaluation.MODELS[args.model].LABELS
    number = {name: i for i, name in enumerate(names)}
    if args.task == "xflickrco":
        targets = data.contrast_targets(examples)
    elif args.model == "uc2":
        targets = data.class_targets(examples, number)
    elif args.task == "xgqa":
        targets = data.answer_targets(examples, dict(zip(labels, tokenizer(labels))))
    else:
        targets = data.label_targets(examples, number)
    augment = recipe.augment and args.model == "cclm"
    share_images = args.questions_per_image > 1 or args.model == "uc2"  # regions are never augmented
    return examples, data.TrainingBatches(examples, pictures, targets, args.seed, augment, share_images)


def accumulation(args, recipe, examples):
    """Set args.grad_accum: as asked, or as few forward passes as keep each within the recipe's micro batch."""
    processes, size = ranks()[1], recipe.batch_size
    if len(examples) < size:
        raise InputError(f"{examples.source}: {len(examples)} training examples do not fill one batch of {size}; "
                         "use a smaller --batch-size")
    if args.grad_accum is None:
        args.grad_accum = next((n for n in range(1, size + 1) if size % (processes * n) == 0
                                and size // (processes * n) <= recipe.micro_batch), 1)
    if size % (processes * args.grad_accum):
        raise InputError(f"a batch of {size} cannot be split evenly over {processes} process(es) x {args.grad_accum} "
                         "accumulation steps")
    contrasted = size // args.grad_accum
    most = int(np.bincount(examples.image_rows).max())  # captions of one image
    if args.model == "cclm" and args.task == "xflickrco" and contrasted <= most:
        raise InputError(f"{examples.source}: CCLM learns retrieval from the pairs of one forward pass, each other's "
                         f"negatives; {contrasted} pair(s) may all be of one image, which has up to {most} captions")


def print_plan(args, recipe, changed, model, examples, tests, labels):
    """Data counts, recipe, schedule and parameter groups."""
    n, steps = len(model.layers), len(examples) // recipe.batch_size
    say(f"{args.model} on {args.task}, {strategy_name(args)}, seed {args.seed}: {len(examples):,} training examples on "
        f"{len(examples.image_keys):,} images; {recipe.epochs} epochs of {steps:,} steps of {recipe.batch_size}, in "
        f"{args.grad_accum} forward pass(es) on each of {ranks()[1]} process(es), {args.precision}")
    say("test: " + ", ".join(f"{language} {len(part):,}" for language, part in tests.examples.items()))
    seen = {name for record in examples.records for name in record.answers or [record.label]}
    names = {"xgqa": labels, "xvnli": cclm.LABELS}.get(args.task, [])
    if unseen := [name for name in names if name not in seen]:
        say(f"note: {len(unseen):,} of {len(names):,} labels have no training example ({', '.join(unseen[:5])} …)")
    known = set(labels)
    outside = {language: sum(known.isdisjoint(record.answers) for record in part.records)
               for language, part in tests.examples.items()} if args.task == "xgqa" else {}
    if any(outside.values()):
        counts = ", ".join(f"{language} {count}" for language, count in outside.items() if count)
        say(f"note: test answers that are no label, and count as wrong: {counts}")
    say("\n    ".join(["not as in the paper:", *changed]) if changed else "recipe: the paper's")

    rates, part, count = learning_rates(args, recipe, n), part_of(model), {}
    for name, parameter in model.named_parameters():
        count[part[name]] = count.get(part[name], 0) + parameter.numel()
    sizes = [count.pop(f"layer {i}") for i in range(n)]  # what remains is outside the layers
    frozen = sum(count[name] for name in count if name in args.freeze)
    say(schedule.preview([trainable_layers(args, recipe, epoch, n) for epoch in range(recipe.epochs)], sizes,
                         sum(count.values()) - frozen, frozen, "embeddings" not in args.freeze,
                         [rates[f"layer {i}"] / recipe.lr for i in range(n)]))
    rate = {name: "frozen" if name in args.freeze else f"at {rates[name]:g}" for name in count}
    say("outside the layers: " + ", ".join(f"{name} {count[name]:,} parameters {rate[name]}" for name in count))


# ---------------------------------------------------------------------------------------------------------------------
# A whole run


def run(args):
    """From the command line to results.json."""
    device, began = start(args), time.time()
    args.miniature = args.data is None
    if args.miniature:
        args.data, args.checkpoint, args.tokenizer = on_all_ranks(mini.prepare, args.model, ranks()[0] == 0)[0]
    args.run = args.run or os.path.join("runs", f"{args.model}-{args.task}-{strategy_name(args)}-seed{args.seed}")
    if on_all_ranks(finished, args)[0]:
        return
    labels = data.read_labels(args.data) if args.task == "xgqa" else []
    model, config, recipe, changed = load_model(args, device, len(labels))
    if args.train_top is not None and args.train_top > len(model.layers):
        raise InputError(f"--train-top {args.train_top}: the model has {len(model.layers)} layers")
    tokenizer = data.Tokenizer(args.tokenizer)
    warning = tokenizer.check(config.get("tokenizer_sha256", data.XLMR_SHA256), model.sizes.vocabulary)
    if warning:
        say(f"warning: {warning}")
    evaluation.introduce(model, tokenizer, labels)
    examples, dataset = training_data(args, recipe, tokenizer, labels, "train")
    tests = evaluation.load_split(args, recipe, tokenizer, labels, "test")
    evaluation.check_features(model, dataset.pictures, tests.pictures)
    accumulation(args, recipe, examples)
    first_parts = data.training_items(examples, recipe.batch_size, args.seed, 1, 0, ranks()[1] * args.grad_accum, [0])
    # one process's order for all: on a GPU, two may not agree to the last bit
    args.layer_order = on_all_ranks(layer_order, args, model, dataset, itertools.islice(first_parts, 20), device)[0]
    print_plan(args, recipe, changed, model, examples, tests, labels)
    if args.dry_run:
        return

    inputs = [args.checkpoint, *input_files(args, examples, tests, dataset.pictures, tests.pictures)]
    settings, *_ = on_all_ranks(start_folder, args, recipe, changed, model, examples, inputs)
    seconds = {"loading": time.time() - began, "evaluation": 0.0}

    def test():
        then = time.time()
        results, predictions = evaluation.evaluate(model, tests, device, args.precision, args.workers)
        seconds["evaluation"] += time.time() - then
        return results, predictions

    def after_epoch(epoch, step, log):
        if args.eval_every_epoch and epoch + 1 < recipe.epochs:
            results, _ = test()
            say(f"after epoch {epoch + 1}\n{evaluation.table(args.task, results)}")
            if log:
                log.add(step=step, epoch=epoch + 1, **summary(args, results))
        if args.save_epochs and log:
            write_weights(os.path.join(args.run, f"epoch{epoch + 1}.pt"), model)

    log = fit(model, examples, dataset, args, recipe, settings, device, after_epoch)
    seconds["training"] = time.time() - began - sum(seconds.values())
    results, predictions = test()
    finish(args, model, summary(args, results), predictions, log, recipe.epochs * (len(examples) // recipe.batch_size))
    if log:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        files.write_json(os.path.join(args.run, "timing.json"), {"seconds": seconds, "peak_memory_bytes": peak})
    say(next_step(args))


def finished(args):
    """Whether the run to resume is complete already; says so. InputError if it was one with other flags."""
    if not args.resume or not os.path.isfile(os.path.join(args.run, "results.json")):
        return False
    then = evaluation.read_run(args.run)[0]
    check_same(args.run, vars(then),
               {name: getattr(args, name) for name in (*FLAGS, "miniature", *RECIPE_FLAGS, "few_shot", "shots")})
    weights = first_weights(args)
    if os.path.isfile(weights) and not evaluation.has_read(args.run, weights):
        raise InputError(f"{args.run}: cannot resume with other settings: it did not start from {weights}")
    results = evaluation.read_results(args.run)
    say(f"{args.run} is complete\n{evaluation.table(results['task'], results['languages'])}")
    return True


def summary(args, results):
    """results.json's content."""
    means = {name: evaluation.mean_zero_shot(results, name) for name, _ in evaluation.headline(args.task)}
    return {"model": args.model, "task": args.task, "strategy": strategy_name(args), "seed": args.seed,
            "languages": results, "mean_zero_shot": means if len(means) > 1 else means.popitem()[1]}


def finish(args, model, results, predictions, log, step):
    """Predictions, weights, and results.json last: where it is, the run is complete."""
    if log:
        for language, entries in predictions.items():
            files.write_json(os.path.join(args.run, "predictions", f"{language}.json"), entries)
        write_weights(os.path.join(args.run, "model.pt"), model)
        log.add(step=step, **results)
        log.sync()
        files.write_json(os.path.join(args.run, "results.json"), results)
    say(f"{evaluation.table(args.task, results['languages'])}\nresults, predictions and weights: {args.run}")


def next_step(args):
    """What a newcomer may want to run after this: the other of standard fine-tuning and SUF, or their comparison."""
    other = "standard" if strategy_name(args) != "standard" else "suf"
    folder = os.path.join("runs", f"{args.model}-{args.task}-{other}-seed{args.seed}")
    same = {name: getattr(args, name) for name in ("limit", *RECIPE_FLAGS)}
    if os.path.isfile(os.path.join(folder, "results.json")) and not any(same.values()):
        pair = (folder, args.run) if other == "standard" else (args.run, folder)
        return f"next: {shlex.join(['python', 'eval.py', '--compare', *pair])}"
    files_given = () if args.miniature else ("data", "checkpoint", "tokenizer")
    same |= {name: getattr(args, name) for name in ("seed", *files_given)}
    words = ["python", "train.py", "--model", args.model, "--task", args.task, *(["--suf"] if other == "suf" else [])]
    words += [word for name, value in same.items() if value for word in (f"--{name.replace('_', '-')}", str(value))]
    kind = "scheduled unfreezing" if other == "suf" else "standard fine-tuning"
    return f"next: {kind}, to compare: {shlex.join(words)}"


# ---------------------------------------------------------------------------------------------------------------------
# Few-shot (section 5.4, IGLUE's protocol): a finished English run goes on with a few examples of another language


def run_few_shot(args):
    """Train once per learning rate of the grid, choose rate and epoch on development
    data, test the language and English.
    """
    device = start(args)
    evaluation.read_results(args.init)  # or a line that says it is no finished run
    english, recipe = evaluation.read_run(args.init)
    for name in ("model", "task", "data", "checkpoint", "tokenizer", "miniature", "image_cache"):
        setattr(args, name, getattr(english, name))
    args.run, args.layer_order = args.run or f"{args.init.rstrip(os.sep)}-{args.few_shot}{args.shots}", None
    if on_all_ranks(finished, args)[0]:
        return
    evaluation.check_known(args.task, [args.few_shot])
    if args.few_shot == "en":
        raise InputError("--few-shot en: the run has been trained on English")
    if wrong := contradiction(args):
        raise InputError(wrong)
    recipe = few_shot_recipe(args, Recipe(**vars(recipe)))
    tokenizer = data.Tokenizer(args.tokenizer)
    labels = data.read_labels(args.data) if args.task == "xgqa" else []

    def load(path):
        model = evaluation.load_weights(path, args, device, dropout=recipe.dropout)
        evaluation.introduce(model, tokenizer, labels)
        return model

    english_model = load(first_weights(args))
    examples, dataset = training_data(args, recipe, tokenizer, labels, "few-shot")
    recipe = replace(recipe, batch_size=min(recipe.batch_size, len(examples)), vision_lr=None, embedding_lr=None)
    development = development_data(args, recipe, tokenizer, labels)
    tests = evaluation.load_split(args, recipe, tokenizer, labels, "test", ["en", args.few_shot])
    evaluation.check_features(english_model, dataset.pictures, development.pictures, tests.pictures)
    accumulation(args, recipe, examples)
    inputs = input_files(args, examples, tests, dataset.pictures, tests.pictures)
    inputs += [part.source for part in development.examples.values()] + [first_weights(args)]
    # best.pt, and last.pt with Adam's state, of every rate
    on_all_ranks(start_folder, args, recipe, [], english_model, examples, inputs, 4 * len(recipe.few_shot_lrs))
    say(f"{args.model} on {args.task}, {args.few_shot}: {len(examples):,} examples on {len(examples.image_keys):,} "
        f"images ({args.shots} shots), {recipe.epochs} epochs of {len(examples) // recipe.batch_size} steps of "
        f"{recipe.batch_size}")
    say("rates " + ", ".join(f"{lr:g}" for lr in recipe.few_shot_lrs) + "; rate and epoch chosen on "
        + ", ".join(part.source for part in development.examples.values()))
    best = (-1.0, 0, "")
    for lr in recipe.few_shot_lrs:
        score, epoch, folder = few_shot_rate(args, replace(recipe, lr=lr), load, examples, dataset, development, device)
        say(f"rate {lr:g}: best after epoch {epoch}, {score:.2f} on the development data")
        best = max(best, (score, epoch, folder), key=lambda entry: entry[0])  # ties go to the rate that comes first
    model = load(os.path.join(best[2], "best.pt"))
    results, predictions = evaluation.evaluate(model, tests, device, args.precision, args.workers)
    chosen = {"few_shot": args.few_shot, "shots": args.shots, "init": args.init, "development": best[0],
              "epoch": best[1], "weights": best[2]}
    finish(args, model, summary(args, results) | chosen, predictions, Log(args.run) if ranks()[0] == 0 else None, 0)


def development_data(args, recipe, tokenizer, labels):
    """What rate and epoch are chosen on: xGQA the language's dev set; XVNLI English dev;
    xFlickrCO English Flickr30k valid.
    """
    # the first 1,000 captions: ranking all 5,070 after every epoch would outlast the training
    if args.task == "xflickrco":
        args = argparse.Namespace(**vars(args) | {"limit": min(args.limit or 1000, 1000)})
        return evaluation.load_split(args, recipe, tokenizer, labels, "valid", ["en"])
    return evaluation.load_split(args, recipe, tokenizer, labels, "dev",
                                 [args.few_shot if args.task == "xgqa" else "en"])


def few_shot_rate(args, recipe, load, examples, dataset, development, device):
    """Train with one learning rate from the English weights.

    -> (best development score, its epoch, folder of best.pt).
    """
    folder = os.path.join(args.run, f"lr-{recipe.lr:g}")
    args = argparse.Namespace(**vars(args) | {"run": folder})
    model = load(first_weights(args))

    def scores():
        with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as file:
            return [entry["development"] for entry in map(json.loads, file) if "development" in entry]

    def after_epoch(epoch, step, log):
        results, _ = evaluation.evaluate(model, development, device, args.precision, args.workers)
        values = [result[name] for result in results.values() for name, _ in evaluation.headline(args.task)]
        score = sum(values) / len(values)
        if log:
            if score > max(scores(), default=-1.0):
                write_weights(os.path.join(folder, "best.pt"), model)
            log.add(step=step, epoch=epoch + 1, development=score)
            log.sync()

    settings, *_ = on_all_ranks(start_folder, args, recipe, [], model, examples, [examples.source])
    fit(model, examples, dataset, args, recipe, settings, device, after_epoch)
    if dist.is_initialized():
        dist.barrier()  # the log is complete for all who read it
    found = scores()
    return max(found), found.index(max(found)) + 1, folder


def main(argv=None):
    args, callers_group = parse_args(argv, __doc__.split("\n\n")[0]), dist.is_initialized()
    on_signals(interrupt)
    try:
        run_few_shot(args) if args.few_shot else run(args)
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as signalled:
        say("stopped; the same command with --resume goes on from what was saved last")
        sys.exit(128 + signalled.args[0])
    except RuntimeError as error:
        # what is raised in one process where another has ended; gloo's errors have no class of their own
        if not (isinstance(error, dist.DistError) or dist.is_initialized() and "/gloo/" in str(error)):
            raise
        sys.exit(f"error: process {ranks()[0]} has lost the connection to another one, whose own message tells why")
    finally:
        if dist.is_initialized() and not callers_group:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
