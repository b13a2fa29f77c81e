"""What is measured on the weights of finished runs, for analysis.py.

Paper: section 5.1, alignment of translations (`sentence_vectors`, `similarity`, `unpaired`). The rest is not in it: how
far each layer moved (`drift`), what averaging epochs or putting lower layers back does without any training
(`post_hoc`), and what a strategy's steps cost on this machine (`measure`).

Letters: L languages, N items, D width, B texts.
"""

import math
import os
import time
from argparse import Namespace
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F

import cclm
import data
import eval as evaluation
import files
import schedule
import train
import uc2
from files import InputError
from model import read_checkpoint
from processes import accelerator


def labels_of(args):
    return data.read_labels(args.data) if args.task == "xgqa" else []


def pretrained(args, recipe):
    """The model before fine-tuning; what the checkpoint lacks is random. InputError if the file is gone, or another."""
    try:
        tensors, config = read_checkpoint(args.checkpoint)
        if args.model == "cclm":
            return cclm.from_pretrained(tensors, config, args.task, recipe.image_size, args.checkpoint)
        return uc2.from_pretrained(tensors, config, args.task, args.checkpoint, len(labels_of(args)))
    except ValueError as error:
        raise InputError(str(error)) from None


def not_fine_tuned(run):
    """Results of a run's pre-trained checkpoint as it is, by language: CCLM ranks for retrieval with pre-trained heads.

    Kept in not_fine_tuned.json of the run.
    """
    path = os.path.join(run, "not_fine_tuned.json")
    if not os.path.isfile(path):
        args, recipe = evaluation.read_run(run)
        model, device = pretrained(args, recipe), accelerator()
        test = evaluation.load_split(args, recipe, data.Tokenizer(args.tokenizer), labels_of(args), "test")
        results, _ = evaluation.evaluate(model.to(device), test, device, args.precision, args.workers)
        files.write_json(path, results)
    return files.read_json(path)


# ---------------------------------------------------------------------------------------------------------------------
# Section 5.1: states of <s>


@torch.inference_mode()
def sentence_vectors(run, epoch=None):
    """Last layer's state of <s>, at length 1, of every test item that all languages have: [L,N,D].

    run: folder; epoch: one of its saved epochs (default: the final weights). Languages are in the order of
    data.LANGUAGES. InputError where there are fewer than two such items.
    """
    device = accelerator()
    model, tokenizer, labels, args, recipe = evaluation.load_run(run, device, epoch)
    split = evaluation.load_split(args, recipe, tokenizer, labels, "test")
    model.eval()
    vectors = {language: {} for language in split.examples}
    with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        for keys, inputs in evaluation.texts_with_images(model, split, device, workers=args.workers):
            states = F.normalize(model.fuse(*inputs, first_token=True)[:, 0].float(), dim=-1).cpu()  # [B,D]
            for (language, i), state in zip(keys, states):
                vectors[language][split.examples[language].records[i].id] = state
    items = [item for item in vectors["en"] if all(item in found for found in vectors.values())]
    if len(items) < 2:
        raise InputError(f"{args.data}: the languages' test files of {args.task} share {len(items)} item(s); "
                         "translations should have the same id")
    return torch.stack([torch.stack([found[item] for item in items]) for found in vectors.values()])


def similarity(vectors):
    """[L,N,D] of length 1 -> mean cosine similarity of translations for every pair of languages: array [L,L]."""
    return torch.einsum("ind,jnd->ij", vectors, vectors).div(vectors.shape[1]).numpy()


def unpaired(vectors):
    """Mean cosine similarity of 100,000 random pairs of different items, each in a random language."""
    rng, draws, (languages, items, _) = np.random.default_rng(0), 100_000, vectors.shape
    first, offset = rng.integers(items, size=draws), rng.integers(1, items, size=draws)
    a, b = (vectors[rng.integers(languages, size=draws), item] for item in (first, (first + offset) % items))
    return float((a * b).sum(1).mean())


# ---------------------------------------------------------------------------------------------------------------------
# What training changed, and what comes out if some of it is undone


@torch.no_grad()
def drift(run):
    """How far each part of a run is from its pre-trained weights, in percent: 100 |change| / |weights|.

    -> {"1" (bottom layer), "2", …, "embeddings", "vision"}. Left out: heads and answer decoder, which start partly at
    random.
    """
    args, recipe = evaluation.read_run(run)
    model = evaluation.load_weights(os.path.join(run, "model.pt"), args, "cpu")
    before, part = dict(pretrained(args, recipe).named_parameters()), train.part_of(model)
    changed, size = defaultdict(float), defaultdict(float)
    for name, parameter in model.named_parameters():
        changed[part[name]] += (parameter - before[name]).square().sum().item()
        size[part[name]] += before[name].square().sum().item()
    names = ({str(i + 1): f"layer {i}" for i in range(len(model.layers))}
             | {"embeddings": "embeddings", "vision": "vision"})
    return {name: 100 * math.sqrt(changed[group] / size[group]) for name, group in names.items() if group in size}


@torch.no_grad()
def post_hoc(run):
    """Evaluate what can be made of a run's saved epochs without training. -> {name: results by language}.

    "average N": mean of the weights after the last N epochs. "reverted N": the final weights with the lower N layers
    back at their pre-trained ones; "dev N": the same on English development data ("dev 0": nothing reverted). Kept in
    post_hoc.json of the run: what is there is not done again.
    """
    path = os.path.join(run, "post_hoc.json")
    found = files.read_json(path) if os.path.isfile(path) else {}
    if found.get("complete"):
        return found
    device = accelerator()
    model, tokenizer, labels, args, recipe = evaluation.load_run(run, device)
    test = evaluation.load_split(args, recipe, tokenizer, labels, "test")
    dev = train.development_data(Namespace(**vars(args) | {"few_shot": "en"}), recipe, tokenizer, labels)

    def score(name, split):
        if name not in found:
            found[name], _ = evaluation.evaluate(model, split, device, args.precision, args.workers)
            files.write_json(path, found)

    score("dev 0", dev)
    for n, (layer, before) in enumerate(zip(model.layers, pretrained(args, recipe).layers), start=1):
        layer.load_state_dict(before.state_dict())
        score(f"reverted {n}", test)
        score(f"dev {n}", dev)
    total = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for n in range(1, recipe.epochs + 1):
        saved = evaluation.load_run(run, device, recipe.epochs + 1 - n)[0]
        for summed, parameter, mean in zip(total, saved.parameters(), model.parameters()):
            mean.copy_(summed.add_(parameter) / n)
        if n > 1:
            score(f"average {n}", test)
    found["complete"] = True
    files.write_json(path, found)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Cost


def measure(strategies, rounds=1):
    """Training steps of strategies on this machine, on one real batch.

    strategies: [(args, recipe)] of runs of one model and task; the first brings data and batch. They take turns in
    every round, so that a bad moment of the machine does not hit one of them alone.

    -> per strategy {"seconds": of a step, the fastest of three per round, by epoch; "loading": seconds to load a batch;
    "bytes": of AdamW's state after the last epoch}.
    """
    device, (args, recipe) = accelerator(), strategies[0]
    args = Namespace(**vars(args) | {"limit": min(args.limit or 2 * recipe.batch_size, 2 * recipe.batch_size)})
    model, tokenizer = pretrained(args, recipe).to(device).train(), data.Tokenizer(args.tokenizer)
    examples, dataset = train.training_data(args, recipe, tokenizer, labels_of(args), "train")
    train.accumulation(args, recipe, examples)
    started, parts = time.perf_counter(), args.grad_accum
    composition = train.batch_composition(args, examples)
    items = data.training_items(examples, recipe.batch_size, args.seed, 1, 0, parts, range(parts), **composition)
    batches = list(data.load_batches(dataset, items, 0, device))
    loading = (time.perf_counter() - started) * parts / len(batches)
    batches = [{name: tensor.to(device) for name, tensor in batch.items() if name != "ids"}
               for batch in batches[:parts]]
    epochs = [layers_by_epoch(*strategy, model) for strategy in strategies]
    fastest, stored = [{} for _ in strategies], [0] * len(strategies)
    for _ in range(rounds):
        for i, strategy in enumerate(strategies):
            optimizer = train.prepare_parameters(model, *strategy)  # its rates are 0: the weights stay
            for trainable in dict.fromkeys(epochs[i]):
                schedule.apply(model.layers, trainable)
                times = [timed_step(model, batches, optimizer, args.precision, device) for _ in range(3)]
                fastest[i][trainable] = min(*times, fastest[i].get(trainable, math.inf))
            stored[i] = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    return [{"seconds": [found[trainable] for trainable in layers], "loading": loading, "bytes": size}
            for layers, found, size in zip(epochs, fastest, stored)]


def layers_by_epoch(args, recipe, model):
    """The layers that train in each epoch: [frozenset]."""
    return [frozenset(train.trainable_layers(args, recipe, epoch, len(model.layers))) for epoch in range(recipe.epochs)]


def timed_step(model, batches, optimizer, precision, device):
    """One optimizer step over the forward passes `batches`. -> seconds."""
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    finish()
    started = time.perf_counter()
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(batch)
        (loss / len(batches)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    finish()
    return time.perf_counter() - started
