"""data.py on files of the exact formats, made here; on the real ones where an environment variable says they are."""
import hashlib
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import data


def write_precomp(root, train=10, test=2, folder="ucm_images"):
    """A small data set in the authors' layout; picture k is a flat square of grey k."""
    (root / folder).mkdir(parents=True)
    names = [f"{k}.png" for k in range(train + test)]
    for k, name in enumerate(names):
        Image.new("RGB", (20, 16), (k, k, k)).save(root / folder / name)
    (root / "train_filename.txt").write_text("\n".join(names[:train]) + "\n")
    (root / "train_caps.txt").write_text("".join(f" picture {k} caption {i} .\n" for k in range(train) for i in range(5)))
    (root / "test_filename.txt").write_text("".join(f"{name}\n" * 5 for name in names[train:]))
    (root / "test_caps.txt").write_text("".join(f"test {k} caption {i}\n" for k in range(test) for i in range(5)))
    return root


def command(monkeypatch, capsys, dataset, root):
    """Exit code, output and error output of `python data.py dataset --data-root root`."""
    monkeypatch.setattr(sys, "argv", ["data.py", dataset, "--data-root", str(root)])
    with pytest.raises(SystemExit) as stop:
        data.main()
    return stop.value.code, *capsys.readouterr()


# ---------------------------------------------------------------- readers

def test_train_and_val_are_the_seed_2_split(tmp_path):
    write_precomp(tmp_path)
    names = [f"{k}.png" for k in range(10)]
    random.seed(2)
    random.shuffle(names)
    train, val = data.read_precomp(tmp_path, "train"), data.read_precomp(tmp_path, "val")
    assert [Path(path).name for path in train.images] == names[:8]
    assert [Path(path).name for path in val.images] == names[8:]


def test_each_picture_keeps_its_five_captions(tmp_path):
    pairs = data.read_precomp(write_precomp(tmp_path), "train")
    assert len(pairs.captions) == 40
    for caption, n in zip(pairs.captions, pairs.image_of_caption):
        assert caption.startswith(f"picture {Path(pairs.images[n]).stem} caption")


def test_test_files_are_read_line_by_line(tmp_path):
    pairs = data.read_precomp(write_precomp(tmp_path), "test")
    assert [Path(path).name for path in pairs.images] == ["10.png", "11.png"]
    assert pairs.image_of_caption == [0] * 5 + [1] * 5
    assert pairs.captions[7] == "test 1 caption 2"


@pytest.mark.parametrize("folder, extension, count, digest", [
    ("ucm_precomp", ".tif", 378, "8fb61156a5ff7167f1ea25f36fc55014"),
    ("rsicd_precomp", ".jpg", 1966, "f0670b4192f1633ccda998532dfb97c9"),
    ("rsitmd_precomp", ".tif", 859, "d6a0a5363a8bd8d1e9cab8384c71819d")])
def test_official_validation_split(folder, extension, count, digest):
    root = Path(os.environ.get("UCM_ROOT", "ucm_precomp")).parent / folder
    if not (root / "train_filename.txt").exists():
        pytest.skip(f"{root}/train_filename.txt is not there; set UCM_ROOT")
    names = [Path(path).stem + extension for path in data.read_precomp(root, "val").images]
    assert len(names) == count
    assert hashlib.md5("\n".join(names).encode()).hexdigest() == digest


def test_lists_of_different_length_are_named(tmp_path):
    write_precomp(tmp_path)
    with open(tmp_path / "train_caps.txt", "a") as file:
        file.write("one too many\n")
    with pytest.raises(ValueError, match=r"train_caps.txt has 51 lines and train_filename.txt 10"):
        data.read_precomp(tmp_path, "val")


def test_a_missing_folder_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        data.read_precomp(tmp_path / "nowhere", "train")
    (write_precomp(tmp_path / "set") / "test_caps.txt").unlink()
    with pytest.raises(FileNotFoundError, match="test_caps.txt is not there"):
        data.read_precomp(tmp_path / "set", "test")


def test_karpathy_json(tmp_path):
    entries = [dict(filename=f"{split}{k}.jpg", split=split, sentences=[dict(raw=f" {split} {k} "), dict(raw="x")])
               for split in ("train", "restval", "val", "test") for k in range(2)]
    (tmp_path / "dataset_toy.json").write_text(json.dumps(dict(images=entries)))
    (tmp_path / "images").mkdir()
    train = data.read_karpathy_json(tmp_path, "train")
    assert [Path(path).name for path in train.images] == ["train0.jpg", "train1.jpg", "restval0.jpg", "restval1.jpg"]
    test = data.read_karpathy_json(tmp_path / "dataset_toy.json", "test")
    assert (test.captions, test.image_of_caption) == (["test 0", "x", "test 1", "x"], [0, 0, 1, 1])
    assert test.images[0] == str(tmp_path / "images" / "test0.jpg")
    with pytest.raises(ValueError, match="no picture of split 'dev'"):
        data.read_karpathy_json(tmp_path, "dev")


@pytest.mark.parametrize("name, key, first", [("reid_raw.json", "file_path", 1), ("ICFG-PEDES.json", "file_path", 0),
                                              ("ICFG_PEDES.json", "file_path", 0), ("data_captions.json", "img_path", 0)])
def test_reid_annotations(tmp_path, name, key, first):
    rows = [dict(split=split, id=person, captions=[f"{person} {c}" for c in range(count)]) | {key: f"a/{n}.jpg"}
            for n, (split, person, count) in enumerate([("train", first, 2), ("train", first + 4, 3), ("train", first, 1),
                                                        ("Test", first + 9, 2)])]
    (tmp_path / name).write_text(json.dumps(rows))
    train = data.read_reid(tmp_path, "train")
    assert train.ids == [0, 1, 0]
    assert train.image_of_caption == [0, 0, 1, 1, 1, 2]
    test = data.read_reid(tmp_path, "test")
    assert (test.ids, test.images) == ([first + 9], [str(tmp_path / "imgs" / "a/3.jpg")])


def test_caption_all_json_alone_is_told_apart(tmp_path):
    (tmp_path / "caption_all.json").write_text("[]")
    with pytest.raises(FileNotFoundError, match="reid_raw.json.*caption_all.json lacks the split"):
        data.read_reid(tmp_path, "train")


# ---------------------------------------------------------------- pictures

def test_cached_pictures_are_the_preprocessed_ones(tmp_path):
    pairs = data.read_precomp(write_precomp(tmp_path / "set"), "train")
    images = data.load_images(pairs.images, 8, tmp_path / "cache")
    assert images.shape == (8, 3, 8, 8) and images.dtype == np.uint8
    for path, image in zip(pairs.images, images):
        assert (image == clip.preprocess(Image.open(path), 8).numpy()).all()


def test_the_cache_is_reused_and_an_edited_picture_makes_a_new_one(tmp_path, monkeypatch):
    pairs = data.read_precomp(write_precomp(tmp_path / "set"), "val")
    data.load_images(pairs.images, 8, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(clip, "preprocess", lambda *_: pytest.fail("decoded again"))
        data.load_images(pairs.images, 8, tmp_path / "cache")
    Image.new("RGB", (20, 16), (250, 0, 0)).save(pairs.images[0])
    assert data.load_images(pairs.images, 8, tmp_path / "cache")[0, 0].min() == 250
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_every_bad_picture_is_named_and_no_cache_is_left(tmp_path):
    pairs = data.read_precomp(write_precomp(tmp_path / "set"), "train")
    Path(pairs.images[1]).write_bytes(b"")
    Path(pairs.images[5]).write_bytes(Path(pairs.images[5]).read_bytes()[:60])
    with pytest.raises(ValueError) as error:
        data.load_images(pairs.images, 8, tmp_path / "cache")
    assert "2 pictures" in str(error.value) and pairs.images[1] in str(error.value) and pairs.images[5] in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_pictures_are_counted_by_folder(tmp_path, monkeypatch, capsys):
    pairs = data.read_precomp(write_precomp(tmp_path / "set"), "train")
    for path in pairs.images[:3]:
        Path(path).unlink()
    code, _, error = command(monkeypatch, capsys, "ucm", tmp_path / "set")
    assert code == 2 and f"train: 3 pictures are missing in {tmp_path / 'set/ucm_images'}" in error


def test_turns_and_mirrors_are_exact(monkeypatch):
    image = torch.rand(1, 3, 6, 6)
    eight = [torch.rot90(mirrored, k, (2, 3)) for mirrored in (image, image.flip(3)) for k in range(4)]
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.ones(*shape))     # the whole picture, no shift
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        turned = data.augment(image, "aerial")
        match = [n for n, candidate in enumerate(eight) if torch.allclose(turned, candidate, atol=1e-5)]
        assert len(match) == 1
        seen |= set(match)
    assert seen == set(range(8))


def test_a_crop_is_a_window_of_60_to_100_percent():
    ramp = torch.arange(32.0).expand(200, 1, 32, 32)        # brightness = column
    torch.manual_seed(0)
    cropped = data.augment(ramp, "crop")[:, 0, 16]          # bilinear sampling keeps a ramp a ramp
    zoom = (cropped[:, 20] - cropped[:, 12]) / 8
    assert zoom.min() >= 0.6 ** 0.5 - 1e-4 and zoom.max() <= 1 + 1e-4 and zoom.std() > 0.03
    assert cropped.min() >= 0 and cropped.max() <= 31
    assert (cropped[:, 0] + zoom).min() < 2 and cropped[:, -1].max() > 29     # windows reach both edges


def test_people_are_mirrored_or_moved_by_whole_pixels_with_black_beyond(monkeypatch):
    monkeypatch.setattr(data, "erase", lambda images: images)
    image = torch.rand(1, 3, 24, 16) + 0.5
    padded = torch.nn.functional.pad(image, (10, 10, 10, 10))
    windows = [window for whole in (padded, padded.flip(3)) for window in
               (whole[:, :, y:y + 24, x:x + 16] for y in range(21) for x in range(21))]
    for seed in range(10):
        torch.manual_seed(seed)
        moved = data.augment(image, "people")
        assert sum(torch.allclose(moved, window, atol=1e-3) for window in windows) >= 1


# ---------------------------------------------------------------- batches

def test_an_epoch_over_captions_is_each_once_in_a_new_order():
    pairs = data.Pairs(["a", "b"], list("vwxyz"), [0, 0, 1, 1, 1])
    orders = [data.epoch_order(pairs, "captions", 0, epoch).tolist() for epoch in range(4)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert orders[2] == data.epoch_order(pairs, "captions", 0, 2).tolist()


def test_an_epoch_over_images_is_each_once_with_any_of_its_captions():
    pairs = data.Pairs(["a", "b"], list("vwxyz"), [0, 0, 1, 1, 1])
    orders = [data.epoch_order(pairs, "images", 0, epoch).tolist() for epoch in range(60)]
    assert all(sorted(pairs.image_of_caption[m] for m in order) == [0, 1] for order in orders)
    assert {m for order in orders for m in order} == set(range(5))


@pytest.mark.parametrize("start", [0, 2])
def test_batches_follow_the_order_and_may_start_anywhere(start):
    images = np.arange(4, dtype=np.uint8).repeat(12).reshape(4, 3, 2, 2)
    tokens, image_of_caption = torch.arange(10)[:, None], [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    order = np.array([7, 1, 4, 9, 0, 2, 8, 3, 5, 6])
    seen = list(data.batches(images, tokens, image_of_caption, order, 3, start))
    assert [rows.tolist() for _, _, rows in seen] == [[7, 1, 4], [9, 0, 2], [8, 3, 5], [6]][start:]
    for image, token, rows in seen:
        assert token[:, 0].tolist() == rows.tolist()
        assert image[:, 0, 0, 0].tolist() == [image_of_caption[m] for m in rows]


# ---------------------------------------------------------------- the drawn worlds

def scenes(draw, count=300, seed=1):
    return [draw(np.random.default_rng((seed, i)), 40) for i in range(count)]


def test_the_words_are_known_and_captions_mostly_unique():
    ground, aerial = ([text for _, five in scenes(draw) for text in five] for draw in (data.draw_ground, data.draw_aerial))
    words = {word for text in ground for word in text.split()}
    assert {word for text in aerial for word in text.split()} <= words
    for captions in (ground, aerial):
        assert len(captions) == 1500 and len(set(captions)) > 0.9 * 1500
        assert all(6 <= len(text.split()) <= 17 for text in captions)


def test_the_place_in_a_caption_is_where_the_object_is():
    for seed in range(200):
        _, _, groups = data.make_scene(np.random.default_rng(seed), data.AERIAL_RADIUS, level=False)
        spots = np.concatenate([group.spots for group in groups])
        assert (spots[:, :2] > spots[:, 2:]).all() and (spots[:, :2] < 1 - spots[:, 2:]).all()      # inside
        for i, (x, y, r) in enumerate(spots):
            assert all(np.hypot(x - u, y - v) >= min(r, s) for u, v, s in spots[i + 1:])            # apart
        for group in groups:
            x, y = group.spots.mean(axis=0)[:2]
            assert not ("left" in group.place and x > 0.4 or "right" in group.place and x < 0.6)
            assert not ("top" in group.place and y > 0.4 or "bottom" in group.place and y < 0.6)
            assert len(group.spots) == group.count


def test_a_world_is_written_whole_or_not_at_all_and_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        data.write_world(tmp_path / name, data.draw_aerial, images=10, test=2, seed=3, size=40)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 10 + 4
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert [len(data.read_precomp(tmp_path / "a", split).images) for split in ("train", "val", "test")] == [6, 2, 2]

    def interrupted(rng, size):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        data.write_world(tmp_path / "c", interrupted, images=10, test=2, seed=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
