"""Benchmarks' --quick presets run, and write the flat figures that others rely on. (The gateway's: tests/gateway.)"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

KEYS = {
    "exactness": {
        "max_abs_dlogit_placement",
        "max_abs_dlogprob_vs_vllm_top1_bf16",
        "max_abs_dlogprob_vs_vllm_fp32",
    },
    "throughput": {"ratio_bs8", "tokens_s_bs8", "tokens_s_vllm_bs8"},
    "hop": {"p50_us_1x4_16k", "p99_us_1x4_16k", "ray_actor_p50_us_1x4_16k"},
    "lanes": {"ttft_p99_ratio", "itl_p99_ratio", "batch_throughput_retained"},
    "failover": {
        *("requests_failed", "tokens_lost_or_doubled", "tokens_different", "dead_host_gap_p99_ms", "router_gap_ms"),
        *("throughput_retained", "replicas_restored_s"),
    },
    "cost": {
        *("int8_memory_ratio", "int4_memory_ratio", "best_cost_ratio", "best_cost_ratio_perplexity_rise"),
        *("auto_memory_ratio", "demo_auto_kl"),
        "tiny_int8_tokens_s_bs8",
    },
    "chaos": {"faults", "faults_planned", "requests", "violations", "leaks"},
    "batch": {"results", "missing", "doubled", "different", "ratio_to_vllm", "faults"},
    "observe": {"metrics_on_over_off", "metrics_and_traces_on_over_off", "metrics_on_over_off_gateway_32"},
    "balance": {
        *("worst_over_eplb", "worst_over_bound", "moved_bytes_over_eplb", "decide_s_max"),
    },
    "speed": {
        *("over_transformers_best", "over_transformers_worst", "over_vllm", "over_vllm_int8", "itl_p99_over_p50"),
        "over_transformers_tiny_bs4",
    },
    "idle": {"idle_own_percent", "idle_core_percent", "idle_ray_percent"},
    "autoscale": {
        *("deadline_misses", "engine_hours_over_oracle", "engine_hours_over_fixed_fleet", "leased_work_killed"),
        *("tokens_different", "from_zero_first_token_s"),
    },
}
MAY_BE_BELOW_ZERO = {"best_cost_ratio_perplexity_rise"}
MUST_BE_ZERO = {
    "batch": ("missing", "doubled", "different"),
    "exactness": ("max_abs_dlogit_placement", "max_abs_dlogprob_vs_vllm_top1_bf16"),
    "failover": ("requests_failed", "tokens_lost_or_doubled", "tokens_different"),
    "chaos": ("violations", "leaks"),
    "lanes": ("requests_failed", "tokens_lost_or_doubled", "tokens_different"),
    "autoscale": ("deadline_misses", "leased_work_killed", "tokens_different"),
}
"""These hold on any machine, however busy."""


@pytest.mark.slow
@pytest.mark.timeout(480)
@pytest.mark.parametrize("name", KEYS)
def test_quick_preset(name: str, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=460, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures = json.loads(path.read_text())
    assert KEYS[name] <= set(figures)
    assert figures["machine_cores"]
    for key in KEYS[name] - MAY_BE_BELOW_ZERO:
        assert figures[key] >= 0
    assert {key: figures[key] for key in MUST_BE_ZERO.get(name, ())} == dict.fromkeys(MUST_BE_ZERO.get(name, ()), 0)
    if name == "chaos":
        assert figures["faults"] == figures["faults_planned"] and figures["requests"] > figures["faults"]
    if name == "autoscale":
        assert figures["engine_hours_over_oracle"] < 1.2 and figures["engine_hours_over_fixed_fleet"] < 1
        assert figures["engines_most"] == 2 and figures["engines_taken_with_work"] >= 1, "the fault has happened"
    if name == "balance":
        assert figures["worst_over_eplb"] < 1.01 and figures["worst_over_bound"] < 1.03
        assert figures["moved_bytes_over_eplb"] < 0.2 and figures["lp_over_bound_max"] <= 1.001
    if name == "exactness":
        assert figures["max_abs_dlogprob_vs_vllm_fp32"] <= 1e-6
