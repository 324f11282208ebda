"""The benchmark: what this code costs, as ratios to a plain reference measured in the same run.

    python tests/bench.py               every section, a few minutes
    python tests/bench.py step          one section; --model, --batch-size, --rounds to change sizes
    python tests/bench.py step --captions rsitmd_precomp/test_caps.txt      real captions, with OpenAI's vocabulary

Each variant runs in a process of its own, which gives its peak memory, and the variants take turns for some rounds,
of which the fastest counts: a busy machine slows some rounds, and a ratio of minima is what is left of that.
"""
import argparse
import math
import os
import random
import resource
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn as nn
import torch.nn.functional as F

import numpy as np
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import adapters
import clip
import data
import eval
import losses
import train


def in_process(job, *args):
    """Result of job(*args) in a fresh process, and its peak memory in GB."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, (job, *args))


def measured(job, *args):
    result = job(*args)
    return result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def seconds(step, repeats=3):
    """Fastest of some repeats, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


# ------------------------------------------------------------------------------- training step, MRS + HMMC

class PlainBlock(nn.Module):
    """The reference: a block as one would write it from torch's own parts, with the adapter beside the MLP."""

    def __init__(self, width, adapter, side):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.adapter, self.side = adapter, side

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        h = self.c_fc(self.ln_2(x))
        return x + self.c_proj(h * torch.sigmoid(1.702 * h)) + self.adapter(x, self.side)


class PlainTower(nn.Module):
    """All 77 tokens of every caption, one forward for each view, float32, frozen weights without gradient."""

    def __init__(self, tower, side):
        super().__init__()
        self.tower, self.side, self.blocks = tower, side, nn.ModuleList()
        for wrapped in tower.transformer.resblocks:
            ours = wrapped.inner
            block = PlainBlock(ours.ln_1.normalized_shape[0], wrapped.adapter, side)
            names = {name.replace("mlp.", ""): value for name, value in ours.state_dict().items()}
            block.load_state_dict(names | {f"adapter.{n}": v for n, v in wrapped.adapter.state_dict().items()})
            for name, parameter in block.named_parameters():
                parameter.requires_grad_(name.startswith("adapter."))
            self.blocks.append(block)

    def forward(self, inputs, dropout):
        tower = self.tower
        if self.side == "image":
            x, mask = tower.embed(inputs), None
        else:
            L = inputs.shape[1]
            x = tower.token_embedding(inputs) + tower.positional_embedding[:L]
            mask = torch.full((L, L), float("-inf"), device=x.device).triu(1)
        x = F.dropout(x, dropout) if dropout else x
        for block in self.blocks:
            x = block(x, mask)
        return F.normalize(tower.pool(x, inputs), dim=-1)


def some_tokens(captions, seed=0):
    """Token ids (captions, 77): random ones of the file in --captions, else as long as real ones, mean 15 tokens."""
    if "CAPTIONS" in os.environ:
        lines = Path(os.environ["CAPTIONS"]).read_text().splitlines()
        return clip.Tokenizer()(random.Random(seed).choices(lines, k=captions))
    rng = np.random.default_rng(seed)
    tokens = torch.zeros(captions, 77, dtype=torch.long)
    for row, words in zip(tokens, rng.normal(14, 5, captions).clip(4, 40).astype(int).tolist()):
        row[0], row[1:words], row[words] = 49406, torch.from_numpy(rng.integers(300, 49000, words - 1)), 49407
    return tokens


def autocast(device, variant):
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=variant.endswith("bf16"))


def step_job(variant, size, batch_size, device):
    """Seconds a training step, the loss with every dropout off, and TFLOP a step, of one variant."""
    torch.manual_seed(0)
    model = clip.CLIP(clip.SIZES[size])
    adapters.add_method(model, "mrs")
    for name, parameter in model.named_parameters():    # as after some training: the zero init would hide mistakes
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    model = model.to(device)
    images = torch.randn(batch_size, 3, 224, 224).to(device)
    tokens = some_tokens(batch_size).to(device)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, 2e-4)
    if variant.startswith("plain"):
        image_tower, text_tower = PlainTower(model.visual, "image"), PlainTower(model.text, "text")

        def loss_of(dropout):
            return losses.hmmc_loss(image_tower(images, 0), text_tower(tokens, 0),
                                    image_tower(images, dropout), text_tower(tokens, dropout))[0]
    else:
        train.keep_freed_memory()
        if variant.endswith("bf16"):
            train.freeze_in_bf16(model)
        args = argparse.Namespace(loss="hmmc", precision=variant[-4:])

        def loss_of(dropout):
            return losses.hmmc_loss(*train.encode(model, args, images, tokens, dropout))[0]

    def step():
        with autocast(device, variant):
            loss = loss_of(0.2)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad(), autocast(device, variant):
        loss = loss_of(0.0).item()
    model.train()
    with FlopCounterMode(display=False) as counter:
        step()
    return seconds(step, repeats=4), loss, counter.get_total_flops() / 1e12


def matrix_rate(device, dtype):
    """What the machine reaches in one of the step's own products, in TFLOP/s."""
    x, w = torch.randn(3200, 768, device=device, dtype=dtype), torch.randn(3072, 768, device=device, dtype=dtype)
    return 2 * 3200 * 768 * 3072 / seconds(lambda: F.linear(x, w), repeats=20) / 1e12


def bench_step(args):
    print(f"\ntraining step, MRS + HMMC, {args.model} with random weights, batch {args.batch_size}, {args.device}, "
          f"best of {args.rounds} rounds\n")
    print("| | s/step | images/s | against plain | peak memory | loss, dropout off | of the matrix rate |")
    print("|:--|--:|--:|--:|--:|--:|--:|")
    best = {}
    for _ in range(args.rounds):
        for variant in ("plain fp32", "plain bf16", "ours fp32", "ours bf16"):
            (time_taken, *rest), memory = in_process(step_job, variant, args.model, args.batch_size, args.device)
            if variant not in best or time_taken < best[variant][0]:
                best[variant] = time_taken, *rest, memory
    rates = {"fp32": matrix_rate(args.device, torch.float32), "bf16": matrix_rate(args.device, torch.bfloat16)}
    for variant, (time_taken, loss, tflop, memory) in best.items():
        print(f"| {variant} | {time_taken:.3f} | {args.batch_size / time_taken:.1f} "
              f"| {best['plain fp32'][0] / time_taken:.2f}x | {memory:.2f} GB | {loss:.6f} "
              f"| {100 * tflop / time_taken / rates[variant[-4:]]:.0f} % |")
    print("\nmatrix products alone: " + ", ".join(f"{rate:.3f} TFLOP/s in {name}" for name, rate in rates.items()))


# ------------------------------------------------------------------------------- a step of each method

def method_job(method, size, batch_size, device, image_size=None, loss="contrastive"):
    """Seconds a training step of one method, "full" being CLIP itself, "stage 2" CLIP under fixed prompts."""
    torch.manual_seed(0)
    train.keep_freed_memory()
    config = clip.SIZES[size]
    if image_size:
        config = train.dataclasses.replace(config, image_size=image_size)
    model = clip.CLIP(config).to(device)
    adapters.add_method(model, {"full": "none", "stage 2": "prompts"}.get(method, method))
    train.choose_trained(model, "backbone" if method in ("full", "stage 2") else "method")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    args = argparse.Namespace(loss=loss, device=device, precision="bf16" if train.fast_bf16(device) else "fp32")
    height, width = image_size or (224, 224)
    images, tokens = torch.randn(batch_size, 3, height, width, device=device), some_tokens(batch_size).to(device)
    persons = torch.arange(batch_size, device=device) // 2
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, 1e-5)

    def step():
        features = train.encode(model, args, images, tokens)
        optimizer.zero_grad(set_to_none=True)
        train.compute_loss(args, features, model.logit_scale.exp(), persons=persons)[0].backward()
        optimizer.step()
    if not image_size and args.precision == "bf16":
        train.freeze_in_bf16(model)
        before = {}
    time_taken = seconds(step, repeats=4)
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in before.items())
    return time_taken, sum(p.numel() for p in learned)


def bench_methods(args):
    print(f"\none training step of each method, contrastive loss, {args.model} with random weights, batch "
          f"{args.batch_size}, {args.device}\n")
    print("| method | trained | s/step | against full fine-tuning | peak memory |\n|:--|--:|--:|--:|--:|")
    for method in ("full", *list(adapters.METHODS)[1:]):
        (time_taken, trained), memory = in_process(method_job, method, args.model, args.batch_size, args.device)
        full = time_taken if method == "full" else full
        print(f"| {method} | {trained:,} | {time_taken:.3f} | {time_taken / full:.2f}x | {memory:.2f} GB |", flush=True)


def bench_reid(args):
    print("\nprompt decoupling, ViT-B/16 with random weights at 384 x 128, batch 16, SDM, " + args.device)
    print("what a stage does not train is the same to the bit afterwards\n")
    print("| | trained | s/step | peak memory |\n|:--|--:|--:|--:|")
    for name, method in (("stage 1: prompts", "prompts"), ("stage 2: CLIP", "stage 2")):
        (time_taken, trained), memory = in_process(method_job, method, "ViT-B/16", 16, args.device, (384, 128), "sdm")
        print(f"| {name} | {trained:,} | {time_taken:.2f} | {memory:.1f} GB |", flush=True)


# ------------------------------------------------------------------------------- beside another library

def peer_job(batch_size, device):
    """Seconds a contrastive training step of transformers' CLIPModel with PEFT's LoRA, rank 4 on q and v, bf16."""
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPConfig, CLIPModel
    torch.manual_seed(0)
    config = CLIPConfig()       # ViT-B/32
    config.text_config.eos_token_id = 49407
    model = get_peft_model(CLIPModel(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).to(device)
    tokens = some_tokens(batch_size)
    tokens = tokens[:, :tokens.count_nonzero(dim=1).max()].to(device)       # padded to the longest
    images, target = torch.randn(batch_size, 3, 224, 224, device=device), torch.arange(batch_size, device=device)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, 1e-5)

    def step():
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits = model(input_ids=tokens, attention_mask=(tokens > 0).long(), pixel_values=images).logits_per_image
        optimizer.zero_grad(set_to_none=True)
        (F.cross_entropy(logits.float(), target) + F.cross_entropy(logits.float().T, target)).backward()
        optimizer.step()
    return seconds(step, repeats=4), sum(p.numel() for p in learned)


def bench_peers(args):
    """Needs `pip install transformers peft`, which nothing else here does."""
    print(f"\na contrastive training step, ViT-B/32 with random weights, batch {args.batch_size}, bf16, {args.device}, "
          f"best of {args.rounds} rounds\n")
    print("| | trained | s/step | images/s | against transformers | peak memory |\n|:--|--:|--:|--:|--:|--:|")
    best = {}
    for _ in range(args.rounds):
        for name in ("transformers + PEFT, LoRA", "ours, LoRA", "ours, MRS-Adapter"):
            job = (peer_job, args.batch_size, args.device) if "PEFT" in name else \
                (method_job, "lora" if "LoRA" in name else "mrs", "ViT-B/32", args.batch_size, args.device)
            (time_taken, trained), memory = in_process(*job)
            best[name] = min(best.get(name, (math.inf,)), (time_taken, trained, memory))
    for name, (time_taken, trained, memory) in best.items():
        print(f"| {name} | {trained:,} | {time_taken:.3f} | {args.batch_size / time_taken:.1f} "
              f"| {next(iter(best.values()))[0] / time_taken:.2f}x | {memory:.2f} GB |")


# ------------------------------------------------------------------------------- captions, pictures, ranking

def text_job(variant, size, captions, device):
    """Seconds to encode captions, and their features: 77 tokens each in fp32, or as eval.py does it."""
    torch.manual_seed(0)
    model, tokens = clip.CLIP(clip.SIZES[size]).to(device).eval(), some_tokens(captions).to(device)
    tokens[1::10] = tokens[::10]        # some captions stand twice, as in the real sets
    if variant.startswith("plain"):
        adapters.add_method(model, "mrs")       # the reference takes its blocks from a model with an adapter, at zero
        tower = PlainTower(model.eval().text, "text").eval()

        def encode():
            with torch.no_grad():
                return torch.cat([tower(part, 0) for part in tokens.split(64)])
    else:
        def encode():
            with autocast(device, variant):
                return eval.encode_texts(model, tokens)
    return seconds(encode, repeats=1), encode().float().cpu().numpy()


def bench_text(args):
    captions = 320
    print(f"\nencoding {captions} captions, {args.model} with random weights, {args.device}\n")
    print("| | captions/s | against plain | largest difference |\n|:--|--:|--:|--:|")
    for variant in ("plain fp32", "ours fp32", "ours bf16"):
        (time_taken, features), _ = in_process(text_job, variant, args.model, captions, args.device)
        plain = (time_taken, features) if variant.startswith("plain") else plain
        print(f"| {variant} | {captions / time_taken:.0f} | {plain[0] / time_taken:.1f}x "
              f"| {abs(features - plain[1]).max():.1e} |", flush=True)


def bench_pictures(args):
    """An epoch of pictures: decoded each time, or from the cache that the first epoch left."""
    pictures = 400
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{n}.jpg" for n in range(pictures)]
        for n, path in enumerate(paths):
            data.draw_aerial(np.random.default_rng(n % 40), 256)[0].save(path, quality=90)

        def decode():
            return [clip.preprocess(Image.open(path), 224) for path in paths]

        def cached():
            images = data.load_images(paths, 224, folder)
            order = np.random.permutation(pictures)
            return sum(len(batch) for batch, _, _ in data.batches(images, torch.zeros(pictures, 1), order, order, 32))
        first = seconds(lambda: data.load_images(paths, 224, f"{folder}/{random.random()}"), repeats=1)
        plain, again = seconds(decode, repeats=1), seconds(cached)
    print(f"\nan epoch of {pictures} JPEG pictures of 256 x 256, to batches of 224 x 224\n")
    print("| | images/s | against decoding |\n|:--|--:|--:|")
    for name, time_taken in (("decoded each epoch, one thread", plain), ("the first epoch: the cache is made", first),
                             ("every later epoch: from the cache", again)):
        print(f"| {name} | {pictures / time_taken:.0f} | {plain / time_taken:.1f}x |")


def scale_job(n):
    """Seconds to encode n captions and n pictures with a tiny CLIP, to search the pictures, and for the recalls."""
    torch.manual_seed(0)
    model = clip.CLIP(train.dataclasses.replace(clip.SIZES["tiny"], vocab_size=49408, context_length=77)).eval()
    tokens, size, times = some_tokens(n), model.config.image_size, []
    eval.encode_texts(model, tokens[:64])       # the first call of a process is slower

    def timed(call):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
        return result
    with tempfile.TemporaryFile() as file:
        pictures = np.memmap(file, np.uint8, "w+", shape=(n, 3, size, size))
        for i in range(0, n, 1000):
            pictures[i:i + 1000] = np.random.default_rng(i).integers(0, 256, pictures[i:i + 1000].shape)
        with eval.autocast(model, "bf16" if train.fast_bf16("cpu") else "fp32"):
            texts = timed(lambda: eval.encode_texts(model, tokens))
            images = timed(lambda: eval.encode_images(model, pictures))
    timed(lambda: [(images @ text).topk(10) for text in texts[:100]])
    pairs = data.Pairs([""] * (n // 5), [""] * n, torch.arange(n) // 5)
    timed(lambda: eval.split_metrics(eval.Product(images[:n // 5], texts), pairs))
    return times


def search_job(n):
    """Seconds for 100 searches among n features of width 512."""
    features = torch.randn(n, 512)
    return seconds(lambda: [(features @ query).topk(10) for query in features[:100]], repeats=1)


def bench_scale(args):
    """What must grow linearly: encoding and search in the items, the recalls in the similarities."""
    print("\nn captions and n pictures through a tiny CLIP (random weights, 80 px), 100 queries among the pictures,\n"
          "and the recalls of n captions and n / 5 pictures\n")
    print("| n | captions/s | pictures/s | ms a query | recalls, s | s per 10^9 similarities | peak memory |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for n in (1000, 10_000, 100_000):
        (texts, images, search, recalls), memory = in_process(scale_job, n)
        print(f"| {n} | {n / texts:.0f} | {n / images:.0f} | {10 * search:.2f} | {recalls:.2f} "
              f"| {recalls / (n ** 2 / 5e9):.1f} | {memory:.2f} GB |", flush=True)
    time_taken, memory = in_process(search_job, 1_000_000)
    print(f"\na query among 1 000 000 features of width 512, 2 GB: {10 * time_taken:.0f} ms, {memory:.1f} GB")


# ------------------------------------------------------------------------------- loading weights

def write_job(kind, size, path):
    """Writes a CLIP of a size with random weights in one of the formats people share."""
    import test_clip
    torch.manual_seed(0)
    state, config = clip.CLIP(clip.SIZES[size]).openai_state_dict(), clip.SIZES[size]
    if kind.startswith("OpenAI"):
        test_clip.save_torchscript(state, path, torch.float16)
    elif kind.startswith("Hugging Face"):
        state = test_clip.hugging_face(state, (config.vision_layers, config.text_layers))
        torch.save(state, path) if "bin" in kind else test_clip.save_safetensors(state, Path(path))
    else:
        moments = [torch.zeros_like(value) for value in state.values() for _ in range(2)]
        torch.save({"state_dict": state, "optimizer": moments} if "optimizer" in kind else state, path)


def load_job(kind, path):
    """Seconds to load a file, and the peak memory in GB before that."""
    load = (lambda: torch.load(path, weights_only=True)) if kind.startswith("torch.load") else \
        lambda: clip.load_clip(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds(load), before / 2 ** (30 if sys.platform == "darwin" else 20)


def bench_load(args):
    with torch.device("meta"):
        weights = sum(value.nbytes for value in clip.CLIP(clip.SIZES[args.model]).parameters()) / 2 ** 30
    print(f"\nloading {args.model}, {weights:.2f} GB in float32, from the page cache, best of 3; peak memory "
          "beyond that of the imports\n")
    print("| file | s | against torch.load | peak | against its weights |\n|:--|--:|--:|--:|--:|")
    kinds = ("torch.load of a state dict", "state dict", "OpenAI archive, fp16", "checkpoint with optimizer",
             "Hugging Face safetensors", "Hugging Face bin")
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            in_process(write_job, kind, args.model, f"{folder}/weights")
            (time_taken, before), peak = in_process(load_job, kind, f"{folder}/weights")
            plain = time_taken if kind == kinds[0] else plain
            print(f"| {kind} | {time_taken:.2f} | {time_taken / plain:.1f}x | {peak - before:.2f} GB "
                  f"| {(peak - before) / weights:.2f}x |", flush=True)


SECTIONS = {"step": bench_step, "methods": bench_methods, "reid": bench_reid, "text": bench_text,
            "pictures": bench_pictures, "scale": bench_scale, "load": bench_load, "peers": bench_peers}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"{', '.join(SECTIONS)}; default: all but peers")
    parser.add_argument("--model", default="ViT-B/32", choices=[name for name in clip.SIZES if name.startswith("ViT")])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--captions", metavar="FILE", help="captions, one a line; by default they are drawn")
    args = parser.parse_args()
    if args.captions:
        os.environ["CAPTIONS"] = args.captions      # for the processes of the variants
    unknown = [name for name in args.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]!r}: there are {', '.join(SECTIONS)}")
    for name in args.sections or list(SECTIONS)[:-1]:
        SECTIONS[name](args)


if __name__ == "__main__":
    main()
