"""Packed networks on disk: a safetensors file whose metadata says what each layer is (docs/formats.md).

A file is read, checked against its digest and against the architecture, and only then turned into a network; the model
that `load` is given is never changed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .convert import swap
from .folding import BATCH_NORMS
from .nn import PackedConv2d, PackedLayer, PackedLinear, QConv2d, QLinear, QuantizedLayer, SwitchableBatchNorm2d
from .nn.coding import Coding, Epilogue, Geometry, Widths, pad_sides
from .nn.packed import WORD, check_tensor, grid_columns, plane_count
from .ops import Kind
from .quantizers import Fixed
from .quantizers.base import check_widths

FORMAT = "quantkernels"
# Written are the first version that can say it: 1 for one precision, 2 where there are several bit-widths, 3 where a
# basis is learned.
FORMAT_VERSIONS = (1, 2, 3)
NORM = "switchable_batch_norm2d"
KINDS = {"uniform": Kind.UNIFORM, "binary": Kind.BINARY, "ternary": Kind.TERNARY, "learned": Kind.LEARNED}
KIND_NAMES = {int(kind): name for name, kind in KINDS.items()}


class CheckpointError(RuntimeError):
    """A packed file cannot be used; the message says which file, why, and what to do."""


class CorruptCheckpointError(CheckpointError):
    """The file is damaged, cut short, or not a packed network at all."""


class CheckpointVersionError(CheckpointError):
    """The file has a format version that this library does not read."""


class CheckpointArchitectureError(CheckpointError):
    """The file holds another network than the model it is loaded for."""


# --- save ---


def save(packed: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a packed network (what `convert` returns) to one safetensors file.

    The file holds the planes and grids of the packed layers, and every other parameter and buffer as it is. It replaces
    what was at `path` in one step, so that a reader never sees half a file.
    Raises ValueError where the model has no packed layer or still has one that is not packed.
    """
    layers = describe(packed)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in packed.state_dict().items()}
    text = canonical(layers)
    metadata = {
        "format": FORMAT,
        "format_version": str(version_of(layers)),
        "layers": text,
        "sha256": digest(text, tensors),
    }
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def describe(packed: nn.Module) -> dict[str, Any]:
    """The `layers` entry of the metadata: one record a layer that is not as the float architecture has it."""
    layers: dict[str, Any] = {}
    for name, module in packed.named_modules():
        if isinstance(module, SwitchableBatchNorm2d):
            layers[name] = {"type": NORM, "features": module.num_features, "bit_widths": module.widths}
        elif isinstance(module, PackedLayer):
            layers[name] = describe_packed(module)
        elif isinstance(module, QuantizedLayer):
            if module.weight_quantizer is not None or not isinstance(module.activation_quantizer, Fixed):
                raise ValueError(f"save: layer {name!r} is not packed; call convert() first")
            fixed = module.activation_quantizer
            layers[name] = {
                **describe_shape(module),
                "weight": None,
                "activation": describe_coding(fixed.kind, fixed.levels, fixed.widths),
                "folded": None,
            }
    if all(record["type"] == NORM for record in layers.values()):
        raise ValueError(f"save: {type(packed).__name__} has no packed layers; call convert() first")
    return layers


def version_of(layers: Mapping[str, Any]) -> int:
    """The first format version that can say these records."""
    if any(
        coding and coding["kind"] == "learned"
        for r in layers.values()
        for coding in (r.get("weight"), r.get("activation"))
    ):
        return 3
    return 2 if has_widths(layers) else 1


def describe_packed(layer: PackedLayer) -> dict[str, Any]:
    """The record of a packed layer."""
    widths = layer.widths or Widths([], None)
    activation = None
    if layer.activation is not None:
        activation = describe_coding(layer.activation_kind, layer.activation_levels, widths.activation)
    return {
        **describe_shape(layer),
        "weight": describe_coding(layer.weight_kind, layer.weight_levels, widths.weight),
        "activation": activation,
        "folded": layer.folded,
    }


def describe_coding(kind: int, levels: int, widths: Sequence[int] | None) -> dict[str, Any]:
    """Kind by name, planes of a code, highest code; all bit-widths, the highest first, where there are several.

    bits and levels are those of the highest."""
    if widths:
        return {"kind": KIND_NAMES[int(kind)], "bits": widths[0], "levels": 2 ** widths[0] - 1, "bit_widths": widths}
    return {"kind": KIND_NAMES[int(kind)], "bits": plane_count(kind, levels), "levels": int(levels)}


def has_widths(layers: Mapping[str, Any]) -> bool:
    """Whether some record has several bit-widths."""
    codings = [record.get(role) for record in layers.values() for role in ("weight", "activation")]
    return any("bit_widths" in (entry or ()) for entry in (*layers.values(), *codings))


def describe_shape(layer: nn.Module) -> dict[str, Any]:
    """Type, weight shape and geometry of a float, quantized or packed layer."""
    if isinstance(layer, (nn.Linear, PackedLinear)):
        return {"type": "linear", "shape": [layer.out_features, layer.in_features]}
    geometry = geometry_of(layer)
    return {
        "type": "conv2d",
        "shape": list(geometry.weight_shape),
        "stride": list(geometry.stride),
        "padding": list(geometry.padding),
        "dilation": list(geometry.dilation),
        "groups": geometry.groups,
        "padding_mode": geometry.padding_mode,
    }


def geometry_of(layer: nn.Module) -> Geometry:
    """The geometry of a float, quantized or packed convolution."""
    if isinstance(layer, (QConv2d, PackedConv2d)):
        return layer.geometry
    assert isinstance(layer, nn.Conv2d)
    height, width = layer.kernel_size
    return Geometry(
        layer.in_channels, layer.out_channels, (height, width), (layer.stride[0], layer.stride[1]),
        pad_sides(layer.padding, layer.kernel_size, layer.dilation), (layer.dilation[0], layer.dilation[1]),
        layer.groups, layer.padding_mode,
    )  # fmt: skip


def canonical(layers: Mapping[str, Any]) -> str:
    """JSON with one spelling, so that it can be digested."""
    return json.dumps(layers, sort_keys=True, separators=(",", ":"))


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the layer records and every tensor's name, dtype, shape and bytes."""
    state = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        state.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        state.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


# --- load ---


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """The packed network in a file, in eval mode on the model's device.

    model: the architecture, floating or prepared; it is copied and left as it is, its weights do not matter.

    Raises FileNotFoundError; CorruptCheckpointError for a file that is cut short, damaged or something else;
    CheckpointVersionError for one of another format version; CheckpointArchitectureError where it does not fit the
    model, naming the layers. All are CheckpointErrors, and nothing is built before everything is checked.
    """
    records, tensors = read(Path(path))
    norms = {name: record for name, record in records.items() if record["type"] == NORM}
    layers = {name: record for name, record in records.items() if name not in norms}
    check_architecture(path, layers, norms, model)
    packed = copy.deepcopy(model)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    made: dict[int, nn.Module] = {}
    taken: set[str] = set()
    for name, record in layers.items():
        target = packed.get_submodule(name)
        made[id(target)], used = rebuild(path, name, record, target, tensors)
        taken |= used
        if record["folded"] is not None:
            made[id(packed.get_submodule(record["folded"]))] = nn.Identity()
    for name, record in norms.items():
        norm = packed.get_submodule(name)
        plain = norm.current if isinstance(norm, SwitchableBatchNorm2d) else norm
        made[id(norm)] = SwitchableBatchNorm2d.from_float(plain, record["bit_widths"])
    rest = {name: value for name, value in tensors.items() if name not in taken}
    packed = swap(packed, made)
    load_rest(path, packed, rest, taken)
    return packed.to(device).eval()


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Layer records and tensors of a file, checked against its version, its digest and the rules for records."""
    if not path.is_file():
        raise FileNotFoundError(f"load: no file at {path}")
    damaged = "the file is damaged or was cut short: copy it again, or save the network again"
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            version = check_version(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except CheckpointError:
        raise
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CorruptCheckpointError(f"load: {path}: {damaged} ({error})") from error
    text = metadata.get("layers", "")
    if metadata.get("sha256") != digest(text, tensors):
        raise CorruptCheckpointError(f"load: {path}: {damaged} (its contents do not match its digest)")
    try:
        layers = json.loads(text)
        check_records(layers, version)
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptCheckpointError(
            f"load: {path}: a layer record is not one this library understands ({error}); save the network again"
        ) from error
    return layers, tensors


def check_version(path: Path, metadata: Mapping[str, str]) -> int:
    """The version. Raises CorruptCheckpointError for a foreign file, CheckpointVersionError for an unknown version."""
    if metadata.get("format") != FORMAT:
        raise CorruptCheckpointError(
            f"load: {path}: a safetensors file, but not a packed network of {FORMAT} (its metadata has no "
            f'"format": "{FORMAT}"); write it with quantkernels.save'
        )
    version = metadata.get("format_version")
    for known in FORMAT_VERSIONS:
        if version == str(known):
            return known
    known_versions = " to ".join(map(str, (FORMAT_VERSIONS[0], FORMAT_VERSIONS[-1])))
    raise CheckpointVersionError(
        f"load: {path}: format version {version}, this library reads versions {known_versions}: use the library "
        "that wrote it, or save the network again with this one"
    )


RECORD_KEYS = {"type", "shape", "weight", "activation", "folded"}
CONV_KEYS = {"stride", "padding", "dilation", "groups", "padding_mode"}


def check_records(layers: Any, version: int) -> None:
    """Raises ValueError or TypeError for anything that `describe` would not have written in that version."""
    if not isinstance(layers, dict) or not layers:
        raise ValueError("layers must be a JSON object with at least one entry")
    for name, record in layers.items():
        if not isinstance(record, dict):
            raise TypeError(f"layer {name!r} must be an object, got {record!r}")
        if record.get("type") == NORM and version > 1:
            check_norm(name, record)
            continue
        conv = record.get("type") == "conv2d"
        if not conv and record.get("type") != "linear":
            raise ValueError(f"layer {name!r}: type must be conv2d or linear, got {record.get('type')!r}")
        if set(record) != (RECORD_KEYS | CONV_KEYS if conv else RECORD_KEYS):
            raise ValueError(f"layer {name!r} must have the keys of a {record['type']}, got {sorted(record)}")
        for role in ("weight", "activation"):
            if record[role] is not None:
                check_coding(f"layer {name!r}, {role}", record[role], version)
        if record["weight"] is None and record["activation"] is None:
            raise ValueError(f"layer {name!r} is quantized in neither operand")
        if not isinstance(record["folded"], (str, type(None))) or (record["folded"] and not conv):
            raise ValueError(f"layer {name!r}: folded must be the name of a batch-norm, got {record['folded']!r}")


def check_norm(name: str, record: Mapping[str, Any]) -> None:
    """Raises ValueError unless the record is one of a switchable batch-norm."""
    if set(record) != {"type", "features", "bit_widths"} or not isinstance(record["features"], int):
        raise ValueError(f"layer {name!r} must have type, features and bit_widths, got {dict(record)!r}")
    check_sorted(f"layer {name!r}", record["bit_widths"])


def check_coding(what: str, record: Any, version: int) -> None:
    """Raises ValueError unless kind, bits and levels, and from version 2 on bit_widths, are known and agree; bases are
    learned from version 3 on."""
    keys = set(record) if isinstance(record, dict) else set()
    several = version > 1 and "bit_widths" in keys
    if keys != {"kind", "bits", "levels"} | ({"bit_widths"} if several else set()):
        raise ValueError(f"{what} must have kind, bits and levels, got {record!r}")
    known = [kind for kind in KINDS if kind != "learned" or version > 2]
    if record["kind"] not in known or not isinstance(record["levels"], int):
        raise ValueError(f"{what}: kind must be one of {', '.join(known)} and levels an int, got {record!r}")
    if plane_count(KINDS[record["kind"]], record["levels"]) != record["bits"]:
        raise ValueError(f"{what}: bits and levels do not agree: {record!r}")
    if several:
        check_sorted(what, record["bit_widths"])
        if record["kind"] != "uniform" or record["bit_widths"][0] != record["bits"]:
            raise ValueError(f"{what}: several bit-widths need uniform codes, bits being the highest: {record!r}")


def check_sorted(what: str, widths: Any) -> None:
    """Raises ValueError unless these are bit-widths from the highest to the lowest."""
    if check_widths(what, widths) != widths:
        raise ValueError(f"{what}: bit_widths must fall, got {widths!r}")


def check_architecture(path: Any, layers: Mapping[str, Any], norms: Mapping[str, Any], model: nn.Module) -> None:
    """Raises CheckpointArchitectureError listing every layer of the file that the model does not have as it is
    there."""
    modules = dict(model.named_modules(remove_duplicate=False))
    problems = []
    for name, record in layers.items():
        module = modules.get(name)
        if type(module) not in (nn.Conv2d, nn.Linear, QConv2d, QLinear):
            has = "no such module" if module is None else f"a {type(module).__name__}"
            problems.append(f"{name!r} is a {record['type']} in the file, the model has {has}")
            continue
        assert module is not None
        mine = describe_shape(module)
        theirs = {key: record.get(key) for key in mine}
        if mine != theirs or record["type"] != mine["type"]:
            differing = [k for k in mine if mine[k] != theirs[k]]
            told = ", ".join(f"{k} {theirs[k]} (model: {mine[k]})" for k in differing)
            problems.append(f"{name!r} differs: {told}")
        norm = modules.get(record["folded"]) if record["folded"] is not None else None
        if record["folded"] is not None and not isinstance(norm, (*BATCH_NORMS, SwitchableBatchNorm2d)):
            problems.append(f"{name!r} has a batch-norm {record['folded']!r} folded in, which the model does not have")
    for name, record in norms.items():
        norm = modules.get(name)
        if not isinstance(norm, (*BATCH_NORMS, SwitchableBatchNorm2d)) or norm.num_features != record["features"]:
            has = "no such module" if norm is None else f"{norm}"
            problems.append(
                f"{name!r} is a batch-norm of {record['features']} channels in the file, the model has {has}"
            )
    quantized = [n for n, m in modules.items() if isinstance(m, QuantizedLayer) and n not in layers]
    problems += [f"{name!r} is quantized in the model and floating in the file" for name in quantized]
    complain(path, problems)


def complain(path: Any, problems: list[str]) -> None:
    """Raises CheckpointArchitectureError if there are problems."""
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointArchitectureError(
            f"load: {path} holds another network than this {len(problems)} times: {shown}. Pass the architecture that "
            "was converted and saved"
        )


def rebuild(
    path: Any, name: str, record: Mapping[str, Any], target: nn.Module, tensors: Mapping[str, Tensor]
) -> tuple[nn.Module, set[str]]:
    """The layer that a record and its tensors stand for, and the names of those tensors."""
    prefix = f"{name}." if name else ""
    own = {key: f"{prefix}{key}" for key in ("planes", "weight_grid", "activation_grid", "bias", "scale", "shift")}
    try:
        if record["weight"] is None:
            return rebuild_float(record, target, tensors, f"{prefix}activation_quantizer.constant")
        values = {key: tensors[full] for key, full in own.items() if full in tensors}
        check_parts(record, values, target)
        weight = Coding(values["weight_grid"], KINDS[record["weight"]["kind"]], record["weight"]["levels"])
        activation = None
        if record["activation"] is not None:
            entry = record["activation"]
            activation = Coding(values["activation_grid"], KINDS[entry["kind"]], entry["levels"])
        epilogue = Epilogue(values.get("bias"), values.get("scale"), values.get("shift"))
        widths = widths_of(record)
        layer: PackedLayer
        if record["type"] == "conv2d":
            layer = PackedConv2d(geometry_of(target), values["planes"], weight, activation, epilogue, widths)
        else:
            assert isinstance(target, nn.Linear)
            layer = PackedLinear(target.in_features, values["planes"], weight, activation, epilogue, widths)
        if list(layer.weight_shape) != record["shape"]:
            raise ValueError(f"planes of {list(layer.weight_shape)} weights, the record says {record['shape']}")
        check_padding_bits(layer)
    except (KeyError, ValueError) as error:
        raise CorruptCheckpointError(
            f"load: {path}: layer {name!r} is not consistent ({error}); save the network again"
        ) from error
    layer.folded = record["folded"]
    return layer, {own[key] for key in values}


def widths_of(record: Mapping[str, Any]) -> Widths | None:
    """The bit-widths of a layer's record. Raises ValueError where one operand has several and the other one."""
    activation = record["activation"] or {}
    if "bit_widths" not in record["weight"] and "bit_widths" not in activation:
        return None
    if "bit_widths" not in record["weight"] or (activation and "bit_widths" not in activation):
        raise ValueError("weight and activation must both have bit_widths, or neither")
    return Widths(record["weight"]["bit_widths"], activation.get("bit_widths"))


def check_parts(record: Mapping[str, Any], values: Mapping[str, Tensor], target: nn.Module) -> None:
    """Raises ValueError unless the tensors of a layer are those its record speaks of."""
    wanted = {"planes", "weight_grid"}
    if record["activation"] is not None:
        wanted.add("activation_grid")
    if record["folded"] is not None:
        wanted |= {"scale", "shift"}
    if getattr(target, "bias", None) is not None:
        wanted.add("bias")
    if set(values) != wanted:
        raise ValueError(f"its tensors must be {sorted(wanted)}, got {sorted(values)}")


def rebuild_float(
    record: Mapping[str, Any], target: nn.Module, tensors: Mapping[str, Tensor], key: str
) -> tuple[nn.Module, set[str]]:
    """A layer with a float weight and a fixed activation grid; weight and bias are loaded with the rest."""
    entry, grid = record["activation"], tensors[key]
    kind, widths = KINDS[entry["kind"]], entry.get("bit_widths")
    several = () if widths is None else (len(widths),)
    check_tensor("activation grid", grid, torch.float32, (*several, 1, grid_columns(kind, entry["levels"])))
    fixed = Fixed(grid, kind, entry["levels"], None, widths)
    if isinstance(target, nn.Conv2d):
        return QConv2d.from_float(target, None, fixed), set()
    assert isinstance(target, nn.Linear)
    return QLinear.from_float(target, None, fixed), set()


def check_padding_bits(layer: PackedLayer) -> None:
    """Raises ValueError unless the unused bits of each row's last word are 0 and ternary planes are a thermometer.

    The integer kernels count bits in whole words, so a stray one would be counted with the rest.
    """
    row_length = torch.Size(layer.weight_shape[1:]).numel()
    used = row_length % WORD
    if used and layer.planes.numel():
        unused_mask = ~((1 << used) - 1) & 0xFFFFFFFF
        last = layer.planes[..., -1].long()
        if bool((last & unused_mask).any()):
            raise ValueError("planes: the unused bits of the last word must be 0")
    if layer.weight_kind == Kind.TERNARY and bool((layer.planes[1] & ~layer.planes[0]).any()):
        raise ValueError("planes: a ternary code has its second plane set without the first")


def load_rest(path: Any, packed: nn.Module, rest: dict[str, Tensor], taken: set[str]) -> None:
    """Load what is not in packed layers, after checking every name and shape."""
    own = {name: value for name, value in packed.state_dict().items() if name not in taken}
    problems = [f"{name!r} is in the model and not in the file" for name in own if name not in rest]
    problems += [f"{name!r} is in the file and not in the model" for name in rest if name not in own]
    problems += [
        f"{name!r} has shape {list(rest[name].shape)} in the file, {list(value.shape)} in the model"
        for name, value in own.items()
        if name in rest and rest[name].shape != value.shape
    ]
    complain(path, problems)
    packed.load_state_dict(rest, strict=False)
