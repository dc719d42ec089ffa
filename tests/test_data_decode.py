"""Whatever a user has becomes an upright RGB image, prepared as timm prepares it."""

import io
import os
import struct
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import pytest
import timm
import torch
from helpers import run
from PIL import Image, ImageOps

from care_hub.data import decode
from care_hub.errors import CareHubError

PILLOW = int(PIL.__version__.split(".")[0])
SINCE_13 = pytest.mark.skipif(PILLOW < 13, reason="Pillow before 13 reads no tag behind such a one")
FUZZ = int(os.environ.get("CARE_HUB_TEST_FUZZ", 1400))  # damaged files


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


def test_more_than_eight_bits_are_scaled_by_the_range_of_their_type(tmp_path):
    """Not by the image's own brightest pixel; whatever has no such range is refused."""
    gray = np.random.RandomState(0).randint(0, 200, (20, 30)).astype(np.uint8)  # none as bright as can be
    exact = gray.astype(np.uint16) * 257
    Image.fromarray(exact).save(tmp_path / "sixteen.png")
    Image.fromarray(exact).save(tmp_path / "sixteen.tif")
    Image.fromarray(exact.astype(np.int32)).save(tmp_path / "sixteen.pgm")
    Image.fromarray((gray / 255).astype(np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "big-endian.pgm").write_bytes(b"P5 30 20 65535\n" + exact.astype(">u2").tobytes())
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(np.asarray(decode.to_rgb(path))[..., 0], gray, str(path))
    uneven = np.arange(0, 65536, 11, dtype=np.uint16)[None]
    found = np.asarray(decode.to_rgb(Image.fromarray(uneven)))[..., 1]
    np.testing.assert_array_equal(found, (uneven / 257).round())
    black = decode.to_rgb(Image.fromarray(np.zeros((4, 4), np.int32)))
    assert not np.asarray(black).any()


@pytest.mark.parametrize(
    "pixels, reason",
    [
        (np.float32([[-1, 1]]), "from -1 to 1, not from 0 to 1"),
        (np.float32([[0, 7, 255]]), "from 0 to 255, not from 0 to 1"),
        (np.float32([[0, np.nan]]), "nan"),
        (np.float32([[0, np.inf]]), "inf"),
        (np.int32([[-5, 5]]), "from -5 to 5, not from 0 to 65535"),
        (np.int32([[0, 65536]]), "not from 0 to 65535"),
        (np.int32([[0, 255]]), "may mean 8 or 16 bits"),
    ],
)
def test_pixels_outside_the_range_of_their_type_are_refused(pixels, reason, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "odd.tif")
    for image in (tmp_path / "odd.tif", Image.fromarray(pixels)):
        with pytest.raises(CareHubError, match=rf"can't be decoded \(.*{reason}"):
            decode.to_rgb(image)


def test_float_files_of_others(shared):
    folder = shared("cases/float-tiff")
    found = np.asarray(decode.to_rgb(folder / "float01.tif"))
    np.testing.assert_array_equal(found, decode.to_rgb(folder / "grey8.png"))
    for name in ("float-1to1.tif", "int-negative.tif"):
        with pytest.raises(CareHubError, match=f"{name} can't be decoded"):
            decode.to_rgb(folder / name)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_photos_stand_upright(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    photo(30, 20).save(path, exif=exif)
    np.testing.assert_array_equal(
        decode.to_rgb(path), ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    )
    assert decode.to_rgb(path).size == ((20, 30) if orientation in (5, 6, 7, 8) else (30, 20))


def test_threads_may_share_an_image_that_is_not_read_yet(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(600, 400).save(tmp_path / "photo.png", exif=exif)
    expected = np.asarray(decode.to_rgb(tmp_path / "photo.png"))
    for _ in range(5):
        image = Image.open(tmp_path / "photo.png")
        with ThreadPoolExecutor(8) as pool:
            for found in pool.map(decode.to_rgb, [image] * 8):
                np.testing.assert_array_equal(found, expected)


def odd_exif(tag: int, kind: int, count: int, value: bytes, orientation: int = 6) -> bytes:
    """An EXIF block by hand, little-endian: an orientation and one more tag, of any type."""
    tags = sorted([(0x0112, 3, 1, orientation.to_bytes(4, "little")), (tag, kind, count, value)])
    block = b"".join(struct.pack("<HHI4s", *entry) for entry in tags)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + block + bytes(4)


@pytest.mark.parametrize(
    "tag, kind, count, value",
    [
        (0x0100, 11, 1, struct.pack("<f", 30.5)),  # a width that is a float
        (0x0100, 2, 4, b"abc\0"),  # or text
        (0x011A, 5, 1, b"\xff\xff\xff\xff"),  # a fraction beyond the end
        (0xA005, 2, 4, b"abc\0"),  # a block of tags that is text
        (0x8769, 4, 1, b"\xff\xff\xff\x7f"),  # or beyond the end
        (0x9003, 99, 1, b"abcd"),  # a type that does not exist
        pytest.param(0x010F, 3, 4000000000, b"abcd", marks=SINCE_13),
    ],
)
def test_an_odd_tag_costs_no_photo(tag, kind, count, value, tmp_path):
    path = tmp_path / "odd.jpg"
    photo(30, 20).save(path, exif=odd_exif(tag, kind, count, value))
    expected = Image.open(path).convert("RGB").transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(decode.to_rgb(path), expected)


def test_odd_tags_of_others(shared):
    paths = sorted(shared("cases/exif-odd-tag").glob("photos/*.jpg"))
    assert paths
    for path in paths:
        expected = Image.open(path).convert("RGB").transpose(Image.Transpose.ROTATE_270)
        np.testing.assert_array_equal(decode.to_rgb(path), expected)


@pytest.mark.parametrize("value", [b"", b"no tags", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_tags_that_can_not_be_read_say_nothing(value, tmp_path):
    photo(30, 20).save(tmp_path / "odd.jpg", exif=value)
    assert decode.to_rgb(tmp_path / "odd.jpg").size == (30, 20)


FORMATS = ["AVIF", "BMP", "DDS", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA"]
FORMATS += ["TIFF", "WEBP"]


@pytest.mark.launches
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_is_an_image_or_can_not_be_decoded(kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    random = np.random.RandomState(FORMATS.index(kind))
    file, options = io.BytesIO(), {}
    if kind in ("AVIF", "JPEG", "PNG", "TIFF", "WEBP"):
        options["exif"] = Image.Exif()
        options["exif"].update(
            {0x0112: 6, 0x011A: 72.0, 0x010F: "maker", 0x0213: 1, 0xA002: 16, 0x9000: b"0232"}
        )
    try:
        Image.fromarray(random.randint(0, 256, (16, 16, 3)).astype(np.uint8)).save(file, kind, **options)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {kind}")
    whole = np.frombuffer(file.getvalue(), np.uint8)
    for _ in range(FUZZ // len(FORMATS)):
        damaged = whole.copy()
        start = random.randint(0, min(len(whole), 160))  # where headers and tags are
        window = damaged[start : start + random.choice([1, 4, 16, len(whole)])]
        where = random.randint(0, len(window), random.randint(1, 5))
        window[where] = random.choice([random.randint(0, 256), random.randint(0, 14), 0, 255])
        end = len(whole) if random.rand() < 0.8 else random.randint(1, len(whole))
        try:
            assert decode.to_rgb(damaged[:end].tobytes()).mode == "RGB"
        except CareHubError as error:
            assert "can't be decoded (" in str(error)


@pytest.mark.parametrize("nothing", [None, {"bytes": None, "path": None}, {}, b""])
def test_a_null_image_is_a_broken_one(nothing):
    with pytest.raises(CareHubError, match=r"row 3 can't be decoded \("):
        decode.to_rgb(nothing, "row 3")


def test_an_image_without_pixels_is_a_broken_one():
    with pytest.raises(CareHubError, match="no pixels"):
        decode.to_rgb(Image.new("RGB", (0, 5)))


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


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1), (7, 2001), (300, 9000), (17001, 1000)])
def test_a_strip_is_cut_before_it_is_resized(shape):
    image = photo(*shape)
    width, height = decode.resized_shape(*shape, 64, 0.875)
    left, top = decode.center_offset(width, 64), decode.center_offset(height, 64)
    whole = image.resize((width, height), Image.Resampling.BICUBIC)
    expected = np.asarray(whole.crop((left, top, left + 64, top + 64)), float)
    difference = np.abs(decode.resize_and_center_crop(image, 64, 0.875) - expected)
    assert difference.mean() < 0.1 and (min(shape) > 1 or not difference.any())


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_a_strip_of_any_length_is_an_image():
    for shape in ((1, 500_000), (500_000, 1)):  # resized whole, they would be 224 x 112,000,000
        strip = png(*shape, zlib.compress((b"\0" + bytes([9, 8, 7, 255]) * shape[0]) * shape[1]))
        square = decode.to_square(strip, "", 224)
        assert square.shape == (3, 224, 224)
        assert square.flatten(1).unique(dim=1).squeeze(1).tolist() == [9, 8, 7]


def resaved(kind: str, *changes: tuple[bytes, bytes], mode: str = "RGB", **options) -> bytes:
    """A small file whose header is changed, to claim more."""
    file = io.BytesIO()
    Image.new(mode, (48, 48)).save(file, kind, **options)
    found = file.getvalue()
    for old, new in changes:
        assert old in found
        found = found.replace(old, new, 1)
    return found


def bombs() -> dict[str, bytes]:
    """Small files that would take gigabytes."""
    small, claimed = ((struct.pack("<HH", n, n), struct.pack(">HH", n, n)) for n in (48, 12000))
    rows, planes = (struct.pack("<HHII", *tag) for tag in ((278, 4, 1, 48), (284, 3, 1, 1)))
    tile = [struct.pack("<HHII", tag, 4, 1, 12000) for tag in (322, 323)]
    return {
        "png": png(12000, 12000),
        "strip": png(1, 60_000_000),
        "beyond Pillow's limit": png(60_000, 60_000),
        "pgm": b"P5 12000 12000 255\n",
        "16 bits": b"P5 7000 7000 65535\n",
        "gif": resaved("GIF", (small[0], claimed[0])),
        "tga": resaved("TGA", (small[0], claimed[0])),
        "jpeg": resaved("JPEG", (small[1], claimed[1])),
        "progressive jpeg": resaved("JPEG", (small[1], struct.pack(">HH", 7000, 7000)), progressive=True),
        "webp": resaved("WEBP", (b"\x2f\x2f\xc0\x0b\x00", b"\x2f\xff\xff\xff\x0f"), lossless=True),
        "jp2": resaved("JPEG2000", (b"\0\x30\0\0\0\x30", b"\xff\xff\0\0\xff\xff")),
        "tile of a tiff": resaved("TIFF", (rows, tile[0]), (planes, tile[1]), mode="RGBA"),
        "ico": struct.pack("<3H4B2H2I", 0, 1, 1, 0, 0, 0, 0, 1, 32, 99, 22) + png(12000, 12000),
        "icns": resaved("ICNS", mode="RGBA"),
        "eps": resaved("EPS"),
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_would_take_too_much_memory_is_refused(monkeypatch):
    reason = r"it has .* and would take \d+ MB; `PIL.Image.MAX_IMAGE_PIXELS`|Image size|cannot identify"
    for name, content in bombs().items():
        with pytest.raises(CareHubError, match=rf"{name} can't be decoded \(({reason})"):
            decode.to_rgb(content, name)
    image = Image.new("RGB", (100, 100))  # is in memory, whatever its size
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9999)
    assert decode.to_rgb(image).size == (100, 100)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measures where Linux tells the peak")
def test_no_image_takes_600_mb(tmp_path):
    """The largest that are decoded."""
    zeros = zlib.compressobj(1)
    pixels = b"".join(zeros.compress(bytes(1 + 4 * 8100)) for _ in range(8100)) + zeros.flush()
    (tmp_path / "rgba.png").write_bytes(png(8100, 8100, pixels))
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"progressive": True, "subsampling": 0, "exif": exif}
    Image.new("RGB", (6100, 6100)).save(tmp_path / "progressive.jpg", **options)
    Image.new("RGB", (5100, 5100)).save(tmp_path / "image.webp", method=0)
    measure = (
        "import re, sys; from care_hub.data.inputs import decode_item\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) / 1000\n"
        "before = peak()\n"
        "for path in sys.argv[1:]: assert decode_item(path, 224, 0.875).shape == (3, 224, 224)\n"
        "print(peak() - before)"
    )
    paths = sorted(map(str, tmp_path.iterdir()))
    assert 100 < float(run(sys.executable, "-c", measure, *paths).stdout) < 600


def test_threads_wait_for_the_large_images_of_others(monkeypatch, tmp_path):
    photo(100, 100).save(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as image:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", decode._bytes_of(image) // 6 + 1)
    running, most = [], []

    def square(image: Image.Image, *_) -> torch.Tensor:
        running.append(image)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return torch.zeros(3, 8, 8)

    monkeypatch.setattr(decode, "square_tensor", square)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda _: decode.to_square(tmp_path / "image.png", "", 8), range(24)))
    assert max(most) == 4


def test_errors_keep_no_image_in_memory(tmp_path):
    image = Image.fromarray(np.float32([[7]]))
    with pytest.raises(CareHubError) as caught:
        decode.to_rgb(image)
    assert caught.value.__cause__ is None and caught.value.__context__ is None


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
    with pytest.raises(CareHubError, match=r"no images in 'empty'\.$"):
        decode.list_images("empty")
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(CareHubError, match=r"no images in 'empty' \(only 1 \.txt\)"):
        decode.list_images("empty")
    with pytest.raises(CareHubError, match="no file or folder 'nowhere'"):
        decode.list_images("nowhere")


def test_images_have_the_suffixes_that_this_pillow_decodes(tmp_path):
    Image.init()
    photo(16, 16).save(tmp_path / "whole.jpg")
    for suffix, name in Image.registered_extensions().items():
        if name in Image.SAVE and name not in decode.NOT_DECODED:
            try:
                photo(16, 16).save(tmp_path / f"image{suffix.upper()}", name)
            except (OSError, ValueError):  # a format without colors
                continue
    names = sorted(path.name for path in tmp_path.iterdir())
    common = {".jpeg", ".jfif", ".jpe", ".mpo", ".apng", ".bmp", ".webp", ".pgm", ".tga", ".jp2"}
    assert {f"image{suffix.upper()}" for suffix in common} <= set(names)
    assert decode.list_images(tmp_path)[1] == names
    for name in names:
        decode.to_rgb(tmp_path / name)


def test_what_is_left_out_of_a_folder_is_counted(tmp_path, caplog, monkeypatch):
    names = ["a.png", "._a.png", ".hidden.jpg", ".ipynb_checkpoints/a-checkpoint.png", "b/.cache/c.png"]
    names += ["b/c.heic_", "b/d.h5", "b/e.pdf", "e.pdf", "LICENSE", "clip.mpg", "b/e.x\ty"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert decode.list_images(tmp_path)[1] == ["a.png"]
    (said,) = caplog.messages
    assert said.startswith(f"left out of '{tmp_path}': ") and "4 hidden" in said and "2 .pdf" in said
    assert "1 .h5" in said and "1 .mpg" in said and "3 without a suffix" in said
    monkeypatch.setenv("RANK", "1")
    assert decode.find_images(tmp_path) and len(caplog.messages) == 1  # said by one process


def test_links_are_followed_once(tmp_path, caplog):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "1.png").touch()
    top = tmp_path / "photos [2024]"
    for folder in ("a", "b"):
        (top / folder).mkdir(parents=True)
        (top / folder / "0.png").touch()
    (top / "linked").symlink_to(tmp_path / "elsewhere")
    (top / "c.png").symlink_to(tmp_path / "elsewhere" / "deep" / "1.png")
    (top / "a" / "up").symlink_to(top)
    (top / "a" / "b").symlink_to(top / "b")
    (top / "b" / "a").symlink_to(top / "a")
    (top / "self").symlink_to(top / "self")
    expected = ["a/0.png", "a/b/0.png", "b/0.png", "b/a/0.png", "c.png", "linked/deep/1.png"]
    assert decode.list_images(top)[1] == expected
    assert "4 links to folders above" in caplog.text


CASES = [("hidden-files", 1), ("suffixes", 5), ("brackets-in-path", 8)]


@pytest.mark.parametrize(("case", "count"), CASES)
def test_shared_cases_of_folders(case, count, shared):
    (folder,) = shared(f"cases/{case}").glob("photos*")
    assert len(decode.find_images(folder)) == count
