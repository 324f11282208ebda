"""data.py on files of the exact formats, made here; on the real ones where UCM_ROOT says they are."""
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import data
from conftest import write_pairs


def write_grey(folder, names):
    """Images of one size; image k is grey, its left half of level 10 k and its right half 10 k + 5."""
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((16, 20), 10 * k, np.uint8)
        pixels[:, 10:] += 5
        Image.fromarray(pixels).convert("RGB").save(folder / name)


def write_reid(root, entries, file="reid_raw.json", key="file_path"):
    """An annotation file of dictionaries, which get the fields that they lack."""
    usual = dict(split="train", captions=["z"])
    content = [usual | {"id": n, key: f"a/{n}.jpg"} | entry for n, entry in enumerate(entries)]
    (root / file).write_text(json.dumps(content), encoding="utf-8")


def write_tsv(root, text):
    (root / "captions.tsv").write_bytes(text.encode())


def stems(pairs):
    return [Path(path).stem for path in pairs.images]


def test_train_and_val_are_the_seed_2_split(tmp_path):
    write_pairs(tmp_path, train=10, test=2)
    order = list(range(10))
    random.seed(2)
    random.shuffle(order)
    assert stems(data.read_precomp(tmp_path, "train")) == [str(k) for k in order[:8]]
    val = data.read_precomp(tmp_path, "val")
    lines = (tmp_path / "train_caps.txt").read_text().splitlines()
    assert stems(val) == [str(k) for k in order[8:]] and val.image_of_caption == [0] * 5 + [1] * 5
    assert val.captions == lines[5 * order[8]:5 * order[8] + 5] + lines[5 * order[9]:5 * order[9] + 5]


@pytest.mark.parametrize("folder, suffix, digest", [
    ("ucm_precomp", ".tif", "8fb61156a5ff7167f1ea25f36fc55014"),
    ("rsicd_precomp", ".jpg", "f0670b4192f1633ccda998532dfb97c9"),
    ("rsitmd_precomp", ".tif", "d6a0a5363a8bd8d1e9cab8384c71819d")])
def test_the_official_validation_split_of_real_files(folder, suffix, digest):
    root = Path(os.environ.get("UCM_ROOT", "ucm_precomp")).parent / folder
    if not (root / "train_filename.txt").exists():
        pytest.skip(f"{root}/train_filename.txt is not there; set UCM_ROOT")
    names = "\n".join(stem + suffix for stem in stems(data.read_precomp(root, "val")))
    assert hashlib.md5(names.encode()).hexdigest() == digest


def test_a_set_without_test_files_has_no_test_split(tmp_path):
    write_pairs(tmp_path)
    (tmp_path / "test_caps.txt").unlink()
    with pytest.raises(FileNotFoundError, match="test_caps.txt"):       # one of the two files is a mistake
        data.read_precomp(tmp_path, "test")
    (tmp_path / "test_filename.txt").unlink()
    with pytest.raises(data.NoSplit, match="no test_filename.txt and no test_caps.txt"):
        data.read_precomp(tmp_path, "test")


@pytest.mark.parametrize("file, change, words", [
    ("train_caps.txt", lambda text: text + "more\n", "caps.txt has 121 lines and train_filename.txt 24"),
    ("train_filename.txt", lambda text: text.replace("7.png", "2.png"), "2.png has .*'val'.* but .*'train'"),
    ("train_filename.txt", lambda text: text.replace("0.png", "", 1), "filename.txt:1: '' is no name"),
    ("train_caps.txt", lambda text: text.replace("much", "m\udce9ch", 1), "train_caps.txt:3 is not UTF-8")])
def test_a_wrong_line_is_named(tmp_path, file, change, words):
    write_pairs(tmp_path, train=24)
    text = change((tmp_path / file).read_text())
    (tmp_path / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=words):
        data.read_precomp(tmp_path, "train")


@pytest.mark.parametrize("folder", ["images", "imgs", "ucm_images", "flickr30k-images", "Flickr_Images", ""])
def test_usual_folders_of_images_are_found(tmp_path, folder):
    write_tsv(tmp_path, "a.png\tx\nsub\\b.png\ty\n")       # with a back slash from Windows
    for path in (tmp_path / folder, tmp_path / "another_folder_of_images"):
        write_grey(path, ["a.png", "sub/b.png"])
    pairs = data.read_folder(tmp_path, "train")
    assert pairs.images == [str(tmp_path / folder / name) for name in ("a.png", "sub/b.png")]


def test_karpathy_json(tmp_path):
    entries = [dict(filename="a.jpg", split="train"), dict(filename="c.jpg", split="testing"),
               dict(filename="b.jpg", split="restval", filepath="val2014")]
    entries = [entry | {"sentences": [dict(raw=" one "), dict(raw="two")]} for entry in entries]
    (tmp_path / "dataset_x.json").write_text(json.dumps({"images": entries}))
    train = data.read_karpathy_json(tmp_path, "train")
    assert train == data.Pairs([str(tmp_path / "a.jpg"), str(tmp_path / "val2014/b.jpg")],
                               ["one", "two"] * 2, [0, 0, 1, 1])
    assert stems(data.read_karpathy_json(tmp_path / "dataset_x.json", "test")) == ["c"]
    with pytest.raises(data.NoSplit, match="no split 'val', only .'test', 'train'."):
        data.read_karpathy_json(tmp_path, "val")


@pytest.mark.parametrize("file, key", [("reid_raw.json", "file_path"), ("ICFG-PEDES.json", "file_path"),
                                       ("ICFG_PEDES.json", "file_path"), ("data_captions.json", "img_path")])
def test_reid_annotations(tmp_path, file, key):
    entries = [dict(id=7, split="TRAIN", captions=["x", "y"]), dict(id="4"), dict(id=7, split="training"),
               dict(id=9, split="validation"), dict(id=8, split="dev")]
    write_reid(tmp_path, entries, file, key)
    train = data.read_reid(tmp_path, "train")
    assert (train.ids, train.image_of_caption) == ([1, 0, 1], [0, 0, 1, 2])
    assert train.captions == ["x", "y", "z", "z"] and data.read_reid(tmp_path, "val").ids == [9, 8]


@pytest.mark.parametrize("change, words", [
    (dict(split="gallery"), "the split 'gallery' is none of train"), (dict(split=None), "the split None"),
    (dict(file_path=None), "None is no name of an image file"), (dict(file_path=12), "12 is no name"),
    (dict(file_path=["a.jpg"]), r"\['a.jpg'\] is no name"), (dict(file_path=" "), "' ' is no name"),
    (dict(captions="a man"), "the captions 'a man' are no list"), (dict(captions=[None]), r"\[None\]"),
    (dict(sentences=["x", {}]), r"\['x', None\] are no list"), (dict(id="p1"), "the id 'p1' is no number"),
    (dict(id=None), "the id None"), (dict(captions=[]), r"the captions \[\] are no list of one or more"),
    (dict(file_path="a//./0.jpg"), "a/0.jpg has the split and person"),
    (dict(file_path="a/0.jpg"), "a/0.jpg has the split and person .'train', 1., but .'train', 0."),
    (dict(file_path="a/0.jpg", id=0, split="val"), "a/0.jpg has .*'val', 0., but .'train', 0.")])
def test_a_wrong_entry_is_named_with_its_value(tmp_path, change, words):
    write_reid(tmp_path, [{}, change])
    with pytest.raises(ValueError, match=f"reid_raw.json, entry 1: .*{words}.*$"):
        data.read_reid(tmp_path, "train")


def test_splits_a_header_quoted_fields_and_windows_line_ends_are_read_as_meant(tmp_path):
    write_tsv(tmp_path, '\ufefffilepath\tcaption\tsplit\r\na.png\t"a ""big"" boat"\ttrain\r\n\r\n'
              'c.png\ttwo\ttest\r\n"b.png"\ta 5" \u2028gun\tTrain\r\na.png\tthree\r\n')
    train = data.read_folder(tmp_path, "train")
    assert (stems(train), train.image_of_caption) == (["a", "b"], [0, 1, 0])
    assert train.captions == ['a "big" boat', 'a 5" \u2028gun', "three"]
    assert data.read_folder(tmp_path, "test").captions == ["two"]


@pytest.mark.parametrize("count, tenth", [(2, 0), (3, 1), (25, 2)])
def test_images_without_a_split_are_dealt_out_in_any_order_of_lines(tmp_path, count, tenth):
    names = [f"{k:02d}" for k in range(count)]
    write_tsv(tmp_path, "".join(f"{name}.png\tx\n{name}.png\ty\n" for name in reversed(names)))
    random.seed(2)
    random.shuffle(names)
    dealt = {"val": names[:tenth], "test": names[tenth:2 * tenth], "train": names[2 * tenth:]}
    for split in [split for split in dealt if dealt[split]]:
        assert sorted(stems(data.read_folder(tmp_path, split))) == sorted(dealt[split])


@pytest.mark.parametrize("line", ["b.png", "b.png\tx\tdummy", "b.png\tx\ttrain\tx", "\tx", 'b.png\t"open'])
def test_a_line_of_another_layout_is_named(tmp_path, line):
    write_tsv(tmp_path, f"a.png\tx\n{line}\nc.png\tx\n")
    with pytest.raises(ValueError, match="captions.tsv:2"):
        data.read_folder(tmp_path, "train")


def read_grey(root):
    """{"train": Pairs} of eight images made by write_grey, two captions an image."""
    names = [f"{k}.png" for k in range(8)]
    write_grey(root, names)
    write_tsv(root, "".join(f"{name}\tfirst {name}\ttrain\n{name}\tsecond {name}\ttrain\n" for name in names))
    return {"train": data.read_folder(root, "train")}


def test_loaded_images_are_the_preprocessed_ones(tmp_path):
    pairs, images, notes = data.load(read_grey(tmp_path), (8, 6), tmp_path / "cache")
    expected = [clip.preprocess(Image.open(path), (8, 6)).numpy() for path in pairs["train"].images]
    assert images["train"].dtype == np.uint8 and np.array_equal(images["train"], expected) and notes == []


def test_a_cache_is_reused_until_an_image_the_size_or_its_length_changes(tmp_path, monkeypatch):
    pairs, cache = read_grey(tmp_path), tmp_path / "cache"
    data.load(pairs, 8, cache)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_: pytest.fail("decoded again"))
        data.load(pairs, 8, cache)
    file, = cache.iterdir()
    file.write_bytes(file.read_bytes()[:192])               # one whole image of eight
    assert data.load(pairs, 8, cache)[1]["train"][:, 0, 0, 0].tolist() == list(range(0, 80, 10))
    Image.new("RGB", (20, 16), (250, 0, 0)).save(pairs["train"].images[0])
    assert data.load(pairs, 8, cache)[1]["train"][0, 0].min() == 250
    os.utime(pairs["train"].images[1], ns=(7, 7))           # as an edit that keeps the length
    data.load(pairs, 8, cache)
    data.load(pairs, (8, 8), cache)                         # stretched, where 8 cuts the centre out
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("fault, words", [
    (lambda path: path.unlink(), "No such file"), (lambda path: path.write_bytes(b""), "cannot identify"),
    (lambda path: path.write_bytes(path.read_bytes()[:-40]), "truncated")])
def test_bad_images_are_named_or_left_out_with_their_captions(tmp_path, fault, words):
    pairs = read_grey(tmp_path)
    bad = Path(pairs["train"].images[3])
    fault(bad)
    named = f"{bad.name}.*{words}.* .caption 'second 3.png'"
    with pytest.raises(ValueError, match=f"^1 images cannot.*{named}.*--skip-bad leaves.*$"):
        data.load(pairs, 8, tmp_path / "cache")
    loaded, images, notes = data.load(pairs, 8, tmp_path / "cache", skip_bad=True)
    assert len(notes) == 1 and re.match(f"1 bad images are left out.*{named}", notes[0])
    part = loaded["train"]
    assert stems(part) == ["0", "1", "2", "4", "5", "6", "7"] and len(part.captions) == 14
    levels = images["train"][part.image_of_caption, 0, 0, 0]
    assert [caption.split()[1] for caption in part.captions] == [f"{level // 10}.png" for level in levels]


def test_one_error_names_twenty_bad_images_of_all_splits(tmp_path):
    pairs = {split: data.Pairs([f"{split}{k}.png" for k in range(11)], ["x"] * 11, list(range(11)))
             for split in ("train", "test")}
    with pytest.raises(ValueError, match=r"22 images .*train0.png.*test8.png[^;]*; and 2 more"):
        data.load(pairs, 8, tmp_path)
    with pytest.raises(ValueError, match="the split train has no image that can be used"):
        data.load(pairs, 8, tmp_path, skip_bad=True)


def test_empty_captions_and_images_without_any_other_are_left_out(tmp_path):
    pairs = read_grey(tmp_path)["train"]
    pairs.captions[0] = pairs.captions[1] = pairs.captions[4] = " "
    pairs.ids = list(range(10, 18))
    loaded, images, notes = data.load({"train": pairs}, 8, tmp_path / "cache")
    assert notes == ["train: 3 empty captions are left out"]
    assert loaded["train"].ids == list(range(11, 18)) and loaded["train"].captions[2] == "second 2.png"
    assert images["train"][:, 0, 0, 0].tolist() == [10, 20, 30, 40, 50, 60, 70]


def test_a_turned_photo_is_read_upright(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6        # to be turned by 90 degrees clockwise, as a camera held sideways stores it
    Image.fromarray(np.rot90(pixels, 1)).save(tmp_path / "a.png", exif=exif)
    assert (data.decode(tmp_path / "a.png", 8) == pixels.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("pixels", [np.arange(60000, 60081, dtype=np.uint16).reshape(9, 9),
                                    np.linspace(0.1, 0.9, 81, dtype=np.float32).reshape(9, 9),
                                    np.linspace(0, 1, 81, dtype=np.float32).reshape(9, 9)])
def test_images_that_turn_out_blank_are_named(tmp_path, pixels):
    pairs = read_grey(tmp_path)
    pairs["train"].images[2] = str(tmp_path / "blank.tif")
    Image.fromarray(pixels).save(tmp_path / "blank.tif")
    _, _, notes = data.load(pairs, 8, tmp_path / "cache")
    assert notes == [f"train: 1 images are blank, of one colour or nearly: {tmp_path / 'blank.tif'}"]


@pytest.mark.parametrize("splits, notes", [
    (["val", "test"], []), (["test"], ["no val split: the last epoch is taken"]),
    (["val"], ["no test split: the figures are of val, which chose the epoch"])])
def test_a_data_set_needs_val_or_test_and_notes_tell_which_it_lacks(tmp_path, splits, notes):
    write_tsv(tmp_path, "train.png\tx\ttrain\n")
    with pytest.raises(ValueError, match=f"{tmp_path} has neither a val nor a test split"):
        data.read_splits("folder", tmp_path)
    write_tsv(tmp_path, "".join(f"{split}.png\tx\t{split}\n" for split in ["train", *splits]))
    pairs, said = data.read_splits("folder", tmp_path)
    assert said == notes and [stems(pairs[split]) for split in pairs] == [["train"], *([x] for x in splits)]


def test_the_check_counts_each_split_and_tells_what_training_would(tmp_path, monkeypatch, capsys):
    write_reid(tmp_path, [dict(captions=["x", "y"]), dict(id=0, captions=["x", ""]), {}, dict(split="test")])
    write_grey(tmp_path / "imgs", [f"a/{k}.jpg" for k in range(4)])
    monkeypatch.setattr(sys, "argv", ["data.py", "CUHK-PEDES", "--data-root", str(tmp_path)])
    data.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "train 3 images 5 captions, 4 of them distinct, 2 ids".split()
    assert lines[2:] == ["no val split: the last epoch is taken", "train: 1 empty captions are left out"]


def test_the_check_names_missing_and_damaged_files_in_one_line_without_pillows_warnings(tmp_path):
    write_grey(tmp_path, ["a.png", "b.png", "c.png"])
    write_tsv(tmp_path, "a.png\tone\ttrain\nb.png\ttwo\ttrain\nc.png\tx\ttrain\nd\tthree\tval\n")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-40])
    (tmp_path / "b.png").write_bytes(b"")
    code = "from PIL import Image; Image.MAX_IMAGE_PIXELS = 200; import data; data.main()"
    done = subprocess.run([sys.executable, "-c", code, "folder", "--data-root", str(tmp_path)], text=True,
                          capture_output=True, cwd=Path(data.__file__).parent)
    words = "a.png: .*truncated.*'one'.*b.png: cannot identify.*'two'.*/d: No such file.*'three'.*"
    assert done.returncode == 2 and re.fullmatch(f"data.py: error: 3 images .*{words}\n", done.stderr)


def test_turns_and_mirrors_are_exact(monkeypatch):
    image = torch.rand(1, 3, 6, 6)
    eight = [torch.rot90(mirrored, k, (2, 3)) for mirrored in (image, image.flip(3)) for k in range(4)]
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.ones(*shape))     # the whole image, no shift
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        turned = data.augment(image, "aerial")
        matches = [n for n, candidate in enumerate(eight) if torch.allclose(turned, candidate, atol=1e-5)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 8


def test_people_are_moved_by_each_number_of_pixels_alike_with_black_beyond(monkeypatch):
    monkeypatch.setattr(data, "erase", lambda images: images)
    torch.manual_seed(0)
    lines = torch.zeros(2100, 1, 41, 41)
    lines[..., 20] = 1
    counts = data.augment(lines, "people")[:, 0, 20].argmax(dim=1).bincount(minlength=41)
    assert counts[:10].sum() == counts[31:].sum() == 0          # of each of 21 there should be 100
    assert (counts[10:31] > 50).all() and (counts[10:31] < 150).all()
    assert data.augment(torch.ones(99, 1, 41, 41), "people").amin() < 1e-4


def test_half_of_the_people_lose_a_box_of_2_to_40_percent():
    torch.manual_seed(0)
    erased = data.erase(torch.full((600, 3, 96, 48), 7.0))
    changed = (erased != 7).any(dim=1)                                      # (B, H, W)
    assert clip.normalize(erased).permute(0, 2, 3, 1)[changed].abs().max() < 1e-5       # CLIP's mean colour
    shares = []
    for mask in changed[changed.any(dim=(1, 2))]:
        height, width = mask.any(dim=1).sum().item(), mask.any(dim=0).sum().item()
        assert mask.sum() == height * width                                 # one whole box
        shares.append(height * width / (96 * 48))
    assert 0.015 < min(shares) < 0.04 and 0.36 < max(shares) < 0.42 and 250 < len(shares) < 350
    assert changed.any(dim=0).all()                                         # anywhere


def test_an_epoch_over_images_has_each_once_with_any_of_its_captions():
    pairs = data.Pairs(["a", "b"], list("vwxyz"), [0, 0, 1, 1, 1])
    epochs = [batch.tolist() for batch in data.batches(pairs, "images", 2, epochs=60, seed=0)]
    assert len(epochs) == 60
    assert all(sorted(pairs.image_of_caption[m] for m in epoch) == [0, 1] for epoch in epochs)
    assert {m for epoch in epochs for m in epoch} == set(range(5))


@pytest.mark.parametrize("n, world, sizes", [(8, 1, [3, 3, 2]), (7, 1, [3, 3]), (11, 2, [2] * 4), (2, 3, [])])
def test_a_last_batch_of_one_is_dropped_and_what_processes_cannot_share(n, world, sizes):
    pairs = data.Pairs(["a"] * n, ["x"] * n, list(range(n)))
    assert [len(rows) for rows in data.batches(pairs, "captions", 3, 1, 0, world)] == sizes


def test_an_epoch_over_captions_has_each_once_in_an_order_of_its_own():
    pairs = data.Pairs(list("abcd"), ["x"] * 10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3])
    plan = [batch.tolist() for batch in data.batches(pairs, "captions", 4, epochs=3, seed=0)]
    assert [len(batch) for batch in plan] == [4, 4, 2] * 3 and plan[:3] != plan[3:6]
    assert all(sorted(sum(plan[n:n + 3], [])) == list(range(10)) for n in (0, 3, 6))


@pytest.mark.parametrize("view", ["side", "above", "portrait", "camera"])
def test_an_image_of_a_world_depends_on_its_number_and_the_seed_alone(tmp_path, view):
    data.draw_world(tmp_path / "a", view, 12, 0, 6, seed=3)
    data.draw_world(tmp_path / "b", view, 6, 6, 12, seed=3)
    images = sorted((tmp_path / "a/images").iterdir())
    assert len(images) == 18 and len({image.read_bytes() for image in images}) == 18
    assert all(image.read_bytes() == (tmp_path / "b/images" / image.name).read_bytes() for image in images)


def test_a_world_is_drawn_on_first_use_and_then_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.WORLDS, "toy-people", ("camera", 42, 6, 12, 0))
    pairs = {split: data.read("toy-people", None, split) for split in ("train", "val", "test")}
    monkeypatch.setattr(data, "draw_world", lambda *_: pytest.fail("drawn again"))
    assert data.read("toy-people", None, "test") == pairs["test"]
    assert [sorted(set(part.ids)) for part in pairs.values()] == [[0, 1, 2, 3, 4, 5, 6], [7], [8, 9]]
    assert [len(part.captions) for part in pairs.values()] == [84, 12, 24]


def test_scenes_from_both_views_have_one_vocabulary_and_few_equal_captions():
    words = []
    for view in ("side", "above"):
        scenes = [data.draw_scene(np.random.default_rng((1, i)), view, 8) for i in range(200)]
        captions = [text for _, texts in scenes for text in texts]
        assert len(set(captions)) > 0.9 * len(captions) and max(len(text.split()) for text in captions) < 20
        words.append({word for text in captions for word in text.split()})
    assert words[0] == words[1] and {"three", "boats", "middle", "purple"} <= words[0]


def test_a_caption_tells_where_a_colour_is_and_how_often(monkeypatch):
    monkeypatch.setattr(data, "photograph", lambda rng, size, ground, wall, horizon, stamps, haze: stamps)
    phrase = r"(an?|two|three) (\w+) (\w+?)s? (?:at|in) the (\w+)"
    for i in range(60):
        stamps, captions = data.draw_scene(np.random.default_rng(i), "side")
        match, = filter(None, (re.fullmatch(f"{phrase} and {phrase}", text) for text in captions))
        for number, colour, noun, where in (match.groups()[:4], match.groups()[4:]):
            wanted = [data.SIDE[noun], data.DYES[colour]]
            spots = [(x, y) for *shape_and_paint, x, y, _, _, _ in stamps if shape_and_paint == wanted]
            if match[2] != match[6]:
                x, y = np.mean(spots, axis=0)
                far = {"left": x, "right": 1 - x, "top": y, "bottom": 1 - y, "middle": abs(x + y - 1)}
                assert far[where] < 0.27 and len(spots) == {"two": 2, "three": 3}.get(number, 1)
