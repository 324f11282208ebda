"""Every method of adapters.py against its equation, written out here a second time on plain weights, and the
promises of the mechanism: counts, identity at the start, gradients, saving, errors, export.

The oracle below is CLIP without modules: it reads `state_dict()` and loops. Float64: agreement is 1e-9.
"""
import copy
import io
import math

import pytest
import torch

import adapters
import clip
from adapters import METHODS, Prompted, add_method, load_trainable, merge_lora, trainable_state

torch.set_num_threads(1)            # for models this small, threads only wait for one another

CONFIG = clip.CLIPConfig(embed_dim=96, image_size=(16, 24), patch_size=8, vision_width=192, vision_layers=3,
                         context_length=12, vocab_size=50, text_width=128, text_layers=2)
GRID = (2, 3)                       # rows and columns differ on purpose, and so do the towers' depths
SMALL = {"vpt": dict(prompt_length=5), "vl-prompt": dict(prompt_length=5), "coop": dict(prompt_length=3)}
TRAINED = [name for name in METHODS if name != "none"]


def plain(seed=0):
    """A tiny CLIP in eval mode in which no bias is 0 and no LayerNorm weight is 1."""
    torch.manual_seed(seed)
    model = clip.CLIP(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def build(name, seed=0, **sizes):
    """The tiny CLIP with a method, and random values in the method's parameters instead of its init."""
    model = plain()
    add_method(model, name, **{**SMALL.get(name, {}), **sizes})
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key in model.method_parameters:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def batch():
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(4, 3, 16, 24, generator=generator)
    tokens = torch.randint(1, 48, (4, 12), generator=generator)
    for row, end in enumerate((3, 8, 5, 6)):
        tokens[row, 0], tokens[row, end], tokens[row, end + 1:] = 48, 49, 0
    return images, tokens


def features(model):
    images, tokens = batch()
    return model.visual(images.to(model.visual.proj.dtype)), model.text(tokens)


def loss_of(model):
    images, tokens = batch()
    scores = 5 * model.encode_image(images) @ model.encode_text(tokens).T
    return torch.nn.functional.cross_entropy(scores, torch.arange(4))


# ------------------------------------------------------------------------------------------------ the oracle

def quick(x):
    return x / (1 + torch.exp(-1.702 * x))


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def norm(x, w, name):
    x = x - x.mean(dim=-1, keepdim=True)
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x, w, name):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def softmax_attention(q, k, v, allowed):
    """q (B, L, C), k and v (B, K, C), allowed (L, K): head after head, 64 wide."""
    out = []
    for head in range(q.shape[-1] // 64):
        h = slice(64 * head, 64 * head + 64)
        scores = torch.einsum("bic,bjc->bij", q[..., h], k[..., h]) / 8
        scores = torch.where(allowed, scores.exp(), torch.zeros(()).double())
        out.append(scores / scores.sum(dim=-1, keepdim=True) @ v[..., h])
    return torch.cat(out, dim=-1)


def mask(w, L):
    return torch.ones(L, L).tril().bool() if w["causal"] else torch.ones(L, L).bool()


def qkv(y, w):
    return (y @ w["attn.in_proj_weight"].T + w["attn.in_proj_bias"]).chunk(3, dim=-1)


def attn(y, w):
    return linear(softmax_attention(*qkv(y, w), mask(w, y.shape[1])), w, "attn.out_proj")


def mlp(y, w):
    return linear(quick(linear(y, w, "mlp.c_fc")), w, "mlp.c_proj")


def plain_block(x, w):
    x = x + attn(norm(x, w, "ln_1"), w)
    return x + mlp(norm(x, w, "ln_2"), w)


def oracle(model, side, block=plain_block, patch=lambda x: x, last=lambda x: x, transformer=None):
    """Feature of one tower before its head. block(x, w): w holds the tensors of the block and its method."""
    w = {name.replace("inner.", ""): value for name, value in model.state_dict().items()}
    images, tokens = batch()
    if side == "image":
        x = images.double().unfold(2, 8, 8).unfold(3, 8, 8)                   # (B, 3, rows, columns, 8, 8)
        x = patch(torch.einsum("bcijyx,ocyx->bijo", x, w["visual.conv1.weight"]).flatten(1, 2))
        x = torch.cat([w["visual.class_embedding"].expand(4, 1, -1), x], dim=1)
        x = norm(x + w["visual.positional_embedding"], w, "visual.ln_pre")
        layers, prefix = 3, "visual.transformer.resblocks"
    else:
        x = w["text.token_embedding.weight"][tokens] + w["text.positional_embedding"]   # all 12, uncut
        layers, prefix = 2, "text.transformer.resblocks"
    run = transformer or (lambda x, blocks: [x := block(x, one) for one in blocks][-1])
    blocks = [{name.removeprefix(f"{prefix}.{i}."): value for name, value in w.items()
               if name.startswith(f"{prefix}.{i}.")} for i in range(layers)]
    for i, one in enumerate(blocks):
        one.update(causal=side == "text", side=side, depth=i, all=w)
    x = run(x, blocks)
    if side == "image":
        return last(norm(x[:, 0], w, "visual.ln_post")) @ w["visual.proj"]
    x = x[torch.arange(4), torch.tensor([3, 8, 5, 6])]
    return last(norm(x, w, "text.ln_final")) @ w["text.text_projection"]


# ------------------------------------------------------------------ each method's equation, a second time

def mrs(x, w):
    side = w["side"]
    h = linear(x, w, f"adapter.down.{side}").clamp(min=0)
    return torch.cat([linear(h, w, f"adapter.up.{side}"), linear(h, w, "adapter.share")], dim=-1)


def adaptformer(x, w):
    h = linear(x, w, f"adapter.down.{w['side']}").clamp(min=0)
    return linear(h, w, f"adapter.up.{w['side']}") / 10


def uniadapter(x, w):
    width = {"image": 192, "text": 128}[w["side"]]
    h = linear(norm(x, w, f"adapter.norm.{width}"), w, f"adapter.down.{width}").clamp(min=0)
    return linear(h, w, f"adapter.up.{w['side']}") / 10


def beside_mlp(adapter):
    def block(x, w):
        x = x + attn(norm(x, w, "ln_1"), w)
        return x + mlp(norm(x, w, "ln_2"), w) + adapter(x, w)
    return block


def houlsby(y, w, place):
    return linear(gelu(linear(y, w, f"{place}.down.{w['side']}")), w, f"{place}.up.{w['side']}")


def cross_modal(y, w, place):
    h = quick(linear(y, w, f"{place}.down.{w['side']}"))
    return torch.cat([linear(h, w, f"{place}.up.{w['side']}"), linear(h, w, f"{place}.share")], dim=-1)


def in_series(adapter):
    def block(x, w):
        y = attn(norm(x, w, "ln_1"), w)
        x = x + (y + adapter(y, w, "after_attn"))
        y = mlp(norm(x, w, "ln_2"), w)
        return x + (y + adapter(y, w, "after_mlp"))
    return block


def convpass(y, w, place):
    """The convolution as nine shifted products, patch after patch; the class token sees the centre tap."""
    h = quick(linear(y, w, f"{place}.down"))
    taps, bias = w[f"{place}.conv.weight"], w[f"{place}.conv.bias"]
    out = torch.empty_like(h)
    out[:, 0] = h[:, 0] @ taps[:, :, 1, 1].T + bias
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            total = bias.expand(len(h), -1)
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    if 0 <= row + i < GRID[0] and 0 <= column + j < GRID[1]:
                        neighbour = h[:, 1 + (row + i) * GRID[1] + column + j]
                        total = total + neighbour @ taps[:, :, 1 + i, 1 + j].T
            out[:, 1 + row * GRID[1] + column] = total
    return linear(quick(out), w, f"{place}.up")


def convpass_block(x, w):
    if w["side"] == "text":
        return plain_block(x, w)
    y = norm(x, w, "ln_1")
    x = x + attn(y, w) + convpass(y, w, "beside_attn")
    y = norm(x, w, "ln_2")
    return x + mlp(y, w) + convpass(y, w, "beside_mlp")


def attend_to_prompts(x, w, prompts):
    """A block whose prompts are keys and values only: nobody asks for what becomes of them.

    The first token sees itself (text) or everything (image); token i > 0 of a text sees the first token, the
    prompts and the words up to itself.
    """
    L, m = x.shape[1], len(prompts)
    seen = torch.cat([prompts.expand(len(x), -1, -1), x], dim=1)              # to attention order is nothing
    allowed = torch.cat([torch.ones(L, m).bool(), mask(w, L)], dim=1)
    if w["causal"]:
        allowed[0, :m] = False
    q, _, _ = qkv(norm(x, w, "ln_1"), w)
    _, k, v = qkv(norm(seen, w, "ln_1"), w)
    x = x + linear(softmax_attention(q, k, v, allowed), w, "attn.out_proj")
    return x + mlp(norm(x, w, "ln_2"), w)


def prompted_block(x, w):
    return attend_to_prompts(x, w, w["prompts"]) if "prompts" in w else plain_block(x, w)


def maple_block(x, w):
    if w["side"] == "image" and "couple.weight" in w:
        text = w["all"][f"text.transformer.resblocks.{w['depth']}.prompts"]
        return attend_to_prompts(x, w, text @ w["couple.weight"].T + w["couple.bias"])
    return prompted_block(x, w)


def shallow_text(x, blocks):
    """vl-prompt's text side: the prompts go through the whole transformer, and are taken out at its end."""
    if blocks[0]["side"] == "image":
        for w in blocks:
            x = prompted_block(x, w)
        return x
    prompts = blocks[0]["all"]["text.transformer.prompts"]
    x = torch.cat([x[:, :1], prompts.expand(4, -1, -1), x[:, 1:]], dim=1)
    for w in blocks:
        x = plain_block(x, w)
    return torch.cat([x[:, :1], x[:, 17:]], dim=1)


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
    def ssf(x, name):
        return w[f"{name}.gamma"] * x + w[f"{name}.beta"]

    packed = ssf(torch.cat(qkv(ssf(norm(x, w, "ln_1"), "ln_1"), w), dim=-1), "qkv")
    y = softmax_attention(*packed.chunk(3, dim=-1), mask(w, x.shape[1]))
    x = x + ssf(linear(y, w, "attn.out_proj"), "attn")
    h = quick(ssf(linear(ssf(norm(x, w, "ln_2"), "ln_2"), w, "mlp.c_fc"), "c_fc"))
    return x + ssf(linear(h, w, "mlp.c_proj"), "c_proj")


def ssf_outside(model, side):
    s = model.state_dict()
    patch_scale, patch_shift = s["visual.conv1.ssf.gamma"].flatten(), s["visual.conv1.ssf.beta"].flatten()
    name = {"image": "visual.ln_post.ssf", "text": "text.ln_final.ssf"}[side]
    return dict(patch=lambda x: x * patch_scale + patch_shift,
                last=lambda x: x * s[f"{name}.gamma"] + s[f"{name}.beta"])


EQUATIONS = [
    ("none", {}, plain_block), ("bitfit", {}, plain_block), ("layernorm", {}, plain_block),
    ("mrs", {}, beside_mlp(mrs)), ("mrs", dict(shared=False), beside_mlp(mrs)),
    ("adaptformer", {}, beside_mlp(adaptformer)),
    ("adaptformer", dict(shared=False), beside_mlp(adaptformer)),
    ("uniadapter", {}, beside_mlp(uniadapter)), ("uniadapter", dict(shared=True), beside_mlp(uniadapter)),
    ("adapter", {}, in_series(houlsby)), ("adapter", dict(shared=False), in_series(houlsby)),
    ("cross-modal-adapter", {}, in_series(cross_modal)),
    ("cross-modal-adapter", dict(shared=False), in_series(cross_modal)),
    ("convpass", {}, convpass_block), ("convpass", dict(shared=False), convpass_block),
    ("prompts", {}, prompted_block), ("prompts", dict(prompt_depth=2), prompted_block),
    ("coop", {}, prompted_block), ("vpt", {}, prompted_block), ("maple", {}, maple_block),
    ("maple", dict(prompt_depth=1), maple_block),
    ("lora", {}, lora_block), ("ia3", {}, ia3_block), ("ssf", {}, ssf_block),
]


@pytest.mark.parametrize("name, sizes, block", EQUATIONS, ids=[f"{n} {s or ''}" for n, s, _ in EQUATIONS])
def test_features_follow_the_equation(name, sizes, block):
    model = build(name, **sizes).double()
    for side, ours in zip(("image", "text"), features(model)):
        outside = ssf_outside(model, side) if name == "ssf" else {}
        torch.testing.assert_close(ours, oracle(model, side, block, **outside), rtol=1e-9, atol=1e-9)


def test_vl_prompt_is_deep_on_the_images_and_shallow_on_the_text():
    model = build("vl-prompt").double()
    for side, ours in zip(("image", "text"), features(model)):
        torch.testing.assert_close(ours, oracle(model, side, transformer=shallow_text), rtol=1e-9, atol=1e-9)


def test_clip_adapter_mixes_a_fifth_of_its_network_into_the_feature():
    model = build("clip-adapter").double()
    for side, ours in zip(("visual", "text"), features(model)):
        f = oracle(model, {"visual": "image", "text": "text"}[side])
        down, up = (model.state_dict()[f"{side}.head.{name}.weight"] for name in ("down", "up"))
        theirs = 0.2 * ((f @ down.T).clamp(min=0) @ up.T).clamp(min=0) + 0.8 * f
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_linear_probe_is_one_matrix_and_bias_behind_each_tower():
    model = build("linear-probe").double()
    for side, ours in zip(("visual", "text"), features(model)):
        f = oracle(model, {"visual": "image", "text": "text"}[side])
        weight, bias = (model.state_dict()[f"{side}.head.{name}"] for name in ("weight", "bias"))
        torch.testing.assert_close(ours, f @ weight.T + bias, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------- counts and names

COUNTS = [
    ("none", {}, 0), ("mrs", {}, 161_088), ("adapter", {}, 165_248), ("adaptformer", {}, 165_248),
    ("cross-modal-adapter", {}, 164_208), ("cross-modal-adapter", dict(bottleneck=8, shared=False), 519_168),
    ("convpass", {}, 136_064), ("uniadapter", {}, 537_984), ("vpt", {}, 460_800), ("coop", {}, 98_304),
    ("vl-prompt", {}, 468_992), ("clip-adapter", {}, 524_288), ("linear-probe", {}, 1_050_624),
    ("maple", {}, 3_555_072), ("prompts", {}, 61_440), ("lora", {}, 245_760), ("lora", dict(rank=2), 122_880),
    ("bitfit", {}, 171_008), ("layernorm", {}, 65_536), ("ia3", {}, 92_160), ("ssf", {}, 342_016)]


@pytest.mark.parametrize("name, sizes, count", COUNTS, ids=[f"{n} {s or ''}" for n, s, _ in COUNTS])
def test_parameters_on_vit_b_32(name, sizes, count):
    with torch.device("meta"):
        model = clip.CLIP(clip.SIZES["ViT-B/32"])
        add_method(model, name, **sizes)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_every_method_has_its_count_tested():
    assert {name for name, _, _ in COUNTS} == set(METHODS)


def test_prompt_decoupling_on_vit_b_16_learns_61_440_numbers():
    with torch.device("meta"):
        model = clip.CLIP(clip.SIZES["ViT-B/16"])
    add_method(model, "prompts")    # outside the context: it follows the model's device by itself
    learned = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learned) == 61_440 and all(p.is_meta for p in learned)


def test_one_mrs_adapter_serves_both_towers():
    model = plain()
    places = add_method(model, "mrs")
    assert places == [f"visual.transformer.resblocks.{i}" for i in range(3)] + \
        [f"text.transformer.resblocks.{i}" for i in range(2)]
    assert len({id(model.get_submodule(place).adapter) for place in places}) == 1
    assert len(trainable_state(model)) == 10    # weight and bias of 2 down, 2 up, 1 shared: each once


def test_per_block_mrs_is_one_for_each_depth_common_to_the_towers():
    model = plain()
    add_method(model, "mrs", shared=False)
    image, text = ([block.adapter for block in tower.transformer.resblocks]
                   for tower in (model.visual, model.text))
    assert image[0] is text[0] and image[1] is text[1] and image[0] is not image[1]
    assert set(image[2].down) == {"image"}      # no text block is that deep: nothing is left untrained


def test_uniadapter_has_one_down_projection_where_the_towers_are_equally_wide():
    assert set(adapters.UniAdapter({"image": 256, "text": 256}, 8).down) == {"256"}


@pytest.mark.parametrize("name", METHODS)
def test_export_has_openai_names_and_values_only(name):
    before = plain().openai_state_dict()
    model = plain()
    add_method(model, name)
    after = model.openai_state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


# --------------------------------------------------------------------------------------------------- at init

@pytest.mark.parametrize("name", ["none", "mrs", "adaptformer", "uniadapter", "convpass", "lora", "ia3",
                                  "bitfit", "layernorm"])
def test_identity_at_init(name):
    for shared in (True, False) if "shared" in METHODS[name][1] else (None,):
        model = plain()
        before = features(model)
        add_method(model, name, shared=shared)
        for ours, theirs in zip(features(model), before):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name, tolerance", [("adapter", 1e-3), ("cross-modal-adapter", 0.1), ("ssf", 0.3)])
def test_nearly_the_identity_at_init(name, tolerance):
    model = plain()
    before = features(model)
    add_method(model, name)
    for ours, theirs in zip(features(model), before):
        distance = (ours - theirs).norm() / theirs.norm()
        assert 0 < distance < tolerance


def test_linear_probe_starts_from_clips_similarities():
    model = plain()
    images, tokens = batch()
    before = model.encode_image(images) @ model.encode_text(tokens).T
    add_method(model, "linear-probe")
    after = model.encode_image(images) @ model.encode_text(tokens).T
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_vpt_starts_uniform_in_its_own_bound():
    model = plain()
    add_method(model, "vpt")
    prompts = torch.stack([block.prompts for block in model.visual.transformer.resblocks])
    bound = math.sqrt(6 / (3 * 8 * 8 + 192))
    assert 0.98 * bound < prompts.abs().max() <= bound
    assert abs(prompts.std().item() - bound / math.sqrt(3)) < 0.01 * bound


def test_a_model_in_eval_mode_stays_in_eval_mode():
    model = plain()
    add_method(model, "mrs")
    assert not any(module.training for module in model.modules())


def test_dropout_acts_in_training_only_and_at_the_rate_asked():
    adapter = adapters.MRSAdapter({"image": 192, "text": 128}, dropout=0.25)
    torch.nn.init.ones_(adapter.share.weight)
    torch.nn.init.ones_(adapter.down["text"].bias)
    x = torch.zeros(500, 1, 128)                # h is 1 everywhere, and a shared output counts what is left
    assert adapter.eval()(x, "text")[..., -1].eq(64).all()
    torch.manual_seed(0)
    left = adapter.train()(x, "text")[..., -1] * 0.75 / 64      # the share of h that was kept, in each row
    assert abs(left.mean() - 0.75) < 0.01 and abs(left.std() - math.sqrt(0.75 * 0.25 / 64)) < 0.005


def test_maple_teaches_the_text_prompts_through_the_image_tower_too():
    model = build("maple")
    model.visual(batch()[0]).sum().backward()
    assert all(block.prompts.grad.abs().sum() > 0 for block in model.text.transformer.resblocks)


# -------------------------------------------------------------------------------------------------- training

LEARNING = [(name, {}) for name in TRAINED] + [(name, dict(shared=not METHODS[name][1]["shared"]))
                                               for name in TRAINED if "shared" in METHODS[name][1]]


@pytest.mark.parametrize("name, sizes", LEARNING, ids=[f"{n} {s or ''}" for n, s in LEARNING])
def test_steps_change_all_of_the_method_and_nothing_of_clip(name, sizes):
    model = plain().train()
    add_method(model, name, **sizes)
    before = copy.deepcopy(dict(model.named_parameters()))
    own = {key for key, p in before.items() if p.requires_grad}
    assert own == set(trainable_state(model))
    torch.manual_seed(0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):      # behind an up-projection of zero, `down` gets its first gradient in step two
        optimizer.zero_grad()
        loss_of(model).backward()
        assert {key for key, p in model.named_parameters() if p.grad is not None} == own
        optimizer.step()
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert changed == own


@pytest.mark.parametrize("name", METHODS)
def test_saved_and_loaded_gives_the_same_features(name):
    trained = build(name)
    file = io.BytesIO()
    torch.save(trainable_state(trained), file)
    file.seek(0)
    fresh = build(name, seed=7)
    if name != "none":
        assert not torch.equal(features(fresh)[1], features(trained)[1]) or name in ("vpt", "convpass")
    load_trainable(fresh, torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(features(fresh), features(trained)))


def test_saved_state_is_a_copy():
    model = plain()
    add_method(model, "mrs")
    state = trainable_state(model)
    key = next(iter(state))
    with torch.no_grad():
        model.get_parameter(key).add_(1)
    assert not torch.equal(state[key], model.get_parameter(key))


def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded():
    model = build("mrs")
    before, good = trainable_state(model), trainable_state(build("mrs", seed=3))
    first, second, third = list(good)[:3]
    bad = {key: value for key, value in good.items() if key != first}
    bad.update({second: good[second][:1], "visual.other": torch.zeros(2)})
    with pytest.raises(ValueError) as error:
        load_trainable(model, bad)
    assert f"missing {first}" in str(error.value) and "unknown visual.other" in str(error.value)
    assert f"{second} is (1,), not (64,)" in str(error.value) and third not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in trainable_state(model).items())


def test_weights_of_a_method_do_not_load_into_plain_clip():
    with pytest.raises(ValueError, match="unknown"):
        load_trainable(plain(), trainable_state(build("lora")))


# ------------------------------------------------------------------------------------------- sizes and errors

@pytest.mark.parametrize("name, sizes, words", [
    ("mrs-adapter", {}, "no method 'mrs-adapter': choose one of none, mrs"),
    ("mrs", dict(rank=4), "no size 'rank': it has bottleneck, shared, dropout"),
    ("ia3", dict(bottleneck=4), "no size 'bottleneck': it has none"),
    ("mrs", dict(bottleneck=0), "bottleneck 0"), ("lora", dict(rank=0), "rank 0"),
    ("prompts", dict(prompt_length=0), "prompt_length 0"), ("vpt", dict(prompt_depth=0), "prompt_depth 0"),
    ("prompts", dict(prompt_depth=4), "1 to 3"), ("coop", dict(prompt_depth=3), "1 to 2"),
    ("maple", dict(prompt_depth=3), "1 to 2"), ("mrs", dict(dropout=1.5), "1.5"),
])
def test_wrong_sizes_are_explained_and_leave_clip_alone(name, sizes, words):
    model = plain()
    with pytest.raises(ValueError) as error:
        add_method(model, name, **sizes)
    assert words in str(error.value)
    assert list(model.state_dict()) == list(plain().state_dict())
    add_method(model, "mrs")


def test_sizes_that_are_none_are_the_defaults():
    model = plain()
    add_method(model, "mrs", bottleneck=None, rank=None, prompt_length=None)
    assert model.visual.transformer.resblocks[0].adapter.share.in_features == 64


def test_towers_too_narrow_for_the_shared_dims_are_refused():
    model = clip.CLIP(clip.CLIPConfig(32, 16, 8, 64, 1, 8, 20, 128, 1))
    with pytest.raises(ValueError, match="shares 64 output dims"):
        add_method(model, "mrs")
    assert not any("inner" in name for name in model.state_dict())


def test_a_second_method_is_refused():
    with pytest.raises(ValueError, match="already has a method"):
        add_method(build("mrs"), "lora")


# ----------------------------------------------------------------------------------------------- composition

@pytest.mark.parametrize("name", METHODS)
def test_the_second_view_rides_in_the_same_batch(name):
    """HMMC doubles the batch between embed and transformer; nothing a method does may depend on the batch."""
    model = build(name)
    images, tokens = batch()
    for tower, inputs, alone in zip((model.visual, model.text), (images, tokens), features(model)):
        x = tower.embed(inputs)
        first, second = tower.transformer(torch.cat([x, x.flip(0)])).chunk(2)
        for view in (first, second.flip(0)):
            torch.testing.assert_close(tower.head(tower.pool(view, inputs)), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_last_mlp_is_run_for_the_token_that_is_read_alone(name):
    model, seen = build(name), []
    for tower in (model.visual, model.text):
        last = tower.transformer.get_submodule("inner" if name == "vl-prompt" and tower is model.text else "")
        last = [module for _, module in last.resblocks[-1].named_modules() if isinstance(module, clip.Block)][0]
        last.mlp.c_fc.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    features(model)
    assert seen == [(4, 1, 4 * 192), (4, 1, 4 * 128)]


@pytest.mark.parametrize("name", METHODS)
def test_bf16_autocast_over_bf16_frozen_matrices(name, monkeypatch):
    """What the method learns stays float32, gets float32 gradients, and the features are those of float32."""
    attend = clip.Attention.attend

    def in_bf16(self, *qkv):
        assert {x.dtype for x in qkv} == {torch.bfloat16}
        return attend(self, *qkv)

    model = build(name)
    expected = [f.detach() for f in features(model)]
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, clip.Attention)):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
    images, tokens = batch()
    monkeypatch.setattr(clip.Attention, "attend", in_bf16)
    with torch.autocast("cpu", torch.bfloat16):
        for width, tower in ((192, model.visual), (128, model.text)):
            for dtype in (torch.bfloat16, torch.float32):       # the stream leaves as it came
                assert tower.transformer(torch.randn(2, 7, width).to(dtype)).dtype == dtype
        ours = model.visual(images), model.text(tokens)
        if name != "none":
            (ours[0].float() @ ours[1].float().T).square().mean().backward()
    for mine, theirs in zip(ours, expected):
        assert (mine.float() - theirs).norm() < 0.05 * theirs.norm()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in learned)


def test_tuned_weights_of_a_bf16_clip_become_float32():
    model = plain().bfloat16()
    add_method(model, "bitfit")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# ----------------------------------------------------------------------- prompt decoupling (arXiv 2401.02173)

def test_stage_one_moves_prompts_only_and_stage_two_everything_else():
    model = plain().train()
    add_method(model, "prompts")
    prompts = {f"{tower}.transformer.resblocks.{i}.prompts" for tower, n in (("visual", 3), ("text", 2))
               for i in range(n)}
    assert set(trainable_state(model)) == prompts

    def step():
        before = copy.deepcopy(dict(model.named_parameters()))
        for p in model.parameters():
            p.grad = None
        loss_of(model).backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
        return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}

    assert step() == prompts
    for name, p in model.named_parameters():
        p.requires_grad_(name not in prompts and name != "logit_scale")
    held = trainable_state(model)
    assert step() == {name for name, _ in model.named_parameters()} - prompts - {"logit_scale"}
    assert set(trainable_state(model)) == prompts and all(
        torch.equal(value, held[name]) for name, value in trainable_state(model).items())


def test_prompts_of_length_zero_are_plain_clip_exactly():
    model = plain()
    before = features(model)
    for tower, width in ((model.visual, 192), (model.text, 128)):
        for i, block in enumerate(tower.transformer.resblocks):
            tower.transformer.resblocks[i] = Prompted(block, 0, width)
    assert all(torch.equal(a, b) for a, b in zip(features(model), before))


@pytest.mark.parametrize("name, depth, towers", [
    ("prompts", 1, {"visual": 1, "text": 1}), ("prompts", 3, {"visual": 3, "text": 2}),
    ("coop", 1, {"text": 1}), ("vpt", 2, {"visual": 2}), ("maple", None, {"visual": 2, "text": 2})])
def test_prompt_depth_counts_blocks_from_the_first(name, depth, towers):
    places = {f"{tower}.transformer.resblocks.{i}" for tower, n in towers.items() for i in range(n)}
    model = plain()
    assert set(add_method(model, name, prompt_depth=depth)) == places
    assert {name.rsplit(".", 1)[0] for name, _ in model.named_modules() if name.endswith("inner")} == places


@pytest.mark.parametrize("side, layers", [("visual", 3), ("text", 2)])
def test_prompts_of_a_block_act_from_that_block_on(side, layers):
    model = build("prompts")
    resblocks = model.get_submodule(f"{side}.transformer.resblocks")
    outputs = []
    for block in resblocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    features(model)
    for k in range(layers):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.get_submodule(f"{side}.transformer.resblocks")[k].prompts.add_(1)
        first, outputs[:] = list(outputs), []
        features(changed)
        same = [torch.equal(a, b) for a, b in zip(first, outputs)]
        assert same == [True] * k + [False] * (layers - k)
        outputs[:] = first


def test_words_see_the_prompts_and_sot_does_not():
    block = build("prompts").text.transformer.resblocks[0]
    x = torch.randn(2, 6, 128)
    before = block(x)
    with torch.no_grad():
        block.prompts.add_(1)
    after = block(x)
    assert after.shape == x.shape and torch.equal(after[:, 0], before[:, 0])
    assert not any(torch.equal(after[:, i], before[:, i]) for i in range(1, 6))


@pytest.mark.parametrize("name", ["prompts", "coop", "vl-prompt", "maple", "mrs"])
def test_ids_after_eot_change_nothing(name):
    model = build(name)
    _, tokens = batch()
    other = tokens.clone()
    other[0, 4:], other[2, 7:] = 17, 3
    assert torch.equal(model.encode_text(tokens), model.encode_text(other))


# ------------------------------------------------------------------------------------------------------ LoRA

def test_merged_lora_is_plain_clip_with_the_same_features():
    model = build("lora").double()
    before = features(model)
    untouched = plain().double().state_dict()
    merge_lora(model)
    after = model.state_dict()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain().modules()]
    assert {key for key in untouched if not torch.equal(after[key], untouched[key])} == {
        f"{tower}.transformer.resblocks.{i}.attn.in_proj_weight" for tower, n in (("visual", 3), ("text", 2))
        for i in range(n)}
    for ours, theirs in zip(features(model), before):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert trainable_state(model) == {} and list(after) == list(untouched)


def test_merging_into_a_bf16_clip_keeps_the_update_in_float32():
    model = build("lora")
    lora = model.text.transformer.resblocks[0]
    weight = lora.inner.attn.in_proj_weight
    weight.data = weight.data.bfloat16()
    expected = weight.detach().float()[256:] + (lora.B_v @ lora.A_v).detach()
    merge_lora(model)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight[256:].detach(), expected, rtol=0, atol=0)


def test_merging_without_lora_is_an_error():
    with pytest.raises(ValueError, match="no LoRA"):
        merge_lora(build("mrs"))


def test_lora_makes_no_gradient_of_the_size_of_the_packed_matrix():
    """Shapes of all matrix products of a block backward; 14 is B x L, the rest are weight gradients."""
    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        shapes = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if "mm" in function.__name__:
                self.shapes.add(tuple(result.shape))
            return result

    block = build("lora").text.transformer.resblocks[0]
    y = block(torch.randn(2, 7, 128)).square().mean()
    with Products():
        y.backward()
    assert {shape for shape in Products.shapes if 14 not in shape} <= {(4, 128), (128, 4)}
    assert (4, 128) in Products.shapes or (128, 4) in Products.shapes
