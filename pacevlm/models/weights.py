"""Weights from a checkpoint's safetensors files straight into a model's parameters, without a second copy of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pacevlm.errors import CheckpointError
from pacevlm.models.folder import first_of, weight_files

# As safetensors names what weights may be stored as; quantised ones are not loaded.
STORED_DTYPES = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of a tensor.

    Attributes:
        file: the file that holds it.
        shape: its shape.
        dtype: as safetensors names it, for example `BF16`.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Place:
    """Where a stored tensor goes.

    Attributes:
        target: a view of the parameter, or of the part of it.
        stored_shape: shape in the file, with as many numbers in the same order; that of `target` if empty.
    """

    target: Tensor
    stored_shape: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        return self.stored_shape or tuple(self.target.shape)


# All tensors of a checkpoint by the names that they have in its files.
Layout = Mapping[str, Place]


@dataclass(frozen=True)
class Mismatch:
    """How the tensors of a checkpoint differ from those that its configuration asks for.

    Attributes:
        missing: names that no file holds.
        extra: names that nothing asks for.
        misshapen: shape found and shape asked for, by name.
        unreadable: dtypes that are not loaded, by name.
    """

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)

    def sentences(self) -> Iterator[str]:
        """What is wrong, each with the first names."""
        if self.missing:
            yield f"{len(self.missing)} tensors are missing ({first_of(self.missing)})"
        if self.extra:
            yield f"{len(self.extra)} tensors belong to no part of the model ({first_of(self.extra)})"
        if self.misshapen:
            shapes = [f"{name} is {found}, not {wanted}" for name, (found, wanted) in self.misshapen.items()]
            yield f"{len(shapes)} tensors have another shape ({first_of(shapes)})"
        if self.unreadable:
            dtypes = [f"{name} is {dtype}" for name, dtype in self.unreadable.items()]
            yield f"{len(dtypes)} tensors are stored as other than {', '.join(STORED_DTYPES)} ({first_of(dtypes)})"


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """What a folder's checkpoint holds, by name; of its files only the headers are read.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt.
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(str(file), "pt") as content:
                for name in content.keys():  # noqa: SIM118  (no mapping)
                    tensor = content.get_slice(name)
                    found[name] = StoredTensor(file, tuple(tensor.get_shape()), tensor.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or corrupt ({error}); copy it again") from error
    return found


def nearest_layout(stored: Mapping[str, StoredTensor], layouts: Mapping[str, Layout]) -> str:
    """Name of the layout that fits most of a checkpoint's tensors, the first one of equals."""

    def fit(name: str) -> tuple[int, int]:
        shapes = {tensor: place.shape for tensor, place in layouts[name].items() if tensor in stored}
        return sum(stored[tensor].shape == shape for tensor, shape in shapes.items()), len(shapes)

    return max(layouts, key=fit)


def compare(stored: Mapping[str, StoredTensor], layout: Layout) -> Mismatch:
    """How what is stored differs from a layout."""
    both = [name for name in layout if name in stored]
    return Mismatch(
        missing=[name for name in layout if name not in stored],
        extra=[name for name in stored if name not in layout],
        misshapen={
            name: (stored[name].shape, layout[name].shape) for name in both if stored[name].shape != layout[name].shape
        },
        unreadable={name: stored[name].dtype for name in both if stored[name].dtype not in STORED_DTYPES},
    )


def check_weights(folder: Path, layouts: Mapping[str, Layout]) -> dict[str, StoredTensor]:
    """What a folder's checkpoint holds, by name; raises CheckpointError unless that is one of the layouts."""
    stored = read_headers(folder)
    wrong = list(compare(stored, layouts[nearest_layout(stored, layouts)]).sentences())
    if wrong:
        raise CheckpointError(
            f"the weights in {folder} do not belong to its config.json: {'; '.join(wrong)}; was a file swapped?"
        )
    return stored


@torch.no_grad()
def load_weights(stored: Mapping[str, StoredTensor], layouts: Mapping[str, Layout]) -> None:
    """Copy a checkpoint into the places of its layout, file by file, each tensor to their device and dtype.

    Files are mapped into memory, so that the system may drop what has been copied: beside the model itself there is
    never more than one converted tensor.

    Args:
        stored: what `check_weights` gave.
        layouts: the same ones, with places in memory.
    """
    layout = layouts[nearest_layout(stored, layouts)]
    for file in sorted({tensor.file for tensor in stored.values()}):
        with safe_open(str(file), "pt") as content:
            for name in (name for name, tensor in stored.items() if tensor.file == file):
                target = layout[name].target
                target.copy_(content.get_tensor(name).view(target.shape))
