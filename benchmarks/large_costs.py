"""What the work of a model takes that one would want many workers for, measured on this machine."""

from __future__ import annotations

from colm_serve.engine.loading import make_pool, to_serving
from colm_serve.engine.prefill_cost import measure_prefill_cost
from colm_serve.engine.step_cost import measure_step_cost
from colm_serve.model.checkpoint import LoadedModel
from colm_serve.model.config import ColmConfig
from colm_serve.model.transformer import ColmModel
from colm_serve.simulate.costs import PassCosts, StepCosts, WorkerCosts

CONFIG = ColmConfig(
    vocab_size=32000, chains=(8, 8, 8, 8), d_model=2048, d_ff=8192, num_layers=8, num_heads=32,
    num_kv_heads=8, head_dim=64, max_context=4096,
)  # fmt: skip
CHUNK_TOKENS = 512
#: A link of 10 Gbit/s, and gRPC on it.
LINK_BYTES_PER_S = 1.25e9
HOP_S = 0.0005
#: Longer than a worker that wants to serve would measure.
BUDGET_S = 30.0


def measure_large_costs() -> WorkerCosts:
    """Of `CONFIG` with random weights: its steps at each level, and its passes over prompts."""
    model = to_serving(ColmModel(CONFIG))
    pool = make_pool(LoadedModel(model, ""), num_pages=128, page_size=16)
    kv_bytes = 4 * 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim
    return WorkerCosts(
        step=StepCosts.of(measure_step_cost(model, pool, BUDGET_S)),
        prefill=PassCosts.of(measure_prefill_cost(model, pool, CHUNK_TOKENS, BUDGET_S)),
        transfer_token_s=kv_bytes / LINK_BYTES_PER_S,
        hop_s=HOP_S,
    )
