"""Parameter-efficient transfer of CLIP: every method of the benchmark table, one name each.

Papers: "Parameter-Efficient Transfer Learning for Remote Sensing Image-Text Retrieval", arXiv 2308.12509, and
"Prompt Decoupling for Text-to-Image Person Re-identification", arXiv 2401.02173.

    model = load_clip("ViT-B/32")
    add_method(model, "mrs")        # CLIP is frozen; what the method added has requires_grad

CLIP knows nothing of this file. A method goes in by one of three moves, and that is the whole mechanism:
1. wrap a block: a module holds it as `.inner` and restates its two lines with the method in place; between them
   `keep` gives the tokens that the MLP is run for: all, but in the last block only the one that is read;
2. wrap a block or the transformer with `Prompted`: learned tokens go in before it and come out before its last MLP;
3. set `tower.head`.
Reads in two parts: the mechanism with the two papers' methods, then the rest of the table. The default sizes
(METHODS, at the end) give the counts of arXiv 2308.12509: most adapters are one module for all blocks.

Facts that bite: a bottleneck whose two matrices both start at zero never gets a gradient; new parameters are
float32 however CLIP is stored, so train under autocast; a module shared by several blocks is several times
in `state_dict()`, once in `trainable_state()`.

Shapes: B batch, L sequence length, C width of a tower, D joint width, m prompt length, h bottleneck.
"""
from collections import OrderedDict
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

TOWERS = {"image": "visual", "text": "text"}    # side: the attribute of CLIP


# ------------------------------------------------------------------------------------------ the mechanism

def blocks(model, side):
    """Blocks of one tower, [(path, block)], and their width C."""
    stack = f"{TOWERS[side]}.transformer.resblocks"
    found = [(f"{stack}.{i}", block) for i, block in enumerate(model.get_submodule(stack))]
    return found, found[0][1].ln_1.normalized_shape[0]


def replace(model, path, module):
    """Put `module` where `path` points; returns the path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return path


def wrap_blocks(wrapper, model, **sizes):
    """Wrap every block of both towers: wrapper(block, **sizes)."""
    return [replace(model, path, wrapper(block, **sizes))
            for side in TOWERS for path, block in blocks(model, side)[0]]


def add_method(model, name, **sizes):
    """Freeze CLIP and install one method; afterwards exactly the method's parameters have requires_grad.

    name and sizes: as in METHODS; None is the default. Returns the places touched, such as
    "visual.transformer.resblocks.0". Unknown names and sizes that touch no layer raise ValueError.
    """
    if name not in METHODS:
        raise ValueError(f"no method {name!r}: choose one of {', '.join(METHODS)}")
    if getattr(model, "method_parameters", None):
        raise ValueError(f"cannot add {name!r}: this model already has a method; start from a fresh CLIP")
    install, defaults = METHODS[name]
    sizes = {key: value for key, value in sizes.items() if value is not None}
    for key, value in sizes.items():
        if key not in defaults:
            raise ValueError(f"method {name!r} has no size {key!r}: it has {', '.join(defaults) or 'none'}")
        if key not in ("shared", "dropout") and value < 1:
            raise ValueError(f"{key} {value} touches no layer: it is 1 or more; plain CLIP is method 'none'")
    model.requires_grad_(False)
    with torch.device(model.logit_scale.device):    # new parameters are born beside CLIP, also on "meta"
        touched = install(model, **{**defaults, **sizes})
    model.train(model.training)                     # a model in eval() stays so: no dropout in what is new
    model.method_parameters = [key for key, value in model.named_parameters() if value.requires_grad]
    return touched


def trainable_state(model):
    """Name -> CPU tensor of what the method added or tunes, each tensor once (0.6 MB for the MRS-Adapter).

    It does not ask requires_grad: stage 2 of prompt decoupling fixes the prompts and still needs them.
    CLIP's own weights, where those were trained, are `model.openai_state_dict()`.
    """
    return {key: model.get_parameter(key).detach().cpu().clone() for key in getattr(model, "method_parameters", [])}


def load_trainable(model, state):
    """Load what `trainable_state` gave into a model with the same method of the same sizes.

    Missing, unknown or misshapen keys raise ValueError with the first 8 names; nothing is loaded then.
    """
    own = trainable_state(model)
    wrong = [f"missing {key}" for key in own if key not in state]
    wrong += [f"unknown {key}" for key in state if key not in own]
    wrong += [f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
              for key in own if key in state and state[key].shape != own[key].shape]
    if wrong:
        raise ValueError(f"weights of another method or size, {len(wrong)} misfits: {'; '.join(wrong[:8])}")
    with torch.no_grad():
        for key in own:
            model.get_parameter(key).copy_(state[key])


# ---------------------------------------------------------------------------- MRS-Adapter (arXiv 2308.12509)

def zero_start(downs, ups):
    """A bottleneck that adds nothing at first: down as Linear's own init, up and all biases zero."""
    for down in downs:
        nn.init.kaiming_uniform_(down.weight, a=5 ** 0.5)
        nn.init.zeros_(down.bias)
    for up in ups:
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)


class MRSAdapter(nn.Module):
    """Multimodal remote-sensing adapter: a bottleneck per modality, the last output dims common to both.

        h = Dropout(ReLU(W_down^m x)),   MRS(x) = [W_up^m h ; W_share h],   m the modality
    Init: zero_start, the identity. widths: {"image": C, "text": C}, or one of them. ViT-B/32, h = 64, 64 dims
    in common: down 49 216 + 32 832, up 45 760 + 29 120, share 4 160 = 161 088 parameters.
    """

    def __init__(self, widths, bottleneck=64, dropout=0.5, share=64):
        super().__init__()
        if min(widths.values()) <= share:
            raise ValueError(f"{type(self).__name__} shares {share} output dims, so both towers must be "
                             f"wider than that and are {widths}: take another method or a wider CLIP")
        self.down = nn.ModuleDict({side: nn.Linear(width, bottleneck) for side, width in widths.items()})
        self.up = nn.ModuleDict({side: nn.Linear(bottleneck, widths[side] - share) for side in widths})
        self.share = nn.Linear(bottleneck, share)
        self.dropout = nn.Dropout(dropout)
        zero_start(self.down.values(), [*self.up.values(), self.share])

    def forward(self, x, side):
        h = self.dropout(F.relu(self.down[side](x)))                          # (B, L, h)
        return torch.cat([self.up[side](h), self.share(h)], dim=-1)           # (B, L, C)


class MRSBlock(nn.Module):
    """An adapter beside the MLP, reading the stream before ln_2: by default all blocks share one MRS-Adapter."""
    places = 1

    def __init__(self, block, side, adapter):
        super().__init__()
        self.inner, self.side, self.adapter = block, side, adapter

    def forward(self, x, keep=nn.Identity()):
        block = self.inner
        x = keep(x + block.attn(block.ln_1(x)))
        return x + block.mlp(block.ln_2(x)) + self.adapter(x, self.side)


def add_adapter(wrapper, adapter, model, shared, **sizes):
    """Wrap every block of both towers with adapters that know both sides: wrapper(block, side, *adapters).

    shared: one adapter for every place in every block; otherwise one for each place of each depth, common to
    both towers where both are that deep.
    """
    stacks = {side: blocks(model, side) for side in TOWERS}
    widths = [{side: width for side, (stack, width) in stacks.items() if i < len(stack)}
              for i in range(max(len(stack) for stack, _ in stacks.values()))]
    own = [[adapter(sides, **sizes) for _ in range(wrapper.places)] for sides in widths]
    if shared:
        own = [[own[0][0]] * wrapper.places] * len(own)
    return [replace(model, path, wrapper(block, side, *own[i]))
            for side, (stack, _) in stacks.items() for i, (path, block) in enumerate(stack)]


# ------------------------------------------------------------------------------------------------- prompts

def with_prompts(inner, x, prompts, keep):
    """Run `inner` on x with m prompts behind x's first token (class token or SOT), and take them out before its
    last MLP, which would be run for them in vain.

    Outside nothing moves: EOT stays where the tower looks for it, and the image tokens keep their grid. The
    text is causal, so the words see the prompts and SOT does not.
    """
    tokens = prompts.to(x.dtype).expand(len(x), -1, -1)                       # (B, m, C)
    x = torch.cat([x[:, :1], tokens, x[:, 1:]], dim=1)                        # (B, L + m, C)
    return inner(x, lambda x: keep(torch.cat([x[:, :1], x[:, 1 + len(prompts):]], dim=1)))      # keep(B, L, C)


class Prompted(nn.Module):
    """m learned tokens that join what a module reads and leave before it returns, N(0, 0.02) at first.

    Around each block this is deep prompting: every block gets its own prompts, and what became of them is
    dropped. Around the whole transformer it is shallow prompting. m = 0 is plain CLIP.
    """

    def __init__(self, inner, m, width):
        super().__init__()
        self.inner, self.prompts = inner, nn.Parameter(0.02 * torch.randn(m, width))

    def forward(self, x, keep=nn.Identity()):
        return with_prompts(self.inner, x, self.prompts, keep)


def deep_prompts(sides, model, prompt_length, prompt_depth):
    """Prompts of their own for each of the first `prompt_depth` blocks of these towers; None is all blocks.

    Both sides: prompt decoupling (Li et al., arXiv 2401.02173). Stage 1 learns only the prompts, on a frozen
    CLIP; stage 2 fixes them and fine-tunes CLIP. ViT-B, m = 4: 12 x 4 x (768 + 512) = 61 440.
    Text only: CoOp (Zhou et al., arXiv 2109.01134). ViT-B/32, m = 16: 12 x 16 x 512 = 98 304.
    """
    # differs from prompt decoupling: position, length, depth, init are ours [choice], its own could not be read
    # differs from CoOp: prompts in every block (the count of arXiv 2308.12509) and without positions
    stacks = [blocks(model, side) for side in sides]
    deepest = max(len(stack) for stack, _ in stacks)
    if prompt_depth is not None and prompt_depth > deepest:
        raise ValueError(f"prompt_depth {prompt_depth} is more than there are blocks: it is 1 to {deepest}")
    return [replace(model, path, Prompted(block, prompt_length, width))
            for stack, width in stacks for path, block in stack[:prompt_depth]]


# -------------------------------------------------------------------- the rest of the table: other prompts

def add_vpt(model, prompt_length, prompt_depth):
    """VPT-deep (Jia et al., arXiv 2203.12119): prompts between class token and patches, new at every block.

    Init: uniform +-sqrt(6 / (3 P^2 + C)), P the patch size. ViT-B/32, m = 50: 12 x 50 x 768 = 460 800.
    """
    touched = deep_prompts(["image"], model, prompt_length, prompt_depth)
    bound = (6 / (3 * model.visual.conv1.kernel_size[0] ** 2 + model.visual.conv1.out_channels)) ** 0.5
    for path in touched:
        nn.init.uniform_(model.get_submodule(path).prompts, -bound, bound)
    return touched


def add_vl_prompt(model, prompt_length, prompt_depth):
    """VPT-deep on the images, 16 prompts at the input of the text transformer (a row of arXiv 2308.12509).

    The sizes are those of the image side. ViT-B/32, m = 50: 460 800 + 16 x 512 = 468 992.
    """
    touched = add_vpt(model, prompt_length, prompt_depth)
    _, width = blocks(model, "text")
    return touched + [replace(model, "text.transformer", Prompted(model.text.transformer, 16, width))]


class CoupledPrompted(nn.Module):
    """`Prompted` for the image side, its prompts a linear function of those of the text block of the same depth."""

    def __init__(self, inner, text_prompts, width):
        super().__init__()
        self.inner, self.text_prompts = inner, text_prompts
        self.couple = nn.Linear(text_prompts.shape[1], width)

    def forward(self, x, keep=nn.Identity()):
        return with_prompts(self.inner, x, self.couple(self.text_prompts), keep)    # prompts (m, C of the images)


def add_maple(model, prompt_length, prompt_depth):
    """MaPLe (Khattak et al., arXiv 2210.03117): text prompts in the first 9 blocks, image prompts from them.

    P_image = Linear(P_text), one for each depth. ViT-B/32, m = 2: 9 x (2 x 512 + 512 x 768 + 768) = 3 555 072.
    """
    # differs from MaPLe: prompts end with block 9, there they flow on; random at first, there "a photo of a"
    images, width = blocks(model, "image")
    depth = prompt_depth or min(9, len(blocks(model, "text")[0]))
    touched = deep_prompts(["text"], model, prompt_length, depth)
    return touched + [replace(model, path, CoupledPrompted(block, model.get_submodule(text).prompts, width))
                      for text, (path, block) in zip(touched, images)]


# ------------------------------------------------- the rest: other adapters, in the block or behind the tower

class SerialBlock(nn.Module):
    """Adapters in series behind attention and MLP, before the residual sum; each has its own skip inside."""
    places = 2

    def __init__(self, block, side, after_attn, after_mlp):
        super().__init__()
        self.inner, self.side, self.after_attn, self.after_mlp = block, side, after_attn, after_mlp

    def forward(self, x, keep=nn.Identity()):
        block = self.inner
        x = keep(x + self.after_attn(block.attn(block.ln_1(x)), self.side))
        return x + self.after_mlp(block.mlp(block.ln_2(x)), self.side)


class Houlsby(nn.Module):
    """Adapter (Houlsby et al., arXiv 1902.00751), in series: one bottleneck with a skip for each modality.

        y <- y + W_up GELU(W_down y)
    Init: weights N(0, 1e-3), biases 0, so nearly the identity. ViT-B/32, h = 64: 99 136 + 66 112 = 165 248.
    """
    # differs from Houlsby: one module for both places of all blocks (shared=False: one each); LayerNorms frozen

    def __init__(self, widths, bottleneck):
        super().__init__()
        self.down = nn.ModuleDict({side: nn.Linear(width, bottleneck) for side, width in widths.items()})
        self.up = nn.ModuleDict({side: nn.Linear(bottleneck, width) for side, width in widths.items()})
        for linear in (*self.down.values(), *self.up.values()):
            nn.init.normal_(linear.weight, std=1e-3)
            nn.init.zeros_(linear.bias)

    def forward(self, y, side):
        return y + self.up[side](F.gelu(self.down[side](y)))                  # (B, L, C)


class AdaptFormer(Houlsby):
    """AdaptFormer (Chen et al., arXiv 2205.13535): Houlsby's weights, but beside the MLP as the MRS-Adapter.

        AdaptFormer(x) = 0.1 W_up Dropout(ReLU(W_down x))
    Init: zero_start, the identity. ViT-B/32, h = 64: 99 136 + 66 112 = 165 248.
    """
    # differs from AdaptFormer: one module for all blocks, and on the text tower as well

    def __init__(self, widths, bottleneck, dropout):
        super().__init__(widths, bottleneck)
        self.dropout = nn.Dropout(dropout)
        zero_start(self.down.values(), self.up.values())

    def forward(self, x, side):
        return 0.1 * self.up[side](self.dropout(F.relu(self.down[side](x))))  # (B, L, C)


def quick_gelu(x):
    """OpenAI's approximation of GELU, x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


class Convpass(nn.Module):
    """Convpass (Jie and Deng, arXiv 2207.07039): a bottleneck with a 3x3 convolution on the patch grid.

        Convpass(y) = W_up Dropout(QuickGELU(conv(QuickGELU(W_down y)))),  the class token being a 1x1 image
    Init: W_down Xavier, conv passes its centre on, W_up and biases 0: the identity. It needs a grid (of any
    shape), so the text tower is left alone. ViT-B/32, h = 64: 49 216 + 36 928 + 49 920 = 136 064.
    """
    # differs from Convpass: one module for all places (the count of arXiv 2308.12509), scale 1

    def __init__(self, width, grid, bottleneck, dropout):
        super().__init__()
        self.grid, self.dropout = grid, nn.Dropout(dropout)
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.conv = nn.Conv2d(bottleneck, bottleneck, 3, padding=1)
        zero_start([self.down], [self.up])
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        x = quick_gelu(self.down(x)).transpose(1, 2)                          # (B, h, L)
        grids = [x[:, :, :1, None]]                                           # (B, h, 1, 1)
        if x.shape[2] > 1:      # beside the last MLP there is the class token alone
            grids.append(x[:, :, 1:].unflatten(2, self.grid))                 # (B, h, rows, columns)
        x = torch.cat([self.conv(grid).flatten(2) for grid in grids], dim=2).transpose(1, 2)    # (B, L, h)
        return self.up(self.dropout(quick_gelu(x)))                           # (B, L, C)


class ConvpassBlock(nn.Module):
    """One Convpass beside attention, one beside the MLP, each reading what its neighbour reads."""

    def __init__(self, block, beside_attn, beside_mlp):
        super().__init__()
        self.inner, self.beside_attn, self.beside_mlp = block, beside_attn, beside_mlp

    def forward(self, x, keep=nn.Identity()):
        block = self.inner
        y = block.ln_1(x)
        x = keep(x + block.attn(y) + self.beside_attn(y))
        y = block.ln_2(x)
        return x + block.mlp(y) + self.beside_mlp(y)


def add_convpass(model, bottleneck, shared, dropout):
    """Two Convpass in every image block, all of them one module if shared."""
    found, width = blocks(model, "image")
    own = [Convpass(width, model.visual.grid, bottleneck, dropout) for _ in range(2 * len(found))]
    own = own[:1] * len(own) if shared else own     # two places a block
    return [replace(model, path, ConvpassBlock(block, own[2 * i], own[2 * i + 1]))
            for i, (path, block) in enumerate(found)]


class CrossModalAdapter(MRSAdapter):
    """Cross-Modal Adapter (Jiang et al., arXiv 2211.09623), in series behind attention and MLP.

        y <- y + [W_up^m h ; W_share h],   h = QuickGELU(W_down^m y): MRS-Adapter's weights, 16 shared dims
    Init: weights N(0, 0.01), biases 0. ViT-B/32, h = 64: 165 248 - 16 x 65 = 164 208 parameters.
    """
    # differs from Cross-Modal Adapter: one module for all places; bottleneck=8, shared=False: its 519 168

    def __init__(self, widths, bottleneck):
        super().__init__(widths, bottleneck, dropout=0.0, share=16)
        for linear in (*self.down.values(), *self.up.values(), self.share):
            nn.init.normal_(linear.weight, std=0.01)

    def forward(self, y, side):
        h = quick_gelu(self.down[side](y))                                    # (B, L, h)
        return y + torch.cat([self.up[side](h), self.share(h)], dim=-1)       # (B, L, C)


class UniAdapter(nn.Module):
    """UniAdapter (Lu et al., arXiv 2302.06605): one module for both modalities, where the MRS-Adapter sits.

        UniAdapter(x) = 0.1 W_up^m ReLU(W_down LN(x)),   W_down common, W_up^m one for each modality
    Init: zero_start, the identity. ViT-B/32, h = 16, one for each depth: 12 x 44 832 = 537 984, near the
    0.55M of arXiv 2308.12509, which gives no sizes.
    """
    # differs from UniAdapter: LN and W_down are one per width, and CLIP has no cross encoder for a third W_up

    def __init__(self, widths, bottleneck):
        super().__init__()
        self.norm = nn.ModuleDict({str(width): nn.LayerNorm(width) for width in widths.values()})
        self.down = nn.ModuleDict({str(width): nn.Linear(width, bottleneck) for width in widths.values()})
        self.up = nn.ModuleDict({side: nn.Linear(bottleneck, width) for side, width in widths.items()})
        zero_start(self.down.values(), self.up.values())

    def forward(self, x, side):
        width = str(x.shape[-1])
        h = F.relu(self.down[width](self.norm[width](x)))                     # (B, L, h)
        return 0.1 * self.up[side](h)                                         # (B, L, C)


class CLIPAdapter(nn.Module):
    """CLIP-Adapter (Gao et al., arXiv 2110.04544) on the joint feature f, before it is normalised.

        f <- 0.2 ReLU(W_up ReLU(W_down f)) + 0.8 f
    No biases, Linear's own init. D = 512, h = 256 on both towers: 2 x 2 x 512 x 256 = 524 288.
    """

    def __init__(self, width, bottleneck):
        super().__init__()
        self.down = nn.Linear(width, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, width, bias=False)

    def forward(self, f):
        return 0.2 * F.relu(self.up(F.relu(self.down(f)))) + 0.8 * f          # (B, D)


def add_clip_adapter(model, bottleneck):
    """A CLIPAdapter as the head of each tower."""
    width = model.text.text_projection.shape[1]
    return [replace(model, f"{tower}.head", CLIPAdapter(width, bottleneck or width // 2))
            for tower in TOWERS.values()]


def add_linear_probe(model):
    """Linear probe: f <- W f + b, D -> 2 D, on both towers. D = 512: 2 x (1024 x 512 + 1024) = 1 050 624."""
    # differs from arXiv 2308.12509, which gives the size only: both towers start from one orthonormal W,
    # so that training begins at CLIP's similarities and not at chance
    width = model.text.text_projection.shape[1]
    image, text = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
    nn.init.orthogonal_(image.weight)
    nn.init.zeros_(image.bias)
    text.load_state_dict(image.state_dict())
    return [replace(model, "visual.head", image), replace(model, "text.head", text)]


# -------------------------------------------------------------- CLIP's own weights, extended, scaled or tuned

class LoRABlock(nn.Module):
    """LoRA (Hu et al., arXiv 2106.09685) on q and v: W <- W + B A, with A (r, C) and B (C, r).

    CLIP packs q, k and v in one matrix: the low-rank path goes to the q and v rows of its output, and no
    gradient of the full matrix's size is made.
    Init: A Kaiming-uniform(a = sqrt 5), B 0: the identity. ViT-B/32, r = 4: 12 x 4r x (768 + 512) = 245 760.
    """
    # differs from LoRA: alpha = r, so its factor alpha / r is 1

    def __init__(self, block, rank):
        super().__init__()
        self.inner, width = block, block.attn.out_proj.in_features
        self.A_q, self.A_v = nn.Parameter(torch.empty(rank, width)), nn.Parameter(torch.empty(rank, width))
        self.B_q, self.B_v = nn.Parameter(torch.zeros(width, rank)), nn.Parameter(torch.zeros(width, rank))
        nn.init.kaiming_uniform_(self.A_q, a=5 ** 0.5)
        nn.init.kaiming_uniform_(self.A_v, a=5 ** 0.5)

    def forward(self, x, keep=nn.Identity()):
        block, attn = self.inner, self.inner.attn
        y = block.ln_1(x)
        q, k, v = attn.project(y).chunk(3, dim=-1)                            # 3 x (B, L, C)
        q = q + F.linear(F.linear(y, self.A_q), self.B_q)
        v = v + F.linear(F.linear(y, self.A_v), self.B_v)
        x = keep(x + attn.out_proj(attn.attend(q, k, v)))
        return x + block.mlp(block.ln_2(x))


@torch.no_grad()
def merge_lora(model):
    """Add B A to the packed weights and take the wrappers away: a plain CLIP with the same features.

    The merged matrices are float32, also where CLIP is stored in bf16, which would round the update away.
    Raises ValueError if there is no LoRA in the model.
    """
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, LoRABlock)]
    if not found:
        raise ValueError("nothing to merge: no LoRA in this model; install it with add_method(model, 'lora')")
    for path, lora in found:
        weight = lora.inner.attn.in_proj_weight
        weight.data = weight.data.to(lora.A_q.dtype)
        C = weight.shape[1]
        weight[:C] += lora.B_q @ lora.A_q
        weight[2 * C:] += lora.B_v @ lora.A_v
        replace(model, path, lora.inner)
    model.method_parameters = []    # a plain CLIP again, which may take another method


class IA3Block(nn.Module):
    """(IA)^3 (Liu et al., arXiv 2205.05638): learned scales on keys, values and the MLP's hidden layer.

        k <- l_k k,   v <- l_v v,   MLP(x) = W_2 (l_ff act(W_1 x))
    Init: ones, the identity. ViT-B/32: 12 x 6 x (768 + 512) = 92 160.
    """

    def __init__(self, block):
        super().__init__()
        self.inner, width = block, block.attn.out_proj.in_features
        self.l_k, self.l_v = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.l_ff = nn.Parameter(torch.ones(block.mlp.c_fc.out_features))

    def forward(self, x, keep=nn.Identity()):
        block, attn, mlp = self.inner, self.inner.attn, self.inner.mlp
        q, k, v = attn.project(block.ln_1(x)).chunk(3, dim=-1)                # 3 x (B, L, C)
        k, v = (k * self.l_k).to(k.dtype), (v * self.l_v).to(v.dtype)         # scaled in float32
        x = keep(x + attn.out_proj(attn.attend(q, k, v)))
        h = mlp.act(mlp.c_fc(block.ln_2(x)))                                  # (B, L, 4C)
        return x + mlp.c_proj((h * self.l_ff).to(h.dtype))


class ScaleShift(nn.Module):
    """gamma x + beta, gamma from N(1, 0.02) and beta from N(0, 0.02); `shape` broadcasts on x."""

    def __init__(self, *shape):
        super().__init__()
        self.gamma = nn.Parameter(1 + 0.02 * torch.randn(shape))
        self.beta = nn.Parameter(0.02 * torch.randn(shape))

    def forward(self, x):
        return (x * self.gamma + self.beta).to(x.dtype)     # bf16 would round small changes of gamma away


class SSFBlock(nn.Module):
    """SSF (Lian et al., arXiv 2210.08823): gamma x + beta after each of a block's six operations that have weights.

    Outside the blocks: patch embedding and the towers' last LayerNorms. Nearly the identity at init.
    ViT-B/32: 12 x 22 x (768 + 512) + 2 x 768 + 2 x 768 + 2 x 512 = 342 016.
    """

    def __init__(self, block):
        super().__init__()
        width, hidden = block.attn.out_proj.in_features, block.mlp.c_fc.out_features
        self.inner = block
        self.ln_1, self.qkv, self.attn = ScaleShift(width), ScaleShift(3 * width), ScaleShift(width)
        self.ln_2, self.c_fc, self.c_proj = ScaleShift(width), ScaleShift(hidden), ScaleShift(width)

    def forward(self, x, keep=nn.Identity()):
        block, attn, mlp = self.inner, self.inner.attn, self.inner.mlp
        qkv = self.qkv(attn.project(self.ln_1(block.ln_1(x))))                # (B, L, 3C)
        x = keep(x + self.attn(attn.out_proj(attn.attend(*qkv.chunk(3, dim=-1)))))  # (B, L, C)
        h = mlp.act(self.c_fc(mlp.c_fc(self.ln_2(block.ln_2(x)))))            # (B, L, 4C)
        return x + self.c_proj(mlp.c_proj(h))


def add_ssf(model):
    """SSF in every block, behind the patch embedding and behind the towers' last LayerNorms."""
    touched = wrap_blocks(SSFBlock, model)
    C, C_text = model.visual.conv1.out_channels, model.text.token_embedding.embedding_dim
    for path, *shape in (("visual.conv1", C, 1, 1), ("visual.ln_post", C), ("text.ln_final", C_text)):
        followed = OrderedDict(inner=model.get_submodule(path), ssf=ScaleShift(*shape))
        touched.append(replace(model, path, nn.Sequential(followed)))
    return touched


def tune(wanted, model):
    """Let those of CLIP's own parameters learn that are wanted(name), in float32; returns their names.

    BitFit (Ben Zaken et al., arXiv 2106.10199): every bias, also of the LayerNorms. ViT-B/32: 171 008.
    LayerNorm tuning (Zhao et al., arXiv 2312.11420): weight and bias of each, all "ln_". ViT-B/32: 65 536.
    """
    names = [name for name, _ in model.named_parameters() if wanted(name)]
    for name in names:
        parameter = model.get_parameter(name).requires_grad_(True)
        parameter.data = parameter.data.float()
    return names


METHODS = {     # name: (installer, its sizes and their defaults); prompt_depth None is every block
    "none": (lambda model: [], {}),
    "mrs": (partial(add_adapter, MRSBlock, MRSAdapter), dict(bottleneck=64, shared=True, dropout=0.5)),
    "adapter": (partial(add_adapter, SerialBlock, Houlsby), dict(bottleneck=64, shared=True)),
    "adaptformer": (partial(add_adapter, MRSBlock, AdaptFormer),
                    dict(bottleneck=64, shared=True, dropout=0.1)),
    "cross-modal-adapter": (partial(add_adapter, SerialBlock, CrossModalAdapter),
                            dict(bottleneck=64, shared=True)),
    "uniadapter": (partial(add_adapter, MRSBlock, UniAdapter), dict(bottleneck=16, shared=False)),
    "convpass": (add_convpass, dict(bottleneck=64, shared=True, dropout=0.1)),
    "clip-adapter": (add_clip_adapter, dict(bottleneck=None)),      # None is half the joint width
    "linear-probe": (add_linear_probe, {}),
    "coop": (partial(deep_prompts, ["text"]), dict(prompt_length=16, prompt_depth=None)),
    "vpt": (add_vpt, dict(prompt_length=50, prompt_depth=None)),
    "vl-prompt": (add_vl_prompt, dict(prompt_length=50, prompt_depth=None)),
    "maple": (add_maple, dict(prompt_length=2, prompt_depth=None)),     # None is 9, or all if there are fewer
    "prompts": (partial(deep_prompts, ["image", "text"]), dict(prompt_length=4, prompt_depth=None)),
    "lora": (partial(wrap_blocks, LoRABlock), dict(rank=4)),
    "bitfit": (partial(tune, lambda name: name.endswith("bias")), {}),
    "layernorm": (partial(tune, lambda name: ".ln_" in name), {}),
    "ia3": (partial(wrap_blocks, IA3Block), {}),
    "ssf": (add_ssf, {}),
}
