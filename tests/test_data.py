"""data.py on files of the exact formats, made here; on the real ones where an environment variable says they are."""
import hashlib
import json
import multiprocessing
import os
import random
import struct
import sys
import tempfile
import zlib
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
    (root / "train_caps.txt").write_text("".join(f" picture {k} caption {i} .\n"
                                                 for k in range(train) for i in range(5)))
    (root / "test_filename.txt").write_text("".join(f"{name}\n" * 5 for name in names[train:]))
    (root / "test_caps.txt").write_text("".join(f"test {k} caption {i}\n" for k in range(test) for i in range(5)))
    return root


def read_all(root):
    return {split: data.read_precomp(root, split) for split in ("train", "val", "test")}


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
    assert pairs.image_of_caption == [n for n in range(8) for _ in range(5)] and len(set(pairs.captions)) == 40
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


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path):
    before = read_all(write_precomp(tmp_path))
    for file in tmp_path.glob("*.txt"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert read_all(tmp_path) == before


ODD = ["a\u2028b", "a\x0bb", "a\x0cb", "a\x85b", "a\x1cb", "a\tb", "\U0001f6e9 \u98de\u673a", "caf\xe9", "x",
       "boat " * 9999 + "boat"]


def test_a_caption_may_hold_any_character_but_the_line_feed(tmp_path):
    write_precomp(tmp_path)
    (tmp_path / "test_caps.txt").write_bytes("\n".join(ODD).encode())
    assert data.read_precomp(tmp_path, "test").captions == ODD


@pytest.mark.parametrize("name", ["train_caps.txt", "train_filename.txt", "test_caps.txt", "captions.tsv",
                                  "reid_raw.json"])
def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path, name):
    write_precomp(tmp_path)
    lines = [b"1.png\ta", b"2.png\tb", "3.png\tcaf\xe9".encode("latin-1"), b"4.png\td"]
    (tmp_path / name).write_bytes(b"\n".join(lines))
    dataset = {"captions.tsv": "folder", "reid_raw.json": "CUHK-PEDES"}.get(name, "ucm")
    with pytest.raises(ValueError, match=f"{name}:3 is not UTF-8"):
        data.read(dataset, tmp_path, name.split("_")[0] if dataset == "ucm" else "train")


def test_a_name_listed_twice_is_refused_with_both_lines(tmp_path):
    write_precomp(tmp_path)
    names = (tmp_path / "train_filename.txt").read_text().replace("6.png", "2.png")
    (tmp_path / "train_filename.txt").write_text(names)
    with pytest.raises(ValueError, match=r"train_filename.txt:7 repeats 2.png of line 3"):
        data.read_precomp(tmp_path, "train")


def test_a_name_may_not_lead_out_of_the_folder(tmp_path):
    write_precomp(tmp_path)
    names = (tmp_path / "test_filename.txt").read_text().replace("10.png", "a/../../10.png", 3)
    (tmp_path / "test_filename.txt").write_text(names)
    with pytest.raises(ValueError, match=r"test_filename.txt:1: the picture 'a/../../10.png' .*lies outside"):
        data.read_precomp(tmp_path, "test")


def test_a_name_in_an_annotation_file_may_not_lead_out_of_the_folder(tmp_path):
    write_reid(tmp_path / "reid_raw.json", [("train", 1, 2), ("train", 1, 2)], path_format="../{}.jpg")
    with pytest.raises(ValueError, match="reid_raw.json, entry 0: the picture '../0.jpg' .*lies outside .*imgs"):
        data.read_reid(tmp_path, "train")
    (tmp_path / "captions.tsv").write_text("a.png\tx\n../b.png\tx\n")
    with pytest.raises(ValueError, match="captions.tsv:2: the picture '../b.png' .*lies outside"):
        data.read_folder(tmp_path, "train")


def test_a_picture_without_a_name_is_an_error(tmp_path):
    write_reid(tmp_path / "reid_raw.json", [("train", 1, 2)], key="image")
    with pytest.raises(ValueError, match="reid_raw.json, entry 0: the picture '' is not named"):
        data.read_reid(tmp_path, "train")
    write_precomp(tmp_path / "set")
    lines = (tmp_path / "set/test_filename.txt").read_text().split("\n")
    (tmp_path / "set/test_filename.txt").write_text("\n".join(["", *lines[1:]]))
    with pytest.raises(ValueError, match="test_filename.txt:1: the picture '' is not named"):
        data.read_precomp(tmp_path / "set", "test")


@pytest.mark.parametrize("change, words", [
    (dict(split=None), "entry 1: its split is to be a text"), (dict(captions="a man"), "entry 1: .* its captions a list"),
    (dict(captions=[None]), "entry 1: the caption None is no text"),
    (dict(id="p1"), "entry 1: the id 'p1' is no number")])
def test_an_entry_of_another_kind_is_named(tmp_path, change, words):
    write_reid(tmp_path / "reid_raw.json", [("train", 1, 2), ("train", 2, 1)])
    entries = json.loads((tmp_path / "reid_raw.json").read_text())
    (tmp_path / "reid_raw.json").write_text(json.dumps([entries[0], entries[1] | change]))
    with pytest.raises(ValueError, match=f"reid_raw.json, .*{words}"):
        data.read_reid(tmp_path, "train")


@pytest.mark.parametrize("sentences", [["a"], [{"tokens": ["a"]}]])
def test_karpathy_sentences_without_raw_are_named(tmp_path, sentences):
    entries = [dict(filename="a.jpg", split="train", sentences=sentences)]
    (tmp_path / "dataset_toy.json").write_text(json.dumps(dict(images=entries)))
    with pytest.raises(ValueError, match="dataset_toy.json.*, entry 0: each of its sentences is to have a 'raw'"):
        data.read_karpathy_json(tmp_path, "train")


def test_a_picture_in_two_splits_is_an_error(tmp_path):
    for lines in ("a.png\tone\na.png\ttwo\ttest\n", "a.png\tone\ttrain\na.png\ttwo\ttest\n"):
        (tmp_path / "captions.tsv").write_text(lines)
        with pytest.raises(ValueError, match="captions.tsv:2: a.png has stood in another split"):
            data.read_folder(tmp_path, "train")


def test_names_with_spaces_letters_of_any_script_folders_and_absolute_ones(tmp_path):
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    names = ["a b.png", "caf\xe9 \u98de\u673a.png", "sub/folder/c.png", "sub/../d.png", str(elsewhere / "e.png")]
    (tmp_path / "set/sub/folder").mkdir(parents=True)
    for k, name in enumerate(names):
        Image.new("RGB", (9, 9), (k, k, k)).save(os.path.join(tmp_path / "set", name))
    (tmp_path / "set/captions.tsv").write_text("".join(f"{name}\tx\ttest\n" for name in names), encoding="utf-8")
    _, images, _ = data.load({"test": data.read_folder(tmp_path / "set", "test")}, 4, tmp_path / "cache")
    assert images["test"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_without_test_files_there_is_no_test_split(tmp_path):
    write_precomp(tmp_path)
    (tmp_path / "test_caps.txt").unlink()
    (tmp_path / "test_filename.txt").unlink()
    with pytest.raises(data.NoSplit, match="no test_filename.txt and no test_caps.txt"):
        data.read_precomp(tmp_path, "test")


def test_a_missing_file_is_no_missing_split(tmp_path):
    for name in ("test_caps.txt", "train_caps.txt"):
        (write_precomp(tmp_path / name) / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} is not there; .* holds test_"):
            data.read_precomp(tmp_path / name, name.split("_")[0])


def test_a_single_picture_is_a_test_split(tmp_path):
    pairs = data.read_precomp(write_precomp(tmp_path, train=2, test=1), "test")
    assert (len(pairs.images), len(pairs.captions), pairs.image_of_caption) == (1, 5, [0] * 5)


def line_at(root, source):
    name, line = source.split(":")
    return (root / name).read_text().split("\n")[int(line) - 1].strip()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_caption_knows_its_line(tmp_path, split):
    pairs = data.read_precomp(write_precomp(tmp_path), split)
    for caption, source in zip(pairs.captions, pairs.sources):
        assert caption == line_at(tmp_path, source)


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
    with pytest.raises(data.NoSplit, match="no picture of split 'dev'"):
        data.read_karpathy_json(tmp_path, "dev")


def write_reid(path, rows, key="file_path", path_format="a/{}.jpg"):
    """An annotation file with rows (split, id, number of captions)."""
    path.write_text(json.dumps([dict(split=split, id=person, captions=[f"{person} {c}" for c in range(count)])
                                | {key: path_format.format(n)} for n, (split, person, count) in enumerate(rows)]))


@pytest.mark.parametrize("name, key, first", [
    ("reid_raw.json", "file_path", 1), ("ICFG-PEDES.json", "file_path", 0), ("ICFG_PEDES.json", "file_path", 0),
    ("data_captions.json", "img_path", 0)])
def test_reid_annotations(tmp_path, name, key, first):
    rows = [("train", first + 4, 2), ("TRAIN", first, 3), ("train", first + 4, 1), ("Test", first + 9, 2)]
    write_reid(tmp_path / name, rows, key)
    train = data.read_reid(tmp_path, "train")
    assert train.ids == [1, 0, 1]
    assert train.image_of_caption == [0, 0, 1, 1, 1, 2]
    assert train.captions[2:5] == [f"{first} {c}" for c in range(3)]
    test = data.read_reid(tmp_path, "test")
    assert (test.ids, test.images) == ([first + 9], [str(tmp_path / "imgs" / "a/3.jpg")])


def test_caption_all_json_alone_is_told_apart(tmp_path):
    (tmp_path / "caption_all.json").write_text("[]")
    with pytest.raises(FileNotFoundError, match="reid_raw.json.*caption_all.json lacks the split"):
        data.read_reid(tmp_path, "train")


@pytest.mark.parametrize("dataset, own", [("CUHK-PEDES", ["reid_raw.json"]), ("RSTPReid", ["data_captions.json"]),
                                          ("ICFG-PEDES", ["ICFG-PEDES.json", "ICFG_PEDES.json"])])
def test_each_reid_set_takes_its_own_annotation_file_only(tmp_path, dataset, own):
    for name in ("reid_raw.json", "ICFG-PEDES.json", "ICFG_PEDES.json", "data_captions.json"):
        (tmp_path / name).mkdir()
        write_reid(tmp_path / name / name, [("train", 3, 2)])
        if name in own:
            assert data.read(dataset, tmp_path / name, "train").ids == [0]
        else:
            words = f"{name} does not hold {own[0]}.* of {dataset}, from github.com"
            with pytest.raises(FileNotFoundError, match=words):
                data.read(dataset, tmp_path / name, "train")


def test_icfg_has_no_validation_split(tmp_path):
    write_reid(tmp_path / "ICFG-PEDES.json", [("train", 0, 1), ("test", 1, 1)])
    with pytest.raises(data.NoSplit, match="ICFG-PEDES.json has no picture of split 'val'; there are .*'test': 1"):
        data.read("ICFG-PEDES", tmp_path, "val")


@pytest.mark.parametrize("text, words", [("[{]", "reid_raw.json is not readable JSON: .*line 1 column 3"),
                                         ("7", "reid_raw.json is no list of entries that have id, split, captions"),
                                         ('[{"id": 1, "captions": []}]', "reid_raw.json is no list of entries")])
def test_annotations_of_another_layout_are_refused(tmp_path, text, words):
    (tmp_path / "reid_raw.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        data.read_reid(tmp_path, "train")


def test_a_folder_of_ones_own_with_splits(tmp_path):
    (tmp_path / "captions.tsv").write_text("a.png\tone\ttrain\nb.png\ttwo\ttest\na.png\tthree\ttrain\n")
    train = data.read("folder", tmp_path, "train")
    assert train.images == [str(tmp_path / "a.png")]
    assert (train.captions, train.image_of_caption) == (["one", "three"], [0, 0])
    assert data.read("folder", tmp_path, "test").captions == ["two"]
    with pytest.raises(data.NoSplit, match="captions.tsv has no picture of split 'val'"):
        data.read("folder", tmp_path, "val")


def test_a_folder_without_splits_is_dealt_80_10_10_in_any_order_of_lines(tmp_path):
    names = [f"{k:02d}.png" for k in range(25)]
    (tmp_path / "captions.tsv").write_text("".join(f"{name}\tx\n{name}\ty\n" for name in reversed(names)))
    random.seed(2)
    random.shuffle(names)
    for split, expected in (("val", names[:2]), ("test", names[2:4]), ("train", names[4:])):
        pairs = data.read_folder(tmp_path, split)
        assert sorted(Path(path).name for path in pairs.images) == sorted(expected)
        assert len(pairs.captions) == 2 * len(expected)


@pytest.mark.parametrize("count, train, held_out", [(1, 1, 0), (2, 2, 0), (3, 1, 1), (5, 3, 1)])
def test_a_handful_of_pictures_can_be_split(tmp_path, count, train, held_out):
    (tmp_path / "captions.tsv").write_text("".join(f"{k}.png\tx\n" for k in range(count)))
    assert len(data.read_folder(tmp_path, "train").images) == train
    for split in ("val", "test"):
        if held_out:
            assert len(data.read_folder(tmp_path, split).images) == held_out
        else:
            with pytest.raises(data.NoSplit):
                data.read_folder(tmp_path, split)


@pytest.mark.parametrize("line", ["b.png", "b.png\tx\tvalidation", "b.png\tx\ttrain\tmore", ""])
def test_a_line_of_another_layout_is_named(tmp_path, line):
    (tmp_path / "captions.tsv").write_text(f"a.png\tx\n{line}\nc.png\tx\n")
    with pytest.raises(ValueError, match="captions.tsv:2 is not picture<TAB>caption"):
        data.read_folder(tmp_path, "train")


def test_a_data_set_without_its_folder_asks_for_it():
    with pytest.raises(ValueError, match="--dataset ucm needs --data-root"):
        data.read("ucm", None, "train")


# ---------------------------------------------------------------- python data.py

def test_the_check_counts_each_split(tmp_path, monkeypatch, capsys):
    rows = [("train", 7, 2), ("train", 9, 2), ("train", 7, 1), ("val", 8, 2), ("test", 3, 0)]
    write_reid(tmp_path / "reid_raw.json", rows)
    (tmp_path / "imgs/a").mkdir(parents=True)
    for k in range(4):
        (tmp_path / f"imgs/a/{k}.jpg").touch()
    code, out, error = command(monkeypatch, capsys, "CUHK-PEDES", tmp_path)
    assert (code, error) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        "train 3 pictures 5 captions, 4 of them distinct, 0 empty, 2 ids".split(),
        "val 1 pictures 2 captions, 2 of them distinct, 0 empty, 1 ids".split(),
        "test 0 pictures 0 captions, 0 of them distinct, 0 empty".split()]


def test_the_check_counts_empty_captions(tmp_path, monkeypatch, capsys):
    (write_precomp(tmp_path) / "test_caps.txt").write_text("\n \nx\nx\nx\nx\nx\nx\nx\nx\n")
    code, out, _ = command(monkeypatch, capsys, "ucm", tmp_path)
    assert code == 0 and "test       2 pictures     10 captions,      2 of them distinct, 2 empty\n" in out


def test_the_check_says_which_split_there_is_not_and_that_is_no_error(tmp_path, monkeypatch, capsys):
    write_reid(tmp_path / "ICFG-PEDES.json", [("train", 0, 1), ("test", 1, 1)])
    (tmp_path / "imgs/a").mkdir(parents=True)
    for k in range(2):
        (tmp_path / f"imgs/a/{k}.jpg").touch()
    code, out, error = command(monkeypatch, capsys, "ICFG-PEDES", tmp_path)
    assert (code, error) == (0, "") and "val   no such split: " in out


def test_the_check_tells_all_problems_of_all_splits(tmp_path, monkeypatch, capsys):
    write_precomp(tmp_path)
    (tmp_path / "test_caps.txt").unlink()
    for k in range(3):
        (tmp_path / f"ucm_images/{k}.png").unlink()
    random.seed(2)
    order = list(range(10))
    random.shuffle(order)
    lost = sum(k in (0, 1, 2) for k in order[:8])
    code, _, error = command(monkeypatch, capsys, "ucm", tmp_path)
    expected = [f"data.py: error: {split}: {count} pictures are missing in {tmp_path / 'ucm_images'}"
                for split, count in (("train", lost), ("val", 3 - lost)) if count]
    assert code == 2 and error.splitlines()[:-1] == expected
    assert "test_caps.txt is not there" in error.splitlines()[-1]


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
    assert all(words in str(error.value) for words in ("2 pictures", pairs.images[1], pairs.images[5]))
    assert list((tmp_path / "cache").iterdir()) == []


def huge_png(width, height):
    """A PNG of a few bytes that claims to be large."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def encoded(extension):
    """The bytes of a picture of noise, which does not compress."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"x.{extension}")
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)).save(path)
        return path.read_bytes()


FAULTS = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is missing"),
    "empty": (lambda path: path.write_bytes(b""), "cannot identify"),
    "text": (lambda path: path.write_text("<html>404</html>"), "cannot identify"),
    "half a PNG": (lambda path: path.write_bytes(encoded("png")[:3000]), "truncated"),
    "half a JPEG": (lambda path: path.write_bytes(encoded("jpg")[:1000]), "truncated"),
    "half a TIFF": (lambda path: path.write_bytes(encoded("tif")[:3000]), "truncated|cannot identify"),
    "a broken PNG": (lambda path: path.write_bytes(encoded("png")[:60] + b"?" * 3000), "stream contents"),
    "a bomb": (lambda path: path.write_bytes(huge_png(50000, 50000)), "decompression bomb")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_picture_is_named_with_its_fault_and_nothing_is_left(tmp_path, fault):
    pairs = data.read_precomp(write_precomp(tmp_path / "set"), "train")
    spoil, words = FAULTS[fault]
    spoil(Path(pairs.images[4]))
    with pytest.raises(ValueError, match=f"1 pictures .*{pairs.images[4]}.*({words}).*--skip-bad"):
        data.load({"train": pairs}, 8, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_picture_that_may_not_be_read_is_named(tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        Image.new("RGB", (9, 9)).save(f"{folder}/a.png")
        os.chmod(f"{folder}/a.png", 0)
        os.chmod(folder, 0o777)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)       # root may read everything
        try:
            with pytest.raises(ValueError, match="a.png: Permission denied"):
                data.load_images([f"{folder}/a.png"], 8, f"{folder}/cache")
        finally:
            os.seteuid(user)


def test_one_error_names_the_bad_pictures_of_all_splits(tmp_path):
    pairs = read_all(write_precomp(tmp_path / "set"))
    bad = [part.images[0] for part in pairs.values()]
    for path in bad:
        Path(path).write_bytes(b"")
    with pytest.raises(ValueError, match="3 pictures") as error:
        data.load(pairs, 8, tmp_path / "cache")
    assert all(path in str(error.value) for path in bad)


def test_of_many_bad_pictures_twenty_are_named_and_the_others_counted(tmp_path):
    pairs = data.Pairs([f"{k}.png" for k in range(33)], ["x"] * 33, list(range(33)))
    with pytest.raises(ValueError, match="33 pictures .*0.png is missing.*19.png is missing; and 13 more") as error:
        data.load({"test": pairs}, 8, tmp_path)
    assert "20.png" not in str(error.value)


def test_skipped_pictures_go_with_their_captions_and_the_others_stay_together(tmp_path):
    pairs = read_all(write_precomp(tmp_path / "set"))
    bad = [pairs["train"].images[0], pairs["train"].images[5], pairs["test"].images[1]]
    for path in bad:
        Path(path).write_bytes(b"")
    loaded, images, _ = data.load(pairs, 8, tmp_path / "cache", skip_bad=True)
    assert {split: len(part.images) for split, part in loaded.items()} == {"train": 6, "val": 2, "test": 1}
    for split, part in loaded.items():
        assert len(part.captions) == len(part.sources) == len(part.image_of_caption) == 5 * len(part.images)
        for caption, source, n in zip(part.captions, part.sources, part.image_of_caption):
            k = int(Path(part.images[n]).stem)
            assert caption.startswith(f"test {k - 10} " if split == "test" else f"picture {k} ")
            assert images[split][n].max() == images[split][n].min() == k
            assert caption == line_at(tmp_path / "set", source)


def test_skipped_pictures_are_told(tmp_path):
    pairs = read_all(write_precomp(tmp_path / "set"))
    Path(pairs["val"].images[1]).write_bytes(b"")
    _, _, notes = data.load(pairs, 8, tmp_path / "cache", skip_bad=True)
    assert len(notes) == 1 and notes[0].startswith("1 bad pictures are left out") and pairs["val"].images[1] in notes[0]


def test_skipped_pictures_keep_the_ids_of_the_others(tmp_path):
    write_reid(tmp_path / "reid_raw.json", [("test", 5, 2), ("test", 6, 2), ("test", 7, 1)])
    (tmp_path / "imgs/a").mkdir(parents=True)
    for k in (0, 2):
        Image.new("RGB", (9, 9)).save(tmp_path / f"imgs/a/{k}.jpg")
    loaded, _, _ = data.load({"test": data.read_reid(tmp_path, "test")}, 8, tmp_path / "cache", skip_bad=True)
    assert (loaded["test"].ids, loaded["test"].captions) == ([5, 7], ["5 0", "5 1", "7 0"])


def test_a_split_of_bad_pictures_only_is_an_error(tmp_path):
    pairs = read_all(write_precomp(tmp_path / "set"))
    for path in pairs["val"].images:
        Path(path).unlink()
    with pytest.raises(ValueError, match="the split val has no picture"):
        data.load(pairs, 8, tmp_path / "cache", skip_bad=True)


def test_an_empty_list_is_an_error(tmp_path):
    write_precomp(tmp_path)
    for name in ("test_caps.txt", "test_filename.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match="the split test has no picture"):
        data.load({"test": data.read_precomp(tmp_path, "test")}, 8, tmp_path / "cache")


def test_empty_captions_are_left_out_and_told_with_their_lines(tmp_path):
    write_precomp(tmp_path / "set")
    lines = (tmp_path / "set/test_caps.txt").read_text().split("\n")
    lines[1] = lines[7] = "  \t"
    (tmp_path / "set/test_caps.txt").write_text("\n".join(lines))
    loaded, _, notes = data.load({"test": data.read_precomp(tmp_path / "set", "test")}, 8, tmp_path / "cache")
    assert notes == ["test: 2 empty captions are left out: test_caps.txt:2; test_caps.txt:8"]
    assert loaded["test"].captions == [line.strip() for line in lines if line.strip()]
    assert loaded["test"].image_of_caption == [0] * 4 + [1] * 4


def test_a_picture_without_captions_is_left_out(tmp_path):
    pairs = data.read_precomp(write_precomp(tmp_path / "set"), "test")
    pairs.captions[:5] = [""] * 5
    loaded, images, _ = data.load({"test": pairs}, 8, tmp_path / "cache")
    assert [Path(path).name for path in loaded["test"].images] == ["11.png"] and images["test"].shape == (1, 3, 8, 8)
    assert loaded["test"].image_of_caption == [0] * 5


def test_sound_data_come_back_as_they_are(tmp_path):
    pairs = read_all(write_precomp(tmp_path / "set"))
    loaded, images, notes = data.load(pairs, (8, 6), tmp_path / "cache")
    assert (loaded, notes) == (pairs, [])
    assert {split: part.shape for split, part in images.items()} == {
        "train": (8, 3, 8, 6), "val": (2, 3, 8, 6), "test": (2, 3, 8, 6)}


def test_the_empty_captions_of_rsitmd():
    root = Path(os.environ.get("UCM_ROOT", "ucm_precomp")).parent / "rsitmd_precomp"
    if not (root / "train_filename.txt").exists():
        pytest.skip(f"{root}/train_filename.txt is not there; set UCM_ROOT")
    assert [data.read("rsitmd", root, split).captions.count("") for split in ("train", "val", "test")] == [10, 10, 0]


COLOURED = {  # a flat picture in a mode of Pillow, its file, and the RGB it shows
    "palette": (Image.new("RGB", (12, 12), (10, 200, 30)).quantize(4), "png", (10, 200, 30)),
    "CMYK": (Image.new("CMYK", (12, 12), (255, 0, 0, 0)), "tif", (0, 255, 255)),
    "grey and alpha": (Image.new("LA", (12, 12), (77, 128)), "png", (77, 77, 77)),
    "RGB and alpha": (Image.new("RGBA", (12, 12), (90, 20, 3, 200)), "tif", (90, 20, 3)),
    "black and white": (Image.new("1", (12, 12), 1), "png", (255, 255, 255)),
    "16 bits": (Image.fromarray(np.full((12, 12), 200, np.uint16)), "tif", (200, 200, 200)),
    "16 bits, brighter than 255": (Image.fromarray(np.full((12, 12), 60000, np.uint16)), "tif", (255, 255, 255))}


@pytest.mark.parametrize("kind", COLOURED)
def test_every_kind_of_picture_becomes_rgb(tmp_path, kind):
    image, extension, colour = COLOURED[kind]
    image.save(tmp_path / f"a.{extension}")
    pixels = data.load_images([tmp_path / f"a.{extension}"], 8, tmp_path / "cache")
    assert np.abs(pixels[0, :, 4, 4].astype(int) - colour).max() <= 1      # alpha is rounded


def test_a_moving_picture_is_its_first_frame(tmp_path):
    red, green = (Image.new("RGB", (12, 12), colour) for colour in ((255, 0, 0), (0, 255, 0)))
    red.save(tmp_path / "a.gif", save_all=True, append_images=[green])
    assert data.load_images([tmp_path / "a.gif"], 8, tmp_path / "cache")[0, :, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("bands, bits", [(4, 8), (5, 8), (3, 16)])
def test_a_tiff_of_several_bands_shows_its_first_three(tmp_path, bands, bits):
    colour = [(40 * band + 20) * (257 if bits == 16 else 1) for band in range(bands)]
    (tmp_path / "a.tif").write_bytes(tiff(colour, bits))
    assert data.load_images([tmp_path / "a.tif"], 8, tmp_path / "cache")[0, :, 4, 4].tolist() == [20, 60, 100]


def tiff(colour, bits, side=8):
    """The bytes of a flat TIFF with a band for each number of colour."""
    bands = len(colour)
    pixels = np.full((side * side, bands), colour, np.uint8 if bits == 8 else "<u2").tobytes()
    entries = [(256, side), (257, side), (258, None), (259, 1), (262, 2), (273, None), (277, bands), (278, side),
               (279, len(pixels))] + [(338, None)] * (bands > 3)
    start = 8 + 2 + 12 * len(entries) + 4
    lists = {258: [bits] * bands, 338: [0] * (bands - 3)}
    tables, body = b"", b""
    for tag, value in entries:
        if tag in lists:
            short = struct.pack(f"<{len(lists[tag])}H", *lists[tag])
            if len(short) > 4:
                tables, short = tables + short, struct.pack("<I", start + len(tables))
            body += struct.pack("<HHI", tag, 3, len(lists[tag])) + short.ljust(4, b"\0")
        else:
            body += struct.pack("<HHII", tag, 4, 1, 0x5A5A5A5A if value is None else value)
    body = body.replace(b"ZZZZ", struct.pack("<I", start + len(tables)))       # where the pixels begin
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + b"\0" * 4 + tables + pixels


@pytest.mark.parametrize("spoil", [lambda pixels: pixels[:100], lambda pixels: b"", lambda pixels: pixels + b"more"])
def test_a_cache_file_of_another_length_is_made_again(tmp_path, spoil):
    pairs = data.read_precomp(write_precomp(tmp_path / "set"), "val")
    before = np.array(data.load_images(pairs.images, 8, tmp_path / "cache"))
    file, = (tmp_path / "cache").iterdir()
    file.write_bytes(spoil(file.read_bytes()))
    assert (data.load_images(pairs.images, 8, tmp_path / "cache") == before).all()
    assert list((tmp_path / "cache").iterdir()) == [file] and file.stat().st_size == before.size


def test_a_picture_edited_to_the_same_length_makes_a_new_cache(tmp_path):
    path = tmp_path / "a.bmp"
    for k in (3, 7):
        Image.new("RGB", (9, 9), (k, k, k)).save(path)
        os.utime(path, ns=(k, k))
        assert data.load_images([path], 8, tmp_path / "cache").max() == k


def test_another_size_is_another_cache(tmp_path):
    pairs = data.read_precomp(write_precomp(tmp_path / "set"), "val")
    for size, shape in ((8, (8, 8)), ((8, 8), (8, 8)), ((12, 4), (12, 4)), ((4, 12), (4, 12))):
        images = data.load_images(pairs.images, size, tmp_path / "cache")
        expected = [clip.preprocess(Image.open(path), size).numpy() for path in pairs.images]
        assert images.shape[2:] == shape and (images == np.stack(expected)).all()
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    pairs = data.read_precomp(write_precomp(tmp_path / "set"), "train")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))       # as if the disk ended there
    try:
        with pytest.raises(OSError, match="^cannot write .*uint8: .*make room there") as error:
            data.load_images(pairs.images, 64, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value) and list((tmp_path / "cache").iterdir()) == []


def test_two_processes_may_make_the_same_cache_at_once(tmp_path, monkeypatch):
    pairs = data.read_precomp(write_precomp(tmp_path / "set"), "train")
    expected = np.array(data.load_images(pairs.images, 64, tmp_path / "cache"))
    file, = (tmp_path / "cache").iterdir()
    file.unlink()
    preprocess, context = clip.preprocess, multiprocessing.get_context("fork")
    nearly, begun, finished = context.Event(), context.Event(), context.Event()

    def first(image, size):             # waits with its last picture until the second process has begun
        if image.filename == pairs.images[-1]:
            nearly.set()
            begun.wait(30)
        return preprocess(image, size)

    def second(image, size):            # waits with each until the first process has finished
        begun.set()
        finished.wait(30)
        return preprocess(image, size)

    def make(slow, start, end):
        start.wait(30)
        monkeypatch.setattr(clip, "preprocess", slow)
        images = data.load_images(pairs.images, 64, tmp_path / "cache")
        end.set()
        os._exit(0 if (images == expected).all() else 1)
    now = context.Event()
    now.set()
    processes = [context.Process(target=make, args=args) for args in ((first, now, finished), (second, nearly, now))]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert list((tmp_path / "cache").iterdir()) == [file]


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


def test_people_are_moved_by_each_number_of_pixels_alike(monkeypatch):
    monkeypatch.setattr(data, "erase", lambda images: images)
    torch.manual_seed(0)
    lines = torch.zeros(6300, 1, 41, 41)
    lines[..., 20] = 1
    counts = data.augment(lines, "people")[:, 0, 20].argmax(dim=1).bincount(minlength=41)
    assert counts[:10].sum() == counts[31:].sum() == 0          # of each of 21 there should be 300, + - 5 sigma
    assert (counts[10:31] > 215).all() and (counts[10:31] < 385).all()


def boxes(filled):
    """(height, width) of the box in each of the masks (B, H, W) that has one; it must be one whole box."""
    for mask in filled[filled.any(dim=(1, 2))]:
        rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
        box = mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
        assert box.all() and mask.sum() == box.sum()
        yield box.shape


@pytest.mark.parametrize("H, W", [(60, 60), (96, 48)])
def test_an_erased_box_is_2_to_40_percent_of_the_picture_and_lies_anywhere_in_it(H, W):
    torch.manual_seed(0)
    filled = (data.erase(torch.zeros(600, 3, H, W)) > 0).all(dim=1)
    sizes = list(boxes(filled))
    shares = [h * w / (H * W) for h, w in sizes]
    assert 0.015 < min(shares) < 0.04 and 0.36 < max(shares) < 0.42
    assert filled.any(dim=0).any(dim=0).all() and filled.any(dim=0).any(dim=1).all()


def test_an_erased_box_is_of_many_forms():
    torch.manual_seed(0)
    filled = (data.erase(torch.zeros(600, 3, 90, 90)) > 0).all(dim=1)
    aspects = [h / w for h, w in boxes(filled)]
    assert 0.27 < min(aspects) < 0.36 and 2.8 < max(aspects) < 3.6
    assert 0.4 < sum(aspect < 1 for aspect in aspects) / len(aspects) < 0.6


def test_half_of_the_pictures_are_erased():
    torch.manual_seed(0)
    erased = (data.erase(torch.zeros(1000, 3, 20, 20)) > 0).any(dim=(1, 2, 3)).float().mean()
    assert 0.45 < erased < 0.55


def test_what_is_erased_is_zero_after_normalisation_and_the_rest_as_it_was():
    torch.manual_seed(0)
    images = torch.full((50, 3, 20, 20), 7.0)
    erased = data.erase(images)
    changed = (erased != images).all(dim=1)
    assert changed.any() and ((erased != images).any(dim=1) == changed).all()
    assert clip.normalize(erased).permute(0, 2, 3, 1)[changed].abs().max() < 1e-5


@pytest.mark.parametrize("kind, erased", [("none", False), ("crop", False), ("aerial", False), ("people", True)])
def test_only_people_are_erased_in_part(kind, erased):
    torch.manual_seed(0)
    images = data.augment(torch.full((40, 3, 30, 30), 200.0), kind)
    mean = 255 * torch.tensor(clip.MEAN).view(3, 1, 1)
    assert torch.isclose(images, mean, atol=1e-3).all(dim=1).any() == erased


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


def test_processes_share_each_batch_in_equal_contiguous_parts():
    images, tokens = np.zeros((11, 3, 2, 2), np.uint8), torch.arange(11)[:, None]
    order = np.array([7, 1, 4, 9, 0, 2, 8, 3, 5, 6, 10])
    parts = [[rows.tolist() for _, _, rows in data.batches(images, tokens, range(11), order, 4, rank=rank, world=2)]
             for rank in range(2)]
    assert parts == [[[7, 1], [0, 2], [5]], [[4, 9], [8, 3], [6]]]       # the last caption is dropped


def test_a_last_batch_of_fewer_captions_than_processes_is_dropped():
    images, tokens = np.zeros((7, 3, 2, 2), np.uint8), torch.arange(7)[:, None]
    for rank in range(3):
        seen = list(data.batches(images, tokens, range(7), np.arange(7), 3, start=1, rank=rank, world=3))
        assert [rows.tolist() for _, _, rows in seen] == [[3 + rank]]
        assert seen[0][0].shape == (1, 3, 2, 2)


# ---------------------------------------------------------------- the drawn worlds

def scenes(draw, count=300, seed=1):
    return [draw(np.random.default_rng((seed, i)), 40) for i in range(count)]


def test_the_words_are_known_and_captions_mostly_unique():
    ground, aerial = ([text for _, five in scenes(draw) for text in five]
                      for draw in (data.draw_ground, data.draw_aerial))
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


def test_drafts_leave_nothing_behind_and_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "world").mkdir()
    data.write_world(tmp_path / "world", data.draw_ground, images=2, test=1, seed=3, size=40)
    data.write_people(tmp_path / "people", people=1, views=1, seed=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["people", "world"]
    assert len(data.read_precomp(tmp_path / "world", "test").images) == 1


def test_a_world_that_another_process_made_meanwhile_is_left_as_it_is(tmp_path):
    def draw(rng, size):
        (tmp_path / "world/images").mkdir(parents=True, exist_ok=True)
        return data.draw_ground(rng, size)
    data.write_world(tmp_path / "world", draw, images=2, test=1, seed=3, size=40)
    assert [path.name for path in tmp_path.iterdir()] == ["world"]
    assert [path.name for path in (tmp_path / "world").iterdir()] == ["images"]


def test_a_world_is_drawn_on_first_use_and_then_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.WORLDS, "toy-people", lambda root: data.write_people(root, people=10, views=2, seed=0))
    Path("runs/toy-people-world").mkdir(parents=True)       # an empty folder is no world
    first = data.read("toy-people", None, "train")
    monkeypatch.setattr(data, "draw_view", lambda *_: pytest.fail("drawn again"))
    assert data.read("toy-people", None, "train") == first
    assert Path("runs/toy-people-world/data_captions.json").exists()


def test_drawn_people_are_split_by_person_and_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        data.write_people(tmp_path / name, people=10, views=3, seed=0)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 30 + 1
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    pairs = {split: data.read("RSTPReid", tmp_path / "a", split) for split in ("train", "val", "test")}
    ids = [n for n in range(10) for _ in range(3)]
    assert [pairs[split].ids for split in pairs] == [ids[:21], ids[21:24], ids[24:]]
    assert all(len(part.captions) == 2 * len(part.images) for part in pairs.values())
    with Image.open(pairs["train"].images[0]) as image:
        assert image.size == (48, 96)


def test_captions_of_people_tell_the_truth_in_four_parts():
    verbs = dict(bag="carrying", shoes="with", bottom="in", top="wearing", hair="with", hat="with")
    for seed in range(100):
        rng = np.random.default_rng(seed)
        person = data.random_person(rng)
        text = data.describe_person(rng, person)
        told = [part for part, verb in verbs.items()
                if any(f"{verb} {article}{person[part]}" in text for article in ("", "a ", "an "))]
        assert len(told) == 4 == text.count(", ") + 2, (text, person)


def test_portraits_have_five_captions_of_one_person_each_told_in_other_words():
    _, captions = data.draw_portrait(np.random.default_rng(4))
    person = data.random_person(np.random.default_rng(4))
    assert len(set(captions)) == 5
    for caption in captions:
        assert sum(person[part] in caption for part in ("bag", "shoes", "bottom", "top", "hair", "hat")) == 4


def test_a_surveillance_camera_sees_less_contrast_than_a_portrait():
    spread = {"portrait": [], "view": []}
    for seed in range(12):
        spread["portrait"].append(np.asarray(data.draw_portrait(np.random.default_rng(seed))[0], float).std())
        rng = np.random.default_rng(seed)
        spread["view"].append(np.asarray(data.draw_view(rng, data.random_person(rng))[0], float).std())
    assert np.mean(spread["view"]) < 0.6 * np.mean(spread["portrait"])       # 50 to 75 % of it is haze


def test_people_wear_the_colours_they_are_said_to():
    right = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        person = data.random_person(rng) | {"bag": "no bag"}
        views = [np.asarray(data.draw_person(rng, person, (96, 48), data.WORN, 0), float) for _ in range(16)]
        views = [pixels[36:42, 22:27].mean(axis=(0, 1)) for pixels in views]
        seen = np.mean(views, axis=0)           # the middle of the coat or shirt, in the mean light
        nearest = min(data.DYES.split(), key=lambda name: np.abs(data.COLOURS[name] - seen).sum())
        right += nearest == person["top"].split()[0]
    assert right >= 36


def test_hardly_two_people_are_alike():
    people = [str(data.random_person(np.random.default_rng((2, i)))) for i in range(500)]
    assert len(set(people)) == 500
