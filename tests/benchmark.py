"""How fast, how large, how exact: a loop like the released code's beside ours, in one process.

    python tests/benchmark.py                                     base size, 20 GB of memory
    python tests/benchmark.py --size mini --parts training,pairs  some of PARTS, see the end
    python tests/benchmark.py --gpu                               a GPU in 8 minutes

The stand-in for the released code runs on our weights and does what that code does. Training:
float32, attention written out, batches padded to the longest text, an image for every question,
logits of all answer positions, AdamW tensor by tensor. Evaluation: 4 questions at once, an image
for each, 128 candidates by first token, each with a copy of the question's states; captions padded
to 80, each with a copy of the image. Linux only.
"""

import argparse
import contextlib
import functools
import math
import os
import statistics
import sys
import time
from dataclasses import replace
from resource import RUSAGE_SELF, getrusage
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once

import cclm  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import schedule  # noqa: E402
import train  # noqa: E402
import uc2  # noqa: E402
from cclm import BOS, EOS, PAD  # noqa: E402

DEVICE = evaluation.accelerator()
ON_GPU = DEVICE.type == "cuda"
NAME = torch.cuda.get_device_name() if ON_GPU else "CPU"
CLOCK = time.perf_counter if ON_GPU else time.process_time  # other work on the CPUs does not count
RECIPE = train.RECIPES["cclm", "xgqa"]
CCLM = {"base": cclm.Sizes(768, 250002, 12, 6, 12, 12, 3072, 3072, 514, 1, 768, 12, 12, 3072, 16,
                           384, 256),
        "mini": cclm.Sizes(64, 2002, 4, 2, 4, 4, 128, 128, 130, 1, 64, 2, 4, 256, 16, 96, 32)}
UC2 = {"base": uc2.Sizes(768, 250002, 12, 12, 3072, 514, 2, 2048, 7),
       "mini": uc2.Sizes(64, 2002, 6, 4, 128, 130, 2, 64, 7)}
MODELS = {"CCLM": (cclm.CCLM, CCLM), "UC2": (uc2.UC2, UC2)}


def peak_of(function):
    """-> (function(), bytes that it took at most beyond what was there)."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return function(), torch.cuda.max_memory_allocated() - before
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # from here on the most so far is what is there now
    before = getrusage(RUSAGE_SELF).ru_maxrss
    return function(), 1024 * (getrusage(RUSAGE_SELF).ru_maxrss - before)


def ladder(args, title, rows):
    """Time {name: (amount, function)}, a call of which does `amount` questions or pairs; with --gpu
    what is "ours" also in bf16.

    Prints medians, speed per question or pair beside the first row's, and peak memory.
    -> ({name: median seconds}, {name: output}). Repetitions are interleaved.
    """
    if args.gpu:  # CPUs of no bf16 would take minutes
        for name, (amount, function) in list(rows.items()):
            if name.startswith("ours"):
                rows[name + ", bf16"] = amount, functools.partial(function, bf16=True)
    seconds, peaks, outputs = {name: [] for name in rows}, {}, {}
    for _ in range(args.repeat):
        for name, (_, function) in rows.items():
            began = CLOCK()
            outputs[name], peaks[name] = peak_of(function)
            if ON_GPU:
                torch.cuda.synchronize()
            seconds[name].append(CLOCK() - began)
    print(f"\n{title}, {args.size}")
    medians = {name: statistics.median(seconds[name]) for name in outputs}
    first = None
    for name, median in medians.items():
        each = median / rows[name][0]
        first = first or each
        print(f"  {name:50} {median:8.3f} s for {rows[name][0]:4} {first / each:7.2f}x "
              f"{peaks[name] / 1e9:+7.2f} GB", flush=True)
    if {"ours", "stand-in"} <= medians.keys():
        ours, theirs = outputs["ours"], outputs["stand-in"]
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        print(f"  ours differs from the stand-in by {difference:.0e}, relatively", flush=True)
    return medians, outputs


# ---- Random data ---------------------------------------------------------------------------------

def texts(count, mean, seed=0):
    """Token rows <s> … </s>, of lengths like the real: mean 14 for questions, 4 for answers."""
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(math.log(mean) - 0.08, 0.4, count).round().clip(3, 80).astype(int)
    return [np.array([BOS, *rng.integers(4, 2002, n - 2), EOS]) for n in lengths]


def pictures(kind, size, images):
    """What a model sees of so many images: pixels (CCLM) or 36 regions each (UC2)."""
    if kind == "CCLM":
        shape = (images, 3, CCLM[size].image_size, CCLM[size].image_size)
        return {"images": torch.randint(256, shape, dtype=torch.uint8, device=DEVICE)}
    return {"features": torch.randn(images, 36, UC2[size].features, device=DEVICE),
            "locations": torch.rand(images, 36, 7, device=DEVICE),
            "region_mask": torch.ones(images, 36, dtype=torch.long, device=DEVICE)}


def padded(rows):
    """-> (input_ids, attention_mask)."""
    return [part.to(DEVICE) for part in data.pad(rows)]


def question_batch(size, questions, images, seed=0):
    """A training batch of xGQA for CCLM, with an answer to each question."""
    input_ids, attention_mask = padded(texts(questions, 14, seed))
    answer_ids, _ = padded(texts(questions, 4, seed + 1))
    index = torch.arange(images, device=DEVICE).repeat_interleave(questions // images)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "image_index": index,
            "answer_ids": answer_ids, "answer_question": torch.arange(questions, device=DEVICE),
            "answer_weight": torch.ones(questions, device=DEVICE), **pictures("CCLM", size, images)}


def question_set(size, images, questions, languages):
    """So many questions to each image and language: what evaluation.texts_with_images reads."""
    shown, examples, image_rows = pictures("CCLM", size, images)["images"], {}, {}
    for language in range(languages):
        # the one thing that data.Examples are asked for
        examples[language] = SimpleNamespace(tokens=texts(images * questions, 14, language))
        image_rows[language] = np.arange(images).repeat(questions)
    loader = SimpleNamespace(batch=lambda rows: {"images": shown[rows]})
    return SimpleNamespace(examples=examples, image_rows=image_rows, pictures=loader)


# ---- The stand-in for the released code ----------------------------------------------------------

def written_out(query, key, value, mask=None, dropout=0.0):
    """In place of F.scaled_dot_product_attention."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -10000.0)
    elif mask is not None:
        scores = scores + mask
    return F.dropout(scores.softmax(-1), dropout) @ value


@contextlib.contextmanager
def as_released(on=True):
    fused = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = written_out if on else fused
    yield
    F.scaled_dot_product_attention = fused


def released_losses(decoder, states, mask, answer_ids):
    """-log p of an answer to each question, with the logits of all positions: [A]."""
    hidden = decoder.decode(answer_ids, decoder.memory(states), mask)[:, :-1]
    losses = F.cross_entropy(decoder.logits(hidden).flatten(0, 1), answer_ids[:, 1:].flatten(),
                             ignore_index=PAD, reduction="none")
    return losses.view(len(answer_ids), -1).sum(1)


@as_released()
def released_answers(model, questions, k=128):
    """The first four questions of a set -> the index of the answer to each."""
    input_ids, mask = padded(questions.examples[0].tokens[:4])
    memory = model.memory(questions.pictures.batch(questions.image_rows[0][:4]))
    states = model.fuse(model.encode_texts(input_ids, mask), mask, memory)
    # the candidates of likeliest first token …
    decoder, answer_ids = model.decoder, model.answer_ids
    start = decoder.decode(answer_ids[:1, :1].expand(4, 1), decoder.memory(states), mask)
    log_p = decoder.logits(start[:, 0]).log_softmax(-1)
    first, top = log_p[:, answer_ids[:, 1]].topk(k)  # [4,k]
    # … whole, each with a copy of its question's states
    states, mask = states.repeat_interleave(k, 0), mask.repeat_interleave(k, 0)
    losses = released_losses(decoder, states, mask, answer_ids[top.flatten()])
    best = (first - losses.view_as(first)).argmax(1, keepdim=True)
    return top.gather(1, best)[:, 0]


@as_released()
def released_scores(model, input_ids, mask, states, image, encoded):
    """Scores of pairs, of which each has a copy of its image, and the states of all tokens."""
    if hasattr(model, "match_head"):  # UC2 embeds texts and regions anew for each pair
        copies = {name: part.expand(len(mask), *part.shape[1:]) for name, part in image.items()}
        states = model.fuse(model.encode_texts(input_ids, mask), mask, model.memory(copies))
        return model.match_head(model.pooled(states))[:, 0]
    copies = encoded.expand(len(mask), -1, -1).contiguous()
    for layer in model.cross_layers:
        keys_values = layer.cross_attention.keys_values(copies)
        states = layer(states, mask[:, None, None].bool(), keys_values)
    return model.itm_head(states[:, 0])[:, 1]


# ---- Training ------------------------------------------------------------------------------------

def trainee(size, lr=0.0, **dropout):
    """CCLM for xGQA and its optimizer. At rate 0 time is spent and the weights stay."""
    torch.manual_seed(0)
    model = cclm.CCLM(CCLM[size], "xgqa", **dropout).to(DEVICE)
    options = train.parse_args(["--model", "cclm", "--task", "xgqa"])
    recipe = replace(RECIPE, lr=lr, vision_lr=None)
    return model, train.make_optimizer(model, options, recipe, steps=1)


def step(model, optimizer, batches, bf16=False, factor=1.0, released=False):
    """An optimizer step over parts of equal size, as in train.fit. -> the loss."""
    losses = []
    for batch in batches:
        with torch.autocast(DEVICE.type, torch.bfloat16, bf16), as_released(released):
            if released:
                states, mask = model.fuse_batch(batch), batch["attention_mask"]
                loss = released_losses(model.decoder, states, mask, batch["answer_ids"]).mean()
            else:
                loss = model(batch)
        (loss / len(batches)).backward()
        losses.append(loss.detach())
    torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    train.set_rates(optimizer, factor, RECIPE)
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = not released, False
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses).mean()


def training(args):
    """Steps of xGQA with CCLM, dropout off: an image to each question, or one to four of them."""
    each = 32 if ON_GPU else 4
    model, optimizer = trainee(args.size, dropout=0.0, drop_path=0.0)
    apart = [question_batch(args.size, each, each, seed) for seed in range(4)]
    shared = [question_batch(args.size, 4 * each, each)]
    run = functools.partial(step, model, optimizer)
    rows = {"stand-in": (4 * each, functools.partial(run, apart, released=True)),
            "ours": (4 * each, functools.partial(run, apart)),
            "ours, --questions-per-image 4": (4 * each, functools.partial(run, shared))}
    medians, _ = ladder(args, "A training step, CCLM", rows)
    with FlopCounterMode(display=False) as counter:
        model(apart[0])
    flops = 4 * 3 * counter.get_total_flops()  # a backward pass costs two forward passes
    if args.gpu:
        train.compile_layers(model)
        row = {"--compile, bf16": rows["ours, bf16"]}
        medians |= ladder(args, "The same, compiled", row)[0]
    for name in [name for name in medians if "bf16" in name and "per-image" not in name]:
        print(f"  {name}: {flops / medians[name] / 1e12:.4f} TFLOP/s", flush=True)


def precision(args):
    """Losses in bf16 beside those in float32; then one training twice: are all bits equal?"""
    size, lr = (args.size, 3e-5) if ON_GPU and args.size == "base" else ("mini", 1e-3)
    torch.manual_seed(0)
    batches = [question_batch(size, 16, 4, seed) for seed in range(8)]

    def train_on(steps, bf16, **dropout):
        model, optimizer = trainee(size, lr, **dropout)  # seeds its dropout, too
        losses = []
        for i in range(steps):
            factor = train.lr_factor(i, steps, RECIPE.warmup)
            losses.append(step(model, optimizer, [batches[i % 8]], bf16, factor).item())
        return losses, [parameter.data for parameter in model.parameters()]

    both = [train_on(100, bf16, dropout=0.0, drop_path=0.0)[0] for bf16 in (False, True)]
    float32, bf16 = np.reshape(both, (2, 10, 10)).mean(2)  # means of ten steps
    print(f"\nCCLM, {size}, 100 steps: loss {float32[0]:.3f} to {float32[-1]:.3f} in float32, to "
          f"{bf16[-1]:.3f} in bf16; apart by at most {abs(bf16 / float32 - 1).max():.2%}")
    torch.use_deterministic_algorithms(True)
    runs = [train_on(5, ON_GPU)[1] for _ in range(2)]
    torch.use_deterministic_algorithms(False)
    equal = "equal" if all(map(torch.equal, *runs)) else "OTHER"
    print(f"  --deterministic, dropout on, five steps twice: {equal} bits", flush=True)


def strategies(args):
    """Forward and backward pass by strategy; the peak is of activations and gradients."""
    batch = question_batch(args.size, 4, 4)
    batch["targets"] = torch.eye(1842, device=DEVICE)[:4]
    for kind, (make, sizes) in MODELS.items():
        model = make(sizes[args.size], "xgqa").to(DEVICE)
        batch |= pictures(kind, args.size, 4)
        n = len(model.layers)
        top = schedule.train_top(n, n // 3)  # CCLM's cross-modal layers
        arms = {"standard": (schedule.train_top(n, n), [])}
        for epoch in range(math.ceil(n / 3)):
            arms[f"SUF, epoch {epoch + 1}"] = (schedule.suf(epoch, n), [])
        arms["the top third only"] = (top, ["embeddings"])
        arms["the top third only, ViT frozen"] = (top, ["embeddings", "vision"])

        def both_passes(layers, frozen):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(model.group_of(name) not in frozen)
            schedule.apply(model.layers, layers)
            model.zero_grad()
            model(batch).backward()

        rows = {arm: (4, functools.partial(both_passes, *arms[arm])) for arm in arms}
        ladder(args, f"A training step by strategy, {kind}", rows)


# ---- Evaluation ----------------------------------------------------------------------------------

def answering_cclm(size, peaked, labels=1842):
    """CCLM for xGQA, with a decoder that is untrained, or knows how frequent the labels are."""
    torch.manual_seed(0)
    model = cclm.CCLM(CCLM[size], "xgqa").to(DEVICE).eval()
    rows = [tuple(row[1:-1].tolist()) for row in texts(6000, 4) if len(row) < 8]
    labels = list(dict.fromkeys(rows))[:labels]  # different ones
    model.set_answers(labels)
    if peaked:
        frequency = torch.full((len(model.decoder.bias),), 1e-7)
        frequency[EOS] = 0.4
        for rank, label in enumerate(labels):
            frequency[list(label)] += 0.1 / (rank + 1)
        model.decoder.bias.data = frequency.log().to(DEVICE)
    return model


def answer(model, questions, answers="exact", bf16=False):
    """Index of the answer to each question of a set, in its order."""
    model.answers, found = answers, {}
    with torch.autocast(DEVICE.type, torch.bfloat16, bf16):
        for keys, inputs in evaluation.texts_with_images(model, questions, DEVICE):
            found.update(zip(keys, model.predict(*inputs).tolist()))
    return torch.tensor([found[key] for key in sorted(found)], device=DEVICE)


@torch.inference_mode()
def answers(args):
    """xGQA: one question to an image, eight to an image, and these in eight languages."""
    for kind in ("knows frequencies", "is untrained"):
        model = answering_cclm(args.size, kind == "knows frequencies")
        four = question_set(args.size, 4, 1, 1)
        rows = {"stand-in": (4, lambda: released_answers(model, four)),
                "ours, --answers reference": (4, functools.partial(answer, model, four, "reference"))}
        # images, questions to each, languages; an untrained decoder has all first tokens tried
        shapes = [(8, 1, 1), (1, 1, 1), (1, 8, 1), (1, 8, 8)]
        for shape in shapes if kind == "knows frequencies" else [(2, 1, 1)]:
            name = "ours, {} images x {} questions x {} languages".format(*shape)
            asked = question_set(args.size, *shape)
            rows[name] = math.prod(shape), functools.partial(answer, model, asked)
        _, found = ladder(args, f"xGQA, CCLM, the decoder {kind}", rows)
        same = (found["stand-in"] == found["ours, --answers reference"]).sum()
        print(f"  --answers reference gives {same} of the stand-in's 4 answers", flush=True)


@torch.inference_mode()
def memory(args):
    """What the answer search takes at most; more labels take longer, and a few megabytes more."""
    model = answering_cclm(args.size, False, labels=100)
    input_ids, mask = padded(texts(64, 14))
    states = model.encode_texts(input_ids, mask)
    _, peak = peak_of(lambda: cclm.best_answers(model.decoder, states, mask, model.trie))
    print(f"\nThe answer search, CCLM, {args.size}, 64 questions, 100 labels, the decoder is "
          f"untrained: {peak / 1e9:.2f} GB", flush=True)


@torch.inference_mode()
def pairs(args):
    """xFlickrCO: an image and 128 captions of 30 tokens (Russian; in other languages fewer)."""
    captions = texts(128, 30)
    lengths = np.array([len(row) for row in captions])
    input_ids, mask = [part[:-1] for part in padded([*captions, [PAD] * 80])]
    for kind, (make, sizes) in MODELS.items():
        model = make(sizes[args.size], "xflickrco").to(DEVICE).eval()
        image, states = pictures(kind, args.size, 1), model.encode_texts(input_ids, mask)
        encoded = model.encode_images(image)

        def score(bf16=False):  # as evaluation.retrieve does
            scores = torch.zeros(128, device=DEVICE)
            with torch.autocast(DEVICE.type, torch.bfloat16, bf16):
                memory = model.image_memory(encoded)
                for rows in evaluation.token_batches(lengths, DEVICE):
                    longest = lengths[rows[-1]]
                    inputs = states[rows, :longest], mask[rows, :longest], memory
                    scores[rows] = model.match_scores(*inputs).float()
            return scores

        theirs = (model, input_ids, mask, states, image, encoded)
        rows = {"stand-in": (128, lambda: released_scores(*theirs)), "ours": (128, score)}
        ladder(args, f"An image and 128 captions, {kind}", rows)


PARTS = {"training": training, "precision": precision, "answers": answers, "pairs": pairs,
         "memory": memory, "strategies": strategies}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=CCLM, default="base")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: all)")
    parser.add_argument("--repeat", type=int, default=3, help="times each is timed (default: 3)")
    parser.add_argument("--gpu", action="store_true", help="also bf16 and --compile; all parts but "
                        "strategies, of which none begins after six minutes")
    args = parser.parse_args()
    chosen, began = args.parts.split(","), time.perf_counter()
    if args.gpu:
        chosen = [part for part in PARTS if part != "strategies"]
    print(f"torch {torch.__version__}, {NAME}, {torch.get_num_threads()} threads")
    for part in chosen:
        if args.gpu and time.perf_counter() - began > 360:
            sys.exit(f"six minutes are over: without {part} and what comes after it")
        PARTS[part](args)
        print(f"  [{part} done after {time.perf_counter() - began:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
