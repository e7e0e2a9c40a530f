"""Where a data set is found, that a wrong file is refused, and what a valid file must hold."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
import pooch
import pytest
import torch

from hyperlearn import datasets
from hyperlearn.datasets import (
    ChecksumError,
    Dataset,
    DatasetError,
    DatasetNotFoundError,
    InvalidDatasetError,
    UnknownDatasetError,
    describe,
    find,
    load,
    search_path,
    validate_images,
)

CONTENT = b"the content of a small data set"


def register(monkeypatch: pytest.MonkeyPatch, content: bytes) -> Dataset:
    """Add a data set "tiny" with this content to the registry, for one test."""
    tiny = Dataset(
        name="tiny",
        file="tiny.h5",
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
        source="this test",
        licence="CC0",
        description="a few bytes",
    )
    monkeypatch.setitem(datasets.DATASETS, "tiny", tiny)
    return tiny


@dataclass
class Places:
    """The directories of the search path, all of them under the test's own directory."""

    checkout: Path
    named: list[Path]
    cache: Path

    @property
    def all(self) -> list[Path]:
        return [self.checkout, *self.named, self.cache]


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Places:
    """A search path of empty directories, with "tiny" registered and no server."""
    places = Places(
        checkout=tmp_path / "checkout" / "data",
        named=[tmp_path / "first", tmp_path / "second"],
        cache=tmp_path / "cache",
    )
    for directory in places.all:
        directory.mkdir(parents=True)
    monkeypatch.setattr(datasets, "_checkout_directory", lambda: places.checkout)
    monkeypatch.setattr(datasets, "_cache_directory", lambda: places.cache)
    monkeypatch.setenv("HYPERLEARN_DATA", os.pathsep.join(map(str, places.named)))
    monkeypatch.delenv("HYPERLEARN_DATA_URL", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    register(monkeypatch, CONTENT)
    return places


class Handler(SimpleHTTPRequestHandler):
    """Serves files, notes every request, and breaks off in the middle of those asked to."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, FileServer)
        server.requests.append(self.path)
        if server.break_off:
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:5])
        else:
            super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


class FileServer(ThreadingHTTPServer):
    """A file server on the loopback interface."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.folder = folder
        self.requests: list[str] = []
        self.break_off = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server(places: Places, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FileServer]:
    """A running file server with an empty folder, to which HYPERLEARN_DATA_URL points."""
    folder = tmp_path / "served"
    folder.mkdir()
    with FileServer(folder) as server:
        # A short poll, because shutdown() waits for one.
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("HYPERLEARN_DATA_URL", server.url)
        yield server
        server.shutdown()
        thread.join()


# The search path


def test_search_path_order(places: Places) -> None:
    assert search_path() == places.all


def test_search_path_without_checkout_and_variable(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    places.checkout.rmdir()
    monkeypatch.delenv("HYPERLEARN_DATA")
    assert search_path() == [places.cache]


def test_search_path_skips_empty_entries_and_expands_home(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPERLEARN_DATA", os.pathsep.join(["", "~/data", ""]))
    assert search_path() == [places.checkout, Path.home() / "data", places.cache]


def test_default_directories() -> None:
    assert datasets._checkout_directory() == Path(datasets.__file__).resolve().parents[1] / "data"
    assert datasets._cache_directory() == Path(pooch.os_cache("hyperlearn"))


# Finding a file


@pytest.mark.parametrize("first", range(4))
def test_first_directory_that_holds_the_file_wins(places: Places, first: int) -> None:
    for directory in places.all[first:]:
        (directory / "tiny.h5").write_bytes(CONTENT)
    assert find("tiny") == places.all[first] / "tiny.h5"


def test_directory_of_the_same_name_is_no_file(places: Places) -> None:
    (places.checkout / "tiny.h5").mkdir()
    (places.cache / "tiny.h5").write_bytes(CONTENT)
    assert find("tiny") == places.cache / "tiny.h5"


@pytest.mark.parametrize("place", range(4))
def test_wrong_checksum_is_refused_wherever_it_is_found(
    places: Places, server: FileServer, place: int
) -> None:
    wrong = places.all[place] / "tiny.h5"
    wrong.write_bytes(b"damaged")
    for directory in places.all[place + 1 :]:  # intact copies, none of which may be used instead
        (directory / "tiny.h5").write_bytes(CONTENT)
    (server.folder / "tiny.h5").write_bytes(CONTENT)

    with pytest.raises(ChecksumError) as caught:
        find("tiny")

    message = str(caught.value)
    assert str(wrong) in message
    assert hashlib.sha256(CONTENT).hexdigest() in message
    assert hashlib.sha256(b"damaged").hexdigest() in message
    assert "Replace that file" in message
    assert wrong.read_bytes() == b"damaged"  # the user's file is left alone
    assert server.requests == []


def test_not_found_lists_every_directory_and_the_ways_out(places: Places) -> None:
    places.named[1].rmdir()
    with pytest.raises(DatasetNotFoundError) as caught:
        find("tiny")
    message = str(caught.value)
    for directory in places.all:
        assert str(directory) in message
    assert f"{places.named[1]} (no such directory)" in message
    assert message.count("no such directory") == 1
    for way in ("tiny.h5", "HYPERLEARN_DATA ", "HYPERLEARN_DATA_URL"):
        assert way in message


@pytest.mark.parametrize(
    ("name", "near"),
    [("mnits", "mnist"), ("MNIST", "mnist"), ("fashion_mnist", "fashion-mnist")],
)
@pytest.mark.parametrize("function", [find, load])
def test_unknown_name_suggests_the_nearest(
    function: Callable[[str], object], name: str, near: str
) -> None:
    with pytest.raises(UnknownDatasetError, match=f"{name!r}: did you mean '{near}'"):
        function(name)


def test_unknown_name_without_a_near_one_lists_all() -> None:
    with pytest.raises(UnknownDatasetError, match="Known: 'mnist', 'fashion-mnist'") as caught:
        find("imagenet-22k")
    assert "did you mean" not in str(caught.value)


def test_errors_are_dataset_errors_and_builtin_ones() -> None:
    for error, builtin in (
        (UnknownDatasetError, ValueError),
        (DatasetNotFoundError, FileNotFoundError),
        (ChecksumError, ValueError),
        (InvalidDatasetError, ValueError),
    ):
        assert issubclass(error, DatasetError)
        assert issubclass(error, builtin)


# Downloading


@pytest.mark.parametrize("ending", ["", "/"])
def test_download_into_the_cache_once(
    places: Places, server: FileServer, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    places.cache.rmdir()
    (server.folder / "tiny.h5").write_bytes(CONTENT)
    monkeypatch.setenv("HYPERLEARN_DATA_URL", server.url + ending)

    assert find("tiny") == places.cache / "tiny.h5"
    assert find("tiny").read_bytes() == CONTENT
    assert server.requests == ["/tiny.h5"]


def test_download_with_wrong_content_is_refused_and_not_kept(
    places: Places, server: FileServer
) -> None:
    (server.folder / "tiny.h5").write_bytes(b"damaged")
    with pytest.raises(ChecksumError) as caught:
        find("tiny")
    message = str(caught.value)
    assert f"{server.url}/tiny.h5" in message
    assert hashlib.sha256(CONTENT).hexdigest() in message
    assert hashlib.sha256(b"damaged").hexdigest() in message
    assert list(places.cache.iterdir()) == []


def test_download_that_breaks_off_is_not_kept(places: Places, server: FileServer) -> None:
    server.break_off = True
    # Whether a short body is a failed or a wrong download depends on the version of requests.
    with pytest.raises((DatasetNotFoundError, ChecksumError), match=f"{server.url}/tiny.h5"):
        find("tiny")
    assert list(places.cache.iterdir()) == []


def test_download_of_a_file_that_the_server_lacks(places: Places, server: FileServer) -> None:
    with pytest.raises(DatasetNotFoundError, match=f"{server.url}/tiny.h5") as caught:
        find("tiny")
    assert "404" in str(caught.value)
    assert caught.value.__cause__ is not None
    assert list(places.cache.iterdir()) == []


def test_download_from_a_server_that_is_down(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HYPERLEARN_DATA_URL", url)
    with pytest.raises(DatasetNotFoundError, match=f"{url}/tiny.h5") as caught:
        find("tiny")
    assert isinstance(caught.value.__cause__, OSError)
    assert list(places.cache.iterdir()) == []


@pytest.mark.parametrize("url", ["a/folder", "ftp://127.0.0.1/folder"])
def test_download_from_an_address_that_is_not_http(
    places: Places, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("HYPERLEARN_DATA_URL", url)
    with pytest.raises(DatasetNotFoundError, match=f"{url}/tiny.h5"):
        find("tiny")


# Describing


def test_describe_says_where_files_are(places: Places, server: FileServer) -> None:
    assert [row["name"] for row in describe()] == list(datasets.DATASETS)
    assert {row["found"] for row in describe(verify=True)} == {"not found"}
    assert server.requests == []  # nothing is downloaded

    held = places.named[0] / "tiny.h5"
    held.write_bytes(CONTENT)
    assert describe()[-1] == {
        "name": "tiny",
        "file": "tiny.h5",
        "description": "a few bytes",
        "source": "this test",
        "licence": "CC0",
        "size_bytes": len(CONTENT),
        "found": str(held),
        "checksum": "not verified",
    }
    assert describe(verify=True)[-1]["checksum"] == "ok"
    held.write_bytes(b"damaged")
    assert describe(verify=True)[-1]["checksum"] == "wrong"


# The layout of a file

Arrays = dict[str, np.ndarray]


def valid_arrays() -> Arrays:
    """The arrays of a small file that `load` accepts."""
    rng = np.random.default_rng(0)
    return {
        "train/images": rng.integers(0, 256, (6, 28, 28), dtype=np.uint8),
        "train/labels": np.array([0, 1, 2, 3, 8, 9], dtype=np.uint8),
        "test/images": rng.integers(0, 256, (2, 28, 28), dtype=np.uint8),
        "test/labels": np.array([9, 0], dtype=np.uint8),
    }


def store(places: Places, monkeypatch: pytest.MonkeyPatch, arrays: Arrays) -> Path:
    """Write the arrays as the data set "tiny", registered with the checksum of what was written."""
    path = places.checkout / "tiny.h5"
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            file[key] = values
    register(monkeypatch, path.read_bytes())
    return path


def test_load_returns_what_was_stored(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = valid_arrays()
    path = store(places, monkeypatch, arrays)
    data = load("tiny")
    np.testing.assert_array_equal(data.train_images, arrays["train/images"])
    np.testing.assert_array_equal(data.train_labels, arrays["train/labels"])
    np.testing.assert_array_equal(data.test_images, arrays["test/images"])
    np.testing.assert_array_equal(data.test_labels, arrays["test/labels"])
    assert data.train_labels.dtype == data.test_labels.dtype == np.int64
    assert data.path == path
    assert data.dataset is datasets.DATASETS["tiny"]


def without(key: str) -> Callable[[Arrays], object]:
    return lambda arrays: [arrays.pop(each) for each in list(arrays) if each.startswith(key)]


def replacing(key: str, values: np.ndarray) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.update({key: values})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("test"), "'test/images' is missing"),
        (without("train/labels"), "'train/labels' is missing"),
        (replacing("train/images/inner", np.zeros(1)), "'train/images' is missing"),
        (
            replacing("train/images", np.zeros((6, 784), np.uint8)),
            r"'train/images' must be uint8 of shape \(n, 28, 28\), not uint8 of shape \(6, 784\)",
        ),
        (
            replacing("test/images", np.zeros((2, 28, 27), np.uint8)),
            r"'test/images'.*\(2, 28, 27\)",
        ),
        (replacing("test/images", np.zeros((2, 28, 28))), "'test/images'.*not float64"),
        (
            replacing("test/labels", np.zeros((2, 1), np.uint8)),
            r"'test/labels' must be uint8 of shape \(n,\), not uint8 of shape \(2, 1\)",
        ),
        (replacing("test/labels", np.zeros(2)), "'test/labels'.*not float64"),
        (
            replacing("train/labels", np.array([0, 1, 10, 3, 200, 9], np.uint8)),
            r"group 'train': 2 of 6 labels outside 0\.\.9; first: 10 at index 2",
        ),
        (replacing("test/labels", np.zeros(3, np.uint8)), "group 'test': 2 images but 3 labels"),
        (
            lambda arrays: arrays.update(
                {
                    "test/images": np.zeros((0, 28, 28), np.uint8),
                    "test/labels": np.zeros(0, np.uint8),
                }
            ),
            "group 'test': empty",
        ),
    ],
)
def test_load_refuses_a_malformed_file(
    places: Places,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Arrays], object],
    message: str,
) -> None:
    arrays = valid_arrays()
    spoil(arrays)
    if "train/images/inner" in arrays:  # makes train/images a group
        del arrays["train/images"]
    path = store(places, monkeypatch, arrays)
    with pytest.raises(InvalidDatasetError, match=message) as caught:
        load("tiny")
    assert str(path) in str(caught.value)


def test_load_refuses_a_file_that_is_not_hdf5(places: Places) -> None:
    path = places.checkout / "tiny.h5"
    path.write_bytes(CONTENT)
    with pytest.raises(InvalidDatasetError, match="cannot be read as HDF5") as caught:
        load("tiny")
    assert str(path) in str(caught.value)


def test_load_refuses_a_truncated_file(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store(places, monkeypatch, valid_arrays())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ChecksumError):
        load("tiny")
    register(monkeypatch, path.read_bytes())
    with pytest.raises(InvalidDatasetError, match="truncated"):
        load("tiny")


# Validating arrays

as_array_or_tensor = pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor])


@as_array_or_tensor
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.bool_, np.float16, np.float32])
def test_validate_accepts_real_types(convert: Callable[..., object], dtype: type) -> None:
    images = convert(np.ones((3, 4), dtype))
    validate_images(images, convert(np.array([0, 1, 1])), classes=2, name="ok")  # type: ignore[arg-type]


@as_array_or_tensor
def test_validate_names_nan_pixels(convert: Callable[..., object]) -> None:
    images = np.zeros((3, 2, 2))
    images[1, 0, 1] = np.nan
    images[2, 1, 1] = np.inf
    with pytest.raises(
        InvalidDatasetError,
        match=r"mine: 2 of 12 pixels not finite; first: nan at index \(1, 0, 1\)",
    ):
        validate_images(
            convert(images),  # type: ignore[arg-type]
            convert(np.zeros(3, np.int64)),  # type: ignore[arg-type]
            classes=10,
            name="mine",
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_validate_sees_nan_in_short_floats_and_differentiable_tensors(dtype: torch.dtype) -> None:
    images = torch.tensor([[1.0, float("nan")]], dtype=dtype, requires_grad=True)
    with pytest.raises(InvalidDatasetError, match="1 of 2 pixels not finite"):
        validate_images(images, torch.tensor([0]), classes=1, name="mine")


@as_array_or_tensor
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1, 5], r"mine: 2 of 3 labels outside 0\.\.4; first: -1 at index 1"),
        ([0, 1], "mine: 3 images but 2 labels"),
        ([[0], [1], [2]], r"mine: labels must be integers of shape \(n,\), not int64"),
        ([0.0, 1.0, 2.0], "mine: labels must be integers"),
    ],
)
def test_validate_names_bad_labels(
    convert: Callable[..., object], labels: list[float], message: str
) -> None:
    images, classified = convert(np.zeros((3, 2))), convert(np.array(labels))
    with pytest.raises(InvalidDatasetError, match=message):
        validate_images(images, classified, classes=5, name="mine")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((0, 28, 28)), "mine: empty"),
        (np.zeros(0), "mine: images must be real numbers"),
        (np.zeros((0, 2), complex), "mine: images must be real numbers"),
        (np.zeros((0, 2), object), "mine: images must be real numbers"),
    ],
)
def test_validate_refuses_arrays_that_are_no_images(images: np.ndarray, message: str) -> None:
    with pytest.raises(InvalidDatasetError, match=message):
        validate_images(images, np.zeros(0, np.int64), classes=10, name="mine")


# The files of the checkout


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_checked_in_file(name: str) -> None:
    data = load(name)
    assert data.path == datasets._checkout_directory() / data.dataset.file
    assert data.path.stat().st_size == data.dataset.size_bytes
    assert data.train_images.shape == (60000, 28, 28)
    assert data.test_images.shape == (10000, 28, 28)
    assert data.train_labels.shape == (60000,)
    assert data.test_labels.shape == (10000,)
    assert data.train_images.dtype == data.test_images.dtype == np.uint8
    assert set(data.train_labels) == set(data.test_labels) == set(range(10))
    sums = (data.path.parent / "SHA256SUMS").read_text()
    assert f"{data.dataset.sha256}  {data.dataset.file}\n" in sums
    assert data.dataset.sha256 in (data.path.parent / "README.md").read_text()


def test_fashion_mnist_split_is_class_balanced() -> None:
    assert np.bincount(load("fashion-mnist").train_labels).tolist() == [6000] * 10
