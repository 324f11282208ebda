"""README.md: what it says of the code is true of the code."""
import ast
import functools
import glob
import io
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch

import adapters
import clip
import data
import eval
import train

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)


def lines_of_code(source):
    """How many lines hold more than a comment or a piece of a docstring."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in layout]
    code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            code -= set(range(node.lineno, node.end_lineno + 1))
    return len(code)


@pytest.mark.parametrize("file", ["clip.py", "adapters.py", "losses.py", "data.py", "train.py", "eval.py"])
def test_the_lines_and_minutes_are_the_files(file):
    row = re.search(rf"^\| `{file}` \| (\d+) \| (\d+) \| (\d+) \|", README, flags=re.MULTILINE)
    lines, code, minutes = map(int, row.groups())
    source = (ROOT / file).read_text()
    assert (lines, code, minutes) == (len(source.splitlines()), lines_of_code(source), round(lines / 60))


def test_every_method_is_there_with_its_count():
    stated = dict(re.findall(r"^\| `([a-z0-9-]+)` \|.*\| (\d[\d ]*\d) \| [\d.]+x \|$", README, flags=re.MULTILINE))
    counts = {}
    for method in adapters.METHODS:
        if method != "none":
            with torch.device("meta"):
                model = clip.CLIP(clip.SIZES["ViT-B/32"])
                adapters.add_method(model, method)
            counts[method] = f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}".replace(",", " ")
    assert stated == counts


def flags_of(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", "--help"])
    with pytest.raises(SystemExit):
        module.main()
    return set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))


def test_every_flag_is_a_flag(monkeypatch, capsys):
    known = {"torchrun": {"--nproc-per-node"}, "bench.py": {"--rounds", "--captions", "--batch-size"}}
    for module in (train, eval, data, clip):
        known[f"{module.__name__}.py"] = flags_of(module, monkeypatch, capsys)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= set.union(*known.values())
    for kind, block in BLOCKS:      # in a command, of the script that it calls
        for line in block.replace("\\\n", " ").splitlines() if kind == "bash" else ():
            script = re.search(r"(\w+\.py)", line)
            flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", line.partition("#")[0]))
            if script:
                assert flags <= known.get(script[1], set()) | known["torchrun"] | {"--model"}, line


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with small drawn data under the names that the README's commands use, and a tiny CLIP."""
    folder = tmp_path_factory.mktemp("readme")
    for name, pictures in (("ucm_precomp", 18), ("rsicd_precomp", 24)):
        data.write_world(folder / name, data.draw_aerial, images=pictures, test=6, seed=1)
    data.write_people(folder / "CUHK-PEDES", people=10, views=2, seed=0)
    (folder / "CUHK-PEDES/data_captions.json").rename(folder / "CUHK-PEDES/reid_raw.json")
    (folder / "photos").mkdir()
    pairs = data.read("ucm", folder / "ucm_precomp", "train")
    shutil.copy(pairs.images[0], folder / "photo.jpg")
    for path in pairs.images:
        shutil.copy(path, folder / "photos")
    (folder / "photos/captions.tsv").write_text("".join(
        f"{Path(pairs.images[n]).name}\t{text}\n" for text, n in zip(pairs.captions, pairs.image_of_caption)))
    train.train(["--dataset", "ucm", "--data-root", str(folder / "ucm_precomp"), "--model", "tiny",
                 "--method", "none", "--train", "all", "--epochs", "1", "--out", str(folder / "start")])
    return folder


@pytest.fixture
def paste(place, tmp_path, monkeypatch, capsys):
    """Runs a command line of the README as a shell would, but small: an epoch or two of a tiny CLIP -> its output."""
    for name in ("ucm_precomp", "rsicd_precomp", "CUHK-PEDES", "photos", "photo.jpg", "start"):
        (tmp_path / name).symlink_to(place / name)
    for name, draw, size in (("toy-ground", data.draw_ground, {}), ("toy-aerial", data.draw_aerial, {}),
                             ("toy-portraits", data.draw_portrait, dict(size=(96, 48)))):
        monkeypatch.setitem(data.WORLDS, name, functools.partial(data.write_world, draw=draw, images=24, test=6, seed=0,
                                                                 **size))
    monkeypatch.setitem(data.WORLDS, "toy-people", functools.partial(data.write_people, people=10, views=2, seed=0))
    monkeypatch.setitem(train.TOY, "epochs", 2)
    monkeypatch.chdir(tmp_path)
    names = {}

    def run(line):
        for name, value in names.items():
            line = line.replace(f"${name}", value)
        line = line.replace("ViT-B/32", "start").replace("--model runs/small-rsicd", "--model start")
        words = shlex.split(line, comments=True)
        if not words or "=" in words[0]:
            return names.update(word.split("=", 1) for word in words)
        script = next(n for n, word in enumerate(words) if word.endswith(".py"))
        argv = [found for word in words[script:] for found in sorted(glob.glob(word)) or [word]]
        if argv[0] == "train.py" and len(argv) > 1:
            own = {"--init", "--model"} & set(argv) or "toy-people" in argv
            argv += [] if own else ["--model", "start"]
            argv += ["--epochs", "1", "--warmup", "0", "--batch-size", "8", "--epoch-over", "images"]
            argv += ["--image-size", "96", "48"] if "CUHK-PEDES" in argv and "--init" not in argv else []
        monkeypatch.setattr(sys, "argv", argv)
        capsys.readouterr()
        try:
            sys.modules[argv[0][:-3]].main()
        except SystemExit as stop:
            assert not stop.code, (argv, capsys.readouterr().err)
        return capsys.readouterr().out
    return run


COMMANDS = [block for kind, block in BLOCKS if kind == "bash" and "pip install" not in block]


@pytest.mark.parametrize("block", COMMANDS, ids=[block.strip().splitlines()[-1][:60] for block in COMMANDS])
def test_the_commands_run_one_after_the_other(paste, block):
    for line in block.replace("\\\n", " ").splitlines():
        paste(line)


def shape(line):
    """A line without its figures, their stars and the spaces that line them up."""
    line = re.sub(r"\d[\d,.:]*(e-\d+)?", "0", line.replace("*", " "))
    return re.sub(r"0( 0)+", "0", re.sub(r"[ -]+", " ", line)).strip()


def test_the_output_shown_is_what_is_printed(paste):
    """Line by line but for figures."""
    shown = next(block for kind, block in BLOCKS if block.startswith("$ python train.py"))
    printed = {shape(line) for line in paste("python train.py").splitlines()}
    assert {shape(line) for line in shown.splitlines()[1:] if line != "..."} <= printed


def test_the_deviations_are_those_marked_in_the_code():
    shown = next(block for kind, block in BLOCKS if block.startswith("$ grep"))
    marked = [f"{path.name}:{mark}" for path in sorted(ROOT.glob("*.py"))
              for mark in re.findall("differs from.*", path.read_text())]
    assert shown.splitlines()[1:] == marked


def test_every_data_set_and_method_of_a_command_exists():
    for name in re.findall(r"--dataset ([\w-]+)", README):
        assert name in data.DATASETS
    for name in re.findall(r"--method ([\w-]+)", README):
        assert name in adapters.METHODS
    for name in re.findall(r"--loss ([\w+-]+)", README):
        assert name in ("hmmc", "hmmc-softmax", "contrastive", "sdm", "sdm+id")


def test_every_picture_is_there():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures and all((ROOT / path).is_file() for path in pictures)


def test_the_pieces_work_as_shown(tmp_path, monkeypatch):
    """The Python blocks, in an empty folder that holds nothing but the files they import, with a small CLIP."""
    for name in ("adapters.py", "losses.py", "clip.py"):
        alone = tmp_path / name[:-3]
        alone.mkdir()
        shutil.copy(ROOT / name, alone)
    blocks = [block for kind, block in BLOCKS if kind == "python"]
    assert len(blocks) == 3
    script = f"""
import sys, torch
from PIL import Image
folder, blocks = {str(tmp_path)!r}, {blocks!r}
sys.path = [path for path in sys.path if path not in ("", {str(ROOT)!r})]
features = [torch.randn(4, 8) for _ in range(4)]
names = dict(zip(("image", "text", "image2", "text2"), features))
sys.path.insert(0, folder + "/losses")
exec(blocks[2], names)
assert names["loss"] > 0 and len(names["parts"]) == 3
sys.path[0] = folder + "/clip"
import clip
tokenizer = clip.Tokenizer.train(["a red car", "two boats"], 8)
sizes = clip.CLIPConfig(32, 224, 32, 128, 2, 77, tokenizer.vocab_size, 128, 2)
clip.load_clip, clip.Tokenizer = lambda name: clip.CLIP(sizes), lambda: tokenizer
Image.new("RGB", (300, 250), "red").save("photo.jpg")
exec(blocks[0], names)
assert names["image"].shape == (1, 32)
sys.path[0] = folder + "/adapters"
exec(blocks[1], names)
assert torch.load("adapter.pt", weights_only=True)
assert not {{"data", "train", "eval"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
