"""encode(x).decode() == forward(x), exactly, for every quantizer, shape and dtype."""

from __future__ import annotations

import pytest
import torch
from properties import given, settings, st

import quantkernels as qk
from quantkernels.ops.planes import from_rows, to_rows

MAKERS = {
    "minmax": lambda bits, axis: qk.MinMax(bits, axis),
    "sawb": lambda bits, axis: qk.SAWB(bits, axis),
    "bwn": lambda bits, axis: qk.BWN(axis),
    "twn": lambda bits, axis: qk.TWN(axis),
    "dorefa": lambda bits, axis: qk.DoReFa(bits),
    "modified": lambda bits, axis: qk.ModifiedDoReFa(bits),
    "centred": lambda bits, axis: qk.CentredDoReFa(bits, rescale=True),
    "pact": lambda bits, axis: qk.PACT(bits, alpha=1.5),
    "learned": lambda bits, axis: qk.LearnedBasis(bits, axis=axis),
    "attention": lambda bits, axis: qk.Attention([qk.MinMax(bits, axis), qk.TWN(axis), qk.BWN(axis)]).select(1),
    "relax": lambda bits, axis: qk.BinaryRelax([qk.SAWB(bits, axis)]).select(),
}
SPECIAL = [0.0, -0.0, 0.5, -0.5, 1.5, 1e-30, -3e4, 3e4]


@st.composite
def problems(draw):
    shape = draw(st.lists(st.integers(0, 7), min_size=0, max_size=4))
    axis = draw(st.one_of(st.none(), st.integers(0, len(shape) - 1))) if shape else None
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    numel = torch.Size(shape).numel()
    element = st.one_of(st.sampled_from(SPECIAL), st.floats(-4, 4, width=16))
    values = draw(st.lists(element, min_size=numel, max_size=numel))
    return torch.tensor(values, dtype=torch.float32).reshape(shape).to(dtype), axis


@settings(max_examples=40, deadline=None)
@given(problem=problems(), name=st.sampled_from(sorted(MAKERS)), bits=st.integers(1, 8))
def test_decode_of_encode_is_forward(problem, name, bits):
    x, axis = problem
    quantizer = MAKERS[name](bits, axis)
    for training in (True, False):
        quantizer.train(training)
        planes = quantizer.encode(x)
        assert torch.equal(planes.decode(), quantizer(x))
        assert planes.bits == quantizer.bits
        assert planes.planes.dtype == torch.int32


def test_channels_last_and_strided():
    x = torch.randn(4, 6, 5, 3).to(memory_format=torch.channels_last)
    for view in (x, x[:, ::2], x.transpose(0, 1), x.expand(4, 6, 5, 3)):
        for quantizer in (qk.MinMax(3), qk.TWN(axis=1), qk.SAWB(5, axis=0)):
            assert torch.equal(quantizer.encode(view).decode(), quantizer(view))


def test_tracking_quantizers_encode_with_the_statistics_of_forward():
    quantizer = qk.MinMax(3).track()
    for _ in range(3):
        x = torch.randn(20)
        q = quantizer(x)
        before = quantizer.running_grid.clone()
        assert torch.equal(quantizer.encode(x).decode(), q)
        assert torch.equal(quantizer.running_grid, before)
    quantizer.eval()
    assert torch.equal(quantizer.encode(x).decode(), quantizer(x))


def test_rows_of_a_convolution_weight_are_in_h_w_c_order():
    weight = torch.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    assert torch.equal(to_rows(weight)[1], weight[1].permute(1, 2, 0).flatten())
    for axis in (None, 0, 1, 2, 3, -1):
        assert torch.equal(from_rows(to_rows(weight, axis), weight.shape, axis), weight)


def test_size_is_bits_times_elements():
    planes = qk.MinMax(2).encode(torch.randn(8, 64))
    assert (planes.bits, planes.planes.nbytes) == (2, 2 * 8 * 64 // 8)
    assert planes.nbytes == planes.planes.nbytes + 12


def test_nan_encodes_to_zero():
    x = torch.tensor([float("nan"), 1.0])
    assert qk.PACT(2, alpha=1.0).encode(x).codes().tolist() == [0, 3]


def test_what_has_no_codes_says_so():
    with pytest.raises(TypeError, match="no codes"):
        qk.Identity().encode(torch.randn(3))
    for mixture in (qk.Attention([qk.MinMax(2), qk.MinMax(4)]), qk.BinaryRelax([qk.BWN()])):
        with pytest.raises(RuntimeError, match=r"call select\(\)"):
            mixture.encode(torch.randn(3))


@pytest.mark.ops("channel_stats", "fake_quantize", "quantize_pack", "unpack_bitplanes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MAKERS)
def test_every_backend_encodes_and_decodes(backend, name, dtype):
    """The tests above run on the native kernels; here the same identity on each backend."""
    for shape, axis in (((9, 70), None), ((9, 70), 0), ((4, 5, 3, 3), 1), ((0, 3), None)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(6)).to(dtype)
        quantizer = MAKERS[name](3, None if name == "pact" else axis).to(backend.device)
        with backend.chosen():
            planes = quantizer.encode(x.to(backend.device))
            assert torch.equal(planes.decode(), quantizer(x.to(backend.device)))
            codes = planes.codes()
        assert torch.equal(codes, planes.codes())  # unpacked by the native kernel
