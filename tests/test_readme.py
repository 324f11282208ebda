"""README.md: what it says of the code is true of the code."""
import re
import shutil
import subprocess
import sys
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


@pytest.mark.parametrize("file", ["clip.py", "adapters.py", "losses.py", "data.py", "train.py", "eval.py"])
def test_the_count_of_lines_is_the_files(file):
    stated = re.search(rf"^\| `{file}` \| (\d+) \|", README, flags=re.MULTILINE)[1]
    assert int(stated) == len((ROOT / file).read_text().splitlines())


def test_every_method_is_there_with_its_count():
    stated = dict(re.findall(r"`([a-z0-9-]+)` (\d[\d ]*\d)(?= ·|\n)", README))
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
    known = {"torchrun": {"--nproc-per-node"}, "bench.py": {"--rounds"}}
    for module in (train, eval, data, clip):
        known[f"{module.__name__}.py"] = flags_of(module, monkeypatch, capsys)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= set.union(*known.values())
    for kind, block in BLOCKS:      # in a command, of the script that it calls
        for line in block.replace("\\\n", " ").splitlines() if kind == "bash" else ():
            script = re.search(r"(\w+\.py)", line)
            flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", line.partition("#")[0]))
            if script:
                assert flags <= known.get(script[1], set()) | known["torchrun"] | {"--model"}, line


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
names = dict(zip(("image", "text", "image2", "text2"), features), torch=torch, Image=Image)
sys.path.insert(0, folder + "/losses")
exec(blocks[1], names)
assert names["loss"] > 0 and len(names["parts"]) == 3
sys.path[0] = folder + "/clip"
import clip
tokenizer = clip.Tokenizer.train(["a red car", "two boats"], 8)
sizes = clip.CLIPConfig(32, 224, 32, 128, 2, 77, tokenizer.vocab_size, 128, 2)
clip.load_clip, clip.Tokenizer = lambda name: clip.CLIP(sizes), lambda: tokenizer
Image.new("RGB", (300, 250), "red").save("photo.jpg")
exec(blocks[2], names)
assert names["image"].shape == (1, 32)
sys.path[0] = folder + "/adapters"
exec(blocks[0], names)
assert torch.load("adapter.pt", weights_only=True)
assert not {{"data", "train", "eval"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
