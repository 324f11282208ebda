"""Lets plain `pytest` find the project's files, and keeps tiny models tiny and on one thread, where they are fastest."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)

import clip

clip.SIZES["tiny"] = clip.CLIPConfig(64, 80, 16, 128, 2, 32, 0, 128, 2)      # the tests' own: half as deep, as fast
