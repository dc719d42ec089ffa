"""`care-hub demo`: one page without network, whose neighbors are those that Python finds."""

import base64
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import BROWSER, GOOD, care_hub_command, fitted, in_browser
from PIL import Image

import care_hub
from care_hub.data.inputs import decode_batches
from care_hub.hub.registry import SHIPPED
from care_hub.hub.rotation_set import RotationSet
from care_hub.rotation import Rotation
from care_hub.transformations import TRANSFORMATIONS

ENCODER = "resnet10_w16_small.care_shapes"
HOSTILE = '"><script>alert(1)</script>.png'
SURE, POOR = (GOOD | {"same_image_hit_at_1": (rate, rate - 1, rate + 1)} for rate in (90.0, 5.0))
KINDS = {  # strengths to which rotations are fitted, measures
    "brightness": ([0.5, 0.7, 1.4, 2.0], GOOD),
    "hue": ([-0.3, -0.15, 0.15], GOOD),
    "flip": ([1.0], SURE),
    "contrast": ([0.5, 2.0], POOR),
    "<b>a to b": ([1.0], GOOD),  # a change that only its pairs of images tell
}


def random_rotations(kinds, encoder):
    """They go far and do not commute. Each transformation moves 8 dimensions, the next one 2 of these too."""
    found, matrices, moved = {}, {}, {}
    directions = Rotation.random(128, 1).matrix.float()
    for k, (name, (strengths, overall)) in enumerate(kinds.items()):
        about = TRANSFORMATIONS.get(name)
        neutral, scale = (about.neutral, about.scale) if about else (0.0, "linear")
        one = fitted(name, strengths, neutral, scale, overall, 2 if scale == "switch" else 50)
        found[name] = replace(one, meaning=about.meaning if about else "share of the change")
        matrices[name] = torch.stack(
            [Rotation.random(128, 10 * k + n).power(0.2).matrix for n in range(len(strengths))]
        )
        moved[name] = directions[:, 6 * k : 6 * k + 8]
    return RotationSet(found, matrices, encoder.fingerprint, "<i>org/name", moved=moved)


def make(folder, images, *words, kinds=KINDS):
    """The page that the command makes of images and an encoder with rotations; these, and what is said."""
    shutil.copytree(SHIPPED / ENCODER, folder / "encoder")
    rotations = random_rotations(kinds, care_hub.load_encoder(ENCODER))
    rotations.save(folder / "encoder")
    page = folder / "demo.html"
    said = care_hub_command("demo", folder / "encoder", "--images", images, "-o", page, *words)
    return page, rotations, said


@pytest.fixture(scope="module")
def made(photos, tmp_path_factory):
    """`make` of 64 images, of which 40 are truly transformed; one of these has a hostile name."""
    folder = tmp_path_factory.mktemp("demo")
    images = shutil.copytree(photos, folder / "images")
    (images / HOSTILE).parent.mkdir()
    Image.effect_noise((50, 60), 90).convert("RGB").save(images / HOSTILE)
    return make(folder, images)


def content(page):
    """What is inside the page, as JSON."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)[1])


def numbers(text, *shape):
    """Of the page: 16-bit integers in base64."""
    return np.frombuffer(base64.b64decode(text), "<i2").reshape(shape) / 32767


def unit(z):
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def test_the_page_has_images_embeddings_and_what_is_steerable(made):
    page, rotations, said = made
    assert ": 65 images, steered by brightness, hue, flip, <b>a to b; 1." in said
    data = content(page)
    names, jpegs = zip(*data["images"], strict=True)
    images = page.parent / "images"
    assert sorted(names) == sorted(str(file.relative_to(images)) for file in images.rglob("*.png"))
    z = care_hub.load_encoder(ENCODER).encode([images / name for name in names])
    np.testing.assert_allclose(numbers(data["embeddings"], 65, 128), z, atol=2e-5)
    assert all(base64.b64decode(jpeg).startswith(b"\xff\xd8") for jpeg in jpegs)
    families = {family["name"]: family for family in data["families"]}
    assert list(families) == list(rotations)
    assert [name for name, family in families.items() if family["segments"]] == rotations.steerable
    assert families["flip"]["measured"] == "found 90 %, chance 50 %"
    assert families["contrast"]["measured"] == "found 5 %"


def test_embeddings_of_truly_transformed_images_are_those_of_the_encoder(made):
    page, _, _ = made
    data, encoder = content(page), care_hub.load_encoder(ENCODER)
    truths = {family["name"]: family["truth"] for family in data["families"] if family["truth"]}
    assert {name: truth["strengths"] for name, truth in truths.items()} == {
        "brightness": [0.5, 0.592, 0.7, 0.837, 1.18, 1.4, 1.67, 2.0],
        "hue": [-0.3, -0.225, -0.15, -0.075, 0.075, 0.15],
        "flip": [1.0],
    }
    files = [page.parent / "images" / name for name, _ in data["images"][:40]]
    ((pixels, _),) = decode_batches(files, 100, 32, 1.0)
    for name, truth in truths.items():
        stored = numbers(truth["embeddings"], len(truth["strengths"]), data["asked"], 128)
        for strength, z in zip(truth["strengths"], stored, strict=True):
            x = TRANSFORMATIONS[name](pixels.float() / 255, strength)
            np.testing.assert_allclose(z, encoder.encode(x), atol=3e-5)
        assert [len(row) for row in truth["images"]] == [40] * len(truth["strengths"])


def test_the_page_needs_no_network_and_believes_no_name(made):
    page, _, _ = made
    text = page.read_text()
    assert "default-src 'none'" in text and "http://" not in text and "https://" not in text
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp|<script src|innerHTML", text)
    assert "<script>alert" not in text and "<b>a to b" not in text and "<i>org" not in text
    assert "&lt;i&gt;org/name" in text
    assert HOSTILE in [name for name, _ in content(page)["images"]]


def test_a_transformation_by_which_embeddings_are_not_steered_has_no_rotation_there(photos, tmp_path):
    page, _, said = make(tmp_path, photos, "--limit", "9", kinds={"contrast": KINDS["contrast"]})
    assert "9 images, steered by nothing" in said
    data = content(page)
    (family,) = data["families"]
    assert (family["segments"], family["truth"], len(data["images"]), data["asked"]) == ([], None, 9, 0)


def test_what_can_not_be_shown_ends_in_one_sentence(made, photos, tmp_path):
    folder = made[0].parent / "encoder"

    def refused(encoder, images, output=tmp_path / "page.html"):
        return care_hub_command("demo", encoder, "--images", images, "-o", output, ok=False)

    assert "fit them with `care-hub rotations`" in refused("resnet10_w32_small.simclr_cifar10", photos)
    assert "no file or folder" in refused(folder, tmp_path / "absent")
    assert "is a folder" in refused(folder, photos, tmp_path)
    assert "does not exist" in refused(folder, photos, tmp_path / "absent" / "page.html")
    assert "at least two" in refused(folder, photos / "test" / "cold" / "00.png")
    (tmp_path / "images").mkdir()
    for k in range(2):
        (tmp_path / "images" / f"{k}.png").write_bytes(b"no image")
    assert "can't be decoded" in refused(folder, tmp_path / "images")
    replace(made[1], encoder="0" * 64).save(shutil.copytree(folder, tmp_path / "encoder"))
    assert "of other embeddings" in refused(tmp_path / "encoder", photos)
    assert not (tmp_path / "page.html").exists()


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium at hand")

# Of the page in a browser: sliders by name, buttons by label, and what is found.
HANDS = """
const byId = id => d.getElementById(id);
const all = selector => [...d.querySelectorAll(selector)], gallery = () => all("#gallery button");
const slider = name => all("label").find(label => label.textContent === name).control;
const slide = (name, steps) => {
    slider(name).value = steps;
    slider(name).dispatchEvent(new Event("input"));
};
const press = label => d.querySelector(`[aria-label="${label}"]`).click();
const pick = k => gallery()[k].click();
const key = (element, key) => {
    element.focus();
    element.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
};
const found = id => all(`#${id} button`).map(({dataset}) => [Number(dataset.image), Number(dataset.cosine)]);
const current = () => gallery().findIndex(button => button.getAttribute("aria-current"));
const strength = input => Number(input.getAttribute("aria-valuetext"));
const strengths = () => all("input").map(input => [input.labels[0].textContent, strength(input)]);
"""
STATES = (  # what is done, one after the other; what is then ignored, and matched
    ("pick(0)", [], []),
    ("slide('brightness', 37)", [], []),
    ("slide('brightness', 100); pick(7)", [], []),
    ("slide('brightness', -63); pick(50)", [], []),
    ("slide('brightness', -63); pick(30)", [], []),
    ("slide('brightness', 0); slide('hue', -90); pick(12)", [], []),
    ("slide('hue', 100); slide('flip', 100); slide('<b>a to b', 41)", [], []),
    ("press('ignore contrast')", ["contrast"], []),
    ("press('ignore hue'); slide('hue', 0); slide('flip', 0)", ["contrast", "hue"], []),
    ("press('match hue'); press('match flip'); pick(3)", ["contrast"], ["hue", "flip"]),
    ("press('ignore contrast'); slide('<b>a to b', 0); slide('flip', 100)", [], ["hue", "flip"]),
    ("byId('reset').click()", [], []),
)


def check(z, query, shown, self):
    """The 12 images and cosines that are shown are the nearest to a query in `z` (N, d), without `self`."""
    cosines = unit(z) @ unit(query)
    cosines[self] = -1
    images, values = zip(*shown, strict=True)
    np.testing.assert_allclose(values, np.sort(cosines)[: -len(shown) - 1 : -1], atol=1e-4)
    np.testing.assert_allclose(values, cosines[list(images)], atol=1e-4)
    assert len(set(images)) == 12


@pytest.mark.slow
@needs_browser
def test_neighbors_are_those_that_python_finds(made):
    page, rotations, _ = made
    data = content(page)
    z = numbers(data["embeddings"], 65, 128)
    truths = {family["name"]: family["truth"] for family in data["families"]}
    steps = ",".join(f"() => {{ {step} }}" for step, *_ in STATES)
    shown = """[current(), strengths(), found("turned"), found("truth"), byId("truth-note").textContent]"""
    seen = in_browser(page, 1200, f"{HANDS} return [{steps}].map(step => {{ step(); return {shown}; }})")
    compared, before = set(), None
    for (_, ignore, match), (k, strengths, turned, truly, note) in zip(STATES, seen, strict=True):
        steer = {name: s for name, s in strengths if s != rotations.find(name).neutral}
        kept = rotations.projector(ignore, match).numpy() if ignore or match else np.eye(128)
        check(z @ kept, rotations.turn(z[k], steer) @ kept, turned, k)
        assert turned != before
        before = turned
        name, truth = next(((name, truths[name]) for name in steer), (None, None))
        assert bool(truly) == (len(steer) == 1 and truth is not None and k < 40)
        if truly:
            stored = numbers(truth["embeddings"], len(truth["strengths"]), 40, 128)
            scale = np.log if name == "brightness" else np.asarray
            row = np.abs(scale(truth["strengths"]) - scale(steer[name])).argmin()
            check(z @ kept, stored[row, k] @ kept, truly, k)
            same = len({i for i, _ in turned} & {i for i, _ in truly})
            assert note.startswith(f"{name} {truth['strengths'][row]:g}")
            assert f"Of these 12, {same} are found by the rotation" in note
            compared.add(name)
    assert compared == {"brightness", "hue", "flip"}


@pytest.mark.slow
@needs_browser
def test_keys_choose_images_and_leave_sliders_alone(made):
    script = """
        const columns = getComputedStyle(d.querySelector(".all")).gridTemplateColumns.split(" ").length;
        const names = "Right Down Left Up Up".split(" ").map(way => `Arrow${way}`), at = [];
        for (const name of [...names, "End", "ArrowRight", "Home"]) {
            key(gallery()[current()], name);
            at.push(current());
        }
        for (const element of [slider("hue"), byId("reset")]) {
            key(element, "ArrowRight");
            at.push(current());
        }
        return [columns, at, gallery().filter(button => button.tabIndex === 0).length]"""
    columns, at, reached = in_browser(made[0], 1200, HANDS + script)
    assert at == [1, 1 + columns, columns, 0, 0, 64, 64, 0, 0, 1] and columns > 5
    assert reached == 1  # by Tab


@pytest.mark.slow
@needs_browser
def test_the_address_holds_what_is_chosen(made):
    script = """
        pick(5);
        slide("hue", 100);
        slider("hue").dispatchEvent(new Event("change"));
        press("ignore flip");
        const before = found("turned"), address = d.location.hash;
        byId("reset").click();
        pick(0);
        const reset = found("turned");
        d.location.hash = address;
        d.defaultView.dispatchEvent(new Event("hashchange"));
        return [address, current(), before, reset, found("turned")]"""
    address, chosen, before, reset, after = in_browser(made[0], 1200, HANDS + script)
    assert (address, chosen) == ("#image=5&steer=hue%3D0.15&ignore=flip", 5)
    assert before == after != reset


@pytest.mark.slow
@needs_browser
def test_a_name_is_shown_as_it_is_and_everything_has_one(made):
    script = """
        const labeled = all("input").every(input => input.labels.length === 1);
        const words = selector => all(selector).map(element => element.textContent);
        const names = gallery().map(button => button.firstChild.alt);
        return [names, all("script").length, labeled, words("b, label")]"""
    names, scripts, labeled, words = in_browser(made[0], 1200, HANDS + script)
    assert HOSTILE in names and all(names) and scripts == 2 and labeled
    assert "contrast" in words and "<b>a to b" in words and "a to b" not in words


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [360, 1200])
def test_sliders_and_neighbors_are_in_sight_together(made, width):
    """And nothing is too wide, neither several sliders off zero nor the truly transformed image."""
    script = """
        const wide = [], page = d.documentElement;
        for (const steps of [33, 0]) {
            slide("brightness", 50);
            slide("hue", steps);
            wide.push(page.scrollWidth);
        }
        const ends = [byId("turned"), byId("truth"), slider("brightness")];
        const heights = ends.map(element => element.getBoundingClientRect().bottom);
        return [Math.max(...wide), page.clientWidth, ...heights]"""
    widest, client, *heights = in_browser(made[0], width, HANDS + script)
    assert widest <= client <= width
    assert max(heights) < 800


@pytest.mark.slow
def test_a_page_of_2000_photographs_is_below_15_megabytes(shared, tmp_path):
    kinds = {name: (list(about.strengths), SURE) for name, about in TRANSFORMATIONS.items()}
    page, rotations, said = make(tmp_path, shared("data/clothing/train"), kinds=kinds)
    assert ": 2,000 images" in said and len(rotations.steerable) == 12
    assert page.stat().st_size < 15e6
