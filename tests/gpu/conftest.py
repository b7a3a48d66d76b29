"""What the GPU tests share: the GPU, decoders, the demo model and its NumPy reference.

Everywhere without a usable GPU these tests are skipped, with the reason that find_gpu gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onekernel.checkpoint import hub
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.weights import Weights, load_weights
from onekernel.errors import BackendError
from onekernel.gpu.decoder import Decoder
from onekernel.gpu.device import Gpu, find_gpu
from onekernel.gpu.layout import Layout
from onekernel.reference.parameters import Parameters

HERE = Path(__file__).parent
# What takes longest first, for run.py, which runs files side by side. xdist deals two to each process at the start, so
# that the fifth waits behind the first of four: a short one.
LONGEST = ("test_soak.", "test_batch_company.", "test_logits.", "[27b]", "[9b]", "reference[demo]", "test_determinism.", "test_demo_", "[4b]")


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.is_relative_to(HERE):
        item.add_marker(pytest.mark.gpu)
        if item.path.stem != "test_sizes":  # its tests share nothing; the others share their file's models
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        name = item.nodeid.split("/")[-1]
        return next((i for i, part in enumerate(LONGEST) if part in name), len(LONGEST))

    if all(item.path.is_relative_to(HERE) for item in items):
        items.sort(key=rank)


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    try:
        return find_gpu()
    except BackendError as error:
        pytest.skip(str(error))


MakeDecoder = Callable[..., Decoder]


@pytest.fixture
def make_decoder(gpu: Gpu) -> Iterator[MakeDecoder]:
    """Decoders that are closed when the test ends: (weights, shape, vocabulary_size=None, **of Decoder) -> Decoder."""
    made: list[Decoder] = []

    def make(weights: Weights, shape: Shape, vocabulary_size: int | None = None, **options: Any) -> Decoder:
        layout = Layout.plan(shape, vocabulary_size or shape.vocab, gpu.sm_count, gpu.shared_memory)
        made.append(Decoder(gpu, layout, weights, **options))
        return made[-1]

    yield make
    for decoder in made:
        decoder.close()


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    return hub.resolve("demo")


@pytest.fixture(scope="session")
def demo_shape(demo_folder: Path) -> Shape:
    return Shape.load(demo_folder)


@pytest.fixture(scope="session")
def demo_weights(demo_folder: Path, demo_shape: Shape) -> Weights:
    return load_weights(demo_folder, demo_shape)


@pytest.fixture(scope="session")
def demo_reference(demo_weights: Weights, demo_shape: Shape) -> Parameters:
    return Parameters.load(demo_weights, demo_shape, mtp=False)


@pytest.fixture(scope="module")
def demo(gpu: Gpu, demo_weights: Weights, demo_shape: Shape, demo_folder: Path) -> Iterator[Decoder]:
    """The demo model on the GPU, one for all tests of a file."""
    from onekernel.text.tokenizer import Tokenizer

    vocabulary_size = Tokenizer.load(demo_folder).size
    decoder = Decoder(gpu, Layout.plan(demo_shape, vocabulary_size, gpu.sm_count, gpu.shared_memory), demo_weights)
    yield decoder
    decoder.close()
