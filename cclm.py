"""CCLM (Zeng et al. 2022, in its X2-VLM-base form): ViT + 12 text layers + 6 cross-modal layers,
and for xGQA a 6-layer answer decoder.

    image -> ViT ----------------------.
                                       v keys and values
    text  -> embeddings, text layers -> cross-modal layers -> <s>: label (XVNLI), match (xFlickrCO)
                              |                            '> all states: answer decoder (xGQA)
                              '> <s>: contrastive features (xFlickrCO)

Paper, section 3: the 12 text and 6 cross-modal layers are the 18 layers that scheduled unfreezing
thaws (`CCLM.layers`, bottom to top); ViT, embeddings, heads and decoder always train. xGQA is
answered by generation: an answer's score is its log-likelihood under the decoder, the prediction is
the exact argmax over all labels (`best_answers`) or, if asked for, the reference's ranking
(`rank_answers`).

Sizes come from the checkpoint's shapes (`read_sizes`); tensors are loaded and saved, strictly,
under the names of the official file `cclm_x2vlm_base.th`. Where the paper and the released code
differ, the code is followed, because the weights fit it: the decoder attends to all question
states, not to <s> alone.

Letters: B texts, T text tokens, I images, P image patches, D width, H heads, E contrastive
features, A answers, L answer tokens, V vocabulary, Q questions, N trie nodes, n prefixes.
"""

import re
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import LayerNorm, Linear, Parameter
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from model import BERT_LAYER_NAMES, PAD, TextEmbeddings, TransformerLayer, count_layers, in_float32
from model import init_weights, key_mask, load, rename, select, shape_of
from vit import VisionTransformer, normalize, resize_position_table

BOS, EOS = 0, 2  # <s> and </s>; padding is model.PAD = 1
LABELS = ("contradiction", "entailment", "neutral")  # XVNLI, in the order of this model's class ids


@dataclass(frozen=True)
class Sizes:
    """Everything that tells one CCLM from another. `read_sizes` reads it off a checkpoint."""

    width: int
    vocabulary: int
    text_layers: int
    cross_layers: int
    text_heads: int
    cross_heads: int
    text_feed_forward: int
    cross_feed_forward: int
    text_positions: int
    text_types: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_feed_forward: int
    patch_size: int
    image_size: int
    embed_dim: int  # of the contrastive features
    decoder_positions: int = 512
    decoder_types: int = 2


class CCLM(nn.Module):
    """The model for one task: "xgqa", "xvnli", "xflickrco", or "pretraining" (all released heads).

    `layers` are what a schedule may freeze, bottom to top; `group_of(name)` tells which parameters
    are outside of any.
    """

    def __init__(self, sizes, task, dropout=0.1, drop_path=0.1):
        super().__init__()
        s = self.sizes = sizes
        self.task = task
        self.answers = "exact"  # how xGQA is answered: "exact" or "reference"
        self.vision = VisionTransformer(
            s.vision_width, s.vision_heads, s.vision_layers, s.vision_feed_forward,
            s.patch_size, s.image_size, drop_path)
        self.text_embeddings = TextEmbeddings(
            s.vocabulary, s.width, s.text_positions, s.text_types, 1e-5, dropout)
        self.text_layers = nn.ModuleList()
        for _ in range(s.text_layers):
            self.text_layers.append(TransformerLayer(
                s.width, s.text_heads, s.text_feed_forward, 1e-5, dropout))
        self.cross_layers = cross_modal_layers(sizes, dropout, s.vision_width)
        if task == "xgqa":
            self.decoder = AnswerDecoder(sizes, dropout)
        if task == "xvnli":
            self.cls_head = mlp_head(s.width, len(LABELS))
        if task in ("xflickrco", "pretraining"):
            self.temp = Parameter(torch.tensor(0.07))
            self.vision_proj = Linear(s.vision_width, s.embed_dim)
            self.text_proj = Linear(s.width, s.embed_dim)
            self.itm_head = mlp_head(s.width, 2)
        if task == "pretraining":
            self.bbox_head = mlp_head(s.width, 4)
            # its output matrix is its own, not tied to the word embeddings
            self.mlm_head = nn.Sequential(
                Linear(s.width, s.width), nn.GELU(), LayerNorm(s.width, eps=1e-5),
                Linear(s.width, s.vocabulary))
        self.apply(init_weights)
        self.vision.init_weights()

    # -- what the schedule, the optimizer and the loop ask for -------------------------------------

    @property
    def layers(self):
        return [*self.text_layers, *self.cross_layers]

    @property
    def longest_text(self):
        """Most tokens of a text: XLM-R's first position is 2."""
        return self.sizes.text_positions - 2

    def group_of(self, name):
        """Group of a parameter outside the layers: "vision", "embeddings", "head"; else None."""
        if name.startswith(("text_layers.", "cross_layers.")):
            return None
        if name.startswith("vision."):
            return "vision"
        if name.startswith("text_embeddings."):
            return "embeddings"
        return "head"

    def decays(self, name):
        """Whether weight decay applies: the reference's rule, parts of the official name."""
        exempt = r"bias|LayerNorm\.weight|norm\.weight|norm1\.weight|norm2\.weight"
        return not re.search(exempt, rename(name, OFFICIAL_NAMES))

    def forward(self, batch):
        """Training loss of one batch: the mean over its questions, statements or pairs."""
        losses = {"xgqa": self.answer_loss, "xvnli": self.label_loss,
                  "xflickrco": self.retrieval_loss}
        return losses[self.task](batch)

    # -- encoders ----------------------------------------------------------------------------------

    def encode_images(self, batch):
        """images, uint8 or already normalised float [I,3,R,R] -> image states [I,1+P,D]."""
        images = batch["images"]
        if images.dtype == torch.uint8:
            images = normalize(images)
        return self.vision(images)

    def image_memory(self, image_states):
        """Keys and values of every cross-modal layer: [[I,H,1+P,D/H] x 2] per layer.

        They are computed once per image, however many texts look at it.
        """
        return [layer.cross_attention.keys_values(image_states) for layer in self.cross_layers]

    def memory(self, batch):
        """`image_memory` of a batch's images."""
        return self.image_memory(self.encode_images(batch))

    def encode_texts(self, input_ids, attention_mask):
        """[B,T] -> text states [B,T,D] (no image has been seen)."""
        hidden = self.text_embeddings(input_ids)
        mask = key_mask(attention_mask)
        for layer in self.text_layers:
            hidden = layer(hidden, mask)
        return hidden

    def fuse(self, text_states, attention_mask, memory, first_token=False):
        """Cross-modal states [B,T,D], or [B,1,D] of <s> alone.

        memory: of B images, or of one that all texts share.
        """
        hidden = text_states
        mask = key_mask(attention_mask)
        # a classifier on <s> needs nothing else of the last layer
        last = len(memory) - 1
        for i, keys_values in enumerate(memory):
            layer = self.cross_layers[i]
            hidden = layer(hidden, mask, keys_values, first_token=first_token and i == last)
        return hidden

    def fuse_batch(self, batch, first_token=False):
        """A training batch through all encoders. Texts may share images: image_index [B]."""
        memory = self.memory(batch)
        if "image_index" in batch:
            memory = select(memory, batch["image_index"])
        text_states = self.encode_texts(batch["input_ids"], batch["attention_mask"])
        return self.fuse(text_states, batch["attention_mask"], memory, first_token)

    def predict(self, text_states, attention_mask, memory):
        """Index of each text's label [B]: in LABELS (XVNLI), or in `set_answers`' (xGQA)."""
        if self.task == "xvnli":
            return self.label_logits(text_states, attention_mask, memory).argmax(1)
        states = self.fuse(text_states, attention_mask, memory)
        if self.answers == "reference":
            order, _ = rank_answers(self.decoder, states, attention_mask, self.answer_ids)
            return order[:, 0]
        labels, _ = best_answers(self.decoder, states, attention_mask, self.trie)
        return labels

    # -- XVNLI: classification ---------------------------------------------------------------------

    def label_loss(self, batch):
        """Mean cross-entropy. batch: images, input_ids, attention_mask, labels [B] of LABELS."""
        states = self.fuse_batch(batch, first_token=True)
        logits = in_float32(self.cls_head, states[:, 0])
        return F.cross_entropy(logits, batch["labels"])

    def label_logits(self, text_states, attention_mask, memory):
        """-> [B,3]."""
        states = self.fuse(text_states, attention_mask, memory, first_token=True)
        return in_float32(self.cls_head, states[:, 0])

    # -- xGQA: generation --------------------------------------------------------------------------

    def set_answers(self, answers):
        """The labels to choose from: the token ids of each, without <s> and </s>."""
        device = self.decoder.bias.device
        rows = [torch.tensor([BOS, *answer, EOS], device=device) for answer in answers]
        self.answer_ids = pad_sequence(rows, batch_first=True, padding_value=PAD)  # [A,L]
        self.trie = AnswerTrie(answers, device)

    def answer_loss(self, batch):
        """-log p(answer | question, image), summed over tokens, mean over questions.

        batch: images, input_ids [B,T], attention_mask [B,T]; answer_ids [A,L] (<s> … </s>,
        padded), and for answer a its question answer_question[a] and weight answer_weight[a].
        """
        question_states = self.fuse_batch(batch)
        losses = self.decoder.answer_losses(question_states, batch["attention_mask"],
                                            batch["answer_ids"], batch["answer_question"])
        return (losses * batch["answer_weight"]).sum() / len(question_states)

    # -- xFlickrCO: contrastive features and matching ----------------------------------------------

    def image_features(self, image_states):
        """[I,1+P,D] -> [I,E] of length 1."""
        return F.normalize(in_float32(self.vision_proj, image_states[:, 0]), dim=-1)

    def text_features(self, text_states):
        """[B,T,D] -> [B,E] of length 1."""
        return F.normalize(in_float32(self.text_proj, text_states[:, 0]), dim=-1)

    def match_logits(self, text_states, attention_mask, memory):
        """-> [B,2]; column 1 says that text and image belong together."""
        states = self.fuse(text_states, attention_mask, memory, first_token=True)
        return in_float32(self.itm_head, states[:, 0])

    def match_scores(self, text_states, attention_mask, memory):
        """-> [B]: the higher, the better text and image belong together."""
        return self.match_logits(text_states, attention_mask, memory)[:, 1]

    def retrieval_loss(self, batch):
        """Image-text contrastive loss + image-text matching loss with hard negatives.

        batch: images [B,3,R,R], input_ids, attention_mask, image_ids [B] (captions of one image
        share an id and are no negatives of each other), uniform [B,2] in [0,1): the random draws of
        the negative image and the negative text of each pair. With several processes the batch is
        the union of all processes' batches: features and states are gathered with their gradients,
        and the mean of the processes' losses is the loss of the union.
        """
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        image_states = self.encode_images(batch)
        text_states = self.encode_texts(batch["input_ids"], batch["attention_mask"])
        to_images, to_texts = self.contrast(image_states, text_states)
        same_image = batch["image_ids"][:, None] == gather(batch["image_ids"])
        contrastive = contrastive_loss(to_images, to_texts, same_image)
        # hard negatives: what does not belong together, the likelier drawn the more similar
        with torch.no_grad():
            draw_image, draw_text = batch["uniform"].unbind(1)
            image_rows = draw(negative_weights(to_images, same_image), draw_image)
            text_rows = draw(negative_weights(to_texts, same_image), draw_text)
        return contrastive + self.matching_loss(
            image_states, text_states, batch["attention_mask"], image_rows, text_rows)

    def contrast(self, image_states, text_states):
        """Similarities / temperature of texts with all images, images with all texts: [B,all]."""
        images, texts = self.image_features(image_states), self.text_features(text_states)
        with torch.autocast(images.device.type, enabled=False):
            to_images = texts @ gather(images).T / self.temp
            to_texts = images @ gather(texts).T / self.temp
        return to_images, to_texts

    def matching_loss(self, image_states, text_states, attention_mask, image_rows, text_rows):
        """Mean cross-entropy over B pairs that match and 2B that do not.

        image_rows [B]: each text's negative image; text_rows [B]: each image's negative text.
        """
        # images and texts of all processes; texts as long as the longest of them
        length = torch.tensor(text_states.shape[1], device=text_states.device)
        if dist.is_initialized():
            dist.all_reduce(length, dist.ReduceOp.MAX)
        texts, masks = pad_to(text_states, int(length)), pad_to(attention_mask, int(length))
        all_texts, all_masks = gather(texts), gather(masks)
        negative_images = gather(image_states)[image_rows]
        memory = self.image_memory(torch.cat([image_states, negative_images]))
        # pairs: (text, its image), (text, negative image), (negative text, image)
        pairs = len(image_states)
        own = torch.arange(pairs, device=image_states.device)
        memory = select(memory, torch.cat([own, own + pairs, own]))
        texts = torch.cat([texts, texts, all_texts[text_rows]])  # [3B,T,D]
        masks = torch.cat([masks, masks, all_masks[text_rows]])
        labels = torch.zeros(3 * pairs, dtype=torch.long, device=texts.device)
        labels[:pairs] = 1
        return F.cross_entropy(self.match_logits(texts, masks, memory), labels)

    # -- names in the official checkpoint ----------------------------------------------------------

    def checkpoint_names(self):
        """Our parameter name -> its name in the official file."""
        return {name: rename(name, OFFICIAL_NAMES) for name, _ in self.named_parameters()}

    def aliases(self):
        """Second names of the same tensor in the official file: alias -> first name."""
        predictions = "text_decoder.cls.predictions."
        if self.task == "xgqa":
            word = "text_decoder.bert.embeddings.word_embeddings.weight"
            return {predictions + "decoder.weight": word,
                    predictions + "decoder.bias": predictions + "bias"}
        if self.task == "pretraining":
            return {"mlm_head.predictions.decoder.bias": "mlm_head.predictions.bias"}
        return {}

    def constants(self):
        """Index buffers that follow from the sizes; files may have them or not."""
        s = self.sizes
        constants = {"text_encoder.embeddings.position_ids": torch.arange(s.text_positions)[None]}
        for i in range(s.vision_layers):
            name = f"vision_encoder.blocks.{i}.attn.relative_position_index"
            constants[name] = self.vision.position_index
        if self.task == "xgqa":
            positions = torch.arange(s.decoder_positions)[None]
            constants["text_decoder.bert.embeddings.position_ids"] = positions
        return constants

    def config(self):
        """What a file must hold beside the tensors, because no shape tells it."""
        s = self.sizes
        return {"text_heads": s.text_heads, "cross_heads": s.cross_heads,
                "decoder_positions": s.decoder_positions}


def cross_modal_layers(sizes, dropout, memory_width):
    """The layers between text and image, and those of the answer decoder."""
    s, layers = sizes, nn.ModuleList()
    for _ in range(s.cross_layers):
        layers.append(TransformerLayer(
            s.width, s.cross_heads, s.cross_feed_forward, 1e-12, dropout, memory_width))
    return layers


def mlp_head(width, outputs):
    return nn.Sequential(Linear(width, 2 * width), LayerNorm(2 * width, eps=1e-5), nn.GELU(),
                         Linear(2 * width, outputs))


# --------------------------------------------------------------------------------------------------
# Retrieval: gathering over processes, contrastive loss, hard negatives


class Gather(torch.autograd.Function):
    """All processes' rows in rank order; a row's gradient is the sum of all processes'."""

    @staticmethod
    def forward(context, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(context, gradient):
        # reduced in place, and each process takes its own part
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """Rows of all processes; in one process x itself."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return Gather.apply(x.contiguous())


def pad_to(x, length):
    """Zeros after position T of [B,T] or [B,T,D]."""
    no_padding_of_width = (0, 0) * (x.dim() - 2)
    return F.pad(x, (*no_padding_of_width, 0, length - x.shape[1]))


def contrastive_loss(to_images, to_texts, same_image):
    """Mean of both directions' cross-entropies over logits [B,all].

    Every pair of one image is a positive; they share the probability.
    """
    targets = same_image.float() / same_image.sum(1, keepdim=True)
    both = F.cross_entropy(to_images, targets) + F.cross_entropy(to_texts, targets)
    return both / 2


def negative_weights(logits, same_image):
    """How likely each candidate is drawn as its row's negative; never one of the same image."""
    return (logits.softmax(1) + 1e-5).masked_fill(same_image, 0)


def draw(weights, uniform):
    """One column per row, as likely as its weight; uniform [B] in [0,1) decides which."""
    # inverse of the cumulative distribution; torch has no deterministic cumsum of floats on a GPU
    n = weights.shape[1]
    running = torch.ones(n, n, dtype=torch.double, device=weights.device).triu()
    cumulative = weights.double() @ running
    thresholds = uniform.double()[:, None] * cumulative[:, -1:]
    return (cumulative <= thresholds).sum(1)


# --------------------------------------------------------------------------------------------------
# xGQA: the answer decoder


class AnswerDecoder(nn.Module):
    """6-layer BERT decoder over answer tokens that attends to all states of the fused question.

    The output matrix is its word embedding. Its positions count from 0.
    """

    def __init__(self, sizes, dropout):
        super().__init__()
        s = sizes
        self.embeddings = TextEmbeddings(
            s.vocabulary, s.width, s.decoder_positions, s.decoder_types, 1e-12, dropout)
        self.layers = cross_modal_layers(sizes, dropout, s.width)
        self.dense = Linear(s.width, s.width)
        self.norm = LayerNorm(s.width, eps=1e-12)
        self.bias = Parameter(torch.zeros(s.vocabulary))

    def logits(self, hidden):
        """[...,D] -> [...,V]."""
        hidden = self.norm(F.gelu(self.dense(hidden)))
        return F.linear(hidden, self.embeddings.word.weight, self.bias)

    def memory(self, question_states):
        """Keys and values of the questions [Q,T,D], for every layer."""
        return [layer.cross_attention.keys_values(question_states) for layer in self.layers]

    def decode(self, answer_ids, memory, question_mask):
        """Teacher forcing. answer_ids [A,L], memory, question_mask of A questions -> [A,L,D]."""
        # a token attends to itself and to those before it
        length, device = answer_ids.shape[1], answer_ids.device
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        mask = causal & key_mask(answer_ids != PAD)  # [A,1,L,L]
        positions = torch.arange(length, device=device).expand_as(answer_ids)
        hidden = self.embeddings(answer_ids, positions)
        for layer, keys_values in zip(self.layers, memory):
            hidden = layer(hidden, mask, keys_values, key_mask(question_mask))
        return hidden

    def answer_losses(self, question_states, question_mask, answer_ids, answer_question):
        """-log p of every answer, summed over its tokens after <s>, </s> included: [A]."""
        memory = select(self.memory(question_states), answer_question)
        hidden = self.decode(answer_ids, memory, question_mask[answer_question])
        # each token but the last predicts the next one; padding does not meet the vocabulary
        hidden, targets = hidden[:, :-1].flatten(0, 1), answer_ids[:, 1:]
        real = (targets != PAD).flatten().nonzero()[:, 0]  # positions in the flattened matrix
        logits = self.logits(hidden[real])  # [real,V]
        losses = F.cross_entropy(logits, targets.flatten()[real], reduction="none")
        all_losses = losses.new_zeros(targets.numel()).scatter(0, real, losses)
        return all_losses.view(targets.shape).sum(1)


class AnswerTrie:
    """All labels' token sequences merged by common prefix: a node is a prefix, node 0 is <s>.

    paths [N,L]: tokens of each prefix, from <s> on, padded; depths [N]: index of its last token;
    tokens [N]: that token; parents [N]: node of the prefix without it (-1: none); labels [N]: the
    label whose tokens are exactly these, or -1.
    """

    def __init__(self, answers, device):
        """answers: token ids of every label, without <s> and </s>."""
        nodes, parents, labels = {(): 0}, [-1], [-1]
        for label, answer in enumerate(answers):
            prefix, node = (), 0
            for token in answer:
                parent = node
                prefix = (*prefix, token)
                node = nodes.setdefault(prefix, len(nodes))
                if node == len(parents):  # setdefault has just numbered it
                    parents.append(parent)
                    labels.append(-1)
            # labels of the same tokens cannot be told apart: the first stands for all
            if labels[node] == -1:
                labels[node] = label
        paths = [torch.tensor([BOS, *prefix], device=device) for prefix in nodes]
        self.paths = pad_sequence(paths, batch_first=True, padding_value=PAD)
        self.depths = (self.paths != PAD).sum(1) - 1
        self.tokens = self.paths.gather(1, self.depths[:, None])[:, 0]
        self.parents = torch.tensor(parents, device=device)
        self.labels = torch.tensor(labels, device=device)
        self.num_labels = len(answers)


@torch.no_grad()
def best_answers(decoder, question_states, question_mask, trie, at_once=64):
    """The likeliest label of every question, by log p(label </s> | question): best-first search.

    -> (labels [Q], their log-likelihoods [Q]). Exact: no label is likelier, and of equally likely
    ones it is the first. A prefix is at least as likely as all that continues it, so the search
    ends when no waiting prefix is as likely as the best label: few are run. At most `at_once`
    prefixes run together, each from <s> on, which bounds the memory ([at_once,V] logits).
    """
    memory = decoder.memory(question_states)
    # log p of every prefix that waits to be run, else -inf: at first <s>, whose log p is 0
    shape = (len(question_states), len(trie.tokens))
    waiting = torch.full(shape, -torch.inf, device=question_states.device)  # [Q,N]
    waiting[:, 0] = 0
    # log p of every label that was scored, else -inf
    scored = waiting.new_full((len(question_states), trie.num_labels), -torch.inf)  # [Q,A]
    width = 1
    while True:
        # what is less likely than the best label cannot lead to a better one (what is as likely
        # can lead to one that ties and stands first)
        best = scored.amax(1, keepdim=True)
        promising = waiting.masked_fill(waiting < best, -torch.inf)
        # the likeliest of every question, in each round twice as many: a peaked decoder needs few
        # prefixes, a flat one many
        likeliest, nodes = promising.topk(min(width, shape[1]))  # [Q,width]
        width = min(2 * width, at_once)
        # every question's likeliest first, then every second, …: `at_once` leaves out the last
        rank, question = likeliest.T.isfinite().nonzero(as_tuple=True)
        if len(question) == 0:
            labels = scored.argmax(1)
            return labels, scored.gather(1, labels[:, None])[:, 0]

        # run them from <s> on (question, node, depth, log_p: one entry per prefix) to the states
        # from which the next token is predicted
        question = question[:at_once]
        node = nodes[question, rank[:at_once]]  # [n]
        depth = trie.depths[node]
        ids = trie.paths[node, : depth.max() + 1]  # [n,L]
        hidden = decoder.decode(ids, select(memory, question), question_mask[question])  # [n,L,D]
        last = hidden[torch.arange(len(node), device=hidden.device), depth]  # [n,D]
        log_p = waiting[question, node]
        waiting[question, node] = -torch.inf

        # log p of a longer prefix: this one's, plus the next token's logit, minus the normaliser
        logits = in_float32(decoder.logits, last)  # [n,V]
        log_p -= logits.logsumexp(1)

        # prefixes that are labels: </s> follows
        row = (trie.labels[node] >= 0).nonzero()[:, 0]
        label = trie.labels[node[row]]
        scored[question[row], label] = log_p[row] + logits[row, EOS]
        # and prefixes that are one token longer (row: which of the n; child: its node) wait
        row, child = (trie.parents == node[:, None]).nonzero(as_tuple=True)
        waiting[question[row], child] = log_p[row] + logits[row, trie.tokens[child]]


@torch.no_grad()
def rank_answers(decoder, question_states, question_mask, answer_ids, k=128):
    """The reference's ranking: the k answers of likeliest first token, ordered by their scores.

    Score: log p(first token) + log p(whole answer), so the first token counts twice.
    answer_ids [A,L] -> (indices [Q,k], best first; probabilities among the k [Q,k]).
    """
    k = min(k, len(answer_ids))
    indices, probabilities = [], []
    # a question at a time: k answers of it fill the memory
    for states, mask in zip(question_states.split(1), question_mask.split(1)):
        # what follows <s>
        start = decoder.decode(answer_ids[:1, :1], decoder.memory(states), mask)
        log_p = decoder.logits(start[0, 0]).log_softmax(-1)  # [V]
        first, top = log_p[answer_ids[:, 1]].topk(k)
        losses = decoder.answer_losses(states, mask, answer_ids[top], torch.zeros_like(top))
        scores, order = (first - losses).softmax(-1).sort(descending=True)
        indices.append(top[order])
        probabilities.append(scores)
    return torch.stack(indices), torch.stack(probabilities)


# --------------------------------------------------------------------------------------------------
# The official checkpoint

OFFICIAL_NAMES = BERT_LAYER_NAMES + [
    (r"^vision\.patch_embed\.", "vision_encoder.patch_embed.proj."),
    (r"^vision\.", "vision_encoder."),
    (r"^text_layers\.", "text_encoder.encoder.layer."),
    (r"^cross_layers\.", "cross_encoder.encoder.layer."),
    (r"embeddings\.(word|position|token_type)\.", r"embeddings.\1_embeddings."),
    (r"embeddings\.norm\.", "embeddings.LayerNorm."),
    (r"^text_embeddings\.", "text_encoder.embeddings."),
    (r"^decoder\.embeddings\.", "text_decoder.bert.embeddings."),
    (r"^decoder\.layers\.", "text_decoder.bert.encoder.layer."),
    (r"^decoder\.bias", "text_decoder.cls.predictions.bias"),
    (r"^decoder\.dense\.", "text_decoder.cls.predictions.transform.dense."),
    (r"^decoder\.norm\.", "text_decoder.cls.predictions.transform.LayerNorm."),
    (r"^mlm_head\.0\.", "mlm_head.predictions.transform.dense."),
    (r"^mlm_head\.2\.", "mlm_head.predictions.transform.LayerNorm."),
    (r"^mlm_head\.3\.weight", "mlm_head.predictions.decoder.weight"),
    (r"^mlm_head\.3\.bias", "mlm_head.predictions.bias"),
]


def read_sizes(tensors, config, source):
    """Sizes of the CCLM in a checkpoint, from its shapes. Heads are 64 wide unless config says."""

    def shape(name):
        return shape_of(tensors, name, source, "CCLM")

    vision_width, _, patch_size, _ = shape("vision_encoder.patch_embed.proj.weight")
    # (2 x patches a side - 1)² + 3 rows
    table_rows, vision_heads = shape("vision_encoder.blocks.0.attn.relative_position_bias_table")
    patches = (round((table_rows - 3) ** 0.5) + 1) // 2
    vocabulary, width = shape("text_encoder.embeddings.word_embeddings.weight")
    text, cross = "text_encoder.encoder.layer.", "cross_encoder.encoder.layer."
    heads = max(1, width // 64)
    # what only some models' files have: contrastive features, and the decoder
    embed_dim = 0
    if "vision_proj.weight" in tensors:
        embed_dim = shape("vision_proj.weight")[0]
    decoder_positions, decoder_types = config.get("decoder_positions", 512), 2
    if "text_decoder.bert.embeddings.word_embeddings.weight" in tensors:
        decoder_positions = shape("text_decoder.bert.embeddings.position_embeddings.weight")[0]
        decoder_types = shape("text_decoder.bert.embeddings.token_type_embeddings.weight")[0]
    return Sizes(
        width=width,
        vocabulary=vocabulary,
        text_layers=count_layers(tensors, text, ".intermediate.dense.bias"),
        cross_layers=count_layers(tensors, cross, ".intermediate.dense.bias"),
        text_heads=config.get("text_heads", heads),
        cross_heads=config.get("cross_heads", heads),
        text_feed_forward=shape(text + "0.intermediate.dense.weight")[0],
        cross_feed_forward=shape(cross + "0.intermediate.dense.weight")[0],
        text_positions=shape("text_encoder.embeddings.position_embeddings.weight")[0],
        text_types=shape("text_encoder.embeddings.token_type_embeddings.weight")[0],
        vision_width=vision_width,
        vision_layers=count_layers(tensors, "vision_encoder.blocks.", ".mlp.fc1.bias"),
        vision_heads=vision_heads,
        vision_feed_forward=shape("vision_encoder.blocks.0.mlp.fc1.weight")[0],
        patch_size=patch_size,
        image_size=patches * patch_size,
        embed_dim=embed_dim,
        decoder_positions=decoder_positions,
        decoder_types=decoder_types)


def from_pretrained(tensors, config, task, source, image_size=384, num_labels=None, **options):
    """CCLM for `task` from the released pre-training checkpoint; `options` go to the constructor.

    The file must be exactly that. What the task does not need is left out (masked language and box
    heads; for xGQA and XVNLI also the contrastive and matching heads), what the file lacks keeps
    its initialisation (cls_head; the decoder's embeddings and output, while its layers start as
    copies of the cross-modal layers). Relative position tables are resized to image_size;
    num_labels is UC2's. Raises ValueError, one line, for any other file.
    """
    sizes = read_sizes(tensors, config, source)
    if image_size % sizes.patch_size:
        raise ValueError(f"{source}: an image of {image_size} pixels a side does not divide into "
                         f"patches of {sizes.patch_size}")
    sizes = replace(sizes, image_size=image_size)
    with torch.device("meta"):  # names and shapes only
        whole = CCLM(sizes, "pretraining")
    model = CCLM(sizes, task, **options)
    # tables of the file's resolution -> of image_size
    resized = {}
    for name, tensor in tensors.items():
        if name.endswith("relative_position_bias_table"):
            rows = len(model.vision.blocks[0].attn.relative_position_bias_table)
            resized[name] = resize_position_table(tensor, rows)
    load(model, tensors | resized, source, whole)
    # the decoder's layers start as the cross-modal ones
    if task == "xgqa":
        model.decoder.layers.load_state_dict(model.cross_layers.state_dict())
    return model


def from_finetuned(tensors, config, task, source, **options):
    """CCLM from a file of the fine-tuned model of this very task (ours or the reference's).

    Raises ValueError, one line, for any other file.
    """
    sizes = read_sizes(tensors, config, source)
    return load(CCLM(sizes, task, **options), tensors, source)
