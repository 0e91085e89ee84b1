"""The options of `folkmoot up`, in the order in which `--help` shows them; defaults are those of `UpOptions`."""

import re
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import click

from folkmoot import logs
from folkmoot.cluster import host_groups
from folkmoot.cluster.cli_common import EXPERT_DTYPE, HOSTS, SPAN
from folkmoot.cluster.up_options import UpOptions

PEM = click.Path(resolve_path=True, path_type=Path)


def _checked_weights(_context: click.Context, _option: click.Parameter, text: str) -> str:
    from folkmoot.gateway.settings import parse_weights

    try:
        parse_weights(text)
    except ValueError as e:
        raise click.BadParameter(str(e)) from e
    return text


def _checked_metrics(_context: click.Context, _option: click.Parameter, text: str) -> str:
    if not re.fullmatch(r"off|.+:\d{1,5}", text):
        raise click.BadParameter(f"{text!r} is neither HOST:PORT nor off")
    return text


def _checked_groups(
    _context: click.Context, _option: click.Parameter, texts: tuple[str, ...]
) -> tuple[host_groups.HostGroup, ...]:
    try:
        return tuple(host_groups.parse(text) for text in texts)
    except ValueError as e:
        raise click.BadParameter(str(e)) from e


OPTIONS: tuple[Callable[[Callable[..., Any]], Callable[..., Any]], ...] = (
    click.option(
        "--model", required=True, metavar="PATH|demo", help='checkpoint folder (Hugging Face layout), or "demo"'
    ),
    click.option(
        "--engines",
        type=SPAN,
        default=str(UpOptions.engines),
        show_default=True,
        help="vLLM engines; with MIN..MAX (0..4) as many as the work that is owed asks for, one to begin with",
    ),
    click.option(
        "--idle-s",
        type=click.FloatRange(0),
        default=UpOptions.idle_s,
        show_default=True,
        help="with --engines 0..MAX: the last engine stays for so long after the last interactive request",
    ),
    click.option(
        "--hosts",
        type=HOSTS,
        help="expert hosts to spread the experts over; with MIN..MAX more come when the busiest is the bottleneck  "
        "[default: 2, or as many as --replicas]",
    ),
    click.option(
        "--experts-per-host",
        type=click.IntRange(1),
        metavar="K",
        help="instead of --hosts: experts (of every layer) a host holds",
    ),
    click.option(
        "--host-group",
        "host_groups",
        multiple=True,
        callback=_checked_groups,
        metavar="N:cpu=C,memory=SIZE",
        help="instead of --hosts, and repeatable: N expert hosts with C cores and room for "
        "SIZE (as 8GiB) of experts each; "
        "each gets its share of them by its cores, or by speed=S",
    ),
    click.option(
        "--replicas",
        type=click.IntRange(1),
        help="hosts that can run each expert; any but one may die  [default: all hosts "
        "where --share-weights makes that "
        "cost no memory (one node, a CPU), else 1]",
    ),
    click.option(
        "--share-weights/--no-share-weights",
        default=UpOptions.share_weights,
        help="the expert hosts of a node keep experts in memory that they share, once a "
        "node: replicas cost no memory, and "
        "a host that is started again finds its experts there  [default: on a CPU]",
    ),
    click.option(
        "--templates/--no-templates",
        default=UpOptions.templates,
        help="keep a process for each expert host that has loaded its experts, and a fork of it that is its next life "
        "within milliseconds; without shared weights it holds a copy of them  [default: where weights are shared]",
    ),
    click.option(
        "--placement",
        type=click.Choice(["spread", "pack"]),
        default=UpOptions.placement,
        show_default=True,
        help="hosts over nodes",
    ),
    click.option(
        "--listen",
        default=UpOptions.listen,
        show_default=True,
        metavar="HOST:PORT",
        help="the gateway's address; port 0 takes a free one",
    ),
    click.option("--require-keys", is_flag=True, help="serve only who sends an API key; `folkmoot keys` makes them"),
    click.option(
        "--insecure", is_flag=True, help="serve whoever comes, also where --listen is an address others can reach"
    ),
    click.option("--tls-cert", type=PEM, metavar="FILE", help="certificate chain (PEM): the gateway speaks TLS"),
    click.option("--tls-key", type=PEM, metavar="FILE", help="its private key; both are read again when they change"),
    click.option(
        "--tls-client-ca", type=PEM, metavar="FILE", help="CA of clients' certificates: others are not let in"
    ),
    click.option(
        "--metrics",
        default=UpOptions.metrics,
        show_default=True,
        metavar="HOST:PORT|off",
        callback=_checked_metrics,
        help="where each node answers Prometheus, for all its processes; port 0 takes a free one",
    ),
    click.option(
        "--redis",
        metavar="URL",
        envvar="FOLKMOOT_REDIS",
        help="request store (Redis 7+ or Valkey); better by environment variable "
        "FOLKMOOT_REDIS, where it has a password  "
        "[default: an embedded one]",
    ),
    click.option(
        "--address", metavar="ADDRESS", help='join a running Ray cluster ("auto" or HOST:PORT)  [default: a local Ray]'
    ),
    click.option(
        "--max-model-len", type=click.IntRange(2), help="longest prompt and answer in tokens  [default: the model's]"
    ),
    click.option(
        "--max-num-seqs",
        type=click.IntRange(1),
        default=UpOptions.max_num_seqs,
        show_default=True,
        help="requests an engine runs at once",
    ),
    click.option(
        "--max-batch-seqs",
        type=click.IntRange(1),
        help="of them batch requests  [default: all; three quarters within a minute of an interactive request]",
    ),
    click.option(
        "--batch-rows",
        type=click.IntRange(0),
        default=UpOptions.batch_rows,
        show_default=True,
        help="batch requests that take part in a step beside interactive ones; the others wait, and keep their memory",
    ),
    click.option(
        "--batch-prompt-tokens",
        type=click.IntRange(1),
        default=UpOptions.batch_prompt_tokens,
        show_default=True,
        help="tokens of batch prompts that begin in one step",
    ),
    click.option(
        "--batch-invariant/--no-batch-invariant",
        default=None,
        help="a request's tokens do not depend on what else an engine computes meanwhile (docs/failures.md)  "
        "[default: on a CPU]",
    ),
    click.option(
        "--prefix-caching/--no-prefix-caching",
        default=UpOptions.prefix_caching,
        show_default=True,
        help="prompts that begin alike share the KV cache of their beginning",
    ),
    click.option(
        "--compile/--no-compile",
        "compiled",
        default=UpOptions.compiled,
        show_default=True,
        help="compile the engine's part of the model (torch.compile): a slower start, quicker steps (docs/speed.md)",
    ),
    click.option(
        "--speculate",
        "speculative_tokens",
        type=click.IntRange(0, 16),
        default=UpOptions.speculative_tokens,
        show_default=True,
        metavar="N",
        help="guess N tokens ahead from what the text has had before, and check them in one step; quicker where answers"
        " repeat their prompts and few run at once. min_p and logit_bias are refused then",
    ),
    click.option(
        "--prefill-chunk",
        type=click.IntRange(1),
        metavar="TOKENS",
        help="compute prompts in pieces of at most so many tokens, so that a long one holds nobody up for long  "
        "[default: whole]",
    ),
    click.option(
        "--micro-batch-from",
        type=click.IntRange(2),
        metavar="REQUESTS",
        help="compute steps of at least so many requests in two halves, one in attention while the rows of the other "
        "are at the experts; for experts with cores or devices of their own. Not with --compile or --speculate  "
        "[default: never]",
    ),
    click.option(
        "--tenant-weights",
        metavar="NAME=WEIGHT,...",
        default=UpOptions.tenant_weights,
        callback=_checked_weights,
        help="shares of each lane, by tokens; 1 for who is not named",
    ),
    click.option("--dtype", default=UpOptions.dtype, show_default=True, help="auto, bfloat16, float16 or float32"),
    click.option(
        "--expert-dtype",
        type=EXPERT_DTYPE,
        default=UpOptions.expert_dtype,
        show_default=True,
        help="what expert hosts quantise experts to while they load them; kept beside "
        "the checkpoint for the next start. auto:0.4 or auto:8GiB: experts of 4, 8 and 16 bits, such that all "
        "together take that part of bf16's memory, or that size, with the least error (docs/quantisation.md)",
    ),
    click.option(
        "--expert-loads",
        type=click.Path(resolve_path=True, path_type=Path),
        metavar="FILE",
        help="with --expert-dtype auto:BUDGET: what `folkmoot experts` recorded, or printed with --json, so that often "
        "used experts get more bits  [default: all count alike]",
    ),
    click.option("--device", default=UpOptions.device, show_default=True, help="cpu or cuda"),
    click.option(
        "--kv-cache-gib",
        type=float,
        default=UpOptions.kv_cache_gib,
        show_default=True,
        help="KV cache of each engine, on a CPU",
    ),
    click.option("--seed", type=int, default=UpOptions.seed, show_default=True),
    click.option(
        "--transport",
        type=click.Choice(["auto", "shm", "tcp"]),
        default=UpOptions.transport,
        show_default=True,
        help="how rows travel",
    ),
    click.option(
        "--combine",
        type=click.Choice(["rows", "sum"]),
        default=UpOptions.combine,
        show_default=True,
        help="rows: the answer does not depend on the placement; sum: fewer bytes come back",
    ),
    click.option(
        "--hedge-s",
        type=click.FloatRange(0.01, 10.0),
        default=UpOptions.hedge_s,
        show_default=True,
        help="an expert host that is silent for this long, and four times what it lately took for as many rows, is "
        "late: its rows are asked of a replica as well, and it is asked for no more until it has answered. "
        "As much as --stall-s: never",
    ),
    click.option(
        "--stall-s",
        type=click.FloatRange(0.05, 10.0),
        default=UpOptions.stall_s,
        show_default=True,
        help="one that is silent for this long, and those four times, counts as stalled, and is replaced. "
        "Higher: safer on a busy machine. The last replica of an expert is given 10 s",
    ),
    click.option(
        "--rebalance",
        type=click.Choice(["off", "on"]),
        default="on" if UpOptions.rebalance else "off",
        show_default=True,
        help="give hot experts extra replicas on hosts that are less busy, while requests run (docs/balance.md)",
    ),
    click.option(
        "--spare-experts",
        type=click.IntRange(1),
        default=UpOptions.spare_experts,
        show_default=True,
        metavar="K",
        help="with --rebalance: extra replicas that a host may hold in each layer, beyond its experts",
    ),
    click.option(
        "--load-half-life-s",
        type=click.FloatRange(0.5, 86400.0),
        default=UpOptions.load_half_life_s,
        show_default=True,
        help="after so long rows count half in the load of an expert; balance is looked at twice in that time",
    ),
    click.option(
        "--no-replica-timeout-s",
        type=click.FloatRange(0.1),
        default=UpOptions.no_replica_timeout_s,
        show_default=True,
        help="how long running requests wait for a replacement when an expert has no live "
        "replica; then they end with an "
        "error that says so, and the engine goes on",
    ),
    click.option(
        "--background-workers/--no-background-workers",
        default=UpOptions.background_workers,
        help="engines' OpenMP workers yield to everything else; quick where only this "
        "cluster computes, slow beside other "
        "work  [default: with one engine on a CPU]",
    ),
    click.option(
        "--cpus-per-host",
        type=float,
        default=UpOptions.cpus_per_host,
        show_default=True,
        help="share of a CPU that Ray reserves for an expert host",
    ),
    click.option("--gpus-per-host", type=float, default=UpOptions.gpus_per_host, show_default=True),
    click.option(
        "--cpus-per-engine",
        type=float,
        default=UpOptions.cpus_per_engine,
        show_default=True,
        help="share of a CPU that Ray reserves for an engine; what no node has room for makes Ray's autoscaler add one",
    ),
    click.option("--gpus-per-engine", type=float, default=UpOptions.gpus_per_engine, show_default=True),
    click.option(
        "--max-experts-per-host",
        type=click.IntRange(1),
        metavar="K",
        help="most experts (of every layer) that fit on a host, also when it stands in for another  [default: all]",
    ),
    click.option(
        "--log-format",
        type=click.Choice(logs.FORMATS),
        default=UpOptions.log_format,
        show_default=True,
        envvar=logs.FORMAT_VARIABLE,
        help="how the lines of all logs look; json: one object a line, for programs",
    ),
    click.option(
        "--log-level",
        type=click.Choice(logs.LEVELS),
        default=UpOptions.log_level,
        show_default=True,
        envvar=logs.LEVEL_VARIABLE,
        help="the least that is logged",
    ),
)


def up_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """All of them."""
    return reduce(lambda decorated, option: option(decorated), reversed(OPTIONS), command)
