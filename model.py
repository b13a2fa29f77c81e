"""Transformer parts that UC2 and CCLM share, and strict loading of checkpoints.

Both models of the paper are BERT-shaped (post-LN) encoders built from XLM-R. Everything they have in common is
here, once: one attention function, one layer (which serves as UC2's single-stream layer, as CCLM's text,
cross-modal and answer-decoder layer), one text embedding, and one way to move tensors between a checkpoint and a
model. This file knows nothing of tasks or files of data.

Letters in shape comments: B batch, T text tokens (queries), S keys, D width, H heads.
"""

import os
import re
import reprlib
import warnings
import zipfile

import torch
import torch.nn.functional as F
from torch import nn

PAD = 1  # XLM-R's (fairseq's) padding id: <s> 0, <pad> 1, </s> 2, <unk> 3


# ---------------------------------------------------------------------------------------------------------------------
# Layers


def attention(query, key, value, mask=None, dropout=0.0):
    """softmax(q kᵀ / sqrt(D/H) + mask) v, fused. query [B,H,T,D/H], key and value [B,H,S,D/H] -> [B,T,D].

    `mask` broadcasts to [B,H,T,S]: boolean (True = may be attended) or a float bias that is added to the scores.
    """
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return output.transpose(1, 2).flatten(2)  # [B,H,T,D/H] -> [B,T,D]


def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B,T,D] -> [B,H,T,D/H]


class Attention(nn.Module):
    """Multi-head attention whose keys and values are computed apart, so that they can be cached and shared."""

    def __init__(self, width, heads, memory_width=None, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(memory_width or width, width)
        self.value = nn.Linear(memory_width or width, width)
        self.output = nn.Linear(width, width)

    def keys_values(self, memory):
        """[B,S,D] -> two tensors [B,H,S,D/H]."""
        return split_heads(self.key(memory), self.heads), split_heads(self.value(memory), self.heads)

    def forward(self, x, keys_values, mask=None):
        """x [B,T,D], keys_values from `keys_values` (batch B, or 1: shared by the whole
        batch), mask as in `attention` -> [B,T,D].
        """
        keys, values = (kv.expand(len(x), -1, -1, -1) for kv in keys_values)
        dropout = self.dropout if self.training else 0.0
        return self.output(attention(split_heads(self.query(x), self.heads), keys, values, mask, dropout))


class TransformerLayer(nn.Module):
    """Post-LN layer: self-attention, cross-attention if it has a memory, feed-forward;
    each followed by residual and LayerNorm.
    """

    def __init__(self, width, heads, feed_forward, eps, dropout, memory_width=None):
        super().__init__()
        self.self_attention = Attention(width, heads, dropout=dropout)
        self.self_norm = nn.LayerNorm(width, eps=eps)
        if memory_width is not None:
            self.cross_attention = Attention(width, heads, memory_width, dropout)
            self.cross_norm = nn.LayerNorm(width, eps=eps)
        self.up = nn.Linear(width, feed_forward)
        self.down = nn.Linear(feed_forward, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden, mask, self_kv=None, memory_kv=None, memory_mask=None):
        """hidden [B,T,D] -> [B,T,D].

        self_kv: keys and values of the self-attention where they are not those of `hidden`
        itself (more tokens than are queried).
        memory_kv: `cross_attention.keys_values(memory)`, masks boolean [B,1,1 or T,S].
        """
        if self_kv is None:
            self_kv = self.self_attention.keys_values(hidden)
        hidden = self.self_norm(hidden + self.dropout(self.self_attention(hidden, self_kv, mask)))
        if memory_kv is not None:
            hidden = self.cross_norm(hidden + self.dropout(self.cross_attention(hidden, memory_kv, memory_mask)))
        return self.norm(hidden + self.dropout(self.down(F.gelu(self.up(hidden)))))

    def first_token(self, hidden, mask, **memory):
        """The layer's output for the first token alone, [B,T,D] -> [B,1,D]: all that a
        classifier on <s> needs of the last layer.
        """
        return self(hidden[:, :1], mask, self_kv=self.self_attention.keys_values(hidden), **memory)


class TextEmbeddings(nn.Module):
    """word + token type 0 + position, LayerNorm, dropout.

    Positions count from 2 and skip padding (XLM-R) or count from 0 (BERT).
    """

    def __init__(self, vocabulary, width, positions, types, eps, dropout, bert_positions=False):
        super().__init__()
        self.word = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(positions, width)
        self.token_type = nn.Embedding(types, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.bert_positions = bert_positions

    def forward(self, input_ids):
        """[B,T] -> [B,T,D]."""
        if self.bert_positions:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        else:
            real = (input_ids != PAD).long()
            positions = real.cumsum(1) * real + PAD
        return self.embed(input_ids, positions)

    def embed(self, input_ids, positions):
        return self.dropout(self.norm(self.word(input_ids) + self.token_type.weight[0] + self.position(positions)))


def select(memory, index):
    """Rows of an image memory (a list of pairs of tensors with one row per image): the image
    of each text, where texts share images.
    """
    return [(first[index], second[index]) for first, second in memory]


def in_float32(head, states):
    """head(states) without autocast: scores rounded to bf16 would tie, and their order would be an accident."""
    with torch.autocast(states.device.type, enabled=False):
        return head(states.float())


def key_mask(attention_mask):
    """[B,S] of 0/1 -> boolean [B,1,1,S], True where a key may be attended."""
    return attention_mask.bool()[:, None, None, :]


def init_weights(module):
    """BERT's initialisation, for what no checkpoint provides: normal(0, 0.02) matrices and
    tables, zero biases, identity LayerNorms.
    """
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: every tensor of the file and of the model is accounted for, by name and shape, or it is an error

# The names BERT gives to the parts of a `TransformerLayer`: (ours, theirs), regular expressions for `rename`.
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


def read_checkpoint(path):
    """-> (tensors, config): the state dict in a `torch.save` file and the dict stored
    beside it (empty where there is none).

    Only tensors and plain containers are accepted: nothing in the file is executed. Raises
    ValueError, one line, for a file that is not such.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    try:
        # torch maps only its zip format, not the older one
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # a damaged file can raise anything; what torch says of a hostile one is how to run it all the same
        raise ValueError(f"{path}: not a readable checkpoint of tensors alone, or a truncated one "
                         f"({type(error).__name__})") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected a dict of tensors, found {type(loaded).__name__}")
    tensors, config = loaded.get("model", loaded), loaded.get("config", {}) if "model" in loaded else {}
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"{path}: expected a dict of tensors under 'model'")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not torch.is_tensor(tensor):
            raise ValueError(f"{path}: entry {reprlib.repr(name)} is not a tensor")
        # a small file could claim a tensor of any shape, and the model would be made as large
        if (tensor.layout != torch.strided or tensor.device.type != "cpu"
                or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()):
            raise ValueError(f"{path}: tensor {name[:100]!r} of shape {reprlib.repr(list(tensor.shape))} has not a "
                             "number of its own for every element; expected dense tensors, saved in full")
    return tensors, config if isinstance(config, dict) else {}


def check_tensors(expected, tensors, source, optional=()):
    """Raise ValueError unless `tensors` has exactly the names and shapes of `expected` (name -> shape);
    those in `optional` may be there or not.

    The message is one line: the first offender, and how many more there are.
    """
    problems = [f"tensor '{name}' is missing (expected shape {list(shape)})"
                for name, shape in expected.items() if name not in tensors and name not in optional]
    problems += [f"unknown tensor '{name}'" for name in tensors if name not in expected and name not in optional]
    problems += [f"tensor '{name}' has shape {list(tensors[name].shape)}, expected {list(shape)}"
                 for name, shape in expected.items() if name in tensors and tensors[name].shape != torch.Size(shape)]
    problems += [f"tensor '{name}' is {tensors[name].dtype} ({tensors[name].layout}), "
                 "expected dense floating point numbers"
                 for name in expected if name in tensors
                 and not (tensors[name].is_floating_point() and tensors[name].layout == torch.strided)]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{source}: {problems[0]}{more}")


def shape_of(tensors, name, dimensions, source, kind):
    """Shape of one tensor that tells a size of the model; ValueError naming what the file is not,
    where it is missing or has other dimensions.
    """
    if name not in tensors:
        raise ValueError(f"{source}: not a {kind} checkpoint (no tensor '{name}')")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"{source}: tensor '{name}' has shape {list(shape)}, expected "
                         f"{'a matrix' if dimensions == 2 else f'{dimensions} dimensions'}")
    return shape


MAX_SIZE = 1 << 16  # what a config claims, no tensor of the file bears out; the largest in use are 512 positions


def size_of(config, name, default, source, parts_of=None):
    """A size that a checkpoint's config may give: a positive int up to MAX_SIZE, and one that divides
    `parts_of`; ValueError for anything else.
    """
    size = config.get(name, default)
    if type(size) is not int or not 1 <= size <= MAX_SIZE or parts_of is not None and parts_of % size:
        raise ValueError(f"{source}: the config's {name} is {reprlib.repr(size)}, expected a number from 1 to "
                         f"{MAX_SIZE:,}" + (f" that divides {parts_of}" if parts_of else ""))
    return size


def count_layers(tensors, prefix):
    """Number of different indices N for which a tensor named `prefix`N. exists."""
    return len({index for name in tensors
                if name.startswith(prefix) and (index := name[len(prefix):].split(".")[0]).isdigit()})


def file_shapes(model):
    """What a checkpoint of this very model holds: name in the file -> shape, second names (aliases) included."""
    names, parameters = model.checkpoint_names(), dict(model.named_parameters())
    shapes = {theirs: tuple(parameters[ours].shape) for ours, theirs in names.items()}
    shapes.update({alias: shapes[first] for alias, first in model.aliases().items()})
    return shapes


def check_file(model, tensors, source):
    """ValueError unless `tensors` is exactly a checkpoint of this model: every name and every shape.

    A warning if aliases differ from what they repeat.
    """
    check_tensors(file_shapes(model), tensors, source, optional=model.constants())
    differing = [(alias, first) for alias, first in model.aliases().items()
                 if tensors[alias].data_ptr() != tensors[first].data_ptr()
                 and not torch.equal(tensors[alias], tensors[first])]
    if differing:
        warnings.warn(f"{source}: '{differing[0][0]}' and '{differing[0][1]}' are one tensor under two names, but "
                      f"their values differ ({len(differing)} such pairs); the second one is used")


@torch.no_grad()
def copy_tensors(model, tensors, names=None):
    """Copy tensors[theirs] into our parameter, for every (ours, theirs) of `names` (default: all of the model's)."""
    parameters = dict(model.named_parameters())
    for ours, theirs in (names or model.checkpoint_names()).items():
        parameters[ours].copy_(tensors[theirs])


def load_finetuned(build, tensors, source):
    """The model that `build` makes, with the tensors of a file that holds exactly it. ValueError for any other file."""
    with torch.device("meta"):  # shapes only
        check_file(build(), tensors, source)
    model = build()
    copy_tensors(model, tensors)
    return model


def file_tensors(model):
    """The model as the reference code stores it: official names, aliases and index buffers included.

    The inverse of `copy_tensors`.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = {theirs: parameters[ours] for ours, theirs in model.checkpoint_names().items()}
    tensors.update({alias: tensors[first] for alias, first in model.aliases().items()})
    return tensors | model.constants()
