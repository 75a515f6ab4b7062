"""The models that come with the package."""

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent.parent / "bundled"
BUNDLED_TARGET = str(_FOLDER / "target")
BUNDLED_DRAFT = str(_FOLDER / "draft")
