"""Lets plain `pytest` find the project's files, and keeps tiny models on one thread, where they are fastest."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)
