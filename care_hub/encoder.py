"""Backbone + projection head: images in, embeddings out; saved as a folder that plain timm loads too."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import augment
from .config import HEADS, EncoderConfig, ProjectionConfig
from .data.inputs import Transform, as_items, decode_batches
from .errors import CareHubError
from .files import check_tensors, make_folder, own_file, read_header, read_tensors, write_text
from .hub import export
from .hub.push import push_folder
from .hub.registry import locate
from .hub.rotation_set import RotationSet, find_rotations
from .models import SMALL, Backbone, build_backbone, feature_width, from_plain, timm_config, to_plain

SPACES = ("projection", "backbone")


def projection_head(config: ProjectionConfig) -> nn.Sequential:
    """Linear - BatchNorm - ReLU - Linear (public CIFAR form), or without the norm (ImageNet-100)."""
    first = nn.Linear(config.inputs, config.hidden, bias=not config.norm)
    middle = [nn.BatchNorm1d(config.hidden)] if config.norm else []
    return nn.Sequential(first, *middle, nn.ReLU(inplace=True), nn.Linear(config.hidden, config.outputs))


class Encoder(nn.Module):
    """An image encoder whose embeddings live on the unit sphere.

    `config` rebuilds it and says where it comes from. `backbone` is built from it where none is
    given.

    >>> encoder = Encoder.new("resnet10_w16_small", image_size=32, outputs=16)
    >>> encoder.encode(torch.zeros(2, 3, 32, 32)).shape
    (2, 16)
    """

    def __init__(self, config: EncoderConfig, backbone: Backbone | None = None):
        super().__init__()
        self.config = config
        self.backbone: Backbone = backbone or build_backbone(config.model, config.image_size)
        self.projection = projection_head(config.projection) if config.projection else None
        self.contrastive_head = projection_head(config.contrastive_head) if config.contrastive_head else None
        self.frozen = False  # the backbone, see `freeze_backbone`
        self.folder: Path | None = None  # from which it was loaded

    @classmethod
    def new(
        cls,
        model: str,
        image_size: int = 32,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.25, 0.25, 0.25),
        hidden: int = 512,
        outputs: int = 128,
        norm: bool = True,
        crop_pct: float = 1.0,
    ) -> "Encoder":
        """An encoder with random weights, from torch's global generator.

        `mean`, `std`: normalization, per channel. `hidden`, `outputs`, `norm`: of the projection
        head. Raises CareHubError for a model that does not exist or does not take images of this
        size, and for sizes and statistics that can't be.
        """
        config = EncoderConfig(model, image_size, crop_pct, mean, std)  # refused, if so, first
        backbone = build_backbone(model, image_size)
        head = ProjectionConfig(feature_width(backbone, image_size), hidden, outputs, norm)
        return cls(replace(config, projection=head), backbone)

    def set_contrastive_head(self, wanted: bool) -> None:
        """Add or remove a second head, of the shape of the projection head, for InfoNCE in training.

        One of that shape stays as it is.
        """
        shape = self.config.projection if wanted else None
        if self.config.contrastive_head != shape:
            self.config = replace(self.config, contrastive_head=shape)
            self.contrastive_head = projection_head(shape) if shape else None

    def forward(self, x: Tensor, contrastive: bool = False) -> Tensor:
        """(B, 3, S, S) normalized images -> (B, d) unit vectors (float32 also under autocast).

        `contrastive`: from the contrastive head, where there is one. Raises CareHubError where
        there is no projection head.
        """
        second = contrastive and self.contrastive_head is not None
        head = self.contrastive_head if second else self.projection
        if head is None:
            raise CareHubError("this encoder has no projection head; ask for `space='backbone'`.")
        z = head(self.features(x))
        return F.normalize(z.float() if z.dtype in (torch.bfloat16, torch.float16) else z, dim=1)

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) normalized images -> (B, num_features), as timm pools them."""
        return self.backbone(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x)

    def freeze_backbone(self) -> None:
        """Keep the backbone's weights and statistics as they are, in train mode too."""
        self.frozen = True
        self.backbone.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Encoder":
        """Train or eval mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    @property
    def fingerprint(self) -> str:
        """sha256 of all weights and statistics that make embeddings, in hexadecimal: tells whose they are."""
        digest = hashlib.sha256()
        state = self.state_dict().items()
        for name, tensor in ((k, v) for k, v in state if not k.startswith("contrastive_head.")):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def embed(self, x: Tensor, space: str = "projection", dtype: torch.dtype | None = None) -> Tensor:
        """(B, 3, S, S) uint8 or float in [0, 1], of the encoder's own size -> (B, d) float32 on its device.

        In eval mode, whatever mode the encoder is in, which stays. `dtype`: compute under autocast
        in it. Raises CareHubError for an unknown `space` and for other shapes.
        """
        if space not in SPACES:
            raise CareHubError(f"there is no space '{space}'; choose 'projection' or 'backbone'.")
        if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape[2:]:
            raise CareHubError(f"images must be (B, 3, S, S) here, got {tuple(x.shape)}; see `encode`.")
        model = self.evaluating()
        x = x.to(self.device, non_blocking=self.device.type != "cpu")  # which would read what has not come
        kind = next(self.parameters()).dtype
        x = x.to(kind) / 255 if x.dtype == torch.uint8 else x.to(kind)
        x = augment.normalize(x, self.config.mean, self.config.std)
        autocast = dtype not in (None, torch.float32)
        with torch.autocast(self.device.type, dtype) if autocast else nullcontext():
            return (model(x) if space == "projection" else model.features(x)).float()

    def evaluating(self, device: torch.device | str | None = None) -> "Encoder":
        """The encoder in eval mode on `device` (by default its own): itself if it is so, else a copy.

        A copy on the same device shares all weights and statistics. Nothing is switched in the
        encoder itself, since other threads may train it or encode with it. Raises CareHubError for
        a `device` that can't be used.
        """
        if device is not None:
            try:
                if torch.empty(0, device=device).device != self.device:
                    return copy.deepcopy(self).to(device).eval()
            except (RuntimeError, AssertionError) as error:
                raise CareHubError(f"`device='{device}'` can't be used ({error}).") from error
        if not any(module.training for module in self.modules()):
            return self
        return copy.deepcopy(self, {id(x): x for x in (*self.parameters(), *self.buffers())}).eval()

    @property
    def transform(self) -> Transform:
        """Prepares an image as `encode` does, for a DataLoader of one's own: what `forward` takes.

        >>> encoder = Encoder.new("resnet10_w16_small").eval()
        >>> encoder(torch.stack([encoder.transform(np.zeros((40, 50, 3), np.uint8))])).shape
        torch.Size([1, 128])
        """
        config = self.config
        return Transform(config.image_size, config.crop_pct, config.mean, config.std)

    def encode(
        self,
        images: Any,
        batch_size: int = 256,
        space: str = "projection",
        dtype: torch.dtype | None = None,
        progress: bool = False,
        *,
        convert_to_tensor: bool = False,
        normalize: bool = False,
        device: torch.device | str | None = None,
        ignore: Sequence[str] = (),
    ) -> Any:  # np.ndarray, or Tensor with `convert_to_tensor`
        """Embeddings of `images` as float32 (N, d), in their order.

        `images`: a path, a folder (sorted, with sub-folders), a PIL image, a tensor or array
        (uint8, or float in [0, 1]; grayscale, RGB or RGBA; channels first or last, as
        `data.inputs.to_pixels` says), or a batch, sequence or iterable of these, a `datasets`
        column included. `space`: "projection" for unit vectors, "backbone" for raw features, which
        `normalize=True` scales to unit length. `device`: where to compute, by default and
        afterwards where the encoder is. `convert_to_tensor`: give a tensor there, not an array.
        `ignore`: project out what these transformations move, see `load_rotations`; unit vectors.
        May be called from several threads, in train mode too. Raises CareHubError for whatever is
        no image.

        >>> from PIL import Image
        >>> encoder = Encoder.new("resnet10_w16_small")
        >>> encoder.encode(Image.new("RGB", (64, 48)), space="backbone").shape
        (1, 128)
        """
        items = as_items(images)
        if len(items) == 0:
            raise CareHubError("there are no images to encode.")
        model = self.evaluating(device)
        embeddings, done = np.empty((0, 0), np.float32), 0
        with tqdm(total=len(items), unit="image", desc="encoding", disable=not progress) as bar:
            for z in model.stream(items, batch_size, space, dtype):
                if done == 0:
                    embeddings = np.empty((len(items), z.shape[1]), np.float32)
                embeddings[done : done + len(z)] = z
                done += len(z)
                bar.update(len(z))
        if normalize:
            embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True).clip(1e-12)
        if ignore:
            embeddings = self._rotations(space).project(embeddings, ignore)
        return torch.from_numpy(embeddings).to(model.device) if convert_to_tensor else embeddings

    def _rotations(self, space: str) -> RotationSet:
        """Those beside the encoder. Raises CareHubError where there are none for `space`."""
        if self.folder is None:
            raise CareHubError("this encoder was not loaded from a folder, where its rotations would be.")
        found = find_rotations(self.folder, self.folder)
        if (found.encoder, found.space) != (self.fingerprint, space):
            raise CareHubError("the rotations beside this encoder are of other embeddings than these.")
        return found

    def stream(
        self,
        images: Any,
        batch_size: int = 256,
        space: str = "projection",
        dtype: torch.dtype | None = None,
        broken: Callable[[CareHubError], None] | None = None,
    ) -> Iterator[np.ndarray]:
        """What `encode` gives, one (batch_size, d) array after the other, in constant memory.

        `broken`: called with the error of an image that can't be decoded, whose row is NaN then; by
        default it is raised. Raises CareHubError too where the encoder itself gives NaN.
        """
        if batch_size < 1:
            raise CareHubError(f"`batch_size` must be at least 1, got {batch_size}.")
        size, crop_pct, model = self.config.image_size, self.config.crop_pct, self.evaluating()
        for batch, bad in decode_batches(as_items(images), batch_size, size, crop_pct, broken):
            z = model.embed(batch, space, dtype).cpu().numpy()
            if np.isnan(z).any():
                raise CareHubError(
                    "the encoder gives NaN; its weights are damaged, or too large for this dtype."
                )
            z[bad] = np.nan
            yield z

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write config.json, model.safetensors (backbone, plain timm) and, for each head that there
        is, projection.safetensors and contrastive_head.safetensors; and what SentenceTransformer
        reads, see `hub.sentence_transformer`. Interrupted whenever, it leaves the encoder that was
        there or this one.

        `dtype` torch.float16 halves the files: kernels and matrices are rounded to it, vectors are
        not. Raises CareHubError for a `dtype` of whole numbers, and where nothing can be written.
        """
        if dtype and not dtype.is_floating_point:
            raise CareHubError(f"weights can't be stored as {dtype}.")
        folder = make_folder(folder)
        stem = SMALL.get(self.config.model)

        def stored(module: nn.Module) -> dict[str, Tensor]:
            state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
            large = {k for k, v in state.items() if v.ndim > 1 and v.is_floating_point()}
            return {k: v.to(dtype) if dtype and k in large else v for k, v in state.items()}

        backbone = stored(self.backbone)
        files = {"model.safetensors": to_plain(backbone, stem) if stem else backbone}
        heads = {f"{name}.safetensors": getattr(self, name) for name in HEADS}
        files |= {name: stored(head) for name, head in heads.items() if head is not None}
        with export.folder_lock(folder):
            sums = {name: export.write_pending(folder, tensors) for name, tensors in files.items()}
            export.retract_modules(folder)
            care = replace(self.config, sha256=sums)
            config = timm_config(care, self.backbone) | {"care": care.to_json()}
            write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
            export.settle(folder, sums)
            for name in heads.keys() - files.keys():
                (folder / name).unlink(missing_ok=True)
        return folder

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save and upload; returns the address of the commit.

        `options`: private, revision, token, create_pr, commit_message, as in
        `hub.push.push_folder`.
        """
        with TemporaryDirectory() as folder:
            return push_folder(self.save_pretrained(folder), repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "Encoder":
        """The encoder in a run or export folder, of a registry name, or of a Hub repository, in
        eval mode.

        Raises CareHubError where anything is missing, damaged or does not fit; nothing is ever
        unpickled.
        """
        return cls.from_folder(locate(source, revision, token, cache_dir, local_files_only))

    @classmethod
    def from_folder(cls, folder: Path, plain: bool = False) -> "Encoder":
        """Load an export folder, trusting nothing in it. Raises CareHubError.

        `plain`: or one that timm wrote, of a network in the usual form of its architecture; the
        encoder has no head then.
        """
        config, stored = export.read_config(folder, plain)
        weights, heads = folder / "model.safetensors", {k: folder / f"{k}.safetensors" for k in HEADS}
        shapes: dict[str, Any] = {}
        for name, path in heads.items():
            shape = getattr(config, name)
            named = shape or path.name in config.sha256  # else of an encoder there before
            head = read_header(path)[0] if named and own_file(path) else None
            shapes[name] = shape if head is not None else None
            if head is not None and shape != (found := export.projection_of(head)):
                disagree = f"'{folder / 'config.json'}' and '{path.name}' disagree on the head"
                raise CareHubError(f"{disagree}: {shape}, {found}.")
        config = replace(config, **shapes)
        _check_size(config, weights, plain)
        encoder = cls(config)
        if not plain or "care" in stored:
            expected = timm_config(config, encoder.backbone)
            seen = expected["pretrained_cfg"] | {
                "crop_pct": config.crop_pct
            }  # as 0.1 wrote it for small stems
            same = stored.get("pretrained_cfg") == seen
            _check_twin(stored, expected | ({"pretrained_cfg": seen} if same else {}), folder)
        export.check_sums(folder, config.sha256)
        own = _stored_state(encoder)
        state = read_tensors(weights, own | (_classifier(encoder, weights) if plain else {}))
        state = {name: state[name] for name in own}
        stem = SMALL.get(config.model)
        export.fill(encoder.backbone, from_plain(state, stem) if stem else state, weights)
        for name, path in heads.items():
            if (module := getattr(encoder, name)) is not None:
                export.fill(module, read_tensors(path, module.state_dict()), path)
        encoder.folder = folder
        return encoder.eval()


def _check_size(config: EncoderConfig, weights: Path, plain: bool) -> None:
    """Raise CareHubError unless the network fits the file of its weights, before it takes any memory."""
    with torch.device("meta"):
        try:
            encoder = Encoder(config)
        except CareHubError:  # also for some architectures of timm 1.0.21, which are only built for real
            return
        own = _stored_state(encoder) | (_classifier(encoder, weights) if plain else {})
        check_tensors(read_header(weights)[0], own, weights)
    size = sum(x.nbytes for x in (*encoder.parameters(), *encoder.buffers()))  # some make vast tables
    if size > 8 * weights.stat().st_size + (1 << 30):
        gigabytes = f"{size >> 30} GB at {config.image_size} pixels"
        raise CareHubError(f"'{weights}' is of a network that takes {gigabytes}, far more than the file.")


def _classifier(encoder: Encoder, weights: Path) -> dict[str, Tensor]:
    """The classifier that timm may have written beside the backbone, without its values."""
    names = encoder.backbone.pretrained_cfg["classifier"] or ()
    layers = (names,) if isinstance(names, str) else names
    return {name: x for name, x in read_header(weights)[0].items() if name.rpartition(".")[0] in layers}


def _stored_state(encoder: Encoder) -> dict[str, Tensor]:
    """The backbone's weights under the names, and in the shapes, of plain timm."""
    state, stem = encoder.backbone.state_dict(), SMALL.get(encoder.config.model)
    return to_plain(state, stem) if stem else state


def _check_twin(stored: dict[str, Any], expected: dict[str, Any], folder: Path) -> None:
    """Raise CareHubError where timm's keys and the `care` object describe different networks."""
    expected = json.loads(json.dumps(expected))  # which turns timm's tuples into lists, as in the file
    for key in ("architecture", "num_classes", "num_features", "pretrained_cfg", "model_args"):
        if stored.get(key) != expected.get(key):
            found = f"{key} should be {expected.get(key)} and is {stored.get(key)}"
            raise CareHubError(f"'{folder / 'config.json'}' contradicts itself: {found}.")
