"""DALI's pipelines for a GPU: defined as a loader defines them, with every check that needs no driver.

Only building a pipeline needs one. What is defined has met the schemas of DALI's operators: their names, arguments and
inputs, and which device they exist for.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipelines
from pipelines import open_dataset

dali = pytest.importorskip("nvidia.dali")
backend = pytest.importorskip("nvidia.dali.backend")
fn, types = dali.fn, dali.types

GPU = torch.device("cuda", 0)


class Defined(Exception):
    """In place of the first run of a pipeline, which would build it."""


def pictures_in_files(folder: Path) -> Path:
    for number in range(3):
        Image.fromarray(np.full((40, 50, 3), 60 * number, np.uint8)).save(folder / f"{number}.jpg")
    return folder


def pictures_in_an_array(folder: Path) -> Path:
    np.save(folder / "pictures.npy", np.zeros((5, 32, 32, 3), np.uint8))
    return folder / "pictures.npy"


CASES: dict[str, tuple[str, Callable[[Path], Path], dict[str, Any]]] = {
    "files": ("file_pipeline", pictures_in_files, {}),
    "files cropped": ("file_pipeline", pictures_in_files, {"center_crop": 24}),
    "files mirrored": ("file_pipeline", pictures_in_files, {"horizontal_flip": True}),
    "array": ("sequence_pipeline", pictures_in_an_array, {}),
    "array mirrored": ("array_pipeline", pictures_in_an_array, {"horizontal_flip": True}),
}


@pytest.fixture(params=CASES)
def gpu_pipeline(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pipeline that a loader for a GPU makes of a data set."""
    from pipelines.loading import dali_loader

    defined = []

    def run(pipeline: Any) -> None:
        defined.append(pipeline)
        raise Defined

    monkeypatch.setattr(dali.Pipeline, "run", run)
    _, make, options = CASES[request.param]
    dataset = open_dataset("images", make(tmp_path), image_size=32, **options)
    with pytest.raises(Defined):
        list(dali_loader.run(dataset, [np.arange(3)], GPU, 1, {}))
    (pipeline,) = defined
    if not pipeline._py_graph_built:
        pipeline._build_graph()
    return pipeline


def operators(pipeline: Any) -> dict[str, Any]:
    return {instance._op._schema.Name(): instance for instance in pipeline._ops}


def registered(device: str) -> list[str]:
    return {
        "cpu": backend.RegisteredCPUOps,
        "gpu": backend.RegisteredGPUOps,
        "mixed": backend.RegisteredMixedOps,
    }[device]()


def test_pipelines_are_for_the_gpu(gpu_pipeline: Any) -> None:
    assert gpu_pipeline.device_id == 0
    assert {output.device for output in gpu_pipeline._graph_outputs} == {"gpu"}


def test_operators_exist_for_their_devices_and_take_their_arguments(gpu_pipeline: Any) -> None:
    found = operators(gpu_pipeline)
    for name, instance in found.items():
        operator = instance._op
        schema = operator._schema
        assert name in registered(operator.device), f"DALI has no {name} for {operator.device}"
        schema.CheckArgs(instance.spec)
        assert not schema.IsDeprecated(), name
        given = {argument for argument in operator._init_args if not argument.startswith("_")}
        assert all(schema.HasArgument(argument) for argument in given)
        assert not [argument for argument in given if schema.IsDeprecatedArg(argument)]
    devices = {instance._op.device for name, instance in found.items() if name != "ExternalSource"}
    assert devices <= {"gpu", "mixed"}, "pictures come to the GPU first, and stay there"


def test_jpegs_are_decoded_as_on_a_cpu(gpu_pipeline: Any) -> None:
    """The colours are upsampled as libjpeg does, and the hardware decoder, which takes a share of a batch, has none."""
    decoders = [instance._op for name, instance in operators(gpu_pipeline).items() if name.startswith("decoders__")]
    assert len(decoders) == ("Resize" in operators(gpu_pipeline)), "arrays are neither decoded nor resized"
    for decoder in decoders:
        assert decoder.device == "mixed"
        assert decoder._init_args["jpeg_fancy_upsampling"] is True
        assert decoder._init_args["hw_decoder_load"] == 0
        assert decoder._init_args["output_type"] == types.RGB


def test_every_pipeline_is_here() -> None:
    """A new function with `@pipeline_def` needs a case above."""
    found = {
        node.name
        for path in Path(pipelines.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any("pipeline_def" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    assert found == {name for name, *_ in CASES.values()}


def test_arguments_that_do_not_exist_are_seen_without_a_driver() -> None:
    """Of the operator itself, and among those that vary by picture."""

    @dali.pipeline_def
    def constant() -> Any:
        return fn.decoders.image(fn.external_source(source=lambda: []), device="mixed", jpeg_fancy_upsamplin=True)

    @dali.pipeline_def
    def varying() -> Any:
        pictures = fn.external_source(source=lambda: [])
        return fn.crop(pictures.gpu(), crop=(1, 1), crop_pos_xx=pictures)

    for pipeline, name in ((constant, "jpeg_fancy_upsamplin"), (varying, "crop_pos_xx")):
        with pytest.raises((KeyError, TypeError), match=name):
            pipeline(batch_size=1, num_threads=1, device_id=0)


def test_operators_without_a_gpu_version_are_seen() -> None:
    assert "decoders__Image" in registered("mixed")
    assert "decoders__Image" not in registered("gpu")
