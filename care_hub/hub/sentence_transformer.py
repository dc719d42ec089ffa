"""What SentenceTransformer reads beside an export: its own built-in modules, hence no code of ours.

Backbone, the projection head as two `Dense` layers, `Normalize`. All of it follows from the projection head,
so that it is written, copied and pushed anew, and never read here.
"""

import json
from typing import Any

from safetensors.torch import save
from torch import Tensor

MODULES = "modules.json"  # which makes a folder one for SentenceTransformer
BACKBONE = "sentence_bert_config.json"
DENSE = ("1_Dense", "2_Dense")
ACTIVATIONS = ("torch.nn.modules.activation.ReLU", "torch.nn.modules.linear.Identity")
LAYER = ("config.json", "model.safetensors")  # in the folder of each
NAMES = (BACKBONE, *(f"{name}/{file}" for name in DENSE for file in LAYER), MODULES)


def module_files(head: dict[str, Tensor] | None) -> dict[str, bytes]:
    """Path in the folder -> content, in the order of NAMES.

    `head`: the weights of the projection, where there is one. Raises KeyError for something else.
    """
    modules, files = [("", "Transformer")], {BACKBONE: _json(_backbone())}
    for name, activation, layer in zip(DENSE, ACTIVATIONS, folded(head), strict=True) if head else ():
        modules.append((name, "Dense"))
        config, weights = LAYER
        outputs, inputs = layer["linear.weight"].shape
        shape = {"in_features": inputs, "out_features": outputs, "bias": True}
        files[f"{name}/{config}"] = _json(shape | {"activation_function": activation})
        files[f"{name}/{weights}"] = save(layer, {"format": "pt"})
    modules.append((f"{len(modules)}_Normalize", "Normalize"))
    return files | {MODULES: _json([_module(k, *module) for k, module in enumerate(modules)])}


def folded(head: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The two layers of a projection head, as `Dense` names weights, in float32, BatchNorm in the first.

    In eval mode BatchNorm is a x + b with a = weight / sqrt(variance + 1e-5) and b = bias - a mean.
    """
    x = {name: tensor.double() for name, tensor in head.items()}
    weight, last = x["0.weight"], "3" if "3.weight" in x else "2"
    if "1.weight" in x:
        scale = x["1.weight"] / (x["1.running_var"] + 1e-5).sqrt()
        weight, bias = scale[:, None] * weight, x["1.bias"] - scale * x["1.running_mean"]
    else:
        bias = x["0.bias"]
    layers = [(weight, bias), (x[f"{last}.weight"], x[f"{last}.bias"])]
    return [{"linear.weight": w.float().contiguous(), "linear.bias": b.float()} for w, b in layers]


def _backbone() -> dict[str, Any]:
    """Images in, pooled features out."""
    image = {"method": "forward", "method_output_name": "pooler_output"}
    return {
        "transformer_task": "feature-extraction",
        "modality_config": {"image": image},
        "module_output_name": "sentence_embedding",
    }


def _module(number: int, path: str, name: str) -> dict[str, Any]:
    return {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
