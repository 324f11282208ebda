"""eval.py: metrics against hand-worked examples, brute force over ties and closed forms; runs; search."""
import io
import itertools
import json
import math
import os
import random
import shutil
import statistics
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import adapters
import clip
import data
import eval
from conftest import tiny_clip, write_pairs


def hit_by_permutation(scores, right, k):
    """Probability that a right item is in the top k, tried with each order of the items (sort is stable)."""
    hits = []
    for order in itertools.permutations(range(len(scores))):
        ranked = sorted(order, key=lambda item: -scores[item])
        hits.append(any(right[item] for item in ranked[:k]))
    return statistics.fmean(hits)


@pytest.mark.parametrize("seed", range(5))
def test_ties_count_at_their_expected_value(seed):
    rng = random.Random(seed)
    scores = [[rng.choice([0.1, 0.2, 0.3]) for _ in range(6)] for _ in range(3)]
    image_of_caption = [0, 0, 1, 1, 2, 2]
    metrics = eval.retrieval_metrics(scores, image_of_caption)
    for k in (1, 5):
        i2t = [hit_by_permutation(scores[n], [image == n for image in image_of_caption], k) for n in range(3)]
        columns = [[scores[n][m] for n in range(3)] for m in range(6)]
        t2i = [hit_by_permutation(columns[m], [n == m // 2 for n in range(3)], k) for m in range(6)]
        assert metrics[f"i2t_R@{k}"] == pytest.approx(100 * statistics.fmean(i2t))
        assert metrics[f"t2i_R@{k}"] == pytest.approx(100 * statistics.fmean(t2i))


def test_the_example_of_the_docstring():
    metrics = eval.retrieval_metrics([[.9, .1, .3], [.2, .3, .4]], [0, 0, 1])
    assert list(metrics) == ["i2t_R@1", "i2t_R@5", "i2t_R@10", "t2i_R@1", "t2i_R@5", "t2i_R@10", "mR"]
    assert list(metrics.values()) == pytest.approx([100, 100, 100, 200 / 3, 100, 100, (500 + 200 / 3) / 6])


def test_a_collapsed_model_scores_chance_in_recalls():
    N, captions = 300, 5                        # more than one chunk of queries
    metrics = eval.retrieval_metrics(torch.ones(N, N * captions), torch.arange(N).repeat_interleave(captions))
    for k in (1, 5, 10):
        none_right = math.comb(N * captions - captions, k) / math.comb(N * captions, k)
        assert metrics[f"t2i_R@{k}"] == pytest.approx(100 * k / N)
        assert metrics[f"i2t_R@{k}"] == pytest.approx(100 * (1 - none_right))


@pytest.mark.parametrize("scores, image_of_caption, words", [
    ([[float("nan"), 0.1], [0.2, 0.3]], [0, 1], "NaN"),
    ([[0.3, 0.1], [0.2, 0.3]], [0, 0], "without a match in the gallery"),
    ([[0.3, 0.1], [0.2, 0.3]], [0, 1, 1], "does not fit"), (torch.zeros(0, 0), [], "does not fit")])
def test_what_allows_no_recall_is_an_error(scores, image_of_caption, words):
    with pytest.raises(ValueError, match=words):
        eval.retrieval_metrics(scores, image_of_caption)


def test_the_worked_example_of_re_identification():
    scores = [[.9, .8, .7, .6, .5], [.1, .9, .2, .8, .3], [.5, .4, .3, .2, .1]]     # right: ranks 1 3; 2 5; 2
    metrics = eval.reid_metrics(100 * scores, 100 * [1, 1, 2], [1, 2, 1, 2, 3])     # more than one chunk
    assert metrics == pytest.approx(dict(R1=100 / 3, R5=100, R10=100, mAP=55.277778, mINP=52.222222))


def test_a_collapsed_model_scores_about_chance_in_re_identification():
    G, P = 1000, 5
    ids = torch.arange(G // P).repeat_interleave(P)         # images of a person are neighbours in the gallery
    metrics = eval.reid_metrics(torch.zeros(G // P, G), torch.arange(G // P), ids)
    # a right image stands at each rank r alike, behind (r - 1) (P - 1) / (G - 1) others on average
    AP = statistics.fmean((1 + (r - 1) * (P - 1) / (G - 1)) / r for r in range(1, G + 1))
    # and the last of them at rank r in comb(r - 1, P - 1) of comb(G, P) cases
    INP = sum(P / r * math.comb(r - 1, P - 1) / math.comb(G, P) for r in range(P, G + 1))
    assert metrics["R1"] == pytest.approx(100 * P / G)
    assert metrics["mAP"] == pytest.approx(100 * AP, rel=0.05)
    assert metrics["mINP"] == pytest.approx(100 * INP, rel=0.05)


IMAGES = np.random.default_rng(0).integers(0, 256, (130, 3, 32, 32), dtype=np.uint8)
TOKENIZER = clip.Tokenizer.train(["a few words"], 5)        # nearly one token for each letter


def similarity_in_evaluate(monkeypatch, images, captions):
    """The matrix that evaluate hands to the metrics, of tiny_clip()."""
    monkeypatch.setattr(eval, "split_metrics", lambda similarity, pairs: similarity)
    pairs = data.Pairs([str(n) for n in range(len(images))], captions, [0] * len(captions))
    return eval.evaluate(tiny_clip(vocab_size=TOKENIZER.vocab_size), TOKENIZER, pairs, images)


def test_evaluate_scores_each_image_with_each_caption(monkeypatch):
    model = tiny_clip(vocab_size=TOKENIZER.vocab_size)
    captions = [letter * length for letter, length in zip("ecbedcaefb", (5, 3, 9, 2, 7, 1, 8, 4, 6, 9))]
    with torch.no_grad():
        one = [model.encode_image(clip.normalize(torch.from_numpy(image[None])))[0] for image in IMAGES]
        two = [model.encode_text(TOKENIZER([caption], 32))[0] for caption in captions]
    similarity = similarity_in_evaluate(monkeypatch, IMAGES, captions)
    assert torch.allclose(similarity, torch.stack(one) @ torch.stack(two).T, atol=1e-5)


def test_equal_captions_and_equal_images_tie_to_the_bit(monkeypatch):
    captions = ["same", *(f"other {n}" for n in range(29)), "same"]
    similarity = similarity_in_evaluate(monkeypatch, IMAGES[[0, 1, 0]], captions)
    assert torch.equal(similarity[:, 0], similarity[:, 30]) and torch.equal(similarity[0], similarity[2])


def test_cut_captions_are_noted():
    captions = ["k" * 29, "k" * 30 + "b", "k" * 30 + "c", "k" * 30 + "c", "b" * 40]
    (note,) = eval.caption_notes(TOKENIZER, captions, 32, "val")
    assert note == "val: 4 captions exceed 32 tokens and are cut; 1 then equal another"
    assert eval.caption_notes(TOKENIZER, ["k" * 30], 32, "val") == []


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data set, `plain.pt`: a CLIP, and two runs: `clip` holds it, `mrs` is a method for it."""
    folder = tmp_path_factory.mktemp("world")
    write_pairs(folder / "set")
    model = tiny_clip(vocab_size=TOKENIZER.vocab_size)
    torch.save(model.openai_state_dict(), folder / "plain.pt")
    settings = dict(dataset="precomp", data_root=str(folder / "set"), model="tiny", image_size=32,
                    method="none", activation="quick_gelu", train="all", loss="contrastive",
                    precision="fp32", trained_parameters=7)
    saved = dict(settings=settings, trained={}, merges=TOKENIZER.merges, epoch=3,
                 fingerprint=eval.fingerprint(model), state_dict=model.openai_state_dict())
    for name in ("clip", "mrs"):
        (folder / name).mkdir()
    torch.save(saved, folder / "clip/best.pt")
    adapters.add_method(model, "mrs", bottleneck=8)
    for parameter in model.method_parameters:
        torch.nn.init.normal_(model.get_parameter(parameter), std=0.3)
    settings |= dict(model=str(folder / "clip"), method="mrs", train="method", bottleneck=8)
    saved["trained"] = adapters.trainable_state(model)
    del saved["state_dict"]
    torch.save(saved, folder / "mrs/best.pt")
    torch.save(eval.encode_images(model.eval(), IMAGES[:2]), folder / "features.pt")
    return folder


def changed_run(world, folder, **changes):
    """A copy of the run `mrs` with other contents."""
    torch.save(torch.load(world / "mrs/best.pt", weights_only=True) | changes, folder / "best.pt")
    return folder


def test_a_run_with_a_method_loads_as_it_was_saved(world):
    saved = torch.load(world / "mrs/best.pt", weights_only=True)
    model, tokenizer, settings = eval.load_run(world / "mrs")
    assert torch.equal(eval.encode_images(model, IMAGES[:2]), torch.load(world / "features.pt"))
    assert tokenizer.merges == saved["merges"] and "state_dict" not in saved
    assert settings == saved["settings"] | {"epoch": 3, "fingerprint": saved["fingerprint"]}


def test_a_run_whose_clip_learned_holds_its_clip(world):
    model, _, settings = eval.load_run(world / "clip/best.pt")
    plain = clip.load_clip(world / "plain.pt")
    assert torch.equal(eval.encode_images(model, IMAGES[:2]), eval.encode_images(plain, IMAGES[:2]))
    assert settings["fingerprint"] == eval.fingerprint(plain)


def test_the_fingerprint_tells_weights_and_methods_apart(world):
    models = [tiny_clip(seed=1), eval.load_run(world / "clip")[0], eval.load_run(world / "mrs")[0]]
    assert len({eval.fingerprint(model) for model in models}) == 3


def test_a_method_is_refused_on_another_clip(world, tmp_path):
    with pytest.raises(ValueError, match="trained on other weights"):
        eval.load_run(changed_run(world, tmp_path, fingerprint="0" * 16))


def test_the_clip_of_a_method_may_have_moved(world, tmp_path):
    settings = torch.load(world / "mrs/best.pt", weights_only=True)["settings"]
    run = changed_run(world, tmp_path, settings=settings | {"model": "/old/place/clip.pt"})
    with pytest.raises(FileNotFoundError, match="/old/place/clip.pt.*--model FILE"):
        eval.load_run(run)
    model = eval.load_run(run, clip_file=world / "plain.pt")[0]
    with pytest.raises(ValueError, match="trained with quick_gelu: leave out --activation"):
        eval.load_run(run, clip_file=world / "plain.pt", activation="gelu")
    assert torch.equal(eval.encode_images(model, IMAGES[:2]), torch.load(world / "features.pt"))


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(world, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"knows 519 tokens and its tokenizer 515"):
        eval.load_run(changed_run(world, tmp_path, merges=["a b"]))
    monkeypatch.setattr(clip, "Tokenizer", lambda merges: types.SimpleNamespace(vocab_size=49408))
    with pytest.raises(ValueError, match=r"knows 519 tokens and its tokenizer 49408"):
        eval.load_run(world / "plain.pt")


@pytest.mark.parametrize("model, method, train, expected", [
    ("ViT-B/32", "mrs", "method", "mrs, hmmc"), ("tiny", "none", "all", "from scratch, hmmc"),
    ("ViT-B/32", "none", "backbone", "full fine-tuning, hmmc"),
    ("x.pt", "prompts", "backbone", "full fine-tuning with fixed prompts, hmmc"),
    ("x.pt", "lora", "all", "full fine-tuning and lora at once, hmmc")])
def test_labels(model, method, train, expected):
    settings = dict(model=model, method=method, train=train, loss="hmmc")
    assert eval.label(settings) == expected
    assert eval.label(settings | {"mask_same": True}) == expected + ", same masked"


def write_metrics(folder, mR, chance=2.5, start="zero-shot", **changes):
    """The metrics.json of a finished run with figures by hand; changes are of its settings."""
    settings = {"dataset": "ucm", "data_root": "/x/ucm_precomp", "model": "ViT-B/32", "method": "mrs",
                "loss": "hmmc", "train": "method", "lr": 0.001, "seed": 0, "out": str(folder), **changes}
    rows = [["chance", None, None, {"mR": chance}], [start, 0, 0.0, {"mR": 20.0}],
            [eval.label(settings), 161088, 0.1065, {"mR": mR}]]
    folder.mkdir()
    content = json.dumps(dict(settings=settings, split="test", rows=rows))
    (folder / "metrics.json").write_text(content, encoding="utf-8")


def cells(text):
    """A markdown table -> [{head: cell}]."""
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines()]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def test_runs_that_differ_by_the_seed_are_one_row(tmp_path):
    for seed, mR in enumerate((50.0, 52.0, 57.0)):
        write_metrics(tmp_path / f"s{seed}", mR, seed=seed, device=f"cuda:{seed}")
    write_metrics(tmp_path / "other", 30.0, chance=3.0, seed=9)     # of other data in a folder of that name
    write_metrics(tmp_path / "later", 40.0, seed=3, init="runs/x", start="before: prompts, sdm")
    write_metrics(tmp_path / "toy", 30.0, dataset="toy-aerial", data_root=None)
    (tmp_path / "cache").mkdir()                            # no finished run: ignored
    ucm, toy = eval.run_tables([str(tmp_path / "*"), str(tmp_path / "s0")]).split("\n\n### ")
    assert ucm.startswith("### ucm test ucm_precomp\n\n|") and toy.startswith("toy-aerial test")
    rows = cells(ucm[ucm.index("|"):])
    assert [row[""] for row in rows[4:]] == ["mrs, hmmc (other)", "mrs, hmmc (later)", "mrs, hmmc (s0)"]
    assert [(row["runs"], row["std"]) for row in rows] == 6 * [("1", "")] + [("3", "3.61")]     # root of 13
    assert (rows[6]["mR"], rows[6]["trained"], rows[6]["share"]) == ("53.00", "161 088", "0.11 %")


@pytest.mark.parametrize("content", ['{"settings": {"data', "[]", '{"settings": {}, "rows": []}'])
def test_a_damaged_metrics_file_is_named(content, tmp_path):
    (tmp_path / "metrics.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="metrics.json"):
        eval.run_tables([str(tmp_path)])


@pytest.fixture
def gallery(tmp_path, world):
    """Four images in two folders, one of them blank, a broken one, and files of other kinds."""
    folder = tmp_path / "gallery"
    (folder / "more").mkdir(parents=True)
    for n, place in ((0, "."), (1, "more"), (2, "more")):
        shutil.copy(world / f"set/images/{n}.png", folder / place)
    shutil.copytree(folder / "more", folder / ".trash")
    Image.new("RGB", (40, 40), "red").save(folder / "blank.png")
    for name in ("broken.JPG", "a.heic", "b.HEIC", "notes", "._0.png"):
        (folder / name).write_bytes(b"no image")
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_links_are_followed_and_loops_end(gallery, tmp_path):
    (tmp_path / "album").mkdir()
    (tmp_path / "album/linked").symlink_to(gallery)
    (gallery / "more/back").symlink_to(tmp_path / "album")
    assert len(eval.find_files(tmp_path / "album")) == 8


def test_only_new_and_changed_files_are_encoded(world, gallery, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval, "PIECE", 2)
    model, cache = eval.load_run(world / "clip")[0], tmp_path / "cache"
    assert len(eval.encode_files(model, [*eval.find_files(gallery), "gone.png"], cache)) == 3
    error = capsys.readouterr().err
    for kind in ("'.png': 2", "'.jpg': 1", "'.heic': 2", "'no suffix': 1", "blank.png is", "broken.JPG"):
        assert kind in error
    before = {file: file.read_bytes() for file in cache.iterdir()}
    cannot_encode = types.SimpleNamespace(config=model.config)
    assert len(eval.encode_files(cannot_encode, eval.find_files(gallery), cache)) == 3      # none is new
    os.utime(gallery / "more/2.png", (0, 0))
    for number, name in ((5, "more/1.png"), (7, "new.png")):
        shutil.copy(world / f"set/images/{number}.png", gallery / name)
    features = eval.encode_files(model, eval.find_files(gallery), cache)
    assert sorted(os.path.basename(path) for path in features) == ["0.png", "1.png", "2.png", "new.png"]
    assert all(file.read_bytes() == content for file, content in before.items())
    five = eval.encode_images(model, data.decode(world / "set/images/5.png", 32)[None])[0]
    assert torch.allclose(features[str(gallery / "more/1.png")], five, atol=1e-5)


def run(world, tmp_path, capsys, *flags):
    """What `python eval.py RUN flags` prints."""
    eval.main([str(world / "mrs"), "--cache", str(tmp_path / "cache"), "--device", "cpu", *map(str, flags)])
    return capsys.readouterr().out


def test_a_search_lists_the_nearest_images_of_the_split_first(world, tmp_path, capsys):
    model, tokenizer, _ = eval.load_run(world / "mrs")
    paths = data.read("precomp", world / "set", "val").images
    images = np.stack([data.decode(path, 32) for path in paths])
    query = eval.encode_texts(model, tokenizer(["red above"], 32))[0]
    best = (eval.encode_images(model, images) @ query).argsort(descending=True)[:3]
    text = run(world, tmp_path, capsys, "--query", "red above", "--dataset", "precomp", "--split", "val", "--top", 3)
    assert [line.split()[2] for line in text.splitlines()] == [paths[n] for n in best]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are any bytes on Linux only")
def test_a_name_in_another_encoding_does_not_end_the_output(world, gallery, tmp_path, monkeypatch, capsys):
    shutil.copy(gallery / "0.png", os.fsencode(gallery) + b"/caf\xe9.png")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    for _ in range(2):                                      # the second time from the stored features
        run(world, tmp_path, capsys, "--query", "x", "--gallery", gallery)
    sys.stdout.seek(0)
    assert sys.stdout.read().count("caf\\udce9.png") == 2


def test_a_run_is_tested_beside_chance(world, tmp_path, capsys):
    text = run(world, tmp_path, capsys, "--model", world / "plain.pt")
    assert "activation quick_gelu" in text and "12 images, 60 captions" in text
    rows = cells(text[text.index("|"):])
    assert [row[""] for row in rows] == ["chance", "mrs, contrastive"]
    assert rows[0]["t2i R@1"] == "8.33"                     # one of 12


@pytest.mark.parametrize("flags, words", [
    ([], "run --table is required"), (["RUN", "--query", " "], "needs words"), (["nothing.pt"], "nothing.pt"),
    (["RUN", "--gallery", "x"], "needs words"),
    (["RUN", "--query", "x", "--gallery", "no"], "no is not"), (["--table", "no"], "no finished run"),
    (["RUN", "--dataset", "ucm"], "--data-root"), (["ViT-B/32", "--model", "x"], "leave out --model x")])
def test_a_mistake_is_one_line(world, flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        eval.main([str(world / "mrs") if flag == "RUN" else flag for flag in flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("eval.py: error: ") and words in error and error.count("\n") == 1
