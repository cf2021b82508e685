"""Images made in memory, in every format that users have."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def picture(height: int = 48, width: int = 64, *, seed: int = 0) -> np.ndarray:
    """A smooth coloured picture [h, w, 3] uint8 without any symmetry, so that turning and swapping show."""
    import cv2

    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


def encode(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    """An image file of `kind`, as Pillow writes it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def encode_deep(values: np.ndarray, extension: str) -> bytes:
    """An image file of more than 8 bits a channel (RGB order), as OpenCV writes it."""
    import cv2

    stored = values if values.ndim == 2 else np.ascontiguousarray(values[..., [2, 1, 0, *range(3, values.shape[2])]])
    done, encoded = cv2.imencode(extension, stored)
    assert done
    return encoded.tobytes()


def orientation_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def tiny_dinov2(folder, *, image_size: int = 56) -> str:
    """A random Dinov2 of 32 dimensions, saved as transformers does."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=14, image_size=image_size
    )
    Dinov2Model(config).save_pretrained(folder)
    return str(folder)


def tiny_resnet(folder) -> str:
    """A random ResNet of 24 dimensions, saved as transformers does."""
    import torch
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[12, 24], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    return str(folder)
