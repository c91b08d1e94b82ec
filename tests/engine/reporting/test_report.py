"""The report: looked at by Chromium, and its nearest neighbours found a second time, by brute force."""

from __future__ import annotations

import html
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine import report, train
from engine.configuration.build import load_run_sampler, make_extractor, open_data
from engine.configuration.command import run_command
from engine.configuration.config import Config
from engine.generation.sampling import Sampler
from engine.reporting.charts import HEIGHT, WIDTH, line_chart, log_ticks, number, ticks
from engine.reporting.neighbours import channel_means, compare, nearest
from engine.reporting.pictures import sample_steps
from engine.reporting.settings import train_command
from engine.representation.extractor import Extractor
from engine.support.pixels import to_uint8
from engine.training.run_folder import RunFolder
from pipelines import ImageLoader, open_dataset, read_pixels

pytestmark = pytest.mark.usefixtures("own_cache")

VOID = {"meta", "link", "img", "input", "br", "hr", "line", "polyline", "circle"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six quick steps on sixty real digits."""
    folder = tmp_path_factory.mktemp("report")
    images = next(iter(ImageLoader(open_dataset("digits"), 60, backend="torch"))).images
    np.save(folder / "digits.npy", to_uint8(images).numpy())
    flags = """--weights random --batch-size 4 --steps 6 --layers 2 --nz 8 --kernels reference --loader torch
        --log-every 1 --sample-every 2 --checkpoint-every 6 --threads 1"""
    train.main([*flags.split(), "--data", str(folder / "digits.npy"), "--out", str(folder / "run")])
    return folder / "run"


@pytest.fixture(scope="module")
def page(finished: Path) -> Path:
    report.main(["--run", str(finished)])
    return finished / "report.html"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoilt."""
    return Path(
        shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("report.html", "tensorboard"))
    )


def write(run: Path, *flags: str) -> str:
    report.main(["--run", str(run), *flags])
    return (run / "report.html").read_text()


def change(run: Path, group: str, **values: Any) -> None:
    config = json.loads((run / "config.json").read_text())
    config[group].update(values)
    (run / "config.json").write_text(json.dumps(config))


def text_of(markup: str) -> str:
    """What a reader sees, on one line."""
    shown = re.sub(r"<(script|style)>.*?</\1>", "", markup, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", shown)).split())


# The page in a browser.


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        reason = "needs Chromium; on Debian: apt-get install --no-install-recommends chromium"
        if os.environ.get("GFMN_REQUIRE_CHROMIUM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


Browse = Callable[..., Any]
BEFORE = """<script>window.problems = [];
addEventListener("error", event => problems.push(event.message || event.target.outerHTML.slice(0, 80)), true);
addEventListener("securitypolicyviolation", event => problems.push(event.violatedDirective));</script>"""
AFTER = """<script>addEventListener("load", () => setTimeout(() => {
let found; try { found = (() => { %s })(); } catch (error) { problems.push(String(error)); }
parent.postMessage(JSON.stringify({found, problems}), "*"); }, 100));</script>"""
FRAME = """<!DOCTYPE html><title>frame</title><style>body {margin: 0} iframe {border: 0; display: block}</style>
<script>addEventListener("message", event => { const result = document.createElement("pre");
result.id = "result"; result.textContent = event.data; document.body.append(result); });</script>
<iframe src="%s" width="%d" height="%d"></iframe>"""


@pytest.fixture
def browse(chromium: str, tmp_path: Path) -> Browse:
    """`browse(page, script, width, picture)`: what the script returns in a frame `width` pixels wide, without errors.

    A window of headless Chromium is not narrower than about 500 pixels; a frame is.
    """

    def look(page: Path, script: str = "return 0", width: int = 1200, picture: Path | None = None) -> Any:
        markup = page.read_text().replace("<head>", "<head>" + BEFORE).replace("</body>", AFTER % script + "</body>")
        (tmp_path / "page.html").write_text(markup)
        (tmp_path / "frame.html").write_text(FRAME % ("page.html", width, 3200))
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
        command += ["--virtual-time-budget=4000", f"--window-size={max(width, 500)},3200"]
        command += ["--dump-dom"] if picture is None else [f"--screenshot={picture}"]
        done = subprocess.run(
            [*command, (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=300, check=True
        )
        if picture is not None:
            return None
        result = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
        assert result is not None, done.stdout[-2000:] + done.stderr[-2000:]
        answer = json.loads(html.unescape(result[1]))
        assert answer["problems"] == []
        return answer["found"]

    return look


def test_in_chromium_every_image_decodes_and_nothing_is_fetched(page: Path, browse: Browse) -> None:
    found = browse(
        page,
        """const images = [...document.images];
        return {sizes: images.map(image => image.naturalWidth * image.naturalHeight),
            fetched: performance.getEntriesByType("resource").map(entry => entry.name.slice(0, 20)),
            charts: [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().width),
            outside: [...document.querySelectorAll("svg text")].filter(text => {
                const own = text.getBoundingClientRect(), svg = text.closest("svg").getBoundingClientRect();
                return own.left < svg.left - 1 || own.right > svg.right + 1; }).length}""",
    )
    assert len(found["sizes"]) == 1 + 3 + (6 + 6) * 6 + 1
    assert min(found["sizes"]) >= 32 * 32
    assert all(name.startswith("data:") for name in found["fetched"])
    assert len(found["charts"]) == 3 + 1
    assert min(found["charts"]) > 300
    assert found["outside"] == 0


def test_in_chromium_the_slider_changes_the_picture(page: Path, browse: Browse) -> None:
    script = """const range = document.querySelector("#steps input"), seen = [];
        for (const value of [range.value, 0, 1]) {
            range.value = value; range.dispatchEvent(new Event("input"));
            const visible = [...document.querySelectorAll("#steps img")].filter(image => image.offsetParent);
            seen.push([document.querySelector("#steps output").textContent, range.getAttribute("aria-valuetext"),
                visible.map(image => image.alt), visible.map(image => image.src)]);
        }
        return seen;"""
    seen = browse(page, script)
    assert [row[:2] for row in seen] == [["step 6"] * 2, ["step 2"] * 2, ["step 4"] * 2]
    assert all(len(row[3]) == 1 and row[0] in row[2][0] for row in seen)
    assert len({row[3][0] for row in seen}) == 3


@pytest.mark.parametrize("width", [390, 800, 1280])
def test_in_chromium_nothing_sticks_out(width: int, page: Path, browse: Browse) -> None:
    script = """document.querySelectorAll("details").forEach(one => one.open = true);
        return [innerWidth, document.documentElement.scrollWidth,
            Math.min(...[...document.querySelectorAll(".match img")].map(image => image.width))];"""
    inner, scroll, smallest = browse(page, script, width)
    assert inner == width
    assert scroll <= width
    assert smallest >= 44


@pytest.mark.parametrize("width", [390, 1280])
def test_in_chromium_there_is_something_to_see(width: int, page: Path, browse: Browse, tmp_path: Path) -> None:
    browse(page, width=width, picture=tmp_path / "shot.png")
    with Image.open(tmp_path / "shot.png") as picture:
        pixels = np.asarray(picture.convert("L"), dtype=float)[:, :width]
    bands = np.array_split(pixels[:2400], 6)
    assert all(band.std() > 5 for band in bands)


# The page as a file.


class Outline(HTMLParser):
    """Elements, and mistakes in how they are nested."""

    def __init__(self, markup: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.mistakes: list[str] = []
        self.feed(markup)
        self.close()
        self.mistakes += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.mistakes.append(f"</{tag}> in {self.open}")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_page_is_one_file_and_well_formed(page: Path) -> None:
    markup = page.read_text()
    outline = Outline(markup)
    assert outline.mistakes == []
    assert markup.startswith("<!DOCTYPE html>")
    for _, attributes in outline.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (name, value)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|import\(|https?://", markup)
    assert len(outline.all("h1")) == len(outline.all("title")) == len(outline.all("script")) == 1
    assert all(image.get("alt") and image.get("width") and image.get("height") for image in outline.all("img"))
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in outline.all("svg"))
    assert len(markup) < 2_000_000


def test_page_says_what_the_run_was(page: Path) -> None:
    text = text_of(page.read_text())
    for fact in (
        "dcgan generator",
        "matched to vgg-small (random weights)",
        "images, 60 images of 32×32",
        "· step 6 ·",
    ):
        assert fact in text
    assert re.search(r"layers 2 \(preset: –\)", text)
    assert "all 60 real images" in text
    assert text.index("Samples over time") < text.index("Losses") < text.index("Nearest real") < text.index("Configur")
    assert f"torch {torch.__version__.split('+')[0]}" in text


def test_same_run_same_page(page: Path, finished: Path, tmp_path: Path) -> None:
    before = page.read_bytes()
    report.main(["--run", str(finished), "--out", str(tmp_path / "again.html")])
    assert (tmp_path / "again.html").read_bytes() == before
    report.main(["--run", str(finished), "--out", str(tmp_path / "other.html"), "--seed", "1"])
    assert (tmp_path / "other.html").read_bytes() != before


def test_what_a_person_wrote_stays_text(run: Path) -> None:
    change(run, "data", data="/nowhere/<script>alert(1)</script>&\"'.npy")
    markup = write(run, "--title", "<b>&amp;</b>{{ 1 + 1 }}")
    outline = Outline(markup)
    assert outline.mistakes == []
    assert len(outline.all("script")) == 1
    assert not outline.all("b")
    assert "<script>alert" not in markup
    text = text_of(markup)
    assert "<b>&amp;</b>{{ 1 + 1 }}" in text
    assert text.count("<script>alert(1)</script>") >= 3  # why there are no neighbours, the configuration, the command


def test_moved_data_cost_a_warning(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(run, "data", data="/nowhere/digits.npy")
    with caplog.at_level(logging.WARNING, "gfmn"):
        text = text_of(write(run))
    assert "Left out: /nowhere/digits.npy: no such file" in text
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "/nowhere/digits.npy" in warning.getMessage()
    assert "\n" not in warning.getMessage()


def test_another_extractor_or_dataset_than_in_training_is_said(run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "fewer.npy", np.load(json.loads((run / "config.json").read_text())["data"]["data"])[:50])
    change(run, "data", data=str(tmp_path / "fewer.npy"))
    change(run, "training", seed=5)
    text = text_of(write(run))
    assert "Mind that the extractor’s weights are not those of the training" in text
    assert "Mind that the data set had 60 images in training" in text


def test_stopped_early_and_nothing_drawn(run: Path) -> None:
    for path in [*(run / "samples").iterdir(), run / "samples.png", *(run / "checkpoints").iterdir()]:
        path.unlink()
    change(run, "training", steps=100)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n" + lines[1][:20])
    markup = write(run)
    assert Outline(markup).mistakes == []
    text = text_of(markup)
    assert "step 6 of 100" in text
    assert "Samples over time" not in text
    assert "Losses" in text
    (run / "metrics.jsonl").unlink()
    assert "No step was logged" in text_of(write(run))


def test_values_that_are_not_finite_or_not_there(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[1]["loss"], rows[2]["difference_norm"] = float("nan"), float("inf")
    del rows[3]["images_per_second"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, [1], {"loss": 3}]))
    (run / "samples/step_00000009.png").write_bytes(b"no picture")
    markup = write(run)
    assert Outline(markup).mistakes == []
    assert not re.search(r"\bnan\b|\binf\b", markup)


def test_evaluations_on_inception_and_on_another_network(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for index, row in enumerate(rows):
        row["lr"] = 1e-4 / (index + 1)
        row["evaluation"] = {
            "network": "efficientnet-lite0",
            "is_inception": index == 5,
            "samples": 1000,
            "frechet_distance": 12.5 - index,
            "kernel_distance": 0.0123,
            "kernel_distance_std": 0.0004,
            **({"precision": 0.5} if index < 5 else {}),
        }
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    markup = write(run)
    assert Outline(markup).mistakes == []
    one, other = markup.split("<h2>Evaluation on ")[1:]
    assert "Fréchet distance on efficientnet-lite0 features (not FID)" in one
    assert "0.01230 ± 0.00040" in one
    assert one.count("<svg") == 3
    assert "recall" not in one
    columns = [re.findall(r"<th scope=\"col\">(.*?)</th>", part) for part in (one, other)]
    assert columns[0] == ["step", "samples", "Fréchet distance (not FID)", "kernel distance (not KID)", "precision"]
    assert columns[1] == ["step", "samples", "FID", "KID"]
    assert "Learning rate" in markup


def test_many_pictures_stay_few(run: Path) -> None:
    with Image.open(run / "samples/step_00000002.png") as picture:
        picture.load()
        for step in range(10, 60):
            picture.save(run / f"samples/step_{step:08d}.png")
    markup = write(run)
    shown = re.findall(r'<figure data-step="(.*?)"', markup)
    assert (len(shown), shown[0], shown[-1]) == (24, "2", "59")
    assert "24 of the run’s 53 pictures, evenly chosen" in text_of(markup)


def test_large_images_make_a_page_of_a_few_megabytes(run: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1042, 1042, 3), dtype=np.uint8)
    for step in range(10, 40):
        Image.fromarray(noise).save(run / f"samples/step_{step:08d}.png")
    steps = sample_steps(RunFolder(run), 128)
    assert len(steps.pictures) == 12
    assert {picture.count for _, picture in steps.pictures} == {4}
    assert sum(len(picture.png) for _, picture in steps.pictures) < 3_000_000


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--preset cifar10 --weights random --no-fused-ama --amp",
        "--data some/<folder>/it's --image-size 64 --chunk-size auto --memory-budget 12GiB --center-crop 100",
        "--lr 1e-05 --generator-ema 0.5 --averager ma --extractor vgg19+resnet18 --weights a.safetensors b.safetensors",
    ],
)
def test_the_command_trains_the_same_again(flags: str) -> None:
    def parsed(words: list[str]) -> Config:
        return train.configure(train.parser().parse_args(words))[0]

    config = parsed(flags.split())
    words = shlex.split(train_command(config))
    assert words[:3] == ["python", "-m", "engine.train"]
    assert asdict(parsed(words[3:])) == asdict(config)


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        run_command(report.main, argv)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_bad_input_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no generator yet" in error_of(["--run", str(tmp_path / "empty")], capsys)
    assert "is not a folder" in error_of(["--run", str(tmp_path / "none")], capsys)
    assert "--seed" in error_of(["--run", str(run), "--seed=-1"], capsys)
    assert "--neighbours-of" in error_of(["--run", str(run), "--neighbours-of", "1"], capsys)
    assert "is a folder" in error_of(["--run", str(run), "--out", str(tmp_path)], capsys)
    assert "--run" in error_of([], capsys)
    (run / "config.json").write_text("{}")
    assert "config.json: is not the configuration" in error_of(["--run", str(run)], capsys)
    (run / "config.json").unlink()
    assert "config.json: no such file" in error_of(["--run", str(run)], capsys)
    (run / "generator.safetensors").unlink()
    assert "has no generator yet" in error_of(["--run", str(run)], capsys)
    assert not (run / "report.html").exists()


# Nearest neighbours.


@pytest.fixture(scope="module")
def extractor(finished: Path) -> Extractor:
    config = Config.load(finished / "config.json")
    return make_extractor(config, open_data(config), torch.device("cpu"))


def brute_force(extractor: Extractor, pictures: torch.Tensor) -> np.ndarray:
    """Channel means [N, ΣC] in float64, from the slow, obvious path."""
    features = extractor.features(pictures.float() / 127.5 - 1).double().numpy()
    parts = np.split(features, np.cumsum([tap.num_features for tap in extractor.taps])[:-1], axis=1)
    means = [part.reshape(len(part), tap.shape[0], -1).mean(axis=2) for part, tap in zip(parts, extractor.taps)]
    return np.concatenate(means, axis=1)


def test_neighbours_equal_brute_force_and_a_copy_is_found(finished: Path, extractor: Extractor) -> None:
    config = Config.load(finished / "config.json")
    real = read_pixels(open_data(config), limit=1000, backend="torch")
    assert len(real) == 60
    samples = to_uint8(load_run_sampler(finished).draw(9, 0)).permute(0, 3, 1, 2)
    samples[4] = real[17]
    comparison = compare(samples, real, channel_means(extractor))
    of_real, of_samples = brute_force(extractor, real), brute_force(extractor, samples)
    deviation = of_real.std(axis=0)
    used = deviation > 1e-6 * np.abs(of_real.mean(axis=0))
    of_real, of_samples = of_real[:, used] / deviation[used], of_samples[:, used] / deviation[used]
    distances = np.linalg.norm(of_samples[:, None] - of_real[None], axis=2)
    order = distances.argsort(axis=1)[:, :5]
    np.testing.assert_array_equal(comparison.indices.numpy(), order)
    np.testing.assert_allclose(comparison.distances, np.take_along_axis(distances, order, 1), rtol=1e-3, atol=1e-3)
    between = np.linalg.norm(of_real[:, None] - of_real[None], axis=2) + np.diag(np.full(60, np.inf))
    np.testing.assert_allclose(comparison.yardstick, between.min(axis=1), rtol=1e-3)
    assert comparison.indices[4, 0] == 17
    assert comparison.distances[4, 0] == pytest.approx(0, abs=1e-4)
    assert comparison.farther[4] == 1
    expected = [(between.min(axis=1) > distance).mean() for distance in distances.min(axis=1)]
    np.testing.assert_allclose(comparison.farther, expected, atol=1e-6)
    assert comparison.num_closer == sum(share >= 0.95 for share in expected) >= 1
    assert comparison.num_copies == 1


def test_the_page_shows_a_copy(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = next(iter(ImageLoader(open_data(Config.load(run / "config.json")), 60, backend="torch"))).images
    noise = torch.rand(256, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    noise[0], noise[200] = real[5], real[40]
    pixels = to_uint8(noise).permute(0, 3, 1, 2).contiguous()
    monkeypatch.setattr(Sampler, "draw_pixels", lambda self, count, seed: pixels[:count])
    markup = write(run)
    assert "2 of 256 samples are closer to a real image than 95% of real images" in text_of(markup)
    assert "2 of them equal a real image pixel by pixel" in text_of(markup)
    rows = re.findall(r'<div class="match">(.*?)</div>', markup, re.DOTALL)
    for row in (rows[0], rows[6]):
        sources = re.findall(r'src="(.*?)"', row)
        assert sources[0] == sources[1] != sources[2]
        assert re.findall(r"<figcaption>(.*?)</figcaption>", row)[:2] == ["100%", "0.00"]


def test_a_part_of_the_real_images_is_drawn_by_the_seed(run: Path) -> None:
    dataset = open_data(Config.load(run / "config.json"))
    one, again, other = (read_pixels(dataset, limit=20, seed=seed, backend="torch") for seed in (0, 0, 1))
    assert one.shape == (20, 3, 32, 32)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert "20 random ones of the 60 real images" in text_of(write(run, "--neighbours-of", "20"))


def test_nearest_keeps_its_digits() -> None:
    points = torch.tensor([[1000.0, 0.0], [1000.0, 1e-2], [1000.0, 3e-2], [0.0, 0.0]])
    indices, distances = nearest(points, points, 2, skip_self=True)
    assert indices[:3, 0].tolist() == [1, 0, 1]
    torch.testing.assert_close(distances[:3, 0], torch.tensor([0.01, 0.01, 0.02]), rtol=1e-4, atol=0)


def test_another_network_may_decide_what_is_near(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    class Network:
        label = "brightness"

        def features(self, images: torch.Tensor, *, device: torch.device) -> torch.Tensor:
            assert images.dtype == torch.uint8
            return images.float().mean(dim=(2, 3))

    def network(name: str | None, *, weights: str | None, image_size: int) -> Network:
        asked.append((name, weights, image_size))
        return Network()

    monkeypatch.setattr("engine.evaluation.metrics.evaluation_network", network)
    text = text_of(write(run, "--feature-extractor", "efficientnet-lite0", "--weights", "some.file"))
    assert "over the features of brightness, each divided" in text
    write(run, "--feature-extractor", "inception")
    assert asked == [("efficientnet-lite0", "some.file", 32), (None, None, 32)]
    monkeypatch.undo()
    assert "--weights" in error_of(["--run", str(run), "--weights", "some.file"], capsys)
    assert "--feature-extractor" in error_of(["--run", str(run), "--feature-extractor", "nonsense"], capsys)


def test_one_real_image_is_no_yardstick(run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros((1, 32, 32, 3), np.uint8))
    change(run, "data", data=str(tmp_path / "one.npy"))
    assert "Left out: the data set has a single image" in text_of(write(run))


# Charts.


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 900) == [0, 200, 400, 600, 800]
    assert ticks(-0.3, 0.31) == [-0.2, 0, 0.2]
    assert log_ticks(0.5, 2.1) == [5, 10, 20, 50, 100]
    assert log_ticks(-3, 12)[0] == 1e-3
    assert 2 <= len(log_ticks(1.31, 1.39)) <= 4


def test_numbers_read_well() -> None:
    assert [number(value) for value in (0, 12000, -3, 0.03125, 1.2e-5, 12345.6, 3.0e9)] == [
        "0", "12,000", "−3", "0.0312", "1.2e−5", "12,346", "3e9",
    ]  # fmt: skip


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [0.0, 0.0], [-1.0, 1.0], [1e-9, 1e9], list(range(1, 5000))])
@pytest.mark.parametrize("log", [False, True], ids=["linear", "log"])
def test_lines_lie_inside_the_chart(values: list[float], log: bool) -> None:
    chart = line_chart("a", {"": list(enumerate(values, 1))}, log=log)
    if log and not any(value > 0 for value in values):
        assert chart is None
        return
    assert chart is not None
    points = np.array([point.split(",") for point in chart.lines[0].points.split()], dtype=float)
    assert len(points) <= 800
    assert (points >= 0).all()
    assert (points <= [WIDTH, HEIGHT]).all()
    assert 1 <= len(chart.y_ticks) <= 7
