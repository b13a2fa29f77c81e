"""UC2 (Zhou et al. 2021, as IGLUE fine-tunes it): one stream of 12 XLM-R layers over a text
and the detected regions of an image.

    text    -> word + position + type 0 ------------------.
                                                          +-> 12 layers -> <s> -> pooler -> head
    regions -> features + locations (+ LayerNorms) + type 1 '

    head: answer (xGQA), label (XVNLI), match (xFlickrCO)

Paper section 3: the 12 layers are what scheduled unfreezing thaws (`UC2.layers`, bottom to top); embeddings (the
region projections among them), pooler and head always train. The image encoder is outside the model: regions are 36
boxes of a Faster R-CNN with a 2048-d feature each.

Sizes come from the checkpoint's shapes (`read_sizes`). Two pre-trained files exist, and both load
strictly; the naming tells which one it is:
- "volta": IGLUE's `uc2_checkpoint_200000.bin`, with the names of the VOLTA framework. ReLU after the pooler,
  LayerNorm eps 1e-5 everywhere. The public conversion put the original IMAGE LayerNorm into the text's place
  and left the image's own at identity (`image_norm_is_identity` sees the trace). IGLUE's results start from
  these weights, so they are taken as they are.
- "original": `model_step_200000.pt` of UC2's authors. tanh after the pooler, eps 1e-12 in the layers, both LayerNorms
  in their places.
Fine-tuned models are saved under VOLTA's names whichever file they started from; what no tensor tells (`UC2.config`)
is stored beside the tensors.

Letters: B texts, T text tokens, I images, V regions, F region feature width, D width.
"""

import re
import reprlib
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from model import (
    BERT_LAYER_NAMES,
    TextEmbeddings,
    TransformerLayer,
    check_file,
    copy_tensors,
    count_layers,
    in_float32,
    init_weights,
    key_mask,
    load_finetuned,
    rename,
    select,
    shape_of,
    size_of,
)

LABELS = ("contradiction", "neutral", "entailment")  # XVNLI, in the order of this model's class ids
EPS = 1e-5  # of all LayerNorms outside the layers
LAYER_EPS = {"volta": 1e-5, "original": 1e-12}
POOLER_ACTIVATION = {"volta": F.relu, "original": torch.tanh}
MARGIN = 0.2  # by which a matching pair must outscore a mismatch


@dataclass(frozen=True)
class Sizes:
    """Everything that tells one UC2 from another. `read_sizes` reads it off a checkpoint."""

    width: int
    vocabulary: int
    layers: int
    heads: int
    feed_forward: int
    positions: int
    types: int
    features: int
    locations: int
    labels: int = 1842  # xGQA's answers
    region_classes: int = 1601  # this one and the next belong to heads that only the pre-training files have
    region_words: int = 0
    variant: str = "volta"


class UC2(nn.Module):
    """The model for one task: "xgqa", "xvnli", "xflickrco", or "pretraining" (every head of the pre-trained file).

    An image is a set of regions: `features` [I,V,F] (float16 or float32), `locations` [I,V,7] and
    `region_mask` [I,V] (1 real, 0 padding).
    """

    def __init__(self, sizes, task, dropout=0.1):
        super().__init__()
        s = self.sizes = sizes
        self.task, self.variant = task, s.variant
        self.text_embeddings = TextEmbeddings(s.vocabulary, s.width, s.positions, s.types, EPS, dropout)
        self.region_embeddings = RegionEmbeddings(s.features, s.locations, s.width, dropout)
        self.layers = nn.ModuleList(TransformerLayer(s.width, s.heads, s.feed_forward, LAYER_EPS[s.variant], dropout)
                                    for _ in range(s.layers))
        self.pooler = nn.Linear(s.width, s.width)
        self.dropout = nn.Dropout(dropout)
        if task == "xgqa":
            self.answer_head = mlp_head(s.width, s.labels)
        if task == "xvnli":
            self.label_head = nn.Linear(s.width, len(LABELS))
        if task == "xflickrco":
            self.match_head = nn.Linear(s.width, 1)
        if task == "pretraining":
            self.itm_head = nn.Linear(s.width, 2)
            self.mlm_head = TiedHead(s.width, s.vocabulary)
            # from here on: never run, only there to account for every tensor of the file
            self.region_classes = mlp_head(s.width, s.region_classes)
            if s.variant == "original":
                self.region_words = mlp_head(s.width, s.region_words)
                self.region_regression = TiedHead(s.width, s.features)
                self.region_masking = nn.Embedding(2, s.features)
        self.apply(init_weights)

    # -- what the schedule, the optimizer and the loop ask for ---------------------------------------------------------

    @property
    def longest_text(self):
        """Most tokens of a text: XLM-R's first position is 2."""
        return self.sizes.positions - 2

    def group_of(self, name):
        """Group of a parameter that is in no layer of the schedule: "embeddings" or "head"; None for one in a layer."""
        if name.startswith("layers."):
            return None
        return "embeddings" if name.startswith(("text_embeddings.", "region_embeddings.")) else "head"

    def decays(self, name):
        """Whether weight decay applies: the reference's rule, substrings of the official name (so
        `image_layer_norm` and the like do decay).
        """
        official = self.checkpoint_names()[name]
        return not re.search(r"bias|LayerNorm\.weight", official)

    def forward(self, batch):
        """Training loss of one batch, a scalar: the mean over its questions, statements or captions."""
        return {"xgqa": self.answer_loss, "xvnli": self.label_loss, "xflickrco": self.retrieval_loss}[self.task](batch)

    # -- the stream ----------------------------------------------------------------------------------------------------

    def encode_images(self, batch):
        """features, locations, region_mask -> what a text needs of its image: (regions [I,V,D], region_mask [I,V])."""
        regions = self.region_embeddings(batch["features"], batch["locations"],
                                         self.text_embeddings.token_type.weight[1])
        return regions, batch["region_mask"]

    def image_memory(self, encoded_images):
        """What texts can share of their images, as `fuse` takes it."""
        return [encoded_images]

    def memory(self, batch):
        """`image_memory` of a batch's images."""
        return self.image_memory(self.encode_images(batch))

    def encode_texts(self, input_ids, attention_mask):
        """[B,T] -> text embeddings [B,T,D].

        Every layer of a single stream sees the image, so no more can be computed without one.
        """
        return self.text_embeddings(input_ids)

    def fuse(self, text_states, attention_mask, memory, first_token=False):
        """States of text and regions [B,T+V,D], or [B,1,D] of <s> alone.

        `memory` holds B images, or one that all texts share.
        """
        [(regions, region_mask)] = memory
        hidden = torch.cat([text_states, regions.expand(len(text_states), -1, -1)], dim=1)  # [B,T+V,D]
        mask = key_mask(torch.cat([attention_mask, region_mask.expand(len(text_states), -1)], dim=1))
        for i, layer in enumerate(self.layers):
            run = layer.first_token if first_token and i == len(self.layers) - 1 else layer
            hidden = run(hidden, mask)
        return hidden

    def pooled(self, hidden):
        """The state of <s> through the pooler: [B,1 or more,D] -> [B,D]."""
        return POOLER_ACTIVATION[self.variant](self.pooler(hidden[:, 0]))

    def logits(self, head, text_states, attention_mask, memory):
        """-> [B, outputs of the head]."""
        pooled = self.pooled(self.fuse(text_states, attention_mask, memory, first_token=True))
        return in_float32(head, self.dropout(pooled))

    def batch_logits(self, head, batch):
        """`logits` of a training batch: text b, or text text_index[b] if there is such an
        index, with image b, or image_index[b].
        """
        memory, attention_mask = self.memory(batch), batch["attention_mask"]
        text_states = self.encode_texts(batch["input_ids"], attention_mask)
        if "image_index" in batch:
            memory = select(memory, batch["image_index"])
        if "text_index" in batch:
            text_states, attention_mask = text_states[batch["text_index"]], attention_mask[batch["text_index"]]
        return self.logits(head, text_states, attention_mask, memory)

    # -- xGQA and XVNLI: classification --------------------------------------------------------------------------------

    def answer_loss(self, batch):
        """Binary cross-entropy of every answer, summed over answers, mean over questions.

        batch: features, locations, region_mask, input_ids [B,T], attention_mask [B,T], targets [B,answers] (score of
        each answer, all 0 where none is known) and, where questions share images, image_index [B].
        """
        return F.binary_cross_entropy_with_logits(self.batch_logits(self.answer_head, batch),
                                                  batch["targets"].float()) * self.sizes.labels

    def label_loss(self, batch):
        """Binary cross-entropy, mean over statements and labels.

        batch as for xGQA, targets [B,3] (one-hot in the order of LABELS, all 0 for "-").
        """
        return F.binary_cross_entropy_with_logits(self.batch_logits(self.label_head, batch), batch["targets"].float())

    def label_logits(self, text_states, attention_mask, memory):
        """-> [B,answers] (xGQA) or [B,3] (XVNLI)."""
        return self.logits(self.answer_head if self.task == "xgqa" else self.label_head, text_states,
                           attention_mask, memory)

    def predict(self, text_states, attention_mask, memory):
        """Index of the likeliest answer or label: [B]."""
        return self.label_logits(text_states, attention_mask, memory).argmax(1)

    # -- xFlickrCO: matching -------------------------------------------------------------------------------------------

    def retrieval_loss(self, batch):
        """Triplet loss on sigmoid scores: a matching pair should outscore each of three mismatches by MARGIN.

        Mean over captions and mismatches.

        batch: features, locations, region_mask of I distinct images; input_ids, attention_mask of C distinct captions;
        for every training caption four pairs in a row, the matching one first: image_index [4B] and text_index [4B].
        What several pairs share is embedded once (and shares its dropout there, which the reference draws per pair).
        """
        scores = self.batch_logits(self.match_head, batch).sigmoid().view(-1, 4)
        return (MARGIN + scores[:, 1:] - scores[:, :1]).clamp(min=0).mean()

    def match_scores(self, text_states, attention_mask, memory):
        """How well text and image match, for ranking: [B]."""
        return self.logits(self.match_head, text_states, attention_mask, memory)[:, 0]

    # -- pre-training --------------------------------------------------------------------------------------------------

    def itm_logits(self, hidden):
        """[B,T+V,D] -> [B,2]; column 1 says that text and image belong together."""
        return self.itm_head(self.pooled(hidden))

    def mlm_logits(self, hidden):
        """[...,D] -> [...,vocabulary]. The output matrix is the word embedding."""
        return self.mlm_head(hidden, self.text_embeddings.word.weight)

    # -- names in the official checkpoints -----------------------------------------------------------------------------

    @property
    def naming(self):
        """Names in this model's own files: the original ones only for the original pre-trained file."""
        return "original" if self.task == "pretraining" and self.variant == "original" else "volta"

    def checkpoint_names(self):
        """Our parameter name -> its name in the official file."""
        if not hasattr(self, "_checkpoint_names"):
            self._checkpoint_names = official_names(self, self.naming)
        return self._checkpoint_names

    def aliases(self):
        """Second names under which the official file stores the same tensor: alias -> first name."""
        if self.naming == "original":
            return {"cls.decoder.weight": "roberta.embeddings.word_embeddings.weight", "cls.decoder.bias": "cls.bias",
                    "vis_cls.bias": "vis_cls.decoder.bias",
                    "feat_regress.weight": "roberta.img_embeddings.img_linear.weight"}
        # VOLTA has names for a second, visual stream throughout; in UC2 it is the same stream
        layers = [name for name in self.checkpoint_names().values() if name.startswith("bert.encoder.")]
        aliases = {re.sub(r"\.(query|key|value|dense|LayerNorm)\.", r".v_\1.", name): name for name in layers}
        token_types = "bert.embeddings.new_token_type_embeddings.weight"
        aliases["bert.embeddings.image_token_type_embeddings.weight"] = token_types
        if self.task == "pretraining":
            aliases["cls.predictions.decoder.weight"] = "bert.embeddings.word_embeddings.weight"
        return aliases

    def constants(self):
        """Neither file stores anything that is not a parameter."""
        return {}

    def config(self):
        """What a file must hold beside the tensors, because no shape tells it: `read_sizes` asks for it."""
        return {"heads": self.sizes.heads, "variant": self.variant}


class RegionEmbeddings(nn.Module):
    """LayerNorm(feature projection) + LayerNorm(location projection) + token type 1, LayerNorm, dropout.

    Regions have no order, hence no position.
    """

    def __init__(self, features, locations, width, dropout):
        super().__init__()
        self.feature, self.feature_norm = nn.Linear(features, width), nn.LayerNorm(width, eps=EPS)
        self.location, self.location_norm = nn.Linear(locations, width), nn.LayerNorm(width, eps=EPS)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features, locations, token_type):
        """features [I,V,F], locations [I,V,7] (x1 y1 x2 y2 w h area, as shares of the
        image), token_type [D] -> [I,V,D].
        """
        dtype = self.feature.weight.dtype  # features are stored and travel as float16
        appearance = self.feature_norm(self.feature(features.to(dtype)))
        place = self.location_norm(self.location(locations.to(dtype)))
        return self.dropout(self.norm(appearance + place + token_type))


def mlp_head(width, outputs):
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=EPS), nn.Linear(width, outputs))


class TiedHead(nn.Module):
    """Pre-training only: an MLP head whose output matrix belongs to an embedding."""

    def __init__(self, width, outputs):
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=EPS)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, hidden, matrix):
        return F.linear(self.norm(F.gelu(self.dense(hidden))), matrix, self.bias)


# ---------------------------------------------------------------------------------------------------------------------
# The official checkpoints


def sublayer(offset, rest):
    """VOLTA counts attention and feed-forward as layers of their own: those of our layer i are 2i and 2i + 1."""
    return lambda match: f"bert.encoder.layer.{2 * int(match[1]) + offset}.{match.expand(rest)}"


# our name, the name in IGLUE's (VOLTA) file, the name in the original file
BOTH_NAMES = [
    (r"^layers\.(\d+)\.attention\.(self|output)\.", sublayer(0, r"attention_\2."),
     r"roberta.encoder.layer.\1.attention.\2."),
    (r"^layers\.(\d+)\.", sublayer(1, ""), r"roberta.encoder.layer.\1."),
    (r"^text_embeddings\.(word|position)\.", r"bert.embeddings.\1_embeddings.", r"roberta.embeddings.\1_embeddings."),
    (r"^text_embeddings\.token_type\.", "bert.embeddings.new_token_type_embeddings.",
     "roberta.embeddings.new_token_type_embeddings."),
    (r"^text_embeddings\.norm\.", "bert.embeddings.LayerNorm.", "roberta.embeddings.LayerNorm."),
    (r"^region_embeddings\.feature\.", "bert.embeddings.image_embeddings.", "roberta.img_embeddings.img_linear."),
    (r"^region_embeddings\.feature_norm\.", "bert.embeddings.image_layer_norm.",
     "roberta.img_embeddings.img_layer_norm."),
    (r"^region_embeddings\.location\.", "bert.embeddings.image_location_embeddings.",
     "roberta.img_embeddings.pos_linear."),
    (r"^region_embeddings\.location_norm\.", "bert.embeddings.image_location_layer_norm.",
     "roberta.img_embeddings.pos_layer_norm."),
    (r"^region_embeddings\.norm\.", "bert.embeddings.v_LayerNorm.", "roberta.img_embeddings.LayerNorm."),
    (r"^pooler\.", "bert.t_pooler.dense.", "roberta.pooler.dense."),
    (r"^itm_head\.", "cls.bi_seq_relationship.", "itm_output."),
    (r"^mlm_head\.bias", "cls.predictions.bias", "cls.bias"),
    (r"^mlm_head\.dense\.", "cls.predictions.transform.dense.", "cls.dense."),
    (r"^mlm_head\.norm\.", "cls.predictions.transform.LayerNorm.", "cls.layer_norm."),
    (r"^region_classes\.0\.", "cls.imagePredictions.transform.dense.", "region_classifier.net.0."),
    (r"^region_classes\.2\.", "cls.imagePredictions.transform.LayerNorm.", "region_classifier.net.2."),
    (r"^region_classes\.3\.", "cls.imagePredictions.decoder_dict.0.", "region_classifier.net.3."),
]
OFFICIAL_NAMES = {
    "volta": BERT_LAYER_NAMES + [(ours, volta) for ours, volta, _ in BOTH_NAMES] + [
        (r"^answer_head\.", "clfs_dict.TASK15.logit_fc."),
        (r"^label_head\.", "clfs_dict.TASK19."),
        (r"^match_head\.", "clfs_dict.TASK8."),
    ],
    "original": BERT_LAYER_NAMES + [(ours, original) for ours, _, original in BOTH_NAMES] + [
        (r"^region_words\.0\.", "vis_cls.dense."),
        (r"^region_words\.2\.", "vis_cls.layer_norm."),
        (r"^region_words\.3\.", "vis_cls.decoder."),
        (r"^region_regression\.bias", "feat_regress.bias"),
        (r"^region_regression\.dense\.", "feat_regress.net.0."),
        (r"^region_regression\.norm\.", "feat_regress.net.2."),
        (r"^region_masking\.", "roberta.img_embeddings.mask_embedding."),
    ],
}


def official_names(model, naming):
    return {name: rename(name, OFFICIAL_NAMES[naming]) for name, _ in model.named_parameters()}


def read_sizes(tensors, config, source):
    """Sizes of the UC2 in a checkpoint, from its names and shapes.

    Heads are 64 wide unless the file's config says otherwise.
    """
    naming = "original" if any(name.startswith("roberta.") for name in tensors) else "volta"
    variant = config.get("variant", naming)
    if variant not in list(LAYER_EPS):
        raise ValueError(f"{source}: the config's variant is {reprlib.repr(variant)}, expected one of "
                         f"{', '.join(LAYER_EPS)}")

    def shape(name):
        official = rename(name, OFFICIAL_NAMES[naming])
        return shape_of(tensors, official, 2, source, "UC2")

    vocabulary, width = shape("text_embeddings.word.weight")
    sizes = Sizes(
        width=width, vocabulary=vocabulary,
        layers=count_layers(tensors, "roberta.encoder.layer.") if naming == "original"
        else count_layers(tensors, "bert.encoder.layer.") // 2,
        heads=size_of(config, "heads", max(1, width // 64), source, width), feed_forward=shape("layers.0.up.weight")[0],
        positions=shape("text_embeddings.position.weight")[0], types=shape("text_embeddings.token_type.weight")[0],
        features=shape("region_embeddings.feature.weight")[1], locations=shape("region_embeddings.location.weight")[1],
        variant=variant)
    if naming == "original":
        return replace(sizes, region_classes=shape("region_classes.3.weight")[0],
                       region_words=shape("region_words.3.weight")[0])
    if "cls.imagePredictions.decoder_dict.0.weight" in tensors:
        sizes = replace(sizes, region_classes=shape("region_classes.3.weight")[0])
    if "clfs_dict.TASK15.logit_fc.3.weight" in tensors:
        sizes = replace(sizes, labels=shape("answer_head.3.weight")[0])
    return sizes


def from_pretrained(tensors, config, task, source, num_labels=1842, **options):
    """UC2 for `task` from one of the two pre-trained files; `options` go to the constructor,
    `num_labels` is the number of xGQA's answers.

    The file must be exactly one of them: all of its tensors, with the right shapes, and no other. The pre-training
    heads are left out, the task's head keeps its initialisation. Which file it was decides the model's `variant`.
    Raises ValueError, one line, for any other file.
    """
    sizes = read_sizes(tensors, config, source)
    with torch.device("meta"):  # shapes only
        whole = UC2(sizes, "pretraining")
    check_file(whole, tensors, source)
    model = UC2(replace(sizes, labels=num_labels), task, **options)
    names = {ours: theirs for ours, theirs in official_names(model, whole.naming).items() if theirs in tensors}
    copy_tensors(model, tensors, names)
    return model


def from_finetuned(tensors, config, task, source, **options):
    """UC2 from a file that holds the fine-tuned model of this very task (ours or IGLUE's).

    Raises ValueError for any other file.
    """
    sizes = read_sizes(tensors, config, source)
    return load_finetuned(lambda: UC2(sizes, task, **options), tensors, source)


def image_norm_is_identity(tensors):
    """Whether the image LayerNorm of a VOLTA file is untrained, the trace of the conversion
    that put its values into the text's place.
    """
    weight, bias = (tensors.get(f"bert.embeddings.v_LayerNorm.{part}") for part in ("weight", "bias"))
    return weight is not None and bias is not None and bool((weight == 1).all() and (bias == 0).all())
