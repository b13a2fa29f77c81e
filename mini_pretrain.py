"""Pre-training of the miniature's tiny CCLM and UC2: what the released checkpoints bring, in minutes on a CPU.

Both models are the ordinary classes of cclm.py and uc2.py, only small, with every head of the released checkpoints.
What they learn here stands for what those know: words grounded in images, and languages aligned with each other.

    image-text matching   is the sentence true of the scene? Whole sentences, and phrases about single objects
    masked words          with the image in view
    contrast of texts     CCLM: a sentence and its translation, before any image is seen
    contrast of phrases   CCLM: a phrase and the patch it describes
    fused contrast        the <s> of a sentence and of its translation, both seen with the same image, are pulled
                          together, and away from other sentences about that image; CCLM: the means of all states too

The last one is in neither paper. Without it there is little transfer to protect: the upper layers read sentences of
different languages differently, and fine-tuned on xGQA the models reach 27 % (CCLM) and 15 % (UC2) in the other
languages, 33 and 17 % with SUF. Phrases come first ("curriculum"), because grounding whole sentences from nothing takes
several times as long.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import cclm
import data
import mini_languages
import mini_world
import uc2
from model import select

ATTRIBUTES = ("size", "colour", "shape", "side")  # of an object
TEMPERATURE = 0.1  # of the fused contrast, and of the phrases'
SHARE_MASKED = 0.3  # of a text's pieces
PAIRS_PER_SCENE = 4


@dataclass(frozen=True)
class Pretraining:
    """Sizes of the two models that go with a world, and how they are pre-trained."""

    width: int = 64
    heads: int = 4
    feed_forward: int = 128
    text_layers: int = 4  # CCLM
    cross_layers: int = 2
    vision_layers: int = 2
    uc2_layers: int = 4
    pieces: int = 240  # of the tokenizer
    positions: int = 98
    scenes: int = 10_000
    sentences: int = 60_000  # statements, phrases, and pairs of translations: so many of each
    batch_size: int = 32
    steps: int = 4000
    phrase_steps: int = 1200  # at first phrases alone, later in a quarter of the steps
    vision_steps: int = 250
    lr: float = 2e-3
    fine_tuning_batch: int = 64


PRETRAINING = {  # by size of the world
    "small": Pretraining(),
    "medium": Pretraining(width=128, feed_forward=512, text_layers=6, cross_layers=3, vision_layers=3, uc2_layers=8,
                          pieces=320, sentences=120_000, steps=5000, lr=1e-3),
    "large": Pretraining(width=256, feed_forward=1024, text_layers=12, cross_layers=6, vision_layers=6, uc2_layers=12,
                         pieces=400, sentences=500_000, batch_size=128, steps=20_000, phrase_steps=2000, lr=5e-4,
                         fine_tuning_batch=256),
}


def new_model(name, size, vocabulary):
    """CCLM or UC2 with random weights, sized for a world."""
    p, world = PRETRAINING[size], mini_world.WORLD_SIZES[size]
    if name == "cclm":
        sizes = cclm.Sizes(
            width=p.width, vocabulary=vocabulary, text_layers=p.text_layers, cross_layers=p.cross_layers,
            text_heads=p.heads, cross_heads=p.heads, text_feed_forward=p.feed_forward,
            cross_feed_forward=p.feed_forward, text_positions=p.positions, text_types=1, vision_width=p.width,
            vision_layers=p.vision_layers, vision_heads=p.heads, vision_feed_forward=p.feed_forward,
            patch_size=world.cell, image_size=world.image_size, embed_dim=p.width // 2, decoder_positions=16)
        model = cclm.CCLM(sizes, "pretraining", dropout=0.0, drop_path=0.0)
    else:
        sizes = uc2.Sizes(width=p.width, vocabulary=vocabulary, layers=p.uc2_layers, heads=p.heads,
                          feed_forward=p.feed_forward, positions=p.positions, types=2,
                          features=mini_world.FEATURE_WIDTH, locations=7, region_classes=1)
        model = uc2.UC2(sizes, "pretraining", dropout=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # the models' standard deviation of 0.02 belongs to a width of 768
                parameter.mul_((768 / p.width) ** 0.5)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Data


@dataclass
class Texts:
    """Sentences or phrases: token rows, the scene of each, and whether it is true of that scene."""

    rows: data.Ragged
    scenes: np.ndarray
    truths: np.ndarray
    things: np.ndarray  # of phrases: which object of the scene they are about
    languages: list


@dataclass
class Corpus:
    pictures: dict  # of all scenes, as `encode_images` takes them
    spots: np.ndarray  # [scenes, objects]: patch (CCLM) or region (UC2) of each object, -1 beyond the last
    classes: np.ndarray  # [scenes, objects, 4]: its ATTRIBUTES as numbers
    statements: Texts
    phrases: Texts
    english: data.Ragged  # sentence i …
    translations: data.Ragged  # … and its translation
    pair_scenes: np.ndarray  # PAIRS_PER_SCENE in a row are about one scene


def make_corpus(name, size, tokenizer, scenes, sentences, seed):
    """`scenes` random scenes, and `sentences` each of statements, phrases and translations about them."""
    world, rng = mini_world.WORLD_SIZES[size], np.random.default_rng([seed, 10])
    drawn = mini_world.draw_scenes(scenes, world, rng)

    def tokens(texts):  # CCLM reads every text without punctuation, UC2 reads it as it is
        return tokenizer([data.clean_caption(text, None) for text in texts] if name == "cclm" else texts)

    def texts(items):
        languages = [item.language for item in items]
        things = np.array([-1 if item.thing is None else item.thing for item in items])
        return Texts(tokens([item.text for item in items]), np.array([item.scene for item in items]),
                     np.array([item.truth for item in items], np.int64), things, languages)

    spots = np.full((scenes, world.objects[1]), -1)
    classes = np.zeros((*spots.shape, len(ATTRIBUTES)), np.int64)
    for i, scene in enumerate(drawn):
        for k, thing in enumerate(scene):
            spots[i, k] = thing.row * world.grid + thing.column
            classes[i, k] = [mini_languages.ATTRIBUTES[name].index(getattr(thing, name)) for name in ATTRIBUTES]
    if name == "cclm":
        pictures = {"images": torch.from_numpy(mini_world.draw_images(drawn, world, rng))
                    .permute(0, 3, 1, 2).contiguous()}
    else:
        regions = mini_world.detect_regions(drawn, world, rng)
        spots = regions.slots
        locations = data.locations(regions.boxes, np.full((scenes, 2), world.image_size, np.int32))
        pictures = {"features": torch.from_numpy(regions.features), "locations": torch.from_numpy(locations),
                    "region_mask": torch.ones(scenes, world.boxes, dtype=torch.long)}
    pairs = mini_world.parallel_pairs(drawn, sentences, world, seed, per_scene=PAIRS_PER_SCENE)
    return Corpus(pictures, spots, classes, texts(mini_world.pretraining_statements(drawn, sentences, world, seed)),
                  texts(mini_world.pretraining_phrases(drawn, sentences, world, seed)),
                  tokens([pair.english for pair in pairs]), tokens([pair.text for pair in pairs]),
                  np.array([pair.scene for pair in pairs]))


def encode(model, corpus, scenes, device):
    """The images of `scenes` through the image encoder, each once. -> (encoded images, each scene's row in them)."""
    distinct, rows = np.unique(scenes, return_inverse=True)
    pictures = {name: tensor[distinct].to(device) for name, tensor in corpus.pictures.items()}
    return model.encode_images(pictures), torch.from_numpy(rows).to(device)


def spot_memory(model, encoded, rows, spots):
    """Memory of which only one patch or region of each image is left."""
    if isinstance(model, cclm.CCLM):
        return model.image_memory(encoded[rows, 1 + spots][:, None])
    regions, mask = encoded
    return model.image_memory((regions[rows, spots][:, None], mask[rows, spots][:, None]))


def padded(rows, device):
    return tuple(tensor.to(device) for tensor in data.pad(rows))


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def matching_logits(model, hidden):
    return model.itm_head(hidden[:, 0]) if isinstance(model, cclm.CCLM) else model.itm_logits(hidden)


def masked_word_logits(model, hidden):
    return model.mlm_head(hidden) if isinstance(model, cclm.CCLM) else model.mlm_logits(hidden)


def contrast(a, b):
    """InfoNCE in both directions: row i of `a` belongs to row i of `b`. [N,D] each -> scalar."""
    similarity = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / TEMPERATURE
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


def pretraining_loss(model, corpus, p, tokenizer, rng, step, device):
    """One batch of everything in one pass through the encoders. -> (loss, share of right matching decisions).

    In a step about phrases, the texts that are matched and those that lose words are phrases, and see one object each.
    """
    phrases_only, n = step < p.phrase_steps, p.batch_size  # at first, no sentences at all
    of_phrases = phrases_only or step % 4 == 0
    source = corpus.phrases if of_phrases else corpus.statements
    asked = rng.integers(len(source.rows), size=n)
    blanked = rng.choice(np.flatnonzero(source.truths), size=n)
    groups = rng.integers(len(corpus.english) // PAIRS_PER_SCENE, size=0 if phrases_only else n // PAIRS_PER_SCENE)
    pairs = (groups[:, None] * PAIRS_PER_SCENE + np.arange(PAIRS_PER_SCENE)).ravel()
    single = np.concatenate([asked, blanked])
    texts = [source.rows[i] for i in single]
    texts += [corpus.english[i] for i in pairs] + [corpus.translations[i] for i in pairs]
    scenes = np.concatenate([source.scenes[single], np.tile(corpus.pair_scenes[pairs], 2)])
    input_ids, attention_mask = padded(texts, device)
    hide = torch.from_numpy(rng.random(input_ids.shape) < SHARE_MASKED).to(device) & (input_ids > data.UNK)
    hide[:n] = hide[2 * n :] = False
    encoded, rows = encode(model, corpus, scenes, device)
    states = model.encode_texts(input_ids.masked_fill(hide, tokenizer.mask), attention_mask)
    memory = select(model.image_memory(encoded), rows)
    if of_phrases:
        spots = torch.from_numpy(corpus.spots[source.scenes[single], source.things[single]]).to(device)
        seen = spot_memory(model, encoded, rows[: 2 * n], spots)
    else:
        seen = select(memory, slice(2 * n))
    hidden = model.fuse(states[: 2 * n], attention_mask[: 2 * n], seen)
    truths = torch.from_numpy(source.truths[asked]).to(device)
    matching = matching_logits(model, hidden[:n])
    words = hidden[:, : input_ids.shape[1]][hide[: 2 * n]]
    loss = F.cross_entropy(matching, truths) + F.cross_entropy(masked_word_logits(model, words), input_ids[hide])
    if of_phrases and isinstance(model, cclm.CCLM):
        true = truths.bool()
        patches = encoded[rows[:n], 1 + spots[:n]]
        loss = loss + contrast(model.text_proj(states[:n, 0][true]), model.vision_proj(patches[true]))
    if not phrases_only:
        fused = model.fuse(states[2 * n :], attention_mask[2 * n :], select(memory, slice(2 * n, None)))
        loss = loss + contrast(*fused[:, 0].split(n))
        if isinstance(model, cclm.CCLM):
            loss = loss + contrast(*model.text_proj(states[2 * n :, 0]).split(n))
            real = attention_mask[2 * n :, :, None]  # the answer decoder reads all states, not <s> alone
            loss = loss + contrast(*((fused * real).sum(1) / real.sum(1)).split(n))
    return loss, (matching.argmax(1) == truths).float().mean()


# ---------------------------------------------------------------------------------------------------------------------
# Loops


def warm_up_vision(model, corpus, p, rng, device):
    """CCLM's image encoder learns to name the object in each patch: it stands for BEiT's own pre-training."""
    kinds = corpus.classes.reshape(-1, len(ATTRIBUTES)).max(0) + 1
    heads = nn.ModuleList(nn.Linear(p.width, int(kind)) for kind in kinds).to(device)
    parameters = [*model.vision.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=p.lr, weight_decay=0.01)
    images = model.vision.image_size
    for _ in tqdm(range(p.vision_steps), desc=f"image encoder, {images}x{images}", unit="step", dynamic_ncols=True):
        scenes = rng.integers(len(corpus.spots), size=2 * p.batch_size)
        states, _ = encode(model, corpus, scenes, device)
        distinct = np.unique(scenes)
        row, thing = np.nonzero(corpus.spots[distinct] >= 0)
        states = states[row, 1 + corpus.spots[distinct][row, thing]]
        classes = torch.from_numpy(corpus.classes[distinct][row, thing]).to(device)
        loss = sum(F.cross_entropy(head(states), classes[:, i]) for i, head in enumerate(heads))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def pretrain(name, size, tokenizer, seed, steps, device=torch.device("cpu")):
    """-> (the pre-trained model, matching accuracy on new statements by language). On a CPU the same every time.

    With 0 steps the weights stay random: the "from scratch" baseline.
    """
    torch.manual_seed(seed)
    model = new_model(name, size, tokenizer.vocabulary).to(device)
    if steps:
        run_steps(model, name, size, tokenizer, seed, steps, device)
    p = PRETRAINING[size]
    unseen = make_corpus(name, size, tokenizer, p.scenes // 10, p.sentences // 10, seed + 1000)
    return model, matching_accuracy(model, unseen, device)


def run_steps(model, name, size, tokenizer, seed, steps, device):
    p, rng = PRETRAINING[size], np.random.default_rng([seed, 11])
    print(f"{name}: writing {p.sentences:,} statements, phrases and translations about {p.scenes:,} scenes", flush=True)
    corpus = make_corpus(name, size, tokenizer, p.scenes, p.sentences, seed)
    model.train()
    if name == "cclm":
        warm_up_vision(model, corpus, p, rng, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=p.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    cycle = max(steps, 40)  # a shorter one has no whole step of warm-up
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, p.lr, cycle, pct_start=0.05, cycle_momentum=False,
                                               final_div_factor=2)
    matched = 0.5
    with tqdm(range(steps), desc=f"{name}, matching", unit="step", dynamic_ncols=True) as bar:
        for step in bar:
            loss, right = pretraining_loss(model, corpus, p, tokenizer, rng, step, device)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            matched += (right.item() - matched) / 50
            bar.set_postfix_str(f"loss {loss.item():.2f}, matched {matched:.0%}", refresh=False)


@torch.no_grad()
def matching_accuracy(model, corpus, device):
    """Share of statements whose truth the model tells, by language."""
    model.eval()
    statements, right = corpus.statements, defaultdict(list)
    for index in np.split(np.arange(len(statements.rows)), range(500, len(statements.rows), 500)):
        input_ids, attention_mask = padded([statements.rows[i] for i in index], device)
        encoded, rows = encode(model, corpus, statements.scenes[index], device)
        hidden = model.fuse(model.encode_texts(input_ids, attention_mask), attention_mask,
                            select(model.image_memory(encoded), rows))
        said = matching_logits(model, hidden).argmax(1).tolist()
        for i, answer in zip(index, said):
            right[statements.languages[i]].append(answer == statements.truths[i])
    return {language: sum(found) / len(found) for language, found in right.items()}
