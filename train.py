"""Fine-tune CCLM or UC2 on English, with scheduled unfreezing (SUF) or without; test all languages.

    python train.py --model cclm --task xgqa --suf
        on the embedded miniature: no data, no GPU, about two minutes
    python train.py --model cclm --task xgqa --suf --data IGLUE \\
                    --checkpoint cclm_x2vlm_base.th --tokenizer sentencepiece.bpe.model
        the paper's experiment
    torchrun --nproc_per_node 8 train.py ...
        the same on eight GPUs

Paper: section 3 (SUF: --suf), 4.1 (the recipes below), 5.2 (--lr-decay), 5.3 (--train-top). The
loop is `fit`; what SUF adds to it is marked there.

A run is a folder: args.json (what was asked for), log.jsonl (a line per step and per evaluation),
results.json, predictions/, model.pt (official tensor names), last.pt (to resume from). Nothing
random depends on the past: batches, augmentation and dropout are functions of (seed, step). So a
run that was stopped and resumed ends in the same weights as one that was not, bit for bit on a CPU.
"""

import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import eval as evaluation
import schedule
import vit
from data import InputError
from eval import ranks
from miniature import world
from model import TransformerLayer, file_tensors, read_checkpoint

ROOT = os.path.dirname(os.path.abspath(__file__))

# --------------------------------------------------------------------------------------------------
# Recipes


@dataclass(frozen=True)
class Recipe:
    """Every number of a fine-tuning run. Paper section 4.1 unless a comment says otherwise."""

    epochs: int
    batch_size: int  # over all processes and accumulation steps
    lr: float
    vision_lr: float | None = None  # None: as lr
    embedding_lr: float | None = None  # None: as lr
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of all steps; linear up, then linear down to 0
    suf_k: int = 3  # section 3: layers that thaw per epoch
    betas: tuple = (0.9, 0.98)  # CCLM's code
    eps: float = 1e-8  # CCLM's code
    clip: float | None = None  # most of the gradient's norm; CCLM's code does not clip
    dropout: float = 0.1  # both references' models
    drop_path: float = 0.1  # stochastic depth of CCLM's image encoder
    image_size: int = 384
    augment: bool = True  # CCLM's code
    few_shot_epochs: int = 20  # IGLUE's, as section 5.4 says
    few_shot_lrs: tuple = (1e-4, 5e-5, 1e-5)
    # ours: most examples in one forward pass; more is accumulated (CCLM's retrieval has then fewer
    # negatives, as it takes them from the pass)
    micro_batch: int = 32
    # how each reference reads texts: clean-up, most words, most tokens (None: no limit)
    clean: str = ""
    train_words: int | None = None
    test_words: int | None = None
    train_tokens: int | None = None
    test_tokens: int | None = None


CCLM = {"lr": 3e-5, "vision_lr": 2e-5}
CAPTIONS = {"clean": "caption", "train_words": 80, "test_words": 80, "train_tokens": 80}
UC2 = {"betas": (0.9, 0.999), "eps": 1e-6, "clip": 1.0}  # IGLUE's
UC2_CAPTIONS = {"train_tokens": 80, "test_tokens": 80}
RECIPES = {
    ("cclm", "xgqa"): Recipe(5, 256, **CCLM, clean="question", train_words=30, test_words=50,
                               train_tokens=40),
    ("cclm", "xvnli"): Recipe(10, 144, **CCLM, **CAPTIONS, micro_batch=36),
    ("cclm", "xflickrco"): Recipe(10, 128, **CCLM, **CAPTIONS, test_tokens=80),
    ("uc2", "xgqa"): Recipe(5, 256, lr=4e-5, **UC2, train_tokens=40, test_tokens=40,
                            micro_batch=64),
    ("uc2", "xvnli"): Recipe(10, 128, lr=2e-5, **UC2, **UC2_CAPTIONS, micro_batch=64),
    ("uc2", "xflickrco"): Recipe(10, 64, lr=2e-5, **UC2, **UC2_CAPTIONS, micro_batch=16),
}


def recipe_of(args, config):
    """The paper's recipe, changed by the checkpoint's own, changed by the flags.

    config: of the checkpoint. The miniature's bring {"recipe": {task: {field: value}}}, because the
    paper's numbers cannot fit tiny models. -> (recipe, lines on what of it is not the paper's).
    """
    paper = RECIPES[args.model, args.task]
    own = config.get("recipe", {}).get(args.task, {})
    fields = asdict(paper)
    flags = {name: value for name, value in vars(args).items() if name in fields and value}
    with data.reading(f"{args.checkpoint}: the recipe it brings"):
        recipe = replace(paper, **own | flags)
    changed = []
    for name in own | flags:
        value, printed = getattr(recipe, name), getattr(paper, name)
        if value != printed and not name.startswith("few_shot"):
            shown = f"{value:.3g}" if isinstance(value, float) else value
            changed.append(f"{name} {shown} (paper: {printed})")
    return recipe, changed


# --------------------------------------------------------------------------------------------------
# Command line

HELP = __doc__.split("\n\nA run is")[0] + """

what        --model uc2|cclm           the encoder
            --task xgqa|xvnli|xflickrco
strategy    --suf [K]                  scheduled unfreezing: K more layers per epoch, from the top
                                       (default: the recipe's K)
            --lr-decay D               learning rate times D per layer down
            --train-top N              only the top N layers train; embeddings are frozen
            --lp-ft                    no layer trains in epoch 1, all of them afterwards
            --freeze [embeddings] [vision]    what stays frozen beside layers
of --suf    --order bottom-up|random   instead of from the top
            --suf-interval STEPS       thaw every so many steps instead of every epoch
            --only less                control: all layers train from the first step, each at the
                                       share of its learning rate that SUF leaves it
            --only later               control: SUF, with rates raised to make up for that share
data        --data DIR                 IGLUE's files (default: the embedded miniature)
            --checkpoint FILE          official pre-trained checkpoint
            --tokenizer FILE           XLM-R's sentencepiece.bpe.model
            --limit N                  the first N records for training, and N per language
recipe      --epochs, --batch-size, --lr, --vision-lr, --embedding-lr    instead of the paper's
            --first-image-negatives    UC2 on xFlickrCO: the mistake in IGLUE's code
            --answers exact|reference  CCLM on xGQA: argmax over all labels (default), or the
                                       released code's ranking of 128 candidates
            --seed S                   of everything random (default: 0)
speed       --precision float32|bf16   of activations (default: bf16 on a GPU)
            --grad-accum N             forward passes per optimizer step and process
            --questions-per-image N    keep N examples of an image together, to share its encoding
            --compile                  torch.compile the layers
            --workers N                processes that load images (default: half the cores)
run         --run-dir DIR              its folder (default: runs/MODEL-TASK-STRATEGY-seedS)
            --resume                   go on where the run in this folder stopped
            --eval-every-epoch         test all languages after every epoch (default on the
                                       miniature's xGQA and XVNLI)
            --save-epochs              keep the weights of every epoch: epoch1.pt, ...
            --deterministic            same bits on a GPU too (slower)
            --dry-run                  print data counts, schedule and rates; no training
"""
# the flags by kind of value; what each is for stands above
PATHS = "data checkpoint tokenizer run-dir"
NUMBERS = ("train-top suf-interval limit epochs batch-size seed grad-accum questions-per-image "
           "workers")
RATES = "lr-decay lr vision-lr embedding-lr"
SWITCHES = ("lp-ft first-image-negatives compile resume eval-every-epoch save-epochs deterministic "
            "dry-run")
CHOICES = {"model": "uc2 cclm", "task": "xgqa xvnli xflickrco", "order": "bottom-up random",
           "only": "less later", "answers": "exact reference", "precision": "float32 bf16"}


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = evaluation.Parser()
    parser.format_help = lambda: HELP
    for names, kind in ((PATHS, str), (NUMBERS, int), (RATES, float)):
        for name in names.split():
            parser.add_argument(f"--{name}", type=kind)
    for name in SWITCHES.split():
        parser.add_argument(f"--{name}", action="store_true")
    for name, values in CHOICES.items():
        parser.add_argument(f"--{name}", choices=values.split())
    parser.add_argument("--suf", nargs="?", type=int, const=True)
    parser.add_argument("--freeze", nargs="*", choices=["embeddings", "vision"])
    workers = min(8, (os.cpu_count() or 1) // 2)
    parser.set_defaults(seed=0, questions_per_image=1, answers="exact", workers=workers)
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "train.py", *argv])
    args.few_shot = args.shots = args.init = None  # of tools/few_shot.py, which shares this file
    if args.freeze is None:
        args.freeze = [] if args.train_top is None else ["embeddings"]
    args.freeze.sort()

    # what contradicts itself
    if not (args.model and args.task):
        parser.error("--model and --task are required")
    strategies = (args.suf, args.lr_decay, args.train_top, args.lp_ft or None)
    if strategies.count(None) < 3:
        parser.error("--suf, --lr-decay, --train-top and --lp-ft are alternatives")
    if args.suf is None and (args.order or args.suf_interval or args.only):
        parser.error("--order, --suf-interval and --only belong to --suf, which is not given")
    if len({bool(path) for path in (args.data, args.checkpoint, args.tokenizer)}) > 1:
        parser.error("--data, --checkpoint and --tokenizer go together (or none: the miniature)")
    if args.questions_per_image > 1 and (args.model, args.task) == ("cclm", "xflickrco"):
        parser.error("--questions-per-image: CCLM's retrieval needs one caption of every image")
    for name, value in vars(args).items():
        least = 0 if name in ("seed", "workers", "train_top") else 1e-30
        most = 1 if name == "lr_decay" else 2**62
        if type(value) in (int, float) and not least <= value <= most:
            parser.error(f"--{name.replace('_', '-')} cannot be {value}")
    return args


def strategy_name(args):
    """Short name of what was asked for; part of the default folder's name."""
    name = "lpft" if args.lp_ft else "standard"
    for prefix, value in (("suf", args.suf), ("decay", args.lr_decay), ("top", args.train_top)):
        if value is not None:
            name = prefix if value is True else f"{prefix}{value:g}"
    parts = [name, args.order, args.only]
    if args.suf_interval:
        parts.append(f"every{args.suf_interval}")
    usual = [] if args.train_top is None else ["embeddings"]
    if args.freeze != usual:
        parts += ["frozen", *(args.freeze or ["nothing"])]
    return "-".join(filter(None, parts))


# --------------------------------------------------------------------------------------------------
# What trains when, and at which rate. Layers count from 0, the bottom, here; from 1 in print.


def suf_layers(args, recipe, step, steps, num_layers):
    """Set of the layers that SUF trains at a step (from 0). steps: how many an epoch has."""
    k = recipe.suf_k if args.suf is True else args.suf
    phase = step // (args.suf_interval or steps)
    order = None  # the paper's: from the top
    if args.order == "bottom-up":
        order = range(num_layers)
    if args.order == "random":
        order = np.random.default_rng(args.seed).permutation(num_layers).tolist()
    return schedule.suf(phase, num_layers, k, order)


def trainable_layers(args, recipe, step, steps, num_layers):
    """Set of the layers that train at a step (from 0) by any strategy.

    steps: how many an epoch has. `--only less` trains all, at rates that `learning_rates` lowers.
    """
    if args.lp_ft and step < steps:
        return set()
    if args.train_top is not None:
        return schedule.train_top(num_layers, min(num_layers, args.train_top))
    if args.suf is None or args.only == "less":
        return set(range(num_layers))
    return suf_layers(args, recipe, step, steps, num_layers)


def learning_rates(args, recipe, steps, num_layers):
    """Peak rate of every part: "layer 1" (bottom) …, "embeddings", "vision", "head"."""
    decay = args.lr_decay or 1.0
    rates = schedule.layer_decay(recipe.lr, decay, num_layers)
    if args.only:
        # the share of its rate, summed over the run, that SUF leaves to each layer: "less"
        # multiplies the rate by it, "later" divides
        every_step = range(steps * recipe.epochs)
        trained = [suf_layers(args, recipe, step, steps, num_layers) for step in every_step]
        factors = [lr_factor(step, len(every_step), recipe.warmup) for step in every_step]
        for i, share in enumerate(schedule.rate_shares(trained, factors, num_layers)):
            if args.only == "less":
                rates[i] *= share
            elif share > 0:
                rates[i] /= share
    parts = {f"layer {i + 1}": rate for i, rate in enumerate(rates)}
    parts["embeddings"] = recipe.embedding_lr or recipe.lr
    if args.embedding_lr is None:
        # the paper does not say: as one more layer below the lowest
        parts["embeddings"] *= decay**num_layers
    return parts | {"vision": recipe.vision_lr or recipe.lr, "head": recipe.lr}


def part_of(model):
    """Parameter name -> part of the model: "layer 1" …, "embeddings", "vision" or "head"."""
    layer_of = {}
    for i, layer in enumerate(model.layers):
        for parameter in layer.parameters():
            layer_of[id(parameter)] = f"layer {i + 1}"
    return {name: model.group_of(name) or layer_of[id(p)] for name, p in model.named_parameters()}


def make_optimizer(model, args, recipe, steps):
    """AdamW over all parameters, also of layers that start frozen: it skips what has no gradient.

    One group per part of the model, with weight decay or without. Freezes what args.freeze names.
    """
    rates = learning_rates(args, recipe, steps, len(model.layers))
    members, outside = {}, []
    for name, part in part_of(model).items():
        parameter = model.get_parameter(name)
        parameter.requires_grad_(part not in args.freeze)
        members.setdefault((part, model.decays(name)), []).append(parameter)
        if not part.startswith("layer"):
            outside.append(parameter)
    groups = []
    for (part, decays), parameters in members.items():
        weight_decay = recipe.weight_decay if decays else 0.0
        groups.append({"params": parameters, "peak_lr": rates[part], "weight_decay": weight_decay})
    optimizer = torch.optim.AdamW(groups, 0.0, recipe.betas, recipe.eps, fused=True)
    schedule.check_partition(model, model.layers, outside, optimizer)
    return optimizer


def lr_factor(step, total, warmup):
    """Linear from 0 to 1 over the share `warmup` of all steps, then down to 0 after the last one.

    The first step has rate 0, as in both references.
    """
    rising = warmup * total
    if step < rising:
        return step / max(1, rising)
    return max(0.0, (total - step) / max(1, total - rising))


def set_rates(optimizer, factor, recipe):
    """Set learning rate and eps for the step that follows.

    With c = 1 - beta2^t the references divide by (sqrt(v) + eps) / sqrt(c), torch by
    sqrt(v) / sqrt(c) + eps: the same if torch gets eps / sqrt(c). t is a parameter's own number of
    updates, counted per group, because the parameters of a group thaw together.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        if group["params"][0].requires_grad:
            group["updates"] = group.get("updates", 0) + 1
            group["eps"] = recipe.eps / math.sqrt(1 - recipe.betas[1] ** group["updates"])


# --------------------------------------------------------------------------------------------------
# The loop


def fit(model, examples, dataset, args, recipe, device, stop, after_epoch):
    """Train `model` on `dataset`. after_epoch(epoch, step, log) is called after every epoch.

    Every process runs its share of a batch in args.grad_accum equal parts. -> the log (None in
    processes that write none). InputError if a loss or a gradient is not finite.
    """
    rank, processes = ranks()
    steps = len(examples) // recipe.batch_size  # of an epoch
    total, num_layers = steps * recipe.epochs, len(model.layers)
    optimizer = make_optimizer(model, args, recipe, steps)
    # where the run begins: at its start, or where last.pt was saved
    state, last = {"step": 0, "log": ""}, f"{args.run}/last.pt"
    if args.resume and os.path.isfile(last):
        state = torch.load(last, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    first = state["step"]
    log = open_log(args.run, state["log"]) if rank == 0 else None

    # the batches, each in equal parts, of which this process runs `mine`
    mine = range(rank * args.grad_accum, (rank + 1) * args.grad_accum)
    groups = examples.image_rows if args.questions_per_image > 1 else None
    # retrieval: batches at random; each, and so its parts, is still sorted by length
    pool = 1 if args.task == "xflickrco" else 16
    items = data.training_items(
        examples, recipe.batch_size, args.seed, recipe.epochs, first, processes * args.grad_accum,
        mine, pool=pool, groups=groups, group_size=args.questions_per_image)
    batches = data.load_batches(dataset.batch, items, args.workers, device)
    if args.compile:
        compile_layers(model)
    model.train()
    if first and first % steps == 0:  # last.pt is written before an epoch's test: that comes first
        after_epoch(first // steps - 1, first, log)
    bar = evaluation.progress(range(first, total), "training")
    wrapped = None
    for step in bar:
        stop.in_step = True
        epoch = step // steps

        # >>> This is scheduled unfreezing: which layers train from here on.
        trainable = trainable_layers(args, recipe, step, steps, num_layers)
        changed = schedule.apply(model.layers, trainable)
        # <<< Everything else is ordinary fine-tuning.

        if changed or wrapped is None:
            say(f"epoch {epoch + 1}: {len(trainable)} of {num_layers} layers train")
            if args.compile:
                torch.compiler.reset()  # torch 2.11 would reuse what it compiled for a frozen layer
            # DDP averages only what requires gradients when it is made: a new one in every phase
            wrapped = model  # frees the old wrapper and its hooks before the new one is made
            if dist.is_initialized():
                wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        factor = lr_factor(step, total, recipe.warmup)
        set_rates(optimizer, factor, recipe)

        # forward and backward, part by part
        losses, ids = [], []
        for part in mine:
            batch = next(batches)
            ids += batch.pop("ids")
            for name, tensor in batch.items():
                batch[name] = tensor.to(device, non_blocking=True)
            seed_part(args.seed, step, part)
            # gradients travel between processes once per step, after the last part
            waits = dist.is_initialized() and part != mine[-1]
            with wrapped.no_sync() if waits else contextlib.nullcontext():
                with torch.autocast(device.type, torch.bfloat16, args.precision == "bf16"):
                    loss = wrapped(batch)
                (loss / args.grad_accum).backward()
            losses.append(loss.detach())
        # without a clip the norm is only measured
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip or math.inf)

        # means over the processes: of loss, norm, and whether a signal has reached it
        told = norm.new_tensor(stop.number > 0)
        shared = torch.stack([torch.stack(losses).mean(), norm, told])
        if dist.is_initialized():
            dist.all_reduce(shared)
        loss, norm, stopping = (shared / processes).tolist()
        if not math.isfinite(loss + norm):
            raise InputError(f"{args.run}: loss {loss}, gradient norm {norm} at step {step + 1}, "
                             f"on the records {' '.join(ids)}")

        # the update
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if log:
            add_line(log, step=done, epoch=epoch + 1, loss=loss, gradient_norm=norm,
                     lr_factor=factor)
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

        # save, stop if asked to, test
        if log and (done % steps == 0 or stopping):
            with open(log.name, encoding="utf-8") as file:
                state = {"step": done, "log": file.read(), "model": model.state_dict(),
                         "optimizer": optimizer.state_dict()}
            data.write(last, lambda file: torch.save(state, file))
        if stopping:
            if dist.is_initialized():
                dist.barrier()  # once one process has ended, torchrun ends the others
            say(f"stopped and saved after step {done} of {total}; --resume goes on")
            sys.exit(128 + (stop.number or signal.SIGTERM))
        stop.in_step = False
        if done % steps == 0:
            after_epoch(epoch, done, log)
    return log


def compile_layers(model):
    """torch.compile every layer by itself: layers of one kind share their compiled code."""
    torch._dynamo.config.recompile_limit = 64  # kinds of layer x (trained, frozen, in evaluation)
    for module in model.modules():
        if isinstance(module, (TransformerLayer, vit.Block)):
            module.compile(dynamic=True)


def seed_part(seed, step, part):
    """Seed dropout and stochastic depth of one part of one step, whichever process runs it."""
    [number] = np.random.SeedSequence((seed, step, part)).generate_state(1, np.uint64)
    torch.manual_seed(int(number) >> 1)


# --------------------------------------------------------------------------------------------------
# Several processes as one, and signals


def say(text):
    """Print, once per run, without tearing a progress bar."""
    if ranks()[0] == 0:
        tqdm.write(text)
        sys.stdout.flush()


def start(args):
    """Choose the device; join the other processes if torchrun started any. -> torch.device."""
    device = evaluation.accelerator()
    args.device = evaluation.describe(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise InputError("WORLD_SIZE is set, but not all of RANK, MASTER_ADDR and MASTER_PORT: "
                             "start several processes with torchrun, or unset WORLD_SIZE for one")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if args.precision is None:
        args.precision = "bf16" if device.type == "cuda" else "float32"
    return device


class Stop:
    """Ctrl-C and SIGTERM end a run after the current training step, with everything saved.

    Outside of a step, and the second time, they end it at once: KeyboardInterrupt, see `main`.
    """

    def __init__(self):
        self.number, self.in_step = 0, False  # number: of the signal that came
        signal.signal(signal.SIGINT, self.request)
        signal.signal(signal.SIGTERM, self.request)

    def request(self, number, frame):
        if self.number or not self.in_step:
            raise KeyboardInterrupt(number)
        self.number = number


# --------------------------------------------------------------------------------------------------
# The run's folder


def open_log(run, text=""):
    """log.jsonl with this text, of the run that goes on from there; open, to add lines.

    It holds no times: the log of a resumed run equals that of an uninterrupted one.
    """
    path = f"{run}/log.jsonl"
    data.write(path, lambda file: file.write(text.encode()))
    return open(path, "a", encoding="utf-8")


def add_line(log, **entry):
    with data.writing(log.name):
        log.write(json.dumps(entry) + "\n")
        log.flush()


def write_weights(path, model):
    """The model under its official names, with what no shape tells."""
    content = {"model": file_tensors(model), "config": model.config()}
    data.write(path, lambda file: torch.save(content, file))


def fingerprints_of(args, weights, examples, tests):
    """Of every file that decides a run's numbers, but for images and features.

    By the last two parts of its path, so that data may move: {"de/test.json": …}.
    """
    files = [weights, args.tokenizer, examples.source]
    if args.task == "xgqa":
        files.append(f"{args.data}/gqa/annotations/trainval_ans2label.json")
    files += [part.source for part in tests.examples.values()]
    return {"/".join(path.split(os.sep)[-2:]): data.fingerprint(path) for path in files}


def settings_of(args, recipe, fingerprints):
    """What a resumed run must share with the run it continues."""
    settings = {"strategy": strategy_name(args)} | asdict(recipe) | fingerprints
    for name in ("model", "task", "seed", "limit", "questions_per_image", "first_image_negatives",
                 "precision", "deterministic", "answers", "few_shot", "shots"):
        settings[name] = getattr(args, name)
    processes = ranks()[1]
    settings["processes x accumulation"] = processes * args.grad_accum
    if args.model == "cclm" and args.task == "xflickrco":  # others' captions are negatives
        settings["processes"] = processes
    return {name: str(value) for name, value in settings.items()}


def free_name(folder):
    """The folder, or the first of folder-2, folder-3 … that holds no run."""
    name, number = folder, 1
    while os.path.exists(f"{name}/args.json"):
        number += 1
        name = f"{folder}-{number}"
    return name


def check_new(args):
    """InputError, before anything is loaded, where a run would overwrite another one."""
    free = free_name(args.run)
    if free != args.run and not (args.resume or args.dry_run):
        raise InputError(f"{args.run}: a run is already here; --resume goes on with it, --run-dir "
                         f"{shlex.quote(free)} starts another")


def start_folder(args, recipe, changed, model, fingerprints):
    """Make the run's folder with its args.json.

    InputError where the run in this folder has other settings, or where the disk cannot hold what
    the run will write.
    """
    path = f"{args.run}/args.json"
    settings = settings_of(args, recipe, fingerprints)
    if os.path.isfile(path):
        then = data.read_json(path)["settings"]
        for name, value in settings.items():
            if then.get(name) != value:
                raise InputError(f"{args.run}: cannot resume with other settings: {name} was "
                                 f"{then.get(name)}, now {value}")
    if ranks()[0] > 0:
        return
    data.make_folder(f"{args.run}/predictions")
    # in sizes of the model: model.pt 1; last.pt 3, with Adam's two moments, and twice that while it
    # is replaced; every epochN.pt 1
    copies = 1 + 2 * 3 + args.save_epochs * recipe.epochs
    needed = copies * 4 * sum(parameter.numel() for parameter in model.parameters())
    free = shutil.disk_usage(args.run).free
    if free < needed:
        raise InputError(f"{args.run}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed")
    places = {name: portable(getattr(args, name)) for name in ("data", "checkpoint", "tokenizer")}
    data.write_json(path, {
        "command": args.command, "args": vars(args) | places, "recipe": asdict(recipe),
        "not_as_in_the_paper": changed, "settings": settings, "fingerprints": fingerprints,
        "torch": torch.__version__})


def portable(path):
    """Paths in the checkout are kept relative to it, because it may move; others whole."""
    path = os.path.abspath(path)
    return os.path.relpath(path, ROOT) if path.startswith(ROOT + os.sep) else path


# --------------------------------------------------------------------------------------------------
# Model and data


def load_model(args, device, num_labels):
    """-> (model, config of the checkpoint, recipe, what is not as in the paper)."""
    try:
        tensors, config = read_checkpoint(args.checkpoint)
        recipe, changed = recipe_of(args, config)
        torch.manual_seed(args.seed)  # of new parameters: heads, decoder
        model = evaluation.MODELS[args.model].from_pretrained(
            tensors, config, args.task, args.checkpoint, image_size=recipe.image_size,
            num_labels=num_labels, dropout=recipe.dropout, drop_path=recipe.drop_path)
    except ValueError as error:
        raise InputError(str(error)) from None
    return model.to(device), config, recipe, changed


def training_data(args, recipe, tokenizer, labels, split):
    """-> (examples, dataset of batches) of a training split.

    split: "train", or "few-shot" for args.shots images of the language args.few_shot.
    """
    def keep(text, record):
        if args.task == "xflickrco":
            return text != ""
        return args.model == "uc2" or record.label != "-"  # IGLUE trains UC2 on "-": no target is 1

    examples = data.load_examples(args.data, args.task, split, recipe, tokenizer,
                                  args.few_shot or "en", args.shots, True, keep, args.limit)
    pictures = evaluation.make_pictures(args, recipe, split, examples.image_keys)

    # what a batch holds beside texts and images (but UC2's retrieval, below)
    names = labels or evaluation.MODELS[args.model].LABELS
    class_of = {name: i for i, name in enumerate(names)}
    if args.task == "xgqa":
        data.check_answers(examples, labels)
    if args.task == "xflickrco":
        targets = data.contrast_targets(examples)
    elif args.model == "uc2":
        targets = data.class_targets(examples, class_of)
    elif args.task == "xgqa":
        targets = data.answer_targets(examples, dict(zip(labels, tokenizer(labels))))
    else:
        targets = data.label_targets(examples, class_of)
    if args.model == "uc2" and args.task == "xflickrco":
        # IGLUE's few-shot code draws the hard caption like the random one
        pools = {} if args.few_shot else data.read_hard_negatives(args.data, examples.image_keys)
        return examples, data.RankingBatches(examples, pictures, args.seed, pools,
                                             args.first_image_negatives)
    augment = recipe.augment and args.model == "cclm"
    share_images = args.questions_per_image > 1 or args.model == "uc2"  # no region is augmented
    return examples, data.TrainingBatches(examples, pictures, targets, args.seed, augment,
                                          share_images)


def accumulation(args, recipe, examples):
    """Set args.grad_accum: as asked, or as few passes as keep each within the micro batch."""
    processes, size = ranks()[1], recipe.batch_size
    if len(examples) < size:
        raise InputError(f"{examples.source}: {len(examples)} training examples do not fill one "
                         f"batch of {size}; use a smaller --batch-size")
    if args.grad_accum is None:
        args.grad_accum = math.ceil(size / (processes * recipe.micro_batch))
    if size % (processes * args.grad_accum):
        raise InputError(f"a batch of {size} cannot be split evenly over {processes} process(es) x "
                         f"{args.grad_accum} accumulation steps: choose another --grad-accum or "
                         "--batch-size")
    contrasted = size // args.grad_accum  # in one forward pass of all processes
    most = int(np.bincount(examples.image_rows).max())  # captions of one image
    if args.model == "cclm" and args.task == "xflickrco" and contrasted <= most:
        raise InputError(f"{examples.source}: CCLM learns retrieval from the pairs of one forward "
                         f"pass, each other's negatives; {contrasted} pair(s) may all be of one "
                         f"image, which has up to {most} captions")


def print_plan(args, recipe, changed, model, examples):
    """Data counts, recipe, schedule and learning rates."""
    n, steps = len(model.layers), len(examples) // recipe.batch_size
    say(f"{len(examples):,} training examples on {len(examples.image_keys):,} images; "
        f"{recipe.epochs} epochs of {steps:,} steps of {recipe.batch_size}, in {args.grad_accum} "
        f"forward pass(es) on each of {ranks()[1]} process(es), {args.precision}")
    say("\n    ".join(["not as in the paper:", *changed]) if changed else "recipe: the paper's")

    # parameters of each layer, and of what is outside the layers
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.layers]
    outside = sum(p.numel() for p in model.parameters()) - sum(sizes)
    still = [p for name, p in model.named_parameters() if model.group_of(name) in args.freeze]
    frozen = sum(p.numel() for p in still)
    lasts = range(steps - 1, steps * recipe.epochs, steps)  # last step of every epoch
    epochs = [trainable_layers(args, recipe, step, steps, n) for step in lasts]
    rates = learning_rates(args, recipe, steps, n)
    factors = [rates[f"layer {i + 1}"] / recipe.lr for i in range(n)]
    trains_below = "embeddings" not in args.freeze
    say(schedule.preview(epochs, sizes, outside - frozen, frozen, trains_below, factors))
    parts = dict.fromkeys(part_of(model).values())
    told = [f"{name} {rates[name]:.3g}" for name in parts]
    say("peak learning rates: " + ", ".join(told))


# --------------------------------------------------------------------------------------------------
# A whole run


def run(args, stop):
    """From the command line to results.json."""
    device = start(args)
    default = f"runs/{args.model}-{args.task}-{strategy_name(args)}-seed{args.seed}"
    args.run = args.run_dir or default
    check_new(args)
    if args.data is None:
        args.data, args.checkpoint, args.tokenizer = world.prepare(args.model)
    args.miniature = data.is_miniature(args.data)
    args.eval_every_epoch |= args.miniature and args.task != "xflickrco"
    if args.miniature and device.type == "cpu":
        torch.set_num_threads(1)  # tiny models lose by a second thread
    where = " of the miniature" if args.miniature else ""
    say(f"{args.model} on {args.task}{where}, {strategy_name(args)}, seed {args.seed}, on "
        f"{args.device}")

    # model, tokenizer, data
    labels = data.read_labels(args.data) if args.task == "xgqa" else []
    model, config, recipe, changed = load_model(args, device, len(labels))
    tokenizer = data.Tokenizer(args.tokenizer)
    expected = config.get("tokenizer_sha256", data.XLMR_SHA256)
    warning = tokenizer.check(expected, model.sizes.vocabulary)
    if warning:
        say(f"warning: {warning}")
    evaluation.introduce(model, tokenizer, labels, args.answers)
    examples, dataset = training_data(args, recipe, tokenizer, labels, "train")
    tests = evaluation.load_split(args, recipe, tokenizer, labels, "test")
    evaluation.check_features(model, dataset.pictures, tests.pictures)
    accumulation(args, recipe, examples)
    print_plan(args, recipe, changed, model, examples)
    if args.dry_run:
        return
    fingerprints = fingerprints_of(args, args.checkpoint, examples, tests)
    start_folder(args, recipe, changed, model, fingerprints)
    if os.path.isfile(f"{args.run}/results.json"):
        say(f"{args.run} is complete")
        return

    def after_epoch(epoch, step, log):
        if args.eval_every_epoch and epoch + 1 < recipe.epochs:
            results, _ = evaluation.evaluate(model, tests, device, args.precision, args.workers)
            say(f"after epoch {epoch + 1}\n{evaluation.table(args.task, results)}")
            if log:
                add_line(log, step=step, epoch=epoch + 1, **summary(args, results))
        if args.save_epochs and log:
            write_weights(f"{args.run}/epoch{epoch + 1}.pt", model)

    log = fit(model, examples, dataset, args, recipe, device, stop, after_epoch)
    results, predictions = evaluation.evaluate(model, tests, device, args.precision, args.workers)
    steps = recipe.epochs * (len(examples) // recipe.batch_size)
    finish(args, model, summary(args, results), predictions, log, steps)
    if strategy_name(args) in ("standard", "suf"):
        say(next_step(args, fingerprints))


def summary(args, results):
    """results.json's content."""
    metrics = [name for name, _ in evaluation.headline(args.task)]
    means = {name: evaluation.mean_zero_shot(results, name) for name in metrics}
    return {"model": args.model, "task": args.task, "strategy": strategy_name(args),
            "seed": args.seed, "languages": results,
            "mean_zero_shot": means if len(means) > 1 else means["accuracy"]}


def finish(args, model, results, predictions, log, step):
    """Predictions, weights, and results.json last: where it is, the run is complete."""
    if log:
        for language, entries in predictions.items():
            data.write_json(f"{args.run}/predictions/{language}.json", entries)
        write_weights(f"{args.run}/model.pt", model)
        add_line(log, step=step, **results)
        data.write_json(f"{args.run}/results.json", results)
    say(evaluation.table(args.task, results["languages"]))
    say(f"results, predictions and weights: {args.run}")


def next_step(args, fingerprints):
    """What to run after standard fine-tuning or SUF: the other one, or their comparison."""
    other = "suf" if args.suf is None else "standard"
    folder = args.run.replace(f"-{strategy_name(args)}-", f"-{other}-")
    finished = folder != args.run and os.path.isfile(f"{folder}/results.json")
    if finished and evaluation.fingerprints(folder) == fingerprints:
        pair = [args.run, folder] if other == "suf" else [folder, args.run]
        return f"next: python -m tools.compare {shlex.join(pair)}"
    command = args.command.replace(" --suf", "") if args.suf else f"{args.command} --suf"
    return f"next, to compare: {command} --run-dir {shlex.quote(free_name(folder))}"


def run_until_stopped(function, args):
    """function(args, stop), ended in order by signals, and where another process has ended."""
    callers_group = dist.is_initialized()
    try:
        function(args, Stop())
    except KeyboardInterrupt as signalled:
        say("stopped; the same command with --resume goes on from what was saved last")
        sys.exit(128 + signalled.args[0])
    except RuntimeError as error:
        # gloo's errors have no class of their own
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        raise InputError(f"process {ranks()[0]} has lost the connection to another one, whose own "
                         "message tells why") from None
    finally:
        if dist.is_initialized() and not callers_group:
            dist.destroy_process_group()


def main(argv=None):
    run_until_stopped(run, parse_args(argv))


if __name__ == "__main__":
    evaluation.command(main)
