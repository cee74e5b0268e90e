import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer, LlavaModel, WhisperModel

from builder import convert as command
from builder.convert import convert, load_official_transformer
from tests.support.golden_transformer import arguments, relative_difference
from tests.support.golden_weights import build_toy_checkpoint, load_case
from worker.generation.pipeline import HunyuanVideoAvatarPipeline
from worker.model.encoders import Float8LlavaModel
from worker.model.linear import Float8Linear, dequantize
from worker.model.transformer import HunyuanVideoAvatarTransformer3DModel

TRANSFORMERS = "hunyuan-video-t2v-720p/transformers"
PLAIN = f"{TRANSFORMERS}/mp_rank_00_model_states.pt"
FLOAT8 = f"{TRANSFORMERS}/mp_rank_00_model_states_fp8.pt"
FLOAT8_MAP = f"{TRANSFORMERS}/mp_rank_00_model_states_fp8_map.pt"


@pytest.fixture(scope="module", autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy_checkpoint(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def float8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy_checkpoint(tmp_path_factory.mktemp("float8"), plain=False, float8=True)


@pytest.fixture(scope="module")
def model_dir(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain checkpoint, converted with every tensor kept."""
    target = tmp_path_factory.mktemp("models") / "keep"
    convert(plain, target)
    return target


@pytest.fixture
def own_checkpoint(tmp_path: Path) -> Path:
    """A checkpoint that the test may damage."""
    return build_toy_checkpoint(tmp_path / "own", float8=True)


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the weights in a published file."""
    content = torch.load(path)
    edit(content.get("module", content))
    torch.save(content, path)


def velocity(model: HunyuanVideoAvatarTransformer3DModel, case: str) -> torch.Tensor:
    described, tensors = load_case("toy_checkpoint")
    inputs = arguments(described["cases"][case]["inputs"], tensors, described["audio_scale"])
    return model(**inputs).sample


def reference(case: str) -> torch.Tensor:
    described, tensors = load_case("toy_checkpoint")
    return tensors[described["cases"][case]["output"]]


# The transformer, straight from the published files


def test_the_plain_transformer_is_the_references(plain: Path) -> None:
    model = load_official_transformer(plain / TRANSFORMERS)

    assert relative_difference(velocity(model, "plain"), reference("plain")) < 1e-6


@pytest.mark.parametrize("stored_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_the_8_bit_transformer_is_the_references(own_checkpoint: Any, stored_dtype: Any) -> None:
    def store_as(weights: dict[str, torch.Tensor]) -> None:
        scales = torch.load(own_checkpoint / FLOAT8_MAP)["module"]
        weights |= {
            f"{layer}.weight": weights[f"{layer}.weight"].to(stored_dtype) for layer in scales
        }

    edit_weights(own_checkpoint / FLOAT8, store_as)
    (own_checkpoint / PLAIN).unlink()

    model = load_official_transformer(own_checkpoint / TRANSFORMERS)

    assert relative_difference(velocity(model, "fp8"), reference("fp8")) < 1e-6


def test_the_dtype_can_be_chosen(plain: Path) -> None:
    model = load_official_transformer(plain / TRANSFORMERS, dtype=torch.bfloat16)

    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert relative_difference(velocity(model, "plain"), reference("plain")) < 2e-2


def test_the_full_size_is_the_default_and_every_weight_of_it_has_its_place() -> None:
    with torch.device("meta"):
        weights = HunyuanVideoAvatarTransformer3DModel().state_dict()

    pieces = dict(command.find_pieces({name: weight.shape for name, weight in weights.items()}))

    assert sum(weight.numel() for weight in weights.values()) == 12_991_493_184
    assert pieces.keys() == weights.keys()
    assert len({piece.name for piece in pieces.values()}) == 946  # in the published file


# The command


def test_the_pipeline_loads_what_the_command_wrote(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    parent = plain.parent  # of ckpts
    monkeypatch.setattr(sys, "argv", ["convert", "--source", str(parent), "--target", str(target)])

    command.main()
    pipeline = HunyuanVideoAvatarPipeline.from_pretrained(target)

    expected = load_official_transformer(plain / TRANSFORMERS).state_dict()
    weights = pipeline.transformer.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert pipeline.scheduler.config.shift == 5.0
    assert pipeline.vae.config.temporal_compression_ratio == 4
    assert relative_difference(velocity(pipeline.transformer, "plain"), reference("plain")) < 1e-6


def test_the_text_encoder_ends_with_the_states_in_use(plain: Path, model_dir: Path) -> None:
    whole = LlavaModel.from_pretrained(plain / "llava_llama_image").language_model
    ours = LlavaModel.from_pretrained(model_dir / "text_encoder").language_model
    states = []
    ours.layers[-1].register_forward_hook(lambda _, inputs, output: states.append(output))
    ids = torch.arange(20)[None]

    ours(input_ids=ids)

    expected = whole(input_ids=ids, output_hidden_states=True).hidden_states[-3]
    assert len(ours.layers) == len(whole.layers) - 2
    assert torch.equal(states[0], expected)


def test_the_other_encoders_are_whole(plain: Path, model_dir: Path) -> None:
    clip = CLIPTextModel.from_pretrained(model_dir / "text_encoder_2")
    tokenizer = CLIPTokenizer.from_pretrained(model_dir / "tokenizer_2")
    ids = tokenizer("a kitchen", return_tensors="pt").input_ids
    published = load_file(plain / "text_encoder_2" / "model.safetensors")
    assert torch.equal(
        clip.get_input_embeddings()(ids),
        torch.nn.functional.embedding(
            ids, published["text_model.embeddings.token_embedding.weight"]
        ),
    )
    assert torch.isfinite(clip(ids).pooler_output).all()

    whisper, report = WhisperModel.from_pretrained(
        model_dir / "audio_encoder", output_loading_info=True
    )
    assert not any(report.values())
    published = load_file(plain / "whisper-tiny" / "model.safetensors")
    encoder = whisper.encoder.state_dict()
    assert all(torch.equal(encoder[k], published[f"model.encoder.{k}"]) for k in encoder)


def test_keep_stores_each_tensor_in_its_dtype(own_checkpoint: Path, tmp_path: Path) -> None:
    layer = "double_blocks.0.img_attn_qkv.weight"
    edit_weights(own_checkpoint / PLAIN, lambda w: w.update({layer: w[layer].half()}))

    convert(own_checkpoint, tmp_path / "model")

    stored = load_file(tmp_path / "model/transformer/diffusion_pytorch_model.safetensors")
    half = {name for name, value in stored.items() if value.dtype == torch.float16}
    assert half == {f"transformer_blocks.0.attn.to_{part}.weight" for part in "qkv"}
    assert {stored[name].dtype for name in stored.keys() - half} == {torch.float32}
    whisper = load_file(tmp_path / "model/audio_encoder/model.safetensors")
    assert {value.dtype for value in whisper.values()} == {torch.float16}


def test_keep_keeps_8_bits_and_computes_as_the_reference_does(float8: Path, tmp_path: Path) -> None:
    convert(float8, tmp_path / "model")
    model = HunyuanVideoAvatarTransformer3DModel.from_pretrained(tmp_path / "model/transformer")

    layer = model.transformer_blocks[0].attn.to_q
    assert isinstance(layer, Float8Linear)
    assert layer.weight.dtype == torch.uint8
    assert relative_difference(velocity(model, "fp8"), reference("fp8")) < 1e-6


def test_8_bits_stay_8_bits_whatever_the_model_is_cast_to(float8: Path, tmp_path: Path) -> None:
    convert(float8, tmp_path / "model", "fp8")
    model = HunyuanVideoAvatarTransformer3DModel.from_pretrained(
        tmp_path / "model/transformer", dtype=torch.bfloat16
    )

    assert model.dtype == torch.bfloat16
    assert relative_difference(velocity(model, "fp8"), reference("fp8")) < 2e-2
    assert relative_difference(velocity(model.float(), "fp8"), reference("fp8")) < 2e-2
    assert model.transformer_blocks[0].attn.to_q.weight.dtype == torch.uint8


def test_fp8_has_a_scale_for_each_output_channel(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "model", "fp8")
    model = HunyuanVideoAvatarTransformer3DModel.from_pretrained(tmp_path / "model/transformer")

    whole = load_official_transformer(plain / TRANSFORMERS)
    in_8_bits = [name for name, m in model.named_modules() if isinstance(m, Float8Linear)]
    blocks = ("transformer_blocks.", "single_transformer_blocks.")
    assert in_8_bits == [
        name
        for name, module in whole.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name.startswith(blocks)
        and ".audio_adapter." not in name
    ]
    for name in in_8_bits:
        layer, original = model.get_submodule(name), whole.get_submodule(name)
        assert layer.weight_scale.shape == (layer.out_features, 1)
        restored = dequantize(layer.weight, layer.weight_scale)
        # Half a step of e4m3's three bits, and the rounding of the product to bfloat16.
        largest = original.weight.abs().amax(dim=1, keepdim=True)
        step = original.weight.abs() / 16 + largest / 448 / 512
        assert ((restored - original.weight).abs() <= step * 1.07).all()
    assert relative_difference(velocity(model, "plain"), reference("plain")) < 5e-2


def test_fp8_keeps_llavas_decoder_in_8_bits_within_the_bound(
    plain: Path, model_dir: Path, tmp_path: Path
) -> None:
    convert(plain, tmp_path / "model", "fp8")
    whole = LlavaModel.from_pretrained(model_dir / "text_encoder", dtype=torch.float32)
    encoder = Float8LlavaModel.from_pretrained(
        tmp_path / "model" / "text_encoder", dtype=torch.float32
    )

    in_8_bits = [name for name, m in encoder.named_modules() if isinstance(m, Float8Linear)]
    num_layers = encoder.config.text_config.num_hidden_layers
    assert len(in_8_bits) == 7 * num_layers  # q, k, v, o, gate, up, down
    for name in in_8_bits:
        layer, original = encoder.get_submodule(name), whole.get_submodule(name).weight
        error = (dequantize(layer.weight, layer.weight_scale) - original).abs()
        largest = original.abs().amax(dim=1, keepdim=True)
        assert (error <= torch.maximum(original.abs() / 16, largest / 450_000)).all()
    layers = tuple(f"{name}." for name in in_8_bits)
    others = encoder.state_dict()
    for name, tensor in whole.state_dict().items():
        assert name.startswith(layers) or torch.equal(others[name], tensor)


def test_bf16_casts_transformer_and_text_encoders_but_not_the_vae(
    float8: Path, tmp_path: Path
) -> None:
    convert(float8, tmp_path / "model", "bf16")

    dtypes = {
        folder: {
            tensor.dtype
            for tensor in load_file(
                next((tmp_path / "model" / folder).glob("*.safetensors"))
            ).values()
        }
        for folder in ("transformer", "text_encoder", "text_encoder_2", "vae", "audio_encoder")
    }
    assert dtypes == {
        "transformer": {torch.bfloat16},
        "text_encoder": {torch.bfloat16},
        "text_encoder_2": {torch.bfloat16},
        "vae": {torch.float32},
        "audio_encoder": {torch.float16},
    }
    model = HunyuanVideoAvatarTransformer3DModel.from_pretrained(tmp_path / "model/transformer")
    assert relative_difference(velocity(model, "fp8"), reference("fp8")) < 2e-2


def test_the_face_detector_comes_along_when_it_is_there(
    own_checkpoint: Path, model_dir: Path, tmp_path: Path
) -> None:
    detector = own_checkpoint / "det_align" / "detface.pt"
    detector.parent.mkdir()
    detector.write_bytes(b"a scripted network")

    convert(own_checkpoint, tmp_path / "model")

    copied = tmp_path / "model" / "face_detector" / "detface.pt"
    assert copied.read_bytes() == b"a scripted network"
    assert not (model_dir / "face_detector").exists()


def test_the_command_finishes_what_was_interrupted(
    plain: Path, model_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "model"
    convert(plain, target)
    kept = target / "vae" / "diffusion_pytorch_model.safetensors"
    written = kept.stat().st_mtime_ns
    damaged = target / "transformer" / "diffusion_pytorch_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    for lost in ("model_index.json", "scheduler/scheduler_config.json", "transformer/config.json"):
        (target / lost).unlink()

    convert(plain, target)

    assert kept.stat().st_mtime_ns == written
    for path in model_dir.rglob("*"):
        if path.is_file():
            assert (target / path.relative_to(model_dir)).read_bytes() == path.read_bytes(), path


# What is refused


def test_another_conversion_is_not_mixed_in(plain: Path, float8: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "model", "bf16")

    with pytest.raises(ValueError, match="holds a conversion of other files or to another dtype"):
        convert(plain, tmp_path / "model", "fp8")
    with pytest.raises(ValueError, match="holds a conversion of other files or to another dtype"):
        convert(float8, tmp_path / "model", "bf16")


def test_a_directory_of_something_else_is_left_alone(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("my only copy")

    with pytest.raises(ValueError, match="not empty"):
        convert(plain, tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


UNKNOWN = "unknown: double_blocks.0.surprise.weight"
MISSING = "missing: img_in.proj.bias"
SHAPE = r"wrong shape: fps_proj.mlp.2.bias \(3,\), expected \(64,\)"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.update({"double_blocks.0.surprise.weight": torch.zeros(1)}), UNKNOWN),
        (lambda w: w.pop("img_in.proj.bias"), MISSING),
        (lambda w: w.update({"fps_proj.mlp.2.bias": torch.zeros(3)}), SHAPE),
    ],
)
def test_a_transformer_that_does_not_fit_is_refused_by_name(
    own_checkpoint: Path, tmp_path: Path, edit: Callable[..., Any], message: str
) -> None:
    edit_weights(own_checkpoint / PLAIN, edit)

    with pytest.raises(ValueError, match=message):
        convert(own_checkpoint, tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        load_official_transformer(own_checkpoint / TRANSFORMERS)
    assert not (tmp_path / "model" / "model_index.json").exists()


def test_an_8_bit_layer_without_a_scale_is_refused_by_name(own_checkpoint: Path) -> None:
    edit_weights(own_checkpoint / FLOAT8_MAP, lambda scales: scales.pop("single_blocks.0.linear1"))
    (own_checkpoint / PLAIN).unlink()

    with pytest.raises(ValueError, match=r"missing: single_blocks\.0\.linear1"):
        load_official_transformer(own_checkpoint / TRANSFORMERS)


def test_an_unknown_setting_is_refused_by_name(own_checkpoint: Path) -> None:
    path = own_checkpoint / TRANSFORMERS / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"twist": 1}))

    with pytest.raises(ValueError, match="unknown: twist"):
        load_official_transformer(own_checkpoint / TRANSFORMERS)


@pytest.mark.parametrize("value", [False, None])
def test_a_vae_that_is_not_causal_is_refused(
    own_checkpoint: Path, tmp_path: Path, value: Any
) -> None:
    path = own_checkpoint / "hunyuan-video-t2v-720p/vae/config.json"
    settings = json.loads(path.read_text()) | {"mid_block_causal_attn": value}
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))

    with pytest.raises(ValueError, match="mid_block_causal_attn"):
        convert(own_checkpoint, tmp_path / "model")


def test_a_vae_in_its_training_wrapper_is_the_same_vae(
    own_checkpoint: Path, model_dir: Path, tmp_path: Path
) -> None:
    path = own_checkpoint / "hunyuan-video-t2v-720p/vae/pytorch_model.pt"
    weights = {f"vae.{name}": value for name, value in torch.load(path).items()}
    torch.save({"state_dict": weights | {"loss.logvar": torch.zeros(1)}}, path)

    convert(own_checkpoint, tmp_path / "model")

    file = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "model" / file).read_bytes() == (model_dir / file).read_bytes()


def test_an_encoder_that_lacks_a_weight_is_refused_by_name(
    own_checkpoint: Path, tmp_path: Path
) -> None:

    path = own_checkpoint / "text_encoder_2/model.safetensors"
    weights = load_file(path)
    del weights["text_model.final_layer_norm.bias"]
    save_file(weights, path)

    with pytest.raises(ValueError, match=r"missing: final_layer_norm\.bias"):
        convert(own_checkpoint, tmp_path / "model")


def test_the_command_says_what_is_missing_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["convert", "--source", str(tmp_path), "--target", str(tmp_path / "model")]
    )

    with pytest.raises(SystemExit) as exit_:
        command.main()

    assert exit_.value.code == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
