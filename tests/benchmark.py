"""How fast, how large, how exact: a loop like the reference's beside ours, in one process.

    python tests/benchmark.py                          base size, 20 GB of memory, an hour on a CPU
    python tests/benchmark.py --size mini              a minute
    python tests/benchmark.py --parts training,pairs   some of the parts (`PARTS`, at the end)
    python tests/benchmark.py --gpu                    what matters on a GPU, in 8 minutes

The stand-in for the reference does what the released code does. Training: float32, attention
written out, a batch padded to its longest text, an image for every question, the logits of all
answer positions, AdamW tensor by tensor. Evaluation: 4 questions at once, an image for each, 128
candidates by first token, with a copy of the question's states for each; captions padded to 80,
with a copy of the image for each. It runs on our weights, so that outputs can be compared.

Repetitions are interleaved (row 1, row 2, …, row 1, …). Printed are medians and, per question or
pair, how many times faster than the first row it is: seconds tell as much about the machine.
Memory is the most that a row takes beyond what was there before it.
"""

import argparse
import contextlib
import math
import os
import statistics
import sys
import time
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
from cclm import BOS, EOS  # noqa: E402
from model import PAD  # noqa: E402

DEVICE = evaluation.accelerator()
ON_GPU = DEVICE.type == "cuda"
RECIPE = train.RECIPES["cclm", "xgqa"]
BASE = cclm.Sizes(768, 250002, 12, 6, 12, 12, 3072, 3072, 514, 1, 768, 12, 12, 3072, 16, 384, 256)
MINI = cclm.Sizes(64, 2002, 4, 2, 4, 4, 128, 128, 130, 1, 64, 2, 4, 256, 16, 96, 32)
CCLM = {"base": BASE, "mini": MINI}
UC2 = {"base": uc2.Sizes(768, 250002, 12, 12, 3072, 514, 2, 2048, 7),
       "mini": uc2.Sizes(64, 2002, 6, 4, 128, 130, 2, 64, 7)}
# FLOP/s in bf16, dense, of the makers' data sheets; the first counts that is part of the name
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
         "A100": 312e12, "L40S": 362e12, "A40": 150e12, "L4": 121e12, "4090": 165e12}

# --------------------------------------------------------------------------------------------------
# Measuring


def seconds_of(function):
    began = time.perf_counter()
    function()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main_memory(field):
    """Bytes of this process's memory, as Linux tells them."""
    with open("/proc/self/status") as file:
        [line] = [line for line in file if line.startswith(field)]
    return 1024 * int(line.split()[1])


def peak_of(function):
    """-> (function(), bytes that it took at most)."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = function()
        return output, torch.cuda.max_memory_allocated() - before
    if not os.path.exists("/proc/self/clear_refs"):  # not Linux
        return function(), math.nan
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forgets the most so far, VmHWM
    before = main_memory("VmRSS")
    output = function()
    return output, main_memory("VmHWM") - before


def ladder(title, rows, repeat):
    """Time {name: (amount, function)}, where a call does `amount` questions or pairs.

    -> ({name: median seconds}, {name: output}).
    """
    print(f"\n{title}", flush=True)
    outputs, peaks, seconds = {}, {}, {name: [] for name in rows}
    for name, (_, function) in rows.items():  # a warm-up, too
        outputs[name], peaks[name] = peak_of(function)
    for _ in range(repeat):
        for name, (_, function) in rows.items():
            seconds[name].append(seconds_of(function))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = None
    for name, (amount, _) in rows.items():
        each = medians[name] / amount
        first = first or each
        print(f"  {name:55} {medians[name]:8.3f} s for {amount:4} {first / each:7.2f}x "
              f"{peaks[name] / 1e9:+7.2f} GB", flush=True)
    return medians, outputs


def compare(outputs, first, second):
    a, b = outputs[first], outputs[second]
    difference = (a - b).abs().max() / a.abs().max()
    print(f"  '{second}' differs from '{first}' by {difference.item():.0e}, relatively")


def count_flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def tell_rate(name, flops, seconds):
    """FLOP/s, and their share of what the device can do in bf16, if that is known."""
    line = f"  {name}: {flops / seconds / 1e12:.3f} TFLOP/s"
    device = torch.cuda.get_device_name() if ON_GPU else "cpu"
    for part, peak in PEAKS.items():
        if part in device:
            line += f", {flops / seconds / peak:.0%} of the bf16 peak of {device}"
            break
    print(line)


def autocast(bf16):
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16)


# --------------------------------------------------------------------------------------------------
# Random data. Lengths of texts are log-normal, as real ones nearly are: xGQA's questions have 14
# tokens on average, xFlickrCO's captions 18 (Chinese) to 30 (Russian), a few two or three times that


def texts(count, mean, vocabulary, seed=0):
    """Token rows <s> … </s>."""
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(math.log(mean) - 0.08, 0.4, count).round().clip(5, 80).astype(int)
    return [np.array([BOS, *rng.integers(4, vocabulary, n - 2), EOS]) for n in lengths]


def label_tokens(count):
    """Tokens of `count` different labels: most are one or two, some up to five."""
    rng, labels = np.random.default_rng(5), {}
    while len(labels) < count:
        length = rng.choice(5, p=[0.6, 0.3, 0.04, 0.03, 0.03]) + 1
        labels[tuple(rng.integers(4, 1604, length).tolist())] = None
    return list(labels)


def pixels(images, sizes):
    shape = (images, 3, sizes.image_size, sizes.image_size)
    return torch.randint(256, shape, dtype=torch.uint8, device=DEVICE)


def regions(images, sizes):
    return {"features": torch.randn(images, 36, sizes.features, device=DEVICE),
            "locations": torch.rand(images, 36, sizes.locations, device=DEVICE),
            "region_mask": torch.ones(images, 36, dtype=torch.long, device=DEVICE)}


def question_batch(sizes, questions, images, seed=0):
    """A training batch of xGQA for CCLM, with an answer to each question."""
    input_ids, attention_mask = data.pad(texts(questions, 14, sizes.vocabulary, seed))
    answer_ids, _ = data.pad([[BOS, *label, EOS] for label in label_tokens(questions)])
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "answer_ids": answer_ids,
             "answer_question": torch.arange(questions), "answer_weight": torch.ones(questions),
             "images": pixels(images, sizes)}
    if images < questions:
        batch["image_index"] = torch.arange(images).repeat_interleave(questions // images)
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def question_set(sizes, images, questions, languages=1):
    """So many questions about each image in each language, as evaluation.texts_with_images reads
    them.
    """
    shown = pixels(images, sizes)
    examples, image_rows = {}, {}
    for language in range(languages):
        tokens = texts(images * questions, 14, sizes.vocabulary, language)
        examples[language] = SimpleNamespace(tokens=tokens)
        image_rows[language] = np.arange(images).repeat(questions)
    pictures = SimpleNamespace(batch=lambda rows: {"images": shown[rows]})
    return SimpleNamespace(examples=examples, image_rows=image_rows, pictures=pictures)


# --------------------------------------------------------------------------------------------------
# The stand-in for the released code, on our weights


def written_out(query, key, value, mask=None, dropout=0.0):
    """In place of F.scaled_dot_product_attention."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -10000.0)
    elif mask is not None:
        scores = scores + mask
    return F.dropout(scores.softmax(-1), dropout) @ value


@contextlib.contextmanager
def as_released():
    fused = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = written_out
    yield
    F.scaled_dot_product_attention = fused


def released_losses(decoder, states, mask, answer_ids):
    """-log p of one answer to each question, with the logits of all positions: [A]."""
    logits = decoder.logits(decoder.decode(answer_ids, decoder.memory(states), mask))
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), answer_ids[:, 1:], ignore_index=PAD,
                           reduction="none").sum(1)


def released_answers(model, questions, k=128):
    """The first four questions of a set -> the index of the answer to each."""
    input_ids, mask = data.pad(questions.examples[0].tokens[:4])
    input_ids, mask = input_ids.to(DEVICE), mask.to(DEVICE)
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


def released_matches(model, states, mask, image_states):
    """CCLM's scores of pairs: the states of all tokens, an image's copy projected for each text."""
    for layer in model.cross_layers:
        keys_values = layer.cross_attention.keys_values(image_states)
        states = layer(states, mask[:, None, None].bool(), keys_values)
    return model.itm_head(states[:, 0])[:, 1]


def padded_to_80(rows):
    """Captions as both released codes pad them: input_ids, attention_mask."""
    input_ids, mask = data.pad([*rows, [PAD] * 80])
    return input_ids[:-1].to(DEVICE), mask[:-1].to(DEVICE)


# --------------------------------------------------------------------------------------------------
# Training


def trainee(size, lr=0.0, **dropout):
    """CCLM for xGQA and its optimizer. At rate 0 time is spent and the weights stay."""
    torch.manual_seed(0)
    model = cclm.CCLM(CCLM[size], "xgqa", **dropout).to(DEVICE)
    rates = dict.fromkeys(train.part_of(model).values(), lr)
    return model, train.make_optimizer(model, SimpleNamespace(freeze=[]), RECIPE, rates)


def step(model, optimizer, batches, bf16=False, factor=1.0):
    """An optimizer step over parts of equal size, as in train.fit. -> the loss."""
    losses = []
    for batch in batches:
        with autocast(bf16):
            loss = model(batch)
        (loss / len(batches)).backward()
        losses.append(loss.detach())
    torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    train.set_rates(optimizer, factor, RECIPE)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses).mean()


def released_step(model, optimizer, batches):
    losses = []
    for batch in batches:
        mask = batch["attention_mask"]
        with as_released():
            losses.append(released_losses(model.decoder, model.fuse_batch(batch), mask,
                                          batch["answer_ids"]).mean())
            (losses[-1] / len(batches)).backward()
    for group in optimizer.param_groups:
        group["fused"] = group["foreach"] = False
    optimizer.step()
    for group in optimizer.param_groups:
        group["fused"] = True
    optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses).mean().detach()


def training(size, repeat):
    """Steps of xGQA with CCLM: each question with its image, or four sharing one; dropout off."""
    at_once = 32 if ON_GPU else 4
    model, optimizer = trainee(size, dropout=0.0, drop_path=0.0)
    apart = [question_batch(CCLM[size], at_once, at_once, seed) for seed in range(4)]
    shared = [question_batch(CCLM[size], 4 * at_once, at_once)]
    rows = {"stand-in": lambda: released_step(model, optimizer, apart),
            "ours": lambda: step(model, optimizer, apart),
            "ours, bf16": lambda: step(model, optimizer, apart, True),
            "ours, --questions-per-image 4": lambda: step(model, optimizer, shared),
            "ours, --questions-per-image 4, bf16": lambda: step(model, optimizer, shared, True)}
    rows = {name: (4 * at_once, function) for name, function in rows.items()}
    medians, losses = ladder(f"A training step, CCLM {size}", rows, repeat)
    compare(losses, "stand-in", "ours")
    # a backward pass costs two forward passes
    flops = 3 * 4 * count_flops(lambda: model(apart[0]))
    for name in ("ours", "ours, bf16"):
        tell_rate(name, flops, medians[name])


def compiled(size, repeat):
    """The step in bf16, dropout on, before and after torch.compile."""
    at_once = 32 if ON_GPU else 4
    model, optimizer = trainee(size)
    batches = [question_batch(CCLM[size], at_once, at_once, seed) for seed in range(4)]
    flops = 3 * sum(count_flops(lambda: model(batch)) for batch in batches)
    for name in ("eager", "--compile"):
        if name == "--compile":
            train.compile_layers(model)
        rows = {name: (4 * at_once, lambda: step(model, optimizer, batches, True))}
        medians, _ = ladder(f"A training step in bf16, CCLM {size}", rows, repeat)
        tell_rate(name, flops, medians[name])


def precision(size, _):
    """The losses of 100 steps in bf16 beside those in float32, from one seed, dropout off."""
    if not ON_GPU:
        size = "mini"
    batches = [question_batch(CCLM[size], 16, 4, seed) for seed in range(8)]
    losses = []
    for bf16 in (False, True):
        model, optimizer = trainee(size, 3e-5 if size == "base" else 1e-3, dropout=0, drop_path=0)
        for i in range(100):
            factor = train.lr_factor(i, 100, RECIPE.warmup)
            losses.append(step(model, optimizer, [batches[i % 8]], bf16, factor).item())
    float32, bf16 = np.reshape(losses, (2, 10, 10)).mean(2)  # means of ten steps
    print(f"\nCCLM {size}, 100 steps: loss {float32[0]:.3f} to {float32[-1]:.3f} in float32, to "
          f"{bf16[-1]:.3f} in bf16; apart by at most {abs(bf16 / float32 - 1).max():.2%}")


def deterministic(size, _):
    """Five steps with dropout, twice: are all weights the same bits?"""
    torch.use_deterministic_algorithms(True)
    weights = []
    for _ in range(2):
        model, optimizer = trainee(size, 3e-5)
        for i in range(5):
            train.seed_part(0, i, 0)
            step(model, optimizer, [question_batch(CCLM[size], 16, 4, i)], ON_GPU)
        weights.append([parameter.detach().cpu() for parameter in model.parameters()])
    torch.use_deterministic_algorithms(False)
    equal = all(map(torch.equal, *weights))
    print(f"\n--deterministic, CCLM {size}, twice five steps: {'equal' if equal else 'OTHER'} bits")


def strategies(size, repeat):
    """Forward and backward pass: time, FLOPs, and what is kept between the two."""
    batch = question_batch(CCLM[size], 4, 4)
    targets = torch.eye(UC2[size].labels, device=DEVICE)[:4]
    models = {"CCLM": (cclm.CCLM(CCLM[size], "xgqa"), batch),
              "UC2": (uc2.UC2(UC2[size], "xgqa"), batch | regions(4, UC2[size]) | {
                  "targets": targets})}
    for kind, (model, batch) in models.items():
        model, n = model.to(DEVICE), len(model.layers)
        k = max(1, n // 6 if kind == "CCLM" else n // 4)
        arms = {f"SUF, epoch {e + 1}": (schedule.suf(e, n, k), []) for e in range(math.ceil(n / k))}
        arms = {"standard": (set(range(n)), [])} | arms
        if kind == "CCLM":
            cross = schedule.train_top(n, CCLM[size].cross_layers)
            arms["cross-modal layers only"] = (cross, ["embeddings"])
            arms["cross-modal layers only, ViT frozen"] = (cross, ["embeddings", "vision"])
        print(f"\nA step by strategy, {kind} {size}, 4 questions")
        standard = None
        for arm, (layers, frozen) in arms.items():
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(model.group_of(name) not in frozen)
            schedule.apply(model.layers, layers)
            flops = count_flops(lambda: model(batch).backward())
            times = [seconds_of(lambda: model(batch).backward()) for _ in range(repeat)]
            cost = np.array([statistics.median(times), flops, kept_bytes(lambda: model(batch))])
            standard = cost if standard is None else standard
            print(f"  {arm:36} {cost[0] / standard[0]:5.2f}x time {cost[1] / standard[1]:5.2f}x "
                  f"FLOPs {cost[2] / 1e9:6.2f} GB kept", flush=True)
            model.zero_grad()


def kept_bytes(function):
    """Bytes of the distinct tensors that autograd keeps for the backward pass of function()."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that keeps its own output would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


# --------------------------------------------------------------------------------------------------
# Evaluation


def evaluated(model):
    return model.to(DEVICE).eval()


def answering_cclm(size, peaked):
    """CCLM for xGQA and 1,842 labels; its decoder is untrained, or knows how frequent they are."""
    torch.manual_seed(0)
    model = evaluated(cclm.CCLM(CCLM[size], "xgqa"))
    labels = label_tokens(1842)
    model.set_answers(labels)
    if peaked:
        frequency = torch.full((len(model.decoder.bias),), 1e-7)
        frequency[EOS] = 0.4
        for rank, label in enumerate(labels):
            frequency[list(label)] += 0.1 / (rank + 1)
        model.decoder.bias.data = (frequency / frequency.sum()).log().to(DEVICE)
    return model


def answer(model, questions, bf16=False, answers="exact"):
    """Index of the answer to each question of a set, in its order."""
    model.answers = answers
    found = {}
    with autocast(bf16):
        for keys, inputs in evaluation.texts_with_images(model, questions, DEVICE):
            found.update(zip(keys, model.predict(*inputs).tolist()))
    return torch.tensor([found[key] for key in sorted(found)], device=DEVICE)


@torch.inference_mode()
def answers(size, repeat):
    """xGQA: one question to an image, eight to an image, and these in eight languages."""
    for peaked in (True, False):
        model = answering_cclm(size, peaked)
        four = question_set(CCLM[size], 4, 1)

        def released():
            with as_released():
                return released_answers(model, four)

        rows = {"stand-in": (4, released),
                "ours, --answers reference": (4, lambda: answer(model, four, False, "reference"))}
        # (images, questions to each, languages); an untrained decoder has all first tokens tried
        shapes = [(8, 1, 1), (1, 1, 1), (1, 8, 1), (1, 8, 8)] if peaked else [(4, 1, 1)]
        for shape in shapes:
            asked = question_set(CCLM[size], *shape)
            name = "ours, {} image(s) x {} question(s) x {} language(s)".format(*shape)
            rows[name] = (math.prod(shape), lambda asked=asked: answer(model, asked))
        if ON_GPU:
            many = question_set(CCLM[size], 64, 8, 8)
            rows["ours, 64 x 8 x 8, bf16"] = (4096, lambda: answer(model, many, True))
        kind = "knows frequencies" if peaked else "is untrained"
        _, found = ladder(f"xGQA, CCLM {size}, a decoder that {kind}", rows, repeat)
        same = (found["stand-in"] == found["ours, --answers reference"]).sum()
        print(f"  '--answers reference' gives {same} of the stand-in's 4 answers")


@torch.inference_mode()
def memory(size, _):
    """The most that the answer search takes beyond the model: 64 questions, untrained decoder."""
    asked = question_set(CCLM[size], 1, 64)
    model = answering_cclm(size, False)
    began = time.perf_counter()
    _, peak = peak_of(lambda: answer(model, asked))
    print(f"\nMemory, CCLM {size}, untrained decoder, 64 questions of one image: {peak / 1e9:.2f} GB "
          f"beyond the model, {time.perf_counter() - began:.0f} s")


def score(model, captions, states, mask, image):
    """Scores of captions with one image, as eval.py computes them."""
    scores = torch.zeros(len(captions), device=DEVICE)
    lengths = np.array([len(row) for row in captions])
    for rows in evaluation.token_batches(lengths, DEVICE):
        longest = lengths[rows].max()
        found = model.match_scores(states[rows, :longest], mask[rows, :longest], image)
        scores[rows] = found.float()
    return scores


@torch.inference_mode()
def ranking(size, repeat):
    """xFlickrCO with CCLM: 128 captions encoded, then scored with one image; and an image's
    caption with 128 images."""
    model = evaluated(cclm.CCLM(CCLM[size], "xflickrco"))
    captions = texts(128, 30, CCLM[size].vocabulary)
    input_ids, mask = padded_to_80(captions)
    image_states = model.encode_images({"images": pixels(1, CCLM[size])})
    states = model.encode_texts(input_ids, mask)
    copies = image_states.expand(128, -1, -1).contiguous()

    def released(rows):
        with as_released():
            return released_matches(model, states[rows], mask[rows], copies)

    def released_encoding():
        with as_released():
            return model.encode_texts(input_ids, mask)

    def encoding():
        for rows in evaluation.token_batches(np.array([len(row) for row in captions]), DEVICE):
            evaluation.encode(model, [captions[i] for i in rows], DEVICE)

    def ours(bf16=False):
        with autocast(bf16):
            return score(model, captions, states, mask, model.image_memory(image_states))

    ladder(f"Texts, CCLM {size}", {"stand-in": (128, released_encoding), "ours": (128, encoding)},
           repeat)
    rows = {"stand-in, captions of an image": (128, lambda: released(range(128))),
            "stand-in, images of a caption": (128, lambda: released([0] * 128)),
            "ours": (128, ours), "ours, bf16": (128, lambda: ours(True))}
    _, scores = ladder(f"xFlickrCO re-ranking, CCLM {size}", rows, repeat)
    compare(scores, "stand-in, captions of an image", "ours")


@torch.inference_mode()
def pairs(size, repeat):
    """xFlickrCO with UC2: 64 captions and one image."""
    model = evaluated(uc2.UC2(UC2[size], "xflickrco"))
    captions = texts(64, 30, UC2[size].vocabulary)
    image = regions(1, UC2[size])
    input_ids, mask = padded_to_80(captions)
    copies = {name: tensor.expand(64, *tensor.shape[1:]) for name, tensor in image.items()}

    def released():
        with as_released():  # text and regions are embedded, and all states computed, for each pair
            states = model.fuse(model.encode_texts(input_ids, mask), mask, model.memory(copies))
            return model.match_head(model.pooled(states))[:, 0]

    def ours(bf16=False):
        with autocast(bf16):
            states = model.encode_texts(input_ids, mask)
            return score(model, captions, states, mask, model.memory(image))

    rows = {"stand-in": (64, released), "ours": (64, ours), "ours, bf16": (64, lambda: ours(True))}
    _, scores = ladder(f"xFlickrCO pairs, UC2 {size}", rows, repeat)
    compare(scores, "stand-in", "ours")


# --------------------------------------------------------------------------------------------------

PARTS = {"training": training, "compile": compiled, "precision": precision,
         "deterministic": deterministic, "answers": answers, "ranking": ranking, "pairs": pairs,
         "memory": memory, "strategies": strategies}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=CCLM, default="base")
    parser.add_argument("--parts", help="comma-separated (default: all)")
    parser.add_argument("--repeat", type=int, default=3, help="timed repetitions (default: 3)")
    parser.add_argument("--gpu", action="store_true", help="all parts but strategies, none of "
                        "which starts after seven minutes")
    args = parser.parse_args()
    began = time.perf_counter()
    chosen = args.parts.split(",") if args.parts else list(PARTS)
    if args.gpu:
        chosen.remove("strategies")
    print(f"torch {torch.__version__}, {evaluation.describe(DEVICE)}, {torch.get_num_threads()} "
          f"threads, {args.size} size, {args.repeat} repetitions")
    for part in chosen:
        if args.gpu and time.perf_counter() - began > 420:
            print(f"\n{part}: left out, seven minutes are over")
            continue
        PARTS[part](args.size, args.repeat)
        print(f"  [{part} done after {time.perf_counter() - began:.0f} s]", flush=True)
        if ON_GPU:
            print(f"  {torch.cuda.max_memory_reserved() / 1e9:.1f} GB reserved at most")


if __name__ == "__main__":
    main()
