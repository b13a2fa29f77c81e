"""UC2 (Zhou et al. 2021, as IGLUE fine-tunes it): one stream of 12 XLM-R layers over a text and the
detected regions of an image.

    text    -> word + position + type 0 -----------------.
                                                         +-> 12 layers -> <s> -> pooler -> head
    regions -> features + locations (LayerNorms) + type 1 '

    head: answer (xGQA), label (XVNLI), match (xFlickrCO)

Paper, section 3: the 12 layers are what scheduled unfreezing thaws (`UC2.layers`, bottom to top);
embeddings (the region projections among them), pooler and head always train. The image encoder is
outside the model: regions are 36 boxes of a Faster R-CNN with a 2048-d feature each.

Sizes come from the checkpoint's shapes (`read_sizes`); tensors are loaded and saved, strictly,
under the names of IGLUE's `uc2_checkpoint_200000.bin` (its framework is VOLTA). Two variants:
- "volta", IGLUE's file: ReLU after the pooler, LayerNorm eps 1e-5 everywhere. The public conversion
  put the original IMAGE LayerNorm into the text's place and left the image's own at identity.
  IGLUE's results start from these weights, so they are taken as they are.
- "original", the file of UC2's authors, as `tools/uc2_original.py` renames it: tanh after the
  pooler, eps 1e-12 in the layers, both LayerNorms in their places.

Letters: B texts or pairs, C captions, T text tokens, I images, V regions, F region feature width,
D width.
"""

import re
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import Dropout, LayerNorm, Linear, Parameter
from torch.nn import functional as F

from model import BERT_LAYER_NAMES, TextEmbeddings, TransformerLayer, count_layers, in_float32
from model import init_weights, key_mask, load, rename, select, shape_of

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
    region_classes: int = 1601  # of a head that only the pre-training file has
    variant: str = "volta"


class UC2(nn.Module):
    """The model for one task: "xgqa", "xvnli", "xflickrco", or "pretraining" (all its heads).

    An image is a set of regions: features [I,V,F] (float16 or float32), locations [I,V,7] and
    region_mask [I,V] (1 real, 0 padding).
    """

    def __init__(self, sizes, task, dropout=0.1, drop_path=None):
        """drop_path is CCLM's; nothing here has it."""
        super().__init__()
        s = self.sizes = sizes
        self.task = task
        self.variant = s.variant
        self.text_embeddings = TextEmbeddings(
            s.vocabulary, s.width, s.positions, s.types, EPS, dropout)
        self.region_embeddings = RegionEmbeddings(s.features, s.locations, s.width, dropout)
        self.layers = nn.ModuleList()
        eps = LAYER_EPS[s.variant]
        for _ in range(s.layers):
            layer = TransformerLayer(s.width, s.heads, s.feed_forward, eps, dropout)
            self.layers.append(layer)
        # the task's head on top of the pooled <s>
        self.pooler = Linear(s.width, s.width)
        self.dropout = Dropout(dropout)
        if task == "xgqa":
            self.answer_head = mlp_head(s.width, s.labels)
        if task == "xvnli":
            self.label_head = Linear(s.width, len(LABELS))
        if task == "xflickrco":
            self.match_head = Linear(s.width, 1)
        if task == "pretraining":
            self.itm_head = Linear(s.width, 2)
            self.mlm_head = TiedHead(s.width, s.vocabulary)
            # never run, only there to account for every tensor of the file
            self.region_classes = mlp_head(s.width, s.region_classes)
        self.apply(init_weights)

    # -- what the schedule, the optimizer and the loop ask for -------------------------------------

    @property
    def longest_text(self):
        """Most tokens of a text: XLM-R's first position is 2."""
        return self.sizes.positions - 2

    def group_of(self, name):
        """Group of a parameter outside the layers: "embeddings" or "head"; None for one in them."""
        if name.startswith("layers."):
            return None
        if name.startswith(("text_embeddings.", "region_embeddings.")):
            return "embeddings"
        return "head"

    def decays(self, name):
        """Whether weight decay applies: the reference's rule, parts of the official name."""
        return not re.search(r"bias|LayerNorm\.weight", official_name(name))

    def forward(self, batch):
        """Training loss of one batch: the mean over its questions, statements or captions."""
        if self.task == "xflickrco":
            return self.retrieval_loss(batch)
        return self.class_loss(batch)

    # -- the stream --------------------------------------------------------------------------------

    def encode_images(self, batch):
        """features, locations, region_mask -> what a text needs of its image.

        A pair: regions [I,V,D] and region_mask [I,V].
        """
        token_type = self.text_embeddings.token_type.weight[1]
        regions = self.region_embeddings(batch["features"], batch["locations"], token_type)
        return regions, batch["region_mask"]

    def image_memory(self, encoded_images):
        """In the form that `select` and `fuse` take: a list of one pair (CCLM: one per layer)."""
        return [encoded_images]

    def memory(self, batch):
        """`image_memory` of a batch's images."""
        return self.image_memory(self.encode_images(batch))

    def encode_texts(self, input_ids, attention_mask):
        """[B,T] -> text embeddings [B,T,D]: every layer sees the image, so none can be run yet.

        attention_mask: for CCLM alone, which runs layers here.
        """
        return self.text_embeddings(input_ids)

    def fuse(self, text_states, attention_mask, memory, first_token=False):
        """States of text and regions [B,T+V,D], or [B,1,D] of <s> alone.

        memory: of B images, or of one that all texts share.
        """
        # the stream: text tokens first, then regions; one image for all texts is repeated
        [(regions, region_mask)] = memory
        texts = len(text_states)
        regions = regions.expand(texts, -1, -1)
        region_mask = region_mask.expand(texts, -1)
        hidden = torch.cat([text_states, regions], dim=1)  # [B,T+V,D]
        # every position attends to every real one, of either kind
        mask = key_mask(torch.cat([attention_mask, region_mask], dim=1))
        # a classifier on <s> needs nothing else of the last layer
        last = self.layers[-1]
        for layer in self.layers:
            hidden = layer(hidden, mask, first_token=first_token and layer is last)
        return hidden

    def pooled(self, hidden):
        """The state of <s> through the pooler: [B,1 or more,D] -> [B,D]."""
        return POOLER_ACTIVATION[self.variant](self.pooler(hidden[:, 0]))

    def logits(self, head, text_states, attention_mask, memory):
        """-> [B, outputs of the head]."""
        hidden = self.fuse(text_states, attention_mask, memory, first_token=True)
        return in_float32(head, self.dropout(self.pooled(hidden)))

    def batch_logits(self, head, batch):
        """`logits` of a training batch.

        Text b, or text_index[b] if there is such an index, with image b, or image_index[b].
        """
        # what texts or pairs share is embedded once …
        memory = self.memory(batch)
        attention_mask = batch["attention_mask"]
        text_states = self.encode_texts(batch["input_ids"], attention_mask)
        # … and then put together
        if "image_index" in batch:
            memory = select(memory, batch["image_index"])
        if "text_index" in batch:
            text_states = text_states[batch["text_index"]]
            attention_mask = attention_mask[batch["text_index"]]
        return self.logits(head, text_states, attention_mask, memory)

    # -- xGQA and XVNLI: classification ------------------------------------------------------------

    def class_loss(self, batch):
        """Binary cross-entropy of every answer or label: xGQA's summed over answers, XVNLI's mean
        over labels; mean over questions or statements.

        batch: features, locations, region_mask, input_ids [B,T], attention_mask [B,T], targets
        [B,answers] or [B,3] (1 at every right one, all 0 where none is known) and, where questions
        share images, image_index [B].
        """
        logits = self.batch_logits(self.class_head, batch)
        loss = F.binary_cross_entropy_with_logits(logits, batch["targets"].float())
        return loss * self.sizes.labels if self.task == "xgqa" else loss

    def label_logits(self, text_states, attention_mask, memory):
        """-> [B,answers] (xGQA) or [B,3] (XVNLI)."""
        return self.logits(self.class_head, text_states, attention_mask, memory)

    @property
    def class_head(self):
        return self.answer_head if self.task == "xgqa" else self.label_head

    def predict(self, text_states, attention_mask, memory):
        """Index of the likeliest answer or label: [B]."""
        return self.label_logits(text_states, attention_mask, memory).argmax(1)

    # -- xFlickrCO: matching -----------------------------------------------------------------------

    def retrieval_loss(self, batch):
        """Triplet loss on sigmoid scores: a match should outscore three mismatches by MARGIN.

        Mean over captions and mismatches. batch: features, locations, region_mask of I distinct
        images; input_ids, attention_mask of C distinct captions; for every training caption four
        pairs in a row, the matching one first: image_index [4B] and text_index [4B]. What several
        pairs share is embedded once (and shares its dropout there, which the reference draws per
        pair).
        """
        scores = self.batch_logits(self.match_head, batch).sigmoid().view(-1, 4)
        # the first of each four is the match
        return (MARGIN + scores[:, 1:] - scores[:, :1]).clamp(min=0).mean()

    def match_scores(self, text_states, attention_mask, memory):
        """How well text and image match, for ranking: [B]."""
        return self.logits(self.match_head, text_states, attention_mask, memory)[:, 0]

    # -- pre-training ------------------------------------------------------------------------------

    def itm_logits(self, hidden):
        """[B,T+V,D] -> [B,2]; column 1 says that text and image belong together."""
        return self.itm_head(self.pooled(hidden))

    def mlm_logits(self, hidden):
        """[...,D] -> [...,vocabulary]. The output matrix is the word embedding."""
        return self.mlm_head(hidden, self.text_embeddings.word.weight)

    # -- names in the official checkpoints ---------------------------------------------------------

    def checkpoint_names(self):
        """Our parameter name -> its name in IGLUE's file."""
        return {name: official_name(name) for name, _ in self.named_parameters()}

    def aliases(self):
        """Second names of the same tensor in IGLUE's file: alias -> first name."""
        aliases = {"bert.embeddings.image_token_type_embeddings.weight":
                   "bert.embeddings.new_token_type_embeddings.weight"}
        # VOLTA has names for a second, visual stream (v_query, …); in UC2 it is the same stream
        for name in self.checkpoint_names().values():
            if name.startswith("bert.encoder."):
                alias = re.sub(r"\.(query|key|value|dense|LayerNorm)\.", r".v_\1.", name)
                aliases[alias] = name
        if self.task == "pretraining":
            aliases["cls.predictions.decoder.weight"] = "bert.embeddings.word_embeddings.weight"
        return aliases

    def constants(self):
        """The file stores nothing that is not a parameter."""
        return {}

    def config(self):
        """What a file must hold beside the tensors, because no shape tells it."""
        return {"heads": self.sizes.heads, "variant": self.variant}


class RegionEmbeddings(nn.Module):
    """LayerNorm(feature projection) + LayerNorm(location projection) + type 1, LayerNorm, dropout.

    Regions have no order, hence no position.
    """

    def __init__(self, features, locations, width, dropout):
        super().__init__()
        self.feature = Linear(features, width)
        self.feature_norm = LayerNorm(width, eps=EPS)
        self.location = Linear(locations, width)
        self.location_norm = LayerNorm(width, eps=EPS)
        self.norm = LayerNorm(width, eps=EPS)
        self.dropout = Dropout(dropout)

    def forward(self, features, locations, token_type):
        """features [I,V,F], locations [I,V,7], token_type [D] -> [I,V,D].

        A location: x1 y1 x2 y2 width height area, as shares of the image.
        """
        # features are stored and travel as float16
        appearance = self.feature_norm(self.feature(features.to(locations.dtype)))
        place = self.location_norm(self.location(locations))
        return self.dropout(self.norm(appearance + place + token_type))


def mlp_head(width, outputs):
    norm = LayerNorm(width, eps=EPS)
    return nn.Sequential(Linear(width, width), nn.GELU(), norm, Linear(width, outputs))


class TiedHead(nn.Module):
    """Pre-training only: an MLP head whose output matrix belongs to an embedding."""

    def __init__(self, width, outputs):
        super().__init__()
        self.dense = Linear(width, width)
        self.norm = LayerNorm(width, eps=EPS)
        self.bias = Parameter(torch.zeros(outputs))

    def forward(self, hidden, matrix):
        hidden = self.norm(F.gelu(self.dense(hidden)))
        return F.linear(hidden, matrix, self.bias)


# --------------------------------------------------------------------------------------------------
# The official checkpoint

OFFICIAL_NAMES = BERT_LAYER_NAMES + [
    (r"^text_embeddings\.(word|position)\.", r"bert.embeddings.\1_embeddings."),
    (r"^text_embeddings\.token_type\.", "bert.embeddings.new_token_type_embeddings."),
    (r"^text_embeddings\.norm\.", "bert.embeddings.LayerNorm."),
    (r"^region_embeddings\.feature\.", "bert.embeddings.image_embeddings."),
    (r"^region_embeddings\.feature_norm\.", "bert.embeddings.image_layer_norm."),
    (r"^region_embeddings\.location\.", "bert.embeddings.image_location_embeddings."),
    (r"^region_embeddings\.location_norm\.", "bert.embeddings.image_location_layer_norm."),
    (r"^region_embeddings\.norm\.", "bert.embeddings.v_LayerNorm."),
    (r"^pooler\.", "bert.t_pooler.dense."),
    (r"^itm_head\.", "cls.bi_seq_relationship."),
    (r"^mlm_head\.bias", "cls.predictions.bias"),
    (r"^mlm_head\.dense\.", "cls.predictions.transform.dense."),
    (r"^mlm_head\.norm\.", "cls.predictions.transform.LayerNorm."),
    (r"^region_classes\.0\.", "cls.imagePredictions.transform.dense."),
    (r"^region_classes\.2\.", "cls.imagePredictions.transform.LayerNorm."),
    (r"^region_classes\.3\.", "cls.imagePredictions.decoder_dict.0."),
    (r"^answer_head\.", "clfs_dict.TASK15.logit_fc."),
    (r"^label_head\.", "clfs_dict.TASK19."),
    (r"^match_head\.", "clfs_dict.TASK8."),
]


def official_name(name):
    """Our parameter name -> its name in IGLUE's file."""
    name = rename(name, OFFICIAL_NAMES)
    if not name.startswith("layers."):
        return name
    # VOLTA counts attention and feed-forward as layers of their own: 2i and 2i + 1
    _, layer, part = name.split(".", 2)
    number = 2 * int(layer)
    if not part.startswith("attention."):
        number += 1
    part = part.replace("attention.", "attention_")
    return f"bert.encoder.layer.{number}.{part}"


def read_sizes(tensors, config, source):
    """Sizes of the UC2 in a checkpoint, from its shapes. Heads are 64 wide unless config says."""

    def shape(name):
        kind = "UC2 (IGLUE's; tools.uc2_original makes it of the authors' own)"
        return shape_of(tensors, official_name(name), source, kind)

    vocabulary, width = shape("text_embeddings.word.weight")
    # outputs of heads that only some models' files have
    outputs = {}
    biases = {"labels": "answer_head.3.bias", "region_classes": "region_classes.3.bias"}
    for size, bias in biases.items():
        if official_name(bias) in tensors:
            [outputs[size]] = shape(bias)
    return Sizes(
        width=width,
        vocabulary=vocabulary,
        layers=count_layers(tensors, "bert.encoder.layer.", ".intermediate.dense.bias"),
        heads=config.get("heads", max(1, width // 64)),
        feed_forward=shape("layers.0.up.weight")[0],
        positions=shape("text_embeddings.position.weight")[0],
        types=shape("text_embeddings.token_type.weight")[0],
        features=shape("region_embeddings.feature.weight")[1],
        locations=shape("region_embeddings.location.weight")[1],
        variant=config.get("variant", "volta"),
        **outputs)


def from_pretrained(tensors, config, task, source, image_size=None, num_labels=1842, **options):
    """UC2 for `task` from the pre-trained file; `options` go to the constructor.

    num_labels: the number of xGQA's answers; image_size is CCLM's. The file must be exactly the
    pre-trained one. Its heads are left out, the task's head keeps its initialisation.
    Raises ValueError, one line, for any other file.
    """
    sizes = read_sizes(tensors, config, source)
    with torch.device("meta"):  # names and shapes only
        whole = UC2(sizes, "pretraining")
    model = UC2(replace(sizes, labels=num_labels), task, **options)
    return load(model, tensors, source, whole)


def from_finetuned(tensors, config, task, source, **options):
    """UC2 from a file of the fine-tuned model of this very task (ours or IGLUE's).

    Raises ValueError, one line, for any other file.
    """
    sizes = read_sizes(tensors, config, source)
    return load(UC2(sizes, task, **options), tensors, source)
