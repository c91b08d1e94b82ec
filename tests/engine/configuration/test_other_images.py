"""Another data set in place of a run's own, and pictures in place of the digits."""

from __future__ import annotations

from typing import Any

import pytest

from engine.configuration.config import Config
from engine.support.errors import InputError

PHOTOS = {"data": "/photos", "center_crop": 100, "image_size": 64, "horizontal_flip": True}


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_another_data_set_reads_no_photographs(dataset: str) -> None:
    """CIFAR10 would be unpacked among them, and the digits are refused with a path or a crop."""
    data = Config.build(None, PHOTOS).replaced({"dataset": dataset}).data
    assert (data.dataset, data.data, data.center_crop) == (dataset, None, None)
    assert (data.image_size, data.horizontal_flip) == (64, True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"data": "/others"}, ("images", "/others", 100)),
        ({"dataset": "images"}, ("images", "/photos", 100)),
        ({"dataset": "celeba", "data": "/faces"}, ("celeba", "/faces", 100)),
        ({"dataset": "stl10", "center_crop": 90}, ("stl10", None, 90)),
    ],
    ids=str,
)
def test_what_is_given_and_what_is_the_same_stays(given: dict[str, Any], expected: tuple[str, str, int]) -> None:
    data = Config.build(None, PHOTOS).replaced(given).data
    assert (data.dataset, data.data, data.center_crop) == expected


def test_files_beside_the_digits_are_pictures() -> None:
    digits = Config.build("digits", {})
    for data in (digits.replaced({"data": "/photos"}).data, Config.build("digits", {"data": "/photos"}).data):
        assert (data.dataset, data.data) == ("images", "/photos")
    assert Config.build("cifar10", {"data": "/cifar"}).replaced({"data": "/other"}).data.dataset == "cifar10"


def test_the_crop_of_a_preset_stays_for_pictures_and_not_for_digits() -> None:
    assert Config.build("celeba64", {"dataset": "images", "data": "/faces"}).data.center_crop == 160
    assert Config.build("celeba64", {"dataset": "digits"}).data.center_crop is None


@pytest.mark.parametrize(
    ("started", "given", "argument"),
    [
        ({}, {"data": "/photos"}, "data"),
        ({}, {"dataset": "images", "data": "/photos"}, "dataset"),
        (PHOTOS, {"dataset": "cifar10"}, "dataset"),
    ],
    ids=str,
)
def test_a_resumed_run_keeps_its_data_set(started: dict[str, Any], given: dict[str, Any], argument: str) -> None:
    with pytest.raises(InputError, match=r"it cannot be resumed with (images|cifar10); leave it out") as error:
        Config.build(None, started).resumed_with(given)
    assert error.value.argument == argument


def test_the_files_of_a_resumed_run_may_have_moved() -> None:
    assert Config.build(None, PHOTOS).resumed_with({"data": "/moved"}).data.data == "/moved"
    cifar10 = Config.build("cifar10", {"data": "/cifar"})
    assert cifar10.resumed_with({"dataset": "cifar10"}) == cifar10
