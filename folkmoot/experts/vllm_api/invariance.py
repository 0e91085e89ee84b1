"""A request's tokens do not depend on what else is in the batch.

On a CPU vLLM splits the keys of a long sequence over cores where a step has too few sequences to keep them busy, and
adds the parts up in float32: so in bf16 a token depended on how many others there were. That is all there is of it:
matrix products and expert kernels compute each row on its own (docs/failures.md). On a GPU vLLM has kernels for it.
"""

CPU = {"VLLM_CPU_ATTN_SPLIT_KV": "0"}
GPU = {"VLLM_BATCH_INVARIANT": "1"}


def batch_invariance(device: str, wanted: bool | None) -> dict[str, str]:
    """vLLM's environment variables for it; set them before an engine is made. `wanted` None: on a CPU, where it costs
    nothing that could be measured on two cores."""
    if device == "cpu":
        return {} if wanted is False else dict(CPU)
    return dict(GPU) if wanted else {}
