"""Evaluation: recall@K with ties at their expected value, test of a run or of plain CLIP, tables and pictures.

    python eval.py runs/x                                       a run, on the data set it was trained for
    python eval.py runs/x --dataset ucm --data-root ucm_precomp  ... or on another one
    python eval.py ViT-B/32 --dataset ucm --data-root ucm_precomp  plain CLIP, zero-shot
    python eval.py --table runs/*                               finished runs side by side, mean and spread over seeds

Retrieval protocol: i2t, each of N pictures ranks all M captions, and the best of its own counts; t2i, each caption
ranks the N pictures. R@K is the percentage ranked in the top K, mR the mean of the six. Many captions of these
data sets are identical and tie exactly, so a tie counts as its expected value under random order: a collapsed model
scores chance, and not 100 or whatever the sort happens to do.

Shapes: N pictures, M captions, Q queries, G gallery items, D joint width.
"""
import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import adapters
import clip
import data

RECALLS = [f"{way}_R@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]


# ---------------------------------------------------------------------------------------------- metrics

def hit_rates(similarity, query_ids, gallery_ids, ks=(1, 5, 10), chunk=1024):
    """Probability that the top K holds an item of the query's own id, averaged over queries -> one value per K.

    similarity (Q, G). With g items strictly above the best own item's score, and t items tied with it of which p are
    own, P(hit) = 1 - C(t-p, K-g) / C(t, K-g): the chance that K-g draws out of the tied ones meet an own one.
    Worked in chunks of queries, so that only `chunk` x G of anything but the similarities is in memory.
    """
    hits = torch.zeros(len(ks), dtype=torch.float64)
    for rows in torch.arange(len(similarity)).split(chunk):
        scores = similarity[rows]
        if not torch.isfinite(scores).all():
            raise ValueError("similarities hold NaN or infinite values: the features are broken, not just bad")
        own = query_ids[rows][:, None] == gallery_ids[None, :]
        if not own.any(dim=1).all():
            missing = rows[~own.any(dim=1)][0]
            raise ValueError(f"query {int(missing)} (id {int(query_ids[missing])}) has no match in the gallery")
        best = scores.masked_fill(~own, float("-inf")).amax(dim=1, keepdim=True)
        above = (scores > best).sum(dim=1).double()                           # g
        tied = (scores == best).sum(dim=1).double()                           # t
        tied_own = ((scores == best) & own).sum(dim=1).double()               # p
        for n, k in enumerate(ks):
            draws, miss = (k - above).clamp(min=0), torch.ones(len(rows), dtype=torch.float64)
            for i in range(k):      # C(t-p, d) / C(t, d) = product over i < d of (t-p-i) / (t-i)
                drawn = (i < draws) & (i < tied)
                miss = torch.where(drawn, miss * ((tied - tied_own - i).clamp(min=0) / (tied - i).clamp(min=1)), miss)
            hits[n] += (1 - miss).sum()
    return (100 * hits / len(similarity)).tolist()


def retrieval_metrics(similarity, image_of_caption):
    """Recalls of image-text retrieval in percent, ties at their expected value (see the head of this file).

    similarity (N, M): pictures x captions. image_of_caption (M,): the picture each caption is about.
    Returns {"i2t_R@1", "i2t_R@5", "i2t_R@10", "t2i_R@1", "t2i_R@5", "t2i_R@10", "mR"}. Two pictures, captions 0 and 1
    about the first: [[.9, .1, .3], [.2, .3, .4]] -> i2t R@1 100, t2i R@1 66.7 (caption 1 prefers the second picture).
    Raises ValueError for NaN, shapes that do not fit, or a picture without caption.
    """
    similarity = torch.as_tensor(similarity).float().cpu()
    image_of_caption = torch.as_tensor(image_of_caption)
    if similarity.ndim != 2 or image_of_caption.shape != (similarity.shape[1],):
        raise ValueError(f"similarity {tuple(similarity.shape)} (pictures x captions) does not fit "
                         f"{tuple(image_of_caption.shape)} caption indices")
    images = torch.arange(len(similarity))
    recalls = hit_rates(similarity, images, image_of_caption) + hit_rates(similarity.T, image_of_caption, images)
    metrics = dict(zip(RECALLS, recalls))
    metrics["mR"] = sum(recalls) / 6
    return metrics


def chance(pairs):
    """What a model scores for which everything is equally similar."""
    return retrieval_metrics(torch.zeros(1, 1).expand(len(pairs.images), len(pairs.captions)), pairs.image_of_caption)


# ---------------------------------------------------------------------------------------------- encoding

@torch.no_grad()
def encode_images(model, images, batch_size=128):
    """uint8 (N, 3, H, W) array -> unit features (N, D), float32 on the CPU."""
    device = model.logit_scale.device
    features = []
    for i in tqdm(range(0, len(images), batch_size), "encoding pictures", leave=False, disable=None):
        batch = torch.from_numpy(np.array(images[i:i + batch_size])).to(device)
        features.append(model.encode_image(clip.normalize(batch)).float().cpu())
    return torch.cat(features)


@torch.no_grad()
def encode_texts(model, tokens, batch_size=256):
    """Token ids (M, L) -> unit features (M, D), float32 on the CPU. Each distinct caption is encoded once."""
    device = model.logit_scale.device
    distinct, place = tokens.unique(dim=0, return_inverse=True)
    by_length = distinct.count_nonzero(dim=1).argsort(stable=True)            # short with short: less padding
    features = torch.empty(len(distinct), model.config.embed_dim)
    for rows in tqdm(by_length.split(batch_size), "encoding captions", leave=False, disable=None):
        features[rows] = model.encode_text(distinct[rows].to(device)).float().cpu()
    return features[place]


def evaluate(model, tokenizer, pairs, images, precision="fp32"):
    """Recalls of one model on one split: pairs from a reader of data.py, images its uint8 array (N, 3, H, W)."""
    model.eval()
    tokens = tokenizer(pairs.captions, model.config.context_length)
    with torch.autocast(model.logit_scale.device.type, torch.bfloat16, enabled=precision == "bf16"):
        image_features, text_features = encode_images(model, images), encode_texts(model, tokens)
    return retrieval_metrics(image_features @ text_features.T, pairs.image_of_caption)


# ---------------------------------------------------------------------------------------------- runs

def fingerprint(model):
    """16 hex digits that tell one set of CLIP weights from another: a method fits the CLIP it was trained on only."""
    digest = hashlib.sha256()
    for name, value in sorted(model.openai_state_dict().items()):
        digest.update(name.encode() + value.detach().float().flatten()[:1024].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_checkpoint(path):
    """The dict of a checkpoint of ours; path is the file, or a run's folder, whose best.pt is meant."""
    path = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; a run of train.py leaves a folder with best.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # torch raises half a dozen kinds for a damaged or foreign file
        raise ValueError(f"{path} is no checkpoint of train.py, or damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(checkpoint, dict) or "settings" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of train.py: it has no settings in it")
    return checkpoint


def load_run(path, device="cpu"):
    """Model with its method and tokenizer as a run of train.py left them -> (model, tokenizer, settings)."""
    checkpoint = load_checkpoint(path)
    settings = checkpoint["settings"]
    source = path if "state_dict" in checkpoint else settings["model"]
    model = clip.load_clip(source, settings["image_size"], activation=settings["activation"])
    if "state_dict" not in checkpoint and fingerprint(model) != checkpoint["fingerprint"]:
        raise ValueError(f"{path} was trained on other weights than those now in {settings['model']}")
    if checkpoint["trained"]:
        adapters.add_method(model, settings["method"], **settings["sizes"])
        adapters.load_trainable(model, checkpoint["trained"])
    return model.to(device).eval(), clip.Tokenizer(merges=checkpoint["merges"]), settings


# ---------------------------------------------------------------------------------------------- what is printed

def label(settings):
    """What a run is called in a table: what was trained, and by which loss."""
    what = {"method": settings["method"], "backbone": "full fine-tuning", "all": "from scratch"}[settings["train"]]
    if settings["train"] != "method" and settings["method"] != "none":
        what += f" with {settings['method']}"
    return f"{what}, {settings['loss']}{', same masked' * settings['mask_same']}"


def table(rows):
    """Markdown table of results. rows: (label, trained parameters or None, share in percent, metrics)."""
    lines = ["| | trained | share | i2t R@1 | R@5 | R@10 | t2i R@1 | R@5 | R@10 | mR |",
             "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for label, trained, share, metrics in rows:
        size = ("", "") if trained is None else (f"{trained:,}".replace(",", " "), f"{share:.2f} %")
        values = [f"{metrics[name]:5.2f}" for name in [*RECALLS, "mR"]]
        lines.append("| " + " | ".join([f"{label:24}", f"{size[0]:>9}", f"{size[1]:>8}", *values]) + " |")
    return "\n".join(lines)


def summarize(folders):
    """Markdown table over finished runs: those that differ in their seed alone are one row, mR as mean +- std."""
    groups = {}
    for folder in folders:
        path = Path(folder) / "metrics.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: {folder} is no finished run of train.py")
        run = json.loads(path.read_text())
        same = {k: v for k, v in run["settings"].items() if k not in ("seed", "out", "resume", "cache")}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    lines = ["| | trained | share | i2t R@1 | R@5 | R@10 | t2i R@1 | R@5 | R@10 | mR | seeds | minutes | GB |",
             "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for runs in groups.values():
        _, trained, share, _ = runs[0]["rows"][-1]
        values = {name: np.array([run["rows"][-1][3][name] for run in runs]) for name in [*RECALLS, "mR"]}
        spread = f" ± {values['mR'].std(ddof=1):.2f}" if len(runs) > 1 else ""
        lines.append("| " + " | ".join([
            label(runs[0]["settings"]), f"{trained:,}".replace(",", " "), f"{share:.2f} %",
            *(f"{values[name].mean():.2f}" for name in RECALLS), f"{values['mR'].mean():.2f}{spread}", str(len(runs)),
            f"{np.mean([run['minutes'] for run in runs]):.1f}", f"{max(run['memory_gb'] for run in runs):.1f}"]) + " |")
    return "\n".join(lines)


def plot_curve(history, path, size=(720, 360)):
    """Training curve as a PNG: loss and validation mR over epochs, each on its own axis.

    history: dicts with epoch, loss and val_mR. Drawn at twice the size and reduced, for smooth lines.
    """
    W, H = 2 * size[0], 2 * size[1]
    image = Image.new("RGB", (W, H), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(26)
    left, right, top, bottom = 130, W - 130, 70, H - 90
    last = max(row["epoch"] for row in history)
    for y in (bottom - (bottom - top) * n / 4 for n in range(5)):
        draw.line([(left, y), (right, y)], fill="#e4e4e4", width=2)
    for key, label, colour, anchor, edge in (("loss", "loss", "#c0392b", "rm", left - 12),
                                             ("val_mR", "validation mR", "#1f5fa8", "lm", right + 12)):
        values = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
        low, high = min(0.0, *(v for _, v in values)), max(v for _, v in values) or 1.0
        points = [(left + (right - left) * e / max(last, 1), bottom - (bottom - top) * (v - low) / (high - low))
                  for e, v in values]
        for n in range(5):
            y, value = bottom - (bottom - top) * n / 4, low + (high - low) * n / 4
            draw.text((edge, y), f"{value:.3g}", colour, font, anchor=anchor)
        draw.line(points, fill=colour, width=5, joint="curve")
        for x, y in points:
            draw.ellipse([x - 6, y - 6, x + 6, y + 6], fill=colour)
        draw.text((left if anchor == "rm" else right, 36), label, colour, font, anchor="lm" if anchor == "rm" else "rm")
    for n in range(6):
        x = left + (right - left) * n / 5
        draw.text((x, bottom + 30), f"{last * n / 5:.3g}", "#444444", font, anchor="mm")
    draw.text(((left + right) / 2, H - 24), "epoch", "#444444", font, anchor="mm")
    image.resize(size, Image.LANCZOS).save(path)


def main():
    """Test one run or plain CLIP, or print a table of runs."""
    parser = argparse.ArgumentParser(description="Test of a run, or of plain CLIP.")
    parser.add_argument("run", nargs="?",
                        help="folder of a run; or plain CLIP: a name such as ViT-B/32, or a weight file")
    parser.add_argument("--table", nargs="+", metavar="RUN", help="print one table of these finished runs instead")
    parser.add_argument("--dataset", choices=data.DATASETS, help="default: the run's own")
    parser.add_argument("--data-root", help="folder of the data set; default: the run's own")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="default: test")
    parser.add_argument("--cache", default="runs/cache", help="folder of decoded pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if (args.run is None) == (args.table is None):
        parser.error("give one run to test, or --table with finished runs")
    try:
        if args.table:
            print(summarize(args.table))
            return
        if (Path(args.run) / "best.pt").is_file() or args.run.endswith("best.pt"):
            model, tokenizer, settings = load_run(args.run, args.device)
            name, trained = label(settings), settings["trained_parameters"]
        else:
            model, tokenizer = clip.load_clip(args.run, device=args.device), clip.Tokenizer(args.run)
            settings, name, trained = {"precision": "fp32"}, "zero-shot", 0
        dataset = args.dataset or settings.get("dataset")
        if dataset is None:
            raise ValueError(f"{args.run} is no run of train.py, so --dataset must say what to test on: "
                             f"{', '.join(data.DATASETS)}")
        root = args.data_root or (settings["data_root"] if dataset == settings.get("dataset") else None)
        pairs = data.read(dataset, root, args.split)
        images = data.load_images(pairs.images, model.config.image_size, args.cache)
        start = time.time()
        metrics = evaluate(model, tokenizer, pairs, images, settings["precision"])
    except (ValueError, OSError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{dataset} {args.split}: {len(pairs.images)} pictures, {len(pairs.captions)} captions, encoded in "
          f"{time.time() - start:.1f} s")
    share = 100 * trained / sum(p.numel() for p in model.parameters())
    print(table([("chance", None, None, chance(pairs)), (name, trained, share, metrics)]))


if __name__ == "__main__":
    main()
