"""R5 in torch's own parallel training, on two GPUs: `pytest -m gpu <this file>`.

A step of two processes, each with half of the batch, must be the step of one with all of it.
"""

import functools
import os
import socket
import time

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.distributed.fsdp import fully_shard

from keras_rwr.ops import rwr_attention

pytestmark = pytest.mark.gpu

VOCABULARY, HEADS, HEAD_SIZE, GRAPH = 512, 4, 64, 64
WIDTH = HEADS * HEAD_SIZE
R5 = {
    "steps": 2,
    "topk": 8,
    "neighbor_block": 1,
    "window": 64,
    "edge_weight": "exponential",
    "self_edges": False,
    "is_causal": True,
    "implementation": "triton",
}


class Block(nn.Module):
    """R5 and a feed-forward network, in torch's own layers."""

    def __init__(self, width=WIDTH, heads=HEADS):
        super().__init__()
        self.heads = heads
        self.norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width + 2 * GRAPH + 3 * heads)
        self.combine = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        width = x.shape[-1]
        sizes = [width] * 3 + [GRAPH] * 2 + [3 * self.heads]
        *parts, theta = self.project(self.norm(x)).split(sizes, -1)
        query, key, value = (y.unflatten(-1, (self.heads, -1)) for y in parts[:3])
        graph_query, graph_key = (y.unflatten(-1, (1, -1)) for y in parts[3:])
        attended = rwr_attention(
            query,
            key,
            value,
            graph_query=graph_query,
            graph_key=graph_key,
            hop_weights=1.0 + theta.unflatten(-1, (self.heads, 3)),
            **R5,
        )
        x = x + self.combine(attended.flatten(-2))
        return x + self.feed(self.second_norm(x))


def make_model(layers=2, width=WIDTH, heads=HEADS):
    torch.manual_seed(0)
    blocks = [Block(width, heads) for _ in range(layers)]
    return nn.Sequential(nn.Embedding(VOCABULARY, width), *blocks, nn.Linear(width, VOCABULARY))


def loss_of(model, tokens):
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def draw_tokens(batch, size):
    return torch.randint(VOCABULARY, (batch, size + 1), generator=torch.Generator().manual_seed(1))


def start(rank, port):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", rank=rank, world_size=2)


def parallel(kind, model):
    """The model in a kind of parallel training."""
    if kind == "DDP":
        return nn.parallel.DistributedDataParallel(model)
    for block in model:
        fully_shard(block)
    return fully_shard(model)


def compare(rank, port, kind):
    """Fails unless the gradients of two processes are those of one."""
    start(rank, port)
    tokens = draw_tokens(4, 300).cuda()
    whole = make_model().cuda()
    loss_of(whole, tokens).backward()
    model = parallel(kind, make_model().cuda())
    loss = loss_of(model, tokens[2 * rank : 2 * rank + 2])
    loss.backward()
    expected = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if kind == "FSDP2":
            gradient = gradient.full_tensor()
        one = expected[name.removeprefix("module.")].grad
        error = (gradient - one).norm() / one.norm()
        assert error < 1e-4, (name, error)
    torch.distributed.destroy_process_group()


def measure(rank, port, kind, layers, width, heads, batch, size):
    """Prints tokens a second of training steps, of one process or of two."""
    tokens = draw_tokens(batch, size).cuda(rank)
    if kind is None:
        model = make_model(layers, width, heads).cuda()
    else:
        start(rank, port)
        model = parallel(kind, make_model(layers, width, heads).cuda())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    begin, steps = time.perf_counter(), 20
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    if rank == 0:
        devices = 1 if kind is None else 2
        rate = devices * steps * batch * size / (time.perf_counter() - begin)
        print(f"{kind or 'one GPU'}: {rate:,.0f} tokens/s", flush=True)
    if kind is not None:
        torch.distributed.destroy_process_group()


def spawn(function, *arguments):
    """Runs a function in two processes, with their rank and a free port."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.spawn(function, (port, *arguments), nprocs=2)


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_two_processes_make_the_step_of_one(kind):
    if torch.cuda.device_count() < 2:
        pytest.fail(f"This test needs two GPUs. Received: {torch.cuda.device_count()}")
    spawn(compare, kind)


if __name__ == "__main__":
    for sizes in ((6, 768, 12, 8, 4096), (6, 768, 12, 2, 16384)):
        run = functools.partial(spawn, measure)
        measure(0, None, None, *sizes)
        for kind in ("DDP", "FSDP2"):
            run(kind, *sizes)
