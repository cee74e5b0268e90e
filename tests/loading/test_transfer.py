"""Networks filled from files, and the memory on the host."""

import weakref
from pathlib import Path

import torch
from safetensors.torch import save_file

from worker.loading.files import PAGE_BYTES
from worker.loading.host_memory import HostMemory
from worker.loading.transfer import Reading, Transfer

CPU = torch.device("cpu")
SMALL = Reading(num_threads=3, block_bytes=8 * PAGE_BYTES, buffer_bytes=3 * PAGE_BYTES)


def test_buffers_that_are_in_no_file_share_the_storage_of_their_block(tmp_path: Path) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(3, 5, device="meta"))
            self.register_buffer("steps", torch.arange(7), persistent=False)

    network = torch.nn.Sequential(torch.nn.ModuleList([Layer(), Layer()]), Layer())
    weights = {name: torch.rand(3, 5) for name in network.state_dict()}
    save_file(weights, tmp_path / "model.safetensors")
    with Transfer(CPU, SMALL) as transfer:
        transfer.fill(network, tmp_path, torch.float32, "host")
        transfer.finish()
    assert all(torch.equal(network.state_dict()[name], weights[name]) for name in weights)
    own = [
        dict(layer.named_parameters()) | dict(layer.named_buffers())
        for layer in network.modules()
        if isinstance(layer, Layer)
    ]
    addresses = [
        {tensor.untyped_storage().data_ptr() for tensor in tensors.values()} for tensors in own
    ]
    assert list(map(len, addresses)) == [1, 1, 1]
    assert len(set.union(*addresses)) == 3
    for tensors in own:
        assert tensors["steps"].tolist() == list(range(7))


def test_the_host_s_memory_is_given_back_with_the_last_tensor_in_it() -> None:
    memory = HostMemory(1000)
    tensor = memory.tensor()[256:512]
    watched = weakref.ref(memory)
    del memory
    assert watched() is not None
    assert tensor.fill_(3).sum() == 3 * 256
    del tensor
    assert watched() is None


def test_one_changed_byte_of_a_header_is_named_or_changes_nothing(tmp_path: Path) -> None:
    weights = {"0.weight": torch.rand(3, 5), "0.bias": torch.rand(3)}
    path = tmp_path / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    whole = path.read_bytes()
    messages = []
    for index in range(8 + int.from_bytes(whole[:8], "little")):
        path.write_bytes(
            whole[:index] + bytes([whole[index] ^ 1 << index % 7]) + whole[index + 1 :]
        )
        network = torch.nn.Sequential(torch.nn.Linear(5, 3, device="meta"))
        try:
            with Transfer(CPU, SMALL) as transfer:
                transfer.fill(network, tmp_path, torch.float32, "device")
                transfer.finish()
        except (OSError, ValueError) as error:
            messages.append(str(error))
        else:
            assert all(torch.equal(network.state_dict()[name], weights[name]) for name in weights)
    assert len(messages) > 100
    assert [message for message in messages if str(tmp_path) not in message] == []
