"""CLIP from scratch: two transformers that put pictures and sentences into one space.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020.

Reads in three parts: the model; pictures and words (preprocess, Tokenizer); other people's weight files.
Facts that bite: captions end in EOT, and the text feature is read there; attention in the text tower is
causal, so nothing after EOT matters; OpenAI's models use QuickGELU, many open_clip's GELU; heads are 64 wide.

    python clip.py cat.jpg "a photo of a cat" "a photo of a dog" --model ViT-B/32

Shapes: B batch, L sequence length, C width, H heads, D joint width of both towers.
"""
import argparse
import gzip
import hashlib
import html
import json
import math
import os
import pickle
import re
import sys
import unicodedata
import zipfile
from collections import Counter, OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image


# ---------------------------------------------------------------------------------------------- the model

@dataclass
class CLIPConfig:
    """Sizes of a CLIP; `load_clip` infers them from the shapes in a file. Widths are multiples of 64."""
    embed_dim: int                  # D
    image_size: int | tuple         # pixels, or (height, width)
    patch_size: int
    vision_width: int
    vision_layers: int
    context_length: int
    vocab_size: int                 # the last id is EOT, the one before it SOT
    text_width: int
    text_layers: int
    activation: str = "quick_gelu"  # or "gelu"

    @property
    def grid(self):
        """(rows, columns) of patches."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height // self.patch_size, width // self.patch_size


class QuickGELU(torch.autograd.Function):
    """x * sigmoid(1.702 x), OpenAI's: not interchangeable with GELU on trained weights. Written as
    silu(1.702 x) / 1.702, whose two factors cancel in the gradient, which autograd would not see."""

    @staticmethod
    def forward(ctx, x):
        y = 1.702 * x
        ctx.save_for_backward(y)
        return F.silu(y).div_(1.702)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return torch.ops.aten.silu_backward(grad, *ctx.saved_tensors)


class Attention(nn.Module):
    """Multi-head self-attention with OpenAI's parameter names: q, k and v are packed in `in_proj`.

    `forward` is three steps, so that a method can change one: project to q, k, v; attend; project out.
    """

    def __init__(self, width, causal):
        super().__init__()
        self.heads, self.causal = width // 64, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def project(self, x):
        return F.linear(x, self.in_proj_weight, self.in_proj_bias)            # (B, L, 3C)

    def attend(self, q, k, v):
        L = q.shape[1]
        q, k, v = (z.unflatten(2, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))     # 3 x (B, H, L, C/H)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            # torch's fused backward is about 4x slower than the written-out product in bf16 on a CPU
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)          # (B, H, L, L)
            if self.causal:
                scores = scores + torch.full((L, L), float("-inf"), dtype=q.dtype).triu(1)
            x = scores.softmax(dim=-1) @ v                                    # (B, H, L, C/H)
        else:
            x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x.transpose(1, 2).flatten(2)                                   # (B, L, C)

    def forward(self, x):
        return self.out_proj(self.attend(*self.project(x).chunk(3, dim=-1)))


class MLP(nn.Module):
    """Two linear layers with the activation between them, 4x wider inside."""

    def __init__(self, width, activation):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.act = QuickGELU.apply if activation == "quick_gelu" else nn.GELU()
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm transformer block. The methods of adapters.py wrap it and restate these two lines.

    In attention tokens look at each other; in the MLP each is alone, and it is run for those that `keep` gives.
    """

    def __init__(self, width, causal, activation):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, activation)

    def forward(self, x, keep=nn.Identity()):
        x = keep(x + self.attn(self.ln_1(x)))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks, (B, L, C) -> (B, L, C), or to those tokens that `keep` picks before the last MLP."""

    def __init__(self, width, layers, causal, activation):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, causal, activation) for _ in range(layers))
        for block in self.resblocks:    # differs from OpenAI: both towers start as its text tower does; all biases 0
            nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)

    def forward(self, x, keep=nn.Identity()):
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x)
        return last(x, keep)


class Tower(nn.Module):
    """What both towers are: embed, transformer, pool, head. One token is read: pool picks and projects it."""

    def pool(self, x, inputs=None):     # inputs: what was embedded; the text tower looks for EOT in it
        return self.project(self.pick(x, inputs))       # (B, L, C) -> (B, 1, C) -> (B, D)

    def forward(self, inputs):
        """head(pool(transformer(embed(inputs)))), but the last MLP is run for the picked token alone."""
        x = self.transformer(self.embed(inputs), keep=lambda x: self.pick(x, inputs))       # (B, 1, C)
        return self.head(self.project(x))


class VisionTower(Tower):
    """Normalised images (B, 3, H, W) -> (B, D), the feature at the class token."""

    def __init__(self, config):
        super().__init__()
        width, patch, scale = config.vision_width, config.patch_size, config.vision_width ** -0.5
        self.grid = config.grid
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + self.grid[0] * self.grid[1], width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers, False, config.activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, config.embed_dim))
        self.head = nn.Identity()       # where CLIP-Adapter and the linear probe put their network

    def embed(self, images):
        x = self.conv1(images)                                                # (B, C, rows, columns)
        if x.shape[2:] != self.grid:
            raise ValueError(f"pictures of {tuple(images.shape[2:])} pixels make {tuple(x.shape[2:])} patches, this "
                             f"model reads {self.grid}: give load_clip the image_size")
        x = x.flatten(2).transpose(1, 2)                                      # (B, patches, C)
        cls = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([cls, x], dim=1) + self.positional_embedding            # (B, 1 + patches, C)
        return self.ln_pre(x)

    def pick(self, x, images):
        return x[:, :1]                                                       # the class token

    def project(self, x):
        return self.ln_post(x[:, 0]) @ self.proj


class TextTower(Tower):
    """Causal transformer: token ids (B, L), zero-padded -> (B, D), the feature at EOT."""

    def __init__(self, config):
        super().__init__()
        width = config.text_width
        self.eot = config.vocab_size - 1
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.transformer = Transformer(width, config.text_layers, True, config.activation)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width ** -0.5 * torch.randn(width, config.embed_dim))
        self.head = nn.Identity()
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def end(self, tokens):
        """Position of the first EOT in each row, (B,); L where there is none. Ids after it are never read."""
        found = tokens == self.eot
        return torch.where(found.any(dim=1), found.int().argmax(dim=1), tokens.shape[1])

    def embed(self, tokens):
        longest = int(self.end(tokens).max()) + 1   # to cut there is exact, as attention is causal
        if longest > tokens.shape[1]:
            raise ValueError(f"a text has no EOT, id {self.eot}: use the tokenizer that goes with this model")
        if longest > len(self.positional_embedding):
            raise ValueError(f"a text of {longest} tokens is too long for this model: give its tokenizer "
                             f"context_length={len(self.positional_embedding)}")
        return self.token_embedding(tokens[:, :longest]) + self.positional_embedding[:longest]  # (B, L, C)

    def pick(self, x, tokens):
        return x[torch.arange(len(x), device=x.device), self.end(tokens)][:, None]

    def project(self, x):
        return self.ln_final(x[:, 0]) @ self.text_projection


class CLIP(nn.Module):
    """Both towers and the learned temperature; `logit_scale` holds its logarithm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual = VisionTower(config)
        self.text = TextTower(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.names = list(self.state_dict())    # CLIP's own, before a method adds its parameters

    def encode_image(self, images):
        """Normalised images (B, 3, H, W) -> unit-length features (B, D) in float32."""
        return F.normalize(self.visual(images).float(), dim=-1)

    def encode_text(self, tokens):
        """Token ids (B, L) -> unit-length features (B, D) in float32."""
        return F.normalize(self.text(tokens).float(), dim=-1)

    def openai_state_dict(self):
        """CLIP's own tensors under OpenAI's names: for square pictures, loads into OpenAI's CLIP and open_clip.

        A method that wraps a part of CLIP holds it as `.inner`; a method's own tensors are left out.
        """
        state = {name.replace("inner.", ""): value for name, value in self.state_dict().items()}
        return {name.removeprefix("text."): state[name] for name in self.names}


SIZES = {   # the published sizes, and two to train from scratch (vocab_size is set when theirs is learned)
    "tiny": CLIPConfig(128, 80, 16, 192, 5, 32, 0, 128, 3),
    "small": CLIPConfig(256, 128, 16, 256, 6, 77, 0, 256, 4),
    "ViT-B/32": CLIPConfig(512, 224, 32, 768, 12, 77, 49408, 512, 12),
    "ViT-B/16": CLIPConfig(512, 224, 16, 768, 12, 77, 49408, 512, 12),
    "ViT-L/14": CLIPConfig(768, 224, 14, 1024, 24, 77, 49408, 768, 12),
    "ViT-L/14@336px": CLIPConfig(768, 336, 14, 1024, 24, 77, 49408, 768, 12),
}


# -------------------------------------------------------------------------------------- pictures and words

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)     # OpenAI's, of RGB


def preprocess(image, size):
    """PIL image -> uint8 tensor (3, H, W), equal to OpenAI's torchvision pipeline to the bit.

    size: the short side is resized to it, in pixels (bicubic), and the centre cut out; or (height, width), to
    which the image is resized. EXIF orientation is ignored, as torchvision does.
    """
    if isinstance(size, int):
        sides = [int(size * side / min(image.size)) for side in image.size]
        left, top = (round((side - size) / 2) for side in sides)
        image = image.resize(sides, Image.BICUBIC).crop((left, top, left + size, top + size))
    else:
        image = image.resize((size[1], size[0]), Image.BICUBIC)
    # RGB comes last: palettes, alpha and 16 bits then turn out as OpenAI's do
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def normalize(images):
    """Levels 0 to 255 (B, 3, H, W), uint8 or float -> float32 of about mean 0 and variance 1, same device."""
    level, mean, std = (torch.tensor(x, device=images.device).view(-1, 1, 1) for x in ((255.0,), MEAN, STD))
    return (images / level).sub_(mean).div_(std)    # in this order the bits equal torchvision's


def download(url, sha256):
    """Path of a file of OpenAI's in $CLIP_CACHE or ~/.cache/clip; fetched if not there, its hash checked."""
    path = Path(os.environ.get("CLIP_CACHE") or "~/.cache/clip").expanduser() / url.rsplit("/", 1)[1]
    if not path.exists():
        try:    # torch writes to another name and renames when the hash is right: half a file is never used
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"cannot download {url} ({error}): put that file at {path}") from None
    if path.stat().st_size == 0 or hashlib.sha256(np.memmap(path, mode="r")).hexdigest() != sha256:
        raise ValueError(f"{path} is damaged, its sha256 is not {sha256}: delete it and run again")
    return path


VOCABULARY = ("https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz",
              "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")
SOT, EOT = "<|startoftext|>", "<|endoftext|>"
# OpenAI's pattern needs the package regex for letters \p{L} and numbers \p{N}. In re, \w is \p{L}, \d, _ and
# NUMBERS, so that both can be written out. U+0345 matches nothing there, nor does it here.
# differs from OpenAI: letters newer than Python's own Unicode tables are signs here
NUMBERS = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Nl", "No"))
SPECIAL = r"(?i:<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d)|"
ASCII_WORD = re.compile(SPECIAL + r"[a-z]+|[0-9]|[^\sa-z0-9]+")                  # 15 times faster
WORD = re.compile(SPECIAL + rf"[^\W\d_{NUMBERS}]+|[\d{NUMBERS}]|(?:[^\s\w\u0345]|_)+")

# BPE works on bytes written as visible characters: Latin-1's as they are, the other 68 from U+0100 on
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = dict(zip(VISIBLE + sorted({*range(256)} - {*VISIBLE}), map(chr, VISIBLE + [*range(256, 324)])))

# what ftfy.fix_text replaces: C1 controls are Windows-1252, ligatures and half or full width become plain
FIXES = {c: bytes([c]).decode("cp1252", "ignore") or chr(c) for c in range(0x80, 0xA0)}
FIXES |= {c: unicodedata.normalize("NFKC", chr(c)) for c in (
    0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07), 0x3000,
    *range(0xFF01, 0xFFF0))}
# (but long s + t keeps its long s), quotes become straight, line ends one kind; and what it drops
FIXES |= {0xFB05: "\u017ft"} | dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'")
FIXES |= dict.fromkeys(range(0x201C, 0x2020), '"') | dict.fromkeys((13, 0x2028, 0x2029), "\n")
DROPS = [*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]


def entity(match):
    """What ftfy makes of an HTML entity: names in capitals too, and none of which only a part is a name."""
    text = html.unescape(match[0])
    if text == match[0] == match[0].upper():
        text = html.unescape(match[0].lower()).upper()                        # P&EACUTE;REZ
    return match[0] if ";" in text and match[0].lower() != "&semi;" else text


def words_of(text):
    """The words OpenAI's tokenizer sees in cleaned, lower-case text: runs of letters, digits, runs of signs.

    differs from OpenAI: ftfy also repairs mojibake (UTF-8 that was read as Latin-1); it stays as it is here.
    """
    if not (text.isascii() and text.isprintable() and "&" not in text):       # most captions need nothing
        lines, tag = text.split("\n"), False
        for i, line in enumerate(lines):
            tag, before = tag or "<" in line, None
            while line != before:
                before = line
                line = line if tag else re.sub("&#?[0-9A-Za-z]{1,24};", entity, line)   # ftfy: not in HTML
                line = line.translate(FIXES)
                line = line.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
                line = re.sub(r"\033\[[\d;]*[a-zA-Z]", "", line).translate(dict.fromkeys(DROPS))
                line = unicodedata.normalize("NFC", line)
            lines[i] = line
        text = html.unescape(html.unescape("\n".join(lines)))
    text = " ".join(text.split()).lower()
    return (ASCII_WORD if text.isascii() else WORD).findall(text)


def spell(word):
    """A word as BPE starts from it: a symbol per UTF-8 byte, the last marked as the word's end. Each has a space
    on either side, " a  b  c</w> ", so that one replace joins all occurrences of a pair, left to right."""
    return "".join(f" {BYTES[b]} " for b in word.encode())[:-1] + "</w> "


def join(word, pair):
    """A spelled word with every occurrence of a pair of symbols made one symbol."""
    return word.replace(" {}  {} ".format(*pair), " {}{} ".format(*pair))


class Tokenizer:
    """Byte-level BPE with OpenAI's ids: 256 bytes, 256 bytes that end a word, one id per merge, SOT, EOT.

    path: None or one of OpenAI's names, for their vocabulary (1.3 MB, fetched once); its .gz file; or a weight
    file: a run of ours has its own, any other has OpenAI's. merges: instead of a path, a list of "a b" strings.
    """

    def __init__(self, path=None, merges=None):
        file = None
        if str(path).endswith(".gz"):
            file = path
        elif path is not None and path not in URLS:
            with loading(path):
                merges = read_file(path).get("merges")
        self.merges = merges            # None for OpenAI's
        if merges is None:
            merges = gzip.decompress(Path(file or download(*VOCABULARY)).read_bytes()).decode()
            merges = merges.split("\n")[1:49152 - 256 - 2 + 1]      # a header first; more follow than CLIP uses
        merges = [tuple(merge.split()) for merge in merges]
        self.rank = {pair: i for i, pair in enumerate(merges)}
        symbols = [*BYTES.values(), *(c + "</w>" for c in BYTES.values()), *map("".join, merges), SOT, EOT]
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.vocab_size, self.sot, self.eot = len(symbols), len(symbols) - 2, len(symbols) - 1
        self.known = {SOT: [self.sot], EOT: [self.eot]}                       # word -> its ids

    @classmethod
    def train(cls, captions, merges):
        """A Tokenizer with up to `merges` merges learned from captions: the most frequent pair of symbols is
        joined, again and again (Sennrich et al., arXiv 1508.07909); of equals, the last in the alphabet."""
        counts = Counter(word for text in captions for word in words_of(text) if word not in (SOT, EOT))
        words, pairs, learned = {spell(word): n for word, n in counts.items()}, Counter(), []

        def count(word, n):
            symbols = word.split()
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += n

        for word, n in words.items():
            count(word, n)
        while len(learned) < merges and any(pairs.values()):
            best = max(pairs, key=lambda pair: (pairs[pair], pair))
            learned.append(" ".join(best))
            for word in [word for word in words if join(word, best) != word]:
                count(word, -words[word])
                count(join(word, best), words[word])
                words[join(word, best)] = words.pop(word)
        return cls(merges=learned)

    def ids_of(self, word):
        """Ids of a word: of its pairs the one learned first is joined, again and again, until none is known."""
        joined, last = spell(word), len(self.rank)
        while True:
            symbols = joined.split()
            pair = min(zip(symbols, symbols[1:]), key=lambda pair: self.rank.get(pair, last), default=None)
            if pair not in self.rank:
                return [self.ids[symbol] for symbol in symbols]
            joined = join(joined, pair)

    def __call__(self, texts, context_length=77):
        """Texts (a list, or one) -> int64 (N, context_length): SOT, the text, EOT, then zeros.

        differs from OpenAI: a text that is too long is cut, and EOT kept last; theirs raises.
        """
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(tokens.numpy(), texts):
            ids = [self.sot]
            for word in words_of(text):
                if word not in self.known:
                    self.known[word] = self.ids_of(word)
                ids += self.known[word]
            ids = [*ids[:context_length - 1], self.eot]
            row[:len(ids)] = ids
        return tokens


# ------------------------------------------------------------------------------ other people's weight files

URLS = {name: f"https://openaipublic.azureedge.net/clip/models/{file}" for name, file in {
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
}.items()}
HUGGING_FACE = {    # pieces of their names -> of OpenAI's, replaced in this order
    "visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection",
    "vision_model.": "visual.", "text_model.": "", "embeddings.": "",
    "patch_embedding.": "conv1.", "position_embedding.weight": "positional_embedding",
    "pre_layrnorm.": "ln_pre.", "post_layernorm.": "ln_post.", "final_layer_norm.": "ln_final.",    # sic
    "encoder.layers.": "transformer.resblocks.", "layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.", "self_attn.q_proj.": "attn.in_proj_",      # k and v go behind q
}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ALLOWED = {     # all that the pickle in a weight file may name, and what it gets
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_tensor_v2": lambda storage, offset, shape, stride, *_:
        lambda: storage().as_strided(shape, stride, offset),
    "torch.jit._pickle.restore_type_tag": lambda value, _: value,
    **{f"torch.jit._pickle.build_{kind}list": list for kind in ("int", "double", "bool", "tensor")},
    **{f"torch.{name}Storage": getattr(torch, name.lower()) for name in
       ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Bool")},
}


@contextmanager
def loading(path):
    """Whatever a damaged or foreign file makes pickle, zipfile, json or torch raise becomes one line."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):       # torch's own text advises to run what is in it
            reason = "it is damaged or holds more than tensors; nothing was run"
        raise ValueError(f"{path} cannot be loaded: {reason}") from error


class Part(dict):
    """A TorchScript module without its code: the tensors in it and in its parts, by their dotted names."""

    def __setstate__(self, attributes):
        for name, value in attributes.items():
            if isinstance(value, Part):
                self.update({f"{name}.{inner}": tensor for inner, tensor in value.items()})
            elif callable(value):
                self[name] = value


def read_zip(path):
    """What torch.save or TorchScript pickled, without running anything: whatever it names besides ALLOWED is
    refused. Its tensors are functions that read them, so that optimizer states stay in the file."""
    archive = zipfile.ZipFile(path)
    folder = next((name[:-8] for name in archive.namelist() if name.endswith("data.pkl")), None)
    if folder is None:
        raise ValueError("it is a zip archive without weights: unpack it and give a file of it")

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if module.partition(".")[0] == "__torch__":     # a class that TorchScript compiled
                return Part
            if f"{module}.{name}" not in ALLOWED:
                raise ValueError(f"it asks for {module}.{name}, which weights do not need, and nothing was "
                                 "run; if you trust where it is from, save its state dict alone")
            return ALLOWED[f"{module}.{name}"]

        def persistent_load(self, storage):
            _, dtype, key, *_ = storage
            return lambda: torch.frombuffer(bytearray(archive.read(f"{folder}data/{key}")), dtype=dtype)

    return Unpickler(archive.open(folder + "data.pkl")).load()


def read_safetensors(path):
    """{name: function that reads a tensor}. The file: the length of a JSON header, the header, raw bytes."""
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))

    def read(dtype, shape, data_offsets):
        first, last = data_offsets
        data = np.fromfile(path, np.uint8, last - first, offset=start + first)
        return torch.from_numpy(data).view(DTYPES[dtype]).view(shape)

    return {name: partial(read, **entry) for name, entry in header.items() if name != "__metadata__"}


def read_file(name_or_path):
    """What a weight file holds: a dict of tensors, or of functions that return one when called, or a dict of
    settings that has it as "state_dict"."""
    path = Path(name_or_path)
    if name_or_path in URLS:
        path = download(URLS[name_or_path], URLS[name_or_path].split("/")[-2])
    if path.is_dir():
        names = "best.pt", "model.safetensors", "pytorch_model.bin"
        path = next((path / name for name in names if (path / name).is_file()), path / names[0])
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give a weight file, or one of {', '.join(URLS)}")
    with open(path, "rb") as file:
        start = file.read(16)
    if start[:2] == b"PK":
        found = read_zip(path)
    elif start[8:9] == b"{":
        found = read_safetensors(path)
    elif start[:1] == b"\x80":
        found = torch.load(path, map_location="cpu", weights_only=True)     # torch.save's before torch 1.6
    else:
        raise ValueError(f"it is no weight file, it starts with {start!r}" if start else "it is empty")
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, no dict of tensors")
    config = path.with_name("config.json")
    if "text_model.final_layer_norm.weight" in found and config.is_file():      # Hugging Face
        vision = json.loads(config.read_text("utf-8")).get("vision_config", {})
        found = {"state_dict": found, "activation": vision.get("hidden_act", "quick_gelu")}
    return found


def to_openai(found):
    """{OpenAI's name: float32 tensor} of tensors under other people's names. Empties `found` as it goes."""
    def read(name):
        value = found.pop(name)
        value = value() if callable(value) else value
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} is no tensor: give a state dict, or a dict with one under 'state_dict'")
        value = value.float().contiguous()      # and, for what was saved as a view, in memory of its own
        return value if value.nbytes == value.untyped_storage().nbytes() else value.clone()

    weights = {}
    for name in list(found):
        new = re.sub(r"^(module\.|_orig_mod\.|text\.)+", "", name)
        for old, piece in HUGGING_FACE.items():
            new = new.replace(old, piece)
        if new.rsplit(".", 1)[-1] in ("input_resolution", "context_length", "vocab_size", "attn_mask",
                                      "position_ids") or ".k_proj." in new or ".v_proj." in new:
            continue    # no weights; k and v are read with q
        tensor = read(name)
        if ".q_proj." in name:
            tensor = torch.cat([tensor, *(read(name.replace(".q_", part)) for part in (".k_", ".v_"))])
        weights[new] = tensor.T.contiguous() if name.endswith("_projection.weight") else tensor
    return weights


def config_of(weights, trained_at, image_size, activation):
    """CLIPConfig from tensors' shapes. The image size is the first of trained_at, a square and image_size that
    has as many patches as the file."""
    for name in ("visual.conv1.weight", "visual.positional_embedding", "token_embedding.weight",
                 "positional_embedding", "text_projection"):
        if name not in weights:
            raise ValueError(f"it has no {name}: a CLIP of OpenAI's two transformers is needed, no ResNet, "
                             "no SigLIP and no tower alone")
    layers = [sum(name.startswith(f"{tower}.resblocks.") and name.endswith(".ln_1.bias") for name in weights)
              for tower in ("visual.transformer", "transformer")]
    width, patch = weights["visual.conv1.weight"].shape[::3]
    vocab_size, text_width = weights["token_embedding.weight"].shape
    if width > 1024 or width % 64 or text_width % 64:   # ViT-H is 1280 wide, its heads are 80
        raise ValueError(f"its towers are {width} and {text_width} wide: heads that are not 64 wide, as in "
                         "ViT-H and larger, are not known here")
    patches = len(weights["visual.positional_embedding"]) - 1
    length, embed_dim = len(weights["positional_embedding"]), weights["text_projection"].shape[1]
    for size in filter(None, (trained_at, math.isqrt(patches) * patch, image_size)):
        config = CLIPConfig(embed_dim, size, patch, width, layers[0],
                            length, vocab_size, text_width, layers[1], activation)
        if math.prod(config.grid) == patches:
            return config
    raise ValueError(f"its {patches} patches make no square: give the image_size it was trained at")


def load_clip(name_or_path, image_size=None, device="cpu", activation=None):
    """A CLIP in float32 and eval mode, from one of OpenAI's names or a weight file of any known kind.

    Files: OpenAI's archives, state dicts, training checkpoints, open_clip's .pt, Hugging Face's CLIPModel
    (file or folder), a run of ours. image_size: pixels or (height, width); other than the checkpoint's, the
    positional grid is resized (bilinear). activation: "gelu" for open_clip models without -quickgelu in their
    name; the files do not say. Nothing in a file is ever run. Raises FileNotFoundError or ValueError.
    """
    with loading(name_or_path):
        found = read_file(name_or_path)
        settings = found.get("settings", {})
        if "trained" in found and "state_dict" not in found:
            raise ValueError(f"it holds a method for {settings.get('model', 'a CLIP')}, no CLIP: give that, "
                             f"or use python eval.py {name_or_path}")
        activation = activation or found.get("activation") or "quick_gelu"
        if activation not in ("quick_gelu", "gelu"):
            raise ValueError(f"activation {activation!r} is not known: give quick_gelu or gelu")
        weights = to_openai(found.get("state_dict", found))
        config = config_of(weights, settings.get("image_size"), image_size, activation)
        grid, config.image_size = config.grid, image_size or config.image_size
        if config.grid != grid:
            cls, position = weights["visual.positional_embedding"].tensor_split([1])
            position = position.T.reshape(1, -1, *grid)                       # (1, C, rows, columns)
            position = F.interpolate(position, config.grid, mode="bilinear", align_corners=False)
            weights["visual.positional_embedding"] = torch.cat([cls, position[0].flatten(1).T])
        with torch.device("meta"):      # takes no memory: the tensors that were read become the parameters
            model = CLIP(config)
        model.load_state_dict({name if name.startswith(("visual.", "logit_scale")) else "text." + name: tensor
                               for name, tensor in weights.items()}, assign=True)
    return model.to(device).eval()


def main():
    """Print the probability of each text for the image."""
    parser = argparse.ArgumentParser(description="Which text fits the image: CLIP's probabilities.")
    parser.add_argument("image")
    parser.add_argument("texts", nargs="+", metavar="text")
    parser.add_argument("--model", default="ViT-B/32", help=f"{', '.join(URLS)}, a file, or a run's folder")
    parser.add_argument("--activation", choices=("quick_gelu", "gelu"), help="gelu for most open_clip files")
    args = parser.parse_args()
    try:
        model, tokenizer = load_clip(args.model, activation=args.activation), Tokenizer(args.model)
        image = normalize(preprocess(Image.open(args.image), model.config.image_size)[None])
        tokens = tokenizer(args.texts, model.config.context_length)
        with torch.no_grad():
            logits = model.logit_scale.exp() * model.encode_image(image) @ model.encode_text(tokens).T
    except (ValueError, OSError) as error:      # what the user can put right
        parser.exit(2, f"clip.py: {error}\n")
    for text, probability in zip(args.texts, logits.softmax(dim=-1)[0].tolist()):
        print(f"{probability:.4f}  {text}")


if __name__ == "__main__":
    main()
