"""Whatever a user has becomes an upright RGB image, prepared as timm prepares it."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from care_hub.data import decode
from care_hub.errors import CareHubError


def photo(width: int, height: int) -> Image.Image:
    return Image.effect_mandelbrot((width, height), (-2, -1.5, 1, 1.5), 50).convert("RGB")


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    converted = photo(30, 20).convert(mode)
    converted.save(path)
    expected = Image.open(path).convert("RGB")
    for image in (path, str(path), path.read_bytes(), Image.open(path)):
        assert decode.to_rgb(image).mode == "RGB"
        np.testing.assert_array_equal(decode.to_rgb(image), expected)


def test_arrays_become_rgb():
    pixels = np.random.RandomState(0).randint(0, 256, (4, 5, 4)).astype(np.uint8)
    np.testing.assert_array_equal(decode.to_rgb(pixels[..., :3]), pixels[..., :3])
    np.testing.assert_array_equal(decode.to_rgb(pixels), pixels[..., :3])
    for gray in (pixels[..., 0], pixels[..., :1]):
        np.testing.assert_array_equal(decode.to_rgb(gray), pixels[..., :1].repeat(3, axis=2))
    for bad, message in (
        (pixels / 255, "uint8"),
        (pixels[..., :2], "3 or 4 channels"),
        (pixels[None], "HWC"),
    ):
        with pytest.raises(CareHubError, match=message):
            decode.to_rgb(bad)


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    values = (np.arange(5400).reshape(60, 90) * 12).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "sixteen.png")
    gray = np.asarray(decode.to_rgb(tmp_path / "sixteen.png"))[..., 0]
    np.testing.assert_array_equal(gray, (values / values.max() * 255).astype(np.uint8))
    dark = decode.to_rgb(Image.fromarray(np.array([[0.0, 7.0, 255.0]], np.float32)))
    assert np.asarray(dark)[0, :, 0].tolist() == [0, 7, 255]


def test_photos_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    photo(30, 20).save(tmp_path / "turned.jpg", exif=exif)
    assert decode.to_rgb(tmp_path / "turned.jpg").size == (20, 30)


def test_broken_images_are_named(tmp_path):
    half = tmp_path / "half.jpg"
    photo(400, 300).save(half)
    half.write_bytes(half.read_bytes()[:3000])
    with pytest.raises(CareHubError, match=r"half\.jpg can't be decoded \("):
        decode.to_rgb(half)
    with pytest.raises(CareHubError, match="row 3 can't be decoded"):
        decode.to_rgb(half.read_bytes(), "row 3")
    with pytest.raises(CareHubError, match="an image can't be decoded"):
        decode.to_rgb(b"no image")
    with pytest.raises(CareHubError, match=r"there is no image 'nowhere\.png'"):
        decode.to_rgb("nowhere.png")


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("shape", [(300, 200), (97, 131), (64, 64), (63, 200), (40, 30)])
def test_images_are_resized_and_cropped_as_timm_does(shape, crop_pct):
    transform = timm.data.create_transform((3, 64, 64), interpolation="bicubic", crop_pct=crop_pct)
    transform.transforms = transform.transforms[:2]  # resize and crop
    image = photo(*shape)
    expected = transform(image)
    np.testing.assert_array_equal(decode.resize_and_center_crop(image, 64, crop_pct), expected)


def test_a_crop_shows_its_box():
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[5:15, 10:30] = (200, 100, 50)
    crop = decode.to_tensor(decode.crop_and_resize(Image.fromarray(pixels), (7, 14, 6, 12), 8))
    assert crop.shape == (3, 8, 8) and crop.dtype == torch.uint8
    assert crop.flatten(1).unique(dim=1).squeeze(1).tolist() == [200, 100, 50]


def test_images_are_found_below_a_folder_in_order(tmp_path, monkeypatch):
    names = ["b.PNG", "a/z.jpeg", "a/b/c.webp", "notes.txt", "a/list.csv"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for folder in (tmp_path, str(tmp_path), f"{tmp_path}/"):
        paths, relative = decode.list_images(folder)
        assert relative == ["a/b/c.webp", "a/z.jpeg", "b.PNG"]
        assert paths == [str(tmp_path / name) for name in relative] == decode.find_images(folder)
    assert decode.list_images(tmp_path / "b.PNG") == ([str(tmp_path / "b.PNG")], ["b.PNG"])
    monkeypatch.chdir(tmp_path)
    assert decode.list_images("a") == (["a/b/c.webp", "a/z.jpeg"], ["b/c.webp", "z.jpeg"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CareHubError, match=r"no images in 'empty' \(looked for \.bmp, "):
        decode.list_images("empty")
    with pytest.raises(CareHubError, match="no file or folder 'nowhere'"):
        decode.list_images("nowhere")
