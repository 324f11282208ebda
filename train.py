"""Training: a data set x a CLIP x a method x what learns x a loss, in one plain loop.

    python train.py                 no data, no network: draws two worlds, pre-trains a tiny CLIP on the one and moves
                                    it to the other, by an MRS-Adapter and by full fine-tuning; about four minutes
    python train.py --dataset ucm --data-root ucm_precomp --model ViT-B/32          the first paper: MRS + HMMC
    python train.py --dataset ucm --data-root ucm_precomp --method none --train backbone --loss contrastive
    python train.py --dataset rsicd --data-root rsicd_precomp --model small --method none --train all \\
        --loss contrastive                                                          a small CLIP from scratch

A run is a folder: best.pt (best validation mR), last.pt (to resume), log.csv, metrics.json, curve.png, log.txt.
Every random number of a step is drawn from (seed, step), so that a resumed run ends as the unbroken one.
"""
import argparse
import csv
import dataclasses
import json
import math
import os
import resource
import signal
import sys
import time
import timeit
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import adapters
import clip
import data
import eval
import losses

FROM_SCRATCH = {"tiny": 1000, "small": 3000}    # sizes without weights to load: BPE merges learned from the captions
TOY_CLIP = "runs/toy-clip"                      # what --model toy means: tiny, pre-trained on the drawn ground world

# recipes: what the flags default to. `paper` is PE-RSITR's for frozen CLIP; the others are ours
PAPER = dict(model="ViT-B/32", epochs=30, batch_size=16, lr=2e-4, schedule="step", warmup=0.0, epoch_over="captions")
TOY = dict(model="toy", loss="hmmc-softmax", epochs=15, batch_size=64, lr=5e-3, schedule="cosine", warmup=1.0,
           epoch_over="images")
TOY_SIZES = dict(bottleneck=128, dropout=0.1)   # few steps and few pictures: wide, and little dropout
SCRATCH = dict(epochs=20, batch_size=128, lr=1e-3, schedule="cosine", warmup=1.0, epoch_over="images",
               weight_decay=0.1)


# ---------------------------------------------------------------------------------------------- 1. settings

def parse(argv=None):
    """Settings from the command line; the defaults follow the data set and the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def group(title, **flags):
        add = parser.add_argument_group(title).add_argument
        for name, options in flags.items():
            default = " (default: %(default)s)" if "default" in options else ""
            add("--" + name.replace("_", "-"), **{**options, "help": options["help"] + default})
    group("data",
          dataset=dict(default="toy-aerial", choices=data.DATASETS, help="what to train on"),
          data_root=dict(metavar="DIR", help="folder of the data set; the toy worlds draw theirs"),
          epoch_over=dict(default="captions", choices=("captions", "images"),
                          help="an epoch is every caption once, or every picture once with one of its captions"),
          test_split=dict(default="test", choices=("test", "val"),
                          help="val where the test files are not at hand; its figures are then optimistic"),
          augment=dict(default="none", choices=("none", "crop", "aerial", "people"),
                       help="crop: 60-100 %% of the area; aerial: also quarter turns and mirrors; people: mirror, shift"),
          cache=dict(default="runs/cache", metavar="DIR", help="where decoded pictures are kept"))
    group("model",
          model=dict(default="ViT-B/32", help="published name, weight file, run folder; tiny or small: from scratch; "
                                              "toy: tiny, pre-trained on the drawn ground world"),
          image_size=dict(type=int, help="pixels; other than the model's, its positional grid is resized"),
          activation=dict(choices=("quick_gelu", "gelu"), help="for checkpoints that do not say; OpenAI: quick_gelu"))
    group("method",
          method=dict(default="mrs", choices=tuple(adapters.METHODS), help="what is added to the frozen CLIP"),
          train=dict(default="method", choices=("method", "backbone", "all"),
                     help="what learns: the added method, CLIP itself, or both"),
          bottleneck=dict(type=int, help="inner width of adapters; 16-128, more for larger data"),
          dropout=dict(type=float, help="inside the adapter; 0-0.5, less for short runs"),
          prompt_length=dict(type=int, help="prompt tokens; 2-50"),
          prompt_depth=dict(type=int, help="blocks with prompts, from the first"),
          rank=dict(type=int, help="rank of LoRA; 2-16"),
          per_block=dict(action="store_true", help="one adapter for each block, not one shared by all"))
    group("loss",
          loss=dict(default="hmmc", choices=("hmmc", "hmmc-softmax", "contrastive"),
                    help="hmmc: the paper's hinge on the hardest negatives; hmmc-softmax: its terms as softmax losses"),
          margin=dict(type=float, default=0.2, help="of hmmc, cosine units; 0.05-0.3, lower if the loss stays up"),
          view_dropout=dict(type=float, default=0.2, help="token dropout of HMMC's second view; 0.1-0.3"),
          mask_same=dict(action="store_true", help="pairs that share a picture or a caption are no negatives"))
    group("optimisation",
          epochs=dict(type=int, default=30, help="passes over the data; 10-30"),
          batch_size=dict(type=int, default=16, help="pairs; contrastive losses gain up to 512 and more"),
          lr=dict(type=float, default=2e-4, help="Adam's; adapters 1e-4 to 2e-3, CLIP itself 1e-6 to 1e-5; "
                                                 "a third of it when the loss jumps or turns NaN"),
          schedule=dict(default="step", choices=("step", "cosine"), help="step: x 0.7 from epoch 19 on; cosine: to 0"),
          warmup=dict(type=float, default=0.0, help="epochs of linear warm-up; 1 for training from scratch"),
          weight_decay=dict(type=float, default=0.0, help="decoupled, on matrices only; 0.1 from scratch"))
    group("run",
          out=dict(metavar="DIR", help="folder of the run; by default a new one under runs/"),
          resume=dict(action="store_true", help="go on with the run in --out"),
          seed=dict(type=int, default=0, help="of everything random"),
          precision=dict(default="auto", choices=("auto", "bf16", "fp32"), help="auto: bf16 where it is fast"),
          device=dict(default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1"))

    # the recipe, and so the defaults that --help shows, depends on some flags: these are read first
    argv = sys.argv[1:] if argv is None else argv
    first = parser.parse_known_args([flag for flag in argv if flag not in ("-h", "--help")])[0]
    if first.dataset.startswith("toy-"):
        sizes = adapters.METHODS[first.method][1]
        parser.set_defaults(**TOY, **{name: value for name, value in TOY_SIZES.items() if name in sizes})
    else:
        parser.set_defaults(**PAPER)
    if first.train != "method":
        parser.set_defaults(lr=5e-4 if first.dataset.startswith("toy-") else 1e-5)
    if first.model in FROM_SCRATCH:
        parser.set_defaults(**SCRATCH)
    args = parser.parse_args(argv)
    args.sizes = {name: getattr(args, name) 
                  for name in ("bottleneck", "dropout", "prompt_length", "prompt_depth", "rank")}
    args.sizes["shared"] = False if args.per_block else None
    if args.method == "none" and args.train == "method":
        parser.error("--method none leaves nothing to train: add --train backbone, or test plain CLIP with eval.py")
    if args.model in FROM_SCRATCH and args.train != "all":
        parser.error(f"--model {args.model} has no weights yet: it needs --train all, with --method none")
    for name in ("epochs", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 is needed")
    return args


# ---------------------------------------------------------------------------------------------- 2. model

def fast_bf16(device):
    """Whether bf16 products are in hardware: measured, as no public call of torch tells it on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device)[0] >= 8
    matrices = [torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    fp32, bf16 = (min(timeit.repeat(lambda: x @ x, number=1, repeat=5)) for x in matrices)
    return bf16 < 0.7 * fp32


def build(args, captions):
    """CLIP and its tokenizer: loaded, or of a size to train from scratch with a vocabulary from the captions."""
    if args.model in FROM_SCRATCH:
        tokenizer = clip.Tokenizer.train(captions, FROM_SCRATCH[args.model])
        config = dataclasses.replace(clip.SIZES[args.model], vocab_size=tokenizer.vocab_size)
        if args.image_size:
            config = dataclasses.replace(config, image_size=args.image_size)
        return clip.CLIP(config).to(args.device), tokenizer
    model = clip.load_clip(args.model, args.image_size, args.device, args.activation)
    return model, clip.Tokenizer(args.model)


def choose_trained(model, train):
    """Set requires_grad: what add_method left ("method"), CLIP without what was added ("backbone"), everything."""
    if train != "method":
        added = set(adapters.trainable_state(model)) if train == "backbone" else set()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in added)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def freeze_in_bf16(model):
    """Hold the frozen matrices as autocast would cast them at every step. The results are the same to the bit."""
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) or type(module).__name__ == "Attention":
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()


def encode_twice(tower, inputs, dropout):
    """Features of a batch and of its second view, in one forward: (B, ...) -> two unit-length (B, D).

    The second view (PE-RSITR) is the same tokens with element-wise dropout between the embedding and the first block.
    """
    x = tower.embed(inputs)
    x = tower.transformer(torch.cat([x, F.dropout(x, dropout)]))              # (2B, L, C)
    return [F.normalize(tower.head(tower.pool(view, inputs)).float(), dim=-1) for view in x.chunk(2)]


def compute_loss(model, args, images, tokens, same):
    """Loss and its parts for one batch of normalised images and token ids."""
    scale = model.logit_scale.exp()
    if args.loss == "contrastive":
        loss = losses.contrastive_loss(model.encode_image(images), model.encode_text(tokens), scale, same)
        return loss, {}
    image, image2 = encode_twice(model.visual, images, args.view_dropout)
    text, text2 = encode_twice(model.text, tokens, args.view_dropout)
    if args.loss == "hmmc":
        return losses.hmmc_loss(image, text, image2, text2, args.margin, same)
    return losses.hmmc_softmax_loss(image, text, image2, text2, scale, same)


# ---------------------------------------------------------------------------------------------- 3. optimiser

def make_optimizer(parameters, args):
    """AdamW; without weight decay, as in the paper's recipe, that is Adam."""
    matrices = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=args.weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=args.lr)


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
    """Write a checkpoint so that a whole one is always there: to another name first, then renamed."""
    partial = path.with_suffix(".partial")
    try:
        torch.save(content, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def checkpoint(model, tokenizer, args, **position):
    """What load_run needs: the trained tensors, settings, vocabulary; CLIP's weights only if they were trained."""
    content = dict(settings=vars(args), trained=adapters.trainable_state(model), merges=tokenizer.merges,
                   activation=model.config.activation, **position)
    if args.train != "method":
        content["state_dict"] = {name: p.detach().cpu().clone() for name, p in model.openai_state_dict().items()}
    return content


def new_folder(args):
    """The run's folder: --out, or the first free runs/<data set>-<method>, -2, -3 ..."""
    if args.out:
        out = Path(args.out)
        if not args.resume and (out / "last.pt").exists():
            raise ValueError(f"{out} already holds a run: add --resume to go on with it, or give another --out")
        if args.resume and not (out / "last.pt").exists():
            raise FileNotFoundError(f"there is no {out / 'last.pt'} to resume: run without --resume")
        return out
    if args.resume:
        raise ValueError("--resume needs --out, the folder of the run to go on with")
    name = f"runs/{args.dataset}-{args.method if args.method != 'none' else args.train}"
    n = 1
    while (out := Path(name if n == 1 else f"{name}-{n}")).exists():
        n += 1
    return out


def memory():
    """Peak memory in GB: of the GPU if there is one in use, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2 ** 30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (30 if sys.platform == "darwin" else 20)


def duration(seconds):
    """Seconds as minutes:seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# ---------------------------------------------------------------------------------------------- 5. the loop

def train(args):
    """One run, from settings to test: returns the rows of its result table and leaves the run's folder behind."""
    if args.model == "toy":
        make_toy_clip(args)
        args.model = TOY_CLIP
    began = time.time()
    out = new_folder(args)
    args.out = str(out)

    # data: all that can be wrong with it shows here, before anything is written
    splits = ("train", "val", args.test_split)
    train_pairs, val_pairs, test_pairs = (data.read(args.dataset, args.data_root, split) for split in splits)
    captions = {text: n for n, text in enumerate(dict.fromkeys(train_pairs.captions))}
    text_of = torch.tensor([captions[text] for text in train_pairs.captions])
    image_of = torch.tensor(train_pairs.image_of_caption)

    # model
    torch.manual_seed(args.seed)
    if args.precision == "auto":
        args.precision = "bf16" if fast_bf16(args.device) else "fp32"
    model, tokenizer = build(args, train_pairs.captions)
    args.image_size, args.activation = model.config.image_size, model.config.activation
    images, val_images, test_images = (data.load_images(pairs.images, args.image_size, args.cache)
                                       for pairs in (train_pairs, val_pairs, test_pairs))
    tokens = tokenizer(train_pairs.captions, model.config.context_length)
    mark = eval.fingerprint(model)
    touched = adapters.add_method(model, args.method, **args.sizes)
    learned = choose_trained(model, args.train)
    args.trained_parameters, total = sum(p.numel() for p in learned), sum(p.numel() for p in model.parameters())
    share = 100 * args.trained_parameters / total
    if args.precision == "bf16":
        freeze_in_bf16(model)

    # optimiser, and where to start
    optimizer = make_optimizer(learned, args)
    batch_count = math.ceil(len(data.epoch_order(train_pairs, args.epoch_over, args.seed, 0)) / args.batch_size)
    step, history, sums, best = 0, [], {}, -1.0
    if args.resume:
        step, history, sums, best = restore(out / "last.pt", args, model, optimizer)
    out.mkdir(parents=True, exist_ok=True)

    def say(text):
        print(text, flush=True)
        with open(out / "log.txt", "a") as file:
            file.write(text + "\n")

    def keep():
        parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        save(out / "last.pt", dict(settings=vars(args), learned=parameters, optimizer=optimizer.state_dict(),
                                   step=step, history=history, sums=sums, best=best))
    say(f"data    {args.dataset}: {len(train_pairs.images)} train, {len(val_pairs.images)} val, "
        f"{len(test_pairs.images)} test pictures; {len(train_pairs.captions)} train captions")
    say(f"model   {args.model}: {total:,} parameters, {args.image_size} px, {args.precision} on {args.device}")
    say(f"method  {args.method}: {len(touched)} places; {args.train} learns: "
        f"{args.trained_parameters:,} parameters, {share:.2f} %")
    say(f"run     {out}: {args.loss} loss, {args.epochs} epochs of {batch_count} steps, batch {args.batch_size}, "
        f"lr {args.lr:g}, seed {args.seed}")

    # the loop: what is random in a step depends on (seed, step) alone
    stop = stop_on_ctrl_c()
    first, clock = step, time.time()
    while step < args.epochs * batch_count:
        epoch, done = divmod(step, batch_count)
        order = data.epoch_order(train_pairs, args.epoch_over, args.seed, epoch)
        epoch_clock, waited, seen = time.time(), 0.0, 0
        bar = tqdm(total=batch_count, initial=done, desc=f"epoch {epoch + 1}", leave=False, disable=None)
        fetched = time.time()
        for batch, tokens_of_batch, rows in data.batches(images, tokens, image_of, order, args.batch_size, done):
            waited += time.time() - fetched
            torch.manual_seed(args.seed * 2 ** 32 + step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, step, batch_count)
            pixels = clip.normalize(data.augment(batch.to(args.device).float(), args.augment))
            same = None
            if args.mask_same:
                same = (image_of[rows][:, None] == image_of[rows]) | (text_of[rows][:, None] == text_of[rows])
                same = same.to(args.device)
            model.train()
            with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16"):
                loss, parts = compute_loss(model, args, pixels, tokens_of_batch.to(args.device), same)
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is {loss.item()} at step {step} (epoch {epoch + 1}); {out} keeps the last "
                                 f"good state: try a third of --lr {args.lr:g}, or --precision fp32")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(100))                   # as CLIP: temperature at least 0.01
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums.get(name, 0.0) + value.item()
            step, seen = step + 1, seen + len(batch)
            bar.update()
            if stop:
                break
            fetched = time.time()
        bar.close()
        if stop and step % batch_count:
            keep()
            raise KeyboardInterrupt(f"stopped at step {step}; go on with the same command and --resume --out {out}")

        # end of an epoch: validation chooses best.pt
        speed = seen / (time.time() - epoch_clock)
        row = dict(epoch=epoch + 1, step=step, **{name: value / batch_count for name, value in sums.items()},
                   lr=optimizer.param_groups[0]["lr"])
        row |= {f"val_{name}": value
                for name, value in eval.evaluate(model, tokenizer, val_pairs, val_images, args.precision).items()}
        history, sums = [*history, row], {}
        if row["val_mR"] > best:
            best = row["val_mR"]
            save(out / "best.pt", checkpoint(model, tokenizer, args, fingerprint=mark, epoch=epoch + 1))
        keep()
        with open(out / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerows(history)
        left = (time.time() - clock) / (step - first) * (args.epochs * batch_count - step)
        terms = "".join(f" {name} {row[name]:.3f}" for name in parts)
        say(f"epoch {epoch + 1:3d}/{args.epochs}  loss {row['loss']:.4f}{terms and ' (' + terms.strip() + ')'}  "
            f"lr {row['lr']:.1e}  val mR {row['val_mR']:5.2f}{'*' if row['val_mR'] == best else ' '} "
            f"{speed:5.0f} img/s  wait {100 * waited / (time.time() - epoch_clock):.1f} %  "
            f"mem {memory():.1f} GB  left {duration(left)}")
        if stop:
            raise KeyboardInterrupt(f"stopped after epoch {epoch + 1}; go on with --resume --out {out}")

    # the test set, touched once, with the weights that validation chose
    signal.signal(signal.SIGINT, signal.default_int_handler)
    eval.plot_curve(history, out / "curve.png")
    rows = test(args, test_pairs, test_images, share)
    say(f"\n{args.dataset} {args.test_split}, {len(test_pairs.images)} pictures, {len(test_pairs.captions)} captions, "
        f"best epoch {max(history, key=lambda row: row['val_mR'])['epoch']} by val mR, "
        f"{duration(time.time() - began)} min, {memory():.1f} GB\n" + eval.table(rows))
    metrics = dict(settings=vars(args), minutes=(time.time() - began) / 60, memory_gb=memory(),
                   total_parameters=total, best_val_mR=best, rows=rows)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    say(f"\nwritten: {out}/ best.pt last.pt log.csv metrics.json curve.png; next: python eval.py {out}")
    return rows


def restore(path, args, model, optimizer):
    """Put the state of an interrupted run back -> (step, history, sums, best)."""
    saved = eval.load_checkpoint(path)
    for name, old in saved["settings"].items():
        if name not in ("out", "resume", "device", "cache", "data_root") and vars(args)[name] != old:
            raise ValueError(f"the run in {path.parent} has --{name.replace('_', '-')} {old}, not {vars(args)[name]}: "
                             f"resume it with its own settings")
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, value in saved["learned"].items():
            parameters[name].copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved["history"], saved["sums"], saved["best"]


def stop_on_ctrl_c():
    """A list that is empty until Ctrl-C, so that the step under way ends first; a second Ctrl-C ends at once."""
    stop = []

    def handler(number, frame):
        stop.append(True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGINT, handler)
    return stop


def test(args, pairs, images, share):
    """Rows of the result table on the test split: chance, the CLIP it started from, and the run's best.pt."""
    rows = [("chance", None, None, eval.chance(pairs))]
    if args.model not in FROM_SCRATCH:
        plain, tokenizer = build(args, None)
        rows.append(("zero-shot", 0, 0.0, eval.evaluate(plain, tokenizer, pairs, images, args.precision)))
    model, tokenizer, settings = eval.load_run(args.out, args.device)
    rows.append((eval.label(settings), args.trained_parameters, share,
                 eval.evaluate(model, tokenizer, pairs, images, args.precision)))
    return rows


# ---------------------------------------------------------------------------------------------- 6. without any data

def make_toy_clip(args):
    """The toy's stand-in for OpenAI's CLIP: `tiny`, pre-trained on drawn pictures of the ground; made once."""
    if not (Path(TOY_CLIP) / "metrics.json").exists():
        resume = ["--resume"] if (Path(TOY_CLIP) / "last.pt").exists() else []
        print(f"pre-training a tiny CLIP on drawn ground pictures, once: {TOY_CLIP}")
        train(parse(["--dataset", "toy-ground", "--model", "tiny", "--method", "none", "--train", "all",
                     "--loss", "contrastive", "--epochs", "2", "--epoch-over", "captions", "--batch-size", "64",
                     "--out", TOY_CLIP, "--device", args.device, "--precision", args.precision,
                     "--cache", args.cache, *resume]))


def tour():
    """`python train.py` alone: the paper's argument in miniature, as three ordinary runs."""
    rows = train(parse(["--dataset", "toy-aerial", "--method", "mrs"]))
    print()
    rows += train(parse(["--dataset", "toy-aerial", "--method", "none", "--train", "backbone",
                         "--loss", "contrastive"]))[-1:]
    print("\nthe two runs together, on a test set that no step touched:\n" + eval.table(rows))
    zero, method, full = (row[3]["mR"] for row in rows[1:])
    print(f"\nthe adapter closes {100 * (method - zero) / (full - zero):.0f} % of the gap between zero-shot and full "
          f"fine-tuning with {rows[2][2]:.2f} % of the parameters")


def main():
    """The tour without flags, else one run; mistakes end in one line and exit code 2."""
    try:
        if len(sys.argv) == 1:
            tour()
        else:
            train(parse())
    except (ValueError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped before the first step'}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
