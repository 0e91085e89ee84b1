"""The `vllm.general_plugins` entry point: vLLM calls `register` in every process it starts."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from folkmoot.experts.vllm_api import Dispatch

DISPATCH_VARIABLE = "FOLKMOOT_DISPATCH"


def register() -> None:
    """Send routed experts' rows to expert hosts, if the environment variable FOLKMOOT_DISPATCH says where those are.

    Without it, nothing is imported and vLLM stays as it is. May be called more than once.
    """
    if not os.environ.get(DISPATCH_VARIABLE):
        return
    from folkmoot.experts.vllm_api import install

    install(_dispatcher_from_environment)


def _dispatcher_from_environment() -> "Dispatch":
    from folkmoot.experts.dispatcher import Dispatcher
    from folkmoot.experts.vllm_api import fuses_multiply_add

    first = Dispatcher.from_env(fused=fuses_multiply_add())
    if not first.config.micro_batches:
        return first
    from folkmoot.experts.alternating import Alternating

    return Alternating(first)
