"""Every method of adapters.py against its equation, written a second time on plain weights in float64, and
the promises of the mechanism: counts, identity at the start, gradients, prompts, saving, errors."""
import inspect
import math

import pytest
import torch
from conftest import tiny_clip

import clip
from adapters import METHODS, Prompted, add_method, load_trainable, merge_lora, trainable_state

GRID = (2, 3)               # rows and columns differ on purpose, as do widths (192, 128) and depths (3, 2)
ENDS = [3, 8, 5, 6]         # where the captions of the batch have EOT
HAS_SHARED = [name for name in METHODS if "shared" in inspect.signature(METHODS[name]).parameters]


def plain():
    """A tiny CLIP in which no bias is 0 and no LayerNorm weight is 1."""
    model = tiny_clip(image_size=(32, 48), vision_layers=3, context_length=12, vocab_size=50)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def build(name, seed=1, **sizes):
    """The tiny CLIP with a method, and random values in the method's parameters instead of its init."""
    model = plain()
    add_method(model, name, **sizes)
    torch.manual_seed(seed)
    with torch.no_grad():
        for key in model.method_parameters:
            model.get_parameter(key).add_(0.2 * torch.randn_like(model.get_parameter(key)))
    return model


def batch():
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(4, 3, 32, 48, generator=generator)
    tokens = torch.randint(1, 48, (4, 12), generator=generator)
    for row, end in enumerate(ENDS):
        tokens[row, 0], tokens[row, end], tokens[row, end + 1:] = 48, 49, 0
    return images, tokens


def features(model):
    images, tokens = batch()
    return model.visual(images.to(model.visual.proj.dtype)), model.text(tokens)


def scores(model):
    images, tokens = batch()
    return model.encode_image(images) @ model.encode_text(tokens).T


# ------------------------------------------------------------------ each method's equation, a second time

def quick(x):
    return x / (1 + torch.exp(-1.702 * x))


def norm(x, w, name):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attn(x, w, seen=None, allowed=None):
    """Tokens x (B, L, C) look at the tokens seen (B, K, C), or at themselves, where allowed (L, K)."""
    if seen is None:
        seen, allowed = x, w["allowed"]
    q_weight, k_weight, v_weight = w["attn.in_proj_weight"].chunk(3)
    q_bias, k_bias, v_bias = w["attn.in_proj_bias"].chunk(3)
    x, seen, out = norm(x, w, "ln_1"), norm(seen, w, "ln_1"), []
    q, k, v = x @ q_weight.T + q_bias, seen @ k_weight.T + k_bias, seen @ v_weight.T + v_bias
    for start in range(0, x.shape[-1], 64):                                   # head after head
        h = slice(start, start + 64)
        weights = torch.einsum("bic,bjc->bij", q[..., h], k[..., h] / 8).exp() * allowed
        out.append(weights / weights.sum(dim=-1, keepdim=True) @ v[..., h])
    return linear(torch.cat(out, dim=-1), w, "attn.out_proj")


def mlp(x, w):
    return linear(quick(linear(norm(x, w, "ln_2"), w, "mlp.c_fc")), w, "mlp.c_proj")


def plain_block(x, w):
    x = x + attn(x, w)
    return x + mlp(x, w)


def oracle(model, side, block):
    """Feature of one tower; block(x, w): w holds the tensors of the block and of its method."""
    tower, inputs = (model.visual, batch()[0].double()) if side == "image" else (model.text, batch()[1])
    w = {name.replace("inner.", ""): value for name, value in tower.state_dict().items()}
    x = tower.embed(inputs)
    shallow = w.get("transformer.prompts", x[0, :0])                          # (m, C)
    x = torch.cat([x[:, :1], shallow.expand(4, -1, -1), x[:, 1:]], dim=1)
    allowed = torch.ones(x.shape[1], x.shape[1]).tril(0 if side == "text" else x.shape[1])
    for i in range(3 if side == "image" else 2):
        own = {"side": side, "allowed": allowed}
        for name, value in w.items():
            if name.startswith(f"transformer.resblocks.{i}."):      # down.image and down.192 are down here
                name = name.removeprefix(f"transformer.resblocks.{i}.")
                own[name.replace(f".{side}.", ".").replace(f".{x.shape[-1]}.", ".")] = value
        x = block(x, own)
    f = tower.pool(torch.cat([x[:, :1], x[:, 1 + len(shallow):]], dim=1), inputs)
    if "head.bias" in w:                                                      # linear probe
        return linear(f, w, "head")
    if "head.down.weight" in w:                                               # CLIP-Adapter
        h = (f @ w["head.down.weight"].T).clamp(min=0)
        return 0.2 * (h @ w["head.up.weight"].T).clamp(min=0) + 0.8 * f
    return f


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def bottleneck(x, w, adapter, activation):
    """W_up act(W_down x), and behind it the output dims that both towers share, where there are any."""
    h = activation(linear(x, w, f"{adapter}.down"))
    ups = [name for name in (f"{adapter}.up", f"{adapter}.share") if f"{name}.weight" in w]
    return torch.cat([linear(h, w, name) for name in ups], dim=-1)


def beside_mlp(scale):
    def block(x, w):
        x = x + attn(x, w)
        y = norm(x, w, "adapter.norm") if "adapter.norm.weight" in w else x   # UniAdapter's
        return x + mlp(x, w) + scale * bottleneck(y, w, "adapter", torch.relu)
    return block


def in_series(activation):
    def block(x, w):
        y = attn(x, w)
        x = x + (y + bottleneck(y, w, "after_attn", activation))
        y = mlp(x, w)
        return x + (y + bottleneck(y, w, "after_mlp", activation))
    return block


def convpass(y, w, place):
    """The convolution as nine products on the grid in a frame of zeros; the class token sees the centre."""
    h = quick(linear(y, w, f"{place}.down"))
    taps, bias, (rows, columns) = w[f"{place}.conv.weight"], w[f"{place}.conv.bias"], GRID
    framed = torch.zeros(len(h), rows + 2, columns + 2, h.shape[-1]).double()
    framed[:, 1:-1, 1:-1] = h[:, 1:].unflatten(1, GRID)
    patches = bias
    for i in range(3):
        for j in range(3):
            patches = patches + framed[:, i:i + rows, j:j + columns] @ taps[:, :, i, j].T
    class_token = h[:, :1] @ taps[:, :, 1, 1].T + bias
    return linear(quick(torch.cat([class_token, patches.flatten(1, 2)], dim=1)), w, f"{place}.up")


def convpass_block(x, w):
    if w["side"] == "text":
        return plain_block(x, w)
    x = x + attn(x, w) + convpass(norm(x, w, "ln_1"), w, "beside_attn")
    return x + mlp(x, w) + convpass(norm(x, w, "ln_2"), w, "beside_mlp")


def prompted_block(x, w):
    """The prompts are only looked at. SOT sees itself alone, a word SOT, the prompts and earlier words."""
    prompts = w.get("prompts", x[0, :0])                                      # (m, C), or no prompts
    if "text_prompts" in w:
        prompts = linear(w["text_prompts"], w, "couple")                      # MaPLe
    allowed = torch.cat([torch.ones(x.shape[1], len(prompts)), w["allowed"]], dim=1)
    if w["side"] == "text":
        allowed[0, :len(prompts)] = 0
    seen = torch.cat([prompts.expand(len(x), -1, -1), x], dim=1)              # to attention order is nothing
    x = x + attn(x, w, seen, allowed)
    return x + mlp(x, w)


def lora_block(x, w):
    """The textbook form, on full matrices: q = x (W_q + B_q A_q)^T + b_q."""
    full = torch.cat([w["B_q"] @ w["A_q"], torch.zeros_like(w["attn.out_proj.weight"]), w["B_v"] @ w["A_v"]])
    return plain_block(x, {**w, "attn.in_proj_weight": w["attn.in_proj_weight"] + full})


def ia3_block(x, w):
    """A scale on an activation is a scale on the rows of the matrix (and its bias) that made it."""
    scales = torch.cat([torch.ones_like(w["l_k"]), w["l_k"], w["l_v"]])
    return plain_block(x, {**w, "attn.in_proj_weight": scales[:, None] * w["attn.in_proj_weight"],
                           "attn.in_proj_bias": scales * w["attn.in_proj_bias"],
                           "mlp.c_proj.weight": w["mlp.c_proj.weight"] * w["l_ff"]})


def ssf_block(x, w):
    """gamma (W x + b) + beta is a layer with the weight gamma W and the bias gamma b + beta."""
    folded, layers = dict(w), {"on_ln_1": "ln_1.", "on_qkv": "attn.in_proj_", "on_attn": "attn.out_proj.",
                               "on_ln_2": "ln_2.", "on_c_fc": "mlp.c_fc.", "on_mlp": "mlp.c_proj."}
    for part, layer in layers.items():
        gamma = w[f"{part}.gamma"]
        folded[f"{layer}weight"] = torch.einsum("i,i...->i...", gamma, w[f"{layer}weight"])
        folded[f"{layer}bias"] = gamma * w[f"{layer}bias"] + w[f"{part}.beta"]
    return plain_block(x, folded)


EQUATIONS = {
    "mrs": beside_mlp(1), "adaptformer": beside_mlp(0.1), "uniadapter": beside_mlp(0.1),
    "adapter": in_series(gelu), "cross-modal-adapter": in_series(quick), "convpass": convpass_block,
    "coop": prompted_block, "vpt": prompted_block, "vl-prompt": prompted_block, "maple": prompted_block,
    "prompts": prompted_block, "lora": lora_block, "ia3": ia3_block, "ssf": ssf_block,
}
VARIANTS = [(name, {}) for name in METHODS]
VARIANTS += [("prompts", dict(prompt_depth=1)), ("maple", dict(prompt_depth=1))]
VARIANTS += [(name, dict(shared=name == "uniadapter")) for name in HAS_SHARED]      # what is not the default


@pytest.mark.parametrize("name, sizes", VARIANTS)
def test_features_follow_the_equation(name, sizes):
    model, block = build(name, **sizes).double(), EQUATIONS.get(name, plain_block)
    for side, ours in zip(("image", "text"), features(model)):
        torch.testing.assert_close(ours, oracle(model, side, block), rtol=1e-9, atol=1e-9)


def test_ssf_scales_and_shifts_patch_embedding_and_last_layernorms():
    model = build("ssf")
    for part, x in ((model.visual.conv1, batch()[0]), (model.visual.ln_post, torch.randn(5, 192)),
                    (model.text.ln_final, torch.randn(5, 128))):
        assert torch.equal(part(x), part.ssf.gamma * part.inner(x) + part.ssf.beta)


def test_words_see_the_prompts_and_sot_does_not():
    block = plain().text.transformer.resblocks[0]
    x = torch.randn(2, 7, 128)
    difference = (Prompted(block, 4, 128)(x) - block(x)).abs().amax(dim=(0, 2))
    assert difference[0] < 1e-6 and difference[1:].min() > 1e-4


COUNTS = {
    "none": 0, "mrs": 161_088, "adapter": 165_248, "adaptformer": 165_248, "cross-modal-adapter": 164_208,
    "convpass": 136_064, "uniadapter": 537_984, "vpt": 460_800, "coop": 98_304, "vl-prompt": 468_992,
    "clip-adapter": 524_288, "linear-probe": 1_050_624, "maple": 3_555_072, "prompts": 61_440,
    "lora": 245_760, "bitfit": 171_008, "layernorm": 65_536, "ia3": 92_160, "ssf": 342_016}
@pytest.mark.parametrize("name, sizes, count", [(name, {}, COUNTS[name]) for name in METHODS] + [
    ("lora", dict(rank=2), 122_880), ("cross-modal-adapter", dict(bottleneck=8, shared=False), 519_168)])
def test_parameters_on_vit_b_32(name, sizes, count):
    with torch.device("meta"):
        model = clip.CLIP(clip.SIZES["ViT-B/32"])
    add_method(model, name, **sizes)        # outside the context: new parameters follow CLIP's device
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in learned) == count
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name, sizes", [variant for variant in VARIANTS if variant[0] in (
    "mrs", "adaptformer", "uniadapter", "convpass", "lora", "ia3", "linear-probe")])
def test_training_starts_at_clips_own_similarities(name, sizes):
    model = plain()
    before = scores(model)
    add_method(model, name, **sizes)
    torch.testing.assert_close(scores(model), before, rtol=0, atol=1e-6)
    assert not any(module.training for module in model.modules())       # it was in eval mode and stays there


def test_vpt_starts_uniform_in_its_own_bound():
    model = plain()
    add_method(model, "vpt")
    prompts = model.visual.transformer.resblocks[2].prompts / math.sqrt(6 / (3 * 16 * 16 + 192))
    assert 0.98 < prompts.abs().max() <= 1 and abs(prompts.std() - 1 / math.sqrt(3)) < 0.01


# ------------------------------------------------------------- the promises: training, saving, sizes, errors

@pytest.mark.parametrize("name, sizes", VARIANTS)
def test_steps_change_all_of_the_method_and_nothing_of_clip(name, sizes):
    model = plain().train()
    add_method(model, name, **sizes)
    own, before = set(model.method_parameters), {key: p.clone() for key, p in model.named_parameters()}
    optimizer = torch.optim.Adam([*model.parameters()], lr=1e-2)
    for _ in range(2 if own else 0):    # behind an up of zero, `down` gets its first gradient in step two
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(5 * scores(model), torch.arange(4)).backward()
        optimizer.step()
    assert {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()} == own
    assert {key for key, p in model.named_parameters() if not torch.equal(p, before[key])} == own


@pytest.mark.parametrize("name", METHODS)
def test_saved_and_loaded_gives_the_same_features(name):
    trained, fresh = build(name), build(name, seed=7)
    different = [not torch.equal(a, b) for a, b in zip(features(fresh), features(trained))]
    assert any(different) == (name != "none")
    load_trainable(fresh, trainable_state(trained))
    assert all(torch.equal(a, b) for a, b in zip(features(fresh), features(trained)))


def test_saved_state_is_a_copy_and_holds_what_is_fixed_later():
    model = build("prompts")
    state = trainable_state(model)
    model.requires_grad_(False)         # stage 2 fixes the prompts
    assert list(trainable_state(model)) == list(state) == model.method_parameters
    name = model.method_parameters[0]
    model.get_parameter(name).add_(1)
    assert not torch.equal(state[name], model.get_parameter(name))


def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded():
    model, bad = build("mrs"), trainable_state(build("mrs", seed=3))
    before = trainable_state(model)
    first, second = list(bad)[:2]
    bad.pop(first)
    bad.update({second: bad[second][:1], "visual.other": torch.zeros(2)})
    with pytest.raises(ValueError) as error:
        load_trainable(model, bad)
    assert f"missing {first}; unknown visual.other; {second} is (1,), not (64,)" in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in trainable_state(model).items())


def test_merged_lora_is_a_plain_clip_with_the_same_features():
    model = build("lora").double()
    before = features(model)
    merge_lora(model.float())
    assert list(model.state_dict()) == list(plain().state_dict())
    for ours, theirs in zip(features(model), before):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no LoRA"):
        merge_lora(model)


@pytest.mark.parametrize("name, sizes, words", [
    ("mrs-adapter", {}, "no method 'mrs-adapter': choose one of none, mrs"),
    ("mrs", dict(rank=4), "no size 'rank': it has bottleneck, shared, dropout"),
    ("ia3", dict(bottleneck=4), "no size 'bottleneck': it has none"),
    ("mrs", dict(bottleneck=0), "bottleneck 0"), ("vpt", dict(prompt_depth=0), "prompt_depth 0"),
    ("lora", dict(rank=2.5), "rank 2.5"), ("mrs", dict(dropout=1.0), "dropout 1.0"),
    ("prompts", dict(prompt_depth=4), "1 to 3"), ("maple", dict(prompt_depth=3), "1 to 2"),
])
def test_wrong_sizes_are_explained_and_add_nothing(name, sizes, words):
    model = plain()
    with pytest.raises(ValueError) as error:
        add_method(model, name, **sizes)
    assert words in str(error.value)
    assert list(model.state_dict()) == list(plain().state_dict())
    add_method(model, "mrs")            # another one may follow


def test_towers_too_narrow_for_the_shared_dims_are_refused_and_left_alone():
    model = tiny_clip(text_width=64)
    with pytest.raises(ValueError, match="shares 64 output dims"):
        add_method(model, "mrs")
    assert not any("inner" in name for name in model.state_dict())


def test_a_second_method_is_refused():
    with pytest.raises(ValueError, match="already has a method"):
        add_method(build("lora"), "mrs")
