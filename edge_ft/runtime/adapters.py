"""Values for the LoRA inputs of an adapter-lane graph.

Their defaults are the trained adapter, so answering with it binds nothing. ONNX Runtime silently ignores its own
`add_active_adapter` under IO binding, so inputs are bound by hand.
"""

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_ft.artifacts import Bundle
from edge_ft.errors import UsageError, did_you_mean

__all__ = ["adapter_inputs"]


def adapter_inputs(
    bundle: Bundle, session: ort.InferenceSession, adapter: str | None
) -> dict[str, NDArray[np.float32]]:
    """Return the adapter's inputs: nothing for the bundle's own adapter, zeros for `none`.

    Args:
        bundle: An open bundle.
        session: Its graph.
        adapter: None (the bundle's own adapter) or "none" (the base without an adapter).

    Returns:
        By input name, lora_A [rank, in_features] and lora_B [out_features, rank] of every adapted layer.

    Raises:
        UsageError: another name, or a merged bundle, which no longer has its base.
    """
    if adapter is None:
        return {}
    if adapter != "none":
        raise UsageError(f"--adapter {adapter}: the only value is none{did_you_mean(adapter, ['none'])}")
    if bundle.manifest["lane"] == "merged":
        raise UsageError(
            f"{bundle.path} has its adapter merged into the weights, so --adapter none cannot remove it: "
            "export the run with --lane adapter"
        )
    # Where the rank is a free dimension, rank 1 is the cheapest adapter of zeros.
    return {
        node.name: np.zeros([size if isinstance(size, int) else 1 for size in node.shape], np.float32)
        for node in session.get_overridable_initializers()
        if node.name.startswith(("lora_A.", "lora_B."))
    }
