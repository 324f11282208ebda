"""Training: a data set, a CLIP, a method, what learns and a loss, in one plain loop.

    python train.py      no data, no network: draws two worlds, pre-trains a tiny CLIP on the one and moves
                         it to the other, by an MRS-Adapter and by full fine-tuning
    python train.py --dataset ucm --data-root DIR                       first paper: MRS-Adapter + HMMC
    python train.py --dataset CUHK-PEDES --data-root DIR --out runs/stage1       second paper, stage 1
    python train.py --dataset CUHK-PEDES --data-root DIR --init runs/stage1 --train backbone   stage 2

A run is a folder: best.pt (best epoch on val), last.pt (to resume), curve.png, metrics.json.
The random numbers of a step depend on (seed, step, process) alone: with the same processes, device and
precision a resumed run ends as an unbroken one.

Shapes: B pairs in the batch (of one process, up to `gather`), L tokens, C width of a tower, D joint width.
"""
import argparse
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
import timeit
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather
from tqdm import tqdm

import adapters
import clip
import data
import eval
import losses

FROM_SCRATCH = {"tiny": 1000, "small": 3000}    # models without weights: merges to learn from the captions
VIEW_DROPOUT = 0.2      # on the tokens of HMMC's second view (PE-RSITR); --dropout is the adapter's own
SDM_SCALE = 50.0        # 1 / temperature of SDM (IRRA)
CHECKPOINT_SECONDS = 600
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # torchrun's


# ------------------------------------------------------------------------------------------- 1. settings

PE_RSITR = dict(model="ViT-B/32", method="mrs", train="method", loss="hmmc", epochs=30, batch_size=16,
                lr=2e-4, schedule="step", warmup=0.0, weight_decay=0.0, epoch_over="captions", augment="none",
                margin=0.2, seed=0)
SCRATCH = dict(method="none", train="all", loss="contrastive", epochs=20, batch_size=128, lr=1e-3,
               schedule="cosine", warmup=1.0, weight_decay=0.1, epoch_over="images")
PEOPLE = dict(model="ViT-B/16", image_size=(384, 128), method="prompts", loss="sdm", augment="people",
              epochs=10, batch_size=64, lr=3e-4, schedule="cosine", warmup=1.0, weight_decay=4e-5)
TOY = dict(model="toy", batch_size=64, schedule="cosine", warmup=1.0, epoch_over="images", epochs=12)
TOY_PEOPLE = PEOPLE | dict(model="toy", image_size=(96, 48), augment="none", epochs=5)
RECIPES = {     # (kind of data, whether CLIP itself learns): what differs from PE_RSITR
    ("retrieval", False): {},       # the first paper's own
    ("retrieval", True): dict(lr=1e-5),         # ours, as are the toy recipes
    ("people", False): PEOPLE,      # stage 1, our choice: the second paper's text was not at hand
    ("people", True): PEOPLE | dict(loss="sdm+id", epochs=60, lr=1e-5, warmup=5.0),     # IRRA's, for stage 2
    ("toy-retrieval", False): TOY | dict(loss="hmmc-softmax", lr=5e-3),
    ("toy-retrieval", True): TOY | dict(loss="contrastive", lr=5e-4),
    ("toy-people", False): TOY_PEOPLE | dict(loss="contrastive", lr=3e-3),  # SDM collapses here
    ("toy-people", True): TOY_PEOPLE | dict(loss="sdm+id", lr=3e-4)}


def recipe(args):
    """Values for the flags that were left out, from the data set, the model and what learns."""
    if args.model in FROM_SCRATCH:
        return PE_RSITR | SCRATCH
    kind = "people" if args.dataset in ("toy-people", *data.REID_SETS) else "retrieval"
    if args.dataset.startswith("toy-"):
        kind = f"toy-{kind}"
    clip_learns = args.train in ("backbone", "all") or args.method == "none"
    values = PE_RSITR | RECIPES[kind, clip_learns]
    if args.method == "none" or (args.train == "backbone" and not args.init):
        # without --init a method would be fixed at random; with --method, `parse` refuses
        values |= dict(method="none", train="backbone")
    return values


def make_parser():
    """Every flag. One that was not given is None; `recipe` fills most of them, and the run prints those."""
    parser = argparse.ArgumentParser(description=__doc__, usage="python train.py [--flag value] ...",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"train.py: error: {message}\n")
    flag = parser.add_argument
    flag("--dataset", choices=data.DATASETS, help="(default: toy-aerial)")
    flag("--data-root", type=os.path.abspath, help="its folder; the toy worlds are drawn there")
    flag("--epoch-over", choices=("captions", "images"), help="images: each once, with one of its captions")
    flag("--augment", choices=data.AUGMENTATIONS, help="for photos, for the ground from above, for people")
    flag("--skip-bad", action="store_true", default=None, help="go on without the images that cannot be read")
    flag("--model", help="published name, weight file or folder, run; tiny, small: from scratch")
    flag("--init", type=os.path.abspath, metavar="RUN", help="go on from a run's model and method: stage 2")
    flag("--image-size", type=int, nargs="+", metavar="PX", help="pixels, or height and width")
    flag("--activation", choices=("quick_gelu", "gelu"), help="of plain CLIP; by default what its files tell")
    flag("--method", choices=tuple(adapters.METHODS), help="what is added to CLIP")
    flag("--train", choices=("method", "backbone", "all"), help="what learns: the method, CLIP, or both")
    flag("--bottleneck", type=int, help="inner width of adapters; 16-128, more for larger data")
    flag("--dropout", type=float, help="inside the adapter; 0-0.5, less for short runs")
    flag("--prompt-length", type=int, help="prompt tokens; 2-50")
    flag("--prompt-depth", type=int, help="blocks with prompts, from the first")
    flag("--rank", type=int, help="rank of LoRA; 2-16")
    flag("--shared", action="store_true", default=None, help="one adapter for all blocks")
    flag("--per-block", action="store_false", default=None, dest="shared", help="one for each depth")
    flag("--loss", choices=("hmmc", "hmmc-softmax", "contrastive", "sdm", "sdm+id"), help="sdm: with ids")
    flag("--margin", type=float, help="of hmmc; 0.05-0.3, lower if the loss stays up")
    flag("--mask-same", action="store_true", default=None, help="equal image, caption, person: no negative")
    flag("--epochs", type=int, help="passes over the data; 10-30")
    flag("--batch-size", type=int, help="pairs, over all processes; softmax losses gain up to 512 and more")
    flag("--lr", type=float, help="adapters 1e-4 to 1e-2, CLIP 1e-6 to 1e-5; a third if the loss jumps")
    flag("--schedule", choices=("step", "cosine"), help="step: x 0.7 after 19 epochs; cosine: to 0")
    flag("--warmup", type=float, help="epochs of linear warm-up; 1 for training from scratch")
    flag("--weight-decay", type=float, help="decoupled, on matrices only; 0.1 from scratch")
    flag("--grad-checkpointing", action="store_true", default=None, help="less memory, one more forward")
    flag("--out", help="folder of the run; by default a new one under runs/")
    flag("--resume", action="store_true", default=None, help="go on with the run in --out")
    flag("--seed", type=int, help="of everything random (default: 0)")
    flag("--precision", choices=("bf16", "fp32"), help="by default bf16 where it is fast")
    flag("--device", choices=eval.DEVICES, help="by default cuda if there is one, else cpu")
    return parser


FROM_INIT = ("model", "image_size", "activation", "method", *adapters.METHOD_SIZES)     # what --init brings
MAY_CHANGE = ("resume", "out", "init", "model", "data_root", "skip_bad", "device", "precision",
              "grad_checkpointing")     # need not be as in the earlier run


def parse(argv):
    """Settings from the command line: the flags given, the rest from an earlier run or from the recipe."""
    args = make_parser().parse_args(argv)
    if args.image_size:
        if len(args.image_size) > 2 or min(args.image_size) < 1:
            raise ValueError(f"--image-size {args.image_size}: give pixels, or height and width")
        args.image_size = args.image_size[0] if len(args.image_size) == 1 else tuple(args.image_size)
    if args.model and args.model not in clip.SIZES and os.path.exists(args.model):
        args.model = os.path.abspath(args.model)        # a run may be used from another folder later
    given = {name: value for name, value in vars(args).items() if value is not None}
    earlier = {}                                        # settings that an earlier run brings
    if args.resume:
        last = Path(args.out or "") / "last.pt"
        if not args.out or not last.exists():
            raise ValueError(f"there is no {last} to resume: --out is the folder of the run")
        earlier = clip.read_file(last)["settings"] | {"device": None}       # it may go on on another machine
    elif args.init:
        settings = clip.read_file(args.init).get("settings")
        if settings is None:
            raise ValueError(f"--init {args.init} is no run; weights go to --model")
        earlier = {name: settings.get(name) for name in FROM_INIT}
        if args.dataset is None:                        # the data of that run; `recipe` needs args.dataset
            args.dataset, earlier["data_root"] = settings["dataset"], settings["data_root"]
        if settings["train"] != "method":
            earlier["model"] = args.init                # its CLIP has learned: it is the run's own
        if args.model in FROM_SCRATCH:
            raise ValueError(f"--model {args.model}: with --init, --model is the place of that run's CLIP")
    for name, value in given.items():
        if name in earlier and name not in MAY_CHANGE and value != earlier[name]:
            raise ValueError(f"--{name.replace('_', '-')}: the earlier run has {earlier[name]}, which stays; "
                             "leave the flag out")
    if args.data_root and not (args.dataset or args.resume):
        raise ValueError(f"--data-root {args.data_root} without --dataset: which kind of data is it?")
    args.dataset = args.dataset or "toy-aerial"
    vars(args).update(recipe(args) | earlier | given)   # the last one decides
    if args.resume:
        return args                                     # checked when it began
    limits = dict(epochs=1, batch_size=2 * PROCESSES, lr=1e-12, margin=1e-6, warmup=0, weight_decay=0, seed=0)
    for name, least in limits.items():
        if not least <= getattr(args, name) < 2 ** 31:      # so written, it refuses NaN too
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: {least} or more is needed, "
                             "below 2 ** 31")
    if args.train == "method" and (args.method == "none" or args.model in FROM_SCRATCH):
        raise ValueError(f"--train method with --model {args.model} --method {args.method}: give a method "
                         "and a trained CLIP, as in --model RUN --method mrs; --train backbone trains CLIP")
    if args.train == "backbone" and args.method != "none" and not args.init:
        raise ValueError(f"--train backbone would fix {args.method} as it starts, at random: give --init RUN "
                         "in which it learned (stage 2), or --train all to train both at once")
    if args.mask_same and args.loss.startswith("sdm"):
        raise ValueError(f"--mask-same changes nothing in --loss {args.loss}, which knows the persons")
    if args.out is None:
        stem = f"runs/{args.dataset}-{args.method if args.train == 'method' else args.train}"
        args.out, number = stem, 1
        while Path(args.out).exists():
            number += 1
            args.out = f"{stem}-{number}"
    if (Path(args.out) / "last.pt").exists():
        raise ValueError(f"{args.out} already holds a run: add --resume to go on, or give another --out")
    return args


# ------------------------------------------------------------------------------------ 2. what the loop calls

def encode(tower, inputs, views):
    """Features of a batch, not normalised, a tensor (B, D) for each view, in one forward. HMMC's second view
    (PE-RSITR) is the same tokens with element-wise dropout on what `embed` gives before the first block."""
    x = tower.embed(inputs)                                                             # (B, L, C)
    if views == 2:
        x = torch.cat([x, F.dropout(x, VIEW_DROPOUT)])                                  # (2B, L, C)
    x = tower.transformer(x)
    # pool finds EOT in the inputs, (B, L), so it takes one view at a time
    return [tower.head(tower.pool(view, inputs)).float() for view in x.chunk(views)]    # views x (B, D)


def compute_loss(args, image, text, scale, same, person, classifier):
    """Loss of the whole batch and its parts; image and text: a tensor (B, D) for each view."""
    if args.loss == "hmmc":
        return losses.hmmc_loss(image[0], text[0], image[1], text[1], args.margin, same)
    if args.loss == "hmmc-softmax":
        return losses.hmmc_softmax_loss(image[0], text[0], image[1], text[1], scale, same)
    if args.loss == "contrastive":
        return losses.contrastive_loss(image[0], text[0], scale, same), {}
    # differs from IRRA: its scale of 50, but CLIP's own where that is lower, after brief training
    parts = {"sdm": losses.sdm_loss(image[0], text[0], person, scale.detach().clamp(max=SDM_SCALE))}
    if args.loss == "sdm+id":
        parts["id"] = losses.id_loss(image[0], text[0], person, classifier)
    return losses.summed(parts)


def choose_what_learns(model, train, loss):
    """Set requires_grad. train "method": the method's parameters; "backbone": all but them; "all": every one.
    logit_scale learns only with CLIP, under a loss that uses it: SDM's scale is fixed, HMMC has none."""
    for name, parameter in model.named_parameters():
        of_method = name in model.method_parameters
        learns = {"method": of_method, "backbone": not of_method, "all": True}[train]
        if name == "logit_scale" and loss not in ("contrastive", "hmmc-softmax"):
            learns = False
        parameter.requires_grad_(learns)


def make_optimizer(learned, args):
    """AdamW over {name: parameter}; without weight decay it is PE-RSITR's Adam. Where CLIP learns with SDM
    (IRRA's recipe), biases have twice the rate and the new classifier five times."""
    groups = {}
    for name, parameter in learned.items():
        # differs from IRRA: decoupled decay, and none on the weights of LayerNorms
        decay = args.weight_decay if parameter.ndim >= 2 else 0.0
        factor = 1
        if args.loss.startswith("sdm") and args.train != "method":
            if name.startswith("classifier"):
                factor = 5
            elif name.endswith("bias"):
                factor = 2
        group = groups.setdefault((decay, factor), dict(params=[], weight_decay=decay, factor=factor))
        group["params"].append(parameter)
    return torch.optim.AdamW(groups.values(), lr=args.lr)


def learning_rate(args, step, steps_per_epoch):
    """Learning rate of one step: linear warm-up, then the schedule."""
    total = args.epochs * steps_per_epoch
    warmup = min(args.warmup * steps_per_epoch, total)
    if step < warmup:       # differs from IRRA: step by step from 0, there epoch by epoch from a tenth
        return args.lr * min((step + 1) / warmup, 1)
    if args.schedule == "step":     # PE-RSITR's, once
        return 0.7 * args.lr if step >= 19 * steps_per_epoch else args.lr
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def fast_bf16(device):
    """Whether bf16 products are in hardware; on a CPU it is measured, as no public call of torch tells it."""
    if device != "cpu":
        return device.startswith("cuda") and torch.cuda.get_device_capability(device)[0] >= 8
    seconds = []
    for x in (torch.ones(512, 512), torch.ones(512, 512).bfloat16()):
        seconds.append(min(timeit.repeat(lambda: x @ x, number=1, repeat=5)))
    return seconds[1] < 0.7 * seconds[0]


def hold_frozen_in_bf16(model):
    """Cast CLIP's frozen matrices once, not by autocast at every step; the result is the same.
    Embeddings, which autocast leaves alone, and the method's own, which are saved, stay in float32."""
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and "embedding" not in name
        if matrix and not parameter.requires_grad and name not in model.method_parameters:
            parameter.data = parameter.data.bfloat16()


def save(path, content):
    """Write a checkpoint under another name first, so that a killed run never leaves half a file."""
    partial = path.with_suffix(".partial")
    try:
        torch.save(content, partial)
    except RuntimeError as error:                   # torch's error when the disk is full
        raise OSError(f"cannot write {path}: {error}; make room and go on with --resume") from None
    os.replace(partial, path)


def start_processes(device):
    """Join the processes that torchrun started, each on its own GPU; process 0 is the one that speaks."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")


def gather(x):
    """The rows of this process (B / PROCESSES, ...) -> those of all (B, ...).

    Each process computes the same loss, that of the whole batch, and backward adds up the gradients of a row
    from all of them: PROCESSES times the right one. In the loop a parameter takes the mean over the processes
    of its gradients, not their sum: that takes the factor out. Temperature and classifier have equal ones.
    """
    return torch.cat(all_gather(x))


# ------------------------------------------------------------------------------------------------ 3. the run

def load_start(args):
    """What a run starts from: --model, or the run in --init, whose CLIP lies at --model."""
    clip_file = args.model if args.init else None
    return eval.load_run(args.init or args.model, args.device, args.image_size, args.activation, clip_file)


def build(args, captions):
    """The model with its method, its tokenizer, and the fingerprint of the CLIP it starts from.
    Sets in args what only the model tells: image_size and activation."""
    start = {}                                              # settings of what it starts from
    if args.model in FROM_SCRATCH:
        tokenizer = clip.Tokenizer.train(captions, FROM_SCRATCH[args.model])
        config = dataclasses.replace(clip.SIZES[args.model], vocab_size=tokenizer.vocab_size)
        config.activation = args.activation or config.activation
        config.image_size = args.image_size or config.image_size
        model = clip.CLIP(config).to(args.device)
    else:
        model, tokenizer, start = load_start(args)
    if not args.init:
        method = start.get("method", "none")
        if method != "none":
            raise ValueError(f"--model {args.model} is a run with {method}: take --init for it")
        sizes = {size: getattr(args, size) for size in adapters.METHOD_SIZES}
        adapters.add_method(model, args.method, **sizes)
    for module in model.modules():
        if isinstance(module, clip.Transformer):
            module.grad_checkpointing = args.grad_checkpointing
    args.image_size, args.activation = model.config.image_size, model.config.activation
    return model, tokenizer, start.get("fingerprint")


def train(args):
    """One run, from its settings to its test: leaves the run's folder, returns the rows of its table."""
    # processes, device, seed
    args.device = args.device or ("cuda" if "cuda" in eval.DEVICES else "cpu")
    if PROCESSES > 1 and not dist.is_initialized():
        start_processes(args.device)
    args.precision = args.precision or ("bf16" if fast_bf16(args.device) else "fp32")
    if args.device == "mps" and args.precision == "bf16":
        raise ValueError("--precision bf16 does not work on mps: give --precision fp32")
    if args.model == "toy":
        args.model = make_toy_clip(args)
    began, out = time.time(), Path(args.out)
    torch.manual_seed(args.seed * 2 ** 32)                              # for what a method begins with

    # data and model; process 0 goes first, so that it alone downloads, draws and fills the image cache
    if RANK > 0:
        dist.barrier()
    pairs, notes = data.read_splits(args.dataset, args.data_root)       # {"train": Pairs, "val": ...}
    if args.loss.startswith("sdm") and pairs["train"].ids is None:
        raise ValueError(f"--loss {args.loss} needs person ids, and {args.dataset} has none")
    # two hashes: of CLIP without a method, for best.pt; and with what --init brings, for --resume
    model, tokenizer, clip_hash = build(args, pairs["train"].captions)
    start_hash = eval.fingerprint(model) if args.init else clip_hash
    pairs, images, load_notes = data.load(pairs, args.image_size, out.parent / "cache", args.skip_bad)
    notes += load_notes
    if RANK == 0 and PROCESSES > 1:
        dist.barrier()
    for split, part in pairs.items():
        notes += eval.caption_notes(tokenizer, part.captions, model.config.context_length, split)
    tokens = tokenizer(pairs["train"].captions, model.config.context_length)    # (captions, L)
    plan = data.batches(pairs["train"], args.epoch_over, args.batch_size, args.epochs, args.seed, PROCESSES)
    if not plan:
        raise ValueError(f"{len(tokens)} captions of {len(images['train'])} images are too few to train on: "
                         f"a batch needs two pairs, and one for each of the {PROCESSES} processes")
    _, text_ids = tokens.unique(dim=0, return_inverse=True)             # equal captions share a number
    owner_ids = torch.tensor(pairs["train"].image_of_caption)           # captions of one image share a number
    if pairs["train"].ids:
        owner_ids = torch.tensor(pairs["train"].ids)[owner_ids]         # captions of one person
    counts = ", ".join(f"{len(part.images)} {split}" for split, part in pairs.items())
    tqdm.write(f"data    {args.dataset}: {counts} images, {len(tokens)} train captions")

    # what learns
    choose_what_learns(model, args.train, args.loss)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    args.trained_parameters = sum(p.numel() for p in learned.values())
    args.total_parameters = sum(p.numel() for p in model.parameters())
    classifier = None
    if args.loss == "sdm+id":       # learns too, is no part of the model, and is left behind after training
        width = eval.encode_texts(model, tokens[:1]).shape[1]       # a method's head may change it
        classifier = nn.Linear(width, int(owner_ids.max()) + 1, device=args.device)
        nn.init.normal_(classifier.weight, std=0.001)
        nn.init.zeros_(classifier.bias)
        learned |= {f"classifier.{name}": p for name, p in classifier.named_parameters()}
    if args.precision == "bf16":
        hold_frozen_in_bf16(model)
    optimizer = make_optimizer(learned, args)
    tqdm.write(f"model   {args.trained_parameters:,} of {args.total_parameters:,} parameters learn; "
               f"{args.activation}, {args.image_size} px, {args.precision} on {args.device} x {PROCESSES}")

    # where to begin: at step 0, or at the last checkpoint
    steps = len(plan) // args.epochs                                        # of one epoch
    step, history, sums = 0, [], {}
    captions = repr((pairs["train"].captions, owner_ids.tolist()))
    origin = dict(steps=steps, weights=start_hash, captions=hashlib.sha256(captions.encode()).hexdigest())
    if args.resume:
        last = clip.read_file(out / "last.pt")
        if last.get("origin") != origin:
            raise ValueError(f"{out}/last.pt does not fit: the data or weights it began with have changed")
        for name, value in last["learned"].items():
            learned[name].data.copy_(value)
        optimizer.load_state_dict(last["optimizer"])
        step, history, sums = last["step"], last["history"], last["sums"]
        began -= last["seconds"]
        tqdm.write(f"resume  after {step / steps:.1f} of {args.epochs} epochs, step {step}")
    out.mkdir(parents=True, exist_ok=True)
    settings = ", ".join(f"{name} {getattr(args, name)}" for name in PE_RSITR)
    tqdm.write(f"run     {out}: {settings}; {steps} steps an epoch")
    if args.model in FROM_SCRATCH and len(plan) < 500:
        notes.append(f"{len(plan)} steps from scratch teach little, 500 or more are needed")
    for note in notes:
        tqdm.write(f"note    {note}")

    # the loop
    views = 2 if args.loss.startswith("hmmc") else 1
    saved_at = time.time()
    image_of_caption = np.asarray(pairs["train"].image_of_caption)
    model.train()
    quiet = True if RANK > 0 else None          # None: shown on a terminal only
    for batch in tqdm(plan[step:], "step", len(plan), initial=step, leave=False, disable=quiet):
        torch.manual_seed(args.seed * 2 ** 32 + RANK * 2 ** 24 + step)
        lr = learning_rate(args, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        mine = np.split(batch, PROCESSES)[RANK]         # (B,) numbers of captions, those of this process
        pixels = torch.from_numpy(images["train"][image_of_caption[mine]]).to(args.device)
        pixels = clip.normalize(data.augment(pixels.float(), args.augment))                   # (B, 3, H, W)
        texts = tokens[mine].to(args.device)                                                  # (B, L)
        with eval.autocast(args.device, args.precision):
            image = encode(model.visual, pixels, views)                                       # views x (B, D)
            text = encode(model.text, texts, views)
        if PROCESSES > 1:
            image, text = [gather(view) for view in image], [gather(view) for view in text]
        owner, text_id = owner_ids[batch].to(args.device), text_ids[batch].to(args.device)    # (B,), of all
        same = None
        if args.mask_same:
            same = (owner[:, None] == owner) | (text_id[:, None] == text_id)                  # (B, B)
        loss, parts = compute_loss(args, image, text, model.logit_scale.exp(), same, owner, classifier)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [p.grad for p in learned.values() if p.grad is not None]    # None: not used by the loss
        if PROCESSES > 1:
            for gradient in gradients:              # the mean over the processes
                dist.all_reduce(gradient)
                gradient /= PROCESSES
        norms = torch.stack([gradient.norm() for gradient in gradients])
        if not (loss.isfinite() and norms.isfinite().all()):
            raise ValueError(f"loss {loss.item()}, or its gradient, is not finite at step {step}; in a new "
                             f"run try --lr {args.lr / 3:.1g}, or --precision fp32")
        optimizer.step()
        if model.logit_scale.requires_grad:                     # as CLIP: the scale is at most 100
            model.logit_scale.data.clamp_(max=math.log(100))
        for name, value in {"loss": loss, **parts}.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        step += 1

        if step % steps == 0:
            epoch = step // steps
            row = dict(epoch=epoch, step=step, lr=lr) | {name: total / steps for name, total in sums.items()}
            sums, shown = {}, ["loss", *parts]
            best = True                                 # without val the last epoch is taken
            if "val" in pairs:
                metrics = eval.evaluate(model, tokenizer, pairs["val"], images["val"], args.precision)
                model.train()
                row |= {f"val_{name}": value for name, value in metrics.items()}
                score = f"val_{eval.headline(metrics)}"
                best = all(row[score] > earlier[score] for earlier in history)
                shown.append(score)
            history.append(row)
            if RANK == 0 and best:
                # trained: the method's tensors, also in stage 2, where they are fixed
                content = dict(settings=vars(args), trained=adapters.trainable_state(model), epoch=epoch,
                               merges=tokenizer.merges, fingerprint=clip_hash)
                if args.train != "method":          # CLIP's own weights only if they learned
                    content["state_dict"] = model.openai_state_dict()
                save(out / "best.pt", content)
            terms = "  ".join(f"{name} {row[name]:.3f}" for name in shown)
            tqdm.write(f"epoch {epoch:3d}/{args.epochs}  lr {lr:.1e}  {terms}{'*' if best else ' '}  "
                       f"{tqdm.format_interval(time.time() - began)}")
            equal = 6 * args.margin * sum(len(numbers) for numbers in plan) / len(plan)     # of a mean batch
            if epoch == 1 and args.loss == "hmmc" and abs(row["loss"] / equal - 1) < 0.02:
                tqdm.write(f"note    {equal:.1f} is the loss when all similarities are equal; if it stays "
                           "there, lower --margin or take --loss hmmc-softmax")
        if RANK == 0 and (step % steps == 0 or time.time() - saved_at > CHECKPOINT_SECONDS):
            saved_at = time.time()
            save(out / "last.pt", dict(
                settings=vars(args), learned={name: p.detach() for name, p in learned.items()}, origin=origin,
                optimizer=optimizer.state_dict(), step=step, history=history, sums=sums,
                seconds=saved_at - began))

    # the test
    return test(args, pairs, images, history, time.time() - began) if RANK == 0 else []


def test(args, pairs, images, history, seconds):
    """The test split, once training is over: chance, what the run started from, best.pt -> rows of its table.
    seconds: what training took."""
    split = "test" if "test" in pairs else "val"
    its_pairs, its_images = pairs[split], images[split]
    rows = [("chance", None, None, eval.chance(its_pairs))]
    if args.model not in FROM_SCRATCH:
        model, tokenizer, settings = load_start(args)
        row = eval.row_of(model, tokenizer, settings, its_pairs, its_images, args.precision)
        label, trained, share, metrics = row
        if args.init or settings.get("dataset") == args.dataset:        # it has learned on this data
            label = f"before: {label}"
        else:
            label, trained, share = "zero-shot", 0, 0.0
        rows.append((label, trained, share, metrics))
    clip_file = args.model if args.train == "method" else None      # it may have moved since best.pt
    model, tokenizer, settings = eval.load_run(args.out, args.device, clip_file=clip_file)
    rows.append(eval.row_of(model, tokenizer, settings, its_pairs, its_images, args.precision))
    tqdm.write(f"\n{args.dataset} {split}, {len(its_pairs.images)} images, epoch {settings['epoch']}, "
               f"{tqdm.format_interval(seconds)}\n{eval.table(rows)}\n\n"
               f"curve: {args.out}/curve.png; next: python eval.py {args.out} --split {split}")
    eval.plot_curve(history, Path(args.out) / "curve.png")
    content = dict(settings=vars(args), split=split, minutes=seconds / 60, rows=rows, history=history)
    (Path(args.out) / "metrics.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return rows


# ----------------------------------------------------------------------------------- 4. without any data

def make_toy_clip(args):
    """The toy worlds' stand-in for OpenAI's CLIP: `tiny`, trained on another drawn world -> its folder."""
    out, flags = "runs/toy-clip", ["--dataset", "toy-ground", "--epochs", "2"]
    if args.dataset == "toy-people":
        out = "runs/toy-people-clip"
        flags = ["--dataset", "toy-portraits", "--epochs", "3", "--image-size", "96", "48"]
    flags += ["--model", "tiny", "--epoch-over", "captions", "--batch-size", "64"]
    if (Path(out) / "last.pt").exists():
        flags = ["--resume"]
    if not (Path(out) / "metrics.json").exists():
        tqdm.write(f"pre-training a tiny CLIP on drawn images, once: {out}")
        train(parse([*flags, "--out", out, "--device", args.device]))
    return os.path.abspath(out)


def tour():
    """`python train.py` alone: the paper's argument in miniature. The first run makes the toy CLIP."""
    rows = train(parse(["--method", "mrs", "--bottleneck", "128", "--dropout", "0.1"]))
    rows += train(parse(["--train", "backbone"]))[-1:]
    if RANK == 0:
        print("\nthe two runs together, on a test set that no step touched:\n" + eval.table(rows))
        zero_shot, mrs, full = [metrics["mR"] for _, _, _, metrics in rows[1:]]
        print(f"\nthe adapter closes {100 * (mrs - zero_shot) / (full - zero_shot):.0f} % of the gap between "
              f"zero-shot and full fine-tuning with {rows[2][2]:.2f} % of the parameters")


def main(argv):
    """The tour without flags, else one run. A mistake ends in one line and exit code 2, Ctrl-C in 130."""
    try:
        if argv:
            train(parse(argv))
        else:
            tour()
    except (ValueError, OSError, torch.cuda.OutOfMemoryError) as error:
        print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; --resume --out RUN goes on from last.pt, if the run has one yet", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
