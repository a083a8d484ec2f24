"""MNIST from its IDX files, compressed or not."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch

from training.config import DataConfig
from training.data.sources import DataError, data_root, find
from training.data.splits import Data, ImageTensors

ORIGIN = "https://ossci-datasets.s3.amazonaws.com/mnist/ (files *-ubyte.gz, into MNIST/raw below the data folder)"


def read_idx(path: Path) -> torch.Tensor:
    """An IDX file of unsigned bytes as a uint8 tensor of its shape. Raises DataError for a damaged one."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); get it again from {ORIGIN}") from error
    rank = content[3] if len(content) >= 4 else 0
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * rank:
        raise DataError(f"{path} is not an IDX file of unsigned bytes; get it again from {ORIGIN}")
    shape = np.frombuffer(content, ">u4", rank, offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if values.size != np.prod(shape, dtype=object):
        raise DataError(f"{path} is damaged (shape {shape}, but {values.size} bytes); get it again from {ORIGIN}")
    return torch.from_numpy(values.reshape(shape).copy())


def _read_split(root: Path, prefix: str, pad: int) -> ImageTensors:
    def read(name: str) -> torch.Tensor:
        file = f"{prefix}-{name}-ubyte"
        return read_idx(find(root, ["MNIST/raw", "mnist", "."], [file + ".gz", file], ORIGIN))

    images, labels = read("images-idx3"), read("labels-idx1").long()
    if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels) or not len(labels):
        raise DataError(
            f"the {prefix} files of MNIST in {root} do not belong together: images {list(images.shape)}, "
            f"labels {list(labels.shape)}; get them again from {ORIGIN}"
        )
    if labels.max() > 9:
        raise DataError(f"the {prefix} labels of MNIST in {root} go up to {labels.max()}, expected 0 to 9")
    return ImageTensors(images[:, None], labels, mean=[0.1307], std=[0.3081], pad=pad)


def load_mnist(config: DataConfig) -> Data:
    """60,000 training and 10,000 test images of 28x28; augmentation shifts by up to 2 pixels."""
    root = data_root(config.root)
    train = _read_split(root, "train", pad=2 if config.augment else 0)
    return Data(train, _read_split(root, "t10k", pad=0), num_classes=10, channels=1)
