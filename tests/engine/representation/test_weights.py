"""Files of weights: those that fit, those that do not, and those that would run code."""

import pytest
import torch
from safetensors.torch import save_file

from engine.representation.architectures import ARCHITECTURES
from engine.representation.build import build_extractor
from engine.representation.weights import read_state_dict
from engine.support.errors import InputError


def changed(state, case):
    if case == "missing":
        return {key: value for key, value in state.items() if key != "blocks.1.bn1.weight"}
    if case == "shape":
        return state | {"blocks.2.conv1.weight": torch.zeros(1, 2, 3)}
    if case == "larger":
        return state | {"blocks.8.conv1.weight": torch.zeros(1)}
    if case == "not finite":
        return state | {"conv1.weight": torch.full((64, 3, 3, 3), torch.nan)}
    if case == "another network":
        return ARCHITECTURES["vgg-small"].make(10, 8).state_dict()
    assert case == "other head"
    return {key: value for key, value in state.items() if "classifier" not in key} | {"fc.weight": torch.zeros(3, 3)}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "the file lacks blocks.1.bn1.weight$"),
        ("shape", "the file has another shape for blocks.2.conv1.weight$"),
        ("larger", "the file has blocks.8.conv1.weight$"),
        ("not finite", "conv1.weight holds values that are not finite"),
        ("another network", r"the file lacks conv1.weight, bn1.weight, bn1.bias and \d+ more$"),
        ("other head", None),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_that_do_not_fit(tmp_path, case, message, suffix):
    path = tmp_path / f"w{suffix}"
    state = changed(ARCHITECTURES["resnet18"].make(10, 8).state_dict(), case)
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    if message is None:
        build_extractor("resnet18", image_size=8, weights=path)
        return
    with pytest.raises(InputError, match=message) as error:
        build_extractor("resnet18", image_size=8, weights=path)
    assert error.value.argument == path
    assert "resnet18" in error.value.message
    assert "\n" not in str(error.value)


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("a file of weights has run code",))

    def __repr__(self):
        return "Malicious()"


@pytest.mark.parametrize(
    "content", [b"", b"not weights", {"model": 1}, [torch.zeros(1)], Malicious(), {"w": Malicious()}], ids=repr
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_that_are_no_state_dict(tmp_path, content, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError) as error:
        read_state_dict(path)
    assert error.value.argument == path
    assert "\n" not in str(error.value)
