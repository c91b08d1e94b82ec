"""How the evaluation command reads pictures: as training does, or as torch-fidelity's own command if it is asked to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch_fidelity
from helpers.judging import digits, reference, write_folder
from PIL import Image

from engine import evaluate
from pipelines import open_dataset, read_pixels


def unusual_folder(folder: Path) -> Path:
    """Sixty grey digits with 16 bits, of which ten are transparent on the left instead, in two folders."""
    for number, image in enumerate(digits(0, 60)[:, 0].numpy()):
        (folder / str(number % 2)).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(image.astype(np.uint16) * 257)
        if number < 10:
            picture = Image.fromarray(image)
            picture.putalpha(Image.fromarray(np.repeat([[0] * 16 + [255] * 16], 32, axis=0).astype(np.uint8)))
        picture.save(folder / str(number % 2) / f"{number:02}.png")
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_pictures_are_read_as_training_reads_them(packed, small, tmp_path, caplog):
    folder = unusual_folder(tmp_path / "a")
    dataset = open_dataset("images", folder)
    np.save(tmp_path / "a.npy", read_pixels(dataset, backend="torch").permute(0, 2, 3, 1).numpy())
    images = Path(shutil.make_archive(str(tmp_path / "b"), "zip", folder)) if packed else folder
    flags = ["--images", str(images), "--against", str(tmp_path / "a.npy"), "--metrics", "fid,kid,prc"]
    evaluate.main([*flags, "--json", str(tmp_path / "report.json"), *small])
    report = json.loads((tmp_path / "report.json").read_text())
    values = list(report["metrics"].values())
    assert abs(values[0]) < 1e-3
    assert values[3:] == [1, 1]
    assert report["plain_reading"] is False
    said = [line for line in caplog.messages if "--plain-reading" in line]
    assert len(said) == (not packed)
    if said:
        assert all(part in said[0] for part in ("60 left out", "50 16-bit grey", "10 transparent"))


def test_the_plain_reading_is_torch_fidelitys(weights, small, tmp_path, caplog):
    torch_fidelity.register_feature_extractor("reference-of-plain", reference(weights))
    unusual_folder(tmp_path / "a")
    first, second = str(tmp_path / "a" / "0"), str(write_folder(tmp_path / "b", digits(60, 90)))
    expected = torch_fidelity.calculate_metrics(
        **{"input1": first, "input2": second, "feature_extractor": "reference-of-plain", "fid": True},
        **{"cuda": False, "cache": False, "verbose": False},
    )["frechet_inception_distance"]

    def distance(*more: str) -> float:
        flags = ["--images", first, "--against", second, "--metrics", "fid", "--json", str(tmp_path / "report.json")]
        evaluate.main([*flags, *small, *more])
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["plain_reading"] is bool(more)
        return report["metrics"]["frechet_distance[vgg-small]"]

    assert distance("--plain-reading") == expected
    assert not [line for line in caplog.messages if "--plain-reading" in line]
    assert distance() < 0.5 * expected
