"""Two processes under DDP give the losses and gradients of one: DRKD, FGD, PKD and CWD on a torn batch."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from kdcli.methods.cwd import CWD
from kdcli.methods.drkd import DRKD
from kdcli.methods.fgd import FGD
from kdcli.methods.pkd import PKD
from kdcli.methods.reduce import world_moments, world_sum_grad
from tests.support.feature_case import KEY, NONE, ONE, TWO, make_batch, make_pair, maps

OURS, THEIRS = 6, 8
BOXES = [TWO, ONE, NONE]  # the second process has an image without boxes and no other


class Step(nn.Module):
    """A student of one layer and the methods on its maps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        pair = make_pair(OURS, THEIRS)
        self.student = nn.Linear(OURS, OURS)
        self.methods = nn.ModuleDict({"drkd": DRKD(pair), "fgd": FGD(pair), "pkd": PKD(pair), "cwd": CWD(pair)})
        for parameter in self.methods["fgd"].parameters():  # its context blocks start at 0
            nn.init.normal_(parameter, std=0.1)

    def forward(self, images: slice) -> dict[str, Tensor]:
        """The terms of the given images of the batch."""
        ours = self.student(maps(len(BOXES), OURS, 1).detach()[images])
        theirs = maps(len(BOXES), THEIRS, 2).detach()[images] * 2 + 1
        batch = make_batch(BOXES[images])
        found = {}
        for name, method in self.methods.items():
            found |= {f"{name}_{part}": t for part, t in method({KEY: ours}, {KEY: theirs}, batch).items()}
        return found


def gradients(step: Step) -> dict[str, Tensor]:
    return {n: p.grad for n, p in step.named_parameters() if p.grad is not None}


def work(rank: int, port: int, folder: str) -> None:
    """One of two processes: the first has two images, the second one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    step = Step()
    wrapped = nn.parallel.DistributedDataParallel(step)
    terms = wrapped(slice(0, 2) if rank == 0 else slice(2, 3))
    torch.stack(list(terms.values())).sum().backward()
    values = {}
    for name, term in terms.items():
        value = term.detach().clone()
        dist.all_reduce(value)
        values[name] = value / 2
    if rank == 0:
        torch.save({"terms": values, "gradients": gradients(step)}, Path(folder) / "two.pt")
    dist.destroy_process_group()


@pytest.mark.full
def test_two_processes_equal_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=2)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    step = Step()
    terms = step(slice(0, 3))
    torch.stack(list(terms.values())).sum().backward()
    assert two["terms"].keys() == terms.keys()
    for name, term in terms.items():
        assert float(two["terms"][name]) == pytest.approx(float(term.detach()), rel=1e-4), name
    one = gradients(step)
    assert one.keys() == two["gradients"].keys() == dict(step.named_parameters()).keys()
    for name, gradient in one.items():
        largest = max(float(gradient.abs().max()), 1e-6)
        assert float((two["gradients"][name] - gradient).abs().max()) < 1e-3 * largest, name


def test_moments_count_what_is_weighted() -> None:
    value = (torch.randn(2, 50, 3) + 1000).double()
    weight = (torch.rand(2, 50, 1) > 0.4).double()
    mean, variance, count = world_moments(value, weight)
    chosen = value[weight[..., 0] > 0]
    torch.testing.assert_close(mean, chosen.mean(dim=0))
    torch.testing.assert_close(variance, chosen.var(dim=0, correction=0))
    assert int(count) == len(chosen)
    nothing = world_moments(value, torch.zeros_like(weight))
    assert not any(v.any() for v in nothing)
    assert world_sum_grad(value) is value  # one process
