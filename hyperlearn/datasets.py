"""Data sets: where a file is found, that it is the right one, and what it holds.

A data set is one HDF5 file with groups ``train`` and ``test``, each with ``images`` and ``labels``.
`find` looks for the file in the directories of `search_path`, verifies its SHA-256 and, if it is
nowhere, downloads it from the folder that the environment variable ``HYPERLEARN_DATA_URL`` names.
`load` reads and validates it. Sources and licences are in ``data/README.md``.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pooch
import torch
from numpy.typing import NDArray

__all__ = [
    "DATASETS",
    "ChecksumError",
    "Dataset",
    "DatasetError",
    "DatasetNotFoundError",
    "ImageData",
    "InvalidDatasetError",
    "UnknownDatasetError",
    "describe",
    "find",
    "load",
    "search_path",
    "validate_images",
]

_IMAGE_SHAPE = (28, 28)
_CLASSES = 10


class DatasetError(Exception):
    """Base of every error that this module raises itself."""


class UnknownDatasetError(DatasetError, ValueError):
    """No data set has this name."""


class DatasetNotFoundError(DatasetError, FileNotFoundError):
    """The file is in none of the directories and could not be downloaded."""


class ChecksumError(DatasetError, ValueError):
    """A file has the right name and the wrong content."""


class InvalidDatasetError(DatasetError, ValueError):
    """A file or a pair of arrays is not what a data set of labelled images must be."""


@dataclass(frozen=True)
class Dataset:
    """What is known about a data set before its file is opened.

    Attributes
    ----------
    name : str
        The name that `find` and `load` take.
    file : str
        The file's name, without a directory.
    sha256 : str
        SHA-256 of the file, 64 lower-case hexadecimal digits.
    size_bytes : int
        Size of the file.
    source : str
        Who made the data, and when.
    licence : str
        The data's licence, which is not the code's.
    description : str
        What the file holds, and how it differs from the published data.
    """

    name: str
    file: str
    sha256: str
    size_bytes: int
    source: str
    licence: str
    description: str


@dataclass(frozen=True, eq=False)
class ImageData:
    """Labelled images, split for training and testing.

    Attributes
    ----------
    train_images, test_images : ndarray of uint8, shape (n, 28, 28)
        Grey values 0..255, as stored.
    train_labels, test_labels : ndarray of int64, shape (n,)
        Classes 0..9. They are widened from the stored uint8, because a uint8 tensor used as an
        index is a mask in PyTorch.
    dataset : Dataset
        The registry's entry.
    path : Path
        The file that was read.
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    dataset: Dataset
    path: Path


DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="mnist",
            file="mnist.h5",
            sha256="7ba4c25a25b5295d43f4edb68402eda75397a096701c79dde1add86bdda3cc19",
            size_bytes=11_302_682,
            source="LeCun, Cortes and Burges (1998); the original IDX files",
            licence="CC BY-SA 3.0",
            description="Handwritten digits, 10 classes; the original 60000/10000 split",
        ),
        Dataset(
            name="fashion-mnist",
            file="fashion_mnist.h5",
            sha256="c6aba4f4c962de3ddf9fa49272e42c6ba056d28966f0bc5624e49ae08959253a",
            size_bytes=30_627_555,
            source="Xiao, Rasul and Vollgraf (2017), arXiv:1708.07747",
            licence="MIT",
            description=(
                "Pictures of clothing, 10 classes; not the publisher's split but a "
                "class-balanced 60000/10000 split drawn with seed 0"
            ),
        ),
    )
}


def _checkout_directory() -> Path:
    return Path(__file__).resolve().parent.parent / "data"


def _cache_directory() -> Path:
    return Path(pooch.os_cache("hyperlearn"))


def search_path() -> list[Path]:
    """List the directories in which a data set's file is looked for, in order.

    Returns
    -------
    list of Path
        The checkout's ``data/`` if it exists, the directories named by the environment variable
        ``HYPERLEARN_DATA`` (separated by `os.pathsep`), the user's cache directory.

    Examples
    --------
    >>> search_path()[-1].name
    'hyperlearn'
    """
    checkout = _checkout_directory()
    named = [entry for entry in os.environ.get("HYPERLEARN_DATA", "").split(os.pathsep) if entry]
    return [
        *([checkout] if checkout.is_dir() else []),
        *(Path(entry).expanduser() for entry in named),
        _cache_directory(),
    ]


def find(name: str) -> Path:
    """Return the path of a data set's file, with its content verified.

    The first directory of `search_path` that holds the file decides: if that copy is wrong it is an
    error, and no other copy is tried, so a damaged file never goes unnoticed. If no directory holds
    the file it is downloaded into the cache from the folder ``HYPERLEARN_DATA_URL``, if that is
    set; there is no default address.

    Parameters
    ----------
    name : str
        A key of `DATASETS`.

    Returns
    -------
    Path
        The file, whose SHA-256 is the registry's.

    Raises
    ------
    UnknownDatasetError
        If no data set has this name.
    ChecksumError
        If the file found or downloaded has another SHA-256. Such a download is not kept.
    DatasetNotFoundError
        If no directory holds the file and there is nowhere to download it from, or the download
        failed.

    Notes
    -----
    The file is read once in blocks, for its checksum: O(file size) time, O(1) memory.

    Examples
    --------
    >>> find("mnist").name
    'mnist.h5'
    >>> find("mnits")
    Traceback (most recent call last):
        ...
    hyperlearn.datasets.UnknownDatasetError: unknown data set 'mnits': did you mean 'mnist'? \
Known: 'mnist', 'fashion-mnist'
    """
    dataset = _registered(name)
    path = _locate(dataset)
    if path is None:
        return _download(dataset)
    _verify(
        path,
        dataset,
        origin=str(path),
        advice="Replace that file with an intact copy, or remove it so that the search goes on.",
    )
    return path


def load(name: str) -> ImageData:
    """Read a data set of labelled images into memory and validate it.

    Parameters
    ----------
    name : str
        A key of `DATASETS`.

    Returns
    -------
    ImageData
        Images as uint8 of shape (n, 28, 28), labels as int64 of shape (n,).

    Raises
    ------
    UnknownDatasetError, ChecksumError, DatasetNotFoundError
        As `find` does.
    InvalidDatasetError
        If the file is not HDF5, lacks a group or a dataset, or holds arrays of a wrong shape or
        type, of different lengths, or labels outside 0..9.

    Examples
    --------
    >>> data = load("mnist")
    >>> data.train_images.shape, data.train_images.dtype
    ((60000, 28, 28), dtype('uint8'))
    >>> data.test_labels[:4]
    array([7, 2, 1, 0])
    """
    dataset = _registered(name)
    path = find(name)
    try:
        with h5py.File(path, "r") as file:
            train_images, train_labels = _read_split(file, path, "train")
            test_images, test_labels = _read_split(file, path, "test")
    except OSError as error:  # h5py's error for a file or a block that it cannot read
        raise InvalidDatasetError(f"{path} cannot be read as HDF5: {error}") from error
    return ImageData(
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        dataset=dataset,
        path=path,
    )


def validate_images(
    images: NDArray[np.generic] | torch.Tensor,
    labels: NDArray[np.generic] | torch.Tensor,
    *,
    classes: int,
    name: str,
) -> None:
    """Check that two arrays are labelled images: as many of one as of the other, all values sound.

    Parameters
    ----------
    images : ndarray or Tensor, shape (n, ...)
        Any real type; floating pixels must be finite.
    labels : ndarray or Tensor, shape (n,)
        Any integer type; every label in 0..classes-1.
    classes : int
        Number of classes.
    name : str
        What to call the data in an error's message.

    Raises
    ------
    InvalidDatasetError
        If the arrays are empty, of different lengths or of a wrong shape or type, if a pixel is NaN
        or infinite, or if a label is out of range. The message says how many values offend, which
        is the first, and where.

    Notes
    -----
    O(n) time and memory; a tensor on an accelerator is copied to the host.

    Examples
    --------
    >>> validate_images(torch.zeros(2, 28, 28), torch.tensor([3, 12]), classes=10, name="digits")
    Traceback (most recent call last):
        ...
    hyperlearn.datasets.InvalidDatasetError: digits: 1 of 2 labels outside 0..9; first: 12 at \
index 1
    """
    pixels, classified = _as_numpy(images), _as_numpy(labels)
    if pixels.ndim < 2 or pixels.dtype.kind not in "biuf":
        raise InvalidDatasetError(
            f"{name}: images must be real numbers of shape (n, ...), "
            f"not {pixels.dtype} of shape {pixels.shape}"
        )
    if classified.ndim != 1 or classified.dtype.kind not in "iu":
        raise InvalidDatasetError(
            f"{name}: labels must be integers of shape (n,), "
            f"not {classified.dtype} of shape {classified.shape}"
        )
    if len(pixels) != len(classified):
        raise InvalidDatasetError(f"{name}: {len(pixels)} images but {len(classified)} labels")
    if pixels.size == 0:
        raise InvalidDatasetError(f"{name}: empty, images have shape {pixels.shape}")

    if pixels.dtype.kind == "f":
        bad = ~np.isfinite(pixels)
        if bad.any():
            index = tuple(int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
            raise InvalidDatasetError(
                f"{name}: {bad.sum()} of {bad.size} pixels not finite; "
                f"first: {pixels[index]} at index {index}"
            )

    outside = np.flatnonzero((classified < 0) | (classified >= classes))
    if outside.size:
        first = int(outside[0])
        raise InvalidDatasetError(
            f"{name}: {outside.size} of {classified.size} labels outside 0..{classes - 1}; "
            f"first: {classified[first]} at index {first}"
        )


def describe(*, verify: bool = False) -> list[dict[str, str | int]]:
    """Describe every data set and say where its file is, without downloading anything.

    Parameters
    ----------
    verify : bool, default False
        Also compute the checksum of every file found, which reads it whole.

    Returns
    -------
    list of dict
        One for each data set: ``name``, ``file``, ``description``, ``source``, ``licence``,
        ``size_bytes``, ``found`` (a path or "not found") and ``checksum`` ("ok", "wrong" or
        "not verified").

    Examples
    --------
    >>> for row in describe():
    ...     print(row["name"], row["licence"], row["size_bytes"], row["checksum"])
    mnist CC BY-SA 3.0 11302682 not verified
    fashion-mnist MIT 30627555 not verified
    """
    rows: list[dict[str, str | int]] = []
    for dataset in DATASETS.values():
        path = _locate(dataset)
        checksum = "not verified"
        if verify and path is not None:
            checksum = "ok" if _sha256(path) == dataset.sha256 else "wrong"
        rows.append(
            {
                "name": dataset.name,
                "file": dataset.file,
                "description": dataset.description,
                "source": dataset.source,
                "licence": dataset.licence,
                "size_bytes": dataset.size_bytes,
                "found": "not found" if path is None else str(path),
                "checksum": checksum,
            }
        )
    return rows


def _registered(name: str) -> Dataset:
    """Return the registry's entry, or say which names there are."""
    if name in DATASETS:
        return DATASETS[name]
    near = difflib.get_close_matches(str(name).lower().replace("_", "-"), DATASETS)
    suggestion = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    known = ", ".join(map(repr, DATASETS))
    raise UnknownDatasetError(f"unknown data set {name!r}: {suggestion}Known: {known}")


def _locate(dataset: Dataset) -> Path | None:
    """Return the first copy on the search path, verified or not."""
    candidates = (directory / dataset.file for directory in search_path())
    return next((path for path in candidates if path.is_file()), None)


def _sha256(path: Path) -> str:
    return str(pooch.file_hash(str(path), alg="sha256"))


def _verify(path: Path, dataset: Dataset, *, origin: str, advice: str) -> None:
    """Raise unless the file is the registry's; `origin` is what the message calls it."""
    found = _sha256(path)
    if found != dataset.sha256:
        raise ChecksumError(
            f"{origin} is not the data set {dataset.name!r}:\n"
            f"  expected SHA-256 {dataset.sha256} ({dataset.size_bytes} bytes)\n"
            f"  found    SHA-256 {found} ({path.stat().st_size} bytes)\n"
            f"{advice}"
        )


def _download(dataset: Dataset) -> Path:
    """Fetch the file from the folder HYPERLEARN_DATA_URL into the cache."""
    base = os.environ.get("HYPERLEARN_DATA_URL", "")
    if not base:
        looked = "\n".join(
            f"  {path}" + ("" if path.is_dir() else " (no such directory)")
            for path in search_path()
        )
        raise DatasetNotFoundError(
            f"{dataset.file} of the data set {dataset.name!r} is in none of\n{looked}\n"
            "Put the file in one of them, or set HYPERLEARN_DATA to the directory that holds it, "
            "or HYPERLEARN_DATA_URL to the address of a folder that serves it."
        )
    url = f"{base.rstrip('/')}/{dataset.file}"
    cache = _cache_directory()

    # Verifying inside the downloader, while the file is still a temporary one, lets pooch discard
    # it and the message name both checksums.
    def fetch(address: str, target: str, pup: pooch.Pooch | None) -> None:
        pooch.HTTPDownloader()(address, target, pup)
        _verify(
            Path(target),
            dataset,
            origin=f"The file downloaded from {address}",
            advice="It was discarded. Set HYPERLEARN_DATA_URL to a folder with an intact copy.",
        )

    try:
        stored = pooch.retrieve(
            url,
            known_hash=f"sha256:{dataset.sha256}",
            fname=dataset.file,
            path=cache,
            downloader=fetch,
        )
    except OSError as error:  # every error of requests is one, and so is a full or read-only disk
        raise DatasetNotFoundError(
            f"{dataset.file} of the data set {dataset.name!r} could not be downloaded "
            f"from {url} into {cache}: {error}"
        ) from error
    return Path(stored)


def _read_split(
    file: h5py.File, path: Path, split: str
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read and validate the images and labels of one group."""
    images = _read(file, path, f"{split}/images", _IMAGE_SHAPE)
    labels = _read(file, path, f"{split}/labels", ()).astype(np.int64)
    validate_images(images, labels, classes=_CLASSES, name=f"{path}, group {split!r}")
    return images, labels


def _read(file: h5py.File, path: Path, key: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Read the uint8 dataset `key`, whose rows must have the given shape."""
    stored = file.get(key)
    if not isinstance(stored, h5py.Dataset):
        raise InvalidDatasetError(f"{path}: dataset {key!r} is missing")
    # Compared before reading, so that a wrong file costs no memory.
    if stored.dtype != np.uint8 or stored.ndim != 1 + len(shape) or stored.shape[1:] != shape:
        expected = ", ".join(["n", *map(str, shape)]) + ("" if shape else ",")
        raise InvalidDatasetError(
            f"{path}: dataset {key!r} must be uint8 of shape ({expected}), "
            f"not {stored.dtype} of shape {stored.shape}"
        )
    values: NDArray[np.uint8] = stored[()]
    return values


def _as_numpy(array: NDArray[np.generic] | torch.Tensor) -> NDArray[Any]:
    if not isinstance(array, torch.Tensor):
        return np.asarray(array)
    tensor = array.detach().cpu()
    if tensor.is_floating_point() and tensor.dtype.itemsize < 4:
        tensor = tensor.float()  # NumPy has no bfloat16; widening keeps NaN and infinity
    values: NDArray[Any] = tensor.numpy()
    return values
