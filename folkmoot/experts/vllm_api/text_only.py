"""The language model of a multimodal checkpoint, run as the model of its own that vLLM has for it.

The gateway takes text only, so what sees or hears need not be built, nor its libraries be there (for Llama 4 vLLM's
multimodal class imports torchvision). Published checkpoints name their language model's tensors `language_model.X` or
`model.language_model.X`, and the two classes differ by `ForConditionalGeneration` and `ForCausalLM` in their names.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.model_executor.models import ModelRegistry

PART = "language_model."
_MARK = "folkmoot_text_only"


def class_of(architecture: str) -> str:
    """vLLM's class for the language model of `architecture` alone; where it has none, `architecture` itself."""
    text = architecture.replace("ForConditionalGeneration", "ForCausalLM")
    return text if text in ModelRegistry.models else architecture


def overrides(config: Any) -> Any:
    """For vLLM's `hf_overrides`: the configuration of the language model alone, where vLLM has a class for that."""
    text = getattr(config, "text_config", None)
    architecture = (config.architectures or [""])[0]
    if text is None or class_of(architecture) == architecture:
        return config
    text.architectures = [class_of(architecture)]
    if (quantisation := getattr(config, "quantization_config", None)) is not None:
        text.quantization_config = quantisation
    setattr(text, _MARK, True)
    return text


def text_weights(config: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the model that `config` (vLLM's ModelConfig) describes, under its own names."""
    is_part = getattr(config.hf_config, _MARK, False)
    for name, tensor in weights:
        if not is_part:
            yield name, tensor
        elif PART in name or name.startswith("lm_head."):
            yield name.replace(PART, "", 1), tensor
