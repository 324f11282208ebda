"""The benchmark: what this code costs, as ratios to a reference that is measured in the same run.

    python tests/bench.py               step, methods and scale; some minutes
    python tests/bench.py step --captions rsitmd_precomp/test_caps.txt     real captions, OpenAI's vocabulary

step     a training step, MRS-Adapter + HMMC: a plain reference and ours, which must give the same loss
methods  a training step of full fine-tuning and of each method, contrastive loss
peers    a training step beside transformers + PEFT; needs `pip install transformers peft`
scale    encoding, search and recalls: the time for one item must not grow with the number of items

Weights are random. Each variant runs in a process of its own, which gives its peak memory, and the variants
take turns for some rounds, of which the fastest counts: other work on the machine slows only some of them.
"""
import argparse
import dataclasses
import sys
import timeit
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import adapters
import clip
import eval
import losses
import train

SOT, EOT = 49406, 49407     # of OpenAI's vocabulary; in this file "tiny" has it too, and 77 tokens
clip.SIZES["tiny"] = dataclasses.replace(clip.SIZES["tiny"], vocab_size=EOT + 1, context_length=77)


def seconds(call, repeats):
    """Seconds of the fastest of some calls. Each must end with a value on the CPU: that waits for a GPU."""
    return min(timeit.repeat(call, number=1, repeat=repeats))


def matrix_rate(device, precision):
    """What the machine reaches in one large product, that of ViT-B/32's MLP, in TFLOP/s."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.randn(3200, 768, device=device, dtype=dtype)
    weight = torch.randn(3072, 768, device=device, dtype=dtype)
    taken = seconds(lambda: F.linear(x, weight)[0, 0].item(), repeats=20)
    return 2 * 3200 * 768 * 3072 / 1e12 / taken     # 2: a multiplication and an addition


def peak_memory(device):
    """The most memory that this process has held, that of the GPU if it computes there, as a text."""
    if device.startswith("cuda"):
        return f"{torch.cuda.max_memory_allocated(device) / 2 ** 30:.2f} GB"
    if sys.platform == "win32":
        return "-"
    import resource     # Windows has none
    units_per_gb = 2 ** 30 if sys.platform == "darwin" else 2 ** 20     # macOS counts bytes, Linux KB
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_gb:.2f} GB"


def some_tokens(count, file):
    """Token ids (count, 77) of captions from a file, one a line; without a file, random ids."""
    rng = np.random.default_rng(0)
    if file:
        captions = Path(file).read_text(encoding="utf-8").splitlines()
        return clip.Tokenizer()([captions[n] for n in rng.integers(len(captions), size=count)])
    tokens = torch.zeros(count, 77, dtype=torch.long)
    lengths = rng.normal(14, 5, count).clip(4, 40).astype(int)      # about those of real captions
    for row, length in zip(tokens, lengths.tolist()):
        row[0], row[length] = SOT, EOT
        row[1:length] = torch.from_numpy(rng.integers(300, 49000, length - 1))
    return tokens


class PlainBlock(nn.Module):
    """The reference: a block with MRS-Adapter as one would write it from torch's own parts."""
    def __init__(self, wrapped):
        super().__init__()
        self.block, self.adapter, self.side = wrapped.inner, wrapped.adapter, wrapped.side
        width = wrapped.inner.attn.out_proj.in_features
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.attn.load_state_dict(wrapped.inner.attn.state_dict())
        self.attn.requires_grad_(False)

    def forward(self, x):
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        mask = causal if self.side == "text" else None
        y = self.block.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        h = self.block.mlp.c_fc(self.block.ln_2(x))                           # (B, L, 4C)
        return x + self.block.mlp.c_proj(h * torch.sigmoid(1.702 * h)) + self.adapter(x, self.side)


def encode_plainly(tower, inputs, views):
    """What train.encode gives, from all 77 tokens of every caption, by a forward for each view."""
    features = []
    for dropout in (0.0, train.VIEW_DROPOUT)[:views]:
        if inputs.ndim == 2:                                                  # captions
            x = tower.token_embedding(inputs) + tower.positional_embedding    # (B, 77, C)
        else:
            x = tower.embed(inputs)                                           # (B, L, C)
        x = tower.transformer(F.dropout(x, dropout))
        features.append(tower.pool(x, inputs))                                # (B, D)
    return features


def our_loss(args):
    """A CLIP, and the function from a batch to its loss. args.code: "ours", or "plain" for the reference."""
    model = clip.CLIP(clip.SIZES[args.model])
    adapters.add_method(model, args.method)
    train.choose_what_learns(model, "backbone" if args.method == "none" else "method", args.loss)
    if args.method == "mrs":
        for name in model.method_parameters:    # as after some training: adding zero would hide mistakes
            nn.init.normal_(model.get_parameter(name), std=0.02)
    encode, views = train.encode, 2 if args.loss == "hmmc" else 1
    if args.code == "plain":
        encode = encode_plainly
        adapters.wrap_blocks(model, PlainBlock)
    elif args.precision == "bf16":
        train.hold_frozen_in_bf16(model)

    def compute_loss(images, tokens):
        with eval.autocast(args.device, args.precision):
            image, text = encode(model.visual, images, views), encode(model.text, tokens, views)
        if args.loss == "hmmc":
            return losses.hmmc_loss(image[0], text[0], image[1], text[1])[0]
        return losses.contrastive_loss(image[0], text[0], model.logit_scale.exp())
    return model.to(args.device), compute_loss


def transformers_loss(args):
    """The same with transformers' CLIP, of ViT-B/32's size, and PEFT's LoRA; contrastive loss."""
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPConfig, CLIPModel
    model = CLIPModel(CLIPConfig(text_config={"eos_token_id": EOT}))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))

    def compute_loss(images, tokens):
        tokens = tokens[:, :tokens.count_nonzero(dim=1).max()]      # padded to the longest caption
        with eval.autocast(args.device, args.precision):
            output = model(input_ids=tokens, attention_mask=(tokens > 0).long(), pixel_values=images)
        return losses.contrastive_loss(output.image_embeds, output.text_embeds, model.logit_scale.exp())
    return model.to(args.device), compute_loss


def measure(args):
    """A training step of one variant, in its own process -> what its row of the table tells."""
    torch.manual_seed(0)
    size = clip.SIZES[args.model].image_size
    images = torch.randn(args.batch_size, 3, size, size).to(args.device)      # (B, 3, H, W)
    tokens = some_tokens(args.batch_size, args.captions).to(args.device)      # (B, 77)
    model, compute_loss = transformers_loss(args) if args.code == "transformers" else our_loss(args)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-5)

    def step():
        loss = compute_loss(images, tokens)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()         # waits for a GPU
    model.eval()        # no dropout in the adapter; below, none in the second view
    with torch.no_grad(), mock.patch.object(train, "VIEW_DROPOUT", 0.0):
        loss = compute_loss(images, tokens).item()
    model.train()
    with FlopCounterMode(display=False) as counter:
        step()
    return dict(loss=loss, tflop=counter.get_total_flops() / 1e12, seconds=seconds(step, repeats=5),
                trained=sum(parameter.numel() for parameter in learned), memory=peak_memory(args.device))


def variants_of(section, device):
    """{name: settings of the variant}; the others are compared with the first."""
    common = dict(code="ours", loss="contrastive", precision="bf16" if train.fast_bf16(device) else "fp32")
    variants = {}
    if section == "step":
        for name in ("plain fp32", "plain bf16", "ours fp32", "ours bf16"):
            code, precision = name.split()
            variants[name] = dict(code=code, method="mrs", loss="hmmc", precision=precision)
    elif section == "methods":
        for method in adapters.METHODS:
            name = "full fine-tuning" if method == "none" else method
            variants[name] = common | dict(method=method)
    elif section == "peers":
        variants["transformers, LoRA"] = common | dict(code="transformers")
        variants["ours, LoRA"] = common | dict(method="lora")
        variants["ours, MRS-Adapter"] = common | dict(method="mrs")
    return variants


def compare(section, args):
    """Measure the variants of a section, in turns, and print its table."""
    variants, best = variants_of(section, args.device), {}
    for _ in range(args.rounds):
        for name, settings in variants.items():
            with get_context("spawn").Pool(1) as pool:
                result = pool.apply(measure, [argparse.Namespace(**vars(args), **settings)])
            if name not in best or result["seconds"] < best[name]["seconds"]:
                best[name] = result
    rates = {precision: matrix_rate(args.device, precision) for precision in ("fp32", "bf16")}
    baseline = next(iter(best.values()))["seconds"]
    print(f"\n{section}: {args.model}, batch {args.batch_size}, {args.device}; matrix products alone reach "
          f"{rates['fp32']:.3f} TFLOP/s in fp32, {rates['bf16']:.3f} in bf16\n")
    print("| | trained | s/step | images/s | against first | peak memory | loss, no dropout | of the rate |")
    print("|:--|--:|--:|--:|--:|--:|--:|--:|")
    for name, result in best.items():
        time, rate = result["seconds"], rates[variants[name]["precision"]]
        print(f"| {name} | {result['trained']:,} | {time:.3f} | {args.batch_size / time:.1f} "
              f"| {baseline / time:.2f}x | {result['memory']} | {result['loss']:.6f} "
              f"| {100 * result['tflop'] / time / rate:.0f} % |")


def scale(args):
    """Microseconds that one item takes, with `tiny`: growth is linear where a column does not grow."""
    print(f"\nscale, {args.device}: microseconds for one item; recalls are among 1000 images\n")
    print("| items | encode a caption | encode an image | search | recalls |")
    print("|--:|--:|--:|--:|--:|")
    model = clip.CLIP(clip.SIZES["tiny"]).to(args.device).eval()
    for count in (1000, 5000, 25_000):
        tokens = some_tokens(count, None)
        images = np.broadcast_to(np.uint8(128), (count, 3, 80, 80))     # takes no memory
        features, query = torch.randn(count, 512), torch.randn(512)
        similarity, image_of_caption = torch.randn(1000, count), torch.arange(count) % 1000
        times = [seconds(lambda: eval.encode_texts(model, tokens), 2),
                 seconds(lambda: eval.encode_images(model, images), 2),
                 seconds(lambda: (features @ query).topk(10), 10),
                 seconds(lambda: eval.retrieval_metrics(similarity, image_of_caption), 2)]
        print(f"| {count} | " + " | ".join(f"{1e6 * time / count:.3f}" for time in times) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("section", nargs="?", choices=("step", "methods", "peers", "scale"), help="default: all but peers")
    flag("--model", default="ViT-B/32", choices=("tiny", *clip.URLS), help="not of scale")
    flag("--batch-size", type=int, default=32)
    flag("--rounds", type=int, default=2)
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=eval.DEVICES)
    flag("--captions", metavar="FILE", help="captions, one a line; without it they are random ids")
    args = parser.parse_args()
    if args.section == "peers" and args.model != "ViT-B/32":
        parser.error("peers compares ViT-B/32 only: leave --model out")
    for section in [args.section] if args.section else ["step", "methods", "scale"]:
        if section == "scale":
            scale(args)
        else:
            compare(section, args)


if __name__ == "__main__":
    main()
