"""CLIP from scratch: two transformers that put images and captions into one space.
Radford et al., Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020.

Facts that bite: a caption ends in EOT, where its feature is read; attention in the text tower is causal, so
nothing after EOT matters; OpenAI's models use QuickGELU, many of open_clip's GELU; all heads are 64 wide.

Shapes: B batch, L sequence length, C width, H heads, D width of the joint space of images and texts.
A deviation from OpenAI's code is marked `differs from`.
"""
import gzip
import html
import json
import math
import os
import pickle
import re
import unicodedata
import zipfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


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
        """(rows, columns) of patches; ValueError if there are none."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < self.patch_size:
            raise ValueError(f"images of {size} pixels are smaller than a patch of {self.patch_size}")
        return height // self.patch_size, width // self.patch_size


def quick_gelu(x):
    """x * sigmoid(1.702 x), OpenAI's. Weights trained with it do not work with GELU, nor the reverse."""
    return F.silu(1.702 * x) / 1.702        # the same function; autograd keeps one tensor less


class Attention(nn.Module):
    """Multi-head self-attention, in the steps project, attend, out_proj: a method may act between them."""
    def __init__(self, width, causal):
        super().__init__()
        self.heads, self.causal = width // 64, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def project(self, x):
        return F.linear(x, self.in_proj_weight, self.in_proj_bias)            # (B, L, 3C)

    def attend(self, q, k, v):
        q, k, v = (z.unflatten(2, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))     # (B, H, L, C/H)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            # the same, written out: in bf16 on a CPU the backward of torch's fused one is about 4x slower
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)          # (B, H, L, L)
            if self.causal:
                scores = scores + torch.full(scores.shape[2:], float("-inf"), dtype=q.dtype).triu(1)
            x = scores.softmax(dim=-1) @ v                                    # (B, H, L, C/H)
        else:
            x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x.transpose(1, 2).flatten(2)                                   # (B, L, C)

    def forward(self, x):
        q, k, v = self.project(x).chunk(3, dim=-1)                            # (B, L, C) each
        return self.out_proj(self.attend(q, k, v))


class MLP(nn.Module):
    """Two linear layers with the activation between them, 4x wider inside."""
    def __init__(self, width, activation):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.act = {"quick_gelu": quick_gelu, "gelu": F.gelu}[activation]
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm transformer block. Many methods of adapters.py wrap it and restate the lines of `forward`."""
    def __init__(self, width, causal, activation):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, activation)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks, (B, L, C) -> (B, L, C)."""
    def __init__(self, width, layers, activation, causal):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, causal, activation) for _ in range(layers))
        self.grad_checkpointing = False     # True: less memory, as backward computes each block once more
        # differs from OpenAI, which initialises only the text tower so, and the MLP's biases at random
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)

    def forward(self, x):
        for block in self.resblocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class VisionTower(nn.Module):
    """Normalised images (B, 3, height, width) -> (B, D), the feature at the class token."""
    def __init__(self, config):
        super().__init__()
        width, patch, scale = config.vision_width, config.patch_size, config.vision_width ** -0.5
        self.grid = config.grid
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + math.prod(self.grid), width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers, config.activation, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, config.embed_dim))
        self.head = nn.Identity()       # where CLIP-Adapter and the linear probe put their network

    def embed(self, images):
        x = self.conv1(images)                                                # (B, C, rows, columns)
        if x.shape[2:] != self.grid:
            raise ValueError(f"images have {tuple(x.shape[2:])} patches, this model reads {self.grid}")
        x = x.flatten(2).transpose(1, 2)                                      # (B, patches, C)
        cls = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([cls, x], dim=1) + self.positional_embedding            # (B, L = 1 + patches, C)
        return self.ln_pre(x)

    def pool(self, x, images):          # images: not used; train.encode calls the pools of both towers alike
        return self.ln_post(x[:, 0]) @ self.proj                              # (B, D), from the class token

    def forward(self, images):
        return self.head(self.pool(self.transformer(self.embed(images)), images))


class TextTower(nn.Module):
    """Causal transformer: token ids (B, L), zero-padded -> (B, D), the feature at the first EOT."""
    def __init__(self, config):
        super().__init__()
        width = config.text_width
        self.eot = config.vocab_size - 1    # the highest id, so a row's argmax is its first EOT
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.transformer = Transformer(width, config.text_layers, config.activation, causal=True)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width ** -0.5 * torch.randn(width, config.embed_dim))
        self.head = nn.Identity()
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def embed(self, tokens):
        # to save time, cut the columns behind the last of the rows' first EOTs. Exact: attention is causal,
        # all else works token by token, and a feature is read at its row's first EOT alone
        eot = tokens.argmax(dim=1)              # (B,), each row's first EOT, if it has one
        tokens = tokens[:, :int(eot.max()) + 1]
        L, longest = tokens.shape[1], len(self.positional_embedding)
        if L > longest or (tokens.amax(dim=1) != self.eot).any():
            raise ValueError(f"each text must have EOT, {self.eot}, in its first {longest} tokens")
        return self.token_embedding(tokens) + self.positional_embedding[:L]   # (B, L, C)

    def pool(self, x, tokens):
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)]    # (B, C), at each first EOT
        return self.ln_final(x) @ self.text_projection                        # (B, D)

    def forward(self, tokens):
        return self.head(self.pool(self.transformer(self.embed(tokens)), tokens))


class CLIP(nn.Module):
    """Both towers and the learned temperature; `logit_scale` holds the logarithm of its inverse."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual = VisionTower(config)
        self.text = TextTower(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.own_names = list(self.state_dict())        # for openai_state_dict, before a method adds its own

    def encode_image(self, images):
        """Normalised images (B, 3, height, width) -> unit-length features (B, D) in float32."""
        # differs from OpenAI, in both encoders: its features are not normalised
        return F.normalize(self.visual(images).float(), dim=-1)

    def encode_text(self, tokens):
        """Token ids (B, L) -> unit-length features (B, D) in float32."""
        return F.normalize(self.text(tokens).float(), dim=-1)

    def openai_state_dict(self):
        """CLIP's own tensors under OpenAI's names, for OpenAI's CLIP and open_clip (they take square images).
        A method that wraps a part of CLIP holds it as `.inner`; a method's own tensors are left out."""
        unwrapped = {name.replace("inner.", ""): tensor for name, tensor in self.state_dict().items()}
        return {name.removeprefix("text."): unwrapped[name] for name in self.own_names}


# The published sizes, and two to train from scratch. In order: D; image size, patch size, width and layers of
# the image tower; context length, vocabulary (0: learned from captions later), width and layers of the text's
SIZES = {
    "tiny": CLIPConfig(128, 80, 16, 192, 5, 32, 0, 128, 3),
    "small": CLIPConfig(256, 128, 16, 256, 6, 77, 0, 256, 4),
    "ViT-B/32": CLIPConfig(512, 224, 32, 768, 12, 77, 49408, 512, 12),
    "ViT-B/16": CLIPConfig(512, 224, 16, 768, 12, 77, 49408, 512, 12),
    "ViT-L/14": CLIPConfig(768, 224, 14, 1024, 24, 77, 49408, 768, 12),
    "ViT-L/14@336px": CLIPConfig(768, 336, 14, 1024, 24, 77, 49408, 768, 12),
}


# --------------------------------------------------------------------------------------- pixels and words

MEAN = (0.48145466, 0.4578275, 0.40821073)      # OpenAI's, of red, green and blue in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(image, size):
    """PIL image -> uint8 (3, height, width), equal to OpenAI's torchvision pipeline to the bit, EXIF ignored.
    size: an int scales the short side to it and cuts out the centre square; (height, width) stretches."""
    if isinstance(size, int):
        width, height = (int(size * side / min(image.size)) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.resize((width, height), Image.BICUBIC).crop((left, top, left + size, top + size))
    else:
        image = image.resize((size[1], size[0]), Image.BICUBIC)
    # RGB comes last: palettes, alpha and 16 bits then turn out as OpenAI's do
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def normalize(images):
    """Levels 0 to 255 (B, 3, height, width), uint8 or float -> float32 of about mean 0 and variance 1."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return (images / 255 - mean) / std      # in this order the bits equal torchvision's


VOCABULARY = ("https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz",
              "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")       # its sha256
SOT, EOT = "<|startoftext|>", "<|endoftext|>"
# OpenAI's pattern for Python's re, where \w is a letter, number or _, and \d a digit. NUMBERS: numbers that
# are no digits, such as a raised 2. differs from OpenAI: above U+3400 these count as letters, and letters
# newer than Python's tables as signs
NUMBERS = "".join(c for c in map(chr, range(0x3400)) if unicodedata.category(c) in ("Nl", "No"))
WORD = re.compile(r"(?i:<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d)"
                  rf"|[^\W\d_{NUMBERS}]+"       # letters: each a \w, but no digit, no _, none of NUMBERS
                  rf"|[\d{NUMBERS}]"            # one number
                  r"|(?:[^\s\w\u0345]|_)+")     # signs; U+0345, a mark, is dropped, as by OpenAI
CURLY = str.maketrans("\u02bc\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "'''''\"\"\"\"")
# BPE works on bytes written as characters: the 188 visible ones of Latin-1, 68 others as U+0100, U+0101, ...
BYTES = {byte: chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]}
for byte in range(256):
    if byte not in BYTES:
        BYTES[byte] = chr(256 + len(BYTES) - 188)


def words_of(text):
    """The words OpenAI's tokenizer sees in a text: runs of letters, single numbers, runs of signs.
    differs from OpenAI: of what ftfy repairs, only HTML entities, curly quotes and NFC are done here."""
    text = html.unescape(html.unescape(text)).translate(CURLY)
    return WORD.findall(" ".join(unicodedata.normalize("NFC", text).split()).lower())


def spell(word):
    """The symbols BPE starts from, one for each UTF-8 byte, the last one marked: "cat" -> c, a, t</w>."""
    symbols = [BYTES[byte] for byte in word.encode("utf-8", "replace")]
    return [*symbols[:-1], symbols[-1] + "</w>"]


def merge(symbols, pair):
    """The symbols with each occurrence of the pair made one, from the left: a, b, a, b -> ab, ab."""
    merged = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


class Tokenizer:
    """Byte-level BPE with OpenAI's ids: 256 bytes, 256 bytes that end a word, one id per merge, SOT, EOT.
    path: a vocabulary file, None for OpenAI's. merges: in place of a file, a list of strings "a b"."""
    def __init__(self, path=None, merges=None):
        self.merges = merges                    # None for a vocabulary file
        if merges is None:
            path = path or download(*VOCABULARY)
            with loading(path), gzip.open(path, "rt", encoding="utf-8") as file:
                lines = file.read().split("\n")
            merges = lines[1:1 + 48894]         # after a header; 512 bytes + 48 894 + SOT, EOT = 49 408 ids
        pairs = [tuple(line.split()) for line in merges]
        self.rank = {pair: i for i, pair in enumerate(pairs)}
        ends = [symbol + "</w>" for symbol in BYTES.values()]
        symbols = [*BYTES.values(), *ends, *map("".join, pairs), SOT, EOT]
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.vocab_size, self.sot, self.eot = len(symbols), len(symbols) - 2, len(symbols) - 1
        self.known = {SOT: [self.sot], EOT: [self.eot]}     # word -> its ids, filled as words are met

    @classmethod
    def train(cls, captions, merges):
        """A Tokenizer with up to `merges` merges learned from captions: the most frequent pair of symbols is
        merged, again and again (Sennrich et al., arXiv 1508.07909); of equals, the last in the alphabet."""
        counts = Counter()
        for caption in captions:
            counts.update(words_of(caption))
        words = [(spell(word), count) for word, count in counts.items() if word not in (SOT, EOT)]
        learned = []
        for _ in tqdm(range(merges), "learning the vocabulary", leave=False, disable=None):
            pairs = Counter()
            for symbols, count in words:
                for pair in zip(symbols, symbols[1:]):
                    pairs[pair] += count
            if not pairs:                       # each word is one symbol
                break
            best = max(pairs, key=lambda pair: (pairs[pair], pair))
            learned.append(" ".join(best))
            words = [(merge(symbols, best), count) for symbols, count in words]
        return cls(merges=learned)

    def ids_of(self, word):
        """Ids of a word: of its pairs the one learned first is merged, until none is known."""
        symbols = spell(word)
        while True:
            known = [pair for pair in zip(symbols, symbols[1:]) if pair in self.rank]
            if not known:
                return [self.ids[symbol] for symbol in symbols]
            symbols = merge(symbols, min(known, key=self.rank.get))

    def encode(self, text):
        """A text's ids, as many as there are: SOT, those of its words, EOT."""
        ids = [self.sot]
        for word in words_of(text):
            if word not in self.known:
                self.known[word] = self.ids_of(word)
            ids += self.known[word]
        return ids + [self.eot]

    def __call__(self, texts, context_length=77):
        """Texts (a list, or one) -> int64 (texts, context_length): SOT, the text, EOT, then zeros.
        differs from OpenAI: a text that is too long is cut, and EOT kept last; theirs raises by default."""
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(tokens, texts):
            ids = self.encode(text)
            if len(ids) > context_length:
                ids = ids[:context_length - 1] + [self.eot]
            row[:len(ids)] = torch.tensor(ids)
        return tokens


# ------------------------------------------------------------------------------------------- weight files

PUBLISHED = "https://openaipublic.azureedge.net/clip/models/"
URLS = {    # the folder's name is the file's sha256
    "ViT-B/32": PUBLISHED + "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": PUBLISHED + "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": PUBLISHED + "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "ViT-L/14@336px":
        PUBLISHED + "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
}
FILES = ("best.pt", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors",
         "pytorch_model.bin")       # what is looked for in a folder
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}     # safetensors'
HUGGING_FACE = {    # pieces of their names -> of OpenAI's, replaced in this order
    "visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection",
    "vision_model.": "visual.", "text_model.": "", "embeddings.": "",
    "patch_embedding.": "conv1.", "position_embedding.weight": "positional_embedding",
    "pre_layrnorm.": "ln_pre.", "post_layernorm.": "ln_post.", "final_layer_norm.": "ln_final.",    # sic
    "encoder.layers.": "transformer.resblocks.", "layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj.", "self_attn.": "attn.",
}
ANCHOR = "visual.conv1.weight"      # in every CLIP; what precedes it in a file, "model.", precedes all names
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")


@contextmanager
def loading(path):
    """Any error over a damaged or foreign file becomes a ValueError of one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        if isinstance(error, pickle.UnpicklingError):       # torch's own text advises to run what is in it
            objects = re.findall(r"GLOBAL (\S+)", reason)
            reason = f"damaged or more than tensors {objects}: save a state_dict alone; nothing in it was run"
        raise ValueError(f"{path} cannot be loaded ({type(error).__name__}): {reason[:400]}") from error


def download(url, sha256):
    """Path of a file of OpenAI's in $CLIP_CACHE or ~/.cache/clip; fetched and checked if it is not there."""
    path = Path(os.environ.get("CLIP_CACHE") or "~/.cache/clip").expanduser() / url.rsplit("/", 1)[1]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)      # leaves no half file
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"cannot download {url} ({error}): put that file at {path}. Other "
                                    f"weights: --model FILE; they need {VOCABULARY[0]} too") from None
    return path


def find_file(name_or_path):
    """Path of the weight file that one of OpenAI's names, a file or a folder stands for."""
    if name_or_path in URLS:
        return download(URLS[name_or_path], sha256=URLS[name_or_path].split("/")[-2])
    path = Path(name_or_path)
    for file in [path] + [path / name for name in FILES]:
        if file.is_file():
            return file
    held = sorted(os.listdir(path))[:20] if path.is_dir() else "nothing"
    raise FileNotFoundError(f"{path} is no weight file and no folder with {', '.join(FILES)}, but {held}: "
                            f"give one of these or {', '.join(URLS)} (no ResNets such as RN50)")


def flatten(nested, prefix=""):
    """Nested dicts as one: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class ScriptModule(dict):
    """A module of a TorchScript archive, without its code: the dict of its attributes."""
    __setstate__ = dict.update      # pickle hands it the attributes


class ScriptUnpickler(pickle.Unpickler):
    """Reads a TorchScript archive and runs nothing in it. A pickle names classes and functions to call: here
    modules become dicts, marks of types are dropped, KNOWN has the rest, and any other name is a KeyError."""
    KNOWN = {
        "OrderedDict": dict,
        "HalfStorage": torch.half, "FloatStorage": torch.float, "LongStorage": torch.long,
        "_rebuild_tensor_v2": lambda data, offset, shape, stride, *_: data.as_strided(shape, stride, offset),
    }

    def __init__(self, folder):
        super().__init__((folder / "data.pkl").open("rb"))
        self.folder = folder

    def find_class(self, module, name):
        if module == "torch.jit._pickle":           # it would mark the type of a list or dict
            return lambda value, *_: value
        return ScriptModule if module.startswith("__torch__") else self.KNOWN[name]

    def persistent_load(self, storage):
        _, dtype, key, *_ = storage     # dtype: what KNOWN has in place of the storage's class
        return torch.frombuffer(bytearray((self.folder / "data" / key).read_bytes()), dtype=dtype)


def read_safetensors(path):
    """{name: tensor}. The file: 8 bytes with the length of a JSON header; the header; the tensors' bytes."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        dtype, shape, offset = DTYPES[entry["dtype"]], entry["shape"], start + entry["data_offsets"][0]
        tensor = torch.frombuffer(content, dtype=dtype, count=math.prod(shape), offset=offset)
        tensors[name] = tensor.view(shape)
    return tensors


def read_file(name_or_path):
    """What a weight file holds: a dict of tensors, or one with such a dict in it. A best.pt of train.py has
    "settings", "merges", "trained" (the method's tensors) and, if CLIP learned, "state_dict". Runs nothing in
    the file. Raises FileNotFoundError or ValueError, in one line."""
    path = find_file(name_or_path)
    with loading(path), open(path, "rb") as file:
        start = file.read(9)
        if start[8:] == b"{":                           # safetensors: a length in 8 bytes, then JSON
            return read_safetensors(path)
        if start[:2] == b"PK":                          # a zip, which torch.save and TorchScript write
            folder, = zipfile.Path(path).iterdir()
            if (folder / "constants.pkl").exists():     # TorchScript
                return ScriptUnpickler(folder).load()
        elif start[:1] != b"\x80":                      # nor a pickle, which torch.save wrote before 1.6
            raise ValueError(f"it is no weight file, it starts with {start!r}")
        return dict(torch.load(path, map_location="cpu", weights_only=True))        # a zip or a pickle


def to_openai(content):
    """{OpenAI's name: tensor} from OpenAI's, open_clip's or Hugging Face's names behind any common prefix."""
    for container in ("state_dict", "model_state_dict", "model"):
        content = content.get(container, content)       # the container, if there is one
    renamed = {}
    for name, tensor in flatten(content).items():
        if "lora_A" in name or "base_layer" in name:
            raise ValueError("it is an unmerged PEFT checkpoint: call merge_and_unload() and save it again")
        if name.endswith("_projection.weight"):     # a linear layer of Hugging Face, a matrix of OpenAI
            tensor = tensor.T
        for theirs, ours in HUGGING_FACE.items():
            name = name.replace(theirs, ours)
        if isinstance(tensor, torch.Tensor) and not name.endswith(NOT_WEIGHTS):
            renamed[name] = tensor
    prefixes = [name.removesuffix(ANCHOR) for name in renamed if name.endswith(ANCHOR)]
    if len(prefixes) != 1:
        raise ValueError(f"it holds {len(prefixes)} CLIPs {prefixes} among {list(content)[:3]} ..., not one")
    weights = {name.removeprefix(prefixes[0]).removeprefix("text."): tensor     # text.: some of open_clip's
               for name, tensor in renamed.items() if name.startswith(prefixes[0])}
    for name in list(weights):
        if ".q_proj." in name:                      # Hugging Face's q, k and v are apart
            qkv = [weights.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
            weights[name.replace(".q_proj.", ".in_proj_")] = torch.cat(qkv)
    return weights


def config_of(weights, image_size):
    """CLIPConfig from the tensors' shapes. image_size: the one it was trained at; None: its patches fill a
    square."""
    width, _, _, patch = weights[ANCHOR].shape
    vocab_size, text_width = weights["token_embedding.weight"].shape
    if width > 1024 or width % 64 or text_width % 64:       # ViT-H is 1280 wide, its heads are 80
        raise ValueError(f"its towers are {width} and {text_width} wide: heads must be 64 wide, up to ViT-L")
    blocks = [name for name in weights if name.endswith(".ln_1.bias")]
    vision_layers = sum(name.startswith("visual.") for name in blocks)
    side = math.isqrt(len(weights["visual.positional_embedding"]) - 1)      # in patches
    return CLIPConfig(
        embed_dim=weights["text_projection"].shape[1], image_size=image_size or side * patch,
        patch_size=patch, vision_width=width, vision_layers=vision_layers,
        context_length=len(weights["positional_embedding"]), vocab_size=vocab_size,
        text_width=text_width, text_layers=len(blocks) - vision_layers)


def activation_beside(path, config):
    """The activation that Hugging Face's or open_clip's files beside the weights state, or quick_gelu.
    ValueError if they state heads, eps or a normalisation that this code does not have."""
    stated = {}
    for name in ("config.json", "open_clip_config.json", "preprocessor_config.json", "processor_config.json"):
        file = path.with_name(name)
        if file.is_file():
            with loading(file):
                stated.update(flatten(json.loads(file.read_text(encoding="utf-8"))))
    supported = {
        "vision_config.num_attention_heads": config.vision_width // 64, "vision_config.layer_norm_eps": 1e-5,
        "text_config.num_attention_heads": config.text_width // 64, "text_config.layer_norm_eps": 1e-5,
        "model_cfg.vision_cfg.head_width": 64, "model_cfg.text_cfg.heads": config.text_width // 64,
        "model_cfg.vision_cfg.norm_kwargs.eps": 1e-5, "model_cfg.text_cfg.norm_kwargs.eps": 1e-5,
        "model_cfg.vision_cfg.pool_type": "tok", "model_cfg.vision_cfg.act_kwargs.approximate": "none",
        "model_cfg.text_cfg.pool_type": "argmax", "model_cfg.text_cfg.act_kwargs.approximate": "none",
        "model_cfg.text_cfg.no_causal_mask": False, "do_normalize": True,
        "preprocess_cfg.mean": list(MEAN), "preprocess_cfg.std": list(STD),
        "image_mean": list(MEAN), "image_std": list(STD),
        "image_processor.image_mean": list(MEAN), "image_processor.image_std": list(STD),
    }
    for field, value in supported.items():
        if stated.get(field) not in (None, value):
            raise ValueError(f"a .json beside it says {field} {stated[field]!r}: only {value!r} is supported")
    named = {stated.get("vision_config.hidden_act"), stated.get("text_config.hidden_act")} - {None}
    if any(field.startswith("model_cfg.") for field in stated):         # open_clip's default is GELU
        named.add("quick_gelu" if stated.get("model_cfg.quick_gelu") else "gelu")
    if named not in (set(), {"quick_gelu"}, {"gelu"}):
        raise ValueError(f"its activation is {sorted(named)}: both towers must have quick_gelu or both gelu")
    return named.pop() if named else "quick_gelu"


def load_clip(name_or_path, image_size=None, device="cpu", activation=None):
    """A CLIP in float32 and eval mode, from one of OpenAI's names or weights of any known kind: a file or a
    folder of OpenAI, open_clip, Hugging Face's CLIPModel, a trainer, or train.py. Runs nothing in it.
    image_size: pixels or (height, width); if not the checkpoint's, the positional grid is resized (bilinear).
    activation: "quick_gelu" or "gelu"; None: what the files say, quick_gelu if they say nothing. Raises
    FileNotFoundError or ValueError."""
    path = find_file(name_or_path)
    content = read_file(path)
    with loading(path):             # also for what does not fit
        settings = content.get("settings", {})      # of a run of train.py
        if ("trained" in content or "learned" in content) and "state_dict" not in content:
            raise ValueError("it is a part of a run of train.py, no CLIP: give the run's folder (to eval.py, "
                             "--init, or --model if its CLIP learned)")
        weights = to_openai(content)
        config = config_of(weights, settings.get("image_size"))
        trained_grid = config.grid
        if image_size:
            config.image_size = image_size
        if config.grid != trained_grid:         # differs from OpenAI: it has no such resizing
            cls, position = weights["visual.positional_embedding"].float().tensor_split([1])
            position = position.T.reshape(1, config.vision_width, *trained_grid)   # (1, C, rows, columns)
            position = F.interpolate(position, config.grid, mode="bilinear", align_corners=False)
            weights["visual.positional_embedding"] = torch.cat([cls, position[0].flatten(1).T])
        stated = activation_beside(path, config)
        config.activation = activation or settings.get("activation") or stated
        with torch.device("meta"):      # takes no memory and draws no random numbers
            model = CLIP(config)
        ours = {}
        for name, tensor in weights.items():
            ours[name if name.startswith(("visual.", "logit_scale")) else f"text.{name}"] = tensor
        model.to_empty(device="cpu").load_state_dict(ours)
    return model.to(device).eval()
