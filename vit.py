"""BEiT-2 vision transformer: the image encoder of CCLM (paper section 3, "Architecture-specific Implementation").

A pre-LN transformer over 16x16 patches without position embeddings: position enters each block through its own learned
table of relative position biases, added to the attention scores. Residual branches are scaled by learned vectors (layer
scale) and dropped at random in training (stochastic depth). Pre-trained at 224x224 and fine-tuned at 384x384, so the
tables must be resized: `resize_position_table`.

Parameter names are those of the official checkpoint, but for the prefix. Letters: B batch, P patches
(R/16 squared), D width, H heads, R image side.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model import attention, split_heads

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's statistics, RGB in [0, 1]
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize(images):
    """uint8 pixels [B,3,R,R] -> float32, zero mean and unit variance. Done on the device: bytes travel, not floats."""
    # filled on the device: a copy of three numbers from the host would make it wait for all that the device has to do
    mean, std = (torch.stack([torch.full((1, 1), value, device=images.device) for value in values])
                 for values in (IMAGE_MEAN, IMAGE_STD))  # [3,1,1]
    return (images.float() / 255 - mean) / std


class BlockAttention(nn.Module):
    """Self-attention with one fused qkv matrix, biases for queries and values only, and a relative position bias."""

    def __init__(self, width, heads, side):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + 3, heads))
        self.proj = nn.Linear(width, width)

    def forward(self, x, position_index):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])  # keys have no bias
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))  # [B,1+P,3,H,D/H]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # 3 x [B,H,1+P,D/H]
        # rows of the transposed table: its gradient is added up several times faster than that of table[position_index]
        position_bias = self.relative_position_bias_table.T.index_select(1, position_index.flatten())
        position_bias = position_bias.unflatten(1, position_index.shape).to(query.dtype)  # [H,1+P,1+P]
        return self.proj(self.attend(query, key, value, position_bias[None]))

    @staticmethod
    def attend(query, key, value, bias):
        large = len(query) * bias.numel() > 1 << 20  # scores; fewer stay in the processor's cache anyway
        if large and bias.requires_grad and bias.device.type == "cpu" and not torch.compiler.is_compiling():
            return BiasedAttention.apply(query, key, value, bias)
        return attention(query, key, value, bias)


class BiasedAttention(torch.autograd.Function):
    """`attention` with a trained bias, on a CPU.

    torch's fused kernel for CPUs has no gradient for the bias; with one it keeps the score matrices of all images and
    passes over them a dozen times. This one keeps none: forward is the fused kernel, backward takes the scores of one
    image at a time, which stay in the processor's cache.
    """

    @staticmethod
    def forward(ctx, query, key, value, bias):
        """query, key, value [B,H,1+P,D/H], bias [1,H,1+P,1+P] -> [B,1+P,D]."""
        output = attention(query, key, value, bias)
        ctx.save_for_backward(query, key, value, bias, output)
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, bias, output = ctx.saved_tensors
        output, gradient = (split_heads(x, query.shape[1]) for x in (output, gradient))  # [B,H,1+P,D/H]
        scale, past_softmax = query.shape[-1] ** -0.5, (output * gradient).sum(-1, keepdim=True)  # [B,H,1+P,1]
        to_query, to_key, to_value = (torch.empty_like(x) for x in (query, key, value))
        to_bias = torch.zeros_like(bias[0], dtype=torch.promote_types(bias.dtype, torch.float32))
        for i in range(len(query)):
            weights = torch.baddbmm(bias[0], query[i], key[i].mT, alpha=scale).softmax(-1)  # [H,1+P,1+P]
            to_value[i] = weights.mT @ gradient[i]
            to_scores = (gradient[i] @ value[i].mT).sub_(past_softmax[i]).mul_(weights)
            to_bias += to_scores
            to_query[i] = torch.bmm(to_scores, key[i]).mul_(scale)
            to_key[i] = torch.bmm(to_scores.mT, query[i]).mul_(scale)
        return to_query, to_key, to_value, to_bias[None].to(bias.dtype)


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-LN block: x + gamma_1 * attention(norm1(x)), then the same with the MLP (layer scale)."""

    def __init__(self, width, heads, hidden, side, drop_path):
        super().__init__()
        self.drop_path = drop_path
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = BlockAttention(width, heads, side)
        self.mlp = Mlp(width, hidden)
        self.gamma_1 = nn.Parameter(torch.full((width,), 0.1))
        self.gamma_2 = nn.Parameter(torch.full((width,), 0.1))

    def scale(self, gamma, images):
        """Factor of a residual branch, [D] or [B,1,D].

        Stochastic depth: in training, 0 for a random share of the images.
        """
        if not self.training or self.drop_path == 0:
            return gamma
        keep = 1 - self.drop_path
        return gamma * gamma.new_empty(images, 1, 1).bernoulli_(keep) / keep

    def forward(self, x, position_index):
        branch = self.attn(self.norm1(x), position_index)
        x = torch.addcmul(x, self.scale(self.gamma_1, len(x)), branch)  # x + scale * branch in one pass over memory
        return torch.addcmul(x, self.scale(self.gamma_2, len(x)), self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Images -> one token for the whole image (the mean of the normalised patches, not
    the class token), then the patches.
    """

    def __init__(self, width, heads, depth, hidden, patch_size, image_size, drop_path=0.1):
        super().__init__()
        side = image_size // patch_size
        self.image_size = image_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = nn.Conv2d(3, width, patch_size, patch_size)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, hidden, side, rate) for rate in rates)
        self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        # the same for every block and a function of the size alone: computed, never loaded
        self.register_buffer("position_index", relative_position_index(side), persistent=False)

    def forward(self, images):
        """[B,3,R,R] normalised -> [B,1+P,D]."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # [B,D,R/16,R/16] -> [B,P,D]
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)  # [B,1+P,D]
        for block in self.blocks:
            x = block(x, self.position_index)
        patches = self.fc_norm(x[:, 1:])  # the class token took part in attention and is dropped here
        return torch.cat([patches.mean(1, keepdim=True), patches], dim=1)  # [B,1+P,D]

    @torch.no_grad()
    def init_weights(self):
        """BEiT's initialisation, for models that start from nothing: normal(0, 0.02); what ends a block is the smaller,
        the higher it is.
        """
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for depth, block in enumerate(self.blocks):
            block.attn.proj.weight /= (2 * (depth + 1)) ** 0.5
            block.mlp.fc2.weight /= (2 * (depth + 1)) ** 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Relative positions


def relative_position_index(side):
    """Row of the bias table for every (query, key) pair of the class token and side x side patches: [1+P,1+P].

    The last three rows of the table are (class token -> patch), (patch -> class token), (class token -> itself).
    """
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()  # [P]
    down = rows[:, None] - rows[None, :] + side - 1  # 0 .. 2 side - 2
    right = columns[:, None] - columns[None, :] + side - 1
    offsets = (2 * side - 1) ** 2
    index = torch.full((side * side + 1, side * side + 1), offsets)
    index[1:, 1:] = down * (2 * side - 1) + right
    index[1:, 0] = offsets + 1
    index[0, 0] = offsets + 2
    return index


def resize_position_table(table, new_length):
    """Resize a bias table to another window: [(2w-1)²+3, H] -> [(2v-1)²+3, H], as the reference does, without SciPy.

    The offsets of the old window are placed on a geometric grid that reaches as far as the new window (dense in the
    middle, where neighbours differ most), and a bicubic spline through them is read at the new integer offsets.
    Rows about the class token are kept. In float64.
    """
    old, new = round((len(table) - 3) ** 0.5), round((new_length - 3) ** 0.5)
    if old * old + 3 != len(table) or new * new + 3 != new_length:
        raise ValueError(f"cannot resize a relative position table of {len(table)} rows to {new_length}: a square and "
                         "3 rows are expected")
    if old == new:
        return table
    if old < 5:
        raise ValueError(
            f"cannot resize a relative position table of {len(table)} rows: a spline needs at least 3 x 3 patches")
    source = geometric_offsets(old, new)
    target = torch.arange(-(new // 2), new // 2 + 1, dtype=torch.float64).clamp(source[0], source[-1])
    spline = cubic_spline_matrix(source, target)  # [new, old]
    grid = table[:-3].double().view(old, old, -1)  # [old,old,H]
    grid = torch.einsum("yi,xj,ijh->yxh", spline, spline, grid)  # [new,new,H]
    return torch.cat([grid.reshape(new * new, -1).to(table.dtype), table[-3:]])


def geometric_offsets(old, new):
    """`old` offsets 0, ±1, ±(1+q), ±(1+q+q²), …, with the ratio q that makes the outermost reach
    new // 2 (bisection as the reference's).
    """
    left, right = 1.01, 1.5
    while right - left > 1e-6:
        q = (left + right) / 2
        if (1 - q ** (old // 2)) / (1 - q) > new // 2:
            right = q
        else:
            left = q
    positive = torch.tensor([q**i for i in range(old // 2)], dtype=torch.float64).cumsum(0)
    return torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive])


def cubic_spline_matrix(knots, points):
    """Matrix M with (M @ values)[p] = value at points[p] of the not-a-knot cubic spline through (knots, values):
    [points, knots].

    These splines are the sums of 1, x, x², x³ and, for every knot but the outer two at either end, (x - knot)³ where
    x is above it: as many functions as knots.
    """
    def functions(x):  # -> [x, knots]; in units of the outermost knot, for the sake of rounding
        x, inner = x[:, None] / knots[-1], knots[2:-2] / knots[-1]
        return torch.cat([x ** torch.arange(4), (x - inner).clamp(min=0) ** 3], dim=1)

    return torch.linalg.solve(functions(knots), functions(points), left=False)
