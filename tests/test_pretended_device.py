"""The pretended device refuses what a real one refuses, and lets through what a real one does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretended_device import DEVICE, PretendedDevice
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def pretended() -> Iterator[None]:
    with PretendedDevice():
        yield


def there(*shape: int) -> Tensor:
    return torch.ones(shape, device=DEVICE)


REFUSED: dict[str, Callable[[], object]] = {
    "sum": lambda: there(3) + torch.ones(3),
    "sum of a number there and tensors here": lambda: torch.ones(3) + there(),
    "product": lambda: torch.ones(2, 3) @ there(3, 2),
    "linear": lambda: F.linear(there(3), torch.ones(2, 3)),
    "module": lambda: nn.Linear(3, 2).to(DEVICE)(torch.ones(3)),
    "embedding": lambda: F.embedding(torch.tensor([0]), there(2, 3)),
    "index_select": lambda: there(3).index_select(0, torch.tensor([0])),
    "gather": lambda: there(3).gather(0, torch.tensor([0])),
    "index_add": lambda: there(3).index_add_(0, torch.tensor([0]), there(1)),
    "index of the device": lambda: torch.ones(3)[torch.tensor([0]).to(DEVICE)],
    "written values": lambda: there(3).__setitem__(torch.tensor([0, 1]), torch.ones(2)),
    "cat": lambda: torch.cat([there(3), torch.ones(3)]),
    "stack": lambda: torch.stack([there(), torch.ones(())]),
    "padding": lambda: nn.utils.rnn.pad_sequence([there(3), torch.ones(2)]),
    "mask": lambda: there(3).masked_fill(torch.tensor([True, False, True]), 0.0),
    "in place": lambda: torch.ones(()).add_(there()),
    "attention": lambda: F.scaled_dot_product_attention(there(1, 2, 3), there(1, 2, 3), torch.ones(1, 2, 3)),
    "loss": lambda: F.cross_entropy(there(2, 3), torch.tensor([0, 1])),
    "lists": lambda: torch._foreach_add([there(2)], [torch.ones(2)]),
    "generator": lambda: torch.randperm(3, generator=torch.Generator(), device=DEVICE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_devices_do_not_mix(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"same device|device type for generator"):
        REFUSED[name]()


@pytest.mark.parametrize("to_array", [lambda x: x.numpy(), np.asarray, lambda x: x.detach()[1:].numpy()])
def test_arrays_are_made_on_the_cpu(to_array: Callable[[Tensor], object]) -> None:
    with pytest.raises(TypeError, match=r"xpu:0 device type tensor to numpy. Use Tensor.cpu\(\)"):
        to_array(there(3))
    np.testing.assert_array_equal(there(3).cpu().numpy(), np.ones(3))


def test_what_is_made_of_a_tensor_is_where_it_is() -> None:
    x, module = there(2, 3), nn.Linear(3, 3).to(DEVICE)
    made = [
        *(x + 1, 1 + x, x * torch.tensor(2.0), x[0], x[:, torch.tensor([0, 2])], x.T, x.view(-1), x.detach(), x.data),
        *(torch.zeros_like(x), x.new_zeros(2), x.clone(), copy.deepcopy(x), x.double(), x.to(x), torch.as_tensor(x)),
        *(torch.cat([x, x]), *x.split(1), *torch.topk(x, 1), F.rms_norm(x, (3,)), module(x), module.weight),
        *(copy.deepcopy(module).weight, nn.Parameter(x), torch.ones(2).to(x), torch.ones(2).to(DEVICE, torch.float64)),
        *(torch.arange(3, device="xpu"), torch.as_tensor(np.ones(2), device=DEVICE), torch.tensor([1], device="xpu:0")),
    ]
    assert all(tensor.device == DEVICE for tensor in made)
    assert all(not tensor.is_cpu for tensor in made)


def test_what_is_taken_from_it_is_on_the_cpu() -> None:
    x, plain = there(2), torch.ones(2)
    taken = [x.cpu(), x.to("cpu"), torch.zeros_like(x, device="cpu"), x.to(plain), plain.copy_(x), plain[0], plain]
    plain[:1] = x[:1]
    assert all(tensor.device.type == "cpu" for tensor in taken)
    plain.to(DEVICE).zero_()
    assert plain.tolist() == [1.0, 1.0]
    assert x[0].item() == 1.0
    assert x.tolist() == [1.0, 1.0]


def test_training_works_there() -> None:
    module, start = nn.Linear(3, 1).to(DEVICE), torch.ones(2, 3, requires_grad=True)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    before = module.weight.detach().cpu().clone()
    module(start.to(DEVICE)).sum().backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    assert module.weight.grad is not None
    assert module.weight.grad.device == DEVICE
    assert start.grad is not None
    assert start.grad.device.type == "cpu"
    assert optimizer.state[module.weight]["exp_avg"].device == DEVICE
    assert not torch.equal(module.weight.detach().cpu(), before)
    module.load_state_dict(nn.Linear(3, 1).state_dict())
    assert module.weight.device == DEVICE
