"""The tensors of a folder's safetensors files, memory-mapped, whatever the number of files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from outrider.errors import ModelLoadError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CONVERT = "convert it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other) writes safetensors"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CONVERT = "convert it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other) writes safetensors"


class TensorFiles:
    """All tensors of some safetensors files by name; nothing is read before it is asked for.

    Attributes:
        folder: for error messages.
        metadata: of the files, the first one's where they differ.
    """

    def __init__(self, folder: Path, files: list[Path]) -> None:
        """Open the files.

        Raises:
            ModelLoadError: a file that is missing or damaged, or a tensor that two of them hold.
        """
        self.folder = folder
        self.metadata: dict[str, str] = {}
        self._file_of: dict[str, Any] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt")
                names = file.keys()
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(
                    f"{path} is damaged",
                    got=first_line(error),
                    expected="a complete safetensors file",
                    remedy="write or download it again",
                ) from error
            self.metadata = {**(file.metadata() or {}), **self.metadata}
            for name in names:
                if name in self._file_of:
                    raise ModelLoadError(
                        f"weights of {folder}",
                        got=f"tensor {name} in two files",
                        expected=f"each once, or a {INDEX_FILE} that says which files count",
                        remedy="remove the files that do not belong to the model",
                    )
                self._file_of[name] = file

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def tensor(self, name: str) -> Tensor:
        """A tensor in the file's memory: do not write to it.

        Raises:
            ModelLoadError: no such tensor.
        """
        return self._file(name).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor.

        Raises:
            ModelLoadError: no such tensor.
        """
        return tuple(self._file(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As the format spells it, such as "BF16".

        Raises:
            ModelLoadError: no such tensor.
        """
        return self._file(name).get_slice(name).get_dtype()

    def _file(self, name: str) -> Any:
        try:
            return self._file_of[name]
        except KeyError:
            raise ModelLoadError(
                f"weights of {self.folder}",
                got=f"no tensor {name}",
                expected="every tensor that config.json asks for",
                remedy="download all files of the model",
            ) from None


class LoadedTensors:
    """Tensors that are in memory already, with the interface of `TensorFiles`."""

    def __init__(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        self.folder = folder
        self.metadata: dict[str, str] = {}
        self._tensors = tensors

    @property
    def names(self) -> list[str]:
        return sorted(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)


def open_tensor_files(folder: Path) -> TensorFiles:
    """The files of a model: those that an index names, else `model.safetensors`, else all there are.

    Raises:
        ModelLoadError: there are none, or some are missing or damaged.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, Mapping) else []
        absent = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if absent or not names:
            raise ModelLoadError(
                f"{index}",
                got=f"missing files {absent[:3]}" if absent else "no weight_map",
                expected="a map from tensors to the files next to it",
                remedy="download the missing files",
            )
        return TensorFiles(folder, [folder / name for name in names])
    single = folder / WEIGHTS_FILE
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        raise ModelLoadError(
            f"weights of {folder}",
            got=f"only pickle files ({', '.join(pickles[:3])})" if pickles else "none",
            expected="safetensors files (pickles can run code when they are read)",
            remedy=_CONVERT if pickles else "download the *.safetensors files of the model",
        )
    return TensorFiles(folder, files)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelLoadError: no such file, or something else in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"{path} cannot be read", got=first_line(error), expected="a JSON object", remedy="restore the file"
        ) from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path}", got=type(content).__name__, expected="a JSON object")
    return content


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
