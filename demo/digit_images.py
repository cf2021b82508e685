"""The 1,797 handwritten digits of scikit-learn as PNGs in ten folders, and the settings that sort them again.

    python demo/digit_images.py --out runs/digits
    python image_cluster.py --config runs/digits/config.yaml --yes

The files of every folder have the same names (0001.png, 0002.png, …), as cameras and exports like to do.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script, this folder is on the path and its parent is not
    sys.path.insert(0, str(ROOT))

from common.commit import write_bytes  # noqa: E402
from common.config import settings_to_yaml  # noqa: E402
from image_parts.settings import ImageSettings  # noqa: E402

# Digits are 8 x 8 pixels: they fill the square, need no evening out, and black on white would be the same digit.
DIGIT_VALUES: dict[str, dict[str, object]] = {
    "model": {"name": "hog", "image_size": 64, "hog_cells": 4},
    "preprocessing": {"equalization": "none", "polarity_invariant": False},
    "reduction": {"umap_min_dist": 0.0},
    "clustering": {"min_cluster_size": 80},
    "purity": {"truth": "parent_folder"},
}


def write_digit_images(folder: Path) -> int:
    """Write every digit as folder/<digit>/<number within it>.png, unless it is there; returns how many there are.

    A file that is written again has another time, and sorting it would be another plan than the one that was done.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    counts = dict.fromkeys(range(10), 0)
    for pixels, digit in zip(digits.images, digits.target.tolist(), strict=True):
        counts[digit] += 1
        path = folder / str(digit) / f"{counts[digit]:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        png = io.BytesIO()
        Image.fromarray((pixels * (255 / 16)).round().astype("uint8")).save(png, "PNG")  # 0 … 16 in the data set
        if not path.exists() or path.read_bytes() != png.getvalue():
            write_bytes(path, png.getvalue())
    return len(digits.target)


def digit_settings(folder: Path) -> ImageSettings:
    """Settings for the images in folder/images, with the results in folder/clusters."""
    values = {
        "input_dir": str(folder / "images"),
        "output_dir": str(folder / "clusters"),
        "cache": {"cache_dir": str(folder / "cache")},
        **DIGIT_VALUES,
    }
    return ImageSettings.model_validate(values)


def main() -> None:
    """Write images/ and config.yaml below the folder that is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    folder = parser.parse_args().out
    n_images = write_digit_images(folder / "images")
    write_bytes(folder / "config.yaml", settings_to_yaml(digit_settings(folder)).encode())
    print(f"{n_images} images and config.yaml in {folder}")


if __name__ == "__main__":
    main()
