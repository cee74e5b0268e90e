"""The loader against from_pretrained, on files that do not fit, and at its limits."""

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from builder.convert import convert
from tests.support.golden_weights import build_toy_checkpoint
from worker.generation.engine import Engine
from worker.generation.pipeline import HunyuanVideoAvatarPipeline
from worker.loading import host_memory, layout, loader
from worker.loading.files import PAGE_BYTES, BlockReader
from worker.loading.host_memory import HostMemory
from worker.loading.transfer import Place, Reading
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel
from worker.settings import Settings

CPU = torch.device("cpu")
ON_GPU = {"transformer": torch.bfloat16, "default": torch.float16}  # as the engine has them there
ON_CPU = {"default": torch.float32}
# Most tensors come in several pieces.
SMALL = Reading(num_threads=3, block_bytes=8 * PAGE_BYTES, buffer_bytes=3 * PAGE_BYTES)


TRANSFORMER_FILE = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def models(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The toy checkpoint as it is, and with the transformer in 8 bits."""
    directory = tmp_path_factory.mktemp("models")
    convert(build_toy_checkpoint(directory), directory / "fp8", "fp8")
    return {"keep": toy_model, "fp8": directory / "fp8"}


@pytest.fixture
def own_model(toy_model: Path, tmp_path: Path) -> Path:
    """A model directory for tests that change it."""
    return Path(shutil.copytree(toy_model, tmp_path / "model"))


def all_tensors(components: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every parameter and buffer, those that are in no file among them."""
    return {
        f"{component}.{name}": tensor
        for component, module in components.items()
        if isinstance(module, torch.nn.Module)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].cpu(), tensor.cpu()), name


def rewrite(path: Path, changes: Mapping[str, Tensor | None]) -> None:
    """The file with other tensors; None takes one out."""
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("load")]


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("reading", [Reading(), SMALL], ids=["as shipped", "in small pieces"])
@pytest.mark.parametrize("dtypes", [ON_GPU, ON_CPU], ids=["as on a GPU", "as on a CPU"])
@pytest.mark.parametrize("variant", ["keep", "fp8"])
def test_every_tensor_is_bit_for_bit_that_of_from_pretrained(
    variant: Any, dtypes: Any, reading: Any, models: Any
) -> None:
    expected = HunyuanVideoAvatarPipeline.from_pretrained(models[variant], dtype=dtypes)
    components, _ = loader.load(models[variant], CPU, dtypes, reading=reading)
    pipeline = HunyuanVideoAvatarPipeline(**components)  # it casts what runs in another dtype
    assert_same(all_tensors(pipeline.components), all_tensors(expected.components))


def test_the_components_are_of_the_same_classes_and_ready_to_run(toy_model: Path) -> None:
    expected = HunyuanVideoAvatarPipeline.from_pretrained(toy_model)
    components, _ = loader.load(toy_model, CPU, ON_CPU)
    for name, component in expected.components.items():
        found = components.get(name)  # None: the face detector, which the checkpoint lacks
        assert type(found) is type(component), name
        if isinstance(component, torch.nn.Module):
            assert found is not None
            assert not any(module.training for module in found.modules()), name


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["keep", "fp8"])
def test_on_a_gpu_every_tensor_is_the_same_too(variant: str, models: dict[str, Path]) -> None:
    expected = HunyuanVideoAvatarPipeline.from_pretrained(models[variant], dtype=ON_GPU)
    for reading in (Reading(), SMALL):
        components, _ = loader.load(models[variant], torch.device("cuda"), ON_GPU, reading=reading)
        tensors = all_tensors(HunyuanVideoAvatarPipeline(**components).components)
        assert {tensor.device.type for tensor in tensors.values()} == {"cuda"}
        assert_same(tensors, all_tensors(expected.components))


def test_the_engine_loads_a_model_directory_and_says_how_fast(toy_model: Path) -> None:
    report = Engine.load(Settings(model_dir=str(toy_model))).load_report
    tensors = [load_file(path) for path in toy_model.glob("*/*.safetensors")]
    stored = sum(tensor.nbytes for file in tensors for tensor in file.values())
    headers = report.num_bytes - stored
    assert 0 < headers < 200_000
    assert sum(part.num_bytes for part in report.components) == report.num_bytes
    assert 0 < report.bytes_per_second < 1e11
    assert [part.name for part in report.components] == list(loader.NETWORKS)
    assert all(0 < part.ready_seconds <= report.seconds for part in report.components)
    assert str(report).startswith("0.01 GB in ")


def test_the_memory_that_the_weights_take_is_known_from_their_headers(
    models: dict[str, Path],
) -> None:
    for variant in models.values():
        components, _ = loader.load(variant, CPU, ON_GPU)
        taken = sum(tensor.nbytes for tensor in all_tensors(components).values())
        sizes = loader.network_sizes(variant, ON_GPU)
        expected = sum(size.total_bytes for size in sizes.values())
        assert taken == pytest.approx(expected, rel=0.2)  # gaps between tensors
        for name, size in sizes.items():
            assert len(size.block_bytes) == len(layout.blocks(components[name]))


# Where the weights lie


def storages(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def tensors_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@pytest.mark.parametrize("variant", ["keep", "fp8"])
@pytest.mark.parametrize("place", ["device", "host"])
def test_each_block_has_one_storage_of_its_own_and_what_is_left_has_one_more(
    place: Any, variant: Any, models: Any
) -> None:
    components, _ = loader.load(models[variant], CPU, ON_CPU, {"default": place})
    for name in loader.NETWORKS:
        network = components[name]
        blocks = layout.blocks(network)
        outside = tensors_of(network)
        seen: set[int] = set()
        for block, module in blocks.items():
            own = tensors_of(module)
            (storage,) = storages(own.values())
            assert storage not in seen, block
            seen.add(storage)
            for inner in own:
                del outside[f"{block}.{inner}"]
        (rest,) = storages(outside.values())
        assert rest not in seen, name


def test_tensors_begin_at_multiples_of_256_bytes_and_waste_no_more_than_that(
    toy_model: Path,
) -> None:
    components, _ = loader.load(toy_model, CPU, ON_CPU, {"default": "host"})
    for block in layout.blocks(components["transformer"]).values():
        own = tensors_of(block).values()
        assert {tensor.data_ptr() % 256 for tensor in own} == {0}
        used = sum(tensor.nbytes for tensor in own)
        assert next(iter(own)).untyped_storage().nbytes() < used + 256 * len(own)


def test_blocks_are_the_entries_of_the_outermost_lists(toy_model: Path) -> None:
    components, _ = loader.load(toy_model, CPU, ON_CPU)
    config = components["transformer"].config
    names = list(layout.blocks(components["transformer"]))
    for kind, count in {
        "transformer_blocks": config.num_layers,
        "single_transformer_blocks": config.num_single_layers,
        "context_embedder.token_refiner.refiner_blocks": config.num_refiner_layers,
    }.items():
        of_kind = [name for name in names if name.startswith(f"{kind}.")]
        assert of_kind == [f"{kind}.{index}" for index in range(count)]
    assert "language_model.layers.0" in layout.blocks(components["text_encoder"])


@pytest.mark.gpu
@pytest.mark.parametrize("missing", ["CUDA's copy", "pinned memory"])
def test_on_a_gpu_every_tensor_is_the_same_without_what_makes_it_fast(
    missing: str, toy_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = torch.device("cuda")
    expected, _ = loader.load(toy_model, gpu, ON_GPU)
    assert host_memory.cuda_copy() is not None
    if missing == "CUDA's copy":
        monkeypatch.setattr(host_memory, "cuda_copy", lambda: None)
    else:
        monkeypatch.setattr(HostMemory, "pin", lambda _: 2)
    components, _ = loader.load(toy_model, gpu, ON_GPU, reading=SMALL)
    assert_same(all_tensors(components), all_tensors(expected))
    assert ("memory of the host is not pinned" in caplog.text) == (missing == "pinned memory")


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["keep", "fp8"])
def test_a_gpu_can_fetch_by_itself_what_stays_on_the_host(
    variant: str, models: dict[str, Path]
) -> None:
    placement: dict[str, Place] = {"transformer": "host", "default": "device"}
    components, _ = loader.load(models[variant], torch.device("cuda"), ON_GPU, placement)
    expected = HunyuanVideoAvatarPipeline.from_pretrained(models[variant], dtype=ON_GPU)
    pipeline = HunyuanVideoAvatarPipeline(**components)
    assert_same(all_tensors(pipeline.components), all_tensors(expected.components))
    for tensor in tensors_of(components["transformer"]).values():
        assert tensor.is_pinned()
    for tensor in tensors_of(components["vae"]).values():
        assert tensor.is_cuda
    for block in layout.blocks(components["transformer"]).values():
        assert len(storages(tensors_of(block).values())) == 1


# Files that do not fit


def test_a_missing_tensor_is_named(own_model: Path) -> None:
    rewrite(own_model / TRANSFORMER_FILE, {"proj_out.bias": None})
    with pytest.raises(ValueError, match=r"model/transformer: proj_out\.bias is missing"):
        loader.load(own_model, CPU, ON_CPU)


def test_an_unknown_tensor_is_named_with_its_file(own_model: Path) -> None:
    rewrite(own_model / TRANSFORMER_FILE, {"proj_in.bias": torch.zeros(2)})
    with pytest.raises(ValueError, match=rf"{TRANSFORMER_FILE}: proj_in\.bias is unknown"):
        loader.load(own_model, CPU, ON_CPU)


def test_a_tensor_that_is_there_twice_is_named_with_its_file(own_model: Path) -> None:
    stray = own_model / "vae" / "old.safetensors"
    save_file({"decoder.conv_in.conv.bias": torch.zeros(16)}, stray)
    with pytest.raises(ValueError, match=r"old\.safetensors: decoder.* or there twice"):
        loader.load(own_model, CPU, ON_CPU)


def test_a_misshapen_tensor_is_named_with_its_file(own_model: Path) -> None:
    path = own_model / "text_encoder_2" / "model.safetensors"
    name = "text_model.final_layer_norm.weight"
    rewrite(path, {name: torch.zeros(3)})
    with pytest.raises(ValueError, match=rf"2/model.safetensors: {name} is of shape \(3,\), not"):
        loader.load(own_model, CPU, ON_CPU)


def test_bits_do_not_pass_for_numbers(own_model: Path) -> None:
    path = own_model / TRANSFORMER_FILE
    bits = load_file(path)["proj_out.weight"].to(torch.uint8)
    rewrite(path, {"proj_out.weight": bits})
    with pytest.raises(
        ValueError, match=r"proj_out\.weight is of torch\.uint8, not torch\.float32"
    ):
        loader.load(own_model, CPU, ON_CPU)


def test_many_faults_are_counted_and_the_first_ones_named(own_model: Path) -> None:
    path = own_model / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"float8_blocks": True}))
    with pytest.raises(ValueError, match=r"is of torch\.\w+, not torch\.uint8; .*; and 138 more$"):
        loader.load(own_model, CPU, ON_CPU)


def test_a_dtype_that_no_network_has_is_named(own_model: Path) -> None:
    rewrite(own_model / TRANSFORMER_FILE, {"proj_out.bias": torch.zeros(16, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"proj_out\.bias is of an unknown dtype, I64"):
        loader.load(own_model, CPU, ON_CPU)


def test_a_component_without_weights_is_named(own_model: Path) -> None:
    (own_model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model/vae holds no weights"):
        loader.load(own_model, CPU, ON_CPU)


@pytest.mark.parametrize("past_cache", [True, False])
def test_a_file_that_ends_early_is_named_and_nothing_stays_behind(
    past_cache: bool, own_model: Path
) -> None:
    path = own_model / TRANSFORMER_FILE
    os.truncate(path, path.stat().st_size - 10_000)
    open_files = num_open_files()
    reading = dataclasses.replace(SMALL, past_cache=past_cache)
    with pytest.raises(OSError, match=rf"{TRANSFORMER_FILE} ends at byte \d+, inside a tensor"):
        loader.load(own_model, CPU, ON_CPU, reading=reading)
    assert own_threads() == []
    assert num_open_files() == open_files


# Memory and the page cache


@pytest.fixture(scope="module")
def larger_model(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model with a transformer of 300 MB, whose file the disk has."""
    model = Path(shutil.copytree(toy_model, tmp_path_factory.mktemp("larger") / "model"))
    config = json.loads((model / "transformer" / "config.json").read_text())
    shutil.rmtree(model / "transformer")
    with torch.device("meta"):
        transformer = HunyuanVideoAvatarTransformer3DModel.from_config(
            config | {"num_attention_heads": 32, "num_layers": 6}
        )
    transformer.to_empty(device="cpu").save_pretrained(model / "transformer")
    with (model / TRANSFORMER_FILE).open("rb") as file:
        os.fsync(file.fileno())
    return model


def drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def is_cached(path: Path) -> bool:
    with BlockReader(path) as file:
        return file.is_cached(0, path.stat().st_size)


def memory_bytes(field: str) -> int:
    """A figure of this process: VmRSS, or VmHWM, the most that VmRSS has been."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if field in line)


def test_beside_the_weights_only_the_buffers_take_memory(larger_model: Path) -> None:
    reading = Reading(num_threads=2, block_bytes=2**20, buffer_bytes=2**18)
    loader.load(larger_model, CPU, ON_CPU, reading=reading)  # what else is done once in a process
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = memory_bytes("VmRSS")
    components, report = loader.load(larger_model, CPU, ON_CPU, reading=reading)
    assert report.num_bytes > 250e6
    assert memory_bytes("VmHWM") - before < report.num_bytes + 60e6
    del components


def test_a_file_outside_the_page_cache_is_read_past_it_and_one_inside_from_it(
    larger_model: Path,
) -> None:
    path = larger_model / TRANSFORMER_FILE
    drop_from_page_cache(path)
    if is_cached(path):
        pytest.skip("the file system keeps its files in memory")
    for _ in range(2):  # the first load leaves nothing in the cache
        _, report = loader.load(larger_model, CPU, ON_CPU)
        assert report.cached_bytes < report.num_bytes / 2
    path.read_bytes()
    _, report = loader.load(larger_model, CPU, ON_CPU)
    assert report.cached_bytes == report.num_bytes
    assert "100% from the page cache" in str(report)


def test_the_disk_s_speed_comes_with_the_report_of_a_model_that_is_large_enough(
    larger_model: Path, toy_model: Path
) -> None:
    _, report = loader.load(larger_model, CPU, ON_CPU)
    assert report.disk_bytes_per_second is not None
    assert report.disk_ratio == pytest.approx(
        report.bytes_per_second / report.disk_bytes_per_second
    )
    assert f"{report.disk_ratio:.2f} of the disk's" in str(report)
    _, report = loader.load(toy_model, CPU, ON_CPU)
    assert report.disk_ratio is None
