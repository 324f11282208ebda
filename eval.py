"""Evaluation: metrics, the test of a run or of plain CLIP, tables of runs, the training curve, search.

    python eval.py runs/x                                          a run, on the data set it was trained for
    python eval.py ViT-B/32 --dataset ucm --data-root ucm_precomp  plain CLIP, zero-shot
    python eval.py --table runs/*                                  finished runs side by side, mean and spread
    python eval.py runs/x --query "two boats" --gallery photos     search a folder, or the run's data set

R@K: percentage of queries with a right item in the top K. Retrieval: each image ranks all captions (i2t) and
each caption all images (t2i). Re-identification: each caption ranks all images; all of its person are right.
Shapes: N images, M captions, Q queries, G gallery items, B queries of one chunk, D joint width, L tokens.
"""
import argparse
import glob
import hashlib
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import adapters
import clip
import data

CHUNK = 256                     # queries that are ranked at a time
PIECE = 2048                    # images of a gallery that are encoded, then saved, at a time
DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES += ["cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
if torch.backends.mps.is_available():
    DEVICES.append("mps")
INCIDENTAL = ("seed", "out", "init", "resume", "device", "data_root")   # --table takes the mean over these


# ------------------------------------------------------------------------------------ metrics

def recalls(similarity, query_ids, gallery_ids, prefix):
    """{prefix + k: percent of queries with a right item, one of the same id, in the top k}, for k = 1, 5, 10.

    A tie counts at its expected value under random order: a collapsed model gets chance, not 100 or 0. There
    are `above` items of a higher score than the best right item of a query; `tied` items, itself included,
    have its score, and `right_tied` of these are right. k - above of the tied, drawn at random, are in the
    top k; all of them are wrong with probability prod_{n < k - above} (tied - right_tied - n) / (tied - n).
    """
    shape = len(query_ids), len(gallery_ids)
    if similarity.shape != shape or 0 in shape:
        raise ValueError(f"similarity {tuple(similarity.shape)} does not fit queries x gallery {shape}")
    if not similarity.isfinite().all():
        raise ValueError("similarities hold NaN or infinite values: the weights are broken, not just bad")
    if not torch.isin(query_ids, gallery_ids).all():
        raise ValueError("there are queries without a match in the gallery")
    hits = {1: 0.0, 5: 0.0, 10: 0.0}
    for scores, ids in zip(similarity.split(CHUNK), query_ids.split(CHUNK)):  # (B, G), (B,)
        right = ids[:, None] == gallery_ids                                   # (B, G)
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        above = (scores > best).sum(dim=1)                                    # (B,)
        tied = (scores == best).sum(dim=1).double()
        right_tied = (right & (scores == best)).sum(dim=1)
        for k in hits:
            miss = torch.ones(len(ids)).double()        # probability that the top k holds no right item
            for n in range(k):
                wrong_left = (tied - right_tied - n).clamp(min=0)
                miss = torch.where(n < k - above, miss * wrong_left / (tied - n).clamp(min=1), miss)
            hits[k] += (1 - miss).sum().item()
    return {f"{prefix}{k}": 100 * hit / len(similarity) for k, hit in hits.items()}


def retrieval_metrics(similarity, image_of_caption):
    """Recalls in percent: {"i2t_R@1", "i2t_R@5", "i2t_R@10", "t2i_R@1", "t2i_R@5", "t2i_R@10", "mR"}.

    similarity (N, M): images x captions. image_of_caption (M,): the image that each caption is about.
    Example: captions 0 and 1 are about the first of two images, caption 2 about the second. Then of
    [[.9, .1, .3], [.2, .3, .4]] i2t R@1 is 100 (captions 0 and 2 come first), t2i R@1 66.7 (caption 1 finds
    the second image). ValueError for NaN, shapes that do not fit, an image without caption.
    """
    similarity = torch.as_tensor(similarity).float().cpu()
    captions = torch.as_tensor(image_of_caption).cpu()
    images = torch.arange(len(similarity))
    metrics = recalls(similarity, images, captions, "i2t_R@")
    metrics |= recalls(similarity.T, captions, images, "t2i_R@")
    return metrics | {"mR": sum(metrics.values()) / 6}


def reid_metrics(similarity, query_ids, gallery_ids):
    """Means over the queries in percent: {"R1", "R5", "R10", "mAP", "mINP"}; no camera filter.

    similarity (Q, G): captions x images; an image with the id of the caption is right: ids (Q,) and (G,).
    With right images at ranks r_1 < ... < r_P, Rank-k is [r_1 <= k], AP the mean of j / r_j (Market-1501),
    INP is P / r_P (arXiv 2001.04193). mAP and mINP break ties by one fixed random order of the gallery: the
    files' order, a person's images side by side, would put a collapsed model above chance. Errors: `recalls`.
    """
    similarity = torch.as_tensor(similarity).float().cpu()
    query_ids, gallery_ids = torch.as_tensor(query_ids).cpu(), torch.as_tensor(gallery_ids).cpu()
    metrics = recalls(similarity, query_ids, gallery_ids, "R")
    shuffle = torch.randperm(len(gallery_ids), generator=torch.Generator().manual_seed(0))
    gallery_ids = gallery_ids[shuffle]
    ranks = torch.arange(1, len(gallery_ids) + 1).double()                    # (G,)
    AP, INP = [], []
    for scores, ids in zip(similarity.split(CHUNK), query_ids.split(CHUNK)):  # (B, G), (B,)
        order = scores[:, shuffle].argsort(dim=1, descending=True, stable=True)
        right = gallery_ids[order] == ids[:, None]                            # (B, G), by rank
        precision = right.cumsum(dim=1) / ranks                               # j / r_j at the j-th right one
        P = right.sum(dim=1)                                                  # (B,)
        AP.append(precision.where(right, 0).sum(dim=1) / P)
        INP.append(P / ranks.where(right, 0).amax(dim=1))
    return metrics | {"mAP": 100 * torch.cat(AP).mean().item(), "mINP": 100 * torch.cat(INP).mean().item()}


def split_metrics(similarity, pairs):
    """Metrics of one split from (N, M), its images x captions: of re-identification if it has ids."""
    if pairs.ids is None:
        return retrieval_metrics(similarity, pairs.image_of_caption)
    ids = torch.tensor(pairs.ids)
    return reid_metrics(similarity.T, ids[pairs.image_of_caption], ids)


def chance(pairs):
    """Metrics of a model for which everything is equally similar."""
    return split_metrics(torch.zeros(len(pairs.images), len(pairs.captions)), pairs)


def headline(metrics):
    """Name of the figure that chooses the best epoch and orders the tables."""
    return "mR" if "mR" in metrics else "R1"


# ------------------------------------------------------------------------------------ encoding

def autocast(device, precision):
    """Context in which matrix products are in bf16, if precision is "bf16"; on MPS they stay in fp32."""
    kind = "cuda" if str(device).startswith("cuda") else "cpu"
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def encode_images(model, images, batch_size=128):
    """uint8 array (N, 3, H, W) -> unit features (N, D), float32 on the CPU."""
    features = []
    for start in tqdm(range(0, len(images), batch_size), "encoding images", leave=False, disable=None):
        batch = torch.tensor(images[start:start + batch_size]).to(model.logit_scale.device)
        features.append(model.encode_image(clip.normalize(batch)).cpu())
    return torch.cat(features)


@torch.no_grad()
def encode_texts(model, tokens, batch_size=256):
    """Token ids (M, L) -> unit features (M, D), float32 on the CPU. Each distinct caption is encoded once."""
    lengths = tokens.count_nonzero(dim=1)[:, None]  # unique sorts by it: batches of near lengths
    rows, row_of_caption = torch.cat([lengths, tokens], dim=1).unique(dim=0, return_inverse=True)
    features = []
    for batch in tqdm(rows[:, 1:].split(batch_size), "encoding captions", leave=False, disable=None):
        features.append(model.encode_text(batch.to(model.logit_scale.device)).cpu())
    return torch.cat(features)[row_of_caption]


def evaluate(model, tokenizer, pairs, images, precision="fp32"):
    """Metrics of a model on one split: pairs of data.read, images their uint8 array (N, 3, H, W)."""
    model.eval()
    tokens = tokenizer(pairs.captions, model.config.context_length)
    with autocast(model.logit_scale.device, precision):
        image_features = encode_images(model, images)
        text_features = encode_texts(model, tokens)
    # so that equal features tie: their products may differ in the last bit, so each is multiplied once
    distinct_images, image_rows = image_features.unique(dim=0, return_inverse=True)
    distinct_texts, text_rows = text_features.unique(dim=0, return_inverse=True)
    similarity = (distinct_images @ distinct_texts.T)[image_rows[:, None], text_rows]
    return split_metrics(similarity, pairs)


def caption_notes(tokenizer, captions, context_length, split):
    """What a user should know about captions that are too long -> list of no or one line."""
    texts = [tuple(tokenizer.encode(caption)) for caption in captions]
    cut = sum(len(ids) > context_length for ids in texts)
    merged = len(set(texts)) - len({ids[:context_length - 1] for ids in texts})     # as read, without EOT
    note = f"{split}: {cut} captions exceed {context_length} tokens and are cut; {merged} then equal another"
    return [note] if cut else []


# ------------------------------------------------------------------------------------ runs, tables, curve

def fingerprint(model):
    """16 hex digits for the weights, CLIP's and a method's: a hash of each tensor's first 1024 values."""
    digest = hashlib.sha256()
    tensors = model.openai_state_dict() | adapters.trainable_state(model)
    for name in sorted(tensors):
        beginning = tensors[name].detach().float().flatten()[:1024]
        digest.update(name.encode() + beginning.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_run(name, device="cpu", image_size=None, activation=None, clip_file=None):
    """A run of train.py at its best epoch, or plain CLIP -> (model, tokenizer, settings).

    name: a run's folder or best.pt, or what clip.load_clip takes. image_size: in place of its training's.
    activation: of plain CLIP, as in load_clip. clip_file: where the CLIP of a run is now, if it was moved.
    settings: train.py's, "epoch", "fingerprint" of CLIP. Raises FileNotFoundError or ValueError."""
    saved = {} if name in clip.URLS else clip.read_file(name)       # a run's has "trained", the method's
    settings, source = {"precision": "fp32"}, name                  # source: where CLIP lies
    if "trained" in saved:
        settings = saved["settings"] | {"epoch": saved["epoch"]}
        if "state_dict" not in saved:                               # CLIP did not learn, it is not in the run
            source = clip_file or settings["model"]
    if source not in clip.URLS and not Path(source).exists():
        raise FileNotFoundError(f"{source}, the CLIP of {name}, is not there: give its place by --model FILE")
    if clip_file and clip_file != source:           # it was given, and is of no use
        raise ValueError(f"{name} is a CLIP or holds one: leave out --model {clip_file}")
    if activation and activation != settings.get("activation", activation):
        raise ValueError(f"{name} was trained with {settings['activation']}: leave out --activation")
    model = clip.load_clip(source, image_size or settings.get("image_size"),
                           activation=activation or settings.get("activation"))
    tokenizer = clip.Tokenizer(merges=saved.get("merges"))      # None: OpenAI's
    if model.config.vocab_size != tokenizer.vocab_size:
        raise ValueError(f"{name}: the model knows {model.config.vocab_size} tokens and its tokenizer "
                         f"{tokenizer.vocab_size}; added tokens and other tokenizers are not known here")
    settings["fingerprint"] = fingerprint(model)                    # the method comes later
    if source != name and settings["fingerprint"] != saved["fingerprint"]:
        raise ValueError(f"{name} was trained on other weights than those in {source}")
    if "trained" in saved:
        sizes = {size: settings.get(size) for size in adapters.METHOD_SIZES}
        adapters.add_method(model, settings["method"], **sizes)
        adapters.load_trainable(model, saved["trained"])
    return model.to(device).eval(), tokenizer, settings


def label(settings):
    """What a model is called in a table: what was trained, and by which loss."""
    if "method" not in settings:
        return "zero-shot"
    method = settings["method"]
    names = {"method": method, "backbone": f"full fine-tuning with fixed {method}",
             "all": f"full fine-tuning and {method} at once"}
    name = "full fine-tuning" if method == "none" else names[settings["train"]]
    if settings["model"] in clip.SIZES and settings["model"] not in clip.URLS:      # "tiny" and "small"
        name = "from scratch"
    return f"{name}, {settings['loss']}" + (", same masked" if settings.get("mask_same") else "")


def row_of(model, tokenizer, settings, pairs, images, precision):
    """A row of `table` for one model and split: its label, trained parameters, their share, its metrics."""
    trained, total = settings.get("trained_parameters", 0), sum(p.numel() for p in model.parameters())
    metrics = evaluate(model, tokenizer, pairs, images, precision)
    return label(settings), trained, 100 * trained / total, metrics


def table(rows, more_heads=()):
    """Markdown table, its columns lined up for a terminal too. rows: (label, trained parameters or None,
    share in percent or None, metrics, a string for each of more_heads). Heads: i2t R@1, R@5, ... mR."""
    names = [name.replace("_", " ") if name.endswith("R@1") else name.split("_")[-1] for name in rows[0][3]]
    lines = [["", "trained", "share", *names, *more_heads]]
    for name, trained, share, metrics, *cells in rows:
        size = ["", ""] if trained is None else [f"{trained:,}".replace(",", " "), f"{share:.2f} %"]
        lines.append([name, *size, *(f"{value:.2f}" for value in metrics.values()), *cells])
    widths = [max(len(cell) for cell in column) for column in np.array(lines).T]
    text = []
    for name, *cells in lines:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        text.append(f"| {name.ljust(widths[0])} | {' | '.join(padded)} |")
    text.insert(1, "|:--" + "|--:" * (len(widths) - 1) + "|")
    return "\n".join(text)


def run_tables(names):
    """Markdown of finished runs, folders with a metrics.json: a table for each data set, the best run last. A
    row: means, and the std of mR or R1, of runs that began alike and differ in INCIDENTAL settings alone."""
    groups = {}         # {(data set, key): {file: row}}; rows of one key become one, their mean
    for name in names:
        for file in sorted(Path(path).resolve() for path in glob.glob(f"{name}/metrics.json")):
            with clip.loading(file):
                run = json.loads(file.read_text(encoding="utf-8"))
                settings = run["settings"]
                *starts, own = run["rows"]          # starts: chance, and what the run began with
                dataset = f"{settings['dataset']} {run['split']} {Path(settings['data_root'] or '').name}"
            for row in starts:                      # overwrites an earlier run's: equal ones are one row
                groups[dataset, json.dumps(row)] = {file: row}
            shared = {key: value for key, value in settings.items() if key not in INCIDENTAL}
            shared["starts"] = [starts[:1], [row[0] for row in starts[1:]]]  # same test set, same beginning
            own[0] += f" ({file.parent.name})"
            groups.setdefault((dataset, json.dumps(shared, sort_keys=True)), {})[file] = own
    if not groups:
        raise ValueError(f"no finished run, a folder with metrics.json, in {', '.join(names)}")
    tables = {}
    for (dataset, _), row_of_file in groups.items():
        rows = list(row_of_file.values())
        name, trained, share, metrics = rows[0]
        mean = {key: np.mean([row[3][key] for row in rows]) for key in metrics}
        values = [row[3][headline(metrics)] for row in rows]
        std = f"{np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        tables.setdefault(dataset, []).append((name, trained, share, mean, std, str(len(values))))
    text = []
    for dataset, rows in tables.items():
        rows.sort(key=lambda row: (row[1] is not None, row[3][headline(row[3])]))       # chance first
        text.append(f"### {dataset}\n\n{table(rows, ['std', 'runs'])}")
    return "\n\n".join(text)


def plot_curve(history, path):
    """Training curves as a PNG, a panel for the loss and one for validation mR or R1.
    history: a dict for each epoch with "epoch", "loss" and, with a val split, "val_mR" or "val_R1"."""
    titles = {"loss": "loss by epoch", "val_mR": "val mR in % by epoch", "val_R1": "val R1 in % by epoch"}
    keys = [key for key in titles if key in history[0]]
    image = Image.new("RGB", (1000 * len(keys), 720), "white")      # drawn at twice its size: smooth lines
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(26)
    for panel, key in enumerate(keys):
        values = np.array([row[key] for row in history])
        left, top, width, height = 1000 * panel + 150, 100, 800, 500        # of the panel's frame
        x = left + width * (np.arange(len(values)) + 0.5) / len(values)
        y = top + height * (0.94 - 0.88 * (values - values.min()) / (np.ptp(values) or 1))
        draw.rectangle((left, top, left + width, top + height), outline="#dddddd", width=2)
        draw.text((left, top - 40), titles[key], "black", font, anchor="lm")
        draw.line(list(zip(x, y)), "#1f5fa8", 5, joint="curve")
        for n in range(len(values)):
            draw.circle((x[n], y[n]), 7, "#1f5fa8")
            if n % (len(values) // 10 + 1) == 0:                    # at most ten epochs are written
                draw.text((x[n], top + height + 30), str(history[n]["epoch"]), "black", font, anchor="mm")
        for n in (values.argmin(), values.argmax()):
            draw.text((left - 15, y[n]), f"{values[n]:.3g}", "black", font, anchor="rm")
    image.resize((500 * len(keys), 360), Image.LANCZOS).save(path)


# ------------------------------------------------------------------------------------ search

def find_files(folder):
    """All files under a folder, at any depth, links followed; not hidden ones, such as macOS's ._*."""
    paths, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in seen:            # a link that leads back
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [os.path.join(parent, name) for name in sorted(names) if not name.startswith(".")]
    return paths


def encode_files(model, paths, folder):
    """Unit features of image files -> {path: (D,)}. Unreadable and blank ones are told on stderr, left out.
    `folder` keeps them: each PIECE new images are a file there, and files are added, never changed."""
    folder.mkdir(parents=True, exist_ok=True)
    saved, bad = {}, {}
    for file in folder.glob("*.pt"):
        piece = clip.read_file(file)
        saved.update(zip(piece["keys"], piece["features"]))
    keys = {p: f"{os.path.getsize(p)} {os.path.getmtime(p)} {p}" for p in paths if os.path.isfile(p)}
    new = [path for path in paths if path not in keys or keys[path] not in saved]   # missing ones become bad
    for start in range(0, len(new), PIECE):
        pixels = {}
        for path, result in data.decode_all(new[start:start + PIECE], model.config.image_size):
            if isinstance(result, ValueError):
                bad[path] = str(result)
            elif data.is_blank(result):
                bad[path] = f"{path} is blank"
            else:
                pixels[keys[path]] = result
        if pixels:
            features = encode_images(model, np.stack(list(pixels.values())))
            torch.save({"keys": list(pixels), "features": features}, folder / f"{os.getpid()}.draft")
            os.replace(folder / f"{os.getpid()}.draft", folder / f"{os.urandom(8).hex()}.pt")
            saved.update(zip(pixels, features))
    if bad:
        kinds = Counter(Path(path).suffix.lower() or "no suffix" for path in bad)
        print(f"eval.py: left out {dict(kinds)}, first: {'; '.join(list(bad.values())[:5])}", file=sys.stderr)
    return {path: saved[key] for path, key in keys.items() if key in saved}


def search(args, pairs, model, tokenizer, settings):
    """Print the images nearest to a sentence, the nearest first, with their cosine similarity."""
    paths = find_files(args.gallery) if args.gallery else pairs.images
    config, precision = model.config, settings["precision"]
    folder = f"features-{fingerprint(model)}-{config.image_size}-{config.activation}-{precision}"
    with autocast(args.device, precision):
        query = encode_texts(model, tokenizer([args.query], config.context_length))[0]
        features = encode_files(model, paths, Path(args.cache) / folder)
    if not features:
        raise ValueError(f"{args.gallery or args.dataset} is not there or holds no image that can be used")
    similarity = torch.stack(list(features.values())) @ query
    for rank, n in enumerate(similarity.argsort(descending=True, stable=True)[:args.top].tolist(), start=1):
        print(f"{rank:4d}  {similarity[n]:.4f}  {list(features)[n]}")


# ------------------------------------------------------------------------------------ the command line

def parse(argv):
    """Settings from the command line; argparse's errors are one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"eval.py: error: {message}\n")
    flag = parser.add_argument
    one_of = parser.add_mutually_exclusive_group(required=True).add_argument
    one_of("run", nargs="?", help="a run's folder or best.pt; or CLIP: ViT-B/32 ..., a weight file")
    one_of("--table", nargs="+", metavar="RUN", help="a table of finished runs")
    flag("--query", metavar="TEXT", help="the images nearest to a sentence")
    flag("--gallery", metavar="DIR", type=os.path.abspath, help="search this folder, not the data set")
    flag("--top", type=int, default=10, help="images listed (default: %(default)s)")
    flag("--dataset", choices=data.DATASETS, help="by default the run's own")
    flag("--data-root", metavar="DIR", type=os.path.abspath, help="its folder; by default that of the run")
    flag("--split", default="test", choices=("train", "val", "test"), help="(default: %(default)s)")
    flag("--skip-bad", action="store_true", help="test without the images that cannot be read")
    flag("--model", metavar="FILE", help="where the CLIP of a run is now, if it was moved")
    flag("--activation", choices=("quick_gelu", "gelu"), help="of plain CLIP; by default what its files tell")
    flag("--cache", default="runs/cache", metavar="DIR", help="of images and features (default: %(default)s)")
    flag("--device", choices=DEVICES, default="cuda" if "cuda" in DEVICES else "cpu")
    args = parser.parse_args(argv)
    if (args.gallery or args.query is not None) and not (args.query or "").strip():
        parser.error("a search needs words: --query TEXT, alone or with --gallery DIR")
    return args


def test(args, pairs, model, tokenizer, settings):
    """Print the metrics of a model on a split, beside chance."""
    splits, images, notes = data.load({args.split: pairs}, model.config.image_size, args.cache, args.skip_bad)
    pairs, images = splits[args.split], images[args.split]
    notes += caption_notes(tokenizer, pairs.captions, model.config.context_length, args.split)
    print(*notes, f"model  {args.run}: activation {model.config.activation}",
          f"data   {args.split}: {len(pairs.images)} images, {len(pairs.captions)} captions", sep="\n")
    own = row_of(model, tokenizer, settings, pairs, images, settings["precision"])
    print("\n" + table([("chance", None, None, chance(pairs)), own]))


def main(argv=None):
    """A table, a search or a test. The user's mistakes end in one line and exit code 2."""
    sys.stdout.reconfigure(errors="backslashreplace")   # file names may be in any encoding
    args = parse(argv)
    try:
        if args.table:
            print(run_tables(args.table))
            return
        model, tokenizer, settings = load_run(args.run, args.device, None, args.activation, args.model)
        args.dataset = args.dataset or settings.get("dataset")
        if args.dataset == settings.get("dataset"):         # the user named no other
            args.data_root = args.data_root or settings.get("data_root")
        if not (args.dataset or args.gallery):
            raise ValueError(f"{args.run} is no run of train.py: give --dataset, or --query and --gallery")
        pairs = None if args.gallery else data.read(args.dataset, args.data_root, args.split)
        if args.query:
            search(args, pairs, model, tokenizer, settings)
        else:
            test(args, pairs, model, tokenizer, settings)
    except (ValueError, OSError, torch.cuda.OutOfMemoryError) as error:
        print(f"eval.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\nstopped")


if __name__ == "__main__":
    main()
