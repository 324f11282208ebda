"""Lets plain `pytest` find the project's files; `python -m pytest` finds them by itself."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
