"""How fast, side by side: a ladder from a loop written like the reference's to ours, every rung in one process.

    python tests/benchmark.py                         base size (needs 24 GB of memory), on a GPU if there is one
    python tests/benchmark.py --size mini             seconds instead of minutes
    python tests/benchmark.py --parts training,pairs  some of: training, precision, answers, ranking, pairs, strategies,
                                                      growth

The reference-style rungs do what the released code does: float32, attention written out, texts padded to the task's
limit, the image encoder once per *question*, states tiled for 128 candidates whose logits over the whole vocabulary are
kept, keys and values of an image projected again for each of its texts. They use this project's weights, so that
outputs can be compared: every rung says how far its output is from the first one's.

Repetitions are interleaved (rung 1, rung 2, …, rung 1, …), the median is printed, and ratios are taken
within the run: absolute times say as much about the machine as about the code. FLOPs are counted by
torch's counter. Results also go to benchmark.json.
"""

import argparse
import contextlib
import json
import math
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cclm  # noqa: E402
import model as shared  # noqa: E402
import schedule  # noqa: E402
import train  # noqa: E402
import uc2  # noqa: E402
import vit  # noqa: E402
from cclm import BOS, EOS, pad_to  # noqa: E402
from model import PAD, select  # noqa: E402
from recipes import RECIPES  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {
    "base": (cclm.Sizes(768, 250002, 12, 6, 12, 12, 3072, 3072, 514, 1, 768, 12, 12, 3072, 16, 384, 256),
             uc2.Sizes(768, 250002, 12, 12, 3072, 514, 2, 2048, 7)),
    "mini": (cclm.Sizes(64, 2002, 4, 2, 4, 4, 128, 128, 66, 1, 64, 2, 4, 256, 16, 96, 32),
             uc2.Sizes(64, 2002, 6, 4, 128, 130, 2, 64, 7)),
}
LANGUAGES, LABELS = 8, 1842


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def interleaved(functions, repeat):
    """Call all functions in turn, `repeat` times over. -> seconds of every call, a list per function."""
    seconds = [[] for _ in functions]
    for _ in range(repeat):
        for times, function in zip(seconds, functions):
            began = time.perf_counter()
            function()
            synchronize()
            times.append(time.perf_counter() - began)
    return seconds


def ladder(title, rungs, unit, repeat, same=None):
    """Time rungs interleaved; print medians, ratios to the first, and how far outputs are from the first's.

    -> list of dicts.

    rungs: [(name, amount, function)], where one call handles `amount` units. same(first
    output, output) -> text on their difference.
    """
    outputs, memory = [], []
    for _, _, function in rungs:  # warm-up, and what comes out
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        outputs.append(function())
        synchronize()
        memory.append(torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else None)
    seconds = interleaved([function for _, _, function in rungs], repeat)
    print(f"\n{title}")
    rows = []
    for (name, amount, _), times, output, peak in zip(rungs, seconds, outputs, memory):
        ratio = statistics.median([(a / rungs[0][1]) / (b / amount) for a, b in zip(seconds[0], times)])
        median = statistics.median(times)
        rows.append({"rung": name, "seconds": median, f"{unit}_per_second": amount / median, "ratio": ratio,
                     "peak_memory_bytes": peak,
                     "difference": same(outputs[0], output) if same else ""})
        peak_text = f"{peak / 1e9:5.1f} GB" if peak else ""
        print(f"  {name:64} {median:8.3f} s {amount / median:10.2f} {unit}/s {ratio:7.2f}x  {peak_text}  "
              f"{rows[-1]['difference']}", flush=True)
    return rows


def relative_difference(a, b):
    return f"output differs by {((a.float() - b.float()).abs().max() / a.float().abs().max()).item():.1e}"


def count_flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def matmul_peak(dtype, side=None):
    """FLOP/s of a large matrix product on this device: what "share of peak" refers to."""
    side = side or (8192 if DEVICE.type == "cuda" else 2048)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        synchronize()
        began = time.perf_counter()
        a @ b
        synchronize()
        times.append(time.perf_counter() - began)
    return 2 * side**3 / min(times)


def saved_bytes(function):
    """Bytes of the distinct tensors that autograd keeps for the backward pass of function()."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself, where it is its node's output, would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


# ---------------------------------------------------------------------------------------------------------------------
# The reference's way of computing, on this project's weights


def written_out_attention(query, key, value, mask=None, dropout=0.0):
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -10000.0) if mask.dtype == torch.bool else scores + mask
    probabilities = F.dropout(scores.softmax(-1), dropout)
    return (probabilities @ value).transpose(1, 2).flatten(2)


@contextlib.contextmanager
def reference_attention():
    fused, attend = shared.attention, vit.BlockAttention.attend
    shared.attention, vit.BlockAttention.attend = written_out_attention, staticmethod(written_out_attention)
    yield
    shared.attention, vit.BlockAttention.attend = fused, staticmethod(attend)


def pad_columns(ids, length):
    return F.pad(ids, (0, max(0, length - ids.shape[1])), value=PAD)


def reference_answer_loss(model, batch, limit):
    """One image per question, texts padded to the limit, logits of the whole vocabulary
    at every position, padding included.
    """
    input_ids = pad_columns(batch["input_ids"], limit)
    attention_mask = (input_ids != PAD).long()
    memory = model.memory(batch)
    states = model.fuse(model.encode_texts(input_ids, attention_mask), attention_mask, memory)
    decoder, answers = model.decoder, batch["answer_ids"]
    logits = decoder.logits(decoder.decode(answers, decoder.memory(states), attention_mask))[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), answers[:, 1:].flatten(), ignore_index=PAD, reduction="none")
    return losses.sum() / len(input_ids)


def reference_rank(model, images, input_ids, candidate_ids, k=128):
    """One image pass per question; states tiled for the k candidates; their whole logits kept.

    -> index of the best candidate per question.
    """
    attention_mask, decoder = (input_ids != PAD).long(), model.decoder
    memory = model.image_memory(model.encode_images({"images": images}))
    states = model.fuse(model.encode_texts(input_ids, attention_mask), attention_mask, memory)
    bos = candidate_ids[:1, :1].expand(len(states), 1)
    first = decoder.logits(
        decoder.decode(bos, decoder.memory(states), attention_mask)[:, 0]).log_softmax(-1)[:, candidate_ids[:, 1]]
    first, top = first.topk(min(k, len(candidate_ids)))
    tiled, mask = (x.repeat_interleave(top.shape[1], 0) for x in (states, attention_mask))
    chosen = candidate_ids[top.flatten()]
    logits = decoder.logits(decoder.decode(chosen, decoder.memory(tiled), mask))[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), chosen[:, 1:], ignore_index=PAD, reduction="none").sum(1)
    return top.gather(1, (first - losses.view_as(first)).argmax(1, keepdim=True))[:, 0]


def reference_match(model, text_states, attention_mask, image_states):
    """Texts' states padded to 80 (computed once, as in the released code), the image's states tiled and projected again
    for each of them.
    """
    memory = model.image_memory(image_states.expand(len(text_states), -1, -1).contiguous())
    return model.match_scores(pad_to(text_states, 80), pad_to(attention_mask, 80), memory)


def reference_pairs(model, text_ids, image):
    """UC2: texts padded to 80; text and regions embedded again for every pair; the last layer computed for every token.
    """
    input_ids = pad_columns(text_ids, 80)
    attention_mask = (input_ids != PAD).long()
    memory = model.memory(
        {name: tensor.expand(len(input_ids), *tensor.shape[1:]).contiguous() for name, tensor in image.items()})
    hidden = model.fuse(model.encode_texts(input_ids, attention_mask), attention_mask, memory)
    return model.match_head(model.pooled(hidden))[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Data of the benchmark's sizes


def texts(count, vocabulary, mean, longest, seed):
    """Random token rows with lengths like the benchmark's (facts: xGQA 14 tokens on average,
    captions 20; some much longer): [count,T].
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = (mean + 0.3 * mean * torch.randn(count, generator=generator)).round().clamp(5, longest).long()
    ids = torch.randint(4, vocabulary, (count, int(lengths.max())), generator=generator)
    position = torch.arange(ids.shape[1])
    ids[:, 0] = BOS
    ids[position[None] == lengths[:, None] - 1] = EOS
    return ids.masked_fill(position[None] >= lengths[:, None], PAD).to(DEVICE)


def label_tokens(count, vocabulary):
    """Token rows of `count` different labels: 60 % one token, 30 % two, 10 % three to five, as GQA's 1,842 are about.
    """
    generator = torch.Generator().manual_seed(5)
    labels = {}
    while len(labels) < count:
        share = torch.rand((), generator=generator)
        n = 1 if share < 0.6 else 2 if share < 0.9 else int(torch.randint(3, 6, (), generator=generator))
        labels[tuple(torch.randint(4, min(vocabulary, 1600 + 4), (n,), generator=generator).tolist())] = None
    return [list(label) for label in labels]


def teach_frequencies(decoder, labels):
    """Give the decoder's bias the frequencies of answers (Zipf over labels): the least that any training teaches it."""
    weight = torch.full((len(decoder.bias),), 1e-7)
    weight[EOS] = 0.4
    for rank, label in enumerate(labels):
        for token in label:
            weight[token] += 0.1 / (rank + 1)
    decoder.bias.data.copy_((weight / weight.sum()).log().to(DEVICE))


def question_batch(sizes, questions, images, seed=0):
    size = sizes.image_size
    input_ids = texts(questions, sizes.vocabulary, 14, 40, seed)
    answers = label_tokens(questions, sizes.vocabulary)
    rows = [[BOS, *answer, EOS] for answer in answers]
    longest = max(map(len, rows))
    return {"images": torch.randint(256, (images, 3, size, size), dtype=torch.uint8,
                                    generator=torch.Generator().manual_seed(seed)).to(DEVICE),
            "image_index": torch.arange(images, device=DEVICE).repeat_interleave(questions // images),
            "input_ids": input_ids, "attention_mask": (input_ids != PAD).long(),
            "answer_ids": torch.tensor([row + [PAD] * (longest - len(row)) for row in rows], device=DEVICE),
            "answer_question": torch.arange(questions, device=DEVICE),
            "answer_weight": torch.ones(questions, device=DEVICE)}


def region_batch(sizes, questions, regions=36):
    input_ids = texts(questions, sizes.vocabulary, 14, 40, 0)
    return {"features": torch.randn(questions, regions, sizes.features, device=DEVICE),
            "locations": torch.rand(questions, regions, sizes.locations, device=DEVICE),
            "region_mask": torch.ones(questions, regions, dtype=torch.long, device=DEVICE),
            "input_ids": input_ids, "attention_mask": (input_ids != PAD).long(),
            "targets": torch.eye(sizes.labels, device=DEVICE)[:questions]}


def part(batch, rows):
    """Some questions of a batch with an image each."""
    return {name: tensor[rows] - (rows.start if name == "answer_question" else 0) for name, tensor in batch.items()}


def autocast(on):
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=on)


# ---------------------------------------------------------------------------------------------------------------------
# The parts


def question_model(sizes, lr):
    """-> (CCLM for xGQA with dropout off, so that losses can be compared; its AdamW)."""
    torch.manual_seed(0)
    model = cclm.CCLM(sizes, "xgqa", dropout=0.0, drop_path=0.0).to(DEVICE)
    groups = train.parameter_groups(model, train.part_of(model), dict.fromkeys(train.part_of(model).values(), lr), 0.01)
    return model, train.make_optimizer(groups, RECIPES["cclm", "xgqa"])


def training(size, repeat, compile_too):
    """xGQA training steps with CCLM: 16 questions over 4 images, dropout off so that losses can be compared."""
    sizes = SIZES[size][0]
    model, optimizer = question_model(sizes, 0.0)
    batch = question_batch(sizes, 16, 4)
    ungrouped = {name: tensor for name, tensor in batch.items()
                 if name != "image_index"} | {"images": batch["images"][batch["image_index"]]}
    halves = [part(ungrouped, slice(0, 8)), part(ungrouped, slice(8, 16))]  # what fits in memory one image per question

    def step(losses_of, fused=True, bf16=False, optimizer=optimizer):
        total = 0.0
        for loss_of in losses_of:
            with autocast(bf16):
                loss = loss_of() / len(losses_of)
            loss.backward()
            total += loss.detach()
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = fused, False
        for state in optimizer.state.values():  # the fused kernel wants its counters on the device
            state["step"] = state["step"].to(DEVICE if fused else "cpu")
        optimizer.step()  # at rate 0: time is spent, weights stay
        optimizer.zero_grad()
        return total

    def reference(limit):
        with reference_attention():
            return step([lambda half=half: reference_answer_loss(model, half, limit) for half in halves], fused=False)

    def ours(loss_of, bf16=False, grouped=True):
        return step(
            [lambda: loss_of(batch)] if grouped else [lambda half=half: loss_of(half) for half in halves], bf16=bf16)

    rungs = [("reference-style: float32, one image pass per question, padded to 40", 16, lambda: reference(40)),
             ("  the same, padded to the longest of the batch", 16, lambda: reference(0)),
             ("ours, float32: fused attention and AdamW, logits of real tokens", 16,
              lambda: ours(model, grouped=False)),
             ("+ --questions-per-image 4", 16, lambda: ours(model)),
             ("+ bf16", 16, lambda: ours(model, True))]
    if compile_too:
        compiled, its_optimizer = question_model(sizes, 0.0)
        train.compile_layers(compiled)
        rungs.append(("+ --compile", 16, lambda: step([lambda: compiled(batch)], True, True, its_optimizer)))
    rows = ladder(f"xGQA training step, CCLM {size}, 16 questions over 4 images", rungs, "questions", repeat,
                  relative_difference)
    # a backward pass costs two forward passes
    flops = 3 * sum(count_flops(lambda half=half: model(half)) for half in halves)
    for dtype in (torch.float32, torch.bfloat16):
        peak, row = matmul_peak(dtype), rows[2] if dtype == torch.float32 else rows[-1]
        done = flops if dtype == torch.float32 else 3 * count_flops(lambda: model(batch))
        row["share_of_matmul_peak"] = done / row["seconds"] / peak
        print(f"  {str(dtype):14} matmul peak {peak / 1e12:.3f} TFLOP/s; '{row['rung']}' reaches "
              f"{row['share_of_matmul_peak']:.0%} of it")
    return {"rungs": rows, "flops_per_question": flops / 16}


def precision(size, *_):
    """bf16 against float32: losses of a training from one seed. On a GPU at base size it is compiled, and timed."""
    fast = size == "base" and DEVICE.type == "cuda"
    sizes, steps = SIZES["base" if fast else "mini"][0], 100  # the mini size is for any CPU
    batches = [question_batch(sizes, 64 if fast else 16, 4, seed) for seed in range(8)]
    losses, seconds = {}, {}
    for bf16 in (False, True):
        model, optimizer = question_model(sizes, 3e-5 if fast else 1e-3)
        if fast:
            train.compile_layers(model)
        losses[bf16], times = [], []
        for step in range(steps):
            began = time.perf_counter()
            train.set_rates(optimizer, train.lr_factor(step, steps, 0.1 * steps), RECIPES["cclm", "xgqa"])
            with autocast(bf16):
                loss = model(batches[step % len(batches)])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[bf16].append(loss.item())
            times.append(time.perf_counter() - began)
        seconds[bf16] = statistics.median(times[steps // 2 :])  # compiled and warm
    smooth = torch.tensor([losses[False], losses[True]]).unfold(1, 10, 1).mean(2)  # of 10 steps
    difference = ((smooth[1] - smooth[0]).abs() / smooth[0]).max().item()
    print(f"\nbf16 against float32, CCLM {'base, compiled' if fast else 'mini'}, {steps} training steps\n"
          f"  loss {smooth[0, 0]:.3f} to {smooth[0, -1]:.3f} in float32, {smooth[1, 0]:.3f} to {smooth[1, -1]:.3f} in "
          f"bf16; means of 10 steps differ by at most {difference:.2%}")
    result = {"steps": steps, "losses": {"float32": losses[False], "bf16": losses[True]}, "difference": difference}
    if fast:
        flops = 3 * statistics.fmean(count_flops(lambda batch=batch: model(batch)) for batch in batches)
        peak = matmul_peak(torch.bfloat16)
        result |= {"seconds_per_step": seconds[True], "share_of_matmul_peak": flops / seconds[True] / peak}
        print(f"  bf16: {seconds[True]:.3f} s a step of 64 questions, {result['share_of_matmul_peak']:.0%} of the "
              f"matmul peak of {peak / 1e12:.3f} TFLOP/s (float32: {seconds[False]:.3f} s)")
    return result


@torch.inference_mode()
def answers(size, repeat, _):
    """xGQA evaluation: the questions of one image in 8 languages, all 1,842 labels."""
    sizes = SIZES[size][0]
    torch.manual_seed(0)
    model = cclm.CCLM(sizes, "xgqa").to(DEVICE).eval()
    labels = label_tokens(LABELS, sizes.vocabulary)
    rows = [[BOS, *label, EOS] for label in labels]
    longest = max(map(len, rows))
    candidates = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows], device=DEVICE)
    image = torch.randint(256, (1, 3, sizes.image_size, sizes.image_size), dtype=torch.uint8, device=DEVICE)
    asked = 2 if (size, DEVICE.type) == ("base", "cpu") else 8  # questions of the image; seconds each in the worst case
    few, many = (texts(count, sizes.vocabulary, 14, 40, 1) for count in (2, asked * LANGUAGES))
    model.set_answers(labels)

    def reference():
        with reference_attention():
            return torch.cat(
                [reference_rank(model, image, pad_columns(question, 40), candidates) for question in few.split(1)])

    def ours(share_images, bf16=False):
        with autocast(bf16):
            if share_images:
                memory = model.memory({"images": image})
                return torch.cat([model.predict(model.encode_texts(ids, (ids != PAD).long()), (ids != PAD).long(),
                                                memory) for ids in many.split(64)])
            parts = []
            for ids in few.split(1):
                parts.append(model.predict(model.encode_texts(ids, (ids != PAD).long()), (ids != PAD).long(),
                                           model.memory({"images": image})))
            return torch.cat(parts)

    result = {}
    cases = {"untrained decoder: nothing can be skipped": False, "a decoder that knows answer frequencies": True}
    for name, teach in cases.items():
        if teach:
            teach_frequencies(model.decoder, labels)
        rungs = [("reference-style: 128 candidates, one image pass per question", 2, reference),
                 ("ours: exact argmax of all 1,842 labels, one image pass per question", 2, lambda: ours(False)),
                 (f"+ image encoded once for {asked} questions in {LANGUAGES} languages", len(many),
                  lambda: ours(True)),
                 ("+ bf16", len(many), lambda: ours(True, True))]
        rows = ladder(f"xGQA evaluation, CCLM {size}, {name}", rungs, "questions", repeat)
        slow, fast = ours(False), ours(True)[: len(few)]
        print(
            f"  the last float32 rung answers {int((slow == fast).sum())} of {len(few)} questions as the one before it")
        result[name] = rows
    return result


@torch.inference_mode()
def ranking(size, repeat, _):
    """xFlickrCO re-ranking with CCLM: the captions of one image."""
    sizes = SIZES[size][0]
    torch.manual_seed(0)
    model = cclm.CCLM(sizes, "xflickrco").to(DEVICE).eval()
    captions = texts(64, sizes.vocabulary, 20, 60, 2)
    mask = (captions != PAD).long()
    image_states = model.encode_images(
        {"images": torch.randint(256, (1, 3, sizes.image_size, sizes.image_size), dtype=torch.uint8, device=DEVICE)})
    text_states = model.encode_texts(captions, mask)
    order = mask.sum(1).argsort()

    def reference():
        with reference_attention():
            return reference_match(model, text_states[:32], mask[:32], image_states)

    def ours(bf16=False):
        scores = torch.empty(len(captions), device=DEVICE)
        with autocast(bf16):
            memory = model.image_memory(image_states)
            for rows in order.split(32):
                longest = int(mask[rows].sum(1).max())
                scores[rows] = model.match_scores(text_states[rows, :longest], mask[rows, :longest], memory).float()
        return scores[:32]

    rungs = [("reference-style: padded to 80, image projected for every caption", 32, reference),
             ("ours: image projected once, captions of one length together", 64, ours),
             ("+ bf16", 64, lambda: ours(True))]
    return {"rungs": ladder(f"xFlickrCO re-ranking, CCLM {size}", rungs, "pairs", repeat, relative_difference)}


@torch.inference_mode()
def pairs(size, repeat, _):
    """xFlickrCO with UC2: all captions against one image."""
    sizes = SIZES[size][1]
    torch.manual_seed(0)
    model = uc2.UC2(sizes, "xflickrco").to(DEVICE).eval()
    captions = texts(64, sizes.vocabulary, 20, 60, 2)
    mask = (captions != PAD).long()
    image = {"features": torch.randn(1, 36, sizes.features, device=DEVICE),
             "locations": torch.rand(1, 36, 7, device=DEVICE),
             "region_mask": torch.ones(1, 36, dtype=torch.long, device=DEVICE)}
    text_states, memory, order = model.encode_texts(captions, mask), model.memory(image), mask.sum(1).argsort()

    def reference():
        with reference_attention():
            return reference_pairs(model, captions, image)

    def ours(bf16=False):
        scores = torch.empty(len(captions), device=DEVICE)
        with autocast(bf16):
            for rows in order.split(32):
                longest = int(mask[rows].sum(1).max())
                scores[rows] = model.match_scores(text_states[rows, :longest], mask[rows, :longest], memory).float()
        return scores

    rungs = [("reference-style: padded to 80, everything embedded for every pair", 64, reference),
             ("ours: embedded once, captions of one length together", 64, ours), ("+ bf16", 64, lambda: ours(True))]
    return {"rungs": ladder(f"UC2 pair scoring, {size}", rungs, "pairs", repeat, relative_difference)}


def strategies(size, repeat, _):
    """Forward and backward of a training step by strategy: time, FLOPs, saved activations; and AdamW's state."""
    sizes, uc2_sizes = SIZES[size]
    cost = {}
    for name, batch, make in (("cclm", question_batch(sizes, 4, 4), lambda: cclm.CCLM(sizes, "xgqa")),
                              ("uc2", region_batch(uc2_sizes, 32), lambda: uc2.UC2(uc2_sizes, "xgqa"))):
        torch.manual_seed(0)
        model = make().to(DEVICE)
        n = len(model.layers)
        k = max(1, n // 6) if name == "cclm" else n // 4
        phases = {"standard, and layer-wise decay": (range(n), ())}
        phases |= {f"SUF, epoch {epoch + 1}": (schedule.suf(epoch, n, k), ()) for epoch in range(math.ceil(n / k))}
        if name == "cclm":
            cross = range(n - sizes.cross_layers, n)
            phases |= {"cross-modal layers only": (cross, ("embeddings",)),
                       "cross-modal layers only, ViT frozen": (cross, ("embeddings", "vision"))}
        questions = len(batch["input_ids"])
        print(f"\nA training step by strategy, {name} {size}, {questions} questions with an image each, dropout on")
        cost[name] = cost_of(model, batch, phases, repeat)
    return cost


def cost_of(model, batch, phases, repeat):
    """phases: {name: (layers that train, groups that do not)}. -> a row per phase, printed too."""
    print(f"  {'':38} trainable   time      FLOPs      kept for backward   AdamW state")
    rows, functions = [], []
    for name, (trainable, frozen) in phases.items():
        def step(trainable=trainable, frozen=frozen):
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad_(model.group_of(parameter_name) not in frozen)
            schedule.apply(model.layers, set(trainable))
            model.zero_grad()
            model(batch).backward()

        flops = count_flops(step)  # a warm-up, too
        kept = saved_bytes(lambda: model(batch))
        training_now = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        rows.append({"strategy": name, "trainable": training_now, "flops": flops, "kept_bytes": kept,
                     "adamw_bytes": 8 * training_now})
        functions.append(step)
    seconds = interleaved(functions, repeat)
    for row, times in zip(rows, seconds):
        row["time_share"] = statistics.median([b / a for a, b in zip(seconds[0], times)])
        print(f"  {row['strategy']:38} {row['trainable'] / 1e6:7.1f} M  {row['time_share']:5.2f}x  "
              f"{row['flops'] / rows[0]['flops']:8.2f}x  "
              f"{row['kept_bytes'] / 1e9:8.2f} GB ({row['kept_bytes'] / rows[0]['kept_bytes']:4.2f}x)  "
              f"{row['adamw_bytes'] / 1e9:6.2f} GB")
    return rows


@torch.inference_mode()
def growth(size, repeat, _):
    """How evaluation's cost grows when one of images, questions, languages, labels or boxes is doubled."""
    sizes, uc2_sizes = SIZES[size]
    torch.manual_seed(0)
    model, single_stream = cclm.CCLM(sizes, "xgqa").to(DEVICE).eval(), uc2.UC2(uc2_sizes, "xflickrco").to(DEVICE).eval()

    def evaluation(images=1, questions=2, languages=2, labels=LABELS // 2):
        model.set_answers(label_tokens(labels, sizes.vocabulary))
        trie = model.trie
        pictures = torch.randint(256, (images, 3, sizes.image_size, sizes.image_size), dtype=torch.uint8, device=DEVICE)
        ids = texts(images * questions * languages, sizes.vocabulary, 14, 40, 3)
        index = torch.arange(images, device=DEVICE).repeat_interleave(questions * languages)

        def run():
            model.trie, mask = trie, (ids != PAD).long()
            return model.predict(model.encode_texts(ids, mask), mask, select(model.memory({"images": pictures}), index))

        return run

    def score(boxes=18):
        ids = texts(16, uc2_sizes.vocabulary, 20, 60, 2)
        image = {"features": torch.randn(1, boxes, uc2_sizes.features, device=DEVICE),
                 "locations": torch.rand(1, boxes, 7, device=DEVICE),
                 "region_mask": torch.ones(1, boxes, dtype=torch.long, device=DEVICE)}
        return lambda: single_stream.match_scores(
            single_stream.encode_texts(ids, None), (ids != PAD).long(), single_stream.memory(image))

    print(f"\nWhen one quantity doubles, {size}")
    teach_frequencies(model.decoder, label_tokens(LABELS, sizes.vocabulary))
    single, boxes = evaluation(), score()
    doubled = {"images (with their questions)": (single, evaluation(images=2)),
               "questions per image": (single, evaluation(questions=4)), "languages": (single, evaluation(languages=4)),
               "labels": (single, evaluation(labels=LABELS)), "boxes (UC2, 18 to 36)": (boxes, score(36))}
    functions = [single, boxes, *(double for _, double in doubled.values())]
    interleaved(functions, 1)  # a warm-up
    seconds = dict(zip(functions, interleaved(functions, repeat)))
    rows = [{"doubled": name, "time": statistics.median(b / a for a, b in zip(seconds[once], seconds[twice]))}
            for name, (once, twice) in doubled.items()]
    for row in rows:
        print(f"  {row['doubled']:32} {row['time']:5.2f}x the time")
    return {"rows": rows}


PARTS = {"training": training, "precision": precision, "answers": answers, "ranking": ranking, "pairs": pairs,
         "strategies": strategies, "growth": growth}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: all)")
    parser.add_argument("--repeat", type=int, default=3, help="timed repetitions of every rung (default: 3)")
    parser.add_argument("--compile", action="store_true", help="a rung with compiled layers, on a second model")
    parser.add_argument("--json", default="benchmark.json", help="where the numbers go (default: benchmark.json)")
    args = parser.parse_args()
    unknown = [part for part in args.parts.split(",") if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; parts are {', '.join(PARTS)}")
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}, {args.size} size, {args.repeat} repetitions")
    results = {"device": name, "torch": torch.__version__, "size": args.size, "peak_memory_so_far_bytes": {}}
    for part in args.parts.split(","):
        results[part] = PARTS[part](args.size, args.repeat, args.compile)
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux
        results["peak_memory_so_far_bytes"][part] = peak
        print(f"  main memory up to here: {peak / 1e9:.1f} GB at most")
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
