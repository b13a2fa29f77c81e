"""Transformer parts that UC2 and CCLM share, and strict loading of checkpoints (paper, section 3).

Both models are BERT-shaped (post-LN) encoders built from XLM-R. What they have in common is here,
once: one layer (UC2's single-stream layer, CCLM's text, cross-modal and answer-decoder layer), one
text embedding, and one way to move tensors between a checkpoint and a model. This file knows
nothing of tasks or data.

Letters in shape comments: B texts, T text tokens (queries), S keys, D width, H heads.
"""

import re
import zipfile

import torch
from torch import nn
from torch.nn import Dropout, Embedding, LayerNorm, Linear
from torch.nn import functional as F

PAD = 1  # XLM-R's (fairseq's) padding id: <s> 0, <pad> 1, </s> 2, <unk> 3


# --------------------------------------------------------------------------------------------------
# Layers


def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B,T,D] -> [B,H,T,D/H]


class Attention(nn.Module):
    """Multi-head attention. Keys and values are a step of their own: texts can share them."""

    def __init__(self, width, heads, memory_width, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = Linear(width, width)
        self.key = Linear(memory_width, width)
        self.value = Linear(memory_width, width)
        self.output = Linear(width, width)

    def keys_values(self, memory):
        """[B,S,D] -> two tensors [B,H,S,D/H]."""
        return [split_heads(part(memory), self.heads) for part in (self.key, self.value)]

    def forward(self, x, keys_values, mask=None):
        """softmax(q kᵀ / sqrt(D/H)) v and the output projection: x [B,T,D] -> [B,T,D].

        keys_values: of B rows, or of fewer, K: then the first B/K rows of x share the first of
        them, and so on. mask: boolean, True where a key may be attended; broadcasts to [B,H,T,S]
        (or [K,H,T*B/K,S]).
        """
        keys, values = keys_values
        # texts that share keys become one long row of queries [K,T*B/K,D]: no key is copied
        query = self.query(x).reshape(len(keys), -1, x.shape[-1])
        query = split_heads(query, self.heads)
        # in training with dropout of the attention weights, inside the fused kernel
        heads = F.scaled_dot_product_attention(
            query, keys, values, mask, self.dropout * self.training)
        attended = heads.transpose(1, 2).flatten(2)  # [B,H,T,D/H] -> [B,T,D]
        return self.output(attended.view_as(x))


class TransformerLayer(nn.Module):
    """Post-LN layer: self-attention, cross-attention if there is a memory, feed-forward.

    Each is followed by dropout, the residual connection and LayerNorm. The memory is what
    cross-attention reads: states of the image, or of the question for the answer decoder.
    """

    def __init__(self, width, heads, feed_forward, eps, dropout, memory_width=None):
        super().__init__()
        self.self_attention = Attention(width, heads, width, dropout)
        self.self_norm = LayerNorm(width, eps=eps)
        if memory_width:
            self.cross_attention = Attention(width, heads, memory_width, dropout)
            self.cross_norm = LayerNorm(width, eps=eps)
        self.up = Linear(width, feed_forward)
        self.down = Linear(feed_forward, width)
        self.norm = LayerNorm(width, eps=eps)
        self.dropout = Dropout(dropout)

    def forward(self, hidden, mask, memory_kv=None, memory_mask=None, first_token=False):
        """hidden [B,T,D] -> [B,T,D], or only the first token's [B,1,D].

        memory_kv: `cross_attention.keys_values(memory)`; masks: boolean [B,1,1 or T,S].
        """
        tokens = hidden
        if first_token:
            # it attends to all tokens, but what becomes of the others is not computed
            hidden = tokens[:, :1]
        keys_values = self.self_attention.keys_values(tokens)
        attended = self.self_attention(hidden, keys_values, mask)
        hidden = self.self_norm(hidden + self.dropout(attended))
        if memory_kv:
            attended = self.cross_attention(hidden, memory_kv, memory_mask)
            hidden = self.cross_norm(hidden + self.dropout(attended))
        fed = self.down(F.gelu(self.up(hidden)))
        return self.norm(hidden + self.dropout(fed))


class TextEmbeddings(nn.Module):
    """word + token type 0 + position, LayerNorm, dropout."""

    def __init__(self, vocabulary, width, positions, types, eps, dropout):
        super().__init__()
        self.word = Embedding(vocabulary, width)
        self.position = Embedding(positions, width)
        self.token_type = Embedding(types, width)
        self.norm = LayerNorm(width, eps=eps)
        self.dropout = Dropout(dropout)

    def forward(self, input_ids, positions=None):
        """[B,T] -> [B,T,D]. positions: XLM-R's by default, which count from 2 and skip padding."""
        if positions is None:
            real = (input_ids != PAD).long()
            positions = real.cumsum(1) * real + PAD
        hidden = self.word(input_ids) + self.token_type.weight[0] + self.position(positions)
        return self.dropout(self.norm(hidden))


def select(memory, index):
    """Rows of an image memory, a list of pairs of tensors with one row per image."""
    return [(first[index], second[index]) for first, second in memory]


def in_float32(head, states):
    """head(states) without autocast: scores rounded to bf16 would tie."""
    with torch.autocast(states.device.type, enabled=False):
        return head(states.float())


def key_mask(attention_mask):
    """[B,S] of 0/1 -> boolean [B,1,1,S], True where a key may be attended."""
    return attention_mask.bool()[:, None, None]


def init_weights(module):
    """BERT's initialisation for what no checkpoint provides; LayerNorms are made as identity."""
    if isinstance(module, (Linear, Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


# --------------------------------------------------------------------------------------------------
# Checkpoints

# Keys under which other frameworks nest the tensors, and what wrappers add to their names
CONTAINERS = ("module", "model", "model_state_dict", "state_dict")
WRAPPERS = r"^((module|model|_orig_mod)\.)+|_orig_mod\.|_(fsdp|checkpoint)_wrapped_module\."

# What an unreadable file may be: how it begins -> what it is; the last that fits counts
KINDS = {
    rb"": "damaged or truncated",
    rb"PK": "another zip archive or a truncated one",
    rb"version https://git-lfs": "a Git LFS pointer; `git lfs pull` fetches the file itself",
    rb"\s*<": "a web page; download the file itself",
    rb"\s*\{": "JSON text",
    rb"\x1f\x8b": "a gzip archive; unpack it",
    rb"\x89HDF": "an HDF5 file",
    rb"(?s).{5}\0\0\0\{": "a safetensors file; write its tensors with torch.save",
}


class Foreign(dict):
    """Stands for any pickled object that is no tensor: takes its contents, runs no code of it."""

    def __init__(self, *ignored):
        pass

    __setstate__ = __init__


def read_checkpoint(path):
    """-> (tensors by name, the dict "config" beside them or {}) of a file that torch.save wrote.

    Nothing in the file is executed. Raises ValueError, one line, for any other file.
    """
    # torch's files are zip archives, which can be memory-mapped; its older ones are not
    is_zip = zipfile.is_zipfile(path)
    try:
        # arguments, schedulers, numpy's numbers beside the tensors: nothing of them is needed
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        with torch.serialization.safe_globals([(Foreign, name) for name in foreign]):
            content = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip))
    except OSError as error:  # no such file, a folder, no permission
        raise ValueError(f"{path}: {error.strerror}") from None
    except Exception:  # a damaged file can raise anything
        with open(path, "rb") as file:
            head = file.read(64)
        fitting = [kind for beginning, kind in KINDS.items() if re.match(beginning, head)]
        raise ValueError(f"{path}: not a readable checkpoint of tensors alone, but {fitting[-1]}") \
            from None

    # the tensors may lie in a dict of the file's …
    config = {}
    for key in CONTAINERS:
        if isinstance(content.get(key), dict):
            config = content.get("config", config)
            content = content[key]
    # … and wrappers have put something into their names
    tensors = {}
    for name, tensor in content.items():
        plain = re.sub(WRAPPERS, "", str(name))
        if plain in tensors or not torch.is_tensor(tensor):
            raise ValueError(f"{path}: entry {name!r} is not a tensor, or there twice")
        tensors[plain] = tensor
    if not tensors:
        raise ValueError(f"{path}: holds no tensors by name, such as those of a state_dict")
    return tensors, config


@torch.no_grad()
def load(model, tensors, source, whole=None):
    """Copy a checkpoint into `model`, and return the model.

    whole: a model with exactly the file's tensors (on the meta device); by default `model` itself.
    All of its tensors must be in the file and no others; index buffers (`constants`) may be there
    or not. What `model` lacks of them is not used; what only `model` has keeps its initialisation.
    Raises ValueError, one line: the first tensor that is missing, unknown or of another shape.
    """
    whole = whole or model
    expected, optional = file_tensors(whole), whole.constants()
    for name in expected | tensors:
        if name in optional:
            continue
        if name not in tensors:
            raise ValueError(f"{source}: tensor '{name}' is missing")
        if name not in expected:
            raise ValueError(f"{source}: unknown tensor '{name}'")
        if tensors[name].shape != expected[name].shape:
            raise ValueError(f"{source}: tensor '{name}' has shape {list(tensors[name].shape)}, "
                             f"expected {list(expected[name].shape)}")
    for ours, theirs in model.checkpoint_names().items():
        if theirs in tensors:
            model.get_parameter(ours).copy_(tensors[theirs])
    return model


def file_tensors(model):
    """The model as the reference stores it: official names, aliases, index buffers."""
    names = model.checkpoint_names()
    tensors = {theirs: model.get_parameter(ours).detach() for ours, theirs in names.items()}
    for alias, first in model.aliases().items():
        tensors[alias] = tensors[first]
    return tensors | model.constants()


# The names BERT gives to the parts of a `TransformerLayer`: (ours, theirs) for `rename`.
BERT_LAYER_NAMES = [
    (r"\.self_attention\.(query|key|value)\.", r".attention.self.\1."),
    (r"\.self_attention\.output\.", ".attention.output.dense."),
    (r"\.self_norm\.", ".attention.output.LayerNorm."),
    (r"\.cross_attention\.(query|key|value)\.", r".crossattention.self.\1."),
    (r"\.cross_attention\.output\.", ".crossattention.output.dense."),
    (r"\.cross_norm\.", ".crossattention.output.LayerNorm."),
    (r"(layers\.\d+)\.up\.", r"\1.intermediate.dense."),
    (r"(layers\.\d+)\.down\.", r"\1.output.dense."),
    (r"(layers\.\d+)\.norm\.", r"\1.output.LayerNorm."),
]


def rename(name, rules):
    """Apply every (pattern, replacement) of `rules` in turn."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def shape_of(tensors, name, source, kind):
    """Shape of a tensor that tells a size of the model. ValueError: the file is of no such kind."""
    if name not in tensors:
        raise ValueError(f"{source}: not a checkpoint of {kind}: no tensor '{name}'")
    return tensors[name].shape


def count_layers(tensors, prefix, part):
    """How many tensors are called PREFIX….PART: one in each layer."""
    return sum(name.startswith(prefix) and name.endswith(part) for name in tensors)
