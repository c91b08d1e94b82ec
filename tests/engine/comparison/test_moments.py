"""Moments: exact merging, against NumPy's float64 over the union, and the file they live in."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from oracle import relative_error
from safetensors import safe_open
from safetensors.torch import save_file

from engine.comparison.distances.moments import Moments, check_fingerprint
from engine.support.errors import InputError

FINGERPRINT = {"extractor": "vgg19", "image_size": "32", "precision": "float32"}


def far_from_zero(count: int, features: int = 37, seed: int = 0) -> np.ndarray:
    """float64 [count, features], mean 1e4 and deviation 1e-2, where raw sums of squares have lost every digit."""
    return np.random.default_rng(seed).normal(1e4, 1e-2, size=(count, features))


def one_pass(values: np.ndarray, correction: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(mean, variance) of the union: NumPy's two passes, on values moved to zero first, which costs no digits."""
    centre = values[0]
    moved = (values - centre).astype(np.longdouble)
    return (centre + moved.mean(axis=0)).astype(np.float64), moved.var(axis=0, ddof=correction).astype(np.float64)


def assert_moments_of(moments: Moments, values: np.ndarray, tolerance: float) -> None:
    mean, variance = one_pass(values)
    assert moments.count == len(values)
    assert relative_error(moments.mean, torch.from_numpy(mean)) <= 1e-14
    assert relative_error(moments.variance(), torch.from_numpy(variance)) <= tolerance


class TestMerge:
    @pytest.mark.parametrize("split", [1, 2, 499, 998, 999])
    def test_two_sets_with_mean_1e4_and_deviation_1e_2(self, split):
        values = far_from_zero(1000)
        whole = torch.from_numpy(values)
        assert_moments_of(Moments.of(whole[:split]).merge(Moments.of(whole[split:])), values, 1e-9)

    @pytest.mark.parametrize("order", ["left", "right", "tree", "shuffled"])
    def test_many_unequal_shards_in_any_order(self, order):
        """Empty shards, shards of one image, prime sizes; associative and commutative up to rounding."""
        sizes = [0, 1, 0, 211, 1, 1, 97, 2, 0, 503, 13, 1, 0]
        values = far_from_zero(sum(sizes), seed=1)
        shards = [Moments.of(part) for part in torch.from_numpy(values).split(sizes)]
        if order == "shuffled":
            shards = [shards[i] for i in np.random.default_rng(2).permutation(len(shards))]
        if order == "right":
            total = shards[-1]
            for shard in reversed(shards[:-1]):
                total = shard.merge(total)
        elif order == "tree":
            while len(shards) > 1:
                pairs = [first.merge(second) for first, second in zip(shards[::2], shards[1::2], strict=False)]
                shards = pairs + shards[len(pairs) * 2 :]
            total = shards[0]
        else:
            total = shards[0]
            for shard in shards[1:]:
                total = total.merge(shard)
        assert_moments_of(total, values, 1e-9)

    def test_shards_with_different_means(self):
        """Most of the union's variance lies between the shards."""
        values = np.concatenate([far_from_zero(50, seed=i) * (1 + 0.1 * i) for i in range(7)])
        total = Moments.of(torch.from_numpy(values[:50]))
        for i in range(1, 7):
            total = total.merge(Moments.of(torch.from_numpy(values[50 * i : 50 * (i + 1)])))
        mean, variance = one_pass(values)
        assert relative_error(total.mean, torch.from_numpy(mean)) <= 1e-14
        assert relative_error(total.variance(), torch.from_numpy(variance)) <= 1e-12

    def test_large_counts(self):
        """n_A · n_B is far beyond float64's integers and M2 must not notice."""
        first = Moments(3 * 10**9, torch.tensor([1.0]), torch.tensor([3e9]))
        second = Moments(10**9, torch.tensor([2.0]), torch.tensor([1e9]))
        total = first.merge(second)
        assert total.count == 4 * 10**9
        assert float(total.mean) == 1.25
        assert float(total.m2) == pytest.approx(3e9 + 1e9 + 0.75e9, rel=1e-15)

    @pytest.mark.parametrize("swapped", [False, True])
    def test_what_an_empty_set_holds_does_not_matter(self, swapped):
        """A zero-size batch leaves buffers that nobody wrote."""
        nothing = Moments(0, torch.full((37,), float("nan")), torch.full((37,), float("nan")))
        values = far_from_zero(9)
        some = Moments.of(torch.from_numpy(values))
        assert_moments_of(some.merge(nothing) if swapped else nothing.merge(some), values, 1e-9)
        assert nothing.merge(nothing).count == 0

    def test_empty(self):
        empty = Moments.of(torch.zeros(0, 5))
        assert (empty.count, empty.num_features) == (0, 5)
        assert torch.equal(empty.mean, torch.zeros(5, dtype=torch.float64))
        assert torch.equal(empty.m2, torch.zeros(5, dtype=torch.float64))

    def test_operands_stay(self):
        first, second = (Moments.of(torch.from_numpy(far_from_zero(5, seed=i))) for i in range(2))
        before = [tensor.clone() for part in (first, second) for tensor in (part.mean, part.m2)]
        first.merge(second)
        after = [tensor for part in (first, second) for tensor in (part.mean, part.m2)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def test_other_number_of_features(self):
        with pytest.raises(ValueError, match=r"other: .*5 features.*4"):
            Moments.of(torch.zeros(3, 4)).merge(Moments.of(torch.zeros(3, 5)))

    def test_fingerprints(self):
        plain = Moments.of(torch.rand(3, 4))
        marked = Moments(3, plain.mean, plain.m2, FINGERPRINT)
        assert plain.merge(marked).fingerprint == marked.merge(plain).fingerprint == FINGERPRINT
        other = Moments(3, plain.mean, plain.m2, {**FINGERPRINT, "image_size": "64"})
        with pytest.raises(InputError, match=r"image size.*64.*32"):
            marked.merge(other)


class TestMoments:
    @pytest.mark.parametrize("correction", [0, 1])
    @pytest.mark.parametrize("count", [2, 3, 101])
    def test_variance(self, count, correction):
        values = far_from_zero(count)
        found = Moments.of(torch.from_numpy(values)).variance(correction)
        assert relative_error(found, torch.from_numpy(one_pass(values, correction)[1])) <= 1e-9

    def test_variance_of_one_image_without_correction_is_zero(self):
        assert not Moments.of(torch.rand(1, 4)).variance(correction=0).any()

    @pytest.mark.parametrize(("count", "correction"), [(0, 0), (0, 1), (1, 1)])
    def test_too_few_images(self, count, correction):
        moments = Moments(count, torch.zeros(3), torch.zeros(3))
        with pytest.raises(ValueError, match=f"correction {correction} .*{count} images"):
            moments.variance(correction)

    def test_float64_whatever_comes_in(self):
        moments = Moments(2, torch.ones(3, dtype=torch.bfloat16), torch.ones(3, requires_grad=True))
        assert moments.mean.dtype == moments.m2.dtype == torch.float64
        assert not moments.m2.requires_grad

    def test_of_float32_features_is_computed_in_float64(self):
        values = far_from_zero(200).astype(np.float32)
        _, variance = one_pass(values.astype(np.float64))
        assert relative_error(Moments.of(torch.from_numpy(values)).variance(), torch.from_numpy(variance)) <= 1e-9

    @pytest.mark.parametrize(
        ("count", "mean", "m2", "message"),
        [
            (2, torch.zeros(3), torch.zeros(4), r"mean, m2: .*\(3,\).*\(4,\)"),
            (2, torch.zeros(1, 3), torch.zeros(1, 3), "mean, m2: "),
            (-1, torch.zeros(3), torch.zeros(3), "count: .*-1"),
            (2**63, torch.zeros(3), torch.zeros(3), "count: .*9223372036854775808"),
        ],
        ids=["lengths", "dimensions", "negative", "absurd"],
    )
    def test_wrong_arguments(self, count, mean, m2, message):
        with pytest.raises(ValueError, match=message):
            Moments(count, mean, m2)


class TestFile:
    @pytest.fixture
    def moments(self) -> Moments:
        made = Moments.of(torch.from_numpy(far_from_zero(11)))
        return Moments(made.count, made.mean, made.m2, FINGERPRINT)

    def test_round_trip(self, moments, tmp_path):
        path = tmp_path / "new folder" / "target.safetensors"
        moments.save(path)
        for found in (Moments.load(path), Moments.load(str(path), FINGERPRINT)):
            assert found.count == moments.count
            assert torch.equal(found.mean, moments.mean)
            assert torch.equal(found.m2, moments.m2)
            assert found.fingerprint == FINGERPRINT

    def test_round_trip_without_fingerprint_is_unchecked(self, tmp_path):
        path = tmp_path / "target.safetensors"
        Moments(2, torch.zeros(3), torch.ones(3)).save(path)
        assert Moments.load(path, FINGERPRINT).fingerprint is None

    def test_views_of_one_tensor(self, tmp_path):
        both = torch.rand(2, 5, dtype=torch.float64)
        path = tmp_path / "target.safetensors"
        Moments(7, both[0], both[1]).save(path)
        assert torch.equal(Moments.load(path).m2, both[1])

    def test_fingerprint_mismatch_names_what_differs(self, moments, tmp_path):
        path = tmp_path / "target.safetensors"
        moments.save(path)
        expected = {**FINGERPRINT, "image_size": "64", "precision": "bfloat16"}
        with pytest.raises(InputError) as error:
            Moments.load(path, expected)
        message = str(error.value)
        assert str(path) in message
        for part in ("image size", "32", "64", "precision", "float32", "bfloat16"):
            assert part in message
        assert "extractor" not in message
        assert "\n" not in message

    def test_only_shared_entries_are_compared(self):
        check_fingerprint({"a": "1", "b": "2"}, {"b": "2", "c": "3"}, "target")

    @staticmethod
    def assert_refused(path) -> None:
        with pytest.raises(InputError) as error:
            Moments.load(path)
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)

    def test_missing(self, tmp_path):
        self.assert_refused(tmp_path / "target.safetensors")

    def test_folder(self, tmp_path):
        self.assert_refused(tmp_path)

    @pytest.mark.parametrize("kept", [0.0, 0.001, 0.2, 0.5, 0.99])
    def test_truncated(self, kept, moments, tmp_path):
        path = tmp_path / "target.safetensors"
        moments.save(path)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * kept)])
        self.assert_refused(path)

    @pytest.mark.parametrize(
        "data",
        [b"\x89PNG\r\n\x1a\n" + b"\0" * 100, b"not a\ntarget at all", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}"],
        ids=["png", "text", "ones", "empty header"],
    )
    def test_foreign(self, data, tmp_path):
        path = tmp_path / "target.safetensors"
        path.write_bytes(data)
        self.assert_refused(path)

    def test_weights_of_a_network(self, tmp_path):
        path = tmp_path / "generator.safetensors"
        save_file({"mean": torch.zeros(3), "m2": torch.zeros(3)}, path)
        with pytest.raises(InputError, match="is not a target of moments"):
            Moments.load(path)

    @pytest.mark.parametrize(
        "metadata",
        [
            {"count": None},
            {"count": "many"},
            {"count": "-3"},
            {"fingerprint": None},
            {"fingerprint": "{"},
            {"fingerprint": "[1, 2]"},
            {"fingerprint": "7"},
        ],
        ids=lambda changed: " ".join(f"{key}={value}" for key, value in changed.items()),
    )
    def test_metadata_that_does_not_parse(self, metadata, moments, tmp_path):
        path = tmp_path / "target.safetensors"
        moments.save(path)
        with safe_open(path, framework="pt") as file:
            changed = {**file.metadata(), **metadata}
        kept = {key: value for key, value in changed.items() if value is not None}
        save_file({"mean": moments.mean, "m2": moments.m2}, path, kept)
        self.assert_refused(path)

    @pytest.mark.parametrize(
        "tensors",
        [
            {"mean": torch.zeros(3)},
            {"mean": torch.zeros(3), "m2": torch.zeros(4)},
            {"mean": torch.zeros(2, 3), "m2": torch.zeros(2, 3)},
        ],
        ids=["lacks m2", "lengths", "dimensions"],
    )
    def test_tensors_that_do_not_fit(self, tensors, moments, tmp_path):
        path = tmp_path / "target.safetensors"
        moments.save(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file(tensors, path, metadata)
        self.assert_refused(path)

    def test_fingerprint_is_json(self, moments, tmp_path):
        """Whoever opens the file without us can read what it is of."""
        path = tmp_path / "target.safetensors"
        moments.save(path)
        with safe_open(path, framework="np") as file:
            assert json.loads(file.metadata()["fingerprint"]) == FINGERPRINT
            assert int(file.metadata()["count"]) == 11
            assert np.array_equal(file.get_tensor("mean"), moments.mean.numpy())
