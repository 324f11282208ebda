"""Parameter-efficient transfer of CLIP: 18 methods and "none", the frozen CLIP, one function each.

Papers: "Parameter-Efficient Transfer Learning for Remote Sensing Image-Text Retrieval", arXiv 2308.12509, and
"Prompt Decoupling for Text-to-Image Person Re-identification", arXiv 2401.02173.

    model = load_clip("ViT-B/32")
    add_method(model, "mrs", bottleneck=64)     # CLIP is frozen; only what was added has requires_grad

clip.py imports nothing from here. Four moves, alone or together, install any method:
1. wrap a block: a module holds it as `.inner` (CLIP.openai_state_dict knows this name) and restates its two
   lines of `forward`; SSF wraps single layers as well;
2. `Prompted(inner, m, width)`: m learned tokens join what a module reads and leave what it returns;
3. set `tower.head`, which is nn.Identity() in plain CLIP;
4. `tune(model, names)`: let some of CLIP's own parameters learn.
A new method is a function add_name(model, size=default) that makes such moves, entered in METHODS at the end
of the file. It raises errors before it adds anything; all parameters that it creates learn. In the text tower
it must be causal, as captions are cut behind EOT. A new size stands in METHOD_SIZES, needs a flag in train.py
and is a whole number unless `add_method` knows it.

Where prompts enter and leave, around each block (deep) or around the whole transformer (shallow):
    [first | rest]  ->  [first | m prompts | rest]  ->  inner  ->  [first | rest]
The first token is an image's class token or a caption's SOT. Prompts have no positional embedding. Outside
`inner` no token has moved: EOT stays where the text tower looks for it. What the words see: the text tower is
causal, so a word (and EOT) sees SOT, all prompts and the words before it; SOT never sees a prompt, a prompt
never sees a word. In the image tower all tokens see each other.

To copy the MRS-Adapter into another CLIP: `MRSAdapter` with `start_at_zero` needs only torch. Make one for
all blocks of both towers, `MRSAdapter({"image": 768, "text": 512})`, and freeze all else. Each block is
`x = x + attn(ln_1(x)); return x + mlp(ln_2(x)) + adapter(x, side)`. Call train() and eval(): it has dropout.
Installed or copied, new parameters are float32 however CLIP is stored, so train under autocast.

A side is "image" or "text". Shapes: B batch, L sequence length, C width of a tower, D joint width, m prompt
length, d inner width of an adapter (the bottleneck). Counts are for ViT-B/32: 12 blocks in each tower,
C = 768 and 512, D = 512. A method follows its paper but for what a line `differs from X` says. In such lines
"there" is in X; "(the count of Y)" means that a size was chosen to reach the number of parameters in Y.
"""
import inspect
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F


# ------------------------------------------------------------------------------------------ the mechanism

def add_method(model, name, **sizes):
    """Freeze CLIP and install one method; afterwards exactly the method's parameters have requires_grad.

    name: a key of METHODS. sizes: keyword arguments of its function; None means its default.
    `model.method_parameters` then lists the names of the method's parameters. Raises ValueError, and adds
    nothing, for an unknown name or size, a size out of range, a second method.
    """
    if name not in METHODS:
        raise ValueError(f"no method {name!r}: choose one of {', '.join(METHODS)}")
    if getattr(model, "method_parameters", []):
        raise ValueError(f"cannot add {name!r}: this model already has a method; start from a fresh CLIP")
    install = METHODS[name]
    allowed = list(inspect.signature(install).parameters)[1:]       # the first one is the model
    sizes = {key: value for key, value in sizes.items() if value is not None}
    for key, value in sizes.items():
        if key not in allowed:
            raise ValueError(f"method {name!r} has no size {key!r}: it has {', '.join(allowed) or 'none'}")
        if key == "dropout" and not 0 <= value < 1:
            raise ValueError(f"dropout {value} is not possible: it is at least 0 and less than 1")
        if key not in ("dropout", "shared") and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{key} {value} touches no layer: it is a whole number, 1 or more")
    model.requires_grad_(False)
    with torch.device(model.logit_scale.device):        # new parameters are born there
        install(model, **sizes)                         # what raises in it does so before it adds anything
    model.train(model.training)     # new modules follow the model: no dropout in a model that is in eval()
    model.method_parameters = [key for key, value in model.named_parameters() if value.requires_grad]


def trainable_state(model):
    """Name -> CPU copy of each parameter that the method added or tunes, each once (0.6 MB for "mrs").
    requires_grad is not asked: prompts that stage 2 fixes (see add_prompts) are still needed."""
    names = getattr(model, "method_parameters", [])
    return {name: model.get_parameter(name).detach().cpu().clone() for name in names}


def load_trainable(model, state):
    """Load what `trainable_state` gave into a model with the same method of the same sizes.
    Missing, unknown or misshapen tensors raise ValueError with the first 8 names; nothing is loaded then."""
    expected = trainable_state(model)
    wrong = [f"missing {name}" for name in expected if name not in state]
    wrong += [f"unknown {name}" for name in state if name not in expected]
    wrong += [f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
              for name, tensor in expected.items() if name in state and state[name].shape != tensor.shape]
    if wrong:
        raise ValueError(f"weights of another method or size, {len(wrong)} tensors: {'; '.join(wrong[:8])}")
    with torch.no_grad():
        for name in expected:
            model.get_parameter(name).copy_(state[name])


def wrap_blocks(model, wrapper, **sizes):
    """Each block of both towers becomes wrapper(block, **sizes)."""
    for tower in (model.visual, model.text):
        blocks = tower.transformer.resblocks
        for depth, block in enumerate(blocks):
            blocks[depth] = wrapper(block, **sizes)


def wrap_with_adapters(model, wrapper, adapter_class, shared, **sizes):
    """Each block of both towers becomes wrapper(block, side, *adapters), with `adapters_per_block` adapters.
    shared: they are all one object, in all blocks. Otherwise each depth has its own, used by the blocks of
    both towers at that depth (ViT-L/14 has 24 and 12 blocks: the deeper adapters are for images alone)."""
    stacks = {"image": model.visual.transformer.resblocks, "text": model.text.transformer.resblocks}
    widths = {"image": model.config.vision_width, "text": model.config.text_width}
    if shared:
        adapters = [adapter_class(widths, **sizes)] * wrapper.adapters_per_block      # one object, repeated
    for depth in range(max(len(stacks["image"]), len(stacks["text"]))):
        widths_here = {side: widths[side] for side in stacks if depth < len(stacks[side])}
        if not shared:
            adapters = [adapter_class(widths_here, **sizes) for _ in range(wrapper.adapters_per_block)]
        for side in widths_here:
            stacks[side][depth] = wrapper(stacks[side][depth], side, *adapters)


# ---------------------------------------------------------------------------- MRS-Adapter (arXiv 2308.12509)

def start_at_zero(downs, ups):
    """Linears of a bottleneck that adds nothing at first: down Kaiming-uniform, up and all biases zero. (If
    down were zero as well, neither would ever get a gradient.)"""
    for down in downs:
        nn.init.kaiming_uniform_(down.weight, a=5 ** 0.5)
        nn.init.zeros_(down.bias)
    for up in ups:
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)


class MRSAdapter(nn.Module):
    """Multimodal remote-sensing adapter: a bottleneck for each side, but one W_share for both.

        h = Dropout(ReLU(W_down^side x)),   MRS(x) = [W_up^side h ; W_share h]
    widths: {"image": C, "text": C}, or one of them, each more than `share`. Init: start_at_zero.
    d = 64, share = 64: down 49 216 + 32 832, up 45 760 + 29 120, share 4 160 = 161 088.
    """
    def __init__(self, widths, bottleneck=64, dropout=0.5, share=64):
        super().__init__()
        if min(widths.values()) <= share:
            raise ValueError(f"{type(self).__name__} shares {share} output dims, so both towers must be "
                             f"wider than that, and are {widths}: take another method or a wider CLIP")
        self.down = nn.ModuleDict({side: nn.Linear(C, bottleneck) for side, C in widths.items()})
        self.up = nn.ModuleDict({side: nn.Linear(bottleneck, C - share) for side, C in widths.items()})
        self.share = nn.Linear(bottleneck, share)
        self.dropout = nn.Dropout(dropout)
        start_at_zero(self.down.values(), [*self.up.values(), self.share])

    def forward(self, x, side):
        h = self.dropout(F.relu(self.down[side](x)))                          # (B, L, d)
        return torch.cat([self.up[side](h), self.share(h)], dim=-1)           # (B, L, C)


class BesideMLP(nn.Module):
    """A block with an adapter beside its MLP, reading the stream after attention and before ln_2."""
    adapters_per_block = 1

    def __init__(self, block, side, adapter):
        super().__init__()
        self.inner, self.side, self.adapter = block, side, adapter

    def forward(self, x):
        block = self.inner
        x = x + block.attn(block.ln_1(x))
        return x + block.mlp(block.ln_2(x)) + self.adapter(x, self.side)


def add_mrs(model, bottleneck=64, shared=True, dropout=0.5):
    """MRS-Adapter (Yuan et al., arXiv 2308.12509): one for all 24 blocks, the identity at first. 161 088."""
    wrap_with_adapters(model, BesideMLP, MRSAdapter, shared, bottleneck=bottleneck, dropout=dropout)


# --------------------------------------------------------------------------------- prompts (arXiv 2401.02173)

def run_with_prompts(inner, x, prompts):
    """inner(x) with prompts (m, C) behind the first token of x (B, L, C), taken out of what it returns."""
    m = len(prompts)
    tokens = prompts.to(x.dtype).expand(len(x), -1, -1)                       # (B, m, C)
    x = inner(torch.cat([x[:, :1], tokens, x[:, 1:]], dim=1))                 # (B, L + m, C)
    return torch.cat([x[:, :1], x[:, 1 + m:]], dim=1)                         # (B, L, C)


class Prompted(nn.Module):
    """m learned tokens, of std 0.02 at first, that join what a module reads and leave what it returns."""
    def __init__(self, inner, m, width):
        super().__init__()
        self.inner, self.prompts = inner, nn.Parameter(0.02 * torch.randn(m, width))

    def forward(self, x):
        return run_with_prompts(self.inner, x, self.prompts)


def add_deep_prompts(towers, prompt_length, prompt_depth):
    """New prompts for each of the first `prompt_depth` blocks (None: all blocks) of these towers."""
    deepest = max(len(tower.transformer.resblocks) for tower in towers)
    if prompt_depth is not None and prompt_depth > deepest:
        raise ValueError(f"prompt_depth {prompt_depth} is more than there are blocks: it is 1 to {deepest}")
    for tower in towers:
        blocks = tower.transformer.resblocks
        for depth, block in enumerate(blocks[:prompt_depth]):
            blocks[depth] = Prompted(block, prompt_length, block.attn.out_proj.in_features)


def add_prompts(model, prompt_length=4, prompt_depth=None):
    """Deep prompts in both towers, for prompt decoupling (Li et al., arXiv 2401.02173). Stage 1 learns only
    the prompts, on a frozen CLIP; stage 2 fixes them and fine-tunes CLIP. 12 x 4 x (768 + 512) = 61 440."""
    # differs from prompt decoupling: position, length, depth, init are our choice; its text was not at hand
    add_deep_prompts([model.visual, model.text], prompt_length, prompt_depth)


# -------------------------------------------------------------------- the rest of the table: other prompts

def add_coop(model, prompt_length=16, prompt_depth=None):
    """CoOp (Zhou et al., arXiv 2109.01134): context between SOT and the words. 12 x 16 x 512 = 98 304."""
    # differs from CoOp: prompts in every block (the count of arXiv 2308.12509); CoOp has them at the input
    # alone, with a positional embedding
    add_deep_prompts([model.text], prompt_length, prompt_depth)


def add_vpt(model, prompt_length=50, prompt_depth=None):
    """VPT-deep (Jia et al., arXiv 2203.12119): prompts between class token and patches, new at every block.
    Init: uniform in +-sqrt(6 / (3 P^2 + C)), P the patch size. 12 x 50 x 768 = 460 800."""
    add_deep_prompts([model.visual], prompt_length, prompt_depth)
    bound = (6 / (3 * model.config.patch_size ** 2 + model.config.vision_width)) ** 0.5
    for block in model.visual.transformer.resblocks[:prompt_depth]:
        nn.init.uniform_(block.prompts, -bound, bound)


def add_vl_prompt(model, prompt_length=50, prompt_depth=None):
    """VL-Prompt, a row of arXiv 2308.12509: VPT-deep of the given sizes for images, and 16 prompts around the
    whole text transformer. 460 800 + 16 x 512 = 468 992."""
    # differs from arXiv 2308.12509: it gives only the count, how the prompts are spread is our choice
    add_vpt(model, prompt_length, prompt_depth)
    model.text.transformer = Prompted(model.text.transformer, 16, model.config.text_width)


class CoupledPrompted(nn.Module):
    """`Prompted` for an image block; its prompts are a linear function of the text prompts at its depth."""
    def __init__(self, inner, text_prompts, width):
        super().__init__()
        self.inner, self.text_prompts = inner, text_prompts     # the text block's own parameter
        self.couple = nn.Linear(text_prompts.shape[1], width)

    def forward(self, x):
        return run_with_prompts(self.inner, x, self.couple(self.text_prompts))


def add_maple(model, prompt_length=2, prompt_depth=None):
    """MaPLe (Khattak et al., arXiv 2210.03117): P_image = Linear(P_text), deep, a Linear for each depth.
    prompt_depth None: 9, or all of a shorter text tower. 9 x (2 x 512 + 512 x 768 + 768) = 3 555 072."""
    # differs from MaPLe: prompts are random at first, there the words "a photo of a"; they end with the last
    # block that has its own, there they go on to the end; at block 1 they get no position and no ln_pre
    image_blocks, text_blocks = model.visual.transformer.resblocks, model.text.transformer.resblocks
    prompt_depth = prompt_depth or min(9, len(text_blocks))
    add_deep_prompts([model.text], prompt_length, prompt_depth)
    for depth, block in enumerate(image_blocks[:prompt_depth]):
        image_blocks[depth] = CoupledPrompted(block, text_blocks[depth].prompts, model.config.vision_width)


# --------------------------------------------------------------- the rest: other adapters inside the blocks

class InSeries(nn.Module):
    """A block with adapters behind attention and MLP, before the residual sum, each with a skip inside."""
    adapters_per_block = 2

    def __init__(self, block, side, after_attn, after_mlp):
        super().__init__()
        self.inner, self.side, self.after_attn, self.after_mlp = block, side, after_attn, after_mlp

    def forward(self, x):
        block = self.inner
        x = x + self.after_attn(block.attn(block.ln_1(x)), self.side)
        return x + self.after_mlp(block.mlp(block.ln_2(x)), self.side)


class Houlsby(nn.Module):
    """y <- y + W_up GELU(W_down y), one bottleneck for each side. Init: weights of std 1e-3, biases 0."""
    def __init__(self, widths, bottleneck):
        super().__init__()
        self.down = nn.ModuleDict({side: nn.Linear(C, bottleneck) for side, C in widths.items()})
        self.up = nn.ModuleDict({side: nn.Linear(bottleneck, C) for side, C in widths.items()})
        for linear in [*self.down.values(), *self.up.values()]:
            nn.init.normal_(linear.weight, std=1e-3)
            nn.init.zeros_(linear.bias)

    def forward(self, y, side):
        return y + self.up[side](F.gelu(self.down[side](y)))                  # (B, L, C)


def add_adapter(model, bottleneck=64, shared=True):
    """Adapter (Houlsby et al., arXiv 1902.00751): two in series in each block, nearly the identity at first.
    d = 64: 99 136 + 66 112 = 165 248."""
    # differs from Houlsby: one module for both places of all blocks (shared=False: one each); LayerNorms stay
    # frozen; there the init is a truncated normal and GELU the tanh approximation
    wrap_with_adapters(model, InSeries, Houlsby, shared, bottleneck=bottleneck)


class AdaptFormer(Houlsby):
    """0.1 W_up Dropout(ReLU(W_down x)): Houlsby's weights with another init, start_at_zero."""
    def __init__(self, widths, bottleneck, dropout):
        super().__init__(widths, bottleneck)
        self.dropout = nn.Dropout(dropout)
        start_at_zero(self.down.values(), self.up.values())

    def forward(self, x, side):
        return 0.1 * self.up[side](self.dropout(F.relu(self.down[side](x))))  # (B, L, C)


def add_adaptformer(model, bottleneck=64, shared=True, dropout=0.1):
    """AdaptFormer (Chen et al., arXiv 2205.13535) beside the MLP, the identity at first. d = 64: 165 248."""
    # differs from AdaptFormer: one module for all blocks, also on the text tower; it reads the stream before
    # ln_2, as the authors' code does, while their figure shows it after
    wrap_with_adapters(model, BesideMLP, AdaptFormer, shared, bottleneck=bottleneck, dropout=dropout)


def quick_gelu(x):
    """x sigmoid(1.702 x), clip.py's, repeated so that this file needs torch alone."""
    return x * torch.sigmoid(1.702 * x)


class CrossModalAdapter(MRSAdapter):
    """y <- y + [W_up^side h ; W_share h], h = QuickGELU(W_down^side y): MRS-Adapter's weights, 16 dims
    shared. Init: weights of std 0.01, biases 0."""
    def __init__(self, widths, bottleneck):
        super().__init__(widths, bottleneck, dropout=0.0, share=16)     # all biases are 0 then
        for linear in [*self.down.values(), *self.up.values(), self.share]:
            nn.init.normal_(linear.weight, std=0.01)

    def forward(self, y, side):
        h = quick_gelu(self.down[side](y))                                    # (B, L, d)
        return y + torch.cat([self.up[side](h), self.share(h)], dim=-1)       # (B, L, C)


def add_cross_modal_adapter(model, bottleneck=64, shared=True):
    """Cross-Modal Adapter (Jiang et al., arXiv 2211.09623) in series. 165 248 - 16 x (64 + 1) = 164 208."""
    # differs from Cross-Modal Adapter: one module for all places, there one each and d = 8 (519 168)
    wrap_with_adapters(model, InSeries, CrossModalAdapter, shared, bottleneck=bottleneck)


class UniAdapter(nn.Module):
    """0.1 W_up^side ReLU(W_down LN(x)). Towers of one width (not ViT-B/32's) share LN and W_down. Init:
    start_at_zero."""
    def __init__(self, widths, bottleneck):
        super().__init__()
        self.norm = nn.ModuleDict({str(C): nn.LayerNorm(C) for C in widths.values()})       # keys like "768"
        self.down = nn.ModuleDict({str(C): nn.Linear(C, bottleneck) for C in widths.values()})
        self.up = nn.ModuleDict({side: nn.Linear(bottleneck, C) for side, C in widths.items()})
        start_at_zero(self.down.values(), self.up.values())

    def forward(self, x, side):
        width = str(x.shape[-1])
        h = F.relu(self.down[width](self.norm[width](x)))                     # (B, L, d)
        return 0.1 * self.up[side](h)                                         # (B, L, C)


def add_uniadapter(model, bottleneck=16, shared=False):
    """UniAdapter (Lu et al., arXiv 2302.06605) beside the MLP, one for each depth, the identity at first.
    d = 16: 12 x 44 832 = 537 984."""
    # differs from UniAdapter: LN and W_down are one per width; CLIP has no cross encoder for a third W_up;
    # d = 16, there 128 to 512, is near the 0.55M of arXiv 2308.12509, which gives no sizes
    wrap_with_adapters(model, BesideMLP, UniAdapter, shared, bottleneck=bottleneck)


class Convpass(nn.Module):
    """W_up Dropout(QuickGELU(conv(QuickGELU(W_down y)))), conv 3x3 on the grid (rows, columns) of patches,
    the class token being a 1x1 image. Init: W_down Xavier, conv the identity, W_up and biases 0."""
    def __init__(self, width, grid, bottleneck, dropout):
        super().__init__()
        self.grid, self.dropout = grid, nn.Dropout(dropout)
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.conv = nn.Conv2d(bottleneck, bottleneck, 3, padding=1)
        start_at_zero([self.down], [self.up])
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, y):
        h = quick_gelu(self.down(y)).transpose(1, 2)                          # (B, d, L)
        class_token = self.conv(h[:, :, :1, None])                            # (B, d, 1, 1)
        patches = self.conv(h[:, :, 1:].unflatten(2, self.grid))              # (B, d, rows, columns)
        h = torch.cat([class_token.flatten(2), patches.flatten(2)], dim=2)    # (B, d, L)
        return self.up(self.dropout(quick_gelu(h.transpose(1, 2))))           # (B, L, C)


class ConvpassBlock(nn.Module):
    """One Convpass beside attention, one beside the MLP, each reading what its neighbour reads."""
    def __init__(self, block, beside_attn, beside_mlp):
        super().__init__()
        self.inner, self.beside_attn, self.beside_mlp = block, beside_attn, beside_mlp

    def forward(self, x):
        block = self.inner
        y = block.ln_1(x)
        x = x + block.attn(y) + self.beside_attn(y)
        y = block.ln_2(x)
        return x + block.mlp(y) + self.beside_mlp(y)


def add_convpass(model, bottleneck=64, shared=True, dropout=0.1):
    """Convpass (Jie and Deng, arXiv 2207.07039), the identity at first. It needs a grid, so the text tower is
    left alone. d = 64: 49 216 + 36 928 + 49 920 = 136 064."""
    # differs from Convpass: d = 64, there 8, and one module for all places (the count of arXiv 2308.12509);
    # scale 1, there tuned for each data set
    def new():
        return Convpass(model.config.vision_width, model.visual.grid, bottleneck, dropout)
    blocks = model.visual.transformer.resblocks
    one = new()
    for depth, block in enumerate(blocks):
        beside_attn, beside_mlp = (one, one) if shared else (new(), new())
        blocks[depth] = ConvpassBlock(block, beside_attn, beside_mlp)


# --------------------------------------------- the rest: heads, and CLIP's own weights extended or tuned

class CLIPAdapter(nn.Module):
    """f <- 0.2 ReLU(W_up ReLU(W_down f)) + 0.8 f, f the feature before it is normalised. Init: Linear's."""
    def __init__(self, width, bottleneck):
        super().__init__()
        self.down = nn.Linear(width, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, width, bias=False)

    def forward(self, f):
        change = F.relu(self.up(F.relu(self.down(f))))
        return 0.2 * change + 0.8 * f                                         # (B, D)


def add_clip_adapter(model, bottleneck=None):
    """CLIP-Adapter (Gao et al., arXiv 2110.04544). d None is D / 2: 2 x 2 x 512 x 256 = 524 288."""
    # differs from CLIP-Adapter: d = D / 2, there D / 4 (the count of arXiv 2308.12509)
    width = model.config.embed_dim
    model.visual.head = CLIPAdapter(width, bottleneck or width // 2)
    model.text.head = CLIPAdapter(width, bottleneck or width // 2)


def add_linear_probe(model):
    """Linear probe: f <- W f + b behind both towers; features are then 2 D wide, there is no classifier. Both
    start from one W with W^T W = 1 and b = 0, at CLIP's similarities. 2 x (1024 x 512 + 1024) = 1 050 624."""
    # differs from arXiv 2308.12509: it gives only the count, this start is our choice
    width = model.config.embed_dim
    start = nn.init.orthogonal_(torch.empty(2 * width, width, device="cpu"))    # MPS has no QR decomposition
    for tower in (model.visual, model.text):
        tower.head = nn.Linear(width, 2 * width)
        tower.head.weight.data.copy_(start)
        nn.init.zeros_(tower.head.bias)


class LoRABlock(nn.Module):
    """W <- W + B A for q and v, A (r, C), B (C, r). Init: A Kaiming-uniform(a = sqrt 5), B 0. CLIP packs q, k
    and v in one matrix: B (A y) is added to q and v after its output is split."""
    def __init__(self, block, rank):
        super().__init__()
        self.inner = block
        width = block.attn.out_proj.in_features
        self.A_q, self.A_v = nn.Parameter(torch.empty(rank, width)), nn.Parameter(torch.empty(rank, width))
        self.B_q, self.B_v = nn.Parameter(torch.zeros(width, rank)), nn.Parameter(torch.zeros(width, rank))
        nn.init.kaiming_uniform_(self.A_q, a=5 ** 0.5)
        nn.init.kaiming_uniform_(self.A_v, a=5 ** 0.5)

    def forward(self, x):
        block, attn = self.inner, self.inner.attn
        y = block.ln_1(x)
        q, k, v = attn.project(y).chunk(3, dim=-1)                            # 3 x (B, L, C)
        q = q + F.linear(F.linear(y, self.A_q), self.B_q)
        v = v + F.linear(F.linear(y, self.A_v), self.B_v)
        x = x + attn.out_proj(attn.attend(q, k, v))
        return x + block.mlp(block.ln_2(x))


def add_lora(model, rank=4):
    """LoRA (Hu et al., arXiv 2106.09685), the identity at first. r = 4: 12 x 4 r x (768 + 512) = 245 760."""
    # differs from LoRA: alpha = r, so its factor alpha / r is 1; A as in its code, the paper says Gaussian
    wrap_blocks(model, LoRABlock, rank=rank)


@torch.no_grad()
def merge_lora(model):
    """Add B A to the packed weights and take the wrappers away: a plain CLIP with the same features. What is
    merged is float32, as bf16 would round the update away. Raises ValueError if there is no LoRA."""
    if not any(isinstance(module, LoRABlock) for module in model.modules()):
        raise ValueError("nothing to merge: no LoRA in this model; install it with add_method(model, 'lora')")
    for tower in (model.visual, model.text):
        blocks = tower.transformer.resblocks
        for depth, lora in enumerate(blocks):
            weight = lora.inner.attn.in_proj_weight                           # (3C, C), rows of q, k, v
            weight.data = weight.data.float()
            C = weight.shape[1]
            weight[:C] += lora.B_q @ lora.A_q
            weight[2 * C:] += lora.B_v @ lora.A_v
            blocks[depth] = lora.inner
    model.method_parameters = []    # a plain CLIP again, which may take another method


class IA3Block(nn.Module):
    """k <- l_k k, v <- l_v v, MLP(x) = W_2 (l_ff act(W_1 x)). Init: ones."""
    def __init__(self, block):
        super().__init__()
        self.inner = block
        width = block.attn.out_proj.in_features
        self.l_k, self.l_v = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.l_ff = nn.Parameter(torch.ones(block.mlp.c_fc.out_features))

    def forward(self, x):
        block, attn, mlp = self.inner, self.inner.attn, self.inner.mlp
        q, k, v = attn.project(block.ln_1(x)).chunk(3, dim=-1)                # 3 x (B, L, C)
        k, v = (k * self.l_k).to(k.dtype), (v * self.l_v).to(v.dtype)         # scaled in float32
        x = x + attn.out_proj(attn.attend(q, k, v))
        h = mlp.act(mlp.c_fc(block.ln_2(x)))                                  # (B, L, 4C)
        return x + mlp.c_proj((h * self.l_ff).to(h.dtype))


def add_ia3(model):
    """(IA)^3 (Liu et al., arXiv 2205.05638), the identity at first. 12 x 6 x (768 + 512) = 92 160."""
    wrap_blocks(model, IA3Block)


class ScaleShift(nn.Module):
    """gamma x + beta, of a shape that broadcasts on x. Init: gamma 1, beta 0, both with noise of std 0.02."""
    def __init__(self, *shape):
        super().__init__()
        self.gamma = nn.Parameter(1 + 0.02 * torch.randn(shape))
        self.beta = nn.Parameter(0.02 * torch.randn(shape))

    def forward(self, x):
        return (x * self.gamma + self.beta).to(x.dtype)     # computed in float32, then cast back


class SSFBlock(nn.Module):
    """A ScaleShift after each of a block's six operations that have weights."""
    def __init__(self, block):
        super().__init__()
        width, hidden = block.attn.out_proj.in_features, block.mlp.c_fc.out_features
        self.inner = block
        self.on_ln_1, self.on_qkv, self.on_attn = ScaleShift(width), ScaleShift(3 * width), ScaleShift(width)
        self.on_ln_2, self.on_c_fc, self.on_mlp = ScaleShift(width), ScaleShift(hidden), ScaleShift(width)

    def forward(self, x):
        block, attn, mlp = self.inner, self.inner.attn, self.inner.mlp
        y = self.on_ln_1(block.ln_1(x))
        q, k, v = self.on_qkv(attn.project(y)).chunk(3, dim=-1)               # 3 x (B, L, C)
        x = x + self.on_attn(attn.out_proj(attn.attend(q, k, v)))
        y = self.on_ln_2(block.ln_2(x))
        h = mlp.act(self.on_c_fc(mlp.c_fc(y)))                                # (B, L, 4C)
        return x + self.on_mlp(mlp.c_proj(h))


def add_ssf(model):
    """SSF (Lian et al., arXiv 2210.08823): in all blocks, after patch embedding and last LayerNorms; nearly
    the identity at first. 12 x 22 x (768 + 512) + 2 x (768 + 768 + 512) = 342 016."""
    # differs from SSF: on the text tower as well; not after ln_pre and the projections, which its ViT lacks
    def followed(inner, *shape):
        return nn.Sequential(OrderedDict(inner=inner, ssf=ScaleShift(*shape)))
    wrap_blocks(model, SSFBlock)
    model.visual.conv1 = followed(model.visual.conv1, model.config.vision_width, 1, 1)
    model.visual.ln_post = followed(model.visual.ln_post, model.config.vision_width)
    model.text.ln_final = followed(model.text.ln_final, model.config.text_width)


def tune(model, names):
    """Let these of CLIP's own parameters learn, in float32 however CLIP is stored."""
    for name in names:
        parameter = model.get_parameter(name).requires_grad_(True)
        parameter.data = parameter.data.float()


def add_bitfit(model):
    """BitFit (Ben Zaken et al., arXiv 2106.10199): all biases, also those of the LayerNorms. 171 008."""
    tune(model, [name for name, _ in model.named_parameters() if name.endswith("bias")])


def add_layernorm(model):
    """LayerNorm tuning (Zhao et al., arXiv 2312.11420): weight and bias of each. 65 536."""
    # differs from LayerNorm tuning: also ln_pre, ln_post and ln_final, outside the blocks
    tune(model, [name for name, _ in model.named_parameters() if ".ln_" in name])


def add_none(model):
    """Plain CLIP, frozen: the zero-shot row."""


METHODS = {
    "none": add_none, "mrs": add_mrs, "adapter": add_adapter, "adaptformer": add_adaptformer,
    "convpass": add_convpass, "cross-modal-adapter": add_cross_modal_adapter, "uniadapter": add_uniadapter,
    "clip-adapter": add_clip_adapter, "linear-probe": add_linear_probe, "coop": add_coop, "vpt": add_vpt,
    "vl-prompt": add_vl_prompt, "maple": add_maple, "prompts": add_prompts, "lora": add_lora,
    "bitfit": add_bitfit, "layernorm": add_layernorm, "ia3": add_ia3, "ssf": add_ssf,
}
METHOD_SIZES = ("bottleneck", "dropout", "prompt_length", "prompt_depth", "rank", "shared")    # of any method
