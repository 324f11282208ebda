"""clip.py: the model against torch's own modules and float64 loops, words and pictures against worked values,
loading on files of every format, made here. What needs OpenAI's vocabulary skips where there is none."""
import dataclasses
import gzip
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import clip

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:Detected pickle protocol")    # torch's
CONFIG = clip.CLIPConfig(32, 32, 16, 128, 2, 12, 530, 64, 3)
CACHE = Path(os.environ.get("CLIP_CACHE") or "~/.cache/clip").expanduser() / "bpe_simple_vocab_16e6.txt.gz"
needs_vocabulary = pytest.mark.skipif(not CACHE.exists(), reason=f"OpenAI's vocabulary is not at {CACHE}")


def random_clip(config=CONFIG, seed=0):
    """A CLIP whose every tensor is random, also those that start as zeros or ones."""
    torch.manual_seed(seed)
    model = clip.CLIP(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(n=3):
    """Normalised images, and captions of different lengths that end in EOT."""
    torch.manual_seed(1)
    images, tokens = torch.randn(n, 3, 32, 32), torch.zeros(n, 12, dtype=torch.long)
    for row, length in zip(tokens, (1, 5, 12)):
        row[:length - 1], row[length - 1] = torch.randint(1, 520, (length - 1,)), 529
    return images, tokens


def same(model, other):
    """Two CLIPs have equal float32 tensors under equal names."""
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == torch.float32 and torch.equal(mine[name], theirs[name]) for name in mine)


# ---------------------------------------------------------------------------------------------- the model

@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torch_multihead_attention(causal):
    torch.manual_seed(0)
    ours, theirs = clip.Attention(128, causal), nn.MultiheadAttention(128, 2, batch_first=True)
    x = torch.randn(2, 7, 128)
    ours.load_state_dict({name: torch.randn_like(value) / 8 for name, value in theirs.state_dict().items()})
    theirs.load_state_dict(ours.state_dict())
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    torch.testing.assert_close(ours(x), theirs(x, x, x, attn_mask=mask)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_bf16_on_a_cpu_is_that_in_float32_but_for_rounding(causal):
    torch.manual_seed(0)
    attention, qkv = clip.Attention(128, causal), torch.randn(2, 7, 384).bfloat16()
    exact = attention.attend(*qkv.float().chunk(3, dim=-1))
    assert (attention.attend(*qkv.chunk(3, dim=-1)).float() - exact).abs().max() < 0.02


def test_block_is_torch_pre_norm_encoder_layer():
    torch.manual_seed(0)
    block, x = clip.Block(128, False, "gelu"), torch.randn(2, 5, 128)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs = nn.TransformerEncoderLayer(128, 2, 512, 0.0, "gelu", batch_first=True, norm_first=True)
    names = {"attn": "self_attn", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2", "ln_1": "norm1",
             "ln_2": "norm2"}
    state = block.state_dict()
    theirs.load_state_dict({new + name.removeprefix(old): state[name] for old, new in names.items()
                            for name in state if name.startswith(old)})
    torch.testing.assert_close(block(x), theirs(x))


def test_quick_gelu_at_one():
    assert clip.QuickGELU.apply(torch.tensor(1.0)).item() == pytest.approx(1 / (1 + np.exp(-1.702)))


def test_quick_gelu_and_its_gradient_are_those_of_the_formula():
    x = torch.linspace(-30, 30, 601, dtype=torch.float64, requires_grad=True)
    plain = x * torch.sigmoid(1.702 * x)
    weight = torch.linspace(-1, 2, 601, dtype=torch.float64)
    assert torch.allclose(clip.QuickGELU.apply(x), plain, rtol=0, atol=1e-14)
    ours, = torch.autograd.grad(clip.QuickGELU.apply(x), x, weight)
    expected, = torch.autograd.grad(plain, x, weight)
    assert torch.allclose(ours, expected, rtol=0, atol=1e-14)


def float64_tower(state, x, prefix, layers, causal):
    """Blocks of one tower on (L, C) in numpy's float64, position by position."""
    def norm(x, name):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-5) * state[name + ".weight"] + state[name + ".bias"]
    L, C = x.shape
    for n in range(layers):
        p = f"{prefix}transformer.resblocks.{n}."
        qkv = norm(x, p + "ln_1") @ state[p + "attn.in_proj_weight"].T + state[p + "attn.in_proj_bias"]
        out = np.zeros((L, C))
        for h in range(0, C, 64):
            for i in range(L):
                seen = range(i + 1) if causal else range(L)
                score = np.array([qkv[i, h:h + 64] @ qkv[j, C + h:C + h + 64] / 8 for j in seen])
                share = np.exp(score - score.max()) / np.exp(score - score.max()).sum()
                out[i, h:h + 64] = sum(s * qkv[j, 2 * C + h:2 * C + h + 64] for s, j in zip(share, seen))
        x = x + out @ state[p + "attn.out_proj.weight"].T + state[p + "attn.out_proj.bias"]
        y = norm(x, p + "ln_2") @ state[p + "mlp.c_fc.weight"].T + state[p + "mlp.c_fc.bias"]
        y = y / (1 + np.exp(-1.702 * y))
        x = x + y @ state[p + "mlp.c_proj.weight"].T + state[p + "mlp.c_proj.bias"]
    return x, norm


def float64_state(model):
    return {name: value.double().numpy() for name, value in model.openai_state_dict().items()}


def test_image_features_are_those_of_float64_loops():
    model, (images, _) = random_clip(), batch()
    state = float64_state(model)
    for image, feature in zip(images.double().numpy(), model.encode_image(images)):
        patches = [[(image[:, r:r + 16, c:c + 16] * kernel).sum() for kernel in state["visual.conv1.weight"]]
                   for r in (0, 16) for c in (0, 16)]
        x = np.array([state["visual.class_embedding"], *patches]) + state["visual.positional_embedding"]
        _, norm = float64_tower(state, x, "visual.", 0, False)
        x, _ = float64_tower(state, norm(x, "visual.ln_pre"), "visual.", 2, False)
        x = norm(x[0], "visual.ln_post") @ state["visual.proj"]
        assert np.abs(feature.detach().numpy() - x / np.linalg.norm(x)).max() < 1e-5


def test_text_features_are_those_of_float64_loops():
    model, (_, tokens) = random_clip(), batch()
    state = float64_state(model)
    for row, feature in zip(tokens, model.encode_text(tokens)):
        x = state["token_embedding.weight"][row.numpy()] + state["positional_embedding"]
        x, norm = float64_tower(state, x, "", 3, True)
        x = norm(x[row.tolist().index(529)], "ln_final") @ state["text_projection"]
        assert np.abs(feature.detach().numpy() - x / np.linalg.norm(x)).max() < 1e-5


def test_ids_after_eot_are_never_read():
    model, (_, tokens) = random_clip(), batch()
    other = tokens.clone()
    other[0, 1:], other[1, 5:] = 7, 529
    torch.testing.assert_close(model.encode_text(tokens), model.encode_text(other))


def test_a_text_without_eot_is_an_error():
    model, (_, tokens) = random_clip(), batch()
    tokens[1, 4] = 3
    with pytest.raises(ValueError, match="no EOT, id 529"):
        model.encode_text(tokens)


def test_inputs_of_another_size_than_the_models_are_one_line():
    model, (images, tokens) = random_clip(), batch()
    longer = torch.full((1, model.config.context_length + 1), 3)
    longer[0, -1] = 529
    with pytest.raises(ValueError, match=f"a text of {longer.shape[1]} tokens is too long .* context_length="):
        model.encode_text(longer)
    with pytest.raises(ValueError, match=r"pictures of \(\d+, \d+\) pixels make .* patches, this model reads"):
        model.encode_image(images.repeat(1, 1, 2, 1))


def test_what_is_hooked_is_called_and_the_last_block_gives_the_token_that_is_read():
    model, (images, tokens), shapes = random_clip(), batch(), []
    for tower, inputs in ((model.visual, images), (model.text, tokens)):
        for module in (tower.transformer, *tower.transformer.resblocks):
            module.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[:2])))
        tower(inputs)
        before = len(tower.transformer.resblocks) - 1
        assert shapes[-2:] == [(len(inputs), 1)] * 2 and len(shapes) == before + 2
        assert all(length > 1 for _, length in shapes[:before])
        shapes.clear()


def test_export_has_openai_names():
    names = set(random_clip().openai_state_dict())
    block = {f"{part}.{kind}" for part in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
             for kind in ("weight", "bias")} | {"attn.in_proj_weight", "attn.in_proj_bias"}
    expected = {"visual.conv1.weight", "visual.class_embedding", "visual.positional_embedding", "visual.proj",
                "visual.ln_pre.weight", "visual.ln_pre.bias", "visual.ln_post.weight", "visual.ln_post.bias",
                "token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias",
                "text_projection", "logit_scale"}
    expected |= {f"visual.transformer.resblocks.{n}.{name}" for n in range(2) for name in block}
    expected |= {f"transformer.resblocks.{n}.{name}" for n in range(3) for name in block}
    assert names == expected


def test_export_leaves_out_what_a_method_added():
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.gate = inner, nn.Parameter(torch.ones(1))
    model = random_clip()
    plain = model.openai_state_dict()
    model.text.transformer.resblocks[1] = Wrapped(model.text.transformer.resblocks[1])
    model.visual.transformer = Wrapped(model.visual.transformer)
    model.visual.head = nn.Linear(32, 32)
    wrapped = model.openai_state_dict()
    assert list(wrapped) == list(plain) and all(torch.equal(wrapped[name], plain[name]) for name in plain)


# ---------------------------------------------------------------------------------------------- pictures

def ramp_image(height, width, mode="RGB"):
    """A picture that tells where each pixel came from: red is the row, green the column, blue their sum."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([rows, columns, rows + columns], axis=-1)).convert(mode)


@pytest.mark.parametrize("height, width, size, top, left", [
    (7, 3, 3, 2, 0), (3, 4, 3, 0, 0), (3, 6, 3, 0, 2), (5, 5, 5, 0, 0), (1, 8, 1, 0, 4)])     # halves to even
def test_centre_crop_starts_where_torchvision_starts_it(height, width, size, top, left):
    pixels = clip.preprocess(ramp_image(height, width), size)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, size, size)
    assert pixels[:, 0, 0].tolist() == [top, left, top + left]


def bicubic(line, new):
    """A line of values resampled with the cubic kernel (a = -0.5), widened when shrinking, value by value."""
    def kernel(x):
        x = abs(x)
        if x < 1:
            return 1.5 * x ** 3 - 2.5 * x ** 2 + 1
        return -0.5 * x ** 3 + 2.5 * x ** 2 - 4 * x + 2 if x < 2 else 0.0
    scale, out = len(line) / new, []
    for i in range(new):
        centre, wide = (i + 0.5) * scale, max(scale, 1.0)
        weights = [kernel((j + 0.5 - centre) / wide) for j in range(len(line))]
        out.append(sum(w * v for w, v in zip(weights, line)) / sum(weights))
    return out


@pytest.mark.parametrize("shape, size, resized", [
    ((9, 14), 5, (5, 7)), ((14, 9), 20, (31, 20)), ((10, 6), (4, 9), (4, 9))])
def test_resizing_is_bicubic_and_rounds_the_long_side_down(shape, size, resized):
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    wide = np.array([bicubic(row, resized[1]) for row in values.tolist()]).round().clip(0, 255)
    full = np.array([bicubic(column, resized[0]) for column in wide.T.tolist()]).T.round().clip(0, 255)
    height, width = (size, size) if isinstance(size, int) else size
    top, left = round((resized[0] - height) / 2), round((resized[1] - width) / 2)
    pixels = clip.preprocess(Image.fromarray(values), size)
    assert pixels.shape == (3, height, width)
    assert np.abs(pixels[0].numpy() - full[top:top + height, left:left + width]).max() <= 1   # PIL rounds


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_gives_rgb_bytes(mode):
    pixels = clip.preprocess(ramp_image(20, 30, "L" if mode == "I;16" else mode).convert(mode), 8)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 8, 8) and pixels.is_contiguous()


def test_a_palette_image_is_resized_before_it_becomes_rgb():
    image = Image.new("P", (8, 8))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, 4, 8))
    colours = {tuple(colour) for colour in clip.preprocess(image, 5).flatten(1).T.tolist()}
    assert colours == {(255, 0, 0), (0, 0, 255)}        # nearest, no purple between


def test_transparent_pixels_do_not_tint_their_neighbours():
    image = Image.new("RGBA", (2, 2), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (1, 0, 2, 2))
    assert clip.preprocess(image, (1, 1)).flatten().tolist() == [255, 0, 0]


def test_exif_orientation_is_ignored_as_torchvision_ignores_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp_image(9, 9).save(tmp_path / "turned.png", exif=exif)
    assert clip.preprocess(Image.open(tmp_path / "turned.png"), 9)[:, 2, 7].tolist() == [2, 7, 9]


def test_normalize_is_divide_subtract_divide_in_float32():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    ours = clip.normalize(levels)
    constants = (0.48145466, 0.26862954), (0.4578275, 0.26130258), (0.40821073, 0.27577711)
    for channel, (mean, std) in enumerate(constants):
        for level in range(256):
            value = (np.float32(level) / np.float32(255) - np.float32(mean)) / np.float32(std)
            assert ours[1, channel, level // 16, level % 16].item() == value.item()


def test_normalize_leaves_its_argument_as_it_is():
    levels = torch.full((1, 3, 2, 2), 100.0)
    assert clip.normalize(levels).max() < 3 and (levels == 100).all()


# ---------------------------------------------------------------------------------------------- words

@pytest.mark.parametrize("text, words", [
    ("A photo  of\ta\n cat.", ["a", "photo", "of", "a", "cat", "."]),
    ("it's we'LL don't o'clock", ["it", "'s", "we", "'ll", "don", "'t", "o", "'", "clock"]),
    ("x2 2024 a_b __ ?!...", ["x", "2", "2", "0", "2", "4", "a", "_", "b", "__", "?!..."]),
    ("\u00bd\u2167\u4e00\u0967n\u00b2", ["\u00bd", "\u2177", "\u4e00", "\u0967", "n", "\u00b2"]),
    ("na\u00efve \u00c9COLE", ["na\u00efve", "\u00e9cole"]),
    ("e\u0301", ["\u00e9"]),                                                    # NFC
    ("\u201cHi\u201d \u2018it\u2019s\u2019", ['"', "hi", '"', "'", "it", "'s", "'"]),
    ("\ufb01ne \ufb03 \u0133 \uff21\uff42\uff11 \uff76\uff9e", ["fine", "ffi", "ij", "ab", "1", "\u30ac"]),
    ("\ufb05", ["\u017ft"]),
    ("a\x00b\ufeffc\x7f", ["abc"]),
    ("\x1b[1;31mred\x1b[0m", ["red"]),
    ("a\x85b\u2028c\u3000d", ["a", "\u2026", "b", "c", "d"]),                   # C1 85 is Windows' ellipsis
    ("\x93q\x94", ['"', "q", '"']),
    ("\ud83d\ude00 \ud83d", ["\U0001f600", "\ufffd"]),                          # a surrogate pair; a half
    ("&amp;amp;amp; &lt;b&gt;", ["&", "<", "b", ">"]),
    ("caf&eacute; P&EACUTE;REZ &FRAC12;", ["caf\u00e9", "p\u00e9rez", "\u00bd"]),
    ("&ldquo;", ['"']),
    ("<b> &ldquo;", ["<", "b", ">", "\u201c"]),                                 # HTML is unescaped too late
    ("&ldquo;\n<b> &ldquo;\n&ldquo;", ['"', "<", "b", ">", "\u201c", "\u201c"]),
    ("&notit; &copy", ["\u00ac", "it", ";", "\u00a9"]),
    ("a\u0345b\u0345!", ["a", "b", "!"]),
    ("<|startoftext|>x<|EndOfText|>", ["<|startoftext|>", "x", "<|endoftext|>"]),
    ("", []), (" \n ", []),
])
def test_words_are_those_openai_sees(text, words):
    assert clip.words_of(text) == words         # expected values: OpenAI's tokenizer with regex and ftfy


def test_mojibake_stays_as_it_is():
    assert clip.words_of("s\u00c3\u00b3") == ["s\u00e3", "\u00b3"]              # ftfy would make it "só"


def test_ids_of_a_hand_made_vocabulary():
    tokenizer = clip.Tokenizer(merges=["a b", "ab c</w>", "b c</w>"])
    assert (tokenizer.vocab_size, tokenizer.sot, tokenizer.eot) == (517, 515, 516)
    # a is the 65th visible byte, 64; as the end of a word 256 more; then the merges from 512
    assert tokenizer("abc a bc abab", 10)[0].tolist() == [515, 513, 320, 514, 512, 64, 256 + 65, 516, 0, 0]


def test_merges_are_applied_in_the_order_they_were_learned():
    assert clip.Tokenizer(merges=["b c", "a b"])("abcd", 6)[0].tolist() == [514, 64, 512, 256 + 67, 515, 0]


def test_repeated_pairs_are_joined_from_the_left():
    assert clip.Tokenizer(merges=["a a"])("aaaa", 6)[0].tolist() == [513, 512, 64, 320, 514, 0]


def test_bytes_of_other_scripts_have_ids_of_their_own():
    # F0 9F 98 80: F0 is a visible byte, after 94 of ASCII and 12 more; the others are the 65th, 58th and 34th
    # of those that are not (0 to 32, 127, 128 to 160, 173), whose ids follow the 188 visible ones
    ids = clip.Tokenizer(merges=[])("\U0001f600", 6)[0].tolist()
    assert ids == [512, 94 + 12 + 0xF0 - 0xAE, 188 + 34 + 31, 188 + 34 + 24, 256 + 188 + 34, 513]


def test_long_text_is_cut_and_eot_kept_last():
    tokenizer = clip.Tokenizer(merges=[])
    assert tokenizer("a b c d e f", 5)[0].tolist() == [512, 320, 321, 322, 513]


def test_one_string_is_a_list_of_one_and_empty_text_is_sot_eot():
    tokenizer = clip.Tokenizer(merges=[])
    assert tokenizer("ab").shape == (1, 77) and tokenizer("ab").dtype == torch.int64
    assert tokenizer(["", "a"], 4).tolist() == [[512, 513, 0, 0], [512, 320, 513, 0]]


def test_training_joins_the_most_frequent_pair_first():
    # low three times, lower once, new twice: l+o 4, o+w</w> 3, o+w 1, w+e 1, e+r</w> 1, n+e 2, e+w</w> 2;
    # then lo+w</w> 3; then, of the pairs that come twice, n+e, which is after e+w</w> in the alphabet
    tokenizer = clip.Tokenizer.train(["low low Low", "lower new NEW"], 3)
    assert tokenizer.merges == ["l o", "lo w</w>", "n e"] and tokenizer.vocab_size == 517


def test_training_ends_when_every_word_is_one_symbol():
    assert clip.Tokenizer.train(["ab ab", "<|endoftext|>"], 50).merges == ["a b</w>"]


def test_training_does_not_depend_on_the_order_of_captions():
    captions = [f"{a} {b} field, {n} trees" for a in ("red", "brown") for b in ("big", "long") for n in "34"]
    assert clip.Tokenizer.train(captions, 40).merges == clip.Tokenizer.train(captions[::-1], 40).merges


@needs_vocabulary
@pytest.mark.parametrize("text, ids", [
    ("a diagram", [320, 22697]), ("a photo of a cat", [320, 1125, 539, 320, 2368]),
    ("it's \u00bd", [585, 568, 33613]), ("Hello, World!", [3306, 267, 1002, 256]), ("\U0001f642", [14860]),
    ("<|endoftext|>", [49407])])
def test_ids_are_openais(text, ids):
    tokenizer = clip.Tokenizer()
    assert (tokenizer.vocab_size, tokenizer.merges) == (49408, None)
    assert tokenizer(text)[0, :len(ids) + 2].tolist() == [49406, *ids, 49407]


@needs_vocabulary
def test_a_tokenizer_is_found_by_the_file_of_the_vocabulary_and_by_a_model_name():
    by_file, by_name = clip.Tokenizer(CACHE), clip.Tokenizer("ViT-L/14")
    assert by_file.ids == by_name.ids and by_file.merges is None


def test_a_tokenizer_is_found_in_a_run(tmp_path):
    torch.save({"merges": ["a b", "ab c"], "trained": {}}, tmp_path / "best.pt")
    assert clip.Tokenizer(tmp_path).merges == clip.Tokenizer(tmp_path / "best.pt").merges == ["a b", "ab c"]


# ---------------------------------------------------------------------------------------------- files

def holder(state, dtype):
    """A module with the tensors of a state dict under their names, as OpenAI's model is one."""
    class Part(nn.Module):
        def forward(self, x):
            return x
    root = Part()
    for name, tensor in state.items():
        *path, last = name.split(".")
        part = root
        for step in path:
            if not hasattr(part, step):
                part.add_module(step, Part())
            part = getattr(part, step)
        part.register_parameter(last, nn.Parameter(tensor.to(dtype)))
    for name, number in (("input_resolution", 32), ("context_length", 12), ("vocab_size", 530)):
        root.register_buffer(name, torch.tensor(number))
    return root


def save_torchscript(state, path, dtype=torch.float16, script=True):
    module = holder(state, dtype)
    torch.jit.save(torch.jit.script(module) if script else torch.jit.trace(module, torch.zeros(1)), path)


def hugging_face(state, layers=(2, 3)):
    """A CLIPModel's state dict, each name written out."""
    block = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
             "attn.out_proj": "self_attn.out_proj"}
    theirs = {
        "logit_scale": state["logit_scale"],
        "visual_projection.weight": state["visual.proj"].T,
        "text_projection.weight": state["text_projection"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.embeddings.position_ids": torch.arange(12)[None]}
    for kind in ("weight", "bias"):
        theirs[f"vision_model.pre_layrnorm.{kind}"] = state[f"visual.ln_pre.{kind}"]
        theirs[f"vision_model.post_layernorm.{kind}"] = state[f"visual.ln_post.{kind}"]
        theirs[f"text_model.final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
        for tower, prefix, depth in (("vision_model", "visual.", layers[0]), ("text_model", "", layers[1])):
            for n in range(depth):
                old, new = f"{prefix}transformer.resblocks.{n}.", f"{tower}.encoder.layers.{n}."
                for mine, name in block.items():
                    theirs[f"{new}{name}.{kind}"] = state[f"{old}{mine}.{kind}"]
                for name, part in zip("qkv", state[f"{old}attn.in_proj_{kind}"].chunk(3)):
                    theirs[f"{new}self_attn.{name}_proj.{kind}"] = part
    return theirs


def save_safetensors(state, path, dtype="F32"):
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
    header, data = {}, bytearray()
    for name, tensor in state.items():
        kind, start = "I64" if tensor.dtype == torch.int64 else dtype, len(data)
        data += tensor.to(types[kind]).contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, len(data)]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("script", [True, False])
def test_openai_archive(tmp_path, script):
    model = random_clip()
    save_torchscript(model.openai_state_dict(), tmp_path / "a.pt", torch.float32, script)
    loaded = clip.load_clip(tmp_path / "a.pt")
    assert same(loaded, model) and loaded.config == CONFIG and not loaded.training


def test_halves_become_float32(tmp_path):
    model = random_clip()
    save_torchscript(model.openai_state_dict(), tmp_path / "a.pt")
    assert same(clip.load_clip(tmp_path / "a.pt"), model.half().float())


def test_an_archive_saved_on_a_gpu_loads_on_a_cpu(tmp_path):
    model = random_clip()
    save_torchscript(model.openai_state_dict(), tmp_path / "a.pt", torch.float32)
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("/data.pkl"):
                assert data.count(b"\x03\0\0\0cpu") == 1        # the pickle's string, which it then refers to
                data = data.replace(b"\x03\0\0\0cpu", b"\x06\0\0\0cuda:0")
            new.writestr(name, data)
    assert same(clip.load_clip(tmp_path / "b.pt"), model)


def test_plain_state_dict(tmp_path):
    model = random_clip()
    torch.save(model.openai_state_dict(), tmp_path / "a.pt")
    loaded = clip.load_clip(tmp_path / "a.pt")
    assert same(loaded, model) and all(parameter.requires_grad for parameter in loaded.parameters())


def test_state_dict_of_before_torch_1_6(tmp_path):
    model = random_clip()
    torch.save(model.openai_state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert same(clip.load_clip(tmp_path / "a.pt"), model)


def test_views_and_strides_load_as_tensors_of_their_own(tmp_path):
    model = random_clip()
    state = model.openai_state_dict()
    state["visual.proj"] = state["visual.proj"].T.contiguous().T
    state["visual.class_embedding"] = torch.cat([torch.zeros(5), state["visual.class_embedding"]])[5:]
    state["text_projection"] = nn.Parameter(state["text_projection"])
    torch.save(state, tmp_path / "a.pt")
    loaded = clip.load_clip(tmp_path / "a.pt")
    assert same(loaded, model)
    assert all(p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes for p in loaded.parameters())


def test_training_checkpoint_of_open_clip_without_its_optimizer(tmp_path, monkeypatch):
    model, read = random_clip(), []
    weights = {"module." + name: tensor for name, tensor in model.openai_state_dict().items()}
    weights["module.attn_mask"] = torch.zeros(12, 12)
    optimizer = {"state": {0: {"exp_avg": torch.zeros(1000)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"epoch": 3, "name": "run", "state_dict": weights, "optimizer": optimizer}, tmp_path / "a.pt")
    original = zipfile.ZipFile.read
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda self, name: read.append(name) or original(self, name))
    assert same(clip.load_clip(tmp_path / "a.pt"), model)
    assert len(read) == len(weights) - 1


def test_open_clip_with_a_prefix_for_its_text_tower(tmp_path):
    model = random_clip()
    torch.save({name if name.startswith(("visual.", "logit")) else "text." + name: tensor
                for name, tensor in model.openai_state_dict().items()}, tmp_path / "a.pt")
    assert same(clip.load_clip(tmp_path / "a.pt"), model)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_hugging_face_file_and_folder(tmp_path, file):
    model = random_clip()
    state = hugging_face(model.openai_state_dict())
    (torch.save if file.endswith("bin") else save_safetensors)(state, tmp_path / file)
    assert same(clip.load_clip(tmp_path), model) and same(clip.load_clip(tmp_path / file), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hugging_face_stored_in_two_bytes(tmp_path, dtype):
    model = random_clip()
    kind = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    save_safetensors(hugging_face(model.openai_state_dict()), tmp_path / "model.safetensors", kind)
    assert same(clip.load_clip(tmp_path), model.to(dtype).float())


def test_hugging_face_config_names_the_activation(tmp_path):
    save_safetensors(hugging_face(random_clip().openai_state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"hidden_act": "gelu"}}))
    loaded = clip.load_clip(tmp_path)
    assert loaded.config.activation == "gelu"
    assert isinstance(loaded.text.transformer.resblocks[0].mlp.act, nn.GELU)


def test_activation_given_goes_before_the_files(tmp_path):
    torch.save({"state_dict": random_clip().openai_state_dict(), "activation": "gelu"}, tmp_path / "best.pt")
    assert clip.load_clip(tmp_path).config.activation == "gelu"
    assert clip.load_clip(tmp_path, activation="quick_gelu").config.activation == "quick_gelu"


def test_a_run_of_ours_at_the_size_it_was_trained_at(tmp_path):
    config = dataclasses.replace(CONFIG, image_size=(64, 16), activation="gelu")    # 4 patches, as 2 x 2
    model = random_clip(config)
    torch.save({"state_dict": model.openai_state_dict(), "activation": "gelu", "trained": {},
                "settings": {"image_size": (64, 16)}}, tmp_path / "best.pt")
    assert same(clip.load_clip(tmp_path), model) and clip.load_clip(tmp_path).config == config


def test_what_was_exported_loads_again(tmp_path):
    model = random_clip()
    torch.save(model.openai_state_dict(), tmp_path / "a.pt")
    torch.save(clip.load_clip(tmp_path / "a.pt").openai_state_dict(), tmp_path / "b.pt")
    images, tokens = batch()
    again = clip.load_clip(tmp_path / "b.pt")
    assert torch.equal(again.encode_image(images), model.encode_image(images))
    assert torch.equal(again.encode_text(tokens), model.encode_text(tokens))


# ---------------------------------------------------------------------------------------------- image sizes

def test_the_grid_of_positions_is_resized_bilinearly_and_the_class_row_kept(tmp_path):
    model = random_clip()                   # 2 x 2 patches
    ramp = torch.tensor([[0.0, 0.0], [0.0, 8.0], [100.0, 0.0], [100.0, 8.0]])   # (row, column) of each patch
    with torch.no_grad():
        model.visual.positional_embedding[1:, :2] = ramp
    torch.save(model.openai_state_dict(), tmp_path / "a.pt")
    loaded = clip.load_clip(tmp_path / "a.pt", image_size=(64, 16))             # 4 x 1 patches
    position = loaded.visual.positional_embedding.detach()
    assert loaded.config.grid == (4, 1) and torch.equal(position[0], model.visual.positional_embedding[0])
    # rows are read at -0.25, 0.25, 0.75 and 1.25 (held at the edge), columns half way
    assert position[1:, :2].tolist() == [[0.0, 4.0], [25.0, 4.0], [75.0, 4.0], [100.0, 4.0]]
    assert loaded.encode_image(torch.randn(1, 3, 64, 16)).shape == (1, 32)


def test_the_checkpoints_own_size_leaves_the_positions_as_they_are(tmp_path):
    model = random_clip()
    torch.save(model.openai_state_dict(), tmp_path / "a.pt")
    assert same(clip.load_clip(tmp_path / "a.pt", image_size=32), model)


def test_positions_that_make_no_square_need_the_size(tmp_path):
    model = random_clip(dataclasses.replace(CONFIG, image_size=(48, 16)))
    torch.save(model.openai_state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="its 3 patches make no square: give the image_size"):
        clip.load_clip(tmp_path / "a.pt")
    assert same(clip.load_clip(tmp_path / "a.pt", image_size=(48, 16)), model)


# ---------------------------------------------------------------------------------------------- errors

def refused(path, match=None, **options):
    """Loading fails with one line that starts with the path; returns the line."""
    with pytest.raises(ValueError, match=match) as info:
        clip.load_clip(path, **options)
    assert str(info.value).startswith(f"{path} cannot be loaded: ") and "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("change, match", [
    (lambda s: s.pop("ln_final.bias"), r"Missing key.*text\.ln_final\.bias"),
    (lambda s: s.update(logit_bias=torch.zeros(1)), r"Unexpected key.*logit_bias"),
    (lambda s: s.update({"visual.proj": torch.zeros(128, 31)}), r"visual\.proj.*\[128, 31\].*\[128, 32\]"),
    (lambda s: s.pop("visual.positional_embedding"), "no visual.positional_embedding: .* no ResNet"),
    (lambda s: [s.pop(name) for name in list(s) if "visual." in name], "no visual.conv1.weight: .*no tower"),
    (lambda s: s.update({"visual.conv1.weight": torch.zeros(1280, 3, 14, 14)}), "are 1280 and 64 wide"),
    (lambda s: s.update({"token_embedding.weight": torch.zeros(530, 96)}), "are 128 and 96 wide"),
    (lambda s: s.update({"visual.proj": "text"}), "visual.proj is no tensor"),
])
def test_a_state_dict_that_does_not_fit_says_what_does_not(tmp_path, change, match):
    state = random_clip().openai_state_dict()
    change(state)
    torch.save(state, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", match)


def test_an_adapter_is_no_clip(tmp_path):
    torch.save({"trained": {}, "settings": {"model": "ViT-B/32"}, "merges": None}, tmp_path / "best.pt")
    refused(tmp_path, f"a method for ViT-B/32, .*python eval.py {tmp_path}")


def test_an_unknown_activation_is_refused(tmp_path):
    torch.save(random_clip().openai_state_dict(), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "activation 'relu' is not known: give quick_gelu or gelu", activation="relu")


class Evil:
    """Unpickled carelessly, this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "before 1.6", "bare pickle", "torchscript", "bin"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, kind):
    path, mark = tmp_path / "a.pt", tmp_path / "ran"
    state = {"visual.conv1.weight": Evil(mark)}
    if kind == "torchscript":
        save_torchscript(random_clip().openai_state_dict(), tmp_path / "good.pt")
        with zipfile.ZipFile(tmp_path / "good.pt") as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                data = pickle.dumps(Evil(mark), 2) if name.endswith("/data.pkl") else old.read(name)
                new.writestr(name, data)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        path = tmp_path / "pytorch_model.bin" if kind == "bin" else path
        torch.save(state, path, _use_new_zipfile_serialization=kind != "before 1.6")
    refused(path, "holds more than tensors; nothing was run" if kind in ("before 1.6", "bare pickle")
            else r"it asks for (posix|nt)\.mkdir, .*nothing was run")
    assert not mark.exists()
    with pytest.raises(ValueError, match="cannot be loaded"):
        clip.Tokenizer(path)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["torch.load", "torch.jit._pickle.x", "builtins.eval", "__torch__x.y"])
def test_names_near_the_known_ones_are_refused(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b")R.")
    refused(tmp_path / "a.pt", f"it asks for {re.escape(name)}, which weights do not need, and nothing was")


def test_a_safetensors_header_that_lies_is_an_error(tmp_path):
    for size in (2 ** 62, 40):
        content = size.to_bytes(8, "little") + b'{"a": {"dtype": "F32"}}' + bytes(40)
        (tmp_path / "a.safetensors").write_bytes(content)
        refused(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["zip", "torchscript", "safetensors", "before 1.6"])
def test_a_truncated_file_is_an_error(tmp_path, kind):
    state = random_clip().openai_state_dict()
    path = tmp_path / "a"
    if kind == "torchscript":
        save_torchscript(state, path)
    elif kind == "safetensors":
        save_safetensors(hugging_face(state), path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    for share in (0.1, 0.9):
        short = tmp_path / f"short{share}"
        short.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
        refused(short)


def test_a_damaged_tensor_is_an_error(tmp_path):
    torch.save(random_clip().openai_state_dict(), tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "a.pt").write_bytes(data)
    refused(tmp_path / "a.pt", "CRC")


@pytest.mark.parametrize("content, match", [
    (b"", "it is empty"), (b"<!DOCTYPE html>", "starts with b'<!DOCTYPE"), (b"hello", "starts with b'hello")])
def test_what_is_no_weight_file_says_so(tmp_path, content, match):
    (tmp_path / "a.pt").write_bytes(content)
    refused(tmp_path / "a.pt", match)


def test_a_zip_of_something_else_says_so(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "a.zip", "zip archive without weights")


def test_a_dict_of_something_else_says_so(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "a list, no dict of tensors")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_says_so(tmp_path):
    torch.save({}, tmp_path / "a.pt")
    (tmp_path / "a.pt").chmod(0)
    refused(tmp_path / "a.pt", "Permission denied")


def test_permission_denied_is_one_line(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "a.pt")

    def denied(*args):
        raise PermissionError(13, "Permission denied", str(args[0]))
    monkeypatch.setattr("builtins.open", denied)
    refused(tmp_path / "a.pt", "Permission denied")


def test_a_missing_file_and_a_folder_without_weights_say_what_to_give(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match="no file .*: give a weight file, or one of ViT-B/32"):
            clip.load_clip(path)


# ---------------------------------------------------------------------------------------------- downloads

@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """OpenAI's ViT-B/32 and vocabulary replaced by small files with file:// addresses; an empty cache."""
    torch.save(random_clip().openai_state_dict(), tmp_path / "small.pt")
    with gzip.open(tmp_path / "vocabulary.gz", "wb") as file:
        file.write(b"#version\na b\n")
    found = {}
    for name in ("small.pt", "vocabulary.gz"):
        sha256 = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        (tmp_path / sha256).mkdir()
        (tmp_path / name).rename(tmp_path / sha256 / name)
        found[name] = (tmp_path / sha256 / name).as_uri(), sha256
    monkeypatch.setitem(clip.URLS, "ViT-B/32", found["small.pt"][0])
    monkeypatch.setattr(clip, "VOCABULARY", found["vocabulary.gz"])
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_name_is_downloaded_once_into_the_cache(shelf, monkeypatch):
    assert same(clip.load_clip("ViT-B/32"), random_clip())
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("fetched again"))
    assert same(clip.load_clip("ViT-B/32"), random_clip())
    assert [path.name for path in (shelf / "cache").iterdir()] == ["small.pt"]


def test_the_vocabulary_is_downloaded_into_the_cache(shelf):
    clip.Tokenizer("ViT-B/32")
    assert (shelf / "cache" / "vocabulary.gz").exists()


def test_a_download_that_is_not_the_file_is_not_kept(shelf):
    Path(urllib.request.url2pathname(clip.URLS["ViT-B/32"].removeprefix("file://"))).write_bytes(b"<html>")
    with pytest.raises(FileNotFoundError, match=r"cannot download .*small\.pt.*: put that file at .*\.pt"):
        clip.load_clip("ViT-B/32")
    assert list((shelf / "cache").iterdir()) == []


def test_without_network_one_line_says_which_file_to_put_where(shelf, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError, match=r"cannot download .*no route.*: put that file at .*all\.pt"):
        clip.load_clip("ViT-B/32")
    with pytest.raises(FileNotFoundError, match=r"put that file at .*vocabulary\.gz"):
        clip.Tokenizer()


def test_a_damaged_file_in_the_cache_is_not_used(shelf):
    clip.load_clip("ViT-B/32")
    for content in (b"PK half a file", b""):
        (shelf / "cache" / "small.pt").write_bytes(content)
        with pytest.raises(ValueError, match="is damaged, its sha256 is not .*: delete it and run again"):
            clip.load_clip("ViT-B/32")


# ---------------------------------------------------------------------------------------------- command line

def command(*arguments):
    words = [sys.executable, clip.__file__, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True)


def test_the_command_prints_a_probability_for_each_text(tmp_path):
    merges = [f"a {c}" for c in "bcdefghijklmnopq"]     # with which the vocabulary is the model's 530
    torch.save({"state_dict": random_clip().openai_state_dict(), "merges": merges}, tmp_path / "best.pt")
    ramp_image(40, 60).save(tmp_path / "a.png")
    done = command(tmp_path / "a.png", "a cat", "two dogs", "--model", tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(\d\.\d{4})  (.*)$", done.stdout, re.M)
    assert [text for _, text in found] == ["a cat", "two dogs"]
    assert sum(float(probability) for probability, _ in found) == pytest.approx(1, abs=2e-4)


def test_the_command_reports_a_mistake_in_one_line(tmp_path):
    done = command(tmp_path / "none.png", "a cat", "--model", tmp_path / "none.pt")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("clip.py: there is no file ") and done.stderr.count("\n") == 1
