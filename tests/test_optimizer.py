"""Muon: compared with torch.optim.Muon on linear layers, and what it does beyond that one."""

import pytest
import torch
from conftest import same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_mnist.training.build import build
from ddpm_mnist.training.config import UNET, TrainConfig
from ddpm_mnist.training.optimizer import Muon, build_optimizer, orthogonalize


def matrices(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_it_is_torchs_muon_on_linear_layers():
    shapes = [(24, 40), (40, 24), (24, 40), (16, 16)]  # wide, tall, one that shares a batch, square
    mine, torchs, start = matrices(*shapes), matrices(*shapes), matrices(*shapes)
    ours = Muon(mine, [], lr=0.02, weight_decay=0.3)
    stock = torch.optim.Muon(torchs, lr=0.02, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        for parameters, optimizer in ((mine, ours), (torchs, stock)):
            give_gradients(parameters, step)
            optimizer.step()
    for a, b, first in zip(mine, torchs, start):  # torch's iterates in bfloat16, ours in the dtype of the weights
        assert (a - b).norm() < 0.02 * (b - first).norm()


@pytest.mark.parametrize("shape", [(3, 32, 288), (3, 288, 32), (1, 64, 64)])
def test_orthogonalize_keeps_the_directions_and_evens_out_the_sizes(shape):
    torch.manual_seed(0)
    g = torch.randn(shape, dtype=torch.float64) * torch.logspace(0, -1, shape[2], dtype=torch.float64)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    inside = u.mT @ orthogonalize(g) @ vh.mT  # diagonal, if the singular vectors are the same
    sizes = inside.diagonal(dim1=1, dim2=2)
    assert torch.allclose(inside, torch.diag_embed(sizes), atol=1e-8)
    assert sizes.max() < 1.25 and sizes.median() > 0.65
    assert orthogonalize(torch.zeros(1, 4, 5)).abs().max() == 0


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (48, 4, 2, 2)])
def test_a_kernel_is_a_matrix_with_a_row_for_each_output_channel(shape):
    kernel, matrix = matrices(shape), matrices((shape[0], 4 * shape[2] * shape[3]))
    for parameters in (kernel, matrix):
        optimizer = Muon(parameters, [], lr=0.1)
        for step in (1, 2):
            give_gradients(parameters, step)
            optimizer.step()
    assert torch.equal(kernel[0].flatten(1), matrix[0])


def test_the_number_of_operations_does_not_grow_with_the_number_of_parameters():
    """Each is a launch on a GPU; parameters of one shape share them."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Count.calls += not getattr(function, "is_view", False)
            return function(*args, **(kwargs or {}))

    counts = []
    for number in (3, 30):
        parameters = matrices(*[(8, 12)] * number)
        optimizer = Muon(parameters, [], lr=0.1)
        for step in range(2):  # the first makes the state
            give_gradients(parameters, step)
            with Count():
                Count.calls = 0
                optimizer.step()
        counts.append(Count.calls)
    assert counts[1] - counts[0] == 0 and counts[0] < 60


def test_a_skipped_update_moves_nothing():
    """Whether it is the first or a later one."""
    parameters, others = matrices((8, 12), (12, 8)), matrices((8,))
    optimizer = Muon(parameters, others, lr=0.1, weight_decay=0.5)
    states = []
    for step, found_inf in enumerate((1.0, 1.0, 0.0, 1.0, 0.0)):
        give_gradients(parameters + others, step)
        if found_inf:
            parameters[0].grad[0, 0] = float("nan")
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        momenta = {f"momentum {i}": optimizer.state[p]["momentum"] for i, p in enumerate(parameters)}
        states.append({str(i): p.detach().clone() for i, p in enumerate(parameters + others)} | momenta)
    assert same(states[0], states[1]) and same(states[2], states[3])
    assert torch.equal(states[0]["0"], matrices((8, 12))[0]) and not states[0]["momentum 0"].any()
    assert not any(torch.equal(a[key], b[key]) for a, b in (states[1:3], states[3:]) for key in states[0])
    assert all(value.isfinite().all() for value in states[4].values())
    assert [int(optimizer.state[p]["step"]) for p in parameters + others] == [2, 2, 2]


def test_muon_gets_the_hidden_weights_and_adamw_the_rest():
    config = TrainConfig(unet=UNET | {"num_class_embeds": 11})
    unet = build(config, "unet")
    names = {id(p): name for name, p in unet.named_parameters()}
    hidden, rest = ({names[id(p)] for p in g["params"]} for g in build_optimizer(unet, config).param_groups)
    assert hidden | rest == set(names.values()) and not hidden & rest
    outer = {"conv_in.weight", "conv_out.weight", "class_embedding.weight"}
    assert hidden == {n for n, p in unet.named_parameters() if p.dim() > 1} - outer
