"""Training: a data set x a CLIP x a method x what learns x a loss, in one plain loop.

    python train.py                 no data, no network: draws two worlds, pre-trains a tiny CLIP on the one and moves
                                    it to the other, by an MRS-Adapter and by full fine-tuning; about three minutes
    python train.py --dataset ucm --data-root ucm_precomp                           the first paper: MRS + HMMC
    python train.py --dataset ucm --data-root ucm_precomp --method none --train backbone --loss contrastive
    python train.py --dataset CUHK-PEDES --data-root CUHK-PEDES --out runs/stage1   the second paper, stage 1
    python train.py --dataset CUHK-PEDES --data-root CUHK-PEDES --init runs/stage1 --train backbone     and stage 2
    torchrun --nproc-per-node 8 train.py ...                                        on eight GPUs

A run is a folder: best.pt (best on validation), last.pt (to resume), log.csv, metrics.json, curve.png, log.txt.
Every random number of a step is drawn from (seed, step, process), so that a resumed run ends as the unbroken one.
"""
import argparse
import ctypes
import dataclasses
import datetime
import json
import math
import os
import resource
import shlex
import signal
import sys
import time
import timeit
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import adapters
import clip
import data
import eval
import losses

FROM_SCRATCH = {"tiny": 1000, "small": 3000}    # sizes without weights to load: BPE merges learned from the captions
SDM_SCALE = 50.0                                # 1 / temperature of SDM, at most: IRRA's
SAVE_EVERY = 600                                # seconds between two last.pt within an epoch

# recipes: what flags default to where PE-RSITR's recipe, the defaults in FLAGS, does not apply. They are ours; only
# stage 2 of prompt decoupling, REID_TUNED, is the field's (IRRA). Its stage 1, REID, is a [choice]: the paper's could
# not be read
TOY = dict(model="toy", loss="hmmc-softmax", epochs=15, batch_size=64, lr=5e-3, schedule="cosine", warmup=1.0,
           epoch_over="images")
TOY_SIZES = dict(bottleneck=128, dropout=0.1)   # few steps and few pictures: wide, and little dropout
SCRATCH = dict(epochs=20, batch_size=128, lr=1e-3, schedule="cosine", warmup=1.0, epoch_over="images",
               weight_decay=0.1)
REID = dict(model="ViT-B/16", image_size=(384, 128), method="prompts", loss="sdm", augment="people", epochs=10,
            batch_size=64, lr=3e-4, schedule="cosine", warmup=1.0, epoch_over="captions", weight_decay=4e-5)
REID_TUNED = dict(loss="sdm+id", epochs=60, lr=1e-5, warmup=5.0)            # --train backbone or all
TOY_PEOPLE = dict(model="toy", image_size=(96, 48), augment="none", epochs=5, lr=3e-3)
TOY_PEOPLE_TUNED = dict(loss="sdm+id", epochs=5, lr=3e-4, warmup=1.0)


# ---------------------------------------------------------------------------------------------- 1. settings

FLAGS = {     # group: its flags and what argparse is to know of them; `recipe` replaces the defaults
    "data": dict(
        dataset=dict(default="toy-aerial", choices=data.DATASETS, help="what to train on"),
        data_root=dict(metavar="DIR", help="folder of the data set; the toy worlds draw theirs"),
        epoch_over=dict(default="captions", choices=("captions", "images"),
                        help="an epoch is every caption once, or every picture once with one of its captions"),
        augment=dict(default="none", choices=("none", "crop", "aerial", "people"),
                     help="crop: 60-100 %% of the area; aerial: also quarter turns and mirrors; people: mirror, "
                          "shift, erase"),
        skip_bad=dict(action="store_true", help="go on without the pictures that cannot be read")),
    "model": dict(
        model=dict(default="ViT-B/32", help="published name, weight file, run folder; tiny or small: from scratch; "
                                            "toy: tiny, pre-trained on another drawn world"),
        init=dict(metavar="RUN", help="start from the model, method and weights of this run: stage 2"),
        image_size=dict(type=int, nargs="+", metavar="PX",
                        help="pixels, or height and width; other than the model's, its positional grid is resized"),
        activation=dict(choices=("quick_gelu", "gelu"), help="for checkpoints that do not say; OpenAI: quick_gelu")),
    "method": dict(
        method=dict(default="mrs", choices=tuple(adapters.METHODS), help="what is added to CLIP"),
        train=dict(default="method", choices=("method", "backbone", "all"),
                   help="what learns: the added method, CLIP itself, or both"),
        bottleneck=dict(type=int, help="inner width of adapters; 16-128, more for larger data"),
        dropout=dict(type=float, help="inside the adapter; 0-0.5, less for short runs"),
        prompt_length=dict(type=int, help="prompt tokens; 2-50"),
        prompt_depth=dict(type=int, help="blocks with prompts, from the first"),
        rank=dict(type=int, help="rank of LoRA; 2-16"),
        shared=dict(action="store_true", default=None, help="one adapter for all blocks, where that is not so"),
        per_block=dict(action="store_false", default=None, dest="shared", help="one adapter for each block")),
    "loss": dict(
        loss=dict(default="hmmc", choices=("hmmc", "hmmc-softmax", "contrastive", "sdm", "sdm+id"),
                  help="hmmc: the paper's hinge on the hardest negatives; hmmc-softmax: its terms as softmax losses; "
                       "sdm, sdm+id: for data with person ids"),
        margin=dict(type=float, default=0.2, help="of hmmc, cosine units; 0.05-0.3, lower if the loss stays up"),
        mask_same=dict(action="store_true",
                       help="pairs that share a picture, a caption or a person are no negatives")),
    "optimisation": dict(
        epochs=dict(type=int, default=30, help="passes over the data; 10-30"),
        batch_size=dict(type=int, default=16, help="pairs, over all processes; contrastive losses gain up to 512 "
                                                   "and more"),
        chunk=dict(type=int, metavar="PAIRS", help="run a batch through in pieces of this size: same gradient, less "
                                                   "memory, one forward more"),
        lr=dict(type=float, default=2e-4, help="Adam's; adapters 1e-4 to 1e-2, CLIP itself 1e-6 to 1e-5; "
                                               "a third of it when the loss jumps or turns NaN"),
        schedule=dict(default="step", choices=("step", "cosine"), help="step: x 0.7 after 19 epochs; cosine: to 0"),
        warmup=dict(type=float, default=0.0, help="epochs of linear warm-up; 1 for training from scratch"),
        weight_decay=dict(type=float, default=0.0, help="decoupled, on matrices only; 0.1 from scratch")),
    "run": dict(
        out=dict(metavar="DIR", help="folder of the run; by default a new one under runs/"),
        resume=dict(action="store_true", help="go on with the run in --out; its settings need not be repeated"),
        seed=dict(type=int, default=0, help="of everything random"),
        precision=dict(default="auto", choices=("auto", "bf16", "fp32"), help="auto: bf16 where it is fast"),
        device=dict(default="cuda" if "cuda" in eval.DEVICES else "cpu", choices=eval.DEVICES,
                    help="what torch sees here"))}


def make_parser():
    """Every flag of FLAGS, its default behind its help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python train.py [--flag value] ...; --help explains every flag")
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, options in flags.items():
            default = " (default: %(default)s)" if options.get("default") is not None else ""
            group.add_argument("--" + name.replace("_", "-"), **{**options, "help": options["help"] + default})
    return parser


def recipe(first):
    """Defaults that follow from the data set, the model and what learns; those of FLAGS are PE-RSITR's."""
    tuned = first.train != "method"         # CLIP itself learns
    if first.dataset in data.REID_SETS:
        return REID | (REID_TUNED if tuned else {})
    if first.dataset == "toy-people":
        return REID | TOY_PEOPLE | (TOY_PEOPLE_TUNED if tuned else {})
    if first.model in FROM_SCRATCH:
        return SCRATCH
    if first.dataset.startswith("toy-"):
        sizes = {name: value for name, value in TOY_SIZES.items() if name in adapters.METHODS[first.method][1]}
        return TOY | sizes | (dict(lr=5e-4) if tuned else {})
    return dict(lr=1e-5) if tuned else {}


SIZES = ("bottleneck", "dropout", "prompt_length", "prompt_depth", "rank", "shared")    # of a method
INHERITED = ("model", "method", "image_size", "activation", *SIZES)                     # what --init brings with it


def inherited(first):
    """Settings that another run brings: with --resume all of the run's own, with --init those of its model."""
    if first.resume and first.out and (last := Path(first.out) / "last.pt").is_file():
        settings = eval.load_checkpoint(last)["settings"]
        device = settings["device"] if settings["device"] in eval.DEVICES else first.device
        return settings | {"out": first.out, "resume": True, "device": device}
    if not first.init:
        return {}
    saved = eval.load_checkpoint(first.init)
    clip_of = {"model": first.init} if "state_dict" in saved else {}      # its CLIP is not the one it started from
    return {name: saved["settings"][name] for name in INHERITED} | clip_of


def parse(argv):
    """Settings from the command line; the defaults are the recipe's, or those of the run in --init or of --resume."""
    parser = make_parser()
    # a first pass, as the defaults depend on other flags, also those that --help shows
    first = parser.parse_known_args([flag for flag in argv if flag not in ("-h", "--help")])[0]
    defaults, start = {"warmup": 0.0} | recipe(first), inherited(first)
    if first.resume and first.out and "out" not in start and not any(flag.startswith("--dataset") for flag in argv):
        raise FileNotFoundError(f"{first.out}/last.pt is not there: repeat the flags that the run began with, at least "
                                "--dataset")
    defaults["warmup"] = min(defaults["warmup"], first.epochs)
    parser.set_defaults(**defaults | start)
    args = parser.parse_args(argv)
    if isinstance(args.image_size, list):
        if len(args.image_size) > 2 or min(args.image_size) < 1:
            raise ValueError(f"--image-size {args.image_size}: one number of pixels is needed or two, height and width")
        args.image_size = args.image_size[0] if len(args.image_size) == 1 else tuple(args.image_size)
    if args.precision == "auto":
        args.precision = start.get("precision", "auto")         # measured when that run began
    for name, value in start.items():
        if getattr(args, name) != value and name not in ("data_root", "device"):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: the run that this one goes on from "
                             f"has {value}; leave the flag out")
    check(args)
    args.sizes = {name: getattr(args, name) for name in SIZES}
    return args


def check(args):
    """Raise ValueError for settings that make no run, with what to do instead."""
    limits = dict(epochs=(1, 10 ** 6), batch_size=(1, 10 ** 6), chunk=(1, 10 ** 6), lr=(0, 1), warmup=(0, args.epochs),
                  weight_decay=(0, 10), margin=(0, 2), dropout=(0, 1), seed=(0, 2 ** 31 - 1))
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:      # true of NaN too
            raise ValueError(f"--{name.replace('_', '-')} {value}: {low} to {high}")
    if args.method == "none" and args.train == "method":
        raise ValueError("--method none leaves nothing to train: add --train backbone, or test plain CLIP with eval.py")
    if args.model in FROM_SCRATCH and args.train != "all":
        raise ValueError(f"--model {args.model} has no weights yet: it needs --train all, with --method none")
    if args.resume and not args.out:
        raise ValueError("--resume needs --out, the folder of the run to go on with")


# ---------------------------------------------------------------------------------------------- 2. model

def fast_bf16(device):
    """Whether bf16 products are in hardware: measured, as no public call of torch tells it on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device)[0] >= 8
    matrices = [torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    fp32, bf16 = (min(timeit.repeat(lambda: x @ x, number=1, repeat=5)) for x in matrices)
    return bf16 < 0.7 * fp32


def keep_freed_memory():
    """Let glibc keep what is freed for the next step: given back and faulted in anew, it costs a tenth of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:                 # not on macOS
        mallopt(-3, 2 ** 30)    # M_MMAP_THRESHOLD: blocks up to 1 GB come from the heap
        mallopt(-1, -1)         # M_TRIM_THRESHOLD: the heap is not trimmed


def build(args, captions=None):
    """CLIP and its tokenizer: loaded, or of a size to train from scratch with a vocabulary from the captions."""
    if args.model in FROM_SCRATCH:
        tokenizer = clip.Tokenizer.train(captions, FROM_SCRATCH[args.model])
        size = clip.SIZES[args.model]
        config = dataclasses.replace(size, vocab_size=tokenizer.vocab_size, activation=args.activation or "quick_gelu",
                                     image_size=args.image_size or size.image_size)
        return clip.CLIP(config).to(args.device), tokenizer
    model = clip.load_clip(args.model, args.image_size, args.device, args.activation)
    return model, clip.Tokenizer(args.model)


def choose_trained(model, train):
    """Set requires_grad: what add_method left ("method"), CLIP without what was added ("backbone"), everything."""
    if train != "method":
        added = set(adapters.trainable_state(model)) if train == "backbone" else set()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in added)


def freeze_in_bf16(model):
    """Hold the frozen matrices as autocast would cast them at every step. The results are the same to the bit."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, clip.Attention)):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()


def encode_views(tower, inputs, views, dropout):
    """Features of a batch in one forward, for HMMC of two views: (B, ...) -> views x (B, D), not normalised.

    The second view (PE-RSITR) is the same tokens with element-wise dropout between the embedding and the first block.
    """
    x = tower.embed(inputs)
    if views == 2:
        x = torch.cat([x, F.dropout(x, dropout)])

    def pick(x):
        return torch.cat([tower.pick(view, inputs) for view in x.chunk(views)])
    x = tower.transformer(x, keep=pick)                                       # (views B, 1, C)
    return tower.head(tower.project(x)).chunk(views)


def encode(model, args, images, tokens, dropout=0.2):
    """What a loss is computed from: features (B, D) of pictures and captions, for HMMC also of their second views."""
    views = 2 if args.loss.startswith("hmmc") else 1
    order = tokens.count_nonzero(dim=1).argsort(stable=True)
    with eval.autocast(model, args.precision):
        image = encode_views(model.visual, images, views, dropout)
        # the shorter captions and the longer ones, each padded to their own longest only
        halves = [encode_views(model.text, tokens[rows], views, dropout) for rows in order.chunk(2)]
    text = [torch.cat(view)[order.argsort()] for view in zip(*halves)]
    return [features.float() for pair in zip(image, text) for features in pair]


def compute_loss(args, features, scale, same=None, persons=None, classifier=None):
    """Loss of the whole batch and its parts, from what `encode` gives. persons: ids (B,) for SDM and ID."""
    if args.loss == "hmmc":
        return losses.hmmc_loss(*features, args.margin, same)
    if args.loss == "hmmc-softmax":
        return losses.hmmc_softmax_loss(*features, scale, same)
    if args.loss == "contrastive":
        return losses.contrastive_loss(*features, scale, same), {}
    # differs from IRRA: a CLIP trained so briefly that its own scale is below 50 keeps that, or SDM collapses
    sdm = losses.sdm_loss(*features, persons, torch.as_tensor(scale).detach().clamp(max=SDM_SCALE))
    if args.loss == "sdm":
        return sdm, {}
    return losses.summed({"sdm": sdm, "id": losses.id_loss(*features, persons, classifier)})


def reseed(seed, step, part=0):
    """Make what follows depend on these numbers alone: step below 2^24, part (a process, a piece) below 2^8."""
    torch.manual_seed(seed * 2 ** 32 + part * 2 ** 24 + step)


# ---------------------------------------------------------------------------------------------- 3. optimiser

def make_optimizer(learned, added, args):
    """AdamW over {name: parameter}; without weight decay, as in PE-RSITR's recipe, that is Adam.

    The recipe of re-identification, where CLIP learns: biases at twice the rate, what is new at five times.
    """
    groups = {}
    for name, parameter in learned.items():
        decay, factor = args.weight_decay if parameter.ndim >= 2 else 0.0, 1
        if args.loss.startswith("sdm") and args.train != "method":      # differs from IRRA: decoupled weight decay
            factor = 5 if name in added else 2 if name.endswith("bias") else 1
        groups.setdefault((decay, factor), []).append(parameter)
    return torch.optim.AdamW([dict(params=parameters, weight_decay=decay, factor=factor)
                              for (decay, factor), parameters in groups.items()], lr=args.lr)


def learning_rate(args, step, steps_per_epoch):
    """Learning rate of one step: linear warm-up, then the schedule."""
    warmup, total = args.warmup * steps_per_epoch, args.epochs * steps_per_epoch
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.schedule == "step":
        return args.lr * (0.7 if step >= 19 * steps_per_epoch else 1.0)
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


# ---------------------------------------------------------------------------------------------- 4. the run's folder

def save(path, content):
    """Write a checkpoint, or a text, to another name and rename it, so that a whole one is always there.

    The other name is always the same, unlike in `data.made_whole`: what a killed run left is overwritten by the next.
    """
    partial = path.with_suffix(".partial")
    try:
        if isinstance(content, str):
            partial.write_text(content)
        else:
            torch.save(content, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:      # torch raises RuntimeError when the disk is full
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}; an earlier one is still whole: make room "
                      "and go on with --resume") from None
    finally:
        partial.unlink(missing_ok=True)


def new_folder(args):
    """The run's folder: --out, which must be new or be resumed; or the first free runs/<data set>-<method>, -2, ..."""
    if args.out:
        out = Path(args.out)
        if not args.resume and out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} already holds a run: add --resume to go on with it, or give another --out")
        return out
    name = f"runs/{args.dataset}-{args.method if args.method != 'none' else args.train}"
    n = 1
    while (out := Path(name if n == 1 else f"{name}-{n}")).exists():
        n += 1
    return out


def take_folder(args):
    """Make the run's folder and its log.txt; of two runs that start at the same time, one finds it there."""
    Path(args.out).mkdir(parents=True, exist_ok=True)
    try:
        (Path(args.out) / "log.txt").touch(exist_ok=args.resume)
    except FileExistsError:
        raise ValueError(f"another run has just taken {args.out}: give another --out") from None


def memory():
    """Peak memory in GB: of the GPU if there is one in use, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2 ** 30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (30 if sys.platform == "darwin" else 20)


# ---------------------------------------------------------------------------------------------- 5. a run

def read_splits(args):
    """{split: Pairs} of the data set, without val or test where it has none, and what to say about that."""
    pairs, notes = {"train": data.read(args.dataset, args.data_root, "train")}, []
    for split, without in (("val", "the last epoch is taken"), ("test", "figures are of val, which chose the epoch")):
        try:
            pairs[split] = data.read(args.dataset, args.data_root, split)
        except data.NoSplit:
            notes.append(f"no {split} split: {without}")
    if len(pairs) == 1:
        raise ValueError(f"{args.dataset} in {args.data_root} has neither val nor test to measure anything on")
    if args.loss.startswith("sdm") and pairs["train"].ids is None:
        raise ValueError(f"--loss {args.loss} needs person ids, and {args.dataset} has none: take contrastive or hmmc")
    return pairs, notes


def load(run):
    """Read the data, the model with its method, and the pictures.

    Process 0 goes first while the others wait, so that what is downloaded, drawn or cached is made once.
    """
    args = run.args
    if losses.rank() > 0:
        dist.barrier()
    pairs, run.notes = read_splits(args)
    if args.init:
        model, run.tokenizer, before = eval.load_run(args.init, args.device)
        run.fingerprint, run.start = before["fingerprint"], f"from {args.init}"
    else:
        model, run.tokenizer = build(args, pairs["train"].captions)
        run.fingerprint = eval.fingerprint(model)
        run.start = f"{len(adapters.add_method(model, args.method, **args.sizes))} places"
    run.model = model
    args.image_size, args.activation = model.config.image_size, model.config.activation
    size, patch, grid = args.image_size, model.config.patch_size, model.config.grid
    if size not in (patch * grid[0], (patch * grid[0], patch * grid[1])):
        raise ValueError(f"--image-size {size}: the sides are to be multiples of this CLIP's patches, {patch} pixels")
    run.pairs, run.images, notes = data.load(pairs, args.image_size, Path(args.out).parent / "cache", args.skip_bad)
    if losses.rank() == 0 and losses.world() > 1:
        dist.barrier()
    run.notes += notes
    part = run.pairs["train"]
    run.tokens = run.tokenizer(part.captions, model.config.context_length)
    run.text_of = run.tokens.unique(dim=0, return_inverse=True)[1]            # equal captions share a number
    run.image_of = torch.tensor(part.image_of_caption)
    run.person_of = torch.tensor(part.ids)[run.image_of] if part.ids else run.image_of


def prepare(args):
    """Data, model and optimiser of a run, in a namespace; all mistakes show here, before its folder is made."""
    run = argparse.Namespace(args=args, began=time.time(), step=0, history=[], sums={}, stop=False, classifier=None,
                             kept=time.time())
    if args.precision == "auto":
        fast = losses.gather(torch.tensor([fast_bf16(args.device)], device=args.device))
        args.precision = "bf16" if fast.all() else "fp32"
    reseed(args.seed, 0)
    load(run)
    model, part = run.model, run.pairs["train"]
    choose_trained(model, args.train)
    run.learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    args.trained_parameters = sum(p.numel() for p in run.learned.values())
    run.total = sum(p.numel() for p in model.parameters())
    run.share = 100 * args.trained_parameters / run.total
    if args.loss == "sdm+id":
        width = eval.encode_texts(model, run.tokens[:1]).shape[1]             # a method may have changed it
        run.classifier = nn.Linear(width, max(part.ids) + 1).to(args.device)
        nn.init.normal_(run.classifier.weight, std=0.001)
        nn.init.zeros_(run.classifier.bias)
        run.learned |= {f"classifier.{name}": p for name, p in run.classifier.named_parameters()}
    if args.precision == "bf16":
        freeze_in_bf16(model)
    new = {*adapters.trainable_state(model), "classifier.weight", "classifier.bias"}
    run.optimizer = make_optimizer(run.learned, new, args)
    rows = len(data.epoch_order(part, args.epoch_over, args.seed, 0))
    if min(rows, args.batch_size) < losses.world():
        raise ValueError(f"{rows} pairs in batches of {args.batch_size} are less than one a batch for each of "
                         f"{losses.world()} processes: start fewer, or raise --batch-size")
    run.steps = rows // args.batch_size + (rows % args.batch_size >= losses.world())       # of an epoch
    # what a last.pt must agree in to be resumed
    run.fits = [run.steps, int(run.tokens.sum()), {name: list(p.shape) for name, p in run.learned.items()}]
    return run


def save_last(run):
    """Write last.pt, from which --resume goes on."""
    run.kept = time.time()
    if losses.rank() == 0:
        save(Path(run.args.out) / "last.pt",
             dict(settings=vars(run.args), learned={name: p.detach() for name, p in run.learned.items()},
                  optimizer=run.optimizer.state_dict(), step=run.step, history=run.history, sums=run.sums,
                  fits=run.fits, seconds=time.time() - run.began))


def restore(run, saved):
    """Put the state that `save_last` wrote back."""
    if saved.get("fits") != run.fits:
        raise ValueError(f"{run.args.out}/last.pt does not fit this run: it is none of its, or the data has changed")
    for name, value in saved["learned"].items():
        run.learned[name].data.copy_(value)
    run.optimizer.load_state_dict(saved["optimizer"])
    run.step, run.history, run.sums = (saved[name] for name in ("step", "history", "sums"))
    run.began -= saved["seconds"]


def say(run, text):
    """Print a line, and keep it in log.txt."""
    if losses.rank() == 0:
        print(text, flush=True)
        log = Path(run.args.out) / "log.txt"
        save(log, log.read_text() + text + "\n")


def train_step(run, pixels, tokens, rows):
    """One step on this process's part of a batch: uint8 (B, 3, H, W), token ids (B, L), caption numbers (B,)."""
    args, model = run.args, run.model
    for group in run.optimizer.param_groups:
        group["lr"] = group["factor"] * learning_rate(args, run.step, run.steps)
    reseed(args.seed, run.step, losses.rank())
    pixels = clip.normalize(data.augment(pixels.to(args.device).float(), args.augment))
    tokens, all_rows = tokens.to(args.device), losses.gather(rows)
    text, persons = (of[all_rows].to(args.device) for of in (run.text_of, run.person_of))
    same = (text[:, None] == text) | (persons[:, None] == persons) if args.mask_same else None      # (B, B)
    model.train()
    size = args.chunk or len(rows)
    loss, parts = losses.backward(
        encode_piece=lambda piece: encode(model, args, *piece),
        loss_of=lambda features: compute_loss(args, [losses.gather(x) for x in features], model.logit_scale.exp(),
                                              same, persons, run.classifier),
        pieces=list(zip(pixels.split(size), tokens.split(size))),
        seed_piece=lambda n: reseed(args.seed, run.step, losses.rank() + losses.world() * n))
    losses.average_gradients(run.learned.values())
    norm = nn.utils.clip_grad_norm_(run.learned.values(), math.inf)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        files = dict.fromkeys(run.pairs["train"].images[n] for n in run.image_of[rows])
        last = Path(args.out) / "last.pt"
        kept = f"{last} is of the last good state" if last.exists() else "nothing was saved yet"
        raise ValueError(f"the loss is {loss.item()} and its gradient {norm.item()} at step {run.step}, on pictures "
                         f"{data.some(files, 4)}; {kept}. Two things to try in a new run: "
                         f"a third of --lr {args.lr:g}, --precision fp32")
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        model.logit_scale.clamp_(max=math.log(100))                           # as CLIP: temperature at least 0.01
    for name, value in {"loss": loss, **parts}.items():
        run.sums[name] = run.sums.get(name, 0.0) + value.item()
    run.step += 1


def stopped(run):
    """Whether Ctrl-C reached any process; all must call this, as they wait here for each other."""
    return losses.gather(torch.tensor([run.stop], device=run.args.device)).any().item()


def train_epoch(run):
    """The rest of the epoch that run.step is in, or until Ctrl-C -> images/s, share of time spent waiting for data."""
    args = run.args
    epoch, done = divmod(run.step, run.steps)
    order = data.epoch_order(run.pairs["train"], args.epoch_over, args.seed, epoch)
    began, waited = time.time(), 0.0
    batches = data.batches(run.images["train"], run.tokens, run.image_of, order, args.batch_size, done,
                           losses.rank(), losses.world())
    fetched = began
    for batch in tqdm(batches, f"epoch {epoch + 1}", run.steps, initial=done, leave=False,
                      disable=losses.rank() > 0 or None):
        waited += time.time() - fetched
        train_step(run, *batch)
        if stopped(run):
            break
        if time.time() - run.kept > SAVE_EVERY and run.step % run.steps:      # at an epoch's end validation comes first
            save_last(run)
        fetched = time.time()
    seconds = time.time() - began
    return min(args.batch_size * (run.steps - done), len(order)) / seconds, waited / seconds


def validate(run, speed, waited, left):
    """End of an epoch: validation chooses best.pt, and a line is printed and logged."""
    args, epoch = run.args, run.step // run.steps
    row = dict(epoch=epoch, step=run.step, **{name: value / run.steps for name, value in run.sums.items()},
               lr=run.optimizer.param_groups[0]["lr"])
    chosen, score = True, ""        # without val the last epoch is taken
    if "val" in run.pairs:
        metrics = eval.evaluate(run.model, run.tokenizer, run.pairs["val"], run.images["val"], args.precision)
        row |= {f"val_{name}": value for name, value in metrics.items()}
        name, value = eval.headline(metrics)
        chosen = all(value > old[f"val_{name}"] for old in run.history)
        score = f"  val {name} {value:5.2f}{'*' if chosen else ' '}"
    run.history.append(row)
    run.sums = {}
    if losses.rank() == 0:
        if chosen:
            save_best(run, epoch)
        lines = [",".join(row), *(",".join(map(str, old.values())) for old in run.history)]
        save(Path(args.out) / "log.csv", "\n".join(lines) + "\n")
    save_last(run)
    terms = " ".join(f"{name} {row[name]:.3f}" for name in row if "-" in name or name in ("sdm", "id"))
    say(run, f"epoch {epoch:3d}/{args.epochs}  loss {row['loss']:.4f}{terms and f' ({terms})'}  lr {row['lr']:.1e}"
             f"{score} {speed:5.0f} img/s  wait {100 * waited:.1f} %  mem {memory():.1f} GB  "
             f"left {tqdm.format_interval(left)}")


def save_best(run, epoch):
    """Write best.pt, what load_run needs: trained tensors, settings, vocabulary; CLIP's weights only if they learn."""
    args, model = run.args, run.model
    content = dict(settings=vars(args), trained=adapters.trainable_state(model), merges=run.tokenizer.merges,
                   activation=model.config.activation, fingerprint=run.fingerprint, epoch=epoch)
    if args.train != "method":
        content["state_dict"] = {name: value.cpu() for name, value in model.openai_state_dict().items()}
    save(Path(args.out) / "best.pt", content)


def test(run):
    """The test set, touched once, with best.pt -> rows of the result table: chance, CLIP as it started, the run."""
    args, out = run.args, Path(run.args.out)
    split = "test" if "test" in run.pairs else "val"
    pairs, images = run.pairs[split], run.images[split]
    rows = [("chance", None, None, eval.chance(pairs))]
    if args.model not in FROM_SCRATCH:
        plain, tokenizer = build(args)
        rows.append(("zero-shot", 0, 0.0, eval.evaluate(plain, tokenizer, pairs, images, args.precision)))
    model, tokenizer, settings = eval.load_run(out, args.device)
    rows.append((eval.label(settings), args.trained_parameters, run.share,
                 eval.evaluate(model, tokenizer, pairs, images, args.precision)))
    minutes = (time.time() - run.began) / 60
    how = f"best epoch {settings['epoch']} by val" if "val" in run.pairs else "the last epoch"
    say(run, f"\n{args.dataset} {split}, {len(pairs.images)} pictures, {len(pairs.captions)} captions, {how}, "
             f"{tqdm.format_interval(60 * minutes)}, {memory():.1f} GB\n" + eval.table(rows))
    if losses.rank() == 0:
        save(out / "metrics.json", json.dumps(dict(
            settings=vars(args), split=split, minutes=minutes, memory_gb=memory(), total_parameters=run.total,
            rows=rows), indent=1) + "\n")
        eval.plot_curve(run.history, out / "curve.png")
    say(run, f"\nwritten: {out}/ best.pt last.pt log.csv metrics.json curve.png; next: python eval.py {out}"
             + " --split val" * (split == "val"))
    return rows


def train(flags):
    """One run, from its flags to its test: returns the rows of its result table and leaves the run's folder behind."""
    args = parse(flags)
    keep_freed_memory()
    if args.device.startswith("cuda:"):
        torch.cuda.set_device(args.device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():              # started by torchrun
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.startswith("cuda") else "gloo",
                                timeout=datetime.timedelta(hours=2))
    if args.model == "toy":
        args.model = make_toy_clip(args)
    args.out = str(new_folder(args))
    run, last = prepare(args), Path(args.out) / "last.pt"
    if args.resume and last.is_file():
        restore(run, eval.load_checkpoint(last))
    if losses.rank() == 0:
        take_folder(args)
    say(run, f"data    {args.dataset}: " + ", ".join(f"{len(p.images)} {split}" for split, p in run.pairs.items())
        + f" pictures; {len(run.tokens)} train captions" + "".join(f"\n        {note}" for note in run.notes))
    say(run, f"model   {args.init or args.model}: {run.total:,} parameters, {args.image_size} px, {args.precision} on "
             f"{args.device}" + f", {losses.world()} processes" * (losses.world() > 1))
    say(run, f"method  {args.method}: {run.start}; {args.train} learns: {args.trained_parameters:,} parameters, "
             f"{run.share:.2f} %")
    say(run, f"run     {args.out}: {args.loss} loss, {args.epochs} epochs of {run.steps} steps, "
             f"batch {args.batch_size}, lr {args.lr:g}, seed {args.seed}")

    def stop(number, frame):        # Ctrl-C ends the run after the step under way, a second one at once
        run.stop = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGINT, stop)
    first, clock = run.step, time.time()
    while run.step < args.epochs * run.steps:
        speed, waited = train_epoch(run)
        if run.step % run.steps:
            save_last(run)
        else:
            left = (time.time() - clock) / (run.step - first) * (args.epochs * run.steps - run.step)
            validate(run, speed, waited, left)
        if stopped(run):
            launch = "python" if losses.world() == 1 else "torchrun ..."
            raise KeyboardInterrupt(f"stopped at step {run.step}; to go on: {launch} train.py --resume --out "
                                    + shlex.quote(args.out))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return test(run)


# ---------------------------------------------------------------------------------------------- 6. without any data

def make_toy_clip(args):
    """The toy's stand-in for OpenAI's CLIP: `tiny`, trained on the ground world, or on portraits -> its run."""
    out, flags = "runs/toy-clip", ["--dataset", "toy-ground"]
    if args.dataset == "toy-people":
        out, flags = "runs/toy-people-clip", ["--dataset", "toy-portraits", "--image-size", "96", "48"]
    if not (Path(out) / "metrics.json").exists():
        if losses.rank() == 0:
            print(f"pre-training a tiny CLIP on drawn pictures, once: {out}")
        train([*flags, "--model", "tiny", "--method", "none", "--train", "all", "--loss", "contrastive",
               "--epochs", "2", "--epoch-over", "captions", "--batch-size", "64", "--out", out,
               "--device", args.device, "--resume"])
    return out


def tour():
    """`python train.py` alone: the paper's argument in miniature, as three ordinary runs."""
    rows = train(["--dataset", "toy-aerial", "--method", "mrs"])
    print()
    rows += train(["--dataset", "toy-aerial", "--method", "none", "--train", "backbone", "--loss", "contrastive"])[-1:]
    if losses.rank() > 0:
        return
    print("\nthe two runs together, on a test set that no step touched:\n" + eval.table(rows))
    zero, method, full = (row[3]["mR"] for row in rows[1:])
    print(f"\nthe adapter closes {100 * (method - zero) / (full - zero):.0f} % of the gap between zero-shot and full "
          f"fine-tuning with {rows[2][2]:.2f} % of the parameters")


def main():
    """The tour without flags, else one run; mistakes end in one line and exit code 2."""
    try:
        tour() if len(sys.argv) == 1 else train(sys.argv[1:])
    except (ValueError, OSError, torch.cuda.OutOfMemoryError) as error:
        advice = "; try --chunk or a smaller --batch-size" if isinstance(error, torch.cuda.OutOfMemoryError) else ""
        print(f"train.py: error: {error}{advice}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped; --resume goes on from what was saved'}", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
