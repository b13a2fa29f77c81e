"""CCLM (Zeng et al. 2022, in its X2-VLM-base form): ViT + 12 text layers + 6 cross-modal
layers, and for xGQA a 6-layer answer decoder.

    image -> ViT ---------------------------.
                                            v keys and values
    text  -> embeddings -> text layers -> cross-modal layers -> <s>: classifier (XVNLI), matching (xFlickrCO)
                              |                              '> all states: answer decoder (xGQA)
                              '> <s>: contrastive features (xFlickrCO)

Paper section 3: the 12 text and 6 cross-modal layers are the 18 layers that scheduled unfreezing thaws
(`CCLM.layers`, bottom to top); ViT, embeddings, heads and decoder always train. xGQA is answered by generation:
an answer's score is its log-likelihood under the decoder, and the prediction is the exact argmax over all
labels, found in a prefix trie (`best_answers`).

Sizes come from the checkpoint's shapes (`read_sizes`); tensors are loaded and saved under the names of the official
file `cclm_x2vlm_base.th`, strictly. Where the paper and the released code differ, the code is followed, because the
weights fit it: the decoder attends to all question states, not to <s> alone.

Letters: B texts, T text tokens, I images, P image patches, D width, H heads, A answers, L answer
tokens, V vocabulary, Q questions, N trie nodes.
"""

import math
import re
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from model import (
    BERT_LAYER_NAMES,
    PAD,
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
    """The model for one task: "xgqa", "xvnli", "xflickrco", or "pretraining" (every head of the released checkpoint).

    `layers` are what a schedule may freeze, bottom to top; `group_of(name)` tells which parameters are outside of any.
    """

    def __init__(self, sizes, task, dropout=0.1, drop_path=0.1):
        super().__init__()
        s = self.sizes = sizes
        self.task = task
        self.vision = VisionTransformer(s.vision_width, s.vision_heads, s.vision_layers, s.vision_feed_forward,
                                        s.patch_size, s.image_size, drop_path)
        self.text_embeddings = TextEmbeddings(s.vocabulary, s.width, s.text_positions, s.text_types, 1e-5, dropout)
        self.text_layers = nn.ModuleList(
            TransformerLayer(s.width, s.text_heads, s.text_feed_forward, 1e-5, dropout) for _ in range(s.text_layers))
        self.cross_layers = nn.ModuleList(
            TransformerLayer(s.width, s.cross_heads, s.cross_feed_forward, 1e-12, dropout, s.vision_width)
            for _ in range(s.cross_layers))
        if task == "xgqa":
            self.decoder = AnswerDecoder(sizes, dropout)
        if task == "xvnli":
            self.cls_head = mlp_head(s.width, len(LABELS))
        if task in ("xflickrco", "pretraining"):
            self.temp = nn.Parameter(torch.tensor(0.07))
            self.vision_proj = nn.Linear(s.vision_width, s.embed_dim)
            self.text_proj = nn.Linear(s.width, s.embed_dim)
            self.itm_head = mlp_head(s.width, 2)
        if task == "pretraining":
            self.bbox_head = mlp_head(s.width, 4)
            self.mlm_head = MaskedLanguageHead(s.width, s.vocabulary)
        self.apply(init_weights)
        self.vision.init_weights()

    # -- what the schedule, the optimizer and the loop ask for ---------------------------------------------------------

    @property
    def layers(self):
        return [*self.text_layers, *self.cross_layers]

    @property
    def longest_text(self):
        """Most tokens of a text: XLM-R's first position is 2."""
        return self.sizes.text_positions - 2

    def group_of(self, name):
        """Group of a parameter that is in no layer of the schedule: "vision", "embeddings"
        or "head"; None for one in a layer.
        """
        if name.startswith(("text_layers.", "cross_layers.")):
            return None
        return {"vision": "vision", "text_embeddings": "embeddings"}.get(name.split(".")[0], "head")

    def decays(self, name):
        """Whether weight decay applies: the reference's rule, substrings of the official name
        (gammas and tables of words do decay).
        """
        official = self.checkpoint_names()[name]
        return not re.search(r"bias|LayerNorm\.weight|norm\.weight|norm1\.weight|norm2\.weight", official)

    def forward(self, batch):
        """Training loss of one batch, a scalar: the mean over its questions, statements or caption-image pairs."""
        return {"xgqa": self.answer_loss, "xvnli": self.label_loss, "xflickrco": self.retrieval_loss}[self.task](batch)

    # -- encoders ------------------------------------------------------------------------------------------------------

    def encode_images(self, batch):
        """batch["images"], uint8 or already normalised float [I,3,R,R] -> image states [I,1+P,D]."""
        images = batch["images"]
        return self.vision(normalize(images) if images.dtype == torch.uint8 else images)

    def image_memory(self, image_states):
        """Keys and values of every cross-modal layer, once per image however many texts look
        at it: [(I,H,1+P,D/H) x 2] per layer.
        """
        return [layer.cross_attention.keys_values(image_states) for layer in self.cross_layers]

    def memory(self, batch):
        """`image_memory` of a batch's images."""
        return self.image_memory(self.encode_images(batch))

    def encode_texts(self, input_ids, attention_mask):
        """[B,T] -> text states [B,T,D] (no image has been seen)."""
        hidden, mask = self.text_embeddings(input_ids), key_mask(attention_mask)
        for layer in self.text_layers:
            hidden = layer(hidden, mask)
        return hidden

    def fuse(self, text_states, attention_mask, memory, first_token=False):
        """Cross-modal states [B,T,D], or [B,1,D] of <s> alone. `memory` holds B images, or one that all texts share."""
        hidden, mask = text_states, key_mask(attention_mask)
        for i, (layer, keys_values) in enumerate(zip(self.cross_layers, memory)):
            run = layer.first_token if first_token and i == len(self.cross_layers) - 1 else layer
            hidden = run(hidden, mask, memory_kv=keys_values)
        return hidden

    def fuse_batch(self, batch, first_token=False):
        """A training batch through all encoders.

        Texts that share an image share its pass through the ViT and its keys and values.
        """
        memory = self.memory(batch)
        if "image_index" in batch:
            memory = select(memory, batch["image_index"])
        text_states = self.encode_texts(batch["input_ids"], batch["attention_mask"])
        return self.fuse(text_states, batch["attention_mask"], memory, first_token)

    def predict(self, text_states, attention_mask, memory):
        """Index of the predicted label of each text [B]: XVNLI's LABELS, or xGQA's answers as `set_answers` got them.
        """
        if self.task == "xvnli":
            return self.label_logits(text_states, attention_mask, memory).argmax(1)
        return best_answers(self.decoder, self.fuse(text_states, attention_mask, memory), attention_mask, self.trie)[0]

    # -- XVNLI: classification -----------------------------------------------------------------------------------------

    def label_loss(self, batch):
        """Mean cross-entropy. batch: images, input_ids, attention_mask, labels [B] (ids of LABELS)."""
        logits = in_float32(self.cls_head, self.fuse_batch(batch, first_token=True)[:, 0])
        return F.cross_entropy(logits, batch["labels"])

    def label_logits(self, text_states, attention_mask, memory):
        """-> [B,3]."""
        return in_float32(self.cls_head, self.fuse(text_states, attention_mask, memory, first_token=True)[:, 0])

    # -- xGQA: generation ----------------------------------------------------------------------------------------------

    def set_answers(self, answers):
        """The labels to choose from when predicting: the token ids of each, without <s> and </s>."""
        self.trie = AnswerTrie(answers, self.decoder.bias.device)

    def answer_loss(self, batch):
        """-log p(answer | question, image), summed over tokens, mean over questions.

        batch: images, input_ids [B,T], attention_mask [B,T]; answer_ids [A,L] (<s> … </s>, padded), and for answer a
        its question answer_question[a] and weight answer_weight[a].
        """
        real = real_targets(batch["answer_ids"])  # before the device has much to do: the host waits for the number
        question_states = self.fuse_batch(batch)
        losses = self.decoder.answer_losses(question_states, batch["attention_mask"], batch["answer_ids"],
                                            batch["answer_question"], real)
        return (losses * batch["answer_weight"]).sum() / len(question_states)

    # -- xFlickrCO: contrastive features and matching ------------------------------------------------------------------

    def image_features(self, image_states):
        return F.normalize(in_float32(self.vision_proj, image_states[:, 0]), dim=-1)  # [I,1+P,D] -> [I,E]

    def text_features(self, text_states):
        return F.normalize(in_float32(self.text_proj, text_states[:, 0]), dim=-1)  # [B,T,D] -> [B,E]

    def match_logits(self, text_states, attention_mask, memory):
        """-> [B,2]; column 1 says that text and image belong together."""
        return in_float32(self.itm_head, self.fuse(text_states, attention_mask, memory, first_token=True)[:, 0])

    def match_scores(self, text_states, attention_mask, memory):
        """-> [B]: the higher, the better text and image belong together."""
        return self.match_logits(text_states, attention_mask, memory)[:, 1]

    def retrieval_loss(self, batch):
        """Image-text contrastive loss + image-text matching loss with hard negatives.

        batch: images [B,3,R,R], input_ids, attention_mask, image_ids [B] (captions of one image share an id and are no
        negatives of each other), uniform [B,2] in [0,1): the random draws of the negative image and the negative text
        of each pair. With several processes the batch is the union of all processes' batches: features and states are
        gathered with their gradients, and the mean of the processes' losses is the loss of the union.
        """
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        image_states = self.encode_images(batch)
        text_states = self.encode_texts(batch["input_ids"], batch["attention_mask"])
        to_images, to_texts = self.contrast(image_states, text_states)
        same_image = batch["image_ids"][:, None] == gather(batch["image_ids"])[None, :]
        itc = contrastive_loss(to_images, to_texts, same_image)
        with torch.no_grad():
            image_rows = draw(negative_weights(to_images, same_image), batch["uniform"][:, 0])
            text_rows = draw(negative_weights(to_texts, same_image), batch["uniform"][:, 1])
        return itc + self.matching_loss(image_states, text_states, batch["attention_mask"], image_rows, text_rows)

    def contrast(self, image_states, text_states):
        """Similarities / temperature of this process's texts with all images, and of its
        images with all texts: 2 x [B, B of all].
        """
        image_features, text_features = self.image_features(image_states), self.text_features(text_states)
        with torch.autocast(image_features.device.type, enabled=False):
            return (text_features @ gather(image_features).T / self.temp,
                    image_features @ gather(text_features).T / self.temp)

    def matching_loss(self, image_states, text_states, attention_mask, image_rows, text_rows):
        """Mean cross-entropy over B pairs that match, B texts with a negative image (image_rows
        [B]) and B images with a negative text.
        """
        all_texts, all_masks = gather_texts(text_states, attention_mask)
        negative_images = gather(image_states)[image_rows]
        memory = self.image_memory(torch.cat([image_states, negative_images]))
        own = torch.arange(len(image_states), device=image_states.device)
        memory = select(memory, torch.cat([own, own + len(own), own]))
        texts, masks = pad_to(text_states, all_texts.shape[1]), pad_to(attention_mask, all_masks.shape[1])
        texts = torch.cat([texts, texts, all_texts[text_rows]])  # [3B,T,D]
        masks = torch.cat([masks, masks, all_masks[text_rows]])
        labels = torch.zeros(len(texts), dtype=torch.long, device=texts.device)
        labels[: len(own)] = 1
        return F.cross_entropy(self.match_logits(texts, masks, memory), labels)

    # -- names in the official checkpoint ------------------------------------------------------------------------------

    def checkpoint_names(self):
        """Our parameter name -> its name in the official file."""
        if not hasattr(self, "_checkpoint_names"):
            self._checkpoint_names = {name: rename(name, OFFICIAL_NAMES) for name, _ in self.named_parameters()}
        return self._checkpoint_names

    def aliases(self):
        """Second names under which the official file stores the same tensor: alias -> first name."""
        if self.task == "xgqa":
            return {
                "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
                "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias"}
        if self.task == "pretraining":
            return {"mlm_head.predictions.decoder.bias": "mlm_head.predictions.bias"}
        return {}

    def constants(self):
        """Index buffers that the reference stores and that follow from the sizes; files may have them or not."""
        constants = {f"vision_encoder.blocks.{i}.attn.relative_position_index": self.vision.position_index
                     for i in range(self.sizes.vision_layers)}
        constants["text_encoder.embeddings.position_ids"] = torch.arange(self.sizes.text_positions)[None]
        if self.task == "xgqa":
            constants["text_decoder.bert.embeddings.position_ids"] = torch.arange(self.sizes.decoder_positions)[None]
        return constants

    def config(self):
        """What a file must hold beside the tensors, because no shape tells it: `read_sizes` asks for it."""
        return {"text_heads": self.sizes.text_heads, "cross_heads": self.sizes.cross_heads,
                "decoder_positions": self.sizes.decoder_positions}


def mlp_head(width, outputs):
    return nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width, eps=1e-5), nn.GELU(),
                         nn.Linear(2 * width, outputs))


class MaskedLanguageHead(nn.Module):
    """Pre-training only. Its output matrix is its own, not tied to the word embeddings."""

    def __init__(self, width, vocabulary):
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-5)
        self.output = nn.Linear(width, vocabulary)

    def forward(self, hidden):
        return self.output(self.norm(F.gelu(self.dense(hidden))))


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval: gathering over processes, contrastive loss, hard negatives


def gather(x):
    """Rows of all processes, in rank order; gradients flow back to the process that made them,
    summed over the processes that used them.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return x
    return Gather.apply(x.contiguous())


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(context, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # reduced in place
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_texts(text_states, attention_mask):
    """`gather` for texts that each process padded to its own length."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return text_states, attention_mask
    length = torch.tensor(text_states.shape[1], device=text_states.device)
    dist.all_reduce(length, dist.ReduceOp.MAX)
    return gather(pad_to(text_states, int(length))), gather(pad_to(attention_mask, int(length)))


def pad_to(x, length):
    """Zeros after position T of [B,T] or [B,T,D]."""
    missing = length - x.shape[1]
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))


def contrastive_loss(to_images, to_texts, same_image):
    """Mean of both directions' cross-entropies; every pair of one image is a positive, sharing the probability.

    Logits [B, B of all].
    """
    targets = same_image.float() / same_image.sum(1, keepdim=True)
    return (F.cross_entropy(to_images, targets) + F.cross_entropy(to_texts, targets)) / 2


def negative_weights(logits, same_image):
    """How likely each candidate is to be drawn as the negative of its row: the more similar, the
    likelier; never one of the same image.
    """
    return (logits.softmax(1) + 1e-5).masked_fill(same_image, 0)


def draw(weights, uniform):
    """One column index per row, with probability proportional to its weight; `uniform` [B] in
    [0,1) decides which (inverse of the CDF).
    """
    n = weights.shape[1]
    # the running sums; torch 2.11 has no deterministic cumsum of floats on a GPU
    cumulative = weights.double() @ torch.ones(n, n, dtype=torch.double, device=weights.device).triu()
    return (cumulative <= uniform.double()[:, None] * cumulative[:, -1:]).sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# xGQA: the answer decoder


class AnswerDecoder(nn.Module):
    """6-layer BERT decoder over answer tokens that attends to all states of the fused question.

    The output matrix is its word embedding.
    """

    def __init__(self, sizes, dropout):
        super().__init__()
        s = sizes
        self.embeddings = TextEmbeddings(s.vocabulary, s.width, s.decoder_positions, s.decoder_types, 1e-12, dropout,
                                         bert_positions=True)
        self.layers = nn.ModuleList(
            TransformerLayer(s.width, s.cross_heads, s.cross_feed_forward, 1e-12, dropout, s.width)
            for _ in range(s.cross_layers))
        self.dense, self.norm = nn.Linear(s.width, s.width), nn.LayerNorm(s.width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(s.vocabulary))

    def transform(self, hidden):
        """What meets the output matrix: [...,D] -> [...,D]."""
        return self.norm(F.gelu(self.dense(hidden)))

    def logits(self, hidden):
        """[...,D] -> [...,V]."""
        return F.linear(self.transform(hidden), self.embeddings.word.weight, self.bias)

    def memory(self, question_states):
        return [layer.cross_attention.keys_values(question_states) for layer in self.layers]

    def decode(self, answer_ids, memory, question_mask):
        """Teacher forcing. answer_ids [A,L], memory and question_mask of A questions -> hidden states [A,L,D]."""
        length = answer_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=answer_ids.device).tril()
        mask = causal & key_mask(answer_ids != PAD)  # [A,1,L,L]
        hidden = self.embeddings(answer_ids)
        for layer, keys_values in zip(self.layers, memory):
            hidden = layer(hidden, mask, memory_kv=keys_values, memory_mask=key_mask(question_mask))
        return hidden

    def step(self, tokens, positions, path, memory, question_mask):
        """One more token for n prefixes.

        tokens, positions [n]; path [n,depth,layers,2,H,D/H]: keys and values of the tokens before, None for <s>.

        -> hidden states [n,D], and the new tokens' own keys and values [n,layers,2,H,D/H].
        """
        hidden, own = self.embeddings.embed(tokens[:, None], positions[:, None]), []  # [n,1,D]
        depth = 0 if path is None else path.shape[1]
        # shorter paths are padded after their end …
        mask = torch.arange(depth + 1, device=tokens.device) < positions[:, None]
        mask[:, depth] = True  # … and the token itself comes last
        for i, layer in enumerate(self.layers):
            keys_values = layer.self_attention.keys_values(hidden)  # 2 x [n,H,1,D/H]
            own.append(torch.stack([part[:, :, 0] for part in keys_values], dim=1))
            if depth:
                past = path[:, :, i].permute(2, 0, 3, 1, 4)  # [2,n,H,depth,D/H]
                keys_values = [torch.cat(parts, dim=2) for parts in zip(past, keys_values)]
            hidden = layer(hidden, mask[:, None, None], keys_values, memory[i], key_mask(question_mask))
        return hidden[:, 0], torch.stack(own, dim=1)

    def answer_losses(self, question_states, question_mask, answer_ids, answer_question, real=None):
        """-log p of every answer, summed over its tokens after <s>, </s> included: [A].

        real: `real_targets` of answer_ids, where known; only these meet the vocabulary.
        """
        real = real_targets(answer_ids) if real is None else real
        memory = select(self.memory(question_states), answer_question)
        hidden = self.decode(answer_ids, memory, question_mask[answer_question])[:, :-1]
        losses = F.cross_entropy(self.logits(hidden.flatten(0, 1)[real]), answer_ids[:, 1:].flatten()[real],
                                 reduction="none")
        return losses.new_zeros(hidden.shape[:2]).flatten().scatter(0, real, losses).view(hidden.shape[:2]).sum(1)

    def rank_answers(self, question_states, question_mask, candidate_ids, k):
        """The reference's ranking: preselect the k candidates with the likeliest first token, then score them in full.

        The first token's log-probability is counted twice (once in the preselection, once in the score); `best_answers`
        does neither. candidate_ids [A,L] -> (indices [Q,k], probabilities over the k [Q,k]), best first.
        """
        memory, questions = self.memory(question_states), len(question_states)
        bos = candidate_ids[:1, :1].expand(questions, 1)
        # [Q,A]
        first = self.logits(self.decode(bos, memory, question_mask)[:, 0]).log_softmax(-1)[:, candidate_ids[:, 1]]
        first, top = first.topk(k)
        rows = torch.arange(questions, device=top.device).repeat_interleave(k)
        losses = self.answer_losses(question_states, question_mask, candidate_ids[top.flatten()], rows)
        scores = first - losses.view(questions, k)
        scores, order = scores.softmax(-1).sort(descending=True)
        return top.gather(1, order), scores


def real_targets(answer_ids):
    """[A,L] -> which of the A x (L - 1) tokens after the first are no padding: positions in the flattened matrix."""
    return (answer_ids[:, 1:] != PAD).flatten().nonzero()[:, 0]


class AnswerTrie:
    """All labels' token sequences merged by common prefix.

    Node 0 is <s>; every other node is one token after its parent.

    Tensors: tokens, depths, labels [N] (index of the label that ends here, or -1); ancestors [N, deepest]
    (the path from <s> down to the parent, padded with 0); on_path [N, deepest] tells the padding; the children of
    node n are child_nodes[child_start[n] : child_start[n] + child_count[n]]; vocabulary [S]: the tokens that occur,
    </s> first, and columns [N]: where each node's token is in it.
    """

    def __init__(self, answers, device):
        """answers: token ids of every label, without <s> and </s>."""
        children, tokens, labels, paths = [{}], [BOS], [-1], [[]]
        for label, answer in enumerate(answers):
            node = 0
            for token in answer:
                if token not in children[node]:
                    children[node][token] = len(tokens)
                    children.append({})
                    tokens.append(token)
                    labels.append(-1)
                    paths.append(paths[node] + [node])
                node = children[node][token]
            if labels[node] == -1:  # labels with the same tokens cannot be told apart: the first one stands for all
                labels[node] = label
        deepest = max(len(path) for path in paths)
        column = {token: i for i, token in enumerate(dict.fromkeys([EOS, *tokens[1:]]))}
        self.tokens = torch.tensor(tokens, device=device)
        self.labels = torch.tensor(labels, device=device)
        self.depths = torch.tensor([len(path) for path in paths], device=device)
        self.ancestors = torch.tensor([path + [0] * (deepest - len(path)) for path in paths], dtype=torch.long,
                                      device=device)
        self.on_path = torch.arange(deepest, device=device) < self.depths[:, None]
        self.child_count = torch.tensor([len(c) for c in children], device=device)
        self.child_start = self.child_count.cumsum(0) - self.child_count
        self.child_nodes = torch.tensor([n for c in children for n in c.values()], dtype=torch.long, device=device)
        self.vocabulary = torch.tensor(list(column), device=device)
        self.columns = torch.tensor([0, *(column[token] for token in tokens[1:])], device=device)

    def children(self, nodes):
        """nodes [n] -> (row [c], child [c]): every child node and the row of `nodes` that holds its parent."""
        count = self.child_count[nodes]
        row = torch.repeat_interleave(count)
        position = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        return row, self.child_nodes[self.child_start[nodes][row] + position]


class Normalizer:
    """log sum exp of the logits over the whole vocabulary, exactly, or bounded from below at a hundredth of the cost.

    The logits of the labels' own tokens are needed anyway. The other tokens count as many times the exponential of
    their mean logit, which no sum of exponentials falls below (Jensen); the mean logit is that of the mean row.
    """

    def __init__(self, decoder, trie):
        self.matrix, self.bias = decoder.embeddings.word.weight.float(), decoder.bias.float()  # [V,D], [V]
        self.label_matrix, self.label_bias = self.matrix[trie.vocabulary], self.bias[trie.vocabulary]  # [S,D], [S]
        self.others = len(self.bias) - len(trie.vocabulary)
        self.mean_row = (self.matrix.sum(0) - self.label_matrix.sum(0)) / max(1, self.others)
        self.mean_bias = (self.bias.sum() - self.label_bias.sum()) / max(1, self.others)

    def bounded(self, states):
        """[n,D] -> logits of the labels' tokens [n,S], lower bound of the normaliser [n]."""
        logits = F.linear(states, self.label_matrix, self.label_bias)
        log_sum = logits.logsumexp(1)
        if self.others:
            log_sum = torch.logaddexp(log_sum, states @ self.mean_row + self.mean_bias + math.log(self.others))
        return logits, log_sum

    def exact(self, states):
        return F.linear(states, self.matrix, self.bias).logsumexp(1)  # [n,D] -> [n,V] -> [n]


@torch.no_grad()
def best_answers(decoder, question_states, question_mask, trie, logits_at_once=1 << 26):
    """Exact argmax over all labels of log p(label </s> | question), without scoring most of
    them: (labels [Q], log-likelihoods [Q]).

    Two things save nearly all of the work, and neither changes the result. Nothing that continues a prefix can be
    likelier than the prefix: only prefixes likelier than the best label found so far are continued, each once, from
    the keys and values of the tokens before. And a probability needs the logits of the whole vocabulary only where
    a bound (see `Normalizer`) does not already tell that the label has lost. `logits_at_once` bounds memory: elements
    of the largest [prefixes, V] tensor.
    """
    device = question_states.device
    memory = decoder.memory(question_states)  # once for all prefixes of a question
    normalizer = Normalizer(decoder, trie)
    chunk = max(1, logits_at_once // len(decoder.bias))
    shape = (len(question_states), len(trie.tokens))
    reached = torch.full(shape, -torch.inf, device=device)  # sum of the logits of a prefix's tokens [Q,N]
    reached[:, 0] = 0
    ended = torch.full(shape, -torch.inf, device=device)  # logit of </s> after a prefix that is a label [Q,N]
    normalizers = torch.zeros(shape, device=device)  # of the token after each prefix that was run [Q,N] …
    run, exact = (torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(2))  # … and whether exact [Q,N]
    slot = torch.zeros(shape, dtype=torch.long, device=device)  # row of `states` and `cache` of a prefix [Q,N]
    states = torch.zeros(0, question_states.shape[2], device=device)  # [slots,D]
    cache = None  # keys and values [slots,layers,2,H,D/H]

    def along_path(values, empty):
        """Per node, its ancestors' values: [Q,N] -> [Q,N,deepest]."""
        return values[:, trie.ancestors].masked_fill(~trie.on_path, empty)

    def chunks(mask):
        q, n = mask.nonzero(as_tuple=True)
        return ((q[i : i + chunk], n[i : i + chunk]) for i in range(0, len(q), chunk))

    while True:
        # no prefix is likelier than this, and no label: [Q,N]
        prefix = reached - along_path(normalizers, 0.0).sum(2)
        complete = prefix + ended - normalizers
        certain = exact & along_path(exact, True).all(2)
        best, best_node = complete.masked_fill(~certain, -torch.inf).max(1)
        ahead, doubtful = ~run & (prefix > best[:, None]), ~certain & (complete > best[:, None])
        # before the first certain label: dive along the likeliest prefix to a label, then make it certain
        first, label_reached = best.isinf(), doubtful.any(1)
        dive = F.one_hot(prefix.masked_fill(run, -torch.inf).argmax(1), shape[1]).bool()
        likeliest = F.one_hot(complete.argmax(1), shape[1]).bool()
        ahead &= ~first[:, None] | dive & ~label_reached[:, None]
        doubtful &= ~first[:, None] | likeliest
        if not (ahead.any() or doubtful.any()):
            return trie.labels[best_node], best

        new_states, new_cache = [states], [] if cache is None else [cache]
        for q, n in chunks(ahead):
            depth = int(trie.depths[n].max())
            # [n,depth,layers,2,H,D/H]
            path = None if depth == 0 else cache[slot[q[:, None], trie.ancestors[n, :depth]]]
            hidden, own = decoder.step(trie.tokens[n], trie.depths[n], path, select(memory, q), question_mask[q])
            slot[q, n] = sum(map(len, new_states)) + torch.arange(len(n), device=device)
            with torch.autocast(device.type, enabled=False):  # log-likelihoods are compared closely: float32
                state = decoder.transform(hidden.float())  # [n,D]
                logits, normalizers[q, n] = normalizer.bounded(state)
            new_states.append(state)
            new_cache.append(own)
            row, child = trie.children(n)
            reached[q[row], child] = reached[q, n][row] + logits[row, trie.columns[child]]
            ended[q, n] = logits[:, 0].masked_fill(trie.labels[n] < 0, -torch.inf)
        states, cache = torch.cat(new_states), torch.cat(new_cache) if new_cache else cache
        run |= ahead

        q, n = doubtful.nonzero(as_tuple=True)
        wanted = doubtful.clone()
        wanted[q[:, None], trie.ancestors[n]] = True  # padding asks for <s>, which is on every path
        for q, n in chunks(wanted & ~exact):
            with torch.autocast(device.type, enabled=False):
                normalizers[q, n] = normalizer.exact(states[slot[q, n]])
        exact |= wanted


# ---------------------------------------------------------------------------------------------------------------------
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
    (r"^mlm_head\.dense\.", "mlm_head.predictions.transform.dense."),
    (r"^mlm_head\.norm\.", "mlm_head.predictions.transform.LayerNorm."),
    (r"^mlm_head\.output\.weight", "mlm_head.predictions.decoder.weight"),
    (r"^mlm_head\.output\.bias", "mlm_head.predictions.bias"),
]


def read_sizes(tensors, config, source):
    """Sizes of the CCLM in a checkpoint, from its shapes. Heads are 64 wide unless the file's config says otherwise."""

    def shape(name, dimensions=2):
        return shape_of(tensors, name, dimensions, source, "CCLM")

    vision_width, _, patch_size, _ = shape("vision_encoder.patch_embed.proj.weight", 4)
    table_rows, vision_heads = shape("vision_encoder.blocks.0.attn.relative_position_bias_table")
    vocabulary, width = shape("text_encoder.embeddings.word_embeddings.weight")
    heads = max(1, width // 64)
    sizes = Sizes(
        width=width, vocabulary=vocabulary,
        text_layers=count_layers(tensors, "text_encoder.encoder.layer."),
        cross_layers=count_layers(tensors, "cross_encoder.encoder.layer."),
        text_heads=size_of(config, "text_heads", heads, source, width),
        cross_heads=size_of(config, "cross_heads", heads, source, width),
        text_feed_forward=shape("text_encoder.encoder.layer.0.intermediate.dense.weight")[0],
        cross_feed_forward=shape("cross_encoder.encoder.layer.0.intermediate.dense.weight")[0],
        text_positions=shape("text_encoder.embeddings.position_embeddings.weight")[0],
        text_types=shape("text_encoder.embeddings.token_type_embeddings.weight")[0],
        vision_width=vision_width, vision_layers=count_layers(tensors, "vision_encoder.blocks."),
        vision_heads=vision_heads,
        vision_feed_forward=shape("vision_encoder.blocks.0.mlp.fc1.weight")[0], patch_size=patch_size,
        image_size=(round(max(0, table_rows - 3) ** 0.5) + 1) // 2 * patch_size,
        embed_dim=shape("vision_proj.weight")[0] if "vision_proj.weight" in tensors else 0,
        decoder_positions=size_of(config, "decoder_positions", 512, source))
    if "text_decoder.bert.embeddings.word_embeddings.weight" in tensors:
        sizes = replace(sizes, decoder_positions=shape("text_decoder.bert.embeddings.position_embeddings.weight")[0],
                        decoder_types=shape("text_decoder.bert.embeddings.token_type_embeddings.weight")[0])
    return sizes


def from_pretrained(tensors, config, task, image_size, source, **options):
    """CCLM for `task` from the released pre-training checkpoint; `options` go to the constructor.

    The file must be exactly that: all of its tensors, with the right shapes, and no other. What the task does not need
    is left out (masked language and box heads; for xGQA and XVNLI also the contrastive and matching heads), what the
    file lacks keeps its initialisation (XVNLI: cls_head; xGQA: the decoder's embeddings and output layers, while its
    layers start as copies of the cross-modal layers).
    Relative position tables are resized to `image_size`. Raises ValueError, one line, for any other file.
    """
    sizes = read_sizes(tensors, config, source)
    with torch.device("meta"):  # shapes only
        check_file(CCLM(sizes, "pretraining"), tensors, source)
    if image_size % sizes.patch_size:
        raise ValueError(f"{source}: an image of {image_size} pixels a side does not divide into patches of "
                         f"{sizes.patch_size}")
    model = CCLM(replace(sizes, image_size=image_size), task, **options)
    names = {ours: theirs.replace("text_decoder.bert.encoder.", "cross_encoder.encoder.")
             for ours, theirs in model.checkpoint_names().items()}
    names = {ours: theirs for ours, theirs in names.items() if theirs in tensors}
    table_rows = len(model.vision.blocks[0].attn.relative_position_bias_table)
    tables = {name: resize_position_table(tensor, table_rows) for name, tensor in tensors.items()
              if name.endswith("relative_position_bias_table")}
    copy_tensors(model, tensors | tables, names)
    return model


def from_finetuned(tensors, config, task, source, **options):
    """CCLM from a file that holds the fine-tuned model of this very task (ours or the reference's).

    Raises ValueError for any other file.
    """
    sizes = read_sizes(tensors, config, source)
    return load_finetuned(lambda: CCLM(sizes, task, **options), tensors, source)
