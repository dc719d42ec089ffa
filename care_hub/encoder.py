"""Backbone + projection head: pictures in, embeddings out; saved as a folder that plain timm loads too."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .augment import normalise
from .data import pictures
from .errors import CareHubError
from .export import check_sums, fill, projection_of, read_config, read_tensors, sha256, timm_config
from .models import SMALL, create_model, from_plain, to_plain

SPACES = ("projection", "backbone")


def projection_head(inputs: int, hidden: int, outputs: int, norm: bool) -> nn.Sequential:
    """Linear - BatchNorm - ReLU - Linear (public CIFAR form), or Linear - ReLU - Linear without the norm (ImageNet-100)."""
    middle = [nn.BatchNorm1d(hidden)] if norm else []
    return nn.Sequential(nn.Linear(inputs, hidden, bias=not norm), *middle, nn.ReLU(inplace=True), nn.Linear(hidden, outputs))


class Encoder(nn.Module):
    """An image encoder whose embeddings live on the unit sphere.

    `care` holds what rebuilds it and where it comes from: model, image_size, crop_pct, mean, std, projection (inputs,
    hidden, outputs, norm; None without a head), and whatever training adds.
    """

    def __init__(self, care: dict):
        super().__init__()
        self.care = care
        size = care["image_size"]
        self.backbone = _backbone(care["model"], size)
        head = care.get("projection")
        self.projection = projection_head(**head) if head else None

    @classmethod
    def new(
        cls, model: str, image_size: int = 32, mean=(0.5,) * 3, std=(0.25,) * 3, hidden: int = 512, outputs: int = 128,
        norm: bool = True, crop_pct: float = 1.0,
    ) -> "Encoder":  # fmt: skip
        """A fresh encoder with random weights."""
        care = {"model": model, "image_size": image_size, "crop_pct": crop_pct, "mean": list(mean), "std": list(std)}
        inputs = _backbone(model, image_size).num_features
        return cls(care | {"projection": {"inputs": inputs, "hidden": hidden, "outputs": outputs, "norm": norm}})

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) normalised pictures -> (B, d) unit vectors (float32 also under autocast)."""
        z = self.projection(self.features(x))
        return F.normalize(z.float() if z.dtype in (torch.bfloat16, torch.float16) else z, dim=1)

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) normalised pictures -> (B, num_features), as timm pools them."""
        return self.backbone(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def fingerprint(self) -> str:
        """sha256 of all weights and statistics, in hexadecimal: tells whose embeddings something belongs to."""
        digest = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def embed(self, x: Tensor, space: str = "projection", dtype: torch.dtype | None = None) -> Tensor:
        """(B, 3, S, S) uint8 or float in [0, 1], of the encoder's own size -> (B, d) float32 on its device; eval mode."""
        if space not in SPACES:
            raise CareHubError(f"there is no space '{space}'; choose 'projection' or 'backbone'.")
        if space == "projection" and self.projection is None:
            raise CareHubError("this encoder has no projection head; ask for space='backbone'.")
        training = self.training
        self.eval()
        try:
            x = x.to(self.device, non_blocking=True)
            kind = next(self.parameters()).dtype
            x = normalise(x.to(kind) / 255 if x.dtype == torch.uint8 else x.to(kind), self.care["mean"], self.care["std"])
            with torch.autocast(self.device.type, dtype) if dtype not in (None, torch.float32) else nullcontext():
                return (self(x) if space == "projection" else self.features(x)).float()
        finally:
            self.train(training)

    def encode(
        self, images, batch_size: int = 256, space: str = "projection", dtype: torch.dtype | None = None, progress: bool = False
    ) -> np.ndarray:
        """Embeddings of `images` as float32 (N, d), in their order.

        `images`: a path, a folder (sorted, with sub-folders), a PIL image, a uint8 array (HWC or NHWC), a float tensor
        in [0, 1] (NCHW or CHW), or a sequence of any of these, a `datasets` column included. `space`: "projection" for
        unit vectors, "backbone" for raw features. Raises CareHubError for a picture that can't be decoded.
        """
        items = _items(images)
        if len(items) == 0:
            raise CareHubError("there are no images to encode.")
        found, done = None, 0
        with tqdm(total=len(items), unit="image", desc="encoding", disable=not progress) as bar:
            for z in self.stream(items, batch_size, space, dtype):
                found = np.empty((len(items), z.shape[1]), np.float32) if found is None else found
                found[done : done + len(z)] = z
                done += len(z)
                bar.update(len(z))
        return found

    def stream(
        self, images, batch_size: int = 256, space: str = "projection", dtype: torch.dtype | None = None,
        broken: Callable[[CareHubError], None] | None = None,
    ) -> Iterator[np.ndarray]:  # fmt: skip
        """What `encode` gives, one (batch_size, d) array after the other, so that memory does not grow with the number of images.

        `broken`: called with the error of a picture that can't be decoded, whose row is NaN then; by default it is raised. Raises
        CareHubError too where the encoder itself gives NaN.
        """
        if batch_size < 1:
            raise CareHubError(f"batch_size must be at least 1, got {batch_size}.")
        for batch, bad in self._batches(_items(images), batch_size, broken):
            z = self.embed(batch, space, dtype).cpu().numpy()
            if np.isnan(z).any():
                raise CareHubError("the encoder gives NaN; its weights are damaged, or the numbers are too large for this dtype.")
            z[bad] = np.nan
            yield z

    def _batches(self, items, batch_size: int, broken: Callable | None) -> Iterator[tuple[Tensor, list[int]]]:
        """Decoded batches and the places of broken pictures, one batch decoded ahead while the network works on the last."""
        slices = [slice(k, k + batch_size) for k in range(0, len(items), batch_size)]
        if isinstance(items, Tensor):
            yield from ((self._resize(items[s]), []) for s in slices)
            return
        with ThreadPoolExecutor(os.cpu_count()) as pool:

            def submit(s: slice):
                return [pool.submit(self._canvas, item) for item in items[s]]

            def result(future) -> Tensor | None:
                try:
                    return future.result()
                except CareHubError as error:
                    if broken is None:
                        raise
                    broken(error)

            ahead = submit(slices[0]) if slices else []
            for following in [*slices[1:], None][: len(slices)]:
                current, ahead = [result(f) for f in ahead], submit(following) if following else []
                bad = [k for k, canvas in enumerate(current) if canvas is None]
                empty = torch.zeros(3, self.care["image_size"], self.care["image_size"], dtype=torch.uint8)
                yield torch.stack([empty if canvas is None else canvas for canvas in current]), bad

    def _canvas(self, item) -> Tensor:
        if isinstance(item, Tensor):
            return (self._resize(item[None])[0] * 255).round().byte()
        if isinstance(item, dict):  # an undecoded cell of `datasets`
            item = item.get("bytes") or item.get("path")
        picture = pictures.fit(pictures.rgb(item), self.care["image_size"], self.care["crop_pct"])
        return torch.from_numpy(pictures.pixels(picture).copy())

    def _resize(self, x: Tensor) -> Tensor:
        """Tensors to the encoder's size, as `pictures.fit` does for pictures."""
        size, (height, width) = self.care["image_size"], x.shape[-2:]
        if (height, width) == (size, size):
            return x
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        width, height = pictures.fitted_shape(width, height, size, self.care["crop_pct"])
        x = F.interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = pictures.central(height, size), pictures.central(width, size)
        return x[..., top : top + size, left : left + size]

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write config.json, model.safetensors (backbone, plain timm) and projection.safetensors (if there is a head).

        `dtype` torch.float16 halves the files: kernels and matrices are rounded to it, vectors are not.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stem = SMALL.get(self.care["model"])

        def stored(module: nn.Module) -> dict[str, Tensor]:
            state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
            return {k: v.to(dtype) if dtype and v.ndim > 1 else v for k, v in state.items()}

        files = {"model.safetensors": to_plain(stored(self.backbone), stem) if stem else stored(self.backbone)}
        if self.projection is not None:
            files["projection.safetensors"] = stored(self.projection)
        for name, tensors in files.items():
            save_file(tensors, folder / name, metadata={"format": "pt"})
        config = timm_config(self.care, self.backbone)
        config["care"] = self.care | {"sha256": {name: sha256(folder / name) for name in files}}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        return folder

    def push_to_hub(self, repo_id: str, **options) -> str:
        """Save and upload; `options` (private, revision, token, create_pr, commit_message) as in `hub.push`."""
        from .hub import push

        with TemporaryDirectory() as folder:
            return push(self.save_pretrained(folder), repo_id, **options)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "Encoder":  # fmt: skip
        """The encoder in a run folder or an export folder, of a registry name, or of a Hub repository, in eval mode.

        Raises CareHubError where anything is missing, damaged or does not fit; nothing is ever unpickled.
        """
        from .registry import locate

        options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        return cls.from_folder(locate(source, **options))

    @classmethod
    def from_folder(cls, folder: Path) -> "Encoder":
        """Load an export folder, trusting nothing in it."""
        config = read_config(folder)
        care = config["care"]
        check_sums(folder, care["sha256"])
        state = read_tensors(folder / "model.safetensors")
        head = read_tensors(folder / "projection.safetensors") if (folder / "projection.safetensors").is_file() else None
        if head is None:
            care = care | {"projection": None}
        elif care["projection"] != (found := projection_of(head)):
            raise CareHubError(f"'{folder / 'config.json'}' and the weights disagree on the head: {care['projection']}, {found}.")
        encoder = cls(care)
        expected = timm_config(care, encoder.backbone)
        for key in ("architecture", "num_classes", "num_features", "pretrained_cfg", "model_args"):
            if config.get(key) != expected.get(key):
                raise CareHubError(
                    f"'{folder / 'config.json'}' contradicts itself: for {care['model']}, {key} should be {expected.get(key)} "
                    f"and is {config.get(key)}."
                )
        stem = SMALL.get(care["model"])
        fill(encoder.backbone, from_plain(state, stem) if stem else state, folder / "model.safetensors")
        if head is not None:
            fill(encoder.projection, head, folder / "projection.safetensors")
        return encoder.eval()


def load_encoder(
    source: str | Path, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Encoder:  # fmt: skip
    """`Encoder.from_pretrained`, on the GPU if there is one."""
    encoder = Encoder.from_pretrained(source, revision, token, cache_dir, local_files_only)
    return encoder.to("cuda" if torch.cuda.is_available() else "cpu")


def _backbone(model: str, size: int) -> nn.Module:
    import timm

    fixed = timm.is_model(model) and timm.get_pretrained_cfg(model) is not None and timm.get_pretrained_cfg(model).fixed_input_size
    backbone = create_model(model, **({"img_size": size} if fixed else {})).to(memory_format=torch.channels_last)
    patch = max(getattr(getattr(backbone, "patch_embed", None), "patch_size", None) or (1,))
    if size % patch:
        near = max(1, round(size / patch)) * patch
        raise CareHubError(f"{model} cuts pictures into patches of {patch} pixels, which do not fill {size}; use --image-size {near}.")
    return backbone


def _items(images):
    """Anything `encode` accepts -> a tensor (NCHW) or something with a length and slices."""
    if isinstance(images, Tensor):
        if images.ndim not in (3, 4) or images.shape[-3] != 3:
            raise CareHubError(f"an image tensor must be (N, 3, H, W) or (3, H, W), got {tuple(images.shape)}.")
        if images.dtype != torch.uint8 and images.numel() and not 0 <= float(images.min()) <= float(images.max()) <= 1:
            raise CareHubError("a float image tensor must lie in [0, 1]; normalisation is the encoder's own business.")
        return images if images.ndim == 4 else images[None]
    if isinstance(images, np.ndarray):
        return images if images.ndim == 4 else [images]
    if isinstance(images, str | Path):
        return pictures.files(images) if Path(images).is_dir() else [images]
    if isinstance(images, Image.Image | bytes | dict):
        return [images]
    return images if hasattr(images, "__getitem__") and hasattr(images, "__len__") else list(images)
