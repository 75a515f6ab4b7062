"""The folder that a quantised model is written to: it looks finished only when it is.

Everything is made in OUT/.partial and moved at the end, config.json last, without which nothing loads a folder. An
interrupted run leaves .partial with the parts that it finished, which the same command takes up again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError, ModelLoadError
from outrider.kernels.packed import PackedWeight
from outrider.quantization.packed_checkpoint import PackedFile, plan_linear, write_packed
from outrider.quantization.tensor_files import WEIGHTS_FILE, TensorFiles, read_json

_WORK = ".partial"
_SETTINGS = "settings.json"
_COPIED = ("*.json", "tokenizer*", "*.model", "merges.txt", "vocab.txt", "*.jinja", "LICENSE*", "NOTICE*")
_NOT_COPIED = {"config.json", "quantize_config.json"}


class OutputFolder:
    """A folder claimed for one quantisation.

    Attributes:
        path: the folder.
        weights_file: where the weights are to be written, before `finish`.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Claim the folder, or take it up again after an interruption.

        Args:
            settings: whatever the result depends on, as JSON; parts of a run with other settings are not used.

        Raises:
            ConfigError: the folder holds something else, or finished parts of a run with other settings.
            OSError: it cannot be written.
        """
        self.path = path
        self._work = path / _WORK
        self.weights_file = self._work / WEIGHTS_FILE
        self._parts = self._work / "parts"
        if path.exists() and not path.is_dir():
            raise ConfigError("output folder", got=f"the file {path}", expected="a new or empty folder")
        if path.is_dir() and any(path.iterdir()) and not (self._work / _SETTINGS).is_file():
            raise ConfigError("output folder", got=f"{path}, which is not empty", expected="a new or empty folder")
        self._parts.mkdir(parents=True, exist_ok=True)
        self._take_up(json.loads(json.dumps(settings)))

    def finished_parts(self) -> dict[str, dict[str, PackedWeight]]:
        """The layers of every part that was saved, their data in the mapped files.

        Raises:
            ModelLoadError: a part that cannot be read.
        """
        found = {}
        for file in sorted(self._parts.glob("*.safetensors")):
            linears = PackedFile(TensorFiles(self._parts, [file]), "int4")
            found[file.stem] = {name: linears.mapped(name) for name in sorted(linears.names)}
        return found

    def save_part(self, part: str, layers: Mapping[str, PackedWeight]) -> None:
        """Keep finished layers for a later run."""
        plans = [plan_linear(name, packed) for name, packed in layers.items()]
        write_packed(self._parts / f"{part}.safetensors", plans, {})

    def finish(self, source: Path, quantization_config: Mapping[str, Any]) -> None:
        """Move the weights into place, then the tokenizer and generation files of the source, then config.json.

        Raises:
            ModelLoadError: the source's config.json cannot be read.
            OSError: something cannot be written.
        """
        config = {**read_json(source / "config.json"), "quantization_config": dict(quantization_config)}
        os.replace(self.weights_file, self.path / WEIGHTS_FILE)
        names = {file.name for pattern in _COPIED for file in source.glob(pattern) if file.is_file()}
        for name in sorted(names - _NOT_COPIED):
            if not name.endswith(".index.json"):
                shutil.copyfile(source / name, self._work / name)
                os.replace(self._work / name, self.path / name)
        written = self._work / "config.json"
        written.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(written, self.path / "config.json")
        shutil.rmtree(self._work)

    def _take_up(self, settings: dict[str, Any]) -> None:
        path = self._work / _SETTINGS
        try:
            before = read_json(path) if path.is_file() else settings
        except ModelLoadError:
            before = {}  # interrupted while it was written, so there are no parts
        changed = sorted(name for name in settings.keys() | before.keys() if settings.get(name) != before.get(name))
        if changed and any(self._parts.glob("*.safetensors")):
            raise ConfigError(
                f"unfinished work in {self.path}",
                got=f"other settings ({', '.join(changed)})",
                expected="those that it was begun with",
                remedy=f"repeat that command, or remove {self._work} to begin anew",
            )
        path.write_text(json.dumps(settings), encoding="utf-8")
