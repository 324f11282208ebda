"""The benchmark: what this code costs, as ratios to a plain reference measured in the same run.

    python tests/bench.py               every section, a few minutes
    python tests/bench.py step          one section; --model, --batch-size, --rounds to change sizes

Each variant runs in a process of its own, which gives its peak memory, and the variants take turns for some rounds,
of which the fastest counts: a busy machine slows some rounds, and a ratio of minima is what is left of that.
"""
import argparse
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

import adapters
import clip
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


def step_job(variant, size, batch_size, device):
    """Seconds a training step, and the loss with every dropout off, of one variant."""
    torch.manual_seed(0)
    model = clip.CLIP(clip.SIZES[size])
    adapters.add_method(model, "mrs")
    for name, parameter in model.named_parameters():    # as after some training: the zero init would hide mistakes
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    model = model.to(device)
    images = torch.randn(batch_size, 3, 224, 224).to(device)
    tokens = torch.zeros(batch_size, 77, dtype=torch.long)
    for row, words in zip(tokens, torch.randint(8, 25, (batch_size,)).tolist()):  # real captions: mean 15, 95 % <= 24
        row[0], row[1:words], row[words] = 49406, torch.randint(300, 49000, (words - 1,)), 49407
    tokens = tokens.to(device)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, 2e-4)
    precision = "bf16" if variant.endswith("bf16") else "fp32"
    if variant.startswith("plain"):
        image_tower, text_tower = PlainTower(model.visual, "image"), PlainTower(model.text, "text")

        def loss_of(dropout):
            return losses.hmmc_loss(image_tower(images, 0), text_tower(tokens, 0),
                                    image_tower(images, dropout), text_tower(tokens, dropout))[0]
    else:
        if precision == "bf16":
            train.freeze_in_bf16(model)

        def loss_of(dropout):
            (image, image2), (text, text2) = (train.encode_twice(tower, inputs, dropout) for tower, inputs in
                                              ((model.visual, images), (model.text, tokens)))
            return losses.hmmc_loss(image, text, image2, text2)[0]

    def step():
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(0.2)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
        loss = loss_of(0.0).item()
    model.train()
    return seconds(step), loss


def bench_step(args):
    print(f"\ntraining step, MRS + HMMC, {args.model} with random weights, batch {args.batch_size}, {args.device}, "
          f"best of {args.rounds} rounds\n")
    print("| | s/step | images/s | against plain | peak memory | loss, dropout off |\n|:--|--:|--:|--:|--:|--:|")
    best = {}
    for _ in range(args.rounds):
        for variant in ("plain fp32", "plain bf16", "ours fp32", "ours bf16"):
            (time_taken, loss), memory = in_process(step_job, variant, args.model, args.batch_size, args.device)
            if variant not in best or time_taken < best[variant][0]:
                best[variant] = time_taken, loss, memory
    for variant, (time_taken, loss, memory) in best.items():
        print(f"| {variant} | {time_taken:.3f} | {args.batch_size / time_taken:.1f} "
              f"| {best['plain fp32'][0] / time_taken:.2f}x | {memory:.2f} GB | {loss:.5f} |")


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


SECTIONS = {"step": bench_step, "load": bench_load}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"{', '.join(SECTIONS)}; default: all")
    parser.add_argument("--model", default="ViT-B/32", choices=[name for name in clip.SIZES if name.startswith("ViT")])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    unknown = [name for name in args.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]!r}: there are {', '.join(SECTIONS)}")
    for name in args.sections or SECTIONS:
        SECTIONS[name](args)


if __name__ == "__main__":
    main()
