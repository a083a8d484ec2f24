"""Makes the inputs of each job, and what is timed on them: the library's own way first, then its rivals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import quantkernels as qk
from benchmarks import int8, plain
from benchmarks.compare import OURS
from quantkernels.ops import Encoding, Kind, Ste

Run = Callable[[], Any]
Contestants = dict[str, Run]

EAGER, COMPILE, COPY, SUM = "eager", "torch.compile", "copy_", "torch.sum"
FAKE_QUANTIZE, INT8, INT_MM, FP32 = "torch.fake_quantize", "torch int8", "torch._int_mm", "torch fp32"
FP32_COMPILED, OURS_COMPILED, PLANES = "torch fp32 compiled", "the same compiled", "the same not prepacked"
PER_TENSOR, AS_FLOAT32 = "per tensor", "as float32"

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LOW, HIGH = -3.0, 3.0  # the range that normal values are quantized on where nobody asks for their own


def values(shape: Sequence[int], dtype: str = "float32") -> Tensor:
    """Normal random values, the same at each call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])


def random_codes(shape: Sequence[int], bits: int, device: str = "cpu", seed: int = 1) -> Tensor:
    """uint8 codes of ``bits`` bits, the same at each call with a seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(2**bits, tuple(shape), generator=generator, device=device, dtype=torch.uint8)


def copy_of(x: Tensor) -> Run:
    """A copy into a tensor that is there already: what moving the bytes costs."""
    source, target = x.detach(), torch.empty_like(x)
    return lambda: target.copy_(source)


def step_of(function: Callable[[Tensor], Tensor], x: Tensor, *leaves: Tensor) -> Run:
    """A forward, and a backward to x and the leaves; nothing is accumulated."""
    grad = values(x.shape).to(x.dtype)
    inputs = (x, *leaves)
    return lambda: torch.autograd.grad(function(x), inputs, grad)


def element_wise(
    make: Callable[[Tensor, int | None], Run], shape: Sequence[int], dtype: str, axis: int | None
) -> Contestants:
    """The op as ``make(x, axis)`` runs it, a copy, and the op's own simpler forms: per tensor, in float32."""
    found = {OURS: make(values(shape, dtype), axis), COPY: copy_of(values(shape, dtype))}
    if axis is not None:
        found[PER_TENSOR] = make(values(shape, dtype), None)
    if dtype != "float32":
        found[AS_FLOAT32] = make(values(shape), axis)
    return found


def with_plain(
    found: Contestants, function: Callable[[Tensor], Any], run_of: Callable[[Any], Run], compiles: bool
) -> Contestants:
    """Add the plain formulation, eager and, where asked for, compiled for this one shape."""
    found[EAGER] = run_of(function)
    if compiles:
        found[COMPILE] = run_of(torch.compile(function, dynamic=False))
    return found


def grid_over(x: Tensor, levels: int, axis: int | None) -> Tensor:
    """Uniform levels from LOW to HIGH, a row a channel: [C, 3]."""
    return torch.tensor([[LOW, (HIGH - LOW) / levels, 0.0]]).repeat(1 if axis is None else x.shape[axis], 1)


def channel_stats(
    shape: Sequence[int], dtype: str, axis: int | None, plainly: bool = False, compiles: bool = False
) -> Contestants:
    """channel_stats, and torch.sum, which reads as much."""
    x = values(shape, dtype)
    found = element_wise(lambda x, axis: lambda: qk.ops.channel_stats(x, axis), shape, dtype, axis)
    found[SUM] = lambda: torch.sum(x)
    return with_plain(found, plain.channel_stats, lambda f: lambda: f(x), compiles) if plainly else found


def fake_quantize(
    bits: int, shape: Sequence[int], dtype: str, axis: int | None, plainly: bool = False, compiles: bool = False
) -> Contestants:
    """Uniform fake quantization on a fixed grid, forward and backward."""
    levels = 2**bits - 1
    step = (HIGH - LOW) / levels

    def make(x: Tensor, axis: int | None) -> Run:
        grid = grid_over(x, levels, axis)
        function = lambda x: qk.ops.fake_quantize(x, grid, Kind.UNIFORM, levels, Ste.CLIP, axis)  # noqa: E731
        return step_of(function, x.requires_grad_())

    def torchs(x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, step, round(-LOW / step), 0, levels)

    found = element_wise(make, shape, dtype, axis)
    if not plainly:
        return found
    x = values(shape, dtype).requires_grad_()
    found[FAKE_QUANTIZE] = step_of(torchs, x)
    eager = lambda x: plain.fake_quantize(x, LOW, step, levels)  # noqa: E731
    return with_plain(found, eager, lambda f: step_of(f, x), compiles)


def learned_basis(
    bits: int, shape: Sequence[int], dtype: str, axis: int | None, plainly: bool = False, compiles: bool = False
) -> Contestants:
    """A learned basis with the statistics of QEM, forward and backward, as for an activation."""
    powers = 2.0 ** torch.arange(bits)[None] * (HIGH / 2**bits)

    def make(x: Tensor, axis: int | None) -> Run:
        basis = powers.repeat(1 if axis is None else x.shape[axis], 1)
        return step_of(
            lambda x: qk.ops.learned_basis_quantize(x, basis, Encoding.UNSIGNED, Ste.CLIP, axis)[0], x.requires_grad_()
        )

    found = element_wise(make, shape, dtype, axis)
    if not plainly:
        return found
    x = values(shape, dtype).requires_grad_()
    eager = lambda x: plain.learned_basis(x, powers[0])[0]  # noqa: E731
    return with_plain(found, eager, lambda f: step_of(f, x), compiles)


def attention(
    bits: Sequence[int],
    shape: Sequence[int],
    dtype: str,
    axis: int | None,
    plainly: bool = False,
    compiles: bool = False,
) -> Contestants:
    """The DQA mixture of min-max quantizers: statistics, forward, and backward to the tensor and the logits."""
    levels = [2**n - 1 for n in bits]

    def make(x: Tensor, axis: int | None) -> Run:
        quantizer = qk.Attention([qk.MinMax(n, axis) for n in bits])
        return step_of(quantizer, x.requires_grad_(), quantizer.logits)

    found = element_wise(make, shape, dtype, axis)
    if not plainly:
        return found
    x, logits = values(shape, dtype).requires_grad_(), torch.zeros(len(bits), requires_grad=True)
    eager = lambda x: plain.attention(x, logits, levels)  # noqa: E731
    return with_plain(found, eager, lambda f: step_of(f, x, logits), compiles)


def quantize_pack(bits: int, shape: Sequence[int], dtype: str, axis: int | None, plainly: bool = False) -> Contestants:
    """quantize_pack of rows on a fixed grid."""
    levels = 2**bits - 1
    x = values(shape, dtype)

    def make(x: Tensor, axis: int | None) -> Run:
        grid = grid_over(x, levels, axis)
        return lambda: qk.ops.quantize_pack(x, grid, Kind.UNIFORM, levels, axis)

    found = element_wise(make, shape, dtype, axis)
    if plainly:
        found[EAGER] = lambda: plain.quantize_pack(x, LOW, (HIGH - LOW) / levels, bits)
    return found


WEIGHT_RANGE = 0.02  # random weights lie between minus this and this


def packed_weight(
    rows: int, length: int, bits: int, device: str = "cpu", seed: int = 1
) -> tuple[Tensor, Tensor, int, int]:
    """planes, grid, kind and levels of a random weight with a grid a row; one bit is binary (BWN)."""
    kind, levels = (Kind.BINARY, 1) if bits == 1 else (Kind.UNIFORM, 2**bits - 1)
    planes = qk.ops.pack_bitplanes(random_codes((rows, length), bits, device, seed), kind, levels)
    grid = torch.tensor([[-WEIGHT_RANGE, 2 * WEIGHT_RANGE / levels, 0.0]], device=device)
    return planes, grid.repeat(rows, 1), kind, levels


def coding(bits: int) -> tuple[Tensor, int, int]:
    """grid [1, 3], kind and levels of an activation in steps of 0.05 from zero."""
    return torch.tensor([[0.0, 0.05, 0.0]]), Kind.UNIFORM, 2**bits - 1


def to_codes(bits: int) -> dict[str, Any]:
    """The arguments that make a layer give codes."""
    return dict(zip(("out_grid", "out_kind", "out_levels"), coding(bits), strict=True))


def linear(m: int, features: int, w_bits: int, a_bits: int) -> Contestants:
    """lowbit_linear, prepacked as int8 is and by its planes, torch's int8 linear layer and integer product, and a float
    one; weight [features, features]."""
    x, weight = random_codes((m, features), a_bits), packed_weight(features, features, w_bits)
    prepacked = qk.ops.prepack_weight(weight[0], *weight[2:], features)
    floats, float_weight = values((m, features)), values((features, features)) * 0.02
    quantized, rival = int8.activation(floats), int8.linear(float_weight)
    found: Contestants = {
        OURS: lambda: qk.ops.lowbit_linear(x, *coding(a_bits), *weight, **to_codes(a_bits), prepacked=prepacked),
        PLANES: lambda: qk.ops.lowbit_linear(x, *coding(a_bits), *weight, **to_codes(a_bits)),
        INT8: lambda: rival(quantized),
        FP32: lambda: functional.linear(floats, float_weight),
    }
    if (w_bits, a_bits) == (8, 8):
        signed, signed_weight = (random_codes(s, 7).to(torch.int8) for s in ((m, features), (features, features)))
        found[INT_MM] = lambda: torch._int_mm(signed, signed_weight.t())
    return found


def conv(x_shape: Sequence[int], outputs: int, kernel: int, stride: int, w_bits: int, a_bits: int) -> Contestants:
    """lowbit_conv2d, prepacked and by its planes, torch's int8 convolution and its float one, all channels_last."""
    last, padding, inputs = torch.channels_last, kernel // 2, x_shape[1]
    x = random_codes(x_shape, a_bits).contiguous(memory_format=last)
    weight = packed_weight(outputs, inputs * kernel**2, w_bits)
    prepacked = qk.ops.prepack_weight(weight[0], *weight[2:], inputs, kernel)
    geometry = ([kernel, kernel], [stride, stride], [padding] * 4, [1, 1], 1)
    floats = values(x_shape).contiguous(memory_format=last)
    float_weight = (values((outputs, inputs, kernel, kernel)) * 0.02).contiguous(memory_format=last)
    quantized, rival = int8.activation(floats), int8.conv2d(float_weight, stride, padding)
    return {
        OURS: lambda: qk.ops.lowbit_conv2d(
            x, *coding(a_bits), *weight, *geometry, **to_codes(a_bits), prepacked=prepacked
        ),
        PLANES: lambda: qk.ops.lowbit_conv2d(x, *coding(a_bits), *weight, *geometry, **to_codes(a_bits)),
        INT8: lambda: rival(quantized),
        FP32: lambda: functional.conv2d(floats, float_weight, None, stride, padding),
    }


def float_resnet(stem: str, width: float = 1.0) -> nn.Module:
    """ResNet-18 (``width`` times as wide) with the same random weights at each call."""
    from training.models.resnet import resnet18

    torch.manual_seed(0)
    return resnet18(10 if stem == "cifar" else 1000, 3, stem, width)


def dqa_resnet(bits: Sequence[int], width: float = 1.0) -> nn.Module:
    """ResNet-18 for small images with the library's DQA weights, all layers but the first and the last."""
    mixture = qk.Attention([qk.MinMax(n) for n in bits])
    return qk.prepare(float_resnet("cifar", width), weight=mixture, activation=None, skip=qk.first_and_last)


def plain_dqa_resnet(bits: Sequence[int], width: float = 1.0) -> nn.Module:
    """The same network by the plain formulation."""
    model = float_resnet("cifar", width)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and name != "conv1":
            weight = plain.AttentionWeight([2**n - 1 for n in bits])
            nn.utils.parametrize.register_parametrization(layer, "weight", weight)
    return model


def packed_resnet(w_bits: int, a_bits: int, width: float = 1.0) -> nn.Module:
    """ResNet-18 packed, in eval, all layers but the first and the last."""
    weight, activation = qk.MinMax(w_bits), qk.PACT(a_bits)
    model = float_resnet("imagenet", width)
    prepared = qk.prepare(model, weight=weight, activation=activation, skip=qk.first_and_last)
    return qk.convert(prepared.eval())


def training_step(bits: Sequence[int], shape: Sequence[int]) -> Contestants:
    """Forward, backward and SGD step of ResNet-18: with the library's DQA weights, float, and with plain DQA."""
    images, labels = values(shape), torch.arange(shape[0]) % 10

    def run_of(model: nn.Module) -> Run:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

        return step

    return {
        OURS: run_of(dqa_resnet(bits)),
        FP32: run_of(float_resnet("cifar")),
        EAGER: run_of(plain_dqa_resnet(bits)),
    }


def packed_for_images(model: nn.Module, w_bits: int, a_bits: int, image: Tensor) -> nn.Module:
    """The model packed, prepacked, in eval, integers between its layers; the first and the last layer have 8 bits, as
    in int8."""
    ends = {"weight": qk.MinMax(8, axis=0), "activation": qk.MinMax(8)}
    names = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    overrides = dict.fromkeys((names[0], names[-1]), ends)
    prepared = qk.prepare(model, weight=qk.MinMax(w_bits), activation=qk.PACT(a_bits), overrides=overrides).train()
    with torch.no_grad():
        prepared(torch.cat([image, image]))  # the ranges of the 8 bits; batch-norms want more than one value
    return qk.prepack(qk.pass_codes(qk.convert(prepared.eval())))


def packed_inference(network: str, w_bits: int, a_bits: int, shape: Sequence[int], compiles: bool) -> Contestants:
    """A network packed, and float with channels_last, both compiled as well; ResNet-18 in torch's int8, too."""
    from training.models import build_model

    image = values(shape).contiguous(memory_format=torch.channels_last)

    def made() -> nn.Module:
        torch.manual_seed(0)
        return build_model(network, 1000).eval()

    def run_of(model: Callable[[Tensor], Tensor]) -> Run:
        def run() -> Tensor:
            with torch.inference_mode():
                return model(image)

        return run

    packed, floats = packed_for_images(made(), w_bits, a_bits, image), made().to(memory_format=torch.channels_last)
    found = {OURS: run_of(packed)}
    if network == "resnet18":
        found[INT8] = run_of(int8.resnet(made()))
    if compiles:
        found[FP32_COMPILED] = run_of(torch.compile(floats, dynamic=False))
        found[OURS_COMPILED] = run_of(torch.compile(packed, dynamic=False))
    else:
        found[FP32] = run_of(floats)
    return found
