"""What is bound to the LoRA inputs of an adapter-lane graph.

Their defaults are the adapter that was trained, so answering with it binds nothing. ONNX Runtime's own
`add_active_adapter` is silently ignored under IO binding; therefore inputs are bound by hand.
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
    """Inputs to feed beside the tokens: nothing for the bundle's own adapter, zeros for `none`.

    Args:
        bundle: An open bundle.
        session: Its graph.
        adapter: None (the bundle as it is) or "none" (its base).

    Returns:
        lora_A [rank, in] and lora_B [out, rank] of every adapted layer, by input name.

    Raises:
        UsageError: another name, or a merged bundle, whose base is gone.
    """
    if adapter is None:
        return {}
    if adapter != "none":
        raise UsageError(f"--adapter {adapter}: only none is known{did_you_mean(adapter, ['none'])}")
    if bundle.manifest["lane"] == "merged":
        raise UsageError(
            f"{bundle.path} has its adapter merged into the weights, so --adapter none cannot take it out: "
            "export the run with --lane adapter"
        )
    # Where the rank is free, one column of zeros is the cheapest adapter that changes nothing.
    return {
        node.name: np.zeros([size if isinstance(size, int) else 1 for size in node.shape], np.float32)
        for node in session.get_overridable_initializers()
        if node.name.startswith(("lora_A.", "lora_B."))
    }
