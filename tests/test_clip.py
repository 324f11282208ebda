"""clip.py against torch's own modules, float64 loops and worked values; files of every format are loaded."""
import functools
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

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:Detected pickle", "ignore:.*trace")
CACHE = Path(os.environ.get("CLIP_CACHE") or "~/.cache/clip").expanduser() / "bpe_simple_vocab_16e6.txt.gz"
needs_vocabulary = pytest.mark.skipif(not CACHE.exists(), reason=f"OpenAI's vocabulary is not at {CACHE}")


def random_clip(**changes):
    """A CLIP whose every tensor is random, also those that start as zeros or ones."""
    model = tiny_clip(**changes)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
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
    """Two CLIPs have equal sizes and modes, and equal tensors of equal types under equal names."""
    assert (model.config, model.training) == (other.config, other.training)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


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


def norm64(state, x, name):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * state[name + ".weight"] + state[name + ".bias"]


def blocks64(state, x, prefix, causal):
    """Two blocks on (L, C) in float64, head by head and position by position."""
    L, C = x.shape
    for p in (f"{prefix}transformer.resblocks.{n}." for n in range(2)):
        y = norm64(state, x, p + "ln_1")
        qkv, out = y @ state[p + "attn.in_proj_weight"].T + state[p + "attn.in_proj_bias"], np.zeros((L, C))
        for h in range(0, C, 64):
            q, k, v = (qkv[:, start + h:start + h + 64] for start in (0, C, 2 * C))
            for i in range(L):
                seen = i + 1 if causal else L
                share = np.exp(k[:seen] @ q[i] / 8)
                out[i, h:h + 64] = share @ v[:seen] / share.sum()
        x = x + out @ state[p + "attn.out_proj.weight"].T + state[p + "attn.out_proj.bias"]
        y = norm64(state, x, p + "ln_2") @ state[p + "mlp.c_fc.weight"].T + state[p + "mlp.c_fc.bias"]
        y = y / (1 + np.exp(-1.702 * y))
        x = x + y @ state[p + "mlp.c_proj.weight"].T + state[p + "mlp.c_proj.bias"]
    return x


def test_features_are_those_of_float64_loops():
    model, (images, tokens) = random_clip(), batch()
    state = {name: value.double().numpy() for name, value in model.openai_state_dict().items()}
    for image, feature in zip(images.double().numpy(), model.encode_image(images)):
        x = [state["visual.class_embedding"]]
        for r, c in ((0, 0), (0, 16), (16, 0), (16, 16)):
            x.append([(image[:, r:r + 16, c:c + 16] * k).sum() for k in state["visual.conv1.weight"]])
        x = np.array(x) + state["visual.positional_embedding"]
        x = blocks64(state, norm64(state, x, "visual.ln_pre"), "visual.", False)
        x = norm64(state, x[0], "visual.ln_post") @ state["visual.proj"]
        assert np.abs(feature.detach().numpy() - x / np.linalg.norm(x)).max() < 1e-5
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


def test_inputs_that_are_not_this_models_are_refused():
    model, (images, tokens) = random_clip(context_length=11), batch()
    for wrong in (tokens, tokens[1:, :4]):                  # 12 tokens; no EOT
        with pytest.raises(ValueError, match="must have EOT, 599, in its first 11 tokens"):
            model.encode_text(wrong)
    with pytest.raises(ValueError, match=r"\(4, 1\) patches, this model reads \(2, 2\)"):
        model.encode_image(images.reshape(3, 3, 64, 16))


def test_checkpointing_computes_each_block_twice():
    model, (images, _), calls = random_clip().train(), batch(), []
    model.visual.transformer.resblocks[0].mlp.c_fc.register_forward_hook(lambda *_: calls.append(1))
    for on in (False, True):
        model.visual.transformer.grad_checkpointing = on
        model.encode_image(images).sum().backward()
    assert len(calls) == 1 + 2


def test_export_has_openais_names_without_what_a_method_added():
    model, wrapped = random_clip(), nn.Module()
    plain = model.openai_state_dict()
    wrapped.inner, wrapped.gate = model.visual.transformer.resblocks[1], nn.Parameter(torch.ones(1))
    model.visual.transformer.resblocks[1], model.visual.head = wrapped, nn.Linear(64, 64)
    torch.testing.assert_close(model.openai_state_dict(), plain, rtol=0, atol=0)


# --------------------------------------------------------------------------------------- pixels and words

@pytest.mark.parametrize("shape, size, resized, box", [        # halves to even: 5.5 is cut at 6, 4.5 at 4
    ((9, 14), 5, (5, 7), (0, 1, 5, 6)), ((14, 9), 20, (31, 20), (6, 0, 26, 20)),
    ((12, 3), 3, (12, 3), (4, 0, 7, 3)), ((10, 6), (4, 9), (4, 9), (0, 0, 4, 9))])
def test_preprocess_is_bicubic_rounds_the_long_side_down_and_cuts_the_centre(shape, size, resized, box):
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    full = torch.from_numpy(values)[None, None].float()
    for extent in ((shape[0], resized[1]), resized):        # rows, then columns, each rounded to 8 bits
        full = F.interpolate(full, extent, mode="bicubic", antialias=True).round().clamp(0, 255)
    top, left, bottom, right = box
    pixels = clip.preprocess(Image.fromarray(values), size)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, bottom - top, right - left)
    assert (pixels - full[0, 0, top:bottom, left:right]).abs().max() <= 1


def test_normalize_is_divide_subtract_divide_in_float32():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    constants = (0.48145466, 0.26862954), (0.4578275, 0.26130258), (0.40821073, 0.27577711)
    for channel, (mean, std) in enumerate(constants):
        values = (np.arange(256, dtype=np.float32) / np.float32(255) - np.float32(mean)) / np.float32(std)
        assert np.array_equal(clip.normalize(levels)[1, channel].flatten().numpy(), values)


@pytest.mark.parametrize("text, words", [
    ("A photo  of\ta\n cat.", ["a", "photo", "of", "a", "cat", "."]),
    ("it's we'LL don't o'clock", ["it", "'s", "we", "'ll", "don", "'t", "o", "'", "clock"]),
    ("x2 2024 a_b __ ?!...", ["x", "2", "2", "0", "2", "4", "a", "_", "b", "__", "?!..."]),
    ("m\u00b2 \u00bd\u2167i \u0967n", ["m", "\u00b2", "\u00bd", "\u2177", "i", "\u0967", "n"]),   # numbers
    ("na\u00efve \u4e00\u732b \u3042b", ["na\u00efve", "\u4e00\u732b", "\u3042b"]),                  # letters
    ("e\u0301 a\u20ddb a\u0345b!", ["\u00e9", "a", "\u20dd", "b", "a", "b", "!"]),     # NFC; marks are signs
    ("\u201cHi\u201d \u2018it\u2019s\u2019", ['"', "hi", '"', "'", "it", "'s", "'"]),
    ("&amp;amp; caf&eacute; &ldquo;&lt;b&gt;", ["&", "caf\u00e9", '"<', "b", ">"]),
    ("<|startoftext|>x<|EndOfText|>", ["<|startoftext|>", "x", "<|endoftext|>"])])
def test_words_are_those_openai_sees(text, words):
    assert clip.words_of(text) == words         # expected values: OpenAI's tokenizer with regex and ftfy


def test_ids_of_a_hand_made_vocabulary_merge_what_was_learned_first_and_from_the_left():
    tokenizer = clip.Tokenizer(merges=["a b", "ab c</w>", "b c</w>"])
    assert (tokenizer.vocab_size, tokenizer.sot, tokenizer.eot) == (517, 515, 516)
    # a is the 65th visible byte, 64; as the end of a word 256 more; then the merges from 512
    assert tokenizer.encode("abc a bc abab") == [515, 513, 320, 514, 512, 64, 256 + 65, 516]
    assert clip.Tokenizer(merges=["b c", "a b"]).encode("abcd") == [514, 64, 512, 256 + 67, 515]
    assert clip.Tokenizer(merges=["a a"]).encode("aaaa") == [513, 512, 64, 320, 514]


def test_texts_are_padded_with_zeros_and_cut_with_eot_kept_last():
    tokenizer = clip.Tokenizer(merges=[])
    assert tokenizer(["", "a b c d"], 5).tolist() == [[512, 513, 0, 0, 0], [512, 320, 321, 322, 513]]
    assert tokenizer("a <|endoftext|> b", 5)[0].tolist() == [512, 320, 513, 321, 513]     # as in OpenAI's


def test_training_joins_the_most_frequent_pair_first():
    # low three times, lower once, new twice: l+o 4, o+w</w> 3, o+w 1, w+e 1, e+r</w> 1, n+e 2, e+w</w> 2;
    # then lo+w</w> 3; then, of the pairs that come twice, n+e, which is after e+w</w> in the alphabet
    assert clip.Tokenizer.train(["low low Low", "lower new NEW"], 3).merges == ["l o", "lo w</w>", "n e"]
    assert clip.Tokenizer.train(["ab cd", "<|endoftext|>"], 50).merges == ["c d</w>", "a b</w>"]   # it ends


@needs_vocabulary
def test_ids_are_openais():
    tokenizer = clip.Tokenizer(CACHE)
    assert (tokenizer.vocab_size, tokenizer.merges) == (49408, None)
    texts = ["a photo of a cat", "it's \u00bd", "Hello, World!", "\U0001f642 <|endoftext|>"]
    assert tokenizer(texts, 7).tolist() == [
        [49406, 320, 1125, 539, 320, 2368, 49407], [49406, 585, 568, 33613, 49407, 0, 0],
        [49406, 3306, 267, 1002, 256, 49407, 0], [49406, 14860, 49407, 49407, 0, 0, 0]]


# ---------------------------------------------------------------------------------------------- weight files

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
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in state.items():
        raw = tensor.contiguous().numpy().tobytes()
        header[name] = {"dtype": "I64" if "position_ids" in name else "F32", "shape": tensor.shape,
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


old_torch = functools.partial(torch.save, _use_new_zipfile_serialization=False)


def open_clip(state):
    return {name if name.startswith(("visual.", "logit")) else "text." + name: state[name] for name in state}


def inside(key, prefix, state):
    """A trainer's checkpoint, with what it leaves beside the weights: random numbers, an average."""
    return {key: {prefix + name: state[name] for name in state}, "rng": torch.get_rng_state(), "ema": state}


@pytest.mark.parametrize("file, save, change", [
    ("best.pt", old_torch, dict),
    ("best.pt", torch.save, functools.partial(inside, "state_dict", "module.")),
    ("best.pt", torch.save, functools.partial(inside, "model", "base_model.model._orig_mod.")),
    ("best.pt", torch.save, functools.partial(inside, "model_state_dict", "clip.text.")),
    ("open_clip_pytorch_model.bin", torch.save, open_clip),
    ("open_clip_model.safetensors", save_safetensors, open_clip),
    ("pytorch_model.bin", torch.save, hugging_face),
    ("model.safetensors", save_safetensors, hugging_face)])
def test_every_kind_of_file_and_folder_gives_the_same_model(tmp_path, file, save, change):
    save(change(random_clip().openai_state_dict()), tmp_path / file)
    same(clip.load_clip(tmp_path), random_clip())


def test_torchscript_archives_are_read(tmp_path):
    model, (images, tokens) = random_clip().half(), batch()         # OpenAI's are in half precision
    script = torch.jit.trace_module(model, {"encode_image": images.half(), "encode_text": tokens})
    script.save(tmp_path / "a.pt")
    same(clip.load_clip(tmp_path / "a.pt"), model.float())
    torch.jit.script(nn.Conv2d(3, 4, 2)).save(tmp_path / "list.pt")         # has a list among its attributes
    assert clip.read_file(tmp_path / "list.pt")["weight"].shape == (4, 3, 2, 2)


def refused(path, match):
    """Loading fails with one line that names the path and does not advise to run the file."""
    for activation in (None, "gelu"):
        with pytest.raises((ValueError, FileNotFoundError), match=match) as info:
            clip.load_clip(path, activation=activation)
        line = str(info.value)
        assert "\n" not in line and str(path) in line and "weights_only" not in line


@pytest.mark.parametrize("file, content, expected", [
    ("config", {"vision_config": {"hidden_act": "gelu"}, "text_config": {"hidden_act": "gelu"}}, F.gelu),
    ("config", {"vision_config": {"num_attention_heads": 3, "layer_norm_eps": 1e-5}}, clip.quick_gelu),
    ("open_clip_config", {"model_cfg": {"vision_cfg": {"head_width": 64}}}, F.gelu),
    ("open_clip_config", {"model_cfg": {"quick_gelu": True}}, clip.quick_gelu),
    ("config", {"vision_config": {"hidden_act": "gelu"}, "text_config": {"hidden_act": "quick_gelu"}},
     r"\['gelu', 'quick_gelu'\]: both towers must"),
    ("config", {"vision_config": {"num_attention_heads": 12}}, "num_attention_heads 12: only 3"),
    ("config", {"text_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps 1e-06: only 1e-05"),
    ("config", [1], "config.json cannot be loaded"),
    ("open_clip_config", {"preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}, r"cfg.mean \[0.5, .*only \[0.48"),
    ("open_clip_config", {"model_cfg": {"text_cfg": {"no_causal_mask": True}}}, "no_causal_mask True"),
    ("processor_config", {"image_processor": {"image_std": [0.5, 0.5, 0.5]}}, r"image_std \[0.5")])
def test_a_file_beside_the_weights_gives_the_activation_or_is_refused(tmp_path, file, content, expected):
    torch.save(random_clip().openai_state_dict(), tmp_path / "best.pt")
    (tmp_path / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
    if isinstance(expected, str):
        refused(tmp_path, expected)
    else:
        assert clip.load_clip(tmp_path).text.transformer.resblocks[0].mlp.act is expected
        assert clip.load_clip(tmp_path, activation="gelu").config.activation == "gelu"


@pytest.mark.parametrize("change, match", [
    (lambda s: {"visual.proj.lora_A.weight": s["visual.proj"]}, r"unmerged PEFT .* merge_and_unload\(\)"),
    (lambda s: {"trained": {}, "settings": {"model": "ViT-B/32"}}, "a part of a run .*give the run's folder"),
    (lambda s: {"epoch": 3}, r"0 CLIPs \[\] among \['epoch'\] ..., not one"),
    (lambda s: s | {"ema." + name: s[name] for name in s}, "2 CLIPs .*'ema.'"),
    (lambda s: s | {"visual.proj": torch.zeros(192, 31)}, r"visual\.proj.*\[192, 31\].*\[192, 64\]"),
    (lambda s: s | {"visual.conv1.weight": torch.zeros(1280, 3, 14, 14)}, "1280 and 128 wide"),
    (lambda s: {name: s[name] for name in s if "visual." in name}, "KeyError.*token_embedding.weight"),
    (lambda s: b"<!DOCTYPE html>", "it starts with b'<!DOCTYPE"),
    (lambda s: b"\x3d\0\0\0\0\0\0\0" + b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}half',
     "must not be greater than actual buffer length")])
def test_weights_that_do_not_fit_or_are_damaged_say_why_in_one_line(tmp_path, change, match):
    content, path = change(dict(random_clip().openai_state_dict())), tmp_path / "a.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    refused(path, match)


class Evil:
    def __reduce__(self):       # unpickled carelessly, this makes a folder
        return os.mkdir, ("ran",)


def evil_script(state, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/constants.pkl", pickle.dumps(()))
        archive.writestr("a/data.pkl", pickle.dumps(state, 2))


@pytest.mark.parametrize("save, match", [
    (torch.save, "more than tensors .*state_dict alone; nothing in it was run"), (old_torch, "nothing in it was run"),
    (evil_script, "KeyError.*mkdir")])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, monkeypatch, save, match):
    monkeypatch.chdir(tmp_path)
    save({"visual.conv1.weight": Evil()}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", match)
    assert not Path("ran").exists()


def test_a_missing_file_and_a_folder_without_weights_say_what_there_is(tmp_path):
    (tmp_path / "weights.onnx").touch()
    refused(tmp_path, r"no folder with best.pt, .* but \['weights.onnx'\]: give")
    refused(tmp_path / "RN50", "no weight file .*: give .*ViT-B/32.*no ResNets such as RN50")


def test_the_grid_of_positions_is_resized_bilinearly_and_the_class_row_kept(tmp_path):
    model = random_clip()                   # 2 x 2 patches
    with torch.no_grad():                   # (row, column) of each patch
        model.visual.positional_embedding[1:, :2] = torch.tensor([[0, 0], [0, 8], [100, 0], [100, 8]])
    torch.save(model.openai_state_dict(), tmp_path / "a.pt")
    position = clip.load_clip(tmp_path / "a.pt", image_size=(64, 32)).visual.positional_embedding.detach()
    assert torch.equal(position[0], model.visual.positional_embedding[0])
    rows = (0.0, 25.0, 75.0, 100.0)         # 4 x 2 patches, read at -0.25, 0.25, 0.75, 1.25, held at the edge
    assert position[1::2, :2].tolist() == [[row, 0.0] for row in rows]
    assert position[2::2, :2].tolist() == [[row, 8.0] for row in rows]
    same(clip.load_clip(tmp_path / "a.pt", image_size=32), model)


def test_a_run_of_ours_has_its_image_size_and_activation(tmp_path):
    model = random_clip(image_size=(48, 16), activation="gelu")
    torch.save({"state_dict": model.openai_state_dict(), "trained": {},
                "settings": {"image_size": (48, 16), "activation": "gelu"}}, tmp_path / "best.pt")
    same(clip.load_clip(tmp_path), model)


def test_openais_files_are_fetched_once_and_checked_and_a_failure_says_what_to_do(tmp_path, monkeypatch):
    torch.save(random_clip().openai_state_dict(), tmp_path / "small.pt")
    content = (tmp_path / "small.pt").read_bytes()
    source = tmp_path / hashlib.sha256(content).hexdigest() / "small.pt"
    source.parent.mkdir()
    source.write_bytes(content)
    monkeypatch.setitem(clip.URLS, "ViT-B/32", source.as_uri())
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "cache"))
    same(clip.load_clip("ViT-B/32"), random_clip())
    source.write_bytes(b"another file")
    same(clip.load_clip("ViT-B/32"), random_clip())
    (tmp_path / "cache/small.pt").unlink()
    with pytest.raises(FileNotFoundError, match="cannot download .*hash.*put that file at .*--model FILE"):
        clip.load_clip("ViT-B/32")
