"""Embeddings of a folder of pictures as a file: by any number of processes, in constant memory, from where it was stopped.

Each process embeds every so-many-th part of the sorted pictures into a file of its own, called by what is in it; the first
process joins the parts. Names (a line per picture) are all that grows with the number of pictures.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .data.pictures import named
from .distributed import start
from .encoder import Encoder
from .errors import CareHubError
from .registry import locate

PART = 4096  # pictures


def embed(source: str, encoder: str, output: str, space: str, batch_size: int, skip_broken: bool) -> str:
    """`care-hub embed`: what was written, in words (nothing but on the first process).

    Raises CareHubError for a broken picture (unless `skip_broken`: it is named and left out) and a place that can't be written.
    """
    path = Path(output)
    if path.suffix not in WRITERS:
        raise CareHubError(f"'{output}' must end in {', '.join(WRITERS)}.")
    if not path.absolute().parent.is_dir():
        raise CareHubError(f"the folder '{path.parent}' for the output does not exist.")
    files, names = named(source)
    accelerator = start()
    processes, rank, main = accelerator.num_processes, accelerator.process_index, accelerator.is_main_process
    loaded = Encoder.from_folder(locate(encoder)).to(accelerator.device)
    parts = Parts(path.with_name(f"{path.name}.parts"), names, {"encoder": loaded.fingerprint, "space": space})
    try:
        parts.folder.mkdir(exist_ok=True)
        mine = [k for k in range(rank, parts.count, processes) if not parts.file(k).is_file()]
        broken = (lambda error: tqdm.write(f"left out: {error}", sys.stderr)) if skip_broken else None
        todo = [file for k in mine for file in files[parts.rows(k)]]
        title = "embedding" if processes == 1 else f"embedding, process 1 of {processes}"
        with tqdm(total=len(todo), unit="image", desc=title, disable=not (main and sys.stderr.isatty())) as bar:
            parts.save(mine, _counted(loaded.stream(todo, batch_size, space, broken=broken), bar))
        accelerator.wait_for_everyone()
        return parts.join(path) if main else ""
    except OSError as error:
        raise CareHubError(f"'{output}' can't be written ({error.strerror}); with room for it, the same command goes on.") from error


def _counted(stream: Iterator[np.ndarray], bar: tqdm) -> Iterator[np.ndarray]:
    for z in stream:
        yield z
        bar.update(len(z))


@dataclass
class Parts:
    """A folder of arrays, part k with the embeddings of pictures `rows(k)`; NaN for one that is left out."""

    folder: Path
    names: list[str]
    about: dict[str, str]  # of the finished file

    @property
    def count(self) -> int:
        return -(-len(self.names) // PART)

    def rows(self, k: int) -> slice:
        return slice(k * PART, (k + 1) * PART)

    def file(self, k: int) -> Path:
        """Where part k is; a picture more or less makes other parts of those that follow it, and leaves those before."""
        said = json.dumps([self.about, self.names[self.rows(k)]])
        return self.folder / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.npy"

    def save(self, parts: list[int], stream: Iterator[np.ndarray]) -> None:
        """Write `parts` from the batches of `stream`, whatever their length; a part is there whole or not at all."""
        held: list[np.ndarray] = []
        for k in parts:
            size = len(self.names[self.rows(k)])
            while sum(map(len, held)) < size:
                held.append(next(stream))
            z = np.concatenate(held)
            held = [z[size:]]
            temporary = self.folder / f"writing-{k}"
            with open(temporary, "wb") as file:
                np.save(file, z[:size], allow_pickle=False)
            os.replace(temporary, self.file(k))

    def join(self, path: Path) -> str:
        """All parts as the file `path`; the folder of parts is removed."""
        kept = [~np.isnan(self._load(k)[:, 0]) for k in range(self.count)]
        names = [name for k, good in enumerate(kept) for name, g in zip(self.names[self.rows(k)], good, strict=True) if g]
        dim = self._load(0).shape[1]
        temporary = path.with_name(f".writing-{path.name}")
        with open(temporary, "wb") as file:
            WRITERS[path.suffix](file, names, dim, (self._load(k)[good] for k, good in enumerate(kept)), self.about)
        os.replace(temporary, path)
        shutil.rmtree(self.folder)
        left_out = f", {len(self.names) - len(names):,} broken pictures left out" if len(names) < len(self.names) else ""
        return f"{len(names):,} embeddings of {dim} numbers in {path}{left_out}"

    def _load(self, k: int) -> np.ndarray:
        try:
            return np.load(self.file(k), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise CareHubError(f"the part '{self.file(k)}' is damaged; remove it and type the same command again.") from error


def _write_parquet(file, names: list[str], dim: int, arrays: Iterator[np.ndarray], about: dict[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("path", pa.string()), ("embedding", pa.list_(pa.float32(), dim))], metadata=about)
    with pq.ParquetWriter(file, schema) as writer:
        start = 0
        for z in arrays:
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(z.reshape(-1)), dim)
            writer.write_table(pa.table({"path": names[start : start + len(z)], "embedding": vectors}, schema=schema))
            start += len(z)


def _write_safetensors(file, names: list[str], dim: int, arrays: Iterator[np.ndarray], about: dict[str, str]) -> None:
    """By hand, since the library's writer wants the whole array: length of the header, header, numbers."""
    tensor = {"dtype": "F32", "shape": [len(names), dim], "data_offsets": [0, 4 * len(names) * dim]}
    header = json.dumps({"__metadata__": about | {"paths": json.dumps(names)}, "embeddings": tensor}).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    for z in arrays:
        file.write(z.astype("<f4").tobytes())


def _write_npy(file, names: list[str], dim: int, arrays: Iterator[np.ndarray], about: dict[str, str]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (len(names), dim)})
    for z in arrays:
        file.write(z.astype("<f4").tobytes())


WRITERS = {".parquet": _write_parquet, ".safetensors": _write_safetensors, ".npy": _write_npy}
