"""Evaluation: metrics, the test of a run or of plain CLIP, tables of runs, figures, search.

    python eval.py runs/x                                          a run, on the data set it was trained for
    python eval.py ViT-B/32 --dataset ucm --data-root ucm_precomp  plain CLIP, zero-shot
    python eval.py --table runs/*                                  finished runs side by side, mean and spread
    python eval.py runs/x --query "two boats in a harbour"         search in the run's data set
    python eval.py runs/x --query-image boat.jpg --gallery photos  what looks like an image, in a folder

Retrieval: image to text (i2t), each image ranks all captions; text to image (t2i), each caption ranks all
images. R@K is the percentage of queries with a right item in the top K, mR the mean of the six.
Re-identification: each caption ranks all images, and every image of its person is right; Rank-K, mAP, mINP.

Shapes: N images, M captions, Q queries, G gallery items, B queries of one chunk, D joint width.
"""
import argparse
import contextlib
import glob
import hashlib
import json
import math
import os
import statistics
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import adapters
import clip
import data

CHUNK = 256                     # queries that are ranked at a time
PIECE = 2048                    # images of a gallery whose features are one file
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif")      # of a gallery's images
DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES += ["cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
if torch.backends.mps.is_available():
    DEVICES.append("mps")


# ------------------------------------------------------------------------------------ metrics

def checked(similarity, query_ids, gallery_ids):
    """The same as CPU tensors, float32 (Q, G), int64 (Q,) and (G,); ValueError if they allow no metric."""
    similarity = torch.as_tensor(similarity).float().cpu()
    query_ids = torch.as_tensor(query_ids).long().cpu()
    gallery_ids = torch.as_tensor(gallery_ids).long().cpu()
    Q, G = len(query_ids), len(gallery_ids)
    if similarity.shape != (Q, G) or Q * G == 0:
        raise ValueError(f"similarity {tuple(similarity.shape)} does not fit {Q} queries, gallery of {G}")
    if not similarity.isfinite().all():
        raise ValueError("similarities hold NaN or infinite values: the weights are broken, not just bad")
    alone = (~torch.isin(query_ids, gallery_ids)).nonzero()
    if len(alone):
        raise ValueError(f"query {int(alone[0])} (id {int(query_ids[alone[0]])}) has no match in the gallery")
    return similarity, query_ids, gallery_ids


def recalls(similarity, query_ids, gallery_ids):
    """Percent of queries with a right item, one of their id, in the top k -> {1: ..., 5: ..., 10: ...}.

    Equal captions tie exactly, so a tie counts at its expected value under random order: a model that gives
    everything the same score gets chance, not 100 or 0. The best right item of a query has `above` items of a
    higher score before it and is one of `tied` items of its score, `right_tied` of them right. The first i of
    these are all wrong with probability prod_{n < i} (tied - right_tied - n) / (tied - n).
    """
    hits = {1: 0.0, 5: 0.0, 10: 0.0}
    for start in range(0, len(similarity), CHUNK):
        scores = similarity[start:start + CHUNK]                              # (B, G)
        right = query_ids[start:start + CHUNK, None] == gallery_ids           # (B, G)
        best = scores.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
        above = (scores > best).sum(dim=1).double()                           # (B,)
        tied = (scores == best).sum(dim=1).double()
        right_tied = (right & (scores == best)).sum(dim=1).double()
        miss = torch.ones_like(above)                   # probability that no right item has come so far
        for rank in range(1, 11):
            drawn = rank - 1 - above                    # tied items before this rank; below 0: none, nor here
            wrong_left = (tied - right_tied - drawn).clamp(min=0)
            left = (tied - drawn).clamp(min=1)
            miss = torch.where(drawn >= 0, miss * wrong_left / left, miss)
            if rank in hits:
                hits[rank] += (1 - miss).sum().item()
    return {k: 100 * hit / len(similarity) for k, hit in hits.items()}


def retrieval_metrics(similarity, image_of_caption):
    """Recalls of image-text retrieval in percent, ties at their expected value.

    similarity (N, M): images x captions. image_of_caption (M,): the image that each caption is about.
    Returns {"i2t_R@1", "i2t_R@5", "i2t_R@10", "t2i_R@1", "t2i_R@5", "t2i_R@10", "mR"}.
    Example, two images, captions 0 and 1 about the first, caption 2 about the second:
    [[.9, .1, .3], [.2, .3, .4]] -> i2t R@1 100 (captions 0 and 2 come first), t2i R@1 66.7 (for caption 1 the
    second image comes first).
    Raises ValueError for NaN, shapes that do not fit, an image without caption.
    """
    images = torch.arange(len(similarity))
    similarity, images, captions = checked(similarity, images, image_of_caption)
    checked(similarity.T, captions, images)
    i2t = recalls(similarity, images, captions)
    t2i = recalls(similarity.T, captions, images)
    metrics = {f"i2t_R@{k}": recall for k, recall in i2t.items()}
    metrics |= {f"t2i_R@{k}": recall for k, recall in t2i.items()}
    return {**metrics, "mR": sum(metrics.values()) / 6}


def reid_metrics(similarity, query_ids, gallery_ids):
    """Metrics of re-identification in percent, means over the queries; no camera filter.

    similarity (Q, G): captions x images; an image with the id of the caption is right: ids (Q,) and (G,).
    Returns {"R1", "R5", "R10", "mAP", "mINP"}. With right images at ranks r_1 < ... < r_P, Rank-k is
    [r_1 <= k], AP the mean of j / r_j (Market-1501), INP is P / r_P (arXiv 2001.04193). In R1, R5, R10 ties
    count at their expected value. For mAP and mINP the gallery is shuffled before a stable sort: in the order
    of the file the images of a person are neighbours, and a collapsed model would score more than chance.
    Raises ValueError for NaN, shapes that do not fit, a query without match.
    """
    similarity, query_ids, gallery_ids = checked(similarity, query_ids, gallery_ids)
    metrics = {f"R{k}": recall for k, recall in recalls(similarity, query_ids, gallery_ids).items()}
    shuffle = torch.randperm(len(gallery_ids), generator=torch.Generator().manual_seed(0))
    gallery_ids = gallery_ids[shuffle]
    ranks = torch.arange(1, len(gallery_ids) + 1).double()                    # (G,)
    AP, INP = [], []
    for start in range(0, len(similarity), CHUNK):
        scores = similarity[start:start + CHUNK][:, shuffle]                  # (B, G)
        order = scores.argsort(dim=1, descending=True, stable=True)
        right = gallery_ids[order] == query_ids[start:start + CHUNK, None]    # (B, G), by rank
        precision = right.cumsum(dim=1) / ranks                               # j / r_j at the j-th right one
        P = right.sum(dim=1)                                                  # (B,)
        AP.append(precision.where(right, 0).sum(dim=1) / P)
        INP.append(P / ranks.where(right, 0).amax(dim=1))
    return {**metrics, "mAP": 100 * torch.cat(AP).mean().item(), "mINP": 100 * torch.cat(INP).mean().item()}


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
    """The one figure that chooses the best epoch and orders the tables -> (name, value)."""
    name = "mR" if "mR" in metrics else "R1"
    return name, metrics[name]


# ------------------------------------------------------------------------------------ encoding

def autocast(device, precision):
    """Context in which matrix products are in bf16, if precision is "bf16"."""
    if precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


@torch.no_grad()
def encode_images(model, images, batch_size=128):
    """uint8 array (N, 3, H, W) -> unit features (N, D), float32 on the CPU."""
    features = []
    for start in tqdm(range(0, len(images), batch_size), "encoding images", leave=False, disable=None):
        batch = torch.from_numpy(np.array(images[start:start + batch_size]))
        batch = clip.normalize(batch.to(model.logit_scale.device))
        features.append(model.encode_image(batch).float().cpu())
    return torch.cat(features)


@torch.no_grad()
def encode_texts(model, tokens, batch_size=256):
    """Token ids (M, L) -> unit features (M, D), float32 on the CPU. Each distinct caption is encoded once."""
    distinct, distinct_of_caption = tokens.unique(dim=0, return_inverse=True)
    order = distinct.count_nonzero(dim=1).argsort(stable=True)      # short ones together: less padding
    features = []
    for rows in tqdm(order.split(batch_size), "encoding captions", leave=False, disable=None):
        batch = distinct[rows].to(model.logit_scale.device)
        features.append(model.encode_text(batch).float().cpu())
    return torch.cat(features)[order.argsort()][distinct_of_caption]


def evaluate(model, tokenizer, pairs, images, precision="fp32"):
    """Metrics of a model on one split: pairs of data.read, images their uint8 array (N, 3, H, W)."""
    model.eval()
    tokens = tokenizer(pairs.captions, model.config.context_length)
    with autocast(model.logit_scale.device, precision):
        image_features = encode_images(model, images)
        text_features = encode_texts(model, tokens)
    # equal columns of a matrix product may differ in the last bit: each distinct feature is multiplied once,
    # so that equal captions and equal images tie
    distinct_images, image_rows = image_features.unique(dim=0, return_inverse=True)
    distinct_texts, text_rows = text_features.unique(dim=0, return_inverse=True)
    similarity = (distinct_images @ distinct_texts.T)[image_rows[:, None], text_rows]
    return split_metrics(similarity, pairs)


def caption_notes(tokenizer, captions, context_length, split):
    """What a user should know about captions that are too long -> list of no or one line."""
    lengths = [tokenizer.length(caption) for caption in captions]
    cut = sum(length > context_length for length in lengths)
    if cut == 0:
        return []
    full = [caption for caption, length in zip(captions, lengths) if length >= context_length]
    distinct = tokenizer(full, max(lengths)).unique(dim=0)
    kept = distinct[:, :context_length - 1]             # what is left before EOT
    _, counts = kept.unique(dim=0, return_counts=True)
    equal = int(counts[counts > 1].sum())
    return [f"{split}: {cut} captions are longer than {context_length} tokens and are cut; "
            f"{equal} become equal"]


# ------------------------------------------------------------------------------------ runs

def fingerprint(model):
    """16 hex digits that tell one set of weights from another, CLIP's own and a method's: a method fits only
    the CLIP that it was trained on, features on disk only the model that they are from."""
    digest = hashlib.sha256()
    tensors = {**model.openai_state_dict(), **adapters.trainable_state(model)}
    for name in sorted(tensors):
        beginning = tensors[name].detach().float().flatten()[:1024]
        digest.update(name.encode() + beginning.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_vocabulary(name, model, tokenizer):
    """Raise ValueError if a model was made for another tokenizer: it would look up the wrong words."""
    if model.config.vocab_size != tokenizer.vocab_size:
        raise ValueError(f"{name}: the model knows {model.config.vocab_size} tokens and its tokenizer "
                         f"{tokenizer.vocab_size}; added tokens and other tokenizers are not known here")


def load_run(path, device="cpu", weights=None, image_size=None, activation=None):
    """A run of train.py at its best epoch -> (model with its method, tokenizer, settings).

    path: the run's folder or best.pt. weights: where the CLIP that a method was trained on is now, if it was
    moved. image_size, activation: other than the run's own. settings: train.py's, "epoch", and "fingerprint"
    (of CLIP without the method). Raises FileNotFoundError, or ValueError for another file or another CLIP.
    """
    saved = clip.read_file(path)
    if "settings" not in saved or "fingerprint" not in saved:
        raise ValueError(f"{path} is no best.pt of train.py: it has no settings or no fingerprint")
    settings = dict(saved["settings"])
    whole = "state_dict" in saved                       # CLIP's own weights learned, and are in the file
    source = path if whole else weights or settings["model"]
    if whole and weights:
        raise ValueError(f"{path} holds its own CLIP: leave out --model {weights}")
    if source not in clip.URLS and not Path(source).exists():
        raise FileNotFoundError(f"{path} holds a method for the CLIP in {source}, which is not there: "
                                "tell where it is now by --model FILE")
    image_size, activation = image_size or settings["image_size"], activation or settings["activation"]
    model = clip.load_clip(source, image_size, activation=activation)
    settings.update(epoch=saved["epoch"], fingerprint=fingerprint(model))
    if not whole and settings["fingerprint"] != saved["fingerprint"]:
        raise ValueError(f"{path} was trained on other weights than those in {source}")
    tokenizer = clip.Tokenizer(merges=saved["merges"])
    check_vocabulary(path, model, tokenizer)
    adapters.add_method(model, settings["method"], **settings["sizes"])
    adapters.load_trainable(model, saved["trained"])
    return model.to(device).eval(), tokenizer, settings


def load_model(name, device="cpu", image_size=None, activation=None):
    """A run, or plain CLIP weights with their tokenizer -> (model, tokenizer, settings).

    name: a run's folder or best.pt, or what clip.load_clip takes. Raises FileNotFoundError or ValueError.
    """
    if name not in clip.URLS and "settings" in clip.read_file(name):
        return load_run(name, device, image_size=image_size, activation=activation)
    model = clip.load_clip(name, image_size, device, activation)
    tokenizer = clip.Tokenizer(name)
    check_vocabulary(name, model, tokenizer)
    return model, tokenizer, {"precision": "fp32"}


# ------------------------------------------------------------------------------------ tables

# settings that do not make a run another experiment, or that repeat others
INCIDENTAL = ("seed", "out", "init", "resume", "device", "data_root", "grad_checkpointing", "sizes",
              "trained_parameters")


def label(settings):
    """What a model is called in a table: what was trained, and by which loss."""
    if "method" not in settings:
        return "zero-shot"
    method = settings["method"]
    names = {"method": method, "backbone": f"full fine-tuning with fixed {method}",
             "all": f"full fine-tuning and {method} at once"}
    name = "full fine-tuning" if method == "none" else names[settings["train"]]
    if settings["model"] in clip.SIZES and settings["model"] not in clip.URLS:
        name = "from scratch"
    name += f", {settings['loss']}"
    return name + ", same masked" if settings.get("mask_same") else name


def table(rows, heads=()):
    """Markdown table, its columns lined up for a terminal too.

    rows: (label, trained parameters or None, share in percent or None, metrics, a string for each head).
    """
    names = [name.replace("_", " ") if name.endswith("R@1") else name.split("_")[-1] for name in rows[0][3]]
    lines = [["", "trained", "share", *names, *heads]]
    for name, trained, share, metrics, *cells in rows:
        size = ["", ""] if trained is None else [f"{trained:,}".replace(",", " "), f"{share:.2f} %"]
        lines.append([name, *size, *(f"{value:.2f}" for value in metrics.values()), *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        text.append("| " + " | ".join(cells) + " |")
    text.insert(1, "|:--" + "|--:" * (len(widths) - 1) + "|")
    return "\n".join(text)


def run_tables(names):
    """Tables of the finished runs among `names`, folders with a metrics.json -> {data set: markdown}.

    A row is the mean over runs that differ by the seed alone, std the standard deviation of their mR or R1.
    """
    groups = {}                                         # (heading, label, what seeds share): {seed: ...}
    for name in names:
        for file in sorted(glob.glob(f"{name}/metrics.json")):      # Windows leaves the star of runs/* to us
            run = json.loads(Path(file).read_text(encoding="utf-8"))
            settings = run["settings"]
            heading = f"{settings['dataset']} {run['split']} {Path(settings['data_root'] or '').name}".strip()
            for row in run["rows"]:
                shared = {key: value for key, value in settings.items() if key not in INCIDENTAL}
                shared["init"] = bool(settings.get("init"))         # each seed may start from its own run
                if not row[1]:                          # chance and zero-shot: one row for equal metrics
                    shared = row[3]
                key = heading, row[0], json.dumps(shared, sort_keys=True)
                groups.setdefault(key, {})[settings["seed"]] = row, run
    if not groups:
        raise ValueError(f"no finished run (a folder with train.py's metrics.json) in {', '.join(names)}")
    rows = {}                                           # heading: rows of its table
    for (heading, name, _), members in groups.items():
        metrics = [row[3] for row, _ in members.values()]
        mean = {key: statistics.fmean(one[key] for one in metrics) for key in metrics[0]}
        row, first = next(iter(members.values()))
        _, trained, share, _ = row
        cells = [""] * 5
        if row == first["rows"][-1]:                    # the run itself, not what it started from
            values = [headline(one)[1] for one in metrics]
            spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
            minutes = statistics.fmean(run["minutes"] for _, run in members.values())
            memory = max(run["memory_gb"] or 0 for _, run in members.values())     # known on a GPU only
            cells = [spread, str(len(values)), f"{minutes:.1f}", f"{memory:.1f}" if memory else "",
                     first["settings"]["out"]]
        rows.setdefault(heading, []).append((name, trained, share, mean, *cells))
    tables = {}
    for heading, unsorted in rows.items():
        best_last = sorted(unsorted, key=lambda row: (row[1] is not None, headline(row[3])[1]))
        tables[heading] = table(best_last, ("std", "seeds", "minutes", "GB", "first run"))
    return tables


# ------------------------------------------------------------------------------------ figure

def plot_curve(history, path):
    """Training curve as a PNG: the loss (left axis) and validation mR or R1 (right axis), least to most.

    history: a dict for each epoch with "epoch", "loss" and, where there is a val split, "val_mR" or "val_R1".
    """
    image = Image.new("RGB", (1440, 720), "white")      # drawn at twice the size and halved: smooth lines
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(26)
    left, right, top, bottom, ink = 160, 1280, 120, 580, "#333333"
    draw.rectangle((left - 30, top - 30, right + 30, bottom + 30), outline="#dddddd", width=2)
    step = (right - left) / max(1, len(history) - 1)
    across = [left + step * n for n in range(len(history))] if len(history) > 1 else [(left + right) / 2]
    for n in range(0, len(history), math.ceil(len(history) / 10)):
        draw.text((across[n], bottom + 60), str(history[n]["epoch"]), ink, font, anchor="mm")
    draw.text(((left + right) / 2, bottom + 105), "epoch", ink, font, anchor="mm")
    curves = [("loss", "loss", "#c0392b", left - 45, "r", "l")]
    for name in ("mR", "R1"):
        if f"val_{name}" in history[0]:
            curves.append((f"val_{name}", f"validation {name} in %", "#1f5fa8", right + 45, "l", "r"))
    for key, title, colour, x, outwards, inwards in curves:
        values = [row[key] for row in history]
        least, most = min(values), max(values)
        if least == most:                               # one epoch: its point is drawn in the middle
            least, most = least - 0.5, most + 0.5
        scale = (bottom - top) / (most - least)
        points = [(across[n], bottom - (value - least) * scale) for n, value in enumerate(values)]
        draw.line(points, colour, 5, joint="curve")
        for point in points:
            draw.circle(point, 10 if key == "loss" else 6, colour)      # both are seen where they meet
        for value in (least, (least + most) / 2, most):
            y = bottom - (value - least) * scale
            draw.text((x, y), f"{value:.4g}", colour, font, anchor=outwards + "m")
        draw.text((x, 50), title, colour, font, anchor=inwards + "m")
    image.resize((720, 360), Image.LANCZOS).save(path)


# ------------------------------------------------------------------------------------ search

def find_images(folder):
    """Image files under a folder, at any depth, links followed; what else lies there is counted on stderr."""
    paths, others, seen = [], Counter(), set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in seen:            # a link that leads back
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        for name in sorted(names):
            path, suffix = os.path.join(parent, name), os.path.splitext(name)[1].lower()
            if name.startswith("._"):                   # macOS's notes beside a file
                continue
            if suffix in SUFFIXES and os.path.isfile(path):
                paths.append(path)
            else:
                others[suffix or "no suffix"] += 1
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        print(f"eval.py: left out, files that are no readable images: {counts}", file=sys.stderr)
    if not paths:
        raise FileNotFoundError(f"{folder} is not there or holds no image ({', '.join(SUFFIXES)})")
    return paths


def encode_files(model, paths, folder):
    """Unit features of image files -> {path: (D,)}; what is unreadable or blank is named on stderr, left out.

    `folder` keeps them for the next search, in files of at most PIECE images that are never written again, so
    the work is linear in the number of images. A file whose size or time has changed is encoded anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved, keys, bad, number = {}, {}, [], 0
    for piece in sorted(folder.glob("*.pt")):
        content = clip.read_file(piece)
        saved.update(zip(content["keys"], content["features"]))
        number = int(piece.stem) + 1
    for path in paths:
        state = os.stat(path)
        keys[path] = f"{state.st_size} {state.st_mtime_ns} {os.path.abspath(path)}"
    new = [path for path in paths if keys[path] not in saved]
    for start in range(0, len(new), PIECE):
        with ThreadPoolExecutor() as pool:
            size = model.config.image_size
            jobs = {path: pool.submit(data.decode, path, size) for path in new[start:start + PIECE]}
        images = {}
        for path, job in jobs.items():
            if job.exception():
                bad.append(str(job.exception()))
            elif data.is_blank(job.result()):
                bad.append(f"{path} is blank")
            else:
                images[keys[path]] = job.result()
        if images:
            features = encode_images(model, np.stack(list(images.values())))
            saved.update(zip(images, features))
            torch.save({"keys": list(images), "features": features}, folder / "draft")
            os.replace(folder / "draft", folder / f"{number:06d}.pt")         # never half a file
            number += 1
    if bad:
        print(f"eval.py: {len(bad)} images are left out: {'; '.join(bad[:20])}", file=sys.stderr)
    return {path: saved[keys[path]] for path in paths if keys[path] in saved}


def search(args, model, tokenizer, settings):
    """Print the images nearest to a sentence or an image; right and wrong if it is a caption of the split."""
    right = set()
    if args.gallery:
        paths = find_images(args.gallery)
    else:
        pairs = read_pairs(args, settings)
        paths = pairs.images
        ids = pairs.ids or range(len(paths))            # all images of a person are right
        captions = zip(pairs.image_of_caption, pairs.captions)
        wanted = {ids[image] for image, caption in captions if caption == args.query}
        right = {path for path, number in zip(paths, ids) if number in wanted}
    gallery = os.path.abspath(args.gallery or os.path.dirname(paths[0]))
    key = repr((fingerprint(model), model.config, settings["precision"], gallery))
    folder = Path(args.cache) / f"features-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
    with autocast(args.device, settings["precision"]):
        if args.query_image:
            query = encode_images(model, data.decode(args.query_image, model.config.image_size)[None])[0]
        else:
            query = encode_texts(model, tokenizer([args.query], model.config.context_length))[0]
        features = encode_files(model, paths, folder)
    if not features:
        raise ValueError(f"none of the {len(paths)} images can be used")
    scores = torch.stack(list(features.values())) @ query
    found = list(features)
    for rank, image in enumerate(scores.argsort(descending=True, stable=True)[:args.top].tolist(), 1):
        mark = ""
        if right:
            mark = "right" if found[image] in right else "wrong"
        print(f"{rank:4d}  {scores[image]:.4f}  {found[image]}  {mark}")


# ------------------------------------------------------------------------------------ the command line

def parse(argv):
    """Settings from the command line; argparse's errors are one line."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.error = lambda message: parser.exit(2, f"eval.py: error: {message}\n")
    flag = parser.add_argument
    flag("run", nargs="?", help="a run's folder or best.pt; plain CLIP: ViT-B/32 ..., or a weight file")
    flag("--table", nargs="+", metavar="RUN", help="a table of finished runs")
    flag("--query", metavar="TEXT", help="the images nearest to a sentence; marked if it is a caption")
    flag("--query-image", metavar="FILE", help="the images nearest to an image")
    flag("--gallery", metavar="DIR", help="search the images of this folder instead of the data set's")
    flag("--top", type=int, default=10, help="images listed (default: %(default)s)")
    flag("--dataset", choices=data.DATASETS, help="by default the run's own")
    flag("--data-root", metavar="DIR", help="its folder; by default the run's own")
    flag("--split", default="test", choices=("train", "val", "test"), help="(default: %(default)s)")
    flag("--skip-bad", action="store_true", help="test without the images that cannot be read")
    flag("--model", metavar="FILE", help="where the CLIP of a run is now, if it was moved")
    flag("--activation", choices=("quick_gelu", "gelu"), help="of weights that do not tell")
    flag("--cache", default="runs/cache", metavar="DIR", help="of images and features (default: %(default)s)")
    flag("--device", choices=DEVICES, default="cuda" if "cuda" in DEVICES else "cpu",
         help="(default: %(default)s)")
    args = parser.parse_args(argv)
    queries = [query for query in (args.query, args.query_image) if query is not None]
    if (args.run is None) == (args.table is None):
        parser.error("give one run, or --table with finished runs")
    if len(queries) > 1 or any(not query.strip() for query in queries):
        parser.error("give --query or --query-image, and neither may be empty")
    if args.gallery and not queries:
        parser.error("--gallery is searched with --query or --query-image")
    if args.top < 1:
        parser.error(f"--top {args.top}: it is 1 or more")
    return args


def read_pairs(args, settings):
    """The split that the flags name, by default of the run's own data set."""
    dataset, root = args.dataset or settings.get("dataset"), args.data_root
    if dataset is None:
        raise ValueError(f"{args.run} is no run of train.py: tell by --dataset or --gallery what to test on")
    if dataset == settings.get("dataset"):
        root = root or settings["data_root"]
    return data.read(dataset, root, args.split)


def test(args, model, tokenizer, settings):
    """Print the metrics of a model on a split, beside chance."""
    splits = {args.split: read_pairs(args, settings)}
    splits, images, notes = data.load(splits, model.config.image_size, args.cache, args.skip_bad)
    pairs, images = splits[args.split], images[args.split]
    notes += caption_notes(tokenizer, pairs.captions, model.config.context_length, args.split)
    for note in notes:
        print(note)
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"model  {args.run}: {total:,} parameters, activation {model.config.activation}")
    print(f"data   {args.split}: {len(pairs.images)} images, {len(pairs.captions)} captions\n")
    metrics = evaluate(model, tokenizer, pairs, images, settings["precision"])
    trained = settings.get("trained_parameters", 0)
    print(table([("chance", None, None, chance(pairs)),
                 (label(settings), trained, 100 * trained / total, metrics)]))


def main(argv=None):
    """A table, a test or a search. The user's mistakes end in one line and exit code 2, Ctrl-C in 130."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")   # file names may be in any encoding
    args = parse(argv)
    try:
        if args.table:
            for heading, text in run_tables(args.table).items():
                print(f"### {heading}\n\n{text}\n")
            return
        if args.model:
            model, tokenizer, settings = load_run(args.run, args.device, args.model,
                                                  activation=args.activation)
        else:
            model, tokenizer, settings = load_model(args.run, args.device, activation=args.activation)
        if args.device == "mps":
            settings["precision"] = "fp32"              # bf16 is slow or missing there
        if args.query or args.query_image:
            search(args, model, tokenizer, settings)
        else:
            test(args, model, tokenizer, settings)
    except (ValueError, OSError, torch.cuda.OutOfMemoryError) as error:
        print(f"eval.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
