"""Pre-training of the miniature's tiny CCLM and UC2: what the released checkpoints bring.

    python -m miniature.pretrain --out DIR             tokenizer.model, cclm.pt, uc2.pt
    python -m miniature.pretrain --out DIR --seed 1    to see how much depends on the start

Both models are the ordinary classes of cclm.py and uc2.py, only small, with every head of the
released checkpoints. What they learn here stands for what those know: words grounded in images, and
languages aligned with each other.

    image-text matching   is the text true of the scene? Sentences, and phrases about one object
    masked words          with the image in view
    contrast of phrases   CCLM: a phrase and the patch that it describes
    contrast of texts     CCLM: a sentence and its translation, before any image is seen
    fused contrast        the same after the image is seen: the <s> of a sentence and of its
                          translation are pulled together, and away from the other sentences, some
                          of them about the same image; CCLM: the means of all states too

The fused contrast is in neither paper. Without it there is little transfer to protect: the upper
layers read the languages differently, and models fine-tuned on xGQA reach 27 % (CCLM) and 15 %
(UC2) in the other languages, 33 and 17 % with SUF.

For the first steps there are phrases alone, because grounding whole sentences from nothing takes
several times as long.

Letters in shapes: N texts of a kind, S pieces per text, D width.
"""

import contextlib
import os
import shlex
import tempfile
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn

import cclm
import data
import eval as evaluation
import uc2
from miniature import languages, world
from model import file_tensors, select

# Sizes of the models
WIDTH, HEADS, FEED_FORWARD = 64, 4, 128
TEXT_LAYERS, CROSS_LAYERS, VISION_LAYERS = 4, 2, 2  # CCLM
UC2_LAYERS = 4
PIECES = 240  # of the tokenizer: so few that languages share them
CORPUS = 20_000  # sentences that it is trained on
POSITIONS = 98

# Data and optimisation
SCENES = 10_000
SENTENCES = 60_000  # statements, phrases, and pairs of translations: so many of each
PAIRS_PER_SCENE = 4
BATCH_SIZE = 32
STEPS = 4000
PHRASE_STEPS = 1200  # phrases alone at first; later in every fourth step
VISION_STEPS = 250
LR = 2e-3
SHARE_MASKED = 0.3  # of a text's pieces
TEMPERATURE = 0.1  # of the contrasts

# What of the fine-tuning is not as in the paper, stored in the checkpoint. Why: docs/miniature.md
SHARED = {"suf_k": 1, "dropout": 0.0, "batch_size": 64, "micro_batch": 256, "image_size": 32}
CCLM_RATES = {"lr": 1e-3, "vision_lr": 1e-3 * 2 / 3, "few_shot_lrs": [1e-3, 5e-4, 1e-4]}
UC2_RATES = {"lr": 5e-4, "few_shot_lrs": [5e-4, 2.5e-4, 5e-5]}
RECIPES = {
    "cclm": SHARED | CCLM_RATES | {"drop_path": 0.0, "augment": False},
    "uc2": SHARED | UC2_RATES,
}

# ----------------------------------------------------------------------------------------------
# Tokenizer and models


def train_tokenizer(path):
    """A unigram model of romanised text. The same bytes every time."""
    path = os.path.abspath(path)
    # the trained file records the paths it was given: relative ones, in a folder of its own
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with open("rules.tsv", "w", encoding="utf-8") as file:
            file.write(languages.normalization_rules())
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(world.tokenizer_corpus(CORPUS, seed=0)),
            model_prefix="tokenizer", vocab_size=PIECES, character_coverage=1.0,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            normalization_rule_tsv="rules.tsv", num_threads=1, minloglevel=2,
        )
        with open("tokenizer.model", "rb") as file:
            content = file.read()
    data.write(path, lambda file: file.write(content))


def new_model(name, vocabulary):
    """CCLM or UC2 with random weights."""
    if name == "cclm":
        sizes = cclm.Sizes(
            width=WIDTH, vocabulary=vocabulary, text_layers=TEXT_LAYERS, cross_layers=CROSS_LAYERS,
            text_heads=HEADS, cross_heads=HEADS, text_feed_forward=FEED_FORWARD,
            cross_feed_forward=FEED_FORWARD, text_positions=POSITIONS, text_types=1,
            vision_width=WIDTH, vision_layers=VISION_LAYERS, vision_heads=HEADS,
            vision_feed_forward=FEED_FORWARD, patch_size=world.CELL, image_size=world.IMAGE_SIZE,
            embed_dim=WIDTH // 2, decoder_positions=16,
        )
        model = cclm.CCLM(sizes, "pretraining", dropout=0.0, drop_path=0.0)
    else:
        sizes = uc2.Sizes(
            width=WIDTH, vocabulary=vocabulary, layers=UC2_LAYERS, heads=HEADS,
            feed_forward=FEED_FORWARD, positions=POSITIONS, types=2,
            features=world.FEATURE_WIDTH, locations=7, region_classes=1,
        )
        model = uc2.UC2(sizes, "pretraining", dropout=0.0)
    # the models' standard deviation of 0.02 belongs to a width of 768
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_((768 / WIDTH) ** 0.5)
    return model


# ----------------------------------------------------------------------------------------------
# Data


class Texts(NamedTuple):
    """Sentences or phrases: token rows, and of each the scene, whether it is true of it, and which
    object of the scene it is about (phrases only).
    """

    rows: list
    scenes: np.ndarray
    truths: np.ndarray
    things: np.ndarray


class Corpus(NamedTuple):
    pictures: dict  # tensors of all scenes, as `encode_images` takes them
    spots: np.ndarray  # [scenes, objects]: patch (CCLM) or region (UC2) of each object, else -1
    classes: np.ndarray  # [scenes, objects, 4]: size, colour, shape and side as numbers
    statements: Texts
    phrases: Texts
    english: list  # token rows; sentence i
    translations: list  # its translation
    pair_scenes: np.ndarray  # PAIRS_PER_SCENE in a row are about one scene


def make_corpus(name, tokenizer, seed):
    """Random scenes; statements, phrases and translations about them."""
    rng = np.random.default_rng([seed, 10])
    drawn = world.draw_scenes(SCENES, rng)

    def tokens(texts):  # CCLM reads every text without punctuation, UC2 reads it as it is
        if name == "cclm":
            texts = [data.clean_caption(text, None) for text in texts]
        return tokenizer(texts)

    def as_arrays(items):
        scenes, things, texts, truths = zip(*items)
        truths = np.array(truths, np.int64)
        return Texts(tokens(texts), np.array(scenes), truths, np.array(things))

    # where the objects are, and what they are
    spots = np.full((SCENES, world.MOST), -1)
    classes = np.zeros((SCENES, world.MOST, 4), np.int64)
    for i, scene in enumerate(drawn):
        for k, thing in enumerate(scene):
            spots[i, k] = thing.row * world.GRID + thing.column
            for a, attribute in enumerate(("size", "colour", "shape", "side")):
                values = languages.ATTRIBUTES[attribute]
                classes[i, k, a] = values.index(getattr(thing, attribute))
    if name == "cclm":
        images = torch.from_numpy(world.draw_images(drawn, rng))
        pictures = {"images": images.permute(0, 3, 1, 2).contiguous()}
    else:
        regions = world.detect_regions(drawn, rng)
        spots = regions.slots
        image_sizes = np.full((SCENES, 2), world.IMAGE_SIZE, np.int32)
        locations = torch.from_numpy(data.locations(regions.boxes, image_sizes))
        pictures = {"features": torch.from_numpy(regions.features), "locations": locations,
                    "region_mask": torch.ones(SCENES, world.BOXES, dtype=torch.long)}

    statements = as_arrays(world.pretraining_statements(drawn, SENTENCES, seed))
    phrases = as_arrays(world.pretraining_phrases(drawn, SENTENCES, seed))
    pairs = world.parallel_pairs(drawn, SENTENCES, seed, PAIRS_PER_SCENE)
    pair_scenes, english, translations = zip(*pairs)
    return Corpus(pictures, spots, classes, statements, phrases, tokens(english),
                  tokens(translations), np.array(pair_scenes))


# ----------------------------------------------------------------------------------------------
# What the two models call differently


def encode(model, corpus, scenes, device):
    """Each image of `scenes` through the image encoder once. -> (encoded, each scene's row)."""
    distinct, rows = np.unique(scenes, return_inverse=True)
    pictures = {name: tensor[distinct].to(device) for name, tensor in corpus.pictures.items()}
    return model.encode_images(pictures), torch.from_numpy(rows).to(device)


def padded(texts, device):
    input_ids, mask = data.pad(texts)
    return input_ids.to(device), mask.to(device)


def spot_memory(model, encoded, rows, spots):
    """The image memory if only one patch or region of each image is visible."""
    if isinstance(model, cclm.CCLM):
        # state 0 is the image's <cls>
        return model.image_memory(encoded[rows, 1 + spots][:, None])
    regions, mask = encoded
    return model.image_memory((regions[rows, spots][:, None], mask[rows, spots][:, None]))


def matching_logits(model, hidden):
    if isinstance(model, cclm.CCLM):
        return model.itm_head(hidden[:, 0])
    return model.itm_logits(hidden)


def masked_word_logits(model, hidden):
    if isinstance(model, cclm.CCLM):
        return model.mlm_head(hidden)
    return model.mlm_logits(hidden)


# ----------------------------------------------------------------------------------------------
# Loss


def contrast(a, b):
    """InfoNCE in both directions: row i of `a` belongs to row i of `b`. [N,D] each -> scalar."""
    similarity = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / TEMPERATURE  # [N,N]
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


def pretraining_loss(model, corpus, tokenizer, rng, step, device):
    """One batch of every kind of text, in one pass through the encoders.

    -> (loss, share of right matching decisions)
    """
    n = BATCH_SIZE
    is_cclm = isinstance(model, cclm.CCLM)
    phrases_only = step < PHRASE_STEPS
    of_phrases = phrases_only or step % 4 == 0

    # n texts to match, n true ones that lose words, and later n sentences with n translations
    source = corpus.phrases if of_phrases else corpus.statements
    asked = rng.integers(len(source.rows), size=n)
    blanked = rng.choice(np.flatnonzero(source.truths), size=n)
    number_of_groups = 0 if phrases_only else n // PAIRS_PER_SCENE
    groups = rng.integers(len(corpus.english) // PAIRS_PER_SCENE, size=number_of_groups)
    pairs = (groups[:, None] * PAIRS_PER_SCENE + np.arange(PAIRS_PER_SCENE)).ravel()
    single = np.concatenate([asked, blanked])
    texts = [source.rows[i] for i in single]
    texts += [corpus.english[i] for i in pairs]
    texts += [corpus.translations[i] for i in pairs]
    scenes = np.concatenate([source.scenes[single], np.tile(corpus.pair_scenes[pairs], 2)])
    input_ids, mask = padded(texts, device)  # [2N or 4N,S]

    # pieces are hidden in the second n texts only, and never <s>, <pad>, </s> or <unk>
    hide = torch.from_numpy(rng.random(input_ids.shape) < SHARE_MASKED).to(device)
    hide &= input_ids > data.UNK
    hide[:n] = False
    hide[2 * n :] = False

    # every text and every image goes through its encoder once
    encoded, rows = encode(model, corpus, scenes, device)
    states = model.encode_texts(input_ids.masked_fill(hide, tokenizer.mask), mask)  # [2N or 4N,S,D]
    memory = select(model.image_memory(encoded), rows)

    # a phrase sees its own object alone, a sentence sees the whole image
    if of_phrases:
        spots = corpus.spots[source.scenes[single], source.things[single]]
        spots = torch.from_numpy(spots).to(device)
        seen = spot_memory(model, encoded, rows[: 2 * n], spots)
    else:
        seen = select(memory, slice(2 * n))
    hidden = model.fuse(states[: 2 * n], mask[: 2 * n], seen)

    # image-text matching: is the text true?
    truths = torch.from_numpy(source.truths[asked]).to(device)
    matching = matching_logits(model, hidden[:n])
    loss = F.cross_entropy(matching, truths)
    right = (matching.argmax(1) == truths).float().mean()

    # masked words; UC2's stream goes on after the text, with the regions
    words = hidden[:, : input_ids.shape[1]][hide[: 2 * n]]
    loss = loss + F.cross_entropy(masked_word_logits(model, words), input_ids[hide])

    # contrast of phrases: a true phrase and the patch of its object
    if of_phrases and is_cclm:
        true = truths.bool()
        patches = encoded[rows[:n], 1 + spots[:n]]
        said = model.text_proj(states[:n, 0][true])
        loss = loss + contrast(said, model.vision_proj(patches[true]))
    if phrases_only:
        return loss, right

    # fused contrast: a sentence and its translation, both read with the image in view
    fused = model.fuse(states[2 * n :], mask[2 * n :], select(memory, slice(2 * n, None)))
    english, translation = fused[:, 0].split(n)
    loss = loss + contrast(english, translation)
    if is_cclm:
        # contrast of texts: the same, before the image is seen
        english, translation = model.text_proj(states[2 * n :, 0]).split(n)
        loss = loss + contrast(english, translation)
        # CCLM's answer decoder reads all states, not <s> alone
        real = mask[2 * n :, :, None]
        english, translation = ((fused * real).sum(1) / real.sum(1)).split(n)
        loss = loss + contrast(english, translation)
    return loss, right


# ----------------------------------------------------------------------------------------------
# Loops


def warm_up_vision(model, corpus, rng, device):
    """CCLM's image encoder learns to name the object in each patch: size, colour, shape and side.

    This stands for the pre-training that BEiT-2 brings.
    """
    numbers = corpus.classes.reshape(-1, 4).max(0) + 1
    heads = nn.ModuleList(nn.Linear(WIDTH, int(number)) for number in numbers).to(device)
    parameters = [*model.vision.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01)
    for _ in evaluation.progress(range(VISION_STEPS), "image encoder"):
        scenes = np.unique(rng.integers(len(corpus.spots), size=2 * BATCH_SIZE))
        states, _ = encode(model, corpus, scenes, device)
        image, thing = np.nonzero(corpus.spots[scenes] >= 0)
        patches = states[image, 1 + corpus.spots[scenes][image, thing]]  # [objects,D]
        classes = torch.from_numpy(corpus.classes[scenes][image, thing]).to(device)  # [objects,4]
        losses = [F.cross_entropy(head(patches), classes[:, i]) for i, head in enumerate(heads)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()


def pretrain(name, tokenizer, seed, steps, device):
    """-> the pre-trained model. On a CPU the weights are the same every time. With 0 steps they
    stay random: the "from scratch" baseline.
    """
    torch.manual_seed(seed)
    model = new_model(name, tokenizer.vocabulary).to(device)
    if steps == 0:
        return model
    print(f"{name}: writing {SENTENCES:,} texts of each kind about {SCENES:,} scenes", flush=True)
    corpus = make_corpus(name, tokenizer, seed)
    rng = np.random.default_rng([seed, 11])
    model.train()
    if name == "cclm":
        warm_up_vision(model, corpus, rng, device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    cycle = max(steps, 40)  # a shorter one has no whole step of warm-up
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, cycle, pct_start=0.05, cycle_momentum=False, final_div_factor=2)
    matched = 0.5
    bar = evaluation.progress(range(steps), f"{name}, pre-training")
    for step in bar:
        loss, right = pretraining_loss(model, corpus, tokenizer, rng, step, device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        # a moving average over some 50 steps
        matched += (right.item() - matched) / 50
        bar.set_postfix_str(f"loss {loss.item():.2f}, matched {matched:.0%}", refresh=False)
    print(f"{name}: tells {matched:.0%} of the true and false texts apart", flush=True)
    return model


# ----------------------------------------------------------------------------------------------
# Command line


def write_checkpoint(path, name, model, tokenizer, seed, steps):
    """Official names, float16, and beside the sizes the recipe of fine-tuning for every task."""
    config = model.config() | {
        "tokenizer_sha256": tokenizer.sha256,
        "pretraining": {"seed": seed, "steps": steps},
        "recipe": {task: RECIPES[name] for task in data.LANGUAGES},
    }
    tensors, halves = {}, {}
    computed = model.constants()
    for key, tensor in file_tensors(model).items():
        if key not in computed:
            # a tensor with two names is stored once
            half = tensor.detach().cpu().half()
            tensors[key] = halves.setdefault(tensor.data_ptr(), half)
    data.write(path, lambda file: torch.save({"model": tensors, "config": config}, file))


def build(names, seed, steps, folder):
    data.make_folder(folder)
    tokenizer_path = os.path.join(folder, "tokenizer.model")
    train_tokenizer(tokenizer_path)
    tokenizer = data.Tokenizer(tokenizer_path)
    device = evaluation.accelerator()
    for name in names:
        model = pretrain(name, tokenizer, seed, steps, device)
        path = os.path.join(folder, f"{name}.pt")
        write_checkpoint(path, name, model, tokenizer, seed, steps)
    # under a name of its own: other pre-trained weights are no arm of the same comparison
    name, where = names[0], os.path.basename(os.path.abspath(folder))
    world_folder, _, _ = world.prepare(name)
    command = ["python", "train.py", "--model", name, "--task", "xgqa", "--suf",
               "--data", world_folder, "--checkpoint", os.path.join(folder, f"{name}.pt"),
               "--tokenizer", tokenizer_path, "--run-dir", f"runs/{where}-{name}-xgqa-suf"]
    print("next:", shlex.join(command))


def main(argv=None):
    parser = evaluation.Parser(description="Build the miniature: its tokenizer and its models.")
    parser.add_argument("--out", required=True, metavar="DIR",
                        help="folder for tokenizer.model, cclm.pt and uc2.pt; files of these names "
                             "in it are replaced (miniature: the shipped ones)")
    parser.add_argument("--model", choices=["cclm", "uc2"], help="only this one (default: both)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--steps", type=int, default=STEPS,
                        help=f"default: {STEPS}, the first {PHRASE_STEPS} with phrases alone; "
                             "0: random weights")
    args = parser.parse_args(argv)
    if min(args.steps, args.seed) < 0:
        parser.error("--steps and --seed must not be negative")
    names = [args.model] if args.model else ["cclm", "uc2"]
    build(names, args.seed, args.steps, args.out)


if __name__ == "__main__":
    evaluation.command(main)
