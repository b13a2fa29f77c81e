"""BEiT-2 vision transformer: the image encoder of CCLM (paper, section 3).

A pre-LN transformer over 16x16 patches without position embeddings: position enters each block
through its own learned table of relative position biases, added to the attention scores. Residual
branches are scaled by learned vectors (layer scale) and dropped at random in training (stochastic
depth). Pre-trained at 224x224 and fine-tuned at 384x384, so the tables must be resized:
`resize_position_table`.

Parameter names are those of the official checkpoint, but for the prefix and patch_embed.proj.
Letters: B batch, P patches ((R/16) squared), D width, H heads, R image side, w window side.
"""

import torch
from torch import nn
from torch.nn import Conv2d, LayerNorm, Linear, Parameter
from torch.nn import functional as F

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's statistics, RGB in [0, 1]
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize(images):
    """uint8 pixels [B,3,R,R] -> float32, zero mean and unit variance."""
    # on the device: bytes travel there, not floats
    mean = torch.tensor(IMAGE_MEAN, device=images.device)
    std = torch.tensor(IMAGE_STD, device=images.device)
    shares = images.float() / 255
    return (shares - mean.view(3, 1, 1)) / std.view(3, 1, 1)


class BlockAttention(nn.Module):
    """Self-attention with one qkv matrix and a relative position bias; keys have no bias."""

    def __init__(self, width, heads, side):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = Parameter(torch.zeros(width))
        self.v_bias = Parameter(torch.zeros(width))
        rows = (2 * side - 1) ** 2 + 3
        self.relative_position_bias_table = Parameter(torch.zeros(rows, heads))
        self.proj = Linear(width, width)

    def forward(self, x, position_index):
        """[B,1+P,D] -> [B,1+P,D]."""
        no_bias = torch.zeros_like(self.q_bias)
        bias = torch.cat([self.q_bias, no_bias, self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)  # [B,1+P,3D]
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # [B,1+P,3,H,D/H]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # 3 x [B,H,1+P,D/H]
        # index_select on the transposed table: its gradient is several times faster than that of
        # table[position_index]
        table = self.relative_position_bias_table.T  # [H,rows]
        position_bias = table.index_select(1, position_index.flatten())
        position_bias = position_bias.unflatten(1, position_index.shape)  # [H,1+P,1+P]
        mask = position_bias.to(query.dtype)[None]
        # softmax(q kᵀ / sqrt(D/H) + position bias) v, fused
        heads = F.scaled_dot_product_attention(query, key, value, mask)
        attended = heads.transpose(1, 2).flatten(2)  # [B,H,1+P,D/H] -> [B,1+P,D]
        return self.proj(attended)


class Mlp(nn.Module):
    """Two layers with GELU between them."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x):
        x = F.gelu(self.fc1(x))
        return self.fc2(x)


class Block(nn.Module):
    """Pre-LN block: x + gamma_1 * attention(norm1(x)), then the same with the MLP (layer scale)."""

    def __init__(self, width, heads, hidden, side, drop_path):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = LayerNorm(width, eps=1e-6)
        self.norm2 = LayerNorm(width, eps=1e-6)
        self.attn = BlockAttention(width, heads, side)
        self.mlp = Mlp(width, hidden)
        gamma = torch.full((width,), 0.1)
        self.gamma_1 = Parameter(gamma)
        self.gamma_2 = Parameter(gamma.clone())

    def scale(self, gamma, images):
        """Factor of a residual branch: gamma [D], in training [B,1,D] with stochastic depth."""
        if not self.training or self.drop_path == 0:
            return gamma
        # 0 for a random share of the images; the others make up for it
        keep = 1 - self.drop_path
        kept = gamma.new_empty(images, 1, 1).bernoulli_(keep)
        return gamma * kept / keep

    def forward(self, x, position_index):
        """[B,1+P,D] -> [B,1+P,D]."""
        # addcmul: x + scale * branch in one pass over memory
        attended = self.attn(self.norm1(x), position_index)
        scale = self.scale(self.gamma_1, len(x))
        x = torch.addcmul(x, scale, attended)
        scale = self.scale(self.gamma_2, len(x))
        fed = self.mlp(self.norm2(x))
        return torch.addcmul(x, scale, fed)


class VisionTransformer(nn.Module):
    """Images -> the mean of the normalised patches, which stands for the whole image, then these.

    The reference's class token takes part in the attention and is dropped at the end.
    """

    def __init__(self, width, heads, depth, hidden, patch_size, image_size, drop_path=0.1):
        super().__init__()
        side = image_size // patch_size
        self.image_size = image_size
        self.cls_token = Parameter(torch.zeros(1, 1, width))
        self.patch_embed = Conv2d(3, width, patch_size, patch_size)
        self.blocks = nn.ModuleList()
        for i in range(depth):
            # from 0 in the first block to drop_path in the last
            rate = drop_path * i / max(1, depth - 1)
            block = Block(width, heads, hidden, side, rate)
            self.blocks.append(block)
        self.fc_norm = LayerNorm(width, eps=1e-6)
        # the same for every block and a function of the size alone: computed, never loaded
        position_index = relative_position_index(side)
        self.register_buffer("position_index", position_index, persistent=False)

    def forward(self, images):
        """[B,3,R,R] normalised -> [B,1+P,D]."""
        x = self.patch_embed(images)  # [B,D,R/16,R/16]
        x = x.flatten(2).transpose(1, 2)  # [B,P,D]
        cls_token = self.cls_token.to(x.dtype)
        cls_tokens = cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls_tokens, x], dim=1)  # [B,1+P,D]
        for block in self.blocks:
            x = block(x, self.position_index)
        patches = self.fc_norm(x[:, 1:])  # [B,P,D]
        mean = patches.mean(1, keepdim=True)  # [B,1,D]
        return torch.cat([mean, patches], dim=1)  # [B,1+P,D]

    @torch.no_grad()
    def init_weights(self):
        """BEiT's initialisation, for models that start from nothing."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, (Linear, Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # the matrix that ends a branch starts the smaller, the deeper its block
        for depth, block in enumerate(self.blocks):
            divisor = (2 * (depth + 1)) ** 0.5
            block.attn.proj.weight /= divisor
            block.mlp.fc2.weight /= divisor


# --------------------------------------------------------------------------------------------------
# Relative positions


def relative_position_index(side):
    """Row of the bias table for every (query, key) of the class token and side x side patches.

    -> [1+P,1+P]. The table's last three rows are (class token -> patch), (patch -> class token)
    and (class token -> itself).
    """
    patches = torch.arange(side * side)
    rows, columns = patches // side, patches % side  # [P]
    # offsets between patches, from 1 - side to side - 1, counted from 0
    down = rows[:, None] - rows + side - 1  # [P,P]
    right = columns[:, None] - columns + side - 1
    span = 2 * side - 1
    offsets = span**2
    # the first row and column belong to the class token
    tokens = side * side + 1
    index = torch.full((tokens, tokens), offsets)
    index[1:, 1:] = down * span + right
    index[1:, 0] = offsets + 1
    index[0, 0] = offsets + 2
    return index


def resize_position_table(table, new_length):
    """Resize a bias table to another window: [(2w-1)²+3, H] -> [new_length, H]; float64 inside.

    As the reference does, without SciPy: the offsets of the old window are placed on a geometric
    grid that reaches as far as the new window (dense in the middle, where neighbours differ most),
    and a bicubic spline through them is read at the new integer offsets.
    """
    old = round((len(table) - 3) ** 0.5)  # 2w - 1
    new = round((new_length - 3) ** 0.5)
    if old == new:
        return table
    source = geometric_offsets(old, new)
    # nothing is read outside of the grid
    target = torch.arange(new, dtype=torch.float64) - new // 2
    target = target.clamp(source[0], source[-1])
    spline = cubic_spline_matrix(source, target)  # [new,old]
    # the rows about the class token are kept
    offsets, cls_rows = table[:-3], table[-3:]
    grid = offsets.double().view(old, old, -1)  # [old,old,H]
    grid = torch.einsum("yi,xj,ijh->yxh", spline, spline, grid)  # [new,new,H]
    offsets = grid.flatten(0, 1).to(table.dtype)  # [new²,H]
    return torch.cat([offsets, cls_rows])


def geometric_offsets(old, new):
    """`old` offsets 0, ±1, ±(1+q), ±(1+q+q²), … that reach new // 2."""
    # the ratio q by bisection, as the reference finds it
    left, right = 1.01, 1.5
    while right - left > 1e-6:
        q = (left + right) / 2
        reach = (1 - q ** (old // 2)) / (1 - q)
        if reach > new // 2:
            right = q
        else:
            left = q
    steps = [q**i for i in range(old // 2)]
    positive = torch.tensor(steps, dtype=torch.float64).cumsum(0)
    zero = positive.new_zeros(1)
    return torch.cat([-positive.flip(0), zero, positive])


def cubic_spline_matrix(knots, points):
    """Matrix M [points,knots]: M @ values is the not-a-knot cubic spline through (knots, values).

    These splines are sums of 1, x, x², x³ and, for every knot but the outer two at either end,
    (x - knot)³ where x is above it: as many functions as knots. At least five knots are needed.
    """
    # in units of the outermost knot, for the sake of rounding
    unit = knots[-1]
    inner = knots[2:-2] / unit
    values = []  # of these functions, at the knots and at the points
    for x in (knots, points):
        x = x[:, None] / unit
        powers = x ** torch.arange(4)  # [x,4]
        cubes = (x - inner).clamp(min=0) ** 3  # [x,knots-4]
        both = torch.cat([powers, cubes], dim=1)
        values.append(both)  # [x,knots]
    # solves M @ (functions at the knots) = functions at the points
    return torch.linalg.solve(*values, left=False)
