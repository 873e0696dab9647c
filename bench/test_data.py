"""A batch of photographs by every loader that is installed, on images made for the occasion."""

import numpy as np
import pytest
from PIL import Image

from ..engine.config import DataConfig
from .data import LOADERS, Setting, installed, make_walks

CLASSES, IMAGES, SIDE = 4, 8, 160


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of JPEG files: smooth, since noise is no photograph."""
    root = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(CLASSES * IMAGES):
            folder = root / split / f"class{number % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((SIDE, SIDE), Image.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    return root


@pytest.mark.parametrize("loader", LOADERS)
def test_three_batches(benchmark, device, photographs, loader):
    if loader not in installed():
        pytest.skip("DALI is not installed")
    data = DataConfig(name="folder", root=str(photographs), image_size=96, workers=2)
    setting = Setting(data, 8, 3, 0, "cifar:resnet20", "cifar:resnet8", "dfpt", device)
    walk = make_walks(setting, [loader])[loader]

    def started():  # workers and pipelines are up
        batches = walk.batches(setting.steps)
        next(batches)
        return (batches,), {}

    benchmark.pedantic(lambda batches: sum(1 for _ in batches), setup=started, rounds=9)
