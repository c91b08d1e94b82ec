"""The average of the weights, against `torch.optim.swa_utils.AveragedModel`."""

from __future__ import annotations

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from engine.generation.networks import Generator, build_generator
from engine.training.weight_average import WeightAverage, WeightAverages

DECAY = 0.9


def trained(generator: Generator) -> None:
    """Another weight for every weight, and other statistics of BatchNorm."""
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(torch.randn_like(parameter))
    generator(torch.randn(3, 5))


def floats(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the whole numbers, which AveragedModel averages and cuts off."""
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def test_is_averaged_model_bit_for_bit() -> None:
    torch.manual_seed(0)
    generator = build_generator("dcgan", image_size=32, nz=5)
    reference = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    average = WeightAverage(generator, DECAY)
    for _ in range(5):
        trained(generator)
        reference.update_parameters(generator)
        average.update(generator)
        expected, found = reference.state_dict(), average.state_dict()
        assert expected.keys() == found.keys()
        assert found["n_averaged"] == expected["n_averaged"]
        assert all(torch.equal(found[name], tensor) for name, tensor in floats(expected).items())
    z = torch.randn(2, 5)
    assert torch.equal(average.generator.eval()(z), reference.module.eval()(z))
    counts = {name: tensor for name, tensor in generator.state_dict().items() if "num_batches" in name}
    assert counts
    assert all(torch.equal(average.generator.state_dict()[name], tensor) for name, tensor in counts.items())


def test_resumes_from_either_state() -> None:
    torch.manual_seed(1)
    generator = build_generator("dcgan", image_size=32, nz=5)
    reference = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    trained(generator)
    reference.update_parameters(generator)
    resumed = WeightAverage(build_generator("dcgan", image_size=32, nz=5), DECAY)
    resumed.load_state_dict(reference.state_dict())
    again = WeightAverage(build_generator("dcgan", image_size=32, nz=5), DECAY)
    again.load_state_dict(resumed.state_dict())
    trained(generator)
    for average in (reference.update_parameters, resumed.update, again.update):
        average(generator)
    expected = floats(reference.state_dict())
    for found in (resumed.state_dict(), again.state_dict()):
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


class TestSeveral:
    DECAYS = (0.5, 0.9, 0.99)

    def test_each_is_pytorchs_of_its_decay(self) -> None:
        torch.manual_seed(2)
        generator = build_generator("dcgan", image_size=32, nz=5)
        references = {
            decay: AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
            for decay in self.DECAYS
        }
        averages = WeightAverages(generator, self.DECAYS, 0.9)
        for _ in range(4):
            trained(generator)
            averages.take_in(generator)
            averages.count()
            for reference in references.values():
                reference.update_parameters(generator)
        parts = averages.parts()
        assert list(parts) == ["ema.0.5", "ema.0.9", "ema.0.99"]
        for decay, reference in references.items():
            expected, found = floats(reference.state_dict()), parts[f"ema.{decay}"]
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert averages.generator is averages.averages[0.9].generator
        again = WeightAverages(generator, self.DECAYS)
        assert again.generator is again.averages[0.5].generator, "the first"
        again.load_parts(parts)
        assert again.updates == 4
        for part, state in again.parts().items():
            assert all(torch.equal(parts[part][name], tensor) for name, tensor in state.items())

    def test_one_is_what_it_was_and_none_is_nothing(self) -> None:
        generator = build_generator("dcgan", image_size=32, nz=5)
        single, own = WeightAverage(generator, 0.9), WeightAverages(generator, [0.9])
        single.update(generator)
        own.load_parts({"ema": single.state_dict(), "generator": {}})
        assert own.updates == 1
        assert list(own.parts()) == ["ema"]
        none = WeightAverages(generator, [])
        none.take_in(generator)
        none.count()
        assert (none.generator, none.parts(), none.updates) == (None, {}, 0)
