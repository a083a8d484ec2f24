"""Large results of CPU ops lie in blocks of memory that are kept and used again."""

import copy
import multiprocessing
import pickle
import subprocess
import sys
import threading

import pytest
import torch

import quantkernels as qk
from quantkernels.ops import Kind, Ste

MIB = 1 << 20
LEVELS = 15
GRID = torch.tensor([[-3.0, 0.4, 0.0]])


def quantized(x):
    return qk.ops.fake_quantize(x, GRID, Kind.UNIFORM, LEVELS, Ste.CLIP)


@pytest.fixture
def x():
    qk.empty_cache()
    return torch.randn(MIB // 2, generator=torch.Generator().manual_seed(0))  # 2 MiB


def test_the_last_block_of_a_size_is_the_first_to_be_used_again(x):
    first, second = quantized(x), quantized(x)
    at = first.data_ptr(), second.data_ptr()
    assert at[0] != at[1] and all(p % 4096 == 0 for p in at)
    del first
    del second
    assert [quantized(x).data_ptr() for _ in range(3)] == [at[1]] * 3  # dropped before the next is made
    alive = [quantized(x), quantized(x)]
    assert [q.data_ptr() for q in alive] == [at[1], at[0]]
    assert quantized(x[: MIB // 4]).data_ptr() not in at  # another size


def test_a_block_is_kept_as_long_as_anything_looks_at_it(x):
    q = quantized(x)
    expected, view, shared = q.clone(), q[100:], q.detach().numpy()
    del q
    other = quantized(-x)
    assert qk.empty_cache() == 0  # both are in use
    assert torch.equal(view, expected[100:]) and torch.equal(torch.from_numpy(shared), expected)
    del view, shared, other
    assert qk.empty_cache() == 2 * x.nbytes


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_strides_are_those_of_empty_like(format):
    x = torch.randn(2, 64, 64, 65).contiguous(memory_format=format)
    for of in (x, x.transpose(1, 3), x[:1], x[:, :, ::2]):
        q = quantized(of)
        assert q.stride() == torch.empty_like(of).stride()
        assert torch.equal(q, torch.stack([quantized(part) for part in of]))


def test_results_behave_like_other_tensors(x):
    q = quantized(x)
    assert torch.equal(pickle.loads(pickle.dumps(q)), q) and torch.equal(copy.deepcopy(q), q)
    expected = q.clone()
    assert torch.equal(q.share_memory_(), expected) and q.is_shared()
    q = quantized(x)
    q.mul_(2).resize_(MIB // 4)
    assert torch.equal(q, 2 * expected[: MIB // 4])
    with pytest.raises(RuntimeError, match="resiz"):
        q.resize_(MIB)


def test_gradients_accumulate_in_blocks(x):
    x.requires_grad_()
    for _ in range(3):
        quantized(x).sum().backward()
    inside = (x.detach() >= -3) & (x.detach() <= 3)
    assert torch.equal(x.grad, 3.0 * inside)


def test_threads_share_the_blocks(x):
    expected = quantized(x).clone()
    wrong = []

    def work():
        for _ in range(50):
            if not torch.equal(quantized(x), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 0 < qk.empty_cache() <= len(threads) * x.nbytes


def _in_child(x, expected, queue):
    torch.set_num_threads(1)
    queue.put(torch.equal(quantized(x), expected))


def test_a_forked_child_has_blocks_of_its_own(x):
    expected = quantized(x)
    stop = threading.Event()

    def hammer():
        while not stop.is_set():
            quantized(x)

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a child has no thread pool
    busy = threading.Thread(target=hammer)
    busy.start()
    try:
        context = multiprocessing.get_context("fork")
        for _ in range(5):
            queue = context.Queue()
            child = context.Process(target=_in_child, args=(x, expected, queue))
            child.start()
            assert queue.get(timeout=60)
            child.join(60)
            assert child.exitcode == 0
    finally:
        stop.set()
        busy.join()
        torch.set_num_threads(before)


@pytest.mark.parametrize("limit, kept", [("5", 4), ("1", 0), ("0", 0), (None, 6)])
def test_the_limit_comes_from_the_environment(limit, kept, monkeypatch):
    """Three results of 2 MiB are dropped; as many are kept as the limit admits."""
    monkeypatch.delenv("QK_CPU_CACHE_MB", raising=False)
    if limit is not None:
        monkeypatch.setenv("QK_CPU_CACHE_MB", limit)
    code = """
import torch, quantkernels as qk
alive = [qk.ops.fake_quantize(torch.zeros(1 << 19), torch.tensor([[0.0, 1.0, 0.0]]), 0, 15) for _ in range(3)]
del alive
print(qk.empty_cache() >> 20, qk.empty_cache())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == [str(kept), "0"]
