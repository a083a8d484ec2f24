"""From a float network to a quantized one (`prepare`), to another precision (`set_bits`), to a packed one
(`convert`)."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from .folding import BATCH_NORMS, FoldPlan, batch_norm_scale_shift, plan_folds
from .nn import PackedConv2d, PackedLayer, PackedLinear, QConv2d, QLinear, QuantizedLayer, SwitchableBatchNorm2d
from .nn.packed import activation_at
from .quantizers import Fixed, Mixture, Quantizer
from .quantizers.base import check_widths

Skip = Callable[[Mapping[str, nn.Module]], Iterable[str]] | Sequence[str] | None
Override = Mapping[str, Any] | None
ROLES = ("weight", "activation")

# Modules that read the parameters of their children themselves: a child swapped there would be ignored, or
# break them.
OPAQUE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.RNNBase, nn.RNNCellBase)
# Modules whose parameters are not weights of a product.
NORMALISATION = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


class UnsupportedModuleError(ValueError):
    """`prepare(strict=True)` met modules whose weights it cannot quantize."""


def first_and_last(layers: Mapping[str, nn.Module]) -> set[str]:
    """For `prepare(skip=...)`: the names of the first and the last nn.Conv2d or nn.Linear, in order of
    registration."""
    names = list(layers)
    return {names[0], names[-1]} if names else set()


def unknown_name(what: str, name: str, known: Iterable[str]) -> ValueError:
    """An error for a name or pattern that matches nothing, with the nearest names that exist."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
    return ValueError(f"{what}: {name!r} matches no layer; the nearest are {', '.join(map(repr, near)) or 'none'}")


def matching(what: str, pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a glob pattern matches. Raises ValueError if there is none."""
    found = fnmatch.filter(names, pattern)
    if not found:
        raise unknown_name(what, pattern, names)
    return found


def prepare(
    model: nn.Module,
    weight: Quantizer | None = None,
    activation: Quantizer | None = None,
    skip: Skip = None,
    overrides: Mapping[str, Override] | None = None,
    *,
    exact: bool = False,
    strict: bool = False,
) -> nn.Module:
    """Swap every nn.Conv2d and nn.Linear for QConv2d and QLinear, in place, keeping their Parameters;
    returns the model.

    weight, activation: templates, copied into each layer; None leaves that operand in floating point.
    skip: layers to leave alone: name patterns ("layer4.*"), or a function from {name: layer} to names
    (`first_and_last`). overrides: {name pattern: dict(weight=..., activation=..., exact=...) or None}. What
    a dict does not mention keeps its
        default, None leaves the layer alone, a later pattern wins over an earlier one.
    exact: the layers' `exact` (compute on codes in training too).

    A layer that appears in several places stays one layer. Layers that are quantized already stay as they
    are. The model itself may be the layer; use the return value.

    Modules with weights of other types (ConvTranspose2d, Conv1d, LSTM, MultiheadAttention, subclasses of
    nn.Conv2d, ...) stay in floating point: they are listed in a warning, or with strict=True in an
    UnsupportedModuleError before anything is changed. Raises ValueError for a pattern that matches nothing
    and where there is nothing to quantize.
    """
    layers, prepared, unsupported = survey(model)
    if not layers and not prepared:
        raise ValueError(f"prepare: {type(model).__name__} has no nn.Conv2d and no nn.Linear to quantize")
    names = [*layers, *prepared]
    skipped = skipped_names(skip, layers, [*names, *unsupported])
    settings = layer_settings(names, weight, activation, exact, overrides or {})
    report_unsupported({n: m for n, m in unsupported.items() if not is_skipped(n, skip)}, strict)
    made: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        setting = settings[name]
        if name in skipped or setting is None or (setting["weight"] is None and setting["activation"] is None):
            continue
        build = QConv2d.from_float if isinstance(layer, nn.Conv2d) else QLinear.from_float
        made[id(layer)] = build(layer, **setting)  # type: ignore[arg-type]
    return swap(model, made)


def survey(
    model: nn.Module,
) -> tuple[dict[str, nn.Module], dict[str, nn.Module], dict[str, nn.Module]]:
    """What is in a model, each by its first name: layers to quantize, quantized or packed layers, and
    unsupported modules."""
    layers: dict[str, nn.Module] = {}
    prepared: dict[str, nn.Module] = {}
    unsupported: dict[str, nn.Module] = {}
    closed: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in closed):
            continue
        if isinstance(module, OPAQUE):
            unsupported[name] = module
        elif isinstance(module, (QuantizedLayer, PackedLayer)):
            prepared[name] = module
        elif type(module) in (nn.Conv2d, nn.Linear):
            layers[name] = module
        elif not isinstance(module, (Quantizer, *NORMALISATION)):
            if has_weights(module):
                unsupported[name] = module
            continue
        closed.append(name + "." if name else "")
    return layers, prepared, unsupported


def has_weights(module: nn.Module) -> bool:
    """Whether the module itself, not its children, owns a parameter of two or more dimensions."""
    own = list(module.parameters(recurse=False))
    return any(isinstance(p, UninitializedParameter) or p.dim() >= 2 for p in own)


def skipped_names(skip: Skip, layers: Mapping[str, nn.Module], names: Sequence[str]) -> set[str]:
    """The names that `skip` means. Raises ValueError for one that does not exist."""
    if skip is None:
        return set()
    if callable(skip):
        chosen = set(skip(layers))
        for name in chosen - set(names):
            raise unknown_name("prepare: skip", name, names)
        return chosen
    if isinstance(skip, str):
        raise TypeError(f"prepare: skip must be a list of patterns or a function, got the string {skip!r}")
    return {name for pattern in skip for name in matching("prepare: skip", pattern, names)}


def is_skipped(name: str, skip: Skip) -> bool:
    """Whether a pattern in `skip` covers a module that is not a layer."""
    return skip is not None and not callable(skip) and any(fnmatch.fnmatch(name, pattern) for pattern in skip)


def layer_settings(
    names: Sequence[str],
    weight: Quantizer | None,
    activation: Quantizer | None,
    exact: bool,
    overrides: Mapping[str, Override],
) -> dict[str, dict[str, Any] | None]:
    """The arguments of each layer, None for one that stays as it is."""
    default = {"weight": weight, "activation": activation, "exact": exact}
    settings: dict[str, dict[str, Any] | None] = dict.fromkeys(names, default)
    for pattern, override in overrides.items():
        for key in override or {}:
            if key not in default:
                raise ValueError(f"prepare: overrides[{pattern!r}] has {key!r}; it can have {', '.join(default)}")
        for name in matching("prepare: overrides", pattern, names):
            settings[name] = None if override is None else {**(settings[name] or default), **override}
    return settings


def report_unsupported(modules: Mapping[str, nn.Module], strict: bool) -> None:
    """Warn of, or refuse, modules that stay in floating point."""
    if not modules:
        return
    listed = ", ".join(f"{name or 'the model itself'} ({type(m).__name__})" for name, m in modules.items())
    text = f"prepare: these modules have weights and cannot be quantized: {listed}"
    if strict:
        raise UnsupportedModuleError(text + "; name them in skip= to accept that they stay in floating point")
    warnings.warn(text + "; they stay in floating point", stacklevel=3)


def swap(model: nn.Module, made: Mapping[int, nn.Module]) -> nn.Module:
    """Put made[id(module)] wherever that module is in the model, in place; returns the model, or what
    replaces it."""
    if id(model) in made:
        return made[id(model)]
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and id(child) in made:
                parent._modules[key] = made[id(child)]
    return model


def convert(model: nn.Module, fold: bool = True, bit_widths: Sequence[int] | None = None) -> nn.Module:
    """A packed copy of a prepared and trained model, in eval mode; the model itself is left as it is.

    Each quantized layer becomes a PackedConv2d or PackedLinear (one without weight quantizer keeps its float
    weight and a fixed activation grid). With fold=False its logits are bit-identical to those of
    `model.eval()`.

    fold: let a batch-norm that directly follows a convolution, and nothing else uses that output, become the
    convolution's float32 scale and shift. What follows what is read from a torch.fx trace of the model, or
    where that cannot be traced of its children; batch-norms that are not proven to follow stay.

    bit_widths: of an adaptive network all bit-widths that the packed one shall have, between which `set_bits` switches
    it: planes are there once, grids and switchable batch-norms (or what they fold into) for each. It needs weights
    whose codes are nested (`ModifiedDoReFa`, `CentredDoReFa`). None: the precision that the network has now, with the
    batch-norms in use.

    Raises RuntimeError, naming all layers, where a mixture has not been selected or statistics are missing;
    ValueError where there is nothing to convert, or a layer does not have one of the bit-widths.
    """
    layers = quantized_layers(model, "convert")
    check_ready(layers)
    if bit_widths is not None:
        bit_widths = check_widths("convert", bit_widths)
        for bits in bit_widths:
            check_changes(bits_changes(model, bits, layers))
    packed = copy.deepcopy(model).eval()
    packed = reduce_norms(packed, bit_widths)
    layers = quantized_layers(packed, "convert")
    plan = plan_folds(packed) if fold else FoldPlan()
    goes_with = {id(norm): layer for layer, norm in switchable_norms(packed)}
    made: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        made[id(layer)] = pack_layer(layer, bit_widths)
        norm_name = plan.get(name)
        if norm_name is None:
            continue
        norm = packed.get_submodule(norm_name)
        if goes_with.get(id(norm), name) != name:
            continue  # a policy would switch it with another layer
        replacement = made[id(layer)]
        assert isinstance(replacement, PackedLayer)
        replacement.fold(*batch_norm_scale_shift(norm))
        replacement.folded = norm_name
        made[id(norm)] = nn.Identity()
    packed = swap(packed, made).eval()
    return packed if bit_widths is None else set_bits(packed, bit_widths[0])


def reduce_norms(model: nn.Module, bit_widths: Sequence[int] | None) -> nn.Module:
    """Leave of each switchable batch-norm what those bit-widths need, for None the plain one in use; in place."""
    made: dict[int, nn.Module] = {}
    for _, norm in switchable_norms(model):
        made[id(norm)] = norm.current if bit_widths is None else norm.only(bit_widths)
    return swap(model, made)


def quantized_layers(model: nn.Module, what: str, packed: bool = False) -> dict[str, Any]:
    """Quantized layers by name, with `packed` packed ones too. Raises ValueError if there are none."""
    kinds = (QuantizedLayer, PackedLayer) if packed else QuantizedLayer
    layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    if not layers:
        raise ValueError(f"{what}: {type(model).__name__} has no quantized layers; call prepare() first")
    return layers


def check_ready(layers: Mapping[str, QuantizedLayer]) -> None:
    """Raises RuntimeError naming every layer that has no codes yet, and why."""
    mixtures, uncalibrated = [], []
    for name, layer in layers.items():
        for role in ("weight_quantizer", "activation_quantizer"):
            quantizer = getattr(layer, role)
            if isinstance(quantizer, Mixture) and quantizer.current is None:
                mixtures.append(f"{name}.{role}" if name else role)
                continue
            current = quantizer.current if isinstance(quantizer, Mixture) else quantizer
            if current is not None and current.tracking and not current.calibrated:
                uncalibrated.append(f"{name}.{role}" if name else role)
    if mixtures:
        raise RuntimeError(f"convert: call select() first on the mixtures {', '.join(mixtures)}")
    if uncalibrated:
        raise RuntimeError(
            "convert: run a forward in training mode first; these have no activation statistics yet: "
            + ", ".join(uncalibrated)
        )


@torch.no_grad()
def pack_layer(layer: QuantizedLayer, bit_widths: Sequence[int] | None = None) -> nn.Module:
    """The packed form of one layer, or the layer itself with a fixed activation grid where its weight stays
    floating."""
    if layer.weight_quantizer is None:
        layer.eval()
        if layer.activation_quantizer is not None:
            layer.activation_quantizer = Fixed(*activation_at(layer, bit_widths), None, bit_widths).eval()
        return layer
    pack = PackedConv2d.pack if isinstance(layer, QConv2d) else PackedLinear.pack
    return pack(layer, bit_widths)  # type: ignore[arg-type]


def switch_batch_norms(model: nn.Module, widths: Sequence[int]) -> nn.Module:
    """Give every nn.BatchNorm2d and nn.SyncBatchNorm of a model a copy for each bit-width, in place; returns the model.

    widths: different bit-widths from 1 to 8. `set_bits` then switches them together with the quantizers. Call it
    before the optimizer is made. Raises ValueError for an empty or wrong set.
    """
    check_widths("switch_batch_norms", widths)
    switched = [m for m in model.modules() if isinstance(m, SwitchableBatchNorm2d)]
    inside = {id(norm) for module in switched for norm in module.norms.values()}
    norms = [m for m in model.modules() if type(m) in BATCH_NORMS and id(m) not in inside]
    return swap(model, {id(norm): SwitchableBatchNorm2d.from_float(norm, widths) for norm in norms})


Policy = Mapping[str, tuple[int | None, int | None]]


class Change(NamedTuple):
    """One part of a network and the bits that it shall have."""

    check: Callable[[int], None]
    apply: Callable[[int], None]
    bits: int


def set_bits(model: nn.Module, bits: int | Policy) -> nn.Module:
    """Change the precision of a prepared or packed model, in place; returns the model.

    bits: an int for all weights, activations and switchable batch-norms, or {layer name: (weight bits, activation
    bits)}, None for one that stays; layers not named stay. A batch-norm goes with the weight of the last convolution
    or linear layer that is registered before it. A uniform quantizer keeps its range and changes its levels, one with
    something for each bit-width (PACT's and LSQ's per_bit) takes that; a mixture selects its member of that many bits.
    Raises ValueError, before anything is changed, for a name that does not exist or bits that a quantizer, a packed
    layer or a batch-norm cannot have.
    """
    changes = bits_changes(model, bits, quantized_layers(model, "set_bits", packed=True))
    check_changes(changes)
    with torch.no_grad():
        for change in changes:
            change.apply(change.bits)
    return model


def bits_changes(model: nn.Module, bits: int | Policy, layers: Mapping[str, nn.Module]) -> list[Change]:
    """What `set_bits` has to do. Raises ValueError for a name that does not exist or a pair that is none."""
    policy: Policy = dict.fromkeys(layers, (bits, bits)) if isinstance(bits, int) else bits
    changes = []
    for name, pair in policy.items():
        if name not in layers:
            raise unknown_name("set_bits", name, layers)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"set_bits: {name!r} needs (weight bits, activation bits), got {pair!r}")
        changes += [part for role, n in zip(ROLES, pair, strict=True) for part in layer_change(layers[name], role, n)]
    for layer_name, norm in switchable_norms(model):
        n = bits if isinstance(bits, int) else policy.get(layer_name, (None, None))[0]
        if n is not None:
            changes.append(Change(norm.check_bits, norm.set_bits, n))
    return changes


def layer_change(layer: nn.Module, role: str, bits: int | None) -> list[Change]:
    """The change of one operand of a layer; nothing where it floats or stays."""
    if bits is None:
        return []
    if isinstance(layer, PackedLayer):
        return [Change(functools.partial(layer.check_bits, role), functools.partial(layer.set_bits, role), bits)]
    quantizer = getattr(layer, f"{role}_quantizer")
    return [] if quantizer is None else [Change(quantizer.check_bits, quantizer.set_bits, bits)]


def check_changes(changes: Iterable[Change]) -> None:
    """Raises ValueError for the first that is impossible."""
    for change in changes:
        change.check(change.bits)


def switchable_norms(model: nn.Module) -> list[tuple[str, SwitchableBatchNorm2d]]:
    """Every switchable batch-norm, with the name of the convolution or linear layer registered last before it."""
    found = []
    layer = ""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, PackedLayer)):
            layer = name
        elif isinstance(module, SwitchableBatchNorm2d):
            found.append((layer, module))
    return found


def copy_bits(model: nn.Module, source: int, target: int) -> nn.Module:
    """Give `target` bits what the model has for `source` bits alone, in place: batch-norms, clipping levels, steps.

    How a bit-width that was not trained begins; `quantkernels.nn.calibrate_batch_norm` then gives it statistics of its
    own. The current precision stays. Returns the model. Raises ValueError, before anything is changed, where one of
    the two has no place of its own.
    """
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer) and getattr(m, "per_bit", None)]
    parts: list[Any] = [*quantizers, *(norm for _, norm in switchable_norms(model))]
    if not parts:
        raise ValueError(f"copy_bits: {type(model).__name__} has nothing that differs between bit-widths")
    for part in parts:
        part.check_bits(source)
        part.check_bits(target)
    for part in parts:
        part.copy_bits(source, target)
    return model
