"""clip.py against torch's own modules, float64 loops and worked values; loading on files of every format.
What needs OpenAI's vocabulary skips where there is none."""
import hashlib
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import clip
from conftest import tiny_clip

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:Detected pickle protocol")    # torch's
CACHE = Path(os.environ.get("CLIP_CACHE") or "~/.cache/clip").expanduser() / "bpe_simple_vocab_16e6.txt.gz"
needs_vocabulary = pytest.mark.skipif(not CACHE.exists(), reason=f"OpenAI's vocabulary is not at {CACHE}")


def random_clip(**changes):
    """A CLIP whose every tensor is random, also those that start as zeros or ones."""
    model = tiny_clip(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch():
    """Normalised images, and captions of 1, 5 and 12 tokens."""
    torch.manual_seed(1)
    images, tokens = torch.randn(3, 3, 32, 32), torch.zeros(3, 12, dtype=torch.long)
    for row, length in zip(tokens, (1, 5, 12)):
        row[:length - 1] = torch.randint(1, 590, (length - 1,))
        row[length - 1] = 599
    return images, tokens


def same(model, other):
    """Two CLIPs have equal float32 tensors under equal names."""
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == torch.float32 and torch.equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------------------------------------- the model

@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torch_multihead_attention(causal):
    torch.manual_seed(0)
    ours, theirs = clip.Attention(128, causal), nn.MultiheadAttention(128, 2, batch_first=True)
    x = torch.randn(2, 7, 128)
    ours.load_state_dict({name: torch.randn_like(value) / 8 for name, value in theirs.state_dict().items()})
    theirs.load_state_dict(ours.state_dict())
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    expected = theirs(x, x, x, attn_mask=mask)[0]
    torch.testing.assert_close(ours(x), expected)
    # bf16 on a CPU takes a way of its own
    torch.testing.assert_close(ours.bfloat16()(x.bfloat16()).float(), expected, rtol=0, atol=0.1)


def test_block_is_torch_pre_norm_encoder_layer():
    torch.manual_seed(0)
    block, x = clip.Block(128, False, "gelu"), torch.randn(2, 5, 128)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs = nn.TransformerEncoderLayer(128, 2, 512, 0.0, "gelu", batch_first=True, norm_first=True)
    for ours, name in (("attn", "self_attn"), ("mlp.c_fc", "linear1"), ("mlp.c_proj", "linear2"),
                       ("ln_1", "norm1"), ("ln_2", "norm2")):
        theirs.get_submodule(name).load_state_dict(block.get_submodule(ours).state_dict())
    torch.testing.assert_close(block(x), theirs(x))


def test_quick_gelu_and_its_gradient_are_those_of_the_formula():
    x = torch.linspace(-30, 30, 601, dtype=torch.float64, requires_grad=True)
    plain, weight = x * torch.sigmoid(1.702 * x), torch.linspace(-1, 2, 601, dtype=torch.float64)
    torch.testing.assert_close(clip.quick_gelu(x), plain, rtol=0, atol=1e-13)
    ours, = torch.autograd.grad(clip.quick_gelu(x), x, weight)
    expected, = torch.autograd.grad(plain, x, weight)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


def norm64(state, x, name):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * state[name + ".weight"] + state[name + ".bias"]


def linear64(state, x, name):
    return x @ state[name + "weight"].T + state[name + "bias"]


def blocks64(state, x, prefix, causal):
    """Two blocks on (L, C) in float64, head by head and position by position."""
    L, C = x.shape
    for n in range(2):
        p = f"{prefix}transformer.resblocks.{n}."
        qkv = linear64(state, norm64(state, x, p + "ln_1"), p + "attn.in_proj_")
        out = np.zeros((L, C))
        for h in range(0, C, 64):
            q, k, v = (qkv[:, start + h:start + h + 64] for start in (0, C, 2 * C))
            for i in range(L):
                seen = i + 1 if causal else L
                share = np.exp(k[:seen] @ q[i] / 8)
                out[i, h:h + 64] = share @ v[:seen] / share.sum()
        x = x + linear64(state, out, p + "attn.out_proj.")
        y = linear64(state, norm64(state, x, p + "ln_2"), p + "mlp.c_fc.")
        x = x + linear64(state, y / (1 + np.exp(-1.702 * y)), p + "mlp.c_proj.")
    return x


def test_image_features_are_those_of_float64_loops():
    model, (images, _) = random_clip(), batch()
    state = {name: value.double().numpy() for name, value in model.openai_state_dict().items()}
    for image, feature in zip(images.double().numpy(), model.encode_image(images)):
        x = [state["visual.class_embedding"]]
        for r, c in ((0, 0), (0, 16), (16, 0), (16, 16)):
            x.append([(image[:, r:r + 16, c:c + 16] * k).sum() for k in state["visual.conv1.weight"]])
        x = np.array(x) + state["visual.positional_embedding"]
        x = blocks64(state, norm64(state, x, "visual.ln_pre"), "visual.", False)
        x = norm64(state, x[0], "visual.ln_post") @ state["visual.proj"]
        assert np.abs(feature.detach().numpy() - x / np.linalg.norm(x)).max() < 1e-5


def test_text_features_are_those_of_float64_loops():
    model, (_, tokens) = random_clip(), batch()
    state = {name: value.double().numpy() for name, value in model.openai_state_dict().items()}
    for row, feature in zip(tokens, model.encode_text(tokens)):
        x = state["token_embedding.weight"][row.numpy()] + state["positional_embedding"][:12]
        x = blocks64(state, x, "", True)
        x = norm64(state, x[row.tolist().index(599)], "ln_final") @ state["text_projection"]
        assert np.abs(feature.detach().numpy() - x / np.linalg.norm(x)).max() < 1e-5


def test_the_feature_is_read_at_the_first_eot_and_what_follows_is_cut_or_never_seen():
    model, (_, tokens) = random_clip(), batch()
    other = tokens.clone()
    other[0, 1:], other[1, 5:] = 7, 599
    torch.testing.assert_close(model.encode_text(tokens), model.encode_text(other), rtol=0, atol=1e-6)
    assert model.text.embed(tokens[:2]).shape == (2, 5, 128)
    alone, together = model.encode_text(tokens[:2]), model.encode_text(tokens)
    torch.testing.assert_close(alone, together[:2], rtol=0, atol=1e-6)


def test_inputs_that_are_not_this_models_are_one_line():
    model, (images, tokens) = random_clip(context_length=11), batch()
    with pytest.raises(ValueError, match="no EOT, id 599, in its first 11 tokens: use this model"):
        model.encode_text(tokens)                           # 12 tokens
    with pytest.raises(ValueError, match="no EOT"):
        model.encode_text(tokens[1:, :4])
    with pytest.raises(ValueError, match=r"\(64, 32\) pixels make \(4, 2\) patches, .* \(2, 2\)"):
        model.encode_image(images.repeat(1, 1, 2, 1))


def test_checkpointing_computes_each_block_twice_and_gives_the_same_gradients():
    model, (images, tokens), calls, gradients = random_clip().train(), batch(), [], []
    model.visual.transformer.resblocks[0].mlp.c_fc.register_forward_hook(lambda *_: calls.append(1))
    for on in (False, True):
        model.visual.transformer.grad_checkpointing = model.text.transformer.grad_checkpointing = on
        model.zero_grad()
        (model.encode_image(images) * model.encode_text(tokens)).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(calls) == 1 + 2 and len(gradients[0]) == len(model.names) - 1        # logit_scale took no part
    torch.testing.assert_close(gradients[0], gradients[1])


def test_export_has_openais_names_without_what_a_method_added():
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.gate = inner, nn.Parameter(torch.ones(1))
    model = random_clip()
    plain = model.openai_state_dict()
    assert len(plain) == 4 * 12 + 14 and {"visual.conv1.weight", "visual.positional_embedding", "logit_scale",
                                          "visual.transformer.resblocks.1.attn.in_proj_bias", "ln_final.bias",
                                          "token_embedding.weight", "positional_embedding"} <= plain.keys()
    model.text.transformer.resblocks[1] = Wrapped(model.text.transformer.resblocks[1])
    model.visual.transformer = Wrapped(model.visual.transformer)
    model.visual.head = nn.Linear(64, 64)
    wrapped = model.openai_state_dict()
    assert list(wrapped) == list(plain) and all(torch.equal(wrapped[name], plain[name]) for name in plain)


# ---------------------------------------------------------------------------------------------- pixels

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
    ((9, 14), 5, (5, 7)), ((14, 9), 20, (31, 20)), ((7, 3), 3, (7, 3)), ((10, 6), (4, 9), (4, 9))])
def test_preprocess_is_bicubic_rounds_the_long_side_down_and_cuts_the_centre(shape, size, resized):
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    wide = np.array([bicubic(row, resized[1]) for row in values.tolist()]).round().clip(0, 255)
    full = np.array([bicubic(column, resized[0]) for column in wide.T.tolist()]).T.round().clip(0, 255)
    height, width = (size, size) if isinstance(size, int) else size
    top, left = round((resized[0] - height) / 2), round((resized[1] - width) / 2)     # halves to even
    pixels = clip.preprocess(Image.fromarray(values), size)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, height, width)
    assert np.abs(pixels[0].numpy() - full[top:top + height, left:left + width]).max() <= 1   # PIL rounds


def test_normalize_is_divide_subtract_divide_in_float32():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    ours = clip.normalize(levels)
    constants = (0.48145466, 0.26862954), (0.4578275, 0.26130258), (0.40821073, 0.27577711)
    for channel, (mean, std) in enumerate(constants):
        values = (np.arange(256, dtype=np.float32) / np.float32(255) - np.float32(mean)) / np.float32(std)
        assert np.array_equal(ours[1, channel].flatten().numpy(), values)


# ---------------------------------------------------------------------------------------------- words

@pytest.mark.parametrize("text, words", [
    ("A photo  of\ta\n cat.", ["a", "photo", "of", "a", "cat", "."]),
    ("it's we'LL don't o'clock", ["it", "'s", "we", "'ll", "don", "'t", "o", "'", "clock"]),
    ("x2 2024 a_b __ ?!...", ["x", "2", "2", "0", "2", "4", "a", "_", "b", "__", "?!..."]),
    ("5 m\u00b2 \u00bd\u2167 \u0967n", ["5", "m", "\u00b2", "\u00bd", "\u2177", "\u0967", "n"]),     # numbers
    ("na\u00efve \u4e00\u732b \u3042b", ["na\u00efve", "\u4e00\u732b", "\u3042b"]),                  # letters
    ("e\u0301 a\u20ddb", ["\u00e9", "a", "\u20dd", "b"]),                       # NFC; other marks are signs
    ("a\u0345b\u0345!", ["a", "b", "!"]),
    ("\u201cHi\u201d \u2018it\u2019s\u2019", ['"', "hi", '"', "'", "it", "'s", "'"]),
    ("&amp;amp; caf&eacute; &ldquo;&lt;b&gt;", ["&", "caf\u00e9", '"<', "b", ">"]),
    ("<|startoftext|>x<|EndOfText|>", ["<|startoftext|>", "x", "<|endoftext|>"]),
    (" \n ", []),
])
def test_words_are_those_openai_sees(text, words):
    assert clip.words_of(text) == words         # expected values: OpenAI's tokenizer with regex and ftfy


def test_ids_of_a_hand_made_vocabulary():
    tokenizer = clip.Tokenizer(merges=["a b", "ab c</w>", "b c</w>"])
    assert (tokenizer.vocab_size, tokenizer.sot, tokenizer.eot) == (517, 515, 516)
    # a is the 65th visible byte, 64; as the end of a word 256 more; then the merges from 512
    assert tokenizer("abc a bc abab", 10)[0].tolist() == [515, 513, 320, 514, 512, 64, 256 + 65, 516, 0, 0]


def test_merges_are_applied_in_the_order_they_were_learned_and_from_the_left():
    assert clip.Tokenizer(merges=["b c", "a b"])("abcd", 6)[0].tolist() == [514, 64, 512, 256 + 67, 515, 0]
    assert clip.Tokenizer(merges=["a a"])("aaaa", 6)[0].tolist() == [513, 512, 64, 320, 514, 0]


def test_texts_are_padded_with_zeros_and_cut_with_eot_kept_last():
    tokenizer = clip.Tokenizer(merges=[])
    assert tokenizer(["", "a b c d"], 5).tolist() == [[512, 513, 0, 0, 0], [512, 320, 321, 322, 513]]
    assert tokenizer.length("a b c d") == 6 and tokenizer("a").shape == (1, 77)
    assert tokenizer("a <|endoftext|> b", 5)[0].tolist() == [512, 320, 513, 321, 513]     # as in OpenAI's


def test_training_joins_the_most_frequent_pair_first():
    # low three times, lower once, new twice: l+o 4, o+w</w> 3, o+w 1, w+e 1, e+r</w> 1, n+e 2, e+w</w> 2;
    # then lo+w</w> 3; then, of the pairs that come twice, n+e, which is after e+w</w> in the alphabet
    assert clip.Tokenizer.train(["low low Low", "lower new NEW"], 3).merges == ["l o", "lo w</w>", "n e"]
    assert clip.Tokenizer.train(["ab ab", "<|endoftext|>"], 50).merges == ["a b</w>"]       # ends by itself


@needs_vocabulary
@pytest.mark.parametrize("text, ids", [
    ("a diagram", [320, 22697]), ("a photo of a cat", [320, 1125, 539, 320, 2368]), ("\U0001f642", [14860]),
    ("it's \u00bd", [585, 568, 33613]), ("Hello, World!", [3306, 267, 1002, 256]), ("<|endoftext|>", [49407]),
])
def test_ids_are_openais(text, ids):
    tokenizer = clip.Tokenizer(CACHE)
    assert (tokenizer.vocab_size, tokenizer.merges) == (49408, None)
    assert tokenizer(text)[0, :len(ids) + 2].tolist() == [49406, *ids, 49407]


def test_a_tokenizer_is_found_in_a_run(tmp_path):
    torch.save({"merges": ["a b", "ab c"], "trained": {}}, tmp_path / "best.pt")
    assert clip.Tokenizer(tmp_path).merges == ["a b", "ab c"]


# ---------------------------------------------------------------------------------------------- weight files

def save_torchscript(state, path):
    """Half-precision tensors as attributes of scripted modules, as OpenAI's archives have them."""
    root = nn.Identity()
    for name, tensor in state.items():
        *parents, last = name.split(".")
        part = root
        for parent in parents:
            if not hasattr(part, parent):
                part.add_module(parent, nn.Identity())
            part = getattr(part, parent)
        part.register_parameter(last, nn.Parameter(tensor.half()))
    root.register_buffer("vocab_size", torch.tensor(600))
    torch.jit.save(torch.jit.script(root), path)


RENAMED = {     # OpenAI's -> Hugging Face's, replaced in this order
    "visual.": "vision_model.", "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding.weight", "conv1": "embeddings.patch_embedding",
    "class_embedding": "embeddings.class_embedding", "transformer.resblocks": "encoder.layers",
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "c_fc": "fc1", "c_proj": "fc2", "attn": "self_attn",
    "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm", "ln_final": "text_model.final_layer_norm",
    "vision_model.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def hugging_face(state):
    """The tensors under the names of a CLIPModel, with q, k and v apart and two matrices turned."""
    theirs = {"text_model.embeddings.position_ids": torch.arange(32)[None]}
    for name, tensor in state.items():
        for ours, new in RENAMED.items():
            name = name.replace(ours, new)
        if name.startswith(("encoder", "embeddings")):
            name = "text_model." + name
        theirs[name] = tensor.T if name.endswith("_projection.weight") else tensor
        if "in_proj_" in name:
            for letter, part in zip("qkv", theirs.pop(name).chunk(3)):
                theirs[name.replace("in_proj_", f"{letter}_proj.")] = part
    return theirs


def save_safetensors(state, path):
    types = {torch.float32: "F32", torch.int64: "I64"}
    header, data = {}, bytearray()
    for name, tensor in state.items():
        start = len(data)
        data += tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": types[tensor.dtype], "shape": tensor.shape,
                        "data_offsets": [start, len(data)]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def old_torch(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def open_clip(state):
    return {name if name.startswith(("visual.", "logit")) else "text." + name: state[name] for name in state}


def inside(key, prefix):
    """A trainer's checkpoint, with what it leaves beside the weights."""
    def change(state):
        return {key: {prefix + name: tensor for name, tensor in state.items()}, "rng": torch.get_rng_state()}
    return change


@pytest.mark.parametrize("file, save, change", [
    ("a.pt", torch.save, dict),
    ("a.pt", old_torch, dict),
    ("a.pt", torch.save, inside("state_dict", "module.")),
    ("a.pt", torch.save, inside("model", "base_model.model._orig_mod.")),
    ("a.pt", torch.save, inside("model_state_dict", "clip.text.")),
    ("open_clip_pytorch_model.bin", torch.save, open_clip),
    ("open_clip_model.safetensors", save_safetensors, open_clip),
    ("pytorch_model.bin", torch.save, hugging_face),
    ("model.safetensors", save_safetensors, hugging_face)])
def test_every_kind_of_file_and_folder_gives_the_same_model(tmp_path, file, save, change):
    model = random_clip()
    save(change(model.openai_state_dict()), tmp_path / file)
    loaded = clip.load_clip(tmp_path / file)
    assert same(loaded, model) and loaded.config == model.config and not loaded.training
    assert file == "a.pt" or same(clip.load_clip(tmp_path), model)


def test_openais_archives_in_half_precision_become_float32(tmp_path):
    save_torchscript(random_clip().openai_state_dict(), tmp_path / "a.pt")
    assert same(clip.load_clip(tmp_path / "a.pt"), random_clip().half().float())


@pytest.mark.parametrize("file, content, activation", [
    ("config.json", {"vision_config": {"hidden_act": "gelu"}, "text_config": {"hidden_act": "gelu"}}, "gelu"),
    ("config.json", {"vision_config": {"num_attention_heads": 3, "layer_norm_eps": 1e-5}}, "quick_gelu"),
    ("config.json", {"lr": 0.1}, "quick_gelu"),                             # about something else
    ("open_clip_config.json", {"model_cfg": {"vision_cfg": {"head_width": 64}}}, "gelu"),
    ("open_clip_config.json", {"model_cfg": {"quick_gelu": True}}, "quick_gelu")])
def test_the_file_beside_the_weights_names_the_activation(tmp_path, file, content, activation):
    torch.save(random_clip().openai_state_dict(), tmp_path / "a.pt")
    (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    loaded = clip.load_clip(tmp_path / "a.pt")
    assert loaded.config.activation == activation
    functions = {"gelu": F.gelu, "quick_gelu": clip.quick_gelu}
    assert loaded.text.transformer.resblocks[0].mlp.act is functions[activation]
    assert clip.load_clip(tmp_path / "a.pt", activation="gelu").config.activation == "gelu"


def refused(path, match):
    """Loading fails with one line that names the path and does not advise to run the file."""
    with pytest.raises((ValueError, FileNotFoundError), match=match) as info:
        clip.load_clip(path)
    line = str(info.value)
    assert "\n" not in line and str(path) in line and "weights_only" not in line


@pytest.mark.parametrize("file, field, value, match", [
    ("config", "vision_config.hidden_act", "gelu_new", "config.json: vision_config.hidden_act': 'gelu_new'"),
    ("config", "text_config.hidden_act", ["gelu"], r"config.json: text_config.hidden_act': \['gelu'\]"),
    ("config", "vision_config.num_attention_heads", 12, "config.json .*num_attention_heads is 12, only 3"),
    ("config", "text_config.layer_norm_eps", 1e-6, "config.json .*layer_norm_eps is 1e-06, only 1e-05"),
    ("config", "vision_config", [1], "config.json cannot be loaded"),
    ("open_clip_config", "model_cfg.vision_cfg.head_width", 80, "open_clip_config.* is 80, only 64"),
    ("open_clip_config", "model_cfg.text_cfg.heads", 8, "text_cfg.heads is 8, only 2"),
    ("open_clip_config", "model_cfg.text_cfg.act_kwargs", {"approximate": "tanh"}, "act_kwargs is .*tanh"),
    ("open_clip_config", "model_cfg.quick_gelu", "yes", "open_clip_config.json: .*quick_gelu': 'yes'"),
    ("open_clip_config", "preprocess_cfg.mean", [0.5, 0.5, 0.5], r"cfg.mean is \[0.5, .*only \[0.48"),
    ("preprocessor_config", "image_std", [0.5, 0.5, 0.5], r"preprocessor_config.json .*image_std is \[0.5"),
    ("preprocessor_config", "image_mean", "0.5", "image_mean is '0.5'")])
def test_what_a_file_beside_the_weights_asks_for_in_vain_is_named(tmp_path, file, field, value, match):
    torch.save(random_clip().openai_state_dict(), tmp_path / "best.pt")
    for key in reversed(field.split(".")):
        value = {key: value}
    (tmp_path / f"{file}.json").write_text(json.dumps(value), encoding="utf-8")
    refused(tmp_path, match)


def test_towers_with_different_activations_are_refused(tmp_path):
    torch.save(random_clip().openai_state_dict(), tmp_path / "best.pt")
    settings = {"vision_config": {"hidden_act": "gelu"}, "text_config": {"hidden_act": "quick_gelu"}}
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    refused(tmp_path, "hidden_act': 'gelu', .*hidden_act': 'quick_gelu'")


@pytest.mark.parametrize("change, match", [
    (lambda s: {"visual.proj.lora_A.weight": s["visual.proj"]}, r"unmerged PEFT .* merge_and_unload\(\)"),
    (lambda s: {"trained": {}, "settings": {"model": "ViT-B/32"}}, "a method for ViT-B/32, .*python eval.py"),
    (lambda s: {"epoch": 3}, r"0 CLIPs \[\] among \['epoch'\].* no ResNet"),
    (lambda s: s | {"ema." + name: s[name] for name in s}, "2 CLIPs .*ema.visual"),
    (lambda s: [1], "a list, no dict of tensors"),
    (lambda s: s | {"visual.proj": torch.zeros(192, 31)}, r"visual\.proj.*\[192, 31\].*\[192, 64\]"),
    (lambda s: s | {"visual.conv1.weight": torch.zeros(1280, 3, 14, 14)}, "1280 and 128 wide"),
    (lambda s: {name: s[name] for name in s if "visual." in name}, "KeyError 'token_embedding.weight'")])
def test_weights_that_do_not_fit_say_what_does_not(tmp_path, change, match):
    torch.save(change(dict(random_clip().openai_state_dict())), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", match)


class Evil:
    """Unpickled carelessly, this makes a folder."""
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("kind", ["zip", "before 1.6", "bare pickle", "torchscript"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path, state = tmp_path / "a.pt", {"visual.conv1.weight": Evil()}
    if kind == "torchscript":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/constants.pkl", pickle.dumps(()))
            archive.writestr("a/data.pkl", pickle.dumps(state, 2))
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        (old_torch if kind == "before 1.6" else torch.save)(state, path)
    refused(path, "it is damaged or holds more than tensors .*; nothing in it was run")
    assert not Path("ran").exists()


@pytest.mark.parametrize("content, match", [
    (b"<!DOCTYPE html>", "it starts with b'<!DOCTYPE"), (b"PK half a file", "not a zip file"),
    (b"\x20\0\0\0\0\0\0\0" + b'{"a": {"data_offsets": [0, 4]}}  ', "it is cut short, within a")])
def test_a_damaged_file_is_one_line(tmp_path, content, match):
    (tmp_path / "a.pt").write_bytes(content)
    refused(tmp_path / "a.pt", match)


def test_a_missing_file_and_a_folder_without_weights_say_what_there_is(tmp_path):
    (tmp_path / "weights.onnx").touch()
    refused(tmp_path, r"has none of best.pt, .*\['weights.onnx'\]: give a file")
    refused(tmp_path / "RN50", "no file .*: give .*ViT-B/32.*ResNets such as RN50 are not supported")


def test_the_grid_of_positions_is_resized_bilinearly_and_the_class_row_kept(tmp_path):
    model = random_clip()                   # 2 x 2 patches
    ramp = torch.tensor([[0.0, 0.0], [0.0, 8.0], [100.0, 0.0], [100.0, 8.0]])   # (row, column) of each patch
    with torch.no_grad():
        model.visual.positional_embedding[1:, :2] = ramp
    torch.save(model.openai_state_dict(), tmp_path / "a.pt")
    loaded = clip.load_clip(tmp_path / "a.pt", image_size=(64, 32))             # 4 x 2 patches
    position = loaded.visual.positional_embedding.detach()
    assert torch.equal(position[0], model.visual.positional_embedding[0])
    rows = (0.0, 25.0, 75.0, 100.0)         # read at -0.25, 0.25, 0.75 and 1.25, held at the edges
    assert position[1::2, :2].tolist() == [[row, 0.0] for row in rows]
    assert position[2::2, :2].tolist() == [[row, 8.0] for row in rows]
    assert same(clip.load_clip(tmp_path / "a.pt", image_size=32), model)


def test_a_run_of_ours_at_the_size_it_was_trained_at(tmp_path):
    model = random_clip(image_size=(48, 16), activation="gelu")
    torch.save({"state_dict": model.openai_state_dict(), "activation": "gelu", "trained": {},
                "settings": {"image_size": (48, 16)}}, tmp_path / "best.pt")
    assert same(clip.load_clip(tmp_path), model) and clip.load_clip(tmp_path).config == model.config
    torch.save(model.openai_state_dict(), tmp_path / "best.pt")
    refused(tmp_path, "its 3 patches make no square: give the image_size")


def test_openais_files_are_fetched_once_and_checked_and_a_failure_says_what_to_do(tmp_path, monkeypatch):
    torch.save(random_clip().openai_state_dict(), tmp_path / "small.pt")
    sha256 = hashlib.sha256((tmp_path / "small.pt").read_bytes()).hexdigest()
    (tmp_path / sha256).mkdir()
    source = (tmp_path / "small.pt").rename(tmp_path / sha256 / "small.pt")
    monkeypatch.setitem(clip.URLS, "ViT-B/32", source.as_uri())
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "cache"))
    assert same(clip.load_clip("ViT-B/32"), random_clip())
    source.unlink()
    assert same(clip.load_clip("ViT-B/32"), random_clip())
    (tmp_path / "cache/small.pt").write_bytes(b"PK half a file")
    with pytest.raises(ValueError, match="is damaged, its sha256 is not .*: delete it"):
        clip.load_clip("ViT-B/32")
    (tmp_path / "cache/small.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"cannot download file.*small.pt .*--model FILE.*vocab"):
        clip.load_clip("ViT-B/32")
